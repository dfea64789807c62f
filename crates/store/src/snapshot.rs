//! Taking a snapshot: what did not change is carried over, what did is read once by two workers and stored in the
//! order of the walk; it exists only when everything it needs is durable.

use crate::beneath::{Base, NoBase};
use crate::content::{self, Reader, late};
use crate::files::{self, Meter};
use crate::layout::{Head, Layout, RootRef, make_id, number_of};
use crate::pack::{Finished, Fresh, Objects, PackWriter};
use crate::seal;
use crate::tree::{Entry, EntryKind, TreeReader, TreeWriter, compare_paths};
use crate::walk::{Filter, Found, Step, Walk};
use crate::{ClassInfo, Phase, Problem, ProblemKind, Progress, Request, Root, SnapshotInfo, Trust, hex};
use engine::words::Class;
use host::clock::Deadline;
use host::{Context, Error, Kind, Result};
use rustix::io::Errno;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering as Atomic};
use std::sync::{Mutex, PoisonError, mpsc};

/// Threads that read, hash, compress and seal.
pub(crate) const WORKERS: usize = 2;
/// A batch is this many entries, or this many bytes.
const BATCH_ENTRIES: usize = 128;
const BATCH_BYTES: u64 = 8 * 1024 * 1024;
/// Batches under way: bounds memory and how far results may come out of order.
const MAX_UNDER_WAY: u64 = 16;
/// Problems a snapshot records; the rest are as the first.
const MAX_PROBLEMS: usize = 200;

enum Item {
    /// Known from the index.
    Known(Entry),
    Read(Found),
}

type Batch = (u64, Vec<Item>);
type Done = (u64, Result<(Vec<Entry>, Vec<Problem>)>);

/// A manifest and an index that are written but not published.
struct NewTree {
    reference: RootRef,
    /// `None`: it turned out entry for entry the one before, which is named again.
    tree: Option<(File, PathBuf)>,
    index: (File, PathBuf),
    problems: Vec<Problem>,
}

pub(crate) fn take(
    layout: &Layout,
    request: &Request<'_>,
    progress: &mut dyn FnMut(Progress),
    deadline: Deadline,
) -> Result<SnapshotInfo> {
    let meter = Meter::start();
    check_roots(request.roots)?;
    let _lock = layout.write_lock(deadline)?;
    layout.tidy()?;
    let parent = layout.heads()?.0.pop();
    let number = layout.ids()?.iter().filter_map(|id| number_of(id)).max().unwrap_or(0) + 1;

    let added = AtomicU64::new(0);
    let (to_sync, syncs) = mpsc::channel::<Finished>();
    let packs = layout.packs();
    let (mut references, mut new_trees, mut problems) = (Vec::new(), Vec::new(), Vec::new());
    std::thread::scope(|scope| -> Result<()> {
        let added = &added;
        let packs = &packs;
        // Syncing waits for the disk, so it is nobody's work who could be hashing.
        let syncer = scope.spawn(move || -> Result<()> {
            for pack in syncs {
                files::sync_file(&pack.file).context(|| format!("syncing {}", pack.tmp.display()))?;
                let to = packs.join(format!("{}.pack", pack.name));
                files::rename(&pack.tmp, &to).context(|| format!("publishing {}", to.display()))?;
                added.fetch_add(pack.bytes, Atomic::Relaxed);
            }
            files::sync_dir(packs)
        });
        let work = || -> Result<()> {
            let tmp = layout.tmp();
            let done = move |pack: Finished| -> Result<()> {
                // A syncer that ended early did so with an error, which is reported below.
                to_sync.send(pack).map_err(|_| Error::new(Kind::System, "storing objects", "syncing failed"))
            };
            let mut writers = Vec::new();
            for _ in 0..WORKERS {
                writers.push(PackWriter::new(&tmp, &layout.key, &done)?);
            }
            let mut taker = Taker { layout, writers, objects: None, fresh: Fresh::default(), deadline };
            for root in request.roots {
                let before = parent.as_ref().and_then(|p| p.trees.iter().find(|t| t.root.name == root.name));
                taker.root(
                    root,
                    request.classes,
                    before,
                    progress,
                    &mut references,
                    &mut new_trees,
                    &mut problems,
                )?;
            }
            progress(Progress { phase: Phase::Syncing, files: 0, bytes: 0, of_files: None });
            for writer in taker.writers {
                writer.finish()?;
            }
            Ok(())
        };
        let worked = work();
        let synced = syncer
            .join()
            .unwrap_or_else(|_| Err(Error::new(Kind::System, "syncing packs", "its thread failed")));
        match (worked, synced) {
            // The syncer's reason is the first cause when both failed for the same disk.
            (_, Err(e)) | (Err(e), Ok(())) => Err(e),
            (Ok(()), Ok(())) => Ok(()),
        }
    })?;
    carry_over_damaged(parent.as_ref(), &mut references, &mut new_trees, &mut problems);

    for new in &new_trees {
        if let Some((file, tmp)) = &new.tree {
            files::publish(file, tmp, &layout.tree_path(&new.reference.tree))?;
            added.fetch_add(file.metadata().map(|m| m.len()).unwrap_or(0), Atomic::Relaxed);
        }
        references.push(new.reference.clone());
    }
    // In the order they were asked for, whichever way they came.
    references.sort_by_key(|r| request.roots.iter().position(|q| q.name == r.root.name));
    problems.truncate(MAX_PROBLEMS);
    let info = SnapshotInfo {
        id: make_id(number)?,
        number,
        taken: host::clock::wall(),
        trust: Trust::Candidate,
        classes: classes(&references),
        roots: references.iter().map(|r| r.root.clone()).collect(),
        note: request.note.to_owned(),
        version: request.version.map(str::to_owned),
        node: request.node.clone(),
        baseline: request.baseline.clone(),
        problems,
        cost: meter.cost(added.load(Atomic::Relaxed)),
    };
    let head = Head { info, trees: references };
    layout.write_head(&head)?;
    // After publication: an index is only a help, and a torn one is thrown away by its reader.
    for new in new_trees {
        let to = layout.index_path(&new.reference.root.name);
        files::rename(&new.index.1, &to).context(|| format!("publishing {}", to.display()))?;
    }
    Ok(SnapshotInfo { cost: meter.cost(head.info.cost.added_bytes), ..head.info })
}

