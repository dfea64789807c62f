//! What layers 2 and 3 share: a program made anew from the registry, proven byte by byte, put in place by one exchange.
//!
//! npm decides only *which* packages lie *where*: it is asked to resolve, not to unpack (17 s instead of 95 on a busy
//! host, and the program is written once instead of three times). It runs without privileges in a fresh directory, may
//! hang, lie, be killed or be taken over, and none of that reaches the node: its exit code is not looked at, and its one
//! answer is judged like a stranger's. The stage is built from the registry's tarballs, each fetched by koboshi's own
//! client, read once, proven in memory and unpacked from that memory into a directory that only the one who will own the
//! program can write to. So there is no moment between proof and copy in which anybody could exchange anything.
//! Then: does it hold together, does the right Node run it, do its native modules load, does its entry point start? Only
//! after all that the gateway is stopped and the trees are exchanged. The previous tree stays until the new one has
//! settled.

mod build;
pub mod home;
mod lock;
mod moved;
mod place;
mod proof;
mod stage;
mod switch;
mod tools;
mod trial;

pub use moved::{Moved, away};
pub use place::Place;
pub use proof::Proof;
pub use switch::{Pending, settle, take_back};

use crate::{Bench, Report, quiet};
use host::registry::Registry;
use host::{Error, Kind, Result};
use node::range::Version;
use node::{Node, service};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The most npm ever gets; then it is killed with everything it started.
pub const NPM_LIMIT: Duration = Duration::from_secs(120);
/// A registry that does not answer one question in this time is as good as dead.
const ASK_LIMIT: Duration = Duration::from_secs(15);
/// Listing the new tree for peers to be measured by: it was just read and is in the page cache.
const LIST_LIMIT: Duration = Duration::from_secs(8);
/// What is left to do once the gateway has ended: renames, a link, a unit.
const NEEDS: Duration = Duration::from_secs(3);
/// What [`Order::version`] says where no version that ever served here can open the data any more.
pub const NEWEST: &str = "latest";
/// The package on the registry.
const PACKAGE: &str = "openclaw";
/// Where stages and previous trees lie, beside the program's own directory and on its file system, hidden from npm.
const STAGES: &str = "lib/.koboshi-install";

/// The service's files, as remembered.
const SERVICE: &str = "service.json";
const SERVICE_LIMIT_BYTES: u64 = 8 << 20;

/// What is to be installed, and where koboshi's own files lie.
#[derive(Debug, Clone)]
pub struct Order {
    /// The last good version, a full one; or [`NEWEST`], and no other tag.
    pub version: String,
    /// The integrity of its tarball as it was recorded when it was good, where it was.
    pub integrity: Option<String>,
    /// koboshi's own directory: proofs and what is not yet settled are remembered here, tarballs of Node and npm kept.
    pub state_dir: PathBuf,
    /// Scratch on a large disk; chosen by itself when none.
    pub scratch: Option<PathBuf>,
    /// npm's limit.
    pub npm_limit: Duration,
    /// Who this is done for, in [`Pending`].
    pub layer: engine::Layer,
}

/// Makes the program of `target` anew and puts it in place. `target` is the node as it will be (for layer 2 as it was).
pub fn work(bench: &mut Bench<'_>, target: &Node, order: &Order, hung: bool) -> Result<Report> {
    let mut report = Report::default();
    // What an earlier layer left in place after a bad verdict goes back first.
    take_back(&order.state_dir, bench.manager, bench.deadline, &mut report)?;
    let place = Place::of(target, order)?;
    let ready = prepare(bench, target, order, &place, &mut report)?;
    put(bench, target, order, &place, hung, ready, None, report)
}

