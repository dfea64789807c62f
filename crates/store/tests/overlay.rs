//! A program that lies in a lower layer of overlayfs, as in a container's image: directories there cannot be moved, and
//! what a repair puts right must come back all the same. Root only; others are told what was left out.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may stop and may speak")]

mod common;

use common::{PROGRAM, make_tree, request, root, soon, truth};
use engine::words::Class;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};
use store::{Depth, Plan, Scope, Store, Trust};

/// A mount of ours, gone at the end whatever happens.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn overlay(dir: &Path) -> Option<Mounted> {
    let at = dir.join("merged");
    for part in ["upper", "work", "merged"] {
        fs::create_dir_all(dir.join(part)).unwrap();
    }
    // overlayfs wants its upper layer on a file system that is none itself.
    let options = format!("lowerdir={d}/lower,upperdir={d}/upper,workdir={d}/work", d = dir.display());
    let options = CString::new(options).unwrap();
    match mount("overlay", &at, "overlay", MountFlags::empty(), Some(options.as_c_str())) {
        Ok(()) => Some(Mounted(at)),
        Err(e) => {
            println!("left out, overlayfs cannot be mounted here: {e}");
            None
        }
    }
}

#[test]
fn a_program_in_a_lower_layer_is_put_right() {
    if !common::is_root() {
        println!("left out, not root: a program in a lower layer of overlayfs");
        return;
    }
    let tmp = tempfile::tempdir_in("/dev/shm").unwrap();
    let dir = tmp.path().canonicalize().unwrap();
    make_tree(&dir.join("lower/lib/openclaw"));
    let Some(mounted) = overlay(&dir) else { return };
    let live = mounted.0.join("lib/openclaw");
    let store = Store::open_or_create(&dir.join("store"), &dir.join("keys/key")).unwrap();
    let roots = vec![root("program", &live, Class::Program)];
    let before = truth(&live);
    let info = store.snapshot(&request(&roots, &PROGRAM), &mut |_| {}, soon()).unwrap();
    store.set_trust(&info.id, Trust::Good).unwrap();
    let plan = |n: u32| Plan { quarantine: dir.join(format!("quarantine/{n}")), ..Plan::default() };
    let mend = |n: u32| {
        let wanted = store.compare(&info.id, &PROGRAM, Depth::Hash, soon()).unwrap();
        assert!(!wanted.is_empty(), "{n}: nothing was damaged");
        store.repair(&info.id, Scope::Differences(&wanted), &plan(n), soon()).unwrap();
        assert_eq!(truth(&live), before, "{n}");
        assert_eq!(store.compare(&info.id, &PROGRAM, Depth::Hash, soon()).unwrap(), [], "{n}");
    };
    // A file cut short.
    fs::write(live.join("dist/1.js"), b"").unwrap();
    mend(1);
    // A directory of the lower layer that became a file, and the other way round.
    fs::remove_dir_all(live.join("node_modules/a")).unwrap();
    fs::write(live.join("node_modules/a"), b"a file").unwrap();
    fs::remove_file(live.join("run.sh")).unwrap();
    fs::create_dir(live.join("run.sh")).unwrap();
    fs::write(live.join("run.sh/inside"), b"x").unwrap();
    mend(2);
    // Somebody's directory of the lower layer that the snapshot does not know.
    fs::create_dir_all(live.join("dist/extra/deep")).unwrap();
    fs::write(live.join("dist/extra/deep/file"), b"x").unwrap();
    mend(3);
    assert!(dir.join("quarantine/3/program/dist/extra/deep/file").exists());
    // A whole directory, then the whole tree.
    fs::remove_dir_all(live.join("dist")).unwrap();
    mend(4);
    fs::remove_dir_all(&live).unwrap();
    mend(5);
    // The lower layer was never touched.
    assert!(dir.join("lower/lib/openclaw/dist/1.js").metadata().unwrap().len() > 0);
}

/// A directory that still lies in the lower layer, with what the snapshot has as a file.
#[test]
fn a_directory_of_the_lower_layer_in_the_way_goes_to_the_quarantine() {
    if !common::is_root() {
        println!("left out, not root: a directory of a lower layer in the way");
        return;
    }
    let tmp = tempfile::tempdir_in("/dev/shm").unwrap();
    let dir = tmp.path().canonicalize().unwrap();
    let lower = dir.join("lower/lib/openclaw");
    make_tree(&lower);
    let store = Store::open_or_create(&dir.join("store"), &dir.join("keys/key")).unwrap();
    // The snapshot is of a tree with a file and a link where the image has directories, and without one it has.
    let merged = dir.join("merged/lib/openclaw");
    make_tree(&merged);
    let roots = vec![root("program", &merged, Class::Program)];
    let before = truth(&merged);
    let info = store.snapshot(&request(&roots, &PROGRAM), &mut |_| {}, soon()).unwrap();
    fs::remove_dir_all(dir.join("merged")).unwrap();
    fs::remove_file(lower.join("run.sh")).unwrap();
    fs::create_dir(lower.join("run.sh")).unwrap();
    fs::write(lower.join("run.sh/inside"), b"the image's").unwrap();
    fs::create_dir_all(lower.join("image/deep")).unwrap();
    fs::write(lower.join("image/deep/file"), b"the image's").unwrap();
    let Some(_mounted) = overlay(&dir) else { return };
    let plan = Plan { quarantine: dir.join("quarantine/1"), ..Plan::default() };
    let wanted = store.compare(&info.id, &PROGRAM, Depth::Hash, soon()).unwrap();
    store.repair(&info.id, Scope::Differences(&wanted), &plan, soon()).unwrap();
    assert_eq!(truth(&merged), before);
    for kept in ["run.sh/inside", "image/deep/file"] {
        assert_eq!(fs::read(dir.join("quarantine/1/program").join(kept)).unwrap(), b"the image's");
    }
}
