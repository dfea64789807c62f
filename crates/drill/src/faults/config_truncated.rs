//! The config loses its second half, as a full disk or a killed editor leaves it.

use crate::{Fault, Target};
use engine::Layer;
use host::{Error, Result};
use rustix::process::Signal;

/// Put right while the node serves, once nobody has edited it for a minute.
pub const ALONE: Fault =
    Fault { name: "config", about: "the config truncated", healed_by: &[Layer::InPlace], inject: halve };

/// The same, and the gateway is killed: it cannot start again with what is there.
pub const KILLED: Fault = Fault {
    name: "config-killed",
    about: "the config truncated, then SIGKILL",
    healed_by: &[Layer::Restore],
    inject: |target| {
        halve(target)?;
        super::signal_gateway(target, Signal::KILL)
    },
};

fn halve(target: &Target<'_>) -> Result<()> {
    let path = &target.node.config_path;
    let len = std::fs::metadata(path).map_err(|e| Error::io(format!("stat {}", path.display()), &e))?.len();
    super::truncate(path, len / 2)
}
