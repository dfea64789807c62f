//! One look at a node: who runs, who listens, what they answer. No judgement.
//!
//! Every part has its own bound and all of them one deadline. What costs something (children, databases, log) is
//! read only while the plain answers are missing. Nothing is run and nothing is written.

use crate::http::{self, HttpError, Line, Response, Tongue};
use crate::identity::{self, Identity};
use crate::update::UpdateAtWork;
use crate::ws::{self, HelloResult, Token};
use crate::{Node, config, lock, tls};
use engine::Moment;
use host::clock::Deadline;
use host::process::{Listener, ProcessId, listeners, owner_of};
use host::tls::known::Client;
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

/// The first HTTP probe waits this long: a healthy gateway answers in 6 ms, a loaded one within a second.
const FIRST_PROBE: Duration = Duration::from_millis(1_500);
/// The others, once the first was silent: only to see whether any answers at all.
const OTHER_PROBE: Duration = Duration::from_millis(500);
/// A hello takes 0.1 to 0.5 s.
const HELLO_PROBE: Duration = Duration::from_secs(5);
/// Reading the identity of a live node takes milliseconds.
const IDENTITY_PROBE: Duration = Duration::from_secs(2);
/// Words of a strange answer that are kept.
const WHY_LIMIT_CHARS: usize = 120;

/// What to look at beyond process and HTTP.
#[derive(Debug, Clone, Default)]
pub struct Want {
    /// Say hello over the WebSocket.
    pub hello: bool,
    /// Read the identity from the databases.
    pub identity: bool,
    /// Look for an update at work.
    pub update: bool,
    /// What a search for an update found a moment ago (`Some(None)`: nothing): then none is made. It goes through the open
    /// files of every process on the host.
    pub searched: Option<Option<UpdateAtWork>>,
    /// What the service manager says, where there is one.
    pub service: Option<ServiceLook>,
    /// The process that we started ourselves, where there is one.
    pub main: Option<ProcessId>,
    /// Where the gateway's output goes, where we know it.
    pub log: Option<PathBuf>,
    /// The caller knows of a turn under way.
    pub known_turn: bool,
    /// Who was found to listen by an earlier look ([`Look::heard`]). While that process still holds that very socket,
    /// the kernel's table is not read again: it is by far the dearest part of a look.
    pub heard: Option<Heard>,
}

/// A listener and the descriptor by which the gateway holds it.
#[derive(Debug, Clone)]
pub struct Heard {
    listener: Listener,
    owner: ProcessId,
    fd: i32,
    /// What it was last found to speak. It keeps to that until its next start, whatever its config says meanwhile.
    tongue: Option<Tongue>,
    /// What TLS remembers of it: as long as the listener is the same, so is the server.
    client: Option<Client>,
}

impl Heard {
    /// Finds the descriptor by which `owner` itself holds the listening socket.
    fn of(listener: &Listener, owner: ProcessId) -> Option<Heard> {
        let socket = socket_link(listener);
        let (fd, _) = owner.open_files().into_iter().find(|(_, link)| *link == socket)?;
        Some(Heard { listener: *listener, owner, fd, tongue: None, client: None })
    }

    /// Whether the same process still holds the same socket.
    fn holds(&self) -> bool {
        self.owner.alive()
            && std::fs::read_link(format!("/proc/{}/fd/{}", self.owner.pid, self.fd))
                .is_ok_and(|link| link == socket_link(&self.listener))
    }
}

fn socket_link(listener: &Listener) -> PathBuf {
    PathBuf::from(format!("socket:[{}]", listener.inode))
}

