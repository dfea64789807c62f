//! The demo on the real program, run through the release binary as a user would, and its one JSON object, read
//! strictly: a number that is missing or null is a failure, not a zero.

use crate::run::{Ran, Show, Tally, run};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Fetching, installing, onboarding and first start, on a slow line and two busy cores.
const SETUP_LIMIT: Duration = Duration::from_secs(20 * 60);
/// All faults once, each with a start of up to a minute on a busy machine, beside as many cold starts.
const ROUND_LIMIT: Duration = Duration::from_secs(25 * 60);
/// Only naming the faults.
const LIST_LIMIT: Duration = Duration::from_secs(20);
/// The demo knocks the node over in this many ways or says which it left out.
const LEAST_FAULTS: usize = 7;

/// One fault's line.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Fault {
    pub(crate) name: String,
    pub(crate) layer: String,
    pub(crate) outcome: String,
    pub(crate) detect_ms: f64,
    pub(crate) repair_ms: f64,
    pub(crate) start_ms: f64,
    pub(crate) judge_ms: f64,
    pub(crate) down_ms: f64,
    pub(crate) lost_bytes: f64,
}

impl Fault {
    /// Whether the node stands again and nothing of the user's is gone.
    pub(crate) fn is_righted(&self) -> bool {
        self.outcome == "recovered" && self.lost_bytes == 0.0
    }
}

/// What the demo told.
#[derive(Debug, PartialEq)]
pub(crate) struct Report {
    pub(crate) versions: String,
    pub(crate) faults: Vec<Fault>,
    pub(crate) skipped: Vec<(String, String)>,
    /// Bare cold starts of the same gateway in the same run.
    pub(crate) cold_start_ms: Vec<f64>,
}

/// Downloads and the installed program, kept between runs.
pub(crate) fn cache(root: &Path) -> PathBuf {
    std::env::var_os("KOBOSHI_CACHE").map_or_else(|| root.join("target/cache"), PathBuf::from)
}

pub(crate) fn binary(root: &Path) -> PathBuf {
    root.join("target/release/koboshi")
}

/// Runs the demo with these arguments besides `--json` and `--cache`.
pub(crate) fn start(root: &Path, args: &[&str], rounds: u64) -> Ran {
    start_in(root, args, rounds, None)
}

/// The same in the cgroup of this `cgroup.procs`, with everything that it starts.
pub(crate) fn start_in(root: &Path, args: &[&str], rounds: u64, cgroup_procs: Option<&Path>) -> Ran {
    let mut c = match cgroup_procs {
        Some(procs) => {
            // A process moves itself before it becomes the demo, so that nothing starts outside.
            let mut c = Command::new("sh");
            c.args(["-c", "echo 0 > \"$0\" && exec \"$@\""]).arg(procs).arg(binary(root));
            c
        }
        None => Command::new(binary(root)),
    };
    c.args(["demo", "--json", "--cache"]).arg(cache(root)).args(args);
    let rounds = u32::try_from(rounds).unwrap_or(u32::MAX);
    run(&mut c, Show::No, SETUP_LIMIT + ROUND_LIMIT.saturating_mul(rounds))
}

/// Which layers may rightly heal each fault.
pub(crate) type HealedBy = BTreeMap<String, Vec<String>>;

/// As the demo itself lists it; nothing where it does not.
fn healed_by(root: &Path) -> HealedBy {
    let ran = run(Command::new(binary(root)).args(["demo", "--list", "--json"]), Show::No, LIST_LIMIT);
    let list: Value = serde_json::from_str(ran.stdout.trim()).unwrap_or_default();
    let words = |v: &Value| v.as_array().map_or_else(Vec::new, |l| l.iter().filter_map(word).collect());
    let faults = list["faults"].as_array().map_or(&[][..], Vec::as_slice);
    faults.iter().filter_map(|f| Some((word(&f["fault"])?, words(&f["healed_by"])))).collect()
}

