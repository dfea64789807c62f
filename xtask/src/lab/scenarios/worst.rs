//! The worst case: everything that could right the node hangs at once, for real. The climb must end in time all the same,
//! somebody must be told inside it, and nothing of it may be left over.
//!
//! An unprivileged agent guards a node whose prefix is root's. A file of the program is gone and the gateway killed; the
//! disk of the store is stuck, the registry accepts and never answers, sudo hangs in PAM, the one peer is frozen. So
//! restart is passed, restore hangs on the disk, system install on sudo, user install on the registry, peer copy on a
//! host that opens connections and says nothing.

use super::install::{no_program, no_store, of_roots};
use super::parts::befriend;
use crate::lab::disk::Template;
use crate::lab::host::Host;
use crate::lab::judge;
use crate::lab::koboshi::{Before, Home, Koboshi};
use crate::lab::registry::Mode;
use crate::lab::sudo::Broken;
use crate::lab::{Play, Unit};
use serde_json::Value;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const CLAW: Koboshi = Koboshi(Home::Claw);
const STORE: &str = "/home/claw/.local/state/koboshi/store";
/// Sparse; koboshi gives its store a fifth of the free space.
const STORE_MB: u64 = 8_000;
/// A gateway's start on a machine that is busy with other scenarios.
const START: Duration = Duration::from_secs(900);
/// A climb, in milliseconds.
const CLIMB_MS: f64 = 600_000.0;
/// From a fault to the climb's first record: systemd's own try comes first, and the look at the disk.
const NOTICED: Duration = Duration::from_secs(60);
/// The most that each layer's work gets, in milliseconds.
const MOST_MS: [(&str, f64); 5] = [
    ("restart", 15_000.0),
    ("restore", 60_000.0),
    ("system-install", 140_000.0),
    ("user-install", 140_000.0),
    ("peer-copy", 100_000.0),
];
/// Between a step's deadline and its record on a busy machine, in milliseconds.
const SLACK_MS: f64 = 3_000.0;
/// The responder stays away for a minute after any sign of a start.
const VOICE: Duration = Duration::from_secs(150);
/// Asked every minute, the next climb a minute after the last, and all the work of it.
const BACK: Duration = Duration::from_secs(600);

/// Between two deaths of the agent, in milliseconds: less than some steps take, and more than a start of it.
const DEATHS_MS: std::ops::Range<u64> = 3_000..20_000;

/// What besides happens to the host while everything hangs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Besides {
    Nothing,
    /// The agent is killed at random moments until somebody is told.
    Deaths,
    /// The power goes once in the middle. The disk of the store would no longer be stuck after it; so it is empty.
    Reboot,
}

/// The limits of life. What comes back is the registry: the third layer installs the program anew.
pub(super) fn whole(play: &mut Play) -> Result<(), String> {
    hang(play, 1, Besides::Nothing)
}

/// A tenth of them. npm does not fit into that; what comes back is the disk, and layer 1 puts one file back.
pub(super) fn tenth(play: &mut Play) -> Result<(), String> {
    hang(play, 10, Besides::Nothing)
}

pub(super) fn deaths(play: &mut Play) -> Result<(), String> {
    hang(play, 1, Besides::Deaths)
}

pub(super) fn reboot(play: &mut Play) -> Result<(), String> {
    hang(play, 1, Besides::Reboot)
}

/// The other worst case: whatever is tried succeeds, late, and then every start hangs. sudo takes seconds, the registry is
/// slow, the store is empty; an administrator's drop-in, out of reach of an agent without privileges, never lets the
/// gateway begin.
pub(super) fn late(play: &mut Play) -> Result<(), String> {
    let host = of_roots(play)?;
    CLAW.install(&host, true)?;
    let result = CLAW.settled(&host).and_then(|_| all_late(play, &host));
    if result.is_err() || play.count.failed > 0 {
        play.remember(&host);
    }
    result
}

