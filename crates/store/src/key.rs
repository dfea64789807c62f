//! The store's key: one secret file outside the store, from which the sealing and the naming key are derived.
//!
//! Without it nothing in the store can be read, and no object of a user class can be recognised by its name.

use crate::{files, hex};
use host::{Context, Error, Kind, Result};
use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

const FILE_WORD: &str = "koboshi-key-1";
/// A key file is one short line; more is not a key file.
const MAX_KEY_FILE_BYTES: u64 = 4096;

/// BLAKE3 of an object, or keyed BLAKE3.
pub(crate) type Name = [u8; 32];

/// How an object is named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Domain {
    /// Plain BLAKE3: program and runtime, the same on every host.
    Plain,
    /// Keyed per store: a peer that holds a copy cannot confirm a guessed secret.
    Keyed,
}

/// The derived keys.
#[derive(Clone)]
pub(crate) struct Key {
    seal: [u8; 32],
    names: [u8; 32],
    id: [u8; 8],
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Key({})", hex::encode(&self.id))
    }
}

impl Key {
    fn derive(secret: &[u8; 32]) -> Key {
        let mut id = [0; 8];
        id.copy_from_slice(&blake3::derive_key("koboshi store 1: key id", secret)[..8]);
        Key {
            seal: blake3::derive_key("koboshi store 1: sealing", secret),
            names: blake3::derive_key("koboshi store 1: object names", secret),
            id,
        }
    }

    /// Reads a key file.
    pub(crate) fn read(path: &Path) -> Result<Key> {
        let what = || format!("reading the store's key {}", path.display());
        let mut text = String::new();
        std::fs::File::open(path)
            .and_then(|f| f.take(MAX_KEY_FILE_BYTES).read_to_string(&mut text))
            .context(what)
            .map_err(|e| {
                e.hint("without this file the store cannot be read: bring it back from where you keep a copy")
            })?;
        let mut words = text.split_whitespace();
        let secret = match (words.next(), words.next(), words.next()) {
            (Some(FILE_WORD), Some(digits), None) => hex::decode::<32>(digits),
            _ => None,
        };
        match secret {
            Some(secret) => Ok(Key::derive(&secret)),
            None => Err(Error::new(
                Kind::Corrupt,
                what(),
                format!("it is not one line of `{FILE_WORD}` and 64 hexadecimal digits"),
            )
            .hint("bring the key file back from where you keep a copy")),
        }
    }

    /// Makes a new key file; never replaces one.
    pub(crate) fn create(path: &Path) -> Result<Key> {
        let what = || format!("making the store's key {}", path.display());
        let mut secret = [0; 32];
        random(&mut secret)?;
        if let Some(parent) = path.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent).context(what)?;
        }
        // Whole before it has its name: a power cut must not leave an empty key in the way of every later start.
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let new = Path::new(&new);
        let _ = files::remove(new);
        let mut file =
            std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(new).context(what)?;
        file.write_all(format!("{FILE_WORD} {}\n", hex::encode(&secret)).as_bytes()).context(what)?;
        files::sync_file(&file).context(what)?;
        let (from, to) = (new.as_os_str().as_bytes(), path.as_os_str().as_bytes());
        match files::rename_at(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) if !path.exists() => {
                files::rename(new, path).context(what)?;
            }
            done => done.context(what)?,
        }
        if let Some(parent) = path.parent() {
            files::sync_dir(parent)?;
        }
        Ok(Key::derive(&secret))
    }

    /// What the file headers name the key by.
    pub(crate) fn id(&self) -> [u8; 8] {
        self.id
    }

    pub(crate) fn sealing(&self) -> &[u8; 32] {
        &self.seal
    }

    /// The name of these bytes.
    pub(crate) fn name(&self, domain: Domain, bytes: &[u8]) -> Name {
        match domain {
            Domain::Plain => *blake3::hash(bytes).as_bytes(),
            Domain::Keyed => *blake3::keyed_hash(&self.names, bytes).as_bytes(),
        }
    }

    #[cfg(test)]
    pub(crate) fn for_test() -> Key {
        Key::derive(&[7; 32])
    }
}

/// Fills `to` with bytes of the kernel's generator.
pub(crate) fn random(to: &mut [u8]) -> Result<()> {
    getrandom::fill(to).map_err(|e| Error::new(Kind::System, "asking the kernel for random bytes", e))
}
