//! Each fault beside bare cold starts of the same gateway in the same run.
//!
//! The demo plays the pairs and writes each to a file as it ends; this reads the file. So the table can be printed while
//! the run goes on, and of a run that was cut (`--from FILE`).

use super::{build, machine, median, spread, yes};
use crate::demo::{self, Fault};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

const RATIO_ALLOWED: f64 = 1.25;
/// How often the file of results is read while the run goes on.
const FOLLOW: Duration = Duration::from_secs(2);

/// What is to be measured.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Recovery {
    pub(crate) rounds: u64,
    pub(crate) nodes: u64,
    pub(crate) faults: Vec<String>,
    pub(crate) json: bool,
    /// Print the table of an earlier run and measure nothing.
    pub(crate) from: Option<PathBuf>,
}

impl Default for Recovery {
    fn default() -> Recovery {
        Recovery { rounds: 5, nodes: 3, faults: Vec::new(), json: false, from: None }
    }
}

/// One fault and what stands beside it.
#[derive(Debug, Clone, PartialEq)]
struct Pair {
    fault: Fault,
    round: u64,
    load: f64,
    /// From the decision to the first of the looks that were confirmed.
    served_ms: f64,
    /// Nothing where nothing was interrupted.
    cold_ms: Option<f64>,
}

impl Pair {
    fn ratio(&self) -> Option<f64> {
        self.cold_ms.map(|cold| self.served_ms / cold)
    }
}

/// What a file of results holds.
#[derive(Debug, Default, PartialEq)]
struct Results {
    versions: String,
    nodes: u64,
    rounds: u64,
    pairs: Vec<Pair>,
}

