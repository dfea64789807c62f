//! What one host may tell another: the lists and objects of program and runtime, and of nothing else.
//!
//! Only roots of these two classes are listed, and only objects of the plain domain are read, so that nothing of the
//! user's can leave this way whatever name is asked for.

use crate::Store;
use crate::key::{Domain, Key};
use crate::pack::{ObjectReader, Objects};
use crate::tree::EntryKind;
use engine::words::Class;
use host::clock::Deadline;
use host::{Error, Kind, Result};
use std::path::PathBuf;

/// One entry of a program or runtime root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Below the root; empty = the root itself.
    pub path: Vec<u8>,
    /// Its permission bits. They are this host's own: no list that travels has them.
    pub mode: u32,
    /// What it is.
    pub what: HeldKind,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeldKind {
    /// A directory.
    Dir,
    /// A regular file with the plain BLAKE3 of each of its pieces of 256 KiB.
    File {
        /// Its owner may execute it.
        exec: bool,
        /// Bytes.
        size: u64,
        /// The pieces, in order.
        names: Vec<[u8; 32]>,
    },
    /// A symbolic link.
    Link {
        /// Where it points.
        target: Vec<u8>,
    },
}

/// Entries of one root; far more than any program has.
const MAX_ENTRIES: usize = 1_000_000;

impl Store {
    /// Where a root of program or runtime lay in this snapshot, and all it held. `None` when the snapshot has no such
    /// root of these classes.
    ///
    /// # Errors
    /// When the list cannot be read whole, or holds what could not be read when it was taken.
    pub fn held(&self, id: &str, root: &str, deadline: Deadline) -> Result<Option<(PathBuf, Vec<Held>)>> {
        let _reading = self.layout.read_lock();
        let head = self.layout.head(id)?;
        let lendable = |c: Class| match c {
            Class::Program | Class::Runtime => true,
            Class::Service
            | Class::Config
            | Class::Credentials
            | Class::State
            | Class::Sessions
            | Class::Workspace => false,
        };
        let Some(found) = head.trees.iter().find(|t| t.root.name == root && lendable(t.root.class)) else {
            return Ok(None);
        };
        let what = || format!("listing the {root} of snapshot {id}");
        let mut tree = self.layout.tree(found)?;
        let mut held = Vec::new();
        while let Some(entry) = tree.next()? {
            if deadline.passed() {
                return Err(crate::content::late(&what()));
            }
            if held.len() >= MAX_ENTRIES {
                return Err(Error::new(Kind::Corrupt, what(), "it has absurdly many entries"));
            }
            let kind = match entry.kind {
                EntryKind::Dir => HeldKind::Dir,
                EntryKind::File => HeldKind::File {
                    exec: entry.mode & 0o100 != 0,
                    size: entry.size,
                    names: entry
                        .runs
                        .iter()
                        .flat_map(|r| std::iter::repeat_n(r.name, r.count as usize))
                        .collect(),
                },
                EntryKind::Link => HeldKind::Link { target: entry.target },
                // No program consists of these; they are left where they are.
                EntryKind::Special => continue,
                EntryKind::Unread => {
                    return Err(Error::new(
                        Kind::NotFound,
                        what(),
                        "a file in it could not be read when it was taken",
                    ));
                }
            };
            held.push(Held { path: entry.path, mode: entry.mode & 0o7777, what: kind });
        }
        Ok(Some((found.root.path.clone(), held)))
    }

    /// Every object there is, ready to be read one by one.
    ///
    /// # Errors
    /// When the packs cannot be listed.
    pub fn shelf(&self) -> Result<Shelf> {
        let key = self.layout.key.clone();
        Ok(Shelf { objects: Objects::load(&self.layout.packs(), &key)?, key })
    }
}

/// The plainly named objects of a store.
pub struct Shelf {
    objects: Objects,
    key: Key,
}

impl std::fmt::Debug for Shelf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shelf").finish_non_exhaustive()
    }
}

impl Shelf {
    /// A reader, which keeps a few blocks open: neighbours are cheap.
    #[must_use]
    pub fn reader(&self) -> ShelfReader<'_> {
        ShelfReader(ObjectReader::new(&self.objects, &self.key))
    }
}

/// Reads objects off a [`Shelf`].
pub struct ShelfReader<'a>(ObjectReader<'a>);

impl std::fmt::Debug for ShelfReader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShelfReader").finish_non_exhaustive()
    }
}

impl ShelfReader<'_> {
    /// The object of this plain BLAKE3, proven; `None` when it is not there or damaged.
    pub fn object(&mut self, name: &[u8; 32]) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        self.0.read(name, Domain::Plain, &mut bytes).ok().map(|()| bytes)
    }
}
