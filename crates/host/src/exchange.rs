//! The safe switch: a staged tree takes the live one's place, and the live one is kept.
//!
//! Normally that is one system call (`renameat2` with `RENAME_EXCHANGE`): no moment without a tree, and no way to
//! stop half way. Where the kernel cannot do it (a directory in a lower layer of overlayfs, a mount point, another file
//! system) the trees are brought together file by file. Either way the intent is on disk first, beside the stage, so
//! that whoever comes after a kill can see what happened, finish it or take it back.

mod merge;
mod tree;

use crate::clock::Deadline;
use crate::error::{Context, Error, Kind, Result};
use crate::files;
use crate::immutable::freeing;
use crate::journal::Journal;
use merge::{Log, Merge};
use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// How one tree takes another's place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// At once.
    Exchange,
    /// Each file by rename; `why` the kernel cannot do it at once.
    FileByFile {
        /// The reason, in words.
        why: String,
    },
}

/// A finished switch, which can be taken back until it is settled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Swapped {
    /// How it was done.
    pub method: Method,
    /// The stage as it was given. After an exchange the previous tree lies here.
    pub stage: PathBuf,
    /// The live tree.
    pub live: PathBuf,
    /// What was there before: the whole tree, or, file by file, what was replaced or removed. `None`: nothing was.
    pub previous: Option<PathBuf>,
}

/// A directory's identity, to tell after a kill which is which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Id {
    dev: u64,
    ino: u64,
}

/// What is written beside the stage, in this order.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Note {
    Begin {
        live: PathBuf,
        staged: Id,
        was_there: bool,
    },
    FileByFile {
        why: String,
    },
    /// File by file: names that the live tree did not have. Bytes, since names need not be text.
    Added {
        dir: Vec<Vec<u8>>,
        names: Vec<Vec<u8>>,
    },
    Done,
    Back,
}

/// How trees below `live`'s parent can be switched, found out on the real directory without disturbing it.
///
/// # Errors
/// When nothing can be made beside `live`.
pub fn probe(live: &Path) -> Result<Method> {
    probe_from(files::parent(live), live)
}

/// The same for a stage that will lie in `stage_dir`.
///
/// The real directory is asked to take the name of a directory that is not empty: that can never succeed, but a kernel
/// that could not move it at all says so first. Then two directories of our own are exchanged for certain.
///
/// # Errors
/// When nothing can be made in `stage_dir`.
pub fn probe_from(stage_dir: &Path, live: &Path) -> Result<Method> {
    let what = || format!("trying how {} can be switched", live.display());
    let (a, b) = (own_dir(stage_dir).context(what)?, own_dir(stage_dir).context(what)?);
    let _clean = (Gone(&a), Gone(&b));
    std::fs::write(a.join("not-empty"), b"").context(what)?;
    if live.symlink_metadata().is_ok() {
        match rustix::fs::renameat(CWD, live, CWD, &a) {
            // The order of checks: could not be moved (below), could be but for what is in the way (here).
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::ISDIR) => {}
            Err(e) => return slow(e).ok_or_else(|| Error::io(what(), &e.into())),
            Ok(()) => {
                // Forbidden by POSIX. Undo at once and trust nothing.
                rustix::fs::renameat(CWD, &a, CWD, live).context(what)?;
                return Ok(Method::FileByFile { why: "the file system breaks the rules of rename".into() });
            }
        }
    }
    match rustix::fs::renameat_with(CWD, &a, CWD, &b, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(Method::Exchange),
        Err(e) => slow(e).ok_or_else(|| Error::io(what(), &e.into())),
    }
}

/// The reasons for the slow way; other errors are errors.
fn slow(e: Errno) -> Option<Method> {
    let why = match e {
        Errno::XDEV => "it lies in a lower layer, behind a mount or on another file system (EXDEV)",
        Errno::BUSY => "it is a mount point (EBUSY)",
        Errno::INVAL => "the file system cannot exchange (EINVAL)",
        Errno::NOSYS | Errno::OPNOTSUPP => "the kernel cannot exchange (ENOSYS)",
        _ => return None,
    };
    Some(Method::FileByFile { why: why.into() })
}

