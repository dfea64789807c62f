//! A tree being made beside the live one, piece by piece, out of whatever proves itself.
//!
//! It lies in a directory of ours (`.koboshi-peer`, 0700) on the file system of the tree that it will replace, and is
//! reached through that directory's descriptor only, without following any link: the neighbourhood may belong to a user
//! who plants some. What was proven once stays when a donor fails or this process is killed, and is found again.

use crate::trees::{self, Modes};
use host::clock::Deadline;
use host::{Context, Error, Kind, Result};
use reach::words::MAX_OBJECT_BYTES;
use reach::{Entry, Manifest, Name, Thing, Tree};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid};
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use store::lend::ShelfReader;

/// Our directory beside what is replaced.
pub(super) const DIR: &str = ".koboshi-peer";

/// Where pieces are looked for before anybody is asked.
pub(super) struct Near<'a> {
    /// The live tree and what was read of it.
    pub(super) live: (&'a Path, &'a Manifest),
    /// A ready tree beside it.
    pub(super) spare: Option<&'a Path>,
    /// The store.
    pub(super) shelf: Option<ShelfReader<'a>>,
}

/// One tree on its way.
pub(super) struct Stage {
    dir: OwnedFd,
    path: PathBuf,
    top: &'static str,
    goal: Manifest,
    modes: Modes,
    owner: Option<(Uid, Gid)>,
    /// What is still missing: piece → the places it belongs to.
    want: HashMap<Name, Vec<(usize, u64)>>,
    /// The same in the order of the list, for asking.
    order: Vec<Name>,
    /// Pieces that an entry still lacks.
    lacks: BTreeMap<usize, usize>,
    /// Pieces that were here already.
    pub(super) near: u64,
}

const BENEATH: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

impl Stage {
    /// Where the tree of this list will stand until it is exchanged for `live`.
    pub(super) fn dir_for(tree: Tree, live: &Path) -> PathBuf {
        let beside = live.parent().unwrap_or(Path::new("/"));
        match tree {
            // One further up: what lies among npm's packages, npm takes for a package.
            Tree::Program => beside.parent().unwrap_or(beside).join(DIR),
            Tree::Runtime => beside.join(DIR),
        }
    }

    /// The staged tree itself.
    pub(super) fn staged(tree: Tree, live: &Path) -> PathBuf {
        Stage::dir_for(tree, live).join(top(tree))
    }

    /// Makes the stage of `goal` (entries of one tree) and takes over what an earlier try left there. `modes` is what
    /// this host knows of it beyond that list.
    pub(super) fn open(
        tree: Tree,
        goal: Manifest,
        modes: Modes,
        live: &Path,
        deadline: Deadline,
    ) -> Result<Stage> {
        let path = Stage::dir_for(tree, live);
        let what = || format!("making the stage {}", path.display());
        let owner = make_parents(live)?;
        host::files::make_private_dir(&path)?;
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
        let dir = rustix::fs::open(&path, flags, Mode::empty()).context(what)?;
        let meta = rustix::fs::fstat(&dir).context(what)?;
        if meta.st_uid != rustix::process::geteuid().as_raw() {
            return Err(Error::new(Kind::Denied, what(), "somebody else made it"));
        }
        let mut stage = Stage {
            dir,
            path,
            top: top(tree),
            goal,
            modes,
            owner,
            want: HashMap::new(),
            order: Vec::new(),
            lacks: BTreeMap::new(),
            near: 0,
        };
        stage.drop_strangers(tree, deadline)?;
        Ok(stage)
    }