/// Everything seen at one moment.
#[derive(Debug, Clone)]
pub struct Look {
    /// When the look began.
    pub at: Moment,
    /// The node's port.
    pub port: u16,
    /// The gateway process, if one lives.
    pub process: Option<Process>,
    /// Who listens on the port.
    pub listening: Listening,
    /// `/healthz`.
    pub health: Health,
    /// `/startupz`.
    pub startup: Startup,
    /// `/readyz`.
    pub ready: Ready,
    /// The WebSocket, if it was asked.
    pub hello: Option<HelloResult>,
    /// The service manager's word.
    pub service: Option<ServiceLook>,
    /// What people should know of the certificate that the gateway shows; looked at together with the hello.
    pub certificate: Option<String>,
    /// The identity, if it was read.
    pub identity: Option<IdentityLook>,
    /// What moves though nothing answers. Zero while the gateway answers: then nobody asks.
    pub activity: Activity,
    /// An update at work.
    pub update: Option<UpdateAtWork>,
    /// The version that the package on disk names.
    pub disk_version: Option<String>,
    /// Why this look is worth nothing, if our own side failed.
    pub our_side: Option<String>,
    /// The caller knows of a turn under way.
    pub known_turn: bool,
    /// What is known of the process that the caller or the service manager started.
    pub main: Main,
    /// To be handed to the next look ([`Want::heard`]).
    pub heard: Option<Heard>,
}

/// The started process, apart from the lock: a gateway writes its lock only 10 to 20 s after it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Main {
    /// Nobody told us of one.
    Untold,
    /// It lives, or its manager speaks for it.
    Told,
    /// It has ended.
    Ended,
}

/// The gateway process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its identity.
    pub id: ProcessId,
    /// Its user.
    pub uid: u32,
    /// Whether that is the node's user (and the lock file's owner).
    pub uid_right: bool,
    /// Whether the lock file names it.
    pub by_lock: bool,
    /// State letter of `/proc/PID/stat`.
    pub state: char,
    /// Whether a debugger holds it.
    pub traced: bool,
    /// User and system time, in milliseconds.
    pub cpu_ms: u64,
    /// Time for which its main thread wanted a core and had to wait for one: on a loaded host a spinning loop gets
    /// less than half a core and waits for the rest.
    pub wait_ms: u64,
    /// The CPU of its descendants, read only while it does not answer.
    pub children_cpu_ms: u64,
    /// Time since it began.
    pub age_ms: u64,
    /// Its cgroup v2 path.
    pub cgroup: Option<String>,
}

/// Who listens on the node's port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listening {
    /// Nobody.
    Nobody,
    /// The gateway process or a child of it.
    Gateway,
    /// Somebody whose process we may not look into.
    Unknown {
        /// The socket's user.
        uid: u32,
    },
    /// Another process.
    Stranger {
        /// Which, if it could be found.
        who: Option<ProcessId>,
        /// The socket's user.
        uid: u32,
    },
}

/// `/healthz`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// The right body.
    Live,
    /// An answer that no healthy gateway gives.
    Wrong {
        /// What came.
        why: String,
    },
    /// Nobody listens.
    Refused,
    /// No answer in time.
    Silent,
}

/// `/startupz`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Startup {
    /// Up; the version it names.
    Started {
        /// Told to local callers only.
        version: Option<String>,
    },
    /// Sidecars are still coming up.
    Starting,
    /// It is finishing its work to stop.
    Draining,
    /// No such answer belongs to a gateway.
    Wrong {
        /// What came.
        why: String,
    },
    /// Nobody listens.
    Refused,
    /// No answer in time.
    Silent,
}

/// `/readyz`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ready {
    /// The gateway's own words.
    Answer {
        /// Whether it takes traffic.
        ready: bool,
        /// What does not work.
        failing: Vec<String>,
        /// Channels that its crash-loop breaker holds back.
        suppressed: Vec<String>,
    },
    /// No such answer belongs to a gateway.
    Wrong {
        /// What came.
        why: String,
    },
    /// Nobody listens.
    Refused,
    /// No answer in time.
    Silent,
}

impl Health {
    /// Whether nothing was answered at all.
    #[must_use]
    pub fn silent(&self) -> bool {
        matches!(self, Health::Silent | Health::Refused)
    }
}

