//! How the live trees differ from a snapshot: manifest, index and walk merged in constant memory.
//!
//! The quick way believes an entry only while inode, ctime, mtime, size, mode and owner are what the index says
//! (a byte flipped behind an unchanged mtime still moves the ctime); whatever that does not vouch for is read.

use crate::beneath::{Base, Stat};
use crate::content::{self, Reader, late, vouches};
use crate::layout::{Layout, RootRef};
use crate::seal;
use crate::snapshot::{Known, WORKERS, to_path};
use crate::tree::{Entry, EntryKind, TreeReader, TreeWriter, compare_paths};
use crate::walk::{COMPANIONS, Filter, Found, Step, Walk};
use crate::{Depth, Difference, DifferenceKind, files};
use host::clock::Deadline;
use host::{Context, Error, Kind, Result};
use std::cmp::Ordering;
use std::collections::HashSet;
use std::sync::{Mutex, PoisonError, mpsc};

/// A report holds at most this many differences of one root (about 10 MB); a repair then works in rounds.
pub(crate) const MAX_DIFFERENCES: usize = 50_000;
/// Entries that were read and found right, to be vouched for next time; more are found by the sweep after.
const MAX_REFRESHED: usize = 50_000;
const BATCH_JOBS: usize = 64;
const BATCH_BYTES: u64 = 8 * 1024 * 1024;
const MAX_UNDER_WAY: usize = 16;
/// Looks at the clock once in so many entries.
const CLOCK_EVERY: u64 = 2048;

/// What looking at one root found.
#[derive(Default)]
pub(crate) struct Looked {
    pub(crate) differences: Vec<Difference>,
    pub(crate) entries: u64,
    pub(crate) hashed: u64,
    /// What a crash of ours left in the tree.
    pub(crate) leftovers: Vec<Vec<u8>>,
}

struct Job {
    found: Found,
    entry: Entry,
    attributes_differ: bool,
}

enum Outcome {
    Differs(Vec<u8>, DifferenceKind),
    /// The bytes are right; the entry as it is on disk, for the index.
    Right(Vec<u8>, Option<DifferenceKind>, Box<Entry>),
}

/// Maps ids of the snapshot to ids of this host.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ids {
    pub(crate) uids: Vec<(u32, u32)>,
    pub(crate) gids: Vec<(u32, u32)>,
}

impl Ids {
    pub(crate) fn apply(&self, entry: &mut Entry) {
        let map =
            |list: &[(u32, u32)], id: u32| list.iter().find(|(there, _)| *there == id).map_or(id, |p| p.1);
        entry.uid = map(&self.uids, entry.uid);
        entry.gid = map(&self.gids, entry.gid);
    }
}

/// Looks at one root. `base`: `None` when even the directory it lies in is missing.
pub(crate) fn root(
    layout: &Layout,
    reference: &RootRef,
    base: Option<&Base>,
    ids: &Ids,
    depth: Depth,
    deadline: Deadline,
) -> Result<Looked> {
    layout.prove_tree(reference)?;
    let mut tree = layout.tree(reference)?;
    let mut looked = Looked::default();
    let Some(base) = base else {
        if tree.peek()?.is_some() {
            looked.differences.push(difference(reference, b"", DifferenceKind::Missing));
        }
        return Ok(looked);
    };
    let walk = Walk::new(base, Filter::of(&reference.root), depth == Depth::Stat)?;
    let (to_work, batches) = mpsc::channel::<Vec<Job>>();
    let batches = Mutex::new(batches);
    let (to_main, results) = mpsc::channel::<Result<Vec<Outcome>>>();
    let mut refreshed = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        for _ in 0..WORKERS {
            let (batches, to_main) = (&batches, to_main.clone());
            scope.spawn(move || {
                let mut reader = Reader::new(base, &reference.root, &layout.key, None, deadline);
                loop {
                    let next = batches.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(jobs) = next else { return };
                    let got = jobs.into_iter().map(|job| hash(&mut reader, job)).collect::<Result<Vec<_>>>();
                    if to_main.send(got).is_err() {
                        return;
                    }
                }
            });
        }
        drop(to_main);
        let mut merge = Merge {
            reference,
            base,
            depth,
            deadline,
            looked: &mut looked,
            refreshed: &mut refreshed,
            databases: HashSet::new(),
            jobs: Vec::new(),
            job_bytes: 0,
            under_way: 0,
            to_work,
            results,
        };
        let mut known = Known::open(layout, &reference.root);
        merge.run(&mut tree, walk, &mut known, ids)
    })?;
    looked.differences.sort_by(|a, b| {
        use std::os::unix::ffi::OsStrExt;
        compare_paths(a.path.as_os_str().as_bytes(), b.path.as_os_str().as_bytes())
    });
    if !refreshed.is_empty() {
        // A store that cannot be written to (full, read-only) costs the next sweep some reading, nothing else.
        let _ = refresh(layout, reference, refreshed);
    }
    Ok(looked)
}

