//! Reads the repository as a strict colleague would: what lints cannot see. Each rule is one check, and says where
//! it was broken.

use crate::run::Tally;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The house from the top down: a crate depends only on those after it.
const ORDER: [&str; 11] =
    ["koboshi", "drill", "sim", "fleet", "layers", "alert", "node", "store", "reach", "host", "engine"];
/// Rooms that must not know the patient by name.
const BLIND: [&str; 7] = ["engine", "host", "reach", "store", "alert", "fleet", "sim"];
/// Larger files are pictures or recordings, not text that a person wrote.
const TEXT_LIMIT_BYTES: u64 = 1 << 20;

/// A file of the repository.
struct Text {
    /// Relative to the root, with `/`.
    path: String,
    text: String,
}

impl Text {
    fn is_source(&self) -> bool {
        let parts: Vec<&str> = self.path.split('/').collect();
        let room = matches!(parts.as_slice(), ["crates", _, "src", ..] | ["xtask", "src", ..]);
        room && self.path.ends_with(".rs")
    }

    /// The source without its tests and comments, which may name what the code may not. Line numbers stay.
    fn code(&self) -> String {
        if self.path.ends_with("tests.rs") || self.path.contains("/tests/") {
            return String::new();
        }
        let code = self.text.split("#[cfg(test)]").next().unwrap_or("");
        code.lines()
            .map(|l| if l.trim_start().starts_with("//") { "\n".to_owned() } else { format!("{l}\n") })
            .collect()
    }
}

/// Runs every rule: how many hold, how many do not.
pub(crate) fn all(root: &Path, tally: &mut Tally) -> (u64, u64) {
    let files = files(root);
    let rules: [(&str, Vec<String>); 6] = [
        ("no path of this machine", machine_paths(root, &files)),
        ("nothing left to do, nothing ignored", leftovers(&files)),
        ("a crate depends only on those below it", order(root)),
        ("only node, layers and drill know the patient's files", blind(&files)),
        ("a module opens with what it guarantees", headers(&files)),
        ("plain text: no tabs, no trailing blanks, a last newline", plain(&files)),
    ];
    let mut sum = (0, 0);
    for (rule, broken) in rules {
        println!("{} {rule}", if broken.is_empty() { "ok    " } else { "FAILED" });
        for line in &broken {
            println!("         {line}");
        }
        tally.remember(broken.iter().map(|line| format!("tidy: {rule}: {line}")));
        if broken.is_empty() { sum.0 += 1 } else { sum.1 += 1 }
    }
    sum
}

/// What git knows, and what it does not ignore.
fn files(root: &Path) -> Vec<Text> {
    let listed = Command::new("git")
        .current_dir(root)
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .output()
        .map(|o| o.stdout)
        .unwrap_or_default();
    let mut paths: Vec<String> = listed
        .split(|b| *b == 0)
        .filter(|p| !p.is_empty())
        .map(|p| String::from_utf8_lossy(p).into_owned())
        .collect();
    if paths.is_empty() {
        // An unpacked tarball has no git.
        walk(root, root, &mut paths);
    }
    paths
        .into_iter()
        .filter(|p| std::fs::metadata(root.join(p)).is_ok_and(|m| m.is_file() && m.len() <= TEXT_LIMIT_BYTES))
        .filter_map(|path| Some(Text { text: std::fs::read_to_string(root.join(&path)).ok()?, path }))
        .collect()
}

fn walk(root: &Path, dir: &Path, out: &mut Vec<String>) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for path in entries.filter_map(|e| Some(e.ok()?.path())) {
        let name = path.file_name().unwrap_or_default();
        if path.is_symlink() || name == "target" || name == ".git" {
            continue;
        }
        if path.is_dir() {
            walk(root, &path, out);
        } else if let Some(p) = path.strip_prefix(root).ok().and_then(Path::to_str) {
            out.push(p.to_owned());
        }
    }
}

