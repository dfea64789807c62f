//! Files that a later snapshot no longer holds: read off the two lists, so that it costs no look at the live trees.

use crate::layout::{Head, Layout};
use crate::snapshot::to_path;
use crate::tree::{EntryKind, compare_paths};
use engine::words::Class;
use host::Result;
use host::clock::Deadline;
use std::cmp::Ordering;
use std::path::PathBuf;
use std::time::Duration;

/// Names kept of one comparison; somebody reads them.
const MAX_GONE: usize = 32;
/// Looks at the clock once in so many entries.
const CLOCK_EVERY: u64 = 4096;

/// Files of `classes` in the snapshot `then` that `now` no longer has, where they lay; only those that had not been written
/// for `still` when `then` was taken: what comes and goes is nobody's news. A root that was carried over or is missing as
/// a whole tells nothing here.
pub(crate) fn files(
    layout: &Layout,
    then: &str,
    now: &str,
    classes: &[Class],
    still: Duration,
    deadline: Deadline,
) -> Result<Vec<PathBuf>> {
    let _reading = layout.read_lock();
    let (then, now): (Head, Head) = (layout.head(then)?, layout.head(now)?);
    let mut gone = Vec::new();
    for before in then.trees.iter().filter(|t| classes.contains(&t.root.class)) {
        let Some(after) = now.trees.iter().find(|t| t.root == before.root && t.tree != before.tree) else {
            continue;
        };
        let taken_ns = before.taken.as_nanosecond();
        let still_ns = i128::try_from(still.as_nanos()).unwrap_or(i128::MAX);
        let (mut old, mut new) = (layout.tree(before)?, layout.tree(after)?);
        let mut count = 0_u64;
        while let Some(entry) = old.next()? {
            count += 1;
            if count.is_multiple_of(CLOCK_EVERY) && deadline.passed() {
                return Err(crate::content::late("comparing two snapshots"));
            }
            let there = loop {
                match new.peek()?.map(|e| compare_paths(&e.path, &entry.path)) {
                    Some(Ordering::Less) => {
                        new.next()?;
                    }
                    Some(Ordering::Equal) => break true,
                    Some(Ordering::Greater) | None => break false,
                }
            };
            let old_enough = taken_ns - i128::from(entry.mtime_ns) >= still_ns;
            if !there && entry.kind == EntryKind::File && entry.size > 0 && old_enough {
                gone.push(before.root.path.join(to_path(&entry.path)));
                if gone.len() >= MAX_GONE {
                    return Ok(gone);
                }
            }
        }
    }
    Ok(gone)
}
