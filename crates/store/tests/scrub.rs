//! The slow look at every byte, and what killed repairs left behind.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a test may stop and may speak"
)]

mod common;

use common::{PROGRAM, Place, noise, soon, truth};
use engine::words::Class;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use store::{Depth, Portion, Scope, ScrubCursor, Scrubbed};

/// More portions than any round here needs.
const MANY: usize = 2_000;

fn portion(of: u64) -> Portion {
    Portion { of, cpu_ms: 10_000.0 }
}

/// Portions until a round has ended; the cursor goes through JSON, as it does between two steps.
fn round(place: &Place, of: u64, spares: &[(String, PathBuf)]) -> Vec<Scrubbed> {
    let mut all: Vec<Scrubbed> = Vec::new();
    let mut cursor: Option<ScrubCursor> = None;
    while all.last().is_none_or(|s| !s.round_ended) {
        let kept = cursor.map(|c| serde_json::to_string(&c).unwrap());
        let cursor_now = kept.map(|k| serde_json::from_str(&k).unwrap());
        let done = place.store.scrub(cursor_now, portion(of), spares, soon()).unwrap();
        cursor = Some(done.cursor.clone());
        all.push(done);
        assert!(all.len() < MANY);
    }
    all
}

#[test]
fn a_round_sees_every_file_and_every_block_once_in_small_portions() {
    let place = Place::new();
    place.take_good();
    let files = truth(&place.live).values().filter(|l| l.starts_with("100")).count() as u64;
    let one = &round(&place, 1, &[])[0];
    assert!(one.round_ended && one.cursor.rounds == 1, "{one:?}");
    assert_eq!(one.files, files);
    let many = round(&place, 20, &[]);
    assert!((15..=25).contains(&many.len()), "{} portions", many.len());
    assert_eq!(many.iter().map(|s| s.files).sum::<u64>(), files);
    assert_eq!(many.iter().map(|s| s.blocks).sum::<u64>(), one.blocks);
    assert!(many.iter().all(|s| s.damaged.is_empty() && s.healed.is_none()));
    // However little CPU time there is, each portion does something and a round ends.
    let mut cursor = None;
    for n in 0.. {
        let stingy = Portion { of: 1, cpu_ms: 0.0 };
        let done = place.store.scrub(cursor, stingy, &[], soon()).unwrap();
        cursor = Some(done.cursor);
        if done.round_ended {
            break;
        }
        assert!(n < MANY);
    }
    // A root of another time is no reason to stop.
    let old = r#"{"rounds":3,"place":{"live":{"root":"gone","after":[47]}}}"#;
    let done = place.store.scrub(Some(serde_json::from_str(old).unwrap()), portion(1), &[], soon()).unwrap();
    assert_eq!((done.files, done.cursor.rounds), (files, 4));
}

#[test]
fn without_a_trusted_snapshot_there_is_nothing_to_measure_by() {
    let place = Place::new();
    place.take();
    let done = place.store.scrub(None, portion(1), &[], soon()).unwrap();
    assert_eq!((done.files, done.blocks, done.round_ended), (0, 0, false));
}

#[test]
fn damage_in_the_store_is_healed_where_it_is_met() {
    let flip = |pack: &Path| {
        let mut bytes = fs::read(pack).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        fs::write(pack, bytes).unwrap();
    };
    let cut = |pack: &Path| fs::File::options().write(true).open(pack).unwrap().set_len(20).unwrap();
    let damages: [&dyn Fn(&Path); 3] = [&flip, &cut, &|pack| fs::remove_file(pack).unwrap()];
    for damage in damages {
        let place = Place::new();
        let id = place.take_good().id;
        damage(&place.files_in("packs")[0]);
        let healed: Vec<_> = round(&place, 10, &[]).into_iter().filter_map(|s| s.healed).collect();
        assert!(healed.iter().map(|h| h.objects).sum::<u64>() > 0, "{healed:?}");
        assert!(healed.iter().all(|h| h.lost.is_empty()), "{healed:?}");
        assert_eq!(place.store.verify(None, soon()).unwrap().bad, []);
        assert!(round(&place, 10, &[]).iter().all(|s| s.healed.is_none()), "once is enough");
        assert_eq!(place.store.newest_trusted(None).unwrap().unwrap().id, id);
    }
    // A manifest.
    let place = Place::new();
    let id = place.take_good().id;
    place.until_vouched(&id, &PROGRAM);
    let tree = place.files_in("trees").remove(0);
    flip(&tree);
    let healed: Vec<_> = round(&place, 10, &[]).into_iter().filter_map(|s| s.healed).collect();
    assert_eq!(healed.iter().map(|h| h.manifests).sum::<u64>(), 1, "{healed:?}");
    assert_eq!(place.store.verify(None, soon()).unwrap().bad, []);
}

