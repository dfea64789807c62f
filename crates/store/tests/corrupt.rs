//! Bits flipped, files cut and files lost in the store itself: found, named, and healed from elsewhere or refused.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a test may stop and may speak"
)]

mod common;

use common::{PROGRAM, Place, soon, truth};
use host::Kind;
use std::fs;
use std::path::Path;
use store::{Depth, Scope, Trust};

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    let at = at % bytes.len();
    bytes[at] ^= 1 << (at % 8);
    fs::write(path, bytes).unwrap();
}

/// Whatever byte of the store is flipped: repair brings the truth back or says why not, and never anything else.
#[test]
fn no_flipped_bit_reaches_the_node() {
    let place = Place::new();
    let before = truth(&place.live);
    let id = place.take_good().id;
    let kept = place.dir.join("kept");
    let mut refused = 0;
    for part in ["packs", "trees", "snapshots", "trust", "index"] {
        for path in place.files_in(part) {
            let whole = fs::read(&path).unwrap();
            // Header, body and tail closely; the rest in steps.
            let step = (whole.len() / 24).max(1);
            let at: Vec<usize> =
                (0..whole.len()).filter(|i| i % step == 0 || *i < 8 || i + 4 > whole.len()).collect();
            for at in at {
                flip(&path, at);
                fs::rename(&place.live, &kept).unwrap();
                match place.store.repair_newest(&PROGRAM, &place.plan(), &|_| Ok(()), soon()) {
                    Ok(_) => assert_eq!(truth(&place.live), before, "{} at {at}", path.display()),
                    Err(e) => {
                        refused += 1;
                        assert!(matches!(e.kind, Kind::Corrupt | Kind::NotFound), "{e:?}");
                        assert!(!place.live.exists(), "{part} at {at}: refused, so nothing was touched");
                    }
                }
                let report = place.store.verify(None, soon()).unwrap();
                let harmless = part == "trust" || part == "index";
                // A lead byte of a pack's trailer sum and the like are all under some check.
                assert!(harmless || !report.bad.is_empty(), "{part} at {at}: verify sees it");
                if place.live.exists() {
                    fs::remove_dir_all(&place.live).unwrap();
                }
                fs::rename(&kept, &place.live).unwrap();
                fs::write(&path, &whole).unwrap();
            }
        }
    }
    assert!(refused > 10, "with the live tree gone there is no other source for most of it");
    assert!(place.store.verify(Some(&id), soon()).unwrap().bad.is_empty());
}

#[test]
fn a_cut_manifest_falls_back_to_an_older_snapshot() {
    let place = Place::new();
    let old = place.take_good().id;
    let trees = place.files_in("trees");
    fs::write(place.live.join("dist/1.js"), b"newer").unwrap();
    let new = place.take_good().id;
    let tree = place.files_in("trees").into_iter().find(|t| !trees.contains(t)).unwrap();
    let bytes = fs::read(&tree).unwrap();
    for cut in [0, 10, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&tree, &bytes[..cut]).unwrap();
        fs::write(place.live.join("dist/2.js"), b"damaged").unwrap();
        let e = place.store.repair(&new, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap_err();
        assert_eq!(e.kind, Kind::Corrupt);
        let done = place.store.repair_newest(&PROGRAM, &place.plan(), &|_| Ok(()), soon()).unwrap();
        assert_eq!(done.snapshot, old);
        assert_eq!(done.passed_over[0].id, new);
    }
    // With both cut there is one clear error and the live tree is as it was.
    fs::write(&trees[0], b"").unwrap();
    let before = truth(&place.live);
    let e = place.store.repair_newest(&PROGRAM, &place.plan(), &|_| Ok(()), soon()).unwrap_err();
    assert!(e.why.contains(&new) && e.why.contains(&old), "{e}");
    assert_eq!(truth(&place.live), before);
}

