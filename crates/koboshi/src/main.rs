//! koboshi keeps an OpenClaw node standing. This is the thin end that speaks with people.
#![allow(unreachable_pub, reason = "a program has no outside: pub marks what its other modules use")]

mod agent;
mod cli;
mod commands;
mod config;
mod control;
mod demo;
mod patient;
mod places;
mod print;
mod reinstall;
mod room;
mod sources;
mod space;
mod spare;
mod step;
mod sudo;
mod voice;

use clap::Parser;
use host::{Error, Kind, Result};
use print::{Exit, Printer};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    let printer = Printer::new(cli.json);
    let exit = run(&cli, printer).unwrap_or_else(|e| {
        printer.error(&e);
        match e.kind {
            Kind::Usage => Exit::Usage,
            Kind::NotFound | Kind::TimedOut | Kind::Corrupt | Kind::NoSpace | Kind::Denied | Kind::System => {
                Exit::Failed
            }
        }
    });
    ExitCode::from(exit.code())
}

/// A command line that is not understood; under `--json` that too is one object.
fn usage(e: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind::{DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion};
    let help = matches!(e.kind(), DisplayHelp | DisplayVersion);
    if !help && std::env::args().any(|a| a == "--json") {
        let why = e.to_string();
        let first = if e.kind() == DisplayHelpOnMissingArgumentOrSubcommand {
            // What clap says here is the whole help.
            "a subcommand is missing".to_owned()
        } else {
            why.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
        };
        Printer::new(true)
            .error(&Error::new(Kind::Usage, "read the command line", first).hint("koboshi --help"));
        return ExitCode::from(Exit::Usage.code());
    }
    let _ = e.print();
    ExitCode::from(if help && e.exit_code() == 0 { 0 } else { Exit::Usage.code() })
}

fn run(cli: &cli::Cli, printer: Printer) -> Result<Exit> {
    match &cli.command {
        cli::Command::Demo(options) => demo::run(options, printer),
        cli::Command::Respond(options) => voice::respond(options, printer),
        cli::Command::Step { request, node } => {
            let report = match (request.to_str().and_then(sudo::Errand::named), node) {
                (Some(errand), Some(name)) => sudo::as_root(errand, name)?,
                (_, Some(_)) => return Err(Error::new(Kind::Usage, "run a step", "it takes no node")),
                (_, None) => return step::run(request).map(|()| Exit::Done),
            };
            for line in report.done.iter().chain(&report.undone) {
                printer.line(line);
            }
            Ok(Exit::Done)
        }
        cli::Command::Reach { target } => commands::fleet::reach(target),
        cli::Command::Donate { node } => commands::donate::run(cli, node.as_deref()),
        cli::Command::Guard(options) => {
            let (config, places) = commands::open(cli)?;
            agent::run(config, places, options, printer)
        }
        cli::Command::Install(_)
        | cli::Command::Uninstall(_)
        | cli::Command::Status
        | cli::Command::Check
        | cli::Command::Doctor
        | cli::Command::Recover(_)
        | cli::Command::Snapshot { .. }
        | cli::Command::Incidents { .. }
        | cli::Command::Pause(_)
        | cli::Command::Resume
        | cli::Command::Accept
        | cli::Command::Node(_)
        | cli::Command::Alert(_)
        | cli::Command::Key(_)
        | cli::Command::Fleet { .. }
        | cli::Command::Kept
        | cli::Command::Completions { .. }
        | cli::Command::Man { .. } => commands::run(cli, printer),
    }
}
