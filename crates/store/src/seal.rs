//! Sealed files: a checksummed clear header, then frames that are compressed, encrypted and bound to their place.
//!
//! A frame opens only with the key, in its own file, at its own position; the last one says that it is the last. So
//! a flipped bit, a swapped frame, a truncated file and a file of another store each fail with one clear error.

use crate::key::{self, Key};
use chacha20poly1305::aead::AeadInPlace;
use chacha20poly1305::{KeyInit, Tag, XChaCha20Poly1305, XNonce};
use host::{Context, Error, Kind, Result};
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};

pub(crate) const FORMAT_VERSION: u16 = 1;
pub(crate) const HEADER_BYTES: usize = 48;
const MAGIC: &[u8; 8] = b"KOBOSHI\n";
const NONCE_BYTES: usize = 24;
pub(crate) const TAG_BYTES: usize = 16;
/// What sealing adds to a piece of data.
pub(crate) const SEAL_BYTES: usize = NONCE_BYTES + TAG_BYTES;
/// Frames are filled to about this much before they are compressed and sealed.
const FRAME_TARGET_BYTES: usize = 128 * 1024;
/// No frame of ours is larger: one entry of the largest file we take needs 40 MB of names.
const MAX_FRAME_BYTES: usize = 64 * 1024 * 1024;
const ZSTD_LEVEL: i32 = 1;

const FLAG_LAST: u8 = 1;
const FLAG_PACKED: u8 = 2;

/// What a sealed file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum FileKind {
    Head = 1,
    Tree = 2,
    Index = 3,
    Pack = 4,
    Trust = 5,
    Note = 6,
}

impl FileKind {
    fn word(self) -> &'static str {
        match self {
            FileKind::Head => "snapshot",
            FileKind::Tree => "manifest",
            FileKind::Index => "index",
            FileKind::Pack => "pack",
            FileKind::Trust => "trust record",
            FileKind::Note => "note",
        }
    }
}

/// Identifies one sealed file for ever; random.
pub(crate) type FileId = [u8; 16];

pub(crate) fn new_id() -> Result<FileId> {
    let mut id = [0; 16];
    key::random(&mut id)?;
    Ok(id)
}

pub(crate) fn header(kind: FileKind, key: &Key, id: FileId) -> [u8; HEADER_BYTES] {
    let mut h = [0; HEADER_BYTES];
    h[..8].copy_from_slice(MAGIC);
    h[8..10].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    h[10] = kind as u8;
    h[16..24].copy_from_slice(&key.id());
    h[24..40].copy_from_slice(&id);
    let sum = blake3::hash(&h[..40]);
    h[40..].copy_from_slice(&sum.as_bytes()[..8]);
    h
}

/// Proves a header and gives the file's id.
pub(crate) fn check_header(
    h: &[u8; HEADER_BYTES],
    kind: FileKind,
    key: &Key,
) -> std::result::Result<FileId, String> {
    if h[40..] != blake3::hash(&h[..40]).as_bytes()[..8] {
        return Err("its header is damaged".into());
    }
    if &h[..8] != MAGIC {
        return Err("it is not a file of this store".into());
    }
    let version = u16::from_le_bytes([h[8], h[9]]);
    if version != FORMAT_VERSION {
        return Err(format!("its format is {version}, this koboshi reads {FORMAT_VERSION}"));
    }
    if h[10] != kind as u8 {
        return Err(format!("it is not a {}", kind.word()));
    }
    if h[16..24] != key.id() {
        return Err("it was sealed with another key".into());
    }
    let mut id = [0; 16];
    id.copy_from_slice(&h[24..40]);
    Ok(id)
}

/// A header in which one byte was flipped, as it must have been: what is fixed is known, the id is proven by the sum, or
/// by what opens with it when the sum itself was hit. `None`: it is whole, and says something else.
pub(crate) fn mend_header(h: &[u8; HEADER_BYTES], kind: FileKind, key: &Key) -> Option<[u8; HEADER_BYTES]> {
    let sum_of = |h: &[u8; HEADER_BYTES]| blake3::hash(&h[..40]).as_bytes()[..8] == h[40..];
    if sum_of(h) {
        return None;
    }
    let mut id = [0; 16];
    id.copy_from_slice(&h[24..40]);
    let right = header(kind, key, id);
    let mut fixed = right;
    fixed[40..].copy_from_slice(&h[40..]);
    if sum_of(&fixed) {
        return Some(fixed);
    }
    for at in 24..40 {
        for byte in 0..=u8::MAX {
            let mut guess = fixed;
            guess[at] = byte;
            if sum_of(&guess) {
                return Some(guess);
            }
        }
    }
    Some(right)
}

/// Opens and closes pieces of data.
pub(crate) struct Cipher(XChaCha20Poly1305);

