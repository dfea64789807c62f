//! `koboshi demo`: a real OpenClaw node in a throw-away directory, knocked over and righted before your eyes.
//!
//! The node is guarded by the real agent, as a process of its own, from a configuration of its own. The demo only
//! breaks things, waits for the agent to close its incident, and then takes stock itself: was it the right layer, does
//! the node serve by a judge of the demo's own, and is every byte of the user's still there.

mod report;
mod setup;
mod watcher;

use crate::cli;
use crate::demo::report::{Row, Skipped};
use crate::demo::setup::Stage;
use crate::demo::watcher::Watcher;
use crate::print::{Exit, Printer, duration};
use drill::ledger::Ledger;
use drill::{Fault, Target};
use engine::{Layer, Moment, Verdict};
use host::clock::{self, Deadline};
use host::container::{Containers, Spec, Step};
use host::service::{Embedded, GatewaySpec, Manager};
use host::signals::Signals;
use host::{Context, Error, Kind, Result, files};
use node::{Judge, Node, Want};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The OpenClaw release that was tested (docs/openclaw.md).
pub const TESTED_OPENCLAW: &str = node::TESTED_OPENCLAW;

/// A gateway that has not served after this is not slow but broken; users report 240 s with large databases.
const START_LIMIT: Duration = Duration::from_secs(600);
/// From a fault to the end of its incident: the ladder's own limit and the longest detection.
const FAULT_LIMIT: Duration = Duration::from_secs(900);
/// The demo's node is proven good after this long, so that nobody waits two minutes for the first good snapshot.
const SETTLE_S: u64 = 5;
/// A node that was just confirmed to serve is confirmed again within this.
const OWN_JUDGE_LIMIT: Duration = Duration::from_secs(60);
/// How often what happens is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How long a clean stop of an idle demo node may take.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// Runs the demo.
pub fn run(options: &cli::Demo, printer: Printer) -> Result<Exit> {
    if options.list {
        return Ok(list(printer));
    }
    let faults = chosen(&options.faults)?;
    let (dir, made) = directory(options.dir.as_deref())?;
    let stage = Stage::make(dir.clone(), options.cache.clone())?;
    let containers =
        Containers::open(&format!("demo-set-up-{}", std::process::id()), &stage.dir.join("run"))?;
    let mut demo =
        Demo { printer, stage, containers, options: options.clone(), agent: None, signals: Signals::new()? };
    let result = demo.play(&faults);
    demo.clean_up(made, &result);
    result
}

fn list(printer: Printer) -> Exit {
    let rows: Vec<Vec<String>> = drill::DEMO
        .iter()
        .map(|f| vec![f.name.to_owned(), f.about.to_owned(), layers(f.healed_by)])
        .collect();
    printer.table(&["fault", "what is done", "healed by"], &rows);
    printer.object(serde_json::json!({
        "faults": drill::DEMO.iter().map(|f| serde_json::json!({
            "fault": f.name, "about": f.about, "healed_by": f.healed_by,
        })).collect::<Vec<_>>()
    }));
    Exit::Done
}

fn layers(layers: &[Layer]) -> String {
    layers.iter().map(|l| l.name()).collect::<Vec<_>>().join(" or ")
}

fn chosen(names: &[String]) -> Result<Vec<&'static Fault>> {
    if names.is_empty() {
        return Ok(drill::DEMO.to_vec());
    }
    names
        .iter()
        .map(|name| {
            drill::by_name(name).ok_or_else(|| {
                Error::new(Kind::Usage, format!("inject {name}"), "there is no such fault")
                    .hint("koboshi demo --list names them")
            })
        })
        .collect()
}

/// The directory, and whether it was made for this run alone.
fn directory(named: Option<&Path>) -> Result<(PathBuf, bool)> {
    if let Some(dir) = named {
        std::fs::create_dir_all(dir).context(|| format!("make {}", dir.display()))?;
        let dir = dir.canonicalize().context(|| format!("resolve {}", dir.display()))?;
        return Ok((dir, false));
    }
    let now = clock::now();
    let dir = std::env::temp_dir().join(format!("koboshi-demo-{}-{}", std::process::id(), now.ms));
    std::fs::create_dir(&dir).context(|| format!("make {}", dir.display()))?;
    let dir = dir.canonicalize().context(|| format!("resolve {}", dir.display()))?;
    Ok((dir, true))
}

struct Demo {
    printer: Printer,
    stage: Stage,
    containers: Containers,
    options: cli::Demo,
    agent: Option<Step>,
    signals: Signals,
}

