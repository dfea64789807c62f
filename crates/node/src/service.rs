//! The files that make a gateway a service: remembered while it is well, written anew when they are gone, and the one
//! drop-in that points the service at another program.
//!
//! A remembered unit is the owner's own, with their environment and drop-ins; only where nothing is remembered one is
//! generated, as OpenClaw itself would. A masked unit is the owner's will and is never written over.

use crate::{Node, Scope, Unit, units};
use host::files::{read_bounded, write_atomic};
use host::{Context, Result};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A unit file has a few KB.
const FILE_LIMIT_BYTES: u64 = 256 << 10;
/// Our drop-in: after the owner's own, which are commonly named without a number or below 90.
const DROP_IN: &str = "95-koboshi-program.conf";

/// One file of the service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    /// Where it lies.
    pub path: PathBuf,
    /// What it says.
    pub text: String,
    /// Its mode.
    pub mode: u32,
}

/// The service's files as they are now. An environment file inside the state directory holds secrets and is the user's.
#[must_use]
pub fn remember(node: &Node) -> Vec<Remembered> {
    let files = node.unit.iter().flat_map(|u| &u.files);
    files
        .filter(|file| !file.starts_with(&node.state_dir) && !file.ends_with(DROP_IN))
        .filter_map(|file| {
            let meta = file.symlink_metadata().ok().filter(std::fs::Metadata::is_file)?;
            let text = String::from_utf8(read_bounded(file, FILE_LIMIT_BYTES).ok()?).ok()?;
            (!text.trim().is_empty()).then(|| Remembered {
                path: file.clone(),
                text,
                mode: meta.mode() & 0o777,
            })
        })
        .collect()
}

/// Where the unit lies or would lie.
fn unit_file(node: &Node, unit: &Unit) -> PathBuf {
    unit.files.first().cloned().unwrap_or_else(|| match unit.scope {
        Scope::User => node.home.join(".config/systemd/user").join(&unit.name),
        Scope::System => Path::new("/etc/systemd/system").join(&unit.name),
    })
}

/// Puts the service's files back where they are missing, empty or start nothing, and enables the unit. One line for each
/// thing done. To be called with the rights of whoever owns the unit's directory, and no more.
///
/// # Errors
/// When a file cannot be written.
pub fn restore(node: &Node, remembered: &[Remembered]) -> Result<Vec<String>> {
    let mut done = Vec::new();
    let Some(unit) = &node.unit else { return Ok(done) };
    let main = unit_file(node, unit);
    if std::fs::read_link(&main).is_ok_and(|to| to == Path::new("/dev/null")) {
        return Ok(done);
    }
    for one in remembered.iter().filter(|r| r.path != main) {
        let gone = one.path.symlink_metadata().map_or(true, |m| m.is_file() && m.len() == 0);
        if gone {
            put(&one.path, &one.text, one.mode)?;
            done.push(format!("{} is back as it was", one.path.display()));
        }
    }
    let starts = units::read(&main, &[], unit.scope, &node.home).is_some_and(|s| !s.exec.is_empty());
    if !starts {
        match remembered.iter().find(|r| r.path == main) {
            Some(one) => {
                put(&main, &one.text, one.mode)?;
                done.push(format!("the unit {} is back as it was", main.display()));
            }
            None => {
                put(&main, &text(node, unit), 0o644)?;
                done.push(format!("the unit {} is made anew", main.display()));
            }
        }
    }
    if enable(unit, &main)? {
        done.push(format!("{} starts with the machine again", unit.name));
    }
    Ok(done)
}

/// The unit's file and everything in its drop-in directory, as they are now.
#[must_use]
pub fn start_files(node: &Node) -> Vec<PathBuf> {
    /// A unit has few drop-ins.
    const MOST: usize = 64;
    let Some(unit) = &node.unit else { return Vec::new() };
    let mut files = vec![unit_file(node, unit)];
    let dir = drop_in(node).and_then(|file| file.parent().map(Path::to_owned));
    let entries = dir.and_then(|dir| std::fs::read_dir(dir).ok()).into_iter().flatten().flatten();
    files.extend(entries.take(MOST).map(|e| e.path()));
    files.sort();
    files
}

/// Whether the unit's own file is gone, and with it what made it start.
#[must_use]
pub fn unit_is_gone(node: &Node) -> bool {
    node.unit.as_ref().is_some_and(|unit| unit_file(node, unit).symlink_metadata().is_err())
}

