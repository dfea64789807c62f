//! Live and replay are one: the journals of simulated lives are folded again from their JSON, cut at every record,
//! and rewritten at every record.
#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)] // Helpers of tests are tests too.

use engine::{Record, State};

/// Journals looked through; each is folded once per record, so this is quadratic.
const SEEDS: u64 = 120;

#[test]
fn every_prefix_folds_and_every_checkpoint_carries_on() {
    let mut records = 0;
    for seed in 1..=SEEDS {
        let journal = sim::live(seed, None, false, false).journal;
        let lines: Vec<String> =
            journal.iter().map(|record| serde_json::to_string(record).unwrap()).collect();
        let read: Vec<Record> = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(read, journal, "seed {seed}: a record changes on its way through JSON");

        let whole =
            State::replay(&journal).unwrap_or_else(|(at, why)| panic!("seed {seed}, record {at}: {why}"));
        let mut live = State::default();
        for (at, record) in read.iter().enumerate() {
            engine::apply(&mut live, record).unwrap_or_else(|why| panic!("seed {seed}, record {at}: {why}"));
            let small = live.checkpoint(record.at);
            let tail = read.get(at + 1..).unwrap();
            let again = State::replay(std::iter::once(&small).chain(tail)).unwrap_or_else(|(tail, why)| {
                panic!("seed {seed}, {tail} after a checkpoint at {at}: {why}")
            });
            assert_eq!(again, whole, "seed {seed}: a checkpoint at {at} forgets something");
            records += 1;
        }
        assert_eq!(live, whole, "seed {seed}");
        let json = serde_json::to_string(&whole).unwrap();
        assert_eq!(
            serde_json::from_str::<State>(&json).unwrap(),
            whole,
            "seed {seed}: the state changes in JSON"
        );
    }
    assert!(records > 2_000, "only {records} records were looked at: the schedules do too little");
}

#[test]
fn a_seed_tells_the_same_story_twice() {
    for seed in 1..=40 {
        let (one, two) = (sim::live(seed, None, false, true), sim::live(seed, None, false, true));
        assert_eq!(one.trace, two.trace, "seed {seed}");
        assert_eq!(one.fingerprint, two.fingerprint, "seed {seed}");
    }
}

#[test]
fn the_engine_passes_and_the_schedules_reach_everything() {
    let mut all = sim::Counts::default();
    for seed in 1..=2_000 {
        let told = sim::run(seed, None);
        assert_eq!(told.violation, None, "seed {seed}");
        all.add(&told.counts);
    }
    let least = [
        ("incidents", all.incidents, 2_000),
        ("climbs", all.climbs, 2_000),
        ("steps", all.steps, 2_000),
        ("starts", all.starts, 1_500),
        ("emergencies", all.emergencies, 300),
        ("recoveries", all.recoveries, 1_000),
        ("deaths", all.deaths, 500),
        ("reboots", all.reboots, 200),
    ];
    for (what, seen, least) in least {
        assert!(seen >= least, "only {seen} {what} in 2,000 schedules: they prove too little");
    }
}

#[test]
fn every_incident_is_told() {
    for seed in 1..=200 {
        let journal = sim::live(seed, None, false, false).journal;
        for told in engine::summary::tell(&journal) {
            let ended = told.outcome.is_some();
            assert!(ended, "seed {seed}: incident {} has no end in its telling", told.id);
            assert!(told.lines.iter().all(|line| !line.what.is_empty()), "seed {seed}");
        }
    }
}