impl Cipher {
    pub(crate) fn new(key: &Key) -> Cipher {
        Cipher(XChaCha20Poly1305::new(key.sealing().into()))
    }

    /// Replaces `data[from..]` by nonce, ciphertext and tag. Each nonce is random: 192 bits do not collide.
    pub(crate) fn seal(&self, data: &[u8], place: &[u8], out: &mut Vec<u8>) -> Result<()> {
        let mut nonce = [0; NONCE_BYTES];
        key::random(&mut nonce)?;
        out.extend_from_slice(&nonce);
        let from = out.len();
        out.extend_from_slice(data);
        let tag = self
            .0
            .encrypt_in_place_detached(XNonce::from_slice(&nonce), place, &mut out[from..])
            .map_err(|e| Error::new(Kind::System, "sealing data", e))?;
        out.extend_from_slice(&tag);
        Ok(())
    }

    /// Opens nonce, ciphertext and tag in place; gives the plain part.
    pub(crate) fn open<'a>(&self, sealed: &'a mut [u8], place: &[u8]) -> Option<&'a mut [u8]> {
        if sealed.len() < SEAL_BYTES {
            return None;
        }
        let (nonce, rest) = sealed.split_at_mut(NONCE_BYTES);
        let (data, tag) = rest.split_at_mut(rest.len() - TAG_BYTES);
        self.0
            .decrypt_in_place_detached(XNonce::from_slice(nonce), place, data, Tag::from_slice(tag))
            .ok()?;
        Some(data)
    }
}

fn frame_place(header: &[u8; HEADER_BYTES], number: u64, flags: u8) -> [u8; HEADER_BYTES + 9] {
    let mut place = [0; HEADER_BYTES + 9];
    place[..HEADER_BYTES].copy_from_slice(header);
    place[HEADER_BYTES..HEADER_BYTES + 8].copy_from_slice(&number.to_le_bytes());
    place[HEADER_BYTES + 8] = flags;
    place
}

/// Writes a sealed file frame by frame into a file that is not yet published.
pub(crate) struct FrameWriter {
    file: File,
    path: PathBuf,
    cipher: Cipher,
    header: [u8; HEADER_BYTES],
    packer: zstd::bulk::Compressor<'static>,
    frames: u64,
    pub(crate) buffer: Vec<u8>,
    sealed: Vec<u8>,
}

impl FrameWriter {
    pub(crate) fn create(path: PathBuf, kind: FileKind, key: &Key, id: FileId) -> Result<FrameWriter> {
        let what = || format!("writing the {} {}", kind.word(), path.display());
        let mut file = crate::files::create_private(&path).context(what)?;
        let header = header(kind, key, id);
        file.write_all(&header).context(what)?;
        let packer = zstd::bulk::Compressor::new(ZSTD_LEVEL).context(what)?;
        Ok(FrameWriter {
            file,
            cipher: Cipher::new(key),
            header,
            packer,
            frames: 0,
            buffer: Vec::with_capacity(FRAME_TARGET_BYTES * 2),
            sealed: Vec::new(),
            path,
        })
    }

    /// Whether the frame in `buffer` is full enough to be closed.
    pub(crate) fn is_full(&self) -> bool {
        self.buffer.len() >= FRAME_TARGET_BYTES
    }

    /// Closes the frame in `buffer`.
    pub(crate) fn flush(&mut self, last: bool) -> Result<()> {
        let what = || format!("writing {}", self.path.display());
        if self.buffer.len() > MAX_FRAME_BYTES {
            return Err(Error::new(Kind::System, what(), "one entry is larger than the format allows"));
        }
        let packed = self.packer.compress(&self.buffer).context(what)?;
        let (flags, data) =
            if packed.len() < self.buffer.len() { (FLAG_PACKED, &packed[..]) } else { (0, &self.buffer[..]) };
        let flags = flags | if last { FLAG_LAST } else { 0 };
        self.sealed.clear();
        let stored = data.len() + SEAL_BYTES;
        self.sealed.extend_from_slice(&u32::try_from(stored).unwrap_or(u32::MAX).to_le_bytes());
        self.sealed.push(flags);
        self.cipher.seal(data, &frame_place(&self.header, self.frames, flags), &mut self.sealed)?;
        self.file.write_all(&self.sealed).context(what)?;
        self.frames += 1;
        self.buffer.clear();
        Ok(())
    }

    /// The file, to be synced and renamed by the caller.
    pub(crate) fn finish(mut self) -> Result<(File, PathBuf)> {
        self.flush(true)?;
        Ok((self.file, self.path))
    }
}

