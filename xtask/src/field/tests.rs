//! What must hold, one function each, in the order in which the start ration lets them be tried.

use super::Field;
use super::stage::{self, ADOPTED, AGENT_ENDS, ASK_LIMIT, RIGHTED, boot_ms, json, wait};
use super::tree;
use crate::proc::{self, Id};
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// A test.
type Test = fn(&mut Field) -> Result<(), String>;

/// All of them.
pub(super) const ALL: [(&str, Test); 12] = [
    ("agent-killed", agent_killed),
    ("agent-ends", agent_ends),
    ("detection", detection),
    ("stall", stall),
    ("agent-killed-mid-climb", agent_killed_mid_climb),
    ("install", install),
    ("watch-mode", watch_mode),
    ("flipped-bytes", flipped_bytes),
    ("owners-will", owners_will),
    ("tls", tls),
    ("port-taken", port_taken),
    ("first-process", first_process),
];

/// A calm machine tells within 100 ms, which the benchmark measures; a busy one must within this.
const DETECTED_MS: u64 = 1_000;
/// Damage on disk is seen by a sweep at the latest; its period is 30 s at best and follows the machine's pace.
const SWEPT: Duration = Duration::from_secs(240);
/// What was stopped must stay stopped for longer than any look at it takes.
const STAYS_DOWN: Duration = Duration::from_secs(15);
/// A stall that a busy node has in life, and when it must be over.
const STALL_MS: u64 = 40_000;
const STALL_OVER: Duration = Duration::from_secs(50);
/// The ladder has nothing to try against a taken port: it ends in emergency well before its 600 s.
const HELD: Duration = Duration::from_secs(180);
/// From emergency the next climb comes after 5 minutes at the latest, with its jitter, and then a start.
const COMES_BACK: Duration = Duration::from_secs(600);
/// A clean stop of an idle node.
const STOPS: Duration = Duration::from_secs(90);

/// The incidents that were opened since, which must be exactly one.
fn the_new_one(field: &Field, before: &[u64]) -> Result<u64, String> {
    let after = field.stage.incidents()?;
    let new: Vec<u64> = after.into_iter().filter(|id| !before.contains(id)).collect();
    match new.as_slice() {
        [id] => Ok(*id),
        _ => Err(format!("one new incident was expected, there are {new:?}")),
    }
}

/// Waits until an incident newer than these is on record.
fn wait_for_incident(field: &Field, before: &[u64], limit: Duration) -> Result<u64, String> {
    wait(limit, || {
        let open = || field.stage.status()?["incident"]["id"].as_u64().filter(|id| !before.contains(id));
        let next = before.iter().max().copied().unwrap_or(0) + 1;
        let filed = || field.stage.state(&format!("incidents/{next:08}.json")).exists().then_some(next);
        open().or_else(filed)
    })
    .ok_or_else(|| format!("no incident was opened within {} s", limit.as_secs()))
}

fn event<'a>(records: &'a [Value], kind: &str) -> Option<&'a Value> {
    records.iter().find(|r| r["event"]["type"] == kind)
}

/// What the tests of agents have in common: the same gateway in the next one's care, and nothing happened.
fn adopted(field: &mut Field, before: Id, incidents: &[u64]) -> Result<(), String> {
    field.claim(proc::runs(before), "the gateway runs on, same pid and start time", || {
        format!("process {} is gone", before.pid)
    });
    let after = field.next_agent(&[])?;
    field.claim(after == before, "the next agent has the same gateway in its care", || {
        format!("{before:?} became {after:?}")
    });
    let (code, status) = field.stage.ask(&["status"], ASK_LIMIT)?;
    let agent = field.stage.agent.as_ref().map(|a| a.id.pid);
    let told = status["verdict"] == "serving"
        && status["gateway_pid"].as_u64() == Some(u64::from(before.pid))
        && status["agent"]["pid"].as_u64() == agent.map(u64::from);
    field.claim(code == 0 && told, "`status` says so: serving, that gateway, that agent", || {
        format!("exit {code}, {status}")
    });
    let now = field.stage.incidents()?;
    field.claim(now == incidents, "no incident was opened", || format!("{incidents:?} became {now:?}"));
    let gateways = field.stage.gateways();
    field.claim(gateways == [before], "and nothing was started", || format!("gateways: {gateways:?}"));
    Ok(())
}

