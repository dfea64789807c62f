//! A running agent: orders for one layer, people who go away, damage that nothing mends, and what it costs to wait.

use crate::fake::Fake;
use crate::gateway::{Agent, PATIENCE};
use host::clock::Deadline;
use host::process::ProcessId;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::time::Duration;

pub fn until(fake: &Fake, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let deadline = Deadline::after(PATIENCE);
    loop {
        let (object, _) = fake.json(&["status"]);
        if wanted(&object) {
            return object;
        }
        let log = || std::fs::read_to_string(fake.path("agent.log")).unwrap_or_default();
        assert!(
            !deadline.passed(),
            "never {what}: {object}\n{}\n{}",
            log(),
            fake.json(&["snapshot", "list"]).0
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// A command that is begun and not waited for.
#[allow(clippy::zombie_processes, reason = "it is ended by its identity; a zombie counts as gone")]
fn begin(fake: &Fake, args: &[&str]) -> ProcessId {
    let cmd = fake.command(args);
    let mut command = std::process::Command::new(&cmd.program);
    let log = std::fs::File::create(fake.path("begun.log")).unwrap();
    let child = command
        .args(&cmd.args)
        .env_clear()
        .envs(cmd.env)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    ProcessId::of(child.id()).unwrap()
}

/// Nothing that a person would have to take back is left: no pause, no stop, no order.
fn nothing_is_left(fake: &Fake) {
    let (object, _) = fake.json(&["status"]);
    assert!(object.get("hands_off").is_none(), "{object}");
    let will = std::fs::read_to_string(fake.koboshi_state().join("will.json")).unwrap_or_default();
    assert!(
        will.is_empty() || !will.contains(r#""stopped":true"#) && will.contains(r#""paused_until_s":null"#),
        "{will}"
    );
    let orders = std::fs::read_dir(fake.path("k/run/orders")).unwrap().flatten();
    assert_eq!(orders.filter(|o| o.path().extension().is_some_and(|x| x == "order")).count(), 0);
}

#[test]
fn one_layer_is_a_climb_of_the_running_agent_and_recorded_as_such() {
    let fake = Fake::new();
    fake.start_gateway();
    fake.koboshi(&["accept"]).code(0);
    let _agent = Agent::start(&fake);
    // A node that serves is not interrupted by a word.
    fake.koboshi(&["recover", "--only", "restart"]).code(1).says("it serves and its disk is whole");
    fake.koboshi(&["recover", "--only", "in-place"]).code(1).says("nothing on the disk");
    std::fs::write(fake.package().join("node_modules/ws/index.js"), "").unwrap();
    let (object, code) = fake.json(&["recover", "--only", "restore"]);
    assert_eq!(
        (code, &object["outcome"], &object["layer"]),
        (0, &json!("recovered"), &json!("restore")),
        "{object}"
    );
    let id = object["incident"].to_string();
    fake.koboshi(&["incidents", "show", &id]).code(0).says("(restore only): asked for by hand");
    assert!(fake.gateway().is_some());
    nothing_is_left(&fake);
}

#[test]
fn who_asks_for_one_layer_may_go_away_and_the_agent_goes_on() {
    let fake = Fake::new();
    fake.start_gateway();
    fake.koboshi(&["accept"]).code(0);
    let _agent = Agent::start(&fake);
    std::fs::write(fake.package().join("node_modules/ws/index.js"), "").unwrap();
    let person = begin(&fake, &["recover", "--only", "restore"]);
    until(&fake, "asked", |s| s["agent"]["doing"].is_string() || s["incidents"][0]["outcome"] == "recovered");
    let _ = person.signal(Signal::INT);
    until(&fake, "recovered", |s| s["incidents"][0]["outcome"] == "recovered" && s["verdict"] == "serving");
    nothing_is_left(&fake);
}

#[test]
fn without_an_agent_one_layer_ends_with_the_command_and_leaves_nothing_held() {
    let fake = Fake::new();
    fake.start_gateway();
    fake.koboshi(&["accept"]).code(0);
    fake.kill_gateway();
    let person = begin(&fake, &["recover", "--only", "restart"]);
    let status = until(&fake, "guarded", |s| s["agent"]["running"] == true);
    let agent = ProcessId::of(u32::try_from(status["agent"]["pid"].as_u64().unwrap()).unwrap()).unwrap();
    let fd = agent.open().unwrap();
    // Killed, as a closed terminal or an impatient script would: it cannot clean up.
    let _ = person.signal(Signal::KILL);
    assert!(fd.wait(Deadline::after(PATIENCE)), "the agent outlives the command that began it");
    nothing_is_left(&fake);
    // And it can be asked again, at once.
    let (object, code) = fake.json(&["recover", "--only", "restart"]);
    assert!(code == 0 || object["error"]["why"].to_string().contains("it serves"), "{object}");
    assert!(fake.gateway().is_some());
}

#[test]
fn one_layer_that_fails_without_an_agent_is_all_that_is_tried() {
    let fake = Fake::new();
    fake.start_gateway();
    fake.koboshi(&["accept"]).code(0);
    fake.kill_gateway();
    fake.ails(true);
    let (object, code) = fake.json(&["recover", "--only", "restart"]);
    assert_eq!((code, &object["outcome"]), (1, &json!("failed")), "{object}");
    let (object, _) = fake.json(&["incidents", "show", &object["incident"].to_string()]);
    let lines = object["incident"]["lines"].to_string();
    assert!(lines.contains("(restart only)") && !lines.contains("restore: work begins"), "{lines}");
    assert!(!lines.contains("emergency"), "one layer is not every way of recovery: {lines}");
}

#[test]
fn damage_that_nothing_mends_is_told_as_that_and_waiting_for_it_costs_nothing() {
    let fake = Fake::new();
    fake.start_gateway();
    let agent = Agent::start(&fake);
    let id = ProcessId::of(agent.child.id()).unwrap();
    // What it costs to watch a node that is well...
    let idle_ms = cpu_of_three_seconds(id);
    assert!(idle_ms < 700, "{idle_ms} ms of CPU in 3 s of rest");
    // ... and one whose program is damaged while no snapshot is good yet.
    std::fs::write(fake.package().join("node_modules/ws/index.js"), "").unwrap();
    std::fs::write(fake.package().join("dist/entry.js"), "").unwrap();
    let status = until(&fake, "told", |s| {
        s["agent"]["doing"].as_str().is_some_and(|d| d.contains("could not be mended"))
    });
    assert_eq!(status["verdict"], "serving", "{status}");
    assert_eq!(status["incidents"][0]["outcome"], "open", "{status}");
    fake.koboshi(&["status"]).code(0).says("the node serves, the damage could not be mended; tried again in");
    let waiting_ms = cpu_of_three_seconds(id);
    assert!(waiting_ms < 700, "{waiting_ms} ms of CPU in 3 s of an incident that waits");
    let told = || std::fs::read_to_string(fake.koboshi_state().join("alerts.txt")).unwrap_or_default();
    let deadline = Deadline::after(PATIENCE);
    while !told().contains("damage on its disk could not be mended") {
        assert!(!deadline.passed(), "{}", told());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(told().contains("is damaged and still serves"), "{}", told());
    assert!(!told().contains("is down") && !told().contains("still down"), "{}", told());
}

#[test]
fn state_that_goes_on_changing_is_taken_again_and_again_and_by_the_next_agent_too() {
    let fake = Fake::new();
    fake.configure("[backup]\nstate_every_least_s = 1\nstate_every_most_s = 2\nsettle_s = 1\n");
    fake.start_gateway();
    let taken = |fake: &Fake| {
        let (object, _) = fake.json(&["snapshot", "list"]);
        let all = object["snapshots"].as_array().cloned().unwrap_or_default();
        all.iter().filter(|s| s["note"] == "daily operation").count()
    };
    let next = |fake: &Fake, n: usize| {
        let before = taken(fake);
        // One place after the other, also deep ones.
        let place = ["credentials", "workspace/notes/deep", "agents/main/sessions/old"][n % 3];
        std::fs::create_dir_all(fake.state().join(place)).unwrap();
        std::fs::write(fake.state().join(place).join(n.to_string()), "new").unwrap();
        let deadline = Deadline::after(PATIENCE);
        while taken(fake) <= before {
            let log = std::fs::read_to_string(fake.path("agent.log")).unwrap_or_default();
            assert!(!deadline.passed(), "change {n} was never taken\n{log}");
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let agent = Agent::start(&fake);
    until(&fake, "settled", |s| s["agent"]["settled"] == true);
    for n in 1..=6 {
        next(&fake, n);
    }
    agent.kill();
    // What was written while no agent lived is taken by the next one.
    std::fs::write(fake.state().join("credentials/3"), "new").unwrap();
    let before = taken(&fake);
    let _agent = Agent::start(&fake);
    let deadline = Deadline::after(PATIENCE);
    while taken(&fake) <= before {
        assert!(!deadline.passed(), "what changed without an agent was never taken");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// What reached the file of messages on this machine.
fn told(fake: &Fake, text: &str) -> usize {
    let all = std::fs::read_to_string(fake.koboshi_state().join("alerts.txt")).unwrap_or_default();
    all.matches(text).count()
}

fn wait_told(fake: &Fake, text: &str) {
    let deadline = Deadline::after(PATIENCE);
    while told(fake, text) == 0 {
        let log = || std::fs::read_to_string(fake.path("agent.log")).unwrap_or_default();
        assert!(!deadline.passed(), "never told: {text}\n{}", log());
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_pause_that_ran_out_and_a_file_that_went_are_told_once() {
    let fake = Fake::new();
    fake.configure("[backup]\nstate_every_least_s = 1\nstate_every_most_s = 2\nsettle_s = 1\n");
    let old = fake.state().join("workspace/notes/old.md");
    std::fs::create_dir_all(old.parent().unwrap()).unwrap();
    std::fs::write(&old, "of last year").unwrap();
    let year = rustix::fs::Timespec { tv_sec: 1_700_000_000, tv_nsec: 0 };
    let times = rustix::fs::Timestamps { last_access: year, last_modification: year };
    rustix::fs::utimensat(rustix::fs::CWD, &old, &times, rustix::fs::AtFlags::empty()).unwrap();
    fake.start_gateway();
    let _agent = Agent::start(&fake);
    until(&fake, "good", |s| s["snapshots"]["newest_good"].is_string());
    fake.koboshi(&["pause", "--for", "2s"]).code(0);
    std::fs::write(fake.state().join("workspace/scratch"), "x").unwrap();
    std::fs::remove_file(&old).unwrap();
    wait_told(&fake, "a file of the last backup is gone");
    assert_eq!(told(&fake, &old.display().to_string()), 1);
    wait_told(&fake, "guards");
    assert!(!old.exists(), "only told, never put back");
    // A second one the same day, and a pause that is ended by hand, are no news.
    fake.koboshi(&["pause", "--for", "1h"]).code(0);
    fake.koboshi(&["resume"]).code(0);
    let count = |fake: &Fake| fake.json(&["snapshot", "list"]).0["snapshots"].as_array().map_or(0, Vec::len);
    let before = count(&fake);
    std::fs::write(fake.state().join("workspace/scratch"), "y!").unwrap();
    let deadline = Deadline::after(PATIENCE);
    while count(&fake) <= before {
        assert!(!deadline.passed(), "no further snapshot");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(told(&fake, "guards"), 1);
    assert_eq!(told(&fake, "a file of the last backup is gone"), 1);
}

#[test]
fn status_tells_the_agents_word_while_it_is_fresh_and_check_always_looks() {
    let fake = Fake::new();
    fake.start_gateway();
    let agent = Agent::start(&fake);
    let (object, code) = fake.json(&["status"]);
    assert_eq!((code, &object["judged_by"]), (0, &json!("agent")), "{object}");
    fake.koboshi(&["status"]).code(0).says("judged     by the agent, confirmed");
    // It knows something that no single look shows. From here on it publishes nothing by itself.
    agent.fd.signal(Signal::STOP).unwrap();
    let file = fake.path("k/run/status.json");
    let spoken: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let now = host::clock::now();
    let say = |age_ms: u64, verdict: &Value| {
        let mut word = spoken.clone();
        word["at"] = json!({"boot": now.boot, "ms": now.ms - age_ms});
        word["verdict"] = verdict.clone();
        std::fs::write(&file, word.to_string()).unwrap();
    };
    let unsteady = json!({"verdict": "inconclusive", "why": "it answers now and then"});
    let down = json!({"verdict": "not-serving", "why": "wrong for a minute"});
    say(1_000, &unsteady);
    let (object, code) = fake.json(&["status"]);
    assert_eq!(
        (code, &object["verdict"], &object["judged_by"]),
        (3, &json!("inconclusive"), &json!("agent"))
    );
    fake.koboshi(&["status"]).code(3).says("it answers now and then").says("judged     by the agent\n");
    say(60_000, &down);
    fake.koboshi(&["status"]).code(1).says("wrong for a minute");
    fake.koboshi(&["check"]).code(0).says("serving");
    // Too old, or of a process that is gone: looked at here.
    say(120_000, &down);
    let (object, code) = fake.json(&["status"]);
    assert_eq!((code, &object["verdict"], &object["judged_by"]), (0, &json!("serving"), &json!("look")));
    fake.koboshi(&["status"]).code(0).says("the agent has been silent for over 90 s");
    say(1_000, &down);
    agent.fd.signal(Signal::CONT).unwrap();
    agent.kill();
    std::fs::write(&file, {
        let mut word = spoken.clone();
        word["verdict"] = down;
        word.to_string()
    })
    .unwrap();
    let (object, code) = fake.json(&["status"]);
    assert_eq!((code, &object["judged_by"]), (0, &json!("look")), "{object}");
}

/// CPU time of the agent itself and of its steps that ended, over three seconds.
fn cpu_of_three_seconds(agent: ProcessId) -> u64 {
    let used = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", agent.pid)).unwrap();
        let fields: Vec<u64> =
            stat.rsplit(')').next().unwrap().split_whitespace().map(|f| f.parse().unwrap_or(0)).collect();
        // utime, stime, cutime and cstime, in hundredths of a second.
        fields[11..15].iter().sum::<u64>() * 10
    };
    let before = used();
    std::thread::sleep(Duration::from_secs(3));
    used() - before
}

#[test]
fn a_torn_description_of_the_node_keeps_nobody_from_guarding_it() {
    let fake = Fake::new();
    fake.start_gateway();
    fake.koboshi(&["accept"]).code(0);
    let file = fake.koboshi_state().join("node.json");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, br#"{"name"#).unwrap();
    fake.koboshi(&["status"]).code(0);
    let _agent = Agent::start(&fake);
    until(&fake, "served again", |s| s["verdict"] == "serving");
    let log = std::fs::read_to_string(fake.path("agent.log")).unwrap();
    assert!(log.contains("read the remembered node"), "{log}");
    let node = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap()["package_dir"].clone();
    assert_eq!(node(&std::fs::read(&file).unwrap()), node(&whole));
}

#[test]
fn an_agent_begins_where_nothing_can_be_written_anew() {
    let fake = Fake::new();
    fake.start_gateway();
    fake.koboshi(&["accept"]).code(0);
    let file = fake.koboshi_state().join("node.json");
    let of = |path: &std::path::Path| std::os::unix::fs::MetadataExt::ino(&path.metadata().unwrap());
    let before = of(&file);
    let _agent = Agent::start(&fake);
    until(&fake, "served", |s| s["verdict"] == "serving");
    assert_eq!(of(&file), before, "what is remembered already is not written again");
}

/// A process of the test's own, ended with it.
struct Ended(ProcessId);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.signal(Signal::KILL);
    }
}

/// Somebody in the program's directory, and perhaps with a file of it open for writing.
#[allow(clippy::zombie_processes, reason = "it is ended by its identity; a zombie counts as gone")]
fn somebody(fake: &Fake, writes: Option<&str>) -> Ended {
    let mut command = std::process::Command::new("sleep");
    command.arg("600").current_dir(fake.package());
    if let Some(file) = writes {
        command.stdout(std::fs::File::create(fake.package().join(file)).unwrap());
    }
    Ended(ProcessId::of(command.spawn().unwrap().id()).unwrap())
}

fn incidents(fake: &Fake) -> usize {
    let (object, _) = fake.json(&["incidents", "list"]);
    object["incidents"].as_array().unwrap().len()
}

#[test]
fn a_shell_left_in_the_programs_directory_keeps_nobody_down() {
    let fake = Fake::new();
    fake.configure("[judge]\nupdate_stalled_ms = 2000\n");
    fake.start_gateway();
    fake.koboshi(&["accept"]).code(0);
    let _agent = Agent::start(&fake);
    // As somebody's terminal does that was left there after a look around.
    let _shell = somebody(&fake, None);
    fake.kill_gateway();
    until(&fake, "recovered", |s| s["incidents"][0]["outcome"] == "recovered" && s["verdict"] == "serving");
    assert_eq!(incidents(&fake), 1, "nothing was waited for");
}

#[test]
fn an_update_that_does_not_move_is_waited_for_once_and_then_climbed_over() {
    let fake = Fake::new();
    fake.configure("[judge]\nupdate_stalled_ms = 2000\n");
    fake.start_gateway();
    fake.koboshi(&["accept"]).code(0);
    let _agent = Agent::start(&fake);
    let _writer = somebody(&fake, Some("being-written.js"));
    fake.kill_gateway();
    // The judge's patience with it is over after 2 s.
    until(&fake, "recovered", |s| s["incidents"][0]["outcome"] == "recovered" && s["verdict"] == "serving");
    let log = std::fs::read_to_string(fake.path("agent.log")).unwrap();
    assert_eq!(log.matches("left alone: an update is at work").count(), 1, "{log}");
    assert_eq!(incidents(&fake), 2, "each has a message of its own");
}

#[test]
fn that_there_is_no_good_copy_is_told_although_the_program_is_damaged() {
    let fake = Fake::new();
    fake.configure("[backup]\nstale_after_s = 2\n");
    fake.start_gateway();
    std::fs::write(fake.package().join("dist/entry.js"), "").unwrap();
    let _agent = Agent::start(&fake);
    wait_told(&fake, "has no recent good backup");
    assert_eq!(told(&fake, "has no recent good backup"), 1);
}

#[test]
fn what_the_user_writes_is_taken_and_trusted_although_the_program_is_damaged() {
    let fake = Fake::new();
    fake.configure("[backup]\nstate_every_least_s = 1\nstate_every_most_s = 2\nsettle_s = 1\n");
    // Nothing may mend it.
    let config = std::fs::read_to_string(fake.config()).unwrap();
    std::fs::write(fake.config(), config.replace("\"user-install\"]", "\"user-install\", \"in-place\"]"))
        .unwrap();
    fake.start_gateway();
    fake.koboshi(&["accept"]).code(0);
    let _agent = Agent::start(&fake);
    until(&fake, "settled", |s| s["agent"]["settled"] == true);
    std::fs::write(fake.package().join("dist/entry.js"), "").unwrap();
    until(&fake, "held", |s| s["agent"]["doing"].as_str().is_some_and(|d| d.contains("could not be mended")));
    let newest_good = |s: &Value| s["snapshots"]["newest_good"].as_str().unwrap_or_default().to_owned();
    let before = newest_good(&fake.json(&["status"]).0);
    std::fs::write(fake.state().join("workspace/later.md"), "written on a damaged node").unwrap();
    let status = until(&fake, "taken and trusted", |s| newest_good(s) != before);
    let age = |class: &str| status["snapshots"]["good_age_s"][class].as_u64().unwrap();
    assert!(age("workspace") < age("program"), "{status}");
    // The damaged program is in none of them: what is good still holds the whole one.
    let (object, _) = fake.json(&["snapshot", "list"]);
    let notes = object["snapshots"].to_string();
    assert!(notes.contains("daily operation"), "{notes}");
    assert_eq!(std::fs::read(fake.package().join("dist/entry.js")).unwrap(), b"");
    let id = newest_good(&status);
    fake.koboshi(&["snapshot", "verify", &id]).code(0);
    let config = std::fs::read_to_string(fake.config()).unwrap();
    std::fs::write(fake.config(), config.replace(", \"in-place\"]", "]")).unwrap();
    fake.kill_gateway();
    until(&fake, "recovered", |s| s["incidents"][0]["outcome"] == "recovered" && s["verdict"] == "serving");
    assert!(std::fs::read(fake.package().join("dist/entry.js")).unwrap().len() > 3_000);
    assert!(fake.state().join("workspace/later.md").exists());
}

#[test]
fn a_program_that_was_damaged_at_the_first_copy_is_taken_once_it_is_whole() {
    let fake = Fake::new();
    fake.configure("[backup]\nstate_every_least_s = 1\nstate_every_most_s = 2\nsettle_s = 1\n");
    fake.start_gateway();
    let entry = fake.package().join("dist/entry.js");
    let whole = std::fs::read(&entry).unwrap();
    std::fs::write(&entry, "").unwrap();
    let _agent = Agent::start(&fake);
    let holds = |s: &Value, class: &str| s["snapshots"]["good_age_s"][class].is_u64();
    let status = until(&fake, "the user's things trusted", |s| holds(s, "workspace"));
    assert!(!holds(&status, "program"), "a damaged program is no copy: {status}");
    // Its owner installs it again, over the gateway that runs.
    std::fs::write(&entry, whole).unwrap();
    until(&fake, "the program trusted", |s| holds(s, "program"));
}

#[test]
fn how_the_gateway_ended_is_known_before_anything_is_looked_at() {
    // The agent's own child: it is told how that ends.
    let fake = Fake::new();
    let _agent = Agent::start(&fake);
    // It is opened while it still dies; what holds its port and its databases then is nobody else's.
    fake.kill_gateway();
    let status = until(&fake, "recovered", |s| {
        s["incidents"][0]["outcome"] == "recovered" && s["verdict"] == "serving"
    });
    let id = status["incidents"][0]["id"].to_string();
    let (object, _) = fake.json(&["incidents", "show", &id]);
    let lines: Vec<String> =
        object["incident"]["lines"].as_array().unwrap().iter().map(|l| l["what"].to_string()).collect();
    let at = |words: &str| lines.iter().position(|l| l.contains(words));
    assert!(at("signal 9 ended it").is_some() && at("signal 9 ended it") < at("climb 1"), "{lines:#?}");
    assert!(!lines.iter().any(|l| l.contains("holds port")), "{lines:#?}");
}
