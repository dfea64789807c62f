//! The figures of `docs/benchmarks.md`, measured on the real program and printed as markdown, with the machine, the day
//! and the load they were measured at.

mod agent;
mod recovery;

pub(crate) use agent::{Rest, agent};
pub(crate) use recovery::{Recovery, recovery};

use crate::checks::cargo;
use crate::run::{Show, run};
use std::path::Path;
use std::time::Duration;

const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);

fn build(root: &Path) -> bool {
    // What cargo says goes to standard error; its output has nothing to say.
    run(&mut cargo(root, &["build", "--release"]), Show::No, BUILD_LIMIT).ok()
}

/// One line on where the figures were taken.
fn machine() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        cpu.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ")).map_or("", |(_, m)| m);
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kb: f64 = memory.split_ascii_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0.0);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split_ascii_whitespace().next().unwrap_or("?");
    format!("{}: {cores} cores {model}, {:.1} GB, Linux {}, load {load}", today(), kb / 1e6, kernel.trim())
}

/// `2026-11-25 22:14 UTC`.
fn today() -> String {
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
    // Days to a civil date: Howard Hinnant's algorithm, years from March so that the leap day comes last.
    let (days, minute) = (now / 86_400 + 719_468, now % 86_400 / 60);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", minute / 60, minute % 60)
}

/// NaN of nothing, so that a missing figure is seen.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.get(middle), sorted.len() % 2, middle.checked_sub(1).and_then(|i| sorted.get(i))) {
        (Some(upper), 0, Some(lower)) => f64::midpoint(*lower, *upper),
        (Some(one), _, _) => *one,
        (None, _, _) => f64::NAN,
    }
}

fn spread(values: &[f64]) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if values.is_empty() { "none".to_owned() } else { format!("{least:.0} to {most:.0}") }
}

fn yes(b: bool) -> &'static str {
    if b { "yes" } else { "NO" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
        assert_eq!(spread(&[2.0, 1.0]), "1 to 2");
    }
}
