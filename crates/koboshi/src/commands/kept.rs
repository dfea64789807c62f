//! What the store holds, asked of another process. A disk that hangs takes whoever reads it along, and a process that
//! waits for such a disk cannot even be killed: it is left behind, and the command says so and goes on.

use super::desk::{Desk, newest_first};
use crate::print::Exit;
use crate::{space, step};
use host::clock::Deadline;
use host::run::{Cmd, run};
use host::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use store::{SnapshotInfo, Store};

/// The list takes milliseconds, its size a walk of some hundred files; a pressed disk may need seconds.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// What the store says, or why it says nothing.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Kept {
    /// Whether there is a store at all.
    pub(super) there: bool,
    /// Snapshots that can be read.
    pub(super) count: usize,
    /// Snapshots that cannot.
    pub(super) unreadable: usize,
    /// The newest that is trusted.
    pub(super) good: Option<SnapshotInfo>,
    /// What it takes on disk.
    pub(super) bytes: u64,
    /// What it may take, together with spare and quarantine.
    pub(super) limit_bytes: u64,
    /// Why it cannot be used, where that is so.
    pub(super) trouble: Option<Trouble>,
}

/// An error as it passes between processes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Trouble {
    what: String,
    why: String,
    pub(super) hint: Option<String>,
    #[serde(default)]
    hangs: bool,
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.error().fmt(f)
    }
}

impl From<Error> for Trouble {
    fn from(e: Error) -> Trouble {
        Trouble { what: e.what, why: e.why, hint: e.hint, hangs: e.kind == Kind::TimedOut }
    }
}

impl Trouble {
    fn error(&self) -> Error {
        let kind = if self.hangs { Kind::TimedOut } else { Kind::System };
        let e = Error::new(kind, self.what.clone(), self.why.clone());
        Error { hint: self.hint.clone(), ..e }
    }
}

/// Asks another process, which may be left behind.
pub(super) fn ask(desk: &Desk) -> Kept {
    answer_of_another(desk).unwrap_or_else(|e| Kept {
        there: true,
        trouble: Some(e.into()),
        ..Kept::default()
    })
}

/// The store itself, once it was seen to answer.
pub(super) fn open(desk: &Desk) -> Result<Option<Store>> {
    match ask(desk).trouble {
        Some(trouble) if trouble.hangs => Err(trouble.error()),
        Some(_) | None => step::open_store(&desk.places),
    }
}

fn answer_of_another(desk: &Desk) -> Result<Kept> {
    let what = || format!("ask the store in {}", desk.places.store().display());

    let config = desk.places.config_file.clone().into_os_string();
    let cmd = Cmd::new("/proc/self/exe", ["--config".into(), config, "kept".into()]);
    let hangs = || {
        let s = ANSWER_LIMIT.as_secs();
        Error::new(Kind::TimedOut, what(), format!("it did not answer within {s} s: its disk hangs"))
            .hint("look at that disk (dmesg, the mount); the agent climbs without the store meanwhile")
    };
    let out = match run(&cmd, Deadline::after(ANSWER_LIMIT)) {
        Ok(out) if out.timed_out => return Err(hangs()),
        // Killed, and still there: it waits for the disk.
        Err(e) if e.kind == Kind::TimedOut => return Err(hangs()),
        other => other?,
    };
    serde_json::from_slice(&out.stdout).map_err(|_| {
        let said = String::from_utf8_lossy(&out.stderr);
        let why = said.lines().next().unwrap_or("it ended without an answer");
        Error::new(Kind::System, what(), why)
    })
}

/// The other process: reads the store and says what is there.
pub(super) fn tell(desk: &Desk) -> Result<Exit> {
    let kept =
        read(desk).unwrap_or_else(|e| Kept { there: true, trouble: Some(e.into()), ..Kept::default() });
    let text =
        serde_json::to_string(&kept).map_err(|e| Error::new(Kind::System, "say what the store holds", e))?;
    desk.printer.line(text);
    Ok(Exit::Done)
}

fn read(desk: &Desk) -> Result<Kept> {
    let limit_bytes = space::limit_bytes(&desk.config, &desk.places)?;
    let Some(store) = step::open_store(&desk.places)? else {
        return Ok(Kept { limit_bytes, ..Kept::default() });
    };
    let all = newest_first(&store)?;
    Ok(Kept {
        there: true,
        count: all.len(),
        unreadable: store.unreadable().map_or(0, |u| u.len()),
        good: all.into_iter().find(|i| i.trust.trusted()),
        bytes: store.size()?.bytes,
        limit_bytes,
        trouble: None,
    })
}