impl Startup {
    /// Whether nothing was answered at all.
    #[must_use]
    pub fn silent(&self) -> bool {
        matches!(self, Startup::Silent | Startup::Refused)
    }
}

impl Ready {
    /// Whether nothing was answered at all.
    #[must_use]
    pub fn silent(&self) -> bool {
        matches!(self, Ready::Silent | Ready::Refused)
    }
}

/// The identity as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdentityLook {
    /// It could be read.
    Known {
        /// Who the node is.
        identity: Identity,
        /// When its config says it was onboarded.
        onboarded: Option<String>,
    },
    /// It could not.
    Unreadable {
        /// Why.
        why: String,
    },
}

/// Signs of work beside the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Activity {
    /// Size of the file that takes the process's output, where it is one.
    pub log_bytes: u64,
    /// Changes whenever an agent's database was written to.
    pub database: u64,
}

/// What a service manager is doing with the unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServicePhase {
    /// Activating, or waiting to try again.
    Starting,
    /// Active.
    Running,
    /// Deactivating.
    Stopping,
    /// Inactive or failed.
    Down,
    /// It could not be asked.
    Unknown,
}

/// What matters here of a service manager's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceLook {
    /// What it is doing.
    pub phase: ServicePhase,
    /// The main process.
    pub main: Option<ProcessId>,
    /// The unit's cgroup v2 path.
    pub cgroup: Option<String>,
    /// Why it will not start again by itself.
    pub latched: Option<String>,
    /// The owner's will to have it down, in words.
    pub will: Option<String>,
}

impl From<&host::service::ServiceState> for ServiceLook {
    fn from(state: &host::service::ServiceState) -> ServiceLook {
        use host::service::Active as A;
        let phase = match state.active {
            A::Active => ServicePhase::Running,
            A::Activating | A::AutoRestart => ServicePhase::Starting,
            A::Deactivating => ServicePhase::Stopping,
            A::Inactive | A::Failed => ServicePhase::Down,
            A::Unknown => ServicePhase::Unknown,
        };
        // A hold is our own doing and no will of the owner's.
        let will = if state.held {
            None
        } else if state.masked {
            Some("its unit is masked".into())
        } else if state.enabled == Some(false) && phase == ServicePhase::Down {
            Some("its unit is disabled".into())
        } else {
            None
        };
        ServiceLook {
            phase,
            main: state.main,
            cgroup: state.cgroup.clone(),
            latched: state.latched.clone(),
            will,
        }
    }
}

/// Looks once. Never longer than the deadline.
#[must_use]
pub fn look(node: &Node, want: &Want, deadline: Deadline) -> Look {
    let mut look = Look {
        at: host::clock::now(),
        port: node.port,
        process: None,
        listening: Listening::Nobody,
        health: Health::Silent,
        startup: Startup::Silent,
        ready: Ready::Silent,
        hello: None,
        certificate: None,
        service: want.service.clone(),
        identity: None,
        activity: Activity::default(),
        update: None,
        disk_version: None,
        our_side: own_side(deadline),
        known_turn: want.known_turn,
        heard: None,
        main: match (want.main, &want.service) {
            (Some(id), _) if !id.alive() => Main::Ended,
            (Some(_), _) | (None, Some(_)) => Main::Told,
            (None, None) => Main::Untold,
        },
    };
    if look.our_side.is_some() {
        return look;
    }
    let known = want.heard.clone().filter(|h| h.listener.addr.port() == node.port && h.holds());
    let heard = match &known {
        Some(known) => Some(known.listener),
        None => listener(node.port),
    };
    look.process = process(node, want, heard.as_ref());
    // A proxy on an address of its own in front of the gateway is in nobody's way, and no gateway that is down.
    let heard =
        heard.filter(|l| rank(l) < FAR || listening(look.process.as_ref(), Some(l)) == Listening::Gateway);
    let gateway = look.process.as_ref().map(|p| p.id);
    look.heard = known.filter(|k| gateway == Some(k.owner));
    look.listening = if look.heard.is_some() {
        Listening::Gateway
    } else {
        listening(look.process.as_ref(), heard.as_ref())
    };
    if look.heard.is_none()
        && look.listening == Listening::Gateway
        && let (Some(listener), Some(gateway)) = (&heard, gateway)
    {
        look.heard = Heard::of(listener, gateway);
    }
    let addr = address(node.port, heard.as_ref());
    // The kernel accepts for a stopped process, which will not answer: asking would only cost the patience.
    let mut spoken = Tongue::Plain;
    if !look.process.as_ref().is_some_and(|p| matches!(p.state, 'T' | 't')) {
        spoken = probe_http(&mut look, node, want, heard.as_ref(), addr, deadline);
    }
    if want.hello && look.health == Health::Live {
        look.hello = proven(&look).then(|| say_hello(node, addr, spoken, deadline));
        look.disk_version = node.package_version();
    }
    if want.identity {
        look.identity = Some(read_identity(node, deadline.min(Deadline::after(IDENTITY_PROBE))));
    }
    let answers = look.health == Health::Live && matches!(look.startup, Startup::Started { .. });
    if !answers {
        look.activity = activity(node, want, look.process.as_ref().map(|p| p.id));
        if let Some(p) = &mut look.process {
            p.children_cpu_ms = children_cpu_ms(p.id);
        }
    }
    if want.update || look.process.is_none() {
        look.update = want.searched.clone().unwrap_or_else(|| crate::update::look(node));
    }
    look
}

