//! Packs: objects in directory order, gathered into blocks that are compressed and sealed as one.
//!
//! Cost is per file, not per byte, so small neighbours share a block. A block says in itself which objects it holds;
//! the index at the pack's end only says it faster, and is made again from the blocks when it is damaged.

use crate::files;
use crate::key::{Domain, Key, Name};
use crate::seal::{self, Cipher, FileKind, HEADER_BYTES, SEAL_BYTES};
use host::{Context, Error, Kind, Result};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A block holds at most this much plain data; no object is larger.
pub(crate) const BLOCK_BYTES: usize = 256 * 1024;
/// A pack is closed at about this size: small enough to rewrite, large enough to be few.
const PACK_TARGET_BYTES: u64 = 16 * 1024 * 1024;
/// No block holds more objects: bounds what a damaged count can ask for.
const MAX_BLOCK_OBJECTS: usize = 16 * 1024;
const ZSTD_LEVEL: i32 = 1;
const TRAILER_BYTES: usize = 32;
const TRAILER_MAGIC: &[u8; 8] = b"KOBOEND\n";
const BLOCK_LEAD_BYTES: usize = 5;
const FLAG_PACKED: u8 = 2;
const KEYED_BIT: u32 = 1 << 31;
const MAX_SEALED_BLOCK_BYTES: usize = 2 * BLOCK_BYTES + 8 * MAX_BLOCK_OBJECTS;
/// Bytes of one object in the pack's index.
const INDEX_RECORD_BYTES: usize = 32 + 4 + 4;
/// Bytes of one block in the pack's index.
const INDEX_BLOCK_BYTES: usize = 8 + 4 + 4;
const MAX_INDEX_BYTES: u64 = 512 * 1024 * 1024;

/// The number of the place a sealed index has; no block gets that far.
const INDEX_PLACE: u64 = u64::MAX;

fn place(header: &[u8; HEADER_BYTES], number: u64) -> [u8; HEADER_BYTES + 8] {
    let mut p = [0; HEADER_BYTES + 8];
    p[..HEADER_BYTES].copy_from_slice(header);
    p[HEADER_BYTES..].copy_from_slice(&number.to_le_bytes());
    p
}

/// A finished pack that waits to be synced and named.
pub(crate) struct Finished {
    pub(crate) file: File,
    pub(crate) tmp: PathBuf,
    pub(crate) name: String,
    pub(crate) bytes: u64,
}

struct Open {
    file: File,
    tmp: PathBuf,
    header: [u8; HEADER_BYTES],
    offset: u64,
    hash: blake3::Hasher,
    blocks: Vec<(u64, u32, u32)>,
    objects: Vec<(Name, u32, u32)>,
}

/// Writes objects into packs, one after another; finished packs are handed to `done`.
pub(crate) struct PackWriter<'a> {
    dir: &'a Path,
    key: &'a Key,
    cipher: Cipher,
    packer: zstd::bulk::Compressor<'static>,
    open: Option<Open>,
    raw: Vec<u8>,
    pending: Vec<(Name, u32)>,
    plain: Vec<u8>,
    sealed: Vec<u8>,
    done: &'a (dyn Fn(Finished) -> Result<()> + Sync),
}

