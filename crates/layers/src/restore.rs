//! Layer 1: repair from the newest trusted snapshot, in one go, the least scope that all findings explain.
//!
//! Program, runtime and service files converge to the snapshot. The config is touched only when it is missing, invalid
//! or blamed by the gateway. What belongs to the user is touched only where a whole root is gone, a database is
//! provably corrupt, or the node woke up without its memory; then only that part goes back, and the bytes that a
//! running gateway still holds open are saved first, because they are newer than any snapshot.

use crate::beside::Beside;
use crate::{Bench, CameBack, Report, owners, quiet, trial};
use engine::{Class, FaultKind, Finding};
use host::{Context, Error, Kind, Result};
use node::gates::{self, Gate};
use node::roots::resolved;

use node::{Baseline, Node, salvage};
use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use store::{Depth, Difference, DifferenceKind, Plan, Scope, SnapshotInfo, Store};

/// What the repair itself may take after the stop: layer 1's least work.
const NEEDS: std::time::Duration = std::time::Duration::from_secs(30);

/// Snapshots tried before the layer gives up: each costs a compare.
const MAX_SNAPSHOTS: usize = 5;

/// What the findings allow to be touched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    /// Converging classes to put right.
    pub converge: BTreeSet<Class>,
    /// The config may be put back.
    pub config: bool,
    /// Classes of which whole roots are gone or emptied.
    pub missing: BTreeSet<Class>,
    /// Single databases that are corrupt or were started afresh.
    pub databases: BTreeSet<PathBuf>,
    /// Databases that were rescued from a living gateway: newer than any snapshot, not to be touched again.
    pub kept: BTreeSet<PathBuf>,
    /// Agents' databases that are gone, whichever they are: the node remembers none of its sessions.
    pub agents: bool,
    /// Roots that were gone or emptied before anything was done about it: a rescued database makes its directory again, and
    /// so may a gateway that ends.
    pub void: BTreeSet<PathBuf>,
    /// Every byte is to be hashed: a stat sweep found nothing, and still it does not start.
    pub thorough: bool,
    /// The gateway runs meanwhile: no program of another version may be put under it.
    pub serving: bool,
}

impl Choice {
    /// The least scope that explains all findings about `node`.
    #[must_use]
    pub fn of(node: &Node, findings: &[Finding]) -> Choice {
        let mut choice = Choice::default();
        for finding in findings {
            choice.add(node, finding);
        }
        choice
    }

    fn add(&mut self, node: &Node, finding: &Finding) {
        match finding.kind {
            FaultKind::FilesDamaged => self.converge.extend(finding.class),
            FaultKind::RuntimeUnfit => self.converge.extend([Class::Runtime, Class::Service]),
            FaultKind::ServiceLatched => self.converge.extend([Class::Service]),
            FaultKind::ConfigBroken => self.config = true,
            FaultKind::RootMissing => {
                if node::roots::state_is_gone(node) {
                    // All that is the user's is gone at once.
                    self.config = true;
                    self.missing
                        .extend(Class::ALL.into_iter().filter(|c| !c.converges() && *c != Class::Config));
                }
                match finding.class {
                    Some(class) if class.converges() => self.converge.extend([class]),
                    Some(Class::Config) => self.config = true,
                    Some(class) => self.missing.extend([class]),
                    None => {}
                }
                if finding.class == Some(Class::State) {
                    // A gateway that ends makes the missing database anew, empty: what counts is what it was.
                    self.databases.insert(resolved(&node.state_db()));
                }
                self.databases.extend(named(finding));
            }
            FaultKind::Amnesia if finding.class == Some(Class::Sessions) => self.agents = true,
            FaultKind::DatabaseCorrupt | FaultKind::Amnesia => {
                if finding.class == Some(Class::State) {
                    self.databases.insert(resolved(&node.state_db()));
                }
                self.databases.extend(named(finding));
            }
            FaultKind::ProcessGone
            | FaultKind::Hung
            | FaultKind::PortTaken
            | FaultKind::Permission
            | FaultKind::DiskFull
            | FaultKind::SchemaNewer
            | FaultKind::UpdateAtWork
            | FaultKind::OwnersWill
            | FaultKind::BackupStale
            | FaultKind::Notice => {}
        }
    }

    /// Whether there is nothing to put right.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.converge.is_empty() && !self.config && !self.of_users()
    }

    /// Whether something of the user's is to come back.
    fn of_users(&self) -> bool {
        self.agents || !self.missing.is_empty() || !self.databases.is_empty()
    }

    /// The next wider scope, when the first one started nothing: every byte of what converges, and the config.
    #[must_use]
    pub fn widened(mut self) -> Choice {
        self.converge.extend([Class::Program, Class::Runtime, Class::Service]);
        self.thorough = true;
        self
    }

    pub(crate) fn classes(&self) -> Vec<Class> {
        let mut classes: BTreeSet<Class> = self.converge.clone();
        if self.config {
            classes.insert(Class::Config);
        }
        classes.extend(&self.missing);
        if !self.databases.is_empty() {
            classes.extend([Class::State, Class::Sessions]);
        }
        if self.agents {
            classes.insert(Class::Sessions);
        }
        classes.into_iter().collect()
    }

    /// Whether this difference may be put right.
    pub(crate) fn wants(&self, info: &SnapshotInfo, difference: &Difference) -> bool {
        if difference.class.converges() {
            return self.converge.contains(&difference.class);
        }
        if difference.class == Class::Config {
            return self.config && back_to_what_was(difference.kind);
        }
        let root = info.roots.iter().find(|r| r.name == difference.root);
        let path = root.map(|r| join(&r.path, &difference.path));
        if path.as_ref().is_some_and(|p| self.kept.contains(p)) {
            return false;
        }
        if path.as_ref().is_some_and(|p| self.databases.contains(p)) {
            return back_to_what_was(difference.kind);
        }
        if self.agents && difference.class == Class::Sessions && leads_to_a_database(difference) {
            return true;
        }
        // A single missing file in a tree that is otherwise there is the user's own deletion, also when another tree of
        // the same class is gone.
        let void = root.is_some_and(|r| self.void.contains(&r.path) || is_gone(r, &info.roots));
        let again = match difference.kind {
            DifferenceKind::Missing | DifferenceKind::Emptied | DifferenceKind::KindChanged => true,
            // Nobody but an ending gateway can have begun it anew in a root that was gone.
            DifferenceKind::Changed => is_database(&difference.path),
            DifferenceKind::Extra
            | DifferenceKind::ModeOrOwner
            | DifferenceKind::Attributes
            | DifferenceKind::HardLinked
            | DifferenceKind::LinkTarget
            | DifferenceKind::TooMany => false,
        };
        self.missing.contains(&difference.class) && void && again
    }
}

fn is_database(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "sqlite")
}

