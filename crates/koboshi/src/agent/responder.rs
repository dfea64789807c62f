//! The voice on the gateway's port: started once an emergency is told, ended before anything else is begun.
//!
//! The agent is the first to end it; the process itself watches for starts that the agent does not know of, and dies
//! with the agent. Whenever it ended by itself it stays away for a while: whoever is starting the gateway needs some
//! time before the port is taken.

use super::{Agent, runner};
use engine::state::{Fate, Stage};
use engine::{AlertKind, Event, Moment, Verdict};
use host::clock::{self, Deadline};
use host::container::{Ended, Limits, OutputFile, Spec, Step};
use host::run::Ids;
use node::probe::{ServiceLook, ServicePhase};
use node::signs;
use std::os::fd::BorrowedFd;

/// The name of its container.
pub(super) const CONTAINER: &str = "responder";
/// Somebody may be starting the gateway: a start by hand is seen by its lock after 10 to 20 s, and as long as it loads
/// its program the responder would end again.
const REST_AFTER_SIGN_MS: u64 = 60_000;
/// Our own look at the disk was at work and may have opened the file.
const REST_AFTER_OWN_LOOK_MS: u64 = 10_000;
/// The port is somebody else's, or the process cannot be started.
const REST_AFTER_FAILURE_MS: u64 = 60_000;
/// It says one line, when it ends.
const OUTPUT_LIMIT_BYTES: u64 = 16 << 10;
/// It needs 3 MB and one thread.
const LIMITS: Limits = Limits { memory_bytes: Some(64 << 20), pids: Some(8) };

/// The process, and when it may be started again.
#[derive(Debug, Default)]
pub(super) struct Responder {
    step: Option<Step>,
    rest_until: Option<Moment>,
    /// That the port is another's is told once.
    refused: bool,
}

impl Responder {
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.step.as_ref().map(Step::pidfd)
    }

    /// When to think of it again.
    pub(super) fn again(&self, now: Moment) -> Option<Moment> {
        self.rest_until.filter(|at| at.boot == now.boot && at.ms > now.ms)
    }

    fn rest(&mut self, now: Moment, ms: u64) {
        self.rest_until = Some(now.plus_ms(ms));
    }
}

/// Whether this record stands before something that needs the port, or tells of it.
pub(super) fn gives_way_to(event: &Event) -> bool {
    match event {
        Event::ClimbBegan { .. }
        | Event::Intent { .. }
        | Event::StartIntent { .. }
        | Event::StartSeen { .. }
        | Event::Served { .. }
        | Event::Recovered { .. }
        | Event::LeftAlone { .. } => true,
        Event::Opened { .. }
        | Event::Escalated { .. }
        | Event::Noticed { .. }
        | Event::Passed { .. }
        | Event::Ended { .. }
        | Event::Emptied { .. }
        | Event::KillFailed { .. }
        | Event::Started { .. }
        | Event::Judged { .. }
        | Event::Failed { .. }
        | Event::Emergency { .. }
        | Event::Postponed { .. }
        | Event::Rebooted
        | Event::AlertIntent { .. }
        | Event::AlertDone { .. }
        | Event::Checkpoint { .. } => false,
    }
}

/// Whether no start of the unit's is near its port, where the judge says that it does not serve. A start that the judge has
/// given up and that has no main process hangs in what comes before it (an `ExecStartPre` that never ends), perhaps for
/// ever; once that process is there the gateway still loads for ten seconds, and by then the responder is gone.
fn nobody_needs_the_port(look: &ServiceLook) -> bool {
    match look.phase {
        ServicePhase::Down => true,
        ServicePhase::Starting => look.main.is_none(),
        ServicePhase::Running | ServicePhase::Stopping | ServicePhase::Unknown => false,
    }
}

impl Agent {
    /// Starts it, ends it, or leaves it, as things are now.
    pub(super) fn tend_responder(&mut self) {
        let now = clock::now();
        if let Some(ended) = self.responder.step.as_mut().and_then(Step::look) {
            self.responder_ended(now, ended);
        }
        let wanted = self.responder_wanted(now);
        match (wanted, self.responder.step.is_some()) {
            (false, true) => self.end_responder(),
            (true, false) if self.responder.again(now).is_none() => self.start_responder(now),
            (true, _) | (false, false) => {}
        }
    }

    /// Ends it and proves it gone. Milliseconds.
    pub(super) fn end_responder(&mut self) {
        if let Some(mut step) = self.responder.step.take()
            && let Err(e) = step.kill(Deadline::after(runner::KILL_LIMIT))
        {
            self.say(&e.to_string());
        }
    }

    /// An emergency holds and is told, nothing is climbed, and nobody starts or runs a gateway.
    fn responder_wanted(&self, now: Moment) -> bool {
        let state = self.book.state();
        let Some(incident) = state.incident.as_ref().filter(|_| state.in_emergency()) else {
            return false;
        };
        let told = state
            .alerts
            .iter()
            .filter(|a| a.key.incident == incident.id && a.key.kind == AlertKind::Emergency)
            .all(|a| matches!(a.fate, Fate::Queued | Fate::Accepted));
        let holds = matches!(incident.stage, Stage::Holding(_));
        let down = self.judgement.as_ref().is_some_and(|j| matches!(j.verdict, Verdict::NotServing { .. }));
        told && holds
            && down
            && !self.ending
            && self.hands_off().is_none()
            && self.unit_stopped.is_none()
            && self.gateway.is_none()
            && self.node.gateway().is_none()
            && self.unit_is_down(now)
    }

