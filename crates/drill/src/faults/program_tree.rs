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

/// The same, and the gateway is killed at the same moment.
pub const KILLED: Fault = Fault {
    name: "program-tree-killed",
    about: "the whole program tree deleted, then SIGKILL",
    healed_by: &[Layer::Restore],
    inject: |target| {
        super::signal_gateway(target, Signal::KILL)?;
        delete(target)
    },
};

/// Gone at once by a rename, then deleted for real: 38,000 files take seconds to delete, and a repair that begins
/// meanwhile would be shown half a fault.
fn delete(target: &Target<'_>) -> Result<()> {
    let dir = &target.node.package_dir;
    let doomed = target.fault_file.with_file_name(format!("deleted-{}", host::clock::now().ms));
    std::fs::rename(dir, &doomed).map_err(|e| Error::io(format!("move {} away", dir.display()), &e))?;
    std::fs::remove_dir_all(&doomed).map_err(|e| Error::io(format!("delete {}", doomed.display()), &e))
}
