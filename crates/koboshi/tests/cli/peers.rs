//! Peers: two nodes, two koboshis, and a real SSH server between them, on loopback.
//!
//! A donor that misbehaves is the real one with a filter behind its forced command.

use crate::fake::{Fake, Said};
use host::clock::Deadline;
use host::process::ProcessId;
use serde_json::json;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

fn root() -> bool {
    rustix::process::geteuid().is_root()
}

/// An SSH server of the test's own.
struct Sshd {
    dir: tempfile::TempDir,
    port: u16,
    host_key: String,
    process: ProcessId,
}

impl Sshd {
    #[allow(clippy::zombie_processes, reason = "it is ended by its identity; a zombie counts as gone")]
    fn start() -> Sshd {
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let key = dir.path().join("host/key");
        let host_key = reach::keys::ensure(&key, "").unwrap();
        // What the server drops its privileges into; Debian makes it when the service starts.
        std::fs::create_dir_all("/run/sshd").unwrap();
        std::fs::create_dir_all(dir.path().join(".ssh")).unwrap();
        let config = dir.path().join("sshd_config");
        let text = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\n\
             PidFile none\nPermitRootLogin yes\nPasswordAuthentication no\nMaxStartups 100\n",
            key.display(),
            dir.path().join(".ssh/authorized_keys").display()
        );
        std::fs::write(&config, text).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = std::process::Command::new("/usr/sbin/sshd")
            .args(["-D", "-e", "-f"])
            .arg(&config)
            .stdin(std::process::Stdio::null())
            .stderr(log)
            .spawn()
            .expect("openssh-server is installed");
        let process = ProcessId::of(child.id()).unwrap();
        let deadline = Deadline::after(Duration::from_secs(20));
        let address = ("127.0.0.1".parse::<std::net::IpAddr>().unwrap(), port).into();
        while TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_err() {
            let log = std::fs::read_to_string(dir.path().join("log")).unwrap_or_default();
            assert!(!deadline.passed() && process.alive(), "the SSH server does not come up: {log}");
            std::thread::sleep(Duration::from_millis(10));
        }
        Sshd { dir, port, host_key, process }
    }

    fn keys(&self) -> PathBuf {
        self.dir.path().join(".ssh/authorized_keys")
    }

    /// Lets a new key run this one command, and returns the key's path.
    fn allow(&self, name: &str, command: &str) -> PathBuf {
        let path = self.dir.path().join("clients").join(name);
        let public = reach::keys::ensure(&path, name).unwrap();
        let mut all = std::fs::read_to_string(self.keys()).unwrap_or_default();
        all.push_str(&format!("command=\"{}\",restrict {public}\n", command.replace('"', "\\\"")));
        std::fs::write(self.keys(), all).unwrap();
        path
    }

    /// The `[[peer]]` of a donor that runs this command.
    fn peer(&self, name: &str, command: &str, more: &str) -> String {
        let identity = self.allow(name, command);
        format!(
            "[[peer]]\nhost = \"127.0.0.1\"\nport = {}\nuser = \"{}\"\nhost_key = \"{}\"\nidentity = {identity:?}\n{more}\n",
            self.port,
            user(),
            self.host_key
        )
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        if let Ok(fd) = self.process.open() {
            let _ = fd.signal(rustix::process::Signal::KILL);
        }
    }
}

fn user() -> String {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd.lines().find(|l| l.split(':').nth(2) == Some(&uid)).unwrap();
    line.split(':').next().unwrap().to_owned()
}

/// The forced command of a node's donor.
fn donate(fake: &Fake) -> String {
    format!(
        "env KOBOSHI_CONFIG={} HOME={} XDG_RUNTIME_DIR={} {} donate {}",
        fake.config().display(),
        fake.home().display(),
        fake.path("xdg").display(),
        env!("CARGO_BIN_EXE_koboshi"),
        fake.name
    )
}

