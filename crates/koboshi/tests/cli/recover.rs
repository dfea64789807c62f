//! `koboshi recover`: with nobody guarding, from the fall to the judge's word.

use crate::fake::{Fake, same};
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
