//! koboshi's own service under systemd: its unit file, and the few words spoken with `systemctl` about it.
//!
//! The unit that is installed is the one of `dist/` with its own program and configuration filled in. A unit file
//! without koboshi's first line is somebody else's and is never touched.

use super::desk::Desk;
use crate::places::Places;
use host::clock::Deadline;
use host::run::{Cmd, Ids, run};
use host::{Error, Kind, Result, files};
use node::Scope;
use std::path::{Path, PathBuf};
use std::time::Duration;

const SYSTEM: &str = include_str!("../../../../dist/usr/lib/systemd/system/koboshi.service");
const USER: &str = include_str!("../../../../dist/usr/lib/systemd/user/koboshi.service");
/// How a unit file of ours begins.
const MARK: &str = "# Written by `koboshi install`";
/// A unit file is a page of text.
const MAX_BYTES: u64 = 64 << 10;
/// Unit files looked at in one directory.
const MAX_UNITS: usize = 64;
/// One call of systemctl: reloading a large machine's units takes seconds, stopping us up to 30 s.
const CALL_LIMIT: Duration = Duration::from_secs(45);

/// Our unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OwnUnit {
    pub(super) scope: Scope,
    pub(super) name: String,
    pub(super) file: PathBuf,
}

/// Where and under which name our unit belongs.
pub(super) fn own(scope: Scope, places: &Places, node_name: &str) -> Result<OwnUnit> {
    let default = places.config_file.parent().and_then(Path::file_name).is_some_and(|n| n == "koboshi")
        && places.config_file.file_name().is_some_and(|n| n == "koboshi.toml");
    // A second koboshi on one host has a configuration of its own name, and so a unit of its own.
    let name = if default { "koboshi.service".to_owned() } else { format!("koboshi-{node_name}.service") };
    let file = dir(scope)?.join(&name);
    Ok(OwnUnit { scope, name, file })
}

fn dir(scope: Scope) -> Result<PathBuf> {
    match scope {
        Scope::System => Ok(PathBuf::from("/etc/systemd/system")),
        Scope::User => Ok(crate::places::user_dir("XDG_CONFIG_HOME", ".config")?.join("systemd/user")),
    }
}

/// The unit that runs this configuration, if `koboshi install` wrote one.
pub(super) fn installed(desk: &Desk) -> Option<OwnUnit> {
    let config = quoted(&desk.places.config_file);
    for scope in [Scope::System, Scope::User] {
        let Ok(dir) = dir(scope) else { continue };
        let entries = std::fs::read_dir(&dir).into_iter().flatten().flatten();
        for entry in entries.filter(|e| ours_by_name(&e.file_name().to_string_lossy())).take(MAX_UNITS) {
            let file = entry.path();
            if read(&file).is_some_and(|text| text.starts_with(MARK) && text.contains(&config)) {
                return Some(OwnUnit { scope, name: entry.file_name().to_string_lossy().into_owned(), file });
            }
        }
    }
    None
}

fn ours_by_name(name: &str) -> bool {
    name.starts_with("koboshi") && name.ends_with(".service")
}

fn read(file: &Path) -> Option<String> {
    String::from_utf8(files::read_bounded(file, MAX_BYTES).ok()?).ok()
}

/// The unit file's text.
pub(super) fn text(scope: Scope, exe: &Path, config_file: &Path) -> String {
    let template = match scope {
        Scope::System => SYSTEM,
        Scope::User => USER,
    };
    let start = format!("ExecStart={} --config {} guard", quoted(exe), quoted(config_file));
    let lines: Vec<&str> =
        template.lines().map(|l| if l.starts_with("ExecStart=") { start.as_str() } else { l }).collect();
    lines.join("\n") + "\n"
}

/// A path as systemd reads it back in a command line.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    if escaped == text && !text.contains([' ', '\t', '\'', ';']) { text } else { format!("\"{escaped}\"") }
}

/// Whether the file is there with exactly this text, is missing, or is somebody else's.
pub(super) fn differs(unit: &OwnUnit, text: &str) -> Result<bool> {
    match read(&unit.file) {
        Some(there) if there == text => Ok(false),
        Some(there) if !there.starts_with(MARK) => Err(Error::new(
            Kind::Denied,
            format!("write the unit {}", unit.file.display()),
            "a file is there that koboshi did not write",
        )
        .hint("move it away, or install with --no-service and keep your own unit")),
        Some(_) | None => Ok(true),
    }
}

