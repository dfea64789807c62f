//! What koboshi promises under a real systemd.

use crate::lab::disk::Template;
use crate::lab::host::Host;
use crate::lab::judge;
use crate::lab::koboshi::{Before, Home, Koboshi};
use crate::lab::{Play, Unit};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// A gateway's start: 15 s on an idle machine, minutes on a crowded one; koboshi itself waits as long.
const START: Duration = Duration::from_secs(900);
/// A climb ends within its 600 s.
const CLIMB: Duration = Duration::from_secs(600);
/// An incident is closed once the node was confirmed for some seconds.
const CLOSE: Duration = Duration::from_secs(120);
const ROOT: Koboshi = Koboshi(Home::Root);

/// A serving node with koboshi as a service of root, settled.
fn guarded(play: &mut Play, unit: Unit) -> Result<(Host, Before), String> {
    let host = play.node("n1", unit)?;
    judge::serves_within(&host, START)?;
    ROOT.install(&host, true)?;
    settled(play, ROOT, &host)?;
    let before = Before::take(&host)?;
    Ok((host, before))
}

fn settled(play: &mut Play, koboshi: Koboshi, host: &Host) -> Result<(), String> {
    let settled = koboshi.settled(host);
    if settled.is_err() {
        play.remember(host);
    }
    settled.map(drop)
}

/// Plays something on a host and keeps its logs if it failed.
fn on(
    play: &mut Play,
    host: &mut Host,
    act: impl FnOnce(&mut Play, &mut Host) -> Result<(), String>,
) -> Result<(), String> {
    let failed = play.count.failed;
    let result = act(play, host);
    if result.is_err() || play.count.failed > failed {
        play.remember(host);
    }
    result
}

/// The newest incident, once it is closed and the node confirmed.
fn closed(play: &mut Play, koboshi: Koboshi, host: &Host, what: &str) -> Result<Value, String> {
    koboshi.wait(host, CLOSE, "a closed incident", |s| s["incident"].is_null() && s["confirmed"] == true)?;
    let all = koboshi.incidents(host)?;
    let last = all.last().cloned().ok_or_else(|| format!("{what}: no incident is on record"))?;
    play.claim(last["outcome"] == "recovered", &format!("{what}: the incident ended as recovered"), || {
        last.to_string()
    });
    Ok(last)
}

/// systemd itself restarts a killed gateway, which needs no incident; if there was one, it is over.
fn nothing_open(play: &mut Play, koboshi: Koboshi, host: &Host, what: &str) -> Result<(), String> {
    let calm =
        koboshi.wait(host, CLOSE, "a closed incident", |s| s["incident"].is_null() && s["confirmed"] == true);
    play.expect(calm, &format!("{what}: koboshi is sure of it too and has nothing open"));
    let all = koboshi.incidents(host)?;
    let bad: Vec<&Value> = all.iter().filter(|i| i["outcome"] != "recovered").collect();
    play.claim(bad.is_empty(), &format!("{what}: no incident ended otherwise than recovered"), || {
        format!("{bad:?}")
    });
    play.say(&format!("{} incidents are on record", all.len()));
    Ok(())
}

fn main_pid(host: &Host, unit: Unit) -> Result<u32, String> {
    host.unit(unit, "MainPID")?.parse().map_err(|e| format!("MainPID: {e}"))
}

// ---- install ----

/// Everything on a host but what the kernel makes: path to kind, mode, owner, size, time, and for small files the hash.
fn picture(host: &Host) -> Result<BTreeMap<String, String>, String> {
    // Into a file of the host, where nothing is looked at: it is longer than what a command may say.
    let script = "find / -xdev \\( -path /proc -o -path /sys -o -path /run -o -path /dev -o -path /tmp \\) -prune \
        -o -printf '%p\\t%y %m %U %G %s %T@ %C@ %l\\n' > /tmp/picture";
    let out = host.root_within(script, Duration::from_secs(300))?;
    let file = host.path("/tmp/picture");
    let bytes = std::fs::read(&file).map_err(|e| format!("read {}: {e}", file.display()))?;
    let text = String::from_utf8_lossy(&bytes);
    let pairs = text.lines().filter_map(|l| l.split_once('\t'));
    let picture: BTreeMap<String, String> =
        pairs.map(|(p, s)| (p.to_owned(), without_its_change(p, s))).collect();
    if picture.len() < 20_000 {
        return Err(format!("only {} files were seen: {}", picture.len(), out.err));
    }
    Ok(picture)
}

