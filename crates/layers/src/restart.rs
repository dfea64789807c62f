//! Layer 0: stop for certain, clear the latch. Only where disk, config and state are clean; the start is asked for by
//! the agent once this container is proven empty.

use crate::{Bench, Report, quiet};
use host::Result;
use std::time::Duration;

/// Clearing the latch takes milliseconds, a kill at the grace's end two seconds.
const NEEDS: Duration = Duration::from_secs(3);

/// The work of layer 0.
pub fn work(bench: &mut Bench<'_>, hung: bool) -> Result<Report> {
    let mut report = Report::default();
    quiet::stop(bench, hung, NEEDS, &mut report)?;
    bench.manager.clear_latch(bench.deadline)?;
    report.did("the service manager's latch is clear");
    Ok(report)
}
