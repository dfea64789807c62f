//! What is written down: every fact and every intent, in the order in which it happened.
//!
//! A record is journaled *before* the act it announces and *after* the fact it reports. Nothing in it is a
//! conclusion drawn from an exit code: `How` is kept for people to read, and no rule of the fold looks at it
//! except to know that an attempt was lost without an answer.

use crate::limits::Limits;
use crate::state::State;
use crate::words::{Finding, Layer, Moment, Verdict};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Names a step and its container; grows by one, never used twice in one journal.
pub type StepId = u64;

/// Names one asked start of the gateway; counted together with steps, so never used twice either.
pub type StartId = u64;

/// One line of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// When it was written.
    pub at: Moment,
    /// The date for people (RFC 3339). No rule reads it: wall clocks jump.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wall: Option<String>,
    /// What happened, or what is about to be done.
    pub event: Event,
}

impl Record {
    /// A record without a date; the agent adds one as it writes.
    #[must_use]
    pub fn new(at: Moment, event: Event) -> Record {
        Record { at, wall: None, event }
    }
}

/// What kind of trouble an incident is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IncidentKind {
    /// The node does not serve.
    Outage,
    /// It serves, but what is broken needs an interruption (for example a database deleted under it).
    Damage,
    /// It serves, and what is broken can be repaired in place: no start, no interruption.
    Latent,
}

/// How a step ended. Recorded, never believed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "how")]
pub enum How {
    /// It exited by itself with this code.
    Exited {
        /// The exit code.
        code: i32,
    },
    /// A signal ended it.
    Signaled {
        /// The signal's number.
        signal: i32,
    },
    /// Its deadline passed while it ran.
    TimedOut,
    /// It could not be spawned.
    SpawnFailed {
        /// Why not.
        why: String,
    },
    /// It was no longer wanted: paused, or the incident escalated.
    Stopped,
    /// The agent that spawned it died; nobody knows how far it came.
    Vanished,
}

/// What the disk says after a step's container was proven empty: read by the agent itself, so that neither an
/// exit code nor the step's own words decide anything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "claim")]
pub enum Claim {
    /// The step left nothing worth a start: it failed, or there was nothing to change.
    Nothing {
        /// One line why.
        why: String,
    },
    /// There is something to start (for layer in-place: something was repaired).
    Ready {
        /// Hash of everything a start would now run with (program, runtime, config, scope of the repair).
        inputs: u64,
    },
}

/// The kinds of message an incident can send; each at most once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AlertKind {
    /// The incident was opened.
    Opening,
    /// All layers failed.
    Emergency,
    /// Damage could not be mended; the node still serves.
    InPlaceFailed,
    /// The journal cannot be written: only layer 0 is tried.
    Journal,
    /// The incident was closed: recovered or left alone.
    Closing,
}

/// Names one message for ever: the outbox keeps at most one of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AlertKey {
    /// The incident it tells of.
    pub incident: u64,
    /// Which of its messages.
    pub kind: AlertKind,
}

impl fmt::Display for AlertKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            AlertKind::Opening => "opening",
            AlertKind::Emergency => "emergency",
            AlertKind::InPlaceFailed => "in-place-failed",
            AlertKind::Journal => "journal",
            AlertKind::Closing => "closing",
        };
        write!(f, "{}-{kind}", self.incident)
    }
}

/// What became of a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "result")]
pub enum AlertResult {
    /// A channel took it.
    Accepted,
    /// It lies durably in the outbox, which goes on trying by itself.
    Queued,
    /// Neither sent nor queued; the engine asks for it again later.
    Refused {
        /// Why.
        why: String,
    },
}

