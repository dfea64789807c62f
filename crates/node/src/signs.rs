//! What a start or an upgrade of the gateway touches first, whoever begins it. Whoever holds the gateway's port in its
//! absence watches these and lets go.

use crate::{Node, lock};
use std::path::PathBuf;

/// Paths to watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signs {
    /// Files, and directories of files, that a starting gateway opens.
    pub opened: Vec<PathBuf>,
    /// Directories in which a start or an upgrade makes, writes or moves something.
    pub changed: Vec<PathBuf>,
}

/// The signs of this node. Nothing that a look at the disk opens is among what tells by being opened.
#[must_use]
pub fn signs(node: &Node) -> Signs {
    let lock = lock::path(&node.state_dir, node.ids.uid);
    let mut changed: Vec<PathBuf> = lock.parent().map(PathBuf::from).into_iter().collect();
    // An upgrade renames the package away and stages the new one beside it.
    changed.extend(node.package_dir.parent().map(PathBuf::from));
    Signs { opened: vec![node.package_dir.join("dist"), node.package_dir.join("openclaw.mjs")], changed }
}
