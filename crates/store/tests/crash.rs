//! kill -9 at random moments of snapshot, prune and repair: afterwards the older or the newer state, whole.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a test may stop and may speak"
)]

mod common;

use common::{PROGRAM, Place, noise, soon, truth};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use store::{Depth, Plan, Scope, Store};

const ROLE: &str = "KOBOSHI_TEST_ROLE";
const AT: &str = "KOBOSHI_TEST_AT";
/// Bounds the whole to a few seconds.
const KILLS: u64 = 12;

/// Runs `role` in a process of its own and kills it after `after_ms`.
fn run_and_kill(role: &str, at: &Path, after_ms: u64) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(ROLE, role)
        .env(AT, at)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // It says when it begins; from there the time runs.
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("begun") {
        line.clear();
        assert!(
            std::io::BufRead::read_line(&mut out, &mut line).unwrap() > 0,
            "the child ended before it began"
        );
    }
    std::thread::sleep(Duration::from_micros(after_ms * 100));
    child.kill().unwrap();
    #[allow(clippy::disallowed_methods, reason = "it has just been killed")]
    child.wait().unwrap();
}

/// The body of the child: works until it is killed.
#[test]
fn child() {
    let (Ok(role), Ok(at)) = (std::env::var(ROLE), std::env::var(AT)) else { return };
    let at = PathBuf::from(at);
    let store = Store::open(&at.join("store"), &at.join("keys/key")).unwrap();
    let live = at.join("prefix/lib/openclaw");
    let roots = [common::root("program", &live, PROGRAM[0])];
    println!("begun");
    match role.as_str() {
        "snapshot" => {
            for i in 0.. {
                fs::write(live.join("dist/changing"), noise(i, 400_000)).unwrap();
                store.snapshot(&common::request(&roots, &PROGRAM), &mut |_| {}, soon()).unwrap();
            }
        }
        "prune" => loop {
            store.prune(0, soon()).unwrap();
            fs::write(live.join("dist/changing"), noise(std::process::id().into(), 400_000)).unwrap();
            store.snapshot(&common::request(&roots, &PROGRAM), &mut |_| {}, soon()).unwrap();
        },
        "repair" => {
            let id = store.newest_trusted(None).unwrap().unwrap().id;
            let plan = Plan { quarantine: at.join("quarantine/child"), ..Plan::default() };
            store.repair(&id, Scope::Classes(&PROGRAM), &plan, soon()).unwrap();
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_killed_snapshot_or_prune_leaves_the_store_whole() {
    let place = Place::new();
    let before = truth(&place.live);
    let good = place.take_good().id;
    for i in 0..KILLS {
        let role = if i % 2 == 0 { "snapshot" } else { "prune" };
        run_and_kill(role, &place.dir, 30 + i * 97);
        let store = Store::open(&place.dir.join("store"), &place.dir.join("keys/key")).unwrap();
        assert_eq!(store.verify(None, soon()).unwrap().bad, [], "{role} {i}");
        assert!(store.list().unwrap().iter().any(|s| s.id == good));
        assert!(store.unreadable().unwrap().is_empty());
    }
    // No orphan stays: a last snapshot and prune leave what two snapshots need.
    let last = place.take().id;
    place.store.prune(0, soon()).unwrap();
    assert_eq!(place.files_in("tmp"), Vec::<PathBuf>::new());
    let size = place.store.size().unwrap().bytes;
    assert!(size < 2_600_000, "{size}");
    assert_eq!(place.store.compare(&last, &PROGRAM, Depth::Hash, soon()).unwrap(), []);
    place.store.repair(&good, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
    assert_eq!(truth(&place.live), before);
}

#[test]
fn a_killed_repair_tears_nothing_and_loses_nothing() {
    for i in 0..KILLS {
        let place = Place::new();
        let good = truth(&place.live);
        let id = place.take_good().id;
        let mut damaged_contents = BTreeMap::new();
        for n in 0..40 {
            let path = place.live.join(format!("dist/{n}.js"));
            fs::write(&path, noise(7_000 + n, 2_000)).unwrap();
            damaged_contents.insert(blake3::hash(&fs::read(&path).unwrap()).to_hex().to_string(), path);
        }
        fs::remove_dir_all(place.live.join("node_modules")).unwrap();
        fs::write(place.live.join("extra"), b"extra").unwrap();
        let damaged = truth(&place.live);
        run_and_kill("repair", &place.dir, 20 + i * 23);
        // Every path is the old or the new one, whole.
        for (path, line) in truth(&place.live) {
            if path.components().any(|c| c.as_os_str().to_string_lossy().starts_with(".koboshi-tmp-")) {
                continue;
            }
            assert!(
                good.get(&path) == Some(&line) || damaged.get(&path) == Some(&line),
                "{i}: {}",
                path.display()
            );
        }
        // What was there is still somewhere.
        let everywhere: Vec<String> = common::walk(&place.dir)
            .iter()
            .filter(|p| p.is_file() && !p.starts_with(place.dir.join("store")))
            .map(|p| blake3::hash(&fs::read(p).unwrap()).to_hex().to_string())
            .collect();
        for (content, path) in &damaged_contents {
            assert!(everywhere.contains(content), "{i}: {} is lost", path.display());
        }
        // The next one finishes the work and clears up after the dead one.
        place.store.repair(&id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
        assert_eq!(truth(&place.live), good, "{i}");
    }
}
