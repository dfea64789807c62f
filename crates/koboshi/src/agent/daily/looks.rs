//! Looks at the disk: the one of daily operation, those that a decision waits for, and what follows from what they find.

use super::*;

/// Of a look that a decision waits for. Even a thorough one at a warm program takes a second; a stuck disk is not waited
/// for.
pub(in crate::agent) const LOOK_LIMIT: Duration = Duration::from_secs(20);
/// The sweep's period at best.
const SWEEP_LEAST_MS: f64 = 30_000.0;
/// And at worst.
pub(super) const SWEEP_MOST_MS: f64 = 900_000.0;
/// The period is at least this many times the CPU of the last sweep: with what starting and ending a step costs, about
/// 0.1 % of one core.
const SWEEP_CPU_SHARE: f64 = 1_200.0;
/// And at least this many times its wall time: 0.5 % of the time in I/O on a slow disk.
const SWEEP_WALL_SHARE: f64 = 200.0;
/// Under more pressure than this (PSI some avg10, percent) the sweep waits.
const PRESSURE_LIMIT_PERCENT: f32 = 20.0;
/// But no longer than this: a machine that is always pressed (a nightly job that never ends, a dying disk) needs its
/// backups more than any other.
const PRESSURE_MOST_MS: u64 = 600_000;
/// A file that somebody still edits is looked at again after this.
const LOOK_AGAIN_MS: u64 = 10_000;

impl Agent {
    /// What a look at the disk of a serving node leads to.
    pub(super) fn examined(&mut self, now: Moment, exam: Examination) {
        let period = (exam.cpu_ms * SWEEP_CPU_SHARE).max(exam.wall_ms * SWEEP_WALL_SHARE).max(SWEEP_LEAST_MS);
        self.daily.examine_by(now.plus_ms(period.min(SWEEP_MOST_MS) as u64));
        // Told once: what a tidy could not take it would not take a minute later either.
        let known = self.exam.as_ref().map_or(0, |before| before.leftovers);
        if exam.leftovers > known && self.daily.tidy_at.is_none() {
            self.daily.tidy_soon(now.plus_ms(RETRY_MS));
        }
        let need = exam.need;
        let findings = exam.findings.clone();
        if let Some(why) = notices::short_of_space(&findings, exam.low.as_deref())
            && self.notices.tell(alert::Notice::DiskLow, now)
        {
            self.notice(alert::Notice::DiskLow, &why);
        }
        // Also caches and logs are touched only by a hand that may; and not under an update, which may be using them.
        if findings.iter().any(|f| f.kind == FaultKind::DiskFull)
            && !findings.iter().any(|f| f.kind == FaultKind::UpdateAtWork)
            && self.hands_off().is_none()
            && self.daily.room_again.is_none_or(|at| past(now, at))
        {
            self.daily.room_at = Some(now);
        }
        self.keep(exam, Care::Quick);
        let serving = self.judgement.as_ref().is_some_and(|j| j.verdict.is_serving());
        match need {
            Need::Nothing => {}
            Need::Later => self.daily.examine_by(now.plus_ms(LOOK_AGAIN_MS)),
            Need::InPlace | Need::Interruption => {
                let kind = if need == Need::InPlace { IncidentKind::Latent } else { IncidentKind::Damage };
                if serving {
                    self.damaged(kind, findings);
                }
            }
        }
        if serving {
            self.backups(now);
        }
    }

    /// Keeps a look, and for good what the program said of the config: it is asked once about each.
    pub(super) fn keep(&mut self, exam: Examination, care: Care) {
        if let Some(checked) = exam.checked.clone()
            && !self.judge.baseline().checked.contains(&checked)
        {
            self.judge.config_checked(checked);
            self.save_baseline();
        }
        // A look that left the store alone knows of no copies; that is no news of them.
        if !exam.store_hangs && self.daily.known.learn(&exam.ages_s, clock::wall().as_second()) {
            self.keep_known();
        }
        self.exam = Some(exam);
        self.exam_taken = Some((clock::now(), care));
    }

