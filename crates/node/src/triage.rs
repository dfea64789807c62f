//! What is wrong with a node, from looks that do not depend on each other.
//!
//! The gateway's exit code and last words are misleading (a missing dependency calls itself a state problem, a full
//! disk a closed database), so neither decides: each source is looked at by itself and the log only ever confirms
//! what a file already shows. Damage of single program files is the store's comparison; here only what needs no
//! snapshot is said.

use crate::identity::{Baseline, DbState, check_database, read_identity};
use crate::refusal::{self, Checked};
use crate::roots::is_void;
use crate::{Node, config, gates, identity, probe, tls, update};
use engine::{Class, FaultKind, Finding};
use host::clock::Deadline;
use host::process::{Listener, ProcessId, listeners, owner_of};
use std::io::{Read, Seek, SeekFrom};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// How thoroughly to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Only what costs milliseconds: for a node that serves.
    Quick,
    /// Databases are checked page by page and the runtime is asked for its version.
    Full,
}

/// Less than this free is a full disk: SQLite and the log need room to work at all.
const DISK_FULL_BYTES: u64 = 24 << 20;
/// Fewer inodes than this is a full disk too.
const INODES_FEW: u64 = 64;
/// The end of the log that may hold the last words.
const LOG_TAIL_BYTES: u64 = 64 << 10;
/// Words of the gateway kept as evidence.
const WORDS_LIMIT_CHARS: usize = 300;

/// What a look at every source found.
#[derive(Debug, Clone, Default)]
pub struct Triage {
    /// What is wrong, independent of each other.
    pub findings: Vec<Finding>,
    /// What the program says of the config that lies there, where it could be asked.
    pub checked: Option<Checked>,
}

/// Looks at every source once. Never longer than the deadline, one unreadable source never hides another.
#[must_use]
pub fn examine(node: &Node, baseline: &Baseline, depth: Depth, deadline: Deadline) -> Triage {
    let mut findings = Vec::new();
    let checked;
    program(node, &mut findings);
    runtime(node, depth, deadline, &mut findings);
    service(node, &mut findings);
    (findings, checked) = configuration(node, baseline, deadline, findings);
    findings.extend(
        tls::refused_at_start(node).map(|what| finding(FaultKind::Notice, Some(Class::Config), what)),
    );
    roots(node, baseline, &mut findings);
    databases(node, baseline, depth, deadline, &mut findings);
    schema(node, deadline, &mut findings);
    ownership(node, &mut findings);
    disk(node, &mut findings);
    port(node, &mut findings);
    if let Some(what) = update::at_work(node) {
        findings.push(finding(FaultKind::UpdateAtWork, Some(Class::Program), what));
    }
    Triage { findings, checked }
}

fn finding(kind: FaultKind, class: Option<Class>, what: impl Into<String>) -> Finding {
    Finding { kind, class, what: what.into(), evidence: Vec::new() }
}

fn with(mut f: Finding, evidence: impl IntoIterator<Item = String>) -> Finding {
    f.evidence.extend(evidence);
    f
}

/// Whether a whole program lies there, as far as can be told without a snapshot.
#[must_use]
pub fn program_is_whole(node: &Node) -> bool {
    let mut findings = Vec::new();
    program(node, &mut findings);
    findings.is_empty()
}

/// The pieces without which no program starts; each was seen to fail in its own misleading way.
fn program(node: &Node, findings: &mut Vec<Finding>) {
    let package = &node.package_dir;
    let damaged = |what: String| finding(FaultKind::FilesDamaged, Some(Class::Program), what);
    if !package.is_dir() {
        let left: Vec<String> =
            update::staging(node).iter().map(|p| format!("{} lies beside it", p.display())).collect();
        findings.push(with(damaged(format!("the program {} is gone", package.display())), left));
        return;
    }
    let mut missing = Vec::new();
    let mut empty = Vec::new();
    for name in ["package.json", "openclaw.mjs", "dist/index.js", "dist/entry.js"] {
        match std::fs::metadata(package.join(name)) {
            Ok(m) if m.is_file() && m.len() > 0 => {}
            Ok(_) => empty.push(name.to_owned()),
            Err(_) => missing.push(name.to_owned()),
        }
    }
    if !missing.is_empty() {
        findings.push(with(damaged("files of the program are missing".into()), missing));
    }
    if !empty.is_empty() {
        findings.push(with(damaged("files of the program are empty".into()), empty));
    }
    if crate::package_json(package).is_none() && package.join("package.json").is_file() {
        findings.push(damaged("the program's package.json cannot be read".into()));
    }
    let absent = missing_dependencies(package);
    if !absent.is_empty() {
        findings.push(with(damaged("dependencies of the program are missing".into()), absent));
    }
    if package.join(".openclaw-lifecycle-pending").exists() {
        findings.push(damaged("the program's installation was not finished".into()));
    }
}

