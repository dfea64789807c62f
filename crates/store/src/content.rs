//! Reading live files: once, in pieces, with the truth about whether they held still.

use crate::beneath::{Base, Stat};
use crate::database;
use crate::key::{Domain, Key, Name};
use crate::tree::{
    CHUNK_BYTES, DATABASE_CHUNK_BYTES, Entry, EntryKind, Live, MAX_FILE_BYTES, MAX_XATTR_BYTES, MAX_XATTRS,
    Run, push_name,
};
use crate::walk::Found;
use crate::{Problem, ProblemKind, Root};
use engine::words::Class;
use host::clock::Deadline;
use host::{Error, Kind, Result};
use rustix::fs::{OFlags, SeekFrom};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A file that keeps changing is read this often; then the last reading counts.
const READ_TRIES: u32 = 3;
/// Kernels before 6.13 stamp by the clock tick (10 ms at worst): a file changed this recently may change again
/// without its stamp moving, so stat cannot vouch for it.
const RACY_NS: i64 = 50_000_000;
/// The same for file systems that stamp whole seconds.
const RACY_COARSE_NS: i64 = 2_000_000_000;

/// How objects of a class are named.
pub(crate) fn domain(class: Class) -> Domain {
    match class {
        Class::Program | Class::Runtime => Domain::Plain,
        Class::Service
        | Class::Config
        | Class::Credentials
        | Class::State
        | Class::Sessions
        | Class::Workspace => Domain::Keyed,
    }
}

/// Whether SQLite files of a class are taken through SQLite.
pub(crate) fn has_databases(class: Class) -> bool {
    match class {
        Class::State | Class::Sessions | Class::Credentials => true,
        Class::Program | Class::Runtime | Class::Service | Class::Config | Class::Workspace => false,
    }
}

/// Receives each object as it is read.
pub(crate) type Put<'a> = dyn FnMut(Name, &[u8]) -> Result<()> + 'a;

/// Reads entries of one root.
pub(crate) struct Reader<'a> {
    pub(crate) base: &'a Base,
    pub(crate) root: &'a Root,
    pub(crate) key: &'a Key,
    /// For private copies of databases; none = database files are read as they lie.
    pub(crate) tmp: Option<&'a Path>,
    pub(crate) deadline: Deadline,
    buffer: Vec<u8>,
}

/// What became of an attempt to read an entry.
pub(crate) enum Read {
    Entry(Entry),
    /// Readable or not, it is not to be stored as it stands.
    Trouble(Option<Entry>, Problem),
    /// It disappeared.
    Gone,
}

enum Failure {
    /// Of the live tree: this entry is in trouble.
    Live(Errno),
    /// Ours: the whole operation fails.
    Ours(Error),
}

impl From<Errno> for Failure {
    fn from(e: Errno) -> Failure {
        Failure::Live(e)
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Failure {
        Failure::Ours(e)
    }
}

/// The entry that stat alone gives.
pub(crate) fn entry_of(found: &Found) -> Entry {
    let s = &found.stat;
    let kind = if s.is_dir() {
        EntryKind::Dir
    } else if s.is_file() {
        EntryKind::File
    } else if s.is_link() {
        EntryKind::Link
    } else {
        EntryKind::Special
    };
    Entry {
        path: found.path.clone(),
        kind,
        mode: s.mode & 0o7777,
        uid: s.uid,
        gid: s.gid,
        mtime_ns: s.mtime_ns,
        size: 0,
        single: s.nlink <= 1,
        database: false,
        runs: Vec::new(),
        target: Vec::new(),
        xattrs: Vec::new(),
        live: live_of(s, found.companion),
    }
}

/// What an index remembers of a stat; not vouching for what changed a moment ago.
pub(crate) fn live_of(s: &Stat, companion: u64) -> Live {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let now = t.tv_sec.saturating_mul(1_000_000_000).saturating_add(t.tv_nsec);
    let newest = s.mtime_ns.max(s.ctime_ns);
    let margin = if s.ctime_ns % 1_000_000_000 == 0 { RACY_COARSE_NS } else { RACY_NS };
    let vouched = newest.saturating_add(margin) < now;
    Live { ino: s.ino, ctime_ns: if vouched { s.ctime_ns } else { 0 }, companion }
}

/// Whether the index vouches that a live entry still is what it was.
pub(crate) fn vouches(index: &Entry, found: &Found) -> bool {
    let s = &found.stat;
    let kind = match index.kind {
        EntryKind::Dir => s.is_dir(),
        EntryKind::File => s.is_file() && index.size == s.size || s.is_file() && index.database,
        EntryKind::Link => s.is_link(),
        EntryKind::Special => !s.is_dir() && !s.is_file() && !s.is_link(),
        EntryKind::Unread => return false,
    };
    if !kind || index.mode != s.mode & 0o7777 || index.uid != s.uid || index.gid != s.gid {
        return false;
    }
    // A directory's stamps move with every name in it; its names are compared one by one anyway.
    index.kind == EntryKind::Dir
        || index.live.ctime_ns != 0
            && index.live.ctime_ns == s.ctime_ns
            && index.live.ino == s.ino
            && index.mtime_ns == s.mtime_ns
            && index.live.companion == found.companion
}

impl<'a> Reader<'a> {
    pub(crate) fn new(
        base: &'a Base,
        root: &'a Root,
        key: &'a Key,
        tmp: Option<&'a Path>,
        deadline: Deadline,
    ) -> Reader<'a> {
        Reader { base, root, key, tmp, deadline, buffer: Vec::new() }
    }

