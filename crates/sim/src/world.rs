//! The simulated host: a gateway, a disk, containers, an outbox, a service manager and a clock.
//!
//! It knows the truth and does what it is told; it judges nothing. Faults are drawn from the schedule's own
//! stream, so that a seed tells the whole story.

use crate::prng::{Prng, mix};
use engine::{AlertKey, AlertResult, Layer, Limits, Moment};
use std::collections::BTreeSet;

/// Never.
pub const NEVER: u64 = u64::MAX;

/// A start without a sign of life for this long is stalled.
pub const STALLED_MS: u64 = 60_000;

/// A start with progress is judged for no longer than this.
pub const STARTING_MS: u64 = 900_000;

/// What may go wrong in this schedule, in permille per occasion. Chosen anew for every seed (swarm): a fault that
/// is off in most schedules is on alone in some.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// The agent dies before or after an effect.
    pub agent_dies: u64,
    /// Every spawn of this layer kills the agent afterwards.
    pub poison: Option<Layer>,
    /// The machine reboots before or after an effect.
    pub reboot: u64,
    /// A step hangs for ever.
    pub hang: u64,
    /// A step does nothing.
    pub idle_work: u64,
    /// A step's exit code is the opposite of what it did.
    pub lie: u64,
    /// A step leaves a grandchild that goes on writing.
    pub orphan: u64,
    /// A step cannot be spawned.
    pub no_spawn: u64,
    /// A container cannot be ended for a while.
    pub unkillable: u64,
    /// One probe is wrong.
    pub false_probe: u64,
    /// The service manager refuses a start.
    pub no_start: u64,
    /// A start takes minutes.
    pub slow_start: u64,
    /// A start stalls.
    pub stalled_start: u64,
    /// A message is refused by the channel and by the outbox.
    pub alert_refused: u64,
    /// A message takes its time.
    pub alert_slow: u64,
    /// Channels stay silent for a while after a start.
    pub degraded: u64,
    /// Somebody else starts the gateway.
    pub outer_start: u64,
    /// The journal is rewritten.
    pub compact: u64,
    /// All exit codes are turned round (for the comparison that shows that none is believed).
    pub flip_codes: bool,
}

/// The gateway process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gate {
    /// None.
    Down,
    /// Starting.
    Starting {
        /// Since when.
        since: u64,
        /// When it will be ready.
        ready_at: u64,
        /// When it will exit.
        dies_at: u64,
        /// Until when it shows progress.
        moves_until: u64,
    },
    /// Serving.
    Serving {
        /// Since when.
        since: u64,
    },
    /// Alive and deaf.
    Hung,
}

/// What is wrong on the disk.
#[derive(Debug, Clone)]
pub struct Broken {
    /// Layers whose work rights it.
    pub fixers: Vec<Layer>,
    /// A repair needs an interruption.
    pub interrupts: bool,
    /// A gateway that is started with it serves all the same.
    pub mild: bool,
    /// Not seen by the sweep (a layer 0 restart is tried, files seem intact).
    pub hidden: bool,
}

/// A step's container.
#[derive(Debug, Clone)]
pub struct Container {
    /// Its name.
    pub step: u64,
    /// Whose work.
    pub layer: Layer,
    /// Not ours at all.
    pub foreign: bool,
    /// When the work is done, if it gets there.
    pub effect_at: u64,
    /// When the main process exits.
    pub ends_at: u64,
    /// Its exit code.
    pub code: i32,
    /// When the orphaned grandchild damages the disk, if there is one.
    pub orphan_at: Option<u64>,
    /// Kills before this moment prove nothing.
    pub unkillable_until: u64,
}

impl Container {
    /// Whether anything lives in it.
    #[must_use]
    pub fn lives(&self, now: u64) -> bool {
        self.foreign || now < self.ends_at || self.orphan_at.is_some() || now < self.unkillable_until
    }
}

/// Something that happens to the host by itself.
#[derive(Debug, Clone)]
pub enum Inject {
    /// SIGKILL.
    KillGate,
    /// SIGSTOP, a spinning loop.
    HangGate,
    /// Damage on the disk; the gateway goes on or falls.
    Break(Broken, bool),
    /// A new snapshot, the registry back: sources change, and may now help.
    Evidence(Option<Layer>),
    /// Hands off, or on again.
    HandsOff(bool),
    /// The journal takes no records, or takes them again.
    JournalBad(bool),
    /// Messages are refused by all, or taken again.
    AlertBad(bool),
    /// Somebody starts the gateway if it is down.
    OuterStart,
    /// A person asks for one layer.
    Ask(Layer),
    /// The machine reboots.
    Reboot,
}

