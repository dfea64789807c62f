//! The agent: one loop that watches, folds, asks the engine and does what it says.
//!
//! Everything that could hang runs elsewhere: probes on a thread, work in contained steps with deadlines. The loop
//! itself only waits for descriptors. What it knows about incidents is in the journal; when it dies, the next one
//! folds and goes on, and the gateway never notices.

pub mod book;
mod copies;
mod daily;
mod files;
mod gateway;
mod home;
pub(crate) mod incident;
mod notices;
mod orders;
mod prober;
mod responder;
mod rest;
pub mod runner;
mod settling;
mod sources;
mod standing;
pub mod status;
pub mod will;

use crate::agent::book::Book;
use crate::agent::copies::Known;
use crate::agent::daily::Daily;
use crate::agent::files::UsersTrees;
use crate::agent::gateway::down_by_will;
use crate::agent::incident::Doing;
use crate::agent::notices::Notices;
use crate::agent::prober::Prober;
use crate::agent::responder::Responder;
use crate::agent::runner::{Runner, Running};
use crate::agent::settling::Settling;
use crate::agent::status::Status;
use crate::agent::will::Will;
use crate::cli::Guard;
use crate::config::{Config, Mode};
use crate::patient::{self, Service};
use crate::places::Places;
use crate::print::{Exit, Printer};
use crate::voice;
use engine::{Event, FaultKind, Finding, IncidentKind, Moment, Record, Verdict};
use host::clock::{self, Deadline};
use host::container::Strength;
use host::dying::DeathWatch;
use host::files::LockFile;
use host::notify::Notifier;
use host::process::{PidFd, ProcessId};
use host::service::Active;
use host::signals::{Got, Signals};
use host::watch::{Change, Watch};
use host::{Error, Kind, Result};
use layers::{Care, Examination};
use node::probe::ServiceLook;
use node::{Judge, Judgement, Node, Want};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::Duration;

/// How long an agent that was killed may take to be gone.
const DYING: Duration = Duration::from_secs(2);
const DYING_LOOK: Duration = Duration::from_millis(20);

/// Asking the service manager takes 10 to 30 ms; more is a manager in trouble.
const MANAGER_LIMIT: Duration = Duration::from_secs(5);
/// While all is well systemd is asked this rarely: the process itself is watched anyway.
const MANAGER_EVERY_MS: u64 = 60_000;
/// The gateway may drain this long when the container that koboshi is PID 1 of is stopped.
const DRAIN_LIMIT: Duration = Duration::from_secs(330);
/// Files change in bursts; one look after this long sees them all.
const SETTLE_FILES_MS: u64 = 300;
/// A user's tree that is emptied again and again is a reason to look no more often than this.
const USERS_AGAIN_MS: u64 = 15_000;
/// Trees of the user's that are watched: one workspace per agent, and a few more.
const MOST_USERS_ROOTS: usize = 32;
/// An unchanged status is published again after this long, so that its age says whether the agent lives.
const PUBLISH_EVERY_MS: u64 = 30_000;
/// A bare stop of an enabled unit is undone once after this long: systemd records no caller.
const BARE_STOP_MS: u64 = 90_000;
/// A unit that has been inactive this long was stopped, not restarted.
const STOPPED_FOR_GOOD_MS: u64 = 2_000;
/// Channels reconnect by themselves; a node that serves less than whole for this long is told of.
const DEGRADED_MS: u64 = 600_000;
/// How long hands stay off when the owner's will cannot be read.
const UNREADABLE_WILL_S: i64 = 3_600;
/// A second bare stop within this is obeyed.
const BARE_STOP_AGAIN_MS: u64 = 3_600_000;

