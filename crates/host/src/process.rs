//! Processes known by pid and start time, never by name.
//!
//! A pid alone is only a number that the kernel gives to somebody else later. Everything that signals or waits goes
//! through a pidfd whose identity was checked after it was opened, so it can never hit a stranger.

use crate::clock::Deadline;
use crate::error::{Context, Error, Kind, Result};
use crate::{poll, reap};
pub use rustix::process::Signal;
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Kernel files under `/proc` are read up to here (an environment may be large, a table of sockets larger).
const PROC_FILE_LIMIT_BYTES: u64 = 4 << 20;
/// Descriptors of one process that are looked at.
const OPEN_FILES_LIMIT: usize = 65_536;

/// One process of this boot: its pid and when it started, in clock ticks (field 22 of `/proc/PID/stat`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// The pid.
    pub pid: u32,
    /// Start time in clock ticks since boot.
    pub start_ticks: u64,
}

/// The parts of `/proc/PID/stat` that judging needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// State letter: R, S, D, T, t, Z, X, I.
    pub state: char,
    /// Parent.
    pub ppid: u32,
    /// CPU time of the process and its threads, user and system, in milliseconds.
    pub cpu_ms: u64,
    /// Threads.
    pub threads: u32,
    /// Resident memory in bytes.
    pub rss_bytes: u64,
    /// Session.
    pub session: u32,
    /// Process group.
    pub pgrp: u32,
    /// Start time in clock ticks since boot.
    pub start_ticks: u64,
}

/// How a process ended, as far as anybody can know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ended {
    /// Exited with this status.
    Exited(i32),
    /// Ended by this signal.
    Signaled(i32),
    /// Still running when the deadline passed.
    TimedOut,
    /// Gone, but it was not our child, so its status is not ours to read.
    Unknown,
}

impl ProcessId {
    /// The process that has this pid now, zombies included.
    #[must_use]
    pub fn of(pid: u32) -> Option<ProcessId> {
        stat_of(pid).map(|s| ProcessId { pid, start_ticks: s.start_ticks })
    }

    /// Ourselves.
    ///
    /// # Errors
    /// When `/proc` is not there.
    pub fn current() -> Result<ProcessId> {
        ProcessId::of(std::process::id())
            .ok_or_else(|| Error::new(Kind::System, "looking at ourselves", "/proc is not readable"))
    }

    /// A pidfd of a child of ours that has not been reaped (so its pid cannot have been given away).
    pub(crate) fn child(pid: u32) -> Result<PidFd> {
        let fd = open_pidfd(pid).context(|| format!("watching child {pid}"))?;
        let id = ProcessId::of(pid).ok_or_else(|| {
            Error::new(Kind::System, format!("watching child {pid}"), "/proc shows nothing")
        })?;
        Ok(PidFd { fd, id })
    }

    /// Whether it runs: same start time and not a zombie.
    #[must_use]
    pub fn alive(self) -> bool {
        self.stat().is_some_and(|s| !matches!(s.state, 'Z' | 'X' | 'x'))
    }

    /// A handle that stays with this very process.
    ///
    /// # Errors
    /// `NotFound` when it is gone.
    pub fn open(self) -> Result<PidFd> {
        let what = || format!("opening process {}", self.pid);
        let fd = open_pidfd(self.pid).map_err(|e| match e {
            rustix::io::Errno::SRCH => Error::new(Kind::NotFound, what(), "it is gone"),
            other => Error::io(what(), &other.into()),
        })?;
        // Still the same one after the handle was opened: then it was the same one when it was.
        if self.stat().is_none() {
            return Err(Error::new(Kind::NotFound, what(), "it is gone and the pid is another's"));
        }
        Ok(PidFd { fd, id: self })
    }

