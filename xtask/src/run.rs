//! Running a part: its output is shown as it comes and kept for counting, its minutes are told, and at its deadline
//! it is ended with everything it started.

use crate::proc;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Output kept for counting; the rest is shown only. A full test run prints well under 1 MB.
const KEPT_LIMIT_BYTES: usize = 16 << 20;
/// How long a part may take to end by itself after SIGTERM, before SIGKILL.
const GRACE: Duration = Duration::from_secs(20);
/// How long what an ended child has written is still read, when something holds its output open.
const DRAIN: Duration = Duration::from_secs(3);
/// How often an ended child and a passed deadline are looked for.
const POLL: Duration = Duration::from_millis(20);

/// What a run came to.
pub(crate) struct Ran {
    /// `None` when it could not be started or was ended at its deadline.
    pub(crate) status: Option<ExitStatus>,
    /// Standard output, cut at a limit.
    pub(crate) stdout: String,
}

impl Ran {
    pub(crate) fn ok(&self) -> bool {
        self.status.is_some_and(|s| s.success())
    }
}

/// Whether a command's standard output is shown besides being kept.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Show {
    Yes,
    No,
}

/// Runs a command to its end or its deadline. Standard error goes straight through.
pub(crate) fn run(command: &mut Command, show: Show, limit: Duration) -> Ran {
    let started = Instant::now();
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(e) => {
            println!("cannot start {}: {e}", command.get_program().display());
            return Ran { status: None, stdout: String::new() };
        }
    };
    let (tx, rx) = mpsc::channel();
    if let Some(pipe) = child.stdout.take() {
        std::thread::spawn(move || read(pipe, show, &tx));
    }
    let status = wait(&mut child, started + limit, limit);
    // Something that outlived the child may hold the pipe open, and write to it, for ever.
    let until = Instant::now() + DRAIN;
    let mut stdout = String::new();
    while let Ok(line) = rx.recv_timeout(until.saturating_duration_since(Instant::now())) {
        if stdout.len() + line.len() <= KEPT_LIMIT_BYTES {
            stdout.push_str(&line);
        }
    }
    Ran { status, stdout }
}

fn read(pipe: impl Read, show: Show, tx: &mpsc::Sender<String>) {
    let mut reader = BufReader::new(pipe);
    let mut line = Vec::new();
    while let Ok(1..) = reader.read_until(b'\n', &mut line) {
        let text = String::from_utf8_lossy(&line).into_owned();
        if show == Show::Yes {
            print!("{text}");
        }
        if tx.send(text).is_err() {
            return;
        }
        line.clear();
    }
}

/// Waits; at the deadline ends the child and all its descendants, first kindly.
fn wait(child: &mut Child, deadline: Instant, limit: Duration) -> Option<ExitStatus> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(POLL),
            Ok(None) => break,
            Err(e) => {
                println!("cannot wait for process {}: {e}", child.id());
                return None;
            }
        }
    }
    println!("still running after {:.0} minutes: it is ended", limit.as_secs_f64() / 60.0);
    end(child);
    None
}

/// Ends a child of ours and its descendants.
pub(crate) fn end(child: &mut Child) {
    let family = proc::family(child.id());
    proc::signal(&[child.id()], rustix::process::Signal::TERM);
    let until = Instant::now() + GRACE;
    while Instant::now() < until {
        if matches!(child.try_wait(), Ok(Some(_))) {
            break;
        }
        std::thread::sleep(POLL);
    }
    // Our child is not yet reaped or was just now; its descendants are told from later owners of their pids by
    // their start time.
    let _ = child.kill();
    let _ = child.wait();
    proc::kill_same(&family);
}

/// A line of the tally.
struct Part {
    name: String,
    passed: u64,
    failed: u64,
    took: Duration,
}

/// Counts what passed and failed, and what was left out.
pub(crate) struct Tally {
    started: Instant,
    parts: Vec<Part>,
    skipped: Vec<(String, String)>,
    failures: Vec<String>,
}

impl Tally {
    pub(crate) fn new() -> Tally {
        Tally { started: Instant::now(), parts: Vec::new(), skipped: Vec::new(), failures: Vec::new() }
    }