/// Lines that contain one of the words.
fn hits(path: &str, text: &str, words: &[&str]) -> Vec<String> {
    text.lines()
        .enumerate()
        .filter_map(|(n, line)| {
            let word = words.iter().find(|w| line.contains(**w))?;
            Some(format!("{path}:{}: {word}", n + 1))
        })
        .collect()
}

/// Where this repository lies, and the home of whoever works on it, have no place in it.
fn machine_paths(root: &Path, files: &[Text]) -> Vec<String> {
    let mut words = vec![format!("{}/", root.display())];
    // A home by its common names says nothing about a machine.
    let common = ["/root", "/", "/home/user", "/home/openclaw", "/home/node"];
    let home = std::env::var("HOME").unwrap_or_default();
    if home.starts_with('/') && !common.contains(&home.as_str()) {
        words.push(format!("{home}/"));
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    files.iter().flat_map(|f| hits(&f.path, &f.text, &words)).collect()
}

fn leftovers(files: &[Text]) -> Vec<String> {
    // Written in two halves, so that this file holds none of them.
    let words = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X:"),
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
        concat!("#[ign", "ore"),
        concat!("db", "g!("),
    ];
    let rust = files.iter().filter(|f| f.path.ends_with(".rs") || f.path.ends_with(".md"));
    rust.flat_map(|f| hits(&f.path, &f.text, &words)).collect()
}

fn order(root: &Path) -> Vec<String> {
    let mut broken = Vec::new();
    let Ok(crates) = std::fs::read_dir(root.join("crates")) else {
        return vec!["there is no crates/".to_owned()];
    };
    let mut dirs: Vec<PathBuf> = crates.filter_map(|e| Some(e.ok()?.path())).filter(|p| p.is_dir()).collect();
    dirs.sort();
    for dir in dirs {
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(place) = ORDER.iter().position(|c| *c == name) else {
            broken.push(format!("crates/{name}: has no place in the order of the house"));
            continue;
        };
        let manifest = std::fs::read_to_string(dir.join("Cargo.toml")).unwrap_or_default();
        for dependency in dependencies(&manifest) {
            // On itself: its own tests with a feature that only they switch on.
            let above = ORDER.iter().position(|c| *c == dependency).is_some_and(|p| p <= place);
            if above && dependency != name {
                broken.push(format!("crates/{name} depends on {dependency}, which is not below it"));
            }
        }
    }
    broken
}

/// Names in the sections of dependencies, those of tests and builds too.
fn dependencies(manifest: &str) -> Vec<&str> {
    let mut inside = false;
    let mut out = Vec::new();
    for line in manifest.lines() {
        if let Some(section) = line.strip_prefix('[') {
            inside = section.trim_end_matches(']').ends_with("dependencies");
        } else if inside && let Some((name, _)) = line.split_once(['=', '.']) {
            out.push(name.trim());
        }
    }
    out
}

fn blind(files: &[Text]) -> Vec<String> {
    let names =
        ["openclaw.json", "openclaw.sqlite", "openclaw-agent.sqlite", "gateway.state.lock", ".openclaw/"];
    files
        .iter()
        .filter(|f| f.is_source() && BLIND.iter().any(|c| f.path.starts_with(&format!("crates/{c}/"))))
        .flat_map(|f| hits(&f.path, &f.code(), &names))
        .collect()
}

fn headers(files: &[Text]) -> Vec<String> {
    // A sentence, not a word.
    const LEAST_CHARS: usize = 15;
    let short = |f: &&Text| {
        let header: String = f.text.lines().map_while(|l| l.strip_prefix("//!")).collect();
        header.trim().chars().count() < LEAST_CHARS
    };
    // A file of tests is opened by the module it tests.
    files
        .iter()
        .filter(|f| f.is_source() && !f.path.ends_with("tests.rs"))
        .filter(short)
        .map(|f| f.path.clone())
        .collect()
}

