//! What the engine is told about the world at the moment of deciding. Made anew by the agent for every call.

use crate::limits::Limits;
use crate::record::StepId;
use crate::words::Layer;
use serde::{Deserialize, Serialize};

/// The world as the agent sees it now. Everything [`crate::next`] knows that is not in the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ladder {
    /// One per layer that exists (in-place and the climb's five). A layer without a rung does not apply.
    pub rungs: Vec<Rung>,
    /// The step whose container this very agent process spawned and still holds. A fresh agent holds none:
    /// that is how a vanished step is known.
    pub holding: Option<StepId>,
    /// What a starting gateway is doing.
    pub start: StartLook,
    /// Set while nothing may be touched: paused, watch mode, the owner's will. One line for people.
    pub hands_off: Option<String>,
    /// A person asked for this layer alone: the next climb is restricted to it and begins at once. The caller forgets
    /// the order when that climb has begun, or when the incident is closed.
    pub only: Option<Layer>,
    /// Whether the journal takes records. If not, the fold goes on in memory and only layer 0 is tried.
    pub journal_ok: bool,
    /// Hash of everything outside that could make a failed climb succeed: registry reachable, disk space,
    /// snapshots, peers, files. A change brings the next climb forward.
    pub evidence: u64,
    /// Chance is the caller's: -1000 to 1000, scaled to the 10 % by which retries are spread.
    pub jitter_permille: i32,
    /// By what the limits are divided from the next climb on. The rungs' numbers are the whole ones.
    #[serde(default)]
    pub limits: Limits,
}

/// One layer's numbers, undivided, and whether it applies at this moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rung {
    /// Which.
    pub layer: Layer,
    /// `Err` with the reason when it does not apply (no snapshot, no sudo, gate closed, not built).
    pub applies: Result<(), String>,
    /// Hash of source, version, gates and target: a layer that failed on these is not tried on them again
    /// before the next full climb.
    pub inputs: u64,
    /// The least time its work is worth beginning for.
    pub work_least_ms: u64,
    /// The most its work ever gets.
    pub work_most_ms: u64,
    /// The least a start and its judging get.
    pub start_least_ms: u64,
    /// What earlier layers must leave for it.
    pub least_slice_ms: u64,
}

impl Rung {
    /// A rung with the default numbers of the ladder (docs/ladder.md).
    #[must_use]
    pub fn new(layer: Layer, applies: Result<(), String>, inputs: u64) -> Rung {
        let (work_least_ms, work_most_ms, start_least_ms, least_slice_ms) = match layer {
            Layer::InPlace => (10_000, 60_000, 0, 90_000),
            Layer::Restart => (10_000, 15_000, 60_000, 70_000),
            Layer::Restore => (30_000, 60_000, 60_000, 90_000),
            Layer::SystemInstall | Layer::UserInstall => (90_000, 140_000, 60_000, 150_000),
            Layer::PeerCopy => (50_000, 100_000, 60_000, 110_000),
            Layer::Emergency => (0, 0, 0, 30_000),
        };
        Rung { layer, applies, inputs, work_least_ms, work_most_ms, start_least_ms, least_slice_ms }
    }
}

/// What a gateway start is doing, as the judge sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartLook {
    /// A gateway process that is ours exists.
    pub alive: bool,
    /// It is starting (not yet ready) and moves: CPU or log, within its limit.
    pub progressing: bool,
    /// Program, runtime and service files verify.
    pub intact: bool,
}

impl Ladder {
    /// A ladder on which nothing is held, paused or broken.
    #[must_use]
    pub fn new(rungs: Vec<Rung>) -> Ladder {
        Ladder {
            rungs,
            holding: None,
            start: StartLook::default(),
            hands_off: None,
            only: None,
            journal_ok: true,
            evidence: 0,
            jitter_permille: 0,
            limits: Limits::default(),
        }
    }

    /// The rung of `layer`, if it exists.
    #[must_use]
    pub fn rung(&self, layer: Layer) -> Option<&Rung> {
        self.rungs.iter().find(|rung| rung.layer == layer)
    }

    /// Why `layer` does not apply now; `Ok` when it does. With a journal that cannot be written only layer 0 does.
    ///
    /// # Errors
    /// The reason, to be recorded.
    pub fn applies(&self, layer: Layer) -> Result<&Rung, String> {
        let rung = self.rung(layer).ok_or_else(|| format!("{layer} does not exist here"))?;
        rung.applies.clone()?;
        if !self.journal_ok && layer != Layer::Restart {
            return Err("the journal cannot be written, so only a restart is tried".to_owned());
        }
        Ok(rung)
    }

    /// A start that is under way in a node whose files are whole: it is waited for, not replaced.
    #[must_use]
    pub fn start_holds(&self) -> bool {
        self.start.alive && self.start.progressing && self.start.intact
    }
}
