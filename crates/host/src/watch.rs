//! Tells at once when one of a few files or directories changes (inotify).
//!
//! Guarantees: a watched path may come, go, be replaced by a rename, lie behind a symbolic link or below directories
//! that do not exist yet: as long as the kernel reports anything, the watch finds its way back to it. What the kernel
//! dropped ([`Change::Lost`]) is said, never hidden. A report is a reason to look, never a proof of anything: the
//! looking is done elsewhere, also without reports.

use crate::error::{Context, Error, Kind, Result};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Bytes of reports read at once; each takes at most 272.
const BUFFER_BYTES: usize = 32 << 10;
/// Reports taken in one [`Watch::drain`]; what comes beyond waits for the next.
const REPORTS_LIMIT: usize = 65_536;
/// Targets of one watch: a node has about ten.
const TARGETS_LIMIT: usize = 1_024;
/// Tries to catch up with a path that comes into being while it is being watched.
const ARM_TRIES_LIMIT: usize = 64;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Change {
    /// Content was written.
    Written,
    /// It came into being, or another took its place.
    Appeared,
    /// It went.
    Vanished,
    /// Mode, owner, times or links changed.
    Attributes,
    /// The kernel could not keep up: anything may have happened.
    Lost,
}

/// One report.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Event {
    /// The key given with the target.
    pub key: String,
    /// The entry within a watched directory; `None` for the target itself.
    pub name: Option<OsString>,
    /// What happened.
    pub kind: Change,
}

/// One path to watch.
#[derive(Debug)]
struct Target {
    key: String,
    path: PathBuf,
    exists: bool,
}

/// Why a directory is watched.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Interest {
    /// It is the target: every entry matters.
    Inside,
    /// This entry of it is the target.
    Target(OsString),
    /// This entry of it is on the way to the target.
    Way(OsString),
}

/// A set of watched paths; its descriptor becomes readable when there is something to [`Watch::drain`].
#[derive(Debug)]
pub struct Watch {
    fd: OwnedFd,
    targets: Vec<Target>,
    /// By watch descriptor: which target, and why.
    interests: BTreeMap<i32, BTreeSet<(usize, Interest)>>,
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Watch {
    /// A watch on nothing yet.
    pub fn new() -> Result<Watch> {
        let fd =
            inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).context(|| "watching files".into());
        let fd = fd.map_err(|e| e.hint("is fs.inotify.max_user_instances used up?"))?;
        Ok(Watch { fd, targets: Vec::new(), interests: BTreeMap::new() })
    }

    /// Watches a file, or a directory and its entries. `false`: it does not exist; its coming will be reported.
    pub fn add(&mut self, path: &Path, key: &str) -> Result<bool> {
        let what = || format!("watching {}", path.display());
        if !path.is_absolute() {
            return Err(Error::new(Kind::Usage, what(), "the path is not absolute"));
        }
        if self.targets.len() >= TARGETS_LIMIT {
            return Err(Error::new(Kind::Usage, what(), "too many paths are watched"));
        }
        self.targets.push(Target { key: key.into(), path: path.into(), exists: false });
        let index = self.targets.len() - 1;
        match self.arm(index) {
            Ok(()) => Ok(self.targets[index].exists),
            Err(e) => {
                self.forget(index);
                self.targets.pop();
                Err(Error { what: what(), ..e })
            }
        }
    }

