//! The store directory: what lies where, who may write, and which snapshots there are.

use crate::key::Key;
use crate::seal::{self, FileId, FileKind};
use crate::tree::TreeReader;
use crate::{Root, SnapshotInfo, Trust, files, hex};
use host::clock::Deadline;
use host::{Context, Error, Kind, Result};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const FORMAT_WORDS: &str = "koboshi-store";
/// How long a lock that somebody else holds is waited for between two looks.
const LOCK_PAUSE_MS: u64 = 20;
/// Snapshots a store may list: far more than prune leaves, few enough to hold.
const MAX_SNAPSHOTS: usize = 100_000;

/// One root within a snapshot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RootRef {
    pub(crate) root: Root,
    pub(crate) tree: String,
    pub(crate) entries: u64,
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    #[serde(with = "crate::stamp")]
    pub(crate) taken: jiff::Timestamp,
}

impl RootRef {
    pub(crate) fn tree_id(&self) -> Result<FileId> {
        hex::decode(&self.tree).ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("reading root {}", self.root.name), "its manifest has no name")
        })
    }
}

/// A snapshot's own record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Head {
    pub(crate) info: SnapshotInfo,
    pub(crate) trees: Vec<RootRef>,
}

#[derive(Serialize, Deserialize)]
struct TrustRecord {
    snapshot: String,
    trust: Trust,
}

/// Ids of snapshots that cannot be read, and why.
pub(crate) type Unreadable = Vec<(String, Error)>;

/// Directory, key, and where things lie.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) dir: PathBuf,
    pub(crate) key: Key,
}

/// A lock file held; released when dropped or when the process dies.
#[derive(Debug)]
pub(crate) struct Held {
    _file: File,
}

impl Layout {
    pub(crate) fn create(dir: &Path, key: Key) -> Result<Layout> {
        let layout = Layout { dir: dir.to_owned(), key };
        for part in ["", "packs", "trees", "snapshots", "trust", "index", "tmp"] {
            let path = dir.join(part);
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .context(|| format!("making the store directory {}", path.display()))?;
        }
        let format = dir.join("FORMAT");
        if !format.exists() {
            std::fs::write(&format, format!("{FORMAT_WORDS} {}\n", seal::FORMAT_VERSION))
                .context(|| format!("writing {}", format.display()))?;
            files::sync_dir(dir)?;
            if let Some(parent) = dir.parent() {
                files::sync_dir(parent)?;
            }
        }
        layout.check_format()?;
        Ok(layout)
    }

    pub(crate) fn open(dir: &Path, key: Key) -> Result<Layout> {
        if !dir.join("packs").is_dir() {
            return Err(Error::new(
                Kind::NotFound,
                format!("opening the store {}", dir.display()),
                "there is no store",
            )
            .hint("`koboshi snapshot create` makes the first snapshot"));
        }
        let layout = Layout { dir: dir.to_owned(), key };
        layout.check_format()?;
        Ok(layout)
    }

