//! The account of a user's data: what there was at the moment of injection, and what of it is there at the end.
//!
//! Told apart by content and by key, in the unit in which a user would miss it: files by hash, transcripts line by line,
//! database rows by primary key (by their own hash where a table has none), the config leaf by leaf after parsing. A unit
//! is lost when it is absent at the end, or older: other than it was, and not newer by the row's own time. Additions are
//! nobody's loss. What the gateway keeps for itself and writes anew at every start (leases, indices, caches) is named
//! below and left out; everything not named counts, so that a new table is watched from the day it appears.

use host::{Error, Kind, Result, files};
use node::Node;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// A demo's user has a few hundred things; more is a mistake of the demo.
const MAX_UNITS: usize = 200_000;
/// The largest single file that is hashed.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// How deep a user's tree is followed; links are not.
const MAX_DEPTH: usize = 32;
/// A database that is being written to is waited for this long.
const BUSY: Duration = Duration::from_secs(5);
/// Directories and files below the state directory that hold what the user made or was given.
const TREES: [&str; 7] = ["workspace", "credentials", "identity", "devices", "secrets", "skills", ".env"];
/// Below it, what belongs to one agent: transcripts, credentials, its database.
const AGENTS: &str = "agents";
/// Rows of the state database that belong to the user. Of the cron jobs only the seeded ones count: the gateway rewrites
/// its own. Most of the other hundred tables are the gateway's notes on its own doings.
const STATE_TABLES: [Table; 16] = [
    Table {
        name: "cron_jobs",
        only: Some("name LIKE 'koboshi-%'"),
        columns: Some("store_key, job_id, job_json"),
    },
    Table::whole("device_identities"),
    Table::whole("device_pairing_paired"),
    Table::whole("device_pairing_pending"),
    Table::whole("device_pairing_join_codes"),
    Table::whole("device_auth_tokens"),
    Table::whole("device_bootstrap_tokens"),
    Table::whole("channel_pairing_allow_entries"),
    Table::whole("secret_store_entries"),
    Table::whole("mcp_oauth_stores"),
    Table::whole("session_groups"),
    Table::whole("user_preferences"),
    Table::whole("projects"),
    Table::whole("audit_identity_keys"),
    Table::whole("config_revision_keys"),
    Table::whole("agent_provenance"),
];
/// Tables of an agent's database that are the gateway's own: made again from others, or true only for a moment.
const AGENT_OWN: [&str; 16] = [
    "schema_meta",
    "session_key_contract",
    "session_canonical_validation_pending",
    "session_transcript_index_state",
    "session_transcript_active_events",
    "session_transcript_fts_rows",
    "session_pending_inputs",
    "context_engine_turn_outbox",
    "cache_entries",
    "state_leases",
    "memory_index_meta",
    "memory_index_state",
    "memory_index_sources",
    "memory_index_chunks",
    "memory_embedding_cache",
    "agent_integrity_verifications",
];
/// Columns that say when a row was last written, in the order in which they are believed.
const TIMES: [&str; 3] = ["updated_at_ms", "updated_at", "last_seen_at_ms"];
/// The config's own note of who wrote it last.
const CONFIG_OWN: &str = "meta";

/// A table and what of it counts.
#[derive(Debug, Clone, Copy)]
struct Table {
    name: &'static str,
    only: Option<&'static str>,
    columns: Option<&'static str>,
}

impl Table {
    const fn whole(name: &'static str) -> Table {
        Table { name, only: None, columns: None }
    }
}

/// The smallest thing that can be missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Unit {
    hash: [u8; 32],
    bytes: u64,
    /// When it was last written, by its own word.
    at: Option<i64>,
}

impl Unit {
    fn of(bytes: &[u8]) -> Unit {
        Unit { hash: *blake3::hash(bytes).as_bytes(), bytes: bytes.len() as u64, at: None }
    }

