//! Work inside trees that somebody hostile may own: every path is opened beneath its root with symlinks refused, and
//! every change names one entry of an opened directory.

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Names beginning so are ours: never stored, never reported, moved aside when a crash left one.
pub(crate) const OWN_PREFIX: &[u8] = b".koboshi-tmp-";
/// The kernel takes paths below 4096 bytes; longer ones are walked in pieces.
const PIECE_BYTES: usize = 3000;
/// Deepest tree that is followed: more is an attack on whoever walks it.
pub(crate) const MAX_PATH_BYTES: usize = 64 * 1024;

static STEPWISE: AtomicBool = AtomicBool::new(false);

/// Opens a relative path beneath a directory, following no symlink at all and never leaving it.
pub(crate) fn open_beneath(
    dir: BorrowedFd<'_>,
    path: &[u8],
    flags: OFlags,
    mode: Mode,
) -> Result<OwnedFd, Errno> {
    if path.len() <= PIECE_BYTES {
        return open_piece(dir, path, flags, mode);
    }
    let mut at: Option<OwnedFd> = None;
    let mut rest = path;
    while rest.len() > PIECE_BYTES {
        let Some(cut) = rest[..PIECE_BYTES].iter().rposition(|b| *b == b'/') else {
            return Err(Errno::NAMETOOLONG);
        };
        let from = at.as_ref().map_or(dir, AsFd::as_fd);
        let next = open_piece(
            from,
            &rest[..cut],
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        at = Some(next);
        rest = &rest[cut + 1..];
    }
    open_piece(at.as_ref().map_or(dir, AsFd::as_fd), rest, flags, mode)
}

fn open_piece(dir: BorrowedFd<'_>, path: &[u8], flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    if !STEPWISE.load(Ordering::Relaxed) {
        match openat2(
            dir,
            path,
            flags,
            mode,
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        ) {
            // Older kernels do not know the call and some container filters forbid it.
            Err(Errno::NOSYS | Errno::PERM) => {}
            // A rename elsewhere on the system may race with the kernel's check for `..`; ours has none: try again.
            Err(Errno::AGAIN) => return open_piece(dir, path, flags, mode),
            other => return other,
        }
    }
    let fd = open_stepwise(dir, path, flags, mode)?;
    STEPWISE.store(true, Ordering::Relaxed);
    Ok(fd)
}

fn open_stepwise(dir: BorrowedFd<'_>, path: &[u8], flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    let mut parts = path.split(|b| *b == b'/').filter(|p| !p.is_empty() && *p != b".").peekable();
    let mut at: Option<OwnedFd> = None;
    while let Some(part) = parts.next() {
        if part == b".." {
            return Err(Errno::XDEV);
        }
        let from = at.as_ref().map_or(dir, AsFd::as_fd);
        if parts.peek().is_none() {
            return openat(from, part, flags, mode);
        }
        at = Some(openat(
            from,
            part,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )?);
    }
    openat(dir, c".", flags, mode)
}

/// Where one root lies: its parent directory, opened, and its name there. Its own directory may be missing.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    top: Arc<OwnedFd>,
    name: Vec<u8>,
    pub(crate) path: PathBuf,
}

/// Flags for a directory that will be listed.
pub(crate) const DIR: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Why a root's path cannot be used as it stands.
pub(crate) enum NoBase {
    /// The directory it lies in is missing.
    ParentMissing,
    /// Anything else.
    Other(Errno),
}

impl Base {
    /// Opens the directory that the root lies in, following no symlink on the way.
    pub(crate) fn open(path: &Path) -> Result<Base, NoBase> {
        let (parent, name) = split(path).ok_or(NoBase::Other(Errno::INVAL))?;
        match open_absolute(parent) {
            Ok(top) => Ok(Base { top: Arc::new(top), name: name.to_vec(), path: path.to_owned() }),
            Err(Errno::NOENT) => Err(NoBase::ParentMissing),
            Err(e) => Err(NoBase::Other(e)),
        }
    }

    /// The same, making missing directories on the way: owned like the deepest that exists, mode 0755.
    pub(crate) fn open_making_parents(path: &Path) -> Result<Base, Errno> {
        Base::making_parents_in(open_absolute(Path::new("/"))?, path, path)
    }

    /// The same for what will lie at `path` and is `within` a directory that may stand elsewhere for now.
    pub(crate) fn making_parents_in(mut dir: OwnedFd, within: &Path, path: &Path) -> Result<Base, Errno> {
        let parent = within.parent().ok_or(Errno::INVAL)?;
        let name = within.file_name().ok_or(Errno::INVAL)?.as_bytes();
        for part in parent.components() {
            let part = match part {
                Component::Normal(part) => part,
                Component::ParentDir => return Err(Errno::INVAL),
                Component::Prefix(_) | Component::RootDir | Component::CurDir => continue,
            };
            let next = match open_beneath(dir.as_fd(), part.as_bytes(), DIR, Mode::empty()) {
                Err(Errno::NOENT) => {
                    let like = rustix::fs::fstat(&dir)?;
                    rustix::fs::mkdirat(&dir, part, Mode::from_raw_mode(0o755))?;
                    let made = open_beneath(dir.as_fd(), part.as_bytes(), DIR, Mode::empty())?;
                    let (uid, gid) =
                        (rustix::fs::Uid::from_raw(like.st_uid), rustix::fs::Gid::from_raw(like.st_gid));
                    // Without privilege it is ours and so is the parent: nothing to give away.
                    let _ = rustix::fs::fchown(&made, Some(uid), Some(gid));
                    made
                }
                other => other?,
            };
            dir = next;
        }
        Ok(Base { top: Arc::new(dir), name: name.to_vec(), path: path.to_owned() })
    }