    /// Sends a signal; `false` when the process is gone.
    ///
    /// # Errors
    /// When we may not.
    pub fn signal(self, sig: Signal) -> Result<bool> {
        match self.open() {
            Ok(fd) => fd.signal(sig),
            Err(e) if e.kind == Kind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Its statistics, if the pid is still this process.
    #[must_use]
    pub fn stat(self) -> Option<Stat> {
        stat_of(self.pid).filter(|s| s.start_ticks == self.start_ticks)
    }

    /// Its real user id.
    #[must_use]
    pub fn uid(self) -> Option<u32> {
        let status = self.read("status")?;
        let text = String::from_utf8_lossy(&status);
        let line = text.lines().find_map(|l| l.strip_prefix("Uid:"))?;
        line.split_whitespace().next()?.parse().ok()
    }

    /// Its path in the cgroup v2 hierarchy, as seen from our cgroup namespace.
    #[must_use]
    pub fn cgroup(self) -> Option<String> {
        let bytes = self.read("cgroup")?;
        let text = String::from_utf8_lossy(&bytes);
        text.lines().find_map(|l| l.strip_prefix("0::")).map(str::to_owned)
    }

    /// Its executable, as the kernel names it (" (deleted)" appended when it was removed).
    #[must_use]
    pub fn exe(self) -> Option<PathBuf> {
        self.link("exe")
    }

    /// Its working directory.
    #[must_use]
    pub fn cwd(self) -> Option<PathBuf> {
        self.link("cwd")
    }

    /// Whether its environment, as it was at exec, holds exactly this variable.
    #[must_use]
    pub fn environ_has(self, key: &str, val: &str) -> bool {
        self.environ(key).is_some_and(|v| v == val.as_bytes())
    }

    /// A variable of its environment as it was at exec.
    #[must_use]
    pub fn environ(self, key: &str) -> Option<Vec<u8>> {
        let bytes = self.read("environ")?;
        bytes
            .split(|b| *b == 0)
            .find_map(|entry| entry.strip_prefix(key.as_bytes())?.strip_prefix(b"="))
            .map(<[u8]>::to_vec)
    }

    /// Its arguments as it shows them now (a process may rewrite them: evidence, never proof).
    #[must_use]
    pub fn cmdline(self) -> Vec<String> {
        let bytes = self.read("cmdline").unwrap_or_default();
        bytes
            .split(|b| *b == 0)
            .filter(|a| !a.is_empty())
            .map(|a| String::from_utf8_lossy(a).into_owned())
            .collect()
    }

    /// Whether any of its arguments contains this text.
    #[must_use]
    pub fn cmdline_contains(self, text: &str) -> bool {
        self.cmdline().iter().any(|a| a.contains(text))
    }

    /// Its open descriptors and what they point to.
    #[must_use]
    pub fn open_files(self) -> Vec<(i32, PathBuf)> {
        let dir = PathBuf::from(format!("/proc/{}/fd", self.pid));
        let files = entries(&dir)
            .filter_map(|name| Some((name.parse().ok()?, std::fs::read_link(dir.join(&name)).ok()?)))
            .take(OPEN_FILES_LIMIT)
            .collect();
        if self.stat().is_some() { files } else { Vec::new() }
    }

    /// Whether it has given back its memory: it is being torn down, or gone.
    #[must_use]
    pub(crate) fn has_no_memory(self) -> bool {
        // A living process of programs counts its pages here; seven zeros are one without memory.
        self.read("statm").is_none_or(|pages| pages.starts_with(b"0 "))
    }

    /// Whether a debugger holds it.
    #[must_use]
    pub fn traced(self) -> bool {
        let Some(status) = self.read("status") else { return false };
        String::from_utf8_lossy(&status)
            .lines()
            .find_map(|l| l.strip_prefix("TracerPid:"))
            .is_some_and(|v| v.trim() != "0")
    }

    /// A file of its `/proc` directory, if the pid is still this process after the read.
    fn read(self, name: &str) -> Option<Vec<u8>> {
        let bytes = read_proc(&format!("/proc/{}/{name}", self.pid))?;
        self.stat().map(|_| bytes)
    }

    fn link(self, name: &str) -> Option<PathBuf> {
        let path = std::fs::read_link(format!("/proc/{}/{name}", self.pid)).ok()?;
        self.stat().map(|_| path)
    }
}

/// A handle to one process; becomes readable when it has exited.
#[derive(Debug)]
pub struct PidFd {
    fd: OwnedFd,
    id: ProcessId,
}

impl PidFd {
    /// Which process.
    #[must_use]
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Waits until it has exited (`true`) or the deadline passes (`false`).
    #[must_use]
    pub fn wait(&self, deadline: Deadline) -> bool {
        match poll::readable(&[self.fd.as_fd()], deadline) {
            Ok(ready) => ready.first().copied().unwrap_or(false),
            Err(_) => !self.id.alive(),
        }
    }

    /// Whether it has exited.
    #[must_use]
    pub fn exited(&self) -> bool {
        self.wait(Deadline::at(engine::Moment { boot: crate::clock::boot_id(), ms: 0 }))
    }

    /// Sends a signal; `false` when it is gone.
    ///
    /// # Errors
    /// When we may not.
    pub fn signal(&self, sig: Signal) -> Result<bool> {
        match rustix::process::pidfd_send_signal(&self.fd, sig) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::SRCH) => Ok(false),
            Err(e) => Err(e).context(|| format!("signalling process {}", self.id.pid)),
        }
    }

