//! The slow way: a staged tree is brought into the live one file by file.
//!
//! Each file comes by rename, so it is the old one or the new one, whole. What a rename would hide or a removal would
//! lose is first kept below `previous`. The stage is only read: it stays the list of what is to be, so after a kill the
//! same walk goes on where it was, and the same walk backwards undoes it. Names that the live tree did not have are
//! written to the log before they are made, per directory, so that undoing knows them from what was already there.
//!
//! Copies and links are made first, under names of our own; then everything is synced; then it is renamed. That order
//! is kept in batches, because a sync per file would take minutes for a large tree.

use super::tree::{self, DEPTH_LIMIT, Kind};
use rustix::fs::{AtFlags, RenameFlags, Stat};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

/// Changes between two syncs; each may hold a directory handle.
const BATCH_LIMIT: usize = 256;
/// Our names in the live tree; those left by a killed walk are removed.
const OURS: &[u8] = b".koboshi-swap-";

/// Where names are written down before they are made.
pub(super) trait Log {
    /// These names of this directory (relative to the live tree) were not there before.
    fn added(&mut self, dir: &[CString], names: &[CString]) -> io::Result<()>;
    /// Asked before each change; an error stops the walk there.
    fn may_go_on(&mut self) -> io::Result<()>;
}

/// One change that may only happen once what it relies on is durable.
enum Change {
    Rename { dir: Rc<OwnedFd>, from: CString, to: CString },
    Unlink { dir: Rc<OwnedFd>, name: CString },
    RemoveDir { dir: Rc<OwnedFd>, name: CString },
}

/// The directory below `previous` that mirrors a live one, made when something has to be kept there.
struct Keep {
    path: Vec<(CString, Stat)>,
}

pub(super) struct Merge<'a> {
    previous: OwnedFd,
    live: Rc<OwnedFd>,
    log: &'a mut dyn Log,
    batch: Vec<Change>,
    next: u64,
    /// Where we are, for messages and the log.
    at: Vec<CString>,
}

