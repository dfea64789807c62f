//! The lab: real hosts with systemd, sudo and sshd, the real Node and OpenClaw in them, and koboshi installed as a user
//! would install it.
//!
//! A *scenario* plays on a *site* of its own: a switch, an npm registry, a receiver of alerts, and hosts whose file
//! systems are snapshots of templates that were made once. What a scenario claims is judged from outside: a hello said
//! to the gateway by the lab itself, processes and files as the kernel shows them, the user's things compared before
//! and after. Everything lies in a cage (see `cage`), so nothing survives the run, however it ends.

mod bystanders;
mod cage;
mod disk;
pub(crate) mod escape;
mod host;
mod http;
mod judge;
mod koboshi;
mod net;
mod registry;
mod scenarios;
mod sink;
mod sudo;
mod tool;

use crate::demo;
use crate::needs::is_root;
use crate::run::Tally;
use bystanders::Bystanders;
use disk::{Pool, Template};
use host::Host;
use net::Switch;
use registry::{Recording, Registry};
use scenarios::{ALL, Scenario};
use serde_json::json;
use sink::{Sink, locked};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Making the templates, and all scenarios one after the other, on a busy machine.
const LIMIT: Duration = Duration::from_secs(90 * 60);
/// Scenarios side by side, at most; else one for each core. A gateway's start takes a whole one, and a gateway that is
/// starved gives up: its own heartbeat must come within 5 s of its start.
const SIDE_BY_SIDE: usize = 4;
/// How long a kept lab stays if nobody ends it.
const KEPT_FOR: Duration = Duration::from_secs(12 * 3600);

/// What a run is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Set {
    /// What every test run plays.
    Ci,
    /// All of it.
    Full,
}

/// The lab as part of a test run.
pub(crate) fn run(root: &Path, set: Set, tally: &mut Tally) {
    if !is_root() {
        tally.skip("lab", "not root: hosts with namespaces and file systems of their own are beyond us");
        return;
    }
    let names: Vec<&str> = ALL.iter().filter(|s| set == Set::Full || s.ci).map(|s| s.name).collect();
    play(root, &names, false, tally);
}

/// The same as a command of its own: `--list`, `--keep`, `--built` (with the release binary as it is), names of
/// scenarios.
pub(crate) fn alone(root: &Path, words: &[&str]) -> ExitCode {
    if words.contains(&"--list") {
        for s in ALL {
            println!("{:<18} {}{}", s.name, s.proves, if s.ci { "" } else { " (full only)" });
        }
        return ExitCode::SUCCESS;
    }
    let keep = words.contains(&"--keep");
    let built = words.contains(&"--built");
    let names: Vec<&str> = words.iter().copied().filter(|w| !["--keep", "--built"].contains(w)).collect();
    if let Some(name) = names.iter().find(|n| ALL.iter().all(|s| s.name != **n)) {
        println!("there is no scenario {name}; `cargo xtask lab --list` names them");
        return ExitCode::from(2);
    }
    if !is_root() {
        println!("the lab needs root: it makes namespaces, cgroups and mounts");
        return ExitCode::from(2);
    }
    let all: Vec<&str> = ALL.iter().map(|s| s.name).collect();
    let mut tally = Tally::new();
    crate::needs::ensure(&mut tally);
    if !built && !crate::checks::build_release(root, &mut tally) {
        return tally.close();
    }
    play(root, if names.is_empty() { &all } else { &names }, keep, &mut tally);
    tally.close()
}

fn play(root: &Path, names: &[&str], keep: bool, tally: &mut Tally) {
    tally.part("lab: real hosts", |tally| {
        if !Recording::is_there(&demo::cache(root)) {
            println!("Node and OpenClaw are fetched once, by the demo");
            let ran = demo::start(root, &["--no-faults"], 0);
            if !ran.ok() {
                tally.fail(format!("lab: the demo could not fetch them: {}", ran.stdout.trim()));
                return (0, 1);
            }
        }
        let mut words: Vec<String> = vec![root.display().to_string()];
        words.extend(keep.then(|| "--keep".to_owned()));
        words.extend(names.iter().map(|n| (*n).to_owned()));
        let limit = if keep { KEPT_FOR } else { LIMIT };
        match cage::run(root, &words, limit) {
            Ok(outcome) => {
                for (name, why) in &outcome.skipped {
                    tally.skip(&format!("lab {name}"), why);
                }
                tally.remember(outcome.failures);
                (outcome.passed, outcome.failed)
            }
            Err(why) => {
                tally.fail(format!("lab: {why}"));
                (0, 1)
            }
        }
    });
}

