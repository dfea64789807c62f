//! Finds nodes wherever npm, a version manager or a package manager put them, and says how.
//!
//! A node is its state directory: units, running gateways and the directories themselves name states, and for each
//! the program is then taken from the strongest witness: the unit's own command, the running process, the `openclaw`
//! on PATH, the known layouts. Nothing is run; several nodes are never guessed between.

use crate::units::{self, Spec};
use crate::{Node, Scope, Unit, config, lock, package_json};
use host::error::{Error, Kind, Result};
use host::files::read_bounded;
use host::process::{ProcessId, all_pids, descendants};
use host::run::Ids;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Accounts whose homes are searched.
const USERS_LIMIT: usize = 256;
/// Entries of one directory that are searched (versions of a version manager, profiles in a home).
const ENTRIES_LIMIT: usize = 2_048;
const ACCOUNTS_LIMIT_BYTES: u64 = 4 << 20;
const RC_LIMIT_BYTES: u64 = 256 << 10;
/// People's accounts begin here on every common distribution.
const FIRST_PERSON_UID: u32 = 1_000;

/// What the caller knows already. Every field narrows the search.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hint {
    /// The node's name or profile.
    pub name: Option<String>,
    /// The npm prefix or package directory.
    pub prefix: Option<PathBuf>,
    /// The Node binary.
    pub node_bin: Option<PathBuf>,
    /// The home directory.
    pub home: Option<PathBuf>,
    /// The state directory.
    pub state_dir: Option<PathBuf>,
    /// The config file.
    pub config_path: Option<PathBuf>,
    /// The port.
    pub port: Option<u16>,
    /// The user it runs as.
    pub user: Option<String>,
    /// The unit that runs it.
    pub unit: Option<String>,
}

/// A node, how it was found, and what else was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The node.
    pub node: Node,
    /// One plain sentence for each thing that was found out.
    pub how: Vec<String>,
    /// Other installations of the program that were seen and not taken, in words.
    pub others: Vec<String>,
}

/// Finds the one node that the hint allows. None and several are errors that say what to do.
pub fn find(hint: &Hint) -> Result<Found> {
    find_in(hint, &World::real(hint))
}

/// Every node on this machine that we may look at.
#[must_use]
pub fn find_all(hint: &Hint) -> Vec<Found> {
    search(hint, &World::real(hint)).0
}

/// A person or service account.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Account {
    name: String,
    ids: Ids,
    home: PathBuf,
}

/// Where to look: the machine, or a directory that stands for one in a test.
struct World {
    /// Put before every system path.
    root: PathBuf,
    accounts: Vec<Account>,
    /// PATH and the variables of our own environment, which count for our own account only.
    path: Vec<PathBuf>,
    env: BTreeMap<String, String>,
    own_uid: u32,
    /// Whether `/proc` tells of this world.
    processes: bool,
}

impl World {
    fn real(hint: &Hint) -> World {
        let own_uid = Ids::current().uid;
        let mut accounts = accounts();
        if own_uid != 0 {
            accounts.retain(|a| a.ids.uid == own_uid);
        }
        let env: BTreeMap<String, String> = std::env::vars().collect();
        for home in [hint.home.clone(), env.get("HOME").map(PathBuf::from)].into_iter().flatten() {
            if accounts.iter().all(|a| a.home != home)
                && let Some(account) = account_of_home(&home, &accounts, own_uid)
            {
                accounts.insert(0, account);
            }
        }
        let path = env.get("PATH").map(|p| std::env::split_paths(p).collect()).unwrap_or_default();
        World { root: PathBuf::from("/"), accounts, path, env, own_uid, processes: true }
    }

    fn system(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }
}

fn accounts() -> Vec<Account> {
    let text = read_bounded(Path::new("/etc/passwd"), ACCOUNTS_LIMIT_BYTES).unwrap_or_default();
    let parse = |line: &str| -> Option<Account> {
        let mut f = line.split(':');
        let (name, _, uid, gid) = (f.next()?, f.next()?, f.next()?.parse().ok()?, f.next()?.parse().ok()?);
        let home = PathBuf::from(f.nth(1)?);
        Some(Account { name: name.to_owned(), ids: Ids { uid, gid }, home })
    };
    let lives = |a: &Account| {
        let person = a.ids.uid == 0 || a.ids.uid >= FIRST_PERSON_UID || a.home.join(".openclaw").exists();
        person && a.home.is_dir() && a.home != Path::new("/")
    };
    String::from_utf8_lossy(&text).lines().filter_map(parse).filter(lives).take(USERS_LIMIT).collect()
}

