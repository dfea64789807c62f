//! Small file work, and the one seam through which everything of the store becomes durable, visible or gone.
//!
//! No other module syncs, renames or removes: so a test can cut the power at each of these moments, one after the
//! other, and none is forgotten (the feature `fault`, which only tests switch on; without it there is no seam).

use host::{Context, Result};
use rustix::fs::{RenameFlags, renameat_with};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Removes a name from an opened directory.
pub(crate) fn remove_at(dir: impl AsFd, name: &[u8]) -> std::result::Result<(), Errno> {
    moment("remove");
    rustix::fs::unlinkat(dir, name, rustix::fs::AtFlags::empty())
}

/// Just before the next moment.
#[cfg(feature = "fault")]
fn moment(what: &'static str) {
    crate::fault::reached(what);
}

#[cfg(not(feature = "fault"))]
fn moment(_what: &'static str) {}

/// Makes a file's content durable.
pub(crate) fn sync_file(file: &File) -> io::Result<()> {
    moment("sync a file");
    file.sync_all()
}

/// Makes the names in an opened directory durable.
pub(crate) fn sync_opened(dir: impl AsFd) -> std::result::Result<(), Errno> {
    moment("sync a directory");
    rustix::fs::fsync(dir)
}

/// Makes a whole file system durable.
pub(crate) fn sync_file_system(on: impl AsFd) -> std::result::Result<(), Errno> {
    moment("sync a file system");
    rustix::fs::syncfs(on)
}

/// Gives a file another name, in place of what had it.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    moment("rename");
    std::fs::rename(from, to)
}

/// The same within opened directories.
pub(crate) fn rename_at(
    from: impl AsFd,
    name: &[u8],
    to: impl AsFd,
    new: &[u8],
    flags: RenameFlags,
) -> std::result::Result<(), Errno> {
    moment("rename");
    if flags.is_empty() {
        return rustix::fs::renameat(from, name, to, new);
    }
    renameat_with(from, name, to, new, flags)
}

/// Removes a file's name.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    moment("remove");
    std::fs::remove_file(path)
}

/// A new file that only we may read.
pub(crate) fn create_private(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    moment("sync a directory");
    File::open(path).and_then(|d| d.sync_all()).context(|| format!("syncing {}", path.display()))
}

/// Makes a finished file durable and gives it its name.
pub(crate) fn publish(file: &File, from: &Path, to: &Path) -> Result<()> {
    sync_file(file).context(|| format!("syncing {}", from.display()))?;
    rename(from, to).context(|| format!("publishing {}", to.display()))?;
    match to.parent() {
        Some(dir) => sync_dir(dir),
        None => Ok(()),
    }
}

/// CPU time of this process, all threads, in milliseconds.
pub(crate) fn cpu_ms() -> f64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    t.tv_sec as f64 * 1e3 + t.tv_nsec as f64 / 1e6
}

/// CLOCK_BOOTTIME with its fraction, in milliseconds.
pub(crate) fn boot_ms() -> f64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    t.tv_sec as f64 * 1e3 + t.tv_nsec as f64 / 1e6
}

/// A cost being measured.
pub(crate) struct Meter {
    wall_ms: f64,
    cpu_ms: f64,
}

impl Meter {
    pub(crate) fn start() -> Meter {
        Meter { wall_ms: boot_ms(), cpu_ms: cpu_ms() }
    }

    pub(crate) fn cost(&self, added_bytes: u64) -> crate::Cost {
        crate::Cost { wall_ms: boot_ms() - self.wall_ms, cpu_ms: cpu_ms() - self.cpu_ms, added_bytes }
    }
}
