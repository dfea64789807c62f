//! The one legality function, and the fold.
//!
//! [`apply`] decides with nothing but the state and the record: what it forbids is forbidden whatever the
//! caller saw or wished. It checks first and changes afterwards; a refused record leaves no trace.

use crate::limits::Limits;
use crate::record::{AlertKey, AlertKind, AlertResult, Claim, Event, How, IncidentKind, Record, StepId};
use crate::state::{
    Alert, Climb, Closed, Fate, Hold, HoldKind, Illegal, Incident, MAX_ALERTS, MAX_FAILED_INPUTS,
    MAX_FINDINGS, MAX_START_MARKS, Phase, Stage, State, Stuck, Turn, Word,
};
use crate::words::{Finding, Layer, Moment, Outcome, Verdict};
use crate::{CLIMB_WORK_MS, EVIDENCE_GAP_MS, MAX_ATTEMPTS, MAX_KILLS, MAX_REBOOTS, WORD_FRESH_MS};

type Legal = Result<(), Illegal>;

fn no<T>(rule: &'static str) -> Result<T, Illegal> {
    Err(Illegal { rule })
}

fn must(holds: bool, rule: &'static str) -> Legal {
    if holds { Ok(()) } else { no(rule) }
}

/// Folds one record into the state, if it may follow what was before.
///
/// # Errors
/// The rule that forbids it; the state is then unchanged.
pub fn apply(state: &mut State, record: &Record) -> Result<(), Illegal> {
    let t = clock(state, record)?;
    match &record.event {
        Event::Checkpoint { state: kept } => {
            must(state.seq == 0, "a checkpoint is the first record of a journal")?;
            *state = State::clone(kept);
            // Its own time counts for nothing: a reboot between the last record and it must still be noticed.
            return Ok(());
        }
        Event::Opened { incident, kind, cause, findings } => {
            opened(state, record.at, t, *incident, *kind, cause, findings)?;
        }
        Event::Escalated { kind, cause, findings } => escalated(state, *kind, cause, findings)?,
        Event::Noticed { findings } => notice(open(state)?, findings),
        Event::ClimbBegan { climb, full, only, limits, why: _ } => {
            climb_began(open(state)?, t, *climb, *full, *only, *limits)?;
        }
        Event::Passed { layer, reason: _ } => passed(open(state)?, *layer)?,
        Event::Intent { step, layer, attempt, deadline, turn_ms, inputs } => {
            let deadline_ms = t.saturating_add(deadline.since_ms(record.at).unwrap_or(0));
            let asked = Asked { step: *step, layer: *layer, attempt: *attempt, deadline_ms, inputs: *inputs };
            intent(state, t, &asked, *turn_ms)?;
        }
        Event::Ended { step, how } => ended(open(state)?, *step, how)?,
        Event::Emptied { step, killed: _, claim } => emptied(state, t, *step, claim)?,
        Event::KillFailed { step, why: _ } => kill_failed(state, t, *step)?,
        Event::StartIntent { start, layer, inputs } => start_intent(state, t, *start, *layer, *inputs)?,
        Event::Started { start, error } => started(open(state)?, t, *start, error.is_some())?,
        Event::StartSeen { by: _ } => {
            mark_start(state, t);
            // What was said of the process before says nothing of this one.
            if let Some(incident) = &mut state.incident {
                incident.word = None;
            }
        }
        Event::Judged { verdict, confirmed, clean } => {
            open(state)?.word =
                Some(Word { verdict: verdict.clone(), confirmed: *confirmed, clean: *clean, at_ms: t });
        }
        Event::Failed { layer, why: _ } => failed(open(state)?, *layer)?,
        Event::Served { layer, degraded } => served(open(state)?, t, *layer, degraded)?,
        Event::Recovered { layer, from_emergency } => {
            recovered(state, record.at, t, *layer, *from_emergency)?;
        }
        Event::Emergency { why: _, retry_in_ms, evidence } => {
            emergency(open(state)?, t, *retry_in_ms, *evidence)?;
            want(state, AlertKind::Emergency);
        }
        Event::Postponed { why: _, retry_in_ms, evidence } => {
            postponed(open(state)?, t, *retry_in_ms, *evidence)?;
            want(state, AlertKind::InPlaceFailed);
        }
        Event::LeftAlone { why } => {
            let incident = open(state)?;
            must(incident.live().is_none(), "an incident is closed only when every container is empty")?;
            close(state, record.at, t, Outcome::LeftAlone, None, why.clone());
        }
        Event::Rebooted => rebooted(state, record.at, t)?,
        Event::AlertIntent { key, attempt } => alert_intent(state, t, *key, *attempt)?,
        Event::AlertDone { key, result } => alert_done(state, t, *key, result)?,
    }
    finish(state, record.at, t);
    Ok(())
}

