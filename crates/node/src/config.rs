//! `openclaw.json`: read as the gateway reads it, checked for what keeps a gateway from starting, and asked for the
//! gateway's token.
//!
//! Reading is bounded in size and nesting, because the file belongs to a user who may be hostile to us. Secret
//! references that run a program are never followed here. Nothing is ever written.

use crate::Node;
use crate::ws::Token;
use engine::{Class, FaultKind, Finding};
use host::error::{Error, Kind, Result};
use host::files::read_bounded;
use serde_json::Value;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

pub mod contacts;

/// Real configs have 2 to 200 KB.
pub const CONFIG_LIMIT_BYTES: u64 = 8 << 20;
/// The parser recurses: deeper input would end our own stack, not only the parse.
const NESTING_LIMIT: usize = 128;
/// Files that one config may include, directly or not; the program itself allows ten levels.
const INCLUDES_LIMIT: usize = 64;
/// An env or token file.
const SECRET_LIMIT_BYTES: u64 = 1 << 20;

/// A config with its includes merged in.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// The whole.
    pub value: Value,
    /// Every file it came from, the main one first.
    pub files: Vec<PathBuf>,
}

/// Reads JSON5 within the bounds.
pub fn parse(bytes: &[u8]) -> Result<Value> {
    let fail = |why: String| Error::new(Kind::Corrupt, "reading the config", why);
    if bytes.len() as u64 > CONFIG_LIMIT_BYTES {
        return Err(fail(format!("it has {} bytes", bytes.len())));
    }
    let text = std::str::from_utf8(bytes).map_err(|e| fail(format!("it is not text: {e}")))?;
    let text = text.trim_start_matches('\u{feff}');
    if text.trim_matches(['\0', ' ', '\n', '\r', '\t']).is_empty() {
        return Err(fail("it is empty".into()));
    }
    if nesting(text) > NESTING_LIMIT {
        return Err(fail(format!("it is nested deeper than {NESTING_LIMIT} levels")));
    }
    json5::from_str(text).map_err(|e| fail(e.to_string()))
}

/// The deepest nesting of brackets outside strings and comments.
fn nesting(text: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0_usize);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' | '\'' => {
                while let Some(s) = chars.next() {
                    if s == '\\' {
                        chars.next();
                    } else if s == c {
                        break;
                    }
                }
            }
            '/' if chars.peek() == Some(&'/') => {
                for s in chars.by_ref() {
                    if matches!(s, '\n' | '\r' | '\u{2028}' | '\u{2029}') {
                        break;
                    }
                }
            }
            '/' if chars.peek() == Some(&'*') => {
                chars.next();
                let mut star = false;
                for s in chars.by_ref() {
                    if star && s == '/' {
                        break;
                    }
                    star = s == '*';
                }
            }
            '[' | '{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// Reads the node's config and what it includes. An include that cannot be read is an error, as for the gateway.
pub fn load(node: &Node) -> Result<Loaded> {
    load_file(&node.config_path)
}

/// The same for a path.
pub fn load_file(path: &Path) -> Result<Loaded> {
    let mut files = Vec::new();
    let value = load_into(path, &mut files, 0)?;
    Ok(Loaded { value, files })
}

fn load_into(path: &Path, files: &mut Vec<PathBuf>, depth: usize) -> Result<Value> {
    /// The program's own limit.
    const DEPTH_LIMIT: usize = 10;
    if depth > DEPTH_LIMIT || files.len() >= INCLUDES_LIMIT || files.iter().any(|f| f == path) {
        return Err(Error::new(
            Kind::Corrupt,
            "reading the config",
            "its includes form a circle or are too many",
        ));
    }
    files.push(path.to_path_buf());
    let bytes = regular(path, CONFIG_LIMIT_BYTES)?;
    let value = parse(&bytes)?;
    include(value, path.parent().unwrap_or(Path::new("/")), files, depth)
}