/// What happened, or what is about to be done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type")]
pub enum Event {
    /// The judge's bad verdict, or damage found: an incident begins. Made with [`State::open`].
    Opened {
        /// Its number, one above the last.
        incident: u64,
        /// What kind of trouble.
        kind: IncidentKind,
        /// One line for people.
        cause: String,
        /// The evidence.
        findings: Vec<Finding>,
    },
    /// A latent incident became worse: from here on the ladder is climbed. Made with [`State::escalate`].
    Escalated {
        /// What it is now (not latent).
        kind: IncidentKind,
        /// One line for people.
        cause: String,
        /// The new evidence.
        findings: Vec<Finding>,
    },
    /// New evidence inside an open incident (the log of a failed start, a second look at the disk).
    Noticed {
        /// Only what was not known before.
        findings: Vec<Finding>,
    },
    /// A climb begins; its 600 s run from here.
    ClimbBegan {
        /// The incident's climbs are counted from 1.
        climb: u32,
        /// Whether layers that failed on the same inputs are tried again.
        full: bool,
        /// The one layer that a person asked for; the others have no turn in this climb.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        only: Option<Layer>,
        /// The limits it is climbed under; the contract's when it says nothing.
        #[serde(default, skip_serializing_if = "Limits::whole")]
        limits: Limits,
        /// Why now.
        why: String,
    },
    /// A layer is not tried in this climb.
    Passed {
        /// Which.
        layer: Layer,
        /// Why.
        reason: String,
    },
    /// A step is about to be spawned in a container of its own.
    Intent {
        /// Names the container.
        step: StepId,
        /// Whose work.
        layer: Layer,
        /// From 1; bounded by [`crate::MAX_ATTEMPTS`].
        attempt: u8,
        /// When the step is killed.
        deadline: Moment,
        /// What the layer's whole turn gets from here: work, kill, start and judge.
        turn_ms: u64,
        /// The rung's inputs at this moment.
        inputs: u64,
    },
    /// The step ended, timed out, was never born, or vanished with its agent.
    Ended {
        /// Which.
        step: StepId,
        /// How. Never believed.
        how: How,
    },
    /// The step's container was killed and proven empty.
    Emptied {
        /// Which.
        step: StepId,
        /// Processes that had to be killed.
        killed: u32,
        /// What the disk says now.
        claim: Claim,
    },
    /// The container could not be proven empty.
    KillFailed {
        /// Which.
        step: StepId,
        /// Why.
        why: String,
    },
    /// The gateway is about to be asked to start.
    StartIntent {
        /// Names the start.
        start: StartId,
        /// Whose start.
        layer: Layer,
        /// What it would run with; never equal to that of a failed one.
        inputs: u64,
    },
    /// The start was asked for.
    Started {
        /// Which.
        start: StartId,
        /// Set when the service manager refused.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// Somebody else (systemd's own restart, the owner) started the gateway: it counts in the ration.
    StartSeen {
        /// Who, as far as is known.
        by: String,
    },
    /// The judge's word.
    Judged {
        /// The verdict.
        verdict: Verdict,
        /// For `Serving`: the same for the whole confirm time. For `NotServing`: final, not one bad probe.
        confirmed: bool,
        /// Whether the damage that opened the incident is gone. Only damage and latent incidents ask.
        clean: bool,
    },
    /// A layer's turn is over without success.
    Failed {
        /// Which.
        layer: Layer,
        /// Why.
        why: String,
    },
    /// The node serves, but something it silenced itself is still silent: the climb is over, the incident
    /// stays open until that is released.
    Served {
        /// Whose doing; `None` when it came back by itself.
        layer: Option<Layer>,
        /// What is still less than whole.
        degraded: Vec<String>,
    },
    /// The incident is closed: the node serves, confirmed.
    Recovered {
        /// Whose doing; `None` when it came back by itself.
        layer: Option<Layer>,
        /// Whether emergency had been entered.
        from_emergency: bool,
    },
    /// All that could be tried was tried, or the time is up.
    Emergency {
        /// One line why.
        why: String,
        /// Time until the next climb, jitter included.
        retry_in_ms: u64,
        /// Hash of the outer evidence at this moment; a change brings the next climb forward.
        evidence: u64,
    },
    /// Damage could not be mended while the node serves, in place or by any layer; it is tried again later.
    Postponed {
        /// One line why.
        why: String,
        /// Time until the next try, jitter included.
        retry_in_ms: u64,
        /// As in `Emergency`.
        evidence: u64,
    },
    /// The incident is closed without a repair: paused, or the owner wants it so.
    LeftAlone {
        /// One line why.
        why: String,
    },
    /// The machine was rebooted under an open incident: containers are void, one attempt is spent.
    Rebooted,
    /// A message is about to be handed over.
    AlertIntent {
        /// Which.
        key: AlertKey,
        /// From 1.
        attempt: u32,
    },
    /// What became of it. Accepted may follow queued.
    AlertDone {
        /// Which.
        key: AlertKey,
        /// What became of it.
        result: AlertResult,
    },
    /// The whole state; the first record of a rewritten journal.
    Checkpoint {
        /// The fold of everything before.
        state: Box<State>,
    },
}