/// The agent of one node.
pub struct Agent {
    config: Config,
    places: Places,
    printer: Printer,
    node: Node,
    service: Service,
    runner: Runner,
    book: Book,
    judge: Judge,
    prober: Prober,
    watch: Watch,
    users: UsersTrees,
    signals: Signals,
    will: Will,
    doing: Doing,
    step: Option<Running>,
    daily: Daily,
    home: home::Homecoming,
    judgement: Option<Judgement>,
    /// Looks begun before this moment saw a node that no longer is.
    looks_from: Moment,
    next_look: Moment,
    gateway: Option<PidFd>,
    /// Tells of the gateway's end earlier than its descriptor can.
    death_watch: Option<DeathWatch>,
    /// An incident was opened before it could be known how the gateway ended.
    ending_unexplained: bool,
    serving_since: Option<Moment>,
    exam: Option<Examination>,
    /// When it was taken, and how closely.
    exam_taken: Option<(Moment, Care)>,
    /// A look at the disk is due at this moment: a watched file changed.
    exam_due: Option<Moment>,
    service_look: Option<(Moment, ServiceLook)>,
    /// An update that had the node down when it was last looked at. The judge's own limits end this patience.
    updating: Option<String>,
    /// When it was first believed in since the node last served.
    update_waited: Option<Moment>,
    /// The gateway process that a start of ours or a look has accounted for in the ration.
    counted: Option<ProcessId>,
    /// We asked for a start whose process has not been seen yet.
    asked_start: Option<Moment>,
    notifier: Option<Notifier>,
    /// The unit was seen on its way down, or down, at this moment.
    unit_stopped: Option<Moment>,
    bare_stop: Option<Moment>,
    bare_stops: Vec<Moment>,
    told_left_alone: bool,
    notices: Notices,
    settling: Settling,
    first_good: Option<Moment>,
    published: Option<(Moment, Status)>,
    /// Orders may be waiting: some lay there before this agent began, and a watched directory says when more come.
    ordered: bool,
    me: ProcessId,
    /// Times a person asked for a recovery: that is new evidence too.
    nudges: u32,
    /// A person asked for a climb of this layer alone, and it has not begun.
    only: Option<engine::Layer>,
    /// What this agent was begun for, where it is one `koboshi recover` only.
    errand: Option<orders::Errand>,
    /// The climb at whose end a config's trial was ended.
    trial_ended: Option<(u64, u32)>,
    /// What sudo said at the last climb, where it is needed.
    sudo: Option<std::result::Result<(), String>>,
    /// The climb in which the store hung.
    store_hangs: Option<(u64, u32)>,
    /// Looks at the disk whose containers would not die.
    stuck_looks: u32,
    /// Looks in a row that never came back.
    blind: u32,
    ending: bool,
    responder: Responder,
    sources: sources::Sources,
    language: alert::Language,
}

/// The lock that makes this the node's only agent. One that was just killed holds it until the kernel has closed its files,
/// a moment after it is seen to be dead: whoever is started in its place must not give up over that.
fn sole(places: &Places) -> Result<LockFile> {
    let wait = Deadline::after(DYING);
    loop {
        if let Some(lock) = LockFile::try_take(&places.lock())? {
            return Ok(lock);
        }
        if wait.passed() {
            let holder = LockFile::holder(&places.lock());
            let holder = holder.map_or_else(String::new, |pid| format!(" (process {pid})"));
            let why = format!("another koboshi agent guards it{holder}");
            return Err(
                Error::new(Kind::Usage, "guard the node", why).hint("koboshi status shows what it does")
            );
        }
        std::thread::sleep(DYING_LOOK);
    }
}

/// Runs the agent until it is told to end.
pub fn run(config: Config, places: Places, options: &Guard, printer: Printer) -> Result<Exit> {
    if let Some(parent) = options.errand {
        orders::end_with(parent)?;
    }
    places.make()?;
    let _lock = sole(&places)?;
    let mut config = config;
    if options.watch {
        config.mode = Mode::Watch;
    }
    let mut agent = Agent::new(config, places, printer)?;
    agent.errand = options.one_layer.then(orders::Errand::default);
    agent.begin();
    if let Some(notifier) = &agent.notifier {
        let _ = notifier.ready();
    }
    let exit = agent.live()?;
    Ok(exit)
}

