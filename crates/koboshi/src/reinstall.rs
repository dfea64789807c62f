//! Layers 2 and 3 as the agent sees them: which version, who may, and why not.
//!
//! Every gate costs milliseconds: nothing here asks the network or starts a program. What only an attempt can show (a
//! dead registry, a package that is none) the attempt finds out within its own limits.

use crate::places::Places;
use engine::{Class, FaultKind, Finding, Layer};
use layers::install::{self, Order, Place};
use node::gates::{self, Gate};
use node::range::Version;
use node::{Baseline, Node, Scope};

/// npm, its tree, its cache and the stage.
const SPACE_BYTES: u64 = 1_900 << 20;
/// Below this npm would push out what still works.
const MEMORY_BYTES: u64 = 900 << 20;

/// The last good version: what the newest trusted snapshot holds, else what last served, else what was found. Never
/// what the broken disk says now, and never a tag.
pub fn version(node: &Node, baseline: Option<&Baseline>, snapshot: Option<&str>) -> Option<String> {
    known(node, baseline, snapshot).next().map(str::to_owned)
}

/// The same where a newer program than the one that lies there wrote the data: the newest of them. It served, perhaps for
/// moments only, and no older one may open the data again.
pub fn newest_known(node: &Node, baseline: Option<&Baseline>, snapshot: Option<&str>) -> Option<String> {
    known(node, baseline, snapshot).max_by_key(|v| Version::parse(v)).map(str::to_owned)
}

fn known<'a>(
    node: &'a Node,
    baseline: Option<&'a Baseline>,
    snapshot: Option<&'a str>,
) -> impl Iterator<Item = &'a str> {
    let known = [snapshot, baseline.and_then(|b| b.version.as_deref()), node.version.as_deref()];
    known.into_iter().flatten().filter(|v| is_full(v))
}

/// The version to install in this climb of an incident, the first being 1. Where even the newest that ever served here is
/// the one that lies there and cannot open the data, later climbs ask for the registry's newest: nothing else is left, and
/// the data has been migrated already.
pub fn to_install(
    node: &Node,
    baseline: Option<&Baseline>,
    snapshot: Option<&str>,
    findings: &[Finding],
    climb: u32,
) -> Option<String> {
    if !findings.iter().any(|f| f.kind == FaultKind::SchemaNewer) {
        return version(node, baseline, snapshot);
    }
    let newest = newest_known(node, baseline, snapshot)?;
    let lies_there = node.package_version().as_ref() == Some(&newest);
    Some(if climb > 1 && lies_there { install::NEWEST.to_owned() } else { newest })
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
    // A whole program that cannot open the data is no reason to leave things as they are.
    let made = |f: &Finding| {
        f.kind == FaultKind::SchemaNewer
            || matches!(f.class, Some(Class::Program | Class::Runtime | Class::Service))
    };
    if seen.snapshot.is_some() && !seen.findings.iter().any(made) {
        return Err("program, runtime and service files are whole: there is nothing to install".to_owned());
    }
    // Made anew it would be refused for the same reason, minutes later.
    if let Some(newer) = seen.findings.iter().find(|f| f.kind == FaultKind::SchemaNewer)
        && node.package_version().as_deref() == seen.version
    {
        return Err(format!("no newer version is known to have served here, and {}", newer.what));
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

    #[test]
    fn data_of_a_newer_program_asks_for_the_newest_known_and_then_for_the_newest_there_is() {
        let dir = tempfile::tempdir().unwrap();
        let lies = |version: &str| {
            std::fs::write(
                dir.path().join("package.json"),
                format!(r#"{{"name":"openclaw","version":"{version}"}}"#),
            )
            .unwrap();
        };
        let node: Node = serde_json::from_value(serde_json::json!({
            "name": "t", "prefix": dir.path(), "package_dir": dir.path(), "entry": "/e", "node_bin": "/n",
            "home": dir.path(), "state_dir": dir.path(), "config_path": "/c", "port": 1, "version": "2026.9.6",
            "ids": host::run::Ids::current(), "user": "t"
        }))
        .unwrap();
        let served = Baseline { version: Some("2026.10.2".into()), ..Baseline::default() };
        let newer = [Finding {
            kind: FaultKind::SchemaNewer,
            class: None,
            what: "newer".into(),
            evidence: Vec::new(),
        }];
        let to = |findings: &[Finding], climb| {
            to_install(&node, Some(&served), Some("2026.9.6"), findings, climb).unwrap()
        };
        lies("2026.9.6");
        assert_eq!((to(&[], 1), to(&[], 2)), ("2026.9.6".into(), "2026.9.6".into()));
        assert_eq!((to(&newer, 1), to(&newer, 2)), ("2026.10.2".into(), "2026.10.2".into()));
        lies("2026.10.2");
        assert_eq!((to(&newer, 1), to(&newer, 2)), ("2026.10.2".into(), "latest".into()));
        assert_eq!(to(&[], 2), "2026.9.6", "only for the data's sake");

        let asks = |version: &str, findings: &[Finding]| {
            common(&node, Seen { version: Some(version), snapshot: Some("1"), findings })
                .err()
                .unwrap_or_default()
        };
        assert!(asks("2026.10.2", &newer).contains("no newer version is known"), "it lies there already");
        assert!(asks("2026.9.6", &[]).contains("nothing to install"));
        for version in [install::NEWEST, "2026.10.3"] {
            let why = asks(version, &newer);
            assert!(
                !why.contains("no newer version") && !why.contains("nothing to install"),
                "{version}: {why}"
            );
        }
    }
}