/// An agent that is killed takes nobody along; the next one adopts.
fn agent_killed(field: &mut Field) -> Result<(), String> {
    let before = field.stage.serving(ADOPTED)?;
    let incidents = field.stage.incidents()?;
    field.stage.end_agent(Signal::KILL)?;
    adopted(field, before, &incidents)
}

/// So does one that is told to end, as an upgrade does.
fn agent_ends(field: &mut Field) -> Result<(), String> {
    let before = field.stage.serving(ADOPTED)?;
    let incidents = field.stage.incidents()?;
    let code = field.stage.end_agent(Signal::TERM)?;
    field.claim(code == Some(0), "SIGTERM: the agent exits with 0", || format!("{code:?}"));
    adopted(field, before, &incidents)
}

/// From SIGKILL to the record of it.
fn detection(field: &mut Field) -> Result<(), String> {
    let before = field.stage.serving(ADOPTED)?;
    let incidents = field.stage.incidents()?;
    field.stage.ration(Duration::ZERO)?;
    let at_ms = boot_ms();
    kill(before)?;
    let id = wait_for_incident(field, &incidents, ADOPTED)?;
    let records = field.stage.closed(id, RIGHTED)?;
    let opened = event(&records, "opened").and_then(|r| r["at"]["ms"].as_u64());
    let took_ms = opened.ok_or("the incident has no record of its opening")?.saturating_sub(at_ms);
    println!("   from SIGKILL to the record of the opening: {took_ms} ms");
    field.claim(took_ms < DETECTED_MS, "the opening is recorded within a second", || format!("{took_ms} ms"));
    let recovered = event(&records, "recovered").is_some();
    field.claim(recovered, "and the incident closes as recovered", || format!("{records:?}"));
    one_gateway(field, before)
}

/// SIGKILL, and it is gone: what is looked at next is not its corpse.
fn kill(gateway: Id) -> Result<(), String> {
    proc::signal(&[gateway.pid], Signal::KILL);
    wait(ASK_LIMIT, || (!proc::runs(gateway)).then_some(()))
        .ok_or_else(|| "SIGKILL did not end it".to_owned())
}

/// Exactly one gateway, and another one than before.
fn one_gateway(field: &mut Field, before: Id) -> Result<(), String> {
    // What is published may still be the word about the one that is gone.
    let now = wait(RIGHTED, || field.stage.serving(Duration::ZERO).ok().filter(|id| *id != before));
    let now = now.ok_or_else(|| format!("no new gateway serves after {} s", RIGHTED.as_secs()))?;
    let all = field.stage.gateways();
    field.claim(all == [now], "exactly one gateway serves, and it is a new one", || {
        format!("in care {now:?}, there are {all:?}")
    });
    Ok(())
}

/// The agent dies in the middle of a climb: the next one folds the journal and goes on.
fn agent_killed_mid_climb(field: &mut Field) -> Result<(), String> {
    let before = field.stage.serving(ADOPTED)?;
    let incidents = field.stage.incidents()?;
    field.stage.ration(Duration::ZERO)?;
    proc::signal(&[before.pid], Signal::KILL);
    let open = wait(ADOPTED, || field.stage.status().filter(|s| s["incident"].is_object()));
    let doing = open.ok_or("no incident was opened")?["incident"]["doing"].to_string();
    field.stage.end_agent(Signal::KILL)?;
    println!("   the agent was killed while: {doing}");
    field.stage.guard(&[])?;
    field.stage.serving(RIGHTED)?;
    let id = the_new_one(field, &incidents)?;
    let records = field.stage.closed(id, ADOPTED)?;
    let recovered = event(&records, "recovered").is_some();
    field.claim(recovered, "one incident, closed as recovered by the next agent", || format!("{records:?}"));
    one_gateway(field, before)
}

