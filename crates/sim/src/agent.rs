//! The agent's loop over the simulated host, exactly as the engine's documentation asks for it.
//!
//! It is the model of `koboshi guard`: what it writes, when, and what it does in between. It can die at every
//! point marked `mortal`, and with the machine at any moment at which time passes.

use crate::brain::{Brain, Mutant};
use crate::check::{Checks, Violation};
use crate::prng::mix;
use crate::world::{Gate, NEVER, World};
use engine::state::Fate;
use engine::{
    Action, AlertResult, Claim, Event, FaultKind, Finding, How, IncidentKind, Ladder, Layer, Look, Record,
    Rung, StartLook, State, Verdict,
};

/// Between two probes that confirm each other: three of them are the judge's 5 s.
const PROBE_MS: u64 = 2_500;

/// Probes in a row that make a word certain.
const SURE: u8 = 3;

/// Idle time is looked through in strides of at most this.
const STRIDE_MS: u64 = 600_000;

/// Why a turn of the loop did not come to its end.
#[derive(Debug)]
pub enum Stop {
    /// The agent died.
    Died,
    /// The machine went down under it.
    Rebooted,
    /// A checker spoke.
    Violation(Violation),
}

impl From<Violation> for Stop {
    fn from(violation: Violation) -> Stop {
        Stop::Violation(violation)
    }
}

type Go<T = ()> = Result<T, Stop>;

/// The host, the journal and the checkers: what outlives an agent.
#[derive(Debug)]
pub struct Site {
    /// The simulated host.
    pub world: World,
    /// The journal on disk.
    pub journal: Vec<Record>,
    /// What was folded while the disk took nothing; lost with the boot.
    pub volatile: Vec<Record>,
    /// The checkers.
    pub checks: Checks,
    /// The engine, or a mutant of it.
    pub brain: Brain,
    /// Everything written, for a person who looks into a failure.
    pub trace: Option<Vec<String>>,
}

/// One agent process.
#[derive(Debug)]
pub struct Agent {
    /// The fold.
    pub state: State,
    holding: Option<u64>,
    journal_ok: bool,
    good: u8,
    good_since: u64,
    bad: u8,
}

impl Agent {
    /// A new agent: it folds what is there, and goes on.
    ///
    /// # Errors
    /// When the journal does not fold.
    pub fn wake(site: &mut Site) -> Result<Agent, Violation> {
        let mut state = State::default();
        for record in site.journal.iter().chain(&site.volatile) {
            if let Err(illegal) = site.brain.apply(&mut state, record) {
                return Err(site.checks.fail("replay", site.world.now, illegal.rule));
            }
        }
        let journal_ok = site.volatile.is_empty();
        Ok(Agent { state, holding: None, journal_ok, good: 0, good_since: 0, bad: 0 })
    }

