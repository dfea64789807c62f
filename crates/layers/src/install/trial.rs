//! The last proof before anything of the node is touched: the right machine code, and an entry point that starts.
//!
//! Everything runs as the builder, in a scratch home and state of its own, on a port of its own, without the node's
//! config, credentials or data, and ends with the trial.

use super::build::{Scratch, environment};
use super::place::Place;
use crate::Report;
use host::clock::Deadline;
use host::run::{Cmd, Ids};
use host::user::as_user;
use host::{Error, Kind, Result, files};
use node::{Node, gates};
use serde_json::Value;
use std::ffi::OsString;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A start to `/healthz` takes 11 to 21 s on an idle machine. One that still works at the end of this has come past
/// everything that a broken tree dies of.
const START_LIMIT: Duration = Duration::from_secs(25);
/// Kept back for stopping, exchanging and ending in time.
const RESERVE: Duration = Duration::from_secs(12);
/// Less than this is no trial.
const START_LEAST: Duration = Duration::from_secs(6);
/// Loading one native module takes 50 ms.
const LOAD_LIMIT: Duration = Duration::from_secs(5);
/// Native modules that are looked at; the real tree has ten.
const NATIVE_LIMIT: usize = 64;
/// Directories walked in search of them; the real tree has 5,000.
const DIRS_LIMIT: usize = 50_000;
/// Of a native module, this much is searched for the C library it wants.
const HEAD_BYTES: u64 = 4 << 20;
const WORDS_CHARS: usize = 300;

/// Starts the program, waits until it answers or ends, ends it.
const HARNESS: &str = r#"
const { spawn } = require("child_process"), http = require("http");
const [entry, port, limit] = process.argv.slice(1);
const child = spawn(process.execPath, [entry, "gateway", "--port", port], { stdio: ["ignore", "pipe", "pipe"], detached: true });
let last = "";
for (const s of [child.stdout, child.stderr]) s.on("data", (d) => { last = (last + d).slice(-2000); });
const end = (word, code) => {
  try { process.kill(-child.pid, "SIGKILL"); } catch {}
  console.log(JSON.stringify({ word, code, last }));
  process.exit(0);
};
child.on("error", (e) => end("ended", String(e)));
child.on("exit", (code, signal) => end("ended", code ?? signal));
setInterval(() => {
  http.get({ host: "127.0.0.1", port, path: "/healthz", timeout: 1000 }, (r) => {
    let body = "";
    r.on("data", (d) => { body += d; });
    r.on("end", () => { try { if (JSON.parse(body).ok === true) end("ready", 0); } catch {} });
  }).on("error", () => {});
}, 250);
setTimeout(() => end("alive", 0), Number(limit));
"#;

/// Tries the staged program.
pub(super) fn run(
    target: &Node,
    place: &Place,
    node: &Path,
    scratch: &Scratch,
    stage: &Path,
    deadline: Deadline,
    report: &mut Report,
) -> Result<()> {
    let trial = Trial { place, node, scratch };
    if !trial.reaches(stage, deadline) {
        // The prefix of root's own node may lie where nobody else can come, and a trial never runs as root.
        report.could_not(format!("no trial: user {} cannot come to {}", place.builder.uid, stage.display()));
        return Ok(());
    }
    let program = stage.to_owned();
    let asked = gates::runtime_version(
        &Node { ids: place.builder, home: "/".into(), ..target.clone() },
        node,
        deadline,
    )
    .map(|version| gates::engine(&program, version));
    match asked {
        Ok(gates::Gate::Open) => {}
        Ok(gates::Gate::Closed(why)) | Err(why) => {
            return Err(Error::new(Kind::System, "try the new program", why));
        }
    }
    trial.natives(&program, deadline, report)?;
    trial.start(&program, deadline, report)
}

struct Trial<'a> {
    place: &'a Place,
    node: &'a Path,
    scratch: &'a Scratch,
}

