//! The weaker way, forced: what it promises it does, what it cannot prove to be its own it leaves alone.
//!
//! One test at a time: to be an orphan of unknown origin is something that only one step at once can claim.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // Helpers of tests, outside any one test.

mod container_common;

use container_common::{Node, shell, soon, token, until, with_token};
use host::clock::Deadline;
use host::container::{Containers, Ended, Step};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn node() -> Node {
    Node::new(|name, run| Containers::open_weak(name, run, "test").unwrap())
}

fn start(node: &Node, script: &str, token: &str) -> Step {
    let script = script.replace("@T", token);
    node.containers.spawn(&shell(&script, &format!("m-{token}")), "s").unwrap()
}

const ESCAPES: [(&str, &str); 6] = [
    ("a child", "sleep @T & sleep @T"),
    ("a new session", "setsid sleep @T & exec sleep @T"),
    ("a double fork that keeps its environment", "(setsid sleep @T &) ; exit 0"),
    ("a double fork with a new session and no environment", "(env -i setsid sleep @T &) ; exec sleep 1000"),
    ("the same, its parents gone", "(env -i setsid sleep @T &) ; exit 0"),
    ("signals ignored", "trap '' TERM HUP INT QUIT; sleep @T & while :; do sleep @T; done"),
];

#[test]
fn a_step_alone_takes_everything_with_it() {
    let _one = alone();
    let node = node();
    for (what, script) in ESCAPES {
        let token = token();
        let mut step = start(&node, script, &token);
        until(what, || !with_token(&token).iter().all(|p| *p == step.id()));
        let emptied = step.kill(soon()).unwrap();
        assert!(emptied.killed >= 1, "{what}");
        assert_eq!(emptied.how, "session, subreaper and mark");
        assert_eq!(with_token(&token), [], "{what} got away");
    }
}

#[test]
fn a_fork_chain_within_its_session_is_ended() {
    let _one = alone();
    let node = node();
    let (hop, trace) = (node.dir.path().join("hop"), node.dir.path().join("trace"));
    std::fs::write(&hop, format!("echo >> {}\nsh {} &\nexit 0\n", trace.display(), hop.display())).unwrap();
    let hops = || std::fs::metadata(&trace).map_or(0, |m| m.len());
    let mut step = node.containers.spawn(&shell(&format!("sh {}", hop.display()), "m-hop"), "s").unwrap();
    assert_eq!(step.wait(soon()), Ended::Exited(0));
    until("hopping", || hops() > 20);
    step.kill(soon()).unwrap();
    let at_the_end = hops();
    // A hop takes about a millisecond.
    let watched = Deadline::after(Duration::from_millis(100));
    while !watched.passed() {
        assert_eq!(hops(), at_the_end, "a hopper got away");
    }
}

#[test]
fn with_a_gateway_beside_it_an_unmarked_orphan_is_not_claimed() {
    let _one = alone();
    let node = node();
    let (gateway, daemon, theirs) = (token(), token(), token());
    // The gateway's own detached helper, unmarked and younger than the step: it looks just like a step's escape.
    let go = node.dir.path().join("go");
    let script = format!(
        "while [ ! -e {} ]; do sleep 0.01; done; (env -i setsid sleep {daemon} &) ; exec sleep {gateway}",
        go.display()
    );
    let began = node.containers.spawn_gateway(&shell(&script, "g")).unwrap();
    let mut step = start(&node, "sleep @T & exec sleep @T", &theirs);
    until("the step", || with_token(&theirs).len() == 2);
    std::fs::write(&go, "").unwrap();
    until("the gateway and its helper", || with_token(&gateway).len() == 1 && with_token(&daemon).len() == 1);
    step.kill(soon()).unwrap();
    assert_eq!(with_token(&theirs), []);
    assert_eq!(with_token(&gateway), [began.0]);
    assert_eq!(with_token(&daemon).len(), 1, "never somebody else's process");
    // Alone again, it is plain whose the helper is.
    node.containers.kill_gateway(soon()).unwrap();
    assert_eq!((with_token(&gateway), with_token(&daemon)), (vec![], vec![]));
    assert_eq!(began.1.reap(), Some(Ended::Signaled(9)));
}

