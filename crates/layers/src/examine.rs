//! One look at the whole disk side of a node: independent findings, the differences from what is remembered, and
//! what kind of repair the two together ask for.
//!
//! Nothing is concluded from an exit code or a message alone, and a difference in what belongs to the user is no
//! damage by itself: users write.

use crate::install::Proof;
use crate::restore::Choice;
use engine::{Class, FaultKind, Finding, Moment};
use host::clock::Deadline;
use host::{Kind, Result};
use node::refusal::Checked;
use node::{Baseline, Node, gates, triage};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use store::{Depth, Difference, DifferenceKind, SnapshotInfo, Store};

/// Differences kept in a report; the repair looks again by itself.
const MAX_DIFFERENCES: usize = 256;
/// Of a look's time, this much may go into databases and the rest of the triage.
const TRIAGE_LIMIT: std::time::Duration = std::time::Duration::from_secs(8);
/// Evidence lines of one finding.
const MAX_EVIDENCE: usize = 8;
/// The classes that converge to the snapshot and are watched on disk.
const CONVERGING: [Class; 3] = [Class::Program, Class::Runtime, Class::Service];

/// What kind of repair a serving node needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Need {
    /// None.
    Nothing,
    /// There is damage, but somebody is still at work on it: look again soon.
    Later,
    /// It can be put right while the node serves.
    InPlace,
    /// Putting it right needs the gateway stopped.
    Interruption,
}

/// How closely to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Care {
    /// While the node serves: by stat, and only the heads of databases.
    Quick,
    /// While it is down: databases page by page, trees by stat.
    Down,
    /// After a start that failed for no reason that shows: every byte of the converging trees too.
    Thorough,
}

/// What one look found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Examination {
    /// What is wrong, independent of each other.
    pub findings: Vec<Finding>,
    /// What a serving node needs.
    pub need: Need,
    /// Why program, runtime and service files were not compared with the snapshot: an update is at work on them. Then
    /// nothing that was found about them asks for a repair, and that nothing was found says nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unknown: Option<String>,
    /// How the converging trees differ from the snapshot, bounded.
    pub differences: Vec<Difference>,
    /// Pieces that killed repairs left in the converging trees.
    #[serde(default)]
    pub leftovers: u64,
    /// The living gateway holds a deleted database: what it holds can be put back without any snapshot, and is lost
    /// with its end.
    #[serde(default)]
    pub rescue: bool,
    /// The store had not answered when this was said: what it holds is not known, and nothing can be taken from it now.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub store_hangs: bool,
    /// The snapshot that a repair would use first.
    pub snapshot: Option<String>,
    /// The age of the newest good copy of each class, in seconds.
    pub ages_s: BTreeMap<Class, u64>,
    /// The program's version in that snapshot.
    pub version: Option<String>,
    /// Hash of what a start would run with now: program, runtime, config and databases as they lie on disk.
    pub inputs: u64,
    /// Why the node or its backups will soon lack space, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low: Option<String>,
    /// What the user's files looked like, where that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<node::users::Stamp>,
    /// What the program itself says of the config, so that it need not be asked again about the same one.
    #[serde(default)]
    pub checked: Option<Checked>,
    /// CPU time it took, in milliseconds.
    pub cpu_ms: f64,
    /// Elapsed time, in milliseconds.
    pub wall_ms: f64,
}

impl Examination {
    /// Adds something to be told that asks for nothing.
    pub fn notice(&mut self, what: String) {
        self.findings.push(Finding { kind: FaultKind::Notice, class: None, what, evidence: Vec::new() });
    }
}

/// What can be seen of a node without what is remembered of it.
#[derive(Debug, Clone)]
pub struct Seen {
    began: Moment,
    care: Care,
    findings: Vec<Finding>,
    checked: Option<Checked>,
}

