//! While an emergency holds: whether what the layers failed for has come back.
//!
//! A layer that failed is not tried again on the same inputs before a full climb, which may be an hour away. A registry,
//! a disk or a peer that did not answer and now does is other inputs, and new evidence: the next climb comes at once.
//! What was silent is written down, because the agent that hears it speak again may be another one.

use super::{Agent, runner::Running};
use crate::sources::{PEERS, REGISTRY, STORE};
use crate::step::{Answer, Work};
use engine::{Layer, Moment};
use host::clock::{self, Deadline};
use host::{Error, Kind, Result, files};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::Duration;

/// Between two rounds of asking. Each costs a process and a request.
const EVERY_MS: u64 = 60_000;
/// However limits are divided.
const EVERY_LEAST_MS: u64 = 5_000;
/// One round.
const LIMIT: Duration = Duration::from_secs(20);
const LEAST: Duration = Duration::from_secs(8);

/// A few names.
const KNOWN_LIMIT_BYTES: u64 = 64 << 10;

/// Asking the sources.
#[derive(Debug, Default)]
pub(super) struct Sources {
    running: Option<Running>,
    at: Option<Moment>,
    known: Known,
}

/// What is known of them in one incident.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    incident: u64,
    silent: Vec<String>,
    /// How often each of them came back.
    registry: u32,
    store: u32,
    peers: u32,
}

impl Known {
    /// What an agent before this one knew of this incident; what cannot be read is not known.
    fn load(file: &Path, incident: u64) -> Known {
        let kept = files::read_bounded(file, KNOWN_LIMIT_BYTES).ok();
        kept.and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .filter(|known: &Known| known.incident == incident)
            .unwrap_or(Known { incident, ..Known::default() })
    }

    fn save(&self, file: &Path) -> Result<()> {
        let text = serde_json::to_vec(self)
            .map_err(|e| Error::new(Kind::System, "keep which sources are silent", e))?;
        files::write_for_now(file, &text, 0o600)
    }

    /// Takes a round's answer; returns the names of those that were silent before and are not now.
    fn heard(&mut self, answered: &[String], silent: Vec<String>) -> Vec<String> {
        let back: Vec<String> = self.silent.iter().filter(|name| answered.contains(name)).cloned().collect();
        for name in &back {
            let count = match name.as_str() {
                REGISTRY => &mut self.registry,
                STORE => &mut self.store,
                PEERS => &mut self.peers,
                _ => continue,
            };
            *count = count.saturating_add(1);
        }
        self.silent = silent;
        back
    }
}

impl Sources {
    /// What makes a layer's inputs others than those on which it failed.
    pub(super) fn back_for(&self, layer: Layer) -> u32 {
        match layer {
            Layer::Restore => self.known.store,
            Layer::SystemInstall | Layer::UserInstall => self.known.registry,
            Layer::PeerCopy => self.known.peers,
            Layer::InPlace | Layer::Restart | Layer::Emergency => 0,
        }
    }

    /// The same for all of them.
    pub(super) fn back(&self) -> [u32; 3] {
        [self.known.registry, self.known.store, self.known.peers]
    }

    pub(super) fn due(&self) -> Option<Moment> {
        self.running.as_ref().map(|running| running.deadline.moment()).or(self.at)
    }
}

impl Agent {
    /// What is known of the open incident's sources, also by an agent before this one.
    pub(super) fn recall_sources(&mut self) {
        let Some(incident) = self.book.state().incident.as_ref().map(|i| i.id) else { return };
        if self.sources.known.incident != incident {
            self.sources.known = Known::load(&self.places.sources(), incident);
        }
    }

    /// Asks while an emergency holds; takes the answer whenever it comes.
    pub(super) fn tend_sources(&mut self) {
        let now = clock::now();
        if self.book.state().incident.is_none() {
            // The step of a round that is under way ends with its container.
            if let Some(mut running) = std::mem::take(&mut self.sources).running {
                let _ = running.kill();
            }
            return;
        }
        self.recall_sources();
        if let Some(running) = &mut self.sources.running
            && (running.step.look().is_some() || running.deadline.passed())
            && let Some(mut running) = self.sources.running.take()
        {
            let _ = running.kill();
            if let Some(Answer::Done(report)) = running.answer() {
                if !report.undone.is_empty() && report.undone != self.sources.known.silent {
                    self.say(&format!("these do not answer: {}", report.undone.join(", ")));
                }
                let before = self.sources.known.clone();
                let back = self.sources.known.heard(&report.done, report.undone);
                if self.sources.known != before
                    && let Err(e) = self.sources.known.save(&self.places.sources())
                {
                    self.say(&e.to_string());
                }
                for name in back {
                    self.say(&format!(
                        "the {name} did not answer, and now it does: the next climb tries it anew"
                    ));
                }
            }
        }
        if !self.book.state().in_emergency() || self.hands_off().is_some() {
            self.sources.at = None;
            return;
        }
        let every_ms = self.config.ladder.limits().of(EVERY_MS).max(EVERY_LEAST_MS);
        let due = self.sources.at.is_none_or(|at| at.boot != now.boot || now.ms >= at.ms);
        if due && self.sources.running.is_none() {
            self.sources.at = Some(now.plus_ms(every_ms));
            let deadline = Deadline::after(self.config.ladder.limits().span(LIMIT).max(LEAST));
            match self.runner.spawn("job-sources", Work::Sources, &self.node, None, true, deadline) {
                Ok(running) => self.sources.running = Some(running),
                Err(e) => self.say(&e.to_string()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_silent_can_come_back() {
        let names = |all: &[&str]| all.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("sources");
        let mut known = Known::load(&file, 7);
        assert!(known.heard(&names(&[REGISTRY]), names(&[STORE])).is_empty(), "it was never missed");
        known.save(&file).unwrap();
        assert_eq!(Known::load(&file, 8), Known { incident: 8, ..Known::default() }, "another incident's");
        let mut sources = Sources { known: Known::load(&file, 7), ..Sources::default() };
        assert_eq!(sources.back(), [0, 0, 0]);
        let mut heard =
            |answered: &[&str], silent: &[&str]| sources.known.heard(&names(answered), names(silent));
        assert_eq!(heard(&[REGISTRY, STORE], &[]), [STORE], "silent for another agent, back for this one");
        assert!(heard(&[REGISTRY, STORE], &[]).is_empty(), "it is back once");
        heard(&[STORE], &[REGISTRY]);
        heard(&[STORE, REGISTRY], &[]);
        assert_eq!(sources.back(), [1, 1, 0]);
        assert_eq!((sources.back_for(Layer::Restore), sources.back_for(Layer::PeerCopy)), (1, 0));
    }
}