/// Whether an agent's database is gone by this: itself, or a directory on the way to it
/// (`<agent>/agent/openclaw-agent.sqlite`).
fn leads_to_a_database(difference: &Difference) -> bool {
    let parts: Vec<_> = difference.path.iter().collect();
    let on_the_way = match parts.as_slice() {
        [] | [_] => true,
        [_, dir] => *dir == "agent",
        [..] => false,
    };
    match difference.kind {
        DifferenceKind::Missing => on_the_way || is_database(&difference.path),
        DifferenceKind::Emptied => is_database(&difference.path),
        DifferenceKind::Changed
        | DifferenceKind::Extra
        | DifferenceKind::ModeOrOwner
        | DifferenceKind::Attributes
        | DifferenceKind::HardLinked
        | DifferenceKind::KindChanged
        | DifferenceKind::LinkTarget
        | DifferenceKind::TooMany => false,
    }
}

/// Whether a root is gone or emptied. An empty repository left behind counts as empty.
pub(crate) fn is_void(root: &Path) -> bool {
    match std::fs::symlink_metadata(root) {
        Ok(meta) if meta.is_dir() => {
            std::fs::read_dir(root).is_ok_and(|entries| entries.flatten().all(|e| e.file_name() == ".git"))
        }
        Ok(meta) => meta.len() == 0,
        Err(e) => e.kind() == std::io::ErrorKind::NotFound,
    }
}

/// The same of a root with others in it: nothing is left but what it does not hold and other roots that are gone too. A
/// gateway whose state directory was deleted makes an empty one again.
fn is_gone(root: &store::Root, all: &[store::Root]) -> bool {
    if is_void(&root.path) {
        return true;
    }
    let Ok(entries) = std::fs::read_dir(&root.path) else { return false };
    !root.exclude.is_empty()
        && entries.flatten().all(|entry| {
            let path = entry.path();
            let not_its_own = root.exclude.iter().any(|name| entry.file_name() == name.as_str());
            not_its_own && all.iter().filter(|r| r.path.starts_with(&path)).all(|r| is_void(&r.path))
        })
}

/// The databases that a finding names.
fn named(finding: &Finding) -> impl Iterator<Item = PathBuf> {
    finding
        .evidence
        .iter()
        .filter(|e| e.starts_with('/') && e.ends_with(".sqlite"))
        .map(|e| resolved(Path::new(e)))
}

/// What was there and is other or gone; something new beside it is the user's and stays.
fn back_to_what_was(kind: DifferenceKind) -> bool {
    match kind {
        DifferenceKind::Missing
        | DifferenceKind::Changed
        | DifferenceKind::Emptied
        | DifferenceKind::ModeOrOwner
        | DifferenceKind::KindChanged
        | DifferenceKind::LinkTarget => true,
        DifferenceKind::Extra
        | DifferenceKind::Attributes
        | DifferenceKind::HardLinked
        | DifferenceKind::TooMany => false,
    }
}

fn join(root: &Path, below: &Path) -> PathBuf {
    if below.as_os_str().is_empty() { root.to_owned() } else { root.join(below) }
}

/// The work of layer 1.
pub fn work(bench: &mut Bench<'_>, findings: &[Finding], hung: bool, wider: bool) -> Result<Report> {
    let mut report = Report::default();
    let mut choice = Choice::of(bench.node, findings);
    // Files of another owner are the whole reason where nothing else is found.
    let foreign = findings.iter().any(|f| f.kind == FaultKind::Permission);
    if wider || choice.is_empty() && !foreign {
        choice = choice.widened();
    }
    choice.void = void_now(bench, &choice);
    // While the gateway lives, its open descriptors hold the newest bytes of a deleted database.
    let mut saved = save_open_databases(bench, &choice, &mut report)?;
    quiet::hold(bench, &mut report);
    quiet::stop(bench, hung, NEEDS, &mut report)?;
    if foreign && let Err(e) = owners::give_back(bench, &mut report) {
        // A rescued database and all other damage are still to be dealt with.
        report.could_not(e.to_string());
    }
    saved.extend(left_by_an_earlier_try(bench, &choice, &saved)?);
    let mut kept = BTreeSet::new();
    for database in saved {
        put_back(bench, &database, &mut report)?;
        // What was just put back is newer than the snapshot's.
        choice.databases.remove(&database.live);
        kept.insert(database.live);
    }
    choice.kept = kept;
    if choice.is_empty() {
        report.did("nothing is left to be taken from a snapshot");
    } else {
        let trial = trial::keep(bench, &choice);
        let done = repair(bench, &choice, &mut report);
        trial::begun(bench, trial)?;
        match done {
            // What was rescued is back; that no snapshot holds the rest keeps nothing from starting by itself.
            Err(e) if !choice.kept.is_empty() => report.could_not(format!("{e}")),
            done => done?,
        }
    }
    bench.manager.clear_latch(bench.deadline)?;
    Ok(report)
}

/// The roots of the trusted snapshots that are gone or emptied, and those of which an earlier try of this incident found
/// that: killed in the middle, it may have left half of one.
fn void_now(bench: &Bench<'_>, choice: &Choice) -> BTreeSet<PathBuf> {
    /// A node has few roots, a path has few bytes.
    const LIMIT_BYTES: u64 = 1 << 20;
    if choice.missing.is_empty() {
        return BTreeSet::new();
    }
    let note = bench.quarantine.join("void");
    let mut void: BTreeSet<PathBuf> = host::files::read_bounded(&note, LIMIT_BYTES)
        .unwrap_or_default()
        .split(|byte| *byte == 0)
        .filter(|path| !path.is_empty())
        .map(|path| PathBuf::from(std::ffi::OsStr::from_bytes(path)))
        .collect();
    // A store that cannot be read is told by the repair.
    let trusted = bench.store.and_then(|s| trusted_newest_first(s).ok()).unwrap_or_default();
    let roots = trusted.iter().take(MAX_SNAPSHOTS).flat_map(|i| i.roots.iter().map(|r| (r, &i.roots)));
    let gone = roots.filter(|(r, all)| !r.class.converges() && is_gone(r, all)).map(|(r, _)| r.path.clone());
    let before = void.len();
    void.extend(gone);
    if void.len() > before {
        let all: Vec<&[u8]> = void.iter().map(|p| p.as_os_str().as_bytes()).collect();
        // Only a try that is killed misses it.
        let _ = std::fs::create_dir_all(&bench.quarantine);
        let _ = host::files::write_atomic(&note, &all.join(&0), 0o600);
    }
    void
}

/// A database rescued from a living gateway: where its bytes lie now, and where they belong.
struct Saved {
    copy: PathBuf,
    live: PathBuf,
}

/// Where a rescued database belongs is written beside it, until it is back there: the work may be killed in between, and
/// the next try must not take a snapshot's older bytes instead.
const BELONGS: &str = ".belongs";
/// A path.
const BELONGS_LIMIT_BYTES: u64 = 8 << 10;
/// Rescues within one incident.
const MAX_RESCUES: u32 = 1_000;

