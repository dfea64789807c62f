//! The attributes that `chattr +i` and `+a` set: they keep root itself from changing a file or a directory, and last until
//! they are taken away.

use rustix::fs::{IFlags, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Whether the file system says that nobody may change this; a link is looked at itself.
#[must_use]
pub fn is_set(path: &Path) -> bool {
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    let fixed = StatxAttributes::IMMUTABLE | StatxAttributes::APPEND;
    rustix::fs::statx(rustix::fs::CWD, path, flags, StatxFlags::TYPE)
        .is_ok_and(|s| s.stx_attributes_mask.intersects(fixed) && s.stx_attributes.intersects(fixed))
}

/// Which of the two were set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fixed(IFlags);

/// Takes both attributes away from an entry of an opened directory (`.`: the directory itself), following no link. Which
/// were there and are gone. Not ours to take away, or a file system without them: none.
pub fn lift(dir: BorrowedFd<'_>, name: &[u8]) -> Option<Fixed> {
    rustix::fs::openat(dir, name, OPEN, Mode::empty()).ok().and_then(|fd| lift_opened(&fd))
}

/// Sets again what [`lift`] took away. Whether that succeeded.
pub fn put_back(dir: BorrowedFd<'_>, name: &[u8], fixed: Fixed) -> bool {
    rustix::fs::openat(dir, name, OPEN, Mode::empty()).is_ok_and(|fd| {
        rustix::fs::ioctl_getflags(&fd)
            .is_ok_and(|now| rustix::fs::ioctl_setflags(&fd, now.union(fixed.0)).is_ok())
    })
}

/// The same of what a handle (`O_PATH`) stands for.
pub fn lift_handle(handle: &OwnedFd) -> bool {
    // Only what was really opened can be asked for its attributes.
    let link = format!("/proc/self/fd/{}", handle.as_raw_fd());
    rustix::fs::open(link, OPEN.difference(OFlags::NOFOLLOW), Mode::empty())
        .is_ok_and(|fd| lift_opened(&fd).is_some())
}

/// Does it once more where it is refused because one of these, or the directory it lies in, had been made immutable, and no
/// longer is.
///
/// # Errors
/// Those of `act`.
pub fn freeing<T>(paths: &[&Path], act: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
    match act() {
        Err(Errno::PERM) if paths.iter().filter(|p| lift_path(p)).count() > 0 => act(),
        other => other,
    }
}

fn lift_path(path: &Path) -> bool {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else { return false };
    let Ok(dir) = rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
    else {
        return false;
    };
    let itself = lift(dir.as_fd(), name.as_bytes()).is_some();
    lift(dir.as_fd(), b".").is_some() || itself
}

/// Opening a pipe waits for nobody, and a terminal becomes nobody's.
const OPEN: OFlags = OFlags::RDONLY
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

fn lift_opened(fd: &impl AsFd) -> Option<Fixed> {
    let now = rustix::fs::ioctl_getflags(fd).ok()?;
    let fixed = now.intersection(IFlags::IMMUTABLE.union(IFlags::APPEND));
    let lifted = !fixed.is_empty() && rustix::fs::ioctl_setflags(fd, now.difference(fixed)).is_ok();
    lifted.then_some(Fixed(fixed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_may_change_can_be_changed_again_as_root() {
        // A tmpfs knows no such attributes on older kernels.
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "1").unwrap();
        let opened = |path: &Path| rustix::fs::open(path, OFlags::RDONLY, Mode::empty()).unwrap();
        let top = opened(dir.path());
        assert!(
            !is_set(&file) && lift(top.as_fd(), b"file").is_none() && lift(top.as_fd(), b"none").is_none()
        );
        for (flag, name) in [(IFlags::IMMUTABLE, "file"), (IFlags::APPEND, "file"), (IFlags::IMMUTABLE, ".")]
        {
            let path = dir.path().join(name);
            let fd = opened(&path);
            let now = rustix::fs::ioctl_getflags(&fd).unwrap_or(IFlags::empty());
            if rustix::fs::ioctl_setflags(&fd, now | flag).is_err() {
                println!("left out, not root or no such attributes here");
                return;
            }
            assert!(is_set(&path));
            assert!(
                std::fs::write(dir.path().join(name).join("new"), "").is_err()
                    && std::fs::remove_file(&file).is_err()
            );
            if name == "." {
                let fixed = lift(top.as_fd(), b".").unwrap();
                assert!(!is_set(&path) && put_back(top.as_fd(), b".", fixed) && is_set(&path));
                assert_eq!(lift(top.as_fd(), b"."), Some(fixed));
            } else {
                let handle = rustix::fs::open(&path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()).unwrap();
                assert!(lift_handle(&handle));
            }
            assert!(!is_set(&path));
        }
        std::fs::remove_file(&file).unwrap();
    }
}
