//! Putting live trees right, in two phases.
//!
//! First everything that will be needed is written beside its place under a name of ours, object by object, each
//! proven by its seal and its hash, and made durable. Until then nothing live has changed, and any doubt ends here.
//! Only then is each piece exchanged with what stands in its place, and what stood there goes to the quarantine. A
//! crash between the two leaves the old or the new entry at every path, and our leftovers go to the quarantine next
//! time. A database's `-wal` and `-shm` leave before the main file changes, so that no log meets a stranger. A root that
//! is gone together with the roots that lie in it is built with them and appears with all of them at once.

use crate::beneath::{Base, DIR, NoBase, OWN_PREFIX, Stat, chmod_handle, handle, open_beneath};
use crate::compare::{self, Ids};
use crate::content::{domain, late};
use crate::elsewhere::{Elsewhere, Missed, Origin};
use crate::files::{self, Meter};
use crate::key::{self, Domain, Name};
use crate::layout::{Head, Layout, RootRef};
use crate::pack::{ObjectReader, Objects};
use crate::quarantine::Quarantine;
use crate::snapshot::{WORKERS, no_base, to_path};
use crate::tree::{Entry, EntryKind, TreeReader, compare_paths, is_safe, is_within};
use crate::walk::COMPANIONS;
use crate::{Depth, Difference, DifferenceKind, Lost, Plan, Repaired, Scope, hex};
use host::clock::Deadline;
use host::{Context, Error, Kind, Result};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering as Atomic};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

/// Up to here each file is synced by itself; beyond, the file system as a whole: syncfs waits for everybody's data.
const SYNC_EACH_FILES: usize = 64;
const BATCH_JOBS: usize = 32;
const BATCH_BYTES: u64 = 4 * 1024 * 1024;
/// Bounds open descriptors to a few hundred.
const MAX_UNDER_WAY: usize = 6;
/// Left free beyond what is written, for the node itself.
const SPACE_MARGIN_BYTES: u64 = 16 * 1024 * 1024;
/// Rounds of a repair whose differences do not fit one report.
const MAX_ROUNDS: usize = 200;
/// Lost files that are listed one by one.
const MAX_LOST: usize = 1_000;
/// Names looked at beside a root for what a crash of ours left there.
const MAX_BESIDE: usize = 100_000;

/// One root to be put right.
struct Work {
    reference: RootRef,
    ops: Vec<(Vec<u8>, DifferenceKind)>,
    leftovers: Vec<Vec<u8>>,
    /// There was more than a report holds.
    more: bool,
}

/// What phase 2 will do.
enum Step {
    /// Put `tmp` in the place of `name`, both in `dir`.
    Place { dir: Arc<OwnedFd>, tmp: Vec<u8>, path: Vec<u8>, database: bool },
    /// Move what is there to the quarantine.
    Aside { path: Vec<u8> },
    /// Put right what is right but for its attributes.
    Attributes(Box<Entry>),
}

struct Staged<'a> {
    base: Base,
    reference: &'a RootRef,
    steps: Vec<Step>,
}

impl Work {
    fn missing_whole(&self) -> bool {
        self.ops.first().is_some_and(|(path, kind)| path.is_empty() && *kind == DifferenceKind::Missing)
    }
}

impl Staged<'_> {
    /// Where a root that lies at `path` goes, if that is within the whole tree that is built for this one.
    fn place_for(&self, path: &Path) -> Option<std::result::Result<Base, Errno>> {
        let within = path.strip_prefix(&self.reference.root.path).ok().filter(|p| p.file_name().is_some())?;
        // A tree that koboshi keeps ready is somebody else's as well until it is swapped in.
        if self.reference.root.class.converges() {
            return None;
        }
        self.steps.iter().find_map(|step| match step {
            Step::Place { dir, tmp, path: top, .. } if top.is_empty() => {
                let tree = match open_beneath(dir.as_fd(), tmp, DIR, Mode::empty()) {
                    // One file.
                    Err(Errno::NOTDIR) => return None,
                    other => other,
                };
                Some(tree.and_then(|tree| Base::making_parents_in(tree, within, path)))
            }
            Step::Place { .. } | Step::Aside { .. } | Step::Attributes(_) => None,
        })
    }
}

