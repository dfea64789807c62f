//! One file per fault.

pub mod config_truncated;
pub mod database_deleted;
pub mod killed;
pub mod program_file;
pub mod program_tree;
pub mod spinning;
pub mod stopped;

use crate::Target;
use host::{Error, Kind, Result};
use rustix::process::Signal;

/// Sends `signal` to the gateway that holds the node's lock; never to anybody else.
fn signal_gateway(target: &Target<'_>, signal: Signal) -> Result<()> {
    let lock = target.node.lock().ok_or_else(|| {
        Error::new(Kind::NotFound, "signal the gateway", "no live process holds the node's lock")
    })?;
    if lock.id.signal(signal)? {
        Ok(())
    } else {
        Err(Error::new(Kind::NotFound, "signal the gateway", "it was gone before the signal arrived"))
    }
}

/// Cuts a file to `keep` bytes, as a writer that died in the middle leaves it.
fn truncate(path: &std::path::Path, keep: u64) -> Result<()> {
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .map_err(|e| Error::io(format!("open {} to truncate it", path.display()), &e))?;
    file.set_len(keep).map_err(|e| Error::io(format!("truncate {}", path.display()), &e))
}
