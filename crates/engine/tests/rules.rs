//! The ladder's rules, one by one, on a scripted node; and the legality function under arbitrary records.
#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)] // Helpers of tests are tests too.

use engine::{
    Action, AlertKey, AlertKind, AlertResult, Claim, Event, FaultKind, Finding, How, IncidentKind, Ladder,
    Layer, Limits, Moment, Record, Rung, State, Verdict, apply, next, preview,
};
use proptest::prelude::*;

fn at(ms: u64) -> Moment {
    Moment { boot: 1, ms }
}

fn ladder() -> Ladder {
    Ladder::new(Layer::CLIMB.into_iter().map(|layer| Rung::new(layer, Ok(()), layer as u64)).collect())
}

/// What a step, and the start after it, do.
#[derive(Clone, Copy)]
struct Script {
    /// Work: milliseconds, or never.
    work_ms: Option<u64>,
    /// A start: milliseconds until it serves, or never (silent).
    start_ms: Option<u64>,
}

/// Drives the engine as an agent would, with a node that follows the script. Returns the records.
fn climb(script: Script, ladder: &mut Ladder, kind: IncidentKind) -> (State, Vec<Record>) {
    let mut state = State::default();
    let mut journal = Vec::new();
    let mut now = 1_000;
    let mut begun = 0;
    let mut started = None;
    let opened = state.open(at(now), kind, "it fell", Vec::new()).unwrap();
    write(&mut state, &mut journal, opened);
    for _ in 0..500 {
        match next(&state, ladder, at(now)) {
            Action::Note { record } => {
                let over = matches!(
                    record.event,
                    Event::Recovered { .. } | Event::Emergency { .. } | Event::Postponed { .. }
                );
                write(&mut state, &mut journal, record);
                if over {
                    return (state, journal);
                }
            }
            Action::Spawn { intent, step, .. } => {
                write(&mut state, &mut journal, intent);
                ladder.holding = Some(step);
                begun = now;
                started = None;
            }
            Action::Wait { step, until, .. } => {
                let done = script.work_ms.map(|work| begun + work).filter(|done| *done <= until.ms);
                now = done.unwrap_or(until.ms);
                let how = if done.is_some() { How::Exited { code: 0 } } else { How::TimedOut };
                write(&mut state, &mut journal, Record::new(at(now), Event::Ended { step, how }));
            }
            Action::Kill { step, .. } => {
                ladder.holding = None;
                let claim = match script.work_ms {
                    Some(_) => Claim::Ready { inputs: 100 + step },
                    None => Claim::Nothing { why: "it hung".to_owned() },
                };
                write(
                    &mut state,
                    &mut journal,
                    Record::new(at(now), Event::Emptied { step, killed: 0, claim }),
                );
            }
            Action::Start { intent, start, .. } => {
                write(&mut state, &mut journal, intent);
                started = Some(now);
                write(&mut state, &mut journal, Record::new(at(now), Event::Started { start, error: None }));
            }
            Action::Judge { until, .. } => {
                let good = started.zip(script.start_ms).map(|(from, takes)| from + takes);
                let good = good.filter(|good| *good <= until.ms);
                now = good.unwrap_or(until.ms);
                let verdict = match good {
                    Some(_) => Verdict::Serving { degraded: Vec::new() },
                    None => Verdict::Inconclusive { why: "silent".to_owned() },
                };
                let judged = Event::Judged { verdict, confirmed: good.is_some(), clean: true };
                write(&mut state, &mut journal, Record::new(at(now), judged));
            }
            Action::Alert { intent, key } => {
                write(&mut state, &mut journal, intent);
                let done = Event::AlertDone { key, result: AlertResult::Queued };
                write(&mut state, &mut journal, Record::new(at(now), done));
            }
            Action::Idle { until } => now = until.map_or(now + 1_000, |until| until.ms),
        }
    }
    panic!("the climb has no end");
}

fn write(state: &mut State, journal: &mut Vec<Record>, record: Record) {
    apply(state, &record).unwrap_or_else(|why| panic!("{why}: {record:?}"));
    journal.push(record);
}

fn took(journal: &[Record]) -> u64 {
    let began = journal.iter().find(|record| matches!(record.event, Event::ClimbBegan { .. })).unwrap();
    journal.last().unwrap().at.ms - began.at.ms
}

fn work_ms(journal: &[Record], layer: Layer) -> u64 {
    journal
        .iter()
        .find_map(|record| match record.event {
            Event::Intent { layer: known, deadline, .. } if known == layer => {
                Some(deadline.ms - record.at.ms)
            }
            _ => None,
        })
        .unwrap()
}

