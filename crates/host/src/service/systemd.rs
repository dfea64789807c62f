//! The gateway as a systemd unit, of the system or of a user.
//!
//! systemd is the one that starts: we ask with `--no-block` and read the unit's properties, never a message. A hold
//! is a drop-in below `/run` (or the user's runtime directory) that forbids restarts and fails the start's condition.
//! A runtime *mask* would not do: a unit file in `/etc` or in the user's own configuration, where gateways usually have
//! theirs, takes precedence over one, and systemd 252 reports success all the same. The drop-in works wherever the
//! unit lies, a reboot forgets it, any later agent sees it, and it cannot be taken for the owner's own mask.

use super::{Active, KILL_RESERVE, Manager, ServiceState, Stopped};
use crate::clock::{self, Deadline};
use crate::error::{Context, Error, Kind, Result};
use crate::process::ProcessId;
use crate::run::{Cmd, Ids, Output, run};
use crate::{container, files, poll};
use engine::words::Moment;
use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest answer one `systemctl` call may take; a manager that needs more is stuck.
const CALL_LIMIT: Duration = Duration::from_secs(20);
/// How often a unit on its way down is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Pause between looks when nothing can be waited on.
const LOOK_RARELY: Duration = Duration::from_millis(250);
/// Longest unit name systemd accepts.
const UNIT_NAME_LIMIT: usize = 255;
/// Largest `/proc/self/mountinfo` read.
const MOUNTS_LIMIT_BYTES: u64 = 16 << 20;
/// The drop-in that holds a unit down.
const HOLD_FILE: &str = "90-koboshi-hold.conf";
/// What it says. The path it asks for lies in no file system.
const HOLD_TEXT: &str = "# koboshi is repairing this service; removed by koboshi, at the latest by a reboot.\n\
    [Unit]\nConditionPathExists=/nonexistent/koboshi-hold\n[Service]\nRestart=no\n";

/// The properties read at a look.
const PROPERTIES: &str = "LoadState,ActiveState,SubState,UnitFileState,MainPID,Result,ExecMainCode,ExecMainStatus,\
    NRestarts,ControlGroup,StateChangeTimestampMonotonic,FragmentPath,DropInPaths,NeedDaemonReload,\
    TimeoutStopUSec,\
    Restart,RestartPreventExitStatus,StartLimitBurst";

/// Whose manager runs the unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The system's.
    System,
    /// This user's.
    User(Ids),
}

/// One unit under systemd.
#[derive(Debug, Clone)]
pub struct Systemd {
    unit: String,
    scope: Scope,
}

impl Systemd {
    /// The unit of the system manager.
    pub fn system(unit: &str) -> Result<Systemd> {
        Systemd::new(unit, Scope::System)
    }

    /// The unit of a user's manager, reached as that user.
    pub fn user(unit: &str, ids: Ids) -> Result<Systemd> {
        Systemd::new(unit, Scope::User(ids))
    }

