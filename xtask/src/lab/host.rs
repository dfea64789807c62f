//! One real host: its own systemd as first process, on a file system of its own, at a cable of the site's switch.
//!
//! A host is ended as a whole: cleanly by its own systemd, or at once by its cgroup (every process in one kernel
//! operation; what the kernel had not yet written survives, so it is a crash of the host and no power cut). A command
//! given to a host runs as root or as the node's user in a cgroup of its own inside the host's, with a deadline, and
//! nothing of it is left after it. No command can set the clock, which all hosts share with the machine.

use super::bystanders::Bystanders;
use super::cage;
use super::judge;
use super::net::{self, Cut, Switch};
use super::tool::{self, Out};
use crate::proc;
use rustix::process::Signal;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A host boots in 0.4 s on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// A host with a gateway that drains may take long; longer is a crash.
const STOP_LIMIT: Duration = Duration::from_secs(120);
/// Most commands.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);
/// How often a host's state is looked at.
const POLL: Duration = Duration::from_millis(50);
/// What a command in a host must not be able to do to the machine.
const NEVER: &str = "-sys_time,-sys_module,-sys_rawio,-wake_alarm";
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The signal on which systemd as first process powers off.
const POWER_OFF: &str = "SIGRTMIN+4";

/// A disk that is stuck: what its host reads from it does not come, until this is dropped.
pub(crate) struct Stuck {
    file: PathBuf,
    free: String,
}

impl Drop for Stuck {
    fn drop(&mut self) {
        if let Err(e) = std::fs::write(&self.file, &self.free) {
            println!("{} keeps a disk stuck: {e}", self.file.display());
        }
    }
}

/// Who runs a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum As {
    Root,
    Claw,
}

/// A host of a site.
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) index: u8,
    pub(crate) netns: String,
    /// The gateway's token, if a node was prepared on it.
    pub(crate) token: Option<String>,
    root: PathBuf,
    scratch: PathBuf,
    cgroups: Vec<PathBuf>,
    running: Option<Running>,
    binds: Vec<String>,
    /// It is left running when its scenario is over.
    pub(crate) keep: bool,
    /// Strangers that live on it.
    pub(crate) bystanders: Option<Bystanders>,
}

struct Running {
    nspawn: Child,
    /// The host's first process as we see it.
    init: u32,
}

impl Host {
    /// A host with this file system; it is not yet booted.
    pub(crate) fn new(
        name: &str,
        index: u8,
        root: PathBuf,
        switch: &Switch,
        cgroups: &[PathBuf],
        scratch: &Path,
    ) -> Result<Host, String> {
        let netns = switch.plug(name, index)?;
        let mut host = Host {
            name: name.to_owned(),
            index,
            cgroups: cgroups.iter().map(|c| c.join(&netns)).collect(),
            netns,
            token: None,
            root,
            scratch: scratch.to_owned(),
            running: None,
            binds: Vec::new(),
            keep: false,
            bystanders: None,
        };
        host.settle()?;
        host.token = judge::read_token(&host);
        Ok(host)
    }

