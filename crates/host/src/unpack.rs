//! Unpacks an npm tarball into a fresh directory.
//!
//! Guarantees: nothing is written outside the destination, whatever the archive says: absolute paths, `..`,
//! links that leave it, entries that pass through a link, devices, absurd sizes and counts all end it with
//! an error and the destination is removed again. Modes are reduced to "may be executed or not", so no archive sets
//! a set-user-id bit. The gzip checksum is verified to the last byte. Memory use does not depend on the archive.

use crate::error::{Context, Error, Kind, Result};
use flate2::bufread::GzDecoder;
use std::collections::HashSet;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

/// Pieces files are copied in.
const PIECE_BYTES: usize = 128 << 10;
/// Largest extended header (long names) accepted; a path has at most 4 KiB.
const EXTENSION_LIMIT_BYTES: u64 = 64 << 10;
/// Entries looked at in search of one.
const MAX_SEARCHED: usize = 200_000;
/// Deepest nesting accepted; npm's deepest real trees have about 20 levels.
const DEPTH_LIMIT: usize = 64;
/// Bytes of archive framing allowed per entry besides its content.
const FRAME_BYTES: u64 = 4 << 10;

/// How much an archive may hold.
#[derive(Debug, Clone, Copy)]
pub struct UnpackLimits {
    /// Entries of every kind.
    pub files: u64,
    /// Bytes of content.
    pub bytes: u64,
}

impl Default for UnpackLimits {
    /// Several times what the largest real package holds.
    fn default() -> UnpackLimits {
        UnpackLimits { files: 200_000, bytes: 4 << 30 }
    }
}

/// What was unpacked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Files and links.
    pub files: u64,
    /// Bytes of content.
    pub bytes: u64,
}

/// Unpacks a gzipped tar into `dest`, which must be absent or empty, dropping the first `strip` parts of every
/// path. `progress` gets files and bytes done. On an error nothing of it remains.
pub fn unpack_tgz(
    file: &Path,
    dest: &Path,
    strip: usize,
    limits: UnpackLimits,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Unpacked> {
    let from = File::open(file).context(|| format!("opening {}", file.display()))?;
    unpack_from(file, from, dest, strip, limits, progress)
}

/// Reads one file out of a gzipped tar without unpacking it: its path with the first part dropped. `NotFound` when there
/// is none within the limits. `name` is for messages.
pub fn read_file(name: &Path, from: impl Read, path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let what = || format!("reading {} in {}", path.display(), name.display());
    let gz = GzDecoder::new(BufReader::with_capacity(PIECE_BYTES, from));
    let mut archive = tar::Archive::new(gz.take(UnpackLimits::default().bytes));
    for entry in archive.entries().context(what)?.take(MAX_SEARCHED) {
        let mut entry = entry.context(what)?;
        let here = entry.path().context(what)?;
        let parts: PathBuf = here.components().filter(|c| *c != Component::CurDir).skip(1).collect();
        if parts == path && entry.header().entry_type().is_file() {
            let mut bytes = Vec::new();
            entry.by_ref().take(max_bytes.saturating_add(1)).read_to_end(&mut bytes).context(what)?;
            if bytes.len() as u64 > max_bytes {
                return Err(Error::new(
                    Kind::Corrupt,
                    what(),
                    format!("it is larger than {max_bytes} bytes"),
                ));
            }
            return Ok(bytes);
        }
    }
    Err(Error::new(Kind::NotFound, what(), "it is not there"))
}

/// [`unpack_tgz`] from bytes that are at hand, for example because they were just proven: what is unpacked is then what was
/// proven, whoever may write to the file they came from. `name` is for messages.
pub fn unpack_from(
    name: &Path,
    from: impl Read,
    dest: &Path,
    strip: usize,
    limits: UnpackLimits,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Unpacked> {
    let was_there = prepare(dest)?;
    let unpacking = Unpacking::new(name, dest, strip, limits);
    let done = unpacking.run(from, progress);
    if done.is_err() {
        clear(dest, was_there);
    }
    done
}

/// Makes sure the destination is an empty directory of its own; says whether it existed.
fn prepare(dest: &Path) -> Result<bool> {
    let what = || format!("preparing {}", dest.display());
    match dest.symlink_metadata() {
        Ok(meta) if meta.is_dir() => {
            if std::fs::read_dir(dest).context(what)?.next().is_some() {
                return Err(Error::new(Kind::Usage, what(), "the directory is not empty"));
            }
            Ok(true)
        }
        Ok(_) => Err(Error::new(Kind::Usage, what(), "it is not a directory")),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            DirBuilder::new().mode(0o755).recursive(true).create(dest).context(what)?;
            Ok(false)
        }
        Err(e) => Err(Error::io(what(), &e)),
    }
}

/// Takes back what a failed run left. Best effort: the error that led here matters more.
fn clear(dest: &Path, was_there: bool) {
    if !was_there {
        let _ = std::fs::remove_dir_all(dest);
        return;
    }
    for entry in std::fs::read_dir(dest).into_iter().flatten().flatten() {
        let path = entry.path();
        let _ = match entry.file_type() {
            Ok(kind) if kind.is_dir() => std::fs::remove_dir_all(path),
            Ok(_) | Err(_) => std::fs::remove_file(path),
        };
    }
}

/// One run, with what it has made so far.
struct Unpacking<'a> {
    file: &'a Path,
    dest: &'a Path,
    strip: usize,
    limits: UnpackLimits,
    folders: HashSet<PathBuf>,
    links: HashSet<PathBuf>,
    done: Unpacked,
    entries: u64,
}

