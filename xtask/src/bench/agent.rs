//! The agent at rest beside a healthy node.

use super::{build, machine, median, yes};
use crate::demo;
use crate::proc::{self, Id};
use crate::run::{Show, run};
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Between two looks at the agent: short enough to meet its steps, long enough not to disturb.
const SAMPLE: Duration = Duration::from_secs(1);
/// The agent settles before it is measured: first snapshot, first sweep.
const SETTLE: Duration = Duration::from_secs(150);
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// Runs for the time from start to first probe.
const STARTS: usize = 20;
/// A binary that has not probed by then does not.
const PROBE_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks at the steps: a sweep takes some hundred milliseconds.
const STEP_SAMPLE: Duration = Duration::from_millis(50);
/// A user who writes this often gives every snapshot something to take.
const USER_WRITES: Duration = Duration::from_secs(60);
/// How often the page cache is dropped on a small machine.
const DROP_EVERY: Duration = Duration::from_secs(300);
const DELAY_ACCOUNTING: &str = "/proc/sys/kernel/task_delayacct";
/// What koboshi notes on a snapshot that it takes for the state's sake.
const STATE_NOTE: &str = "daily operation";
const SNAPSHOTS_WANTED: usize = 2;
const DEFAULT_STATE_EVERY_S: u64 = 15 * 60;
/// koboshi's default; the demo's own shortens it.
const SETTLE_S: u64 = 120;
/// What the issue of the main job allows.
const RSS_ALLOWED_MB: f64 = 15.0;
const CPU_ALLOWED_PERCENT: f64 = 0.3;
const BLOCKED_ALLOWED_PERCENT: f64 = 1.0;
const BINARY_ALLOWED_MB: f64 = 12.0;
const PROBE_ALLOWED_MS: f64 = 50.0;
/// How deep a kept demo's directory is searched for its configuration.
const SEARCH_DEPTH: usize = 4;

/// What is to be measured.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rest {
    pub(crate) minutes: u64,
    /// Node and agent in so much memory, with the page cache dropped again and again.
    pub(crate) memory_mb: Option<u64>,
}

impl Default for Rest {
    fn default() -> Rest {
        Rest { minutes: 30, memory_mb: None }
    }
}

/// The agent at rest beside a healthy node.
pub(crate) fn agent(root: &Path, options: &Rest) -> ExitCode {
    if !build(root) {
        return ExitCode::FAILURE;
    }
    let dir = root.join(format!("target/bench-agent-{}", std::process::id()));
    let measured = set_and_measure(root, &dir, options);
    tear_down(root, &dir);
    match measured {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("not measured: {why}");
            ExitCode::FAILURE
        }
    }
}

fn set_and_measure(root: &Path, dir: &Path, options: &Rest) -> Result<(), String> {
    let dir_text = dir.to_str().ok_or("the path of the repository is no text")?;
    let memory = options.memory_mb.map(Limited::make).transpose()?;
    if memory.is_some() {
        Limited::drop_page_cache()?;
    }
    // Before anything starts: only what starts afterwards is accounted for.
    let accounting = Accounting::on();
    write_drop_in(dir, options)?;
    let args = ["--no-faults", "--keep", "--dir", dir_text];
    let kept = demo::start_in(root, &args, 0, memory.as_ref().map(|m| m.procs.as_path()));
    if !kept.ok() {
        return Err(format!("the demo node could not be set up: {}", kept.stdout.trim()));
    }
    let measured = measure(root, dir, options, accounting.is_some());
    // The group can only go when it is empty; so the node goes first.
    tear_down(root, dir);
    drop(accounting);
    drop(memory);
    measured
}

/// State that changes is taken often enough that two snapshots fall inside; everything else stays as it is by default.
fn write_drop_in(dir: &Path, options: &Rest) -> Result<(), String> {
    let file = dir.join("koboshi/koboshi.d/rest.toml");
    let every_s = state_every_s(options.minutes);
    let text = format!("[backup]\nstate_every_least_s = {every_s}\nsettle_s = {SETTLE_S}\n");
    std::fs::create_dir_all(file.parent().unwrap_or(dir))
        .and_then(|()| std::fs::write(&file, text))
        .map_err(|e| format!("write {}: {e}", file.display()))
}

/// The default, or less where the span is too short for two.
fn state_every_s(minutes: u64) -> u64 {
    (minutes * 60 * 2 / 5).min(DEFAULT_STATE_EVERY_S)
}

/// A memory cgroup of our own; gone when dropped.
struct Limited {
    dir: PathBuf,
    procs: PathBuf,
}

