use super::*;
use reach::{Entry, Thing};
use std::os::unix::fs::symlink;

fn node(dir: &Path) -> Node {
    let package = dir.join("prefix/lib/node_modules/openclaw");
    serde_json::from_value(serde_json::json!({
        "name": "t", "prefix": dir.join("prefix"), "package_dir": package, "entry": package.join("dist/index.js"),
        "node_bin": dir.join("node"), "home": dir, "state_dir": dir.join("state"),
        "config_path": dir.join("state/openclaw.json"), "port": 1, "ids": host::run::Ids::current(), "user": "t"
    }))
    .unwrap()
}

fn later() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// A program as it lies at `root`, and its list.
fn program(root: &Path, words: &str) -> Manifest {
    write(&root.join("package.json"), "{\"version\":\"1\"}");
    write(&root.join("dist/index.js"), words);
    write(&root.join("dist/large.js"), &words.repeat(100_000));
    symlink("../dist/index.js", root.join("dist/link.js")).ok();
    let (list, whole) = trees::one(Tree::Program, root, later());
    assert!(whole);
    list
}

fn fill(stage: &mut Stage, live: &Path) {
    let (now, _) = trees::one(Tree::Program, live, later());
    let mut near = Near { live: (live, &now), spare: None, shelf: None };
    stage.fill(&mut near, later()).unwrap();
}

fn give_all(stage: &mut Stage, list: &Manifest, from: &Path) {
    for name in stage.missing() {
        for entry in list.entries() {
            for (n, (piece, length)) in entry.pieces().enumerate() {
                if piece == name {
                    let path = from.join(String::from_utf8(entry.path.clone()).unwrap());
                    let file = trees::open(&path).unwrap();
                    let at = n as u64 * reach::words::MAX_OBJECT_BYTES as u64;
                    stage.put(&name, &trees::piece(&file, at, length, &name).unwrap()).unwrap();
                }
            }
        }
    }
}

#[test]
fn what_is_near_is_not_asked_for_and_what_an_earlier_try_proved_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let elsewhere = dir.path().join("donor");
    let list = program(&elsewhere, "// good\n");
    program(&node.package_dir, "// good\n");
    write(&node.package_dir.join("dist/index.js"), "// bad\n");
    write(&node.package_dir.join("dist/extra.js"), "// not wanted\n");
    let live = trees::place(&node, Tree::Program);
    let mut stage = Stage::open(Tree::Program, list.clone(), &live, later()).unwrap();
    fill(&mut stage, &live);
    assert_eq!(stage.missing().len(), 1, "only the damaged file's piece");
    assert!(stage.prove(Tree::Program, later()).is_err(), "not before it is whole");
    drop(stage);

    // Killed; the live tree is gone by now, and something strange lies in the stage.
    std::fs::remove_dir_all(&node.package_dir).unwrap();
    let staged = Stage::staged(Tree::Program, &live);
    write(&staged.join("dist/strange/x.js"), "// strange\n");
    let mut stage = Stage::open(Tree::Program, list.clone(), &live, later()).unwrap();
    fill(&mut stage, &live);
    assert_eq!(stage.missing().len(), 1, "the rest was kept");
    give_all(&mut stage, &list, &elsewhere);
    stage.prove(Tree::Program, later()).unwrap();

    // A byte that changes after it was written is seen.
    write(&staged.join("dist/index.js"), "// evil\n");
    assert!(stage.prove(Tree::Program, later()).is_err());
}

#[test]
fn nothing_planted_in_the_stage_or_its_place_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let list = program(&dir.path().join("donor"), "// good\n");
    program(&node.package_dir, "// good\n");
    let live = trees::place(&node, Tree::Program);
    let victim = dir.path().join("victim");
    std::fs::create_dir(&victim).unwrap();
    write(&victim.join("index.js"), "the user's");
    let beside = Stage::dir_for(Tree::Program, &live);
    symlink(&victim, &beside).unwrap();
    assert!(Stage::open(Tree::Program, list.clone(), &live, later()).is_err(), "our directory is a link");
    std::fs::remove_file(&beside).unwrap();
    std::fs::create_dir_all(beside.join("program")).unwrap();
    symlink(&victim, beside.join("program/dist")).unwrap();
    let mut stage = Stage::open(Tree::Program, list.clone(), &live, later()).unwrap();
    fill(&mut stage, &live);
    stage.prove(Tree::Program, later()).unwrap();
    assert_eq!(std::fs::read_to_string(victim.join("index.js")).unwrap(), "the user's");
}