pub(crate) fn difference(reference: &RootRef, path: &[u8], kind: DifferenceKind) -> Difference {
    Difference { root: reference.root.name.clone(), path: to_path(path), class: reference.root.class, kind }
}

struct Merge<'a> {
    reference: &'a RootRef,
    base: &'a Base,
    depth: Depth,
    deadline: Deadline,
    looked: &'a mut Looked,
    refreshed: &'a mut Vec<Entry>,
    databases: HashSet<Vec<u8>>,
    jobs: Vec<Job>,
    job_bytes: u64,
    under_way: usize,
    to_work: mpsc::Sender<Vec<Job>>,
    results: mpsc::Receiver<Result<Vec<Outcome>>>,
}

impl Merge<'_> {
    fn run(&mut self, tree: &mut TreeReader, mut walk: Walk, known: &mut Known, ids: &Ids) -> Result<()> {
        let filter = Filter::of(&self.reference.root);
        loop {
            if self.full() {
                break;
            }
            if self.looked.entries.is_multiple_of(CLOCK_EVERY) && self.deadline.passed() {
                return Err(late("comparing the live tree"));
            }
            let order = match (tree.peek()?, walk.peek()?) {
                (None, None) => break,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(entry), Some(Step::Entry(found))) => compare_paths(&entry.path, &found.path),
                (Some(_), Some(Step::Closed(..))) => Ordering::Greater,
            };
            match order {
                Ordering::Less => {
                    let Some(entry) = tree.next()? else { break };
                    self.missing(tree, &entry)?;
                }
                Ordering::Greater => match walk.next()? {
                    Some(Step::Entry(found)) => self.extra(&mut walk, &filter, &found),
                    // What lies below is unknown, which is not missing.
                    Some(Step::Closed(path, _)) => {
                        tree.skip_within(&path)?;
                    }
                    None => break,
                },
                Ordering::Equal => {
                    let (Some(mut entry), Some(Step::Entry(found))) = (tree.next()?, walk.next()?) else {
                        break;
                    };
                    ids.apply(&mut entry);
                    self.both(tree, &mut walk, known, entry, found)?;
                }
            }
        }
        self.send()?;
        while self.under_way > 0 {
            self.receive()?;
        }
        self.looked.leftovers = std::mem::take(&mut walk.leftovers);
        if self.full() {
            self.looked.differences.push(difference(self.reference, b"", DifferenceKind::TooMany));
        }
        Ok(())
    }

    fn full(&self) -> bool {
        self.looked.differences.len() >= MAX_DIFFERENCES
    }

    fn report(&mut self, path: &[u8], kind: DifferenceKind) {
        self.looked.differences.push(difference(self.reference, path, kind));
    }

    fn missing(&mut self, tree: &mut TreeReader, entry: &Entry) -> Result<()> {
        match entry.kind {
            EntryKind::Special | EntryKind::Unread => return Ok(()),
            EntryKind::Dir => tree.skip_within(&entry.path)?,
            EntryKind::File | EntryKind::Link => {}
        }
        if entry.database {
            self.databases.insert(entry.path.clone());
        }
        self.report(&entry.path, DifferenceKind::Missing);
        Ok(())
    }

    fn extra(&mut self, walk: &mut Walk, filter: &Filter, found: &Found) {
        self.looked.entries += 1;
        // A directory that only leads to what belongs here is not ours to judge.
        if !filter.owns(&found.path) {
            return;
        }
        let companion = COMPANIONS.iter().find_map(|c| found.path.strip_suffix(*c));
        if companion.is_some_and(|main| self.databases.contains(main)) {
            return;
        }
        if found.stat.is_dir() {
            walk.skip_children();
        }
        self.report(&found.path, DifferenceKind::Extra);
    }

    fn both(
        &mut self,
        tree: &mut TreeReader,
        walk: &mut Walk,
        known: &mut Known,
        entry: Entry,
        found: Found,
    ) -> Result<()> {
        self.looked.entries += 1;
        if entry.database {
            self.databases.insert(entry.path.clone());
        }
        if !same_kind(&entry, &found.stat) {
            if found.stat.is_dir() {
                walk.skip_children();
            }
            if entry.kind == EntryKind::Dir {
                tree.skip_within(&entry.path)?;
            }
            // What could not be stored cannot be put back either.
            if !matches!(entry.kind, EntryKind::Special | EntryKind::Unread) {
                self.report(&entry.path, DifferenceKind::KindChanged);
            }
            return Ok(());
        }
        let owner_differs = entry.uid != found.stat.uid || entry.gid != found.stat.gid;
        let attributes_differ =
            owner_differs || entry.mode != found.stat.mode & 0o7777 && !found.stat.is_link();
        match entry.kind {
            EntryKind::Special | EntryKind::Unread => {}
            EntryKind::Dir => {
                if attributes_differ {
                    self.report(&entry.path, DifferenceKind::ModeOrOwner);
                } else if self.depth == Depth::Hash && self.dir_xattrs_differ(&entry) {
                    self.report(&entry.path, DifferenceKind::Attributes);
                }
            }
            EntryKind::Link => {
                let right = self
                    .base
                    .parent_of(&entry.path)
                    .and_then(|(dir, name)| rustix::fs::readlinkat(&dir, name, Vec::new()))
                    .is_ok_and(|t| t.into_bytes() == entry.target);
                if !right {
                    self.report(&entry.path, DifferenceKind::LinkTarget);
                } else if owner_differs {
                    self.report(&entry.path, DifferenceKind::ModeOrOwner);
                }
            }
            EntryKind::File => return self.file(known, entry, found, attributes_differ),
        }
        Ok(())
    }

    fn dir_xattrs_differ(&self, entry: &Entry) -> bool {
        use std::os::fd::AsFd;
        self.base
            .open_at(&entry.path, crate::beneath::DIR)
            .is_ok_and(|fd| content::xattrs(fd.as_fd()) != entry.xattrs)
    }

    fn file(&mut self, known: &mut Known, entry: Entry, found: Found, attributes_differ: bool) -> Result<()> {
        let index = known.at(&entry.path);
        if (self.depth == Depth::Stat || entry.database)
            && let Some(index) = index.filter(|i| vouches(i, &found))
        {
            if !index.same_content(&entry) {
                self.report(&entry.path, changed(&found.stat));
            } else if linked(&entry, &found.stat) {
                self.report(&entry.path, DifferenceKind::HardLinked);
            } else if attributes_differ {
                self.report(&entry.path, DifferenceKind::ModeOrOwner);
            } else if index.xattrs != entry.xattrs {
                self.report(&entry.path, DifferenceKind::Attributes);
            }
            return Ok(());
        }
        // A live database is never byte for byte what its backup is: only stat can say that it is the same.
        if entry.size != found.stat.size || entry.database {
            let kind = if entry.size > 0 { changed(&found.stat) } else { DifferenceKind::Changed };
            if entry.database && self.database_as_restored(&entry, &found)? {
                return Ok(());
            }
            self.report(&entry.path, kind);
            return Ok(());
        }
        self.job_bytes += found.stat.size;
        self.jobs.push(Job { found, entry, attributes_differ });
        if self.jobs.len() >= BATCH_JOBS || self.job_bytes >= BATCH_BYTES {
            self.send()?;
        }
        Ok(())
    }

    /// A database that nobody has written to since it was restored is byte for byte its backup.
    fn database_as_restored(&mut self, entry: &Entry, found: &Found) -> Result<bool> {
        if entry.size != found.stat.size || found.companion != 0 {
            return Ok(false);
        }
        let (uid, gid) = (found.stat.uid, found.stat.gid);
        if (uid, gid) != (entry.uid, entry.gid) || entry.mode != found.stat.mode & 0o7777 {
            return Ok(false);
        }
        self.job_bytes += found.stat.size;
        let found = Found { path: found.path.clone(), ..*found };
        self.jobs.push(Job { found, entry: entry.clone(), attributes_differ: false });
        self.send()?;
        Ok(true)
    }

    fn send(&mut self) -> Result<()> {
        if self.jobs.is_empty() {
            return Ok(());
        }
        while self.under_way >= MAX_UNDER_WAY {
            self.receive()?;
        }
        self.job_bytes = 0;
        self.to_work.send(std::mem::take(&mut self.jobs)).map_err(|_| gone())?;
        self.under_way += 1;
        Ok(())
    }

    fn receive(&mut self) -> Result<()> {
        let outcomes = self.results.recv().map_err(|_| gone())??;
        self.under_way -= 1;
        for outcome in outcomes {
            self.looked.hashed += 1;
            match outcome {
                Outcome::Differs(path, kind) => self.report(&path, kind),
                Outcome::Right(path, kind, entry) => {
                    if let Some(kind) = kind {
                        self.report(&path, kind);
                    }
                    if entry.live.ctime_ns != 0 && self.refreshed.len() < MAX_REFRESHED {
                        self.refreshed.push(*entry);
                    }
                }
            }
        }
        Ok(())
    }
}

