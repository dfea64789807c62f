//! What was put in place, file by file: so that whoever looks at the disk later can tell a proven program from a damaged
//! one, also without any store, and when the registry's tree is not the one that the last snapshot holds.
//!
//! It counts until a snapshot taken after it is trusted.

use engine::Class;
use host::clock::Deadline;
use host::{Context, Error, Kind, Result, files};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use store::{Difference, DifferenceKind};

/// A proof of the real tree has 6 MB.
const MAX_BYTES: u64 = 64 << 20;
/// Entries of one tree; the real one has 44,000.
const ENTRIES_LIMIT: usize = 400_000;
/// Files that are read to explain differences, before the rest is left unexplained.
const EXPLAIN_LIMIT: usize = 50_000;
const PIECE_BYTES: usize = 128 << 10;

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Entry {
    /// Size in bytes, whether it may be executed, BLAKE3.
    File(u64, bool, String),
    /// Where it points.
    Link(PathBuf),
}

/// A program that was proven when it was put in place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// Its version.
    pub version: String,
    /// When, in seconds of the wall clock: compared with the snapshots' own dates only.
    pub at_s: i64,
    entries: BTreeMap<PathBuf, Entry>,
}

fn file(state_dir: &Path) -> PathBuf {
    state_dir.join("proof.json")
}

impl Proof {
    /// Of a tree that is ours.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of(tree: &Path, version: &str) -> Result<Proof> {
        let mut entries = BTreeMap::new();
        let mut queue = vec![PathBuf::new()];
        while let Some(dir) = queue.pop() {
            let full = tree.join(&dir);
            let what = || format!("read {}", full.display());
            for entry in std::fs::read_dir(&full).context(what)? {
                let entry = entry.context(what)?;
                let path = dir.join(entry.file_name());
                let kind = entry.file_type().context(what)?;
                if kind.is_dir() {
                    queue.push(path);
                    continue;
                }
                if entries.len() >= ENTRIES_LIMIT {
                    return Err(Error::new(Kind::Corrupt, what(), "the tree is absurdly large"));
                }
                let seen = look(&tree.join(&path)).context(what)?;
                let seen =
                    seen.ok_or_else(|| Error::new(Kind::Corrupt, what(), "it holds what is no file"))?;
                entries.insert(path, seen);
            }
        }
        Ok(Proof { version: version.to_owned(), at_s: host::clock::wall().as_second(), entries })
    }

    /// The last one.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn load(state_dir: &Path) -> Result<Option<Proof>> {
        match files::read_bounded(&file(state_dir), MAX_BYTES) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|e| Error::new(Kind::Corrupt, format!("read {}", file(state_dir).display()), e)),
            Err(e) if e.kind == Kind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    pub(super) fn save(&self, state_dir: &Path) -> Result<()> {
        let text = serde_json::to_vec(self).map_err(|e| Error::new(Kind::System, "write the proof", e))?;
        files::write_atomic(&file(state_dir), &text, 0o600)
    }

    pub(super) fn forget(state_dir: &Path) -> Result<()> {
        match std::fs::remove_file(file(state_dir)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("remove {}", file(state_dir).display()), &e))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// What of it is no longer so, by presence, size and mode, or, `thorough`, by every byte. A few lines at most.
    #[must_use]
    pub fn damage(&self, package_dir: &Path, thorough: bool, deadline: Deadline) -> Vec<String> {
        /// As many as a finding carries.
        const LINES: usize = 12;
        /// Kept back for the rest of the look: a look that is killed says nothing at all.
        const RESERVE: std::time::Duration = std::time::Duration::from_secs(3);
        let mut found = Vec::new();
        for (path, entry) in &self.entries {
            if found.len() >= LINES || deadline.left() < RESERVE {
                break;
            }
            let full = package_dir.join(path);
            let right = if thorough {
                look(&full).ok().flatten().as_ref() == Some(entry)
            } else {
                seems(&full, entry)
            };
            if !right {
                found.push(format!("{} is not as it was installed", path.display()));
            }
        }
        found
    }

    /// Takes out of `differences` (between a snapshot and the live program) what is exactly as it was installed.
    pub fn explain(&self, package_dir: &Path, differences: &mut Vec<Difference>) {
        let mut read = 0;
        differences.retain(|d| {
            if d.class != Class::Program || d.root != "program" {
                return true;
            }
            read += 1;
            read > EXPLAIN_LIMIT || !self.explains(package_dir, d)
        });
    }

    fn explains(&self, package_dir: &Path, d: &Difference) -> bool {
        let right = |path: &Path| {
            self.entries
                .get(path)
                .is_some_and(|e| look(&package_dir.join(path)).ok().flatten().as_ref() == Some(e))
        };
        match d.kind {
            DifferenceKind::Missing => !self.below(&d.path).any(|_| true),
            DifferenceKind::Extra
            | DifferenceKind::Changed
            | DifferenceKind::Emptied
            | DifferenceKind::ModeOrOwner
            | DifferenceKind::Attributes
            | DifferenceKind::KindChanged
            | DifferenceKind::LinkTarget => {
                let full = package_dir.join(&d.path);
                if full.symlink_metadata().is_ok_and(|m| m.is_dir()) {
                    // A directory is right when exactly what belongs below it is there.
                    d.kind != DifferenceKind::Extra
                        || (self.below(&d.path).all(|p| right(p)) && self.only(&d.path, &full))
                } else {
                    right(&d.path)
                }
            }
            DifferenceKind::HardLinked | DifferenceKind::TooMany => false,
        }
    }

    /// Everything at or below a path.
    fn below<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = &'a PathBuf> {
        self.entries.range(path.to_path_buf()..).map(|(p, _)| p).take_while(move |p| p.starts_with(path))
    }

    /// Whether nothing lies below a directory but what was installed.
    fn only(&self, below: &Path, full: &Path) -> bool {
        let mut queue = vec![(below.to_owned(), full.to_owned())];
        let mut seen = 0;
        while let Some((path, full)) = queue.pop() {
            for entry in std::fs::read_dir(&full).into_iter().flatten().flatten() {
                seen += 1;
                let here = path.join(entry.file_name());
                let dir = entry.file_type().is_ok_and(|t| t.is_dir());
                if seen > EXPLAIN_LIMIT || (!dir && !self.entries.contains_key(&here)) {
                    return false;
                }
                if dir {
                    queue.push((here, entry.path()));
                }
            }
        }
        seen > 0
    }
}

