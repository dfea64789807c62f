//! One consistent moment of a SQLite database, checked before it is stored, without disturbing the live one.
//!
//! A database that somebody has open (its `-wal` and `-shm` are there) is taken by SQLite's backup API in one step
//! through a read-only connection, which can neither checkpoint nor delete anything. One that nobody has open is
//! copied together with its log and settled in the copy: opening it in place would leave files beside it.

use crate::beneath::{Base, Stat};
use crate::files;
use host::clock::Deadline;
use host::{Context, Error, Kind, Result};
use rusqlite::backup::{Backup, StepResult};
use rusqlite::{Connection, ErrorCode, OpenFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What a database file begins with.
pub(crate) const MAGIC: &[u8; 16] = b"SQLite format 3\0";
/// Up to here every row is checked against every index; beyond, only the pages.
const FULL_CHECK_BYTES: u64 = 256 * 1024 * 1024;
/// A copy that was overtaken by a writer is tried again this often before the backup API is asked.
const COPY_TRIES: u32 = 3;
/// How long one attempt waits for a writer's lock.
const BUSY_MS: u64 = 2_000;
const BUSY_PAUSE_MS: u64 = 20;

/// A private, checked copy; its file is removed when this is dropped.
pub(crate) struct Taken {
    path: PathBuf,
}

impl Taken {
    pub(crate) fn open(&self) -> Result<File> {
        File::open(&self.path).context(|| format!("reading {}", self.path.display()))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next writer of the store.
        for ending in ["", "-wal", "-shm", "-journal"] {
            let _ = std::fs::remove_file(beside(&self.path, ending.as_bytes()));
        }
    }
}

fn beside(path: &Path, ending: &[u8]) -> PathBuf {
    let mut name = path.as_os_str().as_bytes().to_vec();
    name.extend_from_slice(ending);
    PathBuf::from(OsStr::from_bytes(&name))
}

/// Takes the database at `rel` into `tmp`. `Kind::Corrupt`: the database itself is damaged.
pub(crate) fn take(base: &Base, rel: &[u8], tmp: &Path, deadline: Deadline) -> Result<Taken> {
    let live = if rel.is_empty() { base.path.clone() } else { base.path.join(OsStr::from_bytes(rel)) };
    let what = || format!("taking the database {}", live.display());
    let taken = Taken { path: tmp.join(format!("{}.sqlite", crate::hex::encode(&crate::seal::new_id()?))) };
    let (dir, name) = base.parent_of(rel).context(what)?;
    let mut copied = false;
    if !exists(dir.as_fd(), &name, b"-shm") || !exists(dir.as_fd(), &name, b"-wal") {
        for _ in 0..COPY_TRIES {
            if copy_set(dir.as_fd(), &name, &taken.path, deadline).context(what)? {
                copied = true;
                break;
            }
        }
    }
    if !copied {
        // Overtaken copies may lie there.
        for ending in ["", "-wal", "-journal"] {
            let _ = std::fs::remove_file(beside(&taken.path, ending.as_bytes()));
        }
        drop(files::create_private(&taken.path).context(what)?);
        backup(&live, &taken.path, deadline).map_err(|e| explain(what(), e))?;
    }
    check(&taken.path).map_err(|e| explain(what(), e))?;
    Ok(taken)
}

enum Failure {
    Sqlite(rusqlite::Error),
    Damaged(String),
    TimedOut,
}

impl From<rusqlite::Error> for Failure {
    fn from(e: rusqlite::Error) -> Failure {
        Failure::Sqlite(e)
    }
}

fn explain(what: String, f: Failure) -> Error {
    match f {
        Failure::Damaged(why) => Error::new(Kind::Corrupt, what, why),
        Failure::TimedOut => {
            Error::new(Kind::TimedOut, what, "its writers left no moment free before the deadline")
        }
        Failure::Sqlite(e) => {
            let kind = match e.sqlite_error_code() {
                Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Kind::Corrupt,
                Some(ErrorCode::DiskFull) => Kind::NoSpace,
                Some(ErrorCode::PermissionDenied | ErrorCode::CannotOpen) => Kind::Denied,
                _ => Kind::System,
            };
            Error::new(kind, what, e)
        }
    }
}

fn exists(dir: std::os::fd::BorrowedFd<'_>, name: &[u8], ending: &[u8]) -> bool {
    Stat::at(dir, &[name, ending].concat()).is_ok()
}

/// Copies main file, log and journal; false when they changed meanwhile.
fn copy_set(
    dir: std::os::fd::BorrowedFd<'_>,
    name: &[u8],
    to: &Path,
    deadline: Deadline,
) -> std::io::Result<bool> {
    const SET: [&[u8]; 3] = [b"", b"-wal", b"-journal"];
    let look = || SET.map(|ending| Stat::at(dir, &[name, ending].concat()).ok());
    let before = look();
    for (ending, stat) in SET.iter().zip(&before) {
        let target = beside(to, ending);
        if target.exists() {
            std::fs::remove_file(&target)?;
        }
        if !stat.is_some_and(|s| s.is_file()) {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let from = match rustix::fs::openat(dir, [name, ending].concat(), flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(false),
            other => other?,
        };
        let (mut from, mut out) = (File::from(from), files::create_private(&target)?);
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let n = from.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            out.write_all(&buffer[..n])?;
            if deadline.passed() {
                return Err(std::io::ErrorKind::TimedOut.into());
            }
        }
    }
    let after = look();
    let same = |(a, b): (&Option<Stat>, &Option<Stat>)| match (a, b) {
        (Some(a), Some(b)) => a.same(b),
        (None, None) => true,
        (Some(_), None) | (None, Some(_)) => false,
    };
    Ok(before.iter().zip(&after).all(same))
}

fn backup(live: &Path, to: &Path, deadline: Deadline) -> std::result::Result<(), Failure> {
    let flags =
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let source = Connection::open_with_flags(live, flags)?;
    source.busy_timeout(Duration::from_millis(BUSY_MS))?;
    let mut copy = Connection::open(to)?;
    // A copy that a crash cut short is thrown away, so nothing is gained by syncing it.
    copy.pragma_update(None, "synchronous", "OFF")?;
    let work = Backup::new(&source, &mut copy)?;
    loop {
        match work.step(-1)? {
            StepResult::Done => return Ok(()),
            StepResult::More | StepResult::Busy | StepResult::Locked | _ => {
                if deadline.passed() {
                    return Err(Failure::TimedOut);
                }
                std::thread::sleep(Duration::from_millis(BUSY_PAUSE_MS));
            }
        }
    }
}

/// Settles the private copy (log and journal merged into the main file) and proves it.
fn check(path: &Path) -> std::result::Result<(), Failure> {
    let db = Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )?;
    db.pragma_update(None, "synchronous", "OFF")?;
    let wal = beside(path, b"-wal");
    if wal.metadata().is_ok_and(|m| m.len() > 0) {
        db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
    }
    let size = path.metadata().map(|m| m.len()).unwrap_or(0);
    let pragma = if size <= FULL_CHECK_BYTES { "integrity_check" } else { "quick_check" };
    let word = db.query_row(&format!("PRAGMA {pragma}(1)"), [], |row| row.get::<_, String>(0));
    match word {
        Ok(word) if word == "ok" => Ok(()),
        Ok(word) => Err(Failure::Damaged(word)),
        Err(e) => match e.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Err(e.into()),
            // A table of an extension we do not have: every ordinary table by itself.
            _ => check_tables(&db),
        },
    }
}

fn check_tables(db: &Connection) -> std::result::Result<(), Failure> {
    let mut names = db.prepare("SELECT name FROM sqlite_schema WHERE type = 'table' AND rootpage > 0")?;
    let names: Vec<String> = names.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    for name in names {
        let quoted = name.replace('\'', "''");
        let word: String = db.query_row(&format!("PRAGMA quick_check('{quoted}')"), [], |row| row.get(0))?;
        if word != "ok" {
            return Err(Failure::Damaged(word));
        }
    }
    Ok(())
}