/// Saves what only the gateway's open descriptors still hold. An error refuses the repair: the gateway's end would be
/// the end of these bytes.
fn save_open_databases(bench: &Bench<'_>, choice: &Choice, report: &mut Report) -> Result<Vec<Saved>> {
    let concerned = choice.agents
        || choice.missing.contains(&Class::State)
        || choice.missing.contains(&Class::Sessions)
        || !choice.databases.is_empty();
    let Some(gateway) = bench.node.gateway().filter(|_| concerned) else {
        return Ok(Vec::new());
    };
    // A directory of its own each time: what an earlier try saved is never written over.
    let rescued = bench.quarantine.join("salvaged");
    let to = (1..MAX_RESCUES)
        .map(|n| rescued.join(n.to_string()))
        .find(|to| to.symlink_metadata().is_err())
        .unwrap_or_else(|| rescued.join("last"));
    let found = match salvage::from_open_files(bench.node, gateway, &to) {
        Ok(found) => found,
        // It ended by itself meanwhile, or is not ours to look into: stopping it takes nothing away.
        Err(e) if matches!(e.kind, Kind::NotFound | Kind::Denied) => {
            report.could_not(format!("{e}"));
            return Ok(Vec::new());
        }
        Err(e) => return Err(e.hint("the gateway is left running: it holds the only copy of these bytes")),
    };
    for file in not_folded(&to) {
        report.could_not(format!(
            "the newest rows of a deleted database could not be read; its bytes and its log lie in {}",
            file.display()
        ));
    }
    let mut saved = Vec::new();
    for one in found {
        if one.identity.is_none() && one.original == resolved(&bench.node.state_db()) {
            report.could_not(format!("{} was saved, but holds no identity", one.file.display()));
            continue;
        }
        let note = beside(&one.file, BELONGS);
        host::files::write_atomic(&note, one.original.as_os_str().as_bytes(), 0o600)?;
        report.did(format!("saved {} from the gateway's open files", one.original.display()));
        saved.push(Saved { copy: one.file, live: one.original });
    }
    Ok(saved)
}

/// Main files that were kept as they were because no log would fold into them.
fn not_folded(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let mut raw: Vec<PathBuf> = entries.filter(|p| p.extension().is_some_and(|e| e == "damaged")).collect();
    raw.sort();
    raw
}

/// What a try that was killed had saved and not yet put back, the newest of each.
fn left_by_an_earlier_try(bench: &Bench<'_>, choice: &Choice, saved: &[Saved]) -> Result<Vec<Saved>> {
    let mut notes: Vec<(std::time::SystemTime, PathBuf)> = Vec::new();
    for dir in std::fs::read_dir(bench.quarantine.join("salvaged")).into_iter().flatten().flatten() {
        for file in std::fs::read_dir(dir.path()).into_iter().flatten().flatten() {
            if file.file_name().as_bytes().ends_with(BELONGS.as_bytes()) {
                let written = file.metadata().and_then(|m| m.modified());
                notes.push((written.unwrap_or(std::time::UNIX_EPOCH), file.path()));
            }
        }
    }
    notes.sort();
    let mut left: Vec<Saved> = Vec::new();
    for (_, note) in notes.into_iter().rev() {
        let bytes = host::files::read_bounded(&note, BELONGS_LIMIT_BYTES)?;
        let live = PathBuf::from(std::ffi::OsStr::from_bytes(&bytes));
        let copy = note.with_extension("");
        let wanted = choice.databases.contains(&live)
            || choice.agents
            || choice.missing.contains(&Class::State)
            || choice.missing.contains(&Class::Sessions);
        let known = saved.iter().chain(&left).any(|s| s.live == live || s.copy == copy);
        if wanted && !known && copy.is_file() && live.starts_with(resolved(&bench.node.state_dir)) {
            left.push(Saved { copy, live });
        }
    }
    Ok(left)
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Puts a kept file back where it was.
pub(crate) fn bring_back(bench: &Bench<'_>, copy: &Path, live: &Path, report: &mut Report) -> Result<()> {
    let live = live
        .parent()
        .zip(live.file_name())
        .map_or_else(|| live.to_owned(), |(dir, name)| resolved(dir).join(name));
    put_back(bench, &Saved { copy: copy.to_owned(), live }, report)
}

/// Puts a rescued database where it was. The copy stays in the quarantine, and so does what the ending gateway may have
/// made anew in its place: main file, `-wal` and `-shm` always move as one set.
fn put_back(bench: &Bench<'_>, saved: &Saved, report: &mut Report) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let what = || format!("put {} back", saved.live.display());
    let dir = saved.live.parent().ok_or_else(|| Error::new(Kind::System, what(), "it has no directory"))?;
    let top = make_dirs(&resolved(&bench.node.state_dir), dir).context(what)?;
    let meta = std::fs::File::from(rustix::io::dup(&top).context(what)?).metadata().context(what)?;
    let name = saved.live.file_name().unwrap_or_default();
    let tmp = format!(".koboshi-{}-{}", std::process::id(), host::clock::now().ms);
    let mut new = Beside::write(top, tmp, Some((meta.uid(), meta.gid())), 0o600, |file| {
        std::io::copy(&mut std::fs::File::open(&saved.copy)?, file).map(drop)
    })
    .context(what)?;
    let aside = bench.quarantine.join("made-anew");
    for suffix in ["-shm", "-wal", ""] {
        let path = beside(&saved.live, suffix);
        if path.symlink_metadata().is_ok() {
            std::fs::create_dir_all(&aside).context(what)?;
            host::exchange::move_aside(&path, &aside)?;
        }
    }
    new.take(name).context(what)?;
    new.sync().context(what)?;
    let _ = std::fs::remove_file(beside(&saved.copy, BELONGS));
    report.did(format!("{} is back with everything that was written to it", saved.live.display()));
    Ok(())
}

/// Opens `dir`, which lies below `top`, making what is missing of the way as `top`'s owner; follows no link below it.
fn make_dirs(top: &Path, dir: &Path) -> std::io::Result<std::os::fd::OwnedFd> {
    use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut at = match rustix::fs::open(top, flags, Mode::empty()) {
        Err(rustix::io::Errno::NOENT) => {
            // All of it is gone; the directory above says whose it is.
            use std::os::unix::fs::MetadataExt;
            rustix::fs::mkdir(top, Mode::RWXU)?;
            let made = rustix::fs::open(top, flags | OFlags::NOFOLLOW, Mode::empty())?;
            let above = std::fs::metadata(top.parent().unwrap_or(top))?;
            std::os::unix::fs::fchown(&made, Some(above.uid()), Some(above.gid()))?;
            made
        }
        other => other?,
    };
    let owner = rustix::fs::fstat(&at)?;
    let below = dir.strip_prefix(top).map_err(std::io::Error::other)?;
    for part in below.components() {
        let std::path::Component::Normal(part) = part else {
            return Err(std::io::Error::other("its path is not a plain one"));
        };
        let made = match rustix::fs::mkdirat(&at, part, Mode::RWXU) {
            Ok(()) => true,
            Err(rustix::io::Errno::EXIST) => false,
            Err(e) => return Err(e.into()),
        };
        let next = rustix::fs::openat(&at, part, flags | OFlags::NOFOLLOW, Mode::empty())?;
        if made {
            let (uid, gid) = (Uid::from_raw(owner.st_uid), Gid::from_raw(owner.st_gid));
            rustix::fs::chownat(&next, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
        }
        at = next;
    }
    Ok(at)
}

/// Repairs what `choice` allows from the newest trusted snapshot whose gates are open and whose bytes prove right.
pub(crate) fn repair(bench: &mut Bench<'_>, choice: &Choice, report: &mut Report) -> Result<()> {
    let mut choice = choice.clone();
    if choice.config && crate::mend::config(bench, report)? {
        choice.config = false;
        if choice.is_empty() {
            return Ok(());
        }
    }
    let Some(store) = bench.store else {
        return Err(Error::new(Kind::NotFound, "restore from a snapshot", "there is no store on this host")
            .hint("koboshi snapshot create"));
    };
    let depth = if choice.thorough { Depth::Hash } else { Depth::Stat };
    let trusted = trusted_newest_first(store)?;
    if trusted.is_empty() {
        return Err(Error::new(Kind::NotFound, "restore from a snapshot", "none has been proven good yet"));
    }
    let mut last = None;
    let mut damaged = Vec::new();
    let mut still_broken = false;
    for info in trusted.iter().take(MAX_SNAPSHOTS) {
        let other_version = info.version != trusted[0].version;
        if choice.serving && other_version && choice.converge.contains(&Class::Program) {
            report.could_not(format!(
                "snapshot {} is not used: it is of another version, and the gateway runs",
                info.id
            ));
            continue;
        }
        if let Err(why) = gate(bench, &choice, info) {
            report.could_not(format!("snapshot {} is not used: {why}", info.id));
            continue;
        }
        match repair_from(bench, store, info, &choice, depth, Whole::OrNothing, report) {
            // The newest one is what lies there already, and it does not start: an older one may.
            Ok(false) if choice.thorough => {}
            // It holds the very config that is broken (it was cut just before it was taken): an older one holds another.
            Ok(_) if choice.config && !node::config::check(bench.node).is_empty() => still_broken = true,
            Ok(_) => return Ok(()),
            Err(e) => {
                report.could_not(format!("snapshot {}: {e}", info.id));
                if e.kind == Kind::Corrupt {
                    damaged.push(info);
                }
                last = Some(e);
            }
        }
        if still_broken {
            // The rest is done; only the config is looked for further back.
            choice = Choice { config: true, serving: choice.serving, ..Choice::default() };
        }
    }
    let choice = &choice;
    // None is whole. Most of one is better than nothing: the judge says whether it is enough.
    for info in damaged {
        match repair_from(bench, store, info, choice, depth, Whole::AsFarAsCanBe, report) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(e) => last = Some(e),
        }
    }
    Err(last.unwrap_or_else(|| {
        Error::new(
            Kind::NotFound,
            "restore from a snapshot",
            "every trusted snapshot is what lies there already, or its gates are closed",
        )
    }))
}

fn trusted_newest_first(store: &Store) -> Result<Vec<SnapshotInfo>> {
    let mut infos: Vec<SnapshotInfo> = store.list()?.into_iter().filter(|i| i.trust.trusted()).collect();
    infos.sort_by_key(|i| std::cmp::Reverse(i.number));
    Ok(infos)
}

/// Whether this snapshot may be used for this repair at all.
fn gate(bench: &Bench<'_>, choice: &Choice, info: &SnapshotInfo) -> std::result::Result<(), String> {
    let databases_too = choice.databases.contains(&resolved(&bench.node.state_db()))
        || choice.missing.contains(&Class::State);
    if choice.converge.contains(&Class::Program) && !databases_too {
        // The program of that snapshot served a database of this schema; a newer one it may not be able to read.
        let served = info.baseline.get("schema").and_then(serde_json::Value::as_u64);
        let served = served.and_then(|s| u32::try_from(s).ok()).unwrap_or(u32::MAX);
        if let Gate::Closed(why) = gates::schema(bench.node, (served, u32::MAX), bench.deadline) {
            return Err(why);
        }
    }
    match gates::space(&bench.quarantine, 0) {
        Gate::Open => Ok(()),
        Gate::Closed(why) => Err(why),
    }
}

/// What becomes of a repair for which some bytes are nowhere to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whole {
    /// Nothing is touched; an older snapshot may have them all.
    OrNothing,
    /// The rest is put right.
    AsFarAsCanBe,
}

