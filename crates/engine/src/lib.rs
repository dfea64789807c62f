//! Decides. Pure: no I/O, no clock, no randomness.

pub mod words;

pub use words::{Class, FaultKind, Finding, Layer, Moment, Outcome, Verdict};
