//! Short trusted tools (`systemctl`, `loginctl`): started, bounded in time and output, and gone when this returns.
//!
//! They get a process group of their own; whatever is left of it at the end is killed, so nothing outlives the call.
//! Work that may misbehave belongs in a [`crate::container`].

use crate::clock::Deadline;
use crate::error::{Context, Error, Kind, Result};
use crate::process::{Ended, ProcessId, group_kill};
use crate::shut::Shut;
use crate::spawn::Apart;
use crate::{poll, reap};
use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// What one tool may say on each stream: more than any unit listing, less than hurts.
pub const OUTPUT_LIMIT_BYTES: usize = 1 << 20;
/// How long a killed tool may take to vanish. A tool in uninterruptible sleep is given up on and said so.
const REAP_GRACE: Duration = Duration::from_secs(2);
/// How long what a tool left behind, killed, may take to be gone.
const GROUP_GONE: Duration = Duration::from_millis(200);
/// `/etc/passwd` and `/etc/group` are read up to here.
const ACCOUNTS_LIMIT_BYTES: u64 = 4 << 20;

/// A user to become: uid and gid; the supplementary groups are looked up in `/etc/group`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Ids {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
}

impl Ids {
    /// Our own effective ids.
    #[must_use]
    pub fn current() -> Ids {
        Ids { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() }
    }

    /// The supplementary groups of this user, the primary one first, as login would set them. A uid without an
    /// account has its primary group only.
    #[must_use]
    pub fn groups(self) -> Vec<u32> {
        let read = |path: &str| {
            crate::files::read_bounded(std::path::Path::new(path), ACCOUNTS_LIMIT_BYTES)
                .map(|b| String::from_utf8_lossy(&b).into_owned())
                .unwrap_or_default()
        };
        groups_from(self, &read("/etc/passwd"), &read("/etc/group"))
    }
}

fn groups_from(ids: Ids, passwd: &str, group: &str) -> Vec<u32> {
    let mut groups = vec![ids.gid];
    let user = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(ids.uid)).then_some(name)
    });
    let Some(user) = user.filter(|u| !u.is_empty()) else { return groups };
    for line in group.lines() {
        let mut fields = line.split(':');
        let gid = fields.nth(2).and_then(|g| g.parse().ok());
        let member = fields.next().is_some_and(|m| m.split(',').any(|m| m == user));
        if let (Some(gid), true) = (gid, member)
            && !groups.contains(&gid)
        {
            groups.push(gid);
        }
    }
    groups
}

/// A tool to run.
#[derive(Debug, Clone, Default)]
pub struct Cmd {
    /// Program: absolute, or found on PATH.
    pub program: OsString,
    /// Arguments.
    pub args: Vec<OsString>,
    /// Environment to add.
    pub env: Vec<(OsString, OsString)>,
    /// Start from an empty environment.
    pub env_clear: bool,
    /// Working directory; ours when none.
    pub cwd: Option<PathBuf>,
    /// Whom to become; ourselves when none.
    pub ids: Option<Ids>,
    /// Standard input, up to [`INPUT_LIMIT_BYTES`].
    pub input: Vec<u8>,
    /// For programs that are not ours: it gains no privileges, and its user's service manager is out of its reach where the
    /// kernel lets us hide it. So nobody starts anything for it that would outlive it.
    pub shut_in: bool,
}

/// What a tool is told on its standard input: what a pipe holds, so that writing it never waits for the tool.
pub const INPUT_LIMIT_BYTES: usize = 32 << 10;

impl Cmd {
    /// A tool with its arguments, in our own environment.
    pub fn new<A: Into<OsString>>(program: impl Into<OsString>, args: impl IntoIterator<Item = A>) -> Cmd {
        Cmd { program: program.into(), args: args.into_iter().map(Into::into).collect(), ..Cmd::default() }
    }
}

/// What a tool said and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit status, when it exited.
    pub status: Option<i32>,
    /// Signal, when one ended it.
    pub signal: Option<i32>,
    /// Whether it was killed at the deadline.
    pub timed_out: bool,
    /// Standard output, up to [`OUTPUT_LIMIT_BYTES`].
    pub stdout: Vec<u8>,
    /// Standard error, up to [`OUTPUT_LIMIT_BYTES`].
    pub stderr: Vec<u8>,
}

impl Output {
    /// Whether it exited with 0 within its time.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.status == Some(0) && !self.timed_out
    }
}

