//! A directory tree, remembered file by file: what a command that promises to change nothing is measured by.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What is known of one entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Kind and permission bits, owner, size, time of change in nanoseconds, hash of the content or of the target.
    Exact { mode: u32, owner: (u32, u32), size: u64, mtime_ns: i128, content: Option<blake3::Hash> },
    /// Its owner keeps writing it: only that it is there.
    There,
}

/// Looks at `root` and everything below it; `living` says of which only the presence counts, `skip` what is left out.
pub(crate) fn look(
    root: &Path,
    living: &dyn Fn(&Path) -> bool,
    skip: &dyn Fn(&Path) -> bool,
    into: &mut BTreeMap<PathBuf, Entry>,
) -> std::io::Result<()> {
    if skip(root) {
        return Ok(());
    }
    let meta = root.symlink_metadata()?;
    let is_living = living(root);
    let entry = if is_living {
        Entry::There
    } else {
        let content = if meta.is_file() {
            Some(hash_file(root)?)
        } else if meta.is_symlink() {
            Some(blake3::hash(std::fs::read_link(root)?.as_os_str().as_encoded_bytes()))
        } else {
            None
        };
        // A directory's size and time say what its entries say, and change with a living one among them.
        let (size, mtime_ns) = if meta.is_dir() {
            (0, 0)
        } else {
            (meta.size(), i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec()))
        };
        Entry::Exact { mode: meta.mode(), owner: (meta.uid(), meta.gid()), size, mtime_ns, content }
    };
    into.insert(root.to_owned(), entry);
    if meta.is_dir() && !is_living {
        for entry in std::fs::read_dir(root)? {
            match look(&entry?.path(), living, skip, into) {
                // Gone between the listing and the look: it was never there.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
    }
    Ok(())
}

/// What differs, in words, at most `limit` lines.
pub(crate) fn differences(
    before: &BTreeMap<PathBuf, Entry>,
    after: &BTreeMap<PathBuf, Entry>,
    limit: usize,
) -> Vec<String> {
    let gone = before.iter().filter_map(|(path, was)| match after.get(path) {
        None => Some(format!("{} is gone", path.display())),
        Some(is) if is != was => Some(format!("{} was {was:?}, is {is:?}", path.display())),
        Some(_) => None,
    });
    let new = after.keys().filter(|p| !before.contains_key(*p)).map(|p| format!("{} is new", p.display()));
    gone.chain(new).take(limit).collect()
}

fn hash_file(path: &Path) -> std::io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    let mut file = std::fs::File::open(path)?;
    let mut buffer = vec![0; 256 << 10];
    loop {
        let n = file.read(&mut buffer)?;
        let Some(read) = buffer.get(..n).filter(|r| !r.is_empty()) else { return Ok(hasher.finalize()) };
        hasher.update(read);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(root: &Path) -> BTreeMap<PathBuf, Entry> {
        let mut out = BTreeMap::new();
        let living = |p: &Path| p.extension().is_some_and(|x| x == "log");
        let skip = |p: &Path| p.ends_with("skipped");
        look(root, &living, &skip, &mut out).unwrap();
        out
    }

    #[test]
    fn every_change_that_counts_is_seen_and_no_other() {
        let dir = std::env::temp_dir().join(format!("koboshi-tree-test-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("a/skipped")).unwrap();
        let put = |name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
        put("a/one", "1");
        put("a/living.log", "x");
        let before = all(&dir);
        put("a/living.log", "longer");
        put("a/skipped/new", "x");
        assert!(differences(&before, &all(&dir), 9).is_empty());
        let time = std::fs::metadata(dir.join("a/one")).unwrap().modified().unwrap();
        put("a/one", "2");
        std::fs::File::options().write(true).open(dir.join("a/one")).unwrap().set_modified(time).unwrap();
        put("a/two", "");
        std::fs::remove_file(dir.join("a/living.log")).unwrap();
        let seen = differences(&before, &all(&dir), 9);
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(seen.len(), 3, "{seen:?}");
    }
}
