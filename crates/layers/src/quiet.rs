//! Stops the gateway for certain: the one act that restart and restore share.

use crate::{Bench, DRAIN, GRACE, GRACE_HUNG, Report};
use engine::Limits;
use host::clock::Deadline;
use host::process::{ProcessId, Signal};
use host::service::Stopped;
use host::{Error, Kind, Result};
use std::time::Duration;

/// A process that was killed is gone after this, unless it hangs in the kernel.
const KILL_WAIT: Duration = Duration::from_secs(2);

/// Keeps the service manager from starting the gateway in the middle of a repair. Whoever ends this step takes the hold
/// back. Where it cannot be held the repair goes on: a stopped unit is mostly left alone anyway.
pub fn hold(bench: &mut Bench<'_>, report: &mut Report) {
    if let Err(e) = bench.manager.hold(bench.deadline) {
        report.could_not(format!("the unit could not be held down for the repair: {e}"));
    }
}

/// How long the gateway gets to end by itself. One that answers may have turns to finish: it gets all that the step can
/// spare beyond what its own work `needs`, at least the usual grace and at most what its service allows for a drain.
fn grace(hung: bool, left: Duration, needs: Duration, limits: Limits) -> Duration {
    if hung {
        return limits.span(GRACE_HUNG);
    }
    left.saturating_sub(limits.span(needs)).clamp(limits.span(GRACE), DRAIN)
}

/// After this there is no gateway process that is ours. `needs` is what the step's work takes after the stop.
pub fn stop(bench: &mut Bench<'_>, hung: bool, needs: Duration, report: &mut Report) -> Result<()> {
    let grace = grace(hung, bench.deadline.left(), needs, bench.limits);
    let ran = bench.node.gateway().is_some();
    match bench.manager.stop(grace, bench.deadline)? {
        Stopped::Clean { .. } if !ran => report.did("no gateway was running; nothing of it is left"),
        Stopped::Clean { took_ms } => report.did(format!("the gateway ended by itself after {took_ms} ms")),
        Stopped::Killed { took_ms } => report.did(format!("the gateway was killed after {took_ms} ms")),
    }
    // The service manager's word is not proof: a gateway of ours may run outside of its unit, started by hand.
    if let Some(still) = bench.node.gateway() {
        end(still, grace, bench.deadline)?;
        report.did(format!("process {}, which ran outside of its service, was ended", still.pid));
    }
    match bench.node.gateway() {
        None => Ok(()),
        Some(still) => Err(Error::new(
            Kind::System,
            "stop the gateway",
            format!("process {} still holds the node's lock", still.pid),
        )),
    }
}

/// SIGTERM, the grace, SIGKILL; by process identity, never by number alone.
fn end(process: ProcessId, grace: Duration, deadline: Deadline) -> Result<()> {
    let fd = process.open()?;
    fd.signal(Signal::TERM)?;
    if !fd.wait(Deadline::after(grace).min(deadline)) {
        fd.signal(Signal::KILL)?;
        // Also when the grace took the whole deadline: a killed process needs milliseconds, and a look back.
        if !fd.wait(Deadline::after(KILL_WAIT)) {
            return Err(Error::new(
                Kind::TimedOut,
                "stop the gateway",
                format!("process {} did not end after SIGKILL", process.pid),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use host::container::{Containers, Spec};
    use node::Node;

    /// A node whose "Node" is `node_bin`, on a port that nobody holds.
    fn node(dir: &std::path::Path, node_bin: &str) -> Node {
        serde_json::from_value(serde_json::json!({
            "name": "t", "prefix": dir, "package_dir": dir, "entry": dir, "node_bin": node_bin, "home": dir,
            "state_dir": dir, "config_path": dir, "port": 1, "ids": host::run::Ids::current(), "user": "t"
        }))
        .unwrap()
    }

    #[test]
    fn a_gateway_that_answers_may_drain_for_as_long_as_the_step_can_wait() {
        let s = Duration::from_secs;
        let whole = Limits::default();
        let tenth = Limits::divided(10).unwrap();
        assert_eq!(grace(true, s(60), s(30), whole), GRACE_HUNG, "nothing is finished by one that hangs");
        assert_eq!(grace(false, s(60), s(30), whole), s(30));
        assert_eq!(grace(false, s(15), s(30), whole), GRACE, "never less than the usual");
        assert_eq!(grace(false, s(1_000), s(30), whole), DRAIN, "never more than its own service allows");
        assert_eq!(grace(false, s(6), s(30), tenth), s(3), "a tenth of the time, a tenth of the needs");
    }

    #[test]
    fn a_process_is_ours_by_what_it_runs_and_not_by_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let containers = Containers::open(&format!("quiet-{}", std::process::id()), dir.path()).unwrap();
        let spec = Spec {
            program: "/bin/sleep".into(),
            args: vec!["60".into()],
            mark: format!("quiet-{}", std::process::id()),
            ..Spec::default()
        };
        let mut step = containers.spawn(&spec, "sleeper").unwrap();
        let id = step.id();
        // The program is entered a moment after the process exists.
        let sleep = std::fs::canonicalize("/bin/sleep").unwrap();
        let deadline = Deadline::after(Duration::from_secs(10));
        while id.exe().as_ref() != Some(&sleep) && !deadline.passed() {
            std::thread::yield_now();
        }
        assert!(node(dir.path(), "/bin/sleep").owns(id));
        assert!(!node(dir.path(), "/bin/true").owns(id), "another program's process is a stranger");
        // A lock is a file of the node's user: whoever it names is no gateway for that alone.
        let lock = node::lock::path(dir.path(), host::run::Ids::current().uid);
        std::fs::create_dir_all(lock.parent().unwrap()).unwrap();
        let text = serde_json::json!({"pid": id.pid, "startTime": id.start_ticks, "configPath": "/c"});
        std::fs::write(&lock, text.to_string()).unwrap();
        assert_eq!(node(dir.path(), "/bin/true").gateway(), None, "a stranger is never stopped or killed");
        assert_eq!(node(dir.path(), "/bin/sleep").gateway(), Some(id));
        end(id, Duration::from_secs(5), deadline).unwrap();
        assert!(!id.alive());
        step.kill(deadline).unwrap();
        containers.remove();
    }
}
