//! Without a service manager koboshi supervises the gateway itself.
//!
//! The gateway lives in a container of its own, not in ours, with its output going to a file: it outlives this agent,
//! and the next agent adopts it by pid and start time. There is no latch and no restart of its own accord here:
//! the ladder decides about every start.

use super::{Active, KILL_RESERVE, Manager, ServiceState, Stopped};
use crate::clock::{self, Deadline};
use crate::container::{Containers, OutputFile, Spec};
use crate::error::{Error, Kind, Result};
use crate::output;
use crate::process::{Ended, PidFd, ProcessId, descendants};
use crate::run::Ids;
use engine::words::Moment;
use rustix::process::Signal;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The gateway's output file is cut to its newest half beyond this: weeks of ordinary output.
const LOG_LIMIT_BYTES: u64 = 16 << 20;
/// How often a dying process tree is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// How the gateway is started.
#[derive(Debug, Clone, Default)]
pub struct GatewaySpec {
    /// Program: absolute, or found on PATH.
    pub program: OsString,
    /// Arguments.
    pub args: Vec<OsString>,
    /// Environment to add.
    pub env: Vec<(OsString, OsString)>,
    /// Start from an empty environment.
    pub env_clear: bool,
    /// Working directory.
    pub cwd: Option<PathBuf>,
    /// Whom it runs as; ourselves when none.
    pub ids: Option<Ids>,
    /// Where its output goes.
    pub log: PathBuf,
}

/// The gateway supervised by koboshi itself.
#[derive(Debug)]
pub struct Embedded {
    containers: Containers,
    spec: GatewaySpec,
    running: Option<PidFd>,
    ended: Option<Ended>,
    stopped_by_us: bool,
    held: bool,
    since: Moment,
}

impl Embedded {
    /// Supervises the gateway of `spec`; `adopt` is one that already runs, as its lock names it. Without one, a gateway
    /// that an earlier agent left running in our container is adopted. One that is gone by now is not.
    #[must_use]
    pub fn new(containers: Containers, spec: GatewaySpec, adopt: Option<ProcessId>) -> Embedded {
        let since = clock::now();
        let mut embedded = Embedded {
            containers,
            spec,
            running: None,
            ended: None,
            stopped_by_us: false,
            held: false,
            since,
        };
        if !adopt.is_some_and(|id| embedded.adopt(id)) {
            embedded.adopt_left_behind();
        }
        embedded
    }

    /// Takes a running gateway into care, whoever started it. `false` when it is gone.
    pub fn adopt(&mut self, id: ProcessId) -> bool {
        if self.running.as_ref().is_some_and(|fd| fd.id() == id) {
            return true;
        }
        match id.open() {
            Ok(fd) if id.alive() => {
                fd.keep();
                self.running = Some(fd);
                self.entered(None, false);
                true
            }
            Ok(_) | Err(_) => false,
        }
    }

    /// Whoever started it: while it lives in our container it is the gateway, and there must be no second.
    fn adopt_left_behind(&mut self) -> bool {
        self.containers.gateway_leader().is_some_and(|id| self.adopt(id))
    }

    /// How the gateway last ended; `None` while it runs or before its first start.
    pub fn exited(&mut self) -> Option<Ended> {
        self.notice_end();
        self.ended
    }

    /// Becomes readable when the gateway has exited.
    #[must_use]
    pub fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.running.as_ref().map(AsFd::as_fd)
    }

    /// The gateway's process.
    #[must_use]
    pub fn main(&self) -> Option<ProcessId> {
        self.running.as_ref().map(PidFd::id)
    }

    /// What is started from now on.
    pub fn set_spec(&mut self, spec: GatewaySpec) {
        self.spec = spec;
    }

    fn entered(&mut self, ended: Option<Ended>, stopped_by_us: bool) {
        (self.ended, self.stopped_by_us, self.since) = (ended, stopped_by_us, clock::now());
    }

    fn notice_end(&mut self) {
        let Some(ended) = self.running.as_ref().and_then(PidFd::reap) else { return };
        self.running = None;
        self.entered(Some(ended), false);
    }

    /// Asks politely; `true` when the main process went within `grace`.
    fn ask(fd: &PidFd, grace: Duration, deadline: Deadline) -> Result<bool> {
        let reserved = deadline.left().saturating_sub(KILL_RESERVE);
        fd.signal(Signal::TERM)?;
        // A stopped process acts on the first signal only once it goes on.
        fd.signal(Signal::CONT)?;
        Ok(fd.wait(Deadline::after(grace.min(reserved))))
    }

    /// Ends a gateway that was adopted from outside our container, with all it started.
    fn end_outside(fd: &PidFd, family: BTreeSet<ProcessId>, deadline: Deadline) -> Result<()> {
        let mut left = family;
        loop {
            if !fd.exited() {
                left.insert(fd.id());
                left.extend(descendants(fd.id().pid));
            }
            left.retain(|p| p.alive());
            if left.is_empty() {
                return Ok(());
            }
            let mut more = BTreeSet::new();
            for process in &left {
                let children = descendants(process.pid);
                // Only if it still is the same process are these its children and nobody else's.
                if process.alive() {
                    more.extend(children);
                }
                process.signal(Signal::KILL)?;
            }
            left.extend(more);
            if deadline.passed() {
                let pids: Vec<u32> = left.iter().map(|p| p.pid).collect();
                let why = format!("still there after SIGKILL: {pids:?}");
                return Err(Error::new(Kind::TimedOut, "ending the gateway", why));
            }
            std::thread::sleep(LOOK_AGAIN.min(deadline.left()));
        }
    }
}

