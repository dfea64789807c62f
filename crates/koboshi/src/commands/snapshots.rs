//! `koboshi snapshot`: the store at the command line. Nothing here touches the node.

use super::desk::{Desk, Fields, ago, newest_first, seconds};
use super::kept;
use crate::cli::Snapshot;
use crate::control::{self, Order};
use crate::print::{Exit, bytes, duration};
use crate::{space, step};
use engine::Class;
use host::clock::Deadline;
use host::{Context, Error, Kind, Result};
use node::{Baseline, Node};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;
use store::{SnapshotInfo, Store};

/// The agent's own limit for a snapshot.
const TAKE_LIMIT: Duration = Duration::from_secs(900);
/// Reading and proving gigabytes from a slow disk takes its time; a person can end it.
const READ_LIMIT: Duration = Duration::from_secs(6 * 3600);
/// The agent answers an order within a turn of its loop.
const ORDER_LIMIT: Duration = Duration::from_secs(30);
/// Between two looks for the snapshot that the agent takes.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Does one of them.
pub(super) fn run(desk: &Desk, what: Option<&Snapshot>) -> Result<Exit> {
    match what {
        Some(Snapshot::Create { note }) => create(desk, note),
        None | Some(Snapshot::List) => list(desk),
        Some(Snapshot::Show { id }) => show(desk, id),
        Some(Snapshot::Verify { id }) => verify(desk, id.as_deref()),
        Some(Snapshot::Restore { id, to, classes }) => restore(desk, id, to, classes),
        Some(Snapshot::Prune { limit }) => prune(desk, *limit),
    }
}

fn create(desk: &Desk, note: &str) -> Result<Exit> {
    let node = desk.node()?;
    let serves = desk.status().is_some_and(|s| s.verdict.is_serving() && s.confirmed);
    let info = if serves { by_agent(desk, note)? } else { take(desk, &node, &desk.baseline(), note)? };
    let p = desk.printer;
    p.line(format!("Snapshot {} of {}: {}.", info.id, node.name, amount(&info)));
    p.line(if serves {
        "It is a candidate; the agent trusts it once the node has served on with exactly this."
    } else {
        "It is a candidate: no agent saw the node serve, so nothing is proven by it yet."
    });
    problems(desk, &info);
    p.object(Fields::default().put("snapshot", json(&info)).done());
    Ok(Exit::Done)
}

