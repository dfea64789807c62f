//! The way home of a node that layer 3 runs from its user's prefix: a job of daily operation, and never an incident.
//!
//! ```text
//! rest ──gates──► (asking) ──► staging ──stands ready──► ready ──gates, idle──► moving ──► trial ──confirmed──► rest, at home
//!                                                                               └─not serving─► back ──► rest, away
//! ```
//! Guarantees. The node serves while its program is built beside its home. It is stopped only when nothing else is open,
//! nobody said hands off, no start was made for so long that both this one and the one back are within the ration, and no
//! turn is seen at work. What does not serve at home goes back to where it served, before any layer is asked; only if that
//! does not serve either it is an incident like any other. Whoever dies in between leaves a note (`layers::install::home`),
//! and the next agent goes on from there.

use super::runner::Running;
use super::{Agent, DRAIN_LIMIT, MANAGER_LIMIT};
use crate::reinstall::{self, Seen};
use crate::step::{Answer, Work};
use engine::{Event, IncidentKind, Layer, Moment, Record};
use host::clock::{self, Deadline};
use layers::install::{Moved, home};
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// Between two looks at whether it may go home.
const LOOK_EVERY_MS: u64 = 60_000;
/// The same while the program stands ready and only the moment is waited for.
const READY_EVERY_MS: u64 = 5_000;
/// After a failure; it doubles with each further one.
const RETRY_MS: u64 = 30 * 60_000;
/// Between two questions to sudo, which writes each refusal into the host's log.
const ASK_EVERY_MS: u64 = 10 * 60_000;
/// sudo's own patience with its modules ends before.
const ASK_LIMIT: Duration = crate::sudo::ASK_LIMIT.saturating_add(Duration::from_secs(1));
/// To sixteen hours at most.
const MOST_DOUBLINGS: u32 = 5;
/// Building at idle priority, beside a gateway that serves.
const STAGE_LIMIT: Duration = Duration::from_secs(900);
/// A gateway may drain, then come renames, one by one where there is no exchange.
const MOVE_LIMIT: Duration = DRAIN_LIMIT.saturating_add(Duration::from_secs(60));
/// No start in this time: then the ration has room for this one and for the one back.
const QUIET_STARTS_MS: u64 = 300_000;
/// A turn that wrote nothing for this long is none.
const IDLE_S: u64 = 60;
/// After this long without an idle moment it goes all the same: its stop lets turns drain.
const PATIENCE_MS: u64 = 6 * 3_600_000;

/// Where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Phase {
    /// Nothing is done.
    #[default]
    Rest,
    /// sudo is asked whether root would build it.
    Asking,
    /// The program is being built beside its home.
    Staging,
    /// It stands ready.
    Ready,
    /// The gateway is being stopped and moved.
    Moving,
    /// It was started at home and is not confirmed yet.
    Trial,
    /// It is being taken back to where it served.
    Back,
}

/// The job.
#[derive(Debug, Default)]
pub(super) struct Homecoming {
    phase: Phase,
    running: Option<Running>,
    /// The next look.
    at: Option<Moment>,
    failures: u32,
    ready_since: Option<Moment>,
    version: String,
    /// What keeps it from going home, for people.
    why: Option<String>,
}

impl Homecoming {
    /// Whether the gateway is down by this job's own doing.
    pub(super) fn at_work(&self) -> bool {
        match self.phase {
            Phase::Moving | Phase::Back => true,
            Phase::Rest | Phase::Asking | Phase::Staging | Phase::Ready | Phase::Trial => false,
        }
    }

    /// Whether no other job of daily operation may read the trees or trust them.
    pub(super) fn busy(&self) -> bool {
        self.at_work() || self.phase == Phase::Trial
    }

    pub(super) fn due(&self) -> Option<Moment> {
        let end = self.running.as_ref().map(|r| r.deadline.moment());
        self.at.into_iter().chain(end).min_by_key(|m| m.ms)
    }

    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.running.as_ref().map(|r| r.step.pidfd())
    }

    /// For people.
    pub(super) fn words(&self) -> Option<String> {
        match self.phase {
            Phase::Rest | Phase::Asking => self.why.clone(),
            Phase::Staging => Some("its program is being built beside its home".to_owned()),
            Phase::Ready => Some(match &self.why {
                Some(why) => format!("its program stands ready at home; {why}"),
                None => "its program stands ready at home".to_owned(),
            }),
            Phase::Moving => Some("it is being moved home".to_owned()),
            Phase::Trial => Some("it was started at home and is not confirmed yet".to_owned()),
            Phase::Back => Some("it did not serve at home and goes back".to_owned()),
        }
    }

    fn rest(&mut self, at: Moment, failed: bool) {
        let wait_ms = if failed { RETRY_MS << self.failures.min(MOST_DOUBLINGS) } else { LOOK_EVERY_MS };
        self.failures = if failed { self.failures.saturating_add(1) } else { self.failures };
        self.phase = Phase::Rest;
        self.running = None;
        self.ready_since = None;
        self.at = Some(at.plus_ms(wait_ms));
    }
}