fn include(value: Value, dir: &Path, files: &mut Vec<PathBuf>, depth: usize) -> Result<Value> {
    let Value::Object(mut map) = value else { return Ok(value) };
    let mut merged = Value::Object(serde_json::Map::new());
    let wanted: Vec<String> = match map.remove("$include") {
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(many)) => many.into_iter().filter_map(|v| v.as_str().map(str::to_owned)).collect(),
        Some(_) | None => Vec::new(),
    };
    for name in wanted {
        merge(&mut merged, load_into(&dir.join(name), files, depth + 1)?);
    }
    for (key, inner) in map {
        let inner = include(inner, dir, files, depth)?;
        // An include that is a bare list cannot be widened by siblings: what stands in the file wins.
        if let Value::Object(into) = &mut merged {
            match into.get_mut(&key) {
                Some(old) => merge(old, inner),
                None => {
                    into.insert(key, inner);
                }
            }
        } else {
            merged = serde_json::json!({ key: inner });
        }
    }
    Ok(merged)
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(a), Value::Object(b)) => {
            for (key, value) in b {
                match a.get_mut(&key) {
                    Some(old) => merge(old, value),
                    None => {
                        a.insert(key, value);
                    }
                }
            }
        }
        (slot, value) => *slot = value,
    }
}

/// Reads a plain file: never a pipe or a device that a user put there to hold us up.
fn regular(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let what = || format!("reading {}", path.display());
    let meta = std::fs::metadata(path).map_err(|e| Error::io(what(), &e))?;
    if !meta.is_file() {
        return Err(Error::new(Kind::Corrupt, what(), "it is not a plain file"));
    }
    read_bounded(path, limit)
}

/// A hash of what the config says, whatever its layout: tells an edit of meaning from one of blanks and comments.
#[must_use]
pub fn fingerprint(value: &Value) -> String {
    let mut hasher = blake3::Hasher::new();
    hash_into(value, &mut hasher);
    hasher.finalize().to_hex().to_string()
}

fn hash_into(value: &Value, hasher: &mut blake3::Hasher) {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<&String, &Value> = map.iter().collect();
            hasher.update(b"{");
            for (key, inner) in sorted {
                hasher.update(&(key.len() as u64).to_le_bytes()).update(key.as_bytes());
                hash_into(inner, hasher);
            }
            hasher.update(b"}");
        }
        Value::Array(list) => {
            hasher.update(b"[");
            for inner in list {
                hash_into(inner, hasher);
            }
            hasher.update(b"]");
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            let text = value.to_string();
            hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        }
    }
}

/// What keeps a gateway from starting on this config, as far as the file alone shows it.
#[must_use]
pub fn check(node: &Node) -> Vec<Finding> {
    let path = &node.config_path;
    let broken = |what: String, evidence: Vec<String>| Finding {
        kind: FaultKind::ConfigBroken,
        class: Some(Class::Config),
        what,
        evidence,
    };
    let meta = match std::fs::metadata(path) {
        Ok(m) => m,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return vec![broken(format!("the config {} is missing", path.display()), Vec::new())];
        }
        Err(e) => {
            return vec![broken(
                format!("the config {} cannot be looked at", path.display()),
                vec![e.to_string()],
            )];
        }
    };
    if !meta.is_file() {
        return vec![broken(format!("the config {} is not a file", path.display()), Vec::new())];
    }
    let mut findings: Vec<Finding> = unreadable_by(node, path, &meta).into_iter().collect();
    match load(node) {
        Err(e) => {
            let size = format!("{} bytes", meta.len());
            findings
                .push(broken(format!("the config {} cannot be read: {}", path.display(), e.why), vec![size]));
        }
        Ok(loaded) => findings.extend(
            blockers(&loaded.value, !matches!(token(node).0, Token::Unknown(_)))
                .into_iter()
                .map(|why| broken(format!("the config {why}"), Vec::new())),
        ),
    }
    findings
}

