//! `koboshi fleet status|enroll`: other hosts whose nodes may lend their program.
//!
//! Enrolling is the one moment at which somebody decides whom to believe: the host's key is shown, compared and pinned
//! then, and never again. Our own key is made for this one purpose and may run one read-only command there.

use super::desk::{Desk, Fields};
use crate::cli::{Enroll, Fleet};
use crate::print::Exit;
use host::clock::{self, Deadline};
use host::run::{Cmd, run as run_tool};
use host::{Context, Error, Kind, Result, files};
use layers::peer_copy::Peer;
use reach::{Call, Status, Target, keys};
use serde_json::Value;
use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// One peer's answer; slower ones are no help in an incident either.
const STATUS_LIMIT: Duration = Duration::from_secs(20);
/// How long a peer may say nothing meanwhile.
const SILENCE: Duration = Duration::from_secs(10);
/// Peers asked at a time.
const MAX_PEERS: usize = 32;
/// The one ordinary `ssh` of an enrolment.
const SSH_LIMIT: Duration = Duration::from_secs(30);
/// An answer typed by a person.
const MAX_ANSWER_BYTES: u64 = 100;

/// Does what was asked for.
pub(super) fn run(desk: &Desk, what: Option<&Fleet>) -> Result<Exit> {
    match what {
        None | Some(Fleet::Status) => status(desk),
        Some(Fleet::Enroll(options)) => enroll(desk, options),
    }
}

/// The SSH part of one conversation, in a process of its own.
pub fn reach(text: &str) -> Result<Exit> {
    let target: Target =
        serde_json::from_str(text).map_err(|e| Error::new(Kind::Usage, "read whom to talk to", e))?;
    reach::pump(&target)?;
    Ok(Exit::Done)
}

fn ask(target: &Target) -> Result<Status> {
    let mut call = Call::open(Path::new("/proc/self/exe"), target, SILENCE, Deadline::after(STATUS_LIMIT))?;
    call.status()
}

fn node_user(desk: &Desk) -> String {
    desk.node().map(|n| n.user).unwrap_or_else(|_| std::env::var("USER").unwrap_or_default())
}

// ---- status ----

fn status(desk: &Desk) -> Result<Exit> {
    let p = desk.printer;
    let peers: Vec<&Peer> = desk.config.peer.iter().take(MAX_PEERS).collect();
    let user = node_user(desk);
    let targets: Vec<Target> =
        peers.iter().map(|peer| peer.target(&user, &desk.places.donate_key())).collect();
    let bar = p.spinner("asking the peers");
    let answers: Vec<(Result<Status>, u64)> = std::thread::scope(|scope| {
        let asked: Vec<_> = targets
            .iter()
            .map(|target| {
                scope.spawn(move || {
                    let began = clock::now();
                    let answer = ask(target);
                    (answer, clock::now().since_ms(began).unwrap_or(0))
                })
            })
            .collect();
        let lost = || (Err(Error::new(Kind::System, "ask a peer", "the thread that asked is gone")), 0);
        asked.into_iter().map(|a| a.join().unwrap_or_else(|_| lost())).collect()
    });
    bar.done();
    let mut told: Vec<Value> = Vec::new();
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut all_well = !peers.is_empty();
    for ((peer, target), (answer, took_ms)) in peers.iter().zip(&targets).zip(answers) {
        let fields = Fields::default()
            .put("host", peer.host.as_str())
            .put("port", peer.port)
            .put("user", target.user.as_str())
            .put("trusted", peer.trusted)
            .put("reachable", answer.is_ok())
            .put("took_ms", took_ms as f64);
        let (fields, row) = match answer {
            Ok(s) => {
                all_well &= s.healthy == Some(true);
                let healthy = match s.healthy {
                    Some(true) => p.green("healthy"),
                    Some(false) => p.red("not serving"),
                    None => p.yellow("unknown"),
                };
                let version = s.version.clone().unwrap_or_else(|| "none".to_owned());
                let row = vec![
                    peer.host.clone(),
                    healthy,
                    version,
                    format!("{} {}", s.arch, s.libc),
                    s.why.clone(),
                ];
                let fields = fields
                    .maybe("healthy", s.healthy)
                    .maybe("version", s.version)
                    .put("arch", s.arch)
                    .put("libc", s.libc)
                    .put("koboshi", s.koboshi)
                    .put("node", s.node)
                    .put("source", s.source)
                    .put("why", s.why);
                (fields, row)
            }
            Err(e) => {
                all_well = false;
                let row = vec![
                    peer.host.clone(),
                    p.red("unreachable"),
                    String::new(),
                    String::new(),
                    e.why.clone(),
                ];
                (fields.put("why", e.why), row)
            }
        };
        told.push(fields.done());
        rows.push(row);
    }
    if rows.is_empty() {
        p.line("No peer is configured: nobody could lend its program to this node.");
        p.line("  fix: koboshi fleet enroll HOST");
    } else {
        p.table(&["PEER", "NODE", "VERSION", "MACHINE", "WHY"], &rows);
    }
    p.object(Fields::default().put("all_well", all_well).put("peers", told).done());
    Ok(if all_well || peers.is_empty() { Exit::Done } else { Exit::Failed })
}

