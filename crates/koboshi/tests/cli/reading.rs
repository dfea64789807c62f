//! Commands that only read: what they say, and that they leave no trace.

use crate::fake::{Fake, VERSION, same};
use serde_json::json;

const READING: &[&[&str]] = &[
    &["status"],
    &["check"],
    &["doctor"],
    &["recover", "--dry-run"],
    &["snapshot", "list"],
    &["incidents", "list"],
    &["install", "--dry-run"],
    &["uninstall", "--dry-run"],
    &["uninstall", "--purge", "--dry-run"],
];

#[test]
fn reading_leaves_no_trace_on_a_node_that_is_down() {
    let fake = Fake::new();
    let before = fake.picture(&[]);
    for args in READING {
        let (object, _) = fake.json(args);
        assert!(object.get("error").is_none(), "{args:?}: {object}");
    }
    same(&before, &fake.picture(&[]));
}

#[test]
fn reading_leaves_no_trace_on_a_node_that_serves() {
    let fake = Fake::new();
    let gateway = fake.start_gateway();
    let before = fake.picture(&[]);
    for args in READING {
        let said = fake.koboshi(args);
        assert!(!said.err.contains("error"), "{args:?}: {}", said.err);
    }
    same(&before, &fake.picture(&[]));
    assert_eq!(fake.gateway(), Some(gateway));
}

#[test]
fn check_says_what_is_and_the_exit_code_says_the_same() {
    let fake = Fake::new();
    let (object, code) = fake.json(&["check"]);
    assert_eq!((code, &object["verdict"]), (1, &json!("not-serving")), "{object}");
    assert!(object["why"].as_str().unwrap().contains("no gateway process"));
    let gateway = fake.start_gateway();
    let (object, code) = fake.json(&["check"]);
    assert_eq!((code, &object["verdict"]), (0, &json!("serving")), "{object}");
    assert_eq!(object["pid"], json!(gateway.pid));
    assert_eq!(object["confidence"], "http");
    assert_eq!(object["node"]["version"], VERSION);
    fake.koboshi(&["check"]).code(0).says("serving");
}

#[test]
fn status_without_an_agent_says_that_nothing_guards() {
    let fake = Fake::new();
    fake.start_gateway();
    let (object, code) = fake.json(&["status"]);
    assert_eq!(code, 0, "{object}");
    assert_eq!((&object["agent"]["running"], &object["judged_by"]), (&json!(false), &json!("look")));
    fake.koboshi(&["status"]).code(0).says("by one look of this command: no agent is there");
    assert_eq!(object["snapshots"]["count"], 0);
    assert_eq!(object["manager"], "embedded");
    let layers = object["layers"].as_array().unwrap();
    let ready = |name: &str| layers.iter().find(|l| l["layer"] == name).unwrap()["ready"].clone();
    assert_eq!((ready("restart"), ready("restore")), (json!(true), json!(false)));
    let said = fake.koboshi(&["status"]);
    said.code(0).says("not running").says("nobody would be told").says("none on record");
    assert!(
        said.out.starts_with("Nobody will be told of an emergency"),
        "the first line warns: {}",
        said.out
    );
    assert_eq!(object["alerts"]["anybody"], false, "{object}");
}

#[test]
fn doctor_names_what_is_in_the_way() {
    let fake = Fake::new();
    fake.start_gateway();
    let (object, code) = fake.json(&["doctor"]);
    assert_eq!(code, 1);
    let level = |id: &str| {
        let all = object["findings"].as_array().unwrap();
        all.iter()
            .find(|f| f["id"] == id)
            .map_or_else(|| "absent".to_owned(), |f| f["level"].as_str().unwrap().to_owned())
    };
    assert_eq!(level("agent"), "blocks");
    assert_eq!(level("snapshot"), "blocks");
    assert_eq!(level("alerts"), "warns");
    assert_eq!(level("token"), "warns");
    assert_eq!(level("switch"), "ok");
    assert_eq!(level("runtime"), "ok");
    let said = fake.koboshi(&["doctor"]);
    assert!(
        said.out.starts_with("Nobody will be told of an emergency"),
        "the first line warns: {}",
        said.out
    );
    for finding in object["findings"].as_array().unwrap() {
        assert_eq!(finding["level"] == "ok", finding.get("fix").is_none(), "{finding}");
    }
}

#[test]
fn pausing_ends_by_itself_and_is_shown() {
    let fake = Fake::new();
    fake.koboshi(&["pause", "--for", "90m"]).code(0).says("90 min");
    let (object, _) = fake.json(&["status"]);
    assert!(object["hands_off"].as_str().unwrap().contains("koboshi resume"), "{object}");
    let (object, code) = fake.json(&["recover"]);
    assert_eq!(code, 2, "{object}");
    fake.koboshi(&["resume"]).code(0).says("Hands on again");
    let (object, _) = fake.json(&["status"]);
    assert!(object.get("hands_off").is_none());
    fake.koboshi(&["pause", "--for", "soon"]).code(2).says("fix:");
}

