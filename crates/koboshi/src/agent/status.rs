//! What the agent publishes for `koboshi status` and whoever else may read.

use crate::places::Places;
use engine::{Class, Finding, Layer, Moment, Verdict};
use host::process::ProcessId;
use host::{Error, Kind, Result, files};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A status is a few kilobytes.
const MAX_BYTES: u64 = 4 << 20;

/// The agent's view, at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The agent that wrote this.
    pub agent: ProcessId,
    /// Its version.
    pub agent_version: String,
    /// When it was written.
    pub at: Moment,
    /// `guard` or `watch`.
    pub mode: String,
    /// The service manager.
    pub manager: String,
    /// How strong the containers are.
    pub containers: String,
    /// The judge's last word.
    pub verdict: Verdict,
    /// Whether it is confirmed.
    pub confirmed: bool,
    /// The gateway's process.
    pub gateway: Option<ProcessId>,
    /// Since when it has served without a break.
    pub serving_since: Option<Moment>,
    /// Why nothing is touched now, where that is so.
    pub hands_off: Option<String>,
    /// The open incident.
    pub incident: Option<Open>,
    /// What was found on disk last time.
    pub findings: Vec<Finding>,
    /// The newest good snapshot.
    pub snapshot: Option<String>,
    /// The age of the newest good copy of each class when it was last looked at, in seconds.
    pub ages_s: BTreeMap<Class, u64>,
    /// When a start is free within the ration: 3 in 300 s.
    pub start_free_at: Moment,
    /// Whether every job of daily operation (first snapshot, settling) is done.
    pub settled: bool,
    /// The last problem with backups or the store, in one line.
    pub trouble: Option<String>,
    /// How far a node that was displaced is on its way home, or what keeps it away.
    #[serde(default)]
    pub home: Option<String>,
}

/// The open incident.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// Its number.
    pub id: u64,
    /// One line.
    pub cause: String,
    /// What is being done.
    pub doing: String,
    /// The layer at work.
    pub layer: Option<Layer>,
    /// Whether it is in emergency.
    pub emergency: bool,
}

impl Status {
    /// What the agent published last.
    pub fn load(places: &Places) -> Result<Status> {
        let bytes = files::read_bounded(&places.status(), MAX_BYTES)?;
        serde_json::from_slice(&bytes)
            .map_err(|e| Error::new(Kind::Corrupt, format!("read {}", places.status().display()), e))
    }

    /// Publishes it: renamed into place, not synced, because it says nothing that must survive a power cut.
    pub fn publish(&self, places: &Places) -> Result<()> {
        let text = serde_json::to_vec(self).map_err(|e| Error::new(Kind::System, "publish the status", e))?;
        let beside = places.status().with_extension("new");
        let fail = |e: std::io::Error| Error::io(format!("publish {}", places.status().display()), &e);
        std::fs::write(&beside, text).map_err(fail)?;
        std::fs::rename(&beside, places.status()).map_err(fail)
    }

    /// Whether its writer still runs.
    pub fn alive(&self) -> bool {
        self.agent.alive()
    }
}
