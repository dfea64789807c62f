//! The contract's limits, whole or divided: one number that shortens the whole ladder alike.
//!
//! A worst case that takes ten minutes is proven once a day; divided by ten it is proven with every change, by the same
//! code. Divided are the limits of what koboshi and its layers do: the climb and its reserve, what each layer's work and
//! start get, the looks after failed work, the waits between climbs, between kills and between tries of a message. Not
//! divided is what belongs to others or is a way of measuring: OpenClaw's ration of starts, the judge's confirmation and
//! how long its word is fresh, counts of attempts.
//!
//! A climb's limits are written with its first record, so a journal folds alike whatever the configuration says later.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The most by which limits are divided: below a twentieth, spawning a process takes longer than the work may.
pub const MOST_DIVISOR: u32 = 20;

/// By what every limit of the ladder is divided. The whole ones by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Limits {
    divisor: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { divisor: 1 }
    }
}

impl Limits {
    /// Limits divided by `divisor`; `None` when that is none of 1 to [`MOST_DIVISOR`].
    #[must_use]
    pub fn divided(divisor: u32) -> Option<Limits> {
        let limits = Limits { divisor };
        limits.sound().then_some(limits)
    }

    /// By what they are divided.
    #[must_use]
    pub fn divisor(self) -> u32 {
        self.divisor
    }

    /// Whether they are the contract's.
    #[must_use]
    #[allow(clippy::trivially_copy_pass_by_ref)] // As serde asks it.
    pub fn whole(&self) -> bool {
        self.divisor == 1
    }

    /// Whether a record may carry them.
    pub(crate) fn sound(self) -> bool {
        (1..=MOST_DIVISOR).contains(&self.divisor)
    }

    /// What one of the contract's limits comes to.
    #[must_use]
    pub fn of(self, whole_ms: u64) -> u64 {
        whole_ms / u64::from(self.divisor.max(1))
    }

    /// The same for a duration.
    #[must_use]
    pub fn span(self, whole: Duration) -> Duration {
        whole / self.divisor.max(1)
    }
}