    /// The unit in this scope. The name must be a service's full name.
    pub fn new(unit: &str, scope: Scope) -> Result<Systemd> {
        let sane = unit.len() <= UNIT_NAME_LIMIT
            && unit.ends_with(".service")
            && !unit.starts_with(['-', '.'])
            && unit
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, ':' | '_' | '.' | '@' | '-' | '\\'));
        if !sane {
            return Err(Error::new(
                Kind::Usage,
                format!("naming the unit {unit:?}"),
                "this is no service unit's name",
            ));
        }
        Ok(Systemd { unit: unit.to_string(), scope })
    }

    /// The unit's name.
    #[must_use]
    pub fn unit(&self) -> &str {
        &self.unit
    }

    /// A tool run as the one whose manager it is, in an environment that reaches it.
    fn tool(&self, program: &str, args: &[&str], deadline: Deadline) -> Result<Output> {
        let mut cmd = Cmd::new(program, args.iter().copied());
        cmd.env_clear = true;
        cmd.cwd = Some("/".into());
        let mut env = |key: &str, value: String| cmd.env.push((key.into(), value.into()));
        env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
        env("LC_ALL", "C".into());
        env("SYSTEMD_COLORS", "0".into());
        env("SYSTEMD_PAGER", String::new());
        if let Scope::User(ids) = self.scope {
            let runtime = self.runtime_dir();
            env("DBUS_SESSION_BUS_ADDRESS", format!("unix:path={}/bus", runtime.display()));
            env("XDG_RUNTIME_DIR", runtime.display().to_string());
            cmd.ids = (ids.uid != Ids::current().uid).then_some(ids);
        }
        run(&cmd, deadline.min(Deadline::after(CALL_LIMIT)))
    }

    /// `systemctl` in the unit's scope; an error carries its own words.
    fn systemctl(&self, args: &[&str], deadline: Deadline) -> Result<String> {
        let scope: &[&str] = match self.scope {
            Scope::System => &["--system"],
            Scope::User(_) => &["--user"],
        };
        let all = [scope, &["--no-pager", "--no-ask-password", "--quiet"], args].concat();
        let output = self.tool("systemctl", &all, deadline)?;
        if output.ok() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(self.refusal(&format!("systemctl {}", args.join(" ")), &output))
    }

    fn refusal(&self, what: &str, output: &Output) -> Error {
        if output.timed_out {
            return Error::new(Kind::TimedOut, what, "no answer in time");
        }
        let words = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
        // systemctl's documented statuses: 4 = no such unit, 5 = not loaded.
        let lower = words.to_lowercase();
        let kind = if matches!(output.status, Some(4 | 5)) || lower.contains("not found") {
            Kind::NotFound
        } else if lower.contains("access denied") || lower.contains("authentication") {
            Kind::Denied
        } else {
            Kind::System
        };
        let why = if words.is_empty() { format!("status {:?}", output.status) } else { words };
        let error = Error::new(kind, what, why);
        match self.scope {
            Scope::User(ids) if !self.runtime_dir().join("systemd").is_dir() => error.hint(format!(
                "no user manager runs for uid {}: loginctl enable-linger makes it start with the machine",
                ids.uid
            )),
            Scope::User(_) | Scope::System => error,
        }
    }

    /// Where this manager keeps what a reboot forgets.
    fn runtime_dir(&self) -> PathBuf {
        match self.scope {
            Scope::System => PathBuf::from("/run"),
            Scope::User(ids) => PathBuf::from(format!("/run/user/{}", ids.uid)),
        }
    }

    /// Where the hold's drop-in goes.
    fn hold_dir(&self) -> PathBuf {
        let kind = match self.scope {
            Scope::System => "systemd/system",
            Scope::User(_) => "systemd/user",
        };
        self.runtime_dir().join(kind).join(format!("{}.d", self.unit))
    }

    fn show(&self, deadline: Deadline) -> Result<Shown> {
        let text =
            self.systemctl(&["show", &format!("--property={PROPERTIES}"), "--", &self.unit], deadline)?;
        Ok(Shown::parse(&text))
    }

    fn daemon_reload(&self, deadline: Deadline) -> Result<()> {
        self.systemctl(&["daemon-reload"], deadline).map(drop)
    }

    /// The unit's cgroup directory, where the unified hierarchy shows it.
    fn cgroup_dir(&self, state: &ServiceState) -> Option<PathBuf> {
        // The root cgroup is never a unit's own: killing it would end the machine.
        let path = state.cgroup.as_deref().filter(|p| p.ends_with(&format!("/{}", self.unit)))?;
        let mounts = files::read_bounded(Path::new("/proc/self/mountinfo"), MOUNTS_LIMIT_BYTES).ok()?;
        container::own_cgroup_dir(&String::from_utf8_lossy(&mounts), &format!("0::{path}")).ok()
    }

    /// Waits until the unit is down and empty; `None` when `until` came first.
    fn wait_down(
        &mut self,
        main: Option<ProcessId>,
        until: Deadline,
        deadline: Deadline,
    ) -> Result<Option<ServiceState>> {
        if let Some(fd) = main.and_then(|p| p.open().ok()) {
            // Cheap and instant; what remains after it is looked at below.
            let _ = poll::readable(&[fd.as_fd()], until)?;
        }
        loop {
            let state = self.look(deadline)?;
            let down = matches!(state.active, Active::Inactive | Active::Failed) && state.main.is_none();
            let empty = self.cgroup_dir(&state).is_none_or(|dir| container::populated(&dir) != Some(true));
            if down && empty {
                return Ok(Some(state));
            }
            if until.passed() || deadline.left() < LOOK_RARELY {
                return Ok(None);
            }
            let pause = if main.is_some_and(ProcessId::alive) { LOOK_RARELY } else { LOOK_AGAIN };
            std::thread::sleep(pause.min(until.left()));
        }
    }

    /// Ends everything in the unit's cgroup at once, or through systemd where we may not.
    fn kill(&self, state: &ServiceState, deadline: Deadline) -> Result<()> {
        if let Some(dir) = self.cgroup_dir(state)
            && std::fs::write(dir.join("cgroup.kill"), "1").is_ok()
        {
            return Ok(());
        }
        // The option's name changed with systemd 252.
        self.systemctl(&["kill", "--kill-whom=all", "--signal=SIGKILL", "--", &self.unit], deadline)
            .or_else(|_| {
                self.systemctl(&["kill", "--kill-who=all", "--signal=SIGKILL", "--", &self.unit], deadline)
            })
            .map(drop)
    }
}

