//! What to do: a pure function of state, world and time.
//!
//! `next` never assumes that it was asked before. Whatever a dead agent left half done is seen in the state
//! (an intent without its answer) and in the world (nobody holds that step), and dealt with like anything else.

use crate::fold::apply;
use crate::ladder::{Ladder, Rung};
use crate::limits::Limits;
use crate::record::{AlertKey, AlertKind, Claim, Event, How, IncidentKind, Record, StartId, StepId};
use crate::state::{Climb, Fate, Hold, HoldKind, Incident, Phase, Stage, State, Turn};
use crate::words::{Layer, Moment, Verdict};
use crate::{
    ALERT_ACT_MS, ALERT_RETRY_MOST_MS, ALERT_RETRY_MS, CLIMB_WORK_MS, CONFIRM_MS, EVIDENCE_GAP_MS,
    JITTER_PART, LOOK_MS, MAX_ATTEMPTS, MAX_REBOOTS, RETRY_MS, STUCK_RETRY_MS,
};
use serde::Serialize;

/// Times a message is handed over at once after its sender died under it, before it waits like a refused one.
const ALERT_LOST_TRIES: u32 = 3;

/// The one thing to do now. Records in it are to be made durable before anything is done.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Write the record; ask again. Nothing happens outside.
    Note {
        /// What to write.
        record: Record,
    },
    /// Write the intent, then spawn the layer's work in a container of its own and hold it.
    Spawn {
        /// What to write first.
        intent: Record,
        /// Names the container.
        step: StepId,
        /// Whose work.
        layer: Layer,
        /// From 1.
        attempt: u8,
        /// Whether this is layer 1's second turn, with a wider scope.
        wider: bool,
        /// When the step is to be killed; handed to it as well.
        deadline: Moment,
    },
    /// Wait for the step that is held, until it ends or until the deadline; then write `Ended`.
    Wait {
        /// Which.
        step: StepId,
        /// Whose work.
        layer: Layer,
        /// Its deadline, or sooner.
        until: Moment,
    },
    /// Kill the step's container and prove it empty, read what is on the disk, write `Emptied` (or `KillFailed`).
    Kill {
        /// Which.
        step: StepId,
        /// Whose work.
        layer: Layer,
    },
    /// Write the intent, then ask for a start, then write `Started`.
    Start {
        /// What to write first.
        intent: Record,
        /// Names the start.
        start: StartId,
        /// Whose start.
        layer: Layer,
    },
    /// Let the judge look; write `Judged` when its word is confirmed, at the latest at `until`.
    Judge {
        /// Whose turn it is, if any.
        layer: Option<Layer>,
        /// What is looked at.
        look: Look,
        /// When to ask again at the latest.
        until: Moment,
    },
    /// Write the intent, then hand the message to the outbox (or straight to a channel) under its key, for at most
    /// [`ALERT_ACT_MS`], then write `AlertDone`.
    Alert {
        /// What to write first.
        intent: Record,
        /// Which.
        key: AlertKey,
    },
    /// Go on judging as in daily life; ask again at `until` or when anything was written or has changed.
    Idle {
        /// `None`: only when something changes.
        until: Option<Moment>,
    },
}

/// What the judge is asked to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Look {
    /// A start under way.
    Start,
    /// One brief look after work that gave nothing to start.
    Brief,
    /// Whether an in-place repair took, without an interruption.
    InPlace,
}

/// One layer of the ladder as it would be climbed now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Planned {
    /// Which.
    pub layer: Layer,
    /// Why it would be passed; `None` when it would be tried.
    pub passed: Option<String>,
    /// What its work would get, if all before it took their whole turn.
    pub work_ms: u64,
    /// When its turn would end at the latest, counted from the climb's beginning.
    pub end_ms: u64,
}

