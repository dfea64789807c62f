//! Gets a deleted database back from the gateway that still holds it open.
//!
//! A file that was removed lives on in the open descriptors of its process, main file, `-wal` and (useless to us)
//! `-shm`; a log whose own name was left is its log all the same. Main and log are copied as one set: the log's header
//! must be the same before and after, so no page was moved between the two copies that the log does not still hold.
//! SQLite then folds the log into the copy, which is checked and left as one file. The gateway is neither stopped nor
//! asked.

use crate::Node;
use crate::identity::{self, Identity, beside};
use host::clock::Deadline;
use host::error::{Context, Error, Kind, Result};
use host::process::ProcessId;
use rusqlite::{Connection, OpenFlags};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The largest database that is salvaged this way.
const SALVAGE_LIMIT_BYTES: u64 = 16 << 30;
/// A log that is being checkpointed is copied again; a busy one settles within a few tries.
const TRIES_LIMIT: u32 = 8;
/// Different deleted files of one path that are told apart (a database deleted again and again).
const VERSIONS_LIMIT: usize = 8;
/// The fixed head of a write-ahead log: magic, page size, checkpoint number and salts.
const LOG_HEAD_BYTES: usize = 32;
/// Folding the log and checking a database of ordinary size.
const FOLD: Duration = Duration::from_secs(60);

/// One database that was got back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Salvaged {
    /// Where it lay.
    pub original: PathBuf,
    /// Where the copy lies: one whole file, no log beside it.
    pub file: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Bytes of the log that were folded in.
    pub log_bytes: u64,
    /// Who it says the node is, if it is the shared state.
    pub identity: Option<Identity>,
}

/// Copies every deleted database under the node's state that `gateway` still holds open into `dest`.
///
/// An empty list means that there was nothing to salvage. Only files of the node's own state directory are taken,
/// and only from a process of the node's user.
pub fn from_open_files(node: &Node, gateway: ProcessId, dest: &Path) -> Result<Vec<Salvaged>> {
    let what = || format!("salvaging databases from process {}", gateway.pid);
    if gateway.uid() != Some(node.ids.uid) {
        return Err(Error::new(Kind::Denied, what(), "it is not a process of the node's user"));
    }
    // The kernel names open files by their real paths.
    let open = held_open(gateway, &crate::roots::resolved(&node.state_dir));
    if open.iter().any(Held::is_lost_database) {
        std::fs::create_dir_all(dest).context(|| format!("making {}", dest.display()))?;
    }
    let mut saved: Vec<Salvaged> = Vec::new();
    for (n, main) in open.iter().filter(|d| d.is_lost_database()).enumerate() {
        // The log may have been deleted with it, or have kept its name: either way it is the log of what is gone.
        let log_path = beside(&main.path, "-wal");
        let logs: Vec<&Held> = open.iter().filter(|d| d.path == log_path).collect();
        let to = dest.join(format!("{n}-{}", main.path.file_name().unwrap_or_default().to_string_lossy()));
        if let Some(one) = best(main, &logs, &to)? {
            saved.push(one);
        }
    }
    if !gateway.alive() && saved.is_empty() {
        return Err(Error::new(Kind::NotFound, what(), "it ended before anything could be copied"));
    }
    Ok(saved)
}

/// Whether the living gateway holds a deleted database of the node: its end would be the end of those bytes.
#[must_use]
pub fn held(node: &Node) -> bool {
    let Some(gateway) = node.gateway() else { return false };
    held_open(gateway, &crate::roots::resolved(&node.state_dir)).iter().any(Held::is_lost_database)
}

/// Whether a process has a database of the node open, deleted or not.
pub(crate) fn holds_databases(node: &Node, process: ProcessId) -> bool {
    held_open(process, &crate::roots::resolved(&node.state_dir)).iter().any(Held::is_database)
}

/// A file of the state directory that a gateway holds open.
struct Held {
    path: PathBuf,
    /// Its name is gone.
    deleted: bool,
    /// `/proc/PID/fd/N`: opening it opens the deleted file itself.
    fd: PathBuf,
    inode: (u64, u64),
    mtime: i64,
}

impl Held {
    fn is_database(&self) -> bool {
        self.path.extension().is_some_and(|e| e == "sqlite")
    }