impl Manager for Systemd {
    fn kind(&self) -> &'static str {
        match self.scope {
            Scope::System => "systemd-system",
            Scope::User(_) => "systemd-user",
        }
    }

    fn look(&mut self, deadline: Deadline) -> Result<ServiceState> {
        Ok(self.show(deadline)?.state())
    }

    fn clear_latch(&mut self, deadline: Deadline) -> Result<()> {
        match self.systemctl(&["reset-failed", "--", &self.unit], deadline) {
            Ok(_) => Ok(()),
            // A unit that is not in memory has nothing to forget.
            Err(e) if e.kind == Kind::NotFound || e.why.contains("not loaded") => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn start(&mut self, deadline: Deadline) -> Result<()> {
        let shown = self.show(deadline)?;
        if shown.state().held {
            let what = format!("starting {}", self.unit);
            return Err(Error::new(Kind::Usage, what, "it is held down; release it first"));
        }
        if shown.is("NeedDaemonReload", "yes") {
            self.daemon_reload(deadline)?;
        }
        self.systemctl(&["start", "--no-block", "--", &self.unit], deadline).map(drop)
    }

    fn stop(&mut self, grace: Duration, deadline: Deadline) -> Result<Stopped> {
        let began = clock::now();
        let took_ms = || clock::now().since_ms(began).unwrap_or(0);
        let before = self.look(deadline)?;
        if before.known {
            self.systemctl(&["stop", "--no-block", "--", &self.unit], deadline)?;
        }
        let polite = Deadline::after(grace.min(deadline.left().saturating_sub(KILL_RESERVE)));
        if self.wait_down(before.main, polite, deadline)?.is_some() {
            return Ok(Stopped::Clean { took_ms: took_ms() });
        }
        let mut state = self.look(deadline)?;
        loop {
            self.kill(&state, deadline)?;
            let again = deadline.min(Deadline::after(KILL_RESERVE));
            if self.wait_down(state.main, again, deadline)?.is_some() {
                return Ok(Stopped::Killed { took_ms: took_ms() });
            }
            if deadline.left() < LOOK_RARELY {
                let why = format!(
                    "after SIGKILL systemd still says {:?}, main process {:?}",
                    state.active, state.main
                );
                return Err(Error::new(Kind::TimedOut, format!("stopping {}", self.unit), why));
            }
            state = self.look(deadline)?;
        }
    }

    fn hold(&mut self, deadline: Deadline) -> Result<()> {
        let dir = self.hold_dir();
        let what = || format!("holding {}", self.unit);
        match self.scope {
            Scope::System => {
                std::fs::create_dir_all(&dir).context(what)?;
                files::write_atomic(&dir.join(HOLD_FILE), HOLD_TEXT.as_bytes(), 0o644).context(what)?;
            }
            Scope::User(_) => {
                // Written by the user's own hand: a root agent touches nothing below a directory the user rules.
                let script = "umask 022; mkdir -p -- \"$1\" && printf '%s' \"$3\" > \"$1/$2\"";
                let dir = dir.display().to_string();
                let output =
                    self.tool("/bin/sh", &["-c", script, "sh", &dir, HOLD_FILE, HOLD_TEXT], deadline)?;
                if !output.ok() {
                    return Err(self.refusal(&what(), &output));
                }
            }
        }
        self.daemon_reload(deadline)
    }

    fn release(&mut self, deadline: Deadline) -> Result<()> {
        let dir = self.hold_dir();
        if dir.join(HOLD_FILE).symlink_metadata().is_err() && !self.look(deadline)?.held {
            return Ok(());
        }
        let what = || format!("releasing {}", self.unit);
        match self.scope {
            Scope::System => {
                match std::fs::remove_file(dir.join(HOLD_FILE)) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(what(), &e)),
                    Ok(()) | Err(_) => {}
                }
                // Others' drop-ins may lie beside it: then the directory stays.
                let _ = std::fs::remove_dir(&dir);
            }
            Scope::User(_) => {
                let script = "rm -f -- \"$1/$2\" && { rmdir -- \"$1\" 2>/dev/null || :; }";
                let dir = dir.display().to_string();
                let output = self.tool("/bin/sh", &["-c", script, "sh", &dir, HOLD_FILE], deadline)?;
                if !output.ok() {
                    return Err(self.refusal(&what(), &output));
                }
            }
        }
        self.daemon_reload(deadline)
    }

    fn reload(&mut self, deadline: Deadline) -> Result<()> {
        self.daemon_reload(deadline)
    }
}

