//! The command line, as a person or a script meets it: the real binary on a node in a temporary directory.

#![allow(clippy::unwrap_used, unreachable_pub, reason = "all of this is a test")]

mod agent;
mod all;
mod disk;
mod emergency;
mod fake;
mod gateway;
mod install;
mod peers;
mod reading;
mod recover;
mod snapshots;
