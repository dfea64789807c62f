use super::*;
use crate::find::tests::node_at;
use crate::identity::Counts;
use crate::identity::tests::state_db;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

/// A whole node on disk that no process runs, and the baseline of it.
struct Whole {
    _dir: tempfile::TempDir,
    node: Node,
    baseline: Baseline,
}

impl Whole {
    fn new() -> Whole {
        let dir = tempfile::tempdir().expect("dir");
        let base = dir.path().canonicalize().expect("real");
        let node = node_at(&base);
        let write = |path: PathBuf, text: &str| {
            std::fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
            std::fs::write(path, text).expect("write");
        };
        let package = &node.package_dir;
        write(
            package.join("package.json"),
            r#"{"name":"openclaw","version":"2026.9.6","engines":{"node":">=24.16.0 <25 || >=26.1.0"},
                "openclaw":{"schemaVersions":{"state":18,"agent":23}},"dependencies":{"ws":"8","zod":"4"}}"#,
        );
        for name in
            ["openclaw.mjs", "dist/index.js", "dist/entry.js", "node_modules/ws/x", "node_modules/zod/x"]
        {
            write(package.join(name), "x");
        }
        write(node.node_bin.clone(), "#!/bin/sh\necho v26.10.0\n");
        chmod(&node.node_bin, 0o755);
        let s = &node.state_dir;
        write(
            node.config_path.clone(),
            &format!(
                r#"{{gateway:{{mode:"local",auth:{{token:"t"}}}},agents:{{defaults:{{workspace:"{}/workspace"}}}}}}"#,
                s.display()
            ),
        );
        write(s.join("workspace/AGENTS.md"), "x");
        write(s.join("agents/main/sessions/a.jsonl"), "x");
        drop(state_db(&node.state_db(), Some("device"), 2));
        let now = host::clock::now();
        let baseline = Baseline::take(&node, Vec::new(), now, soon()).expect("baseline");
        // The temporary tree is fresh, which must not look like an update's staging.
        Whole { _dir: dir, node, baseline }
    }

    fn examine(&self) -> Vec<Finding> {
        examine(&self.node, &self.baseline, Depth::Full, soon()).findings
    }

    fn seen(&self) -> Vec<(FaultKind, Option<Class>)> {
        self.examine().iter().map(|f| (f.kind, f.class)).collect()
    }
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

fn chmod(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
}

#[test]
fn a_whole_node_has_no_findings() {
    let w = Whole::new();
    assert_eq!(w.examine(), []);
    assert_eq!(w.baseline.counts, Counts { paired: 2, ..Counts::default() });
}

