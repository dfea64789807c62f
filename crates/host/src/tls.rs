//! The one way out by HTTPS, shared by the registry client and the alert channels.
//!
//! Guarantees: every request made through [`Client`] carries a deadline that also cuts a stalled body; redirects
//! are never followed blindly (the caller decides which headers may travel); certificates are checked against the
//! authorities the machine's owner chose, else against the system's store, else against Mozilla's list built into
//! this binary, so that a host whose `/etc/ssl` is empty or lost can still be repaired from a registry.

use crate::clock::Deadline;
use crate::error::{Error, Kind, Result};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::typestate::{WithBody, WithoutBody};

pub mod known;

/// Longest wait for a connection, TLS included: a registry or chat server that needs more is as good as down.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Longest silence within an exchange before the connection is given up.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(15);
/// Connections kept where nothing else is asked for: messages go out one by one.
const IDLE_LIMIT: usize = 2;
/// Largest file of certificates read; the full Mozilla list is about 220 KB.
const CA_FILE_LIMIT_BYTES: u64 = 8 << 20;

/// Where distributions keep their certificate bundle, tried when the usual lookup finds none.
const BUNDLES: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// A copy of the environment, taken once: lookups are then pure and testable.
pub type Env = BTreeMap<OsString, OsString>;

/// The process's environment.
#[must_use]
pub fn process_env() -> Env {
    std::env::vars_os().collect()
}

/// A non-empty environment value as text.
pub(crate) fn env_text<'a>(env: &'a Env, key: &str) -> Option<&'a str> {
    env.get(std::ffi::OsStr::new(key)).and_then(|v| v.to_str()).filter(|v| !v.is_empty())
}

/// Which proxy a request goes through.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Proxies {
    /// Proxy for `https://` addresses.
    pub https: Option<String>,
    /// Proxy for `http://` addresses.
    pub http: Option<String>,
    /// Hosts reached directly: a domain covers its subdomains, `*` covers all, `host:port` only that port.
    pub direct: Vec<String>,
}

impl std::fmt::Debug for Proxies {
    /// Without the addresses: they may hold a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proxies")
            .field("https", &self.https.is_some())
            .field("http", &self.http.is_some())
            .field("direct", &self.direct)
            .finish()
    }
}

impl Proxies {
    /// What `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY` say, in either case.
    #[must_use]
    pub fn from_env(env: &Env) -> Proxies {
        let either = |name: &str| {
            env_text(env, &name.to_lowercase())
                .or_else(|| env_text(env, &name.to_uppercase()))
                .map(str::to_string)
        };
        let all = either("all_proxy");
        Proxies {
            https: either("https_proxy").or_else(|| all.clone()),
            http: either("http_proxy").or(all),
            direct: either("no_proxy").map(|v| split_list(&v)).unwrap_or_default(),
        }
    }

    /// The proxy for this address, if it does not go direct.
    #[must_use]
    pub fn for_url(&self, url: &str) -> Option<&str> {
        let proxy = if url.starts_with("https:") { self.https.as_deref() } else { self.http.as_deref() }?;
        let (host, port) = host_port(url)?;
        let direct = self.direct.iter().any(|rule| goes_direct(rule, host, port));
        (!direct).then_some(proxy)
    }
}

/// A comma or space separated list.
pub(crate) fn split_list(text: &str) -> Vec<String> {
    text.split([',', ' ']).map(str::trim).filter(|s| !s.is_empty()).map(str::to_string).collect()
}

/// Host and port of an `http(s)` address; the port by scheme where none is written.
pub(crate) fn host_port(url: &str) -> Option<(&str, u16)> {
    let (scheme, rest) = url.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let host_part = authority.rsplit_once('@').map_or(authority, |(_, h)| h);
    let default = if scheme.eq_ignore_ascii_case("https") { 443 } else { 80 };
    if let Some(v6) = host_part.strip_prefix('[') {
        let (host, after) = v6.split_once(']')?;
        let port = match after.strip_prefix(':') {
            Some(p) => p.parse().ok()?,
            None => default,
        };
        return Some((host, port));
    }
    match host_part.rsplit_once(':') {
        Some((host, port)) => Some((host, port.parse().ok()?)),
        None => Some((host_part, default)),
    }
}

/// Whether a `NO_PROXY` rule covers this host.
fn goes_direct(rule: &str, host: &str, port: u16) -> bool {
    if rule == "*" {
        return true;
    }
    let (name, rule_port) = match rule.rsplit_once(':') {
        Some((name, p)) if !name.contains(':') => match p.parse::<u16>() {
            Ok(p) => (name, Some(p)),
            Err(_) => return false,
        },
        Some(_) | None => (rule, None),
    };
    let name = name.trim_start_matches('*').trim_start_matches('.').trim_matches(['[', ']']);
    if name.is_empty() || rule_port.is_some_and(|p| p != port) {
        return false;
    }
    let (host, name) = (host.to_ascii_lowercase(), name.to_ascii_lowercase());
    host == name || host.strip_suffix(&name).is_some_and(|before| before.ends_with('.'))
}

