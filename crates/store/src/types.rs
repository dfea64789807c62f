//! The words in which the store speaks to the other rooms.

use crate::stamp;
use engine::words::Class;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// One tree (or single file) of a node that is remembered under one class.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// Unique within a snapshot, for example `program`; also a directory name in the quarantine, so it holds no slash.
    pub name: String,
    /// Absolute and free of symlinks (resolve it when the node is found): the store refuses to follow any, so that
    /// a link planted later never makes it read or write elsewhere. May name a directory or a single file.
    pub path: PathBuf,
    /// Whose rules of touching apply.
    pub class: Class,
    /// Path prefixes relative to `path` that are left alone entirely: neither stored nor ever moved.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// When given, only these path prefixes (and the directories leading to them) belong to the root.
    #[serde(default)]
    pub only: Option<Vec<String>>,
}

/// What is to be taken.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// Every root of the node, also of classes that are not taken anew: a root without a class in `classes` is
    /// carried over from the newest snapshot.
    pub roots: &'a [Root],
    /// The classes to look at. Of these, roots that did not change are carried over by themselves.
    pub classes: &'a [Class],
    /// One line for people: why it was taken.
    pub note: &'a str,
    /// The program's version, if known.
    pub version: Option<&'a str>,
    /// The node's description, kept with the snapshot.
    pub node: serde_json::Value,
    /// The judge's baseline, kept with the snapshot.
    pub baseline: serde_json::Value,
}

/// How far a snapshot may be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trust {
    /// Just taken; nothing has been proven by it.
    Candidate,
    /// The node served with exactly this program and config for the settling time.
    Good,
    /// It was booted in a sandbox and judged.
    Rehearsed,
}

impl Trust {
    /// Whether a repair may use it unasked.
    #[must_use]
    pub fn trusted(self) -> bool {
        match self {
            Trust::Candidate => false,
            Trust::Good | Trust::Rehearsed => true,
        }
    }

    /// The name used in the command line and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Trust::Candidate => "candidate",
            Trust::Good => "good",
            Trust::Rehearsed => "rehearsed",
        }
    }
}

impl fmt::Display for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One snapshot, as people and other rooms see it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Sorts by age: the number counts up and never follows the wall clock.
    pub id: String,
    /// Counts up by one with each snapshot of this store.
    pub number: u64,
    /// Wall time at which it was published.
    #[serde(with = "stamp")]
    pub taken: Timestamp,
    /// How far it may be believed; kept beside the snapshot, not in it.
    #[serde(default = "candidate")]
    pub trust: Trust,
    /// What it holds, by class.
    pub classes: BTreeMap<Class, ClassInfo>,
    /// The roots as they were asked for.
    pub roots: Vec<Root>,
    /// Why it was taken.
    pub note: String,
    /// The program's version, if it was known.
    pub version: Option<String>,
    /// The node's description at that time.
    pub node: serde_json::Value,
    /// The judge's baseline at that time.
    pub baseline: serde_json::Value,
    /// What could not be taken as it should have been. Bounded.
    #[serde(default)]
    pub problems: Vec<Problem>,
    /// What taking it cost.
    #[serde(default)]
    pub cost: Cost,
}

fn candidate() -> Trust {
    Trust::Candidate
}

/// What a snapshot holds of one class.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassInfo {
    /// Regular files.
    pub files: u64,
    /// Their apparent sizes, summed.
    pub bytes: u64,
    /// When this class was last looked at and found so: older than the snapshot when it was carried over unseen.
    #[serde(with = "stamp")]
    pub taken: Timestamp,
}

/// Something that a snapshot could not take as it should have been.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The root's name.
    pub root: String,
    /// Where, relative to the root.
    pub path: PathBuf,
    /// What kind of problem.
    pub kind: ProblemKind,
    /// One line.
    pub why: String,
    /// The class was carried over whole from the snapshot before, so the snapshot is none the worse for it.
    #[serde(default)]
    pub carried: bool,
}

/// Kinds of [`Problem`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProblemKind {
    /// It could not be read; the snapshot says it exists but cannot bring it back.
    Unreadable,
    /// It kept changing while it was read; what was read last is stored.
    Unsteady,
    /// A database failed its check: its whole class was carried over from the snapshot before, or is left out.
    CorruptDatabase,
    /// Larger than the store's limit for one file; left out.
    TooLarge,
}