/// What a climb beginning now would do, if every layer failed at its last moment: for `recover --dry-run`,
/// watch mode and `doctor`.
#[must_use]
pub fn preview(ladder: &Ladder) -> Vec<Planned> {
    let mut begun_ms = 0;
    let limits = ladder.limits;
    Layer::CLIMB
        .into_iter()
        .map(|layer| match ladder.applies(layer) {
            Err(reason) => Planned { layer, passed: Some(reason), work_ms: 0, end_ms: begun_ms },
            Ok(rung) => {
                let later_ms: u64 =
                    later(ladder, layer, &[]).map(|rung| limits.of(rung.least_slice_ms)).sum();
                match slice(rung, limits, limits.of(CLIMB_WORK_MS).saturating_sub(begun_ms), later_ms) {
                    Err(reason) => Planned { layer, passed: Some(reason), work_ms: 0, end_ms: begun_ms },
                    Ok(slice) => {
                        begun_ms = begun_ms.saturating_add(slice.turn_ms);
                        Planned { layer, passed: None, work_ms: slice.work_ms, end_ms: begun_ms }
                    }
                }
            }
        })
        .collect()
}

/// What to do now.
#[must_use]
pub fn next(state: &State, ladder: &Ladder, now: Moment) -> Action {
    let limits = state.climb().map_or(ladder.limits, |climb| climb.limits);
    let ask = Ask { state, ladder, now, t: state.time_ms(now), limits };
    let Some(incident) = &state.incident else { return ask.idle(None) };
    if let Some(record) = state.wake(now) {
        return Action::Note { record };
    }
    if let Some(why) = &ladder.hands_off {
        return match ask.end_live(incident) {
            Some(action) => action,
            None => ask.note(Event::LeftAlone { why: why.clone() }),
        };
    }
    match &incident.stage {
        Stage::Fresh => match ask.good_end(incident, None).or_else(|| ask.asked(incident)) {
            Some(action) => action,
            None => ask.begin(incident, false, incident.cause.clone()),
        },
        Stage::Climbing(climb) => ask.climb(incident, climb),
        Stage::Holding(hold) => ask.hold(incident, hold),
    }
}

/// How a layer's slice is divided.
struct Slice {
    work_ms: u64,
    turn_ms: u64,
}

/// The budget: what is left, less what later layers need. When not all of them fit any more, the earlier layer
/// goes first with its least, and the last ones get what remains.
fn slice(rung: &Rung, limits: Limits, left_ms: u64, later_ms: u64) -> Result<Slice, String> {
    let work_least_ms = limits.of(rung.work_least_ms);
    let least_ms = work_least_ms.saturating_add(limits.of(LOOK_MS));
    let fair_ms = left_ms.saturating_sub(later_ms);
    let turn_ms = if fair_ms >= least_ms { fair_ms } else { limits.of(rung.least_slice_ms).min(left_ms) };
    if turn_ms < least_ms {
        return Err(format!("{} s are left, its work alone needs {} s", left_ms / 1000, least_ms / 1000));
    }
    let beside_start_ms = turn_ms.saturating_sub(limits.of(rung.start_least_ms)).max(work_least_ms);
    Ok(Slice { work_ms: beside_start_ms.min(limits.of(rung.work_most_ms)), turn_ms })
}

fn later<'a>(ladder: &'a Ladder, layer: Layer, bad: &'a [(Layer, u64)]) -> impl Iterator<Item = &'a Rung> {
    Layer::CLIMB
        .into_iter()
        .filter(move |later| *later > layer)
        .filter_map(move |later| ladder.applies(later).ok())
        .filter(move |rung| !bad.contains(&(rung.layer, rung.inputs)))
}

/// One question: everything `next` was given.
struct Ask<'a> {
    state: &'a State,
    ladder: &'a Ladder,
    now: Moment,
    t: u64,
    /// Those of the climb under way, else those of the next one.
    limits: Limits,
}