/// A home that no account names (a container's, a demo's) belongs to the owner of the directory.
fn account_of_home(home: &Path, known: &[Account], own_uid: u32) -> Option<Account> {
    let meta = std::fs::metadata(home).ok().filter(std::fs::Metadata::is_dir)?;
    if own_uid != 0 && meta.uid() != own_uid {
        return None;
    }
    let name = known
        .iter()
        .find(|a| a.ids.uid == meta.uid())
        .map_or_else(|| meta.uid().to_string(), |a| a.name.clone());
    Some(Account { name, ids: Ids { uid: meta.uid(), gid: meta.gid() }, home: home.to_path_buf() })
}

fn find_in(hint: &Hint, world: &World) -> Result<Found> {
    let what = "finding the OpenClaw node";
    let (mut all, bare) = search(hint, world);
    match all.len() {
        1 => Ok(all.remove(0)),
        0 => Err(none_found(hint, world, &bare)),
        n => {
            let list: Vec<String> = all.iter().map(|f| one_line(&f.node)).collect();
            Err(Error::new(Kind::Usage, what, format!("there are {n} nodes: {}", list.join("; ")))
                .hint("choose one by its state directory (--state-dir), its profile (--profile) or its port (--port)"))
        }
    }
}

fn one_line(node: &Node) -> String {
    format!("{} ({}, port {}, user {})", node.name, node.state_dir.display(), node.port, node.user)
}

fn none_found(hint: &Hint, world: &World, bare: &[PathBuf]) -> Error {
    let mut installs = Vec::new();
    for account in &world.accounts {
        installs.extend(installs_of(account, world));
    }
    let homes: Vec<String> = world.accounts.iter().map(|a| a.home.display().to_string()).take(8).collect();
    let searched = format!("looked at units, running gateways and state directories of {}", homes.join(", "));
    let error = Error::new(Kind::NotFound, "finding the OpenClaw node", "");
    if let Some(state) = bare.first() {
        let why =
            format!("the state {} is here, but neither its program nor a Node to run it", state.display());
        return Error { why, ..error }
            .hint("name the npm prefix (--prefix) and the Node binary (--node) it used");
    }
    match installs.first() {
        _ if *hint != Hint::default() => {
            Error { why: format!("nothing fits what was asked for ({searched})"), ..error }
                .hint("ask for less, or check the path, profile, port or user that was given")
        }
        Some(install) => Error {
            why: format!(
                "OpenClaw is installed in {} but no node was set up ({searched})",
                install.package.display()
            ),
            ..error
        }
        .hint("run `openclaw onboard` as the user who is to own the node"),
        None => Error { why: format!("none is here ({searched})"), ..error }
            .hint("install OpenClaw first, or name its state directory with --state-dir"),
    }
}

/// A copy of the program.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Install {
    package: PathBuf,
    node_bin: Option<PathBuf>,
    how: String,
}

/// A state directory and who spoke of it.
#[derive(Debug, Clone)]
struct Candidate {
    account: Account,
    state_dir: PathBuf,
    config: Option<PathBuf>,
    port: Option<u16>,
    profile: Option<String>,
    spec: Option<Spec>,
    running: Option<ProcessId>,
    env: BTreeMap<String, String>,
    how: Vec<String>,
}

/// The nodes, and the state directories whose program could not be found.
fn search(hint: &Hint, world: &World) -> (Vec<Found>, Vec<PathBuf>) {
    let mut candidates: Vec<Candidate> = Vec::new();
    for account in &world.accounts {
        if hint.user.as_ref().is_some_and(|u| *u != account.name && *u != account.ids.uid.to_string()) {
            continue;
        }
        for spec in unit_specs(account, world) {
            if let Some(candidate) = of_unit(account, spec, world) {
                add(&mut candidates, candidate);
            }
        }
        for candidate in of_directories(account, hint, world) {
            add(&mut candidates, candidate);
        }
    }
    if world.processes {
        for candidate in of_processes(world) {
            add(&mut candidates, candidate);
        }
    }
    let mut bare = Vec::new();
    let mut found = Vec::new();
    for candidate in candidates {
        let state_dir = candidate.state_dir.clone();
        match complete(candidate, hint, world) {
            Some(one) if fits(&one.node, hint) => found.push(one),
            Some(_) => {}
            None => bare.push(state_dir),
        }
    }
    (found, bare)
}