/// Contents that parse and yet let no gateway start: each was seen to end with exit code 78.
fn blockers(value: &Value, has_token: bool) -> Vec<String> {
    let mut why = Vec::new();
    if !value.is_object() {
        return vec!["holds no object".into()];
    }
    match value.pointer("/gateway/mode") {
        Some(Value::String(_)) => {}
        Some(_) => why.push("has a gateway.mode that is no text".into()),
        None => why.push("lacks gateway.mode".into()),
    }
    let port = value.pointer("/gateway/port");
    if port.is_some_and(|p| p.as_f64().is_none_or(|n| !(1.0..=65_535.0).contains(&n))) {
        why.push("has a gateway.port that is no port".into());
    }
    let bind = value.pointer("/gateway/bind").and_then(Value::as_str).unwrap_or("loopback");
    let none = value.pointer("/gateway/auth/mode").and_then(Value::as_str) == Some("none");
    let bare = value.pointer("/gateway/auth").is_none() && !has_token;
    if bind == "lan" && (none || bare) {
        why.push("binds to the network without authentication".into());
    }
    why
}

/// Whether the node's user may read the file at all, by its mode and owner (we may be root and see everything).
fn unreadable_by(node: &Node, path: &Path, meta: &std::fs::Metadata) -> Option<Finding> {
    if may(node, meta, 0o4) {
        return None;
    }
    Some(Finding {
        kind: FaultKind::Permission,
        class: Some(Class::Config),
        what: format!("{} may not read {}", node.user, path.display()),
        evidence: vec![format!("owner {}:{}, mode {:o}", meta.uid(), meta.gid(), meta.mode() & 0o7777)],
    })
}

/// Whether the node's user has this permission (4 read, 2 write, 1 search) by mode bits alone.
pub(crate) fn may(node: &Node, meta: &std::fs::Metadata, bit: u32) -> bool {
    let mode = meta.mode();
    if node.ids.uid == 0 {
        true
    } else if meta.uid() == node.ids.uid {
        mode & (bit << 6) != 0
    } else if node.ids.groups().contains(&meta.gid()) {
        mode & (bit << 3) != 0
    } else {
        mode & bit != 0
    }
}

/// Whether two configs agree on where the gateway listens, whom it lets in and whether others may listen in: a repair
/// never changes that by itself.
#[must_use]
pub fn lets_in_the_same(one: &Value, other: &Value) -> bool {
    ["/gateway/auth", "/gateway/bind", "/gateway/tailscale", "/gateway/mode", "/gateway/tls"]
        .iter()
        .all(|at| one.pointer(at) == other.pointer(at))
}

/// The channels that the config names: what may fail in `readyz` without the node being down.
#[must_use]
pub fn channels(value: &Value) -> Vec<String> {
    let named = value.get("channels").and_then(Value::as_object);
    named.into_iter().flatten().map(|(k, _)| k.clone()).filter(|k| k != "defaults").take(256).collect()
}

/// Whether the gateway speaks TLS on its own port.
#[must_use]
pub fn tls(value: &Value) -> bool {
    value.pointer("/gateway/tls/enabled").and_then(Value::as_bool) == Some(true)
}

/// Whether the gateway listens on loopback alone, as it does unless told otherwise. Then a listener on another address of
/// the same port (a proxy in front of it) is in nobody's way.
#[must_use]
pub fn on_loopback(value: &Value) -> bool {
    value.pointer("/gateway/bind").and_then(Value::as_str).is_none_or(|bind| bind == "loopback")
}

/// The port that the gateway of this environment and config listens on.
#[must_use]
pub fn port(value: Option<&Value>, env_port: Option<&str>, profile: Option<&str>) -> u16 {
    let of_env =
        env_port.map(str::trim).and_then(|t| t.rsplit(':').next()).and_then(|p| p.parse::<u16>().ok());
    let of_config = value
        .and_then(|v| v.pointer("/gateway/port"))
        .and_then(Value::as_u64)
        .and_then(|p| u16::try_from(p).ok());
    if let Some(port) = of_env.or(of_config).filter(|p| *p != 0) {
        return port;
    }
    let Some(profile) = profile else { return crate::DEFAULT_PORT };
    // The program derives a named profile's port from its name by FNV-1a; two nodes on one host meet only so.
    let hash = profile.bytes().fold(2_166_136_261_u32, |h, b| (h ^ u32::from(b)).wrapping_mul(16_777_619));
    20_000 + u16::try_from(hash % 40_000).unwrap_or(0)
}

