//! The journal told to people: one incident, one timeline.

use crate::record::{AlertResult, Claim, Event, How, IncidentKind, Record};
use crate::words::{Layer, Moment, Outcome, Verdict};
use serde::Serialize;

/// Lines kept per incident: an emergency of weeks must not fill a screen or a page.
pub const MAX_LINES: usize = 500;

/// One incident as far as the records tell it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Told {
    /// Its number.
    pub id: u64,
    /// What kind of trouble it began as.
    pub kind: IncidentKind,
    /// One line.
    pub cause: String,
    /// The date on which it was opened, where it was recorded.
    pub opened: Option<String>,
    /// How it ended; `None` while it is open.
    pub outcome: Option<Outcome>,
    /// Whose doing; `None` while open, or when it came back by itself.
    pub layer: Option<Layer>,
    /// Climbs begun.
    pub climbs: u32,
    /// Starts asked for.
    pub starts: u32,
    /// Milliseconds from opening to closing, reboots left out.
    pub took_ms: u64,
    /// What happened, oldest first.
    pub lines: Vec<Line>,
}

/// One line of a timeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Line {
    /// Milliseconds since the incident was opened, reboots left out.
    pub after_ms: u64,
    /// What happened.
    pub what: String,
}

/// Tells every incident of a journal, oldest first. An incident whose opening was compacted away is told from
/// its checkpoint on.
#[must_use]
pub fn tell<'a>(records: impl IntoIterator<Item = &'a Record>) -> Vec<Told> {
    let mut all: Vec<Told> = Vec::new();
    let mut open = false;
    let mut last: Option<Moment> = None;
    for record in records {
        let since_last_ms = last.and_then(|last| record.at.since_ms(last)).unwrap_or(0);
        last = Some(record.at);
        // An incident's time begins with its opening, however long ago the record before it was written.
        let ran_ms = if matches!(record.event, Event::Opened { .. }) { 0 } else { since_last_ms };
        match &record.event {
            Event::Opened { incident, kind, cause, .. } => {
                open = true;
                all.push(told(*incident, *kind, cause, record.wall.clone()));
            }
            Event::Checkpoint { state } => {
                open = state.incident.is_some();
                if let Some(incident) = &state.incident {
                    let mut one = told(incident.id, incident.kind, &incident.cause, None);
                    one.climbs = incident.climbs;
                    one.took_ms = state.clock_ms.saturating_sub(incident.opened_ms);
                    all.push(one);
                }
            }
            Event::Escalated { .. }
            | Event::Noticed { .. }
            | Event::ClimbBegan { .. }
            | Event::Passed { .. }
            | Event::Intent { .. }
            | Event::Ended { .. }
            | Event::Emptied { .. }
            | Event::KillFailed { .. }
            | Event::StartIntent { .. }
            | Event::Started { .. }
            | Event::StartSeen { .. }
            | Event::Judged { .. }
            | Event::Failed { .. }
            | Event::Served { .. }
            | Event::Recovered { .. }
            | Event::Emergency { .. }
            | Event::Postponed { .. }
            | Event::LeftAlone { .. }
            | Event::Rebooted
            | Event::AlertIntent { .. }
            | Event::AlertDone { .. } => {}
        }
        let Some(one) = all.last_mut() else { continue };
        if open {
            one.took_ms = one.took_ms.saturating_add(ran_ms);
            count(one, &record.event);
        }
        let after_ms = one.took_ms;
        if let Some(what) = again(one, &record.event).or_else(|| line(&record.event))
            && (open || matches!(record.event, Event::AlertDone { .. }))
            && one.lines.len() < MAX_LINES
        {
            one.lines.push(Line { after_ms, what });
        }
        open = open && one.outcome.is_none();
    }
    all
}

fn told(id: u64, kind: IncidentKind, cause: &str, opened: Option<String>) -> Told {
    Told {
        id,
        kind,
        cause: cause.to_owned(),
        opened,
        outcome: None,
        layer: None,
        climbs: 0,
        starts: 0,
        took_ms: 0,
        lines: Vec::new(),
    }
}

fn count(one: &mut Told, event: &Event) {
    if let Event::ClimbBegan { climb, .. } = event {
        one.climbs = *climb;
    } else if let Event::StartIntent { .. } = event {
        one.starts = one.starts.saturating_add(1);
    } else if let Event::Recovered { layer, .. } = event {
        one.outcome = Some(Outcome::Recovered);
        one.layer = *layer;
    } else if let Event::LeftAlone { .. } = event {
        one.outcome = Some(Outcome::LeftAlone);
    }
}

/// What would only say the cause again, which stands in the title: shorter.
fn again(one: &Told, event: &Event) -> Option<String> {
    if let Event::ClimbBegan { climb, full: false, only: None, why, .. } = event
        && *why == one.cause
    {
        return Some(format!("climb {climb} begins"));
    }
    None
}

fn by(layer: Option<Layer>) -> String {
    layer.map_or_else(|| "by itself".to_owned(), |layer| format!("by {layer}"))
}

