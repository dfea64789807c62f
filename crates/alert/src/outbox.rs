//! Messages on disk until they are told. What [`Outbox::put`] has answered for survives a kill and a power cut.
//! A full or broken disk is one of the things to be told: where it refuses, a spare directory on another file system
//! (`/run`) keeps the message for this boot, and where that refuses too, this process does.
//!
//! One file per message, replaced whole. A message is known by its key, also after it was told: a restarted agent
//! that folds its journal and tells the same event again is not heard twice. Between a receiver's answer and our
//! record of it lies a moment in which a kill makes us send again: at least once, never lost, and the key is in
//! the payload.
//!
//! Bounds: notices are dropped, oldest first; an opening, emergency or closing message never is.

use crate::channel::Channel;
use crate::text::{Kind, Message};
use engine::Moment;
use host::error::{Context, Error, Kind as ErrorKind, Result};
use host::files;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// More queued notices than this and the oldest go: nobody reads more after an outage.
pub const NOTICE_LIMIT: usize = 64;
/// More queued incident messages than this are refused: more than eighty untold incidents tell enough.
pub const INCIDENT_LIMIT: usize = 256;
/// A message's text is bounded where it is rendered; a file beyond this is not ours.
const ENTRY_LIMIT_BYTES: u64 = 64 << 10;
/// Keys of told messages that are remembered: months of normal life.
const TOLD_LIMIT: usize = 512;
/// The list of told keys and the list of proven channels stay far below this.
const LIST_LIMIT_BYTES: u64 = 256 << 10;
/// Unreadable files that are kept for a person to look at.
const BAD_LIMIT: usize = 8;
/// Channels that once accepted something; more fingerprints than this are of settings long gone.
const PROVEN_LIMIT: usize = 64;
/// After this many attempts a channel is given up for one message, if another channel has taken it: about 6 hours.
const ATTEMPT_LIMIT: u32 = 20;
/// Waits between attempts for one message on one channel; the last one repeats for ever.
const BACKOFF_MS: [u64; 7] = [5_000, 15_000, 45_000, 120_000, 300_000, 900_000, 1_800_000];
/// Version of the files here.
const SCHEMA: u32 = 1;

const TOLD_FILE: &str = "told";
const PROVEN_FILE: &str = "proven";
const ENTRY_SUFFIX: &str = ".json";
const BAD_SUFFIX: &str = ".bad";

/// What [`Outbox::put`] did.
#[derive(Debug)]
pub enum Put {
    /// It will be told.
    Queued {
        /// Keys of the notices that were dropped for it.
        dropped: Vec<String>,
        /// What it will survive.
        kept: Kept,
    },
    /// It is queued or told already.
    Duplicate,
}

/// What a queued message will survive.
#[derive(Debug)]
pub enum Kept {
    /// A power cut.
    OnDisk,
    /// The end of this process, not of this boot: the spare directory has it. Why the disk refused.
    InSpare(Error),
    /// Nothing: only this very [`Outbox`] has it. Why the last directory refused. Deliver it with this one.
    InMemory(Error),
}

/// How far one message has come on one channel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Progress {
    pub(crate) accepted: bool,
    pub(crate) attempts: u32,
    /// When to try again; `None` or another boot's moment: now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) due: Option<Moment>,
}

/// One queued message with its progress per channel name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    schema: u32,
    /// Order of arrival.
    pub(crate) seq: u64,
    pub(crate) message: Message,
    #[serde(default)]
    pub(crate) channels: BTreeMap<String, Progress>,
}

impl Entry {
    pub(crate) fn progress(&self, channel: &Channel) -> Progress {
        self.channels.get(channel.name()).cloned().unwrap_or_default()
    }

    pub(crate) fn is_due(&self, channel: &Channel, now: Moment) -> bool {
        let p = self.progress(channel);
        !p.accepted && wait_ms(p.due, now) == 0
    }

    /// Whether nothing is left to do: each channel has it, or was tried long enough while another of its sort has it.
    fn is_told(&self, channels: &[Channel]) -> bool {
        let taken = |local: bool| channels.iter().any(|c| c.is_local() == local && self.progress(c).accepted);
        (taken(true) || taken(false))
            && channels.iter().all(|c| {
                let p = self.progress(c);
                p.accepted || (p.attempts >= ATTEMPT_LIMIT && taken(c.is_local()))
            })
    }

