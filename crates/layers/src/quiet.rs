//! Stops the gateway for certain: the one act that restart and restore share.

use crate::{Bench, GRACE, GRACE_HUNG, Report};
use host::service::Stopped;
use host::{Error, Kind, Result};
use std::time::Duration;

/// After this there is no gateway process that is ours. A hung one gets a shorter grace.
pub fn stop(bench: &mut Bench<'_>, hung: bool, report: &mut Report) -> Result<()> {
    let grace: Duration = if hung { GRACE_HUNG } else { GRACE };
    match bench.manager.stop(grace, bench.deadline)? {
        Stopped::Clean { took_ms } => report.did(format!("the gateway ended by itself after {took_ms} ms")),
        Stopped::Killed { took_ms } => report.did(format!("the gateway was killed after {took_ms} ms")),
    }
    // The service manager's word is not proof: another gateway of ours may hold the lock.
    if let Some(still) = bench.node.gateway() {
        return Err(Error::new(
            Kind::System,
            "stop the gateway",
            format!("process {} still holds the node's lock", still.pid),
        ));
    }
    Ok(())
}
