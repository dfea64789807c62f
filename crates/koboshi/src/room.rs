//! Room on a full disk. OpenClaw does not start on one, and nobody is there to make some: so koboshi keeps a reserve, and
//! gives it and everything else that costs nobody anything before a climb tries its layers.
//!
//! In this order, and only as much as is wanted: the spare, what was put aside of the program, caches and logs of the node,
//! older snapshots, the reserve. Nothing of the user's is ever touched.

use crate::places::Places;
use crate::{spare, step};
use host::clock::Deadline;
use host::user::as_user;
use host::{Context, Result, files};
use node::Node;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Enough for a start, its databases' logs and some hours of logging.
const RESERVE_BYTES: u64 = 64 << 20;
/// Less than this is no disk to start on.
const TIGHT_BYTES: u64 = 48 << 20;
/// What is to be free afterwards, if it can be had.
const WANTED_BYTES: u64 = 256 << 20;
/// The same of inodes: a start makes some dozens of files.
const TIGHT_INODES: u64 = 256;
const WANTED_INODES: u64 = 8_192;
/// A disk on which the reserve would be more than this part of what is free has no room for one.
const RESERVE_SHARE: u64 = 8;
/// Where a write may fail although so much is said to be free: ext4 keeps 16 MB of clusters for itself.
const DOUBTFUL_BYTES: u64 = 32 << 20;
/// What the step that makes room needs to be asked, and the journal to say so.
const PROBE_BYTES: usize = 256 << 10;

/// Where the reserve lies: on the file system of the node's state, in a directory of koboshi's own.
fn reserve(node: &Node, places: &Places) -> Option<PathBuf> {
    let wanted = device(&node.state_dir)?;
    let candidates = [places.reserve(), node.prefix.join("lib/.koboshi-reserve")];
    candidates
        .into_iter()
        .find(|path| path.parent().is_some_and(Path::is_dir) && device(path) == Some(wanted))
}

/// The file system of a path, or of its nearest directory that is there.
fn device(path: &Path) -> Option<u64> {
    path.ancestors().find_map(|p| std::fs::metadata(p).ok()).map(|m| m.dev())
}

/// Bytes and inodes that the node's user may still take.
fn free(path: &Path, node: &Node) -> (u64, u64) {
    // What cannot be asked is not full.
    files::free(path).map_or((u64::MAX, u64::MAX), |space| (space.for_user(node.ids.uid), space.free_inodes))
}

/// With the rights of whoever owns the directory: through one of the node's user's leads no way that is not his.
fn as_owner<T: Send>(node: &Node, dir: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let users = std::fs::metadata(dir).is_ok_and(|m| m.uid() == node.ids.uid);
    if users { as_user(node.ids, work) } else { work() }
}

/// Lays the reserve by where there is room for it. One line when it is new.
pub fn keep_reserve(node: &Node, places: &Places) -> Result<Option<String>> {
    let Some(path) = reserve(node, places) else { return Ok(None) };
    let there = path.symlink_metadata().map_or(0, |m| m.len());
    if there >= RESERVE_BYTES || files::free(&path)?.user_bytes / RESERVE_SHARE < RESERVE_BYTES {
        return Ok(None);
    }
    let what = || format!("lay a reserve by in {}", path.display());
    as_owner(node, path.parent().unwrap_or(&path), || {
        let _ = std::fs::remove_file(&path);
        let file = std::fs::OpenOptions::new().write(true).create_new(true).open(&path).context(what)?;
        let laid = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, RESERVE_BYTES);
        if let Err(e) = laid {
            // Half of one would be taken for a whole one; a file system without the call (ZFS) has none.
            let _ = std::fs::remove_file(&path);
            return if e == rustix::io::Errno::OPNOTSUPP { Ok(None) } else { Err(e).context(what) };
        }
        Ok(Some(format!("a reserve of {} MB is laid by for a full disk", RESERVE_BYTES >> 20)))
    })
}

fn remove(node: &Node, reserve: &Path) -> Result<()> {
    as_owner(node, reserve.parent().unwrap_or(reserve), || match std::fs::remove_file(reserve) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).context(|| format!("remove {}", reserve.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    })
}

