//! koboshi in the field: one real node and its real agent, and what must hold between them besides the faults of the
//! demo: who may die without the other noticing, whose will counts, what is never touched.
//!
//! Each claim is counted by itself. A test that cannot go on is one failure, and the next one begins with a fresh
//! agent. The order is made by the start ration (3 starts in 300 s): what needs none fills the time between those
//! that do.

mod stage;
mod tests;
mod tree;

use crate::needs::is_root;
use crate::proc::{self, Id};
use crate::run::Tally;
use rustix::process::Signal;
use stage::{ADOPTED, RIGHTED, Stage};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

pub(crate) use stage::stranger;

/// The name of the bystander: exactly what the gateway calls itself.
const GATEWAYS_NAME: &str = "openclaw-gateway";

/// What every run of the tests plays: those that wait for no start ration. The others take ten minutes of waiting more
/// and belong to `cargo xtask test --full` and `cargo xtask field`.
pub(crate) const IN_CI: &[&str] = &["agent-killed", "agent-ends", "stall", "install"];

/// Runs all of it, or only the tests of these names.
pub(crate) fn run(root: &Path, only: &[&str], tally: &mut Tally) {
    if !is_root() {
        tally.skip("field", "not root: namespaces and control groups of its own are beyond us");
        return;
    }
    tally.part("field: one real node and its agent", |tally| {
        println!("a node is being set up");
        let mut field = match Stage::set(root) {
            Ok(stage) => Field { stage, passed: 0, failures: Vec::new(), skipped: Vec::new() },
            Err(why) => {
                tally.fail(format!("field: {why}"));
                return (0, 1);
            }
        };
        field.play(only);
        field.keep_for_a_look(root);
        for (name, reason) in &field.skipped {
            tally.skip(&format!("field {name}"), reason);
        }
        let failed = field.failures.len() as u64;
        tally.remember(field.failures);
        (field.passed, failed)
    });
}

/// The same as a command of its own.
pub(crate) fn alone(root: &Path, only: &[&str]) -> ExitCode {
    let unknown = only.iter().find(|name| tests::ALL.iter().all(|(known, _)| known != *name));
    if let Some(name) = unknown {
        let known: Vec<&str> = tests::ALL.iter().map(|(name, _)| *name).collect();
        println!("there is no field test {name}; there are: {}", known.join(", "));
        return ExitCode::from(2);
    }
    let mut tally = Tally::new();
    // What is tried is what lies here, not what was built some day.
    if crate::checks::build_release(root, &mut tally) {
        run(root, only, &mut tally);
    }
    tally.close()
}

/// The node and the count.
struct Field {
    stage: Stage,
    passed: u64,
    failures: Vec<String>,
    /// What this machine does not allow, and why.
    skipped: Vec<(&'static str, String)>,
}

impl Field {
    fn play(&mut self, only: &[&str]) {
        let bystander = self.bystander();
        for (name, test) in tests::ALL {
            if !only.is_empty() && !only.contains(&name) {
                self.skipped
                    .push((name, "not asked for, or only part of `cargo xtask test --full`".to_owned()));
                continue;
            }
            println!("-- {name}");
            let started = Instant::now();
            let result = self.ready().and_then(|()| test(self));
            self.end_of(name, result);
            println!("   ({:.0} s)", started.elapsed().as_secs_f64());
        }
        println!("-- a bystander of the gateway's name");
        match bystander {
            Ok(id) => {
                let lived = proc::runs(id) && self.stage.send_away(id);
                self.claim(lived, "it survived everything above", || "it is gone".to_owned());
            }
            Err(why) => self.end_of("bystander", Err(why)),
        }
    }

    /// Counts a claim and says what was seen where it does not hold.
    fn claim(&mut self, holds: bool, what: &str, seen: impl FnOnce() -> String) {
        if holds {
            self.passed += 1;
            println!("   ok      {what}");
        } else {
            self.fail(&format!("{what}: {}", seen()));
        }
    }

    fn end_of(&mut self, name: &str, result: Result<(), String>) {
        if let Err(why) = result {
            self.fail(&format!("{name} could not go on: {why}"));
        }
    }

    fn fail(&mut self, what: &str) {
        println!("   FAILED  {what}");
        self.failures.push(format!("field: {what}"));
    }

    /// An agent in guard mode, a node that serves, nothing open: what every test begins with.
    fn ready(&mut self) -> Result<(), String> {
        let status = self.stage.status();
        if status.as_ref().is_some_and(|s| s["mode"] == "guard") {
            if status.is_some_and(|s| s["hands_off"].is_string()) {
                // An earlier test was cut short: its pause or stop is not this one's.
                self.stage.ask(&["resume"], stage::ASK_LIMIT)?;
                self.stage.ask(&["node", "start"], RIGHTED)?;
            }
        } else {
            if self.stage.agent.is_some() {
                self.stage.end_agent(Signal::TERM)?;
            }
            self.stage.guard(&[])?;
        }
        self.stage.settled(RIGHTED).map(|_| ())
    }

    /// A new agent after the old one: the gateway it has in its care once it is sure of it.
    fn next_agent(&mut self, options: &[&str]) -> Result<Id, String> {
        self.stage.guard(options)?;
        self.stage.serving(ADOPTED)
    }

    /// Our own program under the gateway's name, doing nothing.
    fn bystander(&mut self) -> Result<Id, String> {
        let ours = std::env::current_exe().map_err(|e| format!("find our own program: {e}"))?;
        let copy = self.stage.work.join(GATEWAYS_NAME);
        std::fs::copy(&ours, &copy).map_err(|e| format!("copy {}: {e}", ours.display()))?;
        let mut c = Command::new(copy);
        std::os::unix::process::CommandExt::arg0(&mut c, GATEWAYS_NAME);
        c.arg("stranger");
        self.stage.bring(c)
    }

    /// After a failure: the logs and the incidents, where they outlive the stage.
    fn keep_for_a_look(&self, root: &Path) {
        if self.failures.is_empty() {
            return;
        }
        let to = root.join("target/field-failed");
        let _ = std::fs::remove_dir_all(&to);
        let (work, stage) = (&self.stage.work, &self.stage);
        let keep = |from: &Path| {
            for entry in std::fs::read_dir(from).into_iter().flatten().flatten() {
                let name = entry.file_name();
                let told = Path::new(&name).extension().is_some_and(|x| x == "log" || x == "json");
                if told || name == "journal" {
                    let _ = std::fs::create_dir_all(&to)
                        .and_then(|()| std::fs::copy(entry.path(), to.join(&name)));
                }
            }
        };
        keep(work);
        keep(&stage.dir.join("koboshi"));
        keep(&stage.state(""));
        keep(&stage.state("incidents"));
        println!("logs and incidents are kept in {}", to.display());
    }
}
