//! `koboshi recover`: puts the node right now, by the same way as the agent would.
//!
//! A running agent is asked to do it. Where none runs, one is started for this one purpose and ended after: the gateway
//! stays. Either way it is the journal that is told here, line by line, and the judge who says how it ended. With
//! `--dry-run` nothing is touched. `--only` is the same with a climb of one layer: journaled, judged, and followed by
//! the whole ladder where an agent guards the node. This command only watches: ending it (Ctrl-C) ends the watching, and
//! an agent that was begun for it, and leaves nothing paused or held.

use super::check::{self, node_json};
use super::desk::{Desk, Fields, findings_json, verdict_name, verdict_why};
use super::{incidents, judging, kept, readiness};
use crate::cli::Recover;
use crate::config::Mode;
use crate::control::{self, Order};
use crate::print::{Exit, duration};
use engine::state::{HoldKind, Stage};
use engine::{Event, Ladder, Layer, Moment, Outcome, Record, State, Verdict};
use host::clock::{self, Deadline};
use host::process::{PidFd, ProcessId};
use host::{Context, Error, Kind, Result};
use layers::{Care, Examination, Need};
use node::{Judgement, Node};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The look at the disk before anything is decided.
const EXAMINE_LIMIT: Duration = Duration::from_secs(30);
/// An agent that begins publishes its status within a second.
const AGENT_APPEARS: Duration = Duration::from_secs(20);
/// The agent answers an order within a turn of its loop.
const ORDER_LIMIT: Duration = Duration::from_secs(30);
/// A climb ends within 600 s; a start that still progresses then is judged on for the rest of its own 900 s.
const FOLLOW_LIMIT: Duration = Duration::from_secs(1_530);
/// A node that serves gets this long to show damage that the agent then takes up.
const QUIET: Duration = Duration::from_secs(15);
/// Incidents that one recovery follows: an outage, and the damage that it leaves to be repaired in place.
const MAX_INCIDENTS: usize = 3;
/// The agent writes the file of a closed incident within this; a full disk may keep it from that, in milliseconds.
const FILED_MS: u64 = 2_000;
/// Between two looks at the journal.
const LOOK_AGAIN: Duration = Duration::from_millis(300);
/// Messages about the incident get this long to leave before the agent of this one recovery ends.
const MESSAGES_LEAVE: Duration = Duration::from_secs(15);
/// The agent ends in milliseconds; one that does not is killed.
const AGENT_ENDS: Duration = Duration::from_secs(20);
/// How it ended.
#[derive(Debug)]
struct Done {
    outcome: Outcome,
    layer: Option<Layer>,
    incident: Option<u64>,
    down_ms: u64,
    took_ms: u64,
    words: String,
}

/// Puts the node right, or says what would be done.
pub(super) fn run(desk: &Desk, options: &Recover) -> Result<Exit> {
    let only = options.only.as_deref().map(layer).transpose()?;
    let node = desk.node()?;
    let seen = judging::look(desk, &node, &mut judging::judge(desk));
    let care = if seen.verdict.is_serving() { Care::Quick } else { Care::Down };
    let exam = examine(desk, &node, care)?;
    if options.dry_run {
        return Ok(dry_run(desk, &node, &seen, &exam, only));
    }
    refuse_hands_off(desk)?;
    let p = desk.printer;
    p.line(check::headline(desk, &node, &seen.verdict));
    let began = clock::now();
    let done = match only {
        Some(layer) => with_one_layer(desk, layer)?,
        None if seen.verdict.is_serving() && exam.need == Need::Nothing => Done {
            outcome: Outcome::LeftAlone,
            layer: None,
            incident: None,
            down_ms: 0,
            took_ms: 0,
            words: "it serves and its disk is whole: there is nothing to put right".to_owned(),
        },
        None => by_agent(desk, &node)?,
    };
    let took_ms = clock::now().since_ms(began).unwrap_or(0).max(done.took_ms);
    tell(desk, &node, &done, took_ms);
    Ok(match done.outcome {
        Outcome::Recovered => Exit::Done,
        Outcome::LeftAlone if done.incident.is_none() => Exit::Done,
        Outcome::LeftAlone | Outcome::Failed => Exit::Failed,
        Outcome::Emergency => Exit::Emergency,
    })
}

