//! Puts a config right leaf by leaf: only what the program refuses goes back to how it was (or goes away where it was
//! not), and everything else that its owner wrote stays.
//!
//! A config that is put back whole undoes every intended change since the snapshot; one unknown key is no reason for
//! that. What comes out is offered to the program before it takes the live file's place, and a mend that would change
//! who may come in is none. The live file goes to the quarantine as it was.

use crate::beside::Beside;
use crate::{Bench, Report};
use engine::Class;
use host::{Context, Error, Kind, Result};
use node::config;
use node::refusal::{self, Refusal};
use rustix::fs::{Mode, OFlags};
use serde_json::Value;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Refusals uncover others behind them; a config that needs more rounds than this is not mended by leaves.
const MOST_ROUNDS: usize = 3;

/// Mends the live config. `false` when that is not possible and a whole config is needed.
pub(crate) fn config(bench: &Bench<'_>, report: &mut Report) -> Result<bool> {
    let node = bench.node;
    let Ok(loaded) = config::load(node) else { return Ok(false) };
    // What comes from an include is not this file's to change.
    let [path] = loaded.files.as_slice() else { return Ok(false) };
    if path.symlink_metadata().is_ok_and(|m| m.is_symlink()) {
        return Ok(false);
    }
    let Some(live) = plain(path) else { return Ok(false) };
    let baseline = bench.baseline.cloned().unwrap_or_default();
    let Ok(all) = refusal::ask(node, path, bench.deadline) else { return Ok(false) };
    let checked = refusal::Checked {
        config: config::fingerprint(&live),
        version: node.package_version(),
        refused: all.clone(),
    };
    let mut refused = refusal::news(node, &baseline, &checked);
    // What was refused before and served all the same is not to be mended, and is expected of the mended one too.
    let borne: Vec<Refusal> = all.into_iter().filter(|r| !refused.contains(r)).collect();
    if refused.is_empty() {
        return Ok(false);
    }
    let good = last_good(bench);
    let mut value = live.clone();
    let mut done = Vec::new();
    for _ in 0..MOST_ROUNDS {
        for one in &refused {
            match put_leaf_right(&mut value, good.as_ref(), one) {
                Some(words) => done.push(words),
                None => return Ok(false),
            }
        }
        let (beside, at) = write_beside(bench, path, &value)?;
        match refusal::ask(node, &at, bench.deadline) {
            Ok(now) => {
                let left: Vec<Refusal> = now.into_iter().filter(|r| !borne.contains(r)).collect();
                if left.is_empty() {
                    if !config::lets_in_the_same(&live, &value)
                        && !good.as_ref().is_some_and(|g| config::lets_in_the_same(g, &value))
                    {
                        return Ok(false);
                    }
                    put_in_place(beside, &at, path, bench)?;
                    for words in done {
                        report.did(format!("config: {words}"));
                    }
                    return Ok(true);
                }
                if left == refused {
                    return Ok(false);
                }
                refused = left;
            }
            Err(_) => return Ok(false),
        }
    }
    Ok(false)
}

/// The file's value with its numbers as they are written; JSON5 where it is not plain JSON.
fn plain(path: &Path) -> Option<Value> {
    let bytes = host::files::read_bounded(path, config::CONFIG_LIMIT_BYTES).ok()?;
    serde_json::from_slice(&bytes).ok().or_else(|| config::parse(&bytes).ok()).filter(Value::is_object)
}

/// What the newest trusted snapshot's config says.
fn last_good(bench: &Bench<'_>) -> Option<Value> {
    let store = bench.store?;
    let info = store.newest_trusted(Some(Class::Config)).ok()??;
    let to = bench.quarantine.join("last-good-config");
    let _ = std::fs::remove_dir_all(&to);
    store.export(&info.id, &[Class::Config], &to, bench.deadline).ok()?;
    let name = bench.node.config_path.file_name()?;
    let file = find(&to, name, 4)?;
    let value = plain(&file);
    let _ = std::fs::remove_dir_all(&to);
    value
}

fn find(dir: &Path, name: &std::ffi::OsStr, depth: usize) -> Option<std::path::PathBuf> {
    let mut entries: Vec<_> = std::fs::read_dir(dir).ok()?.flatten().map(|e| e.path()).collect();
    entries.sort();
    let here =
        |p: &&std::path::PathBuf| p.is_file() && (p.file_name() == Some(name) || p.ends_with("config"));
    entries
        .iter()
        .find(here)
        .cloned()
        .or_else(|| entries.iter().filter(|p| depth > 0 && p.is_dir()).find_map(|p| find(p, name, depth - 1)))
}

