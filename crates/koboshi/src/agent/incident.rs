//! An incident's way: the engine says what to do, this does it and writes down what came of it.

use super::book::Written;
use super::daily::{LOOK_LIMIT, ROOM_LIMIT};
use super::{Agent, MANAGER_LIMIT};
use crate::config::Mode;
use crate::patient::{self, Service};
use crate::reinstall::{self, Seen};
use crate::room;
use crate::step::{Answer, Work};
use crate::sudo;
use engine::{
    Action, AlertKey, AlertKind, AlertResult, Claim, Event, FaultKind, Finding, How, IncidentKind, Ladder,
    Layer, Moment, Outcome, Record, Rung, StartLook, StepId, Verdict,
};
use host::clock::{self, Deadline};
use host::container::Ended;
use layers::install::{Moved, Pending};
use layers::{Care, Examination, Need};
use node::{Judgement, gates};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

/// Actions taken in one turn of the loop before descriptors are looked at again: a mistake must not spin.
const MAX_ACTIONS: usize = 64;
/// While the judge looks, the engine is asked again this often: what a start does changes the budget.
const ASK_AGAIN_MS: u64 = 1_000;
/// Stopping the gateway and one exchange.
const PEER_BACK_LIMIT: std::time::Duration = std::time::Duration::from_secs(20);
/// A few renames by a process of their own, however limits are divided.
const ACT_LEAST: std::time::Duration = std::time::Duration::from_secs(3);
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
        let by = self.book.state().closed.as_ref().and_then(|c| c.layer);
        if matches!(by, Some(Layer::SystemInstall | Layer::UserInstall)) {
            // What was put in place is proven by its tarballs, not yet by having served.
            self.daily.snapshot_by_hand(now, "after an install");
        }
    }

    fn spawn(&mut self, step: StepId, layer: Layer, wider: bool, deadline: Moment) {
        let incident = self.book.state().incident.clone();
        let (id, findings) = incident.map_or((0, Vec::new()), |i| (i.id, i.findings));
        let findings = self.current_findings(findings);
        let hung = self.hung();
        let work = match layer {
            Layer::Restart => Work::Restart { hung },
            Layer::Restore => Work::Restore { findings, hung, wider, incident: id },
            Layer::InPlace => Work::InPlace { findings, incident: id },
            Layer::SystemInstall => Work::SystemInstall {
                version: self.version_to_install().unwrap_or_default(),
                hung,
                incident: id,
            },
            Layer::UserInstall => Work::UserInstall {
                version: self.version_to_install().unwrap_or_default(),
                hung,
                incident: id,
            },
            Layer::PeerCopy => Work::PeerCopy { hung, incident: id },
            Layer::Emergency => {
                let why = format!("{layer} has no work in this version");
                self.write(Record::new(clock::now(), Event::Ended { step, how: How::SpawnFailed { why } }));
                return;
            }
        };
        let baseline = self.judge.baseline().clone();
        let name = format!("step-{step}");
        match self.runner.spawn(&name, work, &self.node, Some(&baseline), false, Deadline::at(deadline)) {
            Ok(running) => self.step = Some(running),
            Err(e) => {
                let how = How::SpawnFailed { why: e.to_string() };
                self.write(Record::new(clock::now(), Event::Ended { step, how }));
            }
        }
    }

    /// What is on the disk now decides the scope; what the incident began with only where nothing newer is known.
    fn current_findings(&self, noticed: Vec<Finding>) -> Vec<Finding> {
        self.exam.as_ref().map_or(noticed, |exam| exam.findings.clone())
    }

    fn kill(&mut self, step: StepId, layer: Layer) {
        let name = format!("step-{step}");
        let held = self.step.take().filter(|running| running.name == name);
        let mut said = None;
        let killed = match held {
            Some(mut running) => {
                let killed = running.kill();
                if killed.is_ok() {
                    said = self.tell_report(layer, running.answer());
                }
                killed
            }
            // A step of an agent that died: known by its name.
            None => self.runner.containers.kill(&name, Deadline::after(self.runner.kill_limit)),
        };
        let event = match killed {
            Ok(emptied) => {
                Event::Emptied { step, killed: emptied.killed, claim: self.claim(layer, said.as_deref()) }
            }
            Err(e) => Event::KillFailed { step, why: e.to_string() },
        };
        self.looks_from = clock::now();
        self.next_look = self.looks_from;
        self.write(Record::new(clock::now(), event));
        if holds(layer) {
            // The repair is over, and with it its hold; the start comes next.
            self.release();
        }
    }

    /// Tells what a step said, and returns its own reason if it failed: for the record, not for any decision.
    fn tell_report(&mut self, layer: Layer, answer: Option<Answer>) -> Option<String> {
        match Answer::wanted(Some(answer?), Answer::report) {
            Ok(report) => {
                let back = report.came_back.iter().map(|back| Finding {
                    kind: FaultKind::Notice,
                    class: Some(back.class),
                    what: back.what.clone(),
                    evidence: vec![format!("{CAME_BACK}{}", back.snapshot)],
                });
                self.noticed(back.collect());
                for line in report.done.iter().chain(&report.undone) {
                    self.say(&format!("  {layer}: {line}"));
                }
                report.undone.last().cloned()
            }
            Err(why) => {
                self.say(&format!("  {layer}: {why}"));
                Some(why)
            }
        }
    }

    /// What the disk says after a step, whatever the step said.
    fn claim(&mut self, layer: Layer, said: Option<&str>) -> Claim {
        let nothing = |why: String| Claim::Nothing {
            why: match &said {
                Some(said) => format!("{why} (the step said: {said})"),
                None => why,
            },
        };
        if matches!(layer, Layer::SystemInstall | Layer::UserInstall) {
            self.follow_move();
        }
        if layer != Layer::InPlace {
            self.follow_gateway();
            if let Some(still) = self.node.gateway() {
                return nothing(format!("the old gateway (process {}) is still there", still.pid));
            }
        }
        let care = if layer == Layer::InPlace { Care::Quick } else { Care::Down };
        let looked = if layer == Layer::Restart { self.fresh_exam() } else { None };
        let Some(exam) = looked.or_else(|| self.examine_within(care, claim_limit(layer))) else {
            return nothing("the disk could not be looked at in time".to_owned());
        };
        self.noticed(exam.findings.clone());
        match disk_allows_a_start(layer, &exam) {
            Ok(()) => Claim::Ready { inputs: exam.inputs },
            Err(still) => nothing(still),
        }
    }

    /// The look that the climb began with: layer 0 touches nothing on disk, so a moment later it still holds.
    fn fresh_exam(&self) -> Option<Examination> {
        /// Stopping takes seconds; a look older than this is taken again.
        const FRESH_MS: u64 = 20_000;
        let (at, care) = self.exam_taken?;
        let fresh = clock::now().since_ms(at).is_some_and(|ms| ms < FRESH_MS);
        self.exam.clone().filter(|_| fresh && care == Care::Down)
    }

    /// A program from a peer that was never proven here does not stay when the node does not serve with it.
    fn take_peer_copy_back(&mut self) {
        if !layers::peer_copy::is_open(&self.node) {
            return;
        }
        let incident = self.number().unwrap_or(0);
        let baseline = self.judge.baseline().clone();
        let work = Work::PeerBack { incident };
        let limit = self.room(PEER_BACK_LIMIT, ACT_LEAST);
        match self.runner.run("peer-back", work, &self.node, Some(&baseline), limit) {
            Ok(answer) => {
                self.tell_report(Layer::PeerCopy, Some(answer));
            }
            // The next turn of the layer begins by taking it back.
            Err(e) => self.say(&e.to_string()),
        }
        // Its container is empty, and its hold ends with it.
        self.release();
    }

    /// A start that failed is a reason to look again, at every byte: what it said and what a stat sweep cannot see.
    fn why_it_failed(&mut self, layer: Layer) {
        let started = self.book.state().climb().and_then(|c| c.turn.as_ref()).is_some_and(|t| t.starts > 0);
        if layer == Layer::InPlace || !started {
            return;
        }
        if let Some(exam) = self.examine_now(Care::Thorough) {
            self.noticed(exam.findings);
        }
    }

    /// The last good version, for layers that make the program anew.
    pub(super) fn version_to_install(&self) -> Option<String> {
        let snapshot = self.exam.as_ref().and_then(|e| e.version.as_deref());
        reinstall::version(&self.node, Some(self.judge.baseline()), snapshot)
    }

    /// Whether sudo would have root install, asked once for each climb by each agent, in a container: it may hang.
    pub(super) fn ask_sudo(&mut self) {
        if !sudo::needed(&self.node, &self.places) {
            return;
        }
        // Its own patience ends first.
        let limit = sudo::ask_limit(self.config.ladder.limits()) + Duration::from_secs(1);
        self.sudo = Some(match self.runner.run(ASK_SUDO, Work::AskSudo, &self.node, None, limit) {
            Ok(Answer::Failed { why, .. }) => Err(why),
            Ok(_) => Ok(()),
            Err(e) => Err(e.why),
        });
    }

    /// The node may run from elsewhere now, or from home again.
    pub(super) fn follow_move(&mut self) {
        let now = match Moved::load(&self.places.state_dir) {
            Ok(Some(moved)) => moved.away,
            Ok(None) => return,
            Err(e) => return self.say(&e.to_string()),
        };
        if now == self.node {
            return;
        }
        let service = match Service::of(&now, &self.config, &self.runner.containers, &self.places) {
            Ok(service) => service,
            Err(e) => return self.say(&e.to_string()),
        };
        self.say(&format!("the node is now {}", now.package_dir.display()));
        self.node = now;
        self.service = service;
        if let Err(e) = patient::remember(&self.places, &self.node) {
            self.say(&e.to_string());
        }
        self.watch_files();
    }

    /// What an install put in place and the judge did not accept goes back before the next layer has its turn.
    fn take_back(&mut self, layer: Layer) {
        /// Renames; file by file it takes longer.
        const LIMIT: Duration = Duration::from_secs(20);
        if !matches!(layer, Layer::SystemInstall | Layer::UserInstall | Layer::PeerCopy)
            || !matches!(Pending::load(&self.places.state_dir), Ok(Some(pending)) if pending.back)
        {
            return;
        }
        let baseline = self.judge.baseline().clone();
        let limit = self.room(LIMIT, ACT_LEAST);
        match self.runner.run("take-back", Work::TakeBack, &self.node, Some(&baseline), limit) {
            Ok(answer) => {
                self.tell_report(layer, Some(answer));
            }
            Err(e) => self.say(&e.to_string()),
        }
        self.follow_move();
        if let Some(exam) = self.examine_now(Care::Down) {
            self.noticed(exam.findings);
        }
    }

    // ---- messages ----

    fn alert(&mut self, key: AlertKey) {
        let message = self.message(key);
        let result = match self.outbox().and_then(|mut outbox| outbox.put(&message)) {
            // Kept in memory only means kept nowhere: this outbox is gone in a moment.
            Ok(alert::Put::Queued { kept: alert::outbox::Kept::InMemory(e), .. }) | Err(e) => {
                AlertResult::Refused { why: e.to_string() }
            }
            Ok(alert::Put::Queued { .. } | alert::Put::Duplicate) => AlertResult::Queued,
        };
        self.write(Record::new(clock::now(), Event::AlertDone { key, result }));
        self.daily.deliver_soon(clock::now());
    }

    fn message(&self, key: AlertKey) -> alert::Message {
        let state = self.book.state();
        let mut facts = self.facts(format!("incident-{}", key.incident));
        if let Some(incident) = state.incident.as_ref().filter(|i| i.id == key.incident) {
            facts.why.clone_from(&incident.cause);
            facts.serves = incident.kind != IncidentKind::Outage;
            facts.details = incident.findings.iter().map(|f| f.what.clone()).collect();
        }
        if let Some(closed) = state.closed.as_ref().filter(|c| c.id == key.incident) {
            facts.why.clone_from(&closed.why);
            facts.layer = closed.layer;
            facts.serves = closed.uninterrupted;
            // As `incidents show` counts it: to the first good look; what never stopped serving was never down.
            let to_first_good = self.first_good.and_then(|at| at.since_ms(closed.opened));
            facts.down_ms = match closed.uninterrupted {
                true => 0.0,
                false => to_first_good.map_or(closed.took_ms, |ms| ms.min(closed.took_ms)) as f64,
            };
            facts.details = came_back(self.book.told());
            if let Ok(Some(moved)) = Moved::load(&self.places.state_dir)
                && moved.displaced()
            {
                facts.details.push(format!(
                    "it is displaced: it runs from {} until its home {} can be mended",
                    moved.away.prefix.display(),
                    moved.home.prefix.display()
                ));
            }
            let quarantine = self.places.quarantine().join(format!("{:08}", closed.id));
            if quarantine.is_dir() {
                facts.replaced = Some(quarantine.display().to_string());
            }
        }
        let kind = match key.kind {
            AlertKind::Opening => alert::Kind::Opening,
            AlertKind::Emergency => alert::Kind::Emergency,
            AlertKind::InPlaceFailed => alert::Kind::Notice(alert::Notice::NotMended),
            AlertKind::Journal => alert::Kind::Notice(alert::Notice::JournalUnwritable),
            AlertKind::Closing => match state.closed.as_ref().map(|c| c.outcome) {
                Some(Outcome::LeftAlone) => alert::Kind::Notice(alert::Notice::LeftAlone),
                Some(Outcome::Recovered | Outcome::Emergency | Outcome::Failed) | None => {
                    alert::Kind::Closing
                }
            },
        };
        alert::Message::new(kind, &facts, self.language)
    }

    /// Channels took these messages.
    pub(super) fn accepted(&mut self, keys: &[String]) {
        let waiting: Vec<AlertKey> = self
            .book
            .state()
            .alerts
            .iter()
            .filter(|a| a.fate == engine::state::Fate::Queued)
            .map(|a| a.key)
            .collect();
        for key in waiting {
            if keys.contains(&self.message(key).key) {
                self.write(Record::new(
                    clock::now(),
                    Event::AlertDone { key, result: AlertResult::Accepted },
                ));
            }
        }
    }

    // ---- the world, as the engine is told of it ----

    fn ladder(&mut self, now: Moment) -> Ladder {
        let exam = self.exam.clone();
        let rungs = rungs(exam.as_ref(), self.book.state().incident.as_ref().map(|i| i.kind), self);
        let inconclusive =
            self.judgement.as_ref().is_some_and(|j| matches!(j.verdict, Verdict::Inconclusive { .. }));
        let alive = self.gateway.as_ref().is_some_and(|fd| !fd.exited());
        let mut ladder = Ladder::new(rungs);
        ladder.holding = self.held();
        ladder.start = StartLook {
            alive,
            progressing: alive && (inconclusive || self.judgement.is_none()),
            intact: exam.as_ref().is_some_and(|e| e.need == Need::Nothing),
        };
        ladder.hands_off = self.hands_off();
        ladder.only = self.only;
        ladder.journal_ok = self.book.journal_ok();
        ladder.evidence = evidence(exam.as_ref(), self.nudges, self.sources.back());
        ladder.jitter_permille = i32::try_from(now.ms % 2_001).unwrap_or(0) - 1_000;
        ladder.limits = self.config.ladder.limits();
        ladder
    }

    /// Whether the layer would have its turn in an incident of this kind, by the look just taken.
    pub(super) fn would_apply(&self, layer: Layer, kind: IncidentKind) -> Result<(), String> {
        let rungs = rungs(self.exam.as_ref(), Some(kind), self);
        rungs
            .into_iter()
            .find(|rung| rung.layer == layer)
            .map_or_else(|| Err("there is no such layer".to_owned()), |rung| rung.applies)
    }

    fn held(&self) -> Option<StepId> {
        self.step.as_ref()?.name.strip_prefix("step-")?.parse().ok()
    }

    fn hung(&self) -> bool {
        self.gateway.is_some()
            && self.judgement.as_ref().is_some_and(|j| matches!(j.verdict, Verdict::NotServing { .. }))
    }

    /// Whether there is room to repair without deleting anything first.
    pub(super) fn space_gate(&self) -> Result<(), String> {
        match gates::space(&self.places.state_dir, 0) {
            gates::Gate::Open => Ok(()),
            gates::Gate::Closed(why) => Err(why),
        }
    }
}

