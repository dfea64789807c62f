//! A config that was replaced on suspicion alone returns when that did not help.
//!
//! A config that is missing, does not parse or is refused by the program itself (decision 0008) is broken for certain; what
//! replaces it stays. But one that is whole and
//! was only *blamed* (it changed since the node last served, and the gateway's last words were about its config) is its
//! owner's newest word. Layer 1 puts the older one in its place on trial: if the judge accepts the start, that stays and
//! the closing message says where the other lies; if the whole climb fails, the owner's config goes back, so that a
//! failed recovery never silently ends with older settings. Drop-ins of the unit that no snapshot knows are on trial in the
//! same way. Program, runtime and service files that a snapshot knows have none: docs/decisions/0010.

use crate::{Bench, Report, restore};
use host::{Error, Kind, Result, files};
use node::refusal;
use restore::{Choice, drop_ins};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

/// A config is a few kilobytes; the store takes no larger one either.
const LIMIT_BYTES: u64 = 4 << 20;
/// The owner's config.
const KEPT: &str = "openclaw.json";
/// What lies in its place while the trial lasts.
const PLACED: &str = "placed";

fn dir(bench: &Bench<'_>) -> PathBuf {
    bench.quarantine.join("on-trial")
}

fn print(bytes: &[u8]) -> String {
    let mut hash = DefaultHasher::new();
    bytes.hash(&mut hash);
    format!("{:016x}-{}", hash.finish(), bytes.len())
}

fn live(bench: &Bench<'_>) -> Option<Vec<u8>> {
    files::read_bounded(&bench.node.config_path, LIMIT_BYTES).ok()
}

/// The config that is about to be replaced, if it is whole and only suspected.
pub(crate) fn keep(bench: &Bench<'_>, choice: &Choice) -> Option<Vec<u8>> {
    let node = bench.node;
    let whole = choice.config && node::config::check(node).is_empty();
    live(bench).filter(|_| whole && !refused(bench))
}

/// Whether the program itself says that this config is wrong. No answer is no word.
fn refused(bench: &Bench<'_>) -> bool {
    let baseline = bench.baseline.cloned().unwrap_or_default();
    refusal::current(bench.node, &baseline, bench.deadline)
        .is_some_and(|checked| !refusal::news(bench.node, &baseline, &checked).is_empty())
}

/// After the repair: the trial is on if another config lies there now. What an earlier try of this incident kept is the
/// owner's still, and is not written over.
pub(crate) fn begun(bench: &Bench<'_>, kept: Option<Vec<u8>>) -> Result<()> {
    let (Some(kept), Some(placed)) = (kept, live(bench)) else {
        return Ok(());
    };
    let dir = dir(bench);
    if kept == placed || dir.join(PLACED).exists() {
        return Ok(());
    }
    files::make_private_dir(&dir)?;
    files::write_atomic(&dir.join(KEPT), &kept, 0o600)?;
    files::write_atomic(&dir.join(PLACED), print(&placed).as_bytes(), 0o600)
}

/// Whether a trial of this incident's quarantine is on.
#[must_use]
pub fn on(quarantine: &Path) -> bool {
    config_on(quarantine) || drop_ins::on(quarantine)
}

fn config_on(quarantine: &Path) -> bool {
    quarantine.join("on-trial").join(PLACED).exists()
}

/// The judge rejected all of it: the owner's drop-ins and config go back, unless somebody has written others meanwhile.
/// Only while no gateway runs on what is there.
pub fn over(bench: &mut Bench<'_>) -> Result<Report> {
    let mut report = Report::default();
    if !on(&bench.quarantine) {
        return Ok(report);
    }
    if let Some(gateway) = bench.node.gateway() {
        return Err(Error::new(
            Kind::System,
            "put the config back",
            format!("process {} runs on the one that is there", gateway.pid),
        ));
    }
    if drop_ins::on(&bench.quarantine)
        && let Err(e) = drop_ins::back(bench.node, &bench.quarantine, &mut report)
    {
        // The config has its own way back.
        report.could_not(e.to_string());
    }
    if !config_on(&bench.quarantine) {
        return Ok(report);
    }
    let dir = dir(bench);
    let placed = files::read_bounded(&dir.join(PLACED), LIMIT_BYTES)?;
    if live(bench).is_some_and(|now| print(&now).as_bytes() == placed) {
        restore::bring_back(bench, &dir.join(KEPT), &bench.node.config_path, &mut report)?;
    } else {
        report.did("the config was written by somebody else meanwhile and stays");
    }
    std::fs::remove_file(dir.join(PLACED)).map_err(|e| Error::io("end the config's trial", &e))?;
    Ok(report)
}