    /// Emergencies go first, notices last; within a rank in order of arrival.
    pub(crate) fn rank(&self) -> (u8, u64) {
        let rank = match self.message.kind {
            Kind::Emergency => 0,
            Kind::Opening | Kind::Closing => 1,
            Kind::Notice(_) => 2,
        };
        (rank, self.seq)
    }
}

/// Milliseconds from `now` until `due`; a due moment of another boot has come.
pub(crate) fn wait_ms(due: Option<Moment>, now: Moment) -> u64 {
    due.and_then(|d| d.since_ms(now)).unwrap_or(0)
}

/// How long to wait after this many attempts.
pub(crate) fn backoff_ms(attempts: u32) -> u64 {
    let i = usize::try_from(attempts.saturating_sub(1)).unwrap_or(usize::MAX);
    BACKOFF_MS[i.min(BACKOFF_MS.len() - 1)]
}

/// The outbox of one agent.
#[derive(Debug)]
pub struct Outbox {
    dir: PathBuf,
    /// Where to write what `dir` refuses.
    spare: Option<PathBuf>,
    /// Newest state of what the disk would not take, by file id.
    volatile: BTreeMap<String, Entry>,
    /// Ids told by this process that the disk would not remember.
    volatile_told: BTreeSet<String>,
    /// Per channel name: no attempt before this moment, after one failed for want of an answer.
    pub(crate) rest: BTreeMap<String, Moment>,
    /// Names of unreadable files put aside since the last delivery.
    set_aside: Vec<String>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Told {
    schema: u32,
    /// Newest last.
    ids: Vec<String>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Proven {
    schema: u32,
    /// Fingerprint of a channel's settings, and the wall time of the message it last accepted.
    channels: BTreeMap<String, String>,
}

impl Outbox {
    /// Opens the outbox, making its directory. What is in it is read when it is needed.
    pub fn open(dir: &Path) -> Result<Outbox> {
        files::make_private_dir(dir)?;
        sweep(dir);
        Ok(Outbox {
            dir: dir.to_owned(),
            spare: None,
            volatile: BTreeMap::new(),
            volatile_told: BTreeSet::new(),
            rest: BTreeMap::new(),
            set_aside: Vec::new(),
        })
    }

    /// The same with a spare directory on another file system. Fails only when neither can be had.
    pub fn open_with_spare(dir: &Path, spare: &Path) -> Result<Outbox> {
        match (Outbox::open(dir), Outbox::open(spare)) {
            (Ok(main), Ok(_)) => Ok(Outbox { spare: Some(spare.to_owned()), ..main }),
            (Ok(main), Err(_)) => Ok(main),
            // The disk may come back: it stays the first to be asked.
            (Err(_), Ok(second)) => {
                Ok(Outbox { dir: dir.to_owned(), spare: Some(spare.to_owned()), ..second })
            }
            (Err(e), Err(_)) => Err(e),
        }
    }

    /// Queues a message, unless its key is queued or told already. Durable when it returns, or says what it is.
    ///
    /// Fails only when [`INCIDENT_LIMIT`] incident messages wait already.
    pub fn put(&mut self, message: &Message) -> Result<Put> {
        let id = id_of(&message.key);
        if self.told_ids().contains(&id) {
            return Ok(Put::Duplicate);
        }
        let queued = self.load();
        if queued.contains_key(&id) {
            return Ok(Put::Duplicate);
        }
        let mut dropped = Vec::new();
        if message.kind.is_incident() {
            if queued.values().filter(|e| e.message.kind.is_incident()).count() >= INCIDENT_LIMIT {
                return Err(Error::new(
                    ErrorKind::NoSpace,
                    format!("queueing {}", message.key),
                    format!("{INCIDENT_LIMIT} incident messages wait already"),
                )
                .hint("no channel accepts anything: koboshi alert test"));
            }
        } else {
            let mut notices: Vec<_> = queued.iter().filter(|(_, e)| !e.message.kind.is_incident()).collect();
            notices.sort_by_key(|(_, e)| e.seq);
            let surplus = (notices.len() + 1).saturating_sub(NOTICE_LIMIT);
            for (old, entry) in notices.into_iter().take(surplus) {
                self.forget(old);
                dropped.push(entry.message.key.clone());
            }
        }
        let seq = queued.values().map(|e| e.seq).max().unwrap_or(0) + 1;
        let entry = Entry { schema: SCHEMA, seq, message: message.clone(), channels: BTreeMap::new() };
        let kept = self.store(&id, &entry);
        Ok(Put::Queued { dropped, kept })
    }

    /// How many messages wait.
    pub fn len(&mut self) -> usize {
        self.load().len()
    }

    /// Whether none waits.
    pub fn is_empty(&mut self) -> bool {
        self.len() == 0
    }

    /// The wall time of the last message that exactly these settings delivered; `None`: never, so nobody may rely
    /// on the channel yet.
    #[must_use]
    pub fn proven(&self, channel: &Channel) -> Option<String> {
        self.proven_all().channels.remove(&channel.fingerprint())
    }

    pub(crate) fn set_proven(&self, channel: &Channel, at: &str) {
        let mut proven = self.proven_all();
        let fingerprint = channel.fingerprint();
        if channel.is_local() || proven.channels.contains_key(&fingerprint) {
            return;
        }
        if proven.channels.len() >= PROVEN_LIMIT {
            proven.channels.clear();
        }
        proven.channels.insert(fingerprint, at.to_owned());
        proven.schema = SCHEMA;
        // Not remembered only means that doctor goes on asking for a test.
        let _ = self.write(PROVEN_FILE, &proven);
    }

    fn proven_all(&self) -> Proven {
        let mut lists = self.lists::<Proven>(PROVEN_FILE);
        lists
            .drain(..)
            .reduce(|mut all, more| {
                all.channels.extend(more.channels);
                all
            })
            .unwrap_or_default()
    }

    /// All queued entries by id. Files that cannot be read as entries are put aside.
    pub(crate) fn load(&mut self) -> BTreeMap<String, Entry> {
        let told = self.told_ids();
        let mut out = BTreeMap::new();
        // The spare's state is the newer one: it is written only when the disk refuses, and goes when it takes again.
        for dir in self.dirs() {
            for name in names(&dir) {
                let Some(id) = name.strip_suffix(ENTRY_SUFFIX) else { continue };
                if self.volatile.contains_key(id) {
                    continue;
                }
                if told.contains(id) {
                    // Killed between remembering that it was told and removing it.
                    let _ = std::fs::remove_file(dir.join(&name));
                    continue;
                }
                match read_entry(&dir, &name, id) {
                    Ok(entry) => {
                        out.insert(id.to_owned(), entry);
                    }
                    Err(e) if e.kind == ErrorKind::NotFound => {}
                    Err(e) if e.kind == ErrorKind::Corrupt => self.put_aside(&dir, &name),
                    // Not readable just now (memory, permission), or a newer koboshi's: it stays for a better time.
                    Err(_) => {}
                }
            }
        }
        out.extend(self.volatile.iter().map(|(id, e)| (id.clone(), e.clone())));
        out
    }

    /// Keeps the newest state of an entry, as durably as can be had.
    pub(crate) fn store(&mut self, id: &str, entry: &Entry) -> Kept {
        let name = format!("{id}{ENTRY_SUFFIX}");
        let kept = match (write(&self.dir, &name, entry), &self.spare) {
            (Ok(()), spare) => {
                if let Some(spare) = spare {
                    // An older state that stays there means at worst a repetition.
                    let _ = std::fs::remove_file(spare.join(&name));
                }
                Kept::OnDisk
            }
            (Err(e), Some(spare)) => match write(spare, &name, entry) {
                Ok(()) => Kept::InSpare(e),
                Err(_) => Kept::InMemory(e),
            },
            (Err(e), None) => Kept::InMemory(e),
        };
        match kept {
            Kept::OnDisk | Kept::InSpare(_) => self.volatile.remove(id),
            Kept::InMemory(_) => self.volatile.insert(id.to_owned(), entry.clone()),
        };
        kept
    }

    /// Remembers an entry as told and removes it, if nothing is left to do for these channels.
    pub(crate) fn retire(&mut self, id: &str, entry: &Entry, channels: &[Channel]) -> bool {
        if !entry.is_told(channels) {
            return false;
        }
        let mut told = Told { schema: SCHEMA, ids: Vec::new() };
        for known in self.lists::<Told>(TOLD_FILE).into_iter().flat_map(|list| list.ids) {
            if known != id && !told.ids.contains(&known) {
                told.ids.push(known);
            }
        }
        told.ids.push(id.to_owned());
        let surplus = told.ids.len().saturating_sub(TOLD_LIMIT);
        told.ids.drain(..surplus);
        if self.write(TOLD_FILE, &told).is_err() {
            self.volatile_told.insert(id.to_owned());
        }
        self.forget(id);
        true
    }

    /// Names put aside since this was last asked.
    pub(crate) fn take_set_aside(&mut self) -> Vec<String> {
        std::mem::take(&mut self.set_aside)
    }

    fn forget(&mut self, id: &str) {
        self.volatile.remove(id);
        // A file that cannot be removed is known as told and never sent again.
        for dir in self.dirs() {
            let _ = std::fs::remove_file(dir.join(format!("{id}{ENTRY_SUFFIX}")));
        }
    }

    fn told_ids(&self) -> BTreeSet<String> {
        let mut ids: BTreeSet<String> =
            self.lists::<Told>(TOLD_FILE).into_iter().flat_map(|list| list.ids).collect();
        ids.extend(self.volatile_told.iter().cloned());
        ids
    }

    fn dirs(&self) -> Vec<PathBuf> {
        std::iter::once(&self.dir).chain(&self.spare).cloned().collect()
    }

    fn put_aside(&mut self, dir: &Path, name: &str) {
        let bad = names(dir).into_iter().filter(|n| n.ends_with(BAD_SUFFIX)).count();
        let path = dir.join(name);
        // Failing to move it aside leaves it where it is, to be skipped again.
        if bad >= BAD_LIMIT {
            let _ = std::fs::remove_file(path);
        } else {
            let _ = std::fs::rename(&path, dir.join(format!("{name}{BAD_SUFFIX}")));
        }
        self.set_aside.push(name.to_owned());
    }

    /// A list as each directory has it. One that is missing or damaged is empty: at worst a message is told twice.
    fn lists<T: Default + for<'de> Deserialize<'de>>(&self, name: &str) -> Vec<T> {
        let read = |dir: &PathBuf| {
            serde_json::from_slice(&files::read_bounded(&dir.join(name), LIST_LIMIT_BYTES).ok()?).ok()
        };
        self.dirs().iter().map(|dir| read(dir).unwrap_or_default()).collect()
    }

    fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<()> {
        match (write(&self.dir, name, value), &self.spare) {
            (Err(_), Some(spare)) => write(spare, name, value),
            (result, _) => result,
        }
    }
}

/// File names, sorted; none when the directory is gone (the next write makes it again).
fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|n| !n.starts_with('.'))
        .take(2 * (NOTICE_LIMIT + INCIDENT_LIMIT))
        .collect();
    names.sort();
    names
}

