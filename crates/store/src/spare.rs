//! The spare: a ready tree of a converging root beside the node's own, swapped in by one rename.
//!
//! It is an ordinary repair of the same manifest to another place, so it is proven like one, and the quick look
//! knows it by an index of its own.

use crate::compare::{self, Ids};
use crate::layout::{Head, Layout, RootRef};
use crate::repair::{self, spare_reference};
use crate::snapshot::open_base;
use crate::{Depth, Plan, Scope, Spare};
use host::clock::Deadline;
use host::{Error, Kind, Result};
use std::path::Path;

fn reference(head: &Head, root: &str, path: &Path) -> Result<RootRef> {
    let found = head.trees.iter().find(|t| t.root.name == root && t.root.class.converges());
    found.map(|r| spare_reference(r, path)).ok_or_else(|| {
        Error::new(
            Kind::NotFound,
            format!("making a spare of `{root}`"),
            format!("snapshot {} holds no such converging root", head.info.id),
        )
    })
}

pub(crate) fn check(
    layout: &Layout,
    head: &Head,
    root: &str,
    path: &Path,
    deadline: Deadline,
) -> Result<Spare> {
    let spare = reference(head, root, path)?;
    let base = open_base(&spare.root)?;
    let looked = compare::root(layout, &spare, base.as_ref(), &Ids::default(), Depth::Stat, deadline)?;
    Ok(Spare {
        path: path.to_owned(),
        files: spare.files,
        bytes: spare.bytes,
        ready: looked.differences.is_empty() && spare.entries > 0,
    })
}

pub(crate) fn make(
    layout: &Layout,
    head: &Head,
    root: &str,
    path: &Path,
    deadline: Deadline,
) -> Result<Spare> {
    let mut only = head.clone();
    only.trees = vec![reference(head, root, path)?];
    let class = only.trees[0].root.class;
    // What a spare loses was never the node's, but nothing is deleted here either.
    let mut aside = path.as_os_str().to_owned();
    aside.push(".replaced");
    let plan = Plan { quarantine: aside.into(), ..Plan::default() };
    repair::run(layout, &only, Scope::Classes(&[class]), &plan, deadline)?;
    check(layout, head, root, path, deadline)
}
