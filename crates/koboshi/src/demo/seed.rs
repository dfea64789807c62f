//! What the demo's user has: written once before the first snapshot, and again just before each fault, so that also the
//! newest byte is missed if it goes.

use crate::demo::setup::{self, Stage};
use host::container::Containers;
use host::{Context, Result, files};
use node::Node;
use std::ffi::OsString;
use std::time::Duration;

/// A command of OpenClaw's own takes 3 to 10 s on a busy machine.
const COMMAND_LIMIT: Duration = Duration::from_secs(180);

/// Files, while nothing runs.
pub fn files(node: &Node) -> Result<()> {
    put(node, "workspace/notes.md", b"# Notes\nThe demo's user wrote this before the first snapshot.\n")?;
    put(node, "credentials/whatsapp/default/creds.json", b"{\"noiseKey\":\"not a real one, but a user's\"}\n")
}

/// Rows, which only a running gateway may write.
pub fn rows(stage: &Stage, node: &Node, tag: &str, containers: &Containers) -> Result<()> {
    add_cron_job(stage, node, &format!("koboshi-seed-{tag}"), containers)
}

/// The newest of everything, just before a fault.
pub fn at_injection(stage: &Stage, node: &Node, tag: &str, containers: &Containers) -> Result<()> {
    put(node, &format!("workspace/{tag}.md"), format!("written just before {tag}\n").as_bytes())?;
    rows(stage, node, tag, containers)
}

fn put(node: &Node, path: &str, text: &[u8]) -> Result<()> {
    let path = node.state_dir.join(path);
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).context(|| format!("make {}", dir.display()))?;
    }
    files::write_atomic(&path, text, 0o600)
}

/// Adds one cron job through the running gateway: a database row that a user would miss.
fn add_cron_job(stage: &Stage, node: &Node, name: &str, containers: &Containers) -> Result<()> {
    let words = [
        "cron",
        "add",
        "--name",
        name,
        "--cron",
        "0 5 1 1 *",
        "--session",
        "main",
        "--system-event",
        "a row of the demo's user",
        "--disabled",
        "--json",
    ];
    openclaw(stage, node, "cron", &words, containers)
}

fn openclaw(stage: &Stage, node: &Node, name: &str, words: &[&str], containers: &Containers) -> Result<()> {
    let args: Vec<OsString> = std::iter::once(node.package_dir.join("openclaw.mjs").into_os_string())
        .chain(words.iter().map(OsString::from))
        .collect();
    setup::contained(stage, containers, name, args, COMMAND_LIMIT)
}
