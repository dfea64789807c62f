//! Breaks a node on purpose, and keeps the account of what its user would have lost.
//!
//! One small file per fault: what it does to the node, and which layers may rightly heal it. Faults act on the real
//! thing: real signals, real files, a real event loop. The scorecard compares user data by content before and after;
//! it never asks koboshi how it thinks it did.

pub mod faults;
pub mod ledger;
pub mod preload;
pub mod seed;

use engine::Layer;
use host::Result;
use node::Node;
use std::path::Path;

/// The node a fault is let loose on.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The node; must be one of our own making.
    pub node: &'a Node,
    /// The file whose content tells the preloaded script what to do (see [`preload`]).
    pub fault_file: &'a Path,
}

/// One way to break a node.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// What it is called on the command line and in JSON.
    pub name: &'static str,
    /// One line for people.
    pub about: &'static str,
    /// The layers that may rightly heal it; another one healing it is a wrong verdict.
    pub healed_by: &'static [Layer],
    /// Breaks the node.
    pub inject: fn(&Target<'_>) -> Result<()>,
}

/// The faults of the demo, in the order in which they are shown. Those that need a start stand apart from each other:
/// three starts in 300 s are all that OpenClaw bears, and what is repaired in place fills the time between.
pub const DEMO: [&Fault; 10] = [
    &faults::killed::FAULT,
    &faults::program_file::ALONE,
    &faults::program_tree::ALONE,
    &faults::stopped::FAULT,
    &faults::config_truncated::ALONE,
    &faults::spinning::FAULT,
    &faults::program_file::KILLED,
    &faults::program_tree::KILLED,
    &faults::config_truncated::KILLED,
    &faults::database_deleted::FAULT,
];

/// The fault of this name.
#[must_use]
pub fn by_name(name: &str) -> Option<&'static Fault> {
    DEMO.iter().copied().find(|f| f.name == name)
}
