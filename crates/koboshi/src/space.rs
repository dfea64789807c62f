//! How much disk koboshi may use: store, spare and quarantine together.

use crate::config::Config;
use crate::places::Places;
use host::{Result, files};

/// The most it takes by default.
const MOST_BYTES: u64 = 4_000_000_000;
/// And never more than this share of what is free, in percent.
const SHARE_PERCENT: u64 = 20;

/// The limit in force, in bytes: the configured one, else the lesser of 4 GB and a fifth of what is free or ours.
pub fn limit_bytes(config: &Config, places: &Places) -> Result<u64> {
    if config.store.limit_bytes > 0 {
        return Ok(config.store.limit_bytes);
    }
    let space = files::free(existing(&places.state_dir))?;
    let ours = files::tree_size(&places.state_dir, 1_000_000).map_or(0, |s| s.disk_bytes);
    // What is kept back for root is not ours to plan with.
    Ok(MOST_BYTES.min((space.user_bytes + ours) / 100 * SHARE_PERCENT))
}

/// The nearest directory above that exists.
fn existing(path: &std::path::Path) -> &std::path::Path {
    path.ancestors().find(|p| p.is_dir()).unwrap_or(std::path::Path::new("/"))
}
