//! One seed, one story: a schedule is drawn, lived through with its faults (safety), then the faults stop and
//! everything must settle (liveness).

use crate::agent::{Agent, Site, Stop};
use crate::brain::{Brain, Mutant};
use crate::check::{Checks, Counts, Violation};
use crate::prng::Prng;
use crate::world::{Broken, Faults, Gate, Inject, World};
use engine::{Layer, Limits, Record};

/// Turns of the loop that one schedule may take; more is a loop without an end.
const MAX_TURNS: u64 = 15_000;

/// Time in which everything must have settled once the faults are off: the longest retry, and two climbs.
const SETTLE_MS: u64 = 3 * 3_600_000;

/// How one seed ended.
#[derive(Debug)]
pub struct Told {
    /// What happened in it.
    pub counts: Counts,
    /// Fingerprint of everything that was done.
    pub fingerprint: u64,
    /// The first violation, if there was one.
    pub violation: Option<Violation>,
    /// Every record, when asked for.
    pub trace: Vec<String>,
    /// The journal as it lay on the disk at the end.
    pub journal: Vec<Record>,
}

/// By what the limits of this seed's host are divided: one in eight hosts is a drill's.
#[must_use]
pub fn divisor(seed: u64) -> u32 {
    match (seed % 16, seed / 16 % 4) {
        (7, _) => 10,
        (15, 0) => 2,
        (15, 1) => 3,
        (15, 2) => 7,
        (15, _) => 20,
        (_, _) => 1,
    }
}

/// Lives through one seed. For every fourth, it is lived through again with all exit codes turned round: nothing
/// may change (checker `exit-code-blind`).
#[must_use]
pub fn run(seed: u64, mutant: Option<Mutant>) -> Told {
    let mut told = live(seed, mutant, false, false);
    if seed.is_multiple_of(4) && told.violation.is_none() {
        let turned = live(seed, mutant, true, false);
        if turned.fingerprint != told.fingerprint {
            let what = "other exit codes, other deeds".to_owned();
            told.violation = Some(Violation { checker: "exit-code-blind", at_ms: 0, what });
        }
    }
    told
}

/// Lives through one seed once; `traced`: with every record told.
#[must_use]
pub fn live(seed: u64, mutant: Option<Mutant>, flip_codes: bool, traced: bool) -> Told {
    let mut rng = Prng::new(seed);
    let (faults, injections, horizon) = schedule(&mut rng);
    let mut world = World::new(rng, Faults { flip_codes, ..faults });
    for layer in [Layer::InPlace].into_iter().chain(Layer::CLIMB) {
        if world.rng.chance(if layer == Layer::Restart { 50 } else { 300 }) {
            world.absent.push(layer);
        }
    }
    if world.rng.chance(60) {
        // A host with nothing to mend from.
        world.absent.extend(Layer::CLIMB.into_iter().skip(1));
    }
    world.enabled = world.rng.chance(500);
    world.injections = injections;
    world.limits = Limits::divided(divisor(seed)).unwrap_or_default();
    let mut site = Site {
        world,
        journal: Vec::new(),
        volatile: Vec::new(),
        checks: Checks::new(divisor(seed)),
        brain: Brain::new(mutant),
        trace: traced.then(Vec::new),
    };
    let violation = story(&mut site, horizon).err();
    Told {
        counts: site.checks.counts,
        fingerprint: site.checks.trace,
        violation,
        trace: site.trace.unwrap_or_default(),
        journal: site.journal,
    }
}

fn story(site: &mut Site, horizon: u64) -> Result<(), Violation> {
    let mut agent: Option<Agent> = None;
    let mut turns = 0;
    // Phase 1: safety under faults.
    while site.world.now < horizon {
        turn(site, &mut agent, &mut turns)?;
    }
    // Phase 2: the faults are off; it must settle.
    calm(&mut site.world);
    let limit = site.world.now + SETTLE_MS;
    loop {
        turn(site, &mut agent, &mut turns)?;
        let world = &site.world;
        let whole =
            world.serving() && world.broken.is_none() && !world.containers.iter().any(|one| !one.foreign);
        if whole && agent.as_ref().is_some_and(Agent::settled) {
            break;
        }
        if world.now > limit {
            return Err(site.checks.fail("settles", world.now, "hours without a fault, and not settled"));
        }
    }
    site.checks.end(&site.world)
}

fn turn(site: &mut Site, agent: &mut Option<Agent>, turns: &mut u64) -> Result<(), Violation> {
    *turns += 1;
    if *turns > MAX_TURNS {
        return Err(site.checks.fail("settles", site.world.now, "the loop turns without an end"));
    }
    let mut one = match agent.take() {
        Some(one) => one,
        None => Agent::wake(site)?,
    };
    let before = site.world.now;
    match one.turn(site) {
        Ok(()) => {
            *agent = Some(one);
            if site.world.rebooted {
                *agent = None;
                after_reboot(site, before);
            }
            Ok(())
        }
        Err(Stop::Violation(violation)) => Err(violation),
        Err(Stop::Rebooted) => {
            after_reboot(site, before);
            Ok(())
        }
        Err(Stop::Died) => {
            let gap = if site.world.rng.chance(50) {
                site.world.rng.between(10_000, 90_000)
            } else {
                site.world.rng.between(100, 6_000)
            };
            let died = site.world.now;
            site.world.advance(died + gap);
            if site.world.rebooted {
                after_reboot(site, died);
            } else {
                site.checks.died(site.world.now - died);
            }
            Ok(())
        }
    }
}

