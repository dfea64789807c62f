//! `koboshi status`: one screen. With a running agent the verdict is the agent's, who has looked for longer than one look
//! can (confirmed, unsteady, why); without its fresh word the node is looked at here. Whose word it is is always said.

use super::desk::{Desk, Fields, ago, date, findings_json, seconds, verdict_name, verdict_why};
use super::kept::{self, Kept};
use super::{check, incidents, judging, readiness};
use crate::agent::status::Status;
use crate::print::{Exit, bytes, duration};
use crate::voice::Standing;
use engine::{Class, Verdict};
use host::Result;
use host::clock;
use host::process::ProcessId;
use layers::install::Moved;
use node::Node;
use serde_json::Value;
use store::SnapshotInfo;

/// Incidents on the screen; `koboshi incidents list` shows all.
const INCIDENTS: usize = 5;
/// The agent publishes at least every 30 s while its loop turns; an older word than this is not its word of now.
const FRESH_MS: u64 = 90_000;

/// One screen.
pub(super) fn run(desk: &Desk) -> Result<Exit> {
    let node = desk.node()?;
    let agent = desk.agent();
    let status = desk.status();
    let not_its_word = why_not_its_word(agent, status.as_ref(), node.gateway());
    let fresh = status.clone().filter(|_| not_its_word.is_none());
    let verdict = match &fresh {
        Some(status) => status.verdict.clone(),
        None => judging::look(desk, &node, &mut judging::judge(desk)).verdict,
    };
    let (state, _) = desk.book()?;
    let emergency = state.in_emergency();
    let kept = kept::ask(desk);
    let disk = readiness::look(desk, &node, &kept);
    let layers = readiness::layers(desk, &node, &disk);
    let recent = incidents::newest(desk, INCIDENTS)?;

    let told = Standing::of(&desk.config, &desk.places);
    told.warn(desk.printer, &desk.places);
    open_line(desk, status.as_ref());
    head(desk, &node, &verdict, fresh.as_ref());
    desk.printer.line(match (&fresh, &not_its_word) {
        (Some(status), _) => format!("judged     by the agent{}", confirmed(status)),
        (None, why) => {
            format!("judged     by one look of this command: {}", why.as_deref().unwrap_or_default())
        }
    });
    agent_lines(desk, agent, status.as_ref());
    let moved =
        layers::install::Moved::load(&desk.places.state_dir).unwrap_or_default().filter(Moved::displaced);
    if let Some(moved) = &moved {
        desk.printer.line(format!(
            "displaced  it runs from {}; its home {} could not be mended",
            moved.away.prefix.display(),
            moved.home.prefix.display()
        ));
        if let Some(words) = status.as_ref().and_then(|s| s.home.as_ref()) {
            desk.printer.line(format!("           {words}"));
        }
    }
    if let Some(why) = desk.hands_off() {
        desk.printer.line(format!("hands off  {why}"));
    }
    desk.printer.line("layers");
    readiness::print(desk, &layers);
    snapshot_lines(desk, &kept);
    told_lines(desk, &told);
    incident_lines(desk, &recent);

    let object = Fields::default()
        .put("node", check::node_json(&node))
        .put("verdict", if emergency { "emergency" } else { verdict_name(&verdict) })
        .maybe("why", verdict_why(&verdict))
        .put("judged_by", if fresh.is_some() { "agent" } else { "look" })
        .put("agent", agent_json(agent, status.as_ref()))
        .put("manager", desk.manager(&node))
        .maybe("hands_off", desk.hands_off())
        .maybe("gateway_pid", node.gateway().map(|id| id.pid))
        .maybe("return_home", status.as_ref().and_then(|s| s.home.clone()))
        .maybe("displaced_from", moved.map(|m| m.home.prefix.display().to_string()))
        .put("layers", readiness::json(&layers))
        .put("snapshots", kept_json(&kept))
        .put("findings", findings_json(&disk.findings))
        .put("alert_channels", desk.config.alert.len())
        .put("alerts", told.json())
        .put("incidents", recent.iter().map(|o| incidents::json(o, false)).collect::<Vec<_>>());
    desk.printer.object(object.done());
    Ok(if emergency { Exit::Emergency } else { check::exit(&verdict) })
}

