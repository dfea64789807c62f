use super::*;
use crate::identity::{Counts, Identity};
use crate::probe::Activity;
use crate::update::UpdateAtWork;
use crate::ws::Hello;

const BOOT: u64 = 7;
const GATEWAY: ProcessId = ProcessId { pid: 500, start_ticks: 99 };

fn at(ms: u64) -> Moment {
    // Far from zero, so that ages are never cut.
    Moment { boot: BOOT, ms: 10_000_000 + ms }
}

fn hello_ok() -> HelloResult {
    HelloResult::Ok(Hello {
        version: "2026.9.6".into(),
        boot_id: "b".into(),
        active_work: Some(0),
        ..Hello::default()
    })
}

fn identified(id: Option<&str>, counts: Counts, onboarded: &str) -> Option<IdentityLook> {
    let identity = Identity { device_id: id.map(str::to_owned), counts, schema: 18 };
    Some(IdentityLook::Known { identity, onboarded: Some(onboarded.into()) })
}

fn good(ms: u64) -> Look {
    Look {
        at: at(ms),
        port: 18_789,
        process: Some(Process {
            id: GATEWAY,
            uid: 1000,
            uid_right: true,
            by_lock: true,
            state: 'S',
            traced: false,
            cpu_ms: 20_000,
            wait_ms: 700,
            children_cpu_ms: 0,
            age_ms: 5_000_000,
            cgroup: None,
        }),
        listening: Listening::Gateway,
        health: Health::Live,
        startup: Startup::Started { version: Some("2026.9.6".into()) },
        ready: Ready::Answer { ready: true, failing: vec![], suppressed: vec![] },
        hello: Some(hello_ok()),
        certificate: None,
        service: None,
        identity: identified(Some("me"), Counts { paired: 2, jobs: 4, ..Counts::default() }, "then"),
        activity: Activity::default(),
        update: None,
        disk_version: Some("2026.9.6".into()),
        our_side: None,
        known_turn: false,
        heard: None,
        main: Main::Told,
    }
}

fn silent(ms: u64, cpu_ms: u64) -> Look {
    let mut look = good(ms);
    look.health = Health::Silent;
    look.startup = Startup::Silent;
    look.ready = Ready::Silent;
    look.hello = None;
    set(&mut look, |p| p.cpu_ms = 20_000 + cpu_ms);
    look
}

fn gone(ms: u64) -> Look {
    let mut look = silent(ms, 0);
    look.process = None;
    look.listening = Listening::Nobody;
    look.health = Health::Refused;
    look.startup = Startup::Refused;
    look.ready = Ready::Refused;
    look
}

fn set(look: &mut Look, change: impl FnOnce(&mut Process)) {
    if let Some(p) = &mut look.process {
        change(p);
    }
}

fn baseline() -> Baseline {
    Baseline {
        version: Some("2026.9.6".into()),
        device_id: Some("me".into()),
        counts: Counts { paired: 2, sessions: 2, jobs: 4, ..Counts::default() },
        onboarded: Some("then".into()),
        ..Baseline::default()
    }
}

/// A judge that has confirmed a serving node; the last look was at 6 s.
fn settled() -> Judge {
    let mut judge = Judge::new(Limits::default(), baseline());
    for ms in [0, 3_000, 6_000] {
        judge.observe(&good(ms));
    }
    judge
}

fn service(phase: ServicePhase) -> ServiceLook {
    ServiceLook { phase, main: None, cgroup: None, latched: None, will: None }
}

/// When, from the first look on, a repeated look turns into `NotServing`; looks come every second.
fn turns_at(judge: &mut Judge, from: u64, until: u64, mut make: impl FnMut(u64) -> Look) -> Option<u64> {
    let mut ms = from;
    while ms <= until {
        if matches!(judge.observe(&make(ms)).verdict, Verdict::NotServing { .. }) {
            return Some(ms - from);
        }
        ms += 1_000;
    }
    None
}

fn kinds(judgement: &Judgement) -> Vec<FaultKind> {
    judgement.findings.iter().map(|f| f.kind).collect()
}