/// Two witnesses of one state directory are one node; what the earlier one did not know, the later one adds.
fn add(all: &mut Vec<Candidate>, new: Candidate) {
    let key = |p: &Path| p.canonicalize().unwrap_or_else(|_| p.to_path_buf());
    match all.iter_mut().find(|c| key(&c.state_dir) == key(&new.state_dir)) {
        None => all.push(new),
        Some(old) => {
            old.config = old.config.take().or(new.config);
            old.port = old.port.or(new.port);
            old.profile = old.profile.take().or(new.profile);
            old.spec = old.spec.take().or(new.spec);
            old.running = old.running.or(new.running);
            for (k, v) in new.env {
                old.env.entry(k).or_insert(v);
            }
            old.how.extend(new.how);
        }
    }
}

fn unit_specs(account: &Account, world: &World) -> Vec<Spec> {
    let mut user_dirs =
        vec![account.home.join(".config/systemd/user"), account.home.join(".local/share/systemd/user")];
    user_dirs.extend(
        ["/etc/systemd/user", "/usr/local/lib/systemd/user", "/usr/lib/systemd/user"]
            .map(|d| world.system(d)),
    );
    let mut specs = units::gateways(&user_dirs, Scope::User, &account.home);
    let system_dirs = [
        "/etc/systemd/system",
        "/run/systemd/system",
        "/usr/local/lib/systemd/system",
        "/usr/lib/systemd/system",
    ]
    .map(|d| world.system(d));
    let of_system = units::gateways(&system_dirs, Scope::System, &account.home);
    specs.extend(of_system.into_iter().filter(|s| match &s.user {
        Some(user) => *user == account.name || *user == account.ids.uid.to_string(),
        None => account.ids.uid == 0,
    }));
    specs
}

fn of_unit(account: &Account, spec: Spec, _world: &World) -> Option<Candidate> {
    let get = |k: &str| spec.env.get(k).filter(|v| !v.trim().is_empty()).cloned();
    let home =
        get("OPENCLAW_HOME").or_else(|| get("HOME")).map_or_else(|| account.home.clone(), PathBuf::from);
    let profile =
        get("OPENCLAW_PROFILE").or_else(|| argument(&spec.exec, "--profile")).and_then(profile_name);
    let profile = profile.or_else(|| {
        let suffix = spec.name.strip_suffix(".service")?.strip_prefix("openclaw-gateway-")?;
        spec.masked.then(|| suffix.to_owned())
    });
    let state_dir = get("OPENCLAW_STATE_DIR")
        .map_or_else(|| default_state(&home, profile.as_deref()), |s| tilde(&s, &home));
    let how = vec![format!(
        "the {} unit {} ({}) starts it",
        match spec.scope {
            Scope::User => "user",
            Scope::System => "system",
        },
        spec.name,
        spec.files.first().map(|f| f.display().to_string()).unwrap_or_default()
    )];
    let port = argument(&spec.exec, "--port").and_then(|p| p.parse().ok());
    let port = port.or_else(|| get("OPENCLAW_GATEWAY_PORT").map(|p| config::port(None, Some(&p), None)));
    let account = Account { home, ..account.clone() };
    let mut env = spec.env.clone();
    env.retain(|k, _| keeps(k));
    Some(Candidate {
        config: get("OPENCLAW_CONFIG_PATH").map(|c| tilde(&c, &account.home)),
        account,
        state_dir,
        port,
        profile,
        spec: Some(spec),
        running: None,
        env,
        how,
    })
}

/// Environment that a start needs and that is no secret.
fn keeps(key: &str) -> bool {
    const WANTED: [&str; 12] = [
        "OPENCLAW_HOME",
        "OPENCLAW_STATE_DIR",
        "OPENCLAW_CONFIG_PATH",
        "OPENCLAW_PROFILE",
        "OPENCLAW_NO_AUTO_UPDATE",
        "OPENCLAW_NO_RESPAWN",
        "OPENCLAW_INCLUDE_ROOTS",
        "NODE_OPTIONS",
        "NODE_EXTRA_CA_CERTS",
        "TMPDIR",
        "LANG",
        "TZ",
    ];
    WANTED.contains(&key)
}

