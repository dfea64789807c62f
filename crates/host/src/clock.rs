//! The one clock that decisions may use: CLOCK_BOOTTIME, together with the boot it counts from.
//!
//! It counts suspended time and never jumps, so a deadline means the same to every process of this boot and can be
//! handed to children as text. A deadline of another boot has passed: whatever it bounded died with that boot.

use engine::Moment;
use rustix::time::{ClockId, clock_gettime};
use std::sync::OnceLock;
use std::time::Duration;

/// The environment variable by which a child learns its parent's deadline.
pub const DEADLINE_ENV: &str = "KOBOSHI_DEADLINE";

/// The present moment.
#[must_use]
pub fn now() -> Moment {
    Moment { boot: boot_id(), ms: boot_ms() }
}

/// The first 64 bits of the kernel's boot id, read once. 0 where the kernel does not tell.
#[must_use]
pub fn boot_id() -> u64 {
    static BOOT: OnceLock<u64> = OnceLock::new();
    *BOOT.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let hex: String = text.chars().filter(char::is_ascii_hexdigit).take(16).collect();
        u64::from_str_radix(&hex, 16).unwrap_or(0)
    })
}

/// The wall clock: only for names and messages, never for decisions.
#[must_use]
pub fn wall() -> jiff::Timestamp {
    jiff::Timestamp::now()
}

fn boot_ms() -> u64 {
    let t = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(t.tv_sec).unwrap_or(0);
    let millis = u64::try_from(t.tv_nsec).unwrap_or(0) / 1_000_000;
    seconds.saturating_mul(1_000).saturating_add(millis)
}

/// An absolute point in time at which something must have ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline(Moment);

impl Deadline {
    /// This long from now.
    #[must_use]
    pub fn after(d: Duration) -> Deadline {
        Deadline(now().plus_ms(u64::try_from(d.as_millis()).unwrap_or(u64::MAX)))
    }

    /// At this moment.
    #[must_use]
    pub fn at(m: Moment) -> Deadline {
        Deadline(m)
    }

    /// The moment it falls on.
    #[must_use]
    pub fn moment(self) -> Moment {
        self.0
    }

    /// The earlier of the two. One of another boot has passed, so it is the earlier.
    #[must_use]
    pub fn min(self, other: Deadline) -> Deadline {
        let here = boot_id();
        match (self.0.boot == here, other.0.boot == here) {
            (false, _) => self,
            (true, false) => other,
            (true, true) if self.0.ms <= other.0.ms => self,
            (true, true) => other,
        }
    }

    /// What is left of it; zero when it has passed.
    #[must_use]
    pub fn left(self) -> Duration {
        let now = now();
        if now.boot == self.0.boot {
            Duration::from_millis(self.0.ms.saturating_sub(now.ms))
        } else {
            Duration::ZERO
        }
    }

    /// Whether it has passed.
    #[must_use]
    pub fn passed(self) -> bool {
        self.left().is_zero()
    }

    /// The value for [`DEADLINE_ENV`].
    #[must_use]
    pub fn to_env(self) -> String {
        format!("{:016x}:{}", self.0.boot, self.0.ms)
    }

    /// The deadline that our parent gave us, if any. One that cannot be read counts as passed: whoever set the
    /// variable meant to bound us.
    #[must_use]
    pub fn from_env() -> Option<Deadline> {
        std::env::var_os(DEADLINE_ENV).map(|v| Deadline::parse(&v.to_string_lossy()))
    }

    fn parse(text: &str) -> Deadline {
        let parsed = text.split_once(':').and_then(|(boot, ms)| {
            Some(Moment { boot: u64::from_str_radix(boot, 16).ok()?, ms: ms.parse().ok()? })
        });
        Deadline(parsed.unwrap_or(Moment { boot: boot_id(), ms: 0 }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_survives_its_text_form() {
        let d = Deadline::after(Duration::from_secs(5));
        assert_eq!(Deadline::parse(&d.to_env()), d);
        assert!(!d.passed());
        assert!(d.left() <= Duration::from_secs(5) && d.left() > Duration::from_secs(4));
    }

    #[test]
    fn another_boots_deadline_has_passed_and_is_the_earlier() {
        let other = Deadline::at(Moment { boot: boot_id() ^ 1, ms: u64::MAX });
        let ours = Deadline::after(Duration::from_secs(5));
        assert!(other.passed());
        assert_eq!(ours.min(other), other);
        assert_eq!(other.min(ours), other);
    }

    #[test]
    fn an_unreadable_deadline_has_passed() {
        for text in ["", ":", "12", "zz:1", "1:x", "1:99999999999999999999999"] {
            assert!(Deadline::parse(text).passed(), "{text:?}");
        }
    }

    #[test]
    fn the_earlier_of_two_wins() {
        let a = Deadline::after(Duration::from_secs(1));
        let b = Deadline::after(Duration::from_secs(9));
        assert_eq!(a.min(b), a);
        assert_eq!(b.min(a), a);
    }

    #[test]
    fn a_huge_duration_does_not_overflow() {
        assert!(!Deadline::after(Duration::MAX).passed());
    }

    #[test]
    fn the_boot_is_known_and_time_moves() {
        assert_ne!(boot_id(), 0);
        let a = now();
        assert!(now().since_ms(a).is_some());
    }
}