/// Whether it is the gateway that a connection to the port meets. The token is given to nobody else, and only the
/// gateway is asked in TLS.
fn proven(look: &Look) -> bool {
    match (&look.listening, &look.process) {
        (Listening::Gateway, Some(_)) => look.heard.as_ref().is_none_or(Heard::holds),
        (Listening::Unknown { uid }, Some(process)) => process.uid_right && *uid == process.uid,
        (Listening::Gateway | Listening::Unknown { .. }, None)
        | (Listening::Nobody | Listening::Stranger { .. }, _) => false,
    }
}

/// Whether we can look at all: a process without descriptors sees no lock and no listener, and must not conclude
/// from that.
fn own_side(deadline: Deadline) -> Option<String> {
    if deadline.passed() {
        return Some("no time was left to look".into());
    }
    std::fs::File::open("/proc/self/stat").err().map(|e| format!("/proc cannot be read: {e}"))
}

/// The rank of a listener that loopback does not lead to.
const FAR: u32 = 4;

fn rank(l: &Listener) -> u32 {
    match l.addr.ip() {
        IpAddr::V4(ip) if ip == Ipv4Addr::LOCALHOST => 0,
        IpAddr::V4(ip) if ip.is_unspecified() => 1,
        IpAddr::V6(ip) if ip.is_unspecified() => 2,
        IpAddr::V6(ip) if ip == Ipv6Addr::LOCALHOST => 3,
        IpAddr::V4(_) | IpAddr::V6(_) => FAR,
    }
}

/// The listener that a connection to this host's loopback would meet.
fn listener(port: u16) -> Option<Listener> {
    listeners(port).into_iter().min_by_key(rank)
}

fn address(port: u16, heard: Option<&Listener>) -> SocketAddr {
    let ip = match heard.map(|l| l.addr.ip()) {
        Some(IpAddr::V6(ip)) if ip == Ipv6Addr::LOCALHOST => IpAddr::V6(ip),
        Some(ip) if !ip.is_unspecified() => ip,
        Some(_) | None => IpAddr::V4(Ipv4Addr::LOCALHOST),
    };
    SocketAddr::new(ip, port)
}

