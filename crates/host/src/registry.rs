//! A client of the npm registry: names a version, fetches its tarball, and nothing else.
//!
//! Guarantees: it goes where npm on this machine would go (registry, credentials, proxies and authorities from
//! npm's environment and rc files); every exchange ends at its deadline, also when the other side stops talking;
//! a transient failure is tried again a bounded number of times within that deadline, continuing a cut transfer
//! where the server allows; a tarball appears under its name only when its sha512 is the one the registry
//! promised; credentials go only to the place they were given for and never into an error or log.

mod metadata;
mod rc;

use crate::clock::Deadline;
use crate::error::{Context, Error, Kind, Result};
use crate::tls::{Client, Env, Options, http_error, is_untrusted, process_env};
use metadata::{Manifest, Packument, Wanted};
use sha2::{Digest, Sha512};
use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use ureq::http::Response;

/// Largest package document read: the longest histories on the public registry are tens of megabytes.
const METADATA_LIMIT_BYTES: u64 = 64 << 20;
/// Largest tarball fetched; a Node runtime is about 60 MB.
const TARBALL_LIMIT_BYTES: u64 = 1 << 30;
/// Redirects followed for one exchange, as browsers and npm bound them, only lower.
const REDIRECTS_LIMIT: u32 = 5;
/// Tries of one exchange while none of them brings anything.
const TRIES_LIMIT: u32 = 4;
/// Tries of one download in all, however much each of them brought.
const DOWNLOAD_TRIES_LIMIT: u32 = 16;
/// Connections kept for the next exchange: a dependency tree is hundreds of exchanges with one host.
const IDLE_LIMIT: usize = 16;
/// Pause before the second try; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Pieces a body is read in.
const PIECE_BYTES: usize = 64 << 10;
/// The form of a package document without readmes and maintainers: a tenth of the size.
const ABBREVIATED: &str = "application/vnd.npm.install-v1+json; q=1.0, application/json; q=0.8, */*";

/// The sha512 that a tarball must have.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Integrity([u8; 64]);

impl Integrity {
    /// Reads the sha512 out of an npm integrity value, which may list several hashes.
    #[must_use]
    pub fn parse(text: &str) -> Option<Integrity> {
        use base64::Engine as _;
        text.split_ascii_whitespace().find_map(|hash| {
            let encoded = hash.strip_prefix("sha512-")?.split('?').next()?;
            let bytes = base64::engine::general_purpose::STANDARD.decode(encoded).ok()?;
            Some(Integrity(bytes.try_into().ok()?))
        })
    }

    /// Of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Integrity {
        Integrity(Sha512::digest(bytes).into())
    }

    /// In lower-case hexadecimal digits.
    #[must_use]
    pub fn hex(&self) -> String {
        self.0.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Where npm's cache keeps the bytes that have it, below its `_cacache`.
    #[must_use]
    pub fn content_path(&self) -> PathBuf {
        let hex = self.hex();
        PathBuf::from("content-v2/sha512").join(&hex[..2]).join(&hex[2..4]).join(&hex[4..])
    }

    /// Whether this file has it.
    pub fn matches(&self, file: &Path) -> Result<bool> {
        let mut from = File::open(file).context(|| format!("opening {}", file.display()))?;
        let mut hash = Sha512::new();
        std::io::copy(&mut from, &mut hash).context(|| format!("reading {}", file.display()))?;
        Ok(hash.finalize().as_slice() == self.0)
    }
}

impl std::fmt::Display for Integrity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use base64::Engine as _;
        write!(f, "sha512-{}", base64::engine::general_purpose::STANDARD.encode(self.0))
    }
}

impl std::fmt::Debug for Integrity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// One version of a package, ready to be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name, with its scope if it has one.
    pub name: String,
    /// Its full version.
    pub version: String,
    /// Where its tarball lies.
    pub tarball_url: String,
    /// What the tarball must hash to.
    pub integrity: Integrity,
    /// The Node versions it says it runs on.
    pub engines_node: Option<String>,
    /// Bytes it takes unpacked, as its publisher counted.
    pub unpacked_size: Option<u64>,
}

/// The registry that npm on this machine would use.
#[derive(Debug)]
pub struct Registry {
    client: Client,
    settings: rc::Rc,
    auth: rc::Auth,
    first_pause: Duration,
}

/// Why one try failed: whether another may help.
enum Failed {
    /// Transient.
    Again(Error),
    /// The answer will not change.
    Final(Error),
}

