//! The journal and its fold: what is known, and the one way to know more.
//!
//! A record is checked against the state, appended durably, and only then applied. When the journal cannot be written,
//! the fold goes on in memory and in the run directory for this boot, and the engine is told.

use crate::places::Places;
use engine::{Event, Moment, Record, State};
use host::journal::Journal;
use host::{Error, Kind, Result, files};
use serde::{Deserialize, Serialize};

/// Records of one incident kept for people; the middle goes first, so that its beginning stays readable.
const MAX_TOLD: usize = 2_000;
/// The first records of an incident are never dropped.
const KEEP_FIRST: usize = 200;
/// Below this much room the journal is rewritten as one checkpoint.
const LEAST_ROOM_BYTES: u64 = 256 << 10;
/// A lost journal is tried again this often.
const TRY_AGAIN_MS: u64 = 10_000;
/// Closed incidents kept as files; the oldest go first.
const MAX_ARCHIVED: usize = 500;

/// What is kept of a closed incident.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Archived {
    /// The first good look that the judge then confirmed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_good: Option<Moment>,
    /// All its records.
    pub records: Vec<Record>,
}

/// What became of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// It is durable and applied.
    Yes,
    /// It may not follow what was written before: the world moved on; ask the engine again.
    Refused,
    /// The journal took no record; nothing was applied. The next ones are kept in memory.
    JournalLost,
}

/// The journal and its fold.
#[derive(Debug)]
pub struct Book {
    journal: Option<Journal>,
    fallback: Option<Journal>,
    state: State,
    told: Vec<Record>,
    places: Places,
    /// When a lost journal was last tried.
    tried: Option<Moment>,
}

impl Book {
    /// Opens the journal and folds it. What was cut or could not be read is returned for the log.
    pub fn open(places: &Places) -> Result<(Book, Vec<String>)> {
        let mut words = Vec::new();
        let mut book = Book {
            journal: None,
            fallback: None,
            state: State::default(),
            told: Vec::new(),
            places: places.clone(),
            tried: None,
        };
        match Journal::open(&places.journal()) {
            Ok((journal, payloads, opened)) => {
                if let Some(why) = opened.why {
                    words.push(format!(
                        "the journal's torn tail was cut off: {} bytes, {why}",
                        opened.cut_bytes
                    ));
                }
                book.journal = Some(journal);
                book.fold(&payloads, &mut words);
                book.take_fallback(&mut words);
            }
            Err(e) => {
                words.push(format!("{e}; going on in {}", places.journal_fallback().display()));
                book.take_fallback(&mut words);
                book.lose();
            }
        }
        book.never_a_number_twice();
        Ok((book, words))
    }