    /// What happened since the last call, each thing once, in no particular order. Never blocks.
    pub fn drain(&mut self) -> Result<Vec<Event>> {
        let mut events = BTreeSet::new();
        let mut moved = BTreeSet::new();
        for (wd, name, flags) in self.reports()? {
            if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                moved.extend(0..self.targets.len());
                let lost = |t: &Target| Event { key: t.key.clone(), name: None, kind: Change::Lost };
                events.extend(self.targets.iter().map(lost));
                continue;
            }
            for (index, interest) in self.interests.get(&wd).into_iter().flatten() {
                let (event, moves) = judge(&self.targets[*index], interest, name.as_deref(), flags);
                events.extend(event);
                if moves {
                    moved.insert(*index);
                }
            }
            if flags.contains(ReadFlags::IGNORED) {
                self.interests.remove(&wd);
            }
        }
        for index in moved {
            let before = self.targets[index].exists;
            self.arm(index)?;
            let target = &self.targets[index];
            let kind = match (before, target.exists) {
                (false, true) => Change::Appeared,
                (true, false) => Change::Vanished,
                (true, true) | (false, false) => continue,
            };
            events.insert(Event { key: target.key.clone(), name: None, kind });
        }
        Ok(events.into_iter().collect())
    }

    /// The kernel's reports, bounded.
    fn reports(&self) -> Result<Vec<(i32, Option<OsString>, ReadFlags)>> {
        let mut buffer = vec![MaybeUninit::uninit(); BUFFER_BYTES];
        let mut reader = inotify::Reader::new(&self.fd, &mut buffer);
        let mut found = Vec::new();
        // Only between reads: what was read must be taken.
        while found.len() < REPORTS_LIMIT || !reader.is_buffer_empty() {
            match reader.next() {
                Ok(report) => {
                    let name = report.file_name().map(|n| OsStr::from_bytes(n.to_bytes()).to_os_string());
                    found.push((report.wd(), name, report.events()));
                }
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e).context(|| "reading reports of changed files".into()),
            }
        }
        Ok(found)
    }

    /// Watches whatever now leads to the target, and drops what no longer does.
    fn arm(&mut self, index: usize) -> Result<()> {
        let path = self.targets[index].path.clone();
        for _ in 0..ARM_TRIES_LIMIT {
            let wanted = lookout(&path);
            let mut armed = Vec::new();
            for (dir, interest) in &wanted {
                match self.add_watch(dir, interest) {
                    Ok(wd) => armed.push((wd, interest.clone())),
                    // It went in this moment: see what is there now.
                    Err(e) if e.kind == Kind::NotFound => {}
                    Err(e) => return Err(e),
                }
            }
            if armed.len() == wanted.len() && lookout(&path) == wanted {
                self.forget(index);
                for (wd, interest) in armed {
                    self.interests.entry(wd).or_default().insert((index, interest));
                }
                self.drop_unused();
                self.targets[index].exists = path.symlink_metadata().is_ok();
                return Ok(());
            }
        }
        Err(Error::new(Kind::System, format!("watching {}", path.display()), "it keeps changing its place"))
    }

    fn add_watch(&self, dir: &Path, interest: &Interest) -> Result<i32> {
        let places = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF;
        let mask = match interest {
            // A home directory on the way must not wake us at every write to some log in it.
            Interest::Way(_) => places,
            Interest::Inside | Interest::Target(_) => {
                places | WatchFlags::MODIFY | WatchFlags::CLOSE_WRITE | WatchFlags::ATTRIB
            }
        };
        match inotify::add_watch(&self.fd, dir, mask | WatchFlags::ONLYDIR | WatchFlags::MASK_ADD) {
            Ok(wd) => Ok(wd),
            // Not a directory any more is as good as gone.
            Err(rustix::io::Errno::NOTDIR) => {
                Err(Error::new(Kind::NotFound, format!("watching {}", dir.display()), "it is no directory"))
            }
            Err(rustix::io::Errno::NOSPC) => {
                let why = "the kernel's limit of watches is reached";
                Err(Error::new(Kind::System, format!("watching {}", dir.display()), why)
                    .hint("raise fs.inotify.max_user_watches"))
            }
            Err(e) => Err(e).context(|| format!("watching {}", dir.display())),
        }
    }

    fn forget(&mut self, index: usize) {
        for interests in self.interests.values_mut() {
            interests.retain(|(i, _)| *i != index);
        }
    }

    fn drop_unused(&mut self) {
        let unused: Vec<i32> =
            self.interests.iter().filter(|(_, i)| i.is_empty()).map(|(wd, _)| *wd).collect();
        for wd in unused {
            self.interests.remove(&wd);
            // Gone already when its directory is.
            let _ = inotify::remove_watch(&self.fd, wd);
        }
    }
}

