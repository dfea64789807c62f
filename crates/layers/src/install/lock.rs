//! npm's answer: which package of which version lies where. The only thing that is taken from npm.
//!
//! npm runs without privileges and may be taken over, so its answer is judged like any stranger's: bounded, every name
//! and path checked for its form, platforms sorted out by ourselves, and whatever it says of contents is proven against
//! tarballs by whoever uses it.

use host::registry::{Integrity, Package};
use host::{Error, Kind, Result, files};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The real answer has 137 KB for 375 packages.
const LOCK_LIMIT_BYTES: u64 = 32 << 20;
const PACKAGES_LIMIT: usize = 5_000;
/// The real tree nests four deep.
const DEPTH_LIMIT: usize = 24;
/// npm's own limit.
const NAME_CHARS: usize = 214;

/// One package in the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// Its directory below the program's; empty for the program itself.
    pub(super) path: PathBuf,
    /// Its name on the registry.
    pub(super) name: String,
    /// Its full version.
    pub(super) version: String,
    /// How deep it lies: the program is 0.
    pub(super) depth: usize,
    /// What npm says of its tarball: hash and address.
    pub(super) said: Option<(Integrity, String)>,
}

impl Found {
    /// As a client of the registry knows it, if npm's word for it is to be taken.
    pub(super) fn package(&self) -> Option<Package> {
        let (integrity, tarball_url) = self.said.clone()?;
        Some(Package {
            name: self.name.clone(),
            version: self.version.clone(),
            tarball_url,
            integrity,
            engines_node: None,
            unpacked_size: None,
        })
    }
}

/// What npm is asked: the program's own dependencies and nothing else of its `package.json` (its developers' tools, its
/// overrides and its scripts are not what a global install looks at). What the program's tarball brings along is not
/// asked for: a registry need not have it. What that in turn needs and does not bring, `more`, is.
pub(super) fn question(package_json: &Value, more: &[(String, Value)]) -> Value {
    const ASKED: [&str; 6] = [
        "name",
        "version",
        "dependencies",
        "optionalDependencies",
        "peerDependencies",
        "peerDependenciesMeta",
    ];
    let kept = ASKED.iter().filter_map(|key| Some(((*key).to_owned(), package_json.get(*key)?.clone())));
    let mut asked: serde_json::Map<String, Value> = kept.collect();
    let brought = bundled(package_json);
    for key in ["dependencies", "optionalDependencies", "peerDependencies"] {
        if let Some(Value::Object(all)) = asked.get_mut(key) {
            all.retain(|name, _| !brought.contains(name));
        }
    }
    if let Some(Value::Object(all)) = asked.get_mut("dependencies") {
        for (name, range) in more {
            all.entry(name.clone()).or_insert_with(|| range.clone());
        }
    }
    Value::Object(asked)
}

/// The packages that a package's own tarball brings along.
pub(super) fn bundled(package_json: &Value) -> Vec<String> {
    let list = |key: &str| package_json.get(key).and_then(Value::as_array);
    let named = list("bundleDependencies").or_else(|| list("bundledDependencies")).into_iter().flatten();
    let form = |name: &str| match name.strip_prefix('@').map(|n| n.split_once('/')) {
        Some(Some((scope, name))) => is_name(scope) && is_name(name),
        Some(None) => false,
        None => is_name(name),
    };
    named.filter_map(Value::as_str).filter(|n| form(n)).take(PACKAGES_LIMIT).map(str::to_owned).collect()
}

/// Reads the answer. Parents come before children.
pub(super) fn answer(file: &Path, program: &Package) -> Result<Vec<Found>> {
    let what = || "read what npm chose".to_owned();
    let bad = |why: String| Error::new(Kind::Corrupt, what(), why);
    let bytes = files::read_bounded(file, LOCK_LIMIT_BYTES)?;
    let lock: Value = serde_json::from_slice(&bytes).map_err(|_| bad("it is no JSON".to_owned()))?;
    let Some(all) = lock.get("packages").and_then(Value::as_object) else {
        return Err(bad("it names no packages".to_owned()));
    };
    if all.len() > PACKAGES_LIMIT {
        return Err(bad("it is absurdly long".to_owned()));
    }
    let mut found = Vec::new();
    for (place, entry) in all {
        if place.is_empty() {
            found.push(Found {
                path: PathBuf::new(),
                name: program.name.clone(),
                version: program.version.clone(),
                depth: 0,
                said: None,
            });
            continue;
        }
        if !fits(entry) {
            continue;
        }
        found.push(one(place, entry).map_err(|why| bad(format!("{}: {why}", shown(place))))?);
    }
    if found.iter().all(|f| f.depth > 0) {
        return Err(bad("it does not name the program itself".to_owned()));
    }
    found.sort_by(|a, b| (a.depth, &a.path).cmp(&(b.depth, &b.path)));
    Ok(found)
}

fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(NAME_CHARS).collect()
}

