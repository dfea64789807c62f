//! Layer 4: program and runtime from a healthy peer.
//!
//! What is wanted is decided first, and not by the donor: the list of our own newest trusted snapshot; where our store is
//! lost, a list whose digest was written down when that version was proven good here; and for a version that was never
//! proven here, a list on which two donors agree, or that of one who is marked `trusted`. Then everything is taken from
//! what is near (the live tree, the spare, the store, an earlier try), and only the missing pieces are asked for, from one
//! donor after another, over one connection each. A donor that lies, stalls, is half upgraded or disappears is left, and
//! what it gave before stays proven. The tree is staged beside the live one, read again as a whole, and exchanged.
//!
//! Only program and runtime exist in that conversation: identity, credentials and locks cannot travel.

mod stage;

use crate::trees::{self, Modes};
use crate::{Bench, Report, quiet};
use engine::{Class, Limits};
use host::clock::{self, Deadline};
use host::exchange::{self, Swapped};
use host::{Context, Error, Kind, Result, files};
use node::Node;
use node::gates::{self, Gate};
use node::range::Version;
use reach::{Call, Manifest, Name, Status, Target, Tree};
use serde::{Deserialize, Serialize};
use stage::{Near, Stage};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Peers asked in one turn: each costs a conversation.
const MAX_PEERS: usize = 8;
/// A donor that says nothing for this long is left; while it hashes, it says so every second.
const SILENCE: Duration = Duration::from_secs(10);
/// Kept back of the time for proving, exchanging and stopping.
const TAIL_MS: u64 = 15_000;
/// What is left to do once the gateway is stopped: renames, and file by file where those cannot be.
const AFTER_STOP: Duration = Duration::from_secs(5);
/// The least time a donor gets, however many are still to be asked.
const LEAST_SHARE_MS: u64 = 15_000;
/// Versions whose digests are remembered.
const MAX_KNOWN: usize = 8;
/// Their file.
const MAX_KNOWN_BYTES: u64 = 64 << 10;
/// A reason that names every donor's own is still one that people read.
const MAX_WHY_CHARS: usize = 1_500;
/// Blocks and inodes cost more than the bytes.
const SPACE_PERCENT: u64 = 130;

/// `[[peer]]`: another host whose node may lend its program.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Name or address.
    pub host: String,
    /// The account there; the node's own name of user when left out.
    #[serde(default)]
    pub user: String,
    /// The port of its SSH server.
    #[serde(default = "ssh_port")]
    pub port: u16,
    /// The one key that the host must prove: `ssh-ed25519 AAAA…`.
    pub host_key: String,
    /// The private key that is offered; `keys/donate` beside the configuration when left out.
    #[serde(default)]
    pub identity: PathBuf,
    /// Its word alone is enough for a version that was never proven here.
    #[serde(default)]
    pub trusted: bool,
}

fn ssh_port() -> u16 {
    22
}

impl Peer {
    /// How it is reached, with what was left out filled in.
    #[must_use]
    pub fn target(&self, node_user: &str, identity: &Path) -> Target {
        Target {
            host: self.host.clone(),
            port: self.port,
            user: if self.user.is_empty() { node_user.to_owned() } else { self.user.clone() },
            host_key: self.host_key.clone(),
            identity: if self.identity.as_os_str().is_empty() {
                identity.to_owned()
            } else {
                self.identity.clone()
            },
        }
    }
}

/// Whom to ask, and by what to know the answer.
#[derive(Debug, Clone)]
pub struct Help<'a> {
    /// The peers, in the order of the configuration.
    pub peers: &'a [Peer],
    /// The key offered where a peer names none.
    pub identity: PathBuf,
    /// This very binary: the SSH part runs in a child.
    pub me: PathBuf,
    /// Digests of programs that were proven good here.
    pub known: PathBuf,
}

/// A program that was proven on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    version: String,
    /// Of the list of the program alone, in hexadecimal.
    digest: String,
    /// What proved it.
    #[serde(default)]
    by: By,
}