fn tell(desk: &Desk, node: &Node, done: &Done, took_ms: u64) {
    let p = desk.printer;
    let word = match done.outcome {
        Outcome::Recovered => p.green("recovered"),
        Outcome::LeftAlone => p.yellow("left alone"),
        Outcome::Emergency => p.red("emergency"),
        Outcome::Failed => p.red("failed"),
    };
    p.line(format!("{} {word}: {}", p.bold(&node.name), done.words));
    if let Some(id) = done.incident {
        p.line(format!("  koboshi incidents show {id} tells it moment by moment"));
    }
    let fields = Fields::default()
        .put("dry_run", false)
        .put("node", node_json(node))
        .put("outcome", serde_json::json!(done.outcome))
        .put("layer", done.layer.map_or("none", Layer::name))
        .maybe("incident", done.incident)
        .put("why", done.words.as_str())
        .put("down_ms", done.down_ms as f64)
        .put("took_ms", took_ms as f64);
    p.object(fields.done());
}

/// A layer that this version can run, by its name.
fn layer(name: &str) -> Result<Layer> {
    const BUILT: [Layer; 6] = [
        Layer::InPlace,
        Layer::Restart,
        Layer::Restore,
        Layer::SystemInstall,
        Layer::UserInstall,
        Layer::PeerCopy,
    ];
    BUILT.into_iter().find(|l| l.name() == name).ok_or_else(|| {
        let why = if Layer::CLIMB.iter().any(|l| l.name() == name) {
            "that layer is not part of this version"
        } else {
            "there is no such layer"
        };
        let names: Vec<&str> = BUILT.iter().map(|l| l.name()).collect();
        Error::new(Kind::Usage, format!("recover with the layer {name:?}"), why)
            .hint(format!("one of {}", names.join(", ")))
    })
}

fn examine(desk: &Desk, node: &Node, care: Care) -> Result<Examination> {
    let bar = desk.printer.spinner("looking at the disk");
    // A store that cannot be used is a reason why a layer does not apply, not why the node cannot be looked at.
    let store = kept::open(desk);
    let usable = store.as_ref().ok().and_then(Option::as_ref);
    let baseline = desk.baseline();
    let proof = layers::install::Proof::load(&desk.places.state_dir).unwrap_or_default();
    let deadline = Deadline::after(EXAMINE_LIMIT);
    let exam = layers::examine(node, usable, Some(&baseline), proof.as_ref(), care, deadline);
    bar.done();
    let mut exam = exam?;
    if let Err(e) = store {
        exam.notice(format!("the store cannot be used: {}", e.why));
    }
    Ok(exam)
}

fn refuse_hands_off(desk: &Desk) -> Result<()> {
    let refuse = |why: &str, hint: &str| Err(Error::new(Kind::Usage, "recover the node", why).hint(hint));
    if desk.config.mode == Mode::Watch {
        return refuse(
            "koboshi only watches (mode = \"watch\")",
            "set mode = \"guard\" in the configuration",
        );
    }
    if desk.will().paused(clock::wall().as_second()) {
        return refuse("koboshi is paused", "koboshi resume, then again");
    }
    Ok(())
}

// ---- what it would do ----