#[test]
fn closed_incidents_are_listed_and_told() {
    let fake = Fake::new();
    let dir = fake.koboshi_state().join("incidents");
    std::fs::create_dir_all(&dir).unwrap();
    let at = |ms: u64| json!({"boot": 7, "ms": ms});
    let records = json!([
        {"at": at(1_000), "wall": "2026-11-22T10:00:00.5Z",
         "event": {"type": "opened", "incident": 12, "kind": "outage", "cause": "the gateway ended", "findings": []}},
        {"at": at(1_010), "event": {"type": "climb-began", "climb": 1, "full": true, "why": "it was opened"}},
        {"at": at(20_000), "event": {"type": "recovered", "layer": "restart", "from_emergency": false}},
    ]);
    let text = json!({"first_good": at(15_000), "records": records}).to_string();
    std::fs::write(dir.join("00000012.json"), text).unwrap();
    let (object, code) = fake.json(&["incidents", "list"]);
    assert_eq!(code, 0);
    assert_eq!(fake.json(&["incidents"]), (object.clone(), 0), "without a further word");
    let one = &object["incidents"][0];
    assert_eq!(
        (&one["id"], &one["outcome"], &one["layer"]),
        (&json!(12), &json!("recovered"), &json!("restart"))
    );
    assert_eq!(one["down_ms"], json!(14_000.0));
    fake.koboshi(&["incidents", "show", "12"]).code(0).says("the gateway ended").says("recovered by restart");
    fake.koboshi(&["incidents", "show", "incident-12"]).code(0).says("2026-11-22 10:00:00");
    fake.koboshi(&["incidents", "show", "13"]).code(1).says("no such incident");
    fake.koboshi(&["incidents", "show", "x"]).code(2).says("a number");
    std::fs::write(dir.join("00000012.json"), "{").unwrap();
    fake.koboshi(&["incidents", "show", "12"]).code(1).says("damaged");
}

#[test]
fn alert_test_reaches_nobody_without_a_channel_and_says_so() {
    let fake = Fake::new();
    let (object, code) = fake.json(&["alert", "test"]);
    assert_eq!((code, &object["reached_somebody"]), (1, &json!(false)), "{object}");
    let channels = object["channels"].as_array().unwrap();
    assert!(channels.iter().all(|c| c["local"] == true && c["accepted"] == true), "{object}");
}

#[test]
fn a_command_line_that_stops_too_early_is_one_object_too() {
    let fake = Fake::new();
    for group in ["node", "alert", "key"] {
        let (object, code) = fake.json(&[group]);
        assert_eq!(code, 2, "{group}");
        assert!(
            object["error"]["why"].as_str().is_some_and(|w| w.contains("subcommand")),
            "{group}: {object}"
        );
    }
}

#[test]
fn a_configuration_that_is_no_file_is_a_usage_error() {
    let fake = Fake::new();
    std::fs::remove_file(fake.config()).unwrap();
    std::fs::create_dir(fake.config()).unwrap();
    fake.koboshi(&["status"]).code(2).says("koboshi.toml").says("fix:");
}

#[test]
fn a_named_configuration_that_is_not_there_is_an_error_and_not_an_empty_one() {
    let fake = Fake::new();
    fake.start_gateway();
    std::fs::remove_file(fake.config()).unwrap();
    let before = fake.picture(&[]);
    for args in [&["status"][..], &["check"], &["guard"], &["snapshot", "list"], &["uninstall", "--purge"]] {
        let said = fake.koboshi(args);
        said.code(2).says("koboshi.toml").says("there is no such file").says("fix: correct --config");
    }
    let (object, code) = fake.json(&["check"]);
    assert_eq!((code, object["error"]["why"].as_str()), (2, Some("there is no such file")), "{object}");
    // The same by the environment, and a value that names nothing.
    for named in [fake.config().into_os_string(), "".into()] {
        let mut cmd = fake.command(&["check"]);
        cmd.args.drain(..2);
        cmd.env.push(("KOBOSHI_CONFIG".into(), named.clone()));
        cmd.env_clear = true;
        let out =
            host::run::run(&cmd, host::clock::Deadline::after(std::time::Duration::from_secs(60))).unwrap();
        assert_eq!(out.status, Some(2), "{named:?}: {}", String::from_utf8_lossy(&out.stderr));
    }
    same(&before, &fake.picture(&[]));
    // What only `install` may do, and the default place, which may be empty.
    let (prefix, state) = (fake.path("prefix"), fake.state());
    let (prefix, state) = (prefix.to_str().unwrap(), state.to_str().unwrap());
    let (object, code) = fake.json(&["install", "--dry-run", "--prefix", prefix, "--state-dir", state]);
    assert_eq!(code, 0, "{object}");
    if !rustix::process::geteuid().is_root() {
        let mut cmd = fake.command(&["incidents", "list"]);
        cmd.args[1] = fake.home().join(".config/koboshi/koboshi.toml").into();
        cmd.env_clear = true;
        let out =
            host::run::run(&cmd, host::clock::Deadline::after(std::time::Duration::from_secs(60))).unwrap();
        assert_eq!(out.status, Some(0), "{}", String::from_utf8_lossy(&out.stderr));
    }
}
