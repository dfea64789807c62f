//! Decides. Pure: no I/O, no clock, no randomness.
//!
//! The state is the fold of the journal. [`apply`] is the one function that says which record may follow which,
//! live and on replay; [`next`] says what to do. There is no crash recovery: a restarted agent folds the
//! journal and asks `next`, and everything that its predecessor left half done is found by that.
//!
//! # The driving loop
//!
//! ```text
//!            journal ──fold──► State            world ──look──► Ladder (rungs, holding, start, flags)
//!                                │                                │
//!                                └───────────► next(State, Ladder, now) ──► Action
//!                                                                             │
//!   ┌─────────────────────────────────────────────────────────────────────────┘
//!   │ write(record) = apply to a clone of the state, append durably, then let the clone be the state
//!   ▼
//!   Note{record}          write it; ask again
//!   Spawn{intent, step}   write intent; spawn in container step-N; hold it     (not spawned: Ended SpawnFailed)
//!   Wait{step, until}     wait for exit or until; write Ended{how}
//!   Kill{step}            kill container step-N, prove it empty, read the disk; write Emptied{claim}
//!                         (not proven: KillFailed). Also for a step nobody holds. Then hold nothing.
//!   Start{intent, start}  write intent; ask the service manager; write Started{error?}
//!   Judge{look, until}    let the judge look; write Judged when its word is confirmed, at the latest at until
//!   Alert{intent, key}    write intent; hand to the outbox under that key, at most ALERT_ACT_MS; write AlertDone
//!   Idle{until}           go on judging as in daily life; write Opened, Escalated, Noticed, StartSeen, Judged
//!                         as they come; ask again then or at until
//! ```
//!
//! Rules for the caller:
//! * One thing at a time: ask `next` only when the action before is done, with a fresh `Ladder`. While a `Wait`
//!   or `Judge` runs, facts may be written (`Noticed`, `StartSeen`, `Escalated`) and the wait broken off: ask again.
//! * A record that cannot be appended is *not* applied: set `journal_ok = false`, go on with the fold in memory
//!   (and in `/run`), ask again. When the disk takes records again, write [`State::checkpoint`] first.
//! * A fresh agent folds the journal and first writes [`State::wake`], if it gives a record.
//! * `holding` is the step this very process spawned and has not yet killed. Nothing else is ever held.
//! * A rung's work stops the gateway for certain before it touches what the gateway uses; the engine only asks
//!   for starts. A start is asked for at most once per `Start`.
//! * While hands are off, an incident is opened only if [`State::left_alone`] is false for that reason.
//! * In an open incident the judge's words are written whatever the action, whenever [`State::wants_word`] says
//!   so; `clean` says whether the damage is gone (true when there was none).
//!
//! # An incident
//!
//! ```text
//!  Opened ─► Fresh ─ClimbBegan─► Climbing ──────────────── Recovered ─────────────► closed
//!              ▲                 │ each layer in turn:          ▲
//!              │ Escalated       │   Passed{reason}             │ confirmed Serving, nothing silenced
//!              │ (latent only)   │   Intent─Ended─Emptied──┐    │
//!              │                 │     ▲ lost: 2nd attempt │    │
//!              │                 │     └───────────────────┤    │
//!              │                 │   claim Ready: StartIntent─Started─Judged ─┤
//!              │                 │   claim Nothing: one look of 3 s ──────────┤
//!              │                 │   Failed{why} ─► next layer                │
//!              │                 └─ all done, or 570 s ─► Emergency (hold) ───┤   LeftAlone ─► closed
//!              └──── hold ◄── in place only ─► Postponed (hold) ──────────────┤   (paused, owner's will,
//!                     │  5, 15, then every 30 min, or new evidence            │    from anywhere once every
//!                     └─ ClimbBegan ─► Climbing                               │    container is empty)
//!                                       Served{degraded} (hold) ◄─────────────┘
//! ```
//!
//! # Budget
//!
//! A climb has [`CLIMB_MS`] from its first record to `Recovered` (or `Served`) or `Emergency`, of which the last
//! [`RESERVE_MS`] belong to killing what is left and to the alert. A layer's turn ends at
//! `600 - 30 - sum of the least slices of later layers that apply`; its work gets what the start's least leaves.
//! While a start progresses in a node whose files verify, all later slices are lent to it; when it stalls, the
//! layers come back with what is left. At the end of the time a start that still progresses is left alone.
//!
//! The constants below are the contract. [`Limits`] divides those of them that are koboshi's own, for drills: the caller
//! gives them with the [`Ladder`], a climb keeps the ones that its first record carries.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

mod fold;
pub mod ladder;
mod limits;
mod plan;
pub mod record;
pub mod state;
pub mod summary;
pub mod words;

pub use fold::apply;
pub use ladder::{Ladder, Rung, StartLook};
pub use limits::{Limits, MOST_DIVISOR};
pub use plan::{Action, Look, Planned, next, preview};
pub use record::{
    AlertKey, AlertKind, AlertResult, Claim, Event, How, IncidentKind, Record, StartId, StepId,
};
pub use state::{Illegal, Incident, Stage, State};
pub use words::{Class, FaultKind, Finding, Layer, Moment, Outcome, Verdict};

/// A climb's hard limit, from its first record to `Recovered` or `Emergency`.
pub const CLIMB_MS: u64 = 600_000;

/// Of which this much is kept for killing what is left and for the alert.
pub const RESERVE_MS: u64 = 30_000;

/// What the layers share.
pub const CLIMB_WORK_MS: u64 = CLIMB_MS - RESERVE_MS;

/// One look of the judge after work that gave nothing to start.
pub const LOOK_MS: u64 = 3_000;

/// Time for the judge to confirm a good look: 3 probes over 5 s, and some air.
pub const CONFIRM_MS: u64 = 10_000;

/// A judge's good word decides for this long. Its agent may have died since, and the node may have fallen.
pub const WORD_FRESH_MS: u64 = 12_000;

/// Work attempts per turn: the second is for one that was lost with its agent or to a reboot. Bounds crash loops.
pub const MAX_ATTEMPTS: u8 = 2;

/// Reboots in one climb before it ends in emergency: engine time stands still across them.
pub const MAX_REBOOTS: u32 = 4;

/// Kills of one container that prove nothing before its layer is given up.
pub const MAX_KILLS: u8 = 3;

/// Between two kills of a container that would not die.
pub const STUCK_RETRY_MS: u64 = 60_000;

/// Starts in any window; a fourth unclean boot would come up with its channels silent.
pub const MAX_STARTS_IN_WINDOW: usize = 3;

/// The window.
pub const START_WINDOW_MS: u64 = 300_000;

/// Times from the end of a climb to the next; the last one repeats.
pub const RETRY_MS: [u64; 3] = [300_000, 900_000, 1_800_000];

/// The jitter given by the caller is a share of this part (1/10) of the retry time.
pub const JITTER_PART: u64 = 10;

/// Changed evidence brings a climb forward, but not sooner than this after the last, so that flapping
/// evidence does not become a loop.
pub const EVIDENCE_GAP_MS: u64 = 60_000;

/// The most that handing over one message may take.
pub const ALERT_ACT_MS: u64 = 10_000;

/// First wait after a refused message; doubles.
pub const ALERT_RETRY_MS: u64 = 5_000;

/// Longest wait between two tries of a message.
pub const ALERT_RETRY_MOST_MS: u64 = 600_000;