impl Agent {
    fn new(config: Config, places: Places, printer: Printer) -> Result<Agent> {
        let signals = Signals::new()?;
        if let Err(e) = patient::remembered(&places) {
            printer.error(&e);
        }
        let node = patient::find(&places, &config)?;
        // A full disk keeps nobody from guarding: what could not be written is found again the same way.
        if let Err(e) = patient::remember(&places, &node) {
            printer.error(&e);
        }
        let containers = places.containers(&node)?;
        let service = Service::of(&node, &config, &containers, &places)?;
        let (book, words) = Book::open(&places)?;
        let will = Will::load(&places).unwrap_or_else(|e| {
            printer.error(&e);
            // Somebody wrote a will that cannot be read: hands stay off for a while rather than against it.
            Will { paused_until_s: Some(clock::wall().as_second() + UNREADABLE_WILL_S), ..Will::default() }
        });
        let baseline = patient::baseline(&places).unwrap_or_else(|e| {
            printer.error(&e);
            None
        });
        let now = clock::now();
        let agent = Agent {
            judge: Judge::new(config.judge.clone(), baseline.unwrap_or_default()),
            runner: Runner::new(containers, places.clone(), config.ladder.limits()),
            prober: Prober::start()?,
            watch: Watch::new()?,
            users: UsersTrees::default(),
            daily: Daily::new(now, &config.backup, Known::load(&places, clock::wall().as_second())),
            home: home::Homecoming::default(),
            doing: Doing::Nothing,
            step: None,
            judgement: None,
            looks_from: now,
            next_look: now,
            gateway: None,
            death_watch: None,
            ending_unexplained: false,
            serving_since: None,
            exam: None,
            exam_taken: None,
            exam_due: Some(now),
            service_look: None,
            updating: None,
            update_waited: None,
            counted: None,
            asked_start: None,
            notifier: Notifier::from_env().ok(),
            unit_stopped: None,
            bare_stop: None,
            bare_stops: Vec::new(),
            told_left_alone: false,
            notices: Notices::default(),
            settling: Settling::default(),
            first_good: None,
            published: None,
            ordered: true,
            me: ProcessId::current()?,
            nudges: 0,
            only: None,
            errand: None,
            trial_ended: None,
            sudo: None,
            store_hangs: None,
            stuck_looks: 0,
            blind: 0,
            ending: false,
            responder: Responder::default(),
            sources: sources::Sources::default(),
            language: voice::language(&config),
            config,
            places,
            printer,
            node,
            service,
            book,
            signals,
            will,
        };
        for line in words {
            agent.say(&line);
        }
        Ok(agent)
    }

    /// What an agent does first, whether it is the first one ever or follows one that died.
    fn begin(&mut self) {
        let manager = self.service.manager().kind();
        self.say(&format!(
            "guarding {} {} on port {} ({}; {})",
            self.node.name,
            self.node.version.as_deref().unwrap_or("of unknown version"),
            self.node.port,
            manager,
            strength(&self.runner.containers.strength()),
        ));
        if let Some(words) = self.config.ladder.shortened() {
            self.say(&words);
        }
        if let Some(record) = self.book.state().wake(clock::now()) {
            self.write(record);
        }
        // A dead agent may have held the unit down for a repair; its undo is ours. An owner's stop outlives reboots.
        self.release();
        self.keep_stopped();
        node::copies::keep_in(self.places.reading());
        // Jobs of daily operation that a dead agent left behind. Steps of the ladder are the engine's to end.
        for name in self.runner.containers.leftovers() {
            if name.starts_with("job-") || name == responder::CONTAINER || name == incident::ASK_SUDO {
                let _ = self.runner.containers.kill(&name, Deadline::after(runner::KILL_LIMIT));
            }
        }
        self.home_begins();
        node::copies::sweep();
        self.watch_files();
        self.keep_known();
        self.follow_gateway();
        self.recall_sources();
        let open = self.book.state().incident.is_some();
        let idle = self.gateway.is_none() && self.node.gateway().is_none();
        let own = self.service.embedded() && self.errand.is_none();
        if self.book.state().climb().is_some_and(|climb| !climb.in_place) {
            self.inherit_a_hanging_store();
            // What the agent before this one was told died with it.
            self.ask_sudo();
        }
        if own && idle && !open && !self.home.busy() && self.hands_off().is_none() {
            self.start_embedded("koboshi guard began");
        } else if self.gateway.is_some() {
            self.say("the gateway runs already and is taken into care as it is");
        }
    }

