//! koboshi on a host: installed by its own command, as root or as the node's user, and asked as a person would.

use super::Play;
use super::host::Host;
use super::judge;
use super::net;
use super::sink;
use serde_json::Value;
use std::time::{Duration, Instant};

/// Installing takes the first snapshot of the whole program.
const INSTALL_LIMIT: Duration = Duration::from_secs(600);
/// Commands that only read or ask.
const ASK_LIMIT: Duration = Duration::from_secs(60);
/// The first snapshot becomes good once the node has served for the settling time below.
const SETTLED_LIMIT: Duration = Duration::from_secs(900);
/// Between two looks.
const AGAIN: Duration = Duration::from_millis(250);
/// What the lab's scenarios set: settling takes 120 s in life, and here nothing else is measured by it.
const CONFIG: &str = "[backup]\nsettle_s = 8\nstate_every_least_s = 30\nstate_every_most_s = 60\n";

/// Whose koboshi it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Home {
    /// A system service of root.
    Root,
    /// An unprivileged user service of the node's user.
    Claw,
}

/// koboshi on one host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Koboshi(pub(crate) Home);

impl Koboshi {
    /// Writes the lab's configuration and installs by `koboshi install`.
    pub(crate) fn install(self, host: &Host, alerts: bool) -> Result<String, String> {
        let mut config = CONFIG.to_owned();
        if alerts {
            config += &format!(
                "[[alert]]\nkind = \"webhook\"\nurl = \"http://{}:{}/hook\"\n",
                net::SERVICES,
                sink::PORT
            );
        }
        let dir = self.config_dir();
        let script = format!(
            "umask 077; mkdir -p {dir}/koboshi.d && cat > {dir}/koboshi.d/lab.toml <<'END'\n{config}END\n"
        );
        match self.0 {
            Home::Root => host.must(&script)?,
            Home::Claw => host.claw_must(&script)?,
        };
        let out = self.run(host, "install", INSTALL_LIMIT)?;
        if out.ok() { Ok(out.out) } else { Err(format!("koboshi install: {}", out.words())) }
    }

    fn config_dir(self) -> &'static str {
        match self.0 {
            Home::Root => "/etc/koboshi",
            Home::Claw => "/home/claw/.config/koboshi",
        }
    }

    /// A command of koboshi.
    pub(crate) fn run(self, host: &Host, words: &str, limit: Duration) -> Result<super::tool::Out, String> {
        match self.0 {
            Home::Root => host.root_within(&format!("koboshi {words}"), limit),
            Home::Claw => host.claw_within(&format!("koboshi {words}"), limit),
        }
    }

    /// A command's one object.
    pub(crate) fn ask(self, host: &Host, words: &str) -> Result<Value, String> {
        let out = self.run(host, &format!("{words} --json"), ASK_LIMIT)?;
        serde_json::from_str(out.out.trim())
            .map_err(|e| format!("koboshi {words} --json: {e}: {}", out.words()))
    }

    /// What its agent published last.
    pub(crate) fn status(self, host: &Host) -> Result<Value, String> {
        let dir = match self.0 {
            Home::Root => "/run/koboshi",
            Home::Claw => "/run/user/1000/koboshi",
        };
        let text = host.must(&format!("cat {dir}/status.json"))?;
        serde_json::from_str(&text).map_err(|e| format!("status.json: {e}"))
    }

    /// Waits until the agent is sure of a serving node, has nothing open and all its daily jobs done.
    pub(crate) fn settled(self, host: &Host) -> Result<Value, String> {
        self.wait(host, SETTLED_LIMIT, "a settled agent", |s| {
            s["verdict"]["verdict"] == "serving"
                && s["confirmed"] == true
                && s["incident"].is_null()
                && s["settled"] == true
                && s["snapshot"].is_string()
        })
    }

    /// Waits until the agent's status is as wanted.
    pub(crate) fn wait(
        self,
        host: &Host,
        limit: Duration,
        what: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value, String> {
        let started = Instant::now();
        loop {
            let status = self.status(host);
            if let Ok(status) = &status
                && wanted(status)
            {
                return Ok(status.clone());
            }
            if started.elapsed() > limit {
                return Err(format!("not {what} within {:.0} s: {}", limit.as_secs_f64(), words(&status)));
            }
            std::thread::sleep(AGAIN);
        }
    }

    /// Closed incidents, the oldest first.
    pub(crate) fn incidents(self, host: &Host) -> Result<Vec<Value>, String> {
        let object = self.ask(host, "incidents list")?;
        let mut all = object["incidents"].as_array().cloned().ok_or_else(|| format!("no list: {object}"))?;
        all.sort_by_key(|i| i["id"].as_u64());
        Ok(all)
    }

    /// Flips a byte in the middle of every pack of root's store: none of its objects can be trusted any more.
    pub(crate) fn corrupt_store(host: &Host) -> Result<(), String> {
        let script = "cd /var/lib/koboshi/store && n=0 && for f in $(find . -type f -size +1k -path '*pack*'); do \
            at=$(( $(stat -c %s $f) / 2 )); \
            old=$(od -An -tu1 -j $at -N 1 $f); \
            printf \"\\\\$(printf %03o $(( old ^ 255 )))\" | dd of=$f bs=1 seek=$at conv=notrunc status=none && n=$((n+1)); \
            done; echo $n; test $n -gt 0";
        host.must(script).map(drop)
    }

    /// The start ration as the agent counts it: waits until a start is free.
    pub(crate) fn start_is_free(self, host: &Host) -> Result<(), String> {
        self.wait(host, Duration::from_secs(310), "a free start", |s| {
            let (free, at) = (s["start_free_at"]["ms"].as_u64(), s["at"]["ms"].as_u64());
            matches!((free, at), (Some(free), Some(at)) if free <= at)
        })
        .map(drop)
    }

    /// Pid and start ticks of its agent's process.
    pub(crate) fn agent(self, host: &Host) -> Result<u32, String> {
        let status = self.status(host)?;
        let pid = status["agent"]["pid"].as_u64().and_then(|p| u32::try_from(p).ok());
        pid.ok_or_else(|| format!("no agent in the status: {}", status["agent"]))
    }
}