/// A proven program beside the place of `target`'s.
fn prepare(
    bench: &Bench<'_>,
    target: &Node,
    order: &Order,
    place: &Place,
    report: &mut Report,
) -> Result<Ready> {
    if order.version != NEWEST
        && let Some(tree) = old_tree(bench, target)
    {
        report.did(format!("{} is the whole last good program: no need to fetch it", tree.display()));
        return Ok(Ready { program: tree, runtime: None, version: order.version.clone() });
    }
    let registry = Registry::from_env(place.rc_home.as_deref(), &[])?;
    let package = registry.resolve(
        PACKAGE,
        &order.version,
        bench.deadline.min(host::clock::Deadline::after(bench.limits.span(ASK_LIMIT))),
    )?;
    let served = bench.baseline.and_then(|b| b.version.clone());
    offered(&order.version, &package.version, &[target.package_version(), served])?;
    let order = &Order { version: package.version.clone(), ..order.clone() };
    let recorded = order.integrity.as_deref().and_then(host::registry::Integrity::parse);
    if recorded.is_some_and(|recorded| recorded != package.integrity) {
        return Err(Error::new(
            Kind::Corrupt,
            format!("ask for {PACKAGE} {}", order.version),
            format!(
                "the registry promises {}, recorded was {}",
                package.integrity,
                order.integrity.as_deref().unwrap_or("")
            ),
        )
        .hint("the registry or something on the way serves another package under this name"));
    }
    let base = place.base(order)?;
    let outcome = build::build(bench, target, order, place, &base, &registry, &package, report);
    // Hundreds of megabytes; what cannot be removed is found and removed by the next one.
    let _ = std::fs::remove_dir_all(&base);
    outcome
}

/// Whether what the registry offers is what was asked for. The newest must be newer than what is here: that one could not
/// open the data.
fn offered(asked: &str, offered: &str, here: &[Option<String>]) -> Result<()> {
    let refuse = |why: String| Err(Error::new(Kind::Corrupt, format!("ask for {PACKAGE} {asked}"), why));
    if asked != NEWEST {
        return if asked == offered {
            Ok(())
        } else {
            refuse(format!("the registry offers {offered} instead"))
        };
    }
    let parsed = Version::parse(offered);
    match here.iter().flatten().find(|known| Version::parse(known) >= parsed) {
        Some(known) => refuse(format!("its newest, {offered}, is no newer than {known}")),
        None if parsed.is_none() => refuse(format!("it offers {offered:?}, which is no version")),
        None => Ok(()),
    }
}

/// Whether the registry that an install would use describes the version that it would ask for.
#[must_use]
pub fn registry_answers(node: &Node, order: &Order, deadline: host::clock::Deadline) -> bool {
    // Whose settings count depends on whose prefix it is; of a prefix that nobody here may write to, the user's own.
    let place = Place::of(node, order).or_else(|_| Place::of(&away(node), order));
    let home = place.map_or_else(|_| Some(node.home.clone()), |place| place.rc_home);
    Registry::from_env(home.as_deref(), &[])
        .and_then(|registry| registry.resolve(PACKAGE, &order.version, deadline))
        .is_ok()
}

/// What stands ready to be exchanged in.
struct Ready {
    /// The program's tree on the prefix's file system.
    program: PathBuf,
    /// A runtime's tree, where the node needs one.
    runtime: Option<PathBuf>,
    /// The program's version.
    version: String,
}

/// A complete old tree that an interrupted npm left in its staging name: proven against the trusted snapshot.
fn old_tree(bench: &Bench<'_>, target: &Node) -> Option<PathBuf> {
    /// The store's name for the program's root.
    const ROOT: &str = "program";
    let store = bench.store?;
    let trusted = store.newest_trusted(None).ok()??;
    if target.package_dir != bench.node.package_dir {
        return None;
    }
    node::update::staging(target)
        .into_iter()
        .filter(|tree| tree.symlink_metadata().is_ok_and(|m| m.is_dir()))
        .find(|tree| {
            store.check_spare(&trusted.id, ROOT, tree, bench.deadline).is_ok_and(|spare| spare.ready)
        })
}

