//! One node of the demo's, its agent, and what can be done to both: started bare, given to an agent, broken, judged.
//!
//! The demo has one of these. The figures (`pairs`) have several, each in a directory of its own with its own port and
//! agent, so that one can be broken while another waits for its start ration.

use crate::demo::pulse::Pulse;
use crate::demo::report::Row;
use crate::demo::seed;
use crate::demo::setup::{self, Stage, Versions};
use crate::demo::watcher::Watcher;
use crate::demo::{
    FAULT_LIMIT, Halt, LOOK_AGAIN, OWN_JUDGE_LIMIT, SETTLE_S, START_LIMIT, STOP_LIMIT, free_port,
};
use crate::print::{Printer, duration};
use drill::ledger::Ledger;
use drill::{Fault, Target};
use engine::{Layer, Moment, Verdict};
use host::clock::{self, Deadline};
use host::container::{Containers, Spec, Step};
use host::service::{Embedded, GatewaySpec, Manager};
use host::{Error, Kind, Result, files};
use node::{Judge, Node, Want};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A node and everything around it.
pub struct Subject {
    printer: Printer,
    /// Its directories.
    pub stage: Stage,
    /// The node.
    pub node: Node,
    /// What was fetched for it.
    pub versions: Versions,
    containers: Containers,
    /// Tells this node's processes from those of the others that this demo started.
    mark: String,
    guarded: Option<Guarded>,
    /// When a fault was last let loose on it.
    pub broken_at: Option<Moment>,
}

/// The agent and what it was told.
struct Guarded {
    agent: Step,
    config_file: PathBuf,
    watcher: Watcher,
}

impl Subject {
    /// Fetches, installs and onboards a node in `dir`. With a `model` the program is copied from there, so that npm
    /// runs once for all.
    pub fn make(
        name: &str,
        dir: PathBuf,
        cache: Option<PathBuf>,
        openclaw: &str,
        model: Option<&Stage>,
        printer: Printer,
    ) -> Result<Subject> {
        let stage = Stage::make(dir, cache)?;
        if let Some(model) = model {
            stage.copy_program(model)?;
        }
        let mark = format!("{}-{name}", std::process::id());
        let containers = Containers::open(&format!("demo-set-up-{mark}"), &stage.dir.join("run"))?;
        let made = free_port()
            .and_then(|port| setup::node(&stage, openclaw, port, &containers, printer))
            .and_then(|(node, versions)| seed::files(&node).map(|()| (node, versions)));
        match made {
            Ok((node, versions)) => Ok(Subject {
                printer,
                stage,
                node,
                versions,
                containers,
                mark,
                guarded: None,
                broken_at: None,
            }),
            Err(e) => {
                containers.remove();
                Err(e)
            }
        }
    }

    /// Starts the gateway without koboshi, waits until the judge confirms it, stops it. Milliseconds from the start
    /// to the first of the looks that were then confirmed. With `seed`, what only a running gateway can write is
    /// written before the stop.
    pub fn bare_start(&mut self, halt: &mut Halt, seed: bool) -> Result<u64> {
        let containers = Containers::open(&format!("demo-bare-{}", self.mark), &self.stage.dir.join("run"))?;
        let command = self.node.command();
        let spec = GatewaySpec {
            program: command.program.into_os_string(),
            args: command.args.into_iter().map(Into::into).collect(),
            env: command.env.into_iter().map(|(k, v)| (k.into(), v.into())).collect(),
            env_clear: true,
            cwd: Some(command.cwd),
            ids: None,
            log: self.bare_log(),
        };
        let mut gateway = Embedded::new(containers.clone(), spec, None);
        let began = clock::now();
        gateway.start(Deadline::after(STOP_LIMIT))?;
        let served = self.until_served(halt, &mut gateway, began);
        let seeded = match &served {
            Ok(_) if seed => seed::rows(&self.stage, &self.node, &self.containers),
            Ok(_) | Err(_) => Ok(()),
        };
        gateway.stop(STOP_LIMIT, Deadline::after(STOP_LIMIT * 2))?;
        containers.remove();
        seeded?;
        if seed && served.is_ok() {
            seed::paired_device(&self.node)?;
        }
        served
    }

