//! The gateway's lock file: the one honest name of the running gateway.
//!
//! The gateway wipes its arguments and renames itself, but it writes its pid and start time (field 22 of
//! `/proc/PID/stat`) into `<state>/tmp/openclaw-<uid>/gateway.state.lock`. The file lies in the user's own
//! directory, so a lock's word counts only while its owner and the process's uid are the node's.

use crate::Node;
use host::process::ProcessId;
use serde::Deserialize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A lock has under 1 KB.
const LOCK_LIMIT_BYTES: u64 = 64 << 10;

/// What a gateway's lock file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayLock {
    /// The process that holds it.
    pub id: ProcessId,
    /// The owner of the lock file.
    pub uid: u32,
    /// The port that the gateway was asked to listen on.
    pub port: Option<u16>,
    /// Its config file, as it sees it.
    pub config_path: PathBuf,
    /// Its state directory, as it sees it.
    pub state_dir: Option<PathBuf>,
    /// New for every holder.
    pub owner_id: String,
}

/// Somebody who holds the lock and is no gateway (offline maintenance of the databases).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherHolder {
    /// The process.
    pub id: ProcessId,
    /// What it calls itself, for example `sqlite-maintenance`.
    pub role: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Payload {
    pid: u32,
    start_time: Option<u64>,
    port: Option<u16>,
    #[serde(default)]
    config_path: PathBuf,
    state_dir: Option<PathBuf>,
    #[serde(default)]
    owner_id: String,
    role: Option<String>,
}

impl GatewayLock {
    /// Whether the lock's word counts: its file and its process belong to the node's user.
    #[must_use]
    pub fn trusted_by(&self, node: &Node) -> bool {
        self.uid == node.ids.uid && self.id.uid() == Some(node.ids.uid)
    }
}

/// Where the state lock of this state directory and user lies.
#[must_use]
pub fn path(state_dir: &Path, uid: u32) -> PathBuf {
    state_dir.join("tmp").join(format!("openclaw-{uid}")).join("gateway.state.lock")
}

/// The lock as it lies there, alive or not. `None`: no file, unreadable, or held by something else.
#[must_use]
pub fn read(node: &Node) -> Option<GatewayLock> {
    read_file(&path(&node.state_dir, node.ids.uid))
}

/// The same for a known lock file.
#[must_use]
pub fn read_file(file: &Path) -> Option<GatewayLock> {
    let (payload, uid) = payload(file)?;
    if payload.role.as_deref().is_some_and(|r| r != "gateway") {
        return None;
    }
    Some(GatewayLock {
        id: ProcessId { pid: payload.pid, start_ticks: payload.start_time? },
        uid,
        port: payload.port,
        config_path: payload.config_path,
        state_dir: payload.state_dir,
        owner_id: payload.owner_id,
    })
}

/// A living holder of the lock that is no gateway.
#[must_use]
pub fn other_holder(node: &Node) -> Option<OtherHolder> {
    let (payload, _) = payload(&path(&node.state_dir, node.ids.uid))?;
    let role = payload.role.filter(|r| r != "gateway")?;
    let id = ProcessId { pid: payload.pid, start_ticks: payload.start_time? };
    id.alive().then_some(OtherHolder { id, role })
}

fn payload(file: &Path) -> Option<(Payload, u32)> {
    let meta = std::fs::symlink_metadata(file).ok()?;
    if !meta.is_file() {
        return None;
    }
    let bytes = host::files::read_bounded(file, LOCK_LIMIT_BYTES).ok()?;
    // The program pads its locks with white space behind the JSON; a stream reader stops at the first value.
    let first = serde_json::Deserializer::from_slice(&bytes).into_iter::<Payload>().next()?.ok()?;
    (first.pid != 0).then_some((first, meta.uid()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDED: &str = include_str!("../tests/recorded/gateway.state.lock");

    fn written(text: &str) -> Option<GatewayLock> {
        let dir = tempfile::tempdir().expect("dir");
        let file = dir.path().join("gateway.state.lock");
        std::fs::write(&file, text).expect("write");
        read_file(&file)
    }

    #[test]
    fn the_recorded_lock_is_read() {
        let lock = written(RECORDED).expect("a lock");
        assert_eq!(lock.id, ProcessId { pid: 9165, start_ticks: 93_131 });
        assert_eq!(lock.port, Some(19_801));
        assert_eq!(lock.state_dir.as_deref(), Some(Path::new("/home/claw/.openclaw")));
        assert_eq!(lock.uid, rustix::process::getuid().as_raw());
    }

    #[test]
    fn what_is_no_gateways_lock_is_none() {
        for text in [
            "",
            "{",
            "null",
            r#"{"pid":0,"startTime":5,"configPath":"/c"}"#,
            r#"{"pid":12,"configPath":"/c"}"#,
            r#"{"pid":12,"startTime":5,"configPath":"/c","role":"sqlite-maintenance"}"#,
            r#"{"pid":-3,"startTime":5,"configPath":"/c"}"#,
        ] {
            assert_eq!(written(text), None, "{text}");
        }
    }

    #[test]
    fn a_symlink_or_a_pipe_in_its_place_is_none() {
        let dir = tempfile::tempdir().expect("dir");
        let real = dir.path().join("real");
        std::fs::write(&real, RECORDED).expect("write");
        let link = dir.path().join("gateway.state.lock");
        std::os::unix::fs::symlink(&real, &link).expect("link");
        assert_eq!(read_file(&link), None);
        std::fs::remove_file(&link).expect("rm");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &link,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .expect("fifo");
        assert_eq!(read_file(&link), None);
    }
}