#[test]
fn an_escape_that_was_seen_before_it_escaped_is_known() {
    let _one = alone();
    let node = node();
    let (gateway, token) = (token(), token());
    let (_, pidfd) = node.containers.spawn_gateway(&shell(&format!("exec sleep {gateway}"), "g")).unwrap();
    let go = node.dir.path().join("go");
    let script = format!(
        "(env -i setsid sleep @T; true) & while [ ! -e {} ]; do sleep 0.01; done; kill -9 $!",
        go.display()
    );
    let mut step = start(&node, &script, &token);
    until("the sleeper", || with_token(&token).len() == 1);
    // While it is waited for, its processes are taken note of.
    assert_eq!(step.wait(Deadline::after(Duration::from_millis(1_100))), Ended::TimedOut);
    std::fs::write(&go, "").unwrap();
    assert!(matches!(step.wait(soon()), Ended::Exited(_)));
    step.kill(soon()).unwrap();
    assert_eq!(with_token(&token), []);
    assert_eq!(with_token(&gateway).len(), 1);
    node.containers.kill_gateway(soon()).unwrap();
    let _ = pidfd.reap();
}

#[test]
fn leftovers_of_a_dead_agent_are_known_by_their_mark() {
    let _one = alone();
    let node = node();
    let token = token();
    let step = start(&node, "(setsid sleep @T &) ; exec sleep @T", &token);
    until("two sleepers", || with_token(&token).len() == 2);
    drop(step);
    let next = Containers::open_weak(&node.name, &node.run_dir(), "next agent").unwrap();
    assert_eq!(next.leftovers(), ["s"]);
    assert!(next.spawn(&shell("exit 0", "m"), "s").is_err(), "not before they are killed");
    next.kill("s", soon()).unwrap();
    assert_eq!(with_token(&token), []);
    assert!(next.leftovers().is_empty());
}

#[test]
fn what_does_not_die_in_time_is_named() {
    let _one = alone();
    let node = node();
    let token = token();
    let mut step = start(&node, "exec sleep @T", &token);
    until("the sleeper", || with_token(&token).len() == 1);
    let passed = Deadline::after(Duration::ZERO);
    match step.kill(passed) {
        Ok(_) => {}
        Err(e) => {
            assert_eq!(e.kind, host::Kind::TimedOut);
            assert!(e.why.contains(&step.id().pid.to_string()), "{e}");
        }
    }
    step.kill(soon()).unwrap();
    assert_eq!(with_token(&token), []);
}

#[test]
fn orphans_are_reaped_and_nobodys_status_is_stolen() {
    let _one = alone();
    let node = node();
    let token = token();
    // As PID 1 would be, this process is made subreaper by the weak containers.
    let mut step = start(&node, "(sleep 0.01 &) ; (exit 5)", &token);
    until("a zombie of ours", || host::process::stat_of(step.id().pid).is_some_and(|s| s.state == 'Z'));
    let mut reaped = Vec::new();
    until("the orphan", || {
        reaped.extend(host::reap::orphans());
        !reaped.is_empty()
    });
    assert!(!reaped.contains(&step.id().pid));
    assert_eq!(step.wait(soon()), Ended::Exited(5), "the status was left for us");
    step.kill(soon()).unwrap();
}

#[test]
fn an_adopted_childs_status_is_kept() {
    let _one = alone();
    let node = node();
    let token = token();
    // An orphan that comes to us, as the gateway of an agent that replaced its program is our child without our knowing.
    let mut step = start(&node, "(setsid sh -c 'sleep @T; exit 4' &) ; exit 0", &token);
    until("the orphan", || {
        with_token(&token).iter().any(|p| p.stat().is_some_and(|s| s.ppid != step.id().pid))
    });
    let sleeper = with_token(&token).into_iter().find(|p| p.cmdline().len() == 2).unwrap();
    let shell = host::process::ProcessId::of(sleeper.stat().unwrap().ppid).unwrap();
    until("ours", || shell.stat().is_some_and(|s| s.ppid == std::process::id()));
    let adopted = shell.open().unwrap();
    adopted.keep();
    sleeper.signal(rustix::process::Signal::KILL).unwrap();
    assert!(adopted.wait(soon()));
    assert!(!host::reap::orphans().contains(&shell.pid));
    assert_eq!(adopted.reap(), Some(Ended::Exited(4)));
    step.kill(soon()).unwrap();
}
