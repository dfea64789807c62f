//! One damaged or missing part of the store is healed from wherever the same bytes still lie; what nobody has is named,
//! and everything else comes back.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a test may stop and may speak"
)]

mod common;

use common::{PROGRAM, Place, noise, soon, truth};
use engine::words::Class;
use host::Kind;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use store::{Depth, Plan, Scope, Trust};

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1 << (at % 8);
    fs::write(path, bytes).unwrap();
}

/// Flips a byte in every block, but neither in header nor in the index.
fn flip_all_packs(place: &Place) {
    for pack in place.files_in("packs") {
        let length = fs::metadata(&pack).unwrap().len() as usize;
        for at in (100..length - 100).step_by(60_000) {
            flip(&pack, at);
        }
    }
}

fn remove_all_packs(place: &Place) {
    for pack in place.files_in("packs") {
        fs::remove_file(pack).unwrap();
    }
}

fn spare_of(place: &Place, id: &str) -> Vec<(String, PathBuf)> {
    let at = place.dir.join("prefix/lib/.koboshi-spare/program");
    assert!(place.store.make_spare(id, "program", &at, soon()).unwrap().ready);
    vec![("program".to_owned(), at)]
}

fn with(place: &Place, spares: &[(String, PathBuf)]) -> Plan {
    Plan { spares: spares.to_vec(), ..place.plan() }
}

#[test]
fn what_the_store_lost_comes_from_the_spare() {
    for damage in [flip_all_packs, remove_all_packs] {
        let place = Place::new();
        let before = truth(&place.live);
        let id = place.take_good().id;
        let spares = spare_of(&place, &id);
        damage(&place);
        for gone in ["dist", "node_modules", "package.json"] {
            let gone = place.live.join(gone);
            let _ = fs::remove_dir_all(&gone).or_else(|_| fs::remove_file(&gone));
        }
        let done = place.store.repair(&id, Scope::Classes(&PROGRAM), &with(&place, &spares), soon()).unwrap();
        assert!(done.objects_from_spare > 0, "{done:?}");
        assert_eq!(truth(&place.live), before);
        // The spare was only read.
        assert!(place.store.check_spare(&id, "program", &spares[0].1, soon()).unwrap().ready);
    }
}

#[test]
fn any_file_with_the_right_bytes_will_do_and_no_other() {
    let place = Place::new();
    let before = truth(&place.live);
    let id = place.take_good().id;
    let spares = spare_of(&place, &id);
    remove_all_packs(&place);
    // In the spare under another name; in the live tree under another name; nowhere, but something of the same size.
    let spare = &spares[0].1;
    fs::rename(spare.join("dist/big.bin"), spare.join("dist/elsewhere")).unwrap();
    fs::remove_file(place.live.join("dist/big.bin")).unwrap();
    fs::rename(place.live.join("dist/1.js"), place.live.join("moved")).unwrap();
    fs::remove_file(spare.join("dist/1.js")).unwrap();
    let plan = Plan { partial: true, ..with(&place, &spares) };
    let length = fs::metadata(place.live.join("dist/2.js")).unwrap().len() as usize;
    fs::write(place.live.join("dist/2.js"), noise(77, length)).unwrap();
    fs::write(spare.join("dist/2.js"), noise(78, length)).unwrap();
    let done = place.store.repair(&id, Scope::Classes(&PROGRAM), &plan, soon()).unwrap();
    assert_eq!(done.objects_from_spare, 4, "{done:?}");
    assert_eq!(done.objects_from_live, 1, "{done:?}");
    assert_eq!(done.lost.iter().map(|l| l.path.as_path()).collect::<Vec<_>>(), [Path::new("dist/2.js")]);
    let after = truth(&place.live);
    for path in ["dist/big.bin", "dist/1.js"] {
        assert_eq!(after.get(Path::new(path)), before.get(Path::new(path)), "{path}");
    }
    assert_eq!(fs::read(place.live.join("dist/2.js")).unwrap(), noise(77, length), "left as it is");
}

