//! Which backups of daily operation are due, of which classes, and when they are trusted or too old.

use super::*;

/// A state snapshot's period is at least this many times its cost.
const STATE_COST_SHARE: f64 = 100.0;
/// How old the copies are is looked at this often at most.
const STALE_EVERY_MS: u64 = 600_000;

impl Agent {
    /// Decides what of the backups of daily operation is due. Called when the node serves and its disk was looked at: what
    /// was found there says of which classes a copy is worth taking.
    pub(super) fn backups(&mut self, now: Moment) {
        let Some(exam) = &self.exam else {
            return;
        };
        if self.daily.snapshot_at.is_some() || self.daily.settle_at.is_some() {
            return;
        }
        let config_now = stamp(std::slice::from_ref(&self.node.config_path));
        let state_now = exam.users;
        if exam.store_hangs {
            return;
        }
        // What was taken first may have lacked the program, because that was in doubt then.
        let no_program = !exam.ages_s.contains_key(&Class::Program) && self.is_whole();
        let (first, version) = (exam.snapshot.is_none() || no_program, exam.version.clone());
        let (whole, takeable) = (self.is_whole(), self.takeable(now));
        let config_changed = self.daily.config_seen.is_some_and(|seen| seen != config_now);
        let (now_s, limit_s) = (clock::wall().as_second(), self.config.backup.stale_after_s);
        if first && !takeable.is_empty() {
            self.daily.snapshot_at = Some((now, Vec::new(), "the first".into()));
        } else if whole
            && version.is_some()
            && version != self.node.package_version()
            && self.runs_what_lies_there(now)
        {
            self.daily.snapshot_at = Some((now, Vec::new(), "a new version serves".into()));
        } else if config_changed && takeable.contains(&Class::Config) {
            self.daily.snapshot_at = Some((now, vec![Class::Config], "the config was changed".into()));
        } else if takeable.contains(&Class::State) && self.state_due(now, state_now) {
            let classes =
                vec![Class::Config, Class::Credentials, Class::State, Class::Sessions, Class::Workspace];
            self.daily.snapshot_at = Some((now, classes, "daily operation".into()));
        } else if self.daily.known.wants_another(&takeable, limit_s, now_s) {
            // Unchanged classes are carried over for nothing; a look proves that they are unchanged.
            self.daily.snapshot_at = Some((now, Vec::new(), "the last good one grows old".into()));
        } else if whole {
            self.daily.settled = true;
        }
        if self.daily.config_seen.is_some_and(|seen| seen != config_now) {
            self.daily.contacts_at = Some(now);
        }
        self.daily.config_seen = Some(config_now);
        if let Some((_, classes, _)) = &self.daily.snapshot_at {
            if with_state(classes) {
                // From before the copy: what is written while it is taken is the next one's.
                self.daily.state_taking = state_now;
            }
            self.daily.settled = false;
        }
    }

    /// Whether state is due and was written since it was last taken. An agent that has not taken any yet does not know
    /// what was written before it lived: it takes a copy.
    pub(super) fn state_due(&mut self, now: Moment, state_now: Option<Stamp>) -> bool {
        // A look that did not look there decides nothing: the next one does.
        let Some(stamp) = state_now.filter(|_| past(now, self.daily.state_at)) else {
            return false;
        };
        self.daily.state_wanted = false;
        let most_ms = self.config.backup.state_every_most_s.saturating_mul(1000);
        if !state_changed(self.daily.state_seen, stamp, now, most_ms) {
            self.daily.state_at = now.plus_ms(self.config.backup.state_every_least_s.saturating_mul(1000));
            return false;
        }
        true
    }

