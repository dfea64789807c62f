//! Layer 1: repair from the newest trusted snapshot, in one go, the least scope that all findings explain.
//!
//! Program, runtime and service files converge to the snapshot. The config is touched only when it is missing, invalid
//! or blamed by the gateway. What belongs to the user is touched only where a whole root is gone, a database is
//! provably corrupt, or the node woke up without its memory; then only that part goes back, and the bytes that a
//! running gateway still holds open are saved first, because they are newer than any snapshot.

mod choice;
pub(crate) mod drop_ins;
mod rescue;

pub use choice::Choice;
pub(crate) use choice::is_void;
pub(crate) use rescue::bring_back;

use crate::{Bench, CameBack, Report, owners, quiet, trial};
use choice::{is_gone, join};
use engine::{Class, FaultKind, Finding};
use host::{Context, Error, Kind, Result};
use node::Baseline;
use node::gates::{self, Gate};
use node::roots::resolved;
use rescue::{left_by_an_earlier_try, put_back, save_open_databases};
use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use store::{Depth, Difference, Plan, Scope, SnapshotInfo, Store};

/// What the repair itself may take after the stop: layer 1's least work.
const NEEDS: std::time::Duration = std::time::Duration::from_secs(30);

/// Less time than this is not enough for another turn and the look after it.
const AGAIN: std::time::Duration = std::time::Duration::from_secs(12);

/// Snapshots tried before the layer gives up: each costs a compare.
const MAX_SNAPSHOTS: usize = 5;

/// The work of layer 1.
///
/// Whoever deletes a node does not delete it in one moment: what a repair puts back into a tree that is just being emptied
/// goes again, and the rest of the node goes after it. So where something was missing it is looked at once more until
/// nothing new is, and repaired again, while there is time.
pub fn work(bench: &mut Bench<'_>, findings: &[Finding], hung: bool, wider: bool) -> Result<Report> {
    /// Between two looks: a deletion that goes on has taken something more.
    const PAUSE: std::time::Duration = std::time::Duration::from_millis(500);
    let mut report = Report::default();
    // What was rescued is put back once; no later turn puts a snapshot's in its place.
    let mut kept = BTreeSet::new();
    let mut done = repair_once(bench, findings, hung, wider, &mut kept, &mut report);
    let mut asked = findings.to_vec();
    while goes_on(&asked) && bench.deadline.left() > AGAIN {
        let Some(now) = found_now(bench).filter(|now| *now != asked) else { break };
        if Choice::of(bench.node, &now).is_empty() {
            break;
        }
        report.did("more of it was deleted meanwhile: once more");
        std::thread::sleep(PAUSE);
        // Whatever went during the pause is in it too.
        asked = found_now(bench).unwrap_or(now);
        // That nothing more could be put back does not undo what was.
        done = repair_once(bench, &asked, false, wider, &mut kept, &mut report).or(done);
    }
    done.map(|()| report)
}

/// Whether a deletion may be the cause.
fn goes_on(findings: &[Finding]) -> bool {
    let missing = |words: &str| words.contains("missing") || words.ends_with("is gone");
    findings.iter().any(|f| match f.kind {
        FaultKind::RootMissing => true,
        FaultKind::FilesDamaged => missing(&f.what) || f.evidence.iter().any(|e| missing(e)),
        FaultKind::ProcessGone
        | FaultKind::Hung
        | FaultKind::ConfigBroken
        | FaultKind::DatabaseCorrupt
        | FaultKind::Amnesia
        | FaultKind::RuntimeUnfit
        | FaultKind::ServiceLatched
        | FaultKind::PortTaken
        | FaultKind::Permission
        | FaultKind::DiskFull
        | FaultKind::SchemaNewer
        | FaultKind::UpdateAtWork
        | FaultKind::OwnersWill
        | FaultKind::BackupStale
        | FaultKind::Notice => false,
    })
}

/// What a look at the disk finds now that this layer may be able to put right.
fn found_now(bench: &Bench<'_>) -> Option<Vec<Finding>> {
    let mut exam =
        crate::examine(bench.node, bench.store, bench.baseline, None, crate::Care::Down, bench.deadline)
            .ok()?;
    exam.findings.retain(|f| !matches!(f.kind, FaultKind::Notice | FaultKind::BackupStale));
    Some(exam.findings)
}

