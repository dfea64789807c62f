//! What the layers take from, asked from outside whether it answers: registry, store and peers.
//!
//! In an emergency nothing else would tell that one of them is back: it is not on the node's disk. Asked is what costs
//! least and cannot be answered by something half dead: the registry for one package's description, the store's disk for
//! bytes that are not in memory, a peer's SSH server for its first line. What never answers takes nothing along: each is
//! said before the next is asked.

use crate::config::Config;
use crate::places::Places;
use crate::reinstall;
use crate::step::Answer;
use engine::Layer;
use host::Result;
use host::clock::Deadline;
use layers::Report;
use node::Node;
use std::time::Duration;

/// The registry answers, at least for the version that would be installed.
pub const REGISTRY: &str = "registry";
/// The store's disk gives what is asked of it.
pub const STORE: &str = "store";
/// At least one peer's SSH server speaks.
pub const PEERS: &str = "peers";

/// What one source may take.
const ASK_LIMIT: Duration = Duration::from_secs(5);
const ASK_LEAST: Duration = Duration::from_secs(2);

/// Asks them all; those that answered are in `done`, the others in `undone`.
///
/// # Errors
/// When the answer cannot be written.
pub fn ask(
    node: &Node,
    config: &Config,
    places: &Places,
    deadline: Deadline,
    early: &dyn Fn(&Answer) -> Result<()>,
) -> Result<Answer> {
    let mut report = Report::default();
    let limits = config.ladder.limits();
    let limit = || deadline.min(Deadline::after(limits.span(ASK_LIMIT).max(ASK_LEAST)));
    // Where nobody may install, nobody asks: a host without a way out has no use for the question.
    if [Layer::SystemInstall, Layer::UserInstall].iter().any(|layer| config.ladder.refuses(*layer).is_none())
    {
        let version = reinstall::version(node, None, None).unwrap_or_default();
        let order = reinstall::order(places, &version, Layer::UserInstall);
        note(&mut report, REGISTRY, layers::install::registry_answers(node, &order, limit()));
        early(&Answer::Done(report.clone()))?;
    }
    if !config.peer.is_empty() {
        note(&mut report, PEERS, layers::peer_copy::one_speaks(&config.peer, limit()));
    }
    if places.store().is_dir() {
        // Until it has answered it has not; whoever waits for a disk that is stuck says no more.
        let mut without = report.clone();
        note(&mut without, STORE, false);
        early(&Answer::Done(without))?;
        note(&mut report, STORE, store::disk_answers(&places.store()));
    }
    Ok(Answer::Done(report))
}

fn note(report: &mut Report, name: &str, answers: bool) {
    let list = if answers { &mut report.done } else { &mut report.undone };
    list.push(name.to_owned());
}