#[test]
fn three_good_looks_over_five_seconds_confirm() {
    let table: &[(&[u64], bool)] = &[
        (&[0], false),
        (&[0, 5_000], false),
        (&[0, 1_000, 2_000, 3_000, 4_000], false),
        (&[0, 2_500, 5_000], true),
        (&[0, 4_900, 9_000], true),
    ];
    for (moments, want) in table {
        let mut judge = Judge::new(Limits::default(), baseline());
        let last = moments.iter().map(|ms| judge.observe(&good(*ms))).last().expect("a look");
        assert!(last.verdict.is_serving());
        assert_eq!(last.confirmed, *want, "{moments:?}");
        assert_eq!(last.first_good, Some(at(0)));
    }
}

#[test]
fn a_confirmation_needs_one_process_an_unbroken_run_and_a_hello() {
    let mut judge = Judge::new(Limits::default(), baseline());
    judge.observe(&good(0));
    judge.observe(&good(3_000));
    let mut other = good(6_000);
    set(&mut other, |p| p.id.start_ticks = 100);
    assert!(!judge.observe(&other).confirmed, "another process begins anew");

    let mut judge = Judge::new(Limits::default(), baseline());
    judge.observe(&good(0));
    judge.observe(&silent(3_000, 0));
    let last = judge.observe(&good(6_000));
    assert_eq!((last.confirmed, last.first_good), (false, Some(at(6_000))), "a miss begins anew");

    let mut judge = Judge::new(Limits::default(), baseline());
    for ms in [0, 3_000, 6_000, 9_000] {
        let mut look = good(ms);
        look.hello = None;
        assert!(!judge.observe(&look).confirmed, "HTTP alone confirms nothing");
        assert!(judge.wants_hello(at(ms)));
    }
    assert!(judge.observe(&good(12_000)).confirmed);
    assert!(!judge.wants_hello(at(12_001)));
    assert!(judge.wants_hello(at(42_001)), "thirty seconds later it is due again");
}

#[test]
fn without_a_token_ownership_and_http_must_do() {
    let mut judge = Judge::new(Limits::default(), baseline());
    let mut last = None;
    for ms in [0, 3_000, 6_000] {
        let mut look = good(ms);
        look.hello = Some(HelloResult::NoToken);
        last = Some(judge.observe(&look));
    }
    let last = last.expect("a look");
    assert!(last.confirmed);
    assert_eq!(last.confidence, Confidence::Http);
    // Whole all the same: what is degraded keeps an incident open, and a token does not come by waiting.
    assert!(matches!(last.verdict, Verdict::Serving { degraded } if degraded.is_empty()));
}

#[test]
fn a_death_is_seen_at_once() {
    let mut judge = settled();
    let got = judge.observe(&gone(7_000));
    assert!(matches!(got.verdict, Verdict::NotServing { .. }));
    assert_eq!(kinds(&got), [FaultKind::ProcessGone]);
}