/// What decides whether the node may move now. Everything is asked for anew each time.
#[derive(Debug, Clone)]
struct Moves {
    wanted: Result<(), String>,
    hands_off: Option<String>,
    incident: bool,
    /// It serves, confirmed, for the settling time, and a snapshot of it is trusted.
    settled: bool,
    /// The last start of the gateway by anybody, as long ago.
    last_start_ms: Option<u64>,
    /// What the gateway says of work that a stop would wait for, where it says anything.
    active_work: Option<u64>,
    /// A turn wrote something this long ago, where that can be seen.
    last_turn_s: Option<u64>,
    waited_ms: u64,
    pressed: bool,
}

impl Moves {
    /// Whether the program may be built beside its home.
    fn stage(&self) -> Result<(), String> {
        self.wanted.clone()?;
        if let Some(why) = &self.hands_off {
            return Err(why.clone());
        }
        if self.incident {
            return Err("an incident is open".to_owned());
        }
        if !self.settled {
            return Err("it has not settled where it is".to_owned());
        }
        if self.pressed {
            return Err("the machine is under pressure".to_owned());
        }
        Ok(())
    }

    /// Whether the gateway may be stopped for it.
    fn stop(&self) -> Result<(), String> {
        self.stage()?;
        if self.last_start_ms.is_some_and(|ms| ms < QUIET_STARTS_MS) {
            return Err("it was started a short while ago, and starts are rationed".to_owned());
        }
        let turn = self.active_work.is_some_and(|n| n > 0) || self.last_turn_s.is_some_and(|s| s < IDLE_S);
        if turn && self.waited_ms < PATIENCE_MS {
            return Err("a turn is at work".to_owned());
        }
        Ok(())
    }
}

fn past(now: Moment, at: Moment) -> bool {
    now.boot != at.boot || now.ms >= at.ms
}

impl Agent {
    /// What an agent that died left on its way home.
    pub(super) fn home_begins(&mut self) {
        if self.errand.is_some() || home::on_trial(&self.places.state_dir).is_none() {
            return;
        }
        self.say("the node is on trial at home");
        // The step of the dead agent is dead by now; what it held is ours to let go.
        self.release();
        self.follow_move();
        self.home.phase = Phase::Trial;
        self.home.at = Some(clock::now());
        self.follow_gateway();
        if self.gateway.is_none() && self.node.gateway().is_none() && self.hands_off().is_none() {
            self.start_where_it_is("the node came home");
        }
    }

    /// The job's turn.
    pub(super) fn tend_home(&mut self) {
        let now = clock::now();
        let ended =
            self.home.running.as_mut().is_some_and(|r| r.step.look().is_some() || r.deadline.passed());
        match self.home.phase {
            Phase::Asking | Phase::Staging | Phase::Moving | Phase::Back if ended => {
                self.home_step_ended(now);
            }
            Phase::Moving | Phase::Back => {}
            Phase::Asking | Phase::Staging => {
                if self.hands_off().is_some() || self.book.state().incident.is_some() {
                    self.home_makes_way();
                }
            }
            Phase::Trial => self.trial(now),
            Phase::Rest | Phase::Ready => {
                if self.home.at.is_none_or(|at| past(now, at)) {
                    // A way back that could not be begun leaves the trial open; the ladder has righted the node meanwhile.
                    let open = home::on_trial(&self.places.state_dir).is_some();
                    if open && self.book.state().incident.is_none() {
                        self.home.phase = Phase::Trial;
                        self.home.at = Some(now);
                    } else {
                        self.look_home(now);
                    }
                }
            }
        }
    }