/// Stops the gateway and puts what stands ready in place. `back_to`: the node is on trial there, and this is where it goes
/// back to.
#[allow(clippy::too_many_arguments, reason = "the same few things that everything here is about")]
fn put(
    bench: &mut Bench<'_>,
    target: &Node,
    order: &Order,
    place: &Place,
    hung: bool,
    ready: Ready,
    back_to: Option<Node>,
    mut report: Report,
) -> Result<Report> {
    let order = &Order { version: ready.version.clone(), ..order.clone() };
    let target = &if ready.runtime.is_some() { moved::with_own_runtime(target) } else { target.clone() };
    let proof = known(&ready.program, order, bench.deadline, &mut report)?;
    // systemd would start the tree that is being replaced.
    quiet::hold(bench, &mut report);
    quiet::stop(bench, hung, NEEDS, &mut report)?;
    proof.save(&order.state_dir)?;
    into_place(bench, target, order, place, ready, &mut report)?;
    let was = Moved::load(&order.state_dir)?;
    // A layer's exchange is judged by its climb: what it left is only to be cleared away.
    let left = was.as_ref().filter(|_| back_to.is_none()).and_then(|m| match m.displaced() {
        true => Some(m.away.clone()),
        false => m.left.clone().or_else(|| m.back_to.clone()),
    });
    let left = left.filter(|left| left.package_dir != target.package_dir);
    let home = was.map_or_else(|| bench.node.clone(), |m| m.home);
    serve(&home, target, &order.state_dir, &mut report)?;
    if target != bench.node {
        Moved { home, away: target.clone(), back_to, left }.save(&order.state_dir)?;
    }
    bench.manager.reload(bench.deadline)?;
    bench.manager.clear_latch(bench.deadline)?;
    Ok(report)
}

/// A proof of the tree in its final place, for whoever looks at the disk later without any store.
fn known(
    program: &Path,
    order: &Order,
    deadline: host::clock::Deadline,
    report: &mut Report,
) -> Result<Proof> {
    let began = host::clock::now();
    let proof = Proof::of(program, &order.version)?;
    let took_s = host::clock::now().since_ms(began).unwrap_or(0) as f64 / 1000.0;
    report.did(format!("a proof of it is taken in {took_s:.1} s"));
    // The same for layer 4, for the day when this tree is gone and the store does not hold it yet. A help, not a need.
    let known = crate::peer_copy::known_programs(&order.state_dir);
    let by = deadline.min(host::clock::Deadline::after(LIST_LIMIT));
    if let Err(e) = crate::peer_copy::remember_made(program, &order.version, &known, by) {
        report.could_not(e.to_string());
    }
    Ok(proof)
}

/// Exchanges what stands ready in, with npm's link, and clears away what npm left half done.
fn into_place(
    bench: &Bench<'_>,
    target: &Node,
    order: &Order,
    place: &Place,
    ready: Ready,
    report: &mut Report,
) -> Result<()> {
    let mut swaps = vec![(ready.program, target.package_dir.clone())];
    if let (Some(stage), Some(live)) = (ready.runtime, &target.runtime_dir) {
        swaps.push((stage, live.clone()));
    }
    let pending = Pending {
        layer: order.layer,
        version: order.version.clone(),
        owner: place.owner,
        swaps,
        back: node::triage::program_is_whole(target),
        aside: Vec::new(),
        before: bench.node.clone(),
        after: target.clone(),
    };
    switch::exchange(order, place, &pending, bench.deadline, report)?;
    place.as_owner(|| link(target))?;
    for left in node::update::staging(target) {
        switch::aside(order, place, &left, report);
    }
    Ok(())
}