#[test]
fn each_break_has_its_finding() {
    use Class as C;
    use FaultKind as K;
    type Break = fn(&Node);
    fn rm(p: PathBuf) {
        if p.is_dir() {
            std::fs::remove_dir_all(p).expect("rm");
        } else {
            std::fs::remove_file(p).expect("rm");
        }
    }
    fn put(p: PathBuf, text: &str) {
        std::fs::write(p, text).expect("write");
    }
    let program = (K::FilesDamaged, Some(C::Program));
    let config = (K::ConfigBroken, Some(C::Config));
    let runtime = (K::RuntimeUnfit, Some(C::Runtime));
    let state_gone = (K::RootMissing, Some(C::State));
    type Case = (&'static str, Break, (FaultKind, Option<Class>));
    let cases: Vec<Case> = vec![
        ("program gone", |n| rm(n.package_dir.clone()), program),
        ("openclaw.mjs gone", |n| rm(n.package_dir.join("openclaw.mjs")), program),
        ("entry emptied", |n| put(n.package_dir.join("dist/entry.js"), ""), program),
        ("index emptied", |n| put(n.package_dir.join("dist/index.js"), ""), program),
        ("dependency ws gone", |n| rm(n.package_dir.join("node_modules/ws")), program),
        ("dependency zod gone", |n| rm(n.package_dir.join("node_modules/zod")), program),
        ("package.json gone", |n| rm(n.package_dir.join("package.json")), program),
        ("package.json garbage", |n| put(n.package_dir.join("package.json"), "{"), program),
        ("installation unfinished", |n| put(n.package_dir.join(".openclaw-lifecycle-pending"), ""), program),
        ("Node gone", |n| rm(n.node_bin.clone()), runtime),
        ("Node too old", |n| put(n.node_bin.clone(), "#!/bin/sh\necho v20.20.2\n"), runtime),
        ("Node broken", |n| put(n.node_bin.clone(), "#!/bin/sh\nexit 0\n"), runtime),
        ("Node not executable", |n| chmod(&n.node_bin, 0o644), runtime),
        ("config gone", |n| rm(n.config_path.clone()), config),
        ("config empty", |n| put(n.config_path.clone(), ""), config),
        ("config full of zeros", |n| put(n.config_path.clone(), "\0\0\0\0"), config),
        ("config half", |n| put(n.config_path.clone(), r#"{gateway:{mode:"loc"#), config),
        ("config not an object", |n| put(n.config_path.clone(), "[1]"), config),
        ("config without mode", |n| put(n.config_path.clone(), "{gateway:{}}"), config),
        (
            "config includes what is gone",
            |n| put(n.config_path.clone(), r#"{gateway:{mode:"local"},a:{$include:"x"}}"#),
            config,
        ),
        (
            "config open to the LAN",
            |n| put(n.config_path.clone(), r#"{gateway:{mode:"local",bind:"lan",auth:{mode:"none"}}}"#),
            config,
        ),
        ("state directory gone", |n| rm(n.state_dir.clone()), state_gone),
        ("state/ gone", |n| rm(n.state_dir.join("state")), state_gone),
        ("database gone", |n| rm(n.state_db()), state_gone),
        ("database emptied", |n| put(n.state_db(), ""), state_gone),
        ("agents gone", |n| rm(n.state_dir.join("agents")), (K::RootMissing, Some(C::Sessions))),
        (
            "workspace emptied",
            |n| rm(n.state_dir.join("workspace/AGENTS.md")),
            (K::RootMissing, Some(C::Workspace)),
        ),
        (
            "database garbage",
            |n| put(n.state_db(), "garbage that is no database at all"),
            (K::DatabaseCorrupt, Some(C::State)),
        ),
        (
            "agent's database garbage",
            |n| {
                let db = n.state_dir.join("agents/main/agent/openclaw-agent.sqlite");
                std::fs::create_dir_all(db.parent().expect("parent")).expect("mkdir");
                put(db, "garbage that is no database at all");
            },
            (K::DatabaseCorrupt, Some(C::Sessions)),
        ),
        (
            "another identity",
            |n| {
                rm(n.state_db());
                drop(state_db(&n.state_db(), Some("another"), 0));
            },
            (K::Amnesia, Some(C::State)),
        ),
        (
            "a fresh, empty database",
            |n| {
                rm(n.state_db());
                drop(state_db(&n.state_db(), None, 0));
            },
            (K::Amnesia, Some(C::State)),
        ),
        (
            "newer schema",
            |n| {
                let db = rusqlite::Connection::open(n.state_db()).expect("open");
                db.execute_batch("PRAGMA user_version = 19").expect("set");
            },
            (K::SchemaNewer, Some(C::State)),
        ),
        (
            "update at work",
            |n| std::fs::create_dir(n.package_dir.with_file_name(".openclaw-aB3dE5gH")).expect("mkdir"),
            (K::UpdateAtWork, Some(C::Program)),
        ),
    ];
    for (name, break_it, want) in cases {
        let w = Whole::new();
        break_it(&w.node);
        let seen = w.seen();
        assert!(seen.contains(&want), "{name}: {seen:?}");
        // One break is never blamed on something that is whole.
        let others: Vec<_> = seen.iter().filter(|s| **s != want && s.0 != K::UpdateAtWork).collect();
        let may_more = ["state directory gone", "state/ gone"].contains(&name);
        assert!(others.is_empty() || may_more, "{name}: also {others:?}");
    }
}

#[test]
fn a_database_damaged_inside_is_found_by_the_full_check_only() {
    let w = Whole::new();
    let mut bytes = std::fs::read(w.node.state_db()).expect("read");
    let tail = bytes.len() - 4096;
    for b in bytes.iter_mut().skip(tail).step_by(3) {
        *b ^= 0x5a;
    }
    std::fs::write(w.node.state_db(), bytes).expect("write");
    assert!(w.seen().contains(&(FaultKind::DatabaseCorrupt, Some(Class::State))));
}

#[test]
fn a_node_that_never_served_is_not_missing_anything() {
    let w = Whole::new();
    std::fs::remove_dir_all(w.node.state_dir.join("agents")).expect("rm");
    std::fs::remove_file(w.node.state_db()).expect("rm");
    assert_eq!(examine(&w.node, &Baseline::default(), Depth::Full, soon()).findings, []);
}

#[test]
fn the_owners_edit_is_not_a_broken_config() {
    let w = Whole::new();
    let text = std::fs::read_to_string(&w.node.config_path).expect("read");
    std::fs::write(&w.node.config_path, text.replace("gateway:{", "newThing:{a:1},gateway:{"))
        .expect("write");
    assert_eq!(w.examine(), [], "nobody has refused it yet");
}

#[test]
fn a_config_that_the_gateway_refused_after_a_change_is_broken() {
    let w = Whole::new();
    let log = w.node.home.join("gateway.log");
    let config = format!(
        r#"{{gateway:{{mode:"local",bogusKey:1,auth:{{token:"t"}}}},logging:{{file:"{}"}},agents:{{defaults:{{workspace:"{}/workspace"}}}}}}"#,
        log.display(),
        w.node.state_dir.display()
    );
    std::fs::write(&w.node.config_path, config).expect("write");
    std::fs::write(&log, "starting\nInvalid config: gateway: Unrecognized key: \"bogusKey\"\n")
        .expect("write");
    let found = w.examine();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].kind, FaultKind::ConfigBroken);
    assert!(found[0].evidence[0].contains("bogusKey"));
    // The same words about an unchanged config prove nothing.
    let same = Baseline {
        config: Some(config::fingerprint(&config::load(&w.node).expect("config").value)),
        ..w.baseline.clone()
    };
    assert_eq!(examine(&w.node, &same, Depth::Full, soon()).findings, []);
}

#[test]
#[allow(clippy::disallowed_methods, reason = "files are dated by the wall clock")]
fn words_about_a_config_that_was_put_right_since_are_not_believed() {
    let w = Whole::new();
    let log = w.node.home.join("gateway.log");
    let config = format!(
        r#"{{gateway:{{mode:"local",auth:{{token:"t"}}}},logging:{{file:"{}"}},agents:{{defaults:{{workspace:"{}/workspace"}}}}}}"#,
        log.display(),
        w.node.state_dir.display()
    );
    std::fs::write(&log, "Invalid config: gateway: Unrecognized key: \"bogusKey\"\n").expect("write");
    // A restored file has the time of its snapshot, long before the words: only its ctime tells when it was put there.
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(3_600);
    std::fs::File::options().write(true).open(&log).expect("open").set_modified(old).expect("date");
    std::fs::write(&w.node.config_path, config).expect("write");
    let older = old - std::time::Duration::from_secs(3_600);
    std::fs::File::options()
        .write(true)
        .open(&w.node.config_path)
        .expect("open")
        .set_modified(older)
        .expect("date");
    assert_eq!(w.examine(), []);
}

/// A runtime that answers as the program would, and counts how often it is asked.
fn answers(w: &Whole, answer: &str) {
    let asked = w.node.home.join("asked");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = --version ] && echo v26.10.0 && exit\necho x >> {}\ncat <<'END'\n{answer}\nEND\n",
        asked.display()
    );
    std::fs::write(&w.node.node_bin, script).expect("write");
}

#[test]
fn a_config_that_the_program_refuses_is_broken_before_any_gateway_died_of_it() {
    let mut w = Whole::new();
    let asked =
        |w: &Whole| std::fs::read_to_string(w.node.home.join("asked")).unwrap_or_default().lines().count();
    let text = std::fs::read_to_string(&w.node.config_path).expect("read");
    let refusal =
        r#"{"valid":false,"issues":[{"path":"gateway","message":"Unrecognized key: \"bogusKey\""}]}"#;
    answers(&w, refusal);
    assert_eq!(w.examine(), [], "it served with this one, whatever the program says");
    assert_eq!(asked(&w), 0, "and is not even asked");
    std::fs::write(&w.node.config_path, text.replace("gateway:{", "gateway:{bogusKey:1,")).expect("write");
    let looked = examine(&w.node, &w.baseline, Depth::Quick, soon());
    assert_eq!(looked.findings.len(), 1, "{looked:?}");
    assert_eq!(looked.findings[0].kind, FaultKind::ConfigBroken);
    assert!(looked.findings[0].evidence[0].contains("bogusKey"), "{looked:?}");
    w.baseline.remember(looked.checked.expect("an answer"));
    assert_eq!(w.seen(), [(FaultKind::ConfigBroken, Some(Class::Config))]);
    assert_eq!(asked(&w), 1, "the same config is asked about once");
    // A node of which nothing is known is not told by a program that may lack a plugin.
    let unknown = Baseline { config: None, ..w.baseline.clone() };
    assert_eq!(examine(&w.node, &unknown, Depth::Quick, soon()).findings, []);
    // A channel of the node's own plugin is unknown to a program that does not see the plugin.
    let channel =
        r#"{"valid":false,"issues":[{"path":"channels.mine","message":"unknown channel id: mine"}]}"#;
    answers(&w, channel);
    std::fs::write(&w.node.config_path, text.replace("gateway:{", "channels:{mine:{}},gateway:{"))
        .expect("write");
    assert_eq!(w.seen(), [(FaultKind::ConfigBroken, Some(Class::Config))]);
    std::fs::create_dir_all(w.node.state_dir.join("extensions/mine")).expect("mkdir");
    assert_eq!(w.seen(), []);
    // A program that cannot answer says nothing about the config.
    answers(&w, "Error: Cannot find module");
    std::fs::write(&w.node.config_path, text.replace("gateway:{", "other:1,gateway:{")).expect("write");
    assert_eq!(w.seen(), []);
}

#[test]
fn ownership_is_seen_as_the_nodes_user_would_see_it() {
    let mut w = Whole::new();
    if w.node.ids.uid != 0 {
        chmod(&w.node.state_db(), 0o000);
        assert!(w.seen().iter().any(|(k, _)| *k == FaultKind::Permission));
        return;
    }
    // As root everything may be read: the node's user is another, and the files are root's.
    w.node.ids = host::run::Ids { uid: 12_345, gid: 12_345 };
    chmod(&w.node.state_db(), 0o600);
    chmod(&w.node.node_bin, 0o755);
    let kinds: Vec<_> =
        examine(&w.node, &w.baseline, Depth::Quick, soon()).findings.iter().map(|f| f.kind).collect();
    assert!(kinds.contains(&FaultKind::Permission), "{kinds:?}");
}

#[test]
fn a_config_that_the_gateway_may_only_read_is_its_owners_choice() {
    let mut w = Whole::new();
    if w.node.ids.uid != 0 {
        return;
    }
    w.node.ids = host::run::Ids { uid: 12_345, gid: 12_345 };
    let named = |w: &Whole| foreign(&w.node).iter().any(|f| f.path == w.node.config_path);
    chmod(&w.node.config_path, 0o644);
    assert!(!named(&w));
    // As a `sudo openclaw` leaves it.
    chmod(&w.node.config_path, 0o600);
    assert!(named(&w));
}

#[test]
fn a_stranger_on_the_port_is_told_with_its_program() {
    let mut w = Whole::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    w.node.port = listener.local_addr().expect("addr").port();
    let found = w.examine();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].kind, FaultKind::PortTaken);
    assert!(found[0].what.contains(&std::process::id().to_string()));
    assert_eq!(found[0].evidence.len(), 2);
}

