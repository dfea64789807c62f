//! Entries and the sorted streams of them: manifests (what a root held) and indexes (the same plus what stat said).
//!
//! A stream is sorted by path, a directory right before what it holds, so that a manifest, an index and a walk of the
//! live tree can be merged in constant memory. Everything read is checked before use: a path that climbs, is
//! absolute, unsorted or absurdly long is refused together with its file.

use crate::beneath::{MAX_PATH_BYTES, OWN_PREFIX};
use crate::key::{Key, Name};
use crate::pack::BLOCK_BYTES;
use crate::seal::{FileId, FileKind, FrameReader, FrameWriter};
use host::{Error, Kind, Result};
use std::cmp::Ordering;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Pages of a database are chunked finely: a few commits change a few of them.
pub(crate) const DATABASE_CHUNK_BYTES: u32 = 16 * 1024;
/// Everything else is cut only where it exceeds a block.
pub(crate) const CHUNK_BYTES: u32 = BLOCK_BYTES as u32;
/// Larger files are left out with a problem: their list of names would not fit one frame.
pub(crate) const MAX_FILE_BYTES: u64 = 256 * 1024 * 1024 * 1024;
/// A symlink's target, as the kernel bounds it.
const MAX_TARGET_BYTES: usize = 4096;
/// Attributes of one entry, all together.
pub(crate) const MAX_XATTRS: usize = 64;
pub(crate) const MAX_XATTR_BYTES: usize = 64 * 1024;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum EntryKind {
    Dir = 0,
    File = 1,
    Link = 2,
    /// FIFO, socket or device: known to exist, never stored.
    Special = 3,
    /// A file that could not be read: known to exist, never touched.
    Unread = 4,
}

/// A run of equal objects (holes repeat one object thousands of times).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) count: u32,
    pub(crate) name: Name,
}

/// What stat said when the content was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Live {
    pub(crate) ino: u64,
    /// 0 = changed too recently to be vouched for.
    pub(crate) ctime_ns: i64,
    /// Of a database's write-ahead log.
    pub(crate) companion: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: EntryKind,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime_ns: i64,
    pub(crate) size: u64,
    /// It had one name only.
    pub(crate) single: bool,
    /// Taken through SQLite.
    pub(crate) database: bool,
    pub(crate) runs: Vec<Run>,
    pub(crate) target: Vec<u8>,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) live: Live,
}

impl Entry {
    pub(crate) fn chunk_bytes(&self) -> u32 {
        if self.database { DATABASE_CHUNK_BYTES } else { CHUNK_BYTES }
    }

    pub(crate) fn chunks(&self) -> u64 {
        self.size.div_ceil(u64::from(self.chunk_bytes()))
    }

    /// The same bytes.
    pub(crate) fn same_content(&self, other: &Entry) -> bool {
        self.size == other.size && self.database == other.database && self.runs == other.runs
    }
}

/// Adds a name to a list of runs.
pub(crate) fn push_name(runs: &mut Vec<Run>, name: Name) {
    match runs.last_mut() {
        Some(last) if last.name == name && last.count < u32::MAX => last.count += 1,
        Some(_) | None => runs.push(Run { count: 1, name }),
    }
}

/// The order of a depth-first walk with sorted names: as if `/` were the lowest byte.
pub(crate) fn compare_paths(a: &[u8], b: &[u8]) -> Ordering {
    let at = a.iter().zip(b).position(|(x, y)| x != y);
    match at {
        None => a.len().cmp(&b.len()),
        Some(i) => {
            let rank = |c: u8| if c == b'/' { 0 } else { u16::from(c) + 1 };
            rank(a[i]).cmp(&rank(b[i]))
        }
    }
}

/// Whether `path` is `prefix` or lies below it. Everything lies below the empty path.
pub(crate) fn is_within(path: &[u8], prefix: &[u8]) -> bool {
    prefix.is_empty()
        || (path.starts_with(prefix) && (path.len() == prefix.len() || path[prefix.len()] == b'/'))
}

