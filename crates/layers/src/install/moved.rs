//! A node that runs from elsewhere than its home: what it was, and what it is meanwhile.

use host::{Error, Kind, Result, files};
use node::Node;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

const MAX_BYTES: u64 = 1 << 20;

/// Where the node came from and where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// As it was before koboshi moved it.
    pub home: Node,
    /// As it runs now.
    pub away: Node,
    /// It moved home and is on trial there: where it goes back to if it does not serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub back_to: Option<Node>,
    /// It is home, and this is where it was meanwhile: given up once a trusted snapshot holds it at home.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<Node>,
}

fn file(state_dir: &Path) -> PathBuf {
    state_dir.join("moved.json")
}

impl Moved {
    /// The note, if the node is away.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn load(state_dir: &Path) -> Result<Option<Moved>> {
        match files::read_bounded(&file(state_dir), MAX_BYTES) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|e| Error::new(Kind::Corrupt, format!("read {}", file(state_dir).display()), e)),
            Err(e) if e.kind == Kind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The node is where it is, and nothing is left to be done about it.
    pub(super) fn at(home: Node, away: Node) -> Moved {
        Moved { home, away, back_to: None, left: None }
    }

    /// Whether the program lies elsewhere, and not only its runtime.
    #[must_use]
    pub fn displaced(&self) -> bool {
        self.home.package_dir != self.away.package_dir
    }

    pub(super) fn save(&self, state_dir: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::new(Kind::System, "note where the node is", e))?;
        files::write_atomic(&file(state_dir), &text, 0o600)
    }
}

/// The node as it will be in its user's own prefix. The runtime stays the node's own as long as that is any good.
#[must_use]
pub fn away(node: &Node) -> Node {
    let prefix = node.home.join(".local/share/koboshi/prefix");
    let package_dir = prefix.join("lib/node_modules/openclaw");
    Node { entry: package_dir.join("dist/index.js"), package_dir, prefix, ..node.clone() }
}

/// The same with a runtime of koboshi's own in its prefix.
pub(super) fn with_own_runtime(node: &Node) -> Node {
    let dir = node.runtime_dir.clone().unwrap_or_else(|| node.prefix.join("lib/koboshi-node"));
    Node { node_bin: dir.join("bin/node"), runtime_dir: Some(dir), ..node.clone() }
}
