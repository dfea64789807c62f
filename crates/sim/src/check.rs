//! The checkers: what must hold whatever happens. They believe neither the engine nor the agent: they keep their
//! own books from what was written, what was truly done, and the true time.
//!
//! Each has a name, by which `docs/simulation.md` lists the mutants that it catches.

use crate::prng::mix;
use crate::world::{Container, World};
use engine::{
    Action, AlertKey, AlertKind, AlertResult, Claim, Event, How, IncidentKind, Ladder, Layer, Record, Verdict,
};
use std::collections::{BTreeMap, BTreeSet};

/// A kill may take this long after a deadline: the agent's own steps in between, its alert included.
const KILL_SLACK_MS: u64 = 12_000;

/// A climb may overrun by what is in flight when its time is up.
const CLIMB_MS: u64 = 600_000;

/// The share of a retry time by which it may be early or late.
const JITTER: u64 = 10;

/// What a checker found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which checker.
    pub checker: &'static str,
    /// True time.
    pub at_ms: u64,
    /// What it saw.
    pub what: String,
}

/// A step as the checkers know it.
#[derive(Debug, Clone)]
struct Step {
    step: u64,
    /// Active time by which it is to be dead.
    deadline_ms: u64,
    /// Proven dead, or never again to be proven (reboot).
    emptied: bool,
    /// It was killed and would not die.
    stubborn: bool,
}

/// A climb as the checkers know it.
#[derive(Debug, Clone, Default)]
struct Climb {
    began_ms: u64,
    full: bool,
    /// The one layer that a person asked for.
    only: Option<Layer>,
    done: Vec<Layer>,
    intents: BTreeMap<Layer, u32>,
    starts: BTreeMap<Layer, u32>,
    voids: u32,
    noticed: bool,
    /// Something happened that may cost a layer its turn: a death, a reboot, a container that would not die,
    /// a start that was waited for.
    disturbed: bool,
}

/// An incident as the checkers know it.
#[derive(Debug, Clone)]
struct Incident {
    id: u64,
    kind: IncidentKind,
    scheduled: u32,
    emergency: bool,
    failed: BTreeSet<(Layer, u64)>,
    failed_starts: BTreeSet<u64>,
    /// Said for certain since the last step or start.
    serves: bool,
    /// The last climb was one that a person asked for: what follows it is of no schedule.
    asked: bool,
    /// Rebooted while it waited: engine time and true time differ by an unknown part of the wait.
    vague: bool,
    /// When the last climb ended, what it said of the next, the evidence then.
    held: Option<Held>,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    since_ms: u64,
    wait_ms: u64,
    evidence: u64,
    /// Someone kept the next climb back: hands off, a start in progress, a death.
    excused: bool,
    degraded: bool,
    /// The node serves, with damage that nothing could mend.
    serves: bool,
}

/// All checkers and their books.
#[derive(Debug, Default)]
pub struct Checks {
    /// By what this host's limits are divided.
    divisor: u64,
    /// True time in which no agent lived.
    pub down_ms: u64,
    /// The same when the agent that lives now was first heard, and the true time then.
    known_down_ms: u64,
    woke_ms: u64,
    /// A fingerprint of everything that was done, exit codes left out.
    pub trace: u64,
    /// True time of the last record.
    pub last_ms: u64,
    /// Records of the journal were lost with a boot: what they told is not asked for.
    pub lost: bool,
    intents: BTreeSet<u64>,
    start_intents: BTreeMap<u64, (u64, Layer)>,
    alert_intents: BTreeSet<AlertKey>,
    claims: BTreeMap<Layer, u64>,
    steps: Vec<Step>,
    starts_at: Vec<u64>,
    start_open: bool,
    start_inputs: Option<u64>,
    start_asked: bool,
    inputs: Option<(Layer, u64)>,
    /// The step of the turn under way, and whether its failure is its inputs' fault.
    current: u64,
    blamed: bool,
    attempt_lost: bool,
    climb: Option<Climb>,
    incident: Option<Incident>,
    closed: Vec<(u64, bool)>,
    settled: BTreeSet<AlertKey>,
    refused: BTreeSet<AlertKey>,
    ladder: Option<Ladder>,
    journal_ok: bool,
    emergency_due: Option<(AlertKey, u64)>,
    opening_due: Option<(AlertKey, u64)>,
    /// Everything counted, for the summary line.
    pub counts: Counts,
}

