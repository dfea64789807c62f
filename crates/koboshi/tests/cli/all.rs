//! What holds for every command.

use crate::fake::{Fake, same};

/// Every command that reads a configuration.
const COMMANDS: &[&[&str]] = &[
    &["status"],
    &["check"],
    &["doctor"],
    &["recover"],
    &["recover", "--dry-run"],
    &["snapshot", "create"],
    &["snapshot", "list"],
    &["snapshot", "show", "1"],
    &["snapshot", "verify"],
    &["snapshot", "restore", "1", "--to", "/nowhere/koboshi-test"],
    &["snapshot", "prune"],
    &["incidents", "list"],
    &["incidents", "show", "1"],
    &["pause"],
    &["resume"],
    &["accept"],
    &["node", "start"],
    &["node", "stop"],
    &["node", "restart"],
    &["alert", "test"],
    &["key", "export"],
    &["install"],
    &["uninstall"],
    &["guard"],
];

#[test]
fn a_configuration_with_an_unknown_key_is_one_clear_error_everywhere() {
    let fake = Fake::new();
    std::fs::write(fake.config(), "[backup]\nsettle_z = 3\n").unwrap();
    let before = fake.picture(&[]);
    for args in COMMANDS {
        let (object, code) = fake.json(args);
        assert_eq!(code, 2, "{args:?}: {object}");
        let error = &object["error"];
        assert!(error["what"].as_str().unwrap().contains("koboshi.toml:2"), "{args:?}: {error}");
        assert!(error["hint"].as_str().unwrap().contains("`settle_s`"), "{args:?}: {error}");
    }
    same(&before, &fake.picture(&[]));
}

#[test]
fn a_configuration_that_is_no_text_is_an_error() {
    let fake = Fake::new();
    std::fs::write(fake.config(), [0xff, 0xfe, 0x00]).unwrap();
    let (object, code) = fake.json(&["status"]);
    assert_eq!(code, 2);
    assert!(object["error"]["hint"].is_string(), "{object}");
}

#[test]
fn a_command_line_that_is_not_understood_is_one_object_too() {
    let fake = Fake::new();
    for args in [&["statsu"][..], &["snapshot", "restore", "1"], &["incidents", "show"]] {
        let (object, code) = fake.json(args);
        assert_eq!(code, 2, "{object}");
        assert!(object["error"]["what"].is_string());
    }
}

#[test]
fn a_node_that_cannot_be_found_is_named_with_a_way_out() {
    let fake = Fake::new();
    std::fs::remove_dir_all(fake.state()).unwrap();
    let said = fake.koboshi(&["check"]);
    said.code(1).says("error:").says("fix:");
    let (object, code) = fake.json(&["doctor"]);
    assert_eq!(code, 1);
    assert_eq!(object["ready"], false);
    let node = object["findings"].as_array().unwrap().iter().find(|f| f["id"] == "node").unwrap();
    assert_eq!(node["level"], "blocks");
}

#[test]
fn completions_and_man_pages_come_without_a_configuration() {
    let fake = Fake::new();
    std::fs::write(fake.config(), "nonsense").unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let said = fake.koboshi(&["completions", shell]);
        said.code(0).says("koboshi").says("incidents");
    }
    let dir = fake.path("man");
    fake.koboshi(&["man", dir.to_str().unwrap()]).code(0);
    for page in ["koboshi.1", "koboshi-snapshot-restore.1", "koboshi-node-stop.1"] {
        let text = std::fs::read_to_string(dir.join(page)).unwrap();
        assert!(text.contains(".TH"), "{page}");
    }
    assert!(!dir.join("koboshi-step.1").exists(), "hidden commands have no page");
}
