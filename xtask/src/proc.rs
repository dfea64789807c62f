//! What `/proc` says of processes: families to end, memory and processor time to measure. A process is known by its
//! pid together with its start time, so nobody else's is ever ended or counted.

use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;

/// A process that cannot be mistaken for a later one of the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Id {
    pub(crate) pid: u32,
    pub(crate) start_ticks: u64,
}

/// The fields of `/proc/PID/stat` that are used here, times in clock ticks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stat {
    pub(crate) id: Id,
    /// One letter; `Z` is a dead one that nobody has reaped.
    pub(crate) state: char,
    pub(crate) ppid: u32,
    /// Own user and system time.
    pub(crate) own_ticks: u64,
    /// The same of children that have ended and been waited for.
    pub(crate) children_ticks: u64,
}

pub(crate) fn stat(pid: u32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may hold anything, parentheses too.
    let fields: Vec<&str> = text.get(text.rfind(')')? + 2..)?.split_ascii_whitespace().collect();
    // Field 3 of proc(5) is the first here.
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(Stat {
        id: Id { pid, start_ticks: number(22)? },
        state: fields.first()?.chars().next()?,
        ppid: u32::try_from(number(4)?).ok()?,
        own_ticks: number(14)? + number(15)?,
        children_ticks: number(16)? + number(17)?,
    })
}

pub(crate) fn alive(id: Id) -> bool {
    stat(id.pid).is_some_and(|s| s.id == id)
}

/// The same, and it is no corpse that waits to be reaped.
pub(crate) fn runs(id: Id) -> bool {
    stat(id.pid).is_some_and(|s| s.id == id && !matches!(s.state, 'Z' | 'X'))
}

fn all() -> Vec<Stat> {
    let Ok(dir) = std::fs::read_dir("/proc") else { return Vec::new() };
    dir.filter_map(|e| stat(e.ok()?.file_name().to_str()?.parse().ok()?)).collect()
}

/// A process and all its living descendants.
pub(crate) fn family(pid: u32) -> Vec<Id> {
    let mut children: BTreeMap<u32, Vec<Id>> = BTreeMap::new();
    for s in all() {
        children.entry(s.ppid).or_default().push(s.id);
    }
    let mut out: Vec<Id> = stat(pid).map(|s| s.id).into_iter().collect();
    let mut next = 0;
    while let Some(parent) = out.get(next).copied() {
        out.extend(children.remove(&parent.pid).unwrap_or_default());
        next += 1;
    }
    out
}

fn tasks(pid: u32) -> Vec<std::path::PathBuf> {
    let Ok(dir) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    dir.filter_map(|e| Some(e.ok()?.path())).collect()
}

/// The living children of all its threads, without looking at every process there is.
pub(crate) fn children(pid: u32) -> Vec<Id> {
    let lists = tasks(pid).into_iter().filter_map(|t| std::fs::read_to_string(t.join("children")).ok());
    let mut out = Vec::new();
    for list in lists {
        let pids = list.split_ascii_whitespace().filter_map(|p| p.parse().ok());
        out.extend(pids.filter_map(stat).map(|s| s.id));
    }
    out
}

/// Time that its living threads spent waiting for block I/O; 0 where the kernel does not account for it
/// (`kernel.task_delayacct`). A process's own entry tells of its first thread only. Of a wait that was begun while the
/// account was being switched on the kernel says that it has lasted since boot; such a thread's account is left out.
pub(crate) fn blocked_ticks(pid: u32) -> u64 {
    let now_ticks = boot_ticks();
    let of = |task: std::path::PathBuf| {
        let text = std::fs::read_to_string(task.join("stat")).ok()?;
        blocked_of(&text, now_ticks)
    };
    tasks(pid).into_iter().filter_map(of).sum()
}

fn boot_ticks() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec + 1).unwrap_or(0) * rustix::param::clock_ticks_per_second()
}

fn blocked_of(stat: &str, now_ticks: u64) -> Option<u64> {
    // Numbers as in proc(5); the first field after the name is 3.
    let fields: Vec<&str> = stat.get(stat.rfind(')')? + 2..)?.split_ascii_whitespace().collect();
    let field = |n: usize| fields.get(n - 3)?.parse::<u64>().ok();
    let (began, blocked) = (field(22)?, field(42)?);
    (blocked <= now_ticks.saturating_sub(began)).then_some(blocked)
}

/// What it has caused to be read from disk; 0 where nobody may know.
pub(crate) fn read_bytes(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    text.lines().find_map(|l| l.strip_prefix("read_bytes: ")?.trim().parse().ok()).unwrap_or(0)
}

pub(crate) fn signal(pids: &[u32], signal: Signal) {
    for pid in pids {
        if let Some(pid) = i32::try_from(*pid).ok().and_then(Pid::from_raw) {
            // Gone already is as good.
            let _ = kill_process(pid, signal);
        }
    }
}

pub(crate) fn kill_same(ids: &[Id]) {
    for id in ids.iter().filter(|id| alive(**id)) {
        signal(&[id.pid], Signal::KILL);
    }
}

/// Processes that run this very file and have the words among their arguments.
pub(crate) fn running(exe: &std::path::Path, words: &[&str]) -> Vec<Id> {
    all()
        .into_iter()
        .filter(|s| std::fs::read_link(format!("/proc/{}/exe", s.id.pid)).is_ok_and(|p| p == exe))
        .filter(|s| {
            let line = std::fs::read(format!("/proc/{}/cmdline", s.id.pid)).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            words.iter().all(|w| line.contains(w))
        })
        .map(|s| s.id)
        .collect()
}

/// A field of `/proc/PID/status` in bytes, such as `VmRSS` or `RssAnon`.
pub(crate) fn memory_bytes(pid: u32, field: &str) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_longer_than_its_threads_life_is_the_kernels_mistake() {
        let line = |began: u64, blocked: u64| {
            let mut fields = vec!["0".to_owned(); 50];
            (fields[22 - 3], fields[42 - 3]) = (began.to_string(), blocked.to_string());
            format!("7 (a) b) {}", fields.join(" "))
        };
        assert_eq!(blocked_of(&line(1_000, 40), 2_000), Some(40));
        assert_eq!(blocked_of(&line(1_000, 1_001), 2_000), None);
        assert_eq!(blocked_of("7 (a) 0 0", 2_000), None);
    }

    #[test]
    fn a_process_is_known_by_pid_and_start_and_found_in_its_family() {
        let me = stat(std::process::id()).unwrap();
        assert!(alive(me.id));
        assert!(!alive(Id { start_ticks: me.id.start_ticks + 1, ..me.id }));
        assert!(family(me.ppid).contains(&me.id));
        assert!(memory_bytes(me.id.pid, "VmRSS").unwrap() > 100_000);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert_eq!(children(me.id.pid).iter().filter(|c| c.pid == child.id()).count(), 1);
        child.kill().unwrap();
        child.wait().unwrap();
        let exe = std::env::current_exe().unwrap();
        assert!(running(&exe, &[]).contains(&me.id));
        assert!(
            !running(&exe, &["no such word on this command line"]).contains(&me.id)
                || std::env::args().len() > 1
        );
    }
}
