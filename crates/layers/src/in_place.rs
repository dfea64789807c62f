//! Layer in-place: damage on disk put right while the node serves, without a restart.
//!
//! Only what a running gateway does not hold open is touched: program, runtime and service files, a config that would
//! not survive a restart, and a workspace or credential directory that was taken away whole.

use crate::restore::{self, Choice};
use crate::{Bench, Report};
use engine::{Class, FaultKind, Finding};
use host::Result;

/// The work of the in-place layer.
pub fn work(bench: &mut Bench<'_>, findings: &[Finding]) -> Result<Report> {
    let mut report = Report::default();
    let fit: Vec<Finding> = findings
        .iter()
        .filter(|f| match f.kind {
            FaultKind::FilesDamaged | FaultKind::ConfigBroken => true,
            FaultKind::RootMissing => matches!(f.class, Some(Class::Workspace | Class::Credentials)),
            FaultKind::ProcessGone
            | FaultKind::Hung
            | FaultKind::DatabaseCorrupt
            | FaultKind::Amnesia
            | FaultKind::RuntimeUnfit
            | FaultKind::ServiceLatched
            | FaultKind::PortTaken
            | FaultKind::Permission
            | FaultKind::DiskFull
            | FaultKind::SchemaNewer
            | FaultKind::UpdateAtWork
            | FaultKind::OwnersWill
            | FaultKind::BackupStale
            | FaultKind::Notice => false,
        })
        .cloned()
        .collect();
    let choice = Choice { serving: true, ..Choice::of(bench.node, &fit) };
    restore::repair(bench, &choice, &mut report)?;
    Ok(report)
}
