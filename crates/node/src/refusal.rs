//! What the program itself says of a config, before a gateway has to die of it.
//!
//! An unknown key or a wrong type shows in no file and no log until the next start ends with exit code 78. The
//! program's own `config validate` knows its schema. It is asked in an environment that has no home and no state
//! directory, so that it can neither write nor meet the living gateway's databases (commands beside a live gateway
//! have corrupted them in released versions), as the node's user, for seconds at most. Its exit code is not looked
//! at. Plugins in the node's own state directory are unknown to it there: what it also refuses in the config that is
//! known to have served is therefore no refusal.

use crate::{Baseline, Node, config};
use host::clock::Deadline;
use host::run::{Cmd, Ids, run};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

/// It takes 1.1 s of processor time; a busy machine makes 5 s of that.
const LIMIT: Duration = Duration::from_secs(12);
/// Things refused that are kept; a config of nothing but nonsense is refused by its first ones.
const MOST: usize = 64;
/// A home that cannot exist and that not even root can make.
const NOWHERE: &str = "/proc/koboshi-none";

/// One thing the program refuses in a config.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Refusal {
    /// Where, as dotted keys; empty for the whole.
    pub path: String,
    /// The program's words.
    pub message: String,
}

impl Refusal {
    /// For people.
    #[must_use]
    pub fn words(&self) -> String {
        let place = if self.path.is_empty() { "the config" } else { &self.path };
        format!("{place}: {}", self.message)
    }

    /// The keys under `path` that the program does not know, where that is what it says.
    #[must_use]
    pub fn unknown_keys(&self) -> Vec<String> {
        let lower = self.message.to_ascii_lowercase();
        if !lower.starts_with("unrecognized key") {
            return Vec::new();
        }
        self.message.split('"').skip(1).step_by(2).map(str::to_owned).collect()
    }
}

/// What the program said of one config, so that it is asked once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// The config ([`config::fingerprint`]).
    pub config: String,
    /// The program's version.
    pub version: Option<String>,
    /// What it refuses; empty when it takes all of it.
    pub refused: Vec<Refusal>,
}

/// Asks the program about the config at `path`.
///
/// # Errors
/// In words, when it cannot be asked: the program is broken, says nothing that is understood, or not in time. That
/// is no word about the config.
pub fn ask(node: &Node, path: &Path, deadline: Deadline) -> Result<Vec<Refusal>, String> {
    let own = Ids::current();
    let mut env: Vec<(OsString, OsString)> = config::variables(node)
        .into_iter()
        .filter(|(name, _)| !name.starts_with("OPENCLAW_") && !name.starts_with("NODE_"))
        .map(|(name, value)| (name.into(), value.into()))
        .collect();
    let bin = node.node_bin.parent().unwrap_or(Path::new("/usr/bin"));
    let set = [
        ("PATH", format!("{}:/usr/local/bin:/usr/bin:/bin", bin.display()).into()),
        ("HOME", NOWHERE.into()),
        ("OPENCLAW_STATE_DIR", format!("{NOWHERE}/state").into()),
        ("OPENCLAW_CONFIG_PATH", path.as_os_str().to_owned()),
        ("OPENCLAW_NO_AUTO_UPDATE", "1".into()),
        ("OPENCLAW_NO_RESPAWN", "1".into()),
        ("NO_COLOR", OsString::from("1")),
    ];
    env.retain(|(name, _)| set.iter().all(|(mine, _)| name != mine));
    env.extend(set.map(|(name, value)| (name.into(), value)));
    let cmd = Cmd {
        program: node.node_bin.as_os_str().to_owned(),
        args: vec![
            node.package_dir.join("openclaw.mjs").into(),
            "config".into(),
            "validate".into(),
            "--json".into(),
        ],
        env,
        env_clear: true,
        cwd: Some("/".into()),
        ids: (own != node.ids).then_some(node.ids),
        ..Cmd::default()
    };
    let out = run(&cmd, deadline.min(Deadline::after(LIMIT)))
        .map_err(|e| format!("the program cannot be asked about its config: {}", e.why))?;
    understand(&out.stdout).ok_or_else(|| "the program says nothing about its config".to_owned())
}

/// What is known of the config that lies there now, from memory or by asking. `None` when it cannot be told.
#[must_use]
pub fn current(node: &Node, baseline: &Baseline, deadline: Deadline) -> Option<Checked> {
    let value = config::load(node).ok()?.value;
    let (config, version) = (config::fingerprint(&value), node.package_version());
    let known = baseline.checked.iter().find(|c| c.config == config && c.version == version);
    if let Some(known) = known {
        return Some(known.clone());
    }
    if baseline.config.as_ref() == Some(&config) && !own_plugins(node, &value) {
        // The node served with it. Only where the program could be wrong about it is that worth knowing.
        return Some(Checked { config, version, refused: Vec::new() });
    }
    let refused = ask(node, &node.config_path, deadline).ok()?;
    Some(Checked { config, version, refused })
}

