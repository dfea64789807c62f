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

/// How long the threads of one process have waited for block I/O, followed by looking at them often; nothing where the
/// kernel does not account for it (`kernel.task_delayacct`).
///
/// The account cannot be believed as it is: at times the kernel adds what has passed since an *earlier* wait of a thread that
/// ran meanwhile (seen: 30 s at once, for a thread that went on answering every 2 s). So what is added between two looks
/// counts for no more than the time since the thread was last seen doing anything else than waiting.
#[derive(Debug, Clone, Default)]
pub(crate) struct Waits {
    threads: BTreeMap<std::path::PathBuf, Thread>,
    /// What counts so far, in clock ticks.
    pub(crate) ticks: u64,
}

#[derive(Debug, Clone, Copy)]
struct Thread {
    told_ticks: u64,
    awake_ticks: u64,
}

impl Waits {
    /// Looks at each thread. What one has waited before it was first seen is left out.
    pub(crate) fn look(&mut self, pid: u32) {
        let now_ticks = boot_ticks();
        for task in tasks(pid) {
            let text = std::fs::read_to_string(task.join("stat")).unwrap_or_default();
            self.heed(task, &text, now_ticks);
        }
    }

    fn heed(&mut self, task: std::path::PathBuf, stat: &str, now_ticks: u64) {
        let Some((waits, told_ticks)) = told(stat) else { return };
        let thread = self.threads.entry(task).or_insert(Thread { told_ticks, awake_ticks: now_ticks });
        let added = told_ticks.saturating_sub(thread.told_ticks);
        // The last tick may have been begun only.
        self.ticks += added.min(now_ticks.saturating_sub(thread.awake_ticks) + 1);
        thread.told_ticks = told_ticks;
        if !waits {
            thread.awake_ticks = now_ticks;
        }
    }
}

fn boot_ticks() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let per_second = rustix::param::clock_ticks_per_second();
    let of_a_second = u64::try_from(now.tv_nsec).unwrap_or(0) * per_second / 1_000_000_000;
    u64::try_from(now.tv_sec).unwrap_or(0) * per_second + of_a_second
}

/// Whether it waits uninterruptibly, and its account of block I/O: fields 3 and 42 of proc(5), the first after the name
/// being 3.
fn told(stat: &str) -> Option<(bool, u64)> {
    let fields: Vec<&str> = stat.get(stat.rfind(')')? + 2..)?.split_ascii_whitespace().collect();
    Some((*fields.first()? == "D", fields.get(42 - 3)?.parse().ok()?))
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
    fn what_a_thread_cannot_have_waited_does_not_count() {
        let line = |state: &str, ticks: u64| {
            let mut fields = vec!["0".to_owned(); 50];
            (fields[0], fields[42 - 3]) = (state.to_owned(), ticks.to_string());
            format!("7 (a b) {}", fields.join(" "))
        };
        let mut waits = Waits::default();
        let mut seen = |state: &str, ticks: u64, now: u64| {
            waits.heed("task".into(), &line(state, ticks), now);
            waits.ticks
        };
        assert_eq!(seen("S", 500, 1_000), 0, "before it was looked at");
        assert_eq!(seen("S", 503, 1_005), 3);
        assert_eq!(seen("S", 3_503, 1_010), 9, "3,000 ticks in five, and one begun");
        assert_eq!([seen("D", 3_503, 1_015), seen("D", 3_503, 1_100)], [9, 9]);
        assert_eq!(seen("S", 3_595, 1_105), 101, "it was seen to wait for 92");
        waits.heed("task".into(), "7 (a) 0 0", 1_110);
        assert_eq!(waits.ticks, 101);
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
