//! Gates before a source is used: whether this program, on this runtime and machine, may meet this node's data.
//!
//! A closed gate is a reason, not an error. What cannot be read closes no gate except where the harm could not be
//! undone: an older program must never meet a newer database.

use crate::identity::{DbState, check_database};
use crate::range::{Version, satisfies};
use crate::{Node, package_json};
use host::clock::Deadline;
use host::run::{Cmd, run};
use std::io::Read;
use std::path::Path;
use std::time::Duration;

/// `node --version` takes 30 ms; a broken binary may hang.
const VERSION_WAIT: Duration = Duration::from_secs(3);
/// Space that must be left on a file system after a repair.
pub const SPACE_MARGIN_BYTES: u64 = 256 << 20;
/// Less than this is little: backups and repairs will soon be refused.
pub const LOW_SPACE_BYTES: u64 = 1 << 30;

/// A gate that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gate {
    /// Nothing speaks against it.
    Open,
    /// Why it must not be used.
    Closed(String),
}

impl Gate {
    /// Whether the source may be used.
    #[must_use]
    pub fn is_open(&self) -> bool {
        matches!(self, Gate::Open)
    }

    /// Why not, if it may not.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match self {
            Gate::Open => None,
            Gate::Closed(why) => Some(why),
        }
    }
}

/// How the reason ends when a runtime was only slow: on a busy machine that is no damage.
pub(crate) const SLOW: &str = "did not answer in time";

/// What a Node binary says of itself, asked as the node's user, for three seconds at most. `Err` says in words why
/// it is no usable runtime.
pub fn runtime_version(node: &Node, binary: &Path, deadline: Deadline) -> Result<Version, String> {
    let meta = std::fs::metadata(binary).map_err(|e| format!("{}: {e}", binary.display()))?;
    if !meta.is_file() || meta.len() == 0 {
        return Err(format!("{} is not a program", binary.display()));
    }
    let own = host::run::Ids::current();
    let cmd = Cmd {
        program: binary.as_os_str().to_owned(),
        args: vec!["--version".into()],
        env: vec![("HOME".into(), node.home.clone().into())],
        env_clear: true,
        ids: (own != node.ids).then_some(node.ids),
        shut_in: true,
        ..Cmd::default()
    };
    let out = run(&cmd, deadline.min(Deadline::after(VERSION_WAIT)))
        .map_err(|e| format!("{} does not run: {}", binary.display(), e.why))?;
    let said = String::from_utf8_lossy(&out.stdout).trim().chars().take(40).collect::<String>();
    match Version::parse(&said) {
        Some(v) if said.starts_with('v') => Ok(v),
        Some(_) | None if out.timed_out => Err(format!("{} {SLOW}", binary.display())),
        Some(_) | None => Err(format!("{} does not name its version (said {said:?})", binary.display())),
    }
}

/// Whether this runtime satisfies what the package at `package_dir` asks for.
#[must_use]
pub fn engine(package_dir: &Path, runtime: Version) -> Gate {
    let asked =
        package_json(package_dir).and_then(|j| j.get("engines")?.get("node")?.as_str().map(str::to_owned));
    match asked.as_deref().map(|range| (range, satisfies(range, runtime))) {
        Some((range, Some(false))) => {
            Gate::Closed(format!("Node {runtime} runs, the program asks for {range}"))
        }
        Some((_, Some(true) | None)) | None => Gate::Open,
    }
}

/// Whether a program with these schemas `(state, agent)` may meet the node's databases.
#[must_use]
pub fn schema(node: &Node, program: (u32, u32), deadline: Deadline) -> Gate {
    let newer = |db: &Path, most: u32, what: &str| match check_schema(db, deadline) {
        Some(has) if has > most => {
            Some(format!("{what} has schema {has}, the program knows schemas up to {most}"))
        }
        Some(_) | None => None,
    };
    if let Some(why) = newer(&node.state_db(), program.0, "the state database") {
        return Gate::Closed(why);
    }
    for (agent, db) in node.agent_dbs() {
        if let Some(why) = newer(&db, program.1, &format!("the database of agent {agent}")) {
            return Gate::Closed(why);
        }
    }
    Gate::Open
}

/// The schema of a database straight from its header, which a damaged body does not hide; with a log, as SQLite
/// sees it.
fn check_schema(db: &Path, deadline: Deadline) -> Option<u32> {
    /// `user_version` lies here in the file's head.
    const USER_VERSION_AT: usize = 60;
    if crate::identity::log_len(db) > 0
        && let DbState::Sound { schema, .. } = check_database(db, deadline)
    {
        return Some(schema);
    }
    let mut head = [0_u8; 100];
    let mut file = std::fs::File::open(db).ok()?;
    file.read_exact(&mut head).ok()?;
    head.starts_with(b"SQLite format 3\0").then_some(())?;
    let field: [u8; 4] = head.get(USER_VERSION_AT..USER_VERSION_AT + 4)?.try_into().ok()?;
    Some(u32::from_be_bytes(field))
}

/// Whether an ELF binary is made for this machine. What is no ELF file is closed; what cannot be read stays open.
#[must_use]
pub fn architecture(binary: &Path) -> Gate {
    let mut head = [0_u8; 20];
    let read = std::fs::File::open(binary).and_then(|mut f| f.read_exact(&mut head));
    if read.is_err() {
        return Gate::Open;
    }
    if !head.starts_with(b"\x7fELF") {
        return Gate::Closed(format!("{} is no Linux program", binary.display()));
    }
    let machine = u16::from_le_bytes([head[18], head[19]]);
    let (name, ours) = match std::env::consts::ARCH {
        "x86_64" => ("x86_64", 62),
        "aarch64" => ("aarch64", 183),
        _ => return Gate::Open,
    };
    if machine == ours {
        Gate::Open
    } else {
        Gate::Closed(format!("{} is not made for {name}", binary.display()))
    }
}