/// Has the running agent take it: it then also settles it.
fn by_agent(desk: &Desk, note: &str) -> Result<SnapshotInfo> {
    let before = newest_number(desk);
    control::give(&desk.places, &Order::Snapshot { note: note.to_owned() }, ORDER_LIMIT)?;
    let bar = desk.printer.spinner("the agent takes a snapshot");
    let deadline = Deadline::after(TAKE_LIMIT);
    while !deadline.passed() {
        if let Some(store) = step::open_store(&desk.places)?
            && let Some(info) = newest_first(&store)?.into_iter().next()
            && before.is_none_or(|n| info.number > n)
        {
            bar.done();
            return Ok(info);
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    bar.done();
    Err(Error::new(Kind::TimedOut, "take a snapshot", "the agent has not finished it in 15 minutes")
        .hint("koboshi status shows what the agent is doing and its last trouble"))
}

fn newest_number(desk: &Desk) -> Option<u64> {
    let store = step::open_store(&desk.places).ok()??;
    newest_first(&store).ok()?.first().map(|i| i.number)
}

/// Takes one in this process, with progress.
pub(super) fn take(desk: &Desk, node: &Node, baseline: &Baseline, note: &str) -> Result<SnapshotInfo> {
    desk.places.make()?;
    kept::open(desk)?;
    let bar = desk.printer.spinner(&format!("taking a snapshot of {}", node.name));
    let info = step::snapshot(
        &desk.places,
        node,
        Some(baseline),
        &[],
        note,
        &mut |progress| bar.set(progress.bytes, 0),
        Deadline::after(TAKE_LIMIT),
    );
    bar.done();
    info
}

fn list(desk: &Desk) -> Result<Exit> {
    let p = desk.printer;
    let Some(store) = kept::open(desk)? else {
        p.line(format!(
            "There is no store in {} yet: koboshi install sets it up.",
            desk.places.store().display()
        ));
        p.object(Fields::default().put("snapshots", Vec::<Value>::new()).done());
        return Ok(Exit::Done);
    };
    let all = newest_first(&store)?;
    let size = store.size()?;
    let limit = space::limit_bytes(&desk.config, &desk.places)?;
    let rows: Vec<Vec<String>> = all
        .iter()
        .map(|i| {
            let (files, size) = total(i);
            vec![
                i.id.clone(),
                ago(i.taken),
                i.trust.to_string(),
                i.version.clone().unwrap_or_default(),
                files.to_string(),
                bytes(size),
                i.note.clone(),
            ]
        })
        .collect();
    if rows.is_empty() {
        p.line("There is no snapshot yet: koboshi snapshot create takes one.");
    } else {
        p.table(&["id", "taken", "trust", "version", "files", "size", "note"], &rows);
        p.line(format!("{} on disk, of at most {}.", bytes(size.bytes), bytes(limit)));
    }
    let unreadable = store.unreadable()?;
    for (id, e) in &unreadable {
        p.line(format!("{} {id}: {}", p.red("unreadable"), e.why));
    }
    p.object(
        Fields::default()
            .put("snapshots", all.iter().map(json).collect::<Vec<_>>())
            .put("store_bytes", size.bytes)
            .put("limit_bytes", limit)
            .put("unreadable", unreadable.iter().map(|(id, _)| id.clone()).collect::<Vec<_>>())
            .done(),
    );
    Ok(Exit::Done)
}

fn show(desk: &Desk, id: &str) -> Result<Exit> {
    let store = desk.store()?;
    let info = resolve(&store, id)?;
    let p = desk.printer;
    p.line(p.bold(&format!("snapshot {} ({})", info.id, info.trust)));
    p.line(format!(
        "  taken {} UTC, {}: {}",
        info.taken.strftime("%Y-%m-%d %H:%M:%S"),
        ago(info.taken),
        info.note
    ));
    if let Some(version) = &info.version {
        p.line(format!("  OpenClaw {version}"));
    }
    p.line(format!(
        "  cost {} and {} of disk",
        duration(info.cost.wall_ms as u64),
        bytes(info.cost.added_bytes)
    ));
    let rows: Vec<Vec<String>> = info
        .classes
        .iter()
        .map(|(class, c)| vec![class.to_string(), c.files.to_string(), bytes(c.bytes), ago(c.taken)])
        .collect();
    p.table(&["class", "files", "size", "seen"], &rows);
    let rows: Vec<Vec<String>> = info
        .roots
        .iter()
        .map(|r| vec![r.name.clone(), r.class.to_string(), r.path.display().to_string()])
        .collect();
    p.line("");
    p.table(&["root", "class", "path"], &rows);
    problems(desk, &info);
    p.object(Fields::default().put("snapshot", json(&info)).done());
    Ok(Exit::Done)
}

fn problems(desk: &Desk, info: &SnapshotInfo) {
    for problem in &info.problems {
        let carried = if problem.carried { " (kept from the snapshot before)" } else { "" };
        desk.printer.line(format!(
            "  not as it should be: {}/{}: {}{carried}",
            problem.root,
            problem.path.display(),
            problem.why
        ));
    }
}

fn verify(desk: &Desk, id: Option<&str>) -> Result<Exit> {
    let store = desk.store()?;
    let id = id.map(|id| resolve(&store, id)).transpose()?.map(|i| i.id);
    let p = desk.printer;
    let bar = p.spinner("reading and proving every stored byte");
    let report = store.verify(id.as_deref(), Deadline::after(READ_LIMIT));
    bar.done();
    let report = report?;
    let of = id.as_ref().map_or_else(|| "all snapshots".to_owned(), |id| format!("snapshot {id}"));
    let took = duration(report.cost.wall_ms as u64);
    if report.bad.is_empty() {
        p.line(format!(
            "{}: {} objects, {} of {of} are what they were, in {took}.",
            p.green("proven"),
            report.objects,
            bytes(report.bytes)
        ));
    } else {
        p.line(format!(
            "{}: {} of {} objects of {of} fail their proof:",
            p.red("damaged"),
            report.bad.len(),
            report.objects
        ));
        for bad in &report.bad {
            let needs = if bad.snapshots.is_empty() {
                String::new()
            } else {
                format!(" (in {})", bad.snapshots.join(", "))
            };
            p.line(format!("  {}: {}{needs}", bad.what, bad.why));
        }
        p.line("A repair passes them over and takes the bytes from elsewhere, or an older snapshot.");
        p.line("  fix: koboshi snapshot create stores what the node still has anew");
    }
    let sound = report.bad.is_empty();
    p.object(
        Fields::default()
            .put("sound", sound)
            .put("objects", report.objects)
            .put("bytes", report.bytes)
            .put("bad", serde_json::to_value(&report.bad).unwrap_or_default())
            .put("took_ms", report.cost.wall_ms)
            .done(),
    );
    Ok(if sound { Exit::Done } else { Exit::Failed })
}

fn restore(desk: &Desk, id: &str, to: &Path, classes: &[String]) -> Result<Exit> {
    let store = desk.store()?;
    let info = resolve(&store, id)?;
    let wanted = wanted(classes)?;
    let chosen: Vec<Class> = wanted.into_iter().filter(|c| info.classes.contains_key(c)).collect();
    if chosen.is_empty() {
        let held: Vec<&str> = info.classes.keys().map(|c| c.name()).collect();
        return Err(Error::new(
            Kind::NotFound,
            format!("restore from snapshot {}", info.id),
            format!("it holds none of the classes asked for, only {}", held.join(", ")),
        ));
    }
    let to = std::path::absolute(to).context(|| format!("resolve {}", to.display()))?;
    refuse_places_in_use(desk, &info, &to)?;
    let p = desk.printer;
    let bar = p.spinner(&format!("restoring {} into {}", info.id, to.display()));
    std::fs::create_dir_all(&to).context(|| format!("make {}", to.display()))?;
    let done = store.export(&info.id, &chosen, &to, Deadline::after(READ_LIMIT));
    bar.done();
    let done = done?;
    p.line(format!(
        "{} files, {} of snapshot {} lie in {}, every byte proven.",
        done.files,
        bytes(done.bytes),
        info.id,
        to.display()
    ));
    for root in info.roots.iter().filter(|r| chosen.contains(&r.class)) {
        p.line(format!("  {}  was {}", to.join(&root.name).display(), root.path.display()));
    }
    p.object(
        Fields::default()
            .put("snapshot", info.id.as_str())
            .put("to", to.display().to_string())
            .put("classes", chosen.iter().map(|c| c.name()).collect::<Vec<_>>())
            .put("files", done.files)
            .put("bytes", done.bytes)
            .done(),
    );
    Ok(Exit::Done)
}

/// A restore by hand goes beside the node, never into it: what may be put into a node is decided by the class rules.
fn refuse_places_in_use(desk: &Desk, info: &SnapshotInfo, to: &Path) -> Result<()> {
    let what = || format!("restore into {}", to.display());
    let taken = std::fs::read_dir(to).map(|mut d| d.next().is_some());
    if to.symlink_metadata().is_ok() && !matches!(taken, Ok(false)) {
        return Err(Error::new(Kind::Usage, what(), "it is there already and is not an empty directory")
            .hint("name a directory that does not exist yet"));
    }
    let near = to.ancestors().find_map(|a| Some(a.canonicalize().ok()?.join(to.strip_prefix(a).ok()?)));
    let real = near.unwrap_or_else(|| to.to_owned());
    let used = info.roots.iter().map(|r| r.path.clone()).chain([desk.places.store()]);
    match used.into_iter().find(|path| real.starts_with(path)) {
        Some(path) => Err(Error::new(Kind::Usage, what(), format!("it lies within {}, which is in use", path.display()))
            .hint("name a directory outside of the node and of koboshi's own; `koboshi recover` repairs the node itself")),
        None => Ok(()),
    }
}

fn wanted(names: &[String]) -> Result<Vec<Class>> {
    if names.is_empty() {
        return Ok(Class::ALL.to_vec());
    }
    names
        .iter()
        .map(|name| {
            Class::ALL.into_iter().find(|c| c.name() == name).ok_or_else(|| {
                let all: Vec<&str> = Class::ALL.iter().map(|c| c.name()).collect();
                Error::new(Kind::Usage, format!("restore the class {name:?}"), "there is no such class")
                    .hint(format!("one of {}", all.join(", ")))
            })
        })
        .collect()
}

fn prune(desk: &Desk, limit: Option<u64>) -> Result<Exit> {
    let store = desk.store()?;
    let limit = match limit {
        Some(limit) => limit,
        None => space::limit_bytes(&desk.config, &desk.places)?,
    };
    let bar = desk.printer.spinner("pruning");
    let pruned = store.prune(limit, Deadline::after(TAKE_LIMIT));
    bar.done();
    let pruned = pruned?;
    let p = desk.printer;
    p.line(format!(
        "{} snapshots removed: {} before, {} now, limit {}.",
        pruned.removed.len(),
        bytes(pruned.before_bytes),
        bytes(pruned.after_bytes),
        bytes(limit)
    ));
    if pruned.over_limit {
        p.line("What the newest trusted snapshots need is larger than the limit and is kept.");
    }
    p.object(
        Fields::default()
            .put("removed", pruned.removed.clone())
            .put("before_bytes", pruned.before_bytes)
            .put("after_bytes", pruned.after_bytes)
            .put("limit_bytes", limit)
            .put("over_limit", pruned.over_limit)
            .done(),
    );
    Ok(Exit::Done)
}

/// A snapshot by its id, by the first letters of it, or by its number.
fn resolve(store: &Store, id: &str) -> Result<SnapshotInfo> {
    let what = || format!("find snapshot {id:?}");
    let all = newest_first(store)?;
    let number = id.parse::<u64>().ok();
    if let Some(info) = all.iter().find(|i| i.id == id || Some(i.number) == number) {
        return Ok(info.clone());
    }
    let fits: Vec<&SnapshotInfo> = all.iter().filter(|i| !id.is_empty() && i.id.starts_with(id)).collect();
    match fits.as_slice() {
        [only] => Ok((*only).clone()),
        [] => Err(Error::new(Kind::NotFound, what(), "there is no such snapshot")
            .hint("koboshi snapshot list shows them")),
        many => {
            let ids: Vec<&str> = many.iter().map(|i| i.id.as_str()).collect();
            Err(Error::new(Kind::Usage, what(), format!("{} begin so: {}", ids.len(), ids.join(", ")))
                .hint("give more letters"))
        }
    }
}

fn total(info: &SnapshotInfo) -> (u64, u64) {
    info.classes.values().fold((0, 0), |(files, bytes), c| (files + c.files, bytes + c.bytes))
}

/// What it holds, in a few words.
pub(super) fn amount(info: &SnapshotInfo) -> String {
    let (files, size) = total(info);
    let took = seconds((info.cost.wall_ms / 1000.0).ceil() as u64);
    format!("{files} files, {}, {} of disk, taken in {took}", bytes(size), bytes(info.cost.added_bytes))
}

/// One snapshot for JSON.
pub(super) fn json(info: &SnapshotInfo) -> Value {
    let (files, size) = total(info);
    let classes: serde_json::Map<String, Value> = info
        .classes
        .iter()
        .map(|(class, c)| {
            let fields = Fields::default()
                .put("files", c.files)
                .put("bytes", c.bytes)
                .put("taken", c.taken.to_string());
            (class.name().to_owned(), fields.done())
        })
        .collect();
    let problems: Vec<Value> = info
        .problems
        .iter()
        .map(|p| {
            Fields::default()
                .put("root", p.root.as_str())
                .put("path", p.path.display().to_string())
                .put("why", p.why.as_str())
                .put("carried", p.carried)
                .done()
        })
        .collect();
    Fields::default()
        .put("id", info.id.as_str())
        .put("number", info.number)
        .put("taken", info.taken.to_string())
        .put("trust", info.trust.name())
        .put("note", info.note.as_str())
        .maybe("version", info.version.clone())
        .put("files", files)
        .put("bytes", size)
        .put("added_bytes", info.cost.added_bytes)
        .put("took_ms", info.cost.wall_ms)
        .put("classes", classes)
        .put("problems", problems)
        .done()
}
