//! Says whether a node serves: three-valued, from looks alone.
//!
//! A pure state machine. It has no clock and no I/O: a [`Look`] carries its moment, so every rule is a table test
//! and a drill may scale every limit. It never learns what a layer did or returned, so nothing can talk it into
//! believing a repair. What it cannot prove is [`Verdict::Inconclusive`] and asks for no repair until the limit of
//! its reason has run out.
//!
//! A process that does not answer is a hang only when nothing else explains it: not while it starts or drains or
//! works on a known turn, and not while its log, its databases or its children move.

use crate::identity::Baseline;
use crate::probe::{
    Health, IdentityLook, Listening, Look, Main, Process, Ready, ServiceLook, ServicePhase, Startup,
};
use crate::refusal::Checked;
use crate::ws::HelloResult;
use engine::{Class, FaultKind, Finding, Moment, Verdict};
use host::process::ProcessId;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Every limit of the judge, in milliseconds unless named otherwise. The defaults are the contract; they can be set
/// in koboshi's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// A start that progresses. People report 240 s and more with large databases.
    pub start_ms: u64,
    /// A start without any progress.
    pub start_stalled_ms: u64,
    /// CPU that a start must use per `start_cpu_window_ms` to count as progressing.
    pub start_cpu_ms: u64,
    /// See `start_cpu_ms`.
    pub start_cpu_window_ms: u64,
    /// A started process must have shown itself this long after its manager or starter named it; without either the
    /// patience is `start_stalled_ms`, because the lock comes late.
    pub appear_ms: u64,
    /// A clean stop: the service's own limit is 330 s.
    pub drain_ms: u64,
    /// Process state T without a debugger.
    pub stopped_ms: u64,
    /// No answer, a full core, no progress.
    pub spin_ms: u64,
    /// How much of one core counts as a full one, in percent.
    pub spin_core_percent: u64,
    /// No answer and no CPU.
    pub silent_ms: u64,
    /// How little of one core counts as none, in percent.
    pub idle_core_percent: u64,
    /// No answer, but it works: CPU below a full core, or its log, databases or children move.
    pub busy_ms: u64,
    /// No answer since a turn was seen under way.
    pub turn_ms: u64,
    /// Update at work, node down, files still moving.
    pub update_ms: u64,
    /// Update at work, node down, nothing moving.
    pub update_stalled_ms: u64,
    /// Update at work, node serving: only told.
    pub update_notice_ms: u64,
    /// Probes that fail on our own side: only told.
    pub own_side_ms: u64,
    /// A wrong answer by the right process must last this long.
    pub wrong_ms: u64,
    /// A refused or failed WebSocket while HTTP is right.
    pub hello_ms: u64,
    /// Readiness withheld for something that is no channel.
    pub unready_ms: u64,
    /// How long good probes must hold to be confirmed.
    pub confirm_ms: u64,
    /// And how many they must be.
    pub confirm_probes: u32,
    /// HTTP period while all is well.
    pub http_every_ms: u64,
    /// WebSocket period while all is well.
    pub hello_every_ms: u64,
    /// HTTP period while anything is not well.
    pub alert_every_ms: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            start_ms: 900_000,
            start_stalled_ms: 60_000,
            start_cpu_ms: 50,
            start_cpu_window_ms: 10_000,
            appear_ms: 10_000,
            drain_ms: 330_000,
            stopped_ms: 10_000,
            spin_ms: 120_000,
            spin_core_percent: 80,
            silent_ms: 60_000,
            idle_core_percent: 5,
            busy_ms: 900_000,
            turn_ms: 900_000,
            update_ms: 1_800_000,
            update_stalled_ms: 300_000,
            update_notice_ms: 2_700_000,
            own_side_ms: 120_000,
            wrong_ms: 10_000,
            hello_ms: 60_000,
            unready_ms: 120_000,
            confirm_ms: 5_000,
            confirm_probes: 3,
            http_every_ms: 2_000,
            hello_every_ms: 30_000,
            alert_every_ms: 500,
        }
    }
}

/// How much a `Serving` verdict rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Confidence {
    /// Ownership, HTTP and an authenticated WebSocket.
    Full,
    /// Ownership and HTTP only: there is no usable token.
    Http,
}

/// One judgement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    /// What is said of the node now.
    pub verdict: Verdict,
    /// Whether `Serving` has held for the confirmation.
    pub confirmed: bool,
    /// The first of the good looks that led here without a break.
    pub first_good: Option<Moment>,
    /// What the verdict rests on.
    pub confidence: Confidence,
    /// What was seen that somebody should know.
    pub findings: Vec<Finding>,
    /// The gateway process the judgement is about.
    pub process: Option<ProcessId>,
}

