//! From a pinned version to a proven stage: tools, npm, tarballs, trial.

use super::place::Place;
use super::tools::Tools;
use super::{Order, Ready, lock, place, stage, trial};
use crate::Bench;
use crate::Report;
use host::clock::Deadline;
use host::registry::{Package, Registry};
use host::run::{Cmd, Ids, Output, run};
use host::unpack::read_file;
use host::user::as_user;
use host::{Context, Error, Kind, Result};
use node::Node;
use node::gates::{self, Gate};
use serde_json::Value;
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// npm's cache and the tools, unpacked, with room to spare.
const SCRATCH_BYTES: u64 = 400 << 20;
/// The stage: 545 MB in 38,000 files take 650 MB on disk.
const STAGE_BYTES: u64 = 700 << 20;
/// npm takes 250 MB to resolve this tree; what it may take of V8's heap, so that a mistake ends npm and not the machine.
const HEAP_MB: u32 = 768;
/// Less memory than this available, and npm would push out what still works.
const MEMORY_BYTES: u64 = 900 << 20;
/// npm's own patience with one answer; its default of five minutes is more than the whole layer has.
const FETCH_TIMEOUT_MS: u32 = 30_000;
/// The largest real `package.json` has 143 KB.
const JSON_LIMIT_BYTES: u64 = 4 << 20;
/// What of npm's words is kept.
const WORDS_CHARS: usize = 300;

#[allow(clippy::too_many_arguments, reason = "the same few things that everything here is about")]
pub(super) fn build(
    bench: &Bench<'_>,
    target: &Node,
    order: &Order,
    place: &Place,
    base: &Path,
    registry: &Registry,
    package: &Package,
    report: &mut Report,
) -> Result<Ready> {
    let deadline = bench.deadline;
    room(target, base)?;
    let began = host::clock::now();
    let tools = Tools::get(target, order, place, registry, package, &base.join("tools"), deadline, report)?;
    let tarball = registry.fetch(package, stage::TARBALL_LIMIT_BYTES, deadline)?;
    let took_s = host::clock::now().since_ms(began).unwrap_or(0) as f64 / 1000.0;
    report.did(format!("tools and the program's own tarball are at hand after {took_s:.1} s"));
    let json = package_json(package, &tarball)?;
    let (brought, more) = brought(package, &json, &tarball)?;
    let question = lock::question(&json, &more);
    let scratch = Scratch::make(base, place.builder, &registry.npmrc(), &question)?;
    let began = host::clock::now();
    let npm_limit = bench.limits.span(order.npm_limit);
    let out = npm(&tools, &scratch, place, deadline.min(Deadline::after(npm_limit)))?;
    let took_s = host::clock::now().since_ms(began).unwrap_or(0) as f64 / 1000.0;
    if out.timed_out {
        return Err(Error::new(
            Kind::TimedOut,
            "run npm",
            format!("it had not ended after {took_s:.0} s and was killed"),
        )
        .hint("is the registry reachable from here, and fast enough?"));
    }
    // Its exit code is for people; what counts is its answer.
    let mut packages = lock::answer(&scratch.dir.join("work/package-lock.json"), package)
        .map_err(|e| Error { why: format!("{} (npm said: {})", e.why, words(&out)), ..e })?;
    packages.retain(|p| brought.iter().all(|b| b.path != p.path));
    packages.extend(brought);
    packages.sort_by(|a, b| (a.depth, &a.path).cmp(&(b.depth, &b.path)));
    report.did(format!("npm chose {} packages in {took_s:.1} s", packages.len()));
    let began = host::clock::now();
    let to = place.stages.join("program");
    let believed = place.builder == place.owner;
    let plan = stage::Plan { registry, packages: &packages, believed, tarball: &tarball };
    let count = stage::build(&plan, place, &to, deadline)?;
    let staged = Node { package_dir: to.clone(), ..target.clone() };
    if !node::triage::program_is_whole(&staged) {
        return Err(Error::new(
            Kind::Corrupt,
            format!("stage {} {}", package.name, package.version),
            "it is no whole program",
        )
        .hint("this release may be broken, or another package is served under its name"));
    }
    let took_s = host::clock::now().since_ms(began).unwrap_or(0) as f64 / 1000.0;
    report.did(format!("{count} tarballs fetched, proven and staged in {took_s:.1} s"));
    schema(target, &to, deadline)?;
    trial::run(target, place, &tools.node, &scratch, &to, deadline, report)?;
    let runtime = tools.fetched.as_deref().map(|tarball| stage::runtime(place, tarball)).transpose()?;
    Ok(Ready { program: to, runtime, version: package.version.clone() })
}