fn one(place: &str, entry: &Value) -> std::result::Result<Found, &'static str> {
    if entry.get("link").is_some_and(|l| l != false) {
        return Err("it is a link");
    }
    let mut name = String::new();
    let mut depth = 0;
    for part in place.split("node_modules/").skip(1) {
        name = part.trim_end_matches('/').to_owned();
        depth += 1;
        let form = match name.strip_prefix('@').map(|n| n.split_once('/')) {
            Some(Some((scope, name))) => is_name(scope) && is_name(name),
            Some(None) => false,
            None => is_name(&name),
        };
        if !form {
            return Err("this is no place for a package");
        }
    }
    if !place.starts_with("node_modules/") || depth == 0 || depth > DEPTH_LIMIT {
        return Err("this is no place for a package");
    }
    let text = |key: &str| entry.get(key).and_then(Value::as_str);
    let name = text("name").map_or(name, str::to_owned);
    let version = text("version").ok_or("it has no version")?.to_owned();
    let sane = |t: &str| t.len() <= NAME_CHARS && t.bytes().all(|b| b.is_ascii_graphic());
    if !sane(&name) || !sane(&version) || !version.starts_with(|c: char| c.is_ascii_digit()) {
        return Err("its name or version is none");
    }
    let said = text("integrity").and_then(Integrity::parse).zip(text("resolved").map(str::to_owned));
    let said = said.filter(|(_, url)| url.starts_with("https://") || url.starts_with("http://"));
    Ok(Found { path: PathBuf::from(place), name, version, depth, said })
}

fn is_name(part: &str) -> bool {
    !part.is_empty()
        && part.len() <= NAME_CHARS
        && !part.starts_with('.')
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'~'))
}

/// Whether a package is for this machine. npm's answer lists those of every platform.
fn fits(entry: &Value) -> bool {
    let cpu = match std::env::consts::ARCH {
        "x86_64" => "x64",
        "aarch64" => "arm64",
        other => other,
    };
    let libc = if musl() { "musl" } else { "glibc" };
    allows(entry.get("os"), "linux") && allows(entry.get("cpu"), cpu) && allows(entry.get("libc"), libc)
}

/// Whether this machine's own C library is musl.
pub(super) fn musl() -> bool {
    Path::new("/lib/ld-musl-x86_64.so.1").exists() || Path::new("/lib/ld-musl-aarch64.so.1").exists()
}

/// npm's rule for a list of names of which some may be excluded.
fn allows(list: Option<&Value>, ours: &str) -> bool {
    let one = match list {
        Some(Value::String(s)) => vec![s.as_str()],
        Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).collect(),
        Some(Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_)) | None => return true,
    };
    let wanted: Vec<&str> = one.iter().filter(|s| !s.starts_with('!')).copied().collect();
    let refused = one.iter().any(|s| s.strip_prefix('!') == Some(ours));
    !refused && (wanted.is_empty() || wanted.contains(&ours) || wanted.contains(&"any"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn program() -> Package {
        Package {
            name: "openclaw".into(),
            version: "2026.9.6".into(),
            tarball_url: String::new(),
            integrity: Integrity::of(b""),
            engines_node: None,
            unpacked_size: None,
        }
    }

    fn read(packages: &Value) -> Result<Vec<Found>> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("package-lock.json");
        std::fs::write(&file, json!({ "packages": packages }).to_string()).unwrap();
        answer(&file, &program())
    }

    #[test]
    fn packages_lie_where_npm_says_parents_first() {
        let found = read(&json!({
            "node_modules/a/node_modules/@s/b": {"version": "2.0.0"},
            "node_modules/a": {"version": "1.0.0", "name": "alias-of", "resolved": "https://r.example/a.tgz",
                "integrity": Integrity::of(b"a").to_string()},
            "": {"name": "whatever npm says"},
            "node_modules/other": {"version": "1.0.0", "os": ["darwin"], "optional": true},
            "node_modules/other2": {"version": "1.0.0", "os": ["!linux"]},
            "node_modules/ours": {"version": "1.0.0", "os": ["linux", "darwin"], "libc": ["musl", "glibc"]},
        }))
        .unwrap();
        let paths: Vec<&str> = found.iter().map(|f| f.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["", "node_modules/a", "node_modules/ours", "node_modules/a/node_modules/@s/b"]);
        assert_eq!((found[0].name.as_str(), found[0].version.as_str()), ("openclaw", "2026.9.6"));
        assert_eq!(found[1].name, "alias-of");
        assert!(found[1].package().is_some() && found[2].package().is_none());
        assert_eq!(found[3].name, "@s/b");
    }

    #[test]
    fn what_leads_elsewhere_is_no_place_for_a_package() {
        for place in [
            "../x",
            "/etc/x",
            "node_modules/../../x",
            "node_modules/a/../b",
            "node_modules/.bin",
            "node_modules/@scope",
            "node_modules/@/x",
            "node_modules/a/b",
            "node_modules/",
            "dist/node_modules/x",
            "node_modules/a\u{0}b",
        ] {
            let lock = json!({"": {}, place: {"version": "1.0.0"}});
            assert!(read(&lock).is_err(), "{place:?}");
        }
        assert!(read(&json!({"": {}, "node_modules/a": {"link": true, "resolved": "../x"}})).is_err());
        assert!(read(&json!({"": {}, "node_modules/a": {"version": "file:../x"}})).is_err());
        assert!(read(&json!({"node_modules/a": {"version": "1.0.0"}})).is_err(), "no program");
        assert!(read(&json!([])).is_err());
    }

    #[test]
    fn only_what_a_global_install_looks_at_is_asked() {
        let program = json!({
            "name": "openclaw", "version": "1.0.0", "dependencies": {"a": "1", "brought": "1"},
            "bundleDependencies": ["brought", "../x"],
            "devDependencies": {"huge": "1"}, "overrides": {"a": "2"}, "scripts": {"postinstall": "x"}
        });
        let more = [("a".to_owned(), json!("9")), ("b".to_owned(), json!("2"))];
        let asked = question(&program, &more);
        let wanted = json!({"name": "openclaw", "version": "1.0.0", "dependencies": {"a": "1", "b": "2"}});
        assert_eq!(asked, wanted);
        assert_eq!(bundled(&program), ["brought"]);
    }
}
