//! The lab's own parts, proven where koboshi has no part in it: what later scenarios rely on.

use crate::lab::host::Host;
use crate::lab::judge;
use crate::lab::koboshi::{Home, Koboshi};
use crate::lab::net::{Cut, address};
use crate::lab::registry::{Mode, URL};
use crate::lab::sink::Mood;
use crate::lab::sudo::{self, Broken, Comes};
use crate::lab::{Play, Unit};
use std::time::Duration;

/// A sudo that has not ended by then hangs.
const SUDO_HANGS: Duration = Duration::from_secs(3);
/// A gateway's start on a machine that is busy with other scenarios.
const START: Duration = Duration::from_secs(900);
/// npm with one package, or with its failure, on a crowded machine.
const NPM: Duration = Duration::from_secs(240);
/// The same for anything over the network.
const NET_HANGS: Duration = Duration::from_secs(4);

/// Every broken state of sudo.
pub(super) fn sudo_gates(play: &mut Play) -> Result<(), String> {
    let host = play.plain("n1")?;
    let whole = host.claw("sudo -n true")?;
    play.claim(whole.ok(), "sudo works to begin with", || whole.words());
    for broken in sudo::ALL {
        broken.set(&host)?;
        let out = host.claw_within(broken.call(), SUDO_HANGS);
        broken.mend(&host)?;
        let out = out?;
        let as_expected = match broken.comes() {
            Comes::Works => out.ok(),
            Comes::Refuses(words) => !out.ok() && !out.timed_out && out.err.contains(words),
            Comes::Hangs => out.timed_out,
        };
        play.claim(as_expected, &format!("{broken:?}: {:?}", broken.comes()), || out.words());
    }
    let whole = host.claw("sudo -n true")?;
    play.claim(whole.ok(), "and works again at the end", || whole.words());
    // Without -n, a password is waited for at the terminal for ever: what koboshi must never call.
    Broken::Password.set(&host)?;
    let out = host.claw_within("script -qec 'sudo true' /dev/null </dev/zero", SUDO_HANGS)?;
    Broken::Password.mend(&host)?;
    play.claim(out.timed_out, "a prompt at a terminal hangs", || out.words());
    Ok(())
}

/// Registry and receiver.
pub(super) fn services(play: &mut Play) -> Result<(), String> {
    let host = play.plain("n1")?;
    let (version, zod) = (play.recorded("openclaw")?, play.recorded("zod")?);
    let document = format!("curl -sS --max-time 3 -o /dev/null -w '%{{http_code}}' {URL}/openclaw/{version}");
    let fetch = |limit_s: u32| {
        format!("curl -sS --max-time {limit_s} {URL}/openclaw/-/openclaw-{version}.tgz | sha256sum")
    };
    let tarball = fetch(50);
    let npm = |host: &Host| {
        let script = format!(
            "rm -rf t .npm && mkdir t && cd t && npm install --fetch-retries=0 --fetch-timeout=2000 zod@{zod} 2>&1"
        );
        host.claw_within(&script, NPM)
    };
    let whole = host.must(&tarball)?;
    let answered = host.must(&document)?;
    play.claim(answered == "200", "the registry describes the recorded OpenClaw", || answered.clone());
    play.registry()?.asked();
    let out = npm(&host)?;
    play.claim(out.ok(), "npm installs from it", || out.words());
    let asked = play.registry()?.asked();
    let seen = asked.first().is_some_and(|p| p == "/zod") && asked.iter().any(|p| p.ends_with(".tgz"));
    play.claim(seen, "and what it asked for was seen", || format!("{asked:?}"));
    for (mode, curl) in [(Mode::Error500, "500"), (Mode::Hang, "000"), (Mode::Close, "000")] {
        play.registry()?.set(mode);
        let out = host.root(&document)?;
        play.claim(out.out == curl, &format!("{mode:?}: a document is answered {curl}"), || out.words());
        play.registry()?.set(Mode::Good);
    }
    for mode in [Mode::Truncate, Mode::Corrupt, Mode::Reset] {
        play.registry()?.set(mode);
        let out = host.root(&tarball)?;
        play.claim(out.out.trim() != whole, &format!("{mode:?}: the tarball is not whole"), || out.words());
        let out = npm(&host)?;
        play.registry()?.set(Mode::Good);
        play.claim(!out.ok() && !out.timed_out, &format!("{mode:?}: npm fails"), || out.words());
    }
    play.registry()?.set(Mode::Slow(100_000));
    let out = host.root(&fetch(8))?;
    play.registry()?.set(Mode::Good);
    play.claim(out.took > Duration::from_secs(7), "Slow: the tarball does not arrive in 8 s", || out.words());
    let out = host.must(&tarball)?;
    play.claim(out == whole, "and Good is whole again", || out.clone());

    let post = "curl -sS --max-time 2 -o /dev/null -w '%{http_code}' -d 'an alert' http://sink.lab:8080/hook";
    for (mood, code) in [(Mood::Refuse, "500"), (Mood::Hang, "000"), (Mood::Accept, "200")] {
        play.sink()?.set(mood);
        let out = host.root(post)?;
        play.claim(out.out == code, &format!("receiver, {mood:?}: {code}"), || out.words());
    }
    play.sink()?.wait_for("an alert", NET_HANGS)?;
    let got = play.sink()?.alerts();
    let one = got.len() == 1 && got.iter().all(|a| a.path == "/hook" && a.body == "an alert");
    play.claim(one, "only the accepted alert is kept", || format!("{got:?}"));
    Ok(())
}