/// Why a look is not a good one, without its detail: the timer of a reason runs while the reason stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    OurSide,
    UpdateDown,
    Starting,
    Draining,
    Stopped,
    NoAnswer,
    Stranger,
    WrongAnswer,
    WrongProcess,
    WrongVersion,
    HelloFailed,
    TokenRefused,
    Unready,
    Amnesia,
    Gone,
}

/// One look, read.
enum Seen {
    Good { degraded: Vec<String> },
    Bad { reason: Reason, why: String, fault: Option<FaultKind> },
}

/// Counters whose movement is progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Marks {
    at: Moment,
    cpu_ms: u64,
    wait_ms: u64,
    children_cpu_ms: u64,
    log_bytes: u64,
    database: u64,
    update: u64,
}

impl Marks {
    fn of(look: &Look) -> Marks {
        let p = look.process.as_ref();
        Marks {
            at: look.at,
            cpu_ms: p.map_or(0, |p| p.cpu_ms),
            wait_ms: p.map_or(0, |p| p.wait_ms),
            children_cpu_ms: p.map_or(0, |p| p.children_cpu_ms),
            log_bytes: look.activity.log_bytes,
            database: look.activity.database,
            update: look.update.as_ref().map_or(0, |u| u.progress),
        }
    }

    /// Whether anything but the process's own CPU moved.
    fn works_since(self, earlier: Marks) -> bool {
        /// A child that only waits uses a few ms now and then; one that works, more than a percent of a core.
        const CHILD_WORK_MS: u64 = 20;
        let children = self.children_cpu_ms.saturating_sub(earlier.children_cpu_ms);
        let elapsed = self.at.since_ms(earlier.at).unwrap_or(0);
        self.log_bytes != earlier.log_bytes
            || self.database != earlier.database
            || (children >= CHILD_WORK_MS && children.saturating_mul(100) >= elapsed)
    }
}

#[derive(Debug, Clone, Copy)]
struct Timer {
    reason: Reason,
    since: Moment,
    /// The last marks at which the reason showed progress; the stalled limits count from here.
    moved: Marks,
    /// Where the running CPU window began.
    window: Marks,
}

#[derive(Debug, Clone)]
struct Good {
    first: Moment,
    count: u32,
    process: Option<ProcessId>,
    hello: Option<Confidence>,
}

/// The judge of one node.
#[derive(Debug, Clone)]
pub struct Judge {
    limits: Limits,
    baseline: Baseline,
    started: Option<Moment>,
    /// The process that has been seen up; until then it is starting.
    up: Option<ProcessId>,
    timer: Option<Timer>,
    /// Since when it has neither been confirmed nor been about anything that may take long. A node that fails in ever new
    /// ways begins every other timer anew; this one goes on.
    unsteady: Option<Moment>,
    good: Option<Good>,
    /// The last hello of this process, and when.
    hello: Option<(ProcessId, Moment, HelloResult)>,
    /// The last identity read while this process ran, and when.
    identity: Option<(ProcessId, Moment, IdentityLook)>,
    update_since: Option<Moment>,
    last: Option<Moment>,
    steady: bool,
}

impl Judge {
    /// A judge that has seen nothing yet.
    #[must_use]
    pub fn new(limits: Limits, baseline: Baseline) -> Judge {
        Judge {
            limits,
            baseline,
            started: None,
            up: None,
            timer: None,
            unsteady: None,
            good: None,
            hello: None,
            identity: None,
            update_since: None,
            last: None,
            steady: false,
        }
    }

    /// What is expected of the node from now on (a new version has settled, an onboarding was accepted).
    pub fn set_baseline(&mut self, baseline: Baseline) {
        self.baseline = baseline;
    }

    /// Remembers what the program said of a config, so that it is asked once.
    pub fn config_checked(&mut self, checked: Checked) {
        self.baseline.remember(checked);
    }

    /// The config that lies there has served for the settling time: it is what later ones are measured by.
    pub fn config_served(&mut self, config: String) {
        self.baseline.config = Some(config);
    }

    /// What is expected of the node.
    #[must_use]
    pub fn baseline(&self) -> &Baseline {
        &self.baseline
    }

    /// A start was asked for at this moment: what was known of the process before no longer counts.
    pub fn started(&mut self, at: Moment) {
        self.started = Some(at);
        self.up = None;
        self.timer = None;
        self.unsteady = None;
        self.good = None;
        self.hello = None;
        self.identity = None;
        self.steady = false;
    }

