//! `koboshi incidents`: what happened, told from the journal and the files of closed incidents.

use super::desk::{Desk, Fields, date};
use crate::agent::book::{self, Archived};
use crate::cli::Incidents;
use crate::print::{Exit, duration};
use engine::summary::{Told, tell};
use engine::{IncidentKind, Moment, Outcome, Record};
use host::{Error, Kind, Result};
use serde_json::Value;

/// One incident, with what its telling leaves out.
#[derive(Debug)]
pub(super) struct One {
    pub(super) told: Told,
    pub(super) down_ms: u64,
    pub(super) emergency: bool,
}

/// Lists or shows.
pub(super) fn run(desk: &Desk, what: Option<&Incidents>) -> Result<Exit> {
    match what {
        None | Some(Incidents::List) => list(desk),
        Some(Incidents::Show { id }) => show(desk, id),
    }
}

fn list(desk: &Desk) -> Result<Exit> {
    let p = desk.printer;
    let all = newest(desk, usize::MAX)?;
    if all.is_empty() {
        p.line("No incident is on record.");
    } else {
        let rows: Vec<Vec<String>> = all.iter().map(row).collect();
        p.table(&["id", "opened (UTC)", "outcome", "layer", "down", "cause"], &rows);
        p.line("koboshi incidents show ID tells one moment by moment.");
    }
    p.object(
        Fields::default().put("incidents", all.iter().map(|o| json(o, false)).collect::<Vec<_>>()).done(),
    );
    Ok(Exit::Done)
}

/// One incident as cells of a table.
pub(super) fn row(one: &One) -> Vec<String> {
    vec![
        one.told.id.to_string(),
        one.told.opened.as_deref().map_or_else(|| "?".to_owned(), date),
        outcome(one).to_owned(),
        layer(one).to_owned(),
        if one.told.outcome.is_some() { duration(one.down_ms) } else { "-".to_owned() },
        short(&one.told.cause),
    ]
}

fn show(desk: &Desk, id: &str) -> Result<Exit> {
    let digits = id.trim().trim_start_matches("incident-");
    let number: u64 = digits.parse().map_err(|_| {
        Error::new(Kind::Usage, format!("show incident {id:?}"), "an incident's id is a number")
            .hint("koboshi incidents list shows them")
    })?;
    let one = match live(desk)?.filter(|o| o.told.id == number) {
        Some(one) => one,
        None => closed(desk, number)?.ok_or_else(|| {
            Error::new(
                Kind::NotFound,
                format!("show incident {number}"),
                "there is no such incident on record",
            )
            .hint("koboshi incidents list shows them")
        })?,
    };
    let p = desk.printer;
    p.line(p.bold(&format!("incident {number}: {}", one.told.cause)));
    let opened = one.told.opened.as_deref().map_or_else(|| "at an unknown time".to_owned(), date);
    p.line(format!(
        "  opened {opened} UTC, {}, {}",
        count(u64::from(one.told.climbs), "climb"),
        count(u64::from(one.told.starts), "start")
    ));
    match one.told.outcome {
        Some(_) => p.line(format!(
            "  {} ({}), down for {}, closed after {}",
            outcome(&one),
            layer(&one),
            duration(one.down_ms),
            duration(one.told.took_ms)
        )),
        None => p.line(format!("  {}", outcome(&one))),
    }
    for line in &one.told.lines {
        p.line(format!("  {:>14}  {}", format!("+{}", duration(line.after_ms)), line.what));
    }
    let quarantine = desk.places.quarantine().join(format!("{number:08}"));
    if quarantine.is_dir() {
        p.line(format!("  what was replaced lies in {}", quarantine.display()));
    }
    let quarantine = quarantine.is_dir().then(|| quarantine.display().to_string());
    p.object(Fields::default().put("incident", json(&one, true)).maybe("quarantine", quarantine).done());
    Ok(Exit::Done)
}