fn all_late(play: &mut Play, host: &Host) -> Result<(), String> {
    /// For each connection. The program's own tarball has 95 MB.
    const BYTES_PER_S: u64 = 1_800_000;
    /// Work that took less than this was not late.
    const LATE_MS: f64 = 60_000.0;
    let before = Before::take(host)?;
    let dir = "/etc/systemd/user/openclaw-gateway.service.d";
    host.must(&format!(
        "sed -i '1i account required pam_exec.so quiet /bin/sleep 2' /etc/pam.d/sudo && mkdir -p {dir} && \
         printf '[Service]\\nExecStartPre=/bin/sleep 1000000000\\n' > {dir}/50-lab.conf"
    ))?;
    host.claw_must("systemctl --user daemon-reload")?;
    play.registry()?.set(Mode::Slow(BYTES_PER_S));
    no_store(host, "/home/claw/.local/state/koboshi")?;
    no_program(host, Unit::UserOfRoots)?;

    let limit = Duration::from_secs_f64(CLIMB_MS / 1_000.0) + NOTICED;
    let told = play.sink()?.wait_for("/emergency", limit);
    play.expect(told, "the lab's receiver has accepted an emergency");
    let entered =
        CLAW.wait(host, NOTICED, "an emergency on record as sent", |s| s["incident"]["emergency"] == true)?;
    let lines = told_lines(host, &entered)?;
    for (at, what) in &lines {
        play.say(&format!("{:6.1} s {what}", at / 1_000.0));
    }
    in_time(play, &lines, 1.0);
    for (layer, most_ms) in MOST_MS.into_iter().filter(|(layer, _)| layer.ends_with("-install")) {
        let begins = at(&lines, &format!("{layer}: work begins"));
        let after = |words: &str| {
            let begins = begins?;
            lines.iter().find(|(at, what)| *at >= begins && what.starts_with(words)).map(|(at, _)| *at)
        };
        let took_ms = begins.zip(after("done and its container empty")).map(|(begins, done)| done - begins);
        let late = took_ms.is_some_and(|took| took >= LATE_MS && took <= most_ms + SLACK_MS);
        play.claim(late, &format!("{layer} came to its end late"), || format!("{took_ms:?} ms: {lines:?}"));
        let started = after(&format!("{layer}: start")).is_some();
        play.claim(started, &format!("{layer} was followed by a start"), || format!("{lines:?}"));
    }
    // The start that hangs is systemd's, in the owner's unit, and might still come to something: it is left to go on.
    nothing_left(play, host)?;
    says_503(play, host)?;

    play.registry()?.set(Mode::Good);
    host.must(&format!("rm {dir}/50-lab.conf"))?;
    host.claw_must("systemctl --user daemon-reload")?;
    before.righted(play, host, "nothing hangs any more", BACK)?;
    CLAW.wait(host, NOTICED * 2, "a closed incident", |s| s["incident"].is_null() && s["confirmed"] == true)?;
    let last = CLAW.incidents(host)?.last().cloned().ok_or("no incident is on record")?;
    play.claim(last["outcome"] == "recovered", "the incident is closed as recovered", || last.to_string());
    Ok(())
}

