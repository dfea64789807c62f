//! Layer 2: the last good program again from the registry, with the rights of root where the prefix is root's.
//!
//! Needs a registry that answers, an npm-capable Node (its own is fetched if the node's is gone), space and memory. Does
//! what [`crate::install`] says, in the node's own prefix; a node that was displaced comes home with it. Its own
//! acceptance beyond the common judge: the tree is exactly the pinned tarballs, byte by byte, and the unit that starts it
//! is there and enabled. Where it had to bring a Node of its own, `openclaw` in a login shell runs on that.

use crate::install::{self, Moved, Order};
use crate::{Bench, Report};
use host::Result;

/// The work of layer 2.
///
/// # Errors
/// The reason why nothing was put in place.
pub fn work(bench: &mut Bench<'_>, order: &Order, hung: bool) -> Result<Report> {
    let target = Moved::load(&order.state_dir)?.map_or_else(|| bench.node.clone(), |moved| moved.home);
    let mut report = install::work(bench, &target, order, hung)?;
    crate::user_install::command_for(
        &install::Pending::load(&order.state_dir)?.map_or(target, |p| p.after),
        &mut report,
    )?;
    Ok(report)
}