    /// The stage by way of its descriptor: whatever becomes of the names above, this is ours.
    fn through(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.dir.as_raw_fd())).join(self.top)
    }

    fn below(&self, path: &[u8]) -> Vec<u8> {
        if path.is_empty() {
            self.top.as_bytes().to_vec()
        } else {
            [self.top.as_bytes(), b"/", path].concat()
        }
    }

    fn parent(&self, path: &[u8]) -> std::io::Result<(OwnedFd, Vec<u8>)> {
        let full = self.below(path);
        let (above, name) = match full.iter().rposition(|c| *c == b'/') {
            Some(at) => (&full[..at], full[at + 1..].to_vec()),
            None => (b".".as_slice(), full.clone()),
        };
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::PATH;
        Ok((rustix::fs::openat2(&self.dir, above, flags, Mode::empty(), BENEATH)?, name))
    }

    fn file(&self, path: &[u8]) -> std::io::Result<File> {
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let own = Mode::from_raw_mode(0o600);
        let open = || rustix::fs::openat2(&self.dir, self.below(path), flags, own, BENEATH);
        let fd = match open() {
            // One that an earlier try had finished, and that is closed to its own owner.
            Err(rustix::io::Errno::ACCESS) => {
                let (above, name) = self.parent(path)?;
                rustix::fs::chmodat(&above, &name, own, AtFlags::empty())?;
                open()?
            }
            other => other?,
        };
        Ok(File::from(fd))
    }

    /// Removes what an earlier try left and the goal does not want so.
    fn drop_strangers(&mut self, tree: Tree, deadline: Deadline) -> Result<()> {
        let what = || format!("looking at what an earlier try left in {}", self.path.display());
        let (left, whole) = trees::one(tree, &self.through(), deadline);
        if !whole && self.through().symlink_metadata().is_ok() {
            // Something in it that no program has, or cannot be read: begun anew.
            remove_all(&self.through()).context(what)?;
            return Ok(());
        }
        let wanted: HashMap<&[u8], &Thing> =
            self.goal.entries().iter().map(|e| (e.path.as_slice(), &e.thing)).collect();
        let mut gone: Option<Vec<u8>> = None;
        for entry in left.entries() {
            let under = gone
                .as_ref()
                .is_some_and(|g| entry.path.starts_with(g) && entry.path.get(g.len()) == Some(&b'/'));
            let fits = match (wanted.get(entry.path.as_slice()), &entry.thing) {
                // Half of a large file is half of it proven already.
                (Some(Thing::File { .. }), Thing::File { .. }) => true,
                (wanted, thing) => wanted == Some(&thing),
            };
            if under || fits {
                continue;
            }
            let full = match entry.path.as_slice() {
                [] => self.through(),
                path => self.through().join(OsStr::from_bytes(path)),
            };
            remove_all(&full).context(what)?;
            if entry.path.is_empty() {
                return Ok(());
            }
            gone = Some(entry.path.clone());
        }
        Ok(())
    }

    /// Makes everything that can be made of what is near. What is missing afterwards is in [`Stage::missing`].
    pub(super) fn fill(&mut self, near: &mut Near<'_>, deadline: Deadline) -> Result<()> {
        let what = || format!("filling the stage {}", self.path.display());
        let held: HashMap<Name, (&Entry, u64)> = near
            .live
            .1
            .entries()
            .iter()
            .flat_map(|e| e.pieces().enumerate().map(move |(n, (name, _))| (name, (e, n as u64))))
            .collect();
        let goal = std::mem::take(&mut self.goal);
        for (index, entry) in goal.entries().iter().enumerate() {
            if deadline.passed() {
                self.goal = goal;
                return Err(Error::new(Kind::TimedOut, what(), "the time is over"));
            }
            match &entry.thing {
                Thing::Dir => self.make_dir(entry).context(what)?,
                Thing::Link { target } => self.make_link(&entry.path, target).context(what)?,
                Thing::File { .. } => {
                    let file = self.file(&entry.path).context(what)?;
                    let has = file.metadata().context(what)?.len();
                    let mut lacks = 0;
                    for (n, (name, length)) in entry.pieces().enumerate() {
                        let at = n as u64 * MAX_OBJECT_BYTES as u64;
                        if has >= at + length as u64 && trees::piece(&file, at, length, &name).is_some() {
                            self.near += 1;
                            continue;
                        }
                        match look_near(near, &held, entry, at, length, &name) {
                            Some(bytes) => {
                                file.write_all_at(&bytes, at).context(what)?;
                                self.near += 1;
                            }
                            None => {
                                let places = self.want.entry(name).or_default();
                                if places.is_empty() {
                                    self.order.push(name);
                                }
                                places.push((index, at));
                                lacks += 1;
                            }
                        }
                    }
                    if lacks > 0 {
                        self.lacks.insert(index, lacks);
                    } else {
                        self.finish(&file, entry).context(what)?;
                    }
                }
            }
        }
        self.goal = goal;
        Ok(())
    }

    fn make_dir(&self, entry: &Entry) -> std::io::Result<()> {
        let (above, name) = self.parent(&entry.path)?;
        match rustix::fs::mkdirat(&above, &name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
        let dir = rustix::fs::openat2(&above, &name, flags, Mode::empty(), BENEATH)?;
        rustix::fs::fchmod(&dir, Mode::from_raw_mode(self.modes.while_made(entry)))?;
        self.give(dir.as_fd())
    }

    fn make_link(&self, path: &[u8], target: &[u8]) -> std::io::Result<()> {
        let (above, name) = self.parent(path)?;
        match rustix::fs::symlinkat(target, &above, &name) {
            // What differed was removed before; what is there is this link.
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        if let Some((uid, gid)) = self.owner {
            rustix::fs::chownat(&above, &name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }

    fn give(&self, fd: std::os::fd::BorrowedFd<'_>) -> std::io::Result<()> {
        if let Some((uid, gid)) = self.owner {
            rustix::fs::fchown(fd, Some(uid), Some(gid))?;
        }
        Ok(())
    }

    fn finish(&self, file: &File, entry: &Entry) -> std::io::Result<()> {
        let Thing::File { size, .. } = &entry.thing else { return Ok(()) };
        file.set_len(*size)?;
        rustix::fs::fchmod(file, Mode::from_raw_mode(self.modes.while_made(entry)))?;
        self.give(file.as_fd())
    }

    /// Pieces that are nowhere near, in the order in which they are best asked for.
    pub(super) fn missing(&self) -> Vec<Name> {
        self.order.iter().filter(|n| self.want.contains_key(*n)).copied().collect()
    }

    /// Puts a proven piece wherever it belongs.
    pub(super) fn put(&mut self, name: &Name, bytes: &[u8]) -> Result<()> {
        let what = || format!("filling the stage {}", self.path.display());
        let Some(places) = self.want.get(name).cloned() else { return Ok(()) };
        for (index, at) in places {
            let Some(entry) = self.goal.entries().get(index) else { continue };
            let file = self.file(&entry.path).context(what)?;
            file.write_all_at(bytes, at).context(what)?;
            let lacks = self.lacks.entry(index).or_insert(1);
            *lacks = lacks.saturating_sub(1);
            if *lacks == 0 {
                self.finish(&file, entry).context(what)?;
            }
        }
        self.want.remove(name);
        Ok(())
    }

    /// Reads the whole stage again, makes it durable, and says whether it is what the list says, no more and no less.
    pub(super) fn prove(&self, tree: Tree, deadline: Deadline) -> Result<()> {
        let what = || format!("proving the stage {}", self.path.display());
        rustix::fs::syncfs(&self.dir).context(what)?;
        let (staged, whole) = trees::one(tree, &self.through(), deadline);
        if !whole || staged.digest() != self.goal.digest() {
            return Err(Error::new(Kind::Corrupt, what(), "what lies there is not what was put there"));
        }
        self.close().context(what)
    }

    /// Gives every entry exactly the mode that this host remembers of it, the inner ones first.
    fn close(&self) -> std::io::Result<()> {
        let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::RDONLY;
        for entry in self.goal.entries().iter().rev() {
            let mode = self.modes.of(entry);
            if mode == self.modes.while_made(entry) || matches!(entry.thing, Thing::Link { .. }) {
                continue;
            }
            let fd = rustix::fs::openat2(&self.dir, self.below(&entry.path), flags, Mode::empty(), BENEATH)?;
            rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode))?;
        }
        Ok(())
    }
}

fn top(tree: Tree) -> &'static str {
    match tree {
        Tree::Program => "program",
        Tree::Runtime => "runtime",
    }
}