impl<'a> PackWriter<'a> {
    pub(crate) fn new(
        dir: &'a Path,
        key: &'a Key,
        done: &'a (dyn Fn(Finished) -> Result<()> + Sync),
    ) -> Result<PackWriter<'a>> {
        let packer = zstd::bulk::Compressor::new(ZSTD_LEVEL).context(|| "starting compression".into())?;
        Ok(PackWriter {
            dir,
            key,
            cipher: Cipher::new(key),
            packer,
            open: None,
            raw: Vec::with_capacity(BLOCK_BYTES),
            pending: Vec::new(),
            plain: Vec::new(),
            sealed: Vec::new(),
            done,
        })
    }

    /// Adds one object of at most [`BLOCK_BYTES`], whose name the caller has computed.
    pub(crate) fn add(&mut self, name: Name, domain: Domain, bytes: &[u8]) -> Result<()> {
        if self.raw.len() + bytes.len() > BLOCK_BYTES || self.pending.len() >= MAX_BLOCK_OBJECTS {
            self.close_block()?;
        }
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let keyed = match domain {
            Domain::Plain => 0,
            Domain::Keyed => KEYED_BIT,
        };
        self.pending.push((name, length | keyed));
        self.raw.extend_from_slice(bytes);
        Ok(())
    }

    fn close_block(&mut self) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let what = || "writing a pack".to_string();
        let mut pack = match self.open.take() {
            Some(p) => p,
            None => {
                let id = seal::new_id()?;
                let tmp = self.dir.join(format!("{}.pack", crate::hex::encode(&id)));
                let mut file = files::create_private(&tmp).context(what)?;
                let header = seal::header(FileKind::Pack, self.key, id);
                file.write_all(&header).context(what)?;
                let mut hash = blake3::Hasher::new();
                hash.update(&header);
                let offset = HEADER_BYTES as u64;
                Open { file, tmp, header, offset, hash, blocks: Vec::new(), objects: Vec::new() }
            }
        };
        let number = pack.blocks.len();
        self.plain.clear();
        self.plain.extend_from_slice(&u32::try_from(self.pending.len()).unwrap_or(0).to_le_bytes());
        for (_, length) in &self.pending {
            self.plain.extend_from_slice(&length.to_le_bytes());
        }
        self.plain.extend_from_slice(&self.raw);
        let packed = self.packer.compress(&self.plain).context(what)?;
        let (flags, data) =
            if packed.len() < self.plain.len() { (FLAG_PACKED, &packed) } else { (0, &self.plain) };
        self.sealed.clear();
        let stored = u32::try_from(data.len() + SEAL_BYTES).unwrap_or(u32::MAX);
        self.sealed.extend_from_slice(&stored.to_le_bytes());
        self.sealed.push(flags);
        self.cipher.seal(data, &place(&pack.header, number as u64), &mut self.sealed)?;
        pack.file.write_all(&self.sealed).context(what)?;
        pack.hash.update(&self.sealed);
        let raw_len = u32::try_from(self.raw.len()).unwrap_or(u32::MAX);
        pack.blocks.push((pack.offset, u32::try_from(self.sealed.len()).unwrap_or(u32::MAX), raw_len));
        pack.offset += self.sealed.len() as u64;
        let block = u32::try_from(number).unwrap_or(u32::MAX);
        pack.objects.extend(self.pending.drain(..).map(|(name, length)| (name, block, length)));
        self.raw.clear();
        let full = pack.offset >= PACK_TARGET_BYTES;
        self.open = Some(pack);
        if full { self.close_pack() } else { Ok(()) }
    }

    fn close_pack(&mut self) -> Result<()> {
        let Some(mut pack) = self.open.take() else { return Ok(()) };
        let what = || "writing a pack's index".to_string();
        let mut plain = Vec::with_capacity(
            8 + pack.blocks.len() * INDEX_BLOCK_BYTES + pack.objects.len() * INDEX_RECORD_BYTES,
        );
        plain.extend_from_slice(&u32::try_from(pack.blocks.len()).unwrap_or(0).to_le_bytes());
        plain.extend_from_slice(&u32::try_from(pack.objects.len()).unwrap_or(0).to_le_bytes());
        for (offset, stored, raw) in &pack.blocks {
            plain.extend_from_slice(&offset.to_le_bytes());
            plain.extend_from_slice(&stored.to_le_bytes());
            plain.extend_from_slice(&raw.to_le_bytes());
        }
        for (name, block, length) in &pack.objects {
            plain.extend_from_slice(name);
            plain.extend_from_slice(&block.to_le_bytes());
            plain.extend_from_slice(&length.to_le_bytes());
        }
        let packed = self.packer.compress(&plain).context(what)?;
        let mut tail = Vec::with_capacity(packed.len() + SEAL_BYTES + TRAILER_BYTES);
        self.cipher.seal(&packed, &place(&pack.header, INDEX_PLACE), &mut tail)?;
        let length = tail.len() as u64;
        let mut trailer = [0; TRAILER_BYTES];
        trailer[..8].copy_from_slice(&pack.offset.to_le_bytes());
        trailer[8..16].copy_from_slice(&length.to_le_bytes());
        trailer[16..24].copy_from_slice(TRAILER_MAGIC);
        let sum = blake3::hash(&trailer[..24]);
        trailer[24..].copy_from_slice(&sum.as_bytes()[..8]);
        tail.extend_from_slice(&trailer);
        pack.file.write_all(&tail).context(what)?;
        pack.hash.update(&tail);
        let name = crate::hex::encode(&pack.hash.finalize().as_bytes()[..16]);
        let bytes = pack.offset + tail.len() as u64;
        (self.done)(Finished { file: pack.file, tmp: pack.tmp, name, bytes })
    }

    /// Closes what is open.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.close_block()?;
        self.close_pack()
    }
}