/// What the extended headers before an entry say of it.
#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

impl<'a> Unpacking<'a> {
    fn new(file: &'a Path, dest: &'a Path, strip: usize, limits: UnpackLimits) -> Unpacking<'a> {
        let (folders, links) = (HashSet::from([PathBuf::new()]), HashSet::new());
        Unpacking { file, dest, strip, limits, folders, links, done: Unpacked::default(), entries: 0 }
    }

    fn bad(&self, why: impl std::fmt::Display) -> Error {
        Error::new(Kind::Corrupt, format!("unpacking {}", self.file.display()), why)
    }

    fn run(mut self, from: impl Read, progress: &mut dyn FnMut(u64, u64)) -> Result<Unpacked> {
        let gz = GzDecoder::new(BufReader::with_capacity(PIECE_BYTES, from));
        let most = self.limits.bytes.saturating_add(self.limits.files.saturating_mul(FRAME_BYTES));
        let mut archive = tar::Archive::new(gz.take(most));
        let mut piece = vec![0; PIECE_BYTES];
        let mut extension = Extension::default();
        let entries = archive.entries().map_err(|e| self.bad(e))?.raw(true);
        for entry in entries {
            let mut entry = entry.map_err(|e| self.bad(e))?;
            self.entries += 1;
            if self.entries > self.limits.files {
                return Err(self.bad(format!("it holds more than {} entries", self.limits.files)));
            }
            if self.extends(&mut entry, &mut extension)? {
                continue;
            }
            self.place(&mut entry, &std::mem::take(&mut extension), &mut piece)?;
            progress(self.done.files, self.done.bytes);
        }
        // The checksum stands behind the archive's end.
        let mut gz = archive.into_inner();
        std::io::copy(&mut gz, &mut std::io::sink()).map_err(|e| self.bad(e))?;
        if gz.limit() == 0 {
            return Err(self.bad(format!("it holds more than {} bytes", self.limits.bytes)));
        }
        if self.done.files == 0 {
            return Err(self.bad("it holds no file"));
        }
        Ok(self.done)
    }

    /// Takes in an extended header; `false` when the entry is a thing of its own.
    fn extends<R: Read>(&self, entry: &mut tar::Entry<'_, R>, extension: &mut Extension) -> Result<bool> {
        use tar::EntryType as T;
        let kind = entry.header().entry_type();
        if !matches!(kind, T::XHeader | T::XGlobalHeader | T::GNULongName | T::GNULongLink) {
            return Ok(false);
        }
        if entry.size() > EXTENSION_LIMIT_BYTES {
            return Err(self.bad("an extended header is absurdly large"));
        }
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).map_err(|e| self.bad(e))?;
        let text = || bytes.split(|b| *b == 0).next().unwrap_or_default().to_vec();
        if kind == T::GNULongName {
            extension.path = Some(text());
        } else if kind == T::GNULongLink {
            extension.link = Some(text());
        } else if kind == T::XHeader {
            for record in tar::PaxExtensions::new(&bytes) {
                let record = record.map_err(|e| self.bad(e))?;
                match record.key_bytes() {
                    b"path" => extension.path = Some(record.value_bytes().to_vec()),
                    b"linkpath" => extension.link = Some(record.value_bytes().to_vec()),
                    // Needed only for sizes beyond 8 GiB, which no limit here allows; old npm wrote it always.
                    b"size" => {
                        let size = record.value().ok().and_then(|v| v.parse().ok());
                        extension.size = Some(size.ok_or_else(|| self.bad("an entry's size is no number"))?);
                    }
                    _ => {}
                }
            }
        }
        Ok(true)
    }

    /// Makes one file, directory or link.
    fn place<R: Read>(
        &mut self,
        entry: &mut tar::Entry<'_, R>,
        extension: &Extension,
        piece: &mut [u8],
    ) -> Result<()> {
        use tar::EntryType as T;
        let raw = extension.path.clone().unwrap_or_else(|| entry.path_bytes().into_owned());
        if extension.size.is_some_and(|size| size != entry.size()) {
            return Err(self.bad("an entry says two sizes of itself"));
        }
        let Some(path) = self.inside(&raw)? else { return Ok(()) };
        let kind = entry.header().entry_type();
        let link =
            || extension.link.clone().or_else(|| entry.link_name_bytes().map(std::borrow::Cow::into_owned));
        if kind == T::Directory {
            self.folder(&path)
        } else if matches!(kind, T::Regular | T::Continuous) {
            let executable = entry.header().mode().unwrap_or(0) & 0o111 != 0;
            self.regular(entry, &path, executable, piece)
        } else if kind == T::Symlink {
            self.symlink(&path, &link().unwrap_or_default())
        } else if kind == T::Link {
            self.hard_link(&path, &link().unwrap_or_default())
        } else {
            Err(self.bad(format!("{} is neither file, directory nor link ({kind:?})", path.display())))
        }
    }

    /// The path below the destination, or `None` when stripping leaves nothing of it.
    fn inside(&self, raw: &[u8]) -> Result<Option<PathBuf>> {
        use std::os::unix::ffi::OsStrExt;
        let whole = Path::new(std::ffi::OsStr::from_bytes(raw));
        let refuse = |why: &str| Err(self.bad(format!("{} {why}", whole.display())));
        if raw.is_empty() || raw.contains(&0) {
            return refuse("is no path");
        }
        let mut parts = Vec::new();
        for part in whole.components() {
            match part {
                Component::Normal(name) => parts.push(name),
                Component::CurDir => {}
                Component::RootDir | Component::Prefix(_) => return refuse("is absolute"),
                Component::ParentDir => return refuse("leads upwards"),
            }
        }
        if parts.len() > DEPTH_LIMIT {
            return refuse("is absurdly deep");
        }
        let path: PathBuf = parts.into_iter().skip(self.strip).collect();
        Ok((!path.as_os_str().is_empty()).then_some(path))
    }

    /// Makes a directory and those above it; none of them may be a link.
    fn folder(&mut self, path: &Path) -> Result<()> {
        if self.folders.contains(path) {
            return Ok(());
        }
        if self.links.contains(path) {
            return Err(self.bad(format!("an entry passes through the link {}", path.display())));
        }
        if let Some(above) = path.parent() {
            self.folder(above)?;
        }
        let full = self.dest.join(path);
        DirBuilder::new().mode(0o755).create(&full).context(|| format!("creating {}", full.display()))?;
        std::fs::set_permissions(&full, Permissions::from_mode(0o755))
            .context(|| format!("setting the mode of {}", full.display()))?;
        self.folders.insert(path.to_path_buf());
        Ok(())
    }

    /// Readies the place of a file or link: the directory made, an earlier entry of this name gone.
    fn ready(&mut self, path: &Path) -> Result<PathBuf> {
        if let Some(above) = path.parent() {
            self.folder(above)?;
        }
        let full = self.dest.join(path);
        match std::fs::remove_file(&full) {
            Ok(()) => {
                self.links.remove(path);
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(format!("replacing {}", full.display()), &e)),
        }
        Ok(full)
    }

    fn regular<R: Read>(
        &mut self,
        entry: &mut tar::Entry<'_, R>,
        path: &Path,
        executable: bool,
        piece: &mut [u8],
    ) -> Result<()> {
        let expected = entry.size();
        if expected > self.limits.bytes - self.done.bytes {
            return Err(self.bad(format!("it holds more than {} bytes", self.limits.bytes)));
        }
        let full = self.ready(path)?;
        let what = || format!("writing {}", full.display());
        let mut out =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&full).context(what)?;
        let mut written = 0;
        loop {
            let n = entry.read(piece).map_err(|e| self.bad(e))?;
            if n == 0 {
                break;
            }
            out.write_all(&piece[..n]).context(what)?;
            written += n as u64;
        }
        if written != expected {
            return Err(self.bad(format!("{} is cut short", path.display())));
        }
        // Set apart from creation so that the umask has no say.
        let mode = if executable { 0o755 } else { 0o644 };
        out.set_permissions(Permissions::from_mode(mode)).context(what)?;
        self.done.files += 1;
        self.done.bytes += written;
        Ok(())
    }

    fn symlink(&mut self, path: &Path, target: &[u8]) -> Result<()> {
        use std::os::unix::ffi::OsStrExt;
        let target = Path::new(std::ffi::OsStr::from_bytes(target));
        let refuse = || Err(self.bad(format!("the link {} leaves the destination", path.display())));
        let mut depth = path.components().count().saturating_sub(1);
        for part in target.components() {
            match part {
                Component::Normal(_) => depth += 1,
                Component::CurDir => {}
                Component::ParentDir if depth > 0 => depth -= 1,
                Component::ParentDir | Component::RootDir | Component::Prefix(_) => return refuse(),
            }
        }
        if target.as_os_str().is_empty() {
            return refuse();
        }
        // `a/..` is not where it seems when `a` is a link: such a target may climb only at its start.
        let climbs_late = target
            .components()
            .skip_while(|c| matches!(c, Component::ParentDir | Component::CurDir))
            .any(|c| c == Component::ParentDir);
        if climbs_late {
            return refuse();
        }
        let full = self.ready(path)?;
        std::os::unix::fs::symlink(target, &full).context(|| format!("linking {}", full.display()))?;
        self.links.insert(path.to_path_buf());
        self.done.files += 1;
        Ok(())
    }

    /// A second name of a file unpacked before.
    fn hard_link(&mut self, path: &Path, target: &[u8]) -> Result<()> {
        let Some(target) = self.inside(target)? else {
            return Err(self.bad(format!("the link {} leads nowhere", path.display())));
        };
        let through_link = target.ancestors().any(|p| self.links.contains(p));
        if through_link || target == path || !self.dest.join(&target).is_file() {
            return Err(self.bad(format!("the link {} leads to no file unpacked before", path.display())));
        }
        let full = self.ready(path)?;
        std::fs::hard_link(self.dest.join(&target), &full)
            .context(|| format!("linking {}", full.display()))?;
        self.done.files += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