/// What proved a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum By {
    /// A trusted snapshot holds it: the node served with it.
    #[default]
    Serving,
    /// It was made here of tarballs with the hashes that the registry promises. Whether it serves is not said.
    Registry,
}

/// The file of what was proven here, in koboshi's own directory.
#[must_use]
pub fn known_programs(state_dir: &Path) -> PathBuf {
    state_dir.join("programs.json")
}

/// Writes down what a program that was made of the registry's proven tarballs consists of: the registry's promise is of
/// tarballs, a peer lends a tree, and this is where the two can be held against each other.
///
/// # Errors
/// When it cannot be read whole or written down.
pub(crate) fn remember_made(program: &Path, version: &str, known: &Path, deadline: Deadline) -> Result<()> {
    let (list, whole) = trees::one(Tree::Program, program, deadline);
    if !whole {
        let what = format!("listing the program in {}", program.display());
        return Err(Error::new(Kind::TimedOut, what, "it could not be read whole in time"));
    }
    let digest = hex(&list.digest());
    note_known(Known { version: version.to_owned(), digest, by: By::Registry }, known)
}

/// Writes down what the newest trusted snapshot's program is, so that a donor's word can be checked when the store is
/// lost.
///
/// # Errors
/// When the store cannot be read or the file not written.
pub fn remember(store: &store::Store, known: &Path, deadline: Deadline) -> Result<()> {
    let Some(trees::Remembered { info, list, .. }) = trees::remembered(store, deadline)? else {
        return Ok(());
    };
    let Some(version) = info.version else { return Ok(()) };
    note_known(Known { version, digest: hex(&list.only(Tree::Program).digest()), by: By::Serving }, known)
}

fn note_known(one: Known, known: &Path) -> Result<()> {
    let mut all = load(known);
    let same = |k: &Known| (&k.version, &k.digest) == (&one.version, &one.digest);
    // Having served says more than having been made.
    if all.first() == Some(&one) || one.by == By::Registry && all.iter().any(same) {
        return Ok(());
    }
    all.retain(|k| !same(k));
    all.insert(0, one);
    all.truncate(MAX_KNOWN);
    let text = serde_json::to_vec_pretty(&all)
        .map_err(|e| Error::new(Kind::System, format!("writing {}", known.display()), e))?;
    files::write_atomic(known, &text, 0o600)
}

fn load(known: &Path) -> Vec<Known> {
    // Missing or damaged: then nothing is known, and two donors must agree.
    let bytes = files::read_bounded(known, MAX_KNOWN_BYTES).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

fn hex(name: &Name) -> String {
    name.iter().map(|b| format!("{b:02x}")).collect()
}

/// Whether the SSH server of at least one peer says its first line. Nothing is proven by it but that it speaks.
#[must_use]
pub fn one_speaks(peers: &[Peer], deadline: Deadline) -> bool {
    use std::io::Read;
    use std::net::ToSocketAddrs;
    peers.iter().take(MAX_PEERS).any(|peer| {
        let found = (peer.host.as_str(), peer.port).to_socket_addrs().ok().and_then(|mut all| all.next());
        let left = || deadline.left().max(Duration::from_millis(1));
        let Some(Ok(mut stream)) = found.map(|at| std::net::TcpStream::connect_timeout(&at, left())) else {
            return false;
        };
        let mut word = [0; 4];
        stream.set_read_timeout(Some(left())).is_ok()
            && stream.read_exact(&mut word).is_ok()
            && word == *b"SSH-"
    })
}

/// What is to lie here, and who says so.
struct Goal {
    list: Manifest,
    modes: Modes,
    version: Option<String>,
    proof: Proof,
}

/// What says that a list is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Proof {
    /// It is our own newest trusted snapshot's.
    OwnList,
    /// The digest of its program was written down when that was proven here.
    OwnDigest,
    /// The digest of its program was written down when it was made here of the registry's proven tarballs.
    Registry,
    /// Only donors say so.
    Donors,
}