impl Trial<'_> {
    fn cmd(&self, args: Vec<OsString>, more: Vec<(OsString, OsString)>) -> Cmd {
        let mut env = environment(self.node, self.scratch);
        // The program is not held to npm's heap.
        env.retain(|(key, _)| key != "NODE_OPTIONS");
        env.extend(more);
        Cmd {
            program: self.node.to_owned().into(),
            args,
            env,
            env_clear: true,
            cwd: Some(self.scratch.dir.join("trial")),
            ids: (self.place.builder != Ids::current()).then_some(self.place.builder),
            shut_in: true,
            ..Cmd::default()
        }
    }

    fn reaches(&self, stage: &Path, deadline: Deadline) -> bool {
        let script = "require('fs').readFileSync(process.argv[1])";
        let args = vec!["-e".into(), script.into(), stage.join("package.json").into()];
        host::run::run(&self.cmd(args, Vec::new()), deadline.min(Deadline::after(LOAD_LIMIT)))
            .is_ok_and(|o| o.ok())
    }

    /// Every native module that is made for this machine loads into this Node.
    fn natives(&self, program: &Path, deadline: Deadline, report: &mut Report) -> Result<()> {
        let mut loaded = 0;
        for file in natives(program) {
            let script = "process.dlopen({ exports: {} }, process.argv[1])";
            let args = vec!["-e".into(), script.into(), file.clone().into()];
            let out = host::run::run(&self.cmd(args, Vec::new()), deadline.min(Deadline::after(LOAD_LIMIT)))?;
            if out.ok() {
                loaded += 1;
                continue;
            }
            let said = String::from_utf8_lossy(&out.stderr);
            let line = said.lines().find(|l| l.contains("rror")).unwrap_or_default();
            let line: String = line.chars().filter(|c| !c.is_control()).take(WORDS_CHARS).collect();
            let name = file.strip_prefix(program).unwrap_or(&file).display().to_string();
            // What the machine lacks (a library, a display) it lacked before; what is broken is the file's own fault.
            let broken =
                ["NODE_MODULE_VERSION", "file too short", "invalid ELF", "undefined symbol", "wrong ELF"];
            if broken.iter().any(|b| line.contains(b)) {
                return Err(Error::new(Kind::Corrupt, format!("load the native module {name}"), line));
            }
            report.could_not(format!("the native module {name} does not load here: {line}"));
        }
        report.did(format!("{loaded} native modules load"));
        Ok(())
    }

    /// The entry point starts.
    fn start(&self, program: &Path, deadline: Deadline, report: &mut Report) -> Result<()> {
        let left = deadline.left().saturating_sub(RESERVE);
        let limit = left.min(START_LIMIT);
        if limit < START_LEAST {
            report.could_not("there was no time left to try a start");
            return Ok(());
        }
        let state = self.scratch.dir.join("trial/state");
        let config = state.join("openclaw.json");
        as_user(self.place.builder, || {
            files::make_private_dir(&state)?;
            files::write_atomic(&config, CONFIG.as_bytes(), 0o600)
        })?;
        let what = "try a start of the new program";
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|l| l.local_addr())
            .map_err(|e| Error::io(what, &e))?
            .port();
        let env = [
            ("OPENCLAW_STATE_DIR", state.clone().into_os_string()),
            ("OPENCLAW_CONFIG_PATH", config.into_os_string()),
            ("OPENCLAW_NO_AUTO_UPDATE", "1".into()),
            ("OPENCLAW_NO_RESPAWN", "1".into()),
            ("OPENCLAW_DISABLE_BONJOUR", "1".into()),
        ];
        let env = env.into_iter().map(|(k, v)| (OsString::from(k), v)).collect();
        let args = vec![
            "-e".into(),
            HARNESS.into(),
            program.join("dist/index.js").into(),
            port.to_string().into(),
            limit.as_millis().to_string().into(),
        ];
        let out = host::run::run(
            &self.cmd(args, env),
            Deadline::after(limit + Duration::from_secs(3)).min(deadline),
        )?;
        let said: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
        match said["word"].as_str() {
            Some("ready") => report.did("a trial start answered"),
            Some("alive") => {
                report.did(format!("a trial start was still at work after {} s", limit.as_secs()));
            }
            Some(_) | None => {
                let last = said["last"]
                    .as_str()
                    .map_or_else(|| String::from_utf8_lossy(&out.stderr).into_owned(), str::to_owned);
                let last: String = last
                    .lines()
                    .rev()
                    .find(|l| !l.trim().is_empty())
                    .unwrap_or_default()
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(WORDS_CHARS)
                    .collect();
                return Err(Error::new(
                    Kind::System,
                    what,
                    format!("it ended at once ({}): {last}", said["code"]),
                ));
            }
        }
        Ok(())
    }
}

/// Enough for a gateway to start on, and nothing it could act with.
const CONFIG: &str = r#"{"gateway":{"mode":"local","bind":"loopback","auth":{"mode":"token","token":"trial"}},
"models":{"catalogRefresh":{"enabled":false}},"update":{"checkOnStart":false}}"#;

/// Native modules made for this machine and its C library.
fn natives(program: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut queue = vec![program.to_owned()];
    let mut seen = 0;
    while let Some(dir) = queue.pop() {
        seen += 1;
        if seen > DIRS_LIMIT || found.len() >= NATIVE_LIMIT {
            break;
        }
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            let path = entry.path();
            if kind.is_dir() {
                queue.push(path);
            } else if kind.is_file() && path.extension().is_some_and(|x| x == "node") && ours(&path) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn ours(file: &Path) -> bool {
    if !gates::architecture(file).is_open() {
        return false;
    }
    let mut head = Vec::new();
    let read = std::fs::File::open(file).and_then(|f| f.take(HEAD_BYTES).read_to_end(&mut head));
    let wants_musl = head.windows(8).any(|w| w == b"libc.mus");
    read.is_ok() && head.starts_with(b"\x7fELF") && wants_musl == super::lock::musl()
}