fn check_roots(roots: &[Root]) -> Result<()> {
    let mut seen = std::collections::BTreeSet::new();
    for root in roots {
        let bad = |why: &str| Err(Error::new(Kind::Usage, format!("taking root `{}`", root.name), why));
        if root.name.is_empty()
            || root.name.len() > 200
            || root.name.contains(['/', '\0'])
            || root.name.starts_with('.')
        {
            return bad("a root's name is a plain word");
        }
        if !root.path.is_absolute() {
            return bad("its path must be absolute");
        }
        if !seen.insert(&root.name) {
            return bad("the name is used twice");
        }
    }
    Ok(())
}

fn classes(references: &[RootRef]) -> BTreeMap<Class, ClassInfo> {
    let mut all: BTreeMap<Class, ClassInfo> = BTreeMap::new();
    for r in references {
        let c = all.entry(r.root.class).or_insert(ClassInfo { files: 0, bytes: 0, taken: r.taken });
        c.files += r.files;
        c.bytes += r.bytes;
        c.taken = c.taken.min(r.taken);
    }
    all
}

/// A class with a damaged database is carried over whole: parts of two moments would not fit each other.
fn carry_over_damaged(
    parent: Option<&Head>,
    references: &mut Vec<RootRef>,
    new_trees: &mut Vec<NewTree>,
    problems: &mut [Problem],
) {
    let Some(parent) = parent else { return };
    let class_of = |name: &str, trees: &[NewTree]| {
        trees.iter().find(|t| t.reference.root.name == name).map(|t| t.reference.root.class)
    };
    for class in Class::ALL {
        let damaged = problems
            .iter()
            .any(|p| p.kind == ProblemKind::CorruptDatabase && class_of(&p.root, new_trees) == Some(class));
        let before: Vec<&RootRef> = parent.trees.iter().filter(|t| t.root.class == class).collect();
        if !damaged || before.is_empty() {
            continue;
        }
        for p in problems.iter_mut() {
            if class_of(&p.root, new_trees) == Some(class) {
                p.carried = true;
            }
        }
        new_trees.retain(|t| t.reference.root.class != class);
        references.retain(|r| r.root.class != class);
        references.extend(before.into_iter().cloned());
    }
}

struct Taker<'a, 'w> {
    layout: &'a Layout,
    writers: Vec<PackWriter<'w>>,
    objects: Option<Objects>,
    fresh: Fresh,
    deadline: Deadline,
}