    /// When the next look is due.
    #[must_use]
    pub fn next_probe_in(&self) -> Duration {
        let well = self.steady && self.timer.is_none();
        Duration::from_millis(if well { self.limits.http_every_ms } else { self.limits.alert_every_ms })
    }

    /// Whether the next look should say hello over the WebSocket.
    #[must_use]
    pub fn wants_hello(&self, now: Moment) -> bool {
        let fresh = |at: Moment| now.since_ms(at).is_some_and(|ms| ms < self.limits.hello_every_ms);
        match (&self.hello, &self.good) {
            (None, _) => true,
            (Some((_, at, HelloResult::Ok(_) | HelloResult::NoToken)), _) => !fresh(*at),
            (Some(_), _) => true,
        }
    }

    /// Whether the next look should read the identity: with every hello, and at every look while it is wrong.
    #[must_use]
    pub fn wants_identity(&self, now: Moment) -> bool {
        let fresh = |at: Moment| now.since_ms(at).is_some_and(|ms| ms < self.limits.hello_every_ms);
        let amnesic = self.timer.is_some_and(|t| t.reason == Reason::Amnesia);
        amnesic || !self.identity.as_ref().is_some_and(|(_, at, _)| fresh(*at))
    }

    /// Judges one look. Looks must come in the order of their moments.
    pub fn observe(&mut self, look: &Look) -> Judgement {
        self.forget_other_boots(look.at);
        self.remember_hello(look);
        self.remember_identity(look);
        let mut findings = Vec::new();
        let seen = self.read(look, &mut findings);
        self.track_update(look, &mut findings);
        if let Some(what) = &look.certificate {
            findings.push(finding(FaultKind::Notice, Some(Class::Config), what.clone()));
        }
        let process = look.process.as_ref().map(|p| p.id);
        let judgement = match seen {
            Seen::Good { degraded } => self.good(look, process, degraded, findings),
            Seen::Bad { reason, why, fault } => self.bad(look, process, (reason, why, fault), findings),
        };
        self.last = Some(look.at);
        judgement
    }

    /// Moments of another boot cannot be compared: after a reboot everything is seen for the first time.
    fn forget_other_boots(&mut self, at: Moment) {
        if self.last.is_some_and(|l| l.boot != at.boot) {
            *self = Judge::new(self.limits.clone(), self.baseline.clone());
        }
    }

    fn remember_hello(&mut self, look: &Look) {
        let id = look.process.as_ref().map(|p| p.id);
        if self.hello.as_ref().is_some_and(|(known, _, _)| Some(*known) != id) {
            self.hello = None;
        }
        if let (Some(id), Some(result)) = (id, &look.hello) {
            // A probe that failed on our side says nothing; the older answer stands.
            if !matches!(result, HelloResult::OurSide { .. }) {
                self.hello = Some((id, look.at, result.clone()));
            }
        }
    }

    /// What was read once holds until it is read again: a look without it must not forget an amnesia.
    fn remember_identity(&mut self, look: &Look) {
        let id = look.process.as_ref().map(|p| p.id);
        if self.identity.as_ref().is_some_and(|(known, _, _)| Some(*known) != id) {
            self.identity = None;
        }
        if let (Some(id), Some(identity)) = (id, &look.identity) {
            let unreadable = matches!(identity, IdentityLook::Unreadable { .. });
            if !unreadable || self.identity.is_none() {
                self.identity = Some((id, look.at, identity.clone()));
            }
        }
    }

    fn read(&mut self, look: &Look, findings: &mut Vec<Finding>) -> Seen {
        if let Some(will) = look.service.as_ref().and_then(|s| s.will.clone()) {
            findings.push(finding(FaultKind::OwnersWill, None, will));
        }
        if let Some(latch) = look.service.as_ref().and_then(|s| s.latched.clone()) {
            findings.push(finding(FaultKind::ServiceLatched, Some(Class::Service), latch));
        }
        if let Some(why) = &look.our_side {
            return bad(Reason::OurSide, format!("our own probe failed: {why}"), None);
        }
        match &look.process {
            None => self.read_without_process(look, findings),
            Some(process) => self.read_process(look, process, findings),
        }
    }

