//! Trees nobody should make, and a file system without room.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a test may stop and may speak"
)]

mod common;

use common::{PROGRAM, Place, is_root, noise, root, soon, truth};
use engine::words::Class;
use host::Kind;
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use store::{Depth, ProblemKind, Scope};

fn fifo(path: &Path) {
    let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::from_raw_mode(0o644));
    rustix::fs::mknodat(rustix::fs::CWD, path, kind, mode, 0).unwrap();
}

#[test]
fn strange_kinds_and_names_do_not_stop_a_snapshot() {
    let place = Place::new();
    fifo(&place.live.join("dist/pipe"));
    let _socket = std::os::unix::net::UnixListener::bind(place.live.join("s")).unwrap();
    fs::write(place.live.join(OsStr::from_bytes(b"caf\xe9\xff\n name")), b"not UTF-8").unwrap();
    fs::write(place.live.join("n".repeat(255)), b"longest name").unwrap();
    // Everything but the strange ones must come back.
    let info = place.take_good();
    assert_eq!(info.problems, []);
    assert_eq!(place.store.compare(&info.id, &PROGRAM, Depth::Hash, soon()).unwrap(), []);
    let mut before = truth(&place.live);
    fs::remove_dir_all(&place.live).unwrap();
    place.store.repair(&info.id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
    before.remove(Path::new("dist/pipe"));
    before.remove(Path::new("s"));
    assert_eq!(truth(&place.live), before);
}

#[test]
fn sparse_files_cost_their_data_only() {
    let place = Place::new();
    let path = place.live.join("sparse");
    let file = fs::File::create(&path).unwrap();
    file.set_len(40 * 1024 * 1024 * 1024).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &noise(1, 5000), 30 * 1024 * 1024 * 1024 + 77).unwrap();
    drop(file);
    let info = place.take_good();
    assert_eq!(info.problems, []);
    assert!(info.cost.added_bytes < 3_000_000, "{:?}", info.cost);
    fs::remove_file(&path).unwrap();
    // Written back with its holes; reading it whole would take minutes, so the data is looked at where it is.
    let done = place.store.repair(&info.id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
    assert_eq!(done.files, 1);
    let m = path.metadata().unwrap();
    assert_eq!(m.len(), 40 * 1024 * 1024 * 1024);
    assert!(m.blocks() * 512 < 2_000_000, "{}", m.blocks());
    let mut back = vec![0; 5000];
    let file = fs::File::open(&path).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut back, 30 * 1024 * 1024 * 1024 + 77).unwrap();
    assert_eq!(back, noise(1, 5000));
}

