//! Other copies of an object that the store has lost: in the live trees and in the spare.
//!
//! First where a manifest or an index says that the same bytes lie (any file of any root that had them), then in every
//! file of the converging live trees and of the spares that has the right size. Whatever is read there is a claim
//! until its hash is right: nobody gets a byte that was not proven. All of it is slow and rare, so nothing is looked up
//! before the first object is missed.

use crate::beneath::{Base, Stat};
use crate::content::late;
use crate::key::{Domain, Name};
use crate::layout::{Head, Layout, RootRef};
use crate::pack::BLOCK_BYTES;
use crate::repair::spare_reference;
use crate::tree::{EntryKind, TreeReader};
use crate::walk::{Filter, Step, Walk};
use host::Result;
use host::clock::Deadline;
use rustix::fs::OFlags;
use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// Trees that are looked into.
const MAX_SOURCES: usize = 64;
/// Manifests of one root that are believed to say where something lies, newest first.
const MAX_MANIFESTS: usize = 8;
/// Places remembered, about 24 bytes each; a node has a twentieth of that.
const MAX_PLACES: usize = 1_000_000;
/// Files of one size that are read for one object.
const MAX_SAME_SIZE: usize = 4_096;
/// Looks at the clock once in so many entries.
const CLOCK_EVERY: usize = 4_096;

/// What is missed, and where in a file of what size it belongs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Missed {
    pub(crate) name: Name,
    pub(crate) domain: Domain,
    pub(crate) length: usize,
    pub(crate) file_bytes: u64,
    pub(crate) at: u64,
}

/// Where a proven copy was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    Live,
    Spare,
}

/// Looks for lost objects outside the store.
pub(crate) struct Elsewhere<'a> {
    layout: &'a Layout,
    /// Roots as they lie now, before those that snapshots name.
    roots: Vec<RootRef>,
    spares: &'a [(String, PathBuf)],
    deadline: Deadline,
    known: Mutex<Option<Arc<Known>>>,
}

struct Source {
    base: Base,
    origin: Origin,
}

/// A piece of a file: its source, its path within the text of all paths, and where in it.
struct Place {
    key: u64,
    path_at: u32,
    path_bytes: u32,
    source: u16,
    at: u64,
}

#[derive(Default)]
struct Known {
    sources: Vec<Source>,
    paths: Vec<u8>,
    /// By the first bytes of the object's name.
    by_name: Vec<Place>,
    /// By the file's size.
    by_size: Vec<Place>,
}

impl Known {
    fn add_path(&mut self, path: &[u8]) -> Option<(u32, u32)> {
        let at = u32::try_from(self.paths.len()).ok()?;
        self.paths.extend_from_slice(path);
        Some((at, u32::try_from(path.len()).ok()?))
    }

    fn path(&self, place: &Place) -> &[u8] {
        let from = place.path_at as usize;
        self.paths.get(from..from + place.path_bytes as usize).unwrap_or_default()
    }
}

fn key_of(name: &Name) -> u64 {
    let mut key = [0; 8];
    key.copy_from_slice(&name[..8]);
    u64::from_le_bytes(key)
}

fn of(places: &[Place], key: u64) -> &[Place] {
    let from = places.partition_point(|p| p.key < key);
    let count = places[from..].iter().take_while(|p| p.key == key).count();
    &places[from..from + count]
}

