//! What every command works with, and what several of them ask.

use super::kept;
use crate::agent::book::{self, Book};
use crate::agent::status::Status;
use crate::agent::will::Will;
use crate::config::{Config, ServiceChoice};
use crate::patient::{self, Service};
use crate::places::Places;
use crate::print::Printer;
use engine::{Finding, State, Verdict};
use host::clock::Deadline;
use host::files::LockFile;
use host::process::ProcessId;
use host::service::{Manager, ServiceState, Systemd};
use host::{Error, Kind, Result};
use node::{Baseline, Node, Scope};
use serde_json::{Map, Value, json};
use std::time::Duration;
use store::{SnapshotInfo, Store};

/// Asking the service manager takes 10 to 30 ms; more is a manager in trouble.
const MANAGER_LIMIT: Duration = Duration::from_secs(5);

/// Configuration, places and printer of this run.
#[derive(Debug)]
pub(super) struct Desk {
    pub(super) config: Config,
    pub(super) places: Places,
    pub(super) printer: Printer,
}

/// Who acts on the gateway: the running agent, or we ourselves while we hold its lock.
#[derive(Debug)]
pub(super) enum Hands {
    /// The agent; it is given orders.
    Agent,
    /// We. Nobody else starts or stops it while the lock is held.
    Own(Box<Service>, LockFile),
}

impl Desk {
    /// The node in koboshi's care, or the one found on this host.
    pub(super) fn node(&self) -> Result<Node> {
        patient::find(&self.places, &self.config)
    }

    /// What the node is measured by; nothing known is an empty one.
    pub(super) fn baseline(&self) -> Baseline {
        patient::baseline(&self.places).ok().flatten().unwrap_or_default()
    }

    /// The store, or what to do about there being none.
    pub(super) fn store(&self) -> Result<Store> {
        kept::open(self)?.ok_or_else(|| {
            Error::new(
                Kind::NotFound,
                "open the store",
                format!("there is none in {} yet", self.places.store().display()),
            )
            .hint("koboshi install sets everything up; koboshi snapshot create takes a first snapshot")
        })
    }

    /// The running agent. Found without touching its lock: its process holds the lock file open.
    pub(super) fn agent(&self) -> Option<ProcessId> {
        let lock = self.places.lock();
        let id = ProcessId::of(LockFile::holder(&lock)?).filter(|id| id.alive())?;
        let real = lock.canonicalize().ok()?;
        let holds = id.open_files().iter().any(|(_, path)| *path == real);
        // Another user's process cannot be looked into; then its own word must do.
        let says = || Status::load(&self.places).is_ok_and(|s| s.agent == id);
        (holds || says()).then_some(id)
    }

    /// What the running agent last published.
    pub(super) fn status(&self) -> Option<Status> {
        let agent = self.agent()?;
        Status::load(&self.places).ok().filter(|s| s.agent == agent)
    }

    /// The owner's will. One that cannot be read is no wish, as for the agent.
    pub(super) fn will(&self) -> Will {
        Will::load(&self.places).unwrap_or_default()
    }

    /// Takes the gateway into our hands, or finds them to be the agent's.
    pub(super) fn hands(&self, node: &Node) -> Result<Hands> {
        self.places.make()?;
        let Some(lock) = LockFile::try_take(&self.places.lock())? else {
            return Ok(Hands::Agent);
        };
        let containers = self.places.containers(node)?;
        let service = Service::of(node, &self.config, &containers, &self.places)?;
        Ok(Hands::Own(Box::new(service), lock))
    }

    /// The node's unit, where systemd runs the gateway.
    pub(super) fn unit(&self, node: &Node) -> Option<Systemd> {
        let unit = node.unit.as_ref()?;
        let scope = match self.config.service.manager {
            ServiceChoice::Embedded => return None,
            ServiceChoice::Auto => unit.scope,
            ServiceChoice::SystemdUser => Scope::User,
            ServiceChoice::SystemdSystem => Scope::System,
        };
        match scope {
            Scope::User => Systemd::user(&unit.name, node.ids).ok(),
            Scope::System => Systemd::system(&unit.name).ok(),
        }
    }

    /// What systemd says of the gateway; `None` where koboshi supervises it itself.
    pub(super) fn unit_state(&self, node: &Node) -> Option<ServiceState> {
        let mut unit = self.unit(node)?;
        Some(unit.look(Deadline::after(MANAGER_LIMIT)).unwrap_or_else(|_| ServiceState::unknown()))
    }