    /// What decides, where the node is away at all.
    fn moves(&self, now: Moment) -> Option<Moves> {
        let moved = Moved::load(&self.places.state_dir).ok().flatten().filter(Moved::displaced)?;
        if moved.back_to.is_some() || self.errand.is_some() {
            return None;
        }
        let state = self.book.state();
        let t = state.time_ms(now);
        let last_turn_s = self.node.last_turn().and_then(|at| at.elapsed().ok()).map(|age| age.as_secs());
        Some(Moves {
            wanted: self.may_live_at(&moved),
            hands_off: self.hands_off(),
            incident: state.incident.is_some(),
            settled: self.served_ms(now) >= self.config.backup.settle_s.saturating_mul(1000)
                && self.daily.settled(),
            last_start_ms: state.starts_ms.iter().max().map(|at| t.saturating_sub(*at)),
            active_work: self.judge.active_work(),
            last_turn_s,
            waited_ms: self.home.ready_since.and_then(|at| now.since_ms(at)).unwrap_or(0),
            pressed: super::daily::pressed(),
        })
    }

    fn served_ms(&self, now: Moment) -> u64 {
        self.serving_since.and_then(|since| now.since_ms(since)).unwrap_or(0)
    }

    /// Layer 2's own preconditions, at home.
    fn may_live_at(&self, moved: &Moved) -> Result<(), String> {
        if !self.config.ladder.return_home {
            return Err("switched off in the configuration ([ladder] return_home)".to_owned());
        }
        if let Some(why) = self.config.ladder.refuses(Layer::SystemInstall) {
            return Err(why);
        }
        // Its version may have moved on, and its port is the configuration's.
        if self.node.package_dir != moved.away.package_dir {
            return Err("the node is not where koboshi had put it".to_owned());
        }
        // Whether root would do it is asked when all else speaks for it: sudo may hang.
        let sudo = crate::sudo::needed(&moved.home, &self.places).then_some(Ok(()));
        let version = self.version_to_install();
        let seen = Seen { version: version.as_deref(), snapshot: None, findings: &[] };
        reinstall::system(&moved.home, &self.places, seen, sudo.as_ref())
    }

    fn look_home(&mut self, now: Moment) {
        let Some(moves) = self.moves(now) else {
            // At home: a stat every minute is all there is to do.
            self.home.why = None;
            self.home.rest(now, false);
            return;
        };
        let version = self.version_to_install().unwrap_or_default();
        if self.home.phase == Phase::Ready && self.home.version != version {
            self.home.rest(now, false);
            return;
        }
        let ready = home::Staged::load(&self.places.state_dir).is_some_and(|s| s.version == version);
        let may = if ready { moves.stop() } else { moves.stage() };
        if let Err(why) = may {
            if self.home.why.as_ref() != Some(&why) {
                self.say(&format!("the node stays away from home: {why}"));
                self.home.why = Some(why);
            }
            if ready {
                self.home.phase = Phase::Ready;
                self.home.version = version;
                self.home.ready_since.get_or_insert(now);
            }
            self.home.at = Some(now.plus_ms(if ready { READY_EVERY_MS } else { LOOK_EVERY_MS }));
            return;
        }
        self.home.version.clone_from(&version);
        if !ready && self.home_is_roots() {
            self.home_step(Phase::Asking, "job-home-ask", Work::AskSudo { home: true }, ASK_LIMIT);
            return;
        }
        self.home.why = None;
        if ready {
            self.say("the node moves home: it is stopped, exchanged and started there");
            self.home_step(Phase::Moving, "job-home-move", Work::MoveHome { version }, MOVE_LIMIT);
        } else {
            self.stage_home(version);
        }
    }

    fn stage_home(&mut self, version: String) {
        self.say("the node's home can be written to again: its program is built there while it serves");
        self.home_step(Phase::Staging, "job-home-stage", Work::StageHome { version }, STAGE_LIMIT);
    }

    fn home_is_roots(&self) -> bool {
        let moved = Moved::load(&self.places.state_dir).ok().flatten();
        moved.is_some_and(|moved| crate::sudo::needed(&moved.home, &self.places))
    }

    fn home_step(&mut self, phase: Phase, name: &str, work: Work, limit: Duration) {
        let baseline = self.judge.baseline().clone();
        let background = matches!(phase, Phase::Asking | Phase::Staging);
        if !background {
            self.daily.make_way();
        }
        let deadline = Deadline::after(limit);
        match self.runner.spawn(name, work, &self.node, Some(&baseline), background, deadline) {
            Ok(running) => {
                self.home.phase = phase;
                self.home.running = Some(running);
                self.home.at = None;
            }
            Err(e) => {
                self.say(&e.to_string());
                self.home.rest(clock::now(), true);
            }
        }
    }

