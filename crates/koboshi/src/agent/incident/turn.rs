//! A layer's turn: its step is spawned, ended for certain, and what it achieved is read from the disk.

use super::rungs::disk_allows_a_start;
use super::{ACT_LEAST, ASK_SUDO, CAME_BACK};
use crate::agent::Agent;
use crate::agent::daily::LOOK_LIMIT;
use crate::patient::{self, Service};
use crate::reinstall;
use crate::step::{Answer, Work};
use crate::sudo;
use engine::{Claim, Event, FaultKind, Finding, How, Layer, Moment, Record, StepId};
use host::clock::{self, Deadline};
use layers::install::{Moved, Pending};
use layers::{Care, Examination};
use std::time::Duration;

/// Stopping the gateway and one exchange.
const PEER_BACK_LIMIT: Duration = Duration::from_secs(20);

impl Agent {
    pub(super) fn spawn(&mut self, step: StepId, layer: Layer, wider: bool, deadline: Moment) {
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

    pub(super) fn kill(&mut self, step: StepId, layer: Layer) {
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
    pub(super) fn fresh_exam(&self) -> Option<Examination> {
        /// Stopping takes seconds; a look older than this is taken again.
        const FRESH_MS: u64 = 20_000;
        let (at, care) = self.exam_taken?;
        let fresh = clock::now().since_ms(at).is_some_and(|ms| ms < FRESH_MS);
        self.exam.clone().filter(|_| fresh && care == Care::Down)
    }

    /// A program from a peer that was never proven here does not stay when the node does not serve with it.
    pub(super) fn take_peer_copy_back(&mut self) {
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
    pub(super) fn why_it_failed(&mut self, layer: Layer) {
        let started = self.book.state().climb().and_then(|c| c.turn.as_ref()).is_some_and(|t| t.starts > 0);
        if layer == Layer::InPlace || !started {
            return;
        }
        if let Some(exam) = self.examine_now(Care::Thorough) {
            self.noticed(exam.findings);
        }
    }

    /// Which version the layers that make the program anew are to make.
    pub(in crate::agent) fn version_to_install(&self) -> Option<String> {
        let exam = self.exam.as_ref();
        let climb = self.book.state().incident.as_ref().map_or(0, |i| i.climbs);
        reinstall::to_install(
            &self.node,
            Some(self.judge.baseline()),
            exam.and_then(|e| e.version.as_deref()),
            exam.map(|e| e.findings.as_slice()).unwrap_or_default(),
            climb,
        )
    }

    /// Whether sudo would have root install, asked once for each climb by each agent, in a container: it may hang.
    pub(in crate::agent) fn ask_sudo(&mut self) {
        if !sudo::needed(&self.node, &self.places) {
            return;
        }
        // Its own patience ends first.
        let limit = sudo::ask_limit(self.config.ladder.limits()) + Duration::from_secs(1);
        self.sudo =
            Some(match self.runner.run(ASK_SUDO, Work::AskSudo { home: false }, &self.node, None, limit) {
                Ok(Answer::Failed { why, .. }) => Err(why),
                Ok(_) => Ok(()),
                Err(e) => Err(e.why),
            });
    }

    /// The node may run from elsewhere now, or from home again.
    pub(in crate::agent) fn follow_move(&mut self) {
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
    pub(super) fn take_back(&mut self, layer: Layer) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use engine::Rung;

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
}