    /// One turn of the loop.
    ///
    /// # Errors
    /// When the agent dies in it, the machine reboots, or a checker speaks.
    pub fn turn(&mut self, site: &mut Site) -> Go {
        self.tend_journal(site)?;
        if let Some(record) = self.state.wake(site.world.moment()) {
            return self.write(site, record.event);
        }
        while site.world.outer_starts > 0 {
            self.write(site, Event::StartSeen { by: "another".to_owned() })?;
            site.world.outer_starts -= 1;
        }
        if self.state.incident.is_none() {
            // Nothing to right: the person is told so.
            site.world.asked = None;
        }
        let ladder = self.ladder(&site.world);
        let action = site.brain.next(&self.state, &ladder, site.world.moment());
        site.checks.action(&site.world, &ladder, &action)?;
        if let (Some(trace), Action::Idle { .. } | Action::Judge { .. }) = (&mut site.trace, &action) {
            trace.push(format!("{:>12} {action:?} {:?}", site.world.now, site.world.gate));
        }
        match action {
            Action::Note { record } => self.put(site, record).map(|_| ()),
            Action::Spawn { intent, step, layer, .. } => self.spawn(site, intent, step, layer),
            Action::Wait { step, until, .. } => {
                let until = site.world.at(until);
                self.wait(site, step, until)
            }
            Action::Kill { step, layer } => self.kill(site, step, layer),
            Action::Start { intent, start, layer } => self.start(site, intent, start, layer),
            Action::Judge { look, until, .. } => {
                let until = site.world.at(until);
                self.judge(site, look, until)
            }
            Action::Alert { intent, key } => {
                let skip = site.brain.is(Mutant::AlertNotSent);
                if !self.put(site, intent)? {
                    return Ok(());
                }
                self.mortal(site)?;
                let result = if skip { AlertResult::Accepted } else { site.world.hand_over(key) };
                self.mortal(site)?;
                if !skip {
                    site.checks.handed(&site.world, key, &result)?;
                }
                let result = match result {
                    AlertResult::Refused { .. } if site.brain.is(Mutant::RefusedIsQueued) => {
                        AlertResult::Queued
                    }
                    AlertResult::Refused { .. } | AlertResult::Accepted | AlertResult::Queued => result,
                };
                self.write(site, Event::AlertDone { key, result })
            }
            Action::Idle { until } => {
                let until = until.map_or(NEVER, |until| site.world.at(until));
                self.idle(site, until)
            }
        }
    }

    /// The world as the engine is told it.
    #[must_use]
    pub fn ladder(&self, world: &World) -> Ladder {
        let rungs = [Layer::InPlace].into_iter().chain(Layer::CLIMB).map(|layer| {
            let applies = if world.absent.contains(&layer) {
                Err("not here".to_owned())
            } else if layer == Layer::Restart && !world.intact() {
                Err("the disk is not clean".to_owned())
            } else {
                Ok(())
            };
            let version = if layer == Layer::Restart { world.disk } else { world.sources };
            Rung::new(layer, applies, mix(version ^ ((layer as u64) << 32)))
        });
        let mut ladder = Ladder::new(rungs.collect());
        ladder.holding = self.holding;
        ladder.start = StartLook {
            alive: world.gate != Gate::Down,
            progressing: world.progressing(),
            intact: world.intact(),
        };
        ladder.hands_off = world.hands_off.then(|| "paused".to_owned());
        ladder.only = world.asked;
        ladder.journal_ok = self.journal_ok;
        ladder.limits = world.limits;
        ladder.evidence = world.sources;
        ladder.jitter_permille = i32::try_from(mix(world.now) % 2001).unwrap_or(0) - 1000;
        ladder
    }

    /// Where the agent, or the machine, may die.
    fn mortal(&mut self, site: &mut Site) -> Go {
        if site.world.rng.chance(site.world.faults.reboot) {
            site.world.reboot();
        }
        if site.world.rebooted {
            return Err(Stop::Rebooted);
        }
        if site.world.rng.chance(site.world.faults.agent_dies) {
            return Err(Stop::Died);
        }
        Ok(())
    }

    fn pass(&mut self, site: &mut Site, to: u64) -> Go {
        site.world.advance(to);
        if site.world.rebooted {
            return Err(Stop::Rebooted);
        }
        self.mortal(site)
    }

    /// The journal is rewritten small now and then, and whole again when the disk takes records again.
    fn tend_journal(&mut self, site: &mut Site) -> Go {
        let back = !self.journal_ok && !site.world.journal_bad;
        let small = self.journal_ok && !site.world.journal_bad && {
            let often = site.world.faults.compact;
            site.world.rng.chance(often)
        };
        if back || small {
            let mut record = self.state.checkpoint(site.world.moment());
            if let (true, Event::Checkpoint { state }) =
                (site.brain.is(Mutant::CheckpointForgetsStarts), &mut record.event)
            {
                state.starts_ms.clear();
            }
            let mut state = State::default();
            if let Err(illegal) = site.brain.apply(&mut state, &record) {
                return Err(site.checks.fail("legality", site.world.now, illegal.rule).into());
            }
            site.journal = vec![record];
            site.volatile.clear();
            self.state = state;
            self.journal_ok = true;
        }
        Ok(())
    }

