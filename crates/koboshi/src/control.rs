//! How a person at the command line speaks to a running agent: one small file per order, one per reply.
//!
//! Files work with any service manager, need no port and no second protocol, and are private by their directory.

use crate::places::Places;
use engine::Layer;
use host::clock::Deadline;
use host::{Error, Kind, Result, files};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Orders waiting beyond this are somebody's script gone wrong.
const MAX_WAITING: usize = 16;
/// An order is a few dozen bytes.
const MAX_BYTES: u64 = 64 << 10;
/// How often a reply is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What a person may ask of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "order")]
pub enum Order {
    /// Stop the gateway and leave it down.
    Stop {
        /// Seconds it gets to end by itself.
        grace_s: u64,
    },
    /// Start it.
    Start,
    /// Right it now.
    Recover {
        /// With this layer alone.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        only: Option<Layer>,
    },
    /// What is there now is intended.
    Accept,
    /// Take a snapshot now.
    Snapshot {
        /// Why.
        note: String,
    },
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// What was done.
    pub done: Option<String>,
    /// Why it was not.
    pub error: Option<String>,
}

/// Orders that wait, oldest first. Each is taken away as it is read: obeyed at most once.
pub fn waiting(places: &Places) -> Vec<(String, Order)> {
    let mut found: Vec<_> = std::fs::read_dir(places.orders())
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|x| x == "order"))
        .collect();
    found.sort();
    found
        .into_iter()
        .take(MAX_WAITING)
        .filter_map(|path| {
            let bytes = files::read_bounded(&path, MAX_BYTES).ok();
            let _ = std::fs::remove_file(&path);
            let id = path.file_stem()?.to_str()?.to_owned();
            Some((id, serde_json::from_slice(&bytes?).ok()?))
        })
        .collect()
}

/// Answers an order.
pub fn answer(places: &Places, id: &str, reply: &Reply) -> Result<()> {
    let text = serde_json::to_vec(reply).map_err(|e| Error::new(Kind::System, "answer an order", e))?;
    files::write_for_now(&places.orders().join(format!("{id}.reply")), &text, 0o600)
}

/// Gives an order to the running agent and waits for its reply.
pub fn give(places: &Places, order: &Order, limit: Duration) -> Result<String> {
    let deadline = Deadline::after(limit);
    let now = host::clock::now();
    let id = format!("{:020}-{}", now.ms, std::process::id());
    let text = serde_json::to_vec(order).map_err(|e| Error::new(Kind::System, "write an order", e))?;
    files::make_private_dir(&places.orders())?;
    files::write_atomic(&places.orders().join(format!("{id}.order")), &text, 0o600)?;
    let reply = places.orders().join(format!("{id}.reply"));
    while !deadline.passed() {
        if let Ok(bytes) = files::read_bounded(&reply, MAX_BYTES) {
            let _ = std::fs::remove_file(&reply);
            let reply: Reply = serde_json::from_slice(&bytes)
                .map_err(|e| Error::new(Kind::Corrupt, "read the agent's reply", e))?;
            return match (reply.done, reply.error) {
                (Some(done), _) => Ok(done),
                (None, why) => Err(Error::new(
                    Kind::System,
                    "have the agent do it",
                    why.unwrap_or_else(|| "it did not say why not".into()),
                )),
            };
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    let _ = std::fs::remove_file(places.orders().join(format!("{id}.order")));
    Err(Error::new(Kind::TimedOut, "have the agent do it", format!("no reply after {} s", limit.as_secs()))
        .hint("koboshi status shows what the agent is doing"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn an_order_is_obeyed_once_and_its_reply_reaches_who_asked() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            state_dir: Some(dir.path().join("state")),
            run_dir: Some(dir.path().join("run")),
            ..Config::default()
        };
        let places = Places::new(dir.path().join("koboshi.toml"), &config).unwrap();
        places.make().unwrap();
        let asked = places.clone();
        let person = std::thread::spawn(move || give(&asked, &Order::Start, Duration::from_secs(20)));
        let order = loop {
            if let Some(order) = waiting(&places).pop() {
                break order;
            }
            std::thread::yield_now();
        };
        assert_eq!(order.1, Order::Start);
        assert!(waiting(&places).is_empty());
        answer(&places, &order.0, &Reply { done: Some("yes".into()), error: None }).unwrap();
        assert_eq!(person.join().unwrap().unwrap(), "yes");
        assert_eq!(std::fs::read_dir(places.orders()).unwrap().count(), 0, "nothing is left behind");
    }

    #[test]
    fn nobody_there_is_one_clear_error_and_leaves_no_order_behind() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            state_dir: Some(dir.path().join("state")),
            run_dir: Some(dir.path().join("run")),
            ..Config::default()
        };
        let places = Places::new(dir.path().join("koboshi.toml"), &config).unwrap();
        places.make().unwrap();
        let e = give(&places, &Order::Accept, Duration::from_millis(120)).unwrap_err();
        assert_eq!(e.kind, Kind::TimedOut);
        assert!(waiting(&places).is_empty());
    }
}
