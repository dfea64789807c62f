//! Daily operation: looks at the disk, snapshots, settling, tidying, delivering. One background job at a time, all of
//! them contained, all of them ended when an incident needs the machine.

use super::runner::Running;
use super::{Agent, notices, runner};
use crate::agent::copies::Known;
use crate::config::{Backup, NodeChannels};
use crate::patient;
use crate::step::{Answer, SCRUB_PORTIONS, Work};
use engine::{Class, FaultKind, Finding, IncidentKind, Moment};
use host::clock::{self, Deadline};
use host::pressure::{Resource, some_avg10};
use layers::{Care, Examination, Need};
use node::Baseline;
use node::users::Stamp;
use std::os::fd::BorrowedFd;
use std::time::{Duration, SystemTime};

/// The sweep's period at best.
const SWEEP_LEAST_MS: f64 = 30_000.0;
/// And at worst.
const SWEEP_MOST_MS: f64 = 900_000.0;
/// The period is at least this many times the CPU of the last sweep: with what starting and ending a step costs, about
/// 0.15 % of one core.
const SWEEP_CPU_SHARE: f64 = 800.0;
/// And at least this many times its wall time: 0.5 % of the time in I/O on a slow disk.
const SWEEP_WALL_SHARE: f64 = 200.0;
/// Under more pressure than this (PSI some avg10, percent) the sweep waits.
const PRESSURE_LIMIT_PERCENT: f32 = 20.0;
/// But no longer than this: a machine that is always pressed (a nightly job that never ends, a dying disk) needs its
/// backups more than any other.
const PRESSURE_MOST_MS: u64 = 600_000;
/// How old the copies are is looked at this often at most.
const STALE_EVERY_MS: u64 = 600_000;
/// And not before a new agent has had the time for its first look.
const STALE_FIRST_MS: u64 = 60_000;
/// A state snapshot's period is at least this many times its cost.
const STATE_COST_SHARE: f64 = 100.0;
/// A file that somebody still edits is looked at again after this.
const LOOK_AGAIN_MS: u64 = 10_000;
/// A refused candidate's wait doubles this often at most: over eight hours.
const MOST_DOUBLINGS: u32 = 9;
/// After a failed job.
const RETRY_MS: u64 = 60_000;
/// After the node's chat accounts could not be read: the key comes with the first snapshot.
const CONTACTS_RETRY_MS: u64 = 600_000;
/// Messages that no channel took are tried again at the latest after this.
const DELIVER_MOST_MS: u64 = 900_000;

/// Of a look that a decision waits for. Even a thorough one at a warm program takes a second; a stuck disk is not waited
/// for.
pub(super) const LOOK_LIMIT: Duration = Duration::from_secs(20);

/// Limits of the jobs.
const EXAMINE_LIMIT: Duration = Duration::from_secs(120);
const SNAPSHOT_LIMIT: Duration = Duration::from_secs(900);
const SETTLE_LIMIT: Duration = Duration::from_secs(120);
const SCRUB_LIMIT: Duration = Duration::from_secs(120);
const TIDY_LIMIT: Duration = Duration::from_secs(900);
/// A pass ends by itself after 15 s; what hangs beyond that in the kernel is killed.
const DELIVER_LIMIT: Duration = Duration::from_secs(20);
const BEAT_LIMIT: Duration = Duration::from_secs(20);
const CONTACTS_LIMIT: Duration = Duration::from_secs(60);
/// The chat accounts of the node are looked at again this often, whatever the config says of change: a token may come
/// from elsewhere.
const CONTACTS_EVERY_MS: u64 = 6 * 3_600_000;
/// A dead man's switch is never asked more often than this, in seconds.
const BEAT_LEAST_S: u64 = 10;

/// What a background job does.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Job {
    Examine,
    Snapshot { classes: Vec<Class> },
    Settle,
    Scrub,
    Tidy,
    Contacts,
}