#[test]
fn if_all_work_hangs_both_npm_runs_get_their_full_time_and_the_alert_its_reserve() {
    let (state, journal) =
        climb(Script { work_ms: None, start_ms: None }, &mut ladder(), IncidentKind::Outage);
    assert!(state.in_emergency());
    assert!(work_ms(&journal, Layer::SystemInstall) >= 120_000);
    assert!(work_ms(&journal, Layer::UserInstall) >= 120_000);
    assert!(took(&journal) <= 545_000, "{}", took(&journal));
}

#[test]
fn divided_limits_shorten_a_climb_as_a_whole() {
    let whole = climb(Script { work_ms: None, start_ms: None }, &mut ladder(), IncidentKind::Outage);
    for divisor in 2..=engine::MOST_DIVISOR {
        let mut ladder = ladder();
        ladder.limits = Limits::divided(divisor).unwrap();
        let by = u64::from(divisor);
        let (state, journal) =
            climb(Script { work_ms: None, start_ms: None }, &mut ladder, IncidentKind::Outage);
        assert!(state.in_emergency());
        assert!(work_ms(&journal, Layer::SystemInstall) >= 120_000 / by);
        assert!(took(&journal) <= 545_000 / by + 100, "{divisor}: {}", took(&journal));
        let order = |journal: &[Record]| -> Vec<Layer> {
            let failed = |record: &Record| match record.event {
                Event::Failed { layer, .. } | Event::Passed { layer, .. } => Some(layer),
                _ => None,
            };
            journal.iter().filter_map(failed).collect()
        };
        assert_eq!(order(&journal), order(&whole.1), "each layer has its turn, in the same order");
        // Whatever the caller says meanwhile, what was begun under these limits is folded and ended under them.
        assert_eq!(State::replay(&journal).unwrap(), state);
    }
    assert_eq!(Limits::divided(0), None);
    assert_eq!(Limits::divided(engine::MOST_DIVISOR + 1), None);
}

#[test]
fn a_climb_keeps_the_limits_it_began_under() {
    let mut state = State::default();
    let mut journal = Vec::new();
    let mut ladder = ladder();
    let opened = state.open(at(0), IncidentKind::Outage, "it fell", Vec::new()).unwrap();
    write(&mut state, &mut journal, opened);
    state.alerts.clear();
    let Action::Note { record } = next(&state, &ladder, at(1)) else { panic!() };
    write(&mut state, &mut journal, record);
    // The configuration changes under the climb: a new agent divides.
    ladder.limits = Limits::divided(10).unwrap();
    let Action::Spawn { deadline, .. } = next(&state, &ladder, at(2)) else { panic!() };
    assert_eq!(deadline.ms, 2 + 10_000, "a restart's work gets what it was promised");
    assert!(matches!(next(&state, &ladder, at(59_000)), Action::Spawn { .. }));
    // Records without limits are of the whole ones: journals of before fold as they did.
    let old = serde_json::to_string(&journal).unwrap();
    assert!(!old.contains("limits"), "{old}");
    let absurd = r#"{"at":{"boot":1,"ms":3},"event":{"type":"climb-began","climb":1,"full":false,"limits":0,"why":""}}"#;
    let mut fresh = State::replay(journal.iter().take(1)).unwrap();
    assert!(
        apply(&mut fresh, &serde_json::from_str(absurd).unwrap()).is_err(),
        "nothing is divided by nothing"
    );
}

