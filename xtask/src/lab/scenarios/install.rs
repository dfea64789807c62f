//! Layers 2 and 3 under a real systemd, from the lab's own registry: what heals when no snapshot can.

use super::kept;
use crate::lab::host::Host;
use crate::lab::judge;
use crate::lab::koboshi::{Before, Home, Koboshi};
use crate::lab::{Play, Unit};
use std::time::Duration;

/// A gateway's start on a machine that is busy with other scenarios.
const START: Duration = Duration::from_secs(300);
/// A climb ends within its 600 s.
const CLIMB: Duration = Duration::from_secs(600);
/// An incident is closed once the node was confirmed for some seconds.
const CLOSE: Duration = Duration::from_secs(120);

/// Settling, a start that is far enough back, building beside a gateway that serves, a quiet moment, and the trial.
const HOME: Duration = Duration::from_secs(1_500);

/// A serving node with a settled koboshi.
fn guarded(play: &mut Play, koboshi: Koboshi, unit: Unit) -> Result<(Host, Before), String> {
    let host = play.node("n1", unit)?;
    judge::serves_within(&host, START)?;
    koboshi.install(&host, true)?;
    if let Err(why) = koboshi.settled(&host) {
        play.remember(&host);
        return Err(why);
    }
    let before = Before::take(&host)?;
    Ok((host, before))
}

/// Empties every file of the store: no snapshot can be read any more.
pub(super) fn no_store(host: &Host, dir: &str) -> Result<(), String> {
    host.must(&format!("find {dir}/store -type f -exec truncate -s 0 {{}} +")).map(drop)
}

/// Takes the program away from one moment to the next, with a spare if there is one, and ends the gateway.
pub(super) fn no_program(host: &Host, unit: Unit) -> Result<(), String> {
    let package = unit.package();
    let pid = host.unit(unit, "MainPID")?;
    host.must(&format!(
        "mv {package} /root/program.gone; rm -rf {package}/../../.koboshi-spare; kill -9 {pid}; rm -rf /root/program.gone"
    ))
    .map(drop)
}

/// The layer that the last incident was healed by.
fn healed(play: &mut Play, koboshi: Koboshi, host: &Host, layer: &str) -> Result<(), String> {
    koboshi.wait(host, CLOSE, "a closed incident", |s| s["incident"].is_null() && s["confirmed"] == true)?;
    let all = koboshi.incidents(host)?;
    let last = all.last().cloned().unwrap_or_default();
    let right = last["outcome"] == "recovered" && last["layer"] == layer;
    play.claim(right, &format!("{layer} healed it"), || last.to_string());
    Ok(())
}

/// No store, no program, and the unit's own file gone too: layer 2 as root for a user's node.
pub(super) fn again(play: &mut Play) -> Result<(), String> {
    let root = Koboshi(Home::Root);
    let (host, before) = guarded(play, root, Unit::User)?;
    let result = (|| {
        no_store(&host, "/var/lib/koboshi")?;
        let unit = "/home/claw/.config/systemd/user/openclaw-gateway.service";
        let was = host.must(&format!("cat {unit}"))?;
        host.must(&format!("rm {unit}"))?;
        escapes(&host)?;
        no_program(&host, Unit::User)?;
        no_escape(play, &host)?;
        before.righted(play, &host, "no store, no program, no unit", CLIMB)?;
        none_left(play, &host)?;
        healed(play, root, &host, "system-install")?;
        let owner = host.must(&format!("stat -c %U {}/package.json", Unit::User.package()))?;
        play.claim(owner == "claw", "the program belongs to its user", || owner.clone());
        let now = host.must(&format!("cat {unit}"))?;
        play.claim(now == was, "the unit is the owner's own again", || now.clone());
        let enabled = host.unit(Unit::User, "UnitFileState")?;
        play.claim(enabled == "enabled", "and enabled", || enabled.clone());
        let command = host.claw("openclaw --version")?;
        play.claim(command.ok(), "`openclaw` runs", || command.words());
        Ok(())
    })();
    kept(play, &host, result)
}

/// Has whatever Node npm runs on try to escape, until it has: a program of ours in its place, since a script is no Node.
fn escapes(host: &Host) -> Result<(), String> {
    host.must("mv /usr/local/bin/node /usr/local/bin/node.real; rm -f /tmp/escapes")?;
    let me = std::env::current_exe().map_err(|e| format!("find this program: {e}"))?;
    let to = host.path("/usr/local/bin/node");
    std::fs::copy(&me, &to).map_err(|e| format!("copy {}: {e}", me.display())).map(drop)
}