/// The schedule of daily operation.
#[derive(Debug)]
pub struct Daily {
    job: Option<(Job, Running)>,
    delivery: Option<Running>,
    beat: Option<Running>,
    beat_at: Option<Moment>,
    /// Whether the last beat was heard; told when it changes.
    beat_heard: Option<bool>,
    contacts_at: Option<Moment>,
    examine_at: Moment,
    snapshot_at: Option<(Moment, Vec<Class>, String)>,
    settle_at: Option<Moment>,
    tidy_at: Option<Moment>,
    scrub_at: Option<Moment>,
    deliver_at: Option<Moment>,
    state_at: Moment,
    /// State is due and waits for a look that finds the node whole.
    state_wanted: bool,
    state_cost_ms: f64,
    /// What the user's files looked like before state was last taken, and when that was.
    state_seen: Option<(Stamp, Moment)>,
    /// The same for the copy that is being taken.
    state_taking: Option<Stamp>,
    config_seen: Option<u64>,
    baseline_at: Option<Moment>,
    /// The owner asked for a new baseline: also in the middle of an incident, which may be about just that.
    accepted: bool,
    stale_at: Moment,
    stale_told: Option<Moment>,
    /// What is known of the good copies' ages, by this agent and those before it.
    known: Known,
    /// The snapshot that is due was asked for by a person: what was found on the disk may be just what it is about.
    by_hand: bool,
    /// Since when a look has waited for the machine to have time for it.
    pressed_since: Option<Moment>,
    trouble: Option<String>,
    settled: bool,
    /// Candidates refused in a row: each makes the next one wait longer.
    refused: u32,
}

impl Daily {
    pub(super) fn new(now: Moment, config: &Backup, known: Known) -> Daily {
        let first_ms = STALE_FIRST_MS.min(stale_every_ms(config.stale_after_s));
        Daily {
            job: None,
            delivery: None,
            beat: None,
            beat_at: None,
            beat_heard: None,
            contacts_at: None,
            examine_at: now,
            snapshot_at: None,
            settle_at: None,
            tidy_at: None,
            scrub_at: None,
            deliver_at: Some(now),
            state_at: now,
            state_wanted: false,
            state_cost_ms: 0.0,
            state_seen: None,
            state_taking: None,
            config_seen: None,
            baseline_at: None,
            accepted: false,
            stale_at: now.plus_ms(first_ms),
            stale_told: None,
            known,
            by_hand: false,
            pressed_since: None,
            trouble: None,
            settled: false,
            refused: 0,
        }
    }