    fn is_lost_database(&self) -> bool {
        self.deleted && self.is_database()
    }
}

fn held_open(gateway: ProcessId, state_dir: &Path) -> Vec<Held> {
    let mut found: Vec<Held> = Vec::new();
    for (fd, link) in gateway.open_files() {
        let lost = link.to_string_lossy().strip_suffix(" (deleted)").map(PathBuf::from);
        let deleted = lost.is_some();
        let path = lost.unwrap_or(link);
        let fd = PathBuf::from(format!("/proc/{}/fd/{fd}", gateway.pid));
        let Ok(meta) = std::fs::metadata(&fd) else { continue };
        let inode = (meta.dev(), meta.ino());
        let several = found.iter().filter(|d| d.path == path).count() >= VERSIONS_LIMIT;
        if !meta.is_file()
            || !path.starts_with(state_dir)
            || several
            || found.iter().any(|d| d.inode == inode)
        {
            continue;
        }
        found.push(Held { path, deleted, fd, inode, mtime: meta.mtime() });
    }
    // The newest first: after several deletions that is the one the gateway works with.
    found.sort_by_key(|d| std::cmp::Reverse(d.mtime));
    found
}

/// Tries the main file with each of its logs, or alone where it has none; the first that folds and passes its check is
/// taken. A main file without a log that belongs to it would silently lack the newest rows, so it is never taken alone
/// then. When none folds, the bytes are kept as they are, main file and logs side by side: they may be the last ones there
/// are, and somebody may yet read them. Without room or time for that it is an error, and the gateway lives on.
fn best(main: &Held, logs: &[&Held], to: &Path) -> Result<Option<Salvaged>> {
    let mut last = None;
    let with: Vec<Option<&Held>> =
        if logs.is_empty() { vec![None] } else { logs.iter().map(|l| Some(*l)).collect() };
    for log in with {
        match one(main, log, to) {
            Ok(saved) => return Ok(Some(saved)),
            Err(e) => {
                let _ = remove_set(to);
                if matches!(e.kind, Kind::NoSpace | Kind::TimedOut) {
                    return Err(e);
                }
                last = Some(e);
            }
        }
    }
    match last {
        Some(_) => raw(main, logs, to).map(|()| None),
        None => Ok(None),
    }
}

/// The bytes as they are.
fn raw(main: &Held, logs: &[&Held], to: &Path) -> Result<()> {
    let damaged = beside(to, ".damaged");
    copy_bounded(&main.fd, &damaged, SALVAGE_LIMIT_BYTES)?;
    for (n, log) in logs.iter().enumerate() {
        copy_bounded(&log.fd, &beside(&damaged, &format!("-wal.{n}")), SALVAGE_LIMIT_BYTES)?;
    }
    Ok(())
}

fn one(main: &Held, log: Option<&Held>, to: &Path) -> Result<Salvaged> {
    let what = || format!("salvaging {}", main.path.display());
    let log_bytes = copy_set(main, log, to)?;
    if log.is_some_and(|log| head(log).is_ok_and(|head| !sound(&head))) {
        return Err(Error::new(Kind::Corrupt, what(), "the head of its log is damaged"));
    }
    fold(to)?;
    let deadline = Deadline::after(FOLD);
    let identity = identity::read_state(to, deadline).ok();
    let bytes = std::fs::metadata(to).context(what)?.len();
    Ok(Salvaged { original: main.path.clone(), file: to.to_path_buf(), bytes, log_bytes, identity })
}

/// Copies main and log so that together they are one state of the database.
fn copy_set(main: &Held, log: Option<&Held>, to: &Path) -> Result<u64> {
    let what = || format!("copying {} with its log", main.path.display());
    for _ in 0..TRIES_LIMIT {
        remove_set(to)?;
        let before = (log.map(head).transpose()?, modified(main)?);
        copy_bounded(&main.fd, to, SALVAGE_LIMIT_BYTES)?;
        let mut log_bytes = 0;
        if let Some(log) = log {
            log_bytes = copy_bounded(&log.fd, &beside(to, "-wal"), SALVAGE_LIMIT_BYTES)?;
        }
        let after = (log.map(head).transpose()?, modified(main)?);
        // With a log, pages that a checkpoint moved meanwhile are still in the log as long as it was not begun anew.
        let whole = if log.is_some() { before.0 == after.0 } else { before.1 == after.1 };
        if whole {
            return Ok(log_bytes);
        }
    }
    Err(Error::new(Kind::TimedOut, what(), "the gateway wrote on and on"))
}

