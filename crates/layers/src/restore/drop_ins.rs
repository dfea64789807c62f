//! Drop-ins of the node's unit that no trusted snapshot knows. Where a start fails for no reason that shows, one of them may
//! be it: a heap limit, an option of Node's, an environment. They are set aside on trial, and go back if the climb fails.

use crate::{Bench, Report};
use engine::Class;
use host::{Context, Result, exchange, files};
use node::Node;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use store::SnapshotInfo;

/// A unit has few drop-ins, and a path has few bytes.
const LIST_LIMIT_BYTES: u64 = 1 << 20;
/// Drop-ins looked at.
const MOST: usize = 64;

fn dir(quarantine: &Path) -> PathBuf {
    quarantine.join("drop-ins")
}

/// Where those lie that were set aside, written before the first one moves.
fn list(quarantine: &Path) -> PathBuf {
    quarantine.join("drop-ins.list")
}

/// The drop-ins beside the unit's own file that none of these snapshots knows and that are not koboshi's.
fn unknown(node: &Node, trusted: &[SnapshotInfo]) -> Vec<PathBuf> {
    let Some(ours) = node::service::drop_in(node) else { return Vec::new() };
    let Some(dir) = ours.parent() else { return Vec::new() };
    let known = |path: &Path| {
        let roots = trusted.iter().flat_map(|info| &info.roots);
        roots.filter(|r| r.class == Class::Service).any(|r| r.path == node::roots::resolved(path))
    };
    let mut found: Vec<PathBuf> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .take(MOST)
        .map(|e| e.path())
        .filter(|p| {
            p.extension() == Some(OsStr::new("conf")) && p.symlink_metadata().is_ok_and(|m| m.is_file())
        })
        .filter(|p| *p != ours && !known(p))
        .collect();
    found.sort();
    found
}

/// Sets them aside; how many. Nothing where no trusted snapshot says what belongs there.
pub(super) fn aside(bench: &Bench<'_>, trusted: &[SnapshotInfo], report: &mut Report) -> Result<usize> {
    let with_service = trusted.iter().any(|i| i.classes.contains_key(&Class::Service));
    if !with_service {
        return Ok(0);
    }
    let found = unknown(bench.node, trusted);
    if found.is_empty() {
        return Ok(0);
    }
    let lines: Vec<&[u8]> = found.iter().map(|p| p.as_os_str().as_bytes()).collect();
    files::make_private_dir(&bench.quarantine)?;
    let mut all = files::read_bounded(&list(&bench.quarantine), LIST_LIMIT_BYTES).unwrap_or_default();
    all.extend(lines.join(&0));
    all.push(0);
    files::write_atomic(&list(&bench.quarantine), &all, 0o600)?;
    for path in &found {
        let to = exchange::move_aside(path, &dir(&bench.quarantine))?;
        report.did(format!(
            "{}, which no snapshot knows, was set aside on trial and lies in {}",
            path.display(),
            to.display()
        ));
    }
    Ok(found.len())
}

/// Whether some are set aside.
pub(crate) fn on(quarantine: &Path) -> bool {
    list(quarantine).exists()
}

/// It did not help: they go back to where they were, where nothing came in their place.
pub(crate) fn back(quarantine: &Path, report: &mut Report) -> Result<()> {
    let listed = files::read_bounded(&list(quarantine), LIST_LIMIT_BYTES)?;
    for path in listed.split(|b| *b == 0).filter(|p| !p.is_empty()).map(|p| Path::new(OsStr::from_bytes(p))) {
        let Some(kept) = path.file_name().map(|name| dir(quarantine).join(name)) else { continue };
        if kept.symlink_metadata().is_err() || path.symlink_metadata().is_ok() {
            continue;
        }
        let Some(parent) = path.parent() else { continue };
        std::fs::create_dir_all(parent).context(|| format!("make {}", parent.display()))?;
        exchange::move_aside(&kept, parent)?;
        report.did(format!("{} is back: it was not the reason", path.display()));
    }
    let what = || "end the trial of drop-ins".to_owned();
    std::fs::remove_file(list(quarantine)).context(what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nobody::Nobody;

    #[test]
    fn what_no_snapshot_knows_is_set_aside_and_goes_back() {
        let tmp = tempfile::tempdir().unwrap();
        let top = tmp.path().canonicalize().unwrap();
        let unit = top.join("systemd/openclaw-gateway.service");
        let beside = top.join("systemd/openclaw-gateway.service.d");
        std::fs::create_dir_all(&beside).unwrap();
        std::fs::write(&unit, "[Service]\n").unwrap();
        let node: Node = serde_json::from_value(serde_json::json!({
            "name": "t", "prefix": top, "package_dir": top.join("p"), "entry": top, "node_bin": top, "home": top,
            "state_dir": top.join("state"), "config_path": top.join("state/openclaw.json"), "port": 1,
            "ids": host::run::Ids::current(), "user": "t",
            "unit": {"name": "openclaw-gateway.service", "scope": "user", "files": [unit]}
        }))
        .unwrap();
        for name in ["50-known.conf", "60-new.conf", "95-koboshi-program.conf", "notes"] {
            std::fs::write(beside.join(name), name).unwrap();
        }
        let info = |roots: serde_json::Value, class: &str| -> SnapshotInfo {
            serde_json::from_value(serde_json::json!({
                "id": "1", "number": 1, "taken": "2026-01-02T00:00:00Z", "note": "", "version": null, "roots": roots,
                "classes": {class: {"taken": "2026-01-02T00:00:00Z", "files": 1, "bytes": 1}}, "trust": "good",
                "node": null, "baseline": {}
            }))
            .unwrap()
        };
        let mut manager = Nobody;
        let bench = Bench {
            limits: engine::Limits::default(),
            node: &node,
            manager: &mut manager,
            store: None,
            baseline: None,
            quarantine: top.join("quarantine/00000001"),
            spares: Vec::new(),
            deadline: host::clock::Deadline::after(std::time::Duration::from_secs(30)),
        };
        let mut report = Report::default();
        let nothing = info(serde_json::json!([]), "program");
        assert_eq!(
            aside(&bench, &[nothing], &mut report).unwrap(),
            0,
            "a snapshot without service files knows nothing"
        );
        let known = info(
            serde_json::json!([{"name": "service-1", "path": beside.join("50-known.conf"), "class": "service"}]),
            "service",
        );
        assert_eq!(aside(&bench, std::slice::from_ref(&known), &mut report).unwrap(), 1);
        assert!(!beside.join("60-new.conf").exists() && on(&bench.quarantine), "{report:?}");
        assert!(
            ["50-known.conf", "95-koboshi-program.conf", "notes"].iter().all(|n| beside.join(n).exists())
        );
        assert_eq!(aside(&bench, &[known], &mut report).unwrap(), 0, "once");
        back(&bench.quarantine, &mut report).unwrap();
        assert_eq!(std::fs::read_to_string(beside.join("60-new.conf")).unwrap(), "60-new.conf");
        assert!(!on(&bench.quarantine));
    }
}
