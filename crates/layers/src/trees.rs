//! Lists of a program and its runtime as `reach` carries them: made from a snapshot, or from what lies on disk.

use engine::Class;
use host::clock::Deadline;
use host::{Context, Error, Kind, Result};
use node::Node;
use node::roots::resolved;
use reach::words::MAX_OBJECT_BYTES;
use reach::{Entry, Manifest, Name, Thing, Tree};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use store::lend::{Held, HeldKind};
use store::{SnapshotInfo, Store};

/// Directories within directories, as `reach` bounds them too.
const MAX_DEPTH: usize = 64;

/// Where a tree lies on this host.
pub(crate) fn place(node: &Node, tree: Tree) -> PathBuf {
    match tree {
        Tree::Program => resolved(&node.package_dir),
        Tree::Runtime => resolved(node.runtime_dir.as_ref().unwrap_or(&node.node_bin)),
    }
}

/// The store's name for the tree's root.
fn root(tree: Tree) -> &'static str {
    match tree {
        Tree::Program => "program",
        Tree::Runtime => "runtime",
    }
}

/// Permission bits that a list cannot say: those of files and directories that are not simply 644 or 755.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Modes(HashMap<(Tree, Vec<u8>), u32>);

impl Modes {
    /// What an entry gets where nothing else is known.
    fn usual(thing: &Thing) -> u32 {
        match thing {
            Thing::Dir | Thing::File { exec: true, .. } => 0o755,
            Thing::File { exec: false, .. } => 0o644,
            Thing::Link { .. } => 0o777,
        }
    }

    fn note(&mut self, entry: &Entry, mode: u32) {
        // What runs as somebody else than its caller is in no program that we would make.
        let mode = mode & 0o777;
        if mode != Modes::usual(&entry.thing) && !matches!(entry.thing, Thing::Link { .. }) {
            self.0.insert((entry.tree, entry.path.clone()), mode);
        }
    }

    /// What this entry is to have in the end.
    pub(crate) fn of(&self, entry: &Entry) -> u32 {
        let own = if self.0.is_empty() { None } else { self.0.get(&(entry.tree, entry.path.clone())) };
        own.copied().unwrap_or_else(|| Modes::usual(&entry.thing))
    }

    /// The same as long as its maker must still come to it, who may be an ordinary user.
    pub(crate) fn while_made(&self, entry: &Entry) -> u32 {
        let own = match entry.thing {
            Thing::Dir => 0o700,
            Thing::File { .. } | Thing::Link { .. } => 0o600,
        };
        self.of(entry) | own
    }
}

/// What the newest trusted snapshot says of program and runtime.
#[derive(Debug, Clone)]
pub(crate) struct Remembered {
    pub(crate) info: SnapshotInfo,
    /// What two hosts with the same program agree on.
    pub(crate) list: Manifest,
    /// What is this host's own beside it: npm keeps what a package's author had, and a copy that has not is damage to
    /// whoever compares it with the snapshot.
    pub(crate) modes: Modes,
}

/// Program and runtime of the newest trusted snapshot, with its record. `None` when there is none that holds a program.
pub(crate) fn remembered(store: &Store, deadline: Deadline) -> Result<Option<Remembered>> {
    let Some(info) = store.newest_trusted(Some(Class::Program))? else { return Ok(None) };
    let (mut manifest, mut modes) = (Manifest::default(), Modes::default());
    for tree in [Tree::Program, Tree::Runtime] {
        let Some((_, held)) = store.held(&info.id, root(tree), deadline)? else { continue };
        for one in held {
            let what = || format!("listing the {} of snapshot {}", root(tree), info.id);
            let mode = one.mode;
            let entry = entry(tree, one);
            modes.note(&entry, mode);
            manifest.push(entry).map_err(|why| Error::new(Kind::Corrupt, what(), why))?;
        }
    }
    Ok(manifest.has(Tree::Program).then_some(Remembered { info, list: manifest, modes }))
}

fn entry(tree: Tree, held: Held) -> Entry {
    let thing = match held.what {
        HeldKind::Dir => Thing::Dir,
        HeldKind::File { exec, size, names } => Thing::File { exec, size, names },
        HeldKind::Link { target } => Thing::Link { target },
    };
    Entry { tree, path: held.path, thing }
}

/// Program and runtime as they lie on disk, every byte read. `working` is called for every file. What changes while it
/// is read is no list: somebody is replacing it.
pub(crate) fn live(node: &Node, working: &mut dyn FnMut(), deadline: Deadline) -> Result<Manifest> {
    let mut manifest = Manifest::default();
    for tree in [Tree::Program, Tree::Runtime] {
        let mut walk = Walk { tree, manifest: &mut manifest, working, deadline };
        walk.at(&place(node, tree), &[], 0)?;
    }
    Ok(manifest)
}

