//! A node in a temporary directory: OpenClaw's layout with a few files, and a gateway that is this very test program.
//!
//! It answers the three probes, writes its lock and keeps its database open as the real one does, so that commands meet
//! what they would meet. It has no token, so that it is judged by ownership and HTTP.

use host::clock::Deadline;
use host::container::Containers;
use host::process::ProcessId;
use host::run::{Cmd, Output, run};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tempfile::TempDir;

/// The version that the fake package says it is.
pub const VERSION: &str = "2026.9.6";
/// Tells the fake gateway where its state is.
const STATE: &str = "KOBOSHI_TEST_STATE";
const PORT: &str = "KOBOSHI_TEST_PORT";
/// No command of a test takes this long.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// One node, its koboshi's directories, and nothing outside of one temporary directory.
pub struct Fake {
    pub dir: TempDir,
    pub name: String,
    pub port: u16,
}

impl Fake {
    pub fn new() -> Fake {
        Fake::within(tempfile::tempdir().unwrap())
    }

    /// In a directory of the test's.
    pub fn within(dir: TempDir) -> Fake {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("t{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let fake = Fake { dir, name, port };
        fake.lay_out();
        fake
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(below)
    }

    pub fn home(&self) -> PathBuf {
        self.path("home")
    }

    pub fn state(&self) -> PathBuf {
        self.home().join(format!(".openclaw-{}", self.name))
    }

    pub fn package(&self) -> PathBuf {
        self.path("prefix/lib/node_modules/openclaw")
    }

    /// From now on (or no longer) the gateway ends as it starts, for a reason that no look at the disk shows.
    pub fn ails(&self, ails: bool) {
        if ails {
            write(&self.path("ails"), "");
        } else {
            std::fs::remove_file(self.path("ails")).unwrap();
        }
    }

    pub fn config(&self) -> PathBuf {
        self.path("k/koboshi.toml")
    }

    pub fn koboshi_state(&self) -> PathBuf {
        self.path("k/state")
    }

    fn lay_out(&self) {
        write(
            &self.package().join("package.json"),
            &json!({"name": "openclaw", "version": VERSION, "openclaw": {"schemaVersions": {"state": 18, "agent": 1}}})
                .to_string(),
        );
        for file in ["dist/index.js", "dist/entry.js", "openclaw.mjs", "node_modules/ws/index.js"] {
            write(&self.package().join(file), &format!("// {file}\n{}", "x".repeat(3_000)));
        }
        std::fs::create_dir_all(self.path("prefix/bin")).unwrap();
        symlink("../lib/node_modules/openclaw/openclaw.mjs", self.path("prefix/bin/openclaw")).unwrap();
        let program = std::env::current_exe().unwrap();
        let node = self.path("node/bin/node");
        write(
            &node,
            &format!(
                "#!/bin/sh\n[ \"$1\" = --version ] && echo v26.10.0 && exit 0\n[ -e '{}' ] && exit 7\n\
                 {PORT}=$4 {STATE}='{}' exec '{}' --exact fake::the_gateway_itself --nocapture\n",
                self.path("ails").display(),
                self.state().display(),
                program.display()
            ),
        );
        std::fs::set_permissions(&node, std::fs::Permissions::from_mode(0o755)).unwrap();
        write(
            &self.state().join("openclaw.json"),
            &json!({"gateway": {"mode": "local", "port": self.port, "auth": {"mode": "trusted-proxy"}},
                "agents": {"defaults": {"workspace": self.state().join("workspace")}}})
            .to_string(),
        );
        std::fs::set_permissions(self.state().join("openclaw.json"), std::fs::Permissions::from_mode(0o600))
            .unwrap();
        write(&self.state().join("workspace/MEMORY.md"), "remember\n");
        write(&self.state().join("credentials/x.json"), "{}");
        std::fs::create_dir_all(self.state().join("state")).unwrap();
        let db = rusqlite::Connection::open(self.state().join("state/openclaw.sqlite")).unwrap();
        db.execute_batch(
            "PRAGMA journal_mode=wal; PRAGMA user_version=18;
             CREATE TABLE device_identities(identity_key TEXT, device_id TEXT);
             INSERT INTO device_identities VALUES('primary', 'device-1');
             CREATE TABLE cron_jobs(id TEXT); INSERT INTO cron_jobs VALUES('a');",
        )
        .unwrap();
        drop(db);
        let agent = self.state().join("agents/main/agent");
        std::fs::create_dir_all(&agent).unwrap();
        let db = rusqlite::Connection::open(agent.join("openclaw-agent.sqlite")).unwrap();
        db.execute_batch(
            "PRAGMA user_version=1; CREATE TABLE sessions(id TEXT); INSERT INTO sessions VALUES('s');",
        )
        .unwrap();
        drop(db);
        self.configure("");
    }

    /// Writes koboshi's configuration, with more at its end.
    pub fn configure(&self, more: &str) {
        write(
            &self.config(),
            &format!(
                "state_dir = {:?}\nrun_dir = {:?}\nladder = {{ skip = [\"system-install\", \"user-install\"] }}\n[node]\nname = {:?}\nhome = {:?}\nprefix = {:?}\nnode_bin = {:?}\n{more}",
                self.koboshi_state(),
                self.path("k/run"),
                self.name,
                self.home(),
                self.path("prefix"),
                self.path("node/bin/node"),
            ),
        );
    }

    /// Runs koboshi on this node.
    pub fn koboshi(&self, args: &[&str]) -> Said {
        let mut cmd = self.command(args);
        cmd.env_clear = true;
        Said::of(run(&cmd, Deadline::after(COMMAND_LIMIT)).unwrap(), args)
    }

    /// The same with a directory of the test's own first on the path.
    pub fn koboshi_with_path(&self, bin: &Path, args: &[&str]) -> Said {
        let mut cmd = self.command(args);
        cmd.env_clear = true;
        for (key, value) in &mut cmd.env {
            if key == "PATH" {
                *value = format!("{}:{}", bin.display(), value.to_string_lossy()).into();
            }
        }
        Said::of(run(&cmd, Deadline::after(COMMAND_LIMIT)).unwrap(), args)
    }

    /// The same with `--json`.
    pub fn json(&self, args: &[&str]) -> (Value, i32) {
        let mut all = vec!["--json"];
        all.extend(args);
        let said = self.koboshi(&all);
        (said.object(), said.code)
    }

    pub fn command(&self, args: &[&str]) -> Cmd {
        let mut cmd = Cmd::new(env!("CARGO_BIN_EXE_koboshi"), ["--config"]);
        cmd.args.push(self.config().into());
        cmd.args.extend(args.iter().map(Into::into));
        cmd.env = vec![
            ("HOME".into(), self.home().into()),
            ("XDG_RUNTIME_DIR".into(), self.path("xdg").into()),
            ("PATH".into(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into()),
        ];
        cmd
    }

    /// Starts the gateway as somebody else would: not by koboshi.
    #[allow(clippy::zombie_processes, reason = "it is ended by its identity; a zombie counts as gone")]
    pub fn start_gateway(&self) -> ProcessId {
        let child = std::process::Command::new(self.path("node/bin/node"))
            .args(["entry", "gateway", "--port", &self.port.to_string()])
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Deadline::after(Duration::from_secs(20));
        while self.gateway().is_none() {
            assert!(!deadline.passed(), "the fake gateway (process {}) does not come up", child.id());
            std::thread::sleep(Duration::from_millis(10));
        }
        self.gateway().unwrap()
    }

    /// The running gateway, by its lock.
    pub fn gateway(&self) -> Option<ProcessId> {
        let text = std::fs::read(lock_file(&self.state())).ok()?;
        let lock: Value = serde_json::from_slice(&text).ok()?;
        let pid = u32::try_from(lock["pid"].as_u64()?).ok()?;
        let id = ProcessId { pid, start_ticks: lock["startTime"].as_u64()? };
        id.alive().then_some(id)
    }

    /// Ends the gateway at once, as a crash would, and waits until it is gone.
    pub fn kill_gateway(&self) {
        if let Some(id) = self.gateway() {
            let fd = id.open().unwrap();
            fd.signal(rustix::process::Signal::KILL).unwrap();
            assert!(fd.wait(Deadline::after(Duration::from_secs(10))));
        }
    }

    /// Every file, link and directory with its bytes and mode, without those below `but`.
    pub fn picture(&self, but: &[&str]) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
        let root = self.path("");
        let skip: Vec<PathBuf> = but.iter().map(|b| self.path(b)).collect();
        let mut all = BTreeMap::new();
        let mut open = vec![root];
        while let Some(path) = open.pop() {
            // The shared memory of a live database is its readers' scratch pad; it holds no data.
            if skip.contains(&path) || path.to_string_lossy().ends_with("-shm") {
                continue;
            }
            let meta = path.symlink_metadata().unwrap();
            let bytes = if meta.is_symlink() {
                path.read_link().unwrap().into_os_string().into_encoded_bytes()
            } else if meta.is_file() {
                std::fs::read(&path).unwrap()
            } else {
                open.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
                Vec::new()
            };
            all.insert(path, (meta.mode(), bytes));
        }
        all
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.kill_gateway();
        for name in names(&self.path("k/run")).filter_map(|n| Some(n.strip_prefix("containers-")?.to_owned()))
        {
            if let Ok(containers) = Containers::open(&name, &self.path("k/run")) {
                let _ = containers.kill_gateway(Deadline::after(Duration::from_secs(5)));
                containers.remove();
            }
        }
        remove_cgroups(&format!("koboshi-{}-", self.name));
    }
}

fn names(dir: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned())
}

