//! Knows OpenClaw: where its pieces lie, how its gateway is probed and judged, what of it may be rolled back.
//!
//! The only room (with `layers` and `drill`) that may name an OpenClaw file. Nothing here runs the `openclaw`
//! command, and nothing knows a process by its name: a gateway is the process of the lock file (pid and start
//! time), confirmed by the lock's owner and by one of listener, control group or executable. Where the lock is gone it
//! is the listener that holds the node's databases open.

pub mod config;
pub mod copies;
pub mod find;
pub mod gates;
pub mod http;
pub mod identity;
pub mod judge;
pub mod lock;
pub mod probe;
pub mod range;
pub mod refusal;
pub mod roots;
pub mod salvage;
pub mod service;
pub mod signs;
mod tls;
pub mod triage;
pub mod units;
pub mod update;
pub mod users;
pub mod ws;

pub use find::{Found, Hint, find};
pub use identity::{Baseline, Counts, Identity, read_identity};
pub use judge::{Confidence, Judge, Judgement, Limits};
pub use lock::GatewayLock;
pub use probe::{Look, Want, look};

use host::process::ProcessId;
use host::run::Ids;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The OpenClaw release that the facts in this room were measured on.
pub const TESTED_OPENCLAW: &str = "2026.9.6";
/// The port of a gateway whose config names none and that has no profile.
pub const DEFAULT_PORT: u16 = 18_789;
/// The largest `package.json` that is read; the real one has 76 KB.
const PACKAGE_JSON_LIMIT_BYTES: u64 = 4 << 20;

/// Whose service manager holds a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// `systemctl --user` of the node's user.
    User,
    /// The system manager.
    System,
}

/// The systemd unit that runs a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unit {
    /// With its suffix: `openclaw-gateway.service`.
    pub name: String,
    /// Whose manager holds it.
    pub scope: Scope,
    /// The unit file first, then its drop-ins in the order in which systemd reads them, then environment files.
    pub files: Vec<PathBuf>,
}

/// One OpenClaw gateway installation: everything that koboshi must know to probe, start and repair it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// How koboshi calls it: the profile, or `main`.
    pub name: String,
    /// The npm prefix: `<prefix>/lib/node_modules/openclaw` is the package.
    pub prefix: PathBuf,
    /// The package directory itself.
    pub package_dir: PathBuf,
    /// What Node runs: `dist/index.js` of the package.
    pub entry: PathBuf,
    /// The Node binary.
    pub node_bin: PathBuf,
    /// The runtime's directory, only where koboshi made it: nobody else's runtime is exchanged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_dir: Option<PathBuf>,
    /// The home directory the gateway is started with.
    pub home: PathBuf,
    /// State: `~/.openclaw` unless told otherwise.
    pub state_dir: PathBuf,
    /// `openclaw.json`.
    pub config_path: PathBuf,
    /// The gateway's TCP port.
    pub port: u16,
    /// The profile, where there is a named one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
    /// Whom the gateway runs as.
    pub ids: Ids,
    /// The same as a name.
    pub user: String,
    /// The unit that starts it, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<Unit>,
    /// Environment the gateway needs beyond HOME and PATH. Never secrets: those stay in the node's own files.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// The version at the time it was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

/// How to start a gateway without a service manager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayCommand {
    /// The Node binary.
    pub program: PathBuf,
    /// `<package>/dist/index.js gateway --port N`.
    pub args: Vec<String>,
    /// The whole environment: start with an empty one and set these.
    pub env: Vec<(String, String)>,
    /// Where it runs: the home directory, or `/` when that is gone.
    pub cwd: PathBuf,
}

impl Node {
    /// How to start this gateway.
    #[must_use]
    pub fn command(&self) -> GatewayCommand {
        let bin = self.node_bin.parent().unwrap_or(Path::new("/usr/bin"));
        let path = format!(
            "{}:{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            bin.display(),
            self.prefix.join("bin").display()
        );
        let mut env: Vec<(String, String)> = vec![
            ("HOME".into(), self.home.display().to_string()),
            ("PATH".into(), path),
            ("USER".into(), self.user.clone()),
            ("LOGNAME".into(), self.user.clone()),
        ];
        if let Some(profile) = &self.profile {
            env.push(("OPENCLAW_PROFILE".into(), profile.clone()));
        }
        if self.state_dir != self.default_state_dir() {
            env.push(("OPENCLAW_STATE_DIR".into(), self.state_dir.display().to_string()));
        }
        if self.config_path != self.state_dir.join("openclaw.json") {
            env.push(("OPENCLAW_CONFIG_PATH".into(), self.config_path.display().to_string()));
        }
        for (key, value) in &self.env {
            env.retain(|(k, _)| k != key);
            env.push((key.clone(), value.clone()));
        }
        GatewayCommand {
            program: self.node_bin.clone(),
            args: vec![
                self.entry.display().to_string(),
                "gateway".into(),
                "--port".into(),
                self.port.to_string(),
            ],
            env,
            cwd: if self.home.is_dir() { self.home.clone() } else { PathBuf::from("/") },
        }
    }

    /// Where the state would lie if nothing but the profile said so.
    #[must_use]
    pub fn default_state_dir(&self) -> PathBuf {
        match &self.profile {
            Some(p) => self.home.join(format!(".openclaw-{p}")),
            None => self.home.join(".openclaw"),
        }
    }

