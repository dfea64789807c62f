//! `koboshi completions` and `koboshi man`: made from the command line's own definition, so they cannot lag behind it.

use super::desk::Fields;
use crate::cli::Cli;
use crate::print::{Exit, Printer};
use clap::CommandFactory;
use host::{Context, Result};
use std::path::Path;

/// The program's name, as it is typed.
const NAME: &str = "koboshi";

/// Completions for a shell, on standard output.
pub(super) fn completions(shell: clap_complete::Shell, printer: Printer) -> Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), NAME, &mut script);
    if printer.is_json() {
        let script = String::from_utf8_lossy(&script).into_owned();
        printer.object(Fields::default().put("shell", shell.to_string()).put("script", script).done());
    } else {
        printer.raw(&script);
    }
    Ok(Exit::Done)
}

/// Man pages into a directory, one file per command.
pub(super) fn man(dir: &Path, printer: Printer) -> Result<Exit> {
    std::fs::create_dir_all(dir).context(|| format!("make {}", dir.display()))?;
    let mut root = Cli::command().name(NAME).disable_help_subcommand(true);
    root.build();
    let mut files = Vec::new();
    pages(&root, dir, &mut files)?;
    files.sort();
    let first = dir.join("koboshi.1");
    printer.line(format!("{} man pages; read one with: man -l {}", files.len(), first.display()));
    printer.object(Fields::default().put("dir", dir.display().to_string()).put("files", files).done());
    Ok(Exit::Done)
}

fn pages(command: &clap::Command, dir: &Path, files: &mut Vec<String>) -> Result<()> {
    for sub in command.get_subcommands().filter(|s| !s.is_hide_set()) {
        pages(sub, dir, files)?;
    }
    let page = clap_mangen::Man::new(command.clone());
    let mut text = Vec::new();
    let name = page.get_filename();
    page.render(&mut text).context(|| format!("render {name}"))?;
    let file = dir.join(&name);
    std::fs::write(&file, text).context(|| format!("write {}", file.display()))?;
    files.push(name);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFERENCE: &str = include_str!("../../../../docs/cli.md");

    /// Every command and option of the definition, as it is typed.
    fn names(command: &clap::Command, path: &str, all: &mut Vec<String>) {
        for argument in command.get_arguments().filter(|a| !a.is_hide_set()) {
            all.extend(
                argument.get_long().filter(|l| !["help", "version"].contains(l)).map(|l| format!("--{l}")),
            );
        }
        for sub in command.get_subcommands().filter(|s| !s.is_hide_set() && s.get_name() != "help") {
            let path = format!("{path} {}", sub.get_name());
            if sub.get_subcommands().next().is_none() {
                all.push(path.clone());
            }
            names(sub, &path, all);
        }
    }

    #[test]
    fn the_reference_names_every_command_and_option() {
        let mut root = Cli::command();
        root.build();
        let mut all = Vec::new();
        names(&root, NAME, &mut all);
        assert!(
            all.contains(&"koboshi snapshot restore".to_owned()) && all.contains(&"--dry-run".to_owned())
        );
        let named = |n: &String| [format!("{n} "), format!("{n}`")].iter().any(|n| REFERENCE.contains(n));
        let missing: Vec<&String> = all.iter().filter(|n| !named(n)).collect();
        assert!(missing.is_empty(), "docs/cli.md lacks {missing:?}");
    }
}