    #[allow(clippy::needless_pass_by_value, reason = "a message, given as it comes")]
    fn problem(&self, path: &[u8], kind: ProblemKind, why: impl std::fmt::Display) -> Problem {
        let path = PathBuf::from(OsStr::from_bytes(path));
        Problem { root: self.root.name.clone(), path, kind, why: why.to_string(), carried: false }
    }

    /// Reads one entry; objects go to `put`. An error is ours (store full, deadline), never the live tree's.
    pub(crate) fn read(&mut self, found: &Found, put: &mut Put<'_>) -> Result<Read> {
        let mut entry = entry_of(found);
        let got = match entry.kind {
            EntryKind::File => self.read_file(&mut entry, found, put),
            EntryKind::Link => self.read_link(&mut entry),
            EntryKind::Dir => self.read_dir_attributes(&mut entry),
            EntryKind::Special | EntryKind::Unread => Ok(None),
        };
        match got {
            Ok(None) => Ok(Read::Entry(entry)),
            Ok(Some(problem)) => {
                let keep = match problem.kind {
                    ProblemKind::Unsteady => Some(entry),
                    ProblemKind::Unreadable | ProblemKind::CorruptDatabase | ProblemKind::TooLarge => {
                        Some(unread(entry, found))
                    }
                };
                Ok(Read::Trouble(keep, problem))
            }
            Err(Failure::Live(Errno::NOENT | Errno::NOTDIR)) => Ok(Read::Gone),
            Err(Failure::Live(e)) => {
                let problem = self.problem(&found.path, ProblemKind::Unreadable, std::io::Error::from(e));
                let keep = if entry.kind == EntryKind::Dir { entry } else { unread(entry, found) };
                Ok(Read::Trouble(Some(keep), problem))
            }
            Err(Failure::Ours(e)) => Err(e),
        }
    }

    fn read_dir_attributes(&self, entry: &mut Entry) -> std::result::Result<Option<Problem>, Failure> {
        let fd = self.base.open_at(&entry.path, crate::beneath::DIR)?;
        entry.xattrs = xattrs(fd.as_fd());
        Ok(None)
    }

    fn read_link(&self, entry: &mut Entry) -> std::result::Result<Option<Problem>, Failure> {
        let (dir, name) = self.base.parent_of(&entry.path)?;
        entry.target = rustix::fs::readlinkat(&dir, name, Vec::new())?.into_bytes();
        Ok(None)
    }

