//! The exchange, what is remembered of it, and the way back.

use super::{Moved, Order, Place, Proof};
use crate::Report;
use engine::Layer;
use host::clock::Deadline;
use host::exchange::{self, Swapped};
use host::run::Ids;
use host::service::Manager;
use host::user::as_user;
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
        Moved::at(home, pending.before.clone()).save(state_dir)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nobody::Nobody;
    use std::time::Duration;

    struct Scene {
        dir: tempfile::TempDir,
        order: Order,
        place: Place,
        node: Node,
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(20))
    }

    impl Scene {
        fn new(back: bool) -> Scene {
            let dir = tempfile::tempdir().unwrap();
            let prefix = dir.path().join("prefix");
            let live = prefix.join("lib/node_modules/openclaw");
            std::fs::create_dir_all(&live).unwrap();
            std::fs::write(live.join("old.js"), "old").unwrap();
            let stage = prefix.join("lib/.koboshi-install/program");
            std::fs::create_dir_all(&stage).unwrap();
            std::fs::write(stage.join("new.js"), "new").unwrap();
            let node: Node = serde_json::from_value(serde_json::json!({
                "name": "t", "prefix": prefix, "package_dir": live, "entry": "/e", "node_bin": "/n",
                "home": dir.path(), "state_dir": dir.path(), "config_path": "/c", "port": 1,
                "ids": Ids::current(), "user": "t"
            }))
            .unwrap();
            let order = Order {
                version: "1.0.0".into(),
                integrity: None,
                state_dir: dir.path().to_owned(),
                scratch: None,
                npm_limit: Duration::from_secs(1),
                layer: Layer::SystemInstall,
            };
            let place = Place::of(&node, &order).unwrap();
            let pending = Pending {
                layer: order.layer,
                version: order.version.clone(),
                owner: place.owner,
                swaps: vec![(stage, live)],
                back,
                aside: Vec::new(),
                before: node.clone(),
                after: node.clone(),
            };
            exchange(&order, &place, &pending, soon(), &mut Report::default()).unwrap();
            let scene = Scene { dir, order, place, node };
            assert_eq!(scene.live(), ["new.js"]);
            scene
        }

        fn live(&self) -> Vec<String> {
            let mut names: Vec<String> = std::fs::read_dir(&self.node.package_dir)
                .unwrap()
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        }

        fn back(&self) {
            take_back(self.dir.path(), &mut Nobody, soon(), &mut Report::default()).unwrap();
        }
    }

    #[test]
    fn what_the_judge_refuses_goes_back_once() {
        let scene = Scene::new(true);
        scene.back();
        assert_eq!(scene.live(), ["old.js"]);
        scene.back();
        assert_eq!(scene.live(), ["old.js"], "there is nothing more to take back");
        assert!(settle(scene.dir.path()).unwrap().is_empty());
    }

    #[test]
    fn a_proven_program_is_not_given_up_for_a_broken_one() {
        let scene = Scene::new(false);
        scene.back();
        assert_eq!(scene.live(), ["new.js"]);
    }

    #[test]
    fn what_has_settled_is_alone_and_the_leftovers_are_gone() {
        let scene = Scene::new(true);
        let left = scene.node.package_dir.with_file_name(".openclaw-AbCd1234");
        std::fs::create_dir(&left).unwrap();
        aside(&scene.order, &scene.place, &left, &mut Report::default());
        assert!(!left.exists(), "npm finds a clean field");
        let pending = Pending::load(scene.dir.path()).unwrap().unwrap();
        assert!(pending.aside[0].is_dir(), "and nothing is lost yet");
        settle(scene.dir.path()).unwrap();
        assert_eq!(scene.live(), ["new.js"]);
        assert!(!pending.aside[0].exists() && !pending.swaps[0].0.exists());
        scene.back();
        assert_eq!(scene.live(), ["new.js"], "settled is settled");
    }

    #[test]
    fn a_users_link_never_makes_root_write_elsewhere_as_root() {
        if Ids::current().uid != 0 {
            return;
        }
        use std::os::unix::fs::PermissionsExt;
        let scene = Scene::new(true);
        let user = Ids { uid: 65_534, gid: 65_534 };
        let outside = tempfile::tempdir().unwrap();
        // Everybody may come this far, so that what stops the work is whose it is.
        for dir in [outside.path(), scene.dir.path()] {
            std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        // The user owns the prefix and points the stages' directory at one of root's.
        let planted = scene.dir.path().join("planted");
        std::os::unix::fs::symlink(outside.path(), &planted).unwrap();
        let place = Place { owner: user, stages: planted.clone(), ..scene.place.clone() };
        let made = place.as_owner(|| {
            std::fs::create_dir_all(planted.join("program")).context(|| "make a stage".to_owned())
        });
        assert_eq!(made.unwrap_err().kind, Kind::Denied);
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}