#[test]
fn another_pack_with_the_same_object_will_do() {
    for damage_first in [true, false] {
        let place = Place::new();
        place.take_good();
        let first = place.files_in("packs");
        let aside = place.dir.join("aside");
        fs::create_dir(&aside).unwrap();
        let away = |pack: &PathBuf| aside.join(pack.file_name().unwrap());
        for pack in &first {
            fs::rename(pack, away(pack)).unwrap();
        }
        fs::write(place.live.join("dist-other"), b"changed, so that all is taken anew").unwrap();
        let id = place.take_good().id;
        let before = truth(&place.live);
        let second = place.files_in("packs");
        for pack in &first {
            fs::rename(away(pack), pack).unwrap();
        }
        // What only the second snapshot has stays readable in any case.
        let kept = place.live.join("dist-other");
        for pack in if damage_first { &first } else { &second } {
            let length = fs::metadata(pack).unwrap().len() as usize;
            (100..length - 100).step_by(60_000).for_each(|at| flip(pack, at));
        }
        fs::rename(&kept, place.dir.join("kept")).unwrap();
        fs::remove_dir_all(&place.live).unwrap();
        fs::create_dir(&place.live).unwrap();
        fs::rename(place.dir.join("kept"), &kept).unwrap();
        let repair = || place.store.repair(&id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
        assert_eq!(repair().objects_from_spare, 0);
        assert_eq!(truth(&place.live), before);
        if damage_first {
            assert_eq!(place.store.verify(Some(&id), soon()).unwrap().bad, []);
        }
        // Also a prune keeps the one that is right.
        place.store.prune(u64::MAX, soon()).unwrap();
        fs::rename(&kept, place.dir.join("kept")).unwrap();
        fs::remove_dir_all(&place.live).unwrap();
        fs::create_dir(&place.live).unwrap();
        fs::rename(place.dir.join("kept"), &kept).unwrap();
        repair();
        assert_eq!(truth(&place.live), before);
    }
}

#[test]
fn a_partial_repair_heals_all_others_and_says_precisely_what_it_could_not() {
    let place = Place::new();
    let before = truth(&place.live);
    let id = place.take_good().id;
    remove_all_packs(&place);
    // What lies in the live tree twice comes back; what is gone there as well does not.
    fs::copy(place.live.join("dist/big.bin"), place.live.join("copy")).unwrap();
    fs::remove_dir_all(place.live.join("dist")).unwrap();
    fs::write(place.live.join("run.sh"), b"damaged").unwrap();
    fs::set_permissions(place.live.join("dist-other"), std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .unwrap();
    let damaged = truth(&place.live);
    let e = place.store.repair(&id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap_err();
    assert_eq!(e.kind, Kind::Corrupt);
    assert_eq!(truth(&place.live), damaged, "all or nothing, unless it is asked for");
    let plan = Plan { partial: true, ..place.plan() };
    let done = place.store.repair(&id, Scope::Classes(&PROGRAM), &plan, soon()).unwrap();
    let lost: BTreeSet<PathBuf> = done.lost.iter().map(|l| l.path.clone()).collect();
    let expected: BTreeSet<PathBuf> = before
        .keys()
        .filter(|p| p.starts_with("dist") && p.as_path() != Path::new("dist/big.bin"))
        .filter(|p| {
            !matches!(
                p.to_str(),
                Some("dist" | "dist/dangling" | "dist/deep" | "dist/deep/deeper" | "dist/nothing")
            )
        })
        .cloned()
        .chain(["run.sh".into()])
        .collect();
    assert_eq!(lost, expected);
    assert_eq!(done.lost_files, expected.len() as u64);
    let after = truth(&place.live);
    for (path, line) in &before {
        if !lost.contains(path) {
            assert_eq!(after.get(path), Some(line), "{}", path.display());
        }
    }
    assert_eq!(fs::read(place.live.join("run.sh")).unwrap(), b"damaged");
    assert!(!common::walk(&place.live).iter().any(|p| p.to_string_lossy().contains(".koboshi-tmp-")));
    // The next one still knows.
    let done = place.store.repair(&id, Scope::Classes(&PROGRAM), &plan, soon()).unwrap();
    assert_eq!(done.lost_files, expected.len() as u64);
}

#[test]
fn a_whole_older_snapshot_comes_before_a_part_of_the_newest() {
    let place = Place::new();
    let old = place.take_good().id;
    let packs = place.files_in("packs");
    let before = truth(&place.live);
    fs::write(place.live.join("dist/new.bin"), noise(9, 70_000)).unwrap();
    let new = place.take_good().id;
    for pack in place.files_in("packs").iter().filter(|p| !packs.contains(p)) {
        fs::remove_file(pack).unwrap();
    }
    fs::remove_file(place.live.join("dist/new.bin")).unwrap();
    let plan = Plan { partial: true, ..place.plan() };
    let done = place.store.repair_newest(&PROGRAM, &plan, &|_| Ok(()), soon()).unwrap();
    assert_eq!((done.snapshot.as_str(), done.lost.len()), (old.as_str(), 0));
    assert_eq!(truth(&place.live), before);
    // Without it, the newest but for what is lost.
    place.store.set_trust(&old, Trust::Candidate).unwrap();
    fs::remove_file(place.live.join("dist/1.js")).unwrap();
    let done = place.store.repair_newest(&PROGRAM, &plan, &|_| Ok(()), soon()).unwrap();
    assert_eq!((done.snapshot.as_str(), done.lost.len()), (new.as_str(), 1));
    assert_eq!(truth(&place.live), before);
}

#[test]
fn a_root_whose_database_is_lost_is_not_half_restored() {
    let mut place = Place::new();
    let state = place.dir.join("state");
    fs::create_dir(&state).unwrap();
    let db = rusqlite::Connection::open(state.join("a.sqlite")).unwrap();
    db.execute_batch("create table t(x); insert into t values(1);").unwrap();
    drop(db);
    fs::write(state.join("note"), noise(3, 400)).unwrap();
    place.roots.push(common::root("state", &state, Class::State));
    let id = place.take_good().id;
    // Only the note is to be had, and the program.
    fs::copy(state.join("note"), place.live.join("note")).unwrap();
    remove_all_packs(&place);
    fs::remove_dir_all(&state).unwrap();
    fs::remove_file(place.live.join("dist/nothing")).unwrap();
    let plan = Plan { partial: true, ..place.plan() };
    let classes = [Class::Program, Class::State];
    let done = place.store.repair(&id, Scope::Classes(&classes), &plan, soon()).unwrap();
    assert!(done.lost.iter().any(|l| l.root == "state" && l.path.as_os_str().is_empty()), "{done:?}");
    assert!(!state.exists());
    assert!(place.live.join("dist/nothing").exists(), "other roots are put right");
}

#[test]
fn the_store_heals_itself_from_the_live_tree_and_the_spare() {
    for (damage, from_spare) in [
        (flip_all_packs as fn(&Place), false),
        (flip_all_packs, true),
        (remove_all_packs, false),
        (remove_all_packs, true),
    ] {
        let place = Place::new();
        let before = truth(&place.live);
        let id = place.take_good().id;
        let mut spares = Vec::new();
        if from_spare {
            spares = spare_of(&place, &id);
            fs::remove_dir_all(place.live.join("dist")).unwrap();
        }
        damage(&place);
        assert_ne!(place.store.verify(None, soon()).unwrap().bad, []);
        let done = place.store.heal(&spares, soon()).unwrap();
        assert!(done.objects > 0 && done.lost.is_empty() && done.distrusted.is_empty(), "{done:?}");
        assert_eq!(place.store.verify(None, soon()).unwrap().bad, []);
        assert_eq!(place.store.newest_trusted(None).unwrap().unwrap().id, id);
        // Now it is the store's own again.
        fs::remove_dir_all(&place.live).unwrap();
        let done = place.store.repair(&id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
        assert_eq!(done.objects_from_live + done.objects_from_spare, 0);
        assert_eq!(truth(&place.live), before);
        // And healing what is whole costs nothing.
        let packs = place.files_in("packs");
        assert_eq!(place.store.heal(&spares, soon()).unwrap().objects, 0);
        assert_eq!(place.files_in("packs"), packs);
    }
}

#[test]
fn one_flipped_byte_of_a_header_costs_nothing() {
    let place = Place::new();
    let before = truth(&place.live);
    let id = place.take_good().id;
    let pack = place.files_in("packs").remove(0);
    let whole = fs::read(&pack).unwrap();
    for at in 0..48 {
        flip(&pack, at);
        fs::remove_dir_all(&place.live).unwrap();
        place.store.repair(&id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
        assert_eq!(truth(&place.live), before, "{at}");
        assert_ne!(place.store.verify(None, soon()).unwrap().bad, [], "{at}: it is seen");
        if at % 16 == 0 {
            assert_eq!(place.store.heal(&[], soon()).unwrap().lost, [], "{at}");
            assert_eq!(place.store.verify(None, soon()).unwrap().bad, [], "{at}");
            for healed in place.files_in("packs") {
                fs::remove_file(healed).unwrap();
            }
        }
        fs::write(&pack, &whole).unwrap();
    }
}

#[test]
fn a_manifest_is_made_again_from_the_index() {
    let place = Place::new();
    let before = truth(&place.live);
    let id = place.take_good().id;
    place.until_vouched(&id, &PROGRAM);
    let tree = place.files_in("trees").remove(0);
    for damage in [|t: &Path| flip(t, 300), |t: &Path| fs::remove_file(t).unwrap()] {
        damage(&tree);
        assert!(place.store.compare(&id, &PROGRAM, Depth::Stat, soon()).is_err());
        let done = place.store.heal(&[], soon()).unwrap();
        assert_eq!((done.manifests, done.lost.len()), (1, 0), "{done:?}");
        assert_eq!(place.store.compare(&id, &PROGRAM, Depth::Hash, soon()).unwrap(), []);
    }
    fs::remove_dir_all(&place.live).unwrap();
    place.store.repair(&id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
    assert_eq!(truth(&place.live), before);
}

#[test]
fn what_nobody_has_is_named_and_costs_the_snapshot_its_trust_once_another_is_whole() {
    let place = Place::new();
    let first = place.take_good().id;
    let packs = place.files_in("packs");
    fs::write(place.live.join("dist/mine.bin"), noise(5, 40_000)).unwrap();
    let second = place.take_good().id;
    for pack in place.files_in("packs").iter().filter(|p| !packs.contains(p)) {
        flip(pack, 5_000);
    }
    fs::remove_file(place.live.join("dist/mine.bin")).unwrap();
    let done = place.store.heal(&[], soon()).unwrap();
    assert_eq!(done.lost.len(), 1, "{done:?}");
    assert_eq!(done.lost[0].what, "program/dist/mine.bin");
    assert_eq!(done.lost[0].snapshots, std::slice::from_ref(&second));
    assert_eq!(done.distrusted, std::slice::from_ref(&second));
    assert_eq!(place.store.newest_trusted(None).unwrap().unwrap().id, first);
    // Alone, a part of it is better than nothing.
    place.store.set_trust(&second, Trust::Good).unwrap();
    place.store.set_trust(&first, Trust::Candidate).unwrap();
    let sizes = place.store.size().unwrap();
    let done = place.store.heal(&[], soon()).unwrap();
    assert_eq!((done.lost.len(), done.distrusted.len()), (1, 0), "{done:?}");
    assert_eq!(place.store.newest_trusted(None).unwrap().unwrap().id, second);
    assert_eq!(place.store.size().unwrap(), sizes, "looking again and again adds nothing");
    // A file that comes back heals it.
    fs::write(place.live.join("anything"), noise(5, 40_000)).unwrap();
    assert_eq!(place.store.heal(&[], soon()).unwrap().lost, []);
    assert_eq!(place.store.verify(None, soon()).unwrap().bad, []);
}
