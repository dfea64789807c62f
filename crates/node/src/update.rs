//! Whether an npm or `openclaw update` is at work on this node, seen on disk and in `/proc`, never by a name.
//!
//! At work means: a staging directory beside the package that changed within the last minute, or a process of
//! another's than the gateway's own family that has a file of the package or of its staging open for writing, or one that
//! works in them while such a staging directory lies there, or the program's own offline maintenance holding the state
//! lock. A leftover that nobody touches is not an update; nor is a shell that somebody left in the program's directory,
//! nor work on another package beside it, nor a file that somebody has kept open for longer than any install takes.

use crate::{Node, lock};
use host::process::{ProcessId, all_pids, descendants};
use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A staging directory that was touched within this time is being filled.
const STAGING_FRESH_MS: u64 = 60_000;
/// No install takes longer: a staging directory untouched for this long is a leftover, whoever stands in it, and who has
/// kept an older file open for longer than this installs nothing.
const INSTALL_MOST_MS: u64 = 1_800_000;
/// Entries of `node_modules` that are looked at.
const ENTRIES_LIMIT: usize = 8_192;
/// Directories of a staging tree whose times are looked at for progress.
const DIRS_LIMIT: usize = 512;

/// An update at work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdateAtWork {
    /// What was seen, in words.
    pub what: String,
    /// Changes whenever files of the update moved.
    pub progress: u64,
}

/// In words, what update is at work, if any.
#[must_use]
pub fn at_work(node: &Node) -> Option<String> {
    look(node).map(|u| u.what)
}

/// The same with its progress.
#[must_use]
pub fn look(node: &Node) -> Option<UpdateAtWork> {
    if let Some(holder) = lock::other_holder(node) {
        return Some(UpdateAtWork {
            what: held(&holder),
            progress: holder.id.stat().map_or(0, |s| s.cpu_ms),
        });
    }
    let staged = staging(node);
    let progress = staged.iter().map(|p| stamp(p)).fold(stamp(&node.package_dir), u64::wrapping_add);
    if let Some(dir) = staged.iter().find(|d| fresh(d)) {
        return Some(UpdateAtWork { what: format!("{} is being written to", dir.display()), progress });
    }
    let installing = staged.iter().any(|d| changed_ms(d).is_some_and(|ms| ms < INSTALL_MOST_MS));
    let worker = worker(node, &ourselves(), installing)?;
    let cpu = worker.0.stat().map_or(0, |s| s.cpu_ms);
    Some(UpdateAtWork { what: worker.1, progress: progress.wrapping_add(cpu) })
}

/// In words, the offline maintenance that is at work on the state itself, if any: an update of the program leaves state
/// alone until it starts it.
#[must_use]
pub fn of_state(node: &Node) -> Option<String> {
    lock::other_holder(node).as_ref().map(held)
}

fn held(holder: &lock::OtherHolder) -> String {
    format!("{} (process {}) holds the node's state lock", holder.role, holder.id.pid)
}

/// The staging directories beside the package, fresh or left over: npm's `.openclaw-XXXXXXXX`, the program's own.
#[must_use]
pub fn staging(node: &Node) -> Vec<PathBuf> {
    let Some(parent) = node.package_dir.parent() else { return Vec::new() };
    let Some(name) = node.package_dir.file_name().map(|n| n.to_string_lossy().into_owned()) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = std::fs::read_dir(parent)
        .into_iter()
        .flatten()
        .flatten()
        .take(ENTRIES_LIMIT)
        .filter(|e| is_staging(&e.file_name().to_string_lossy(), &name))
        .map(|e| e.path())
        .collect();
    found.sort();
    found
}

/// npm's name is a dot, the package, a dash and eight letters or digits; the program keeps backups of its own.
fn is_staging(entry: &str, package: &str) -> bool {
    let rest = entry.strip_prefix('.').and_then(|e| e.strip_prefix(package));
    let npm = rest
        .and_then(|r| r.strip_prefix('-'))
        .is_some_and(|h| h.len() == 8 && h.chars().all(|c| c.is_ascii_alphanumeric()));
    npm || rest.is_some_and(|r| r.starts_with(".package-backup-"))
}

