//! systemd units read from their files, as far as a gateway needs it: no `systemctl`, so it works where no systemd
//! runs and for users whose manager is down.
//!
//! Understood: sections, comments, line continuation, drop-ins in their order, assignments that reset, quoting and
//! the specifiers that gateway units use. What is not understood is kept as text and never guessed at.

use crate::Scope;
use crate::config::parse_env;
use host::files::read_bounded;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A unit file has a few KB.
const UNIT_LIMIT_BYTES: u64 = 256 << 10;
/// Units in one directory that are looked at.
const UNITS_LIMIT: usize = 4_096;
/// Drop-ins of one unit.
const DROP_INS_LIMIT: usize = 64;

/// What a unit says of its service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// With its suffix.
    pub name: String,
    /// Whose manager reads it.
    pub scope: Scope,
    /// The unit file, its drop-ins, its environment files (which may be absent).
    pub files: Vec<PathBuf>,
    /// The arguments of `ExecStart`, the program first, without prefixes such as `-` and `@`.
    pub exec: Vec<String>,
    /// `Environment=` and then what the environment files say.
    pub env: BTreeMap<String, String>,
    /// `User=`.
    pub user: Option<String>,
    /// `WorkingDirectory=`.
    pub cwd: Option<PathBuf>,
    /// A link to `/dev/null`: the owner wants it down.
    pub masked: bool,
}

/// The gateway units in these directories, each directory overriding those after it.
#[must_use]
pub fn gateways(dirs: &[PathBuf], scope: Scope, home: &Path) -> Vec<Spec> {
    let mut found: Vec<Spec> = Vec::new();
    for dir in dirs {
        let mut names: Vec<String> = std::fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .take(UNITS_LIMIT)
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .filter(|n| n.ends_with(".service") && !n.contains('@'))
            .collect();
        names.sort();
        for name in names {
            if found.iter().any(|s| s.name == name) {
                continue;
            }
            if let Some(spec) = read(&dir.join(&name), dirs, scope, home).filter(is_gateway) {
                found.push(spec);
            }
        }
    }
    found
}

/// A unit that starts `… openclaw… gateway …`, or a masked one that carries the program's name for it.
fn is_gateway(spec: &Spec) -> bool {
    if spec.masked {
        return spec.name.starts_with("openclaw-gateway");
    }
    let ours = spec.exec.iter().any(|a| a.contains("openclaw") || a.contains("clawdbot"));
    let kind = spec.env.get("OPENCLAW_SERVICE_KIND").map(String::as_str);
    ours && spec.exec.iter().any(|a| a == "gateway") && kind.is_none_or(|k| k == "gateway")
}

/// Reads one unit with its drop-ins.
#[must_use]
pub fn read(file: &Path, dirs: &[PathBuf], scope: Scope, home: &Path) -> Option<Spec> {
    let name = file.file_name()?.to_string_lossy().into_owned();
    let mut spec = Spec {
        name: name.clone(),
        scope,
        files: vec![file.to_path_buf()],
        exec: Vec::new(),
        env: BTreeMap::new(),
        user: None,
        cwd: None,
        masked: false,
    };
    if std::fs::read_link(file).is_ok_and(|to| to == Path::new("/dev/null")) {
        spec.masked = true;
        return Some(spec);
    }
    let mut body = assignments(&text(file)?);
    for drop_in in drop_ins(&name, dirs) {
        if let Some(text) = text(&drop_in) {
            body.extend(assignments(&text));
            spec.files.push(drop_in);
        }
    }
    let expand = |s: &str| specifiers(s, &name, home);
    let mut env_files = Vec::new();
    for (key, value) in body {
        match key.as_str() {
            // A second ExecStart of a simple service only follows an empty one, which resets.
            "ExecStart" => {
                spec.exec = words(value.trim_start_matches(['-', '@', ':', '+', '!']))
                    .iter()
                    .map(|w| expand(w))
                    .collect();
            }
            "Environment" if value.is_empty() => spec.env.clear(),
            "Environment" => {
                for word in words(&value) {
                    if let Some((k, v)) = word.split_once('=') {
                        spec.env.insert(k.to_owned(), expand(v));
                    }
                }
            }
            "EnvironmentFile" if value.is_empty() => env_files.clear(),
            "EnvironmentFile" => env_files.push(PathBuf::from(expand(value.trim_start_matches('-')))),
            "User" => spec.user = Some(expand(&value)).filter(|u| !u.is_empty()),
            "WorkingDirectory" => {
                let value = value.trim_start_matches('-');
                spec.cwd = Some(if value == "~" { home.to_path_buf() } else { PathBuf::from(expand(value)) });
            }
            _ => {}
        }
    }
    for file in env_files {
        if let Some(text) = text(&file) {
            spec.env.extend(parse_env(&text));
        }
        spec.files.push(file);
    }
    Some(spec)
}