/// The gateway: by its lock; before it has one, the process that the service manager or we started; at last the
/// listener's owner, if it runs the node's own runtime as the node's user.
fn process(node: &Node, want: &Want, heard: Option<&Listener>) -> Option<Process> {
    if let Some(lock) = lock::read(node).filter(|l| l.id.alive()) {
        let trusted = lock.trusted_by(node);
        if trusted {
            return of_id(lock.id, trusted, true, node);
        }
    }
    let main = want.service.as_ref().and_then(|s| s.main).or(want.main).filter(|id| id.alive());
    if let Some(id) = main {
        return of_id(id, true, false, node);
    }
    let owner = heard.and_then(|l| owner_of(l, &[]))?;
    let same_program = owner.exe().is_some_and(|exe| same_file(&exe, &node.node_bin));
    (owner.uid() == Some(node.ids.uid) && same_program && runs_entry(owner, node))
        .then(|| of_id(owner, true, false, node))
        .flatten()
}

/// Another program of the same user on the same Node binary is not the gateway: its own arguments must name ours,
/// or be wiped as the gateway's may be.
fn runs_entry(id: ProcessId, node: &Node) -> bool {
    let argv = id.cmdline();
    let package = node.package_dir.display().to_string();
    argv.iter().any(|a| a.contains(&package)) || argv.iter().all(|a| !a.contains('/'))
}

fn same_file(a: &std::path::Path, b: &std::path::Path) -> bool {
    let key = |p: &std::path::Path| std::fs::metadata(p).ok().map(|m| (m.dev(), m.ino()));
    a == b || key(a).is_some_and(|k| key(b) == Some(k))
}

fn of_id(id: ProcessId, trusted: bool, by_lock: bool, node: &Node) -> Option<Process> {
    let stat = id.stat()?;
    let uid = id.uid()?;
    /// Ticks of the kernel's user-visible clock: fixed at 100 per second on every supported architecture.
    const MS_PER_TICK: u64 = 10;
    Some(Process {
        id,
        uid,
        uid_right: trusted && uid == node.ids.uid,
        by_lock,
        state: stat.state,
        traced: matches!(stat.state, 'T' | 't') && id.traced(),
        cpu_ms: stat.cpu_ms,
        wait_ms: wait_ms(id),
        children_cpu_ms: 0,
        age_ms: host::clock::now().ms.saturating_sub(id.start_ticks.saturating_mul(MS_PER_TICK)),
        cgroup: id.cgroup(),
    })
}

/// The kernel's `schedstat`: nanoseconds run, nanoseconds waited, slices. 0 where the kernel does not keep it.
fn wait_ms(id: ProcessId) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/schedstat", id.pid)).unwrap_or_default();
    text.split_whitespace().nth(1).and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0) / 1_000_000
}

fn listening(process: Option<&Process>, heard: Option<&Listener>) -> Listening {
    let Some(heard) = heard else { return Listening::Nobody };
    let hint: Vec<u32> = process.iter().map(|p| p.id.pid).collect();
    match (owner_of(heard, &hint), process) {
        (Some(owner), Some(p)) if owner == p.id => Listening::Gateway,
        (Some(owner), Some(p)) if is_descendant(owner, p.id) => Listening::Gateway,
        (Some(owner), _) => Listening::Stranger { who: Some(owner), uid: heard.uid },
        (None, _) => Listening::Unknown { uid: heard.uid },
    }
}

fn is_descendant(of: ProcessId, ancestor: ProcessId) -> bool {
    /// A gateway behind a wrapper is a child or a grandchild.
    const GENERATIONS: usize = 8;
    let mut at = of.stat().map(|s| s.ppid);
    for _ in 0..GENERATIONS {
        match at {
            Some(pid) if pid == ancestor.pid => return true,
            Some(pid) if pid > 1 => at = ProcessId::of(pid).and_then(ProcessId::stat).map(|s| s.ppid),
            Some(_) | None => return false,
        }
    }
    false
}

fn children_cpu_ms(id: ProcessId) -> u64 {
    host::process::descendants(id.pid).into_iter().filter_map(ProcessId::stat).map(|s| s.cpu_ms).sum()
}