fn words(status: &Result<Value, String>) -> String {
    match status {
        Ok(s) => format!(
            "verdict {}, confirmed {}, incident {}, settled {}, snapshot {}, trouble {}",
            s["verdict"], s["confirmed"], s["incident"], s["settled"], s["snapshot"], s["trouble"]
        ),
        Err(why) => why.clone(),
    }
}

/// What must hold at the end of every recovery, judged by the lab.
pub(crate) struct Before {
    hello: judge::Hello,
    ledger: judge::Ledger,
}

impl Before {
    /// A serving node and what its user has.
    pub(crate) fn take(host: &Host) -> Result<Before, String> {
        Ok(Before {
            hello: judge::serves_within(host, Duration::from_secs(900))?,
            ledger: judge::Ledger::take(host)?,
        })
    }

    /// Claims that the node serves again: another boot of the same version, exactly one gateway, nothing lost.
    pub(crate) fn righted(
        &self,
        play: &mut Play,
        host: &Host,
        what: &str,
        limit: Duration,
    ) -> Result<(), String> {
        let started = Instant::now();
        let mut hello = judge::serves_within(host, limit);
        while hello.as_ref().is_ok_and(|h| h.boot_id == self.hello.boot_id) && started.elapsed() < limit {
            std::thread::sleep(AGAIN);
            hello = judge::serves_within(host, limit);
        }
        let took = started.elapsed().as_secs_f64();
        let Some(hello) = play.expect(hello, &format!("{what}: it says hello again")) else {
            return Err("no gateway to go on with".to_owned());
        };
        play.say(&format!("after {took:.1} s"));
        play.claim(hello.boot_id != self.hello.boot_id, &format!("{what}: it is a new start"), || {
            hello.boot_id.clone()
        });
        play.claim(hello.version == self.hello.version, &format!("{what}: of the same version"), || {
            hello.version.clone()
        });
        let gateways = host.gateways()?;
        play.claim(gateways.len() == 1, &format!("{what}: exactly one gateway runs"), || {
            format!("{gateways:?}")
        });
        let lost = self.ledger.losses(&judge::Ledger::take(host)?);
        play.claim(lost.is_empty(), &format!("{what}: the user has lost nothing"), || format!("{lost:?}"));
        Ok(())
    }
}