/// The direct dependencies that the package asks for and that are not there (optional ones may be absent).
fn missing_dependencies(package: &Path) -> Vec<String> {
    /// Names told of; the rest is a number.
    const NAMES_LIMIT: usize = 12;
    let Some(json) = crate::package_json(package) else { return Vec::new() };
    let optional = |name: &str| json.get("optionalDependencies").is_some_and(|o| o.get(name).is_some());
    let names = json.get("dependencies").and_then(|d| d.as_object());
    let absent = |name: &&String| {
        // npm nests them; pnpm and hoisting layouts put them beside the package.
        let inner = package.join("node_modules").join(name.as_str()).exists();
        let beside = package.parent().is_some_and(|p| p.join(name.as_str()).exists());
        !inner && !beside && !optional(name)
    };
    let all: Vec<String> = names.into_iter().flatten().map(|(k, _)| k).filter(absent).cloned().collect();
    let more = all.len().saturating_sub(NAMES_LIMIT);
    let mut told: Vec<String> = all.into_iter().take(NAMES_LIMIT).collect();
    if more > 0 {
        told.push(format!("and {more} more"));
    }
    told
}

fn runtime(node: &Node, depth: Depth, deadline: Deadline, findings: &mut Vec<Finding>) {
    let unfit = |what: String| finding(FaultKind::RuntimeUnfit, Some(Class::Runtime), what);
    match std::fs::metadata(&node.node_bin) {
        Ok(m) if !m.is_file() || m.len() == 0 => {
            findings.push(unfit(format!("{} is not a program", node.node_bin.display())));
            return;
        }
        Ok(m) if m.mode() & 0o111 == 0 => {
            findings.push(unfit(format!("{} is not executable", node.node_bin.display())));
            return;
        }
        Ok(_) => {}
        Err(e) => {
            findings
                .push(with(unfit(format!("Node {} is missing", node.node_bin.display())), [e.to_string()]));
            return;
        }
    }
    if depth == Depth::Quick {
        return;
    }
    match gates::runtime_version(node, &node.node_bin, deadline) {
        Err(why) if why.ends_with(gates::SLOW) => {
            findings.push(finding(FaultKind::Notice, Some(Class::Runtime), why));
        }
        Err(why) => findings.push(unfit(why)),
        Ok(version) => {
            if let Some(why) = gates::engine(&node.package_dir, version).reason() {
                findings.push(unfit(why.to_owned()));
            }
        }
    }
}

fn service(node: &Node, findings: &mut Vec<Finding>) {
    let Some(unit) = &node.unit else { return };
    let Some(file) = unit.files.first() else { return };
    let damaged = |what: String| finding(FaultKind::FilesDamaged, Some(Class::Service), what);
    match std::fs::symlink_metadata(file) {
        Err(_) => findings.push(damaged(format!("the unit file {} is missing", file.display()))),
        Ok(m) if m.is_file() && m.len() == 0 => {
            findings.push(damaged(format!("the unit file {} is empty", file.display())));
        }
        Ok(m) if m.is_symlink() && std::fs::read_link(file).is_ok_and(|t| t == Path::new("/dev/null")) => {
            findings.push(finding(FaultKind::OwnersWill, Some(Class::Service), "its unit is masked"));
        }
        Ok(_) => {
            let spec = crate::units::read(file, &[], unit.scope, &node.home);
            if spec.is_some_and(|s| s.exec.is_empty()) {
                findings.push(damaged(format!("the unit file {} starts nothing", file.display())));
            }
        }
    }
}

/// The config by itself; then, when it parses and is not the one with which the node served, what the program says of
/// it; and only where that cannot be had, whether the gateway's last words blamed it.
fn configuration(
    node: &Node,
    baseline: &Baseline,
    deadline: Deadline,
    mut findings: Vec<Finding>,
) -> (Vec<Finding>, Option<Checked>) {
    let found = config::check(node);
    if !found.is_empty() {
        findings.extend(found);
        return (findings, None);
    }
    let broken = |what: String, evidence: Vec<String>| Finding {
        kind: FaultKind::ConfigBroken,
        class: Some(Class::Config),
        what,
        evidence,
    };
    let checked = refusal::current(node, baseline, deadline);
    if let Some(checked) = &checked {
        let words: Vec<String> =
            refusal::news(node, baseline, checked).iter().map(refusal::Refusal::words).collect();
        if let Some(first) = words.first() {
            let what =
                format!("the program refuses the config, which has changed since it last served ({first})");
            findings.push(broken(what, words));
        }
    } else if let Ok(loaded) = config::load(node)
        && baseline.config.as_ref().is_some_and(|b| *b != config::fingerprint(&loaded.value))
        && let Some(words) = blamed(node)
    {
        let what = "the gateway refuses the config, which has changed since it last served".to_owned();
        findings.push(broken(what, vec![words]));
    }
    (findings, checked)
}

