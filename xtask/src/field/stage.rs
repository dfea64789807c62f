//! One real node in a directory of ours, its agents, and how to wait for them. Everything that was started is known by
//! pid and start time and is ended when the stage goes, whatever happened on it.

use crate::demo;
use crate::proc::{self, Id};
use crate::run::{self, Show};
use rustix::process::Signal;
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Between two looks while waiting.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Commands of koboshi that only read or ask.
pub(crate) const ASK_LIMIT: Duration = Duration::from_secs(60);
/// An agent ends in milliseconds; a step that it ends first may take some seconds.
pub(crate) const AGENT_ENDS: Duration = Duration::from_secs(45);
/// A new agent folds, adopts and takes its first looks; confirming takes 5 s of them.
pub(crate) const ADOPTED: Duration = Duration::from_secs(60);
/// A climb with one start on a busy machine, its wait for the start ration included.
pub(crate) const RIGHTED: Duration = Duration::from_secs(420);
/// The start ration is free again after at most 300 s.
const RATION_LIMIT: Duration = Duration::from_secs(310);

/// An agent that we know of.
pub(crate) struct Agent {
    pub(crate) id: Id,
    /// Ours to reap; the demo's agent is not.
    child: Option<Child>,
    pub(crate) log: PathBuf,
}

impl Agent {
    /// Whether it has ended; reaps it.
    fn ended(&mut self) -> bool {
        match &mut self.child {
            Some(child) => !matches!(child.try_wait(), Ok(None)),
            None => !proc::runs(self.id),
        }
    }