/// What runs inside the cage: `WORK CGROUP… -- ROOT [--keep] NAME…`.
pub(crate) fn inside(words: &[&str]) -> ExitCode {
    let mut parts = words.splitn(2, |w| *w == "--");
    let (Some([work, cgroups @ ..]), Some([root, names @ ..])) = (parts.next(), parts.next()) else {
        return ExitCode::from(2);
    };
    let work = PathBuf::from(work);
    let keep = names.contains(&"--keep");
    let chosen: Vec<&Scenario> = ALL.iter().filter(|s| names.contains(&s.name)).collect();
    let result = Lab::open(Path::new(root), &work, cgroups, keep).map(|lab| lab.play(&chosen));
    let count = result.unwrap_or_else(|why| {
        let mut none = Count::default();
        none.fail("lab", &why);
        none
    });
    let outcome = json!({ "passed": count.passed, "failed": count.failed, "failures": count.failures,
        "skipped": count.skipped });
    match std::fs::write(work.join("outcome.json"), outcome.to_string()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("cannot write the outcome: {e}");
            ExitCode::FAILURE
        }
    }
}

/// What all scenarios share.
pub(crate) struct Lab {
    root: PathBuf,
    work: PathBuf,
    cache: PathBuf,
    cgroups: Vec<PathBuf>,
    recording: Arc<Recording>,
    pool: Option<Pool>,
    /// Hosts stay up after their scenario until the run is ended.
    keep: bool,
}

impl Lab {
    fn open(root: &Path, work: &Path, cgroups: &[&str], keep: bool) -> Result<Lab, String> {
        own_run(work)?;
        let cache = demo::cache(root);
        let recording = Arc::new(Recording::read(&cache, work)?);
        let mut lab = Lab {
            root: root.to_owned(),
            work: work.to_owned(),
            cache,
            cgroups: cgroups.iter().map(PathBuf::from).collect(),
            recording: Arc::clone(&recording),
            pool: None,
            keep,
        };
        let started = Instant::now();
        lab.pool = Some(disk::pool(&lab, &recording)?);
        println!("disk of {} ready in {:.1} s", recording.openclaw, started.elapsed().as_secs_f64());
        Ok(lab)
    }

    fn pool(&self) -> Result<&Pool, String> {
        self.pool.as_ref().ok_or_else(|| "the disk is not there yet".to_owned())
    }

    /// Plays scenarios side by side, the first ones first.
    fn play(&self, chosen: &[&Scenario]) -> Count {
        let total = Mutex::new(Count::default());
        let next = AtomicUsize::new(0);
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let workers = if self.keep { 1 } else { cores.min(SIDE_BY_SIDE) };
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    while let Some(scenario) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let count = self.one(scenario);
                        locked(&total, |t| t.add(count));
                    }
                });
            }
        });
        total.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn one(&self, scenario: &Scenario) -> Count {
        let started = Instant::now();
        let name = scenario.name;
        println!("[{name}] {}", scenario.proves);
        let mut count = Count::default();
        match Site::new(self, name) {
            Ok(site) => {
                let mut play = Play {
                    site,
                    name,
                    count: Count::default(),
                    hosts: Vec::new(),
                    bystanders: Bystanders::default(),
                };
                let result = (scenario.play)(&mut play);
                if let Err(why) = result {
                    play.count.fail(name, &format!("it could not go on: {why}"));
                }
                play.bystanders_live();
                if play.count.failed > 0 {
                    play.keep_for_a_look();
                }
                if self.keep {
                    play.wait_for_the_end();
                }
                count = std::mem::take(&mut play.count);
            }
            Err(why) => {
                count.fail(name, &format!("no site: {why}"));
            }
        }
        let (p, f) = (count.passed, count.failed);
        println!("[{name}] {p} passed, {f} failed, {:.0} s", started.elapsed().as_secs_f64());
        count
    }
}

