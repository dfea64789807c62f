//! The systemd manager against a real systemd, on a machine booted with one: as root the system's manager and those
//! of all users that run, otherwise one's own. Elsewhere there is nothing to try and the tests say so. Units live
//! below `/run` and are gone afterwards.
#![allow(clippy::disallowed_methods, clippy::print_stdout, clippy::unwrap_used)]

use host::clock::Deadline;
use host::run::Ids;
use host::service::{Active, Manager, Scope, ServiceState, Stopped, Systemd, systemd_running};
use rustix::process::Signal;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const POLITE: &str = "trap 'exit 0' TERM; while :; do sleep 60 & wait $!; done";
const DEAF: &str = "trap '' TERM; setsid sh -c 'trap \"\" TERM; sleep 60' & while :; do sleep 60; done";

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

/// One unit of one scope; taken away when dropped.
struct Unit {
    scope: Scope,
    file: PathBuf,
    manager: Systemd,
}

impl Unit {
    fn new(scope: Scope, tag: &str, script: &str, more: &str) -> Unit {
        let name = format!("koboshi-test-{tag}-{}.service", std::process::id());
        let (dir, ids) = match scope {
            Scope::System => (PathBuf::from("/run/systemd/system"), None),
            Scope::User(ids) => (PathBuf::from(format!("/run/user/{}/systemd/user", ids.uid)), Some(ids)),
        };
        std::fs::create_dir_all(&dir).unwrap();
        let file = dir.join(&name);
        let script = script.replace('$', "$$").replace('"', "\\\"");
        let text = format!(
            "[Unit]\nStartLimitBurst=10\nStartLimitIntervalSec=300\n[Service]\n\
             ExecStart=/bin/sh -c \"{script}\"\nTimeoutStopSec=330\n{more}\n"
        );
        std::fs::write(&file, text).unwrap();
        if let Some(ids) = ids {
            for path in [dir.as_path(), file.as_path()] {
                std::os::unix::fs::chown(path, Some(ids.uid), Some(ids.gid)).unwrap();
            }
        }
        let mut manager = Systemd::new(&name, scope).unwrap();
        manager.reload(soon()).unwrap();
        Unit { scope, file, manager }
    }

