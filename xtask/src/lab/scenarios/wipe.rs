//! The total wipe: program, Node, config, state, credentials and service registration of one host, deleted as somebody
//! would who took it for another one, the gateway killed last. Only koboshi and its store are left.

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
/// What of Node and npm lies in a host.
const NODE: &str =
    "/usr/local/bin/node /usr/local/bin/npm /usr/local/bin/npx /usr/local/lib/node_modules/npm";

pub(super) fn user(play: &mut Play) -> Result<(), String> {
    wiped(play, Koboshi(Home::Root), Unit::User)
}

pub(super) fn system(play: &mut Play) -> Result<(), String> {
    wiped(play, Koboshi(Home::Root), Unit::System)
}

/// Node was root's and the agent is not: it has to run the node by one of its own.
pub(super) fn unprivileged(play: &mut Play) -> Result<(), String> {
    wiped(play, Koboshi(Home::Claw), Unit::User)
}

fn wiped(play: &mut Play, koboshi: Koboshi, unit: Unit) -> Result<(), String> {
    let mut host = play.node("n1", unit)?;
    judge::serves_within(&host, START)?;
    koboshi.install(&host, true)?;
    if let Err(why) = koboshi.settled(&host) {
        play.remember(&host);
        return Err(why);
    }
    let before = Before::take(&host)?;
    let result = wipe(play, koboshi, unit, &mut host, &before);
    kept(play, &host, result)
}

fn wipe(
    play: &mut Play,
    koboshi: Koboshi,
    unit: Unit,
    host: &mut Host,
    before: &Before,
) -> Result<(), String> {
    let (program, service) = match unit {
        Unit::User => (
            "/home/claw/.npm-global",
            "/home/claw/.config/systemd/user/openclaw-gateway.service* \
             /home/claw/.config/systemd/user/default.target.wants/openclaw-gateway.service",
        ),
        Unit::System => (
            "/usr/local/lib/node_modules/openclaw /usr/local/bin/openclaw",
            "/etc/systemd/system/openclaw-gateway.service* \
             /etc/systemd/system/multi-user.target.wants/openclaw-gateway.service",
        ),
        Unit::UserOfRoots => return Err("nobody has asked for that wipe yet".to_owned()),
    };
    let pid = host.unit(unit, "MainPID")?;
    host.must(&format!("rm -rf /home/claw/.openclaw {program} {NODE} {service}; kill -9 {pid}; true"))?;
    before.righted(play, host, "everything deleted", CLIMB)?;
    koboshi.wait(host, CLOSE, "a closed incident", |s| s["incident"].is_null() && s["confirmed"] == true)?;
    for incident in koboshi.incidents(host)? {
        play.say(&format!("{}: {} by {}", incident["id"], incident["outcome"], incident["layer"]));
        play.claim(incident["outcome"] == "recovered", "the incident ended as recovered", || {
            incident.to_string()
        });
    }
    let closing = play.sink()?.wait_for("/closing", CLOSE);
    play.expect(closing, "and that is told");
    let enabled = host.unit(unit, "UnitFileState")?;
    play.claim(enabled == "enabled", "the unit is enabled", || enabled.clone());
    // Where Node was root's and koboshi is not, the command of the old prefix finds none: the service runs by another.
    if koboshi.0 == Home::Root {
        let command = host.claw("openclaw --version")?;
        play.claim(command.ok(), "`openclaw` runs", || command.words());
    }
    let owners = host.must("find /home/claw -not -user claw -not -path '*/.koboshi*' | head -n 5")?;
    play.claim(owners.is_empty(), "everything in the user's home is the user's", || owners.clone());

    let before = Before::take(host)?;
    host.reboot()?;
    before.righted(play, host, "after a reboot", START)
}
