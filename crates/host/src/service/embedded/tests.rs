//! Against real processes, in containers of both strengths.

use super::*;
use std::path::Path;

/// A gateway stand-in, its containers and everything they leave; all gone when dropped.
struct Bench {
    dir: tempfile::TempDir,
    containers: Containers,
}

impl Bench {
    fn new(weak: bool) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let name = format!("unit-{}", dir.path().file_name().unwrap().to_string_lossy().replace('.', ""));
        let containers = if weak {
            Containers::open_weak(&name, dir.path(), "asked for by a test").unwrap()
        } else {
            Containers::open(&name, dir.path()).unwrap()
        };
        Bench { dir, containers }
    }

    fn embedded(&self, script: &str) -> Embedded {
        Embedded::new(self.containers.clone(), self.spec(script), None)
    }

    fn spec(&self, script: &str) -> GatewaySpec {
        GatewaySpec {
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            cwd: Some(self.dir.path().into()),
            log: self.log(),
            ..GatewaySpec::default()
        }
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("gateway.log")
    }

    /// Waits for a line of the gateway's.
    fn says(&self, line: &str) {
        let deadline = soon();
        while !std::fs::read_to_string(self.log()).unwrap_or_default().contains(line) {
            assert!(!deadline.passed(), "it never said {line}");
            std::thread::yield_now();
        }
    }

    fn pid_in(&self, file: &str) -> ProcessId {
        let text = std::fs::read_to_string(self.dir.path().join(file)).unwrap();
        ProcessId::of(text.trim().parse().unwrap()).unwrap()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.containers.kill_gateway(soon());
        self.containers.remove();
    }
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

const GRACE: Duration = Duration::from_secs(10);

/// Says when it is up; ends with 0 on SIGTERM.
const POLITE: &str = "trap 'exit 0' TERM; echo up; while :; do sleep 60 & wait $!; done";
/// The same, deaf to SIGTERM.
const DEAF: &str = "trap '' TERM; echo up; while :; do sleep 60; done";

#[test]
fn a_life_from_start_to_stop() {
    for weak in [false, true] {
        let bench = Bench::new(weak);
        let mut gateway = bench.embedded(POLITE);
        let before = gateway.look(soon()).unwrap();
        assert_eq!((before.active, before.main, before.latched), (Active::Inactive, None, None));
        gateway.start(soon()).unwrap();
        bench.says("up");
        let up = gateway.look(soon()).unwrap();
        assert_eq!((up.active, up.main), (Active::Active, gateway.main()));
        assert!(gateway.start(soon()).is_err(), "there must never be two");
        let main = gateway.main().unwrap();
        let stat = main.stat().unwrap();
        assert_eq!(stat.session, main.pid, "it has a session of its own");
        assert!(matches!(gateway.stop(GRACE, soon()).unwrap(), Stopped::Clean { .. }));
        assert!(!main.alive());
        let after = gateway.look(soon()).unwrap();
        assert_eq!((after.active, after.result.as_str()), (Active::Inactive, "success"));
        assert_eq!(gateway.exited(), Some(Ended::Exited(0)));
        assert!(
            matches!(gateway.stop(GRACE, soon()).unwrap(), Stopped::Clean { .. }),
            "stopping twice is fine"
        );
    }
}

#[test]
fn a_deaf_gateway_and_its_family_are_killed() {
    for weak in [false, true] {
        let bench = Bench::new(weak);
        let script = format!("setsid sh -c 'trap \"\" TERM; echo $$ > child; sleep 60' & {DEAF}");
        let mut gateway = bench.embedded(&script);
        gateway.start(soon()).unwrap();
        bench.says("up");
        let deadline = soon();
        while std::fs::read_to_string(bench.dir.path().join("child")).unwrap_or_default().is_empty() {
            assert!(!deadline.passed());
            std::thread::yield_now();
        }
        let (main, child) = (gateway.main().unwrap(), bench.pid_in("child"));
        let stopped = gateway.stop(Duration::from_millis(50), soon()).unwrap();
        assert!(matches!(stopped, Stopped::Killed { .. }), "{stopped:?}");
        assert!(!main.alive() && !child.alive(), "weak: {weak}");
    }
}

#[test]
fn a_stopped_process_still_ends_cleanly() {
    let bench = Bench::new(false);
    let mut gateway = bench.embedded(POLITE);
    gateway.start(soon()).unwrap();
    bench.says("up");
    gateway.main().unwrap().signal(Signal::STOP).unwrap();
    assert!(matches!(gateway.stop(GRACE, soon()).unwrap(), Stopped::Clean { .. }));
}

