//! Layer 2 by an agent without privileges: the one thing that sudo lets the node's user have root do.
//!
//! The user runs a language model with a shell, so what root does here depends on nothing that the user can write but one
//! version number, which is checked for its form and never older than the one enrolled. Binary, configuration and the
//! node's description are root's own. The sudoers lines name exactly these commands for exactly this node.

use crate::config::Config;
use crate::patient::Service;
use crate::places::Places;
use crate::reinstall;
use engine::{Layer, Limits};
use host::clock::Deadline;
use host::run::{Cmd, Output, run};
use host::user::as_user;
use host::{Context, Error, Kind, Result, files};
use layers::install::{Order, Place};
use layers::{Bench, Report};
use node::range::Version;
use node::{Baseline, Node};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the sudoers line names.
const PROGRAM: &str = "/usr/bin/koboshi";

/// What root does for a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Errand {
    /// Layer 2.
    Install,
    /// The program again at the home of a displaced node, which serves from elsewhere meanwhile.
    Home,
    /// Writes down which node it is that root may put back.
    Enroll,
}

impl Errand {
    /// As it is called on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Errand::Install => "system-install",
            Errand::Home => "home-install",
            Errand::Enroll => "enroll-node",
        }
    }

    /// The errand of that name.
    pub fn named(name: &str) -> Option<Errand> {
        [Errand::Install, Errand::Home, Errand::Enroll].into_iter().find(|e| e.name() == name)
    }

    fn cmd(self, before: &[&str], node: &Node) -> Cmd {
        Cmd::new("sudo", before.iter().copied().chain([PROGRAM, "step", self.name(), node.name.as_str()]))
    }
}
/// sudo answers in milliseconds; on a host with dead DNS it takes 12 s, and one that hangs in PAM never does.
pub const ASK_LIMIT: Duration = Duration::from_secs(4);
const ASK_LEAST: Duration = Duration::from_secs(1);
/// What the whole of it may take when nobody says otherwise.
const DEFAULT_LIMIT: Duration = Duration::from_secs(140);
/// The same beside a gateway that serves, at the lowest priority.
const HOME_LIMIT: Duration = Duration::from_secs(900);
/// Looking for one node.
const ENROLL_LIMIT: Duration = Duration::from_secs(20);
const FILE_LIMIT_BYTES: u64 = 1 << 20;
const WORDS_CHARS: usize = 200;

/// Whether a node's prefix is out of our own reach but within root's.
pub fn needed(node: &Node, places: &Places) -> bool {
    let denied = Place::of(node, &reinstall::order(places, "", Layer::SystemInstall)).is_err();
    !rustix::process::geteuid().is_root() && denied
}

/// How long sudo is waited for. Also under divided limits a host that is merely busy is not one whose sudo hangs.
pub fn ask_limit(limits: Limits) -> Duration {
    limits.span(ASK_LIMIT).max(ASK_LEAST)
}

/// Asks sudo whether it would. Nothing is run by it.
///
/// # Errors
/// Why not, in sudo's words.
pub fn ask(
    errand: Errand,
    node: &Node,
    limit: Duration,
    deadline: Deadline,
) -> std::result::Result<(), String> {
    let cmd = errand.cmd(&["-n", "-l"], node);
    match run(&cmd, deadline.min(Deadline::after(limit))) {
        Ok(out) if out.ok() => Ok(()),
        Ok(out) if out.timed_out => Err(format!("sudo did not answer within {} s", limit.as_secs())),
        Ok(out) => Err(format!("sudo does not permit it: {}", words(&out))),
        Err(e) => Err(e.why),
    }
}

fn words(out: &Output) -> String {
    let text = String::from_utf8_lossy(&out.stderr);
    let line = text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("it says nothing");
    line.chars().filter(|c| !c.is_control()).take(WORDS_CHARS).collect()
}

/// Has root do it; what it says, and what sudo says where it fails. Neither is believed: whoever asked looks.
fn have_root(errand: Errand, node: &Node, what: &str, deadline: Deadline) -> Result<(Report, Output)> {
    let mut report = Report::default();
    let out = run(&errand.cmd(&["-n"], node), deadline)?;
    if out.timed_out {
        return Err(Error::new(Kind::TimedOut, what, "sudo had not ended in time and was killed"));
    }
    for line in String::from_utf8_lossy(&out.stdout).lines().take(40) {
        report.done.push(line.chars().filter(|c| !c.is_control()).take(WORDS_CHARS).collect());
    }
    Ok((report, out))
}