/// What was seen of a path, but of the gateway's own state directory not when its inode was last changed: the gateway sets
/// its mode, to what it is, whenever it opens its database (seen 14 s and a minute after its start).
fn without_its_change(path: &str, seen: &str) -> String {
    const STATE: &str = "/home/claw/.openclaw/state";
    // Kind, mode, owner, group, size, last written, last changed, target.
    const CHANGED: usize = 6;
    let fields = seen.split(' ').enumerate().filter(|(n, _)| path != STATE || *n != CHANGED);
    fields.map(|(_, field)| field).collect::<Vec<_>>().join(" ")
}

/// A picture of a host that has come to rest: a gateway that has just become ready goes on setting the modes of its own
/// state directory (watched: until 14 s after its start, and never again while koboshi was installed and removed).
fn quiet_picture(host: &Host) -> Result<BTreeMap<String, String>, String> {
    let mut before = picture(host)?;
    for _ in 0..20 {
        std::thread::sleep(Duration::from_secs(5));
        let now = picture(host)?;
        if foreign(host, changed(&before, &now)).is_empty() {
            return Ok(now);
        }
        before = now;
    }
    Err("the host never came to rest, although koboshi is not on it".to_owned())
}

/// Paths that differ between two pictures, except directories whose only change is that something of koboshi's was
/// put into them.
fn changed(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) -> Vec<String> {
    let all = before.keys().chain(after.keys().filter(|k| !before.contains_key(*k)));
    all.filter(|k| before.get(*k) != after.get(*k)).cloned().collect()
}

/// Where koboshi may write when it is installed as a service of root, and the directories these lie in.
const OWN: [&str; 5] = [
    // What it had to tell the owner and could tell nowhere else.
    "/home/claw/koboshi-alerts.txt",
    "/etc/koboshi",
    "/var/lib/koboshi",
    "/etc/systemd/system/koboshi.service",
    "/etc/systemd/system/multi-user.target.wants/koboshi.service",
];
const OWN_PARENTS: [&str; 5] =
    ["/home/claw", "/etc", "/var/lib", "/etc/systemd/system", "/etc/systemd/system/multi-user.target.wants"];
/// What a serving gateway and the host's own journal write by themselves all the time.
const NODES_OWN: [&str; 5] = [
    "/home/claw/.openclaw/state/openclaw.sqlite",
    "/home/claw/.openclaw/agents/main/agent/openclaw-agent.sqlite",
    "/home/claw/.openclaw/logs",
    "/home/claw/.openclaw/cache",
    "/var/log/journal",
];

/// What npm leaves of the one question that a gateway asks it by itself, seconds after it is ready: `npm root --global`.
/// Seen on a host that never had koboshi on it. Anything else in that directory is somebody's doing.
const NPM_LOGS: &str = "/home/claw/.npm/_logs";