pub(crate) fn run(
    layout: &Layout,
    head: &Head,
    scope: Scope<'_>,
    plan: &Plan,
    deadline: Deadline,
) -> Result<Repaired> {
    let meter = Meter::start();
    let _alone = layout.repair_lock(deadline)?;
    let _reading = layout.read_lock();
    let mut done = Repaired { snapshot: head.info.id.clone(), ..Repaired::default() };
    for _ in 0..MAX_ROUNDS {
        let works = works(layout, head, scope, plan, deadline)?;
        let more = works.iter().any(|w| w.more);
        let worked = round(layout, head, &works, plan, &mut done, deadline)?;
        if !more || !worked {
            break;
        }
    }
    done.cost = meter.cost(0);
    Ok(done)
}

fn ids(plan: &Plan) -> Ids {
    Ids { uids: plan.uids.clone(), gids: plan.gids.clone() }
}

/// The root as it lies on this host now.
fn relocated(reference: &RootRef, plan: &Plan) -> RootRef {
    let mut r = reference.clone();
    if let Some((_, path)) = plan.relocate.iter().find(|(name, _)| *name == r.root.name) {
        r.root.path.clone_from(path);
    }
    r
}

fn open_root(reference: &RootRef) -> Result<Option<Base>> {
    match Base::open(&reference.root.path) {
        Ok(b) => Ok(Some(b)),
        Err(NoBase::ParentMissing) => Ok(None),
        Err(NoBase::Other(e)) => Err(no_base(&reference.root, e)),
    }
}

fn works(
    layout: &Layout,
    head: &Head,
    scope: Scope<'_>,
    plan: &Plan,
    deadline: Deadline,
) -> Result<Vec<Work>> {
    let mut works: Vec<Work> = Vec::new();
    match scope {
        Scope::Classes(classes) => {
            for reference in head.trees.iter().filter(|t| classes.contains(&t.root.class)) {
                let reference = relocated(reference, plan);
                let base = open_root(&reference)?;
                let looked =
                    compare::root(layout, &reference, base.as_ref(), &ids(plan), Depth::Stat, deadline)?;
                works.push(work(reference, looked.differences.iter(), looked.leftovers));
            }
        }
        Scope::Differences(list) => {
            let mut by_root: BTreeMap<&str, Vec<&Difference>> = BTreeMap::new();
            for d in list {
                by_root.entry(&d.root).or_default().push(d);
            }
            for (name, list) in by_root {
                let Some(reference) = head.trees.iter().find(|t| t.root.name == name) else {
                    return Err(Error::new(
                        Kind::NotFound,
                        format!("repairing root `{name}`"),
                        format!("snapshot {} does not hold it", head.info.id),
                    ));
                };
                let reference = relocated(reference, plan);
                let everything = list.iter().any(|d| d.kind == DifferenceKind::TooMany);
                if everything {
                    let base = open_root(&reference)?;
                    let looked =
                        compare::root(layout, &reference, base.as_ref(), &ids(plan), Depth::Stat, deadline)?;
                    works.push(work(reference, looked.differences.iter(), looked.leftovers));
                } else {
                    works.push(work(reference, list.into_iter(), Vec::new()));
                }
            }
        }
    }
    for w in &works {
        if let Some((path, _)) = w.ops.iter().find(|(p, _)| !is_safe(p)) {
            return Err(Error::new(
                Kind::Usage,
                format!("repairing root `{}`", w.reference.root.name),
                format!("`{}` leads out of it", to_path(path).display()),
            ));
        }
    }
    Ok(works)
}