/// Peers and cuts.
pub(super) fn network(play: &mut Play) -> Result<(), String> {
    let first = play.plain("n1")?;
    let second = play.plain("n2")?;
    befriend(&first, &second)?;
    let ssh = "ssh -o BatchMode=yes -o ConnectTimeout=2 n2 hostname";
    let out = first.claw(ssh)?;
    play.claim(out.out.trim() == "n2", "claw on n1 logs in to n2", || out.words());
    second.must("head -c 20000000 /dev/zero > /home/claw/big && chown claw /home/claw/big")?;
    let copy = "scp -q -o BatchMode=yes n2:big big && stat -c %s big";
    for (cut, fails_at_once) in [(Cut::Link, false), (Cut::Drop, false), (Cut::ResetTo(22), true)] {
        first.cut(&play.site.switch, cut)?;
        let out = first.claw_within(ssh, NET_HANGS)?;
        first.mend(&play.site.switch)?;
        play.claim(!out.ok(), &format!("{cut:?}: no login"), || out.words());
        let at_once = out.took < Duration::from_secs(1);
        play.claim(at_once == fails_at_once, &format!("{cut:?}: told at once: {fails_at_once}"), || {
            out.words()
        });
        let out = first.claw(ssh)?;
        play.claim(out.ok(), &format!("{cut:?}: mended"), || out.words());
    }
    first.cut(&play.site.switch, Cut::StallFrom(22, 2_000_000))?;
    let out = first.claw_within(copy, NET_HANGS)?;
    first.mend(&play.site.switch)?;
    play.claim(out.timed_out, "StallFrom: a copy stops in the middle and hangs", || out.words());
    let out = first.claw(copy)?;
    play.claim(out.out.trim() == "20000000", "StallFrom: mended", || out.words());
    second.freeze(true)?;
    let connects = first.root_within(
        &format!("exec 3<>/dev/tcp/{}/22 && echo connected && read -t 2 line <&3", address(second.index)),
        NET_HANGS,
    )?;
    second.freeze(false)?;
    let hangs = connects.out.contains("connected") && !connects.ok();
    play.claim(hangs, "a frozen host accepts and says nothing", || connects.words());
    let out = first.claw(ssh)?;
    play.claim(out.ok(), "and talks again when thawed", || out.words());
    let out = first.root("getent hosts registry.npmjs.org || curl -sS --max-time 2 http://1.1.1.1/")?;
    play.claim(!out.ok(), "nothing leads out of the lab", || out.words());
    Ok(())
}

