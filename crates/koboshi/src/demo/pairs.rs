//! The figures of recovery: every fault several times, each beside one bare cold start of the same gateway.
//!
//! OpenClaw bears three starts in 300 s, so one node would mostly wait. Several nodes, each with its own directory, port
//! and agent, take turns; a further one has no agent and is only started cold and stopped cleanly, which costs no ration.
//! One thing is measured at a time on the whole machine, and nothing begins before every agent has come to rest. What is
//! repaired in place interrupts nothing and has no cold start beside it. Each result is written at once, so that a run
//! that is cut still says what it has measured.

use crate::demo::report::{self, Row};
use crate::demo::subject::Subject;
use crate::demo::{Demo, LOOK_AGAIN};
use crate::print::{Exit, duration};
use drill::Fault;
use engine::Layer;

use host::{Context, Error, Kind, Result, files};
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

impl Demo {
    /// Plays all rounds.
    pub(super) fn pairs(&mut self, faults: &[&'static Fault]) -> Result<Exit> {
        let printer = self.printer;
        let (nodes, rounds) = (self.options.nodes, self.options.rounds);
        printer.note(format!("{nodes} nodes and one for cold starts in {}", self.dir.display()));
        self.make_subjects(nodes)?;
        let mut results = Results::open(self.options.results.clone())?;
        let versions = self.subjects.first().map_or(Value::Null, |s| s.versions.json());
        results.put(&json!({ "versions": versions, "nodes": nodes, "rounds": rounds }))?;

        let mut rows: Vec<Row> = Vec::new();
        let mut colds_ms = Vec::new();
        for round in 1..=rounds {
            let mut left: Vec<(usize, &'static Fault)> = faults.iter().copied().enumerate().collect();
            while !left.is_empty() {
                self.all_settled()?;
                let (at, which) = self.next(&left)?;
                let (number, fault) = left.remove(at);
                let pair = self.pair(round, number, fault, which)?;
                results.put(&pair.json())?;
                printer.note(format!("  {}", pair.line(rounds)));
                colds_ms.extend(pair.cold_ms);
                rows.push(pair.row);
            }
        }
        report::print(printer, &versions, &rows, &[], &colds_ms);
        Ok(if rows.iter().all(Row::righted) { Exit::Done } else { Exit::Failed })
    }

    /// The cold one stands first in the list. npm runs once; the others get copies, since the faults damage the trees.
    fn make_subjects(&mut self, nodes: u32) -> Result<()> {
        for number in 0..=nodes {
            self.halt.check()?;
            let name = if number == 0 { "cold".to_owned() } else { format!("node-{number}") };
            // One cache for all, also where none was named.
            let cache = self.options.cache.clone().unwrap_or_else(|| self.dir.join("cache"));
            let subject = Subject::make(
                &name,
                self.dir.join(&name),
                Some(cache),
                &self.options.openclaw,
                self.subjects.first().map(|s| &s.stage),
                self.printer,
            )?;
            self.subjects.push(subject);
        }
        // The first start of each fills its compile cache and is no figure; all of them start warm from then on.
        for (number, subject) in self.subjects.iter_mut().enumerate() {
            // The cold one remembers as much as the others: a start reads what there is.
            let first_ms = subject.bare_start(&mut self.halt, true)?;
            let name = if number == 0 { "the cold one".to_owned() } else { format!("node {number}") };
            self.printer.note(format!("{name}: first start in {}", duration(first_ms)));
            if number > 0 {
                subject.guard()?;
                subject.wait_settled(&mut self.halt)?;
            }
        }
        Ok(())
    }

    fn all_settled(&mut self) -> Result<()> {
        for subject in self.subjects.iter_mut().skip(1) {
            subject.until_settled(&mut self.halt)?;
        }
        Ok(())
    }

    /// The first fault of those left for which a node is free, and the node that has rested longest. Waits for one.
    fn next(&mut self, left: &[(usize, &'static Fault)]) -> Result<(usize, usize)> {
        let mut told = false;
        loop {
            let mut least_ms = u64::MAX;
            for (at, (_, fault)) in left.iter().enumerate() {
                let mut free = Vec::new();
                for (which, subject) in self.subjects.iter().enumerate().skip(1) {
                    let wait_ms = subject.free_in_ms(fault)?;
                    least_ms = least_ms.min(wait_ms);
                    if wait_ms == 0 {
                        free.push((subject.broken_at.map_or(0, |m| m.ms), which));
                    }
                }
                if let Some((_, which)) = free.into_iter().min() {
                    return Ok((at, which));
                }
            }
            if !told && least_ms > 1_000 {
                told = true;
                self.printer.note(format!("  all nodes wait for their start ration, {}", duration(least_ms)));
            }
            for subject in self.subjects.iter_mut().skip(1) {
                subject.alive(&mut self.halt)?;
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// One fault and, right before or after it by turns, one cold start.
    fn pair(&mut self, round: u32, number: usize, fault: &'static Fault, which: usize) -> Result<Pair> {
        let in_place = fault.healed_by == [Layer::InPlace];
        let cold_first = (round as usize + number).is_multiple_of(2);
        let load = load();
        let mut cold_ms = None;
        if !in_place && cold_first {
            cold_ms = Some(self.cold()?);
        }
        let subject = self.subjects.get_mut(which).ok_or_else(no_such)?;
        let row = subject.one(fault, &mut self.halt)?;
        if !in_place && !cold_first {
            self.all_settled()?;
            cold_ms = Some(self.cold()?);
        }
        Ok(Pair { round, which, row, cold_ms, cold_first, load })
    }

    fn cold(&mut self) -> Result<u64> {
        let subject = self.subjects.first_mut().ok_or_else(no_such)?;
        let ms = subject.bare_start(&mut self.halt, false)?;
        self.printer.note(format!("bare cold start: {}", duration(ms)));
        Ok(ms)
    }
}

fn no_such() -> Error {
    Error::new(Kind::System, "measure the next pair", "there is no such node")
}

/// One fault with what stands beside it.
struct Pair {
    round: u32,
    which: usize,
    row: Row,
    /// Nothing where nothing was interrupted.
    cold_ms: Option<u64>,
    cold_first: bool,
    load: f64,
}

impl Pair {
    fn json(&self) -> Value {
        let mut value = json!({
            "round": self.round,
            "node": self.which,
            "load": self.load,
            "result": self.row.json(),
            "decided_to_serving_ms": self.row.decided_to_serving_ms(),
        });
        if let Some(cold_ms) = self.cold_ms {
            value["cold_ms"] = json!(cold_ms as f64);
            value["order"] = json!(if self.cold_first { "cold-first" } else { "fault-first" });
        }
        value
    }

    fn line(&self, rounds: u32) -> String {
        let place = format!("round {} of {rounds}, node {}, load {:.1}", self.round, self.which, self.load);
        match self.cold_ms {
            Some(cold_ms) if cold_ms > 0 => {
                let served_ms = self.row.decided_to_serving_ms();
                format!(
                    "{place}: decision to serving {:.2} of the cold start beside it",
                    served_ms / cold_ms as f64
                )
            }
            Some(_) | None => format!("{place}: nothing was interrupted"),
        }
    }
}

/// One JSON object a line, each written as soon as it is known.
struct Results {
    file: Option<(PathBuf, File)>,
}

impl Results {
    fn open(path: Option<PathBuf>) -> Result<Results> {
        let file = match path {
            Some(path) => {
                let file = File::create(&path).context(|| format!("write {}", path.display()))?;
                Some((path, file))
            }
            None => None,
        };
        Ok(Results { file })
    }

    fn put(&mut self, value: &Value) -> Result<()> {
        match &mut self.file {
            Some((path, file)) => {
                // In one write, so that whoever follows the file never reads half a line for good.
                file.write_all(format!("{value}\n").as_bytes())
                    .context(|| format!("write {}", path.display()))
            }
            None => Ok(()),
        }
    }
}

/// The load of the last minute.
fn load() -> f64 {
    let text = files::read_bounded(std::path::Path::new("/proc/loadavg"), 256).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.split_ascii_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0.0)
}