impl Proof {
    /// Whether this program served here: then it stays also when the start fails, since going back would put damage in
    /// its place.
    fn ours(self) -> bool {
        match self {
            Proof::OwnList | Proof::OwnDigest => true,
            Proof::Registry | Proof::Donors => false,
        }
    }
}

/// A donor that was heard and waits for another one to agree.
struct Heard {
    name: String,
    /// Whom it is known by: one host under two names is one witness.
    host_key: String,
    call: Call,
    list: Manifest,
    version: Option<String>,
}

/// The work of layer 4.
pub fn work(bench: &mut Bench<'_>, help: &Help<'_>, hung: bool) -> Result<Report> {
    let mut report = Report::default();
    if help.peers.is_empty() {
        return Err(Error::new(Kind::NotFound, "copy the program from a peer", "no peer is configured")
            .hint("koboshi fleet enroll HOST"));
    }
    if is_open(bench.node) {
        // An earlier one that was never judged: nobody knows whether it serves.
        take_back(bench, hung, &mut report)?;
    }
    let goal = own_goal(bench, &mut report);
    let mut copy = Copy::new(bench, help);
    if let Some(goal) = goal {
        copy.aim(goal, &mut report)?;
    }
    copy.ask_all(&mut report)?;
    // A failed layer's lines are lost but for its reason: so each donor's own goes into it.
    let (goal, stages) = copy.done().map_err(|e| {
        let why = std::iter::once(e.why.as_str()).chain(report.undone.iter().map(String::as_str));
        let why = why.collect::<Vec<_>>().join("; ");
        Error { why: why.chars().take(MAX_WHY_CHARS).collect(), ..e }
    })?;
    if stages.is_empty() {
        report
            .did("program and runtime are, byte for byte, what they should be: a copy would change nothing");
        return Ok(report);
    }
    for (tree, stage) in &stages {
        stage.prove(*tree, bench.deadline)?;
    }
    fits_together(bench, &goal, &stages)?;
    // systemd would start what is being replaced.
    quiet::hold(bench, &mut report);
    quiet::stop(bench, hung, AFTER_STOP, &mut report)?;
    for (tree, _) in &stages {
        let live = trees::place(bench.node, *tree);
        let swapped = exchange::swap_by(&Stage::staged(*tree, &live), &live, bench.deadline)?;
        report.did(format!("the {} was exchanged; every byte of it was proven", words(*tree)));
        if goal.proof.ours() {
            keep(&swapped, &bench.quarantine)?;
        }
    }
    link(bench.node, &mut report);
    bench.manager.clear_latch(bench.deadline)?;
    Ok(report)
}

fn words(tree: Tree) -> &'static str {
    match tree {
        Tree::Program => "program",
        Tree::Runtime => "runtime",
    }
}

/// What our own newest trusted snapshot says, if its program may meet the databases as they are.
fn own_goal(bench: &Bench<'_>, report: &mut Report) -> Option<Goal> {
    let trees::Remembered { info, list, modes } = match trees::remembered(bench.store?, bench.deadline) {
        Ok(found) => found?,
        Err(e) => {
            report.could_not(format!("our own list cannot be read: {}", e.why));
            return None;
        }
    };
    let served = info.baseline.get("schema").and_then(serde_json::Value::as_u64);
    let served = served.and_then(|s| u32::try_from(s).ok()).unwrap_or(u32::MAX);
    if let Gate::Closed(why) = gates::schema(bench.node, (served, u32::MAX), bench.deadline) {
        report.could_not(format!("the program of snapshot {} is not used: {why}", info.id));
        return None;
    }
    Some(Goal { list, modes, version: info.version, proof: Proof::OwnList })
}

/// A copy under way.
struct Copy<'a> {
    node: &'a Node,
    store: Option<&'a store::Store>,
    spare: Option<&'a Path>,
    want_version: Option<String>,
    served_schema: Option<u32>,
    help: &'a Help<'a>,
    known: Vec<Known>,
    goal: Option<Goal>,
    stages: Vec<(Tree, Stage)>,
    waiting: Vec<Heard>,
    deadline: Deadline,
    limits: Limits,
}