fn work<'d>(reference: RootRef, list: impl Iterator<Item = &'d Difference>, leftovers: Vec<Vec<u8>>) -> Work {
    let converges = reference.root.class.converges();
    let mut ops = Vec::new();
    let mut more = false;
    for d in list {
        match d.kind {
            DifferenceKind::TooMany => more = true,
            // What the snapshot does not know in a class of the user's is the user's.
            DifferenceKind::Extra if !converges => {}
            DifferenceKind::Extra
            | DifferenceKind::Missing
            | DifferenceKind::Changed
            | DifferenceKind::Emptied
            | DifferenceKind::ModeOrOwner
            | DifferenceKind::Attributes
            | DifferenceKind::HardLinked
            | DifferenceKind::KindChanged
            | DifferenceKind::LinkTarget => ops.push((d.path.as_os_str().as_bytes().to_vec(), d.kind)),
        }
    }
    ops.sort_by(|a, b| compare_paths(&a.0, &b.0));
    ops.dedup_by(|a, b| a.0 == b.0);
    Work { reference, ops, leftovers, more }
}

/// Both phases over all roots; false when there was nothing to do.
fn round(
    layout: &Layout,
    head: &Head,
    works: &[Work],
    plan: &Plan,
    done: &mut Repaired,
    deadline: Deadline,
) -> Result<bool> {
    let mut quarantine = Quarantine::new(&plan.quarantine);
    for work in works {
        aside_leftovers(layout, work, &mut quarantine)?;
    }
    if works.iter().all(|w| w.ops.is_empty()) {
        return Ok(false);
    }
    // Proven whole before anything relies on it.
    for work in works {
        layout.prove_tree(&work.reference)?;
    }
    done.freed += works.iter().map(free).sum::<u64>();
    let objects = Objects::load(&layout.packs(), &layout.key)?;
    let now = works.iter().map(|w| &w.reference).chain(&head.trees).cloned().collect();
    let elsewhere = Elsewhere::new(layout, now, &plan.spares, deadline);
    let mut stage = Stage {
        layout,
        head,
        objects: &objects,
        elsewhere: &elsewhere,
        partial: plan.partial,
        lost: Vec::new(),
        ids: ids(plan),
        spares: &plan.spares,
        deadline,
        made: Vec::new(),
        taken: Vec::new(),
        files: AtomicU64::new(0),
        bytes: AtomicU64::new(0),
        from_live: AtomicU64::new(0),
        from_other_spare: AtomicU64::new(0),
        dirs: 0,
        links: 0,
        whole: Vec::new(),
        from_spare: Vec::new(),
    };
    let staged = match stage.all(works, &mut quarantine, done) {
        Ok(staged) => staged,
        Err(e) => {
            stage.undo();
            return Err(e);
        }
    };
    done.files += stage.files.load(Atomic::Relaxed);
    done.bytes += stage.bytes.load(Atomic::Relaxed);
    done.objects_from_live += stage.from_live.load(Atomic::Relaxed);
    done.objects_from_spare += stage.from_other_spare.load(Atomic::Relaxed);
    done.lost_files = stage.lost.len() as u64;
    stage.lost.truncate(MAX_LOST);
    done.lost = std::mem::take(&mut stage.lost);
    done.dirs += stage.dirs;
    done.links += stage.links;
    done.whole_roots.append(&mut stage.whole);
    let swapped_in = std::mem::take(&mut stage.from_spare);
    for root in &staged {
        place(root, &mut quarantine, done)?;
    }
    for name in &swapped_in {
        // Without it the next look reads the whole tree, before the gateway may start.
        let _ = compare::vouch_as(layout, &spare_name(name), name);
    }
    done.from_spare.extend(swapped_in);
    done.quarantined += quarantine.moved;
    quarantine.sync()?;
    Ok(staged.iter().any(|s| !s.steps.is_empty()))
}

