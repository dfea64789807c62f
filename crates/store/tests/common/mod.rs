//! A small tree with something of everything, a store beside it, and the truth about what lies on disk.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(unreachable_pub, reason = "a helper of tests")]
#![allow(missing_docs, reason = "a helper of tests")]

use engine::words::Class;
use host::clock::Deadline;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;
use store::{Plan, Request, Root, SnapshotInfo, Store, Trust};

pub fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Set in a test that has mounts of its own.
const OWN_MOUNTS: &str = "KOBOSHI_TEST_OWN_MOUNTS";

/// Runs the test of this name once more where nobody sees its mounts: a namespace that somebody else makes meanwhile
/// would copy them and keep a file system alive that was unmounted here. True within.
#[allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "it ends by itself, and speaks"
)]
pub fn in_own_mounts(name: &str) -> bool {
    if std::env::var_os(OWN_MOUNTS).is_some() {
        return true;
    }
    let there = std::process::Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(OWN_MOUNTS, "1")
        .output()
        .unwrap();
    // Its words are this test's: on the terminal they would be those of one more test binary, to whoever counts.
    print!("{}", String::from_utf8_lossy(&there.stdout));
    eprint!("{}", String::from_utf8_lossy(&there.stderr));
    assert!(there.status.success(), "{name}, in a mount namespace of its own");
    false
}

pub struct Place {
    pub tmp: tempfile::TempDir,
    pub dir: PathBuf,
    pub live: PathBuf,
    pub store: Store,
    pub roots: Vec<Root>,
}

pub const PROGRAM: [Class; 1] = [Class::Program];

pub fn root(name: &str, path: &Path, class: Class) -> Root {
    Root { name: name.into(), path: path.to_owned(), class, exclude: Vec::new(), only: None }
}

pub fn request<'a>(roots: &'a [Root], classes: &'a [Class]) -> Request<'a> {
    Request {
        roots,
        classes,
        note: "test",
        version: Some("1.2.3"),
        node: serde_json::json!({"name": "n"}),
        baseline: serde_json::json!({}),
    }
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut hash = blake3::Hasher::new();
    hash.update(&seed.to_le_bytes());
    let mut bytes = vec![0; length];
    hash.finalize_xof().fill(&mut bytes);
    bytes
}

