//! Heals: one file per layer. Each layer's work runs in a container of its own and may be killed at any moment, so
//! every one of them can be begun again from the start. None of them says whether it worked: the judge does.
//!
//! [`examine`] is the common look at the disk that all of them, and the decision between them, are fed by.

mod beside;
pub mod examine;
pub mod in_place;
pub mod install;
pub mod lend;
mod mend;
#[cfg(test)]
mod nobody;
mod owners;
pub mod peer_copy;
pub mod quiet;
pub mod restart;
pub mod restore;
pub mod room;
pub mod system_install;
mod trees;
pub mod trial;
pub mod user_install;

pub use examine::{Care, Examination, Need, examine, see, weigh};

use engine::{Class, Limits};
use host::clock::Deadline;
use host::service::Manager;
use node::{Baseline, Node};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;
use store::{Plan, Store};

/// How long a gateway that still answers gets at least to end by itself before its container is killed.
pub const GRACE: Duration = Duration::from_secs(10);
/// The longest that OpenClaw's own unit lets a draining gateway take (`TimeoutStopSec`).
pub const DRAIN: Duration = Duration::from_secs(330);
/// The same for one that does not answer: Node reads signals on the event loop, and that loop has been dead for as long
/// as the judge's limits say. What is left to wait for is a handler outside of it, which needs milliseconds.
pub const GRACE_HUNG: Duration = Duration::from_secs(1);

/// What a layer's work is done with.
pub struct Bench<'a> {
    /// The patient.
    pub node: &'a Node,
    /// Who starts and stops it.
    pub manager: &'a mut dyn Manager,
    /// What is remembered of it, where there is a store.
    pub store: Option<&'a Store>,
    /// How the node was when it last served.
    pub baseline: Option<&'a Baseline>,
    /// Where everything goes that is replaced: one directory per incident.
    pub quarantine: PathBuf,
    /// Ready trees to swap in: (root name, path).
    pub spares: Vec<(String, PathBuf)>,
    /// When the work is killed.
    pub deadline: Deadline,
    /// By what the limits inside the work are divided, as its deadline is.
    pub limits: Limits,
}

impl Bench<'_> {
    pub(crate) fn plan(&self) -> Plan {
        Plan { quarantine: self.quarantine.clone(), spares: self.spares.clone(), ..Plan::default() }
    }
}

/// What a layer's work says it did. For people and for the journal; nothing is decided by it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// One line each.
    pub done: Vec<String>,
    /// What it could not do, one line each.
    pub undone: Vec<String>,
    /// What of the user's came back from a snapshot, and so lacks what was written after it was taken.
    #[serde(default)]
    pub came_back: Vec<CameBack>,
}

/// Something of the user's that came back from a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CameBack {
    /// Whose class.
    pub class: Class,
    /// From which snapshot.
    pub snapshot: String,
    /// For people: what, of which moment, and what cannot be in it.
    pub what: String,
}

impl Report {
    pub(crate) fn did(&mut self, line: impl Into<String>) {
        self.done.push(line.into());
    }

    pub(crate) fn could_not(&mut self, line: impl Into<String>) {
        self.undone.push(line.into());
    }
}