/// One pack on disk.
pub(crate) struct Pack {
    pub(crate) path: PathBuf,
    pub(crate) name: String,
    file: File,
    header: [u8; HEADER_BYTES],
    pub(crate) bytes: u64,
    /// Offset, stored bytes and raw bytes of each block.
    pub(crate) blocks: Vec<(u64, u32, u32)>,
    /// Why the index had to be made again from the blocks, if it had.
    pub(crate) index_damage: Option<String>,
}

/// Lets the next reader of a pack see the disk instead of the page cache. A hint; where it is not heeded, nothing is lost.
pub(crate) fn drop_from_cache(path: &Path) {
    if let Ok(file) = File::open(path) {
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    }
}

/// Where an object lies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Record {
    pub(crate) name: Name,
    pub(crate) pack: u32,
    pub(crate) block: u32,
    pub(crate) offset: u32,
    length: u32,
}

impl Record {
    pub(crate) fn length(&self) -> usize {
        (self.length & !KEYED_BIT) as usize
    }

    pub(crate) fn domain(&self) -> Domain {
        if self.length & KEYED_BIT == 0 { Domain::Plain } else { Domain::Keyed }
    }
}

/// Every object in the store, sorted by name. 48 bytes each: the only thing that grows with the number of objects.
pub(crate) struct Objects {
    pub(crate) packs: Vec<Pack>,
    pub(crate) records: Vec<Record>,
    /// Packs that could not be read at all, and why.
    pub(crate) lost: Vec<(String, String)>,
}

impl Objects {
    /// Every pack in the directory, by name.
    pub(crate) fn paths(dir: &Path) -> Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(dir).context(|| format!("listing {}", dir.display()))? {
            let path = entry.context(|| format!("listing {}", dir.display()))?.path();
            if path.extension().is_some_and(|e| e == "pack") {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths)
    }

    /// Reads the index of every pack in the directory.
    pub(crate) fn load(dir: &Path, key: &Key) -> Result<Objects> {
        Objects::of(Objects::paths(dir)?, key)
    }

    /// Reads the index of one pack.
    pub(crate) fn load_one(path: &Path, key: &Key) -> Result<Objects> {
        Objects::of(vec![path.to_owned()], key)
    }

    fn of(paths: Vec<PathBuf>, key: &Key) -> Result<Objects> {
        let mut all = Objects { packs: Vec::new(), records: Vec::new(), lost: Vec::new() };
        for path in paths {
            let ordinal = u32::try_from(all.packs.len()).unwrap_or(u32::MAX);
            match Pack::open(&path, key, ordinal, &mut all.records) {
                Ok(pack) => all.packs.push(pack),
                Err(e) if e.kind == Kind::NotFound => {}
                Err(e) => all.lost.push((path.display().to_string(), e.why)),
            }
        }
        all.records.sort_unstable_by(|a, b| a.name.cmp(&b.name).then(b.pack.cmp(&a.pack)));
        Ok(all)
    }

    /// Every place an object lies in.
    pub(crate) fn places(&self, name: &Name) -> &[Record] {
        let from = self.records.partition_point(|r| r.name < *name);
        let count = self.records[from..].iter().take_while(|r| r.name == *name).count();
        &self.records[from..from + count]
    }

    pub(crate) fn has(&self, name: &Name) -> bool {
        self.records.binary_search_by(|r| r.name.cmp(name)).is_ok()
    }

