//! Touches Linux. Every call that leaves the process takes a deadline.

pub mod clock;
pub mod container;
pub mod error;
pub mod files;
pub mod output;
pub mod poll;
pub mod process;
pub mod reap;
pub mod run;
mod spawn;

pub use error::{Context, Error, Kind, Result};