/// Engine time of a record, if it may be written at that moment.
fn clock(state: &State, record: &Record) -> Result<u64, Illegal> {
    let Some(last) = state.last else { return Ok(state.clock_ms) };
    if last.boot == record.at.boot {
        must(record.at.ms >= last.ms, "time runs forward within a boot")?;
    } else if state.incident.is_some() {
        must(
            matches!(record.event, Event::Rebooted),
            "after a reboot under an open incident, the reboot is recorded first",
        )?;
    }
    Ok(state.time_ms(record.at))
}

fn finish(state: &mut State, at: Moment, t: u64) {
    state.seq = state.seq.saturating_add(1);
    if state.last.is_some_and(|last| last.boot != at.boot) {
        // Containers end with their boot.
        state.stuck.clear();
    }
    state.last = Some(at);
    state.clock_ms = t;
}

fn open(state: &mut State) -> Result<&mut Incident, Illegal> {
    state.incident.as_mut().ok_or(Illegal { rule: "this needs an open incident" })
}

fn opened(
    state: &mut State,
    at: Moment,
    t: u64,
    id: u64,
    kind: IncidentKind,
    cause: &str,
    findings: &[Finding],
) -> Legal {
    must(state.incident.is_none(), "one incident at a time")?;
    must(id == state.incidents.saturating_add(1), "incidents are numbered without gaps")?;
    state.incidents = id;
    state.alerts.retain(|alert| alert.fate != Fate::Accepted);
    let mut incident = Incident {
        id,
        kind,
        cause: cause.to_owned(),
        findings: Vec::new(),
        noticed: 0,
        opened: at,
        opened_ms: t,
        climbs: 0,
        scheduled: 0,
        emergency: false,
        failed_inputs: Vec::new(),
        failed_starts: Vec::new(),
        word: None,
        stage: Stage::Fresh,
    };
    notice(&mut incident, findings);
    state.incident = Some(incident);
    want(state, AlertKind::Opening);
    Ok(())
}

fn notice(incident: &mut Incident, findings: &[Finding]) {
    incident.noticed = incident.noticed.saturating_add(findings.len() as u64);
    let room = MAX_FINDINGS.saturating_sub(incident.findings.len());
    incident.findings.extend(findings.iter().take(room).cloned());
}

fn escalated(state: &mut State, kind: IncidentKind, cause: &str, findings: &[Finding]) -> Legal {
    let incident = open(state)?;
    must(
        incident.may_become(kind),
        "only the damage of a node that serves escalates, and to something worse",
    )?;
    incident.kind = kind;
    incident.cause = cause.to_owned();
    incident.word = None;
    incident.scheduled = 0;
    notice(incident, findings);
    // A climb in place may still hold a container: it ends first, then the new climb begins.
    if incident.live().is_none() {
        incident.stage = Stage::Fresh;
    }
    Ok(())
}

