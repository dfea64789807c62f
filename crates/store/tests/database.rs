//! Databases: one consistent moment under load, checked before it is stored, restored as one set.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a test may stop and may speak"
)]

mod common;

use common::{Place, root, soon};
use engine::words::Class;
use rusqlite::Connection;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use store::{DifferenceKind, ProblemKind, Scope, Trust};

const STATE: [Class; 1] = [Class::State];

fn place() -> (Place, PathBuf) {
    let mut place = Place::new();
    let state = place.dir.join("state");
    fs::create_dir(&state).unwrap();
    place.roots = vec![root("state", &state, Class::State)];
    let db = state.join("openclaw.sqlite");
    (place, db)
}

fn open(db: &Path) -> Connection {
    let c = Connection::open(db).unwrap();
    c.busy_timeout(Duration::from_secs(10)).unwrap();
    c.pragma_update(None, "journal_mode", "WAL").unwrap();
    c.pragma_update(None, "synchronous", "OFF").unwrap();
    c.execute_batch(
        "CREATE TABLE IF NOT EXISTS t(a INTEGER PRIMARY KEY, b BLOB); CREATE INDEX IF NOT EXISTS i ON t(b)",
    )
    .unwrap();
    c
}

fn add(c: &Connection, from: i64, count: i64) {
    for i in from..from + count {
        c.execute("INSERT INTO t VALUES(?1, ?2)", (i, common::noise(i.unsigned_abs(), 300))).unwrap();
    }
}

fn count(db: &Path) -> i64 {
    let c = Connection::open(db).unwrap();
    let word: String = c.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
    assert_eq!(word, "ok");
    c.query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap()
}

fn exported(place: &Place, id: &str) -> PathBuf {
    let out = place.dir.join("out").join(id);
    place.store.export(id, &STATE, &out, soon()).unwrap();
    assert_eq!(fs::read_dir(out.join("state")).unwrap().count(), 1, "no log beside it");
    out.join("state/openclaw.sqlite")
}

fn names(db: &Path) -> Vec<String> {
    let mut all: Vec<String> = fs::read_dir(db.parent().unwrap())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    all.sort();
    all
}

#[test]
fn a_live_database_is_taken_whole_under_load() {
    let (place, db) = place();
    let c = open(&db);
    add(&c, 0, 500);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let c = open(&db);
            let mut next = 500;
            // Two rows always together: half of a pair would be half of a moment.
            while !stop.load(Ordering::Relaxed) {
                c.execute_batch("BEGIN IMMEDIATE").unwrap();
                add(&c, next, 2);
                c.execute_batch("COMMIT").unwrap();
                next += 2;
            }
        });
        let mut last = 0;
        for _ in 0..6 {
            let info = place.take_good();
            assert_eq!(info.problems, []);
            let rows = count(&exported(&place, &info.id));
            assert!(rows >= last.max(500) && rows % 2 == 0, "{rows} after {last}");
            last = rows;
        }
        stop.store(true, Ordering::Relaxed);
    });
    drop(c);
}

#[test]
fn a_log_that_a_crash_left_is_part_of_the_moment_and_stays_where_it_is() {
    let (place, db) = place();
    let c = open(&db);
    c.pragma_update(None, "wal_autocheckpoint", 0).unwrap();
    add(&c, 0, 100);
    // As after kill -9: main file, log and index copied from under a live connection.
    let dead = place.dir.join("dead");
    fs::create_dir(&dead).unwrap();
    for ending in ["", "-wal"] {
        fs::copy(format!("{}{ending}", db.display()), dead.join(format!("openclaw.sqlite{ending}"))).unwrap();
    }
    drop(c);
    fs::remove_dir_all(db.parent().unwrap()).unwrap();
    fs::rename(&dead, db.parent().unwrap()).unwrap();
    let before = common::truth(db.parent().unwrap());
    let info = place.take_good();
    assert_eq!(info.problems, []);
    assert_eq!(common::truth(db.parent().unwrap()), before, "taking it changed nothing");
    assert_eq!(count(&exported(&place, &info.id)), 100);
    assert_eq!(place.files_in("tmp"), Vec::<PathBuf>::new(), "no plain copy is left");
}

#[test]
fn a_closed_database_is_taken_without_leaving_anything_beside_it() {
    let (place, db) = place();
    let c = open(&db);
    add(&c, 0, 10);
    drop(c);
    assert_eq!(names(&db), ["openclaw.sqlite"]);
    let info = place.take_good();
    assert_eq!(names(&db), ["openclaw.sqlite"]);
    assert_eq!(count(&exported(&place, &info.id)), 10);
}