/// A busy node that answers nothing for 40 s is left in peace.
fn stall(field: &mut Field) -> Result<(), String> {
    let before = field.stage.serving(ADOPTED)?;
    let incidents = field.stage.incidents()?;
    let order = field.stage.dir.join("tmp/fault");
    let beside = field.stage.dir.join("tmp/fault.new");
    std::fs::write(&beside, format!("stall {STALL_MS}"))
        .and_then(|()| std::fs::rename(&beside, &order))
        .map_err(|e| format!("order the stall: {e}"))?;
    let obeyed = wait(Duration::from_secs(20), || (!order.exists()).then_some(()));
    obeyed.ok_or("the gateway did not obey the order to stall")?;
    let mut doubted = false;
    let began_ms = boot_ms();
    // Until then something must have gone wrong to be seen before the time is up.
    let fell = wait(STALL_OVER, || {
        let status = field.stage.status()?;
        doubted |= status["verdict"]["verdict"] != "serving";
        (status["incident"].is_object() || !proc::runs(before)).then(|| status.to_string())
    });
    let took_s = (boot_ms() - began_ms) / 1000;
    field.claim(fell.is_none(), "no incident is opened for a stall of 40 s", || {
        format!("after {took_s} s: {}", fell.clone().unwrap_or_default())
    });
    field
        .claim(doubted, "though it was seen not to answer", || "it was called serving throughout".to_owned());
    let after = field.stage.serving(RIGHTED)?;
    field.claim(after == before, "and it is the same gateway that serves on", || {
        format!("{before:?} became {after:?}")
    });
    let now = field.stage.incidents()?;
    field.claim(now == incidents, "with nothing on record", || format!("{incidents:?} became {now:?}"));
    Ok(())
}

/// A stop stays, a pause holds, and both end when the owner says so.
fn owners_will(field: &mut Field) -> Result<(), String> {
    let before = field.stage.serving(ADOPTED)?;
    let incidents = field.stage.incidents()?;
    let (code, told) = field.stage.ask(&["node", "stop"], STOPS)?;
    field.claim(code == 0 && !proc::runs(before), "`node stop`: the gateway is gone", || {
        format!("exit {code}, {told}")
    });
    let (code, told) = field.stage.ask(&["status"], ASK_LIMIT)?;
    field.claim(code != 0 && told["verdict"] != "serving", "and `status` does not call it serving", || {
        format!("exit {code}, {told}")
    });
    let back = wait(STAYS_DOWN, || (!field.stage.gateways().is_empty()).then_some(()));
    field.claim(back.is_none(), "and stays gone", || "there is one again".to_owned());
    let now = field.stage.incidents()?;
    field.claim(now == incidents, "and nobody calls that an incident", || format!("{incidents:?}, {now:?}"));
    let (code, told) = field.stage.ask(&["node", "start"], RIGHTED)?;
    field.claim(code == 0 && told["verdict"] == "serving", "`node start`: it serves", || {
        format!("exit {code}, {told}")
    });

    let second = field.stage.serving(RIGHTED)?;
    let (code, told) = field.stage.ask(&["pause", "--for", "30m"], ASK_LIMIT)?;
    let heard = wait(ASK_LIMIT, || field.stage.status().filter(|s| s["hands_off"].is_string()));
    field.claim(code == 0 && heard.is_some(), "`pause`: the agent keeps its hands off", || {
        format!("exit {code}, {told}")
    });
    // It is the resumption that needs a start.
    field.stage.ration(STAYS_DOWN)?;
    kill(second)?;
    let back = wait(STAYS_DOWN, || (!field.stage.gateways().is_empty()).then_some(()));
    field.claim(back.is_none(), "a gateway that dies then stays down", || "there is one again".to_owned());
    let (code, told) = field.stage.ask(&["resume"], ASK_LIMIT)?;
    field.claim(code == 0, "`resume` is taken", || format!("exit {code}, {told}"));
    one_gateway(field, second)
}

/// A gateway that speaks TLS on its port, with a certificate of its own making.
fn tls(field: &mut Field) -> Result<(), String> {
    // OpenClaw makes its certificate with it.
    if !Path::new("/usr/bin/openssl").exists() {
        field.skipped.push(("tls", "this machine has no openssl".to_owned()));
        return Ok(());
    }
    let path = field.stage.node("config_path")?;
    let plain = std::fs::read(&path).map_err(|e| format!("read {}: {e}", path.display()))?;
    let mut config: Value =
        serde_json::from_slice(&plain).map_err(|e| format!("{} is no plain JSON: {e}", path.display()))?;
    config["gateway"]["tls"] = serde_json::json!({ "enabled": true });
    let incidents = field.stage.incidents()?;
    let result = in_tls(field, &path, config.to_string().as_bytes(), &incidents);
    // Back to what the other tests expect, however it went.
    let (code, told) = restarted_with(field, &path, &plain)?;
    field.claim(code == 0, "without TLS it serves as before", || format!("exit {code}, {told}"));
    result
}