/// A path that names something below its root and nothing else.
pub(crate) fn is_safe(path: &[u8]) -> bool {
    path.len() <= MAX_PATH_BYTES
        && !path.contains(&0)
        && (path.is_empty()
            || path.split(|b| *b == b'/').all(|p| {
                !p.is_empty() && p != b"." && p != b".." && p.len() <= 255 && !p.starts_with(OWN_PREFIX)
            }))
}

fn put(out: &mut Vec<u8>, mut v: u64) {
    while v >= 0x80 {
        out.push((v as u8 & 0x7f) | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

fn put_signed(out: &mut Vec<u8>, v: i64) {
    put(out, ((v << 1) ^ (v >> 63)).cast_unsigned());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

struct Cursor<'a> {
    bytes: &'a [u8],
}

impl Cursor<'_> {
    fn get(&mut self) -> Option<u64> {
        let mut v = 0u64;
        for shift in (0..64).step_by(7) {
            let (first, rest) = self.bytes.split_first()?;
            self.bytes = rest;
            v |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                return Some(v);
            }
        }
        None
    }

    fn get_u32(&mut self) -> Option<u32> {
        u32::try_from(self.get()?).ok()
    }

    fn get_signed(&mut self) -> Option<i64> {
        let v = self.get()?;
        Some((v >> 1).cast_signed() ^ -((v & 1).cast_signed()))
    }

    fn take(&mut self, n: usize) -> Option<&[u8]> {
        if n > self.bytes.len() {
            return None;
        }
        let (taken, rest) = self.bytes.split_at(n);
        self.bytes = rest;
        Some(taken)
    }

    fn take_bytes(&mut self, max: usize) -> Option<Vec<u8>> {
        let n = usize::try_from(self.get()?).ok().filter(|n| *n <= max)?;
        Some(self.take(n)?.to_vec())
    }
}

const WORD_ENTRY: u8 = 1;
const WORD_END: u8 = 2;
const FLAG_SINGLE: u8 = 8;
const FLAG_DATABASE: u8 = 16;
const FLAG_XATTRS: u8 = 32;

fn encode(entry: &Entry, previous: &[u8], with_live: bool, out: &mut Vec<u8>) {
    let shared = entry.path.iter().zip(previous).take_while(|(a, b)| a == b).count();
    out.push(WORD_ENTRY);
    put(out, shared as u64);
    put_bytes(out, &entry.path[shared..]);
    let flag = |on: bool, bit: u8| if on { bit } else { 0 };
    out.push(
        entry.kind as u8
            | flag(entry.single, FLAG_SINGLE)
            | flag(entry.database, FLAG_DATABASE)
            | flag(!entry.xattrs.is_empty(), FLAG_XATTRS),
    );
    put(out, u64::from(entry.mode));
    put(out, u64::from(entry.uid));
    put(out, u64::from(entry.gid));
    put_signed(out, entry.mtime_ns);
    match entry.kind {
        EntryKind::File => {
            put(out, entry.size);
            put(out, entry.runs.len() as u64);
            for run in &entry.runs {
                put(out, u64::from(run.count));
                out.extend_from_slice(&run.name);
            }
        }
        EntryKind::Link => put_bytes(out, &entry.target),
        EntryKind::Unread => put(out, entry.size),
        EntryKind::Dir | EntryKind::Special => {}
    }
    if !entry.xattrs.is_empty() {
        put(out, entry.xattrs.len() as u64);
        for (name, value) in &entry.xattrs {
            put_bytes(out, name);
            put_bytes(out, value);
        }
    }
    if with_live {
        put(out, entry.live.ino);
        put_signed(out, entry.live.ctime_ns);
        put(out, entry.live.companion);
    }
}

fn decode(c: &mut Cursor<'_>, previous: &mut Vec<u8>, with_live: bool) -> Option<Entry> {
    let shared = usize::try_from(c.get()?).ok().filter(|n| *n <= previous.len())?;
    let suffix = c.take_bytes(MAX_PATH_BYTES)?;
    let mut path = previous[..shared].to_vec();
    path.extend_from_slice(&suffix);
    let flags = c.take(1)?[0];
    let kind = match flags & 7 {
        0 => EntryKind::Dir,
        1 => EntryKind::File,
        2 => EntryKind::Link,
        3 => EntryKind::Special,
        4 => EntryKind::Unread,
        _ => return None,
    };
    let mode = c.get_u32()? & 0o7777;
    let (uid, gid) = (c.get_u32()?, c.get_u32()?);
    let mtime_ns = c.get_signed()?;
    let mut entry = Entry {
        path,
        kind,
        mode,
        uid,
        gid,
        mtime_ns,
        size: 0,
        single: flags & FLAG_SINGLE != 0,
        database: flags & FLAG_DATABASE != 0,
        runs: Vec::new(),
        target: Vec::new(),
        xattrs: Vec::new(),
        live: Live::default(),
    };
    match kind {
        EntryKind::File => {
            entry.size = c.get().filter(|s| *s <= MAX_FILE_BYTES)?;
            let runs = c.get()?;
            let mut chunks = 0u64;
            for _ in 0..runs {
                let count = c.get_u32()?;
                let mut name = [0; 32];
                name.copy_from_slice(c.take(32)?);
                chunks += u64::from(count);
                entry.runs.push(Run { count, name });
            }
            if chunks != entry.chunks() {
                return None;
            }
        }
        EntryKind::Link => entry.target = c.take_bytes(MAX_TARGET_BYTES)?,
        EntryKind::Unread => entry.size = c.get()?,
        EntryKind::Dir | EntryKind::Special => {}
    }
    if flags & FLAG_XATTRS != 0 {
        let count = usize::try_from(c.get()?).ok().filter(|n| *n <= MAX_XATTRS)?;
        for _ in 0..count {
            entry.xattrs.push((c.take_bytes(256)?, c.take_bytes(MAX_XATTR_BYTES)?));
        }
    }
    if with_live {
        entry.live = Live { ino: c.get()?, ctime_ns: c.get_signed()?, companion: c.get()? };
    }
    previous.clear();
    previous.extend_from_slice(&entry.path);
    Some(entry)
}

/// Writes a sorted stream.
pub(crate) struct TreeWriter {
    frames: FrameWriter,
    previous: Vec<u8>,
    with_live: bool,
    entries: u64,
}

impl TreeWriter {
    /// A manifest.
    pub(crate) fn tree(path: PathBuf, key: &Key, id: FileId) -> Result<TreeWriter> {
        let frames = FrameWriter::create(path, FileKind::Tree, key, id)?;
        Ok(TreeWriter { frames, previous: Vec::new(), with_live: false, entries: 0 })
    }

    /// An index; `basis` is the manifest whose entries it repeats.
    pub(crate) fn index(path: PathBuf, key: &Key, id: FileId, basis: FileId) -> Result<TreeWriter> {
        let mut frames = FrameWriter::create(path, FileKind::Index, key, id)?;
        frames.buffer.extend_from_slice(&basis);
        frames.flush(false)?;
        Ok(TreeWriter { frames, previous: Vec::new(), with_live: true, entries: 0 })
    }

    pub(crate) fn push(&mut self, entry: &Entry) -> Result<()> {
        encode(entry, &self.previous, self.with_live, &mut self.frames.buffer);
        self.previous.clear();
        self.entries += 1;
        if self.frames.is_full() {
            self.frames.flush(false)?;
        } else {
            self.previous.extend_from_slice(&entry.path);
        }
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Result<(File, PathBuf)> {
        self.frames.buffer.push(WORD_END);
        put(&mut self.frames.buffer, self.entries);
        self.frames.finish()
    }
}

/// Reads a sorted stream; each frame is proven before its entries are given out.
pub(crate) struct TreeReader {
    frames: FrameReader,
    frame: Vec<u8>,
    at: usize,
    previous: Vec<u8>,
    last: Option<Vec<u8>>,
    with_live: bool,
    entries: u64,
    ended: bool,
    peeked: Option<Entry>,
    /// Of an index: the manifest it repeats.
    pub(crate) basis: FileId,
    path: PathBuf,
}

impl TreeReader {
    pub(crate) fn tree(path: &Path, key: &Key, id: FileId) -> Result<TreeReader> {
        let frames = FrameReader::open(path, FileKind::Tree, key)?;
        if frames.id != id {
            return Err(Error::new(
                Kind::Corrupt,
                format!("reading the manifest {}", path.display()),
                "it is another one",
            ));
        }
        Ok(TreeReader::new(frames, path, false))
    }

    pub(crate) fn index(path: &Path, key: &Key) -> Result<TreeReader> {
        let mut frames = FrameReader::open(path, FileKind::Index, key)?;
        let mut first = Vec::new();
        frames.next(&mut first)?;
        let Ok(basis) = FileId::try_from(&first[..]) else {
            return Err(Error::new(
                Kind::Corrupt,
                format!("reading the index {}", path.display()),
                "it is malformed",
            ));
        };
        let mut r = TreeReader::new(frames, path, true);
        r.basis = basis;
        Ok(r)
    }

    fn new(frames: FrameReader, path: &Path, with_live: bool) -> TreeReader {
        TreeReader {
            frames,
            frame: Vec::new(),
            at: 0,
            previous: Vec::new(),
            last: None,
            with_live,
            entries: 0,
            ended: false,
            peeked: None,
            basis: [0; 16],
            path: path.to_owned(),
        }
    }

    fn corrupt(&self, why: &str) -> Error {
        Error::new(Kind::Corrupt, format!("reading {}", self.path.display()), why)
    }

    /// The next entry; `None` only after the stream has proven to be whole.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>> {
        if let Some(e) = self.peeked.take() {
            return Ok(Some(e));
        }
        while self.at >= self.frame.len() {
            if !self.frames.next(&mut self.frame)? {
                return if self.ended { Ok(None) } else { Err(self.corrupt("it ends too early")) };
            }
            self.at = 0;
            self.previous.clear();
        }
        let mut c = Cursor { bytes: &self.frame[self.at..] };
        let word = c.take(1).map(|w| w[0]);
        let got = match word {
            Some(WORD_ENTRY) if !self.ended => decode(&mut c, &mut self.previous, self.with_live).map(Some),
            Some(WORD_END) if !self.ended => {
                self.ended = true;
                c.get().filter(|n| *n == self.entries).map(|_| None)
            }
            _ => None,
        };
        self.at = self.frame.len() - c.bytes.len();
        let Some(got) = got else { return Err(self.corrupt("an entry is malformed")) };
        let Some(entry) = got else { return self.next() };
        self.entries += 1;
        if !is_safe(&entry.path) {
            return Err(self.corrupt("an entry's path leads elsewhere"));
        }
        match &mut self.last {
            Some(last) if compare_paths(last, &entry.path) != Ordering::Less => {
                return Err(self.corrupt("its entries are out of order"));
            }
            Some(last) => {
                last.clear();
                last.extend_from_slice(&entry.path);
            }
            None => self.last = Some(entry.path.clone()),
        }
        Ok(Some(entry))
    }

    /// The next entry without taking it.
    pub(crate) fn peek(&mut self) -> Result<Option<&Entry>> {
        if self.peeked.is_none() {
            self.peeked = self.next()?;
        }
        Ok(self.peeked.as_ref())
    }

    /// Passes over everything at or below `prefix`.
    pub(crate) fn skip_within(&mut self, prefix: &[u8]) -> Result<()> {
        while let Some(e) = self.peek()? {
            if !is_within(&e.path, prefix) {
                break;
            }
            self.peeked = None;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn file(path: &str, size: u64, byte: u8) -> Entry {
        let mut runs = Vec::new();
        for _ in 0..size.div_ceil(u64::from(CHUNK_BYTES)) {
            push_name(&mut runs, [byte; 32]);
        }
        Entry {
            path: path.as_bytes().to_vec(),
            kind: EntryKind::File,
            mode: 0o644,
            uid: 1,
            gid: 2,
            mtime_ns: -5,
            size,
            single: true,
            database: false,
            runs,
            target: Vec::new(),
            xattrs: vec![(b"user.a".to_vec(), b"b".to_vec())],
            live: Live { ino: 9, ctime_ns: -7, companion: 3 },
        }
    }

    fn write(dir: &Path, entries: &[Entry]) -> PathBuf {
        let path = dir.join(crate::hex::encode(&crate::seal::new_id().unwrap()));
        let mut w = TreeWriter::index(path.clone(), &Key::for_test(), [1; 16], [2; 16]).unwrap();
        for e in entries {
            w.push(e).unwrap();
        }
        w.finish().unwrap();
        path
    }

    fn read(path: &Path) -> Result<Vec<Entry>> {
        let mut r = TreeReader::index(path, &Key::for_test())?;
        let mut all = Vec::new();
        while let Some(e) = r.next()? {
            all.push(e);
        }
        Ok(all)
    }

    #[test]
    fn streams_come_back_as_written() {
        let dir = tempfile::tempdir().unwrap();
        let entries: Vec<Entry> = (0..5000)
            .map(|i| file(&format!("d/{i:05}"), u64::from(CHUNK_BYTES) * (i % 3) + i, i as u8))
            .collect();
        assert_eq!(read(&write(dir.path(), &entries)).unwrap(), entries);
    }

    #[test]
    fn hostile_paths_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for bad in ["../x", "/etc/passwd", "a/../../b", "a//b", "a/.", "a\0b", ".koboshi-tmp-x"] {
            let e = read(&write(dir.path(), &[file(bad, 1, 0)])).unwrap_err();
            assert_eq!(e.kind, Kind::Corrupt, "{bad}");
        }
        let long = "x/".repeat(MAX_PATH_BYTES) + "y";
        assert!(read(&write(dir.path(), &[file(&long, 1, 0)])).is_err());
        let e = read(&write(dir.path(), &[file("b", 1, 0), file("a", 1, 0)])).unwrap_err();
        assert!(e.why.contains("order"), "{e}");
    }

    #[test]
    fn absurd_sizes_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut e = file("a", 1, 0);
        e.size = u64::MAX / 2;
        assert!(read(&write(dir.path(), &[e])).is_err());
        let mut e = file("a", 1, 0);
        e.size = MAX_FILE_BYTES;
        assert!(read(&write(dir.path(), &[e])).is_err(), "size and names must agree");
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_one_error() {
        let dir = tempfile::tempdir().unwrap();
        let entries: Vec<Entry> = (0..40).map(|i| file(&format!("{i:05}"), 10, i)).collect();
        let path = write(dir.path(), &entries);
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(read(&path).unwrap_err().kind, Kind::Corrupt, "flip at {at}");
            std::fs::write(&path, &whole[..at]).unwrap();
            assert_eq!(read(&path).unwrap_err().kind, Kind::Corrupt, "cut at {at}");
        }
    }

    #[test]
    fn order_is_that_of_a_walk() {
        let mut paths = ["a-b", "a", "a/b", "a/b/c", "a/b-c", "b", ""];
        paths.sort_by(|a, b| compare_paths(a.as_bytes(), b.as_bytes()));
        assert_eq!(paths, ["", "a", "a/b", "a/b/c", "a/b-c", "a-b", "b"]);
        assert!(is_within(b"a/b", b"a") && !is_within(b"a-b", b"a") && is_within(b"a", b""));
    }
}