/// The service's files: the owner's own where they are gone, and our drop-in where the program or its runtime lie
/// elsewhere than at home.
fn serve(home: &Node, now: &Node, state_dir: &Path, report: &mut Report) -> Result<()> {
    let Some(unit) = &now.unit else { return Ok(()) };
    let remembered = remembered_service(state_dir);
    let ids = match unit.scope {
        node::Scope::User => now.ids,
        node::Scope::System => host::run::Ids::current(),
    };
    let done = host::user::as_user(ids, || {
        let mut done = service::restore(home, &remembered)?;
        if home.entry != now.entry || home.node_bin != now.node_bin {
            if let Some(file) = service::point(now)? {
                done.push(format!("{} points the service at {}", file.display(), now.package_dir.display()));
            }
        } else {
            service::unpoint(now)?;
        }
        Ok(done)
    })?;
    report.done.extend(done);
    Ok(())
}

/// The service's files as they were when the node last served.
fn remembered_service(state_dir: &Path) -> Vec<service::Remembered> {
    let bytes = host::files::read_bounded(&state_dir.join(SERVICE), SERVICE_LIMIT_BYTES);
    // What cannot be read is not remembered: then the unit is made anew.
    bytes.ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default()
}

/// Remembers the service's files; to be called while the node serves.
///
/// # Errors
/// When they cannot be written down.
pub fn remember_service(node: &Node, state_dir: &Path) -> Result<()> {
    let files = service::remember(node);
    // A unit that is gone while the node serves is no reason to forget it.
    if files.is_empty() || files == remembered_service(state_dir) {
        return Ok(());
    }
    let text = serde_json::to_vec(&files).map_err(|e| Error::new(Kind::System, "remember the service", e))?;
    host::files::write_atomic(&state_dir.join(SERVICE), &text, 0o600)
}

/// Notes that a proven program lies in place, where somebody else put it there: what lies there now is what it is.
///
/// # Errors
/// When it cannot be read or written down.
pub fn note_installed(node: &Node, version: &str, state_dir: &Path) -> Result<()> {
    Proof::of(&node.package_dir, version)?.save(state_dir)?;
    let known = crate::peer_copy::known_programs(state_dir);
    // A help for layer 4, not a need.
    let by = host::clock::Deadline::after(LIST_LIMIT);
    let _ = crate::peer_copy::remember_made(&node.package_dir, version, &known, by);
    Ok(())
}

/// `<prefix>/bin/openclaw`, as npm makes it.
fn link(target: &Node) -> Result<()> {
    use host::Context;
    let dir = target.prefix.join("bin");
    let link = dir.join("openclaw");
    let to = match target.package_dir.strip_prefix(&target.prefix) {
        Ok(below) => Path::new("..").join(below).join("openclaw.mjs"),
        Err(_) => target.package_dir.join("openclaw.mjs"),
    };
    let what = || format!("link {}", link.display());
    if std::fs::read_link(&link).is_ok_and(|now| now == to) {
        return Ok(());
    }
    std::fs::create_dir_all(&dir).context(what)?;
    let fresh = dir.join(format!(".koboshi-link-{}", std::process::id()));
    let _ = std::fs::remove_file(&fresh);
    std::os::unix::fs::symlink(&to, &fresh).context(what)?;
    std::fs::rename(&fresh, &link).context(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_asked_for_or_something_newer_than_all_that_is_here_is_taken() {
        let here = |all: &[&str]| all.iter().map(|v| Some((*v).to_owned())).chain([None]).collect::<Vec<_>>();
        for (asked, got, known, taken) in [
            ("2026.9.6", "2026.9.6", &["2026.9.6"][..], true),
            ("2026.9.6", "2026.9.7", &[], false),
            (NEWEST, "2026.10.1", &["2026.9.6", "2026.10.0"], true),
            (NEWEST, "2026.10.1", &["2026.9.6", "2026.10.1"], false),
            (NEWEST, "2026.9.5", &["2026.9.6"], false),
            (NEWEST, "2026.9.5", &[], true),
            (NEWEST, "nonsense", &[], false),
            (NEWEST, "nonsense", &["2026.9.6"], false),
        ] {
            assert_eq!(offered(asked, got, &here(known)).is_ok(), taken, "{asked} {got} {known:?}");
        }
    }
}
