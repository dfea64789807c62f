//! `koboshi node start|stop|restart`: the gateway under any service manager.
//!
//! The owner's will is written down first, so that whatever happens next, an agent never works against it. With a
//! running agent everything goes through the agent: there is one who starts and stops. What is said at the end was
//! proven: gone by the gateway's lock, serving by the judge.

use super::check::{self, node_json};
use super::desk::{Desk, Fields, Hands, verdict_name, verdict_why};
use super::judging;
use crate::cli::NodeCommand;
use crate::control::{self, Order};
use crate::print::{Exit, duration};
use engine::Verdict;
use host::clock::{self, Deadline};
use host::process::ProcessId;
use host::{Error, Kind, Result};
use node::probe::{Health, Startup};
use node::{Node, Want};
use std::time::Duration;

/// A gateway that answers may have turns to finish: its own service's limit.
const GRACE_S: u64 = 330;
/// One that does not answer will not read the signal either.
const GRACE_HUNG_S: u64 = layers::GRACE_HUNG.as_secs();
/// Killing for certain, after the grace.
const KILL_LIMIT: Duration = Duration::from_secs(15);
/// Asking a manager for a start.
const START_LIMIT: Duration = Duration::from_secs(15);
/// Watching a start: the judge's own limit for one that progresses, and the confirmation.
const WATCH_LIMIT: Duration = Duration::from_secs(930);

/// Does one of them.
pub(super) fn run(desk: &Desk, what: &NodeCommand) -> Result<Exit> {
    let node = desk.node()?;
    match what {
        NodeCommand::Start => {
            let before = node.gateway();
            start(desk, &node)?;
            served(desk, &node, before, "start")
        }
        NodeCommand::Stop => {
            let took_ms = stop(desk, &node)?;
            let p = desk.printer;
            p.line(format!(
                "{} is stopped ({}); it stays down until `koboshi node start`.",
                node.name,
                duration(took_ms)
            ));
            let fields = Fields::default()
                .put("done", "stop")
                .put("node", node_json(&node))
                .put("took_ms", took_ms as f64);
            p.object(fields.done());
            Ok(Exit::Done)
        }
        NodeCommand::Restart => {
            let before = node.gateway();
            stop(desk, &node)?;
            start(desk, &node)?;
            served(desk, &node, before, "restart")
        }
    }
}

/// Stops it; on return it is proven gone. Milliseconds it took.
fn stop(desk: &Desk, node: &Node) -> Result<u64> {
    let began = clock::now();
    let grace = Duration::from_secs(grace_s(node));
    let bar = desk.printer.spinner(&format!("stopping {}", node.name));
    let stopped = match desk.hands(node)? {
        Hands::Agent => {
            control::give(&desk.places, &Order::Stop { grace_s: grace.as_secs() }, grace + KILL_LIMIT)
                .map(|_| ())
        }
        Hands::Own(mut service, _lock) => {
            wish(desk, true)?;
            // Nothing starts it again in this boot; an agent that begins does the same in the next ones.
            service.manager().hold(Deadline::after(START_LIMIT))?;
            service.manager().stop(grace, Deadline::after(grace + KILL_LIMIT)).map(|_| ())
        }
    };
    bar.done();
    stopped?;
    match node.gateway() {
        Some(id) => Err(Error::new(
            Kind::System,
            format!("stop {}", node.name),
            format!("the gateway (process {}) is there again or still", id.pid),
        )
        .hint("koboshi status shows who runs it; something else may start it")),
        None => Ok(clock::now().since_ms(began).unwrap_or(0)),
    }
}

fn start(desk: &Desk, node: &Node) -> Result<()> {
    match desk.hands(node)? {
        Hands::Agent => control::give(&desk.places, &Order::Start, START_LIMIT).map(|_| ()),
        Hands::Own(mut service, _lock) => {
            wish(desk, false)?;
            service.manager().release(Deadline::after(START_LIMIT))?;
            if node.gateway().is_some() {
                return Ok(());
            }
            let manager = service.manager();
            manager.clear_latch(Deadline::after(START_LIMIT))?;
            manager.start(Deadline::after(START_LIMIT))
        }
    }
}

/// Writes the owner's will down.
fn wish(desk: &Desk, stopped: bool) -> Result<()> {
    let mut will = desk.will();
    will.stopped = stopped;
    will.by_stops = false;
    will.save(&desk.places)
}

/// How long it gets to end by itself.
fn grace_s(node: &Node) -> u64 {
    /// Two or three plain probes.
    const LIMIT: Duration = Duration::from_secs(3);
    let look = node::look(node, &Want::default(), Deadline::after(LIMIT));
    let answers =
        look.health == Health::Live || matches!(look.startup, Startup::Draining | Startup::Starting);
    if answers { GRACE_S } else { GRACE_HUNG_S }
}

/// Watches until the judge confirms that it serves, and says so.
fn served(desk: &Desk, node: &Node, before: Option<ProcessId>, done: &str) -> Result<Exit> {
    let p = desk.printer;
    let began = clock::now();
    let mut judge = judging::judge(desk);
    if node.gateway() != before || before.is_none() {
        judge.started(began);
    }
    let bar = p
        .spinner(&format!("waiting until {} serves (ending this command does not end the start)", node.name));
    let judgement = judging::watch(desk, node, &mut judge, WATCH_LIMIT, |_| {});
    bar.done();
    let took_ms = clock::now().since_ms(began).unwrap_or(0);
    p.line(format!("{} ({})", check::headline(desk, node, &judgement.verdict), duration(took_ms)));
    match &judgement.verdict {
        Verdict::Serving { .. } => {
            if desk.agent().is_none() {
                p.line("No agent is running: nothing guards the node. koboshi install sets it up.");
            }
        }
        Verdict::NotServing { .. } | Verdict::Inconclusive { .. } => {
            p.line("  fix: koboshi recover puts it right; koboshi doctor says what is missing for that");
        }
    }
    let fields = Fields::default()
        .put("done", done)
        .put("node", node_json(node))
        .put("verdict", verdict_name(&judgement.verdict))
        .maybe("why", verdict_why(&judgement.verdict))
        .maybe("pid", judgement.process.map(|id| id.pid))
        .put("took_ms", took_ms as f64);
    p.object(fields.done());
    Ok(check::exit(&judgement.verdict))
}