fn argument(argv: &[String], name: &str) -> Option<String> {
    let mut args = argv.iter();
    while let Some(arg) = args.next() {
        if arg == name {
            return args.next().cloned();
        }
        if let Some(value) = arg.strip_prefix(name).and_then(|r| r.strip_prefix('=')) {
            return Some(value.to_owned());
        }
    }
    None
}

fn profile_name(text: String) -> Option<String> {
    let plain = !text.eq_ignore_ascii_case("default")
        && text.len() <= 64
        && text.chars().next().is_some_and(|c| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    plain.then_some(text)
}

fn tilde(text: &str, home: &Path) -> PathBuf {
    match text.strip_prefix("~/") {
        Some(rest) => home.join(rest),
        None if text == "~" => home.to_path_buf(),
        None => PathBuf::from(text),
    }
}

/// The program's own rule: `.openclaw`, for a profile `.openclaw-<profile>`, the old name if only that exists.
fn default_state(home: &Path, profile: Option<&str>) -> PathBuf {
    if let Some(profile) = profile {
        return home.join(format!(".openclaw-{profile}"));
    }
    let (new, old) = (home.join(".openclaw"), home.join(".clawdbot"));
    if !new.exists() && old.exists() { old } else { new }
}

fn of_directories(account: &Account, hint: &Hint, world: &World) -> Vec<Candidate> {
    let mut dirs: Vec<(PathBuf, String)> = Vec::new();
    if let Some(dir) = &hint.state_dir {
        let owner = std::fs::metadata(dir).map(|m| m.uid());
        if owner.as_ref().map_or(account.ids.uid == world.own_uid, |u| *u == account.ids.uid) {
            dirs.push((dir.clone(), "its state directory was given".into()));
        }
    }
    if account.ids.uid == world.own_uid
        && let Some(dir) = world.env.get("OPENCLAW_STATE_DIR").filter(|d| !d.is_empty())
    {
        dirs.push((tilde(dir, &account.home), "OPENCLAW_STATE_DIR names its state".into()));
    }
    let entries = std::fs::read_dir(&account.home).into_iter().flatten().flatten().take(ENTRIES_LIMIT);
    let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    for name in names {
        let ours = name == ".openclaw" || name == ".clawdbot" || name.starts_with(".openclaw-");
        let dir = account.home.join(&name);
        if ours && looks_like_state(&dir) && !(name == ".clawdbot" && account.home.join(".openclaw").exists())
        {
            dirs.push((dir.clone(), format!("{} is a state directory", dir.display())));
        }
    }
    dirs.into_iter()
        .map(|(state_dir, how)| {
            let name = state_dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let home = state_dir.parent() == Some(account.home.as_path());
            let profile =
                name.strip_prefix(".openclaw-").filter(|_| home).map(str::to_owned).and_then(profile_name);
            let running = lock::read_file(&lock::path(&state_dir, account.ids.uid))
                .filter(|l| world.processes && l.uid == account.ids.uid && l.id.alive());
            let mut how = vec![how];
            how.extend(running.as_ref().map(|l| format!("its lock names the running gateway {}", l.id.pid)));
            Candidate {
                account: account.clone(),
                config: running.as_ref().map(|l| l.config_path.clone()).filter(|c| c.is_absolute()),
                port: running.as_ref().and_then(|l| l.port),
                running: running.map(|l| l.id),
                state_dir,
                profile,
                spec: None,
                env: BTreeMap::new(),
                how,
            }
        })
        .collect()
}

fn looks_like_state(dir: &Path) -> bool {
    ["openclaw.json", "clawdbot.json", "state", "agents"].iter().any(|n| dir.join(n).exists())
}

/// Gateways that hold a state lock open, wherever their state lies.
fn of_processes(world: &World) -> Vec<Candidate> {
    let mut found = Vec::new();
    for pid in all_pids() {
        let Some(id) = ProcessId::of(pid) else { continue };
        let Some(uid) = id.uid() else { continue };
        if world.own_uid != 0 && uid != world.own_uid {
            continue;
        }
        let files = id.open_files();
        let Some((_, file)) = files.iter().find(|(_, f)| f.ends_with("gateway.state.lock")) else { continue };
        let Some(held) = lock::read_file(file).filter(|l| l.id == id && l.uid == uid) else { continue };
        let Some(state_dir) = held.state_dir.clone() else { continue };
        let known = world.accounts.iter().find(|a| a.ids.uid == uid);
        let home = id.environ("HOME").map(|h| PathBuf::from(String::from_utf8_lossy(&h).into_owned()));
        let Some(home) = home.filter(|h| h.is_absolute()).or_else(|| known.map(|a| a.home.clone())) else {
            continue;
        };
        let gid = known.map_or_else(|| std::fs::metadata(&state_dir).map_or(uid, |m| m.gid()), |a| a.ids.gid);
        let name = known.map_or_else(|| uid.to_string(), |a| a.name.clone());
        let text = |k: &str| id.environ(k).map(|v| String::from_utf8_lossy(&v).into_owned());
        found.push(Candidate {
            account: Account { name, ids: Ids { uid, gid }, home },
            config: Some(held.config_path.clone()).filter(|c| c.is_absolute()),
            port: held.port,
            profile: text("OPENCLAW_PROFILE").and_then(profile_name),
            state_dir,
            spec: None,
            running: Some(id),
            env: BTreeMap::new(),
            how: vec![format!("process {pid} holds the state lock {}", file.display())],
        });
    }
    found
}

/// Gives a candidate its program, runtime and port.
fn complete(mut c: Candidate, hint: &Hint, world: &World) -> Option<Found> {
    let mut installs: Vec<Install> = Vec::new();
    if let Some(prefix) = &hint.prefix {
        let package = if prefix.join("package.json").is_file() || prefix.ends_with("openclaw") {
            prefix.clone()
        } else {
            prefix.join("lib/node_modules/openclaw")
        };
        installs.push(Install { package, node_bin: None, how: "the prefix was given".into() });
    }
    installs
        .extend(c.spec.as_ref().and_then(|s| of_command(&s.exec, "its unit's command names the program")));
    installs.extend(c.running.and_then(of_running));
    installs.extend(installs_of(&c.account, world));
    let first = installs.first()?.clone();
    let others: Vec<String> = installs
        .iter()
        .skip(1)
        .filter(|i| i.package != first.package)
        .map(|i| format!("{} ({})", i.package.display(), i.how))
        .collect();
    let prefix = prefix_of(&first.package);
    let same = installs.iter().filter(|i| i.package == first.package);
    let node_bin = hint
        .node_bin
        .clone()
        .or_else(|| same.filter_map(|i| i.node_bin.clone()).next())
        .or_else(|| runtime_for(&prefix, &c.account, world))?;
    c.how.push(format!("{}: {}", first.how, first.package.display()));
    c.how.push(format!("Node is {}", node_bin.display()));
    let config_path = hint.config_path.clone().or_else(|| c.config.clone()).unwrap_or_else(|| {
        let (new, old) = (c.state_dir.join("openclaw.json"), c.state_dir.join("clawdbot.json"));
        if !new.exists() && old.exists() { old } else { new }
    });
    let loaded = config::load_file(&config_path).ok();
    let port =
        c.port.unwrap_or_else(|| config::port(loaded.as_ref().map(|l| &l.value), None, c.profile.as_deref()));
    let unit = c.spec.as_ref().map(|s| Unit { name: s.name.clone(), scope: s.scope, files: s.files.clone() });
    let env = c.env.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    let mut node = Node {
        name: c.profile.clone().unwrap_or_else(|| "main".into()),
        entry: entry_of(&first.package),
        package_dir: first.package,
        prefix,
        node_bin,
        runtime_dir: None,
        home: c.account.home,
        state_dir: c.state_dir,
        config_path,
        port,
        profile: c.profile,
        ids: c.account.ids,
        user: c.account.name,
        unit,
        env,
        version: None,
    };
    node.version = node.package_version();
    Some(Found { node, how: c.how, others })
}

fn entry_of(package: &Path) -> PathBuf {
    package.join("dist").join("index.js")
}

/// `<prefix>/lib/node_modules/openclaw`; other layouts have no `lib`, then the directory above `node_modules`.
fn prefix_of(package: &Path) -> PathBuf {
    let modules = package.parent().unwrap_or(package);
    let above = modules.parent().unwrap_or(modules);
    if above.file_name().is_some_and(|n| n == "lib") {
        above.parent().unwrap_or(above).to_path_buf()
    } else {
        above.to_path_buf()
    }
}

/// `node …/dist/index.js gateway`, `openclaw gateway`, or either behind `/usr/bin/env`.
fn of_command(argv: &[String], how: &str) -> Option<Install> {
    let mut node_bin = None;
    for arg in argv {
        let path = Path::new(arg);
        if !path.is_absolute() {
            continue;
        }
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if name == "node" || name == "nodejs" {
            node_bin = Some(path.to_path_buf());
        } else if let Some(package) = package_above(path) {
            return Some(Install { package, node_bin, how: how.into() });
        }
    }
    None
}

/// The package that a file belongs to: its directory is called `openclaw` (or the old name) below `node_modules`.
/// The file need not exist; a link is followed first.
fn package_above(file: &Path) -> Option<PathBuf> {
    let real = file.canonicalize().unwrap_or_else(|_| file.to_path_buf());
    let is_package = |p: &&Path| {
        let below_modules = p.parent().and_then(Path::file_name).is_some_and(|n| n == "node_modules");
        below_modules && p.file_name().is_some_and(|n| n == "openclaw" || n == "clawdbot")
    };
    real.ancestors().skip(1).find(is_package).map(Path::to_path_buf)
}

fn of_running(id: ProcessId) -> Option<Install> {
    let how = "the running gateway's own files name the program";
    let exe = id.exe();
    let mut argvs = vec![id.cmdline()];
    // A gateway may have wiped its arguments; its workers keep theirs.
    argvs.extend(descendants(id.pid).into_iter().take(16).map(ProcessId::cmdline));
    argvs.iter().find_map(|argv| of_command(argv, how)).map(|i| Install { node_bin: exe.or(i.node_bin), ..i })
}

/// The installations that an account would use: PATH first, then npm's prefixes, then version managers.
fn installs_of(account: &Account, world: &World) -> Vec<Install> {
    let mut found: Vec<Install> = Vec::new();
    let mut push = |package: PathBuf, node_bin: Option<PathBuf>, how: String| {
        let known = found.iter().any(|i| i.package == package);
        if !known && is_program(&package) {
            found.push(Install { package, node_bin, how });
        }
    };
    let home = &account.home;
    if account.ids.uid == world.own_uid {
        for dir in &world.path {
            if let Some(package) = package_above(&dir.join("openclaw")) {
                push(
                    package,
                    Some(dir.join("node")).filter(|n| n.is_file()),
                    "openclaw on PATH leads to the program".into(),
                );
            }
        }
    }
    for (prefix, how) in npm_prefixes(account, world) {
        let node = Some(prefix.join("bin/node")).filter(|n| n.is_file());
        push(prefix.join("lib/node_modules/openclaw"), node, how);
    }
    for (pattern, how) in [
        (".nvm/versions/node/*", "nvm"),
        (".local/share/fnm/node-versions/*/installation", "fnm"),
        (".fnm/node-versions/*/installation", "fnm"),
        (".local/share/mise/installs/node/*", "mise"),
        (".asdf/installs/nodejs/*", "asdf"),
        (".volta/tools/image/node/*", "volta"),
        (".nodenv/versions/*", "nodenv"),
        ("n", "n"),
        (".n", "n"),
        (".openclaw/tools/node-*", "OpenClaw's own installer"),
    ] {
        for prefix in expand(home, pattern) {
            let node = Some(prefix.join("bin/node")).filter(|n| n.is_file());
            push(prefix.join("lib/node_modules/openclaw"), node, format!("{how} holds the program"));
        }
    }
    push(
        home.join(".volta/tools/image/packages/openclaw/lib/node_modules/openclaw"),
        newest(expand(home, ".volta/tools/image/node/*")).map(|p| p.join("bin/node")).filter(|n| n.is_file()),
        "volta holds the program".into(),
    );
    for (pattern, how) in [
        (".local/share/pnpm/global/*/node_modules/openclaw", "pnpm"),
        (".config/yarn/global/node_modules/openclaw", "yarn"),
        (".bun/install/global/node_modules/openclaw", "bun"),
        (".openclaw/lib/node_modules/openclaw", "OpenClaw's own installer"),
    ] {
        for package in expand(home, pattern) {
            let real = package.canonicalize().unwrap_or(package);
            push(real, None, format!("{how} holds the program"));
        }
    }
    found
}

fn is_program(package: &Path) -> bool {
    // A half-deleted program is still the node's program.
    package_json(package).is_some_and(|j| {
        j.get("name").and_then(|n| n.as_str()).is_some_and(|n| n == "openclaw" || n == "clawdbot")
    }) || package.join("openclaw.mjs").is_file()
        || package.join("dist/index.js").is_file()
}

fn npm_prefixes(account: &Account, world: &World) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    if account.ids.uid == world.own_uid {
        for key in ["npm_config_prefix", "NPM_CONFIG_PREFIX", "N_PREFIX", "PREFIX"] {
            if let Some(prefix) = world.env.get(key).filter(|p| p.starts_with('/')) {
                found.push((PathBuf::from(prefix), format!("{key} names the prefix")));
            }
        }
    }
    let rc = account.home.join(".npmrc");
    if let Some(prefix) = rc_prefix(&rc, &account.home) {
        found.push((prefix, format!("{} names the prefix", rc.display())));
    }
    for dir in [".npm-global", ".local", ".npm", ".npm-packages"] {
        found.push((account.home.join(dir), format!("~/{dir} is an npm prefix")));
    }
    for dir in ["/usr/local", "/usr", "/opt/openclaw", "/home/linuxbrew/.linuxbrew"] {
        found.push((world.system(dir), format!("{dir} is an npm prefix")));
    }
    found
}