fn word(v: &Value) -> Option<String> {
    v.as_str().map(str::to_owned)
}

/// The demo as a part of the tests.
pub(crate) fn run_counted(ran: &Ran, healed_by: &HealedBy, tally: &mut Tally) -> (u64, u64) {
    let report = match read(&ran.stdout) {
        Ok(report) => report,
        Err(why) => {
            tally.fail(format!("the demo's report is not what is documented: {why}\n{}", ran.stdout.trim()));
            return (0, 1);
        }
    };
    print!("{}", table(&report));
    let righted = report.faults.iter().filter(|f| f.is_righted()).count();
    let mut failed = report.faults.len() - righted;
    for f in report.faults.iter().filter(|f| !f.is_righted()) {
        tally.fail(format!("{}: {} by {}, {} bytes lost", f.name, f.outcome, f.layer, f.lost_bytes));
    }
    // Righted by another layer than may rightly heal it: the node stands, but something was judged wrongly.
    for f in report.faults.iter().filter(|f| f.is_righted()) {
        if !healed_by.get(&f.name).is_some_and(|layers| layers.contains(&f.layer)) {
            let expected = healed_by.get(&f.name);
            tally.fail(format!("{}: healed by {}, expected {expected:?}", f.name, f.layer));
            failed += 1;
        }
    }
    for (fault, reason) in &report.skipped {
        tally.skip(&format!("demo fault {fault}"), reason);
    }
    let mut names: Vec<&str> = report.faults.iter().map(|f| f.name.as_str()).collect();
    names.extend(report.skipped.iter().map(|(f, _)| f.as_str()));
    names.sort_unstable();
    names.dedup();
    if names.len() < LEAST_FAULTS {
        tally.fail(format!("demo: {} faults told of, at least {LEAST_FAULTS} expected", names.len()));
        failed += 1;
    }
    if !ran.ok() && righted == report.faults.len() {
        tally.fail(format!("the demo's exit code denies what it reports: {:?}", ran.status));
        failed += 1;
    }
    (righted as u64, failed as u64)
}

/// Runs the demo and counts each fault.
pub(crate) fn run_rounds(root: &Path, rounds: u64, tally: &mut Tally) {
    let rounds_text = rounds.to_string();
    tally.part("demo on the real program", |tally| {
        let ran = start(root, &["--rounds", &rounds_text], rounds);
        run_counted(&ran, &healed_by(root), tally)
    });
}

/// Reads the one object.
pub(crate) fn read(stdout: &str) -> Result<Report, String> {
    let object: Value =
        serde_json::from_str(stdout.trim()).map_err(|e| format!("not one JSON object: {e}"))?;
    if !object["schema"].is_u64() {
        return Err("no schema number".to_owned());
    }
    if object["error"].is_object() {
        return Err(format!("an error: {}", object["error"]));
    }
    let faults = object["faults"].as_array().ok_or("no list of faults")?;
    let faults = faults.iter().map(fault).collect::<Result<Vec<_>, _>>()?;
    let skipped = match object["skipped"].as_array() {
        Some(list) => {
            list.iter().map(|s| Ok((text(s, "fault")?, text(s, "reason")?))).collect::<Result<_, String>>()?
        }
        None => Vec::new(),
    };
    let colds = object["cold_starts_ms"].as_array().ok_or("no list of cold starts")?;
    let cold_start_ms =
        colds.iter().map(|c| c.as_f64().ok_or("a cold start that is no number")).collect::<Result<_, _>>()?;
    Ok(Report { versions: object["versions"].to_string(), faults, skipped, cold_start_ms })
}