/// The environment that these unit files (as found in [`Spec::files`]) give a service.
#[must_use]
pub fn environment(files: &[PathBuf], home: &Path) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    for file in files {
        let Some(text) = text(file) else { continue };
        let unit = file.extension().is_some_and(|e| e == "service" || e == "conf");
        if unit {
            let name = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            for (key, value) in assignments(&text) {
                if key == "Environment" {
                    let pairs = words(&value);
                    env.extend(pairs.iter().filter_map(|w| {
                        w.split_once('=').map(|(k, v)| (k.to_owned(), specifiers(v, &name, home)))
                    }));
                }
            }
        } else {
            env.extend(parse_env(&text));
        }
    }
    env
}

fn text(file: &Path) -> Option<String> {
    read_bounded(file, UNIT_LIMIT_BYTES).ok().map(|b| String::from_utf8_lossy(&b).into_owned())
}

/// Drop-ins of all directories, by file name; of two with one name the directory that comes first wins.
fn drop_ins(unit: &str, dirs: &[PathBuf]) -> Vec<PathBuf> {
    let mut by_name: BTreeMap<String, PathBuf> = BTreeMap::new();
    for dir in dirs {
        for entry in std::fs::read_dir(dir.join(format!("{unit}.d")))
            .into_iter()
            .flatten()
            .flatten()
            .take(DROP_INS_LIMIT)
        {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(".conf") {
                by_name.entry(name).or_insert_with(|| entry.path());
            }
        }
    }
    by_name.into_values().collect()
}

/// The assignments of `[Service]`, in order.
fn assignments(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut in_service = false;
    let mut pending = String::new();
    for line in text.lines() {
        let line = line.trim();
        if pending.is_empty() && (line.is_empty() || line.starts_with(['#', ';'])) {
            continue;
        }
        if !pending.is_empty() && line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(begun) = line.strip_suffix('\\') {
            pending.push_str(begun);
            pending.push(' ');
            continue;
        }
        pending.push_str(line);
        let whole = std::mem::take(&mut pending);
        if let Some(section) = whole.strip_prefix('[').and_then(|s| s.strip_suffix(']')) {
            in_service = section == "Service";
        } else if in_service && let Some((key, value)) = whole.split_once('=') {
            found.push((key.trim().to_owned(), value.trim().to_owned()));
        }
    }
    found
}

/// Splits as systemd does: blanks outside quotes, backslash escapes.
fn words(value: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut word: Option<String> = None;
    let mut quote: Option<char> = None;
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (_, '\\') => {
                let next = chars.next().unwrap_or('\\');
                word.get_or_insert_default().push(match next {
                    'n' => '\n',
                    't' => '\t',
                    's' => ' ',
                    other => other,
                });
            }
            (None, c) if c.is_whitespace() => all.extend(word.take()),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    all.extend(word);
    all
}