fn climb_began(
    incident: &mut Incident,
    t: u64,
    number: u32,
    full: bool,
    only: Option<Layer>,
    limits: Limits,
) -> Legal {
    must(limits.sound(), "limits are divided by a number that leaves something of them")?;
    must(number == incident.climbs.saturating_add(1), "climbs are numbered without gaps")?;
    must(incident.may_try(only), "a node that serves is repaired in place, and only that one")?;
    let fallen = incident.fallen();
    let by_schedule = match &incident.stage {
        Stage::Fresh => only.is_none(),
        Stage::Climbing(climb) => {
            let escalated = climb.in_place && incident.kind != IncidentKind::Latent;
            let asked = climb.only.is_some() && climb.is_over(t);
            must(escalated || asked, "a climb ends before the next begins")?;
            must(incident.live().is_none(), "a climb begins when every container is empty")?;
            escalated && only.is_none()
        }
        Stage::Holding(hold) => match hold.kind {
            HoldKind::Degraded => {
                must(fallen || incident.damaged_again(), "a serving node is not climbed for")?;
                false
            }
            HoldKind::Emergency | HoldKind::Latent => {
                let waited_ms = t.saturating_sub(hold.since_ms);
                // A person who asks is not kept waiting.
                let kept = t >= hold.retry_ms || waited_ms >= limits.of(EVIDENCE_GAP_MS);
                must(kept || only.is_some(), "climbs keep their distance")?;
                t >= hold.retry_ms && only.is_none()
            }
        },
    };
    incident.climbs = number;
    if by_schedule {
        incident.scheduled = incident.scheduled.saturating_add(1);
    }
    if full {
        incident.failed_inputs.clear();
        incident.failed_starts.clear();
    }
    incident.word = None;
    incident.stage = Stage::Climbing(Climb {
        number,
        full,
        in_place: incident.kind == IncidentKind::Latent,
        only,
        limits,
        began_ms: t,
        reboots: 0,
        done: None,
        restore_noticed: None,
        turn: None,
    });
    Ok(())
}

fn passed(incident: &mut Incident, layer: Layer) -> Legal {
    let climb = incident.climbing()?;
    must(climb.turn.is_none(), "a layer whose turn has begun fails, it is not passed")?;
    must(climb.next_layer() == Some(layer), "layers come in order, none left out")?;
    climb.done = Some(layer);
    Ok(())
}

struct Asked {
    step: StepId,
    layer: Layer,
    attempt: u8,
    deadline_ms: u64,
    inputs: u64,
}

fn intent(state: &mut State, t: u64, asked: &Asked, turn_ms: u64) -> Legal {
    let step = state.ids.saturating_add(1);
    must(asked.step == step, "steps are numbered without gaps")?;
    must(
        state.stuck.iter().all(|stuck| stuck.layer != asked.layer),
        "no second container of a layer while one may live",
    )?;
    let incident = open(state)?;
    let noticed = incident.noticed;
    let latent = incident.kind == IncidentKind::Latent;
    let known_bad = incident.failed_inputs.contains(&(asked.layer, asked.inputs));
    let climb = incident.climbing()?;
    let end_ms = climb.end_ms();
    must(climb.in_place == latent, "an escalated incident needs a climb of its own")?;
    must(t < end_ms, "no step begins after the climb's time")?;
    must(asked.deadline_ms > t && asked.deadline_ms <= end_ms, "a step's deadline lies within the climb")?;
    let working = Phase::Working { step, deadline_ms: asked.deadline_ms };
    match &mut climb.turn {
        Some(turn) => {
            let lost = match &turn.phase {
                Phase::Emptied { lost, .. } => *lost,
                Phase::Resumed { .. } => true,
                Phase::Working { .. }
                | Phase::Ended { .. }
                | Phase::Stuck
                | Phase::Starting { .. }
                | Phase::Judging { .. } => false,
            };
            must(turn.layer == asked.layer, "one turn at a time")?;
            must(lost, "only a lost attempt is repeated, and only when its container is empty")?;
            must(asked.attempt == turn.attempts.saturating_add(1), "attempts are counted")?;
            must(asked.attempt <= MAX_ATTEMPTS, "attempts are bounded")?;
            turn.attempts = asked.attempt;
            turn.inputs = asked.inputs;
            turn.phase = working;
        }
        None => {
            let wider = climb.may_widen(noticed) && asked.layer == Layer::Restore;
            must(wider || climb.next_layer() == Some(asked.layer), "layers come in order, none left out")?;
            must(asked.attempt == 1, "attempts are counted")?;
            must(!known_bad, "a layer is not tried again on the inputs on which it failed")?;
            if wider {
                climb.restore_noticed = None;
            }
            climb.turn = Some(Turn {
                layer: asked.layer,
                inputs: asked.inputs,
                wider,
                attempts: 1,
                starts: 0,
                voided: 0,
                end_ms: t.saturating_add(turn_ms).min(end_ms),
                phase: working,
            });
        }
    }
    incident.word = None;
    state.ids = step;
    Ok(())
}