    /// A journal that lost its tail (or was lost) must not give a number again whose incident, quarantine and messages
    /// exist: the old ones would be written over, and the new ones taken for told.
    fn never_a_number_twice(&mut self) {
        /// Numbers above this name quarantines of steps run by hand.
        const BY_HAND: u64 = 1_000_000;
        let quarantined = std::fs::read_dir(self.places.quarantine())
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.parse::<u64>().ok());
        let archived = archived_ids(&self.places).unwrap_or_default();
        let highest = quarantined.chain(archived).filter(|id| *id < BY_HAND).max().unwrap_or(0);
        if highest > self.state.incidents {
            self.state.incidents = highest;
            self.checkpoint(host::clock::now());
        }
    }

    /// Reads the journal without touching it, for people.
    pub fn read(places: &Places) -> Result<(State, Vec<Record>)> {
        let (payloads, _) = match Journal::read(&places.journal()) {
            Ok(read) => read,
            Err(e) if e.kind == Kind::NotFound => return Ok((State::default(), Vec::new())),
            Err(e) => return Err(e),
        };
        let records: Vec<Record> = payloads.iter().filter_map(|p| serde_json::from_slice(p).ok()).collect();
        let mut state = State::default();
        for record in &records {
            let _ = engine::apply(&mut state, record);
        }
        Ok((state, records))
    }

    /// What an agent before this one could only write to the run directory, in this very boot, is the newer truth.
    fn take_fallback(&mut self, words: &mut Vec<String>) {
        let path = self.places.journal_fallback();
        let Ok((payloads, _)) = Journal::read(&path) else {
            return;
        };
        let records: Vec<Record> = payloads.iter().filter_map(|p| serde_json::from_slice(p).ok()).collect();
        let mut state = State::default();
        for record in &records {
            let _ = engine::apply(&mut state, record);
        }
        let now = host::clock::now();
        let this_boot = state.last.is_some_and(|last| last.boot == now.boot);
        let newer = this_boot
            && match (state.last, self.state.last) {
                (Some(theirs), Some(ours)) => ours.boot != theirs.boot || theirs.ms > ours.ms,
                (Some(_), None) => true,
                (None, _) => false,
            };
        if newer {
            words.push(format!("{} records were kept in {} only", records.len(), path.display()));
            self.state = state;
            self.told = records;
            self.checkpoint(now);
        }
        if self.journal.is_some() {
            let _ = std::fs::remove_file(&path);
        }
    }

    /// Makes the journal say what is known, in one record.
    fn checkpoint(&mut self, now: Moment) {
        if let (Some(journal), Ok(text)) =
            (&mut self.journal, serde_json::to_vec(&self.state.checkpoint(now)))
            && journal.rewrite(&[text]).is_err()
        {
            self.lose();
        }
    }

    fn fold(&mut self, payloads: &[Vec<u8>], words: &mut Vec<String>) {
        for (index, payload) in payloads.iter().enumerate() {
            let record: Record = match serde_json::from_slice(payload) {
                Ok(record) => record,
                Err(e) => {
                    words.push(format!(
                        "record {index} of the journal is not understood ({e}); it is passed over"
                    ));
                    continue;
                }
            };
            match engine::apply(&mut self.state, &record) {
                Ok(()) => self.tell(record),
                Err(illegal) => {
                    words.push(format!("record {index} of the journal: {illegal}; it is passed over"));
                }
            }
        }
    }

    /// Everything that is known.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The records of the last incident.
    pub fn told(&self) -> &[Record] {
        &self.told
    }

    /// Whether the journal takes records.
    pub fn journal_ok(&self) -> bool {
        self.journal.is_some()
    }

    /// Checks, appends durably, applies.
    pub fn write(&mut self, mut record: Record) -> Written {
        let mut after = self.state.clone();
        if engine::apply(&mut after, &record).is_err() {
            return Written::Refused;
        }
        record.wall = Some(host::clock::wall().to_string());
        let Ok(payload) = serde_json::to_vec(&record) else {
            return Written::Refused;
        };
        if let Some(journal) = &mut self.journal {
            if journal.append(&payload).is_err() {
                self.lose();
                return Written::JournalLost;
            }
        } else if let Some(fallback) = &mut self.fallback {
            // Best effort by definition: memory is what counts while the journal is lost.
            let _ = fallback.append(&payload);
        }
        self.state = after;
        self.tell(record);
        Written::Yes
    }

    /// Tries to get the journal back, and keeps it small.
    pub fn tidy(&mut self, now: Moment) {
        match &self.journal {
            None if self.tried.and_then(|at| now.since_ms(at)).is_some_and(|ms| ms < TRY_AGAIN_MS) => {}
            None => {
                self.tried = Some(now);
                if let Ok((journal, payloads, _)) = Journal::open(&self.places.journal()) {
                    self.never_less_than(&payloads);
                    self.journal = Some(journal);
                    self.checkpoint(now);
                    if self.journal.is_some() {
                        self.fallback = None;
                        let _ = std::fs::remove_file(self.places.journal_fallback());
                    }
                }
            }
            Some(journal) if journal.room_left() < LEAST_ROOM_BYTES => self.checkpoint(now),
            Some(_) => {}
        }
    }

    /// A journal that could not be read when this agent began may know more: numbers given there are never given
    /// again, and an incident that only it knows goes on.
    fn never_less_than(&mut self, payloads: &[Vec<u8>]) {
        let mut theirs = State::default();
        for record in payloads.iter().filter_map(|p| serde_json::from_slice(p).ok()) {
            let _ = engine::apply(&mut theirs, &record);
        }
        if self.state.seq == 0 {
            self.state = theirs;
            return;
        }
        self.state.ids = self.state.ids.max(theirs.ids);
        self.state.incidents = self.state.incidents.max(theirs.incidents);
    }

    /// Keeps the incident that was just closed as a file of its own.
    pub fn archive(&self, id: u64, first_good: Option<Moment>) -> Result<()> {
        let archived = Archived { first_good, records: self.told.clone() };
        let text = serde_json::to_vec(&archived)
            .map_err(|e| Error::new(Kind::System, format!("write incident {id}"), e))?;
        files::write_atomic(&self.places.incidents().join(format!("{id:08}.json")), &text, 0o600)?;
        self.forget_old()
    }

    fn forget_old(&self) -> Result<()> {
        let mut all = archived_ids(&self.places)?;
        all.sort_unstable();
        for id in all.iter().rev().skip(MAX_ARCHIVED) {
            let _ = std::fs::remove_file(self.places.incidents().join(format!("{id:08}.json")));
        }
        Ok(())
    }

    fn tell(&mut self, record: Record) {
        if matches!(record.event, Event::Opened { .. } | Event::Checkpoint { .. }) {
            self.told.clear();
        }
        if self.told.len() >= MAX_TOLD {
            self.told.remove(KEEP_FIRST);
        }
        self.told.push(record);
    }

    fn lose(&mut self) {
        self.journal = None;
        self.fallback = Journal::open(&self.places.journal_fallback()).ok().map(|(journal, _, _)| journal);
        // The fallback begins with all that is known, so that the next agent of this boot can go on from it alone.
        let now = host::clock::now();
        if let (Some(fallback), Ok(text)) =
            (&mut self.fallback, serde_json::to_vec(&self.state.checkpoint(now)))
        {
            let _ = fallback.rewrite(&[text]);
        }
    }
}

