//! A node on a disk of its own that somebody fills to the last byte.

use crate::agent::until;
use crate::fake::Fake;
use crate::gateway::{Agent, PATIENCE};
use host::clock::Deadline;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Set where mounts are nobody else's.
const OWN_MOUNTS: &str = "KOBOSHI_TEST_OWN_MOUNTS";

/// An ext4 in a file.
struct Disk {
    _dir: tempfile::TempDir,
    at: PathBuf,
}

impl Disk {
    fn new(bytes: u64) -> Option<Disk> {
        let dir = tempfile::tempdir().unwrap();
        let (image, at) = (dir.path().join("image"), dir.path().canonicalize().unwrap().join("disk"));
        std::fs::File::create(&image).unwrap().set_len(bytes).unwrap();
        std::fs::create_dir(&at).unwrap();
        let made = tool(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&image))
            && tool(Command::new("mount").args(["-t", "ext4", "-o", "loop"]).args([&image, &at]));
        made.then_some(Disk { _dir: dir, at })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        tool(Command::new("umount").arg("-l").arg(&self.at));
    }
}

#[allow(clippy::disallowed_methods, reason = "a tool that ends by itself")]
fn tool(command: &mut Command) -> bool {
    command.output().is_ok_and(|o| o.status.success())
}

/// Runs the test once more in mounts of its own: a namespace that another test makes meanwhile would keep the disk.
#[allow(clippy::disallowed_methods, reason = "it ends by itself")]
fn in_own_mounts(name: &str) -> bool {
    if std::env::var_os(OWN_MOUNTS).is_some() {
        return true;
    }
    let there = Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(OWN_MOUNTS, "1")
        .output()
        .unwrap();
    let words = [there.stdout, there.stderr].map(|w| String::from_utf8_lossy(&w).into_owned());
    assert!(there.status.success(), "{}", words.join("\n"));
    assert!(words[0].contains("1 passed"), "no test of this name was run");
    false
}

/// Fills the disk until not one byte more can be written.
fn fill(at: &Path) {
    let mut file = std::fs::File::create(at.join("filler")).unwrap();
    for chunk in [1 << 20, 4096, 1] {
        while file.write_all(&vec![7; chunk]).is_ok() {}
    }
    let _ = file.sync_all();
    let mut last = std::fs::File::create(at.join("last"));
    while last.as_mut().is_ok_and(|f| f.write_all(b"x").is_ok()) {}
}

#[test]
fn a_node_on_a_full_disk_is_given_room_and_stands_up_as_root() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    if !in_own_mounts("disk::a_node_on_a_full_disk_is_given_room_and_stands_up_as_root") {
        return;
    }
    let disk = Disk::new(800 << 20).expect("mkfs.ext4 and a loop device");
    let fake = Fake::within(tempfile::tempdir_in(&disk.at).unwrap());
    fake.configure("[backup]\nsettle_s = 1\n");
    let theirs = fake.state().join("agents/main/sessions/kept.jsonl.deleted.1");
    std::fs::create_dir_all(theirs.parent().unwrap()).unwrap();
    std::fs::write(&theirs, "a session").unwrap();
    fake.start_gateway();
    fake.koboshi(&["accept"]).code(0);
    let _agent = Agent::start(&fake);
    let reserve = fake.koboshi_state().join("reserve");
    until(&fake, "a reserve", |_| reserve.exists());
    until(&fake, "settled", |s| s["agent"]["settled"] == true);
    fill(&disk.at);
    fake.kill_gateway();
    let status = until(&fake, "recovered", |s| {
        s["incidents"][0]["outcome"] == "recovered" && s["verdict"] == "serving"
    });
    assert!(!reserve.exists(), "it was given");
    let id = status["incidents"][0]["id"].to_string();
    fake.koboshi(&["incidents", "show", &id]).code(0).says("room");
    assert_eq!(std::fs::read_to_string(&theirs).unwrap(), "a session");
    assert_eq!(std::fs::read_to_string(fake.state().join("workspace/MEMORY.md")).unwrap(), "remember\n");
    // With room again it is laid by again, beside the next good copy.
    until(&fake, "settled again", |s| s["agent"]["settled"] == true);
    std::fs::remove_file(disk.at.join("filler")).unwrap();
    fake.koboshi(&["snapshot", "create"]).code(0);
    until(&fake, "a new reserve", |_| reserve.exists());
}

/// A file system that nobody answers for: whoever looks into it waits for ever.
struct Mute {
    holder: std::process::Child,
    at: PathBuf,
}

impl Mute {
    fn over(at: &Path) -> Mute {
        let script = "exec 3<>/dev/fuse; \
            mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 mute \"$0\" && exec sleep 600";
        let holder = Command::new("sh").args(["-c", script]).arg(at).spawn().unwrap();
        let mute = Mute { holder, at: at.to_owned() };
        let deadline = Deadline::after(PATIENCE);
        while !std::fs::read_to_string("/proc/self/mounts")
            .unwrap()
            .contains(&format!("mute {}", at.display()))
        {
            assert!(!deadline.passed(), "no /dev/fuse, or no right to mount");
            std::thread::sleep(Duration::from_millis(20));
        }
        mute
    }
}

impl Drop for Mute {
    #[allow(clippy::disallowed_methods, reason = "it was killed")]
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        tool(Command::new("umount").arg("-l").arg(&self.at));
    }
}

#[test]
fn a_store_that_never_answers_holds_no_command_up_as_root() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    if !in_own_mounts("disk::a_store_that_never_answers_holds_no_command_up_as_root") {
        return;
    }
    let fake = Fake::new();
    fake.start_gateway();
    fake.koboshi(&["accept"]).code(0);
    let mute = Mute::over(&fake.koboshi_state().join("store"));
    let silent = "did not answer within";
    fake.koboshi(&["status"]).code(0).says(silent).says("serving");
    fake.koboshi(&["doctor"]).code(1).says(silent).says("dmesg");
    fake.koboshi(&["recover", "--dry-run"]).code(0).says(silent);
    for asks in [&["snapshot", "list"][..], &["snapshot", "verify"], &["snapshot", "create"], &["accept"]] {
        fake.koboshi(asks).code(1).says(silent);
    }
    drop(mute);
    fake.koboshi(&["snapshot", "list"]).code(0).says("good");
}