impl<'a> Copy<'a> {
    fn new(bench: &'a Bench<'_>, help: &'a Help<'a>) -> Copy<'a> {
        let version = bench.baseline.and_then(|b| b.version.clone()).or_else(|| bench.node.version.clone());
        Copy {
            node: bench.node,
            store: bench.store,
            spare: bench.spares.iter().find(|(name, _)| name == "program").map(|(_, path)| path.as_path()),
            want_version: version,
            served_schema: bench.baseline.and_then(|b| b.schema),
            help,
            known: load(&help.known),
            goal: None,
            stages: Vec::new(),
            waiting: Vec::new(),
            deadline: bench.deadline,
            limits: bench.limits,
        }
    }

    /// From here on it is known what is wanted: everything near is used.
    fn aim(&mut self, goal: Goal, report: &mut Report) -> Result<()> {
        let shelf = self.store.and_then(|s| s.shelf().ok());
        let mut near_pieces = 0;
        for tree in [Tree::Program, Tree::Runtime] {
            let list = goal.list.only(tree);
            if list.entries().is_empty() || !self.takes(tree, &goal) {
                continue;
            }
            let live = trees::place(self.node, tree);
            let (now, whole) = trees::one(tree, &live, self.deadline);
            if whole && now.digest() == list.digest() {
                continue;
            }
            let room = list.bytes() / 100 * SPACE_PERCENT;
            if let Gate::Closed(why) = gates::space(&Stage::dir_for(tree, &live), room) {
                return Err(Error::new(Kind::NoSpace, format!("staging the {}", words(tree)), why));
            }
            let mut stage = Stage::open(tree, list, goal.modes.clone(), &live, self.deadline)?;
            let mut near = Near {
                live: (&live, &now),
                spare: self.spare.filter(|_| tree == Tree::Program),
                shelf: shelf.as_ref().map(store::lend::Shelf::reader),
            };
            stage.fill(&mut near, self.deadline)?;
            near_pieces += stage.near;
            self.stages.push((tree, stage));
        }
        if !self.stages.is_empty() {
            report.did(format!("{near_pieces} pieces were near, {} are missing here", self.missing().len()));
        }
        self.goal = Some(goal);
        Ok(())
    }

    /// Whether this tree is taken at all. A runtime is nobody's but its maker's: it is put back where our own list knows
    /// it, else only where none is left that fits.
    fn takes(&self, tree: Tree, goal: &Goal) -> bool {
        match tree {
            Tree::Program => true,
            Tree::Runtime if goal.proof == Proof::OwnList => true,
            // Nobody has run it here yet, and root will not be the first.
            Tree::Runtime if rustix::process::geteuid().is_root() => false,
            Tree::Runtime => {
                let single = goal.list.only(tree).entries().len() == 1;
                single == self.node.runtime_dir.is_none()
                    && gates::runtime_version(self.node, &self.node.node_bin, self.deadline).is_err()
            }
        }
    }

    fn missing(&self) -> Vec<Name> {
        let mut all: Vec<Name> = self.stages.iter().flat_map(|(_, s)| s.missing()).collect();
        // The same piece may be wanted in both trees; asking twice would be an answer too many.
        let mut seen = std::collections::HashSet::new();
        all.retain(|n| seen.insert(*n));
        all
    }

    fn complete(&self) -> bool {
        self.goal.is_some() && self.missing().is_empty()
    }

    fn ask_all(&mut self, report: &mut Report) -> Result<()> {
        let peers: Vec<&Peer> = self.help.peers.iter().take(MAX_PEERS).collect();
        for (n, peer) in peers.iter().enumerate() {
            if self.complete() {
                break;
            }
            let until = self.share(peers.len() - n);
            if until.passed() {
                report.could_not(format!("{}: no time is left to ask it", peer.host));
                break;
            }
            if let Err(e) = self.ask(peer, until, report) {
                if e.kind == Kind::NoSpace {
                    return Err(e);
                }
                report.could_not(format!("{}: {}", peer.host, e.why));
            }
        }
        Ok(())
    }

    /// A donor's part of the time that is left: a slow one must not use up all of it while others wait.
    fn share(&self, of: usize) -> Deadline {
        let left = u64::try_from(self.deadline.left().as_millis())
            .unwrap_or(u64::MAX)
            .saturating_sub(self.limits.of(TAIL_MS));
        let part = (left / of.max(1) as u64).max(self.limits.of(LEAST_SHARE_MS)).min(left);
        Deadline::after(Duration::from_millis(part))
    }

    fn ask(&mut self, peer: &Peer, until: Deadline, report: &mut Report) -> Result<()> {
        let target = peer.target(&self.node.user, &self.help.identity);
        let began = clock::now();
        let mut call = Call::open(&self.help.me, &target, self.limits.span(SILENCE), until)?;
        let status = call.status()?;
        self.fits(&status).map_err(|why| Error::new(Kind::NotFound, "using this donor", why))?;
        // The donor serves what it listed: it is asked for its list also where ours is the one that counts.
        let list = call.list()?;
        let name = peer.host.clone();
        if self.goal.is_none() {
            let digest = list.only(Tree::Program).digest();
            let version = status.version.clone();
            let known =
                self.known.iter().find(|k| Some(&k.version) == version.as_ref() && k.digest == hex(&digest));
            let known = known.map(|k| k.by);
            let witness = |h: &&Heard| h.host_key != peer.host_key && h.version == version;
            let witnesses = || self.waiting.iter().filter(witness);
            let agrees = witnesses().any(|h| h.list.only(Tree::Program).digest() == digest);
            let agrees_wholly = witnesses().any(|h| h.list.digest() == list.digest());
            if known.is_some() || agrees || peer.trusted {
                report.did(match (known, agrees) {
                    (Some(By::Serving), _) => format!("{name} has the program that was proven good here"),
                    (Some(By::Registry), _) => {
                        format!("{name} has the program that was made here of the registry's proven tarballs")
                    }
                    (None, true) => format!("{name} and another donor agree on every byte"),
                    (None, false) => format!("{name} is trusted for a version that was never proven here"),
                });
                // The digest is of the program: a runtime needs more than that.
                let list = if peer.trusted || agrees_wholly { list } else { list.only(Tree::Program) };
                let proof = match known {
                    Some(By::Serving) => Proof::OwnDigest,
                    Some(By::Registry) => Proof::Registry,
                    None => Proof::Donors,
                };
                self.aim(Goal { list, modes: Modes::default(), version, proof }, report)?;
            } else {
                report.could_not(format!(
                    "{name} has {}, which was never proven here: a second donor must agree, or it be marked trusted",
                    version.as_deref().unwrap_or("an unknown version")
                ));
                self.waiting.push(Heard { name, host_key: peer.host_key.clone(), call, list, version });
                return Ok(());
            }
        }
        self.fetch(&name, &mut call, began, report)?;
        // Whoever was waiting with the same list may fill what is still missing.
        for mut heard in std::mem::take(&mut self.waiting) {
            let same = self.goal.as_ref().is_some_and(|g| {
                g.list.only(Tree::Program).digest() == heard.list.only(Tree::Program).digest()
                    && g.version == heard.version
            });
            if same
                && !self.complete()
                && let Err(e) = self.fetch(&heard.name, &mut heard.call, clock::now(), report)
            {
                report.could_not(format!("{}: {}", heard.name, e.why));
            }
        }
        Ok(())
    }

    fn fetch(
        &mut self,
        name: &str,
        call: &mut Call,
        began: engine::Moment,
        report: &mut Report,
    ) -> Result<()> {
        let missing = self.missing();
        if missing.is_empty() {
            return Ok(());
        }
        let stages = &mut self.stages;
        let mut came = (0_u64, 0_u64);
        let got = call.get(&missing, &mut |name, bytes| {
            came = (came.0 + 1, came.1 + bytes.len() as u64);
            stages.iter_mut().try_for_each(|(_, stage)| stage.put(name, bytes))
        });
        let ms = clock::now().since_ms(began).unwrap_or(0);
        report.did(format!("{name} gave {} pieces, {} bytes, proven, in {ms} ms", came.0, came.1));
        let got = got?;
        if !got.missing.is_empty() {
            report.could_not(format!("{name} does not have {} of the pieces", got.missing.len()));
        }
        Ok(())
    }

    /// Whether this donor's program may be used here at all.
    fn fits(&self, status: &Status) -> std::result::Result<(), String> {
        if status.arch != std::env::consts::ARCH {
            return Err(format!("its machine is {}, this one {}", status.arch, std::env::consts::ARCH));
        }
        let libc = trees::libc(&self.node.node_bin);
        if status.libc != libc {
            return Err(format!("its programs are made for {}, ours for {libc}", status.libc));
        }
        if status.healthy == Some(false) && status.source != "snapshot" {
            return Err(format!("its own node does not serve: {}", status.why));
        }
        let Some(has) = &status.version else { return Err("it has no program".into()) };
        let want = match &self.goal {
            Some(goal) => goal.version.as_ref(),
            None => self.want_version.as_ref(),
        };
        if let Some(schema) = status.schema
            && let Gate::Closed(why) = gates::schema(self.node, schema, self.deadline)
        {
            return Err(why);
        }
        let Some(want) = want.filter(|want| *want != has) else { return Ok(()) };
        if self.goal.is_some() {
            return Err(format!("it has {has}, wanted is {want}"));
        }
        match (Version::parse(has), Version::parse(want)) {
            (Some(theirs), Some(ours)) if theirs > ours => {}
            (_, _) => return Err(format!("it has {has}, the last good one here was {want}")),
        }
        // A newer program that would raise the schema leaves no way back.
        match (status.schema, self.served_schema) {
            (Some((theirs, _)), Some(ours)) if theirs == ours => Ok(()),
            (_, _) => Err(format!("it has {has}, which would migrate the databases of {want}")),
        }
    }

    fn done(self) -> Result<(Goal, Vec<(Tree, Stage)>)> {
        let what = "copy the program from a peer";
        let missing = self.missing().len();
        match self.goal {
            None => Err(Error::new(Kind::NotFound, what, "no donor's program may be used here")),
            Some(_) if missing > 0 => {
                let why =
                    format!("{missing} pieces are still missing; what was proven is kept for the next try");
                Err(Error::new(Kind::NotFound, what, why))
            }
            Some(goal) => Ok((goal, self.stages)),
        }
    }
}

