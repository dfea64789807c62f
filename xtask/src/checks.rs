//! The parts that need nothing but the toolchain: format, lints, tidiness, unit tests, simulation.

use crate::needs::is_root;
use crate::run::{Show, Tally, run};
use crate::tidy;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// A cold build of everything on two slow cores, with room.
const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);
/// Two million schedules on two slow cores.
const SIM_LIMIT: Duration = Duration::from_secs(30 * 60);
/// Printing help.
const HELP_LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn cargo(root: &Path, args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO"));
    c.current_dir(root).args(args);
    // What `cargo run` told this program about itself. Build scripts that watch these (ring's does) would be run again,
    // and minutes of what depends on them, whenever a build by hand follows one of ours.
    for (key, _) in std::env::vars_os() {
        let name = key.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            c.env_remove(&key);
        }
    }
    c
}

/// Format, clippy, tidy, unit tests, simulation.
pub(crate) fn quick(root: &Path, schedules: u64, tally: &mut Tally) {
    tally.one("format", || run(&mut cargo(root, &["fmt", "--all", "--check"]), Show::Yes, BUILD_LIMIT).ok());
    tally.part("tidy", |_| tidy::all(root));
    tally.one("clippy", || {
        let args = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
        run(&mut cargo(root, &args), Show::Yes, BUILD_LIMIT).ok()
    });
    unit(root, tally);
    tally.one("simulation", || {
        let (count, first) = (schedules.to_string(), "1");
        let args =
            ["run", "--quiet", "--release", "--package", "sim", "--bin", "sim", "--", count.as_str(), first];
        run(&mut cargo(root, &args), Show::Yes, SIM_LIMIT).ok()
    });
}

/// All tests of the workspace, once; the crash images and the root-only ones are among them and are named.
fn unit(root: &Path, tally: &mut Tally) {
    let mut output = String::new();
    tally.part("unit and crash-image tests", |_| {
        let ran = run(&mut cargo(root, &["test", "--workspace", "--no-fail-fast"]), Show::Yes, BUILD_LIMIT);
        let ok = ran.ok();
        let (passed, failed, binaries) = count(&ran.stdout);
        output = ran.stdout;
        // A build that failed, or a test binary that died, has no line to be counted by.
        let unseen = (!ok && failed == 0) || binaries == 0;
        (passed, failed + u64::from(unseen))
    });
    let images = named(&output, &["crash", "every_sync", "power_cut"]);
    tally.part("crash images among them", |_| {
        images.iter().for_each(|name| println!("{name}"));
        // They are counted above; here only that the journal's and the store's exist at all.
        if images.is_empty() { (0, 1) } else { (0, 0) }
    });
    for (what, why) in untried() {
        tally.skip(what, why);
    }
}

/// Tests that pass without having tried anything on a machine like this one.
fn untried() -> Vec<(&'static str, &'static str)> {
    let mut out = Vec::new();
    if !is_root() {
        out.push(("root-only tests", "not root: mounts, cgroups and other users' processes were not tried"));
    }
    if !Path::new("/run/systemd/system").exists() {
        out.push(("the systemd manager against a real systemd", "systemd does not run here"));
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if !mounts.contains(" - cgroup2 ") {
        out.push(("containers by cgroup", "no cgroup v2 is mounted here: only the weaker way was tried"));
    }
    out
}

/// Passed, failed, and the number of test binaries that told, from cargo's output.
fn count(output: &str) -> (u64, u64, u64) {
    let mut sum = (0, 0, 0);
    for line in output.lines().filter(|l| l.starts_with("test result: ")) {
        let number = |word: &str| {
            line.split([';', '.'])
                .find_map(|p| p.trim().strip_suffix(word)?.trim().parse::<u64>().ok())
                .unwrap_or(0)
        };
        sum = (sum.0 + number("passed"), sum.1 + number("failed"), sum.2 + 1);
    }
    sum
}

/// Names of tests that ran and contain one of the words.
fn named(output: &str, words: &[&str]) -> Vec<String> {
    output
        .lines()
        .filter_map(|l| l.strip_prefix("test ")?.split_once(" ... ").map(|(name, _)| name.to_owned()))
        .filter(|name| words.iter().any(|w| name.contains(w)))
        .collect()
}

/// Builds the binary and checks that the documentation speaks of each command. Whether there is a binary.
pub(crate) fn cli_is_documented(root: &Path, build: &[&str], binary: &str, tally: &mut Tally) -> bool {
    let built = tally.one("build", || run(&mut cargo(root, build), Show::Yes, BUILD_LIMIT).ok());
    if built {
        tally.part("every command is documented", |_| {
            let help = run(Command::new(root.join(binary)).arg("--help"), Show::No, HELP_LIMIT);
            tidy::commands(root, &help.stdout)
        });
    }
    built
}

/// The binary that real hosts and the real program are tested with.
pub(crate) fn build_release(root: &Path, tally: &mut Tally) -> bool {
    tally.one("build", || run(&mut cargo(root, &["build", "--release"]), Show::Yes, BUILD_LIMIT).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_all_binaries_are_summed() {
        let output = "running 3 tests\ntest a::crash_at_every_sync ... ok\ntest b ... FAILED\n\
            test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s\n\
            test result: ok. 40 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s\n";
        assert_eq!(count(output), (42, 1, 2));
        assert_eq!(named(output, &["crash"]), ["a::crash_at_every_sync"]);
        assert_eq!(count("error: could not compile"), (0, 0, 0));
    }
}