    /// The embedded gateway is started because the agent starts, not because it fell.
    fn start_embedded(&mut self, why: &str) {
        if self.places.store().is_dir()
            && let Some(exam) = self.examine_now(Care::Down)
            && let Some(finding) = exam.findings.iter().find(|f| incident::keeps_from_starting(f))
        {
            // A start with this on the disk would be wasted, and starts are scarce: the ladder goes first.
            let cause = format!("the gateway does not run, and {}", finding.what);
            self.open(IncidentKind::Outage, cause, exam.findings.clone());
            return;
        }
        let now = clock::now();
        let t = self.book.state().time_ms(now);
        if self.book.state().start_free_ms(t) > t {
            // An agent that is itself restarted in a loop must not make the fourth unclean boot.
            self.open(
                IncidentKind::Outage,
                "the gateway does not run, and its starts are used up".to_owned(),
                Vec::new(),
            );
            return;
        }
        self.write(Record::new(now, Event::StartSeen { by: why.to_owned() }));
        match self.service.manager().start(Deadline::after(MANAGER_LIMIT)) {
            Ok(()) => {
                self.started(now);
                self.say("the gateway is being started");
            }
            Err(e) => {
                self.say(&e.to_string());
                self.open(
                    IncidentKind::Outage,
                    format!("the gateway cannot be started: {}", e.why),
                    Vec::new(),
                );
            }
        }
    }

    /// A start was asked for: what was seen before is about another process.
    fn started(&mut self, at: Moment) {
        self.asked_start = Some(at);
        self.judge.started(at);
        self.looks_from = at;
        self.next_look = at;
        self.serving_since = None;
        self.judgement = None;
        self.follow_gateway();
    }

    fn live(&mut self) -> Result<Exit> {
        while !self.ending {
            self.take_probe();
            self.take_files();
            if std::mem::take(&mut self.ordered) {
                self.take_orders();
            }
            self.take_jobs();
            self.follow_stopping_unit();
            self.follow_pause();
            self.drive();
            self.due_looks();
            self.due_jobs();
            self.tend_home();
            self.tend_responder();
            self.tend_sources();
            self.publish();
            self.tell_manager();
            if self.ending {
                break;
            }
            self.sleep()?;
        }
        self.end();
        Ok(Exit::Done)
    }

    /// A sign of life for the manager that runs this agent: one that hangs is started anew by it.
    fn tell_manager(&self) {
        if let Some(notifier) = &self.notifier {
            let _ = notifier.alive();
        }
    }

    /// Waits until something happens or is due.
    fn sleep(&mut self) -> Result<()> {
        let now = clock::now();
        let watchdog = self.notifier.as_ref().and_then(Notifier::watchdog_period).map(|period| period / 2);
        let due = rest::Due {
            look: (!self.prober.busy()).then_some(self.next_look),
            engine: self.doing.until(now),
            undecided: self.doing == Doing::Nothing && self.book.state().incident.is_some(),
            exam: self.exam_due,
            daily: [self.daily.due(), self.home.due(), self.sources.due()]
                .into_iter()
                .flatten()
                .min_by_key(|at| at.ms),
            responder: self.responder.again(now),
            unit: self.unit_stopped.is_some(),
            watchdog_ms: watchdog.map(|w| u64::try_from(w.as_millis()).unwrap_or(u64::MAX)),
        };
        let until = Deadline::at(due.wake(now));
        let gateway = self.gateway.as_ref().map(AsFd::as_fd);
        let step = self.step.as_ref().map(|s| s.step.pidfd());
        let mut job = self.daily.fds();
        job.extend(self.responder.fd());
        job.extend(self.home.fd());
        let mut fds: Vec<BorrowedFd<'_>> =
            vec![self.signals.as_fd(), self.prober.as_fd(), self.watch.as_fd()];
        let first = fds.len();
        fds.extend(gateway);
        let omens = fds.len();
        fds.extend(self.death_watch.iter().flat_map(DeathWatch::fds));
        let others = fds.len();
        fds.extend(step);
        fds.extend(job);
        let ready = host::poll::readable(&fds, until)?;
        let any = |range: std::ops::Range<usize>| ready.get(range).is_some_and(|ready| ready.contains(&true));
        let (exited, omen) = (any(first..omens), any(omens..others));
        drop(fds);
        self.take_signals();
        if exited {
            self.gateway_exited();
        } else if omen {
            self.gateway_dying();
        }
        Ok(())
    }

    fn take_signals(&mut self) {
        for got in self.signals.take().unwrap_or_default() {
            match got {
                Got::Terminate | Got::Interrupt => self.ending = true,
                Got::Hangup => self.say("SIGHUP: the configuration is read at the next start only"),
                Got::Child => {
                    if std::process::id() == 1 {
                        host::reap::orphans();
                    }
                }
            }
        }
    }

