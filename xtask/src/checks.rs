//! The parts that need nothing but the toolchain: format, lints, tidiness, unit tests, simulation.

use crate::needs::is_root;
use crate::run::{Show, Tally, run};
use crate::tidy;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// A cold build of everything on two slow cores, with room.
const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);
/// Two million schedules on two slow cores.
const SIM_LIMIT: Duration = Duration::from_secs(30 * 60);
/// Printing help.
const HELP_LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn cargo(root: &Path, args: &[&str]) -> Command {
    prepared(Command::new(env!("CARGO")), root, args)
}

/// The same for when nothing else wants the processor.
fn cargo_at_idle(root: &Path, args: &[&str]) -> Command {
    let mut c = Command::new("chrt");
    c.args(["--idle", "0", env!("CARGO")]);
    prepared(c, root, args)
}

fn prepared(mut c: Command, root: &Path, args: &[&str]) -> Command {
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

const CLIPPY: [&str; 7] = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];

/// What needs no build: format, tidiness.
pub(crate) fn looks(root: &Path, tally: &mut Tally) {
    tally.one("format", || run(&mut cargo(root, &["fmt", "--all", "--check"]), Show::Yes, BUILD_LIMIT).ok());
    tally.part("tidy", |tally| tidy::all(root, tally));
}

/// Lints and builds, at the lowest priority, what [`runs`] will want: it finds it done. What fails here says nothing and
/// fails there.
pub(crate) fn ahead(root: &Path) -> std::thread::JoinHandle<()> {
    let build = ["test", "--quiet", "--workspace", "--no-run"];
    let mut wanted = [&CLIPPY[..], &build].map(|args| cargo_at_idle(root, args));
    std::thread::spawn(move || {
        for command in &mut wanted {
            run(command.stderr(Stdio::null()), Show::No, BUILD_LIMIT);
        }
    })
}

