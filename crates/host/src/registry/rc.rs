//! npm's settings as npm itself would read them: environment, then rc files from the nearest to the most general.
//!
//! Only what a client of the registry needs is understood; every other key is kept out. Secrets live in
//! [`Auth`], whose debug output shows none.

use crate::tls::{self, Env, Options, Proxies, env_text, split_list};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};

/// npm's own default.
const DEFAULT_REGISTRY: &str = "https://registry.npmjs.org/";
/// Largest rc file read; real ones are a few lines.
const RC_LIMIT_BYTES: u64 = 256 << 10;

/// Merged settings: the first source that names a key wins.
#[derive(Default)]
pub(super) struct Rc {
    values: BTreeMap<String, Vec<String>>,
}

impl Rc {
    /// Reads environment and files in npm's order. `extra` stands where npm has the project's rc file.
    pub(super) fn load(env: &Env, home: Option<&Path>, extra: &[PathBuf]) -> Rc {
        let mut rc = Rc::default();
        rc.add_env(env);
        for file in extra {
            rc.add_file(file, env);
        }
        match rc.path("userconfig", home) {
            Some(file) => rc.add_file(&file, env),
            None => {
                if let Some(home) = home {
                    rc.add_file(&home.join(".npmrc"), env);
                }
            }
        }
        match rc.path("globalconfig", home) {
            Some(file) => rc.add_file(&file, env),
            None => {
                for prefix in rc.path("prefix", home).into_iter().chain(node_prefix(env)) {
                    rc.add_file(&prefix.join("etc/npmrc"), env);
                }
            }
        }
        for file in ["/usr/local/etc/npmrc", "/usr/etc/npmrc", "/etc/npmrc"] {
            rc.add_file(Path::new(file), env);
        }
        rc
    }

    fn add_env(&mut self, env: &Env) {
        for (key, value) in env {
            let (Some(key), Some(value)) = (key.to_str(), value.to_str()) else { continue };
            let Some((start, name)) = key.split_at_checked("npm_config_".len()) else { continue };
            if !start.eq_ignore_ascii_case("npm_config_") || name.is_empty() || value.is_empty() {
                continue;
            }
            let name = if name.starts_with("//") {
                name.to_string()
            } else {
                let (first, rest) = name.split_at(name.chars().next().map_or(0, char::len_utf8));
                format!("{first}{}", rest.replace('_', "-")).to_lowercase()
            };
            self.values.entry(name).or_insert_with(|| vec![value.to_string()]);
        }
    }

    fn add_file(&mut self, file: &Path, env: &Env) {
        let Some(text) = read_plain_file(file) else { return };
        for (key, values) in parse_ini(&text, env) {
            self.values.entry(key).or_insert(values);
        }
    }