/// What a client trusts and how it goes out.
#[derive(Clone, Debug)]
pub struct Options {
    /// Proxies by scheme.
    pub proxies: Proxies,
    /// The only authorities to trust (PEM), where the owner named some; else the system's.
    pub only_ca_pem: Vec<Vec<u8>>,
    /// A file of authorities trusted besides the system's.
    pub extra_ca_file: Option<PathBuf>,
    /// Whether certificates are checked at all (`strict-ssl`).
    pub verify: bool,
    /// Connections kept for the next exchange.
    pub idle: usize,
}

impl Options {
    /// System authorities, `NODE_EXTRA_CA_CERTS`, proxies of the environment.
    #[must_use]
    pub fn from_env(env: &Env) -> Options {
        Options {
            proxies: Proxies::from_env(env),
            only_ca_pem: Vec::new(),
            extra_ca_file: env_text(env, "NODE_EXTRA_CA_CERTS").map(PathBuf::from),
            verify: true,
            idle: IDLE_LIMIT,
        }
    }
}

/// An HTTP client whose every request has a deadline.
#[derive(Clone)]
pub struct Client {
    agent: ureq::Agent,
    proxies: Proxies,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("proxies", &self.proxies).finish_non_exhaustive()
    }
}

impl Client {
    /// The client of this process's environment: what alerts use.
    pub fn from_env() -> Result<Client> {
        Client::new(&Options::from_env(&process_env()))
    }

    /// A client with these options. Loads the certificates once: keep it.
    pub fn new(options: &Options) -> Result<Client> {
        Ok(Client { agent: tls_agent(options)?, proxies: options.proxies.clone() })
    }

    /// A GET that ends at the deadline, body included. Statuses are not errors; redirects are not followed.
    pub fn get(&self, url: &str, deadline: Deadline) -> Result<ureq::RequestBuilder<WithoutBody>> {
        let config = self.agent.get(url).config();
        Ok(config.timeout_global(Some(left(deadline))).proxy(self.proxy(url)?).build())
    }

    /// A POST that ends at the deadline, body included. Statuses are not errors; redirects are not followed.
    pub fn post(&self, url: &str, deadline: Deadline) -> Result<ureq::RequestBuilder<WithBody>> {
        let config = self.agent.post(url).config();
        Ok(config.timeout_global(Some(left(deadline))).proxy(self.proxy(url)?).build())
    }

    /// Host and port of the proxy that this address is reached through, for messages.
    pub(crate) fn proxy_shown(&self, url: &str) -> Option<String> {
        let (host, port) = host_port(self.proxies.for_url(url)?)?;
        Some(format!("{host}:{port}"))
    }

    fn proxy(&self, url: &str) -> Result<Option<ureq::Proxy>> {
        let Some(address) = self.proxies.for_url(url) else { return Ok(None) };
        ureq::Proxy::new(address).map(Some).map_err(|_| {
            Error::new(Kind::Usage, "reading the proxy setting", "the proxy address cannot be understood")
                .hint("write it as http://host:port in HTTPS_PROXY or npm's https-proxy")
        })
    }
}

/// What is left, never zero: a zero timeout means none to the HTTP library.
fn left(deadline: Deadline) -> Duration {
    deadline.left().max(Duration::from_millis(1))
}

/// An agent with the machine's trust and bounded phases; it asks for a deadline per request on top (see [`Client`]).
pub fn tls_agent(options: &Options) -> Result<ureq::Agent> {
    let tls = TlsConfig::builder()
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .root_certs(roots(options)?)
        .disable_verification(!options.verify)
        .build();
    let config = ureq::Agent::config_builder()
        .tls_config(tls)
        .proxy(None)
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .user_agent(concat!("koboshi/", env!("CARGO_PKG_VERSION")))
        .timeout_resolve(Some(CONNECT_LIMIT))
        .timeout_connect(Some(CONNECT_LIMIT))
        .timeout_per_read(Some(SILENCE_LIMIT))
        .timeout_per_write(Some(SILENCE_LIMIT))
        .max_idle_connections(options.idle)
        .max_idle_connections_per_host(options.idle)
        .build();
    Ok(config.new_agent())
}

/// The authorities to trust, by the order in the module's description.
fn roots(options: &Options) -> Result<RootCerts> {
    if !options.only_ca_pem.is_empty() {
        let certs: Vec<_> = options.only_ca_pem.iter().flat_map(|pem| certificates(pem)).collect();
        if certs.is_empty() {
            return Err(Error::new(Kind::Usage, "reading npm's ca or cafile", "it holds no PEM certificate")
                .hint("point cafile at a PEM bundle, or remove the setting"));
        }
        return Ok(certs.into());
    }
    let mut certs = system_certificates();
    if certs.is_empty() {
        return Ok(RootCerts::WebPki);
    }
    // Node itself only warns about an unreadable extra file, so it is no reason to stay offline here.
    if let Some(extra) = options.extra_ca_file.as_deref().and_then(read_pem) {
        certs.extend(certificates(&extra));
    }
    Ok(certs.into())
}