    /// Whether `later` is this or a newer version of it.
    fn is_kept_by(&self, later: &Unit) -> bool {
        let newer = matches!((self.at, later.at), (Some(then), Some(now)) if now >= then);
        self.hash == later.hash || newer
    }
}

/// What a user has, at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    units: BTreeMap<String, Unit>,
    /// Rows of each table that counts.
    rows: BTreeMap<String, u64>,
}

/// One thing that is gone or older.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    /// A path below the state directory; for a part of a file the part behind it.
    pub what: String,
    /// Its size when it was last seen.
    pub bytes: u64,
}

impl Ledger {
    /// Takes stock of the node's user data.
    pub fn take(node: &Node) -> Result<Ledger> {
        let mut ledger = Ledger::default();
        let base = &node.state_dir;
        for tree in TREES {
            ledger.add_path(base, &base.join(tree), MAX_DEPTH)?;
        }
        ledger.add_path(base, &base.join(AGENTS), MAX_DEPTH)?;
        ledger.add_state(&node.state_db(), "state")?;
        for (agent, database) in node.agent_dbs() {
            ledger.add_agent(&database, &format!("{AGENTS}/{agent}"))?;
        }
        ledger.add_config(&node.config_path)?;
        Ok(ledger)
    }

    /// How much is on the books.
    #[must_use]
    pub fn len(&self) -> usize {
        self.units.len()
    }

    /// Whether there is nothing on the books.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many rows each table has that counts, tables without any left out.
    #[must_use]
    pub fn rows(&self) -> &BTreeMap<String, u64> {
        &self.rows
    }

    /// What of `self` is missing or older in `later`.
    #[must_use]
    pub fn losses(&self, later: &Ledger) -> Vec<Loss> {
        self.units
            .iter()
            .filter(|(name, unit)| later.units.get(*name).is_none_or(|l| !unit.is_kept_by(l)))
            // An empty file that is gone is a loss too, so every loss weighs at least one byte.
            .map(|(name, unit)| Loss { what: name.clone(), bytes: unit.bytes.max(1) })
            .collect()
    }

    fn put(&mut self, name: String, unit: Unit) -> Result<()> {
        if self.units.len() >= MAX_UNITS {
            return Err(Error::new(
                Kind::Usage,
                "take stock of the user's data",
                format!("there are more than {MAX_UNITS} things"),
            )
            .hint("the demo is meant for a node of its own making"));
        }
        self.units.insert(name, unit);
        Ok(())
    }

    fn add_path(&mut self, base: &Path, path: &Path, depth: usize) -> Result<()> {
        let meta = match std::fs::symlink_metadata(path) {
            Ok(meta) => meta,
            // A file may go while it is looked for; what counts is that it is not there.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::io(format!("stat {}", path.display()), &e)),
        };
        let name = path.strip_prefix(base).unwrap_or(path).display().to_string();
        if meta.is_dir() {
            if depth == 0 {
                return Err(Error::new(
                    Kind::Usage,
                    format!("take stock of {}", path.display()),
                    format!("it lies more than {MAX_DEPTH} directories deep"),
                ));
            }
            let entries =
                std::fs::read_dir(path).map_err(|e| Error::io(format!("list {}", path.display()), &e))?;
            for entry in entries.flatten() {
                self.add_path(base, &entry.path(), depth - 1)?;
            }
            return Ok(());
        }
        // Databases are told row by row, and their companions are the engine's.
        if !meta.is_file() || is_database(path) {
            return Ok(());
        }
        let bytes = files::read_bounded(path, MAX_FILE_BYTES)?;
        if path.extension().is_some_and(|e| e == "jsonl") {
            for (number, line) in bytes.split_inclusive(|b| *b == b'\n').enumerate() {
                self.put(format!("{name}: line {}", number + 1), Unit::of(line))?;
            }
            return Ok(());
        }
        self.put(name, Unit::of(&bytes))
    }