/// Why the agent's word does not count: it must be young and about the gateway that runs now.
fn why_not_its_word(
    agent: Option<ProcessId>,
    status: Option<&Status>,
    gateway: Option<ProcessId>,
) -> Option<String> {
    let why = match (agent, status) {
        (None, _) => "no agent is there",
        (Some(_), None) => "the agent has not spoken yet",
        (Some(_), Some(s)) if clock::now().since_ms(s.at).is_none_or(|ms| ms >= FRESH_MS) => {
            "the agent has been silent for over 90 s"
        }
        (Some(_), Some(s)) if s.gateway != gateway || gateway.is_none() && s.verdict.is_serving() => {
            "the agent has not judged the gateway of this moment yet"
        }
        (Some(_), Some(_)) => return None,
    };
    Some(why.to_owned())
}

/// How sure the agent is. What does not serve is known at the first word; what cannot be told yet has nothing to confirm.
fn confirmed(status: &Status) -> &'static str {
    match (&status.verdict, status.confirmed) {
        (Verdict::Serving { .. }, true) => ", confirmed",
        (Verdict::Serving { .. }, false) => ", not confirmed yet",
        (Verdict::NotServing { .. } | Verdict::Inconclusive { .. }, _) => "",
    }
}

/// An open incident stands before everything else about the node.
fn open_line(desk: &Desk, status: Option<&Status>) {
    let p = desk.printer;
    let Some(open) = status.and_then(|s| s.incident.as_ref()) else { return };
    let word = if open.emergency { p.red("EMERGENCY") } else { p.yellow("incident ") };
    p.line(format!("{word}  {}: {}", open.id, open.cause));
    p.line(format!("           {}", open.doing));
    if open.emergency {
        p.line(format!("           why each layer failed: koboshi incidents show {}", open.id));
    }
}

fn head(desk: &Desk, node: &Node, verdict: &Verdict, status: Option<&Status>) {
    let p = desk.printer;
    p.line(check::headline(desk, node, verdict));
    let version = node
        .package_version()
        .map_or_else(|| "OpenClaw (no readable package)".to_owned(), |v| format!("OpenClaw {v}"));
    let process =
        node.gateway().map_or_else(|| "no gateway process".to_owned(), |id| format!("process {}", id.pid));
    let since = status
        .and_then(|s| s.serving_since)
        .and_then(|at| clock::now().since_ms(at))
        .map_or_else(String::new, |ms| format!(", serving for {}", duration(ms)));
    p.line(format!("node       {version}, port {}, user {}, {process}{since}", node.port, node.user));
}

fn agent_lines(desk: &Desk, agent: Option<ProcessId>, status: Option<&Status>) {
    let p = desk.printer;
    match (agent, status) {
        (None, _) => {
            p.line(format!("agent      {}: nothing would put the node right", p.red("not running")));
            p.line("           fix: koboshi install, or run koboshi guard");
        }
        (Some(id), None) => p.line(format!("agent      process {}, just begun", id.pid)),
        (Some(id), Some(s)) => {
            let silent_ms = clock::now().since_ms(s.at).unwrap_or(FRESH_MS);
            let stale = if silent_ms < FRESH_MS { "" } else { ", silent for over 90 s" };
            p.line(format!(
                "agent      process {}, {} mode, {}; {}{stale}",
                id.pid, s.mode, s.manager, s.containers
            ));
            if let Some(trouble) = &s.trouble {
                p.line(format!("           {} {trouble}", p.yellow("trouble:")));
            }
        }
    }
    if let Some(words) = desk.config.ladder.shortened() {
        p.line(format!("           {words}"));
    }
}