pub fn make_tree(at: &Path) {
    fs::create_dir_all(at.join("dist/deep/deeper")).unwrap();
    fs::create_dir_all(at.join("node_modules/a")).unwrap();
    fs::create_dir_all(at.join("empty")).unwrap();
    for i in 0..40u64 {
        fs::write(at.join(format!("dist/{i}.js")), noise(i, 100 + i as usize * 37)).unwrap();
        fs::write(at.join(format!("node_modules/a/{i}.json")), format!("{{\"n\":{i}}}").repeat(20)).unwrap();
    }
    fs::write(at.join("package.json"), b"{\"version\":\"1.2.3\"}").unwrap();
    fs::write(at.join("dist/big.bin"), noise(1000, 900_000)).unwrap();
    fs::write(at.join("dist/deep/deeper/leaf"), b"leaf").unwrap();
    fs::write(at.join("dist/nothing"), b"").unwrap();
    fs::write(at.join("dist-other"), b"sorts between").unwrap();
    fs::write(at.join("run.sh"), b"#!/bin/sh\n").unwrap();
    fs::set_permissions(at.join("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("dist/big.bin", at.join("link")).unwrap();
    symlink("../nowhere", at.join("dist/dangling")).unwrap();
    settle(at);
}

/// Sets all times to one in the past, as an unpacked package has them.
pub fn settle(at: &Path) {
    for entry in walk(at) {
        let times = rustix::fs::Timestamps {
            last_access: rustix::fs::Timespec { tv_sec: 1_700_000_000, tv_nsec: 5 },
            last_modification: rustix::fs::Timespec { tv_sec: 1_700_000_000, tv_nsec: 5 },
        };
        rustix::fs::utimensat(rustix::fs::CWD, &entry, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
            .unwrap();
    }
}

pub fn walk(at: &Path) -> Vec<PathBuf> {
    let mut all = vec![at.to_owned()];
    let mut i = 0;
    while i < all.len() {
        if all[i].symlink_metadata().unwrap().is_dir() {
            let mut children: Vec<_> = fs::read_dir(&all[i]).unwrap().map(|e| e.unwrap().path()).collect();
            children.sort();
            all.extend(children);
        }
        i += 1;
    }
    all
}

/// Everything that a repair must bring back, by path.
pub fn truth(at: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    for path in walk(at) {
        let m = path.symlink_metadata().unwrap();
        let content = if m.is_file() {
            blake3::hash(&fs::read(&path).unwrap()).to_hex().to_string()
        } else if m.is_symlink() {
            fs::read_link(&path).unwrap().display().to_string()
        } else {
            String::new()
        };
        let mode = if m.is_symlink() { 0 } else { m.mode() };
        let mtime = if m.is_dir() { 0 } else { m.mtime() };
        let line = format!("{mode:o} {}:{} {mtime} {content}", m.uid(), m.gid());
        all.insert(path.strip_prefix(at).unwrap().to_owned(), line);
    }
    all
}

/// In memory where that can hold attributes as well: these tests are about logic, not about the disk.
pub fn quick_dir() -> tempfile::TempDir {
    let shm = tempfile::tempdir_in("/dev/shm").ok();
    let able = |d: &tempfile::TempDir| {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(d.path(), "user.koboshi", b"1", flags).is_ok()
            && rustix::fs::removexattr(d.path(), "user.koboshi").is_ok()
    };
    shm.filter(able).unwrap_or_else(|| tempfile::tempdir().unwrap())
}

impl Place {
    /// Takes snapshots until one finds nothing new, which needs an index that vouches for everything.
    pub fn until_vouched_or_changed(&self, _id: &str) {
        let deadline = soon();
        while self.take().cost.added_bytes != 0 {
            assert!(!deadline.passed(), "something always changes");
        }
    }

    /// Looks until the index vouches for everything (an entry changed within the clock's tick is read once more).
    pub fn until_vouched(&self, id: &str, classes: &[Class]) {
        let deadline = soon();
        loop {
            let report = self.store.sweep(id, classes, deadline).unwrap();
            assert_eq!(report.differences, []);
            if report.hashed == 0 {
                return;
            }
            assert!(!deadline.passed(), "the index never came to vouch");
        }
    }

    /// A program tree and an empty store.
    pub fn new() -> Place {
        Place::within(quick_dir())
    }

    pub fn within(tmp: tempfile::TempDir) -> Place {
        let dir = tmp.path().canonicalize().unwrap();
        let live = dir.join("prefix/lib/openclaw");
        make_tree(&live);
        let store = Store::open_or_create(&dir.join("store"), &dir.join("keys/key")).unwrap();
        let roots = vec![root("program", &live, Class::Program)];
        Place { tmp, dir, live, store, roots }
    }

    pub fn take(&self) -> SnapshotInfo {
        let classes: Vec<Class> = self.roots.iter().map(|r| r.class).collect();
        self.store.snapshot(&request(&self.roots, &classes), &mut |_| {}, soon()).unwrap()
    }

    pub fn take_good(&self) -> SnapshotInfo {
        let info = self.take();
        self.store.set_trust(&info.id, Trust::Good).unwrap();
        info
    }

    pub fn plan(&self) -> Plan {
        Plan { quarantine: self.dir.join("quarantine/1"), ..Plan::default() }
    }

    pub fn files_in(&self, part: &str) -> Vec<PathBuf> {
        let mut list: Vec<_> =
            fs::read_dir(self.dir.join("store").join(part)).unwrap().map(|e| e.unwrap().path()).collect();
        list.sort();
        list
    }
}
