//! The bytes: what the planner asks for, written by a few threads from proven objects.

use crate::beneath::Stat;
use crate::content::late;
use crate::elsewhere::{Elsewhere, Missed, Origin};
use crate::files;
use crate::hex;
use crate::key::{Domain, Name};
use crate::layout::Head;
use crate::pack::ObjectReader;
use crate::snapshot::to_path;
use crate::tree::Entry;
use host::clock::Deadline;
use host::{Context, Error, Kind, Result};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

pub(super) const BATCH_JOBS: usize = 32;
const BATCH_BYTES: u64 = 4 * 1024 * 1024;
/// Bounds open descriptors to a few hundred.
const MAX_UNDER_WAY: usize = 6;

pub(super) struct Job {
    pub(super) entry: Entry,
    pub(super) dir: Arc<OwnedFd>,
    pub(super) name: Vec<u8>,
}

/// A file whose bytes nobody has: its name in the directory it was to be in, and its path.
pub(super) struct Gone {
    pub(super) name: Vec<u8>,
    pub(super) path: Vec<u8>,
    pub(super) database: bool,
    pub(super) why: String,
}

/// Sends jobs to the workers and counts what is under way.
pub(super) struct Feed {
    to_work: mpsc::Sender<Vec<Job>>,
    results: mpsc::Receiver<Result<Vec<Gone>>>,
    /// What could not be written because nobody has its bytes.
    pub(super) gone: Vec<Gone>,
    jobs: Vec<Job>,
    bytes: u64,
    under_way: usize,
}

impl Feed {
    pub(super) fn new(to_work: mpsc::Sender<Vec<Job>>, results: mpsc::Receiver<Result<Vec<Gone>>>) -> Feed {
        Feed { to_work, results, gone: Vec::new(), jobs: Vec::new(), bytes: 0, under_way: 0 }
    }

    pub(super) fn push(&mut self, job: Job) -> Result<()> {
        self.bytes += job.entry.size;
        self.jobs.push(job);
        if self.jobs.len() >= BATCH_JOBS || self.bytes >= BATCH_BYTES { self.send() } else { Ok(()) }
    }

    fn send(&mut self) -> Result<()> {
        if self.jobs.is_empty() {
            return Ok(());
        }
        while self.under_way >= MAX_UNDER_WAY {
            self.receive()?;
        }
        self.bytes = 0;
        self.to_work.send(std::mem::take(&mut self.jobs)).map_err(|_| ended_early())?;
        self.under_way += 1;
        Ok(())
    }

    fn receive(&mut self) -> Result<()> {
        let got = self.results.recv().map_err(|_| ended_early())?;
        self.under_way -= 1;
        self.gone.extend(got?);
        Ok(())
    }

    pub(super) fn finish(&mut self) -> Result<()> {
        self.send()?;
        while self.under_way > 0 {
            self.receive()?;
        }
        Ok(())
    }
}

fn ended_early() -> Error {
    Error::new(Kind::System, "writing files", "a worker ended early")
}

pub(super) fn times(entry: &Entry) -> Timestamps {
    let (sec, nsec) = (entry.mtime_ns.div_euclid(1_000_000_000), entry.mtime_ns.rem_euclid(1_000_000_000));
    let at = Timespec { tv_sec: sec, tv_nsec: nsec };
    Timestamps { last_access: at, last_modification: at }
}

