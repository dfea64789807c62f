//! `koboshi install`: finds the node, says what it found and what it will write, and writes it.
//!
//! It never restarts, stops or edits the node: it reads it, and writes below koboshi's own places only. Doing it again
//! changes nothing that is right already. What a person has changed (the configuration, a unit of their own) stays.

use super::check::{self, node_json};
use super::desk::{Desk, Fields, newest_first};
use super::unit::{self, OwnUnit};
use super::{judging, kept, readiness, snapshots};
use crate::cli::{Cli, Install};
use crate::config::{self, NodeHint};
use crate::patient;
use crate::places::{self, Places};
use crate::print::{Exit, Printer, bytes};
use crate::voice::Standing;
use crate::{space, spare, sudo};
use engine::Verdict;
use host::clock::{self, Deadline};
use host::run::Ids;
use host::{Context, Error, Kind, Result, files, service};
use node::{Baseline, Hint, Node, Scope};
use serde_json::Value;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use store::SnapshotInfo;

/// The commented configuration; the same file that is shipped as an example.
const EXAMPLE: &str = include_str!("../../../../dist/etc/koboshi/koboshi.toml");
/// Three good looks over five seconds.
const WATCH_LIMIT: Duration = Duration::from_secs(15);
/// Reading the identity takes milliseconds.
const BASELINE_LIMIT: Duration = Duration::from_secs(10);
/// What the agent may take at rest, and what one of its steps may take for seconds (the store's own bound). Bytes.
const AGENT_BYTES: u64 = 15_000_000;
const STEP_BYTES: u64 = 200_000_000;

/// What is going to be done.
#[derive(Debug)]
struct Plan {
    node: Node,
    how: Vec<String>,
    others: Vec<String>,
    /// The configuration's text, where there is none yet.
    config_text: Option<String>,
    remember: bool,
    first_snapshot: bool,
    service: Service,
}

/// How the agent is going to be run.
#[derive(Debug)]
enum Service {
    /// A systemd unit: its text, and whether the file has to be written.
    Unit { unit: OwnUnit, text: String, write: bool, linger: Option<String> },
    /// There is no systemd: a person puts one of these lines where it belongs.
    Lines(Lines),
    /// Not wanted.
    None,
}

/// The exact lines for places that know no systemd.
#[derive(Debug)]
struct Lines {
    dockerfile: String,
    compose: String,
    wsl: String,
    cron: String,
}

/// Installs, or says what it would do.
pub(super) fn run(cli: &Cli, options: &Install, printer: Printer) -> Result<Exit> {
    let desk = desk(cli, options, printer)?;
    let plan = plan(&desk, options)?;
    let disk = readiness::look(&desk, &plan.node, &kept::ask(&desk));
    let layers = readiness::layers(&desk, &plan.node, &disk);
    tell(&desk, &plan, &layers)?;
    let base = json(&desk, &plan, &layers)?;
    if options.dry_run {
        print_lines(&desk, &plan);
        printer.line("");
        printer.line("Nothing was written (--dry-run).");
        printer.object(base.put("dry_run", true).put("installed", false).done());
        return Ok(Exit::Done);
    }
    printer.line("");
    let done = carry_out(&desk, &plan)?;
    finish(&desk, &plan, &done);
    let base = base
        .put("dry_run", false)
        .put("installed", true)
        .put("verdict", super::desk::verdict_name(&done.verdict))
        .maybe("snapshot", done.snapshot.as_ref().map(snapshots::json));
    printer.object(base.done());
    Ok(Exit::Done)
}

