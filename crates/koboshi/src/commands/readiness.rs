//! Which layers could work now, and why not: the same answer in `status`, `install`, `doctor` and `recover --dry-run`.

use super::desk::{Desk, Fields};
use super::kept::Kept;
use crate::agent::incident::keeps_from_starting;
use crate::{reinstall, sudo};
use engine::{Finding, Layer, Rung};
use host::clock::Deadline;
use node::{Node, gates, triage};
use serde_json::Value;
use std::time::Duration;

/// The quick look at the disk takes milliseconds; a stuck disk is not waited for.
const LOOK_LIMIT: Duration = Duration::from_secs(5);

/// One layer and whether it could work now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Readiness {
    pub(super) layer: Layer,
    /// What it would use, or why it does not apply.
    pub(super) state: Result<String, String>,
}

/// What readiness depends on.
#[derive(Debug, Default)]
pub(super) struct Disk {
    pub(super) findings: Vec<Finding>,
    /// The newest good snapshot's id.
    pub(super) good: Option<String>,
    /// Why the store cannot be used, where that is so.
    pub(super) store_trouble: Option<String>,
    /// Peers that could lend their program.
    pub(super) peers: usize,
}

/// A quick look: what costs milliseconds, and what the store said.
pub(super) fn look(desk: &Desk, node: &Node, kept: &Kept) -> Disk {
    let findings =
        triage::examine(node, &desk.baseline(), triage::Depth::Quick, Deadline::after(LOOK_LIMIT)).findings;
    Disk {
        findings,
        good: kept.good.as_ref().map(|i| i.id.clone()),
        store_trouble: kept.trouble.as_ref().map(ToString::to_string),
        peers: desk.config.peer.len(),
    }
}

/// Every layer, in the order in which they are climbed.
pub(super) fn layers(desk: &Desk, node: &Node, disk: &Disk) -> Vec<Readiness> {
    let dirty = disk.findings.iter().find(|f| keeps_from_starting(f));
    let restart = match dirty {
        Some(finding) => Err(format!("disk, config and state are not clean: {}", finding.what)),
        None => Ok("stop for certain, clear the latch, start".to_owned()),
    };
    let space = gates::space(&node.package_dir, 0);
    let restore = match (&disk.good, &disk.store_trouble, space.reason()) {
        (_, Some(trouble), _) => Err(trouble.clone()),
        (None, None, _) => {
            Err("there is no good snapshot yet: one becomes good once the node has served on it".to_owned())
        }
        (Some(_), None, Some(reason)) => Err(reason.to_owned()),
        (Some(id), None, None) => Ok(format!("from snapshot {id}")),
    };
    let version = reinstall::version(node, Some(&desk.baseline()), None);
    // Whether there is anything to install is known when something is broken; here: whether it could be done.
    let seen = reinstall::Seen { version: version.as_deref(), snapshot: None, findings: &disk.findings };
    let how = |()| format!("{} again from the registry", version.as_deref().unwrap_or_default());
    let asks = sudo::needed(node, &desk.places);
    let sudo = asks
        .then(|| sudo::ask(sudo::Errand::Install, node, sudo::ASK_LIMIT, Deadline::after(sudo::ASK_LIMIT)));
    let install = reinstall::system(node, &desk.places, seen, sudo.as_ref()).map(how);
    let user = reinstall::user(node, &desk.places, seen)
        .map(|()| format!("the same into {}", layers::install::away(node).prefix.display()));
    std::iter::once(Layer::InPlace)
        .chain(Layer::CLIMB)
        .map(|layer| {
            let state = match layer {
                Layer::Restart => restart.clone(),
                Layer::Restore | Layer::InPlace => restore.clone(),
                Layer::SystemInstall => install.clone(),
                Layer::UserInstall => user.clone(),
                Layer::PeerCopy => match (disk.peers, space.reason()) {
                    (0, _) => Err("no peer is configured: koboshi fleet enroll HOST".to_owned()),
                    (_, Some(reason)) => Err(reason.to_owned()),
                    (n, None) => Ok(format!("{n} to ask; koboshi fleet status asks them now")),
                },
                Layer::Emergency => Err("a state to hold, not a layer to run".to_owned()),
            };
            let state = desk.config.ladder.refuses(layer).map_or(state, Err);
            Readiness { layer, state }
        })
        .collect()
}

/// The same for the engine, so that it can say what a climb would do.
pub(super) fn rungs(layers: &[Readiness]) -> Vec<Rung> {
    layers.iter().map(|r| Rung::new(r.layer, r.state.clone().map(|_| ()), 0)).collect()
}

/// Lines for people.
pub(super) fn print(desk: &Desk, layers: &[Readiness]) {
    let p = desk.printer;
    for r in layers {
        let name = format!("{:14}", r.layer.name());
        match &r.state {
            Ok(how) => p.line(format!("  {name} {}  {how}", p.green("ready    "))),
            Err(why) => p.line(format!("  {name} {}  {why}", p.yellow("not ready"))),
        }
    }
}

/// For JSON.
pub(super) fn json(layers: &[Readiness]) -> Value {
    layers
        .iter()
        .map(|r| {
            let fields = Fields::default().put("layer", r.layer.name()).put("ready", r.state.is_ok());
            match &r.state {
                Ok(how) => fields.put("how", how.as_str()).done(),
                Err(why) => fields.put("why", why.as_str()).done(),
            }
        })
        .collect()
}
