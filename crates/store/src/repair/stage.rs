//! Phase 1: every piece under a name of ours, proven and durable, and nothing live has changed.

use super::place::{place, sync_file_systems};
use super::write::{BATCH_JOBS, Feed, Gone, Job, Writer, finish, own_at, times, write_all};
use super::{SYNC_EACH_FILES, Staged, Step, Work, open_root, own_prefix};
use crate::beneath::{Base, DIR, Stat, open_beneath};
use crate::compare::{self, Ids};
use crate::content::{domain, late};
use crate::elsewhere::Elsewhere;
use crate::layout::{Head, Layout, RootRef};
use crate::pack::{ObjectReader, Objects};
use crate::quarantine::Quarantine;
use crate::snapshot::{WORKERS, to_path};
use crate::tree::{Entry, EntryKind, TreeReader, compare_paths, is_within};
use crate::{Depth, DifferenceKind, Lost, Repaired, files, hex, key};
use host::clock::Deadline;
use host::{Context, Error, Kind, Result};
use rustix::fs::{AtFlags, Mode, RenameFlags};
use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError, mpsc};

/// Left free beyond what is written, for the node itself.
const SPACE_MARGIN_BYTES: u64 = 16 * 1024 * 1024;

pub(super) struct Stage<'a> {
    pub(super) layout: &'a Layout,
    pub(super) head: &'a Head,
    pub(super) objects: &'a Objects,
    pub(super) elsewhere: &'a Elsewhere<'a>,
    pub(super) partial: bool,
    pub(super) lost: Vec<Lost>,
    pub(super) ids: Ids,
    pub(super) spares: &'a [(String, std::path::PathBuf)],
    pub(super) deadline: Deadline,
    /// Everything made under our own names, for undoing.
    pub(super) made: Vec<(Arc<OwnedFd>, Vec<u8>)>,
    /// Spares taken from where they stood, for putting back: (their directory, their name, ours, our name).
    pub(super) taken: Vec<Borrowed>,
    pub(super) files: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) from_live: AtomicU64,
    pub(super) from_other_spare: AtomicU64,
    pub(super) dirs: u64,
    pub(super) links: u64,
    pub(super) whole: Vec<String>,
    pub(super) from_spare: Vec<String>,
}

/// A spare on its way: its directory and name there, ours and its name here.
type Borrowed = (OwnedFd, Vec<u8>, Arc<OwnedFd>, Vec<u8>);

