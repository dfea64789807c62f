//! Keeping a unit down: for a repair, and because its owner wants it so.
//!
//! A repair under systemd needs quiet: `Restart=always` would start the gateway in its middle. The step of layer 1, 2, 3
//! or 4 therefore holds the unit (docs/decisions/0007) before it stops it. The step's intent in the journal is the intent
//! of the hold too, and the hold's undo is the emptied container: whoever ends the step takes the hold back, be it this agent, the
//! next one after its death, or the agent's own end. While the step's container may live, nothing is released.
//!
//! A stop by `koboshi node stop` holds as well, and an agent that begins in a new boot does it again, because an enabled
//! unit is started by every boot. That hold is taken back by `koboshi node start` and by nothing else.
//!
//! An agent that only watches neither holds nor takes back, as it begins or later: whatever it finds stays. What the owner
//! asks for at the command line is his own doing and is done in either mode.

use super::{Agent, MANAGER_LIMIT};
use crate::config::Mode;
use engine::IncidentKind;
use host::clock::Deadline;
use host::service::Active;
use layers::Care;

impl Agent {
    /// The owner asked koboshi for the stop. One that was only obeyed (two bare stops) ends with the boot, as bare stops
    /// do.
    pub(super) fn stays_down(&self) -> bool {
        self.will.stopped && !self.will.by_stops
    }

    /// Takes a repair's hold back, unless its step may still be at work.
    pub(super) fn release(&mut self) {
        if takes_back(self.config.mode, self.step_may_work()) {
            self.release_now();
        }
    }

    /// The same at the owner's word.
    pub(super) fn release_for_the_owner(&mut self) {
        if !self.step_may_work() {
            self.release_now();
        }
    }

    fn step_may_work(&self) -> bool {
        let state = self.book.state();
        state.live_step().is_some() || !state.stuck.is_empty()
    }

    /// The same when it is known that no step is at work. Never against the owner's stop.
    pub(super) fn release_now(&mut self) {
        if self.stays_down() {
            return;
        }
        if let Err(e) = self.service.manager().release(Deadline::after(MANAGER_LIMIT)) {
            self.say(&e.to_string());
        }
    }

    /// An owner's stop is made true again: after a boot that started the unit, or when something else did.
    pub(super) fn keep_stopped(&mut self) {
        if !holds_down(self.config.mode, self.stays_down()) || self.service.embedded() {
            return;
        }
        let state = self.service.look(Deadline::after(MANAGER_LIMIT));
        if !state.known {
            return;
        }
        if !state.held
            && let Err(e) = self.service.manager().hold(Deadline::after(MANAGER_LIMIT))
        {
            self.say(&e.to_string());
        }
        let up = match state.active {
            Active::Active | Active::Activating | Active::AutoRestart => true,
            Active::Deactivating | Active::Inactive | Active::Failed | Active::Unknown => false,
        };
        if up {
            self.say(
                "the owner stopped the node: its unit, which was started all the same, is stopped again",
            );
            let limit = Deadline::after(layers::GRACE + super::runner::KILL_LIMIT);
            if let Err(e) = self.service.manager().stop(layers::GRACE, limit) {
                self.say(&e.to_string());
            }
        }
    }

    /// The gateway died and systemd is about to start it again, by default after 5 s. If what it would start is damaged
    /// and can be mended, the ladder goes first: its stop takes systemd's next try away. A clean disk is left to
    /// systemd. `true` when an incident has the node now.
    pub(super) fn before_the_next_try(&mut self) -> bool {
        if self.hands_off().is_some() || !self.places.store().is_dir() {
            return false;
        }
        // The quick look: systemd does not wait for a thorough one.
        let Some(exam) = self.examine_now(Care::Quick) else {
            return false;
        };
        let mendable = exam.unknown.is_none() && (exam.snapshot.is_some() || exam.rescue);
        let Some(finding) = exam.findings.iter().find(|f| super::incident::keeps_from_starting(f)) else {
            return false;
        };
        if !mendable || super::incident::outside(finding) {
            return false;
        }
        let cause = format!("the gateway ended, and its next start would fail: {}", finding.what);
        self.open_or_escalate_with(IncidentKind::Outage, cause, exam.findings.clone());
        true
    }
}

/// Whether a repair's hold is taken back now.
fn takes_back(mode: Mode, step_may_work: bool) -> bool {
    match mode {
        Mode::Guard => !step_may_work,
        Mode::Watch => false,
    }
}

/// Whether an owner's stop is made true again by holding and stopping.
fn holds_down(mode: Mode, stays_down: bool) -> bool {
    match mode {
        Mode::Guard => stays_down,
        Mode::Watch => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_only_watches_neither_holds_nor_takes_back() {
        for flag in [false, true] {
            assert!(!takes_back(Mode::Watch, flag) && !holds_down(Mode::Watch, flag));
        }
        assert!(takes_back(Mode::Guard, false) && !takes_back(Mode::Guard, true));
        assert!(holds_down(Mode::Guard, true) && !holds_down(Mode::Guard, false));
    }
}