/// Whether this answer is that of koboshi's emergency responder.
fn is_responder(got: &Result<Response, HttpError>) -> bool {
    match got {
        Ok(r) => r.status == 503 && json(r).is_ok_and(|v| v.get("koboshi").is_some_and(|k| k == "emergency")),
        Err(_) => false,
    }
}

/// Whether this listener is koboshi's emergency responder. It runs as the node's user; whoever can pretend to be it
/// could do no more than that user.
#[must_use]
pub(crate) fn responder_listens(node: &Node, listener: &Listener) -> bool {
    listener.uid == node.ids.uid
        && is_responder(&http::get_at(
            address(node.port, Some(listener)),
            "/healthz",
            Deadline::after(OTHER_PROBE),
        ))
}

/// Asks the three questions; returns the tongue in which they were answered.
fn probe_http(
    look: &mut Look,
    node: &Node,
    want: &Want,
    heard: Option<&Listener>,
    addr: SocketAddr,
    deadline: Deadline,
) -> Tongue {
    let refuse = |look: &mut Look| {
        look.health = Health::Refused;
        look.startup = Startup::Refused;
        look.ready = Ready::Refused;
        Tongue::Plain
    };
    let Some(heard) = heard else {
        // The kernel's table has no listener: asking would tell the same, later.
        return refuse(look);
    };
    let gateway = proven(look);
    let known = look.heard.as_ref().and_then(|h| h.tongue);
    // The certificate is looked at together with the hello: nothing is remembered then, so that it is shown anew.
    let client = look.heard.as_ref().and_then(|h| h.client.clone()).filter(|_| !want.hello);
    // A stranger, and koboshi's own responder, are asked in plain HTTP.
    let expected = if gateway { known.unwrap_or_else(|| tls::configured(node)) } else { Tongue::Plain };
    let (mut line, first, tongue) = ask_first(addr, expected, client.as_ref(), gateway, deadline);
    let wait = if matches!(first, Err(HttpError::TimedOut { .. })) { OTHER_PROBE } else { FIRST_PROBE };
    let ours = |e: &Result<Response, HttpError>| match e {
        Err(HttpError::OurSide { why }) => Some(why.clone()),
        Ok(_) | Err(HttpError::Refused | HttpError::TimedOut { .. } | HttpError::Garbage { .. }) => None,
    };
    if heard.uid == node.ids.uid && is_responder(&first) {
        // koboshi's own voice in an emergency, ours or another's: no gateway, and nobody in a gateway's way.
        look.listening = Listening::Nobody;
        return refuse(look);
    }
    let mut ask = |path: &str| line.get(path, deadline.min(Deadline::after(wait)));
    let (second, third) = (ask("/startupz"), ask("/readyz"));
    if first.is_ok() {
        if let Some(known) = &mut look.heard {
            known.tongue = Some(tongue);
            known.client = line.client();
        }
        if want.hello {
            look.certificate = line.certificate().and_then(|shown| tls::notice(node, &shown));
        }
    }
    look.our_side = ours(&first).or_else(|| ours(&second)).or_else(|| ours(&third));
    look.health = read_health(first);
    look.startup = read_startup(second);
    look.ready = read_ready(third);
    tongue
}

/// The first question decides the tongue of the rest. A change of `gateway.tls` waits for a restart, and a config may be
/// gone: a gateway that does not understand the expected one is asked once in the other, and what it speaks is right.
fn ask_first(
    addr: SocketAddr,
    expected: Tongue,
    client: Option<&Client>,
    gateway: bool,
    deadline: Deadline,
) -> (Line, Result<Response, HttpError>, Tongue) {
    const BAD_REQUEST: u16 = 400;
    let ask = |tongue: Tongue| {
        let mut line = Line::new(addr, tongue, client.cloned());
        let got = line.get("/healthz", deadline.min(Deadline::after(FIRST_PROBE)));
        (line, got, tongue)
    };
    let first = ask(expected);
    let misunderstood = match &first.1 {
        Ok(response) => response.status == BAD_REQUEST,
        Err(HttpError::Garbage { .. }) => true,
        Err(HttpError::Refused | HttpError::TimedOut { .. } | HttpError::OurSide { .. }) => false,
    };
    if !gateway || !misunderstood {
        return first;
    }
    let second = ask(expected.other());
    if second.1.is_ok() { second } else { first }
}