    /// The last value of a key, unless it is unset by a word npm takes for nothing.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        let value = self.values.get(key)?.last()?.as_str();
        (!matches!(value, "" | "null" | "undefined" | "false")).then_some(value)
    }

    fn path(&self, key: &str, home: Option<&Path>) -> Option<PathBuf> {
        let value = self.get(key)?;
        match (value.strip_prefix("~/"), home) {
            (Some(rest), Some(home)) => Some(home.join(rest)),
            (Some(_), None) => None,
            (None, _) => Some(PathBuf::from(value)),
        }
    }

    /// The registry of a package: its scope's, or the default one. Always ends with a slash.
    pub(super) fn registry_for(&self, package: &str) -> String {
        let scoped = package.starts_with('@').then(|| package.split('/').next().unwrap_or(package));
        let named = scoped.and_then(|scope| self.get(&format!("{scope}:registry")));
        let url = named.or_else(|| self.get("registry")).unwrap_or(DEFAULT_REGISTRY);
        format!("{}/", url.trim_end_matches('/'))
    }

    /// What a client of the registry needs of these settings, in the dialect they were read from.
    pub(super) fn file(&self) -> String {
        const PLAIN: [&str; 9] = [
            "registry",
            "proxy",
            "https-proxy",
            "noproxy",
            "no-proxy",
            "strict-ssl",
            "ca",
            "cafile",
            "_auth",
        ];
        let mut text = String::new();
        for (key, values) in &self.values {
            let wanted = PLAIN.contains(&key.as_str())
                || key.starts_with("//")
                || key.ends_with(":registry")
                || key.eq_ignore_ascii_case("_authtoken");
            if !wanted {
                continue;
            }
            // As JSON strings, which that dialect knows: no value breaks out of its line. `${` stays what it is.
            let quoted = |v: &String| serde_json::Value::from(v.replace("${", "\\${")).to_string();
            match values.as_slice() {
                [one] => text.push_str(&format!("{key}={}\n", quoted(one))),
                many => many.iter().for_each(|v| text.push_str(&format!("{key}[]={}\n", quoted(v)))),
            }
        }
        text
    }

    /// The credentials, bound to the hosts and paths they were given for.
    pub(super) fn auth(&self) -> Auth {
        let mut auth = Auth::default();
        for (key, values) in &self.values {
            let (Some(value), Some((place, field))) = (values.last(), key.rsplit_once(':')) else { continue };
            if !place.starts_with("//") || value.is_empty() {
                continue;
            }
            let place = format!("{}/", place.trim_end_matches('/'));
            match field {
                "_authToken" => auth.add(&place, format!("Bearer {value}"), 0),
                "_auth" => auth.add(&place, format!("Basic {value}"), 1),
                "_password" => {
                    let user = self.get(&format!("{}:username", &key[..key.len() - ":_password".len()]));
                    if let (Some(user), Some(pass)) = (user, plain(value)) {
                        auth.add(&place, basic(user, &pass), 2);
                    }
                }
                _ => {}
            }
        }
        // Unscoped credentials, as older npm wrote them, belong to the default registry only.
        let registry = self.registry_for("");
        let unscoped =
            self.get("_authToken").or_else(|| self.get("_authtoken")).map(|t| format!("Bearer {t}"));
        let unscoped = unscoped.or_else(|| self.get("_auth").map(|a| format!("Basic {a}")));
        if let (Some(place), Some(header)) = (nerf(&registry), unscoped) {
            auth.add(&place, header, 3);
        }
        if let (Some(place), Some(header)) = (nerf(&registry), userinfo(&registry)) {
            auth.add(&place, header, 4);
        }
        auth
    }

    /// Trust and proxies as npm would have them.
    pub(super) fn options(&self, env: &Env, home: Option<&Path>) -> Options {
        let mut options = Options::from_env(env);
        options.proxies = self.proxies(env);
        options.verify = self.values.get("strict-ssl").and_then(|v| v.last()).is_none_or(|v| v != "false");
        options.only_ca_pem = self.authorities(home);
        options
    }

    /// npm sends everything through `https-proxy`, else `proxy`, else what the environment says by scheme.
    fn proxies(&self, env: &Env) -> Proxies {
        let mut proxies = Proxies::from_env(env);
        let unset = |key: &str| {
            self.values
                .get(key)
                .and_then(|v| v.last())
                .is_some_and(|v| matches!(v.as_str(), "false" | "null"))
        };
        if let Some(named) = self.get("https-proxy").or_else(|| self.get("proxy")) {
            proxies.https = Some(named.to_string());
            proxies.http = Some(self.get("proxy").unwrap_or(named).to_string());
        } else if unset("proxy") {
            (proxies.https, proxies.http) = (None, None);
        }
        for key in ["noproxy", "no-proxy"] {
            if let Some(values) = self.values.get(key) {
                proxies.direct = values.iter().flat_map(|v| split_list(v)).collect();
                break;
            }
        }
        proxies
    }

    /// `ca` (inline, `\n` for line ends) and `cafile`. An unreadable cafile is ignored, as npm does.
    fn authorities(&self, home: Option<&Path>) -> Vec<Vec<u8>> {
        let inline = self.values.get("ca").into_iter().flatten().filter(|v| v.contains("-----BEGIN"));
        let mut found: Vec<Vec<u8>> = inline.map(|v| v.replace("\\n", "\n").into_bytes()).collect();
        found.extend(self.path("cafile", home).as_deref().and_then(tls::read_pem));
        found
    }
}

