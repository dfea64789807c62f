//! What layer 1 touches, what it leaves alone, and what it says of both.

use super::rescue::{BELONGS, Saved, beside, not_folded};
use super::*;
use crate::nobody::Nobody;
use node::Node;
use std::path::Path;
use store::DifferenceKind;

fn finding(kind: FaultKind, class: Option<Class>, evidence: &[&str]) -> Finding {
    Finding { kind, class, what: String::new(), evidence: evidence.iter().map(|e| (*e).to_owned()).collect() }
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
    assert!(!beside(&copy, BELONGS).exists(), "and the note says so");
    // What is there is not put back a second time; what is deleted again is.
    std::fs::write(node.state_db(), b"and a row more").unwrap();
    let _ = work(&mut bench, &findings, false, false);
    assert_eq!(std::fs::read(node.state_db()).unwrap(), b"and a row more");
    std::fs::remove_file(node.state_db()).unwrap();
    let _ = work(&mut bench, &findings, false, false);
    assert_eq!(std::fs::read(node.state_db()).unwrap(), b"the newest rows");
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
    let newest = packs(&dir).into_iter().max_by_key(|p| p.metadata().unwrap().modified().unwrap()).unwrap();
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

/// Node of the system's, deleted with all the rest, where koboshi is the user's.
#[test]
fn what_lies_out_of_reach_keeps_nothing_else_from_coming_back_as_root() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().canonicalize().unwrap();
    let (node, program) = damaged_program(&dir);
    let store = remembered(&dir, &node, &[("1", "a.js", b"aaaa")]);
    std::fs::write(program.join("a.js"), b"damaged").unwrap();
    let roots = &store.newest_trusted(None).unwrap().unwrap().roots;
    let of = |name: &str, path: &str| Difference {
        root: name.into(),
        class: Class::Program,
        path: path.into(),
        kind: DifferenceKind::Changed,
    };
    let info = store.newest_trusted(None).unwrap().unwrap();
    let name = &roots.iter().find(|r| r.path == program).unwrap().name;
    assert!(in_reach(&info, &of(name, "a.js")) && in_reach(&info, &of(name, "deep/er/gone.js")));
    let nobody = host::run::Ids { uid: 65_534, gid: 65_534 };
    let open = |mode| {
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    };
    for ancestor in program.ancestors().take_while(|a| a.starts_with(&dir)) {
        std::fs::set_permissions(ancestor, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    let theirs = |path: &str| host::user::as_user(nobody, || Ok(in_reach(&info, &of(name, path)))).unwrap();
    assert!(!theirs("a.js") && !theirs("deep/er/gone.js"), "the directory is root's");
    open(0o777);
    assert!(theirs("a.js") && theirs("deep/er/gone.js"));
}

#[test]
fn under_a_running_gateway_no_other_version_is_put() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().canonicalize().unwrap();
    let (node, program) = damaged_program(&dir);
    let store = remembered(&dir, &node, &[("1", "a.js", b"one"), ("2", "a.js", b"two, longer")]);
    let newest = packs(&dir).into_iter().max_by_key(|p| p.metadata().unwrap().modified().unwrap()).unwrap();
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
fn a_deletion_that_goes_on_is_followed_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().canonicalize().unwrap();
    let (node, program) = damaged_program(&dir);
    let store = remembered(&dir, &node, &[("1", "a.js", b"aaaa"), ("1", "b.js", b"bbbbbbbb")]);
    let newest = store.newest_trusted(None).unwrap().unwrap();
    std::fs::remove_file(program.join("a.js")).unwrap();
    let mut manager = Nobody;
    let mut bench = bench(&node, &mut manager, &dir);
    bench.store = Some(&store);
    // What the look before the layer had seen is not what is gone by now.
    let seen = finding(FaultKind::FilesDamaged, Some(Class::Runtime), &["runtime/node: missing"]);
    let report = work(&mut bench, &[seen], false, false);
    let whole = store.compare(&newest.id, &[Class::Program], Depth::Hash, bench.deadline).unwrap();
    assert_eq!(whole, [], "{report:?}");
    assert!(report.unwrap().done.iter().any(|l| l.contains("once more")));
    assert!(!goes_on(&[finding(
        FaultKind::FilesDamaged,
        Some(Class::Program),
        &["program/a.js: other bytes"]
    )]));
}

#[test]
fn what_is_made_anew_is_set_aside_where_nothing_else_explains_it() {
    let dir = tempfile::tempdir().unwrap();
    let node = node(dir.path());
    let state = &node.state_dir;
    std::fs::write(state.join("tmp"), "a file where the lock's directory has to be").unwrap();
    for file in ["cache/torn", "logs/gateway.log", "workspace/MEMORY.md"] {
        std::fs::create_dir_all(state.join(file).parent().unwrap()).unwrap();
        std::fs::write(state.join(file), "x").unwrap();
    }
    let mut manager = Nobody;
    let mut bench = bench(&node, &mut manager, dir.path());
    let gone = finding(FaultKind::ProcessGone, None, &[]);
    let report = work(&mut bench, std::slice::from_ref(&gone), false, false).unwrap();
    assert!(!state.join("tmp").exists() && !state.join("cache").exists(), "{report:?}");
    assert!(state.join("cache.koboshi-aside/torn").exists() && state.join("tmp.koboshi-aside").is_file());
    assert!(state.join("logs/gateway.log").exists() && state.join("workspace/MEMORY.md").exists());
    // The next one takes the last one's place.
    std::fs::create_dir(state.join("cache")).unwrap();
    std::fs::write(state.join("cache/again"), "x").unwrap();
    work(&mut bench, std::slice::from_ref(&gone), false, false).unwrap();
    assert_eq!(std::fs::read_dir(state.join("cache.koboshi-aside")).unwrap().count(), 1);
    assert!(state.join("cache.koboshi-aside/again").exists());
    // A link to a directory is its owner's arrangement.
    let elsewhere = dir.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    std::fs::write(elsewhere.join("x"), "x").unwrap();
    std::os::unix::fs::symlink(&elsewhere, state.join("cache")).unwrap();
    // With nothing to be set aside and no snapshot it has failed.
    work(&mut bench, &[], false, true).unwrap_err();
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
    let exam = crate::examine(&node, Some(&store), Some(&known), None, crate::Care::Down, deadline).unwrap();
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
    let exam = crate::examine(node, Some(store), Some(&known), None, crate::Care::Down, deadline).unwrap();
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