/// One refusal: unknown keys go; any other leaf becomes what it was, or goes when it was not.
fn put_leaf_right(value: &mut Value, good: Option<&Value>, refused: &Refusal) -> Option<String> {
    let way = refusal::way(value, &refused.path)?;
    let unknown = refused.unknown_keys();
    if !unknown.is_empty() {
        let object = at_mut(value, &way)?.as_object_mut()?;
        let gone: Vec<String> =
            unknown.into_iter().filter(|key| object.shift_remove(key).is_some()).collect();
        let place = if way.is_empty() { "the config".to_owned() } else { way.join(".") };
        return (!gone.is_empty())
            .then(|| format!("{} taken out of {place}: the program does not know it", gone.join(", ")));
    }
    let (last, above) = way.split_last()?;
    let was = good.and_then(|good| at(good, &way)).cloned();
    let place = way.join(".");
    match at_mut(value, above)? {
        Value::Object(map) => match was {
            Some(was) if map.get(last) != Some(&was) => {
                map.insert(last.clone(), was);
                Some(format!("{place} is again what it was when the node last served ({})", refused.message))
            }
            // It was the same then: the leaf is not to blame, or something else is.
            Some(_) => None,
            None => {
                map.shift_remove(last)?;
                Some(format!("{place} taken out: {}", refused.message))
            }
        },
        Value::Array(_) | Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    }
}

fn at<'a>(value: &'a Value, way: &[String]) -> Option<&'a Value> {
    way.iter().try_fold(value, |at, key| match at {
        Value::Object(map) => map.get(key),
        Value::Array(list) => list.get(key.parse::<usize>().ok()?),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    })
}

fn at_mut<'a>(value: &'a mut Value, way: &[String]) -> Option<&'a mut Value> {
    way.iter().try_fold(value, |at, key| match at {
        Value::Object(map) => map.get_mut(key),
        Value::Array(list) => list.get_mut(key.parse::<usize>().ok()?),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    })
}

/// The mended config beside the live one, of the same owner and mode: the program is asked about it there.
fn write_beside(bench: &Bench<'_>, path: &Path, value: &Value) -> Result<(Beside, PathBuf)> {
    let what = || format!("write a mended {}", path.display());
    let parent = path.parent().ok_or_else(|| Error::new(Kind::System, what(), "it has no directory"))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(node::roots::resolved(parent), flags, Mode::empty()).context(what)?;
    let meta = std::fs::symlink_metadata(path).context(what)?;
    let owner = (bench.node.ids != host::run::Ids::current()).then_some((meta.uid(), meta.gid()));
    let name = format!(".koboshi-tmp-config-{}-{}.json", std::process::id(), host::clock::now().ms);
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::new(Kind::System, what(), e))?;
    let beside = Beside::write(dir, name, owner, meta.mode(), |file| {
        file.write_all(text.as_bytes())?;
        file.write_all(b"\n")
    });
    let beside = beside.context(what)?;
    let at = parent.join(beside.name());
    Ok((beside, at))
}