fn in_tls(field: &mut Field, path: &Path, config: &[u8], incidents: &[u64]) -> Result<(), String> {
    let (code, told) = restarted_with(field, path, config)?;
    field.claim(code == 0 && told["verdict"] == "serving", "with TLS: `node start` confirms it", || {
        format!("exit {code}, {told}")
    });
    let before = field.stage.serving(RIGHTED)?;
    let answer = asked_in_plain(field.stage.port);
    field.claim(!answer.starts_with("HTTP/"), "it does speak TLS", || answer.clone());
    let (code, told) = field.stage.ask(&["check"], ASK_LIMIT)?;
    let whole = told["verdict"] == "serving" && told["confidence"] == "full";
    field.claim(code == 0 && whole, "`check`: serving, with a hello and nothing to remark", || {
        format!("exit {code}, {told}")
    });
    field.claim(told["findings"].as_array().is_some_and(Vec::is_empty), "nor about its certificate", || {
        told["findings"].to_string()
    });
    let now = field.stage.incidents()?;
    field.claim(now == incidents, "with nothing on record", || format!("{incidents:?} became {now:?}"));

    field.stage.settled(RIGHTED)?;
    field.stage.ration(Duration::ZERO)?;
    kill(before)?;
    let id = wait_for_incident(field, incidents, ADOPTED)?;
    let records = field.stage.closed(id, RIGHTED)?;
    let recovered = event(&records, "recovered").is_some();
    field.claim(recovered, "killed, it is righted and the incident closes", || format!("{records:?}"));
    one_gateway(field, before)
}

/// Stops the node, gives it this config and starts it. What the start said.
fn restarted_with(field: &Field, path: &Path, config: &[u8]) -> Result<(i32, Value), String> {
    field.stage.ask(&["node", "stop"], STOPS)?;
    stage::overwrite(path, config)?;
    field.stage.ration(Duration::ZERO)?;
    field.stage.ask(&["node", "start"], RIGHTED)
}

/// What the port answers to a request in plain HTTP.
fn asked_in_plain(port: u16) -> String {
    use std::io::{Read, Write};
    let mut said = Vec::new();
    let asked = std::net::TcpStream::connect(("127.0.0.1", port)).and_then(|mut stream| {
        stream.set_read_timeout(Some(ASK_LIMIT))?;
        stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n")?;
        stream.read_to_end(&mut said)
    });
    let said = String::from_utf8_lossy(&said).into_owned();
    match asked {
        Ok(_) => said,
        Err(e) => format!("{said} ({e})"),
    }
}