    /// The end of the agent is not the end of the gateway, except where the agent is the container's first process.
    fn end(&mut self) {
        if let Some(mut step) = self.step.take()
            && step.kill().is_ok()
        {
            // The step may have held the unit down: nobody is left who would take that back.
            self.release_now();
        }
        let down = self.home_stands_still();
        self.daily.end();
        self.end_responder();
        if down && std::process::id() != 1 && !self.will.stopped {
            // It was stopped for a move, and nobody is left who would start it.
            self.release_now();
            if let Err(e) = self.service.manager().start(Deadline::after(MANAGER_LIMIT)) {
                self.say(&e.to_string());
            }
        }
        if std::process::id() == 1 {
            self.say("the container is being stopped: the gateway may drain");
            match self.service.manager().stop(DRAIN_LIMIT, Deadline::after(DRAIN_LIMIT + runner::KILL_LIMIT))
            {
                Ok(stopped) => self.say(&format!("the gateway has ended: {stopped:?}")),
                Err(e) => self.say(&e.to_string()),
            }
        } else if self.gateway.is_some() {
            self.say("the agent ends; the gateway runs on");
        }
        let _ = std::fs::remove_file(self.places.status());
    }

    // ---- what happens ----

    fn take_probe(&mut self) {
        let Some(look) = self.prober.take() else {
            return;
        };
        self.blind = 0;
        let stale = look.at.since_ms(self.looks_from).is_none() || look.at.ms < self.looks_from.ms;
        if stale {
            self.next_look = clock::now();
            return;
        }
        let judgement = self.judge.observe(&look);
        self.next_look = clock::now().plus_ms(self.look_every_ms());
        self.follow_gateway();
        // Known before it is heeded: what is opened now is opened in the light of it.
        self.judgement = Some(judgement.clone());
        self.heed(&judgement);
    }

    fn look_every_ms(&self) -> u64 {
        /// A node in emergency may lie for days, and a look at one that is down goes through every process.
        const IN_EMERGENCY_MS: u64 = 5_000;
        let by_judge = u64::try_from(self.judge.next_probe_in().as_millis()).unwrap_or(u64::MAX);
        let down = self.judgement.as_ref().is_none_or(|j| matches!(j.verdict, Verdict::NotServing { .. }));
        if down && self.book.state().in_emergency() {
            return by_judge.max(IN_EMERGENCY_MS);
        }
        if self.doing.judging() { by_judge.min(self.config.judge.alert_every_ms) } else { by_judge }
    }

    /// What a judgement means for daily life and for an open incident.
    fn heed(&mut self, judgement: &Judgement) {
        let now = clock::now();
        self.pass_on_notices(judgement, now);
        self.settling.heed(judgement, now);
        match &judgement.verdict {
            Verdict::Serving { .. } => {
                self.told_left_alone = false;
                self.updating = None;
                self.update_waited = None;
                self.bare_stop = None;
                if self.will.by_stops {
                    // It serves again by its owner's hand: the stop that was obeyed is over.
                    self.will = Will { stopped: false, by_stops: false, ..self.will.clone() };
                    if let Err(e) = self.will.save(&self.places) {
                        self.say(&e.to_string());
                    }
                }
                if self.serving_since.is_none() && judgement.confirmed {
                    self.serving_since = judgement.first_good.or(Some(now));
                    self.say("the node serves, confirmed");
                    self.daily.serving(now);
                }
                self.first_good = judgement.first_good;
            }
            Verdict::NotServing { .. } => {
                self.serving_since = None;
                if self.waited_for_update(now) {
                    self.updating = None;
                }
            }
            Verdict::Inconclusive { .. } => {}
        }
        if self.book.state().incident.is_some() {
            self.record_word(judgement);
            if matches!(judgement.verdict, Verdict::NotServing { .. }) {
                self.escalate(judgement);
            }
            return;
        }
        if let Verdict::NotServing { why } = &judgement.verdict {
            self.fallen(why.clone(), judgement.findings.clone());
        }
    }