/// What can be read of one tree at `root`, and whether that was all of it.
pub(crate) fn one(tree: Tree, root: &Path, deadline: Deadline) -> (Manifest, bool) {
    let mut manifest = Manifest::default();
    let mut walk = Walk { tree, manifest: &mut manifest, working: &mut || {}, deadline };
    let whole = walk.at(root, &[], 0).is_ok();
    (manifest, whole)
}

struct Walk<'a> {
    tree: Tree,
    manifest: &'a mut Manifest,
    working: &'a mut dyn FnMut(),
    deadline: Deadline,
}

impl Walk<'_> {
    fn at(&mut self, full: &Path, path: &[u8], depth: usize) -> Result<()> {
        let what = || format!("reading {}", full.display());
        if self.deadline.passed() {
            return Err(Error::new(Kind::TimedOut, what(), "the time is over"));
        }
        (self.working)();
        let meta = full.symlink_metadata().context(what)?;
        let thing = if meta.is_dir() {
            Thing::Dir
        } else if meta.is_symlink() {
            Thing::Link { target: std::fs::read_link(full).context(what)?.into_os_string().into_vec() }
        } else if meta.is_file() {
            let (size, names) = hash(full)?;
            Thing::File { exec: meta.mode() & 0o100 != 0, size, names }
        } else {
            return Ok(());
        };
        let below = thing == Thing::Dir;
        let entry = Entry { tree: self.tree, path: path.to_vec(), thing };
        self.manifest.push(entry).map_err(|why| Error::new(Kind::Corrupt, what(), why))?;
        if !below || depth >= MAX_DEPTH {
            return Ok(());
        }
        let mut names = Vec::new();
        for found in std::fs::read_dir(full).context(what)? {
            names.push(found.context(what)?.file_name());
        }
        names.sort_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
        for name in names {
            // What a repair of ours left behind is no part of a program.
            if name.as_bytes().starts_with(b".koboshi-") {
                continue;
            }
            let mut inner = path.to_vec();
            if !inner.is_empty() {
                inner.push(b'/');
            }
            inner.extend_from_slice(name.as_bytes());
            self.at(&full.join(&name), &inner, depth + 1)?;
        }
        Ok(())
    }
}

/// Opens a regular file, never through a link in its last place, never blocking on a pipe.
pub(crate) fn open(path: &Path) -> std::io::Result<File> {
    use rustix::fs::OFlags;
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    Ok(file)
}

fn hash(path: &Path) -> Result<(u64, Vec<Name>)> {
    let what = || format!("reading {}", path.display());
    let file = open(path).context(what)?;
    let stamp = |m: &std::fs::Metadata| (m.len(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec());
    let before = file.metadata().context(what)?;
    let mut names = Vec::new();
    let mut piece = vec![0; MAX_OBJECT_BYTES];
    let mut at = 0_u64;
    while at < before.len() {
        let n = fill(&file, &mut piece, at).context(what)?;
        if n == 0 {
            break;
        }
        names.push(*blake3::hash(&piece[..n]).as_bytes());
        at += n as u64;
    }
    let after = file.metadata().context(what)?;
    if at != before.len() || stamp(&before) != stamp(&after) {
        return Err(Error::new(
            Kind::Corrupt,
            what(),
            "it changes while it is read: somebody is replacing the program",
        ));
    }
    Ok((at, names))
}

/// Reads until the piece is full or the file ends.
pub(crate) fn fill(file: &File, piece: &mut [u8], at: u64) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < piece.len() {
        match file.read_at(&mut piece[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

/// A piece of a file, if it is the one of this name.
pub(crate) fn piece(file: &File, at: u64, length: usize, name: &Name) -> Option<Vec<u8>> {
    let mut bytes = vec![0; length];
    let n = fill(file, &mut bytes, at).ok()?;
    (n == length && blake3::hash(&bytes).as_bytes() == name).then_some(bytes)
}

/// `gnu` or `musl`, by the interpreter that a Linux program asks for; what cannot be read is what this binary is.
pub(crate) fn libc(binary: &Path) -> &'static str {
    /// The interpreter's name lies within the first page of every program that asks for one.
    const HEAD_BYTES: usize = 4096;
    let mut head = vec![0; HEAD_BYTES];
    let n = std::fs::File::open(binary).and_then(|f| fill(&f, &mut head, 0)).unwrap_or(0);
    let says = |text: &[u8]| head[..n].windows(text.len()).any(|w| w == text);
    if says(b"/ld-musl") {
        "musl"
    } else if says(b"/ld-linux") || cfg!(target_env = "gnu") {
        "gnu"
    } else {
        "musl"
    }
}