/// Enables the unit whose file was gone and is back, with the rights of whoever it belongs to: what took the file took the
/// link by which it starts with the machine. Whether it was missing.
///
/// # Errors
/// When the link cannot be made.
pub fn enable_again(node: &Node) -> Result<bool> {
    let Some(unit) = &node.unit else { return Ok(false) };
    let ids = match unit.scope {
        Scope::User => node.ids,
        Scope::System => host::run::Ids::current(),
    };
    host::user::as_user(ids, || enable(unit, &unit_file(node, unit)))
}

fn put(path: &Path, text: &str, mode: u32) -> Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).context(|| format!("make {}", dir.display()))?;
    }
    write_atomic(path, text.as_bytes(), mode)
}

/// Where the machine's owner says which units start with it.
fn admins(unit: &Unit) -> &'static Path {
    Path::new(match unit.scope {
        Scope::User => "/etc/systemd/user",
        Scope::System => "/etc/systemd/system",
    })
}

/// Whether it starts with the machine or its user: wanted by whatever its owner chose, any link of its name will do.
fn is_wanted(unit: &Unit, main: &Path) -> bool {
    let dirs = main.parent().into_iter().chain([admins(unit)]);
    dirs.flat_map(|dir| std::fs::read_dir(dir).into_iter().flatten().flatten().take(4_096))
        .filter(|e| e.file_name().to_string_lossy().ends_with(".wants"))
        .any(|e| e.path().join(&unit.name).symlink_metadata().is_ok())
}

/// Whether the node's unit starts by itself, as far as its links say; nothing where there is no unit's file.
#[must_use]
pub fn starts_by_itself(node: &Node) -> Option<bool> {
    let unit = node.unit.as_ref()?;
    let main = unit_file(node, unit);
    main.symlink_metadata().ok().map(|_| is_wanted(unit, &main))
}

/// The link by which systemd starts it, where it is missing. Whether one was made.
fn enable(unit: &Unit, main: &Path) -> Result<bool> {
    let Some(dir) = main.parent() else { return Ok(false) };
    let target = match unit.scope {
        Scope::User => "default.target.wants",
        Scope::System => "multi-user.target.wants",
    };
    if is_wanted(unit, main) {
        return Ok(false);
    }
    let vendors = ["/usr", "/lib"].iter().any(|top| dir.starts_with(top));
    // A vendor's directory is not the place of a choice, and `systemctl disable` does not look there.
    let dir = if vendors { admins(unit) } else { dir };
    let wants = dir.join(target);
    let what = || format!("enable {}", unit.name);
    std::fs::create_dir_all(&wants).context(what)?;
    std::os::unix::fs::symlink(main, wants.join(&unit.name)).context(what)?;
    Ok(true)
}

/// A unit as OpenClaw itself writes it.
#[must_use]
pub fn text(node: &Node, unit: &Unit) -> String {
    let mut text = String::from(
        "# Made by koboshi, because the unit was gone and none was remembered.\n[Unit]\nDescription=OpenClaw Gateway\n\
         After=network-online.target\nWants=network-online.target\n\n[Service]\n",
    );
    text.push_str(&exec(node));
    if unit.scope == Scope::System {
        let _ = writeln!(text, "User={}", node.user);
    }
    for (key, value) in node.command().env {
        let _ = writeln!(text, "Environment={}", quoted(&format!("{key}={value}")));
    }
    text.push_str(
        "Restart=always\nRestartSec=5\nRestartPreventExitStatus=78\nSuccessExitStatus=0 143\nTimeoutStopSec=330\n\
         KillMode=mixed\n\n[Install]\nWantedBy=",
    );
    text.push_str(match unit.scope {
        Scope::User => "default.target\n",
        Scope::System => "multi-user.target\n",
    });
    text
}

fn exec(node: &Node) -> String {
    let command = node.command();
    let mut words = vec![quoted(&command.program.display().to_string())];
    words.extend(command.args.iter().map(|a| quoted(a)));
    format!("ExecStart={}\n", words.join(" "))
}

/// One word as systemd reads it.
fn quoted(word: &str) -> String {
    let plain = |c: char| {
        c.is_ascii_alphanumeric() || matches!(c, '/' | '-' | '_' | '.' | '=' | ':' | ',' | '@' | '+')
    };
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    let mut out = String::from("\"");
    for c in word.chars() {
        match c {
            '"' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            // A specifier, and a variable's beginning.
            '%' => out.push_str("%%"),
            '$' => out.push_str("$$"),
            '\n' => out.push_str("\\n"),
            other => out.push(other),
        }
    }
    out.push('"');
    out
}

/// Where our drop-in lies.
#[must_use]
pub fn drop_in(node: &Node) -> Option<PathBuf> {
    let unit = node.unit.as_ref()?;
    let main = unit_file(node, unit);
    Some(main.with_file_name(format!("{}.d", unit.name)).join(DROP_IN))
}

