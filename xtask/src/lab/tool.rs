//! Programs of the machine that the lab is built with: each with a deadline, its output bounded, its end certain.

use super::cage;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a tool's output is read up to.
const OUTPUT_LIMIT_BYTES: u64 = 8 << 20;
/// How often a tool's end is looked for.
const POLL: Duration = Duration::from_millis(5);

/// What a tool or a command in a host came to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Out {
    /// `None`: a signal ended it, or its deadline did.
    pub(crate) status: Option<i32>,
    pub(crate) timed_out: bool,
    pub(crate) out: String,
    pub(crate) err: String,
    pub(crate) took: Duration,
}

impl Out {
    pub(crate) fn ok(&self) -> bool {
        self.status == Some(0)
    }

    /// The last words of both outputs, for a message.
    pub(crate) fn words(&self) -> String {
        let tail =
            |s: &str| s.chars().rev().take(600).collect::<Vec<_>>().into_iter().rev().collect::<String>();
        let (out, err) = (tail(self.out.trim()), tail(self.err.trim()));
        let how = match (self.status, self.timed_out) {
            (Some(code), _) => format!("status {code}"),
            (None, true) => format!("not ended after {:.0} s", self.took.as_secs_f64()),
            (None, false) => "ended by a signal".to_owned(),
        };
        format!("{how}: {err} {out}")
    }
}

/// Runs a command to its end or its deadline; it and its descendants do not outlive that. Output goes through files in
/// `scratch`, so that something that outlives the command can hold nothing open that we wait for.
pub(crate) fn run(mut command: Command, scratch: &Path, limit: Duration) -> Result<Out, String> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = command.get_program().to_string_lossy().into_owned();
    let files =
        ["out", "err"].map(|kind| scratch.join(format!("lab-{}-{number}.{kind}", std::process::id())));
    let [out, err] = &files;
    let open = |p: &Path| File::create(p).map_err(|e| format!("make {}: {e}", p.display()));
    command.stdin(Stdio::null()).stdout(open(out)?).stderr(open(err)?);
    let started = Instant::now();
    let mut child = command.spawn().map_err(|e| format!("start {name}: {e}"))?;
    let mut result = Out::default();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => {
                result.status = status.code();
                break;
            }
            Ok(None) if started.elapsed() < limit => std::thread::sleep(POLL),
            Ok(None) => {
                result.timed_out = true;
                cage::end_family(child.id());
                let _ = child.wait();
                break;
            }
            Err(e) => return Err(format!("wait for {name}: {e}")),
        }
    }
    result.took = started.elapsed();
    result.out = read(out);
    result.err = read(err);
    for file in &files {
        let _ = std::fs::remove_file(file);
    }
    Ok(result)
}

/// The same of a program and its arguments; anything but status 0 is an error with its words.
pub(crate) fn must(words: &[&str], scratch: &Path, limit: Duration) -> Result<String, String> {
    let [program, args @ ..] = words else { return Err("no command".to_owned()) };
    let mut c = Command::new(program);
    c.args(args);
    let out = run(c, scratch, limit)?;
    if out.ok() { Ok(out.out) } else { Err(format!("{}: {}", words.join(" "), out.words())) }
}

fn read(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = File::open(path) {
        // What was read before an error still says something.
        let _ = file.take(OUTPUT_LIMIT_BYTES).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_status_and_deadline_are_told() {
        let dir = std::env::temp_dir();
        let sh = |script: &str| {
            let mut c = Command::new("sh");
            c.args(["-c", script]);
            run(c, &dir, Duration::from_millis(400)).unwrap()
        };
        let got = sh("echo one; echo two >&2; exit 3");
        assert_eq!((got.status, got.out.as_str(), got.err.as_str()), (Some(3), "one\n", "two\n"));
        // A grandchild that holds the output open is not waited for.
        let got = sh("sleep 60 & echo $!");
        assert!(got.ok() && got.took < Duration::from_millis(300));
        cage::end_family(got.out.trim().parse().unwrap());
        let got = sh("echo begun; sleep 60");
        assert!(got.timed_out && !got.ok() && got.out == "begun\n");
    }
}