#[test]
fn a_changed_live_file_is_said_and_not_mended_here() {
    let place = Place::new();
    let id = place.take_good().id;
    place.until_vouched(&id, &PROGRAM);
    let file = place.live.join("dist/3.js");
    let length = fs::metadata(&file).unwrap().len() as usize;
    fs::write(&file, noise(50, length)).unwrap();
    let found: Vec<_> = round(&place, 10, &[]).into_iter().flat_map(|s| s.damaged).collect();
    assert_eq!(found.iter().map(|d| d.path.as_path()).collect::<Vec<_>>(), [Path::new("dist/3.js")]);
    assert_eq!(fs::read(&file).unwrap(), noise(50, length));
}

#[allow(clippy::disallowed_methods, reason = "a tool that ends by itself")]
fn run(command: &mut Command) -> bool {
    command
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

struct Disk {
    image: PathBuf,
    at: PathBuf,
}

impl Disk {
    fn mount(&self) -> bool {
        run(Command::new("mount").args(["-t", "ext4", "-o", "loop"]).args([&self.image, &self.at]))
    }
    fn unmount(&self) {
        assert!(run(Command::new("umount").arg(&self.at)), "somebody still holds {}", self.at.display());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run(Command::new("umount").arg("-l").arg(&self.at));
    }
}

/// A disk that loses bits: the inode stays as it was, so no stat can tell. The quick look must come to see it.
#[test]
fn a_bit_that_the_disk_lost_is_found_and_mended_as_root() {
    if !common::is_root() {
        println!("left out, not root: bits lost by a disk");
        return;
    }
    if !common::in_own_mounts("a_bit_that_the_disk_lost_is_found_and_mended_as_root") {
        return;
    }
    let tmp = common::quick_dir();
    let top = tmp.path().canonicalize().unwrap();
    let disk = Disk { image: top.join("image"), at: top.join("disk") };
    fs::create_dir(&disk.at).unwrap();
    fs::File::create(&disk.image).unwrap().set_len(24 << 20).unwrap();
    if !run(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&disk.image)) || !disk.mount() {
        println!("left out, no ext4 on a loop device here: bits lost by a disk");
        return;
    }
    let live = disk.at.join("lib/openclaw");
    common::make_tree(&live);
    let store = store::Store::open_or_create(&top.join("store"), &top.join("keys/key")).unwrap();
    let roots = vec![common::root("program", &live, Class::Program)];
    let before = truth(&live);
    let info = store.snapshot(&common::request(&roots, &PROGRAM), &mut |_| {}, soon()).unwrap();
    store.set_trust(&info.id, store::Trust::Good).unwrap();
    let spare = disk.at.join("lib/.spare/program");
    store.make_spare(&info.id, "program", &spare, soon()).unwrap();
    // Until the index vouches for all of both.
    let vouched = || store.sweep(&info.id, &PROGRAM, soon()).unwrap().hashed == 0;
    let deadline = soon();
    while !vouched() || !store.check_spare(&info.id, "program", &spare, soon()).unwrap().ready {
        assert!(!deadline.passed());
    }
    for _ in 0..20 {
        std::thread::sleep(std::time::Duration::from_millis(10));
        store.check_spare(&info.id, "program", &spare, soon()).unwrap();
    }
    let marks = [noise(5, 100 + 5 * 37), noise(1000, 900_000)];
    disk.unmount();
    let mut image = fs::read(&disk.image).unwrap();
    for mark in &marks {
        let places: Vec<usize> =
            image.windows(64).enumerate().filter(|(_, w)| *w == &mark[..64]).map(|(i, _)| i).collect();
        assert_eq!(places.len(), 2, "once in the live tree, once in the spare");
        for at in places {
            image[at + 70] ^= 2;
        }
    }
    fs::write(&disk.image, image).unwrap();
    assert!(disk.mount());
    assert_eq!(store.compare(&info.id, &PROGRAM, Depth::Stat, soon()).unwrap(), [], "no stat can tell");
    assert!(store.check_spare(&info.id, "program", &spare, soon()).unwrap().ready);
    assert_ne!(truth(&live), before);

    let spares = vec![("program".to_owned(), spare.clone())];
    let mut cursor = None;
    let mut damaged = BTreeSet::new();
    loop {
        let done = store.scrub(cursor, portion(10), &spares, soon()).unwrap();
        damaged.extend(done.damaged.iter().map(|d| format!("{}/{}", d.root, d.path.display())));
        cursor = Some(done.cursor);
        if done.round_ended {
            break;
        }
    }
    let expected = [
        "program/dist/5.js",
        "program/dist/big.bin",
        "spare of program/dist/5.js",
        "spare of program/dist/big.bin",
    ];
    assert_eq!(damaged.iter().map(String::as_str).collect::<Vec<_>>(), expected);
    // From now on the quick look sees it, and the ordinary repair mends it.
    let seen = store.compare(&info.id, &PROGRAM, Depth::Stat, soon()).unwrap();
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert!(!store.check_spare(&info.id, "program", &spare, soon()).unwrap().ready);
    let plan = store::Plan { quarantine: top.join("quarantine/1"), ..store::Plan::default() };
    store.repair(&info.id, Scope::Differences(&seen), &plan, soon()).unwrap();
    assert_eq!(truth(&live), before);
    assert!(store.make_spare(&info.id, "program", &spare, soon()).unwrap().ready);
    assert_eq!(truth(&spare), before);
}