/// Puts the staged tree in the live one's place.
///
/// On success the switch can be taken back with [`Swapped::back`] until [`Swapped::settle`]. File by file, stage and
/// live tree share files until then.
///
/// # Errors
/// Before anything was touched, or, file by file, in the middle: then [`resume`] finishes it and [`undo`] takes it
/// back, now or after a restart.
pub fn swap(stage: &Path, live: &Path) -> Result<Swapped> {
    swap_while(stage, live, &mut || Ok(()))
}

/// The same, stopping at the deadline if it comes to the slow way; as after a kill, it can then be finished or taken
/// back.
///
/// # Errors
/// As for [`swap`]; `TimedOut` at the deadline.
pub fn swap_by(stage: &Path, live: &Path, deadline: Deadline) -> Result<Swapped> {
    swap_while(stage, live, &mut || {
        if deadline.passed() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
    })
}

/// Asked before each change of the slow way; an error stops it there.
type May<'a> = &'a mut dyn FnMut() -> io::Result<()>;

fn swap_while(stage: &Path, live: &Path, may: May<'_>) -> Result<Swapped> {
    let what = || format!("switching {} for {}", live.display(), stage.display());
    if Told::read(stage)?.is_some() {
        return Err(Error::new(Kind::System, what(), "an earlier switch of this stage is not settled")
            .hint("finish it or take it back first"));
    }
    refuse_nested(stage, live)?;
    let staged = id(stage).context(what)?;
    let was_there = live.symlink_metadata().is_ok();
    let (mut notes, _, _) = Journal::open(&notes_path(stage))?;
    note(&mut notes, &Note::Begin { live: live.to_path_buf(), staged, was_there })?;
    go_on(stage, live, was_there, &mut notes, may)
}

/// Finishes a switch that was begun, whoever began it. `None` when none was begun with this stage, or it was taken back.
///
/// # Errors
/// As for [`swap`].
pub fn resume(stage: &Path) -> Result<Option<Swapped>> {
    resume_while(stage, &mut || Ok(()))
}

fn resume_while(stage: &Path, may: May<'_>) -> Result<Option<Swapped>> {
    let Some(told) = Told::read(stage)? else { return Ok(None) };
    if told.back {
        undo_while(stage, may)?;
        return Ok(None);
    }
    if told.done || told.exchanged() {
        return Ok(Some(told.swapped()));
    }
    let (mut notes, _, _) = Journal::open(&notes_path(stage))?;
    match &told.slowly {
        Some(why) => slowly(stage, &told.live, told.was_there, why.clone(), &mut notes, may),
        None => go_on(stage, &told.live, told.was_there, &mut notes, may),
    }
    .map(Some)
}

/// Takes back a switch that was begun with this stage, finished or not. Nothing to do when none was.
///
/// # Errors
/// When it could not be taken back wholly; to be called again.
pub fn undo(stage: &Path) -> Result<()> {
    undo_while(stage, &mut || Ok(()))
}

fn undo_while(stage: &Path, may: May<'_>) -> Result<()> {
    let Some(told) = Told::read(stage)? else { return Ok(()) };
    let what = || format!("switching {} back", told.live.display());
    let (mut notes, _, _) = Journal::open(&notes_path(stage))?;
    note(&mut notes, &Note::Back)?;
    if told.slowly.is_some() {
        let previous = previous_path(stage);
        merge(stage, &told.live, &previous, &mut notes, may, |merge, stage| {
            merge.backward(stage, &told.added)
        })?;
        std::fs::remove_dir_all(&previous).context(what)?;
        if !told.was_there {
            // Empty but for what somebody else put there since.
            let _ = std::fs::remove_dir(&told.live);
        }
    } else if told.exchanged() {
        let flags = if told.was_there { RenameFlags::EXCHANGE } else { RenameFlags::NOREPLACE };
        rustix::fs::renameat_with(CWD, &told.live, CWD, stage, flags).context(what)?;
        sync_both(stage, &told.live)?;
    }
    drop_notes(stage)
}

