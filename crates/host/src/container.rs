//! A container holds everything that one step starts, and ends it for certain.
//!
//! With cgroup v2 (pure or hybrid hosts) a step's first process is put into a directory of its own before it becomes
//! the step's program, so no fork, new session, double fork, cleared environment or ignored signal leads out; the
//! kernel ends all of it at once and says when the directory is empty. Beside it, whatever still carries the step's
//! environment mark (sudo through PAM can move a child into another cgroup) is swept up.
//!
//! Without cgroup v2 a step is followed by session, parent links (we become subreaper, so orphans come to us) and
//! environment mark, and killed until none is left. That is weaker: an orphan that cleared its environment is only
//! ended when nothing else of ours runs that it could belong to. [`Containers::strength`] says which it is.
//!
//! The gateway lives in a container of its own beside the steps, so that ending a step or losing the agent never takes
//! it along.

use crate::clock::{self, DEADLINE_ENV, Deadline};
use crate::error::{Context, Error, Kind, Result};
pub use crate::output::OutputFile;
pub use crate::process::{Ended, PidFd, ProcessId};
pub use crate::run::Ids;
use crate::spawn::Apart;
use crate::{files, output, poll, process, reap};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The environment variable that marks everything a container starts.
pub const MARK_ENV: &str = "KOBOSHI_STEP";
/// How often an output file is looked at while its writer is waited for.
const TRIM_EVERY: Duration = Duration::from_secs(1);
/// How often we look again where the kernel sends no event.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// A step's or node's name is this long at most: it becomes a file name.
const NAME_LIMIT: usize = 64;
/// Containers, processes in one, nesting of cgroups inside one: beyond this something is very wrong.
const LIST_LIMIT: usize = 100_000;
/// Nesting of cgroups that a step may have made inside its own.
const NESTING_LIMIT: usize = 32;
/// Weak mode: looks in a row that must find nobody, since a process that forks between two of ours may be missed by one.
const EMPTY_LOOKS: u32 = 3;
/// A step's record is a few hundred bytes.
const RECORD_LIMIT_BYTES: u64 = 64 << 10;
/// What we are called inside a delegated cgroup, once we have moved out of the way of its controllers.
const AGENT_LEAF: &str = "koboshi-agent";
/// The mode mask of children: what they install is to be readable, as if a person had installed it.
const CHILD_UMASK: u32 = 0o022;

/// What to start.
#[derive(Debug, Clone, Default)]
pub struct Spec {
    /// Program: absolute, or found on PATH.
    pub program: OsString,
    /// Arguments.
    pub args: Vec<OsString>,
    /// Environment to add.
    pub env: Vec<(OsString, OsString)>,
    /// Start from an empty environment.
    pub env_clear: bool,
    /// Working directory; ours when none.
    pub cwd: Option<PathBuf>,
    /// Whom to become; ourselves when none.
    pub ids: Option<Ids>,
    /// Where both output streams go; nowhere when none.
    pub output: Option<OutputFile>,
    /// Limits, where the host can impose them.
    pub limits: Limits,
    /// Lowest CPU and best-effort I/O priority.
    pub background: bool,
    /// Told to the child as [`DEADLINE_ENV`].
    pub deadline: Option<Deadline>,
    /// The value of [`MARK_ENV`]: unique per step, so that escapes can be told from others' processes.
    pub mark: String,
}

/// Limits of one container; what the host cannot impose is left out, see [`Strength`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u64>,
}

/// How much a container on this host is worth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Strength {
    /// The kernel holds the processes together.
    CgroupV2 {
        /// Memory limits can be imposed.
        memory: bool,
        /// Process limits can be imposed.
        pids: bool,
    },
    /// Session, subreaper and mark only.
    Weak {
        /// Why there is no cgroup v2 for us.
        why: String,
    },
}

/// Proof that a container is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Emptied {
    /// Processes that were still there and were killed.
    pub killed: u32,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
    /// By which means.
    pub how: &'static str,
}

/// The containers of one node.
#[derive(Debug, Clone)]
pub struct Containers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Where the weak mode and the sweep keep who was started.
    records: PathBuf,
    place: Place,
    /// First processes that we started ourselves: their session numbers cannot have become another's meanwhile.
    ours: Mutex<BTreeSet<ProcessId>>,
}

#[derive(Debug)]
enum Place {
    Cgroup { base: PathBuf, memory: bool, pids: bool },
    Weak { why: String },
}

/// What is written down about a container's first process, for an agent that comes later.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    mark: String,
    boot: u64,
    began_ticks: u64,
    leader: Option<ProcessId>,
}

/// The two kinds of container.
#[derive(Debug, Clone, Copy)]
enum Which<'a> {
    Step(&'a str),
    Gateway,
}