/// An entry as it lies on the disk; `None` for what is neither file nor link.
fn look(path: &Path) -> std::io::Result<Option<Entry>> {
    let meta = path.symlink_metadata()?;
    if meta.is_symlink() {
        return Ok(Some(Entry::Link(std::fs::read_link(path)?)));
    }
    if !meta.is_file() {
        return Ok(None);
    }
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let mut from = std::fs::File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path)?;
    let mut hash = blake3::Hasher::new();
    let mut piece = vec![0; PIECE_BYTES];
    let mut size = 0;
    loop {
        let n = from.read(&mut piece)?;
        if n == 0 {
            break;
        }
        hash.update(&piece[..n]);
        size += n as u64;
    }
    Ok(Some(Entry::File(size, meta.mode() & 0o100 != 0, hash.finalize().to_hex().to_string())))
}

fn seems(path: &Path, entry: &Entry) -> bool {
    match (path.symlink_metadata(), entry) {
        (Ok(m), Entry::File(size, executable, _)) => {
            m.is_file() && m.len() == *size && (m.mode() & 0o100 != 0) == *executable
        }
        (Ok(m), Entry::Link(_)) => m.is_symlink(),
        (Err(_), _) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Deadline {
        Deadline::after(std::time::Duration::from_secs(20))
    }

    fn tree(dir: &Path) {
        std::fs::create_dir_all(dir.join("dist/new")).unwrap();
        std::fs::write(dir.join("dist/index.js"), "index").unwrap();
        std::fs::write(dir.join("dist/new/a.js"), "a").unwrap();
        std::os::unix::fs::symlink("dist/index.js", dir.join("link")).unwrap();
    }

    #[test]
    fn a_proof_survives_and_finds_what_changed() {
        let dir = tempfile::tempdir().unwrap();
        let state = tempfile::tempdir().unwrap();
        tree(dir.path());
        let proof = Proof::of(dir.path(), "1.2.3").unwrap();
        proof.save(state.path()).unwrap();
        let proof = Proof::load(state.path()).unwrap().unwrap();
        assert!(proof.damage(dir.path(), true, soon()).is_empty());
        std::fs::write(dir.path().join("dist/index.js"), "INDEX").unwrap();
        assert!(proof.damage(dir.path(), false, soon()).is_empty(), "same size: a stat sees nothing");
        assert_eq!(proof.damage(dir.path(), true, soon()).len(), 1);
        std::fs::remove_file(dir.path().join("dist/index.js")).unwrap();
        assert_eq!(proof.damage(dir.path(), false, soon()).len(), 1);
        Proof::forget(state.path()).unwrap();
        assert_eq!(Proof::load(state.path()).unwrap(), None);
    }

    #[test]
    fn only_what_is_as_it_was_installed_is_explained() {
        let dir = tempfile::tempdir().unwrap();
        tree(dir.path());
        let proof = Proof::of(dir.path(), "1.2.3").unwrap();
        let left = |path: &str, kind: DifferenceKind| {
            let mut all =
                vec![Difference { root: "program".into(), path: path.into(), class: Class::Program, kind }];
            proof.explain(dir.path(), &mut all);
            !all.is_empty()
        };
        assert!(!left("dist/index.js", DifferenceKind::Changed));
        assert!(!left("gone-in-this-version.js", DifferenceKind::Missing));
        assert!(!left("dist/new", DifferenceKind::Extra));
        assert!(left("dist/index.js", DifferenceKind::Missing), "it was installed");
        std::fs::write(dir.path().join("dist/new/planted.js"), "x").unwrap();
        assert!(left("dist/new", DifferenceKind::Extra), "something was added");
        assert!(left("dist/new/planted.js", DifferenceKind::Extra));
        std::fs::write(dir.path().join("dist/index.js"), "INDEX").unwrap();
        assert!(left("dist/index.js", DifferenceKind::Changed));
    }
}