    fn read_without_process(&self, look: &Look, findings: &mut Vec<Finding>) -> Seen {
        if let Some(update) = &look.update {
            return bad(Reason::UpdateDown, format!("{} while the node is down", update.what), None);
        }
        if let Listening::Stranger { who, uid } = &look.listening {
            let who = who.map_or_else(|| format!("a process of uid {uid}"), |p| format!("process {}", p.pid));
            let what = format!("{who} holds port {} and is not this node's gateway", look.port);
            findings.push(finding(FaultKind::PortTaken, None, what.clone()));
            return bad(Reason::Gone, format!("no gateway runs, and {what}"), None);
        }
        match look.service.as_ref().map(|s| s.phase) {
            Some(ServicePhase::Starting) => {
                return bad(Reason::Starting, "the service manager is starting it".into(), None);
            }
            Some(ServicePhase::Stopping) => {
                return bad(Reason::Draining, "the service manager is stopping it".into(), None);
            }
            Some(ServicePhase::Running | ServicePhase::Down | ServicePhase::Unknown) | None => {}
        }
        let patience = match look.main {
            Main::Ended => 0,
            Main::Told => self.limits.appear_ms,
            Main::Untold => self.limits.start_stalled_ms,
        };
        let appearing = self.started.and_then(|s| look.at.since_ms(s)).is_some_and(|ms| ms < patience);
        if appearing {
            return bad(Reason::Starting, "its process has not appeared yet".into(), None);
        }
        bad(Reason::Gone, "no gateway process runs".into(), Some(FaultKind::ProcessGone))
    }

    fn read_process(&mut self, look: &Look, process: &Process, findings: &mut Vec<Finding>) -> Seen {
        let stopping = look.service.as_ref().is_some_and(|s| s.phase == ServicePhase::Stopping);
        if stopping || look.startup == Startup::Draining {
            return bad(Reason::Draining, "it is draining".into(), None);
        }
        let answered = look.health == Health::Live || matches!(look.startup, Startup::Started { .. });
        if answered && matches!(look.startup, Startup::Started { .. }) {
            self.up = Some(process.id);
        }
        // A start that outlives its limit stays one: it ends by that limit, not as a hang that begins anew.
        let already = self.timer.is_some_and(|t| t.reason == Reason::Starting);
        let starting = self.up != Some(process.id) && (already || self.young(look, process));
        if matches!(process.state, 'T' | 't') {
            if process.traced {
                return bad(Reason::Starting, "a debugger holds it".into(), None);
            }
            // A stopped process works on no turn; only a start has its own, longer patience.
            let why = "the process is stopped (state T) and no debugger holds it".to_owned();
            return if starting {
                bad(Reason::Starting, why, Some(FaultKind::Hung))
            } else {
                bad(Reason::Stopped, why, Some(FaultKind::Hung))
            };
        }
        if let Listening::Stranger { who, uid } = &look.listening {
            let who = who.map_or_else(|| format!("a process of uid {uid}"), |p| format!("process {}", p.pid));
            let what = format!("{who} holds port {} and is not this node's gateway", look.port);
            findings.push(finding(FaultKind::PortTaken, None, what.clone()));
            let reason = if starting { Reason::Starting } else { Reason::Stranger };
            return bad(reason, what, None);
        }
        if look.startup == Startup::Starting {
            return bad(Reason::Starting, "it says that it is starting".into(), None);
        }
        let silent = look.health.silent() && look.startup.silent() && look.ready.silent();
        if silent {
            let said_hello = matches!(look.hello, Some(HelloResult::Ok(_)));
            if !said_hello {
                return if starting {
                    bad(Reason::Starting, "it is starting and does not answer yet".into(), None)
                } else {
                    bad(Reason::NoAnswer, "it answers no probe".into(), Some(FaultKind::Hung))
                };
            }
        }
        self.read_answers(look, process, starting, findings)
    }

    /// A gateway older than the longest start is not starting, also when we have never seen it up.
    fn young(&self, look: &Look, process: &Process) -> bool {
        let asked =
            self.started.and_then(|s| look.at.since_ms(s)).is_some_and(|ms| ms < self.limits.start_ms);
        asked || process.age_ms < self.limits.start_ms
    }

