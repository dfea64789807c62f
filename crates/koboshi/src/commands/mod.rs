//! What the commands do: one file each, thin over the rooms that know how.
//!
//! Guarantees of every command: what it only reads it leaves as it is, down to the directories; with `--json` there is
//! exactly one object, also on failure; the exit code says what the last line says.

mod accept;
mod alerts;
mod check;
mod desk;
mod doctor;
mod gateway;
mod generated;
mod incidents;
mod install;
mod judging;
mod key;
mod pausing;
mod readiness;
mod recover;
mod snapshots;
mod status;
mod uninstall;
mod unit;

use crate::cli::{AlertCommand, Cli, Command, KeyCommand};
use crate::config::{self, Config};
use crate::places::Places;
use crate::print::{Exit, Printer};
use desk::Desk;
use host::{Error, Kind, Result};

/// The configuration and the places that belong to this command line.
pub fn open(cli: &Cli) -> Result<(Config, Places)> {
    let file = Places::config_file(cli.config.as_deref())?;
    let config = config::load(&file)?;
    let places = Places::new(file, &config)?;
    Ok((config, places))
}

/// Does what was asked for.
pub fn run(cli: &Cli, printer: Printer) -> Result<Exit> {
    let desk = || open(cli).map(|(config, places)| Desk { config, places, printer });
    match &cli.command {
        Command::Install(options) => install::run(cli, options, printer),
        Command::Uninstall(options) => uninstall::run(cli, options, printer),
        Command::Status => status::run(&desk()?),
        Command::Check => check::run(&desk()?),
        Command::Doctor => doctor::run(&desk()?),
        Command::Recover(options) => recover::run(&desk()?, options),
        Command::Snapshot(what) => snapshots::run(&desk()?, what),
        Command::Incidents(what) => incidents::run(&desk()?, what),
        Command::Pause(options) => pausing::pause(&desk()?, options),
        Command::Resume => pausing::resume(&desk()?),
        Command::Accept => accept::run(&desk()?),
        Command::Node(what) => gateway::run(&desk()?, what),
        Command::Alert(AlertCommand::Test) => alerts::test(&desk()?),
        Command::Key(KeyCommand::Export) => key::export(&desk()?),
        Command::Completions { shell } => generated::completions(*shell, printer),
        Command::Man { dir } => generated::man(dir, printer),
        Command::Guard(_) | Command::Demo(_) | Command::Step { .. } | Command::Respond(_) => {
            Err(Error::new(Kind::Usage, "do this", "it is no command of this kind"))
        }
    }
}