impl<'a> Merge<'a> {
    pub(super) fn new(live: OwnedFd, previous: OwnedFd, log: &'a mut dyn Log) -> Merge<'a> {
        Merge { previous, live: Rc::new(live), log, batch: Vec::new(), next: 0, at: Vec::new() }
    }

    /// Where the walk was when it failed.
    pub(super) fn place(&self) -> String {
        let names: Vec<String> = self.at.iter().map(|n| n.to_string_lossy().into_owned()).collect();
        format!("/{}", names.join("/"))
    }

    /// Makes the live tree what the stage is.
    pub(super) fn forward(&mut self, stage: &OwnedFd) -> io::Result<()> {
        let live = Rc::clone(&self.live);
        self.bring(stage.as_fd(), &live, &mut Keep { path: Vec::new() }, false)?;
        self.flush()?;
        let stat = rustix::fs::fstat(stage)?;
        tree::dress(live.as_fd(), &stat)?;
        sync(live.as_fd())
    }

    fn bring(
        &mut self,
        stage: BorrowedFd<'_>,
        live: &Rc<OwnedFd>,
        keep: &mut Keep,
        new: bool,
    ) -> io::Result<()> {
        if self.at.len() > DEPTH_LIMIT {
            return Err(io::Error::other("a tree nested too deeply"));
        }
        let wanted = tree::list(stage)?;
        let mut there = tree::list(live.as_fd())?;
        clear_ours(live.as_fd(), &mut there)?;
        let added: Vec<CString> = wanted.keys().filter(|n| !there.contains_key(*n)).cloned().collect();
        if !added.is_empty() && !new {
            self.log.added(&self.at, &added)?;
        }
        for (name, stat) in there.iter().filter(|(n, _)| !wanted.contains_key(*n)) {
            self.put_aside(live, name, stat, keep)?;
        }
        for (name, stat) in &wanted {
            self.bring_one(stage, (name, stat), live, there.get(name), keep)?;
        }
        Ok(())
    }

    fn bring_one(
        &mut self,
        stage: BorrowedFd<'_>,
        (name, wanted): (&CString, &Stat),
        live: &Rc<OwnedFd>,
        there: Option<&Stat>,
        keep: &mut Keep,
    ) -> io::Result<()> {
        if tree::kind(wanted) == Kind::Dir {
            return self.bring_dir(stage, (name, wanted), live, there, keep);
        }
        if let Some(old) = there {
            if tree::kind(old) == Kind::Dir {
                self.put_aside(live, name, old, keep)?;
            } else if tree::same((stage, name, wanted), (live.as_fd(), name, old))? {
                return Ok(());
            } else {
                self.keep_copy(live, name, old, keep)?;
            }
        }
        self.log.may_go_on()?;
        let ours = self.own_name()?;
        link_or_copy(stage, name, wanted, live.as_fd(), &ours)?;
        self.later(Change::Rename { dir: Rc::clone(live), from: ours, to: name.clone() })
    }

    fn bring_dir(
        &mut self,
        stage: BorrowedFd<'_>,
        (name, wanted): (&CString, &Stat),
        live: &Rc<OwnedFd>,
        there: Option<&Stat>,
        keep: &mut Keep,
    ) -> io::Result<()> {
        let old = there.filter(|s| tree::kind(s) == Kind::Dir);
        if let (Some(other), None) = (there, old) {
            self.put_aside(live, name, other, keep)?;
            self.flush()?;
        }
        let target = Rc::new(tree::make_dir(live.as_fd(), name)?);
        self.at.push(name.clone());
        keep.path.push((name.clone(), *old.unwrap_or(wanted)));
        let source = tree::open_dir(stage, name)?;
        self.bring(source.as_fd(), &target, keep, there.is_none())?;
        keep.path.pop();
        self.at.pop();
        if old.is_some_and(|o| tree::same_dress(o, wanted)) {
            return Ok(());
        }
        tree::dress(target.as_fd(), wanted)
    }

    /// Keeps a copy of what is about to be replaced. One that is kept already is the true old one, and the live one may
    /// be new since a walk was killed; if it is neither of the two, somebody else made it, and it is kept as well.
    fn keep_copy(&mut self, live: &OwnedFd, name: &CString, stat: &Stat, keep: &Keep) -> io::Result<()> {
        self.log.may_go_on()?;
        let target = keep.open(self.previous.as_fd())?;
        let mut new = name.clone();
        if let Some(kept) = tree::look(target.as_fd(), name)? {
            if tree::kind(&kept) != Kind::Dir
                && tree::same((live.as_fd(), name, stat), (target.as_fd(), name, &kept))?
            {
                return Ok(());
            }
            new = free_name(target.as_fd(), name)?;
        }
        let ours = self.own_name()?;
        tree::remove_tree(target.as_fd(), &ours, 0)?;
        link_or_copy(live.as_fd(), name, stat, target.as_fd(), &ours)?;
        rustix::fs::renameat(&target, &ours, &target, &new)?;
        // Two names of one file: the kernel leaves both, and ours must go.
        gone(rustix::fs::unlinkat(&target, &ours, AtFlags::empty()))
    }

    /// Moves something out of the live tree, to be kept.
    fn put_aside(
        &mut self,
        live: &Rc<OwnedFd>,
        name: &CString,
        stat: &Stat,
        keep: &mut Keep,
    ) -> io::Result<()> {
        self.log.may_go_on()?;
        let target = keep.open(self.previous.as_fd())?;
        if tree::look(target.as_fd(), name)?.is_none() {
            match rustix::fs::renameat_with(live, name, &target, name, RenameFlags::NOREPLACE) {
                Ok(()) => return Ok(()),
                Err(Errno::XDEV | Errno::INVAL | Errno::BUSY) => {}
                Err(e) => return Err(e.into()),
            }
        }
        if tree::kind(stat) != Kind::Dir {
            self.keep_copy(live, name, stat, keep)?;
            return self.later(Change::Unlink { dir: Rc::clone(live), name: name.clone() });
        }
        let dir = Rc::new(tree::open_dir(live.as_fd(), name)?);
        keep.path.push((name.clone(), *stat));
        keep.open(self.previous.as_fd())?;
        for (inner, stat) in tree::list(dir.as_fd())? {
            self.put_aside(&dir, &inner, &stat, keep)?;
        }
        keep.path.pop();
        self.later(Change::RemoveDir { dir: Rc::clone(live), name: name.clone() })
    }

    /// Puts back what `previous` keeps, and removes what was added, by the list that the stage still is.
    pub(super) fn backward(
        &mut self,
        stage: &OwnedFd,
        added: &[(Vec<CString>, Vec<CString>)],
    ) -> io::Result<()> {
        clear_below(stage.as_fd(), self.live.as_fd(), 0)?;
        for (dir, names) in added.iter().rev() {
            let (Some(staged), Some(live)) = (walk(stage, dir)?, walk(&self.live, dir)?) else { continue };
            for name in names {
                remove_staged(staged.as_fd(), live.as_fd(), name, 0)?;
            }
        }
        let previous = self.previous.try_clone()?;
        let live = Rc::clone(&self.live);
        self.give_back(previous.as_fd(), Some(stage.as_fd()), &live)?;
        self.flush()?;
        sync(live.as_fd())
    }

    fn give_back(
        &mut self,
        previous: BorrowedFd<'_>,
        stage: Option<BorrowedFd<'_>>,
        live: &Rc<OwnedFd>,
    ) -> io::Result<()> {
        let mut there = tree::list(live.as_fd())?;
        clear_ours(live.as_fd(), &mut there)?;
        for (name, old) in tree::list(previous)? {
            let was_dir = tree::kind(&old) == Kind::Dir;
            let is_dir = there.get(&name).map(|s| tree::kind(s) == Kind::Dir);
            if let (Some(is_dir), Some(stage)) = (is_dir, stage)
                && is_dir != was_dir
            {
                remove_staged(stage, live.as_fd(), &name, 0)?;
            }
            self.at.push(name.clone());
            if was_dir {
                let target = Rc::new(tree::make_dir(live.as_fd(), &name)?);
                let source = tree::open_dir(previous, &name)?;
                let staged = stage.and_then(|s| tree::open_dir(s, &name).ok());
                self.give_back(source.as_fd(), staged.as_ref().map(AsFd::as_fd), &target)?;
                tree::dress(target.as_fd(), &old)?;
            } else {
                self.log.may_go_on()?;
                let ours = self.own_name()?;
                link_or_copy(previous, &name, &old, live.as_fd(), &ours)?;
                self.later(Change::Rename { dir: Rc::clone(live), from: ours, to: name.clone() })?;
            }
            self.at.pop();
        }
        Ok(())
    }

    fn own_name(&mut self) -> io::Result<CString> {
        self.next += 1;
        own_name(self.next)
    }

    fn later(&mut self, change: Change) -> io::Result<()> {
        self.batch.push(change);
        if self.batch.len() >= BATCH_LIMIT { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        sync(self.previous.as_fd())?;
        sync(self.live.as_fd())?;
        for change in std::mem::take(&mut self.batch) {
            self.log.may_go_on()?;
            match change {
                Change::Rename { dir, from, to } => {
                    rustix::fs::renameat(&dir, &from, &dir, &to)?;
                    // Two names of one file: the kernel leaves both, and ours must go.
                    gone(rustix::fs::unlinkat(&dir, &from, AtFlags::empty()))?;
                }
                Change::Unlink { dir, name } => gone(rustix::fs::unlinkat(&dir, &name, AtFlags::empty()))?,
                Change::RemoveDir { dir, name } => {
                    gone(rustix::fs::unlinkat(&dir, &name, AtFlags::REMOVEDIR))?;
                }
            }
        }
        Ok(())
    }
}

impl Keep {
    fn open(&self, previous: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        let mut dir = previous.try_clone_to_owned()?;
        for (name, like) in &self.path {
            let fresh = tree::look(dir.as_fd(), name)?.is_none();
            dir = tree::make_dir(dir.as_fd(), name)?;
            if fresh {
                tree::dress(dir.as_fd(), like)?;
            }
        }
        Ok(dir)
    }
}

/// Removes names of our own that a killed walk left in a directory.
fn clear_ours(live: BorrowedFd<'_>, there: &mut BTreeMap<CString, Stat>) -> io::Result<()> {
    let left: Vec<CString> = there.keys().filter(|n| n.to_bytes().starts_with(OURS)).cloned().collect();
    for name in left {
        tree::remove_tree(live, &name, 0)?;
        there.remove(&name);
    }
    Ok(())
}

/// The same in every live directory that the stage has too: a walk made names nowhere else.
fn clear_below(stage: BorrowedFd<'_>, live: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    if depth > DEPTH_LIMIT {
        return Err(io::Error::other("a tree nested too deeply"));
    }
    let mut there = tree::list(live)?;
    clear_ours(live, &mut there)?;
    for (name, stat) in tree::list(stage)?.iter().filter(|(_, s)| tree::kind(s) == Kind::Dir) {
        if there.get(name).is_some_and(|s| tree::kind(s) == tree::kind(stat)) {
            let (staged, inner) = (tree::open_dir(stage, name)?, tree::open_dir(live, name)?);
            clear_below(staged.as_fd(), inner.as_fd(), depth + 1)?;
        }
    }
    Ok(())
}

fn own_name(n: u64) -> io::Result<CString> {
    CString::new([OURS, n.to_string().as_bytes()].concat()).map_err(io::Error::other)
}

fn gone(result: rustix::io::Result<()>) -> io::Result<()> {
    match result {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn sync(fd: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::fs::syncfs(fd)?)
}

/// A second name for a staged entry, or a copy where that cannot be.
fn link_or_copy(
    from: BorrowedFd<'_>,
    name: &CStr,
    stat: &Stat,
    to: BorrowedFd<'_>,
    new: &CStr,
) -> io::Result<()> {
    match rustix::fs::linkat(from, name, to, new, AtFlags::empty()) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => {
            tree::remove_tree(to, new, 0)?;
            tree::copy(from, name, stat, to, new)
        }
        Err(Errno::XDEV | Errno::PERM | Errno::MLINK | Errno::OPNOTSUPP | Errno::NOSYS) => {
            tree::copy(from, name, stat, to, new)
        }
        Err(e) => Err(e.into()),
    }
}

/// `name`, or with a number when that is taken by something kept earlier.
fn free_name(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<CString> {
    const TRIES: u32 = 1_000;
    if tree::look(dir, name)?.is_none() {
        return Ok(name.to_owned());
    }
    for n in 2..TRIES {
        let numbered =
            CString::new([name.to_bytes(), format!(".{n}").as_bytes()].concat()).map_err(io::Error::other)?;
        if tree::look(dir, &numbered)?.is_none() {
            return Ok(numbered);
        }
    }
    Err(io::Error::other("too many of one name are kept"))
}

fn walk(top: &OwnedFd, path: &[CString]) -> io::Result<Option<OwnedFd>> {
    let mut dir = top.try_clone()?;
    for name in path {
        dir = match tree::open_dir(dir.as_fd(), name) {
            Ok(dir) => dir,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(e) => return Err(e),
        };
    }
    Ok(Some(dir))
}

/// Removes from the live tree what came from the stage; what somebody else put there since stays, with the directories
/// that hold it.
fn remove_staged(stage: BorrowedFd<'_>, live: BorrowedFd<'_>, name: &CStr, depth: usize) -> io::Result<()> {
    if depth > DEPTH_LIMIT {
        return Err(io::Error::other("a tree nested too deeply"));
    }
    let (Some(staged), Some(there)) = (tree::look(stage, name)?, tree::look(live, name)?) else {
        return Ok(());
    };
    match (tree::kind(&staged), tree::kind(&there)) {
        (Kind::Dir, Kind::Dir) => {
            let (staged, inner) = (tree::open_dir(stage, name)?, tree::open_dir(live, name)?);
            for inner_name in tree::list(staged.as_fd())?.keys() {
                remove_staged(staged.as_fd(), inner.as_fd(), inner_name, depth + 1)?;
            }
            match rustix::fs::unlinkat(live, name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOTEMPTY | Errno::NOENT) => Ok(()),
                Err(e) => Err(e.into()),
            }
        }
        (Kind::Dir, Kind::File | Kind::Link | Kind::Other)
        | (Kind::File | Kind::Link | Kind::Other, Kind::Dir) => Ok(()),
        (Kind::File | Kind::Link | Kind::Other, Kind::File | Kind::Link | Kind::Other) => {
            if tree::same((stage, name, &staged), (live, name, &there))? {
                gone(rustix::fs::unlinkat(live, name, AtFlags::empty()))?;
            }
            Ok(())
        }
    }
}