fn json(response: &Response) -> Result<Value, String> {
    if response.content_type != "application/json" {
        let kind = if response.content_type.is_empty() { "no content type" } else { &response.content_type };
        return Err(format!("status {} with {kind}", response.status));
    }
    serde_json::from_slice(&response.body)
        .map_err(|_| format!("status {} with a body that is not JSON", response.status))
}

fn strange(response: &Response) -> String {
    let text = String::from_utf8_lossy(&response.body);
    let text: String = text.chars().filter(|c| !c.is_control()).take(WHY_LIMIT_CHARS).collect();
    format!("status {} {text}", response.status)
}

/// Reads an answer to `/healthz`.
#[must_use]
pub fn read_health(got: Result<Response, HttpError>) -> Health {
    match got {
        Ok(r) => match json(&r) {
            Ok(v)
                if r.status == 200
                    && v.get("ok") == Some(&Value::Bool(true))
                    && v.get("status").and_then(Value::as_str) == Some("live") =>
            {
                Health::Live
            }
            Ok(_) => Health::Wrong { why: strange(&r) },
            Err(why) => Health::Wrong { why },
        },
        Err(HttpError::Refused) => Health::Refused,
        Err(HttpError::TimedOut { .. } | HttpError::OurSide { .. }) => Health::Silent,
        Err(HttpError::Garbage { why }) => Health::Wrong { why },
    }
}

/// Reads an answer to `/startupz`.
#[must_use]
pub fn read_startup(got: Result<Response, HttpError>) -> Startup {
    match got {
        Ok(r) => match json(&r) {
            Ok(v) => match (r.status, v.get("status").and_then(Value::as_str)) {
                (200, Some("started")) => {
                    Startup::Started { version: v.get("version").and_then(Value::as_str).map(str::to_owned) }
                }
                (503, Some("starting")) => Startup::Starting,
                (503, Some("draining")) => Startup::Draining,
                _ => Startup::Wrong { why: strange(&r) },
            },
            Err(why) => Startup::Wrong { why },
        },
        Err(HttpError::Refused) => Startup::Refused,
        Err(HttpError::TimedOut { .. } | HttpError::OurSide { .. }) => Startup::Silent,
        Err(HttpError::Garbage { why }) => Startup::Wrong { why },
    }
}

/// Reads an answer to `/readyz`.
#[must_use]
pub fn read_ready(got: Result<Response, HttpError>) -> Ready {
    /// Names kept of one answer.
    const NAMES_LIMIT: usize = 128;
    let names = |v: Option<&Value>| -> Vec<String> {
        let text = |v: &Value| v.as_str().map(|s| s.chars().take(80).collect::<String>());
        v.and_then(Value::as_array).into_iter().flatten().take(NAMES_LIMIT).filter_map(text).collect()
    };
    match got {
        Ok(r) => match json(&r) {
            Ok(v) => match (r.status, v.get("ready").and_then(Value::as_bool)) {
                (200 | 503, Some(ready)) => {
                    let (failing, suppressed) = (names(v.get("failing")), names(v.get("suppressed")));
                    if !ready && failing.is_empty() {
                        return Ready::Wrong { why: strange(&r) };
                    }
                    Ready::Answer { ready, failing, suppressed }
                }
                _ => Ready::Wrong { why: strange(&r) },
            },
            Err(why) => Ready::Wrong { why },
        },
        Err(HttpError::Refused) => Ready::Refused,
        Err(HttpError::TimedOut { .. } | HttpError::OurSide { .. }) => Ready::Silent,
        Err(HttpError::Garbage { why }) => Ready::Wrong { why },
    }
}

