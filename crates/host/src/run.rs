//! Short trusted tools (`systemctl`, `loginctl`): started, bounded in time and output, and gone when this returns.
//!
//! They get a process group of their own; whatever is left of it at the end is killed, so nothing outlives the call.
//! Work that may misbehave belongs in a [`crate::container`].

use crate::clock::Deadline;
use crate::error::{Context, Error, Kind, Result};
use crate::process::{Ended, ProcessId, group_kill};
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
    let mut command = Command::new(&cmd.program);
    command.args(&cmd.args).stdin(input(&cmd.input)?).stdout(Stdio::piped()).stderr(Stdio::piped());
    if cmd.env_clear {
        command.env_clear();
    }
    command.envs(cmd.env.iter().map(|(k, v)| (k, v)));
    if let Some(cwd) = &cmd.cwd {
        command.current_dir(cwd);
    }
    Apart { session: false, cgroup: None, ids: cmd.ids, background: false, umask: None }
        .arrange(&mut command);
    let mut child = reap::spawn(&mut command).context(what)?;
    let result = supervise(&mut child, deadline);
    result.map_err(|e| Error { what: what(), why: e.to_string(), hint: e.hint, kind: e.kind })
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
