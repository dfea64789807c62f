//! Looks at the node for commands: the same probes and the same judge as the agent's, in the foreground.

use super::desk::Desk;
use engine::Verdict;
use host::clock::{self, Deadline};
use node::{Judge, Judgement, Node, Want};
use std::time::Duration;

/// One look with all its probes.
const LOOK_LIMIT: Duration = Duration::from_secs(8);
/// Between two looks of a command that waits.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// A judge that knows what this node is measured by.
pub(super) fn judge(desk: &Desk) -> Judge {
    Judge::new(desk.config.judge.clone(), desk.baseline())
}

/// One look and what the judge says of it.
pub(super) fn look(desk: &Desk, node: &Node, judge: &mut Judge) -> Judgement {
    let service = desk.unit_state(node).map(|state| node::probe::ServiceLook::from(&state));
    let want = Want {
        hello: judge.wants_hello(clock::now()),
        identity: true,
        update: true,
        searched: None,
        log: service.is_none().then(|| desk.places.gateway_log()),
        service,
        main: None,
        known_turn: false,
        heard: None,
    };
    judge.observe(&node::look(node, &want, Deadline::after(LOOK_LIMIT)))
}

/// Looks until the node is confirmed to serve, is judged not to, or the time is up.
pub(super) fn watch(
    desk: &Desk,
    node: &Node,
    judge: &mut Judge,
    limit: Duration,
    mut tell: impl FnMut(&Judgement),
) -> Judgement {
    let deadline = Deadline::after(limit);
    loop {
        let judgement = look(desk, node, judge);
        tell(&judgement);
        let decided = match &judgement.verdict {
            Verdict::Serving { .. } => judgement.confirmed,
            Verdict::NotServing { .. } => true,
            Verdict::Inconclusive { .. } => false,
        };
        if decided || deadline.passed() {
            return judgement;
        }
        std::thread::sleep(LOOK_AGAIN.min(deadline.left()));
    }
}
