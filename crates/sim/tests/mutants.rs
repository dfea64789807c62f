//! The checkers are proven: every mutant is caught, and by a checker that watches just that.
//!
//! `docs/simulation.md` holds the same table; a test compares the two.
#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)] // Helpers of tests are tests too.

use sim::Mutant;
use std::collections::BTreeMap;

/// Seeds tried per mutant. The engine itself passes millions, so a violation is the mutant's.
const SEEDS: u64 = 2_000;

/// Violations looked at per mutant: the checker named in the table must be among them.
const ENOUGH: usize = 600;

fn table() -> Vec<(String, String)> {
    include_str!("../../../docs/simulation.md")
        .lines()
        .filter_map(|line| {
            let mut cells = line.trim_matches('|').split('|').map(str::trim);
            let mutant = cells.next()?.strip_prefix('`')?.strip_suffix('`')?;
            let checker = cells.nth(1)?.strip_prefix('`')?.strip_suffix('`')?;
            Mutant::named(mutant).map(|_| (mutant.to_owned(), checker.to_owned()))
        })
        .collect()
}

fn caught(mutant: Mutant, wanted: &str) -> (bool, BTreeMap<&'static str, usize>) {
    let mut by: BTreeMap<&'static str, usize> = BTreeMap::new();
    for seed in 1..=SEEDS {
        if let Some(violation) = sim::run(seed, Some(mutant)).violation {
            *by.entry(violation.checker).or_default() += 1;
            if violation.checker == wanted {
                return (true, by);
            }
            if by.values().sum::<usize>() >= ENOUGH {
                break;
            }
        }
    }
    (false, by)
}

#[test]
fn every_mutant_is_in_the_table_once() {
    let table = table();
    for mutant in Mutant::ALL {
        let rows = table.iter().filter(|(name, _)| *name == mutant.name()).count();
        assert_eq!(rows, 1, "docs/simulation.md must name {} once", mutant.name());
    }
}

#[test]
fn every_mutant_is_caught_by_the_checker_that_watches_it() {
    let rows = table();
    let (left, right) = rows.split_at(rows.len() / 2);
    let survivors = std::thread::scope(|scope| {
        let halves: Vec<_> = [left, right]
            .into_iter()
            .map(|rows| scope.spawn(move || rows.iter().filter_map(survives).collect::<Vec<_>>()))
            .collect();
        halves.into_iter().flat_map(|half| half.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(survivors.is_empty(), "a surviving mutant is a missing checker:\n{}", survivors.join("\n"));
}

fn survives((name, wanted): &(String, String)) -> Option<String> {
    let mutant = Mutant::named(name)?;
    let (found, by) = caught(mutant, wanted);
    (!found).then(|| format!("{name}: not caught by {wanted}; caught by {by:?}"))
}
