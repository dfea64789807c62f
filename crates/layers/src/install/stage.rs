//! The stage: built from tarballs that the registry vouches for, each proven in memory and unpacked from that memory.
//!
//! Guarantees: every byte of it is in a tarball whose sha512 the registry named to koboshi's own client for the package
//! and version that lies there; every dependency that a proven `package.json` asks for is there in a version that it
//! asks for; commands are links within the stage to what a proven `package.json` calls a command. Whoever made the plan
//! (an npm that may have been taken over) can at worst choose among published versions that fit.

use super::lock::Found;
use super::place::Place;
use host::clock::Deadline;
use host::registry::Registry;
use host::unpack::{UnpackLimits, unpack_from};
use host::{Context, Error, Kind, Result, files};
use node::range;
use serde_json::Value;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Packages at work at once: most of them wait for the network. Each is wholly in memory meanwhile.
const WORKERS: usize = 10;
/// The largest real tarball, the program's own, has 95 MB.
pub(super) const TARBALL_LIMIT_BYTES: u64 = 256 << 20;
const UNPACK: UnpackLimits = UnpackLimits { files: 100_000, bytes: 2 << 30 };
const JSON_LIMIT_BYTES: u64 = 4 << 20;
/// The program ships this file, and its own lifecycle script removes it once nothing is left of older versions. A fresh
/// tree has nothing of those, so it is left out.
const LIFECYCLE_MARKER: &str = ".openclaw-lifecycle-pending";

/// What it is built from.
pub(super) struct Plan<'a> {
    pub(super) registry: &'a Registry,
    /// What npm chose.
    pub(super) packages: &'a [Found],
    /// Whether npm's word for a tarball's hash is enough. It is not where npm ran as somebody else than the one who
    /// will own the program: then the registry is asked again, by us.
    pub(super) believed: bool,
    /// The program's own tarball, proven.
    pub(super) tarball: &'a [u8],
}

/// Builds it at `to`, which is made anew. Returns how many packages it has.
pub(super) fn build(plan: &Plan<'_>, place: &Place, to: &Path, deadline: Deadline) -> Result<usize> {
    place.as_owner(|| {
        fresh(to)?;
        let mut packages = 0;
        let deepest = plan.packages.iter().map(|p| p.depth).max().unwrap_or(0);
        for depth in 0..=deepest {
            let level = plan.packages.iter().filter(|p| p.depth == depth);
            // What its parent's own tarball brought along is proven with the parent.
            let level: Vec<&Found> =
                level.filter(|p| depth == 0 || !to.join(&p.path).join("package.json").exists()).collect();
            packages += each(&level, WORKERS, |found| one(plan, found, to, deadline))?.len();
        }
        finish(to, plan.packages)?;
        Ok(packages)
    })
}

/// Fetches, proves and unpacks one package.
fn one(plan: &Plan<'_>, found: &Found, to: &Path, deadline: Deadline) -> Result<()> {
    let what = || format!("stage {}@{}", found.name, found.version);
    if deadline.passed() {
        return Err(Error::new(Kind::TimedOut, what(), "the time is up"));
    }
    if found.depth == 0 {
        return unpack(found, plan.tarball, to);
    }
    let package = match found.package().filter(|_| plan.believed) {
        Some(package) => package,
        None => plan.registry.resolve(&found.name, &found.version, deadline)?,
    };
    unpack(found, &plan.registry.fetch(&package, TARBALL_LIMIT_BYTES, deadline)?, to)
}

fn unpack(found: &Found, proven: &[u8], to: &Path) -> Result<()> {
    let name = PathBuf::from(format!("{}@{}", found.name, found.version));
    unpack_from(&name, proven, &to.join(&found.path), 1, UNPACK, &mut |_, _| {}).map(|_| ())
}

/// Removes a stage and its notes.
pub(super) fn clear(to: &Path) -> Result<()> {
    let what = || format!("make the stage {}", to.display());
    let above = to.parent().unwrap_or(to);
    std::fs::create_dir_all(above).context(what)?;
    // What an earlier try left, its notes among it; a switch that is not settled was taken back before.
    for entry in std::fs::read_dir(above).context(what)?.flatten() {
        let path = entry.path();
        let same = to
            .file_name()
            .is_some_and(|n| entry.file_name().as_encoded_bytes().starts_with(n.as_encoded_bytes()));
        if same {
            let gone = if entry.file_type().is_ok_and(|t| t.is_dir()) {
                std::fs::remove_dir_all(&path)
            } else {
                std::fs::remove_file(&path)
            };
            gone.context(|| format!("clear {}", path.display()))?;
        }
    }
    Ok(())
}

