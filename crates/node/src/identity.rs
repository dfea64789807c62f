//! Who a node is and how much it remembers, read from its databases without touching them.
//!
//! Reading must leave no trace: opening a WAL database the ordinary way would make `-wal` and `-shm` files, and a
//! root-owned one keeps the gateway from starting. A live database is read through its existing `-shm`, read-only;
//! a dead one without a log as immutable; a dead one with a log from a private copy.
//! Nothing secret leaves this module: the device id only as a fingerprint, contents only as counts.

use crate::Node;
use crate::copies::PrivateCopy;
use crate::refusal::Checked;
use engine::{Class, Moment};
use host::clock::Deadline;
use host::error::{Error, Kind, Result};
use rusqlite::{Connection, OpenFlags};
use serde::{Deserialize, Serialize};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Rows are counted up to here: what matters is whether they are many, few or gone.
const COUNT_LIMIT: u64 = 100_000;

/// How much a node remembers. Absent tables count 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// Paired devices.
    pub paired: u64,
    /// Tokens of devices.
    pub device_tokens: u64,
    /// Scheduled jobs. A fresh database gets three of the program's own by itself.
    pub jobs: u64,
    /// Sessions of all agents.
    pub sessions: u64,
    /// Transcript entries of all agents.
    pub transcript: u64,
    /// Agents that have a database.
    pub agents: u64,
}

impl Counts {
    /// What was there before, when nothing at all is left of it. One kind alone that is gone is what an owner does (the last
    /// device revoked, the sessions cleared), and no amnesia: only all kinds at once, and at least two.
    #[must_use]
    pub fn fallen_to_zero(&self, now: &Counts) -> Option<Lost> {
        /// Kinds that must have fallen together.
        const TOGETHER: usize = 2;
        let pairs = [
            (self.paired, now.paired, "paired devices"),
            // Jobs do not count: a fresh database gets some of the program's own by itself.
            (self.sessions, now.sessions, "sessions"),
            (self.transcript, now.transcript, "transcripts"),
            (self.agents, now.agents, "agent databases"),
        ];
        let had: Vec<_> = pairs.into_iter().filter(|(before, _, _)| *before > 0).collect();
        let all_gone = had.iter().all(|(_, after, _)| *after == 0);
        (all_gone && had.len() >= TOGETHER).then(|| Lost {
            what: had.into_iter().map(|(_, _, what)| what).collect(),
            // The rest lives in the agents' own databases: the shared one has nothing to answer for.
            class: if self.paired > 0 { Class::State } else { Class::Sessions },
        })
    }
}

/// What a node remembered before and does not any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// In words.
    pub what: Vec<&'static str>,
    /// The class of data that held it.
    pub class: Class,
}

/// Who a node is at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Identity {
    /// Fingerprint of the gateway's device id; `None` when the database holds none.
    pub device_id: Option<String>,
    /// What it remembers.
    pub counts: Counts,
    /// The schema of the state database.
    pub schema: u32,
}

/// What is expected of a node: how it was at the last confirmed `Serving`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Baseline {
    /// The version that served.
    pub version: Option<String>,
    /// Fingerprint of the device id.
    pub device_id: Option<String>,
    /// What it remembered.
    pub counts: Counts,
    /// Hash of the program tree, where the store has one.
    pub program_hash: Option<String>,
    /// What the config said ([`crate::config::fingerprint`]).
    pub config: Option<String>,
    /// What the program itself says of the configs met lately, the newest last ([`crate::refusal`]).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub checked: Vec<Checked>,
    /// When the node was last onboarded, by its own config.
    pub onboarded: Option<String>,
    /// What `readyz` named as failing while it served.
    pub failing: Vec<String>,
    /// The schema of the state database.
    pub schema: Option<u32>,
    /// Whether its unit started by itself ([`crate::service::starts_by_itself`]).
    pub enabled: Option<bool>,
    /// When this was taken.
    pub taken: Option<Moment>,
}