fn gone() -> Error {
    Error::new(Kind::System, "comparing the live tree", "a worker ended early")
}

fn changed(live: &Stat) -> DifferenceKind {
    if live.size == 0 { DifferenceKind::Emptied } else { DifferenceKind::Changed }
}

fn linked(entry: &Entry, live: &Stat) -> bool {
    entry.single && live.nlink > 1
}

fn same_kind(entry: &Entry, stat: &Stat) -> bool {
    match entry.kind {
        EntryKind::Dir => stat.is_dir(),
        EntryKind::File => stat.is_file(),
        EntryKind::Link => stat.is_link(),
        EntryKind::Special => !stat.is_dir() && !stat.is_file() && !stat.is_link(),
        EntryKind::Unread => true,
    }
}

fn hash(reader: &mut Reader<'_>, job: Job) -> Result<Outcome> {
    let Job { found, entry, attributes_differ } = job;
    let path = entry.path.clone();
    let Some((live, _)) = reader.hash(&found, &entry)? else {
        // It cannot be read any more: whatever it is, it is not what it was.
        return Ok(Outcome::Differs(path, DifferenceKind::Changed));
    };
    if !live.same_content(&entry) {
        return Ok(Outcome::Differs(path, changed(&found.stat)));
    }
    if linked(&entry, &found.stat) {
        return Ok(Outcome::Differs(path, DifferenceKind::HardLinked));
    }
    let kind = if attributes_differ {
        Some(DifferenceKind::ModeOrOwner)
    } else if live.xattrs != entry.xattrs {
        Some(DifferenceKind::Attributes)
    } else {
        None
    };
    Ok(Outcome::Right(path, kind, Box::new(live)))
}