fn ended(incident: &mut Incident, step: StepId, how: &How) -> Legal {
    let lost = match how {
        How::Vanished | How::SpawnFailed { .. } => true,
        How::Exited { .. } | How::Signaled { .. } | How::TimedOut | How::Stopped => false,
    };
    let turn = incident.turn()?;
    match turn.phase {
        Phase::Working { step: working, .. } if working == step => {
            turn.phase = Phase::Ended { step, lost, kills: 0 };
            Ok(())
        }
        Phase::Working { .. }
        | Phase::Ended { .. }
        | Phase::Stuck
        | Phase::Emptied { .. }
        | Phase::Starting { .. }
        | Phase::Judging { .. }
        | Phase::Resumed { .. } => no("only the step that works can end"),
    }
}

fn emptied(state: &mut State, t: u64, step: StepId, claim: &Claim) -> Legal {
    if state.stuck.iter().any(|stuck| stuck.step == step) {
        state.stuck.retain(|stuck| stuck.step != step);
        return Ok(());
    }
    let incident = open(state)?;
    let turn = incident.turn()?;
    match turn.phase {
        Phase::Ended { step: over, lost, .. } if over == step => {
            turn.phase = Phase::Emptied { at_ms: t, lost, claim: claim.clone() };
            // What was seen while the step still worked says nothing about what it left.
            incident.word = None;
            Ok(())
        }
        Phase::Working { .. }
        | Phase::Ended { .. }
        | Phase::Stuck
        | Phase::Emptied { .. }
        | Phase::Starting { .. }
        | Phase::Judging { .. }
        | Phase::Resumed { .. } => no("a container is emptied after its step ended"),
    }
}

fn kill_failed(state: &mut State, t: u64, step: StepId) -> Legal {
    if let Some(stuck) = state.stuck.iter_mut().find(|stuck| stuck.step == step) {
        stuck.tried_ms = t;
        return Ok(());
    }
    let incident = open(state)?;
    let turn = incident.turn()?;
    let layer = turn.layer;
    match &mut turn.phase {
        Phase::Ended { step: over, kills, .. } if *over == step => {
            *kills = kills.saturating_add(1);
            if *kills >= MAX_KILLS {
                turn.phase = Phase::Stuck;
                state.stuck.push(Stuck { step, layer, tried_ms: t });
            }
            Ok(())
        }
        Phase::Working { .. }
        | Phase::Ended { .. }
        | Phase::Stuck
        | Phase::Emptied { .. }
        | Phase::Starting { .. }
        | Phase::Judging { .. }
        | Phase::Resumed { .. } => no("a container is killed after its step ended"),
    }
}

fn start_intent(state: &mut State, t: u64, start: u64, layer: Layer, inputs: u64) -> Legal {
    must(start == state.ids.saturating_add(1), "starts are numbered without gaps")?;
    must(state.start_free_ms(t) <= t, "no fourth start within 300 s")?;
    let incident = open(state)?;
    must(!incident.failed_starts.contains(&inputs), "no start repeats one that failed")?;
    let climb = incident.climbing()?;
    must(!climb.in_place, "an in-place repair starts nothing")?;
    must(t < climb.end_ms(), "no start begins after the climb's time")?;
    let turn = climb.turn.as_mut().ok_or(Illegal { rule: "a start belongs to a layer's turn" })?;
    must(turn.layer == layer, "one turn at a time")?;
    let voided = match &turn.phase {
        Phase::Emptied { claim: Claim::Ready { inputs: ready }, .. } => {
            must(*ready == inputs, "what is started is what the disk says")?;
            turn.voided
        }
        // Its agent died before it knew whether it had asked.
        Phase::Starting { inputs: asked, .. } => {
            must(*asked == inputs, "what is started is what the disk says")?;
            turn.starts
        }
        Phase::Emptied { .. }
        | Phase::Working { .. }
        | Phase::Ended { .. }
        | Phase::Stuck
        | Phase::Judging { .. }
        | Phase::Resumed { .. } => {
            return no("a start follows a proven empty container and something to start");
        }
    };
    must(turn.starts == voided && turn.starts < MAX_ATTEMPTS, "one start per turn")?;
    turn.voided = voided;
    turn.starts = turn.starts.saturating_add(1);
    turn.phase = Phase::Starting { start, inputs };
    incident.word = None;
    state.ids = start;
    mark_start(state, t);
    Ok(())
}