impl Baseline {
    /// The baseline of a node that a judge has just confirmed.
    pub fn take(node: &Node, failing: Vec<String>, now: Moment, deadline: Deadline) -> Result<Baseline> {
        let identity = read_identity(node, deadline)?;
        let loaded = crate::config::load(node).ok();
        Ok(Baseline {
            version: node.package_version(),
            device_id: identity.device_id,
            counts: identity.counts,
            program_hash: None,
            config: loaded.as_ref().map(|l| crate::config::fingerprint(&l.value)),
            checked: Vec::new(),
            onboarded: loaded.as_ref().and_then(|l| onboarded(&l.value)),
            failing,
            schema: Some(identity.schema),
            enabled: crate::service::starts_by_itself(node),
            taken: Some(now),
        })
    }

    /// Remembers what the program said of a config; what it said of the one that served is kept longest.
    pub fn remember(&mut self, checked: Checked) {
        /// The one that served, the one that lies there, and a few tries between.
        const MOST: usize = 6;
        let same = |c: &Checked| c.config == checked.config && c.version == checked.version;
        if self.checked.iter().any(same) {
            return;
        }
        if self.checked.len() >= MOST {
            let served = self.config.clone();
            let oldest = self.checked.iter().position(|c| Some(&c.config) != served.as_ref());
            self.checked.remove(oldest.unwrap_or(0));
        }
        self.checked.push(checked);
    }
}

/// When the node was last onboarded, as its config remembers it.
#[must_use]
pub fn onboarded(config: &serde_json::Value) -> Option<String> {
    let run = config.get("wizard")?;
    (run.get("lastRunCommand")?.as_str()? == "onboard")
        .then(|| run.get("lastRunAt").and_then(|v| v.as_str()).map(str::to_owned))
        .flatten()
}

/// Reads who the node is. An error means "cannot tell" (missing, unreadable, corrupt), never "nobody".
pub fn read_identity(node: &Node, deadline: Deadline) -> Result<Identity> {
    let mut identity = read_state(&node.state_db(), deadline)?;
    for (_, db) in node.agent_dbs() {
        if deadline.passed() {
            return Err(Error::new(Kind::TimedOut, "reading the node's identity", "the deadline passed"));
        }
        let reader = match Reader::open(&db, deadline) {
            Ok(reader) => reader,
            Err(e) if e.kind == Kind::NotFound => continue,
            // One agent's broken database is that agent's finding, not the node's identity: it is there, whatever it
            // held.
            Err(e) if e.kind == Kind::Corrupt => {
                identity.counts.agents += 1;
                continue;
            }
            // One that is busy or too slow is there all the same: what cannot be counted is not zero.
            Err(e) => return Err(e),
        };
        identity.counts.agents += 1;
        identity.counts.sessions += reader.count("session_nodes")?.max(reader.count("sessions")?);
        identity.counts.transcript += reader.count("transcript_events")?;
    }
    Ok(identity)
}

/// The same for a state database that lies somewhere else (a salvaged or restored one), agents left out.
pub fn read_state(db: &Path, deadline: Deadline) -> Result<Identity> {
    let reader = Reader::open(db, deadline)?;
    if !reader.has_table("device_identities")? {
        let why = if reader.tables() == 0 { "it is empty" } else { "it is no OpenClaw state database" };
        return Err(Error::new(Kind::Corrupt, format!("reading {}", db.display()), why));
    }
    let id: Option<String> = match reader.db.query_row(
        "SELECT device_id FROM device_identities ORDER BY identity_key = 'primary' DESC, identity_key LIMIT 1",
        [],
        |row| row.get(0),
    ) {
        Ok(id) => Some(id),
        Err(rusqlite::Error::QueryReturnedNoRows) => None,
        Err(e) => return Err(of_sqlite(db, &e)),
    };
    Ok(Identity {
        device_id: id.map(|id| fingerprint(&id)),
        counts: Counts {
            paired: reader.count("device_pairing_paired")?,
            device_tokens: reader.count("device_auth_tokens")?,
            jobs: reader.count("cron_jobs")?,
            ..Counts::default()
        },
        schema: reader.schema(),
    })
}