impl Which<'_> {
    fn below(self, base: &Path) -> PathBuf {
        match self {
            Which::Step(name) => base.join("steps").join(name),
            Which::Gateway => base.join("gateway"),
        }
    }

    fn record(self, records: &Path) -> PathBuf {
        match self {
            Which::Step(name) => records.join(format!("step-{name}.json")),
            Which::Gateway => records.join("gateway.json"),
        }
    }

    fn words(self) -> String {
        match self {
            Which::Step(name) => format!("step {name}"),
            Which::Gateway => "the gateway".into(),
        }
    }
}

impl Containers {
    /// The containers of the node `name`, with their records below `run_dir` (made if missing; should not outlive the
    /// boot, but may).
    ///
    /// # Errors
    /// When the name is unfit or the records cannot be kept. No cgroup v2 is not an error but [`Strength::Weak`].
    pub fn open(name: &str, run_dir: &Path) -> Result<Containers> {
        let records = Containers::records(name, run_dir)?;
        let place = match cgroup_place(name, &records) {
            Ok(place) => place,
            Err(why) => weak_place(why),
        };
        Ok(Containers(Arc::new(Inner { records, place, ours: Mutex::default() })))
    }

    /// The same in the weaker way, whatever the host has: for hosts where cgroup v2 misbehaves, and for tests.
    ///
    /// # Errors
    /// As for [`Containers::open`].
    pub fn open_weak(name: &str, run_dir: &Path, why: &str) -> Result<Containers> {
        let records = Containers::records(name, run_dir)?;
        Ok(Containers(Arc::new(Inner { records, place: weak_place(why.into()), ours: Mutex::default() })))
    }

    fn records(name: &str, run_dir: &Path) -> Result<PathBuf> {
        check_name(name)?;
        let records = run_dir.join(format!("containers-{name}"));
        std::fs::create_dir_all(run_dir).context(|| format!("making {}", run_dir.display()))?;
        files::make_private_dir(&records)?;
        Ok(records)
    }

    /// What they are worth on this host.
    #[must_use]
    pub fn strength(&self) -> Strength {
        match &self.0.place {
            Place::Cgroup { memory, pids, .. } => Strength::CgroupV2 { memory: *memory, pids: *pids },
            Place::Weak { why } => Strength::Weak { why: why.clone() },
        }
    }

    /// Starts a step. A container of that name that still holds processes is refused: kill it first.
    ///
    /// # Errors
    /// When it cannot be started; then nothing of it runs.
    pub fn spawn(&self, spec: &Spec, step: &str) -> Result<Step> {
        check_name(step)?;
        let (pidfd, record) = self.start(spec, Which::Step(step))?;
        Ok(Step {
            containers: self.clone(),
            name: step.to_owned(),
            pidfd,
            record,
            output: spec.output.clone(),
            ended: None,
            known: BTreeSet::new(),
        })
    }

    /// Kills what a step left behind, by the step's name alone: also for steps of an agent that died. A step that never
    /// was, or is gone, is empty.
    ///
    /// # Errors
    /// `TimedOut` when something does not die by the deadline; the message names the pids.
    pub fn kill(&self, step: &str, deadline: Deadline) -> Result<Emptied> {
        check_name(step)?;
        self.end(Which::Step(step), deadline)
    }

    /// Names of steps that were started and not yet killed.
    #[must_use]
    pub fn leftovers(&self) -> Vec<String> {
        let mut names: BTreeSet<String> = names_in(&self.0.records)
            .filter_map(|n| Some(n.strip_prefix("step-")?.strip_suffix(".json")?.to_owned()))
            .collect();
        if let Place::Cgroup { base, .. } = &self.0.place {
            let dir = base.join("steps");
            names.extend(names_in(&dir).filter(|n| dir.join(n).is_dir()));
        }
        names.into_iter().collect()
    }

    /// The gateway's cgroup directory, where there are cgroups.
    #[must_use]
    pub fn gateway_cgroup(&self) -> Option<PathBuf> {
        match &self.0.place {
            Place::Cgroup { base, .. } => Some(Which::Gateway.below(base)),
            Place::Weak { .. } => None,
        }
    }

    /// Starts the gateway in its own container, in its own session, with no tie to our life. Refused while its container
    /// holds a process: there must never be two.
    ///
    /// # Errors
    /// When it cannot be started; then nothing of it runs.
    pub fn spawn_gateway(&self, spec: &Spec) -> Result<(ProcessId, PidFd)> {
        let (pidfd, _) = self.start(spec, Which::Gateway)?;
        Ok((pidfd.id(), pidfd))
    }

    /// Ends everything in the gateway's container.
    ///
    /// # Errors
    /// As for [`Containers::kill`].
    pub fn kill_gateway(&self, deadline: Deadline) -> Result<Emptied> {
        self.end(Which::Gateway, deadline)
    }