/// The first half of a look: the node itself.
pub fn see(node: &Node, baseline: Option<&Baseline>, care: Care, deadline: Deadline) -> Seen {
    let began = host::clock::now();
    let depth = match care {
        Care::Quick => triage::Depth::Quick,
        Care::Down | Care::Thorough => triage::Depth::Full,
    };
    let unknown = Baseline::default();
    // A large database must not cost the whole look: what cannot be checked in time is unknown, not broken.
    let for_triage = deadline.min(Deadline::after(TRIAGE_LIMIT));
    let triage::Triage { findings, checked } =
        triage::examine(node, baseline.unwrap_or(&unknown), depth, for_triage);
    Seen { began, care, findings, checked }
}

/// Looks.
pub fn examine(
    node: &Node,
    store: Option<&Store>,
    baseline: Option<&Baseline>,
    proof: Option<&Proof>,
    care: Care,
    deadline: Deadline,
) -> Result<Examination> {
    weigh(node, see(node, baseline, care, deadline), store, proof, deadline)
}

/// The second half: what was seen against what is remembered.
pub fn weigh(
    node: &Node,
    seen: Seen,
    store: Option<&Store>,
    proof: Option<&Proof>,
    deadline: Deadline,
) -> Result<Examination> {
    let Seen { began, care, mut findings, checked } = seen;
    let compare = match care {
        Care::Quick | Care::Down => Depth::Stat,
        Care::Thorough => Depth::Hash,
    };
    // A store that fails under the look is as good as none: what can be seen without it still counts.
    let (store, trusted) = match store.map(|s| (s, s.newest_trusted(None))) {
        Some((store, Ok(trusted))) => (Some(store), trusted),
        Some((_, Err(e))) => {
            findings.push(unusable(&e));
            (None, None)
        }
        None => (None, None),
    };
    // A proof counts for the version it is of, until a later snapshot is trusted.
    let proof = proof.filter(|p| node.package_version().as_ref() == Some(&p.version)).filter(|p| {
        let taken =
            trusted.as_ref().and_then(|t| t.classes.get(&Class::Program)).map(|c| c.taken.as_second());
        taken.is_none_or(|taken| taken < p.at_s)
    });
    let (mut differences, mut leftovers) = (Vec::new(), 0);
    let unknown = findings.iter().find(|f| f.kind == FaultKind::UpdateAtWork).map(|f| f.what.clone());
    if let (Some(store), Some(trusted)) = (store, &trusted)
        && unknown.is_none()
    {
        let compared = match compare {
            Depth::Stat => store.sweep(&trusted.id, &CONVERGING, deadline).map(|swept| {
                leftovers = swept.leftovers;
                swept.differences
            }),
            Depth::Hash => store.compare(&trusted.id, &CONVERGING, compare, deadline),
        };
        match compared {
            Ok(all) => differences = all,
            // Out of time is not out of order.
            Err(e) if e.kind == Kind::TimedOut => return Err(e),
            Err(e) => findings.push(unusable(&e)),
        }
        if upgraded(node, trusted) {
            // Another version than the remembered one, whole as far as can be seen: its owner's doing until it fails.
            differences.retain(|d| d.class != Class::Program);
        }
        differences.retain(|d| d.class != Class::Runtime || runs_on(node, trusted, &d.root));
        if let Some(proof) = proof {
            proof.explain(&node.package_dir, &mut differences);
        }
        findings.extend(damage(&differences));
    }
    if let Some(proof) = proof {
        let lines = proof.damage(&node.package_dir, care == Care::Thorough, deadline);
        if !lines.is_empty() {
            findings.push(Finding {
                kind: FaultKind::FilesDamaged,
                class: Some(Class::Program),
                what: "the program is not as it was installed".to_owned(),
                evidence: lines,
            });
        }
    }
    findings.extend(trusted.as_ref().and_then(|t| credentials_gone(node, t)));
    let rescue = findings.iter().any(of_databases) && node::salvage::held(node);
    only_what_can_be_mended(node, store, trusted.as_ref(), rescue, &mut findings, deadline);
    let being_replaced = |f: &&Finding| unknown.is_some() && f.class.is_some_and(Class::converges);
    let need =
        findings.iter().filter(|f| !being_replaced(f)).map(|f| need(node, f)).max().unwrap_or(Need::Nothing);
    let inputs = inputs(node, &differences);
    differences.truncate(MAX_DIFFERENCES);
    Ok(Examination {
        need,
        unknown,
        inputs,
        leftovers,
        rescue,
        store_hangs: false,
        snapshot: trusted.as_ref().map(|t| t.id.clone()),
        version: trusted.as_ref().and_then(|t| t.version.clone()),
        ages_s: trusted.as_ref().map(ages).unwrap_or_default(),
        findings,
        differences,
        low: gates::low(&[&node.state_dir, &node.package_dir]),
        users: None,
        checked,
        cpu_ms: cpu_ms(),
        wall_ms: host::clock::now().since_ms(began).unwrap_or(0) as f64,
    })
}