    /// The directory the root lies in.
    pub(crate) fn top(&self) -> BorrowedFd<'_> {
        self.top.as_fd()
    }

    /// A path relative to the root, as seen from [`Base::top`].
    pub(crate) fn full(&self, rel: &[u8]) -> Vec<u8> {
        let mut full = Vec::with_capacity(self.name.len() + 1 + rel.len());
        full.extend_from_slice(&self.name);
        if !rel.is_empty() {
            full.push(b'/');
            full.extend_from_slice(rel);
        }
        full
    }

    /// Opens something of the root.
    pub(crate) fn open_at(&self, rel: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
        open_beneath(self.top(), &self.full(rel), flags, Mode::empty())
    }

    /// The directory that holds `rel`, opened, and the name of `rel` in it.
    pub(crate) fn parent_of(&self, rel: &[u8]) -> Result<(OwnedFd, Vec<u8>), Errno> {
        if rel.is_empty() {
            return Ok((rustix::io::fcntl_dupfd_cloexec(self.top(), 0)?, self.name.clone()));
        }
        let (parent, name) = match rel.iter().rposition(|b| *b == b'/') {
            Some(cut) => (&rel[..cut], &rel[cut + 1..]),
            None => (&rel[..0], rel),
        };
        Ok((self.open_at(parent, DIR)?, name.to_vec()))
    }
}

fn split(path: &Path) -> Option<(&Path, &[u8])> {
    if !path.is_absolute() || path.components().any(|c| matches!(c, Component::ParentDir)) {
        return None;
    }
    Some((path.parent()?, path.file_name()?.as_bytes()))
}

fn open_absolute(path: &Path) -> Result<OwnedFd, Errno> {
    let root = rustix::fs::open("/", DIR, Mode::empty())?;
    let rel = path.as_os_str().as_bytes();
    let rel = &rel[rel.iter().take_while(|b| **b == b'/').count()..];
    if rel.is_empty() { Ok(root) } else { open_beneath(root.as_fd(), rel, DIR, Mode::empty()) }
}

/// What the kernel says of one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) nlink: u64,
    pub(crate) size: u64,
    pub(crate) blocks: u64,
    pub(crate) mtime_ns: i64,
    pub(crate) ctime_ns: i64,
    pub(crate) ino: u64,
    pub(crate) dev: u64,
}

impl Stat {
    pub(crate) fn of(s: &rustix::fs::Stat) -> Stat {
        let ns = |sec: i64, nsec: u64| {
            sec.saturating_mul(1_000_000_000).saturating_add(i64::try_from(nsec).unwrap_or(0))
        };
        #[allow(
            clippy::useless_conversion,
            clippy::unnecessary_cast,
            reason = "widths differ by architecture"
        )]
        Stat {
            mode: s.st_mode as u32,
            uid: s.st_uid,
            gid: s.st_gid,
            nlink: s.st_nlink as u64,
            size: u64::try_from(s.st_size).unwrap_or(0),
            blocks: u64::try_from(s.st_blocks).unwrap_or(0),
            mtime_ns: ns(s.st_mtime as i64, s.st_mtime_nsec as u64),
            ctime_ns: ns(s.st_ctime as i64, s.st_ctime_nsec as u64),
            ino: s.st_ino as u64,
            dev: s.st_dev as u64,
        }
    }

    pub(crate) fn at(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Stat, Errno> {
        rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map(|s| Stat::of(&s))
    }

    pub(crate) fn file_type(&self) -> u32 {
        self.mode & 0o170_000
    }
    pub(crate) fn is_dir(&self) -> bool {
        self.file_type() == 0o040_000
    }
    pub(crate) fn is_file(&self) -> bool {
        self.file_type() == 0o100_000
    }
    pub(crate) fn is_link(&self) -> bool {
        self.file_type() == 0o120_000
    }
    /// The same file with nothing changed since, as far as stat can tell.
    pub(crate) fn same(&self, other: &Stat) -> bool {
        self.ino == other.ino
            && self.size == other.size
            && self.mtime_ns == other.mtime_ns
            && self.ctime_ns == other.ctime_ns
    }
}

/// Opens the entry itself for changing its attributes: no symlink followed, no permission needed.
pub(crate) fn handle(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Changes the mode of what a handle names (the kernel has no fchmod for handles before 6.6).
pub(crate) fn chmod_handle(fd: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
    use std::os::fd::AsRawFd;
    rustix::fs::chmod(format!("/proc/self/fd/{}", fd.as_raw_fd()), Mode::from_raw_mode(mode))
}
