//! The words every room shares, with nothing in them that could touch the world.
//!
//! They live in the lowest crate so that `node` can name a finding, `store` a class and the ladder a layer
//! without any of them depending on each other.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A point in time that survives suspend and never jumps: the boot and the milliseconds since it
/// (CLOCK_BOOTTIME). Two moments of different boots are ordered by nothing but the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Moment {
    /// First 64 bits of the kernel's boot id.
    pub boot: u64,
    /// Milliseconds since that boot, suspended time included.
    pub ms: u64,
}

impl Moment {
    /// The moment `ms` milliseconds later, in the same boot.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Moment {
        Moment { boot: self.boot, ms: self.ms.saturating_add(ms) }
    }

    /// Milliseconds from `earlier` to `self`; `None` when the two are of different boots.
    #[must_use]
    pub fn since_ms(self, earlier: Moment) -> Option<u64> {
        (self.boot == earlier.boot).then(|| self.ms.saturating_sub(earlier.ms))
    }
}

/// The recovery strategies, in the order in which they are climbed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// Damage on disk put right while the node serves: no interruption.
    InPlace,
    /// Layer 0: stop for certain, clear the latch, start.
    Restart,
    /// Layer 1: repair from the newest trusted snapshot.
    Restore,
    /// Layer 2: npm global install of the last good version, by sudo or root.
    SystemInstall,
    /// Layer 3: the same in the user's own prefix.
    UserInstall,
    /// Layer 4: program and runtime from a healthy peer.
    PeerCopy,
    /// Layer 5: a state to hold: alert, answer, keep trying.
    Emergency,
}

impl Layer {
    /// The layers that a climb tries before emergency, in order.
    pub const CLIMB: [Layer; 5] =
        [Layer::Restart, Layer::Restore, Layer::SystemInstall, Layer::UserInstall, Layer::PeerCopy];

    /// The name used in the command line, JSON, journal and alerts.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Layer::InPlace => "in-place",
            Layer::Restart => "restart",
            Layer::Restore => "restore",
            Layer::SystemInstall => "system-install",
            Layer::UserInstall => "user-install",
            Layer::PeerCopy => "peer-copy",
            Layer::Emergency => "emergency",
        }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the judge says of a node. Three-valued: not knowing is never treated as failure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "verdict")]
pub enum Verdict {
    /// The right process answers every probe rightly.
    Serving {
        /// What is less than whole though it serves (for example channels silenced by the crash-loop breaker).
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        degraded: Vec<String>,
    },
    /// Proven not to serve; `why` is one sentence.
    NotServing {
        /// What proves it.
        why: String,
    },
    /// Starting, draining, busy, updating, or our own probe failed: no repair while this is within its limit.
    Inconclusive {
        /// What is being waited for.
        why: String,
    },
}

impl Verdict {
    /// Whether the node serves, degraded or not.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        matches!(self, Verdict::Serving { .. })
    }
}

/// What a stored or damaged thing is to its owner; decides when it may be touched at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// The npm package tree.
    Program,
    /// The Node runtime.
    Runtime,
    /// Unit files, drop-ins, environment files.
    Service,
    /// `openclaw.json` and its includes.
    Config,
    /// Channel credentials, device keys, OAuth: ratchets, never rolled back while intact.
    Credentials,
    /// Shared databases and machine state.
    State,
    /// Per-agent databases and transcripts.
    Sessions,
    /// The agent's working files.
    Workspace,
}

impl Class {
    /// Every class, in restore order.
    pub const ALL: [Class; 8] = [
        Class::Program,
        Class::Runtime,
        Class::Service,
        Class::Config,
        Class::Credentials,
        Class::State,
        Class::Sessions,
        Class::Workspace,
    ];

    /// Whether the class converges to the snapshot (true) or belongs to the user and is touched only by rule (false).
    #[must_use]
    pub fn converges(self) -> bool {
        match self {
            Class::Program | Class::Runtime | Class::Service => true,
            Class::Config | Class::Credentials | Class::State | Class::Sessions | Class::Workspace => false,
        }
    }

    /// The name used in the command line, JSON and the store.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Class::Program => "program",
            Class::Runtime => "runtime",
            Class::Service => "service",
            Class::Config => "config",
            Class::Credentials => "credentials",
            Class::State => "state",
            Class::Sessions => "sessions",
            Class::Workspace => "workspace",
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a finding says is wrong, by class of fault rather than by catalogue entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// No gateway process.
    ProcessGone,
    /// A gateway process that does not answer (stopped, spinning, stuck).
    Hung,
    /// Files of a converging class differ from the trusted snapshot.
    FilesDamaged,
    /// The config is missing, unparseable, or blamed by the gateway.
    ConfigBroken,
    /// A class root or database is missing or emptied.
    RootMissing,
    /// A database fails its check.
    DatabaseCorrupt,
    /// Another device id, or counts fallen to zero, with nothing to explain it.
    Amnesia,
    /// The Node runtime is missing or outside the program's engine range.
    RuntimeUnfit,
    /// The service manager has given up (start limit, exit 78) or the unit is gone.
    ServiceLatched,
    /// Somebody else's process holds the gateway's port.
    PortTaken,
    /// Ownership or mode keeps the gateway from its files.
    Permission,
    /// No space or no inodes.
    DiskFull,
    /// The program is older than its database or config.
    SchemaNewer,
    /// An npm or openclaw update is at work.
    UpdateAtWork,
    /// The owner wants the node down (disabled, masked, `koboshi node stop`).
    OwnersWill,
    /// No good snapshot for too long.
    BackupStale,
    /// Something to tell that asks for no repair.
    Notice,
}

/// One fact with its evidence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The class of fault.
    pub kind: FaultKind,
    /// The class of data it concerns, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<Class>,
    /// One line: what was seen.
    pub what: String,
    /// The evidence: paths, numbers, the gateway's own words. Bounded by whoever makes it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub evidence: Vec<String>,
}

/// How a climb or an in-place repair ended, as told to people and in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The judge confirmed that the node serves.
    Recovered,
    /// Nothing was to be done, or nothing might be done.
    LeftAlone,
    /// All layers failed; alerted, holding, trying on.
    Emergency,
    /// Ended without the node serving (only where a climb was ended from outside).
    Failed,
}
