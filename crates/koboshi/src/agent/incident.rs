//! An incident's way: the engine says what to do, this does it and writes down what came of it.

mod messages;
mod rungs;
mod turn;

pub(crate) use rungs::keeps_from_starting;
pub(super) use rungs::outside;

use super::book::Written;
use super::daily::ROOM_LIMIT;
use super::{Agent, MANAGER_LIMIT};
use crate::config::Mode;
use crate::room;
use crate::step::{Answer, Work};
use engine::{Action, Event, FaultKind, Finding, How, IncidentKind, Layer, Moment, Record, StepId, Verdict};
use host::clock::{self, Deadline};
use host::container::Ended;
use layers::{Care, Examination, Need};
use node::Judgement;
use std::time::Duration;

/// Actions taken in one turn of the loop before descriptors are looked at again: a mistake must not spin.
const MAX_ACTIONS: usize = 64;
/// While the judge looks, the engine is asked again this often: what a start does changes the budget.
const ASK_AGAIN_MS: u64 = 1_000;
/// A few renames by a process of their own, however limits are divided.
const ACT_LEAST: Duration = Duration::from_secs(3);
/// The container in which sudo is asked.
pub(super) const ASK_SUDO: &str = "ask-sudo";
/// Marks, in the evidence of a finding, what of the user's came back from which snapshot.
const CAME_BACK: &str = "came back from snapshot ";

/// What the loop waits for on the engine's behalf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Doing {
    /// Nothing: ask the engine.
    Nothing,
    /// The held step's end.
    Wait {
        /// Which.
        step: StepId,
        /// Whose.
        layer: Layer,
        /// When it is killed.
        until: Moment,
    },
    /// The judge's word.
    Judge {
        /// When to ask the engine again.
        until: Moment,
    },
    /// Something to happen.
    Idle {
        /// When to ask the engine again.
        until: Option<Moment>,
    },
}

impl Doing {
    /// When the loop must wake for this.
    pub(super) fn until(&self, now: Moment) -> Option<Moment> {
        match self {
            Doing::Nothing => None,
            Doing::Wait { until, .. } => Some(*until),
            Doing::Judge { until } => {
                Some(if until.ms < now.ms + ASK_AGAIN_MS { *until } else { now.plus_ms(ASK_AGAIN_MS) })
            }
            Doing::Idle { until } => *until,
        }
    }

    /// Whether the judge is asked for a word.
    pub(super) fn judging(&self) -> bool {
        match self {
            Doing::Judge { .. } => true,
            Doing::Nothing | Doing::Wait { .. } | Doing::Idle { .. } => false,
        }
    }

    /// For people.
    pub(super) fn words(&self) -> String {
        match self {
            Doing::Nothing => "deciding".to_owned(),
            Doing::Wait { layer, .. } => format!("{layer} at work"),
            Doing::Judge { .. } => "judging".to_owned(),
            Doing::Idle { .. } => "waiting".to_owned(),
        }
    }
}

impl Agent {
    /// What is being done about the open incident, for people.
    pub(super) fn doing_words(&self, now: Moment) -> String {
        let state = self.book.state();
        let hold = state.incident.as_ref().and_then(|incident| match &incident.stage {
            engine::state::Stage::Holding(hold) => Some(hold),
            engine::state::Stage::Fresh | engine::state::Stage::Climbing(_) => None,
        });
        let Some(hold) = hold else {
            let free_in_ms = state.start_free_ms(state.time_ms(now)).saturating_sub(state.time_ms(now));
            if matches!(self.doing, Doing::Idle { .. }) && free_in_ms > 0 {
                let s = free_in_ms.div_ceil(1_000);
                return format!(
                    "ready to start; three starts in 300 s are the most, the next is free in {s} s"
                );
            }
            return self.doing.words();
        };
        let minutes = hold.retry_ms.saturating_sub(state.time_ms(now)).div_ceil(60_000);
        let again = format!("tried again in {minutes} min at the latest");
        match hold.kind {
            engine::state::HoldKind::Emergency => format!("every way of recovery failed; {again}"),
            engine::state::HoldKind::Latent => {
                format!("the node serves, the damage could not be mended; {again}")
            }
            engine::state::HoldKind::Degraded => {
                "it serves, and waits for what it silenced itself".to_owned()
            }
        }
    }

    // ---- opening ----