/// Where the gateway's token comes from, as told to people. Holds no secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenSource {
    /// Written in the config.
    Literal,
    /// A variable, found in the named place.
    Env {
        /// The variable.
        name: String,
        /// The file or environment that holds it.
        from: String,
    },
    /// A file of its own.
    File(PathBuf),
    /// Authentication is switched off.
    Open,
    /// There is none that can be read without running something.
    None {
        /// Why.
        why: String,
    },
}

/// The token to say hello with, and where it was found. Never runs anything.
#[must_use]
pub fn token(node: &Node) -> (Token, TokenSource) {
    let none = |why: String| (Token::Unknown(why.clone()), TokenSource::None { why });
    let value = match load(node) {
        Ok(loaded) => loaded.value,
        Err(e) => return none(format!("the config cannot be read: {}", e.why)),
    };
    let auth = value.pointer("/gateway/auth");
    let mode = auth.and_then(|a| a.get("mode")).and_then(Value::as_str);
    if mode == Some("none") {
        return (Token::Open, TokenSource::Open);
    }
    if mode == Some("trusted-proxy") {
        return none("gateway.auth.mode is trusted-proxy".into());
    }
    let vars = Variables::of(node, &value);
    let want_password =
        mode == Some("password") || (mode.is_none() && auth.is_some_and(|a| a.get("password").is_some()));
    let (key, variable) = if want_password {
        ("password", "OPENCLAW_GATEWAY_PASSWORD")
    } else {
        ("token", "OPENCLAW_GATEWAY_TOKEN")
    };
    let found = match auth.and_then(|a| a.get(key)) {
        Some(secret) => resolve(secret, node, &value, &vars),
        None => vars.get(variable).map_or_else(
            || Err(format!("gateway.auth.{key} is not set")),
            |(secret, from)| Ok((secret, TokenSource::Env { name: variable.into(), from })),
        ),
    };
    match found {
        Ok((secret, source)) if want_password => (Token::Password(secret), source),
        Ok((secret, source)) => (Token::Token(secret), source),
        Err(why) => none(why),
    }
}

