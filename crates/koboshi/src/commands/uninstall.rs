//! `koboshi uninstall`: takes koboshi away. The node stays exactly as it is, running or not.
//!
//! Only what koboshi wrote is removed, by name: a directory that holds anything else stays. Snapshots, journal, key and
//! quarantine stay too, unless `--purge` asks for their end.

use super::desk::{Desk, Fields};
use super::unit;
use crate::cli::{Cli, Uninstall};
use crate::print::{Exit, Printer, bytes};
use crate::{patient, room, spare};
use host::clock::Deadline;
use host::process::ProcessId;
use host::service::Manager;
use host::{Context, Error, Kind, Result, files};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The agent ends in milliseconds; a step that it ends first may take a few seconds.
const AGENT_ENDS: Duration = Duration::from_secs(45);
/// Entries counted before a directory's size is taken as large enough.
const MAX_ENTRIES: u64 = 1_000_000;

/// Takes koboshi away, or says what would go.
pub(super) fn run(cli: &Cli, options: &Uninstall, printer: Printer) -> Result<Exit> {
    let (config, places) = super::open(cli)?;
    let desk = Desk { config, places, printer };
    let unit = unit::installed(&desk);
    let agent = desk.agent();
    let node = patient::remembered(&desk.places).unwrap_or_default();
    let goes = goes(&desk, options.purge);
    let spare_bytes = node.as_ref().filter(|_| options.purge).map_or(0, spare::size);

    let p = printer;
    if let Some(unit) = &unit {
        p.line(format!("stops and removes {}", unit.file.display()));
    }
    if let Some(id) = agent {
        p.line(format!("ends the agent (process {}); the gateway runs on", id.pid));
    }
    for path in &goes {
        p.line(format!("removes {}", path.display()));
    }
    if spare_bytes > 0 {
        p.line(format!("removes the spare beside the program, {}", bytes(spare_bytes)));
    }
    if options.purge {
        p.line(p.red("Every snapshot, the key, the journal and all that lies in quarantine go with this."));
    } else if desk.places.state_dir.is_dir() {
        let size = files::tree_size(&desk.places.state_dir, MAX_ENTRIES).map_or(0, |s| s.disk_bytes);
        p.line(format!(
            "keeps   {} and {} ({}); --purge removes them too",
            desk.places.state_dir.display(),
            desk.places.key_file.display(),
            bytes(size)
        ));
    }
    p.line("The node stays as it is.");
    let fields = Fields::default()
        .put("dry_run", options.dry_run)
        .put("purge", options.purge)
        .maybe("unit", unit.as_ref().map(|u| u.file.display().to_string()))
        .maybe("agent_pid", agent.map(|id| id.pid))
        .put("removes", goes.iter().map(|g| g.display().to_string()).collect::<Vec<_>>());
    if options.dry_run {
        p.line("Nothing was removed (--dry-run).");
        p.object(fields.put("removed", false).done());
        return Ok(Exit::Done);
    }
    if let Some(unit) = &unit {
        unit::systemctl(unit.scope, &["disable", "--now", &unit.name])?;
        std::fs::remove_file(&unit.file).context(|| format!("remove {}", unit.file.display()))?;
        unit::systemctl(unit.scope, &["daemon-reload"])?;
    }
    if let Some(id) = agent {
        end_agent(id)?;
    }
    if let Some(mut held) = node.as_ref().and_then(|node| desk.unit(node)) {
        // Nobody would be left to take back what koboshi holds down.
        if let Err(e) = held.release(Deadline::after(AGENT_ENDS)) {
            p.note(format!("if koboshi holds the unit down, a reboot ends that: {e}"));
        }
    }
    if let Some(node) = &node {
        room::remove_reserve(node, &desk.places);
    }
    if let Some(node) = node.as_ref().filter(|_| options.purge) {
        spare::remove(node)?;
    }
    for path in &goes {
        remove(path)?;
    }
    for dir in own_dirs(&desk) {
        // Only if nothing is left in it: what somebody else put there stays.
        let _ = std::fs::remove_dir(dir);
    }
    p.line("Done.");
    p.object(fields.put("removed", true).done());
    Ok(Exit::Done)
}