/// What one report says of one target, and whether the way to it may have changed.
fn judge(
    target: &Target,
    interest: &Interest,
    name: Option<&OsStr>,
    flags: ReadFlags,
) -> (Option<Event>, bool) {
    let came = flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO);
    let went = flags.intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM);
    let itself = flags
        .intersects(ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::IGNORED | ReadFlags::UNMOUNT);
    let kind = if came {
        Change::Appeared
    } else if went {
        Change::Vanished
    } else if flags.intersects(ReadFlags::MODIFY | ReadFlags::CLOSE_WRITE) {
        Change::Written
    } else {
        Change::Attributes
    };
    let event =
        |name: Option<&OsStr>| Event { key: target.key.clone(), name: name.map(OsStr::to_os_string), kind };
    match interest {
        _ if itself => (None, true),
        Interest::Inside => (name.map(|n| event(Some(n))), false),
        Interest::Target(wanted) if name == Some(wanted) => (Some(event(None)), came || went),
        Interest::Way(wanted) if name == Some(wanted) => (None, came || went),
        Interest::Target(_) | Interest::Way(_) => (None, false),
    }
}

/// The directories to watch for a path, as things are now: the nearest existing one on the way, the one that holds
/// the target, the target itself if it is a directory, and the same for what it links to.
fn lookout(path: &Path) -> Vec<(PathBuf, Interest)> {
    let mut wanted = Vec::new();
    let mut add = |path: &Path| {
        if let (Some(parent), Some(name)) = (path.parent(), path.file_name()) {
            if parent.is_dir() {
                wanted.push((parent.to_path_buf(), Interest::Target(name.to_os_string())));
            } else if let Some(way) = nearest(parent) {
                wanted.push(way);
            }
        }
        // Directories above may be moved away with all below them: seen one level up, where that is not the root.
        if let Some((above, name)) = path.parent().and_then(|p| Some((p.parent()?, p.file_name()?)))
            && above.is_dir()
            && above.parent().is_some()
        {
            wanted.push((above.to_path_buf(), Interest::Way(name.to_os_string())));
        }
    };
    add(path);
    match path.canonicalize() {
        Ok(real) if real != path => add(&real),
        Ok(_) => {}
        // A link to something that is not there yet.
        Err(_) => {
            if let Ok(to) = path.read_link() {
                add(&path.parent().unwrap_or(path).join(to));
            }
        }
    }
    if path.is_dir() {
        wanted.push((path.to_path_buf(), Interest::Inside));
    }
    wanted.sort();
    wanted.dedup();
    wanted
}

