//! `gateway.tls`: whether the gateway is to speak TLS, where its certificate lies, and what to say of the one it shows.
//!
//! Nothing here decides whether a gateway serves: that it is the right process is known from the kernel, and an expired
//! or unexpected certificate is a matter for people (docs/decisions/0019-tls-gateways.md). So are files that the next
//! start would refuse; they are named, because the gateway's own words are not believed.

use crate::http::Tongue;
use crate::{Node, config};
use host::files::read_bounded;
use host::tls::known;
use serde_json::Value;
use std::io::ErrorKind;
use std::path::PathBuf;

/// The program reads no more of either file.
const PEM_LIMIT_BYTES: u64 = 64 << 10;
const PEM_BEGIN: &[u8] = b"-----BEGIN ";

/// What the config says of TLS, where it is switched on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    /// The certificate, as PEM. `None` when the path cannot be known from here.
    pub(crate) certificate: Option<PathBuf>,
    /// Its key.
    pub(crate) key: Option<PathBuf>,
    /// Whether a start makes both, where both are missing.
    pub(crate) generates: bool,
}

/// What a gateway started now would speak. A config that cannot be read says nothing: then plain.
pub(crate) fn configured(node: &Node) -> Tongue {
    let on = config::load(node).is_ok_and(|loaded| config::tls(&loaded.value));
    if on { Tongue::Tls } else { Tongue::Plain }
}

/// The settings, if TLS is on.
pub(crate) fn settings(node: &Node, config: &Value) -> Option<Settings> {
    if !config::tls(config) {
        return None;
    }
    let tls = config.pointer("/gateway/tls");
    let at = |key: &str, own: &str| match tls
        .and_then(|t| t.get(key))
        .and_then(Value::as_str)
        .map(str::trim)
        .filter(|p| !p.is_empty())
    {
        Some(path) => resolve(node, path),
        None => Some(own_dir(node).join(own)),
    };
    Some(Settings {
        certificate: at("certPath", "gateway-cert.pem"),
        key: at("keyPath", "gateway-key.pem"),
        generates: tls.and_then(|t| t.get("autoGenerate")).and_then(Value::as_bool) != Some(false),
    })
}

/// Where the program keeps a pair of its own making: below `OPENCLAW_STATE_DIR`, else beside the config.
fn own_dir(node: &Node) -> PathBuf {
    let state = node.state_dir.join("gateway").join("tls");
    let beside = node.config_path.parent().map(|dir| dir.join("gateway").join("tls"));
    match beside {
        Some(dir) if !state.exists() && dir.exists() => dir,
        Some(_) | None => state,
    }
}

/// As the program resolves it. A path relative to the gateway's working directory, or with a variable in it, is not
/// ours to guess.
fn resolve(node: &Node, path: &str) -> Option<PathBuf> {
    if path.contains('$') {
        return None;
    }
    if let Some(rest) = path.strip_prefix("~/") {
        return Some(node.home.join(rest));
    }
    path.starts_with('/').then(|| PathBuf::from(path))
}

/// Why a gateway started now would refuse its certificate or key, as far as their files show. Only told: a pair of the
/// user's that is half there may be about to be replaced, and no snapshot knows which half is the right one.
pub(crate) fn refused_at_start(node: &Node) -> Option<String> {
    let loaded = config::load(node).ok()?;
    let settings = settings(node, &loaded.value)?;
    let pair = [settings.certificate?, settings.key?];
    let gone = |path: &PathBuf| std::fs::metadata(path).is_err_and(|e| e.kind() == ErrorKind::NotFound);
    if settings.generates && pair.iter().all(gone) {
        return None;
    }
    let why = |path: &PathBuf| match read_bounded(path, PEM_LIMIT_BYTES) {
        Ok(pem) if pem.windows(PEM_BEGIN.len()).any(|w| w == PEM_BEGIN) => None,
        Ok(_) => Some(format!("{} holds no PEM", path.display())),
        Err(_) if gone(path) => Some(format!("{} is missing", path.display())),
        // What we may not read says nothing about what the gateway may.
        Err(_) => None,
    };
    let why = pair.iter().find_map(why)?;
    Some(format!("gateway.tls is on and {why}: a gateway started now would refuse that"))
}

/// What people should know of the certificate (DER) that the gateway shows. `None`: nothing.
pub(crate) fn notice(node: &Node, shown: &[u8]) -> Option<String> {
    dated(shown, host::clock::wall().as_second()).or_else(|| strange(node, shown))
}

fn dated(shown: &[u8], now_s: i64) -> Option<String> {
    let (from, until) = known::validity(shown)?;
    if now_s > until.as_second() {
        return Some(format!("the gateway's TLS certificate expired on {}", until.strftime("%F")));
    }
    (now_s < from.as_second())
        .then(|| format!("the gateway's TLS certificate does not hold before {}", from.strftime("%F")))
}

/// The program's own commands trust the certificate in the file and no other.
fn strange(node: &Node, shown: &[u8]) -> Option<String> {
    let loaded = config::load(node).ok()?;
    let path = settings(node, &loaded.value)?.certificate?;
    let why = match read_bounded(&path, PEM_LIMIT_BYTES) {
        Ok(pem) => match known::first_certificate(&pem) {
            Some(der) if der == shown => return None,
            Some(_) => format!("another TLS certificate than {} holds", path.display()),
            None => format!("a TLS certificate, and {} holds none", path.display()),
        },
        Err(e) => format!("a TLS certificate that cannot be compared ({e})"),
    };
    Some(format!("the gateway shows {why}: OpenClaw's own commands will not trust it"))
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
