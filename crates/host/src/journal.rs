//! The journal file: what an append returned `Ok` for is there after any crash, and nothing is there that was not issued.
//!
//! Records are chained by checksum from a random seed in the header, so bytes of an earlier life, of another file or of
//! a torn write never pass for a record. One mebibyte is written out in zeros when the file is made: appends inside it
//! need no space, so a full disk does not silence the journal. Opening reads to the first record that does not prove
//! itself, keeps a copy of what follows beside the file, and clears it.
//!
//! Everything goes through [`Disk`], so that tests can cut the power between and inside any two writes. The format is
//! in `docs/journal-format.md`.

mod disk;

pub use disk::{Disk, FileDisk, Slot};

use crate::error::{Error, Kind, Result};
use std::io;
use std::path::Path;

/// Space written out in advance, and the step in which a file grows.
pub const PREALLOCATED_BYTES: u64 = 1 << 20;
/// The space left in a journal that was rewritten on a full disk: a handful of records.
const TIGHT_BYTES: usize = 64 << 10;
/// A journal never grows beyond this; long before it is rewritten.
pub const FILE_LIMIT_BYTES: u64 = 16 << 20;
/// One record: room for an incident's evidence, small enough to write in one go.
pub const RECORD_LIMIT_BYTES: usize = 256 << 10;

const MAGIC: &[u8; 8] = b"KOBOJNL\x01";
const SEED_BYTES: usize = 16;
const CHECK_BYTES: usize = 16;
/// Magic, seed, check.
const HEADER_BYTES: usize = MAGIC.len() + SEED_BYTES + CHECK_BYTES;
const LEN_BYTES: usize = 4;
/// Length and check before each record's bytes.
const FRAME_BYTES: usize = LEN_BYTES + CHECK_BYTES;
/// Keys the checksums to this use.
const CONTEXT: &str = "koboshi journal 1 record chain";

type Check = [u8; CHECK_BYTES];

/// What opening found beside the records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Opened {
    /// Bytes after the last good record that were not zero and have been cut off (a copy lies beside the file).
    pub cut_bytes: u64,
    /// Why, in words; `None` when the file was whole or new.
    pub why: Option<String>,
}

/// An open journal.
#[derive(Debug)]
pub struct Journal<D: Disk = FileDisk> {
    disk: D,
    /// Where the next record goes.
    end: u64,
    /// Bytes that are written out.
    capacity: u64,
    chain: Check,
    /// Why nothing may be appended any more: what the disk holds is unknown since a write or sync failed.
    broken: Option<String>,
}

impl Journal<FileDisk> {
    /// Opens or makes the journal at `path`. One process at a time: take a lock first.
    ///
    /// # Errors
    /// When the file cannot be read, made or synced. Damaged content is not an error, see [`Opened`].
    pub fn open(path: &Path) -> Result<(Journal, Vec<Vec<u8>>, Opened)> {
        Journal::open_on(FileDisk::new(path))
    }

    /// Reads the journal at `path` and changes nothing: for those who only want to tell. A missing one is empty.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn read(path: &Path) -> Result<(Vec<Vec<u8>>, Opened)> {
        let what = || format!("reading the journal {}", path.display());
        let bytes = FileDisk::new(path).read(FILE_LIMIT_BYTES).map_err(|e| Error::io(what(), &e))?;
        let Some(bytes) = bytes else { return Ok((Vec::new(), Opened::default())) };
        Ok(match scan(&bytes) {
            Some(scan) => (scan.records, Opened { cut_bytes: scan.cut_bytes, why: scan.why }),
            None => (Vec::new(), no_header(&bytes)),
        })
    }
}

impl<D: Disk> Journal<D> {
    /// Opens or makes a journal on any disk.
    ///
    /// # Errors
    /// As for [`Journal::open`].
    pub fn open_on(mut disk: D) -> Result<(Journal<D>, Vec<Vec<u8>>, Opened)> {
        let name = disk.name();
        let opened = Journal::open_inner(&mut disk)
            .map_err(|e| Error::io(format!("opening the journal {name}"), &e))?;
        let (end, capacity, chain, records, report) = opened;
        Ok((Journal { disk, end, capacity, chain, broken: None }, records, report))
    }