fn repair_once(
    bench: &mut Bench<'_>,
    findings: &[Finding],
    hung: bool,
    wider: bool,
    kept: &mut BTreeSet<PathBuf>,
    report: &mut Report,
) -> Result<()> {
    let mut choice = Choice::of(bench.node, findings);
    // Files of another owner are the whole reason where nothing else is found.
    let foreign = findings.iter().any(|f| f.kind == FaultKind::Permission);
    if wider || choice.is_empty() && !foreign {
        choice = choice.widened();
    }
    choice.void = void_now(bench, &choice);
    // While the gateway lives, its open descriptors hold the newest bytes of a deleted database.
    let mut saved = save_open_databases(bench, &choice, report)?;
    quiet::hold(bench, report);
    quiet::stop(bench, hung, NEEDS, report)?;
    if foreign && let Err(e) = owners::give_back(bench, report) {
        // A rescued database and all other damage are still to be dealt with.
        report.could_not(e.to_string());
    }
    saved.extend(left_by_an_earlier_try(bench, &choice, &saved)?);
    for database in saved {
        put_back(bench, &database, report)?;
        kept.insert(database.live);
    }
    // What was put back is newer than the snapshot's.
    choice.databases.retain(|live| !kept.contains(live));
    choice.kept.clone_from(kept);
    if choice.is_empty() {
        report.did("nothing is left to be taken from a snapshot");
    } else {
        let trial = trial::keep(bench, &choice);
        // Nothing that can be seen is wrong with what the snapshot knows: perhaps with what it does not.
        let mut set_aside = 0;
        if choice.thorough {
            let trusted = bench.store.and_then(|s| trusted_newest_first(s).ok()).unwrap_or_default();
            match drop_ins::aside(bench, &trusted, report) {
                Ok(count) => set_aside += count,
                Err(e) => report.could_not(e.to_string()),
            }
        }
        let no_unit = node::service::unit_is_gone(bench.node);
        let done = repair(bench, &choice, report);
        if choice.thorough {
            // After the repair: what lies there may be large, and its removal must not cost the rest its time.
            set_aside += transient_aside(bench, report);
        }
        // A unit that its owner has disabled stays so.
        let disabled = bench.baseline.is_some_and(|b| b.enabled == Some(false));
        if no_unit && !disabled && !node::service::unit_is_gone(bench.node) {
            match node::service::enable_again(bench.node) {
                Ok(true) => report.did("the unit starts with the machine again"),
                Ok(false) => {}
                Err(e) => report.could_not(e.to_string()),
            }
        }
        trial::begun(bench, trial)?;
        match done {
            // What was rescued is back; that no snapshot holds the rest keeps nothing from starting by itself.
            Err(e) if !choice.kept.is_empty() || set_aside > 0 => report.could_not(format!("{e}")),
            done => done?,
        }
    }
    bench.manager.clear_latch(bench.deadline)
}

/// Sets aside what the node makes anew by itself (caches, temporary files): a torn one, or a file where a directory has to
/// be, is in no snapshot and keeps a gateway from starting all the same. How many.
///
/// Each is renamed where it lies, as the node's user: by no name of his does root move what is not his, and nothing is
/// copied. One of each is kept, the last; what was on its way in from a chat is never removed.
fn transient_aside(bench: &Bench<'_>, report: &mut Report) -> usize {
    let mut moved = 0;
    for name in node::roots::TRANSIENT {
        let path = bench.node.state_dir.join(name);
        let to = bench.node.state_dir.join(node::roots::aside(name));
        let renamed = host::user::as_user(bench.node.ids, || {
            // A link to a directory is its owner's arrangement.
            let whole = path.is_dir();
            let linked = path.symlink_metadata().is_ok_and(|m| m.is_symlink());
            let empty = whole && std::fs::read_dir(&path).is_ok_and(|mut d| d.next().is_none());
            // Logs say why; they are kept unless they are none.
            if path.symlink_metadata().is_err() || whole && (name == "logs" || linked) || empty {
                return Ok(false);
            }
            if to.symlink_metadata().is_ok() {
                if !node::roots::is_cache(name) {
                    return Ok(false);
                }
                remove_any(&to).context(|| format!("remove {}", to.display()))?;
            }
            std::fs::rename(&path, &to).context(|| format!("set {} aside", path.display()))?;
            Ok(true)
        });
        match renamed {
            Ok(true) => {
                report.did(format!(
                    "{}, which is made anew, was set aside to {}",
                    path.display(),
                    to.display()
                ));
                moved += 1;
            }
            Ok(false) => {}
            Err(e) => report.could_not(e.to_string()),
        }
    }
    moved
}

fn remove_any(path: &std::path::Path) -> std::io::Result<()> {
    if path.symlink_metadata()?.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }
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

/// The first of these, and how many more there are.
fn named(paths: &[PathBuf]) -> String {
    let first: Vec<String> = paths.iter().take(MAX_NAMED).map(|p| p.display().to_string()).collect();
    match paths.len().saturating_sub(MAX_NAMED) {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

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
    let wanted = differences.into_iter().filter(|d| choice.wants(info, d));
    // What cannot be put back here must not keep the rest from coming back: a later layer has other ways to a program or a
    // runtime, and none to the user's things.
    let (wanted, beyond): (Vec<Difference>, Vec<Difference>) = wanted.partition(|d| in_reach(info, d));
    if let Some(first) = beyond.first() {
        let what = format!(
            "{} entries where koboshi may not write, {}/{} first",
            beyond.len(),
            first.root,
            first.path.display()
        );
        if wanted.is_empty() {
            return Err(Error::new(Kind::Denied, format!("restore from snapshot {}", info.id), what));
        }
        report.could_not(format!("snapshot {}: left as they are: {what}", info.id));
    }
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
    if !repaired.freed.is_empty() {
        report.did(format!(
            "made changeable again what had been made immutable (chattr +i): {}",
            named(&repaired.freed)
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

/// Whether this process may put something in the place of this entry. Whatever else may be wrong there is not said here.
fn in_reach(info: &SnapshotInfo, difference: &Difference) -> bool {
    use rustix::fs::{Access, AtFlags, CWD, accessat};
    let Some(root) = info.roots.iter().find(|r| r.name == difference.root) else { return true };
    let path = join(&root.path, &difference.path);
    // What is missing of the way will be made in the lowest directory that is there.
    for dir in path.ancestors().skip(1) {
        match accessat(CWD, dir, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS) {
            Ok(()) => return true,
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {}
            Err(e) => {
                return !matches!(
                    e,
                    rustix::io::Errno::ACCESS | rustix::io::Errno::PERM | rustix::io::Errno::ROFS
                );
            }
        }
    }
    true
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
mod tests;