fn hang(play: &mut Play, divisor: u32, besides: Besides) -> Result<(), String> {
    let mut host = play.unbooted("n1", Template::User)?;
    let peer = play.plain("n2")?;
    // The store's disk is there before koboshi is: as an administrator would mount one.
    let owned = ["", "/share", "/state", "/state/koboshi", "/state/koboshi/store"]
        .map(|d| format!("/home/claw/.local{d}"));
    for dir in &owned {
        let dir = host.path(dir);
        if !dir.is_dir() {
            std::fs::create_dir(&dir).map_err(|e| format!("make {}: {e}", dir.display()))?;
        }
        std::os::unix::fs::chown(&dir, Some(1000), Some(1000))
            .map_err(|e| format!("own {}: {e}", dir.display()))?;
    }
    host.small_disk(STORE, STORE_MB)?;
    host.boot()?;
    host.must(&format!("rmdir {STORE}/lost+found; chmod 700 {STORE} {STORE}/.."))?;
    befriend(&host, &peer)?;
    judge::serves_within(&host, START)?;
    let key = peer.must("cut -d' ' -f1,2 /etc/ssh/ssh_host_ed25519_key.pub")?;
    let config = format!(
        "[ladder]\ndivide_limits_by = {divisor}\n\
         [[peer]]\nhost = \"n2\"\nuser = \"claw\"\nhost_key = \"{key}\"\nidentity = \"/home/claw/.ssh/id_ed25519\"\n"
    );
    host.claw_must(&format!(
        "umask 077; mkdir -p .config/koboshi/koboshi.d && cat > .config/koboshi/koboshi.d/worst.toml <<'END'\n{config}END\n"
    ))?;
    CLAW.install(&host, true)?;
    let settled = CLAW.settled(&host);
    if settled.is_err() {
        play.remember(&host);
    }
    settled?;
    let before = Before::take(&host)?;
    let result = all_at_once(play, &mut host, &peer, &before, divisor, besides);
    if result.is_err() || play.count.failed > 0 {
        play.remember(&host);
    }
    result
}

fn all_at_once(
    play: &mut Play,
    host: &mut Host,
    peer: &Host,
    before: &Before,
    divisor: u32,
    besides: Besides,
) -> Result<(), String> {
    let by = f64::from(divisor);
    let whole = divisor == 1;
    host.must("chown root: /home/claw/.npm-global/lib")?;
    Broken::StuckPam.set(host)?;
    play.registry()?.set(Mode::Hang);
    play.registry()?.asked();
    peer.freeze(true)?;
    let stuck = match besides {
        Besides::Nothing | Besides::Deaths => Some(host.stick(STORE, &format!("{STORE}/packs"))?),
        Besides::Reboot => {
            host.must(&format!("find {STORE} -type f -exec truncate -s 0 {{}} +"))?;
            None
        }
    };
    let pid = host.unit(Unit::User, "MainPID")?;
    host.must(&format!("rm {}/dist/index.js; kill -9 {pid}", Unit::User.package()))?;

    let limit = Duration::from_secs_f64(CLIMB_MS / by / 1_000.0) + NOTICED;
    if besides == Besides::Reboot {
        let began = CLAW.wait(host, NOTICED, "an incident", |s| s["incident"]["id"].is_u64())?;
        until_line(host, &began, "user-install: work begins", NOTICED)?;
        host.crash()?;
        host.boot()?;
    }
    let told = if besides == Besides::Deaths {
        let (told, deaths) = while_dying(host, || play.sink()?.wait_for("/emergency", limit));
        play.claim(deaths > 1, "the agent was killed again and again", || deaths.to_string());
        play.say(&format!("the agent died {deaths} times"));
        told
    } else {
        play.sink()?.wait_for("/emergency", limit)
    };
    play.expect(told, "the lab's receiver has accepted an emergency");
    let entered =
        CLAW.wait(host, NOTICED, "an emergency on record as sent", |s| s["incident"]["emergency"] == true)?;
    let lines = told_lines(host, &entered)?;
    in_time(play, &lines, by);
    every_turn(play, &lines, by, besides);
    let asked = play.registry()?.asked();
    play.claim(!asked.is_empty(), "the registry was asked", || format!("{asked:?}"));
    nothing_left(play, host)?;
    says_503(play, host)?;

    // What was never missed cannot come back: the agent asks them all, and says who is silent.
    let silent = said(host, "do not answer", NOTICED)?;
    // An agent that has not itself seen them hang asks them when it comes to try them.
    if besides == Besides::Nothing {
        let all = ["registry", "store", "peers"].iter().all(|name| silent.contains(name));
        play.claim(all, "the agent knows who is silent", || silent.clone());
    }
    // The disk is let go in any case at the end; which of the two comes back first is what differs.
    let stuck = if whole {
        play.registry()?.set(Mode::Good);
        stuck
    } else {
        drop(stuck);
        None
    };
    before.righted(play, host, if whole { "the registry is back" } else { "the disk is back" }, BACK)?;
    CLAW.wait(host, NOTICED * 2, "a closed incident", |s| s["incident"].is_null() && s["confirmed"] == true)?;
    let last = CLAW.incidents(host)?.last().cloned().ok_or("no incident is on record")?;
    let layer = if whole { "user-install" } else { "restore" };
    let right = last["outcome"] == "recovered" && last["layer"] == layer;
    play.claim(right, &format!("{layer} righted it, and the incident is closed"), || last.to_string());
    let closing = play.sink()?.wait_for("/closing", NOTICED);
    play.expect(closing, "and that is told too");
    drop(stuck);
    peer.freeze(false)?;
    Broken::StuckPam.mend(host)
}

