//! The way home: a node that layer 3 runs from its user's prefix moves back into its own.
//!
//! In three deeds, so that the gateway stands still only for renames. [`stage`] builds the program again beside its home
//! exactly as layer 2 would, while the node serves; [`go`] reads the stage again, stops the gateway, exchanges and points
//! the service at home; then somebody starts it and the judge looks. Until the judge has confirmed it ([`arrived`]) the
//! place it came from stays as it was, and [`back`] points the service there again: never worse than before. Only when a
//! snapshot of the node at home is trusted is that place given up ([`leave`]).
//!
//! A note says at every moment where the node is and where it would go back to, so whoever comes after a kill knows too.

use super::{Moved, Order, Pending, Place, Proof, Ready};
use crate::trees;
use crate::{Bench, Report, quiet, user_install};
use engine::Class;
use host::clock::Deadline;
use host::user::as_user;
use host::{Error, Kind, Result, files};
use node::Node;
use node::roots::resolved;
use reach::Tree;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;
use store::Store;

const MAX_BYTES: u64 = 64 << 10;
/// What is left to do after the stop on the way back: a drop-in and a reload.
const AFTER_STOP: Duration = Duration::from_secs(5);

/// A program that stands ready beside its home.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Staged {
    /// Its version.
    pub version: String,
    program: PathBuf,
    runtime: Option<PathBuf>,
    /// Of the lists of both, as they were when they were proven.
    digest: String,
    /// It lies at home already: root put it there while the node served from elsewhere, and nothing is to be exchanged.
    #[serde(default)]
    at_home: bool,
}

fn note(state_dir: &Path) -> PathBuf {
    state_dir.join("home.json")
}

