//! Small file work inside the store directory, which belongs to koboshi alone.

use host::{Context, Result};
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A new file that only we may read.
pub(crate) fn create_private(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).mode(0o600).open(path)
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|d| d.sync_all()).context(|| format!("syncing {}", path.display()))
}

/// Makes a finished file durable and gives it its name.
pub(crate) fn publish(file: &File, from: &Path, to: &Path) -> Result<()> {
    file.sync_all().context(|| format!("syncing {}", from.display()))?;
    std::fs::rename(from, to).context(|| format!("publishing {}", to.display()))?;
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