/// The gateway's own words about its config, if its last words were about that.
fn blamed(node: &Node) -> Option<String> {
    let log = probe::newest_log(node)?;
    let meta = std::fs::metadata(&node.config_path).ok()?;
    // Words older than the config speak of another one. A file that was put back has its old mtime, but a new ctime.
    let changed = meta.mtime().max(meta.ctime());
    (std::fs::metadata(&log).ok()?.mtime() >= changed).then_some(())?;
    let tail = tail(&log)?;
    let line = tail.lines().rev().take(40).find(|l| {
        let l = l.to_ascii_lowercase();
        l.contains("invalid config") || l.contains("unrecognized key") || l.contains("config validation")
    })?;
    Some(line.chars().filter(|c| !c.is_control()).take(WORDS_LIMIT_CHARS).collect())
}

fn tail(log: &Path) -> Option<String> {
    let mut file = std::fs::File::open(log).ok()?;
    let size = file.metadata().ok().filter(std::fs::Metadata::is_file)?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(LOG_TAIL_BYTES))).ok()?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Class roots that are missing or were emptied. Only what the node is known to have had can be missing: a fresh
/// node has no agents' databases and no credentials.
fn roots(node: &Node, baseline: &Baseline, findings: &mut Vec<Finding>) {
    let gone = |class: Class, what: String| finding(FaultKind::RootMissing, Some(class), what);
    let dir = &node.state_dir;
    if !dir.is_dir() {
        findings.push(gone(Class::State, format!("the state directory {} is missing", dir.display())));
        return;
    }
    let known = baseline.device_id.is_some();
    if known && !dir.join("state").is_dir() {
        findings.push(gone(Class::State, format!("{} is missing", dir.join("state").display())));
    }
    if (baseline.counts.agents > 0 || known) && is_void(&dir.join("agents")) {
        findings.push(gone(Class::Sessions, format!("{} is missing or empty", dir.join("agents").display())));
    }
    for root in crate::roots::roots(node) {
        if root.class == Class::Workspace && known && is_void(&root.path) {
            findings.push(gone(Class::Workspace, format!("{} is missing or empty", root.path.display())));
        }
    }
}

fn databases(
    node: &Node,
    baseline: &Baseline,
    depth: Depth,
    deadline: Deadline,
    findings: &mut Vec<Finding>,
) {
    let state = node.state_db();
    let known = baseline.device_id.is_some();
    match quick_or_full(&state, depth, deadline) {
        DbState::Missing if known && node.state_dir.join("state").is_dir() => {
            let what = format!("the state database {} is missing", state.display());
            findings.push(with(finding(FaultKind::RootMissing, Some(Class::State), what), leftovers(&state)));
        }
        DbState::Empty if known => {
            let what = format!("the state database {} is empty", state.display());
            findings.push(with(finding(FaultKind::RootMissing, Some(Class::State), what), leftovers(&state)));
        }
        DbState::Corrupt { why } => {
            let what = format!("the state database {} is damaged", state.display());
            findings.push(with(finding(FaultKind::DatabaseCorrupt, Some(Class::State), what), [why]));
        }
        DbState::Sound { .. } => amnesia(node, baseline, deadline, findings),
        DbState::Missing | DbState::Empty | DbState::Unknown { .. } => {}
    }
    for (agent, db) in node.agent_dbs() {
        match quick_or_full(&db, depth, deadline) {
            DbState::Corrupt { why } => {
                let what = format!("the database of agent {agent} is damaged");
                let f = finding(FaultKind::DatabaseCorrupt, Some(Class::Sessions), what);
                findings.push(with(f, [db.display().to_string(), why]));
            }
            DbState::Empty => {
                let what = format!("the database of agent {agent} is empty");
                let f = finding(FaultKind::RootMissing, Some(Class::Sessions), what);
                findings.push(with(f, [db.display().to_string()]));
            }
            DbState::Sound { .. } | DbState::Missing | DbState::Unknown { .. } => {}
        }
    }
}