    /// Removes what is empty: the directories and the records. What still holds processes stays.
    pub fn remove(&self) {
        if let Place::Cgroup { base, .. } = &self.0.place {
            for name in names_in(&base.join("steps")) {
                remove_cgroup(&base.join("steps").join(name));
            }
            remove_cgroup(&base.join("gateway"));
            remove_cgroup(&base.join("steps"));
            // What cannot be removed is still in use.
            let _ = std::fs::remove_dir(base);
        }
        if self.leftovers().is_empty() && self.gateway_leader().is_none() {
            let _ = std::fs::remove_dir_all(&self.0.records);
        }
    }

    /// The first process of the gateway's container, as whoever started it wrote it down; `None` when it is gone.
    #[must_use]
    pub fn gateway_leader(&self) -> Option<ProcessId> {
        let record = read_record(&Which::Gateway.record(&self.0.records))?;
        record.leader.filter(|l| record.boot == clock::boot_id() && l.alive())
    }

    fn start(&self, spec: &Spec, which: Which<'_>) -> Result<(PidFd, Record)> {
        let what = || format!("starting {} in {}", spec.program.to_string_lossy(), which.words());
        let record_path = which.record(&self.0.records);
        let mut record = Record {
            mark: spec.mark.clone(),
            boot: clock::boot_id(),
            began_ticks: ticks_now()?,
            leader: None,
        };
        let (cgroup, how) = match &self.0.place {
            Place::Cgroup { base, memory, pids } => {
                let dir = which.below(base);
                (Some(fresh_cgroup(&dir, which, spec.limits, *memory, *pids)?), Some(dir))
            }
            Place::Weak { .. } => {
                self.refuse_if_weakly_occupied(&record_path, which)?;
                (None, None)
            }
        };
        // Before the start, so that an agent that dies right after it leaves the mark to sweep by.
        write_record(&record_path, &record)?;
        let started = launch(spec, cgroup).context(what);
        let pidfd = match started {
            Ok(pidfd) => pidfd,
            Err(e) => {
                if let Some(dir) = how {
                    remove_cgroup(&dir);
                }
                remove_record(&record_path);
                return Err(e);
            }
        };
        record.leader = Some(pidfd.id());
        self.ours().insert(pidfd.id());
        // The step runs already; without the leader's name a later agent still has the cgroup or the mark.
        let _ = write_record(&record_path, &record);
        Ok((pidfd, record))
    }

    fn end(&self, which: Which<'_>, deadline: Deadline) -> Result<Emptied> {
        let record_path = which.record(&self.0.records);
        let record = read_record(&record_path);
        self.end_known(which, record.as_ref(), BTreeSet::new(), deadline)
    }

    fn ours(&self) -> std::sync::MutexGuard<'_, BTreeSet<ProcessId>> {
        self.0.ours.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end_known(
        &self,
        which: Which<'_>,
        record: Option<&Record>,
        known: BTreeSet<ProcessId>,
        deadline: Deadline,
    ) -> Result<Emptied> {
        let began = clock::now();
        // Records of another boot name processes that cannot exist.
        let record = record.filter(|r| r.boot == clock::boot_id());
        let (killed, how) = match &self.0.place {
            Place::Cgroup { base, .. } => {
                let dir = which.below(base);
                let (killed, how) = empty_cgroup(&dir, which, deadline)?;
                let swept = match record {
                    Some(r) => self.sweep_marked(r, which, deadline)?,
                    None => 0,
                };
                remove_cgroup(&dir);
                (killed.saturating_add(swept), how)
            }
            Place::Weak { .. } => {
                let killed = match record {
                    Some(r) => self.end_weakly(r, known, which, deadline)?,
                    None => 0,
                };
                (killed, "session, subreaper and mark")
            }
        };
        remove_record(&which.record(&self.0.records));
        if let Some(leader) = record.and_then(|r| r.leader) {
            self.ours().remove(&leader);
        }
        let took_ms = clock::now().since_ms(began).unwrap_or(0);
        Ok(Emptied { killed, took_ms, how })
    }

    /// Escapes: processes elsewhere that started since the step began and carry its mark.
    fn sweep_marked(&self, record: &Record, which: Which<'_>, deadline: Deadline) -> Result<u32> {
        let spare = self.gateway_cgroup().filter(|_| matches!(which, Which::Step(_)));
        let mut killed = BTreeSet::new();
        loop {
            let found: Vec<ProcessId> = marked(record)
                .into_iter()
                .filter(|p| !spare.as_ref().is_some_and(|dir| lists(dir, p.pid)))
                .collect();
            if found.is_empty() {
                return Ok(count(killed.len()));
            }
            killed.extend(kill_all(&found));
            give_time(which, &found, deadline)?;
        }
    }