/// After an uninstall nobody remembers the empty cgroups of a gateway that outlived it.
fn remove_cgroups(prefix: &str) {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = own.lines().find_map(|l| l.strip_prefix("0::/")).unwrap_or_default().to_owned();
    for mount in ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"] {
        let home = Path::new(mount).join(&own);
        for name in names(&home).filter(|n| n.starts_with(prefix)) {
            for below in ["steps", "gateway", ""] {
                let _ = std::fs::remove_dir(home.join(&name).join(below));
            }
        }
    }
}

/// Compares two pictures and says what differs.
pub fn same(before: &BTreeMap<PathBuf, (u32, Vec<u8>)>, after: &BTreeMap<PathBuf, (u32, Vec<u8>)>) {
    let gone: Vec<_> = before.keys().filter(|p| !after.contains_key(*p)).collect();
    let new: Vec<_> = after.keys().filter(|p| !before.contains_key(*p)).collect();
    let changed: Vec<_> =
        before.iter().filter(|(p, v)| after.get(*p).is_some_and(|a| a != *v)).map(|(p, _)| p).collect();
    assert!(
        gone.is_empty() && new.is_empty() && changed.is_empty(),
        "gone {gone:?}, new {new:?}, changed {changed:?}"
    );
}

/// What koboshi said.
pub struct Said {
    pub out: String,
    pub err: String,
    pub code: i32,
    args: Vec<String>,
}