fn dry_run(desk: &Desk, node: &Node, seen: &Judgement, exam: &Examination, only: Option<Layer>) -> Exit {
    let p = desk.printer;
    let serving = seen.verdict.is_serving();
    let disk = readiness::Disk {
        findings: exam.findings.clone(),
        good: exam.snapshot.clone(),
        store_trouble: kept::ask(desk).trouble.map(|t| t.to_string()),
        peers: desk.config.peer.len(),
    };
    let mut ready = readiness::layers(desk, node, &disk);
    if let Some(only) = only {
        for r in ready.iter_mut().filter(|r| r.layer != only) {
            r.state = Err("not asked for (--only)".to_owned());
        }
    }
    let in_place = serving && matches!(exam.need, Need::InPlace | Need::Later);
    let planned = {
        let limits = desk.config.ladder.limits();
        engine::preview(&Ladder { limits, ..Ladder::new(readiness::rungs(&ready)) })
    };
    let idle = exam.need == Need::Nothing && !matches!(seen.verdict, Verdict::NotServing { .. });
    let climbs = !in_place && !idle;
    let would = if serving && exam.need == Need::Nothing {
        "do nothing: it serves and its disk is whole".to_owned()
    } else if in_place {
        "repair in place, without a restart".to_owned()
    } else if idle {
        "wait: what was seen is not conclusive, and nothing is touched while it is not".to_owned()
    } else {
        "climb the ladder until the judge confirms that it serves".to_owned()
    };
    p.line(check::headline(desk, node, &seen.verdict));
    for finding in &exam.findings {
        p.line(format!("  found: {}", finding.what));
        for evidence in &finding.evidence {
            p.line(format!("         {evidence}"));
        }
    }
    p.line(format!("It would {would}."));
    for plan in planned.iter().filter(|_| climbs) {
        let name = format!("{:14}", plan.layer.name());
        match (&plan.passed, ready.iter().find(|r| r.layer == plan.layer).map(|r| &r.state)) {
            (Some(why), _) => p.line(format!("  {name} pass: {why}")),
            (None, Some(Ok(how))) => p.line(format!(
                "  {name} {how} (up to {} of work, over at {} at the latest)",
                duration(plan.work_ms),
                duration(plan.end_ms)
            )),
            (None, _) => p.line(format!("  {name} try")),
        }
    }
    if let Some(why) = desk.hands_off() {
        p.line(format!("Now it would touch nothing: {why}."));
    }
    let plan: Vec<_> = planned
        .iter()
        .map(|plan| {
            Fields::default()
                .put("layer", plan.layer.name())
                .put("would_try", plan.passed.is_none() && climbs)
                .maybe("passed", plan.passed.clone())
                .put("work_ms", plan.work_ms as f64)
                .put("end_ms", plan.end_ms as f64)
                .done()
        })
        .collect();
    let fields = Fields::default()
        .put("dry_run", true)
        .put("node", node_json(node))
        .put("verdict", verdict_name(&seen.verdict))
        .maybe("why", verdict_why(&seen.verdict))
        .put("would", would)
        .put("need", serde_json::json!(exam.need))
        .put("findings", findings_json(&exam.findings))
        .maybe("snapshot", exam.snapshot.clone())
        .maybe("hands_off", desk.hands_off())
        .put("plan", plan);
    p.object(fields.done());
    check::exit(&seen.verdict)
}

// ---- by the agent ----

fn by_agent(desk: &Desk, node: &Node) -> Result<Done> {
    let before = desk.book()?.0;
    let already_open = before.incident.as_ref().map(|i| i.id);
    let own = match desk.agent() {
        Some(_) => None,
        None => {
            desk.printer.note("no agent is running: one is started for this recovery only");
            Some(Temporary::start(desk, false)?)
        }
    };
    let result = until_whole(desk, node, already_open, &before);
    if let Some(own) = own {
        own.end(desk);
        desk.printer
            .note("the agent of this recovery has ended; nothing guards the node now (koboshi install)");
    }
    result
}

