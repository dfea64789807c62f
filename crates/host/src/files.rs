//! Small file work done the careful way: reads are bounded, writes are whole or not there, directories are private.

use crate::error::{Context, Error, Kind, Result};
use rustix::fs::{FlockOperation, Mode, OFlags};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Reads a whole file of at most `max` bytes. Anything but a regular file or a kernel file is refused without blocking.
///
/// # Errors
/// `NotFound` when missing, `Corrupt` when larger than `max`.
pub fn read_bounded(path: &Path, max: u64) -> Result<Vec<u8>> {
    let what = || format!("reading {}", path.display());
    // Without NONBLOCK a named pipe planted in the file's place would hold us for ever.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).context(what)?);
    if !file.metadata().context(what)?.is_file() {
        return Err(Error::new(Kind::System, what(), "not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(max.saturating_add(1)).read_to_end(&mut bytes).context(what)?;
    if bytes.len() as u64 > max {
        return Err(Error::new(Kind::Corrupt, what(), format!("larger than {max} bytes")));
    }
    Ok(bytes)
}

/// Puts `bytes` in the place of a file: after a crash the old content or the new is there, whole, never a mixture. On
/// return the new one is durable.
///
/// # Errors
/// When it cannot be written; then the old one is untouched and nothing is left beside it.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    put(path, bytes, mode, true)?;
    sync_dir(parent(path))
}

/// The same for what only has a meaning while this boot lasts: readers see the old content or the new, whole. It is not
/// made durable, because on a busy disk that takes seconds for which a recovery would wait.
///
/// # Errors
/// As for [`write_atomic`].
pub fn write_for_now(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    put(path, bytes, mode, false)
}

fn put(path: &Path, bytes: &[u8], mode: u32, durable: bool) -> Result<()> {
    let what = || format!("writing {}", path.display());
    let tmp = beside(path);
    let written = (|| {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(&tmp)?;
        // The mode asked for, whatever our mask is.
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        if durable {
            file.sync_all()?;
        }
        std::fs::rename(&tmp, path)
    })();
    written.map_err(|e| {
        let _ = std::fs::remove_file(&tmp);
        Error::io(what(), &e)
    })
}

/// A name beside `path`, hidden, that nobody else uses.
fn beside(path: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem: String = name.chars().take(100).collect();
    parent(path).join(format!(".{stem}.{}-{}-{n}.tmp", std::process::id(), crate::clock::now().ms))
}

/// The directory that holds `path`.
pub(crate) fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes the names in a directory durable.
///
/// # Errors
/// When it cannot be opened or synced.
pub fn sync_dir(path: &Path) -> Result<()> {
    let dir = File::open(path).context(|| format!("opening the directory {}", path.display()))?;
    dir.sync_all().context(|| format!("syncing the directory {}", path.display()))
}

/// Makes a directory, and those above it, that only we may enter; an existing one must be ours and is made private.
///
/// # Errors
/// `Denied` when it belongs to another user or is not a directory.
pub fn make_private_dir(path: &Path) -> Result<()> {
    const PRIVATE: u32 = 0o700;
    let what = || format!("making the private directory {}", path.display());
    let mut builder = std::fs::DirBuilder::new();
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, PRIVATE);
    builder.recursive(true).create(path).context(what)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let dir = File::from(
        rustix::fs::open(path, flags, Mode::empty())
            .map_err(|e| Error::new(Kind::Denied, what(), format!("not a directory of its own: {e}")))?,
    );
    let meta = dir.metadata().context(what)?;
    let me = rustix::process::geteuid().as_raw();
    if meta.uid() != me {
        return Err(Error::new(Kind::Denied, what(), format!("it belongs to user {}", meta.uid()))
            .hint(format!("remove it, or give it to user {me}")));
    }
    if meta.mode() & 0o777 != PRIVATE {
        dir.set_permissions(std::fs::Permissions::from_mode(PRIVATE)).context(what)?;
    }
    Ok(())
}

/// Room on a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes that we may still write: as root also those that are kept back for root.
    pub free_bytes: u64,
    /// Bytes that a user without privileges may still write: what counts for everything a node's own user does, and all
    /// that koboshi plans with for itself. The reserve is for repairs.
    pub user_bytes: u64,
    /// Its size in bytes.
    pub total_bytes: u64,
    /// Inodes that may still be made; `u64::MAX` where the file system makes them as needed.
    pub free_inodes: u64,
}

