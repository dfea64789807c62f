//! What a later snapshot no longer holds is told, and nothing else.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod common;

use common::{Place, root, settle, soon};
use engine::words::Class;
use std::fs;
use std::time::Duration;

const WEEK: Duration = Duration::from_secs(7 * 86_400);

#[test]
fn a_file_that_lay_still_and_went_is_told_and_what_comes_and_goes_is_not() {
    let mut place = Place::new();
    let workspace = place.dir.join("workspace");
    fs::create_dir_all(workspace.join("notes/deep")).unwrap();
    for name in ["MEMORY.md", "notes/deep/plan.md", "notes/stays.md", "zebra"] {
        fs::write(workspace.join(name), name).unwrap();
    }
    fs::write(workspace.join("empty"), "").unwrap();
    settle(&workspace);
    fs::write(workspace.join("scratch"), "written just now").unwrap();
    place.roots.push(root("workspace", &workspace, Class::Workspace));
    let first = place.take_good();
    let classes = [Class::Workspace];
    let gone = |a: &str, b: &str| place.store.gone(a, b, &classes, WEEK, soon()).unwrap();
    assert!(gone(&first.id, &place.take().id).is_empty(), "nothing went");

    fs::remove_dir_all(workspace.join("notes/deep")).unwrap();
    fs::write(workspace.join("aardvark"), "new").unwrap();
    for name in ["zebra", "empty", "scratch"] {
        fs::remove_file(workspace.join(name)).unwrap();
    }
    fs::write(workspace.join("MEMORY.md"), "rewritten").unwrap();
    fs::remove_file(place.live.join("dist/3.js")).unwrap();
    let second = place.take();
    let mut told = gone(&first.id, &second.id);
    told.sort();
    assert_eq!(told, [workspace.join("notes/deep/plan.md"), workspace.join("zebra")]);
    let all = place.store.gone(&first.id, &second.id, &classes, Duration::ZERO, soon()).unwrap();
    assert!(all.contains(&workspace.join("scratch")) && all.len() == 3, "{all:?}");
    // A tree that is missing as a whole is a finding of its own, and is carried over.
    fs::rename(&workspace, place.dir.join("elsewhere")).unwrap();
    assert_eq!(gone(&second.id, &place.take().id), [] as [std::path::PathBuf; 0]);
}