    fn add_config(&mut self, path: &Path) -> Result<()> {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let bytes = match files::read_bounded(path, MAX_FILE_BYTES) {
            Ok(bytes) => bytes,
            Err(e) if e.kind == Kind::NotFound => return Ok(()),
            Err(e) => return Err(e),
        };
        // One that cannot be parsed holds nothing that the gateway could use: all its leaves are missing.
        let Ok(value) = node::config::parse(&bytes) else { return Ok(()) };
        let mut leaves = Vec::new();
        flatten("", &value, &mut leaves);
        for (leaf, text) in leaves {
            if leaf.split('.').next() != Some(CONFIG_OWN) {
                self.put(format!("{name}: {leaf}"), Unit::of(text.as_bytes()))?;
            }
        }
        Ok(())
    }

    fn add_state(&mut self, database: &Path, name: &str) -> Result<()> {
        let Some(connection) = open(database)? else { return Ok(()) };
        let there = tables(&connection).map_err(|e| unreadable(database, e))?;
        // Another version may lack a table; nothing of it can be lost then.
        for table in STATE_TABLES.iter().filter(|t| there.iter().any(|name| name == t.name)) {
            self.add_table(&connection, name, table.name, table.only, table.columns)
                .map_err(|e| e.or_read(database))?;
        }
        Ok(())
    }

    fn add_agent(&mut self, database: &Path, name: &str) -> Result<()> {
        let Some(connection) = open(database)? else { return Ok(()) };
        for table in tables(&connection).map_err(|e| unreadable(database, e))? {
            if !AGENT_OWN.contains(&table.as_str()) {
                self.add_table(&connection, name, &table, None, None).map_err(|e| e.or_read(database))?;
            }
        }
        Ok(())
    }

    fn add_table(
        &mut self,
        connection: &Connection,
        database: &str,
        table: &str,
        only: Option<&str>,
        columns: Option<&str>,
    ) -> std::result::Result<(), Failed> {
        let keys = keys(connection, table)?;
        let quoted = table.replace('"', "\"\"");
        let (columns, only) = (columns.unwrap_or("*"), only.unwrap_or("1"));
        let mut statement =
            connection.prepare(&format!("SELECT {columns} FROM \"{quoted}\" WHERE {only}"))?;
        let names: Vec<String> = statement.column_names().map(str::to_owned).collect();
        let time = TIMES.iter().find_map(|t| names.iter().position(|n| n == t));
        let mut rows = statement.query([])?;
        let mut count = 0;
        // Rows that are the same in every column are told by how many there are.
        let mut same: BTreeMap<String, u64> = BTreeMap::new();
        while let Some(row) = rows.next()? {
            let (mut hasher, mut bytes, mut key) = (blake3::Hasher::new(), 0, Vec::new());
            for (index, name) in names.iter().enumerate() {
                let value = row.get_ref(index)?;
                bytes += feed(&mut hasher, value);
                if keys.contains(name) {
                    key.push(text(value));
                }
            }
            let hash = hasher.finalize();
            let at = match time.map(|index| row.get_ref(index)).transpose()? {
                Some(ValueRef::Integer(at)) => Some(at),
                Some(ValueRef::Null | ValueRef::Real(_) | ValueRef::Text(_) | ValueRef::Blob(_)) | None => {
                    None
                }
            };
            let key = if key.is_empty() {
                let hex = hash.to_hex().get(..16).unwrap_or_default().to_owned();
                let number = same.entry(hex.clone()).and_modify(|n| *n += 1).or_insert(1);
                format!("{hex} #{number}")
            } else {
                key.join(" ")
            };
            self.put(format!("{database}: {table}: {key}"), Unit { hash: *hash.as_bytes(), bytes, at })?;
            count += 1;
        }
        if count > 0 {
            self.rows.insert(format!("{database}: {table}"), count);
        }
        Ok(())
    }
}

/// Either kind of failure while a table is read.
enum Failed {
    Database(rusqlite::Error),
    Other(Error),
}