/// Exchanges the two, then moves what was there to the quarantine: the path is never empty in between.
fn put_in_place(mut beside: Beside, at: &Path, path: &Path, bench: &Bench<'_>) -> Result<()> {
    let what = || format!("put the mended {} in place", path.display());
    let name = path.file_name().ok_or_else(|| Error::new(Kind::System, what(), "it has no name"))?;
    let aside = bench.quarantine.join("config-before-mend");
    std::fs::create_dir_all(&aside).context(what)?;
    if beside.exchange(name).context(what)? {
        if let Err(e) = host::exchange::move_aside(at, &aside) {
            // Its owner's config is not left lying under a name of ours.
            let _ = beside.exchange(name);
            return Err(e);
        }
    } else {
        // No exchange on this file system: a copy goes to the quarantine first.
        std::fs::copy(path, aside.join(name)).context(what)?;
        beside.replace(name).context(what)?;
    }
    beside.sync().context(what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nobody::Nobody;
    use serde_json::json;

    /// A node whose runtime is a script that knows one key too few, as the program would say it.
    fn node(dir: &Path) -> node::Node {
        use std::os::unix::fs::PermissionsExt;
        let state = dir.join("state");
        std::fs::create_dir_all(&state).unwrap();
        let runtime = dir.join("node");
        std::fs::write(
            &runtime,
            r#"#!/bin/sh
if grep -q bogusKey "$OPENCLAW_CONFIG_PATH"; then
  echo '{"ok":false,"valid":false,"issues":[{"path":"gateway","message":"Unrecognized key: \"bogusKey\""}]}'
  exit 1
fi
echo '{"valid":true,"warnings":[]}'
"#,
        )
        .unwrap();
        std::fs::set_permissions(&runtime, std::fs::Permissions::from_mode(0o755)).unwrap();
        serde_json::from_value(json!({
            "name": "t", "prefix": dir, "package_dir": dir, "entry": dir, "node_bin": runtime, "home": dir,
            "state_dir": state, "config_path": state.join("openclaw.json"), "port": 1,
            "ids": host::run::Ids::current(), "user": "t"
        }))
        .unwrap()
    }

    #[test]
    fn a_refused_key_goes_and_everything_else_its_owner_wrote_stays() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let text = r#"{"gateway":{"mode":"local","port":18789,"bogusKey":1,"auth":{"token":"t"}},"tools":{"new":1.5}}"#;
        std::fs::write(&node.config_path, text).unwrap();
        let served = json!({"gateway": {"mode": "local", "port": 18789, "auth": {"token": "t"}}});
        let baseline =
            node::Baseline { config: Some(config::fingerprint(&served)), ..node::Baseline::default() };
        let mut bench = Bench {
            node: &node,
            manager: &mut Nobody,
            store: None,
            baseline: Some(&baseline),
            quarantine: dir.path().join("quarantine/00000001"),
            spares: Vec::new(),
            deadline: host::clock::Deadline::after(std::time::Duration::from_secs(30)),
            limits: engine::Limits::default(),
        };
        let mut report = Report::default();
        assert!(super::config(&bench, &mut report).unwrap());
        let now: Value = serde_json::from_slice(&std::fs::read(&node.config_path).unwrap()).unwrap();
        let expected = json!({"gateway": {"mode": "local", "port": 18789, "auth": {"token": "t"}}, "tools": {"new": 1.5}});
        assert_eq!(now, expected);
        assert!(report.done[0].contains("bogusKey"), "{report:?}");
        let kept = std::fs::read_dir(bench.quarantine.join("config-before-mend")).unwrap().next().unwrap();
        assert_eq!(std::fs::read_to_string(kept.unwrap().path()).unwrap(), text, "as it was, to the byte");
        let left: Vec<_> =
            std::fs::read_dir(&node.state_dir).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(left, ["openclaw.json"], "nothing is left beside it");
        // One that the program takes is nobody's to mend, and neither is the one with which the node served.
        assert!(!super::config(&bench, &mut report).unwrap());
        std::fs::write(&node.config_path, text).unwrap();
        let baseline = node::Baseline {
            config: Some(config::fingerprint(&serde_json::from_str(text).unwrap())),
            ..node::Baseline::default()
        };
        bench.baseline = Some(&baseline);
        assert!(!super::config(&bench, &mut report).unwrap());
        assert_eq!(std::fs::read_to_string(&node.config_path).unwrap(), text);
    }

    fn refused(path: &str, message: &str) -> Refusal {
        Refusal { path: path.into(), message: message.into() }
    }

    #[test]
    fn only_the_refused_leaf_changes() {
        let good = json!({"gateway": {"port": 1, "mode": "local"}, "tools": {"a": 1}});
        let mut value =
            json!({"gateway": {"port": "x", "mode": "local", "bogus": 1}, "tools": {"a": 2}, "new": true});
        put_leaf_right(&mut value, Some(&good), &refused("gateway", "Unrecognized key: \"bogus\"")).unwrap();
        put_leaf_right(&mut value, Some(&good), &refused("gateway.port", "expected number")).unwrap();
        assert_eq!(value, json!({"gateway": {"port": 1, "mode": "local"}, "tools": {"a": 2}, "new": true}));
        // A leaf that was not there goes away; one that was the same then is not to blame.
        put_leaf_right(&mut value, Some(&good), &refused("new", "expected object")).unwrap();
        assert_eq!(value.get("new"), None);
        assert_eq!(put_leaf_right(&mut value, Some(&good), &refused("gateway.mode", "no")), None);
        assert_eq!(put_leaf_right(&mut value, Some(&good), &refused("", "Unrecognized key: \"zzz\"")), None);
    }
}
