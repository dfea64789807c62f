//! Proves: the engine on a simulated host, under fault schedules, watched by checkers.
//!
//! ```text
//!   seed ─► schedule (swarm of faults, injections) ─► world: gateway, disk, containers, outbox, clock
//!                                                       ▲  │ truth
//!                                   effects, time, death │  ▼
//!   engine (or a mutant of it) ◄──next, apply──► agent: the loop of the engine's documentation
//!                                                       │ records, effects
//!                                                       ▼
//!                                              checkers: their own books
//! ```
//!
//! Phase 1 checks safety while anything may fail; in phase 2 nothing fails any more and everything must settle.
//! The checkers are proven in turn: every mutant of the engine must be caught (`tests/mutants.rs`).
//! `docs/simulation.md` says which checker catches which.

pub mod agent;
pub mod brain;
pub mod check;
pub mod prng;
pub mod run;
pub mod world;

pub use brain::Mutant;
pub use check::{Counts, Violation};
pub use run::{Told, live, run};