#[test]
fn missing_objects_are_found_and_taken_from_live_twins() {
    let place = Place::new();
    // A twin elsewhere in the tree holds the same bytes.
    fs::copy(place.live.join("dist/big.bin"), place.live.join("node_modules/twin")).unwrap();
    let before = truth(&place.live);
    let id = place.take_good().id;
    for pack in place.files_in("packs") {
        fs::remove_file(pack).unwrap();
    }
    let report = place.store.verify(Some(&id), soon()).unwrap();
    assert!(report.bad.iter().any(|b| b.why.contains("not in the store") && b.snapshots == [id.clone()]));
    fs::remove_file(place.live.join("dist/big.bin")).unwrap();
    let done = place.store.repair(&id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
    assert_eq!(done.objects_from_live, 4, "900,000 bytes are four objects");
    let after = truth(&place.live);
    assert_eq!(after.get(Path::new("dist/big.bin")), before.get(Path::new("dist/big.bin")));
    // The twin damaged as well: refused, nothing put in place.
    fs::remove_file(place.live.join("dist/big.bin")).unwrap();
    fs::write(place.live.join("node_modules/twin"), b"x").unwrap();
    let e = place.store.repair(&id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap_err();
    assert_eq!(e.kind, Kind::Corrupt);
    assert!(!place.live.join("dist/big.bin").exists());
    assert_eq!(fs::read(place.live.join("node_modules/twin")).unwrap(), b"x");
}

#[test]
fn lost_objects_are_stored_again_by_the_next_snapshot() {
    let place = Place::new();
    place.take_good();
    for pack in place.files_in("packs") {
        fs::remove_file(pack).unwrap();
    }
    // Something changes, so the root is taken anew: what the index knows but no pack holds is read again.
    fs::write(place.live.join("dist/1.js"), b"newer").unwrap();
    let id = place.take_good().id;
    assert_eq!(place.store.verify(Some(&id), soon()).unwrap().bad, []);
}

#[test]
fn a_damaged_trust_record_is_no_trust() {
    let place = Place::new();
    let old = place.take_good().id;
    let new = place.take_good().id;
    let record = place.dir.join("store/trust").join(format!("{new}.trust"));
    flip(&record, 60);
    assert_eq!(place.store.newest_trusted(None).unwrap().unwrap().id, old);
    // Another's record under this name is none either.
    fs::copy(place.dir.join("store/trust").join(format!("{old}.trust")), &record).unwrap();
    assert_eq!(place.store.info(&new).unwrap().trust, Trust::Candidate);
}

#[test]
fn candidates_and_refused_ones_are_not_used() {
    let place = Place::new();
    let good = place.take_good().id;
    place.take();
    fs::write(place.live.join("dist/1.js"), b"broken").unwrap();
    let newest = place.take_good().id;
    let refuse =
        |i: &store::SnapshotInfo| if i.id == newest { Err("gate closed".to_string()) } else { Ok(()) };
    let done = place.store.repair_newest(&PROGRAM, &place.plan(), &refuse, soon()).unwrap();
    assert_eq!(done.snapshot, good);
    assert!(done.passed_over[0].why.contains("gate closed"));
}

#[test]
fn keys_are_never_replaced_or_confused() {
    let place = Place::new();
    place.take();
    let (dir, key) = (place.dir.join("store"), place.dir.join("keys/key"));
    fs::rename(&key, place.dir.join("keys/away")).unwrap();
    assert_eq!(store::Store::open_or_create(&dir, &key).unwrap_err().kind, Kind::NotFound);
    let other = store::Store::open_or_create(&place.dir.join("store2"), &key).unwrap();
    drop(other);
    let wrong = store::Store::open(&dir, &key).unwrap();
    assert!(wrong.list().unwrap().is_empty());
    assert!(wrong.unreadable().unwrap()[0].1.why.contains("another key"));
    fs::write(&key, "koboshi-key-1 abc\n").unwrap();
    assert_eq!(store::Store::open(&dir, &key).unwrap_err().kind, Kind::Corrupt);
    assert_eq!(store::Store::open_or_create(&dir, &dir.join("key")).unwrap_err().kind, Kind::Usage);
    fs::write(dir.join("FORMAT"), "koboshi-store 2\n").unwrap();
    assert!(store::Store::open(&dir, &place.dir.join("keys/away")).unwrap_err().why.contains("format"));
}

#[test]
fn prune_keeps_what_trust_needs_and_survives_its_own_work() {
    let place = Place::new();
    let before = truth(&place.live);
    let good = place.take_good().id;
    for i in 0..6u64 {
        fs::write(place.live.join("dist/grow.bin"), common::noise(i, 300_000)).unwrap();
        place.take();
    }
    let full = place.store.size().unwrap().bytes;
    let done = place.store.prune(full * 2, soon()).unwrap();
    assert_eq!(done.removed, Vec::<String>::new());
    let done = place.store.prune(full - 500_000, soon()).unwrap();
    assert_eq!(done.removed.len(), 2, "the oldest go: {done:?}");
    assert!(done.after_bytes <= full - 500_000 && !done.removed.contains(&good));
    let done = place.store.prune(0, soon()).unwrap();
    assert!(done.over_limit);
    let left: Vec<String> = place.store.list().unwrap().into_iter().map(|i| i.id).collect();
    assert_eq!(left.len(), 2, "the trusted and the newest stay: {left:?}");
    assert_eq!(left[0], good);
    assert_eq!(place.store.verify(None, soon()).unwrap().bad, []);
    place.store.repair(&good, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
    assert_eq!(truth(&place.live), before);
    assert_eq!(place.store.compare(&good, &PROGRAM, Depth::Hash, soon()).unwrap(), []);
}

#[test]
fn unchanged_classes_are_carried_over_and_cost_nothing() {
    let mut place = Place::new();
    let notes = place.dir.join("notes");
    fs::create_dir(&notes).unwrap();
    fs::write(notes.join("a"), b"1").unwrap();
    place.roots.push(common::root("notes", &notes, engine::words::Class::Workspace));
    let first = place.take();
    place.until_vouched(&first.id, &[engine::words::Class::Program, engine::words::Class::Workspace]);
    let second = place.take();
    assert_eq!(second.cost.added_bytes, 0);
    fs::write(notes.join("a"), b"2").unwrap();
    let classes = [engine::words::Class::Workspace];
    let third = place.store.snapshot(&common::request(&place.roots, &classes), &mut |_| {}, soon()).unwrap();
    assert_eq!(third.classes[&engine::words::Class::Program], second.classes[&engine::words::Class::Program]);
    assert!(
        third.classes[&engine::words::Class::Workspace].taken
            > second.classes[&engine::words::Class::Workspace].taken
    );
    assert!(third.cost.added_bytes < 4096, "{:?}", third.cost);
    // The whole node comes back from the third alone.
    fs::remove_dir_all(&place.live).unwrap();
    place.store.repair(&third.id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
    assert!(place.live.join("run.sh").exists());
}

#[test]
fn quarantines_shrink_by_the_rules() {
    let mut place = Place::new();
    let notes = place.dir.join("notes");
    fs::create_dir(&notes).unwrap();
    fs::write(notes.join("known"), b"in a snapshot").unwrap();
    place.roots.push(common::root("notes", &notes, engine::words::Class::Workspace));
    place.take_good();
    let q = place.dir.join("quarantine");
    for incident in ["1", "2"] {
        fs::create_dir_all(q.join(incident).join("program/dist")).unwrap();
        fs::write(q.join(incident).join("program/dist/x"), common::noise(1, 100_000)).unwrap();
        fs::create_dir_all(q.join(incident).join("notes")).unwrap();
        fs::write(q.join(incident).join("notes/known"), b"in a snapshot").unwrap();
        fs::write(q.join(incident).join("notes/new"), b"nowhere else").unwrap();
    }
    assert_eq!(store::trim_quarantine(&q, &place.store, u64::MAX, 14, soon()).unwrap(), 0);
    // Room on a full disk: only programs, and nothing of the open incident's.
    let kept = q.join("1/service-1");
    fs::write(&kept, b"its owner's unit").unwrap();
    assert!(store::drop_programs(&q, &place.store, "2", soon()).unwrap() > 0);
    assert!(
        !q.join("1/program").exists() && q.join("2/program").exists() && q.join("1/notes/known").exists()
    );
    assert!(kept.exists());
    fs::remove_file(&kept).unwrap();
    fs::create_dir_all(q.join("1/program")).unwrap();
    // Young files of the user's stay whatever the size.
    store::trim_quarantine(&q, &place.store, 0, 14, soon()).unwrap();
    assert!(
        !q.join("1/program").exists() && q.join("1/notes/known").exists() && q.join("2/notes/new").exists()
    );
    // "Older than 0 days" is anything of an earlier second.
    let deadline = soon();
    while q.join("2/notes/known").exists() {
        store::trim_quarantine(&q, &place.store, 0, 0, deadline).unwrap();
        assert!(!deadline.passed());
    }
    assert!(q.join("1/notes/new").exists() && q.join("2/notes/new").exists());
}

#[test]
fn prune_takes_nothing_of_a_snapshot_whose_record_cannot_be_read() {
    let place = Place::new();
    let first = place.take_good();
    fs::write(place.live.join("dist/mine.bin"), common::noise(7, 700_000)).unwrap();
    let damaged = place.take_good();
    fs::remove_file(place.live.join("dist/mine.bin")).unwrap();
    fs::write(place.live.join("dist/other"), b"x").unwrap();
    let head = place.dir.join(format!("store/snapshots/{}.snapshot", damaged.id));
    let whole = fs::read(&head).unwrap();
    flip(&head, whole.len() / 2);
    place.take_good();
    place.store.prune(u64::MAX, soon()).unwrap();
    // Mended by hand, from a backup of that one small file: everything it names must be there.
    fs::write(&head, whole).unwrap();
    let report = place.store.verify(Some(&damaged.id), soon()).unwrap();
    assert_eq!(report.bad, [], "{first:?}");
}

#[test]
fn a_quarantined_byte_stays_while_its_only_object_is_damaged() {
    let mut place = Place::new();
    let notes = place.dir.join("notes");
    fs::create_dir(&notes).unwrap();
    let bytes = common::noise(11, 300_000);
    fs::write(notes.join("a"), &bytes).unwrap();
    place.roots.push(common::root("notes", &notes, engine::words::Class::Workspace));
    place.take_good();
    let kept = place.dir.join("quarantine/1/notes/a");
    fs::create_dir_all(kept.parent().unwrap()).unwrap();
    fs::write(&kept, &bytes).unwrap();
    for pack in place.files_in("packs") {
        let length = fs::metadata(&pack).unwrap().len() as usize;
        for at in (64..length).step_by(997) {
            flip(&pack, at);
        }
    }
    std::thread::sleep(std::time::Duration::from_millis(2_100));
    let _ = store::trim_quarantine(&place.dir.join("quarantine"), &place.store, 0, 0, soon());
    assert!(kept.exists(), "the snapshot names these bytes and no longer has them");
}

#[test]
fn the_last_copy_of_a_class_outlives_a_snapshot_taken_while_it_was_empty() {
    let mut place = Place::new();
    let notes = place.dir.join("notes");
    fs::create_dir(&notes).unwrap();
    fs::write(notes.join("a"), b"written once").unwrap();
    place.roots.push(common::root("notes", &notes, engine::words::Class::Workspace));
    let full = place.take_good();
    fs::remove_file(notes.join("a")).unwrap();
    place.take_good();
    place.take_good();
    let done = place.store.prune(0, soon()).unwrap();
    assert!(!done.removed.contains(&full.id), "{done:?}");
    let list = place.store.list().unwrap();
    assert_eq!(list.first().map(|i| &i.id), Some(&full.id));
}