fn look_near(
    near: &mut Near<'_>,
    held: &HashMap<Name, (&Entry, u64)>,
    entry: &Entry,
    at: u64,
    length: usize,
    name: &Name,
) -> Option<Vec<u8>> {
    let join = |root: &Path, path: &[u8]| {
        if path.is_empty() { root.to_owned() } else { root.join(OsStr::from_bytes(path)) }
    };
    let live = held.get(name).and_then(|(there, n)| {
        let file = trees::open(&join(near.live.0, &there.path)).ok()?;
        trees::piece(&file, n * MAX_OBJECT_BYTES as u64, length, name)
    });
    let spare = || {
        let file = trees::open(&join(near.spare?, &entry.path)).ok()?;
        trees::piece(&file, at, length, name)
    };
    live.or_else(spare).or_else(|| near.shelf.as_mut()?.object(name).filter(|b| b.len() == length))
}

fn remove_all(path: &Path) -> std::io::Result<()> {
    if path.symlink_metadata()?.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }
}

/// Makes the directories above a live tree that is gone with its whole prefix; says who is to own what is put there.
fn make_parents(live: &Path) -> Result<Option<(Uid, Gid)>> {
    let above = live.parent().unwrap_or(Path::new("/"));
    let what = || format!("making {}", above.display());
    let there = above.ancestors().find(|p| p.is_dir()).unwrap_or(Path::new("/"));
    let meta = std::fs::metadata(there).context(what)?;
    let (uid, gid) = (Uid::from_raw(meta.uid()), Gid::from_raw(meta.gid()));
    let mut missing: Vec<&Path> = above.ancestors().take_while(|p| *p != there).collect();
    missing.reverse();
    let root = rustix::process::geteuid().is_root();
    for dir in missing {
        rustix::fs::mkdir(dir, Mode::from_raw_mode(0o755)).context(what)?;
        if root {
            rustix::fs::chownat(rustix::fs::CWD, dir, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
                .context(what)?;
        }
    }
    Ok(root.then_some((uid, gid)))
}