fn unusable(e: &host::Error) -> Finding {
    let what = format!("the store cannot be used: {}", e.why);
    Finding { kind: FaultKind::Notice, class: None, what, evidence: vec![e.what.clone()] }
}

/// Credentials that the snapshot holds and that are gone. An empty directory is damage only where there were several: an
/// owner who logs the only channel out leaves one.
fn credentials_gone(node: &Node, trusted: &SnapshotInfo) -> Option<Finding> {
    let held = trusted.classes.get(&Class::Credentials)?.files;
    if !node.state_dir.is_dir() {
        // Missing with everything else, which is a finding of its own.
        return None;
    }
    let roots = trusted.roots.iter().filter(|r| r.class == Class::Credentials);
    let what = roots.map(|r| &r.path).find_map(|path| match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && held > 0 => {
            Some(format!("{} is missing", path.display()))
        }
        Ok(_) if held > 1 && crate::restore::is_void(path) => Some(format!("{} is empty", path.display())),
        Ok(_) | Err(_) => None,
    })?;
    let class = Some(Class::Credentials);
    Some(Finding { kind: FaultKind::RootMissing, class, what, evidence: Vec::new() })
}

/// What may mean that a database is gone or another one.
fn of_databases(finding: &Finding) -> bool {
    matches!(finding.class, Some(Class::State | Class::Sessions))
        && matches!(finding.kind, FaultKind::RootMissing | FaultKind::DatabaseCorrupt | FaultKind::Amnesia)
}

/// A root of the user's that is gone, or a database that is broken, is a reason to act only if there is something to
/// bring back. Else it is the node's own business (an owner emptied it, an agent has not made it yet) and told as such:
/// a serving gateway is never stopped for what no snapshot holds, and a fallen one is not kept from starting by it.
fn only_what_can_be_mended(
    node: &Node,
    store: Option<&Store>,
    trusted: Option<&SnapshotInfo>,
    rescue: bool,
    findings: &mut [Finding],
    deadline: Deadline,
) {
    for finding in findings {
        if rescue && of_databases(finding) {
            continue;
        }
        let users = finding.class.is_some_and(|c| !c.converges() && c != Class::Config);
        let asks =
            matches!(finding.kind, FaultKind::RootMissing | FaultKind::DatabaseCorrupt | FaultKind::Amnesia);
        if !users || !asks || !node.state_dir.is_dir() {
            continue;
        }
        let choice = Choice::of(node, std::slice::from_ref(finding));
        let mendable = match (store, trusted) {
            (Some(store), Some(info)) => store
                .compare(&info.id, &choice.classes(), Depth::Stat, deadline)
                // What cannot be compared is not judged here.
                .map_or(true, |all| all.iter().any(|d| choice.wants(info, d))),
            (_, _) => false,
        };
        if !mendable {
            finding.kind = FaultKind::Notice;
            finding.evidence.push("no good snapshot holds more of it".to_owned());
        }
    }
}