    /// When state may be taken again: at least a hundred times its last cost later.
    pub(super) fn state_next(&mut self, now: Moment) {
        let backup = &self.config.backup;
        let by_cost = (self.daily.state_cost_ms * STATE_COST_SHARE) as u64;
        let least_ms = backup.state_every_least_s.saturating_mul(1000);
        let most_ms = backup.state_every_most_s.saturating_mul(1000).max(least_ms);
        let wait_ms = by_cost.clamp(least_ms, most_ms);
        self.daily.state_at = now.plus_ms(wait_ms);
        self.daily.state_wanted = false;
        if let Some(stamp) = self.daily.state_taking.take() {
            self.daily.state_seen = Some((stamp, now));
        }
    }

    /// No good snapshot for too long is told, once a day: on a timer of its own and from what is remembered, because
    /// whatever keeps snapshots from being taken (damage that lasts, a machine that is always pressed, looks that fail) must
    /// not keep that from being known.
    pub(super) fn stale(&mut self, now: Moment) {
        let limit_s = self.config.backup.stale_after_s;
        if !past(now, self.daily.stale_at) {
            return;
        }
        self.daily.stale_at = now.plus_ms(stale_every_ms(limit_s));
        let Some(why) = self.daily.known.stale(limit_s, clock::wall().as_second()) else {
            self.daily.stale_told = None;
            return;
        };
        let told =
            self.daily.stale_told.and_then(|at| now.since_ms(at)).is_some_and(|ms| ms < limit_s * 1000);
        if !told {
            self.daily.stale_told = Some(now);
            self.notice(alert::Notice::BackupStale, &why);
        }
    }

    /// The snapshot that is due now, with the classes of it that may be taken. One of which nothing may be taken waits.
    pub(super) fn snapshot_due(&mut self, now: Moment, serving: bool) -> Option<(Vec<Class>, String)> {
        let (_, classes, note) =
            self.daily.snapshot_at.clone().filter(|(at, _, _)| serving && past(now, *at))?;
        let takeable = self.takeable(now);
        let wanted = if classes.is_empty() { Class::ALL.to_vec() } else { classes.clone() };
        let taken: Vec<Class> = wanted.into_iter().filter(|c| takeable.contains(c)).collect();
        if taken.is_empty() {
            self.daily.snapshot_at = Some((now.plus_ms(RETRY_MS), classes, note));
            return None;
        }
        Some((taken, note))
    }

    /// Whether the gateway that serves now has done so for the settling time since the snapshot was taken.
    pub(super) fn served_for_settling(&self) -> bool {
        self.settling.served_ms() >= self.config.backup.settle_s.saturating_mul(1000)
    }

    /// Whether the last look found nothing wrong, nothing unknown, and no incident is about anything else.
    pub(super) fn is_whole(&self) -> bool {
        self.book.state().incident.is_none()
            && self.exam.as_ref().is_some_and(|e| e.need == Need::Nothing && e.unknown.is_none())
    }

    /// The classes of which a copy may be taken now. A program that lies there and never ran is not taken where an older
    /// snapshot still holds the one that did; one that is damaged is not, and what is damaged of the user's is not.
    pub(super) fn takeable(&self, now: Moment) -> Vec<Class> {
        let Some(exam) = &self.exam else {
            return Class::ALL.to_vec();
        };
        let mut classes = Class::ALL.to_vec();
        if exam.ages_s.contains_key(&Class::Program) && !self.runs_what_lies_there(now) {
            classes.retain(|c| !matches!(c, Class::Program | Class::Runtime));
        }
        if !self.daily.by_hand && !self.is_whole() {
            let sound = beyond_doubt(&exam.findings);
            classes.retain(|c| !c.converges() && sound.contains(c));
        }
        classes
    }