    /// Ends the step's container and says what it said. `None` when it said nothing or failed.
    fn end_home_step(&mut self) -> Option<layers::Report> {
        let mut running = self.home.running.take()?;
        if let Err(e) = running.kill() {
            self.say(&e.to_string());
        }
        match Answer::wanted(running.answer(), Answer::report) {
            Ok(report) => {
                for line in report.done.iter().chain(&report.undone) {
                    self.say(&format!("  home: {line}"));
                }
                Some(report)
            }
            Err(why) => {
                self.say(&format!("  home: {why}"));
                self.home.why = Some(why);
                None
            }
        }
    }

    fn home_step_ended(&mut self, now: Moment) {
        let phase = self.home.phase;
        let done = self.end_home_step().is_some();
        match phase {
            Phase::Asking if done => {
                self.home.why = None;
                let version = self.home.version.clone();
                self.stage_home(version);
            }
            Phase::Asking => {
                self.home.rest(now, false);
                self.home.at = Some(now.plus_ms(ASK_EVERY_MS));
            }
            Phase::Staging if done => {
                self.home.phase = Phase::Ready;
                self.home.ready_since = Some(now);
                self.home.at = Some(now);
            }
            Phase::Staging => self.home.rest(now, true),
            Phase::Moving => self.moved_home(now),
            Phase::Back => self.is_back(now),
            Phase::Rest | Phase::Ready | Phase::Trial => {}
        }
    }

    /// The step that moves it is over, whatever end it came to: the note says where the node is.
    fn moved_home(&mut self, now: Moment) {
        self.release();
        self.follow_move();
        if home::on_trial(&self.places.state_dir).is_some() {
            self.home.phase = Phase::Trial;
            self.home.at = Some(now);
            self.start_where_it_is("the node came home");
            return;
        }
        // It never came to that: it goes on where it was.
        self.home.rest(now, true);
        // What a killed exchange left is settled before the next one.
        self.daily.tidy_soon(now);
        self.follow_gateway();
        if self.node.gateway().is_none() {
            self.start_where_it_is("the move home did not come to an exchange");
        }
    }

    /// A start of this job's, within the ration; what cannot be started is an incident.
    fn start_where_it_is(&mut self, why: &str) {
        let now = clock::now();
        if self.will.stopped {
            return;
        }
        let state = self.book.state();
        let t = state.time_ms(now);
        if state.start_free_ms(t) > t {
            self.open(IncidentKind::Outage, format!("{why}, and its starts are used up"), Vec::new());
            return;
        }
        self.write(Record::new(now, Event::StartSeen { by: why.to_owned() }));
        let mut asked = self.service.manager().start(Deadline::after(MANAGER_LIMIT));
        if asked.is_err() && self.service.look(Deadline::after(MANAGER_LIMIT)).held {
            self.release_now();
            asked = self.service.manager().start(Deadline::after(MANAGER_LIMIT));
        }
        match asked {
            Ok(()) => self.started(now),
            Err(e) => {
                self.say(&e.to_string());
                self.open(
                    IncidentKind::Outage,
                    format!("{why}, and cannot be started: {}", e.why),
                    Vec::new(),
                );
            }
        }
    }

    fn trial(&mut self, now: Moment) {
        self.home.at = Some(now.plus_ms(READY_EVERY_MS));
        let serves = self.judgement.as_ref().is_some_and(|j| j.verdict.is_serving() && j.confirmed);
        if !serves {
            return;
        }
        match home::arrived(&self.places.state_dir) {
            Ok(_) => {
                self.say("the node is home again, confirmed");
                let place = self.node.prefix.display().to_string();
                self.notice(alert::Notice::Home, &format!("it serves from its own prefix {place} again"));
                self.home.failures = 0;
                self.home.why = None;
                self.home.rest(now, false);
                self.daily.snapshot_by_hand(now, "home again");
            }
            Err(e) => self.say(&e.to_string()),
        }
    }

    /// An incident would open. `true` when this job deals with it: its own stop is none, and what does not serve at home
    /// goes back first.
    pub(super) fn home_answers_for(&mut self, cause: &str) -> bool {
        match self.home.phase {
            Phase::Moving | Phase::Back => true,
            // Whoever keeps hands off it has it as it is.
            Phase::Trial if self.hands_off().is_some() => false,
            Phase::Trial => {
                self.say(&format!("the node does not serve at home ({cause}): it goes back to where it did"));
                self.home_step(Phase::Back, "job-home-back", Work::HomeBack, MOVE_LIMIT);
                // Where not even that can be begun, it is the ladder's.
                self.home.phase == Phase::Back
            }
            Phase::Asking | Phase::Staging | Phase::Ready | Phase::Rest => {
                self.home_makes_way();
                false
            }
        }
    }

