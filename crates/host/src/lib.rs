//! Touches Linux. Every call that leaves the process takes a deadline.

pub mod error;

pub use error::{Context, Error, Kind, Result};