    fn read_answers(
        &self,
        look: &Look,
        process: &Process,
        starting: bool,
        findings: &mut Vec<Finding>,
    ) -> Seen {
        let soft = |reason: Reason| if starting { Reason::Starting } else { reason };
        match &look.health {
            Health::Live => {}
            Health::Wrong { why } => {
                return bad(soft(Reason::WrongAnswer), format!("/healthz answers wrongly: {why}"), None);
            }
            Health::Refused | Health::Silent => {
                return bad(soft(Reason::NoAnswer), "/healthz does not answer".into(), Some(FaultKind::Hung));
            }
        }
        match &look.startup {
            Startup::Started { .. } => {}
            Startup::Starting => return bad(Reason::Starting, "it says that it is starting".into(), None),
            Startup::Draining => return bad(Reason::Draining, "it is draining".into(), None),
            Startup::Wrong { why } => {
                return bad(soft(Reason::WrongAnswer), format!("/startupz answers wrongly: {why}"), None);
            }
            Startup::Refused | Startup::Silent => {
                return bad(
                    soft(Reason::NoAnswer),
                    "/startupz does not answer".into(),
                    Some(FaultKind::Hung),
                );
            }
        }
        let mut degraded = Vec::new();
        if let Some(problem) = wrong_process(look, process, &mut degraded) {
            return bad(Reason::WrongProcess, problem, None);
        }
        if let Some(seen) = self.read_readiness(&look.ready, starting, &mut degraded) {
            return seen;
        }
        if let Some(seen) = self.read_hello(look, findings) {
            return seen;
        }
        if let Some(seen) = self.read_identity(look, findings) {
            return seen;
        }
        Seen::Good { degraded }
    }

    fn read_readiness(&self, ready: &Ready, starting: bool, degraded: &mut Vec<String>) -> Option<Seen> {
        let soft = |reason: Reason| if starting { Reason::Starting } else { reason };
        match ready {
            Ready::Answer { failing, suppressed, .. } => {
                let known = |f: &String| self.baseline.failing.contains(f);
                let counts: Vec<&String> = failing.iter().filter(|f| !is_channel(f) && !known(f)).collect();
                if !counts.is_empty() {
                    let list = counts.iter().map(|s| s.as_str()).collect::<Vec<_>>().join(", ");
                    let startup = counts.iter().all(|f| f.starts_with("startup"));
                    let reason = if startup { Reason::Starting } else { Reason::Unready };
                    return Some(bad(reason, format!("/readyz withholds readiness: {list}"), None));
                }
                degraded.extend(failing.iter().map(|f| format!("{f} is failing")));
                degraded.extend(
                    suppressed
                        .iter()
                        .map(|s| format!("{s} is held back by the gateway's crash-loop breaker")),
                );
                None
            }
            Ready::Wrong { why } => {
                Some(bad(soft(Reason::WrongAnswer), format!("/readyz answers wrongly: {why}"), None))
            }
            Ready::Refused | Ready::Silent => {
                Some(bad(soft(Reason::NoAnswer), "/readyz does not answer".into(), Some(FaultKind::Hung)))
            }
        }
    }

    fn read_hello(&self, look: &Look, findings: &mut Vec<Finding>) -> Option<Seen> {
        let (_, _, result) = self.hello.as_ref()?;
        match result {
            HelloResult::Ok(hello) => {
                let expected = self.baseline.version.as_deref();
                let on_disk = look.disk_version.as_deref();
                let as_expected = expected == Some(hello.version.as_str());
                if expected.is_none() || as_expected {
                    return None;
                }
                if on_disk == Some(hello.version.as_str()) {
                    findings.push(finding(
                        FaultKind::Notice,
                        Some(Class::Program),
                        format!("version {} runs where {} was", hello.version, expected.unwrap_or("none")),
                    ));
                    return None;
                }
                Some(bad(
                    Reason::WrongVersion,
                    format!("version {} runs, {} is expected", hello.version, expected.unwrap_or("none")),
                    None,
                ))
            }
            // Said by the confidence. It is not less than whole: an incident must be able to close without a token.
            HelloResult::NoToken => None,
            HelloResult::NotYet { why } => {
                Some(bad(Reason::Starting, format!("the WebSocket says it is not ready: {why}"), None))
            }
            HelloResult::TokenRefused => {
                let what = "the gateway refuses the token that its own config holds".to_owned();
                findings.push(finding(FaultKind::ConfigBroken, Some(Class::Config), what.clone()));
                Some(bad(Reason::TokenRefused, what, None))
            }
            HelloResult::Refused { code, why } => {
                Some(bad(Reason::HelloFailed, format!("the WebSocket refuses us: {code} {why}"), None))
            }
            HelloResult::NoListener | HelloResult::TimedOut => {
                Some(bad(Reason::HelloFailed, "the WebSocket does not answer while HTTP does".into(), None))
            }
            HelloResult::Garbage { why } => {
                Some(bad(Reason::HelloFailed, format!("the WebSocket answers wrongly: {why}"), None))
            }
            HelloResult::OurSide { .. } => None,
        }
    }

