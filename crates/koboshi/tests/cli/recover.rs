//! `koboshi recover`: with nobody guarding, from the fall to the judge's word.

use crate::agent::until;
use crate::fake::{Fake, same};
use crate::gateway::Agent;
use host::process::ProcessId;
use rustix::process::Signal;
use serde_json::json;

#[test]
fn a_dry_run_says_what_it_would_do_and_touches_nothing() {
    let fake = Fake::new();
    fake.start_gateway();
    fake.koboshi(&["accept"]).code(0);
    fake.kill_gateway();
    std::fs::write(fake.package().join("dist/index.js"), "").unwrap();
    // The store's readers meet in this lock file; it holds no byte.
    let lock = "k/state/store/read.lock";
    let before = fake.picture(&[lock]);
    let (object, code) = fake.json(&["recover", "--dry-run"]);
    assert_eq!(code, 1, "{object}");
    let plan = object["plan"].as_array().unwrap();
    let tries = |name: &str| plan.iter().find(|p| p["layer"] == name).unwrap()["would_try"].clone();
    assert_eq!(
        (tries("restart"), tries("restore"), tries("peer-copy")),
        (json!(false), json!(true), json!(false))
    );
    assert!(object["findings"].to_string().contains("index.js"), "{object}");
    let (object, _) = fake.json(&["recover", "--dry-run", "--only", "restart"]);
    assert!(object["plan"].as_array().unwrap().iter().all(|p| p["would_try"] == false), "{object}");
    same(&before, &fake.picture(&[lock]));
    fake.koboshi(&["recover", "--only", "system-install"]).code(1).says("switched off in the configuration");
    fake.koboshi(&["recover", "--only", "restart"]).code(1).says("not clean");
}

#[test]
fn a_fallen_node_is_put_right_without_an_agent_and_none_is_left_behind() {
    let fake = Fake::new();
    fake.start_gateway();
    fake.koboshi(&["accept"]).code(0);
    let (object, code) = fake.json(&["recover"]);
    assert_eq!((code, &object["outcome"]), (0, &json!("left-alone")), "nothing to do: {object}");

    fake.kill_gateway();
    std::fs::write(fake.package().join("dist/index.js"), "").unwrap();
    let (object, code) = fake.json(&["recover"]);
    assert_eq!((code, &object["outcome"]), (0, &json!("recovered")), "{object}");
    // An agent that begins starts its gateway first; this one comes up even on a damaged program.
    assert!([json!("restore"), json!("in-place")].contains(&object["layer"]), "{object}");
    assert_eq!(object["incident"], 1);
    assert!(fake.gateway().is_some());
    assert!(
        std::fs::read_to_string(fake.package().join("dist/index.js"))
            .unwrap()
            .starts_with("// dist/index.js")
    );
    let (object, _) = fake.json(&["status"]);
    assert_eq!(
        (&object["agent"]["running"], &object["verdict"]),
        (&json!(false), &json!("serving")),
        "{object}"
    );
}

#[test]
fn one_layer_by_hand() {
    let fake = Fake::new();
    fake.start_gateway();
    fake.koboshi(&["accept"]).code(0);
    fake.kill_gateway();
    let (object, code) = fake.json(&["recover", "--only", "restart"]);
    assert_eq!((code, &object["layer"]), (0, &json!("restart")), "{object}");
    assert!(fake.gateway().is_some());
    let (object, _) = fake.json(&["status"]);
    assert!(object.get("hands_off").is_none(), "the pause is over: {object}");
}

/// A gateway that its lock no longer names, ended at the test's end.
struct Orphan(ProcessId);

impl Drop for Orphan {
    fn drop(&mut self) {
        let _ = self.0.signal(Signal::KILL);
    }
}

#[test]
fn a_state_directory_deleted_under_a_running_gateway_loses_nothing_that_it_holds_open() {
    let fake = Fake::new();
    let gateway = Orphan(fake.start_gateway());
    fake.koboshi(&["accept"]).code(0);
    let _agent = Agent::start(&fake);
    let db = rusqlite::Connection::open(fake.state().join("state/openclaw.sqlite")).unwrap();
    db.execute_batch("INSERT INTO cron_jobs VALUES('newer than any snapshot')").unwrap();
    drop(db);
    // The lock that names the gateway goes with it; what it holds open tells whose it is all the same.
    std::fs::remove_dir_all(fake.state()).unwrap();
    until(&fake, "recovered", |s| s["incidents"][0]["outcome"] == "recovered" && s["verdict"] == "serving");
    assert!(!gateway.0.alive(), "one gateway serves");
    let db = rusqlite::Connection::open(fake.state().join("state/openclaw.sqlite")).unwrap();
    let sql = "SELECT count(*) FROM cron_jobs WHERE id LIKE 'newer%'";
    assert_eq!(db.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap(), 1);
    for file in [
        "openclaw.json",
        "workspace/MEMORY.md",
        "credentials/x.json",
        "agents/main/agent/openclaw-agent.sqlite",
    ] {
        assert!(fake.state().join(file).is_file(), "{file}");
    }
}