    fn write(&mut self, site: &mut Site, event: Event) -> Go {
        let record = Record::new(site.world.moment(), event);
        // A journal that refuses the first time takes it the second, in memory.
        for _ in 0..2 {
            if self.put(site, record.clone())? {
                break;
            }
        }
        Ok(())
    }

    /// Check, make durable, fold. False when the journal refused and the decision is to be made anew.
    fn put(&mut self, site: &mut Site, record: Record) -> Go<bool> {
        self.mortal(site)?;
        if site.world.journal_bad && self.journal_ok {
            self.journal_ok = false;
            return Ok(false);
        }
        if let Err(illegal) = site.brain.apply(&mut self.state, &record) {
            return Err(site
                .checks
                .fail("legality", site.world.now, &format!("{illegal}: {record:?}"))
                .into());
        }
        if let Some(trace) = &mut site.trace {
            trace.push(format!(
                "{:>12} {}:{:<9} {:?}",
                site.world.now, record.at.boot, record.at.ms, record.event
            ));
        }
        if matches!(record.event, Event::ClimbBegan { only: Some(_), .. }) {
            site.world.asked = None;
        }
        let seen = site.checks.record(&site.world, &record, self.journal_ok);
        if self.journal_ok {
            site.journal.push(record);
        } else {
            site.volatile.push(record);
        }
        seen?;
        if site.journal.len() > 400 && self.journal_ok {
            site.world.faults.compact = site.world.faults.compact.max(1);
        }
        site.world.advance(site.world.now + 1);
        self.mortal(site)?;
        Ok(true)
    }

    fn spawn(&mut self, site: &mut Site, intent: Record, step: u64, layer: Layer) -> Go {
        let early = site.brain.is(Mutant::SpawnBeforeIntent);
        let most = self.ladder(&site.world).rung(layer).map_or(1_000, |rung| rung.work_most_ms);
        let most = site.world.limits.of(most);
        if early {
            site.checks.spawn(&site.world, step, layer)?;
            let _ = site.world.spawn(step, layer, most);
        }
        if !self.put(site, intent)? {
            return Ok(());
        }
        if early {
            self.holding = Some(step);
            return Ok(());
        }
        site.checks.spawn(&site.world, step, layer)?;
        match site.world.spawn(step, layer, most) {
            Ok(()) => self.holding = Some(step),
            Err(why) => return self.write(site, Event::Ended { step, how: How::SpawnFailed { why } }),
        }
        if site.world.faults.poison == Some(layer) {
            return Err(Stop::Died);
        }
        self.mortal(site)
    }

    fn wait(&mut self, site: &mut Site, step: u64, until: u64) -> Go {
        loop {
            let found = site.world.containers.iter().find(|container| container.step == step).cloned();
            let now = site.world.now;
            let ended = found.as_ref().is_none_or(|container| container.ends_at <= now);
            if ended {
                let code = found.map_or(0, |container| container.code);
                return self.write(site, Event::Ended { step, how: How::Exited { code } });
            }
            if now >= until {
                return self.write(site, Event::Ended { step, how: How::TimedOut });
            }
            let latent = self.state.incident.as_ref().is_some_and(|open| open.kind == IncidentKind::Latent);
            if latent && site.world.gate == Gate::Down {
                return self.escalate(site);
            }
            let to = until.min(site.world.next_event());
            self.pass(site, to)?;
            if site.world.hands_off {
                return Ok(());
            }
        }
    }