    fn read_identity(&self, look: &Look, findings: &mut Vec<Finding>) -> Option<Seen> {
        let before = self.baseline.device_id.as_deref();
        let amnesia = |class: Class, what: String, findings: &mut Vec<Finding>| {
            findings.push(finding(FaultKind::Amnesia, Some(class), what.clone()));
            Some(bad(Reason::Amnesia, what, None))
        };
        match &self.identity.as_ref()?.2 {
            // A database that is gone or cannot be read is no proof of another identity; triage names it.
            IdentityLook::Unreadable { .. } => None,
            IdentityLook::Known { identity, onboarded } => {
                let fresh = onboarded.is_some() && *onboarded != self.baseline.onboarded;
                match (before, identity.device_id.as_deref()) {
                    (Some(old), Some(new)) if old != new && fresh => {
                        findings.push(finding(
                            FaultKind::Notice,
                            Some(Class::State),
                            "the node was onboarded afresh: it has a new identity and a new config".into(),
                        ));
                        return None;
                    }
                    (Some(old), Some(new)) if old != new => {
                        return amnesia(
                            Class::State,
                            "the node has another device identity than before".into(),
                            findings,
                        );
                    }
                    (Some(_), None) => {
                        return amnesia(Class::State, "the node's device identity is gone".into(), findings);
                    }
                    (Some(_), Some(_)) | (None, _) => {}
                }
                let lost = self.baseline.counts.fallen_to_zero(&identity.counts)?;
                if fresh || look.update.is_some() {
                    return None;
                }
                amnesia(lost.class, format!("all of the node's {} are gone", lost.what.join(", ")), findings)
            }
        }
    }

    fn track_update(&mut self, look: &Look, findings: &mut Vec<Finding>) {
        let Some(update) = &look.update else {
            self.update_since = None;
            return;
        };
        let since = *self.update_since.get_or_insert(look.at);
        findings.push(finding(FaultKind::UpdateAtWork, None, update.what.clone()));
        if look.at.since_ms(since).is_some_and(|ms| ms >= self.limits.update_notice_ms) {
            let minutes = self.limits.update_notice_ms / 60_000;
            findings.push(finding(
                FaultKind::Notice,
                Some(Class::Program),
                format!("an update has been at work for over {minutes} minutes: {}", update.what),
            ));
        }
    }

    fn good(
        &mut self,
        look: &Look,
        process: Option<ProcessId>,
        degraded: Vec<String>,
        findings: Vec<Finding>,
    ) -> Judgement {
        self.timer = None;
        let hello = self.hello.as_ref().and_then(|(_, _, r)| match r {
            HelloResult::Ok(_) => Some(Confidence::Full),
            HelloResult::NoToken => Some(Confidence::Http),
            HelloResult::TokenRefused
            | HelloResult::Refused { .. }
            | HelloResult::NotYet { .. }
            | HelloResult::NoListener
            | HelloResult::TimedOut
            | HelloResult::Garbage { .. }
            | HelloResult::OurSide { .. } => None,
        });
        if self.good.as_ref().is_some_and(|g| g.process != process) {
            self.good = None;
        }
        let good = self.good.get_or_insert(Good { first: look.at, count: 0, process, hello: None });
        good.count = good.count.saturating_add(1);
        good.hello = hello;
        let (first, count) = (good.first, good.count);
        let held = look.at.since_ms(first).unwrap_or(0) >= self.limits.confirm_ms;
        // Who it is must have been asked, where it is known who it was.
        let identified = self.baseline.device_id.is_none() || self.identity.is_some();
        let confirmed = held && count >= self.limits.confirm_probes && hello.is_some() && identified;
        self.steady = confirmed;
        if confirmed {
            self.unsteady = None;
            self.started = None;
            self.up = process;
        }
        Judgement {
            verdict: Verdict::Serving { degraded },
            confirmed,
            first_good: Some(first),
            confidence: hello.unwrap_or(Confidence::Http),
            findings,
            process,
        }
    }