impl Limited {
    /// Of whichever version has the controller here.
    fn make(memory_mb: u64) -> Result<Limited, String> {
        let none = "no memory controller".to_owned();
        let mounts =
            std::fs::read_to_string("/proc/self/mounts").map_err(|e| format!("read the mounts: {e}"))?;
        let (parent, file) = memory_controller(&mounts).ok_or(none)?;
        let dir = parent.join(format!("koboshi-bench-{}", std::process::id()));
        std::fs::create_dir(&dir).map_err(|e| format!("make {}: {e}", dir.display()))?;
        let limited = Limited { procs: dir.join("cgroup.procs"), dir };
        let limit = limited.dir.join(file);
        std::fs::write(&limit, (memory_mb << 20).to_string())
            .map_err(|e| format!("no memory controller: write {}: {e}", limit.display()))?;
        Ok(limited)
    }

    /// Of the whole machine: pages, and the entries and inodes of files, which a stat sweep reads.
    fn drop_page_cache() -> Result<(), String> {
        rustix::fs::sync();
        std::fs::write("/proc/sys/vm/drop_caches", "3").map_err(|e| format!("drop the page cache: {e}"))
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        // Its last processes may take a moment to be gone.
        let until = Instant::now() + COMMAND_LIMIT;
        while let Err(e) = std::fs::remove_dir(&self.dir) {
            if Instant::now() > until {
                eprintln!("{} stays: {e}", self.dir.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Where memory can be limited, and the file that does it.
fn memory_controller(mounts: &str) -> Option<(PathBuf, &'static str)> {
    let mut found = None;
    for line in mounts.lines() {
        let mut words = line.split_ascii_whitespace().skip(1);
        let (Some(at), Some(kind), Some(options)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let at = PathBuf::from(at);
        if kind == "cgroup" && options.split(',').any(|o| o == "memory") {
            return Some((at, "memory.limit_in_bytes"));
        }
        let controllers = std::fs::read_to_string(at.join("cgroup.subtree_control")).unwrap_or_default();
        if kind == "cgroup2" && controllers.split_ascii_whitespace().any(|c| c == "memory") {
            found = Some((at, "memory.max"));
        }
    }
    found
}

/// The kernel's account of waiting for block I/O, switched on for the run and put back afterwards.
struct Accounting {
    was: String,
}

impl Accounting {
    /// `None` where it cannot be had.
    fn on() -> Option<Accounting> {
        let was = std::fs::read_to_string(DELAY_ACCOUNTING).ok()?.trim().to_owned();
        if was == "0" {
            std::fs::write(DELAY_ACCOUNTING, "1").ok()?;
            eprintln!("kernel.task_delayacct is 1 until the end of this run; it was {was}");
        }
        Some(Accounting { was })
    }
}

impl Drop for Accounting {
    fn drop(&mut self) {
        if let Err(e) = std::fs::write(DELAY_ACCOUNTING, &self.was) {
            eprintln!("kernel.task_delayacct stays on: {e}");
        }
    }
}

fn measure(root: &Path, dir: &Path, options: &Rest, accounted: bool) -> Result<(), String> {
    let binary = demo::binary(root);
    let agent = find_agent(&binary, dir)?;
    let limited = options.memory_mb.is_some();
    println!("{}\n", machine());
    eprintln!("the agent is process {}; it settles for {} s", agent.pid, SETTLE.as_secs());
    std::thread::sleep(SETTLE);
    let before = state_snapshots(&binary, dir)?;
    let figures = watch(agent, &binary, dir, Duration::from_secs(options.minutes * 60), limited)?;
    let snapshots = state_snapshots(&binary, dir)?.saturating_sub(before);
    let size_mb = std::fs::metadata(&binary).map_or(0.0, |m| m.len() as f64 / 1e6);
    let starts = first_probes(&binary, dir);
    println!("| figure | measured | allowed | kept |\n|---|---|---|---|");
    let row = |what: &str, value: f64, unit: &str, allowed: f64| {
        println!("| {what} | {value:.3} {unit} | {allowed} {unit} | {} |", yes(value <= allowed));
    };
    row("agent, RSS, most", figures.rss_most_mb, "MB", RSS_ALLOWED_MB);
    row("agent, RSS, median", figures.rss_median_mb, "MB", RSS_ALLOWED_MB);
    row("agent and all its steps, one core", figures.cpu_percent, "%", CPU_ALLOWED_PERCENT);
    if accounted {
        let blocked = figures.blocked_percent + figures.steps_blocked_percent;
        row(
            "agent and all its steps, waiting for block I/O",
            blocked,
            "% of the time",
            BLOCKED_ALLOWED_PERCENT,
        );
        println!("| of which the agent alone | {:.3} % of the time | | |", figures.blocked_percent);
    } else {
        println!("| waiting for block I/O | not measured: kernel.task_delayacct cannot be switched on | | |");
    }
    row("binary", size_mb, "MB", BINARY_ALLOWED_MB);
    if starts.is_empty() {
        println!("| start to first probe | it made none within {} s | | |", PROBE_LIMIT.as_secs());
    } else {
        row("start to first probe, median", median(&starts), "ms", PROBE_ALLOWED_MS);
    }
    println!("| agent alone, anonymous RSS, most | {:.3} MB | | |", figures.anon_most_mb);
    println!("| agent alone, one core | {:.3} % | | |", figures.own_percent);
    println!("| a step's RSS, most | {:.1} MB | | |", figures.step_most_mb);
    for (name, (count, percent)) in &figures.kinds {
        println!(
            "| {count} x {name}, one core (to within {} ms each) | {percent:.3} % | | |",
            STEP_SAMPLE.as_millis()
        );
    }
    println!("| read from disk by agent and steps | {:.1} MB | | |", figures.read_mb);
    println!(
        "\nOver {:.1} minutes, {} looks, {} steps met, {snapshots} state snapshots inside ({} wanted; state at most every \
         {} s). Load at the end {}.",
        figures.minutes,
        figures.looks,
        figures.steps,
        SNAPSHOTS_WANTED,
        state_every_s(options.minutes),
        load()
    );
    if let Some(mb) = options.memory_mb {
        println!(
            "Node, agent and steps in a memory cgroup of {mb} MB; page cache, entries and inodes of the whole machine \
             dropped {} times.",
            figures.drops
        );
    }
    println!(
        "Waiting is the kernel's delay account of all threads, read every {} ms and bounded by what each can have waited; \
         the first and the last moment of a step are missed.",
        STEP_SAMPLE.as_millis()
    );
    if snapshots < SNAPSHOTS_WANTED {
        return Err(format!("the whole: only {snapshots} state snapshots fell inside"));
    }
    Ok(())
}

/// How many snapshots of daily operation there are.
fn state_snapshots(binary: &Path, dir: &Path) -> Result<usize, String> {
    let config = find(dir, "koboshi.toml", SEARCH_DEPTH).ok_or("there is no configuration of the demo's")?;
    let mut c = Command::new(binary);
    c.args(["snapshot", "list", "--json", "--config"]).arg(config);
    let ran = run(&mut c, Show::No, COMMAND_LIMIT);
    let list: serde_json::Value =
        serde_json::from_str(ran.stdout.trim()).map_err(|e| format!("read the list of snapshots: {e}"))?;
    let list = list["snapshots"].as_array().ok_or("there is no list of snapshots")?;
    Ok(list.iter().filter(|s| s["note"] == STATE_NOTE).count())
}

struct Figures {
    rss_most_mb: f64,
    rss_median_mb: f64,
    anon_most_mb: f64,
    cpu_percent: f64,
    own_percent: f64,
    blocked_percent: f64,
    steps_blocked_percent: f64,
    step_most_mb: f64,
    read_mb: f64,
    minutes: f64,
    looks: usize,
    steps: usize,
    /// By kind: how many, and percent of a core.
    kinds: BTreeMap<String, (usize, f64)>,
    drops: usize,
}

/// What was last seen of a step.
#[derive(Clone, Default)]
struct StepSeen {
    name: String,
    ticks: u64,
    waits: proc::Waits,
    read_bytes: u64,
    most_bytes: u64,
}

/// Looks at the agent every second and at its steps more often. Its processor time and that of the steps it has waited
/// for come from its own entry; steps still running are added from theirs. The gateway is another program and is never
/// counted.
fn watch(agent: Id, binary: &Path, dir: &Path, span: Duration, limited: bool) -> Result<Figures, String> {
    let gone = || "the agent has ended".to_owned();
    let first = proc::stat(agent.pid).filter(|s| s.id == agent).ok_or_else(gone)?;
    let mut waits = proc::Waits::default();
    let first_read = proc::read_bytes(agent.pid);
    let started = Instant::now();
    let (mut rss, mut anon_most, mut drops) = (Vec::new(), 0, 0);
    // `None`: another program, looked at once.
    let mut seen: BTreeMap<Id, Option<StepSeen>> = BTreeMap::new();
    let (mut next_look, mut next_write, mut next_drop) = (started, started, started);
    while started.elapsed() < span {
        let now = Instant::now();
        if now >= next_write {
            next_write += USER_WRITES;
            write_as_user(dir)?;
        }
        if limited && now >= next_drop {
            next_drop += DROP_EVERY;
            Limited::drop_page_cache()?;
            drops += 1;
        }
        if now >= next_look {
            next_look += SAMPLE;
            if !proc::alive(agent) {
                return Err(gone());
            }
            rss.push(proc::memory_bytes(agent.pid, "VmRSS").ok_or_else(gone)? as f64 / 1e6);
            anon_most = anon_most.max(proc::memory_bytes(agent.pid, "RssAnon").unwrap_or(0));
        }
        waits.look(agent.pid);
        for id in proc::children(agent.pid) {
            let ours = || std::fs::read_link(format!("/proc/{}/exe", id.pid)).is_ok_and(|p| p == binary);
            let step = || StepSeen { name: step_name(id.pid), ..StepSeen::default() };
            let entry = seen.entry(id).or_insert_with(|| ours().then(step));
            if let Some(step) = entry {
                // One that is gone by now says nothing more.
                if let Some(s) = proc::stat(id.pid).filter(|s| s.id == id) {
                    step.ticks = s.own_ticks + s.children_ticks;
                }
                step.waits.look(id.pid);
                step.read_bytes = step.read_bytes.max(proc::read_bytes(id.pid));
                step.most_bytes = step.most_bytes.max(proc::memory_bytes(id.pid, "VmRSS").unwrap_or(0));
            }
        }
        std::thread::sleep(STEP_SAMPLE);
    }
    let last = proc::stat(agent.pid).filter(|s| s.id == agent).ok_or_else(gone)?;
    let living_ticks: u64 = seen
        .iter()
        .filter(|(_, step)| step.is_some())
        .filter_map(|(id, _)| proc::stat(id.pid).filter(|s| s.id == *id))
        .map(|s| s.own_ticks + s.children_ticks)
        .sum();
    let seconds = started.elapsed().as_secs_f64();
    let percent =
        |ticks: u64| ticks as f64 / rustix::param::clock_ticks_per_second() as f64 / seconds * 100.0;
    let own = last.own_ticks - first.own_ticks;
    let steps: Vec<&StepSeen> = seen.values().flatten().collect();
    let mut kinds: BTreeMap<String, (usize, f64)> = BTreeMap::new();
    for step in &steps {
        let kind = kinds.entry(step.name.clone()).or_default();
        *kind = (kind.0 + 1, kind.1 + percent(step.ticks));
    }
    let read = proc::read_bytes(agent.pid).saturating_sub(first_read)
        + steps.iter().map(|s| s.read_bytes).sum::<u64>();
    Ok(Figures {
        rss_most_mb: rss.iter().copied().fold(0.0, f64::max),
        rss_median_mb: median(&rss),
        anon_most_mb: anon_most as f64 / 1e6,
        cpu_percent: percent(own + (last.children_ticks - first.children_ticks) + living_ticks),
        own_percent: percent(own),
        blocked_percent: percent(waits.ticks),
        steps_blocked_percent: percent(steps.iter().map(|s| s.waits.ticks).sum()),
        step_most_mb: steps.iter().map(|s| s.most_bytes).max().unwrap_or(0) as f64 / 1e6,
        read_mb: read as f64 / 1e6,
        minutes: seconds / 60.0,
        looks: rss.len(),
        steps: steps.len(),
        kinds,
        drops,
    })
}

/// What a step does: its request's name.
fn step_name(pid: u32) -> String {
    let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let request = line.split('\0').rev().find(|word| word.contains('/'));
    request
        .and_then(|r| Path::new(r).file_stem())
        .map_or_else(String::new, |s| s.to_string_lossy().into_owned())
}

/// A user at work: a file of the workspace changes, so that there is state to take.
fn write_as_user(dir: &Path) -> Result<(), String> {
    let workspace = dir.join("home/.openclaw/workspace");
    let (file, half) = (workspace.join("rest.md"), workspace.join("rest.md.half"));
    let text = format!("{:?}\n", std::time::SystemTime::now());
    std::fs::write(&half, text)
        .and_then(|()| std::fs::rename(&half, &file))
        .map_err(|e| format!("write {}: {e}", file.display()))
}

fn load() -> String {
    std::fs::read_to_string("/proc/loadavg").unwrap_or_default().split(' ').next().unwrap_or("?").to_owned()
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
    if dir.starts_with(root.join("target")) && dir.exists() {
        // What cannot be removed lies in target/ and is named.
        if let Err(e) = std::fs::remove_dir_all(dir) {
            println!("{} stays: {e}", dir.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_snapshots_fit_into_any_span() {
        for minutes in [5, 10, 30, 60] {
            let every_s = state_every_s(minutes);
            assert!(every_s * 2 < minutes * 60, "{minutes}: {every_s}");
            assert!(every_s <= DEFAULT_STATE_EVERY_S);
        }
    }

    #[test]
    fn the_controller_is_taken_where_it_is() {
        let v1 = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n";
        let (at, file) = memory_controller(v1).unwrap();
        assert_eq!((at, file), (PathBuf::from("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"));
        assert!(memory_controller("cgroup2 /nonexistent cgroup2 rw 0 0\n").is_none());
    }
}