#[test]
fn what_killed_repairs_left_is_collected_wherever_it_lies_and_nothing_else() {
    let mut place = Place::new();
    let notes = place.dir.join("notes");
    fs::create_dir_all(notes.join("deep")).unwrap();
    place.roots.push(common::root("notes", &notes, Class::Workspace));
    let id = place.take_good().id;
    // The store's mark is in the header of each of its files.
    let header = fs::read(&place.files_in("packs")[0]).unwrap();
    let mark: String = header[16..24].iter().map(|b| format!("{b:02x}")).collect();
    let ours = [
        place.live.join(format!("dist/deep/.koboshi-tmp-{mark}-0011")),
        place.live.with_file_name(format!(".koboshi-tmp-{mark}-0022")),
        notes.join(format!("deep/.koboshi-tmp-{mark}-0033")),
    ];
    let others = [
        place.live.join("dist/.koboshi-tmp-ffffffffffffffff-0011"),
        notes.join(".koboshi-notes"),
        notes.join("koboshi-tmp-mine"),
    ];
    fs::write(&ours[0], b"half").unwrap();
    fs::create_dir(&ours[1]).unwrap();
    fs::write(ours[1].join("inside"), b"an old tree").unwrap();
    fs::write(&ours[2], b"a user's old bytes").unwrap();
    for other in &others {
        fs::write(other, b"not ours").unwrap();
    }
    let swept = place.store.sweep(&id, &PROGRAM, soon()).unwrap();
    assert_eq!(swept.leftovers, 1, "of the swept roots: {swept:?}");
    let quarantine = place.dir.join("quarantine/leftovers");
    let collect = || place.store.collect_leftovers(&place.roots, &quarantine, soon()).unwrap();
    // A repair at work may be their writer.
    let lock = fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(place.dir.join("store/repair.lock"))
        .unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert_eq!(collect(), 0);
    assert!(ours.iter().all(|p| p.exists()));
    drop(lock);
    assert_eq!(collect(), 3);
    assert!(ours.iter().all(|p| !p.exists()));
    assert!(others.iter().all(|p| fs::read(p).unwrap() == b"not ours"));
    let kept: Vec<Vec<u8>> =
        common::walk(&quarantine).iter().filter(|p| p.is_file()).map(|p| fs::read(p).unwrap()).collect();
    assert!(kept.contains(&b"a user's old bytes".to_vec()) && kept.contains(&b"an old tree".to_vec()));
    assert_eq!(collect(), 0);
    assert_eq!(place.store.sweep(&id, &PROGRAM, soon()).unwrap().leftovers, 0);
}
