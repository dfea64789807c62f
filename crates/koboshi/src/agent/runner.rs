//! Spawns steps: this very binary, in a container, with a request file.

use crate::places::Places;
use crate::step::{self, Answer, Request, Work};
use host::clock::Deadline;
use host::container::{Containers, Emptied, Ended, Limits, OutputFile, Spec, Step};
use host::{Error, Kind, Result, files};
use node::{Baseline, Node};
use std::path::PathBuf;
use std::time::Duration;

/// What one step may say on its output.
const OUTPUT_LIMIT_BYTES: u64 = 1 << 20;
/// Proving a container empty takes milliseconds; a process in uninterruptible sleep takes longer than anybody waits.
pub const KILL_LIMIT: Duration = Duration::from_secs(10);
/// A step of koboshi's own needs far less; more is a mistake that must not take the machine along.
const STEP_LIMITS: Limits = Limits { memory_bytes: Some(1 << 30), pids: Some(512) };

/// npm, the unpackers and a trial start live in such a step; a gateway that starts takes 700 MB by itself.
const INSTALL_LIMITS: Limits = Limits { memory_bytes: Some(3 << 30), pids: Some(512) };

/// What every step is told.
#[derive(Debug)]
pub struct Runner {
    /// The containers of this node.
    pub containers: Containers,
    places: Places,
    boot_mark: String,
    /// What proving a container empty may take.
    pub kill_limit: Duration,
    /// Steps are told to leave the store alone: it hangs.
    pub without_store: bool,
}

/// A step under way.
#[derive(Debug)]
pub struct Running {
    /// The container.
    pub step: Step,
    /// When it is killed.
    pub deadline: Deadline,
    /// Its name.
    pub name: String,
    request: PathBuf,
    kill_limit: Duration,
}

impl Running {
    /// What it said. Only after it was killed: then the answer no longer changes.
    pub fn answer(&self) -> Option<Answer> {
        step::answer(&self.request)
    }

    /// Ends the container and proves it empty.
    pub fn kill(&mut self) -> Result<Emptied> {
        self.step.kill(Deadline::after(self.kill_limit))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.request);
        let _ = std::fs::remove_file(step::answer_path(&self.request));
    }
}

impl Runner {
    /// A runner for the containers of one node.
    pub fn new(containers: Containers, places: Places, limits: engine::Limits) -> Runner {
        let now = host::clock::now();
        let boot_mark = format!("{:x}-{}", now.boot, now.ms);
        let kill_limit = limits.span(KILL_LIMIT);
        Runner { containers, places, boot_mark, kill_limit, without_store: false }
    }

    /// Writes the request and spawns the step.
    pub fn spawn(
        &self,
        name: &str,
        work: Work,
        node: &Node,
        baseline: Option<&Baseline>,
        background: bool,
        deadline: Deadline,
    ) -> Result<Running> {
        let request = self.places.steps().join(format!("{name}.json"));
        let limits = if work.installs() { INSTALL_LIMITS } else { STEP_LIMITS };
        let body = Request {
            work,
            config_file: self.places.config_file.clone(),
            node: node.clone(),
            baseline: baseline.cloned(),
            without_store: self.without_store,
        };
        let text = serde_json::to_vec(&body)
            .map_err(|e| Error::new(Kind::System, format!("write step {name}"), e))?;
        let _ = std::fs::remove_file(step::answer_path(&request));
        files::write_for_now(&request, &text, 0o600)?;
        let spec = Spec {
            // Not the path: an upgrade may have replaced the file, and the old agent goes on with its own code.
            program: "/proc/self/exe".into(),
            args: vec!["step".into(), request.clone().into_os_string()],
            output: Some(OutputFile {
                path: self.places.steps().join(format!("{name}.log")),
                limit_bytes: OUTPUT_LIMIT_BYTES,
            }),
            limits,
            background,
            deadline: Some(deadline),
            mark: format!("{name}-{}", self.boot_mark),
            ..Spec::default()
        };
        let step = self.containers.spawn(&spec, name)?;
        Ok(Running { step, deadline, name: name.to_owned(), request, kill_limit: self.kill_limit })
    }

    /// Runs a step to its end and returns its answer.
    pub fn run(
        &self,
        name: &str,
        work: Work,
        node: &Node,
        baseline: Option<&Baseline>,
        limit: Duration,
    ) -> Result<Answer> {
        let (answer, emptied) = self.look(name, work, node, baseline, limit)?;
        emptied.map(|_| answer)
    }

    /// The same for a step that only looks: what it said counts also where its container could not be proven empty,
    /// which is told beside it.
    pub fn look(
        &self,
        name: &str,
        work: Work,
        node: &Node,
        baseline: Option<&Baseline>,
        limit: Duration,
    ) -> Result<(Answer, Result<Emptied>)> {
        let deadline = Deadline::after(limit);
        let mut running = self.spawn(name, work, node, baseline, false, deadline)?;
        let ended = running.step.wait(deadline);
        let emptied = running.kill();
        let Some(answer) = running.answer() else {
            emptied?;
            let why = match ended {
                Ended::TimedOut => {
                    format!("it had no answer after {:.1} s and was killed", limit.as_secs_f64())
                }
                Ended::Exited(code) => format!("it ended with code {code} and no answer"),
                Ended::Signaled(signal) => format!("signal {signal} ended it"),
                Ended::Unknown => "nobody knows how it ended".to_owned(),
            };
            return Err(Error::new(Kind::System, format!("run the step {name}"), why));
        };
        Ok((answer, emptied))
    }
}