/// Paths beyond what one system call takes.
#[test]
fn paths_longer_than_the_kernels_limit_come_back() {
    let place = Place::new();
    let name = "d".repeat(200);
    let mut dir =
        rustix::fs::open(&place.live, rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty()).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o755);
    let open = |dir: &std::os::fd::OwnedFd| {
        rustix::fs::openat(dir, &*name, rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty()).unwrap()
    };
    let depth = 30;
    for _ in 0..depth {
        rustix::fs::mkdirat(&dir, &*name, mode).unwrap();
        dir = open(&dir);
    }
    let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
    let file = rustix::fs::openat(dir.as_fd(), "leaf", flags, mode).unwrap();
    fs::File::from(file).write_all(b"deep").unwrap();
    let info = place.take_good();
    assert_eq!(info.problems, []);
    fs::rename(&place.live, place.dir.join("away")).unwrap();
    place.store.repair(&info.id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
    let mut dir =
        rustix::fs::open(&place.live, rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty()).unwrap();
    for _ in 0..depth {
        dir = open(&dir);
    }
    let file = rustix::fs::openat(dir.as_fd(), "leaf", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty())
        .unwrap();
    assert_eq!(std::io::read_to_string(fs::File::from(file)).unwrap(), "deep");
    assert_eq!(place.store.compare(&info.id, &PROGRAM, Depth::Hash, soon()).unwrap(), []);
    // An extra one of that depth goes to the quarantine as it is.
    fs::rename(place.dir.join("away").join(&name), place.live.join("extra")).unwrap();
    place.store.repair(&info.id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
    assert!(place.dir.join("quarantine/1/program/extra").is_dir());
}

#[test]
fn files_that_change_while_they_are_read_are_stored_as_some_moment() {
    let mut place = Place::new();
    let notes = place.dir.join("notes");
    fs::create_dir(&notes).unwrap();
    let log = notes.join("log.jsonl");
    fs::write(&log, b"").unwrap();
    place.roots = vec![root("notes", &notes, Class::Workspace)];
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut file = fs::OpenOptions::new().append(true).open(&log).unwrap();
            let mut i = 0u64;
            while !stop.load(Ordering::Relaxed) && i < 200_000 {
                file.write_all(format!("{i:020}\n").as_bytes()).unwrap();
                i += 1;
            }
        });
        for _ in 0..10 {
            let info = place.take_good();
            assert!(info.problems.iter().all(|p| p.kind == ProblemKind::Unsteady), "{:?}", info.problems);
            let out = place.dir.join("out").join(&info.id);
            place.store.export(&info.id, &[Class::Workspace], &out, soon()).unwrap();
            let text = fs::read_to_string(out.join("notes/log.jsonl")).unwrap();
            for (i, line) in text.split_terminator('\n').enumerate() {
                assert!(
                    line.len() < 20 || line.parse::<usize>().unwrap() == i,
                    "a prefix of what was written"
                );
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_missing_root_is_said_and_carried_over() {
    let place = Place::new();
    let first = place.take_good();
    fs::rename(&place.live, place.dir.join("away")).unwrap();
    let second = place.take();
    assert_eq!(second.problems[0].kind, ProblemKind::Unreadable);
    assert!(second.problems[0].carried);
    assert_eq!(second.classes, first.classes);
    let bad = [root("x/y", &place.live, Class::Program)];
    let e = place.store.snapshot(&common::request(&bad, &PROGRAM), &mut |_| {}, soon()).unwrap_err();
    assert_eq!(e.kind, Kind::Usage);
}

#[test]
fn what_may_not_be_read_is_said_and_never_called_missing() {
    if is_root() {
        eprintln!("left out: nothing is unreadable to root");
        return;
    }
    let place = Place::new();
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(place.live.join("dist/1.js"), fs::Permissions::from_mode(0o000)).unwrap();
    fs::set_permissions(place.live.join("node_modules"), fs::Permissions::from_mode(0o000)).unwrap();
    let info = place.take_good();
    assert_eq!(info.problems.len(), 2, "{:?}", info.problems);
    assert_eq!(place.store.compare(&info.id, &PROGRAM, Depth::Stat, soon()).unwrap(), []);
    fs::set_permissions(place.live.join("node_modules"), fs::Permissions::from_mode(0o755)).unwrap();
}

/// A small file system of its own, gone when this is dropped.
struct Small(tempfile::TempDir);

impl Small {
    fn mount(bytes: u64) -> Option<Small> {
        let dir = tempfile::tempdir().unwrap();
        let options = std::ffi::CString::new(format!("size={bytes},mode=0700")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        match rustix::mount::mount("none", dir.path(), "tmpfs", flags, options.as_c_str()) {
            Ok(()) => Some(Small(dir)),
            Err(e) => {
                eprintln!("left out: needs root and a tmpfs ({e})");
                None
            }
        }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_store_loses_nothing_and_works_again() {
    let Some(small) = Small::mount(1_600_000) else { return };
    let place = Place::new();
    let at = small.0.path().canonicalize().unwrap();
    let store = store::Store::open_or_create(&at.join("store"), &place.dir.join("keys/key")).unwrap();
    let take = || store.snapshot(&common::request(&place.roots, &PROGRAM), &mut |_| {}, soon());
    let first = take().unwrap();
    store.set_trust(&first.id, store::Trust::Good).unwrap();
    fs::write(place.live.join("dist/huge"), noise(77, 3_000_000)).unwrap();
    for _ in 0..3 {
        let e = take().unwrap_err();
        assert_eq!(e.kind, Kind::NoSpace, "{e:?}");
    }
    assert_eq!(store.list().unwrap().len(), 1);
    assert_eq!(store.verify(None, soon()).unwrap().bad, []);
    fs::remove_file(place.live.join("dist/huge")).unwrap();
    let second = take().unwrap();
    assert_eq!(second.classes[&Class::Program].files, first.classes[&Class::Program].files);
    assert_eq!(store.verify(None, soon()).unwrap().bad, []);
    // What the failed ones left is gone or goes.
    store.prune(u64::MAX, soon()).unwrap();
    assert!(store.size().unwrap().bytes < 1_400_000);
}

#[test]
fn a_full_node_is_refused_before_anything_is_touched() {
    let Some(small) = Small::mount(24_000_000) else { return };
    let mut place = Place::new();
    let live = small.0.path().canonicalize().unwrap().join("openclaw");
    common::make_tree(&live);
    place.roots = vec![root("program", &live, Class::Program)];
    let id = place.take_good().id;
    fs::write(live.join("dist/big.bin"), b"damaged").unwrap();
    // Filled to the brim by somebody else.
    let mut filler = fs::File::create(small.0.path().join("filler")).unwrap();
    while filler.write_all(&[1; 65536]).is_ok() {}
    let before = truth(&live);
    let e = place.store.repair(&id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap_err();
    assert_eq!(e.kind, Kind::NoSpace);
    assert_eq!(truth(&live), before);
    drop(filler);
    fs::remove_file(small.0.path().join("filler")).unwrap();
    place.store.repair(&id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
    assert_eq!(place.store.compare(&id, &PROGRAM, Depth::Hash, soon()).unwrap(), []);
}

#[test]
fn deadlines_end_everything_without_harm() {
    let place = Place::new();
    let id = place.take_good().id;
    fs::write(place.live.join("dist/1.js"), b"x").unwrap();
    let before = truth(&place.live);
    let past = host::clock::Deadline::after(std::time::Duration::ZERO);
    let e = place.store.repair(&id, Scope::Classes(&PROGRAM), &place.plan(), past).unwrap_err();
    assert_eq!(e.kind, Kind::TimedOut);
    assert_eq!(truth(&place.live), before);
    for e in [
        place.store.snapshot(&common::request(&place.roots, &PROGRAM), &mut |_| {}, past).unwrap_err(),
        place.store.compare(&id, &PROGRAM, Depth::Hash, past).unwrap_err(),
        place.store.verify(None, past).unwrap_err(),
    ] {
        assert_eq!(e.kind, Kind::TimedOut, "{e}");
    }
}

#[test]
fn two_writers_never_write_at_once_and_readers_go_on() {
    let place = Place::new();
    let id = place.take_good().id;
    let soonest = host::clock::Deadline::after(std::time::Duration::from_millis(1));
    let mut tried = false;
    place
        .store
        .snapshot(
            &common::request(&place.roots, &PROGRAM),
            &mut |_| {
                if !tried {
                    tried = true;
                    let roots = &place.roots;
                    let e = place
                        .store
                        .snapshot(&common::request(roots, &PROGRAM), &mut |_| {}, soonest)
                        .unwrap_err();
                    assert!(e.why.contains("another"), "{e}");
                    assert_eq!(place.store.list().unwrap().len(), 1);
                    assert_eq!(place.store.compare(&id, &PROGRAM, Depth::Stat, soon()).unwrap(), []);
                    place.store.repair(&id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
                }
            },
            soon(),
        )
        .unwrap();
    assert!(tried);
}