#[test]
fn a_start_that_serves_at_the_end_of_its_turn_is_confirmed_and_not_interrupted() {
    let mut state = State::default();
    let mut journal = Vec::new();
    let ladder = ladder();
    let opened = state.open(at(0), IncidentKind::Outage, "it fell", Vec::new()).unwrap();
    write(&mut state, &mut journal, opened);
    state.alerts.clear();
    let Action::Note { record } = next(&state, &ladder, at(0)) else { panic!() };
    write(&mut state, &mut journal, record);
    let Action::Spawn { intent, step, .. } = next(&state, &ladder, at(0)) else { panic!() };
    write(&mut state, &mut journal, intent);
    for event in [
        Event::Ended { step, how: How::Exited { code: 0 } },
        Event::Emptied { step, killed: 0, claim: Claim::Ready { inputs: 9 } },
    ] {
        write(&mut state, &mut journal, Record::new(at(1_000), event));
    }
    let Action::Start { intent, start, .. } = next(&state, &ladder, at(1_000)) else { panic!() };
    write(&mut state, &mut journal, intent);
    write(&mut state, &mut journal, Record::new(at(1_000), Event::Started { start, error: None }));
    let Action::Judge { until, .. } = next(&state, &ladder, at(1_000)) else { panic!() };
    // It serves a second before its turn ends: too late for three probes over five seconds.
    let verdict = Verdict::Serving { degraded: Vec::new() };
    let seen = Event::Judged { verdict: verdict.clone(), confirmed: false, clean: true };
    write(&mut state, &mut journal, Record::new(at(until.ms - 1_000), seen));
    assert!(matches!(next(&state, &ladder, at(until.ms + 4_000)), Action::Judge { .. }));
    let mut sure = state.clone();
    let word = Event::Judged { verdict, confirmed: true, clean: true };
    write(&mut sure, &mut Vec::new(), Record::new(at(until.ms + 4_000), word));
    let Action::Note { record } = next(&sure, &ladder, at(until.ms + 4_000)) else { panic!() };
    assert!(matches!(record.event, Event::Recovered { layer: Some(Layer::Restart), .. }), "{record:?}");
    // One good look that nothing follows is no reason to wait for ever.
    let Action::Note { record } = next(&state, &ladder, at(until.ms + 9_000)) else { panic!() };
    assert!(matches!(record.event, Event::Failed { .. }), "{record:?}");
}

#[test]
fn if_every_start_hangs_every_layer_has_its_turn_and_the_climb_its_end() {
    let script = Script { work_ms: Some(9_000), start_ms: None };
    let (state, journal) = climb(script, &mut ladder(), IncidentKind::Outage);
    assert!(state.in_emergency());
    let starts: Vec<u64> = journal
        .iter()
        .filter(|record| matches!(record.event, Event::StartIntent { .. }))
        .map(|record| record.at.ms)
        .collect();
    assert_eq!(starts.len(), 5, "each layer starts once: {starts:?}");
    assert!(starts.windows(4).all(|four| four[3] - four[0] >= 300_000), "{starts:?}");
    assert!(took(&journal) <= 600_000 - 30_000 + 100, "{}", took(&journal));
}

#[test]
fn starts_that_fail_at_once_wait_for_the_ration() {
    let mut ladder = ladder();
    for rung in &mut ladder.rungs {
        rung.start_least_ms = 1_000;
    }
    let (_, journal) = climb(Script { work_ms: Some(10), start_ms: None }, &mut ladder, IncidentKind::Outage);
    let starts: Vec<u64> = journal
        .iter()
        .filter(|record| matches!(record.event, Event::StartIntent { .. }))
        .map(|record| record.at.ms)
        .collect();
    assert!(starts.windows(4).all(|four| four[3] - four[0] >= 300_000), "{starts:?}");
}

#[test]
fn the_first_layer_that_the_judge_accepts_ends_the_climb() {
    let script = Script { work_ms: Some(2_000), start_ms: Some(15_000) };
    let (state, journal) = climb(script, &mut ladder(), IncidentKind::Outage);
    assert!(state.incident.is_none());
    assert_eq!(state.closed.as_ref().unwrap().layer, Some(Layer::Restart));
    assert_eq!(took(&journal), 17_000);
}

#[test]
fn a_slow_start_that_progresses_gets_the_later_layers_slices() {
    let mut ladder = ladder();
    ladder.start = engine::StartLook { alive: true, progressing: true, intact: true };
    let mut state = State::default();
    let mut journal = Vec::new();
    let opened = state.open(at(0), IncidentKind::Outage, "it fell", Vec::new()).unwrap();
    write(&mut state, &mut journal, opened);
    write(
        &mut state,
        &mut journal,
        Record::new(
            at(0),
            Event::ClimbBegan {
                climb: 1,
                full: false,
                only: None,
                limits: Limits::default(),
                why: String::new(),
            },
        ),
    );
    // Somebody's start is under way: it is waited for to the end of the climb's work.
    match next(&state, &ladder, at(1)) {
        Action::Alert { .. } => {}
        other => panic!("the opening is told while a start is waited for, not {other:?}"),
    }
    state.alerts.clear();
    assert_eq!(
        next(&state, &ladder, at(1)),
        Action::Judge { layer: None, look: engine::Look::Start, until: at(570_000) }
    );
    ladder.start.progressing = false;
    assert!(matches!(next(&state, &ladder, at(100_000)), Action::Spawn { layer: Layer::Restart, .. }));
}