/// What `systemctl show` printed.
struct Shown(HashMap<String, String>);

impl Shown {
    fn parse(text: &str) -> Shown {
        Shown(text.lines().filter_map(|l| l.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect())
    }

    fn get(&self, key: &str) -> &str {
        self.0.get(key).map_or("", String::as_str)
    }

    fn is(&self, key: &str, value: &str) -> bool {
        self.get(key) == value
    }

    fn number<N: std::str::FromStr>(&self, key: &str) -> Option<N> {
        self.get(key).parse().ok()
    }

    fn active(&self) -> Active {
        let sub = self.get("SubState");
        match self.get("ActiveState") {
            _ if sub.contains("auto-restart") => Active::AutoRestart,
            "active" | "reloading" | "refreshing" => Active::Active,
            "activating" => Active::Activating,
            "deactivating" => Active::Deactivating,
            "inactive" => Active::Inactive,
            "failed" => Active::Failed,
            _ => Active::Unknown,
        }
    }

    /// What the unit file's state says of starting with the machine.
    fn enabled(&self) -> Option<bool> {
        match self.get("UnitFileState") {
            "enabled" | "enabled-runtime" | "alias" => Some(true),
            "disabled" | "masked" | "masked-runtime" => Some(false),
            _ => None,
        }
    }

    /// Why systemd has given up, in few words.
    fn latched(&self) -> Option<String> {
        if self.active() != Active::Failed {
            return None;
        }
        let result = self.get("Result");
        Some(match self.exit().0 {
            Some(_) | None if result == "start-limit-hit" || self.ran_out_of_starts() => {
                "start limit reached".into()
            }
            Some(status) if result == "exit-code" => format!("exit status {status}"),
            Some(_) | None if result.is_empty() => "failed".into(),
            Some(_) | None => result.into(),
        })
    }

    /// At the start limit of a failing unit systemd keeps the last failure's result and only stops restarting: seen
    /// by a failure that its own settings say would have been followed by a restart.
    fn ran_out_of_starts(&self) -> bool {
        let restarting = match self.get("Restart") {
            "always" | "on-failure" => {
                matches!(self.get("Result"), "exit-code" | "signal" | "core-dump" | "watchdog")
            }
            _ => false,
        };
        let status = self.exit().0.map(|status| status.to_string()).unwrap_or_default();
        let prevented = self.get("RestartPreventExitStatus").split_whitespace().any(|s| s == status);
        let burst: u32 = self.number("StartLimitBurst").unwrap_or(0);
        let restarts: u32 = self.number("NRestarts").unwrap_or(0);
        restarting && !prevented && burst > 0 && restarts.saturating_add(1) >= burst
    }

    /// Status and signal, by the codes of waitid: 1 exited, 2 killed, 3 dumped core.
    fn exit(&self) -> (Option<i32>, Option<i32>) {
        let status = self.number("ExecMainStatus");
        match self.get("ExecMainCode") {
            "1" => (status, None),
            "2" | "3" => (None, status),
            _ => (None, None),
        }
    }

    fn state(&self) -> ServiceState {
        let (exit_status, exit_signal) = self.exit();
        let drop_ins = self.get("DropInPaths").split_whitespace();
        let mut files: Vec<String> =
            Some(self.get("FragmentPath")).filter(|p| !p.is_empty()).map(Into::into).into_iter().collect();
        files.extend(drop_ins.clone().filter(|p| !p.ends_with(HOLD_FILE)).map(Into::into));
        let load = self.get("LoadState");
        ServiceState {
            active: self.active(),
            known: !matches!(load, "" | "not-found"),
            enabled: self.enabled(),
            masked: load == "masked" || self.get("UnitFileState").starts_with("masked"),
            held: drop_ins.clone().any(|p| p.ends_with(HOLD_FILE)),
            main: self.number("MainPID").filter(|pid| *pid > 0).and_then(ProcessId::of),
            result: self.get("Result").into(),
            exit_status,
            exit_signal,
            restarts: self.number("NRestarts").unwrap_or(0),
            cgroup: Some(self.get("ControlGroup")).filter(|p| !p.is_empty()).map(Into::into),
            latched: self.latched(),
            since: self.number("StateChangeTimestampMonotonic").filter(|us| *us > 0).map(moment_of),
            files,
            stop_limit_ms: span_ms(self.get("TimeoutStopUSec")),
        }
    }
}

/// The moment of a systemd timestamp (microseconds of CLOCK_MONOTONIC). Suspends since then are not counted.
fn moment_of(monotonic_us: u64) -> Moment {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let now_ms =
        u64::try_from(now.tv_sec).unwrap_or(0) * 1_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000;
    let age_ms = now_ms.saturating_sub(monotonic_us / 1_000);
    let here = clock::now();
    Moment { boot: here.boot, ms: here.ms.saturating_sub(age_ms) }
}

/// A span as `systemctl show` prints it (`5min 30s`, `1.5s`, `infinity`), in milliseconds.
fn span_ms(text: &str) -> Option<u64> {
    let mut total = 0.0;
    for word in text.split_whitespace() {
        let cut = word.find(|c: char| c.is_ascii_alphabetic())?;
        let (number, unit) = word.split_at(cut);
        let factor = match unit {
            "us" => 0.001,
            "ms" => 1.0,
            "s" => 1_000.0,
            "min" => 60_000.0,
            "h" => 3_600_000.0,
            "d" => 86_400_000.0,
            "w" => 604_800_000.0,
            "month" => 2_629_800_000.0,
            "y" => 31_557_600_000.0,
            _ => return None,
        };
        total += number.parse::<f64>().ok()? * factor;
    }
    // Within a day's length the sum is exact to the millisecond; nothing here needs more.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    (!text.trim().is_empty()).then_some(total as u64)
}

#[cfg(test)]
mod tests;