/// Of what the program refuses now, what it did not refuse in the config with which the node served. Nothing while no
/// such config is known: a node that serves is not told that its config is wrong by a program that may lack a plugin.
#[must_use]
pub fn news(node: &Node, baseline: &Baseline, checked: &Checked) -> Vec<Refusal> {
    let Some(served) = &baseline.config else { return Vec::new() };
    if *served == checked.config {
        return Vec::new();
    }
    let before = baseline.checked.iter().find(|c| c.config == *served).map(|c| c.refused.as_slice());
    let plugins = config::load(node).is_ok_and(|l| own_plugins(node, &l.value));
    let of_plugins = |r: &Refusal| {
        plugins && ["channels", "plugins"].iter().any(|top| r.path.split('.').next() == Some(*top))
    };
    let mut new = checked.refused.clone();
    new.retain(|r| !before.unwrap_or_default().contains(r) && !of_plugins(r));
    new
}

/// Whether the node has plugins of its own, whose channels and settings the program knows only with them.
fn own_plugins(node: &Node, config: &Value) -> bool {
    config.pointer("/plugins/load").is_some()
        || std::fs::read_dir(node.state_dir.join("extensions")).is_ok_and(|mut d| d.next().is_some())
}

/// `None` when it is not an answer to this question.
fn understand(stdout: &[u8]) -> Option<Vec<Refusal>> {
    let text = String::from_utf8_lossy(stdout);
    let object: Value = serde_json::from_str(text.get(text.find('{')?..)?.trim()).ok()?;
    if object.get("valid")?.as_bool()? {
        return Some(Vec::new());
    }
    let issues = object.get("issues").and_then(Value::as_array)?;
    let refused: Vec<Refusal> = issues
        .iter()
        .take(MOST)
        .filter_map(|issue| {
            let path = issue.get("path").and_then(Value::as_str).unwrap_or_default();
            let message = issue.get("message").and_then(Value::as_str)?;
            let path = if path == "<root>" { "" } else { path };
            Some(Refusal { path: path.to_owned(), message: message.chars().take(300).collect() })
        })
        .collect();
    // Refused without a reason is an answer that is not understood.
    (!refused.is_empty()).then_some(refused)
}

/// The way to `path` in `value`: a key may hold dots itself, so the keys that are there decide. The last one need not
/// exist.
#[must_use]
pub fn way(value: &Value, path: &str) -> Option<Vec<String>> {
    if path.is_empty() {
        return Some(Vec::new());
    }
    let parts: Vec<&str> = path.split('.').collect();
    for taken in (1..=parts.len()).rev() {
        let (head, rest) = parts.split_at(taken);
        let key = head.join(".");
        let below = match value {
            Value::Object(map) => map.get(&key),
            Value::Array(list) => key.parse::<usize>().ok().and_then(|n| list.get(n)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
        };
        match below {
            Some(below) => {
                if let Some(mut more) = way(below, &rest.join(".")) {
                    more.insert(0, key);
                    return Some(more);
                }
            }
            None if rest.is_empty() && taken == 1 => return Some(vec![key]),
            None => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_programs_answers_are_understood_and_nothing_else_is() {
        assert_eq!(understand(br#"{"valid":true,"path":"x","warnings":[]}"#), Some(Vec::new()));
        let bad = br#"some banner
{"ok":false,"valid":false,"issues":[{"path":"gateway","message":"Unrecognized key: \"bogusKey\""},
 {"path":"<root>","message":"Unrecognized keys: \"a\", \"b.c\""}]}"#;
        let refused = understand(bad).unwrap();
        assert_eq!(refused[0].unknown_keys(), ["bogusKey"]);
        assert_eq!(refused[0].path, "gateway");
        assert_eq!(refused[1].unknown_keys(), ["a", "b.c"]);
        assert_eq!(refused[1].path, "");
        for noise in [
            &b""[..],
            b"Segmentation fault",
            b"{\"valid\":false}",
            b"{\"valid\":false,\"issues\":[]}",
            b"{\"ok\":true}",
        ] {
            assert_eq!(understand(noise), None, "{}", String::from_utf8_lossy(noise));
        }
        let typed =
            Refusal { path: "gateway.port".into(), message: "expected number, received \"x\"".into() };
        assert!(typed.unknown_keys().is_empty());
    }

    #[test]
    fn a_way_leads_through_keys_that_hold_dots_and_through_lists() {
        let value = json!({"a": {"b.c": {"d": 1}}, "l": [{"x": 1}, {"y": 2}]});
        assert_eq!(way(&value, "a.b.c.d").unwrap(), ["a", "b.c", "d"]);
        assert_eq!(way(&value, "l.1.y").unwrap(), ["l", "1", "y"]);
        assert_eq!(way(&value, "a.new").unwrap(), ["a", "new"]);
        assert_eq!(way(&value, "").unwrap(), Vec::<String>::new());
        assert_eq!(way(&value, "no.such.place"), None);
    }
}