/// The same behind a filter that sees every byte on its way out.
fn filtered(fake: &Fake, sshd: &Sshd, name: &str, perl: &str) -> String {
    let script = sshd.dir.path().join(format!("{name}.sh"));
    let text =
        format!("#!/bin/sh\n{} | perl -e '$|=1; binmode STDIN; binmode STDOUT; {perl}'\n", donate(fake));
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    script.display().to_string()
}

/// A node with a good snapshot.
fn accepted() -> Fake {
    let fake = Fake::new();
    fake.start_gateway();
    fake.koboshi(&["accept"]).code(0);
    fake
}

/// The gateway dead, the program gone, and no object of it left in the store.
fn fell(fake: &Fake) {
    fake.kill_gateway();
    std::fs::remove_dir_all(fake.package()).unwrap();
    std::fs::remove_dir_all(fake.path("prefix/lib/.koboshi-spare")).ok();
    empty_packs(fake);
}

fn empty_packs(fake: &Fake) {
    for pack in std::fs::read_dir(fake.koboshi_state().join("store/packs")).unwrap() {
        std::fs::write(pack.unwrap().path(), b"broken").unwrap();
    }
}

/// A climb of this layer alone; what its step said stands in the log of the agent that is started for it.
fn copy(fake: &Fake) -> Said {
    let mut said = fake.koboshi(&["recover", "--only", "peer-copy"]);
    // Each recovery's agent begins its log anew.
    let log = std::fs::read(fake.path("k/run/recover.log")).unwrap();
    said.err.push_str(&String::from_utf8_lossy(&log));
    said
}

fn index(fake: &Fake) -> String {
    std::fs::read_to_string(fake.package().join("dist/index.js")).unwrap_or_default()
}

/// What must never change by a copy: everything of the user's.
fn users(fake: &Fake) -> Vec<(PathBuf, Vec<u8>)> {
    let keep = |p: &Path| p.ends_with("openclaw.json") || p.ends_with("MEMORY.md") || p.ends_with("x.json");
    let state = fake.state();
    fake.picture(&["k", "node", "prefix"])
        .into_iter()
        .filter(|(p, _)| p.starts_with(&state) && keep(p))
        .map(|(p, (_, bytes))| (p, bytes))
        .collect()
}

#[test]
fn a_program_comes_back_from_a_peer_as_root() {
    if !root() {
        return;
    }
    let (sshd, donor, fake) = (Sshd::start(), accepted(), accepted());
    fake.configure(&sshd.peer("good", &donate(&donor), ""));
    let before = users(&fake);
    fell(&fake);
    let said = copy(&fake);
    said.code(0).says("gave").says("the program was exchanged");
    assert!(fake.gateway().is_some(), "it serves");
    assert!(index(&fake).starts_with("// dist/index.js"));
    assert_eq!(users(&fake), before, "nothing of the user's was touched");
    // Nothing of ours is left beside npm's tree.
    assert!(!fake.path("prefix/lib/.koboshi-peer").exists());
    let link = std::fs::read_link(fake.path("prefix/bin/openclaw")).unwrap();
    assert_eq!(link, Path::new("../lib/node_modules/openclaw/openclaw.mjs"));

    // One file is damaged: one piece is asked for, and the old tree goes to quarantine.
    fake.kill_gateway();
    empty_packs(&fake);
    std::fs::write(fake.package().join("dist/index.js"), "half").unwrap();
    copy(&fake).code(0).says("1 are missing here").says("gave 1 pieces");
    let kept = fake.picture(&[]).into_iter().any(|(path, (_, bytes))| {
        path.starts_with(fake.koboshi_state().join("quarantine"))
            && path.ends_with("dist/index.js")
            && bytes == b"half"
    });
    assert!(kept, "what was replaced lies in the quarantine");
}