    /// Runs a part that counts for itself: passed and failed.
    pub(crate) fn part(&mut self, name: &str, run: impl FnOnce(&mut Tally) -> (u64, u64)) -> bool {
        println!("\n== {name}");
        let started = Instant::now();
        let (passed, failed) = run(self);
        let part = Part { name: name.to_owned(), passed, failed, took: started.elapsed() };
        println!("== {name}: {passed} passed, {failed} failed, {}", minutes(part.took));
        self.parts.push(part);
        failed == 0
    }

    /// Runs a part that is one thing to pass or fail.
    pub(crate) fn one(&mut self, name: &str, run: impl FnOnce() -> bool) -> bool {
        self.part(name, |_| if run() { (1, 0) } else { (0, 1) })
    }

    /// Names something that was left out.
    pub(crate) fn skip(&mut self, name: &str, reason: &str) {
        println!("\n== {name}: left out: {reason}");
        self.skipped.push((name.to_owned(), reason.to_owned()));
    }

    /// Prints what failed and has it named again at the end, where a log's reader looks first.
    pub(crate) fn fail(&mut self, what: String) {
        println!("FAILED {what}");
        self.failures.push(what);
    }

    /// The same for what was printed when it happened.
    pub(crate) fn remember(&mut self, failures: impl IntoIterator<Item = String>) {
        self.failures.extend(failures);
    }

    /// Prints the summary; the last line stands alone.
    pub(crate) fn close(self) -> ExitCode {
        println!("\n== summary");
        for p in &self.parts {
            let mark = if p.failed == 0 { "ok    " } else { "FAILED" };
            println!("{mark} {:>10}  {} ({} passed, {} failed)", minutes(p.took), p.name, p.passed, p.failed);
        }
        for (name, reason) in &self.skipped {
            println!("left out: {name}: {reason}");
        }
        for what in &self.failures {
            println!("FAILED {what}");
        }
        println!("all in {}", minutes(self.started.elapsed()));
        let passed: u64 = self.parts.iter().map(|p| p.passed).sum();
        let failed: u64 = self.parts.iter().map(|p| p.failed).sum();
        println!("{passed} passed, {failed} failed");
        if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// `3.4 min`.
fn minutes(d: Duration) -> String {
    format!("{:.1} min", d.as_secs_f64() / 60.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_does_not_end_is_ended_with_what_it_started() {
        let mut c = Command::new("sh");
        // The grandchild holds the pipe and must not hold us.
        c.args(["-c", "sleep 600 & echo $!; wait"]);
        let ran = run(&mut c, Show::No, Duration::from_millis(300));
        assert!(ran.status.is_none() && !ran.ok());
        let grandchild: u32 = ran.stdout.trim().parse().unwrap();
        let until = Instant::now() + Duration::from_secs(5);
        while std::fs::exists(format!("/proc/{grandchild}")).unwrap() && Instant::now() < until {
            std::thread::sleep(POLL);
        }
        // Killed; where nobody reaps orphans it stays a zombie.
        let state = std::fs::read_to_string(format!("/proc/{grandchild}/stat")).unwrap_or_default();
        assert!(state.is_empty() || state.contains(") Z "), "{state}");
    }

    #[test]
    fn output_and_exit_code_are_told() {
        let ran = run(
            Command::new("sh").args(["-c", "echo one; echo two; exit 3"]),
            Show::No,
            Duration::from_secs(20),
        );
        assert_eq!((ran.stdout.as_str(), ran.status.and_then(|s| s.code())), ("one\ntwo\n", Some(3)));
        assert!(!run(&mut Command::new("/nonexistent/program"), Show::No, Duration::from_secs(1)).ok());
    }

    #[test]
    fn one_failure_fails_the_whole_and_nothing_passed_is_no_pass() {
        let mut tally = Tally::new();
        tally.one("a", || true);
        tally.part("b", |_| (3, 1));
        assert_eq!(format!("{:?}", tally.close()), format!("{:?}", ExitCode::FAILURE));
        assert_eq!(format!("{:?}", Tally::new().close()), format!("{:?}", ExitCode::FAILURE));
        let mut tally = Tally::new();
        tally.one("a", || true);
        tally.skip("b", "not here");
        assert_eq!(format!("{:?}", tally.close()), format!("{:?}", ExitCode::SUCCESS));
    }
}