/// Runs a tool to its end or its deadline.
///
/// # Errors
/// When it cannot be started, or does not vanish though killed. A non-zero exit or a timeout is not an error here:
/// look at the [`Output`].
pub fn run(cmd: &Cmd, deadline: Deadline) -> Result<Output> {
    let what = || format!("running {}", cmd.program.to_string_lossy());
    let user = cmd.ids.unwrap_or_else(Ids::current);
    let mut child = match start(cmd, cmd.shut_in.then(|| Shut::of(user))) {
        // Not every kernel grants the namespaces.
        Err(_) if cmd.shut_in => start(cmd, Some(Shut::half(user))),
        started => started,
    }
    .map_err(|e| Error { what: what(), ..e })?;
    let result = supervise(&mut child, deadline);
    result.map_err(|e| Error { what: what(), why: e.to_string(), hint: e.hint, kind: e.kind })
}

fn start(cmd: &Cmd, shut: Option<Shut>) -> Result<Child> {
    let mut command = Command::new(&cmd.program);
    command.args(&cmd.args).stdin(input(&cmd.input)?).stdout(Stdio::piped()).stderr(Stdio::piped());
    if cmd.env_clear {
        command.env_clear();
    }
    command.envs(cmd.env.iter().map(|(k, v)| (k, v)));
    if let Some(cwd) = &cmd.cwd {
        command.current_dir(cwd);
    }
    Apart { session: false, cgroup: None, ids: cmd.ids, background: false, umask: None, shut }
        .arrange(&mut command);
    reap::spawn(&mut command).context(|| "starting it".into())
}

/// The whole input in a pipe whose other end is closed already.
fn input(bytes: &[u8]) -> Result<Stdio> {
    if bytes.is_empty() {
        return Ok(Stdio::null());
    }
    if bytes.len() > INPUT_LIMIT_BYTES {
        return Err(Error::new(Kind::Usage, "giving a tool its input", format!("{} bytes", bytes.len())));
    }
    let what = || "giving a tool its input".into();
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context(what)?;
    let written = rustix::io::write(&write, bytes).context(what)?;
    if written < bytes.len() {
        return Err(Error::new(Kind::System, what(), "the pipe is too small"));
    }
    Ok(Stdio::from(read))
}

fn supervise(child: &mut Child, deadline: Deadline) -> Result<Output> {
    let pid = child.id();
    let pidfd = ProcessId::child(pid)?;
    let mut streams = [
        Stream::new(child.stdout.take().map(OwnedFd::from))?,
        Stream::new(child.stderr.take().map(OwnedFd::from))?,
    ];
    let mut exited = false;
    while !exited && !deadline.passed() {
        let mut fds = vec![pidfd.as_fd()];
        fds.extend(streams.iter().filter_map(Stream::fd));
        let ready = poll::readable(&fds, deadline)?;
        exited = ready.first().copied().unwrap_or(false);
        streams.iter_mut().for_each(Stream::drain);
    }
    // Not reaped yet, so the group id is still its own.
    group_kill(pid);
    if !pidfd.wait(Deadline::after(REAP_GRACE)) {
        return Err(Error::new(
            Kind::TimedOut,
            "killing it",
            format!("process {pid} does not die (D state?)"),
        ));
    }
    let ended = pidfd.reap().unwrap_or(Ended::Unknown);
    // What the tool left behind was killed with it and takes a moment to be gone. Where nobody reaps orphans it stays
    // as a zombie, which holds nothing: it is not waited for longer.
    let gone = Deadline::after(GROUP_GONE);
    while crate::process::group_exists(pid) && !gone.passed() {
        std::thread::sleep(Duration::from_millis(1));
    }
    streams.iter_mut().for_each(Stream::drain);
    let [stdout, stderr] = streams.map(|s| s.bytes);
    let (status, signal) = match ended {
        Ended::Exited(code) => (Some(code), None),
        Ended::Signaled(signal) => (None, Some(signal)),
        Ended::TimedOut | Ended::Unknown => (None, None),
    };
    Ok(Output { status, signal, timed_out: !exited, stdout, stderr })
}

struct Stream {
    pipe: Option<File>,
    bytes: Vec<u8>,
}

impl Stream {
    fn new(pipe: Option<OwnedFd>) -> Result<Stream> {
        let pipe = pipe.map(File::from);
        if let Some(pipe) = &pipe {
            rustix::io::ioctl_fionbio(pipe, true).context(|| "preparing a pipe".into())?;
        }
        Ok(Stream { pipe, bytes: Vec::new() })
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }

