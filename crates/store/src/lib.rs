//! Remembers: what a node consisted of, sealed, and brings it back proven.
//!
//! Three promises. **Nothing unproven reaches the node**: a byte is put in place only after its seal opened and its
//! hash was right. **Nothing is deleted first**: what is replaced or removed is moved to a quarantine. **A power cut
//! leaves the older or the newer state, whole**: everything is written beside, synced, and renamed.
//!
//! The layout is described in `docs/store-format.md`, so that a person can restore without this code.

mod beneath;
mod compare;
mod content;
mod database;
mod elsewhere;
#[cfg(feature = "fault")]
#[doc(hidden)]
pub mod fault;
mod files;
mod gone;
mod heal;
mod hex;
mod key;
mod layout;
mod leftovers;
pub mod lend;
mod note;
mod pack;
mod prune;
mod quarantine;
mod repair;
mod scrub;
mod seal;
mod snapshot;
mod spare;
mod stamp;
mod tree;
mod trim;
mod types;
mod verify;
mod walk;

use engine::words::Class;
use host::clock::Deadline;
use host::{Error, Kind, Result};
use key::Key;
use layout::{Head, Layout};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use note::{read_note, write_note};
pub use types::*;

/// How long a change of trust waits for a snapshot that is being taken.
const TRUST_WAIT_MS: u64 = 60_000;

/// Packs that are read of to see whether the disk answers.
const ASKED_PACKS: usize = 3;

/// Whether the disk of the store at `dir` gives what is asked of it: a few bytes of some packs, from the disk itself and
/// not from memory. On a disk that is stuck this does not return; call it where that costs nothing.
#[must_use]
pub fn disk_answers(dir: &Path) -> bool {
    use std::os::unix::fs::FileExt;
    let Ok(packs) = std::fs::read_dir(dir.join("packs")) else { return false };
    packs.flatten().take(ASKED_PACKS).all(|pack| {
        let Ok(file) = std::fs::File::open(pack.path()) else { return false };
        // What lies in memory says nothing of the disk.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        let middle = file.metadata().map_or(0, |m| m.len() / 2);
        file.read_at(&mut [0; 512], middle).is_ok()
    })
}

/// A store directory and its key. Many may read at once; writers take a lock for the length of one operation, and a
/// repair never waits for a snapshot.
#[derive(Debug)]
pub struct Store {
    layout: Layout,
}

impl Store {
    /// Opens the store, making directory and key file if both are missing. A key that is missing while the store
    /// exists is an error: a new one could not open what the old one sealed.
    pub fn open_or_create(dir: &Path, key_file: &Path) -> Result<Store> {
        let what = || format!("opening the store {}", dir.display());
        if key_file.starts_with(dir) {
            return Err(Error::new(Kind::Usage, what(), "its key file lies within it")
                .hint("keep the key elsewhere: whoever copies the store must not get the key along"));
        }
        let has_snapshots = dir.join("packs").is_dir()
            && std::fs::read_dir(dir.join("snapshots")).is_ok_and(|mut d| d.next().is_some());
        let key =
            if key_file.exists() || has_snapshots { Key::read(key_file)? } else { Key::create(key_file)? };
        Ok(Store { layout: Layout::create(dir, key)? })
    }

    /// Opens a store that exists.
    pub fn open(dir: &Path, key_file: &Path) -> Result<Store> {
        Ok(Store { layout: Layout::open(dir, Key::read(key_file)?)? })
    }

