//! Daily operation: looks at the disk, snapshots, settling, tidying, delivering. One background job at a time, all of
//! them contained, all of them ended when an incident needs the machine.

mod backups;
mod looks;

pub(super) use looks::{LOOK_LIMIT, pressed};

use backups::{stale_every_ms, with_state};
use looks::{SWEEP_MOST_MS, may_look};

use super::runner::Running;
use super::{Agent, notices, runner};
use crate::agent::copies::Known;
use crate::config::{Backup, NodeChannels};
use crate::patient;
use crate::step::{Answer, SCRUB_PORTIONS, Work};
use engine::{Class, FaultKind, Finding, IncidentKind, Moment};
use host::clock::{self, Deadline};
use host::files;
use host::pressure::{Resource, some_avg10};
use layers::{Care, Examination, Need};
use node::Baseline;
use node::users::Stamp;
use std::os::fd::BorrowedFd;
use std::time::{Duration, SystemTime};

/// And not before a new agent has had the time for its first look.
const STALE_FIRST_MS: u64 = 60_000;
/// A refused candidate's wait doubles this often at most: over eight hours.
const MOST_DOUBLINGS: u32 = 9;
/// After a failed job.
const RETRY_MS: u64 = 60_000;
/// After the node's chat accounts could not be read: the key comes with the first snapshot.
const CONTACTS_RETRY_MS: u64 = 600_000;
/// Messages that no channel took are tried again at the latest after this.
const DELIVER_MOST_MS: u64 = 900_000;

/// Limits of the jobs.
const EXAMINE_LIMIT: Duration = Duration::from_secs(120);
const SNAPSHOT_LIMIT: Duration = Duration::from_secs(900);
const SETTLE_LIMIT: Duration = Duration::from_secs(120);
const SCRUB_LIMIT: Duration = Duration::from_secs(120);
const TIDY_LIMIT: Duration = Duration::from_secs(900);
/// Removing a spare of 38,000 files takes seconds on a slow disk.
pub(super) const ROOM_LIMIT: Duration = Duration::from_secs(20);
/// What gave its room has none to give a minute later.
const ROOM_AGAIN_MS: u64 = 900_000;
/// Between two whole tidies where nothing asks for one: what the quarantine may keep is counted in days.
const TIDY_ALL_EVERY_MS: u64 = 12 * 3_600_000;
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
    Room,
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
    /// From then on a tidy looks at program, spare and quarantine too, and not only at the store. A copy of the user's files
    /// alone changes nothing there, and each of them is walked through.
    tidy_all_at: Moment,
    /// The copy that is to settle holds the program too.
    settles_program: bool,
    /// The disk is full under a node that serves.
    room_at: Option<Moment>,
    /// Until then what could be had of it was had.
    room_again: Option<Moment>,
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
            tidy_all_at: now,
            settles_program: true,
            room_at: None,
            room_again: None,
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

    /// The owner's copy is taken, proven and trusted already; one of ours beside it might be of what has changed since.
    pub(super) fn accept(&mut self, now: Moment) {
        self.baseline_at = Some(now);
        self.accepted = true;
        self.snapshot_at = None;
        self.settle_at = Some(now);
        self.settled = false;
        self.trouble = None;
    }

    pub(super) fn snapshot_by_hand(&mut self, now: Moment, note: &str) {
        self.snapshot_at = Some((now, Vec::new(), note.to_owned()));
        self.by_hand = true;
        self.settled = false;
    }

    pub(super) fn tidy_soon(&mut self, now: Moment) {
        self.tidy_at = Some(now);
        self.tidy_all_at = now;
    }

    /// Whenever the next tidy comes, it is a whole one.
    pub(super) fn tidy_all(&mut self, now: Moment) {
        self.tidy_all_at = now;
    }

    pub(super) fn due(&self) -> Option<Moment> {
        let mut due = Vec::new();
        if self.job.is_none() {
            due.push(self.examine_at);
            due.extend(self.snapshot_at.as_ref().map(|(at, _, _)| *at));
            due.extend(self.settle_at);
            due.extend(self.tidy_at);
            due.extend(self.room_at);
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
                Job::Tidy => self.tidy_soon(now.plus_ms(RETRY_MS)),
                // A climb makes room by itself.
                Job::Room => {}
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
                let program = |classes: &[Class]| classes.is_empty() || classes.iter().any(|c| c.converges());
                self.daily.settles_program |= matches!(job, Job::Snapshot { classes } if program(classes));
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
                if std::mem::take(&mut self.daily.settles_program) {
                    self.daily.tidy_all(now);
                }
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
                    self.daily.tidy_soon(now);
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
            Job::Room => "making room on a full disk",
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
        let (job, work, limit) = if self.daily.room_at.is_some_and(|at| past(now, at)) {
            self.daily.room_at = None;
            self.daily.room_again = Some(now.plus_ms(ROOM_AGAIN_MS));
            let incident = self.book.state().incident.as_ref().map(|i| i.id);
            (Job::Room, Work::Room { reserve: false, incident }, ROOM_LIMIT)
        } else if let Some((classes, note)) = self.snapshot_due(now, serving) {
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
            let store_only = self.book.state().incident.is_some() || !past(now, self.daily.tidy_all_at);
            if !store_only {
                self.daily.tidy_all_at = now.plus_ms(TIDY_ALL_EVERY_MS);
            }
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
            Job::Room => "job-room",
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