impl Registry {
    /// Settings of the process's environment, the rc files of `home` and of the machine; `extra_rc` files stand
    /// where npm has the project's.
    pub fn from_env(home: Option<&Path>, extra_rc: &[PathBuf]) -> Result<Registry> {
        Registry::with_env(&process_env(), home, extra_rc)
    }

    /// The same with an environment given.
    pub fn with_env(env: &Env, home: Option<&Path>, extra_rc: &[PathBuf]) -> Result<Registry> {
        let settings = rc::Rc::load(env, home, extra_rc);
        let client = Client::new(&Options { idle: IDLE_LIMIT, ..settings.options(env, home) })?;
        let auth = settings.auth();
        Ok(Registry { client, settings, auth, first_pause: FIRST_PAUSE })
    }

    /// The address of a package's registry, fit to be shown: without credentials.
    #[must_use]
    pub fn address(&self, package: &str) -> String {
        shown(&self.settings.registry_for(package))
    }

    /// The settings as an rc file for npm itself, so that npm goes where this client goes. It may hold credentials: for
    /// a private file only.
    #[must_use]
    pub fn npmrc(&self) -> String {
        self.settings.file()
    }

    /// Finds the version: exact (`2026.9.6`), a line (`26`, `26.10`) or a dist-tag (`latest`).
    pub fn resolve(&self, name: &str, version: &str, deadline: Deadline) -> Result<Package> {
        let what = || format!("asking the npm registry for {name}@{version}");
        if !name_is_sane(name) {
            return Err(Error::new(Kind::Usage, what(), "this is no package name"));
        }
        let Some(wanted) = Wanted::parse(version) else {
            return Err(Error::new(Kind::Usage, what(), "this is neither a version nor a dist-tag")
                .hint("write a full version, a major such as 26, or a dist-tag such as latest"));
        };
        let package = match self.resolve_direct(name, &wanted, deadline, &what()) {
            // A mirror may not know the short way: then the whole document decides.
            Some(answer) => answer?,
            None => self.resolve_by_document(name, &wanted, deadline, &what())?,
        };
        Ok(Package { tarball_url: self.rehosted(name, &package.tarball_url), ..package })
    }

    /// A few kilobytes instead of the whole document, where version or tag are known: `/NAME/VERSION`.
    fn resolve_direct(
        &self,
        name: &str,
        wanted: &Wanted,
        d: Deadline,
        what: &str,
    ) -> Option<Result<Package>> {
        let wanted_text = match wanted {
            Wanted::Exact(v) | Wanted::Tag(v) => v,
            Wanted::Line(..) => return None,
        };
        let url = format!("{}{}/{wanted_text}", self.settings.registry_for(name), escaped(name));
        let read = |body: &mut dyn Read| serde_json::from_reader::<_, Manifest>(body);
        let manifest = match self.metadata(&url, "application/json", d, what, read) {
            Ok(manifest) => manifest,
            Err(e) if matches!(e.kind, Kind::Denied | Kind::TimedOut) => return Some(Err(e)),
            Err(_) => return None,
        };
        let version = match wanted {
            Wanted::Exact(v) => v.clone(),
            Wanted::Tag(_) | Wanted::Line(..) => manifest.version.clone()?,
        };
        manifest.package(name, &version).ok().map(Ok)
    }

    fn resolve_by_document(&self, name: &str, wanted: &Wanted, d: Deadline, what: &str) -> Result<Package> {
        let url = format!("{}{}", self.settings.registry_for(name), escaped(name));
        let packument = self.metadata(&url, ABBREVIATED, d, what, |body| Packument::read(body, wanted))?;
        let Some((version, manifest)) = packument.pick(wanted) else {
            return Err(Error::new(Kind::NotFound, what, format!("{} has no such version", shown(&url))));
        };
        manifest.package(name, version).map_err(|why| Error::new(Kind::Corrupt, what, why))
    }

    /// Fetches and parses one document.
    fn metadata<T>(
        &self,
        url: &str,
        accept: &str,
        deadline: Deadline,
        what: &str,
        read: impl Fn(&mut dyn Read) -> serde_json::Result<T>,
    ) -> Result<T> {
        let mut tries = Tries::new(deadline, self.first_pause);
        loop {
            let failed = match self.metadata_once(url, accept, deadline, what, &read) {
                Ok(found) => return Ok(found),
                Err(failed) => failed,
            };
            tries.after(failed, false)?;
        }
    }