impl Taker<'_, '_> {
    #[allow(clippy::too_many_arguments, reason = "one call site; the lists are its results")]
    fn root(
        &mut self,
        root: &Root,
        classes: &[Class],
        parent: Option<&RootRef>,
        progress: &mut dyn FnMut(Progress),
        references: &mut Vec<RootRef>,
        new_trees: &mut Vec<NewTree>,
        problems: &mut Vec<Problem>,
    ) -> Result<()> {
        let missing = |path: &PathBuf| Problem {
            root: root.name.clone(),
            path: PathBuf::new(),
            kind: ProblemKind::Unreadable,
            why: format!("{} does not exist", path.display()),
            carried: parent.is_some(),
        };
        if !classes.contains(&root.class) {
            references.extend(parent.cloned());
            return Ok(());
        }
        let base = match open_base(root)? {
            Some(base) => base,
            None => {
                problems.push(missing(&root.path));
                references.extend(parent.cloned());
                return Ok(());
            }
        };
        let of_files = parent.map(|b| b.files);
        let before = parent.filter(|b| b.root == *root && self.layout.tree_path(&b.tree).exists());
        progress(Progress { phase: Phase::Looking, files: 0, bytes: 0, of_files });
        if let Some(before) = before
            && unchanged(self.layout, &base, before, self.deadline)?
        {
            references.push(RootRef { taken: host::clock::wall(), ..before.clone() });
            return Ok(());
        }
        if self.objects.is_none() {
            self.objects = Some(Objects::load(&self.layout.packs(), &self.layout.key)?);
        }
        match self.take_root(root, &base, before, progress)? {
            Some(mut new) => {
                problems.append(&mut new.problems);
                new_trees.push(new);
            }
            None => {
                problems.push(missing(&root.path));
                references.extend(parent.cloned());
            }
        }
        Ok(())
    }