/// A mark that no other start has: not of this agent, not of another node's agent in the same millisecond.
fn unique_mark() -> String {
    static STARTS: AtomicU64 = AtomicU64::new(0);
    let now = clock::now();
    let nth = STARTS.fetch_add(1, Ordering::Relaxed);
    format!("gateway-{:x}-{}-{}-{nth}", now.boot, now.ms, std::process::id())
}

impl Manager for Embedded {
    fn kind(&self) -> &'static str {
        "embedded"
    }

    fn look(&mut self, _deadline: Deadline) -> Result<ServiceState> {
        self.notice_end();
        // A log that cannot be cut is tried again at the next look.
        let _ = output::trim(&self.spec.log, LOG_LIMIT_BYTES);
        let main = self.main();
        let (exit_status, exit_signal, result) = match self.ended {
            _ if self.stopped_by_us => (None, None, "success"),
            None | Some(Ended::Exited(0)) => (self.ended.map(|_| 0), None, "success"),
            Some(Ended::Exited(status)) => (Some(status), None, "exit-code"),
            Some(Ended::Signaled(signal)) => (None, Some(signal), "signal"),
            Some(Ended::TimedOut | Ended::Unknown) => (None, None, "unknown"),
        };
        let active = match (main, result) {
            (Some(_), _) => Active::Active,
            (None, "success") => Active::Inactive,
            (None, _) => Active::Failed,
        };
        Ok(ServiceState {
            active,
            known: true,
            held: self.held,
            main,
            result: result.into(),
            exit_status,
            exit_signal,
            cgroup: main.and_then(ProcessId::cgroup),
            since: Some(self.since),
            ..ServiceState::unknown()
        })
    }

    fn clear_latch(&mut self, _deadline: Deadline) -> Result<()> {
        Ok(())
    }

    fn start(&mut self, deadline: Deadline) -> Result<()> {
        let refuse = |why: &str| Err(Error::new(Kind::Usage, "starting the gateway", why));
        if self.held {
            return refuse("it is held down; release it first");
        }
        self.notice_end();
        if self.running.is_some() || self.adopt_left_behind() {
            return refuse("it already runs");
        }
        // Children that a dead gateway left behind would hold its port and locks.
        self.containers.kill_gateway(deadline)?;
        let spec = &self.spec;
        let started = self.containers.spawn_gateway(&Spec {
            program: spec.program.clone(),
            args: spec.args.clone(),
            env: spec.env.clone(),
            env_clear: spec.env_clear,
            cwd: spec.cwd.clone(),
            ids: spec.ids,
            output: Some(OutputFile { path: spec.log.clone(), limit_bytes: LOG_LIMIT_BYTES }),
            mark: unique_mark(),
            ..Spec::default()
        })?;
        self.running = Some(started.1);
        self.entered(None, false);
        Ok(())
    }

    fn stop(&mut self, grace: Duration, deadline: Deadline) -> Result<Stopped> {
        let began = clock::now();
        self.notice_end();
        let mut clean = true;
        match &self.running {
            Some(fd) => {
                let family = descendants(fd.id().pid).into_iter().collect();
                clean = Embedded::ask(fd, grace, deadline)?;
                // The kernel ends at once what lies in our container; an adopted gateway may lie elsewhere.
                self.containers.kill_gateway(deadline)?;
                Embedded::end_outside(fd, family, deadline)?;
                let ended = fd.reap();
                self.running = None;
                self.entered(ended, true);
            }
            None => {
                self.containers.kill_gateway(deadline)?;
            }
        }
        let took_ms = clock::now().since_ms(began).unwrap_or(0);
        Ok(if clean { Stopped::Clean { took_ms } } else { Stopped::Killed { took_ms } })
    }

    fn hold(&mut self, _deadline: Deadline) -> Result<()> {
        self.held = true;
        Ok(())
    }

    fn release(&mut self, _deadline: Deadline) -> Result<()> {
        self.held = false;
        Ok(())
    }

    fn reload(&mut self, _deadline: Deadline) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