/// The numbers of the incidents kept as files.
pub fn archived_ids(places: &Places) -> Result<Vec<u64>> {
    let dir = places.incidents();
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(format!("list {}", dir.display()), &e)),
    };
    Ok(entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.strip_suffix(".json")?.parse().ok())
        .collect())
}

/// One closed incident.
pub fn archived(places: &Places, id: u64) -> Result<Archived> {
    /// [`MAX_TOLD`] records of the largest size would be more; real ones are a few hundred bytes each.
    const MAX_BYTES: u64 = 64 << 20;
    let path = places.incidents().join(format!("{id:08}.json"));
    let bytes = files::read_bounded(&path, MAX_BYTES)?;
    serde_json::from_slice(&bytes).map_err(|e| {
        Error::new(Kind::Corrupt, format!("read incident {id}"), e)
            .hint(format!("{} is damaged", path.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use engine::{IncidentKind, Verdict};

    fn places(dir: &std::path::Path) -> Places {
        let config = Config {
            state_dir: Some(dir.join("state")),
            run_dir: Some(dir.join("run")),
            ..Config::default()
        };
        let places = Places::new(dir.join("koboshi.toml"), &config).unwrap();
        places.make().unwrap();
        places
    }

    fn at(ms: u64) -> Moment {
        Moment { boot: 1, ms }
    }

    fn open_incident(book: &mut Book, ms: u64) {
        let record = book.state().open(at(ms), IncidentKind::Outage, "it fell", Vec::new()).unwrap();
        assert_eq!(book.write(record), Written::Yes);
    }

    #[test]
    fn what_was_written_is_folded_by_the_next_agent() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(dir.path());
        let (mut book, words) = Book::open(&places).unwrap();
        assert!(words.is_empty(), "{words:?}");
        open_incident(&mut book, 10);
        let before = book.state().clone();
        drop(book);
        let (book, words) = Book::open(&places).unwrap();
        assert!(words.is_empty(), "{words:?}");
        assert_eq!(*book.state(), before);
        assert_eq!(Book::read(&places).unwrap().0, before);
    }

    #[test]
    fn a_record_that_may_not_follow_leaves_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(dir.path());
        let (mut book, _) = Book::open(&places).unwrap();
        open_incident(&mut book, 10);
        let before = book.state().clone();
        let again = Event::Opened {
            incident: 7,
            kind: IncidentKind::Outage,
            cause: String::new(),
            findings: Vec::new(),
        };
        assert_eq!(book.write(Record::new(at(11), again)), Written::Refused);
        assert_eq!(*book.state(), before);
        assert_eq!(Book::read(&places).unwrap().1.len(), 1);
    }

    #[test]
    fn a_torn_tail_is_cut_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(dir.path());
        let (mut book, _) = Book::open(&places).unwrap();
        open_incident(&mut book, 10);
        let verdict = Verdict::NotServing { why: "x".into() };
        let word = Event::Judged { verdict, confirmed: true, clean: true };
        assert_eq!(book.write(Record::new(at(12), word)), Written::Yes);
        drop(book);
        // The last record loses its last byte, as a power cut in the middle of a write leaves it.
        let mut bytes = std::fs::read(places.journal()).unwrap();
        let end = bytes.iter().rposition(|b| *b != 0).unwrap();
        bytes[end] = 0;
        std::fs::write(places.journal(), bytes).unwrap();
        let (book, words) = Book::open(&places).unwrap();
        assert_eq!(words.len(), 1, "{words:?}");
        assert!(
            book.state().incident.as_ref().is_some_and(|i| i.word.is_none()),
            "the first record is whole"
        );
    }

    #[test]
    fn without_a_journal_the_fold_goes_on_and_is_kept_when_it_is_back() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(dir.path());
        // A directory in the journal's place: it can neither be opened nor replaced.
        std::fs::create_dir(places.journal()).unwrap();
        let (mut book, words) = Book::open(&places).unwrap();
        assert_eq!(words.len(), 1);
        assert!(!book.journal_ok());
        open_incident(&mut book, 10);
        assert!(book.state().incident.is_some());
        std::fs::remove_dir(places.journal()).unwrap();
        book.tidy(at(20));
        assert!(book.journal_ok());
        drop(book);
        let (book, words) = Book::open(&places).unwrap();
        assert!(words.is_empty(), "{words:?}");
        assert!(book.state().incident.is_some(), "what was only in memory is in the journal now");
    }

    #[test]
    fn the_next_agent_of_this_boot_finds_what_only_the_run_directory_took() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(dir.path());
        std::fs::create_dir(places.journal()).unwrap();
        let (mut book, _) = Book::open(&places).unwrap();
        let now = host::clock::now();
        let record = book.state().open(now, IncidentKind::Outage, "it fell", Vec::new()).unwrap();
        assert_eq!(book.write(record), Written::Yes);
        drop(book);
        // Still lost: the second agent goes on from the run directory.
        let (book, _) = Book::open(&places).unwrap();
        assert!(book.state().incident.is_some());
        drop(book);
        // Back: the third takes it over into the journal.
        std::fs::remove_dir(places.journal()).unwrap();
        let (book, words) = Book::open(&places).unwrap();
        assert!(book.journal_ok(), "{words:?}");
        assert!(book.state().incident.is_some(), "{words:?} {:?}", book.state());
        assert!(!places.journal_fallback().exists());
        assert!(Book::read(&places).unwrap().0.incident.is_some());
    }

    #[test]
    fn numbers_given_by_an_unreadable_journal_are_never_given_again() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(dir.path());
        let (mut book, _) = Book::open(&places).unwrap();
        open_incident(&mut book, 10);
        drop(book);
        let aside = dir.path().join("aside");
        std::fs::rename(places.journal(), &aside).unwrap();
        std::fs::create_dir(places.journal()).unwrap();
        let (mut book, _) = Book::open(&places).unwrap();
        assert!(book.state().incident.is_none());
        std::fs::remove_dir(places.journal()).unwrap();
        std::fs::rename(&aside, places.journal()).unwrap();
        book.tidy(host::clock::now());
        assert_eq!(book.state().incidents, 1);
        assert!(book.state().incident.is_some(), "the incident that only the journal knew goes on");
    }

    #[test]
    fn a_number_whose_incident_is_kept_is_never_given_again() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(dir.path());
        let (mut book, _) = Book::open(&places).unwrap();
        open_incident(&mut book, 10);
        book.archive(41, None).unwrap();
        drop(book);
        std::fs::remove_file(places.journal()).unwrap();
        let (mut book, _) = Book::open(&places).unwrap();
        let now = host::clock::now();
        let record = book.state().open(now, IncidentKind::Outage, "again", Vec::new()).unwrap();
        assert_eq!(book.write(record), Written::Yes);
        assert_eq!(book.state().incident.as_ref().map(|i| i.id), Some(42));
        drop(book);
        assert_eq!(Book::open(&places).unwrap().0.state().incident.as_ref().map(|i| i.id), Some(42));
    }

    #[test]
    fn old_incidents_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(dir.path());
        let (mut book, _) = Book::open(&places).unwrap();
        open_incident(&mut book, 10);
        for id in 0..=MAX_ARCHIVED as u64 {
            book.archive(id, None).unwrap();
        }
        let kept = archived_ids(&places).unwrap();
        assert_eq!(kept.len(), MAX_ARCHIVED);
        assert!(!kept.contains(&0));
        assert_eq!(archived(&places, 5).unwrap().records.len(), 1);
        assert_eq!(archived(&places, 0).unwrap_err().kind, Kind::NotFound);
    }
}