fn changed_ms(path: &Path) -> Option<u64> {
    let meta = std::fs::symlink_metadata(path).ok()?;
    let changed = meta.ctime().max(meta.mtime());
    let now = host::clock::wall().as_millisecond();
    u64::try_from(now.saturating_sub(changed.saturating_mul(1000))).ok()
}

/// npm's rename of the old tree marks it, and filling the new one takes less than the minute.
fn fresh(dir: &Path) -> bool {
    changed_ms(dir).is_some_and(|ms| ms < STAGING_FRESH_MS)
}

/// A number that changes as directories of a tree do; bounded, breadth first.
fn stamp(dir: &Path) -> u64 {
    let mut sum = 0_u64;
    let mut queue = vec![dir.to_path_buf()];
    let mut seen = 0;
    while let Some(at) = queue.pop() {
        let Ok(meta) = std::fs::symlink_metadata(&at) else { continue };
        let time = u64::try_from(meta.mtime()).unwrap_or(0).wrapping_mul(1_000_003);
        sum = sum.wrapping_add(time).wrapping_add(u64::try_from(meta.mtime_nsec()).unwrap_or(0));
        seen += 1;
        if seen >= DIRS_LIMIT || !meta.is_dir() {
            continue;
        }
        let inner = std::fs::read_dir(&at).into_iter().flatten().flatten().take(DIRS_LIMIT);
        queue.extend(inner.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
    sum
}

/// Our own steps work on the program too, and are no update.
fn ourselves() -> HashSet<u32> {
    let us = std::process::id();
    descendants(us).iter().map(|d| d.pid).chain([us]).collect()
}

/// A process outside of the gateway's family and of ours that works on the package: with a file of it or of its staging
/// open for writing or, while something is `installing`, from within them (a lifecycle script writes elsewhere for long).
fn worker(node: &Node, own: &HashSet<u32>, installing: bool) -> Option<(ProcessId, String)> {
    let mut family = own.clone();
    if let Some(gateway) = lock::read(node).map(|l| l.id).filter(|id| id.alive()) {
        family.insert(gateway.pid);
        family.extend(descendants(gateway.pid).iter().map(|d| d.pid));
    }
    for pid in all_pids() {
        if family.contains(&pid) {
            continue;
        }
        let Some(id) = ProcessId::of(pid) else { continue };
        if installing && id.cwd().is_some_and(|d| is_of_package(node, &d)) {
            return Some((id, format!("process {pid} works in {}", node.package_dir.display())));
        }
        if let Some((_, file)) = id
            .open_files()
            .into_iter()
            .find(|(fd, f)| is_of_package(node, f) && writes(pid, *fd) && is_new(id, f))
        {
            return Some((id, format!("process {pid} writes {}", file.display())));
        }
    }
    None
}

/// Whether this writer or what it writes is young enough for an install. A log that was once directed into the program's
/// directory is written for ever, by a process as old.
fn is_new(writer: ProcessId, file: &Path) -> bool {
    /// `/proc/PID/stat` counts in hundredths of a second since boot.
    const MS_PER_TICK: u64 = 10;
    let runs_ms = host::clock::now().ms.saturating_sub(writer.start_ticks.saturating_mul(MS_PER_TICK));
    let made = std::fs::symlink_metadata(file).and_then(|m| m.created()).ok();
    let age = made.and_then(|t| t.elapsed().ok()).and_then(|age| u64::try_from(age.as_millis()).ok());
    may_install(runs_ms, age)
}

fn may_install(runs_ms: u64, file_age_ms: Option<u64>) -> bool {
    runs_ms < INSTALL_MOST_MS || file_age_ms.is_some_and(|ms| ms < INSTALL_MOST_MS)
}

/// Whether a path lies in the package itself or in its staging.
fn is_of_package(node: &Node, path: &Path) -> bool {
    if path.starts_with(&node.package_dir) {
        return true;
    }
    let (Some(packages), Some(name)) = (node.package_dir.parent(), node.package_dir.file_name()) else {
        return false;
    };
    let inner = path.strip_prefix(packages).ok().and_then(|r| r.components().next());
    inner.is_some_and(|c| is_staging(&c.as_os_str().to_string_lossy(), &name.to_string_lossy()))
}

/// Whether a descriptor is open for writing: the last octal digit of its flags is the access mode.
fn writes(pid: u32, fd: i32) -> bool {
    let info = PathBuf::from(format!("/proc/{pid}/fdinfo/{fd}"));
    let text = std::fs::read_to_string(info).unwrap_or_default();
    let flags = text.lines().find_map(|l| l.strip_prefix("flags:"));
    flags.and_then(|f| u32::from_str_radix(f.trim(), 8).ok()).is_some_and(|f| f & 0o3 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::find::tests::node_at;

    #[test]
    fn staging_names_are_exact() {
        for (name, want) in [
            (".openclaw-aB3dE5gH", true),
            (".openclaw-aB3dE5g", false),
            (".openclaw-aB3dE5gH9", false),
            (".openclaw-aB3dE5g_", false),
            ("openclaw-aB3dE5gH", false),
            (".other-aB3dE5gH", false),
            (".openclaw.package-backup-1", true),
        ] {
            assert_eq!(is_staging(name, "openclaw"), want, "{name}");
        }
    }

    #[test]
    fn a_fresh_staging_directory_is_an_update_and_an_old_one_is_not() {
        let dir = tempfile::tempdir().expect("dir");
        let node = node_at(dir.path());
        std::fs::create_dir_all(&node.package_dir).expect("mkdir");
        assert_eq!(look(&node), None);
        let stage = node.package_dir.with_file_name(".openclaw-aB3dE5gH");
        std::fs::create_dir(&stage).expect("mkdir");
        let update = look(&node).expect("an update");
        assert!(update.what.contains(".openclaw-aB3dE5gH"), "{}", update.what);
        std::fs::create_dir(stage.join("more")).expect("mkdir");
        assert_ne!(look(&node).expect("an update").progress, update.progress);
    }

    #[test]
    fn an_old_process_with_an_old_file_open_installs_nothing() {
        let (young, old) = (INSTALL_MOST_MS - 1, INSTALL_MOST_MS);
        assert!(may_install(young, None) && may_install(young, Some(old)));
        assert!(may_install(old, Some(young)), "a daemon that has just begun to fetch");
        assert!(!may_install(old, Some(old)) && !may_install(old, None));
    }

    /// A process with this working directory, and with its output in this file.
    fn somebody(cwd: &Path, out: Option<&Path>) -> Ended {
        let mut command = std::process::Command::new("sleep");
        command.arg("60").current_dir(cwd);
        if let Some(out) = out {
            command.stdout(std::fs::File::create(out).expect("file"));
        }
        // Both are set before exec, so they show as soon as spawn returns.
        Ended(command.spawn().expect("sleep"))
    }

    struct Ended(std::process::Child);

    impl Drop for Ended {
        #[allow(clippy::disallowed_methods, reason = "a killed child is reaped at once")]
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn who_writes_the_package_or_its_staging_is_an_update_and_who_only_stands_there_is_not() {
        let dir = tempfile::tempdir().expect("dir");
        let node = node_at(dir.path());
        std::fs::create_dir_all(&node.package_dir).expect("mkdir");
        let beside = node.package_dir.with_file_name("other");
        std::fs::create_dir_all(&beside).expect("mkdir");
        let stage = node.package_dir.with_file_name(".openclaw-aB3dE5gH");
        let seen = || worker(&node, &HashSet::new(), false).map(|(id, what)| (id.pid, what));

        let shell = somebody(&node.package_dir, None);
        assert_eq!(seen(), None, "a shell that was left there");
        let works = worker(&node, &HashSet::new(), true);
        assert!(works.is_some_and(|(id, what)| id.pid == shell.0.id() && what.contains("works in")));
        drop(shell);

        let other = somebody(dir.path(), Some(&beside.join("log")));
        assert_eq!(seen(), None, "another package's work");
        drop(other);

        let npm = somebody(dir.path(), Some(&node.package_dir.join("index.js")));
        assert!(seen().is_some_and(|(pid, what)| pid == npm.0.id() && what.contains("writes")));
        assert_eq!(worker(&node, &ourselves(), true), None, "our own steps are no update");
        drop(npm);

        std::fs::create_dir(&stage).expect("mkdir");
        let npm = somebody(dir.path(), Some(&stage.join("index.js")));
        assert!(seen().is_some_and(|(pid, what)| pid == npm.0.id() && what.contains("writes")));
    }
}