/// A program that is not of our own list must be what its donor said it is, suit the databases and the runtime that will
/// run it. The donor's word was enough to ask it; what counts is what lies in the stage.
fn fits_together(bench: &Bench<'_>, goal: &Goal, stages: &[(Tree, Stage)]) -> Result<()> {
    let what = "copy the program from a peer";
    let staged = |tree: Tree| {
        let live = trees::place(bench.node, tree);
        let new = stages.iter().any(|(t, _)| *t == tree);
        if new { Stage::staged(tree, &live) } else { live }
    };
    if goal.proof == Proof::OwnList {
        return Ok(());
    }
    let program = Node { package_dir: staged(Tree::Program), ..bench.node.clone() };
    if program.package_version() != goal.version {
        let said = |v: Option<&str>| v.unwrap_or("of no version").to_owned();
        let (is, was) = (said(program.package_version().as_deref()), said(goal.version.as_deref()));
        return Err(Error::new(Kind::Corrupt, what, format!("it is {is}, its donor called it {was}")));
    }
    if let Some(schema) = program.schema_versions()
        && let Gate::Closed(why) = gates::schema(bench.node, schema, bench.deadline)
    {
        return Err(Error::new(Kind::NotFound, what, why));
    }
    let runtime = match &bench.node.runtime_dir {
        Some(dir) => {
            let below = bench.node.node_bin.strip_prefix(dir).unwrap_or(Path::new("bin/node"));
            staged(Tree::Runtime).join(below)
        }
        None => staged(Tree::Runtime),
    };
    // As the node's user: a runtime is staged from a stranger's word only by that user.
    let version = gates::runtime_version(bench.node, &runtime, bench.deadline)
        .map_err(|why| Error::new(Kind::NotFound, what, why))?;
    match gates::engine(&staged(Tree::Program), version) {
        Gate::Open => Ok(()),
        Gate::Closed(why) => Err(Error::new(Kind::NotFound, what, why)),
    }
}

