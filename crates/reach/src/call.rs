//! One conversation with a donor, as its caller holds it: plain calls, each with a limit, over a child's streams.

use crate::words::{Frames, MAX_NAMES, Name, Reply, Request, Status};
use crate::{Manifest, Target};
use host::clock::{DEADLINE_ENV, Deadline};
use host::process::{PidFd, ProcessId};
use host::{Context, Error, Kind, Result, poll};
use std::collections::HashSet;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// A killed child is gone within this time or left to init.
const REAP_LIMIT: Duration = Duration::from_secs(2);
/// What a child that failed says about it.
const MAX_SAID_BYTES: u64 = 2 << 10;
/// Pieces read at a time.
const PIECE_BYTES: usize = 128 << 10;
/// The first word may take this many times as long as any other.
const GREETING_SILENCES: u32 = 2;
/// `Working` in a row: a donor that only ever works gives nothing.
const MAX_WORKING: u32 = 60;

/// What a `get` brought.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Got {
    /// Objects handed on, each proven.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Names that the donor does not have.
    pub missing: Vec<Name>,
}

/// A conversation under way. Dropping it ends it.
#[derive(Debug)]
pub struct Call {
    child: Child,
    pid: Option<PidFd>,
    to: ChildStdin,
    from: ChildStdout,
    frames: Frames,
    piece: Vec<u8>,
    silence: Duration,
    deadline: Deadline,
}

impl Call {
    /// Calls a peer: our own binary `me` again, as `koboshi reach`, carries the bytes. `silence` is how long it may say
    /// nothing at all.
    ///
    /// # Errors
    /// When it cannot be reached, is not whom we pinned, or is no donor.
    pub fn open(
        me: &std::path::Path,
        target: &Target,
        silence: Duration,
        deadline: Deadline,
    ) -> Result<Call> {
        let what = || format!("calling {}", target.host);
        let text = serde_json::to_string(target).map_err(|e| Error::new(Kind::System, what(), e))?;
        let mut command = Command::new(me);
        command.arg("reach").arg(text);
        Call::over(command, silence, deadline)
    }

