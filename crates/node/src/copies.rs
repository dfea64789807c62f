//! Private copies of databases that can only be read by changing them, and their end.
//!
//! A copy goes with whoever reads it. A reader whose container is killed runs no destructor, and what it leaves behind is
//! as large as a database and holds what is in one: so a copy lies in a directory of koboshi's own where one is known, its
//! name says whose it is, and whoever makes the next one (or the agent, when it begins) takes away what dead readers left.
//! Copying looks at the clock as it goes: a large database on a slow disk costs its reader the answer, not its life.

use crate::identity::{beside, log_len};
use host::clock::Deadline;
use host::error::{Context, Error, Kind, Result};
use host::process::ProcessId;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A larger database is not copied, its identity stays unknown until it lives.
const LIMIT_BYTES: u64 = 1 << 30;
/// Copied between two looks at the clock.
const CHUNK_BYTES: usize = 1 << 20;
/// What is left free where a copy goes.
const SPARE_BYTES: u64 = 64 << 20;
/// Entries of the directory for temporary files that are looked at for leftovers.
const ENTRIES_LIMIT: usize = 8_192;
/// In the directory that all share, what is younger may belong to a process that we cannot see (of another namespace).
/// No reader lives longer.
const SHARED_AGE_S: i64 = 900;

static OURS: OnceLock<PathBuf> = OnceLock::new();

/// From now on copies of this process lie in `dir`, which is koboshi's alone; without it (or without room in it) in the
/// directory for temporary files. The first word counts.
pub fn keep_in(dir: PathBuf) {
    let _ = OURS.set(dir);
}

/// Takes away what readers that are no more have left, there and in the directory for temporary files.
pub fn sweep() {
    if let Some(dir) = OURS.get() {
        sweep_in(dir, 0);
    }
    sweep_in(&std::env::temp_dir(), SHARED_AGE_S);
}