/// The program's own description of itself, out of its proven tarball.
fn package_json(package: &Package, tarball: &[u8]) -> Result<Value> {
    let name = PathBuf::from(format!("{}@{}", package.name, package.version));
    let bytes = read_file(&name, tarball, Path::new("package.json"), JSON_LIMIT_BYTES)?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::new(Kind::Corrupt, format!("read what {} asks for", name.display()), e))
}

/// What a tarball brings along, and what that needs and is not brought: name and range.
type Brought = (Vec<lock::Found>, Vec<(String, Value)>);

/// The packages inside the program's own tarball.
fn brought(package: &Package, json: &Value, tarball: &[u8]) -> Result<Brought> {
    let name = PathBuf::from(format!("{}@{}", package.name, package.version));
    let read = |path: &Path| read_file(&name, tarball, &path.join("package.json"), JSON_LIMIT_BYTES);
    let (mut found, mut more) = (Vec::new(), Vec::new());
    for one in lock::bundled(json) {
        let path = Path::new("node_modules").join(&one);
        let own: Value = serde_json::from_slice(&read(&path)?)
            .map_err(|e| Error::new(Kind::Corrupt, format!("read what {one} is"), e))?;
        let version = own.get("version").and_then(Value::as_str).unwrap_or_default().to_owned();
        for (needs, range) in own.get("dependencies").and_then(Value::as_object).into_iter().flatten() {
            let places = [path.join("node_modules").join(needs), Path::new("node_modules").join(needs)];
            if places.iter().all(|p| read(p).is_err()) {
                more.push((needs.clone(), range.clone()));
            }
        }
        found.push(lock::Found { path, name: one, version, depth: 1, said: None });
    }
    Ok((found, more))
}

/// Memory and space, before anything is begun.
fn room(target: &Node, base: &Path) -> Result<()> {
    let what = "install the program";
    let available = host::pressure::available_bytes().unwrap_or(u64::MAX);
    if available < MEMORY_BYTES {
        return Err(Error::new(
            Kind::NoSpace,
            what,
            format!("{} MB of memory are available, npm needs {} MB", available >> 20, MEMORY_BYTES >> 20),
        ));
    }
    for (path, bytes) in [(base, SCRATCH_BYTES), (place::existing(&target.prefix), STAGE_BYTES)] {
        // npm runs as the node's user.
        if let Gate::Closed(why) = gates::space_for(path, bytes, target.ids.uid) {
            return Err(Error::new(Kind::NoSpace, what, why));
        }
    }
    Ok(())
}

/// An older program never meets a newer database.
fn schema(target: &Node, stage: &Path, deadline: Deadline) -> Result<()> {
    let staged = Node { package_dir: stage.to_owned(), ..target.clone() };
    let Some(schemas) = staged.schema_versions() else { return Ok(()) };
    match gates::schema(target, schemas, deadline) {
        Gate::Open => Ok(()),
        Gate::Closed(why) => Err(Error::new(Kind::Denied, "use this version", why)
            .hint("a newer version wrote the data; only that one or a newer one may open it")),
    }
}

/// The builder's own directories.
pub(super) struct Scratch {
    pub(super) dir: PathBuf,
}

