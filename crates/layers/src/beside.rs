//! A file that is written beside the place it is meant for, whole and synced, before it takes that place or is given up.
//!
//! The directory belongs to the node's user: nothing planted there is followed, opened or given away. What is given up
//! leaves nothing behind.

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

/// The file, until it has taken a place.
pub(crate) struct Beside {
    dir: OwnedFd,
    name: String,
    /// What lies at the name is what was written, not what it was exchanged with.
    mine: bool,
}

impl Drop for Beside {
    fn drop(&mut self) {
        if self.mine {
            let _ = rustix::fs::unlinkat(&self.dir, &self.name, AtFlags::empty());
        }
    }
}

impl Beside {
    /// Writes a file of this name into `dir`, of this owner where one is given and with this mode.
    pub(crate) fn write(
        dir: OwnedFd,
        name: String,
        owner: Option<(u32, u32)>,
        mode: u32,
        fill: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> io::Result<Beside> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = freeing(&dir, OsStr::new("."), || {
            rustix::fs::openat(&dir, &name, flags, Mode::RUSR | Mode::WUSR)
        })?;
        // From here on it goes again, whatever fails.
        let beside = Beside { dir, name, mine: true };
        let mut file = File::from(fd);
        fill(&mut file)?;
        if let Some((uid, gid)) = owner {
            std::os::unix::fs::fchown(&file, Some(uid), Some(gid))?;
        }
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode & 0o777))?;
        file.sync_all()?;
        Ok(beside)
    }

    /// Its name in the directory.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Exchanges it with what lies at `place`, which then lies at [`Beside::name`] and is the caller's to move: the place
    /// is never empty in between, and what lay there is never removed by us. Done again it is undone. `false` where the
    /// file system cannot exchange; nothing has changed then.
    pub(crate) fn exchange(&mut self, place: &OsStr) -> io::Result<bool> {
        let exchange =
            || rustix::fs::renameat_with(&self.dir, &self.name, &self.dir, place, RenameFlags::EXCHANGE);
        match freeing(&self.dir, place, exchange) {
            Ok(()) => {
                self.mine = !self.mine;
                Ok(true)
            }
            Err(Errno::INVAL | Errno::NOSYS) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Takes the place of whatever lies there.
    pub(crate) fn replace(&mut self, place: &OsStr) -> io::Result<()> {
        freeing(&self.dir, place, || rustix::fs::renameat(&self.dir, &self.name, &self.dir, place))?;
        self.mine = false;
        Ok(())
    }

    /// Takes an empty place; what came there meanwhile is not written over, where the file system can tell.
    pub(crate) fn take(&mut self, place: &OsStr) -> io::Result<()> {
        match rustix::fs::renameat_with(&self.dir, &self.name, &self.dir, place, RenameFlags::NOREPLACE) {
            Err(Errno::INVAL | Errno::NOSYS) => self.replace(place),
            Err(e) => Err(e.into()),
            Ok(()) => {
                self.mine = false;
                Ok(())
            }
        }
    }

    /// What was renamed stays so after a power cut.
    pub(crate) fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.dir)?)
    }
}

/// Does it once more where what is in the way had been made immutable (`chattr +i`), and is so no longer.
fn freeing<T>(dir: &OwnedFd, place: &OsStr, act: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
    match act() {
        Err(Errno::PERM) if host::immutable::lift(dir.as_fd(), place.as_bytes()).is_some() => act(),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    fn open(dir: &Path) -> OwnedFd {
        rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
    }

    fn write(dir: &Path, text: &str) -> io::Result<Beside> {
        Beside::write(open(dir), ".new".into(), None, 0o640, |file| file.write_all(text.as_bytes()))
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_given_up_or_fails_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        drop(write(dir.path(), "x").unwrap());
        let failed = Beside::write(open(dir.path()), ".new".into(), None, 0o600, |file| {
            file.write_all(b"half")?;
            Err(io::Error::other("no more"))
        });
        assert!(failed.is_err());
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn a_place_is_taken_exchanged_or_replaced_and_never_a_planted_link() {
        let dir = tempfile::tempdir().unwrap();
        let (place, at) = (OsStr::new("place"), dir.path().join("place"));
        let read = || std::fs::read_to_string(&at).unwrap();
        write(dir.path(), "one").unwrap().take(place).unwrap();
        assert_eq!((read().as_str(), names(dir.path())), ("one", vec!["place".to_owned()]));
        assert_eq!(at.metadata().unwrap().permissions().mode() & 0o777, 0o640);
        assert!(write(dir.path(), "two").unwrap().take(place).is_err(), "somebody's came there meanwhile");
        assert_eq!((read().as_str(), names(dir.path()).len()), ("one", 1));
        let mut three = write(dir.path(), "three").unwrap();
        if three.exchange(place).unwrap() {
            let other = dir.path().join(three.name());
            assert_eq!(
                (read().as_str(), std::fs::read_to_string(&other).unwrap().as_str()),
                ("three", "one")
            );
            assert!(three.exchange(place).unwrap() && read() == "one", "undone");
            assert!(three.exchange(place).unwrap());
            three.sync().unwrap();
            drop(three);
            assert_eq!(std::fs::read_to_string(&other).unwrap(), "one", "what lay there is never removed");
            std::fs::remove_file(other).unwrap();
        } else {
            three.replace(place).unwrap();
        }
        assert_eq!(read(), "three");
        std::os::unix::fs::symlink(&at, dir.path().join(".new")).unwrap();
        assert!(write(dir.path(), "planted").is_err());
        assert_eq!(read(), "three");
    }
}