/// Whether this layer's step keeps the unit down while it works: then its end takes the hold back, whatever end it was.
fn holds(layer: Layer) -> bool {
    match layer {
        Layer::Restore | Layer::SystemInstall | Layer::UserInstall | Layer::PeerCopy => true,
        // The first two only stop or touch nothing that runs; emergency has no step.
        Layer::Restart | Layer::InPlace | Layer::Emergency => false,
    }
}

/// How long the look after a layer may take. A tree that was put in place as a whole is one that no index vouches for
/// yet: 38,000 files are read, which takes seconds, and on a starved machine longer than any other look. It ends within
/// what the turn keeps for its start.
fn claim_limit(layer: Layer) -> Duration {
    match layer {
        Layer::SystemInstall | Layer::UserInstall | Layer::PeerCopy => Duration::from_secs(40),
        Layer::Restart | Layer::Restore | Layer::InPlace | Layer::Emergency => LOOK_LIMIT,
    }
}

/// What of the user's came back from a snapshot in the incident that these records tell, and what it lacks.
fn came_back(told: &[Record]) -> Vec<String> {
    let mut lines: Vec<String> = told
        .iter()
        .filter_map(
            |record| if let Event::Noticed { findings } = &record.event { Some(findings) } else { None },
        )
        .flatten()
        .filter(|f| f.evidence.iter().any(|e| e.starts_with(CAME_BACK)))
        .map(|f| f.what.clone())
        .collect();
    lines.dedup();
    lines
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

/// Hash of what outside could make a failed climb succeed.
fn evidence(exam: Option<&Examination>, nudges: u32, back: [u32; 3]) -> u64 {
    let mut hash = DefaultHasher::new();
    (nudges, back).hash(&mut hash);
    exam.map(|e| (e.inputs, e.snapshot.clone(), e.need)).hash(&mut hash);
    for finding in exam.map(|e| e.findings.as_slice()).unwrap_or_default() {
        (finding.kind, finding.class).hash(&mut hash);
    }
    hash.finish()
}

/// Which layers apply now, and on what.
fn rungs(exam: Option<&Examination>, incident: Option<IncidentKind>, agent: &Agent) -> Vec<Rung> {
    let inputs = |layer: Layer| {
        let mut hash = DefaultHasher::new();
        (layer, exam.map(|e| (e.inputs, e.snapshot.clone())), agent.sources.back_for(layer)).hash(&mut hash);
        hash.finish()
    };
    let snapshot = match exam {
        None => Err("the disk could not be looked at".to_owned()),
        Some(e) if e.store_hangs && !e.rescue => Err("the store does not answer".to_owned()),
        Some(e) if e.snapshot.is_none() && !e.rescue => Err("there is no good snapshot yet".to_owned()),
        Some(_) => agent.space_gate(),
    };
    let dirty = exam.and_then(|e| e.findings.iter().find(|f| keeps_from_starting(f)).map(|f| f.what.clone()));
    let restart = match (exam, dirty) {
        (_, Some(what)) => Err(format!("disk, config and state are not clean: {what}")),
        (None, None) => Err("the disk could not be looked at".to_owned()),
        (Some(_), None) => Ok(()),
    };
    let in_place = match (incident, exam.map(|e| e.need)) {
        (Some(IncidentKind::Latent), Some(Need::InPlace)) => snapshot.clone(),
        (Some(IncidentKind::Latent), _) => Err("nothing is left to be repaired in place".to_owned()),
        (_, _) => Err("the node does not serve".to_owned()),
    };
    let peer_copy = match exam.and_then(|e| e.findings.iter().find(|f| outside(f))) {
        Some(finding) => Err(finding.what.clone()),
        None if agent.config.peer.is_empty() => {
            Err("no peer is configured (koboshi fleet enroll HOST)".to_owned())
        }
        None => agent.space_gate(),
    };
    let peer_inputs = inputs(Layer::PeerCopy) ^ layers::peer_copy::inputs(&agent.config.peer);
    // With nothing to be seen on disk it comes after layer 0, and then reads every byte.
    let restore = match exam.and_then(|e| e.findings.iter().find(|f| outside(f))) {
        Some(finding) => Err(finding.what.clone()),
        None if exam.is_some_and(|e| e.findings.iter().any(given_back)) => agent.space_gate(),
        None => snapshot,
    };
    let version = agent.version_to_install();
    let seen = Seen {
        version: version.as_deref(),
        snapshot: exam.and_then(|e| e.snapshot.as_deref()),
        findings: exam.map(|e| e.findings.as_slice()).unwrap_or_default(),
    };
    let system = match (exam.and_then(|e| e.findings.iter().find(|f| outside(f))), exam) {
        (Some(finding), _) => Err(finding.what.clone()),
        (None, None) => Err("the disk could not be looked at".to_owned()),
        (None, Some(_)) => reinstall::system(&agent.node, &agent.places, seen, agent.sudo.as_ref()),
    };
    let user = match (exam.and_then(|e| e.findings.iter().find(|f| outside(f))), exam) {
        (Some(finding), _) => Err(finding.what.clone()),
        (None, None) => Err("the disk could not be looked at".to_owned()),
        (None, Some(_)) => reinstall::user(&agent.node, &agent.places, seen),
    };
    let install_inputs = |layer: Layer| {
        let mut hash = DefaultHasher::new();
        // A person who asks for a recovery may have mended what nobody here can see: the line, the registry.
        (inputs(layer), &version, agent.nudges, &agent.sudo).hash(&mut hash);
        hash.finish()
    };
    let mut rungs = vec![
        Rung::new(Layer::InPlace, in_place, inputs(Layer::InPlace)),
        Rung::new(Layer::Restart, restart, inputs(Layer::Restart)),
        Rung::new(Layer::Restore, restore, inputs(Layer::Restore)),
        Rung::new(Layer::SystemInstall, system, install_inputs(Layer::SystemInstall)),
        Rung::new(Layer::UserInstall, user, install_inputs(Layer::UserInstall)),
        Rung::new(Layer::PeerCopy, peer_copy, peer_inputs),
    ];
    for rung in &mut rungs {
        if let Some(why) = agent.config.ladder.refuses(rung.layer) {
            rung.applies = Err(why);
        }
    }
    rungs
}

/// What needs no snapshot: files are given back to their user.
fn given_back(finding: &Finding) -> bool {
    finding.kind == FaultKind::Permission
}

/// What no snapshot can put right: somebody else holds the port, or the disk is full.
pub(super) fn outside(finding: &Finding) -> bool {
    matches!(finding.kind, FaultKind::PortTaken | FaultKind::DiskFull)
}

/// Whether the disk is as this layer's end wants it; else what is still in the way. What would make a start fail or do harm
/// comes first, also where nothing on the disk could be repaired: starts are scarce.
fn disk_allows_a_start(layer: Layer, exam: &Examination) -> Result<(), String> {
    let all = exam.findings.iter();
    let starts = match layer {
        Layer::InPlace => false,
        // It was chosen by a look that barred even more, but for a config that is being edited.
        Layer::Restart => exam.need == Need::Nothing,
        Layer::Restore | Layer::SystemInstall | Layer::UserInstall | Layer::PeerCopy | Layer::Emergency => {
            true
        }
    };
    let bars: Vec<&Finding> = all.filter(|f| starts && bars_a_start(f)).collect();
    let told = |findings: &mut dyn Iterator<Item = &Finding>| {
        findings.map(|f| f.what.as_str()).collect::<Vec<_>>().join("; ")
    };
    if !bars.is_empty() {
        return Err(format!("a start would fail or do harm: {}", told(&mut bars.into_iter())));
    }
    match (layer, exam.need) {
        (_, Need::Nothing) => Ok(()),
        // A config that is being edited keeps nothing from starting that was clean otherwise.
        (Layer::Restart, Need::Later) => Ok(()),
        // What is left concerns nothing that a start needs or would harm, and restore has had its turn.
        (Layer::Restore | Layer::SystemInstall | Layer::UserInstall | Layer::PeerCopy, _) => Ok(()),
        (_, Need::Later | Need::InPlace | Need::Interruption) => {
            Err(format!("the disk is not whole: {}", told(&mut exam.findings.iter())))
        }
    }
}

/// Whether even after a restore no start may be asked for. The workspace, credentials and single agents' databases are
/// read by a gateway that serves; without them it serves less, but it serves.
fn bars_a_start(finding: &Finding) -> bool {
    let apart = finding.class.is_some_and(|c| {
        matches!(c, engine::Class::Workspace | engine::Class::Credentials | engine::Class::Sessions)
    });
    keeps_from_starting(finding) && !apart
}

/// Whether a start with this on the disk would fail or do harm.
pub(crate) fn keeps_from_starting(finding: &Finding) -> bool {
    match finding.kind {
        FaultKind::FilesDamaged
        | FaultKind::ConfigBroken
        | FaultKind::RootMissing
        | FaultKind::DatabaseCorrupt
        | FaultKind::Amnesia
        | FaultKind::RuntimeUnfit
        | FaultKind::PortTaken
        | FaultKind::Permission
        | FaultKind::DiskFull
        | FaultKind::SchemaNewer => true,
        FaultKind::ProcessGone
        | FaultKind::Hung
        | FaultKind::ServiceLatched
        | FaultKind::UpdateAtWork
        | FaultKind::OwnersWill
        | FaultKind::BackupStale
        | FaultKind::Notice => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_look_after_a_layer_leaves_time_for_the_start_that_follows_it() {
        /// Killing the container and asking for the start.
        const BESIDE: Duration = Duration::from_secs(10);
        for layer in Layer::CLIMB {
            let start = Duration::from_millis(Rung::new(layer, Ok(()), 0).start_least_ms);
            assert!(claim_limit(layer) + BESIDE <= start, "{layer}");
        }
    }

    #[test]
    fn every_layer_that_puts_a_program_in_place_has_its_hold_taken_back() {
        for layer in Layer::CLIMB {
            assert_eq!(holds(layer), layer != Layer::Restart, "{layer}");
        }
    }

    fn exam(need: Need, kind: Option<FaultKind>, class: engine::Class) -> Examination {
        let findings: Vec<Finding> = kind
            .map(|kind| Finding { kind, class: Some(class), what: "it is so".into(), evidence: Vec::new() })
            .into_iter()
            .collect();
        serde_json::from_value(serde_json::json!({
            "findings": findings, "need": need, "differences": [], "snapshot": null, "ages_s": {},
            "version": null, "inputs": 1, "cpu_ms": 0.0, "wall_ms": 0.0
        }))
        .unwrap()
    }

    #[test]
    fn no_start_is_wasted_on_what_would_make_it_fail_although_nothing_can_be_repaired() {
        use engine::Class;
        for kind in [
            FaultKind::RuntimeUnfit,
            FaultKind::SchemaNewer,
            FaultKind::PortTaken,
            FaultKind::DiskFull,
            FaultKind::Permission,
        ] {
            for layer in [Layer::Restore, Layer::SystemInstall, Layer::UserInstall, Layer::PeerCopy] {
                let said = disk_allows_a_start(layer, &exam(Need::Nothing, Some(kind), Class::State));
                assert!(said.is_err_and(|why| why.contains("it is so")), "{kind:?} {layer}");
            }
        }
        let allows = |layer, need, kind, class| disk_allows_a_start(layer, &exam(need, kind, class)).is_ok();
        assert!(allows(Layer::Restore, Need::Nothing, None, Class::State));
        // A workspace that could not be brought back keeps nothing from serving.
        assert!(allows(Layer::Restore, Need::InPlace, Some(FaultKind::RootMissing), Class::Workspace));
        assert!(!allows(Layer::InPlace, Need::InPlace, Some(FaultKind::FilesDamaged), Class::Program));
        assert!(!allows(Layer::PeerCopy, Need::Interruption, Some(FaultKind::RootMissing), Class::State));
    }
}
