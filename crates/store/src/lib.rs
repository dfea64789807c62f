//! Remembers: what a node consisted of, sealed, and brings it back proven.
//!
//! Three promises. **Nothing unproven reaches the node**: a byte is put in place only after its seal opened and its
//! hash was right. **Nothing is deleted first**: what is replaced or removed is moved to a quarantine. **A power cut
//! leaves the older or the newer state, whole**: everything is written beside, synced, and renamed.
//!
//! The layout is described in `docs/store-format.md`, so that a person can restore without this code.

mod stamp;
mod types;

use engine::words::Class;
use host::clock::Deadline;
use host::{Error, Kind, Result};
use std::path::Path;

pub use types::*;

/// A store directory and its key. Many may read at once; writers take a lock for the length of one operation.
pub struct Store {}

fn not_yet<T>() -> Result<T> {
    Err(Error::new(Kind::System, "the store", "this operation is not built into this version"))
}

impl Store {
    /// Opens the store, making directory and key file if they are missing.
    pub fn open_or_create(_dir: &Path, _key_file: &Path) -> Result<Store> {
        not_yet()
    }

    /// Opens a store that exists.
    pub fn open(_dir: &Path, _key_file: &Path) -> Result<Store> {
        not_yet()
    }

    /// Takes a snapshot and publishes it as a candidate.
    pub fn snapshot(
        &self,
        _request: &Request<'_>,
        _progress: &mut dyn FnMut(Progress),
        _deadline: Deadline,
    ) -> Result<SnapshotInfo> {
        not_yet()
    }

    /// Every snapshot that can be read, oldest first.
    pub fn list(&self) -> Result<Vec<SnapshotInfo>> {
        not_yet()
    }

    /// One snapshot.
    pub fn info(&self, _id: &str) -> Result<SnapshotInfo> {
        not_yet()
    }

    /// Changes how far a snapshot is believed. Refused when it holds a database that failed its check.
    pub fn set_trust(&self, _id: &str, _trust: Trust) -> Result<()> {
        not_yet()
    }

    /// The newest trusted snapshot, or the newest that holds this class.
    pub fn newest_trusted(&self, _class: Option<Class>) -> Result<Option<SnapshotInfo>> {
        not_yet()
    }

    /// Opens and hashes every object that a snapshot (or any) needs.
    pub fn verify(&self, _id: Option<&str>, _deadline: Deadline) -> Result<VerifyReport> {
        not_yet()
    }

    /// How the live trees differ from a snapshot, in the given classes.
    pub fn compare(
        &self,
        _id: &str,
        _classes: &[Class],
        _depth: Depth,
        _deadline: Deadline,
    ) -> Result<Vec<Difference>> {
        not_yet()
    }

    /// The quick look at the live trees, with its cost; meant for idle priority. Constant memory.
    pub fn sweep(&self, _id: &str, _classes: &[Class], _deadline: Deadline) -> Result<SweepReport> {
        not_yet()
    }

    /// Puts the live trees right from this one snapshot. Everything needed is proven before anything is touched.
    pub fn repair(&self, _id: &str, _scope: Scope<'_>, _plan: &Plan, _deadline: Deadline) -> Result<Repaired> {
        not_yet()
    }

    /// Puts whole classes right from the newest trusted snapshot whose objects verify; `accept` may refuse one
    /// (a gate) with its reason.
    pub fn repair_newest(
        &self,
        _classes: &[Class],
        _plan: &Plan,
        _accept: &dyn Fn(&SnapshotInfo) -> std::result::Result<(), String>,
        _deadline: Deadline,
    ) -> Result<Repaired> {
        not_yet()
    }

    /// Writes the roots of these classes as plain trees to `dest/<root name>`, which must not exist.
    pub fn export(&self, _id: &str, _classes: &[Class], _dest: &Path, _deadline: Deadline) -> Result<Repaired> {
        not_yet()
    }

    /// Removes the oldest snapshots until the store is within the limit; never what the newest trusted snapshot of
    /// a class, or the newest snapshot, needs.
    pub fn prune(&self, _limit_bytes: u64, _deadline: Deadline) -> Result<Pruned> {
        not_yet()
    }

    /// Bytes on disk.
    pub fn size(&self) -> Result<Size> {
        not_yet()
    }
}

/// Removes from a quarantine what may go, and returns the bytes freed: entries of `program`, `runtime` and `service`
/// roots oldest first while the quarantine is over `limit_bytes`; other classes only when older than `keep_days` and
/// when `store` holds the same bytes in a trusted snapshot.
pub fn trim_quarantine(
    _quarantine: &Path,
    _store: &Store,
    _limit_bytes: u64,
    _keep_days: u32,
    _deadline: Deadline,
) -> Result<u64> {
    not_yet()
}