    pub(super) fn damaged(&mut self, kind: IncidentKind, findings: Vec<Finding>) {
        let wanted: Vec<Finding> = findings
            .into_iter()
            .filter(|f| !matches!(f.kind, FaultKind::Notice | FaultKind::BackupStale))
            .collect();
        let cause = match kind {
            IncidentKind::Latent => "damage on disk that the next start would not survive",
            IncidentKind::Damage | IncidentKind::Outage => {
                "damage that cannot be repaired while the gateway runs"
            }
        }
        .to_owned();
        if self.hands_off().is_some() {
            if !self.told_left_alone {
                self.told_left_alone = true;
                self.open(kind, cause, wanted);
            }
            return;
        }
        match kind {
            IncidentKind::Latent => self.open(kind, cause, wanted),
            IncidentKind::Damage | IncidentKind::Outage => self.open_or_escalate_with(kind, cause, wanted),
        }
    }

    /// A look at the disk right now, in its own container, for a decision that waits for it.
    pub(in crate::agent) fn examine_now(&mut self, care: Care) -> Option<Examination> {
        self.examine_within(care, LOOK_LIMIT)
    }

    /// The same with a limit of its own.
    pub(in crate::agent) fn examine_within(&mut self, care: Care, limit: Duration) -> Option<Examination> {
        /// However limits are divided: on a busy machine a process and its look at a healthy disk may take this long.
        const LEAST: Duration = Duration::from_secs(6);
        let limit = self.room(limit, LEAST);
        self.daily.make_way();
        // A decision is never made on a look from before: without a new one nothing is known.
        self.exam = None;
        self.exam_taken = None;
        let baseline = self.judge.baseline().clone();
        self.leave_a_hanging_store();
        // Never the daily look's container: that one may be stuck too. One of a look that would not die is left to itself, and
        // the next look has another.
        let name = format!("job-look-{}", self.stuck_looks);
        let work = Work::Examine { care, users: false };
        self.look_begins();
        let looked = self.runner.look(&name, work, &self.node, Some(&baseline), limit);
        let _ = std::fs::remove_file(self.places.looking());
        if looked.is_err() {
            self.stuck_looks = self.stuck_looks.saturating_add(1);
        }
        let answer = looked.map(|(answer, emptied)| {
            if let Err(e) = emptied {
                self.say(&e.to_string());
                self.stuck_looks = self.stuck_looks.saturating_add(1);
            }
            answer
        });
        let examined = |a| if let Answer::Examined(exam) = a { Some(*exam) } else { None };
        match answer.map_err(|e| e.to_string()).and_then(|a| Answer::wanted(Some(a), examined)) {
            Ok(exam) => {
                if exam.store_hangs {
                    self.store_hangs = self.climb_key();
                    self.runner.without_store = true;
                }
                self.keep(exam.clone(), care);
                Some(exam)
            }
            Err(why) => {
                self.say(&format!("the disk could not be looked at: {why}"));
                None
            }
        }
    }

    /// Writes down that a look of this climb's reads the store, and how many agents have died over such a one: whoever is
    /// killed again and again while a stuck disk is waited for would else wait for it again and again.
    fn look_begins(&mut self) {
        let Some((incident, climb)) = self.climb_key().filter(|_| !self.runner.without_store) else { return };
        let lost = self.lost_looks().saturating_add(1);
        let text = format!("{incident} {climb} {lost}");
        // Without it a stuck disk costs a little more after a death.
        let _ = files::write_for_now(&self.places.looking(), text.as_bytes(), 0o600);
    }