#[test]
fn donors_that_lie_stall_lack_or_vanish_are_left_for_the_next_as_root() {
    if !root() {
        return;
    }
    let (sshd, donor, lacking, fake) = (Sshd::start(), accepted(), accepted(), accepted());
    // Other bytes of the same length, in the objects.
    let liar = "while(sysread(STDIN,$b,65536)){$b=~s/xxxxxxxx/xxxxxxxy/g if $n; $n+=length $b if $b=~/dist/; syswrite(STDOUT,$b)}";
    // The greeting, and then silence.
    let staller = "sysread(STDIN,$b,65536); syswrite(STDOUT,$b); sleep 60;";
    // Some of it, and then nobody.
    let vanisher = "while(sysread(STDIN,$b,64)){syswrite(STDOUT,$b); $n+=length $b; exit if $n>1500}";
    // Half upgraded: what its list names no longer lies there.
    lacking.kill_gateway();
    empty_packs(&lacking);
    std::fs::write(lacking.package().join("dist/index.js"), "newer").unwrap();
    let peers = [
        sshd.peer("liar", &filtered(&donor, &sshd, "liar", liar), ""),
        sshd.peer("staller", &filtered(&donor, &sshd, "staller", staller), ""),
        sshd.peer("vanisher", &filtered(&donor, &sshd, "vanisher", vanisher), ""),
        sshd.peer("lacking", &donate(&lacking), ""),
        sshd.peer("good", &donate(&donor), ""),
    ];
    fake.configure(&peers.concat());
    fell(&fake);
    let said = copy(&fake);
    said.code(0)
        .says("other bytes than it was asked for")
        .says("it has said nothing for 10 s")
        .says("does not have 1 of the pieces")
        .says("gave 1 pieces");
    assert!(fake.gateway().is_some());
    assert!(index(&fake).starts_with("// dist/index.js"));
}

#[test]
fn only_the_pinned_host_and_our_own_key_are_spoken_with_as_root() {
    if !root() {
        return;
    }
    let (sshd, other, donor, fake) = (Sshd::start(), Sshd::start(), accepted(), accepted());
    let stranger = sshd.peer("a", &donate(&donor), "").replace(&sshd.host_key, &other.host_key);
    let unknown = other.peer("b", &donate(&donor), "");
    std::fs::write(other.keys(), "").unwrap();
    // Not a donor at all.
    let shell = sshd.peer("c", "echo Welcome to this machine, it has a message of the day", "");
    fake.configure(&[stranger, unknown, shell].concat());
    fell(&fake);
    let said = copy(&fake);
    said.code(1).says("host key").says("does not take our key").says("no koboshi speaks there");
    assert!(!fake.package().exists(), "nothing was put there");
}

#[test]
fn a_version_never_proven_here_needs_two_that_agree_or_one_that_is_trusted_as_root() {
    if !root() {
        return;
    }
    let (sshd, another, one, two) = (Sshd::start(), Sshd::start(), accepted(), accepted());
    let (a, b) = (donate(&one), donate(&two));
    // A node each, of which nothing is remembered: a failed climb stays open.
    let forgotten = |peers: &[String]| {
        let fake = accepted();
        fake.kill_gateway();
        std::fs::remove_dir_all(fake.package()).unwrap();
        std::fs::remove_dir_all(fake.koboshi_state().join("store")).unwrap();
        std::fs::remove_file(fake.koboshi_state().join("programs.json")).unwrap();
        fake.configure(&peers.concat());
        fake
    };
    let fake = forgotten(&[sshd.peer("a1", &a, "")]);
    copy(&fake).code(1).says("a second donor must agree");
    assert!(!fake.package().exists());

    // Two nodes behind one host key are one witness.
    let fake = forgotten(&[sshd.peer("a2", &a, ""), sshd.peer("b2", &b, "")]);
    copy(&fake).code(1).says("a second donor must agree");

    let fake = forgotten(&[sshd.peer("a5", &a, ""), another.peer("b5", &b, "")]);
    copy(&fake).code(0).says("agree on every byte");
    assert!(index(&fake).starts_with("// dist/index.js"));

    // Two that do not agree.
    std::fs::write(two.package().join("dist/index.js"), "// other\n").unwrap();
    two.koboshi(&["accept"]).code(0);
    let fake = forgotten(&[sshd.peer("a3", &a, ""), another.peer("b3", &b, "")]);
    copy(&fake).code(1).says("no donor's program may be used here");

    let fake = forgotten(&[sshd.peer("a4", &a, ""), another.peer("b4", &b, "trusted = true")]);
    copy(&fake).code(0).says("is trusted for a version that was never proven here");
    assert_eq!(index(&fake), "// other\n");
}