    #[allow(clippy::type_complexity)] // Taken apart by its one caller, a line away.
    fn open_inner(disk: &mut D) -> io::Result<(u64, u64, Check, Vec<Vec<u8>>, Opened)> {
        let Some(bytes) = disk.read(FILE_LIMIT_BYTES)? else {
            let fresh = Journal::write_next(disk, &[])?;
            disk.publish()?;
            disk.sync_dir()?;
            return Ok((fresh.end, fresh.capacity, fresh.chain, Vec::new(), Opened::default()));
        };
        let Some(scan) = scan(&bytes) else {
            // Not ours, or the header itself is damaged. It is moved aside, never overwritten.
            let report = no_header(&bytes);
            let fresh = Journal::write_next(disk, &[])?;
            disk.set_aside()?;
            disk.publish()?;
            disk.sync_dir()?;
            return Ok((fresh.end, fresh.capacity, fresh.chain, Vec::new(), report));
        };
        let end = scan.end as u64;
        let tail = bytes.get(scan.end..).unwrap_or_default();
        if scan.cut_bytes > 0 {
            // A disk too full for the copy must not keep the journal shut.
            let _ = disk.keep_cut(tail.get(..used_len(tail)).unwrap_or_default());
            disk.write_at(Slot::Live, end, &vec![0; tail.len()])?;
        }
        let capacity = (bytes.len() as u64).max(end);
        // What was read may be only in memory: an agent that died before its sync, or whose sync failed (after which
        // the kernel calls the page clean). It is acted upon from now on, so it has to last: the same bytes once more,
        // and the name, should that agent have died between rename and sync.
        disk.write_at(Slot::Live, 0, bytes.get(..scan.end).unwrap_or_default())?;
        disk.sync(Slot::Live)?;
        disk.sync_dir()?;
        Ok((end, capacity, scan.chain, scan.records, Opened { cut_bytes: scan.cut_bytes, why: scan.why }))
    }

    /// Appends one record; durable on return.
    ///
    /// # Errors
    /// `Usage` for an empty or too large record and `NoSpace` when the file must grow and cannot: then nothing was
    /// written and later appends may succeed. After any other error the journal takes nothing more until it is
    /// rewritten or opened again, because what reached the disk is unknown.
    pub fn append(&mut self, record: &[u8]) -> Result<()> {
        let name = self.disk.name();
        let what = || format!("appending to the journal {name}");
        if let Some(why) = &self.broken {
            return Err(Error::new(Kind::System, what(), format!("an earlier write failed: {why}"))
                .hint("open or rewrite it, once its disk works again"));
        }
        check_size(record).map_err(|why| Error::new(Kind::Usage, what(), why))?;
        let frame = frame(&self.chain, record);
        let end = self.end + frame.bytes.len() as u64;
        if end > FILE_LIMIT_BYTES {
            return Err(Error::new(Kind::NoSpace, what(), "it has reached its largest size")
                .hint("rewrite it with what is still needed"));
        }
        if end > self.capacity {
            let capacity = end.next_multiple_of(PREALLOCATED_BYTES).min(FILE_LIMIT_BYTES);
            let zeros = vec![0; usize::try_from(capacity - self.capacity).unwrap_or(0)];
            // Beyond the last record: whatever part of it arrives, it is an empty tail.
            if let Err(e) = self.put(self.capacity, &zeros) {
                let error = Error::io(what(), &e);
                if error.kind != Kind::NoSpace {
                    self.broken = Some(e.to_string());
                }
                return Err(error);
            }
            self.capacity = capacity;
        }
        if let Err(e) = self.put(self.end, &frame.bytes) {
            self.broken = Some(e.to_string());
            return Err(Error::io(what(), &e));
        }
        self.end = end;
        self.chain = frame.check;
        Ok(())
    }

    /// Replaces the content by these records: after a crash either the old journal is there or the new one, whole. Also
    /// the way on after a failed append.
    ///
    /// # Errors
    /// When the new file cannot be made: the old one stays as it was. When the rename cannot be made durable, the
    /// journal takes nothing more until it is rewritten or opened again.
    pub fn rewrite(&mut self, keep: &[Vec<u8>]) -> Result<()> {
        let name = self.disk.name();
        let what = || format!("rewriting the journal {name}");
        for record in keep {
            check_size(record).map_err(|why| Error::new(Kind::Usage, what(), why))?;
        }
        let fresh = Journal::write_next(&mut self.disk, keep).map_err(|e| Error::io(what(), &e))?;
        self.disk.publish().map_err(|e| Error::io(what(), &e))?;
        (self.end, self.capacity, self.chain) = (fresh.end, fresh.capacity, fresh.chain);
        self.broken = None;
        self.disk.sync_dir().map_err(|e| {
            // Appends would go to a file whose name a crash may take back.
            self.broken = Some(e.to_string());
            Error::io(what(), &e)
        })
    }

    /// Bytes that appends may still take without needing new space; each record takes 20 bytes more than its own.
    #[must_use]
    pub fn room_left(&self) -> u64 {
        self.capacity - self.end
    }

