//! The cage that the lab runs in, and its end.
//!
//! Everything the lab starts, mounts or binds lives in a mount namespace and a process namespace of its own, below one
//! cgroup. Whatever ends the lab (its last scenario, Ctrl-C, a limit, SIGKILL), the kernel ends the first process
//! of the cage, with it every process inside, with them the mounts and loop devices, and with the last reference the
//! network namespaces. What the kernel does not clear away (cgroup directories, the run's directory) is removed by
//! whoever watches from outside, or, if that one was killed too, by the next run.

use crate::proc::{self, Id};
use rustix::process::Signal;
use serde_json::Value;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How often the cage, the limit and Ctrl-C are looked at.
const POLL: Duration = Duration::from_millis(50);
/// A killed cage is empty within milliseconds; a process in the middle of a disk write may take longer.
const EMPTY_LIMIT: Duration = Duration::from_secs(20);
/// How cgroups and run directories of the lab begin; the pid and start time of their owner follow.
const NAME: &str = "koboshi-lab-";

/// What a run in the cage came to.
pub(crate) struct Outcome {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    /// What failed, each with its scenario.
    pub(crate) failures: Vec<String>,
    pub(crate) skipped: Vec<(String, String)>,
}

/// The directories that belong to one run.
struct Run {
    work: PathBuf,
    cgroups: Vec<PathBuf>,
}

/// Runs this very program again inside a cage, with `lab-inside`, the run's directory, its cgroups' name and these
/// words as its arguments, and clears away what is left.
pub(crate) fn run(root: &Path, words: &[String], limit: Duration) -> Result<Outcome, String> {
    let runs = root.join("target/lab");
    std::fs::create_dir_all(&runs).map_err(|e| format!("make {}: {e}", runs.display()))?;
    sweep(&runs);
    let me = proc::stat(std::process::id()).ok_or("cannot read our own entry in /proc")?.id;
    let name = format!("{NAME}{}-{}", me.pid, me.start_ticks);
    let run = Run { work: runs.join(&name), cgroups: hierarchies()?.iter().map(|h| h.join(&name)).collect() };
    for dir in run.cgroups.iter().chain([&run.work]) {
        std::fs::create_dir_all(dir).map_err(|e| format!("make {}: {e}", dir.display()))?;
    }
    let result = watch(&run, words, limit);
    run.clear();
    result
}

fn watch(run: &Run, words: &[String], limit: Duration) -> Result<Outcome, String> {
    let asked_to_stop = Arc::new(AtomicBool::new(false));
    let mut hooks = Vec::new();
    for signal in [2, 15] {
        let flag = Arc::clone(&asked_to_stop);
        hooks.push(signal_hook::flag::register(signal, flag).map_err(|e| format!("watch signals: {e}"))?);
    }
    let exe = std::env::current_exe().map_err(|e| format!("find our own program: {e}"))?;
    let mut c = Command::new("setpriv");
    // If we are killed, the cage goes too; and the keyboard's Ctrl-C reaches only us, who then end it as a whole.
    c.args(["--pdeathsig", "KILL", "--", "unshare", "--mount", "--pid", "--fork", "--kill-child"])
        .args(["--mount-proc", "--propagation", "private", "--"])
        .arg(exe)
        .arg("lab-inside")
        .arg(&run.work)
        .args(run.cgroups.iter().map(|c| c.as_os_str()))
        .arg("--")
        .args(words)
        .stdin(Stdio::null())
        .process_group(0);
    let mut child = c.spawn().map_err(|e| format!("start setpriv and unshare: {e}"))?;
    let ended = wait(&mut child, &asked_to_stop, limit);
    for hook in hooks {
        signal_hook::low_level::unregister(hook);
    }
    ended?;
    let file = run.work.join("outcome.json");
    let text = std::fs::read_to_string(&file).map_err(|_| "the lab ended without a result".to_owned())?;
    outcome(&text).ok_or_else(|| format!("{} is not what the lab writes", file.display()))
}

fn wait(child: &mut Child, asked_to_stop: &AtomicBool, limit: Duration) -> Result<(), String> {
    let until = Instant::now() + limit;
    let why = loop {
        match child.try_wait() {
            Ok(Some(_)) => return Ok(()),
            Ok(None) if asked_to_stop.load(Ordering::Relaxed) => break "it was asked to stop".to_owned(),
            Ok(None) if Instant::now() < until => std::thread::sleep(POLL),
            Ok(None) => break format!("it had not ended after {:.0} min", limit.as_secs_f64() / 60.0),
            Err(e) => break format!("it cannot be waited for: {e}"),
        }
    };
    let _ = child.kill();
    let _ = child.wait();
    Err(why)
}