impl<'a> Elsewhere<'a> {
    pub(crate) fn new(
        layout: &'a Layout,
        roots: Vec<RootRef>,
        spares: &'a [(String, PathBuf)],
        deadline: Deadline,
    ) -> Elsewhere<'a> {
        Elsewhere { layout, roots, spares, deadline, known: Mutex::new(None) }
    }

    /// Puts the object into `buffer` if anybody has it. What is there otherwise is nothing.
    pub(crate) fn find(&self, missed: &Missed, buffer: &mut Vec<u8>) -> Result<Option<Origin>> {
        buffer.clear();
        if missed.length > BLOCK_BYTES {
            return Ok(None);
        }
        let known = self.known()?;
        let by_name = of(&known.by_name, key_of(&missed.name)).iter();
        let by_size = of(&known.by_size, missed.file_bytes).iter().take(MAX_SAME_SIZE);
        for (place, at) in by_name.map(|p| (p, p.at)).chain(by_size.map(|p| (p, missed.at))) {
            if self.deadline.passed() {
                return Err(late("looking for another copy of a lost object"));
            }
            let Some(source) = known.sources.get(usize::from(place.source)) else { continue };
            if self.read(source, known.path(place), at, missed, buffer) {
                return Ok(Some(source.origin));
            }
        }
        buffer.clear();
        Ok(None)
    }

    /// Reads and proves.
    fn read(&self, source: &Source, path: &[u8], at: u64, missed: &Missed, buffer: &mut Vec<u8>) -> bool {
        let Ok(fd) = source.base.open_at(path, OFlags::RDONLY | OFlags::NONBLOCK) else { return false };
        let file = File::from(fd);
        if !crate::content::stat_of(&file).is_ok_and(|s| s.is_file()) {
            return false;
        }
        buffer.resize(missed.length, 0);
        file.read_exact_at(buffer, at).is_ok() && self.layout.key.name(missed.domain, buffer) == missed.name
    }

    fn known(&self) -> Result<Arc<Known>> {
        let mut held = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = &*held {
            return Ok(Arc::clone(known));
        }
        let known = Arc::new(self.look_around()?);
        *held = Some(Arc::clone(&known));
        Ok(known)
    }

    fn look_around(&self) -> Result<Known> {
        let mut known = Known::default();
        let heads = self.layout.heads().map(|h| h.0).unwrap_or_default();
        let newest_first = || self.roots.iter().chain(heads.iter().rev().flat_map(|h: &Head| &h.trees));
        let mut seen = HashSet::new();
        let mut places: Vec<(RootRef, Origin)> = Vec::new();
        for r in newest_first() {
            if seen.insert(r.root.path.clone()) {
                places.push((r.clone(), Origin::Live));
            }
            let spare = self.spares.iter().find(|(name, _)| *name == r.root.name);
            if let Some((_, path)) = spare.filter(|(_, p)| seen.insert(p.clone())) {
                places.push((spare_reference(r, path), Origin::Spare));
            }
        }
        for (reference, origin) in places.into_iter().take(MAX_SOURCES) {
            let Ok(base) = Base::open(&reference.root.path) else { continue };
            let source = u16::try_from(known.sources.len()).unwrap_or(u16::MAX);
            // The index knows best; the manifests say where the bytes were.
            if let Ok(index) =
                TreeReader::index(&self.layout.index_path(&reference.root.name), &self.layout.key)
            {
                self.note(&mut known, source, index)?;
            }
            let name = reference.root.name.strip_prefix("spare of ").unwrap_or(&reference.root.name);
            let mut trees = HashSet::new();
            for r in newest_first().filter(|r| r.root.name == name) {
                if trees.len() < MAX_MANIFESTS
                    && trees.insert(&r.tree)
                    && let Ok(tree) = self.layout.tree(r)
                {
                    self.note(&mut known, source, tree)?;
                }
            }
            if reference.root.class.converges() {
                self.note_sizes(&mut known, source, &base, &reference)?;
            }
            known.sources.push(Source { base, origin });
        }
        known.by_name.sort_unstable_by_key(|p| (p.key, p.source));
        known.by_size.sort_unstable_by_key(|p| (p.key, p.source));
        Ok(known)
    }

    /// Notes where a stream says that objects lie. A damaged stream has said something until then.
    fn note(&self, known: &mut Known, source: u16, mut stream: TreeReader) -> Result<()> {
        let mut count = 0usize;
        while let Ok(Some(entry)) = stream.next() {
            count += 1;
            if count.is_multiple_of(CLOCK_EVERY) && self.deadline.passed() {
                return Err(late("looking for another copy of a lost object"));
            }
            if entry.kind != EntryKind::File || known.by_name.len() >= MAX_PLACES {
                continue;
            }
            let Some((path_at, path_bytes)) = known.add_path(&entry.path) else { continue };
            let mut chunk = 0u64;
            for run in &entry.runs {
                let at = chunk * u64::from(entry.chunk_bytes());
                known.by_name.push(Place { key: key_of(&run.name), path_at, path_bytes, source, at });
                chunk += u64::from(run.count);
            }
        }
        Ok(())
    }

    /// Notes every file of a converging tree by its size.
    fn note_sizes(&self, known: &mut Known, source: u16, base: &Base, reference: &RootRef) -> Result<()> {
        let mut walk = Walk::new(base, Filter::of(&reference.root), false)?;
        let mut count = 0usize;
        while let Some(step) = walk.next()? {
            count += 1;
            if count.is_multiple_of(CLOCK_EVERY) && self.deadline.passed() {
                return Err(late("looking for another copy of a lost object"));
            }
            let Step::Entry(found) = step else { continue };
            let Stat { size, .. } = found.stat;
            if !found.stat.is_file() || size == 0 || known.by_size.len() >= MAX_PLACES {
                continue;
            }
            let Some((path_at, path_bytes)) = known.add_path(&found.path) else { continue };
            known.by_size.push(Place { key: size, path_at, path_bytes, source, at: 0 });
        }
        Ok(())
    }
}