    /// What the judge only tells (an update that takes long, probes that fail on our own side, a certificate that is
    /// out of date), each once a day.
    fn pass_on_notices(&mut self, judgement: &Judgement, now: Moment) {
        for (kind, why) in notices::of_the_judge(judgement) {
            if self.notices.tell(kind, now) {
                self.notice(kind, &why);
            }
        }
        // In an incident that is the incident's to tell.
        let degraded = match &judgement.verdict {
            Verdict::Serving { degraded } if self.book.state().incident.is_none() => degraded.join("; "),
            Verdict::Serving { .. } | Verdict::NotServing { .. } => String::new(),
            Verdict::Inconclusive { .. } => return,
        };
        let (kind, holds) = (alert::Notice::Degraded, !degraded.is_empty());
        if self.notices.tell_lasting(kind, holds, DEGRADED_MS, now) {
            self.notice(kind, &degraded);
        }
    }

    /// A pause that has run out is told once: from now on hands are on again.
    fn follow_pause(&mut self) {
        if let Some(until_s) = self.notices.pause_ran_out(&self.will, clock::wall().as_second()) {
            self.notice_of(alert::Notice::PauseEnded, &format!("pause-{until_s}"), "");
        }
    }

    /// The judge says that the node does not serve and no incident is open.
    fn fallen(&mut self, why: String, findings: Vec<engine::Finding>) {
        let now = clock::now();
        if self.will.stopped || self.unit_stopped.is_some() {
            return;
        }
        if !self.service.embedded() {
            let state = self.service.look(Deadline::after(MANAGER_LIMIT));
            if state.active == Active::Inactive && down_by_will(&state) {
                self.leave_alone("its unit is disabled or masked");
                return;
            }
        }
        if let Some(stopped) = self.bare_stop {
            if now.since_ms(stopped).is_none_or(|ms| ms < BARE_STOP_MS) {
                return;
            }
            self.bare_stop = None;
            if self.config.mode == Mode::Guard {
                self.notice(alert::Notice::StartedAgain, "an enabled unit was stopped without a word");
            }
        }
        if self.hands_off().is_some() && self.told_left_alone {
            return;
        }
        self.told_left_alone = self.hands_off().is_some();
        self.open(IncidentKind::Outage, why, findings);
    }

    /// A look that has not come back hangs in the kernel (a dead disk or network file system): no deadline of ours
    /// reaches it. It is left behind with its thread, and a new one looks; the owner is told that we are half blind.
    fn replace_stuck_prober(&mut self, now: Moment) {
        /// A look's own limit is 8 s.
        const STUCK_MS: u64 = 30_000;
        /// Threads left behind before no further one is risked: each holds its stack.
        const LEFT_BEHIND: u32 = 8;
        if self.prober.silent_ms(now) < STUCK_MS {
            return;
        }
        self.judgement = None;
        if self.blind == 4 {
            self.notice(alert::Notice::OwnSide, "looks at the node have not come back for two minutes");
        }
        self.blind = self.blind.saturating_add(1);
        if self.blind <= LEFT_BEHIND {
            self.say("a look at the node did not come back; another is taken");
            match Prober::start() {
                Ok(prober) => self.prober = prober,
                Err(e) => self.say(&e.to_string()),
            }
        }
    }

    fn due_looks(&mut self) {
        let now = clock::now();
        self.replace_stuck_prober(now);
        if !self.prober.busy() && now.ms >= self.next_look.ms {
            let well = self.judgement.as_ref().is_some_and(|j| j.verdict.is_serving());
            let service = self.service_state(now, well);
            let want = Want {
                hello: self.judge.wants_hello(now) || self.doing.judging(),
                identity: self.judge.wants_identity(now),
                update: !well,
                searched: None,
                service,
                main: self.service.main(),
                log: self.service.embedded().then(|| self.places.gateway_log()),
                known_turn: false,
                heard: None,
            };
            self.prober.ask(&self.node, want);
        }
        if self.exam_due.is_some_and(|due| now.ms >= due.ms) && self.book.state().climb().is_none() {
            self.exam_due = None;
            self.daily.examine_soon(now);
        }
    }

