//! Walks a live tree in the order of the manifests, reading ahead with a second thread, in bounded memory.
//!
//! No symlink is followed and nothing outside the root is opened. What cannot be listed is said, so that nobody takes
//! "unreadable" for "missing".

use crate::Root;
use crate::beneath::{Base, DIR, MAX_PATH_BYTES, OWN_PREFIX, Stat};
use crate::tree::is_within;
use host::{Error, Result};
use rustix::fs::{OFlags, RawDir};
use rustix::io::Errno;
use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Entries that may be read ahead: bounds memory to about 10 MB.
const AHEAD_ENTRIES: usize = 64 * 1024;
const LISTING_BYTES: usize = 32 * 1024;
/// Leftovers of our own that are remembered per walk; the rest is found by the next one.
const MAX_LEFTOVERS: usize = 4096;

/// What belongs to a root.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    exclude: Vec<Vec<u8>>,
    only: Option<Vec<Vec<u8>>>,
}

impl Filter {
    pub(crate) fn of(root: &Root) -> Filter {
        let clean = |p: &String| p.trim_matches('/').as_bytes().to_vec();
        Filter {
            exclude: root.exclude.iter().map(clean).filter(|p| !p.is_empty()).collect(),
            only: root.only.as_ref().map(|o| o.iter().map(clean).collect()),
        }
    }

    /// Whether a path belongs to the root; directories leading to something that does, do.
    pub(crate) fn takes(&self, path: &[u8]) -> bool {
        if self.exclude.iter().any(|x| is_within(path, x)) {
            return false;
        }
        match &self.only {
            None => true,
            Some(only) => only.iter().any(|o| is_within(path, o) || is_within(o, path)),
        }
    }

    /// Whether everything below is looked at, so that a name not in the manifest is truly extra.
    pub(crate) fn owns(&self, path: &[u8]) -> bool {
        self.only.as_ref().is_none_or(|only| only.iter().any(|o| is_within(path, o)))
    }
}

/// One thing the walk came upon.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) path: Vec<u8>,
    pub(crate) stat: Stat,
    /// What stat says of `<name>-wal`, mixed; 0 = there is none.
    pub(crate) companion: u64,
    /// It is the `-wal`, `-shm` or `-journal` of a file beside it.
    pub(crate) is_companion: bool,
}

/// A step of the walk.
#[derive(Debug)]
pub(crate) enum Step {
    Entry(Found),
    /// A directory whose entry was given before and which cannot be listed.
    Closed(Vec<u8>, Errno),
}

struct Listing {
    entries: Vec<(Vec<u8>, Stat, u64, bool)>,
    leftovers: Vec<Vec<u8>>,
    trouble: Option<Errno>,
}

enum Slot {
    Queued(Vec<u8>),
    Running,
    Done(Listing),
}

#[derive(Default)]
struct State {
    slots: HashMap<u64, Slot>,
    /// Next to be read lies on top.
    stack: Vec<u64>,
    ahead: usize,
    stop: bool,
}

struct Shared {
    base: Base,
    filter: Filter,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn list(&self, rel: &[u8]) -> Listing {
        let mut all = Listing { entries: Vec::new(), leftovers: Vec::new(), trouble: None };
        if let Err(e) = self.try_list(rel, &mut all) {
            // Gone since it was seen: as good as empty.
            if e != Errno::NOENT {
                all.trouble = Some(e);
            }
        }
        all.entries.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        mark_companions(&mut all.entries);
        all
    }