/// Lints, unit tests, simulation.
pub(crate) fn runs(root: &Path, schedules: u64, tally: &mut Tally) {
    tally.one("clippy", || run(&mut cargo(root, &CLIPPY), Show::Yes, BUILD_LIMIT).ok());
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
    tally.part("unit and crash-image tests", |tally| {
        let ran = run(&mut cargo(root, &["test", "--workspace", "--no-fail-fast"]), Show::Yes, BUILD_LIMIT);
        let ok = ran.ok();
        let (passed, failed, binaries) = count(&ran.stdout);
        output = ran.stdout;
        let named = failures(&output);
        let died = failed.saturating_sub(named.len() as u64);
        tally.remember(named);
        tally.remember((died > 0).then(|| format!("{died} test binaries ended without a result")));
        // A build that failed has no line to be counted by.
        let unseen = (!ok && failed == 0) || binaries == 0;
        if unseen {
            println!("the run failed and no test did: {passed} tests in {binaries} binaries were counted");
        }
        (passed, failed + u64::from(unseen))
    });
    tally.part("crash images among them", |_| {
        let mut sum = (0, 0);
        for (what, sources) in IMAGES {
            // They are counted above; here only that each of the two had one that passed.
            let passed = images(&declared(&root.join(sources)), &output);
            passed.iter().for_each(|name| println!("{what}: {name}"));
            if passed.is_empty() {
                println!("{what}: no crash image below {sources} ran and passed");
            }
            sum = (sum.0 + u64::from(!passed.is_empty()), sum.1 + u64::from(passed.is_empty()));
        }
        sum
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

/// Passed, failed, and the number of test binaries, from cargo's output. A binary that died or was ended in the middle has
/// no result: what it had told by then counts, and its death is one failure.
fn count(output: &str) -> (u64, u64, u64) {
    let mut sum = (0, 0, 0);
    let mut open: Option<u64> = None;
    // What failed tests had printed comes before their binary's result, and may look like anything.
    let mut quoting = false;
    for line in output.lines() {
        quoting = line == "failures:" || quoting && !line.starts_with("test result: ");
        let begins = !quoting
            && line.strip_prefix("running ").is_some_and(|rest| rest.ends_with(" tests") || rest == "1 test");
        if let Some(told) = open.filter(|_| begins) {
            sum = (sum.0 + told, sum.1 + 1, sum.2 + 1);
        }
        if begins {
            open = Some(0);
        } else if line.starts_with("test result: ") {
            let number = |word: &str| {
                line.split([';', '.'])
                    .find_map(|p| p.trim().strip_suffix(word)?.trim().parse::<u64>().ok())
                    .unwrap_or(0)
            };
            sum = (sum.0 + number("passed"), sum.1 + number("failed"), sum.2 + 1);
            open = None;
        } else if let Some(told) = &mut open {
            *told += u64::from(passed(line).is_some());
        }
    }
    match open {
        Some(told) => (sum.0 + told, sum.1 + 1, sum.2 + 1),
        None => sum,
    }
}

/// The tests that failed, each with the beginning of what it had printed.
fn failures(output: &str) -> Vec<String> {
    const LINES: usize = 12;
    let mut found: Vec<String> = Vec::new();
    let mut left = 0;
    for line in output.lines() {
        let name = line.strip_prefix("---- ").and_then(|l| l.strip_suffix(" stdout ----"));
        if let Some(name) = name {
            found.push(name.to_owned());
            left = LINES;
        } else if line == "failures:" || line.starts_with("test result: ") {
            left = 0;
        } else if let Some(last) = found.last_mut().filter(|_| left > 0 && !line.is_empty()) {
            last.push_str("\n         ");
            last.push_str(line);
            left -= 1;
        }
    }
    found
}

/// The name of the test that this line says has passed.
fn passed(line: &str) -> Option<&str> {
    let (name, result) = line.strip_prefix("test ")?.split_once(" ... ")?;
    (result == "ok").then_some(name)
}

/// Where tests that cut a file at every sync must be, at least one each.
const IMAGES: [(&str, &str); 2] =
    [("host's journal", "crates/host/src/journal"), ("the store", "crates/store/tests")];

/// The functions of the sources below that are crash images by their names.
fn declared(dir: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
        let functions = text.lines().filter_map(|l| l.trim_start().strip_prefix("fn ")?.split_once('('));
        let image = |name: &&str| ["crash", "power_cut"].iter().any(|word| name.contains(word));
        names.extend(functions.map(|(name, _)| name).filter(image).map(str::to_owned));
    }
    names
}

/// Which of these functions ran as tests and passed.
fn images(declared: &[String], output: &str) -> Vec<String> {
    let ran = output.lines().filter_map(passed);
    ran.filter(|name| name.rsplit("::").next().is_some_and(|last| declared.iter().any(|d| d == last)))
        .map(str::to_owned)
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
        assert_eq!(count("error: could not compile"), (0, 0, 0));
    }

    #[test]
    fn what_a_binary_told_before_it_died_counts_and_so_does_its_death() {
        let died = "running 3 tests\ntest a ... ok\ntest b ... ok\ntest c ... \n";
        let whole = "running 1 test\ntest d ... ok\ntest result: ok. 1 passed; 0 failed; 0 ignored\n";
        assert_eq!(count(&format!("{died}{whole}")), (3, 1, 2));
        assert_eq!(count(&format!("{whole}{died}")), (3, 1, 2), "ended at its deadline");
        assert_eq!(count(&format!("{whole}{whole}")), (2, 0, 2));
        let quoted = "running 2 tests\ntest a ... ok\ntest b ... FAILED\n\nfailures:\n\nrunning 1 test\n\n\
            test result: FAILED. 1 passed; 1 failed; 0 ignored\n";
        assert_eq!(count(&format!("{quoted}{whole}")), (2, 1, 2), "a failed test's words are no binary");
    }

    #[test]
    fn what_failed_is_named_with_its_words() {
        let words: String = (0..20).map(|n| format!("line {n}\n")).collect();
        let output = format!(
            "running 3 tests\ntest a ... ok\ntest m::b ... FAILED\ntest c ... FAILED\n\nfailures:\n\n\
            ---- m::b stdout ----\n\nthread 'm::b' panicked at x.rs:1:\nleft: 1\n\n---- c stdout ----\n{words}\n\
            failures:\n    m::b\n    c\n\ntest result: FAILED. 1 passed; 2 failed\nafter\n"
        );
        let failed = failures(&output);
        assert_eq!(failed.len(), 2);
        assert_eq!(failed[0], "m::b\n         thread 'm::b' panicked at x.rs:1:\n         left: 1");
        assert!(failed[1].starts_with("c\n") && failed[1].ends_with("line 11"), "{}", failed[1]);
        assert!(failures("test a ... ok\n").is_empty());
    }

    #[test]
    fn each_place_needs_a_crash_image_that_passed() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let of = |n: usize| declared(&root.join(IMAGES[n].1));
        assert!(of(0).contains(&"power_cut_at_every_call".to_owned()), "{:?}", of(0));
        assert!(!of(1).is_empty());
        assert!(!of(1).contains(&"power_cut_at_every_call".to_owned()), "each its own");
        let ok = "test journal::tests::power_cut_at_every_call ... ok\n";
        assert_eq!(images(&of(0), ok), ["journal::tests::power_cut_at_every_call"]);
        assert!(images(&of(1), ok).is_empty(), "the journal's is none of the store's");
        assert!(images(&of(0), &ok.replace("ok", "FAILED")).is_empty());
        assert!(declared(&root.join("crates/none")).is_empty());
    }
}