/// Whose koboshi this is going to be decides where its configuration lies.
fn desk(cli: &Cli, options: &Install, printer: Printer) -> Result<Desk> {
    let root = Ids::current().uid == 0;
    if options.system && !root {
        return Err(Error::new(Kind::Denied, "install as a system service", "that needs root")
            .hint("sudo koboshi install --system, or koboshi install --user"));
    }
    let named = match &cli.config {
        Some(file) => Some(file.clone()),
        None if options.user => {
            Some(places::user_dir("XDG_CONFIG_HOME", ".config")?.join("koboshi/koboshi.toml"))
        }
        None => None,
    };
    let file = Places::config_file(named.as_deref())?;
    if cli.config.is_none() && !root && file.starts_with("/etc") {
        return Err(Error::new(
            Kind::Denied,
            "install",
            format!("{} is there and belongs to the system", file.display()),
        )
        .hint("sudo koboshi install, or koboshi install --user for one of your own"));
    }
    let config = config::load(&file)?;
    let places = Places::new(file, &config)?;
    Ok(Desk { config, places, printer })
}

// ---- what would be done ----

fn plan(desk: &Desk, options: &Install) -> Result<Plan> {
    let asked = asked(&desk.config.node, options);
    let hint: Hint = (&asked).into();
    let remembered = patient::remembered(&desk.places).unwrap_or_default();
    let (node, how, others) = match (node::find(&hint), &remembered) {
        (Ok(found), Some(known)) => (keep_runtime(found.node, known), found.how, found.others),
        (Ok(found), None) => (found.node, found.how, found.others),
        (Err(e), Some(known)) => (
            known.clone(),
            vec![format!("it is remembered from before; it cannot be found now: {}", e.why)],
            Vec::new(),
        ),
        (Err(e), None) => return Err(e),
    };
    let config_text = (!desk.places.config_file.exists()).then(|| config_text(&asked));
    let snapshots = kept::open(desk)?.map_or(Ok(Vec::new()), |s| newest_first(&s))?;
    let service = service_plan(desk, options, &node)?;
    Ok(Plan {
        remember: remembered.as_ref() != Some(&node),
        first_snapshot: snapshots.is_empty(),
        node,
        how,
        others,
        config_text,
        service,
    })
}

/// A runtime that koboshi made stays known as koboshi's.
fn keep_runtime(found: Node, known: &Node) -> Node {
    let ours = known.runtime_dir.clone().filter(|dir| found.node_bin.starts_with(dir));
    Node { runtime_dir: found.runtime_dir.clone().or(ours), ..found }
}

/// What the configuration asks for, with the options of this command above it.
fn asked(hint: &NodeHint, options: &Install) -> NodeHint {
    NodeHint {
        name: options.profile.clone().or_else(|| hint.name.clone()),
        prefix: options.prefix.clone().or_else(|| hint.prefix.clone()),
        port: options.port.or(hint.port),
        user: options.node_user.clone().or_else(|| hint.user.clone()),
        state_dir: options.state_dir.clone().or_else(|| hint.state_dir.clone()),
        ..hint.clone()
    }
}

/// The example with what was asked for filled in.
fn config_text(asked: &NodeHint) -> String {
    let text = |value: &str| toml::Value::from(value).to_string();
    let path = |value: &Path| text(&value.display().to_string());
    let lines = [
        ("name", asked.name.as_deref().map(text)),
        ("prefix", asked.prefix.as_deref().map(path)),
        ("node_bin", asked.node_bin.as_deref().map(path)),
        ("home", asked.home.as_deref().map(path)),
        ("state_dir", asked.state_dir.as_deref().map(path)),
        ("config_path", asked.config_path.as_deref().map(path)),
        ("port", asked.port.map(|p| p.to_string())),
        ("user", asked.user.as_deref().map(text)),
        ("unit", asked.unit.as_deref().map(text)),
    ];
    let mut section = String::new();
    let mut out = Vec::new();
    for line in EXAMPLE.lines() {
        if line.starts_with('[') {
            line.clone_into(&mut section);
        }
        let given = lines.iter().find_map(|(key, value)| {
            let value = value.as_ref().filter(|_| section == "[node]")?;
            line.strip_prefix("# ")?.strip_prefix(key)?.starts_with(" = ").then(|| format!("{key} = {value}"))
        });
        out.push(given.unwrap_or_else(|| line.to_owned()));
    }
    out.join("\n") + "\n"
}

