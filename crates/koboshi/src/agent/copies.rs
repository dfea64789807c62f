//! How old the newest good copy of each class is, remembered across agents.
//!
//! That there is no fresh backup must be told whatever the reason is. So it is judged by the wall clock from a small file
//! and not from the last look at the disk, which a pressed machine or a broken store may keep from being taken; and where
//! there has never been a good copy, from the moment in which that was first seen, not from the birth of an agent that is
//! started anew every night.

use crate::places::Places;
use engine::Class;
use host::{Error, Kind, Result, files};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A few numbers.
const MAX_BYTES: u64 = 64 << 10;
/// Ages are whole seconds of two clocks: a copy whose moment moved by so little is the same one.
const SAME_S: u64 = 2;

/// What is known of the good copies. All moments are the wall clock's, in seconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Known {
    /// When the newest good copy of each class was taken.
    good: BTreeMap<Class, i64>,
    /// Since when there has been no good copy of anything.
    none_since_s: Option<i64>,
}

impl Known {
    /// What the agents before this one knew; where none did, nothing is known from now on. A file that cannot be read is
    /// written anew: it is a help, and its limit then begins anew too.
    pub(super) fn load(places: &Places, now_s: i64) -> Known {
        let read = files::read_bounded(&places.copies(), MAX_BYTES).ok();
        let known: Option<Known> = read.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let mut known = known.unwrap_or_default();
        if known.good.is_empty() && known.none_since_s.is_none() {
            known.none_since_s = Some(now_s);
        }
        known
    }

    pub(super) fn save(&self, places: &Places) -> Result<()> {
        let text = serde_json::to_vec(self)
            .map_err(|e| Error::new(Kind::System, "remember how old the copies are", e))?;
        files::write_atomic(&places.copies(), &text, 0o600)
    }

    /// Takes in what a look found; `true` when it is news.
    pub(super) fn learn(&mut self, ages_s: &BTreeMap<Class, u64>, now_s: i64) -> bool {
        let before = self.clone();
        let taken = |age: u64| now_s.saturating_sub(i64::try_from(age).unwrap_or(i64::MAX));
        let good: BTreeMap<Class, i64> = ages_s.iter().map(|(class, age)| (*class, taken(*age))).collect();
        let same = good.len() == self.good.len()
            && good.iter().all(|(c, t)| self.good.get(c).is_some_and(|b| b.abs_diff(*t) <= SAME_S));
        if !same {
            self.good = good;
        }
        // A clock that was set back makes no future.
        let since = self.none_since_s.unwrap_or(now_s).min(now_s);
        self.none_since_s = self.good.is_empty().then_some(since);
        *self != before
    }

    /// Why the copies are too old, if they are.
    pub(super) fn stale(&self, limit_s: u64, now_s: i64) -> Option<String> {
        if let Some((class, taken)) = self.good.iter().min_by_key(|(_, taken)| **taken) {
            let age = age_s(*taken, now_s);
            return (age > limit_s)
                .then(|| format!("the newest good copy of the {class} is {} hours old", age / 3600));
        }
        let age = age_s(self.none_since_s?, now_s);
        (age > limit_s).then(|| format!("there has been no good snapshot for {} hours", age / 3600))
    }

    /// Whether another copy of these classes is due before they are too old. What is unchanged costs nothing; waiting for
    /// the limit itself would have an owner told of every day on which nobody wrote anything.
    pub(super) fn wants_another(&self, classes: &[Class], limit_s: u64, now_s: i64) -> bool {
        let due_s = limit_s - limit_s / 4;
        self.good.iter().any(|(class, taken)| classes.contains(class) && age_s(*taken, now_s) > due_s)
    }
}

fn age_s(then_s: i64, now_s: i64) -> u64 {
    u64::try_from(now_s.saturating_sub(then_s)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY_S: u64 = 86_400;

    fn ages(pairs: &[(Class, u64)]) -> BTreeMap<Class, u64> {
        pairs.iter().copied().collect()
    }

    #[test]
    fn nothing_good_is_told_by_when_that_was_first_seen_whoever_saw_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = crate::config::Config::default();
        (config.state_dir, config.run_dir) = (Some(dir.path().join("s")), Some(dir.path().join("r")));
        let places = Places::new(dir.path().join("koboshi.toml"), &config).unwrap();
        places.make().unwrap();
        // An agent is started anew every twelve hours, and none of them lives for a day.
        let mut told = Vec::new();
        for half_days in 0..6 {
            let now_s = 1_000_000 + half_days * 43_200;
            let mut known = Known::load(&places, now_s);
            known.learn(&BTreeMap::new(), now_s);
            known.save(&places).unwrap();
            told.push(known.stale(DAY_S, now_s + 60).is_some());
        }
        assert_eq!(told, [false, false, true, true, true, true]);
        // A good one ends that; its loss begins it anew.
        let mut known = Known::load(&places, 2_000_000);
        assert!(known.learn(&ages(&[(Class::State, 10)]), 2_000_000));
        assert_eq!(known.stale(DAY_S, 2_000_000), None);
        assert!(known.learn(&BTreeMap::new(), 2_000_100));
        assert_eq!(known.stale(DAY_S, 2_050_000), None);
        assert!(known.stale(DAY_S, 2_000_101 + 86_400).is_some());
    }

    #[test]
    fn age_goes_on_without_a_look_and_the_next_copy_comes_before_the_word() {
        let mut known = Known::default();
        known.learn(&ages(&[(Class::State, 0), (Class::Program, 100)]), 10_000);
        assert!(!known.learn(&ages(&[(Class::State, 61), (Class::Program, 160)]), 10_060), "the same copies");
        assert!(known.stale(1_000, 10_901).unwrap().contains("program"), "by its oldest class");
        assert!(!known.wants_another(&[Class::Program, Class::State], 1_000, 10_600));
        assert!(known.wants_another(&[Class::Program, Class::State], 1_000, 10_660));
        assert!(!known.wants_another(&[Class::State], 1_000, 10_660), "only what may be taken counts");
        // The clock was set back.
        assert_eq!(known.stale(1_000, 5), None);
    }
}