    /// Bytes in use.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.end
    }

    /// Whether an earlier failure keeps it from taking records.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.disk.write_at(Slot::Live, offset, bytes)?;
        self.disk.sync(Slot::Live)
    }

    /// Writes header, records and zeros into the next file and makes them durable.
    fn write_next(disk: &mut D, records: &[Vec<u8>]) -> io::Result<Fresh> {
        let mut seed = [0_u8; SEED_BYTES];
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())?;
        let (mut bytes, mut chain) = header(&seed);
        for record in records {
            let frame = frame(&chain, record);
            bytes.extend_from_slice(&frame.bytes);
            chain = frame.check;
        }
        // At least half of the space stays free, else the next rewrite is due at once.
        let step = usize::try_from(PREALLOCATED_BYTES).unwrap_or(usize::MAX);
        let size = (bytes.len() + step / 2).next_multiple_of(step);
        if size as u64 > FILE_LIMIT_BYTES {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "more records than a journal may hold"));
        }
        let end = bytes.len() as u64;
        match Journal::write_sized(disk, &mut bytes, size) {
            // A disk that is full, perhaps because of the old journal: a small one frees the old one's space.
            Err(e) if e.kind() == io::ErrorKind::StorageFull && !records.is_empty() => {
                let small = (usize::try_from(end).unwrap_or(size) + TIGHT_BYTES).min(size);
                Journal::write_sized(disk, &mut bytes, small)?;
            }
            written => written?,
        }
        Ok(Fresh { end, capacity: bytes.len() as u64, chain })
    }

    fn write_sized(disk: &mut D, bytes: &mut Vec<u8>, size: usize) -> io::Result<()> {
        bytes.resize(size, 0);
        disk.create_next()?;
        let written = disk.write_at(Slot::Next, 0, bytes).and_then(|()| disk.sync(Slot::Next));
        if written.is_err() {
            // What stays is made anew by the next attempt.
            let _ = disk.discard_next();
        }
        written
    }
}

struct Fresh {
    end: u64,
    capacity: u64,
    chain: Check,
}

struct Frame {
    bytes: Vec<u8>,
    check: Check,
}

fn check_size(record: &[u8]) -> std::result::Result<(), String> {
    match record.len() {
        0 => Err("an empty record looks like the end".into()),
        n if n > RECORD_LIMIT_BYTES => {
            Err(format!("{n} bytes, but a record holds {RECORD_LIMIT_BYTES} at most"))
        }
        _ => Ok(()),
    }
}

fn check(parts: &[&[u8]]) -> Check {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    for part in parts {
        hasher.update(part);
    }
    let mut check = [0; CHECK_BYTES];
    hasher.finalize_xof().fill(&mut check);
    check
}

fn header(seed: &[u8; SEED_BYTES]) -> (Vec<u8>, Check) {
    let chain = check(&[MAGIC, seed]);
    ([MAGIC.as_slice(), seed, &chain].concat(), chain)
}

fn frame(chain: &Check, record: &[u8]) -> Frame {
    // `check_size` came first, so the length fits.
    let len = u32::try_from(record.len()).unwrap_or(0).to_le_bytes();
    let check = check(&[chain, &len, record]);
    Frame { bytes: [&len, check.as_slice(), record].concat(), check }
}

struct Scan {
    records: Vec<Vec<u8>>,
    end: usize,
    chain: Check,
    cut_bytes: u64,
    why: Option<String>,
}

/// Reads the records up to the first that does not prove itself. `None` without a valid header.
fn scan(bytes: &[u8]) -> Option<Scan> {
    let head = bytes.get(..HEADER_BYTES)?;
    let seed: [u8; SEED_BYTES] = head.get(MAGIC.len()..MAGIC.len() + SEED_BYTES)?.try_into().ok()?;
    let (expected, mut chain) = header(&seed);
    (head == expected).then_some(())?;
    let (mut records, mut end) = (Vec::new(), HEADER_BYTES);
    while let Some((record, check)) = bytes.get(end..).and_then(|rest| first_record(&chain, rest)) {
        end += FRAME_BYTES + record.len();
        chain = check;
        records.push(record.to_vec());
    }
    let tail = bytes.get(end..).unwrap_or_default();
    let used = used_len(tail);
    let why = (used > 0).then(|| {
        format!("after record {} at byte {end}, {used} bytes do not form a record: a write was cut short, or the disk changed them", records.len())
    });
    Some(Scan { records, end, chain, cut_bytes: used as u64, why })
}

fn first_record<'a>(chain: &Check, rest: &'a [u8]) -> Option<(&'a [u8], Check)> {
    let len_bytes: [u8; LEN_BYTES] = rest.get(..LEN_BYTES)?.try_into().ok()?;
    let len = usize::try_from(u32::from_le_bytes(len_bytes)).ok()?;
    if len == 0 || len > RECORD_LIMIT_BYTES {
        return None;
    }
    let record = rest.get(FRAME_BYTES..FRAME_BYTES + len)?;
    let proof = check(&[chain, &len_bytes, record]);
    (rest.get(LEN_BYTES..FRAME_BYTES)? == proof).then_some((record, proof))
}

/// How many bytes are left when the zeros at the end are taken off. Whole pages are compared first: a mebibyte of zeros
/// is the common case.
fn used_len(bytes: &[u8]) -> usize {
    const PAGE: [u8; 4096] = [0; 4096];
    let pages = bytes.chunks(PAGE.len()).rposition(|c| PAGE.get(..c.len()) != Some(c)).map_or(0, |p| p + 1);
    let rest = bytes.get(..(pages * PAGE.len()).min(bytes.len())).unwrap_or_default();
    rest.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1)
}

fn no_header(bytes: &[u8]) -> Opened {
    let used = used_len(bytes);
    Opened {
        cut_bytes: used as u64,
        why: Some("it does not begin like a journal and was moved aside".into()),
    }
}

#[cfg(test)]
mod tests;