fn fresh(to: &Path) -> Result<()> {
    let what = || format!("make the stage {}", to.display());
    clear(to)?;
    std::fs::create_dir(to).context(what)?;
    std::fs::set_permissions(to, std::fs::Permissions::from_mode(0o755)).context(what)
}

/// Runs `work` on each of `items` on a few threads, in any order; the first error ends it.
fn each<T: Sync, R: Send>(
    items: &[T],
    threads: usize,
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let done: Mutex<(Vec<R>, Option<Error>)> = Mutex::new((Vec::new(), None));
    std::thread::scope(|scope| {
        for _ in 0..threads.min(items.len()) {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = work(item);
                    let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                    match result {
                        Ok(r) if done.1.is_none() => done.0.push(r),
                        Ok(_) => return,
                        Err(e) => {
                            done.1.get_or_insert(e);
                            return;
                        }
                    }
                }
            });
        }
    });
    let (all, error) = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    match error {
        None => Ok(all),
        Some(e) => Err(e),
    }
}

/// Commands, the marker, and whether it holds together.
fn finish(to: &Path, packages: &[Found]) -> Result<()> {
    let mut known: BTreeMap<PathBuf, Value> = BTreeMap::new();
    for found in packages {
        let json = package_json(&to.join(&found.path))?;
        let text = |key: &str| json.get(key).and_then(Value::as_str);
        if text("name") != Some(&found.name) || text("version") != Some(&found.version) {
            return Err(Error::new(
                Kind::Corrupt,
                format!("stage {}", found.path.display()),
                format!(
                    "npm said {}@{}, its tarball says {}@{}",
                    found.name,
                    found.version,
                    text("name").unwrap_or("?"),
                    text("version").unwrap_or("?")
                ),
            ));
        }
        known.insert(found.path.clone(), json);
    }
    complete(&known)?;
    commands(to, &known)?;
    match std::fs::remove_file(to.join(LIFECYCLE_MARKER)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("remove {LIFECYCLE_MARKER}"), &e))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn package_json(dir: &Path) -> Result<Value> {
    let file = dir.join("package.json");
    let bytes = files::read_bounded(&file, JSON_LIMIT_BYTES)?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::new(Kind::Corrupt, format!("read {}", file.display()), e))
}

/// Every dependency is there, as Node would look for it, in a version that was asked for.
fn complete(known: &BTreeMap<PathBuf, Value>) -> Result<()> {
    for (path, json) in known {
        let optional = |name: &str| json.get("optionalDependencies").is_some_and(|o| o.get(name).is_some());
        for (name, wanted) in json.get("dependencies").and_then(Value::as_object).into_iter().flatten() {
            if optional(name) {
                continue;
            }
            let found = lookup(path, name, known);
            let why = match found.and_then(|j| j.get("version")).and_then(Value::as_str) {
                None => Some("is missing".to_owned()),
                Some(version) if unfit(wanted, version) => {
                    Some(format!("is {version}, asked for is {wanted}"))
                }
                Some(_) => None,
            };
            if let Some(why) = why {
                let who = if path.as_os_str().is_empty() {
                    "the program".into()
                } else {
                    path.display().to_string()
                };
                return Err(Error::new(
                    Kind::Corrupt,
                    format!("check what {who} depends on"),
                    format!("{name} {why}"),
                ));
            }
        }
    }
    Ok(())
}

/// Nearest first, as Node resolves.
fn lookup<'a>(from: &Path, name: &str, known: &'a BTreeMap<PathBuf, Value>) -> Option<&'a Value> {
    from.ancestors().find_map(|at| known.get(&at.join("node_modules").join(name)))
}

/// Ranges of pre-releases have rules of their own, which are npm's business.
fn unfit(wanted: &Value, version: &str) -> bool {
    let Some(wanted) = wanted.as_str().filter(|w| !w.contains('-')) else { return false };
    if version.contains('-') {
        return false;
    }
    range::Version::parse(version).is_some_and(|v| range::satisfies(wanted, v) == Some(false))
}

