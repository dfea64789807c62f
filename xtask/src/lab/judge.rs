//! The lab's own judge: does the real gateway of a host answer an authenticated hello, and does its user still have
//! everything? koboshi's word is never asked.

use super::host::Host;
use super::net;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};
use tungstenite::{Message, WebSocket};

/// A healthy gateway answers in half a second, on a busy machine in a few.
const HELLO_LIMIT: Duration = Duration::from_secs(8);
/// Between two tries.
const AGAIN: Duration = Duration::from_millis(200);
/// Frames read before the answer must have come.
const FRAMES_LIMIT: usize = 64;
/// Listing and hashing what a user owns.
const LEDGER_LIMIT: Duration = Duration::from_secs(60);
/// The gateway's port in every host.
pub(crate) const PORT: u16 = 18789;
/// The protocol of the tested release.
const PROTOCOL: u64 = 4;
/// What is the user's below the state directory. The gateway writes there too, but never changes these names.
const OWNED: &str = "workspace credentials";
/// Rows that are the user's: their table, a condition and what is compared.
const ROWS: [(&str, &str, &str); 3] = [
    ("cron_jobs", "name LIKE 'lab-%'", "store_key || ' ' || job_id || ' ' || job_json"),
    ("device_identities", "1", "identity_key || ' ' || device_id || ' ' || public_key_pem"),
    ("device_pairing_paired", "1", "device_id || ' ' || public_key"),
];

/// Fewer than this is a ledger that was not read: the seeded job and the identity; and the seeded files besides.
const LEAST_ROWS: usize = 2;
const LEAST_OWNED: usize = 6;

/// What the gateway said of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) version: String,
    /// New at every start.
    pub(crate) boot_id: String,
}

/// One authenticated hello.
pub(crate) fn hello(host: &Host) -> Result<Hello, String> {
    let token = token(host)?;
    let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT);
    let stream = net::connect(&host.netns, address, HELLO_LIMIT)?;
    let (mut socket, _) = tungstenite::client(format!("ws://127.0.0.1:{PORT}/"), stream)
        .map_err(|e| format!("no WebSocket: {e}"))?;
    wait_for(&mut socket, |m| m["event"] == "connect.challenge")?;
    let connect = json!({ "type": "req", "id": "lab", "method": "connect", "params": {
        "minProtocol": PROTOCOL, "maxProtocol": PROTOCOL, "role": "operator", "scopes": ["operator.read"],
        "client": { "id": "gateway-client", "version": "0", "platform": "linux", "mode": "backend" },
        "caps": [], "commands": [], "permissions": {}, "auth": { "token": token },
    }});
    socket.send(Message::text(connect.to_string())).map_err(|e| format!("send connect: {e}"))?;
    let answer = wait_for(&mut socket, |m| m["id"] == "lab")?;
    let _ = socket.close(None);
    let _ = socket.flush();
    if answer["payload"]["type"] != "hello-ok" {
        return Err(format!("no hello-ok: {}", answer["error"]));
    }
    let text = |name: &str| answer["payload"]["server"][name].as_str().unwrap_or_default().to_owned();
    Ok(Hello { version: text("version"), boot_id: text("bootId") })
}

/// Says hello until it is answered.
pub(crate) fn serves_within(host: &Host, limit: Duration) -> Result<Hello, String> {
    let started = Instant::now();
    loop {
        match hello(host) {
            Ok(hello) => return Ok(hello),
            Err(why) if started.elapsed() > limit => {
                return Err(format!(
                    "no hello from {} within {:.0} s: {why}",
                    host.name,
                    limit.as_secs_f64()
                ));
            }
            Err(_) => std::thread::sleep(AGAIN),
        }
    }
}

fn wait_for(socket: &mut WebSocket<TcpStream>, wanted: impl Fn(&Value) -> bool) -> Result<Value, String> {
    for _ in 0..FRAMES_LIMIT {
        let frame = socket.read().map_err(|e| format!("no frame: {e}"))?;
        if let Message::Text(text) = frame
            && let Ok(value) = serde_json::from_str(text.as_str())
            && wanted(&value)
        {
            return Ok(value);
        }
    }
    Err("many frames, no answer".to_owned())
}

/// The token as the template's node was given it. The file may be the one that a scenario has broken, so it is kept.
fn token(host: &Host) -> Result<String, String> {
    host.token.clone().ok_or_else(|| format!("{} was made without a node", host.name))
}

/// Reads the token out of a host's configuration, for the template and for a node that was onboarded anew.
pub(crate) fn read_token(host: &Host) -> Option<String> {
    let text = std::fs::read_to_string(host.path("/home/claw/.openclaw/openclaw.json")).ok()?;
    let value: Value = serde_json::from_str(&text).ok()?;
    value["gateway"]["auth"]["token"].as_str().map(str::to_owned)
}

/// What the user of a host has: file or row, and what it holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ledger(BTreeMap<String, String>);

impl Ledger {
    /// Takes stock; files by their hash, rows by their text.
    pub(crate) fn take(host: &Host) -> Result<Ledger, String> {
        let mut script = format!(
            "cd /home/claw/.openclaw && find {OWNED} -type f -not -path '*/.git/*' -print0 | sort -z | xargs -0r sha256sum\n"
        );
        for (table, condition, value) in ROWS {
            script += &format!(
                "sqlite3 -readonly -cmd '.timeout 5000' state/openclaw.sqlite \
                 \"SELECT 'row  {table} ' || hex({value}) FROM {table} WHERE {condition}\"\n"
            );
        }
        let out = host.root_within(&script, LEDGER_LIMIT)?;
        let pair = |line: &str| {
            let (hash, name) = line.split_once("  ")?;
            Some((name.to_owned(), hash.to_owned()))
        };
        let ledger: BTreeMap<String, String> = out.out.lines().filter_map(pair).collect();
        if ledger.keys().filter(|name| name.contains("_")).count() < LEAST_ROWS || ledger.len() < LEAST_OWNED
        {
            return Err(format!("cannot take stock of the user's things: {}", out.words()));
        }
        Ok(Ledger(ledger))
    }

    /// What of this is gone or other in `later`; additions are nobody's loss.
    pub(crate) fn losses(&self, later: &Ledger) -> Vec<String> {
        let gone = |(name, hash): &(&String, &String)| later.0.get(*name) != Some(hash);
        self.0.iter().filter(gone).map(|(name, _)| name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_what_is_gone_or_other() {
        let of = |pairs: &[(&str, &str)]| {
            Ledger(pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect())
        };
        let before = of(&[("a", "1"), ("b", "2"), ("c", "3")]);
        let after = of(&[("a", "1"), ("b", "x"), ("new", "4")]);
        assert_eq!(before.losses(&after), ["b", "c"]);
        assert!(before.losses(&before).is_empty());
    }
}