impl Swapped {
    /// Takes it back.
    ///
    /// # Errors
    /// As for [`undo`].
    pub fn back(&self) -> Result<()> {
        undo(&self.stage)
    }

    /// Accepts it: from here on it cannot be taken back. What was there before stays where `previous` says, for the
    /// caller to keep or remove; file by file, the stage, which shares its files with the live tree, goes.
    ///
    /// # Errors
    /// When the stage cannot be removed; to be called again.
    pub fn settle(&self) -> Result<()> {
        match &self.method {
            Method::Exchange => {}
            Method::FileByFile { .. } => match std::fs::remove_dir_all(&self.stage) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io(format!("removing the stage {}", self.stage.display()), &e));
                }
                Ok(()) | Err(_) => {}
            },
        }
        drop_notes(&self.stage)
    }
}

/// A stage inside the live tree, or around it, would be merged into itself.
fn refuse_nested(stage: &Path, live: &Path) -> Result<()> {
    let real = |p: &Path| {
        let parent = files::parent(p).canonicalize().context(|| format!("looking at {}", p.display()))?;
        Ok::<_, Error>(parent.join(p.file_name().unwrap_or_default()))
    };
    let (a, b) = (real(stage)?, real(live)?);
    if a.starts_with(&b) || b.starts_with(&a) {
        let what = format!("switching {} for {}", live.display(), stage.display());
        return Err(Error::new(Kind::Usage, what, "one lies inside the other"));
    }
    Ok(())
}

fn go_on(stage: &Path, live: &Path, was_there: bool, notes: &mut Journal, may: May<'_>) -> Result<Swapped> {
    let what = || format!("switching {} for {}", live.display(), stage.display());
    let flags = if was_there { RenameFlags::EXCHANGE } else { RenameFlags::NOREPLACE };
    match freeing(&[stage, live], || rustix::fs::renameat_with(CWD, stage, CWD, live, flags)) {
        Ok(()) => {
            sync_both(stage, live)?;
            note(notes, &Note::Done)?;
            let previous = was_there.then(|| stage.to_path_buf());
            Ok(Swapped { method: Method::Exchange, stage: stage.into(), live: live.into(), previous })
        }
        Err(e) => match slow(e) {
            Some(Method::FileByFile { why }) => {
                note(notes, &Note::FileByFile { why: why.clone() })?;
                slowly(stage, live, was_there, why, notes, may)
            }
            Some(Method::Exchange) | None => {
                // Nothing happened, so nothing is left to finish.
                let _ = drop_notes(stage);
                Err(Error::io(what(), &e.into()))
            }
        },
    }
}

fn slowly(
    stage: &Path,
    live: &Path,
    was_there: bool,
    why: String,
    notes: &mut Journal,
    may: May<'_>,
) -> Result<Swapped> {
    if live.symlink_metadata().is_err() {
        std::fs::create_dir(live).context(|| format!("making {}", live.display()))?;
    }
    let previous = previous_path(stage);
    merge(stage, live, &previous, notes, may, |merge, stage| merge.forward(stage))?;
    files::sync_dir(files::parent(live))?;
    note(notes, &Note::Done)?;
    let previous = was_there.then_some(previous);
    Ok(Swapped { method: Method::FileByFile { why }, stage: stage.into(), live: live.into(), previous })
}