/// Takes out what the gateway had npm write; a log that says of itself that it is of another run stays in.
fn without_the_gateways_npm(host: &Host, mut paths: Vec<String>) -> Vec<String> {
    paths.retain(|p| {
        let log = p == NPM_LOGS || p.starts_with(&format!("{NPM_LOGS}/"));
        let asked = || {
            let text = std::fs::read_to_string(host.path(p)).unwrap_or_default();
            text.contains(r#"verbose argv "root" "--global""#)
        };
        !log || p != NPM_LOGS && host.path(p).exists() && !asked()
    });
    paths
}

fn foreign(host: &Host, changed: Vec<String>) -> Vec<String> {
    let below = |p: &str, roots: &[&str]| {
        roots.iter().any(|r| p == *r || p.starts_with(&format!("{r}/")) || p.starts_with(&format!("{r}-")))
    };
    without_the_gateways_npm(host, changed)
        .into_iter()
        .filter(|p| !below(p, &OWN) && !OWN_PARENTS.contains(&p.as_str()) && !below(p, &NODES_OWN))
        .collect()
}

pub(super) fn install(play: &mut Play) -> Result<(), String> {
    let mut host = play.node("n1", Unit::User)?;
    judge::serves_within(&host, START)?;
    on(play, &mut host, |play, host| {
        let pid = main_pid(host, Unit::User)?;
        let identity = host.identity(pid)?;
        let hello = judge::hello(host)?;
        let first = quiet_picture(host)?;
        ROOT.install(host, true)?;
        settled(play, ROOT, host)?;
        let second = picture(host)?;
        let foreign_changes = foreign(host, changed(&first, &second));
        play.claim(foreign_changes.is_empty(), "no byte outside koboshi's own places changed", || {
            let both = |p: &String| format!("{p}: {:?} became {:?}", first.get(p), second.get(p));
            foreign_changes.iter().map(both).collect::<Vec<_>>().join("; ")
        });
        let own = changed(&first, &second).iter().any(|p| p == "/etc/systemd/system/koboshi.service");
        play.claim(own, "its unit was seen to appear", || "it was not".to_owned());
        let now = host.identity(main_pid(host, Unit::User)?)?;
        play.claim(now == identity, "the gateway is the same process, since the same tick", || {
            format!("{identity}: {now}")
        });
        let same = judge::hello(host)?;
        play.claim(same == hello, "it has not been restarted", || format!("{same:?}"));
        let active =
            host.must("systemctl is-active koboshi.service; systemctl is-enabled koboshi.service")?;
        play.claim(active == "active\nenabled", "koboshi's unit is active and enabled", || active.clone());
        let again = ROOT.install(host, true)?;
        let third = picture(host)?;
        let moved: Vec<String> = foreign(host, changed(&second, &third));
        play.claim(moved.is_empty(), "installing again changes nothing", || format!("{moved:?} {again}"));
        let out = ROOT.run(host, "alert test", START)?;
        play.claim(out.ok(), "an alert reaches its receiver", || out.words());
        let alerts = play.sink()?.alerts();
        play.claim(!alerts.is_empty(), "and was received", || "nothing was".to_owned());
        let out = ROOT.run(host, "uninstall --purge", START)?;
        play.claim(out.ok(), "it can be uninstalled", || out.words());
        let fourth = picture(host)?;
        let left = foreign(host, changed(&first, &fourth));
        play.claim(left.is_empty(), "uninstalling changes nothing of others either", || format!("{left:?}"));
        // A drop-in that a person wrote is not koboshi's to remove; here the lab wrote one.
        // What it told the owner is the owner's.
        let told = "/home/claw/koboshi-alerts.txt";
        let kept = ["/etc/koboshi", "/etc/koboshi/koboshi.d", "/etc/koboshi/koboshi.d/lab.toml", told];
        let below = |p: &str| OWN.iter().any(|o| p == *o || p.starts_with(&format!("{o}/")));
        let own: Vec<&String> =
            fourth.keys().filter(|p| below(p.as_str()) && !kept.contains(&p.as_str())).collect();
        play.claim(own.is_empty(), "and leaves nothing of its own when told to purge", || format!("{own:?}"));
        let rest = host.must("pgrep -c koboshi; true")?;
        play.claim(rest == "0", "no process of koboshi's is left", || rest.clone());
        let now = host.identity(main_pid(host, Unit::User)?)?;
        play.claim(now == identity, "the gateway is still the same process", || format!("{identity}: {now}"));
        Ok(())
    })
}

// ---- falls ----

pub(super) fn kill(play: &mut Play) -> Result<(), String> {
    let (mut host, before) = guarded(play, Unit::User)?;
    on(play, &mut host, |play, host| {
        let pid = main_pid(host, Unit::User)?;
        host.must(&format!("kill -STOP {pid}"))?;
        before.righted(play, host, "SIGSTOP", START)?;
        closed(play, ROOT, host, "SIGSTOP")?;

        let hello = judge::hello(host)?;
        let identity = host.identity(main_pid(host, Unit::User)?)?;
        let agent = ROOT.agent(host)?;
        host.must(&format!("kill -9 {agent}"))?;
        let back = ROOT.wait(host, START, "another agent that is sure of the node", |s| {
            s["agent"]["pid"].as_u64().is_some_and(|p| p != u64::from(agent))
                && s["confirmed"] == true
                && s["gateway"].is_object()
        });
        play.expect(back, "agent killed: systemd brings it back and it adopts the gateway");
        let now = host.identity(main_pid(host, Unit::User)?)?;
        play.claim(now == identity, "agent killed: the gateway is untouched", || {
            format!("{identity}: {now}")
        });
        let same = judge::hello(host)?;
        play.claim(same == hello, "agent killed: it serves on", || format!("{same:?}"));

        let before = Before::take(host)?;
        let restarts = host.unit(Unit::User, "NRestarts")?;
        let pid = main_pid(host, Unit::User)?;
        host.must(&format!("kill -9 {pid}"))?;
        before.righted(play, host, "SIGKILL", START)?;
        let again = host.unit(Unit::User, "NRestarts")?;
        let starters = format!("systemd restarted it {restarts} times before and {again} after");
        play.say(&starters);
        nothing_open(play, ROOT, host, "SIGKILL")?;
        let cgroup = host.must(&format!("cat /proc/{}/cgroup", main_pid(host, Unit::User)?))?;
        play.claim(cgroup.contains("openclaw-gateway.service"), "SIGKILL: it runs in its unit", || {
            cgroup.clone()
        });
        Ok(())
    })
}

pub(super) fn program(play: &mut Play) -> Result<(), String> {
    let (mut host, before) = guarded(play, Unit::User)?;
    on(play, &mut host, |play, host| deleted(play, ROOT, host, Unit::User, &before))
}

/// A drop-in that came after the snapshot and with which no start succeeds: nothing that is remembered differs.
pub(super) fn drop_in(play: &mut Play) -> Result<(), String> {
    let (mut host, before) = guarded(play, Unit::User)?;
    on(play, &mut host, |play, host| {
        let dir = "/home/claw/.config/systemd/user/openclaw-gateway.service.d";
        host.claw_must(&format!(
            "mkdir -p {dir} && printf '[Service]\nEnvironment=NODE_OPTIONS=--require=/opt/gone.cjs\n' > {dir}/50-options.conf \
             && systemctl --user daemon-reload"
        ))?;
        host.must(&format!("kill -9 {}", main_pid(host, Unit::User)?))?;
        before.righted(play, host, "an option too many", CLIMB)?;
        let incident = closed(play, ROOT, host, "an option too many")?;
        play.claim(incident["layer"] == "restore", "an option too many: layer restore healed it", || {
            incident.to_string()
        });
        let kept = host.must(&format!(
            "ls {dir} 2>/dev/null | grep -c options || true; find /var/lib/koboshi/quarantine -name 50-options.conf | wc -l"
        ));
        let kept = kept.unwrap_or_default().replace('\n', " ");
        play.claim(kept == "0 1", "an option too many: the drop-in is set aside, not lost", || kept.clone());
        Ok(())
    })
}

/// Deletes the program and kills the gateway: only a restore brings it back.
fn deleted(
    play: &mut Play,
    koboshi: Koboshi,
    host: &Host,
    unit: Unit,
    before: &Before,
) -> Result<(), String> {
    let package = unit.package();
    // Renamed away first, so that it is gone from one moment to the next.
    host.must(&format!(
        "mv {package} /root/program.gone && kill -9 {} && rm -rf /root/program.gone",
        main_pid(host, unit)?
    ))?;
    before.righted(play, host, "program deleted", CLIMB)?;
    let incident = closed(play, koboshi, host, "program deleted")?;
    play.claim(incident["layer"] == "restore", "program deleted: layer restore healed it", || {
        incident.to_string()
    });
    let owner = host.must(&format!("stat -c %U {package}/package.json"))?;
    let wanted = if unit == Unit::User { "claw" } else { "root" };
    play.claim(owner == wanted, "program deleted: the files belong to whom they did", || owner.clone());
    Ok(())
}

pub(super) fn system(play: &mut Play) -> Result<(), String> {
    let (mut host, before) = guarded(play, Unit::System)?;
    on(play, &mut host, |play, host| {
        host.must(&format!("kill -9 {}", main_pid(host, Unit::System)?))?;
        before.righted(play, host, "SIGKILL", START)?;
        nothing_open(play, ROOT, host, "SIGKILL")?;
        let before = Before::take(host)?;
        deleted(play, ROOT, host, Unit::System, &before)
    })
}

pub(super) fn user_agent(play: &mut Play) -> Result<(), String> {
    let koboshi = Koboshi(Home::Claw);
    let mut host = play.node("n1", Unit::User)?;
    judge::serves_within(&host, START)?;
    koboshi.install(&host, true)?;
    settled(play, koboshi, &host)?;
    let before = Before::take(&host)?;
    on(play, &mut host, |play, host| {
        let uid = host.must(&format!("stat -c %U /proc/{}", koboshi.agent(host)?))?;
        play.claim(uid == "claw", "the agent runs as the user", || uid.clone());
        host.must(&format!("kill -9 {}", main_pid(host, Unit::User)?))?;
        before.righted(play, host, "SIGKILL", START)?;
        nothing_open(play, koboshi, host, "SIGKILL")?;
        let before = Before::take(host)?;
        deleted(play, koboshi, host, Unit::User, &before)
    })
}

/// The program on a lower layer, where directories cannot be renamed.
pub(super) fn lower_layer(play: &mut Play) -> Result<(), String> {
    let mut host = play.unbooted("n1", Template::User)?;
    let inside = "/home/claw/.npm-global";
    let work = play.pool()?.scratch_dir("lower-layer")?;
    host.overlay(inside, &work)?;
    host.boot()?;
    judge::serves_within(&host, START)?;
    let out = host.root(&format!(
        "perl -e 'rename(\"{inside}/lib/node_modules/openclaw\", \"{inside}/x\") or die $!'"
    ))?;
    play.claim(!out.ok(), "the program's directory cannot be renamed there", || out.words());
    ROOT.install(&host, true)?;
    settled(play, ROOT, &host)?;
    let before = Before::take(&host)?;
    on(play, &mut host, |play, host| {
        host.must(&format!(
            "rm -rf {}/dist && kill -9 {}",
            Unit::User.package(),
            main_pid(host, Unit::User)?
        ))?;
        before.righted(play, host, "dist deleted", CLIMB)?;
        let incident = closed(play, ROOT, host, "dist deleted")?;
        play.claim(incident["layer"] == "restore", "dist deleted: layer restore healed it", || {
            incident.to_string()
        });
        Ok(())
    })
}

// ---- latches ----

pub(super) fn latch(play: &mut Play) -> Result<(), String> {
    let (mut host, before) = guarded(play, Unit::User)?;
    on(play, &mut host, |play, host| {
        // A broken configuration, met by the next start: exit 78, and systemd gives up for good.
        host.must("cd /home/claw/.openclaw && head -c 100 openclaw.json > half && cat half > openclaw.json && rm half")?;
        host.root(&format!("{} restart openclaw-gateway.service", Unit::User.systemctl()))?;
        before.righted(play, host, "config truncated, restarted", CLIMB)?;
        closed(play, ROOT, host, "config truncated, restarted")?;
        let result = host.unit(Unit::User, "ActiveState")?;
        play.claim(result == "active", "config truncated: the unit is active", || result.clone());

        // The start limit: systemd refuses further starts until the latch is cleared.
        ROOT.start_is_free(host)?;
        let before = Before::take(host)?;
        let unit = Unit::User.systemctl();
        host.must(&format!(
            "mkdir -p /home/claw/.config/systemd/user/openclaw-gateway.service.d && \
             printf '[Unit]\\nStartLimitBurst=1\\nStartLimitIntervalSec=3600\\n' \
             > /home/claw/.config/systemd/user/openclaw-gateway.service.d/limit.conf && \
             chown -R claw:claw /home/claw/.config/systemd && {unit} daemon-reload"
        ))?;
        host.must(&format!("kill -9 {}", main_pid(host, Unit::User)?))?;
        let started = Instant::now();
        let mut latched = false;
        while started.elapsed() < Duration::from_secs(30) && !latched {
            latched = host.unit(Unit::User, "Result")? == "start-limit-hit";
        }
        play.say(&format!("start-limit-hit was seen: {latched}"));
        before.righted(play, host, "start limit", CLIMB)?;
        closed(play, ROOT, host, "start limit")?;
        Ok(())
    })
}

// ---- the owner's will ----

pub(super) fn will(play: &mut Play) -> Result<(), String> {
    let (mut host, before) = guarded(play, Unit::User)?;
    on(play, &mut host, |play, host| {
        let unit = Unit::User.systemctl();
        let stopped = Instant::now();
        host.must(&format!("{unit} stop openclaw-gateway.service"))?;
        let early = hello_within(host, Duration::from_secs(60));
        play.claim(!early, "a bare stop is let be for a while", || {
            format!("up after {:?}", stopped.elapsed())
        });
        before.righted(play, host, "bare stop", CLIMB)?;
        let after_s = stopped.elapsed().as_secs();
        play.claim((80..240).contains(&after_s), "bare stop: started again after about 90 s", || {
            format!("{after_s} s")
        });
        ROOT.wait(host, CLOSE, "nothing open", |s| s["incident"].is_null() && s["confirmed"] == true)?;
        host.must(&format!("{unit} stop openclaw-gateway.service"))?;
        let up = hello_within(host, Duration::from_secs(150));
        play.claim(!up, "a second bare stop within the hour is obeyed", || "it was started".to_owned());
        let status = ROOT.status(host)?;
        play.claim(status["hands_off"].is_string(), "and the status says so", || {
            status["hands_off"].to_string()
        });
        host.must(&format!("{unit} start openclaw-gateway.service"))?;
        judge::serves_within(host, START)?;
        ROOT.wait(host, CLOSE, "a confirmed node", |s| s["confirmed"] == true && s["incident"].is_null())?;
        let notices = play.sink()?.alerts().len();
        host.must(&format!("{unit} disable --now openclaw-gateway.service"))?;
        let up = hello_within(host, Duration::from_secs(120));
        play.claim(!up, "disable --now is left alone", || "it was started".to_owned());
        let told = play.sink()?.alerts().len() - notices;
        let bodies: Vec<String> = play.sink()?.alerts().into_iter().skip(notices).map(|a| a.body).collect();
        play.claim(told == 1, "with exactly one notice", || format!("{told}: {bodies:?}"));
        Ok(())
    })
}

/// Whether a gateway answers within this time.
fn hello_within(host: &Host, limit: Duration) -> bool {
    judge::serves_within(host, limit).is_ok()
}

pub(super) fn stop(play: &mut Play) -> Result<(), String> {
    let (mut host, _) = guarded(play, Unit::User)?;
    on(play, &mut host, |play, host| {
        let out = ROOT.run(host, "node stop", START)?;
        play.claim(out.ok(), "koboshi node stop", || out.words());
        let up = hello_within(host, Duration::from_secs(110));
        play.claim(!up, "it stays stopped, longer than a bare stop would", || "it was started".to_owned());
        host.reboot()?;
        let up = hello_within(host, Duration::from_secs(110));
        play.claim(!up, "it stays stopped over a reboot", || "it was started".to_owned());
        let out = ROOT.run(host, "node start", CLIMB)?;
        play.claim(out.ok(), "koboshi node start", || out.words());
        let hello = judge::serves_within(host, START);
        play.expect(hello, "it serves again");
        host.reboot()?;
        let hello = judge::serves_within(host, CLIMB);
        play.expect(hello, "and comes back with the host after another reboot");
        Ok(())
    })
}