    fn read_file(
        &mut self,
        entry: &mut Entry,
        found: &Found,
        put: &mut Put<'_>,
    ) -> std::result::Result<Option<Problem>, Failure> {
        let mut expected = found.stat;
        for attempt in 1..=READ_TRIES {
            let fd = self.base.open_at(&entry.path, OFlags::RDONLY | OFlags::NONBLOCK)?;
            let file = File::from(fd);
            if expected.size > MAX_FILE_BYTES {
                return Ok(Some(self.problem(
                    &entry.path,
                    ProblemKind::TooLarge,
                    "larger than the store's limit",
                )));
            }
            let opened = if attempt == 1 { expected } else { stat_of(&file)? };
            if !opened.is_file() {
                return Err(Errno::NOENT.into());
            }
            if self.tmp.is_some() && has_databases(self.root.class) && is_database(&file) {
                return self.read_database(entry, file, put);
            }
            let (runs, size) = self.read_chunks(&file, &opened, CHUNK_BYTES, put)?;
            let after = stat_of(&file)?;
            if !after.is_file() {
                return Err(Errno::NOENT.into());
            }
            let steady = after.same(&opened) && size == opened.size;
            expected = after;
            if steady || attempt == READ_TRIES {
                entry.xattrs = xattrs(file.as_fd());
                entry.runs = runs;
                entry.size = size;
                entry.mode = after.mode & 0o7777;
                (entry.uid, entry.gid) = (after.uid, after.gid);
                entry.mtime_ns = after.mtime_ns;
                entry.single = after.nlink <= 1;
                entry.live = live_of(&after, found.companion);
                if steady {
                    return Ok(None);
                }
                entry.live.ctime_ns = 0;
                return Ok(Some(self.problem(
                    &entry.path,
                    ProblemKind::Unsteady,
                    "it changed while it was read",
                )));
            }
        }
        Ok(None)
    }

    fn read_database(
        &mut self,
        entry: &mut Entry,
        file: File,
        put: &mut Put<'_>,
    ) -> std::result::Result<Option<Problem>, Failure> {
        let Some(tmp) = self.tmp else { return Ok(None) };
        entry.xattrs = xattrs(file.as_fd());
        // Closed before SQLite opens it: closing any descriptor of a file drops this process's locks on it.
        drop(file);
        let taken = match database::take(self.base, &entry.path, tmp, self.deadline) {
            Ok(t) => t,
            Err(e) => match e.kind {
                Kind::Corrupt => {
                    return Ok(Some(self.problem(&entry.path, ProblemKind::CorruptDatabase, e.why)));
                }
                Kind::Denied | Kind::NotFound => {
                    return Ok(Some(self.problem(&entry.path, ProblemKind::Unreadable, e.why)));
                }
                Kind::Usage | Kind::TimedOut | Kind::NoSpace | Kind::System => return Err(e.into()),
            },
        };
        let copy = taken.open()?;
        let stat = stat_of(&copy)?;
        let (runs, size) = self.read_chunks(&copy, &stat, DATABASE_CHUNK_BYTES, put)?;
        entry.database = true;
        entry.runs = runs;
        entry.size = size;
        Ok(None)
    }

