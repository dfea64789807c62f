//! The account of a user's data: what there was at the moment of injection, and what of it is there at the end.
//!
//! Files are told by content, database rows by key. Something is lost when it is absent or older at the end;
//! additions are nobody's loss.

use host::{Error, Kind, Result, files};
use node::Node;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A user's tree in a demo is small; more is a mistake of the demo.
const MAX_FILES: usize = 10_000;
/// The largest single file that is hashed.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// Directories below the state directory that hold what the user made.
const TREES: [&str; 2] = ["workspace", "credentials"];
/// Rows of the state database that belong to the user: table, condition, the columns that name a row and that make
/// it up. Of the cron jobs only the seeded ones count: the gateway rewrites its own.
const TABLES: [(&str, &str, &str, &str); 3] = [
    ("cron_jobs", "name LIKE 'koboshi-%'", "store_key || ' ' || job_id", "job_json"),
    ("device_identities", "1", "identity_key || ' ' || device_id", "public_key_pem"),
    ("device_pairing_paired", "1", "device_id", "public_key"),
];

/// What a user has, at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    files: BTreeMap<PathBuf, ([u8; 32], u64)>,
    rows: BTreeMap<String, (String, u64)>,
}

/// One thing that is gone or older.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    /// A path below the state directory, or `table: key`.
    pub what: String,
    /// Its size when it was last seen.
    pub bytes: u64,
}

impl Ledger {
    /// Takes stock of the node's user data.
    pub fn take(node: &Node) -> Result<Ledger> {
        let mut ledger = Ledger::default();
        for tree in TREES {
            ledger.add_tree(&node.state_dir, &node.state_dir.join(tree))?;
        }
        ledger.add_rows(&node.state_dir.join("state/openclaw.sqlite"))?;
        Ok(ledger)
    }

    /// How much is on the books.
    #[must_use]
    pub fn len(&self) -> usize {
        self.files.len() + self.rows.len()
    }

    /// Whether there is nothing on the books.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What of `self` is missing or other in `later`.
    #[must_use]
    pub fn losses(&self, later: &Ledger) -> Vec<Loss> {
        let files = self
            .files
            .iter()
            .filter(|(path, (hash, _))| later.files.get(*path).is_none_or(|(h, _)| h != hash))
            .map(|(path, (_, bytes))| Loss { what: path.display().to_string(), bytes: *bytes });
        let rows = self
            .rows
            .iter()
            .filter(|(key, (value, _))| later.rows.get(*key).is_none_or(|(v, _)| v != value))
            .map(|(key, (_, bytes))| Loss { what: key.clone(), bytes: *bytes });
        // An empty file that is gone is a loss too, so every loss weighs at least one byte.
        files.chain(rows).map(|l| Loss { bytes: l.bytes.max(1), ..l }).collect()
    }

    fn add_tree(&mut self, base: &Path, dir: &Path) -> Result<()> {
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::io(format!("list {}", dir.display()), &e)),
        };
        for entry in entries.flatten() {
            let path = entry.path();
            let kind = entry.file_type().map_err(|e| Error::io(format!("stat {}", path.display()), &e))?;
            if kind.is_dir() {
                self.add_tree(base, &path)?;
            } else if kind.is_file() {
                if self.files.len() >= MAX_FILES {
                    return Err(Error::new(
                        Kind::Usage,
                        "take stock of the user's files",
                        format!("more than {MAX_FILES} of them"),
                    ));
                }
                let bytes = files::read_bounded(&path, MAX_FILE_BYTES)?;
                let name = path.strip_prefix(base).unwrap_or(&path).to_owned();
                self.files.insert(name, (*blake3::hash(&bytes).as_bytes(), bytes.len() as u64));
            }
        }
        Ok(())
    }

    fn add_rows(&mut self, database: &Path) -> Result<()> {
        if !database.exists() {
            return Ok(());
        }
        let fail = |e: rusqlite::Error| {
            Error::new(Kind::System, format!("read the user's rows in {}", database.display()), e)
        };
        let connection =
            rusqlite::Connection::open_with_flags(database, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY)
                .map_err(fail)?;
        connection.busy_timeout(std::time::Duration::from_secs(5)).map_err(fail)?;
        for (table, condition, key, value) in TABLES {
            let mut statement =
                match connection.prepare(&format!("SELECT {key}, {value} FROM {table} WHERE {condition}")) {
                    Ok(statement) => statement,
                    // Another version may lack a table; nothing of it can be lost then.
                    Err(e) if e.to_string().contains("no such table") => continue,
                    Err(e) => return Err(fail(e)),
                };
            let rows = statement
                .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))
                .map_err(fail)?;
            for row in rows {
                let (key, value) = row.map_err(fail)?;
                let bytes = value.len() as u64;
                self.rows.insert(format!("{table}: {key}"), (value, bytes));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(files: &[(&str, &str)]) -> Ledger {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join("workspace").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let mut ledger = Ledger::default();
        ledger.add_tree(dir.path(), &dir.path().join("workspace")).unwrap();
        ledger
    }

    #[test]
    fn absent_and_older_files_are_losses_and_new_ones_are_not() {
        let before = ledger(&[("a", "one"), ("d/b", "two"), ("empty", "")]);
        let after = ledger(&[("a", "ONE"), ("new", "x")]);
        let losses = before.losses(&after);
        let names: Vec<_> = losses.iter().map(|l| (l.what.as_str(), l.bytes)).collect();
        assert_eq!(names, [("workspace/a", 3), ("workspace/d/b", 3), ("workspace/empty", 1)]);
        assert!(before.losses(&before).is_empty());
    }

    #[test]
    fn rows_are_told_by_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db.sqlite");
        let db = rusqlite::Connection::open(&path).unwrap();
        db.execute_batch(
            "CREATE TABLE cron_jobs (store_key TEXT, job_id TEXT, name TEXT, job_json TEXT);
             INSERT INTO cron_jobs VALUES ('s','1','koboshi-a','old'), ('s','2','koboshi-b','keep'),
                                          ('s','9','heartbeat','theirs');",
        )
        .unwrap();
        let mut before = Ledger::default();
        before.add_rows(&path).unwrap();
        db.execute_batch("DELETE FROM cron_jobs WHERE job_id <> '2'; INSERT INTO cron_jobs VALUES ('s','3','koboshi-c','new');")
            .unwrap();
        let mut after = Ledger::default();
        after.add_rows(&path).unwrap();
        assert_eq!(before.losses(&after), [Loss { what: "cron_jobs: s 1".into(), bytes: 3 }]);
    }
}
