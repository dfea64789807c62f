//! The engine, or a mutant of it.
//!
//! A mutant bends what goes into the engine, what comes out of it, or its state, so that the engine itself needs
//! no fault points: what is simulated without a mutant is, call for call, the engine that ships.

#![allow(clippy::wildcard_enum_match_arm)] // Each mutant bends one thing; to name what the others leave alone says nothing.

use engine::state::{Fate, HoldKind, Phase};
use engine::{
    Action, AlertKind, Claim, Event, How, Illegal, IncidentKind, Ladder, Layer, Limits, Moment, Record,
    Stage, State, Verdict,
};

/// One way of being wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// The container is not killed after its step ended.
    NoKillAfterExit,
    /// The container of a step lost with its agent is not killed before the next attempt.
    NoKillOfLost,
    /// The step is spawned before its intent is durable.
    SpawnBeforeIntent,
    /// The start is asked for before its intent is durable.
    StartBeforeIntent,
    /// Exit code 0 is success.
    ExitCodeBelieved,
    /// Any other exit code is failure.
    ExitCodeBlamed,
    /// The climb never ages.
    NoTotalDeadline,
    /// Nothing is kept for killing and telling.
    NoReserve,
    /// A step may take all the time there is.
    GreedyWork,
    /// A message is recorded but not handed over.
    AlertNotSent,
    /// A refused message counts as queued.
    RefusedIsQueued,
    /// An emergency is told again and again.
    MessageTwice,
    /// An emergency is told a quarter of an hour late.
    LateAlert,
    /// The closing is not told.
    NoClosing,
    /// An attempt that vanished costs nothing.
    VanishedFree,
    /// A reboot costs nothing and gives the budget back.
    RebootFree,
    /// One good probe is a confirmation.
    ConfirmationSkipped,
    /// Damage is taken for gone.
    CleanAssumed,
    /// Silenced channels are taken for whole.
    DegradedIsWhole,
    /// A confirmed serving node is climbed on.
    ServingInterrupted,
    /// Starts are not rationed.
    NoRation,
    /// Starts by others are not rationed.
    OuterStartsFree,
    /// A rewritten journal forgets the starts.
    CheckpointForgetsStarts,
    /// A start that failed is repeated.
    EqualStarts,
    /// A layer is tried again on the inputs on which it failed.
    FailedInputsForgotten,
    /// Work that left nothing is started all the same.
    StartAnyway,
    /// Layer 1 gets its second turn without new evidence.
    WiderWithoutEvidence,
    /// A layer that applies is left out.
    LayerSkipped,
    /// The 30-minute climbs try no more than the others.
    NeverFull,
    /// The next climb begins too early.
    EagerRetry,
    /// There is no next climb.
    NoRetry,
    /// A node that comes back in emergency is not noticed.
    DeafInEmergency,
    /// Hands are never off.
    PauseIgnored,
    /// Without a journal all layers are tried.
    JournalIgnored,
    /// A start in progress is ended to be retried.
    StartInterrupted,
    /// Latent damage is climbed for.
    LatentClimbs,
    /// A fall under latent damage does not escalate.
    NoEscalation,
    /// A container that would not die is forgotten.
    SecondContainer,
    /// Something that is not ours is killed.
    KillsStranger,
    /// A damaged node's serving does not count: what could not be mended is told as an emergency.
    DamageIsEmergency,
    /// A fall is told as damage of a node that serves.
    FallIsDamage,
    /// A climb that was asked for one layer tries them all.
    AskedTriesAll,
    /// Limits that are configured to be divided are not.
    LimitsForgotten,
}

impl Mutant {
    /// Every mutant.
    pub const ALL: [Mutant; 43] = [
        Mutant::NoKillAfterExit,
        Mutant::NoKillOfLost,
        Mutant::SpawnBeforeIntent,
        Mutant::StartBeforeIntent,
        Mutant::ExitCodeBelieved,
        Mutant::ExitCodeBlamed,
        Mutant::NoTotalDeadline,
        Mutant::NoReserve,
        Mutant::GreedyWork,
        Mutant::AlertNotSent,
        Mutant::RefusedIsQueued,
        Mutant::MessageTwice,
        Mutant::LateAlert,
        Mutant::NoClosing,
        Mutant::VanishedFree,
        Mutant::RebootFree,
        Mutant::ConfirmationSkipped,
        Mutant::CleanAssumed,
        Mutant::DegradedIsWhole,
        Mutant::ServingInterrupted,
        Mutant::NoRation,
        Mutant::OuterStartsFree,
        Mutant::CheckpointForgetsStarts,
        Mutant::EqualStarts,
        Mutant::FailedInputsForgotten,
        Mutant::StartAnyway,
        Mutant::WiderWithoutEvidence,
        Mutant::LayerSkipped,
        Mutant::NeverFull,
        Mutant::EagerRetry,
        Mutant::NoRetry,
        Mutant::DeafInEmergency,
        Mutant::PauseIgnored,
        Mutant::JournalIgnored,
        Mutant::StartInterrupted,
        Mutant::LatentClimbs,
        Mutant::NoEscalation,
        Mutant::SecondContainer,
        Mutant::KillsStranger,
        Mutant::DamageIsEmergency,
        Mutant::FallIsDamage,
        Mutant::AskedTriesAll,
        Mutant::LimitsForgotten,
    ];