    /// Opens an incident, unless one is open.
    pub(super) fn open(&mut self, kind: IncidentKind, cause: String, findings: Vec<Finding>) {
        let now = clock::now();
        if self.errand.is_some_and(|errand| !errand.ordered) {
            return;
        }
        if self.book.state().incident.is_none() && self.home_answers_for(&cause) {
            return;
        }
        if self.hands_off().is_some_and(|why| self.book.state().left_alone(&why)) {
            // Told once already; an agent that was started anew does not tell it again.
            return;
        }
        let Some(record) = self.book.state().open(now, kind, cause, findings) else {
            return;
        };
        self.first_good = None;
        // Not even this record could be written else, nor a step be asked to make room.
        let given = room::give_reserve(&self.node, &self.places);
        self.write(record);
        if given {
            self.reserve_given();
        }
        self.doing = Doing::Nothing;
        if self.hands_off().is_none() {
            self.evidence_for_climb(kind);
        } else if self.config.mode == Mode::Watch {
            self.tell_plan();
        }
    }

    fn give_reserve(&mut self) {
        if room::give_reserve(&self.node, &self.places) {
            self.reserve_given();
        }
    }

    fn reserve_given(&mut self) {
        let what = "room was made on a full disk: the reserve was given".to_owned();
        self.noticed(vec![Finding { kind: FaultKind::Notice, class: None, what, evidence: Vec::new() }]);
    }

    /// In watch mode: what would have been done.
    fn tell_plan(&mut self) {
        let latent = self.book.state().incident.as_ref().is_some_and(|i| i.kind == IncidentKind::Latent);
        if let Some(exam) = self.examine_now(if latent { Care::Quick } else { Care::Down }) {
            self.noticed(exam.findings);
        }
        let ladder = self.ladder(clock::now());
        if latent {
            match ladder.applies(Layer::InPlace) {
                Ok(rung) => {
                    self.say(&format!(
                        "  watch: in-place would be tried for up to {} s",
                        ladder.limits.of(rung.work_most_ms) / 1000
                    ));
                }
                Err(reason) => self.say(&format!("  watch: in-place would be passed: {reason}")),
            }
            return;
        }
        for planned in engine::preview(&ladder) {
            let line = match planned.passed {
                Some(reason) => format!("{} would be passed: {reason}", planned.layer),
                None => format!("{} would be tried for up to {} s", planned.layer, planned.work_ms / 1000),
            };
            self.say(&format!("  watch: {line}"));
        }
    }

    /// The look at the disk that the choice of a layer needs. The record of the opening is durable by now.
    fn evidence_for_climb(&mut self, kind: IncidentKind) {
        self.daily.make_way();
        if kind == IncidentKind::Latent {
            return;
        }
        self.see_it_end();
        if let Some(exam) = self.look_for_climb() {
            let update =
                exam.findings.iter().find(|f| f.kind == FaultKind::UpdateAtWork).map(|f| f.what.clone());
            self.noticed(exam.findings);
            if update.is_some() && kind == IncidentKind::Outage && !self.waited_for_update(clock::now()) {
                // Somebody else is repairing or replacing the program: the judge's limits say for how long that is
                // waited for.
                self.updating = update;
                self.update_waited.get_or_insert(clock::now());
            }
        }
    }

    /// The look at the disk that a climb begins with. A full one is given room first: no layer works on it, and no start.
    fn look_for_climb(&mut self) -> Option<Examination> {
        const ROOM_LEAST: Duration = Duration::from_secs(3);
        // A disk may have filled up since the incident began, and not even the look could be asked for.
        self.give_reserve();
        let exam = self.examine_now(Care::Down)?;
        if !exam.findings.iter().any(|f| f.kind == FaultKind::DiskFull) {
            return Some(exam);
        }
        let limit = self.room(ROOM_LIMIT, ROOM_LEAST);
        let incident = self.book.state().incident.as_ref().map(|i| i.id);
        let answer =
            self.runner.run("job-room-now", Work::Room { reserve: true, incident }, &self.node, None, limit);
        let tidied = |a| if let Answer::Tidied { done } = a { Some(done) } else { None };
        let done = match answer.map_err(|e| e.to_string()).and_then(|a| Answer::wanted(Some(a), tidied)) {
            Ok(done) if done.is_empty() => vec!["there was nothing that could go".to_owned()],
            Ok(done) => done,
            Err(why) => vec![format!("it could not be made: {why}")],
        };
        let mut findings = exam.findings.clone();
        findings.push(Finding {
            kind: FaultKind::Notice,
            class: None,
            what: format!("room was made on a full disk: {}", done.join("; ")),
            evidence: Vec::new(),
        });
        self.noticed(findings);
        self.examine_now(Care::Down).or(Some(exam))
    }

