//! Whether anything of the user's was written since it was last looked at, without reading a byte of it.
//!
//! One number over every file of the roots that hold state, sessions, credentials and workspaces: name, size, times and
//! inode, also of what lies deep. Enough to decide whether a snapshot is worth taking, which then looks for itself. The
//! walk is bounded; a tree that is larger says so, and whoever decides must not take silence for rest.

use crate::{Node, roots};
use engine::Class;
use host::clock::Deadline;
use serde::{Deserialize, Serialize};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Entries looked at in one walk: about 0.15 s of one core. It runs when a state snapshot may be due, every 15 minutes at
/// most, so that the largest tree costs less than 0.02 %.
const MAX_ENTRIES: usize = 50_000;
/// Looks at the clock once in so many entries.
const CLOCK_EVERY: usize = 1_024;

/// What the user's files looked like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// Changes whenever a file that was looked at does.
    pub hash: u64,
    /// Everything was looked at; else there is more than the limit, and an unchanged number proves nothing.
    pub whole: bool,
}

/// Looks at everything of the user's.
#[must_use]
pub fn stamp(node: &Node, deadline: Deadline) -> Stamp {
    bounded(node, MAX_ENTRIES, deadline)
}

fn bounded(node: &Node, most: usize, deadline: Deadline) -> Stamp {
    let users = |class: Class| match class {
        Class::Credentials | Class::State | Class::Sessions | Class::Workspace => true,
        Class::Program | Class::Runtime | Class::Service | Class::Config => false,
    };
    let (mut hash, mut left) = (0_u64, most);
    // Workspaces come last: however large they are, state and sessions have been looked at.
    for root in roots::roots(node).into_iter().filter(|r| users(r.class)) {
        let skip: Vec<PathBuf> = root.exclude.iter().map(|e| root.path.join(e)).collect();
        let mut open = vec![root.path];
        while let Some(path) = open.pop() {
            if skip.contains(&path) {
                continue;
            }
            if left == 0 || left.is_multiple_of(CLOCK_EVERY) && deadline.passed() {
                return Stamp { hash, whole: false };
            }
            left -= 1;
            let Ok(meta) = path.symlink_metadata() else { continue };
            if meta.is_dir() {
                // What is listed and gone a moment later is the next walk's news.
                open.extend(std::fs::read_dir(&path).into_iter().flatten().flatten().map(|e| e.path()));
            }
            // In whatever order they are listed, the sum is the same.
            hash = hash.wrapping_add(one(&path, &meta));
        }
    }
    Stamp { hash, whole: true }
}

fn one(path: &Path, meta: &std::fs::Metadata) -> u64 {
    let mut hash = DefaultHasher::new();
    path.hash(&mut hash);
    // A directory's own times move with every temporary file; the shared memory of a database is its readers' scratch pad.
    let ends = |with: &[u8]| path.as_os_str().as_encoded_bytes().ends_with(with);
    let scratch = meta.is_dir() || ends(b"-shm");
    if !scratch {
        (meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec()).hash(&mut hash);
    }
    // SQLite gives a log to its database's owner whenever root opens it, also to whom it belongs already: our own looks
    // would be news. Whoever writes to a log changes its mtime.
    if !scratch && !ends(b"-wal") {
        (meta.ctime(), meta.ctime_nsec()).hash(&mut hash);
    }
    hash.finish()
}

/// Whether a credential is one of those that a messenger uses up and makes anew all day: its going is nobody's news.
#[must_use]
pub fn comes_and_goes(path: &Path) -> bool {
    /// WhatsApp keeps one file per key of its ratchet.
    const KEYS: [&str; 6] =
        ["pre-key-", "session-", "sender-key-", "app-state-sync-", "lid-mapping-", "device-list-"];
    path.file_name().and_then(|n| n.to_str()).is_some_and(|name| KEYS.iter().any(|key| name.starts_with(key)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::find::tests::node_at;
    use std::time::Duration;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(20))
    }

    fn put(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
        std::fs::write(path, text).expect("write");
    }

    #[test]
    fn a_log_that_root_has_only_looked_at_is_no_news() {
        let dir = tempfile::tempdir().expect("dir");
        let node = node_at(dir.path());
        let log = node.state_dir.join("state/openclaw.sqlite-wal");
        put(&log, "pages");
        let before = stamp(&node, soon());
        let ctime = |path: &Path| path.metadata().map(|m| (m.ctime(), m.ctime_nsec())).expect("stat");
        let then = ctime(&log);
        while ctime(&log) == then {
            std::os::unix::fs::chown(&log, Some(node.ids.uid), None).expect("chown");
        }
        assert_eq!(stamp(&node, soon()), before);
        put(&log, "other");
        assert_ne!(stamp(&node, soon()), before);
    }

    #[test]
    fn every_change_of_the_users_shows_and_nothing_else() {
        let dir = tempfile::tempdir().expect("dir");
        let node = node_at(dir.path());
        let s = node.state_dir.clone();
        let deep = s.join("workspace/a/b/c/deep.md");
        for file in [&deep, &s.join("agents/main/sessions/1.jsonl"), &s.join("credentials/x/creds.json")] {
            put(file, "x");
        }
        let mut last = stamp(&node, soon());
        assert!(last.whole);
        assert_eq!(stamp(&node, soon()), last, "a look changes nothing");
        let changes: [(&str, &dyn Fn()); 8] = [
            ("a file deep in the workspace", &|| put(&deep, "longer")),
            ("a new one there", &|| put(&deep.with_file_name("new"), "x")),
            ("a session's lines", &|| put(&s.join("agents/main/sessions/1.jsonl"), "x\ny")),
            ("a new session", &|| put(&s.join("agents/main/sessions/2.jsonl"), "x")),
            ("a credential", &|| put(&s.join("credentials/x/creds.json"), "y!")),
            ("other state", &|| put(&s.join("media/picture"), "x")),
            ("a deletion", &|| std::fs::remove_file(&deep).expect("rm")),
            ("an exchange by the same name and size", &|| {
                put(&s.join("beside"), "y!");
                std::fs::rename(s.join("beside"), s.join("credentials/x/creds.json")).expect("mv");
            }),
        ];
        for (what, change) in changes {
            change();
            let now = stamp(&node, soon());
            assert_ne!(now, last, "{what}");
            last = now;
        }
        // What belongs to nobody, and what only came and went.
        put(&s.join("logs/today.log"), "line");
        put(&s.join("tmp/x.lock"), "1");
        let temporary = s.join("workspace/a/tmpfile");
        put(&temporary, "x");
        std::fs::remove_file(&temporary).expect("rm");
        assert_eq!(stamp(&node, soon()), last);
    }

    #[test]
    fn a_tree_beyond_the_limit_says_so() {
        let dir = tempfile::tempdir().expect("dir");
        let node = node_at(dir.path());
        for n in 0..50 {
            put(&node.state_dir.join(format!("workspace/{n}")), "x");
        }
        assert!(bounded(&node, 500, soon()).whole);
        assert!(!bounded(&node, 20, soon()).whole);
        assert!(!bounded(&node, CLOCK_EVERY, Deadline::after(Duration::ZERO)).whole, "nor is it late");
    }

    #[test]
    fn keys_of_a_ratchet_come_and_go_and_the_account_does_not() {
        assert!(comes_and_goes(Path::new("/c/whatsapp/default/pre-key-17.json")));
        assert!(!comes_and_goes(Path::new("/c/whatsapp/default/creds.json")));
        assert!(!comes_and_goes(Path::new("/w/MEMORY.md")));
    }
}