fn modified(file: &Held) -> Result<(i64, i64, u64)> {
    let meta = std::fs::metadata(&file.fd).context(|| format!("looking at {}", file.path.display()))?;
    Ok((meta.mtime(), meta.mtime_nsec(), meta.len()))
}

fn head(log: &Held) -> Result<Vec<u8>> {
    let what = || format!("reading {}", log.path.display());
    let mut file = File::open(&log.fd).context(what)?;
    file.seek(SeekFrom::Start(0)).context(what)?;
    let mut head = Vec::with_capacity(LOG_HEAD_BYTES);
    file.take(LOG_HEAD_BYTES as u64).read_to_end(&mut head).context(what)?;
    Ok(head)
}

/// Whether SQLite will read a log with this head. One that it does not believe it takes for empty, without a word, and
/// what only the log held would be lost. (The format: sqlite.org/fileformat2.html, "WAL file format".)
fn sound(head: &[u8]) -> bool {
    // What is shorter holds nothing yet.
    let Some((covered, sums)) = head.get(..LOG_HEAD_BYTES).map(|whole| whole.split_at(LOG_HEAD_BYTES - 8))
    else {
        return true;
    };
    let little = covered.get(3).is_some_and(|magic| magic & 1 == 0);
    let words = covered.chunks_exact(4).map(|word| {
        let word = word.iter().fold(0_u32, |all, byte| (all << 8) | u32::from(*byte));
        if little { word.swap_bytes() } else { word }
    });
    let words: Vec<u32> = words.collect();
    let (a, b) = words.chunks_exact(2).fold((0_u32, 0_u32), |(a, b), pair| {
        let (x, y) = (pair.first().copied().unwrap_or(0), pair.get(1).copied().unwrap_or(0));
        let a = a.wrapping_add(x).wrapping_add(b);
        (a, b.wrapping_add(y).wrapping_add(a))
    });
    sums == [a.to_be_bytes(), b.to_be_bytes()].concat()
}

/// Folds the log into the main file, checks the result, and leaves one file.
fn fold(db: &Path) -> Result<()> {
    let fail = |e: rusqlite::Error| identity::of_sqlite(db, &e);
    let mut conn =
        Connection::open_with_flags(db, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)
            .map_err(fail)?;
    let deadline = Deadline::after(FOLD);
    conn.progress_handler(20_000, Some(move || deadline.passed())).map_err(fail)?;
    conn.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).map_err(fail)?;
    let verdict: String = conn.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).map_err(fail)?;
    if verdict != "ok" {
        return Err(Error::new(Kind::Corrupt, format!("checking {}", db.display()), verdict));
    }
    conn.query_row("PRAGMA journal_mode = DELETE", [], |_| Ok(())).map_err(fail)?;
    conn.close().map_err(|(_, e)| fail(e))?;
    File::open(db).and_then(|f| f.sync_all()).context(|| format!("syncing {}", db.display()))?;
    for suffix in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(beside(db, suffix));
    }
    Ok(())
}

fn remove_set(db: &Path) -> Result<()> {
    for suffix in ["", "-wal", "-shm"] {
        match std::fs::remove_file(beside(db, suffix)) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(format!("clearing {}", db.display()), &e)),
        }
    }
    Ok(())
}

/// Copies at most `limit` bytes into a new private file.
pub(crate) fn copy_bounded(from: &Path, to: &Path, limit: u64) -> Result<u64> {
    let what = || format!("copying {}", from.display());
    let source = File::open(from).context(what)?;
    let mut target =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(to).context(what)?;
    let copied = std::io::copy(&mut source.take(limit.saturating_add(1)), &mut target).context(what)?;
    if copied > limit {
        return Err(Error::new(Kind::NoSpace, what(), format!("it is larger than {limit} bytes")));
    }
    Ok(copied)
}