    /// Where an object lies in several places, keeps one that proves right, so that nobody keeps the broken one and throws
    /// the good one away; the one in the largest pack, so that not two packs are half needed. A crash between healing and removing leaves such twins; there are few.
    pub(crate) fn forget_broken_twins(&mut self, key: &Key) {
        let mut reader = ObjectReader::new(self, key);
        let mut keep = Vec::with_capacity(self.records.len());
        for twins in self.records.chunk_by(|a, b| a.name == b.name) {
            let before = keep.len();
            if twins.len() > 1 {
                let right = twins.iter().filter(|r| reader.proves(r));
                keep.extend(right.max_by_key(|r| self.packs[r.pack as usize].bytes).copied());
            }
            // One alone is not looked at, and of none that is right all stay, for whoever can mend them.
            if keep.len() == before {
                keep.extend_from_slice(twins);
            }
        }
        self.records = keep;
    }
}

impl Pack {
    fn open(path: &Path, key: &Key, ordinal: u32, records: &mut Vec<Record>) -> Result<Pack> {
        let what = || format!("reading the pack {}", path.display());
        let corrupt = |why: &str| Error::new(Kind::Corrupt, what(), why);
        let file = File::open(path).context(what)?;
        let bytes = file.metadata().context(what)?.len();
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0).map_err(|_| corrupt("it is cut short"))?;
        let name = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        // The header is part of every block's proof: without it as it was, nothing of the pack opens.
        let mut header_damage = None;
        if let Err(why) = seal::check_header(&header, FileKind::Pack, key) {
            header = seal::mend_header(&header, FileKind::Pack, key).ok_or_else(|| corrupt(&why))?;
            header_damage = Some(why);
        }
        let mut pack =
            Pack { path: path.to_owned(), name, file, header, bytes, blocks: Vec::new(), index_damage: None };
        let from = records.len();
        if let Err(why) = pack.read_index(key, ordinal, records) {
            records.truncate(from);
            pack.blocks.clear();
            pack.scan_blocks(key, ordinal, records)?;
            pack.index_damage = Some(why);
        }
        pack.index_damage = header_damage.or(pack.index_damage);
        Ok(pack)
    }

    fn read_index(
        &mut self,
        key: &Key,
        ordinal: u32,
        records: &mut Vec<Record>,
    ) -> std::result::Result<(), String> {
        let cut = |_| "its index cannot be read".to_string();
        let end = self.bytes.checked_sub(TRAILER_BYTES as u64).ok_or("it is cut short")?;
        let mut trailer = [0; TRAILER_BYTES];
        self.file.read_exact_at(&mut trailer, end).map_err(cut)?;
        if &trailer[16..24] != TRAILER_MAGIC || trailer[24..] != blake3::hash(&trailer[..24]).as_bytes()[..8]
        {
            return Err("its end is damaged".into());
        }
        let offset = u64_at(&trailer, 0);
        let length = u64_at(&trailer, 8);
        if offset.checked_add(length) != Some(end) || length > MAX_INDEX_BYTES {
            return Err("its end is damaged".into());
        }
        let mut sealed = vec![0; usize::try_from(length).unwrap_or(0)];
        self.file.read_exact_at(&mut sealed, offset).map_err(cut)?;
        let packed = Cipher::new(key)
            .open(&mut sealed, &place(&self.header, INDEX_PLACE))
            .ok_or("its index fails its proof")?;
        let size = zstd::zstd_safe::get_frame_content_size(packed).ok().flatten().unwrap_or(u64::MAX);
        if size > MAX_INDEX_BYTES {
            return Err("its index is absurdly large".into());
        }
        let plain = zstd::bulk::decompress(packed, usize::try_from(size).unwrap_or(0))
            .map_err(|_| "its index does not unpack".to_string())?;
        if plain.len() < 8 {
            return Err("its index is cut short".into());
        }
        let blocks = u32_at(&plain, 0) as usize;
        let objects = u32_at(&plain, 4) as usize;
        let expected = blocks
            .checked_mul(INDEX_BLOCK_BYTES)
            .zip(objects.checked_mul(INDEX_RECORD_BYTES))
            .and_then(|(b, o)| b.checked_add(o)?.checked_add(8));
        if expected != Some(plain.len()) {
            return Err("its index is malformed".into());
        }
        for at in (8..8 + blocks * INDEX_BLOCK_BYTES).step_by(INDEX_BLOCK_BYTES) {
            self.blocks.push((u64_at(&plain, at), u32_at(&plain, at + 8), u32_at(&plain, at + 12)));
        }
        records.reserve(objects);
        let (mut block_now, mut within) = (u32::MAX, 0u32);
        for record in plain[8 + blocks * INDEX_BLOCK_BYTES..].chunks_exact(INDEX_RECORD_BYTES) {
            let mut name = [0; 32];
            name.copy_from_slice(&record[..32]);
            let (block, length) = (u32_at(record, 32), u32_at(record, 36));
            if block as usize >= blocks {
                return Err("its index is malformed".into());
            }
            if block != block_now {
                (block_now, within) = (block, 0);
            }
            records.push(Record { name, pack: ordinal, block, offset: within, length });
            within = within.saturating_add(length & !KEYED_BIT);
        }
        Ok(())
    }

    /// Makes the index again from the blocks themselves: as far as they can be walked.
    fn scan_blocks(&mut self, key: &Key, ordinal: u32, records: &mut Vec<Record>) -> Result<()> {
        let cipher = Cipher::new(key);
        let mut at = HEADER_BYTES as u64;
        let mut lead = [0; BLOCK_LEAD_BYTES];
        while self.file.read_exact_at(&mut lead, at).is_ok() {
            let stored = u32_at(&lead, 0) as usize;
            if !(SEAL_BYTES..=MAX_SEALED_BLOCK_BYTES).contains(&stored) {
                break;
            }
            let number = self.blocks.len();
            self.blocks.push((at, u32::try_from(stored + BLOCK_LEAD_BYTES).unwrap_or(0), 0));
            if let Ok(block) = self.block(&cipher, u32::try_from(number).unwrap_or(u32::MAX)) {
                self.blocks[number].2 = u32::try_from(block.data().len()).unwrap_or(0);
                let mut within = 0u32;
                for length in &block.lengths {
                    let size = length & !KEYED_BIT;
                    let domain = if size == *length { Domain::Plain } else { Domain::Keyed };
                    let bytes = &block.data()[within as usize..(within + size) as usize];
                    let name = key.name(domain, bytes);
                    let block = u32::try_from(number).unwrap_or(u32::MAX);
                    records.push(Record { name, pack: ordinal, block, offset: within, length: *length });
                    within += size;
                }
            }
            at += (stored + BLOCK_LEAD_BYTES) as u64;
        }
        Ok(())
    }

    /// Opens a block: its seal proven, its objects not yet.
    pub(crate) fn block(&self, cipher: &Cipher, number: u32) -> std::result::Result<Block, String> {
        let (offset, stored, _) =
            *self.blocks.get(number as usize).ok_or_else(|| "there is no such block".to_string())?;
        let stored = stored as usize;
        if !(BLOCK_LEAD_BYTES + SEAL_BYTES..=MAX_SEALED_BLOCK_BYTES + BLOCK_LEAD_BYTES).contains(&stored) {
            return Err("its size is absurd".into());
        }
        let mut sealed = vec![0; stored];
        self.file.read_exact_at(&mut sealed, offset).map_err(|e| format!("it cannot be read: {e}"))?;
        let flags = sealed[4];
        if u32_at(&sealed, 0) as usize + BLOCK_LEAD_BYTES != stored || flags & !FLAG_PACKED != 0 {
            return Err("its lead is damaged".into());
        }
        let data = cipher
            .open(&mut sealed[BLOCK_LEAD_BYTES..], &place(&self.header, u64::from(number)))
            .ok_or_else(|| "it fails its proof".to_string())?;
        let plain = if flags & FLAG_PACKED != 0 {
            zstd::bulk::decompress(data, BLOCK_BYTES + 4 * (MAX_BLOCK_OBJECTS + 1))
                .map_err(|_| "it does not unpack".to_string())?
        } else {
            data.to_vec()
        };
        Block::parse(plain).ok_or_else(|| "it is malformed".to_string())
    }
}