fn mark_start(state: &mut State, t: u64) {
    state.starts_ms.push(t);
    let over = state.starts_ms.len().saturating_sub(MAX_START_MARKS);
    state.starts_ms.drain(..over);
}

fn started(incident: &mut Incident, t: u64, start: u64, refused: bool) -> Legal {
    let turn = incident.turn()?;
    match turn.phase {
        Phase::Starting { start: asked, inputs } if asked == start => {
            turn.phase = Phase::Judging { at_ms: t, inputs, refused };
            Ok(())
        }
        Phase::Working { .. }
        | Phase::Ended { .. }
        | Phase::Stuck
        | Phase::Emptied { .. }
        | Phase::Starting { .. }
        | Phase::Judging { .. }
        | Phase::Resumed { .. } => no("only the start that was intended is reported"),
    }
}

fn failed(incident: &mut Incident, layer: Layer) -> Legal {
    let noticed = incident.noticed;
    let known = incident.failed_starts.clone();
    let climb = incident.climbing()?;
    let turn = climb.turn.as_ref().ok_or(Illegal { rule: "only a layer whose turn it is can fail" })?;
    must(turn.layer == layer, "only a layer whose turn it is can fail")?;
    // Whether the layer's inputs are to blame, and the inputs of a start that was seen through.
    let (blamed, start) = match &turn.phase {
        Phase::Judging { inputs, refused: false, .. } => (true, Some(*inputs)),
        Phase::Emptied { lost, claim: Claim::Nothing { .. }, .. } => (!lost, None),
        Phase::Emptied { claim: Claim::Ready { inputs }, .. } => {
            (climb.in_place || known.contains(inputs), None)
        }
        Phase::Judging { refused: true, .. } | Phase::Stuck | Phase::Resumed { .. } => (false, None),
        Phase::Working { .. } | Phase::Ended { .. } | Phase::Starting { .. } => {
            return no("a turn is over when its container is empty and its start judged");
        }
    };
    let inputs = turn.inputs;
    if layer == Layer::Restore && start.is_some() && !turn.wider {
        climb.restore_noticed = Some(noticed);
    }
    climb.done = Some(layer);
    climb.turn = None;
    if blamed {
        remember(&mut incident.failed_inputs, (layer, inputs));
    }
    if let Some(inputs) = start {
        remember(&mut incident.failed_starts, inputs);
    }
    Ok(())
}

fn remember<T: PartialEq>(list: &mut Vec<T>, item: T) {
    if !list.contains(&item) {
        list.push(item);
        let over = list.len().saturating_sub(MAX_FAILED_INPUTS);
        list.drain(..over);
    }
}

fn served(incident: &mut Incident, t: u64, layer: Option<Layer>, degraded: &[String]) -> Legal {
    must(incident.served(t), "the judge has confirmed that the node serves and the damage is gone")?;
    must(incident.live().is_none(), "a climb ends when every container is empty")?;
    must(!degraded.is_empty(), "what is whole is recovered, not held")?;
    let held = match &incident.stage {
        Stage::Fresh => false,
        Stage::Climbing(_) => false,
        Stage::Holding(hold) => hold.kind == HoldKind::Degraded,
    };
    must(!held, "it is held already")?;
    incident.stage = Stage::Holding(Hold {
        kind: HoldKind::Degraded,
        since_ms: t,
        retry_ms: u64::MAX,
        evidence: None,
        layer,
    });
    Ok(())
}