/// Page by page costs by the database's size; while a node serves only the head is looked at.
fn quick_or_full(db: &Path, depth: Depth, deadline: Deadline) -> DbState {
    if depth == Depth::Full {
        return check_database(db, deadline);
    }
    match std::fs::symlink_metadata(db) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => DbState::Missing,
        Err(e) => DbState::Unknown { why: e.to_string() },
        Ok(m) if m.len() == 0 && identity::log_len(db) == 0 => DbState::Empty,
        Ok(m) if m.len() == 0 => DbState::Unknown { why: "all of it is in its log".into() },
        Ok(_) => {
            let mut head = [0_u8; 16];
            match std::fs::File::open(db).and_then(|mut f| f.read_exact(&mut head)) {
                Ok(()) if &head == b"SQLite format 3\0" => DbState::Sound { schema: 0, tables: 0 },
                Ok(()) => DbState::Corrupt { why: "file is not a database".into() },
                Err(e) => DbState::Unknown { why: e.to_string() },
            }
        }
    }
}

fn leftovers(db: &Path) -> Vec<String> {
    let left = ["-wal", "-shm"].iter().map(|s| identity::beside(db, s)).filter(|p| p.exists());
    left.map(|p| format!("{} was left", p.display())).collect()
}

fn amnesia(node: &Node, baseline: &Baseline, deadline: Deadline, findings: &mut Vec<Finding>) {
    let Some(before) = &baseline.device_id else { return };
    let Ok(now) = read_identity(node, deadline) else { return };
    let onboarded = config::load(node).ok().and_then(|l| identity::onboarded(&l.value));
    let afresh = onboarded.is_some() && onboarded != baseline.onboarded;
    let lost = baseline.counts.fallen_to_zero(&now.counts);
    let other = now.device_id.as_ref() != Some(before);
    if afresh && other {
        findings.push(finding(FaultKind::Notice, Some(Class::State), "the node was onboarded afresh"));
    } else if other {
        let what = if now.device_id.is_some() {
            "the state database holds another device identity than before"
        } else {
            "the state database holds no device identity"
        };
        let evidence = lost.iter().flat_map(|l| &l.what).map(|l| format!("its {l} are gone too"));
        findings.push(with(finding(FaultKind::Amnesia, Some(Class::State), what), evidence));
    } else if let Some(lost) = lost.filter(|_| !afresh) {
        let what = format!("all of the node's {} are gone", lost.what.join(", "));
        findings.push(finding(FaultKind::Amnesia, Some(lost.class), what));
    }
}

fn schema(node: &Node, deadline: Deadline, findings: &mut Vec<Finding>) {
    if let Some(program) = node.schema_versions()
        && let Some(why) = gates::schema(node, program, deadline).reason()
    {
        findings.push(finding(FaultKind::SchemaNewer, Some(Class::State), why));
    }
}

/// A file that the gateway must read and write and may not, by its owner and mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreign {
    /// Where.
    pub path: PathBuf,
    /// What it belongs to.
    pub class: Class,
    /// Its owner.
    pub uid: u32,
    /// Its mode bits.
    pub mode: u32,
    /// Nobody may change it, not even root (`chattr +i`, `+a`).
    pub immutable: bool,
}

/// The files that the gateway must read and write and that do not let its user: mostly what a `sudo openclaw` has left.
#[must_use]
pub fn foreign(node: &Node) -> Vec<Foreign> {
    let mut paths: Vec<(PathBuf, Class)> = vec![
        (node.state_dir.clone(), Class::State),
        (node.config_path.clone(), Class::Config),
        (node.state_dir.join("state"), Class::State),
        (node.state_dir.join("agents"), Class::Sessions),
        (node.state_dir.join("credentials"), Class::Credentials),
    ];
    for suffix in ["", "-wal", "-shm"] {
        paths.push((identity::beside(&node.state_db(), suffix), Class::State));
    }
    for (_, db) in node.agent_dbs() {
        paths.extend(db.parent().map(|dir| (dir.to_owned(), Class::Sessions)));
        paths.extend(["", "-wal", "-shm"].map(|s| (identity::beside(&db, s), Class::Sessions)));
    }
    let mut wrong = Vec::new();
    for (path, class) in paths {
        let Ok(meta) = std::fs::symlink_metadata(&path) else { continue };
        if meta.is_symlink() {
            continue;
        }
        // The gateway reads its config; one that its owner lets nobody write is a choice, not damage. What a `sudo openclaw`
        // leaves is root's and private, so that it cannot even be read.
        let bits = match meta.is_dir() {
            true => 0o7,
            false if path == node.config_path => 0o4,
            false => 0o6,
        };
        let kept = [4, 2, 1].iter().all(|b| bits & b == 0 || config::may(node, &meta, *b));
        let immutable = bits & 2 != 0 && host::immutable::is_set(&path);
        if immutable || !kept && !has_acl(&path) {
            wrong.push(Foreign { path, class, uid: meta.uid(), mode: meta.mode() & 0o7777, immutable });
        }
    }
    wrong
}