#[test]
fn every_limit_is_kept_to_the_second() {
    type Case = (&'static str, fn(u64) -> Look, u64);
    let cases: &[Case] = &[
        (
            "stopped",
            |ms| {
                let mut l = silent(ms, 0);
                set(&mut l, |p| p.state = 'T');
                l
            },
            10_000,
        ),
        ("silent", |ms| silent(ms, 0), 60_000),
        ("spinning", |ms| silent(ms, ms - 7_000), 120_000),
        ("half busy", |ms| silent(ms, (ms - 7_000) / 2), 900_000),
        (
            "refused",
            |ms| {
                let mut l = gone(ms);
                l.process = good(ms).process;
                l
            },
            60_000,
        ),
        (
            "draining",
            |ms| {
                let mut l = good(ms);
                l.startup = Startup::Draining;
                l
            },
            330_000,
        ),
        (
            "service stopping",
            |ms| {
                let mut l = gone(ms);
                l.service = Some(service(ServicePhase::Stopping));
                l
            },
            330_000,
        ),
        (
            "a service that starts without any progress",
            |ms| {
                let mut l = gone(ms);
                l.service = Some(service(ServicePhase::Starting));
                l
            },
            60_000,
        ),
        (
            "wrong body",
            |ms| {
                let mut l = good(ms);
                l.health = Health::Wrong { why: "html".into() };
                l
            },
            10_000,
        ),
        (
            "somebody else listens",
            |ms| {
                let mut l = good(ms);
                l.listening = Listening::Stranger { who: None, uid: 5 };
                l
            },
            10_000,
        ),
        (
            "nobody's uid",
            |ms| {
                let mut l = good(ms);
                l.listening = Listening::Unknown { uid: 5 };
                l
            },
            10_000,
        ),
        (
            "wrong user",
            |ms| {
                let mut l = good(ms);
                set(&mut l, |p| p.uid_right = false);
                l
            },
            10_000,
        ),
        (
            "wrong version",
            |ms| {
                let mut l = good(ms);
                l.hello = Some(HelloResult::Ok(Hello { version: "2026.8.1".into(), ..Hello::default() }));
                l
            },
            10_000,
        ),
        (
            "WebSocket dead",
            |ms| {
                let mut l = good(ms);
                l.hello = Some(HelloResult::TimedOut);
                l
            },
            60_000,
        ),
        (
            "token refused",
            |ms| {
                let mut l = good(ms);
                l.hello = Some(HelloResult::TokenRefused);
                l
            },
            60_000,
        ),
        (
            "state database",
            |ms| {
                let mut l = good(ms);
                l.ready = Ready::Answer {
                    ready: false,
                    failing: vec!["state-database".into()],
                    suppressed: vec![],
                };
                l
            },
            120_000,
        ),
        (
            "update, nothing moves",
            |ms| {
                let mut l = gone(ms);
                l.update = Some(UpdateAtWork { what: "npm".into(), progress: 1 });
                l
            },
            300_000,
        ),
        (
            "update, files move",
            |ms| {
                let mut l = gone(ms);
                l.update = Some(UpdateAtWork { what: "npm".into(), progress: ms });
                l
            },
            1_800_000,
        ),
    ];
    for (name, make, limit) in cases {
        let mut judge = settled();
        assert_eq!(turns_at(&mut judge, 7_000, 7_000 + limit + 5_000, make), Some(*limit), "{name}");
    }
}

#[test]
fn a_stall_of_a_busy_node_is_no_verdict() {
    // Forty seconds without an answer, idle or at a full core, and then all is well again.
    for core in [0, 1] {
        let mut judge = settled();
        assert_eq!(turns_at(&mut judge, 7_000, 47_000, |ms| silent(ms, (ms - 7_000) * core)), None);
        assert!(judge.observe(&good(48_000)).verdict.is_serving());
    }
}

#[test]
fn a_node_that_fails_in_ever_new_ways_is_not_waited_for_for_ever() {
    let strange = |ms| {
        let mut look = good(ms);
        look.health = Health::Wrong { why: "HTML".into() };
        look
    };
    // Seven seconds of silence, seven of strange answers, one good look: no single limit is ever reached.
    let mut judge = settled();
    let mut ended = None;
    for s in 7..2_000_u64 {
        let look = match s % 15 {
            0 => good(s * 1_000),
            1..=7 => silent(s * 1_000, s * 100),
            _ => strange(s * 1_000),
        };
        if let Verdict::NotServing { why } = judge.observe(&look).verdict {
            ended = Some((s, why));
            break;
        }
    }
    let (s, why) = ended.expect("a verdict");
    assert!((900..=925).contains(&s) && why.contains("steadily"), "{s} s: {why}");
    // The same with a confirmed minute in between is a node with hiccups.
    let mut judge = settled();
    for s in 7..4_000_u64 {
        let look = match s % 600 {
            0..=60 => good(s * 1_000),
            _ if s % 2 == 0 => silent(s * 1_000, s * 100),
            _ => strange(s * 1_000),
        };
        let verdict = judge.observe(&look).verdict;
        assert!(!matches!(verdict, Verdict::NotServing { .. }), "{s}: {verdict:?}");
    }
}

#[test]
fn work_that_leaves_a_trace_is_no_spin() {
    type Case = (&'static str, fn(&mut Look, u64));
    let traces: [Case; 3] = [
        ("log", |l, n| l.activity.log_bytes = n),
        ("database", |l, n| l.activity.database = n),
        ("children", |l, n| set(l, |p| p.children_cpu_ms = n * 1_000)),
    ];
    for (name, touch) in traces {
        let mut judge = settled();
        let at = turns_at(&mut judge, 7_000, 1_000_000, |ms| {
            let mut l = silent(ms, ms - 7_000);
            touch(&mut l, ms / 30_000);
            l
        });
        assert_eq!(at, Some(900_000), "{name}: busy for ever is a hang at last");
    }
}

#[test]
fn a_known_turn_is_given_its_time() {
    for told in [true, false] {
        let mut judge = settled();
        if told {
            let mut l = good(6_500);
            l.hello = Some(HelloResult::Ok(Hello {
                version: "2026.9.6".into(),
                active_work: Some(1),
                ..Hello::default()
            }));
            judge.observe(&l);
        }
        let at = turns_at(&mut judge, 7_000, 950_000, |ms| {
            let mut l = silent(ms, ms - 7_000);
            l.known_turn = !told;
            l
        });
        assert_eq!(at, Some(900_000), "told by the gateway: {told}");
    }
}

#[test]
fn a_stopped_process_in_a_debuggers_hands_is_waited_for() {
    let mut judge = settled();
    let at = turns_at(&mut judge, 7_000, 50_000, |ms| {
        let mut l = silent(ms, 0);
        set(&mut l, |p| {
            p.state = 't';
            p.traced = true;
        });
        l
    });
    assert_eq!(at, None);
}

/// A gateway that was asked to start at 0 and does not answer yet.
fn starting(ms: u64, cpu_ms: u64, log: u64) -> Look {
    let mut look = silent(ms, cpu_ms);
    set(&mut look, |p| p.age_ms = ms);
    look.listening = Listening::Nobody;
    look.activity.log_bytes = log;
    look
}

#[test]
fn a_start_is_judged_by_its_progress() {
    type Case = (&'static str, fn(u64) -> Look, u64);
    let cases: &[Case] = &[
        ("no progress", |ms| starting(ms, 0, 0), 60_000),
        ("too little CPU", |ms| starting(ms, ms / 1_000, 0), 60_000),
        ("enough CPU", |ms| starting(ms, ms / 100, 0), 900_000),
        ("spinning at a full core is a start too", |ms| starting(ms, ms, 0), 900_000),
        ("a log line every thirty seconds", |ms| starting(ms, 0, ms / 30_000), 900_000),
        ("works for 100 s, then stands still", |ms| starting(ms, ms.min(100_000), 0), 160_000),
        (
            "says that it starts",
            |ms| {
                let mut l = starting(ms, ms / 10, 0);
                l.startup = Startup::Starting;
                l.ready = Ready::Answer {
                    ready: false,
                    failing: vec!["startup-sidecars".into()],
                    suppressed: vec![],
                };
                l
            },
            900_000,
        ),
        (
            "stopped while starting",
            |ms| {
                let mut l = starting(ms, 0, 0);
                set(&mut l, |p| p.state = 'T');
                l
            },
            60_000,
        ),
    ];
    for (name, make, limit) in cases {
        let mut judge = settled();
        judge.started(at(0));
        let found = turns_at(&mut judge, 0, limit + 20_000, make);
        let slack = 10_000;
        let near = found.is_some_and(|ms| ms >= *limit && ms <= limit + slack);
        assert!(near, "{name}: {found:?}, want {limit}");
    }
}

#[test]
fn a_start_that_ends_well_is_recovered_from_its_first_good_look() {
    let mut judge = settled();
    judge.started(at(100_000));
    assert!(matches!(judge.observe(&gone(100_500)).verdict, Verdict::Inconclusive { .. }));
    let slow = |ms: u64| {
        let mut l = starting(ms, ms / 10, 0);
        set(&mut l, |p| {
            p.age_ms = ms - 100_000;
            p.id.start_ticks = 200;
        });
        l
    };
    for ms in (101_000..340_000).step_by(1_000) {
        assert!(matches!(judge.observe(&slow(ms)).verdict, Verdict::Inconclusive { .. }), "{ms}");
    }
    let up = |ms: u64| {
        let mut l = good(ms);
        set(&mut l, |p| {
            p.age_ms = ms - 100_000;
            p.id.start_ticks = 200;
        });
        l
    };
    judge.observe(&up(340_000));
    judge.observe(&up(342_500));
    let last = judge.observe(&up(345_000));
    assert_eq!((last.confirmed, last.first_good), (true, Some(at(340_000))));
}

#[test]
fn a_start_whose_process_never_appears_or_dies_is_seen() {
    for (main, limit) in [(Main::Told, 10_000), (Main::Untold, 60_000), (Main::Ended, 0)] {
        let mut judge = settled();
        judge.started(at(7_000));
        let make = |ms| Look { main, ..gone(ms) };
        assert_eq!(turns_at(&mut judge, 7_000, 90_000, make), Some(limit), "{main:?}");
    }
}

#[test]
fn an_old_process_that_a_new_judge_meets_is_not_starting() {
    let mut judge = Judge::new(Limits::default(), baseline());
    assert_eq!(turns_at(&mut judge, 0, 200_000, |ms| silent(ms, 0)), Some(60_000));
    let mut judge = Judge::new(Limits::default(), baseline());
    assert_eq!(turns_at(&mut judge, 0, 200_000, |ms| silent(ms, ms)), Some(120_000));
}

#[test]
fn our_own_failures_are_told_and_never_held_against_the_node() {
    let mut judge = settled();
    let mut told = Vec::new();
    for ms in (7_000..700_000).step_by(1_000) {
        let mut look = gone(ms);
        look.our_side = Some("too many open files".into());
        let got = judge.observe(&look);
        assert!(matches!(got.verdict, Verdict::Inconclusive { .. }));
        if !got.findings.is_empty() {
            told.push(ms - 7_000);
        }
    }
    assert_eq!(told.first(), Some(&120_000));
    assert!(judge.observe(&good(700_000)).confirmed, "a confirmation is not lost over it");
}

#[test]
fn channels_and_what_failed_before_may_fail() {
    let ready = |failing: &[&str], suppressed: &[&str]| Ready::Answer {
        ready: failing.is_empty(),
        failing: failing.iter().map(|s| (*s).to_owned()).collect(),
        suppressed: suppressed.iter().map(|s| (*s).to_owned()).collect(),
    };
    let table: &[(Ready, bool, usize)] = &[
        (ready(&["telegram"], &[]), true, 1),
        (ready(&["telegram", "discord"], &[]), true, 2),
        (ready(&[], &["telegram"]), true, 1),
        (ready(&["state-database"], &[]), false, 0),
        (ready(&["telegram", "agent-database:main"], &[]), false, 0),
        (ready(&["agent-database:old"], &[]), true, 1),
        (ready(&["plugin-reload"], &[]), false, 0),
        (ready(&["startup-sidecars"], &[]), false, 0),
        (ready(&["gateway-draining"], &[]), false, 0),
    ];
    for (ready, serves, degraded) in table {
        let mut judge = Judge::new(
            Limits::default(),
            Baseline { failing: vec!["agent-database:old".into()], ..baseline() },
        );
        let mut look = good(0);
        look.ready = ready.clone();
        let got = judge.observe(&look);
        match got.verdict {
            Verdict::Serving { degraded: d } => assert!(*serves && d.len() == *degraded, "{ready:?} {d:?}"),
            Verdict::Inconclusive { .. } => assert!(!serves, "{ready:?}"),
            Verdict::NotServing { why } => panic!("{ready:?} at once: {why}"),
        }
    }
}

#[test]
fn identity_is_held_against_the_baseline() {
    let known = identified;
    let full = Counts { paired: 1, sessions: 2, jobs: 3, ..Counts::default() };
    let none = Counts { jobs: 3, ..Counts::default() };
    let revoked = Counts { sessions: 2, jobs: 3, ..Counts::default() };
    type Case = (&'static str, Option<IdentityLook>, bool, &'static [FaultKind]);
    let table: Vec<Case> = vec![
        ("the same", known(Some("me"), full, "then"), true, &[]),
        ("another", known(Some("you"), full, "then"), false, &[FaultKind::Amnesia]),
        ("none", known(None, full, "then"), false, &[FaultKind::Amnesia]),
        ("fallen to zero", known(Some("me"), none, "then"), false, &[FaultKind::Amnesia]),
        ("the last device revoked", known(Some("me"), revoked, "then"), true, &[]),
        ("onboarded afresh", known(Some("you"), none, "now"), true, &[FaultKind::Notice]),
        ("unreadable", Some(IdentityLook::Unreadable { why: "gone".into() }), true, &[]),
        ("not read", None, true, &[]),
    ];
    for (name, identity, serves, want) in table {
        let mut judge = settled();
        let mut look = good(7_000);
        look.identity = identity;
        let got = judge.observe(&look);
        assert_eq!(got.verdict.is_serving(), serves, "{name}");
        assert_eq!(!serves, matches!(got.verdict, Verdict::NotServing { .. }), "{name}");
        assert_eq!(kinds(&got), want, "{name}");
    }
}

#[test]
fn versions_may_change_on_purpose_only() {
    let with = |running: &str, disk: &str| {
        let mut look = good(7_000);
        look.hello = Some(HelloResult::Ok(Hello { version: running.into(), ..Hello::default() }));
        look.disk_version = Some(disk.into());
        settled().observe(&look)
    };
    let got = with("2026.9.6", "2026.10.0");
    assert!(got.verdict.is_serving() && got.findings.is_empty(), "replaced on disk, not yet started");
    let got = with("2026.10.0", "2026.10.0");
    assert!(got.verdict.is_serving());
    assert_eq!(kinds(&got), [FaultKind::Notice]);
    assert!(!with("2026.8.1", "2026.9.6").verdict.is_serving());
}

#[test]
fn an_update_beside_a_serving_node_is_only_told() {
    let mut judge = settled();
    let mut noticed = None;
    for ms in (7_000..3_000_000).step_by(2_000) {
        let mut look = good(ms);
        look.update = Some(UpdateAtWork { what: "npm".into(), progress: 3 });
        let got = judge.observe(&look);
        assert!(got.verdict.is_serving());
        if noticed.is_none() && kinds(&got).contains(&FaultKind::Notice) {
            noticed = Some(ms - 7_000);
        }
    }
    assert_eq!(noticed, Some(2_700_000));
}

#[test]
fn a_stranger_on_the_port_is_named() {
    let mut judge = settled();
    let mut look = gone(7_000);
    look.listening = Listening::Stranger { who: Some(ProcessId { pid: 77, start_ticks: 1 }), uid: 0 };
    look.health = Health::Wrong { why: "html".into() };
    let got = judge.observe(&look);
    assert!(matches!(&got.verdict, Verdict::NotServing { why } if why.contains("77")));
    assert_eq!(kinds(&got), [FaultKind::PortTaken]);
}

#[test]
fn the_owners_will_and_a_latch_are_findings() {
    let mut judge = settled();
    let mut look = gone(7_000);
    look.service = Some(ServiceLook {
        will: Some("its unit is disabled".into()),
        latched: Some("exit 78".into()),
        ..service(ServicePhase::Down)
    });
    let got = judge.observe(&look);
    let kinds = kinds(&got);
    assert!(
        kinds.contains(&FaultKind::OwnersWill) && kinds.contains(&FaultKind::ServiceLatched),
        "{kinds:?}"
    );
}

#[test]
fn a_missing_lock_or_a_foreign_cgroup_only_degrades() {
    let mut judge = settled();
    let mut look = good(7_000);
    set(&mut look, |p| {
        p.by_lock = false;
        p.cgroup = Some("/user.slice/session-1.scope".into());
    });
    look.service = Some(ServiceLook {
        cgroup: Some("/system.slice/a.service".into()),
        ..service(ServicePhase::Running)
    });
    let got = judge.observe(&look);
    assert!(matches!(&got.verdict, Verdict::Serving { degraded } if degraded.len() == 2), "{got:?}");
}

#[test]
fn a_failed_hello_on_our_side_keeps_the_older_answer() {
    let mut judge = settled();
    let mut look = good(7_000);
    look.hello = Some(HelloResult::OurSide { why: "no descriptors".into() });
    assert!(judge.observe(&look).confirmed);
}

#[test]
fn after_a_reboot_everything_is_new() {
    let mut judge = settled();
    let mut look = good(0);
    look.at = Moment { boot: 8, ms: 50 };
    let got = judge.observe(&look);
    assert!(!got.confirmed);
    assert_eq!(got.first_good, Some(look.at));
}

#[test]
fn it_looks_often_while_anything_is_wrong_and_seldom_otherwise() {
    let mut judge = Judge::new(Limits::default(), baseline());
    assert_eq!(judge.next_probe_in(), Duration::from_millis(500));
    for ms in [0, 3_000, 6_000] {
        judge.observe(&good(ms));
    }
    assert_eq!(judge.next_probe_in(), Duration::from_secs(2));
    judge.observe(&silent(8_000, 0));
    assert_eq!(judge.next_probe_in(), Duration::from_millis(500));
}

#[test]
fn limits_are_read_from_a_part_and_mistakes_are_errors() {
    let some: Limits = serde_json::from_str(r#"{"spin_ms": 3000}"#).expect("limits");
    assert_eq!(some, Limits { spin_ms: 3_000, ..Limits::default() });
    assert!(serde_json::from_str::<Limits>(r#"{"spinn_ms": 3000}"#).is_err());
}

#[test]
fn an_amnesia_is_not_forgotten_by_a_look_that_did_not_ask() {
    let mut judge = settled();
    assert!(!judge.wants_identity(at(6_500)));
    let mut look = good(7_000);
    look.identity = identified(Some("you"), Counts::default(), "then");
    assert!(matches!(judge.observe(&look).verdict, Verdict::NotServing { .. }));
    for ms in [9_000, 11_000, 15_000] {
        let mut look = good(ms);
        look.identity = None;
        assert!(matches!(judge.observe(&look).verdict, Verdict::NotServing { .. }));
        assert!(judge.wants_identity(at(ms)));
    }
    assert!(judge.observe(&good(16_000)).verdict.is_serving(), "read again and right");
}

#[test]
fn nobody_is_confirmed_unidentified_where_the_identity_is_known() {
    let run = |baseline: Baseline| {
        let mut judge = Judge::new(Limits::default(), baseline);
        let looks = [0, 3_000, 6_000].map(|ms| {
            let mut look = good(ms);
            look.identity = None;
            judge.observe(&look).confirmed
        });
        looks[2]
    };
    assert!(!run(baseline()));
    assert!(run(Baseline { device_id: None, ..baseline() }), "nothing is known of a fresh node");
}

#[test]
fn a_restart_inside_an_old_process_has_a_start_of_its_own() {
    let mut judge = settled();
    let found = turns_at(&mut judge, 7_000, 1_000_000, |ms| {
        let mut look = silent(ms, ms / 10);
        look.startup = Startup::Starting;
        look
    });
    assert_eq!(found, Some(900_000));
}

#[test]
fn children_that_only_wait_do_not_hide_a_spin() {
    let mut judge = settled();
    let found = turns_at(&mut judge, 7_000, 300_000, |ms| {
        let mut look = silent(ms, ms - 7_000);
        set(&mut look, |p| p.children_cpu_ms = ms / 400);
        look
    });
    assert_eq!(found, Some(120_000));
}

#[test]
fn a_spin_is_one_also_where_cores_are_scarce() {
    let mut judge = settled();
    let found = turns_at(&mut judge, 7_000, 300_000, |ms| {
        let mut look = silent(ms, (ms - 7_000) * 4 / 10);
        set(&mut look, |p| p.wait_ms = 700 + (ms - 7_000) * 6 / 10);
        look
    });
    assert_eq!(found, Some(120_000));
}
