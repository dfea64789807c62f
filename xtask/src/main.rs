//! Builds, tests and measures: the only place that installs anything, and the only one that may run the others.
//!
//! Three speeds: `check` while writing, `test` before a push (it is what CI runs), `test --full` with every limit as
//! it is in life. Every part is run once, tells its minutes, and is counted; what could not run is named with its
//! reason. The last line stands alone: `N passed, N failed`; the exit code is 0 only when nothing failed.

// It runs cargo, apt-get and our own binary for a developer who watches, and ends them itself: see `run`.
#![allow(clippy::disallowed_methods, clippy::print_stdout, clippy::print_stderr)]

mod bench;
mod checks;
mod demo;
mod field;
mod lab;
mod needs;
mod proc;
mod run;
mod tidy;

use run::Tally;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "\
cargo xtask check                  format, clippy, tidy, unit tests, 20,000 simulated schedules
cargo xtask tidy                   only what needs no build: paths, leftovers, order of crates, module headers
cargo xtask test [--full]          what CI runs: check, crash images, root-only tests, the demo on the real program
cargo xtask field [NAME]...        only the field tests: agents, owner's will, strangers, beside one real node (root)
cargo xtask lab [--list] [--keep] [--built] [SCENARIO]...
                                   real hosts with systemd, sudo and sshd, the real program in them (root)
cargo xtask bench agent [--minutes 30] [--memory-mb N]
                                   the agent at rest: memory, processor, I/O, start; in N MB with the page cache dropped
cargo xtask bench recovery [--rounds 5] [--nodes 3] [--fault NAME]... [--json] [--from FILE]
                                   each fault beside a bare cold start, in interleaved pairs; --from: of an earlier run
";

/// Simulated schedules: enough that each known mutant of the engine is caught, within seconds.
const SCHEDULES: u64 = 20_000;
/// The same for `test --full`.
const SCHEDULES_FULL: u64 = 2_000_000;

fn main() -> ExitCode {
    if lab::escape::wanted() {
        return lab::escape::run();
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    // The usage of a tool is what it answers to no order; asked for it is a success.
    let usage = |code| {
        eprint!("{USAGE}");
        ExitCode::from(code)
    };
    match words.as_slice() {
        ["check"] => check(),
        ["tidy"] => {
            let mut tally = Tally::new();
            tally.part("tidy", |tally| tidy::all(&root(), tally));
            tally.close()
        }
        ["test"] => test(false),
        ["test", "--full"] => test(true),
        ["field", only @ ..] => field::alone(&root(), only),
        // What the field tests bring along as somebody else's process.
        ["stranger"] => done(field::stranger(None)),
        ["stranger", port] => done(port.parse().is_ok_and(|port| field::stranger(Some(port)))),
        ["lab", words @ ..] => lab::alone(&root(), words),
        // The same program inside the lab's cage.
        ["lab-inside", words @ ..] => lab::inside(words),
        ["bench", "agent", rest @ ..] => match rest_options(rest) {
            Some(options) => bench::agent(&root(), &options),
            None => usage(2),
        },
        ["bench", "recovery", rest @ ..] => match recovery_options(rest) {
            Some(options) => bench::recovery(&root(), &options),
            None => usage(2),
        },
        ["help" | "--help" | "-h"] => usage(0),
        _ => usage(2),
    }
}

fn done(well: bool) -> ExitCode {
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The repository: where this crate was built from.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), Path::to_owned)
}

fn rest_options(mut args: &[&str]) -> Option<bench::Rest> {
    let mut options = bench::Rest::default();
    while let [key, after @ ..] = args {
        args = match (*key, after) {
            ("--minutes", [n, after @ ..]) => {
                options.minutes = positive(n)?;
                after
            }
            ("--memory-mb", [n, after @ ..]) => {
                options.memory_mb = Some(positive(n)?);
                after
            }
            _ => return None,
        };
    }
    Some(options)
}

fn recovery_options(mut args: &[&str]) -> Option<bench::Recovery> {
    let mut options = bench::Recovery::default();
    while let [key, after @ ..] = args {
        args = match (*key, after) {
            ("--rounds", [n, after @ ..]) => {
                options.rounds = positive(n)?;
                after
            }
            ("--nodes", [n, after @ ..]) => {
                options.nodes = positive(n)?;
                after
            }
            ("--fault", [name, after @ ..]) => {
                options.faults.push((*name).to_owned());
                after
            }
            ("--from", [file, after @ ..]) => {
                options.from = Some(PathBuf::from(file));
                after
            }
            ("--json", after) => {
                options.json = true;
                after
            }
            _ => return None,
        };
    }
    Some(options)
}

fn positive(text: &str) -> Option<u64> {
    text.parse().ok().filter(|n| *n > 0)
}

fn check() -> ExitCode {
    let root = root();
    let mut tally = Tally::new();
    needs::ensure(&mut tally);
    checks::looks(&root, &mut tally);
    checks::runs(&root, SCHEDULES, &mut tally);
    checks::cli_is_documented(
        &root,
        &["build", "--quiet", "--package", "koboshi"],
        "target/debug/koboshi",
        &mut tally,
    );
    tally.close()
}

fn test(full: bool) -> ExitCode {
    let root = root();
    let mut tally = Tally::new();
    needs::ensure(&mut tally);
    checks::looks(&root, &mut tally);
    let built =
        checks::cli_is_documented(&root, &["build", "--release"], "target/release/koboshi", &mut tally);
    if built {
        // The demo waits most of its time: OpenClaw bears three starts in 300 s.
        let ahead = checks::ahead(&root);
        demo::run_rounds(&root, if full { 5 } else { 1 }, &mut tally);
        let _ = ahead.join();
    }
    checks::runs(&root, if full { SCHEDULES_FULL } else { SCHEDULES }, &mut tally);
    if built {
        field::run(&root, if full { &[] } else { field::IN_CI }, &mut tally);
        lab::run(&root, if full { lab::Set::Full } else { lab::Set::Ci }, &mut tally);
    } else {
        tally.skip("demo", "there is no release binary to run it with");
        tally.skip("field", "there is no release binary to run it with");
        tally.skip("lab", "there is no release binary to run it with");
    }
    tally.close()
}