    fn metadata_once<T>(
        &self,
        url: &str,
        accept: &str,
        deadline: Deadline,
        what: &str,
        read: &impl Fn(&mut dyn Read) -> serde_json::Result<T>,
    ) -> std::result::Result<T, Failed> {
        let mut response = self.open(url, accept, None, deadline, what)?;
        let body = response.body_mut().with_config().limit(METADATA_LIMIT_BYTES).reader();
        let mut body = BufReader::with_capacity(PIECE_BYTES, body);
        read(&mut body).map_err(|e| match e.classify() {
            serde_json::error::Category::Io => {
                let io = std::io::Error::from(e);
                let error = Error::io(what, &io);
                if io.to_string().contains("larger than") {
                    Failed::Final(error)
                } else {
                    Failed::Again(error)
                }
            }
            serde_json::error::Category::Eof => {
                Failed::Again(Error::new(Kind::Corrupt, what, "the answer ended in the middle"))
            }
            serde_json::error::Category::Syntax | serde_json::error::Category::Data => Failed::Final(
                Error::new(
                    Kind::Corrupt,
                    what,
                    format!("{} did not answer as an npm registry: {e}", shown(url)),
                )
                .hint(
                    "does a login page or another service answer at this address? See npm's registry setting",
                ),
            ),
        })
    }

    /// npm's rule for mirrors: a tarball that the public registry's metadata places on its own host is fetched
    /// from the registry configured here.
    fn rehosted(&self, name: &str, tarball: &str) -> String {
        const PUBLIC: [&str; 2] = ["https://registry.npmjs.org/", "http://registry.npmjs.org/"];
        let path = PUBLIC.iter().find_map(|host| tarball.strip_prefix(host));
        path.map_or_else(|| tarball.to_string(), |path| format!("{}{path}", self.settings.registry_for(name)))
    }

    /// Fetches a tarball of at most `max_bytes` into memory, proven.
    pub fn fetch(&self, package: &Package, max_bytes: u64, deadline: Deadline) -> Result<Vec<u8>> {
        let what = format!("fetching {}@{}", package.name, package.version);
        let mut tries = Tries::new(deadline, self.first_pause);
        loop {
            match self.fetch_once(package, max_bytes, deadline, &what) {
                Ok(bytes) => return Ok(bytes),
                Err(failed) => tries.after(failed, false)?,
            }
        }
    }

    fn fetch_once(
        &self,
        package: &Package,
        max_bytes: u64,
        deadline: Deadline,
        what: &str,
    ) -> std::result::Result<Vec<u8>, Failed> {
        let mut response = self.open(&package.tarball_url, "*/*", None, deadline, what)?;
        let mut bytes = Vec::new();
        let body = response.body_mut().with_config().limit(max_bytes.saturating_add(1)).reader();
        body.take(max_bytes.saturating_add(1))
            .read_to_end(&mut bytes)
            .map_err(|e| Failed::Again(Error::io(what, &e)))?;
        if bytes.len() as u64 > max_bytes {
            return Err(Failed::Final(Error::new(Kind::Corrupt, what, "the tarball is absurdly large")));
        }
        let got = Integrity::of(&bytes);
        if got == package.integrity {
            return Ok(bytes);
        }
        Err(Failed::Again(
            Error::new(Kind::Corrupt, what, format!("expected {}, got {got}", package.integrity))
                .hint("a proxy or mirror on the way changes or cuts files"),
        ))
    }

    /// Fetches the tarball to `to`. `progress` gets bytes done and in all (0: unknown). When the file is already
    /// there and right, nothing is fetched.
    pub fn download(
        &self,
        package: &Package,
        to: &Path,
        progress: &mut dyn FnMut(u64, u64),
        deadline: Deadline,
    ) -> Result<()> {
        let what = format!("fetching {}@{}", package.name, package.version);
        if to.is_file() && package.integrity.matches(to)? {
            return Ok(());
        }
        let mut part = Part::create(to)?;
        let mut tries = Tries::new(deadline, self.first_pause);
        loop {
            let before = part.done;
            let failed = match self.download_once(package, &mut part, progress, deadline, &what) {
                Ok(()) => return part.publish(to),
                Err(failed) => failed,
            };
            tries.after(failed, part.done > before)?;
        }
    }