impl Said {
    fn of(output: Output, args: &[&str]) -> Said {
        let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
        assert!(!output.timed_out, "koboshi {args:?} took too long");
        Said {
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
            code: output.status.unwrap_or(-1),
            args,
        }
    }

    /// Standard output as the one object that it must be, with no null anywhere in it.
    pub fn object(&self) -> Value {
        assert_eq!(self.out.trim_end().lines().count(), 1, "not one line: {}\n{}", self.out, self.err);
        let value: Value = serde_json::from_str(&self.out)
            .unwrap_or_else(|e| panic!("koboshi {:?}: {e}: {:?}\n{}", self.args, self.out, self.err));
        assert_eq!(value["schema"], json!(1), "{value}");
        no_null(&value, "");
        value
    }

    pub fn code(&self, wanted: i32) -> &Said {
        assert_eq!(self.code, wanted, "koboshi {:?}\n{}\n{}", self.args, self.out, self.err);
        self
    }

    pub fn says(&self, text: &str) -> &Said {
        let both = format!("{}\n{}", self.out, self.err);
        assert!(both.contains(text), "koboshi {:?} does not say {text:?}:\n{both}", self.args);
        self
    }
}

fn no_null(value: &Value, at: &str) {
    match value {
        Value::Null => panic!("null at {at}"),
        Value::Array(all) => all.iter().enumerate().for_each(|(i, v)| no_null(v, &format!("{at}[{i}]"))),
        Value::Object(all) => all.iter().for_each(|(k, v)| no_null(v, &format!("{at}.{k}"))),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn lock_file(state: &Path) -> PathBuf {
    state.join(format!("tmp/openclaw-{}/gateway.state.lock", rustix::process::getuid().as_raw()))
}

/// The gateway, when this program is run as one; an empty test otherwise.
#[test]
fn the_gateway_itself() {
    let (Some(state), Some(port)) = (std::env::var_os(STATE).map(PathBuf::from), std::env::var(PORT).ok())
    else {
        return;
    };
    let port: u16 = port.parse().unwrap();
    let db = rusqlite::Connection::open(state.join("state/openclaw.sqlite")).unwrap();
    db.execute_batch("PRAGMA journal_mode=wal; INSERT INTO cron_jobs VALUES('b');").unwrap();
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let me = ProcessId::current().unwrap();
    let lock = json!({"pid": me.pid, "startTime": me.start_ticks, "port": port, "stateDir": state,
        "configPath": state.join("openclaw.json"), "ownerId": "test"});
    write(&lock_file(&state), &lock.to_string());
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        let mut request = [0_u8; 1024];
        let n = stream.read(&mut request).unwrap_or(0);
        let text = String::from_utf8_lossy(&request[..n]).into_owned();
        let body = match text.split(' ').nth(1) {
            Some("/healthz") => json!({"ok": true, "status": "live"}),
            Some("/startupz") => json!({"status": "started", "version": VERSION}),
            Some(_) | None => json!({"ready": true, "failing": [], "uptimeMs": 5}),
        }
        .to_string();
        let _ = write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
    }
}
