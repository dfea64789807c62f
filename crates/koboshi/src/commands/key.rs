//! `koboshi key export`: the one secret without which the store cannot be read.

use super::desk::{Desk, Fields};
use crate::print::Exit;
use host::{Context, Error, Kind, Result, files};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A key file is one short line.
const MAX_BYTES: u64 = 4 << 10;

/// Prints the key file's bytes on standard output, so that redirecting them makes a usable key file again.
pub(super) fn export(desk: &Desk) -> Result<Exit> {
    let file = &desk.places.key_file;
    let bytes = files::read_bounded(file, MAX_BYTES).map_err(|e| {
        if e.kind == Kind::NotFound {
            Error::new(
                Kind::NotFound,
                "export the store's key",
                format!("there is none at {}", file.display()),
            )
            .hint("koboshi install or koboshi snapshot create makes one together with the store")
        } else {
            e
        }
    })?;
    let p = desk.printer;
    if p.is_json() {
        let key = String::from_utf8_lossy(&bytes).trim().to_owned();
        p.object(Fields::default().put("key", key).put("file", file.display().to_string()).done());
    } else {
        p.raw(&bytes);
        p.note("Keep this off this host: without it no snapshot can be read, and with it every one can.");
        p.note(format!("To use it again, put this one line into {} (mode 0600).", file.display()));
    }
    if desk.places.state_dir.is_dir() {
        files::write_atomic(&mark(&desk.places.state_dir), b"exported\n", 0o600)?;
    }
    Ok(Exit::Done)
}

/// Says that the key was exported, by its time.
fn mark(state_dir: &Path) -> PathBuf {
    state_dir.join("key-exported")
}

/// Whether this very key was exported: a key that is younger than the mark's is another one.
pub(super) fn exported(desk: &Desk) -> bool {
    let modified = |path: &Path| -> Result<SystemTime> {
        std::fs::metadata(path).and_then(|m| m.modified()).context(|| format!("look at {}", path.display()))
    };
    match (modified(&mark(&desk.places.state_dir)), modified(&desk.places.key_file)) {
        (Ok(mark), Ok(key)) => mark >= key,
        (Err(_), _) | (_, Err(_)) => false,
    }
}