/// A private `/run`, so that no tool leaves anything in the machine's.
fn own_run(work: &Path) -> Result<(), String> {
    const LIMIT: Duration = Duration::from_secs(20);
    // The machine's list of name servers may lie below it.
    let names = std::fs::canonicalize("/etc/resolv.conf").ok().filter(|p| p.starts_with("/run"));
    let names = names.and_then(|p| Some((std::fs::read(&p).ok()?, p)));
    tool::must(&["mount", "-t", "tmpfs", "-o", "mode=755", "lab", "/run"], work, LIMIT)?;
    if let Some((text, path)) = names {
        let parent = path.parent().unwrap_or(Path::new("/run"));
        std::fs::create_dir_all(parent)
            .and_then(|()| std::fs::write(&path, text))
            .map_err(|e| format!("write {}: {e}", path.display()))?;
    }
    std::fs::create_dir_all("/run/netns").map_err(|e| format!("make /run/netns: {e}"))
}

#[derive(Debug, Default)]
struct Count {
    passed: u64,
    failed: u64,
    failures: Vec<String>,
    skipped: Vec<(String, String)>,
}

impl Count {
    fn fail(&mut self, scenario: &str, what: &str) {
        println!("[{scenario}] FAILED  {what}");
        self.failed += 1;
        self.failures.push(format!("[{scenario}] {what}"));
    }

    fn add(&mut self, other: Count) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.failures.extend(other.failures);
        self.skipped.extend(other.skipped);
    }
}

/// A network with its services.
pub(crate) struct Site<'a> {
    lab: &'a Lab,
    scratch: PathBuf,
    pub(crate) switch: Switch,
    hosts: u8,
    services: Option<(Registry, Sink)>,
}

impl<'a> Site<'a> {
    /// A switch and nothing at it.
    fn bare(lab: &'a Lab, name: &str) -> Result<Site<'a>, String> {
        let scratch = lab.work.join(format!("site-{name}"));
        std::fs::create_dir_all(&scratch).map_err(|e| format!("make {}: {e}", scratch.display()))?;
        Ok(Site { lab, switch: Switch::new(name, &scratch)?, scratch, hosts: 0, services: None })
    }

    /// With a registry and a receiver of alerts.
    fn new(lab: &'a Lab, name: &str) -> Result<Site<'a>, String> {
        let mut site = Site::bare(lab, name)?;
        let registry = Registry::new(site.switch.netns(), Arc::clone(&lab.recording))?;
        site.services = Some((registry, Sink::new(site.switch.netns())?));
        Ok(site)
    }

    fn host_on(&mut self, name: &str, root: PathBuf) -> Result<Host, String> {
        self.hosts += 1;
        if self.hosts > net::HOSTS_LIMIT {
            return Err(format!("a site has at most {} hosts", net::HOSTS_LIMIT));
        }
        Host::new(name, self.hosts, root, &self.switch, &self.lab.cgroups, &self.scratch)
    }
}

/// How the gateway is run on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// By the systemd of the user `claw`.
    User,
    /// By the host's systemd, as the user `claw`.
    System,
    /// By the systemd of the user `claw`, of a program that is root's.
    UserOfRoots,
}

impl Unit {
    /// The beginning of a command that root gives to its manager.
    pub(crate) fn systemctl(self) -> &'static str {
        match self {
            Unit::User | Unit::UserOfRoots => {
                "setpriv --reuid claw --regid claw --init-groups env XDG_RUNTIME_DIR=/run/user/1000 systemctl --user"
            }
            Unit::System => "systemctl",
        }
    }

    fn template(self) -> Template {
        match self {
            Unit::User => Template::User,
            Unit::System | Unit::UserOfRoots => Template::System,
        }
    }

    /// Where the program lies.
    pub(crate) fn package(self) -> &'static str {
        match self {
            Unit::User => "/home/claw/.npm-global/lib/node_modules/openclaw",
            Unit::System | Unit::UserOfRoots => "/usr/local/lib/node_modules/openclaw",
        }
    }
}

/// One scenario while it is played.
pub(crate) struct Play<'a> {
    site: Site<'a>,
    name: &'static str,
    count: Count,
    /// For the leave-taking: logs of these hosts are kept when something failed.
    hosts: Vec<(String, String)>,
    bystanders: Bystanders,
}