/// Accepts an exchange: what was there before goes to the quarantine.
fn keep(swapped: &Swapped, quarantine: &Path) -> Result<()> {
    if let Some(previous) = swapped.previous.as_ref().filter(|p| p.symlink_metadata().is_ok()) {
        exchange::move_aside(previous, quarantine)?;
    }
    swapped.settle()?;
    // Empty by now, unless a stage still lies in it.
    let _ = swapped.stage.parent().map(std::fs::remove_dir);
    Ok(())
}

/// Ends what an exchange left open: a program that was never proven here stays if the node served with it, and goes
/// back for what was there before if not. Returns whether there was anything to end. The gateway must not run when it goes
/// back.
///
/// # Errors
/// When it cannot be ended; to be called again.
pub fn conclude(node: &Node, quarantine: &Path, good: bool, deadline: Deadline) -> Result<bool> {
    let mut any = false;
    for tree in [Tree::Program, Tree::Runtime] {
        if deadline.passed() {
            break;
        }
        let stage = Stage::staged(tree, &trees::place(node, tree));
        // Asked by the notes alone: nothing is finished here that was not finished before.
        if !open_exchange(&stage) {
            continue;
        }
        any = true;
        if good {
            if let Some(swapped) = exchange::resume(&stage)? {
                keep(&swapped, quarantine)?;
            }
        } else {
            exchange::undo(&stage)?;
        }
    }
    Ok(any)
}

