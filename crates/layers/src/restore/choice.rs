//! What may be touched: the least scope that explains all findings, and which difference from a snapshot is in it.

use engine::{Class, FaultKind, Finding};
use node::Node;
use node::roots::resolved;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use store::{Difference, DifferenceKind, SnapshotInfo};

/// What the findings allow to be touched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Choice {
    /// Converging classes to put right.
    pub converge: BTreeSet<Class>,
    /// The config may be put back.
    pub config: bool,
    /// Classes of which whole roots are gone or emptied.
    pub missing: BTreeSet<Class>,
    /// Single databases that are corrupt or were started afresh.
    pub databases: BTreeSet<PathBuf>,
    /// Databases that were rescued from a living gateway: newer than any snapshot, not to be touched again.
    pub kept: BTreeSet<PathBuf>,
    /// Agents' databases that are gone, whichever they are: the node remembers none of its sessions.
    pub agents: bool,
    /// Roots that were gone or emptied before anything was done about it: a rescued database makes its directory again, and
    /// so may a gateway that ends.
    pub void: BTreeSet<PathBuf>,
    /// Every byte is to be hashed: a stat sweep found nothing, and still it does not start.
    pub thorough: bool,
    /// The gateway runs meanwhile: no program of another version may be put under it.
    pub serving: bool,
}

impl Choice {
    /// The least scope that explains all findings about `node`.
    #[must_use]
    pub fn of(node: &Node, findings: &[Finding]) -> Choice {
        let mut choice = Choice::default();
        for finding in findings {
            choice.add(node, finding);
        }
        choice
    }

    fn add(&mut self, node: &Node, finding: &Finding) {
        match finding.kind {
            FaultKind::FilesDamaged => self.converge.extend(finding.class),
            FaultKind::RuntimeUnfit => self.converge.extend([Class::Runtime, Class::Service]),
            FaultKind::ServiceLatched => self.converge.extend([Class::Service]),
            FaultKind::ConfigBroken => self.config = true,
            FaultKind::RootMissing => {
                if node::roots::state_is_gone(node) {
                    // All that is the user's is gone at once.
                    self.config = true;
                    self.missing
                        .extend(Class::ALL.into_iter().filter(|c| !c.converges() && *c != Class::Config));
                }
                match finding.class {
                    Some(class) if class.converges() => self.converge.extend([class]),
                    Some(Class::Config) => self.config = true,
                    Some(class) => self.missing.extend([class]),
                    None => {}
                }
                if finding.class == Some(Class::State) {
                    // A gateway that ends makes the missing database anew, empty: what counts is what it was.
                    self.databases.insert(resolved(&node.state_db()));
                }
                self.databases.extend(named(finding));
            }
            FaultKind::Amnesia if finding.class == Some(Class::Sessions) => self.agents = true,
            FaultKind::DatabaseCorrupt | FaultKind::Amnesia => {
                if finding.class == Some(Class::State) {
                    self.databases.insert(resolved(&node.state_db()));
                }
                self.databases.extend(named(finding));
            }
            FaultKind::ProcessGone
            | FaultKind::Hung
            | FaultKind::PortTaken
            | FaultKind::Permission
            | FaultKind::DiskFull
            | FaultKind::SchemaNewer
            | FaultKind::UpdateAtWork
            | FaultKind::OwnersWill
            | FaultKind::BackupStale
            | FaultKind::Notice => {}
        }
    }

