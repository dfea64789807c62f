//! Where everything goes that a repair replaces or removes. Nothing is deleted to make room for something else.

use crate::beneath::{DIR, Stat, open_beneath};
use crate::files;
use crate::snapshot::to_path;
use host::{Context, Error, Kind, Result};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

/// The same path may be replaced this often within one incident.
const MAX_SAME_NAME: u32 = 10_000;
/// Deeper trees are not copied between file systems.
const MAX_DEPTH: u32 = 2_000;

pub(crate) struct Quarantine<'a> {
    path: &'a Path,
    dir: Option<OwnedFd>,
    pub(crate) moved: u64,
    copied: bool,
}

impl<'a> Quarantine<'a> {
    pub(crate) fn new(path: &'a Path) -> Quarantine<'a> {
        Quarantine { path, dir: None, moved: 0, copied: false }
    }

    fn open(&mut self) -> Result<BorrowedFd<'_>> {
        let what = || format!("opening the quarantine {}", self.path.display());
        if self.dir.is_none() {
            if !self.path.is_absolute() {
                return Err(Error::new(Kind::Usage, what(), "its path must be absolute"));
            }
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(self.path).context(what)?;
            let fd = rustix::fs::open(self.path, DIR | OFlags::NOFOLLOW, Mode::empty()).context(what)?;
            self.dir = Some(fd);
        }
        match &self.dir {
            Some(d) => Ok(d.as_fd()),
            None => Err(Error::new(Kind::System, what(), "it cannot be opened")),
        }
    }

    /// Moves the entry `name` of `from` to `<root>/<path>` in the quarantine.
    pub(crate) fn take(&mut self, from: BorrowedFd<'_>, name: &[u8], root: &str, path: &[u8]) -> Result<()> {
        let what = || format!("moving {} to the quarantine", to_path(path).display());
        let target = [root.as_bytes(), b"/", path].concat();
        let target: &[u8] = if path.is_empty() { root.as_bytes() } else { &target };
        let top = self.open()?;
        let (dir, last) = make_way(top, target).context(what)?;
        let mut copied = false;
        for number in 0..MAX_SAME_NAME {
            let candidate = numbered(&last, number);
            match files::rename_at(from, name, &dir, &candidate, RenameFlags::NOREPLACE) {
                Ok(()) => {}
                Err(Errno::EXIST) => continue,
                Err(Errno::NOENT) => return Ok(()),
                Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                    if Stat::at(dir.as_fd(), &candidate).is_ok() {
                        continue;
                    }
                    files::rename_at(from, name, &dir, &candidate, RenameFlags::empty()).context(what)?;
                }
                Err(Errno::XDEV) => {
                    if Stat::at(dir.as_fd(), &candidate).is_ok() {
                        continue;
                    }
                    copy_tree(from, name, dir.as_fd(), &candidate, MAX_DEPTH).context(what)?;
                    files::sync_file_system(&dir).context(what)?;
                    remove_tree(from, name).context(what)?;
                    copied = true;
                }
                Err(e) => return Err(Error::io(what(), &std::io::Error::from(e))),
            }
            self.moved += 1;
            self.copied |= copied;
            return Ok(());
        }
        Err(Error::new(Kind::System, what(), "it holds too many of the same name"))
    }

    /// Makes the moves durable.
    pub(crate) fn sync(&self) -> Result<()> {
        match &self.dir {
            Some(d) if self.moved > 0 => {
                files::sync_opened(d).context(|| format!("syncing the quarantine {}", self.path.display()))
            }
            Some(_) | None => Ok(()),
        }
    }
}

fn numbered(last: &[u8], number: u32) -> Vec<u8> {
    if number == 0 {
        return last.to_vec();
    }
    let ending = format!(".~{number}~");
    // A name has room for 255 bytes.
    let keep = last.len().min(255 - ending.len());
    [&last[..keep], ending.as_bytes()].concat()
}