    fn download_once(
        &self,
        package: &Package,
        part: &mut Part,
        progress: &mut dyn FnMut(u64, u64),
        deadline: Deadline,
        what: &str,
    ) -> std::result::Result<(), Failed> {
        let from = (part.done > 0).then_some(part.done);
        let mut response = self.open(&package.tarball_url, "*/*", from, deadline, what)?;
        if response.status() != 206 || range_start(&response) != from {
            part.restart().map_err(Failed::Final)?;
        }
        let total = response.body().content_length().map_or(0, |more| part.done.saturating_add(more));
        let absurd = || Error::new(Kind::Corrupt, what, "the tarball is absurdly large");
        if total > TARBALL_LIMIT_BYTES {
            return Err(Failed::Final(absurd()));
        }
        let mut body = response.body_mut().with_config().limit(TARBALL_LIMIT_BYTES).reader();
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let n = body.read(&mut piece).map_err(|e| Failed::Again(Error::io(what, &e)))?;
            if n == 0 {
                break;
            }
            part.write(&piece[..n]).map_err(Failed::Final)?;
            if part.done > TARBALL_LIMIT_BYTES {
                return Err(Failed::Final(absurd()));
            }
            progress(part.done, total);
            if deadline.passed() {
                return Err(Failed::Again(Error::new(Kind::TimedOut, what, "the transfer is too slow")));
            }
        }
        if part.integrity() == package.integrity {
            return Ok(());
        }
        let got = part.integrity();
        part.restart().map_err(Failed::Final)?;
        Err(Failed::Again(
            Error::new(Kind::Corrupt, what, format!("expected {}, got {got}", package.integrity))
                .hint("a proxy or mirror on the way changes or cuts files"),
        ))
    }

    /// One exchange up to the headers of a useful answer, redirects followed.
    fn open(
        &self,
        url: &str,
        accept: &str,
        from: Option<u64>,
        deadline: Deadline,
        what: &str,
    ) -> std::result::Result<Response<ureq::Body>, Failed> {
        let mut url = without_userinfo(url);
        for _ in 0..=REDIRECTS_LIMIT {
            let mut request =
                self.client.get(&url, deadline).map_err(Failed::Final)?.header("accept", accept);
            if let Some(from) = from {
                request = request.header("range", format!("bytes={from}-"));
            }
            if accept == "*/*" {
                // A tarball is compressed already, and its hash is of the bytes as they lie.
                request = request.header("accept-encoding", "identity");
            }
            if let Some(auth) = self.auth.header_for(&url) {
                request = request.header("authorization", auth);
            }
            let response = request.call().map_err(|e| self.sort_error(&e, what, &url))?;
            match response.status().as_u16() {
                200 | 206 => return Ok(response),
                301 | 302 | 303 | 307 | 308 => {
                    let target = response.headers().get("location").and_then(|l| l.to_str().ok());
                    url = target.and_then(|t| joined(&url, t)).ok_or_else(|| {
                        Failed::Final(Error::new(
                            Kind::System,
                            what,
                            format!("{} redirects nowhere safe", shown(&url)),
                        ))
                    })?;
                }
                status => return Err(sort_status(status, what, &url)),
            }
        }
        Err(Failed::Final(Error::new(Kind::System, what, format!("{} redirects in circles", shown(&url)))))
    }

    /// Whether the failed exchange is worth another try, and what to say of it.
    fn sort_error(&self, e: &ureq::Error, what: &str, url: &str) -> Failed {
        use ureq::Error as E;
        let mut error = http_error(what, e);
        let through =
            self.client.proxy_shown(url).map(|p| format!(" through the proxy {p}")).unwrap_or_default();
        error.why = format!("{}{through}: {}", shown(url), error.why);
        if error.hint.is_none() {
            error = error.hint(
                "the registry, proxies and authorities are those of npm's rc files and the environment",
            );
        }
        let lasting =
            matches!(e, E::BadUri(_) | E::InvalidProxyUrl | E::Http(_) | E::Tls(_)) || is_untrusted(e);
        if lasting { Failed::Final(error) } else { Failed::Again(error) }
    }
}

impl std::fmt::Debug for rc::Rc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Rc")
    }
}

/// How often and how soon a failed try is repeated.
struct Tries {
    deadline: Deadline,
    fruitless: u32,
    all: u32,
    first_pause: Duration,
    pause: Duration,
}

impl Tries {
    fn new(deadline: Deadline, first_pause: Duration) -> Tries {
        Tries { deadline, fruitless: 0, all: 0, first_pause, pause: first_pause }
    }