fn recovered(state: &mut State, at: Moment, t: u64, layer: Option<Layer>, from_emergency: bool) -> Legal {
    let incident = open(state)?;
    must(incident.served(t), "the judge has confirmed that the node serves and the damage is gone")?;
    must(incident.live().is_none(), "an incident is closed only when every container is empty")?;
    must(incident.emergency == from_emergency, "an emergency is told with the recovery")?;
    let degraded = match incident.word.as_ref().map(|word| &word.verdict) {
        Some(Verdict::Serving { degraded }) => !degraded.is_empty(),
        Some(Verdict::NotServing { .. } | Verdict::Inconclusive { .. }) | None => false,
    };
    must(!degraded, "what is still silenced is held, not recovered")?;
    let cause = incident.cause.clone();
    close(state, at, t, Outcome::Recovered, layer, cause);
    Ok(())
}

fn emergency(incident: &mut Incident, t: u64, retry_in_ms: u64, evidence: u64) -> Legal {
    must(incident.live().is_none(), "emergency is entered when every container is empty")?;
    let serves = incident.still_serves(t);
    let climb = incident.climbing()?;
    must(!climb.in_place && !serves, "a node that serves is not in emergency")?;
    must(climb.only.is_none(), "one layer that was asked for is not all that can be tried")?;
    must(climb.is_over(t), "every layer has its turn before emergency")?;
    // A start that was left alone may still come up; its layer is then told.
    let layer = climb.turn.as_ref().and_then(|turn| match turn.phase {
        Phase::Judging { refused: false, .. } => Some(turn.layer),
        Phase::Working { .. }
        | Phase::Ended { .. }
        | Phase::Stuck
        | Phase::Emptied { .. }
        | Phase::Starting { .. }
        | Phase::Judging { .. }
        | Phase::Resumed { .. } => None,
    });
    let retry_ms = t.saturating_add(retry_in_ms);
    incident.emergency = true;
    incident.word = None;
    incident.stage = Stage::Holding(Hold {
        kind: HoldKind::Emergency,
        since_ms: t,
        retry_ms,
        evidence: Some(evidence),
        layer,
    });
    Ok(())
}

fn postponed(incident: &mut Incident, t: u64, retry_in_ms: u64, evidence: u64) -> Legal {
    must(incident.live().is_none(), "a climb ends when every container is empty")?;
    let serves = incident.still_serves(t);
    let climb = incident.climbing()?;
    must(
        climb.in_place || (serves && climb.only.is_none() && climb.is_over(t)),
        "only the damage of a node that serves is postponed",
    )?;
    let retry_ms = t.saturating_add(retry_in_ms);
    incident.word = None;
    incident.stage = Stage::Holding(Hold {
        kind: HoldKind::Latent,
        since_ms: t,
        retry_ms,
        evidence: Some(evidence),
        layer: None,
    });
    Ok(())
}

fn rebooted(state: &mut State, at: Moment, t: u64) -> Legal {
    must(state.last.is_some_and(|last| last.boot != at.boot), "a reboot changes the boot id")?;
    let incident = open(state)?;
    incident.word = None;
    match &mut incident.stage {
        Stage::Fresh => {}
        Stage::Holding(hold) => {
            if hold.kind != HoldKind::Degraded {
                // The start that was left alone is gone, and so is whatever kept the last climb from success,
                // perhaps: the next one begins soon, but not before the boot's own start had a moment.
                hold.layer = None;
                hold.evidence = None;
                hold.since_ms = t;
            }
        }
        Stage::Climbing(climb) => {
            climb.reboots = climb.reboots.saturating_add(1);
            if let Some(turn) = &mut climb.turn {
                // The attempt that was under way is spent: what is repeated counts as the next one.
                turn.voided = turn.starts;
                turn.phase = Phase::Resumed { at_ms: t };
            }
        }
    }
    Ok(())
}