/// A fresh directory of ours alone.
pub(crate) fn private_dir(parent: &Path) -> Result<PathBuf> {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = format!(
        "koboshi-{}-{}-{}",
        std::process::id(),
        host::clock::now().ms,
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    let dir = parent.join(name);
    rustix::fs::mkdir(&dir, rustix::fs::Mode::RWXU).context(|| format!("making {}", dir.display()))?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::find::tests::node_at;
    use crate::identity::tests::state_db;

    #[test]
    fn a_deleted_database_comes_back_with_what_only_its_log_held() {
        let dir = tempfile::tempdir().expect("dir");
        let node = node_at(dir.path());
        let path = node.state_db();
        // This very process plays the gateway: it holds the database open.
        let writer = state_db(&path, Some("the-device"), 7);
        let before = identity::read_state(&path, Deadline::after(FOLD)).expect("identity");
        for suffix in ["", "-wal", "-shm"] {
            std::fs::remove_file(beside(&path, suffix)).expect("rm");
        }
        writer.execute("INSERT INTO device_pairing_paired VALUES ('after')", []).expect("insert");
        let dest = dir.path().join("saved");
        std::fs::create_dir(&dest).expect("mkdir");
        let us = ProcessId::current().expect("us");
        let saved = from_open_files(&node, us, &dest).expect("salvage");
        assert_eq!(saved.len(), 1, "{saved:?}");
        let one = &saved[0];
        assert_eq!(one.original, path);
        assert!(one.log_bytes > 0);
        let identity = one.identity.clone().expect("identity");
        assert_eq!(identity.device_id, before.device_id);
        assert_eq!(identity.counts.paired, 8);
        let left: Vec<_> = std::fs::read_dir(&dest).expect("dir").flatten().collect();
        assert_eq!(left.len(), 1, "one whole file: {left:?}");
        drop(writer);
    }

    /// The sums that SQLite keeps of the first 24 bytes of a log, in the words of a log of this machine's order.
    fn sums(head: &[u8]) -> [u8; 8] {
        let little = head[3] & 1 == 0;
        let (mut a, mut b) = (0_u32, 0_u32);
        for pair in head[..24].chunks_exact(8) {
            let word = |at: usize| {
                let bytes: [u8; 4] = pair[at..at + 4].try_into().expect("word");
                if little { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) }
            };
            a = a.wrapping_add(word(0)).wrapping_add(b);
            b = b.wrapping_add(word(4)).wrapping_add(a);
        }
        let mut both = [0; 8];
        both[..4].copy_from_slice(&a.to_be_bytes());
        both[4..].copy_from_slice(&b.to_be_bytes());
        both
    }

    /// Spoils the head of a log.
    type Damage = fn(&mut [u8]);

    /// The main file alone would pass every check and lack the newest rows: it must not be put back as the database.
    #[test]
    fn a_database_whose_log_does_not_fold_is_kept_as_it_is_and_never_taken_without_it() {
        let of_another_format: Damage = |head| {
            head[4..8].copy_from_slice(&9_999_999_u32.to_be_bytes());
            let sums = sums(head);
            head[24..32].copy_from_slice(&sums);
        };
        let torn: Damage = |head| head[8..24].fill(0);
        let breaks: [(&str, Damage); 2] =
            [("a log of another format", of_another_format), ("a log whose head is torn", torn)];
        for (what, damage) in breaks {
            let dir = tempfile::tempdir().expect("dir");
            let node = node_at(dir.path());
            let path = node.state_db();
            let writer = state_db(&path, Some("the-device"), 7);
            // Without its log the main file is a sound database: the rows above are folded, the next one is not.
            writer.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).expect("checkpoint");
            writer.execute("INSERT INTO device_pairing_paired VALUES ('newest')", []).expect("insert");
            let mut log = std::fs::read(beside(&path, "-wal")).expect("log");
            assert_eq!(sums(&log), log[24..32], "the sums are understood");
            damage(&mut log);
            std::fs::write(beside(&path, "-wal"), &log).expect("damage");
            let main = std::fs::read(&path).expect("main");
            for suffix in ["", "-wal", "-shm"] {
                std::fs::remove_file(beside(&path, suffix)).expect("rm");
            }
            let dest = dir.path().join("saved");
            let us = ProcessId::current().expect("us");
            assert_eq!(from_open_files(&node, us, &dest).expect("salvage"), [], "{what}");
            let mut kept: Vec<_> =
                std::fs::read_dir(&dest).expect("dir").flatten().map(|e| e.path()).collect();
            kept.sort();
            let kept: Vec<_> = kept.iter().map(|p| std::fs::read(p).expect("read")).collect();
            assert!(kept == [main, log], "{what}: both, to the byte, for whoever can still read them");
            drop(writer);
        }
    }

    #[test]
    fn rows_in_a_log_that_was_not_deleted_with_its_database_are_not_lost() {
        let dir = tempfile::tempdir().expect("dir");
        let node = node_at(dir.path());
        let path = node.state_db();
        let writer = state_db(&path, Some("the-device"), 7);
        writer.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).expect("checkpoint");
        // Committed, and in the log alone.
        for n in 0..5 {
            let sql = "INSERT INTO device_pairing_paired VALUES (?1)";
            writer.execute(sql, [format!("late-{n}")]).expect("insert");
        }
        // `rm openclaw.sqlite`: the log and its index keep their names.
        std::fs::remove_file(&path).expect("rm");
        assert!(beside(&path, "-wal").metadata().expect("the log").len() > 0);
        let us = ProcessId::current().expect("us");
        let saved = from_open_files(&node, us, &dir.path().join("saved")).expect("salvage");
        let identity = saved[0].identity.clone().expect("identity");
        assert_eq!(identity.counts.paired, 12, "7 from the main file, 5 from its log");
        drop(writer);
    }

    #[test]
    fn a_state_directory_behind_a_link_is_the_same() {
        let dir = tempfile::tempdir().expect("dir");
        let mut node = node_at(dir.path());
        let real = node.state_dir.clone();
        let writer = state_db(&node.state_db(), Some("the-device"), 7);
        node.state_dir = dir.path().join("link");
        std::os::unix::fs::symlink(&real, &node.state_dir).expect("link");
        for suffix in ["", "-wal", "-shm"] {
            std::fs::remove_file(beside(&node.state_db(), suffix)).expect("rm");
        }
        let us = ProcessId::current().expect("us");
        let saved = from_open_files(&node, us, &dir.path().join("saved")).expect("salvage");
        assert_eq!(saved.len(), 1, "{saved:?}");
        assert_eq!(saved[0].original, crate::roots::resolved(&node.state_db()));
        drop(writer);
    }

    #[test]
    fn a_damaged_one_is_kept_as_it_is() {
        let dir = tempfile::tempdir().expect("dir");
        let node = node_at(dir.path());
        let path = node.state_db();
        std::fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
        let bytes =
            b"SQLite format 3\0 and then nothing that SQLite would read, but somebody might".repeat(64);
        std::fs::write(&path, &bytes).expect("write");
        let held = File::open(&path).expect("open");
        std::fs::remove_file(&path).expect("rm");
        let dest = dir.path().join("saved");
        let us = ProcessId::current().expect("us");
        assert_eq!(from_open_files(&node, us, &dest).expect("salvage"), []);
        let kept: Vec<_> = std::fs::read_dir(&dest).expect("dir").flatten().map(|e| e.path()).collect();
        assert_eq!(kept.len(), 1, "{kept:?}");
        assert_eq!(std::fs::read(&kept[0]).expect("read"), bytes);
        drop(held);
    }

    #[test]
    fn nothing_deleted_is_nothing_salvaged() {
        let dir = tempfile::tempdir().expect("dir");
        let node = node_at(dir.path());
        let writer = state_db(&node.state_db(), Some("x"), 1);
        let us = ProcessId::current().expect("us");
        assert_eq!(from_open_files(&node, us, dir.path()).expect("salvage"), []);
        drop(writer);
    }

    #[test]
    fn another_users_process_is_not_read() {
        let dir = tempfile::tempdir().expect("dir");
        let mut node = node_at(dir.path());
        node.ids.uid = node.ids.uid.wrapping_add(1);
        let us = ProcessId::current().expect("us");
        assert_eq!(from_open_files(&node, us, dir.path()).map_err(|e| e.kind), Err(Kind::Denied));
    }
}