impl Ask<'_> {
    fn note(&self, event: Event) -> Action {
        Action::Note { record: Record::new(self.now, event) }
    }

    /// The moment at which engine time will be `t`.
    fn moment(&self, t: u64) -> Moment {
        self.now.plus_ms(t.saturating_sub(self.t))
    }

    /// Nothing to do until `until` (engine time), except messages and containers that would not die.
    fn idle(&self, until: Option<u64>) -> Action {
        if let Some(action) = self.alert(None) {
            return action;
        }
        let same_boot = self.state.last.is_some_and(|last| last.boot == self.now.boot);
        let stuck = self.state.stuck.iter().filter(|_| same_boot).min_by_key(|stuck| stuck.tried_ms);
        let kill_ms = stuck.map(|stuck| stuck.tried_ms.saturating_add(self.limits.of(STUCK_RETRY_MS)));
        if let (Some(stuck), Some(due)) = (stuck, kill_ms)
            && self.t >= due
        {
            return Action::Kill { step: stuck.step, layer: stuck.layer };
        }
        let alert_ms = self.state.alerts.iter().filter_map(|alert| self.due_ms(alert)).min();
        let until = [until, kill_ms, alert_ms].into_iter().flatten().min();
        Action::Idle { until: until.map(|t| self.moment(t)) }
    }

    /// A message that is due, if handing it over fits into the time.
    fn alert(&self, room_ms: Option<u64>) -> Option<Action> {
        if room_ms.is_some_and(|room_ms| room_ms < self.limits.of(ALERT_ACT_MS)) {
            return None;
        }
        let journal = self.state.incident.as_ref().and_then(|incident| {
            let key = AlertKey { incident: incident.id, kind: AlertKind::Journal };
            (!self.ladder.journal_ok && self.state.alert(key).is_none()).then_some((key, 1))
        });
        // The one tried least goes first: what was refused often must not keep back what is new.
        let due = self
            .state
            .alerts
            .iter()
            .filter(|alert| self.due_ms(alert).is_some_and(|due| self.t >= due))
            .min_by_key(|alert| alert.tries)
            .map(|alert| (alert.key, alert.tries.saturating_add(1)));
        let (key, attempt) = due.or(journal)?;
        let intent = Record::new(self.now, Event::AlertIntent { key, attempt });
        Some(Action::Alert { intent, key })
    }

    /// Engine time from which a message is to be handed over; `None` when it is settled.
    fn due_ms(&self, alert: &crate::state::Alert) -> Option<u64> {
        match alert.fate {
            Fate::Accepted | Fate::Queued => None,
            Fate::Wanted if alert.tries == 0 => Some(0),
            Fate::Sending if alert.tries < ALERT_LOST_TRIES => Some(0),
            Fate::Wanted | Fate::Sending => {
                let doublings = alert.tries.saturating_sub(1).min(16);
                let wait_ms = ALERT_RETRY_MS.saturating_mul(1 << doublings).min(ALERT_RETRY_MOST_MS);
                Some(alert.tried_ms.saturating_add(self.limits.of(wait_ms)))
            }
        }
    }

    /// Ends what may live: the wait first, then the container. `None` when nothing does.
    fn end_live(&self, incident: &Incident) -> Option<Action> {
        let Stage::Climbing(climb) = &incident.stage else { return None };
        let turn = climb.turn.as_ref()?;
        match turn.phase {
            Phase::Working { step, .. } => {
                let held = self.ladder.holding == Some(step);
                Some(self.note(Event::Ended { step, how: if held { How::Stopped } else { How::Vanished } }))
            }
            Phase::Ended { step, .. } => Some(Action::Kill { step, layer: turn.layer }),
            Phase::Stuck
            | Phase::Emptied { .. }
            | Phase::Starting { .. }
            | Phase::Judging { .. }
            | Phase::Resumed { .. } => None,
        }
    }

    fn begin(&self, incident: &Incident, full: bool, why: String) -> Action {
        let (climb, limits) = (incident.climbs.saturating_add(1), self.ladder.limits);
        self.note(Event::ClimbBegan { climb, full, only: None, limits, why })
    }

    /// The climb that a person asked for, restricted to one layer.
    fn asked(&self, incident: &Incident) -> Option<Action> {
        let layer = self.ladder.only.filter(|layer| incident.may_try(Some(*layer)))?;
        let (climb, why) = (incident.climbs.saturating_add(1), "asked for by hand".to_owned());
        let limits = self.ladder.limits;
        Some(self.note(Event::ClimbBegan { climb, full: false, only: Some(layer), limits, why }))
    }

    /// The node serves, confirmed: what to write.
    fn good_end(&self, incident: &Incident, layer: Option<Layer>) -> Option<Action> {
        if !incident.served(self.t) {
            return None;
        }
        match &incident.word.as_ref()?.verdict {
            Verdict::Serving { degraded } if degraded.is_empty() => {
                Some(self.note(Event::Recovered { layer, from_emergency: incident.emergency }))
            }
            Verdict::Serving { degraded } => {
                Some(self.note(Event::Served { layer, degraded: degraded.clone() }))
            }
            Verdict::NotServing { .. } | Verdict::Inconclusive { .. } => None,
        }
    }

    fn climb(&self, incident: &Incident, climb: &Climb) -> Action {
        let escalated = climb.in_place && incident.kind != IncidentKind::Latent;
        let end_ms = climb.end_ms();
        let over = self.t >= end_ms || climb.reboots > MAX_REBOOTS;
        if escalated || over {
            if let Some(action) = self.end_live(incident) {
                return action;
            }
            if escalated {
                return self.begin(incident, false, incident.cause.clone());
            }
        }
        if incident.live().is_none() {
            let doer = climb.turn.as_ref().and_then(doer);
            if let Some(action) = self.good_end(incident, doer) {
                return action;
            }
        }
        if over {
            let why = if climb.reboots > MAX_REBOOTS {
                "the machine rebooted again and again under the climb"
            } else {
                "the climb's time is up"
            };
            return self.give_up(incident, climb, why);
        }
        match &climb.turn {
            None => self.choose(incident, climb, end_ms),
            Some(turn) => self.turn(incident, climb, turn, end_ms),
        }
    }

    /// The climb is over without success.
    fn give_up(&self, incident: &Incident, climb: &Climb, why: &str) -> Action {
        if climb.only.is_some() && !climb.in_place {
            // Who asked for one layer did not ask for the node to stay down.
            return self.begin(incident, false, "the layer that was asked for did not right it".to_owned());
        }
        let end_ms = climb.end_ms();
        if incident.kind == IncidentKind::Damage
            && !incident.fallen()
            && !incident.still_serves(self.t)
            && self.t < end_ms
        {
            // It served when this began. Whether it does now decides what is told: the judge says so first.
            return self.judge(None, Look::Brief, end_ms);
        }
        let last = RETRY_MS.len().saturating_sub(1);
        let index = usize::try_from(incident.scheduled.saturating_sub(1)).unwrap_or(last).min(last);
        let wait_ms = self.limits.of(RETRY_MS.get(index).copied().unwrap_or(0));
        let jitter = u64::from(self.ladder.jitter_permille.unsigned_abs().min(1000));
        let jitter_ms = wait_ms / JITTER_PART * jitter / 1000;
        let retry_in_ms = if self.ladder.jitter_permille < 0 {
            wait_ms.saturating_sub(jitter_ms)
        } else {
            wait_ms.saturating_add(jitter_ms)
        };
        let (why, evidence) = (why.to_owned(), self.ladder.evidence);
        self.note(if climb.in_place || incident.still_serves(self.t) {
            Event::Postponed { why, retry_in_ms, evidence }
        } else {
            Event::Emergency { why, retry_in_ms, evidence }
        })
    }

    /// Between two turns: the next layer is passed or begins.
    fn choose(&self, incident: &Incident, climb: &Climb, end_ms: u64) -> Action {
        if self.ladder.start_holds() && !climb.in_place {
            // A start in progress is never ended to be retried, whoever began it.
            return self.judge(None, Look::Start, end_ms);
        }
        if climb.may_widen(incident.noticed)
            && let Ok(rung) = self.ladder.applies(Layer::Restore)
            && !incident.failed_inputs.contains(&(Layer::Restore, rung.inputs))
            && self.free_of_stuck(Layer::Restore)
            && let Ok(action) = self.spawn(incident, climb, rung, end_ms, true)
        {
            return action;
        }
        let Some(layer) = climb.next_layer() else {
            let why = if climb.in_place { "the repair in place failed" } else { "every layer was tried" };
            return self.give_up(incident, climb, why);
        };
        // A container that would not die gets one more chance in each climb before its layer is passed.
        let stuck = self.state.stuck.iter().find(|stuck| stuck.layer == layer);
        if let Some(stuck) = stuck.filter(|stuck| stuck.tried_ms < climb.began_ms) {
            return Action::Kill { step: stuck.step, layer };
        }
        let begun = self.ladder.applies(layer).and_then(|rung| {
            if incident.failed_inputs.contains(&(layer, rung.inputs)) {
                return Err("it failed before on the same inputs".to_owned());
            }
            if !self.free_of_stuck(layer) {
                return Err("a container of its last try could not be ended".to_owned());
            }
            self.spawn(incident, climb, rung, end_ms, false)
        });
        match begun {
            Ok(action) => action,
            Err(reason) => self.note(Event::Passed { layer, reason }),
        }
    }

    fn free_of_stuck(&self, layer: Layer) -> bool {
        self.state.stuck.iter().all(|stuck| stuck.layer != layer)
    }

    /// A layer's first attempt.
    fn spawn(
        &self,
        incident: &Incident,
        climb: &Climb,
        rung: &Rung,
        end_ms: u64,
        wider: bool,
    ) -> Result<Action, String> {
        let later_ms: u64 = if climb.in_place || climb.only.is_some() {
            0
        } else {
            later(self.ladder, rung.layer, &incident.failed_inputs)
                .map(|rung| self.limits.of(rung.least_slice_ms))
                .sum()
        };
        let slice = slice(rung, self.limits, end_ms.saturating_sub(self.t), later_ms)?;
        Ok(self.intent(rung, 1, wider, slice.work_ms, slice.turn_ms))
    }

    fn intent(&self, rung: &Rung, attempt: u8, wider: bool, work_ms: u64, turn_ms: u64) -> Action {
        let step = self.state.ids.saturating_add(1);
        let deadline = self.now.plus_ms(work_ms);
        let (layer, inputs) = (rung.layer, rung.inputs);
        let event = Event::Intent { step, layer, attempt, deadline, turn_ms, inputs };
        Action::Spawn { intent: Record::new(self.now, event), step, layer, attempt, wider, deadline }
    }

    /// Inside a turn.
    fn turn(&self, incident: &Incident, climb: &Climb, turn: &Turn, end_ms: u64) -> Action {
        let layer = turn.layer;
        if self.ladder.start_holds() && matches!(turn.phase, Phase::Emptied { .. } | Phase::Resumed { .. }) {
            // Somebody else has started it meanwhile: that start is waited for like one of ours.
            return self.judge(Some(layer), Look::Start, end_ms);
        }
        match &turn.phase {
            Phase::Working { step, deadline_ms } => {
                if self.ladder.holding != Some(*step) {
                    return self.note(Event::Ended { step: *step, how: How::Vanished });
                }
                if let Some(action) = self.alert(Some(deadline_ms.saturating_sub(self.t))) {
                    return action;
                }
                Action::Wait { step: *step, layer, until: self.moment(*deadline_ms) }
            }
            Phase::Ended { step, .. } => Action::Kill { step: *step, layer },
            Phase::Stuck => self.fail(turn, "its container could not be ended"),
            Phase::Emptied { at_ms, lost, claim } => match claim {
                Claim::Ready { inputs } if !climb.in_place => {
                    self.start(incident, turn, *at_ms, *inputs, end_ms)
                }
                Claim::Ready { .. } => self.look(incident, turn, *at_ms, end_ms, "the damage is still there"),
                Claim::Nothing { why } => match lost.then(|| self.again(turn)).flatten() {
                    Some(action) => action,
                    None => self.look(incident, turn, *at_ms, end_ms, why),
                },
            },
            Phase::Starting { start, inputs } => self.lost_start(incident, turn, *start, *inputs),
            Phase::Judging { at_ms, refused: true, .. } => {
                self.look(incident, turn, *at_ms, end_ms, "the service manager refused the start")
            }
            Phase::Judging { .. } => self.judge_start(incident, turn, end_ms),
            Phase::Resumed { at_ms } => {
                let looked = self.t >= at_ms.saturating_add(self.limits.of(LOOK_MS)) || incident.fallen();
                match (looked && !self.ladder.start_holds()).then(|| self.again(turn)).flatten() {
                    Some(action) => action,
                    None => self.look(
                        incident,
                        turn,
                        *at_ms,
                        end_ms,
                        "the reboot took its last attempt, or what it needs",
                    ),
                }
            }
        }
    }

    fn fail(&self, turn: &Turn, why: &str) -> Action {
        self.note(Event::Failed { layer: turn.layer, why: why.to_owned() })
    }

    /// The attempt after a lost one, if one is left and there is time for it.
    fn again(&self, turn: &Turn) -> Option<Action> {
        let rung = self.ladder.applies(turn.layer).ok()?;
        let left_ms = turn.end_ms.saturating_sub(self.t);
        let slice = slice(rung, self.limits, left_ms, 0).ok()?;
        (turn.attempts < MAX_ATTEMPTS).then(|| {
            self.intent(rung, turn.attempts.saturating_add(1), turn.wider, slice.work_ms, slice.turn_ms)
        })
    }

    /// There is something to start: now, as soon as the ration allows it, or not at all.
    fn start(&self, incident: &Incident, turn: &Turn, at_ms: u64, inputs: u64, end_ms: u64) -> Action {
        let why = match self.may_start(incident, turn, inputs) {
            Ok(action) => return action,
            Err(NoStart::Never(why)) => why,
            Err(NoStart::Later(free_ms)) => {
                let least_ms =
                    self.ladder.rung(turn.layer).map_or(0, |rung| self.limits.of(rung.start_least_ms));
                if free_ms.saturating_add(least_ms) <= turn.end_ms {
                    return self.idle(Some(free_ms));
                }
                "a further start would be the fourth within 300 s"
            }
        };
        self.look(incident, turn, at_ms, end_ms, why)
    }

    fn may_start(&self, incident: &Incident, turn: &Turn, inputs: u64) -> Result<Action, NoStart> {
        if incident.failed_starts.contains(&inputs) {
            return Err(NoStart::Never("a start with the same inputs has failed"));
        }
        let start = self.state.ids.saturating_add(1);
        let layer = turn.layer;
        let intent = Record::new(self.now, Event::StartIntent { start, layer, inputs });
        let free_ms = self.state.start_free_ms(self.t);
        if free_ms > self.t {
            return Err(NoStart::Later(free_ms));
        }
        // Whether the turn may still start is the fold's to say.
        match apply(&mut self.state.clone(), &intent) {
            Ok(()) => Ok(Action::Start { intent, start, layer }),
            Err(illegal) => Err(NoStart::Never(illegal.rule)),
        }
    }

    /// A start's intent stands there without its answer: its agent died in between.
    fn lost_start(&self, incident: &Incident, turn: &Turn, start: StartId, inputs: u64) -> Action {
        if self.ladder.start.alive {
            return self.note(Event::Started { start, error: None });
        }
        match self.may_start(incident, turn, inputs) {
            Ok(action) => action,
            Err(NoStart::Never(_) | NoStart::Later(_)) => {
                let error = "the agent died before it knew whether it had asked".to_owned();
                self.note(Event::Started { start, error: Some(error) })
            }
        }
    }

    /// A start is judged until its turn ends; longer while it progresses.
    fn judge_start(&self, incident: &Incident, turn: &Turn, end_ms: u64) -> Action {
        if incident.fallen() {
            return self.fail(turn, "the start did not bring it to serve");
        }
        if incident.damaged_again() {
            return self.fail(turn, "it serves, and the damage is still there");
        }
        // A node that was seen to serve at the last moment is not interrupted for want of a second look.
        let good = incident.word.as_ref().filter(|word| word.verdict.is_serving() && !word.confirmed);
        let sure_ms = good.map_or(0, |word| word.at_ms.saturating_add(CONFIRM_MS));
        let until_ms = if self.ladder.start_holds() { end_ms } else { turn.end_ms.max(sure_ms).min(end_ms) };
        if self.t >= until_ms {
            return self.fail(turn, "the start did not come to an end in its time");
        }
        self.judge(Some(turn.layer), Look::Start, until_ms)
    }

    /// A brief look, held on while a start progresses or a good look is being confirmed; then the turn fails.
    fn look(&self, incident: &Incident, turn: &Turn, at_ms: u64, end_ms: u64, why: &str) -> Action {
        let (look, look_ms) = match turn.layer {
            Layer::InPlace => (Look::InPlace, CONFIRM_MS),
            Layer::Restart
            | Layer::Restore
            | Layer::SystemInstall
            | Layer::UserInstall
            | Layer::PeerCopy
            | Layer::Emergency => (Look::Brief, self.limits.of(LOOK_MS)),
        };
        let good = incident.word.as_ref().is_some_and(|word| word.verdict.is_serving() && !word.confirmed);
        let until_ms = if self.ladder.start_holds() {
            end_ms
        } else {
            at_ms.saturating_add(look_ms).saturating_add(if good { CONFIRM_MS } else { 0 }).min(end_ms)
        };
        let settled = incident.fallen() || (incident.damaged_again() && look == Look::InPlace);
        if self.t >= until_ms || (settled && !self.ladder.start_holds()) {
            return self.fail(turn, why);
        }
        self.judge(Some(turn.layer), look, until_ms)
    }

    fn judge(&self, layer: Option<Layer>, look: Look, until_ms: u64) -> Action {
        match self.alert(Some(until_ms.saturating_sub(self.t))) {
            Some(action) => action,
            None => Action::Judge { layer, look, until: self.moment(until_ms) },
        }
    }

    fn hold(&self, incident: &Incident, hold: &Hold) -> Action {
        let rest = match hold.kind {
            HoldKind::Degraded => {
                if incident.fallen() {
                    return self.begin(incident, false, "it fell again".to_owned());
                }
                if incident.damaged_again() {
                    return self.begin(incident, false, "the damage is back".to_owned());
                }
                let released = incident.word.as_ref().is_some_and(|word| match &word.verdict {
                    Verdict::Serving { degraded } => degraded.is_empty(),
                    Verdict::NotServing { .. } | Verdict::Inconclusive { .. } => false,
                });
                if released && let Some(action) = self.good_end(incident, hold.layer) {
                    return action;
                }
                None
            }
            HoldKind::Emergency | HoldKind::Latent => {
                if let Some(action) = self.good_end(incident, hold.layer).or_else(|| self.asked(incident)) {
                    return action;
                }
                // The message goes out before anything else is begun.
                if let Some(action) = self.alert(None) {
                    return action;
                }
                let changed = hold.evidence != Some(self.ladder.evidence);
                let gap_ms = hold.since_ms.saturating_add(self.limits.of(EVIDENCE_GAP_MS));
                let due_ms = if changed { gap_ms.min(hold.retry_ms) } else { hold.retry_ms };
                if self.t >= due_ms && !self.ladder.start_holds() {
                    // A node that serves is not interrupted again by what has failed on these very inputs.
                    let spared = hold.kind == HoldKind::Latent && incident.kind == IncidentKind::Damage;
                    let full = !spared
                        && self.t >= hold.retry_ms
                        && usize::try_from(incident.scheduled).is_ok_and(|climbs| climbs >= RETRY_MS.len());
                    let why = if self.t >= hold.retry_ms { "it is time again" } else { "something changed" };
                    return self.begin(incident, full, why.to_owned());
                }
                Some(due_ms)
            }
        };
        // While a start holds the next climb back, the caller asks again as that start changes.
        self.idle(rest.filter(|due_ms| *due_ms > self.t))
    }
}

enum NoStart {
    Never(&'static str),
    Later(u64),
}

/// Whose doing it is when the node serves in this turn: the layer's, once it has worked.
fn doer(turn: &Turn) -> Option<Layer> {
    match turn.phase {
        Phase::Judging { .. } | Phase::Starting { .. } => Some(turn.layer),
        Phase::Emptied { .. } => (turn.layer == Layer::InPlace).then_some(turn.layer),
        Phase::Working { .. } | Phase::Ended { .. } | Phase::Stuck | Phase::Resumed { .. } => None,
    }
}