/// One incident after the other, while one that is over leaves damage behind that is another's business.
fn until_whole(desk: &Desk, node: &Node, open: Option<u64>, before: &State) -> Result<Done> {
    let mut done = ask_and_follow(desk, open, before)?;
    for _ in 1..MAX_INCIDENTS {
        let over = matches!(done.outcome, Outcome::Recovered);
        if !over || matches!(examine(desk, node, Care::Quick)?.need, Need::Nothing | Need::Later) {
            break;
        }
        let again = ask_and_follow(desk, None, &desk.book()?.0)?;
        done = Done {
            down_ms: done.down_ms.saturating_add(again.down_ms),
            took_ms: done.took_ms.saturating_add(again.took_ms),
            incident: again.incident.or(done.incident),
            layer: again.layer.or(done.layer),
            ..again
        };
    }
    Ok(done)
}

fn ask_and_follow(desk: &Desk, open: Option<u64>, before: &State) -> Result<Done> {
    ask(desk, None)?;
    follow(desk, open, before, None)
}

fn ask(desk: &Desk, only: Option<Layer>) -> Result<()> {
    let said = control::give(&desk.places, &Order::Recover { only }, ORDER_LIMIT).map_err(|e| {
        if e.hint.is_some() { e } else { e.hint("koboshi recover --dry-run says what would work") }
    })?;
    desk.printer.note(format!("agent: {said}"));
    Ok(())
}

/// A climb of one layer. A running agent goes on with the others if that fails; one begun for this does not.
fn with_one_layer(desk: &Desk, layer: Layer) -> Result<Done> {
    let own = match desk.agent() {
        Some(_) => None,
        None => {
            desk.printer.note("no agent is running: one is started for this layer only");
            Some(Temporary::start(desk, true)?)
        }
    };
    // What the agent knows of the node by now is what it answers by.
    wait_for_a_verdict(desk);
    let before = desk.book()?.0;
    let open = before.incident.as_ref().map(|i| i.id);
    let result = ask(desk, Some(layer)).and_then(|()| follow(desk, open, &before, Some(layer)));
    if let Some(own) = own {
        own.end(desk);
        desk.printer.note("the agent of this layer has ended; nothing guards the node now (koboshi install)");
    }
    result
}