    /// Reads what the index does not vouch for. `None`: the root is missing.
    fn take_root(
        &mut self,
        root: &Root,
        base: &Base,
        before: Option<&RootRef>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Option<NewTree>> {
        let of_files = before.map(|b| b.files);
        let Some(objects) = &self.objects else { return Ok(None) };
        let (layout, fresh, deadline) = (self.layout, &self.fresh, self.deadline);
        let mut walk = Walk::new(base, Filter::of(root), false)?;
        if !walk.exists() {
            return Ok(None);
        }
        let id = seal::new_id()?;
        let index_id = seal::new_id()?;
        let mut out = Sink {
            tree: TreeWriter::tree(layout.tmp_file()?, &layout.key, id)?,
            index: TreeWriter::index(layout.tmp_file()?, &layout.key, index_id, id)?,
            before: before.and_then(|b| layout.tree(b).ok()),
            waiting: BTreeMap::new(),
            next: 0,
            entries: 0,
            files: 0,
            bytes: 0,
            problems: Vec::new(),
        };
        let mut known = Known::open(layout, root);
        let tmp = layout.tmp();
        let (to_work, batches) = mpsc::channel::<Batch>();
        let batches = Mutex::new(batches);
        let (to_main, results) = mpsc::channel::<Done>();
        std::thread::scope(|scope| -> Result<()> {
            for writer in &mut self.writers {
                let (batches, to_main, tmp) = (&batches, to_main.clone(), &tmp);
                scope.spawn(move || {
                    let mut reader = Reader::new(base, root, &layout.key, Some(tmp), deadline);
                    loop {
                        let next = batches.lock().unwrap_or_else(PoisonError::into_inner).recv();
                        let Ok((number, items)) = next else { return };
                        let got = work(&mut reader, writer, objects, fresh, items);
                        let failed = got.is_err();
                        if to_main.send((number, got)).is_err() || failed {
                            return;
                        }
                    }
                });
            }
            drop(to_main);
            let mut sent = 0u64;
            let mut received = 0u64;
            let (mut batch, mut batch_bytes) = (Vec::new(), 0u64);
            let result = (|| -> Result<()> {
                loop {
                    let step = walk.next()?;
                    let last = step.is_none();
                    match step {
                        Some(Step::Entry(found)) => {
                            if found.is_companion
                                && content::has_databases(root.class)
                                && base_is_database(base, &found.path)
                            {
                                continue;
                            }
                            batch_bytes += found.stat.size;
                            batch.push(known.item(found, objects));
                        }
                        Some(Step::Closed(path, e)) => out.problems.push(Problem {
                            root: root.name.clone(),
                            path: to_path(&path),
                            kind: ProblemKind::Unreadable,
                            why: format!("the directory cannot be listed: {}", std::io::Error::from(e)),
                            carried: false,
                        }),
                        None => {}
                    }
                    if batch.len() >= BATCH_ENTRIES || batch_bytes >= BATCH_BYTES || last && !batch.is_empty()
                    {
                        if deadline.passed() {
                            return Err(late("taking a snapshot"));
                        }
                        while sent - received >= MAX_UNDER_WAY {
                            out.accept(receive(&results)?)?;
                            received += 1;
                        }
                        let full = std::mem::take(&mut batch);
                        batch_bytes = 0;
                        to_work.send((sent, full)).map_err(|_| workers_gone())?;
                        sent += 1;
                        let (files, bytes) = (out.files, out.bytes);
                        progress(Progress { phase: Phase::Storing, files, bytes, of_files });
                    }
                    if last {
                        break;
                    }
                }
                while received < sent {
                    out.accept(receive(&results)?)?;
                    received += 1;
                }
                Ok(())
            })();
            drop(to_work);
            // A worker's own error says more than that it is gone.
            match result {
                Err(e) if e.what == WORKERS_GONE => {
                    Err(results.into_iter().find_map(|(_, r)| r.err()).unwrap_or(e))
                }
                other => other,
            }
        })?;
        let reference = RootRef {
            root: root.clone(),
            tree: hex::encode(&id),
            entries: out.entries,
            files: out.files,
            bytes: out.bytes,
            taken: host::clock::wall(),
        };
        let same = out.is_same();
        let (tree, mut index) = (out.tree.finish()?, out.index.finish()?);
        if let Some(before) = before.filter(|_| same) {
            index = crate::compare::rebase(layout, &index, before.tree_id()?)?;
            let reference = RootRef { taken: reference.taken, ..before.clone() };
            return Ok(Some(NewTree { reference, tree: None, index, problems: out.problems }));
        }
        Ok(Some(NewTree { reference, tree: Some(tree), index, problems: out.problems }))
    }
}

const WORKERS_GONE: &str = "reading the node's files";

fn workers_gone() -> Error {
    Error::new(Kind::System, WORKERS_GONE, "a worker ended early")
}

fn receive(results: &mpsc::Receiver<Done>) -> Result<(u64, Vec<Entry>, Vec<Problem>)> {
    let (number, got) = results.recv().map_err(|_| workers_gone())?;
    let (entries, problems) = got?;
    Ok((number, entries, problems))
}

fn work(
    reader: &mut Reader<'_>,
    writer: &mut PackWriter<'_>,
    objects: &Objects,
    fresh: &Fresh,
    items: Vec<Item>,
) -> Result<(Vec<Entry>, Vec<Problem>)> {
    let domain = content::domain(reader.root.class);
    let (mut entries, mut problems) = (Vec::with_capacity(items.len()), Vec::new());
    for item in items {
        let found = match item {
            Item::Known(entry) => {
                entries.push(entry);
                continue;
            }
            Item::Read(found) => found,
        };
        let mut put = |name, bytes: &[u8]| {
            if objects.has(&name) || !fresh.claim(name) { Ok(()) } else { writer.add(name, domain, bytes) }
        };
        match reader.read(&found, &mut put)? {
            content::Read::Entry(e) => entries.push(e),
            content::Read::Trouble(e, p) => {
                entries.extend(e);
                problems.push(p);
            }
            content::Read::Gone => {}
        }
    }
    Ok((entries, problems))
}

/// Receives batches in any order and writes them in the right one.
struct Sink {
    tree: TreeWriter,
    index: TreeWriter,
    /// The manifest before, for as long as this one is the same.
    before: Option<TreeReader>,
    waiting: BTreeMap<u64, Vec<Entry>>,
    next: u64,
    entries: u64,
    files: u64,
    bytes: u64,
    problems: Vec<Problem>,
}

impl Sink {
    fn compare(&mut self, entry: &Entry) {
        let Some(before) = &mut self.before else { return };
        let same = matches!(before.next(), Ok(Some(was)) if was == Entry { live: was.live, ..entry.clone() });
        if !same {
            self.before = None;
        }
    }

    /// Whether the manifest before held exactly the same.
    fn is_same(&mut self) -> bool {
        self.before.as_mut().is_some_and(|b| matches!(b.next(), Ok(None)))
    }