    fn end_weakly(
        &self,
        record: &Record,
        mut known: BTreeSet<ProcessId>,
        which: Which<'_>,
        deadline: Deadline,
    ) -> Result<u32> {
        let mut killed = BTreeSet::new();
        let mut empty_looks = 0;
        // Its group at once, as long as the leader, alive or a zombie, keeps the number: no fork outruns that.
        if let Some(leader) = record.leader.filter(|l| l.stat().is_some_and(|s| s.pgrp == l.pid)) {
            killed.extend(self.weak_members(record, &mut known, which));
            process::group_kill(leader.pid);
        }
        loop {
            reap::orphans();
            let found = self.weak_members(record, &mut known, which);
            if found.is_empty() {
                empty_looks += 1;
                if empty_looks >= EMPTY_LOOKS {
                    return Ok(count(killed.len()));
                }
                continue;
            }
            empty_looks = 0;
            kill_groups(&found);
            killed.extend(kill_all(&found));
            killed.extend(found.iter().copied());
            give_time(which, &found, deadline)?;
        }
    }

    fn weak_members(
        &self,
        record: &Record,
        known: &mut BTreeSet<ProcessId>,
        which: Which<'_>,
    ) -> Vec<ProcessId> {
        let fresh = record.leader.is_some_and(|l| self.ours().contains(&l));
        let alone = reap::nobody_but(record.leader.map(|l| l.pid)) && self.others_alive(which) == 0;
        weak_members(record, known, fresh, alone)
    }

    fn refuse_if_weakly_occupied(&self, record_path: &Path, which: Which<'_>) -> Result<()> {
        let Some(record) = read_record(record_path).filter(|r| r.boot == clock::boot_id()) else {
            return Ok(());
        };
        let found = self.weak_members(&record, &mut BTreeSet::new(), which);
        if found.is_empty() { Ok(()) } else { Err(occupied(which)) }
    }

    /// Living leaders of other containers of this node.
    fn others_alive(&self, which: Which<'_>) -> usize {
        let own = which.record(&self.0.records);
        names_in(&self.0.records)
            .map(|n| self.0.records.join(n))
            .filter(|path| *path != own)
            .filter_map(|path| read_record(&path))
            .filter(|r| r.boot == clock::boot_id())
            .filter(|r| r.leader.is_none_or(ProcessId::alive))
            .count()
    }
}

/// A step that was started. Dropping it kills nothing: call [`Step::kill`], also after a clean exit.
#[derive(Debug)]
pub struct Step {
    containers: Containers,
    name: String,
    pidfd: PidFd,
    record: Record,
    output: Option<OutputFile>,
    ended: Option<Ended>,
    /// Weak mode: everybody seen to belong to it, so that an orphan of later is known.
    known: BTreeSet<ProcessId>,
}

impl Step {
    /// Its first process.
    #[must_use]
    pub fn id(&self) -> ProcessId {
        self.pidfd.id()
    }

    /// Becomes readable when its first process has exited.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Waits for its first process and keeps its output within bounds meanwhile. At the deadline it answers
    /// [`Ended::TimedOut`] and kills nothing.
    pub fn wait(&mut self, deadline: Deadline) -> Ended {
        loop {
            if let Some(ended) = self.look() {
                return ended;
            }
            if deadline.passed() {
                return Ended::TimedOut;
            }
            // Whether it exited is seen above.
            let _ = self.pidfd.wait(deadline.min(Deadline::after(TRIM_EVERY)));
            self.trim();
            self.remember();
        }
    }

    /// How its first process ended, if it has.
    pub fn look(&mut self) -> Option<Ended> {
        if self.ended.is_none() {
            // In the weaker way it stays a zombie until `kill`: that keeps the number of its group its own.
            self.ended = match &self.containers.0.place {
                Place::Cgroup { .. } => self.pidfd.reap(),
                Place::Weak { .. } => self.pidfd.peek(),
            };
        }
        self.ended
    }

    /// Ends all of it, proves it empty, reaps it and removes its container.
    ///
    /// # Errors
    /// As for [`Containers::kill`].
    pub fn kill(&mut self, deadline: Deadline) -> Result<Emptied> {
        let known = self.known.clone();
        let emptied =
            self.containers.end_known(Which::Step(&self.name), Some(&self.record), known, deadline)?;
        // The kernel counts a zombie as gone, so this wait is short.
        let _ = self.pidfd.wait(deadline);
        self.look();
        let _ = self.pidfd.reap();
        self.trim();
        Ok(emptied)
    }

    fn remember(&mut self) {
        match &self.containers.0.place {
            Place::Cgroup { .. } => {}
            Place::Weak { .. } => {
                self.containers.weak_members(&self.record, &mut self.known, Which::Step(&self.name));
            }
        }
    }

    fn trim(&self) {
        if let Some(out) = &self.output {
            // A file that cannot be trimmed is no reason to lose the step; it is looked at again.
            let _ = output::trim(&out.path, out.limit_bytes);
        }
    }
}