/// The host.
#[derive(Debug)]
pub struct World {
    /// True time, milliseconds.
    pub now: u64,
    /// Which boot.
    pub boot: u64,
    boot_at: u64,
    /// Chance.
    pub rng: Prng,
    /// What may go wrong.
    pub faults: Faults,
    /// Under which limits this host's koboshi is configured.
    pub limits: Limits,
    /// The gateway.
    pub gate: Gate,
    /// What is on the disk, as a hash.
    pub disk: u64,
    /// What is wrong on it.
    pub broken: Option<Broken>,
    /// When something broke last.
    pub broke_at: u64,
    /// Each layer's source: a version.
    pub sources: u64,
    /// Layers that do not apply in this schedule.
    pub absent: Vec<Layer>,
    /// Containers with something in them.
    pub containers: Vec<Container>,
    /// Work finished per step, for the claim: (step, something to start).
    pub finished: Vec<u64>,
    /// Channels are silent until then.
    pub degraded_until: u64,
    /// Messages that a channel or the outbox truly holds.
    pub outbox: BTreeSet<AlertKey>,
    /// Everything is refused.
    pub alert_bad: bool,
    /// The journal takes no records.
    pub journal_bad: bool,
    /// Nothing may be touched.
    pub hands_off: bool,
    /// A person asked for this layer and no climb has begun for it.
    pub asked: Option<Layer>,
    /// The machine rebooted since the agent last looked.
    pub rebooted: bool,
    /// Starts by others that the agent has not seen yet.
    pub outer_starts: u64,
    /// Serving, truly, from .. to (the last stretch).
    pub served: (u64, u64),
    /// A unit is enabled: the gateway comes up by itself after a boot.
    pub enabled: bool,
    /// What is still to come, latest first.
    pub injections: Vec<(u64, Inject)>,
    honest: u8,
}

impl World {
    /// A serving node on a fresh host.
    #[must_use]
    pub fn new(rng: Prng, faults: Faults) -> World {
        let foreign = Container {
            step: 9_000_000,
            layer: Layer::Restore,
            foreign: true,
            effect_at: NEVER,
            ends_at: NEVER,
            code: 0,
            orphan_at: None,
            unkillable_until: 0,
        };
        World {
            now: 0,
            boot: 1,
            boot_at: 0,
            rng,
            faults,
            limits: Limits::default(),
            gate: Gate::Serving { since: 0 },
            disk: 1,
            broken: None,
            broke_at: 0,
            sources: 1,
            absent: Vec::new(),
            containers: vec![foreign],
            finished: Vec::new(),
            degraded_until: 0,
            outbox: BTreeSet::new(),
            alert_bad: false,
            journal_bad: false,
            hands_off: false,
            asked: None,
            rebooted: false,
            outer_starts: 0,
            served: (0, 0),
            enabled: true,
            injections: Vec::new(),
            honest: 2,
        }
    }

    /// CLOCK_BOOTTIME.
    #[must_use]
    pub fn moment(&self) -> Moment {
        Moment { boot: self.boot, ms: self.now.saturating_sub(self.boot_at) }
    }

    /// True time of a moment of this boot; now for any other.
    #[must_use]
    pub fn at(&self, moment: Moment) -> u64 {
        if moment.boot == self.boot { self.boot_at.saturating_add(moment.ms) } else { self.now }
    }

    /// When something happens next by itself.
    #[must_use]
    pub fn next_event(&self) -> u64 {
        let gate = match self.gate {
            Gate::Starting { ready_at, dies_at, moves_until, since } => ready_at
                .min(dies_at)
                .min(moves_until.saturating_add(STALLED_MS))
                .min(since.saturating_add(STARTING_MS)),
            Gate::Serving { .. } if self.degraded_until > self.now => self.degraded_until,
            Gate::Down | Gate::Serving { .. } | Gate::Hung => NEVER,
        };
        let inject = self.injections.last().map_or(NEVER, |(at, _)| *at);
        let inside = self.containers.iter().map(Container::next_event).min().unwrap_or(NEVER);
        [gate, inject, inside].into_iter().filter(|at| *at > self.now).min().unwrap_or(NEVER)
    }