    pub(super) fn settled(&self) -> bool {
        self.settled && self.job.is_none() && self.snapshot_at.is_none() && self.tidy_at.is_none()
    }

    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.clone()
    }

    /// The node has just begun to serve: the baseline is taken from it.
    pub(super) fn serving(&mut self, now: Moment) {
        self.baseline_at = Some(now);
        self.examine_at = now;
        self.contacts_at = Some(now);
        self.beat_at = Some(now);
    }

    /// Whether a look at the disk is at work.
    pub(super) fn looking(&self) -> bool {
        self.job.as_ref().is_some_and(|(job, _)| *job == Job::Examine)
    }

    pub(super) fn examine_soon(&mut self, now: Moment) {
        self.examine_at = now;
    }

    pub(super) fn deliver_soon(&mut self, now: Moment) {
        self.deliver_at = Some(now);
    }

    pub(super) fn accept(&mut self, now: Moment) {
        self.baseline_at = Some(now);
        self.accepted = true;
        self.snapshot_at = Some((now, Vec::new(), "accepted by the owner".into()));
        self.by_hand = true;
        self.settled = false;
    }

    pub(super) fn snapshot_by_hand(&mut self, now: Moment, note: &str) {
        self.snapshot_at = Some((now, Vec::new(), note.to_owned()));
        self.by_hand = true;
        self.settled = false;
    }

    pub(super) fn tidy_soon(&mut self, now: Moment) {
        self.tidy_at = Some(now);
    }

    pub(super) fn due(&self) -> Option<Moment> {
        let mut due = Vec::new();
        if self.job.is_none() {
            due.push(self.examine_at);
            due.extend(self.snapshot_at.as_ref().map(|(at, _, _)| *at));
            due.extend(self.settle_at);
            due.extend(self.tidy_at);
            due.extend(self.scrub_at);
            due.extend(self.contacts_at);
            due.extend((!self.state_wanted).then_some(self.state_at));
        }
        if self.delivery.is_none() {
            due.extend(self.deliver_at);
        }
        if self.beat.is_none() {
            due.extend(self.beat_at);
        }
        due.push(self.stale_at);
        due.extend(self.job_deadline());
        due.extend([&self.delivery, &self.beat].into_iter().flatten().map(|r| r.deadline.moment()));
        due.into_iter().min_by_key(|m| m.ms)
    }

    fn job_deadline(&self) -> Option<Moment> {
        self.job.as_ref().map(|(_, running)| running.deadline.moment())
    }

    pub(super) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let job = self.job.as_ref().map(|(_, running)| running.step.pidfd());
        let delivery = self.delivery.as_ref().map(|running| running.step.pidfd());
        let beat = self.beat.as_ref().map(|running| running.step.pidfd());
        job.into_iter().chain(delivery).chain(beat).collect()
    }

    /// The next look, at the latest. One that was asked for while the last one looked stays asked for: what it was asked
    /// about may have come after the eyes had passed.
    fn examine_by(&mut self, at: Moment) {
        if self.examine_at.boot != at.boot || at.ms < self.examine_at.ms {
            self.examine_at = at;
        }
    }

    /// Ends the background job: an incident needs disk and processor now.
    pub(super) fn make_way(&mut self) {
        if let Some((job, mut running)) = self.job.take() {
            let _ = running.kill();
            let now = clock::now();
            match job {
                Job::Examine => self.examine_at = now,
                Job::Snapshot { classes } => {
                    self.snapshot_at = Some((now.plus_ms(RETRY_MS), classes, "taken again".into()));
                }
                Job::Settle => self.settle_at = Some(now.plus_ms(RETRY_MS)),
                Job::Scrub => self.scrub_at = Some(now.plus_ms(RETRY_MS)),
                Job::Tidy => self.tidy_at = Some(now.plus_ms(RETRY_MS)),
                Job::Contacts => self.contacts_at = Some(now.plus_ms(RETRY_MS)),
            }
        }
    }

    pub(super) fn end(&mut self) {
        self.make_way();
        for mut running in [self.delivery.take(), self.beat.take()].into_iter().flatten() {
            let _ = running.kill();
        }
    }
}

fn stale_every_ms(stale_after_s: u64) -> u64 {
    /// However short a limit is asked for.
    const LEAST_MS: u64 = 500;
    (stale_after_s.saturating_mul(1000) / 4).clamp(LEAST_MS, STALE_EVERY_MS)
}

/// Whether a look that is due may be taken: on a machine that is not pressed, or that has been for as long as it is waited
/// for. `since` is when the waiting began.
fn may_look(pressed: bool, since: &mut Option<Moment>, now: Moment) -> bool {
    let began = *since.get_or_insert(now);
    let may = !pressed || now.since_ms(began).is_none_or(|ms| ms >= PRESSURE_MOST_MS);
    if may {
        *since = None;
    }
    may
}

