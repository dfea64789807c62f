//! The bytes that only a living gateway's open descriptors still hold: saved before its end, put back after it, and found
//! again by the next try if this one is killed in between.

use super::Choice;
use crate::beside::Beside;
use crate::{Bench, Report};
use engine::Class;
use host::{Context, Error, Kind, Result};
use node::roots::resolved;
use node::salvage;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A database rescued from a living gateway: where its bytes lie now, and where they belong.
pub(super) struct Saved {
    pub(super) copy: PathBuf,
    pub(super) live: PathBuf,
}

/// Where a rescued database belongs is written beside it, until it is back there: the work may be killed in between, and
/// the next try must not take a snapshot's older bytes instead.
pub(super) const BELONGS: &str = ".belongs";
/// What that note is called once it is back there. In this incident it stays newer than every snapshot: should the database
/// go again, it comes from here.
pub(super) const PLACED: &str = ".placed";
/// A path.
const BELONGS_LIMIT_BYTES: u64 = 8 << 10;
/// Rescues within one incident.
const MAX_RESCUES: u32 = 1_000;

/// Saves what only the gateway's open descriptors still hold. An error refuses the repair: the gateway's end would be
/// the end of these bytes.
pub(super) fn save_open_databases(
    bench: &Bench<'_>,
    choice: &Choice,
    report: &mut Report,
) -> Result<Vec<Saved>> {
    let concerned = choice.agents
        || choice.missing.contains(&Class::State)
        || choice.missing.contains(&Class::Sessions)
        || !choice.databases.is_empty();
    let Some(gateway) = bench.node.gateway().filter(|_| concerned) else {
        return Ok(Vec::new());
    };
    // A directory of its own each time: what an earlier try saved is never written over.
    let rescued = bench.quarantine.join("salvaged");
    let to = (1..MAX_RESCUES)
        .map(|n| rescued.join(n.to_string()))
        .find(|to| to.symlink_metadata().is_err())
        .unwrap_or_else(|| rescued.join("last"));
    let found = match salvage::from_open_files(bench.node, gateway, &to) {
        Ok(found) => found,
        // It ended by itself meanwhile, or is not ours to look into: stopping it takes nothing away.
        Err(e) if matches!(e.kind, Kind::NotFound | Kind::Denied) => {
            report.could_not(format!("{e}"));
            return Ok(Vec::new());
        }
        Err(e) => return Err(e.hint("the gateway is left running: it holds the only copy of these bytes")),
    };
    for file in not_folded(&to) {
        report.could_not(format!(
            "the newest rows of a deleted database could not be read; its bytes and its log lie in {}",
            file.display()
        ));
    }
    let mut saved = Vec::new();
    for one in found {
        if one.identity.is_none() && one.original == resolved(&bench.node.state_db()) {
            report.could_not(format!("{} was saved, but holds no identity", one.file.display()));
            continue;
        }
        let note = beside(&one.file, BELONGS);
        host::files::write_atomic(&note, one.original.as_os_str().as_bytes(), 0o600)?;
        report.did(format!("saved {} from the gateway's open files", one.original.display()));
        saved.push(Saved { copy: one.file, live: one.original });
    }
    Ok(saved)
}

/// Main files that were kept as they were because no log would fold into them.
pub(super) fn not_folded(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let mut raw: Vec<PathBuf> = entries.filter(|p| p.extension().is_some_and(|e| e == "damaged")).collect();
    raw.sort();
    raw
}

/// What an earlier try of this incident had saved and what is not there: because the try was killed before it was put back,
/// or because it was deleted again. The newest of each.
pub(super) fn left_by_an_earlier_try(
    bench: &Bench<'_>,
    choice: &Choice,
    saved: &[Saved],
) -> Result<Vec<Saved>> {
    let mut notes: Vec<(std::time::SystemTime, PathBuf)> = Vec::new();
    for dir in std::fs::read_dir(bench.quarantine.join("salvaged")).into_iter().flatten().flatten() {
        for file in std::fs::read_dir(dir.path()).into_iter().flatten().flatten() {
            let is = |suffix: &str| file.file_name().as_bytes().ends_with(suffix.as_bytes());
            if is(BELONGS) || is(PLACED) {
                let written = file.metadata().and_then(|m| m.modified());
                notes.push((written.unwrap_or(std::time::UNIX_EPOCH), file.path()));
            }
        }
    }
    notes.sort();
    let mut left: Vec<Saved> = Vec::new();
    for (_, note) in notes.into_iter().rev() {
        let bytes = host::files::read_bounded(&note, BELONGS_LIMIT_BYTES)?;
        let live = PathBuf::from(std::ffi::OsStr::from_bytes(&bytes));
        let copy = note.with_extension("");
        let wanted = choice.databases.contains(&live)
            || choice.agents
            || choice.missing.contains(&Class::State)
            || choice.missing.contains(&Class::Sessions);
        let placed = note.as_os_str().as_bytes().ends_with(PLACED.as_bytes());
        if placed && live.symlink_metadata().is_ok() {
            continue;
        }
        let known = saved.iter().chain(&left).any(|s| s.live == live || s.copy == copy);
        if wanted && !known && copy.is_file() && live.starts_with(resolved(&bench.node.state_dir)) {
            left.push(Saved { copy, live });
        }
    }
    Ok(left)
}

pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Puts a kept file back where it was.
pub(crate) fn bring_back(bench: &Bench<'_>, copy: &Path, live: &Path, report: &mut Report) -> Result<()> {
    let live = live
        .parent()
        .zip(live.file_name())
        .map_or_else(|| live.to_owned(), |(dir, name)| resolved(dir).join(name));
    put_back(bench, &Saved { copy: copy.to_owned(), live }, report)
}

/// Puts a rescued database where it was. The copy stays in the quarantine, and so does what the ending gateway may have
/// made anew in its place: main file, `-wal` and `-shm` always move as one set.
pub(super) fn put_back(bench: &Bench<'_>, saved: &Saved, report: &mut Report) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let what = || format!("put {} back", saved.live.display());
    let dir = saved.live.parent().ok_or_else(|| Error::new(Kind::System, what(), "it has no directory"))?;
    let top = make_dirs(&resolved(&bench.node.state_dir), dir).context(what)?;
    let meta = std::fs::File::from(rustix::io::dup(&top).context(what)?).metadata().context(what)?;
    let name = saved.live.file_name().unwrap_or_default();
    let tmp = format!(".koboshi-{}-{}", std::process::id(), host::clock::now().ms);
    let mut new = Beside::write(top, tmp, Some((meta.uid(), meta.gid())), 0o600, |file| {
        std::io::copy(&mut std::fs::File::open(&saved.copy)?, file).map(drop)
    })
    .context(what)?;
    let aside = bench.quarantine.join("made-anew");
    for suffix in ["-shm", "-wal", ""] {
        let path = beside(&saved.live, suffix);
        if path.symlink_metadata().is_ok() {
            std::fs::create_dir_all(&aside).context(what)?;
            host::exchange::move_aside(&path, &aside)?;
        }
    }
    new.take(name).context(what)?;
    new.sync().context(what)?;
    // A copy that has no note is no rescued one, and a note that stays one of something not put back does no harm.
    let _ = std::fs::rename(beside(&saved.copy, BELONGS), beside(&saved.copy, PLACED));
    report.did(format!("{} is back with everything that was written to it", saved.live.display()));
    Ok(())
}

/// Opens `dir`, which lies below `top`, making what is missing of the way as `top`'s owner; follows no link below it.
fn make_dirs(top: &Path, dir: &Path) -> std::io::Result<std::os::fd::OwnedFd> {
    use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut at = match rustix::fs::open(top, flags, Mode::empty()) {
        Err(rustix::io::Errno::NOENT) => {
            // All of it is gone; the directory above says whose it is.
            use std::os::unix::fs::MetadataExt;
            rustix::fs::mkdir(top, Mode::RWXU)?;
            let made = rustix::fs::open(top, flags | OFlags::NOFOLLOW, Mode::empty())?;
            let above = std::fs::metadata(top.parent().unwrap_or(top))?;
            std::os::unix::fs::fchown(&made, Some(above.uid()), Some(above.gid()))?;
            made
        }
        other => other?,
    };
    let owner = rustix::fs::fstat(&at)?;
    let below = dir.strip_prefix(top).map_err(std::io::Error::other)?;
    for part in below.components() {
        let std::path::Component::Normal(part) = part else {
            return Err(std::io::Error::other("its path is not a plain one"));
        };
        let made = match rustix::fs::mkdirat(&at, part, Mode::RWXU) {
            Ok(()) => true,
            Err(rustix::io::Errno::EXIST) => false,
            Err(e) => return Err(e.into()),
        };
        let next = rustix::fs::openat(&at, part, flags | OFlags::NOFOLLOW, Mode::empty())?;
        if made {
            let (uid, gid) = (Uid::from_raw(owner.st_uid), Gid::from_raw(owner.st_gid));
            rustix::fs::chownat(&next, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
        }
        at = next;
    }
    Ok(at)
}