fn fingerprint(id: &str) -> String {
    /// Enough to tell two ids apart, too little to be one.
    const FINGERPRINT_CHARS: usize = 24;
    blake3::derive_key("koboshi node device id fingerprint", id.as_bytes())
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect::<String>()
        .chars()
        .take(FINGERPRINT_CHARS)
        .collect()
}

/// How a database fares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DbState {
    /// It opens and passes its quick check; the schema, and whether it has any table.
    Sound {
        /// `user_version`.
        schema: u32,
        /// Tables in it.
        tables: u64,
    },
    /// No such file.
    Missing,
    /// A file of no bytes.
    Empty,
    /// Not a database, or a damaged one.
    Corrupt {
        /// What SQLite said.
        why: String,
    },
    /// We could not tell (no time, no rights, too large to copy).
    Unknown {
        /// Why.
        why: String,
    },
}

/// Checks one database, leaving no trace.
#[must_use]
pub fn check_database(db: &Path, deadline: Deadline) -> DbState {
    match std::fs::symlink_metadata(db) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return DbState::Missing,
        Err(e) => return DbState::Unknown { why: e.to_string() },
        Ok(m) if m.is_file() && m.len() == 0 && log_len(db) == 0 => return DbState::Empty,
        Ok(_) => {}
    }
    let reader = match Reader::open(db, deadline) {
        Ok(r) => r,
        Err(e) if e.kind == Kind::Corrupt => return DbState::Corrupt { why: e.why },
        Err(e) => return DbState::Unknown { why: e.why },
    };
    match reader.db.query_row("PRAGMA quick_check(1)", [], |row| row.get::<_, String>(0)) {
        Ok(s) if s == "ok" => DbState::Sound { schema: reader.schema(), tables: reader.tables() },
        Ok(s) => DbState::Corrupt { why: s },
        Err(e) => {
            let e = of_sqlite(db, &e);
            if e.kind == Kind::Corrupt {
                DbState::Corrupt { why: e.why }
            } else {
                DbState::Unknown { why: e.why }
            }
        }
    }
}

/// Bytes in a database's write-ahead log; 0 without one.
pub(crate) fn log_len(db: &Path) -> u64 {
    std::fs::metadata(beside(db, "-wal")).map_or(0, |m| m.len())
}