/// A package's commands: name and file below it.
fn commands_of(json: &Value) -> BTreeMap<String, PathBuf> {
    let own =
        || json.get("name").and_then(Value::as_str).and_then(|n| n.rsplit('/').next()).map(str::to_owned);
    let named = match json.get("bin") {
        Some(Value::String(file)) => own().map(|name| (name, file.clone())).into_iter().collect(),
        Some(Value::Object(all)) => {
            all.iter().filter_map(|(n, f)| Some((n.clone(), f.as_str()?.to_owned()))).collect::<Vec<_>>()
        }
        Some(Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_)) | None => Vec::new(),
    };
    let sane = |name: &str| {
        !name.is_empty() && name.len() <= 214 && !name.starts_with('.') && !name.contains(['/', '\0'])
    };
    named
        .into_iter()
        .filter(|(n, _)| sane(n))
        .filter_map(|(n, file)| Some((n, within(Path::new(&file))?)))
        .collect()
}

/// A path that stays where it begins, without `.` and `..`.
fn within(path: &Path) -> Option<PathBuf> {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::CurDir => {}
            Component::ParentDir => {
                if !out.pop() {
                    return None;
                }
            }
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    (!out.as_os_str().is_empty()).then_some(out)
}

/// Links every package's commands beside it, as npm does; the program's own are linked in the prefix. Of two packages
/// with one command the first by name gets it.
fn commands(to: &Path, known: &BTreeMap<PathBuf, Value>) -> Result<()> {
    for (path, json) in known {
        for (name, file) in commands_of(json) {
            executable(&to.join(path).join(&file))?;
            let Some(modules) = path.ancestors().find(|a| a.file_name().is_some_and(|n| n == "node_modules"))
            else {
                continue;
            };
            let Ok(below) = path.strip_prefix(modules) else { continue };
            let bin = to.join(modules).join(".bin");
            let what = || format!("link the command {name}");
            std::fs::create_dir_all(&bin).context(what)?;
            match std::os::unix::fs::symlink(Path::new("..").join(below).join(&file), bin.join(&name)) {
                Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(Error::io(what(), &e)),
                Ok(()) | Err(_) => {}
            }
        }
    }
    Ok(())
}

/// npm makes commands executable and takes a carriage return out of their first line, which no kernel understands.
fn executable(file: &Path) -> Result<()> {
    /// Longer scripts are left as they are: a command's first file is small.
    const SCRIPT_LIMIT_BYTES: u64 = 8 << 20;
    let what = || format!("make {} a command", file.display());
    // An entry that a package forgot to ship is its own business, and npm's.
    let Ok(meta) = file.symlink_metadata() else { return Ok(()) };
    if !meta.is_file() {
        return Ok(());
    }
    if meta.len() <= SCRIPT_LIMIT_BYTES {
        let bytes = files::read_bounded(file, SCRIPT_LIMIT_BYTES)?;
        let end = bytes.iter().position(|b| *b == b'\n');
        if let Some(end) = end.filter(|end| bytes.starts_with(b"#!") && *end > 0 && bytes[*end - 1] == b'\r')
        {
            let mut right = bytes[..end - 1].to_vec();
            right.extend_from_slice(&bytes[end..]);
            std::fs::write(file, right).context(what)?;
        }
    }
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o755)).context(what)
}