/// Starts the program, set apart, in the cgroup whose `cgroup.procs` this is.
fn launch(spec: &Spec, cgroup: Option<OwnedFd>) -> Result<PidFd> {
    let mut cmd = Command::new(&spec.program);
    cmd.args(&spec.args).stdin(Stdio::null());
    match &spec.output {
        Some(out) => {
            let file = output::open(&out.path)?;
            let twin = file.try_clone().context(|| "sharing the output file".into())?;
            cmd.stdout(file).stderr(twin);
        }
        None => {
            cmd.stdout(Stdio::null()).stderr(Stdio::null());
        }
    }
    if spec.env_clear {
        cmd.env_clear();
    }
    cmd.env_remove(DEADLINE_ENV).env_remove(MARK_ENV);
    cmd.envs(spec.env.iter().map(|(k, v)| (k, v)));
    if !spec.mark.is_empty() {
        cmd.env(MARK_ENV, &spec.mark);
    }
    if let Some(d) = spec.deadline {
        cmd.env(DEADLINE_ENV, d.to_env());
    }
    if let Some(cwd) = &spec.cwd {
        cmd.current_dir(cwd);
    }
    Apart {
        session: true,
        cgroup,
        ids: spec.ids,
        background: spec.background,
        umask: Some(CHILD_UMASK),
        shut: None,
    }
    .arrange(&mut cmd);
    let child = reap::spawn(&mut cmd).context(|| "starting it".into())?;
    // From here on the pidfd waits and reaps; the standard library's handle does neither when dropped.
    ProcessId::child(child.id())
}

fn check_name(name: &str) -> Result<()> {
    let fit = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > NAME_LIMIT || name.starts_with('.') || !name.chars().all(fit) {
        return Err(Error::new(
            Kind::Usage,
            format!("naming a container {name:?}"),
            "letters, digits, '-', '_' and '.', not starting with '.', at most 64",
        ));
    }
    Ok(())
}

fn names_in(dir: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().take(LIST_LIMIT);
    entries.filter_map(|e| e.file_name().into_string().ok())
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn ticks_now() -> Result<u64> {
    let hz = rustix::param::clock_ticks_per_second();
    // The kernel rounds start times down to a tick, and so do we, one tick to the safe side.
    Ok((clock::now().ms.saturating_mul(hz) / 1_000).saturating_sub(1))
}

fn read_record(path: &Path) -> Option<Record> {
    serde_json::from_slice(&files::read_bounded(path, RECORD_LIMIT_BYTES).ok()?).ok()
}

fn write_record(path: &Path, record: &Record) -> Result<()> {
    let bytes =
        serde_json::to_vec(record).map_err(|e| Error::new(Kind::System, "writing down a container", e))?;
    files::write_atomic(path, &bytes, 0o600)
}

fn remove_record(path: &Path) {
    // A record that stays is a leftover that turns out empty.
    let _ = std::fs::remove_file(path);
}

/// Sends KILL to each; those that were still there.
fn kill_all(found: &[ProcessId]) -> Vec<ProcessId> {
    found.iter().copied().filter(|p| matches!(p.signal(Signal::KILL), Ok(true))).collect()
}

fn give_time(which: Which<'_>, found: &[ProcessId], deadline: Deadline) -> Result<()> {
    let soon = deadline.min(Deadline::after(LOOK_AGAIN));
    for process in found {
        if let Ok(fd) = process.open() {
            let _ = fd.wait(soon);
        }
    }
    if deadline.passed() {
        let left: Vec<u32> = found.iter().filter(|p| p.alive()).map(|p| p.pid).collect();
        return if left.is_empty() { Ok(()) } else { Err(still_there(which, &left)) };
    }
    Ok(())
}

fn still_there(which: Which<'_>, pids: &[u32]) -> Error {
    Error::new(
        Kind::TimedOut,
        format!("ending {}", which.words()),
        format!(
            "still there at the deadline: processes {:?}",
            pids.get(..pids.len().min(20)).unwrap_or(pids)
        ),
    )
    .hint("a process in uninterruptible sleep ends when its device or file system answers")
}

/// Living processes that carry the record's mark and are no older than it; never ourselves.
fn marked(record: &Record) -> Vec<ProcessId> {
    if record.mark.is_empty() {
        return Vec::new();
    }
    process::table()
        .into_iter()
        .filter(|(pid, s)| {
            *pid != std::process::id() && s.state != 'Z' && s.start_ticks >= record.began_ticks
        })
        .map(|(pid, s)| ProcessId { pid, start_ticks: s.start_ticks })
        .filter(|p| p.environ_has(MARK_ENV, &record.mark))
        .collect()
}

// ---- the weaker way ----

fn weak_place(why: String) -> Place {
    // Orphans of a step come to us instead of to init. Refused only by very old kernels; then the mark has to do.
    let _ = rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1));
    Place::Weak { why }
}

