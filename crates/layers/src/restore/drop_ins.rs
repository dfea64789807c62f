//! Drop-ins of the node's unit that no trusted snapshot knows. Where a start fails for no reason that shows, one of them may
//! be it: a heap limit, an option of Node's, an environment. They are set aside on trial, and go back if the climb fails.
//!
//! Where a unit is its user's, its directory is too: all that is read, removed and written there is done as that user, and
//! the quarantine holds a copy of the bytes. Nothing is ever moved by path between what is his and what is root's: whatever
//! he makes of the directory meanwhile leads nowhere that he could not go alone.

use crate::{Bench, Report};
use engine::Class;
use host::run::Ids;
use host::user::as_user;
use host::{Context, Error, Kind, Result, files};
use node::{Node, Scope};
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use store::SnapshotInfo;

/// A unit has few drop-ins, and a path has few bytes.
const LIST_LIMIT_BYTES: u64 = 1 << 20;
/// systemd reads no longer ones with pleasure either.
const DROP_IN_LIMIT_BYTES: u64 = 1 << 20;
/// Drop-ins looked at.
const MOST: usize = 64;

/// One that was set aside.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Kept {
    /// Where it lay, as bytes: a path need not be text.
    path: Vec<u8>,
    /// Its name in the quarantine, which no other one ever had.
    name: String,
    mode: u32,
}

fn dir(quarantine: &Path) -> PathBuf {
    quarantine.join("drop-ins")
}

/// What was set aside and from where, written before the first one goes.
fn list(quarantine: &Path) -> PathBuf {
    quarantine.join("drop-ins.list")
}

fn listed(quarantine: &Path) -> Result<Vec<Kept>> {
    let path = list(quarantine);
    let bytes = files::read_bounded(&path, LIST_LIMIT_BYTES)?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::new(Kind::Corrupt, format!("read {}", path.display()), e.to_string()))
}

