//! Touches Linux. Every call that leaves the process takes a deadline.

pub mod clock;
pub mod container;
pub mod dying;
pub mod error;
pub mod exchange;
pub mod files;
pub mod immutable;
pub mod journal;
pub mod notify;
pub mod output;
pub mod poll;
pub mod pressure;
pub mod process;
pub mod reap;
pub mod registry;
pub mod run;
pub mod service;
mod shut;
pub mod signals;
mod spawn;
pub mod tls;
pub mod unpack;
pub mod user;
pub mod watch;

pub use error::{Context, Error, Kind, Result};