fn sweep_in(dir: &Path, least_age_s: i64) {
    let now_s = host::clock::wall().as_second();
    let us = rustix::process::geteuid().as_raw();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten().take(ENTRIES_LIMIT) {
        let Some(reader) = reader(&entry.file_name().to_string_lossy()) else { continue };
        let Ok(meta) = entry.metadata() else { continue };
        let ours = meta.is_dir() && meta.uid() == us;
        if ours && now_s.saturating_sub(meta.mtime()) >= least_age_s && !lives(reader) {
            // Links in it are removed, not followed.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Whose copy this is, by its name: the process and the moment, as `salvage::private_dir` writes them.
fn reader(name: &str) -> Option<(u32, u64)> {
    let mut parts = name.strip_prefix("koboshi-")?.split('-');
    let reader = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next()?.parse::<u64>().ok()?;
    parts.next().is_none().then_some(reader)
}

/// Whether that process is the one that runs now: one that was born after the copy was made is another.
fn lives((pid, made_ms): (u32, u64)) -> bool {
    /// `/proc/PID/stat` counts in hundredths of a second since boot.
    const MS_PER_TICK: u64 = 10;
    ProcessId::of(pid).is_some_and(|id| id.start_ticks.saturating_mul(MS_PER_TICK) <= made_ms)
}

/// A copy of main file and log in a private directory, removed with it.
pub(crate) struct PrivateCopy {
    dir: PathBuf,
    pub(crate) main: PathBuf,
}

impl PrivateCopy {
    pub(crate) fn of(db: &Path, bytes: u64, deadline: Deadline) -> Result<PrivateCopy> {
        let what = || format!("copying {} to read it", db.display());
        let bytes = bytes.saturating_add(log_len(db));
        if bytes > LIMIT_BYTES {
            return Err(Error::new(Kind::NoSpace, what(), "it is too large to copy"));
        }
        sweep();
        let dir = crate::salvage::private_dir(&place(bytes))?;
        let copy = PrivateCopy { main: dir.join("db"), dir };
        for suffix in ["", "-wal"] {
            copy_in_time(&beside(db, suffix), &beside(&copy.main, suffix), deadline)?;
        }
        Ok(copy)
    }
}

impl Drop for PrivateCopy {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Where a copy of this size goes.
fn place(bytes: u64) -> PathBuf {
    let us = rustix::process::geteuid().as_raw();
    let ours = OURS.get().filter(|dir| {
        let roomy = || host::files::free(dir).is_ok_and(|space| space.for_user(us) > bytes + SPARE_BYTES);
        host::files::make_private_dir(dir).is_ok() && roomy()
    });
    ours.cloned().unwrap_or_else(std::env::temp_dir)
}

fn copy_in_time(from: &Path, to: &Path, deadline: Deadline) -> Result<()> {
    let what = || format!("copying {}", from.display());
    let mut source = std::fs::File::open(from).context(what)?.take(LIMIT_BYTES);
    let mut target =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(to).context(what)?;
    let mut chunk = vec![0_u8; CHUNK_BYTES];
    loop {
        if deadline.passed() {
            return Err(Error::new(Kind::TimedOut, what(), "the deadline passed"));
        }
        let read = source.read(&mut chunk).context(what)?;
        if read == 0 {
            return Ok(());
        }
        target.write_all(chunk.get(..read).unwrap_or_default()).context(what)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(20))
    }

    #[test]
    fn what_a_dead_reader_left_goes_and_a_living_ones_stays() {
        let dir = tempfile::tempdir().expect("dir");
        let make = |name: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir(&path).expect("mkdir");
            std::fs::write(path.join("db"), "rows").expect("write");
            path
        };
        let now_ms = host::clock::now().ms;
        let ours = make(&format!("koboshi-{}-{now_ms}-0", std::process::id()));
        // Nobody has this number; and the first process is older than any copy, but a later one of ours is not.
        let dead = make(&format!("koboshi-4194304-{now_ms}-0"));
        let reused = make(&format!("koboshi-{}-1-0", std::process::id()));
        let others = [make("koboshi-demo-1-2"), make("koboshi-1-2"), make("else"), make("koboshi-1-2-3-4")];
        sweep_in(dir.path(), SHARED_AGE_S);
        assert!(dead.exists(), "in a shared directory only what is old");
        sweep_in(dir.path(), 0);
        assert!(ours.exists() && !dead.exists() && !reused.exists());
        assert!(others.iter().all(|path| path.exists()));
    }

    #[test]
    fn a_copy_that_takes_too_long_is_given_up_and_leaves_nothing() {
        let dir = tempfile::tempdir().expect("dir");
        let db = dir.path().join("openclaw.sqlite");
        std::fs::write(&db, vec![7_u8; 3 * CHUNK_BYTES]).expect("write");
        std::fs::write(beside(&db, "-wal"), "log").expect("write");
        let copy = PrivateCopy::of(&db, 3 << 20, soon()).expect("copy");
        assert_eq!(std::fs::read(&copy.main).expect("main").len(), 3 * CHUNK_BYTES);
        assert_eq!(std::fs::read(beside(&copy.main, "-wal")).expect("log"), b"log");
        let at = copy.dir.clone();
        drop(copy);
        assert!(!at.exists());
        let to = dir.path().join("to");
        let late = copy_in_time(&db, &to, Deadline::after(Duration::ZERO));
        assert_eq!(late.expect_err("too late").kind, Kind::TimedOut);
        let late = PrivateCopy::of(&db, 3 << 20, Deadline::after(Duration::ZERO));
        assert!(late.is_err_and(|e| e.kind == Kind::TimedOut));
        // Other tests of this program read through copies of their own; this database alone begins so.
        let begun = |e: &std::fs::DirEntry| {
            std::fs::read(e.path().join("db")).is_ok_and(|b| b.starts_with(b"\x07\x07"))
        };
        let left = std::fs::read_dir(at.parent().expect("parent")).expect("list").flatten();
        let mine = left.filter(|e| {
            reader(&e.file_name().to_string_lossy()).is_some_and(|(pid, _)| pid == std::process::id())
        });
        assert_eq!(mine.filter(begun).count(), 0);
    }
}
