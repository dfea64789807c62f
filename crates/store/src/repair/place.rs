//! Phase 2: each piece exchanged with what stands in its place, which goes to the quarantine.

use super::stage::dup;
use super::write::{permit, set_xattrs, times};
use super::{SYNC_EACH_FILES, Staged, Step};
use crate::beneath::{Base, Stat, chmod_handle, handle};
use crate::quarantine::Quarantine;
use crate::snapshot::to_path;
use crate::tree::{Entry, EntryKind};
use crate::walk::COMPANIONS;
use crate::{Repaired, files};
use host::{Context, Error, Result};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, RenameFlags, Uid};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Makes durable what was written under our own names, on every file system concerned.
pub(super) fn sync_file_systems(staged: &Staged<'_>) -> Result<()> {
    let what = || format!("syncing {}", staged.base.path.display());
    let mut seen = Vec::new();
    for step in &staged.steps {
        let Step::Place { dir, .. } = step else { continue };
        let dev = rustix::fs::fstat(dir).context(what)?.st_dev;
        if !seen.contains(&dev) {
            seen.push(dev);
            files::sync_file_system(dir).context(what)?;
        }
    }
    Ok(())
}

/// Phase 2 for one root: everything it needs stands ready and durable.
pub(super) fn place(root: &Staged<'_>, quarantine: &mut Quarantine<'_>, done: &mut Repaired) -> Result<()> {
    let name = &root.reference.root.name;
    let what = |path: &[u8]| format!("putting {} in place", root.base.path.join(to_path(path)).display());
    let mut dirs: BTreeMap<(u64, u64), OwnedFd> = BTreeMap::new();
    let mut touched = |dir: BorrowedFd<'_>| -> Result<()> {
        let s = rustix::fs::fstat(dir).context(|| "syncing a directory".into())?;
        let s = Stat::of(&s);
        if dirs.len() <= SYNC_EACH_FILES && !dirs.contains_key(&(s.dev, s.ino)) {
            dirs.insert((s.dev, s.ino), dup(dir)?);
        }
        Ok(())
    };
    for step in &root.steps {
        match step {
            Step::Place { dir, tmp, path, database } => {
                let (_, last) = match path.iter().rposition(|b| *b == b'/') {
                    _ if path.is_empty() => root.base.parent_of(path).context(|| what(path))?,
                    Some(cut) => (dup(dir.as_fd())?, path[cut + 1..].to_vec()),
                    None => (dup(dir.as_fd())?, path.clone()),
                };
                if *database {
                    for ending in COMPANIONS {
                        let companion = [&last[..], ending].concat();
                        if Stat::at(dir.as_fd(), &companion).is_ok() {
                            quarantine.take(dir.as_fd(), &companion, name, &[&path[..], ending].concat())?;
                        }
                    }
                    // The log must be gone for certain before a main file that it does not belong to appears.
                    files::sync_opened(dir).context(|| what(path))?;
                }
                exchange(dir.as_fd(), tmp, &last, quarantine, name, path)?;
                touched(dir.as_fd())?;
            }
            Step::Aside { path } => {
                let (dir, last) = match root.base.parent_of(path) {
                    Err(Errno::NOENT | Errno::NOTDIR) => continue,
                    other => other.context(|| what(path))?,
                };
                quarantine.take(dir.as_fd(), &last, name, path)?;
                touched(dir.as_fd())?;
            }
            Step::Attributes(_) => {}
        }
    }
    // Last and from the deepest up: a directory may come to forbid entering itself.
    for step in root.steps.iter().rev() {
        let Step::Attributes(entry) = step else { continue };
        attributes(&root.base, entry).context(|| what(&entry.path))?;
        done.attributes += 1;
    }
    if dirs.len() > SYNC_EACH_FILES {
        files::sync_file_system(root.base.top()).context(|| what(b""))?;
    } else {
        for dir in dirs.values() {
            files::sync_opened(dir).context(|| what(b""))?;
        }
    }
    Ok(())
}

/// Exchanges `tmp` with what stands at `last`, which then goes to the quarantine: no moment without either.
fn exchange(
    dir: BorrowedFd<'_>,
    tmp: &[u8],
    last: &[u8],
    quarantine: &mut Quarantine<'_>,
    root: &str,
    path: &[u8],
) -> Result<()> {
    let what = || format!("putting {} in place", to_path(path).display());
    match files::rename_at(dir, tmp, dir, last, RenameFlags::NOREPLACE) {
        Ok(()) => return Ok(()),
        Err(Errno::EXIST) => {}
        // A file system without such renames.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
            if Stat::at(dir, last).is_ok() {
                quarantine.take(dir, last, root, path)?;
            }
            return files::rename_at(dir, tmp, dir, last, RenameFlags::empty()).context(what);
        }
        Err(e) => return Err(Error::io(what(), &std::io::Error::from(e))),
    }
    match files::rename_at(dir, tmp, dir, last, RenameFlags::EXCHANGE) {
        Ok(()) => quarantine.take(dir, tmp, root, path),
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP | Errno::XDEV) => {
            quarantine.take(dir, last, root, path)?;
            files::rename_at(dir, tmp, dir, last, RenameFlags::empty()).context(what)
        }
        Err(e) => Err(Error::io(what(), &std::io::Error::from(e))),
    }
}

fn attributes(base: &Base, entry: &Entry) -> std::result::Result<(), Errno> {
    let (dir, last) = base.parent_of(&entry.path)?;
    let fd = handle(dir.as_fd(), &last)?;
    let s = Stat::of(&rustix::fs::fstat(&fd)?);
    let right = match entry.kind {
        EntryKind::Dir => s.is_dir(),
        EntryKind::File => s.is_file() && s.nlink <= 1,
        EntryKind::Link => s.is_link(),
        EntryKind::Special | EntryKind::Unread => false,
    };
    if !right {
        // Not what it was a moment ago; the next look decides.
        return Ok(());
    }
    if (s.uid, s.gid) != (entry.uid, entry.gid) {
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        permit(rustix::fs::chownat(
            &fd,
            c"",
            Some(uid),
            Some(gid),
            AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
        ))?;
    }
    if entry.kind == EntryKind::Link {
        return Ok(());
    }
    chmod_handle(fd.as_fd(), entry.mode)?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(open) = rustix::fs::openat(&dir, &last, flags, Mode::empty()) else { return Ok(()) };
    let now = crate::content::xattrs(open.as_fd());
    for (name, _) in now.iter().filter(|(n, _)| !entry.xattrs.iter().any(|(e, _)| e == n)) {
        match rustix::fs::fremovexattr(&open, &name[..]) {
            Ok(()) | Err(Errno::NOTSUP | Errno::PERM) => {}
            Err(e) => return Err(e),
        }
    }
    set_xattrs(open.as_fd(), entry)?;
    rustix::fs::futimens(&open, &times(entry)).or(Ok(()))
}