/// Who may do there what is to be done.
fn ids(node: &Node) -> Ids {
    match node.unit.as_ref().map(|unit| unit.scope) {
        Some(Scope::User) => node.ids,
        Some(Scope::System) | None => Ids::current(),
    }
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

/// The bytes and the mode of a plain file.
fn read(path: &Path) -> Result<(Vec<u8>, u32)> {
    let what = || format!("read {}", path.display());
    let no_link = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(no_link.bits().cast_signed())
        .open(path)
        .context(what)?;
    let meta = file.metadata().context(what)?;
    if !meta.is_file() || meta.len() > DROP_IN_LIMIT_BYTES {
        return Err(Error::new(Kind::Corrupt, what(), "it is no drop-in: not a file, or over 1 MB"));
    }
    let mut bytes = Vec::new();
    file.take(DROP_IN_LIMIT_BYTES).read_to_end(&mut bytes).context(what)?;
    Ok((bytes, meta.permissions().mode() & 0o777))
}

/// Sets them aside; how many. Nothing where no trusted snapshot says what belongs there.
pub(super) fn aside(bench: &Bench<'_>, trusted: &[SnapshotInfo], report: &mut Report) -> Result<usize> {
    let with_service = trusted.iter().any(|i| i.classes.contains_key(&Class::Service));
    if !with_service {
        return Ok(0);
    }
    let ids = ids(bench.node);
    let found = as_user(ids, || Ok(unknown(bench.node, trusted)))?;
    if found.is_empty() {
        return Ok(0);
    }
    let kept = dir(&bench.quarantine);
    files::make_private_dir(&bench.quarantine)?;
    files::make_private_dir(&kept)?;
    let mut all = if on(&bench.quarantine) { listed(&bench.quarantine)? } else { Vec::new() };
    let mut moved = 0;
    for path in &found {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let free = |name: &String| kept.join(name).symlink_metadata().is_err();
        let name = (0_u32..).map(|n| format!("{n}-{file}")).find(free).unwrap_or_default();
        let one = (|| {
            let (bytes, mode) = as_user(ids, || read(path))?;
            files::write_atomic(&kept.join(&name), &bytes, 0o600)?;
            all.push(Kept { path: path.as_os_str().as_bytes().to_vec(), name: name.clone(), mode });
            let text = serde_json::to_vec(&all).unwrap_or_default();
            files::write_atomic(&list(&bench.quarantine), &text, 0o600)?;
            as_user(ids, || std::fs::remove_file(path).context(|| format!("set {} aside", path.display())))
        })();
        match one {
            Ok(()) => {
                moved += 1;
                report.did(format!(
                    "{}, which no snapshot knows, was set aside on trial and lies in {}",
                    path.display(),
                    kept.join(&name).display()
                ));
            }
            // Where koboshi may not write it stays, and keeps nothing else from coming back.
            Err(e) => report.could_not(e.to_string()),
        }
    }
    Ok(moved)
}

/// Whether some are set aside.
pub(crate) fn on(quarantine: &Path) -> bool {
    list(quarantine).exists()
}

/// It did not help: they go back to where they were, where nothing came in their place. What cannot go back is named and
/// stays where it is kept.
pub(crate) fn back(node: &Node, quarantine: &Path, report: &mut Report) -> Result<()> {
    let ids = ids(node);
    for one in listed(quarantine)? {
        let path = Path::new(OsStr::from_bytes(&one.path));
        let kept = dir(quarantine).join(&one.name);
        let returned = files::read_bounded(&kept, DROP_IN_LIMIT_BYTES)
            .and_then(|bytes| as_user(ids, || put(path, &bytes, one.mode)));
        match returned {
            Ok(true) => report.did(format!("{} is back: it was not the reason", path.display())),
            Ok(false) => {}
            Err(e) => report.could_not(format!("{e}; it lies in {}", kept.display())),
        }
    }
    let what = || "end the trial of drop-ins".to_owned();
    std::fs::remove_file(list(quarantine)).context(what)
}

/// Writes it where nothing is. `false` where something is.
fn put(path: &Path, bytes: &[u8], mode: u32) -> Result<bool> {
    let what = || format!("put {} back", path.display());
    let Some(parent) = path.parent() else { return Ok(false) };
    if path.symlink_metadata().is_ok() {
        return Ok(false);
    }
    std::fs::create_dir_all(parent).context(what)?;
    // Beside it first: half of one is never read, and what came meanwhile is not written over.
    let tmp = parent.join(format!(".koboshi-{}-{}", std::process::id(), host::clock::now().ms));
    let written = (|| {
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&tmp)?;
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::hard_link(&tmp, path)
    })();
    let _ = std::fs::remove_file(&tmp);
    match written {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        other => other.context(what).map(|()| true),
    }
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
        back(&node, &bench.quarantine, &mut report).unwrap();
        assert_eq!(std::fs::read_to_string(beside.join("60-new.conf")).unwrap(), "60-new.conf");
        assert!(!on(&bench.quarantine));

        // Another one of the same name is another one: what goes back is what was set aside last.
        std::fs::remove_file(beside.join("60-new.conf")).unwrap();
        std::fs::write(beside.join("60-new.conf"), "newer").unwrap();
        let known = info(
            serde_json::json!([{"name": "service-1", "path": beside.join("50-known.conf"), "class": "service"}]),
            "service",
        );
        assert_eq!(aside(&bench, std::slice::from_ref(&known), &mut report).unwrap(), 1);
        back(&node, &bench.quarantine, &mut report).unwrap();
        assert_eq!(std::fs::read_to_string(beside.join("60-new.conf")).unwrap(), "newer");

        // And what its owner wrote in the meantime stays.
        assert_eq!(aside(&bench, &[known], &mut report).unwrap(), 1);
        std::fs::write(beside.join("60-new.conf"), "newest").unwrap();
        back(&node, &bench.quarantine, &mut report).unwrap();
        assert_eq!(std::fs::read_to_string(beside.join("60-new.conf")).unwrap(), "newest");
    }

    /// A user who makes a link of his unit's directory while root works for him.
    #[test]
    fn a_link_in_the_place_of_the_directory_leads_root_nowhere_as_root() {
        use std::os::unix::fs::{chown, symlink};
        if Ids::current().uid != 0 {
            return;
        }
        let tmp = tempfile::tempdir().unwrap();
        std::fs::set_permissions(tmp.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let top = tmp.path().canonicalize().unwrap();
        let (home, roots, quarantine) = (top.join("home"), top.join("etc"), top.join("quarantine"));
        let beside = home.join("openclaw-gateway.service.d");
        std::fs::create_dir_all(&beside).unwrap();
        std::fs::create_dir_all(&roots).unwrap();
        std::fs::write(roots.join("roots.conf"), "root's").unwrap();
        std::fs::write(beside.join("60-new.conf"), "user's").unwrap();
        for path in [&home, &beside, &beside.join("60-new.conf")] {
            chown(path, Some(65_534), Some(65_534)).unwrap();
        }
        let node: Node = serde_json::from_value(serde_json::json!({
            "name": "t", "prefix": top, "package_dir": top.join("p"), "entry": top, "node_bin": top, "home": home,
            "state_dir": home.join("state"), "config_path": home.join("state/openclaw.json"), "port": 1,
            "ids": {"uid": 65_534, "gid": 65_534}, "user": "t",
            "unit": {"name": "openclaw-gateway.service", "scope": "user",
                     "files": [home.join("openclaw-gateway.service")]}
        }))
        .unwrap();
        let info: SnapshotInfo = serde_json::from_value(serde_json::json!({
            "id": "1", "number": 1, "taken": "2026-01-02T00:00:00Z", "note": "", "version": null, "roots": [],
            "classes": {"service": {"taken": "2026-01-02T00:00:00Z", "files": 1, "bytes": 1}}, "trust": "good",
            "node": null, "baseline": {}
        }))
        .unwrap();
        let mut manager = Nobody;
        let bench = Bench {
            limits: engine::Limits::default(),
            node: &node,
            manager: &mut manager,
            store: None,
            baseline: None,
            quarantine: quarantine.join("00000001"),
            spares: Vec::new(),
            deadline: host::clock::Deadline::after(std::time::Duration::from_secs(30)),
        };
        let mut report = Report::default();
        assert_eq!(aside(&bench, std::slice::from_ref(&info), &mut report).unwrap(), 1, "{report:?}");
        let linked = || {
            let _ = std::fs::remove_dir_all(&beside);
            let _ = std::fs::remove_file(&beside);
            symlink(&roots, &beside).unwrap();
        };
        linked();
        back(&node, &bench.quarantine, &mut report).unwrap();
        assert_eq!(
            std::fs::read_dir(&roots).unwrap().count(),
            1,
            "nothing of the user's came into root's place"
        );
        assert!(report.undone.iter().any(|line| line.contains("60-new.conf")), "{report:?}");
        assert_eq!(aside(&bench, &[info], &mut report).unwrap(), 0, "{report:?}");
        assert_eq!(std::fs::read_to_string(roots.join("roots.conf")).unwrap(), "root's");
    }
}