    fn bad(
        &mut self,
        look: &Look,
        process: Option<ProcessId>,
        (reason, why, fault): (Reason, String, Option<FaultKind>),
        mut findings: Vec<Finding>,
    ) -> Judgement {
        // A short failure of our own says nothing about the node: a confirmation goes on where it stood.
        if reason != Reason::OurSide {
            self.good = None;
            self.steady = false;
        }
        let marks = Marks::of(look);
        let mut timer = match self.timer {
            Some(t) if t.reason == reason => t,
            Some(_) | None => Timer { reason, since: look.at, moved: marks, window: marks },
        };
        self.note_progress(&mut timer, marks);
        self.timer = Some(timer);
        let late = self.expired(&timer, look).or_else(|| self.never_steady(reason, look));
        let verdict = match late {
            None => Verdict::Inconclusive { why: why.clone() },
            Some(late) => Verdict::NotServing {
                why: if late.is_empty() { why.clone() } else { format!("{why} {late}") },
            },
        };
        if reason == Reason::OurSide && elapsed(look, timer.since) >= self.limits.own_side_ms {
            findings.push(finding(FaultKind::Notice, None, why.clone()));
        }
        if let (Verdict::NotServing { why }, Some(kind)) = (&verdict, fault) {
            findings.push(finding(kind, None, why.clone()));
        }
        Judgement {
            verdict,
            confirmed: false,
            first_good: self.good.as_ref().map(|g| g.first),
            confidence: Confidence::Http,
            findings,
            process,
        }
    }

    /// Moves the timer's marks: what counts as progress depends on what is being waited for.
    fn note_progress(&self, timer: &mut Timer, now: Marks) {
        let window_ms = now.at.since_ms(timer.window.at).unwrap_or(0);
        let cpu = now.cpu_ms.saturating_sub(timer.window.cpu_ms);
        match timer.reason {
            Reason::Starting => {
                let computed = cpu >= self.limits.start_cpu_ms;
                if now.works_since(timer.moved) || computed {
                    timer.moved = now;
                }
                if computed || window_ms >= self.limits.start_cpu_window_ms {
                    timer.window = now;
                }
            }
            Reason::UpdateDown => {
                if now.update != timer.moved.update {
                    timer.moved = now;
                }
            }
            // For a hang the CPU is the symptom, not progress: only work that leaves a trace counts. The CPU is
            // then measured anew from there.
            Reason::NoAnswer => {
                if now.works_since(timer.moved) {
                    timer.moved = now;
                }
            }
            Reason::OurSide
            | Reason::Draining
            | Reason::Stopped
            | Reason::Stranger
            | Reason::WrongAnswer
            | Reason::WrongProcess
            | Reason::WrongVersion
            | Reason::HelloFailed
            | Reason::TokenRefused
            | Reason::Unready
            | Reason::Amnesia
            | Reason::Gone => {}
        }
    }

    /// `Some` when the reason's limit has run out, with what to add to the sentence.
    /// Whether it has been neither well nor excused for as long as anything is ever waited for.
    fn never_steady(&mut self, reason: Reason, look: &Look) -> Option<String> {
        match reason {
            Reason::Starting | Reason::Draining | Reason::UpdateDown => {
                self.unsteady = None;
                None
            }
            // Nothing was learnt about the node.
            Reason::OurSide => None,
            Reason::Stopped
            | Reason::NoAnswer
            | Reason::Stranger
            | Reason::WrongAnswer
            | Reason::WrongProcess
            | Reason::WrongVersion
            | Reason::HelloFailed
            | Reason::TokenRefused
            | Reason::Unready
            | Reason::Amnesia
            | Reason::Gone => {
                let lasted = elapsed(look, *self.unsteady.get_or_insert(look.at));
                (lasted >= self.limits.busy_ms.max(self.limits.turn_ms))
                    .then(|| format!("and it has not served steadily for {} s", lasted / 1000))
            }
        }
    }

    fn expired(&self, timer: &Timer, look: &Look) -> Option<String> {
        let limits = &self.limits;
        let lasted = elapsed(look, timer.since);
        let still = elapsed(look, timer.moved.at);
        let after = |limit: u64| (lasted >= limit).then(|| format!("for {} s", lasted / 1000));
        match timer.reason {
            Reason::Gone | Reason::Amnesia => Some(String::new()),
            // Only told, never repaired: nothing was learnt about the node.
            Reason::OurSide => None,
            Reason::Starting => {
                // A restart inside an old process begins with the first look that shows it.
                let age = look.process.as_ref().map_or(lasted, |p| p.age_ms);
                let fresh = age.saturating_sub(lasted) < limits.start_ms;
                let age = if fresh { age.max(lasted) } else { lasted };
                if still >= limits.start_stalled_ms {
                    Some(format!("and has not progressed for {} s", still / 1000))
                } else if age >= limits.start_ms && lasted >= limits.start_stalled_ms {
                    Some(format!("after {} s", age / 1000))
                } else {
                    None
                }
            }
            Reason::Draining => after(limits.drain_ms),
            Reason::Stopped => after(limits.stopped_ms),
            Reason::NoAnswer => self.hung(timer, look),
            Reason::UpdateDown => {
                if still >= limits.update_stalled_ms {
                    Some(format!("and nothing has moved for {} s", still / 1000))
                } else {
                    after(limits.update_ms)
                }
            }
            Reason::Stranger | Reason::WrongAnswer | Reason::WrongProcess | Reason::WrongVersion => {
                after(limits.wrong_ms)
            }
            Reason::HelloFailed | Reason::TokenRefused => after(limits.hello_ms),
            Reason::Unready => after(limits.unready_ms),
        }
    }