/// What an operation cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Elapsed time.
    pub wall_ms: f64,
    /// CPU time of this process meanwhile, all threads.
    pub cpu_ms: f64,
    /// Bytes added to the store.
    #[serde(default)]
    pub added_bytes: u64,
}

/// How far a long operation has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Files done.
    pub files: u64,
    /// Bytes done.
    pub bytes: u64,
    /// Files expected, where a snapshot before tells.
    pub of_files: Option<u64>,
}

/// Phases of a long operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Looking for what changed.
    Looking,
    /// Reading and storing.
    Storing,
    /// Making it durable.
    Syncing,
}

/// How closely live files are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// By stat against the index (inode, ctime, mtime, size); only what differs there is read and hashed.
    Stat,
    /// Every byte is read and hashed.
    Hash,
}

/// One way in which the live tree differs from a snapshot. A missing or kind-changed directory stands for all below.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// The root's name.
    pub root: String,
    /// Relative to the root; empty = the root itself, with all below.
    pub path: PathBuf,
    /// The root's class.
    pub class: Class,
    /// What differs.
    pub kind: DifferenceKind,
}

/// Kinds of [`Difference`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DifferenceKind {
    /// In the snapshot, not on disk.
    Missing,
    /// On disk, not in the snapshot. In a converging class it is moved to quarantine; elsewhere it is the user's.
    Extra,
    /// Other bytes.
    Changed,
    /// Empty on disk, not empty in the snapshot.
    Emptied,
    /// Other permission bits, owner or group; the bytes are right.
    ModeOrOwner,
    /// Other extended attributes; the bytes are right.
    Attributes,
    /// A file that had one name now shares its inode with another: writing to that one would change it.
    HardLinked,
    /// A file where a directory was, and so on.
    KindChanged,
    /// A symlink that points elsewhere.
    LinkTarget,
    /// More differences than a report may hold: the whole root is to be looked at.
    TooMany,
}

/// What a repair is to put right.
#[derive(Debug, Clone, Copy)]
pub enum Scope<'a> {
    /// Exactly these differences.
    Differences(&'a [Difference]),
    /// Whatever differs in the converging roots among these classes, and what is missing, emptied or changed in
    /// the others: the caller answers for the class rules.
    Classes(&'a [Class]),
}

/// How a repair is to go about it.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Where everything that is replaced or removed goes: koboshi's own directory, one per incident. Best on the
    /// node's file system (a rename); elsewhere it is copied and synced first.
    pub quarantine: PathBuf,
    /// Other user ids than those in the snapshot: (there, here).
    pub uids: Vec<(u32, u32)>,
    /// Other group ids than those in the snapshot: (there, here).
    pub gids: Vec<(u32, u32)>,
    /// Roots that lie elsewhere now: (root name, path).
    pub relocate: Vec<(String, PathBuf)>,
    /// Ready trees to swap in when a whole converging root is missing: (root name, tree on the same file system).
    /// Checked against the snapshot before use. What the store has lost is looked for in them as well.
    pub spares: Vec<(String, PathBuf)>,
    /// Heals what can be healed even if nobody has the bytes of some files: those stay as they are and are named in
    /// [`Repaired::lost`]. Otherwise such a repair changes nothing and fails. A root whose database is lost is left as
    /// it is either way: a start without it would begin an empty one.
    pub partial: bool,
}

/// What a repair did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Repaired {
    /// The snapshot used.
    pub snapshot: String,
    /// Regular files put in place.
    pub files: u64,
    /// Directories made.
    pub dirs: u64,
    /// Symlinks put in place.
    pub links: u64,
    /// Modes, owners and attributes put right where they were.
    pub attributes: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Entries moved to the quarantine.
    pub quarantined: u64,
    /// Entries that had been made immutable (`chattr +i`) and no longer are, by their absolute paths.
    pub freed: Vec<PathBuf>,
    /// Objects that were corrupt or missing in the store and came, proven, from a live file.
    pub objects_from_live: u64,
    /// The same from a spare.
    pub objects_from_spare: u64,
    /// Files that could not be had, precisely; bounded. Only of a [`Plan::partial`] repair.
    pub lost: Vec<Lost>,
    /// How many there are.
    pub lost_files: u64,
    /// Roots that were wholly missing and put in place by one rename.
    pub whole_roots: Vec<String>,
    /// Roots that came from the spare.
    pub from_spare: Vec<String>,
    /// Snapshots passed over, newest first, and why.
    pub passed_over: Vec<PassedOver>,
    /// What it cost.
    pub cost: Cost,
}