/// The classes of which these findings leave no doubt that what lies there is worth keeping. A damaged program is no
/// reason to take no copy of what its user writes: it is the very moment for one.
fn beyond_doubt(findings: &[Finding]) -> Vec<Class> {
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

fn past(now: Moment, at: Moment) -> bool {
    now.boot != at.boot || now.ms >= at.ms
}

impl Agent {
    /// Takes the answers of jobs that ended, and ends those that took too long.
    pub(super) fn take_jobs(&mut self) {
        let now = clock::now();
        if let Some((_, running)) = &mut self.daily.job
            && (running.step.look().is_some() || running.deadline.passed())
            && let Some((job, mut running)) = self.daily.job.take()
        {
            let answer = match running.kill() {
                Ok(_) => running.answer(),
                Err(e) => {
                    self.say(&e.to_string());
                    None
                }
            };
            self.job_done(now, &job, answer);
        }
        if let Some(running) = &mut self.daily.delivery
            && (running.step.look().is_some() || running.deadline.passed())
            && let Some(mut running) = self.daily.delivery.take()
        {
            let _ = running.kill();
            self.delivered(now, running.answer());
        }
        if let Some(running) = &mut self.daily.beat
            && (running.step.look().is_some() || running.deadline.passed())
            && let Some(mut running) = self.daily.beat.take()
        {
            let _ = running.kill();
            self.beaten(running.answer());
        }
    }

    /// Whether the switch heard us is told when it changes: it watches us, not we it.
    fn beaten(&mut self, answer: Option<Answer>) {
        let beaten = |a| if let Answer::Beaten { why } = a { Some(why) } else { None };
        let why = Answer::wanted(answer, beaten).unwrap_or_else(Some);
        if self.daily.beat_heard != Some(why.is_none()) {
            self.daily.beat_heard = Some(why.is_none());
            match why {
                Some(why) => self.say(&format!("the heartbeat address did not hear us: {why}")),
                None => self.say("the heartbeat address hears us"),
            }
        }
    }

    /// A beat only while the judge says that the node serves: its absence is what tells.
    fn due_beat(&mut self, now: Moment) {
        if self.config.heartbeat.url.is_none() {
            self.daily.beat_at = None;
            return;
        }
        let serving = self.judgement.as_ref().is_some_and(|j| j.verdict.is_serving() && j.confirmed);
        if self.daily.beat.is_some() || !serving || !self.daily.beat_at.is_some_and(|at| past(now, at)) {
            return;
        }
        let every_s = self.config.heartbeat.every_s.max(BEAT_LEAST_S);
        self.daily.beat_at = Some(now.plus_ms(every_s.saturating_mul(1000)));
        let deadline = Deadline::after(BEAT_LIMIT);
        match self.runner.spawn("job-beat", Work::Beat, &self.node, None, true, deadline) {
            Ok(running) => self.daily.beat = Some(running),
            Err(e) => self.say(&e.to_string()),
        }
    }

    fn job_done(&mut self, now: Moment, job: &Job, answer: Option<Answer>) {
        match answer {
            Some(Answer::Examined(exam)) => self.examined(now, *exam),
            Some(Answer::Taken { id, wall_ms, gone }) => {
                self.say(&format!(
                    "snapshot {id} taken in {wall_ms:.0} ms; it is trusted once the node has served on"
                ));
                self.daily.trouble = None;
                self.daily.by_hand = false;
                self.daily.settle_at = Some(now.plus_ms(self.config.backup.settle_s.saturating_mul(1000)));
                self.settling.begin();
                if matches!(job, Job::Snapshot { classes } if with_state(classes)) {
                    self.daily.state_cost_ms = wall_ms;
                    self.state_next(now);
                }
                if let Some(names) = notices::names(&gone)
                    && self.notices.tell(alert::Notice::FileMissing, now)
                {
                    self.notice(alert::Notice::FileMissing, &names);
                }
            }
            Some(Answer::Settled { id: Some(id), config, .. }) => {
                self.say(&format!("snapshot {id} is good: the node served with exactly what it holds"));
                if let Some(config) = config.filter(|_| self.judge.baseline().config.is_some()) {
                    // From here on this is the config that later ones are measured by.
                    self.judge.config_served(config);
                    self.save_baseline();
                }
                self.daily.settled = true;
                self.daily.refused = 0;
                self.daily.tidy_at = Some(now);
                self.daily.examine_at = now;
            }
            Some(Answer::Settled { id: None, why, .. }) => {
                let why = why.unwrap_or_default();
                self.say(&format!("the newest snapshot is not trusted: {why}"));
                self.daily.trouble = Some(why);
                // The first refusal is mostly somebody who was still writing; a lasting one must not fill the store.
                let wait_ms = RETRY_MS << self.daily.refused.min(MOST_DOUBLINGS);
                self.daily.refused = self.daily.refused.saturating_add(1);
                let again = now.plus_ms(wait_ms);
                self.daily.snapshot_at = Some((again, Vec::new(), "the candidate was not trusted".into()));
                self.daily.tidy_at = Some(now);
            }
            Some(Answer::Scrubbed { done, damaged, lost }) => {
                for line in done {
                    self.say(&line);
                }
                if damaged {
                    // The sweep sees it now, and what it leads to is the same as ever.
                    self.daily.examine_at = now;
                    self.daily.tidy_at = Some(now);
                }
                if let Some(why) = lost {
                    self.notice(alert::Notice::StoreDamaged, &why);
                    if self.daily.snapshot_at.is_none() {
                        self.daily.snapshot_at = Some((now, Vec::new(), "stored bytes were lost".into()));
                    }
                }
            }
            Some(Answer::Tidied { done }) => {
                for line in done {
                    self.say(&line);
                }
            }
            Some(Answer::Remembered { count, missing }) => {
                if count > 0 {
                    self.say(&format!("{count} people can be told through the node's own chat accounts"));
                }
                for line in missing {
                    self.say(&format!("a chat account of the node cannot be used for alerts: {line}"));
                }
            }
            Some(Answer::Failed { what, why }) => self.job_failed(now, job, &format!("{what}: {why}")),
            Some(Answer::Delivered { .. } | Answer::Beaten { .. } | Answer::Done(_)) | None => {
                self.job_failed(now, job, "it ended without an answer");
            }
        }
    }

    fn job_failed(&mut self, now: Moment, job: &Job, why: &str) {
        let again = now.plus_ms(RETRY_MS);
        let name = match job {
            Job::Examine => {
                self.daily.examine_at = again;
                "looking at the disk"
            }
            Job::Snapshot { classes } => {
                self.daily.snapshot_at = Some((again, classes.clone(), "tried again".into()));
                "taking a snapshot"
            }
            Job::Settle => {
                self.daily.settle_at = Some(again);
                "settling the snapshot"
            }
            Job::Scrub => "looking at every byte",
            Job::Tidy => "tidying the store",
            Job::Contacts => {
                // What was known before stands, and the node does not depend on it.
                self.daily.contacts_at = Some(now.plus_ms(CONTACTS_RETRY_MS));
                self.say(&format!("reading the node's chat accounts failed: {why}"));
                return;
            }
        };
        self.say(&format!("{name} failed: {why}"));
        self.daily.trouble = Some(format!("{name}: {why}"));
    }

    /// What a look at the disk of a serving node leads to.
    fn examined(&mut self, now: Moment, exam: Examination) {
        let period = (exam.cpu_ms * SWEEP_CPU_SHARE).max(exam.wall_ms * SWEEP_WALL_SHARE).max(SWEEP_LEAST_MS);
        self.daily.examine_by(now.plus_ms(period.min(SWEEP_MOST_MS) as u64));
        // Told once: what a tidy could not take it would not take a minute later either.
        let known = self.exam.as_ref().map_or(0, |before| before.leftovers);
        if exam.leftovers > known && self.daily.tidy_at.is_none() {
            self.daily.tidy_at = Some(now.plus_ms(RETRY_MS));
        }
        let need = exam.need;
        let findings = exam.findings.clone();
        if let Some(why) = notices::short_of_space(&findings, exam.low.as_deref())
            && self.notices.tell(alert::Notice::DiskLow, now)
        {
            self.notice(alert::Notice::DiskLow, &why);
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
    fn keep(&mut self, exam: Examination, care: Care) {
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

    pub(super) fn keep_known(&self) {
        if let Err(e) = self.daily.known.save(&self.places) {
            self.say(&e.to_string());
        }
    }

    fn save_baseline(&self) {
        if let Err(e) = patient::set_baseline(&self.places, self.judge.baseline()) {
            self.say(&e.to_string());
        }
    }

    fn damaged(&mut self, kind: IncidentKind, findings: Vec<Finding>) {
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

    /// Decides what of the backups of daily operation is due. Called when the node serves and its disk was looked at: what
    /// was found there says of which classes a copy is worth taking.
    fn backups(&mut self, now: Moment) {
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
    fn state_due(&mut self, now: Moment, state_now: Option<Stamp>) -> bool {
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
    fn state_next(&mut self, now: Moment) {
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
    fn stale(&mut self, now: Moment) {
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

    /// Spawns what is due.
    pub(super) fn due_jobs(&mut self) {
        let now = clock::now();
        self.take_baseline(now);
        self.stale(now);
        if self.daily.delivery.is_none() && self.daily.deliver_at.is_some_and(|at| past(now, at)) {
            self.daily.deliver_at = None;
            let deadline = Deadline::after(self.config.ladder.limits().span(DELIVER_LIMIT));
            match self.runner.spawn("job-deliver", Work::Deliver, &self.node, None, false, deadline) {
                Ok(running) => self.daily.delivery = Some(running),
                Err(e) => {
                    self.say(&e.to_string());
                    self.daily.deliver_at = Some(now.plus_ms(RETRY_MS));
                }
            }
        }
        self.due_beat(now);
        // During a climb the machine belongs to the ladder, and a node on its way home is no picture of anything.
        if self.daily.job.is_some() || self.book.state().climb().is_some() || self.home.busy() {
            return;
        }
        let serving = self.judgement.as_ref().is_some_and(|j| j.verdict.is_serving() && j.confirmed);
        let (job, work, limit) = if let Some((classes, note)) = self.snapshot_due(now, serving) {
            self.daily.snapshot_at = None;
            (Job::Snapshot { classes: classes.clone() }, Work::Snapshot { classes, note }, SNAPSHOT_LIMIT)
        } else if self.daily.settle_at.is_some_and(|at| serving && past(now, at))
            && self.served_for_settling()
        {
            self.daily.settle_at = None;
            (Job::Settle, Work::Settle, SETTLE_LIMIT)
        } else if self.daily.tidy_at.is_some_and(|at| serving && past(now, at)) {
            self.daily.tidy_at = None;
            // What an open incident has put aside is its own; the store must not outgrow its limit meanwhile.
            let store_only = self.book.state().incident.is_some();
            (Job::Tidy, Work::Tidy { store_only }, TIDY_LIMIT)
        } else if self.daily.contacts_at.is_some_and(|at| serving && past(now, at))
            && self.places.key_file.exists()
        {
            self.daily.contacts_at = Some(now.plus_ms(CONTACTS_EVERY_MS));
            if self.config.node_channels == NodeChannels::Never {
                return;
            }
            (Job::Contacts, Work::Contacts, CONTACTS_LIMIT)
        } else if past(now, self.daily.examine_at) && may_look(pressed(), &mut self.daily.pressed_since, now)
        {
            self.daily.examine_at = now.plus_ms(SWEEP_MOST_MS as u64);
            let users = serving && past(now, self.daily.state_at);
            self.daily.state_wanted |= users;
            (Job::Examine, Work::Examine { care: Care::Quick, users }, EXAMINE_LIMIT)
        } else if self.scrub_due(now, serving) {
            (Job::Scrub, Work::Scrub, SCRUB_LIMIT)
        } else if past(now, self.daily.state_at) && !self.daily.state_wanted {
            // A copy is taken after a look that finds the node whole, and by that look: see `backups`.
            self.daily.state_wanted = true;
            self.daily.examine_at = now;
            return;
        } else {
            return;
        };
        let name = match job {
            Job::Examine => "job-examine",
            Job::Snapshot { .. } => "job-snapshot",
            Job::Settle => "job-settle",
            Job::Scrub => "job-scrub",
            Job::Tidy => "job-tidy",
            Job::Contacts => "job-contacts",
        };
        let baseline = self.judge.baseline().clone();
        self.leave_a_hanging_store();
        match self.runner.spawn(name, work, &self.node, Some(&baseline), true, Deadline::after(limit)) {
            Ok(running) => self.daily.job = Some((job, running)),
            Err(e) => self.job_failed(now, &job, &e.to_string()),
        }
    }

    /// Whether a portion of the slow look at every byte is due now, and when the next one is. It waits for a serving node
    /// without an incident, on a machine that nothing presses.
    fn scrub_due(&mut self, now: Moment, serving: bool) -> bool {
        /// However short a round is asked for.
        const LEAST_MS: u64 = 1_000;
        let period_ms = (self.config.store.scrub_every_s.saturating_mul(1000) / SCRUB_PORTIONS).max(LEAST_MS);
        let at = match self.daily.scrub_at {
            _ if self.config.store.scrub_every_s == 0 => return false,
            Some(at) => at,
            None => *self.daily.scrub_at.insert(now.plus_ms(period_ms)),
        };
        if !past(now, at) {
            return false;
        }
        let quiet = serving && self.book.state().incident.is_none() && !pressed();
        self.daily.scrub_at = Some(now.plus_ms(if quiet { period_ms } else { RETRY_MS }));
        quiet
    }

    /// Whether the gateway that serves now has done so for the settling time since the snapshot was taken.
    fn served_for_settling(&self) -> bool {
        self.settling.served_ms() >= self.config.backup.settle_s.saturating_mul(1000)
    }

    /// The snapshot that is due now, with the classes of it that may be taken. One of which nothing may be taken waits.
    fn snapshot_due(&mut self, now: Moment, serving: bool) -> Option<(Vec<Class>, String)> {
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

    /// Whether the last look found nothing wrong, nothing unknown, and no incident is about anything else.
    fn is_whole(&self) -> bool {
        self.book.state().incident.is_none()
            && self.exam.as_ref().is_some_and(|e| e.need == Need::Nothing && e.unknown.is_none())
    }

    /// The classes of which a copy may be taken now. A program that lies there and never ran is not taken where an older
    /// snapshot still holds the one that did; one that is damaged is not, and what is damaged of the user's is not.
    fn takeable(&self, now: Moment) -> Vec<Class> {
        let Some(exam) = &self.exam else {
            return Class::ALL.to_vec();
        };
        let mut classes = Class::ALL.to_vec();
        if exam.snapshot.is_some() && !self.runs_what_lies_there(now) {
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
    fn runs_what_lies_there(&self, now: Moment) -> bool {
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
    fn take_baseline(&mut self, now: Moment) {
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

    fn delivered(&mut self, now: Moment, answer: Option<Answer>) {
        let delivered = |answer| {
            let Answer::Delivered { accepted, waiting, again_ms } = answer else { return None };
            Some((accepted, waiting, again_ms))
        };
        match Answer::wanted(answer, delivered) {
            Ok((accepted, waiting, again_ms)) => {
                self.accepted(&accepted);
                if waiting > 0 {
                    let wait_ms = again_ms.unwrap_or(DELIVER_MOST_MS).min(DELIVER_MOST_MS);
                    self.daily.deliver_at = Some(now.plus_ms(wait_ms.max(1_000)));
                }
            }
            Err(why) => {
                self.say(&format!("delivering messages failed: {why}"));
                self.daily.deliver_at = Some(now.plus_ms(RETRY_MS));
            }
        }
    }

    /// A look at the disk right now, in its own container, for a decision that waits for it.
    pub(super) fn examine_now(&mut self, care: Care) -> Option<Examination> {
        self.examine_within(care, LOOK_LIMIT)
    }

    /// The same with a limit of its own.
    pub(super) fn examine_within(&mut self, care: Care, limit: Duration) -> Option<Examination> {
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
        let looked = self.runner.look(&name, work, &self.node, Some(&baseline), limit);
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

    /// Steps leave a store alone that hung in this climb, and only in this one.
    pub(super) fn leave_a_hanging_store(&mut self) {
        self.runner.without_store = self.store_hangs.is_some() && self.store_hangs == self.climb_key();
    }

    /// The open incident's climb: what hung in one is tried again in the next.
    pub(super) fn climb_key(&self) -> Option<(u64, u32)> {
        // The look that an incident begins with is its first climb's.
        self.book.state().incident.as_ref().map(|incident| (incident.id, incident.climbs.max(1)))
    }

    /// What one act of the agent itself may take now. Inside a climb it ends before the climb does: its last seconds are
    /// for killing what is left and for the message. `least` is what it gets however limits are divided.
    pub(super) fn room(&self, whole: Duration, least: Duration) -> Duration {
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

    /// A notice outside the course of an incident: into the outbox, at most one of a kind per day.
    pub(super) fn notice(&mut self, kind: alert::Notice, why: &str) {
        let day = clock::wall().strftime("%Y-%m-%d").to_string();
        self.notice_of(kind, &format!("{}-{day}", kind.name()), why);
    }

    /// The same about one event, told once however often it is come upon.
    pub(super) fn notice_of(&mut self, kind: alert::Notice, about: &str, why: &str) {
        let mut facts = self.facts(about.to_owned());
        facts.why = why.to_owned();
        let message = alert::Message::new(alert::Kind::Notice(kind), &facts, self.language);
        self.say(&format!("notice: {}", message.title));
        if let Err(e) = self.outbox().and_then(|mut o| o.put(&message)) {
            self.say(&e.to_string());
        }
        self.daily.deliver_soon(clock::now());
    }

    /// The outbox; on a full disk messages wait in the run directory.
    pub(super) fn outbox(&self) -> host::Result<alert::Outbox> {
        alert::Outbox::open_with_spare(&self.places.outbox(), &self.places.outbox_spare())
    }

    pub(super) fn facts(&self, incident: String) -> alert::Facts {
        alert::Facts {
            node: self.node.name.clone(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            incident,
            at: format!("{:.0}", clock::wall()),
            ..alert::Facts::default()
        }
    }
}

pub(super) fn pressed() -> bool {
    let over = |some: Option<f32>| some.is_some_and(|percent| percent > PRESSURE_LIMIT_PERCENT);
    over(some_avg10(Resource::Io)) || over(some_avg10(Resource::Memory))
}

/// Whether a snapshot of these classes (all when none are named) holds the state.
fn with_state(classes: &[Class]) -> bool {
    classes.is_empty() || classes.contains(&Class::State)
}

/// Whether the user's files are others than when state was last taken. Where there are more than were looked at, an
/// unchanged number proves nothing: then a copy is taken all the same, as rarely as the configuration allows.
fn state_changed(seen: Option<(Stamp, Moment)>, stamp: Stamp, now: Moment, most_ms: u64) -> bool {
    seen.is_none_or(|(before, at)| {
        let long_ago = now.since_ms(at).is_none_or(|ms| ms >= most_ms);
        before.hash != stamp.hash || !stamp.whole && long_ago
    })
}

/// Something that changes whenever one of these files does. Times and sizes are enough: this only decides whether a
/// snapshot is worth taking.
fn stamp(paths: &[std::path::PathBuf]) -> u64 {
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
    fn a_look_asked_for_while_another_looks_is_not_put_off() {
        let at = |ms| Moment { boot: 1, ms };
        let mut daily = Daily::new(at(0), &Backup::default(), Known::default());
        // The look begins: the next one is far off until its cost is known.
        daily.examine_at = at(1_000_000);
        daily.examine_by(at(60_000));
        assert_eq!(daily.examine_at, at(60_000));
        // A database goes while the look is under way.
        daily.examine_soon(at(5_000));
        daily.examine_by(at(70_000));
        assert_eq!(daily.examine_at, at(5_000));
    }

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