/// The system's store, which `SSL_CERT_FILE` and `SSL_CERT_DIR` may move.
fn system_certificates() -> Vec<Certificate<'static>> {
    let native = rustls_native_certs::load_native_certs();
    let found: Vec<_> = native.certs.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
    if !found.is_empty() {
        return found;
    }
    BUNDLES
        .iter()
        .filter_map(|p| read_pem(Path::new(p)))
        .map(|pem| certificates(&pem))
        .find(|c| !c.is_empty())
        .unwrap_or_default()
}

/// A file of certificates, bounded; `None` when it cannot be read.
pub(crate) fn read_pem(path: &Path) -> Option<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).ok()?;
    file.take(CA_FILE_LIMIT_BYTES).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// The certificates of a PEM text; what does not parse is left out, as OpenSSL does.
fn certificates(pem: &[u8]) -> Vec<Certificate<'static>> {
    parse_pem(pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(c)) => Some(c),
            Ok(_) | Err(_) => None,
        })
        .collect()
}

/// Translates the HTTP library's error. Its messages name hosts and phases, never headers or bodies.
pub fn http_error(what: impl Into<String>, e: &ureq::Error) -> Error {
    let slow = matches!(e, ureq::Error::Timeout(_))
        || matches!(e, ureq::Error::Io(io) if io.kind() == std::io::ErrorKind::TimedOut);
    let words = e.to_string();
    let error =
        Error::new(if slow { Kind::TimedOut } else { Kind::System }, what, words.trim_start_matches("io: "));
    if is_untrusted(e) {
        return error
            .hint("is a proxy re-signing TLS here? Name its CA in NODE_EXTRA_CA_CERTS or npm's cafile");
    }
    error
}

/// Whether the other side's certificate was refused.
pub(crate) fn is_untrusted(e: &ureq::Error) -> bool {
    let refused = |e: &rustls::Error| matches!(e, rustls::Error::InvalidCertificate(_));
    if let ureq::Error::Rustls(e) = e {
        return refused(e);
    }
    let within = if let ureq::Error::Io(io) = e { io.get_ref() } else { None };
    within.and_then(|e| e.downcast_ref::<rustls::Error>()).is_some_and(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Env {
        pairs.iter().map(|(k, v)| (OsString::from(k), OsString::from(v))).collect()
    }

    #[test]
    fn proxies_are_chosen_by_scheme_and_case() {
        let p = Proxies::from_env(&env(&[("HTTPS_PROXY", "http://up:1"), ("https_proxy", "http://low:2")]));
        assert_eq!(p.for_url("https://a.example/x"), Some("http://low:2"));
        assert_eq!(p.for_url("http://a.example/x"), None);
        let p = Proxies::from_env(&env(&[("ALL_PROXY", "http://all:3"), ("http_proxy", "http://plain:4")]));
        assert_eq!(p.for_url("https://a.example/"), Some("http://all:3"));
        assert_eq!(p.for_url("http://a.example/"), Some("http://plain:4"));
    }

    #[test]
    fn no_proxy_rules() {
        let p = |direct: &str| Proxies {
            https: Some("http://p:1".into()),
            http: None,
            direct: split_list(direct),
        };
        for (rule, url, direct) in [
            ("example.com", "https://example.com/", true),
            ("example.com", "https://registry.Example.com/", true),
            (".example.com", "https://registry.example.com/", true),
            ("*.example.com", "https://registry.example.com/", true),
            ("example.com", "https://badexample.com/", false),
            ("example.com:8443", "https://example.com/", false),
            ("example.com:8443", "https://example.com:8443/", true),
            ("127.0.0.1,::1", "https://[::1]:8443/", true),
            ("*", "https://anything/", true),
            ("", "https://anything/", false),
            ("ample.com", "https://example.com/", false),
        ] {
            assert_eq!(p(rule).for_url(url).is_none(), direct, "{rule} {url}");
        }
    }

    #[test]
    fn hosts_and_ports() {
        assert_eq!(host_port("https://u:p@h.example/a?b"), Some(("h.example", 443)));
        assert_eq!(host_port("http://h:81"), Some(("h", 81)));
        assert_eq!(host_port("http://[::1]:81/"), Some(("::1", 81)));
        assert_eq!(host_port("nonsense"), None);
    }

    #[test]
    fn debug_output_hides_proxy_passwords() {
        let p = Proxies { https: Some("http://u:secret@p:1".into()), http: None, direct: vec![] };
        assert!(!format!("{p:?}").contains("secret"));
    }

    #[test]
    fn a_named_authority_that_is_none_is_an_error() {
        let options =
            Options { only_ca_pem: vec![b"no certificate".to_vec()], ..Options::from_env(&env(&[])) };
        assert_eq!(Client::new(&options).err().map(|e| e.kind), Some(Kind::Usage));
    }
}
