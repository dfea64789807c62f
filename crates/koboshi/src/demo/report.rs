//! The demo's table and its JSON.

use crate::agent::book::Archived;
use crate::print::{Printer, duration};
use drill::Fault;
use engine::{Event, Layer, Moment, Outcome};
use serde_json::{Value, json};

/// A fault and what became of it.
#[derive(Debug, Clone)]
pub struct Row {
    fault: &'static Fault,
    layer: Option<Layer>,
    outcome: Outcome,
    detect_ms: f64,
    repair_ms: f64,
    start_ms: f64,
    judge_ms: f64,
    down_ms: f64,
    lost_bytes: u64,
}

/// A fault that could not be shown here.
#[derive(Debug, Clone)]
pub struct Skipped {
    /// Its name.
    pub fault: String,
    /// Why.
    pub reason: String,
}

impl Row {
    /// Reads the times off the incident's own records. All of them are of one boot and one clock.
    pub fn new(fault: &'static Fault, injected: Moment, incident: Option<&Archived>, lost_bytes: u64) -> Row {
        let mut row = Row {
            fault,
            layer: None,
            outcome: Outcome::Failed,
            detect_ms: 0.0,
            repair_ms: 0.0,
            start_ms: 0.0,
            judge_ms: 0.0,
            down_ms: 0.0,
            lost_bytes,
        };
        let Some(incident) = incident else {
            return row;
        };
        let at =
            |wanted: fn(&Event) -> bool| incident.records.iter().find(|r| wanted(&r.event)).map(|r| r.at);
        let last = |wanted: fn(&Event) -> bool| {
            incident.records.iter().rev().find(|r| wanted(&r.event)).map(|r| r.at)
        };
        let opened = at(|e| matches!(e, Event::Opened { .. }));
        let stopped = at(|e| matches!(e, Event::Intent { .. }));
        let started = last(|e| matches!(e, Event::StartIntent { .. }));
        let closed = last(|e| matches!(e, Event::Recovered { .. } | Event::LeftAlone { .. }));
        for record in &incident.records {
            if let Event::Recovered { layer, .. } = &record.event {
                row.layer = *layer;
                row.outcome = Outcome::Recovered;
            } else if matches!(record.event, Event::LeftAlone { .. }) {
                row.outcome = Outcome::LeftAlone;
            } else if matches!(record.event, Event::Emergency { .. }) {
                row.outcome = Outcome::Emergency;
            }
        }
        let between = |a: Option<Moment>, b: Option<Moment>| match (a, b) {
            (Some(a), Some(b)) => b.since_ms(a).unwrap_or(0) as f64,
            (_, _) => 0.0,
        };
        row.detect_ms = between(Some(injected), opened);
        if row.layer == Some(Layer::InPlace) {
            // Nothing was interrupted: what is left is the time until the damage was gone and that was confirmed.
            let done = last(|e| matches!(e, Event::Emptied { .. }));
            row.repair_ms = between(opened, done);
            row.judge_ms = between(done, closed);
            return row;
        }
        row.repair_ms = between(opened, started);
        row.start_ms = between(started, incident.first_good);
        row.judge_ms = between(incident.first_good, closed);
        // Damage that was found while the node served begins to cost only when the gateway is stopped for it.
        let damage = incident
            .records
            .iter()
            .any(|r| matches!(r.event, Event::Opened { kind: engine::IncidentKind::Damage, .. }));
        row.down_ms = between(if damage { stopped } else { Some(injected) }, incident.first_good);
        row
    }

    /// For how long the gateway's pulse was missed while it should have been repaired without any interruption.
    pub fn felt_down(&mut self, down_ms: u64) {
        self.down_ms = self.down_ms.max(down_ms as f64);
    }

    /// Whether it came out as it must: recovered by a right layer, and nothing lost; in place, with no interruption.
    pub fn right(&self) -> bool {
        let undisturbed = self.layer != Some(Layer::InPlace) || self.down_ms == 0.0;
        self.righted() && undisturbed && self.layer.is_some_and(|l| self.fault.healed_by.contains(&l))
    }

    /// Whether it stands again with nothing lost, by whichever layer: what the exit code tells.
    pub fn righted(&self) -> bool {
        self.outcome == Outcome::Recovered && self.lost_bytes == 0
    }

    fn layer(&self) -> &'static str {
        self.layer.map_or("none", Layer::name)
    }

    fn outcome(&self) -> &'static str {
        match self.outcome {
            Outcome::Recovered => "recovered",
            Outcome::LeftAlone => "left-alone",
            Outcome::Emergency => "emergency",
            Outcome::Failed => "failed",
        }
    }

    /// One line.
    pub fn line(&self) -> String {
        let mut line = format!(
            "{} by {}: noticed after {}, repaired in {}, started in {}, judged in {}; down for {}",
            self.outcome(),
            self.layer(),
            ms(self.detect_ms),
            ms(self.repair_ms),
            ms(self.start_ms),
            ms(self.judge_ms),
            ms(self.down_ms),
        );
        if !self.right() {
            line.push_str(" — NOT as it should be");
        }
        line
    }

    /// As documented, and nothing else.
    pub fn json(&self) -> Value {
        json!({
            "fault": self.fault.name,
            "layer": self.layer(),
            "outcome": self.outcome(),
            "detect_ms": self.detect_ms,
            "repair_ms": self.repair_ms,
            "start_ms": self.start_ms,
            "judge_ms": self.judge_ms,
            "down_ms": self.down_ms,
            "lost_bytes": self.lost_bytes,
        })
    }

    /// From the decision (the incident's opening) to the first of the looks that were confirmed.
    pub fn decided_to_serving_ms(&self) -> f64 {
        if self.layer == Some(Layer::InPlace) { 0.0 } else { self.repair_ms + self.start_ms }
    }
}

fn ms(value: f64) -> String {
    duration(value.max(0.0) as u64)
}

fn median(values: &[u64]) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

/// Prints table and JSON.
pub fn print(printer: Printer, versions: &Value, rows: &[Row], skipped: &[Skipped], colds_ms: &[u64]) {
    let cold = median(colds_ms);
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            let ratio = if r.decided_to_serving_ms() > 0.0 && cold > 0 {
                format!("{:.2}", r.decided_to_serving_ms() / cold as f64)
            } else {
                "-".to_owned()
            };
            vec![
                r.fault.about.to_owned(),
                r.layer().to_owned(),
                if r.right() { printer.green(r.outcome()) } else { printer.red(r.outcome()) },
                ms(r.detect_ms),
                ms(r.repair_ms),
                ms(r.start_ms),
                ms(r.judge_ms),
                ms(r.down_ms),
                ratio,
                format!("{} B", r.lost_bytes),
            ]
        })
        .collect();
    if !rows.is_empty() {
        printer.line("");
        printer.table(
            &[
                "fault",
                "healed by",
                "outcome",
                "noticed",
                "repair",
                "start",
                "judge",
                "down",
                "x cold",
                "lost",
            ],
            &cells,
        );
        printer.line(format!(
            "bare cold start without koboshi: {} (median of {}); \"x cold\" is decision to serving over that",
            duration(cold),
            colds_ms.len()
        ));
    }
    printer.object(json!({
        "versions": versions,
        "faults": rows.iter().map(Row::json).collect::<Vec<_>>(),
        "skipped": skipped.iter().map(|s| json!({"fault": s.fault, "reason": s.reason})).collect::<Vec<_>>(),
        "cold_start_ms": cold as f64,
        "cold_starts_ms": colds_ms.iter().map(|c| *c as f64).collect::<Vec<_>>(),
    }));
}