impl<'a> Stage<'a> {
    /// Phase 1 for all roots, an outer one before those that lie in it. Where the outer one is gone as a whole, the inner
    /// ones are put into what is built in its place: exchanged by itself afterwards, it would take their place.
    pub(super) fn all<'w>(
        &mut self,
        works: &'w [Work],
        quarantine: &mut Quarantine<'_>,
        done: &mut Repaired,
    ) -> Result<Vec<Staged<'w>>> {
        let mut todo: Vec<&Work> = works.iter().filter(|w| !w.ops.is_empty()).collect();
        todo.sort_by_key(|w| w.reference.root.path.components().count());
        let mut staged: Vec<Staged<'w>> = Vec::new();
        let mut filled: BTreeSet<usize> = BTreeSet::new();
        for work in todo {
            let path = &work.reference.root.path;
            let around = staged.iter().enumerate().find_map(|(n, outer)| Some((n, outer.place_for(path)?)));
            let Some((n, base)) = around.filter(|_| work.missing_whole()) else {
                let root = self.root(work, None)?;
                staged.push(root);
                continue;
            };
            let base = base.context(|| format!("making the directory for {}", path.display()))?;
            let inner = self.root(work, Some(base))?;
            // Nothing live: this is still a directory under our own name.
            place(&inner, quarantine, done)?;
            filled.insert(n);
        }
        for outer in filled.into_iter().filter_map(|n| staged.get(n)) {
            sync_file_systems(outer)?;
        }
        Ok(staged)
    }

    /// Phase 1 for one root, which goes `into` a tree that is being built, or where it lies.
    fn root<'w>(&mut self, work: &'w Work, into: Option<Base>) -> Result<Staged<'w>> {
        let reference = &work.reference;
        let missing_whole = work.missing_whole();
        let inner = into.is_some();
        let found = match into {
            Some(base) => Some(base),
            None => open_root(reference)?,
        };
        let base = match found {
            Some(b) => b,
            None if missing_whole => Base::open_making_parents(&reference.root.path)
                .context(|| format!("making the directory for {}", reference.root.path.display()))?,
            None => {
                return Err(Error::new(
                    Kind::NotFound,
                    format!("repairing {}", reference.root.path.display()),
                    "the directory it lies in is gone",
                ));
            }
        };
        let mut staged = Staged { base, reference, steps: Vec::new() };
        if missing_whole && !inner && self.take_spare(&mut staged)? {
            return Ok(staged);
        }
        let needs = self.check_space(work, &staged.base)?;
        let sync_each = needs.files <= SYNC_EACH_FILES && needs.trees == 0;
        let (to_work, batches) = mpsc::channel::<Vec<Job>>();
        let batches = Mutex::new(batches);
        let (to_main, results) = mpsc::channel();
        let (files, bytes) = (&self.files, &self.bytes);
        let (from_live, from_spare) = (&self.from_live, &self.from_other_spare);
        let (elsewhere, partial) = (self.elsewhere, self.partial);
        let (layout, head, objects, deadline) = (self.layout, self.head, self.objects, self.deadline);
        let domain = domain(reference.root.class);
        let mut made = std::mem::take(&mut self.made);
        let made_before = made.len();
        let mut counts = (0u64, 0u64);
        let ids = &self.ids;
        let workers = if needs.files + usize::from(needs.trees > 0) * BATCH_JOBS > BATCH_JOBS / 2 {
            WORKERS
        } else {
            1
        };
        let result = std::thread::scope(|scope| -> Result<Vec<Gone>> {
            for _ in 0..workers {
                let (batches, to_main) = (&batches, to_main.clone());
                scope.spawn(move || {
                    let mut writer = Writer {
                        head,
                        objects: ObjectReader::new(objects, &layout.key),
                        domain,
                        deadline,
                        sync_each,
                        files,
                        bytes,
                        from_live,
                        from_spare,
                        elsewhere,
                        buffer: Vec::new(),
                    };
                    loop {
                        let next = batches.lock().unwrap_or_else(PoisonError::into_inner).recv();
                        let Ok(jobs) = next else { return };
                        let got = write_all(&mut writer, &jobs, partial);
                        if to_main.send(got).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(to_main);
            let mut feed = Feed::new(to_work, results);
            let mut planner =
                Planner { layout, ids, feed: &mut feed, made: &mut made, counts: &mut counts, deadline };
            planner.plan(work, &mut staged)?;
            Ok(feed.gone)
        });
        self.made = made;
        self.dirs += counts.0;
        self.links += counts.1;
        let gone = result?;
        if gone.iter().any(|g| g.database) {
            // Half of it may look whole to a program that makes the missing half anew.
            for (dir, name) in self.made.drain(made_before..).rev() {
                let _ = crate::quarantine::remove_tree(dir.as_fd(), &name);
            }
            let root = reference.root.name.clone();
            let why = "it was left as it is: a start without its database would begin an empty one".into();
            self.lost.push(Lost { root, path: std::path::PathBuf::new(), why });
            staged.steps.clear();
        }
        let root = &reference.root.name;
        for g in &gone {
            self.lost.push(Lost { root: root.clone(), path: to_path(&g.path), why: g.why.clone() });
            staged.steps.retain(|step| !matches!(step, Step::Place { tmp, .. } if *tmp == g.name));
        }
        if staged.steps.is_empty() {
            return Ok(staged);
        }
        if !sync_each {
            sync_file_systems(&staged)?;
        }
        if missing_whole {
            self.whole.push(reference.root.name.clone());
        }
        Ok(staged)
    }

    /// A ready tree that is proven to be the snapshot's stands in for writing it.
    fn take_spare(&mut self, staged: &mut Staged<'_>) -> Result<bool> {
        let reference = staged.reference;
        let Some((_, path)) = self.spares.iter().find(|(name, _)| *name == reference.root.name) else {
            return Ok(false);
        };
        if !reference.root.class.converges() {
            return Ok(false);
        }
        let spare = spare_reference(reference, path);
        let Ok(base) = Base::open(path) else { return Ok(false) };
        let looked = compare::root(self.layout, &spare, Some(&base), &self.ids, Depth::Stat, self.deadline)?;
        if !looked.differences.is_empty() {
            return Ok(false);
        }
        let (from, from_name) =
            base.parent_of(&[]).context(|| format!("opening the spare {}", path.display()))?;
        let tmp = self.own_name()?;
        // To a name of ours beside the place first: only a rename within one directory may follow in phase 2.
        match files::rename_at(&from, &from_name, staged.base.top(), &tmp, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(_) => return Ok(false),
        }
        let dir = Arc::new(dup(staged.base.top())?);
        self.taken.push((from, from_name, Arc::clone(&dir), tmp.clone()));
        staged.steps.push(Step::Place { dir, tmp, path: Vec::new(), database: false });
        self.whole.push(reference.root.name.clone());
        self.from_spare.push(reference.root.name.clone());
        Ok(true)
    }

    fn own_name(&self) -> Result<Vec<u8>> {
        own_name(self.layout)
    }

    /// Counts what is needed and refuses what does not fit.
    fn check_space(&self, work: &Work, base: &Base) -> Result<Needs> {
        let mut needs = Needs::default();
        let mut tree = self.layout.tree(&work.reference)?;
        let mut ops = work.ops.iter().peekable();
        let mut within: Option<&[u8]> = None;
        while let Some(entry) = tree.next()? {
            while ops.peek().is_some_and(|(p, _)| compare_paths(p, &entry.path) == Ordering::Less) {
                ops.next();
            }
            let named = ops.peek().filter(|(p, _)| *p == entry.path);
            let below = within.is_some_and(|w| is_within(&entry.path, w));
            if let Some((path, kind)) = named
                && entry.kind == EntryKind::Dir
                && matches!(kind, DifferenceKind::Missing | DifferenceKind::KindChanged)
            {
                within = Some(path);
                needs.trees += 1;
            }
            if entry.kind == EntryKind::File && (named.is_some() || below) {
                needs.files += 1;
                needs.bytes += entry.runs.len() as u64 * u64::from(entry.chunk_bytes()).min(entry.size);
            }
        }
        let space = rustix::fs::fstatvfs(base.top())
            .context(|| format!("asking for space at {}", base.path.display()))?;
        let blocks = if rustix::process::geteuid().is_root() { space.f_bfree } else { space.f_bavail };
        let free = blocks.saturating_mul(space.f_frsize);
        if needs.bytes > 0 && needs.bytes.saturating_add(SPACE_MARGIN_BYTES) > free {
            return Err(Error::new(
                Kind::NoSpace,
                format!("repairing {}", base.path.display()),
                format!("{} MB are needed and {} MB are free", needs.bytes / 1_000_000, free / 1_000_000),
            )
            .hint("free some space on that file system; nothing has been changed"));
        }
        Ok(needs)
    }

    /// Removes what phase 1 made; it was never part of the node.
    pub(super) fn undo(&mut self) {
        for (from, from_name, dir, tmp) in self.taken.drain(..) {
            let _ = files::rename_at(&dir, &tmp, &from, &from_name, RenameFlags::NOREPLACE);
        }
        for (dir, name) in self.made.drain(..).rev() {
            // What stays is moved to the quarantine by the next repair.
            let _ = crate::quarantine::remove_tree(dir.as_fd(), &name);
        }
    }
}

#[derive(Default)]
struct Needs {
    files: usize,
    trees: usize,
    bytes: u64,
}

fn own_name(layout: &Layout) -> Result<Vec<u8>> {
    let mut random = [0; 8];
    key::random(&mut random)?;
    Ok([&own_prefix(layout)[..], b"-", hex::encode(&random).as_bytes()].concat())
}

pub(super) fn spare_name(root: &str) -> String {
    format!("spare of {root}")
}

pub(crate) fn spare_reference(reference: &RootRef, path: &Path) -> RootRef {
    let mut spare = reference.clone();
    spare.root.name = spare_name(&reference.root.name);
    spare.root.path = path.to_owned();
    spare
}

pub(super) fn dup(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(fd, 0).context(|| "keeping a directory open".into())
}

/// Turns the differences of one root into pieces under our own names, and steps.
struct Planner<'a> {
    layout: &'a Layout,
    ids: &'a Ids,
    feed: &'a mut Feed,
    made: &'a mut Vec<(Arc<OwnedFd>, Vec<u8>)>,
    counts: &'a mut (u64, u64),
    deadline: Deadline,
}

impl Planner<'_> {
    fn plan(&mut self, work: &Work, staged: &mut Staged<'_>) -> Result<()> {
        let mut tree = self.layout.tree(&work.reference)?;
        let mut parent: Option<(Vec<u8>, Arc<OwnedFd>)> = None;
        for (path, kind) in &work.ops {
            if self.deadline.passed() {
                return Err(late("repairing"));
            }
            if *kind == DifferenceKind::Extra {
                staged.steps.push(Step::Aside { path: path.clone() });
                continue;
            }
            let Some(mut entry) = seek(&mut tree, path)? else {
                return Err(Error::new(
                    Kind::NotFound,
                    format!("repairing `{}` of {}", to_path(path).display(), work.reference.root.name),
                    "the snapshot does not hold it",
                ));
            };
            self.ids.apply(&mut entry);
            let (dir, name) = self.parent(&staged.base, path, &mut parent)?;
            let attributes_only = match kind {
                DifferenceKind::ModeOrOwner | DifferenceKind::Attributes => {
                    match Stat::at(dir.as_fd(), &name) {
                        // Another name of the same inode may lie outside: never change that one.
                        Ok(s) if s.is_file() => s.nlink <= 1,
                        Ok(_) => true,
                        Err(_) => false,
                    }
                }
                DifferenceKind::Missing
                | DifferenceKind::Changed
                | DifferenceKind::Emptied
                | DifferenceKind::HardLinked
                | DifferenceKind::KindChanged
                | DifferenceKind::LinkTarget
                | DifferenceKind::Extra
                | DifferenceKind::TooMany => false,
            };
            if attributes_only {
                staged.steps.push(Step::Attributes(Box::new(entry)));
                continue;
            }
            let tmp = own_name(self.layout)?;
            let database = entry.database;
            match entry.kind {
                EntryKind::File => {
                    self.made.push((Arc::clone(&dir), tmp.clone()));
                    self.feed.push(Job { entry, dir: Arc::clone(&dir), name: tmp.clone() })?;
                }
                EntryKind::Link => {
                    self.made.push((Arc::clone(&dir), tmp.clone()));
                    self.link(dir.as_fd(), &tmp, &entry)?;
                }
                EntryKind::Dir => {
                    self.made.push((Arc::clone(&dir), tmp.clone()));
                    self.tree(&mut tree, &dir, &tmp, &entry)?;
                }
                EntryKind::Special | EntryKind::Unread => continue,
            }
            staged.steps.push(Step::Place { dir, tmp, path: path.clone(), database });
        }
        self.feed.finish()
    }

    /// The directory a piece goes to, opened; kept for the next piece, which is likely to be its neighbour.
    fn parent(
        &mut self,
        base: &Base,
        path: &[u8],
        last: &mut Option<(Vec<u8>, Arc<OwnedFd>)>,
    ) -> Result<(Arc<OwnedFd>, Vec<u8>)> {
        let what = || format!("opening the directory of {}", base.path.join(to_path(path)).display());
        if path.is_empty() {
            let (dir, name) = base.parent_of(path).context(what)?;
            return Ok((Arc::new(dir), name));
        }
        let cut = path.iter().rposition(|b| *b == b'/');
        let (above, name) = cut.map_or((&path[..0], path), |c| (&path[..c], &path[c + 1..]));
        if let Some((known, dir)) = last
            && known == above
        {
            return Ok((Arc::clone(dir), name.to_vec()));
        }
        let dir = Arc::new(base.open_at(above, DIR).context(what)?);
        *last = Some((above.to_vec(), Arc::clone(&dir)));
        Ok((dir, name.to_vec()))
    }

    fn link(&mut self, dir: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> Result<()> {
        let what = || format!("making the symlink {}", to_path(&entry.path).display());
        rustix::fs::symlinkat(OsStr::from_bytes(&entry.target), dir, name).context(what)?;
        own_at(dir, name, entry).context(what)?;
        let times = times(entry);
        rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW).context(what)?;
        self.counts.1 += 1;
        Ok(())
    }

    /// Builds a whole subtree under our own name. Directories are made here, in order; files by the workers.
    fn tree(&mut self, tree: &mut TreeReader, dir: &Arc<OwnedFd>, tmp: &[u8], top: &Entry) -> Result<()> {
        let what = |e: &Entry| format!("making the directory {}", to_path(&e.path).display());
        let mut dirs: Vec<(Vec<u8>, Entry)> = Vec::new();
        // The way from the top to where we are.
        let mut open: Vec<(Vec<u8>, Arc<OwnedFd>)> = Vec::new();
        let make = |at: BorrowedFd<'_>, name: &[u8], e: &Entry| -> Result<Arc<OwnedFd>> {
            rustix::fs::mkdirat(at, name, Mode::from_raw_mode(0o700)).context(|| what(e))?;
            let fd = open_beneath(at, name, DIR, Mode::empty()).context(|| what(e))?;
            Ok(Arc::new(fd))
        };
        open.push((top.path.clone(), make(dir.as_fd(), tmp, top)?));
        dirs.push((tmp.to_vec(), top.clone()));
        self.counts.0 += 1;
        while let Some(next) = tree.peek()? {
            if !is_within(&next.path, &top.path) {
                break;
            }
            let Some(mut entry) = tree.next()? else { break };
            self.ids.apply(&mut entry);
            let cut = entry.path.iter().rposition(|b| *b == b'/').unwrap_or(0);
            let above = &entry.path[..cut];
            while open.last().is_some_and(|(p, _)| p != above) {
                open.pop();
            }
            let Some((_, parent)) = open.last().cloned() else {
                return Err(Error::new(
                    Kind::Corrupt,
                    format!("restoring {}", to_path(&entry.path).display()),
                    "the manifest does not hold its directory",
                ));
            };
            let name = if cut == 0 { &entry.path[..] } else { &entry.path[cut + 1..] };
            match entry.kind {
                EntryKind::Dir => {
                    let fd = make(parent.as_fd(), name, &entry)?;
                    let below =
                        if top.path.is_empty() { &entry.path[..] } else { &entry.path[top.path.len() + 1..] };
                    let within = [tmp, b"/", below].concat();
                    open.push((entry.path.clone(), fd));
                    dirs.push((within, entry));
                    self.counts.0 += 1;
                }
                EntryKind::File => {
                    let name = name.to_vec();
                    self.feed.push(Job { entry, dir: parent, name })?;
                }
                EntryKind::Link => self.link(parent.as_fd(), name, &entry)?,
                EntryKind::Special | EntryKind::Unread => {}
            }
        }
        self.feed.finish()?;
        // From the deepest up: a directory may forbid entering itself, and filling it moves its time.
        for (path, entry) in dirs.iter().rev() {
            let fd = open_beneath(dir.as_fd(), path, DIR, Mode::empty()).context(|| what(entry))?;
            finish(fd.as_fd(), entry).context(|| what(entry))?;
        }
        Ok(())
    }
}

/// The entry at `path`, when asked in order.
fn seek(tree: &mut TreeReader, path: &[u8]) -> Result<Option<Entry>> {
    while let Some(e) = tree.peek()? {
        match compare_paths(&e.path, path) {
            Ordering::Less => {
                tree.next()?;
            }
            Ordering::Equal => return tree.next(),
            Ordering::Greater => return Ok(None),
        }
    }
    Ok(None)
}