/// Gives away what is made, where that is needed; without privilege everything is ours anyway.
pub(super) fn own_at(dir: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> std::result::Result<(), Errno> {
    let now = Stat::at(dir, name)?;
    if (now.uid, now.gid) == (entry.uid, entry.gid) {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    permit(rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW))
}

/// Not being permitted to give a file away is no reason to leave it missing.
pub(super) fn permit(r: std::result::Result<(), Errno>) -> std::result::Result<(), Errno> {
    match r {
        Err(Errno::PERM) if !rustix::process::geteuid().is_root() => Ok(()),
        other => other,
    }
}

/// Owner, attributes, mode and time of something that is opened.
pub(super) fn finish(fd: BorrowedFd<'_>, entry: &Entry) -> std::result::Result<(), Errno> {
    let now = rustix::fs::fstat(fd)?;
    if (now.st_uid, now.st_gid) != (entry.uid, entry.gid) {
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        permit(rustix::fs::fchown(fd, Some(uid), Some(gid)))?;
    }
    set_xattrs(fd, entry)?;
    if now.st_mode & 0o7777 != entry.mode || entry.mode & 0o6000 != 0 {
        rustix::fs::fchmod(fd, Mode::from_raw_mode(entry.mode))?;
    }
    rustix::fs::futimens(fd, &times(entry))
}

pub(super) fn set_xattrs(fd: BorrowedFd<'_>, entry: &Entry) -> std::result::Result<(), Errno> {
    for (name, value) in &entry.xattrs {
        match rustix::fs::fsetxattr(fd, &name[..], value, rustix::fs::XattrFlags::empty()) {
            // A file system or a user that cannot have them: the bytes matter more.
            Ok(()) | Err(Errno::NOTSUP | Errno::PERM) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Writes files from proven objects.
pub(super) struct Writer<'a> {
    pub(super) head: &'a Head,
    pub(super) objects: ObjectReader<'a>,
    pub(super) domain: Domain,
    pub(super) deadline: Deadline,
    pub(super) sync_each: bool,
    pub(super) files: &'a AtomicU64,
    pub(super) bytes: &'a AtomicU64,
    pub(super) from_live: &'a AtomicU64,
    pub(super) from_spare: &'a AtomicU64,
    pub(super) elsewhere: &'a Elsewhere<'a>,
    pub(super) buffer: Vec<u8>,
}

/// Writes all of a batch; with `partial`, what nobody has is said and leaves nothing behind.
pub(super) fn write_all(writer: &mut Writer<'_>, jobs: &[Job], partial: bool) -> Result<Vec<Gone>> {
    let mut gone = Vec::new();
    for job in jobs {
        match writer.write(job) {
            Ok(()) => {}
            Err(e) if partial && e.kind == Kind::Corrupt => {
                let what = || format!("leaving out {}", to_path(&job.entry.path).display());
                files::remove_at(&job.dir, &job.name).context(what)?;
                let (name, path) = (job.name.clone(), job.entry.path.clone());
                gone.push(Gone { name, path, database: job.entry.database, why: e.why });
            }
            Err(e) => return Err(e),
        }
    }
    Ok(gone)
}

impl Writer<'_> {
    fn write(&mut self, job: &Job) -> Result<()> {
        let entry = &job.entry;
        let what = || format!("restoring {}", to_path(&entry.path).display());
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // Nobody else may read it before it has its owner.
        let fd = rustix::fs::openat(&job.dir, &job.name, flags, Mode::from_raw_mode(0o600)).context(what)?;
        let file = File::from(fd);
        let chunk = u64::from(entry.chunk_bytes());
        let mut at = 0u64;
        let mut hole = false;
        for run in &entry.runs {
            let length = usize::try_from((entry.size - at).min(chunk)).unwrap_or(0);
            self.buffer.clear();
            self.object(&run.name, length, at, entry)?;
            // Zeros of a larger file are left as a hole, however many there are.
            hole = entry.size > chunk && self.buffer.iter().all(|b| *b == 0);
            if hole {
                at = at.saturating_add(u64::from(run.count) * chunk).min(entry.size);
                continue;
            }
            for _ in 0..run.count {
                if self.deadline.passed() {
                    return Err(late(&what()));
                }
                let left = usize::try_from((entry.size - at).min(chunk)).unwrap_or(0);
                let Some(bytes) = self.buffer.get(..left) else { break };
                file.write_all_at(bytes, at).context(what)?;
                at += left as u64;
            }
        }
        if at != entry.size {
            return Err(Error::new(
                Kind::Corrupt,
                what(),
                "its objects are not as long as the manifest says",
            ));
        }
        if hole {
            file.set_len(entry.size).context(what)?;
        }
        finish(file.as_fd(), entry).context(what)?;
        if self.sync_each {
            files::sync_file(&file).context(what)?;
        }
        self.files.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(entry.size, Ordering::Relaxed);
        Ok(())
    }

    /// One proven object in the buffer: from the store, or from any other place that still has the same bytes.
    fn object(&mut self, name: &Name, length: usize, at: u64, entry: &Entry) -> Result<()> {
        let why = match self.objects.read(name, self.domain, &mut self.buffer) {
            Ok(()) if self.buffer.len() == length => return Ok(()),
            Ok(()) => "its length is not what the manifest says".to_string(),
            Err(why) => why,
        };
        let missed = Missed { name: *name, domain: self.domain, length, file_bytes: entry.size, at };
        match self.elsewhere.find(&missed, &mut self.buffer)? {
            Some(Origin::Live) => {
                self.from_live.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            Some(Origin::Spare) => {
                self.from_spare.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            None => {}
        }
        Err(Error::new(
            Kind::Corrupt,
            format!("restoring {} from snapshot {}", to_path(&entry.path).display(), self.head.info.id),
            format!(
                "object {} cannot be proven: {why}, and no other file here has the same bytes",
                hex::encode(&name[..8])
            ),
        )
        .hint("an older snapshot may hold it; `koboshi snapshot verify` shows what else is damaged"))
    }
}