/// Room on the file system that holds `path`, or its nearest existing parent.
///
/// # Errors
/// When it cannot be asked.
pub fn free(path: &Path) -> Result<Space> {
    let there = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("."));
    let s = rustix::fs::statvfs(there).context(|| format!("asking the room at {}", there.display()))?;
    Ok(Space::of(&s, rustix::process::geteuid().is_root()))
}

impl Space {
    fn of(s: &rustix::fs::StatVfs, root: bool) -> Space {
        // Root may use the reserve; others may not.
        let blocks = if root { s.f_bfree } else { s.f_bavail };
        Space {
            free_bytes: blocks.saturating_mul(s.f_frsize),
            user_bytes: s.f_bavail.saturating_mul(s.f_frsize),
            total_bytes: s.f_blocks.saturating_mul(s.f_frsize),
            free_inodes: if s.f_files == 0 { u64::MAX } else { s.f_favail },
        }
    }

    /// What a process of this user may still write.
    #[must_use]
    pub fn for_user(&self, uid: u32) -> u64 {
        if uid == 0 { self.free_bytes } else { self.user_bytes }
    }
}

/// Whether two paths lie on one file system (their nearest existing parents are asked).
///
/// # Errors
/// When one cannot be looked at.
pub fn same_fs(a: &Path, b: &Path) -> Result<bool> {
    let dev = |p: &Path| {
        let there = p.ancestors().find(|p| p.symlink_metadata().is_ok()).unwrap_or(Path::new("."));
        there.symlink_metadata().map(|m| m.dev()).context(|| format!("looking at {}", there.display()))
    };
    Ok(dev(a)? == dev(b)?)
}

/// What a tree holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TreeSize {
    /// Entries of every kind, directories included, the top too.
    pub entries: u64,
    /// Sum of file lengths in bytes.
    pub bytes: u64,
    /// Space in use in bytes, a file with several names counted once per name.
    pub disk_bytes: u64,
    /// Whether the count stopped at the limit.
    pub stopped: bool,
}

/// Measures a tree without following links, at most `limit` entries. What vanishes meanwhile is not counted.
///
/// # Errors
/// When the top cannot be looked at.
pub fn tree_size(path: &Path, limit: u64) -> Result<TreeSize> {
    /// The unit of `st_blocks`.
    const BLOCK_BYTES: u64 = 512;
    let top = path.symlink_metadata().context(|| format!("measuring {}", path.display()))?;
    let mut size = TreeSize::default();
    let mut open = vec![(path.to_path_buf(), top)];
    while let Some((path, meta)) = open.pop() {
        if size.entries >= limit {
            size.stopped = true;
            break;
        }
        size.entries += 1;
        size.disk_bytes += meta.blocks() * BLOCK_BYTES;
        if meta.is_file() {
            size.bytes += meta.len();
        }
        if meta.is_dir() {
            for entry in std::fs::read_dir(&path).into_iter().flatten().flatten() {
                if let Ok(meta) = entry.metadata() {
                    open.push((entry.path(), meta));
                }
            }
        }
    }
    Ok(size)
}

/// A lock that ends with its holder, however that ends.
#[derive(Debug)]
pub struct LockFile {
    _file: File,
}