    fn kill(&mut self, site: &mut Site, step: u64, layer: Layer) -> Go {
        self.mortal(site)?;
        let polite = site.brain.is(Mutant::NoKillAfterExit) && self.holding == Some(step);
        let lazy = site.brain.is(Mutant::NoKillOfLost) && self.holding != Some(step);
        let killed = if polite || lazy { Ok(0) } else { site.world.kill(step) };
        let longest_ms = site.world.limits.of(1_500);
        let takes = site.world.rng.between(1, longest_ms);
        site.world.advance(site.world.now + takes);
        if !polite && !lazy {
            site.checks.kill(&site.world, step, killed.is_ok())?;
        }
        self.mortal(site)?;
        match killed {
            Ok(killed) => {
                self.holding = None;
                let done = site.world.finished.contains(&step);
                let ready = match layer {
                    // A stop for certain is worth a start whatever the step said.
                    Layer::Restart => done || site.world.gate == Gate::Down,
                    Layer::InPlace
                    | Layer::Restore
                    | Layer::SystemInstall
                    | Layer::UserInstall
                    | Layer::PeerCopy
                    | Layer::Emergency => done,
                };
                let claim = if ready {
                    Claim::Ready { inputs: site.world.disk }
                } else {
                    Claim::Nothing { why: "nothing was done".to_owned() }
                };
                self.write(site, Event::Emptied { step, killed, claim })
            }
            Err(why) => self.write(site, Event::KillFailed { step, why }),
        }
    }

    fn start(&mut self, site: &mut Site, intent: Record, start: u64, layer: Layer) -> Go {
        let early = site.brain.is(Mutant::StartBeforeIntent);
        if early {
            site.checks.start(&site.world, start, layer)?;
            site.world.start();
        }
        if !self.put(site, intent)? {
            return Ok(());
        }
        let mut error = None;
        if !early {
            if site.world.rng.chance(site.world.faults.no_start) {
                error = Some("the service manager refused".to_owned());
            } else {
                site.checks.start(&site.world, start, layer)?;
                site.world.start();
            }
        }
        self.mortal(site)?;
        self.write(site, Event::Started { start, error })
    }

    /// One probe, folded into the rows that make a word certain; the word, and whether it is.
    fn look(&mut self, site: &mut Site) -> (Verdict, bool) {
        let world = &mut site.world;
        match world.gate {
            Gate::Down => {
                // The exit is seen by pidfd: no probe can be wrong about it.
                (self.good, self.bad) = (0, SURE);
                (Verdict::NotServing { why: "no process".to_owned() }, true)
            }
            Gate::Starting { .. } if world.progressing() => {
                (self.good, self.bad) = (0, 0);
                (Verdict::Inconclusive { why: "starting".to_owned() }, false)
            }
            Gate::Starting { .. } | Gate::Hung | Gate::Serving { .. } => {
                if world.probe() {
                    if self.good == 0 {
                        self.good_since = world.now;
                    }
                    (self.good, self.bad) = (self.good.saturating_add(1).min(SURE), 0);
                    let sure = self.good >= SURE && world.now >= self.good_since + 2 * PROBE_MS;
                    let silent = world.degraded_until > world.now;
                    let degraded = if silent { vec!["channels".to_owned()] } else { Vec::new() };
                    (Verdict::Serving { degraded }, sure)
                } else {
                    (self.good, self.bad) = (0, self.bad.saturating_add(1).min(SURE));
                    (Verdict::NotServing { why: "no answer".to_owned() }, self.bad >= SURE)
                }
            }
        }
    }

    fn judge(&mut self, site: &mut Site, look: Look, until: u64) -> Go {
        (self.good, self.bad) = (0, 0);
        loop {
            let (verdict, sure) = self.look(site);
            let now = site.world.now;
            if sure || now >= until {
                let fell = !verdict.is_serving() && sure;
                let judged = Event::Judged { verdict, confirmed: sure, clean: site.world.broken.is_none() };
                self.write(site, judged)?;
                return if fell && look == Look::Start { self.evidence(site) } else { Ok(()) };
            }
            let latent = self.state.incident.as_ref().is_some_and(|open| open.kind == IncidentKind::Latent);
            if latent && site.world.gate == Gate::Down {
                return self.escalate(site);
            }
            let starting = matches!(site.world.gate, Gate::Starting { .. }) && site.world.progressing();
            let stride = if starting { site.world.next_event() } else { now + PROBE_MS };
            self.pass(site, stride.min(until).max(now + 1))?;
            if site.world.hands_off || site.world.outer_starts > 0 {
                return Ok(());
            }
        }
    }

