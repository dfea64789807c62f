//! Who starts and ends the gateway: koboshi itself, or systemd.
//!
//! One trait for both, so that the layers above never ask which. Guarantees: an answer is read from the kernel or from
//! the service manager's own properties, never from a message's wording; a stop ends with the proof that nothing
//! of the service is left, first asked for politely, then enforced through the service's cgroup; every call ends at
//! its deadline; a hold lives where a reboot forgets it and can be taken back by any later agent.

mod embedded;
mod systemd;

pub use embedded::{Embedded, GatewaySpec};
pub use systemd::{Scope, Systemd};

use crate::clock::Deadline;
use crate::error::Result;
use crate::process::ProcessId;
use engine::words::Moment;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::Duration;

/// Kept back of every stop's deadline for the kill, if the polite way takes all its time.
const KILL_RESERVE: Duration = Duration::from_secs(2);

/// What a service is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Active {
    /// Its main process runs.
    Active,
    /// It is being started.
    Activating,
    /// It ended, and its manager will start it again by itself in a moment.
    AutoRestart,
    /// It is being stopped.
    Deactivating,
    /// It does not run, and that is no failure.
    Inactive,
    /// It does not run because it failed; its manager has given up on it.
    Failed,
    /// Its manager says something we do not know.
    Unknown,
}

/// One look at a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceState {
    /// What it is doing.
    pub active: Active,
    /// Whether its manager knows it at all (a unit file that loads; always true for embedded).
    pub known: bool,
    /// Whether it starts with the machine; `None` where there is no such thing (static units, embedded).
    pub enabled: Option<bool>,
    /// Whether somebody masked it.
    pub masked: bool,
    /// Whether koboshi holds it down ([`Manager::hold`]).
    pub held: bool,
    /// Its main process.
    pub main: Option<ProcessId>,
    /// How it last ended, in systemd's words (`success`, `exit-code`, `signal`, `start-limit-hit`, ...).
    pub result: String,
    /// The status its main process last exited with.
    pub exit_status: Option<i32>,
    /// The signal that ended its main process.
    pub exit_signal: Option<i32>,
    /// How often its manager has restarted it by itself.
    pub restarts: u32,
    /// Its cgroup, as a path below the cgroup mount.
    pub cgroup: Option<String>,
    /// Why its manager will not start it again until told to; `None` while it would.
    pub latched: Option<String>,
    /// When it entered this state.
    pub since: Option<Moment>,
    /// Files that define it, as its manager loaded them.
    pub files: Vec<String>,
    /// How long its manager lets a stop take before it kills, in milliseconds.
    pub stop_limit_ms: Option<u64>,
}

impl ServiceState {
    /// A service of which nothing is known.
    #[must_use]
    pub fn unknown() -> ServiceState {
        ServiceState {
            active: Active::Unknown,
            known: false,
            enabled: None,
            masked: false,
            held: false,
            main: None,
            result: String::new(),
            exit_status: None,
            exit_signal: None,
            restarts: 0,
            cgroup: None,
            latched: None,
            since: None,
            files: Vec::new(),
            stop_limit_ms: None,
        }
    }

    /// Whether its manager is at work on it or will be in a moment: nobody else may start it now.
    #[must_use]
    pub fn in_motion(&self) -> bool {
        match self.active {
            Active::Activating | Active::AutoRestart | Active::Deactivating => true,
            Active::Active | Active::Inactive | Active::Failed | Active::Unknown => false,
        }
    }
}

/// How a service came to its end. Either way nothing of it is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stopped {
    /// Its main process ended by itself when asked (or was gone); what that left behind was ended.
    Clean {
        /// How long all of it took, in milliseconds.
        took_ms: u64,
    },
    /// Its main process had to be killed.
    Killed {
        /// How long all of it took, in milliseconds.
        took_ms: u64,
    },
}

/// What starts and ends the gateway.
pub trait Manager: Send {
    /// `embedded`, `systemd-user` or `systemd-system`.
    fn kind(&self) -> &'static str;
    /// Looks.
    fn look(&mut self, deadline: Deadline) -> Result<ServiceState>;
    /// Makes the manager forget that it had given up.
    fn clear_latch(&mut self, deadline: Deadline) -> Result<()>;
    /// Asks for a start and returns without waiting for readiness. Refused while held.
    fn start(&mut self, deadline: Deadline) -> Result<()>;
    /// Asks for an end, waits `grace`, then enforces it; proven gone on return.
    fn stop(&mut self, grace: Duration, deadline: Deadline) -> Result<Stopped>;
    /// Keeps the manager from starting it by itself or for anybody, until [`Manager::release`] or a reboot. Does not
    /// stop what runs. Holding twice is holding once.
    fn hold(&mut self, deadline: Deadline) -> Result<()>;
    /// Takes a hold back; also one of an agent that died. Nothing to release is no error.
    fn release(&mut self, deadline: Deadline) -> Result<()>;
    /// Tells the manager that the service's files changed.
    fn reload(&mut self, deadline: Deadline) -> Result<()>;
}

/// Whether this machine was booted with systemd.
#[must_use]
pub fn systemd_running() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// The name of process 1 (`systemd`, `init`, `tini`, ...).
#[must_use]
pub fn pid1_name() -> String {
    crate::files::read_bounded(Path::new("/proc/1/comm"), 64)
        .map(|name| String::from_utf8_lossy(&name).trim().to_string())
        .unwrap_or_default()
}