    /// The same over the streams of any child.
    ///
    /// # Errors
    /// As for [`Call::open`].
    pub fn over(mut command: Command, silence: Duration, deadline: Deadline) -> Result<Call> {
        let what = || "calling a peer".to_owned();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.env(DEADLINE_ENV, deadline.to_env());
        let mut child = command.spawn().context(what)?;
        let pid = ProcessId::of(child.id()).and_then(|id| id.open().ok());
        let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
            let _ = child.kill();
            return Err(Error::new(Kind::System, what(), "its streams are missing"));
        };
        let mut call = Call {
            child,
            pid,
            to,
            from,
            frames: Frames::default(),
            piece: vec![0; PIECE_BYTES],
            silence,
            deadline,
        };
        // Before the first word lie a connection, two handshakes and the start of a process.
        call.silence = silence * GREETING_SILENCES;
        let first = call.hear()?;
        call.silence = silence;
        match first {
            Reply::Greeting => Ok(call),
            Reply::Status(_)
            | Reply::Entries(_)
            | Reply::ListEnd(_)
            | Reply::Object(..)
            | Reply::Missing(_)
            | Reply::GetEnd
            | Reply::Working
            | Reply::Refused(_) => Err(call.broken("it does not greet as a donor does")),
        }
    }

    /// Who is there and how its node does.
    ///
    /// # Errors
    /// When it does not say.
    pub fn status(&mut self) -> Result<Status> {
        self.ask(&Request::Status)?;
        match self.hear_work()? {
            Reply::Status(status) => Ok(*status),
            Reply::Refused(why) => Err(self.refused(&why)),
            Reply::Greeting
            | Reply::Entries(_)
            | Reply::ListEnd(_)
            | Reply::Object(..)
            | Reply::Missing(_)
            | Reply::GetEnd
            | Reply::Working => Err(self.broken("it answers something else than its status")),
        }
    }

    /// What its program consists of: a list that keeps to all rules of [`Manifest`] and has the digest it claims.
    ///
    /// # Errors
    /// When it has none, or one that lies.
    pub fn list(&mut self) -> Result<Manifest> {
        self.ask(&Request::List)?;
        let mut manifest = Manifest::default();
        loop {
            match self.hear_work()? {
                Reply::Entries(entries) => {
                    for entry in entries {
                        if let Err(why) = manifest.push(entry) {
                            return Err(self.broken(&format!("its list is none: {why}")));
                        }
                    }
                }
                Reply::ListEnd(digest) if digest == manifest.digest() => return Ok(manifest),
                Reply::ListEnd(_) => return Err(self.broken("its list is not the one it claims")),
                Reply::Refused(why) => return Err(self.refused(&why)),
                Reply::Greeting
                | Reply::Status(_)
                | Reply::Object(..)
                | Reply::Missing(_)
                | Reply::GetEnd
                | Reply::Working => return Err(self.broken("it answers something else than its list")),
            }
        }
    }

    /// Fetches these objects and hands on each whose bytes are what its name says. What came before an error is good.
    ///
    /// # Errors
    /// When it lies, stalls or is gone, or when `take` fails.
    pub fn get(&mut self, names: &[Name], take: &mut dyn FnMut(&Name, &[u8]) -> Result<()>) -> Result<Got> {
        let mut got = Got::default();
        for some in names.chunks(MAX_NAMES) {
            self.ask(&Request::Get(some.to_vec()))?;
            let mut wanted: HashSet<Name> = some.iter().copied().collect();
            loop {
                match self.hear()? {
                    Reply::Object(name, bytes) => {
                        if !wanted.remove(&name) {
                            return Err(self.broken("it sends what nobody asked for"));
                        }
                        if *blake3::hash(&bytes).as_bytes() != name {
                            return Err(self.broken("it sends other bytes than it was asked for"));
                        }
                        got.objects += 1;
                        got.bytes += bytes.len() as u64;
                        take(&name, &bytes)?;
                    }
                    Reply::Missing(name) => {
                        if !wanted.remove(&name) {
                            return Err(self.broken("it misses what nobody asked for"));
                        }
                        got.missing.push(name);
                    }
                    Reply::GetEnd if wanted.is_empty() => break,
                    Reply::GetEnd => return Err(self.broken("it ends before everything was answered")),
                    Reply::Refused(why) => return Err(self.refused(&why)),
                    Reply::Greeting
                    | Reply::Status(_)
                    | Reply::Entries(_)
                    | Reply::ListEnd(_)
                    | Reply::Working => return Err(self.broken("it answers something else than objects")),
                }
            }
        }
        Ok(got)
    }

    fn ask(&mut self, request: &Request) -> Result<()> {
        // At most one request is under way, and it fits the pipe: this does not wait for anybody.
        let sent = self.to.write_all(&request.to_bytes()).and_then(|()| self.to.flush());
        sent.map_err(|e| self.gone(&e.to_string()))
    }

    /// The next answer that is more than a sign of life.
    fn hear_work(&mut self) -> Result<Reply> {
        for _ in 0..MAX_WORKING {
            let reply = self.hear()?;
            if reply != Reply::Working {
                return Ok(reply);
            }
        }
        Err(self.broken("it only ever says that it is at work"))
    }

    fn hear(&mut self) -> Result<Reply> {
        loop {
            let parsed = match self.frames.pull() {
                Some(Ok(frame)) => Some(Reply::parse(frame)),
                Some(Err(why)) => Some(Err(why)),
                None => None,
            };
            match parsed {
                Some(Ok(reply)) => return Ok(reply),
                Some(Err(why)) => return Err(self.broken(&why)),
                None => self.read()?,
            }
        }
    }

    fn read(&mut self) -> Result<()> {
        let until = self.deadline.min(Deadline::after(self.silence));
        let ready = poll::readable(&[self.from.as_fd()], until)?;
        if ready != [true] {
            let why = if self.deadline.passed() {
                "its time is over".to_owned()
            } else {
                format!("it has said nothing for {} s", self.silence.as_secs())
            };
            return Err(Error::new(Kind::TimedOut, "talking with a donor", why));
        }
        match self.from.read(&mut self.piece) {
            Ok(0) => Err(self.gone("it hung up")),
            Ok(n) => {
                self.frames.feed(self.piece.get(..n).unwrap_or_default());
                Ok(())
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => Ok(()),
            Err(e) => Err(self.gone(&e.to_string())),
        }
    }

    /// The other end is gone: our own child knows why, and says it in one line.
    fn gone(&mut self, why: &str) -> Error {
        if let Some(pid) = &self.pid {
            let _ = pid.wait(Deadline::after(REAP_LIMIT).min(self.deadline));
        }
        let _ = self.child.kill();
        let mut said = Vec::new();
        if let Some(from) = self.child.stderr.take() {
            let _ = from.take(MAX_SAID_BYTES).read_to_end(&mut said);
        }
        let said = String::from_utf8_lossy(&said);
        let mut lines = said.lines().map(str::trim).filter(|l| !l.is_empty());
        let first = lines.next().unwrap_or(why);
        // Our own child tells what, then why.
        let line = lines.find_map(|l| l.strip_prefix("why: ")).unwrap_or(first);
        let line: String = line.chars().filter(|c| !c.is_control()).collect();
        Error::new(Kind::System, "talking with a donor", line)
    }

    fn broken(&self, why: &str) -> Error {
        Error::new(Kind::Corrupt, "talking with a donor", why)
    }

    fn refused(&self, why: &str) -> Error {
        Error::new(Kind::NotFound, "talking with a donor", format!("it says: {why}"))
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let _ = self.child.kill();
        if let Some(pid) = &self.pid {
            let _ = pid.wait(Deadline::after(REAP_LIMIT));
        }
        // Dead by now, or in uninterruptible sleep and nobody's to wait for.
        let _ = self.child.try_wait();
    }
}