    /// Whether there is nothing to put right.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.converge.is_empty() && !self.config && !self.of_users()
    }

    /// Whether something of the user's is to come back.
    fn of_users(&self) -> bool {
        self.agents || !self.missing.is_empty() || !self.databases.is_empty()
    }

    /// The next wider scope, when the first one started nothing: every byte of what converges, and the config.
    #[must_use]
    pub fn widened(mut self) -> Choice {
        self.converge.extend([Class::Program, Class::Runtime, Class::Service]);
        self.thorough = true;
        self
    }

    pub(crate) fn classes(&self) -> Vec<Class> {
        let mut classes: BTreeSet<Class> = self.converge.clone();
        if self.config {
            classes.insert(Class::Config);
        }
        classes.extend(&self.missing);
        if !self.databases.is_empty() {
            classes.extend([Class::State, Class::Sessions]);
        }
        if self.agents {
            classes.insert(Class::Sessions);
        }
        classes.into_iter().collect()
    }

    /// Whether this difference may be put right.
    pub(crate) fn wants(&self, info: &SnapshotInfo, difference: &Difference) -> bool {
        if difference.class.converges() {
            return self.converge.contains(&difference.class);
        }
        if difference.class == Class::Config {
            return self.config && back_to_what_was(difference.kind);
        }
        let root = info.roots.iter().find(|r| r.name == difference.root);
        let path = root.map(|r| join(&r.path, &difference.path));
        if path.as_ref().is_some_and(|p| self.kept.contains(p)) {
            return false;
        }
        if path.as_ref().is_some_and(|p| self.databases.contains(p)) {
            return back_to_what_was(difference.kind);
        }
        if self.agents && difference.class == Class::Sessions && leads_to_a_database(difference) {
            return true;
        }
        // A single missing file in a tree that is otherwise there is the user's own deletion, also when another tree of
        // the same class is gone.
        let void = root.is_some_and(|r| self.void.contains(&r.path) || is_gone(r, &info.roots));
        let again = match difference.kind {
            DifferenceKind::Missing | DifferenceKind::Emptied | DifferenceKind::KindChanged => true,
            // Nobody but an ending gateway can have begun it anew in a root that was gone.
            DifferenceKind::Changed => is_database(&difference.path),
            DifferenceKind::Extra
            | DifferenceKind::ModeOrOwner
            | DifferenceKind::Attributes
            | DifferenceKind::HardLinked
            | DifferenceKind::LinkTarget
            | DifferenceKind::TooMany => false,
        };
        self.missing.contains(&difference.class) && void && again
    }
}

fn is_database(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "sqlite")
}

/// Whether an agent's database is gone by this: itself, or a directory on the way to it
/// (`<agent>/agent/openclaw-agent.sqlite`).
fn leads_to_a_database(difference: &Difference) -> bool {
    let parts: Vec<_> = difference.path.iter().collect();
    let on_the_way = match parts.as_slice() {
        [] | [_] => true,
        [_, dir] => *dir == "agent",
        [..] => false,
    };
    match difference.kind {
        DifferenceKind::Missing => on_the_way || is_database(&difference.path),
        DifferenceKind::Emptied => is_database(&difference.path),
        DifferenceKind::Changed
        | DifferenceKind::Extra
        | DifferenceKind::ModeOrOwner
        | DifferenceKind::Attributes
        | DifferenceKind::HardLinked
        | DifferenceKind::KindChanged
        | DifferenceKind::LinkTarget
        | DifferenceKind::TooMany => false,
    }
}

/// Whether a root is gone or emptied. An empty repository left behind counts as empty.
pub(crate) fn is_void(root: &Path) -> bool {
    match std::fs::symlink_metadata(root) {
        Ok(meta) if meta.is_dir() => {
            std::fs::read_dir(root).is_ok_and(|entries| entries.flatten().all(|e| e.file_name() == ".git"))
        }
        Ok(meta) => meta.len() == 0,
        Err(e) => e.kind() == std::io::ErrorKind::NotFound,
    }
}

/// The same of a root with others in it: nothing is left but what it does not hold and other roots that are gone too. A
/// gateway whose state directory was deleted makes an empty one again.
pub(super) fn is_gone(root: &store::Root, all: &[store::Root]) -> bool {
    if is_void(&root.path) {
        return true;
    }
    let Ok(entries) = std::fs::read_dir(&root.path) else { return false };
    !root.exclude.is_empty()
        && entries.flatten().all(|entry| {
            let path = entry.path();
            let not_its_own = root.exclude.iter().any(|name| entry.file_name() == name.as_str());
            not_its_own && all.iter().filter(|r| r.path.starts_with(&path)).all(|r| is_void(&r.path))
        })
}

/// The databases that a finding names.
fn named(finding: &Finding) -> impl Iterator<Item = PathBuf> {
    finding
        .evidence
        .iter()
        .filter(|e| e.starts_with('/') && e.ends_with(".sqlite"))
        .map(|e| resolved(Path::new(e)))
}

/// What was there and is other or gone; something new beside it is the user's and stays.
pub(super) fn back_to_what_was(kind: DifferenceKind) -> bool {
    match kind {
        DifferenceKind::Missing
        | DifferenceKind::Changed
        | DifferenceKind::Emptied
        | DifferenceKind::ModeOrOwner
        | DifferenceKind::KindChanged
        | DifferenceKind::LinkTarget => true,
        DifferenceKind::Extra
        | DifferenceKind::Attributes
        | DifferenceKind::HardLinked
        | DifferenceKind::TooMany => false,
    }
}

pub(super) fn join(root: &Path, below: &Path) -> PathBuf {
    if below.as_os_str().is_empty() { root.to_owned() } else { root.join(below) }
}