/// Kills the agent at random moments until `wait` is over; what that says, and how many times.
fn while_dying<T>(host: &Host, wait: impl FnOnce() -> T) -> (T, u32) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            let mut deaths = 0;
            while !over.load(Ordering::Relaxed) {
                let random = std::hash::RandomState::new().hash_one(deaths);
                let pause = DEATHS_MS.start + random % (DEATHS_MS.end - DEATHS_MS.start);
                std::thread::sleep(Duration::from_millis(pause));
                let kill = "systemctl --user kill --kill-whom=main --signal=KILL koboshi.service";
                deaths += u32::from(!over.load(Ordering::Relaxed) && host.claw(kill).is_ok_and(|o| o.ok()));
            }
            deaths
        });
        let result = wait();
        over.store(true, Ordering::Relaxed);
        (result, killer.join().unwrap_or(0))
    })
}

/// Waits for a line of the open incident.
fn until_line(host: &Host, status: &Value, words: &str, limit: Duration) -> Result<(), String> {
    let started = Instant::now();
    loop {
        let lines = lines(host, status)?;
        if at(&lines, words).is_some() {
            return Ok(());
        }
        if started.elapsed() > limit {
            return Err(format!("never \"{words}\": {lines:?}"));
        }
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// The line of the agent's log that holds these words.
fn said(host: &Host, words: &str, limit: Duration) -> Result<String, String> {
    let started = Instant::now();
    loop {
        let out =
            host.must(&format!("journalctl --no-pager -o cat | grep -F '{words}' | tail -n 1; true"))?;
        if !out.is_empty() || started.elapsed() > limit {
            return Ok(out);
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// The open incident's lines, once it is on record that its message was accepted.
fn told_lines(host: &Host, status: &Value) -> Result<Vec<(f64, String)>, String> {
    let started = Instant::now();
    loop {
        let lines = lines(host, status)?;
        if at(&lines, "-emergency sent").is_some() || started.elapsed() > NOTICED {
            return Ok(lines);
        }
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// The open incident's lines: milliseconds since its opening, and words.
fn lines(host: &Host, status: &Value) -> Result<Vec<(f64, String)>, String> {
    let id = status["incident"]["id"].as_u64().ok_or_else(|| format!("no incident: {status}"))?;
    let shown = CLAW.ask(host, &format!("incidents show {id}"))?;
    let lines = shown["incident"]["lines"].as_array().ok_or_else(|| format!("no lines: {shown}"))?;
    let pair = |l: &Value| Some((l["after_ms"].as_f64()?, l["what"].as_str()?.to_owned()));
    Ok(lines.iter().filter_map(pair).collect())
}

fn at(lines: &[(f64, String)], words: &str) -> Option<f64> {
    lines.iter().find(|(_, what)| what.contains(words)).map(|(at, _)| *at)
}

/// Entered and told inside the climb's time.
fn in_time(play: &mut Play, lines: &[(f64, String)], by: f64) {
    let began = at(lines, "climb 1");
    let sent = lines.iter().find(|(_, what)| what.contains("-emergency sent")).map(|(at, _)| *at);
    let entered = lines.iter().find(|(_, what)| what.starts_with("emergency:")).map(|(at, _)| *at);
    let inside = |end: Option<f64>| began.zip(end).is_some_and(|(began, end)| end - began <= CLIMB_MS / by);
    play.claim(inside(entered), "emergency is entered inside the climb's time", || format!("{lines:?}"));
    play.claim(inside(sent), "and its message accepted inside it", || format!("{lines:?}"));
    if let Some(((began, entered), sent)) = began.zip(entered).zip(sent) {
        let s = |ms: f64| (ms - began) / 1_000.0;
        play.say(&format!(
            "entered after {:.1} s, accepted after {:.1} s of {:.0}",
            s(entered),
            s(sent),
            CLIMB_MS / by / 1_000.0
        ));
    }
}

/// Each layer had its turn, in order, and no work got more than its most.
fn every_turn(play: &mut Play, lines: &[(f64, String)], by: f64, besides: Besides) {
    let mut last = -1.0;
    for (layer, most_ms) in MOST_MS {
        let begins = at(lines, &format!("{layer}: work begins"));
        let turn = begins.or_else(|| at(lines, &format!("{layer}: passed")));
        let words = lines.iter().filter(|(_, what)| what.starts_with(layer)).map(|(_, what)| what.as_str());
        play.say(&words.collect::<Vec<_>>().join(" / "));
        play.claim(
            turn.is_some_and(|turn| turn >= last),
            &format!("{layer} had its turn after those before it"),
            || format!("{lines:?}"),
        );
        last = turn.unwrap_or(last);
        // A step that ended with its agent has no record of its own end.
        let Some(begins) = begins.filter(|_| besides == Besides::Nothing) else { continue };
        let ended = lines.iter().find(|(at, what)| *at >= begins && what.starts_with("step "));
        let took = ended.map(|(ended, _)| ended - begins);
        let limit = most_ms / by + SLACK_MS;
        play.claim(took.is_some_and(|took| took <= limit), &format!("{layer} ended within its most"), || {
            format!("{took:?} of {limit} ms")
        });
    }
    if besides != Besides::Nothing {
        return;
    }
    let hung = |layer: &str, words: &str| {
        lines.iter().any(|(_, what)| what.starts_with(layer) && what.contains(words))
    };
    play.claim(hung("restart", "passed"), "restart was passed: the program is not whole", String::new);
    let stuck = hung("restore", "work begins") || hung("restore", "the store does not answer");
    play.claim(
        stuck,
        "restore hung on the store's disk, in its work or already at the look before it",
        String::new,
    );
    play.claim(hung("system-install", "sudo did not answer"), "sudo hung", String::new);
    play.claim(hung("user-install", "work begins"), "user install set to work", String::new);
    play.claim(hung("peer-copy", "work begins"), "peer copy set to work", String::new);
}

/// No process of a step lives, nothing of npm's, nobody waits in sudo, and every step's container is empty.
fn nothing_left(play: &mut Play, host: &Host) -> Result<(), String> {
    let left = host.must(
        "ps axo pid,user,args --no-headers | grep -E '/steps/step-|npm-cli|npm install|sudo |sleep infinity|exe reach' | grep -v -e grep -e ' 1000000000$'; true",
    )?;
    play.claim(left.is_empty(), "no process of any layer is left", || left.clone());
    let full = host.must(
        "for f in $(find /sys/fs/cgroup -path '*/steps/step-*/cgroup.events'); do grep -l 'populated 1' $f; done; true",
    )?;
    play.claim(full.is_empty(), "every step's container is empty", || full.clone());
    let gateways = host.gateways()?;
    play.claim(gateways.is_empty(), "no gateway runs", || format!("{gateways:?}"));
    Ok(())
}

/// Whoever asks the gateway's port is told.
fn says_503(play: &mut Play, host: &Host) -> Result<(), String> {
    let started = Instant::now();
    let ask = format!("curl -s --max-time 3 -w ' %{{http_code}}' http://127.0.0.1:{}/readyz", judge::PORT);
    loop {
        let out = host.root(&ask)?;
        let right = out.out.ends_with(" 503") && out.out.contains("\"koboshi\":\"emergency\"");
        if right || started.elapsed() > VOICE {
            play.claim(right, "the port answers 503", || out.words());
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(250));
    }
}