/// Makes changeable again what is to be changed and was made immutable (`chattr +i`): it is damaged or in the way, and not
/// even root could put it right. How many there were.
fn free(work: &Work) -> u64 {
    if !rustix::process::geteuid().is_root() {
        return 0;
    }
    let Ok(Some(base)) = open_root(&work.reference) else { return 0 };
    let mut freed = 0;
    let mut seen: Option<&[u8]> = None;
    for (path, _) in &work.ops {
        let Ok((dir, name)) = base.parent_of(path) else { continue };
        let parent = &path[..path.iter().rposition(|b| *b == b'/').unwrap_or(0)];
        if seen != Some(parent) || path.is_empty() {
            seen = Some(parent);
            freed += u64::from(host::immutable::lift(dir.as_fd(), b"."));
        }
        freed += u64::from(host::immutable::lift(dir.as_fd(), &name));
    }
    freed
}

/// What the names of our unfinished pieces begin with: ours, and of this store.
pub(crate) fn own_prefix(layout: &Layout) -> Vec<u8> {
    [OWN_PREFIX, &hex::encode(&layout.key.id()).into_bytes()].concat()
}

/// What an earlier repair that died left behind: half-made pieces, or the old ones already exchanged.
fn aside_leftovers(layout: &Layout, work: &Work, quarantine: &mut Quarantine<'_>) -> Result<()> {
    let Some(base) = open_root(&work.reference)? else { return Ok(()) };
    aside(layout, &base, &work.reference.root.name, &work.leftovers, quarantine)
}

/// Moves what is ours of these, and of what lies beside the root, to the quarantine.
pub(crate) fn aside(
    layout: &Layout,
    base: &Base,
    name: &str,
    leftovers: &[Vec<u8>],
    quarantine: &mut Quarantine<'_>,
) -> Result<()> {
    let ours = own_prefix(layout);
    for path in leftovers {
        let (dir, last) = match base.parent_of(path) {
            Ok(p) => p,
            Err(_) => continue,
        };
        if last.starts_with(&ours) {
            quarantine.take(dir.as_fd(), &last, name, path)?;
        }
    }
    let mut buffer = [std::mem::MaybeUninit::uninit(); 8192];
    let top = rustix::fs::openat(base.top(), c".", DIR, Mode::empty())
        .context(|| format!("listing beside {name}"))?;
    let mut names = Vec::new();
    let mut listing = rustix::fs::RawDir::new(&top, &mut buffer);
    for _ in 0..MAX_BESIDE {
        let Some(Ok(entry)) = listing.next() else { break };
        if entry.file_name().to_bytes().starts_with(&ours) {
            names.push(entry.file_name().to_bytes().to_vec());
        }
    }
    for last in names {
        quarantine.take(base.top(), &last, name, &last)?;
    }
    Ok(())
}

struct Job {
    entry: Entry,
    dir: Arc<OwnedFd>,
    name: Vec<u8>,
}

/// A file whose bytes nobody has: its name in the directory it was to be in, and its path.
struct Gone {
    name: Vec<u8>,
    path: Vec<u8>,
    database: bool,
    why: String,
}

struct Stage<'a> {
    layout: &'a Layout,
    head: &'a Head,
    objects: &'a Objects,
    elsewhere: &'a Elsewhere<'a>,
    partial: bool,
    lost: Vec<Lost>,
    ids: Ids,
    spares: &'a [(String, std::path::PathBuf)],
    deadline: Deadline,
    /// Everything made under our own names, for undoing.
    made: Vec<(Arc<OwnedFd>, Vec<u8>)>,
    /// Spares taken from where they stood, for putting back: (their directory, their name, ours, our name).
    taken: Vec<Borrowed>,
    files: AtomicU64,
    bytes: AtomicU64,
    from_live: AtomicU64,
    from_other_spare: AtomicU64,
    dirs: u64,
    links: u64,
    whole: Vec<String>,
    from_spare: Vec<String>,
}

/// A spare on its way: its directory and name there, ours and its name here.
type Borrowed = (OwnedFd, Vec<u8>, Arc<OwnedFd>, Vec<u8>);

