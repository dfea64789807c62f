//! The state is the fold of the journal, and [`apply`] is the one function that says which record may follow
//! which: live, before a record is written, and again on replay.
//!
//! Every arm of `apply` checks everything first and changes the state afterwards, so a refused record leaves
//! no trace. Times inside the state are *engine time*: milliseconds that run with the clock within a boot and
//! stand still across reboots, so that a budget after a reboot is what was left at the last record.

use crate::limits::Limits;
use crate::record::{AlertKey, Claim, Event, IncidentKind, Record, StepId};
use crate::words::{Finding, Layer, Moment, Outcome, Verdict};
use crate::{MAX_STARTS_IN_WINDOW, START_WINDOW_MS, apply};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Findings kept of one incident; later ones are counted only, so that no loop of evidence grows the state.
pub const MAX_FINDINGS: usize = 64;

/// Messages remembered; the oldest settled ones go first. Five kinds for a handful of incidents.
pub const MAX_ALERTS: usize = 32;

/// Starts remembered: more than the ration ever looks at, so that a crash loop of systemd's cannot grow it.
pub const MAX_START_MARKS: usize = 16;

/// Failed inputs remembered per incident; the oldest go first.
pub const MAX_FAILED_INPUTS: usize = 64;

/// A record that may not follow what was written before. Live: the caller acts on an outdated state; on
/// replay: the journal is not ours or not whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Illegal {
    /// The rule that forbids it, as half a sentence.
    pub rule: &'static str,
}

impl fmt::Display for Illegal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "record refused: {}", self.rule)
    }
}

impl std::error::Error for Illegal {}

/// Everything that is known from the journal.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Records folded, checkpoints' predecessors included.
    pub seq: u64,
    /// When the last record was written.
    pub last: Option<Moment>,
    /// Engine time of the last record.
    pub clock_ms: u64,
    /// The last id given to a step or start.
    pub ids: u64,
    /// The number of the last incident.
    pub incidents: u64,
    /// Engine times of the last starts, oldest first, whoever asked for them.
    pub starts_ms: Vec<u64>,
    /// Containers that could not be proven empty. Their layers are passed until they are.
    pub stuck: Vec<Stuck>,
    /// The open incident.
    pub incident: Option<Incident>,
    /// The last closed one.
    pub closed: Option<Closed>,
    /// Messages: wanted, under way, or settled and not yet forgotten.
    pub alerts: Vec<Alert>,
}

/// A container that would not die.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stuck {
    /// Which.
    pub step: StepId,
    /// Whose.
    pub layer: Layer,
    /// Engine time of the last try.
    pub tried_ms: u64,
}

/// From the first bad verdict to the closing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Incident {
    /// Its number.
    pub id: u64,
    /// What kind of trouble it is now.
    pub kind: IncidentKind,
    /// One line for people.
    pub cause: String,
    /// The evidence, bounded.
    pub findings: Vec<Finding>,
    /// How many findings there were, those beyond the bound included: growth is new evidence.
    pub noticed: u64,
    /// When it was opened.
    pub opened: Moment,
    /// The same in engine time.
    pub opened_ms: u64,
    /// Climbs begun.
    pub climbs: u32,
    /// Climbs that the schedule asked for (a climb brought forward by evidence does not count).
    pub scheduled: u32,
    /// Whether emergency was entered.
    pub emergency: bool,
    /// Inputs on which a layer failed since the last full climb began.
    pub failed_inputs: Vec<(Layer, u64)>,
    /// Inputs of failed starts since the last full climb began.
    pub failed_starts: Vec<u64>,
    /// The judge's last word since the last step or start.
    pub word: Option<Word>,
    /// What is being done.
    pub stage: Stage,
}

/// The judge's word, reduced to what decides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Word {
    /// The verdict.
    pub verdict: Verdict,
    /// Confirmed, or final.
    pub confirmed: bool,
    /// The damage is gone.
    pub clean: bool,
    /// Engine time.
    pub at_ms: u64,
}

/// Where an open incident stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "stage")]
pub enum Stage {
    /// Opened or escalated; the climb begins at once.
    Fresh,
    /// A climb is under way.
    Climbing(Climb),
    /// Waiting: for the next climb, or for a release.
    Holding(Hold),
}

/// One pass of the ladder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Climb {
    /// From 1.
    pub number: u32,
    /// Layers that failed on the same inputs are tried again.
    pub full: bool,
    /// Only layer in-place: the node serves.
    pub in_place: bool,
    /// Only this layer: a person asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub only: Option<Layer>,
    /// The limits that its first record carries.
    #[serde(default, skip_serializing_if = "Limits::whole")]
    pub limits: Limits,
    /// Engine time of its first record.
    pub began_ms: u64,
    /// Reboots during it.
    pub reboots: u32,
    /// The last layer passed or failed.
    pub done: Option<Layer>,
    /// What was known when layer restore had a start that failed: more now means a wider scope may follow.
    pub restore_noticed: Option<u64>,
    /// The layer whose turn it is.
    pub turn: Option<Turn>,
}