fn service_plan(desk: &Desk, options: &Install, node: &Node) -> Result<Service> {
    if options.no_service {
        return Ok(Service::None);
    }
    let exe = std::env::current_exe()
        .and_then(|e| e.canonicalize())
        .context(|| "find koboshi's own program".into())?;
    if !service::systemd_running() {
        return Ok(Service::Lines(lines(desk, &exe)));
    }
    let root = Ids::current().uid == 0;
    let scope = if options.user || !root { Scope::User } else { Scope::System };
    let unit = unit::own(scope, &desk.places, &node.name)?;
    let text = unit::text(scope, &exe, &desk.places.config_file);
    let write = unit::differs(&unit, &text)?;
    let linger = match scope {
        Scope::System => None,
        Scope::User => unit::user_name().filter(|user| !unit::lingers(user)),
    };
    Ok(Service::Unit { unit, text, write, linger })
}

fn lines(desk: &Desk, exe: &Path) -> Lines {
    let config = desk.places.config_file.display();
    let exe = exe.display();
    let state = desk.places.state_dir.display();
    // The key lies beside the configuration: a container that is made anew without it could not read its snapshots.
    let config_dir = desk.places.config_file.parent().unwrap_or(Path::new("/etc/koboshi")).display();
    let default = desk.places.config_file == Path::new("/etc/koboshi/koboshi.toml");
    let args = if default { String::new() } else { format!("\"--config\", \"{config}\", ") };
    let words = if default { String::new() } else { format!(" --config {config}") };
    Lines {
        dockerfile: format!("COPY koboshi /usr/local/bin/koboshi\nENTRYPOINT [\"koboshi\", {args}\"guard\"]"),
        compose: format!(
            "entrypoint: [\"koboshi\", {args}\"guard\"]\nrestart: unless-stopped\nstop_grace_period: 340s\n\
             volumes: [\"koboshi-state:{state}\", \"koboshi-config:{config_dir}\"]"
        ),
        wsl: format!("[boot]\ncommand = setsid --fork {exe}{words} guard"),
        cron: format!("@reboot {exe}{words} guard >>{state}/agent.log 2>&1"),
    }
}

// ---- telling ----

fn tell(desk: &Desk, plan: &Plan, layers: &[readiness::Readiness]) -> Result<()> {
    let p = desk.printer;
    let places = &desk.places;
    Standing::of(&desk.config, places).warn(p, places);
    p.line(p.bold("Found"));
    let node = &plan.node;
    let version = node
        .package_version()
        .map_or_else(|| "OpenClaw, version unknown".to_owned(), |v| format!("OpenClaw {v}"));
    p.line(format!("  {}: {version}, port {}, user {}", node.name, node.port, node.user));
    p.line(format!("  program  {}", node.package_dir.display()));
    p.line(format!("  runtime  {}", node.node_bin.display()));
    p.line(format!("  state    {}", node.state_dir.display()));
    p.line(format!("  service  {}", service_words(desk, node)));
    for line in &plan.how {
        p.line(format!("  because  {line}"));
    }
    for line in &plan.others {
        p.line(format!("  also seen, not taken: {line}"));
    }
    p.line(p.bold("Writes"));
    for (path, what, state) in writes(desk, plan) {
        p.line(format!(
            "  {} ({what}{})",
            path.display(),
            if state == "kept" { ", there already: kept" } else { "" }
        ));
    }
    if let Service::Unit { linger: Some(user), .. } = &plan.service {
        p.line(format!("  linger for {user}, so that the service runs without a login"));
    }
    p.line("  The node itself is only read: it is not restarted, stopped or changed.");
    let need = need(desk, plan)?;
    p.line(p.bold("Uses"));
    p.line(format!(
        "  disk    at most {} for store, spare and quarantine, oldest of its own goes first; {} are free there",
        bytes(need.limit_bytes),
        bytes(need.free_bytes)
    ));
    if need.spare_bytes > 0 {
        p.line(format!("          of which a spare beside the program of about {}", bytes(need.spare_bytes)));
    }
    p.line(format!(
        "  memory  at most {} at rest; up to {} for seconds while a snapshot or a repair runs",
        bytes(AGENT_BYTES),
        bytes(STEP_BYTES)
    ));
    p.line(p.bold("Layers"));
    readiness::print(desk, layers);
    Ok(())
}