impl Play<'_> {
    /// Boots a host with a node whose gateway the host itself starts.
    pub(crate) fn node(&mut self, name: &str, unit: Unit) -> Result<Host, String> {
        let mut host = self.unbooted(name, unit.template())?;
        host.boot()?;
        Ok(host)
    }

    /// Boots a node that is not a copy of the template's: its identity, token and database are its own.
    pub(crate) fn donor(&mut self, name: &str) -> Result<Host, String> {
        let mut host = self.unbooted(name, Template::User)?;
        host.boot()?;
        host.claw_must("systemctl --user stop openclaw-gateway.service && rm -rf .openclaw")?;
        disk::onboard(&host)?;
        host.token = judge::read_token(&host);
        host.claw_must("systemctl --user start openclaw-gateway.service")?;
        Ok(host)
    }

    /// Boots a host with Node and npm and nothing else.
    pub(crate) fn plain(&mut self, name: &str) -> Result<Host, String> {
        let mut host = self.unbooted(name, Template::Base)?;
        host.boot()?;
        Ok(host)
    }

    /// A host that is still to be changed or given a mount before it boots.
    pub(crate) fn unbooted(&mut self, name: &str, template: Template) -> Result<Host, String> {
        let root = self.site.lab.pool()?.snapshot(template, &format!("{}-{name}", self.name))?;
        let binary = demo::binary(&self.site.lab.root);
        let to = root.join("usr/bin/koboshi");
        std::fs::copy(&binary, &to).map_err(|e| format!("copy {}: {e}", binary.display()))?;
        Bystanders::move_in(&root)?;
        let mut host = self.site.host_on(name, root)?;
        host.keep = self.site.lab.keep;
        host.bystanders = Some(self.bystanders.clone());
        Ok(host)
    }

    pub(crate) fn pool(&self) -> Result<&Pool, String> {
        self.site.lab.pool()
    }

    pub(crate) fn registry(&self) -> Result<&Registry, String> {
        self.site.services.as_ref().map(|(r, _)| r).ok_or_else(|| "this site has no registry".to_owned())
    }

    pub(crate) fn sink(&self) -> Result<&Sink, String> {
        self.site.services.as_ref().map(|(_, s)| s).ok_or_else(|| "this site has no receiver".to_owned())
    }

    /// The version of a package that the registry has whole.
    pub(crate) fn recorded(&self, package: &str) -> Result<String, String> {
        self.site.lab.recording.version(package)
    }

    /// Counts a claim and says what was seen where it does not hold.
    pub(crate) fn claim(&mut self, holds: bool, what: &str, seen: impl FnOnce() -> String) {
        if holds {
            self.count.passed += 1;
            println!("[{}] ok      {what}", self.name);
        } else {
            self.count.fail(self.name, &format!("{what}: {}", seen()));
        }
    }

    /// A claim that is an answer or the reason why there is none.
    pub(crate) fn expect<T>(&mut self, result: Result<T, String>, what: &str) -> Option<T> {
        match result {
            Ok(value) => {
                self.claim(true, what, String::new);
                Some(value)
            }
            Err(why) => {
                self.claim(false, what, || why);
                None
            }
        }
    }

    pub(crate) fn say(&self, words: &str) {
        println!("[{}]         {words}", self.name);
    }

    /// What is worth reading of a host if something failed.
    pub(crate) fn remember(&mut self, host: &Host) {
        const LOGS: &str = "journalctl --no-pager -n 400 2>&1; echo ==; systemctl --failed --no-pager; echo ==; \
            ps axo pid,ppid,uid,stat,etimes,args --no-headers | cut -c1-200; echo ==; koboshi status 2>&1; \
            koboshi incidents 2>&1; for f in /var/lib/koboshi/incidents/*.json; do echo; cat $f; done; \
            echo == ; tail -n 100 /tmp/openclaw/*.log 2>/dev/null | cut -c1-400";
        if let Ok(out) = host.root(LOGS) {
            self.hosts.push((host.name.clone(), out.out + &out.err));
        }
    }

    /// Nothing that koboshi did not start was ended, however it is called.
    fn bystanders_live(&mut self) {
        let (alive, gone) = self.bystanders.seen();
        if alive > 0 || !gone.is_empty() {
            self.claim(gone.is_empty(), "every stranger of the same name still lives", || gone.join("; "));
        }
    }

    fn keep_for_a_look(&self) {
        let to = self.site.lab.root.join("target/lab-failed").join(self.name);
        let kept = std::fs::create_dir_all(&to).is_ok();
        for (host, text) in self.hosts.iter().filter(|_| kept) {
            let _ = std::fs::write(to.join(format!("{host}.log")), text);
        }
        for entry in std::fs::read_dir(&self.site.scratch).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|x| x == "console") {
                let _ = std::fs::copy(entry.path(), to.join(entry.file_name()));
            }
        }
        println!("[{}]         logs are kept in {}", self.name, to.display());
    }

    fn wait_for_the_end(&self) {
        println!("[{}] kept; Ctrl-C ends it", self.name);
        std::thread::sleep(KEPT_FOR);
    }
}