    fn until_served(&mut self, halt: &mut Halt, gateway: &mut Embedded, began: Moment) -> Result<u64> {
        let mut judge = Judge::new(node::Limits::default(), node::Baseline::default());
        judge.started(began);
        self.until_judged(halt, &mut judge, gateway.main(), began, START_LIMIT)
    }

    /// Until `judge`, which is the demo's own and knows nothing of the agent's, confirms that the node serves.
    fn until_judged(
        &self,
        halt: &mut Halt,
        judge: &mut Judge,
        main: Option<host::process::ProcessId>,
        began: Moment,
        limit: Duration,
    ) -> Result<u64> {
        let deadline = Deadline::after(limit);
        while !deadline.passed() {
            halt.check()?;
            let want = Want { hello: true, identity: true, main, ..Want::default() };
            let look = node::look(&self.node, &want, Deadline::after(Duration::from_secs(8)));
            let judgement = judge.observe(&look);
            match (&judgement.verdict, judgement.confirmed, judgement.first_good) {
                (Verdict::Serving { .. }, true, Some(first)) => {
                    return Ok(first.since_ms(began).unwrap_or(0));
                }
                (Verdict::NotServing { why }, _, _) => {
                    return Err(Error::new(Kind::System, "start the demo's gateway", why)
                        .hint(format!("see {}", self.bare_log().display())));
                }
                (Verdict::Serving { .. } | Verdict::Inconclusive { .. }, _, _) => {}
            }
            std::thread::sleep(judge.next_probe_in());
        }
        Err(Error::new(Kind::TimedOut, "start the demo's gateway", "it did not serve in time"))
    }

    fn bare_log(&self) -> PathBuf {
        self.stage.dir.join("bare.log")
    }

    /// Gives the node to the real agent, as its own process.
    pub fn guard(&mut self) -> Result<()> {
        let config_file = self.configure()?;
        let spec = Spec {
            program: "/proc/self/exe".into(),
            args: vec!["guard".into(), "--config".into(), config_file.clone().into()],
            output: Some(host::container::OutputFile { path: self.agent_log(), limit_bytes: 8 << 20 }),
            mark: format!("demo-agent-{}", self.mark),
            ..Spec::default()
        };
        let watcher = Watcher::new(&config_file, self.printer)?;
        let agent = self.containers.spawn(&spec, "agent")?;
        self.guarded = Some(Guarded { agent, config_file, watcher });
        Ok(())
    }

    /// A configuration such as `koboshi install` would write, with the waits that only prove patience shortened.
    fn configure(&self) -> Result<PathBuf> {
        let dir = &self.stage.koboshi;
        let file = dir.join("koboshi.toml");
        let text = format!(
            "state_dir = {:?}\nrun_dir = {:?}\n\n[service]\nmanager = \"embedded\"\n\n[backup]\nsettle_s = {SETTLE_S}\n\n\
             [store]\nspare = true\n",
            dir.join("state"),
            dir.join("run"),
        );
        files::write_atomic(&file, text.as_bytes(), 0o600)?;
        let config = crate::config::load(&file)?;
        let places = crate::places::Places::new(file.clone(), &config)?;
        places.make()?;
        crate::patient::remember(&places, &self.node)?;
        Ok(file)
    }

    fn agent_log(&self) -> PathBuf {
        self.stage.koboshi.join("agent.log")
    }

    fn guarded(&self) -> Result<&Guarded> {
        self.guarded.as_ref().ok_or_else(|| {
            Error::new(Kind::System, "ask the demo's agent", "the node was not given to one yet")
        })
    }