fn service_words(desk: &Desk, node: &Node) -> String {
    match (&node.unit, desk.manager(node)) {
        (Some(unit), "systemd-user") => format!("systemd user unit {} of {}", unit.name, node.user),
        (Some(unit), "systemd-system") => format!("systemd unit {}", unit.name),
        (_, _) => "none: koboshi itself starts and supervises the gateway".to_owned(),
    }
}

/// Every path that is written, what it is, and whether it is there already.
fn writes(desk: &Desk, plan: &Plan) -> Vec<(PathBuf, &'static str, &'static str)> {
    let state = |write: bool| if write { "write" } else { "kept" };
    let places = &desk.places;
    let mut all = vec![
        (places.config_file.clone(), "configuration", state(plan.config_text.is_some())),
        (places.node(), "the node as it was found", state(plan.remember)),
        (places.key_file.clone(), "the store's key", state(!places.key_file.exists())),
        (places.store(), "snapshots", state(plan.first_snapshot)),
        (places.run_dir.clone(), "what need not survive a reboot", state(!places.run_dir.exists())),
    ];
    if let Service::Unit { unit, write, .. } = &plan.service {
        all.push((unit.file.clone(), "koboshi's own unit", state(*write)));
    }
    all
}

/// Room that is needed and there.
#[derive(Debug)]
struct Need {
    limit_bytes: u64,
    free_bytes: u64,
    spare_bytes: u64,
}

fn need(desk: &Desk, plan: &Plan) -> Result<Need> {
    let limit_bytes = space::limit_bytes(&desk.config, &desk.places)?;
    let free_bytes = files::free(&desk.places.state_dir)?.user_bytes;
    let spare_bytes = match (desk.config.store.spare, spare::size(&plan.node)) {
        (false, _) => 0,
        (true, 0) => files::tree_size(&plan.node.package_dir, 1_000_000).map_or(0, |s| s.disk_bytes),
        (true, there) => there,
    };
    Ok(Need { limit_bytes, free_bytes, spare_bytes })
}

fn json(desk: &Desk, plan: &Plan, layers: &[readiness::Readiness]) -> Result<Fields> {
    let need = need(desk, plan)?;
    let written: Vec<Value> = writes(desk, plan)
        .into_iter()
        .map(|(path, what, state)| {
            Fields::default()
                .put("path", path.display().to_string())
                .put("what", what)
                .put("state", state)
                .done()
        })
        .collect();
    let service = match &plan.service {
        Service::Unit { unit, .. } => Fields::default()
            .put("kind", if unit.scope == Scope::User { "systemd-user" } else { "systemd-system" })
            .put("unit", unit.name.as_str())
            .put("file", unit.file.display().to_string()),
        Service::Lines(lines) => Fields::default()
            .put("kind", "none")
            .put("dockerfile", lines.dockerfile.as_str())
            .put("compose", lines.compose.as_str())
            .put("wsl_conf", lines.wsl.as_str())
            .put("cron", lines.cron.as_str()),
        Service::None => Fields::default().put("kind", "not-wanted"),
    };
    Ok(Fields::default()
        .put("node", node_json(&plan.node))
        .put("manager", desk.manager(&plan.node))
        .put("how", plan.how.clone())
        .put("others", plan.others.clone())
        .put("writes", written)
        .put("limit_bytes", need.limit_bytes)
        .put("free_bytes", need.free_bytes)
        .put("spare_bytes", need.spare_bytes)
        .put("agent_bytes", AGENT_BYTES)
        .put("layers", readiness::json(layers))
        .put("alert_channels", desk.config.alert.len())
        .put("service", service.done()))
}

