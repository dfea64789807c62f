//! What the tests need from the machine. Only what is missing is installed, only from Debian's own packages, and only
//! as root; otherwise the missing thing is named with the command that brings it.

use crate::run::{Show, Tally, run};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// A slow mirror is slow; a dead one is not waited for.
const INSTALL_LIMIT: Duration = Duration::from_secs(600);
/// Commands that only print a version.
const ASK_LIMIT: Duration = Duration::from_secs(60);

/// A program that is looked for on the path, its Debian packages, and what for.
type Program = (&'static str, &'static str, &'static str);
/// What every run needs.
const PROGRAMS: [Program; 2] = [
    ("cc", "gcc libc6-dev", "SQLite and zstd are C"),
    ("git", "git", "the tidy checks read what is in the repository"),
];
/// What the tests that only root can run need besides.
const ROOT_PROGRAMS: [Program; 10] = [
    ("mount", "mount", "root-only tests mount an overlay"),
    ("unshare", "util-linux", "root-only tests use namespaces of their own"),
    ("mmdebstrap", "mmdebstrap", "the lab's hosts are made of Debian's packages"),
    ("eatmydata", "eatmydata", "making them need not survive a power cut"),
    ("systemd-nspawn", "systemd-container", "the lab boots them"),
    ("mkfs.btrfs", "btrfs-progs", "their file systems are snapshots"),
    ("ip", "iproute2", "the lab's hosts have a switch of their own"),
    ("nft", "nftables", "the lab cuts their network"),
    ("ssh-keygen", "openssh-client", "each host has keys of its own"),
    ("sshd", "openssh-server", "peers lend their programs over it"),
];

/// Makes sure of what the tests need. A thing that cannot be had counts as a failure.
pub(crate) fn ensure(tally: &mut Tally) {
    let more = ROOT_PROGRAMS.into_iter().filter(|_| is_root());
    let missing: Vec<Program> =
        PROGRAMS.into_iter().chain(more).filter(|(program, _, _)| !on_path(program)).collect();
    if !missing.is_empty() {
        tally.one("needs", || install(&missing));
    }
    let lacking: Vec<&str> = ["fmt", "clippy"].into_iter().filter(|tool| !cargo_has(tool)).collect();
    if !lacking.is_empty() {
        tally.one("toolchain", || components(&lacking));
    }
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // What only root runs lies where not everybody looks.
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    places.into_iter().any(|dir: std::path::PathBuf| dir.join(program).is_file())
}

fn install(missing: &[Program]) -> bool {
    for (program, packages, why) in missing {
        println!("`{program}` is missing ({why}): Debian package {packages}");
    }
    if !is_root() || !Path::new("/usr/bin/apt-get").exists() {
        println!("install it, or run this as root on Debian");
        return false;
    }
    let packages: Vec<&str> = missing.iter().flat_map(|(_, p, _)| p.split(' ')).collect();
    let apt = |args: &[&str]| {
        let mut c = Command::new("apt-get");
        c.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-y"]).args(args);
        run(&mut c, Show::Yes, INSTALL_LIMIT).ok()
    };
    // Stale package lists are the usual reason for a failed install; one that works needs no update.
    let args: Vec<&str> = ["install", "--no-install-recommends"].into_iter().chain(packages).collect();
    apt(&args) || (apt(&["update"]) && apt(&args))
}

fn cargo_has(tool: &str) -> bool {
    let mut c = Command::new(env!("CARGO"));
    c.args([tool, "--version"]).stderr(std::process::Stdio::null());
    run(&mut c, Show::No, ASK_LIMIT).ok()
}

fn components(lacking: &[&str]) -> bool {
    println!("cargo lacks: {}", lacking.join(", "));
    if !on_path("rustup") {
        println!("install rustfmt and clippy of this toolchain");
        return false;
    }
    run(Command::new("rustup").args(["component", "add", "rustfmt", "clippy"]), Show::Yes, INSTALL_LIMIT).ok()
}
