//! How long the loop sleeps: a pure function of what is due.
//!
//! Everything that could be done was begun right before the loop sleeps. So what is due *now* is something that cannot
//! be done now (a climb is on, the node does not serve, the machine is pressed, the journal is full): it is looked at
//! again in a second. No combination of what is due makes the loop turn without a pause.

use engine::Moment;

/// Something that is due and cannot be done now is tried again after this.
const NOT_NOW_MS: u64 = 1_000;
/// A unit on its way down is looked at again after this.
const UNIT_AGAIN_MS: u64 = 500;
/// The loop wakes at least this often, whatever happens.
const WAKE_AT_LEAST_MS: u64 = 30_000;

/// What the loop waits for besides its descriptors.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Due {
    /// The next look at the node; `None` while one is under way.
    pub look: Option<Moment>,
    /// What the engine waits for.
    pub engine: Option<Moment>,
    /// The engine has more to say than one turn of the loop does.
    pub undecided: bool,
    /// A look at the disk because a watched file changed.
    pub exam: Option<Moment>,
    /// The next job of daily operation, or the end of one under way.
    pub daily: Option<Moment>,
    /// When the responder is thought of again.
    pub responder: Option<Moment>,
    /// A unit is on its way down.
    pub unit: bool,
    /// The manager that runs this agent wants a sign of life this often, in milliseconds.
    pub watchdog_ms: Option<u64>,
}

impl Due {
    /// When the loop wakes: never now, never later than it must.
    pub(super) fn wake(&self, now: Moment) -> Moment {
        let most_ms = self.watchdog_ms.map_or(WAKE_AT_LEAST_MS, |ms| ms.clamp(1, WAKE_AT_LEAST_MS));
        let moments = [self.look, self.engine, self.exam, self.daily, self.responder];
        let due = moments.into_iter().flatten().map(|at| match at.since_ms(now) {
            // Due, or of another boot.
            None | Some(0) => NOT_NOW_MS,
            Some(ms) => ms,
        });
        let again = [self.unit.then_some(UNIT_AGAIN_MS), self.undecided.then_some(NOT_NOW_MS)];
        let wait_ms = due.chain(again.into_iter().flatten()).min().unwrap_or(most_ms).min(most_ms);
        now.plus_ms(wait_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: Moment = Moment { boot: 1, ms: 100_000 };

    fn at(ms: u64) -> Option<Moment> {
        Some(Moment { boot: 1, ms })
    }

    #[test]
    fn it_wakes_for_the_first_thing_that_is_due() {
        assert_eq!(Due::default().wake(NOW).ms, 130_000);
        let due = Due { look: at(102_000), daily: at(101_500), ..Due::default() };
        assert_eq!(due.wake(NOW).ms, 101_500);
        assert_eq!(Due { watchdog_ms: Some(500), ..due }.wake(NOW).ms, 100_500);
        assert_eq!(Due { unit: true, ..due }.wake(NOW).ms, 100_500);
    }

    #[test]
    fn what_is_due_and_impossible_never_makes_it_spin() {
        let dues: [fn(Option<Moment>) -> Due; 5] = [
            |at| Due { responder: at, ..Due::default() },
            |at| Due { look: at, ..Due::default() },
            |at| Due { engine: at, ..Due::default() },
            |at| Due { exam: at, ..Due::default() },
            |at| Due { daily: at, ..Due::default() },
        ];
        for due in dues {
            // It stays due for ten minutes and is never done.
            let (mut now, mut turns) = (NOW, 0);
            while now.ms < NOW.ms + 600_000 {
                now = due(at(50_000)).wake(now);
                turns += 1;
                assert!(turns <= 600, "{turns} turns in less than 600 s");
            }
            assert!(due(Some(Moment { boot: 2, ms: 1 })).wake(NOW).ms > NOW.ms, "of another boot");
        }
    }

    proptest! {
        #[test]
        fn it_always_rests_and_always_wakes(
            moments in prop::array::uniform5(prop::option::of(0_u64..300_000)),
            undecided in any::<bool>(), unit in any::<bool>(), watchdog_ms in prop::option::of(0_u64..600_000),
        ) {
            let [look, engine, exam, daily, responder] = moments.map(|m| m.and_then(at));
            let due = Due { look, engine, undecided, exam, daily, responder, unit, watchdog_ms };
            let wake = due.wake(NOW);
            prop_assert!(wake.ms > NOW.ms && wake.ms <= NOW.ms + WAKE_AT_LEAST_MS);
            for soon in moments.into_iter().flatten().filter(|ms| *ms > NOW.ms) {
                prop_assert!(wake.ms <= soon, "nothing that is to come is slept over");
            }
        }
    }
}