/// An agent that has just begun has not judged the node yet.
fn wait_for_a_verdict(desk: &Desk) {
    let deadline = Deadline::after(AGENT_APPEARS);
    while !deadline.passed() {
        let known = desk.status().is_some_and(|s| match s.verdict {
            Verdict::Serving { .. } => s.confirmed,
            Verdict::NotServing { .. } => true,
            Verdict::Inconclusive { .. } => false,
        });
        if known {
            return;
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// What is journaled since `since` of a climb of this layer alone: why it failed, and whether that climb is over.
fn alone(records: &[Record], since: Moment, layer: Layer) -> (Option<String>, bool) {
    let (mut begun, mut why) = (false, None);
    for record in records.iter().filter(|r| r.at.boot == since.boot && r.at.ms >= since.ms) {
        let event = &record.event;
        if let Event::ClimbBegan { only, .. } = event {
            if begun && only.is_none() {
                return (why, true);
            }
            begun |= *only == Some(layer);
        } else if let Event::Failed { layer: of, why: reason } | Event::Passed { layer: of, reason } = event
            && begun
            && *of == layer
        {
            why = Some(reason.clone());
        }
    }
    (why, false)
}

/// What an incident holds for, and since when; a hold that was there before anything was asked for is no answer.
fn held(state: &State) -> Option<(u64, u64)> {
    match &state.incident.as_ref()?.stage {
        Stage::Fresh | Stage::Climbing(_) => None,
        Stage::Holding(hold) => Some((state.incident.as_ref()?.id, hold.since_ms)),
    }
}

/// Tells the incident as it is journaled, until it is over.
fn follow(desk: &Desk, open: Option<u64>, before: &State, only: Option<Layer>) -> Result<Done> {
    let old = held(before);
    let began = clock::now();
    // The order was given before this: what it led to may be written already.
    let first = Moment { boot: began.boot, ms: 0 };
    let since = before.last.filter(|last| last.boot == began.boot).unwrap_or(first);
    let deadline = Deadline::after(FOLLOW_LIMIT);
    let mut told = (0, 0);
    let mut closed_at = None;
    loop {
        // Asked first: what an agent wrote last is in the journal by then.
        let ended = desk.agent().is_none();
        let (state, records) = desk.book()?;
        let number = incident_now(&state, open, before);
        if let Some(id) = number
            && let Some(one) = engine::summary::tell(&records).into_iter().rfind(|t| t.id == id)
        {
            let from = if told.0 == id { told.1 } else { 0 };
            for line in one.lines.iter().skip(from) {
                desk.printer.note(format!("  +{:>10}  {}", duration(line.after_ms), line.what));
            }
            told = (id, one.lines.len());
        }
        let waited = clock::now().since_ms(began).unwrap_or(0);
        let quiet = Duration::from_millis(waited) >= QUIET;
        let new = quiet || old.is_none() || held(&state) != old;
        if let (Some(id), true, Some(done)) = (number, new, over(desk, &state)?) {
            // The agent files an incident right after it has closed it; the file knows more than the journal.
            let at = *closed_at.get_or_insert(clock::now());
            let filed = state.incident.is_some() || desk.closed_incidents()?.contains(&id);
            if filed || clock::now().since_ms(at).is_none_or(|ms| ms > FILED_MS) {
                return Ok(Done { incident: Some(id), ..done });
            }
        }
        if number.is_none() && quiet {
            let status = desk.status().filter(|s| s.verdict.is_serving() && s.confirmed);
            if status.is_some() {
                return Ok(Done {
                    outcome: Outcome::Recovered,
                    layer: None,
                    incident: None,
                    down_ms: 0,
                    took_ms: waited,
                    words: "it serves, confirmed, without a repair".to_owned(),
                });
            }
        }
        if let (Some(layer), Some(id)) = (only, number)
            && let (why, over) = alone(&records, since, layer)
            && (over || (ended && why.is_some()))
        {
            let why = why.unwrap_or_else(|| "it had no turn".to_owned());
            let after = if ended { "" } else { "; the agent goes on with all layers (koboshi status)" };
            let words = format!("{layer} did not right it: {why}{after}");
            return Ok(Done {
                outcome: Outcome::Failed,
                layer: None,
                incident: Some(id),
                down_ms: waited,
                took_ms: waited,
                words,
            });
        }
        if ended {
            return Err(Error::new(Kind::System, "recover the node", "the agent has ended")
                .hint(format!("{} holds its last words", log(desk).display())));
        }
        if deadline.passed() {
            return Err(Error::new(Kind::TimedOut, "recover the node", "the incident is still open")
                .hint("koboshi status shows what the agent is doing; it goes on by itself"));
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// The incident that is open now, else the last one that was open or opened since.
fn incident_now(state: &State, open: Option<u64>, before: &State) -> Option<u64> {
    let open_now = state.incident.as_ref().map(|i| i.id);
    let closed = state.closed.as_ref().map(|c| c.id);
    let first = open.unwrap_or(before.incidents.saturating_add(1));
    open_now.or(closed).filter(|id| *id >= first).or(open_now)
}

/// Whether the incident that was open or opened is over, or holds.
fn over(desk: &Desk, state: &State) -> Result<Option<Done>> {
    let none =
        |outcome, words: String| Done { outcome, layer: None, incident: None, down_ms: 0, took_ms: 0, words };
    let Some(incident) = &state.incident else {
        let Some(closed) = &state.closed else { return Ok(None) };
        let words = match (closed.outcome, closed.layer) {
            (Outcome::Recovered, Some(layer)) => format!("by {layer}; it was: {}", closed.why),
            (Outcome::Recovered, None) => format!("by itself; it was: {}", closed.why),
            (Outcome::LeftAlone | Outcome::Emergency | Outcome::Failed, _) => closed.why.clone(),
        };
        let down_ms = incidents::closed(desk, closed.id)?.map_or(closed.took_ms, |one| one.down_ms);
        let done =
            Done { layer: closed.layer, took_ms: closed.took_ms, down_ms, ..none(closed.outcome, words) };
        return Ok(Some(done));
    };
    Ok(match &incident.stage {
        Stage::Fresh | Stage::Climbing(_) => None,
        Stage::Holding(hold) => match hold.kind {
            HoldKind::Emergency => Some(Done {
                incident: Some(incident.id),
                // It has been down since the incident opened, and is.
                down_ms: clock::now().since_ms(incident.opened).unwrap_or(0),
                ..none(
                    Outcome::Emergency,
                    "every layer failed; a running agent goes on trying by itself".to_owned(),
                )
            }),
            HoldKind::Latent => Some(none(
                Outcome::Failed,
                format!("it serves, but could not be repaired in place: {}", incident.cause),
            )),
            HoldKind::Degraded => Some(Done {
                layer: hold.layer,
                ..none(
                    Outcome::Recovered,
                    "it serves; what it silenced itself comes back by itself".to_owned(),
                )
            }),
        },
    })
}

/// Where the agent of one recovery speaks.
fn log(desk: &Desk) -> std::path::PathBuf {
    desk.places.run_dir.join("recover.log")
}

/// An agent for one recovery.
struct Temporary {
    child: Child,
    fd: PidFd,
}

impl Temporary {
    fn start(desk: &Desk, one_layer: bool) -> Result<Temporary> {
        let what = || "start an agent for this recovery".to_owned();
        desk.places.make()?;
        let log_file = std::fs::File::create(log(desk)).context(what)?;
        let exe = std::env::current_exe().context(what)?;
        let child = Command::new(exe)
            .arg("--config")
            .arg(&desk.places.config_file)
            .args(["guard", "--errand", &std::process::id().to_string()])
            .args(one_layer.then_some("--one-layer"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::from(log_file))
            .spawn()
            .context(what)?;
        let id = ProcessId::of(child.id()).ok_or_else(|| {
            Error::new(Kind::System, what(), "it ended at once").hint(format!("see {}", log(desk).display()))
        })?;
        let temporary = Temporary { child, fd: id.open()? };
        let deadline = Deadline::after(AGENT_APPEARS);
        while !deadline.passed() {
            if desk.status().is_some_and(|s| s.agent == id) {
                return Ok(temporary);
            }
            if temporary.fd.exited() {
                break;
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        temporary.end(desk);
        Err(Error::new(Kind::System, what(), "it did not begin to guard")
            .hint(format!("see {}", log(desk).display())))
    }

    /// Ends it, after its messages had time to leave. The gateway stays.
    fn end(mut self, desk: &Desk) {
        let deadline = Deadline::after(MESSAGES_LEAVE);
        while !self.fd.exited() && !deadline.passed() {
            let waiting = alert::Outbox::open(&desk.places.outbox()).is_ok_and(|mut o| !o.is_empty());
            if !waiting {
                break;
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        let _ = self.fd.signal(rustix::process::Signal::TERM);
        if !self.fd.wait(Deadline::after(AGENT_ENDS)) {
            let _ = self.fd.signal(rustix::process::Signal::KILL);
            let _ = self.fd.wait(Deadline::after(AGENT_ENDS));
        }
        let _ = self.child.try_wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_built_layers_are_taken_and_others_say_what_there_is() {
        assert_eq!(layer("restore").unwrap(), Layer::Restore);
        assert_eq!(layer("peer-copy").unwrap(), Layer::PeerCopy);
        assert!(layer("emergency").is_err(), "a state to hold, not a layer to run");
        let e = layer("prayer").unwrap_err();
        assert!(e.why.contains("no such") && e.hint.unwrap().contains("restart"));
    }
}