/// Makes the directories leading to a path, one by one and without following anything.
fn make_way(top: BorrowedFd<'_>, path: &[u8]) -> std::result::Result<(OwnedFd, Vec<u8>), Errno> {
    let mut dir = rustix::io::fcntl_dupfd_cloexec(top, 0)?;
    let mut parts = path.split(|b| *b == b'/').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return Ok((dir, part.to_vec()));
        }
        let mut number = 0;
        dir = loop {
            let name = numbered(part, number);
            match rustix::fs::mkdirat(&dir, &name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(e),
            }
            match open_beneath(dir.as_fd(), &name, DIR, Mode::empty()) {
                Ok(fd) => break fd,
                // A file of that name was taken before.
                Err(Errno::NOTDIR | Errno::LOOP) if number < MAX_SAME_NAME => number += 1,
                Err(e) => return Err(e),
            }
        };
    }
    Err(Errno::INVAL)
}

fn list(dir: BorrowedFd<'_>) -> std::result::Result<Vec<Vec<u8>>, Errno> {
    let mut buffer = [std::mem::MaybeUninit::uninit(); 8192];
    let mut listing = rustix::fs::RawDir::new(dir, &mut buffer);
    let mut names = Vec::new();
    while let Some(entry) = listing.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

/// Copies an entry with all below to another file system.
fn copy_tree(
    from: BorrowedFd<'_>,
    name: &[u8],
    to: BorrowedFd<'_>,
    to_name: &[u8],
    depth: u32,
) -> std::io::Result<()> {
    let s = Stat::at(from, name)?;
    let mode = Mode::from_raw_mode(s.mode & 0o7777);
    let owner = (Some(Uid::from_raw(s.uid)), Some(Gid::from_raw(s.gid)));
    if s.is_link() {
        let target = rustix::fs::readlinkat(from, name, Vec::new())?;
        rustix::fs::symlinkat(target, to, to_name)?;
    } else if s.is_dir() {
        let Some(depth) = depth.checked_sub(1) else { return Err(Errno::NAMETOOLONG.into()) };
        let source = open_beneath(from, name, DIR, Mode::empty())?;
        rustix::fs::mkdirat(to, to_name, Mode::from_raw_mode(0o700))?;
        let target = open_beneath(to, to_name, DIR, Mode::empty())?;
        for child in list(source.as_fd())? {
            copy_tree(source.as_fd(), &child, target.as_fd(), &child, depth)?;
        }
    } else if s.is_file() {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mut source = File::from(rustix::fs::openat(from, name, flags, Mode::empty())?);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut target = File::from(rustix::fs::openat(to, to_name, flags, Mode::from_raw_mode(0o600))?);
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let n = source.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            target.write_all(&buffer[..n])?;
        }
        let sec = s.mtime_ns.div_euclid(1_000_000_000);
        let at = Timespec { tv_sec: sec, tv_nsec: s.mtime_ns.rem_euclid(1_000_000_000) };
        rustix::fs::futimens(&target, &Timestamps { last_access: at, last_modification: at })?;
    } else {
        rustix::fs::mknodat(to, to_name, FileType::from_raw_mode(s.mode), mode, 0)?;
    }
    // Best effort: in the quarantine only we can read it anyway.
    let _ = rustix::fs::chownat(to, to_name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW);
    if !s.is_link() {
        rustix::fs::chmodat(to, to_name, mode, AtFlags::empty())?;
    }
    Ok(())
}

/// Removes an entry with all below: only what is ours, or has been copied and synced.
pub(crate) fn remove_tree(dir: BorrowedFd<'_>, name: &[u8]) -> std::io::Result<()> {
    let s = match Stat::at(dir, name) {
        Err(Errno::NOENT) => return Ok(()),
        other => other?,
    };
    if !s.is_dir() {
        return Ok(files::remove_at(dir, name)?);
    }
    let inner = open_beneath(dir, name, DIR, Mode::empty())?;
    for child in list(inner.as_fd())? {
        remove_tree(inner.as_fd(), &child)?;
    }
    Ok(rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)?)
}