/// What koboshi wrote and what goes now, as far as it is there.
fn goes(desk: &Desk, purge: bool) -> Vec<PathBuf> {
    let places = &desk.places;
    let mut all = vec![places.config_file.clone(), places.reserve()];
    all.extend(run_files(&places.run_dir));
    if purge {
        all.extend([
            places.key_file.clone(),
            places.store(),
            places.journal(),
            places.incidents(),
            places.quarantine(),
            places.outbox(),
            places.node(),
            places.baseline(),
            places.will(),
            places.contacts(),
            places.scrub(),
            places.copies(),
            places.reading(),
            places.known_programs(),
            places.donate_key(),
        ]);
        // What `fleet enroll` wrote; other drop-ins are their owner's.
        let drop_ins = places.config_file.with_file_name("koboshi.d");
        let peer = |name: &str| name.starts_with("peer-") && name.ends_with(".toml");
        all.extend(names(&drop_ins).filter(|n| peer(n)).map(|n| drop_ins.join(n)));
        let own = |name: &str| {
            let made = [
                "journal.",
                "gateway.log",
                "alerts",
                "key-exported",
                "agent.log",
                "proof.json",
                "exchanged.json",
                "service.json",
                "moved.json",
                "tools",
                "nodes",
                "home.json",
            ];
            made.iter().any(|p| name.starts_with(p))
        };
        all.extend(names(&places.state_dir).filter(|n| own(n)).map(|n| places.state_dir.join(n)));
    }
    all.retain(|path| path.symlink_metadata().is_ok());
    all.dedup();
    all
}

/// The run directory's own entries, by name.
fn run_files(dir: &Path) -> Vec<PathBuf> {
    let own = |name: &str| {
        let known = [
            "agent.lock",
            "status.json",
            "looking",
            "status.new",
            "steps",
            "orders",
            "journal",
            "outbox",
            "recover.log",
            "enroll.known_hosts",
        ];
        known.contains(&name) || name.starts_with("containers-") || name.starts_with("donate-")
    };
    names(dir).filter(|n| own(n)).map(|n| dir.join(n)).collect()
}

fn names(dir: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned())
}

/// Directories that go if they are empty, the innermost first.
fn own_dirs(desk: &Desk) -> Vec<PathBuf> {
    let places = &desk.places;
    let drop_ins = places.config_file.with_file_name("koboshi.d");
    [
        Some(places.run_dir.as_path()),
        places.key_file.parent(),
        Some(&drop_ins),
        Some(&places.state_dir),
        places.config_file.parent(),
    ]
    .into_iter()
    .flatten()
    .map(Path::to_owned)
    .filter(|dir| names(dir).next().is_none() || dir.file_name().is_some_and(|n| n == "koboshi"))
    .collect()
}

fn remove(path: &Path) -> Result<()> {
    let what = || format!("remove {}", path.display());
    // What an agent that just ended took along itself is gone as well.
    let gone = match path.symlink_metadata() {
        Ok(meta) if meta.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(e) => Err(e),
    };
    match gone {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.context(what),
    }
}

/// Ends an agent that runs outside of our unit (by cron, by hand). The gateway is none of its children's concern.
fn end_agent(id: ProcessId) -> Result<()> {
    let what = || format!("end the agent (process {})", id.pid);
    if !id.alive() {
        return Ok(());
    }
    if id.pid == 1 {
        return Err(Error::new(
            Kind::Usage,
            what(),
            "it is this container's first process: ending it stops the gateway",
        )
        .hint("take koboshi out of the image's ENTRYPOINT instead"));
    }
    let fd = id.open()?;
    fd.signal(rustix::process::Signal::TERM)?;
    if fd.wait(Deadline::after(AGENT_ENDS)) {
        return Ok(());
    }
    Err(Error::new(Kind::TimedOut, what(), "it has not ended")
        .hint("koboshi status shows what it is doing; try again"))
}
