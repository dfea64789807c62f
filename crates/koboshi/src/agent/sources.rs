//! While an emergency holds: whether what the layers failed for has come back.
//!
//! A layer that failed is not tried again on the same inputs before a full climb, which may be an hour away. A registry,
//! a disk or a peer that did not answer and now does is other inputs, and new evidence: the next climb comes at once.

use super::{Agent, runner::Running};
use crate::sources::{PEERS, REGISTRY, STORE};
use crate::step::{Answer, Work};
use engine::{Layer, Moment};
use host::clock::{self, Deadline};
use std::time::Duration;

/// Between two rounds of asking. Each costs a process and a request.
const EVERY_MS: u64 = 60_000;
/// However limits are divided.
const EVERY_LEAST_MS: u64 = 5_000;
/// One round.
const LIMIT: Duration = Duration::from_secs(20);
const LEAST: Duration = Duration::from_secs(8);

/// What is known of the sources.
#[derive(Debug, Default)]
pub(super) struct Sources {
    running: Option<Running>,
    at: Option<Moment>,
    silent: Vec<String>,
    /// How often each of them came back in this incident.
    registry: u32,
    store: u32,
    peers: u32,
}

impl Sources {
    /// What makes a layer's inputs others than those on which it failed.
    pub(super) fn back_for(&self, layer: Layer) -> u32 {
        match layer {
            Layer::Restore => self.store,
            Layer::SystemInstall | Layer::UserInstall => self.registry,
            Layer::PeerCopy => self.peers,
            Layer::InPlace | Layer::Restart | Layer::Emergency => 0,
        }
    }

    /// The same for all of them.
    pub(super) fn back(&self) -> [u32; 3] {
        [self.registry, self.store, self.peers]
    }

    pub(super) fn due(&self) -> Option<Moment> {
        self.running.as_ref().map(|running| running.deadline.moment()).or(self.at)
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

impl Agent {
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
        if let Some(running) = &mut self.sources.running
            && (running.step.look().is_some() || running.deadline.passed())
            && let Some(mut running) = self.sources.running.take()
        {
            let _ = running.kill();
            if let Some(Answer::Done(report)) = running.answer() {
                if !report.undone.is_empty() && report.undone != self.sources.silent {
                    self.say(&format!("these do not answer: {}", report.undone.join(", ")));
                }
                for name in self.sources.heard(&report.done, report.undone) {
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
        let mut sources = Sources::default();
        assert!(sources.heard(&names(&[REGISTRY]), names(&[STORE])).is_empty(), "it was never missed");
        assert_eq!(sources.back(), [0, 0, 0]);
        assert_eq!(sources.heard(&names(&[REGISTRY, STORE]), Vec::new()), [STORE]);
        assert_eq!(sources.back_for(Layer::Restore), 1);
        assert_eq!(sources.back_for(Layer::UserInstall), 0);
        assert!(sources.heard(&names(&[REGISTRY, STORE]), Vec::new()).is_empty(), "it is back once");
        sources.heard(&names(&[STORE]), names(&[REGISTRY]));
        sources.heard(&names(&[STORE, REGISTRY]), Vec::new());
        assert_eq!(sources.back(), [1, 1, 0]);
    }
}