impl Failed {
    fn or_read(self, database: &Path) -> Error {
        match self {
            Failed::Database(e) => unreadable(database, e),
            Failed::Other(e) => e,
        }
    }
}

impl From<rusqlite::Error> for Failed {
    fn from(e: rusqlite::Error) -> Failed {
        Failed::Database(e)
    }
}

impl From<Error> for Failed {
    fn from(e: Error) -> Failed {
        Failed::Other(e)
    }
}

#[allow(clippy::needless_pass_by_value, reason = "it is used as a function of an error")]
fn unreadable(database: &Path, e: rusqlite::Error) -> Error {
    Error::new(Kind::System, format!("read the user's rows in {}", database.display()), e)
}

/// For reading only, beside whoever writes.
fn open(database: &Path) -> Result<Option<Connection>> {
    if !database.exists() {
        return Ok(None);
    }
    let connection = Connection::open_with_flags(database, OpenFlags::SQLITE_OPEN_READ_ONLY)
        .and_then(|c| c.busy_timeout(BUSY).map(|()| c))
        .map_err(|e| unreadable(database, e))?;
    Ok(Some(connection))
}

/// Ordinary tables: neither views nor what an index for searching keeps its own words in.
fn tables(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    let mut statement = connection.prepare(
        "SELECT name FROM pragma_table_list WHERE schema = 'main' AND type = 'table' AND name NOT LIKE 'sqlite!_%' ESCAPE '!'
         ORDER BY name",
    )?;
    let names = statement.query_map([], |row| row.get(0))?;
    names.collect()
}

fn keys(connection: &Connection, table: &str) -> rusqlite::Result<Vec<String>> {
    let mut statement =
        connection.prepare("SELECT name FROM pragma_table_info(?1) WHERE pk > 0 ORDER BY pk")?;
    let names = statement.query_map([table], |row| row.get(0))?;
    names.collect()
}

/// Its kind and length go in too, so that no two rows run into the same bytes.
fn feed(hasher: &mut blake3::Hasher, value: ValueRef<'_>) -> u64 {
    let (kind, bytes): (u8, &[u8]) = match value {
        ValueRef::Null => (0, &[]),
        ValueRef::Integer(n) => (1, &n.to_le_bytes()),
        ValueRef::Real(n) => (2, &n.to_le_bytes()),
        ValueRef::Text(text) => (3, text),
        ValueRef::Blob(blob) => (4, blob),
    };
    hasher.update(&[kind]);
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
    bytes.len() as u64
}

fn text(value: ValueRef<'_>) -> String {
    match value {
        ValueRef::Null => "null".to_owned(),
        ValueRef::Integer(n) => n.to_string(),
        ValueRef::Real(n) => n.to_string(),
        ValueRef::Text(text) => String::from_utf8_lossy(text).into_owned(),
        ValueRef::Blob(blob) => blake3::hash(blob).to_hex().get(..16).unwrap_or_default().to_owned(),
    }
}

fn is_database(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    [".sqlite", ".sqlite-wal", ".sqlite-shm", ".sqlite-journal", ".lock"]
        .iter()
        .any(|end| name.ends_with(end))
}