/// Lost files that a report names one by one.
const MAX_NAMED: usize = 8;

/// `false` when nothing differed that may be touched, or nothing of it could be put right.
fn repair_from(
    bench: &Bench<'_>,
    store: &Store,
    info: &SnapshotInfo,
    choice: &Choice,
    depth: Depth,
    whole: Whole,
    report: &mut Report,
) -> Result<bool> {
    let differences = store.compare(&info.id, &choice.classes(), depth, bench.deadline)?;
    let wanted: Vec<Difference> = differences.into_iter().filter(|d| choice.wants(info, d)).collect();
    if wanted.is_empty() {
        report.did(format!("nothing differs from snapshot {}", info.id));
        return Ok(false);
    }
    let lacks = lacks(bench, info, &wanted);
    let plan = Plan { partial: whole == Whole::AsFarAsCanBe, ..bench.plan() };
    let repaired = store.repair(&info.id, Scope::Differences(&wanted), &plan, bench.deadline)?;
    report.came_back.extend(lacks);
    for lost in repaired.lost.iter().take(MAX_NAMED) {
        report.could_not(format!("{}/{}: {}", lost.root, lost.path.display(), lost.why));
    }
    if repaired.lost_files > 0 {
        report.could_not(format!(
            "{} files of snapshot {} are nowhere to be had and were left as they are",
            repaired.lost_files, info.id
        ));
    }
    let found = repaired.objects_from_live + repaired.objects_from_spare;
    if found > 0 {
        report.did(format!(
            "{found} objects that the store has lost came, proven, from other files: {} from the spare, {} from live trees",
            repaired.objects_from_spare, repaired.objects_from_live
        ));
    }
    report.did(format!(
        "from snapshot {}: {} files, {} directories, {} links put in place, {} attributes, {} bytes; {} things \
         moved to quarantine{}",
        repaired.snapshot,
        repaired.files,
        repaired.dirs,
        repaired.links,
        repaired.attributes,
        repaired.bytes,
        repaired.quarantined,
        if repaired.from_spare.is_empty() { "" } else { "; the spare was swapped in" },
    ));
    let put = repaired.files + repaired.dirs + repaired.links + repaired.attributes + repaired.quarantined;
    Ok(put > 0 || !repaired.from_spare.is_empty() || repaired.lost_files == 0)
}