fn plain(files: &[Text]) -> Vec<String> {
    let ours = [".rs", ".toml", ".md", ".yml", ".service", ".sh"];
    let mut broken = Vec::new();
    for f in files.iter().filter(|f| ours.iter().any(|e| f.path.ends_with(e)) || f.path == ".ci/run") {
        let blank =
            |l: &str| l.ends_with(' ') || l.ends_with('\t') || l.ends_with('\r') || l.starts_with('\t');
        broken.extend(
            f.text
                .lines()
                .enumerate()
                .filter(|(_, l)| blank(l))
                .map(|(n, _)| format!("{}:{}", f.path, n + 1)),
        );
        if !f.text.is_empty() && !f.text.ends_with('\n') {
            broken.push(format!("{}: no newline at the end", f.path));
        }
    }
    broken
}

/// Whether the README or a page of `docs/` speaks of each command that `--help` lists.
pub(crate) fn commands(root: &Path, help: &str) -> (u64, u64) {
    let listed = listed(help);
    if listed.is_empty() {
        // A binary that knows no command yet is a house under construction.
        println!("the binary lists no commands");
        return (0, 0);
    }
    let docs: String = files(root)
        .into_iter()
        .filter(|f| f.path == "README.md" || (f.path.starts_with("docs/") && f.path.ends_with(".md")))
        .map(|f| f.text)
        .collect();
    let missing: Vec<&String> = listed.iter().filter(|c| !docs.contains(&format!("koboshi {c}"))).collect();
    for command in &missing {
        println!("`koboshi {command}` is documented nowhere in README.md or docs/");
    }
    ((listed.len() - missing.len()) as u64, missing.len() as u64)
}

/// The commands of clap's help: the indented words under `Commands:`.
fn listed(help: &str) -> Vec<String> {
    help.lines()
        .skip_while(|l| !l.starts_with("Commands:"))
        .skip(1)
        .take_while(|l| l.starts_with("  "))
        .filter(|l| l.chars().nth(2).is_some_and(|c| c != ' '))
        .filter_map(|l| l.split_ascii_whitespace().next())
        .filter(|c| *c != "help")
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> Text {
        Text { path: path.to_owned(), text: text.to_owned() }
    }

    #[test]
    fn each_rule_sees_its_breach() {
        let root = Path::new("/somewhere/else");
        let bad =
            [file("docs/a.md", "see /somewhere/else/x\n"), file("crates/host/src/a.rs", "//! x\nfn f() {}")];
        assert_eq!(machine_paths(root, &bad), ["docs/a.md:1: /somewhere/else/"]);
        assert_eq!(headers(&bad), ["crates/host/src/a.rs"]);
        assert_eq!(plain(&bad), ["crates/host/src/a.rs: no newline at the end"]);
        let word = concat!("TO", "DO");
        assert_eq!(leftovers(&[file("a.rs", &format!("// {word} later\n"))]), [format!("a.rs:1: {word}")]);
        let patient = "//! About openclaw.json.\nconst A: &str = \"openclaw.json\";\n#[cfg(test)]\nconst B: &str = \".openclaw/\";\n";
        assert_eq!(
            blind(&[file("crates/store/src/a.rs", patient)]),
            ["crates/store/src/a.rs:2: openclaw.json"]
        );
        assert!(blind(&[file("crates/node/src/a.rs", patient)]).is_empty());
    }

    #[test]
    fn dependencies_are_read_from_every_section() {
        let manifest = "[package]\nname = \"x\"\n[dependencies]\nhost = { workspace = true }\nserde.workspace = true\n\
            [lints]\nworkspace = true\n[dev-dependencies]\ntempfile = \"3\"\n";
        assert_eq!(dependencies(manifest), ["host", "serde", "tempfile"]);
    }

    #[test]
    fn commands_are_read_off_the_help() {
        let help = "Keeps it up\n\nUsage: koboshi\n\nCommands:\n  guard   The agent,\n          in words\n  demo    Shows\n  \
            help    Print\n\nOptions:\n  -h\n";
        assert_eq!(listed(help), ["guard", "demo"]);
    }
}