// ---- enroll ----

fn enroll(desk: &Desk, options: &Enroll) -> Result<Exit> {
    let p = desk.printer;
    let what = || format!("enroll {}", options.host);
    if let Some(bad) = unfit(options) {
        return Err(Error::new(Kind::Usage, what(), bad));
    }
    let user = options.user.clone().unwrap_or_else(|| node_user(desk));
    let mut peer = Peer {
        host: options.host.clone(),
        user: user.clone(),
        port: options.port,
        host_key: String::new(),
        identity: PathBuf::new(),
        trusted: options.trusted,
    };
    let identity = desk.places.donate_key();
    let shown = reach::scan(&peer.target(&user, &identity))?;
    pin(desk, options, &shown)?;
    peer.host_key = shown;
    let public = keys::ensure(&identity, "koboshi-donate")?;
    let target = peer.target(&user, &identity);
    let mut installed = false;
    // Enrolled before, or the line was added by hand: then there is nothing to install.
    let answer = match ask(&target) {
        Ok(status) => Ok(status),
        Err(_) => {
            install_line(desk, options, &peer, &public)?;
            installed = true;
            ask(&target)
        }
    };
    let status = answer.map_err(|e| {
        e.hint("the key is in place there, but koboshi does not answer; try `koboshi fleet enroll` again when it runs")
    })?;
    let file = write_down(desk, &peer)?;
    let version = status.version.clone().unwrap_or_else(|| "no program".to_owned());
    p.line(format!(
        "{} {} has {version} ({}); it may lend it from now on",
        p.green("enrolled"),
        peer.host,
        status.why
    ));
    p.line(format!("  written to {}; the agent reads it when it starts anew", file.display()));
    let fields = Fields::default()
        .put("host", peer.host.as_str())
        .put("port", peer.port)
        .put("user", peer.user.as_str())
        .put("host_key", peer.host_key.as_str())
        .put("installed", installed)
        .put("file", file.display().to_string())
        .maybe("version", status.version)
        .maybe("healthy", status.healthy);
    p.object(fields.done());
    Ok(Exit::Done)
}

/// What could be taken for something else on a command line or in a file of another program.
fn unfit(options: &Enroll) -> Option<&'static str> {
    let plain = |text: &str| {
        !text.is_empty()
            && !text.starts_with('-')
            && text.chars().all(|c| c.is_ascii_alphanumeric() || ".-_:%".contains(c))
    };
    if !plain(&options.host) {
        return Some("this is no name or address of a host");
    }
    if options.user.as_ref().is_some_and(|u| !plain(u)) {
        return Some("this is no name of a user");
    }
    if !plain(&options.node) {
        return Some("this is no name of a node");
    }
    if options.command.as_ref().is_some_and(|c| c.chars().any(char::is_control)) {
        return Some("the command holds control characters");
    }
    None
}

/// Compares the key that was shown with the one that is expected, or has a person do it.
fn pin(desk: &Desk, options: &Enroll, shown: &str) -> Result<()> {
    let what = || format!("pin the host key of {}", options.host);
    let shown = keys::public(shown)?;
    if let Some(expected) = &options.host_key {
        let expected = keys::public(expected)?;
        if expected.key_data() != shown.key_data() {
            let why = format!(
                "it shows {}, expected is {}",
                keys::fingerprint(&shown),
                keys::fingerprint(&expected)
            );
            return Err(Error::new(Kind::Denied, what(), why).hint("somebody else may be answering for it"));
        }
        if options.yes {
            return Ok(());
        }
    }
    let p = desk.printer;
    p.note(format!("{} shows the key {}", options.host, keys::fingerprint(&shown)));
    p.note("  compare: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub on that host");
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Err(Error::new(Kind::Usage, what(), "nobody is there to compare it")
            .hint("give --host-key KEY and --yes"));
    }
    let mut err = std::io::stderr();
    let asked = err.write_all(b"Is it this one? [y/N] ").and_then(|()| err.flush());
    asked.context(what)?;
    let mut answer = String::new();
    std::io::Read::take(stdin.lock(), MAX_ANSWER_BYTES).read_line(&mut answer).context(what)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(());
    }
    Err(Error::new(Kind::Denied, what(), "it was not confirmed"))
}

/// Adds our key with its forced command to the peer's `authorized_keys`, through the ssh access that the caller has.
fn install_line(desk: &Desk, options: &Enroll, peer: &Peer, public: &str) -> Result<()> {
    let p = desk.printer;
    let what = || format!("give {} our key", peer.host);
    let by_hand = |command: &str| {
        p.note(format!("Add this line to ~/.ssh/authorized_keys of {} on {}:", peer.user, peer.host));
        p.note(format!("  {}", line(command, public)));
    };
    let known = desk.places.run_dir.join("enroll.known_hosts");
    files::make_private_dir(&desk.places.run_dir)?;
    files::write_atomic(
        &known,
        format!("[{}]:{} {}\n", peer.host, peer.port, peer.host_key).as_bytes(),
        0o600,
    )?;
    let out = run_tool(&ssh(options, peer, public, &known), Deadline::after(SSH_LIMIT));
    let _ = std::fs::remove_file(&known);
    let told = match &out {
        Ok(out) if out.ok() => return Ok(()),
        Ok(out) if out.timed_out => "it took too long".to_owned(),
        Ok(out) => {
            String::from_utf8_lossy(&out.stderr).lines().last().unwrap_or("it failed").trim().to_owned()
        }
        Err(e) => e.why.clone(),
    };
    by_hand(&options.command.clone().unwrap_or_else(|| format!("koboshi donate {}", options.node)));
    Err(Error::new(Kind::Denied, what(), told).hint("add the line above by hand, then enroll again"))
}

