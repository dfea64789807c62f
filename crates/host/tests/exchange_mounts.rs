//! The switch on real mounts: a lower layer of overlayfs, a bind mount, another file system. Root only; others are
//! told what was left out.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // Helpers of tests, outside any one test.

use host::exchange::{Method, move_aside, probe, probe_from, resume, swap};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A mount of ours, gone at the end whatever happens.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn root(left_out: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("left out, not root: {left_out}");
    }
    root
}

/// A mount, or the reason why there is none here (a container without the right).
fn try_mount(what: &str, at: &Path, mounted: rustix::io::Result<()>) -> Option<Mounted> {
    match mounted {
        Ok(()) => Some(Mounted(at.to_path_buf())),
        Err(e) => {
            println!("left out, {what} cannot be mounted here: {e}");
            None
        }
    }
}

fn put(path: PathBuf, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn program(top: &Path, version: &str, own: &str) {
    put(top.join("package.json"), version);
    put(top.join("dist/index.js"), &format!("index {version}"));
    put(top.join("node_modules/ws/same.js"), "the same");
    put(top.join(format!("node_modules/{own}/deep/file.js")), version);
}

fn picture(top: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut all = BTreeMap::new();
    let mut open = vec![top.to_path_buf()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).unwrap().map(Result::unwrap) {
            let path = entry.path();
            let content = if path.is_dir() {
                open.push(path.clone());
                None
            } else {
                Some(std::fs::read(&path).unwrap())
            };
            all.insert(path.strip_prefix(top).unwrap().to_path_buf(), content);
        }
    }
    all
}

fn slow(method: &Method) -> &str {
    match method {
        Method::FileByFile { why } => why,
        Method::Exchange => panic!("told that it can be exchanged at once"),
    }
}

/// There, settled or back, file by file, with the probe telling so beforehand and disturbing nothing.
fn there_and_back(stage: &Path, live: &Path, reason: &str) {
    let (old, new) = (picture(live), picture(stage));
    let told = probe_from(stage.parent().unwrap(), live).unwrap();
    assert!(slow(&told).contains(reason), "{told:?}");
    assert_eq!(picture(live), old, "probing disturbs nothing");

    let done = swap(stage, live).unwrap();
    assert!(slow(&done.method).contains(reason), "{done:?}");
    assert_eq!(picture(live), new);
    assert_eq!(resume(stage).unwrap().as_ref(), Some(&done));
    let kept = picture(done.previous.as_ref().unwrap());
    assert_eq!(kept[Path::new("package.json")], old[Path::new("package.json")]);
    assert!(kept.contains_key(Path::new("node_modules/old-only/deep/file.js")));
    assert!(!kept.contains_key(Path::new("node_modules/ws/same.js")));
    done.back().unwrap();
    assert_eq!((picture(live), picture(stage)), (old, new.clone()));

    let done = swap(stage, live).unwrap();
    done.settle().unwrap();
    assert_eq!(picture(live), new);
    assert!(!stage.exists() && done.previous.unwrap().exists());
}

#[test]
fn a_program_in_a_lower_layer_of_overlayfs() {
    if !root("overlayfs") {
        return;
    }
    // Its upper layer must not lie on an overlay itself, so in memory.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["lower", "upper", "work", "merged"] {
        std::fs::create_dir(at(name)).unwrap();
    }
    program(&at("lower/lib/openclaw"), "1", "old-only");
    let options = format!(
        "lowerdir={},upperdir={},workdir={},redirect_dir=off",
        at("lower").display(),
        at("upper").display(),
        at("work").display()
    );
    let options = CString::new(options).unwrap();
    let merged = at("merged");
    let mounted = mount("overlay", &merged, "overlay", MountFlags::empty(), options.as_c_str());
    let Some(_mounted) = try_mount("overlayfs", &merged, mounted) else { return };
    let live = merged.join("lib/openclaw");
    let stage = merged.join("lib/.stage");
    program(&stage, "2", "new-only");
    assert!(slow(&probe(&live).unwrap()).contains("EXDEV"));
    there_and_back(&stage, &live, "EXDEV");
    // A directory of the upper layer goes at once.
    let fresh = merged.join("lib/fresh");
    program(&fresh, "3", "x");
    assert_eq!(probe(&fresh).unwrap(), Method::Exchange);
    // Aside: copied, and the lower one hidden.
    let old = picture(&live);
    let aside = move_aside(&live, &merged.join("quarantine")).unwrap();
    assert!(!live.exists());
    assert_eq!(picture(&aside), old);
}