/// What a repair of these differences brings back of the user's, and what can therefore not be in it: everything that
/// was written after the copy was taken.
fn lacks(bench: &Bench<'_>, info: &SnapshotInfo, wanted: &[Difference]) -> Vec<CameBack> {
    let classes: BTreeSet<Class> = wanted
        .iter()
        .map(|d| d.class)
        .filter(|class| !class.converges() && *class != Class::Config)
        .collect();
    classes
        .into_iter()
        .map(|class| {
            let of = |d: &&Difference| d.class == class;
            let mut roots: Vec<String> = wanted
                .iter()
                .filter(of)
                .filter_map(|d| info.roots.iter().find(|r| r.name == d.root))
                .map(|r| r.path.display().to_string())
                .collect();
            roots.dedup();
            let more = roots.len().saturating_sub(1);
            let place = roots.into_iter().next().unwrap_or_else(|| class.to_string());
            let place = if more == 0 { place } else { format!("{place} and {more} more") };
            let copy = info.classes.get(&class);
            let taken = copy.map_or(info.taken, |c| c.taken).strftime("%Y-%m-%d %H:%M UTC");
            let holds = copy.map_or_else(String::new, |c| {
                let files = if c.files == 1 { "1 file".to_owned() } else { format!("{} files", c.files) };
                format!(" ({files}, {} bytes)", c.bytes)
            });
            let rows = rows_known(bench.baseline, &info.baseline, class);
            CameBack {
                class,
                snapshot: info.id.clone(),
                what: format!(
                    "the {class} in {place} is as it was on {taken}{holds}: what was written after that is not in it{rows}"
                ),
            }
        })
        .collect()
}