#[test]
fn latent_damage_is_never_started_for_and_escalates_when_the_node_falls() {
    let mut ladder = ladder();
    ladder.rungs.push(Rung::new(Layer::InPlace, Ok(()), 7));
    let mut state = State::default();
    let mut journal = Vec::new();
    let opened = state.open(at(0), IncidentKind::Latent, "a file is gone", Vec::new()).unwrap();
    write(&mut state, &mut journal, opened);
    let Action::Note { record } = next(&state, &ladder, at(1)) else { panic!() };
    write(&mut state, &mut journal, record);
    let Action::Spawn { intent, layer, step, .. } = next(&state, &ladder, at(2)) else { panic!() };
    assert_eq!(layer, Layer::InPlace);
    write(&mut state, &mut journal, intent);
    ladder.holding = Some(step);
    let worse = state.escalate(at(3), IncidentKind::Outage, "it fell", Vec::new()).unwrap();
    write(&mut state, &mut journal, worse);
    // The step that works in place is ended and its container emptied before the ladder is climbed.
    let Action::Note { record } = next(&state, &ladder, at(4)) else { panic!() };
    assert_eq!(record.event, Event::Ended { step, how: How::Stopped });
    write(&mut state, &mut journal, record);
    assert_eq!(next(&state, &ladder, at(5)), Action::Kill { step, layer: Layer::InPlace });
    let emptied = Event::Emptied { step, killed: 1, claim: Claim::Nothing { why: "ended".to_owned() } };
    write(&mut state, &mut journal, Record::new(at(6), emptied));
    ladder.holding = None;
    let Action::Note { record } = next(&state, &ladder, at(7)) else { panic!() };
    assert!(matches!(record.event, Event::ClimbBegan { climb: 2, .. }));
}

#[test]
fn without_a_journal_only_a_restart_is_planned() {
    let mut ladder = ladder();
    assert!(preview(&ladder).iter().all(|planned| planned.passed.is_none()));
    assert_eq!(preview(&ladder).last().unwrap().end_ms, 570_000);
    ladder.journal_ok = false;
    let tried: Vec<Layer> = preview(&ladder)
        .into_iter()
        .filter(|planned| planned.passed.is_none())
        .map(|planned| planned.layer)
        .collect();
    assert_eq!(tried, [Layer::Restart]);
}

#[test]
fn a_paused_incident_is_left_alone_with_one_message() {
    let mut ladder = ladder();
    ladder.hands_off = Some("paused".to_owned());
    let mut state = State::default();
    let mut journal = Vec::new();
    let opened = state.open(at(0), IncidentKind::Outage, "it fell", Vec::new()).unwrap();
    write(&mut state, &mut journal, opened);
    let Action::Note { record } = next(&state, &ladder, at(1)) else { panic!() };
    write(&mut state, &mut journal, record);
    let wanted: Vec<AlertKind> = state.alerts.iter().map(|alert| alert.key.kind).collect();
    assert_eq!(wanted, [AlertKind::Closing]);
    assert!(state.left_alone("paused"));
}

