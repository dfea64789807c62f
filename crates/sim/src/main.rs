//! `sim SEEDS FIRST_SEED [--mutant NAME] [--trace]`: lives through that many seeds.
//!
//! Exit 0 and one summary line; or exit 1, the failing seed and the commit; exit 2 for arguments it does not know.
#![allow(clippy::print_stdout, clippy::print_stderr)] // A tool of this house: its lines are its whole purpose.

use sim::{Counts, Mutant, Told};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

/// Seeds when none are given: what CI runs.
const SEEDS: u64 = 20_000;

struct Asked {
    seeds: u64,
    first: u64,
    mutant: Option<Mutant>,
    trace: bool,
}

fn asked(mut args: impl Iterator<Item = String>) -> Result<Asked, String> {
    let mut asked = Asked { seeds: SEEDS, first: 1, mutant: None, trace: false };
    let mut place = 0;
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--trace" => asked.trace = true,
            "--mutant" => {
                let name = args.next().unwrap_or_default();
                asked.mutant = Some(Mutant::named(&name).ok_or(format!("there is no mutant {name:?}"))?);
            }
            number => {
                let number = number.parse().map_err(|_| format!("{number:?} is not a number"))?;
                match place {
                    0 => asked.seeds = number,
                    1 => asked.first = number,
                    _ => return Err("too many arguments".to_owned()),
                }
                place += 1;
            }
        }
    }
    Ok(asked)
}

fn main() -> ExitCode {
    let asked = match asked(std::env::args().skip(1)) {
        Ok(asked) => asked,
        Err(why) => {
            eprintln!("sim: {why}\nusage: sim [SEEDS [FIRST_SEED]] [--mutant NAME] [--trace]");
            return ExitCode::from(2);
        }
    };
    if asked.trace {
        let told = sim::live(asked.first, asked.mutant, false, true);
        told.trace.iter().for_each(|line| println!("{line}"));
    }
    let (counts, failed) = all(&asked);
    match failed {
        None => {
            println!(
                "sim: {} schedules from seed {}: {} incidents, {} climbs, {} steps, {} starts, {} emergencies, \
                 {} recoveries, {} agent deaths, {} reboots: no violation",
                asked.seeds,
                asked.first,
                counts.incidents,
                counts.climbs,
                counts.steps,
                counts.starts,
                counts.emergencies,
                counts.recoveries,
                counts.deaths,
                counts.reboots
            );
            ExitCode::SUCCESS
        }
        Some((seed, told)) => {
            if let Some(violation) = told.violation {
                println!(
                    "sim: seed {seed} at commit {}: {} at {} ms: {}\n     again: cargo run --release --bin sim -- 1 {seed} --trace",
                    commit(),
                    violation.checker,
                    violation.at_ms,
                    violation.what
                );
            }
            ExitCode::FAILURE
        }
    }
}

/// All seeds, shared out over the cores; the lowest failing one.
fn all(asked: &Asked) -> (Counts, Option<(u64, Told)>) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicU64::new(0);
    let stop = AtomicU64::new(u64::MAX);
    let one = || {
        let mut counts = Counts::default();
        let mut failed: Option<(u64, Told)> = None;
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= asked.seeds || index > stop.load(Ordering::Relaxed) {
                return (counts, failed);
            }
            let seed = asked.first.wrapping_add(index);
            let told = sim::run(seed, asked.mutant);
            counts.add(&told.counts);
            if told.violation.is_some() {
                stop.fetch_min(index, Ordering::Relaxed);
                if failed.as_ref().is_none_or(|(known, _)| seed < *known) {
                    failed = Some((seed, told));
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        let mut counts = Counts::default();
        let mut failed: Option<(u64, Told)> = None;
        for worker in workers {
            let Ok((more, lower)) = worker.join() else { continue };
            counts.add(&more);
            if let Some((seed, told)) = lower
                && failed.as_ref().is_none_or(|(known, _)| seed < *known)
            {
                failed = Some((seed, told));
            }
        }
        (counts, failed)
    })
}

/// The commit checked out where this runs, read from the files of git; "unknown" elsewhere.
fn commit() -> String {
    let Ok(here) = std::env::current_dir() else { return "unknown".to_owned() };
    here.ancestors().find_map(|dir| head(&dir.join(".git"))).unwrap_or_else(|| "unknown".to_owned())
}

fn head(git: &Path) -> Option<String> {
    let head = std::fs::read_to_string(git.join("HEAD")).ok()?;
    let Some(name) = head.trim().strip_prefix("ref: ") else { return Some(head.trim().to_owned()) };
    let loose: PathBuf = git.join(name);
    if let Ok(commit) = std::fs::read_to_string(loose) {
        return Some(commit.trim().to_owned());
    }
    let packed = std::fs::read_to_string(git.join("packed-refs")).ok()?;
    packed.lines().find_map(|line| line.strip_suffix(name)).map(|commit| commit.trim().to_owned())
}