    /// What the manager says; asked rarely while all is well, because asking costs a process.
    fn service_state(&mut self, now: Moment, well: bool) -> Option<ServiceLook> {
        let every_ms = if well { MANAGER_EVERY_MS } else { self.config.judge.http_every_ms };
        if let Some((at, look)) = &self.service_look
            && now.since_ms(*at).is_some_and(|ms| ms < every_ms)
        {
            return Some(look.clone());
        }
        let state = self.service.look(Deadline::after(MANAGER_LIMIT));
        let look = ServiceLook::from(&state);
        self.service_look = Some((now, look.clone()));
        Some(look)
    }

    // ---- telling ----

    /// Why nothing is touched now, where that is so.
    pub(crate) fn hands_off(&self) -> Option<String> {
        if self.config.mode == Mode::Watch {
            return Some("koboshi only watches (mode = \"watch\")".to_owned());
        }
        if self.will.paused(clock::wall().as_second()) {
            return Some("koboshi is paused; `koboshi resume` ends it".to_owned());
        }
        if self.will.stopped {
            return Some("the owner stopped the node; `koboshi node start` starts it".to_owned());
        }
        self.updating.as_ref().map(|what| format!("an update is at work: {what}"))
    }

    fn say(&self, line: &str) {
        self.printer.note(format!("{:.0} {line}", clock::wall()));
    }

    fn publish(&mut self) {
        let now = clock::now();
        let status = self.status(now);
        let due = match &self.published {
            None => true,
            Some((at, before)) => {
                let same = Status { at: before.at, start_free_at: before.start_free_at, ..status.clone() }
                    == *before;
                !same || now.since_ms(*at).is_none_or(|ms| ms >= PUBLISH_EVERY_MS)
            }
        };
        if due {
            if let Err(e) = status.publish(&self.places) {
                self.say(&e.to_string());
            }
            self.published = Some((now, status));
        }
    }

    fn status(&self, now: Moment) -> Status {
        let state = self.book.state();
        let free_in_ms = state.start_free_ms(state.time_ms(now)).saturating_sub(state.time_ms(now));
        Status {
            agent: self.me,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            at: now,
            mode: match self.config.mode {
                Mode::Guard => "guard".to_owned(),
                Mode::Watch => "watch".to_owned(),
            },
            manager: match &self.service {
                Service::Embedded(_) => "embedded".to_owned(),
                Service::Systemd(m) => host::service::Manager::kind(m).to_owned(),
            },
            containers: strength(&self.runner.containers.strength()),
            verdict: self.judgement.as_ref().map_or_else(
                || match self.gateway {
                    Some(_) => Verdict::Inconclusive { why: "no look has been taken yet".to_owned() },
                    None => Verdict::NotServing { why: "no gateway process runs".to_owned() },
                },
                |j| j.verdict.clone(),
            ),
            confirmed: self.judgement.as_ref().is_some_and(|j| j.confirmed),
            gateway: self.gateway.as_ref().map(PidFd::id),
            serving_since: self.serving_since,
            hands_off: self.hands_off(),
            incident: state.incident.as_ref().map(|incident| status::Open {
                id: incident.id,
                cause: incident.cause.clone(),
                doing: self.holding_words(now).unwrap_or_else(|| self.doing_words(now)),
                layer: state.climb().and_then(|c| c.turn.as_ref()).map(|t| t.layer),
                emergency: state.in_emergency(),
            }),
            findings: self.exam.as_ref().map(|e| e.findings.clone()).unwrap_or_default(),
            snapshot: self.exam.as_ref().and_then(|e| e.snapshot.clone()),
            ages_s: self.exam.as_ref().map(|e| e.ages_s.clone()).unwrap_or_default(),
            start_free_at: now.plus_ms(free_in_ms),
            settled: self.daily.settled(),
            trouble: self.daily.trouble(),
            home: self.home.words(),
        }
    }
}

pub(crate) fn strength(strength: &Strength) -> String {
    match strength {
        Strength::CgroupV2 { memory, pids } => format!(
            "cgroup v2, memory {}, pids {}",
            if *memory { "limited" } else { "unlimited" },
            if *pids { "limited" } else { "unlimited" }
        ),
        Strength::Weak { why } => format!("weak containers: {why}"),
    }
}

fn describe_will(will: &Will) -> String {
    match (will.stopped, will.paused(clock::wall().as_second())) {
        (true, _) => "that the node stays down".to_owned(),
        (false, true) => "hands off for a while".to_owned(),
        (false, false) => "that the node is guarded".to_owned(),
    }
}