/// Writes the index anew with what was just read and found right.
fn refresh(layout: &Layout, reference: &RootRef, mut refreshed: Vec<Entry>) -> Result<()> {
    refreshed.sort_by(|a, b| compare_paths(&a.path, &b.path));
    let path = layout.index_path(&reference.root.name);
    let mut old = TreeReader::index(&path, &layout.key).ok();
    // With every entry still saying what the manifest says, the index still repeats it.
    let mut basis = old.as_ref().map_or([0; 16], |o| o.basis);
    let mut new = TreeWriter::index(layout.tmp_file()?, &layout.key, seal::new_id()?, [0; 16])?;
    let mut fresh = refreshed.into_iter().peekable();
    let mut same_basis = old.is_some();
    let tmp = loop {
        let was = match &mut old {
            Some(o) => o.peek().ok().flatten(),
            None => None,
        };
        let order = match (was, fresh.peek()) {
            (None, None) => break new.finish()?,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(a), Some(b)) => compare_paths(&a.path, &b.path),
        };
        let was = match (order, &mut old) {
            (Ordering::Less | Ordering::Equal, Some(o)) => o.next()?,
            (Ordering::Less | Ordering::Equal, None) | (Ordering::Greater, _) => None,
        };
        match (was, if order == Ordering::Less { None } else { fresh.next() }) {
            (Some(was), Some(now)) => {
                same_basis &= Entry { live: was.live, ..now.clone() } == was;
                new.push(&now)?;
            }
            (None, Some(now)) => {
                same_basis = false;
                new.push(&now)?;
            }
            (Some(was), None) => new.push(&was)?,
            (None, None) => {}
        }
    };
    if !same_basis {
        basis = [0; 16];
    }
    // The basis stands in the first frame, so an index that keeps it is copied under it once more.
    let tmp = if basis == [0; 16] { tmp } else { rebase(layout, &tmp, basis)? };
    files::rename(&tmp.1, &path).context(|| format!("publishing {}", path.display()))?;
    Ok(())
}