    /// Whether the program on disk is the one that serves: unchanged since the gateway was started, or the very one
    /// that is trusted already. A version that was only installed has proven nothing.
    pub(super) fn runs_what_lies_there(&self, now: Moment) -> bool {
        use std::os::unix::fs::MetadataExt;
        /// `/proc/PID/stat` counts in hundredths of a second since boot.
        const MS_PER_TICK: u64 = 10;
        let trusted = self.exam.as_ref().is_some_and(|e| {
            e.need == Need::Nothing && e.version.is_some() && e.version == self.node.package_version()
        });
        let Some(gateway) = self.gateway.as_ref().map(host::process::PidFd::id) else {
            return false;
        };
        let runs_ms = now.ms.saturating_sub(gateway.start_ticks.saturating_mul(MS_PER_TICK));
        let wall_s = clock::wall().as_second();
        let older = |path: &std::path::Path| {
            std::fs::metadata(path)
                .is_ok_and(|m| u64::try_from(wall_s - m.ctime()).unwrap_or(0).saturating_mul(1000) >= runs_ms)
        };
        trusted
            || [&self.node.package_dir.join("package.json"), &self.node.entry, &self.node.node_bin]
                .iter()
                .all(|p| older(p))
    }

    /// The baseline of a node that was just confirmed to serve, unless something about it is off: then the old one
    /// stands, because it is what the node is measured by.
    pub(super) fn take_baseline(&mut self, now: Moment) {
        /// Reading the identity takes milliseconds.
        const LIMIT: Duration = Duration::from_secs(3);
        if !self.daily.baseline_at.is_some_and(|at| past(now, at)) {
            return;
        }
        if self.book.state().incident.is_some() && !self.daily.accepted {
            return;
        }
        self.daily.baseline_at = None;
        self.daily.accepted = false;
        match Baseline::take(&self.node, Vec::new(), now, Deadline::after(LIMIT)) {
            Ok(mut baseline) => {
                baseline.checked.clone_from(&self.judge.baseline().checked);
                let version = baseline.version.clone();
                if let Some(news) = notices::news(self.judge.baseline(), &baseline) {
                    let day = clock::wall().strftime("%Y-%m-%d");
                    let about = format!("baseline-{day}-{}", version.as_deref().unwrap_or_default());
                    self.notice_of(alert::Notice::NewBaseline, &about, &news);
                }
                if let Err(e) = patient::set_baseline(&self.places, &baseline) {
                    self.say(&e.to_string());
                }
                if let Err(e) = layers::install::remember_service(&self.node, &self.places.state_dir) {
                    self.say(&e.to_string());
                }
                self.judge.set_baseline(baseline);
                if version.is_some() && version != self.node.version {
                    self.node.version = version;
                    let _ = patient::remember(&self.places, &self.node);
                }
            }
            Err(e) => {
                self.say(&format!("no baseline yet: {e}"));
                self.daily.baseline_at = Some(now.plus_ms(RETRY_MS));
            }
        }
    }
}

pub(super) fn stale_every_ms(stale_after_s: u64) -> u64 {
    /// However short a limit is asked for.
    const LEAST_MS: u64 = 500;
    (stale_after_s.saturating_mul(1000) / 4).clamp(LEAST_MS, STALE_EVERY_MS)
}

/// The classes of which these findings leave no doubt that what lies there is worth keeping. A damaged program is no
/// reason to take no copy of what its user writes: it is the very moment for one.
pub(super) fn beyond_doubt(findings: &[Finding]) -> Vec<Class> {
    let mut classes = Class::ALL.to_vec();
    for finding in findings {
        match finding.kind {
            FaultKind::ConfigBroken => classes.retain(|c| *c != Class::Config),
            FaultKind::RootMissing
            | FaultKind::DatabaseCorrupt
            | FaultKind::Amnesia
            | FaultKind::SchemaNewer => match finding.class {
                Some(one @ (Class::Workspace | Class::Credentials)) => classes.retain(|c| *c != one),
                Some(one) if one.converges() => classes.retain(|c| !c.converges()),
                // Databases of two moments would not fit each other, and what lies beside them may be as young.
                Some(_) | None => classes.retain(|c| c.converges() || *c == Class::Config),
            },
            FaultKind::FilesDamaged | FaultKind::RuntimeUnfit | FaultKind::UpdateAtWork => {
                classes.retain(|c| !c.converges());
            }
            FaultKind::ProcessGone
            | FaultKind::Hung
            | FaultKind::ServiceLatched
            | FaultKind::PortTaken
            | FaultKind::Permission
            | FaultKind::DiskFull
            | FaultKind::OwnersWill
            | FaultKind::BackupStale
            | FaultKind::Notice => {}
        }
    }
    classes
}