/// `systemctl` in the unit's scope.
pub(super) fn systemctl(scope: Scope, args: &[&str]) -> Result<()> {
    let mut cmd = Cmd::new("systemctl", ["--no-pager", "--no-ask-password", "--quiet"]);
    if scope == Scope::User {
        cmd.args.push("--user".into());
        let runtime = format!("/run/user/{}", Ids::current().uid);
        cmd.env.push(("DBUS_SESSION_BUS_ADDRESS".into(), format!("unix:path={runtime}/bus").into()));
        cmd.env.push(("XDG_RUNTIME_DIR".into(), runtime.into()));
    }
    cmd.env.push(("LC_ALL".into(), "C".into()));
    cmd.args.extend(args.iter().map(Into::into));
    spoken("systemctl", args, &cmd)
}

/// Lets this user's services run without a login.
pub(super) fn enable_linger(user: &str) -> Result<()> {
    let args = ["enable-linger", user];
    spoken("loginctl", &args, &Cmd::new("loginctl", args))
}

/// Whether they do already.
pub(super) fn lingers(user: &str) -> bool {
    Path::new("/var/lib/systemd/linger").join(user).exists()
}

fn spoken(tool: &str, args: &[&str], cmd: &Cmd) -> Result<()> {
    let what = || format!("run {tool} {}", args.join(" "));
    let output = run(cmd, Deadline::after(CALL_LIMIT))?;
    if output.ok() {
        return Ok(());
    }
    if output.timed_out {
        return Err(Error::new(Kind::TimedOut, what(), format!("no answer in {} s", CALL_LIMIT.as_secs())));
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let why = if said.is_empty() { format!("it ended with {:?}", output.status) } else { said };
    Err(Error::new(Kind::System, what(), why).hint("run it by hand to see more"))
}

/// The calling user's name, as the accounts file has it.
pub(super) fn user_name() -> Option<String> {
    /// Accounts of a large site.
    const MAX_ACCOUNTS_BYTES: u64 = 4 << 20;
    let text =
        String::from_utf8(files::read_bounded(Path::new("/etc/passwd"), MAX_ACCOUNTS_BYTES).ok()?).ok()?;
    let uid = Ids::current().uid.to_string();
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_is_that_of_dist_with_its_own_command() {
        for (scope, target) in [(Scope::System, "multi-user.target"), (Scope::User, "default.target")] {
            let text = text(scope, Path::new("/opt/k/koboshi"), Path::new("/etc/koboshi/koboshi.toml"));
            assert!(text.starts_with(MARK));
            assert!(
                text.contains("\nExecStart=/opt/k/koboshi --config /etc/koboshi/koboshi.toml guard\n"),
                "{text}"
            );
            assert!(text.contains(&format!("\nWantedBy={target}\n")));
            for line in [
                "Type=notify",
                "Restart=always",
                "KillMode=process",
                "Delegate=yes",
                "StartLimitIntervalSec=0",
            ] {
                assert!(text.lines().any(|l| l == line), "{line} is missing");
            }
            assert_eq!(text.matches("ExecStart=").count(), 1);
        }
    }

    #[test]
    fn paths_with_odd_letters_are_read_back_as_they_are() {
        assert_eq!(quoted(Path::new("/a/b")), "/a/b");
        assert_eq!(quoted(Path::new("/a b")), "\"/a b\"");
        assert_eq!(quoted(Path::new("/50%/$x")), "\"/50%%/$$x\"");
        assert_eq!(quoted(Path::new("/a\"b")), "\"/a\\\"b\"");
    }

    #[test]
    fn a_strangers_unit_is_refused_and_an_equal_one_left() {
        let dir = tempfile::tempdir().unwrap();
        let unit =
            OwnUnit { scope: Scope::System, name: "koboshi.service".into(), file: dir.path().join("k") };
        let mine = text(Scope::System, Path::new("/k"), Path::new("/c"));
        assert!(differs(&unit, &mine).unwrap());
        std::fs::write(&unit.file, &mine).unwrap();
        assert!(!differs(&unit, &mine).unwrap());
        std::fs::write(&unit.file, "[Service]\nExecStart=/bin/true\n").unwrap();
        assert_eq!(differs(&unit, &mine).unwrap_err().kind, Kind::Denied);
    }
}