#[test]
fn damage_that_nothing_can_mend_is_no_emergency_while_the_node_serves() {
    let mut ladder = Ladder::new(Vec::new());
    let mut state = State::default();
    let mut journal = Vec::new();
    let opened = state.open(at(0), IncidentKind::Damage, "a database is gone", Vec::new()).unwrap();
    write(&mut state, &mut journal, opened);
    let mut now = 1;
    // Every layer is passed; then it is asked whether the node serves.
    let until = loop {
        match next(&state, &ladder, at(now)) {
            Action::Note { record } => write(&mut state, &mut journal, record),
            Action::Alert { .. } => state.alerts.clear(),
            Action::Judge { until, .. } => break until,
            other => panic!("{other:?}"),
        }
        now += 1;
    };
    assert!(!state.in_emergency() && until.ms <= 600_000);
    let judged = |verdict| Event::Judged { verdict, confirmed: true, clean: false };
    let serving = judged(Verdict::Serving { degraded: Vec::new() });
    let fell = judged(Verdict::NotServing { why: "gone".to_owned() });
    let mut fallen = state.clone();
    apply(&mut fallen, &Record::new(at(now), fell)).unwrap();
    let Action::Note { record } = next(&fallen, &ladder, at(now)) else { panic!() };
    assert!(matches!(record.event, Event::Emergency { .. }), "{record:?}");

    write(&mut state, &mut journal, Record::new(at(now), serving));
    let mut lie = state.clone();
    let emergency = Event::Emergency { why: String::new(), retry_in_ms: 1, evidence: 0 };
    assert!(apply(&mut lie, &Record::new(at(now), emergency)).is_err());
    let Action::Note { record } = next(&state, &ladder, at(now)) else { panic!() };
    assert!(matches!(record.event, Event::Postponed { .. }), "{record:?}");
    write(&mut state, &mut journal, record);
    assert!(state.damage_waits());
    let wanted: Vec<AlertKind> = state.alerts.iter().map(|alert| alert.key.kind).collect();
    assert_eq!(wanted, [AlertKind::InPlaceFailed], "one notice, and it is no emergency");
    // It waits for its time; if it falls meanwhile, it is climbed for at once.
    state.alerts.clear();
    let Action::Idle { until: Some(until) } = next(&state, &ladder, at(now + 1)) else { panic!() };
    assert!(until.ms > 240_000);
    let worse = state.escalate(at(now + 2), IncidentKind::Outage, "it fell", Vec::new()).unwrap();
    write(&mut state, &mut journal, worse);
    ladder.rungs.push(Rung::new(Layer::Restart, Ok(()), 1));
    let Action::Note { record } = next(&state, &ladder, at(now + 3)) else { panic!() };
    assert!(matches!(record.event, Event::ClimbBegan { .. }));
}

#[test]
fn one_layer_that_was_asked_for_is_tried_alone_and_then_all_of_them() {
    let mut ladder = ladder();
    let mut state = State::default();
    let mut journal = Vec::new();
    let opened = state.open(at(0), IncidentKind::Outage, "it fell", Vec::new()).unwrap();
    write(&mut state, &mut journal, opened);
    state.alerts.clear();
    ladder.only = Some(Layer::InPlace);
    let Action::Note { record } = next(&state, &ladder, at(1)) else { panic!() };
    assert!(matches!(record.event, Event::ClimbBegan { only: None, .. }), "not for a node that is down");
    ladder.only = Some(Layer::SystemInstall);
    let Action::Note { record } = next(&state, &ladder, at(1)) else { panic!() };
    let asked = Event::ClimbBegan {
        climb: 1,
        full: false,
        only: Some(Layer::SystemInstall),
        limits: Limits::default(),
        why: "asked for by hand".to_owned(),
    };
    assert_eq!(record.event, asked);
    write(&mut state, &mut journal, record);
    ladder.only = None;
    let Action::Spawn { intent, layer, step, .. } = next(&state, &ladder, at(2)) else { panic!() };
    assert_eq!(layer, Layer::SystemInstall);
    write(&mut state, &mut journal, intent);
    for event in [
        Event::Ended { step, how: How::TimedOut },
        Event::Emptied { step, killed: 1, claim: Claim::Nothing { why: "it hung".to_owned() } },
        Event::Failed { layer, why: "it hung".to_owned() },
    ] {
        write(&mut state, &mut journal, Record::new(at(150_000), event));
    }
    let emergency = Event::Emergency { why: String::new(), retry_in_ms: 1, evidence: 0 };
    assert!(apply(&mut state.clone(), &Record::new(at(150_001), emergency)).is_err());
    let Action::Note { record } = next(&state, &ladder, at(150_001)) else { panic!() };
    assert!(matches!(record.event, Event::ClimbBegan { climb: 2, only: None, .. }), "{record:?}");
    write(&mut state, &mut journal, record);
    assert!(matches!(next(&state, &ladder, at(150_002)), Action::Spawn { layer: Layer::Restart, .. }));
}

fn finding() -> Finding {
    Finding { kind: FaultKind::Notice, class: None, what: "x".to_owned(), evidence: Vec::new() }
}

fn layers() -> impl Strategy<Value = Layer> {
    prop_oneof![
        Just(Layer::InPlace),
        Just(Layer::Restart),
        Just(Layer::Restore),
        Just(Layer::SystemInstall),
        Just(Layer::Emergency)
    ]
}

fn verdicts() -> impl Strategy<Value = Verdict> {
    prop_oneof![
        Just(Verdict::Serving { degraded: Vec::new() }),
        Just(Verdict::Serving { degraded: vec!["channels".to_owned()] }),
        Just(Verdict::NotServing { why: String::new() }),
        Just(Verdict::Inconclusive { why: String::new() }),
    ]
}

