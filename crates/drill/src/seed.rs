//! What only a database can hold and only a phone could have put there.
//!
//! Everything else that a user has is written as a user writes it: files, the command line, the gateway's own methods. A
//! paired device would need a second machine to answer the pairing's challenge, so its row is put in place by hand,
//! while no gateway runs: nobody writes beside the one who owns the database.

use host::{Error, Kind, Result};
use node::Node;
use rusqlite::{Connection, OpenFlags};
use std::time::Duration;

/// Nobody else should hold it; a gateway that was just stopped is gone.
const BUSY: Duration = Duration::from_secs(5);

/// Pairs a device that does not exist. Refused while a gateway holds the node.
pub fn pair_device(node: &Node) -> Result<()> {
    let what = || "pair a device with the demo's node".to_owned();
    if node.gateway().is_some() {
        return Err(Error::new(Kind::Denied, what(), "the gateway runs and owns its database"));
    }
    let fail = |e: rusqlite::Error| Error::new(Kind::System, what(), e);
    let connection =
        Connection::open_with_flags(node.state_db(), OpenFlags::SQLITE_OPEN_READ_WRITE).map_err(fail)?;
    connection.busy_timeout(BUSY).map_err(fail)?;
    let key = blake3::hash(b"the phone of the demo's user").to_hex();
    connection
        .execute(
            "INSERT OR IGNORE INTO device_pairing_paired
               (device_id, public_key, display_name, platform, role, roles_json, scopes_json, approved_scopes_json,
                created_at_ms, approved_at_ms)
             VALUES (?1, ?1, 'the phone of the demo''s user', 'ios', 'operator', '[\"operator\"]', '[\"operator.read\"]',
                     '[\"operator.read\"]', 1767225600000, 1767225600000)",
            [key.as_str()],
        )
        .map_err(fail)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_paired_once_and_then_on_the_books() {
        let dir = tempfile::tempdir().unwrap();
        let node: Node = serde_json::from_value(serde_json::json!({
            "name": "t", "prefix": dir.path(), "package_dir": dir.path(), "entry": dir.path(), "node_bin": dir.path(),
            "home": dir.path(), "state_dir": dir.path(), "config_path": dir.path().join("openclaw.json"), "port": 1,
            "ids": host::run::Ids::current(), "user": "t"
        }))
        .unwrap();
        assert!(pair_device(&node).is_err(), "there is no database yet");
        std::fs::create_dir(dir.path().join("state")).unwrap();
        // The columns that the tested release demands.
        let columns = "device_id TEXT NOT NULL PRIMARY KEY, public_key TEXT NOT NULL, display_name TEXT, platform TEXT,
            role TEXT, roles_json TEXT, scopes_json TEXT, approved_scopes_json TEXT, created_at_ms INTEGER NOT NULL,
            approved_at_ms INTEGER NOT NULL";
        let sql = format!("CREATE TABLE device_pairing_paired ({columns}) STRICT");
        Connection::open(node.state_db()).unwrap().execute_batch(&sql).unwrap();
        pair_device(&node).unwrap();
        pair_device(&node).unwrap();
        let ledger = crate::ledger::Ledger::take(&node).unwrap();
        assert_eq!(ledger.rows().get("state: device_pairing_paired"), Some(&1));
    }
}
