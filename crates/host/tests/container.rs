//! Containers on this host, whatever it offers: with cgroup v2 nothing gets away; without, each test asks for what the
//! weaker way promises and says so on its output.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // Helpers of tests, outside any one test.

mod container_common;

use container_common::{Node, shell, soon, token, until, with_output, with_token};
use host::Kind;
use host::clock::Deadline;
use host::container::{Containers, Ended, Ids, Limits, Spec, Strength};
use host::process::ProcessId;
use host::run::{Cmd, run};
use std::time::Duration;

fn node() -> Node {
    Node::new(|name, run| Containers::open(name, run).unwrap())
}

/// Whether the kernel holds containers together here; when not, says what is left out.
fn strong(node: &Node, left_out: &str) -> bool {
    match node.containers.strength() {
        Strength::CgroupV2 { .. } => true,
        Strength::Weak { why } => {
            println!("left out, weak containers only ({why}): {left_out}");
            false
        }
    }
}

#[test]
fn root_with_cgroup_v2_gets_strong_containers() {
    let mounted = std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(" - cgroup2 ");
    let node = node();
    match node.containers.strength() {
        Strength::CgroupV2 { .. } => assert!(mounted),
        Strength::Weak { why } => {
            assert!(!why.is_empty());
            println!("weak: {why}");
        }
    }
}

#[test]
fn a_step_ends_with_its_status_and_leaves_nothing() {
    let node = node();
    let mut step = node.containers.spawn(&shell("exit 7", "m-status"), "s").unwrap();
    assert_eq!(step.wait(soon()), Ended::Exited(7));
    assert_eq!(step.wait(soon()), Ended::Exited(7), "told as often as asked");
    assert_eq!(node.containers.leftovers(), ["s"], "until it is killed, clean exit or not");
    let emptied = step.kill(soon()).unwrap();
    assert_eq!(emptied.killed, 0);
    assert!(node.containers.leftovers().is_empty());
    assert!(ProcessId::of(step.id().pid) != Some(step.id()), "reaped");
}

#[test]
fn a_signalled_step_says_so_and_a_program_that_is_not_there_is_an_error() {
    let node = node();
    let mut step = node.containers.spawn(&shell("kill -9 $$", "m-sig"), "s").unwrap();
    assert_eq!(step.wait(soon()), Ended::Signaled(9));
    step.kill(soon()).unwrap();
    let spec = Spec { program: "/no/such/program".into(), ..Spec::default() };
    assert_eq!(node.containers.spawn(&spec, "t").unwrap_err().kind, Kind::NotFound);
    assert!(node.containers.leftovers().is_empty());
}

#[test]
fn at_the_deadline_a_step_is_left_running_until_it_is_killed() {
    let node = node();
    let token = token();
    let mut step = node.containers.spawn(&shell(&format!("exec sleep {token}"), "m-dl"), "s").unwrap();
    let deadline = Deadline::after(Duration::from_millis(60));
    assert_eq!(step.wait(deadline), Ended::TimedOut);
    assert!(deadline.passed() && step.id().alive());
    let emptied = step.kill(soon()).unwrap();
    assert_eq!(emptied.killed, 1);
    assert_eq!(step.wait(soon()), Ended::Signaled(9));
}

/// Each of these tries to outlive its step, in one shell line; `T` is the token.
const ESCAPES: [(&str, &str); 6] = [
    ("a child", "sleep @T & sleep @T"),
    ("a new session", "setsid sleep @T & exec sleep @T"),
    (
        "a double fork with a new session and no environment",
        "(env -i setsid sh -c 'sleep @T & exit' &) ; exec sleep @T",
    ),
    ("a double fork whose first process is gone", "(env -i setsid sleep @T &) ; exit 0"),
    ("signals ignored", "trap '' TERM HUP INT QUIT; sleep @T & while :; do sleep @T; done"),
    ("a stopped process", "sh -c 'kill -STOP $$; exit' @T & exec sleep @T"),
];