fn count(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// The newest incidents, the open one first.
pub(super) fn newest(desk: &Desk, limit: usize) -> Result<Vec<One>> {
    let mut all: Vec<One> = live(desk)?.into_iter().collect();
    for id in desk.closed_incidents()? {
        if all.len() >= limit {
            break;
        }
        if all.iter().all(|o| o.told.id != id) {
            all.extend(closed(desk, id)?);
        }
    }
    Ok(all)
}

/// The journal's last incident, if it is open or was not written to a file of its own.
fn live(desk: &Desk) -> Result<Option<One>> {
    let (state, records) = desk.book()?;
    let mut told = tell(&records);
    let Some(last) = told.pop() else {
        return Ok(None);
    };
    if state.incident.as_ref().is_some_and(|i| i.id == last.id) {
        return Ok(Some(One { down_ms: last.took_ms, emergency: state.in_emergency(), told: last }));
    }
    let filed = desk.closed_incidents()?.contains(&last.id);
    Ok((!filed).then_some(One { down_ms: last.took_ms, emergency: false, told: last }))
}

/// A closed incident; `None` when there is no such file. A damaged one is an error that names the file.
pub(super) fn closed(desk: &Desk, id: u64) -> Result<Option<One>> {
    let archived = match book::archived(&desk.places, id) {
        Ok(archived) => archived,
        Err(e) if e.kind == Kind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let down_ms = down_ms(&archived);
    Ok(tell(&archived.records).pop().map(|told| One {
        down_ms: down_ms.unwrap_or(told.took_ms),
        emergency: false,
        told,
    }))
}

/// From the opening to the first good look that was then confirmed; what was repaired in place was never down.
fn down_ms(archived: &Archived) -> Option<u64> {
    let opened: &Record =
        archived.records.iter().find(|r| matches!(r.event, engine::Event::Opened { .. }))?;
    let engine::Event::Opened { kind, .. } = &opened.event else {
        return None;
    };
    let escalated = archived.records.iter().any(|r| matches!(r.event, engine::Event::Escalated { .. }));
    if *kind == IncidentKind::Latent && !escalated {
        return Some(0);
    }
    let first_good: Moment = archived.first_good?;
    first_good.since_ms(opened.at)
}

fn outcome(one: &One) -> &'static str {
    match one.told.outcome {
        Some(Outcome::Recovered) => "recovered",
        Some(Outcome::LeftAlone) => "left-alone",
        Some(Outcome::Emergency) => "emergency",
        Some(Outcome::Failed) => "failed",
        None if one.emergency => "emergency",
        None => "open",
    }
}

fn layer(one: &One) -> &'static str {
    one.told.layer.map_or("none", engine::Layer::name)
}

/// A cause that fits on a line.
fn short(text: &str) -> String {
    const CHARS: usize = 70;
    if text.chars().count() <= CHARS {
        return text.to_owned();
    }
    let cut: String = text.chars().take(CHARS - 1).collect();
    format!("{cut}…")
}

/// One incident for JSON, with its lines or without.
pub(super) fn json(one: &One, lines: bool) -> Value {
    let kind = match one.told.kind {
        IncidentKind::Outage => "outage",
        IncidentKind::Damage => "damage",
        IncidentKind::Latent => "latent",
    };
    let fields = Fields::default()
        .put("id", one.told.id)
        .put("kind", kind)
        .put("cause", one.told.cause.as_str())
        .maybe("opened", one.told.opened.clone())
        .put("open", one.told.outcome.is_none())
        .put("outcome", outcome(one))
        .put("layer", layer(one))
        .put("climbs", one.told.climbs)
        .put("starts", one.told.starts)
        .put("took_ms", one.told.took_ms as f64)
        .put("down_ms", one.down_ms as f64);
    if !lines {
        return fields.done();
    }
    let told: Vec<Value> = one
        .told
        .lines
        .iter()
        .map(|l| Fields::default().put("after_ms", l.after_ms as f64).put("what", l.what.as_str()).done())
        .collect();
    fields.put("lines", told).done()
}
