//! `koboshi install` and `koboshi uninstall`: the node is only read, down to the byte.

use crate::fake::{Fake, same};
use serde_json::json;

/// koboshi's own places in these tests.
const OWN: &[&str] = &["k"];

#[test]
fn install_and_uninstall_leave_the_node_exactly_as_it_was() {
    let fake = Fake::new();
    let gateway = fake.start_gateway();
    let before = fake.picture(OWN);
    let said = fake.koboshi(&["install", "--no-service"]);
    said.code(0).says("serving").says("First snapshot").says("is only read").says("at most");
    assert!(
        said.out.starts_with("Nobody will be told of an emergency"),
        "the first line warns: {}",
        said.out
    );
    same(&before, &fake.picture(OWN));
    assert_eq!(fake.gateway(), Some(gateway), "the same process, with the same start ticks");
    for file in ["state/node.json", "state/baseline.json", "keys/store.key"] {
        assert!(fake.path("k").join(file).is_file(), "{file}");
    }

    // Again: nothing that is right already changes.
    let own = fake.picture(&[]);
    let (object, code) = fake.json(&["install", "--no-service"]);
    assert_eq!(code, 0, "{object}");
    assert!(object["writes"].as_array().unwrap().iter().all(|w| w["state"] == "kept"), "{object}");
    same(&own, &fake.picture(&[]));

    fake.koboshi(&["uninstall"]).code(0).says("stays as it is").says("keeps");
    same(&before, &fake.picture(OWN));
    assert_eq!(fake.gateway(), Some(gateway));
    assert!(!fake.config().exists() && fake.koboshi_state().join("store").is_dir());
}

#[test]
fn purge_says_so_and_leaves_nothing_of_koboshi_and_everything_else() {
    let fake = Fake::new();
    let gateway = fake.start_gateway();
    let before = fake.picture(OWN);
    fake.koboshi(&["install", "--no-service"]).code(0);
    std::fs::write(fake.koboshi_state().join("somebody-elses"), "x").unwrap();
    fake.koboshi(&["uninstall", "--purge"]).code(0).says("Every snapshot, the key");
    same(&before, &fake.picture(OWN));
    assert_eq!(fake.gateway(), Some(gateway));
    let left: Vec<_> =
        fake.picture(&[]).into_keys().filter(|p| p.starts_with(fake.path("k")) && p.is_file()).collect();
    assert_eq!(left, [fake.koboshi_state().join("somebody-elses")]);
}

#[test]
fn without_systemd_the_lines_are_printed() {
    if host::service::systemd_running() {
        return;
    }
    let fake = Fake::new();
    let (object, code) = fake.json(&["install", "--dry-run"]);
    assert_eq!(code, 0, "{object}");
    let service = &object["service"];
    assert_eq!(service["kind"], "none");
    assert!(service["dockerfile"].as_str().unwrap().contains("ENTRYPOINT [\"koboshi\""), "{service}");
    assert!(service["cron"].as_str().unwrap().starts_with("@reboot "));
    assert!(service["wsl_conf"].as_str().unwrap().starts_with("[boot]\n"));
    fake.koboshi(&["install"])
        .code(0)
        .says("ENTRYPOINT")
        .says("/etc/wsl.conf")
        .says("@reboot")
        .says("stop_grace_period");
}

#[test]
fn a_fresh_configuration_is_commented_and_holds_what_was_asked_for() {
    let fake = Fake::new();
    // Nothing but the options name the node; koboshi's own places follow the home directory.
    std::fs::remove_file(fake.config()).unwrap();
    let said = fake.koboshi(&[
        "install",
        "--no-service",
        "--prefix",
        fake.path("prefix").to_str().unwrap(),
        "--state-dir",
        fake.state().to_str().unwrap(),
    ]);
    said.code(0);
    let text = std::fs::read_to_string(fake.config()).unwrap();
    assert!(text.contains(&format!("\nprefix = \"{}\"\n", fake.path("prefix").display())), "{text}");
    assert!(text.contains("# [[alert]]") && text.contains("\n# mode = \"guard\"\n"));
    assert!(fake.home().join(".local/state/koboshi/node.json").is_file());
    fake.koboshi(&["uninstall", "--purge"]).code(0);
    assert!(!fake.home().join(".local/state/koboshi").exists());
}

#[test]
fn a_node_that_is_down_is_installed_for_all_the_same() {
    let fake = Fake::new();
    let (object, code) = fake.json(&["install", "--no-service"]);
    assert_eq!((code, &object["verdict"]), (0, &json!("not-serving")), "{object}");
    assert_eq!(fake.gateway(), None, "install starts nothing");
    assert!(!fake.koboshi_state().join("baseline.json").exists(), "a node that is down is no baseline");
}