/// Somebody else's process on the gateway's port: not ours to end, and never mistaken for the gateway.
fn port_taken(field: &mut Field) -> Result<(), String> {
    let incidents = field.stage.incidents()?;
    let (code, told) = field.stage.ask(&["node", "stop"], STOPS)?;
    let down = wait(ASK_LIMIT, || field.stage.status().filter(|s| s["verdict"]["verdict"] != "serving"));
    field.claim(code == 0 && down.is_some(), "the node is stopped", || format!("exit {code}, {told}"));
    let port = field.stage.port;
    let mut c = Command::new(std::env::current_exe().map_err(|e| format!("find our own program: {e}"))?);
    c.args(["stranger", &port.to_string()]);
    let stranger = field.stage.bring(c)?;
    let bound = wait(ASK_LIMIT, || std::net::TcpStream::connect(("127.0.0.1", port)).ok());
    bound.ok_or("the stranger did not get the port")?;
    // It waits for the judge's word; that must not keep us from looking.
    let mut start = field.stage.koboshi();
    start.args(["node", "start", "--json", "--config"]).arg(&field.stage.config);
    let mut start = start
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("ask for a start: {e}"))?;
    let mut served = None;
    let held = wait(HELD, || {
        let status = field.stage.status()?;
        if status["verdict"]["verdict"] == "serving" {
            served = Some(status.to_string());
        }
        (status["incident"]["emergency"] == true).then_some(())
    });
    crate::run::end(&mut start);
    let last = field.stage.status().unwrap_or_default();
    field.claim(held.is_some(), "it ends in emergency and holds", || {
        format!("after {} s: {last}", HELD.as_secs())
    });
    field.claim(served.is_none(), "it was never called serving", || served.clone().unwrap_or_default());
    let id = the_new_one(field, &incidents)?;
    let (_, shown) = field.stage.ask(&["incidents", "show", &id.to_string()], ASK_LIMIT)?;
    let text = shown.to_string();
    let named = text.contains(&format!("port {port}")) && text.contains(&stranger.pid.to_string());
    field.claim(named, "the reason names the port and who holds it", || text.clone());
    let answers = std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
    field.claim(proc::runs(stranger) && answers, "the stranger was not touched", || "it is gone".to_owned());
    let there = field.stage.send_away(stranger);
    field.claim(there, "and goes by itself", || "it was gone before".to_owned());
    let back = field.stage.serving(COMES_BACK)?;
    let all = field.stage.gateways();
    field.claim(all == [back], "then the node comes back with nobody's help", || format!("{all:?}"));
    let records = field.stage.closed(id, ADOPTED)?;
    let from_emergency = event(&records, "recovered").is_some_and(|r| r["event"]["from_emergency"] == true);
    field.claim(from_emergency, "and the same incident closes, from emergency", || format!("{records:?}"));
    Ok(())
}

/// The first process of a container: it reaps, it passes the end on, and nothing is left.
fn first_process(field: &mut Field) -> Result<(), String> {
    let spaces = Command::new("unshare")
        .args(["--fork", "--pid", "--mount-proc", "true"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !spaces.is_ok_and(|s| s.success()) {
        field.skipped.push(("first-process", "this root may not make a process namespace".to_owned()));
        return Ok(());
    }
    let before = field.stage.serving(ADOPTED)?;
    // A namespace of its own cannot see the gateway of this one.
    field.stage.end_agent(Signal::TERM)?;
    proc::signal(&[before.pid], Signal::TERM);
    wait(STOPS, || (!proc::runs(before)).then_some(())).ok_or("the gateway did not end at SIGTERM")?;

    let mut c = Command::new("unshare");
    c.args(["--fork", "--pid", "--mount-proc", "--"]);
    let koboshi = field.stage.koboshi();
    c.arg(koboshi.get_program()).args(["guard", "--config"]).arg(&field.stage.config);
    field.stage.guard_by(c)?;
    let unshare = field.stage.agent.as_ref().map(|a| a.id).ok_or("no agent")?;
    let guard = wait(ASK_LIMIT, || proc::family(unshare.pid).into_iter().find(|id| *id != unshare));
    let guard = guard.ok_or("unshare started nothing")?;
    if let Some(agent) = &mut field.stage.agent {
        // The pid in its own words is 1; its start time is the same inside and outside.
        agent.id = guard;
    }
    let space = namespace(guard.pid).ok_or("the guard's namespace is not known")?;
    let own = namespace(std::process::id());
    let result = in_its_own(field, guard, &space, own.as_ref() != Some(&space));
    if let Some(agent) = &mut field.stage.agent {
        agent.id = guard;
    }
    result
}

fn in_its_own(field: &mut Field, guard: Id, space: &Path, apart: bool) -> Result<(), String> {
    field.stage.serving(RIGHTED)?;
    let status = field.stage.status().unwrap_or_default();
    field.claim(status["agent"]["pid"] == 1 && apart, "the guard is process 1 and its node serves", || {
        status.to_string()
    });
    let gateways = field.stage.gateways();
    let inside = matches!(gateways.as_slice(), [id] if namespace(id.pid).as_deref() == Some(space));
    field.claim(inside, "one gateway, in the guard's namespace", || format!("{gateways:?}"));

    // Its parent ends at once; it becomes the first process's child, and ends.
    let mark = format!("2.{:07}", boot_ms() % 10_000_000);
    let script = format!("(sleep {mark} &)");
    let pid = guard.pid.to_string();
    let injected = Command::new("nsenter")
        .args(["--target", &pid, "--pid", "--mount", "sh", "-c", &script])
        .stdin(Stdio::null())
        .status();
    if !injected.is_ok_and(|s| s.success()) {
        return Err("nsenter could not bring an orphan in".to_owned());
    }
    let orphan = wait(Duration::from_secs(1), || {
        proc::family(guard.pid).into_iter().find(|id| {
            std::fs::read_to_string(format!("/proc/{}/cmdline", id.pid)).is_ok_and(|c| c.contains(&mark))
        })
    });
    let orphan = orphan.ok_or("the orphan was not found among the guard's children")?;
    let parent = proc::stat(orphan.pid).map(|s| s.ppid);
    field.claim(parent == Some(guard.pid), "an orphan becomes its child", || format!("parent {parent:?}"));
    // A process that nobody reaped keeps its entry.
    let reaped = wait(Duration::from_secs(20), || (!proc::alive(orphan)).then_some(()));
    field.claim(reaped.is_some(), "and is reaped when it ends", || "a zombie stays".to_owned());

    let log = field.stage.agent.as_ref().map(|a| a.log.clone());
    // The signal goes to the guard itself; unshare ends with it.
    let code = field.stage.end_agent(Signal::TERM)?;
    let words = log.and_then(|l| std::fs::read_to_string(l).ok()).unwrap_or_default();
    field.claim(code == Some(0), "SIGTERM to it: it exits with 0", || format!("{code:?}"));
    let drained = words.contains("the gateway has ended: Clean");
    field.claim(drained, "after the gateway has drained cleanly", || words.clone());
    let left = wait(AGENT_ENDS, || inhabitants(space).is_empty().then_some(()));
    field.claim(left.is_some(), "and the namespace is empty", || format!("{:?}", inhabitants(space)));
    Ok(())
}

fn namespace(pid: u32) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}

fn inhabitants(space: &Path) -> Vec<u32> {
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|pid| namespace(*pid).as_deref() == Some(space))
        .collect()
}

