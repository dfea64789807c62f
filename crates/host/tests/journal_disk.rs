//! The journal on a disk that is really full. Root only: it mounts one.

#![allow(clippy::unwrap_used, clippy::print_stdout)] // Helpers of tests, outside any one test.

use host::Kind;
use host::journal::{Journal, PREALLOCATED_BYTES, RECORD_LIMIT_BYTES};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::CString;
use std::io::Write;
use std::path::{Path, PathBuf};

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn small_disk(at: &Path, size_kib: u32) -> Option<Mounted> {
    if !rustix::process::geteuid().is_root() {
        println!("left out, not root: a full disk");
        return None;
    }
    std::fs::create_dir(at).unwrap();
    let options = CString::new(format!("size={size_kib}k")).unwrap();
    match mount("tmpfs", at, "tmpfs", MountFlags::empty(), options.as_c_str()) {
        Ok(()) => Some(Mounted(at.to_path_buf())),
        Err(e) => {
            println!("left out, tmpfs cannot be mounted here: {e}");
            None
        }
    }
}

fn fill(path: &Path) {
    let mut file = std::fs::File::create(path).unwrap();
    while file.write(&[1; 4096]).is_ok() {}
}

#[test]
fn a_full_disk_does_not_silence_it_before_its_space_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("disk");
    let Some(_mounted) = small_disk(&at, 3_200) else { return };
    let path = at.join("journal");
    let (mut journal, _, _) = Journal::open(&path).unwrap();
    fill(&at.join("ballast"));
    let record = vec![3; RECORD_LIMIT_BYTES / 2];
    let mut held = 0;
    let error = loop {
        match journal.append(&record) {
            Ok(()) => held += 1,
            Err(e) => break e,
        }
    };
    assert_eq!(error.kind, Kind::NoSpace);
    assert_eq!(held, PREALLOCATED_BYTES as usize / record.len() - 1, "all of the space written in advance");
    journal.append(b"small").unwrap();
    // Too much to keep: refused, and the old one is as it was.
    let keep: Vec<_> = (0..held).map(|_| record.clone()).collect();
    assert_eq!(journal.rewrite(&keep).unwrap_err().kind, Kind::NoSpace);
    assert!(
        !journal.is_broken() && !at.join("journal.next").exists(),
        "what was not finished takes no space"
    );
    journal.append(b"small too").unwrap();
    // What little fits beside it is enough to free the old one's space.
    std::fs::File::options().write(true).open(at.join("ballast")).unwrap().set_len(1_000_000).unwrap();
    std::fs::copy(at.join("ballast"), at.join("more")).unwrap();
    let keep = vec![b"kept".to_vec()];
    journal.rewrite(&keep).unwrap();
    journal.append(b"on").unwrap();
    drop(journal);
    let (_, found, _) = Journal::open(&path).unwrap();
    assert_eq!(found, [b"kept".to_vec(), b"on".to_vec()]);
}

#[test]
fn without_room_for_it_opening_says_so_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("disk");
    let Some(_mounted) = small_disk(&at, 256) else { return };
    let path = at.join("journal");
    assert_eq!(Journal::open(&path).unwrap_err().kind, Kind::NoSpace);
    assert_eq!(std::fs::read_dir(&at).unwrap().count(), 0);
}