fn occupied(which: Which<'_>) -> Error {
    Error::new(Kind::System, format!("starting {}", which.words()), "its container still holds processes")
        .hint("it is killed before it is started again")
}

/// Kills whole process groups of which every member is ours: a process that forks faster than we look cannot leave
/// its group behind in the middle of that.
fn kill_groups(found: &[ProcessId]) {
    let table = process::table();
    let groups: BTreeSet<u32> = found.iter().filter_map(|p| table.get(&p.pid).map(|s| s.pgrp)).collect();
    for group in groups {
        let mut members = table.iter().filter(|(_, s)| s.pgrp == group && s.state != 'Z');
        if members.all(|(pid, s)| found.contains(&ProcessId { pid: *pid, start_ticks: s.start_ticks })) {
            process::group_kill(group);
        }
    }
}

/// Who belongs to a weak container now. `known` carries members from look to look, so that a child stays a member after
/// its parent is gone. `fresh`: we started it ourselves, so the number of its session cannot have become another's.
/// `alone`: nothing else of ours runs that an unmarked orphan could belong to.
fn weak_members(
    record: &Record,
    known: &mut BTreeSet<ProcessId>,
    fresh: bool,
    alone: bool,
) -> Vec<ProcessId> {
    let table = process::table();
    let me = std::process::id();
    let id_of = |pid: u32| table.get(&pid).map(|s| ProcessId { pid, start_ticks: s.start_ticks });
    let there = |p: &ProcessId| id_of(p.pid) == Some(*p);
    let young = |p: &ProcessId| p.pid != me && p.start_ticks >= record.began_ticks;
    known.extend(record.leader);
    known.extend(marked(record));
    // A session's number stays taken while it has members, so it is ours while its first process is, or has just been.
    let mut sessions: BTreeSet<u32> = known
        .iter()
        .filter(|p| there(p) && table.get(&p.pid).is_some_and(|s| s.session == p.pid))
        .map(|p| p.pid)
        .collect();
    sessions.extend(record.leader.filter(|l| fresh && id_of(l.pid).is_none()).map(|l| l.pid));
    let in_session = table.iter().filter(|(_, s)| sessions.contains(&s.session));
    known.extend(in_session.filter_map(|(pid, _)| id_of(*pid)).filter(young));
    if alone {
        // An orphan that came to us since the step began, of no known origin and with no mark of anybody's.
        let orphans =
            table.iter().filter(|(pid, s)| s.ppid == me && s.state != 'Z' && !reap::is_known(**pid));
        known.extend(
            orphans
                .filter_map(|(pid, _)| id_of(*pid))
                .filter(young)
                .filter(|p| p.environ(MARK_ENV).is_none()),
        );
    }
    let roots: Vec<u32> = known.iter().filter(|p| there(p)).map(|p| p.pid).collect();
    known.extend(process::descendants_in(&table, &roots).into_iter().filter(young));
    let running = |p: &ProcessId| table.get(&p.pid).is_some_and(|s| !matches!(s.state, 'Z' | 'X'));
    known.iter().copied().filter(|p| there(p) && running(p)).collect()
}

// ---- cgroup v2 ----

/// Finds or makes `koboshi-NAME` below our own cgroup. The error is the reason for the weaker way.
fn cgroup_place(name: &str, records: &Path) -> std::result::Result<Place, String> {
    let mounts = read_text(Path::new("/proc/self/mountinfo"))?;
    let own = read_text(Path::new("/proc/self/cgroup"))?;
    let home = own_cgroup_dir(&mounts, &own)?;
    let leaf = format!("koboshi-{name}");
    let home = match home.file_name() {
        Some(last) if last == AGENT_LEAF => home.parent().unwrap_or(&home).to_path_buf(),
        Some(_) | None => home,
    };
    let base = earlier_base(records, &leaf).unwrap_or_else(|| home.join(&leaf));
    let made = |dir: &Path| match std::fs::create_dir(dir) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(format!("cannot make {}: {e}", dir.display())),
    };
    made(&base)?;
    let steps = base.join("steps");
    made(&steps)?;
    made(&base.join("gateway"))?;
    let parent = base.parent().unwrap_or(&base);
    // Moving a process needs write access to both ends and to their common ancestor.
    for dir in [parent, steps.as_path()] {
        OpenOptions::new()
            .write(true)
            .open(dir.join("cgroup.procs"))
            .map_err(|e| format!("may not move processes below {}: {e}", dir.display()))?;
    }
    let _ = std::fs::write(records.join("cgroup-base"), base.as_os_str().as_encoded_bytes());
    for dir in [parent, base.as_path(), steps.as_path()] {
        offer_controllers(dir);
    }
    let offered = std::fs::read_to_string(steps.join("cgroup.subtree_control")).unwrap_or_default();
    let has = |c: &str| offered.split_whitespace().any(|o| o == c);
    Ok(Place::Cgroup { base, memory: has("memory"), pids: has("pids") })
}