fn outcome(text: &str) -> Option<Outcome> {
    let value: Value = serde_json::from_str(text).ok()?;
    let skipped = value["skipped"].as_array()?.iter();
    let pair = |v: &Value| Some((v[0].as_str()?.to_owned(), v[1].as_str()?.to_owned()));
    let failures = value["failures"].as_array()?.iter();
    Some(Outcome {
        passed: value["passed"].as_u64()?,
        failed: value["failed"].as_u64()?,
        failures: failures.filter_map(|v| v.as_str().map(str::to_owned)).collect(),
        skipped: skipped.filter_map(pair).collect(),
    })
}

impl Run {
    fn clear(&self) {
        let until = Instant::now() + EMPTY_LIMIT;
        for dir in &self.cgroups {
            // Only cgroup v2 has this file; a v1 hierarchy's processes are the same ones.
            let _ = std::fs::write(dir.join("cgroup.kill"), "1");
        }
        for dir in &self.cgroups {
            while !remove_cgroups(dir) && Instant::now() < until {
                std::thread::sleep(POLL);
            }
            if dir.exists() {
                println!("{} stays: something still runs in it", dir.display());
            }
        }
        if let Err(e) = std::fs::remove_dir_all(&self.work)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            println!("{} stays: {e}", self.work.display());
        }
    }
}

/// Removes a cgroup and those below it; false while one is not empty.
pub(crate) fn remove_cgroups(dir: &Path) -> bool {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(dir);
    !dir.exists()
}

/// Removes what runs left behind whose owner was killed.
fn sweep(runs: &Path) {
    let places = hierarchies().unwrap_or_default();
    for entry in std::fs::read_dir(runs).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if owner(&name).is_some_and(|id| !proc::alive(id)) {
            println!("clearing away what a killed run left behind: {name}");
            Run { work: entry.path(), cgroups: places.iter().map(|h| h.join(&name)).collect() }.clear();
        }
    }
}

fn owner(name: &str) -> Option<Id> {
    let (pid, start) = name.strip_prefix(NAME)?.split_once('-')?;
    Some(Id { pid: pid.parse().ok()?, start_ticks: start.parse().ok()? })
}

/// The hierarchies in which a host needs a place of its own: cgroup v2 first, then systemd's own of v1 where there is
/// one, and that of block devices, whose limits make a disk stick.
fn hierarchies() -> Result<Vec<PathBuf>, String> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").map_err(|e| format!("read mountinfo: {e}"))?;
    let found = of_mountinfo(&text);
    if found.is_empty() { Err("no cgroup v2 hierarchy is mounted here".to_owned()) } else { Ok(found) }
}

fn of_mountinfo(text: &str) -> Vec<PathBuf> {
    let mut unified = None;
    let mut named = None;
    let mut blocks = None;
    for line in text.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let Some(point) = left.split(' ').nth(4) else { continue };
        let mut fields = right.split(' ');
        let (kind, options) = (fields.next().unwrap_or_default(), fields.nth(1).unwrap_or_default());
        if kind == "cgroup2" {
            unified = unified.or(Some(PathBuf::from(point)));
        } else if kind == "cgroup" && options.split(',').any(|o| o == "name=systemd") {
            named = named.or(Some(PathBuf::from(point)));
        } else if kind == "cgroup" && options.split(',').any(|o| o == "blkio") {
            blocks = blocks.or(Some(PathBuf::from(point)));
        }
    }
    unified.map_or_else(Vec::new, |u| std::iter::once(u).chain(named).chain(blocks).collect())
}

/// Ends one process that we started and everything below it.
pub(crate) fn end_family(pid: u32) {
    let family = proc::family(pid);
    proc::signal(&[pid], Signal::KILL);
    proc::kill_same(&family);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_machines_are_understood() {
        let hybrid = "30 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
            31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
            34 30 0:30 / /sys/fs/cgroup/blkio rw - cgroup cgroup rw,blkio\n\
            33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let places = ["unified", "systemd", "blkio"].map(|name| Path::new("/sys/fs/cgroup").join(name));
        assert_eq!(of_mountinfo(hybrid), places);
        let pure = "33 30 0:29 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(of_mountinfo(pure), [PathBuf::from("/sys/fs/cgroup")]);
        assert!(of_mountinfo("31 30 0:27 / /c rw - cgroup cgroup rw,name=systemd\n").is_empty());
    }

    #[test]
    fn only_our_own_names_are_swept() {
        let id = owner("koboshi-lab-12-345").unwrap();
        assert_eq!((id.pid, id.start_ticks), (12, 345));
        assert!(owner("koboshi-lab-12").is_none() && owner("other-12-345").is_none());
    }
}