/// Credentials by place (`//host/path/`), with the strength of each source.
#[derive(Default, Clone)]
pub(super) struct Auth {
    places: BTreeMap<String, (String, u8)>,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.places.keys()).finish()
    }
}

impl Auth {
    fn add(&mut self, place: &str, header: String, rank: u8) {
        match self.places.get(place) {
            Some((_, known)) if *known <= rank => {}
            Some(_) | None => {
                self.places.insert(place.to_string(), (header, rank));
            }
        }
    }

    /// The `Authorization` header for an address: the longest place that contains it.
    pub(super) fn header_for(&self, url: &str) -> Option<&str> {
        let mut place = nerf(url)?;
        loop {
            if let Some((header, _)) = self.places.get(&place) {
                return Some(header);
            }
            let cut = place.trim_end_matches('/').rfind('/')?;
            if cut < 2 {
                return None;
            }
            place.truncate(cut + 1);
        }
    }
}

/// `//host[:port]/path/` of an address: how npm names the place a credential belongs to.
fn nerf(url: &str) -> Option<String> {
    let rest = url.split_once("://")?.1.split(['?', '#']).next()?;
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let host = authority.rsplit_once('@').map_or(authority, |(_, h)| h).to_ascii_lowercase();
    let path = path.trim_matches('/');
    Some(if path.is_empty() { format!("//{host}/") } else { format!("//{host}/{path}/") })
}

fn userinfo(url: &str) -> Option<String> {
    let authority = url.split_once("://")?.1.split('/').next()?;
    let (user, pass) = authority.rsplit_once('@')?.0.split_once(':')?;
    Some(basic(user, pass))
}

fn basic(user: &str, pass: &str) -> String {
    use base64::Engine as _;
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{pass}")))
}

fn plain(encoded: &str) -> Option<String> {
    use base64::Engine as _;
    String::from_utf8(base64::engine::general_purpose::STANDARD.decode(encoded).ok()?).ok()
}

/// A small regular file; a FIFO planted in its place must not make us wait.
fn read_plain_file(path: &Path) -> Option<String> {
    use rustix::fs::{Mode, OFlags};
    let fd =
        rustix::fs::open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let file = std::fs::File::from(fd);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(RC_LIMIT_BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The prefix of the `node` on PATH, whose `etc/npmrc` npm reads.
fn node_prefix(env: &Env) -> Option<PathBuf> {
    let path: &OsString = env.get(std::ffi::OsStr::new("PATH"))?;
    let node = std::env::split_paths(path).map(|d| d.join("node")).find(|p| p.is_file())?;
    Some(node.canonicalize().ok()?.parent()?.parent()?.to_path_buf())
}

/// The ini dialect of rc files: comments by `;` and `#`, `key[] = value` lists, quotes, `${VAR}`.
fn parse_ini(text: &str, env: &Env) -> BTreeMap<String, Vec<String>> {
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in text.trim_start_matches('\u{feff}').lines().map(str::trim) {
        if line.is_empty() || line.starts_with([';', '#']) {
            continue;
        }
        if line.starts_with('[') {
            // Sections have no meaning to npm: what follows is not a top-level setting.
            break;
        }
        let (key, value) = line.split_once('=').map_or((line, "true"), |(k, v)| (k.trim(), v.trim()));
        let key = expand(&unquote(key), env);
        let value = expand(&unquote(value), env);
        match key.strip_suffix("[]") {
            Some(list) => found.entry(list.to_string()).or_default().push(value),
            None => {
                found.insert(key, vec![value]);
            }
        }
    }
    found
}

/// Takes quotes off, or cuts an unquoted value at its comment.
fn unquote(text: &str) -> String {
    for quote in ['"', '\''] {
        if let Some(inner) = text.strip_prefix(quote).and_then(|t| t.strip_suffix(quote)) {
            let json = (quote == '"').then(|| serde_json::from_str::<String>(text).ok()).flatten();
            return json.unwrap_or_else(|| inner.to_string());
        }
    }
    let mut out = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ';' | '#' => break,
            '\\' => match chars.peek() {
                Some(&next @ (';' | '#' | '\\')) => {
                    out.push(next);
                    chars.next();
                }
                Some(_) | None => out.push('\\'),
            },
            other => out.push(other),
        }
    }
    out.trim().to_string()
}