fn read_text(path: &Path) -> std::result::Result<String, String> {
    /// A host with thousands of mounts still fits.
    const LIMIT_BYTES: u64 = 16 << 20;
    let bytes = files::read_bounded(path, LIMIT_BYTES).map_err(|e| e.to_string())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The directory of our own cgroup in the v2 hierarchy.
pub(crate) fn own_cgroup_dir(mountinfo: &str, own: &str) -> std::result::Result<PathBuf, String> {
    let path = own.lines().find_map(|l| l.strip_prefix("0::")).ok_or("the kernel has no cgroup v2")?;
    let path = path.trim_end_matches(" (deleted)");
    let (root, point) = mountinfo
        .lines()
        .find_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            (right.split(' ').next()? == "cgroup2").then_some(())?;
            let fields: Vec<&str> = left.split(' ').collect();
            Some((unescape(fields.get(3)?), unescape(fields.get(4)?)))
        })
        .ok_or("no cgroup2 file system is mounted")?;
    let below = path
        .strip_prefix(root.trim_end_matches('/'))
        .filter(|rest| rest.is_empty() || rest.starts_with('/'))
        .filter(|rest| !rest.split('/').any(|part| part == ".."))
        .ok_or_else(|| format!("our cgroup {path} lies outside the mounted part {root}"))?;
    Ok(Path::new(&point).join(below.trim_start_matches('/')))
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> String {
    ["040", "011", "012", "134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(text.to_owned(), |t, (code, plain)| t.replace(&format!("\\{code}"), plain))
}

/// Where an earlier agent, perhaps started from elsewhere, made them, if something still lives there.
fn earlier_base(records: &Path, leaf: &str) -> Option<PathBuf> {
    let bytes = files::read_bounded(&records.join("cgroup-base"), RECORD_LIMIT_BYTES).ok()?;
    let base = PathBuf::from(String::from_utf8(bytes).ok()?);
    (base.file_name()? == leaf && populated(&base) == Some(true)).then_some(base)
}

/// Offers memory and pid limits to the children of `dir`, as far as `dir` has them itself. In a service's delegated
/// cgroup the kernel refuses while a process sits in it: if that is only us, we move into a leaf of our own.
fn offer_controllers(dir: &Path) {
    let offer = |c: &str| std::fs::write(dir.join("cgroup.subtree_control"), format!("+{c}"));
    let has = std::fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    for controller in ["memory", "pids"].into_iter().filter(|c| has.split_whitespace().any(|h| h == *c)) {
        if offer(controller).is_err() && only_us(dir) && move_to_leaf(dir).is_ok() {
            // Refused again: then there are no limits, which `strength` tells.
            let _ = offer(controller);
        }
    }
}

fn only_us(dir: &Path) -> bool {
    procs(dir) == [std::process::id()]
}

fn move_to_leaf(dir: &Path) -> std::io::Result<()> {
    let leaf = dir.join(AGENT_LEAF);
    match std::fs::create_dir(&leaf) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e),
        Ok(()) | Err(_) => {}
    }
    std::fs::write(leaf.join("cgroup.procs"), "0")
}

fn procs(dir: &Path) -> Vec<u32> {
    let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|l| l.parse().ok()).take(LIST_LIMIT).collect()
}

/// Everybody in a cgroup and the cgroups inside it.
fn procs_below(dir: &Path) -> Vec<u32> {
    cgroups_below(dir).iter().flat_map(|d| procs(d)).collect()
}

fn lists(dir: &Path, pid: u32) -> bool {
    procs_below(dir).contains(&pid)
}

/// The cgroup and those inside it, outermost first.
fn cgroups_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![(dir.to_path_buf(), 0)];
    while let Some((dir, depth)) = open.pop() {
        if depth < NESTING_LIMIT && found.len() < LIST_LIMIT {
            open.extend(names_in(&dir).map(|n| dir.join(n)).filter(|p| p.is_dir()).map(|p| (p, depth + 1)));
        }
        found.push(dir);
    }
    found
}

/// `None` when the cgroup does not exist.
pub(crate) fn populated(dir: &Path) -> Option<bool> {
    let text = std::fs::read_to_string(dir.join("cgroup.events")).ok()?;
    text.lines().find_map(|l| l.strip_prefix("populated ")).map(|v| v.trim() != "0")
}