impl Staged {
    /// What stands ready, if anything does.
    #[must_use]
    pub fn load(state_dir: &Path) -> Option<Staged> {
        // One that cannot be read is no stage: it is built again.
        let bytes = files::read_bounded(&note(state_dir), MAX_BYTES).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    fn save(&self, state_dir: &Path) -> Result<()> {
        let text = serde_json::to_vec(self).map_err(|e| Error::new(Kind::System, "note a stage", e))?;
        files::write_atomic(&note(state_dir), &text, 0o600)
    }

    fn forget(state_dir: &Path) -> Result<()> {
        match std::fs::remove_file(note(state_dir)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("remove {}", note(state_dir).display()), &e))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

/// Every byte of what stands ready, in one number.
fn digest(program: &Path, runtime: Option<&Path>, deadline: Deadline) -> Result<String> {
    let mut all = blake3::Hasher::new();
    for (tree, root) in [(Tree::Program, Some(program)), (Tree::Runtime, runtime)] {
        let Some(root) = root else { continue };
        let (list, whole) = trees::one(tree, root, deadline);
        if !whole {
            let what = format!("read the stage {}", root.display());
            return Err(Error::new(Kind::System, what, "it cannot be read whole"));
        }
        all.update(&list.digest());
    }
    Ok(all.finalize().to_hex().to_string())
}

fn displaced(node: &Node, state_dir: &Path) -> Result<Moved> {
    let refuse = |why: &str| Err(Error::new(Kind::NotFound, "bring the node home", why));
    match Moved::load(state_dir)?.filter(Moved::displaced) {
        None => refuse("it is at home"),
        Some(moved) if moved.away.package_dir != node.package_dir => {
            refuse("it is not where koboshi had put it")
        }
        Some(moved) => Ok(moved),
    }
}

/// Builds the program beside its home. The node serves meanwhile, and nothing of it is touched.
///
/// # Errors
/// The reason why nothing stands ready.
pub fn stage(bench: &mut Bench<'_>, order: &Order) -> Result<Report> {
    let mut report = Report::default();
    let target = displaced(bench.node, &order.state_dir)?.home;
    if Pending::load(&order.state_dir)?.is_some() {
        let why = "the last exchange has not settled yet";
        return Err(Error::new(Kind::System, "bring the node home", why));
    }
    let place = Place::of(&target, order)?;
    Staged::forget(&order.state_dir)?;
    let deadline = bench.deadline;
    let ready = super::prepare(bench, &target, order, &place, &mut report)?;
    let digest = place.as_owner(|| digest(&ready.program, ready.runtime.as_deref(), deadline))?;
    let staged = Staged {
        version: ready.version,
        program: ready.program,
        runtime: ready.runtime,
        digest,
        at_home: false,
    };
    staged.save(&order.state_dir)?;
    report.did("the program stands ready beside its home");
    Ok(report)
}

/// Where only root may write to the home of a displaced node: makes its program anew there, as root, while the node serves
/// from its user's prefix. The program at home is nobody's meanwhile, so it is exchanged at once; nothing is stopped, and
/// the service is not touched: whose node it is sees to that ([`found`], [`go`]).
///
/// # Errors
/// The reason why it is not there.
pub fn furnish(bench: &mut Bench<'_>, order: &Order) -> Result<Report> {
    let what = "make the program anew at home";
    let mut report = Report::default();
    let target = bench.node.clone();
    let away = node::service::drop_in(&target).is_none_or(|file| file.exists());
    if !away && target.gateway().is_some() {
        return Err(Error::new(Kind::Denied, what, "the node runs from there"));
    }
    let place = Place::of(&target, order)?;
    let ready = super::prepare(bench, &target, order, &place, &mut report)?;
    if ready.runtime.is_some() {
        let why =
            format!("{}, the Node that its service starts it with, does not fit", target.node_bin.display());
        return Err(Error::new(Kind::NotFound, what, why).hint("install a Node that the program can run on"));
    }
    let order = &Order { version: ready.version.clone(), ..order.clone() };
    let proof = super::known(&ready.program, order, bench.deadline, &mut report)?;
    proof.save(&order.state_dir)?;
    super::into_place(bench, &target, order, &place, ready, &mut report)?;
    report.did(format!("OpenClaw {} lies at home", order.version));
    Ok(report)
}

/// Notes that root has put the program where its home is; what lies there is looked at, not whoever says so.
///
/// # Errors
/// When it is not what was asked for.
pub fn found(bench: &Bench<'_>, order: &Order) -> Result<()> {
    let what = "bring the node home";
    let home = displaced(bench.node, &order.state_dir)?.home;
    let version = home.package_version();
    if version.as_deref() != Some(order.version.as_str()) || !node::triage::program_is_whole(&home) {
        let why = format!("{} does not hold OpenClaw {} whole", home.package_dir.display(), order.version);
        return Err(Error::new(Kind::System, what, why));
    }
    let digest = digest(&home.package_dir, None, bench.deadline)?;
    let (version, program) = (order.version.clone(), home.package_dir);
    Staged { version, program, runtime: None, digest, at_home: true }.save(&order.state_dir)
}

/// Stops the gateway and moves it into what stands ready. The service points at home afterwards; nobody has started it.
///
/// # Errors
/// The reason why it is still away.
pub fn go(bench: &mut Bench<'_>, order: &Order) -> Result<Report> {
    let what = "bring the node home";
    let target = displaced(bench.node, &order.state_dir)?.home;
    let staged = Staged::load(&order.state_dir)
        .filter(|s| s.version == order.version)
        .ok_or_else(|| Error::new(Kind::NotFound, what, "nothing stands ready for it"))?;
    // Whatever comes of it, it is used once.
    Staged::forget(&order.state_dir)?;
    let deadline = bench.deadline;
    let same = |now: String| {
        let differs = || Error::new(Kind::Corrupt, what, "what stands ready is not what was proven there");
        if now == staged.digest { Ok(()) } else { Err(differs()) }
    };
    if staged.at_home {
        same(digest(&staged.program, None, deadline)?)?;
        return point_home(bench, &target, order);
    }
    let place = Place::of(&target, order)?;
    same(place.as_owner(|| digest(&staged.program, staged.runtime.as_deref(), deadline))?)?;
    let ready = Ready { program: staged.program, runtime: staged.runtime, version: staged.version };
    let back_to = Some(bench.node.clone());
    super::put(bench, &target, order, &place, false, ready, back_to, Report::default())
}

/// The program lies at home already: only the service has to point there.
fn point_home(bench: &mut Bench<'_>, target: &Node, order: &Order) -> Result<Report> {
    let mut report = Report::default();
    let proof = super::known(&target.package_dir, order, bench.deadline, &mut report)?;
    quiet::hold(bench, &mut report);
    quiet::stop(bench, false, AFTER_STOP, &mut report)?;
    proof.save(&order.state_dir)?;
    super::serve(target, target, &order.state_dir, &mut report)?;
    let back_to = Some(bench.node.clone());
    Moved { home: target.clone(), away: target.clone(), back_to, left: None }.save(&order.state_dir)?;
    bench.manager.reload(bench.deadline)?;
    bench.manager.clear_latch(bench.deadline)?;
    Ok(report)
}

/// Points the service at the place that the node came from again. Nobody has started it afterwards. Nothing to do when it
/// is not on trial at home.
///
/// # Errors
/// When the gateway cannot be stopped or the service's files not be written; to be called again.
pub fn back(bench: &mut Bench<'_>, state_dir: &Path) -> Result<Report> {
    let mut report = Report::default();
    let Some(moved) = Moved::load(state_dir)? else { return Ok(report) };
    let Some(before) = moved.back_to else { return Ok(report) };
    quiet::hold(bench, &mut report);
    quiet::stop(bench, false, AFTER_STOP, &mut report)?;
    super::serve(&moved.home, &before, state_dir, &mut report)?;
    // It is of the tree at home, which is not the one that serves now.
    Proof::forget(state_dir)?;
    report.did(format!("the node runs from {} again", before.prefix.display()));
    Moved { away: before, back_to: None, left: None, home: moved.home }.save(state_dir)?;
    bench.manager.reload(bench.deadline)?;
    bench.manager.clear_latch(bench.deadline)?;
    Ok(report)
}

/// The judge has confirmed the node at home. Returns whether it was on trial.
///
/// # Errors
/// When the note cannot be read or written.
pub fn arrived(state_dir: &Path) -> Result<bool> {
    let Some(moved) = Moved::load(state_dir)? else { return Ok(false) };
    let Some(before) = moved.back_to else { return Ok(false) };
    Moved { back_to: None, left: Some(before), ..moved }.save(state_dir)?;
    Ok(true)
}

/// Gives up the place that a node was displaced to, once a trusted snapshot holds it at home: from then on nobody goes
/// back there. One line for what was done.
///
/// # Errors
/// When it cannot be removed; to be called again.
pub fn leave(state_dir: &Path, store: &Store) -> Result<Option<String>> {
    let Some(moved) = Moved::load(state_dir)? else { return Ok(None) };
    let Some(left) = moved.left.as_ref().filter(|_| !moved.displaced() && moved.back_to.is_none()) else {
        return Ok(None);
    };
    let home = resolved(&moved.home.package_dir);
    let at_home = store
        .newest_trusted(Some(Class::Program))?
        .is_some_and(|info| info.roots.iter().any(|r| r.class == Class::Program && r.path == home));
    if !at_home {
        return Ok(None);
    }
    user_install::command_for(&moved.away, &mut Report::default())?;
    // Ours by its very name; and whatever lies there is removed with the rights of whose home it is.
    let ours = super::away(&moved.home).prefix;
    if left.prefix == ours {
        as_user(left.ids, || match std::fs::remove_dir_all(&ours) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("remove {}", ours.display()), &e))
            }
            Ok(()) | Err(_) => Ok(()),
        })?;
    }
    Moved { left: None, ..moved }.save(state_dir)?;
    Ok(Some(format!("the node is home for good: what it ran from meanwhile, {}, is gone", ours.display())))
}

