//! What is said about an incident, and to whom it went.

use super::CAME_BACK;
use crate::agent::Agent;
use engine::{AlertKey, AlertKind, AlertResult, Event, IncidentKind, Outcome, Record};
use host::clock;
use layers::install::Moved;

impl Agent {
    pub(super) fn alert(&mut self, key: AlertKey) {
        let message = self.message(key);
        let result = match self.outbox().and_then(|mut outbox| outbox.put(&message)) {
            // Kept in memory only means kept nowhere: this outbox is gone in a moment.
            Ok(alert::Put::Queued { kept: alert::outbox::Kept::InMemory(e), .. }) | Err(e) => {
                AlertResult::Refused { why: e.to_string() }
            }
            Ok(alert::Put::Queued { .. } | alert::Put::Duplicate) => AlertResult::Queued,
        };
        self.write(Record::new(clock::now(), Event::AlertDone { key, result }));
        self.daily.deliver_soon(clock::now());
    }

    fn message(&self, key: AlertKey) -> alert::Message {
        let state = self.book.state();
        let mut facts = self.facts(format!("incident-{}", key.incident));
        if let Some(incident) = state.incident.as_ref().filter(|i| i.id == key.incident) {
            facts.why.clone_from(&incident.cause);
            facts.serves = incident.kind != IncidentKind::Outage;
            facts.details = incident.findings.iter().map(|f| f.what.clone()).collect();
        }
        if let Some(closed) = state.closed.as_ref().filter(|c| c.id == key.incident) {
            facts.why.clone_from(&closed.why);
            facts.layer = closed.layer;
            facts.serves = closed.uninterrupted;
            // As `incidents show` counts it: to the first good look; what never stopped serving was never down.
            let to_first_good = self.first_good.and_then(|at| at.since_ms(closed.opened));
            facts.down_ms = match closed.uninterrupted {
                true => 0.0,
                false => to_first_good.map_or(closed.took_ms, |ms| ms.min(closed.took_ms)) as f64,
            };
            facts.details = came_back(self.book.told());
            if let Ok(Some(moved)) = Moved::load(&self.places.state_dir)
                && moved.displaced()
            {
                facts.details.push(format!(
                    "it is displaced: it runs from {} until its home {} can be mended",
                    moved.away.prefix.display(),
                    moved.home.prefix.display()
                ));
            }
            let quarantine = self.places.quarantine().join(format!("{:08}", closed.id));
            if quarantine.is_dir() {
                facts.replaced = Some(quarantine.display().to_string());
            }
        }
        let kind = match key.kind {
            AlertKind::Opening => alert::Kind::Opening,
            AlertKind::Emergency => alert::Kind::Emergency,
            AlertKind::InPlaceFailed => alert::Kind::Notice(alert::Notice::NotMended),
            AlertKind::Journal => alert::Kind::Notice(alert::Notice::JournalUnwritable),
            AlertKind::Closing => match state.closed.as_ref().map(|c| c.outcome) {
                Some(Outcome::LeftAlone) => alert::Kind::Notice(alert::Notice::LeftAlone),
                Some(Outcome::Recovered | Outcome::Emergency | Outcome::Failed) | None => {
                    alert::Kind::Closing
                }
            },
        };
        alert::Message::new(kind, &facts, self.language)
    }

    /// Channels took these messages.
    pub(in crate::agent) fn accepted(&mut self, keys: &[String]) {
        let waiting: Vec<AlertKey> = self
            .book
            .state()
            .alerts
            .iter()
            .filter(|a| a.fate == engine::state::Fate::Queued)
            .map(|a| a.key)
            .collect();
        for key in waiting {
            if keys.contains(&self.message(key).key) {
                self.write(Record::new(
                    clock::now(),
                    Event::AlertDone { key, result: AlertResult::Accepted },
                ));
            }
        }
    }
}

/// What of the user's came back from a snapshot in the incident that these records tell, and what it lacks.
fn came_back(told: &[Record]) -> Vec<String> {
    let mut lines: Vec<String> = told
        .iter()
        .filter_map(
            |record| if let Event::Noticed { findings } = &record.event { Some(findings) } else { None },
        )
        .flatten()
        .filter(|f| f.evidence.iter().any(|e| e.starts_with(CAME_BACK)))
        .map(|f| f.what.clone())
        .collect();
    lines.dedup();
    lines
}
