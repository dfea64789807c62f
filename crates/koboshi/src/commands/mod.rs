//! What the commands do: one file each, thin over the rooms that know how.
//!
//! Guarantees of every command: what it only reads it leaves as it is, down to the directories; with `--json` there is
//! exactly one object, also on failure; the exit code says what the last line says.

mod accept;
mod alerts;
mod check;
mod desk;
mod doctor;
pub mod donate;
pub mod fleet;
mod gateway;
mod generated;
mod incidents;
mod install;
mod judging;
mod kept;
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

/// The configuration and the places that belong to this command line. A file that was named must be there: a misspelt
/// name that is silently an empty configuration acts on another koboshi's state. Only `koboshi install` writes a new one.
/// The default file may be absent, also when it is named (koboshi's own unit does so): an agent whose configuration was
/// lost goes on guarding a standard node.
pub fn open(cli: &Cli) -> Result<(Config, Places)> {
    let file = Places::config_file(cli.config.as_deref())?;
    let named = cli.config.is_some() && Places::config_file(None).ok().as_ref() != Some(&file);
    if named && !config::there(&file)? {
        return Err(Error::new(
            Kind::Usage,
            format!("read the configuration {}", file.display()),
            "there is no such file",
        )
        .hint("correct --config (or KOBOSHI_CONFIG); koboshi install writes a new file there"));
    }
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
        Command::Snapshot { what } => snapshots::run(&desk()?, what.as_ref()),
        Command::Incidents { what } => incidents::run(&desk()?, what.as_ref()),
        Command::Pause(options) => pausing::pause(&desk()?, options),
        Command::Resume => pausing::resume(&desk()?),
        Command::Accept => accept::run(&desk()?),
        Command::Node(what) => gateway::run(&desk()?, what),
        Command::Alert(AlertCommand::Test) => alerts::test(&desk()?),
        Command::Key(KeyCommand::Export) => key::export(&desk()?),
        Command::Fleet { what } => fleet::run(&desk()?, what.as_ref()),
        Command::Kept => kept::tell(&desk()?),
        Command::Completions { shell } => generated::completions(*shell, printer),
        Command::Man { dir } => generated::man(dir, printer),
        Command::Guard(_)
        | Command::Demo(_)
        | Command::Step { .. }
        | Command::Respond(_)
        | Command::Donate { .. }
        | Command::Reach { .. } => Err(Error::new(Kind::Usage, "do this", "it is no command of this kind")),
    }
}