    /// Pauses before the next try, or ends with the reason.
    fn after(&mut self, failed: Failed, brought_something: bool) -> Result<()> {
        let error = match failed {
            Failed::Final(error) => return Err(error),
            Failed::Again(error) => error,
        };
        self.all += 1;
        if brought_something {
            (self.fruitless, self.pause) = (0, self.first_pause);
        }
        self.fruitless += 1;
        if self.deadline.left() <= self.pause {
            let why = format!("the time given ran out; last: {}", error.why);
            return Err(Error { kind: Kind::TimedOut, why, ..error });
        }
        if self.fruitless >= TRIES_LIMIT || self.all >= DOWNLOAD_TRIES_LIMIT {
            let why = format!("{} (tried {} times)", error.why, self.all);
            return Err(Error { why, ..error });
        }
        std::thread::sleep(self.pause);
        self.pause *= 2;
        Ok(())
    }
}

/// A download under way, beside its target; gone when dropped unpublished.
struct Part {
    path: PathBuf,
    file: File,
    hash: Sha512,
    done: u64,
    published: bool,
}

impl Part {
    fn create(to: &Path) -> Result<Part> {
        let name = to.file_name().unwrap_or_default().to_string_lossy();
        let path = to.with_file_name(format!(".{name}.{}.part", std::process::id()));
        // A leftover can only be our own of an earlier life with the same pid.
        let _ = std::fs::remove_file(&path);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = file.context(|| format!("creating {}", path.display()))?;
        Ok(Part { path, file, hash: Sha512::new(), done: 0, published: false })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).context(|| format!("writing {}", self.path.display()))?;
        self.hash.update(bytes);
        self.done += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> Result<()> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.rewind())
            .context(|| format!("emptying {}", self.path.display()))?;
        self.hash = Sha512::new();
        self.done = 0;
        Ok(())
    }

    fn integrity(&self) -> Integrity {
        Integrity(self.hash.clone().finalize().into())
    }

    fn publish(mut self, to: &Path) -> Result<()> {
        self.file.sync_all().context(|| format!("syncing {}", self.path.display()))?;
        std::fs::rename(&self.path, to).context(|| format!("naming {}", to.display()))?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.published {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn sort_status(status: u16, what: &str, url: &str) -> Failed {
    let error = |kind, why: &str| Error::new(kind, what, format!("{} answered {status}{why}", shown(url)));
    match status {
        404 | 410 => Failed::Final(error(Kind::NotFound, ": not there")),
        401 | 403 => Failed::Final(
            error(Kind::Denied, "")
                .hint("credentials are read from npm's rc files: //HOST/:_authToken, _auth"),
        ),
        408 | 425 | 429 | 500..=599 => Failed::Again(error(Kind::System, "")),
        _ => Failed::Final(error(Kind::System, "")),
    }
}

/// The offset at which a partial answer begins.
fn range_start(response: &Response<ureq::Body>) -> Option<u64> {
    let range = response.headers().get("content-range")?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// Where a redirect leads; never from `https` to plain `http`.
fn joined(base: &str, target: &str) -> Option<String> {
    let (scheme, rest) = base.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let next = if target.starts_with("https://") || target.starts_with("http://") {
        target.to_string()
    } else if target.starts_with("//") {
        format!("{scheme}:{target}")
    } else if target.starts_with('/') {
        format!("{scheme}://{authority}{target}")
    } else if target.contains("://") || target.is_empty() {
        return None;
    } else {
        let path = rest.split(['?', '#']).next()?;
        let folder = path.rfind('/').map_or(authority, |cut| &path[..cut]);
        format!("{scheme}://{folder}/{target}")
    };
    let downgrade = scheme.eq_ignore_ascii_case("https") && next.starts_with("http://");
    (!downgrade).then(|| without_userinfo(&next))
}

fn without_userinfo(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_string() };
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let host = authority.rsplit_once('@').map_or(authority, |(_, h)| h);
    format!("{scheme}://{host}{path}")
}

/// An address fit for a message: no credentials, no query (signed addresses carry secrets there).
fn shown(url: &str) -> String {
    let bare = without_userinfo(url);
    bare.split(['?', '#']).next().unwrap_or_default().to_string()
}

/// npm's rules for names, strict enough that a name can be put into an address.
fn name_is_sane(name: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty()
            && !p.starts_with(['.', '_'])
            && p.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '~'))
    };
    let within = name.len() <= 214;
    within
        && match name.strip_prefix('@') {
            Some(scoped) => scoped.split_once('/').is_some_and(|(scope, name)| part(scope) && part(name)),
            None => part(name),
        }
}

/// A scope's slash is escaped in addresses.
fn escaped(name: &str) -> String {
    name.replace('/', "%2f")
}

#[cfg(test)]
mod tests;
