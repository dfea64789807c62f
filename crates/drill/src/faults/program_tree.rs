//! The whole package directory is deleted, as a killed `npm install -g` or a careless `rm` does.

use crate::{Fault, Target};
use engine::Layer;
use host::{Error, Result};
use rustix::process::Signal;

/// Found on disk and put back while the node serves.
pub const ALONE: Fault = Fault {
    name: "program-tree",
    about: "the whole program tree deleted",
    healed_by: &[Layer::InPlace],
    inject: delete,
};

/// The same, and the gateway is killed before anybody could repair it.
pub const KILLED: Fault = Fault {
    name: "program-tree-killed",
    about: "the whole program tree deleted, then SIGKILL",
    healed_by: &[Layer::Restore],
    inject: |target| {
        // Killed first: deleting 38,000 files takes seconds, in which the agent would already repair.
        super::signal_gateway(target, Signal::STOP)?;
        delete(target)?;
        super::signal_gateway(target, Signal::KILL)
    },
};

fn delete(target: &Target<'_>) -> Result<()> {
    let dir = &target.node.package_dir;
    std::fs::remove_dir_all(dir).map_err(|e| Error::io(format!("delete {}", dir.display()), &e))
}
