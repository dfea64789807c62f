//! The figures of `docs/benchmarks.md`, measured on the real program and printed as markdown, with the machine they
//! were measured on.

use crate::checks::cargo;
use crate::demo;
use crate::proc::{self, Id};
use crate::run::{Ran, Show, run};
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Between two looks at the agent: short enough to meet its steps, long enough not to disturb.
const SAMPLE: Duration = Duration::from_secs(1);
/// The agent settles before it is measured: first snapshot, first sweep.
const SETTLE: Duration = Duration::from_secs(150);
const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// Runs for the time from start to first probe.
const STARTS: usize = 20;
/// A binary that has not probed by then does not.
const PROBE_LIMIT: Duration = Duration::from_secs(5);
/// What the issue of the main job allows.
const RSS_ALLOWED_MB: f64 = 15.0;
const CPU_ALLOWED_PERCENT: f64 = 0.3;
const BINARY_ALLOWED_MB: f64 = 12.0;
const PROBE_ALLOWED_MS: f64 = 50.0;
const RATIO_ALLOWED: f64 = 1.25;
/// How deep a kept demo's directory is searched for its configuration.
const SEARCH_DEPTH: usize = 4;

fn build(root: &Path) -> bool {
    run(&mut cargo(root, &["build", "--release"]), Show::Yes, BUILD_LIMIT).ok()
}