#[test]
fn main_log_and_index_move_together() {
    let (place, db) = place();
    let c = open(&db);
    add(&c, 0, 50);
    let info = place.take_good();
    let id = info.id;
    c.pragma_update(None, "wal_autocheckpoint", 0).unwrap();
    add(&c, 50, 50);
    let wal = fs::read(format!("{}-wal", db.display())).unwrap();
    assert!(!wal.is_empty());
    // Corrupted in place, its log still there.
    let file = fs::OpenOptions::new().write(true).open(&db).unwrap();
    file.write_all_at(&[0xff; 4096], 4096).unwrap();
    let damaged = fs::read(&db).unwrap();
    let list = place.store.compare(&id, &STATE, store::Depth::Stat, soon()).unwrap();
    assert_eq!(
        list.iter().map(|d| (d.path.to_str().unwrap(), d.kind)).collect::<Vec<_>>(),
        [("openclaw.sqlite", DifferenceKind::Changed)]
    );
    place.store.repair(&id, Scope::Differences(&list), &place.plan(), soon()).unwrap();
    assert_eq!(names(&db), ["openclaw.sqlite"]);
    let kept = place.dir.join("quarantine/1/state");
    assert_eq!(fs::read(kept.join("openclaw.sqlite")).unwrap(), damaged);
    assert_eq!(fs::read(kept.join("openclaw.sqlite-wal")).unwrap(), wal);
    assert!(kept.join("openclaw.sqlite-shm").exists());
    drop(c);
    assert_eq!(count(&db), 50);
}

#[test]
fn a_deleted_database_comes_back_without_its_old_log() {
    let (place, db) = place();
    let c = open(&db);
    add(&c, 0, 50);
    let id = place.take_good().id;
    add(&c, 50, 50);
    fs::remove_file(&db).unwrap();
    let list = place.store.compare(&id, &STATE, store::Depth::Stat, soon()).unwrap();
    assert_eq!(list.len(), 1, "the orphaned log is not a file of its own: {list:?}");
    assert_eq!(list[0].kind, DifferenceKind::Missing);
    place.store.repair(&id, Scope::Classes(&STATE), &place.plan(), soon()).unwrap();
    assert_eq!(names(&db), ["openclaw.sqlite"]);
    assert!(place.dir.join("quarantine/1/state/openclaw.sqlite-wal").metadata().unwrap().size() > 0);
    drop(c);
    assert_eq!(count(&db), 50);
}

#[test]
fn an_emptied_database_is_told_apart() {
    let (place, db) = place();
    add(&open(&db), 0, 50);
    let id = place.take_good().id;
    fs::write(&db, b"").unwrap();
    let list = place.store.compare(&id, &STATE, store::Depth::Stat, soon()).unwrap();
    assert_eq!(list[0].kind, DifferenceKind::Emptied);
}

#[test]
fn a_damaged_database_is_never_stored() {
    let (place, db) = place();
    let other = db.parent().unwrap().join("other.txt");
    fs::write(&other, b"old").unwrap();
    add(&open(&db), 0, 200);
    let whole = fs::read(&db).unwrap();
    let good = place.take_good();
    let mut bytes = whole.clone();
    bytes[8192..12288].fill(0xee);
    fs::write(&db, &bytes).unwrap();
    fs::write(&other, b"new").unwrap();
    // The class is carried over as a whole: both are of the older moment.
    let sick = place.take();
    assert_eq!(sick.problems[0].kind, ProblemKind::CorruptDatabase);
    assert!(sick.problems[0].carried);
    assert_eq!(sick.classes[&Class::State], good.classes[&Class::State]);
    let out = place.dir.join("out");
    place.store.export(&sick.id, &STATE, &out, soon()).unwrap();
    assert_eq!(fs::read(out.join("state/other.txt")).unwrap(), b"old");
    assert_eq!(count(&out.join("state/openclaw.sqlite")), 200);

    // With nothing before it, it is left out and can never be trusted.
    let (place, db) = super_place(&bytes);
    let sick = place.take();
    assert!(sick.problems.iter().any(|p| p.kind == ProblemKind::CorruptDatabase && !p.carried));
    assert!(place.store.set_trust(&sick.id, Trust::Good).unwrap_err().why.contains("failed its check"));
    assert_eq!(fs::read(db).unwrap(), bytes);
}

fn super_place(bytes: &[u8]) -> (Place, PathBuf) {
    let (place, db) = place();
    fs::write(&db, bytes).unwrap();
    (place, db)
}

#[test]
fn a_few_commits_store_a_few_pages() {
    let (place, db) = place();
    let c = open(&db);
    add(&c, 0, 12_000);
    let first = place.take();
    add(&c, 12_000, 20);
    let second = place.take();
    assert!(first.cost.added_bytes > 3_000_000, "{:?}", first.cost);
    assert!(second.cost.added_bytes * 4 < first.cost.added_bytes, "{:?} {:?}", first.cost, second.cost);
}

#[test]
fn an_unwritten_database_is_not_taken_again() {
    let (place, db) = place();
    let c = open(&db);
    add(&c, 0, 100);
    let first = place.take();
    place.until_vouched_or_changed(&first.id);
    let second = place.take();
    let third = place.take();
    assert_eq!(third.cost.added_bytes, 0, "{:?}", second.cost);
    // A commit that reached only the log is a change.
    c.pragma_update(None, "wal_autocheckpoint", 0).unwrap();
    add(&c, 100, 1);
    let fourth = place.take();
    assert!(fourth.cost.added_bytes > 0);
    assert_eq!(count(&exported(&place, &fourth.id)), 101);
}