/// Takes back an exchange that was not followed by a good verdict.
///
/// # Errors
/// When the gateway cannot be stopped or the exchange not taken back.
pub fn take_back(bench: &mut Bench<'_>, hung: bool, report: &mut Report) -> Result<()> {
    quiet::hold(bench, report);
    quiet::stop(bench, hung, AFTER_STOP, report)?;
    if conclude(bench.node, &bench.quarantine, false, bench.deadline)? {
        report.did("the peer's program goes back for what was there before: the node did not serve with it");
    }
    Ok(())
}

/// Whether an exchange with this stage waits for its judgement.
fn open_exchange(stage: &Path) -> bool {
    let mut notes = stage.file_name().unwrap_or_default().to_os_string();
    notes.push(".switch");
    stage.with_file_name(notes).symlink_metadata().is_ok()
}

/// Whether any exchange of this node's waits for its judgement.
#[must_use]
pub fn is_open(node: &Node) -> bool {
    [Tree::Program, Tree::Runtime].iter().any(|t| open_exchange(&Stage::staged(*t, &trees::place(node, *t))))
}

/// The command's link, where it is gone: the service starts without it, people do not.
fn link(node: &Node, report: &mut Report) {
    let link = node.prefix.join("bin").join("openclaw");
    if link.symlink_metadata().is_ok() {
        return;
    }
    let target = match node.package_dir.strip_prefix(&node.prefix) {
        Ok(below) => Path::new("..").join(below),
        Err(_) => node.package_dir.clone(),
    };
    let made = std::fs::create_dir_all(node.prefix.join("bin"))
        .and_then(|()| std::os::unix::fs::symlink(target.join("openclaw.mjs"), &link))
        .context(|| format!("making the link {}", link.display()));
    match made {
        Ok(()) => report.did("the command's link was made again"),
        Err(e) => report.could_not(format!("{e}")),
    }
}

/// What layer 4 works on, for the record of what failed: the peers, and nothing that changes by itself.
#[must_use]
pub fn inputs(peers: &[Peer]) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hash = DefaultHasher::new();
    peers.hash(&mut hash);
    hash.finish()
}

/// The classes that a peer can give: for whoever asks what this layer could ever touch.
pub const CLASSES: [Class; 2] = [Class::Program, Class::Runtime];

#[cfg(test)]
mod tests;