fn alert_intent(state: &mut State, t: u64, key: AlertKey, attempt: u32) -> Legal {
    let open_id = state.incident.as_ref().map(|incident| incident.id);
    let known = state.alerts.iter().position(|alert| alert.key == key);
    // The journal's own trouble is in no record, so its message is wanted by being sent.
    if known.is_none() && key.kind == AlertKind::Journal && Some(key.incident) == open_id {
        must(attempt == 1, "tries are counted")?;
        push_alert(state, Alert { key, tries: 1, tried_ms: t, fate: Fate::Sending });
        return Ok(());
    }
    let Some(alert) = state.alerts.iter_mut().find(|alert| alert.key == key) else {
        return no("only a wanted message is sent");
    };
    must(attempt == alert.tries.saturating_add(1), "tries are counted")?;
    must(
        matches!(alert.fate, Fate::Wanted | Fate::Sending),
        "a message that is queued or accepted is not sent again",
    )?;
    alert.tries = attempt;
    alert.tried_ms = t;
    alert.fate = Fate::Sending;
    Ok(())
}

fn alert_done(state: &mut State, t: u64, key: AlertKey, result: &AlertResult) -> Legal {
    let Some(alert) = state.alerts.iter_mut().find(|alert| alert.key == key) else {
        return no("only a message that was handed over has an answer");
    };
    let may = match result {
        AlertResult::Accepted => matches!(alert.fate, Fate::Sending | Fate::Queued),
        AlertResult::Queued | AlertResult::Refused { .. } => alert.fate == Fate::Sending,
    };
    must(may, "only a message that was handed over has an answer")?;
    alert.tried_ms = t;
    alert.fate = match result {
        AlertResult::Accepted => Fate::Accepted,
        AlertResult::Queued => Fate::Queued,
        AlertResult::Refused { .. } => Fate::Wanted,
    };
    Ok(())
}

/// Wants a message of the open incident, once for ever.
fn want(state: &mut State, kind: AlertKind) {
    let Some(incident) = state.incident.as_ref().map(|incident| incident.id) else { return };
    let key = AlertKey { incident, kind };
    if state.alert(key).is_none() {
        push_alert(state, Alert { key, tries: 0, tried_ms: 0, fate: Fate::Wanted });
    }
}

fn push_alert(state: &mut State, alert: Alert) {
    let settled = |alert: &Alert| matches!(alert.fate, Fate::Accepted | Fate::Queued);
    if state.alerts.len() >= MAX_ALERTS {
        // Settled ones are forgotten first; if none is, the oldest: it has been tried longest.
        let oldest = state.alerts.iter().position(settled).unwrap_or(0);
        state.alerts.remove(oldest);
    }
    state.alerts.push(alert);
}

fn close(state: &mut State, at: Moment, t: u64, outcome: Outcome, layer: Option<Layer>, why: String) {
    want(state, AlertKind::Closing);
    let Some(incident) = state.incident.take() else { return };
    // An opening that nobody was told yet is told by the closing.
    state.alerts.retain(|alert| {
        alert.key != AlertKey { incident: incident.id, kind: AlertKind::Opening } || alert.tries > 0
    });
    state.closed = Some(Closed {
        id: incident.id,
        outcome,
        layer,
        from_emergency: incident.emergency,
        uninterrupted: incident.kind == IncidentKind::Latent,
        why,
        opened: incident.opened,
        closed: at,
        took_ms: t.saturating_sub(incident.opened_ms),
    });
}

impl Incident {
    /// The container that may live.
    pub(crate) fn live(&self) -> Option<StepId> {
        match &self.stage {
            Stage::Climbing(climb) => climb.turn.as_ref().and_then(Turn::live_step),
            Stage::Fresh | Stage::Holding(_) => None,
        }
    }

    /// The judge has confirmed, just now, that the node serves, and that the damage is gone where there was any.
    pub(crate) fn served(&self, t: u64) -> bool {
        let clean_asked = match self.kind {
            IncidentKind::Outage => false,
            IncidentKind::Damage | IncidentKind::Latent => true,
        };
        self.word
            .as_ref()
            .filter(|word| t.saturating_sub(word.at_ms) <= WORD_FRESH_MS)
            .is_some_and(|word| word.confirmed && word.verdict.is_serving() && (word.clean || !clean_asked))
    }

    /// The judge has said for certain that it serves, and that what the incident is about is still damaged.
    pub(crate) fn damaged_again(&self) -> bool {
        self.kind != IncidentKind::Outage
            && self
                .word
                .as_ref()
                .is_some_and(|word| word.confirmed && word.verdict.is_serving() && !word.clean)
    }