/// Whether a snapshot of these classes (all when none are named) holds the state.
pub(super) fn with_state(classes: &[Class]) -> bool {
    classes.is_empty() || classes.contains(&Class::State)
}

/// Whether the user's files are others than when state was last taken. Where there are more than were looked at, an
/// unchanged number proves nothing: then a copy is taken all the same, as rarely as the configuration allows.
pub(super) fn state_changed(seen: Option<(Stamp, Moment)>, stamp: Stamp, now: Moment, most_ms: u64) -> bool {
    seen.is_none_or(|(before, at)| {
        let long_ago = now.since_ms(at).is_none_or(|ms| ms >= most_ms);
        before.hash != stamp.hash || !stamp.whole && long_ago
    })
}

/// Something that changes whenever one of these files does. Times and sizes are enough: this only decides whether a
/// snapshot is worth taking.
pub(super) fn stamp(paths: &[std::path::PathBuf]) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hash = DefaultHasher::new();
    for path in paths {
        match std::fs::metadata(path) {
            Ok(m) => (m.len(), m.modified().unwrap_or(SystemTime::UNIX_EPOCH)).hash(&mut hash),
            Err(_) => 0_u8.hash(&mut hash),
        }
    }
    hash.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_is_taken_when_it_changed_and_rarely_where_nobody_can_tell() {
        let at = |ms| Moment { boot: 1, ms };
        let of = |hash, whole| Stamp { hash, whole };
        let changed = |seen, stamp, ms| state_changed(seen, stamp, at(ms), 1_000);
        assert!(changed(None, of(1, true), 0), "an agent that knows of none takes one");
        let seen = Some((of(1, true), at(0)));
        assert!(!changed(seen, of(1, true), 1_000_000));
        assert!(changed(seen, of(2, true), 1));
        let seen = Some((of(1, false), at(0)));
        assert!(!changed(seen, of(1, false), 999) && changed(seen, of(1, false), 1_000));
        assert!(changed(seen, of(2, false), 1));
        assert!(
            with_state(&[]) && with_state(&[Class::Config, Class::State]) && !with_state(&[Class::Config])
        );
    }

    #[test]
    fn a_damaged_program_leaves_no_doubt_about_what_its_user_writes() {
        let of = |kind, class| {
            let finding = Finding { kind, class: Some(class), what: String::new(), evidence: Vec::new() };
            beyond_doubt(&[finding])
        };
        let users = [Class::Config, Class::Credentials, Class::State, Class::Sessions, Class::Workspace];
        for (kind, class) in [
            (FaultKind::FilesDamaged, Class::Program),
            (FaultKind::FilesDamaged, Class::Service),
            (FaultKind::RuntimeUnfit, Class::Runtime),
            (FaultKind::UpdateAtWork, Class::Program),
        ] {
            let left = of(kind, class);
            assert!(users.iter().all(|c| left.contains(c)) && left.len() == users.len(), "{kind:?} {left:?}");
        }
        for kind in [FaultKind::DatabaseCorrupt, FaultKind::Amnesia, FaultKind::SchemaNewer] {
            let left = of(kind, Class::State);
            assert!(!left.contains(&Class::State) && !left.contains(&Class::Sessions), "{kind:?} {left:?}");
        }
        assert!(!of(FaultKind::ConfigBroken, Class::Config).contains(&Class::Config));
        let left = of(FaultKind::RootMissing, Class::Workspace);
        assert!(!left.contains(&Class::Workspace) && left.contains(&Class::State));
    }
}