    /// Refuses a newer store; a damaged word is no reason to refuse, since each file says its own format.
    fn check_format(&self) -> Result<()> {
        let text = std::fs::read(self.dir.join("FORMAT")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let version = text.strip_prefix(FORMAT_WORDS).and_then(|v| v.trim().parse::<u16>().ok());
        match version {
            Some(v) if v > seal::FORMAT_VERSION => Err(Error::new(
                Kind::Usage,
                format!("opening the store {}", self.dir.display()),
                format!("its format is {v}, this koboshi knows {}", seal::FORMAT_VERSION),
            )
            .hint("use the koboshi that wrote it, or a newer one")),
            Some(_) | None => Ok(()),
        }
    }

    pub(crate) fn packs(&self) -> PathBuf {
        self.dir.join("packs")
    }
    pub(crate) fn tmp(&self) -> PathBuf {
        self.dir.join("tmp")
    }
    pub(crate) fn tmp_file(&self) -> Result<PathBuf> {
        Ok(self.tmp().join(hex::encode(&seal::new_id()?)))
    }
    pub(crate) fn tree_path(&self, tree: &str) -> PathBuf {
        self.dir.join("trees").join(format!("{tree}.tree"))
    }
    pub(crate) fn index_path(&self, root: &str) -> PathBuf {
        // A root's name is free text; its hash is a file name.
        self.dir
            .join("index")
            .join(format!("{}.index", hex::encode(&blake3::hash(root.as_bytes()).as_bytes()[..16])))
    }
    fn head_path(&self, id: &str) -> PathBuf {
        self.dir.join("snapshots").join(format!("{id}.snapshot"))
    }
    fn trust_path(&self, id: &str) -> PathBuf {
        self.dir.join("trust").join(format!("{id}.trust"))
    }

    /// Takes one of the store's locks.
    fn lock(&self, name: &str, how: FlockOperation, deadline: Deadline) -> Result<Option<Held>> {
        let path = self.dir.join(name);
        let what = || format!("locking {}", path.display());
        let file = {
            use std::os::unix::fs::OpenOptionsExt;
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .context(what)?
        };
        loop {
            match rustix::fs::flock(&file, how) {
                Ok(()) => return Ok(Some(Held { _file: file })),
                Err(rustix::io::Errno::WOULDBLOCK) if deadline.passed() => return Ok(None),
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    std::thread::sleep(Duration::from_millis(LOCK_PAUSE_MS));
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::io(what(), &std::io::Error::from(e))),
            }
        }
    }

    /// Only one snapshot, prune or change of trust at a time.
    pub(crate) fn write_lock(&self, deadline: Deadline) -> Result<Held> {
        self.lock("write.lock", FlockOperation::NonBlockingLockExclusive, deadline)?.ok_or_else(|| {
            Error::new(
                Kind::TimedOut,
                format!("writing to the store {}", self.dir.display()),
                "another koboshi process is writing to it",
            )
            .hint("wait for the other snapshot or prune to end")
        })
    }

    /// Only one repair at a time; it never waits for a snapshot.
    pub(crate) fn repair_lock(&self, deadline: Deadline) -> Result<Held> {
        self.lock("repair.lock", FlockOperation::NonBlockingLockExclusive, deadline)?.ok_or_else(|| {
            Error::new(Kind::TimedOut, "repairing", "another koboshi process is repairing from this store")
        })
    }

    /// Keeps a prune from deleting packs meanwhile. A reader that cannot have it in a second reads on: the worst
    /// that a prune can do to it is a missing object, which has its own way out.
    pub(crate) fn read_lock(&self) -> Option<Held> {
        let soon = Deadline::after(Duration::from_secs(1));
        self.lock("read.lock", FlockOperation::NonBlockingLockShared, soon).ok().flatten()
    }

    /// Waits until nobody reads; for a prune's deletions.
    pub(crate) fn no_readers(&self, deadline: Deadline) -> Result<Option<Held>> {
        self.lock("read.lock", FlockOperation::NonBlockingLockExclusive, deadline)
    }

    /// Removes what a crash left unpublished. Only under the write lock.
    pub(crate) fn tidy(&self) -> Result<()> {
        let tmp = self.tmp();
        for entry in std::fs::read_dir(&tmp).context(|| format!("listing {}", tmp.display()))? {
            let path = entry.context(|| format!("listing {}", tmp.display()))?.path();
            files::remove(&path).context(|| format!("removing {}", path.display()))?;
        }
        Ok(())
    }