#[test]
fn nothing_gets_out_of_a_step() {
    let node = node();
    if !strong(&node, "escapes from a step are tried in the weak tests") {
        return;
    }
    for (what, script) in ESCAPES {
        let token = token();
        let script = script.replace("@T", &token);
        let mut step = node.containers.spawn(&shell(&script, &format!("m-{token}")), "s").unwrap();
        until(what, || !with_token(&token).iter().all(|p| *p == step.id()));
        let emptied = step.kill(soon()).unwrap();
        assert!(emptied.killed >= 1, "{what}");
        assert_eq!(emptied.how, "cgroup.kill", "{what}");
        assert_eq!(with_token(&token), [], "{what} got away");
    }
}

#[test]
fn a_process_that_forks_faster_than_one_can_look_is_ended() {
    let node = node();
    if !strong(&node, "a pid hopper in new sessions") {
        return;
    }
    let (hop, trace) = (node.dir.path().join("hop"), node.dir.path().join("trace"));
    let script = format!("echo >> {}\nsetsid sh {} &\nexit 0\n", trace.display(), hop.display());
    std::fs::write(&hop, script).unwrap();
    let hops = || std::fs::metadata(&trace).map_or(0, |m| m.len());
    let mut step = node.containers.spawn(&shell(&format!("sh {}", hop.display()), "m-hop"), "s").unwrap();
    assert_eq!(step.wait(soon()), Ended::Exited(0), "the first has long gone");
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
fn a_bystander_of_the_same_name_and_arguments_survives() {
    let node = node();
    let token = token();
    // Of another container: not of this step.
    let other = Node::new(|name, run| Containers::open(name, run).unwrap());
    let mut bystander = other.containers.spawn(&shell(&format!("exec sleep {token}"), "m-by"), "s").unwrap();
    let mut step =
        node.containers.spawn(&shell(&format!("sleep {token} & exec sleep {token}"), "m-mine"), "s").unwrap();
    until("three sleepers", || with_token(&token).len() == 3);
    step.kill(soon()).unwrap();
    assert_eq!(with_token(&token), [bystander.id()]);
    bystander.kill(soon()).unwrap();
}

#[test]
fn leftovers_of_a_dead_agent_are_killed_by_name() {
    let node = node();
    let token = token();
    let spec = shell(&format!("setsid sleep {token} & exec sleep {token}"), &format!("m-{token}"));
    let step = node.containers.spawn(&spec, "left-behind").unwrap();
    until("two sleepers", || with_token(&token).len() == 2);
    // Another agent, which knows only the names. The first one's handle kills nothing when dropped.
    drop(step);
    let next = Containers::open(&node.name, &node.run_dir()).unwrap();
    assert_eq!(next.leftovers(), ["left-behind"]);
    let again = next.spawn(&spec, "left-behind").unwrap_err();
    assert!(again.why.contains("still holds"), "{again}");
    let emptied = next.kill("left-behind", soon()).unwrap();
    assert!(emptied.killed >= 2);
    assert_eq!(with_token(&token), []);
    assert!(next.leftovers().is_empty());
    assert_eq!(next.kill("left-behind", soon()).unwrap().killed, 0, "gone is empty");
    assert_eq!(next.kill("never-was", soon()).unwrap().killed, 0);
    host::reap::orphans();
}

#[test]
fn what_left_the_cgroup_is_found_by_its_mark() {
    let node = node();
    if !strong(&node, "moving out of a cgroup") || !rustix::process::geteuid().is_root() {
        return;
    }
    let Some(gateway) = node.containers.gateway_cgroup() else { return };
    let top = gateway.parent().unwrap().join("cgroup.procs");
    let token = token();
    let script = format!("sh -c 'echo 0 > {} && exec sleep {token}' & exec sleep {token}", top.display());
    let mut step = node.containers.spawn(&shell(&script, &format!("m-{token}")), "s").unwrap();
    until("one outside", || {
        std::fs::read_to_string(&top).is_ok_and(|t| !t.is_empty()) && with_token(&token).len() == 2
    });
    let emptied = step.kill(soon()).unwrap();
    assert_eq!(emptied.killed, 2);
    assert_eq!(with_token(&token), []);
}

#[test]
fn the_gateway_outlives_steps_and_is_ended_by_its_own_container() {
    let node = node();
    let token = token();
    let spec = shell(&format!("setsid sleep {token} & exec sleep {token}"), &format!("g-{token}"));
    let (id, pidfd) = node.containers.spawn_gateway(&spec).unwrap();
    until("gateway and its child", || with_token(&token).len() == 2);
    assert!(node.containers.spawn_gateway(&spec).is_err(), "never two gateways");
    let mut step = node.containers.spawn(&shell("sleep 1000", "m-s"), "s").unwrap();
    step.kill(soon()).unwrap();
    node.containers.remove();
    assert_eq!(with_token(&token).len(), 2, "neither a step's end nor tidying touches it");
    if let Some(dir) = node.containers.gateway_cgroup() {
        assert!(dir.ends_with(id.cgroup().unwrap().trim_start_matches('/').rsplit('/').next().unwrap()));
    }
    let emptied = node.containers.kill_gateway(soon()).unwrap();
    assert_eq!(emptied.killed, 2);
    assert!(pidfd.wait(soon()));
    assert_eq!(pidfd.reap(), Some(Ended::Signaled(9)));
    assert_eq!(pidfd.reap(), Some(Ended::Unknown), "a status is given once");
    assert_eq!(with_token(&token), []);
}

#[test]
fn the_child_gets_what_the_spec_says() {
    let node = node();
    let out = node.dir.path().join("out");
    let deadline = soon();
    let spec = Spec {
        env: vec![("ONLY".into(), "this".into())],
        env_clear: true,
        cwd: Some("/".into()),
        background: true,
        deadline: Some(deadline),
        ..shell("/usr/bin/env; pwd; umask; nice 2>/dev/null; echo err >&2; read x || echo no-input", "m-env")
    };
    let mut step = node.containers.spawn(&with_output(spec, &out, 1 << 20), "s").unwrap();
    assert_eq!(step.wait(soon()), Ended::Exited(0));
    step.kill(soon()).unwrap();
    let text = std::fs::read_to_string(&out).unwrap();
    let has = |line: &str| text.lines().any(|l| l == line);
    for line in ["ONLY=this", "KOBOSHI_STEP=m-env", "/", "0022", "19", "err", "no-input"] {
        assert!(has(line), "{line} is missing in {text}");
    }
    assert!(has(&format!("KOBOSHI_DEADLINE={}", deadline.to_env())), "{text}");
    assert!(!text.contains("PATH=/root") && !text.contains("CARGO"), "the environment is cleared: {text}");
}

#[test]
fn root_drops_to_the_user_with_that_users_groups() {
    if !rustix::process::geteuid().is_root() {
        println!("left out, not root: dropping privileges");
        return;
    }
    let node = node();
    let out = node.dir.path().join("out");
    let ids = Ids { uid: 65_534, gid: 65_534 };
    let script = "id -u; id -g; id -G; cat /etc/shadow 2>/dev/null || echo refused";
    let spec = Spec { ids: Some(ids), ..shell(script, "m-id") };
    let mut step = node.containers.spawn(&with_output(spec, &out, 1 << 20), "s").unwrap();
    assert_eq!(step.wait(soon()), Ended::Exited(0));
    step.kill(soon()).unwrap();
    let text = std::fs::read_to_string(&out).unwrap();
    assert_eq!(text, "65534\n65534\n65534\nrefused\n");
}

#[test]
fn output_stays_within_bounds_while_it_is_waited_for() {
    let node = node();
    let out = node.dir.path().join("out");
    let limit = 1 << 20;
    let spec = with_output(
        shell("i=0; while [ $i -lt 60 ]; do head -c 200000 /dev/zero; i=$((i+1)); done; echo last", "m-out"),
        &out,
        limit,
    );
    let mut step = node.containers.spawn(&spec, "s").unwrap();
    assert_eq!(step.wait(soon()), Ended::Exited(0));
    step.kill(soon()).unwrap();
    let kept = std::fs::read(&out).unwrap();
    assert!(kept.len() as u64 <= limit, "{}", kept.len());
    assert!(kept.ends_with(b"last\n"));
}

#[test]
fn limits_hold_where_the_host_can_impose_them() {
    let node = node();
    let limits = Limits { memory_bytes: Some(64 << 20), pids: Some(5) };
    let spec = Spec { limits, ..shell("exit 0", "m-lim") };
    let mut step = node.containers.spawn(&spec, "s").unwrap();
    let dir = node.containers.gateway_cgroup().map(|g| g.parent().unwrap().join("steps/s"));
    match node.containers.strength() {
        Strength::CgroupV2 { memory, pids } => {
            let dir = dir.unwrap();
            for (has, file, value) in [(memory, "memory.max", "67108864"), (pids, "pids.max", "5")] {
                if has {
                    assert_eq!(std::fs::read_to_string(dir.join(file)).unwrap().trim(), value);
                } else {
                    assert!(!dir.join(file).exists(), "{file} is there, yet told as unlimited");
                    println!("unlimited here: {file}");
                }
            }
        }
        Strength::Weak { .. } => assert!(dir.is_none()),
    }
    assert_eq!(step.wait(soon()), Ended::Exited(0));
    step.kill(soon()).unwrap();
}

#[test]
fn unfit_names_are_refused() {
    let node = node();
    for name in ["", "..", ".hidden", "a/b", "a b", "é", &"x".repeat(65)] {
        assert_eq!(
            node.containers.spawn(&shell("exit 0", ""), name).unwrap_err().kind,
            Kind::Usage,
            "{name:?}"
        );
        assert_eq!(node.containers.kill(name, soon()).unwrap_err().kind, Kind::Usage, "{name:?}");
        assert!(Containers::open(name, node.dir.path()).is_err(), "{name:?}");
    }
}

#[test]
fn the_weaker_way_can_be_forced_and_says_so() {
    let node = Node::new(|name, run| Containers::open_weak(name, run, "because").unwrap());
    assert_eq!(node.containers.strength(), Strength::Weak { why: "because".into() });
    assert_eq!(node.containers.gateway_cgroup(), None);
}

#[test]
fn a_tool_is_bounded_in_time_and_output_and_leaves_no_one() {
    let sh = |script: &str| Cmd::new("/bin/sh", ["-c", script]);
    let out = run(&sh("echo out; echo err >&2; exit 3"), soon()).unwrap();
    assert_eq!((out.status, out.signal, out.timed_out), (Some(3), None, false));
    assert_eq!((out.stdout.as_slice(), out.stderr.as_slice()), (b"out\n".as_slice(), b"err\n".as_slice()));

    let token = token();
    let began = host::clock::now();
    let out =
        run(&sh(&format!("echo early; sleep {token}")), Deadline::after(Duration::from_millis(150))).unwrap();
    assert!(out.timed_out && !out.ok() && out.stdout == b"early\n");
    assert!(host::clock::now().since_ms(began).unwrap() < 10_000);
    assert_eq!(with_token(&token), []);

    // A child that keeps the pipes open does not keep us.
    let out = run(&sh(&format!("sleep {token} & echo done")), soon()).unwrap();
    assert_eq!((out.status, out.stdout.as_slice()), (Some(0), b"done\n".as_slice()));
    assert_eq!(with_token(&token), []);

    let out = run(&sh("head -c 3000000 /dev/zero; echo end >&2"), soon()).unwrap();
    assert_eq!(
        (out.stdout.len(), out.stderr.as_slice()),
        (host::run::OUTPUT_LIMIT_BYTES, b"end\n".as_slice())
    );

    let out = run(&sh("yes"), Deadline::after(Duration::from_millis(150))).unwrap();
    assert!(out.timed_out && out.stdout.len() == host::run::OUTPUT_LIMIT_BYTES);

    let out = run(&sh("kill -15 $$"), soon()).unwrap();
    assert_eq!((out.status, out.signal), (None, Some(15)));
    assert_eq!(run(&Cmd::new("/no/such", [""]), soon()).unwrap_err().kind, Kind::NotFound);
}

/// Set in the process that plays the agent: the node's name, its run directory, the token.
const AGENT_ENV: &str = "CONTAINER_TEST_AGENT";

/// Not a test by itself: what the agent of the next test does before it is killed.
#[test]
fn as_the_agent() {
    let Ok(text) = std::env::var(AGENT_ENV) else { return };
    let mut parts = text.split('|');
    let mut part = || parts.next().unwrap();
    let (name, run_dir, token) = (part(), part(), part());
    let containers = Containers::open(name, run_dir.as_ref()).unwrap();
    let sleep = |mark: &str| shell(&format!("setsid sleep {token} & exec sleep {token}"), mark);
    let (gateway, _fd) = containers.spawn_gateway(&sleep("gateway")).unwrap();
    let _step = containers.spawn(&sleep("step"), "half-way").unwrap();
    std::fs::write(format!("{run_dir}/gateway-id"), serde_json::to_vec(&gateway).unwrap()).unwrap();
    // To be killed here.
    let _ = run(&Cmd::new("/bin/sleep", ["1000"]), Deadline::after(Duration::from_secs(60)));
}

#[test]
fn a_killed_agent_takes_neither_gateway_nor_proof_along() {
    let node = node();
    let token = token();
    let me = std::env::current_exe().unwrap();
    let told = format!("{}|{}|{token}", node.name, node.run_dir().display());
    let agents = Node::new(|name, run| Containers::open(name, run).unwrap());
    let spec = Spec {
        program: me.into(),
        args: ["as_the_agent", "--exact", "--nocapture"].map(Into::into).to_vec(),
        env: vec![(AGENT_ENV.into(), told.into())],
        mark: "agent".into(),
        ..Spec::default()
    };
    let mut agent = agents.containers.spawn(&spec, "agent").unwrap();
    let id_path = node.run_dir().join("gateway-id");
    until("the agent's children", || id_path.exists() && with_token(&token).len() == 4);
    agent.id().signal(rustix::process::Signal::KILL).unwrap();
    assert_eq!(agent.wait(soon()), Ended::Signaled(9));
    assert_eq!(with_token(&token).len(), 4, "an agent's death ends nobody");

    // The next agent adopts the gateway by its identity and ends the half-done step.
    let next = Containers::open(&node.name, &node.run_dir()).unwrap();
    let gateway: ProcessId = serde_json::from_slice(&std::fs::read(&id_path).unwrap()).unwrap();
    let adopted = gateway.open().unwrap();
    assert_eq!(next.leftovers(), ["half-way"]);
    assert!(next.kill("half-way", soon()).unwrap().killed >= 2);
    assert_eq!(with_token(&token).len(), 2);
    assert!(gateway.alive() && !adopted.exited());
    next.kill_gateway(soon()).unwrap();
    assert!(adopted.wait(soon()));
    // Nobody's status is ours to read but our children's; we are its parent only where we are subreaper.
    assert!(matches!(adopted.reap(), Some(Ended::Unknown | Ended::Signaled(9))));
    assert_eq!(with_token(&token), []);
    agent.kill(soon()).unwrap();
}