/// A second koboshi is installed beside a serving node and taken away again: the node does not notice.
fn install(field: &mut Field) -> Result<(), String> {
    let before = field.stage.settled(RIGHTED)?;
    let own = field.stage.work.join("second");
    let run_dir = own.join("run");
    std::fs::create_dir_all(&run_dir).map_err(|e| format!("make {}: {e}", run_dir.display()))?;
    let (state, prefix) = (field.stage.node("state_dir")?, field.stage.node("prefix")?);
    let runtime = field.stage.node("runtime_dir")?;
    let port = field.stage.port.to_string();
    let config = own.join("config/koboshi.toml");
    let koboshi = |words: &[&str]| {
        let mut c = field.stage.koboshi();
        c.env("XDG_STATE_HOME", own.join("state")).env("XDG_RUNTIME_DIR", &run_dir);
        c.arg("--json").arg("--config").arg(&config).args(words);
        c
    };
    let all = look(&state, &prefix, &runtime)?;
    let mut c = koboshi(&["install", "--no-service", "--port", &port]);
    c.arg("--prefix").arg(&prefix).arg("--state-dir").arg(&state);
    let installed = stage::ask(c, ASK_LIMIT * 5);
    let wrote = config.is_file() && own.join("state/koboshi/node.json").is_file();
    let uninstalled = stage::ask(koboshi(&["uninstall", "--purge"]), ASK_LIMIT * 2);
    let after = look(&state, &prefix, &runtime)?;

    let (code, told) = installed?;
    let right = told["node"]["port"].as_u64() == Some(u64::from(field.stage.port));
    field.claim(
        code == 0 && told["installed"] == true && right,
        "a second koboshi finds and installs",
        || format!("exit {code}, {told}"),
    );
    let snapshot = told["snapshot"].is_object();
    field.claim(wrote && snapshot, "with its own configuration and snapshot", || told.to_string());
    let (code, told) = uninstalled?;
    field.claim(code == 0 && told["removed"] == true, "and uninstalls", || format!("exit {code}, {told}"));
    let mut left = Vec::new();
    files_below(&own, &mut left);
    field.claim(left.is_empty(), "leaving no file of its own", || format!("{left:?}"));
    let now = field.stage.serving(ADOPTED)?;
    field.claim(now == before, "the gateway is the same, pid and start time", || {
        format!("{before:?}, {now:?}")
    });
    let differences = tree::differences(&all, &after, 5);
    let what = format!("{} files, directories and links are what they were", all.len());
    field.claim(differences.is_empty(), &what, || differences.join("; "));
    Ok(())
}