/// Whether the node runs on the runtime that a root of the snapshot holds. One that was given another runtime does not miss
/// the old one.
fn runs_on(node: &Node, trusted: &SnapshotInfo, root: &str) -> bool {
    // A link that leads nowhere leads to what is missing.
    if std::fs::metadata(&node.node_bin).is_err() {
        return true;
    }
    let bin = node::roots::resolved(&node.node_bin);
    trusted
        .roots
        .iter()
        .filter(|r| r.name == root)
        .any(|r| bin.starts_with(&r.path) || node.node_bin.starts_with(&r.path))
}

/// Whether a whole program of another version lies there.
fn upgraded(node: &Node, trusted: &SnapshotInfo) -> bool {
    node.package_version().is_some_and(|live| trusted.version.as_ref().is_some_and(|kept| *kept != live))
}

fn ages(info: &SnapshotInfo) -> BTreeMap<Class, u64> {
    let now = host::clock::wall().as_second();
    info.classes
        .iter()
        .map(|(class, what)| (*class, u64::try_from(now - what.taken.as_second()).unwrap_or(0)))
        .collect()
}

/// One finding per damaged class.
fn damage(differences: &[Difference]) -> Vec<Finding> {
    CONVERGING
        .into_iter()
        .filter_map(|class| {
            let of: Vec<&Difference> = differences.iter().filter(|d| d.class == class).collect();
            let first = of.first()?;
            let what = match (first.path.as_os_str().is_empty(), first.kind) {
                (true, DifferenceKind::Missing) => format!("the {class} is gone"),
                _ if of.len() == 1 => format!("1 file of the {class} differs from the snapshot"),
                _ => format!("{} files of the {class} differ from the snapshot", of.len()),
            };
            let evidence = of
                .iter()
                .take(MAX_EVIDENCE)
                .map(|d| format!("{}/{}: {}", d.root, d.path.display(), kind_words(d.kind)))
                .collect();
            Some(Finding { kind: FaultKind::FilesDamaged, class: Some(class), what, evidence })
        })
        .collect()
}

fn kind_words(kind: DifferenceKind) -> &'static str {
    match kind {
        DifferenceKind::Missing => "missing",
        DifferenceKind::Extra => "not in the snapshot",
        DifferenceKind::Changed => "other bytes",
        DifferenceKind::Emptied => "emptied",
        DifferenceKind::ModeOrOwner => "other mode or owner",
        DifferenceKind::Attributes => "other attributes",
        DifferenceKind::HardLinked => "shares its bytes with another file",
        DifferenceKind::KindChanged => "another kind of file",
        DifferenceKind::LinkTarget => "points elsewhere",
        DifferenceKind::TooMany => "more than can be listed",
    }
}

/// What one finding asks for while the node serves.
fn need(node: &Node, finding: &Finding) -> Need {
    match finding.kind {
        FaultKind::FilesDamaged => Need::InPlace,
        FaultKind::ConfigBroken => {
            if being_edited(node) {
                Need::Later
            } else {
                Need::InPlace
            }
        }
        FaultKind::RootMissing => match finding.class {
            // The gateway reads these afresh; nothing has to be stopped for them.
            Some(Class::Workspace | Class::Credentials) => Need::InPlace,
            Some(
                Class::Program
                | Class::Runtime
                | Class::Service
                | Class::Config
                | Class::State
                | Class::Sessions,
            )
            | None => Need::Interruption,
        },
        FaultKind::DatabaseCorrupt | FaultKind::Amnesia => Need::Interruption,
        FaultKind::ProcessGone
        | FaultKind::Hung
        | FaultKind::RuntimeUnfit
        | FaultKind::ServiceLatched
        | FaultKind::PortTaken
        | FaultKind::Permission
        | FaultKind::DiskFull
        | FaultKind::SchemaNewer
        | FaultKind::UpdateAtWork
        | FaultKind::OwnersWill
        | FaultKind::BackupStale
        | FaultKind::Notice => Need::Nothing,
    }
}