    /// Lets time pass; stops early when the machine reboots.
    pub fn advance(&mut self, to: u64) {
        loop {
            let event = self.next_event();
            let stop = event > to;
            let before = self.now;
            self.now = if stop { to.max(self.now) } else { event };
            if let Gate::Serving { since } = self.gate {
                self.served = (since, self.now);
            }
            if stop {
                return;
            }
            debug_assert!(self.now > before);
            self.happen();
            if self.rebooted {
                return;
            }
        }
    }

    fn happen(&mut self) {
        let now = self.now;
        if let Gate::Starting { ready_at, dies_at, .. } = self.gate {
            if dies_at <= now {
                self.gate = Gate::Down;
            } else if ready_at <= now {
                self.gate = Gate::Serving { since: now };
            }
        }
        for index in 0..self.containers.len() {
            let Some(container) = self.containers.get_mut(index) else { continue };
            let (step, layer) = (container.step, container.layer);
            let worked = container.effect_at <= now;
            if worked {
                container.effect_at = NEVER;
            }
            let spoiled = container.orphan_at.is_some_and(|at| at <= now);
            if spoiled {
                container.orphan_at = Some(NEVER);
            }
            if worked {
                self.work_done(step, layer);
            }
            if spoiled {
                let fixers = vec![Layer::Restore, Layer::SystemInstall, Layer::UserInstall, Layer::PeerCopy];
                self.broken = Some(Broken { fixers, interrupts: true, mild: false, hidden: false });
                self.broke_at = now;
                self.disk = mix(self.disk ^ 0xDEAD);
                self.gate = Gate::Down;
            }
        }
        while self.injections.last().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, inject)) = self.injections.pop() {
                self.inject(inject);
            }
        }
    }

    fn work_done(&mut self, step: u64, layer: Layer) {
        self.finished.push(step);
        if self.broken.as_ref().is_some_and(|broken| broken.fixers.contains(&layer)) {
            self.broken = None;
        }
        self.disk = match layer {
            Layer::Restart | Layer::InPlace | Layer::Emergency => self.disk,
            // The same version, wherever it comes from.
            Layer::SystemInstall | Layer::UserInstall => mix(self.sources ^ 0x22),
            Layer::Restore => mix(self.sources ^ 0x11),
            Layer::PeerCopy => mix(self.sources ^ 0x33),
        };
    }

    fn inject(&mut self, inject: Inject) {
        match inject {
            Inject::KillGate => self.gate = Gate::Down,
            Inject::HangGate => {
                if self.gate != Gate::Down {
                    self.gate = Gate::Hung;
                }
            }
            Inject::Break(broken, falls) => {
                self.broken = Some(broken);
                self.broke_at = self.now;
                self.disk = mix(self.disk ^ self.now);
                if falls {
                    self.gate = Gate::Down;
                }
            }
            Inject::Evidence(helps) => {
                self.sources = mix(self.sources);
                if let (Some(broken), Some(layer)) = (&mut self.broken, helps) {
                    broken.fixers.push(layer);
                    self.absent.retain(|absent| *absent != layer);
                }
            }
            Inject::HandsOff(off) => self.hands_off = off,
            Inject::JournalBad(bad) => self.journal_bad = bad,
            Inject::AlertBad(bad) => self.alert_bad = bad,
            Inject::OuterStart => {
                if self.gate == Gate::Down {
                    self.outer_starts += 1;
                    self.start();
                }
            }
            Inject::Ask(layer) => self.asked = Some(layer),
            Inject::Reboot => self.reboot(),
        }
    }

    /// The machine goes down and comes up again: nothing that ran is left.
    pub fn reboot(&mut self) {
        self.rebooted = true;
        self.containers.retain(|container| container.foreign);
        self.asked = None;
        self.gate = Gate::Down;
        let gap = self.rng.between(15_000, 120_000);
        self.now += gap;
        self.boot += 1;
        self.boot_at = self.now;
        if self.enabled {
            self.outer_starts += 1;
            self.start();
        }
    }

    /// Spawns a step. Work of the climb's layers stops the gateway first.
    ///
    /// # Errors
    /// When no process can be made.
    pub fn spawn(&mut self, step: u64, layer: Layer, rung_most: u64) -> Result<(), String> {
        if self.rng.chance(self.faults.no_spawn) {
            return Err("no process could be made".to_owned());
        }
        if layer != Layer::InPlace {
            self.gate = Gate::Down;
        }
        let takes = self.rng.between(200, rung_most * 11 / 10);
        let hangs = self.rng.chance(self.faults.hang);
        let idle = self.rng.chance(self.faults.idle_work);
        let lies = self.rng.chance(self.faults.lie) ^ self.faults.flip_codes;
        let orphan = self.rng.chance(self.faults.orphan);
        let done = self.now + takes;
        let orphan_at = orphan.then(|| done.saturating_add(self.rng.between(100, 90_000)));
        let unkillable = self.rng.chance(self.faults.unkillable);
        let unkillable_until = if unkillable { done + self.rng.between(1_000, 400_000) } else { 0 };
        self.containers.push(Container {
            step,
            layer,
            foreign: false,
            effect_at: if idle || (hangs && step.is_multiple_of(2)) { NEVER } else { done },
            ends_at: if hangs { NEVER } else { done + 1 },
            code: i32::from(idle ^ lies),
            orphan_at,
            unkillable_until,
        });
        Ok(())
    }

    /// Kills a container by its name; `Ok` with the number of processes killed once it is proven empty.
    ///
    /// # Errors
    /// When it would not die.
    pub fn kill(&mut self, step: u64) -> Result<u32, String> {
        let now = self.now;
        let Some(container) = self.containers.iter().find(|container| container.step == step) else {
            return Ok(0);
        };
        if container.unkillable_until > now {
            return Err("a process sits in the kernel".to_owned());
        }
        let killed = u32::from(container.lives(now));
        self.containers.retain(|container| container.step != step);
        Ok(killed)
    }

    /// Starts the gateway; nothing happens when one is there.
    pub fn start(&mut self) {
        if self.gate != Gate::Down {
            return;
        }
        let now = self.now;
        let stalls = self.rng.chance(self.faults.stalled_start);
        let slow = self.rng.chance(self.faults.slow_start);
        let takes = if slow { self.rng.between(60_000, 700_000) } else { self.rng.between(3_000, 40_000) };
        if self.rng.chance(self.faults.degraded) {
            self.degraded_until = now + takes + self.rng.between(1_000, 300_000);
        }
        self.gate = if self.broken.as_ref().is_some_and(|broken| !broken.mild) {
            let dies_at = if stalls { NEVER } else { now + takes.min(40_000) };
            Gate::Starting { since: now, ready_at: NEVER, dies_at, moves_until: now + takes.min(40_000) }
        } else if stalls {
            Gate::Starting { since: now, ready_at: NEVER, dies_at: NEVER, moves_until: now + takes / 2 }
        } else {
            Gate::Starting { since: now, ready_at: now + takes, dies_at: NEVER, moves_until: NEVER }
        };
    }

    /// One probe: whether it seems to serve. Sometimes wrong, but never
    /// twice within three.
    pub fn probe(&mut self) -> bool {
        let truth = self.serving();
        if self.honest >= 2 && self.rng.chance(self.faults.false_probe) {
            self.honest = 0;
            return !truth;
        }
        self.honest = self.honest.saturating_add(1);
        truth
    }

    /// Whether it truly serves.
    #[must_use]
    pub fn serving(&self) -> bool {
        matches!(self.gate, Gate::Serving { .. })
    }

    /// Whether a start truly progresses.
    #[must_use]
    pub fn progressing(&self) -> bool {
        match self.gate {
            Gate::Starting { since, moves_until, .. } => {
                self.now < moves_until.saturating_add(STALLED_MS) && self.now < since + STARTING_MS
            }
            Gate::Down | Gate::Serving { .. } | Gate::Hung => false,
        }
    }

    /// Whether the files seem whole to a look at them.
    #[must_use]
    pub fn intact(&self) -> bool {
        self.broken.as_ref().is_none_or(|broken| broken.hidden)
    }

    /// Hands a message over.
    pub fn hand_over(&mut self, key: AlertKey) -> AlertResult {
        if self.rng.chance(self.faults.alert_slow) {
            let takes = self.rng.between(100, self.limits.of(engine::ALERT_ACT_MS) - 1);
            self.advance(self.now + takes);
        }
        if self.alert_bad || self.rng.chance(self.faults.alert_refused) {
            return AlertResult::Refused { why: "no channel, no room in the outbox".to_owned() };
        }
        self.outbox.insert(key);
        if self.rng.chance(500) { AlertResult::Accepted } else { AlertResult::Queued }
    }
}

impl Container {
    fn next_event(&self) -> u64 {
        let exit = if self.ends_at == NEVER { NEVER } else { self.ends_at };
        self.effect_at.min(exit).min(self.orphan_at.unwrap_or(NEVER))
    }
}