fn specifiers(value: &str, unit: &str, home: &Path) -> String {
    let mut out = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('h') => out.push_str(&home.display().to_string()),
            Some('n') => out.push_str(unit),
            Some('N' | 'p') => out.push_str(unit.trim_end_matches(".service")),
            Some('%') => out.push('%'),
            Some(other) => {
                out.push('%');
                out.push(other);
            }
            None => out.push('%'),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().expect("parent")).expect("dir");
        std::fs::write(path, text).expect("write");
    }

    #[test]
    fn a_gateway_unit_is_read_with_its_drop_ins() {
        let dir = tempfile::tempdir().expect("dir");
        let (own, vendor) = (dir.path().join("own"), dir.path().join("vendor"));
        write(
            &own.join("openclaw-gateway.service"),
            "[Unit]\nDescription=OpenClaw \\\n  Gateway\n[Service]\n# a comment\nExecStart=\"/opt/no de/bin/node\" %h/p/openclaw/dist/index.js gateway \\\n   --port 18789\nEnvironment=HOME=%h \"A=b c\" C=50%%\nEnvironmentFile=-%h/.openclaw/gateway.systemd.env\nRestart=always\n[Install]\nExecStart=/bin/false\n",
        );
        write(&own.join("openclaw-gateway.service.d/20-user.conf"), "[Service]\nEnvironment=A=own\n");
        write(&vendor.join("openclaw-gateway.service.d/20-user.conf"), "[Service]\nEnvironment=A=vendor\n");
        write(&vendor.join("openclaw-gateway.service.d/10-x.conf"), "[Service]\nEnvironment=X=1\n");
        write(&vendor.join("openclaw-gateway.service"), "[Service]\nExecStart=/bin/false openclaw gateway\n");
        write(&vendor.join("other.service"), "[Service]\nExecStart=/usr/sbin/sshd -D\n");
        let home = dir.path().join("home");
        write(&home.join(".openclaw/gateway.systemd.env"), "TOKEN='x y'\n");
        let all = gateways(&[own.clone(), vendor.clone()], Scope::User, &home);
        assert_eq!(all.len(), 1, "{all:?}");
        let spec = &all[0];
        let entry = format!("{}/p/openclaw/dist/index.js", home.display());
        assert_eq!(spec.exec, ["/opt/no de/bin/node", &entry, "gateway", "--port", "18789"]);
        let get = |k: &str| spec.env.get(k).map(String::as_str);
        assert_eq!(
            (get("A"), get("C"), get("X"), get("TOKEN")),
            (Some("own"), Some("50%"), Some("1"), Some("x y"))
        );
        let names: Vec<_> =
            spec.files.iter().map(|f| f.strip_prefix(dir.path()).expect("below").to_owned()).collect();
        assert_eq!(
            names,
            [
                "own/openclaw-gateway.service",
                "vendor/openclaw-gateway.service.d/10-x.conf",
                "own/openclaw-gateway.service.d/20-user.conf",
                "home/.openclaw/gateway.systemd.env"
            ]
            .map(PathBuf::from)
        );
        assert_eq!(environment(&spec.files, &home).get("TOKEN").map(String::as_str), Some("x y"));
    }

    #[test]
    fn an_empty_assignment_resets_and_a_mask_is_seen() {
        let dir = tempfile::tempdir().expect("dir");
        let dirs = [dir.path().to_path_buf()];
        write(&dir.path().join("a.service"), "[Service]\nExecStart=/bin/false\nEnvironment=A=1\n");
        write(
            &dir.path().join("a.service.d/o.conf"),
            "[Service]\nExecStart=\nExecStart=-/usr/bin/openclaw gateway --port 5\nEnvironment=\nUser=claw\n",
        );
        std::os::unix::fs::symlink("/dev/null", dir.path().join("openclaw-gateway-rescue.service"))
            .expect("link");
        let all = gateways(&dirs, Scope::System, Path::new("/home/claw"));
        assert_eq!(all.len(), 2, "{all:?}");
        assert_eq!(all[0].exec, ["/usr/bin/openclaw", "gateway", "--port", "5"]);
        assert!(all[0].env.is_empty());
        assert_eq!(all[0].user.as_deref(), Some("claw"));
        assert!(all[1].masked);
    }
}