/// One layer's turn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// Whose.
    pub layer: Layer,
    /// The rung's inputs when it began.
    pub inputs: u64,
    /// Whether this is layer 1's second turn, with a wider scope.
    pub wider: bool,
    /// Attempts spent, lost ones and reboots included.
    pub attempts: u8,
    /// Starts asked for.
    pub starts: u8,
    /// Starts that nobody saw through: the agent died before it knew, or the machine rebooted.
    pub voided: u8,
    /// Engine time at which the turn is over unless a start holds it.
    pub end_ms: u64,
    /// What is being done.
    pub phase: Phase,
}

/// Where a turn stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "phase")]
pub enum Phase {
    /// The step's intent is written; its container may live.
    Working {
        /// Which.
        step: StepId,
        /// Engine time at which it is killed.
        deadline_ms: u64,
    },
    /// The wait is over; its container may still live.
    Ended {
        /// Which.
        step: StepId,
        /// The attempt was lost without an answer (vanished, not spawned).
        lost: bool,
        /// Kills that proved nothing.
        kills: u8,
    },
    /// Its container would not die.
    Stuck,
    /// Its container is proven empty.
    Emptied {
        /// Engine time.
        at_ms: u64,
        /// The attempt was lost without an answer.
        lost: bool,
        /// What the disk says.
        claim: Claim,
    },
    /// A start's intent is written; whether it was asked for is known when `Started` is.
    Starting {
        /// Which.
        start: u64,
        /// With what.
        inputs: u64,
    },
    /// The start was asked for and is judged.
    Judging {
        /// Engine time of `Started`.
        at_ms: u64,
        /// With what.
        inputs: u64,
        /// The service manager refused.
        refused: bool,
    },
    /// The machine was rebooted under the turn: first look what came up by itself.
    Resumed {
        /// Engine time.
        at_ms: u64,
    },
}

/// What an open incident waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// For what.
    pub kind: HoldKind,
    /// Engine time at which it began.
    pub since_ms: u64,
    /// Engine time of the next climb (never, for a degraded node).
    pub retry_ms: u64,
    /// Hash of the outer evidence then; `None` after a reboot, which is new evidence by itself.
    pub evidence: Option<u64>,
    /// The layer whose start was left alone and may still succeed, or whose doing the serving is.
    pub layer: Option<Layer>,
}

/// The three ways of waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HoldKind {
    /// Layer 5: alert, answer, keep trying.
    Emergency,
    /// Damage could not be mended; the node serves.
    Latent,
    /// The node serves and will be whole when it releases itself.
    Degraded,
}

/// A closed incident.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closed {
    /// Its number.
    pub id: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// Whose doing; `None` when it came back by itself or was left alone.
    pub layer: Option<Layer>,
    /// Whether emergency had been entered.
    pub from_emergency: bool,
    /// The trouble was only ever latent damage: the node never stopped serving.
    #[serde(default)]
    pub uninterrupted: bool,
    /// One line for people: the cause, or why it was left alone.
    pub why: String,
    /// When it was opened.
    pub opened: Moment,
    /// When it was closed.
    pub closed: Moment,
    /// Engine time between the two.
    pub took_ms: u64,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alert {
    /// Which.
    pub key: AlertKey,
    /// Times it was handed over.
    pub tries: u32,
    /// Engine time of the last of them.
    pub tried_ms: u64,
    /// What is known of it.
    pub fate: Fate,
}

/// What is known of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// To be sent.
    Wanted,
    /// Handed over; no answer recorded (yet, or because the agent died).
    Sending,
    /// In the outbox, which goes on by itself.
    Queued,
    /// Taken by a channel.
    Accepted,
}

