//! Letting a quarantine shrink again, by rules that lose no user byte.

use crate::beneath::{DIR, Stat};
use crate::content::late;
use crate::key::{Domain, Name};
use crate::layout::Layout;
use crate::pack::{ObjectReader, Objects};
use crate::quarantine::remove_tree;
use crate::tree::{CHUNK_BYTES, DATABASE_CHUNK_BYTES};
use engine::words::Class;
use host::clock::Deadline;
use host::{Context, Result};
use rustix::fs::Mode;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

const DAY_SECONDS: i64 = 24 * 3600;

/// One root within one incident.
struct Part {
    path: std::path::PathBuf,
    age_key: i64,
    bytes: u64,
}

pub(crate) fn run(
    layout: &Layout,
    quarantine: &Path,
    limit_bytes: u64,
    keep_days: u32,
    deadline: Deadline,
) -> Result<u64> {
    let (heads, _) = layout.heads()?;
    let classes = classes(&heads);
    let (mut ours, mut users) = (Vec::new(), Vec::new());
    let mut total = 0;
    for incident in entries(quarantine)? {
        for path in entries(&incident)? {
            let bytes = tree_bytes(&path, deadline)?;
            let meta = path.symlink_metadata().context(|| format!("looking at {}", path.display()))?;
            // Entering the quarantine is a rename, which the change time records and no one can set back.
            let age_key = std::os::unix::fs::MetadataExt::ctime(&meta);
            total += bytes;
            let part = Part { path, age_key, bytes };
            match class_of(&classes, &part.path) {
                Some(c) if c.converges() => ours.push(part),
                Some(_) | None => users.push(part),
            }
        }
    }
    let mut freed = 0;
    ours.sort_by_key(|p| p.age_key);
    for part in ours {
        if total - freed <= limit_bytes {
            break;
        }
        remove(&part.path)?;
        freed += part.bytes;
    }
    let now = host::clock::wall().as_second();
    users.retain(|p| now - p.age_key > i64::from(keep_days) * DAY_SECONDS);
    if !users.is_empty() {
        let objects = Objects::load(&layout.packs(), &layout.key)?;
        let names = trusted_names(layout, &heads, deadline)?;
        let mut known = Known { names, reader: ObjectReader::new(&objects, &layout.key), buffer: Vec::new() };
        for part in users {
            freed += remove_known(layout, &part.path, &mut known, deadline)?;
        }
    }
    for incident in entries(quarantine)? {
        // Fails while anything is left in it, which is the point.
        let _ = std::fs::remove_dir(&incident);
    }
    Ok(freed)
}

/// Programs and runtimes of all incidents but one.
pub(crate) fn programs(layout: &Layout, quarantine: &Path, except: &str, deadline: Deadline) -> Result<u64> {
    let (heads, _) = layout.heads()?;
    let classes = classes(&heads);
    let mut freed = 0;
    for incident in entries(quarantine)?.into_iter().filter(|path| !path.ends_with(except)) {
        for path in entries(&incident)? {
            if matches!(class_of(&classes, &path), Some(Class::Program | Class::Runtime)) {
                let bytes = tree_bytes(&path, deadline)?;
                remove(&path)?;
                freed += bytes;
            }
        }
        // Fails while anything is left in it, which is the point.
        let _ = std::fs::remove_dir(&incident);
    }
    Ok(freed)
}

fn classes(heads: &[crate::layout::Head]) -> BTreeMap<String, Class> {
    heads.iter().flat_map(|h| &h.info.roots).map(|root| (root.name.clone(), root.class)).collect()
}

/// `program.~1~` is a second `program`; a name no snapshot knows counts as the user's.
fn class_of(classes: &BTreeMap<String, Class>, part: &Path) -> Option<Class> {
    let name = part.file_name()?.to_string_lossy().into_owned();
    classes.get(name.split(".~").next().unwrap_or(&name)).copied()
}