/// Points the service at `node`'s program and runtime, whatever the unit itself says.
///
/// # Errors
/// When it cannot be written.
pub fn point(node: &Node) -> Result<Option<PathBuf>> {
    let Some(file) = drop_in(node) else { return Ok(None) };
    let path =
        node.command().env.into_iter().find(|(key, _)| key == "PATH").map(|(_, v)| v).unwrap_or_default();
    let text = format!(
        "# The program that koboshi installed while the node's own could not be mended; removed when it can.\n\
         [Service]\nExecStart=\n{}Environment={}\n",
        exec(node),
        quoted(&format!("PATH={path}"))
    );
    put(&file, &text, 0o644)?;
    Ok(Some(file))
}

/// Takes that back.
///
/// # Errors
/// When it cannot be removed.
pub fn unpoint(node: &Node) -> Result<()> {
    let Some(file) = drop_in(node) else { return Ok(()) };
    match std::fs::remove_file(&file) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(host::Error::io(format!("remove {}", file.display()), &e))
        }
        Ok(()) | Err(_) => {
            // The directory goes with it if it was only there for this.
            let _ = file.parent().map(std::fs::remove_dir);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::find::tests::node_at;

    fn served(dir: &Path) -> (Node, PathBuf) {
        let file = dir.join(".config/systemd/user/openclaw-gateway.service");
        let unit =
            Unit { name: "openclaw-gateway.service".into(), scope: Scope::User, files: vec![file.clone()] };
        (Node { unit: Some(unit), home: dir.to_owned(), ..node_at(dir) }, file)
    }

    #[test]
    fn a_generated_unit_starts_what_the_node_is() {
        let dir = tempfile::tempdir().unwrap();
        let (mut node, file) = served(dir.path());
        node.entry = dir.path().join("with space/dist/index.js");
        node.env = vec![("A".into(), "50% of \"$HOME\"".into())];
        let done = restore(&node, &[]).unwrap();
        assert_eq!(done.len(), 2, "{done:?}");
        let spec = units::read(&file, &[], Scope::User, dir.path()).unwrap();
        assert_eq!(spec.exec[1], node.entry.display().to_string());
        assert_eq!(spec.exec[2..], ["gateway", "--port", &node.port.to_string()]);
        let link = file.with_file_name("default.target.wants").join("openclaw-gateway.service");
        assert_eq!(std::fs::read_link(link).unwrap(), file);
        assert!(restore(&node, &[]).unwrap().is_empty(), "what is there stays");
    }

    #[test]
    fn a_remembered_unit_comes_back_with_its_drop_ins_and_a_masked_one_stays_masked() {
        let dir = tempfile::tempdir().unwrap();
        let (mut node, file) = served(dir.path());
        let extra = file.with_file_name("openclaw-gateway.service.d").join("user.conf");
        node.unit.as_mut().unwrap().files.push(extra.clone());
        put(&file, "[Service]\nExecStart=/usr/bin/node x gateway\n", 0o644).unwrap();
        put(&extra, "[Service]\nEnvironment=USER_KEY=1\n", 0o600).unwrap();
        let remembered = remember(&node);
        std::fs::write(&file, "").unwrap();
        std::fs::remove_dir_all(extra.parent().unwrap()).unwrap();
        restore(&node, &remembered).unwrap();
        assert!(std::fs::read_to_string(&file).unwrap().contains("/usr/bin/node x gateway"));
        assert!(std::fs::read_to_string(&extra).unwrap().contains("USER_KEY"));
        assert_eq!(extra.metadata().unwrap().mode() & 0o777, 0o600);
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/dev/null", &file).unwrap();
        assert!(restore(&node, &remembered).unwrap().is_empty());
        assert!(file.symlink_metadata().unwrap().is_symlink());
    }

    #[test]
    fn a_drop_in_points_the_service_elsewhere_and_goes_again() {
        let dir = tempfile::tempdir().unwrap();
        let (mut node, file) = served(dir.path());
        put(&file, "[Service]\nExecStart=/old/node /old/index.js gateway --port 1\n", 0o644).unwrap();
        node.entry = "/new/index.js".into();
        let made = point(&node).unwrap().unwrap();
        let dirs = [file.parent().unwrap().to_owned()];
        let spec = units::read(&file, &dirs, Scope::User, dir.path()).unwrap();
        assert_eq!(spec.exec[1], "/new/index.js");
        unpoint(&node).unwrap();
        assert!(!made.parent().unwrap().exists());
        let spec = units::read(&file, &dirs, Scope::User, dir.path()).unwrap();
        assert_eq!(spec.exec[1], "/old/index.js");
        unpoint(&node).unwrap();
    }
}