    /// Looks of this climb that ended with their agents.
    fn lost_looks(&self) -> u32 {
        /// Three numbers.
        const LIMIT_BYTES: u64 = 128;
        let bytes = files::read_bounded(&self.places.looking(), LIMIT_BYTES).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let numbers: Vec<u64> = text.split(' ').filter_map(|n| n.parse().ok()).collect();
        match (numbers.as_slice(), self.climb_key()) {
            ([incident, climb, lost], Some(key)) if (*incident, *climb) == (key.0, u64::from(key.1)) => {
                u32::try_from(*lost).unwrap_or(u32::MAX)
            }
            (_, _) => 0,
        }
    }

    /// A new agent in the middle of a climb: a store over which two agents have died is one that hangs.
    pub(in crate::agent) fn inherit_a_hanging_store(&mut self) {
        const MANY: u32 = 2;
        if self.lost_looks() >= MANY {
            self.store_hangs = self.climb_key();
            self.say("two agents ended while they waited for the store: it is left alone in this climb");
        }
    }

    /// Steps leave a store alone that hung in this climb, and only in this one.
    pub(in crate::agent) fn leave_a_hanging_store(&mut self) {
        self.runner.without_store = self.store_hangs.is_some() && self.store_hangs == self.climb_key();
    }

    /// The open incident's climb: what hung in one is tried again in the next.
    pub(in crate::agent) fn climb_key(&self) -> Option<(u64, u32)> {
        // The look that an incident begins with is its first climb's.
        self.book.state().incident.as_ref().map(|incident| (incident.id, incident.climbs.max(1)))
    }

    /// What one act of the agent itself may take now. Inside a climb it ends before the climb does: its last seconds are
    /// for killing what is left and for the message. `least` is what it gets however limits are divided.
    pub(in crate::agent) fn room(&self, whole: Duration, least: Duration) -> Duration {
        /// Also at the very end a quick act is tried.
        const AT_THE_END: Duration = Duration::from_secs(1);
        let state = self.book.state();
        let Some(climb) = state.climb() else { return self.config.ladder.limits().span(whole).max(least) };
        let kill_ms = u64::try_from(runner::KILL_LIMIT.as_millis()).unwrap_or(u64::MAX);
        let end_ms = climb.limits.of(engine::CLIMB_MS.saturating_sub(engine::ALERT_ACT_MS + kill_ms));
        let spent_ms = state.time_ms(clock::now()).saturating_sub(climb.began_ms);
        let left = Duration::from_millis(end_ms.saturating_sub(spent_ms));
        climb.limits.span(whole).max(least).min(left.max(climb.limits.span(AT_THE_END)))
    }
}

/// Whether a look that is due may be taken: on a machine that is not pressed, or that has been for as long as it is waited
/// for. `since` is when the waiting began.
pub(super) fn may_look(pressed: bool, since: &mut Option<Moment>, now: Moment) -> bool {
    let began = *since.get_or_insert(now);
    let may = !pressed || now.since_ms(began).is_none_or(|ms| ms >= PRESSURE_MOST_MS);
    if may {
        *since = None;
    }
    may
}

pub(in crate::agent) fn pressed() -> bool {
    let over = |some: Option<f32>| some.is_some_and(|percent| percent > PRESSURE_LIMIT_PERCENT);
    over(some_avg10(Resource::Io)) || over(some_avg10(Resource::Memory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_puts_a_look_off_and_does_not_keep_it_off() {
        let at = |ms| Moment { boot: 1, ms };
        let mut since = None;
        assert!(may_look(false, &mut since, at(0)) && since.is_none());
        assert!(!may_look(true, &mut since, at(1_000)));
        assert!(!may_look(true, &mut since, at(1_000 + PRESSURE_MOST_MS - 1)));
        assert!(may_look(true, &mut since, at(1_000 + PRESSURE_MOST_MS)));
        // The next one waits anew, and one that may be taken leaves nothing behind.
        assert!(!may_look(true, &mut since, at(2_000 + PRESSURE_MOST_MS)));
        assert!(may_look(false, &mut since, at(3_000 + PRESSURE_MOST_MS)) && since.is_none());
    }
}