/// Sends jobs to the workers and counts what is under way.
struct Feed {
    to_work: mpsc::Sender<Vec<Job>>,
    results: mpsc::Receiver<Result<Vec<Gone>>>,
    /// What could not be written because nobody has its bytes.
    gone: Vec<Gone>,
    jobs: Vec<Job>,
    bytes: u64,
    under_way: usize,
}

impl Feed {
    fn push(&mut self, job: Job) -> Result<()> {
        self.bytes += job.entry.size;
        self.jobs.push(job);
        if self.jobs.len() >= BATCH_JOBS || self.bytes >= BATCH_BYTES { self.send() } else { Ok(()) }
    }

    fn send(&mut self) -> Result<()> {
        if self.jobs.is_empty() {
            return Ok(());
        }
        while self.under_way >= MAX_UNDER_WAY {
            self.receive()?;
        }
        self.bytes = 0;
        self.to_work.send(std::mem::take(&mut self.jobs)).map_err(|_| ended_early())?;
        self.under_way += 1;
        Ok(())
    }

    fn receive(&mut self) -> Result<()> {
        let got = self.results.recv().map_err(|_| ended_early())?;
        self.under_way -= 1;
        self.gone.extend(got?);
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.send()?;
        while self.under_way > 0 {
            self.receive()?;
        }
        Ok(())
    }
}

fn ended_early() -> Error {
    Error::new(Kind::System, "writing files", "a worker ended early")
}