fn merge(
    stage: &Path,
    live: &Path,
    previous: &Path,
    notes: &mut Journal,
    may: May<'_>,
    work: impl FnOnce(&mut Merge<'_>, &std::os::fd::OwnedFd) -> io::Result<()>,
) -> Result<()> {
    let what = || format!("bringing {} into {} file by file", stage.display(), live.display());
    files::make_private_dir(previous)?;
    let (staged, kept) = (tree::open_top(stage).context(what)?, tree::open_top(previous).context(what)?);
    let mut log = Notes { notes, may };
    let mut merge = Merge::new(tree::open_top(live).context(what)?, kept, &mut log);
    let result = work(&mut merge, &staged);
    let place = merge.place();
    result.map_err(|e| Error::io(format!("{}, at {place}", what()), &e))
}

struct Notes<'a> {
    notes: &'a mut Journal,
    may: May<'a>,
}

impl Log for Notes<'_> {
    fn added(&mut self, dir: &[CString], names: &[CString]) -> io::Result<()> {
        /// Names per note, so that a note stays within a record.
        const NAMES: usize = 200;
        let bytes = |all: &[CString]| all.iter().map(|n| n.as_bytes().to_vec()).collect();
        for some in names.chunks(NAMES) {
            note(self.notes, &Note::Added { dir: bytes(dir), names: bytes(some) })
                .map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn may_go_on(&mut self) -> io::Result<()> {
        (self.may)()
    }
}

fn note(notes: &mut Journal, note: &Note) -> Result<()> {
    let bytes = serde_json::to_vec(note).map_err(|e| Error::new(Kind::System, "noting a switch", e))?;
    notes.append(&bytes)
}

/// What the notes beside a stage tell.
struct Told {
    stage: PathBuf,
    live: PathBuf,
    staged: Id,
    was_there: bool,
    slowly: Option<String>,
    added: Vec<(Vec<CString>, Vec<CString>)>,
    done: bool,
    back: bool,
}

impl Told {
    fn read(stage: &Path) -> Result<Option<Told>> {
        let (records, _) = Journal::read(&notes_path(stage))?;
        let mut told: Option<Told> = None;
        for record in records {
            let note: Note = serde_json::from_slice(&record).map_err(|e| {
                Error::new(Kind::Corrupt, format!("reading the notes of {}", stage.display()), e)
            })?;
            match (note, &mut told) {
                (Note::Begin { live, staged, was_there }, _) => {
                    told = Some(Told {
                        stage: stage.to_path_buf(),
                        live,
                        staged,
                        was_there,
                        slowly: None,
                        added: Vec::new(),
                        done: false,
                        back: false,
                    });
                }
                (Note::FileByFile { why }, Some(t)) => t.slowly = Some(why),
                (Note::Added { dir, names }, Some(t)) => t.added.push((strings(dir), strings(names))),
                (Note::Done, Some(t)) => t.done = true,
                (Note::Back, Some(t)) => t.back = true,
                (Note::FileByFile { .. } | Note::Added { .. } | Note::Done | Note::Back, None) => {}
            }
        }
        Ok(told)
    }

    /// Whether the staged directory is the live one now.
    fn exchanged(&self) -> bool {
        self.slowly.is_none() && id(&self.live).is_ok_and(|now| now == self.staged)
    }

    fn swapped(&self) -> Swapped {
        let (method, previous) = match &self.slowly {
            Some(why) => (Method::FileByFile { why: why.clone() }, previous_path(&self.stage)),
            None => (Method::Exchange, self.stage.clone()),
        };
        let previous = self.was_there.then_some(previous);
        Swapped { method, stage: self.stage.clone(), live: self.live.clone(), previous }
    }
}

fn strings(all: Vec<Vec<u8>>) -> Vec<CString> {
    all.into_iter().filter_map(|b| CString::new(b).ok()).collect()
}

fn id(path: &Path) -> io::Result<Id> {
    let meta = path.symlink_metadata()?;
    Ok(Id { dev: meta.dev(), ino: meta.ino() })
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(suffix);
    path.with_file_name(name)
}

fn notes_path(stage: &Path) -> PathBuf {
    with_suffix(stage, ".switch")
}

fn previous_path(stage: &Path) -> PathBuf {
    with_suffix(stage, ".previous")
}

fn drop_notes(stage: &Path) -> Result<()> {
    let path = notes_path(stage);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("removing {}", path.display()), &e))
        }
        Ok(()) | Err(_) => files::sync_dir(files::parent(&path)),
    }
}