/// The nearest existing directory above a missing one, and the entry of it that leads there.
fn nearest(missing: &Path) -> Option<(PathBuf, Interest)> {
    let found = missing.ancestors().zip(missing.ancestors().skip(1)).find(|(_, parent)| parent.is_dir());
    found.and_then(|(child, parent)| {
        Some((parent.to_path_buf(), Interest::Way(child.file_name()?.to_os_string())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Deadline;
    use std::time::Duration;

    struct Bench {
        dir: tempfile::TempDir,
        watch: Watch,
    }

    impl Bench {
        fn new() -> Bench {
            Bench { dir: tempfile::tempdir().unwrap(), watch: Watch::new().unwrap() }
        }

        fn at(&self, path: &str) -> PathBuf {
            self.dir.path().join(path)
        }

        fn write(&self, path: &str, text: &str) {
            std::fs::write(self.at(path), text).unwrap();
        }

        fn add(&mut self, path: &str) -> bool {
            let at = self.at(path);
            self.watch.add(&at, path).unwrap()
        }

        /// What is reported by now: inotify reports before the call that changed something returns.
        fn drain(&mut self) -> Vec<(String, Option<String>, Change)> {
            let text = |n: OsString| n.into_string().unwrap();
            self.watch.drain().unwrap().into_iter().map(|e| (e.key, e.name.map(text), e.kind)).collect()
        }

        fn saw(&mut self, key: &str, kind: Change) {
            let events = self.drain();
            assert!(
                events.iter().any(|(k, n, c)| k == key && n.is_none() && *c == kind),
                "{kind:?} not in {events:?}"
            );
        }
    }

    #[test]
    fn a_file_written_replaced_removed_and_back() {
        let mut b = Bench::new();
        b.write("f", "1");
        assert!(b.add("f"));
        assert_eq!(b.drain(), []);
        b.write("f", "2");
        b.saw("f", Change::Written);
        b.write("other", "x");
        assert_eq!(b.drain(), [], "a neighbour is none of our business");
        b.write("tmp", "3");
        std::fs::rename(b.at("tmp"), b.at("f")).unwrap();
        b.saw("f", Change::Appeared);
        b.write("f", "4");
        b.saw("f", Change::Written);
        std::fs::remove_file(b.at("f")).unwrap();
        b.saw("f", Change::Vanished);
        b.write("f", "5");
        b.saw("f", Change::Appeared);
        rustix::fs::chmod(b.at("f"), rustix::fs::Mode::RUSR).unwrap();
        assert_eq!(b.drain(), [("f".into(), None, Change::Attributes)]);
    }

    #[test]
    fn a_path_below_directories_that_do_not_exist_yet() {
        let mut b = Bench::new();
        assert!(!b.add("a/b/c/f"));
        std::fs::create_dir_all(b.at("a/b/c")).unwrap();
        assert_eq!(b.drain(), []);
        b.write("a/b/c/f", "1");
        b.saw("a/b/c/f", Change::Appeared);
        std::fs::remove_dir_all(b.at("a")).unwrap();
        b.saw("a/b/c/f", Change::Vanished);
        std::fs::create_dir_all(b.at("a/b/c")).unwrap();
        b.write("a/b/c/f", "2");
        b.saw("a/b/c/f", Change::Appeared);
    }

    #[test]
    fn a_file_that_comes_between_looking_and_watching_is_not_missed() {
        let mut b = Bench::new();
        assert!(!b.add("a/f"));
        std::fs::create_dir(b.at("a")).unwrap();
        b.write("a/f", "1");
        b.saw("a/f", Change::Appeared);
    }

    #[test]
    fn the_directory_above_is_moved_away_and_another_put_in_its_place() {
        let mut b = Bench::new();
        std::fs::create_dir_all(b.at("top/d")).unwrap();
        std::fs::create_dir_all(b.at("top/new")).unwrap();
        b.write("top/d/f", "1");
        b.write("top/new/f", "2");
        assert!(b.add("top/d/f"));
        std::fs::rename(b.at("top/d"), b.at("top/old")).unwrap();
        b.saw("top/d/f", Change::Vanished);
        std::fs::rename(b.at("top/new"), b.at("top/d")).unwrap();
        b.saw("top/d/f", Change::Appeared);
        b.write("top/d/f", "3");
        b.saw("top/d/f", Change::Written);
        b.write("top/old/f", "4");
        assert_eq!(b.drain(), [], "the old place is forgotten");
    }

    #[test]
    fn a_directory_and_its_entries() {
        let mut b = Bench::new();
        std::fs::create_dir(b.at("d")).unwrap();
        assert!(b.add("d"));
        b.write("d/x", "1");
        let events = b.drain();
        assert!(events.contains(&("d".into(), Some("x".into()), Change::Appeared)), "{events:?}");
        std::fs::remove_file(b.at("d/x")).unwrap();
        std::fs::remove_dir(b.at("d")).unwrap();
        let events = b.drain();
        assert!(events.contains(&("d".into(), Some("x".into()), Change::Vanished)), "{events:?}");
        assert!(events.contains(&("d".into(), None, Change::Vanished)), "{events:?}");
        std::fs::create_dir(b.at("d")).unwrap();
        b.saw("d", Change::Appeared);
        b.write("d/y", "1");
        let events = b.drain();
        assert!(events.contains(&("d".into(), Some("y".into()), Change::Appeared)), "{events:?}");
    }

    #[test]
    fn behind_a_symbolic_link() {
        let mut b = Bench::new();
        std::fs::create_dir_all(b.at("real")).unwrap();
        std::fs::create_dir_all(b.at("links")).unwrap();
        b.write("real/f", "1");
        std::os::unix::fs::symlink("../real/f", b.at("links/f")).unwrap();
        assert!(b.add("links/f"));
        b.write("real/f", "2");
        b.saw("links/f", Change::Written);
        std::fs::remove_file(b.at("links/f")).unwrap();
        b.saw("links/f", Change::Vanished);
    }

    #[test]
    fn writes_on_the_way_do_not_wake_us() {
        let mut b = Bench::new();
        std::fs::create_dir(b.at("d")).unwrap();
        b.write("log", "");
        b.write("d/f", "");
        assert!(b.add("d/f"));
        b.write("log", "more");
        let woken = crate::poll::readable(&[b.watch.as_fd()], Deadline::after(Duration::ZERO)).unwrap();
        assert_eq!(woken, [false]);
    }

    #[test]
    fn two_targets_in_one_directory_are_told_apart() {
        let mut b = Bench::new();
        b.write("f", "");
        b.write("g", "");
        assert!(b.add("f") && b.add("g"));
        b.write("g", "1");
        assert_eq!(b.drain(), [("g".into(), None, Change::Written)]);
    }

    #[test]
    fn many_changes_are_one_event_and_the_descriptor_tells() {
        let mut b = Bench::new();
        b.write("f", "");
        b.add("f");
        let quiet = crate::poll::readable(&[b.watch.as_fd()], Deadline::after(Duration::ZERO)).unwrap();
        assert_eq!(quiet, [false]);
        for n in 0..50 {
            b.write("f", &n.to_string());
        }
        let ready =
            crate::poll::readable(&[b.watch.as_fd()], Deadline::after(Duration::from_secs(5))).unwrap();
        assert_eq!(ready, [true]);
        assert_eq!(b.drain(), [("f".into(), None, Change::Written)]);
        assert_eq!(b.drain(), []);
    }

    #[test]
    fn an_overflow_is_said() {
        let mut b = Bench::new();
        b.write("f", "");
        b.add("f");
        let limit: usize = std::fs::read_to_string("/proc/sys/fs/inotify/max_queued_events")
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        b.write("g", "");
        for n in 0..=limit {
            // Alternating names: equal neighbours in the queue are merged.
            let file = b.at(if n % 2 == 0 { "f" } else { "g" });
            rustix::fs::chmod(file, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
        }
        b.saw("f", Change::Lost);
        std::fs::remove_file(b.at("f")).unwrap();
        b.saw("f", Change::Vanished);
    }

    #[test]
    fn nothing_is_leaked_by_coming_and_going() {
        let mut b = Bench::new();
        b.add("a/b/f");
        for _ in 0..50 {
            std::fs::create_dir_all(b.at("a/b")).unwrap();
            b.write("a/b/f", "");
            b.drain();
            std::fs::remove_dir_all(b.at("a")).unwrap();
            b.drain();
        }
        assert!(b.watch.interests.len() <= 3, "{:?}", b.watch.interests);
    }

    #[test]
    fn a_relative_path_is_refused() {
        assert_eq!(Watch::new().unwrap().add(Path::new("x"), "x").unwrap_err().kind, Kind::Usage);
    }
}
