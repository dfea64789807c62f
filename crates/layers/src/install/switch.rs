//! The exchange, what is remembered of it, and the way back.

use super::{Moved, Order, Place, Proof};
use crate::Report;
use engine::Layer;
use host::clock::Deadline;
use host::exchange::{self, Swapped};
use host::run::{Ids, as_user};
use host::service::Manager;
use host::{Context, Error, Kind, Result, files};
use node::Node;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

const MAX_BYTES: u64 = 1 << 20;

/// An exchange that has not settled yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// Whose doing.
    pub layer: Layer,
    /// The version that was put in place.
    pub version: String,
    /// Who owns the trees.
    pub owner: Ids,
    /// (stage, live): after the exchange the previous tree lies at the stage.
    pub swaps: Vec<(PathBuf, PathBuf)>,
    /// Whether what was there before was a whole program: only then there is something to go back to.
    pub back: bool,
    /// What was moved out of the way and goes for good once the new tree has settled.
    pub aside: Vec<PathBuf>,
    /// The node before it.
    pub before: Node,
    /// The node with it.
    pub after: Node,
}

fn note(state_dir: &Path) -> PathBuf {
    state_dir.join("exchanged.json")
}

impl Pending {
    /// The exchange that is not settled yet, if any.
    ///
    /// # Errors
    /// When the note cannot be read.
    pub fn load(state_dir: &Path) -> Result<Option<Pending>> {
        match files::read_bounded(&note(state_dir), MAX_BYTES) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|e| Error::new(Kind::Corrupt, format!("read {}", note(state_dir).display()), e)),
            Err(e) if e.kind == Kind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn save(&self, state_dir: &Path) -> Result<()> {
        let text =
            serde_json::to_vec_pretty(self).map_err(|e| Error::new(Kind::System, "note an exchange", e))?;
        files::write_atomic(&note(state_dir), &text, 0o600)
    }

    fn forget(state_dir: &Path) -> Result<()> {
        match std::fs::remove_file(note(state_dir)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("remove {}", note(state_dir).display()), &e))
            }
            Ok(()) | Err(_) => files::sync_dir(state_dir),
        }
    }
}

/// Puts each stage in the place of its live tree. The note is durable first: whoever comes after a kill can go back.
pub(super) fn exchange(
    order: &Order,
    place: &Place,
    pending: &Pending,
    deadline: Deadline,
    report: &mut Report,
) -> Result<()> {
    pending.save(&order.state_dir)?;
    for (stage, live) in &pending.swaps {
        let swapped = place.as_owner(|| {
            let above = live.parent().unwrap_or(live);
            std::fs::create_dir_all(above).context(|| format!("make {}", above.display()))?;
            exchange::swap_by(stage, live, deadline)
        })?;
        report.did(format!("{} is in place ({})", live.display(), method(&swapped)));
    }
    Ok(())
}

fn method(swapped: &Swapped) -> String {
    match &swapped.method {
        exchange::Method::Exchange => "at once".to_owned(),
        exchange::Method::FileByFile { why } => format!("file by file: {why}"),
    }
}

/// Moves a leftover out of npm's way, to be removed once the new tree has settled.
pub(super) fn aside(order: &Order, place: &Place, left: &Path, report: &mut Report) {
    let to = place.stages.join("aside");
    match place.as_owner(|| exchange::move_aside(left, &to)) {
        Ok(now) => {
            report.did(format!("{}, which an interrupted npm left, is out of the way", left.display()));
            if let Ok(Some(mut pending)) = Pending::load(&order.state_dir) {
                pending.aside.push(now);
                if let Err(e) = pending.save(&order.state_dir) {
                    report.could_not(e.to_string());
                }
            }
        }
        Err(e) => report.could_not(e.to_string()),
    }
}

/// Takes an exchange back that the judge did not accept, if there was anything whole before it. Nothing to do when there
/// is none. The tree that failed stays at the stage and goes with the next one.
///
/// # Errors
/// When a tree could not be taken back; to be called again.
pub fn take_back(
    state_dir: &Path,
    manager: &mut dyn Manager,
    deadline: Deadline,
    report: &mut Report,
) -> Result<()> {
    let Some(pending) = Pending::load(state_dir)? else { return Ok(()) };
    if !pending.back {
        // A proven program stands where none was: that is worth keeping, whatever else the node lacks.
        return Ok(());
    }
    for (stage, live) in pending.swaps.iter().rev() {
        as_user(pending.owner, || exchange::undo(stage))?;
        report.did(format!("{} is back as it was before {}", live.display(), pending.layer));
    }
    if pending.before != pending.after {
        let home = Moved::load(state_dir)?.map_or_else(|| pending.before.clone(), |m| m.home);
        super::serve(&home, &pending.before, state_dir, report)?;
        Moved { home, away: pending.before.clone() }.save(state_dir)?;
        manager.reload(deadline)?;
    }
    Proof::forget(state_dir)?;
    Pending::forget(state_dir)
}

/// The new tree has proven itself: what was there before goes.
///
/// # Errors
/// When something of it cannot be removed; to be called again.
pub fn settle(state_dir: &Path) -> Result<Vec<String>> {
    let Some(pending) = Pending::load(state_dir)? else { return Ok(Vec::new()) };
    let mut done = Vec::new();
    for (stage, live) in &pending.swaps {
        as_user(pending.owner, || {
            let Some(swapped) = exchange::resume(stage)? else { return Ok(()) };
            swapped.settle()?;
            if let Some(previous) = &swapped.previous {
                remove(previous)?;
            }
            Ok(())
        })?;
        done.push(format!(
            "the tree that was at {} before {} is gone for good",
            live.display(),
            pending.layer
        ));
    }
    for aside in &pending.aside {
        as_user(pending.owner, || remove(aside))?;
    }
    Pending::forget(state_dir)?;
    Ok(done)
}

fn remove(tree: &Path) -> Result<()> {
    match std::fs::remove_dir_all(tree) {
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => {
            std::fs::remove_file(tree).context(|| format!("remove {}", tree.display()))
        }
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("remove {}", tree.display()), &e))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}