    /// Whether the judge's patience with the update at work is over: it knows of it and says all the same that the node
    /// does not serve. Hands that stayed off then would stay off for as long as somebody keeps a file open. A judge that
    /// does not see it at all is believed a little later: its last search may be older than the update.
    pub(super) fn waited_for_update(&self, now: Moment) -> bool {
        /// Twice as long as one search serves.
        const UNSEEN_MS: u64 = 10_000;
        self.judgement.as_ref().is_some_and(|j| {
            let knows = j.findings.iter().any(|f| f.kind == FaultKind::UpdateAtWork);
            let long = self.update_waited.is_some_and(|at| now.since_ms(at).is_none_or(|ms| ms >= UNSEEN_MS));
            matches!(j.verdict, Verdict::NotServing { .. }) && (knows || long)
        })
    }

    pub(super) fn noticed(&mut self, findings: Vec<Finding>) {
        let known = self.book.state().incident.as_ref().map(|i| i.findings.clone()).unwrap_or_default();
        let new: Vec<Finding> = findings.into_iter().filter(|f| !known.contains(f)).collect();
        if !new.is_empty() {
            self.write(Record::new(clock::now(), Event::Noticed { findings: new }));
        }
    }

    /// Opens, or makes an open latent incident one that is climbed.
    pub(super) fn open_or_escalate(&mut self, kind: IncidentKind, cause: String) {
        self.open_or_escalate_with(kind, cause, Vec::new());
    }

    /// The same with findings.
    pub(super) fn open_or_escalate_with(
        &mut self,
        kind: IncidentKind,
        cause: String,
        findings: Vec<Finding>,
    ) {
        if self.book.state().incident.is_none() {
            self.open(kind, cause, findings);
        } else if let Some(record) = self.book.state().escalate(clock::now(), kind, cause, findings) {
            self.write(record);
            self.doing = Doing::Nothing;
            self.evidence_for_climb(kind);
        }
    }

    /// The node fell while only latent damage was being repaired.
    pub(super) fn escalate(&mut self, judgement: &Judgement) {
        if let Verdict::NotServing { why } = &judgement.verdict
            && let Some(record) = self.book.state().escalate(
                clock::now(),
                IncidentKind::Outage,
                why.clone(),
                judgement.findings.clone(),
            )
        {
            self.write(record);
            self.doing = Doing::Nothing;
            self.evidence_for_climb(IncidentKind::Outage);
        }
    }

    // ---- the judge's word ----

    /// Writes the judge's word when it says more than the last one written.
    pub(super) fn record_word(&mut self, judgement: &Judgement) {
        let Some(incident) = &self.book.state().incident else {
            return;
        };
        let confirmed = match &judgement.verdict {
            Verdict::Serving { .. } => judgement.confirmed,
            Verdict::NotServing { .. } => true,
            Verdict::Inconclusive { .. } => false,
        };
        let clean = match incident.kind {
            IncidentKind::Outage => true,
            IncidentKind::Damage | IncidentKind::Latent => {
                // What was not compared, because an update is at work, is not known to be whole.
                self.exam.as_ref().is_some_and(|e| e.need == Need::Nothing && e.unknown.is_none())
            }
        };
        let now = clock::now();
        let verdict = &for_the_record(&judgement.verdict);
        let before = incident.word.as_ref();
        let same_kind = before.is_some_and(|word| {
            std::mem::discriminant(&word.verdict) == std::mem::discriminant(verdict)
                && word.confirmed == confirmed
                && word.clean == clean
        });
        // A node that stays down says so in ever new words ("for 12 s", "for 14 s"); only the first is news.
        let down_still = same_kind && matches!(verdict, Verdict::NotServing { .. });
        let news = if confirmed {
            !down_still && self.book.state().wants_word(now, verdict, confirmed, clean)
        } else {
            !same_kind && (self.doing.judging() || before.is_none())
        };
        if news {
            let verdict = verdict.clone();
            self.write(Record::new(now, Event::Judged { verdict, confirmed, clean }));
            self.doing = Doing::Nothing;
        }
    }

    // ---- doing what the engine says ----

    /// Asks and acts until there is something to wait for.
    pub(super) fn drive(&mut self) {
        for _ in 0..MAX_ACTIONS {
            let now = clock::now();
            if self.waits(now) {
                return;
            }
            self.book.tidy(now);
            let ladder = self.ladder(now);
            let action = engine::next(self.book.state(), &ladder, now);
            if !self.act(action) {
                return;
            }
        }
    }