fn resolve(
    secret: &Value,
    node: &Node,
    config: &Value,
    vars: &Variables,
) -> std::result::Result<(String, TokenSource), String> {
    let from_env = |name: &str| {
        let missing = || format!("the variable {name} is set nowhere that a gateway's service would see");
        let (value, from) = vars.get(name).ok_or_else(missing)?;
        Ok((value, TokenSource::Env { name: name.into(), from }))
    };
    match secret {
        Value::String(text) => match whole_variable(text) {
            Some(name) => from_env(name),
            None if text.contains("${") => Err("it mixes text and variables".into()),
            None if text.is_empty() => Err("it is empty".into()),
            None => Ok((text.clone(), TokenSource::Literal)),
        },
        Value::Object(reference) => {
            let text = |key: &str| reference.get(key).and_then(Value::as_str).unwrap_or_default();
            match text("source") {
                "env" => from_env(text("id")),
                "file" => from_file(text("provider"), text("id"), node, config),
                "exec" => Err("it is a reference that runs a program".into()),
                other => Err(format!("it is a reference of an unknown source {other:?}")),
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) => Err("it is no text".into()),
    }
}

/// `${NAME}` or `$NAME` and nothing else.
fn whole_variable(text: &str) -> Option<&str> {
    let name =
        text.strip_prefix("${").and_then(|t| t.strip_suffix('}')).or_else(|| text.strip_prefix('$'))?;
    (!name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')).then_some(name)
}

/// A file reference: the provider names the file, the id is a JSON pointer into it, or `value` for the whole text.
fn from_file(
    provider: &str,
    id: &str,
    node: &Node,
    config: &Value,
) -> std::result::Result<(String, TokenSource), String> {
    let spec = config
        .pointer("/secrets/providers")
        .and_then(|p| p.get(provider))
        .ok_or_else(|| format!("the secret provider {provider:?} is not configured"))?;
    let path = spec.get("path").and_then(Value::as_str).ok_or("the secret provider names no path")?;
    let path = match path.strip_prefix("~/") {
        Some(rest) => node.home.join(rest),
        None => node.state_dir.join(path),
    };
    let bytes = regular(&path, SECRET_LIMIT_BYTES).map_err(|e| e.to_string())?;
    let text = String::from_utf8(bytes).map_err(|_| "the secret file is not text".to_owned())?;
    let single = spec.get("mode").and_then(Value::as_str) == Some("singleValue") || id == "value";
    let found = if single {
        Some(text.trim().to_owned())
    } else {
        let json: Value =
            serde_json::from_str(&text).map_err(|_| "the secret file is not JSON".to_owned())?;
        json.pointer(id).and_then(Value::as_str).map(str::to_owned)
    };
    match found {
        Some(s) if !s.is_empty() => Ok((s, TokenSource::File(path))),
        Some(_) | None => Err(format!("{} holds no such secret", path.display())),
    }
}

/// The variables a gateway would see: its unit and environment files first, then `.env`, then the config's own.
struct Variables(Vec<(String, BTreeMap<String, String>)>);

/// Every variable that the node's gateway sees, the one that wins where a name is set twice.
#[must_use]
pub fn variables(node: &Node) -> BTreeMap<String, String> {
    let config = load(node).map(|l| l.value).unwrap_or_default();
    let mut all = BTreeMap::new();
    for (_, layer) in Variables::of(node, &config).0 {
        for (name, value) in layer {
            all.entry(name).or_insert(value);
        }
    }
    all
}

impl Variables {
    fn of(node: &Node, config: &Value) -> Variables {
        let mut layers = Vec::new();
        layers.push(("the node's environment".to_owned(), node.env.iter().cloned().collect()));
        if let Some(unit) = &node.unit {
            let parsed = crate::units::environment(&unit.files, &node.home);
            layers.push((unit.name.clone(), parsed));
        }
        for file in [
            node.state_dir.join("gateway.systemd.env"),
            node.state_dir.join(".env"),
            node.home.join(".openclaw").join(".env"),
        ] {
            if let Ok(bytes) = regular(&file, SECRET_LIMIT_BYTES) {
                layers.push((file.display().to_string(), parse_env(&String::from_utf8_lossy(&bytes))));
            }
        }
        let mut of_config = BTreeMap::new();
        for pointer in ["/env/vars", "/env"] {
            for (key, value) in config.pointer(pointer).and_then(Value::as_object).into_iter().flatten() {
                if let Some(text) = value.as_str() {
                    of_config.entry(key.clone()).or_insert_with(|| text.to_owned());
                }
            }
        }
        layers.push(("the config's env".to_owned(), of_config));
        Variables(layers)
    }

    fn get(&self, name: &str) -> Option<(String, String)> {
        let hit = |(from, vars): &(String, BTreeMap<String, String>)| {
            vars.get(name).filter(|v| !v.is_empty()).map(|v| (v.clone(), from.clone()))
        };
        self.0.iter().find_map(hit)
    }
}

/// `KEY=value` lines as dotenv and systemd write them: `export`, quotes and comments are understood.
pub(crate) fn parse_env(text: &str) -> BTreeMap<String, String> {
    let mut vars = BTreeMap::new();
    for line in text.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        let line = line.strip_prefix("export ").unwrap_or(line);
        let Some((key, value)) = line.split_once('=') else { continue };
        let key = key.trim();
        if key.is_empty() || !key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            continue;
        }
        let value = value.trim();
        let quoted = |q: char| value.strip_prefix(q).and_then(|v| v.find(q).and_then(|end| v.get(..end)));
        let value = match (quoted('"'), quoted('\'')) {
            (Some(v), _) => v.replace("\\n", "\n").replace("\\\\", "\\"),
            (None, Some(v)) => v.to_owned(),
            (None, None) => value.split(" #").next().unwrap_or_default().trim_end().to_owned(),
        };
        vars.insert(key.to_owned(), value);
    }
    vars
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
