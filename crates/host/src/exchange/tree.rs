//! Trees handled by directory handles and single names, so that a symbolic link planted anywhere below never leads a
//! privileged hand elsewhere.

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Directories nested deeper than this are refused: no program needs it, and a handle is held for each level.
pub(super) const DEPTH_LIMIT: usize = 128;
/// Entries of one directory; beyond it something is very wrong.
const ENTRIES_LIMIT: usize = 1_000_000;
const NO_FOLLOW: AtFlags = AtFlags::SYMLINK_NOFOLLOW;
const ALL_PERMISSIONS: u32 = 0o7777;

/// The kinds of entry that a tree may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Dir,
    Link,
    /// Named pipes, sockets, devices.
    Other,
}

pub(super) fn kind(stat: &Stat) -> Kind {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Dir,
        FileType::Symlink => Kind::Link,
        FileType::Fifo
        | FileType::Socket
        | FileType::CharacterDevice
        | FileType::BlockDevice
        | FileType::Unknown => Kind::Other,
    }
}

pub(super) fn open_top(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

pub(super) fn open_dir(at: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(at, name, flags, Mode::empty())?)
}

/// The directory of that name, made if missing.
pub(super) fn make_dir(at: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    match rustix::fs::mkdirat(at, name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => open_dir(at, name),
        Err(e) => Err(e.into()),
    }
}