fn files_below(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            files_below(&entry.path(), into);
        } else {
            into.push(entry.path());
        }
    }
}

/// Everything of the node's: its state, its program, its runtime.
fn look(state: &Path, prefix: &Path, runtime: &Path) -> Result<BTreeMap<PathBuf, tree::Entry>, String> {
    let spare = prefix.join("lib/.koboshi-spare");
    // What a gateway writes while nobody does anything: its databases and its logs.
    let living = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        path.starts_with(state)
            && ([".sqlite", ".sqlite-wal", ".sqlite-shm", ".log", ".lock"].iter().any(|e| name.ends_with(e))
                || ["logs", "tmp", "cache"].contains(&&*name))
    };
    let skip = |path: &Path| path == spare;
    let mut all = BTreeMap::new();
    for root in [state, prefix, runtime] {
        tree::look(root, &living, &skip, &mut all).map_err(|e| format!("look at {}: {e}", root.display()))?;
    }
    Ok(all)
}

/// An agent that only watches tells what it would do, once, and does not do it; one that guards does.
fn watch_mode(field: &mut Field) -> Result<(), String> {
    let before = field.stage.settled(RIGHTED)?;
    let incidents = field.stage.incidents()?;
    field.stage.end_agent(Signal::TERM)?;
    let adopted = field.next_agent(&["--watch"])?;
    field.claim(adopted == before, "an agent that only watches adopts, too", || format!("{adopted:?}"));
    let entry = field.stage.entry()?;
    let whole = stage::halve(&entry)?;
    let cut = whole.get(..whole.len() / 2).unwrap_or_default();
    let result = watched(field, &incidents, &entry, cut);
    // A guard that comes next must find the damage even if the watch was a disappointment.
    let before_repair = field.stage.incidents()?;
    field.stage.end_agent(Signal::TERM)?;
    field.stage.guard(&[])?;
    repaired(field, &before_repair, &entry, &whole, before)?;
    result
}

fn watched(field: &mut Field, incidents: &[u64], entry: &Path, cut: &[u8]) -> Result<(), String> {
    let id = wait_for_incident(field, incidents, SWEPT)?;
    let records = field.stage.closed(id, ASK_LIMIT)?;
    let alone = event(&records, "left-alone").is_some();
    field.claim(alone, "damage is an incident that is left alone", || format!("{records:?}"));
    let words = field.stage.agent.as_ref().map(super::stage::Agent::words).unwrap_or_default();
    let planned = words.contains("in-place would be tried");
    field.claim(planned, "the plan is told", || words.clone());
    // The same damage, written again: the next look comes at once and finds nothing new. By then whatever was going to
    // be touched has been.
    std::thread::sleep(STAYS_DOWN);
    stage::overwrite(entry, cut)?;
    let again =
        wait(STAYS_DOWN, || (field.stage.incidents().ok()?.len() > incidents.len() + 1).then_some(()));
    let now = field.stage.incidents()?;
    field.claim(again.is_none(), "it is told once", || format!("{incidents:?} became {now:?}"));
    let untouched = std::fs::read(entry).is_ok_and(|now| now == cut);
    field.claim(untouched, "nothing is touched", || "the file is another".to_owned());
    let quarantine = field.stage.state(&format!("quarantine/{id:08}"));
    field.claim(!quarantine.exists(), "nothing was moved away", || quarantine.display().to_string());
    Ok(())
}