/// One fault of the list, strictly.
pub(crate) fn fault(v: &Value) -> Result<Fault, String> {
    Ok(Fault {
        name: text(v, "fault")?,
        layer: text(v, "layer")?,
        outcome: text(v, "outcome")?,
        detect_ms: number(v, "detect_ms")?,
        repair_ms: number(v, "repair_ms")?,
        start_ms: number(v, "start_ms")?,
        judge_ms: number(v, "judge_ms")?,
        down_ms: number(v, "down_ms")?,
        lost_bytes: number(v, "lost_bytes")?,
    })
}

fn text(v: &Value, key: &str) -> Result<String, String> {
    v[key].as_str().map(str::to_owned).ok_or_else(|| format!("no `{key}` in {v}"))
}

fn number(v: &Value, key: &str) -> Result<f64, String> {
    v[key].as_f64().ok_or_else(|| format!("no number `{key}` in {v}"))
}

/// One row per run of a fault.
fn table(report: &Report) -> String {
    let mut out = format!("versions: {}\n\n", report.versions);
    out.push_str(
        "| fault | layer | outcome | detect ms | repair ms | start ms | judge ms | down ms | lost bytes |\n",
    );
    out.push_str("|---|---|---|---|---|---|---|---|---|\n");
    for f in &report.faults {
        let (d, r, s, j, n) = (f.detect_ms, f.repair_ms, f.start_ms, f.judge_ms, f.down_ms);
        out.push_str(&format!(
            "| {} | {} | {} | {d:.1} | {r:.1} | {s:.1} | {j:.1} | {n:.1} | {:.0} |\n",
            f.name, f.layer, f.outcome, f.lost_bytes
        ));
    }
    for ms in &report.cold_start_ms {
        out.push_str(&format!("\nbare cold start: {ms:.1} ms"));
    }
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(fault: &str) -> String {
        format!(
            r#"{{"schema":1,"versions":{{"openclaw":"1"}},"faults":[{fault}],"skipped":[{{"fault":"a","reason":"b"}}],
            "cold_start_ms":14000.5,"cold_starts_ms":[14000.5]}}"#
        )
    }

    const GOOD: &str = r#"{"fault":"sigkill","layer":"restart","outcome":"recovered","detect_ms":3.5,"repair_ms":10.0,
        "start_ms":15000.0,"judge_ms":5000,"down_ms":15013.5,"lost_bytes":0}"#;

    #[test]
    fn a_report_is_read_strictly() {
        let report = read(&object(GOOD)).unwrap();
        assert!(report.faults[0].is_righted());
        assert_eq!(report.cold_start_ms, [14000.5]);
        assert_eq!(report.skipped, [("a".to_owned(), "b".to_owned())]);
        assert!(read(&object(&GOOD.replace(":3.5", ":null"))).unwrap_err().contains("detect_ms"));
        assert!(
            read(&object(&GOOD.replace("\"lost_bytes\":0", "\"x\":0"))).unwrap_err().contains("lost_bytes")
        );
        assert!(read("progress\n{}").is_err());
        assert!(read(r#"{"schema":1,"error":{"what":"a"}}"#).unwrap_err().contains("error"));
    }

    #[test]
    fn only_recovered_without_loss_is_righted() {
        let lost = read(&object(&GOOD.replace("\"lost_bytes\":0", "\"lost_bytes\":1"))).unwrap();
        assert!(!lost.faults[0].is_righted());
        let held = read(&object(&GOOD.replace("recovered", "emergency"))).unwrap();
        assert!(!held.faults[0].is_righted());
    }

    #[test]
    fn few_faults_and_a_denying_exit_code_fail() {
        let mut tally = Tally::new();
        let ran = Ran { status: None, stdout: object(GOOD) };
        let right = HealedBy::from([("sigkill".to_owned(), vec!["restart".to_owned()])]);
        // Too few faults, and an exit code that tells of a failure which the object does not.
        assert_eq!(run_counted(&ran, &right, &mut tally), (1, 2));
        // And the wrong layer.
        assert_eq!(run_counted(&ran, &HealedBy::new(), &mut tally), (1, 3));
    }
}