    /// Who runs the gateway, in one word.
    pub(super) fn manager(&self, node: &Node) -> &'static str {
        self.unit(node).map_or("embedded", |unit| unit.kind())
    }

    /// Why nothing would be touched now, where that is so.
    pub(super) fn hands_off(&self) -> Option<String> {
        let will = self.will();
        if self.config.mode == crate::config::Mode::Watch {
            return Some("koboshi only watches (mode = \"watch\" in its configuration)".to_owned());
        }
        if will.stopped {
            return Some("the owner stopped the node; `koboshi node start` starts it".to_owned());
        }
        let left_s = will.paused_until_s.unwrap_or(0) - host::clock::wall().as_second();
        (left_s > 0).then(|| {
            format!("koboshi is paused for {}; `koboshi resume` ends it", seconds(left_s.unsigned_abs()))
        })
    }

    /// The fold of the journal, as it lies on disk.
    pub(super) fn book(&self) -> Result<(State, Vec<engine::Record>)> {
        Book::read(&self.places)
    }

    /// The numbers of closed incidents, newest first.
    pub(super) fn closed_incidents(&self) -> Result<Vec<u64>> {
        let mut ids = book::archived_ids(&self.places)?;
        ids.sort_unstable_by(|a, b| b.cmp(a));
        Ok(ids)
    }
}

/// Snapshots, newest first.
pub(super) fn newest_first(store: &Store) -> Result<Vec<SnapshotInfo>> {
    let mut all = store.list()?;
    all.sort_by_key(|info| std::cmp::Reverse(info.number));
    Ok(all)
}

/// A JSON object without empty places: what is not known is left out, never null.
#[derive(Debug, Default)]
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// Adds a field.
    pub(super) fn put(mut self, key: &str, value: impl Into<Value>) -> Fields {
        self.0.insert(key.to_owned(), value.into());
        self
    }

    /// Adds a field if there is a value.
    pub(super) fn maybe(self, key: &str, value: Option<impl Into<Value>>) -> Fields {
        match value {
            Some(value) => self.put(key, value),
            None => self,
        }
    }

    /// The object.
    pub(super) fn done(self) -> Value {
        Value::Object(self.0)
    }
}

/// A verdict in one word.
pub(super) fn verdict_name(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Serving { .. } => "serving",
        Verdict::NotServing { .. } => "not-serving",
        Verdict::Inconclusive { .. } => "inconclusive",
    }
}

/// The reason that goes with a verdict; what is less than whole, for one that serves.
pub(super) fn verdict_why(verdict: &Verdict) -> Option<String> {
    match verdict {
        Verdict::Serving { degraded } => (!degraded.is_empty()).then(|| degraded.join("; ")),
        Verdict::NotServing { why } | Verdict::Inconclusive { why } => Some(why.clone()),
    }
}

/// Findings for JSON.
pub(super) fn findings_json(findings: &[Finding]) -> Value {
    findings
        .iter()
        .map(|f| {
            Fields::default()
                .put("kind", json!(f.kind))
                .maybe("class", f.class.map(|c| c.name()))
                .put("what", f.what.as_str())
                .put("evidence", f.evidence.clone())
                .done()
        })
        .collect()
}

/// Seconds as a person says them, without false precision.
pub(super) fn seconds(s: u64) -> String {
    match s {
        0..120 => format!("{s} s"),
        120..7_200 => format!("{} min", s / 60),
        7_200..172_800 => format!("{} h", s / 3_600),
        _ => format!("{} days", s / 86_400),
    }
}

/// How long ago, for a stamp of the wall clock. A stamp of the future (the clock was set back) is now.
pub(super) fn ago(at: jiff::Timestamp) -> String {
    let s = u64::try_from(host::clock::wall().as_second() - at.as_second()).unwrap_or(0);
    format!("{} ago", seconds(s))
}

/// A date as a person reads it, without fractions.
pub(super) fn date(text: &str) -> String {
    text.parse::<jiff::Timestamp>()
        .map_or_else(|_| text.to_owned(), |t| t.strftime("%Y-%m-%d %H:%M:%S").to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_left_out() {
        let value = Fields::default().put("a", 1).maybe("b", None::<u64>).maybe("c", Some("x")).done();
        assert_eq!(value, json!({"a": 1, "c": "x"}));
    }

    #[test]
    fn seconds_read_like_speech() {
        assert_eq!(seconds(59), "59 s");
        assert_eq!(seconds(3_600), "60 min");
        assert_eq!(seconds(7_200), "2 h");
        assert_eq!(seconds(172_800), "2 days");
    }

    #[test]
    fn dates_lose_their_fractions() {
        assert_eq!(date("2026-11-22T19:00:01.123456Z"), "2026-11-22 19:00:01");
        assert_eq!(date("yesterday"), "yesterday");
    }
}