/// The fetched runtime's tarball, proven when it was fetched into a directory of ours, unpacked beside the runtime that it
/// replaces.
pub(super) fn runtime(place: &Place, from: &Path) -> Result<PathBuf> {
    let to = place.stages.join("runtime");
    // Only we may open it; who unpacks it is whose program it is.
    let tarball = std::fs::File::open(from).context(|| format!("open {}", from.display()))?;
    place.as_owner(|| {
        clear(&to)?;
        unpack_from(from, tarball, &to, 1, UNPACK, &mut |_, _| {}).map(|_| ())
    })?;
    Ok(to)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn known(all: &[(&str, Value)]) -> BTreeMap<PathBuf, Value> {
        all.iter().map(|(p, j)| (PathBuf::from(p), j.clone())).collect()
    }

    #[test]
    fn a_half_tree_is_found_out_by_what_it_depends_on() {
        let program = json!({"dependencies": {"a": "^1.2.0", "o": "1"}, "optionalDependencies": {"o": "1"}});
        let a = |v: &str| json!({"version": v, "dependencies": {"b": "2"}});
        let b = json!({"version": "2.9.0"});
        let whole =
            known(&[("", program.clone()), ("node_modules/a", a("1.3.0")), ("node_modules/b", b.clone())]);
        complete(&whole).unwrap();
        let nested = known(&[
            ("", program.clone()),
            ("node_modules/a", a("1.3.0")),
            ("node_modules/a/node_modules/b", b.clone()),
        ]);
        complete(&nested).unwrap();
        let half = known(&[("", program.clone()), ("node_modules/a", a("1.3.0"))]);
        assert!(complete(&half).unwrap_err().why.contains("b is missing"));
        let old = known(&[("", program), ("node_modules/a", a("1.1.0")), ("node_modules/b", b)]);
        assert!(complete(&old).unwrap_err().why.contains("a is 1.1.0"));
    }

    #[test]
    fn a_packages_commands_are_linked_and_lead_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let cli = dir.path().join("node_modules/@s/a/cli.js");
        std::fs::create_dir_all(cli.parent().unwrap()).unwrap();
        std::fs::write(&cli, "#!/usr/bin/env node\r\nrest\r\n").unwrap();
        let bin = json!({"good": "./cli.js", "up": "../../../../etc/passwd", "root": "/etc/passwd", "../x": "cli.js", "own": "a/../cli.js"});
        let known = known(&[("", json!({})), ("node_modules/@s/a", json!({"name": "@s/a", "bin": bin}))]);
        commands(dir.path(), &known).unwrap();
        let mut names: Vec<String> = std::fs::read_dir(dir.path().join("node_modules/.bin"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["good", "own"]);
        let link = dir.path().join("node_modules/.bin/good");
        assert_eq!(std::fs::read_link(&link).unwrap(), Path::new("../@s/a/cli.js"));
        assert_eq!(std::fs::read(&link).unwrap(), b"#!/usr/bin/env node\nrest\r\n");
        assert_eq!(cli.metadata().unwrap().permissions().mode() & 0o777, 0o755);
        assert!(!dir.path().join("node_modules/x").exists());
    }

    // ---- against a registry on the loopback ----

    use super::super::lock;
    use crate::install::{Order, Place};
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use host::registry::Integrity;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    fn tgz(files: &[(&str, &str)]) -> Vec<u8> {
        let mut tar = Vec::new();
        for (name, text) in files {
            let mut head = [0_u8; 512];
            let path = format!("package/{name}");
            head[..path.len()].copy_from_slice(path.as_bytes());
            head[100..108].copy_from_slice(b"0000644\0");
            head[124..136].copy_from_slice(format!("{:011o}\0", text.len()).as_bytes());
            head[148..156].copy_from_slice(b"        ");
            head[156] = b'0';
            head[257..265].copy_from_slice(b"ustar\x0000");
            let sum: u32 = head.iter().map(|b| u32::from(*b)).sum();
            head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            tar.extend_from_slice(&head);
            tar.extend_from_slice(text.as_bytes());
            tar.resize(tar.len().next_multiple_of(512), 0);
        }
        tar.extend_from_slice(&[0; 1024]);
        let mut gz = GzEncoder::new(Vec::new(), Compression::fast());
        gz.write_all(&tar).unwrap();
        gz.finish().unwrap()
    }

    #[test]
    fn a_runtime_that_only_we_may_read_becomes_the_users_as_root() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let tools = dir.path().join("tools");
        files::make_private_dir(&tools).unwrap();
        let tarball = tools.join("node.tgz");
        std::fs::write(&tarball, tgz(&[("bin/node", "\u{7f}ELF")])).unwrap();
        let stages = dir.path().join("stages");
        std::fs::create_dir(&stages).unwrap();
        let user = host::run::Ids { uid: 54_031, gid: 54_031 };
        std::os::unix::fs::chown(&stages, Some(user.uid), Some(user.gid)).unwrap();
        let place = Place { builder: user, owner: user, rc_home: None, stages };
        let made = runtime(&place, &tarball).unwrap().join("bin/node");
        let meta = made.metadata().unwrap();
        assert_eq!((std::os::unix::fs::MetadataExt::uid(&meta), meta.len()), (user.uid, 4));
    }

    /// What the registry on the loopback does with the dependency.
    #[derive(Clone, Copy, PartialEq)]
    enum Mood {
        Honest,
        /// Other bytes than it promised.
        Liar,
        /// Another version inside than outside.
        Mislabels,
        /// Accepts and never answers.
        Silent,
    }

    fn dependency(mood: Mood) -> Vec<u8> {
        let version = if mood == Mood::Mislabels { "1.0.1" } else { "1.0.0" };
        tgz(&[
            ("package.json", &format!(r#"{{"name":"dep","version":"{version}","bin":"cli.js"}}"#)),
            ("cli.js", "#!/usr/bin/env node\n"),
        ])
    }

    fn serve(mut stream: TcpStream, mood: Mood, port: u16) -> std::io::Result<()> {
        if mood == Mood::Silent {
            std::thread::sleep(Duration::from_secs(3));
            return Ok(());
        }
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut first = String::new();
        reader.read_line(&mut first)?;
        let mut line = String::new();
        while reader.read_line(&mut line)? > 2 {
            line.clear();
        }
        let body = if first.contains(".tgz") {
            dependency(mood)
        } else {
            let promised = dependency(if mood == Mood::Liar { Mood::Mislabels } else { mood });
            json!({"name": "dep", "version": "1.0.0", "dist": {
                "tarball": format!("http://127.0.0.1:{port}/dep.tgz"),
                "integrity": Integrity::of(&promised).to_string()}})
            .to_string()
            .into_bytes()
        };
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
        stream.write_all(&body)
    }

    fn staged(mood: Mood, wanted: &str) -> (tempfile::TempDir, PathBuf, Result<usize>) {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for stream in listener.incoming().take(64).flatten() {
                std::thread::spawn(move || serve(stream, mood, port));
            }
        });
        let rc = dir.path().join("npmrc");
        std::fs::write(&rc, format!("registry=http://127.0.0.1:{port}/\n")).unwrap();
        let registry = Registry::with_env(&Vec::new().into_iter().collect(), None, &[rc]).unwrap();
        let program = json!({"name": "openclaw", "version": "2026.9.6", "dependencies": {"dep": wanted}});
        let tarball = tgz(&[("package.json", &program.to_string()), (LIFECYCLE_MARKER, "")]);
        let lock = dir.path().join("package-lock.json");
        let packages = json!({"packages": {"": {}, "node_modules/dep": {"version": "1.0.0"}}});
        std::fs::write(&lock, packages.to_string()).unwrap();
        let package = host::registry::Package {
            name: "openclaw".into(),
            version: "2026.9.6".into(),
            tarball_url: String::new(),
            integrity: Integrity::of(&tarball),
            engines_node: None,
            unpacked_size: None,
        };
        let found = lock::answer(&lock, &package).unwrap();
        let prefix = dir.path().join("prefix");
        std::fs::create_dir(&prefix).unwrap();
        let node: node::Node = serde_json::from_value(json!({
            "name": "t", "prefix": prefix, "package_dir": prefix.join("lib/node_modules/openclaw"), "entry": "/e",
            "node_bin": "/n", "home": dir.path(), "state_dir": "/s", "config_path": "/c", "port": 1,
            "ids": host::run::Ids::current(), "user": "t"
        }))
        .unwrap();
        let order = Order {
            version: "2026.9.6".into(),
            integrity: None,
            state_dir: dir.path().to_owned(),
            scratch: None,
            npm_limit: Duration::from_secs(1),
            layer: engine::Layer::SystemInstall,
        };
        let place = Place::of(&node, &order).unwrap();
        let to = dir.path().join("stages/program");
        let plan = Plan { registry: &registry, packages: &found, believed: false, tarball: &tarball };
        let done = build(&plan, &place, &to, Deadline::after(Duration::from_secs(2)));
        (dir, to, done)
    }

    #[test]
    fn an_honest_registry_gives_a_whole_stage() {
        let (_dir, to, done) = staged(Mood::Honest, "^1.0.0");
        assert_eq!(done.unwrap(), 2);
        assert!(to.join("node_modules/dep/cli.js").is_file());
        assert!(to.join("node_modules/.bin/dep").is_file());
        assert!(!to.join(LIFECYCLE_MARKER).exists());
    }

    #[test]
    fn lies_silence_and_wrong_versions_are_failures_with_their_reason() {
        for (mood, wanted, why) in [
            (Mood::Liar, "^1.0.0", "expected sha512"),
            (Mood::Mislabels, "^1.0.0", "its tarball says dep@1.0.1"),
            (Mood::Honest, "^2.0.0", "dep is 1.0.0, asked for is"),
            (Mood::Silent, "^1.0.0", "time"),
        ] {
            let began = host::clock::now();
            let (_dir, _, done) = staged(mood, wanted);
            let e = done.unwrap_err();
            assert!(e.why.contains(why), "{e}");
            assert!(host::clock::now().since_ms(began).unwrap() < 10_000, "{e}");
        }
    }
}