#[test]
fn a_unit_that_is_gone_or_empty_is_service_damage() {
    let mut w = Whole::new();
    let file = w.node.home.join("openclaw-gateway.service");
    let unit =
        |files| crate::Unit { name: "openclaw-gateway.service".into(), scope: crate::Scope::User, files };
    w.node.unit = Some(unit(vec![file.clone()]));
    let damaged = (FaultKind::FilesDamaged, Some(Class::Service));
    assert_eq!(w.seen(), [damaged]);
    std::fs::write(&file, "").expect("write");
    assert_eq!(w.seen(), [damaged]);
    std::fs::write(&file, "[Service]\nType=simple\n").expect("write");
    assert_eq!(w.seen(), [damaged]);
    std::fs::write(&file, "[Service]\nExecStart=/usr/bin/openclaw gateway\n").expect("write");
    assert_eq!(w.seen(), []);
    std::fs::remove_file(&file).expect("rm");
    std::os::unix::fs::symlink("/dev/null", &file).expect("link");
    assert_eq!(w.seen(), [(FaultKind::OwnersWill, Some(Class::Service))]);
}

#[test]
fn one_agents_damaged_database_is_no_amnesia_of_the_node() {
    let mut w = Whole::new();
    // The usual node: one agent, nobody paired.
    std::fs::remove_file(w.node.state_db()).expect("rm");
    drop(state_db(&w.node.state_db(), Some("device"), 0));
    let agent = w.node.state_dir.join("agents/main/agent/openclaw-agent.sqlite");
    std::fs::create_dir_all(agent.parent().expect("parent")).expect("mkdir");
    let db = rusqlite::Connection::open(&agent).expect("open");
    db.execute_batch(
        "CREATE TABLE sessions (id TEXT); INSERT INTO sessions VALUES ('s');
         CREATE TABLE transcript_events (id INTEGER PRIMARY KEY); INSERT INTO transcript_events VALUES (1);",
    )
    .expect("schema");
    drop(db);
    w.baseline = Baseline::take(&w.node, Vec::new(), host::clock::now(), soon()).expect("baseline");
    assert_eq!((w.baseline.counts.agents, w.baseline.counts.transcript), (1, 1));
    std::fs::write(&agent, "garbage that is no database at all").expect("write");
    // The state database is whole and the device is the same: what it holds is not to go back to a snapshot.
    assert_eq!(w.seen(), [(FaultKind::DatabaseCorrupt, Some(Class::Sessions))], "{:?}", w.examine());
}

#[test]
fn a_listener_on_another_address_is_in_nobodys_way() {
    let mut w = Whole::new();
    // A proxy on an address of the LAN in front of a gateway on loopback, on the same port number.
    let proxy = std::net::TcpListener::bind("127.0.0.2:0").expect("bind");
    w.node.port = proxy.local_addr().expect("address").port();
    drop(std::net::TcpListener::bind(("127.0.0.1", w.node.port)).expect("a gateway could listen"));
    assert_eq!(w.seen(), [], "{:?}", w.examine());
}