/// `openclaw.sqlite` and `-wal` make `openclaw.sqlite-wal`.
pub(crate) fn beside(db: &Path, suffix: &str) -> PathBuf {
    let mut name = db.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// A read-only view of a database.
struct Reader {
    db: Connection,
    path: PathBuf,
    /// Holds the private copy while it is read.
    _copy: Option<PrivateCopy>,
}

impl Reader {
    fn open(db: &Path, deadline: Deadline) -> Result<Reader> {
        let what = || format!("reading {}", db.display());
        let meta = std::fs::symlink_metadata(db).map_err(|e| Error::io(what(), &e))?;
        if !meta.is_file() {
            return Err(Error::new(Kind::Corrupt, what(), "it is not a plain file"));
        }
        let logged = log_len(db) > 0;
        let indexed = std::fs::metadata(beside(db, "-shm")).is_ok_and(|m| m.len() > 0);
        let (path, query, copy) = if logged && !indexed {
            let copy = PrivateCopy::of(db, meta.len(), deadline)?;
            (copy.main.clone(), "mode=rw", Some(copy))
        } else if logged {
            (db.to_path_buf(), "mode=ro&readonly_shm=1", None)
        } else {
            // Without a log there is nothing to recover: immutable takes no lock and makes no file.
            (db.to_path_buf(), "mode=ro&immutable=1", None)
        };
        let uri = format!("file:{}?{query}", encode(&path));
        let mut flags = OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        flags |=
            if copy.is_some() { OpenFlags::SQLITE_OPEN_READ_WRITE } else { OpenFlags::SQLITE_OPEN_READ_ONLY };
        let mut conn = Connection::open_with_flags(uri, flags).map_err(|e| of_sqlite(db, &e))?;
        let guard = move || deadline.passed();
        /// Virtual machine steps between two looks at the clock: about a millisecond.
        const STEPS: std::ffi::c_int = 20_000;
        conn.progress_handler(STEPS, Some(guard)).map_err(|e| of_sqlite(db, &e))?;
        conn.busy_timeout(deadline.left().min(std::time::Duration::from_secs(1)))
            .map_err(|e| of_sqlite(db, &e))?;
        let reader = Reader { db: conn, path: db.to_path_buf(), _copy: copy };
        // Only a read tells a database from any other file.
        reader
            .db
            .query_row("SELECT count(*) FROM sqlite_master", [], |row| row.get::<_, i64>(0))
            .map_err(|e| of_sqlite(db, &e))?;
        Ok(reader)
    }

    fn has_table(&self, name: &str) -> Result<bool> {
        let sql = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = ?1";
        let found: i64 = self.db.query_row(sql, [name], |row| row.get(0)).map_err(|e| self.failed(&e))?;
        Ok(found > 0)
    }

    fn tables(&self) -> u64 {
        let sql = "SELECT count(*) FROM sqlite_master WHERE type = 'table'";
        self.db
            .query_row(sql, [], |row| row.get::<_, i64>(0))
            .ok()
            .and_then(|n| u64::try_from(n).ok())
            .unwrap_or(0)
    }

    /// Rows of `table`, which is always one of our own constants. What cannot be read (busy, too slow) is an error:
    /// a 0 would say that all of it is gone.
    fn count(&self, table: &str) -> Result<u64> {
        if !self.has_table(table)? {
            return Ok(0);
        }
        let sql = format!("SELECT count(*) FROM (SELECT 1 FROM \"{table}\" LIMIT {COUNT_LIMIT})");
        let rows: i64 = self.db.query_row(&sql, [], |row| row.get(0)).map_err(|e| self.failed(&e))?;
        Ok(u64::try_from(rows).unwrap_or(0))
    }

    fn failed(&self, e: &rusqlite::Error) -> Error {
        of_sqlite(&self.path, e)
    }

    fn schema(&self) -> u32 {
        let got = self.db.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0));
        got.ok().and_then(|n| u32::try_from(n).ok()).unwrap_or(0)
    }
}

pub(crate) fn of_sqlite(db: &Path, e: &rusqlite::Error) -> Error {
    use rusqlite::ErrorCode as C;
    let what = format!("reading {}", db.display());
    let code = e.sqlite_error_code();
    let is = |codes: &[C]| code.is_some_and(|c| codes.contains(&c));
    let kind = if is(&[C::NotADatabase, C::DatabaseCorrupt]) {
        Kind::Corrupt
    } else if is(&[C::OperationInterrupted, C::DatabaseBusy, C::DatabaseLocked]) {
        Kind::TimedOut
    } else if is(&[C::PermissionDenied, C::AuthorizationForStatementDenied]) {
        Kind::Denied
    } else if is(&[C::DiskFull]) {
        Kind::NoSpace
    } else {
        Kind::System
    };
    Error::new(kind, what, e)
}

/// SQLite takes URIs: the few characters that mean something there are escaped.
fn encode(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let mut out = String::new();
    for b in path.as_os_str().as_bytes() {
        match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' | b'~' => {
                out.push(char::from(*b));
            }
            other => out.push_str(&format!("%{other:02x}")),
        }
    }
    out
}