/// An opened block.
pub(crate) struct Block {
    plain: Vec<u8>,
    from: usize,
    lengths: Vec<u32>,
}

impl Block {
    fn parse(plain: Vec<u8>) -> Option<Block> {
        let count = u32_at(plain.get(..4)?, 0) as usize;
        if count > MAX_BLOCK_OBJECTS {
            return None;
        }
        let from = 4 + 4 * count;
        let lengths: Vec<u32> = plain.get(4..from)?.chunks_exact(4).map(|c| u32_at(c, 0)).collect();
        let sum: usize = lengths.iter().map(|l| (l & !KEYED_BIT) as usize).sum();
        (from + sum == plain.len()).then_some(Block { plain, from, lengths })
    }

    pub(crate) fn data(&self) -> &[u8] {
        &self.plain[self.from..]
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut b = [0; 4];
    b.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(b)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut b = [0; 8];
    b.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(b)
}

/// Blocks kept open per reader: neighbours share a block, and duplicates jump back a little.
const CACHED_BLOCKS: usize = 8;

/// Reads objects, each proven by its seal and its name before it is given out.
pub(crate) struct ObjectReader<'a> {
    objects: &'a Objects,
    key: &'a Key,
    cipher: Cipher,
    cache: Vec<((u32, u32), Arc<Block>)>,
    /// Blocks known bad, so that each is tried once.
    bad: HashSet<(u32, u32)>,
}