/// Each fault beside bare cold starts of the same gateway in the same run.
pub(crate) fn recovery(root: &Path, rounds: u64) -> ExitCode {
    if !build(root) {
        return ExitCode::FAILURE;
    }
    let rounds_text = rounds.to_string();
    let ran = demo::start(root, &["--rounds", &rounds_text], rounds);
    let report = match demo::read(&ran.stdout) {
        Ok(report) => report,
        Err(why) => {
            println!("the demo's report is not what is documented: {why}\n{}", ran.stdout.trim());
            return ExitCode::FAILURE;
        }
    };
    println!("{}\nversions: {}\n", machine(), report.versions);
    let cold = median(&report.cold_start_ms);
    println!(
        "Bare cold start: median {cold:.0} ms of {} ({})\n",
        report.cold_start_ms.len(),
        spread(&report.cold_start_ms)
    );
    println!(
        "| fault | layer | runs | detect ms | repair ms | start ms | judge ms | down ms | (repair + start) / cold |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let mut by_name: BTreeMap<&str, Vec<&demo::Fault>> = BTreeMap::new();
    for fault in &report.faults {
        by_name.entry(&fault.name).or_default().push(fault);
    }
    let mut over = false;
    for (name, runs) in &by_name {
        let of = |get: fn(&demo::Fault) -> f64| median(&runs.iter().map(|f| get(f)).collect::<Vec<_>>());
        let served = of(|f| f.repair_ms + f.start_ms);
        let ratio = served / cold;
        over |= ratio > RATIO_ALLOWED;
        let mut layers: Vec<&str> = runs.iter().map(|f| f.layer.as_str()).collect();
        layers.sort_unstable();
        layers.dedup();
        println!(
            "| {name} | {} | {} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {ratio:.2} |",
            layers.join(", "),
            runs.len(),
            of(|f| f.detect_ms),
            of(|f| f.repair_ms),
            of(|f| f.start_ms),
            of(|f| f.judge_ms),
            of(|f| f.down_ms)
        );
    }
    for (fault, reason) in &report.skipped {
        println!("\nleft out: {fault}: {reason}");
    }
    let righted = report.faults.iter().all(demo::Fault::is_righted);
    println!("\nAll righted, nothing lost: {}. Within {RATIO_ALLOWED}: {}.", yes(righted), yes(!over));
    if ran.ok() && righted { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The agent at rest beside a healthy node.
pub(crate) fn agent(root: &Path, minutes: u64) -> ExitCode {
    if !build(root) {
        return ExitCode::FAILURE;
    }
    let dir = root.join(format!("target/bench-agent-{}", std::process::id()));
    let Some(dir_text) = dir.to_str() else { return ExitCode::FAILURE };
    let kept = demo::start(root, &["--no-faults", "--keep", "--dir", dir_text], 0);
    let measured = measure(root, &dir, &kept, minutes);
    tear_down(root, &dir);
    match measured {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("not measured: {why}\n{}", kept.stdout.trim());
            ExitCode::FAILURE
        }
    }
}

fn measure(root: &Path, dir: &Path, kept: &Ran, minutes: u64) -> Result<(), String> {
    if !kept.ok() {
        return Err("the demo node could not be set up".to_owned());
    }
    let binary = demo::binary(root);
    let agent = find_agent(&binary, dir)?;
    println!("{}\n", machine());
    eprintln!("the agent is process {}; it settles for {} s", agent.pid, SETTLE.as_secs());
    std::thread::sleep(SETTLE);
    let figures = watch(agent, &binary, Duration::from_secs(minutes * 60))?;
    let size_mb = std::fs::metadata(&binary).map_or(0.0, |m| m.len() as f64 / 1e6);
    let starts = first_probes(&binary, dir);
    println!("| figure | measured | allowed | kept |\n|---|---|---|---|");
    let row = |what: &str, value: f64, unit: &str, allowed: f64| {
        println!("| {what} | {value:.3} {unit} | {allowed} {unit} | {} |", yes(value <= allowed));
    };
    row("agent, RSS, most", figures.rss_most_mb, "MB", RSS_ALLOWED_MB);
    row("agent, RSS, median", figures.rss_median_mb, "MB", RSS_ALLOWED_MB);
    row("agent and all its steps, one core", figures.cpu_percent, "%", CPU_ALLOWED_PERCENT);
    row("binary", size_mb, "MB", BINARY_ALLOWED_MB);
    if starts.is_empty() {
        println!("| start to first probe | it made none within {} s | | |", PROBE_LIMIT.as_secs());
    } else {
        row("start to first probe, median", median(&starts), "ms", PROBE_ALLOWED_MS);
    }
    println!("| agent alone, anonymous RSS, most | {:.3} MB | | |", figures.anon_most_mb);
    println!("| agent alone, one core | {:.3} % | | |", figures.own_percent);
    println!(
        "| waiting for block I/O, share of the time | {:.3} % | 1 % | {} |",
        figures.blocked_percent,
        yes(figures.blocked_percent <= 1.0)
    );
    println!("| a step's RSS, most | {:.1} MB | | |", figures.step_most_mb);
    println!("\nOver {:.1} minutes, {} looks, {} steps met.", figures.minutes, figures.looks, figures.steps);
    Ok(())
}

struct Figures {
    rss_most_mb: f64,
    rss_median_mb: f64,
    anon_most_mb: f64,
    cpu_percent: f64,
    own_percent: f64,
    blocked_percent: f64,
    step_most_mb: f64,
    minutes: f64,
    looks: usize,
    steps: usize,
}

/// Looks at the agent every second. Its processor time and that of the steps it has waited for come from its own
/// entry; steps still running are added from theirs. The gateway is another program and is never counted.
fn watch(agent: Id, binary: &Path, span: Duration) -> Result<Figures, String> {
    let gone = || "the agent has ended".to_owned();
    let first = proc::stat(agent.pid).filter(|s| s.id == agent).ok_or_else(gone)?;
    let started = Instant::now();
    let (mut rss, mut anon_most, mut step_most) = (Vec::new(), 0, 0);
    let mut steps: BTreeMap<Id, u64> = BTreeMap::new();
    let mut living_ticks = 0;
    while started.elapsed() < span {
        std::thread::sleep(SAMPLE);
        if !proc::alive(agent) {
            return Err(gone());
        }
        rss.push(proc::memory_bytes(agent.pid, "VmRSS").ok_or_else(gone)? as f64 / 1e6);
        anon_most = anon_most.max(proc::memory_bytes(agent.pid, "RssAnon").unwrap_or(0));
        living_ticks = 0;
        for id in proc::family(agent.pid).into_iter().filter(|id| *id != agent) {
            if std::fs::read_link(format!("/proc/{}/exe", id.pid)).is_ok_and(|p| p == binary) {
                let ticks = proc::stat(id.pid).map_or(0, |s| s.own_ticks + s.children_ticks);
                step_most = step_most.max(proc::memory_bytes(id.pid, "VmRSS").unwrap_or(0));
                living_ticks += ticks;
                steps.insert(id, ticks);
            }
        }
    }
    let last = proc::stat(agent.pid).filter(|s| s.id == agent).ok_or_else(gone)?;
    let seconds = started.elapsed().as_secs_f64();
    let percent =
        |ticks: u64| ticks as f64 / rustix::param::clock_ticks_per_second() as f64 / seconds * 100.0;
    let own = last.own_ticks - first.own_ticks;
    Ok(Figures {
        rss_most_mb: rss.iter().copied().fold(0.0, f64::max),
        rss_median_mb: median(&rss),
        anon_most_mb: anon_most as f64 / 1e6,
        cpu_percent: percent(own + (last.children_ticks - first.children_ticks) + living_ticks),
        own_percent: percent(own),
        blocked_percent: percent(last.blocked_ticks.saturating_sub(first.blocked_ticks)),
        step_most_mb: step_most as f64 / 1e6,
        minutes: seconds / 60.0,
        looks: rss.len(),
        steps: steps.len(),
    })
}

fn find_agent(binary: &Path, dir: &Path) -> Result<Id, String> {
    let by_dir: Vec<Id> = proc::running(binary, &["guard", &dir.display().to_string()]);
    match by_dir.as_slice() {
        [one] => Ok(*one),
        [] => Err("no agent of the kept demo is running".to_owned()),
        _ => Err(format!("{} agents of the kept demo are running", by_dir.len())),
    }
}

/// Milliseconds from the start of our binary to its first connection to the gateway's port, on which we listen.
fn first_probes(binary: &Path, dir: &Path) -> Vec<f64> {
    let Some(config) = find(dir, "koboshi.toml", SEARCH_DEPTH) else { return Vec::new() };
    let Ok(listener) = TcpListener::bind("127.0.0.1:0") else { return Vec::new() };
    let (Ok(address), Ok(())) = (listener.local_addr(), listener.set_nonblocking(true)) else {
        return Vec::new();
    };
    let own = dir.join("first-probe");
    let written = std::fs::create_dir_all(own.join("koboshi.d"))
        .and_then(|()| std::fs::copy(&config, own.join("koboshi.toml")))
        .and_then(|_| {
            std::fs::write(own.join("koboshi.d/port.toml"), format!("[node]\nport = {}\n", address.port()))
        });
    if written.is_err() {
        return Vec::new();
    }
    (0..STARTS).filter_map(|_| first_probe(binary, &own.join("koboshi.toml"), &listener)).collect()
}

fn first_probe(binary: &Path, config: &Path, listener: &TcpListener) -> Option<f64> {
    let started = Instant::now();
    let mut child = Command::new(binary)
        .args(["check", "--json", "--config"])
        .arg(config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let mut took = None;
    while took.is_none() && started.elapsed() < PROBE_LIMIT {
        match listener.accept() {
            Ok(_) => took = Some(started.elapsed().as_secs_f64() * 1e3),
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
    }
    crate::run::end(&mut child);
    // Further connections of this run belong to no other.
    while listener.accept().is_ok() {}
    took
}

fn find(dir: &Path, name: &str, depth: usize) -> Option<PathBuf> {
    let here = dir.join(name);
    if here.is_file() {
        return Some(here);
    }
    let mut below: Vec<PathBuf> = std::fs::read_dir(dir).ok()?.filter_map(|e| Some(e.ok()?.path())).collect();
    below.sort();
    below
        .into_iter()
        .filter(|p| depth > 0 && p.is_dir() && !p.is_symlink())
        .find_map(|p| find(&p, name, depth - 1))
}

/// Stops the kept node by koboshi's own command, then its agent, then removes the directory.
fn tear_down(root: &Path, dir: &Path) {
    let binary = demo::binary(root);
    if let Some(config) = find(dir, "koboshi.toml", SEARCH_DEPTH) {
        run(Command::new(&binary).args(["node", "stop", "--config"]).arg(config), Show::Yes, COMMAND_LIMIT);
    }
    if let Ok(agent) = find_agent(&binary, dir) {
        proc::signal(&[agent.pid], rustix::process::Signal::TERM);
        let until = Instant::now() + COMMAND_LIMIT;
        while proc::alive(agent) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(100));
        }
        proc::kill_same(&[agent]);
    }
    if dir.starts_with(root.join("target")) {
        // What cannot be removed lies in target/ and is named.
        if let Err(e) = std::fs::remove_dir_all(dir) {
            println!("{} stays: {e}", dir.display());
        }
    }
}

/// One line on where the figures were taken.
fn machine() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        cpu.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ")).map_or("", |(_, m)| m);
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kb: f64 = memory.split_ascii_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0.0);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split_ascii_whitespace().next().unwrap_or("?");
    format!("Machine: {cores} cores {model}, {:.1} GB, Linux {}, load {load}.", kb / 1e6, kernel.trim())
}

/// NaN of nothing, so that a missing figure is seen.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.get(middle), sorted.len() % 2, middle.checked_sub(1).and_then(|i| sorted.get(i))) {
        (Some(upper), 0, Some(lower)) => f64::midpoint(*lower, *upper),
        (Some(one), _, _) => *one,
        (None, _, _) => f64::NAN,
    }
}

fn spread(values: &[f64]) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if values.is_empty() { "none".to_owned() } else { format!("{least:.0} to {most:.0}") }
}

fn yes(b: bool) -> &'static str {
    if b { "yes" } else { "NO" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
        assert_eq!(spread(&[2.0, 1.0]), "1 to 2");
    }
}