impl<'a> Stage<'a> {
    /// Phase 1 for all roots, an outer one before those that lie in it. Where the outer one is gone as a whole, the inner
    /// ones are put into what is built in its place: exchanged by itself afterwards, it would take their place.
    fn all<'w>(
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
            let mut feed =
                Feed { to_work, results, gone: Vec::new(), jobs: Vec::new(), bytes: 0, under_way: 0 };
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
    fn undo(&mut self) {
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

fn spare_name(root: &str) -> String {
    format!("spare of {root}")
}

pub(crate) fn spare_reference(reference: &RootRef, path: &Path) -> RootRef {
    let mut spare = reference.clone();
    spare.root.name = spare_name(&reference.root.name);
    spare.root.path = path.to_owned();
    spare
}

fn dup(fd: BorrowedFd<'_>) -> Result<OwnedFd> {
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

fn times(entry: &Entry) -> Timestamps {
    let (sec, nsec) = (entry.mtime_ns.div_euclid(1_000_000_000), entry.mtime_ns.rem_euclid(1_000_000_000));
    let at = Timespec { tv_sec: sec, tv_nsec: nsec };
    Timestamps { last_access: at, last_modification: at }
}

/// Gives away what is made, where that is needed; without privilege everything is ours anyway.
fn own_at(dir: BorrowedFd<'_>, name: &[u8], entry: &Entry) -> std::result::Result<(), Errno> {
    let now = Stat::at(dir, name)?;
    if (now.uid, now.gid) == (entry.uid, entry.gid) {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    permit(rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW))
}

/// Not being permitted to give a file away is no reason to leave it missing.
fn permit(r: std::result::Result<(), Errno>) -> std::result::Result<(), Errno> {
    match r {
        Err(Errno::PERM) if !rustix::process::geteuid().is_root() => Ok(()),
        other => other,
    }
}

/// Owner, attributes, mode and time of something that is opened.
fn finish(fd: BorrowedFd<'_>, entry: &Entry) -> std::result::Result<(), Errno> {
    let now = rustix::fs::fstat(fd)?;
    if (now.st_uid, now.st_gid) != (entry.uid, entry.gid) {
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        permit(rustix::fs::fchown(fd, Some(uid), Some(gid)))?;
    }
    set_xattrs(fd, entry)?;
    if now.st_mode & 0o7777 != entry.mode || entry.mode & 0o6000 != 0 {
        rustix::fs::fchmod(fd, Mode::from_raw_mode(entry.mode))?;
    }
    rustix::fs::futimens(fd, &times(entry))
}

fn set_xattrs(fd: BorrowedFd<'_>, entry: &Entry) -> std::result::Result<(), Errno> {
    for (name, value) in &entry.xattrs {
        match rustix::fs::fsetxattr(fd, &name[..], value, rustix::fs::XattrFlags::empty()) {
            // A file system or a user that cannot have them: the bytes matter more.
            Ok(()) | Err(Errno::NOTSUP | Errno::PERM) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Writes files from proven objects.
struct Writer<'a> {
    head: &'a Head,
    objects: ObjectReader<'a>,
    domain: Domain,
    deadline: Deadline,
    sync_each: bool,
    files: &'a AtomicU64,
    bytes: &'a AtomicU64,
    from_live: &'a AtomicU64,
    from_spare: &'a AtomicU64,
    elsewhere: &'a Elsewhere<'a>,
    buffer: Vec<u8>,
}

/// Writes all of a batch; with `partial`, what nobody has is said and leaves nothing behind.
fn write_all(writer: &mut Writer<'_>, jobs: &[Job], partial: bool) -> Result<Vec<Gone>> {
    let mut gone = Vec::new();
    for job in jobs {
        match writer.write(job) {
            Ok(()) => {}
            Err(e) if partial && e.kind == Kind::Corrupt => {
                let what = || format!("leaving out {}", to_path(&job.entry.path).display());
                files::remove_at(&job.dir, &job.name).context(what)?;
                let (name, path) = (job.name.clone(), job.entry.path.clone());
                gone.push(Gone { name, path, database: job.entry.database, why: e.why });
            }
            Err(e) => return Err(e),
        }
    }
    Ok(gone)
}

impl Writer<'_> {
    fn write(&mut self, job: &Job) -> Result<()> {
        let entry = &job.entry;
        let what = || format!("restoring {}", to_path(&entry.path).display());
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // Nobody else may read it before it has its owner.
        let fd = rustix::fs::openat(&job.dir, &job.name, flags, Mode::from_raw_mode(0o600)).context(what)?;
        let file = File::from(fd);
        let chunk = u64::from(entry.chunk_bytes());
        let mut at = 0u64;
        let mut hole = false;
        for run in &entry.runs {
            let length = usize::try_from((entry.size - at).min(chunk)).unwrap_or(0);
            self.buffer.clear();
            self.object(&run.name, length, at, entry)?;
            // Zeros of a larger file are left as a hole, however many there are.
            hole = entry.size > chunk && self.buffer.iter().all(|b| *b == 0);
            if hole {
                at = at.saturating_add(u64::from(run.count) * chunk).min(entry.size);
                continue;
            }
            for _ in 0..run.count {
                if self.deadline.passed() {
                    return Err(late(&what()));
                }
                let left = usize::try_from((entry.size - at).min(chunk)).unwrap_or(0);
                let Some(bytes) = self.buffer.get(..left) else { break };
                file.write_all_at(bytes, at).context(what)?;
                at += left as u64;
            }
        }
        if at != entry.size {
            return Err(Error::new(
                Kind::Corrupt,
                what(),
                "its objects are not as long as the manifest says",
            ));
        }
        if hole {
            file.set_len(entry.size).context(what)?;
        }
        finish(file.as_fd(), entry).context(what)?;
        if self.sync_each {
            files::sync_file(&file).context(what)?;
        }
        self.files.fetch_add(1, Atomic::Relaxed);
        self.bytes.fetch_add(entry.size, Atomic::Relaxed);
        Ok(())
    }

    /// One proven object in the buffer: from the store, or from any other place that still has the same bytes.
    fn object(&mut self, name: &Name, length: usize, at: u64, entry: &Entry) -> Result<()> {
        let why = match self.objects.read(name, self.domain, &mut self.buffer) {
            Ok(()) if self.buffer.len() == length => return Ok(()),
            Ok(()) => "its length is not what the manifest says".to_string(),
            Err(why) => why,
        };
        let missed = Missed { name: *name, domain: self.domain, length, file_bytes: entry.size, at };
        match self.elsewhere.find(&missed, &mut self.buffer)? {
            Some(Origin::Live) => {
                self.from_live.fetch_add(1, Atomic::Relaxed);
                return Ok(());
            }
            Some(Origin::Spare) => {
                self.from_spare.fetch_add(1, Atomic::Relaxed);
                return Ok(());
            }
            None => {}
        }
        Err(Error::new(
            Kind::Corrupt,
            format!("restoring {} from snapshot {}", to_path(&entry.path).display(), self.head.info.id),
            format!(
                "object {} cannot be proven: {why}, and no other file here has the same bytes",
                hex::encode(&name[..8])
            ),
        )
        .hint("an older snapshot may hold it; `koboshi snapshot verify` shows what else is damaged"))
    }
}

/// Makes durable what was written under our own names, on every file system concerned.
fn sync_file_systems(staged: &Staged<'_>) -> Result<()> {
    let what = || format!("syncing {}", staged.base.path.display());
    let mut seen = Vec::new();
    for step in &staged.steps {
        let Step::Place { dir, .. } = step else { continue };
        let dev = rustix::fs::fstat(dir).context(what)?.st_dev;
        if !seen.contains(&dev) {
            seen.push(dev);
            files::sync_file_system(dir).context(what)?;
        }
    }
    Ok(())
}

/// Phase 2 for one root: everything it needs stands ready and durable.
fn place(root: &Staged<'_>, quarantine: &mut Quarantine<'_>, done: &mut Repaired) -> Result<()> {
    let name = &root.reference.root.name;
    let what = |path: &[u8]| format!("putting {} in place", root.base.path.join(to_path(path)).display());
    let mut dirs: BTreeMap<(u64, u64), OwnedFd> = BTreeMap::new();
    let mut touched = |dir: BorrowedFd<'_>| -> Result<()> {
        let s = rustix::fs::fstat(dir).context(|| "syncing a directory".into())?;
        let s = Stat::of(&s);
        if dirs.len() <= SYNC_EACH_FILES && !dirs.contains_key(&(s.dev, s.ino)) {
            dirs.insert((s.dev, s.ino), dup(dir)?);
        }
        Ok(())
    };
    for step in &root.steps {
        match step {
            Step::Place { dir, tmp, path, database } => {
                let (_, last) = match path.iter().rposition(|b| *b == b'/') {
                    _ if path.is_empty() => root.base.parent_of(path).context(|| what(path))?,
                    Some(cut) => (dup(dir.as_fd())?, path[cut + 1..].to_vec()),
                    None => (dup(dir.as_fd())?, path.clone()),
                };
                if *database {
                    for ending in COMPANIONS {
                        let companion = [&last[..], ending].concat();
                        if Stat::at(dir.as_fd(), &companion).is_ok() {
                            quarantine.take(dir.as_fd(), &companion, name, &[&path[..], ending].concat())?;
                        }
                    }
                    // The log must be gone for certain before a main file that it does not belong to appears.
                    files::sync_opened(dir).context(|| what(path))?;
                }
                exchange(dir.as_fd(), tmp, &last, quarantine, name, path)?;
                touched(dir.as_fd())?;
            }
            Step::Aside { path } => {
                let (dir, last) = match root.base.parent_of(path) {
                    Err(Errno::NOENT | Errno::NOTDIR) => continue,
                    other => other.context(|| what(path))?,
                };
                quarantine.take(dir.as_fd(), &last, name, path)?;
                touched(dir.as_fd())?;
            }
            Step::Attributes(_) => {}
        }
    }
    // Last and from the deepest up: a directory may come to forbid entering itself.
    for step in root.steps.iter().rev() {
        let Step::Attributes(entry) = step else { continue };
        attributes(&root.base, entry).context(|| what(&entry.path))?;
        done.attributes += 1;
    }
    if dirs.len() > SYNC_EACH_FILES {
        files::sync_file_system(root.base.top()).context(|| what(b""))?;
    } else {
        for dir in dirs.values() {
            files::sync_opened(dir).context(|| what(b""))?;
        }
    }
    Ok(())
}

/// Exchanges `tmp` with what stands at `last`, which then goes to the quarantine: no moment without either.
fn exchange(
    dir: BorrowedFd<'_>,
    tmp: &[u8],
    last: &[u8],
    quarantine: &mut Quarantine<'_>,
    root: &str,
    path: &[u8],
) -> Result<()> {
    let what = || format!("putting {} in place", to_path(path).display());
    match files::rename_at(dir, tmp, dir, last, RenameFlags::NOREPLACE) {
        Ok(()) => return Ok(()),
        Err(Errno::EXIST) => {}
        // A file system without such renames.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
            if Stat::at(dir, last).is_ok() {
                quarantine.take(dir, last, root, path)?;
            }
            return files::rename_at(dir, tmp, dir, last, RenameFlags::empty()).context(what);
        }
        Err(e) => return Err(Error::io(what(), &std::io::Error::from(e))),
    }
    match files::rename_at(dir, tmp, dir, last, RenameFlags::EXCHANGE) {
        Ok(()) => quarantine.take(dir, tmp, root, path),
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP | Errno::XDEV) => {
            quarantine.take(dir, last, root, path)?;
            files::rename_at(dir, tmp, dir, last, RenameFlags::empty()).context(what)
        }
        Err(e) => Err(Error::io(what(), &std::io::Error::from(e))),
    }
}

fn attributes(base: &Base, entry: &Entry) -> std::result::Result<(), Errno> {
    let (dir, last) = base.parent_of(&entry.path)?;
    let fd = handle(dir.as_fd(), &last)?;
    let s = Stat::of(&rustix::fs::fstat(&fd)?);
    let right = match entry.kind {
        EntryKind::Dir => s.is_dir(),
        EntryKind::File => s.is_file() && s.nlink <= 1,
        EntryKind::Link => s.is_link(),
        EntryKind::Special | EntryKind::Unread => false,
    };
    if !right {
        // Not what it was a moment ago; the next look decides.
        return Ok(());
    }
    if (s.uid, s.gid) != (entry.uid, entry.gid) {
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        permit(rustix::fs::chownat(
            &fd,
            c"",
            Some(uid),
            Some(gid),
            AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
        ))?;
    }
    if entry.kind == EntryKind::Link {
        return Ok(());
    }
    chmod_handle(fd.as_fd(), entry.mode)?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(open) = rustix::fs::openat(&dir, &last, flags, Mode::empty()) else { return Ok(()) };
    let now = crate::content::xattrs(open.as_fd());
    for (name, _) in now.iter().filter(|(n, _)| !entry.xattrs.iter().any(|(e, _)| e == n)) {
        match rustix::fs::fremovexattr(&open, &name[..]) {
            Ok(()) | Err(Errno::NOTSUP | Errno::PERM) => {}
            Err(e) => return Err(e),
        }
    }
    set_xattrs(open.as_fd(), entry)?;
    rustix::fs::futimens(&open, &times(entry)).or(Ok(()))
}

/// Writes whole roots as plain trees where nothing stands yet.
pub(crate) fn export(
    layout: &Layout,
    head: &Head,
    classes: &[engine::words::Class],
    dest: &Path,
    deadline: Deadline,
) -> Result<Repaired> {
    let chosen: Vec<&RootRef> = head.trees.iter().filter(|t| classes.contains(&t.root.class)).collect();
    let mut plan = Plan { quarantine: dest.join(".koboshi-quarantine"), ..Plan::default() };
    let mut list = Vec::new();
    for r in chosen {
        let path = dest.join(&r.root.name);
        if path.symlink_metadata().is_ok() {
            return Err(Error::new(
                Kind::Usage,
                format!("exporting to {}", path.display()),
                "it exists already",
            ));
        }
        plan.relocate.push((r.root.name.clone(), path));
        if r.entries > 0 {
            list.push(compare::difference(r, b"", DifferenceKind::Missing));
        }
    }
    run(layout, head, Scope::Differences(&list), &plan, deadline)
}
