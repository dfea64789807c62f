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
    if aligned > 0
        && len - aligned <= limit_bytes
        && rustix::fs::fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 0, aligned).is_ok()
    {
        return Ok(aligned);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn the_newest_output_is_kept_and_the_writer_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        assert_eq!(trim(&path, 100).unwrap(), 0, "missing is short enough");
        let mut writer = open(&path).unwrap();
        let limit = 512 << 10;
        for n in 0..100_000 {
            writeln!(writer, "line {n:08}").unwrap();
        }
        let cut = trim(&path, limit).unwrap();
        assert!(cut > 0);
        writeln!(writer, "the last").unwrap();
        let kept = std::fs::read_to_string(&path).unwrap();
        assert!(kept.len() as u64 <= limit && kept.len() as u64 >= limit / 4, "{}", kept.len());
        assert!(kept.ends_with("line 00099999\nthe last\n"));
        assert_eq!(trim(&path, limit).unwrap(), 0);
    }

    #[test]
    fn small_limits_are_kept_by_copying() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let mut writer = open(&path).unwrap();
        writer.write_all(&[b'a'; 1_000]).unwrap();
        writer.write_all(&[b'z'; 60]).unwrap();
        assert_eq!(trim(&path, 100).unwrap(), 1_010);
        writer.write_all(b"!").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), [&[b'z'; 50][..], b"!"].concat());
    }

    #[test]
    fn a_link_in_its_place_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        std::os::unix::fs::symlink(dir.path().join("victim"), &path).unwrap();
        assert!(open(&path).is_err());
        assert!(trim(&path, 1).is_err());
        assert!(!dir.path().join("victim").exists());
    }
}
