//! `koboshi demo`: a real OpenClaw node in a throw-away directory, knocked over and righted before your eyes.
//!
//! The node is guarded by the real agent, as a process of its own, from a configuration of its own. The demo only
//! breaks things, waits for the agent to close its incident, and then takes stock itself: was it the right layer, does
//! the node serve by a judge of the demo's own, and is every byte of the user's still there.

mod pairs;
mod pulse;
mod report;
mod seed;
mod setup;
mod subject;
mod watcher;

use crate::cli;
use crate::demo::report::{Row, Skipped};
use crate::demo::subject::Subject;
use crate::print::{Exit, Printer, duration};
use drill::Fault;
use engine::Layer;
use host::clock;
use host::signals::Signals;
use host::{Context, Error, Kind, Result};
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
    let (dir, made) = directory(options.dir.as_deref())
        .map_err(|e| e.hint("name a directory that can be written with --dir"))?;
    let mut demo = Demo {
        printer,
        dir,
        options: options.clone(),
        halt: Halt { signals: Signals::new()? },
        subjects: Vec::new(),
    };
    let result = if options.nodes == 0 { demo.play(&faults) } else { demo.pairs(&faults) };
    demo.clean_up(made, &result);
    // What failed inside lies there to be looked at; no failure goes out without a word on what to do.
    result.map_err(|e| match e.hint {
        Some(_) => e,
        None => e.hint(format!("look into {}, then run the demo again", demo.dir.display())),
    })
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
    dir: PathBuf,
    options: cli::Demo,
    halt: Halt,
    subjects: Vec<Subject>,
}

/// Whether somebody wants the demo to end.
struct Halt {
    signals: Signals,
}

impl Halt {
    fn check(&mut self) -> Result<()> {
        use host::signals::Got;
        let stop = self.signals.take()?.into_iter().any(|got| matches!(got, Got::Terminate | Got::Interrupt));
        if stop { Err(Error::new(Kind::System, "go on with the demo", "it was interrupted")) } else { Ok(()) }
    }
}

impl Demo {
    fn play(&mut self, faults: &[&'static Fault]) -> Result<Exit> {
        let printer = self.printer;
        printer.note(format!("koboshi demo in {}", self.dir.display()));
        let options = &self.options;
        let made =
            Subject::make("node", self.dir.clone(), options.cache.clone(), &options.openclaw, None, printer)?;
        self.subjects.push(made);
        let (Some(subject), halt) = (self.subjects.last_mut(), &mut self.halt) else {
            return Err(Error::new(Kind::System, "play the demo", "it has no node"));
        };
        printer.note(format!(
            "start OpenClaw {} for the first time, on port {}",
            subject.versions.openclaw, subject.node.port
        ));
        let first_ms = subject.bare_start(halt, true)?;
        let mut colds = vec![subject.bare_start(halt, false)?];
        printer.note(format!(
            "bare cold start of this gateway on this machine: {} (its first: {})",
            duration(colds[0]),
            duration(first_ms)
        ));
        subject.guard()?;
        subject.wait_settled(halt)?;

        let mut rows: Vec<Row> = Vec::new();
        if !self.options.no_faults {
            for round in 1..=self.options.rounds {
                if round > 1 {
                    if let Some(fault) = faults.first() {
                        subject.wait_for_ration(fault, halt)?;
                    }
                    colds.push(subject.cold_start_between(halt)?);
                }
                for fault in faults {
                    subject.wait_settled(halt)?;
                    subject.wait_for_ration(fault, halt)?;
                    rows.push(subject.one(fault, halt)?);
                }
            }
        }
        let skipped: Vec<Skipped> = Vec::new();
        report::print(printer, &subject.versions.json(), &rows, &skipped, &colds);
        if self.options.keep {
            subject.say_how_to_reach()?;
        }
        Ok(if rows.iter().all(Row::righted) { Exit::Done } else { Exit::Failed })
    }

    /// Ends everything the demo started and removes what it made, unless it is to be kept.
    fn clean_up(&mut self, made: bool, result: &Result<Exit>) {
        if self.options.keep && result.is_ok() {
            return;
        }
        for subject in &mut self.subjects {
            subject.end();
        }
        let failed = match result {
            Ok(exit) => *exit != Exit::Done,
            Err(_) => true,
        };
        if made && !failed {
            let _ = std::fs::remove_dir_all(&self.dir);
        } else {
            self.printer.note(format!("the demo's directory stays for a look: {}", self.dir.display()));
        }
    }
}

/// A port that nobody listens on now.
fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).context(|| "find a free port".into())?;
    Ok(listener.local_addr().context(|| "find a free port".into())?.port())
}