/// Gives `claw` on one host a key that opens `claw` on the other, whose host key is pinned.
pub(crate) fn befriend(from: &Host, to: &Host) -> Result<(), String> {
    from.claw_must("mkdir -pm 700 .ssh && ssh-keygen -q -t ed25519 -N '' -f .ssh/id_ed25519")?;
    let public = from.claw_must("cat .ssh/id_ed25519.pub")?;
    let host_key = to.must("cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub")?;
    to.claw_must(&format!(
        "mkdir -pm 700 .ssh && echo '{public}' >> .ssh/authorized_keys && chmod 600 .ssh/*"
    ))?;
    from.claw_must(&format!("echo '{} {host_key}' >> .ssh/known_hosts", to.name))?;
    Ok(())
}

/// A node and a donor.
pub(super) fn donor(play: &mut Play) -> Result<(), String> {
    let node = play.node("n1", Unit::User)?;
    let donor = play.donor("n2")?;
    befriend(&node, &donor)?;
    for host in [&node, &donor] {
        let hello = judge::serves_within(host, START);
        play.expect(hello, &format!("{} serves", host.name));
    }
    let identity = |host: &Host| {
        host.must("sqlite3 -readonly /home/claw/.openclaw/state/openclaw.sqlite 'SELECT device_id FROM device_identities'")
    };
    let (ours, theirs) = (identity(&node)?, identity(&donor)?);
    play.claim(!ours.is_empty() && ours != theirs, "their identities differ", || format!("{ours} {theirs}"));
    play.claim(node.token != donor.token, "their tokens differ", || "they do not".to_owned());
    let file = "lib/node_modules/openclaw/package.json";
    let same =
        node.claw_must(&format!("ssh -o BatchMode=yes n2 cat .npm-global/{file} | cmp - .npm-global/{file}"));
    play.expect(same, "the donor's program is ours, read over ssh");
    Ok(())
}

/// A full disk and a corrupt store.
pub(super) fn disks(play: &mut Play) -> Result<(), String> {
    let mut host = play.unbooted("n1", crate::lab::disk::Template::User)?;
    host.small_disk("/home/claw/.openclaw", 300)?;
    host.boot()?;
    let hello = judge::serves_within(&host, START);
    play.expect(hello, "a node whose state lies on a disk of its own serves");
    // A gateway that runs gives room back again and again.
    host.claw_must("systemctl --user stop openclaw-gateway.service")?;
    host.fill("/home/claw/.openclaw")?;
    // Some last blocks it gives to some writes and not to others.
    let out =
        host.claw("head -c 200000 /dev/zero > .openclaw/workspace/more && sync .openclaw/workspace/more")?;
    play.claim(!out.ok() && out.err.contains("No space left"), "filled, it takes no file of 200 KB", || {
        out.words()
    });
    host.unfill("/home/claw/.openclaw")?;
    let out = host.claw("echo more > .openclaw/workspace/more")?;
    play.claim(out.ok(), "unfilled, it does", || out.words());
    host.claw_must("systemctl --user start openclaw-gateway.service")?;
    let koboshi = Koboshi(Home::Root);
    koboshi.install(&host, false)?;
    koboshi.settled(&host)?;
    let out = koboshi.run(&host, "snapshot verify", START)?;
    play.claim(out.ok(), "the store verifies", || out.words());
    Koboshi::corrupt_store(&host)?;
    let out = koboshi.run(&host, "snapshot verify", START)?;
    play.claim(!out.ok() && !out.timed_out, "with a flipped byte in every pack it does not", || out.words());
    Ok(())
}