/// Has root write the node down, where sudo lets us; while the node is well.
///
/// # Errors
/// In words, why it is not written down.
pub fn enroll_through(node: &Node) -> std::result::Result<(), String> {
    ask(Errand::Enroll, node, ASK_LIMIT, Deadline::after(ASK_LIMIT))?;
    let limit = Deadline::after(ENROLL_LIMIT);
    let (_, out) = have_root(Errand::Enroll, node, "enroll the node", limit).map_err(|e| e.why)?;
    if out.ok() { Ok(()) } else { Err(words(&out)) }
}

/// Has root make the program anew at the node's home, and notes what lies there then.
///
/// # Errors
/// When it did not come to a whole program.
pub fn home_through(bench: &Bench<'_>, home: &Node, order: &Order) -> Result<Report> {
    let what = "have root make the program anew at home";
    let (report, out) = have_root(Errand::Home, home, what, bench.deadline)?;
    if !out.ok() {
        return Err(Error::new(Kind::System, what, words(&out)));
    }
    layers::install::home::found(bench, order)?;
    Ok(report)
}

/// Has root do it, and notes what lies there then. sudo is believed nothing: the tree is looked at.
///
/// # Errors
/// When it did not come to a whole program.
pub fn through(bench: &Bench<'_>, places: &Places, version: &str) -> Result<Report> {
    let what = "have root install the program";
    let (report, out) = have_root(Errand::Install, bench.node, what, bench.deadline)?;
    if bench.node.package_version().as_deref() != Some(version) || !node::triage::program_is_whole(bench.node)
    {
        return Err(Error::new(Kind::System, what, words(&out)));
    }
    layers::install::note_installed(bench.node, version, &places.state_dir)?;
    Ok(report)
}

// ---- as root ----

fn enrolled(places: &Places, name: &str) -> PathBuf {
    places.state_dir.join("nodes").join(format!("{name}.json"))
}

fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 64
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

/// Only root, and only root's own files, which nobody else may write.
fn roots_own(path: &Path) -> Result<()> {
    let what = || format!("trust {}", path.display());
    for at in path.ancestors() {
        let meta = std::fs::symlink_metadata(at).context(what)?;
        let loose = meta.mode() & 0o022 != 0 && meta.mode() & 0o1000 == 0;
        if meta.uid() != 0 || loose || meta.is_symlink() {
            return Err(Error::new(Kind::Denied, what(), format!("{} is not root's alone", at.display()))
                .hint("it must belong to root, and nobody else may write to it or to a directory above it"));
        }
    }
    Ok(())
}

fn system() -> Result<(Config, Places)> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::new(Kind::Denied, "work for a node as root", "this is not root"));
    }
    let file = PathBuf::from("/etc/koboshi/koboshi.toml");
    if file.exists() {
        roots_own(&file)?;
    }
    let config = crate::config::load(&file)?;
    let places = Places::new(file, &config)?;
    places.make()?;
    Ok((config, places))
}

/// Writes down, as root and while the node is well, which node of this name root may put back, and says which line
/// sudoers needs.
fn enroll(name: &str) -> Result<Report> {
    let (config, places) = system()?;
    if !is_name(name) {
        return Err(Error::new(Kind::Usage, format!("enroll {name:?}"), "this is no node's name"));
    }
    let mut hint = node::Hint { name: Some(name.to_owned()), ..(&config.node).into() };
    // sudo itself says who asked: of several nodes of one name it is that user's.
    hint.user = hint.user.or_else(|| std::env::var("SUDO_USER").ok().filter(|user| user != "root"));
    let node = node::find(&hint)?.node;
    let file = enrolled(&places, name);
    if let Some(dir) = file.parent() {
        files::make_private_dir(dir)?;
    }
    let text =
        serde_json::to_vec_pretty(&node).map_err(|e| Error::new(Kind::System, "write the node down", e))?;
    files::write_atomic(&file, &text, 0o600)?;
    let mut report = Report::default();
    report.done.push(format!("root may now put back {} in {}", name, node.prefix.display()));
    report.done.push(format!("Defaults!{PROGRAM} env_reset, !pam_session, !requiretty"));
    for errand in [Errand::Install, Errand::Home] {
        let line = format!("{} ALL=(root:root) NOPASSWD: {PROGRAM} step {} {name}", node.user, errand.name());
        report.done.push(line);
    }
    Ok(report)
}