/// A config that was written less than a minute ago may still be in somebody's editor.
fn being_edited(node: &Node) -> bool {
    const EDITING_S: u64 = 60;
    let recently = |path: &std::path::Path| {
        std::fs::metadata(path)
            .and_then(|m| m.modified())
            .ok()
            .and_then(age_s)
            .is_some_and(|age| age < EDITING_S)
    };
    if node.config_path.exists() {
        return recently(&node.config_path);
    }
    // Deleted: the directory remembers when.
    node.config_path.parent().is_some_and(recently)
}

fn age_s(t: std::time::SystemTime) -> Option<u64> {
    let since = t.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs();
    let now = u64::try_from(host::clock::wall().as_second()).ok()?;
    // A file from the future (the clock was set back) is not being edited for ever.
    Some(now.checked_sub(since).unwrap_or(u64::MAX))
}

/// Hash of everything a start would run with.
fn inputs(node: &Node, differences: &[Difference]) -> u64 {
    let mut hash = DefaultHasher::new();
    let stat = |path: &std::path::Path, hash: &mut DefaultHasher| {
        use std::os::unix::fs::MetadataExt;
        match std::fs::metadata(path) {
            Ok(m) => (m.ino(), m.size(), m.mtime(), m.mtime_nsec(), m.mode(), m.uid()).hash(hash),
            Err(e) => e.raw_os_error().hash(hash),
        }
    };
    for path in [&node.entry, &node.node_bin, &node.config_path, &node.package_dir.join("package.json")] {
        stat(path, &mut hash);
    }
    for path in node::service::start_files(node) {
        path.hash(&mut hash);
        stat(&path, &mut hash);
    }
    // What is made anew counts by being there: its content moves with every start.
    for name in node::roots::TRANSIENT {
        let kind = node.state_dir.join(name).symlink_metadata().map(|m| m.is_dir());
        kind.ok().hash(&mut hash);
    }
    // The databases' sizes and times move with every start; only their presence and identity count.
    let mut presence = |path: &std::path::Path| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(path).map(|m| (m.ino(), m.uid(), m.size() == 0)).ok().hash(&mut hash);
    };
    presence(&node.state_db());
    for (_, db) in node.agent_dbs() {
        presence(&db);
    }
    for d in differences {
        (&d.root, &d.path, d.kind).hash(&mut hash);
    }
    hash.finish()
}