/// Removes it.
pub fn remove_reserve(node: &Node, places: &Places) {
    for path in [places.reserve(), node.prefix.join("lib/.koboshi-reserve")] {
        let _ = remove(node, &path);
    }
}

/// Gives the reserve where nothing at all can be written any more, not even what would make room. Whether it was there.
pub fn give_reserve(node: &Node, places: &Places) -> bool {
    let doubtful = |dir: &&PathBuf| files::free(dir).is_ok_and(|space| space.free_bytes < DOUBTFUL_BYTES);
    let full = |dir: &PathBuf| {
        let probe = dir.join("room-probe");
        let written = std::fs::write(&probe, vec![0; PROBE_BYTES]);
        let _ = std::fs::remove_file(&probe);
        written.is_err_and(|e| e.kind() == std::io::ErrorKind::StorageFull)
    };
    let Some(path) = reserve(node, places).filter(|path| path.exists()) else { return false };
    // On another file system it would be given for nothing.
    let beside = |dir: &&PathBuf| device(dir) == device(&path);
    [&places.state_dir, &places.run_dir].into_iter().filter(beside).filter(doubtful).any(full)
        && remove(node, &path).is_ok()
}

/// Makes room on each file system that the node needs and that has none. One line for each thing that went.
/// The reserve is for a node that is down; what the open incident has put aside is its own.
pub fn make(
    node: &Node,
    places: &Places,
    with_reserve: bool,
    incident: Option<u64>,
    deadline: Deadline,
) -> Vec<String> {
    let mut done = Vec::new();
    let mut seen = Vec::new();
    for place in [&node.state_dir, &node.package_dir, &PathBuf::from("/tmp"), &places.state_dir] {
        let at = device(place);
        let (bytes, inodes) = free(place, node);
        if seen.contains(&at) || bytes >= TIGHT_BYTES && inodes >= TIGHT_INODES {
            continue;
        }
        seen.push(at);
        for (what, path, give) in sources(node, places, with_reserve, incident, deadline) {
            let (bytes, inodes) = free(place, node);
            if bytes >= WANTED_BYTES && inodes >= WANTED_INODES || deadline.passed() {
                break;
            }
            if device(&path) != at {
                continue;
            }
            let given = give();
            let (bytes_now, inodes_now) = free(place, node);
            let (freed, names) = (bytes_now.saturating_sub(bytes), inodes_now.saturating_sub(inodes));
            match given {
                Ok(()) if freed == 0 && names == 0 => {}
                Ok(()) => done.push(format!("{what} gave {} KB and {names} inodes of room", freed >> 10)),
                Err(e) => done.push(format!("{what}: {e}")),
            }
        }
    }
    done
}

type Source<'a> = (String, PathBuf, Box<dyn Fn() -> Result<()> + 'a>);

fn sources<'a>(
    node: &'a Node,
    places: &'a Places,
    with_reserve: bool,
    incident: Option<u64>,
    deadline: Deadline,
) -> Vec<Source<'a>> {
    let mut all: Vec<Source<'a>> = vec![
        ("the spare".into(), node.prefix.join("lib"), Box::new(|| spare::remove(node))),
        (
            "what was put aside of the program".into(),
            places.quarantine(),
            Box::new(move || {
                let Some(store) = step::open_store(places)? else { return Ok(()) };
                let open = incident.map(|id| format!("{id:08}")).unwrap_or_default();
                store::drop_programs(&places.quarantine(), &store, &open, deadline).map(drop)
            }),
        ),
    ];
    all.extend(layers::room::spares(node).into_iter().map(|spare| {
        let (what, path) = (format!("{} in {}", spare.what, spare.path.display()), spare.path.clone());
        let give: Box<dyn Fn() -> Result<()>> = Box::new(move || layers::room::free(node, &spare));
        (what, path, give)
    }));
    all.push((
        "older snapshots".into(),
        places.store(),
        Box::new(move || match step::open_store(places)? {
            Some(store) => store.prune(0, deadline).map(drop),
            None => Ok(()),
        }),
    ));
    all.extend(reserve(node, places).filter(|_| with_reserve).map(|path| -> Source<'a> {
        let file = path.clone();
        let give = move || remove(node, &file);
        ("the reserve".into(), path, Box::new(give))
    }));
    all
}
