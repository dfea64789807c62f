//! `koboshi node`, `koboshi accept` and a running agent.

use crate::fake::Fake;
use host::clock::Deadline;
use host::files::LockFile;
use host::process::{PidFd, ProcessId};
use serde_json::json;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub const PATIENCE: Duration = Duration::from_secs(40);

/// A running agent; ended with the test.
pub struct Agent {
    pub child: std::process::Child,
    pub fd: PidFd,
}

impl Agent {
    /// Starts one and waits until it has judged that the node serves.
    pub fn start(fake: &Fake) -> Agent {
        let agent = Agent::launch(fake);
        agent.serves(fake);
        agent
    }

    fn serves(&self, fake: &Fake) {
        let deadline = Deadline::after(PATIENCE);
        loop {
            let (object, _) = fake.json(&["status"]);
            if object["agent"]["confirmed"] == true && object["verdict"] == "serving" {
                return;
            }
            let log = || std::fs::read_to_string(fake.path("agent.log")).unwrap_or_default();
            assert!(!deadline.passed() && !self.fd.exited(), "{object}\n{}", log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Starts one and waits for nothing.
    pub fn launch(fake: &Fake) -> Agent {
        let cmd = fake.command(&["guard"]);
        let mut command = std::process::Command::new(&cmd.program);
        command.args(&cmd.args).env_clear().envs(cmd.env);
        let log = std::fs::File::options().create(true).append(true).open(fake.path("agent.log")).unwrap();
        let child = command.stdin(std::process::Stdio::null()).stderr(log).spawn().unwrap();
        let fd = ProcessId::of(child.id()).unwrap().open().unwrap();
        Agent { child, fd }
    }

    /// As a crash ends it: nothing is tidied up.
    pub fn kill(self) {
        self.fd.signal(rustix::process::Signal::KILL).unwrap();
        assert!(self.fd.wait(Deadline::after(PATIENCE)));
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.fd.signal(rustix::process::Signal::TERM);
        if !self.fd.wait(Deadline::after(PATIENCE)) {
            let _ = self.fd.signal(rustix::process::Signal::KILL);
        }
        let _ = self.child.try_wait();
    }
}

#[test]
fn started_stopped_and_restarted_without_an_agent() {
    let fake = Fake::new();
    let (object, code) = fake.json(&["node", "start"]);
    assert_eq!((code, &object["verdict"]), (0, &json!("serving")), "{object}");
    let first = fake.gateway().unwrap();
    assert_eq!(object["pid"], json!(first.pid));
    let (object, code) = fake.json(&["node", "restart"]);
    assert_eq!(code, 0, "{object}");
    let second = fake.gateway().unwrap();
    assert_ne!(first, second);
    let (object, code) = fake.json(&["node", "stop"]);
    assert_eq!((code, &object["done"]), (0, &json!("stop")), "{object}");
    assert_eq!(fake.gateway(), None);
    assert!(!second.alive());
    let (object, code) = fake.json(&["status"]);
    assert_eq!(code, 1);
    assert!(object["hands_off"].as_str().unwrap().contains("koboshi node start"));
}

#[test]
fn a_stop_ends_a_gateway_that_somebody_else_started_and_only_that() {
    let fake = Fake::new();
    let other = Fake::new();
    let (ours, theirs) = (fake.start_gateway(), other.start_gateway());
    fake.koboshi(&["node", "stop"]).code(0).says("stays down");
    assert!(!ours.alive() && theirs.alive());
}

#[test]
fn with_an_agent_the_agent_does_it_and_a_stop_stays_stopped() {
    let fake = Fake::new();
    let before = fake.start_gateway();
    let agent = Agent::start(&fake);
    assert_eq!(fake.gateway(), Some(before), "a running gateway is adopted as it is");
    fake.koboshi(&["status"]).code(0).says(&format!("process {}", agent.child.id())).says("guard mode");
    let said = fake.koboshi(&["guard"]);
    said.code(2).says("another koboshi agent");

    fake.koboshi(&["node", "stop"]).code(0);
    assert_eq!(fake.gateway(), None);
    let (object, code) = fake.json(&["status"]);
    assert_eq!(code, 1, "{object}");
    assert!(object["hands_off"].is_string(), "{object}");
    let (object, code) = fake.json(&["node", "start"]);
    assert_eq!((code, &object["verdict"]), (0, &json!("serving")), "{object}");
    let running = fake.gateway().unwrap();

    // The agent goes, the gateway stays.
    fake.koboshi(&["uninstall"]).code(0).says("ends the agent");
    assert!(agent.fd.wait(Deadline::after(PATIENCE)));
    assert_eq!(fake.gateway(), Some(running));
}

#[test]
fn what_is_accepted_is_trusted_and_what_is_down_is_not_accepted() {
    let fake = Fake::new();
    fake.koboshi(&["accept"]).code(1).says("does not serve").says("fix:");
    fake.start_gateway();
    let (object, code) = fake.json(&["accept"]);
    assert_eq!((code, &object["trust"]), (0, &json!("good")), "{object}");
    let (object, _) = fake.json(&["status"]);
    assert!(object["snapshots"]["newest_good"].is_string(), "{object}");
    let layers = object["layers"].as_array().unwrap();
    assert_eq!(layers.iter().find(|l| l["layer"] == "restore").unwrap()["ready"], true);
}

#[test]
fn the_next_agent_waits_for_one_that_is_dying() {
    let fake = Fake::new();
    fake.start_gateway();
    let dir = fake.path("k/run");
    host::files::make_private_dir(&dir).unwrap();
    // A killed process is seen to be dead before the kernel has closed its files.
    let dying = LockFile::try_take(&dir.join("agent.lock")).unwrap().unwrap();
    let agent = Agent::launch(&fake);
    std::thread::sleep(Duration::from_millis(700));
    assert!(!agent.fd.exited());
    drop(dying);
    agent.serves(&fake);
}

#[test]
fn what_is_deleted_while_it_is_accepted_is_not_trusted() {
    let fake = Fake::new();
    fake.start_gateway();
    let trusted = || fake.json(&["status"]).0["snapshots"]["newest_good"].clone();
    let of_program = fake.package().join("dist/many");
    let of_user = fake.state().join("workspace/many");
    for (tree, words) in
        [(of_program, "differences from the candidate"), (of_user, "deleted while the copy was taken")]
    {
        let file = |n: u32| tree.join(format!("{n:05}.md"));
        std::fs::create_dir(&tree).unwrap();
        (0..MANY).for_each(|n| std::fs::write(file(n), "x").unwrap());
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _ended = Ended(&stop);
            scope.spawn(|| {
                for n in (0..MANY).take_while(|_| !stop.load(Ordering::Relaxed)) {
                    std::fs::remove_file(file(n)).unwrap();
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            fake.koboshi(&["accept"]).code(1).says(words).says("run koboshi accept again");
        });
        assert!(file(MANY - 1).exists(), "all was gone before it was accepted");
        assert_eq!(trusted(), serde_json::Value::Null);
    }
    // Once it is still, it is taken.
    fake.koboshi(&["accept"]).code(0);
    assert!(trusted().is_string());
}

/// Deleting so many, one in a millisecond, outlasts what is tried meanwhile.
const MANY: u32 = 40_000;

/// Tells the other threads of a test that it is over, however it ends.
struct Ended<'a>(&'a AtomicBool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
