//! What killed repairs left lying about: half-made pieces, or the old ones that were exchanged already.
//!
//! They bear a name that begins with our prefix and this store's key, so a user's file is never one. While any repair
//! from this store is at work nothing is touched: whoever holds the repair's lock may be the writer; when nobody does,
//! every writer is dead. They go to the quarantine like everything else, because an old one may hold a user's bytes.

use crate::Root;
use crate::content::late;
use crate::layout::Layout;
use crate::quarantine::Quarantine;
use crate::repair::{aside, own_prefix};
use crate::snapshot::open_base;
use crate::walk::{Filter, Walk};
use host::clock::Deadline;
use host::{Kind, Result};
use std::path::Path;
use std::time::Duration;

/// Looks at the clock once in so many steps.
const CLOCK_EVERY: u64 = 4_096;

/// How many of these are ours.
pub(crate) fn count(layout: &Layout, paths: &[Vec<u8>]) -> u64 {
    let ours = own_prefix(layout);
    let last = |p: &[u8]| p.rsplit(|b| *b == b'/').next().is_some_and(|name| name.starts_with(&ours));
    paths.iter().filter(|p| last(p)).count() as u64
}

pub(crate) fn collect(layout: &Layout, roots: &[Root], quarantine: &Path, deadline: Deadline) -> Result<u64> {
    let _alone = match layout.repair_lock(Deadline::after(Duration::ZERO)) {
        Ok(held) => held,
        Err(e) if e.kind == Kind::TimedOut => return Ok(0),
        Err(e) => return Err(e),
    };
    let mut to = Quarantine::new(quarantine);
    for root in roots {
        let Some(base) = open_base(root)? else { continue };
        let mut walk = Walk::new(&base, Filter::of(root), false)?;
        let mut steps = 0u64;
        while walk.next()?.is_some() {
            steps += 1;
            if steps.is_multiple_of(CLOCK_EVERY) && deadline.passed() {
                return Err(late("looking for what killed repairs left"));
            }
        }
        aside(layout, &base, &root.name, &walk.leftovers, &mut to)?;
    }
    to.sync()?;
    Ok(to.moved)
}