    /// What makes it this host and no other: names, keys, machine id.
    fn settle(&self) -> Result<(), String> {
        self.write("/etc/hostname", &format!("{}\n", self.name))?;
        let mut hosts = format!("127.0.0.1 localhost\n127.0.1.1 {}\n", self.name);
        hosts += &format!("{0} registry.lab sink.lab\n", net::SERVICES);
        for index in 1..=net::HOSTS_LIMIT {
            hosts += &format!("{} n{index}\n", net::address(index));
        }
        self.write("/etc/hosts", &hosts)?;
        // Empty: a dead name server would make sudo and ssh wait.
        self.write("/etc/resolv.conf", "")?;
        self.write("/etc/machine-id", "")?;
        let key = self.path("/etc/ssh/ssh_host_ed25519_key");
        let _ = std::fs::remove_file(&key);
        let key = key.to_string_lossy().into_owned();
        let words =
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name.as_str(), "-f", key.as_str()];
        tool::must(&words, &self.scratch, COMMAND_LIMIT).map(drop)
    }

    /// A path of the host as the machine sees it. `/run`, `/dev` and `/proc` of a running host are not there.
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        self.root.join(inside.trim_start_matches('/'))
    }

    /// Writes a file of the host from outside.
    pub(crate) fn write(&self, inside: &str, text: &str) -> Result<(), String> {
        let file = self.path(inside);
        std::fs::write(&file, text).map_err(|e| format!("write {}: {e}", file.display()))
    }

    /// Lays a directory of the machine over one of the host's, from the next boot on.
    pub(crate) fn bind(&mut self, outside: &Path, inside: &str) {
        self.binds.push(format!("--bind={}:{inside}", outside.display()));
    }

    /// Moves a directory of the host that is not booted yet to an ext4 of its own, of this many MB.
    pub(crate) fn small_disk(&mut self, inside: &str, megabytes: u64) -> Result<(), String> {
        let name = inside.trim_start_matches('/').replace('/', "-");
        let image = self.scratch.join(format!("{}-{name}.ext4", self.netns));
        let mounted = self.scratch.join(format!("{}-{name}", self.netns));
        let file = File::create(&image).map_err(|e| format!("make {}: {e}", image.display()))?;
        file.set_len(megabytes << 20).map_err(|e| format!("size {}: {e}", image.display()))?;
        std::fs::create_dir_all(&mounted).map_err(|e| format!("make {}: {e}", mounted.display()))?;
        let (from, image, to) = (self.path(inside), image.to_string_lossy(), mounted.to_string_lossy());
        let from = from.to_string_lossy();
        let tool = |words: &[&str]| tool::must(words, &self.scratch, COMMAND_LIMIT).map(drop);
        tool(&["mkfs.ext4", "-q", "-m", "0", "-d", &from, &image])?;
        tool(&["mount", "-o", "loop", &image, &to])?;
        tool(&["chown", &format!("--reference={from}"), &to])?;
        tool(&["chmod", &format!("--reference={from}"), &to])?;
        self.bind(&mounted, inside);
        Ok(())
    }

    /// Makes a directory of the host that is not booted yet the lower layer of an overlay.
    pub(crate) fn overlay(&mut self, inside: &str, work: &Path) -> Result<(), String> {
        let dirs = ["upper", "work", "merged"].map(|d| work.join(d));
        for dir in &dirs {
            std::fs::create_dir_all(dir).map_err(|e| format!("make {}: {e}", dir.display()))?;
        }
        let lower = self.path(inside);
        let [upper, work, merged] = &dirs;
        let (lower, upper, work) = (lower.display(), upper.display(), work.display());
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        let to = merged.to_string_lossy();
        tool::must(&["mount", "-t", "overlay", "lab", "-o", &options, &to], &self.scratch, COMMAND_LIMIT)?;
        self.bind(merged, inside);
        Ok(())
    }

    /// Fills the disk on which a directory lies until not one small file more can be written; as root, so nothing is kept
    /// back. The number of free blocks says little: a file system may keep some that it gives to nobody.
    pub(crate) fn fill(&self, inside: &str) -> Result<(), String> {
        let (filler, probe) = (format!("{inside}/.lab-filler"), format!("{inside}/.lab-probe"));
        // What large writes are refused small ones still get: the file system keeps room for what it has only promised.
        let small =
            format!("dd if=/dev/zero of={filler} bs=4096 count=1 oflag=append,sync conv=notrunc 2>/dev/null");
        let tried =
            format!("dd if=/dev/zero of={probe} bs=4096 count=1 conv=fsync 2>/dev/null && echo written");
        let script = format!(
            "cat /dev/zero > {filler} 2>/dev/null; sync {filler}; for i in $(seq 5000); do {small} || break; done; \
             {tried}; rm -f {probe}"
        );
        let out = self.root(&script)?;
        if out.out.contains("written") { Err(format!("{inside} still takes a file")) } else { Ok(()) }
    }

    /// Makes the disk on which a directory lies stick for this host: whoever reads what is not in memory waits for it,
    /// can be killed, and gets it when the disk is let go. `cold` says which files are first taken out of memory.
    pub(crate) fn stick(&self, inside: &str, cold: &str) -> Result<Stuck, String> {
        let device = self.must(&format!("sync -f {inside}; stat -c '%Hd:%Ld' {inside}"))?;
        let throttle = "blkio.throttle.read_bps_device";
        let old = self.cgroups.iter().map(|c| c.join(throttle)).find(|file| file.exists());
        let stuck = match (old, self.cgroups.first()) {
            (Some(file), _) => (file, format!("{device} 1"), format!("{device} 0")),
            (None, Some(dir)) => {
                for above in dir.ancestors().skip(1).take(2) {
                    // Refused where it is not ours to give, or given already; what counts is the limit itself.
                    let _ = std::fs::write(above.join("cgroup.subtree_control"), "+io");
                }
                (dir.join("io.max"), format!("{device} rbps=1"), format!("{device} rbps=max"))
            }
            (None, None) => return Err("a host without a cgroup".to_owned()),
        };
        let (file, limit, free) = stuck;
        self.must(&format!("find {cold} -type f -exec dd if={{}} iflag=nocache count=0 status=none \\;"))?;
        std::fs::write(&file, limit).map_err(|e| format!("write {}: {e}", file.display()))?;
        Ok(Stuck { file, free })
    }

    pub(crate) fn unfill(&self, inside: &str) -> Result<(), String> {
        self.must(&format!("rm {inside}/.lab-filler")).map(drop)
    }

    // ---- up and down ----

    /// Boots it and waits until its systemd has settled.
    pub(crate) fn boot(&mut self) -> Result<(), String> {
        if self.running.is_some() {
            return Err(format!("{} runs already", self.name));
        }
        for dir in &self.cgroups {
            std::fs::create_dir_all(dir).map_err(|e| format!("make {}: {e}", dir.display()))?;
        }
        let log = self.scratch.join(format!("{}.console", self.netns));
        let console = File::options().create(true).append(true).open(&log);
        let console = console.map_err(|e| format!("make {}: {e}", log.display()))?;
        let again = console.try_clone().map_err(|e| format!("open {} twice: {e}", log.display()))?;
        let mut c = self.entering("exec \"$@\"", &self.cgroups);
        c.arg("sh")
            .args(["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot"])
            .arg(format!("--network-namespace-path=/run/netns/{}", self.netns))
            .arg(format!("--machine={}", self.name))
            .arg("--directory")
            .arg(&self.root)
            .args(["--console=pipe", "--resolv-conf=off", "--timezone=off", "--link-journal=no"])
            .arg(format!("--kill-signal={POWER_OFF}"))
            .args(&self.binds)
            .env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1")
            .env("SYSTEMD_NSPAWN_LOCK", "0")
            .env("SYSTEMD_SECCOMP", "0")
            .env("SYSTEMD_NSPAWN_TMPFS_TMP", "0")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(console)
            .stderr(again);
        let nspawn = c.spawn().map_err(|e| format!("start systemd-nspawn: {e}"))?;
        self.running = Some(Running { nspawn, init: 0 });
        let started = Instant::now();
        loop {
            if let Some(init) = self.find_init() {
                if let Some(running) = &mut self.running {
                    running.init = init;
                }
                let state = self.command(As::Root, "systemctl is-system-running", COMMAND_LIMIT)?;
                if matches!(state.out.trim(), "running" | "degraded") {
                    return Ok(());
                }
            }
            if started.elapsed() > BOOT_LIMIT {
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                let tail: Vec<&str> = said.lines().rev().take(8).collect();
                return Err(format!("{} did not boot in {} s: {tail:?}", self.name, BOOT_LIMIT.as_secs()));
            }
            std::thread::sleep(POLL);
        }
    }

    /// nspawn's one child, once it is the host's first process.
    fn find_init(&self) -> Option<u32> {
        let nspawn = self.running.as_ref()?.nspawn.id();
        let below = proc::family(nspawn);
        let init = below.iter().find(|id| proc::stat(id.pid).is_some_and(|s| s.ppid == nspawn))?;
        let comm = std::fs::read_to_string(format!("/proc/{}/comm", init.pid)).ok()?;
        (comm.trim() == "systemd").then_some(init.pid)
    }

    fn init(&self) -> Result<u32, String> {
        let running = self.running.as_ref().ok_or_else(|| format!("{} is not up", self.name))?;
        if running.init == 0 { Err(format!("{} is still booting", self.name)) } else { Ok(running.init) }
    }

    fn look_at_bystanders(&self) {
        if let Some(bystanders) = &self.bystanders
            && self.init().is_ok()
        {
            bystanders.look(self);
        }
    }

    /// Powers it off by its own systemd; what does not end is crashed and told as an error.
    pub(crate) fn stop(&mut self) -> Result<(), String> {
        if self.running.is_none() {
            return Ok(());
        }
        self.look_at_bystanders();
        // A host that no longer takes the order is crashed below.
        let _ = self.command(As::Root, "systemctl --no-block poweroff", COMMAND_LIMIT);
        if self.ended_within(STOP_LIMIT) {
            return self.gone();
        }
        self.crash()?;
        Err(format!("{} did not power off in {} s", self.name, STOP_LIMIT.as_secs()))
    }

    /// Reboots it as its administrator would.
    pub(crate) fn reboot(&mut self) -> Result<(), String> {
        self.look_at_bystanders();
        self.command(As::Root, "systemctl --no-block reboot", COMMAND_LIMIT)?;
        // nspawn that was told to keep its unit ends here and leaves the next boot to us.
        if !self.ended_within(STOP_LIMIT) {
            self.crash()?;
            return Err(format!("{} did not go down to reboot in {} s", self.name, STOP_LIMIT.as_secs()));
        }
        self.gone()?;
        self.boot()
    }

    /// Every process of the host dies in one kernel operation.
    pub(crate) fn crash(&mut self) -> Result<(), String> {
        self.look_at_bystanders();
        if let Some(dir) = self.cgroups.first() {
            let file = dir.join("cgroup.kill");
            std::fs::write(&file, "1").map_err(|e| format!("write {}: {e}", file.display()))?;
        }
        if !self.ended_within(STOP_LIMIT) {
            return Err(format!("{} survived cgroup.kill", self.name));
        }
        self.gone()
    }

    fn ended_within(&mut self, limit: Duration) -> bool {
        let Some(running) = &mut self.running else { return true };
        let started = Instant::now();
        loop {
            if !matches!(running.nspawn.try_wait(), Ok(None)) {
                return true;
            }
            if started.elapsed() > limit {
                return false;
            }
            std::thread::sleep(POLL);
        }
    }

    /// Its first process has ended: its cgroups must become empty.
    fn gone(&mut self) -> Result<(), String> {
        self.running = None;
        let started = Instant::now();
        for dir in &self.cgroups {
            while !cage::remove_cgroups(dir) {
                if started.elapsed() > STOP_LIMIT {
                    return Err(format!("something of {} still runs in {}", self.name, dir.display()));
                }
                std::thread::sleep(POLL);
            }
        }
        Ok(())
    }

    /// Stops every process of the host in its place: connections open, nothing answers.
    pub(crate) fn freeze(&self, frozen: bool) -> Result<(), String> {
        let Some(dir) = self.cgroups.first() else { return Ok(()) };
        let file = dir.join("cgroup.freeze");
        std::fs::write(&file, if frozen { "1" } else { "0" })
            .map_err(|e| format!("write {}: {e}", file.display()))
    }

    // ---- commands ----

    /// A script as root.
    pub(crate) fn root(&self, script: &str) -> Result<Out, String> {
        self.command(As::Root, script, COMMAND_LIMIT)
    }

    pub(crate) fn root_within(&self, script: &str, limit: Duration) -> Result<Out, String> {
        self.command(As::Root, script, limit)
    }

    /// A script as the node's user, with the environment of a login and of the user's own systemd.
    pub(crate) fn claw(&self, script: &str) -> Result<Out, String> {
        self.command(As::Claw, script, COMMAND_LIMIT)
    }

    pub(crate) fn claw_within(&self, script: &str, limit: Duration) -> Result<Out, String> {
        self.command(As::Claw, script, limit)
    }

    /// As root; anything but status 0 is an error, else its output without the last line's end.
    pub(crate) fn must(&self, script: &str) -> Result<String, String> {
        self.succeeded(script, &self.root(script)?)
    }

    /// The same as the node's user.
    pub(crate) fn claw_must(&self, script: &str) -> Result<String, String> {
        self.succeeded(script, &self.claw(script)?)
    }

    pub(crate) fn claw_must_within(&self, script: &str, limit: Duration) -> Result<String, String> {
        self.succeeded(script, &self.claw_within(script, limit)?)
    }

    fn succeeded(&self, script: &str, out: &Out) -> Result<String, String> {
        if out.ok() {
            return Ok(out.out.trim_end().to_owned());
        }
        let line = script.lines().find(|l| !l.trim().is_empty()).unwrap_or_default();
        Err(format!("on {}: `{line}`: {}", self.name, out.words()))
    }

    fn command(&self, who: As, script: &str, limit: Duration) -> Result<Out, String> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let init = self.init()?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // Inside the host's own tree, so that the command sees itself where a process of this host may be.
        let mine: Vec<PathBuf> = self
            .cgroups
            .iter()
            .map(|c| c.join(format!("payload/lab-{number}")))
            .filter(|c| make(c))
            .collect();
        let mut c = self.entering("exec nsenter \"$@\"", &mine);
        c.arg("sh").args(["--target", &init.to_string(), "--all", "--wdns=/", "--"]);
        c.args(["setpriv", "--bounding-set", NEVER]);
        let (home, user, path) = match who {
            As::Root => ("/root", "root", SYSTEM_PATH.to_owned()),
            As::Claw => {
                c.args(["--reuid", "claw", "--regid", "claw", "--init-groups"]);
                ("/home/claw", "claw", format!("/home/claw/.npm-global/bin:{SYSTEM_PATH}"))
            }
        };
        c.args(["--", "env", "-i", "TERM=dumb", "LANG=C.UTF-8"]);
        c.arg(format!("PATH={path}")).arg(format!("HOME={home}"));
        c.arg(format!("USER={user}")).arg(format!("LOGNAME={user}"));
        if who == As::Claw {
            c.arg("XDG_RUNTIME_DIR=/run/user/1000")
                .arg("DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/1000/bus");
        }
        c.args(["bash", "-c"]).arg(format!("cd {home} && {script}"));
        let result = tool::run(c, &self.scratch, limit);
        if let Some(dir) = mine.first() {
            // What the command left in its place ends with it.
            let _ = std::fs::write(dir.join("cgroup.kill"), "1");
        }
        let started = Instant::now();
        for dir in &mine {
            while !cage::remove_cgroups(dir) && started.elapsed() < COMMAND_LIMIT {
                std::thread::sleep(POLL / 10);
            }
        }
        result
    }

    /// A shell that first goes into these cgroups and then does `then` with the arguments that are added.
    fn entering(&self, then: &str, cgroups: &[PathBuf]) -> Command {
        let mut script = String::new();
        for dir in cgroups {
            script += &format!("echo 0 > '{}/cgroup.procs' || exit 125\n", dir.display());
        }
        let mut c = Command::new("sh");
        c.arg("-c").arg(script + then);
        c
    }

    // ---- processes in it ----

    /// `Property=value` lines of the gateway's unit.
    pub(crate) fn unit(&self, unit: super::Unit, property: &str) -> Result<String, String> {
        self.must(&format!("{} show -P {property} openclaw-gateway.service", unit.systemctl()))
    }

    /// Pid and start time of a process, as the host sees both.
    pub(crate) fn identity(&self, pid: u32) -> Result<String, String> {
        self.must(&format!("sed 's/.*) //' /proc/{pid}/stat | cut -d' ' -f20 | sed 's/^/{pid} /'"))
    }

    /// Every gateway that runs: processes whose executable is a Node and whose title or arguments are a gateway's.
    pub(crate) fn gateways(&self) -> Result<Vec<u32>, String> {
        let script = "for d in /proc/[0-9]*; do \
            case $(readlink $d/exe) in */bin/node|*/bin/node' (deleted)') ;; *) continue;; esac; \
            line=$(tr '\\0' ' ' < $d/cmdline 2>/dev/null); \
            case $line in openclaw-gateway*|*'dist/index.js gateway'*) echo ${d#/proc/};; esac; done; true";
        Ok(self.must(script)?.lines().filter_map(|l| l.parse().ok()).collect())
    }

    /// Cuts it off; see [`Switch::cut`].
    pub(crate) fn cut(&self, switch: &Switch, cut: Cut) -> Result<(), String> {
        switch.cut(&self.name, &self.netns, cut)
    }

    pub(crate) fn mend(&self, switch: &Switch) -> Result<(), String> {
        switch.mend(&self.name, &self.netns)
    }

    /// How a person enters it while the lab is kept.
    pub(crate) fn how_to_enter(&self) -> String {
        let procs = self.cgroups.first().map(|c| c.join("payload/init.scope/cgroup.procs"));
        let procs = procs.unwrap_or_default();
        format!("{}: nsenter --all --target $(head -n 1 {}) bash -l", self.name, procs.display())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.keep {
            println!("up: {}", self.how_to_enter());
            return;
        }
        self.look_at_bystanders();
        if let Some(mut running) = self.running.take() {
            if let Some(dir) = self.cgroups.first() {
                let _ = std::fs::write(dir.join("cgroup.kill"), "1");
            }
            proc::signal(&[running.nspawn.id()], Signal::KILL);
            let _ = running.nspawn.wait();
            let started = Instant::now();
            for dir in &self.cgroups {
                while !cage::remove_cgroups(dir) && started.elapsed() < STOP_LIMIT {
                    std::thread::sleep(POLL);
                }
            }
        }
    }
}

fn make(dir: &Path) -> bool {
    std::fs::create_dir(dir).is_ok()
}