/// Whether the file system of `path` holds `bytes` more of ours and keeps its margin.
#[must_use]
pub fn space(path: &Path, bytes: u64) -> Gate {
    space_for(path, bytes, host::run::Ids::current().uid)
}

/// The same for what a process of this user writes: an npm that runs as the node's user may not use root's reserve.
#[must_use]
pub fn space_for(path: &Path, bytes: u64, uid: u32) -> Gate {
    let Some(existing) = path.ancestors().find(|p| p.exists()) else { return Gate::Open };
    match host::files::free(existing) {
        Ok(space) if space.for_user(uid) < bytes.saturating_add(SPACE_MARGIN_BYTES) => Gate::Closed(format!(
            "{} MB are free at {}, {} MB are needed",
            space.for_user(uid) >> 20,
            existing.display(),
            bytes.saturating_add(SPACE_MARGIN_BYTES) >> 20
        )),
        Ok(space) if space.free_inodes == 0 => {
            Gate::Closed(format!("no inodes are free at {}", existing.display()))
        }
        Ok(_) | Err(_) => Gate::Open,
    }
}

/// Why the node or its backups will soon lack space, if so: by what users may still write, whoever asks.
#[must_use]
pub fn low(paths: &[&Path]) -> Option<String> {
    paths.iter().find_map(|path| little(path, &host::files::free(path).ok()?))
}

fn little(path: &Path, space: &host::files::Space) -> Option<String> {
    (space.user_bytes < LOW_SPACE_BYTES)
        .then(|| format!("only {} MB are free at {}", space.user_bytes >> 20, path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::find::tests::node_at;
    use crate::identity::tests::state_db;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(20))
    }

    #[test]
    fn an_older_program_never_meets_a_newer_database() {
        let dir = tempfile::tempdir().expect("dir");
        let node = node_at(dir.path());
        assert!(schema(&node, (17, 23), soon()).is_open(), "no database, nothing to protect");
        let writer = state_db(&node.state_db(), Some("x"), 1);
        for logged in [true, false] {
            assert!(schema(&node, (18, 23), soon()).is_open());
            assert!(schema(&node, (19, 23), soon()).is_open());
            let closed = schema(&node, (17, 23), soon());
            assert!(closed.reason().is_some_and(|w| w.contains("schema 18")), "{logged} {closed:?}");
            if logged {
                writer.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).expect("checkpoint");
            }
        }
        drop(writer);
        // A database whose body is damaged still names its schema.
        let mut bytes = std::fs::read(node.state_db()).expect("read");
        bytes.iter_mut().skip(200).for_each(|b| *b = 0x55);
        std::fs::write(node.state_db(), bytes).expect("write");
        assert!(!schema(&node, (17, 23), soon()).is_open());
    }

    #[test]
    fn the_engine_gate_reads_the_package() {
        let dir = tempfile::tempdir().expect("dir");
        assert!(engine(dir.path(), Version(20, 0, 0)).is_open(), "no package asks for nothing");
        std::fs::write(
            dir.path().join("package.json"),
            r#"{"engines":{"node":">=24.16.0 <25 || >=26.1.0"}}"#,
        )
        .expect("write");
        assert!(engine(dir.path(), Version(26, 10, 0)).is_open());
        assert!(engine(dir.path(), Version(22, 9, 0)).reason().is_some_and(|w| w.contains("22.9.0")));
    }

    #[test]
    fn a_runtime_is_asked_and_a_liar_is_found() {
        let dir = tempfile::tempdir().expect("dir");
        let node = node_at(dir.path());
        let script = |name: &str, body: &str| {
            use std::os::unix::fs::PermissionsExt;
            let path = dir.path().join(name);
            std::fs::write(&path, body).expect("write");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("chmod");
            path
        };
        let good = script("good", "#!/bin/sh\necho v26.10.0\n");
        assert_eq!(runtime_version(&node, &good, soon()), Ok(Version(26, 10, 0)));
        let liar = script("liar", "#!/bin/sh\nexit 0\n");
        assert!(runtime_version(&node, &liar, soon()).is_err());
        assert!(runtime_version(&node, &script("empty", ""), soon()).is_err());
        assert!(runtime_version(&node, &dir.path().join("gone"), soon()).is_err());
        assert!(!architecture(&good).is_open());
        assert!(architecture(Path::new("/proc/self/exe")).is_open());
    }

    #[test]
    fn a_disk_is_low_by_what_its_users_may_write() {
        let space = |free_bytes, user_bytes| host::files::Space {
            free_bytes,
            user_bytes,
            total_bytes: 100 << 30,
            free_inodes: 9,
        };
        let at = Path::new("/srv");
        // A disk of 100 GB keeps 5 GB back for root: the gateway's user has nearly nothing of what an agent of root's sees.
        let told = little(at, &space(5 << 30, 40 << 20));
        assert_eq!(told.as_deref(), Some("only 40 MB are free at /srv"));
        assert_eq!(little(at, &space(7 << 30, 2 << 30)), None);
        let dir = tempfile::tempdir().expect("dir");
        let real = host::files::free(dir.path()).expect("free");
        assert_eq!(low(&[dir.path()]).is_some(), real.user_bytes < LOW_SPACE_BYTES);
    }

    #[test]
    fn space_is_a_gate() {
        let dir = tempfile::tempdir().expect("dir");
        assert!(space(&dir.path().join("not/there/yet"), 1).is_open());
        assert!(!space(dir.path(), u64::MAX / 2).is_open());
        assert!(!space_for(dir.path(), u64::MAX / 2, 1_000).is_open());
    }
}