    fn is_back(&mut self, now: Moment) {
        let why = self.home.why.take();
        self.release();
        self.follow_move();
        // It was built, moved and started, and it did not serve: nothing that another half an hour would change.
        self.home.failures = self.home.failures.max(MOST_DOUBLINGS);
        self.home.rest(now, true);
        if home::on_trial(&self.places.state_dir).is_some() {
            let why = why.unwrap_or_default();
            let cause = format!("the node does not serve at home and could not be taken back: {why}");
            self.open(IncidentKind::Outage, cause, Vec::new());
            return;
        }
        self.home.why = Some("it did not serve there".to_owned());
        let place = self.node.prefix.display().to_string();
        let told = format!("it did not serve at home and runs from {place} as before");
        self.notice(alert::Notice::Home, &told);
        self.start_where_it_is("the node went back to where it served");
    }

    /// The machine is needed for something else, or somebody said hands off: what is built goes on being there.
    fn home_makes_way(&mut self) {
        if matches!(self.home.phase, Phase::Asking | Phase::Staging) {
            let _ = self.end_home_step();
            self.home.rest(clock::now(), false);
        }
    }

    /// The owner stops the node, or the agent ends, in the middle of it: its step is ended and the node is where the note
    /// says. `true` when the gateway was down by this job's doing.
    pub(super) fn home_stands_still(&mut self) -> bool {
        let was = self.home.at_work();
        if self.home.running.is_some() {
            let _ = self.end_home_step();
            self.follow_move();
        }
        if was {
            let trial = home::on_trial(&self.places.state_dir).is_some();
            self.home.rest(clock::now(), true);
            self.home.phase = if trial { Phase::Trial } else { Phase::Rest };
        } else {
            self.home_makes_way();
        }
        was
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quiet() -> Moves {
        Moves {
            wanted: Ok(()),
            hands_off: None,
            incident: false,
            settled: true,
            last_start_ms: Some(QUIET_STARTS_MS),
            active_work: Some(0),
            last_turn_s: Some(IDLE_S),
            waited_ms: 0,
            pressed: false,
        }
    }

    #[test]
    fn it_moves_only_when_nothing_at_all_speaks_against_it() {
        assert_eq!((quiet().stage(), quiet().stop()), (Ok(()), Ok(())));
        let unknown = Moves { last_start_ms: None, active_work: None, last_turn_s: None, ..quiet() };
        assert_eq!(unknown.stop(), Ok(()), "where turns cannot be seen it is as idle as it looks");
        let against: [(Moves, &str); 5] = [
            (Moves { wanted: Err("its prefix is root's".into()), ..quiet() }, "root's"),
            (Moves { hands_off: Some("koboshi is paused".into()), ..quiet() }, "paused"),
            (Moves { incident: true, ..quiet() }, "incident"),
            (Moves { settled: false, ..quiet() }, "settled"),
            (Moves { pressed: true, ..quiet() }, "pressure"),
        ];
        for (moves, why) in against {
            assert!(moves.stage().is_err_and(|e| e.contains(why)), "{why}");
            assert!(moves.stop().is_err_and(|e| e.contains(why)), "{why}");
        }
        // These speak against a stop, not against building beside it.
        let young = Moves { last_start_ms: Some(QUIET_STARTS_MS - 1), ..quiet() };
        assert!(
            young.stage().is_ok() && young.stop().is_err(),
            "the start back must be within the ration too"
        );
        assert!(Moves { active_work: Some(1), ..quiet() }.stop().is_err());
        let turn = Moves { last_turn_s: Some(IDLE_S - 1), ..quiet() };
        assert!(turn.stage().is_ok() && turn.stop().is_err());
        assert!(
            Moves { waited_ms: PATIENCE_MS, ..turn }.stop().is_ok(),
            "a node that never rests still gets home"
        );
    }

    #[test]
    fn failures_are_tried_again_ever_more_rarely_and_never_given_up() {
        let now = Moment { boot: 1, ms: 0 };
        let mut home = Homecoming::default();
        let mut waits = Vec::new();
        for _ in 0..8 {
            home.rest(now, true);
            waits.push(home.at.unwrap().ms / 60_000);
        }
        assert_eq!(waits, [30, 60, 120, 240, 480, 960, 960, 960]);
        home.rest(now, false);
        assert_eq!(home.at.unwrap().ms, LOOK_EVERY_MS);
    }
}