    /// Whether there is still something to wait for; writes what a wait came to.
    fn waits(&mut self, now: Moment) -> bool {
        match self.doing.clone() {
            Doing::Nothing => false,
            Doing::Wait { step, until, .. } => {
                let how = match self.step.as_mut().map(|running| running.step.look()) {
                    Some(Some(Ended::Exited(code))) => How::Exited { code },
                    Some(Some(Ended::Signaled(signal))) => How::Signaled { signal },
                    Some(Some(Ended::TimedOut)) => How::TimedOut,
                    Some(Some(Ended::Unknown)) | None => How::Vanished,
                    Some(None) if now.ms >= until.ms => How::TimedOut,
                    // Paused while it works: the engine ends it.
                    Some(None) if self.hands_off().is_some() => How::Stopped,
                    Some(None) => return true,
                };
                self.write(Record::new(now, Event::Ended { step, how }));
                self.doing = Doing::Nothing;
                false
            }
            // Every turn of the loop is a reason to ask again: a look came in, or a second has passed.
            Doing::Judge { .. } => {
                self.doing = Doing::Nothing;
                false
            }
            Doing::Idle { until } => {
                let over = until.is_some_and(|until| now.ms >= until.ms);
                let changed = self.book.state().incident.is_some();
                if over || changed {
                    self.doing = Doing::Nothing;
                    return false;
                }
                true
            }
        }
    }

    /// Does one action. `false` when the loop has to wait now.
    fn act(&mut self, action: Action) -> bool {
        match action {
            Action::Note { record } if self.is_no_errand(&record.event) => false,
            Action::Note { record }
                if matches!(record.event, Event::Emergency { .. } | Event::LeftAlone { .. })
                    && self.ends_a_trial() =>
            {
                true
            }
            Action::Note { record } => self.note(record),
            Action::Spawn { intent, step, layer, attempt, wider, deadline } => {
                let _ = attempt;
                if self.write(intent) {
                    self.spawn(step, layer, wider, deadline);
                }
                true
            }
            Action::Wait { step, layer, until } => {
                self.doing = Doing::Wait { step, layer, until };
                false
            }
            Action::Kill { step, layer } => {
                self.kill(step, layer);
                true
            }
            Action::Start { intent, start, .. } => {
                if self.write(intent) {
                    let at = clock::now();
                    let mut asked = self.service.manager().start(Deadline::after(MANAGER_LIMIT));
                    if asked.is_err() && self.service.look(Deadline::after(MANAGER_LIMIT)).held {
                        // A hold that could not be taken back before, or is somebody's whose container would not die.
                        self.release_now();
                        asked = self.service.manager().start(Deadline::after(MANAGER_LIMIT));
                    }
                    let error = asked.err();
                    self.started(at);
                    let error = error.map(|e| format!("{}: {}", e.what, e.why));
                    self.write(Record::new(clock::now(), Event::Started { start, error }));
                }
                true
            }
            Action::Judge { until, .. } => {
                self.doing = Doing::Judge { until };
                false
            }
            Action::Alert { intent, key } => {
                if self.write(intent) {
                    self.alert(key);
                }
                true
            }
            Action::Idle { until } => {
                self.doing = Doing::Idle { until };
                false
            }
        }
    }

    /// The climb has failed, or ends in its middle because hands are to be kept off: before that is written, a config that was
    /// replaced on suspicion alone goes back. Once per climb; the engine is then asked again, with what lies on the disk now.
    fn ends_a_trial(&mut self) -> bool {
        /// One file is moved.
        const LIMIT: std::time::Duration = std::time::Duration::from_secs(10);
        let Some((id, climbs)) = self.book.state().incident.as_ref().map(|i| (i.id, i.climbs)) else {
            return false;
        };
        let on = layers::trial::on(&self.places.quarantine().join(format!("{id:08}")));
        if !on || self.trial_ended == Some((id, climbs)) {
            return false;
        }
        self.trial_ended = Some((id, climbs));
        let limit = self.room(LIMIT, ACT_LEAST);
        let answer = self.runner.run("job-trial", Work::TrialOver { incident: id }, &self.node, None, limit);
        let report = answer.map_err(|e| e.to_string()).and_then(|a| Answer::wanted(Some(a), Answer::report));
        let what = match report {
            Ok(report) => format!("what was on trial did not help: {}", report.done.join("; ")),
            Err(why) => format!("what was on trial did not help, and the trial could not be ended: {why}"),
        };
        let finding = Finding {
            kind: FaultKind::Notice,
            class: Some(engine::Class::Config),
            what,
            evidence: Vec::new(),
        };
        self.noticed(vec![finding]);
        let _ = self.examine_now(Care::Down);
        true
    }