impl State {
    /// Folds a whole journal.
    ///
    /// # Errors
    /// The index of the first record that may not follow what was before it, and the rule.
    pub fn replay<'a>(records: impl IntoIterator<Item = &'a Record>) -> Result<State, (usize, Illegal)> {
        let mut state = State::default();
        for (index, record) in records.into_iter().enumerate() {
            apply(&mut state, record).map_err(|illegal| (index, illegal))?;
        }
        Ok(state)
    }

    /// The whole state as one record, with which a rewritten journal begins.
    #[must_use]
    pub fn checkpoint(&self, now: Moment) -> Record {
        Record::new(now, Event::Checkpoint { state: Box::new(self.clone()) })
    }

    /// The record that opens an incident; `None` when one is open already.
    /// A caller that is paused or in watch mode may open it all the same: it is then left alone at once, which
    /// is told with one message.
    #[must_use]
    pub fn open(
        &self,
        now: Moment,
        kind: IncidentKind,
        cause: impl Into<String>,
        findings: Vec<Finding>,
    ) -> Option<Record> {
        self.incident.is_none().then(|| {
            let incident = self.incidents.saturating_add(1);
            Record::new(now, Event::Opened { incident, kind, cause: cause.into(), findings })
        })
    }

    /// Whether the last incident was left alone for this very reason: while hands stay off for it, a caller opens
    /// no other, so that the owner is told once and not by every restarted agent.
    #[must_use]
    pub fn left_alone(&self, why: &str) -> bool {
        self.closed.as_ref().is_some_and(|closed| closed.outcome == Outcome::LeftAlone && closed.why == why)
    }

    /// The record that escalates an open incident of a node that serves: latent damage, or damage that could not be
    /// mended; `None` when there is none or it was escalated before.
    #[must_use]
    pub fn escalate(
        &self,
        now: Moment,
        kind: IncidentKind,
        cause: impl Into<String>,
        findings: Vec<Finding>,
    ) -> Option<Record> {
        self.incident
            .as_ref()
            .is_some_and(|incident| incident.may_become(kind))
            .then(|| Record::new(now, Event::Escalated { kind, cause: cause.into(), findings }))
    }

    /// The record with which an agent begins in a new boot under an open incident, before it writes anything
    /// else; `None` when there is nothing to say. (`next` asks for the same.)
    #[must_use]
    pub fn wake(&self, now: Moment) -> Option<Record> {
        let rebooted = self.last.is_some_and(|last| last.boot != now.boot);
        (rebooted && self.incident.is_some()).then(|| Record::new(now, Event::Rebooted))
    }

    /// Whether a word of the judge is news to the open incident: it differs from the last one, or would close the
    /// incident if that were not too old to count. Only confirmed words are ever news by themselves.
    #[must_use]
    pub fn wants_word(&self, now: Moment, verdict: &Verdict, confirmed: bool, clean: bool) -> bool {
        let Some(incident) = self.incident.as_ref().filter(|_| confirmed) else { return false };
        let Some(word) = &incident.word else { return true };
        let same = word.verdict == *verdict && word.confirmed && word.clean == clean;
        let degraded_hold = match &incident.stage {
            Stage::Holding(hold) => hold.kind == HoldKind::Degraded,
            Stage::Fresh | Stage::Climbing(_) => false,
        };
        let closes = match verdict {
            Verdict::Serving { degraded } => degraded.is_empty() || !degraded_hold,
            Verdict::NotServing { .. } | Verdict::Inconclusive { .. } => false,
        };
        let t = self.time_ms(now);
        // At the end of a climb for damage a fresh word says what is to be told.
        let climbing = matches!(incident.stage, Stage::Climbing(_));
        let decides = climbing && incident.still_serves(word.at_ms) && !incident.still_serves(t);
        !same || decides || (closes && incident.served(word.at_ms) && !incident.served(t))
    }

    /// Engine time at `now`.
    #[must_use]
    pub fn time_ms(&self, now: Moment) -> u64 {
        let ran_ms = self.last.and_then(|last| now.since_ms(last)).unwrap_or(0);
        self.clock_ms.saturating_add(ran_ms)
    }

    /// The message with this key, if it is remembered.
    #[must_use]
    pub fn alert(&self, key: AlertKey) -> Option<&Alert> {
        self.alerts.iter().find(|alert| alert.key == key)
    }

    /// Engine time from which a start is within the ration; `time_ms` itself when it is now.
    #[must_use]
    pub fn start_free_ms(&self, time_ms: u64) -> u64 {
        let recent: Vec<u64> = self
            .starts_ms
            .iter()
            .copied()
            .filter(|start| start.saturating_add(START_WINDOW_MS) > time_ms)
            .collect();
        match recent.len().checked_sub(MAX_STARTS_IN_WINDOW) {
            None => time_ms,
            // The one that has to leave the window before another fits in.
            Some(over) => recent.get(over).map_or(time_ms, |start| start.saturating_add(START_WINDOW_MS)),
        }
    }

    /// The climb under way.
    #[must_use]
    pub fn climb(&self) -> Option<&Climb> {
        match self.incident.as_ref().map(|incident| &incident.stage) {
            Some(Stage::Climbing(climb)) => Some(climb),
            Some(Stage::Fresh | Stage::Holding(_)) | None => None,
        }
    }

    /// Whether the open incident waits because its damage could not be mended while the node serves.
    #[must_use]
    pub fn damage_waits(&self) -> bool {
        self.incident.as_ref().is_some_and(Incident::damage_waits)
    }

    /// Whether the node is in emergency now.
    #[must_use]
    pub fn in_emergency(&self) -> bool {
        match self.incident.as_ref().map(|incident| &incident.stage) {
            Some(Stage::Holding(hold)) => hold.kind == HoldKind::Emergency,
            Some(Stage::Fresh | Stage::Climbing(_)) | None => false,
        }
    }

    /// The step whose container may live.
    #[must_use]
    pub fn live_step(&self) -> Option<(StepId, Layer)> {
        let turn = self.climb()?.turn.as_ref()?;
        turn.live_step().map(|step| (step, turn.layer))
    }
}