/// `${VAR}` from the environment; an unknown one stays as written, `${VAR?}` becomes nothing.
fn expand(text: &str, env: &Env) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        let Some(length) = rest[start..].find('}') else { break };
        let whole = &rest[start..=start + length];
        let name = &whole[2..whole.len() - 1];
        let escaped = rest[..start].ends_with('\\');
        out.push_str(&rest[..start - usize::from(escaped)]);
        let (name, optional) = name.strip_suffix('?').map_or((name, false), |n| (n, true));
        match env_text(env, name) {
            Some(value) if !escaped => out.push_str(value),
            None if optional && !escaped => {}
            Some(_) | None => out.push_str(whole),
        }
        rest = &rest[start + length + 1..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Env {
        pairs.iter().map(|(k, v)| (OsString::from(k), OsString::from(v))).collect()
    }

    fn rc(text: &str, pairs: &[(&str, &str)]) -> Rc {
        let env = env(pairs);
        let mut rc = Rc::default();
        rc.add_env(&env);
        for (key, values) in parse_ini(text, &env) {
            rc.values.entry(key).or_insert(values);
        }
        rc
    }

    #[test]
    fn nearest_source_wins() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home");
        std::fs::create_dir_all(home.join("pre/etc")).unwrap();
        std::fs::write(home.join(".npmrc"), "registry=https://user.example\nprefix=~/pre\n").unwrap();
        std::fs::write(home.join("pre/etc/npmrc"), "registry=https://global.example\nproxy=http://p:1\n")
            .unwrap();
        let extra = dir.path().join("extra");
        let load = |pairs: &[(&str, &str)], extra: &[PathBuf]| Rc::load(&env(pairs), Some(&home), extra);
        assert_eq!(load(&[], &[]).registry_for("x"), "https://user.example/");
        assert_eq!(
            load(&[], &[]).get("proxy"),
            Some("http://p:1"),
            "the global rc lies below the user's prefix"
        );
        std::fs::write(&extra, "registry = https://extra.example/npm/\n").unwrap();
        assert_eq!(load(&[], std::slice::from_ref(&extra)).registry_for("x"), "https://extra.example/npm/");
        let env = [("NPM_CONFIG_REGISTRY", "https://env.example")];
        assert_eq!(load(&env, &[extra]).registry_for("x"), "https://env.example/");
        let other = dir.path().join("other");
        std::fs::write(&other, "registry=https://other.example").unwrap();
        let env = [("npm_config_userconfig", other.to_str().unwrap())];
        assert_eq!(load(&env, &[]).registry_for("x"), "https://other.example/");
    }

    #[test]
    fn without_any_source_the_public_registry() {
        assert_eq!(Rc::default().registry_for("openclaw"), "https://registry.npmjs.org/");
    }

    #[test]
    fn ini_dialect() {
        let text = "; c\n# c\nregistry = \"https://q.example/\" \n a=b;c\nplain\nca[]=one\nca[]=two\n\
                    esc=a\\;b\nt=${T}x\nu=${NONE}\no=${NONE?}z\nl=\\${T}\n[section]\nhidden=1\n";
        let found = parse_ini(text, &env(&[("T", "tok")]));
        let one = |k: &str| found.get(k).and_then(|v| v.last()).map(String::as_str);
        assert_eq!(one("registry"), Some("https://q.example/"));
        assert_eq!(one("a"), Some("b"));
        assert_eq!(one("plain"), Some("true"));
        assert_eq!(found["ca"], ["one", "two"]);
        assert_eq!(one("esc"), Some("a;b"));
        assert_eq!(one("t"), Some("tokx"));
        assert_eq!(one("u"), Some("${NONE}"));
        assert_eq!(one("o"), Some("z"));
        assert_eq!(one("l"), Some("${T}"));
        assert_eq!(one("hidden"), None);
    }

    #[test]
    fn environment_keys_are_normalised() {
        let rc = rc(
            "",
            &[("NPM_CONFIG_HTTPS_PROXY", "http://p:1"), ("npm_config__auth", "abc"), ("npm_config_x", "")],
        );
        assert_eq!(rc.get("https-proxy"), Some("http://p:1"));
        assert_eq!(rc.get("_auth"), Some("abc"));
        assert_eq!(rc.get("x"), None);
    }

    #[test]
    fn credentials_stay_at_their_place() {
        let text = "registry=https://r.example/npm/\n//r.example/npm/:_authToken=${TOK}\n\
                    //b.example/:username=u\n//b.example/:_password=cA==\n//c.example/:_auth=eA==\n";
        let auth = rc(text, &[("TOK", "sesame")]).auth();
        assert_eq!(auth.header_for("https://r.example/npm/openclaw/latest"), Some("Bearer sesame"));
        assert_eq!(auth.header_for("https://r.example/other"), None);
        assert_eq!(auth.header_for("https://r.example:444/npm/openclaw"), None);
        assert_eq!(auth.header_for("https://r.example.evil/npm/openclaw"), None);
        assert_eq!(auth.header_for("https://b.example/x/-/x.tgz"), Some("Basic dTpw"));
        assert_eq!(auth.header_for("http://c.example/"), Some("Basic eA=="));
        assert!(!format!("{auth:?}").contains("sesame"));
    }

    #[test]
    fn unscoped_and_url_credentials_go_to_the_default_registry_only() {
        let auth =
            rc("registry=https://r.example/\n_authToken=t\n@s:registry=https://s.example/\n", &[]).auth();
        assert_eq!(auth.header_for("https://r.example/x"), Some("Bearer t"));
        assert_eq!(auth.header_for("https://s.example/x"), None);
        let auth = rc("registry=https://u:p@r.example/\n", &[]).auth();
        assert_eq!(auth.header_for("https://r.example/x"), Some("Basic dTpw"));
    }

    #[test]
    fn scopes_have_their_own_registry() {
        let rc = rc("@s:registry=https://s.example\nregistry=https://r.example\n", &[]);
        assert_eq!(rc.registry_for("@s/pkg"), "https://s.example/");
        assert_eq!(rc.registry_for("@t/pkg"), "https://r.example/");
    }

    #[test]
    fn proxies_and_trust() {
        let pairs = [("HTTPS_PROXY", "http://env:1"), ("NO_PROXY", "a.example")];
        let options = |text: &str| rc(text, &pairs).options(&env(&pairs), None);
        let o = options("");
        assert_eq!(o.proxies.https.as_deref(), Some("http://env:1"));
        assert_eq!(o.proxies.direct, ["a.example"]);
        assert!(o.verify);
        let o = options("proxy=http://rc:2\nnoproxy=b.example\nstrict-ssl=false\n");
        assert_eq!(o.proxies.https.as_deref(), Some("http://rc:2"));
        assert_eq!(o.proxies.direct, ["b.example"]);
        assert!(!o.verify);
        assert_eq!(options("proxy=false\n").proxies.https, None);
        let o = options("ca=\"-----BEGIN CERTIFICATE-----\\nAA\"\ncafile=/does/not/exist\n");
        assert_eq!(o.only_ca_pem, [b"-----BEGIN CERTIFICATE-----\nAA".to_vec()]);
    }

    #[test]
    fn a_fifo_or_directory_in_place_of_an_rc_file_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
            .unwrap();
        assert_eq!(read_plain_file(&fifo), None);
        assert_eq!(read_plain_file(dir.path()), None);
    }
}