/// With an access list the mode bits do not say who may do what.
fn has_acl(path: &Path) -> bool {
    // A few entries; more do not fit, which is an answer too.
    let mut list = [0_u8; 128];
    match rustix::fs::lgetxattr(path, c"system.posix_acl_access", &mut list) {
        Ok(bytes) => bytes > 0,
        Err(e) => e == rustix::io::Errno::RANGE,
    }
}

fn ownership(node: &Node, findings: &mut Vec<Finding>) {
    let wrong = foreign(node);
    if let Some(first) = wrong.first() {
        let what = format!("{} may not use files of its own node", node.user);
        let lines = wrong.iter().map(|w| {
            let fixed = if w.immutable { ", immutable" } else { "" };
            format!("{} belongs to {}, mode {:o}{fixed}", w.path.display(), w.uid, w.mode)
        });
        findings.push(with(finding(FaultKind::Permission, Some(first.class), what), lines));
    }
    if read_only(&node.state_dir) {
        let what = format!("the file system of {} is read-only", node.state_dir.display());
        findings.push(finding(FaultKind::Permission, Some(Class::State), what));
    }
}

fn read_only(path: &Path) -> bool {
    rustix::fs::statvfs(path).is_ok_and(|s| s.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

fn disk(node: &Node, findings: &mut Vec<Finding>) {
    let mut seen = Vec::new();
    for path in [node.state_dir.clone(), node.package_dir.clone(), PathBuf::from("/tmp")] {
        let Ok(space) = host::files::free(&path) else { continue };
        let device = path.ancestors().find_map(|p| std::fs::metadata(p).ok()).map(|m| m.dev());
        if seen.contains(&device) {
            continue;
        }
        seen.push(device);
        // The gateway's user writes there, not we: root's reserve is none of its room.
        let room = space.for_user(node.ids.uid);
        if room < DISK_FULL_BYTES {
            let what = format!("the disk of {} is full: {} KB are free", path.display(), room >> 10);
            findings.push(finding(FaultKind::DiskFull, None, what));
        } else if space.free_inodes < INODES_FEW {
            let what = format!("the file system of {} has {} inodes left", path.display(), space.free_inodes);
            findings.push(finding(FaultKind::DiskFull, None, what));
        }
    }
}

/// A listener that is neither the gateway nor its child. Only told; who it is decides what may be done.
fn port(node: &Node, findings: &mut Vec<Finding>) {
    let gateway = node.gateway();
    let on_loopback = config::load(node).map_or(true, |l| config::on_loopback(&l.value));
    let in_the_way = |listener: &Listener| match listener.addr.ip() {
        IpAddr::V4(ip) => !on_loopback || ip == Ipv4Addr::LOCALHOST || ip.is_unspecified(),
        IpAddr::V6(ip) => !on_loopback || ip == Ipv6Addr::LOCALHOST || ip.is_unspecified(),
    };
    for listener in listeners(node.port).into_iter().filter(in_the_way) {
        let hint: Vec<u32> = gateway.iter().map(|g| g.pid).collect();
        let owner = owner_of(&listener, &hint);
        let family = |g: ProcessId| {
            owner.is_none()
                || owner == Some(g)
                || host::process::descendants(g.pid).iter().any(|d| Some(*d) == owner)
        };
        if gateway.is_some_and(family) || crate::probe::responder_listens(node, &listener) {
            continue;
        }
        let who = owner.map_or_else(
            || "a process that we may not look into".to_owned(),
            |p| format!("process {}", p.pid),
        );
        let mut evidence = vec![format!("listens on {}, uid {}", listener.addr, listener.uid)];
        evidence.extend(owner.and_then(ProcessId::exe).map(|e| e.display().to_string()));
        let what = format!("{who} holds port {} and is not this node's gateway", node.port);
        findings.push(with(finding(FaultKind::PortTaken, None, what), evidence));
        return;
    }
}

#[cfg(test)]
#[path = "triage_tests.rs"]
mod tests;