/// Where a node that is on trial at home would go back to.
#[must_use]
pub fn on_trial(state_dir: &Path) -> Option<Node> {
    Moved::load(state_dir).ok().flatten().and_then(|moved| moved.back_to)
}

#[cfg(test)]
mod tests {
    use super::*;
    use host::run::Ids;
    use host::service::{Manager, ServiceState, Stopped};

    /// Notes what the unit was told.
    #[derive(Default)]
    struct Told(Vec<&'static str>);

    impl Manager for Told {
        fn kind(&self) -> &'static str {
            "told"
        }
        fn look(&mut self, _: Deadline) -> Result<ServiceState> {
            Ok(ServiceState::unknown())
        }
        fn clear_latch(&mut self, _: Deadline) -> Result<()> {
            self.0.push("clear");
            Ok(())
        }
        fn start(&mut self, _: Deadline) -> Result<()> {
            self.0.push("start");
            Ok(())
        }
        fn stop(&mut self, _: Duration, _: Deadline) -> Result<Stopped> {
            self.0.push("stop");
            Ok(Stopped::Clean { took_ms: 0 })
        }
        fn hold(&mut self, _: Deadline) -> Result<()> {
            self.0.push("hold");
            Ok(())
        }
        fn release(&mut self, _: Deadline) -> Result<()> {
            self.0.push("release");
            Ok(())
        }
        fn reload(&mut self, _: Deadline) -> Result<()> {
            self.0.push("reload");
            Ok(())
        }
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(30))
    }

    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    /// A node that runs from its user's prefix, and a program that stands ready at home.
    struct Scene {
        dir: tempfile::TempDir,
        home: Node,
        away: Node,
        order: Order,
        told: Told,
    }

    impl Scene {
        fn new() -> Scene {
            let dir = tempfile::tempdir().unwrap();
            let base = dir.path().canonicalize().unwrap();
            let prefix = base.join("prefix");
            let package = prefix.join("lib/node_modules/openclaw");
            let unit = base.join(".config/systemd/user/t.service");
            write(&unit, "[Service]\nExecStart=/bin/true\n");
            let home: Node = serde_json::from_value(serde_json::json!({
                "name": "t", "prefix": prefix, "package_dir": package, "entry": package.join("dist/index.js"),
                "node_bin": "/bin/true", "home": base, "state_dir": base.join("state"),
                "config_path": base.join("state/openclaw.json"), "port": 1, "ids": Ids::current(), "user": "t",
                "unit": {"name": "t.service", "scope": "user", "files": [unit]}
            }))
            .unwrap();
            let away = super::super::away(&home);
            write(&away.package_dir.join("dist/index.js"), "serves");
            Moved::at(home.clone(), away.clone()).save(&base).unwrap();
            node::service::point(&away).unwrap();
            let order = Order {
                version: "1.0.0".into(),
                integrity: None,
                state_dir: base,
                scratch: None,
                npm_limit: Duration::from_secs(1),
                layer: engine::Layer::SystemInstall,
            };
            let scene = Scene { dir, home, away, order, told: Told::default() };
            let program = scene.home.prefix.join("lib/.koboshi-install/program");
            write(&program.join("dist/index.js"), "anew");
            let digest = digest(&program, None, soon()).unwrap();
            let staged = Staged { version: "1.0.0".into(), program, runtime: None, digest, at_home: false };
            staged.save(&scene.order.state_dir).unwrap();
            scene
        }

        fn bench<T>(&mut self, node: &Node, work: impl FnOnce(&mut Bench<'_>, &Order) -> T) -> T {
            let mut bench = Bench {
                limits: engine::Limits::default(),
                node,
                manager: &mut self.told,
                store: None,
                baseline: None,
                quarantine: self.dir.path().join("quarantine/00000000"),
                spares: Vec::new(),
                deadline: soon(),
            };
            work(&mut bench, &self.order)
        }

        fn moved(&self) -> Moved {
            Moved::load(&self.order.state_dir).unwrap().unwrap()
        }

        fn points_away(&self) -> bool {
            let drop_in = node::service::drop_in(&self.home).unwrap();
            std::fs::read_to_string(drop_in).is_ok_and(|t| t.contains(".local/share/koboshi/prefix"))
        }

        /// A snapshot that holds the program where `node` has it.
        fn snapshot(&self, node: &Node, trust: bool) -> Store {
            let base = &self.order.state_dir;
            let store = Store::open_or_create(&base.join("store"), &base.join("keys/key")).unwrap();
            let roots: Vec<store::Root> =
                node::roots::roots(node).into_iter().filter(|r| r.name == "program").collect();
            let request = store::Request {
                roots: &roots,
                classes: &[Class::Program],
                note: "",
                version: None,
                node: serde_json::Value::Null,
                baseline: serde_json::Value::Null,
            };
            let id = store.snapshot(&request, &mut |_| {}, soon()).unwrap().id;
            if trust {
                store.set_trust(&id, store::Trust::Good).unwrap();
            }
            store
        }
    }

    #[test]
    fn it_moves_home_is_confirmed_and_then_gives_up_where_it_was() {
        let mut scene = Scene::new();
        let (home, away) = (scene.home.clone(), scene.away.clone());
        assert!(scene.points_away());
        scene.bench(&away, go).unwrap();
        assert_eq!(scene.told.0, ["hold", "stop", "reload", "clear"], "started by nobody yet");
        assert_eq!(std::fs::read_to_string(&home.entry).unwrap(), "anew");
        assert!(!scene.points_away());
        assert_eq!(on_trial(&scene.order.state_dir).as_ref(), Some(&away));
        assert_eq!((scene.moved().away, scene.moved().displaced()), (home.clone(), false));
        assert!(scene.bench(&home, go).is_err(), "once");
        // On trial nothing is given up, whatever is trusted.
        let store = scene.snapshot(&home, true);
        assert_eq!(leave(&scene.order.state_dir, &store).unwrap(), None);
        assert!(arrived(&scene.order.state_dir).unwrap());
        assert!(!arrived(&scene.order.state_dir).unwrap());
        assert_eq!(on_trial(&scene.order.state_dir), None);
        assert!(leave(&scene.order.state_dir, &store).unwrap().is_some());
        assert!(!away.prefix.exists() && home.entry.exists());
        assert_eq!(leave(&scene.order.state_dir, &store).unwrap(), None);
    }

    #[test]
    fn what_root_has_put_at_home_is_looked_at_and_only_pointed_to() {
        let mut scene = Scene::new();
        let (home, away) = (scene.home.clone(), scene.away.clone());
        let found = |scene: &mut Scene| scene.bench(&away, |bench, order| found(bench, order));
        assert!(found(&mut scene).is_err(), "nothing is there");
        write(&home.package_dir.join("package.json"), r#"{"name":"openclaw","version":"0.9.0"}"#);
        write(&home.package_dir.join("openclaw.mjs"), "import './dist/entry.js'");
        write(&home.package_dir.join("dist/entry.js"), "roots");
        write(&home.entry, "roots");
        assert!(found(&mut scene).is_err(), "another version");
        write(&home.package_dir.join("package.json"), r#"{"name":"openclaw","version":"1.0.0"}"#);
        found(&mut scene).unwrap();
        write(&home.entry, "changed since");
        assert_eq!(scene.bench(&away, go).unwrap_err().kind, Kind::Corrupt);
        assert!(scene.told.0.is_empty() && scene.points_away(), "nothing was stopped");
        found(&mut scene).unwrap();
        scene.bench(&away, go).unwrap();
        assert_eq!(scene.told.0, ["hold", "stop", "reload", "clear"]);
        assert_eq!(std::fs::read_to_string(&home.entry).unwrap(), "changed since", "nothing was exchanged");
        assert!(!scene.points_away());
        assert_eq!(on_trial(&scene.order.state_dir).as_ref(), Some(&away));
        let state_dir = scene.order.state_dir.clone();
        scene.bench(&home, |bench, _| back(bench, &state_dir)).unwrap();
        assert!(scene.points_away());
        assert_eq!(scene.moved(), Moved::at(home, away));
    }

    #[test]
    fn what_is_trusted_only_where_it_was_keeps_that_place() {
        let mut scene = Scene::new();
        let (home, away) = (scene.home.clone(), scene.away.clone());
        scene.bench(&away, go).unwrap();
        assert!(arrived(&scene.order.state_dir).unwrap());
        scene.snapshot(&away, true);
        let store = scene.snapshot(&home, false);
        assert_eq!(leave(&scene.order.state_dir, &store).unwrap(), None);
        assert!(away.entry.exists(), "a restore would put it back there");
    }

    #[test]
    fn what_does_not_serve_at_home_goes_back_to_where_it_served() {
        let mut scene = Scene::new();
        let (home, away) = (scene.home.clone(), scene.away.clone());
        scene.bench(&away, go).unwrap();
        scene.told.0.clear();
        let state_dir = scene.order.state_dir.clone();
        scene.bench(&home, |bench, _| back(bench, &state_dir)).unwrap();
        assert_eq!(scene.told.0, ["hold", "stop", "reload", "clear"]);
        assert!(scene.points_away());
        assert_eq!(scene.moved(), Moved::at(home.clone(), away.clone()));
        assert_eq!(std::fs::read_to_string(&away.entry).unwrap(), "serves");
        // Asked for again, or by an agent that does not know: nothing.
        scene.told.0.clear();
        scene.bench(&away, |bench, _| back(bench, &state_dir)).unwrap();
        assert!(scene.told.0.is_empty() && scene.points_away());
    }

    #[test]
    fn a_stage_that_was_touched_or_a_node_that_is_elsewhere_stops_nothing() {
        let mut scene = Scene::new();
        let (home, away) = (scene.home.clone(), scene.away.clone());
        let elsewhere = Node { package_dir: "/elsewhere".into(), ..away.clone() };
        assert!(scene.bench(&elsewhere, go).is_err());
        write(&home.prefix.join("lib/.koboshi-install/program/dist/index.js"), "evil");
        let refused = scene.bench(&away, go).unwrap_err();
        assert_eq!(refused.kind, Kind::Corrupt);
        assert!(scene.told.0.is_empty() && scene.points_away() && !home.entry.exists());
        assert_eq!(Staged::load(&scene.order.state_dir), None, "it is built anew");
    }

    #[test]
    fn a_note_of_the_version_before_is_understood() {
        let scene = Scene::new();
        let old = serde_json::json!({"home": scene.home, "away": scene.away});
        std::fs::write(scene.order.state_dir.join("moved.json"), old.to_string()).unwrap();
        assert_eq!(scene.moved(), Moved::at(scene.home.clone(), scene.away.clone()));
    }
}