    /// No activation that could come to something is under way. An embedded gateway is started by nobody but us.
    fn unit_is_down(&self, now: Moment) -> bool {
        /// What the manager said longer ago says nothing; while the node is down it is asked every 2 s.
        const FRESH_MS: u64 = 6_000;
        if self.service.embedded() {
            return self.service.main().is_none_or(|id| !id.alive());
        }
        self.service_look.as_ref().is_some_and(|(at, look)| {
            nobody_needs_the_port(look) && now.since_ms(*at).is_some_and(|ms| ms <= FRESH_MS)
        })
    }

    fn start_responder(&mut self, now: Moment) {
        let Some(incident) = self.book.state().incident.as_ref().map(|i| i.id) else { return };
        let signs = signs::signs(&self.node);
        let mut args: Vec<std::ffi::OsString> = vec![
            "respond".into(),
            format!("--port={}", self.node.port).into(),
            format!("--agent={}", std::process::id()).into(),
            format!("--node={}", self.node.name).into(),
            format!("--incident=incident-{incident}").into(),
        ];
        for (name, paths) in [("--opened", signs.opened), ("--changed", signs.changed)] {
            args.extend(paths.into_iter().flat_map(|path| [name.into(), path.into_os_string()]));
        }
        let spec = Spec {
            // Not the path: an upgrade may have replaced the file, and the old agent goes on with its own code.
            program: "/proc/self/exe".into(),
            args,
            env_clear: true,
            cwd: Some("/".into()),
            ids: (self.node.ids != Ids::current()).then_some(self.node.ids),
            output: Some(OutputFile {
                path: self.places.steps().join("responder.log"),
                limit_bytes: OUTPUT_LIMIT_BYTES,
            }),
            limits: LIMITS,
            mark: format!("{CONTAINER}-{:x}-{}", now.boot, now.ms),
            ..Spec::default()
        };
        match self.runner.containers.spawn(&spec, CONTAINER) {
            Ok(step) => {
                self.say(&format!("port {} is answered with 503 until the gateway is back", self.node.port));
                self.responder.step = Some(step);
            }
            Err(e) => {
                self.say(&e.to_string());
                self.responder.rest(now, REST_AFTER_FAILURE_MS);
            }
        }
    }

    /// It ended by itself.
    fn responder_ended(&mut self, now: Moment, ended: Ended) {
        let log = self.places.steps().join("responder.log");
        self.end_responder();
        let said = host::files::read_bounded(&log, OUTPUT_LIMIT_BYTES).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let said = said.lines().next().unwrap_or("it said nothing").trim().to_owned();
        if ended == Ended::Exited(0) {
            self.responder.refused = false;
            let own = self.daily.looking();
            self.responder.rest(now, if own { REST_AFTER_OWN_LOOK_MS } else { REST_AFTER_SIGN_MS });
            self.say(&format!("port {} is free for the gateway: {said}", self.node.port));
            // Somebody may be at it: worth a look at once.
            self.next_look = now;
        } else {
            self.responder.rest(now, REST_AFTER_FAILURE_MS);
            if !self.responder.refused {
                self.say(&format!("port {} is not answered: {said}", self.node.port));
            }
            self.responder.refused = true;
        }
    }

    /// What an emergency is doing, for people: when it tries again, and what the port says meanwhile.
    pub(super) fn holding_words(&self, now: Moment) -> Option<String> {
        let state = self.book.state();
        let incident = state.incident.as_ref().filter(|_| state.in_emergency())?;
        let Stage::Holding(hold) = &incident.stage else { return None };
        let wait_ms = hold.retry_ms.saturating_sub(state.time_ms(now));
        let at = clock::wall() + jiff::SignedDuration::from_millis(i64::try_from(wait_ms).unwrap_or(0));
        let port = if self.responder.step.is_some() {
            format!("; port {} says 503 meanwhile", self.node.port)
        } else {
            String::new()
        };
        Some(format!("tries again at {} UTC, or as soon as something changes{port}", at.strftime("%H:%M")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use host::process::ProcessId;

    #[test]
    fn the_port_is_answered_unless_a_gateway_may_be_about_to_take_it() {
        let look = |phase, main: bool| ServiceLook {
            phase,
            main: main.then(|| ProcessId::current().unwrap()),
            cgroup: None,
            latched: None,
            will: None,
        };
        assert!(nobody_needs_the_port(&look(ServicePhase::Down, false)));
        assert!(nobody_needs_the_port(&look(ServicePhase::Starting, false)), "hangs before its main process");
        assert!(!nobody_needs_the_port(&look(ServicePhase::Starting, true)), "it loads");
        for phase in [ServicePhase::Running, ServicePhase::Stopping, ServicePhase::Unknown] {
            assert!(!nobody_needs_the_port(&look(phase, false)), "{phase:?}");
        }
    }
}