/// Plays or reads, and prints.
pub(crate) fn recovery(root: &Path, options: &Recovery) -> ExitCode {
    let where_taken = machine();
    let (file, ended_well) = match &options.from {
        Some(file) => (file.clone(), true),
        None => match play(root, options) {
            Ok(played) => played,
            Err(why) => {
                println!("not measured: {why}");
                return ExitCode::FAILURE;
            }
        },
    };
    let results = match read(&std::fs::read_to_string(&file).unwrap_or_default()) {
        Ok(results) => results,
        Err(why) => {
            println!("{} is not what is documented: {why}", file.display());
            return ExitCode::FAILURE;
        }
    };
    let sums = sums(&results);
    let righted = results.pairs.iter().all(|p| p.fault.is_righted());
    // What was asked for and is not there must not look like a whole measurement.
    let whole = !sums.is_empty() && sums.iter().all(|s| s.runs as u64 == results.rounds) && ended_well;
    let within = sums.iter().filter_map(|s| s.ratio).all(|r| r <= RATIO_ALLOWED);
    let taken = if options.from.is_some() { "read from a file".to_owned() } else { where_taken };
    if options.json {
        println!("{}", object(&results, &sums, &taken, whole));
    } else {
        print!("{}", table(&results, &sums, &taken, whole));
        println!("All righted, nothing lost: {}. Within {RATIO_ALLOWED}: {}.", yes(righted), yes(within));
    }
    eprintln!("each pair: {}", file.display());
    if whole && righted { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs the demo; the file of results and whether the demo ended by itself.
fn play(root: &Path, options: &Recovery) -> Result<(PathBuf, bool), String> {
    if !build(root) {
        return Err("the binary does not build".to_owned());
    }
    let file = root.join(format!("target/bench-recovery-{}.jsonl", std::process::id()));
    let (rounds, nodes) = (options.rounds.to_string(), options.nodes.to_string());
    let file_text = file.to_str().ok_or("the path of the repository is no text")?;
    let mut args = vec!["--rounds", &rounds, "--nodes", &nodes, "--results", file_text];
    for fault in &options.faults {
        args.extend(["--fault", fault]);
    }
    let (done, told) = mpsc::channel();
    let followed = file.clone();
    let follower = std::thread::spawn(move || follow(&followed, &told));
    let ran = demo::start(root, &args, options.rounds);
    drop(done);
    // It ends at once when told; what it would have printed is printed below.
    let _ = follower.join();
    if !ran.ok() {
        eprintln!("the demo did not end well: {:?}\n{}", ran.status, ran.stdout.trim());
    }
    Ok((
        file,
        ran.status.is_some_and(|s| s.code().is_some_and(|code| code <= 1))
            && !ran.stdout.contains("\"error\""),
    ))
}

/// Prints the table so far whenever a round is through.
fn follow(file: &Path, told: &mpsc::Receiver<()>) {
    let mut shown = 0;
    while told.recv_timeout(FOLLOW) == Err(mpsc::RecvTimeoutError::Timeout) {
        let Ok(results) = read(&std::fs::read_to_string(file).unwrap_or_default()) else { continue };
        let round = results.pairs.iter().map(|p| p.round).max().unwrap_or(0);
        if round > shown + 1 {
            shown = round - 1;
            eprint!("\n{}\n", table(&results, &sums(&results), &format!("after {shown} rounds"), false));
        }
    }
}

/// Reads a file of results; a last line without its end is one that is being written.
fn read(text: &str) -> Result<Results, String> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let mut lines =
        whole.lines().map(|l| serde_json::from_str::<Value>(l).map_err(|e| format!("{e} in {l}")));
    let head = lines.next().ok_or("there are no results yet")??;
    let mut results = Results {
        versions: head["versions"].to_string(),
        nodes: head["nodes"].as_u64().ok_or("no number of nodes")?,
        rounds: head["rounds"].as_u64().ok_or("no number of rounds")?,
        pairs: Vec::new(),
    };
    for line in lines {
        let line = line?;
        let number = |key: &str| line[key].as_f64().ok_or_else(|| format!("no number `{key}` in {line}"));
        results.pairs.push(Pair {
            fault: demo::fault(&line["result"])?,
            round: line["round"].as_u64().ok_or("no round")?,
            load: number("load")?,
            served_ms: number("decided_to_serving_ms")?,
            cold_ms: if line["cold_ms"].is_null() { None } else { Some(number("cold_ms")?) },
        });
    }
    Ok(results)
}

/// One fault's medians.
#[derive(Debug, PartialEq)]
struct Sum {
    name: String,
    layers: String,
    runs: usize,
    detect_ms: f64,
    repair_ms: f64,
    start_ms: f64,
    judge_ms: f64,
    down_ms: f64,
    lost_bytes: f64,
    righted: bool,
    served_ms: Vec<f64>,
    /// The cold starts beside it.
    cold_ms: Vec<f64>,
    /// Median over the median of the cold starts beside it: what the limit is set on.
    ratio: Option<f64>,
    pair_ratios: Vec<f64>,
}

/// In the order in which the faults were first played.
fn sums(results: &Results) -> Vec<Sum> {
    let mut order: Vec<&str> = Vec::new();
    let mut by_name: BTreeMap<&str, Vec<&Pair>> = BTreeMap::new();
    for pair in &results.pairs {
        if !order.contains(&pair.fault.name.as_str()) {
            order.push(&pair.fault.name);
        }
        by_name.entry(&pair.fault.name).or_default().push(pair);
    }
    order.into_iter().map(|name| sum(name, by_name.get(name).map_or(&[], Vec::as_slice))).collect()
}

fn sum(name: &str, runs: &[&Pair]) -> Sum {
    let of = |get: fn(&Fault) -> f64| median(&runs.iter().map(|p| get(&p.fault)).collect::<Vec<_>>());
    let cold_ms: Vec<f64> = runs.iter().filter_map(|p| p.cold_ms).collect();
    let served_ms: Vec<f64> = runs.iter().map(|p| p.served_ms).collect();
    let mut layers: Vec<&str> = runs.iter().map(|p| p.fault.layer.as_str()).collect();
    layers.sort_unstable();
    layers.dedup();
    Sum {
        name: name.to_owned(),
        layers: layers.join(", "),
        runs: runs.len(),
        detect_ms: of(|f| f.detect_ms),
        repair_ms: of(|f| f.repair_ms),
        start_ms: of(|f| f.start_ms),
        judge_ms: of(|f| f.judge_ms),
        down_ms: of(|f| f.down_ms),
        lost_bytes: runs.iter().map(|p| p.fault.lost_bytes).sum(),
        righted: runs.iter().all(|p| p.fault.is_righted()),
        ratio: (!cold_ms.is_empty()).then(|| median(&served_ms) / median(&cold_ms)),
        pair_ratios: runs.iter().filter_map(|p| p.ratio()).collect(),
        served_ms,
        cold_ms,
    }
}

fn all_cold_ms(results: &Results) -> Vec<f64> {
    results.pairs.iter().filter_map(|p| p.cold_ms).collect()
}

/// Markdown; seconds, because tenths of a millisecond mislead.
fn table(results: &Results, sums: &[Sum], taken: &str, whole: bool) -> String {
    let cold = all_cold_ms(results);
    let loads: Vec<f64> = results.pairs.iter().map(|p| p.load).collect();
    let s = |ms: f64| format!("{:.2}", ms / 1e3);
    let least_most = |values: &[f64], digits: usize| {
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if values.is_empty() { "-".to_owned() } else { format!("{least:.digits$} to {most:.digits$}") }
    };
    let mut out = format!("{taken}\nversions: {}\n\n", results.versions);
    out.push_str(&format!(
        "{} nodes and one for the cold starts; one thing measured at a time; the other gateways and their agents idled \
         beside it; load {} at the beginnings.\n",
        results.nodes,
        least_most(&loads, 1),
    ));
    if !cold.is_empty() {
        let (mid, count) = (s(median(&cold)), cold.len());
        out.push_str(&format!("Bare cold start: median {mid} s of {count} ({} ms).\n", spread(&cold)));
    }
    if !whole {
        out.push_str(&format!("**Not whole**: {} rounds were asked for.\n", results.rounds));
    }
    out.push_str(
        "\nSeconds, medians. *Served*: decision to the first of the looks that were then confirmed. *x cold*: its median \
         over the median of the cold starts beside it; *pairs*: median, least and most of the ratios pair by pair.\n\n\
         | fault | healed by | runs | noticed | repair | start | judge | down | served | cold | x cold | pairs | lost B |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for f in sums {
        let (served, cold, ratio, pairs) = match f.ratio {
            Some(ratio) => (
                s(median(&f.served_ms)),
                s(median(&f.cold_ms)),
                format!("{ratio:.2}{}", if ratio > RATIO_ALLOWED { " **over**" } else { "" }),
                format!("{:.2} ({})", median(&f.pair_ratios), least_most(&f.pair_ratios, 2)),
            ),
            None => ("-".to_owned(), "-".to_owned(), "-".to_owned(), "-".to_owned()),
        };
        out.push_str(&format!(
            "| {}{} | {} | {} | {} | {} | {} | {} | {} | {served} | {cold} | {ratio} | {pairs} | {:.0} |\n",
            f.name,
            if f.righted { "" } else { " **NOT RIGHTED**" },
            f.layers,
            f.runs,
            s(f.detect_ms),
            s(f.repair_ms),
            s(f.start_ms),
            s(f.judge_ms),
            s(f.down_ms),
            f.lost_bytes
        ));
    }
    out
}

/// The same as one object. Numbers that do not exist are left out, never null.
fn object(results: &Results, sums: &[Sum], taken: &str, whole: bool) -> Value {
    let cold = all_cold_ms(results);
    let faults: Vec<Value> = sums
        .iter()
        .map(|f| {
            let mut v = json!({
                "fault": f.name, "layers": f.layers, "runs": f.runs, "righted": f.righted,
                "detect_ms": f.detect_ms, "repair_ms": f.repair_ms, "start_ms": f.start_ms,
                "judge_ms": f.judge_ms, "down_ms": f.down_ms, "lost_bytes": f.lost_bytes,
            });
            if let Some(ratio) = f.ratio {
                v["served_ms"] = json!(median(&f.served_ms));
                v["cold_start_ms"] = json!(median(&f.cold_ms));
                v["ratio_of_medians"] = json!(ratio);
                v["median_of_ratios"] = json!(median(&f.pair_ratios));
                v["ratios"] = json!(f.pair_ratios);
            }
            v
        })
        .collect();
    let mut out = json!({
        "schema": 1, "taken": taken, "versions": results.versions, "nodes": results.nodes,
        "rounds": results.rounds, "whole": whole, "ratio_allowed": RATIO_ALLOWED,
        "cold_starts_ms": cold, "faults": faults,
    });
    if !cold.is_empty() {
        out["cold_start_ms"] = json!(median(&cold));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, layer: &str, served: f64, cold: Option<f64>) -> String {
        let mut v = json!({
            "round": 1, "node": 1, "load": 0.5, "decided_to_serving_ms": served,
            "result": {"fault": name, "layer": layer, "outcome": "recovered", "detect_ms": 1.0, "repair_ms": 2.0,
                "start_ms": 3.0, "judge_ms": 4.0, "down_ms": 5.0, "lost_bytes": 0},
        });
        if let Some(cold) = cold {
            v["cold_ms"] = json!(cold);
        }
        format!("{v}\n")
    }

    const HEAD: &str = "{\"versions\":{\"openclaw\":\"1\"},\"nodes\":2,\"rounds\":3}\n";

    #[test]
    fn ratios_are_of_medians_and_of_pairs() {
        let mut text = HEAD.to_owned();
        for (served, cold) in [(10.0, 10.0), (12.0, 8.0), (30.0, 20.0)] {
            text.push_str(&line("killed", "restart", served, Some(cold)));
        }
        text.push_str(&line("config", "in-place", 0.0, None));
        let results = read(&text).unwrap();
        let sums = sums(&results);
        assert_eq!(sums.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["killed", "config"]);
        assert_eq!(sums[0].ratio, Some(12.0 / 10.0));
        assert_eq!(median(&sums[0].pair_ratios), 1.5);
        assert_eq!(sums[1].ratio, None);
        let printed = table(&results, &sums, "here", false);
        assert!(printed.contains("| 1.20 | 1.50 (1.00 to 1.50) |"), "{printed}");
        assert!(!printed.contains("NaN"), "{printed}");
        let object = object(&results, &sums, "here", false).to_string();
        assert!(!object.contains("null"), "{object}");
    }

    #[test]
    fn half_a_line_is_one_that_is_being_written_and_a_missing_number_is_an_error() {
        let whole = line("killed", "restart", 1.0, Some(1.0));
        assert_eq!(read(&format!("{HEAD}{whole}{}", &whole[..20])).unwrap().pairs.len(), 1);
        assert!(read(&format!("{HEAD}{}", whole.replace("\"load\":0.5", "\"load\":null"))).is_err());
        assert!(read("").is_err());
    }
}