    /// Keeps its status for [`PidFd::reap`] if it is our child though we did not start it here: an agent that is PID 1
    /// and replaced its own program has children that its list of them forgot.
    pub fn keep(&self) {
        if self.id.stat().is_some_and(|s| s.ppid == std::process::id()) {
            reap::remember(self.id.pid);
        }
    }

    /// How it ended, reaping it when it is our child; `None` while it runs. The status of a child is given once, later
    /// calls and other people's children give [`Ended::Unknown`].
    pub fn reap(&self) -> Option<Ended> {
        let ended = self.look(WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
        if ended.is_some() {
            reap::forget(self.id.pid);
        }
        ended
    }

    /// The same without reaping: a child stays a zombie, and its pid and group number stay its own.
    #[must_use]
    pub fn peek(&self) -> Option<Ended> {
        self.look(WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT)
    }

    fn look(&self, opts: WaitIdOptions) -> Option<Ended> {
        match rustix::process::waitid(WaitId::PidFd(self.fd.as_fd()), opts) {
            Ok(Some(status)) => Some(match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Ended::Exited(code),
                (None, Some(signal)) => Ended::Signaled(signal),
                (None, None) => Ended::Unknown,
            }),
            Ok(None) => None,
            Err(_) => self.exited().then_some(Ended::Unknown),
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn raw(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().filter(|p| *p > 0).and_then(Pid::from_raw)
}

fn open_pidfd(pid: u32) -> std::result::Result<OwnedFd, rustix::io::Errno> {
    let pid = raw(pid).ok_or(rustix::io::Errno::SRCH)?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty())
}

/// Kills a whole process group. Only for a group whose leader is our unreaped child or was just proven ours: the group
/// id must not be another's.
pub(crate) fn group_kill(pgid: u32) {
    if let Some(pgid) = raw(pgid).filter(|_| pgid > 1) {
        // Nobody left in it is what we want.
        let _ = rustix::process::kill_process_group(pgid, Signal::KILL);
    }
}

/// Whether anybody is left in a process group. Sends no signal.
pub(crate) fn group_exists(pgid: u32) -> bool {
    raw(pgid).filter(|_| pgid > 1).is_some_and(|pgid| rustix::process::test_kill_process_group(pgid).is_ok())
}

fn read_proc(path: &str) -> Option<Vec<u8>> {
    // Most of these files fit: one read and the one that finds the end, not six of growing size.
    let mut bytes = Vec::with_capacity(2 << 10);
    std::fs::File::open(path).ok()?.take(PROC_FILE_LIMIT_BYTES).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

pub(crate) fn entries(dir: &Path) -> impl Iterator<Item = String> + use<> {
    std::fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok())
}

/// What `/proc/PID/stat` says now.
#[must_use]
pub fn stat_of(pid: u32) -> Option<Stat> {
    parse_stat(&read_proc(&format!("/proc/{pid}/stat"))?)
}

fn parse_stat(bytes: &[u8]) -> Option<Stat> {
    let text = String::from_utf8_lossy(bytes);
    // The name may hold anything, spaces and brackets too; the fields start after its last closing bracket.
    let fields: Vec<&str> = text.get(text.rfind(')')? + 1..)?.split_whitespace().collect();
    // Field numbers as in proc(5), the state being 3.
    let field = |n: usize| fields.get(n - 3).copied();
    let number = |n: usize| field(n).and_then(|f| f.parse::<u64>().ok());
    let small =
        |n: usize| field(n).and_then(|f| f.parse::<i64>().ok()).map(|v| u32::try_from(v).unwrap_or(0));
    let ticks = rustix::param::clock_ticks_per_second().max(1);
    let page = u64::try_from(rustix::param::page_size()).ok()?;
    Some(Stat {
        state: field(3)?.chars().next()?,
        ppid: small(4)?,
        pgrp: small(5)?,
        session: small(6)?,
        cpu_ms: number(14)?.saturating_add(number(15)?).saturating_mul(1_000) / ticks,
        threads: small(20)?,
        start_ticks: number(22)?,
        rss_bytes: number(24)?.saturating_mul(page),
    })
}

/// Every pid there is now.
#[must_use]
pub fn all_pids() -> Vec<u32> {
    entries(Path::new("/proc")).filter_map(|name| name.parse().ok()).collect()
}

/// Every living descendant of a process, found by parent links. Orphans that were given to another parent are not
/// among them.
#[must_use]
pub fn descendants(pid: u32) -> Vec<ProcessId> {
    descendants_in(&table(), &[pid])
}

/// All processes now, by pid.
pub(crate) fn table() -> BTreeMap<u32, Stat> {
    all_pids().into_iter().filter_map(|pid| Some((pid, stat_of(pid)?))).collect()
}

pub(crate) fn descendants_in(table: &BTreeMap<u32, Stat>, roots: &[u32]) -> Vec<ProcessId> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for (pid, stat) in table {
        children.entry(stat.ppid).or_default().push(*pid);
    }
    let mut found = Vec::new();
    let mut open: Vec<u32> = roots.to_vec();
    while let Some(parent) = open.pop() {
        for pid in children.remove(&parent).unwrap_or_default() {
            open.push(pid);
            if let Some(stat) = table.get(&pid) {
                found.push(ProcessId { pid, start_ticks: stat.start_ticks });
            }
        }
    }
    found
}

/// A TCP socket that listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listener {
    /// Where.
    pub addr: SocketAddr,
    /// Its socket's inode number.
    pub inode: u64,
    /// The user that opened it.
    pub uid: u32,
}