    /// Its name, as in `docs/simulation.md`.
    #[must_use]
    pub fn name(self) -> String {
        let mut name = String::new();
        for letter in format!("{self:?}").chars() {
            if letter.is_ascii_uppercase() && !name.is_empty() {
                name.push('-');
            }
            name.push(letter.to_ascii_lowercase());
        }
        name
    }

    /// The mutant of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Mutant> {
        Mutant::ALL.into_iter().find(|mutant| mutant.name() == name)
    }
}

/// The engine, or one mutant of it.
#[derive(Debug, Clone, Default)]
pub struct Brain {
    mutant: Option<Mutant>,
    code: Option<i32>,
}

impl Brain {
    /// The engine itself, or that mutant.
    #[must_use]
    pub fn new(mutant: Option<Mutant>) -> Brain {
        Brain { mutant, code: None }
    }

    /// Whether it is that mutant; asked by the agent for those that sit in its loop.
    #[must_use]
    pub fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    /// [`engine::next`], bent.
    #[must_use]
    pub fn next(&mut self, state: &State, ladder: &Ladder, now: Moment) -> Action {
        let Some(mutant) = self.mutant else { return engine::next(state, ladder, now) };
        let mut ladder = ladder.clone();
        match mutant {
            Mutant::PauseIgnored => ladder.hands_off = None,
            Mutant::JournalIgnored => ladder.journal_ok = true,
            Mutant::StartInterrupted => ladder.start.progressing = false,
            Mutant::LimitsForgotten => ladder.limits = Limits::default(),
            Mutant::LayerSkipped => {
                for rung in ladder.rungs.iter_mut().filter(|rung| rung.layer == Layer::UserInstall) {
                    rung.applies = Err("nobody knows".to_owned());
                }
            }
            _ => {}
        }
        let mut action = engine::next(state, &ladder, now);
        match (mutant, &mut action) {
            (Mutant::KillsStranger, Action::Kill { step, .. }) => *step = 9_000_000,
            (Mutant::NeverFull, Action::Note { record }) => {
                if let Event::ClimbBegan { full, .. } = &mut record.event {
                    *full = false;
                }
            }
            (Mutant::DamageIsEmergency | Mutant::FallIsDamage, Action::Note { record }) => {
                let damage = state.incident.as_ref().is_some_and(|one| one.kind == IncidentKind::Damage);
                record.event = match record.event.clone() {
                    Event::Postponed { why, retry_in_ms, evidence }
                        if damage && mutant == Mutant::DamageIsEmergency =>
                    {
                        Event::Emergency { why, retry_in_ms, evidence }
                    }
                    Event::Emergency { why, retry_in_ms, evidence }
                        if damage && mutant == Mutant::FallIsDamage =>
                    {
                        Event::Postponed { why, retry_in_ms, evidence }
                    }
                    other => other,
                };
            }
            (Mutant::GreedyWork, Action::Spawn { intent, deadline: told, .. }) => {
                if let (Event::Intent { deadline, turn_ms, .. }, Some(climb)) =
                    (&mut intent.event, state.climb())
                {
                    let spent_ms = state.time_ms(now).saturating_sub(climb.began_ms);
                    *turn_ms = climb.limits.of(engine::CLIMB_WORK_MS).saturating_sub(spent_ms);
                    *deadline = now.plus_ms(*turn_ms);
                    *told = *deadline;
                }
            }
            _ => {}
        }
        action
    }

    /// [`engine::apply`], bent.
    ///
    /// # Errors
    /// As the engine's.
    pub fn apply(&mut self, state: &mut State, record: &Record) -> Result<(), Illegal> {
        let Some(mutant) = self.mutant else { return engine::apply(state, record) };
        let mut record = record.clone();
        if let Event::Ended { how, .. } = &record.event {
            self.code = if let How::Exited { code } = how { Some(*code) } else { None };
        }
        self.bend_record(mutant, &mut record.event);
        let deaf = mutant == Mutant::DeafInEmergency && state.in_emergency();
        if deaf && matches!(record.event, Event::Judged { .. }) {
            return Ok(());
        }
        if let Some(incident) = &mut state.incident {
            // The fold would refuse what these two tell: it is lied to.
            match (mutant, &record.event) {
                (Mutant::DamageIsEmergency, Event::Emergency { .. }) => incident.word = None,
                (Mutant::FallIsDamage, Event::Postponed { .. }) => {
                    incident.word = Some(engine::state::Word {
                        verdict: Verdict::Serving { degraded: Vec::new() },
                        confirmed: true,
                        clean: false,
                        at_ms: state.clock_ms,
                    });
                }
                _ => {}
            }
        }
        engine::apply(state, &record)?;
        self.bend_state(mutant, state, &record.event);
        Ok(())
    }