impl Scratch {
    fn make(base: &Path, builder: Ids, npmrc: &str, question: &Value) -> Result<Scratch> {
        let dir = base.join("npm");
        let what = || format!("make {}", dir.display());
        std::fs::create_dir(&dir).context(what)?;
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).context(what)?;
        if builder != Ids::current() {
            std::os::unix::fs::chown(&dir, Some(builder.uid), Some(builder.gid)).context(what)?;
        }
        let scratch = Scratch { dir };
        as_user(builder, || {
            for name in ["work", "cache", "home", "tmp", "trial"] {
                let below = scratch.dir.join(name);
                std::fs::create_dir(&below).context(|| format!("make {}", below.display()))?;
            }
            let asked = question.to_string();
            host::files::write_atomic(&scratch.dir.join("work/package.json"), asked.as_bytes(), 0o600)?;
            host::files::write_atomic(&scratch.dir.join("home/.npmrc"), npmrc.as_bytes(), 0o600)
        })?;
        Ok(scratch)
    }
}

fn npm(tools: &Tools, scratch: &Scratch, place: &Place, deadline: Deadline) -> Result<Output> {
    let dir = |name: &str| scratch.dir.join(name).into_os_string();
    let mut args: Vec<OsString> = vec![tools.npm.clone().into()];
    args.extend(["install", "--package-lock-only"].map(OsString::from));
    for (option, value) in [
        ("--cache", dir("cache")),
        ("--userconfig", dir("home/.npmrc")),
        ("--globalconfig", "/dev/null".into()),
        ("--fetch-timeout", FETCH_TIMEOUT_MS.to_string().into()),
        ("--fetch-retries", "2".into()),
    ] {
        args.extend([option.into(), value]);
    }
    // No package's code runs here.
    args.extend(
        [
            "--ignore-scripts",
            "--no-audit",
            "--no-fund",
            "--no-update-notifier",
            "--loglevel=error",
            "--no-progress",
        ]
        .map(OsString::from),
    );
    let cmd = Cmd {
        program: tools.node.clone().into(),
        args,
        env: environment(&tools.node, scratch),
        env_clear: true,
        cwd: Some(scratch.dir.join("work")),
        ids: (place.builder != Ids::current()).then_some(place.builder),
        shut_in: true,
        ..Cmd::default()
    };
    run(&cmd, deadline)
}

/// Nothing of ours but the way to the network.
pub(super) fn environment(node: &Path, scratch: &Scratch) -> Vec<(OsString, OsString)> {
    const PASSED: [&str; 14] = [
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "no_proxy",
        "NODE_EXTRA_CA_CERTS",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "LANG",
        "LC_ALL",
        host::clock::DEADLINE_ENV,
    ];
    let mut env: Vec<(OsString, OsString)> =
        std::env::vars_os().filter(|(key, _)| key.to_str().is_some_and(|k| PASSED.contains(&k))).collect();
    let mut path = node.parent().unwrap_or(Path::new("/usr/bin")).as_os_str().to_owned();
    path.push(":/usr/local/bin:/usr/bin:/bin");
    env.push(("PATH".into(), path));
    env.push(("HOME".into(), scratch.dir.join("home").into()));
    env.push(("TMPDIR".into(), scratch.dir.join("tmp").into()));
    env.push(("NODE_OPTIONS".into(), format!("--max-old-space-size={HEAP_MB}").into()));
    if let Some(mark) = std::env::var_os(host::container::MARK_ENV) {
        env.push((host::container::MARK_ENV.into(), mark));
    }
    env
}

/// The first of npm's words that say something.
fn words(out: &Output) -> String {
    let text = String::from_utf8_lossy(&out.stderr);
    let lines: Vec<&str> = text.lines().filter(|l| l.starts_with("npm error")).take(3).collect();
    let said: String = lines.join("; ").chars().filter(|c| !c.is_control()).take(WORDS_CHARS).collect();
    match (said.is_empty(), out.status, out.signal) {
        (false, _, _) => said,
        (true, Some(code), _) => format!("nothing, exit code {code}"),
        (true, None, Some(signal)) => format!("nothing, ended by signal {signal}"),
        (true, None, None) => "nothing".to_owned(),
    }
}
