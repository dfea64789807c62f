//! Whether a gateway went on serving while its files were repaired under it: asked of the gateway, not of the agent.

use engine::Moment;
use host::clock::{self, Deadline};
use host::process::ProcessId;
use node::probe::{Health, Heard};
use node::{Node, Want};
use std::time::Duration;

/// Between two beats.
const EVERY_MS: u64 = 200;
/// One beat.
const BEAT_LIMIT: Duration = Duration::from_secs(8);

/// A gateway's pulse from one moment on.
#[derive(Debug)]
pub struct Pulse {
    process: Option<ProcessId>,
    next: Moment,
    heard: Option<Heard>,
    /// Since when it has been missed.
    missed: Option<Moment>,
    down_ms: u64,
}

impl Pulse {
    /// Begins with the process that serves now.
    pub fn new(process: Option<ProcessId>) -> Pulse {
        Pulse { process, next: clock::now(), heard: None, missed: None, down_ms: 0 }
    }

    /// Feels it, when it is time.
    pub fn feel(&mut self, node: &Node) {
        let now = clock::now();
        if now.ms < self.next.ms {
            return;
        }
        let want = Want { heard: self.heard.take(), ..Want::default() };
        let look = node::look(node, &want, Deadline::after(BEAT_LIMIT));
        self.heard.clone_from(&look.heard);
        let beats = look.health == Health::Live && look.process.map(|p| p.id) == self.process;
        self.count(look.at, beats);
        self.next = clock::now().plus_ms(EVERY_MS);
    }

    fn count(&mut self, at: Moment, beats: bool) {
        match (beats, self.missed) {
            (false, None) => self.missed = Some(at),
            (true, Some(since)) => {
                self.down_ms = self.down_ms.saturating_add(at.since_ms(since).unwrap_or(0));
                self.missed = None;
            }
            (true, None) | (false, Some(_)) => {}
        }
    }

    /// For how long it was missed up to this moment, in milliseconds. Another process than the first is no pulse, however
    /// well it serves.
    pub fn down_ms(&self, now: Moment) -> u64 {
        let missing_ms = self.missed.and_then(|since| now.since_ms(since)).unwrap_or(0);
        self.down_ms.saturating_add(missing_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missed_is_counted_to_its_end_or_to_now() {
        let at = |ms| Moment { boot: 1, ms };
        let mut pulse = Pulse::new(None);
        pulse.count(at(1_000), true);
        assert_eq!(pulse.down_ms(at(1_500)), 0);
        for (ms, beats) in [(2_000, false), (2_500, false), (3_200, true), (3_400, true), (4_000, false)] {
            pulse.count(at(ms), beats);
        }
        assert_eq!(pulse.down_ms(at(4_000)), 1_200);
        assert_eq!(pulse.down_ms(at(4_300)), 1_500);
    }
}
