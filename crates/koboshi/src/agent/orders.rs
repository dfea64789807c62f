//! What a person asks of the running agent, and an agent that was begun for one such order.
//!
//! An order is answered at once: done, begun, or why not. What was begun goes through the journal and the engine like
//! everything else, so that the person may go away (Ctrl-C) at any moment: nothing is paused for an order, and whatever
//! was begun is ended by the same rules as ever.

use super::{Agent, DRAIN_LIMIT, MANAGER_LIMIT, runner};
use crate::control::{self, Order, Reply};
use engine::{Event, IncidentKind, Layer, Record, Verdict};
use host::clock::{self, Deadline};
use host::{Context, Error, Kind, Result};
use layers::{Care, Need};
use node::Judgement;
use std::time::Duration;

/// An agent begun for one layer: it opens and climbs nothing before it is told to, and nothing else after.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Errand {
    /// The order came.
    pub ordered: bool,
}

/// An agent on an errand ends with the command that began it, however that ends.
pub(super) fn end_with(parent: i32) -> Result<()> {
    let what = || "end with the command that began this agent".to_owned();
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM)).context(what)?;
    // It may have ended before we asked.
    if rustix::process::getppid().is_none_or(|now| now.as_raw_nonzero().get() != parent) {
        return Err(Error::new(Kind::System, what(), "that has ended already"));
    }
    Ok(())
}

impl Agent {
    pub(super) fn take_orders(&mut self) {
        for (id, order) in control::waiting(&self.places) {
            let reply = self.obey(&order);
            if let Err(e) = control::answer(&self.places, &id, &reply) {
                self.say(&e.to_string());
            }
        }
    }

    /// Does what a person asked for at the command line.
    fn obey(&mut self, order: &Order) -> Reply {
        let now = clock::now();
        let result = match order {
            Order::Stop { grace_s } => self.stop_for_the_owner(*grace_s),
            Order::Start => self.start_for_the_owner(),
            Order::Recover { only: None } => self.recover(),
            Order::Recover { only: Some(layer) } => self.recover_with(*layer),
            Order::Accept => {
                self.daily.accept(now);
                Ok("a new baseline is taken".to_owned())
            }
            Order::Snapshot { note } => {
                self.daily.snapshot_by_hand(now, note);
                Ok("a snapshot is being taken".to_owned())
            }
        };
        match result {
            Ok(done) => {
                self.say(&format!("by hand: {order:?}: {done}"));
                Reply { done: Some(done), error: None }
            }
            Err(e) => {
                self.say(&format!("by hand: {order:?}: {e}"));
                Reply { done: None, error: Some(format!("{}: {}", e.what, e.why)) }
            }
        }
    }

    fn stop_for_the_owner(&mut self, grace_s: u64) -> Result<String> {
        let limit = DRAIN_LIMIT + runner::KILL_LIMIT;
        self.home_stands_still();
        self.will.stopped = true;
        self.will.by_stops = false;
        let saved = self.will.save(&self.places);
        self.serving_since = None;
        self.judgement = None;
        saved?;
        // Held first: nothing starts it between its end and now. The stop is done even where it cannot be held.
        let held = self.service.manager().hold(Deadline::after(MANAGER_LIMIT));
        let grace = Duration::from_secs(grace_s).min(DRAIN_LIMIT);
        let stopped = self.service.manager().stop(grace, Deadline::after(limit))?;
        Ok(match held {
            Ok(()) => format!("{stopped:?}"),
            Err(e) => format!("{stopped:?}; its unit could not be held down: {e}"),
        })
    }

    fn start_for_the_owner(&mut self) -> Result<String> {
        self.guard_again()?;
        self.bare_stop = None;
        if self.node.gateway().is_some() {
            return Ok("it runs already".to_owned());
        }
        self.write(Record::new(clock::now(), Event::StartSeen { by: "the owner".to_owned() }));
        let at = clock::now();
        self.service.manager().clear_latch(Deadline::after(MANAGER_LIMIT))?;
        self.service.manager().start(Deadline::after(MANAGER_LIMIT))?;
        self.started(at);
        Ok("the start was asked for".to_owned())
    }

    /// The owner's stop is over.
    fn guard_again(&mut self) -> Result<()> {
        if self.will.stopped {
            self.will.stopped = false;
            self.will.by_stops = false;
            self.will.save(&self.places)?;
        }
        self.release_for_the_owner();
        Ok(())
    }

    fn recover(&mut self) -> Result<String> {
        self.nudges = self.nudges.saturating_add(1);
        if self.book.state().incident.is_some() {
            Ok("an incident is open; its next climb is brought forward".to_owned())
        } else if let Some(Judgement { verdict: Verdict::NotServing { why }, .. }) = &self.judgement {
            let why = why.clone();
            self.guard_again()?;
            self.open(IncidentKind::Outage, format!("asked for by hand: {why}"), Vec::new());
            Ok("an incident is open".to_owned())
        } else {
            self.exam_due = Some(clock::now());
            Ok("the node is not known to be down; its disk is looked at".to_owned())
        }
    }

    /// A climb of one layer: refused where it would have nothing to do, else begun at once.
    fn recover_with(&mut self, layer: Layer) -> Result<String> {
        let refuse = |why: String| Err(Error::new(Kind::Usage, format!("run the layer {layer} alone"), why));
        if let Some(climb) = self.book.state().climb() {
            return refuse(format!("climb {} is under way; it ends by itself", climb.number));
        }
        let serves = match self.judgement.as_ref().map(|j| &j.verdict) {
            Some(Verdict::Serving { .. }) => true,
            Some(Verdict::NotServing { .. }) => false,
            // No process is as down as it gets, whatever was last heard.
            Some(Verdict::Inconclusive { .. }) | None if self.node.gateway().is_none() => false,
            Some(Verdict::Inconclusive { why }) => {
                return refuse(format!("it is not known yet whether it serves: {why}"));
            }
            None => return refuse("it is not known yet whether it serves".to_owned()),
        };
        self.guard_again()?;
        if let Some(why) = self.hands_off() {
            return refuse(why);
        }
        let Some(exam) = self.examine_now(if serves { Care::Quick } else { Care::Down }) else {
            return refuse("the disk could not be looked at in time".to_owned());
        };
        let kind = match (layer == Layer::InPlace, serves) {
            (true, false) => {
                return refuse("the node does not serve: there is no in-place repair of it".to_owned());
            }
            (true, true) if exam.need == Need::InPlace => IncidentKind::Latent,
            (true, true) => return refuse("nothing on the disk can be mended in place".to_owned()),
            (false, true) if exam.need == Need::Nothing => {
                return refuse(
                    "it serves and its disk is whole; `koboshi node restart` restarts it".to_owned(),
                );
            }
            (false, true) => IncidentKind::Damage,
            (false, false) => IncidentKind::Outage,
        };
        if let Err(why) = self.would_apply(layer, kind) {
            return refuse(why);
        }
        if let Some(errand) = &mut self.errand {
            errand.ordered = true;
        }
        self.only = Some(layer);
        self.open_or_escalate_with(kind, format!("asked for by hand: {layer}"), exam.findings);
        if self.book.state().incident.is_none() {
            self.only = None;
            return refuse("no incident could be opened for it".to_owned());
        }
        self.doing = super::Doing::Nothing;
        Ok(format!("a climb of the layer {layer} alone begins"))
    }
}