    fn try_list(&self, rel: &[u8], all: &mut Listing) -> std::result::Result<(), Errno> {
        let dir = match self.base.open_at(rel, DIR | OFlags::NOATIME) {
            Err(Errno::PERM) => self.base.open_at(rel, DIR)?,
            other => other?,
        };
        let mut buffer = [MaybeUninit::uninit(); LISTING_BYTES];
        let mut listing = RawDir::new(&dir, &mut buffer);
        let mut path = Vec::with_capacity(rel.len() + 64);
        while let Some(entry) = listing.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            path.clear();
            path.extend_from_slice(rel);
            if !rel.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name);
            if name.starts_with(OWN_PREFIX) {
                if all.leftovers.len() < MAX_LEFTOVERS {
                    all.leftovers.push(path.clone());
                }
                continue;
            }
            if !self.filter.takes(&path) {
                continue;
            }
            if path.len() > MAX_PATH_BYTES {
                return Err(Errno::NAMETOOLONG);
            }
            use std::os::fd::AsFd;
            match Stat::at(dir.as_fd(), name) {
                Ok(stat) => all.entries.push((name.to_vec(), stat, 0, false)),
                Err(Errno::NOENT) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// The endings of what SQLite keeps beside a database.
pub(crate) const COMPANIONS: [&[u8]; 3] = [b"-wal", b"-shm", b"-journal"];

fn mark_companions(entries: &mut [(Vec<u8>, Stat, u64, bool)]) {
    for i in 0..entries.len() {
        let Some(base) = COMPANIONS.iter().find_map(|c| entries[i].0.strip_suffix(*c)) else { continue };
        let Ok(at) = entries.binary_search_by(|e| e.0.as_slice().cmp(base)) else { continue };
        if !entries[at].1.is_file() || !entries[i].1.is_file() {
            continue;
        }
        entries[i].3 = true;
        let s = entries[i].1;
        // An empty log says nothing, and comes and goes with each opening.
        if s.size > 0 && !entries[i].0.ends_with(b"-shm") {
            let mut h = blake3::Hasher::new();
            for part in [s.ino, s.size, s.mtime_ns.cast_unsigned(), s.ctime_ns.cast_unsigned()] {
                h.update(&part.to_le_bytes());
            }
            let mut mixed = [0; 8];
            mixed.copy_from_slice(&h.finalize().as_bytes()[..8]);
            entries[at].2 ^= u64::from_le_bytes(mixed) | 1;
        }
    }
}

struct Level {
    rel: Vec<u8>,
    entries: std::vec::IntoIter<(Vec<u8>, Stat, u64, bool)>,
    /// Slots of the directories among the entries, in order.
    jobs: std::vec::IntoIter<u64>,
}

/// The walk itself: one entry after another.
pub(crate) struct Walk {
    shared: Arc<Shared>,
    helper: Option<JoinHandle<()>>,
    levels: Vec<Level>,
    /// The directory whose entry was given last, not yet entered.
    enter: Option<(Vec<u8>, u64)>,
    root: Option<Stat>,
    started: bool,
    next_slot: u64,
    peeked: Option<Option<Step>>,
    /// What a crash of ours left lying about.
    pub(crate) leftovers: Vec<Vec<u8>>,
}

impl Walk {
    /// Begins at the root, which may be missing (then there is nothing). `ahead`: read ahead with a second thread.
    pub(crate) fn new(base: &Base, filter: Filter, ahead: bool) -> Result<Walk> {
        let root = match base.parent_of(&[]).and_then(|(dir, name)| {
            use std::os::fd::AsFd;
            Stat::at(dir.as_fd(), &name)
        }) {
            Ok(stat) => Some(stat),
            Err(Errno::NOENT) => None,
            Err(e) => {
                return Err(Error::io(
                    format!("looking at {}", base.path.display()),
                    &std::io::Error::from(e),
                ));
            }
        };
        let shared = Arc::new(Shared {
            base: base.clone(),
            filter,
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
        });
        let helper = if ahead && root.is_some_and(|s| s.is_dir()) {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name("store-walk".into()).spawn(move || read_ahead(&shared)).ok()
        } else {
            None
        };
        Ok(Walk {
            shared,
            helper,
            levels: Vec::new(),
            enter: None,
            root,
            started: false,
            next_slot: 0,
            peeked: None,
            leftovers: Vec::new(),
        })
    }

    /// Whether the root exists.
    pub(crate) fn exists(&self) -> bool {
        self.root.is_some()
    }

    pub(crate) fn peek(&mut self) -> Result<Option<&Step>> {
        if self.peeked.is_none() {
            self.peeked = Some(self.advance());
        }
        Ok(self.peeked.as_ref().and_then(Option::as_ref))
    }

    pub(crate) fn next(&mut self) -> Result<Option<Step>> {
        match self.peeked.take() {
            Some(step) => Ok(step),
            None => Ok(self.advance()),
        }
    }

    /// Does not enter the directory whose entry was taken last.
    pub(crate) fn skip_children(&mut self) {
        debug_assert!(self.peeked.is_none(), "nothing may be peeked between an entry and its skipping");
        if let Some((_, slot)) = self.enter.take() {
            let mut state = self.shared.lock();
            if let Some(Slot::Done(l)) = state.slots.remove(&slot) {
                state.ahead = state.ahead.saturating_sub(l.entries.len());
            }
            self.shared.changed.notify_all();
        }
    }

    fn advance(&mut self) -> Option<Step> {
        if !self.started {
            self.started = true;
            let stat = self.root?;
            if stat.is_dir() {
                let slot = self.queue(vec![Vec::new()]).into_iter().next()?;
                self.enter = Some((Vec::new(), slot));
            }
            return Some(Step::Entry(Found { path: Vec::new(), stat, companion: 0, is_companion: false }));
        }
        if let Some((rel, slot)) = self.enter.take() {
            let listing = self.listing(slot, &rel);
            self.leftovers.extend(listing.leftovers);
            self.leftovers.truncate(MAX_LEFTOVERS);
            if let Some(e) = listing.trouble {
                return Some(Step::Closed(rel, e));
            }
            let dirs = listing.entries.iter().filter(|e| e.1.is_dir()).map(|e| join(&rel, &e.0)).collect();
            let jobs = self.queue(dirs).into_iter();
            self.levels.push(Level { rel, entries: listing.entries.into_iter(), jobs });
        }
        loop {
            let level = self.levels.last_mut()?;
            let Some((name, stat, companion, is_companion)) = level.entries.next() else {
                self.levels.pop();
                continue;
            };
            let path = join(&level.rel, &name);
            if stat.is_dir()
                && let Some(slot) = level.jobs.next()
            {
                self.enter = Some((path.clone(), slot));
            }
            return Some(Step::Entry(Found { path, stat, companion, is_companion }));
        }
    }

    /// Offers directories for reading ahead; the first of them will be needed first.
    fn queue(&mut self, dirs: Vec<Vec<u8>>) -> Vec<u64> {
        let first = self.next_slot;
        self.next_slot += dirs.len() as u64;
        let slots: Vec<u64> = (first..self.next_slot).collect();
        let mut state = self.shared.lock();
        for (slot, rel) in slots.iter().zip(dirs).rev() {
            state.slots.insert(*slot, Slot::Queued(rel));
            if self.helper.is_some() {
                state.stack.push(*slot);
            }
        }
        drop(state);
        if self.helper.is_some() {
            self.shared.changed.notify_all();
        }
        slots
    }

    fn listing(&self, slot: u64, rel: &[u8]) -> Listing {
        let mut state = self.shared.lock();
        loop {
            match state.slots.remove(&slot) {
                Some(Slot::Done(l)) => {
                    state.ahead = state.ahead.saturating_sub(l.entries.len());
                    drop(state);
                    self.shared.changed.notify_all();
                    return l;
                }
                Some(Slot::Running) => {
                    state.slots.insert(slot, Slot::Running);
                    state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                // Nobody has begun: doing it here cannot wait for anybody.
                Some(Slot::Queued(_)) | None => {
                    drop(state);
                    return self.shared.list(rel);
                }
            }
        }
    }
}

fn join(rel: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(rel.len() + 1 + name.len());
    path.extend_from_slice(rel);
    if !rel.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

fn read_ahead(shared: &Shared) {
    let mut state = shared.lock();
    loop {
        if state.stop {
            return;
        }
        let job = if state.ahead < AHEAD_ENTRIES { state.stack.pop() } else { None };
        let Some(slot) = job else {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        let Some(Slot::Queued(rel)) = state.slots.remove(&slot) else { continue };
        state.slots.insert(slot, Slot::Running);
        drop(state);
        let listing = shared.list(&rel);
        state = shared.lock();
        // Skipped meanwhile: nobody will fetch it.
        if let Some(place) = state.slots.get_mut(&slot) {
            let count = listing.entries.len();
            *place = Slot::Done(listing);
            state.ahead += count;
        }
        shared.changed.notify_all();
    }
}

impl Drop for Walk {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        if let Some(helper) = self.helper.take() {
            // A panic there has already been reported by its own message.
            let _ = helper.join();
        }
    }
}
