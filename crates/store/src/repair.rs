//! Putting live trees right, in two phases.
//!
//! First everything that will be needed is written beside its place under a name of ours, object by object, each
//! proven by its seal and its hash, and made durable. Until then nothing live has changed, and any doubt ends here.
//! Only then is each piece exchanged with what stands in its place, and what stood there goes to the quarantine. A
//! crash between the two leaves the old or the new entry at every path, and our leftovers go to the quarantine next
//! time. A database's `-wal` and `-shm` leave before the main file changes, so that no log meets a stranger. A root that
//! is gone together with the roots that lie in it is built with them and appears with all of them at once.

mod free;
mod place;
mod stage;
mod write;

use crate::beneath::{Base, DIR, NoBase, OWN_PREFIX, open_beneath};
use crate::compare::{self, Ids};
use crate::elsewhere::Elsewhere;
use crate::files::Meter;
use crate::layout::{Head, Layout, RootRef};
use crate::pack::Objects;
use crate::quarantine::Quarantine;
use crate::snapshot::{no_base, to_path};
use crate::tree::{Entry, compare_paths, is_safe};
use crate::{Depth, Difference, DifferenceKind, Plan, Repaired, Scope, hex};
use free::Freed;
use host::clock::Deadline;
use host::{Context, Error, Kind, Result};
use place::place;
use rustix::fs::Mode;
use rustix::io::Errno;
use stage::Stage;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) use stage::spare_reference;

/// Up to here each file is synced by itself; beyond, the file system as a whole: syncfs waits for everybody's data.
const SYNC_EACH_FILES: usize = 64;
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
    let freed = Freed::all(works);
    let staged = match stage.all(works, &mut quarantine, done) {
        Ok(staged) => staged,
        Err(e) => {
            stage.undo();
            freed.undo();
            return Err(e);
        }
    };
    done.freed.extend(freed.paths(&stage.lost));
    done.files += stage.files.load(Ordering::Relaxed);
    done.bytes += stage.bytes.load(Ordering::Relaxed);
    done.objects_from_live += stage.from_live.load(Ordering::Relaxed);
    done.objects_from_spare += stage.from_other_spare.load(Ordering::Relaxed);
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
        let _ = compare::vouch_as(layout, &stage::spare_name(name), name);
    }
    done.from_spare.extend(swapped_in);
    done.quarantined += quarantine.moved;
    quarantine.sync()?;
    Ok(staged.iter().any(|s| !s.steps.is_empty()))
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
