//! A script that the demo's gateway loads before its own code, so that its real event loop can be made to spin.
//!
//! Only a node of our own making gets it (through `NODE_OPTIONS` in the demo's environment). It does nothing until
//! the fault file appears, acts only in the gateway process itself, and removes the order before obeying it, so that
//! the next start is not hit again.

use host::{Error, Result, files};
use std::path::Path;

/// The environment variable that names the fault file.
pub const VARIABLE: &str = "KOBOSHI_DEMO_FAULT_FILE";

/// CommonJS, for `node --require`.
pub const SCRIPT: &str = r#"'use strict';
const fs = require('node:fs');
const { isMainThread } = require('node:worker_threads');
const file = process.env.KOBOSHI_DEMO_FAULT_FILE;
if (file && isMainThread && process.argv[2] === 'gateway') {
  setInterval(() => {
    let order;
    try { order = fs.readFileSync(file, 'utf8').trim(); fs.unlinkSync(file); } catch { return; }
    if (order === 'spin') for (;;) {}
    const stall = /^stall ([0-9]+)$/.exec(order);
    if (stall) { const end = Date.now() + Number(stall[1]); while (Date.now() < end) {} }
  }, 200).unref();
}
"#;

/// Writes the script.
pub fn write(path: &Path) -> Result<()> {
    std::fs::write(path, SCRIPT).map_err(|e| Error::io(format!("write {}", path.display()), &e))
}

/// Gives an order: `spin`, or `stall MILLISECONDS`.
pub fn order(fault_file: &Path, what: &str) -> Result<()> {
    files::write_atomic(fault_file, what.as_bytes(), 0o600)
}