fn read_entry(dir: &Path, name: &str, id: &str) -> Result<Entry> {
    let bytes = files::read_bounded(&dir.join(name), ENTRY_LIMIT_BYTES)?;
    let corrupt = |why: String| Error::new(ErrorKind::Corrupt, format!("reading {name} of the outbox"), why);
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| corrupt(e.to_string()))?;
    if value["schema"].as_u64().is_some_and(|schema| schema > u64::from(SCHEMA)) {
        let why = "a newer koboshi wrote it";
        return Err(Error::new(ErrorKind::Usage, format!("reading {name} of the outbox"), why));
    }
    let entry: Entry = serde_json::from_value(value).map_err(|e| corrupt(e.to_string()))?;
    if entry.schema != SCHEMA || id_of(&entry.message.key) != id {
        return Err(corrupt("it is not what its name says".to_owned()));
    }
    Ok(entry)
}

fn write<T: Serialize>(dir: &Path, name: &str, value: &T) -> Result<()> {
    let what = || format!("writing {name} of the outbox");
    let bytes = serde_json::to_vec(value).map_err(|e| Error::new(ErrorKind::System, what(), e))?;
    if !dir.is_dir() {
        files::make_private_dir(dir)?;
    }
    files::write_atomic(&dir.join(name), &bytes, 0o600).context(what)
}

/// Removes what writers killed in the middle have left. Their names carry the writer's pid: the living are spared.
fn sweep(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let writer = name
            .to_str()
            .filter(|n| n.starts_with('.'))
            .and_then(|n| n.strip_suffix(".tmp")?.rsplit('.').next()?.split('-').next()?.parse::<u32>().ok());
        if writer.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // What stays is hidden and small, and the next start tries again.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// A file name for any key.
pub(crate) fn id_of(key: &str) -> String {
    blake3::hash(key.as_bytes()).to_hex()[..32].to_owned()
}