    /// The version that the package on disk says it is. `None` when there is no readable package.
    #[must_use]
    pub fn package_version(&self) -> Option<String> {
        package_json(&self.package_dir)?.get("version")?.as_str().map(str::to_owned)
    }

    /// The range of Node versions that the package on disk asks for.
    #[must_use]
    pub fn engines(&self) -> Option<String> {
        package_json(&self.package_dir)?.get("engines")?.get("node")?.as_str().map(str::to_owned)
    }

    /// The database schemas that the package on disk can work with: `(state, agent)`.
    #[must_use]
    pub fn schema_versions(&self) -> Option<(u32, u32)> {
        let json = package_json(&self.package_dir)?;
        let of = |name: &str| {
            json.get("openclaw")?
                .get("schemaVersions")?
                .get(name)?
                .as_u64()
                .and_then(|v| u32::try_from(v).ok())
        };
        Some((of("state")?, of("agent")?))
    }

    /// The shared state database.
    #[must_use]
    pub fn state_db(&self) -> PathBuf {
        self.state_dir.join("state").join("openclaw.sqlite")
    }

    /// The databases of the agents that exist on disk, by agent id.
    #[must_use]
    pub fn agent_dbs(&self) -> Vec<(String, PathBuf)> {
        /// More agents than this on one node are not looked at one by one.
        const AGENTS_LIMIT: usize = 256;
        let mut found = Vec::new();
        for entry in std::fs::read_dir(self.state_dir.join("agents"))
            .into_iter()
            .flatten()
            .flatten()
            .take(AGENTS_LIMIT)
        {
            let db = entry.path().join("agent").join("openclaw-agent.sqlite");
            if db.is_file() {
                found.push((entry.file_name().to_string_lossy().into_owned(), db));
            }
        }
        found.sort();
        found
    }

    /// When an agent last wrote of what it does: its database, or a transcript. A turn at work writes. `None` when nothing
    /// of it can be seen.
    #[must_use]
    pub fn last_turn(&self) -> Option<SystemTime> {
        /// Transcripts of one agent that are looked at.
        const TRANSCRIPTS_LIMIT: usize = 4_096;
        let mut newest: Option<SystemTime> = None;
        let mut see = |path: &Path| {
            newest = newest.max(path.metadata().and_then(|m| m.modified()).ok());
        };
        for (agent, db) in self.agent_dbs() {
            see(&db);
            see(&db.with_extension("sqlite-wal"));
            let sessions = self.state_dir.join("agents").join(agent).join("sessions");
            for entry in std::fs::read_dir(sessions).into_iter().flatten().flatten().take(TRANSCRIPTS_LIMIT) {
                see(&entry.path());
            }
        }
        newest
    }

    /// The gateway's own log of today (or the newest there is), in the places where it may write it.
    #[must_use]
    pub fn log_path(&self) -> Option<PathBuf> {
        probe::newest_log(self)
    }

    /// The lock of the running gateway, if there is a lock file whose process lives with the same start time.
    #[must_use]
    pub fn lock(&self) -> Option<GatewayLock> {
        lock::read(self).filter(|l| l.id.alive())
    }

    /// The running gateway by its lock, if its uid is the node's and something besides the lock says that it is ours: a
    /// lock is a file of the node's user, and its word alone must never get somebody's process killed. The lock lies in the
    /// state directory and goes with it; then it is the process that listens on the node's port and holds databases of
    /// that directory open.
    #[must_use]
    pub fn gateway(&self) -> Option<ProcessId> {
        let locked = self.lock().filter(|l| l.trusted_by(self)).map(|l| l.id);
        locked.filter(|id| self.owns(*id)).or_else(|| self.holder())
    }

    /// A process of the node's user that listens on the node's port and holds a database of the node's open, be it a
    /// deleted one.
    fn holder(&self) -> Option<ProcessId> {
        let listeners = host::process::listeners(self.port);
        let of_user = listeners.iter().filter(|l| l.uid == self.ids.uid);
        of_user
            .filter_map(|listener| host::process::owner_of(listener, &[]))
            .find(|id| id.uid() == Some(self.ids.uid) && salvage::holds_databases(self, *id))
    }

    /// Whether a process is this node's gateway by what it runs, by the unit it lives in or by the port it holds.
    #[must_use]
    pub fn owns(&self, process: ProcessId) -> bool {
        let runs_our_node = match (process.exe(), self.node_bin.canonicalize()) {
            (Some(exe), Ok(ours)) => exe == ours,
            // The binary was replaced or taken away under the running process.
            (Some(exe), Err(_)) => {
                exe.to_string_lossy().strip_suffix(" (deleted)").map(Path::new) == Some(&self.node_bin)
            }
            (None, _) => false,
        };
        let in_our_unit = || {
            let unit = self.unit.as_ref().map(|u| u.name.as_str());
            process.cgroup().is_some_and(|c| c.split('/').any(|part| Some(part) == unit))
        };
        runs_our_node
            || in_our_unit()
            || host::process::listeners(self.port)
                .iter()
                .any(|l| host::process::owner_of(l, &[process.pid]).is_some_and(|owner| owner == process))
    }
}

/// The package's `package.json`, bounded; `None` when it is missing or not JSON.
pub(crate) fn package_json(package_dir: &Path) -> Option<Value> {
    let bytes =
        host::files::read_bounded(&package_dir.join("package.json"), PACKAGE_JSON_LIMIT_BYTES).ok()?;
    serde_json::from_slice(&bytes).ok()
}