/// One record as a line for people; `None` for what is said by its neighbours.
#[must_use]
pub fn line(event: &Event) -> Option<String> {
    Some(match event {
        Event::Opened { kind, cause, findings, .. } => {
            let kind = match kind {
                IncidentKind::Outage => "outage",
                IncidentKind::Damage => "damage",
                IncidentKind::Latent => "latent damage",
            };
            let more = findings.iter().map(|finding| finding.what.as_str());
            let more: Vec<&str> = more.filter(|what| !cause.contains(what)).collect();
            if more.is_empty() {
                format!("{kind}: {cause}")
            } else {
                format!("{kind}: {cause} ({})", more.join("; "))
            }
        }
        Event::Escalated { cause, .. } => format!("became worse: {cause}"),
        Event::Noticed { findings } => {
            let what: Vec<&str> = findings.iter().map(|finding| finding.what.as_str()).collect();
            format!("noticed: {}", what.join("; "))
        }
        Event::ClimbBegan { climb, full, only, limits, why } => {
            let only = only.map(|layer| format!("{layer} only"));
            let what = only.or_else(|| full.then(|| "all layers".to_owned()));
            let short = (!limits.whole()).then(|| format!("limits divided by {}", limits.divisor()));
            let beside: Vec<String> = what.into_iter().chain(short).collect();
            match beside.as_slice() {
                [] => format!("climb {climb}: {why}"),
                beside => format!("climb {climb} ({}): {why}", beside.join(", ")),
            }
        }
        Event::Passed { layer, reason } => format!("{layer}: passed, {reason}"),
        Event::Intent { layer, attempt, step, .. } => {
            format!("{layer}: work begins (step {step}, attempt {attempt})")
        }
        Event::Ended { step, how } => format!("step {step} {}", ended(how)),
        Event::Emptied { claim, .. } => match claim {
            Claim::Nothing { why } => format!("nothing to start: {why}"),
            Claim::Ready { .. } => "done and its container empty".to_owned(),
        },
        Event::KillFailed { step, why } => format!("step {step} could not be ended: {why}"),
        Event::StartIntent { layer, .. } => format!("{layer}: start"),
        Event::Started { error: Some(error), .. } => format!("the start was refused: {error}"),
        Event::Started { error: None, .. } | Event::AlertIntent { .. } => return None,
        Event::StartSeen { by } => format!("started by {by}"),
        Event::Judged { verdict, confirmed, .. } => {
            let sure = if *confirmed { "" } else { " (not confirmed)" };
            match verdict {
                Verdict::Serving { degraded } if degraded.is_empty() => format!("judged: serving{sure}"),
                Verdict::Serving { degraded } => {
                    format!("judged: serving, degraded ({}){sure}", degraded.join(", "))
                }
                Verdict::NotServing { why } => format!("judged: not serving, {why}{sure}"),
                Verdict::Inconclusive { why } => format!("judged: not known yet, {why}"),
            }
        }
        Event::Failed { layer, why } => format!("{layer}: failed, {why}"),
        Event::Served { layer, degraded } => {
            format!("serves again {}, waiting for {}", by(*layer), degraded.join(", "))
        }
        Event::Recovered { layer, .. } => format!("recovered {}", by(*layer)),
        Event::Emergency { why, retry_in_ms, .. } => {
            format!("emergency: {why}; next climb in {} min", retry_in_ms / 60_000)
        }
        Event::Postponed { why, retry_in_ms, .. } => {
            format!("{why}; next try in {} min", retry_in_ms / 60_000)
        }
        Event::LeftAlone { why } => format!("left alone: {why}"),
        Event::Rebooted => "the machine was rebooted".to_owned(),
        Event::AlertDone { key, result } => match result {
            AlertResult::Accepted => format!("message {key} sent"),
            AlertResult::Queued => format!("message {key} queued"),
            AlertResult::Refused { why } => format!("message {key} refused: {why}"),
        },
        Event::Checkpoint { .. } => "told from here on: the journal was rewritten".to_owned(),
    })
}

fn ended(how: &How) -> String {
    match how {
        How::Exited { code } => format!("exited with {code}"),
        How::Signaled { signal } => format!("was ended by signal {signal}"),
        How::TimedOut => "reached its deadline".to_owned(),
        How::SpawnFailed { why } => format!("could not be spawned: {why}"),
        How::Stopped => "was stopped".to_owned(),
        How::Vanished => "vanished with its agent".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_incident_is_told_from_its_opening_whatever_was_written_before() {
        let at = |ms| Moment { boot: 1, ms };
        let opened = Event::Opened {
            incident: 1,
            kind: IncidentKind::Outage,
            cause: "it fell".into(),
            findings: Vec::new(),
        };
        let records = [
            Record::new(at(1_000), Event::StartSeen { by: "the owner".into() }),
            Record::new(at(50_000), opened),
            Record::new(at(53_000), Event::Recovered { layer: Some(Layer::Restart), from_emergency: false }),
        ];
        let told = tell(&records);
        assert_eq!(told.len(), 1);
        assert_eq!(told[0].lines.iter().map(|l| l.after_ms).collect::<Vec<_>>(), [0, 3_000]);
        assert_eq!((told[0].took_ms, told[0].outcome), (3_000, Some(Outcome::Recovered)));
    }
}