#[test]
fn a_program_that_is_a_mount_point() {
    if !root("bind mounts") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (volume, live) = (dir.path().join("volume"), dir.path().join("live"));
    program(&volume, "1", "old-only");
    std::fs::create_dir(&live).unwrap();
    let Some(_mounted) = try_mount("a bind mount", &live, mount_bind(&volume, &live)) else { return };
    let stage = dir.path().join("stage");
    program(&stage, "2", "new-only");
    there_and_back(&stage, &live, "E");
    let old = picture(&live);
    let aside = move_aside(&live, &dir.path().join("quarantine")).unwrap();
    assert_eq!((picture(&aside), picture(&live).len()), (old, 0), "emptied: the point itself cannot go");
}

#[test]
fn a_program_on_another_file_system_than_its_stage() {
    if !root("tmpfs") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().join("other");
    std::fs::create_dir(&point).unwrap();
    let mounted = mount("tmpfs", &point, "tmpfs", MountFlags::empty(), c"size=16m");
    let Some(_mounted) = try_mount("tmpfs", &point, mounted) else { return };
    let (live, stage) = (point.join("live"), dir.path().join("stage"));
    program(&live, "1", "old-only");
    program(&stage, "2", "new-only");
    assert_ne!(live.metadata().unwrap().dev(), stage.metadata().unwrap().dev());
    assert_eq!(probe(&live).unwrap(), Method::Exchange, "within its own file system it could");
    there_and_back(&stage, &live, "EXDEV");
    // A missing live tree comes by copy too, and goes again.
    std::fs::remove_dir_all(&live).unwrap();
    program(&stage, "3", "new-only");
    std::fs::remove_dir_all(dir.path().join("stage.previous")).unwrap();
    let done = swap(&stage, &live).unwrap();
    assert_eq!((picture(&live), done.previous.clone()), (picture(&stage), None));
    done.back().unwrap();
    assert!(!live.exists() && stage.exists());
    // Aside, across.
    program(&live, "4", "x");
    let old = picture(&live);
    let aside = move_aside(&live, &dir.path().join("quarantine")).unwrap();
    assert_eq!((picture(&aside), live.exists()), (old, false));
}

#[test]
fn a_full_file_system_refuses_and_loses_nothing() {
    if !root("a small tmpfs") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().join("small");
    std::fs::create_dir(&point).unwrap();
    let mounted = mount("tmpfs", &point, "tmpfs", MountFlags::empty(), c"size=64k");
    let Some(_mounted) = try_mount("tmpfs", &point, mounted) else { return };
    let (live, stage) = (point.join("live"), dir.path().join("stage"));
    program(&live, "1", "old-only");
    program(&stage, "2", "new-only");
    put(stage.join("big"), &"x".repeat(200 << 10));
    let old = picture(&live);
    let error = swap(&stage, &live).unwrap_err();
    assert_eq!(error.kind, host::Kind::NoSpace, "{error}");
    host::exchange::undo(&stage).unwrap();
    assert_eq!(picture(&live), old);
    // Into a full quarantine: refused, untouched, nothing half there.
    let big = dir.path().join("big");
    put(big.join("file"), &"y".repeat(200 << 10));
    let error = move_aside(&big, &point.join("quarantine")).unwrap_err();
    assert_eq!(error.kind, host::Kind::NoSpace, "{error}");
    assert_eq!(std::fs::read(big.join("file")).unwrap().len(), 200 << 10);
    assert_eq!(picture(&point.join("quarantine")).len(), 0);
}
