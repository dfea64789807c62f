//! Gives files of the state directory back to the node's user: a single `sudo openclaw` leaves databases and a config that
//! root owns, a `chmod` too many keeps him out of his own, a `chattr +i` keeps everybody from writing, and the gateway
//! cannot start with them.
//!
//! Only what the look at the disk names, beneath a state directory that is the user's own; as himself only his own modes.
//! That directory belongs to somebody who may be hostile: no link is followed anywhere beneath it, nothing on another file
//! system, no file with a second name, nothing that runs with its owner's rights, and no socket or device is given away, and
//! only what root owns: what belongs to a third is his. Who owned what, with which mode, is written to the quarantine before
//! anything changes.

use crate::{Bench, Report};
use host::{Context, Error, Kind, Result, files};
use node::Node;
use node::triage::Foreign;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// Files given back in one go; the look names a handful, and three for each agent.
const MOST: usize = 1_000;
/// The list in the quarantine.
const LIST: &str = "owners.json";
const LIST_LIMIT_BYTES: u64 = 4 << 20;

/// Each round makes what lies below it visible: a directory that its user may not enter hides all of it.
const ROUNDS: usize = 4;

/// Who owned a file before, and with which mode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Before {
    path: PathBuf,
    uid: u32,
    gid: u32,
    #[serde(default)]
    mode: u32,
}

/// What keeps the user out of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    /// It is root's.
    Owner,
    /// It is his own, and its mode does not let him.
    Mode,
    /// Nobody may change it.
    Attribute,
}

/// Gives back what the node's user may not use: by owner, by mode, by an attribute that makes it immutable. What cannot be
/// given back is said, and keeps nothing else from it.
pub(crate) fn give_back(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let mut seen = BTreeSet::new();
    for _ in 0..ROUNDS {
        let mut named = node::triage::foreign(bench.node);
        named.retain(|f| seen.insert((f.path.clone(), f.immutable)));
        named.truncate(MOST);
        if named.is_empty() {
            break;
        }
        give(bench, &named, report)?;
    }
    Ok(())
}

fn give(bench: &Bench<'_>, named: &[Foreign], report: &mut Report) -> Result<()> {
    let node = bench.node;
    let root = rustix::process::geteuid().is_root();
    let top = match open_top(node) {
        Ok(top) => top,
        Err(e) => {
            report.could_not(e.to_string());
            return Ok(());
        }
    };
    let (mut found, mut roots) = (Vec::new(), 0);
    for foreign in named {
        match open_to_give(node, &top, foreign) {
            Ok((_, Kept::Owner | Kept::Attribute, _)) if !root => roots += 1,
            Ok(one) => found.push(one),
            Err(e) => report.could_not(e.to_string()),
        }
    }
    if roots > 0 {
        report.could_not(format!(
            "{roots} files that {} may not use are for root alone to give back (sudo chown, sudo chattr -i)",
            node.user
        ));
    }
    if found.is_empty() {
        return Ok(());
    }
    write_down(&bench.quarantine, found.iter().map(|(_, _, before)| before.clone()))?;
    for (fd, kept, before) in found {
        match free(node, &fd, kept, &before) {
            Ok(how) => report.did(format!("{} {how}", before.path.display())),
            Err(e) => report.could_not(e.to_string()),
        }
    }
    Ok(())
}

/// Lets the user in; what was done, in words.
fn free(node: &Node, fd: &OwnedFd, kept: Kept, before: &Before) -> Result<String> {
    let what = || format!("give {} back to {}", before.path.display(), node.user);
    match kept {
        Kept::Attribute if host::immutable::lift_handle(fd) => Ok("can be changed again".to_owned()),
        Kept::Attribute => Err(Error::new(Kind::Denied, what(), "its attributes cannot be changed")),
        Kept::Owner => {
            let (uid, gid) = (Uid::from_raw(node.ids.uid), Gid::from_raw(node.ids.gid));
            rustix::fs::chownat(fd, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH).context(what)?;
            Ok(format!("belongs to {} again (it belonged to {}:{})", node.user, before.uid, before.gid))
        }
        Kept::Mode => {
            let directory = FileType::from_raw_mode(before.mode) == FileType::Directory;
            let mode = before.mode & 0o7777 | if directory { 0o700 } else { 0o600 };
            // A handle has no way to change a mode on kernels before 6.6 but this one.
            let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
            rustix::fs::chmod(link, Mode::from_raw_mode(mode)).context(what)?;
            Ok(format!("lets {} in again (its mode was {:o})", node.user, before.mode & 0o7777))
        }
    }
}