fn rc_prefix(rc: &Path, home: &Path) -> Option<PathBuf> {
    let text = read_bounded(rc, RC_LIMIT_BYTES).ok()?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let value = text
        .lines()
        .filter_map(|l| l.split_once('='))
        .find(|(k, _)| k.trim() == "prefix")?
        .1
        .trim()
        .to_owned();
    let value = value.trim_matches(['"', '\'']).replace("${HOME}", &home.display().to_string());
    Some(tilde(&value, home)).filter(|p| p.is_absolute())
}

/// One `*` per part of the pattern, newest version last in reading and first here.
fn expand(base: &Path, pattern: &str) -> Vec<PathBuf> {
    let mut at = vec![base.to_path_buf()];
    for part in pattern.split('/') {
        let Some((before, after)) = part.split_once('*') else {
            for p in &mut at {
                p.push(part);
            }
            continue;
        };
        let mut next = Vec::new();
        for dir in at {
            for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten().take(ENTRIES_LIMIT) {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.starts_with(before) && name.ends_with(after) {
                    next.push(dir.join(name));
                }
            }
        }
        at = next;
    }
    at.retain(|p| p.exists());
    at.sort_by_key(|p| std::cmp::Reverse(versions_in(p)));
    at
}

fn versions_in(path: &Path) -> Vec<crate::range::Version> {
    path.components().filter_map(|c| crate::range::Version::parse(&c.as_os_str().to_string_lossy())).collect()
}

