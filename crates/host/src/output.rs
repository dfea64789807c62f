//! Output of children goes to a file with a bound, never through a pipe: a pipe would block the child when we are slow
//! and end it when we die.
//!
//! The child appends to the file itself; whoever waits for it calls [`trim`] now and then. Where the file system can
//! cut the head off a file (ext4, XFS) nothing is lost but the oldest output; elsewhere the kept half is copied to the
//! front and what the child wrote within those few milliseconds may be lost. Between two trims a file may exceed its
//! limit.

use crate::error::{Context, Result};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Where a child's output goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputFile {
    /// The file; created 0600 and appended to.
    pub path: PathBuf,
    /// It is cut to its newest half of this many bytes when it grows beyond it.
    pub limit_bytes: u64,
}

/// Cuts are made at multiples of this: every file system's block size divides it.
const CUT_ALIGN_BYTES: u64 = 64 << 10;

/// Opens an output file for a child. A symbolic link in its place is refused.
///
/// # Errors
/// When it cannot be created.
pub fn open(path: &Path) -> Result<File> {
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
        .context(|| format!("opening the output file {}", path.display()))?;
    Ok(File::from(fd))
}

/// Cuts an output file to its newest part, at most `limit_bytes` long, if it is longer. Returns how many bytes of
/// old output went. A missing file is short enough.
///
/// # Errors
/// When it cannot be read or cut.
pub fn trim(path: &Path, limit_bytes: u64) -> Result<u64> {
    let what = || format!("trimming the output file {}", path.display());
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(rustix::io::Errno::NOENT) => return Ok(0),
        Err(e) => return Err(e).context(what),
    };
    let len = file.metadata().context(what)?.len();
    if len <= limit_bytes {
        return Ok(0);
    }
    let cut = len.saturating_sub(limit_bytes / 2);
    let aligned = cut - cut % CUT_ALIGN_BYTES;
    if aligned > 0 && len - aligned <= limit_bytes {
        if rustix::fs::fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 0, aligned).is_ok() {
            return Ok(aligned);
        }
    }
    copy_down(&file, cut, len).context(what)?;
    Ok(cut)
}

/// Moves `cut..len` to the front and cuts behind it.
fn copy_down(file: &File, cut: u64, len: u64) -> std::io::Result<()> {
    let mut chunk = vec![0_u8; 64 << 10];
    let (mut from, mut to) = (cut, 0);
    while from < len {
        let n = file.read_at(&mut chunk, from)?;
        if n == 0 {
            break;
        }
        file.write_all_at(chunk.get(..n).unwrap_or_default(), to)?;
        from += n as u64;
        to += n as u64;
    }
    file.set_len(to)
}
