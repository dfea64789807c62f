//! `koboshi install` and `koboshi uninstall`: the node is only read, down to the byte.

use crate::fake::{Fake, same};
use crate::gateway::Agent;
use host::clock::Deadline;
use serde_json::json;
use std::time::Duration;

/// koboshi's own places in these tests.
const OWN: &[&str] = &["k"];
/// A first snapshot, its settling and a repair, on a machine that has other work.
const LIFE: Duration = Duration::from_secs(120);

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

/// Whatever a koboshi that lived has written goes, and what others put beside it stays. A new file of koboshi's that this
/// life makes and the list does not know is found here.
#[test]
fn a_purge_after_a_whole_life_leaves_only_what_others_put_there() {
    let fake = Fake::new();
    fake.configure("[backup]\nsettle_s = 1\n[store]\nspare = true\nscrub_every_s = 96\n");
    fake.koboshi(&["node", "start"]).code(0);
    let agent = Agent::start(&fake);
    let deadline = Deadline::after(LIFE);
    while fake.json(&["status"]).0["snapshots"]["newest_good"].is_null() {
        assert!(!deadline.passed(), "no good snapshot");
        std::thread::sleep(Duration::from_millis(100));
    }
    // An incident with something replaced, a pause, the key, orders.
    std::fs::write(fake.package().join("node_modules/ws/index.js"), "").unwrap();
    let deadline = Deadline::after(LIFE);
    while fake.json(&["incidents", "list"]).0["incidents"][0]["outcome"] != "recovered" {
        assert!(!deadline.passed(), "no incident");
        std::thread::sleep(Duration::from_millis(100));
    }
    fake.koboshi(&["pause", "--for", "1h"]).code(0);
    fake.koboshi(&["key", "export"]).code(0);
    fake.koboshi(&["alert", "test"]);
    agent.kill();
    // What takes peers, sudo or a registry to be made.
    let ours = [
        "keys/donate",
        "koboshi.d/peer-host-22.toml",
        "state/contacts",
        "state/exchanged.json",
        "state/journal.lost",
        "state/moved.json",
        "state/nodes/main.json",
        "state/programs.json",
        "state/proof.json",
        "state/reading/koboshi-1-2-3/db",
        "state/service.json",
        "state/tools/npm.tgz",
        "run/donate-0.lock",
        "run/enroll.known_hosts",
        "run/journal",
        "run/outbox/1.json",
        "run/recover.log",
        "run/status.new",
    ];
    let others = ["keys/theirs", "koboshi.d/theirs.toml", "state/theirs", "run/theirs"];
    for file in ours.iter().chain(&others) {
        let path = fake.path("k").join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "").unwrap();
    }
    let (object, _) = fake.json(&["uninstall", "--purge", "--dry-run"]);
    let said: Vec<_> = object["removes"].as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
    assert!(said.iter().all(|p| !p.contains("theirs")), "{said:?}");
    fake.koboshi(&["uninstall", "--purge"]).code(0);
    let left: Vec<_> =
        fake.picture(&[]).into_keys().filter(|p| p.starts_with(fake.path("k")) && !p.is_dir()).collect();
    let mut wanted: Vec<_> = others.iter().map(|f| fake.path("k").join(f)).collect();
    wanted.sort();
    assert_eq!(left, wanted);
    assert!(!fake.path("prefix/lib/.koboshi-spare").exists(), "the spare goes too");
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
