//! Whether an npm or `openclaw update` is at work on this node, seen on disk and in `/proc`, never by a name.
//!
//! At work means: a staging directory beside the package that changed within the last minute, or a process of
//! another's than the gateway's own family with its working directory or an open file under the prefix's packages,
//! or the program's own offline maintenance holding the state lock. A leftover that nobody touches is not an update.

use crate::{Node, lock};
use host::process::{ProcessId, all_pids, descendants};
use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A staging directory that was touched within this time is being filled.
const STAGING_FRESH_MS: u64 = 60_000;
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
        let what = format!("{} (process {}) holds the node's state lock", holder.role, holder.id.pid);
        return Some(UpdateAtWork { what, progress: holder.id.stat().map_or(0, |s| s.cpu_ms) });
    }
    let staged = staging(node);
    let progress = staged.iter().map(|p| stamp(p)).fold(stamp(&node.package_dir), u64::wrapping_add);
    if let Some(dir) = staged.iter().find(|d| fresh(d)) {
        return Some(UpdateAtWork { what: format!("{} is being written to", dir.display()), progress });
    }
    let worker = worker(node, &ourselves())?;
    let cpu = worker.0.stat().map_or(0, |s| s.cpu_ms);
    Some(UpdateAtWork { what: worker.1, progress: progress.wrapping_add(cpu) })
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

/// A process outside of the gateway's family and of ours that works under the packages: in them, or with a file of them open
/// for writing.
fn worker(node: &Node, own: &HashSet<u32>) -> Option<(ProcessId, String)> {
    let packages = node.package_dir.parent()?.to_path_buf();
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
        let works = node.package_dir.clone();
        if id.cwd().is_some_and(|d| d.starts_with(&works) || is_under_staging(&d, &packages)) {
            return Some((id, format!("process {pid} works in {}", works.display())));
        }
        if let Some((_, file)) =
            id.open_files().into_iter().find(|(fd, f)| f.starts_with(&packages) && writes(pid, *fd))
        {
            return Some((id, format!("process {pid} writes {}", file.display())));
        }
    }
    None
}

fn is_under_staging(dir: &Path, packages: &Path) -> bool {
    let inner = dir.strip_prefix(packages).ok().and_then(|r| r.components().next());
    inner.is_some_and(|c| is_staging(&c.as_os_str().to_string_lossy(), "openclaw"))
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
    fn a_process_that_writes_under_the_packages_is_an_update() {
        let dir = tempfile::tempdir().expect("dir");
        let node = node_at(dir.path());
        std::fs::create_dir_all(&node.package_dir).expect("mkdir");
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .current_dir(&node.package_dir)
            .spawn()
            .expect("sleep");
        // Its working directory is set before exec, so it shows as soon as spawn returns.
        let seen = worker(&node, &HashSet::new());
        let ours = worker(&node, &ourselves());
        child.kill().expect("kill");
        #[allow(clippy::disallowed_methods)]
        child.wait().expect("reap");
        assert!(seen.is_some_and(|(id, what)| id.pid == child.id() && what.contains("works in")));
        assert_eq!(ours, None, "our own steps are no update");
    }
}
