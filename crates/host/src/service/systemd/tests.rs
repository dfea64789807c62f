//! Against what systemd printed (version 252), each state reached for real.

use super::*;

/// A gateway's unit, enabled, running; other states are told by what differs.
const RUNNING: &str = "Restart=always\nTimeoutStopUSec=5min 30s\nRestartPreventExitStatus=78\nMainPID=1\n\
    Result=success\nNRestarts=0\nExecMainCode=0\nExecMainStatus=0\nControlGroup=/system.slice/gw.service\n\
    LoadState=loaded\nActiveState=active\nSubState=running\nFragmentPath=/etc/systemd/system/gw.service\nDropInPaths=\n\
    UnitFileState=enabled\nStateChangeTimestampMonotonic=1000\nNeedDaemonReload=no\nStartLimitBurst=3\n";

fn with(changes: &str) -> ServiceState {
    Shown::parse(&format!("{RUNNING}{changes}")).state()
}

#[test]
fn running() {
    let state = with("");
    assert_eq!((state.active, state.known, state.enabled), (Active::Active, true, Some(true)));
    assert_eq!(state.main.map(|p| p.pid), Some(1));
    assert_eq!((state.masked, state.held, state.latched.as_deref()), (false, false, None));
    assert_eq!(state.cgroup.as_deref(), Some("/system.slice/gw.service"));
    assert_eq!(state.stop_limit_ms, Some(330_000));
    assert_eq!((state.exit_status, state.exit_signal), (None, None));
    assert_eq!(state.files, ["/etc/systemd/system/gw.service"]);
    assert!(!state.in_motion());
}

#[test]
fn on_the_way() {
    let gone = "MainPID=0\nControlGroup=\n";
    let killed = with(&format!(
        "{gone}Result=signal\nExecMainCode=2\nExecMainStatus=9\nActiveState=activating\nSubState=auto-restart"
    ));
    assert_eq!((killed.active, killed.exit_signal, killed.exit_status), (Active::AutoRestart, Some(9), None));
    assert_eq!((killed.main, killed.cgroup.clone(), killed.latched.clone()), (None, None, None));
    assert!(killed.in_motion());
    for (state, sub, active) in [
        ("activating", "start", Active::Activating),
        ("activating", "auto-restart-queued", Active::AutoRestart),
        ("deactivating", "stop-sigterm", Active::Deactivating),
        ("reloading", "reload", Active::Active),
        ("inactive", "dead", Active::Inactive),
        ("something-new", "else", Active::Unknown),
    ] {
        assert_eq!(with(&format!("ActiveState={state}\nSubState={sub}")).active, active, "{state}");
    }
}

#[test]
fn given_up() {
    let failed = "MainPID=0\nControlGroup=\nActiveState=failed\nSubState=failed\n";
    let latched = |more: &str| with(&format!("{failed}{more}")).latched.unwrap();
    assert_eq!(latched("Result=exit-code\nExecMainCode=1\nExecMainStatus=78"), "exit status 78");
    assert_eq!(latched("Result=exit-code\nExecMainCode=1\nExecMainStatus=78\nNRestarts=9"), "exit status 78");
    assert_eq!(
        latched("Result=exit-code\nExecMainCode=1\nExecMainStatus=1\nNRestarts=3"),
        "start limit reached"
    );
    assert_eq!(
        latched("Result=start-limit-hit\nExecMainCode=1\nExecMainStatus=0\nNRestarts=3"),
        "start limit reached"
    );
    assert_eq!(latched("Result=exit-code\nExecMainCode=1\nExecMainStatus=1\nRestart=no"), "exit status 1");
    assert_eq!(latched("Result=timeout\nExecMainCode=2\nExecMainStatus=9\nNRestarts=3"), "timeout");
    assert_eq!(latched("Result="), "failed");
    let reset =
        "MainPID=0\nActiveState=inactive\nSubState=dead\nResult=signal\nExecMainCode=2\nExecMainStatus=9";
    assert_eq!(with(reset).latched, None, "down is not given up");
}

#[test]
fn the_owners_words() {
    let masked = with("LoadState=masked\nUnitFileState=masked\nActiveState=inactive\nMainPID=0");
    assert!(masked.masked && masked.known && !masked.held);
    assert_eq!(masked.enabled, Some(false));
    assert_eq!(with("UnitFileState=disabled").enabled, Some(false));
    assert_eq!(with("UnitFileState=static").enabled, None);
    assert_eq!(with("UnitFileState=enabled-runtime").enabled, Some(true));
    let held = with(
        "DropInPaths=/etc/systemd/system/gw.service.d/a.conf /run/systemd/system/gw.service.d/90-koboshi-hold.conf",
    );
    assert!(held.held && !held.masked);
    assert_eq!(held.files, ["/etc/systemd/system/gw.service", "/etc/systemd/system/gw.service.d/a.conf"]);
}

#[test]
fn a_unit_that_is_not_there_and_an_answer_that_is_none() {
    let gone = with("LoadState=not-found\nFragmentPath=\nUnitFileState=\nActiveState=inactive\nMainPID=0");
    assert_eq!((gone.known, gone.enabled, gone.files.len()), (false, None, 0));
    for text in ["", "garbage", "MainPID=minus\nNRestarts=many\nActiveState"] {
        let state = Shown::parse(text).state();
        assert_eq!((state.active, state.known, state.main), (Active::Unknown, false, None), "{text}");
    }
}

#[test]
fn spans_of_time() {
    for (text, ms) in [
        ("5min 30s", Some(330_000)),
        ("1min 30s", Some(90_000)),
        ("1s", Some(1_000)),
        ("1.5s", Some(1_500)),
        ("500ms", Some(500)),
        ("2h 1us", Some(7_200_000)),
        ("infinity", None),
        ("", None),
        ("5 parsecs", None),
    ] {
        assert_eq!(span_ms(text), ms, "{text}");
    }
}

#[test]
fn a_timestamp_is_a_moment_of_this_boot() {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let second_ago_us =
        u64::try_from(now.tv_sec - 1).unwrap() * 1_000_000 + u64::try_from(now.tv_nsec).unwrap() / 1_000;
    let age_ms = clock::now().since_ms(moment_of(second_ago_us)).unwrap();
    assert!((1_000..60_000).contains(&age_ms), "{age_ms}");
    assert_eq!(with("StateChangeTimestampMonotonic=0").since, None);
}

#[test]
fn names_that_could_be_options_or_paths_are_refused() {
    for bad in
        ["", "gw", "gw.socket", "-gw.service", "a/b.service", "a b.service", ".service", "gw.service;rm"]
    {
        assert_eq!(Systemd::system(bad).unwrap_err().kind, Kind::Usage, "{bad}");
    }
    for good in
        ["openclaw-gateway.service", "openclaw-gateway-work.service", "gw@1.service", "a\\x2db.service"]
    {
        assert_eq!(Systemd::system(good).unwrap().unit(), good);
    }
}

#[test]
fn only_the_units_own_cgroup_is_ever_killed() {
    let systemd = Systemd::system("gw.service").unwrap();
    for path in ["/", "/system.slice", "/system.slice/other.service", "/system.slice/notgw.service"] {
        let state = ServiceState { cgroup: Some(path.into()), ..ServiceState::unknown() };
        assert_eq!(systemd.cgroup_dir(&state), None, "{path}");
    }
}