impl Demo {
    fn play(&mut self, faults: &[&'static Fault]) -> Result<Exit> {
        let printer = self.printer;
        printer.note(format!("koboshi demo in {}", self.stage.dir.display()));
        let port = free_port()?;
        let (node, versions) =
            setup::node(&self.stage, &self.options.openclaw, port, &self.containers, printer)?;
        self.seed_files(&node)?;
        printer
            .note(format!("start OpenClaw {} for the first time, on port {}", versions.openclaw, node.port));
        let first_ms = self.bare_start(&node, Some("koboshi-seed-before"))?;
        let mut colds = vec![self.bare_start(&node, None)?];
        printer.note(format!(
            "bare cold start of this gateway on this machine: {} (its first: {})",
            duration(colds[0]),
            duration(first_ms)
        ));
        let config_file = self.configure(&node)?;
        self.guard(&config_file)?;
        let watcher = Watcher::new(&config_file, printer)?;
        self.wait_settled(&watcher)?;

        let mut rows = Vec::new();
        if !self.options.no_faults {
            for round in 1..=self.options.rounds {
                if round > 1 {
                    colds.push(self.cold_start_between(&node, &config_file, &watcher)?);
                }
                for fault in faults {
                    rows.push(self.one(fault, &node, &watcher)?);
                }
            }
        }
        let skipped: Vec<Skipped> = Vec::new();
        report::print(printer, &versions.json(), &rows, &skipped, &colds);
        if self.options.keep {
            self.say_how_to_reach(&node, &config_file);
        }
        Ok(if rows.iter().all(Row::right) { Exit::Done } else { Exit::Failed })
    }

    /// What a user would miss: files now, rows through the gateway.
    fn seed_files(&self, node: &Node) -> Result<()> {
        let put = |path: &str, text: &[u8]| {
            let path = node.state_dir.join(path);
            if let Some(dir) = path.parent() {
                std::fs::create_dir_all(dir).context(|| format!("make {}", dir.display()))?;
            }
            files::write_atomic(&path, text, 0o600)
        };
        put("workspace/notes.md", b"# Notes\nThe demo's user wrote this before the first snapshot.\n")?;
        put("credentials/whatsapp/default/creds.json", b"{\"noiseKey\":\"not a real one, but a user's\"}\n")
    }

    /// Starts the gateway without koboshi, waits until the judge confirms it, stops it. Milliseconds from the start
    /// to the first of the looks that were then confirmed.
    fn bare_start(&mut self, node: &Node, seed: Option<&str>) -> Result<u64> {
        let containers =
            Containers::open(&format!("demo-bare-{}", std::process::id()), &self.stage.dir.join("run"))?;
        let command = node.command();
        let spec = GatewaySpec {
            program: command.program.into_os_string(),
            args: command.args.into_iter().map(Into::into).collect(),
            env: command.env.into_iter().map(|(k, v)| (k.into(), v.into())).collect(),
            env_clear: true,
            cwd: Some(command.cwd),
            ids: None,
            log: self.stage.dir.join("bare.log"),
        };
        let mut gateway = Embedded::new(containers.clone(), spec, None);
        let began = clock::now();
        gateway.start(Deadline::after(STOP_LIMIT))?;
        let served = self.until_served(node, &mut gateway, began);
        let seeded = match (&served, seed) {
            (Ok(_), Some(name)) => setup::add_cron_job(&self.stage, node, name, &self.containers),
            (_, _) => Ok(()),
        };
        gateway.stop(STOP_LIMIT, Deadline::after(STOP_LIMIT * 2))?;
        containers.remove();
        seeded?;
        served
    }

    fn until_served(&mut self, node: &Node, gateway: &mut Embedded, began: Moment) -> Result<u64> {
        let mut judge = Judge::new(node::Limits::default(), node::Baseline::default());
        judge.started(began);
        self.until_judged(node, &mut judge, gateway.main(), began, START_LIMIT)
    }

    /// Until `judge`, which is the demo's own and knows nothing of the agent's, confirms that the node serves.
    fn until_judged(
        &mut self,
        node: &Node,
        judge: &mut Judge,
        main: Option<host::process::ProcessId>,
        began: Moment,
        limit: Duration,
    ) -> Result<u64> {
        let deadline = Deadline::after(limit);
        while !deadline.passed() {
            self.interrupted()?;
            let want = Want { hello: true, identity: true, main, ..Want::default() };
            let judgement = judge.observe(&node::look(node, &want, Deadline::after(Duration::from_secs(8))));
            match (&judgement.verdict, judgement.confirmed, judgement.first_good) {
                (Verdict::Serving { .. }, true, Some(first)) => {
                    return Ok(first.since_ms(began).unwrap_or(0));
                }
                (Verdict::NotServing { why }, _, _) => {
                    return Err(Error::new(Kind::System, "start the demo's gateway", why)
                        .hint(format!("see {}", self.stage.dir.join("bare.log").display())));
                }
                (Verdict::Serving { .. } | Verdict::Inconclusive { .. }, _, _) => {}
            }
            std::thread::sleep(judge.next_probe_in());
        }
        Err(Error::new(Kind::TimedOut, "start the demo's gateway", "it did not serve in time"))
    }

    /// A configuration such as `koboshi install` would write, with the waits that only prove patience shortened.
    fn configure(&self, node: &Node) -> Result<PathBuf> {
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
        crate::patient::remember(&places, node)?;
        Ok(file)
    }

    /// The real agent, as its own process.
    fn guard(&mut self, config_file: &Path) -> Result<()> {
        let spec = Spec {
            program: "/proc/self/exe".into(),
            args: vec!["guard".into(), "--config".into(), config_file.into()],
            output: Some(host::container::OutputFile { path: self.agent_log(), limit_bytes: 8 << 20 }),
            mark: format!("demo-agent-{}", std::process::id()),
            ..Spec::default()
        };
        self.agent = Some(self.containers.spawn(&spec, "agent")?);
        Ok(())
    }

    fn agent_log(&self) -> PathBuf {
        self.stage.koboshi.join("agent.log")
    }

    /// Until the node serves, a snapshot of it is proven good and the spare is made.
    fn wait_settled(&mut self, watcher: &Watcher) -> Result<()> {
        let spinner = self.printer.spinner("the agent starts the node, takes a snapshot and proves it");
        let deadline = Deadline::after(START_LIMIT);
        let result = loop {
            if let Err(e) = self.alive() {
                break Err(e);
            }
            if watcher.status().is_some_and(|s| s.settled && s.confirmed && s.verdict.is_serving()) {
                break Ok(());
            }
            if deadline.passed() {
                break Err(Error::new(
                    Kind::TimedOut,
                    "have the agent take the node into care",
                    "it is not there yet",
                )
                .hint(format!("see {}", self.agent_log().display())));
            }
            std::thread::sleep(LOOK_AGAIN);
        };
        spinner.done();
        result
    }

    /// One fault: what the user has is counted, the node is broken, the agent rights it, everything is counted again.
    fn one(&mut self, fault: &'static Fault, node: &Node, watcher: &Watcher) -> Result<Row> {
        self.wait_settled(watcher)?;
        self.wait_for_ration(watcher)?;
        let tag = format!("{}-{}", fault.name, clock::now().ms);
        files::write_atomic(
            &node.state_dir.join(format!("workspace/{tag}.md")),
            format!("written just before {tag}\n").as_bytes(),
            0o600,
        )?;
        setup::add_cron_job(&self.stage, node, &format!("koboshi-seed-{tag}"), &self.containers)?;
        let before = Ledger::take(node)?;
        let who = node::Baseline::take(node, Vec::new(), clock::now(), Deadline::after(OWN_JUDGE_LIMIT))?;
        let seen = watcher.last_incident();
        self.printer.note(format!("{}: {}", self.printer.bold(fault.name), fault.about));
        let injected = clock::now();
        (fault.inject)(&Target { node, fault_file: &self.stage.fault_file })?;
        let deadline = Deadline::after(FAULT_LIMIT);
        let mut log = watcher.tail(&self.agent_log());
        let incident = loop {
            self.alive()?;
            log.show();
            if let Some(incident) = watcher.closed_after(seen)? {
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
        let served = self.until_judged(node, &mut own, node.gateway(), clock::now(), OWN_JUDGE_LIMIT);
        if let Err(e) = &served {
            self.printer.note(format!("  the demo's own judge does not confirm it: {}", e.why));
        }
        let after = Ledger::take(node)?;
        let losses = before.losses(&after);
        for loss in &losses {
            self.printer.note(format!("  lost: {} ({} bytes)", loss.what, loss.bytes));
        }
        let confirmed = incident.as_ref().filter(|_| served.is_ok());
        let row = Row::new(fault, injected, confirmed, losses.iter().map(|l| l.bytes).sum());
        self.printer.note(format!("  {}", row.line()));
        Ok(row)
    }

    /// Three starts in 300 s make OpenClaw's next boot come up with its channels silent, so the demo waits for the
    /// ration rather than break the node into that.
    fn wait_for_ration(&mut self, watcher: &Watcher) -> Result<()> {
        let mut told = false;
        loop {
            self.alive()?;
            let now = clock::now();
            match watcher.status() {
                Some(status) if status.start_free_at.ms <= now.ms => return Ok(()),
                Some(status) if !told => {
                    told = true;
                    self.printer.note(format!(
                        "  waiting {} for the start ration (3 in 300 s: a fourth would come up with silent channels)",
                        duration(status.start_free_at.ms - now.ms)
                    ));
                }
                Some(_) | None => {}
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// A bare cold start between rounds: the owner stops the node, the demo starts it alone, and gives it back.
    fn cold_start_between(&mut self, node: &Node, config_file: &Path, watcher: &Watcher) -> Result<u64> {
        self.wait_settled(watcher)?;
        self.wait_for_ration(watcher)?;
        let config = crate::config::load(config_file)?;
        let places = crate::places::Places::new(config_file.to_owned(), &config)?;
        let limit = STOP_LIMIT * 2;
        crate::control::give(&places, &crate::control::Order::Stop { grace_s: STOP_LIMIT.as_secs() }, limit)?;
        let cold = self.bare_start(node, None);
        crate::control::give(&places, &crate::control::Order::Start, limit)?;
        self.wait_settled(watcher)?;
        cold
    }

    fn say_how_to_reach(&self, node: &Node, config_file: &Path) {
        let p = self.printer;
        p.note("the node and its agent run on:");
        p.note(format!(
            "  the gateway    http://127.0.0.1:{}/ (config {})",
            node.port,
            node.config_path.display()
        ));
        p.note(format!("  the agent      koboshi status --config {}", config_file.display()));
        p.note(format!("  its log        {}", self.agent_log().display()));
        p.note(format!("  break it       e.g. rm -rf {}", node.package_dir.display()));
        if let Some(agent) = &self.agent {
            p.note(format!(
                "  end both       koboshi node stop --config {} && kill {} && rm -rf {}",
                config_file.display(),
                agent.id().pid,
                self.stage.dir.display()
            ));
        }
    }

    /// The agent must be there, and nobody must have pressed Ctrl-C.
    fn alive(&mut self) -> Result<()> {
        self.interrupted()?;
        let ended = self.agent.as_mut().and_then(Step::look);
        match ended {
            None => Ok(()),
            Some(ended) => {
                Err(Error::new(Kind::System, "go on with the demo", format!("the agent ended: {ended:?}"))
                    .hint(format!("see {}", self.agent_log().display())))
            }
        }
    }

    fn interrupted(&mut self) -> Result<()> {
        use host::signals::Got;
        let stop = self.signals.take()?.into_iter().any(|got| matches!(got, Got::Terminate | Got::Interrupt));
        if stop { Err(Error::new(Kind::System, "go on with the demo", "it was interrupted")) } else { Ok(()) }
    }

    /// Ends everything the demo started and removes what it made, unless it is to be kept.
    fn clean_up(&mut self, made: bool, result: &Result<Exit>) {
        if self.options.keep && result.is_ok() {
            return;
        }
        let limit = Deadline::after(Duration::from_secs(30));
        if let Some(mut agent) = self.agent.take() {
            // The agent's own containers lie inside its container: its gateway and its steps end with it.
            if let Err(e) = agent.kill(limit) {
                self.printer.error(&e);
            }
        }
        self.end_gateway(limit);
        self.containers.remove();
        let failed = match result {
            Ok(exit) => *exit != Exit::Done,
            Err(_) => true,
        };
        if made && !failed {
            let _ = std::fs::remove_dir_all(&self.stage.dir);
        } else {
            self.printer.note(format!("the demo's directory stays for a look: {}", self.stage.dir.display()));
        }
    }

    /// On a host without cgroup v2 the gateway outlives its agent; it is known by its lock.
    fn end_gateway(&self, limit: Deadline) {
        let state = self.stage.dir.join("home/.openclaw");
        if let Some(lock) = node::lock::read_file(&node::lock::path(&state, host::run::Ids::current().uid))
            && lock.id.alive()
            && lock.id.cwd().is_some_and(|cwd| cwd.starts_with(&self.stage.dir))
            && let Ok(fd) = lock.id.open()
        {
            let _ = lock.id.signal(rustix::process::Signal::KILL);
            let _ = fd.wait(limit);
        }
    }
}

/// A port that nobody listens on now.
fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).context(|| "find a free port".into())?;
    Ok(listener.local_addr().context(|| "find a free port".into())?.port())
}