    fn accept(&mut self, (number, entries, problems): (u64, Vec<Entry>, Vec<Problem>)) -> Result<()> {
        self.problems.extend(problems);
        // One damaged database must not be lost among many small troubles.
        self.problems.sort_by_key(|p| p.kind != ProblemKind::CorruptDatabase);
        self.problems.truncate(MAX_PROBLEMS);
        self.waiting.insert(number, entries);
        while let Some(entries) = self.waiting.remove(&self.next) {
            for entry in &entries {
                self.compare(entry);
                self.tree.push(entry)?;
                self.index.push(entry)?;
                self.entries += 1;
                if entry.kind == EntryKind::File {
                    self.files += 1;
                    self.bytes += entry.size;
                }
            }
            self.next += 1;
        }
        Ok(())
    }
}

/// What the index knows, merged with a walk.
pub(crate) struct Known {
    index: Option<TreeReader>,
}

impl Known {
    /// A damaged or missing index knows nothing; everything is then read.
    pub(crate) fn open(layout: &Layout, root: &Root) -> Known {
        Known { index: TreeReader::index(&layout.index_path(&root.name), &layout.key).ok() }
    }

    /// The index's entry for a path, when asked in the walk's order.
    pub(crate) fn at(&mut self, path: &[u8]) -> Option<Entry> {
        let index = self.index.as_mut()?;
        loop {
            match index.peek() {
                Ok(Some(e)) => match compare_paths(&e.path, path) {
                    Ordering::Less => {
                        let _ = index.next();
                    }
                    Ordering::Equal => return index.next().ok().flatten(),
                    Ordering::Greater => return None,
                },
                Ok(None) => return None,
                Err(_) => {
                    self.index = None;
                    return None;
                }
            }
        }
    }

    fn item(&mut self, found: Found, objects: &Objects) -> Item {
        match self.at(&found.path) {
            Some(entry)
                if content::vouches(&entry, &found)
                    && entry.kind != EntryKind::Dir
                    && entry.runs.iter().all(|r| objects.has(&r.name)) =>
            {
                Item::Known(entry)
            }
            Some(_) | None => Item::Read(found),
        }
    }
}

/// Whether a root is, entry for entry, what the index says and the manifest holds: then nothing is written at all.
fn unchanged(layout: &Layout, base: &Base, before: &RootRef, deadline: Deadline) -> Result<bool> {
    let Ok(mut index) = TreeReader::index(&layout.index_path(&before.root.name), &layout.key) else {
        return Ok(false);
    };
    if index.basis != before.tree_id()? {
        return Ok(false);
    }
    let mut walk = Walk::new(base, Filter::of(&before.root), true)?;
    let databases = content::has_databases(before.root.class);
    let mut count = 0u64;
    while let Some(step) = walk.next()? {
        count += 1;
        if count.is_multiple_of(4096) && deadline.passed() {
            return Err(late("looking for changes"));
        }
        let Step::Entry(found) = step else { return Ok(false) };
        if found.is_companion && databases && base_is_database(base, &found.path) {
            continue;
        }
        match index.next() {
            Ok(Some(e)) if e.path == found.path && content::vouches(&e, &found) => {}
            Ok(_) | Err(_) => return Ok(false),
        }
    }
    Ok(matches!(index.next(), Ok(None)))
}

/// Whether the file that a `-wal`, `-shm` or `-journal` belongs to is a database.
pub(crate) fn base_is_database(base: &Base, path: &[u8]) -> bool {
    let Some(main) = crate::walk::COMPANIONS.iter().find_map(|c| path.strip_suffix(*c)) else { return false };
    let Ok(fd) = base.open_at(main, rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK) else {
        return false;
    };
    let mut head = [0; 16];
    matches!(rustix::io::pread(&fd, &mut head[..], 0), Ok(16)) && &head == crate::database::MAGIC
}

pub(crate) fn to_path(path: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    PathBuf::from(std::ffi::OsStr::from_bytes(path))
}

/// Opens where a root lies; `None` when the directory it lies in is missing.
pub(crate) fn open_base(root: &Root) -> Result<Option<Base>> {
    match Base::open(&root.path) {
        Ok(base) => Ok(Some(base)),
        Err(NoBase::ParentMissing) => Ok(None),
        Err(NoBase::Other(e)) => Err(no_base(root, e)),
    }
}

pub(crate) fn no_base(root: &Root, e: Errno) -> Error {
    let error = Error::io(
        format!("opening root `{}` at {}", root.name, root.path.display()),
        &std::io::Error::from(e),
    );
    // The kernel names a link in the last place a non-directory.
    let real = root.path.parent().and_then(|p| Some(p.canonicalize().ok()? == p)).unwrap_or(true);
    if e == Errno::LOOP || e == Errno::NOTDIR && !real {
        error.hint("a symlink lies on the way; name the real path in the configuration")
    } else {
        error
    }
}
