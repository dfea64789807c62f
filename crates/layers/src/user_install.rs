//! Layer 3: the same as layer 2 without any privilege, in a prefix of the node's own user.
//!
//! Needs what layer 2 needs, but neither sudo nor a writable prefix: `~/.local/share/koboshi/prefix` is the user's. The
//! service is pointed at it by a drop-in, so the owner's unit stays as it is and one removed file undoes it. It is for
//! user units and embedded gateways: a second gateway beside a system unit would be worse than none. Its own acceptance
//! beyond layer 2's: it comes up again after a logout and a reboot (linger), and `openclaw` in a login shell runs the
//! program that serves.

use crate::install::{self, Order};
use crate::{Bench, Report};
use host::clock::Deadline;
use host::run::{Cmd, Ids, run};
use host::user::as_user;
use host::{Context, Result, files};
use node::{Node, Scope};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where logind notes who lingers.
const LINGER: &str = "/var/lib/systemd/linger";
/// Asking logind takes milliseconds; a bus that hangs is not waited for.
const LINGER_LIMIT: Duration = Duration::from_secs(5);
/// The first lines of our own command.
const MARK: &str =
    "#!/bin/sh\n# Made by koboshi: runs the program that serves, with the Node it serves with.\n";
const COMMAND_LIMIT_BYTES: u64 = 16 << 10;

/// The work of layer 3.
///
/// # Errors
/// The reason why nothing was put in place.
pub fn work(bench: &mut Bench<'_>, order: &Order, hung: bool) -> Result<Report> {
    let target = install::away(bench.node);
    let mut report = install::work(bench, &target, order, hung)?;
    let away = install::Moved::load(&order.state_dir)?.map_or(target, |moved| moved.away);
    as_user(away.ids, || command(&away, &mut report))?;
    lingers(&away, bench.deadline, &mut report);
    Ok(report)
}

fn command_file(node: &Node) -> PathBuf {
    node.home.join(".local/bin/openclaw")
}

fn is_ours(file: &Path) -> bool {
    files::read_bounded(file, COMMAND_LIMIT_BYTES).is_ok_and(|bytes| bytes.starts_with(MARK.as_bytes()))
}

/// `openclaw` for a login shell, whose PATH begins with this directory. What the user put there stays.
fn command(node: &Node, report: &mut Report) -> Result<()> {
    let file = command_file(node);
    if file.symlink_metadata().is_ok() && !is_ours(&file) && file.exists() {
        report
            .could_not(format!("{} is the user's own and stays: it may run another program", file.display()));
        return Ok(());
    }
    let dir = file.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(dir).context(|| format!("make {}", dir.display()))?;
    // A link that leads nowhere is in the way.
    let _ = std::fs::remove_file(&file);
    let program = node.package_dir.join("openclaw.mjs");
    let text = format!("{MARK}exec {} {} \"$@\"\n", shell(&node.node_bin), shell(&program));
    files::write_atomic(&file, text.as_bytes(), 0o755)?;
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755))
        .context(|| format!("open {}", file.display()))
}

/// The command of a node at home: one that has its own Node needs it, because the `openclaw` of its prefix asks for the
/// system's; another has no use for it.
pub(crate) fn command_for(node: &Node, report: &mut Report) -> Result<()> {
    let own = node.runtime_dir.as_ref().is_some_and(|dir| node.node_bin.starts_with(dir));
    if own { as_user(node.ids, || command(node, report)) } else { forget_command(node) }
}

/// Takes the command away again when the node is home.
///
/// # Errors
/// When it cannot be removed.
pub fn forget_command(node: &Node) -> Result<()> {
    let file = command_file(node);
    as_user(node.ids, || {
        if is_ours(&file) {
            std::fs::remove_file(&file).context(|| format!("remove {}", file.display()))?;
        }
        Ok(())
    })
}

fn shell(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}

/// A user's service outlives logout and reboot only if the user lingers. A user may ask for that alone.
fn lingers(node: &Node, deadline: Deadline, report: &mut Report) {
    if node.unit.as_ref().is_none_or(|u| u.scope != Scope::User)
        || Path::new(LINGER).join(&node.user).exists()
    {
        return;
    }
    let cmd = Cmd {
        ids: (node.ids != Ids::current()).then_some(node.ids),
        ..Cmd::new("loginctl", ["enable-linger", node.user.as_str()])
    };
    let asked = run(&cmd, deadline.min(Deadline::after(LINGER_LIMIT)));
    if asked.is_ok_and(|out| out.ok()) && Path::new(LINGER).join(&node.user).exists() {
        report.did(format!("{} lingers now: the service outlives logout and reboot", node.user));
    } else {
        report.could_not(format!(
            "{} does not linger, so the service ends with the last session: sudo loginctl enable-linger {}",
            node.user, node.user
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(dir: &Path) -> Node {
        serde_json::from_value(serde_json::json!({
            "name": "t", "prefix": dir, "package_dir": dir.join("it's"), "entry": dir, "node_bin": "/bin/echo",
            "home": dir, "state_dir": dir, "config_path": dir, "port": 1, "ids": Ids::current(), "user": "t"
        }))
        .unwrap()
    }

    #[test]
    fn at_home_there_is_a_command_only_where_the_node_has_its_own_runtime() {
        let dir = tempfile::tempdir().unwrap();
        let mut report = Report::default();
        let there = |node: &Node| command_file(node).exists();
        let plain = node(dir.path());
        let own = Node { runtime_dir: Some("/bin".into()), ..plain.clone() };
        let elsewhere = Node { runtime_dir: Some(dir.path().join("koboshi-node")), ..plain.clone() };
        for (node, wanted) in [(&own, true), (&elsewhere, false), (&own, true), (&plain, false)] {
            command_for(node, &mut report).unwrap();
            assert_eq!(there(node), wanted, "{:?}", node.runtime_dir);
        }
    }

    #[test]
    fn the_command_runs_the_program_that_serves_and_goes_again() {
        let dir = tempfile::tempdir().unwrap();
        let node = node(dir.path());
        let file = command_file(&node);
        let mut report = Report::default();
        command(&node, &mut report).unwrap();
        let out = run(&Cmd::new(&file, ["a b"]), Deadline::after(LINGER_LIMIT)).unwrap();
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        assert_eq!(said, format!("{} a b\n", dir.path().join("it's/openclaw.mjs").display()));
        command(&node, &mut report).unwrap();
        forget_command(&node).unwrap();
        assert!(!file.exists());
        std::fs::write(&file, "the user's own").unwrap();
        command(&node, &mut report).unwrap();
        forget_command(&node).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "the user's own");
        assert_eq!(report.undone.len(), 1);
    }
}