fn no_escape(play: &mut Play, host: &Host) -> Result<(), String> {
    let started = std::time::Instant::now();
    while !host.root("grep -q tried /tmp/escapes")?.ok() && started.elapsed() < CLIMB {
        std::thread::sleep(Duration::from_millis(250));
    }
    let tried = host.must("cat /tmp/escapes; mv /usr/local/bin/node.real /usr/local/bin/node")?;
    play.claim(tried.contains("as claw") && tried.contains("tried"), "npm's Node tried to escape", || {
        tried.clone()
    });
    play.claim(!tried.contains("escaped"), "nobody started anything for it", || tried.clone());
    play.say(&tried.replace('\n', " / "));
    Ok(())
}

/// The sleepers that it started, once the step that they began in is over.
fn none_left(play: &mut Play, host: &Host) -> Result<(), String> {
    let left = host.must("pgrep -af 'sleep 42424[2]'; true")?;
    play.claim(left.is_empty(), "and nothing of it outlived the step", || left.clone());
    Ok(())
}

/// A host on which root installed the program for everybody, and a user runs it by a unit of its own.
pub(super) fn of_roots(play: &mut Play) -> Result<Host, String> {
    let mut host = play.node("n1", Unit::UserOfRoots)?;
    host.must(
        "systemctl disable --now openclaw-gateway.service && mv /etc/systemd/system/openclaw-gateway.service /root/ && \
         systemctl daemon-reload",
    )?;
    host.write("/root/.npmrc", &format!("registry={}/\n", crate::lab::registry::URL))?;
    // OpenClaw's own `gateway install` will not have a program of root's: whoever runs one so writes the unit by hand.
    let unit = std::fs::read_to_string(host.path("/root/openclaw-gateway.service"))
        .map_err(|e| format!("read the unit: {e}"))?;
    let unit: String = unit
        .lines()
        .filter(|line| !line.starts_with("User=") && !line.starts_with("Group="))
        .map(|line| line.replace("multi-user.target", "default.target") + "\n")
        .collect();
    let dir = "/home/claw/.config/systemd/user";
    host.claw_must(&format!("mkdir -p {dir}"))?;
    host.write(&format!("{dir}/openclaw-gateway.service"), &unit)?;
    host.must(&format!("chown claw: {dir}/openclaw-gateway.service"))?;
    host.claw_must(
        "systemctl --user daemon-reload && systemctl --user enable --now openclaw-gateway.service",
    )?;
    host.token = judge::read_token(&host);
    judge::serves_within(&host, START)?;
    Ok(host)
}

/// A program of root's, a user's unit, an agent without privileges: layer 2 by sudo; then sudo is gone, layer 3; then it is
/// back, and root makes the program anew at home while the node serves.
pub(super) fn sudo(play: &mut Play) -> Result<(), String> {
    let claw = Koboshi(Home::Claw);
    let host = of_roots(play)?;
    let said = claw.install(&host, true)?;
    play.claim(said.contains("root knows now"), "root was told which node it is", || said.clone());
    let result = by_sudo(play, claw, &host, Unit::UserOfRoots);
    kept(play, &host, result)
}

fn by_sudo(play: &mut Play, claw: Koboshi, host: &Host, unit: Unit) -> Result<(), String> {
    // From here on sudo permits what root's own command says it has to, and nothing else.
    let name = claw.settled(host)?["node"]["name"].as_str().unwrap_or("main").to_owned();
    host.must(&format!(
        "umask 227; koboshi step enroll-node {name} | grep -E '^(Defaults|claw)' > /etc/sudoers.d/koboshi && visudo -c && \
         rm /etc/sudoers.d/claw"
    ))?;
    let store = "/home/claw/.local/state/koboshi";
    let roots = |play: &mut Play| -> Result<(), String> {
        let owner = host.must(&format!("stat -c %U {0} {0}/package.json | sort -u", unit.package()))?;
        play.claim(owner == "root", "the program is root's", || owner.clone());
        Ok(())
    };
    let before = Before::take(host)?;
    no_store(host, store)?;
    no_program(host, unit)?;
    before.righted(play, host, "no store, no program of root's", CLIMB)?;
    healed(play, claw, host, "system-install")?;
    roots(play)?;

    claw.settled(host)?;
    claw.start_is_free(host)?;
    let before = Before::take(host)?;
    no_store(host, store)?;
    host.must("mv /etc/sudoers.d/koboshi /root/koboshi.sudoers")?;
    escapes(host)?;
    no_program(host, unit)?;
    no_escape(play, host)?;
    before.righted(play, host, "and no sudo", CLIMB)?;
    none_left(play, host)?;
    healed(play, claw, host, "user-install")?;
    let status = claw.ask(host, "status")?;
    play.claim(status["displaced_from"] == "/usr/local", "`status` says that it is displaced", || {
        status.to_string()
    });
    let why = claw.wait(host, HOME, "a word of sudo's", |s| {
        s["home"].as_str().is_some_and(|home| home.contains("sudo does not permit"))
    });
    play.expect(why, "and what keeps it from home");

    let incidents = claw.incidents(host)?.len();
    let before = Before::take(host)?;
    host.must("mv /root/koboshi.sudoers /etc/sudoers.d/koboshi")?;
    // Another agent asks sudo at once, and not in ten minutes.
    host.claw_must("systemctl --user restart koboshi.service")?;
    claw.wait(host, HOME, "a node at home", |s| {
        s["home"].is_null() && !claw.ask(host, "status").unwrap_or_default()["displaced_from"].is_string()
    })?;
    before.righted(play, host, "home again by sudo", START)?;
    roots(play)?;
    let exec = host.unit(unit, "ExecStart")?;
    play.claim(exec.contains(unit.package()), "its unit starts the program at home", || exec.clone());
    let now = claw.incidents(host)?.len();
    play.claim(now == incidents, "none of it was an incident", || format!("{incidents} before, {now} now"));
    Ok(())
}

