//! A file of the program loses its second half. The gateway has it in memory and serves on; the next start dies.

use crate::{Fault, Target};
use engine::Layer;
use host::{Error, Result};
use rustix::process::Signal;

/// Found on disk and put right while the node serves.
pub const ALONE: Fault = Fault {
    name: "program-file",
    about: "a program file truncated",
    healed_by: &[Layer::InPlace],
    inject: halve,
};

/// The same, and the gateway is killed before anybody could repair it.
pub const KILLED: Fault = Fault {
    name: "program-file-killed",
    about: "a program file truncated, then SIGKILL",
    healed_by: &[Layer::Restore],
    inject: |target| {
        halve(target)?;
        super::signal_gateway(target, Signal::KILL)
    },
};

fn halve(target: &Target<'_>) -> Result<()> {
    let path = &target.node.entry;
    let len = std::fs::metadata(path).map_err(|e| Error::io(format!("stat {}", path.display()), &e))?.len();
    super::truncate(path, len / 2)
}