#[test]
fn ends_are_told_apart() {
    let bench = Bench::new(false);
    let ended = |script: &str| {
        let mut gateway = bench.embedded(script);
        gateway.start(soon()).unwrap();
        let fd = gateway.main().unwrap().open();
        // Gone already is as good as waited for.
        assert!(fd.map_or(true, |fd| fd.wait(soon())));
        let state = gateway.look(soon()).unwrap();
        (state.active, state.result, state.exit_status, state.exit_signal)
    };
    assert_eq!(ended("exit 78"), (Active::Failed, "exit-code".into(), Some(78), None));
    assert_eq!(ended("exit 0"), (Active::Inactive, "success".into(), Some(0), None));
    assert_eq!(ended("kill -KILL $$"), (Active::Failed, "signal".into(), None, Some(9)));
}

#[test]
fn a_later_agent_adopts_and_ends_it() {
    for weak in [false, true] {
        let bench = Bench::new(weak);
        let mut first = bench.embedded(POLITE);
        first.start(soon()).unwrap();
        bench.says("up");
        let main = first.main().unwrap();
        drop(first);
        assert!(main.alive(), "it outlives the one who started it");
        let mut second = Embedded::new(bench.containers.clone(), bench.spec(POLITE), Some(main));
        assert_eq!(second.look(soon()).unwrap().main, Some(main));
        assert!(second.pidfd().is_some());
        assert!(matches!(second.stop(GRACE, soon()).unwrap(), Stopped::Clean { .. }));
        assert!(!main.alive());
        second.start(soon()).unwrap();
        let main = second.main().unwrap();
        drop(second);
        let mut unaware = bench.embedded(POLITE);
        assert_eq!(unaware.main(), Some(main), "found by the container alone");
        assert!(unaware.start(soon()).is_err(), "a living gateway is never started over");
        unaware.stop(GRACE, soon()).unwrap();
        let third = Embedded::new(bench.containers.clone(), bench.spec(POLITE), Some(main));
        assert_eq!(third.main(), None, "the dead are not adopted");
    }
}

/// Somebody else's start, outside our containers: a person's terminal, an older installation.
#[test]
fn an_adopted_stranger_is_ended_with_its_family() {
    let bench = Bench::new(false);
    let elsewhere = Bench::new(true);
    let script = format!("setsid sh -c 'echo $$ > child; echo child; exec sleep 60' & {DEAF}");
    let (main, _fd) = elsewhere
        .containers
        .spawn_gateway(&Spec {
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            cwd: Some(elsewhere.dir.path().into()),
            output: Some(OutputFile { path: elsewhere.log(), limit_bytes: 1 << 20 }),
            mark: "not-ours".into(),
            ..Spec::default()
        })
        .unwrap();
    elsewhere.says("up");
    elsewhere.says("child");
    let child = elsewhere.pid_in("child");
    let mut gateway = bench.embedded(POLITE);
    assert!(gateway.adopt(main));
    assert!(matches!(gateway.stop(Duration::from_millis(50), soon()).unwrap(), Stopped::Killed { .. }));
    assert!(!main.alive() && !child.alive());
}

#[test]
fn leftovers_do_not_stand_in_the_way_of_a_start() {
    let bench = Bench::new(false);
    let mut gateway = bench.embedded("setsid sh -c 'echo $$ > child; echo up; exec sleep 60' & wait");
    gateway.start(soon()).unwrap();
    bench.says("up");
    let (main, child) = (gateway.main().unwrap(), bench.pid_in("child"));
    main.signal(Signal::KILL).unwrap();
    assert!(main.open().map_or(true, |fd| fd.wait(soon())));
    gateway.set_spec(bench.spec(POLITE));
    gateway.start(soon()).unwrap();
    assert!(!child.alive(), "the old family is gone before the new one starts");
    assert!(matches!(gateway.stop(GRACE, soon()).unwrap(), Stopped::Clean { .. }));
}

#[test]
fn held_is_not_started() {
    let bench = Bench::new(true);
    let mut gateway = bench.embedded(POLITE);
    gateway.hold(soon()).unwrap();
    assert!(gateway.look(soon()).unwrap().held);
    assert_eq!(gateway.start(soon()).unwrap_err().kind, Kind::Usage);
    gateway.release(soon()).unwrap();
    gateway.start(soon()).unwrap();
    gateway.stop(GRACE, soon()).unwrap();
}

#[test]
fn no_two_starts_share_a_mark() {
    let marks: BTreeSet<String> = (0..1_000).map(|_| unique_mark()).collect();
    assert_eq!(marks.len(), 1_000);
}

#[test]
fn the_log_is_kept_within_bounds() {
    let bench = Bench::new(true);
    let mut gateway = bench.embedded(POLITE);
    std::fs::File::create(bench.log()).unwrap().set_len(LOG_LIMIT_BYTES + 1).unwrap();
    gateway.look(soon()).unwrap();
    assert!(Path::new(&bench.log()).metadata().unwrap().len() <= LOG_LIMIT_BYTES);
}
