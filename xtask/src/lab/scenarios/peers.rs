//! Layer 4 on real hosts: the program is gone, the store is corrupt, and another host has it.

use super::kept;
use super::parts::befriend;
use crate::lab::host::Host;
use crate::lab::koboshi::{Before, Home, Koboshi};
use crate::lab::registry::Mode;
use crate::lab::{Play, Unit, judge};
use std::time::Duration;

/// A gateway's start on a machine that is busy with other scenarios.
const START: Duration = Duration::from_secs(300);
/// A climb ends within its 600 s.
const CLIMB: Duration = Duration::from_secs(600);
/// An incident is closed once the node was confirmed for some seconds.
const CLOSE: Duration = Duration::from_secs(120);
const ROOT: Koboshi = Koboshi(Home::Root);

/// Deleted program, corrupt packs: what is missing comes from the peer, and nothing else does.
pub(super) fn copy(play: &mut Play) -> Result<(), String> {
    let host = play.node("n1", Unit::User)?;
    let donor = play.donor("n2")?;
    let played = lent(play, &host, &donor);
    let played = kept(play, &host, played);
    kept(play, &donor, played)
}

/// What of it is seen from outside while it happens: that the unit was held down with the stage ready beside the program.
const WATCH: &str = "systemd-run -q --unit lab-watch sh -c 'while sleep 0.05; do \
    test -e /run/user/1000/systemd/user/openclaw-gateway.service.d/90-koboshi-hold.conf && \
    test -e /home/claw/.npm-global/lib/.koboshi-peer/program/package.json && touch /root/was-held; done'";

fn lent(play: &mut Play, host: &Host, donor: &Host) -> Result<(), String> {
    befriend(host, donor)?;
    judge::serves_within(host, START)?;
    judge::serves_within(donor, START)?;
    ROOT.install(host, true)?;
    let key = donor.must("cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub")?;
    let enroll = format!("fleet enroll n2 --user claw --yes --host-key '{key}'");
    // Root has no access of its own there: the line is shown, and its owner adds it.
    let shown = ROOT.run(host, &enroll, START)?;
    let line = shown.words().lines().map(str::trim).find(|l| l.starts_with("command=")).map(str::to_owned);
    let Some(line) = line else { return Err(format!("no line was shown: {}", shown.words())) };
    donor.claw_must(&format!("umask 077; cat >> .ssh/authorized_keys <<'END'\n{line}\nEND\n"))?;
    let out = ROOT.run(host, &enroll, START)?;
    play.claim(out.ok(), "enrolled: key pinned, one call answered, drop-in written", || out.words());
    host.must("systemctl restart koboshi.service")?;
    ROOT.settled(host)?;

    let before = Before::take(host)?;
    let theirs = donor.must("ls -lR --time-style=full-iso /home/claw/.npm-global/bin | md5sum")?;
    Koboshi::corrupt_store(host)?;
    // Layers 2 and 3 have their turn and get nothing: the registry accepts and never answers.
    play.registry()?.set(Mode::Hang);
    let package = Unit::User.package();
    host.must(WATCH)?;
    let pid = host.unit(Unit::User, "MainPID")?;
    host.must(&format!("mv {package} /root/program.gone && kill -9 {pid} && rm -rf /root/program.gone"))?;
    before.righted(play, host, "program deleted, store corrupt", CLIMB)?;
    ROOT.wait(host, CLOSE, "a closed incident", |s| s["incident"].is_null() && s["confirmed"] == true)?;
    let last = ROOT.incidents(host)?.last().cloned().ok_or("no incident is on record")?;
    let first = last["layer"] == "peer-copy" && last["climbs"] == 1;
    play.claim(first, "layer peer-copy healed it, in the first climb", || last.to_string());
    let held = host.root("test -e /root/was-held")?;
    play.claim(held.ok(), "the unit was held down while it was exchanged", || held.words());
    let hold = host.root("ls /run/user/1000/systemd/user/openclaw-gateway.service.d/90-koboshi-hold.conf")?;
    play.claim(!hold.ok(), "and is held no longer", || hold.words());
    let status = ROOT.status(host)?;
    let damaged = status["findings"].to_string().contains("files-damaged");
    play.claim(!damaged, "the look at the disk finds no damage in it", || status["findings"].to_string());
    let owner = host.must(&format!("stat -c %U {package}/package.json"))?;
    play.claim(owner == "claw", "the files belong to whom they did", || owner.clone());
    let left = host.must("find /home/claw/.npm-global -name '.koboshi-peer*' | wc -l")?;
    play.claim(left == "0", "nothing of ours is left beside the program", || left.clone());
    let after = donor.must("ls -lR --time-style=full-iso /home/claw/.npm-global/bin | md5sum")?;
    play.claim(theirs == after, "nothing was written on the donor", || format!("{theirs} {after}"));
    judge::serves_within(donor, START).map(drop)
}