    /// Cuts a file into objects; holes are not read. Reads at most what stat said there is.
    fn read_chunks(
        &mut self,
        file: &File,
        stat: &Stat,
        chunk: u32,
        put: &mut Put<'_>,
    ) -> std::result::Result<(Vec<Run>, u64), Failure> {
        let domain = domain(self.root.class);
        let chunk = chunk as usize;
        let sparse = stat.blocks.saturating_mul(512) < stat.size && stat.size > chunk as u64;
        let mut runs = Vec::new();
        let mut at = 0u64;
        self.buffer.resize(chunk, 0);
        let mut hole: Option<Name> = None;
        while at < stat.size {
            if self.deadline.passed() {
                return Err(late(&format!("reading {}", self.base.path.display())).into());
            }
            let want = usize::try_from((stat.size - at).min(chunk as u64)).unwrap_or(chunk);
            if sparse && want == chunk {
                let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
                    Ok(d) => d.min(stat.size),
                    Err(Errno::NXIO) => stat.size,
                    Err(_) => at,
                };
                let holes = data.saturating_sub(at) / chunk as u64;
                if holes > 0 {
                    let name = match hole {
                        Some(n) => n,
                        None => {
                            let zeros = vec![0; chunk];
                            let n = self.key.name(domain, &zeros);
                            put(n, &zeros)?;
                            *hole.insert(n)
                        }
                    };
                    match u32::try_from(holes) {
                        Ok(count) => {
                            runs.push(Run { count, name });
                            at += holes * chunk as u64;
                            continue;
                        }
                        Err(_) => return Err(Errno::FBIG.into()),
                    }
                }
            }
            let got = read_full(file, &mut self.buffer[..want], at)?;
            let bytes = &self.buffer[..got];
            if got == 0 {
                break;
            }
            let name = self.key.name(domain, bytes);
            put(name, bytes)?;
            push_name(&mut runs, name);
            at += got as u64;
            if got < want {
                break;
            }
        }
        Ok((normal(runs), at))
    }

    /// The names of a file's content as it is on disk, cut like `like`; `None` when it cannot be read as such.
    pub(crate) fn hash(&mut self, found: &Found, like: &Entry) -> Result<Option<(Entry, bool)>> {
        let hash = |this: &mut Self| -> std::result::Result<(Entry, bool), Failure> {
            let fd = this.base.open_at(&found.path, OFlags::RDONLY | OFlags::NONBLOCK)?;
            let file = File::from(fd);
            let stat = stat_of(&file)?;
            if !stat.is_file() {
                return Err(Errno::NOENT.into());
            }
            let mut entry = entry_of(found);
            entry.database = like.database;
            let (runs, size) = this.read_chunks(&file, &stat, like.chunk_bytes(), &mut |_, _| Ok(()))?;
            entry.xattrs = xattrs(file.as_fd());
            let after = stat_of(&file)?;
            (entry.runs, entry.size) = (runs, size);
            entry.live = live_of(&after, found.companion);
            let steady = after.same(&stat) && after.same(&found.stat) && size == stat.size;
            if !steady {
                entry.live.ctime_ns = 0;
            }
            Ok((entry, steady))
        };
        match hash(self) {
            Ok(got) => Ok(Some(got)),
            Err(Failure::Live(_)) => Ok(None),
            Err(Failure::Ours(e)) => Err(e),
        }
    }
}

fn unread(mut entry: Entry, found: &Found) -> Entry {
    entry.kind = EntryKind::Unread;
    entry.size = found.stat.size;
    entry.runs.clear();
    entry.live.ctime_ns = 0;
    entry
}

/// Neighbouring runs of one name become one, so that equal content has equal runs however it was read.
fn normal(runs: Vec<Run>) -> Vec<Run> {
    let mut out: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs {
        match out.last_mut() {
            Some(last) if last.name == run.name && last.count.checked_add(run.count).is_some() => {
                last.count += run.count;
            }
            Some(_) | None => out.push(run),
        }
    }
    out
}

/// The error of an operation whose deadline ran out.
pub(crate) fn late(what: &str) -> Error {
    Error::new(Kind::TimedOut, what, "the deadline ran out")
}

pub(crate) fn stat_of(file: &File) -> std::result::Result<Stat, Errno> {
    rustix::fs::fstat(file).map(|s| Stat::of(&s))
}

fn read_full(file: &File, to: &mut [u8], at: u64) -> std::result::Result<usize, Errno> {
    let mut done = 0;
    while done < to.len() {
        match file.read_at(&mut to[done..], at + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Errno::from_io_error(&e).unwrap_or(Errno::IO)),
        }
    }
    Ok(done)
}

fn is_database(file: &File) -> bool {
    let mut head = [0; 16];
    file.read_exact_at(&mut head, 0).is_ok() && &head == database::MAGIC
}

/// The attributes that belong to the file rather than to the host's policy.
pub(crate) fn is_kept_xattr(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || matches!(name, b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default")
}

/// Reads them, sorted; those that do not fit are left out (the format bounds them).
pub(crate) fn xattrs(fd: BorrowedFd<'_>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut names = [0u8; 4096];
    let length = match rustix::fs::flistxattr(fd, &mut names) {
        Ok(0) | Err(_) => return Vec::new(),
        Ok(n) => n,
    };
    let mut all = Vec::new();
    let mut total = 0;
    for name in names[..length].split(|b| *b == 0).filter(|n| is_kept_xattr(n) && n.len() <= 256) {
        let mut value = vec![0u8; MAX_XATTR_BYTES];
        let Ok(n) = rustix::fs::fgetxattr(fd, name, &mut value[..]) else { continue };
        total += n + name.len();
        if total > MAX_XATTR_BYTES || all.len() >= MAX_XATTRS {
            break;
        }
        value.truncate(n);
        all.push((name.to_vec(), value));
    }
    all.sort();
    all
}