/// What sudo runs.
pub fn as_root(errand: Errand, name: &str) -> Result<Report> {
    match errand {
        Errand::Enroll => enroll(name),
        Errand::Install => {
            make_anew(name, DEFAULT_LIMIT, |b, order| layers::system_install::work(b, order, false))
        }
        Errand::Home => make_anew(name, HOME_LIMIT, layers::install::home::furnish),
    }
}

fn make_anew(
    name: &str,
    limit: Duration,
    work: impl FnOnce(&mut Bench<'_>, &Order) -> Result<Report>,
) -> Result<Report> {
    let (config, places) = system()?;
    if !is_name(name) {
        return Err(Error::new(Kind::Usage, format!("install for {name:?}"), "this is no node's name"));
    }
    let deadline = Deadline::after(config.ladder.limits().span(limit));
    let file = enrolled(&places, name);
    roots_own(&file)?;
    let node: Node = serde_json::from_slice(&files::read_bounded(&file, FILE_LIMIT_BYTES)?)
        .map_err(|e| Error::new(Kind::Corrupt, format!("read {}", file.display()), e))?;
    let own = Places { state_dir: places.state_dir.join("nodes").join(name), ..places.clone() };
    files::make_private_dir(&own.state_dir)?;
    // Whoever asks again has settled, or given up, what was put in place before: nothing older than what lies there now may
    // come back for it. There may be weeks and an update in between.
    layers::install::settle(&own.state_dir)?;
    let version = version(&node)?;
    let order = reinstall::order(&own, &version, Layer::SystemInstall);
    if Place::of(&node, &order)?.owner.uid != 0 {
        return Err(Error::new(
            Kind::Denied,
            "install as root",
            "the prefix is the user's own: root is not needed",
        ));
    }
    let containers = own.containers(&node)?;
    let mut service = Service::of(&node, &config, &containers, &own)?;
    let mut bench = Bench {
        node: &node,
        manager: service.manager(),
        store: None,
        baseline: None,
        quarantine: own.quarantine(),
        spares: Vec::new(),
        deadline,
        limits: config.ladder.limits(),
    };
    work(&mut bench, &order)
}

/// The version that last served, in the user's own words, if it is one and none that root knows to be older.
fn version(node: &Node) -> Result<String> {
    let file = node.home.join(".local/state/koboshi/baseline.json");
    let said = as_user(node.ids, || files::read_bounded(&file, FILE_LIMIT_BYTES)).ok();
    let said = said.and_then(|bytes| serde_json::from_slice::<Baseline>(&bytes).ok());
    let enrolled = node.version.clone();
    let newer = |said: &String| match (Version::parse(said), enrolled.as_deref().and_then(Version::parse)) {
        (Some(said), Some(enrolled)) => said >= enrolled,
        (_, _) => false,
    };
    let said = said.as_ref().filter(|b| b.version.as_ref().is_some_and(newer));
    reinstall::version(node, said, None).ok_or_else(|| {
        Error::new(Kind::Usage, "choose a version", "none is known to have served")
            .hint("enroll the node again")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_name_and_not_a_path() {
        assert!(is_name("main") && is_name("work-2"));
        for bad in ["", "../main", "a/b", "a b", ".", "a\n", &"x".repeat(65)] {
            assert!(!is_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn what_others_may_write_is_not_roots_own_as_root() {
        use std::os::unix::fs::PermissionsExt;
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir_in("/var/lib").unwrap();
        let file = dir.path().join("node.json");
        std::fs::write(&file, "{}").unwrap();
        roots_own(&file).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666)).unwrap();
        assert!(roots_own(&file).is_err());
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        std::os::unix::fs::chown(dir.path(), Some(65_534), None).unwrap();
        assert!(roots_own(&file).is_err(), "whoever owns the directory can exchange the file");
        std::os::unix::fs::chown(dir.path(), Some(0), None).unwrap();
        let link = dir.path().join("link.json");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(roots_own(&link).is_err());
    }
}