impl LockFile {
    /// Takes the lock and writes our pid into the file; `None` when somebody holds it.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn try_take(path: &Path) -> Result<Option<LockFile>> {
        let what = || format!("taking the lock {}", path.display());
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mut file = File::from(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).context(what)?);
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(e) => return Err(e).context(what),
        }
        file.set_len(0).context(what)?;
        writeln!(file, "{}", std::process::id()).context(what)?;
        Ok(Some(LockFile { _file: file }))
    }

    /// The pid that the file names: who holds the lock, or held it last.
    #[must_use]
    pub fn holder(path: &Path) -> Option<u32> {
        /// A pid and a newline.
        const LIMIT_BYTES: u64 = 32;
        String::from_utf8(read_bounded(path, LIMIT_BYTES).ok()?).ok()?.trim().parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn dir() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_path_buf();
        (dir, path)
    }

    #[test]
    fn reading_is_bounded_and_never_blocks() {
        let (_keep, dir) = dir();
        let file = dir.join("file");
        std::fs::write(&file, b"12345").unwrap();
        assert_eq!(read_bounded(&file, 5).unwrap(), b"12345");
        assert_eq!(read_bounded(&file, 4).unwrap_err().kind, Kind::Corrupt);
        assert_eq!(read_bounded(&dir.join("none"), 4).unwrap_err().kind, Kind::NotFound);
        assert!(read_bounded(&dir, 4).is_err());
        assert!(read_bounded(Path::new("/dev/zero"), 4).is_err());
        let pipe = dir.join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert!(read_bounded(&pipe, 4).is_err());
        assert!(!read_bounded(Path::new("/proc/self/stat"), 4096).unwrap().is_empty(), "length 0, yet full");
    }

    #[test]
    fn a_write_is_whole_with_the_mode_asked_for_and_leaves_nothing_beside() {
        let (_keep, dir) = dir();
        let file = dir.join("file");
        write_atomic(&file, b"one", 0o666).unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o666, "whatever the mask");
        write_atomic(&file, b"two", 0o600).unwrap();
        assert_eq!(
            (std::fs::read(&file).unwrap(), file.metadata().unwrap().mode() & 0o777),
            (b"two".to_vec(), 0o600)
        );
        let victim = dir.join("victim");
        std::fs::write(&victim, b"untouched").unwrap();
        symlink(&victim, dir.join("link")).unwrap();
        write_atomic(&dir.join("link"), b"x", 0o600).unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"untouched", "a link is replaced, not followed");
        assert_eq!(write_atomic(&dir.join("no/dir"), b"x", 0o600).unwrap_err().kind, Kind::NotFound);
        std::fs::create_dir(dir.join("taken")).unwrap();
        assert!(write_atomic(&dir.join("taken"), b"x", 0o600).is_err());
        let mut names: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["file", "link", "taken", "victim"]);
    }

    #[test]
    fn a_private_directory_is_ours_and_nobody_elses() {
        let (_keep, dir) = dir();
        let path = dir.join("a/b");
        make_private_dir(&path).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o700);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        make_private_dir(&path).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o700);
        symlink(&path, dir.join("link")).unwrap();
        assert_eq!(make_private_dir(&dir.join("link")).unwrap_err().kind, Kind::Denied);
        std::fs::write(dir.join("file"), b"").unwrap();
        assert!(make_private_dir(&dir.join("file")).is_err());
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(65_534), None).unwrap();
            let error = make_private_dir(&path).unwrap_err();
            assert!(error.kind == Kind::Denied && error.hint.is_some(), "{error}");
        } else {
            assert_eq!(make_private_dir(Path::new("/")).unwrap_err().kind, Kind::Denied);
        }
    }

    #[test]
    fn a_lock_has_one_holder_and_ends_with_it() {
        let (_keep, dir) = dir();
        let path = dir.join("lock");
        assert_eq!(LockFile::holder(&path), None);
        let held = LockFile::try_take(&path).unwrap().unwrap();
        assert_eq!(LockFile::holder(&path), Some(std::process::id()));
        assert!(LockFile::try_take(&path).unwrap().is_none());
        drop(held);
        assert!(LockFile::try_take(&path).unwrap().is_some());
        symlink(dir.join("victim"), dir.join("link")).unwrap();
        assert!(LockFile::try_take(&dir.join("link")).is_err());
    }

    #[test]
    fn what_is_kept_back_for_root_is_free_for_root_alone() {
        let mut s = rustix::fs::statvfs(".").unwrap();
        (s.f_frsize, s.f_blocks, s.f_bfree, s.f_bavail) = (4_096, 1_000, 50, 10);
        let (root, user) = (Space::of(&s, true), Space::of(&s, false));
        assert_eq!((root.free_bytes, root.user_bytes), (50 * 4_096, 10 * 4_096));
        assert_eq!((user.free_bytes, user.user_bytes), (10 * 4_096, 10 * 4_096));
        assert_eq!((root.for_user(0), root.for_user(1_000)), (50 * 4_096, 10 * 4_096));
    }

    #[test]
    fn room_and_size_are_told() {
        let (_keep, dir) = dir();
        let space = free(&dir.join("not/there/yet")).unwrap();
        assert!(space.total_bytes >= space.free_bytes && space.free_inodes > 0);
        assert!(space.user_bytes <= space.free_bytes);
        assert!(same_fs(&dir, &dir.join("new")).unwrap());
        assert!(!same_fs(&dir, Path::new("/proc")).unwrap());
        std::fs::create_dir(dir.join("d")).unwrap();
        std::fs::write(dir.join("d/f"), [1; 1_000]).unwrap();
        symlink("/", dir.join("out")).unwrap();
        let size = tree_size(&dir, 100).unwrap();
        assert_eq!((size.entries, size.bytes, size.stopped), (4, 1_000, false));
        let size = tree_size(&dir, 2).unwrap();
        assert!(size.entries == 2 && size.stopped);
        assert!(tree_size(&dir.join("none"), 2).is_err());
    }
}