#[test]
fn a_program_that_was_never_proven_here_goes_back_and_one_that_served_stays() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let live = trees::place(&node, Tree::Program);
    let quarantine = dir.path().join("quarantine/00000001");
    let index = || std::fs::read_to_string(node.package_dir.join("dist/index.js")).unwrap();
    let exchange = || {
        let donor = dir.path().join("donor");
        let list = program(&donor, "// foreign\n");
        let mut stage = Stage::open(Tree::Program, list.clone(), &live, later()).unwrap();
        fill(&mut stage, &live);
        give_all(&mut stage, &list, &donor);
        exchange::swap_by(&Stage::staged(Tree::Program, &live), &live, later()).unwrap();
    };
    program(&node.package_dir, "// before\n");
    assert!(!is_open(&node));
    assert!(!conclude(&node, &quarantine, false, later()).unwrap());
    exchange();
    assert!(is_open(&node));
    assert_eq!(index(), "// foreign\n");
    assert!(conclude(&node, &quarantine, false, later()).unwrap());
    assert_eq!(index(), "// before\n");
    assert!(!is_open(&node));

    exchange();
    assert!(conclude(&node, &quarantine, true, later()).unwrap());
    assert_eq!(index(), "// foreign\n");
    assert_eq!(std::fs::read_to_string(quarantine.join("program/dist/index.js")).unwrap(), "// before\n");
    assert!(!Stage::dir_for(Tree::Program, &live).exists(), "nothing of ours is left beside it");
}

#[test]
fn who_may_lend_what() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let help = Help { peers: &[], identity: PathBuf::new(), me: PathBuf::new(), known: PathBuf::new() };
    let copy = Copy {
        node: &node,
        store: None,
        spare: None,
        want_version: Some("2026.9.6".into()),
        served_schema: Some(18),
        help: &help,
        known: Vec::new(),
        goal: None,
        stages: Vec::new(),
        waiting: Vec::new(),
        deadline: later(),
        limits: engine::Limits::default(),
    };
    let good = Status {
        healthy: Some(true),
        version: Some("2026.9.6".into()),
        arch: std::env::consts::ARCH.into(),
        libc: trees::libc(&node.node_bin).into(),
        schema: Some((18, 1)),
        source: "live".into(),
        ..Status::default()
    };
    let fits = |change: &dyn Fn(&mut Status)| {
        let mut status = good.clone();
        change(&mut status);
        copy.fits(&status)
    };
    assert_eq!(fits(&|_| {}), Ok(()));
    assert_eq!(fits(&|s| s.healthy = None), Ok(()), "no agent there says anything");
    assert_eq!(
        fits(&|s| (s.healthy, s.source) = (Some(false), "snapshot".into())),
        Ok(()),
        "proven good once"
    );
    assert_eq!(fits(&|s| s.version = Some("2026.9.7".into())), Ok(()), "newer, and the same schema");
    type Change<'a> = (&'a dyn Fn(&mut Status), &'a str);
    let changes: [Change<'_>; 7] = [
        (&|s| s.arch = "riscv64".into(), "another machine"),
        (&|s| s.libc = "other".into(), "another libc"),
        (&|s| s.healthy = Some(false), "not well itself"),
        (&|s| s.version = None, "nothing to lend"),
        (&|s| s.version = Some("2026.9.5".into()), "older"),
        (&|s| (s.version, s.schema) = (Some("2026.9.7".into()), Some((19, 1))), "would migrate"),
        (&|s| (s.version, s.schema) = (Some("2026.9.7".into()), None), "newer, and nobody knows its schema"),
    ];
    for (change, why) in changes {
        assert!(fits(change).is_err(), "{why}");
    }
}

#[test]
fn a_list_holds_what_lies_there_and_nothing_of_ours() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("p");
    let list = program(&root, "// good\n");
    write(&root.join(".koboshi-tmp-1"), "ours");
    assert_eq!(trees::one(Tree::Program, &root, later()).0.digest(), list.digest());
    let exec = |list: &Manifest| {
        list.entries().iter().any(|e: &Entry| matches!(e.thing, Thing::File { exec: true, .. }))
    };
    assert!(!exec(&list));
    std::fs::set_permissions(root.join("dist/index.js"), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .unwrap();
    assert!(exec(&trees::one(Tree::Program, &root, later()).0));
    symlink("/etc/passwd", root.join("out")).unwrap();
    assert!(!trees::one(Tree::Program, &root, later()).1, "a link that leaves is in no list");
}