/// A number that changes whenever a database was written to.
pub(crate) fn database_stamp(db: &Path) -> u64 {
    [beside(db, ""), beside(db, "-wal")]
        .iter()
        .filter_map(|p| std::fs::metadata(p).ok())
        .map(|m| {
            let seconds = u64::try_from(m.mtime()).unwrap_or(0);
            let nanos = u64::try_from(m.mtime_nsec()).unwrap_or(0);
            seconds.wrapping_mul(1_000_000_007).wrapping_add(nanos).wrapping_add(m.len().wrapping_mul(31))
        })
        .fold(0, u64::wrapping_add)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::time::Duration;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(20))
    }

    /// A state database as the program makes them, as far as it is read here.
    pub(crate) fn state_db(path: &Path, id: Option<&str>, paired: u32) -> Connection {
        std::fs::create_dir_all(path.parent().expect("parent")).expect("dir");
        let db = Connection::open(path).expect("open");
        db.execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA user_version = 18;
             CREATE TABLE device_identities (identity_key TEXT PRIMARY KEY, device_id TEXT NOT NULL);
             CREATE TABLE device_pairing_paired (device_id TEXT PRIMARY KEY);
             CREATE TABLE cron_jobs (job_id TEXT PRIMARY KEY);",
        )
        .expect("schema");
        if let Some(id) = id {
            db.execute("INSERT INTO device_identities VALUES ('primary', ?1)", [id]).expect("insert");
        }
        for n in 0..paired {
            db.execute("INSERT INTO device_pairing_paired VALUES (?1)", [n.to_string()]).expect("insert");
        }
        db
    }

    fn files(dir: &Path) -> Vec<(String, u64)> {
        let mut all: Vec<_> = std::fs::read_dir(dir)
            .expect("dir")
            .flatten()
            .map(|e| (e.file_name().to_string_lossy().into_owned(), e.metadata().expect("meta").len()))
            .collect();
        all.sort();
        all
    }

    #[test]
    fn a_dead_database_is_read_without_a_trace() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("openclaw.sqlite");
        drop(state_db(&path, Some("abc"), 2));
        let before = files(dir.path());
        assert_eq!(before.len(), 1, "a closed database has no log");
        let got = read_state(&path, soon()).expect("identity");
        assert_eq!(got.counts.paired, 2);
        assert_eq!(got.schema, 18);
        assert_ne!(got.device_id.as_deref(), Some("abc"));
        assert_eq!(files(dir.path()), before);
    }

    #[test]
    fn a_live_database_is_read_with_what_only_its_log_holds() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("openclaw.sqlite");
        let writer = state_db(&path, Some("abc"), 3);
        let before = files(dir.path());
        assert_eq!(before.len(), 3, "{before:?}");
        assert_eq!(read_state(&path, soon()).expect("identity").counts.paired, 3);
        assert_eq!(files(dir.path()), before);
        drop(writer);
    }

    #[test]
    fn a_dead_database_with_a_log_is_read_from_a_copy() {
        let dir = tempfile::tempdir().expect("dir");
        let live = dir.path().join("live.sqlite");
        let writer = state_db(&live, Some("abc"), 4);
        let dead = dir.path().join("dead.sqlite");
        std::fs::copy(&live, &dead).expect("copy");
        std::fs::copy(beside(&live, "-wal"), beside(&dead, "-wal")).expect("copy");
        drop(writer);
        let before = files(dir.path());
        assert_eq!(read_state(&dead, soon()).expect("identity").counts.paired, 4);
        assert_eq!(files(dir.path()), before);
    }

    #[test]
    fn every_way_to_be_broken_has_its_name() {
        let dir = tempfile::tempdir().expect("dir");
        let at = |name: &str| dir.path().join(name);
        assert_eq!(check_database(&at("none"), soon()), DbState::Missing);
        std::fs::write(at("empty"), b"").expect("write");
        assert_eq!(check_database(&at("empty"), soon()), DbState::Empty);
        std::fs::write(at("text"), b"this is no database, whatever its name may say").expect("write");
        assert!(matches!(check_database(&at("text"), soon()), DbState::Corrupt { .. }));
        drop(state_db(&at("good"), Some("abc"), 50));
        assert!(matches!(check_database(&at("good"), soon()), DbState::Sound { schema: 18, .. }));
        let mut bytes = std::fs::read(at("good")).expect("read");
        for b in bytes.iter_mut().skip(4096).step_by(7) {
            *b = b.wrapping_add(113);
        }
        std::fs::write(at("bad"), bytes).expect("write");
        assert!(matches!(check_database(&at("bad"), soon()), DbState::Corrupt { .. }));
        std::fs::create_dir(at("directory")).expect("mkdir");
        assert!(matches!(check_database(&at("directory"), soon()), DbState::Corrupt { .. }));
    }

    #[test]
    fn a_database_without_identity_says_so_and_an_empty_one_is_no_answer() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("a");
        drop(state_db(&path, None, 0));
        assert_eq!(read_state(&path, soon()).expect("identity").device_id, None);
        std::fs::write(dir.path().join("b"), b"").expect("write");
        assert!(read_state(&dir.path().join("b"), soon()).is_err());
    }

    #[test]
    fn what_cannot_be_counted_in_time_is_no_zero() {
        let dir = tempfile::tempdir().expect("dir");
        let node = crate::find::tests::node_at(dir.path());
        drop(state_db(&node.state_db(), Some("abc"), 1));
        let agent = node.state_dir.join("agents/main/agent/openclaw-agent.sqlite");
        std::fs::create_dir_all(agent.parent().expect("parent")).expect("mkdir");
        let mut db = Connection::open(&agent).expect("open");
        db.execute_batch("CREATE TABLE transcript_events (id INTEGER PRIMARY KEY)").expect("schema");
        let rows = db.transaction().expect("transaction");
        for _ in 0..60_000 {
            rows.execute("INSERT INTO transcript_events VALUES (NULL)", []).expect("insert");
        }
        rows.commit().expect("commit");
        assert_eq!(read_identity(&node, soon()).expect("identity").counts.transcript, 60_000);
        // As when the deadline passes under the count.
        let late = Deadline::after(Duration::ZERO);
        let reader = Reader::open(&agent, late).expect("opens");
        assert_eq!(reader.count("transcript_events").map_err(|e| e.kind), Err(Kind::TimedOut));
        drop(db);
        // Another who holds it exclusively makes it busy, not gone.
        let db = Connection::open(&agent).expect("open");
        db.execute_batch("BEGIN EXCLUSIVE; INSERT INTO transcript_events VALUES (NULL)").expect("lock");
        if let Ok(identity) = read_identity(&node, soon()) {
            assert_eq!(identity.counts.agents, 1);
            assert!(identity.counts.transcript >= 60_000);
        }
    }

    #[test]
    fn zero_counts_only_against_something() {
        let many = Counts { paired: 2, jobs: 3, transcript: 9, ..Counts::default() };
        let lost = many.fallen_to_zero(&Counts { jobs: 3, ..Counts::default() }).expect("all is gone");
        assert_eq!((lost.what, lost.class), (vec!["paired devices", "transcripts"], Class::State));
        // None of these is in the shared database.
        let alone = Counts { sessions: 2, transcript: 9, agents: 1, ..Counts::default() };
        assert_eq!(alone.fallen_to_zero(&Counts::default()).expect("gone").class, Class::Sessions);
        let revoked = Counts { transcript: 9, ..Counts::default() };
        assert_eq!(many.fallen_to_zero(&revoked), None, "an owner may revoke the last device");
        assert_eq!(Counts::default().fallen_to_zero(&Counts::default()), None);
        let some = Counts { paired: 1, jobs: 1, transcript: 1, ..Counts::default() };
        assert_eq!(many.fallen_to_zero(&some), None);
    }
}