    /// Turns, cron runs and writes that a stop would wait for, as the gateway said at its last hello. `None` where it says
    /// nothing of it.
    #[must_use]
    pub fn active_work(&self) -> Option<u64> {
        self.hello.as_ref().and_then(|(_, _, r)| match r {
            HelloResult::Ok(hello) => hello.active_work,
            HelloResult::TokenRefused
            | HelloResult::Refused { .. }
            | HelloResult::NotYet { .. }
            | HelloResult::NoListener
            | HelloResult::TimedOut
            | HelloResult::Garbage { .. }
            | HelloResult::NoToken
            | HelloResult::OurSide { .. } => None,
        })
    }

    fn hung(&self, timer: &Timer, look: &Look) -> Option<String> {
        let limits = &self.limits;
        let lasted = elapsed(look, timer.since);
        let in_turn = self.active_work().is_some_and(|n| n > 0) || look.known_turn;
        if in_turn {
            return (lasted >= limits.turn_ms)
                .then(|| format!("for {} s, a turn being under way", lasted / 1000));
        }
        let now = Marks::of(look);
        let still = elapsed(look, timer.moved.at);
        let used = now.cpu_ms.saturating_sub(timer.moved.cpu_ms);
        // What it wanted of a core: run, or waited to run.
        let used = used.saturating_add(now.wait_ms.saturating_sub(timer.moved.wait_ms));
        let percent = used.saturating_mul(100).checked_div(still).unwrap_or(0);
        if percent < limits.idle_core_percent && still >= limits.silent_ms {
            return Some(format!("for {} s and uses no CPU", still / 1000));
        }
        if percent >= limits.spin_core_percent && still >= limits.spin_ms {
            return Some(format!("for {} s at a full core ({percent} %) without progress", still / 1000));
        }
        (lasted >= limits.busy_ms).then(|| format!("for {} s", lasted / 1000))
    }
}

fn elapsed(look: &Look, since: Moment) -> u64 {
    look.at.since_ms(since).unwrap_or(0)
}

fn bad(reason: Reason, why: String, fault: Option<FaultKind>) -> Seen {
    Seen::Bad { reason, why, fault }
}

fn finding(kind: FaultKind, class: Option<Class>, what: String) -> Finding {
    Finding { kind, class, what, evidence: Vec::new() }
}

/// `readyz` names channels and, among them, a few parts of the gateway itself: only those count against it.
fn is_channel(failing: &str) -> bool {
    const OWN: [&str; 5] =
        ["state-database", "plugin-reload", "gateway-draining", "startup-sidecars", "agent-database"];
    !OWN.iter().any(|own| failing == *own || failing.strip_prefix(own).is_some_and(|r| r.starts_with(':')))
        && !failing.starts_with("startup")
        && !failing.is_empty()
}

/// The right process: the lock's, of the node's user, owning the listener. `Some` = what is wrong.
fn wrong_process(look: &Look, process: &Process, degraded: &mut Vec<String>) -> Option<String> {
    if !process.uid_right {
        return Some(format!("process {} does not belong to the node's user", process.id.pid));
    }
    match &look.listening {
        Listening::Gateway => {}
        Listening::Nobody => return Some(format!("nobody listens on port {}", look.port)),
        Listening::Unknown { uid } if *uid == process.uid => {}
        Listening::Unknown { uid } => {
            return Some(format!("port {} is held by uid {uid}, not by the gateway", look.port));
        }
        Listening::Stranger { .. } => return Some(format!("port {} is held by another process", look.port)),
    }
    if !process.by_lock {
        degraded.push("its lock file is missing or names no living process".into());
    }
    if let Some(ServiceLook { cgroup: Some(unit), .. }) = &look.service
        && process.cgroup.as_deref().is_some_and(|own| !within(own, unit))
    {
        degraded.push("it runs outside of its unit".into());
    }
    None
}

fn within(own: &str, unit: &str) -> bool {
    own.strip_prefix(unit).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
