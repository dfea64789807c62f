//! Room on a full disk that costs nobody anything: what of the node's is made anew by itself, and logs.
//!
//! All of it is done as the node's user: nothing is removed that he could not remove, and no link of his leads further
//! than he could go himself.

use host::user::as_user;
use host::{Context, Result};
use node::Node;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A log of today that is smaller than this is worth more to whoever looks for the cause than its room.
const LOG_KEPT_BYTES: u64 = 16 << 20;
/// A log that nobody has written for this long is an old one.
const LOG_OLD_S: i64 = 24 * 3600;

/// Something that may go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spare {
    /// In words.
    pub what: &'static str,
    /// Where it lies.
    pub path: PathBuf,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// All of it is made anew when it is wanted.
    Cache,
    /// Old ones go, a large one of today is emptied: who writes it goes on at its end.
    Logs,
}

/// What may go of a node's, what nobody will miss first.
#[must_use]
pub fn spares(node: &Node) -> Vec<Spare> {
    let mut all = vec![
        Spare { what: "npm's cache", path: node.home.join(".npm/_cacache"), kind: Kind::Cache },
        Spare { what: "OpenClaw's cache", path: node.state_dir.join("cache"), kind: Kind::Cache },
    ];
    let set_aside = node::roots::TRANSIENT.iter().filter(|name| node::roots::is_cache(name));
    all.extend(set_aside.map(|name| Spare {
        what: "what was set aside of OpenClaw's caches",
        path: node.state_dir.join(node::roots::aside(name)),
        kind: Kind::Cache,
    }));
    let logs = node::probe::log_dirs(node).into_iter().chain([node.state_dir.join("logs")]);
    all.extend(logs.map(|path| Spare { what: "OpenClaw's logs", path, kind: Kind::Logs }));
    all
}

/// Lets it go.
///
/// # Errors
/// When the node's user may not.
pub fn free(node: &Node, spare: &Spare) -> Result<()> {
    as_user(node.ids, || {
        let what = || format!("make room by {} in {}", spare.what, spare.path.display());
        match spare.kind {
            Kind::Cache => match std::fs::remove_dir_all(&spare.path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).context(what),
                Ok(()) | Err(_) => Ok(()),
            },
            Kind::Logs => logs(&spare.path).context(what),
        }
    })
}

fn logs(dir: &Path) -> std::io::Result<()> {
    /// A month of daily logs and their parts.
    const LOGS_LIMIT: usize = 512;
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries.flatten().take(LOGS_LIMIT) {
        let (path, name) = (entry.path(), entry.file_name());
        let Ok(meta) = path.symlink_metadata() else { continue };
        // Two names mean that somebody keeps it.
        if !meta.is_file() || meta.nlink() > 1 || !name.to_string_lossy().contains(".log") {
            continue;
        }
        if host::clock::wall().as_second() - meta.mtime() > LOG_OLD_S {
            std::fs::remove_file(&path)?;
        } else if meta.len() > LOG_KEPT_BYTES {
            let no_link = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
            std::fs::OpenOptions::new().write(true).custom_flags(no_link).open(&path)?.set_len(0)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_and_old_logs_go_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let node: Node = serde_json::from_value(serde_json::json!({
            "name": "t", "prefix": dir.path(), "package_dir": dir.path().join("p"), "entry": dir.path(),
            "node_bin": dir.path(), "home": dir.path(), "state_dir": state, "config_path": state.join("openclaw.json"),
            "port": 1, "ids": host::run::Ids::current(), "user": "t", "env": [["TMPDIR", dir.path()]]
        }))
        .unwrap();
        let file = |below: &str, bytes: u64| {
            let path = dir.path().join(below);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
            path
        };
        let old = file("state/logs/gateway.log.1", 10);
        std::fs::File::options().write(true).open(&old).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        let large = file("state/logs/gateway.log", LOG_KEPT_BYTES + 1);
        let stays = [
            file("state/logs/small.log", 10),
            file("state/logs/notes.txt", LOG_KEPT_BYTES + 1),
            file("state/workspace/MEMORY.md", 10),
            file("state/agents/main/sessions/x.jsonl.deleted.1", 10),
            file("state/credentials/x.json", 10),
            file(".npm/own", 10),
        ];
        // A log that is a link is somebody else's file.
        let others = file("others.log", LOG_KEPT_BYTES + 1);
        std::os::unix::fs::symlink(&others, state.join("logs/linked.log")).unwrap();
        let goes = [file("state/cache/x", 10), file(".npm/_cacache/x", 10)];
        for spare in spares(&node).iter().filter(|s| s.path.starts_with(dir.path())) {
            free(&node, spare).unwrap();
            free(&node, spare).unwrap();
        }
        assert!(stays.iter().all(|p| p.metadata().unwrap().len() >= 10));
        assert_eq!(others.metadata().unwrap().len(), LOG_KEPT_BYTES + 1);
        assert!(!old.exists() && goes.iter().all(|p| !p.exists()));
        assert_eq!(large.metadata().unwrap().len(), 0, "it is still there for whoever writes it");
    }
}