fn newest(sorted: Vec<PathBuf>) -> Option<PathBuf> {
    sorted.into_iter().next()
}

/// The Node that a prefix without one of its own would run on.
fn runtime_for(prefix: &Path, account: &Account, world: &World) -> Option<PathBuf> {
    let mut candidates = vec![prefix.join("bin/node")];
    if account.ids.uid == world.own_uid {
        candidates.extend(world.path.iter().map(|d| d.join("node")));
    }
    for pattern in [
        ".nvm/versions/node/*/bin/node",
        ".local/share/fnm/node-versions/*/installation/bin/node",
        ".volta/tools/image/node/*/bin/node",
        ".openclaw/tools/node-*/bin/node",
    ] {
        candidates.extend(expand(&account.home, pattern));
    }
    candidates.extend(["/usr/local/bin/node", "/usr/bin/node", "/usr/bin/nodejs"].map(|p| world.system(p)));
    candidates.into_iter().find(|p| p.is_file())
}

fn fits(node: &Node, hint: &Hint) -> bool {
    let same =
        |a: &Path, b: &Path| a == b || a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b));
    hint.name.as_ref().is_none_or(|n| *n == node.name || node.profile.as_ref() == Some(n))
        && hint.home.as_ref().is_none_or(|h| same(h, &node.home))
        && hint.state_dir.as_ref().is_none_or(|s| same(s, &node.state_dir))
        && hint.config_path.as_ref().is_none_or(|c| same(c, &node.config_path))
        && hint.port.is_none_or(|p| p == node.port)
        && hint.user.as_ref().is_none_or(|u| *u == node.user || *u == node.ids.uid.to_string())
        && hint.unit.as_ref().is_none_or(|u| {
            let name = node.unit.as_ref().map(|n| n.name.as_str());
            name == Some(u) || name.and_then(|n| n.strip_suffix(".service")) == Some(u)
        })
}

#[cfg(test)]
#[path = "find_tests.rs"]
pub(crate) mod tests;