/// Damage put right in place: the same bytes, the same gateway.
fn repaired(
    field: &mut Field,
    incidents: &[u64],
    entry: &Path,
    whole: &[u8],
    gateway: Id,
) -> Result<(), String> {
    let id = wait_for_incident(field, incidents, SWEPT)?;
    let records = field.stage.closed(id, RIGHTED)?;
    let layer = event(&records, "recovered").map(|r| r["event"]["layer"].clone());
    field.claim(layer == Some(Value::from("in-place")), "an agent that guards repairs it in place", || {
        format!("{records:?}")
    });
    let right = std::fs::read(entry).is_ok_and(|now| now == whole);
    field.claim(right, "to the byte", || "the file is another".to_owned());
    let now = field.stage.serving(ADOPTED)?;
    field.claim(now == gateway, "under the same gateway", || format!("{gateway:?} became {now:?}"));
    Ok(())
}

/// A store that rots: another source, or a plain reason; never a wrong byte.
fn flipped_bytes(field: &mut Field) -> Result<(), String> {
    let before = field.stage.settled(RIGHTED)?;
    let incidents = field.stage.incidents()?;
    let entry = field.stage.entry()?;
    let packs = field.stage.state("store/packs");
    let mut kept = Vec::new();
    for entry in std::fs::read_dir(&packs).map_err(|e| format!("list {}: {e}", packs.display()))?.flatten() {
        let path = entry.path();
        let whole = std::fs::read(&path).map_err(|e| format!("read {}: {e}", path.display()))?;
        // One bit in every page: whichever object is needed, it is hit.
        let mut rotten = whole.clone();
        rotten.iter_mut().skip(1024).step_by(4096).for_each(|byte| *byte ^= 1);
        stage::overwrite(&path, &rotten)?;
        kept.push((path, whole));
    }
    field.claim(!kept.is_empty(), "every pack of the store is damaged", || packs.display().to_string());
    let whole = stage::halve(&entry)?;
    let result = rotten(field, &incidents, &entry, &whole, before);
    for (path, bytes) in kept {
        stage::overwrite(&path, &bytes)?;
    }
    // Where there was no other source its owner puts the file right: that too closes the incident.
    if std::fs::read(&entry).is_ok_and(|now| now != whole) {
        stage::overwrite(&entry, &whole)?;
        let id = the_new_one(field, &incidents)?;
        let records = field.stage.closed(id, RIGHTED)?;
        let closed = event(&records, "recovered").is_some();
        field.claim(closed, "once the file is right the incident closes", || format!("{records:?}"));
    }
    result
}

fn rotten(
    field: &mut Field,
    incidents: &[u64],
    entry: &Path,
    whole: &[u8],
    gateway: Id,
) -> Result<(), String> {
    let id = wait_for_incident(field, incidents, SWEPT)?;
    let cut = whole.get(..whole.len() / 2).unwrap_or_default();
    let mut wrong = false;
    let file = field.stage.state(&format!("incidents/{id:08}.json"));
    let mut log = String::new();
    let done = wait(RIGHTED, || {
        // Between the old file and the new one there is no third.
        wrong |= std::fs::read(entry).is_ok_and(|now| now != whole && now != cut);
        log = field.stage.agent.as_ref().map(super::stage::Agent::words).unwrap_or_default();
        let postponed = log.contains(&format!("incident {id}: ")) && log.contains("postponed");
        let told = field.stage.status().is_some_and(|s| s["incident"]["doing"] == "waiting");
        (json(&file).is_some() || postponed || told).then_some(())
    });
    field.claim(done.is_some(), "the repair comes to an end", || log.clone());
    wrong |= std::fs::read(entry).is_ok_and(|now| now != whole && now != cut);
    field.claim(!wrong, "no wrong byte was ever written", || "the file holds other bytes".to_owned());
    let right = std::fs::read(entry).is_ok_and(|now| now == whole);
    let (_, shown) = field.stage.ask(&["incidents", "show", &id.to_string()], ASK_LIMIT)?;
    let said = format!("{shown} {log}");
    let reason = ["damaged", "corrupt", "cannot be proven"].iter().any(|word| said.contains(word));
    println!("   {}", if right { "it was repaired from another source" } else { "it was not repaired" });
    field.claim(right || reason, "it is right again, or the reason is on record", || said.clone());
    field.claim(proc::runs(gateway), "and the gateway serves on", || format!("{gateway:?} is gone"));
    Ok(())
}