fn kinds() -> impl Strategy<Value = IncidentKind> {
    prop_oneof![Just(IncidentKind::Outage), Just(IncidentKind::Damage), Just(IncidentKind::Latent)]
}

fn claims() -> impl Strategy<Value = Claim> {
    prop_oneof![
        Just(Claim::Nothing { why: String::new() }),
        (0u64..3).prop_map(|inputs| Claim::Ready { inputs })
    ]
}

fn events() -> impl Strategy<Value = Event> {
    let small = 0u64..4;
    let keys = (0u64..3).prop_map(|incident| AlertKey { incident, kind: AlertKind::Opening });
    prop_oneof![
        (0u64..4, kinds()).prop_map(|(incident, kind)| Event::Opened {
            incident,
            kind,
            cause: String::new(),
            findings: vec![finding()]
        }),
        kinds().prop_map(|kind| Event::Escalated { kind, cause: String::new(), findings: Vec::new() }),
        (0u32..4, any::<bool>(), prop::option::of(layers()), 1u32..=engine::MOST_DIVISOR).prop_map(
            |(climb, full, only, divisor)| Event::ClimbBegan {
                climb,
                full,
                only,
                limits: Limits::divided(divisor).unwrap_or_default(),
                why: String::new()
            }
        ),
        layers().prop_map(|layer| Event::Passed { layer, reason: String::new() }),
        (small.clone(), layers(), 0u8..4, any::<u64>(), any::<u64>()).prop_map(
            |(step, layer, attempt, until, turn_ms)| Event::Intent {
                step,
                layer,
                attempt,
                deadline: at(until % 900_000),
                turn_ms,
                inputs: 1
            }
        ),
        small.clone().prop_map(|step| Event::Ended { step, how: How::Vanished }),
        (small.clone(), claims()).prop_map(|(step, claim)| Event::Emptied { step, killed: 0, claim }),
        small.clone().prop_map(|step| Event::KillFailed { step, why: String::new() }),
        (small.clone(), layers(), 0u64..3).prop_map(|(start, layer, inputs)| Event::StartIntent {
            start,
            layer,
            inputs
        }),
        small.prop_map(|start| Event::Started { start, error: None }),
        (verdicts(), any::<bool>(), any::<bool>()).prop_map(|(verdict, confirmed, clean)| Event::Judged {
            verdict,
            confirmed,
            clean
        }),
        layers().prop_map(|layer| Event::Failed { layer, why: String::new() }),
        Just(Event::Recovered { layer: None, from_emergency: false }),
        Just(Event::Served { layer: None, degraded: vec!["channels".to_owned()] }),
        any::<u64>().prop_map(|retry_in_ms| Event::Emergency {
            why: String::new(),
            retry_in_ms,
            evidence: 0
        }),
        Just(Event::LeftAlone { why: String::new() }),
        Just(Event::Rebooted),
        (keys.clone(), 0u32..3).prop_map(|(key, attempt)| Event::AlertIntent { key, attempt }),
        keys.prop_map(|key| Event::AlertDone { key, result: AlertResult::Queued }),
    ]
}

proptest! {
    /// Whatever is written in whatever order: nothing panics, what is refused leaves no trace, what is accepted
    /// folds again to the same state, and `next` has an answer that the fold accepts.
    #[test]
    fn refused_records_leave_no_trace(
        steps in prop::collection::vec((events(), 0u64..400_000, prop::bool::weighted(0.03)), 0..120)
    ) {
        let mut state = State::default();
        let mut accepted = Vec::new();
        let (mut boot, mut ms) = (1, 0u64);
        for (event, gap, reboot) in steps {
            ms += gap % 5_000 + if gap > 390_000 { gap } else { 0 };
            if reboot {
                boot += 1;
                ms = 0;
            }
            let moment = Moment { boot, ms };
            let before = state.clone();
            let record = Record::new(moment, event);
            match apply(&mut state, &record) {
                Ok(()) => accepted.push(record),
                Err(_) => prop_assert_eq!(&state, &before),
            }
            if let Action::Note { record } = next(&state, &ladder(), moment) {
                let mut then = state.clone();
                prop_assert!(apply(&mut then, &record).is_ok(), "the engine asks for what it forbids: {:?}", record);
                // Half of what the engine asks for is done, so that the walk gets somewhere.
                if gap % 2 == 0 {
                    state = then;
                    accepted.push(record);
                }
            }
        }
        prop_assert_eq!(State::replay(&accepted), Ok(state));
    }
}