fn after_reboot(site: &mut Site, before: u64) {
    site.world.rebooted = false;
    let lost = !site.volatile.is_empty();
    site.volatile.clear();
    let wake = site.world.rng.between(1_000, 20_000);
    site.world.advance(site.world.now + wake);
    // A second reboot within the first one's start-up is the same to the agent.
    site.world.rebooted = false;
    // The engine counts nothing between its last record and the first after the boot.
    let from = site.checks.last_ms.min(site.world.now).max(before.min(site.checks.last_ms));
    site.checks.rebooted(site.world.now - from, lost);
}

fn calm(world: &mut World) {
    world.faults = Faults { flip_codes: world.faults.flip_codes, ..Faults::default() };
    world.injections.clear();
    world.journal_bad = false;
    world.alert_bad = false;
    world.hands_off = false;
    world.asked = None;
    world.absent.clear();
    world.sources += 1;
    for container in world.containers.iter_mut().filter(|one| !one.foreign) {
        container.unkillable_until = 0;
    }
    if let Some(broken) = &mut world.broken {
        broken.fixers = [Layer::InPlace].into_iter().chain(Layer::CLIMB.into_iter().skip(1)).collect();
        broken.hidden = false;
    }
    // What never becomes ready was the fault's doing; it is seen as stalled and started anew.
    if let Gate::Starting { since, moves_until, .. } = world.gate
        && moves_until > world.now.max(since)
        && world.broken.is_none()
    {
        world.gate = Gate::Starting { since, ready_at: world.now + 10_000, dies_at: u64::MAX, moves_until };
    }
}

/// Swarm: most faults are off in most schedules, so that each is also met alone.
fn schedule(rng: &mut Prng) -> (Faults, Vec<(u64, Inject)>, u64) {
    let mut level = |of: &[u64]| if rng.chance(300) { rng.pick(of, 0) } else { 0 };
    let faults = Faults {
        agent_dies: level(&[2, 10, 40]),
        poison: None,
        reboot: level(&[1, 4]),
        hang: level(&[200, 600, 1000]),
        idle_work: level(&[200, 600, 1000]),
        lie: level(&[500, 1000]),
        orphan: level(&[300, 900]),
        no_spawn: level(&[100, 500, 1000]),
        unkillable: level(&[200, 700]),
        false_probe: level(&[50, 300]),
        no_start: level(&[300, 1000]),
        slow_start: level(&[300, 900]),
        stalled_start: level(&[300, 1000]),
        alert_refused: level(&[300, 900]),
        alert_slow: level(&[300, 1000]),
        degraded: level(&[500]),
        outer_start: level(&[500]),
        compact: level(&[20, 200]),
        flip_codes: false,
    };
    let poison = rng.chance(60).then(|| rng.pick(&Layer::CLIMB, Layer::Restart));
    let faults = Faults { poison, ..faults };
    let span = rng.pick(&[300_000, 1_800_000, 7_200_000], 600_000);
    let mut injections = Vec::new();
    for _ in 0..rng.between(1, 6) {
        let at = rng.between(1_000, span);
        let lasts = rng.between(1_000, 900_000);
        match rng.draw() % 17 {
            0..=2 => injections.push((at, Inject::KillGate)),
            3 | 4 => injections.push((at, Inject::HangGate)),
            5..=10 => {
                injections.push((at, breaks(rng)));
                if rng.chance(400) {
                    let helps = rng.pick(&Layer::CLIMB, Layer::Restore);
                    injections.push((at + lasts, Inject::Evidence(Some(helps))));
                }
            }
            11 => injections.push((at, Inject::Evidence(None))),
            12 => {
                injections.push((at, Inject::HandsOff(true)));
                injections.push((at + lasts, Inject::HandsOff(false)));
            }
            13 => {
                injections.push((at, Inject::JournalBad(true)));
                injections.push((at + lasts, Inject::JournalBad(false)));
            }
            14 => {
                injections.push((at, Inject::AlertBad(true)));
                injections.push((at + lasts, Inject::AlertBad(false)));
            }
            15 => {
                let layers =
                    [Layer::InPlace, Layer::Restart, Layer::Restore, Layer::Restore, Layer::SystemInstall];
                injections.push((at, Inject::Ask(rng.pick(&layers, Layer::Restore))));
            }
            _ => injections.push((at, Inject::Reboot)),
        }
    }
    if faults.outer_start > 0 {
        for _ in 0..rng.between(1, 5) {
            injections.push((rng.between(1_000, span), Inject::OuterStart));
        }
    }
    // Latest first: the next one is popped off the end.
    injections.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
    let horizon = span + rng.between(60_000, 2_400_000);
    (faults, injections, horizon)
}

fn breaks(rng: &mut Prng) -> Inject {
    let mut fixers: Vec<Layer> = Vec::new();
    for layer in [Layer::InPlace].into_iter().chain(Layer::CLIMB.into_iter().skip(1)) {
        if rng.chance(300) {
            fixers.push(layer);
        }
    }
    let interrupts = rng.chance(300);
    let broken = Broken { fixers, interrupts, mild: interrupts && rng.chance(300), hidden: rng.chance(250) };
    let falls = rng.chance(600);
    Inject::Break(broken, falls)
}