fn cpu_ms() -> f64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    t.tv_sec as f64 * 1000.0 + t.tv_nsec as f64 / 1_000_000.0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods, reason = "a file is dated by the wall clock")]
    use super::*;
    use std::path::Path;

    fn node(dir: &Path) -> Node {
        let state = dir.join("state");
        std::fs::create_dir_all(&state).unwrap();
        std::fs::write(state.join("openclaw.json"), "{").unwrap();
        serde_json::from_value(serde_json::json!({
            "name": "t", "prefix": dir, "package_dir": dir.join("p"), "entry": dir.join("p/dist/index.js"),
            "node_bin": dir.join("node"), "home": dir, "state_dir": state,
            "config_path": state.join("openclaw.json"), "port": 1,
            "ids": host::run::Ids::current(), "user": "t"
        }))
        .unwrap()
    }

    fn finding(kind: FaultKind, class: Class) -> Finding {
        Finding { kind, class: Some(class), what: String::new(), evidence: Vec::new() }
    }

    #[test]
    fn a_config_in_somebodys_editor_is_left_for_a_minute() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let broken = finding(FaultKind::ConfigBroken, Class::Config);
        assert_eq!(need(&node, &broken), Need::Later);
        let old = std::time::SystemTime::now() - std::time::Duration::from_secs(61);
        std::fs::File::options().write(true).open(&node.config_path).unwrap().set_modified(old).unwrap();
        assert_eq!(need(&node, &broken), Need::InPlace);
    }

    #[test]
    fn what_the_gateway_holds_open_needs_an_interruption_and_the_rest_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        for (kind, class, expected) in [
            (FaultKind::FilesDamaged, Class::Program, Need::InPlace),
            (FaultKind::RootMissing, Class::Workspace, Need::InPlace),
            (FaultKind::RootMissing, Class::State, Need::Interruption),
            (FaultKind::RootMissing, Class::Sessions, Need::Interruption),
            (FaultKind::DatabaseCorrupt, Class::State, Need::Interruption),
            (FaultKind::Amnesia, Class::State, Need::Interruption),
            (FaultKind::UpdateAtWork, Class::Program, Need::Nothing),
            (FaultKind::PortTaken, Class::State, Need::Nothing),
        ] {
            assert_eq!(need(&node, &finding(kind, class)), expected, "{kind:?} {class}");
        }
    }

    #[test]
    fn while_an_update_is_at_work_the_program_is_neither_damaged_nor_clean() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let look = || {
            let deadline = Deadline::after(std::time::Duration::from_secs(30));
            examine(&node, None, None, None, Care::Quick, deadline).unwrap()
        };
        // The program is gone: npm has taken it away, or somebody else has.
        let damaged = |e: &Examination| e.findings.iter().any(|f| f.kind == FaultKind::FilesDamaged);
        let gone = look();
        assert!(damaged(&gone) && gone.need == Need::InPlace && gone.unknown.is_none(), "{gone:?}");
        std::fs::create_dir(node.package_dir.with_file_name(".p-aB3dE5gH")).unwrap();
        let updating = look();
        assert!(updating.unknown.is_some_and(|what| what.contains(".p-aB3dE5gH")));
        assert_ne!(updating.need, Need::InPlace, "nothing is repaired under npm's feet");
    }

    #[test]
    fn what_only_the_living_gateway_holds_is_mendable_without_any_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let mut node = node(dir.path());
        let db = node.state_db();
        std::fs::create_dir_all(db.parent().unwrap()).unwrap();
        std::fs::write(&db, b"rows").unwrap();
        // This very process plays the gateway, and is the node's by what it runs.
        node.node_bin = std::env::current_exe().unwrap().canonicalize().unwrap();
        let us = host::process::ProcessId::current().unwrap();
        let lock = node::lock::path(&node.state_dir, node.ids.uid);
        std::fs::create_dir_all(lock.parent().unwrap()).unwrap();
        let text = serde_json::json!({"pid": us.pid, "startTime": us.start_ticks, "configPath": "/c"});
        std::fs::write(&lock, text.to_string()).unwrap();
        let known = Baseline { device_id: Some("x".into()), ..Baseline::default() };
        let gone = |held: bool| {
            let deadline = Deadline::after(std::time::Duration::from_secs(30));
            let exam = examine(&node, None, Some(&known), None, Care::Quick, deadline).unwrap();
            assert_eq!(exam.rescue, held);
            let state = |f: &&Finding| f.class == Some(Class::State) && f.what.contains("database");
            exam.findings.iter().find(state).map(|f| f.kind)
        };
        let open = std::fs::File::open(&db).unwrap();
        std::fs::remove_file(&db).unwrap();
        assert_eq!(gone(true), Some(FaultKind::RootMissing));
        drop(open);
        assert_eq!(gone(false), Some(FaultKind::Notice), "nothing holds it any more");
    }

    #[test]
    fn inputs_change_with_what_a_start_would_run_with() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let before = inputs(&node, &[]);
        assert_eq!(before, inputs(&node, &[]));
        std::fs::write(&node.config_path, "{}").unwrap();
        let other = inputs(&node, &[]);
        assert_ne!(before, other);
        let difference = Difference {
            root: "program".into(),
            path: "a".into(),
            class: Class::Program,
            kind: DifferenceKind::Changed,
        };
        assert_ne!(other, inputs(&node, &[difference]));
    }
}