    /// Ids of all snapshots, oldest first.
    pub(crate) fn ids(&self) -> Result<Vec<String>> {
        let dir = self.dir.join("snapshots");
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&dir).context(|| format!("listing {}", dir.display()))? {
            let path = entry.context(|| format!("listing {}", dir.display()))?.path();
            if path.extension().is_some_and(|e| e == "snapshot")
                && let Some(id) = path.file_stem().and_then(|s| s.to_str())
            {
                ids.push(id.to_owned());
            }
            if ids.len() >= MAX_SNAPSHOTS {
                break;
            }
        }
        ids.sort();
        Ok(ids)
    }

    /// One snapshot's record, with its trust.
    pub(crate) fn head(&self, id: &str) -> Result<Head> {
        let what = || format!("reading snapshot {id}");
        if !is_id(id) {
            return Err(Error::new(Kind::Usage, what(), "that is not a snapshot's id")
                .hint("`koboshi snapshot list` shows them"));
        }
        let bytes =
            seal::read_small(&self.head_path(id), FileKind::Head, &self.key).map_err(|e| match e.kind {
                Kind::NotFound => Error::new(Kind::NotFound, what(), "there is no such snapshot")
                    .hint("`koboshi snapshot list` shows them"),
                Kind::Usage
                | Kind::TimedOut
                | Kind::Corrupt
                | Kind::NoSpace
                | Kind::Denied
                | Kind::System => Error { what: what(), ..e },
            })?;
        let mut head: Head =
            serde_json::from_slice(&bytes).map_err(|e| Error::new(Kind::Corrupt, what(), e))?;
        if head.info.id != id {
            return Err(Error::new(Kind::Corrupt, what(), "the file holds another snapshot"));
        }
        head.info.trust = self.trust(id);
        Ok(head)
    }

    /// A damaged or missing record means no trust: never more than was given.
    fn trust(&self, id: &str) -> Trust {
        seal::read_small(&self.trust_path(id), FileKind::Trust, &self.key)
            .ok()
            .and_then(|b| serde_json::from_slice::<TrustRecord>(&b).ok())
            .filter(|r| r.snapshot == id)
            .map_or(Trust::Candidate, |r| r.trust)
    }

    pub(crate) fn write_trust(&self, id: &str, trust: Trust) -> Result<()> {
        let record = TrustRecord { snapshot: id.to_owned(), trust };
        let bytes = serde_json::to_vec(&record).map_err(|e| Error::new(Kind::System, "writing trust", e))?;
        let (file, tmp) = seal::write_small(self.tmp_file()?, FileKind::Trust, &self.key, &bytes)?;
        files::publish(&file, &tmp, &self.trust_path(id))
    }

    /// Publishes a snapshot: from here on it exists.
    pub(crate) fn write_head(&self, head: &Head) -> Result<()> {
        let bytes =
            serde_json::to_vec(head).map_err(|e| Error::new(Kind::System, "writing the snapshot", e))?;
        let (file, tmp) = seal::write_small(self.tmp_file()?, FileKind::Head, &self.key, &bytes)?;
        files::publish(&file, &tmp, &self.head_path(&head.info.id))
    }

    pub(crate) fn remove_head(&self, id: &str) -> Result<()> {
        for path in [self.head_path(id), self.trust_path(id)] {
            match files::remove(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io(format!("removing {}", path.display()), &e));
                }
                Ok(()) | Err(_) => {}
            }
        }
        files::sync_dir(&self.dir.join("snapshots"))
    }

    /// Every snapshot that can be read, oldest first, and what is wrong with the others.
    pub(crate) fn heads(&self) -> Result<(Vec<Head>, Unreadable)> {
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for id in self.ids()? {
            match self.head(&id) {
                Ok(h) => good.push(h),
                // Pruned since it was listed.
                Err(e) if e.kind == Kind::NotFound => {}
                Err(e) => bad.push((id, e)),
            }
        }
        Ok((good, bad))
    }

    /// Opens a root's manifest.
    pub(crate) fn tree(&self, r: &RootRef) -> Result<TreeReader> {
        TreeReader::tree(&self.tree_path(&r.tree), &self.key, r.tree_id()?)
    }

    /// Reads a manifest to its end once, so that nothing is begun with one that is cut short or damaged.
    pub(crate) fn prove_tree(&self, r: &RootRef) -> Result<()> {
        let mut tree = self.tree(r)?;
        while tree.next()?.is_some() {}
        Ok(())
    }
}

/// The id of snapshot `number`: sorts by number, and two stores do not share one.
pub(crate) fn make_id(number: u64) -> Result<String> {
    let id = seal::new_id()?;
    Ok(format!("{number:08}-{}", hex::encode(&id[..3])))
}

/// The number in an id.
pub(crate) fn number_of(id: &str) -> Option<u64> {
    id.split_once('-')?.0.parse().ok()
}

fn is_id(id: &str) -> bool {
    !id.is_empty() && id.len() <= 64 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}
