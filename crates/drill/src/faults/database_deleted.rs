//! The state database is deleted under the gateway. It serves on from its open file descriptors; after the next
//! start it would answer every probe with an empty database: identity, pairings and cron jobs gone.

use crate::{Fault, Target};
use engine::Layer;
use host::{Error, Result};

/// `openclaw.sqlite` with its `-wal` and `-shm`.
pub const FAULT: Fault = Fault {
    name: "database",
    about: "the state database deleted",
    healed_by: &[Layer::Restore],
    inject: delete,
};

fn delete(target: &Target<'_>) -> Result<()> {
    let dir = target.node.state_dir.join("state");
    for name in ["openclaw.sqlite", "openclaw.sqlite-wal", "openclaw.sqlite-shm"] {
        let path = dir.join(name);
        match std::fs::remove_file(&path) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && name != "openclaw.sqlite" => {}
            Err(e) => return Err(Error::io(format!("delete {}", path.display()), &e)),
        }
    }
    Ok(())
}