/// Who listens on a TCP port in our network namespace, IPv4 first.
#[must_use]
pub fn listeners(port: u16) -> Vec<Listener> {
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .into_iter()
        .filter_map(|path| read_listening(std::fs::File::open(path).ok()?))
        .flat_map(|bytes| parse_listeners(&String::from_utf8_lossy(&bytes), port))
        .collect()
}

/// The kernel names the listening sockets first, and walks its whole table of connections (a quarter of a million slots on
/// a large machine, 5 ms) for those that follow. So it is asked for a little at a time, and no further than the first
/// that does not listen.
fn read_listening(from: impl std::io::Read) -> Option<Vec<u8>> {
    /// Three lines.
    const PIECE: usize = 450;
    let mut from = from.take(PROC_FILE_LIMIT_BYTES);
    let mut bytes = Vec::with_capacity(2 << 10);
    let mut piece = [0_u8; PIECE];
    loop {
        let read = match from.read(&mut piece) {
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return None,
        };
        bytes.extend_from_slice(piece.get(..read).unwrap_or_default());
        let text = String::from_utf8_lossy(&bytes);
        // The last line may be half of one.
        let whole = text.rfind('\n').and_then(|end| text.get(..end)).unwrap_or_default();
        let last = whole.lines().skip(1).last();
        if read == 0 || last.is_some_and(|line| line.split_whitespace().nth(3) != Some(LISTEN)) {
            return Some(bytes);
        }
    }
}

/// State "listen" in the kernel's socket table.
const LISTEN: &str = "0A";

fn parse_listeners(text: &str, port: u16) -> Vec<Listener> {
    let parse = |line: &str| -> Option<Listener> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if *fields.get(3)? != LISTEN {
            return None;
        }
        let addr = parse_address(fields.get(1)?)?;
        (addr.port() == port).then_some(())?;
        Some(Listener { addr, uid: fields.get(7)?.parse().ok()?, inode: fields.get(9)?.parse().ok()? })
    };
    text.lines().skip(1).filter_map(parse).collect()
}