    fn bend_record(&self, mutant: Mutant, event: &mut Event) {
        match (mutant, event) {
            (Mutant::ConfirmationSkipped, Event::Judged { verdict, confirmed, .. }) => {
                *confirmed |= verdict.is_serving();
            }
            (Mutant::ServingInterrupted, Event::Judged { verdict, confirmed, .. }) => {
                *confirmed &= !verdict.is_serving();
            }
            (Mutant::CleanAssumed, Event::Judged { clean, .. }) => *clean = true,

            (Mutant::DegradedIsWhole, Event::Judged { verdict: Verdict::Serving { degraded }, .. }) => {
                degraded.clear();
            }
            (Mutant::ExitCodeBlamed, Event::Emptied { claim, .. })
                if self.code.is_some_and(|code| code != 0) =>
            {
                *claim = Claim::Nothing { why: "it exited badly".to_owned() };
            }
            (Mutant::StartAnyway, Event::Emptied { step, claim, .. }) => {
                if let Claim::Nothing { .. } = claim {
                    *claim = Claim::Ready { inputs: 0xABCD ^ *step };
                }
            }
            _ => {}
        }
    }

    fn bend_state(&mut self, mutant: Mutant, state: &mut State, event: &Event) {
        let clock_ms = state.clock_ms;
        match (mutant, event) {
            (Mutant::NoRation, _) => state.starts_ms.clear(),
            (Mutant::OuterStartsFree, Event::StartSeen { .. }) => {
                state.starts_ms.pop();
            }
            (Mutant::SecondContainer, _) => state.stuck.clear(),
            (Mutant::NoClosing, _) => state.alerts.retain(|alert| alert.key.kind != AlertKind::Closing),
            (Mutant::LateAlert, Event::Emergency { .. }) => {
                for alert in state.alerts.iter_mut().filter(|alert| alert.key.kind == AlertKind::Emergency) {
                    alert.tries = alert.tries.max(1);
                    alert.tried_ms = clock_ms + 900_000;
                }
            }
            (Mutant::MessageTwice, Event::Emergency { .. }) => {
                for alert in state.alerts.iter_mut().filter(|alert| alert.key.kind == AlertKind::Emergency) {
                    alert.fate = Fate::Wanted;
                    alert.tried_ms = 0;
                }
            }
            _ => {}
        }
        let Some(incident) = &mut state.incident else { return };
        match (mutant, event) {
            (Mutant::ExitCodeBelieved, Event::Emptied { .. }) if self.code == Some(0) => {
                incident.word = Some(engine::state::Word {
                    verdict: Verdict::Serving { degraded: Vec::new() },
                    confirmed: true,
                    clean: true,
                    at_ms: clock_ms,
                });
            }
            (Mutant::EqualStarts, _) => incident.failed_starts.clear(),
            (Mutant::FailedInputsForgotten, _) => incident.failed_inputs.clear(),
            (Mutant::WiderWithoutEvidence, Event::Failed { layer: Layer::Restore, .. }) => {
                incident.noticed += 1;
                incident.failed_inputs.clear();
                incident.failed_starts.clear();
            }
            (Mutant::LatentClimbs, Event::Opened { .. }) => incident.kind = IncidentKind::Outage,
            (Mutant::NoEscalation, Event::Escalated { .. }) => incident.kind = IncidentKind::Latent,
            _ => {}
        }
        match (&mut incident.stage, mutant, event) {
            (Stage::Holding(hold), Mutant::EagerRetry, _) if hold.kind == HoldKind::Emergency => {
                hold.retry_ms = hold.retry_ms.min(hold.since_ms + engine::EVIDENCE_GAP_MS);
            }
            (Stage::Holding(hold), Mutant::NoRetry, _) => {
                hold.retry_ms = u64::MAX;
            }
            (Stage::Climbing(climb), Mutant::AskedTriesAll, Event::ClimbBegan { .. }) => climb.only = None,
            (Stage::Climbing(climb), Mutant::NoTotalDeadline, _) => climb.began_ms = clock_ms,
            (Stage::Climbing(climb), Mutant::NoReserve, Event::ClimbBegan { .. }) => {
                climb.began_ms += engine::RESERVE_MS + 12_000;
            }
            (Stage::Climbing(climb), Mutant::RebootFree, Event::Rebooted) => {
                climb.began_ms = clock_ms;
                climb.reboots = 0;
                if let Some(turn) = &mut climb.turn {
                    turn.attempts = 0;
                    turn.end_ms = clock_ms + 70_000;
                }
            }
            (Stage::Climbing(climb), Mutant::VanishedFree, Event::Ended { .. }) => {
                if let Some(turn) = &mut climb.turn
                    && matches!(turn.phase, Phase::Ended { lost: true, .. })
                {
                    turn.attempts = 0;
                }
            }
            _ => {}
        }
    }
}