/// What the node was known to remember when it last served, beside what the copy remembers.
fn rows_known(known: Option<&Baseline>, copy: &serde_json::Value, class: Class) -> String {
    let then: Option<Baseline> = serde_json::from_value(copy.clone()).ok();
    let (Some(now), Some(then)) = (known.map(|k| &k.counts), then.as_ref().map(|t| &t.counts)) else {
        return String::new();
    };
    let pairs = match class {
        Class::State => {
            [("scheduled jobs", now.jobs, then.jobs), ("paired devices", now.paired, then.paired)]
        }
        Class::Sessions => [
            ("sessions", now.sessions, then.sessions),
            ("transcript entries", now.transcript, then.transcript),
        ],
        Class::Program
        | Class::Runtime
        | Class::Service
        | Class::Config
        | Class::Credentials
        | Class::Workspace => return String::new(),
    };
    let fewer: Vec<String> = pairs
        .into_iter()
        .filter(|(_, now, then)| now > then)
        .map(|(what, now, then)| format!("{then} of {now} {what}"))
        .collect();
    if fewer.is_empty() { String::new() } else { format!("; it holds {}", fewer.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nobody::Nobody;

    fn finding(kind: FaultKind, class: Option<Class>, evidence: &[&str]) -> Finding {
        Finding {
            kind,
            class,
            what: String::new(),
            evidence: evidence.iter().map(|e| (*e).to_owned()).collect(),
        }
    }

    fn node(dir: &Path) -> Node {
        let state = dir.join("state");
        std::fs::create_dir_all(&state).unwrap();
        serde_json::from_value(serde_json::json!({
            "name": "t", "prefix": dir, "package_dir": dir, "entry": dir, "node_bin": dir, "home": dir,
            "state_dir": state, "config_path": state.join("openclaw.json"), "port": 1,
            "ids": host::run::Ids::current(), "user": "t"
        }))
        .unwrap()
    }

    #[test]
    fn the_scope_is_the_least_that_the_findings_explain() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let choice = Choice::of(&node, &[finding(FaultKind::FilesDamaged, Some(Class::Program), &[])]);
        assert_eq!(choice.classes(), [Class::Program]);
        assert!(!choice.config);

        let choice = Choice::of(&node, &[finding(FaultKind::ConfigBroken, Some(Class::Config), &[])]);
        assert_eq!(choice.classes(), [Class::Config]);

        let choice = Choice::of(&node, &[finding(FaultKind::Hung, None, &[])]);
        assert!(choice.is_empty());
        assert!(!choice.clone().widened().config, "a config that nobody blames is never touched");
    }

    #[test]
    fn an_amnesia_takes_back_its_database_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let finding = finding(FaultKind::Amnesia, Some(Class::State), &["another device id"]);
        let choice = Choice::of(&node, &[finding]);
        assert_eq!(choice.databases, BTreeSet::from([node.state_db()]));
        assert!(choice.missing.is_empty(), "files beside the database are not taken back");
    }

    fn bench<'a>(node: &'a Node, manager: &'a mut Nobody, dir: &Path) -> Bench<'a> {
        Bench {
            node,
            manager,
            store: None,
            baseline: None,
            quarantine: dir.join("quarantine/00000001"),
            spares: Vec::new(),
            deadline: host::clock::Deadline::after(std::time::Duration::from_secs(30)),
            limits: engine::Limits::default(),
        }
    }

    #[test]
    fn what_a_killed_try_had_saved_is_put_back_by_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let mut manager = Nobody;
        let mut bench = bench(&node, &mut manager, dir.path());
        let saved = bench.quarantine.join("salvaged/1");
        std::fs::create_dir_all(&saved).unwrap();
        let copy = saved.join("0-openclaw.sqlite");
        std::fs::write(&copy, b"the newest rows").unwrap();
        std::fs::write(beside(&copy, BELONGS), node.state_db().as_os_str().as_bytes()).unwrap();
        let findings = [finding(FaultKind::RootMissing, Some(Class::State), &[])];
        // There is no store, so the rest of the class cannot be repaired: what was saved is back all the same.
        let _ = work(&mut bench, &findings, false, false);
        assert_eq!(std::fs::read(node.state_db()).unwrap(), b"the newest rows");
        assert!(copy.exists(), "the copy stays");
        assert!(!beside(&copy, BELONGS).exists(), "and is not put back a second time");
    }

    #[test]
    fn a_database_that_was_only_kept_is_named_and_is_no_rescue() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let mut manager = Nobody;
        let mut bench = bench(&node, &mut manager, dir.path());
        // As the salvage leaves a main file and a log that do not fold: no note says that they are a database.
        let saved = bench.quarantine.join("salvaged/1");
        std::fs::create_dir_all(&saved).unwrap();
        for name in ["0-openclaw.sqlite.damaged", "0-openclaw.sqlite.damaged-wal.0", "1-whole.sqlite"] {
            std::fs::write(saved.join(name), b"rows").unwrap();
        }
        assert_eq!(not_folded(&saved), [saved.join("0-openclaw.sqlite.damaged")]);
        assert!(not_folded(dir.path()).is_empty() && not_folded(&dir.path().join("none")).is_empty());
        let findings = [finding(FaultKind::RootMissing, Some(Class::State), &[])];
        let _ = work(&mut bench, &findings, false, false);
        assert!(!node.state_db().exists(), "nothing unproven takes a database's place");
        assert_eq!(std::fs::read_dir(&saved).unwrap().count(), 3, "and nothing of it goes");
    }

    #[test]
    fn nothing_that_the_nodes_user_planted_is_followed_or_given_away() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let mut manager = Nobody;
        let bench = bench(&node, &mut manager, dir.path());
        let copy = dir.path().join("copy");
        std::fs::write(&copy, b"rows").unwrap();
        let saved = Saved { copy, live: node.state_db() };
        let victim = dir.path().join("victim");
        std::fs::write(&victim, b"root's").unwrap();
        let state = node.state_db().parent().unwrap().to_owned();
        // A link in the database's place, and one in the place of its directory.
        std::fs::create_dir_all(&state).unwrap();
        std::os::unix::fs::symlink(&victim, node.state_db()).unwrap();
        std::os::unix::fs::symlink(&victim, state.join(".openclaw.sqlite.koboshi")).unwrap();
        put_back(&bench, &saved, &mut Report::default()).unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"root's");
        assert!(node.state_db().symlink_metadata().unwrap().is_file());
        std::fs::remove_dir_all(&state).unwrap();
        let elsewhere = dir.path().join("elsewhere");
        std::fs::create_dir(&elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &state).unwrap();
        assert!(put_back(&bench, &saved, &mut Report::default()).is_err());
        assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 0);
    }

    /// A node's program with a trusted snapshot of each content given, oldest first; the last is what lies there.
    fn remembered(dir: &Path, node: &Node, contents: &[(&str, &str, &[u8])]) -> Store {
        let store = Store::open_or_create(&dir.join("store"), &dir.join("keys/key")).unwrap();
        let program = node.package_dir.clone();
        std::fs::create_dir_all(&program).unwrap();
        let root = store::Root {
            name: "program".into(),
            path: program.clone(),
            class: Class::Program,
            exclude: Vec::new(),
            only: None,
        };
        for (version, file, bytes) in contents {
            std::fs::write(program.join(file), bytes).unwrap();
            let request = store::Request {
                roots: std::slice::from_ref(&root),
                classes: &[Class::Program],
                note: "",
                version: Some(version),
                node: serde_json::Value::Null,
                baseline: serde_json::Value::Null,
            };
            let deadline = host::clock::Deadline::after(std::time::Duration::from_secs(30));
            let id = store.snapshot(&request, &mut |_| {}, deadline).unwrap().id;
            store.set_trust(&id, store::Trust::Good).unwrap();
        }
        store
    }

    fn damaged_program(dir: &Path) -> (Node, PathBuf) {
        let mut node = node(dir);
        node.package_dir = dir.join("prefix/openclaw");
        let program = node.package_dir.clone();
        (node, program)
    }

    fn packs(dir: &Path) -> Vec<PathBuf> {
        std::fs::read_dir(dir.join("store/packs")).unwrap().map(|e| e.unwrap().path()).collect()
    }

    #[test]
    fn with_no_whole_snapshot_what_can_be_had_is_put_right_and_the_rest_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let (node, program) = damaged_program(&dir);
        let store = remembered(&dir, &node, &[("1", "a.js", b"aaaa"), ("1", "b.js", b"bbbbbbbb")]);
        // The last snapshot's own pack is gone, the first one's is there; b.js is nowhere.
        let newest =
            packs(&dir).into_iter().max_by_key(|p| p.metadata().unwrap().modified().unwrap()).unwrap();
        std::fs::remove_file(newest).unwrap();
        let older = store.list().unwrap()[0].id.clone();
        store.set_trust(&older, store::Trust::Candidate).unwrap();
        std::fs::remove_file(program.join("a.js")).unwrap();
        std::fs::write(program.join("b.js"), b"damaged").unwrap();
        let mut manager = Nobody;
        let mut bench = bench(&node, &mut manager, &dir);
        bench.store = Some(&store);
        let mut report = Report::default();
        let findings = [finding(FaultKind::FilesDamaged, Some(Class::Program), &[])];
        repair(&mut bench, &Choice::of(&node, &findings), &mut report).unwrap();
        assert_eq!(std::fs::read(program.join("a.js")).unwrap(), b"aaaa");
        assert_eq!(std::fs::read(program.join("b.js")).unwrap(), b"damaged");
        assert!(report.undone.iter().any(|l| l.contains("program/b.js")), "{report:?}");
        // With nothing left to put right it failed, and says so.
        let e = repair(&mut bench, &Choice::of(&node, &findings), &mut report).unwrap_err();
        assert_eq!(e.kind, Kind::Corrupt);
        // A whole older one comes first.
        store.set_trust(&older, store::Trust::Good).unwrap();
        repair(&mut bench, &Choice::of(&node, &findings), &mut Report::default()).unwrap();
        assert!(!program.join("b.js").exists(), "the older snapshot does not know it");
    }

    #[test]
    fn under_a_running_gateway_no_other_version_is_put() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let (node, program) = damaged_program(&dir);
        let store = remembered(&dir, &node, &[("1", "a.js", b"one"), ("2", "a.js", b"two, longer")]);
        let newest =
            packs(&dir).into_iter().max_by_key(|p| p.metadata().unwrap().modified().unwrap()).unwrap();
        std::fs::remove_file(newest).unwrap();
        std::fs::write(program.join("a.js"), b"damaged").unwrap();
        let mut manager = Nobody;
        let mut bench = bench(&node, &mut manager, &dir);
        bench.store = Some(&store);
        let findings = [finding(FaultKind::FilesDamaged, Some(Class::Program), &[])];
        let _ = crate::in_place::work(&mut bench, &findings);
        assert_eq!(std::fs::read(program.join("a.js")).unwrap(), b"damaged");
        repair(&mut bench, &Choice::of(&node, &findings), &mut Report::default()).unwrap();
        assert_eq!(
            std::fs::read(program.join("a.js")).unwrap(),
            b"one",
            "while it is down, an older one is right"
        );
    }

    #[test]
    fn a_state_directory_that_is_gone_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let mut manager = Nobody;
        let bench = bench(&node, &mut manager, dir.path());
        std::fs::remove_dir_all(&node.state_dir).unwrap();
        let copy = dir.path().join("copy");
        std::fs::write(&copy, b"rows").unwrap();
        put_back(&bench, &Saved { copy, live: node.state_db() }, &mut Report::default()).unwrap();
        assert_eq!(std::fs::read(node.state_db()).unwrap(), b"rows");
    }

    #[test]
    fn a_config_that_was_only_suspected_goes_back_when_that_did_not_help() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let mut manager = Nobody;
        let mut bench = bench(&node, &mut manager, dir.path());
        let mut suspected = Choice { config: true, ..Choice::default() };
        let older = r#"{"gateway":{"mode":"local"}}"#;
        let owners = r#"{"gateway":{"mode":"local","port":4711}}"#;
        let live = || std::fs::read_to_string(&node.config_path).unwrap();

        // What does not parse is broken for certain: what replaces it stays.
        std::fs::write(&node.config_path, "{").unwrap();
        let kept = trial::keep(&bench, &suspected);
        assert_eq!(kept, None);
        std::fs::write(&node.config_path, older).unwrap();
        trial::begun(&bench, kept).unwrap();
        assert!(!trial::on(&bench.quarantine));

        // A whole one is its owner's newest word.
        std::fs::write(&node.config_path, owners).unwrap();
        let kept = trial::keep(&bench, &suspected);
        assert!(kept.is_some());
        std::fs::write(&node.config_path, older).unwrap();
        trial::begun(&bench, kept).unwrap();
        assert!(trial::on(&bench.quarantine));
        // A second turn of the layer finds the older one there: the owner's is not written over.
        trial::begun(&bench, Some(b"{}".to_vec())).unwrap();
        trial::over(&mut bench).unwrap();
        assert_eq!(live(), owners);
        assert!(!trial::on(&bench.quarantine), "once");
        let aside = bench.quarantine.join("made-anew");
        assert_eq!(std::fs::read_dir(aside).unwrap().count(), 1, "the older one is not lost either");

        // Somebody wrote one in the middle of it: that stays.
        std::fs::write(&node.config_path, older).unwrap();
        trial::begun(&bench, Some(owners.into())).unwrap();
        std::fs::write(&node.config_path, "{\"new\": 1}").unwrap();
        trial::over(&mut bench).unwrap();
        assert_eq!(live(), "{\"new\": 1}");

        // Where the config is not blamed nothing is on trial.
        suspected.config = false;
        std::fs::write(&node.config_path, owners).unwrap();
        assert_eq!(trial::keep(&bench, &suspected), None);
    }

    #[test]
    fn what_came_back_names_its_moment_and_what_cannot_be_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let mut manager = Nobody;
        let counts = |jobs| Baseline {
            counts: node::identity::Counts { jobs, ..Default::default() },
            ..Baseline::default()
        };
        let known = counts(9);
        let mut bench = bench(&node, &mut manager, dir.path());
        bench.baseline = Some(&known);
        let class = |files| serde_json::json!({"files": files, "bytes": 40, "taken": "2026-01-01T10:20:30Z"});
        let info: SnapshotInfo = serde_json::from_value(serde_json::json!({
            "id": "7", "number": 1, "taken": "2026-01-02T00:00:00Z",
            "classes": {"workspace": class(3), "state": class(1), "program": class(5), "config": class(1)},
            "note": "", "version": null,
            "roots": [{"name": "workspace", "path": "/w", "class": "workspace"},
                      {"name": "state", "path": "/s.sqlite", "class": "state"}],
            "node": null, "baseline": serde_json::to_value(counts(4)).unwrap()
        }))
        .unwrap();
        let missing = |root: &str, class| Difference {
            root: root.into(),
            path: PathBuf::new(),
            class,
            kind: DifferenceKind::Missing,
        };
        let wanted = [
            missing("program", Class::Program),
            missing("config", Class::Config),
            missing("workspace", Class::Workspace),
            missing("state", Class::State),
        ];
        let said: Vec<String> = lacks(&bench, &info, &wanted).into_iter().map(|c| c.what).collect();
        assert_eq!(said.len(), 2, "program and config belong to nobody who writes: {said:?}");
        let said = said.join("\n");
        assert!(
            said.contains("the workspace in /w is as it was on 2026-01-01 10:20 UTC (3 files, 40 bytes)"),
            "{said}"
        );
        assert!(said.contains("written after that is not in it; it holds 4 of 9 scheduled jobs"), "{said}");
    }

    #[test]
    fn what_the_user_added_or_changed_is_never_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let (gone, there) = (dir.path().join("gone"), dir.path().join("there"));
        std::fs::create_dir(&there).unwrap();
        std::fs::write(there.join("b"), "x").unwrap();
        let info: SnapshotInfo = serde_json::from_value(serde_json::json!({
            "id": "1", "number": 1, "taken": "2026-01-01T00:00:00Z", "classes": {}, "note": "", "version": null,
            "roots": [{"name": "workspace", "path": gone, "class": "workspace"},
                      {"name": "workspace-1", "path": there, "class": "workspace"}],
            "node": null, "baseline": null
        }))
        .unwrap();
        let choice = Choice::of(&node, &[finding(FaultKind::RootMissing, Some(Class::Workspace), &[])]);
        let difference = |root: &str, kind| Difference {
            root: root.into(),
            path: PathBuf::from("a"),
            class: Class::Workspace,
            kind,
        };
        assert!(choice.wants(&info, &difference("workspace", DifferenceKind::Missing)));
        for kind in [DifferenceKind::Changed, DifferenceKind::Extra, DifferenceKind::ModeOrOwner] {
            assert!(!choice.wants(&info, &difference("workspace", kind)), "{kind:?}");
        }
        // The other workspace is whole: what its owner deleted there stays deleted.
        assert!(!choice.wants(&info, &difference("workspace-1", DifferenceKind::Missing)));
    }

    /// A node's state directory with something in every root, in a trusted snapshot.
    fn remembered_state(dir: &Path, node: &Node) -> Store {
        let s = &node.state_dir;
        for file in [
            "openclaw.json",
            "state/other.json",
            "agents/main/agent/notes.json",
            "agents/main/sessions/chat.jsonl",
            "credentials/x.json",
            "workspace/MEMORY.md",
            "extensions/mine.js",
        ] {
            std::fs::create_dir_all(s.join(file).parent().unwrap()).unwrap();
            std::fs::write(s.join(file), r#"{"gateway":{"mode":"local","auth":{"token":"t"}}}"#).unwrap();
        }
        let store = Store::open_or_create(&dir.join("store"), &dir.join("keys/key")).unwrap();
        let users: Vec<Class> = Class::ALL.into_iter().filter(|c| !c.converges()).collect();
        let roots: Vec<store::Root> =
            node::roots::roots(node).into_iter().filter(|r| users.contains(&r.class)).collect();
        let request = store::Request {
            roots: &roots,
            classes: &users,
            note: "",
            version: Some("1"),
            node: serde_json::Value::Null,
            baseline: serde_json::Value::Null,
        };
        let deadline = host::clock::Deadline::after(std::time::Duration::from_secs(30));
        let id = store.snapshot(&request, &mut |_| {}, deadline).unwrap().id;
        store.set_trust(&id, store::Trust::Good).unwrap();
        store
    }

    #[test]
    fn a_state_directory_that_is_gone_comes_back_with_all_that_was_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let node = node(&dir);
        let store = remembered_state(&dir, &node);
        std::fs::remove_dir_all(&node.state_dir).unwrap();
        let mut manager = Nobody;
        let mut bench = bench(&node, &mut manager, &dir);
        bench.store = Some(&store);
        let findings = [finding(FaultKind::RootMissing, Some(Class::State), &[])];
        let mut report = Report::default();
        let done = repair(&mut bench, &Choice::of(&node, &findings), &mut report);
        for file in [
            "openclaw.json",
            "extensions/mine.js",
            "state/other.json",
            "agents/main/sessions/chat.jsonl",
            "credentials/x.json",
            "workspace/MEMORY.md",
        ] {
            assert!(node.state_dir.join(file).is_file(), "{file} is not back: {done:?} {report:?}");
        }
        done.unwrap();
    }

    #[test]
    fn transcripts_come_back_beside_a_database_that_was_rescued() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let node = node(&dir);
        let store = remembered_state(&dir, &node);
        // `rm -rf agents` under a running gateway: its open database was saved, as the step does first of all.
        std::fs::remove_dir_all(node.state_dir.join("agents")).unwrap();
        let mut manager = Nobody;
        let mut bench = bench(&node, &mut manager, &dir);
        bench.store = Some(&store);
        let saved = bench.quarantine.join("salvaged/1");
        std::fs::create_dir_all(&saved).unwrap();
        let copy = saved.join("0-openclaw-agent.sqlite");
        std::fs::write(&copy, b"the newest rows").unwrap();
        let live = node.state_dir.join("agents/main/agent/openclaw-agent.sqlite");
        std::fs::write(beside(&copy, BELONGS), live.as_os_str().as_bytes()).unwrap();
        let findings = [finding(FaultKind::RootMissing, Some(Class::Sessions), &[])];
        let report = work(&mut bench, &findings, false, false).unwrap();
        assert_eq!(std::fs::read(&live).unwrap(), b"the newest rows");
        let chat = node.state_dir.join("agents/main/sessions/chat.jsonl");
        assert!(chat.is_file(), "the snapshot holds it and it is not put back: {report:?}");
    }

    #[test]
    fn credentials_that_are_gone_as_a_whole_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let node = node(&dir);
        let store = remembered_state(&dir, &node);
        std::fs::remove_dir_all(node.state_dir.join("credentials")).unwrap();
        let known = Baseline { device_id: Some("x".into()), ..Baseline::default() };
        let deadline = host::clock::Deadline::after(std::time::Duration::from_secs(30));
        let exam =
            crate::examine(&node, Some(&store), Some(&known), None, crate::Care::Down, deadline).unwrap();
        let gone = |f: &&Finding| f.kind == FaultKind::RootMissing && f.class == Some(Class::Credentials);
        assert!(exam.findings.iter().any(|f| gone(&f)), "{:?}", exam.findings);
    }

    #[test]
    fn what_a_gateway_makes_again_of_a_deleted_state_directory_keeps_nothing_from_coming_back() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let node = node(&dir);
        let s = &node.state_dir;
        let store = remembered_state(&dir, &node);
        let mut manager = Nobody;
        let mut bench = bench(&node, &mut manager, &dir);
        bench.store = Some(&store);
        let findings = [finding(FaultKind::RootMissing, Some(Class::State), &[])];
        // As long as something else is there, what is missing beside it was its owner's to delete.
        std::fs::remove_dir_all(s.join("extensions")).unwrap();
        std::fs::remove_dir_all(s.join("state")).unwrap();
        work(&mut bench, &findings, false, false).unwrap();
        assert!(s.join("state/other.json").is_file() && !s.join("extensions").exists());
        // Another incident.
        bench.quarantine = dir.join("quarantine/00000002");
        std::fs::remove_dir_all(s).unwrap();
        for made in ["state", "tmp/openclaw-0"] {
            std::fs::create_dir_all(s.join(made)).unwrap();
        }
        std::fs::write(s.join("tmp/openclaw-0/gateway.state.lock"), "{}").unwrap();
        work(&mut bench, &findings, false, false).unwrap();
        for file in [
            "openclaw.json",
            "extensions/mine.js",
            "state/other.json",
            "credentials/x.json",
            "workspace/MEMORY.md",
        ] {
            assert!(s.join(file).is_file(), "{file}");
        }
    }

    /// What a look finds of credentials that the trusted snapshot of `store` holds.
    fn looked(node: &Node, store: &Store) -> Vec<FaultKind> {
        let known = Baseline { device_id: Some("x".into()), ..Baseline::default() };
        let deadline = host::clock::Deadline::after(std::time::Duration::from_secs(30));
        let exam =
            crate::examine(node, Some(store), Some(&known), None, crate::Care::Down, deadline).unwrap();
        let of = |f: &&Finding| f.class == Some(Class::Credentials);
        exam.findings.iter().filter(of).map(|f| f.kind).collect()
    }

    #[test]
    fn credentials_that_were_emptied_are_damage_unless_there_was_only_one() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let node = node(&dir);
        let credentials = node.state_dir.join("credentials");
        let store = remembered_state(&dir, &node);
        assert_eq!(looked(&node, &store), []);
        std::fs::remove_file(credentials.join("x.json")).unwrap();
        assert_eq!(looked(&node, &store), [], "its owner logged the only channel out");
        std::fs::write(credentials.join("y.json"), "{}").unwrap();
        let store = remembered_state(&dir, &node);
        std::fs::remove_file(credentials.join("x.json")).unwrap();
        assert_eq!(looked(&node, &store), [], "one of two");
        std::fs::remove_file(credentials.join("y.json")).unwrap();
        assert_eq!(looked(&node, &store), [FaultKind::RootMissing]);
        // And it is put right while the node serves.
        let mut manager = Nobody;
        let mut bench = bench(&node, &mut manager, &dir);
        bench.store = Some(&store);
        let findings = [finding(FaultKind::RootMissing, Some(Class::Credentials), &[])];
        crate::in_place::work(&mut bench, &findings).unwrap();
        assert!(credentials.join("x.json").is_file() && credentials.join("y.json").is_file());
    }

    #[test]
    fn when_all_sessions_are_forgotten_the_agents_databases_come_back_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let node = node(&dir);
        let s = &node.state_dir;
        let database = |agent: &str| s.join("agents").join(agent).join("agent/openclaw-agent.sqlite");
        for agent in ["main", "second", "third"] {
            std::fs::create_dir_all(database(agent).parent().unwrap()).unwrap();
            std::fs::write(database(agent), agent).unwrap();
        }
        std::fs::create_dir_all(s.join("state")).unwrap();
        std::fs::write(node.state_db(), "older").unwrap();
        let store = remembered_state(&dir, &node);
        std::fs::remove_file(database("main")).unwrap();
        std::fs::write(database("second"), "").unwrap();
        std::fs::remove_dir_all(database("third").parent().unwrap()).unwrap();
        std::fs::write(node.state_db(), "newer and larger").unwrap();
        let deleted = s.join("agents/main/sessions/chat.jsonl");
        std::fs::remove_file(&deleted).unwrap();
        let mut manager = Nobody;
        let mut bench = bench(&node, &mut manager, &dir);
        bench.store = Some(&store);
        let findings = [finding(FaultKind::Amnesia, Some(Class::Sessions), &[])];
        assert!(!Choice::of(&node, &findings).is_empty());
        work(&mut bench, &findings, false, false).unwrap();
        for agent in ["main", "second", "third"] {
            assert_eq!(std::fs::read_to_string(database(agent)).unwrap(), agent);
        }
        assert_eq!(std::fs::read(node.state_db()).unwrap(), b"newer and larger");
        assert!(!deleted.exists(), "what its owner deleted beside them stays deleted");
    }

    #[test]
    fn what_was_gone_is_remembered_for_a_try_that_was_killed() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let node = node(&dir);
        let store = remembered_state(&dir, &node);
        std::fs::remove_dir_all(&node.state_dir).unwrap();
        let mut manager = Nobody;
        let mut bench = bench(&node, &mut manager, &dir);
        bench.store = Some(&store);
        let findings = [finding(FaultKind::RootMissing, Some(Class::State), &[])];
        let void = void_now(&bench, &Choice::of(&node, &findings));
        assert!(void.contains(&node.state_dir) && void.contains(&node.state_dir.join("agents")), "{void:?}");
        // Killed after a rescued database had made its directory again.
        std::fs::create_dir_all(node.state_dir.join("state")).unwrap();
        std::fs::write(node.state_db(), "rescued").unwrap();
        work(&mut bench, &findings, false, false).unwrap();
        assert!(node.state_dir.join("extensions/mine.js").is_file());
        assert!(node.state_dir.join("state/other.json").is_file());
    }
}
