//! For how long the gateway that serves now has served: what a snapshot is trusted by.
//!
//! Only time between two confirmed good looks at the same process counts. A node that was judged not to serve, or another
//! process, begins anew: what it did before proves nothing about what it is now. An inconclusive look (a probe that
//! failed on our side, a busy gateway that answers late) only stops the clock: it says nothing either way, and a node that
//! is always busy would else never have a good snapshot. Starting and draining are other processes before and after.

use engine::{Moment, Verdict};
use host::process::ProcessId;
use node::Judgement;

/// Looks are seconds apart; a longer gap (a machine that slept, a probe that hung) was seen by nobody.
const GAP_MS: u64 = 30_000;

/// The clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Settling {
    served_ms: u64,
    last: Option<Moment>,
    process: Option<ProcessId>,
}

impl Settling {
    /// Begins anew: from here on something else is to be proven.
    pub(super) fn begin(&mut self) {
        self.served_ms = 0;
    }

    /// What was proven so far, in milliseconds.
    pub(super) fn served_ms(&self) -> u64 {
        self.served_ms
    }

    /// Takes the judge's word into account.
    pub(super) fn heed(&mut self, judgement: &Judgement, now: Moment) {
        if judgement.process.is_some() && judgement.process != self.process {
            *self = Settling { process: judgement.process, ..Settling::default() };
        }
        match &judgement.verdict {
            Verdict::Serving { .. } if judgement.confirmed => {
                let gap_ms = self.last.and_then(|last| now.since_ms(last)).unwrap_or(0);
                self.served_ms += if gap_ms <= GAP_MS { gap_ms } else { 0 };
                self.last = Some(now);
            }
            Verdict::Serving { .. } | Verdict::Inconclusive { .. } => self.last = None,
            Verdict::NotServing { .. } => *self = Settling { process: self.process, ..Settling::default() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use node::Confidence;

    fn word(verdict: Verdict, pid: u32) -> Judgement {
        let confirmed = verdict.is_serving();
        Judgement {
            verdict,
            confirmed,
            first_good: None,
            confidence: Confidence::Full,
            findings: Vec::new(),
            process: Some(ProcessId { pid, start_ticks: 7 }),
        }
    }

    fn good() -> Verdict {
        Verdict::Serving { degraded: Vec::new() }
    }

    /// A look every 2 s, as told by one letter each: s serving, u not confirmed, i inconclusive, n not serving, o serving
    /// as another process, z nobody looks for a minute.
    fn after(looks: &str) -> u64 {
        let (mut settling, mut ms) = (Settling::default(), 0);
        for look in looks.chars() {
            ms += if look == 'z' { 60_000 } else { 2_000 };
            let why = || "it is so".to_owned();
            let judgement = match look {
                's' => word(good(), 1),
                'u' => Judgement { confirmed: false, ..word(good(), 1) },
                'i' => word(Verdict::Inconclusive { why: why() }, 1),
                'n' => word(Verdict::NotServing { why: why() }, 1),
                'o' => word(good(), 2),
                'z' => continue,
                other => panic!("no such look: {other}"),
            };
            settling.heed(&judgement, Moment { boot: 1, ms });
        }
        settling.served_ms()
    }

    #[test]
    fn only_serving_counts_and_a_fall_begins_anew() {
        assert_eq!(after("s"), 0);
        assert_eq!(after("sssss"), 8_000);
        assert_eq!(after("sssiiiiiiiiiis"), 4_000, "what nobody knows does not count");
        assert_eq!(after("sssiiss"), 6_000, "and does not take away");
        assert_eq!(after("ssuuss"), 4_000);
        assert_eq!(after("sssssn"), 0);
        assert_eq!(after("sssssnss"), 2_000);
        assert_eq!(after("sssinniss"), 2_000);
        assert_eq!(after("sssssoo"), 2_000, "another process");
        assert_eq!(after("sszs"), 2_000, "a machine that slept");
    }

    #[test]
    fn a_new_snapshot_begins_anew() {
        let mut settling = Settling::default();
        let look = |settling: &mut Settling, s: u64| {
            settling.heed(&word(good(), 1), Moment { boot: 1, ms: s * 1_000 });
        };
        for s in 0..10 {
            look(&mut settling, s);
        }
        settling.begin();
        assert_eq!(settling.served_ms(), 0);
        look(&mut settling, 10);
        look(&mut settling, 11);
        assert_eq!(settling.served_ms(), 2_000);
    }
}
