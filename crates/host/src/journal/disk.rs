//! The few things a journal asks of its disk, as a seam: the real one here, one that loses power in the tests.

use rustix::fs::{Mode, OFlags, RenameFlags};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Copies of damaged files and tails that are kept; the newest takes the last place.
const KEPT: u32 = 9;

/// The two files a journal writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Slot {
    /// The journal itself.
    Live,
    /// The one that is being made to take its place.
    Next,
}

/// What a journal needs. A write is durable only after `sync` of its file, a name only after `sync_dir`.
pub trait Disk {
    /// What to call the journal in messages.
    fn name(&self) -> String;
    /// The live file, at most `max` bytes of it; `None` when there is none.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    fn read(&mut self, max: u64) -> io::Result<Option<Vec<u8>>>;
    /// Makes the next file, empty; one left over from before goes.
    ///
    /// # Errors
    /// When it cannot be made.
    fn create_next(&mut self) -> io::Result<()>;
    /// Removes the next file, which could not be finished; its space may be needed.
    ///
    /// # Errors
    /// When it stays.
    fn discard_next(&mut self) -> io::Result<()>;
    /// Writes bytes at an offset; the file grows as needed.
    ///
    /// # Errors
    /// When not all could be written.
    fn write_at(&mut self, slot: Slot, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes a file's content durable.
    ///
    /// # Errors
    /// When that is not certain.
    fn sync(&mut self, slot: Slot) -> io::Result<()>;
    /// Puts the next file in the live file's place, at once.
    ///
    /// # Errors
    /// When it did not happen.
    fn publish(&mut self) -> io::Result<()>;
    /// Moves the live file out of the way, to be kept.
    ///
    /// # Errors
    /// When it did not happen.
    fn set_aside(&mut self) -> io::Result<()>;
    /// Keeps a copy of a tail that is about to be cut off.
    ///
    /// # Errors
    /// When the copy could not be made.
    fn keep_cut(&mut self, tail: &[u8]) -> io::Result<()>;
    /// Makes the names durable.
    ///
    /// # Errors
    /// When that is not certain.
    fn sync_dir(&mut self) -> io::Result<()>;
}

/// A journal on a real file system.
#[derive(Debug)]
pub struct FileDisk {
    path: PathBuf,
    live: Option<File>,
    next: Option<File>,
}

impl FileDisk {
    /// The journal at `path`; its directory must exist.
    #[must_use]
    pub fn new(path: &Path) -> FileDisk {
        FileDisk { path: path.to_path_buf(), live: None, next: None }
    }

    fn with(&self, suffix: &str) -> PathBuf {
        let mut name = self.path.file_name().unwrap_or_default().to_os_string();
        name.push(suffix);
        self.path.with_file_name(name)
    }

    /// The first free name with this suffix, else the last one.
    fn kept(&self, suffix: &str) -> PathBuf {
        let mut all = (1..=KEPT).map(|n| self.with(&format!(".{suffix}-{n}")));
        let free = all.clone().find(|p| p.symlink_metadata().is_err());
        free.or_else(|| all.next_back()).unwrap_or_else(|| self.with(suffix))
    }

    fn file(&mut self, slot: Slot) -> io::Result<&File> {
        let (path, file) = match slot {
            Slot::Live => (self.path.clone(), &mut self.live),
            Slot::Next => (self.with(".next"), &mut self.next),
        };
        if file.is_none() {
            *file = Some(open(&path, OFlags::RDWR)?);
        }
        file.as_ref().ok_or_else(|| io::Error::other("no file"))
    }
}

fn open(path: &Path, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = File::from(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("not a regular file")) }
}

impl Disk for FileDisk {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn read(&mut self, max: u64) -> io::Result<Option<Vec<u8>>> {
        let file = match open(&self.path, OFlags::RDONLY) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut bytes = Vec::new();
        file.take(max).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    fn create_next(&mut self) -> io::Result<()> {
        let path = self.with(".next");
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            Ok(()) | Err(_) => {}
        }
        self.next = Some(open(&path, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)?);
        Ok(())
    }

    fn discard_next(&mut self) -> io::Result<()> {
        self.next = None;
        std::fs::remove_file(self.with(".next"))
    }

    fn write_at(&mut self, slot: Slot, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file(slot)?.write_all_at(bytes, offset)
    }

    fn sync(&mut self, slot: Slot) -> io::Result<()> {
        self.file(slot)?.sync_data()
    }

    fn publish(&mut self) -> io::Result<()> {
        std::fs::rename(self.with(".next"), &self.path)?;
        self.live = self.next.take();
        Ok(())
    }

    fn set_aside(&mut self) -> io::Result<()> {
        self.live = None;
        let kept = self.kept("broken");
        let cwd = rustix::fs::CWD;
        match rustix::fs::renameat_with(cwd, &self.path, cwd, &kept, RenameFlags::NOREPLACE) {
            // All places taken, or a file system without the flag: the last place gets the newest.
            Err(rustix::io::Errno::EXIST | rustix::io::Errno::INVAL) => std::fs::rename(&self.path, &kept),
            Err(e) => Err(e.into()),
            Ok(()) => Ok(()),
        }
    }

    fn keep_cut(&mut self, tail: &[u8]) -> io::Result<()> {
        crate::files::write_atomic(&self.kept("cut"), tail, 0o600).map_err(io::Error::other)
    }

    fn sync_dir(&mut self) -> io::Result<()> {
        File::open(crate::files::parent(&self.path))?.sync_all()
    }
}