/// What vouches for the tree of one root vouches from now on for that of another, which it was moved to.
pub(crate) fn vouch_as(layout: &Layout, from: &str, to: &str) -> Result<()> {
    let (from, to) = (layout.index_path(from), layout.index_path(to));
    let mut moved = TreeReader::index(&from, &layout.key)?;
    let publish =
        |tmp: &std::path::Path| files::rename(tmp, &to).context(|| format!("publishing {}", to.display()));
    let Ok(mut old) = TreeReader::index(&to, &layout.key) else { return publish(&from) };
    // Only the stamps change, so that it still repeats the manifest that it repeated.
    let mut new = TreeWriter::index(layout.tmp_file()?, &layout.key, seal::new_id()?, old.basis)?;
    while let Some(mut entry) = old.next()? {
        while moved.peek()?.is_some_and(|m| compare_paths(&m.path, &entry.path) == Ordering::Less) {
            moved.next()?;
        }
        if let Some(m) = moved.peek()?
            && (Entry { live: entry.live, ..m.clone() }) == entry
        {
            entry.live = m.live;
        }
        new.push(&entry)?;
    }
    let (_, tmp) = new.finish()?;
    publish(&tmp)
}

/// Lets the index vouch for these no more: the quick look will read them.
pub(crate) fn distrust(layout: &Layout, reference: &RootRef, paths: &[Vec<u8>]) -> Result<()> {
    let path = layout.index_path(&reference.root.name);
    // Without an index nothing is vouched for.
    let Ok(mut old) = TreeReader::index(&path, &layout.key) else { return Ok(()) };
    let basis = old.basis;
    let mut new = TreeWriter::index(layout.tmp_file()?, &layout.key, seal::new_id()?, basis)?;
    let wrong: HashSet<&[u8]> = paths.iter().map(Vec::as_slice).collect();
    while let Some(mut entry) = old.next()? {
        if wrong.contains(entry.path.as_slice()) {
            entry.live.ctime_ns = 0;
        }
        new.push(&entry)?;
    }
    let (_, tmp) = new.finish()?;
    files::rename(&tmp, &path).context(|| format!("publishing {}", path.display()))
}

/// Copies an index, to repeat another manifest with the same entries.
pub(crate) fn rebase(
    layout: &Layout,
    from: &(std::fs::File, std::path::PathBuf),
    basis: seal::FileId,
) -> Result<(std::fs::File, std::path::PathBuf)> {
    let mut old = TreeReader::index(&from.1, &layout.key)?;
    let mut new = TreeWriter::index(layout.tmp_file()?, &layout.key, seal::new_id()?, basis)?;
    while let Some(e) = old.next()? {
        new.push(&e)?;
    }
    let _ = files::remove(&from.1);
    new.finish()
}