#[test]
fn the_digest_outlives_the_store_as_root() {
    if !root() {
        return;
    }
    let (sshd, donor, fake) = (Sshd::start(), accepted(), accepted());
    fake.configure(&sshd.peer("good", &donate(&donor), ""));
    fake.kill_gateway();
    std::fs::remove_dir_all(fake.package()).unwrap();
    std::fs::remove_dir_all(fake.koboshi_state().join("store")).unwrap();
    copy(&fake).code(0).says("has the program that was proven good here");
    assert!(fake.gateway().is_some());
}

#[test]
fn enrolling_pins_installs_checks_and_writes_down_as_root() {
    if !root() {
        return;
    }
    let (sshd, donor, fake) = (Sshd::start(), accepted(), accepted());
    fake.koboshi(&["fleet", "status"]).code(0).says("No peer is configured");
    let port = sshd.port.to_string();
    let command = donate(&donor);
    let who = user();
    let mut args =
        vec!["fleet", "enroll", "127.0.0.1", "--port", &port, "--user", &who, "--command", &command];
    fake.koboshi(&args).code(2).says("nobody is there to compare it");
    fake.koboshi(&[args.as_slice(), &["--yes"]].concat()).code(2).says("--host-key");
    let strange = reach::keys::ensure(&sshd.dir.path().join("strange"), "").unwrap();
    fake.koboshi(&[args.as_slice(), &["--yes", "--host-key", &strange]].concat())
        .code(1)
        .says("expected is SHA256:");
    args.extend(["--yes", "--host-key", &sshd.host_key]);
    // Without access of one's own the line is shown, to be added by hand.
    fake.koboshi(&args).code(1).says("authorized_keys").says("restrict ssh-ed25519");
    assert!(!fake.path("k/koboshi.d").exists());

    // With access: the ssh client's part is played by a shell, so that what runs on the peer really runs.
    let bin = fake.path("bin");
    std::fs::create_dir_all(&bin).unwrap();
    let ssh =
        format!("#!/bin/sh\nfor last; do :; done\nHOME={} exec sh -c \"$last\"\n", sshd.dir.path().display());
    std::fs::write(bin.join("ssh"), ssh).unwrap();
    std::fs::set_permissions(bin.join("ssh"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let said = fake.koboshi_with_path(&bin, &[&["--json"], args.as_slice()].concat());
    said.code(0);
    let object = said.object();
    assert_eq!((&object["installed"], &object["version"]), (&json!(true), &json!("2026.9.6")), "{object}");
    let line = std::fs::read_to_string(sshd.keys()).unwrap();
    assert!(line.starts_with(&format!("command=\"{command}\",restrict ssh-ed25519 ")), "{line}");

    // Enrolled again: nothing is added twice.
    fake.koboshi(&args).code(0);
    assert_eq!(std::fs::read_to_string(sshd.keys()).unwrap(), line);
    let (object, code) = fake.json(&["fleet", "status"]);
    assert_eq!((code, &object["peers"][0]["reachable"]), (1, &json!(true)), "no agent runs there: {object}");
    fell(&fake);
    copy(&fake).code(0);
    // Through the engine, with an agent of its own: the layers above have nothing to work with.
    fell(&fake);
    let (object, code) = fake.json(&["recover"]);
    assert_eq!((code, &object["layer"]), (0, &json!("peer-copy")), "{object}");
}