    /// Takes what is there; what exceeds the limit is read and dropped, so that the tool never blocks on us. At most
    /// a few chunks per call, so that a tool that never stops talking cannot outlast the deadline.
    fn drain(&mut self) {
        const CHUNKS: usize = 64;
        let mut chunk = [0_u8; 16 << 10];
        for _ in 0..CHUNKS {
            let Some(pipe) = &mut self.pipe else { return };
            match pipe.read(&mut chunk) {
                Ok(0) => self.pipe = None,
                Ok(n) => {
                    let room = OUTPUT_LIMIT_BYTES.saturating_sub(self.bytes.len());
                    self.bytes.extend_from_slice(chunk.get(..n.min(room)).unwrap_or_default());
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(_) => self.pipe = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a program says of itself and of its user's service manager.
    fn seen(shut_in: bool, ids: Option<Ids>, dir: &str) -> (String, String) {
        let script = format!("grep NoNewPrivs /proc/self/status | tr -dc 0-9; echo; id -u; ls {dir}");
        let cmd = Cmd { shut_in, ids, ..Cmd::new("sh", ["-c".to_owned(), script]) };
        let out = run(&cmd, Deadline::after(Duration::from_secs(20))).unwrap();
        assert!(out.ok(), "{out:?}");
        let text = String::from_utf8(out.stdout).unwrap();
        let (first, rest) = text.split_once('\n').unwrap();
        (first.to_owned(), rest.trim().to_owned())
    }

    /// The directory of a user that nobody is, with something in it; removed when this is dropped.
    struct Runtime(String);

    impl Runtime {
        fn make(uid: u32) -> Runtime {
            let dir = format!("/run/user/{uid}");
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(format!("{dir}/bus"), "").unwrap();
            Runtime(dir)
        }
    }

    impl Drop for Runtime {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn who_is_shut_in_gains_nothing_and_cannot_ask_a_service_manager_as_root() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let ids = Ids { uid: 54_021, gid: 54_021 };
        let runtime = Runtime::make(ids.uid);
        assert_eq!(seen(false, Some(ids), &runtime.0), ("0".into(), "54021\nbus".into()));
        assert_eq!(seen(true, Some(ids), &runtime.0), ("1".into(), "54021".into()));
        assert!(std::fs::metadata(format!("{}/bus", runtime.0)).is_ok(), "only it does not see it");
        // Where there is no such directory nothing has to be hidden.
        assert_eq!(seen(true, Some(Ids { uid: 54_022, gid: 54_022 }), "/proc/self/ns/uts").0, "1");
    }

    #[test]
    fn a_user_is_shut_in_by_a_namespace_of_its_own_as_root() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let ids = Ids { uid: 54_023, gid: 54_023 };
        let runtime = Runtime::make(ids.uid);
        // The way of an agent without privileges, whose thread is its user's.
        let seen = crate::user::as_user(ids, || Ok(seen(true, None, &runtime.0))).unwrap();
        assert_eq!(seen.0, "1");
        let granted = std::fs::read_to_string("/proc/sys/user/max_user_namespaces");
        if granted.is_ok_and(|n| n.trim() != "0") {
            assert_eq!(seen.1, "54023", "where the kernel grants user namespaces the directory is hidden");
        }
    }

    #[test]
    fn a_tool_reads_its_input_and_its_end() {
        let said = |input: Vec<u8>| {
            run(&Cmd { input, ..Cmd::new("cat", [""; 0]) }, Deadline::after(Duration::from_secs(20)))
        };
        assert_eq!(said(b"two\nlines".to_vec()).unwrap().stdout, b"two\nlines");
        let most = vec![b'x'; INPUT_LIMIT_BYTES];
        assert_eq!(said(most.clone()).unwrap().stdout, most);
        assert!(said(Vec::new()).unwrap().stdout.is_empty());
        assert!(said(vec![b'x'; INPUT_LIMIT_BYTES + 1]).is_err());
    }

    #[test]
    fn groups_are_those_of_the_user() {
        let passwd = "root:x:0:0::/:/bin/sh\nclaw:x:1000:1000::/home/claw:/bin/sh\nbroken line\nother:x:7:7::/:/bin/sh\n";
        let group = "root:x:0:\nclaw:x:1000:claw\naudio:x:29:other,claw\nvideo:x:44:clawed\ndocker:x:998:claw\nbad:x:x:claw\n:::\n";
        let groups = |uid, gid| groups_from(Ids { uid, gid }, passwd, group);
        assert_eq!(groups(1000, 1000), [1000, 29, 998]);
        assert_eq!(groups(0, 0), [0]);
        assert_eq!(groups(4242, 5), [5], "no account, no more than its own");
        assert_eq!(groups_from(Ids { uid: 1000, gid: 1000 }, "", ""), [1000]);
    }
}