/// The kernel prints each 32-bit word of an address in the machine's byte order.
fn parse_address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |i: usize| Some(u32::from_str_radix(ip.get(i * 8..i * 8 + 8)?, 16).ok()?.to_ne_bytes());
    let ip = match ip.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0_u8; 16];
            for (i, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(i)?);
            }
            IpAddr::V6(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// Which process holds a listening socket: the hinted pids are asked first, then all that we may look into.
#[must_use]
pub fn owner_of(listener: &Listener, hint: &[u32]) -> Option<ProcessId> {
    let target = PathBuf::from(format!("socket:[{}]", listener.inode));
    let holds = |pid: &u32| {
        let dir = PathBuf::from(format!("/proc/{pid}/fd"));
        entries(&dir)
            .take(OPEN_FILES_LIMIT)
            .any(|fd| std::fs::read_link(dir.join(fd)).is_ok_and(|l| l == target))
    };
    let pid = hint.iter().copied().find(holds).or_else(|| all_pids().into_iter().find(holds))?;
    ProcessId::of(pid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reap;
    use std::net::TcpListener;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    #[allow(clippy::zombie_processes)] // Reaped through its pidfd.
    fn sleeper() -> PidFd {
        let mut cmd = Command::new("/bin/sleep");
        cmd.arg("1000").env("PROCESS_TEST", "yes=no").stdin(Stdio::null()).current_dir("/");
        let child = reap::spawn(&mut cmd).unwrap();
        ProcessId::child(child.id()).unwrap()
    }

    fn end(fd: &PidFd) {
        fd.signal(Signal::KILL).unwrap();
        assert!(fd.wait(Deadline::after(Duration::from_secs(10))));
        fd.reap();
    }

    #[test]
    fn a_process_is_known_by_its_start_not_by_its_pid() {
        let fd = sleeper();
        let id = fd.id();
        assert!(id.alive() && !fd.exited());
        let stranger = ProcessId { start_ticks: id.start_ticks + 1, ..id };
        assert!(!stranger.alive());
        assert_eq!(stranger.open().unwrap_err().kind, Kind::NotFound);
        assert!(!stranger.signal(Signal::KILL).unwrap(), "whoever has the pid now is left alone");
        assert!((stranger.uid(), stranger.exe(), stranger.cgroup()) == (None, None, None));
        assert!(stranger.open_files().is_empty() && !stranger.environ_has("PROCESS_TEST", "yes=no"));
        assert!(id.alive());
        end(&fd);
        assert!(!id.alive() && !id.signal(Signal::TERM).unwrap());
        assert_eq!(id.open().unwrap_err().kind, Kind::NotFound);
    }

    #[test]
    fn a_zombie_is_not_alive_and_its_status_waits() {
        let fd = sleeper();
        fd.signal(Signal::TERM).unwrap();
        assert!(fd.wait(Deadline::after(Duration::from_secs(10))));
        assert!(!fd.id().alive());
        assert_eq!(fd.peek(), Some(Ended::Signaled(15)));
        assert_eq!(fd.reap(), Some(Ended::Signaled(15)));
        assert_eq!(fd.reap(), Some(Ended::Unknown));
    }

    #[test]
    fn waiting_keeps_its_deadline() {
        let fd = sleeper();
        let deadline = Deadline::after(Duration::from_millis(20));
        assert!(!fd.wait(deadline) && deadline.passed());
        assert_eq!(fd.reap(), None);
        end(&fd);
    }

    #[test]
    fn what_a_process_is_can_be_read() {
        let fd = sleeper();
        let id = fd.id();
        // Between fork and exec it is still us: wait for the exec.
        let deadline = Deadline::after(Duration::from_secs(10));
        while !id.cmdline_contains("1000") && !deadline.passed() {
            std::thread::yield_now();
        }
        assert_eq!(id.cmdline().last().map(String::as_str), Some("1000"));
        assert_eq!(id.uid(), Some(rustix::process::getuid().as_raw()));
        assert_eq!(id.cwd(), Some("/".into()));
        assert!(id.exe().unwrap().is_absolute());
        assert!(id.environ_has("PROCESS_TEST", "yes=no") && !id.environ_has("PROCESS_TEST", "yes"));
        assert!(!id.traced());
        assert!(id.open_files().iter().any(|(fd, to)| *fd == 0 && to.ends_with("null")));
        let stat = id.stat().unwrap();
        assert_eq!((stat.ppid, stat.threads), (std::process::id(), 1));
        assert!(stat.rss_bytes > 0);
        assert!(descendants(std::process::id()).contains(&id));
        assert_eq!(descendants(id.pid), []);
        fd.signal(Signal::STOP).unwrap();
        while id.stat().is_some_and(|s| s.state != 'T') && !deadline.passed() {
            std::thread::yield_now();
        }
        assert!(id.stat().unwrap().state == 'T' && id.alive());
        end(&fd);
    }

    #[test]
    fn a_name_made_to_confuse_does_not() {
        let line = "77 (a) R 1 (b) c) S 5 6 7 0 -1 4194304 1 2 3 4 150 50 0 0 20 0 9 0 4711 1000 3 18446744073709551615";
        let stat = parse_stat(line.as_bytes()).unwrap();
        assert_eq!((stat.state, stat.ppid, stat.pgrp, stat.session), ('S', 5, 6, 7));
        assert_eq!((stat.threads, stat.start_ticks), (9, 4711));
        assert_eq!(stat.cpu_ms, 200 * 1_000 / rustix::param::clock_ticks_per_second());
        assert_eq!(stat.rss_bytes, 3 * rustix::param::page_size() as u64);
        for bad in
            ["", "1", "1 (x", "1 (x)", "1 (x) S 1 2", "1 (x) S a b c d e f g h i j k l m n o p q r s t u v w"]
        {
            assert_eq!(parse_stat(bad.as_bytes()), None, "{bad:?}");
        }
        assert_eq!(parse_stat(&[0xff, b')', 0xfe]), None);
    }

    #[test]
    fn a_listener_and_its_owner_are_found() {
        let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = v4.local_addr().unwrap().port();
        let found = listeners(port);
        let ours = found.iter().find(|l| l.addr == v4.local_addr().unwrap()).unwrap();
        assert_eq!(ours.uid, rustix::process::getuid().as_raw());
        let me = ProcessId::current().unwrap();
        assert_eq!(owner_of(ours, &[me.pid]), Some(me));
        assert_eq!(owner_of(ours, &[1]), Some(me), "a wrong hint costs only time");
        drop(v4);
        assert!(listeners(port).iter().all(|l| l.addr.ip().is_ipv6() || l.inode != ours.inode));
        if let Ok(v6) = TcpListener::bind("[::1]:0") {
            let addr = v6.local_addr().unwrap();
            assert!(listeners(addr.port()).iter().any(|l| l.addr == addr));
        }
        assert_eq!(owner_of(&Listener { inode: u64::MAX, ..*ours }, &[]), None);
    }

    /// A socket table that is given line by line, and says how far it was read.
    struct Table<'a>(std::slice::Iter<'a, &'a str>);

    impl Read for Table<'_> {
        fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
            let Some(line) = self.0.next() else { return Ok(0) };
            buf[..line.len()].copy_from_slice(line.as_bytes());
            Ok(line.len())
        }
    }

    #[test]
    fn the_table_is_read_no_further_than_the_listening_sockets() {
        let header = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";
        let ssh =
            "   0: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11\n";
        let (half, rest) =
            "   1: 0100007F:4965 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 12\n"
                .split_at(30);
        let met =
            "   2: 0100007F:4965 0100007F:9999 01 00000000:00000000 00:00000000 00000000  1000        0 13\n";
        let lines = [header, ssh, half, rest, met, "never", "read"];
        let mut table = Table(lines.iter());
        let bytes = read_listening(&mut table).unwrap();
        assert_eq!(table.0.as_slice(), ["never", "read"]);
        let found = parse_listeners(&String::from_utf8(bytes).unwrap(), 18_789);
        assert_eq!(found.iter().map(|l| (l.inode, l.uid)).collect::<Vec<_>>(), [(12, 1_000)]);
        // One that holds nothing else is read to its end.
        let lines = [header, ssh, half, rest];
        let bytes = read_listening(Table(lines.iter())).unwrap();
        assert_eq!(parse_listeners(&String::from_utf8(bytes).unwrap(), 18_789).len(), 1);
    }

    #[test]
    fn mangled_socket_tables_are_passed_over() {
        let text = "header\n garbage\n 0: 0100007F 00 0A\n 1: 0100007F:ZZZZ 0:0 0A 0 0 0 0 0 5\n 2: 01:0016 0:0 0A 0 0 0 0 0 5\n";
        assert_eq!(parse_listeners(text, 22), []);
    }
}