fn sync_both(a: &Path, b: &Path) -> Result<()> {
    files::sync_dir(files::parent(a))?;
    files::sync_dir(files::parent(b))
}

/// A directory of our own with a name that nobody has.
fn own_dir(parent: &Path) -> io::Result<PathBuf> {
    let mut bytes = [0_u8; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    let dir = parent.join(format!(".koboshi-probe-{:016x}", u64::from_ne_bytes(bytes)));
    std::fs::create_dir(&dir)?;
    Ok(dir)
}

struct Gone<'a>(&'a Path);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        // Ours alone, and at worst an empty directory stays.
        let _ = std::fs::remove_dir_all(self.0);
    }
}

/// Moves something out of the way into `quarantine_dir` (made if missing), whole, under its own name or, when that is
/// taken, with a number. Where it cannot be renamed it is copied, synced and then removed. Returns where it is now.
///
/// # Errors
/// When it cannot be kept: then it is untouched and nothing of it is left in the quarantine.
pub fn move_aside(path: &Path, quarantine_dir: &Path) -> Result<PathBuf> {
    /// As many things of one name in one quarantine.
    const TRIES: u32 = 10_000;
    let what = || format!("moving {} aside", path.display());
    let name = path.file_name().ok_or_else(|| Error::new(Kind::Usage, what(), "it has no name"))?;
    std::fs::create_dir_all(quarantine_dir).context(what)?;
    for n in 1..TRIES {
        let mut target = quarantine_dir.join(name);
        if n > 1 {
            target = with_suffix(&target, &format!(".{n}"));
        }
        let aside = || rustix::fs::renameat_with(CWD, path, CWD, &target, RenameFlags::NOREPLACE);
        match freeing(&[path], aside) {
            Ok(()) => {
                sync_both(path, &target)?;
                return Ok(target);
            }
            Err(Errno::EXIST) => {}
            Err(e) if slow(e).is_some() => {
                if target.symlink_metadata().is_ok() {
                    continue;
                }
                return carry(path, &target).map(|()| target).context(what);
            }
            Err(e) => return Err(e).context(what),
        }
    }
    Err(Error::new(Kind::System, what(), "too many of that name are in the quarantine"))
}

/// Copies to a name of our own, syncs, renames, and only then removes the original.
fn carry(path: &Path, target: &Path) -> io::Result<()> {
    let holder = own_dir(files::parent(target))?;
    let clean = Gone(&holder);
    let from = tree::open_top(files::parent(path)).or_else(|_| {
        // The directory above may itself be reached by a link; below it nothing is followed.
        std::fs::File::open(files::parent(path)).map(std::os::fd::OwnedFd::from)
    })?;
    let to = tree::open_top(&holder)?;
    let name = c_name(path)?;
    let stat = tree::look(from.as_fd(), &name)?.ok_or(io::ErrorKind::NotFound)?;
    tree::copy_tree(from.as_fd(), &name, &stat, to.as_fd(), c"kept", 0)?;
    rustix::fs::syncfs(&to)?;
    rustix::fs::renameat_with(&to, c"kept", CWD, target, RenameFlags::NOREPLACE)?;
    std::fs::File::open(files::parent(target))?.sync_all()?;
    drop(clean);
    match tree::remove_tree(from.as_fd(), &name, 0) {
        // A mount point's content is gone; the point itself stays where it is.
        Err(e) if e.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => Ok(()),
        other => other,
    }
}

fn c_name(path: &Path) -> io::Result<CString> {
    CString::new(path.file_name().unwrap_or_default().as_bytes()).map_err(io::Error::other)
}

#[cfg(test)]
mod tests;
