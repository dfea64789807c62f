//! `koboshi accept`: what is there now is intended.
//!
//! A new baseline and a snapshot that is trusted at once, on the owner's word and the judge's: until then the last
//! good snapshot would be what a repair goes back to. Older snapshots are kept. What was changing while the copy was
//! taken (an update, a deletion under way) is a picture of nothing: it is not trusted, on nobody's word.

use super::check::{self, node_json};
use super::desk::{Desk, Fields, verdict_name, verdict_why};
use super::{judging, snapshots};
use crate::control::{self, Order};
use crate::print::Exit;
use crate::{patient, step};
use engine::Verdict;
use host::clock::{self, Deadline};
use host::{Error, Kind, Result};
use node::Baseline;
use std::time::Duration;
use store::Trust;

/// Three good looks over five seconds, and a start that is nearly done.
const WATCH_LIMIT: Duration = Duration::from_secs(60);
/// Reading the identity takes milliseconds.
const BASELINE_LIMIT: Duration = Duration::from_secs(10);
/// A stat of every file, twice; a person waits for it.
const PROOF_LIMIT: Duration = Duration::from_secs(120);
/// The agent answers an order within a turn of its loop.
const ORDER_LIMIT: Duration = Duration::from_secs(30);

/// Accepts what is there.
pub(super) fn run(desk: &Desk) -> Result<Exit> {
    let p = desk.printer;
    let node = desk.node()?;
    // Measured by nothing but itself: the old baseline is what is being replaced.
    let mut judge = node::Judge::new(desk.config.judge.clone(), Baseline::default());
    let bar = p.spinner("making sure that it serves");
    let judgement = judging::watch(desk, &node, &mut judge, WATCH_LIMIT, |_| {});
    bar.done();
    let serves = matches!(&judgement.verdict, Verdict::Serving { .. }) && judgement.confirmed;
    if !serves {
        let why =
            verdict_why(&judgement.verdict).unwrap_or_else(|| "it could not be confirmed in a minute".into());
        return Err(Error::new(
            Kind::System,
            format!("accept {} as it is", node.name),
            format!("it does not serve: {why}"),
        )
        .hint("only a node that serves can be what is intended; koboshi node start, or koboshi recover"));
    }
    desk.places.make()?;
    let baseline = Baseline::take(&node, Vec::new(), clock::now(), Deadline::after(BASELINE_LIMIT))?;
    let mut node = node;
    node.version = node.package_version();
    let info = snapshots::take(desk, &node, &baseline, "accepted by the owner")?;
    let store = desk.store()?;
    let bar = p.spinner("making sure that nothing changed meanwhile");
    let blurred = step::blurred(&store, &info, &node, &baseline, Deadline::after(PROOF_LIMIT));
    bar.done();
    if let Some(why) = blurred? {
        return Err(Error::new(Kind::System, format!("accept {} as it is", node.name), why).hint(format!(
            "something is changing it right now: let that end, then run koboshi accept again; snapshot {} stays a \
             candidate and nothing is trusted anew",
            info.id
        )));
    }
    patient::set_baseline(&desk.places, &baseline)?;
    patient::remember(&desk.places, &node)?;
    store.set_trust(&info.id, Trust::Good)?;
    let known = desk.places.known_programs();
    layers::peer_copy::remember(&store, &known, Deadline::after(BASELINE_LIMIT))?;
    if desk.agent().is_some() {
        control::give(&desk.places, &Order::Accept, ORDER_LIMIT)?;
    }
    p.line(check::headline(desk, &node, &judgement.verdict));
    p.line(format!(
        "This is the new baseline: snapshot {} ({}). Older snapshots are kept.",
        info.id,
        snapshots::amount(&info)
    ));
    let fields = Fields::default()
        .put("node", node_json(&node))
        .put("verdict", verdict_name(&judgement.verdict))
        .put("snapshot", info.id.as_str())
        .put("trust", Trust::Good.name());
    p.object(fields.done());
    Ok(Exit::Done)
}