/// The state directory, if it is the user's own: whatever lies in it is at a place of his.
fn open_top(node: &Node) -> Result<OwnedFd> {
    let what = || format!("give files of {} back to {}", node.state_dir.display(), node.user);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = rustix::fs::open(&node.state_dir, flags, Mode::empty()).context(what)?;
    let stat = rustix::fs::fstat(&top).context(what)?;
    if stat.st_uid != node.ids.uid {
        let why = format!("the directory itself belongs to {}", stat.st_uid);
        return Err(Error::new(Kind::Denied, what(), why).hint("whoever put it there gives it back: chown"));
    }
    Ok(top)
}

/// The file that is to be given back, opened, what keeps the user out of it, and who owns it.
fn open_to_give(node: &Node, top: &OwnedFd, foreign: &Foreign) -> Result<(OwnedFd, Kept, Before)> {
    let what = || format!("give {} back to {}", foreign.path.display(), node.user);
    let refuse = |why: &str| Err(Error::new(Kind::Denied, what(), why));
    let Ok(below) = foreign.path.strip_prefix(&node.state_dir) else {
        return refuse("it does not lie in the state directory");
    };
    let fd = open_below(top, below).context(what)?;
    let (stat, home) = (rustix::fs::fstat(&fd).context(what)?, rustix::fs::fstat(top).context(what)?);
    let kind = FileType::from_raw_mode(stat.st_mode);
    if stat.st_dev != home.st_dev {
        return refuse("it lies on another file system");
    }
    if kind != FileType::RegularFile && kind != FileType::Directory {
        return refuse("it is neither a file nor a directory");
    }
    if kind == FileType::RegularFile && (stat.st_nlink != 1 || stat.st_mode & 0o6111 != 0) {
        return refuse("it has another name elsewhere, or can be run");
    }
    let before =
        Before { path: foreign.path.clone(), uid: stat.st_uid, gid: stat.st_gid, mode: stat.st_mode };
    let his = stat.st_uid == node.ids.uid;
    if !his && stat.st_uid != 0 {
        return refuse("it belongs to somebody who is not root");
    }
    let kept = match (foreign.immutable, his) {
        (true, _) => Kept::Attribute,
        (false, true) => Kept::Mode,
        (false, false) => Kept::Owner,
    };
    Ok((fd, kept, before))
}

/// Opens one entry beneath a directory, for its attributes alone, following no link.
fn open_below(top: &OwnedFd, below: &Path) -> std::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut parts = below.components().peekable();
    let mut at: Option<OwnedFd> = None;
    while let Some(part) = parts.next() {
        let Component::Normal(part) = part else {
            return Err(std::io::Error::other("its path is not a plain one"));
        };
        let on_the_way = if parts.peek().is_some() { OFlags::DIRECTORY } else { OFlags::empty() };
        let next = rustix::fs::openat(at.as_ref().unwrap_or(top), part, flags | on_the_way, Mode::empty())?;
        at = Some(next);
    }
    // The directory itself.
    at.map_or_else(|| top.try_clone(), Ok)
}