// ---- doing ----

/// What came of it.
#[derive(Debug)]
struct Done {
    verdict: Verdict,
    snapshot: Option<SnapshotInfo>,
    started: bool,
}

fn carry_out(desk: &Desk, plan: &Plan) -> Result<Done> {
    let p = desk.printer;
    desk.places.make()?;
    if let Some(text) = &plan.config_text {
        make_config_dir(&desk.places.config_file)?;
        files::write_atomic(&desk.places.config_file, text.as_bytes(), 0o600)?;
    }
    if plan.remember {
        patient::remember(&desk.places, &plan.node)?;
    }
    let mut judge = judging::judge(desk);
    let bar = p.spinner("looking whether it serves");
    let judgement = judging::watch(desk, &plan.node, &mut judge, WATCH_LIMIT, |_| {});
    bar.done();
    p.line(check::headline(desk, &plan.node, &judgement.verdict));
    if judgement.verdict.is_serving() && judgement.confirmed && patient::baseline(&desk.places)?.is_none() {
        let baseline = Baseline::take(&plan.node, Vec::new(), clock::now(), Deadline::after(BASELINE_LIMIT))?;
        patient::set_baseline(&desk.places, &baseline)?;
    }
    enroll(desk, &plan.node);
    let snapshot = plan
        .first_snapshot
        .then(|| snapshots::take(desk, &plan.node, &desk.baseline(), "first, at install"))
        .transpose()?;
    if let Some(info) = &snapshot {
        let settle = desk.config.backup.settle_s;
        p.line(format!("First snapshot {}: {}.", info.id, snapshots::amount(info)));
        p.line(format!(
            "  It is a candidate, and good once the node has served for {settle} s under the agent."
        ));
    }
    let started = match &plan.service {
        Service::Unit { unit, text, write, linger } => {
            start_unit(desk, unit, text, *write, linger.as_deref())?;
            true
        }
        Service::Lines(_) | Service::None => false,
    };
    Ok(Done { verdict: judgement.verdict, snapshot, started })
}

/// Where the program is root's and we are not, root has to know which node it is that it may put back. Where sudo lets us
/// say so, nobody has to think of it.
fn enroll(desk: &Desk, node: &Node) {
    if !sudo::needed(node, &desk.places) {
        return;
    }
    match sudo::enroll_through(node) {
        Ok(()) => desk.printer.line("The program is root's; root knows now which node it may put back by sudo."),
        Err(why) => desk.printer.note(format!(
            "the program is root's, and layer 2 cannot have root put it back ({why}); once, by an administrator: \
             sudo koboshi step enroll-node {}, and the lines that it prints into /etc/sudoers.d/koboshi",
            node.name
        )),
    }
}

fn make_config_dir(file: &Path) -> Result<()> {
    let Some(dir) = file.parent() else { return Ok(()) };
    // Everybody may see that there is a configuration; the file itself holds tokens and is private.
    let mode = if dir.starts_with("/etc") { 0o755 } else { 0o700 };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(dir)
        .context(|| format!("make {}", dir.display()))
}