/// The prefix cannot be written to and sudo is not permitted: layer 3.
pub(super) fn displaced(play: &mut Play) -> Result<(), String> {
    let claw = Koboshi(Home::Claw);
    let (mut host, before) = guarded(play, claw, Unit::User)?;
    let result = (|| {
        no_store(&host, "/home/claw/.local/state/koboshi")?;
        host.must("rm -f /etc/sudoers.d/*; chown root: /home/claw/.npm-global/lib /home/claw/.npm-global/lib/node_modules")?;
        no_program(&host, Unit::User)?;
        before.righted(play, &host, "no store, no program, no way home", CLIMB)?;
        healed(play, claw, &host, "user-install")?;
        let status = claw.ask(&host, "status")?;
        let from = status["displaced_from"].as_str().unwrap_or_default().to_owned();
        play.claim(from == "/home/claw/.npm-global", "`status` says that it is displaced", || {
            status.to_string()
        });
        let linger = host.root("test -e /var/lib/systemd/linger/claw")?;
        play.claim(linger.ok(), "its user lingers", || linger.words());
        let runs = host.must("runuser -l claw -c 'readlink -f $(command -v openclaw)'")?;
        play.claim(
            runs == "/home/claw/.local/bin/openclaw",
            "a login shell finds the program that serves",
            || runs.clone(),
        );
        host.reboot()?;
        judge::serves_within(&host, START)?;
        play.claim(host.gateways()?.len() == 1, "it comes up after a reboot, once", || {
            "it does not".to_owned()
        });
        home_again(play, claw, &host)
    })();
    kept(play, &host, result)
}

/// The way home can be gone again: first to a home where it does not start, then to one where it does.
fn home_again(play: &mut Play, claw: Koboshi, host: &Host) -> Result<(), String> {
    let dir = "/home/claw/.config/systemd/user/openclaw-gateway.service.d";
    let asks = |host: &Host| claw.ask(host, "status").unwrap_or_default();
    let incidents = claw.incidents(host)?.len();
    // A unit that starts only with the drop-in that leads away: nothing that a look at the disk could know.
    host.claw_must(&format!(
        "printf '[Service]\nExecStartPre=/bin/sh -c \"test -e {dir}/95-koboshi-program.conf\"\n' > {dir}/50-lab.conf && \
         systemctl --user daemon-reload"
    ))?;
    let before = Before::take(host)?;
    host.must("chown claw: /home/claw/.npm-global/lib /home/claw/.npm-global/lib/node_modules")?;
    claw.wait(host, HOME, "a trial at home that failed", |s| s["home"] == "it did not serve there")?;
    before.righted(play, host, "did not serve at home", START)?;
    let status = asks(host);
    play.claim(status["displaced_from"] == "/home/claw/.npm-global", "it is away as before", || {
        status.to_string()
    });
    // Another agent knows nothing of the failure and tries again.
    host.claw_must(&format!("rm {dir}/50-lab.conf && systemctl --user daemon-reload"))?;
    let before = Before::take(host)?;
    host.claw_must("systemctl --user restart koboshi.service")?;
    let away = "/home/claw/.local/share/koboshi/prefix";
    claw.wait(host, HOME, "a node at home", |s| {
        s["home"].is_null() && !asks(host)["displaced_from"].is_string()
    })?;
    before.righted(play, host, "home again", START)?;
    let exec = host.unit(Unit::User, "ExecStart")?;
    play.claim(exec.contains(Unit::User.package()), "its unit starts the program at home", || exec.clone());
    let owner = host.must(&format!("stat -c %U {}/package.json", Unit::User.package()))?;
    play.claim(owner == "claw", "which belongs to its user", || owner.clone());
    let now = claw.incidents(host)?.len();
    play.claim(now == incidents, "none of it was an incident", || format!("{incidents} before, {now} now"));
    claw.settled(host)?;
    let gone = host.must(&format!(
        "for n in $(seq 60); do test -e {away} || break; sleep 1; done; ls -d {away} | wc -l"
    ))?;
    play.claim(gone == "0", "what it ran from meanwhile is gone once it has settled at home", || {
        gone.clone()
    });
    let hello = judge::serves_within(host, START);
    play.expect(hello, "and it serves on");
    Ok(())
}