/// What a run saw: a simulation that never gets somewhere proves nothing about it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Incidents opened.
    pub incidents: u64,
    /// Climbs begun.
    pub climbs: u64,
    /// Emergencies entered.
    pub emergencies: u64,
    /// Recoveries.
    pub recoveries: u64,
    /// Starts.
    pub starts: u64,
    /// Steps.
    pub steps: u64,
    /// Agents that died.
    pub deaths: u64,
    /// Reboots.
    pub reboots: u64,
}

impl Counts {
    /// Adds another run's.
    pub fn add(&mut self, other: &Counts) {
        self.incidents += other.incidents;
        self.climbs += other.climbs;
        self.emergencies += other.emergencies;
        self.recoveries += other.recoveries;
        self.starts += other.starts;
        self.steps += other.steps;
        self.deaths += other.deaths;
        self.reboots += other.reboots;
    }
}

type Check = Result<(), Violation>;

impl Checks {
    /// Empty books of a host whose limits are divided by this.
    #[must_use]
    pub fn new(divisor: u32) -> Checks {
        Checks { divisor: u64::from(divisor), ..Checks::default() }
    }

    /// A violation.
    #[must_use]
    pub fn fail(&self, checker: &'static str, at_ms: u64, what: &str) -> Violation {
        Violation { checker, at_ms, what: what.to_owned() }
    }

    /// What a limit of the contract comes to on this host.
    fn of(&self, whole_ms: u64) -> u64 {
        whole_ms / self.divisor.max(1)
    }

    fn must(&self, holds: bool, checker: &'static str, world: &World, what: &str) -> Check {
        if holds { Ok(()) } else { Err(self.fail(checker, world.now, what)) }
    }

    /// Time in which an agent lived.
    fn active(&self, world: &World) -> u64 {
        world.now.saturating_sub(self.down_ms)
    }

    fn hands_off(&self) -> bool {
        self.ladder.as_ref().is_some_and(|ladder| ladder.hands_off.is_some())
    }

    fn stir(&mut self, what: u64) {
        self.trace = mix(self.trace ^ what);
    }

    fn disturb(&mut self) {
        if let Some(climb) = &mut self.climb {
            climb.disturbed = true;
        }
    }

    /// No agent lived for a while.
    pub fn died(&mut self, gap_ms: u64) {
        self.down_ms += gap_ms;
        self.counts.deaths += 1;
        self.disturb();
        self.void();
        self.excuse();
    }

    /// The machine was down for a while; `lost`: with it went records that the disk had not taken.
    pub fn rebooted(&mut self, gap_ms: u64, lost: bool) {
        self.down_ms += gap_ms;
        self.counts.reboots += 1;
        self.disturb();
        self.void();
        self.excuse();
        if let Some(climb) = &mut self.climb {
            climb.voids += 1;
        } else if let Some(incident) = &mut self.incident {
            incident.vague = true;
        }
        for step in &mut self.steps {
            step.emptied = true;
        }
        if lost {
            self.lost = true;
            self.forget();
        }
    }

    /// A start whose agent died before it was written that it was asked for may be asked for again.
    fn void(&mut self) {
        if let (true, Some(climb)) = (self.start_open, &mut self.climb) {
            climb.voids += 1;
        }
    }

    fn excuse(&mut self) {
        if let Some(Incident { held: Some(held), .. }) = &mut self.incident {
            held.excused = true;
        }
    }

    /// The journal went back in time: the books of what was lost are closed.
    fn forget(&mut self) {
        self.climb = None;
        self.incident = None;
        self.intents.clear();
        self.start_intents.clear();
        self.alert_intents.clear();
        self.claims.clear();
        self.steps.clear();
        self.starts_at.clear();
        self.start_open = false;
        self.closed.clear();
        self.settled.clear();
        self.emergency_due = None;
        self.opening_due = None;
    }