/// A file that a repair could not bring back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Lost {
    /// The root's name.
    pub root: String,
    /// Relative to the root; empty = the whole root was left as it is.
    pub path: PathBuf,
    /// One line.
    pub why: String,
}

/// A snapshot that was not used, and why.
#[derive(Debug, Clone, Serialize)]
pub struct PassedOver {
    /// Its id.
    pub id: String,
    /// One line.
    pub why: String,
}

/// What a verify found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct VerifyReport {
    /// Objects read, opened and hashed.
    pub objects: u64,
    /// Their plain bytes.
    pub bytes: u64,
    /// What is not as it should be; empty = all is proven.
    pub bad: Vec<Bad>,
    /// What it cost.
    pub cost: Cost,
}

/// What healing the store did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Healed {
    /// Objects that came, proven, from a live tree or a spare.
    pub objects: u64,
    /// Packs written anew because something in them was damaged.
    pub packs: u64,
    /// Manifests written anew from the index of the live tree.
    pub manifests: u64,
    /// Files, manifests and records that nobody has whole any more, with the snapshots that need them. Bounded.
    pub lost: Vec<Bad>,
    /// Snapshots that are no longer trusted because of it.
    pub distrusted: Vec<String>,
    /// What it cost.
    pub cost: Cost,
}

/// One thing in the store that failed its proof.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Bad {
    /// The file within the store, or the object's name.
    pub what: String,
    /// One line.
    pub why: String,
    /// The snapshots that need it, as far as they are known (bounded).
    pub snapshots: Vec<String>,
}

/// What the quick sweep of the live tree found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct SweepReport {
    /// Entries looked at.
    pub entries: u64,
    /// Files that stat could not vouch for and that were read.
    pub hashed: u64,
    /// What differs.
    pub differences: Vec<Difference>,
    /// Pieces that killed repairs left in the trees.
    pub leftovers: u64,
    /// What it cost: the agent paces itself by this.
    pub cost: Cost,
}

/// How much one portion of the slow look may do.
#[derive(Debug, Clone, Copy)]
pub struct Portion {
    /// Its share of a round: one in so many.
    pub of: u64,
    /// And at most this much CPU time, but for the file or block that is at hand.
    pub cpu_ms: f64,
}

/// Where the slow look goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScrubPlace {
    /// In a live tree or a spare.
    Live {
        /// The root's name; one that there is not means the first.
        root: String,
        /// After this path.
        after: Option<Vec<u8>>,
    },
    /// In the manifests.
    Manifests {
        /// After the one of this name.
        after: String,
    },
    /// In the packs.
    Packs {
        /// In this one.
        pack: String,
        /// From this block on.
        block: u32,
    },
}

impl Default for ScrubPlace {
    fn default() -> ScrubPlace {
        ScrubPlace::Live { root: String::new(), after: None }
    }
}

/// What is kept between two portions of the slow look.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubCursor {
    /// Rounds that came to their end.
    pub rounds: u64,
    /// Where it goes on.
    pub place: ScrubPlace,
}

/// What one portion of the slow look found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Scrubbed {
    /// For the next portion.
    pub cursor: ScrubCursor,
    /// Files read.
    pub files: u64,
    /// Blocks opened.
    pub blocks: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Files of the live trees (and the spares, under `spare of ...`) with other bytes than the snapshot says. The quick
    /// look sees them from now on.
    pub damaged: Vec<Difference>,
    /// What became of damage in the store, if there was any.
    pub healed: Option<Healed>,
    /// Everything has been looked at once more.
    pub round_ended: bool,
    /// What it cost.
    pub cost: Cost,
}

/// Bytes on disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Size {
    /// Everything in the store.
    pub bytes: u64,
    /// Of this, packs of objects.
    pub packs_bytes: u64,
    /// Snapshots that can be read.
    pub snapshots: u64,
}

/// What a prune did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Pruned {
    /// Snapshots removed, oldest first.
    pub removed: Vec<String>,
    /// Bytes before.
    pub before_bytes: u64,
    /// Bytes after.
    pub after_bytes: u64,
    /// What must be kept is larger than the limit.
    pub over_limit: bool,
}