    /// The judge has just said for certain that a damaged node serves, gone or not as the damage may be. An outage that
    /// serves is over; only damage can outlast that.
    pub(crate) fn still_serves(&self, t: u64) -> bool {
        self.kind == IncidentKind::Damage
            && self.word.as_ref().is_some_and(|word| {
                word.confirmed
                    && word.verdict.is_serving()
                    && t <= word.at_ms.saturating_add(crate::WORD_FRESH_MS)
            })
    }

    /// Whether it waits because its damage could not be mended while the node serves.
    pub(crate) fn damage_waits(&self) -> bool {
        match &self.stage {
            Stage::Holding(hold) => hold.kind == HoldKind::Latent,
            Stage::Fresh | Stage::Climbing(_) => false,
        }
    }

    /// Whether it may be made worse than it is: latent damage at any time, other damage only while it waits (its climb
    /// interrupts the node by itself).
    pub(crate) fn may_become(&self, kind: IncidentKind) -> bool {
        match (self.kind, kind) {
            (IncidentKind::Latent, IncidentKind::Damage | IncidentKind::Outage) => true,
            (IncidentKind::Damage, IncidentKind::Outage) => self.damage_waits(),
            (IncidentKind::Latent | IncidentKind::Damage, _) | (IncidentKind::Outage, _) => false,
        }
    }

    /// Whether a climb may be restricted to this layer.
    pub(crate) fn may_try(&self, only: Option<Layer>) -> bool {
        let latent = self.kind == IncidentKind::Latent;
        only.is_none_or(|layer| if latent { layer == Layer::InPlace } else { Layer::CLIMB.contains(&layer) })
    }

    /// The judge has said for certain that the node does not serve.
    pub(crate) fn fallen(&self) -> bool {
        self.word.as_ref().is_some_and(|word| match word.verdict {
            Verdict::NotServing { .. } => word.confirmed,
            Verdict::Serving { .. } | Verdict::Inconclusive { .. } => false,
        })
    }

    fn climbing(&mut self) -> Result<&mut Climb, Illegal> {
        match &mut self.stage {
            Stage::Climbing(climb) => Ok(climb),
            Stage::Fresh | Stage::Holding(_) => no("this needs a climb"),
        }
    }

    fn turn(&mut self) -> Result<&mut Turn, Illegal> {
        self.climbing()?.turn.as_mut().ok_or(Illegal { rule: "this needs a layer's turn" })
    }
}

impl Climb {
    /// The layer that comes after those passed or failed.
    #[must_use]
    pub fn next_layer(&self) -> Option<Layer> {
        if self.in_place {
            return self.done.is_none().then_some(Layer::InPlace);
        }
        if let Some(only) = self.only {
            return self.done.is_none().then_some(only);
        }
        Layer::CLIMB.into_iter().find(|layer| self.done.is_none_or(|done| *layer > done))
    }

    /// Engine time at which the layers' time is up; what is left then is kept for killing and telling.
    pub(crate) fn end_ms(&self) -> u64 {
        self.began_ms.saturating_add(self.limits.of(CLIMB_WORK_MS))
    }

    /// Whether all that it could try was tried, or its time is up.
    pub(crate) fn is_over(&self, t: u64) -> bool {
        let spent = t >= self.end_ms() || self.reboots > MAX_REBOOTS;
        spent || (self.turn.is_none() && self.next_layer().is_none())
    }

    /// Whether layer 1 may have its second turn: its first start failed and showed something new.
    #[must_use]
    pub fn may_widen(&self, noticed: u64) -> bool {
        self.done == Some(Layer::Restore) && self.restore_noticed.is_some_and(|known| noticed > known)
    }
}

impl Turn {
    /// The step whose container may live.
    #[must_use]
    pub fn live_step(&self) -> Option<StepId> {
        match self.phase {
            Phase::Working { step, .. } | Phase::Ended { step, .. } => Some(step),
            Phase::Stuck
            | Phase::Emptied { .. }
            | Phase::Starting { .. }
            | Phase::Judging { .. }
            | Phase::Resumed { .. } => None,
        }
    }
}