/// Every value with the path to it; an empty list or object is a value too.
fn flatten(path: &str, value: &Value, into: &mut Vec<(String, String)>) {
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (key, value) in fields {
                flatten(&below(key), value, into);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for (index, value) in items.iter().enumerate() {
                flatten(&below(&index.to_string()), value, into);
            }
        }
        Value::Object(_)
        | Value::Array(_)
        | Value::Null
        | Value::Bool(_)
        | Value::Number(_)
        | Value::String(_) => into.push((path.to_owned(), value.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A state directory as a node has it, with one of everything.
    struct Home {
        dir: tempfile::TempDir,
    }

    impl Home {
        fn new() -> Home {
            let home = Home { dir: tempfile::tempdir().unwrap() };
            home.write("workspace/a.md", "one");
            home.write("workspace/d/empty", "");
            home.write("credentials/whatsapp/default/creds.json", "{}");
            home.write("agents/main/sessions/s.jsonl", "first\nsecond\n");
            home.write("agents/main/agent/auth-profiles.json", "{\"k\":1}");
            home.write(
                "openclaw.json",
                "{\"gateway\":{\"port\":1,\"bind\":\"loopback\"},\"list\":[1,2],\"meta\":{\"at\":1}}",
            );
            home.sql("state/openclaw.sqlite",
                "CREATE TABLE cron_jobs (store_key TEXT, job_id TEXT, name TEXT, job_json TEXT, runs INTEGER,
                                         PRIMARY KEY (store_key, job_id));
                 INSERT INTO cron_jobs VALUES ('s','1','koboshi-a','mine',0), ('s','9','heartbeat','theirs',0);
                 CREATE TABLE device_pairing_paired (device_id TEXT PRIMARY KEY, public_key TEXT, updated_at_ms INTEGER);
                 INSERT INTO device_pairing_paired VALUES ('phone','key',5);
                 CREATE TABLE gateway_boot_lifecycle (boot_id TEXT PRIMARY KEY);
                 INSERT INTO gateway_boot_lifecycle VALUES ('b');");
            home.sql("agents/main/agent/openclaw-agent.sqlite",
                "CREATE TABLE transcript_events (session_id TEXT, seq INTEGER, event_json TEXT, PRIMARY KEY (session_id, seq));
                 INSERT INTO transcript_events VALUES ('s',1,'hello'), ('s',2,'world');
                 CREATE TABLE session_nodes (session_key TEXT PRIMARY KEY, entry_json TEXT, updated_at INTEGER);
                 INSERT INTO session_nodes VALUES ('agent:main:main','{}',10);
                 CREATE TABLE no_key (word TEXT);
                 INSERT INTO no_key VALUES ('same'), ('same'), ('other');
                 CREATE TABLE state_leases (scope TEXT PRIMARY KEY);
                 INSERT INTO state_leases VALUES ('x');");
            home
        }

        fn write(&self, name: &str, text: &str) {
            let path = self.dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        fn sql(&self, name: &str, text: &str) {
            let path = self.dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            Connection::open(path).unwrap().execute_batch(text).unwrap();
        }

        fn take(&self) -> Ledger {
            let dir = self.dir.path();
            let node: Node = serde_json::from_value(serde_json::json!({
                "name": "t", "prefix": dir, "package_dir": dir.join("p"), "entry": dir.join("p/dist/index.js"),
                "node_bin": dir.join("node"), "home": dir, "state_dir": dir,
                "config_path": dir.join("openclaw.json"), "port": 1,
                "ids": host::run::Ids::current(), "user": "t"
            }))
            .unwrap();
            Ledger::take(&node).unwrap()
        }

        /// What is lost after `change`, by name.
        fn losses(&self, change: impl FnOnce(&Home)) -> Vec<String> {
            let before = self.take();
            change(self);
            let losses = before.losses(&self.take());
            assert!(losses.iter().all(|l| l.bytes > 0), "{losses:?}");
            losses.into_iter().map(|l| l.what).collect()
        }
    }

    /// What it is, the name of the loss, how it comes about.
    type Case<'a> = (&'a str, &'a str, &'a dyn Fn(&Home));

    #[test]
    fn each_kind_of_loss_is_counted() {
        let state = "state/openclaw.sqlite";
        let agent = "agents/main/agent/openclaw-agent.sqlite";
        let cases: [Case<'_>; 12] = [
            ("a file", "workspace/a.md", &|h| h.write("workspace/a.md", "ONE")),
            ("an empty file", "workspace/d/empty", &|h| {
                std::fs::remove_file(h.dir.path().join("workspace/d/empty")).unwrap();
            }),
            ("a credential", "credentials/whatsapp/default/creds.json", &|h| {
                std::fs::remove_dir_all(h.dir.path().join("credentials")).unwrap();
            }),
            ("an agent's credential", "agents/main/agent/auth-profiles.json", &|h| {
                h.write("agents/main/agent/auth-profiles.json", "{}");
            }),
            ("a transcript's line", "agents/main/sessions/s.jsonl: line 2", &|h| {
                h.write("agents/main/sessions/s.jsonl", "first\n");
            }),
            ("a transcript's row", "agents/main: transcript_events: s 2", &|h| {
                h.sql(agent, "DELETE FROM transcript_events WHERE seq = 2");
            }),
            ("a transcript's word", "agents/main: transcript_events: s 1", &|h| {
                h.sql(agent, "UPDATE transcript_events SET event_json = 'bye' WHERE seq = 1");
            }),
            ("a session that went back", "agents/main: session_nodes: agent:main:main", &|h| {
                h.sql(agent, "UPDATE session_nodes SET entry_json = '', updated_at = 9");
            }),
            ("a row without a key", "agents/main: no_key:", &|h| {
                h.sql(agent, "DELETE FROM no_key WHERE rowid = 1");
            }),
            ("a cron job", "state: cron_jobs: s 1", &|h| h.sql(state, "DELETE FROM cron_jobs")),
            ("a paired device", "state: device_pairing_paired: phone", &|h| {
                h.sql(state, "DELETE FROM device_pairing_paired");
            }),
            ("a config leaf", "openclaw.json: gateway.bind", &|h| {
                h.write("openclaw.json", "{\"gateway\":{\"port\":1},\"list\":[1,2]}");
            }),
        ];
        for (what, name, change) in cases {
            let losses = Home::new().losses(change);
            assert_eq!(losses.len(), 1, "{what}: {losses:?}");
            assert!(losses[0].starts_with(name), "{what}: {losses:?}");
        }
    }

    #[test]
    fn what_is_added_newer_or_the_gateways_own_is_no_loss() {
        let losses = Home::new().losses(|h| {
            h.write("workspace/new.md", "x");
            h.write("agents/main/sessions/s.jsonl", "first\nsecond\nthird\n");
            // Written anew in another order and with a comment: the same to whoever reads it.
            h.write(
                "openclaw.json",
                "{ // mine\n meta: {at: 2}, list: [1, 2], gateway: {bind: 'loopback', port: 1}, more: true }",
            );
            h.sql("state/openclaw.sqlite",
                "DELETE FROM gateway_boot_lifecycle; DELETE FROM cron_jobs WHERE name = 'heartbeat';
                 UPDATE cron_jobs SET runs = 1; INSERT INTO device_pairing_paired VALUES ('tablet','key',6);
                 UPDATE device_pairing_paired SET public_key = 'new', updated_at_ms = 7 WHERE device_id = 'phone';");
            h.sql("agents/main/agent/openclaw-agent.sqlite",
                "DELETE FROM state_leases; INSERT INTO transcript_events VALUES ('s',3,'!');
                 UPDATE session_nodes SET entry_json = '{\"n\":1}', updated_at = 11;");
        });
        assert!(losses.is_empty(), "{losses:?}");
    }

    #[test]
    fn a_whole_database_and_a_broken_config_count_with_all_they_held() {
        let losses = Home::new().losses(|h| {
            std::fs::remove_file(h.dir.path().join("agents/main/agent/openclaw-agent.sqlite")).unwrap();
            h.write("openclaw.json", "{\"gateway\":{\"po");
        });
        assert_eq!(losses.iter().filter(|l| l.starts_with("agents/main: ")).count(), 6, "{losses:?}");
        assert_eq!(losses.iter().filter(|l| l.starts_with("openclaw.json: ")).count(), 4, "{losses:?}");
    }

    #[test]
    fn rows_are_counted_by_table() {
        let rows = Home::new().take().rows().clone();
        assert_eq!(rows.get("agents/main: no_key"), Some(&3));
        assert_eq!(rows.get("state: cron_jobs"), Some(&1));
        assert_eq!(rows.get("agents/main: state_leases"), None);
    }
}