fn agent_json(agent: Option<ProcessId>, status: Option<&Status>) -> Value {
    Fields::default()
        .put("running", agent.is_some())
        .maybe("pid", agent.map(|id| id.pid))
        .maybe("version", status.map(|s| s.agent_version.clone()))
        .maybe("mode", status.map(|s| s.mode.clone()))
        .maybe("containers", status.map(|s| s.containers.clone()))
        .maybe("confirmed", status.map(|s| s.confirmed))
        .maybe("settled", status.map(|s| s.settled))
        .maybe("trouble", status.and_then(|s| s.trouble.clone()))
        .maybe("doing", status.and_then(|s| s.incident.as_ref()).map(|i| i.doing.clone()))
        .done()
}

fn snapshot_lines(desk: &Desk, kept: &Kept) {
    let p = desk.printer;
    if let Some(e) = &kept.trouble {
        p.line(format!("snapshots  {}: {}", p.red("the store cannot be used"), e));
        if let Some(hint) = &e.hint {
            p.line(format!("           fix: {hint}"));
        }
        return;
    }
    let disk = format!("{} of at most {}", bytes(kept.bytes), bytes(kept.limit_bytes));
    let good = match &kept.good {
        Some(info) => format!("newest good {} taken {}", info.id, ago(info.taken)),
        None => p.yellow("none is good yet"),
    };
    p.line(format!("snapshots  {} kept, {good}; {disk}", kept.count));
    if let Some(info) = &kept.good {
        p.line(format!("           good copies, last seen unchanged: {}", copies(info)));
    }
}

/// The age of each class's good copy, classes of the same age together.
fn copies(info: &SnapshotInfo) -> String {
    let mut by_age: Vec<(String, Vec<&str>)> = Vec::new();
    for (class, copy) in &info.classes {
        let age = seconds(age_s(copy.taken));
        match by_age.iter_mut().find(|(known, _)| *known == age) {
            Some((_, classes)) => classes.push(class.name()),
            None => by_age.push((age, vec![class.name()])),
        }
    }
    match by_age.as_slice() {
        [(age, _)] => format!("every class {age} ago"),
        several => {
            let told: Vec<String> =
                several.iter().map(|(age, classes)| format!("{} {age} ago", classes.join(", "))).collect();
            told.join("; ")
        }
    }
}

fn age_s(at: jiff::Timestamp) -> u64 {
    u64::try_from(clock::wall().as_second() - at.as_second()).unwrap_or(0)
}

fn kept_json(kept: &Kept) -> Value {
    let good = kept.good.as_ref();
    let ages = good.map(|info| {
        info.classes
            .iter()
            .map(|(class, c): (&Class, _)| (class.name().to_owned(), Value::from(age_s(c.taken))))
            .collect::<serde_json::Map<String, Value>>()
    });
    Fields::default()
        .put("count", kept.count)
        .maybe("newest_good", good.map(|i| i.id.clone()))
        .maybe("good_age_s", ages)
        .put("store_bytes", kept.bytes)
        .put("limit_bytes", kept.limit_bytes)
        .maybe("trouble", kept.trouble.as_ref().map(ToString::to_string))
        .done()
}

/// Who would be told, and since when that is known to work.
fn told_lines(desk: &Desk, told: &Standing) {
    let proven = told.proven.iter().map(|(name, at)| format!("{name} (worked {})", date(at)));
    let untried = told.untried.iter().map(|name| format!("{name} (never tried: koboshi alert test)"));
    let words: Vec<String> = proven.chain(untried).collect();
    let p = desk.printer;
    if words.is_empty() {
        let nobody = p.yellow("nobody would be told");
        p.line(format!("alerts     {nobody}: only files and the journal of this machine are written"));
    } else {
        p.line(format!("alerts     {}", words.join(", ")));
    }
}

fn incident_lines(desk: &Desk, recent: &[incidents::One]) {
    let p = desk.printer;
    if recent.is_empty() {
        p.line("incidents  none on record");
        return;
    }
    p.line("incidents");
    let rows: Vec<Vec<String>> = recent.iter().map(incidents::row).collect();
    p.table(&["id", "opened (UTC)", "outcome", "layer", "down", "cause"], &rows);
}