    /// Where it lies.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.layout.dir
    }

    /// Takes a snapshot and publishes it as a candidate.
    pub fn snapshot(
        &self,
        request: &Request<'_>,
        progress: &mut dyn FnMut(Progress),
        deadline: Deadline,
    ) -> Result<SnapshotInfo> {
        snapshot::take(&self.layout, request, progress, deadline)
    }

    /// Every snapshot that can be read, oldest first.
    pub fn list(&self) -> Result<Vec<SnapshotInfo>> {
        Ok(self.layout.heads()?.0.into_iter().map(|h| h.info).collect())
    }

    /// Snapshots whose record cannot be read, and why.
    pub fn unreadable(&self) -> Result<Vec<(String, Error)>> {
        Ok(self.layout.heads()?.1)
    }

    /// One snapshot.
    pub fn info(&self, id: &str) -> Result<SnapshotInfo> {
        Ok(self.layout.head(id)?.info)
    }

    /// Changes how far a snapshot is believed. Refused when it holds a database that failed its check.
    pub fn set_trust(&self, id: &str, trust: Trust) -> Result<()> {
        let _lock = self.layout.write_lock(Deadline::after(Duration::from_millis(TRUST_WAIT_MS)))?;
        let info = self.layout.head(id)?.info;
        let damaged = info.problems.iter().find(|p| p.kind == ProblemKind::CorruptDatabase && !p.carried);
        if let Some(p) = damaged.filter(|_| trust.trusted()) {
            return Err(Error::new(
                Kind::Corrupt,
                format!("trusting snapshot {id}"),
                format!("the database {} failed its check: {}", p.path.display(), p.why),
            ));
        }
        self.layout.write_trust(id, trust)
    }

    /// The newest trusted snapshot, or the newest that holds this class.
    pub fn newest_trusted(&self, class: Option<Class>) -> Result<Option<SnapshotInfo>> {
        Ok(self
            .layout
            .heads()?
            .0
            .into_iter()
            .map(|h| h.info)
            .rfind(|i| i.trust.trusted() && class.is_none_or(|c| i.classes.contains_key(&c))))
    }

    /// Opens and hashes every object that a snapshot (or any) needs.
    pub fn verify(&self, id: Option<&str>, deadline: Deadline) -> Result<VerifyReport> {
        verify::run(&self.layout, id, deadline)
    }

    /// Proves the whole store and writes anew what was lost, from the live trees, the spares (root name, tree) and its own
    /// index. What nobody has is named. A snapshot that needs it loses its trust as soon as every class it holds is in
    /// another trusted snapshot that is whole; until then part of it is better than nothing.
    pub fn heal(&self, spares: &[(String, PathBuf)], deadline: Deadline) -> Result<Healed> {
        heal::run(&self.layout, None, spares, deadline)
    }

    /// One small portion of the slow look at every byte of the converging live trees, the spares and the store; `cursor`
    /// is what the portion before gave. Reads under no lock and waits for nobody.
    pub fn scrub(
        &self,
        cursor: Option<ScrubCursor>,
        portion: Portion,
        spares: &[(String, PathBuf)],
        deadline: Deadline,
    ) -> Result<Scrubbed> {
        scrub::run(&self.layout, cursor, portion, spares, deadline)
    }

    /// Moves what killed repairs of this store left under these roots, or beside them, to `quarantine` and says how
    /// many there were; none while a repair is at work.
    pub fn collect_leftovers(&self, roots: &[Root], quarantine: &Path, deadline: Deadline) -> Result<u64> {
        leftovers::collect(&self.layout, roots, quarantine, deadline)
    }

    /// Files of the given classes that lay unchanged for `still` when the snapshot `then` was taken and that `now` no
    /// longer holds. At most 32 names.
    pub fn gone(
        &self,
        then: &str,
        now: &str,
        classes: &[Class],
        still: Duration,
        deadline: Deadline,
    ) -> Result<Vec<PathBuf>> {
        gone::files(&self.layout, then, now, classes, still, deadline)
    }

    /// How the live trees differ from a snapshot, in the given classes. At most 50,000 differences per root; then
    /// the last is [`DifferenceKind::TooMany`].
    pub fn compare(
        &self,
        id: &str,
        classes: &[Class],
        depth: Depth,
        deadline: Deadline,
    ) -> Result<Vec<Difference>> {
        Ok(self.look(id, classes, depth, deadline)?.differences)
    }

    /// The quick look at the live trees, with its cost; meant for idle priority. Constant memory.
    pub fn sweep(&self, id: &str, classes: &[Class], deadline: Deadline) -> Result<SweepReport> {
        self.look(id, classes, Depth::Stat, deadline)
    }

    fn look(&self, id: &str, classes: &[Class], depth: Depth, deadline: Deadline) -> Result<SweepReport> {
        let meter = files::Meter::start();
        let _reading = self.layout.read_lock();
        let head = self.layout.head(id)?;
        let mut report = SweepReport::default();
        for reference in head.trees.iter().filter(|t| classes.contains(&t.root.class)) {
            let base = snapshot::open_base(&reference.root)?;
            let ids = compare::Ids::default();
            let looked = compare::root(&self.layout, reference, base.as_ref(), &ids, depth, deadline)?;
            report.entries += looked.entries;
            report.hashed += looked.hashed;
            report.differences.extend(looked.differences);
            report.leftovers += leftovers::count(&self.layout, &looked.leftovers);
        }
        report.cost = meter.cost(0);
        Ok(report)
    }

    /// Puts the live trees right from this one snapshot. Everything needed is proven before anything is touched; what the
    /// store has lost comes from the spares and the live trees, if they have it.
    pub fn repair(&self, id: &str, scope: Scope<'_>, plan: &Plan, deadline: Deadline) -> Result<Repaired> {
        repair::run(&self.layout, &self.layout.head(id)?, scope, plan, deadline)
    }

    /// Puts whole classes right from the newest trusted snapshot that holds them all and whose objects verify, else
    /// the next older; `accept` may refuse one (a gate) with its reason. With [`Plan::partial`] and none that is whole,
    /// from the newest what it still has.
    pub fn repair_newest(
        &self,
        classes: &[Class],
        plan: &Plan,
        accept: &dyn Fn(&SnapshotInfo) -> std::result::Result<(), String>,
        deadline: Deadline,
    ) -> Result<Repaired> {
        let (heads, unreadable) = self.layout.heads()?;
        let mut passed_over: Vec<PassedOver> =
            unreadable.into_iter().rev().map(|(id, e)| PassedOver { id, why: e.to_string() }).collect();
        // One that is whole comes first, however old; only then what is left of the newest.
        let whole = Plan { partial: false, ..plan.clone() };
        for plan in [&whole, plan].into_iter().take(if plan.partial { 2 } else { 1 }) {
            for head in heads.iter().rev().filter(|h| h.info.trust.trusted()) {
                match self.try_repair(head, classes, plan, accept, deadline) {
                    Ok(done) => return Ok(Repaired { passed_over, ..done }),
                    Err(e) if matches!(e.kind, Kind::Corrupt | Kind::NotFound) => {
                        passed_over.push(PassedOver { id: head.info.id.clone(), why: e.to_string() });
                    }
                    Err(e) => return Err(e),
                }
            }
        }
        let why = match passed_over.as_slice() {
            [] => "there is no trusted snapshot".to_string(),
            [only] => format!("{}: {}", only.id, only.why),
            [newest, .., oldest] => format!(
                "none of {} could be used; newest {}: {}; oldest {}: {}",
                passed_over.len(),
                newest.id,
                newest.why,
                oldest.id,
                oldest.why
            ),
        };
        Err(Error::new(Kind::NotFound, "restoring from a trusted snapshot", why)
            .hint("`koboshi snapshot list` shows what there is, `koboshi snapshot verify` what is damaged"))
    }

    fn try_repair(
        &self,
        head: &Head,
        classes: &[Class],
        plan: &Plan,
        accept: &dyn Fn(&SnapshotInfo) -> std::result::Result<(), String>,
        deadline: Deadline,
    ) -> Result<Repaired> {
        if let Some(class) = classes.iter().find(|c| !head.info.classes.contains_key(c)) {
            return Err(Error::new(
                Kind::NotFound,
                "using this snapshot",
                format!("it does not hold the {class}"),
            ));
        }
        accept(&head.info).map_err(|why| Error::new(Kind::NotFound, "using this snapshot", why))?;
        repair::run(&self.layout, head, Scope::Classes(classes), plan, deadline)
    }

    /// Writes the roots of these classes as plain trees to `dest/<root name>`, which must not exist.
    pub fn export(&self, id: &str, classes: &[Class], dest: &Path, deadline: Deadline) -> Result<Repaired> {
        repair::export(&self.layout, &self.layout.head(id)?, classes, dest, deadline)
    }

    /// Removes the oldest snapshots until the store is within the limit; never what the newest trusted snapshot of
    /// a class, or the newest snapshot, needs.
    pub fn prune(&self, limit_bytes: u64, deadline: Deadline) -> Result<Pruned> {
        prune::run(&self.layout, limit_bytes, deadline)
    }

    /// Bytes on disk.
    pub fn size(&self) -> Result<Size> {
        prune::size(&self.layout)
    }

    /// Makes (or makes right again) a ready tree of a converging root at `path`, on the node's file system, to be
    /// handed to a repair in [`Plan::spares`]. Its bytes are hashed by the first look after, then vouched for by stat.
    pub fn make_spare(&self, id: &str, root: &str, path: &Path, deadline: Deadline) -> Result<Spare> {
        spare::make(&self.layout, &self.layout.head(id)?, root, path, deadline)
    }

    /// Whether the spare at `path` is the snapshot's, by the quick look; with its size.
    pub fn check_spare(&self, id: &str, root: &str, path: &Path, deadline: Deadline) -> Result<Spare> {
        spare::check(&self.layout, &self.layout.head(id)?, root, path, deadline)
    }
}

/// Trims a quarantine whose directories are `<incident>/<root name>` and returns the bytes freed: what came from
/// converging roots goes oldest first while the whole is over `limit_bytes`; of other roots only files older than
/// `keep_days` whose bytes are all in a trusted snapshot of `store`.
pub fn trim_quarantine(
    quarantine: &Path,
    store: &Store,
    limit_bytes: u64,
    keep_days: u32,
    deadline: Deadline,
) -> Result<u64> {
    trim::run(&store.layout, quarantine, limit_bytes, keep_days, deadline)
}

/// Removes what came from programs and runtimes, which a snapshot or a package registry brings again, from all incidents'
/// directories of a quarantine but `except`; the bytes freed. Service files are their owner's words, and stay.
pub fn drop_programs(quarantine: &Path, store: &Store, except: &str, deadline: Deadline) -> Result<u64> {
    trim::programs(&store.layout, quarantine, except, deadline)
}

/// A ready tree of a converging root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spare {
    /// Where it stands.
    pub path: PathBuf,
    /// Regular files in it.
    pub files: u64,
    /// Their apparent sizes, summed.
    pub bytes: u64,
    /// It is, entry for entry, what the snapshot says.
    pub ready: bool,
}