    /// What it wrote so far.
    pub(crate) fn words(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// The node and everything around it.
pub(crate) struct Stage {
    binary: PathBuf,
    /// Everything of ours lies below.
    pub(crate) work: PathBuf,
    /// The demo's directory: node, koboshi, program.
    pub(crate) dir: PathBuf,
    pub(crate) config: PathBuf,
    pub(crate) port: u16,
    /// koboshi's description of it.
    node: Value,
    pub(crate) agent: Option<Agent>,
    agents: u32,
    others: Vec<Child>,
}

impl Stage {
    /// Has the demo make a node and leave it running with its agent.
    pub(crate) fn set(root: &Path) -> Result<Stage, String> {
        let work = root.join(format!("target/field-{}", std::process::id()));
        let dir = work.join("node");
        let mut stage = Stage {
            binary: demo::binary(root),
            config: dir.join("koboshi/koboshi.toml"),
            port: 0,
            node: Value::Null,
            agent: None,
            agents: 0,
            others: Vec::new(),
            dir,
            work,
        };
        std::fs::create_dir_all(&stage.dir).map_err(|e| format!("make {}: {e}", stage.dir.display()))?;
        let dir_text = stage.dir.display().to_string();
        let ran = demo::start(root, &["--no-faults", "--keep", "--dir", &dir_text], 0);
        // From here on there may be processes: the stage knows where to look for them when it goes.
        let agents = proc::running(&stage.binary, &["guard", &dir_text]);
        if let [id] = agents.as_slice() {
            let log = stage.dir.join("koboshi/agent.log");
            stage.agent = Some(Agent { id: *id, child: None, log });
        }
        if !ran.ok() || stage.agent.is_none() {
            let said = ran.stdout.trim();
            return Err(format!("the demo left no node to test on ({} agents): {said}", agents.len()));
        }
        stage.node = json(&stage.state("node.json")).unwrap_or_default();
        stage.port = stage.node["port"]
            .as_u64()
            .and_then(|p| u16::try_from(p).ok())
            .ok_or("the node's port is not known")?;
        Ok(stage)
    }

    /// A file of koboshi's state.
    pub(crate) fn state(&self, name: &str) -> PathBuf {
        self.dir.join("koboshi/state").join(name)
    }

    /// A path of the node's, by its name in koboshi's own description of it.
    pub(crate) fn node(&self, name: &str) -> Result<PathBuf, String> {
        let path = self.node[name].as_str().filter(|p| p.starts_with('/'));
        path.map(PathBuf::from).ok_or_else(|| format!("no path `{name}` in the node's description"))
    }

    /// The file that the gateway reads first: broken, the next start dies of it.
    pub(crate) fn entry(&self) -> Result<PathBuf, String> {
        self.node("entry")
    }

    // ---- processes ----

    /// Starts an agent on the node.
    pub(crate) fn guard(&mut self, options: &[&str]) -> Result<(), String> {
        let mut c = Command::new(&self.binary);
        c.arg("guard").args(options).arg("--config").arg(&self.config);
        self.guard_by(c)?;
        let agent = self.agent.as_mut().ok_or("no agent")?;
        // A child of ours keeps its pid at least until we reap it.
        let pid = agent.id.pid;
        agent.id = proc::stat(pid).ok_or("the agent was gone at once")?.id;
        Ok(())
    }

    /// The same by a command of the caller's; its process counts as the agent's until told otherwise.
    pub(crate) fn guard_by(&mut self, mut c: Command) -> Result<(), String> {
        if self.agent.is_some() {
            return Err("an agent runs already".to_owned());
        }
        self.agents += 1;
        let log = self.work.join(format!("agent-{}.log", self.agents));
        let file = File::create(&log).map_err(|e| format!("make {}: {e}", log.display()))?;
        let child = c
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .map_err(|e| format!("start an agent: {e}"))?;
        let id = proc::stat(child.id()).ok_or("the agent was gone at once")?.id;
        self.agent = Some(Agent { id, child: Some(child), log });
        Ok(())
    }

    /// Signals the agent and waits for its end. Its exit code, where it is our child and exited.
    pub(crate) fn end_agent(&mut self, signal: Signal) -> Result<Option<i32>, String> {
        let Some(mut agent) = self.agent.take() else { return Err("there is no agent to end".to_owned()) };
        if proc::alive(agent.id) {
            proc::signal(&[agent.id.pid], signal);
        }
        let until = Instant::now() + AGENT_ENDS;
        while !agent.ended() {
            if Instant::now() > until {
                let pid = agent.id.pid;
                self.agent = Some(agent);
                return Err(format!("the agent (process {pid}) did not end after {signal:?}"));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        let status = agent.child.as_mut().and_then(|c| c.wait().ok());
        Ok(status.and_then(|s| s.code()))
    }

    /// A process of our own that lasts until the stage goes or it is ended.
    pub(crate) fn bring(&mut self, mut c: Command) -> Result<Id, String> {
        let child = c
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|e| format!("start {}: {e}", c.get_program().display()))?;
        let pid = child.id();
        self.others.push(child);
        Ok(proc::stat(pid).ok_or("it was gone at once")?.id)
    }

    /// Ends one of those. Whether it was still there.
    pub(crate) fn send_away(&mut self, id: Id) -> bool {
        let Some(at) = self.others.iter().position(|c| c.id() == id.pid) else { return false };
        let mut child = self.others.swap_remove(at);
        let there = matches!(child.try_wait(), Ok(None));
        run::end(&mut child);
        there
    }

    /// Gateways of this node: processes of its Node binary that run the gateway.
    pub(crate) fn gateways(&self) -> Vec<Id> {
        let node = self.dir.join("runtime/bin/node");
        let all = proc::running(&node, &["gateway"]);
        // What a gateway itself starts is not a second one.
        let child_of_one =
            |id: &Id| proc::stat(id.pid).is_some_and(|s| all.iter().any(|other| other.pid == s.ppid));
        all.iter().copied().filter(|id| !child_of_one(id)).collect()
    }

    // ---- what koboshi says ----

    /// A command of koboshi on this node: its exit code and its one object.
    pub(crate) fn ask(&self, args: &[&str], limit: Duration) -> Result<(i32, Value), String> {
        let mut c = Command::new(&self.binary);
        c.args(args).arg("--json").arg("--config").arg(&self.config);
        ask(c, limit)
    }

    pub(crate) fn koboshi(&self) -> Command {
        Command::new(&self.binary)
    }

    /// What the running agent published last.
    pub(crate) fn status(&self) -> Option<Value> {
        let status = json(&self.dir.join("koboshi/run/status.json"))?;
        let agent = self.agent.as_ref()?;
        let theirs = status["agent"]["start_ticks"].as_u64() == Some(agent.id.start_ticks);
        theirs.then_some(status)
    }

    /// The gateway that the agent has in its care, once it is confirmed to serve and no incident is open.
    pub(crate) fn serving(&self, limit: Duration) -> Result<Id, String> {
        let mut last = Value::Null;
        let found = wait(limit, || {
            last = self.status()?;
            let well = last["verdict"]["verdict"] == "serving"
                && last["confirmed"] == true
                && last["incident"].is_null();
            let pid = u32::try_from(last["gateway"]["pid"].as_u64()?).ok()?;
            let id = Id { pid, start_ticks: last["gateway"]["start_ticks"].as_u64()? };
            well.then_some(id)
        });
        found.ok_or_else(|| {
            let (verdict, incident) = (&last["verdict"], &last["incident"]);
            format!("no word of a serving node after {} s: {verdict} {incident}", limit.as_secs())
        })
    }

    /// The same with every job of daily operation done, so that nothing else is at work.
    pub(crate) fn settled(&self, limit: Duration) -> Result<Id, String> {
        let id = self.serving(limit)?;
        wait(limit, || self.status().filter(|s| s["settled"] == true))
            .map(|_| id)
            .ok_or_else(|| "the agent's daily jobs did not get done".to_owned())
    }

    /// Waits until a start is free within the ration, as the agent counts it, or will be in `ahead`.
    pub(crate) fn ration(&self, ahead: Duration) -> Result<(), String> {
        let ahead_ms = u64::try_from(ahead.as_millis()).unwrap_or(0);
        wait(RATION_LIMIT, || {
            let free_at = self.status()?["start_free_at"]["ms"].as_u64()?;
            (free_at <= boot_ms() + ahead_ms).then_some(())
        })
        .ok_or_else(|| "the start ration was not free in time".to_owned())
    }

    /// Numbers of all incidents on record, the open one among them.
    pub(crate) fn incidents(&self) -> Result<Vec<u64>, String> {
        let (_, object) = self.ask(&["incidents", "list"], ASK_LIMIT)?;
        let list = object["incidents"].as_array().ok_or_else(|| format!("no list of incidents: {object}"))?;
        let mut ids: Vec<u64> = list.iter().filter_map(|i| i["id"].as_u64()).collect();
        ids.sort_unstable();
        Ok(ids)
    }

    /// The records of an incident, once it is closed.
    pub(crate) fn closed(&self, id: u64, limit: Duration) -> Result<Vec<Value>, String> {
        let file = self.state(&format!("incidents/{id:08}.json"));
        wait(limit, || json(&file)?["records"].as_array().cloned())
            .ok_or_else(|| format!("incident {id} was not closed after {} s", limit.as_secs()))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.agent.is_some()
            && let Err(why) = self.end_agent(Signal::TERM)
        {
            println!("{why}");
        }
        if !self.gateways().is_empty() {
            // What it says is nobody's concern here; what is left is ended below.
            let _ = self.ask(&["node", "stop"], ASK_LIMIT);
        }
        for child in &mut self.others {
            run::end(child);
        }
        let mut left: Vec<Id> = proc::running(&self.dir.join("runtime/bin/node"), &[]);
        left.extend(proc::running(&self.binary, &[&self.work.display().to_string()]));
        proc::kill_same(&left);
        if let Some(mut agent) = self.agent.take() {
            proc::kill_same(&[agent.id]);
            let _ = wait(AGENT_ENDS, || agent.ended().then_some(()));
        }
        let gone = wait(ASK_LIMIT, || left.iter().all(|id| !proc::runs(*id)).then_some(()));
        if gone.is_none() {
            println!("processes stay: {left:?}");
        }
        for base in cgroup_bases(&self.dir, 3) {
            remove_cgroups(&base);
        }
        if let Err(e) = std::fs::remove_dir_all(&self.work) {
            println!("{} stays: {e}", self.work.display());
        }
    }
}

/// Directories of containers that koboshi noted below `dir`.
fn cgroup_bases(dir: &Path, depth: usize) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("containers-") {
            if let Ok(base) = std::fs::read_to_string(path.join("cgroup-base")) {
                out.push(PathBuf::from(base.trim()));
            }
        } else if depth > 0 && ["koboshi", "run"].contains(&name.as_str()) {
            out.extend(cgroup_bases(&path, depth - 1));
        }
    }
    out
}

/// Removes empty control groups, the innermost first. One that still holds a process cannot be removed.
fn remove_cgroups(dir: &Path) {
    if !dir.starts_with("/sys/fs/cgroup") {
        return;
    }
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(dir);
}

/// Runs a command that prints one JSON object.
pub(crate) fn ask(mut c: Command, limit: Duration) -> Result<(i32, Value), String> {
    let words: Vec<String> = c.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
    let ran = run::run(&mut c, Show::No, limit);
    let code = ran.status.and_then(|s| s.code());
    let code = code.ok_or_else(|| format!("koboshi {}: it did not end by itself", words.join(" ")))?;
    let object: Value = serde_json::from_str(ran.stdout.trim())
        .map_err(|e| format!("koboshi {}: not one JSON object: {e}", words.join(" ")))?;
    Ok((code, object))
}

/// A file's JSON, once it is there and whole.
pub(crate) fn json(file: &Path) -> Option<Value> {
    serde_json::from_slice(&std::fs::read(file).ok()?).ok()
}

/// Looks again and again until there is something.
pub(crate) fn wait<T>(limit: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let until = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() >= until {
            return None;
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Milliseconds since boot by the clock that koboshi's journal uses.
pub(crate) fn boot_ms() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(t.tv_sec).unwrap_or(0) * 1000 + u64::try_from(t.tv_nsec).unwrap_or(0) / 1_000_000
}

/// Overwrites a file's bytes without making a new file of it.
pub(crate) fn overwrite(path: &Path, bytes: &[u8]) -> Result<(), String> {
    use std::io::Write;
    let written =
        OpenOptions::new().write(true).truncate(true).open(path).and_then(|mut f| f.write_all(bytes));
    written.map_err(|e| format!("write {}: {e}", path.display()))
}

/// Cuts a file in two and throws the second half away.
pub(crate) fn halve(path: &Path) -> Result<Vec<u8>, String> {
    let whole = std::fs::read(path).map_err(|e| format!("read {}: {e}", path.display()))?;
    let half = whole.len() / 2;
    let file =
        OpenOptions::new().write(true).open(path).map_err(|e| format!("open {}: {e}", path.display()))?;
    file.set_len(half as u64).map_err(|e| format!("cut {}: {e}", path.display()))?;
    Ok(whole)
}

/// Whoever lives longer than this was forgotten.
const STRANGER_LIVES: Duration = Duration::from_secs(3600);

/// The life of a process that is none of koboshi's concern: it sleeps, or holds a port and answers with a page.
pub(crate) fn stranger(port: Option<u16>) -> bool {
    let until = Instant::now() + STRANGER_LIVES;
    let Some(port) = port else {
        std::thread::sleep(STRANGER_LIVES);
        return true;
    };
    let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) else {
        return false;
    };
    while let Ok((mut stream, _)) = listener.accept() {
        use std::io::{Read, Write};
        let patience = Some(Duration::from_secs(2));
        let _ = stream.set_read_timeout(patience).and_then(|()| stream.set_write_timeout(patience));
        let mut request = [0; 4096];
        // Whatever was asked, and even if nothing was: the same page.
        let _ = stream.read(&mut request);
        let page = "<html><body>somebody else's page</body></html>";
        let head =
            format!("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {}\r\n", page.len());
        let _ = write!(stream, "{head}Connection: close\r\n\r\n{page}");
        if Instant::now() > until {
            break;
        }
    }
    true
}