fn entries(dir: &Path) -> Result<Vec<std::path::PathBuf>> {
    let list = match std::fs::read_dir(dir) {
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        other => other.context(|| format!("listing {}", dir.display()))?,
    };
    let mut paths = Vec::new();
    for entry in list {
        paths.push(entry.context(|| format!("listing {}", dir.display()))?.path());
    }
    paths.sort();
    Ok(paths)
}

fn tree_bytes(path: &Path, deadline: Deadline) -> Result<u64> {
    let mut total = 0;
    let mut left = vec![path.to_owned()];
    while let Some(path) = left.pop() {
        if deadline.passed() {
            return Err(late("measuring the quarantine"));
        }
        let meta = path.symlink_metadata().context(|| format!("looking at {}", path.display()))?;
        if meta.is_dir() {
            left.extend(entries(&path)?);
        } else {
            total += std::os::unix::fs::MetadataExt::blocks(&meta) * 512;
        }
    }
    Ok(total)
}

fn remove(path: &Path) -> Result<()> {
    let what = || format!("removing {}", path.display());
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let dir = rustix::fs::open(parent, DIR, Mode::empty()).context(what)?;
    remove_tree(dir.as_fd(), name.as_bytes()).context(what)
}

fn trusted_names(
    layout: &Layout,
    heads: &[crate::layout::Head],
    deadline: Deadline,
) -> Result<HashSet<Name>> {
    let mut names = HashSet::new();
    let mut seen = HashSet::new();
    for head in heads.iter().filter(|h| h.info.trust.trusted()) {
        for reference in head.trees.iter().filter(|t| !t.root.class.converges()) {
            if !seen.insert(reference.tree.clone()) {
                continue;
            }
            let mut tree = layout.tree(reference)?;
            while let Some(entry) = tree.next()? {
                if deadline.passed() {
                    return Err(late("reading manifests"));
                }
                names.extend(entry.runs.iter().map(|r| r.name));
            }
        }
    }
    Ok(names)
}

/// What trusted snapshots hold: a name in a manifest is a promise, the object itself is the proof.
struct Known<'a> {
    names: HashSet<Name>,
    reader: ObjectReader<'a>,
    buffer: Vec<u8>,
}

impl Known<'_> {
    fn holds(&mut self, name: &Name) -> bool {
        self.buffer.clear();
        self.names.contains(name) && self.reader.read(name, Domain::Keyed, &mut self.buffer).is_ok()
    }
}

/// Removes the files of which every byte is in a trusted snapshot; the others stay.
fn remove_known(layout: &Layout, path: &Path, known: &mut Known<'_>, deadline: Deadline) -> Result<u64> {
    let meta = path.symlink_metadata().context(|| format!("looking at {}", path.display()))?;
    let mut freed = 0;
    if meta.is_dir() {
        for child in entries(path)? {
            freed += remove_known(layout, &child, known, deadline)?;
        }
        let _ = std::fs::remove_dir(path);
        return Ok(freed);
    }
    if meta.is_file() && is_known(layout, path, known, deadline)? {
        let s = Stat::at(rustix::fs::CWD, path.as_os_str().as_bytes())
            .context(|| format!("looking at {}", path.display()))?;
        remove(path)?;
        freed += s.blocks * 512;
    }
    Ok(freed)
}

fn is_known(layout: &Layout, path: &Path, known: &mut Known<'_>, deadline: Deadline) -> Result<bool> {
    let what = || format!("reading {}", path.display());
    let file = File::open(path).context(what)?;
    let size = file.metadata().context(what)?.len();
    for chunk in [CHUNK_BYTES, DATABASE_CHUNK_BYTES] {
        let mut buffer = vec![0; chunk as usize];
        let (mut at, mut all) = (0u64, true);
        while at < size && all {
            if deadline.passed() {
                return Err(late("reading the quarantine"));
            }
            let want = usize::try_from((size - at).min(u64::from(chunk))).unwrap_or(0);
            file.read_exact_at(&mut buffer[..want], at).context(what)?;
            all = known.holds(&layout.key.name(Domain::Keyed, &buffer[..want]));
            at += want as u64;
        }
        if all {
            return Ok(true);
        }
    }
    Ok(false)
}