    /// An agent that was begun for one layer begins no other climb: before the order it waits, after it it ends.
    fn is_no_errand(&mut self, event: &Event) -> bool {
        let Some(errand) = self.errand else { return false };
        let other = matches!(event, Event::ClimbBegan { only: None, .. });
        self.ending |= other && errand.ordered;
        other
    }

    fn note(&mut self, record: Record) -> bool {
        if let Event::Failed { layer, .. } = &record.event {
            self.why_it_failed(*layer);
            self.take_back(*layer);
            if *layer == Layer::PeerCopy {
                self.take_peer_copy_back();
            }
        }
        let begins = matches!(&record.event, Event::ClimbBegan { .. });
        let written = self.write(record);
        if begins && written {
            self.ask_sudo();
        }
        // A climb that begins later than its incident, perhaps under a new agent, chooses by what the disk says now.
        // What hung in the last climb is looked at anew; in the first, the look that it was opened with is its own.
        let hung = self.exam.as_ref().is_some_and(|e| e.store_hangs) && self.store_hangs != self.climb_key();
        if begins && written && (hung || self.fresh_exam().is_none()) {
            let latent = self.book.state().incident.as_ref().is_some_and(|i| i.kind == IncidentKind::Latent);
            let looked = if latent { self.examine_now(Care::Quick) } else { self.look_for_climb() };
            if let Some(exam) = looked {
                self.noticed(exam.findings);
            }
        }
        written
    }

    /// Checks, writes, tells. `false` when the record may not follow or could not be written: ask again.
    pub(super) fn write(&mut self, record: Record) -> bool {
        // Before anything is begun, by us or by anybody of whom we know: the gateway's port is free.
        if super::responder::gives_way_to(&record.event) {
            self.end_responder();
        }
        let line = engine::summary::line(&record.event);
        let asked = matches!(record.event, Event::ClimbBegan { only: Some(_), .. });
        let before = self.book.state().closed.as_ref().map(|c| c.id);
        match self.book.write(record) {
            Written::Yes => {
                match (line, self.number()) {
                    (Some(line), Some(id)) => self.say(&format!("incident {id}: {line}")),
                    (Some(line), None) => self.say(&line),
                    (None, _) => {}
                }
                let closed = self.book.state().closed.as_ref().map(|c| c.id);
                if asked || closed != before {
                    self.only = None;
                }
                if closed != before
                    && let Some(id) = closed
                {
                    self.closed(id);
                }
                true
            }
            Written::Refused => false,
            Written::JournalLost => {
                self.say("the journal cannot be written; going on in memory for this boot");
                false
            }
        }
    }

    /// The open incident's number; right after its closing record that of the one just closed.
    fn number(&self) -> Option<u64> {
        let state = self.book.state();
        let closing = state.closed.as_ref().filter(|c| state.last == Some(c.closed)).map(|c| c.id);
        state.incident.as_ref().map(|i| i.id).or(closing)
    }

    fn closed(&mut self, id: u64) {
        if let Err(e) = self.book.archive(id, self.first_good) {
            self.say(&e.to_string());
        }
        let now = clock::now();
        self.daily.examine_soon(now);
        self.daily.tidy_all(now);
        let by = self.book.state().closed.as_ref().and_then(|c| c.layer);
        if matches!(by, Some(Layer::SystemInstall | Layer::UserInstall)) {
            // What was put in place is proven by its tarballs, not yet by having served.
            self.daily.snapshot_by_hand(now, "after an install");
        }
    }
}

/// The verdict as an incident hears it. Only what the gateway's crash-loop breaker silenced keeps an incident open; a
/// channel that is down for its own reasons is the channel's business, shown by `status`.
fn for_the_record(verdict: &Verdict) -> Verdict {
    match verdict {
        Verdict::Serving { degraded } => Verdict::Serving {
            degraded: degraded.iter().filter(|d| d.contains("crash-loop breaker")).cloned().collect(),
        },
        Verdict::NotServing { .. } | Verdict::Inconclusive { .. } => verdict.clone(),
    }
}