/// An empty cgroup with its limits set; the answer is its `cgroup.procs`, open for writing.
fn fresh_cgroup(dir: &Path, which: Which<'_>, limits: Limits, memory: bool, pids: bool) -> Result<OwnedFd> {
    let what = || format!("making the cgroup {}", dir.display());
    if populated(dir) == Some(true) {
        return Err(occupied(which));
    }
    remove_cgroup(dir);
    std::fs::create_dir_all(dir).context(what)?;
    let wanted = [
        ("memory.max", limits.memory_bytes.filter(|_| memory)),
        // Without this a limited step would push others' memory into swap instead of being stopped.
        ("memory.swap.max", limits.memory_bytes.filter(|_| memory).map(|_| 0)),
        ("pids.max", limits.pids.filter(|_| pids)),
    ];
    for (file, value) in wanted {
        let path = dir.join(file);
        if let Some(value) = value.filter(|_| path.exists()) {
            std::fs::write(&path, value.to_string()).context(what)?;
        }
    }
    let procs = OpenOptions::new().write(true).open(dir.join("cgroup.procs")).context(what)?;
    Ok(OwnedFd::from(procs))
}

/// Kills everything in a cgroup and waits until the kernel says it is empty.
fn empty_cgroup(dir: &Path, which: Which<'_>, deadline: Deadline) -> Result<(u32, &'static str)> {
    const BY_KERNEL: &str = "cgroup.kill";
    const ONE_BY_ONE: &str = "cgroup, one by one";
    if populated(dir) != Some(true) {
        return Ok((0, BY_KERNEL));
    }
    let killed = count(procs_below(dir).len());
    let mut how = BY_KERNEL;
    loop {
        // Kernels before 5.14 cannot do it at once; then each is killed until the cgroup is empty.
        if std::fs::write(dir.join("cgroup.kill"), "1").is_err() {
            how = ONE_BY_ONE;
            let found: Vec<ProcessId> = procs_below(dir).into_iter().filter_map(ProcessId::of).collect();
            kill_all(&found);
        }
        let pause = deadline.min(Deadline::after(LOOK_AGAIN));
        if wait_empty(dir, pause)? {
            return Ok((killed, how));
        }
        if deadline.passed() {
            return Err(still_there(which, &procs_below(dir)));
        }
    }
}

fn wait_empty(dir: &Path, until: Deadline) -> Result<bool> {
    let Ok(events) = File::open(dir.join("cgroup.events")) else { return Ok(true) };
    loop {
        if populated(dir) != Some(true) {
            return Ok(true);
        }
        if until.passed() {
            return Ok(false);
        }
        // The file reports at once on a handle whose last report was not read, hence `populated` above.
        poll::changed(events.as_fd(), until)?;
    }
}

/// Removes an empty cgroup and those inside it, innermost first.
fn remove_cgroup(dir: &Path) {
    for dir in cgroups_below(dir).iter().rev() {
        // One that cannot be removed holds a process or is gone; the caller has just proven which.
        let _ = std::fs::remove_dir(dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
        33 31 0:30 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
    const PURE: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn our_cgroup_is_found_on_every_kind_of_host() {
        let found = |mounts: &str, own: &str| own_cgroup_dir(mounts, own).unwrap();
        let dir = Path::new;
        assert_eq!(found(HYBRID, "4:memory:/a\n0::/\n"), dir("/sys/fs/cgroup/unified"));
        assert_eq!(
            found(PURE, "0::/system.slice/koboshi.service\n"),
            dir("/sys/fs/cgroup/system.slice/koboshi.service")
        );
        // A part of the hierarchy mounted into a container without a namespace of its own.
        let part = "9 8 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        assert_eq!(found(part, "0::/docker/abc/x\n"), dir("/sys/fs/cgroup/x"));
        assert_eq!(found(part, "0::/docker/abc\n"), dir("/sys/fs/cgroup"));
        let spaced = "9 8 0:26 / /a\\040b\\134c rw - cgroup2 cgroup rw\n";
        assert_eq!(found(spaced, "0::/x\n"), dir("/a b\\c/x"));
    }

    #[test]
    fn where_there_is_none_it_says_why() {
        let part = "9 8 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        for (mounts, own) in [
            (HYBRID, "4:memory:/a\n"),
            ("", "0::/\n"),
            ("33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw\n", "0::/\n"),
            (part, "0::/docker/other\n"),
            (part, "0::/docker/abcdef\n"),
            (PURE, "0::/../../elsewhere\n"),
            ("garbage - cgroup2", "0::/\n"),
            ("", ""),
        ] {
            assert!(!own_cgroup_dir(mounts, own).unwrap_err().is_empty(), "{mounts:?} {own:?}");
        }
    }

    #[test]
    fn a_record_of_garbage_is_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("step-x.json");
        for bytes in [&b""[..], b"{}", b"\xff", b"{\"mark\":1}"] {
            std::fs::write(&path, bytes).unwrap();
            assert!(read_record(&path).is_none());
        }
    }
}
