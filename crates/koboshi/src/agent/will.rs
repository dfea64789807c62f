//! The owner's will: paused, stopped. A small file, so that it holds with and without a running agent.

use crate::places::Places;
use host::{Error, Kind, Result, files};
use serde::{Deserialize, Serialize};

/// The file is a few dozen bytes.
const MAX_BYTES: u64 = 64 << 10;

/// What the owner wants.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Will {
    /// Hands off until this second of the wall clock.
    pub paused_until_s: Option<i64>,
    /// The gateway is to stay down: `koboshi node stop`.
    pub stopped: bool,
    /// The stop was not asked for at koboshi but obeyed after two bare stops of the unit: it ends when the node serves.
    pub by_stops: bool,
}

impl Will {
    /// What is written down; nothing written is no wish.
    pub fn load(places: &Places) -> Result<Will> {
        match files::read_bounded(&places.will(), MAX_BYTES) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| {
                Error::new(Kind::Corrupt, format!("read {}", places.will().display()), e)
                    .hint("koboshi pause, resume, node start or node stop write it anew")
            }),
            Err(e) if e.kind == Kind::NotFound => Ok(Will::default()),
            Err(e) => Err(e),
        }
    }

    /// Writes it down.
    pub fn save(&self, places: &Places) -> Result<()> {
        files::make_private_dir(&places.state_dir)?;
        let text =
            serde_json::to_vec(self).map_err(|e| Error::new(Kind::System, "write the owner's will", e))?;
        files::write_atomic(&places.will(), &text, 0o600)
    }

    /// Whether it is paused now.
    pub fn paused(&self, now_s: i64) -> bool {
        self.paused_until_s.is_some_and(|until| now_s < until)
    }
}
