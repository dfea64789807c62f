//! Layers 2 and 3 as the agent sees them: which version, who may, and why not.
//!
//! Every gate costs milliseconds: nothing here asks the network or starts a program. What only an attempt can show (a
//! dead registry, a package that is none) the attempt finds out within its own limits.

use crate::places::Places;
use engine::{Class, Finding, Layer};
use layers::install::{self, Order, Place};
use node::gates::{self, Gate};
use node::{Baseline, Node, Scope};

/// npm, its tree, its cache and the stage.
const SPACE_BYTES: u64 = 1_900 << 20;
/// Below this npm would push out what still works.
const MEMORY_BYTES: u64 = 900 << 20;

/// The last good version: what the newest trusted snapshot holds, else what last served, else what was found. Never
/// what the broken disk says now, and never a tag.
pub fn version(node: &Node, baseline: Option<&Baseline>, snapshot: Option<&str>) -> Option<String> {
    let known = [snapshot, baseline.and_then(|b| b.version.as_deref()), node.version.as_deref()];
    known.into_iter().flatten().find(|v| is_full(v)).map(str::to_owned)
}

/// A full version, as the registry names it: three numbers, perhaps a pre-release, and nothing else.
fn is_full(version: &str) -> bool {
    let core = version.split(['-', '+']).next().unwrap_or_default();
    let sane = version.len() <= 64
        && version.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'+'));
    sane && core.split('.').count() == 3 && core.split('.').all(|n| n.parse::<u32>().is_ok())
}

/// What sudo said when it was last asked, if it was.
pub type Asked<'a> = Option<&'a Result<(), String>>;

/// What the gates look at.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// The pinned version, if there is one.
    pub version: Option<&'a str>,
    /// The newest trusted snapshot, if there is one: only with it a program is known to be whole.
    pub snapshot: Option<&'a str>,
    /// What the disk says.
    pub findings: &'a [Finding],
}

/// Whether layer 2 can do anything here.
///
/// # Errors
/// The reason, to be recorded.
pub fn system(node: &Node, places: &Places, seen: Seen<'_>, sudo: Asked<'_>) -> Result<(), String> {
    common(node, seen)?;
    if crate::sudo::needed(node, places) {
        return match sudo {
            Some(answer) => answer.clone(),
            None => Err("the prefix is not ours, and sudo has not been asked yet".to_owned()),
        };
    }
    Place::of(node, &order(places, "", Layer::SystemInstall)).map(|_| ()).map_err(|e| e.why)
}

/// Whether layer 3 can do anything here.
///
/// # Errors
/// The reason, to be recorded.
pub fn user(node: &Node, places: &Places, seen: Seen<'_>) -> Result<(), String> {
    if node.unit.as_ref().is_some_and(|u| u.scope == Scope::System) {
        return Err(
            "its unit is the system's: a second gateway beside it would be worse than none".to_owned()
        );
    }
    common(node, seen)?;
    let away = install::away(node);
    Place::of(&away, &order(places, "", Layer::UserInstall)).map(|_| ()).map_err(|e| e.why)
}

fn common(node: &Node, seen: Seen<'_>) -> Result<(), String> {
    if seen.version.is_none() {
        return Err("no version is known to have served".to_owned());
    }
    let made = |class: Option<Class>| matches!(class, Some(Class::Program | Class::Runtime | Class::Service));
    if seen.snapshot.is_some() && !seen.findings.iter().any(|f| made(f.class)) {
        return Err("program, runtime and service files are whole: there is nothing to install".to_owned());
    }
    if let Some(available) = host::pressure::available_bytes()
        && available < MEMORY_BYTES
    {
        return Err(format!(
            "{} MB of memory are available, {} MB are needed",
            available >> 20,
            MEMORY_BYTES >> 20
        ));
    }
    // npm runs as the node's user.
    match gates::space_for(&node.prefix, SPACE_BYTES, node.ids.uid) {
        Gate::Open => Ok(()),
        Gate::Closed(why) => Err(why),
    }
}

/// The order for one of the layers.
pub fn order(places: &Places, version: &str, layer: Layer) -> Order {
    Order {
        version: version.to_owned(),
        integrity: None,
        state_dir: places.state_dir.clone(),
        scratch: None,
        npm_limit: install::NPM_LIMIT,
        layer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_full_version_is_ever_pinned() {
        for good in ["2026.9.6", "2026.9.6-beta.1", "0.0.1"] {
            assert!(is_full(good), "{good}");
        }
        for bad in [
            "latest",
            "",
            "2026",
            "2026.9",
            "2026.9.x",
            "^2026.9.6",
            "2026.9.6 || 1",
            "1.2.3/../x",
            "1.2.3\n",
        ] {
            assert!(!is_full(bad), "{bad}");
        }
    }
}