    /// A start that failed may show what was wrong.
    fn evidence(&mut self, site: &mut Site) -> Go {
        let Some(broken) = site.world.broken.as_mut().filter(|broken| broken.hidden) else { return Ok(()) };
        broken.hidden = false;
        site.world.sources = mix(site.world.sources ^ 7);
        self.write(site, Event::Noticed { findings: vec![finding()] })
    }

    fn escalate(&mut self, site: &mut Site) -> Go {
        match self.state.escalate(site.world.moment(), IncidentKind::Outage, "it fell", vec![finding()]) {
            Some(record) => self.write(site, record.event),
            None => Ok(()),
        }
    }

    /// Daily life, until something is written or `until`.
    fn idle(&mut self, site: &mut Site, until: u64) -> Go {
        let stop = until.min(site.world.now.saturating_add(STRIDE_MS));
        loop {
            let (verdict, sure) = self.look(site);
            if self.daily(site, verdict, sure)? || site.world.now >= stop {
                return Ok(());
            }
            let settled = sure || matches!(site.world.gate, Gate::Starting { .. });
            let next = if settled { site.world.next_event() } else { site.world.now + PROBE_MS };
            let (hands, sources) = (site.world.hands_off, site.world.sources);
            let asked = site.world.asked;
            let starting = site.world.progressing();
            self.pass(site, next.min(stop).max(site.world.now + 1))?;
            let changed = hands != site.world.hands_off
                || sources != site.world.sources
                || asked != site.world.asked
                || site.world.outer_starts > 0
                || starting != site.world.progressing();
            if changed && self.state.incident.is_some() {
                return Ok(());
            }
        }
    }

    /// Whether something was written.
    fn daily(&mut self, site: &mut Site, verdict: Verdict, sure: bool) -> Go<bool> {
        let world = &site.world;
        let fell = sure && !verdict.is_serving();
        let seen_damage =
            world.broken.as_ref().filter(|broken| !broken.hidden).map(|broken| broken.interrupts);
        let clean = world.broken.is_none();
        if self.state.incident.is_none() {
            let kind = match (fell, seen_damage) {
                (true, _) => IncidentKind::Outage,
                (false, Some(true)) if sure => IncidentKind::Damage,
                (false, Some(false)) if sure => IncidentKind::Latent,
                (false, Some(_) | None) => return Ok(false),
            };
            // Under hands off, one incident tells that it is left alone.
            if world.hands_off && self.state.left_alone("paused") {
                return Ok(false);
            }
            let record = self.state.open(world.moment(), kind, "seen", vec![finding()]);
            if let Some(record) = record {
                self.write(site, record.event)?;
            }
            return Ok(true);
        }
        let kind = IncidentKind::Outage;
        if fell && self.state.escalate(site.world.moment(), kind, "", Vec::new()).is_some() {
            self.escalate(site)?;
            return Ok(true);
        }
        if self.state.wants_word(site.world.moment(), &verdict, sure, clean) {
            self.write(site, Event::Judged { verdict, confirmed: sure, clean })?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Nothing is open and nothing is owed.
    #[must_use]
    pub fn settled(&self) -> bool {
        self.state.incident.is_none()
            && self.state.alerts.iter().all(|alert| matches!(alert.fate, Fate::Accepted | Fate::Queued))
    }
}

fn finding() -> Finding {
    Finding { kind: FaultKind::Notice, class: None, what: "simulated".to_owned(), evidence: Vec::new() }
}