fn line(command: &str, public: &str) -> String {
    format!("command=\"{}\",restrict {public}", command.replace('\\', "\\\\").replace('"', "\\\""))
}

/// The ordinary ssh client, which may use whatever access its caller has, but only to the host that was just pinned. It
/// must not ask: a question nobody sees would hang.
fn ssh(options: &Enroll, peer: &Peer, public: &str, known: &Path) -> Cmd {
    let find = match &options.command {
        Some(command) => format!("c={}", quoted(command)),
        None => format!(
            "k=$(command -v koboshi || true); \
             for p in \"$HOME/.local/bin/koboshi\" /usr/local/bin/koboshi /usr/bin/koboshi; do \
             [ -n \"$k\" ] || {{ [ -x \"$p\" ] && k=$p; }}; done; \
             [ -n \"$k\" ] || {{ echo koboshi is not installed there >&2; exit 3; }}; c=\"$k donate {}\"",
            options.node
        ),
    };
    // Quotes within the command are escaped the way sshd reads them back.
    let script = format!(
        "set -e; umask 077; {find}; key={}; \
         c=$(printf %s \"$c\" | sed 's/[\\\\\"]/\\\\&/g'); \
         mkdir -p ~/.ssh; f=~/.ssh/authorized_keys; touch \"$f\"; \
         grep -qF \"$key\" \"$f\" || printf 'command=\"%s\",restrict %s\\n' \"$c\" \"$key\" >> \"$f\"",
        quoted(public)
    );
    let option = |text: String| ["-o".to_owned(), text];
    let mut args: Vec<String> = ["-T".to_owned(), "-p".to_owned(), peer.port.to_string()].into();
    args.extend(option("BatchMode=yes".into()));
    args.extend(option("StrictHostKeyChecking=yes".into()));
    args.extend(option("ForwardAgent=no".into()));
    args.extend(option("ConnectTimeout=10".into()));
    args.extend(option(format!("UserKnownHostsFile={}", known.display())));
    args.extend(option("GlobalKnownHostsFile=/dev/null".into()));
    args.extend(option(format!("HostKeyAlias=[{}]:{}", peer.host, peer.port)));
    args.extend(["-l".to_owned(), peer.user.clone(), "--".to_owned(), peer.host.clone()]);
    args.push(format!("sh -c {}", quoted(&script)));
    Cmd::new("ssh", args)
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// The peer's own drop-in: enrolled again, it is written over.
fn write_down(desk: &Desk, peer: &Peer) -> Result<PathBuf> {
    #[derive(serde::Serialize)]
    struct DropIn<'a> {
        peer: [&'a Peer; 1],
    }
    let name: String =
        peer.host.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect();
    let file =
        desk.places.config_file.with_file_name("koboshi.d").join(format!("peer-{name}-{}.toml", peer.port));
    let text = toml::to_string(&DropIn { peer: [peer] })
        .map_err(|e| Error::new(Kind::System, format!("write {}", file.display()), e))?;
    let dir = file.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(dir).context(|| format!("make {}", dir.display()))?;
    files::write_atomic(&file, format!("# Written by `koboshi fleet enroll`.\n{text}").as_bytes(), 0o600)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(host: &str) -> Enroll {
        Enroll {
            host: host.into(),
            user: None,
            port: 22,
            host_key: None,
            yes: false,
            trusted: false,
            node: "main".into(),
            command: None,
        }
    }

    #[test]
    fn what_could_be_taken_for_an_option_or_a_command_is_refused() {
        for bad in ["", "-oProxyCommand=x", "a b", "a;b", "a\nb", "$(x)", "a'b"] {
            assert!(unfit(&options(bad)).is_some(), "{bad:?}");
            assert!(unfit(&Enroll { user: Some(bad.into()), ..options("h") }).is_some(), "{bad:?}");
            assert!(unfit(&Enroll { node: bad.into(), ..options("h") }).is_some(), "{bad:?}");
        }
        assert!(unfit(&options("fe80::1%eth0")).is_none());
    }

    #[test]
    fn the_line_can_be_read_back_by_sshd() {
        let text = line("env A=\"b c\" /x/koboshi donate main", "ssh-ed25519 AAAA koboshi");
        assert_eq!(
            text,
            "command=\"env A=\\\"b c\\\" /x/koboshi donate main\",restrict ssh-ed25519 AAAA koboshi"
        );
    }
}