/// Reads a sealed file frame by frame, each proven before it is given out.
pub(crate) struct FrameReader {
    file: BufReader<File>,
    path: PathBuf,
    kind: FileKind,
    cipher: Cipher,
    header: [u8; HEADER_BYTES],
    unpacker: zstd::bulk::Decompressor<'static>,
    frames: u64,
    done: bool,
    pub(crate) id: FileId,
    sealed: Vec<u8>,
}

impl FrameReader {
    pub(crate) fn open(path: &Path, kind: FileKind, key: &Key) -> Result<FrameReader> {
        let what = || format!("reading the {} {}", kind.word(), path.display());
        let file = File::open(path).context(what)?;
        let mut file = BufReader::with_capacity(256 * 1024, file);
        let mut header = [0; HEADER_BYTES];
        file.read_exact(&mut header).map_err(|_| Error::new(Kind::Corrupt, what(), "it is cut short"))?;
        let id = check_header(&header, kind, key).map_err(|why| Error::new(Kind::Corrupt, what(), why))?;
        let unpacker = zstd::bulk::Decompressor::new().context(what)?;
        Ok(FrameReader {
            file,
            path: path.to_owned(),
            kind,
            cipher: Cipher::new(key),
            header,
            unpacker,
            frames: 0,
            done: false,
            id,
            sealed: Vec::new(),
        })
    }

    fn corrupt(&self, why: &str) -> Error {
        Error::new(Kind::Corrupt, format!("reading the {} {}", self.kind.word(), self.path.display()), why)
    }

    /// The next frame's plain bytes in `out`; false after the last one.
    pub(crate) fn next(&mut self, out: &mut Vec<u8>) -> Result<bool> {
        out.clear();
        if self.done {
            return Ok(false);
        }
        let mut lead = [0; 5];
        self.file.read_exact(&mut lead).map_err(|_| self.corrupt("it is cut short"))?;
        let stored = u32::from_le_bytes([lead[0], lead[1], lead[2], lead[3]]) as usize;
        let flags = lead[4];
        if !(SEAL_BYTES..=MAX_FRAME_BYTES + SEAL_BYTES + 1024).contains(&stored)
            || flags & !(FLAG_LAST | FLAG_PACKED) != 0
        {
            return Err(self.corrupt("a frame is damaged"));
        }
        // Grown as it is read, so that a lying length costs no memory.
        self.sealed.clear();
        let got = (&mut self.file).take(stored as u64).read_to_end(&mut self.sealed);
        match got {
            Ok(n) if n == stored => {}
            Ok(_) => return Err(self.corrupt("it is cut short")),
            Err(e) => return Err(Error::io(format!("reading {}", self.path.display()), &e)),
        }
        let place = frame_place(&self.header, self.frames, flags);
        let Some(data) = self.cipher.open(&mut self.sealed, &place) else {
            return Err(Error::new(
                Kind::Corrupt,
                format!("reading the {} {}", self.kind.word(), self.path.display()),
                format!("frame {} fails its proof", self.frames),
            ));
        };
        if flags & FLAG_PACKED != 0 {
            let size = zstd::zstd_safe::get_frame_content_size(data).ok().flatten().unwrap_or(u64::MAX);
            let size = usize::try_from(size).unwrap_or(usize::MAX);
            if size > MAX_FRAME_BYTES {
                return Err(Error::new(
                    Kind::Corrupt,
                    format!("reading {}", self.path.display()),
                    "a frame is absurdly large",
                ));
            }
            out.reserve(size);
            self.unpacker.decompress_to_buffer(data, out).map_err(|_| {
                Error::new(
                    Kind::Corrupt,
                    format!("reading {}", self.path.display()),
                    "a frame does not unpack",
                )
            })?;
        } else {
            out.extend_from_slice(data);
        }
        self.frames += 1;
        if flags & FLAG_LAST != 0 {
            self.done = true;
            let mut more = [0; 1];
            if !matches!(self.file.read(&mut more), Ok(0)) {
                return Err(self.corrupt("something follows its end"));
            }
        }
        Ok(true)
    }
}

/// Writes a small sealed file into `path` (not yet published).
pub(crate) fn write_small(path: PathBuf, kind: FileKind, key: &Key, bytes: &[u8]) -> Result<(File, PathBuf)> {
    let mut w = FrameWriter::create(path, kind, key, new_id()?)?;
    w.buffer.extend_from_slice(bytes);
    w.finish()
}

/// Reads a small sealed file.
pub(crate) fn read_small(path: &Path, kind: FileKind, key: &Key) -> Result<Vec<u8>> {
    let mut r = FrameReader::open(path, kind, key)?;
    let (mut all, mut frame) = (Vec::new(), Vec::new());
    while r.next(&mut frame)? {
        all.extend_from_slice(&frame);
        if all.len() > MAX_FRAME_BYTES {
            return Err(r.corrupt("it is absurdly large"));
        }
    }
    Ok(all)
}