/// Writes the unit and has it run. Restarting the agent for a changed unit ends no gateway (`KillMode=process`).
fn start_unit(desk: &Desk, unit: &OwnUnit, text: &str, write: bool, linger: Option<&str>) -> Result<()> {
    if write {
        if let Some(dir) = unit.file.parent() {
            std::fs::create_dir_all(dir).context(|| format!("make {}", dir.display()))?;
        }
        files::write_atomic(&unit.file, text.as_bytes(), 0o644)?;
        unit::systemctl(unit.scope, &["daemon-reload"])?;
    }
    if let Some(user) = linger
        && let Err(e) = unit::enable_linger(user)
    {
        desk.printer.note(format!(
            "{e}; the service ends with the last logout until: sudo loginctl enable-linger {user}"
        ));
    }
    let was_running = desk.agent().is_some();
    unit::systemctl(unit.scope, &["enable", "--now", &unit.name])?;
    if write && was_running {
        unit::systemctl(unit.scope, &["restart", &unit.name])?;
    }
    desk.printer.line(format!("{} is enabled and runs.", unit.name));
    Ok(())
}

fn finish(desk: &Desk, plan: &Plan, done: &Done) {
    let p = desk.printer;
    print_lines(desk, plan);
    p.line("");
    if !done.verdict.is_serving() {
        p.line("The node does not serve now: koboshi recover puts it right.");
    }
    let agent = if done.started { "koboshi status shows what it does; " } else { "" };
    p.line(format!("{agent}koboshi doctor says what would still keep a recovery from working."));
}

/// What a person puts where, on a machine without systemd.
fn print_lines(desk: &Desk, plan: &Plan) {
    let p = desk.printer;
    if let Service::Lines(lines) = &plan.service {
        p.line("");
        p.line(
            "There is no systemd here, so there is no service to write. Have the agent run by one of these:",
        );
        for (place, text) in [
            ("Dockerfile", &lines.dockerfile),
            ("compose file, in the node's service", &lines.compose),
            ("/etc/wsl.conf", &lines.wsl),
            ("crontab -e", &lines.cron),
        ] {
            p.line(format!("  {place}:"));
            for line in text.lines() {
                p.line(format!("    {line}"));
            }
        }
        p.line("  or now, in the foreground: koboshi guard");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn uncommented() -> String {
        EXAMPLE
            .lines()
            .map(|l| {
                let bare = l.strip_prefix("# ").unwrap_or(l);
                let key = bare.split(" = ").next().unwrap_or_default();
                let setting = bare.contains(" = ")
                    && !key.is_empty()
                    && key.chars().all(|c| c.is_ascii_lowercase() || c == '_');
                if setting || bare.starts_with("[[") { bare } else { "" }
            })
            .zip(EXAMPLE.lines())
            .map(|(setting, line)| if line.starts_with('[') { line } else { setting })
            .collect::<Vec<_>>()
            .join("\n")
    }

    fn value(config: &Config) -> toml::Value {
        toml::Value::try_from(config).unwrap()
    }

    #[test]
    fn the_example_as_it_stands_is_the_default() {
        let config: Config = toml::from_str(EXAMPLE).unwrap();
        assert_eq!(value(&config), value(&Config::default()));
    }

    #[test]
    fn every_line_of_the_example_is_valid_and_shows_the_default() {
        let text = uncommented();
        let mut config: Config = toml::from_str(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        assert_eq!(config.alert.len(), 3, "{text}");
        assert!(config.node.unit.is_some() && config.state_dir.is_some());
        // What has no default shows an example instead.
        config.node = NodeHint::default();
        assert_eq!(config.peer.len(), 1, "{text}");
        config.alert.clear();
        config.peer.clear();
        config.state_dir = None;
        config.run_dir = None;
        config.language = None;
        config.heartbeat.url = None;
        assert_eq!(value(&config), value(&Config::default()));
    }

    #[test]
    fn what_was_asked_for_is_in_the_configuration_and_nothing_else() {
        let asked = NodeHint {
            port: Some(19_000),
            state_dir: Some("/srv/a \"b\"/.openclaw".into()),
            ..NodeHint::default()
        };
        let text = config_text(&asked);
        let config: Config = toml::from_str(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        assert_eq!(config.node, asked);
        assert_eq!(config.state_dir, None, "koboshi's own state_dir is another key");
    }
}