    /// The agent must be there, and nobody must have pressed Ctrl-C.
    pub fn alive(&mut self, halt: &mut Halt) -> Result<()> {
        halt.check()?;
        let ended = self.guarded.as_mut().and_then(|g| g.agent.look());
        match ended {
            None => Ok(()),
            Some(ended) => {
                Err(Error::new(Kind::System, "go on with the demo", format!("the agent ended: {ended:?}"))
                    .hint(format!("see {}", self.agent_log().display())))
            }
        }
    }

    /// Until the node serves, a snapshot of it is proven good and the spare is made.
    pub fn wait_settled(&mut self, halt: &mut Halt) -> Result<()> {
        let spinner = self.printer.spinner("the agent starts the node, takes a snapshot and proves it");
        let result = self.until_settled(halt);
        spinner.done();
        result
    }

    /// The same without a word.
    pub fn until_settled(&mut self, halt: &mut Halt) -> Result<()> {
        let deadline = Deadline::after(START_LIMIT);
        loop {
            self.alive(halt)?;
            let status = self.guarded()?.watcher.status();
            if status.is_some_and(|s| s.settled && s.confirmed && s.verdict.is_serving()) {
                return Ok(());
            }
            if deadline.passed() {
                return Err(Error::new(
                    Kind::TimedOut,
                    "have the agent take the node into care",
                    "it is not there yet",
                )
                .hint(format!("see {}", self.agent_log().display())));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// One fault: what the user has is counted, the node is broken, the agent rights it, everything is counted again.
    pub fn one(&mut self, fault: &'static Fault, halt: &mut Halt) -> Result<Row> {
        let tag = format!("{}-{}", fault.name, clock::now().ms);
        seed::at_injection(&self.stage, &self.node, &tag, &self.containers)?;
        let before = Ledger::take(&self.node)?;
        let who =
            node::Baseline::take(&self.node, Vec::new(), clock::now(), Deadline::after(OWN_JUDGE_LIMIT))?;
        let seen = self.guarded()?.watcher.last_incident();
        let mut log = self.guarded()?.watcher.tail(&self.agent_log());
        self.printer.note(format!("{}: {}", self.printer.bold(fault.name), fault.about));
        let serving = self.node.gateway();
        let injected = clock::now();
        self.broken_at = Some(injected);
        (fault.inject)(&Target { node: &self.node, fault_file: &self.stage.fault_file })?;
        let deadline = Deadline::after(FAULT_LIMIT);
        let in_place = fault.healed_by == [Layer::InPlace];
        let mut pulse = in_place.then(|| Pulse::new(serving));
        let incident = loop {
            self.alive(halt)?;
            if let Some(pulse) = &mut pulse {
                pulse.feel(&self.node);
            }
            log.show();
            if let Some(incident) = self.guarded()?.watcher.closed_after(seen)? {
                break Some(incident);
            }
            if deadline.passed() {
                break None;
            }
            std::thread::sleep(LOOK_AGAIN);
        };
        log.show();
        // The agent's word is not taken for it: a judge that never saw the recovery looks at the node by itself.
        let mut own = Judge::new(node::Limits::default(), who);
        let served = self.until_judged(halt, &mut own, self.node.gateway(), clock::now(), OWN_JUDGE_LIMIT);
        if let Err(e) = &served {
            self.printer.note(format!("  the demo's own judge does not confirm it: {}", e.why));
        }
        let after = Ledger::take(&self.node)?;
        let losses = before.losses(&after);
        for loss in &losses {
            self.printer.note(format!("  lost: {} ({} bytes)", loss.what, loss.bytes));
        }
        let confirmed = incident.as_ref().filter(|_| served.is_ok());
        let mut row = Row::new(fault, injected, confirmed, losses.iter().map(|l| l.bytes).sum());
        if let Some(mut pulse) = pulse {
            pulse.feel(&self.node);
            row.felt_down(pulse.down_ms(clock::now()));
        }
        self.printer.note(format!("  {}", row.line()));
        Ok(row)
    }

    /// Milliseconds until this fault may be let loose. Three starts in 300 s make OpenClaw's next boot come up with its
    /// channels silent, so the demo waits for the ration rather than break the node into that; what is repaired in place
    /// takes no start.
    pub fn free_in_ms(&self, fault: &Fault) -> Result<u64> {
        if fault.healed_by == [Layer::InPlace] {
            return Ok(0);
        }
        // No status for a moment is a status being written.
        let free_at = self.guarded()?.watcher.status().map(|s| s.start_free_at.ms);
        Ok(free_at.map_or(1, |at| at.saturating_sub(clock::now().ms)))
    }

    /// Waits for it.
    pub fn wait_for_ration(&mut self, fault: &Fault, halt: &mut Halt) -> Result<()> {
        let mut told = false;
        loop {
            self.alive(halt)?;
            let wait_ms = self.free_in_ms(fault)?;
            if wait_ms == 0 {
                return Ok(());
            }
            if !told && wait_ms > 1_000 {
                told = true;
                self.printer.note(format!(
                    "  waiting {} for the start ration (3 in 300 s: a fourth would come up with silent channels)",
                    duration(wait_ms)
                ));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// A bare cold start between rounds: the owner stops the node, the demo starts it alone, and gives it back.
    pub fn cold_start_between(&mut self, halt: &mut Halt) -> Result<u64> {
        self.wait_settled(halt)?;
        let file = self.guarded()?.config_file.clone();
        let config = crate::config::load(&file)?;
        let places = crate::places::Places::new(file, &config)?;
        let limit = STOP_LIMIT * 2;
        crate::control::give(&places, &crate::control::Order::Stop { grace_s: STOP_LIMIT.as_secs() }, limit)?;
        let cold = self.bare_start(halt, false);
        crate::control::give(&places, &crate::control::Order::Start, limit)?;
        self.wait_settled(halt)?;
        cold
    }

    /// What to type to reach what was kept.
    pub fn say_how_to_reach(&self) -> Result<()> {
        let p = self.printer;
        let guarded = self.guarded()?;
        let config_file = &guarded.config_file;
        p.note("the node and its agent run on:");
        p.note(format!(
            "  the gateway    http://127.0.0.1:{}/ (config {})",
            self.node.port,
            self.node.config_path.display()
        ));
        p.note(format!("  the agent      koboshi status --config {}", config_file.display()));
        p.note(format!("  its log        {}", self.agent_log().display()));
        p.note(format!("  break it       e.g. rm -rf {}", self.node.package_dir.display()));
        p.note(format!(
            "  end both       koboshi node stop --config {} && kill {} && rm -rf {}",
            config_file.display(),
            guarded.agent.id().pid,
            self.stage.dir.display()
        ));
        Ok(())
    }

    /// Ends everything that was started here.
    pub fn end(&mut self) {
        let limit = Deadline::after(Duration::from_secs(30));
        if let Some(mut guarded) = self.guarded.take() {
            // The agent's own containers lie inside its container: its gateway and its steps end with it.
            if let Err(e) = guarded.agent.kill(limit) {
                self.printer.note(format!("ending the demo's agent: {e}"));
            }
        }
        end_gateway(&self.stage.dir, limit);
        self.containers.remove();
    }
}

/// On a host without cgroup v2 the gateway outlives its agent; it is known by its lock.
fn end_gateway(dir: &Path, limit: Deadline) {
    let state = dir.join("home/.openclaw");
    if let Some(lock) = node::lock::read_file(&node::lock::path(&state, host::run::Ids::current().uid))
        && lock.id.alive()
        && lock.id.cwd().is_some_and(|cwd| cwd.starts_with(dir))
        && let Ok(fd) = lock.id.open()
    {
        let _ = lock.id.signal(rustix::process::Signal::KILL);
        let _ = fd.wait(limit);
    }
}
