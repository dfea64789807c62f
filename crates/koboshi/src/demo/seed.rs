//! What the demo's user has: written once before the first snapshot, and again just before each fault, so that also the
//! newest byte is missed if it goes.

use crate::demo::setup::{self, Stage};
use host::container::Containers;
use host::{Context, Result, files};
use node::Node;
use serde_json::{Value, json};
use std::ffi::OsString;
use std::time::Duration;

/// The gateway's answer; its own default of 10 s is too little on a busy machine.
const CALL_LIMIT_MS: &str = "60000";
/// A command of OpenClaw's own takes 3 to 10 s on a busy machine.
const COMMAND_LIMIT: Duration = Duration::from_secs(180);

/// The session that the demo's user writes into.
const SESSION: &str = "agent:main:diary";

/// Files and settings, before the gateway starts for the first time.
pub fn files(node: &Node) -> Result<()> {
    put(node, "workspace/notes.md", b"# Notes\nThe demo's user wrote this before the first snapshot.\n")?;
    put(node, "credentials/whatsapp/default/creds.json", b"{\"noiseKey\":\"not a real one, but a user's\"}\n")
}

/// What only a running gateway may write: a cron job, a session with a first line, a group of sessions.
pub fn rows(stage: &Stage, node: &Node, containers: &Containers) -> Result<()> {
    add_cron_job(stage, node, "koboshi-seed-before", containers)?;
    let session = json!({ "key": SESSION, "label": "diary" });
    call(stage, node, "sessions.create", &session, containers)?;
    call(stage, node, "sessions.groups.put", &json!({ "names": ["the user's own"] }), containers)?;
    add_line(stage, node, "written before the first snapshot", containers)
}

/// What is put in place while no gateway runs.
pub fn paired_device(node: &Node) -> Result<()> {
    drill::seed::pair_device(node)
}

/// The newest of everything, just before a fault.
pub fn at_injection(stage: &Stage, node: &Node, tag: &str, containers: &Containers) -> Result<()> {
    put(node, &format!("workspace/{tag}.md"), format!("written just before {tag}\n").as_bytes())?;
    add_cron_job(stage, node, &format!("koboshi-seed-{tag}"), containers)?;
    add_line(stage, node, &format!("written just before {tag}"), containers)
}

/// Adds one line to the transcript of the user's session; no model is asked.
fn add_line(stage: &Stage, node: &Node, text: &str, containers: &Containers) -> Result<()> {
    let line = json!({ "sessionKey": SESSION, "message": text });
    call(stage, node, "chat.inject", &line, containers)
}

/// One of the gateway's own methods.
fn call(stage: &Stage, node: &Node, method: &str, params: &Value, containers: &Containers) -> Result<()> {
    let params = params.to_string();
    let words = ["gateway", "call", method, "--params", &params, "--timeout", CALL_LIMIT_MS, "--json"];
    openclaw(stage, node, "call", &words, containers)
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