    fn until(&mut self, what: &str, wanted: impl Fn(&ServiceState) -> bool) -> ServiceState {
        let deadline = soon();
        loop {
            let state = self.manager.look(soon()).unwrap();
            if wanted(&state) {
                return state;
            }
            assert!(!deadline.passed(), "{:?}: never {what}: {state:?}", self.scope);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        let _ = self.manager.release(soon());
        let _ = self.manager.stop(Duration::ZERO, soon());
        let _ = std::fs::remove_file(&self.file);
        let _ = self.manager.reload(soon());
        let _ = self.manager.clear_latch(soon());
    }
}

/// The managers that can be tried here.
fn scopes() -> Vec<Scope> {
    if !systemd_running() {
        println!("left out: this machine was not booted with systemd");
        return Vec::new();
    }
    let me = Ids::current().uid;
    let users = std::fs::read_dir("/run/user").into_iter().flatten().flatten().filter_map(|e| {
        let meta = e.metadata().ok().filter(|m| me == 0 || m.uid() == me)?;
        let runs = e.path().join("systemd/private").exists();
        runs.then_some(Scope::User(Ids { uid: meta.uid(), gid: meta.gid() }))
    });
    (me == 0).then_some(Scope::System).into_iter().chain(users).collect()
}

fn each_scope(test: impl Fn(Scope)) {
    scopes().into_iter().for_each(test);
}

#[test]
fn a_life_from_start_to_stop() {
    each_scope(|scope| {
        let mut unit = Unit::new(scope, "life", POLITE, "Restart=always\nRestartSec=5");
        let before = unit.until("known", |s| s.known);
        assert_eq!(
            (before.active, before.main, before.masked, before.held),
            (Active::Inactive, None, false, false)
        );
        assert_eq!(before.stop_limit_ms, Some(330_000));
        assert_eq!(before.files, [unit.file.display().to_string()]);
        unit.manager.start(soon()).unwrap();
        let up = unit.until("up", |s| s.active == Active::Active && s.main.is_some());
        let main = up.main.unwrap();
        assert!(up.cgroup.unwrap().ends_with(unit.manager.unit()));
        let age = host::clock::now().since_ms(up.since.unwrap()).unwrap();
        assert!(age < 20_000, "{age}");
        // The trap is set once the shell has its first child.
        while host::process::descendants(main.pid).is_empty() {}
        let stopped = unit.manager.stop(Duration::from_secs(10), soon()).unwrap();
        assert!(matches!(stopped, Stopped::Clean { .. }), "{stopped:?}");
        assert!(!main.alive());
        let after = unit.manager.look(soon()).unwrap();
        assert_eq!((after.active, after.latched, after.main), (Active::Inactive, None, None));
        assert!(
            matches!(unit.manager.stop(Duration::ZERO, soon()).unwrap(), Stopped::Clean { .. }),
            "once more"
        );
    });
}

#[test]
fn a_deaf_unit_is_killed_whole() {
    each_scope(|scope| {
        let mut unit = Unit::new(scope, "deaf", DEAF, "Restart=always\nRestartSec=5\nKillMode=mixed");
        unit.manager.start(soon()).unwrap();
        let main = unit.until("up", |s| s.main.is_some()).main.unwrap();
        while host::process::descendants(main.pid).len() < 3 {}
        let family = host::process::descendants(main.pid);
        let stopped = unit.manager.stop(Duration::from_millis(200), soon()).unwrap();
        assert!(matches!(stopped, Stopped::Killed { took_ms } if took_ms < 5_000), "{stopped:?}");
        assert!(!main.alive() && !family.iter().any(|p| p.alive()));
        let after = unit.manager.look(soon()).unwrap();
        assert!(matches!(after.active, Active::Inactive | Active::Failed), "{after:?}");
    });
}

#[test]
fn giving_up_is_seen_and_taken_back() {
    each_scope(|scope| {
        let more = "Restart=always\nRestartSec=50ms\nRestartPreventExitStatus=78";
        let mut unit = Unit::new(scope, "latch78", "exit 78", more);
        unit.manager.start(soon()).unwrap();
        let failed = unit.until("failed", |s| s.active == Active::Failed);
        assert_eq!((failed.latched.as_deref(), failed.exit_status), (Some("exit status 78"), Some(78)));
        unit.manager.clear_latch(soon()).unwrap();
        let state = unit.manager.look(soon()).unwrap();
        assert_eq!((state.active, state.latched), (Active::Inactive, None));
        let mut unit = Unit::new(scope, "limit", "exit 1", "Restart=always\nRestartSec=1ms");
        unit.manager.start(soon()).unwrap();
        let failed = unit.until("failed", |s| s.active == Active::Failed);
        assert_eq!(failed.latched.as_deref(), Some("start limit reached"), "{failed:?}");
        assert!(failed.restarts >= 9);
        unit.manager.clear_latch(soon()).unwrap();
        assert_eq!(unit.manager.look(soon()).unwrap().latched, None);
    });
}

#[test]
fn a_hold_keeps_it_down_until_released_by_anybody() {
    each_scope(|scope| {
        let mut unit = Unit::new(scope, "hold", POLITE, "Restart=always\nRestartSec=300ms");
        unit.manager.start(soon()).unwrap();
        let main = unit.until("up", |s| s.main.is_some()).main.unwrap();
        main.signal(Signal::KILL).unwrap();
        unit.until("about to restart", |s| s.active == Active::AutoRestart);
        unit.manager.hold(soon()).unwrap();
        unit.manager.hold(soon()).unwrap();
        let down = unit.until("kept down", |s| s.active == Active::Inactive);
        assert!(down.held && !down.masked);
        assert_eq!(down.files, [unit.file.display().to_string()], "the hold is not a file of the service");
        assert!(unit.manager.start(soon()).is_err());
        let scope_flag = if scope == Scope::System { "--system" } else { "--user" };
        if scope == Scope::System {
            // Somebody else's start is held off too.
            let _ =
                Command::new("systemctl").args([scope_flag, "start", unit.manager.unit()]).output().unwrap();
            assert_eq!(unit.manager.look(soon()).unwrap().main, None);
        }
        let mut another = Systemd::new(unit.manager.unit(), scope).unwrap();
        another.release(soon()).unwrap();
        another.release(soon()).unwrap();
        assert!(!Path::new(&format!("{}.d", unit.file.display())).exists(), "nothing of it is left");
        unit.manager.start(soon()).unwrap();
        let up = unit.until("up again", |s| s.main.is_some());
        assert!(!up.held);
        main.alive().then(|| panic!("the old one is gone"));
        unit.manager.hold(soon()).unwrap();
        assert!(up.main.unwrap().alive(), "a hold stops nothing");
    });
}

#[test]
fn somebody_elses_mask_and_an_unknown_unit() {
    each_scope(|scope| {
        let mut nobody = Systemd::new("koboshi-test-nobody.service", scope).unwrap();
        let state = nobody.look(soon()).unwrap();
        assert!(!state.known && state.main.is_none(), "{state:?}");
        assert_eq!(nobody.start(soon()).unwrap_err().kind, host::Kind::NotFound);
        nobody.clear_latch(soon()).unwrap();
        assert!(matches!(nobody.stop(Duration::ZERO, soon()).unwrap(), Stopped::Clean { .. }));
        if scope == Scope::System {
            let unit = "koboshi-test-nobody.service";
            let ctl =
                |verb: &str| Command::new("systemctl").args([verb, "--runtime", unit]).output().unwrap();
            ctl("mask");
            let state = nobody.look(soon()).unwrap();
            ctl("unmask");
            assert!(state.masked && !state.held, "{state:?}");
            assert_eq!(state.enabled, Some(false));
        }
    });
}