    /// Before an action is carried out.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn action(&mut self, world: &World, ladder: &Ladder, action: &Action) -> Check {
        if self.known_down_ms != self.down_ms {
            (self.known_down_ms, self.woke_ms) = (self.down_ms, world.now);
        }
        // A layer that begins to apply in the middle of a climb was not reckoned with before.
        let anew = self
            .ladder
            .as_ref()
            .is_some_and(|known| known.evidence != ladder.evidence || known.journal_ok != ladder.journal_ok);
        if anew {
            self.disturb();
        }
        self.ladder = Some(ladder.clone());
        if ladder.start_holds() || ladder.hands_off.is_some() {
            self.excuse();
            self.disturb();
        }
        let (mark, note) = match action {
            Action::Note { record } => (1, matches!(record.event, Event::Ended { .. })),
            Action::Spawn { step, .. } => (2 ^ (step << 8), false),
            Action::Wait { .. } => (3, false),
            Action::Kill { .. } => (4, false),
            Action::Start { start, .. } => (5 ^ (start << 8), false),
            Action::Judge { look, .. } => (6 ^ ((*look as u64) << 8), false),
            Action::Alert { .. } => (7, false),
            Action::Idle { .. } => (8, false),
        };
        self.stir(mark ^ (u64::from(note) << 4) ^ (world.now << 16));
        self.deadlines(world)?;
        self.climb_time(world)?;
        self.messages_in_time(world)
    }

    /// total-deadline: 600 s from a climb's first record, it is over.
    fn climb_time(&self, world: &World) -> Check {
        let Some(climb) = &self.climb else { return Ok(()) };
        let ran_ms = self.active(world).saturating_sub(climb.began_ms);
        self.must(ran_ms <= self.of(CLIMB_MS), "total-deadline", world, "a climb goes on after its 600 s")
    }

    /// step-deadline: nothing of ours lives long after its deadline.
    fn deadlines(&self, world: &World) -> Check {
        let now = self.active(world);
        for step in self.steps.iter().filter(|step| !step.emptied) {
            let late = now > step.deadline_ms.saturating_add(self.of(KILL_SLACK_MS));
            let lives = ours(world, step.step).is_some_and(|one| one.lives(world.now));
            self.must(
                !(late && lives) || step.stubborn,
                "step-deadline",
                world,
                "a step lives on after its deadline",
            )?;
        }
        Ok(())
    }

    /// alert-in-time: an emergency is told, or queued, by 600 s from the climb's beginning; an opening too.
    fn messages_in_time(&self, world: &World) -> Check {
        let now = self.active(world);
        for (key, by_ms) in [self.emergency_due, self.opening_due].into_iter().flatten() {
            let out = world.outbox.contains(&key) || self.refused.contains(&key);
            self.must(out || now <= by_ms, "alert-in-time", world, "a message is not out by 600 s")?;
        }
        Ok(())
    }

    /// A record that was made durable (`durable`), or folded in memory.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn record(&mut self, world: &World, record: &Record, durable: bool) -> Check {
        self.journal_ok = durable;
        self.last_ms = world.now;
        let now = self.active(world);
        match &record.event {
            Event::Opened { incident, kind, .. } => {
                self.counts.incidents += 1;
                self.must(self.incident.is_none(), "one-incident", world, "two incidents at once")?;
                self.incident = Some(Incident {
                    id: *incident,
                    kind: *kind,
                    scheduled: 0,
                    emergency: false,
                    failed: BTreeSet::new(),
                    failed_starts: BTreeSet::new(),
                    serves: false,
                    asked: false,
                    vague: false,
                    held: None,
                });
                let key = AlertKey { incident: *incident, kind: AlertKind::Opening };
                self.opening_due = Some((key, now + self.of(CLIMB_MS)));
            }
            Event::Escalated { kind, .. } => {
                if let Some(incident) = &mut self.incident {
                    incident.kind = *kind;
                    incident.scheduled = 0;
                    incident.held = None;
                    incident.serves = false;
                    incident.asked = false;
                }
                self.climb = None;
            }
            Event::Noticed { .. } => {
                if let Some(climb) = &mut self.climb {
                    climb.noticed = true;
                }
            }
            Event::ClimbBegan { full, only, .. } => self.climb_began(world, *full, *only)?,
            Event::Passed { layer, reason } => self.passed(world, *layer, reason)?,
            Event::Intent { step, layer, deadline, inputs, .. } => {
                self.intent(world, *step, *layer, world.at(*deadline), *inputs)?;
            }
            Event::Ended { how, .. } => {
                self.attempt_lost = matches!(how, How::Vanished | How::SpawnFailed { .. });
                if self.attempt_lost || *how == How::Stopped {
                    self.disturb();
                }
            }
            Event::Emptied { step, claim, .. } => {
                self.emptied(world, *step)?;
                if *step == self.current {
                    self.claimed(claim);
                }
            }
            Event::KillFailed { .. } => self.disturb(),
            Event::StartIntent { start, layer, inputs } => {
                self.start_intents.insert(*start, (*inputs, *layer));
                self.start_open = true;
                self.start_inputs = Some(*inputs);
                self.start_asked = false;
            }
            Event::Started { error, .. } => {
                self.start_open = false;
                self.start_asked = error.is_none();
                self.blamed = false;
            }
            Event::StartSeen { .. } => {
                self.starts_at.push(world.now);
                self.disturb();
            }
            Event::Judged { verdict, confirmed, clean } => {
                if self.divisor > 1 && !confirmed && matches!(verdict, Verdict::Serving { .. }) {
                    // Its confirmation is waited for at the judge's own pace, which is not divided.
                    self.disturb();
                }
                if let Some(incident) = &mut self.incident {
                    let whole = *clean || incident.kind == IncidentKind::Outage;
                    incident.serves = *confirmed && whole && matches!(verdict, Verdict::Serving { .. });
                }
            }
            Event::Failed { layer, .. } => self.failed(*layer),
            Event::Served { .. } => {
                self.truly_serves(world, false)?;
                self.climb = None;
                if let Some(incident) = &mut self.incident {
                    incident.held = Some(Held {
                        since_ms: world.now,
                        wait_ms: 0,
                        evidence: 0,
                        excused: true,
                        degraded: true,
                        serves: true,
                    });
                }
            }
            Event::Recovered { .. } => {
                self.counts.recoveries += 1;
                self.truly_serves(world, true)?;
                self.close(world)?;
            }
            Event::Emergency { retry_in_ms, evidence, .. } => {
                self.emergency(world, *retry_in_ms, *evidence)?;
            }
            Event::Postponed { retry_in_ms, evidence, .. } => {
                self.postponed(world)?;
                self.climb = None;
                self.hold(world, *retry_in_ms, *evidence, true)?;
            }
            Event::LeftAlone { .. } => self.close(world)?,
            Event::Rebooted => {
                self.start_open = false;
                self.start_asked = false;
                self.blamed = false;
            }
            Event::AlertIntent { key, attempt } => {
                // Three agents in a row died over it: from here on it waits like a refused one.
                if *attempt > 3 {
                    self.refused.insert(*key);
                }
                self.must(
                    !self.settled.contains(key),
                    "messages-once",
                    world,
                    "a settled message is sent again",
                )?;
                self.alert_intents.insert(*key);
            }
            Event::AlertDone { key, result } => match result {
                AlertResult::Accepted | AlertResult::Queued => {
                    let out = world.outbox.contains(key);
                    self.must(out, "sent-is-sent", world, "a message is recorded but lies nowhere")?;
                    self.settled.insert(*key);
                }
                AlertResult::Refused { .. } => {}
            },
            Event::Checkpoint { .. } => {}
        }
        Ok(())
    }

    fn climb_began(&mut self, world: &World, full: bool, only: Option<Layer>) -> Check {
        self.counts.climbs += 1;
        let now = self.active(world);
        // One that was asked for ends with its layer, and is followed by one of all layers.
        if let Some(climb) = self.climb.take() {
            let spent =
                now.saturating_sub(climb.began_ms) + self.of(30_000) >= self.of(CLIMB_MS) || climb.disturbed;
            let over = climb.only.is_some_and(|layer| climb.done.contains(&layer) || spent);
            self.climb = (!over).then_some(climb);
        }
        self.must(self.climb.is_none(), "one-climb", world, "a climb begins inside another")?;
        self.nothing_lives(world, "climb")?;
        let evidence = self.ladder.as_ref().map_or(0, |ladder| ladder.evidence);
        let disturbed = self.lost;
        let (gap_ms, two_climbs_ms) = (self.of(60_000), self.of(2 * CLIMB_MS));
        self.climb = Some(Climb { began_ms: now, full, only, disturbed, ..Climb::default() });
        let Some(incident) = &mut self.incident else { return Ok(()) };
        let after_asked = std::mem::replace(&mut incident.asked, only.is_some());
        let mut scheduled = only.is_none() && !after_asked;
        let mut spared = false;
        if let Some(held) = incident.held.take() {
            spared = held.serves && incident.kind == IncidentKind::Damage;
            let waited_ms = world.now.saturating_sub(held.since_ms);
            let early = waited_ms + 1 < held.wait_ms;
            scheduled &= !early && !held.degraded;
            let (serves, vague) = (incident.serves, incident.vague);
            self.must(!(held.degraded && serves), "served-is-left", world, "a serving node is climbed for")?;
            let new = held.evidence != evidence || vague;
            let allowed = !early || new && waited_ms >= gap_ms || self.lost || only.is_some();
            self.must(held.degraded || allowed, "retry-schedule", world, "a climb begins too early")?;
            let late_ms = held.wait_ms + two_climbs_ms;
            let late = waited_ms > late_ms && !held.excused && !held.degraded;
            self.must(!late, "retry-schedule", world, "a climb begins too late")?;
        }
        if let Some(incident) = &mut self.incident {
            incident.scheduled += u32::from(scheduled);
            let due = incident.scheduled > 3 && !spared;
            if full {
                incident.failed.clear();
                incident.failed_starts.clear();
            }
            incident.serves = false;
            let wrong = full != (due && scheduled) && !incident.vague;
            self.must(
                !wrong || self.lost,
                "full-climb",
                world,
                "the 30-minute climbs, and only they, try all",
            )?;
        }
        Ok(())
    }

    /// every-turn: a layer that applies is not passed without a cause that the checkers know of.
    fn passed(&mut self, world: &World, layer: Layer, reason: &str) -> Check {
        let Some(ladder) = &self.ladder else { return Ok(()) };
        let rung = ladder.rung(layer);
        let applies = rung.is_some_and(|rung| rung.applies.is_ok());
        let known = rung.is_some_and(|rung| {
            self.incident.as_ref().is_some_and(|incident| incident.failed.contains(&(layer, rung.inputs)))
        });
        let excused = !self.journal_ok
            || !ladder.journal_ok
            || self.lost
            || self.climb.as_ref().is_none_or(|climb| climb.disturbed)
            || self.steps.iter().any(|step| !step.emptied);
        let what = format!("{layer} applies and was passed: {reason}");
        self.must(!applies || known || excused, "every-turn", world, &what)?;
        if let Some(climb) = &mut self.climb {
            climb.done.push(layer);
        }
        Ok(())
    }

    fn intent(&mut self, world: &World, step: u64, layer: Layer, deadline: u64, inputs: u64) -> Check {
        let now = self.active(world);
        self.must(self.climb.is_some() || self.lost, "one-climb", world, "a step outside a climb")?;
        let asked = self.climb.as_ref().and_then(|climb| climb.only);
        self.must(
            asked.is_none_or(|asked| asked == layer),
            "only-what-was-asked",
            world,
            "another layer is tried in a climb that was asked for one",
        )?;
        self.intents.insert(step);
        let latent = self.incident.as_ref().is_some_and(|incident| incident.kind == IncidentKind::Latent);
        self.must(
            self.incident.is_none() || latent == (layer == Layer::InPlace),
            "latent-in-place",
            world,
            "a serving node gets in-place repair only, a fallen one none of it",
        )?;
        let failed = &self.incident.as_ref().map(|incident| incident.failed.contains(&(layer, inputs)));
        self.must(
            *failed != Some(true) || self.lost,
            "failed-inputs",
            world,
            "a layer is tried again on the inputs on which it failed",
        )?;
        let journal = self.ladder.as_ref().is_none_or(|ladder| ladder.journal_ok) || layer == Layer::Restart;
        self.must(journal, "journal-layer-0", world, "without a journal only layer 0 is tried")?;
        let least_ms =
            self.ladder.as_ref().and_then(|ladder| ladder.rung(layer)).map_or(0, |rung| rung.work_least_ms);
        let least_ms = self.of(least_ms);
        let gets_ms = deadline.saturating_sub(world.now);
        let disturbed = self.climb.as_ref().is_none_or(|climb| climb.disturbed);
        self.must(
            gets_ms >= least_ms || disturbed,
            "every-turn",
            world,
            "a layer's work gets less than its least",
        )?;
        let most_ms =
            self.ladder.as_ref().and_then(|ladder| ladder.rung(layer)).map_or(0, |rung| rung.work_most_ms);
        let most_ms = self.of(most_ms);
        self.must(gets_ms <= most_ms, "step-deadline", world, "a step gets more than its most")?;
        if let Some(climb) = &mut self.climb {
            let tries = climb.intents.entry(layer).or_default();
            *tries += 1;
            let most = if layer == Layer::Restore && climb.noticed { 4 } else { 2 };
            let too_many = *tries > most;
            self.must(!too_many, "attempts-bounded", world, "a layer is attempted again and again")?;
        }
        let deadline_ms = now.saturating_add(gets_ms);
        self.steps.retain(|step| !step.emptied);
        self.steps.push(Step { step, deadline_ms, emptied: false, stubborn: false });
        self.inputs = Some((layer, inputs));
        self.current = step;
        self.blamed = false;
        self.start_asked = false;
        self.start_inputs = None;
        if let Some(incident) = &mut self.incident {
            incident.serves = false;
        }
        self.claims.remove(&layer);
        Ok(())
    }

    /// kill-after-wait: no container is called empty that was not killed and proven so.
    fn emptied(&mut self, world: &World, step: u64) -> Check {
        let killed = self.steps.iter().all(|known| known.step != step || known.emptied);
        self.must(killed, "kill-after-wait", world, "a container is called empty without a kill")?;
        self.must(
            ours(world, step).is_none_or(|one| !one.lives(world.now)),
            "kill-after-wait",
            world,
            "a container is called empty and lives",
        )
    }

    /// What the turn's step left, and whether a failure would be its inputs' fault.
    fn claimed(&mut self, claim: &Claim) {
        let known = self.incident.as_ref().map(|incident| &incident.failed_starts);
        self.blamed = match claim {
            Claim::Nothing { .. } => !self.attempt_lost,
            Claim::Ready { inputs } => {
                known.is_some_and(|known| known.contains(inputs))
                    || self.inputs.is_some_and(|(layer, _)| layer == Layer::InPlace)
            }
        };
        if let (Some((layer, _)), Claim::Ready { inputs }) = (self.inputs, claim) {
            self.claims.insert(layer, *inputs);
        }
    }

    fn failed(&mut self, layer: Layer) {
        let blamed = self.blamed;
        let asked = std::mem::take(&mut self.start_asked);
        let (inputs, start) = (self.inputs, self.start_inputs.take());
        if let Some(incident) = &mut self.incident {
            if let Some((known, inputs)) = inputs
                && known == layer
                && (asked || blamed)
            {
                incident.failed.insert((layer, inputs));
            }
            if let (true, Some(start)) = (asked, start) {
                incident.failed_starts.insert(start);
            }
        }
        if let Some(climb) = &mut self.climb {
            climb.done.push(layer);
        }
        self.blamed = false;
    }

    /// The node has truly served, before the eyes of one agent, for so long that no honest judge can have missed it.
    fn plainly_serves(&self, world: &World) -> bool {
        let (from, to) = world.served;
        world.serving() && to.saturating_sub(from.max(self.woke_ms)) >= 30_000
    }

    /// postponed-serves: what is told as damage of a node that serves is no outage.
    fn postponed(&self, world: &World) -> Check {
        let in_place = self.incident.as_ref().is_some_and(|incident| incident.kind == IncidentKind::Latent);
        let (_, to) = world.served;
        let serves = world.serving() || to.saturating_add(15_000) >= world.now;
        self.must(
            in_place || serves || self.lost,
            "postponed-serves",
            world,
            "a fallen node is told as one that serves",
        )
    }

    fn emergency(&mut self, world: &World, wait_ms: u64, evidence: u64) -> Check {
        self.counts.emergencies += 1;
        self.nothing_lives(world, "emergency")?;
        // The judge's own pace is not divided: under wrong probes a short climb may be over before it is sure.
        let hurried = self.divisor > 1 && world.faults.false_probe > 0;
        let deaf = self.climb.as_ref().is_none_or(|climb| climb.disturbed) || self.lost || hurried;
        self.must(
            deaf || !self.plainly_serves(world),
            "serving-is-no-emergency",
            world,
            "an emergency while the node serves",
        )?;
        let Some(climb) = self.climb.take() else { return Ok(()) };
        let now = self.active(world);
        let ran_ms = now.saturating_sub(climb.began_ms);
        // A layer that does not apply, or failed on these inputs, loses nothing when the last one that does ends with the climb's time.
        let absent = |layer| {
            self.ladder.as_ref().is_some_and(|ladder| match ladder.applies(layer) {
                Ok(rung) => {
                    self.incident.as_ref().is_some_and(|one| one.failed.contains(&(layer, rung.inputs)))
                }
                Err(_) => true,
            })
        };
        let all = Layer::CLIMB
            .into_iter()
            .all(|layer| climb.done.contains(&layer) || climb.intents.contains_key(&layer) || absent(layer));
        let climb_ms = self.of(CLIMB_MS);
        self.must(ran_ms <= climb_ms, "total-deadline", world, "emergency after the climb's 600 s")?;
        self.must(all || climb.disturbed, "every-turn", world, "emergency before every layer had its turn")?;
        if let Some(incident) = &mut self.incident {
            let key = AlertKey { incident: incident.id, kind: AlertKind::Emergency };
            if !incident.emergency {
                incident.emergency = true;
                self.emergency_due = Some((key, climb.began_ms + climb_ms));
            }
        }
        self.hold(world, wait_ms, evidence, false)
    }

    fn hold(&mut self, world: &World, wait_ms: u64, evidence: u64, serves: bool) -> Check {
        let now = world.now;
        let divisor = self.divisor.max(1);
        let Some(incident) = &mut self.incident else { return Ok(()) };
        incident.serves = false;
        incident.asked = false;
        let want_ms = match incident.scheduled {
            0 | 1 => 300_000,
            2 => 900_000,
            _ => 1_800_000,
        } / divisor;
        incident.held =
            Some(Held { since_ms: now, wait_ms, evidence, excused: false, degraded: false, serves });
        let vague = incident.vague || self.lost;
        let right = wait_ms.abs_diff(want_ms) <= want_ms / JITTER || vague;
        self.must(right, "retry-schedule", world, "the next climb is not planned for 5, 15 or 30 minutes")
    }

    /// recovered-is-true: nothing is called recovered that does not truly serve.
    fn truly_serves(&self, world: &World, whole: bool) -> Check {
        let (from, to) = world.served;
        let steady = to.saturating_add(15_000) >= world.now && to.saturating_sub(from) >= 2_000;
        self.must(steady, "recovered-is-true", world, "called recovered without having served")?;
        let damage = self.incident.as_ref().is_some_and(|incident| incident.kind != IncidentKind::Outage);
        let mended = world.broken.is_none() || world.broke_at.saturating_add(15_000) >= world.now;
        self.must(!damage || mended, "recovered-is-true", world, "called recovered with its damage")?;
        let released = world.degraded_until <= world.now || from.saturating_add(15_000) >= world.now;
        let released = released || !world.serving();
        self.must(!whole || released, "recovered-is-true", world, "closed before its channels were released")
    }

    fn close(&mut self, world: &World) -> Check {
        self.nothing_lives(world, "close")?;
        self.climb = None;
        self.opening_due = None;
        if let Some(incident) = self.incident.take() {
            self.closed.push((incident.id, incident.emergency));
        }
        Ok(())
    }

    /// Everything that was spawned was killed and proven empty, unless it would not die.
    fn nothing_lives(&self, world: &World, when: &str) -> Check {
        for step in self.steps.iter().filter(|step| !step.emptied) {
            self.must(
                step.stubborn,
                "kill-after-wait",
                world,
                &format!("{when} while a container was not killed"),
            )?;
        }
        Ok(())
    }

    /// Before a step is truly spawned.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn spawn(&mut self, world: &World, step: u64, layer: Layer) -> Check {
        self.counts.steps += 1;
        self.must(self.intents.contains(&step), "intent-first", world, "a step without its intent")?;
        self.must(!self.hands_off(), "hands-off", world, "a step while hands are off")?;
        let twin =
            world.containers.iter().any(|one| one.layer == layer && !one.foreign && one.lives(world.now));
        self.must(!twin, "one-container", world, "two containers of one layer")?;
        for known in self.steps.iter().filter(|known| known.step != step && !known.emptied) {
            self.must(
                known.stubborn,
                "kill-after-wait",
                world,
                "a step while the last container was not killed",
            )?;
        }
        // As the agent saw it when it decided: what happens in the millisecond after is nobody's fault.
        let starting = layer != Layer::InPlace && self.ladder.as_ref().is_some_and(Ladder::start_holds);
        self.must(!starting, "start-left-alone", world, "a start in progress is ended")?;
        self.not_serving(world, layer)
    }

    /// served-is-left: what was judged serving is neither restarted nor repaired under its feet.
    fn not_serving(&self, world: &World, layer: Layer) -> Check {
        let serves = self.incident.as_ref().is_some_and(|incident| incident.serves);
        self.must(
            !serves || layer == Layer::InPlace,
            "served-is-left",
            world,
            "a serving node is interrupted",
        )
    }

    /// After a kill; `proven`: its container is empty.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn kill(&mut self, world: &World, step: u64, proven: bool) -> Check {
        self.must(self.intents.contains(&step), "not-ours", world, "a kill of what is not ours")?;
        for known in self.steps.iter_mut().filter(|known| known.step == step) {
            known.emptied |= proven;
            known.stubborn |= !proven;
        }
        Ok(())
    }

    /// Before a start is truly asked for.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn start(&mut self, world: &World, start: u64, layer: Layer) -> Check {
        self.counts.starts += 1;
        let Some((inputs, _)) = self.start_intents.get(&start).copied() else {
            return Err(self.fail("intent-first", world.now, "a start without its intent"));
        };
        self.must(!self.hands_off(), "hands-off", world, "a start while hands are off")?;
        self.nothing_lives(world, "start")?;
        self.starts_at.retain(|at| at.saturating_add(300_000) > world.now);
        self.must(self.starts_at.len() < 3, "starts-in-300-s", world, "a fourth start inside 300 s")?;
        self.starts_at.push(world.now);
        let ready = self.claims.get(&layer) == Some(&inputs);
        self.must(ready, "start-needs-claim", world, "a start of a layer whose work left nothing to start")?;
        let repeated = self.incident.as_ref().is_some_and(|one| one.failed_starts.contains(&inputs));
        self.must(!repeated, "equal-starts", world, "a start repeats one that failed")?;
        self.must(layer != Layer::InPlace, "latent-in-place", world, "an in-place repair starts something")?;
        self.not_serving(world, layer)?;
        if let Some(climb) = &mut self.climb {
            let starts = climb.starts.entry(layer).or_default();
            *starts += 1;
            let most = if layer == Layer::Restore && climb.noticed { 2 } else { 1 };
            let too_many = *starts > most + climb.voids;
            self.must(!too_many, "one-start-per-layer", world, "a layer starts twice")?;
        }
        Ok(())
    }

    /// After a message was handed over.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn handed(&mut self, world: &World, key: AlertKey, result: &AlertResult) -> Check {
        self.must(self.alert_intents.contains(&key), "intent-first", world, "a message without its intent")?;
        match result {
            AlertResult::Accepted | AlertResult::Queued => {
                self.refused.remove(&key);
            }
            AlertResult::Refused { .. } => {
                self.refused.insert(key);
            }
        }
        Ok(())
    }

    /// When everything has settled: what must have been told was told, and nothing of others was touched.
    ///
    /// # Errors
    /// What is missing.
    pub fn end(&self, world: &World) -> Check {
        let foreign = world.containers.iter().any(|one| one.foreign);
        self.must(foreign, "not-ours", world, "another's container is gone")?;
        for (id, emergency) in &self.closed {
            let told = |kind| world.outbox.contains(&AlertKey { incident: *id, kind });
            self.must(told(AlertKind::Closing), "told-to-the-end", world, "a closing was never told")?;
            let right = told(AlertKind::Emergency) == *emergency || self.lost;
            self.must(right, "told-to-the-end", world, "an emergency was not told, or one that was none")?;
        }
        let alive = self.steps.iter().any(|step| !step.emptied && ours(world, step.step).is_some());
        self.must(!alive, "kill-after-wait", world, "something of ours lives on at the end")
    }

    /// The climb under way tries everything anew.
    #[must_use]
    pub fn full(&self) -> bool {
        self.climb.as_ref().is_some_and(|climb| climb.full)
    }
}

fn ours(world: &World, step: u64) -> Option<&Container> {
    world.containers.iter().find(|one| one.step == step && !one.foreign)
}
