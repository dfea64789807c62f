//! Looks over the agent's shoulder: its published status, its archived incidents, its log.

use crate::agent::book::{self, Archived};
use crate::agent::status::Status;
use crate::places::Places;
use crate::print::Printer;
use host::Result;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// One read of new log lines.
const MAX_READ_BYTES: u64 = 64 << 10;

/// Reads what the agent writes.
#[derive(Debug)]
pub struct Watcher {
    places: Places,
    printer: Printer,
}

impl Watcher {
    /// For the agent of this configuration.
    pub fn new(config_file: &Path, printer: Printer) -> Result<Watcher> {
        let config = crate::config::load(config_file)?;
        Ok(Watcher { places: Places::new(config_file.to_owned(), &config)?, printer })
    }

    /// What the agent published last.
    pub fn status(&self) -> Option<Status> {
        Status::load(&self.places).ok().filter(Status::alive)
    }

    /// The number of the last closed incident.
    pub fn last_incident(&self) -> u64 {
        book::archived_ids(&self.places).unwrap_or_default().into_iter().max().unwrap_or(0)
    }

    /// The first incident closed after number `seen`.
    pub fn closed_after(&self, seen: u64) -> Result<Option<Archived>> {
        match book::archived_ids(&self.places)?.into_iter().filter(|id| *id > seen).min() {
            Some(id) => book::archived(&self.places, id).map(Some),
            None => Ok(None),
        }
    }

    /// Follows the agent's log from its end.
    pub fn tail(&self, path: &Path) -> Tail {
        let at = std::fs::metadata(path).map_or(0, |m| m.len());
        Tail { path: path.to_owned(), at, printer: self.printer }
    }
}

/// The agent's log, line by line.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    at: u64,
    printer: Printer,
}

impl Tail {
    /// Shows the lines that are new and whole.
    pub fn show(&mut self) {
        let Ok(mut file) = std::fs::File::open(&self.path) else {
            return;
        };
        let mut text = String::new();
        if file.seek(SeekFrom::Start(self.at)).is_err()
            || file.take(MAX_READ_BYTES).read_to_string(&mut text).is_err()
        {
            return;
        }
        let Some(end) = text.rfind('\n') else {
            return;
        };
        self.at += end as u64 + 1;
        for line in text[..end].lines() {
            // The date says nothing here: the demo is watched live.
            let line = line.split_once(' ').map_or(line, |(_, rest)| rest);
            self.printer.note(format!("  | {line}"));
        }
    }
}
