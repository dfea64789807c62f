use super::*;
use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, symlink};

/// What a tree is, to compare: kind, mode and content by path.
type Picture = BTreeMap<PathBuf, (char, u32, Vec<u8>)>;

pub(super) fn picture(top: &Path) -> Picture {
    let mut all = Picture::new();
    let mut open = vec![top.to_path_buf()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).unwrap().map(std::result::Result::unwrap) {
            let (path, meta) = (entry.path(), entry.path().symlink_metadata().unwrap());
            let seen = if meta.is_dir() {
                open.push(path.clone());
                ('d', meta.mode() & 0o7777, Vec::new())
            } else if meta.is_symlink() {
                ('l', 0, std::fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec())
            } else {
                ('f', meta.mode() & 0o7777, std::fs::read(&path).unwrap())
            };
            all.insert(path.strip_prefix(top).unwrap().to_path_buf(), seen);
        }
    }
    all
}

struct Trees {
    _dir: tempfile::TempDir,
    stage: PathBuf,
    live: PathBuf,
}

fn put(path: PathBuf, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// A live tree and a staged one with every kind of difference between them.
fn trees() -> Trees {
    // In memory where there is such a place: many runs with many syncs.
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let (live, stage) = (dir.path().join("live"), dir.path().join("stage"));
    for top in [&live, &stage] {
        put(top.join("same"), "same");
        put(top.join("lib/deep/er/same"), "same");
    }
    put(live.join("changed"), "old content");
    put(stage.join("changed"), "new content");
    put(live.join("lib/deep/changed"), "old");
    put(stage.join("lib/deep/changed"), "new");
    put(live.join("mode"), "x");
    put(stage.join("mode"), "x");
    std::fs::set_permissions(stage.join("mode"), std::fs::Permissions::from_mode(0o755)).unwrap();
    put(live.join("old/only/here"), "1");
    put(live.join("old/also"), "2");
    put(live.join("lib/gone"), "3");
    put(stage.join("new/only/here"), "4");
    put(stage.join("lib/fresh"), "5");
    put(live.join("was-dir/a"), "6");
    put(live.join("was-dir/b/c"), "7");
    put(stage.join("was-dir"), "now a file");
    put(live.join("was-file"), "8");
    put(stage.join("was-file/d/e"), "9");
    symlink("old-target", live.join("link")).unwrap();
    symlink("new-target", stage.join("link")).unwrap();
    symlink("same", live.join("to-file")).unwrap();
    put(stage.join("to-file"), "no link any more");
    put(live.join("file-to-link"), "10");
    symlink("/nowhere", stage.join("file-to-link")).unwrap();
    std::fs::create_dir(live.join("empty")).unwrap();
    std::fs::set_permissions(stage.join("lib"), std::fs::Permissions::from_mode(0o750)).unwrap();
    Trees { _dir: dir, stage, live }
}

/// The slow way on a file system that could do better.
fn slow_swap(t: &Trees, may: May<'_>) -> Result<Swapped> {
    let (mut notes, _, _) = Journal::open(&notes_path(&t.stage))?;
    let staged = id(&t.stage).unwrap();
    note(&mut notes, &Note::Begin { live: t.live.clone(), staged, was_there: true })?;
    note(&mut notes, &Note::FileByFile { why: "test".into() })?;
    slowly(&t.stage, &t.live, true, "test".into(), &mut notes, may)
}

fn stop_after(mut changes: usize) -> impl FnMut() -> io::Result<()> {
    move || {
        changes = changes.checked_sub(1).ok_or_else(|| io::Error::other("stopped by the test"))?;
        Ok(())
    }
}

fn changes_in_all() -> usize {
    let t = trees();
    let mut n = 0;
    slow_swap(&t, &mut || {
        n += 1;
        Ok(())
    })
    .unwrap();
    n
}

#[test]
fn an_exchange_goes_there_and_back() {
    let t = trees();
    let (old, new) = (picture(&t.live), picture(&t.stage));
    assert_eq!(probe(&t.live).unwrap(), Method::Exchange);
    assert_eq!(picture(&t.live), old, "probing disturbs nothing");
    let done = swap(&t.stage, &t.live).unwrap();
    assert_eq!((done.method.clone(), done.previous.clone()), (Method::Exchange, Some(t.stage.clone())));
    assert_eq!((picture(&t.live), picture(&t.stage)), (new.clone(), old.clone()));
    assert!(swap(&t.stage, &t.live).is_err(), "not settled");
    assert_eq!(resume(&t.stage).unwrap(), Some(done.clone()), "a later agent learns of it");
    done.back().unwrap();
    assert_eq!((picture(&t.live), picture(&t.stage)), (old.clone(), new));
    assert_eq!(resume(&t.stage).unwrap(), None);
    let done = swap(&t.stage, &t.live).unwrap();
    done.settle().unwrap();
    done.back().unwrap();
    assert_eq!(picture(&t.stage), old, "settled: stays, and the previous tree is kept");
    assert!(!notes_path(&t.stage).exists());
}

#[test]
fn probing_leaves_nothing_behind() {
    let t = trees();
    let beside = picture(t.live.parent().unwrap());
    probe(&t.live).unwrap();
    probe(&t.live.with_file_name("missing")).unwrap();
    assert_eq!(picture(t.live.parent().unwrap()), beside);
}

#[test]
fn a_missing_live_tree_is_put_there_and_taken_away() {
    let t = trees();
    std::fs::remove_dir_all(&t.live).unwrap();
    let new = picture(&t.stage);
    let done = swap(&t.stage, &t.live).unwrap();
    assert_eq!(done.previous, None);
    assert_eq!(picture(&t.live), new);
    done.back().unwrap();
    assert!(!t.live.exists());
    assert_eq!(picture(&t.stage), new);
}

#[test]
fn an_exchange_killed_before_its_last_note_is_known_for_what_it_is() {
    let t = trees();
    let (old, new) = (picture(&t.live), picture(&t.stage));
    let begin = |notes: &mut Journal| {
        note(notes, &Note::Begin { live: t.live.clone(), staged: id(&t.stage).unwrap(), was_there: true })
            .unwrap();
    };
    // Killed after the note, before the call: resuming does it.
    let (mut notes, _, _) = Journal::open(&notes_path(&t.stage)).unwrap();
    begin(&mut notes);
    drop(notes);
    let done = resume(&t.stage).unwrap().unwrap();
    assert_eq!(picture(&t.live), new);
    done.back().unwrap();
    // The same, taken back instead: nothing to do.
    let (mut notes, _, _) = Journal::open(&notes_path(&t.stage)).unwrap();
    begin(&mut notes);
    drop(notes);
    undo(&t.stage).unwrap();
    assert_eq!(picture(&t.live), old);
    // Killed after the call: resuming must not exchange again.
    let (mut notes, _, _) = Journal::open(&notes_path(&t.stage)).unwrap();
    begin(&mut notes);
    drop(notes);
    rustix::fs::renameat_with(CWD, &t.stage, CWD, &t.live, RenameFlags::EXCHANGE).unwrap();
    assert_eq!(resume(&t.stage).unwrap().unwrap().method, Method::Exchange);
    assert_eq!(picture(&t.live), new);
    undo(&t.stage).unwrap();
    assert_eq!(picture(&t.live), old);
}

#[test]
fn the_slow_way_arrives_keeps_what_was_and_goes_back() {
    let t = trees();
    let (old, new) = (picture(&t.live), picture(&t.stage));
    let done = slow_swap(&t, &mut || Ok(())).unwrap();
    assert_eq!(picture(&t.live), new);
    assert_eq!(picture(&t.stage), new, "the stage is only read");
    let kept = picture(done.previous.as_ref().unwrap());
    for (path, seen) in &old {
        if new.get(path) != Some(seen) && seen.0 != 'd' {
            assert_eq!(kept.get(path), Some(seen), "{} is kept", path.display());
        }
    }
    assert!(!kept.contains_key(Path::new("same")), "what does not differ is left alone");
    done.back().unwrap();
    assert_eq!(picture(&t.live), old);
    assert_eq!(picture(&t.stage), new);
    assert!(!previous_path(&t.stage).exists() && !notes_path(&t.stage).exists());
}

#[test]
fn the_slow_way_settled_leaves_only_what_was() {
    let t = trees();
    let new = picture(&t.stage);
    let done = slow_swap(&t, &mut || Ok(())).unwrap();
    done.settle().unwrap();
    assert!(!t.stage.exists() && !notes_path(&t.stage).exists());
    assert!(previous_path(&t.stage).exists());
    assert_eq!(picture(&t.live), new);
}

#[test]
fn stopped_at_any_change_it_can_be_finished() {
    for n in 0..changes_in_all() {
        let t = trees();
        let (old, new) = (picture(&t.live), picture(&t.stage));
        slow_swap(&t, &mut stop_after(n)).unwrap_err();
        let done = resume(&t.stage).unwrap().unwrap();
        assert_eq!(picture(&t.live), new, "stopped after {n}");
        // And what it kept on both walks together is enough to go back.
        done.back().unwrap();
        assert_eq!(picture(&t.live), old, "stopped after {n}, finished, taken back");
    }
}

#[test]
fn stopped_at_any_change_it_can_be_taken_back_and_that_can_be_stopped_too() {
    let all = changes_in_all();
    for n in 0..all {
        for m in [0, 1, 3, 7, 12, all] {
            let t = trees();
            let old = picture(&t.live);
            slow_swap(&t, &mut stop_after(n)).unwrap_err();
            if undo_while(&t.stage, &mut stop_after(m)).is_err() {
                assert_eq!(resume(&t.stage).unwrap(), None, "whoever comes next goes on going back");
            }
            assert_eq!(picture(&t.live), old, "stopped after {n}, then after {m}");
            assert!(!previous_path(&t.stage).exists() && !notes_path(&t.stage).exists());
        }
    }
}

#[test]
fn every_file_is_whole_and_old_or_new_at_every_moment() {
    let t = trees();
    let (old, new) = (picture(&t.live), picture(&t.stage));
    slow_swap(&t, &mut || {
        for (path, seen) in picture(&t.live) {
            let ours = path.file_name().unwrap().as_bytes().starts_with(b".koboshi-swap-");
            let whole = |p: &Picture| p.get(&path).is_some_and(|s| s.2 == seen.2);
            assert!(seen.0 != 'f' || ours || whole(&old) || whole(&new), "{} is torn", path.display());
        }
        for name in ["changed", "lib/deep/changed", "mode", "link"] {
            assert!(t.live.join(name).symlink_metadata().is_ok(), "{name} is never missing");
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn what_somebody_else_wrote_since_a_kill_is_not_lost() {
    let mut kept_before = 0;
    for n in 0..changes_in_all() {
        let t = trees();
        slow_swap(&t, &mut stop_after(n)).unwrap_err();
        let true_old = std::fs::read(previous_path(&t.stage).join("changed")).ok();
        // A new file with that name, as an editor writes it: the old one may have other names.
        std::fs::remove_file(t.live.join("changed")).unwrap();
        put(t.live.join("changed"), "edited by hand");
        put(t.live.join("lib/theirs"), "theirs");
        let done = resume(&t.stage).unwrap().unwrap();
        assert_eq!(std::fs::read(t.live.join("changed")).unwrap(), b"new content");
        if true_old.is_some() {
            kept_before += 1;
            assert_eq!(
                std::fs::read(previous_path(&t.stage).join("changed")).ok(),
                true_old,
                "stopped after {n}"
            );
        }
        let kept = picture(done.previous.as_ref().unwrap());
        for text in [b"edited by hand".as_slice(), b"theirs", b"3"] {
            assert!(kept.values().any(|(_, _, bytes)| bytes == text), "stopped after {n}: {text:?}");
        }
    }
    assert!(kept_before > 3, "the case is among them: {kept_before}");
}

#[test]
fn a_deadline_stops_the_slow_way_only() {
    let t = trees();
    let new = picture(&t.stage);
    let past = Deadline::after(std::time::Duration::ZERO);
    swap_by(&t.stage, &t.live, past).unwrap();
    assert_eq!(picture(&t.live), new, "one call needs no time");
}

#[test]
fn planted_links_lead_nowhere() {
    let t = trees();
    let outside = t.live.with_file_name("outside");
    put(outside.join("victim"), "untouched");
    std::fs::remove_dir_all(t.live.join("lib")).unwrap();
    symlink(&outside, t.live.join("lib")).unwrap();
    symlink(outside.join("victim"), t.live.join("new")).unwrap();
    let (before, new) = (picture(&outside), picture(&t.stage));
    let old = picture(&t.live);
    let done = slow_swap(&t, &mut || Ok(())).unwrap();
    assert_eq!(picture(&t.live), new);
    assert_eq!(picture(&outside), before);
    done.back().unwrap();
    assert_eq!(picture(&t.live), old);
    assert_eq!(picture(&outside), before);
}

#[test]
fn nested_or_missing_stages_are_refused_and_nothing_is_touched() {
    let t = trees();
    let old = picture(&t.live);
    assert_eq!(swap(&t.live.join("lib"), &t.live).unwrap_err().kind, Kind::Usage);
    assert_eq!(swap(&t.live, &t.live.join("lib")).unwrap_err().kind, Kind::Usage);
    assert_eq!(swap(&t.live, &t.live).unwrap_err().kind, Kind::Usage);
    assert_eq!(swap(&t.live.with_file_name("none"), &t.live).unwrap_err().kind, Kind::NotFound);
    assert_eq!(picture(&t.live), old);
    assert!(!t.live.with_file_name("live.switch").exists());
}

#[test]
fn moving_aside_keeps_everything_under_free_names() {
    let t = trees();
    let quarantine = t.live.with_file_name("quarantine");
    let old = picture(&t.live);
    let first = move_aside(&t.live, &quarantine).unwrap();
    assert_eq!((first.as_path(), picture(&first)), (quarantine.join("live").as_path(), old));
    std::fs::create_dir(&t.live).unwrap();
    assert_eq!(move_aside(&t.live, &quarantine).unwrap(), quarantine.join("live.2"));
    assert_eq!(move_aside(&t.live, &quarantine).unwrap_err().kind, Kind::NotFound);
}
