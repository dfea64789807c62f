//! `koboshi snapshot` and `koboshi key`.

use crate::fake::{Fake, same};
use serde_json::json;

#[test]
fn taken_listed_shown_proven_and_brought_back() {
    let fake = Fake::new();
    fake.koboshi(&["snapshot", "verify"]).code(1).says("there is none").says("fix:");
    let before = fake.picture(&["k"]);
    let (object, code) = fake.json(&["snapshot", "create", "--note", "mine"]);
    assert_eq!(code, 0, "{object}");
    same(&before, &fake.picture(&["k"]));
    let id = object["snapshot"]["id"].as_str().unwrap().to_owned();
    assert_eq!(object["snapshot"]["trust"], "candidate");

    let (object, _) = fake.json(&["snapshot", "list"]);
    assert_eq!(object["snapshots"][0]["note"], "mine");
    assert_eq!(fake.json(&["snapshot"]).0["snapshots"], object["snapshots"], "without a further word");
    fake.koboshi(&["snapshot", "show", &id]).code(0).says("workspace").says("candidate");
    fake.koboshi(&["snapshot", "show", "1"]).code(0);
    fake.koboshi(&["snapshot", "show", "zzz"]).code(1).says("no such snapshot");
    fake.koboshi(&["snapshot", "verify", &id]).code(0).says("proven");

    let to = fake.path("back");
    let (object, code) =
        fake.json(&["snapshot", "restore", &id, "--to", to.to_str().unwrap(), "--class", "workspace"]);
    assert_eq!(code, 0, "{object}");
    assert_eq!(object["classes"], json!(["workspace"]));
    assert_eq!(std::fs::read_to_string(to.join("workspace/MEMORY.md")).unwrap(), "remember\n");
    assert!(!to.join("program").exists());
}

#[test]
fn a_restore_never_goes_into_what_is_in_use() {
    let fake = Fake::new();
    fake.json(&["snapshot", "create"]);
    let before = fake.picture(&[]);
    for to in [fake.state().join("workspace/new"), fake.package().join("new"), fake.package(), fake.home()] {
        let said = fake.koboshi(&["snapshot", "restore", "1", "--to", to.to_str().unwrap()]);
        said.code(2).says("fix:");
    }
    fake.koboshi(&["snapshot", "restore", "1", "--to", "/x", "--class", "everything"])
        .code(2)
        .says("one of program");
    same(&before, &fake.picture(&[]));
}

#[test]
fn a_flipped_bit_is_found_and_named() {
    let fake = Fake::new();
    fake.json(&["snapshot", "create"]);
    let packs = fake.koboshi_state().join("store/packs");
    let largest = walk(&packs).into_iter().max_by_key(|p| p.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(&largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&largest, bytes).unwrap();
    let (object, code) = fake.json(&["snapshot", "verify"]);
    assert_eq!((code, &object["sound"]), (1, &json!(false)), "{object}");
    assert!(!object["bad"].as_array().unwrap().is_empty());
    fake.koboshi(&["snapshot", "verify"]).code(1).says("damaged").says("fix:");
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        if entry.path().is_dir() { files.extend(walk(&entry.path())) } else { files.push(entry.path()) }
    }
    files
}

#[test]
fn the_key_is_exported_as_it_is_and_doctor_knows() {
    let fake = Fake::new();
    fake.koboshi(&["key", "export"]).code(1).says("fix:");
    fake.json(&["snapshot", "create"]);
    let level = || {
        let (object, _) = fake.json(&["doctor"]);
        let all = object["findings"].as_array().unwrap().clone();
        all.iter().find(|f| f["id"] == "key").unwrap()["level"].as_str().unwrap().to_owned()
    };
    assert_eq!(level(), "warns");
    let said = fake.koboshi(&["key", "export"]);
    said.code(0);
    assert_eq!(said.out, std::fs::read_to_string(fake.path("k/keys/store.key")).unwrap());
    assert_eq!(level(), "ok");
    std::fs::remove_file(fake.path("k/keys/store.key")).unwrap();
    assert_eq!(level(), "blocks");
    fake.koboshi(&["snapshot", "list"]).code(1).says("store.key").says("fix:");
}

#[test]
fn pruning_keeps_the_newest() {
    let fake = Fake::new();
    for i in 0..3 {
        std::fs::write(fake.state().join("workspace/MEMORY.md"), format!("{i}").repeat(5_000)).unwrap();
        fake.json(&["snapshot", "create"]);
    }
    let (object, code) = fake.json(&["snapshot", "prune", "--limit", "1"]);
    assert_eq!(code, 0, "{object}");
    assert_eq!(
        (object["removed"].as_array().unwrap().len(), &object["over_limit"]),
        (2, &json!(true)),
        "{object}"
    );
    let (object, _) = fake.json(&["snapshot", "list"]);
    assert_eq!(object["snapshots"].as_array().unwrap().len(), 1);
}