/// What a name stands for; `None` when it is free.
pub(super) fn look(at: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<Stat>> {
    match rustix::fs::statat(at, name, NO_FOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// The entries of a directory, in order of name.
pub(super) fn list(dir: BorrowedFd<'_>) -> io::Result<BTreeMap<CString, Stat>> {
    let mut entries = BTreeMap::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        if entries.len() >= ENTRIES_LIMIT {
            return Err(io::Error::other("a directory with too many entries"));
        }
        // One that vanished between listing and looking is not there.
        if let Some(stat) = look(dir, name)? {
            entries.insert(name.to_owned(), stat);
        }
    }
    Ok(entries)
}

/// Gives a copied entry the owner, mode and time of its original. The owner only where we may.
pub(super) fn dress(file: BorrowedFd<'_>, like: &Stat) -> io::Result<()> {
    if rustix::process::geteuid().is_root() {
        rustix::fs::fchown(file, Some(Uid::from_raw(like.st_uid)), Some(Gid::from_raw(like.st_gid)))?;
    }
    rustix::fs::fchmod(file, Mode::from_raw_mode(like.st_mode & ALL_PERMISSIONS))?;
    let time = |s: i64, ns: u64| Timespec { tv_sec: s, tv_nsec: i64::try_from(ns).unwrap_or(0) };
    rustix::fs::futimens(
        file,
        &Timestamps {
            last_access: time(like.st_atime, like.st_atime_nsec),
            last_modification: time(like.st_mtime, like.st_mtime_nsec),
        },
    )?;
    Ok(())
}

/// Whether two directories' own metadata (not their entries) agree where it matters.
pub(super) fn same_dress(a: &Stat, b: &Stat) -> bool {
    let owner = !rustix::process::geteuid().is_root() || (a.st_uid, a.st_gid) == (b.st_uid, b.st_gid);
    owner && a.st_mode == b.st_mode
}

fn open_file(at: BorrowedFd<'_>, name: &CStr) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    Ok(File::from(rustix::fs::openat(at, name, flags, Mode::empty())?))
}

/// Copies one entry that is not a directory to a free name. Not yet durable.
pub(super) fn copy(
    from: BorrowedFd<'_>,
    name: &CStr,
    stat: &Stat,
    to: BorrowedFd<'_>,
    new: &CStr,
) -> io::Result<()> {
    match kind(stat) {
        Kind::File => {
            let mut source = open_file(from, name)?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut target = File::from(rustix::fs::openat(to, new, flags, Mode::RUSR | Mode::WUSR)?);
            io::copy(&mut source, &mut target)?;
            dress(target.as_fd(), stat)
        }
        Kind::Link => {
            let target = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(&target, to, new)?;
            if rustix::process::geteuid().is_root() {
                let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
                rustix::fs::chownat(to, new, Some(uid), Some(gid), NO_FOLLOW)?;
            }
            Ok(())
        }
        Kind::Other if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo => {
            let mode = Mode::from_raw_mode(stat.st_mode & ALL_PERMISSIONS);
            Ok(rustix::fs::mknodat(to, new, FileType::Fifo, mode, 0)?)
        }
        Kind::Dir | Kind::Other => Err(io::Error::other("a socket or device cannot be copied")),
    }
}

/// Whether two entries, neither of them a directory, are the same in content, mode and owner.
pub(super) fn same(a: (BorrowedFd<'_>, &CStr, &Stat), b: (BorrowedFd<'_>, &CStr, &Stat)) -> io::Result<bool> {
    if (a.2.st_dev, a.2.st_ino) == (b.2.st_dev, b.2.st_ino) {
        return Ok(true);
    }
    if !same_dress(a.2, b.2) || a.2.st_size != b.2.st_size {
        return Ok(false);
    }
    match kind(a.2) {
        Kind::File => same_bytes(open_file(a.0, a.1)?, open_file(b.0, b.1)?),
        Kind::Link => {
            let read = |at, name| rustix::fs::readlinkat(at, name, Vec::new());
            Ok(read(a.0, a.1)? == read(b.0, b.1)?)
        }
        Kind::Dir | Kind::Other => Ok(false),
    }
}

fn same_bytes(mut a: File, mut b: File) -> io::Result<bool> {
    let (mut left, mut right) = (vec![0_u8; 64 << 10], vec![0_u8; 64 << 10]);
    loop {
        let n = fill(&mut a, &mut left)?;
        let m = fill(&mut b, &mut right)?;
        if left.get(..n) != right.get(..m) {
            return Ok(false);
        }
        if n == 0 {
            return Ok(true);
        }
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut have = 0;
    while let Some(rest) = buffer.get_mut(have..).filter(|r| !r.is_empty()) {
        match file.read(rest) {
            Ok(0) => break,
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(have)
}

/// Copies a whole tree to a free name beside or elsewhere; sockets, which mean nothing without their process, are left
/// out. Durable only after a sync of the file system.
pub(super) fn copy_tree(
    from: BorrowedFd<'_>,
    name: &CStr,
    stat: &Stat,
    to: BorrowedFd<'_>,
    new: &CStr,
    depth: usize,
) -> io::Result<()> {
    if depth > DEPTH_LIMIT {
        return Err(io::Error::other("a tree nested too deeply"));
    }
    if FileType::from_raw_mode(stat.st_mode) == FileType::Socket {
        return Ok(());
    }
    if kind(stat) != Kind::Dir {
        return copy(from, name, stat, to, new);
    }
    rustix::fs::mkdirat(to, new, Mode::RWXU)?;
    let (source, target) = (open_dir(from, name)?, open_dir(to, new)?);
    for (name, stat) in list(source.as_fd())? {
        copy_tree(source.as_fd(), &name, &stat, target.as_fd(), &name, depth + 1)?;
    }
    dress(target.as_fd(), stat)
}

/// Removes an entry and all below it, following nothing.
pub(super) fn remove_tree(at: BorrowedFd<'_>, name: &CStr, depth: usize) -> io::Result<()> {
    if depth > DEPTH_LIMIT {
        return Err(io::Error::other("a tree nested too deeply"));
    }
    let Some(stat) = look(at, name)? else { return Ok(()) };
    if kind(&stat) != Kind::Dir {
        return Ok(rustix::fs::unlinkat(at, name, AtFlags::empty())?);
    }
    let dir = open_dir(at, name)?;
    for name in list(dir.as_fd())?.keys() {
        remove_tree(dir.as_fd(), name, depth + 1)?;
    }
    Ok(rustix::fs::unlinkat(at, name, AtFlags::REMOVEDIR)?)
}