impl<'a> ObjectReader<'a> {
    pub(crate) fn new(objects: &'a Objects, key: &'a Key) -> ObjectReader<'a> {
        ObjectReader { objects, key, cipher: Cipher::new(key), cache: Vec::new(), bad: HashSet::new() }
    }

    fn block(&mut self, pack: u32, number: u32) -> std::result::Result<Arc<Block>, String> {
        if let Some(at) = self.cache.iter().position(|(k, _)| *k == (pack, number)) {
            let hit = self.cache.remove(at);
            let block = Arc::clone(&hit.1);
            self.cache.push(hit);
            return Ok(block);
        }
        if self.bad.contains(&(pack, number)) {
            return Err("its block fails its proof".into());
        }
        let held = self.objects.packs.get(pack as usize).ok_or("its pack is gone")?;
        match held.block(&self.cipher, number) {
            Ok(block) => {
                let block = Arc::new(block);
                if self.cache.len() >= CACHED_BLOCKS {
                    self.cache.remove(0);
                }
                self.cache.push(((pack, number), Arc::clone(&block)));
                Ok(block)
            }
            Err(why) => {
                self.bad.insert((pack, number));
                Err(format!("block {number} of pack {}: {why}", held.name))
            }
        }
    }

    /// Whether this very place holds what it says.
    pub(crate) fn proves(&mut self, record: &Record) -> bool {
        let from = record.offset as usize;
        self.block(record.pack, record.block).is_ok_and(|b| {
            b.data()
                .get(from..from + record.length())
                .is_some_and(|bytes| self.key.name(record.domain(), bytes) == record.name)
        })
    }

    /// Appends the object's bytes to `out` if any place in the store holds them and they are right.
    pub(crate) fn read(
        &mut self,
        name: &Name,
        domain: Domain,
        out: &mut Vec<u8>,
    ) -> std::result::Result<(), String> {
        let mut why = None;
        for place in self.objects.places(name) {
            let block = match self.block(place.pack, place.block) {
                Ok(b) => b,
                Err(e) => {
                    why = Some(e);
                    continue;
                }
            };
            let from = place.offset as usize;
            match block.data().get(from..from + place.length()) {
                Some(bytes) if self.key.name(domain, bytes) == *name => {
                    out.extend_from_slice(bytes);
                    return Ok(());
                }
                Some(_) | None => why = Some("its bytes do not match its name".into()),
            }
        }
        Err(why.unwrap_or_else(|| "it is not in the store".into()))
    }
}

/// Names already stored by a snapshot that is being taken, shared by its workers.
#[derive(Default)]
pub(crate) struct Fresh(std::sync::Mutex<HashMap<Name, ()>>);

impl Fresh {
    /// True for the first who asks: that one stores it.
    pub(crate) fn claim(&self, name: Name) -> bool {
        let mut set = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        set.insert(name, ()).is_none()
    }
}