/// A refused token is tried once more after config and secrets were read again: they may just have been changed.
fn say_hello(node: &Node, addr: SocketAddr, tongue: Tongue, deadline: Deadline) -> HelloResult {
    let until = deadline.min(Deadline::after(HELLO_PROBE));
    let (token, _) = config::token(node);
    let first = ws::hello_at(addr, tongue, &token, until);
    if first != HelloResult::TokenRefused {
        return first;
    }
    let (again, _) = config::token(node);
    match again {
        Token::Unknown(_) => HelloResult::NoToken,
        Token::Token(_) | Token::Password(_) | Token::Open if again == token => HelloResult::TokenRefused,
        Token::Token(_) | Token::Password(_) | Token::Open => ws::hello_at(addr, tongue, &again, until),
    }
}

fn read_identity(node: &Node, deadline: Deadline) -> IdentityLook {
    match identity::read_identity(node, deadline) {
        Ok(identity) => {
            let onboarded = config::load(node).ok().and_then(|l| identity::onboarded(&l.value));
            IdentityLook::Known { identity, onboarded }
        }
        Err(e) => IdentityLook::Unreadable { why: e.to_string() },
    }
}

/// Only what this very process moves by turning its event loop. Two things that look like work are none: the daily log
/// is shared by all gateways of a user, and the shared database is written every 30 s by a thread of a gateway whose
/// event loop spins.
fn activity(node: &Node, want: &Want, process: Option<ProcessId>) -> Activity {
    let size = |p: PathBuf| std::fs::metadata(p).ok().filter(std::fs::Metadata::is_file).map(|m| m.len());
    let output = want.log.clone().or_else(|| process.map(|p| PathBuf::from(format!("/proc/{}/fd/1", p.pid))));
    let log_bytes = output.and_then(size).unwrap_or(0);
    let dbs = node.agent_dbs();
    let database = dbs.iter().map(|(_, db)| identity::database_stamp(db)).fold(0, u64::wrapping_add);
    Activity { log_bytes, database }
}

/// The directories outside its state that the gateway keeps its logs in, those that are there and its user's: below `/tmp`
/// one of another user proves nothing about this node.
#[must_use]
pub fn log_dirs(node: &Node) -> Vec<PathBuf> {
    let uid = node.ids.uid;
    let tmp =
        node.env.iter().find(|(k, _)| k == "TMPDIR").map_or_else(|| PathBuf::from("/tmp"), |(_, v)| v.into());
    let mut dirs = vec![PathBuf::from("/tmp/openclaw"), tmp.join(format!("openclaw-{uid}"))];
    dirs.retain(|dir| std::fs::symlink_metadata(dir).is_ok_and(|m| m.is_dir() && m.uid() == uid));
    dirs
}

/// The newest of the logs that the gateway may be writing.
pub(crate) fn newest_log(node: &Node) -> Option<PathBuf> {
    /// A month of daily logs and their parts.
    const LOGS_LIMIT: usize = 512;
    let mut candidates: Vec<PathBuf> = Vec::new();
    if let Ok(loaded) = config::load(node)
        && let Some(file) = loaded.value.pointer("/logging/file").and_then(Value::as_str)
    {
        candidates.push(PathBuf::from(file));
    }
    for dir in log_dirs(node) {
        let logs = std::fs::read_dir(&dir).into_iter().flatten().flatten().take(LOGS_LIMIT).map(|e| e.path());
        candidates.extend(logs.filter(|p| {
            p.file_name().is_some_and(|n| {
                let n = n.to_string_lossy();
                n.starts_with("openclaw") && n.ends_with(".log")
            })
        }));
    }
    let stamp = |p: &PathBuf| {
        std::fs::symlink_metadata(p)
            .ok()
            .filter(std::fs::Metadata::is_file)
            .map(|m| (m.mtime(), m.mtime_nsec()))
    };
    candidates.into_iter().filter_map(|p| stamp(&p).map(|s| (s, p))).max().map(|(_, p)| p)
}

#[cfg(test)]
#[path = "probe_tests.rs"]
mod tests;
