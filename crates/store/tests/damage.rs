//! Every kind of damage is seen by the quick look and by the full one, mended, and nothing is lost by mending.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a test may stop and may speak"
)]

mod common;

use common::{PROGRAM, Place, is_root, noise, root, soon, truth, walk};
use engine::words::Class;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use store::{Depth, Difference, DifferenceKind as K, Plan, Scope};

/// Damages one place and says what must be found where.
type Damage = fn(&Path) -> Vec<(&'static str, K)>;

fn flip_quietly(path: &Path) {
    let m = path.metadata().unwrap();
    let mut bytes = fs::read(path).unwrap();
    bytes[3] ^= 0x20;
    fs::write(path, &bytes).unwrap();
    let at = rustix::fs::Timespec { tv_sec: m.mtime(), tv_nsec: m.mtime_nsec() };
    let times = rustix::fs::Timestamps { last_access: at, last_modification: at };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::empty()).unwrap();
    let now = path.metadata().unwrap();
    assert_eq!((now.mtime(), now.mtime_nsec(), now.len()), (m.mtime(), m.mtime_nsec(), m.len()));
}

const DAMAGES: &[(&str, Damage)] = &[
    ("deleted", |at| {
        fs::remove_file(at.join("dist/3.js")).unwrap();
        vec![("dist/3.js", K::Missing)]
    }),
    ("truncated", |at| {
        fs::OpenOptions::new().write(true).open(at.join("dist/big.bin")).unwrap().set_len(1000).unwrap();
        vec![("dist/big.bin", K::Changed)]
    }),
    ("emptied", |at| {
        fs::write(at.join("package.json"), b"").unwrap();
        vec![("package.json", K::Emptied)]
    }),
    ("flipped with a new mtime", |at| {
        let mut bytes = fs::read(at.join("dist/big.bin")).unwrap();
        bytes[700_000] ^= 1;
        fs::write(at.join("dist/big.bin"), &bytes).unwrap();
        vec![("dist/big.bin", K::Changed)]
    }),
    ("flipped with the same size and mtime", |at| {
        flip_quietly(&at.join("dist/7.js"));
        vec![("dist/7.js", K::Changed)]
    }),
    ("mode", |at| {
        fs::set_permissions(at.join("run.sh"), fs::Permissions::from_mode(0o600)).unwrap();
        vec![("run.sh", K::ModeOrOwner)]
    }),
    ("mode of a directory", |at| {
        fs::set_permissions(at.join("dist/deep"), fs::Permissions::from_mode(0o700)).unwrap();
        vec![("dist/deep", K::ModeOrOwner)]
    }),
    ("symlink retargeted", |at| {
        fs::remove_file(at.join("link")).unwrap();
        symlink("/etc/passwd", at.join("link")).unwrap();
        vec![("link", K::LinkTarget)]
    }),
    ("extra file", |at| {
        fs::write(at.join("dist/evil.js"), b"x").unwrap();
        vec![("dist/evil.js", K::Extra)]
    }),
    ("extra directory", |at| {
        fs::create_dir_all(at.join("node_modules/evil/deep")).unwrap();
        fs::write(at.join("node_modules/evil/deep/x"), b"x").unwrap();
        vec![("node_modules/evil", K::Extra)]
    }),
    ("file become directory", |at| {
        fs::remove_file(at.join("dist/5.js")).unwrap();
        fs::create_dir(at.join("dist/5.js")).unwrap();
        fs::write(at.join("dist/5.js/inner"), b"kept").unwrap();
        vec![("dist/5.js", K::KindChanged)]
    }),
    ("directory become file", |at| {
        fs::remove_dir_all(at.join("dist/deep")).unwrap();
        fs::write(at.join("dist/deep"), b"now a file").unwrap();
        vec![("dist/deep", K::KindChanged)]
    }),
    ("file become symlink", |at| {
        fs::rename(at.join("dist/6.js"), at.join("../moved-away")).unwrap();
        symlink("../../moved-away", at.join("dist/6.js")).unwrap();
        vec![("dist/6.js", K::KindChanged)]
    }),
    ("directory become symlink", |at| {
        fs::rename(at.join("node_modules/a"), at.join("../a-away")).unwrap();
        symlink("../../a-away", at.join("node_modules/a")).unwrap();
        vec![("node_modules/a", K::KindChanged)]
    }),
    ("symlink become file", |at| {
        fs::remove_file(at.join("link")).unwrap();
        fs::write(at.join("link"), b"x").unwrap();
        vec![("link", K::KindChanged)]
    }),
    ("hard link", |at| {
        fs::hard_link(at.join("dist/8.js"), at.join("../other-name")).unwrap();
        vec![("dist/8.js", K::HardLinked)]
    }),
    ("xattr", |at| {
        rustix::fs::setxattr(at.join("dist/9.js"), "user.x", b"1", rustix::fs::XattrFlags::empty()).unwrap();
        vec![("dist/9.js", K::Attributes)]
    }),
    ("directory deleted", |at| {
        fs::remove_dir_all(at.join("node_modules")).unwrap();
        vec![("node_modules", K::Missing)]
    }),
    ("everything deleted", |at| {
        fs::remove_dir_all(at).unwrap();
        vec![("", K::Missing)]
    }),
    ("even its parents deleted", |at| {
        fs::remove_dir_all(at.parent().unwrap().parent().unwrap()).unwrap();
        vec![("", K::Missing)]
    }),
    ("the root become a file", |at| {
        fs::remove_dir_all(at).unwrap();
        fs::write(at, b"x").unwrap();
        vec![("", K::KindChanged)]
    }),
    ("fifo in place of a file", |at| {
        fs::remove_file(at.join("dist/2.js")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            at.join("dist/2.js"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        vec![("dist/2.js", K::KindChanged)]
    }),
];

fn differences(place: &Place, id: &str, depth: Depth) -> Vec<(PathBuf, K)> {
    place.store.compare(id, &PROGRAM, depth, soon()).unwrap().into_iter().map(|d| (d.path, d.kind)).collect()
}

#[test]
fn every_damage_is_seen_mended_and_kept() {
    for (name, damage) in DAMAGES {
        for depth in [Depth::Stat, Depth::Hash] {
            let place = Place::new();
            let before = truth(&place.live);
            let id = place.take_good().id;
            // So that the quick look has something to believe, wrongly or not.
            place.until_vouched(&id, &PROGRAM);
            let expected: Vec<(PathBuf, K)> =
                damage(&place.live).into_iter().map(|(p, k)| (PathBuf::from(p), k)).collect();
            let damaged = place.live.exists().then(|| truth(&place.live));
            assert_eq!(differences(&place, &id, depth), expected, "{name} by {depth:?}");
            let list = place.store.compare(&id, &PROGRAM, depth, soon()).unwrap();
            place.store.repair(&id, Scope::Differences(&list), &place.plan(), soon()).unwrap();
            assert_eq!(truth(&place.live), before, "{name} by {depth:?}");
            assert_eq!(differences(&place, &id, Depth::Hash), [], "{name}: nothing is left to mend");
            assert!(
                walk(&place.dir).iter().all(|p| !p.to_string_lossy().contains(".koboshi-tmp-")),
                "{name}: nothing of ours is left"
            );
            // What stood in the way is in the quarantine, byte for byte.
            for (path, kind) in expected {
                let kept = place.dir.join("quarantine/1/program").join(&path);
                let kept =
                    if path.as_os_str().is_empty() { place.dir.join("quarantine/1/program") } else { kept };
                match kind {
                    K::Changed | K::Emptied | K::Extra | K::KindChanged | K::LinkTarget | K::HardLinked => {
                        let damaged = damaged.as_ref().unwrap();
                        for (p, line) in truth(&kept) {
                            let was =
                                &damaged[&if p.as_os_str().is_empty() { path.clone() } else { path.join(p) }];
                            assert_eq!(&line, was, "{name}: the replaced is kept");
                        }
                    }
                    K::Missing | K::ModeOrOwner | K::Attributes => assert!(!kept.exists(), "{name}"),
                    K::TooMany => unreachable!(),
                }
            }
        }
    }
}

#[test]
fn owners_are_seen_and_put_right() {
    if !is_root() {
        eprintln!("left out: owners can be changed by root only");
        return;
    }
    let place = Place::new();
    let before = truth(&place.live);
    let id = place.take_good().id;
    for path in ["dist/1.js", "dist/deep", "link"] {
        std::os::unix::fs::lchown(place.live.join(path), Some(12345), Some(54321)).unwrap();
    }
    let found = differences(&place, &id, Depth::Stat);
    assert!(found.iter().all(|(_, k)| *k == K::ModeOrOwner) && found.len() == 3, "{found:?}");
    place.store.repair(&id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
    assert_eq!(truth(&place.live), before);
}

#[test]
fn ids_of_another_host_are_mapped() {
    if !is_root() {
        eprintln!("left out: owners can be changed by root only");
        return;
    }
    let place = Place::new();
    let id = place.take_good().id;
    fs::remove_file(place.live.join("dist/1.js")).unwrap();
    let plan = Plan { uids: vec![(0, 4321)], gids: vec![(0, 1234)], ..place.plan() };
    let done = place.store.repair(&id, Scope::Classes(&PROGRAM), &plan, soon()).unwrap();
    assert!(done.attributes > 40, "{done:?}");
    for path in walk(&place.live) {
        let m = path.symlink_metadata().unwrap();
        assert_eq!((m.uid(), m.gid()), (4321, 1234), "{}", path.display());
    }
}

/// A chmod or chown of a file with a second name would reach that one too, wherever it lies.
#[test]
fn attributes_never_reach_through_a_hard_link() {
    let place = Place::new();
    let id = place.take_good().id;
    let victim = place.dir.join("victim");
    fs::write(&victim, b"shadow").unwrap();
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
    let inside = place.live.join("run.sh");
    fs::remove_file(&inside).unwrap();
    fs::hard_link(&victim, &inside).unwrap();
    let lie = Difference {
        root: "program".into(),
        path: "run.sh".into(),
        class: Class::Program,
        kind: K::ModeOrOwner,
    };
    place.store.repair(&id, Scope::Differences(&[lie]), &place.plan(), soon()).unwrap();
    assert_eq!(victim.metadata().unwrap().mode() & 0o7777, 0o600);
    assert_eq!(fs::read(&victim).unwrap(), b"shadow");
    assert_eq!(fs::read(&inside).unwrap(), b"#!/bin/sh\n");
}

#[test]
fn a_planted_symlink_leads_nowhere() {
    let place = Place::new();
    let id = place.take_good().id;
    let outside = place.dir.join("outside");
    fs::create_dir(&outside).unwrap();
    // The comparison was made; then the directory is exchanged for a link that leads out.
    let list: Vec<Difference> = ["dist/1.js", "dist/2.js"]
        .map(|p| Difference {
            root: "program".into(),
            path: p.into(),
            class: Class::Program,
            kind: K::Missing,
        })
        .into();
    fs::rename(place.live.join("dist"), place.dir.join("dist-away")).unwrap();
    symlink(&outside, place.live.join("dist")).unwrap();
    let e = place.store.repair(&id, Scope::Differences(&list), &place.plan(), soon()).unwrap_err();
    assert!(fs::read_dir(&outside).unwrap().next().is_none(), "nothing was written outside: {e}");
    // The whole look sees the link for what it is.
    place.store.repair(&id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
    assert!(place.live.join("dist").symlink_metadata().unwrap().is_dir());
    assert!(fs::read_dir(&outside).unwrap().next().is_none());

    // A link above the root: refused with a hint, not followed.
    let parent = place.live.parent().unwrap();
    fs::rename(parent, place.dir.join("lib-away")).unwrap();
    symlink(place.dir.join("lib-away"), parent).unwrap();
    let e = place.store.compare(&id, &PROGRAM, Depth::Stat, soon()).unwrap_err();
    assert!(e.hint.unwrap().contains("symlink"));
}

#[test]
fn differences_that_climb_are_refused() {
    let place = Place::new();
    let id = place.take_good().id;
    for path in ["../x", "/etc/passwd", "dist/../../x"] {
        let d =
            Difference { root: "program".into(), path: path.into(), class: Class::Program, kind: K::Extra };
        let e = place.store.repair(&id, Scope::Differences(&[d]), &place.plan(), soon()).unwrap_err();
        assert_eq!(e.kind, host::Kind::Usage, "{path}");
    }
}

#[test]
fn what_is_the_users_stays() {
    let mut place = Place::new();
    place.roots = vec![root("workspace", &place.live, Class::Workspace)];
    let id = place.take_good().id;
    fs::write(place.live.join("mine.txt"), b"new").unwrap();
    fs::remove_dir_all(place.live.join("node_modules")).unwrap();
    let list = place.store.compare(&id, &[Class::Workspace], Depth::Stat, soon()).unwrap();
    assert_eq!(list.len(), 2);
    place.store.repair(&id, Scope::Differences(&list), &place.plan(), soon()).unwrap();
    assert_eq!(fs::read(place.live.join("mine.txt")).unwrap(), b"new");
    assert!(place.live.join("node_modules/a/1.json").exists());
    assert!(!place.dir.join("quarantine/1").exists());
}

#[test]
fn excluded_and_unlisted_paths_are_left_alone() {
    let mut place = Place::new();
    place.roots[0].exclude = vec!["node_modules".into()];
    place.roots.push(store::Root {
        only: Some(vec!["node_modules/a/1.json".into()]),
        ..root("service", &place.live, Class::Service)
    });
    let info = place.take_good();
    assert_eq!(info.classes[&Class::Service].files, 1);
    fs::write(place.live.join("node_modules/a/2.json"), b"other").unwrap();
    fs::write(place.live.join("node_modules/a/1.json"), b"other").unwrap();
    let list = place.store.compare(&info.id, &[Class::Program, Class::Service], Depth::Hash, soon()).unwrap();
    let found: Vec<_> = list.iter().map(|d| (d.root.as_str(), d.path.to_str().unwrap())).collect();
    assert_eq!(found, [("service", "node_modules/a/1.json")]);
    place.store.repair(&info.id, Scope::Differences(&list), &place.plan(), soon()).unwrap();
    assert_eq!(fs::read(place.live.join("node_modules/a/2.json")).unwrap(), b"other");
}

#[test]
fn a_root_may_be_one_file() {
    let mut place = Place::new();
    let unit = place.dir.join("gateway.service");
    fs::write(&unit, b"[Unit]\n").unwrap();
    place.roots = vec![root("unit", &unit, Class::Service)];
    let id = place.take_good().id;
    fs::write(&unit, b"").unwrap();
    place.store.repair(&id, Scope::Classes(&[Class::Service]), &place.plan(), soon()).unwrap();
    assert_eq!(fs::read(&unit).unwrap(), b"[Unit]\n");
    assert_eq!(fs::read(place.dir.join("quarantine/1/unit")).unwrap(), b"");
    fs::remove_file(&unit).unwrap();
    place.store.repair(&id, Scope::Classes(&[Class::Service]), &place.plan(), soon()).unwrap();
    assert_eq!(fs::read(&unit).unwrap(), b"[Unit]\n");
}

#[test]
fn a_quarantine_elsewhere_gets_copies_first() {
    if !is_root() || !Path::new("/dev/shm").is_dir() {
        eprintln!("left out: needs a second file system");
        return;
    }
    let place = Place::new();
    let id = place.take_good().id;
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    fs::write(place.live.join("dist/1.js"), b"changed").unwrap();
    fs::create_dir_all(place.live.join("evil/deep")).unwrap();
    fs::write(place.live.join("evil/deep/x"), noise(5, 700_000)).unwrap();
    symlink("nowhere", place.live.join("evil/l")).unwrap();
    let plan = Plan { quarantine: elsewhere.path().join("q"), ..Plan::default() };
    place.store.repair(&id, Scope::Classes(&PROGRAM), &plan, soon()).unwrap();
    assert_eq!(fs::read(elsewhere.path().join("q/program/dist/1.js")).unwrap(), b"changed");
    assert_eq!(fs::read(elsewhere.path().join("q/program/evil/deep/x")).unwrap(), noise(5, 700_000));
    assert!(!place.live.join("evil").exists());
    assert_eq!(differences(&place, &id, Depth::Hash), []);
}

#[test]
fn a_spare_stands_in_for_a_missing_root() {
    let place = Place::new();
    let before = truth(&place.live);
    let id = place.take_good().id;
    let spare = place.dir.join("prefix/lib/.spare");
    place.until_vouched(&id, &PROGRAM);
    assert!(place.store.make_spare(&id, "program", &spare, soon()).unwrap().ready);
    // Old enough to be vouched for.
    for _ in 0..20 {
        std::thread::sleep(std::time::Duration::from_millis(10));
        assert!(place.store.check_spare(&id, "program", &spare, soon()).unwrap().ready);
    }
    fs::remove_dir_all(&place.live).unwrap();
    let plan = Plan { spares: vec![("program".into(), spare.clone())], ..place.plan() };
    let done = place.store.repair(&id, Scope::Classes(&PROGRAM), &plan, soon()).unwrap();
    assert_eq!((done.from_spare, done.files), (vec!["program".to_string()], 0));
    assert!(!spare.exists());
    // The look that lets the gateway start does not read the tree again, and a bit that flips is seen all the same.
    let looked = place.store.sweep(&id, &PROGRAM, soon()).unwrap();
    assert_eq!((looked.hashed, looked.differences), (0, Vec::new()));
    assert_eq!(truth(&place.live), before);
    flip_quietly(&place.live.join("dist/7.js"));
    assert_eq!(differences(&place, &id, Depth::Stat).len(), 1);
    place.store.repair(&id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
    assert_eq!(truth(&place.live), before);

    // A damaged one is not used.
    place.store.make_spare(&id, "program", &spare, soon()).unwrap();
    flip_quietly(&spare.join("dist/7.js"));
    assert!(!place.store.check_spare(&id, "program", &spare, soon()).unwrap().ready);
    fs::remove_dir_all(&place.live).unwrap();
    let done = place.store.repair(&id, Scope::Classes(&PROGRAM), &plan, soon()).unwrap();
    assert!(done.from_spare.is_empty() && done.files > 80);
    assert_eq!(truth(&place.live), before);
}

#[test]
fn export_gives_plain_trees() {
    let place = Place::new();
    let id = place.take_good().id;
    let dest = place.dir.join("out");
    place.store.export(&id, &PROGRAM, &dest, soon()).unwrap();
    assert_eq!(truth(&dest.join("program")), truth(&place.live));
    assert_eq!(place.store.export(&id, &PROGRAM, &dest, soon()).unwrap_err().kind, host::Kind::Usage);
}

#[test]
fn what_was_made_immutable_is_put_right_all_the_same_as_root() {
    if !common::is_root() {
        return;
    }
    // Where a tmpfs knows no such attribute.
    let place = Place::within(tempfile::tempdir_in("/var/tmp").unwrap());
    let before = truth(&place.live);
    let id = place.take_good().id;
    fs::write(place.live.join("dist/7.js"), b"damaged").unwrap();
    fs::remove_file(place.live.join("dist/8.js")).unwrap();
    for name in ["dist/7.js", "dist"] {
        let fd = fs::File::open(place.live.join(name)).unwrap();
        let fixed = rustix::fs::IFlags::IMMUTABLE;
        let now = rustix::fs::ioctl_getflags(&fd).unwrap_or(fixed);
        if rustix::fs::ioctl_setflags(&fd, now | fixed).is_err() {
            println!("left out, no such attributes here");
            return;
        }
    }
    // Where nothing can be put right, everything stays as its owner left it.
    let fixed = || ["dist/7.js", "dist"].map(|name| host::immutable::is_set(&place.live.join(name)));
    let hidden = place.store.dir().join("hidden");
    fs::rename(place.store.dir().join("packs"), &hidden).unwrap();
    fs::create_dir(place.store.dir().join("packs")).unwrap();
    let refused = place.store.repair(&id, Scope::Classes(&PROGRAM), &place.plan(), soon());
    assert_eq!((refused.unwrap_err().kind, fixed()), (host::Kind::Corrupt, [true, true]));
    fs::remove_dir(place.store.dir().join("packs")).unwrap();
    fs::rename(hidden, place.store.dir().join("packs")).unwrap();

    let done = place.store.repair(&id, Scope::Classes(&PROGRAM), &place.plan(), soon()).unwrap();
    assert_eq!(
        (done.freed, done.quarantined),
        (vec![place.live.join("dist"), place.live.join("dist/7.js")], 1)
    );
    assert_eq!((truth(&place.live), fixed()), (before, [false, false]));
}