/// Adds to the list of who owned what: a try that was killed in between has changed some of it already.
fn write_down(quarantine: &Path, more: impl Iterator<Item = Before>) -> Result<()> {
    let file = quarantine.join(LIST);
    let read = files::read_bounded(&file, LIST_LIMIT_BYTES).ok();
    let mut all: Vec<Before> = read.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
    for one in more {
        if !all.iter().any(|known| known.path == one.path) {
            all.push(one);
        }
    }
    let text = serde_json::to_vec_pretty(&all)
        .map_err(|e| Error::new(Kind::System, "write down who owned what", e))?;
    files::make_private_dir(quarantine)?;
    files::write_atomic(&file, &text, 0o600)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nobody::Nobody;
    use crate::restore;
    use engine::{Class, FaultKind, Finding};
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

    const USER: u32 = 65_534;

    fn node(dir: &Path) -> Node {
        let state = dir.join("state");
        std::fs::create_dir_all(state.join("state")).unwrap();
        serde_json::from_value(serde_json::json!({
            "name": "t", "prefix": dir, "package_dir": dir.join("p"), "entry": dir, "node_bin": dir, "home": dir,
            "state_dir": state, "config_path": state.join("openclaw.json"), "port": 1,
            "ids": {"uid": USER, "gid": USER, "groups": []}, "user": "nobody"
        }))
        .unwrap()
    }

    fn private(path: &Path) {
        std::fs::write(path, b"x").unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn owner(path: &Path) -> u32 {
        path.symlink_metadata().unwrap().uid()
    }

    /// Layer 1 with the one finding, as the agent calls it.
    fn work(node: &Node, dir: &Path) -> Report {
        let mut manager = Nobody;
        let mut bench = Bench {
            limits: engine::Limits::default(),
            node,
            manager: &mut manager,
            store: None,
            baseline: None,
            quarantine: dir.join("quarantine/00000001"),
            spares: Vec::new(),
            deadline: host::clock::Deadline::after(std::time::Duration::from_secs(30)),
        };
        let finding = Finding {
            kind: FaultKind::Permission,
            class: Some(Class::State),
            what: String::new(),
            evidence: Vec::new(),
        };
        restore::work(&mut bench, &[finding], false, false).unwrap()
    }

    #[test]
    fn what_sudo_left_is_given_back_and_nothing_else_as_root() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let state = node.state_dir.clone();
        let (db, wal) = (node.state_db(), state.join("state/openclaw.sqlite-wal"));
        private(&node.config_path);
        private(&db);
        // What is root's own elsewhere has no business here, by whatever name it came.
        let secret = dir.path().join("secret");
        private(&secret);
        std::fs::hard_link(&secret, &wal).unwrap();
        let elsewhere = dir.path().join("elsewhere");
        std::fs::create_dir(&elsewhere).unwrap();
        symlink(&elsewhere, state.join("credentials")).unwrap();
        // Of no concern to a start: named by nobody.
        private(&state.join("state/notes"));
        for path in [&state, &state.join("state")] {
            chown(path, Some(USER), Some(USER)).unwrap();
        }

        let report = work(&node, dir.path());
        assert_eq!((owner(&node.config_path), owner(&db)), (USER, USER), "{report:?}");
        for path in [&wal, &secret, &elsewhere, &state.join("state/notes"), &state.join("credentials")] {
            assert_eq!(owner(path), 0, "{}", path.display());
        }
        assert!(
            report.done.iter().any(|l| l.contains("openclaw.json belongs to nobody again")),
            "{report:?}"
        );
        assert!(report.undone.iter().any(|l| l.contains("another name elsewhere")), "{report:?}");
        let list = std::fs::read(dir.path().join("quarantine/00000001").join(LIST)).unwrap();
        let list: Vec<Before> = serde_json::from_slice(&list).unwrap();
        let was = Before { path: db, uid: 0, gid: 0, mode: 0o100_600 };
        assert!(list.contains(&was) && list.len() == 2, "{list:?}");

        // A directory of databases that root made, and a file of a third's.
        chown(state.join("state"), Some(0), Some(0)).unwrap();
        std::fs::set_permissions(state.join("state"), std::fs::Permissions::from_mode(0o700)).unwrap();
        chown(&node.config_path, Some(1), Some(1)).unwrap();
        work(&node, dir.path());
        assert_eq!((owner(&state.join("state")), owner(&node.config_path)), (USER, 1));

        // A whole state directory that is not his is nobody's to give away.
        chown(&state, Some(0), Some(0)).unwrap();
        chown(&node.config_path, Some(0), Some(0)).unwrap();
        let report = work(&node, dir.path());
        assert_eq!((owner(&state), owner(&node.config_path)), (0, 0));
        assert!(report.undone.iter().any(|l| l.contains("the directory itself belongs to 0")), "{report:?}");
    }

    #[test]
    fn what_is_his_own_lets_him_in_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut node = node(dir.path());
        let root = rustix::process::geteuid().is_root();
        if !root {
            node.ids = host::run::Ids::current();
        }
        let agent = node.state_dir.join("agents/main/agent");
        std::fs::create_dir_all(&agent).unwrap();
        let db = agent.join("openclaw-agent.sqlite");
        private(&db);
        private(&node.state_db());
        let all: Vec<PathBuf> = [&node.state_db(), &db]
            .into_iter()
            .flat_map(|p| p.ancestors().take_while(|a| a.starts_with(&node.state_dir)).map(Path::to_owned))
            .collect();
        for path in &all {
            if root {
                chown(path, Some(USER), Some(USER)).unwrap();
            }
        }
        // The deepest first: what is closed cannot be entered any more.
        for path in &all {
            let _ = std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o0));
        }
        let report = work(&node, dir.path());
        let mode = |p: &Path| p.symlink_metadata().unwrap().mode() & 0o7777;
        assert_eq!((mode(&node.state_dir), mode(&agent), mode(&db)), (0o700, 0o700, 0o600), "{report:?}");
        assert_eq!(mode(&node.state_db()), 0o600);
        assert!(
            report.done.iter().any(|l| l.contains("lets nobody in again (its mode was 0)")),
            "{report:?}"
        );
    }

    #[test]
    fn what_nobody_may_change_can_be_changed_again_as_root() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        // Where a tmpfs knows no such attribute.
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let node = node(dir.path());
        chown(&node.state_dir, Some(USER), Some(USER)).unwrap();
        chown(node.state_dir.join("state"), Some(USER), Some(USER)).unwrap();
        private(&node.state_db());
        let fd = std::fs::File::open(node.state_db()).unwrap();
        let fixed = rustix::fs::IFlags::IMMUTABLE;
        let now = rustix::fs::ioctl_getflags(&fd).unwrap_or(fixed);
        if rustix::fs::ioctl_setflags(&fd, now | fixed).is_err() {
            println!("left out, no such attributes here");
            return;
        }
        // It is root's besides.
        let report = work(&node, dir.path());
        assert!(!host::immutable::is_set(&node.state_db()), "{report:?}");
        assert_eq!(owner(&node.state_db()), USER, "{report:?}");
    }

    #[test]
    fn what_an_access_list_lets_him_use_stays_as_it_is_as_root() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        for path in [&node.state_dir, &node.state_dir.join("state")] {
            chown(path, Some(USER), Some(USER)).unwrap();
        }
        private(&node.config_path);
        private(&node.state_db());
        // user::rw-, user:nobody:rw-, group::---, mask::rw-, other::---
        let mut list = 2_u32.to_le_bytes().to_vec();
        for (tag, may, id) in
            [(1_u16, 6_u16, u32::MAX), (2, 6, USER), (4, 0, u32::MAX), (16, 6, u32::MAX), (32, 0, u32::MAX)]
        {
            list.extend(tag.to_le_bytes());
            list.extend(may.to_le_bytes());
            list.extend(id.to_le_bytes());
        }
        let flags = rustix::fs::XattrFlags::empty();
        match rustix::fs::setxattr(node.state_db(), c"system.posix_acl_access", &list, flags) {
            Err(rustix::io::Errno::OPNOTSUPP) => return,
            set => set.unwrap(),
        }
        work(&node, dir.path());
        assert_eq!((owner(&node.config_path), owner(&node.state_db())), (USER, 0));
    }

    #[test]
    fn a_link_on_the_way_leads_nowhere_as_root() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        // The user has put a link to another's databases where his own directory was.
        let others = dir.path().join("others");
        std::fs::rename(node.state_dir.join("state"), &others).unwrap();
        symlink(&others, node.state_dir.join("state")).unwrap();
        private(&others.join("openclaw.sqlite"));
        chown(&node.state_dir, Some(USER), Some(USER)).unwrap();
        let report = work(&node, dir.path());
        assert_eq!(owner(&others.join("openclaw.sqlite")), 0, "{report:?}");
        assert!(!report.undone.is_empty() && !dir.path().join("quarantine").exists(), "{report:?}");
    }
}
