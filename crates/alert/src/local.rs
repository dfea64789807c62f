//! Voices that need no network: the host's journal and the terminals of whoever is logged in. They are what is left
//! when nobody has configured a channel, so neither may hang us and neither may be used to write where it should not.

use crate::send::Sent;
use crate::text::{Message, Severity};
use host::clock::Deadline;
use host::run::{Cmd, run};
use rustix::fs::{FileType, Mode, OFlags};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

/// A journal that does not take a datagram in this time is stuck.
const JOURNAL_LIMIT: Duration = Duration::from_secs(2);
/// `wall` writes to every terminal and waits up to 5 s for one that is stopped.
const WALL_LIMIT: Duration = Duration::from_secs(8);
/// Terminals written to: more people than this are not logged in on a node.
const TERMINALS_LIMIT: usize = 64;
/// `/run/utmp` has 384 bytes per login.
const LOGINS_LIMIT_BYTES: u64 = 4 << 20;

/// Hands the message to journald in its own protocol, where it can be found by its fields.
pub(crate) fn journald(socket: &Path, m: &Message) -> Sent {
    let priority = match m.kind.severity() {
        Severity::Info => "6",
        Severity::Warning => "4",
        Severity::Critical => "2",
    };
    let mut entry = Vec::new();
    field(&mut entry, "MESSAGE", &format!("{}\n{}", m.title, m.text));
    field(&mut entry, "PRIORITY", priority);
    field(&mut entry, "SYSLOG_IDENTIFIER", "koboshi");
    field(&mut entry, "KOBOSHI_KIND", m.kind.name());
    field(&mut entry, "KOBOSHI_NODE", &m.node);
    field(&mut entry, "KOBOSHI_INCIDENT", &m.incident);
    field(&mut entry, "KOBOSHI_REF", &m.key);
    let sent = UnixDatagram::unbound().and_then(|journal| {
        journal.set_write_timeout(Some(JOURNAL_LIMIT))?;
        journal.send_to(&entry, socket)
    });
    match sent {
        Ok(_) => Sent::Accepted,
        Err(e) => Sent::Later { why: format!("the journal does not take it ({e})"), after: None },
    }
}

/// A value with line ends is written with its length, so that it cannot begin a field of its own.
fn field(entry: &mut Vec<u8>, name: &str, value: &str) {
    entry.extend_from_slice(name.as_bytes());
    if value.contains('\n') {
        entry.push(b'\n');
        entry.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        entry.push(b'=');
    }
    entry.extend_from_slice(value.as_bytes());
    entry.push(b'\n');
}

/// Writes an emergency on every terminal: by the system's own `wall`, which knows who is logged in and who wants no
/// messages, else to the terminals that the login records name. Anything less than an emergency is not shouted.
pub(crate) fn wall(m: &Message, deadline: Deadline) -> Sent {
    if m.kind.severity() != Severity::Critical {
        return Sent::Accepted;
    }
    let text = format!("{}\n{}\n", m.title, m.text);
    let by_tool = ["/usr/bin/wall", "/bin/wall"].into_iter().find(|p| Path::new(p).exists()).map(|program| {
        let cmd = Cmd { input: text.clone().into_bytes(), ..Cmd::new(program, [""; 0]) };
        run(&cmd, deadline.min(Deadline::after(WALL_LIMIT))).is_ok_and(|said| said.ok())
    });
    if by_tool == Some(true) {
        return Sent::Accepted;
    }
    let logins = host::files::read_bounded(Path::new("/run/utmp"), LOGINS_LIMIT_BYTES).unwrap_or_default();
    for terminal in terminals(&logins) {
        // One that cannot be written to belongs to somebody who is not to be disturbed, or is gone.
        let _ = write_terminal(Path::new("/dev"), &terminal, &text);
    }
    Sent::Accepted
}

/// The terminals of the logins in a utmp file, each once.
fn terminals(utmp: &[u8]) -> Vec<String> {
    /// The record of glibc on 64-bit Linux: type at 0, line at 8 with 32 bytes.
    const RECORD_BYTES: usize = 384;
    const LINE: std::ops::Range<usize> = 8..40;
    const USER_PROCESS: i16 = 7;
    let mut found: Vec<String> = Vec::new();
    for record in utmp.chunks_exact(RECORD_BYTES) {
        if record.get(..2).and_then(|b| b.try_into().ok()).map(i16::from_le_bytes) != Some(USER_PROCESS) {
            continue;
        }
        let line = record.get(LINE).unwrap_or_default();
        let line = line.split(|b| *b == 0).next().unwrap_or_default();
        let Ok(line) = std::str::from_utf8(line) else { continue };
        // The file is written by others: a name in it must not lead out of /dev.
        let sound = line.starts_with(|c: char| c.is_ascii_alphanumeric())
            && line.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'/')
            && !line.contains("//");
        if sound && !found.iter().any(|f| f == line) && found.len() < TERMINALS_LIMIT {
            found.push(line.to_owned());
        }
    }
    found
}

fn write_terminal(dev: &Path, line: &str, text: &str) -> std::io::Result<()> {
    // Without NONBLOCK a terminal that was stopped with Ctrl-S would hold us.
    let flags = OFlags::WRONLY | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(dev.join(line), flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&fd)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice || !rustix::termios::isatty(&fd) {
        return Err(std::io::Error::other("it is no terminal"));
    }
    let text = format!("\r\n\u{7}{}\r\n", text.trim_end().replace('\n', "\r\n"));
    rustix::io::write(&fd, text.as_bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::{Facts, Kind, Language};

    fn emergency() -> Message {
        let facts = Facts {
            node: "main".into(),
            host: "attic".into(),
            incident: "incident-7".into(),
            at: "2026-11-22T18:00:00Z".into(),
            why: "no process\nMESSAGE=forged".into(),
            ..Facts::default()
        };
        Message::new(Kind::Emergency, &facts, Language::English)
    }

    /// Reads an entry as journald does.
    fn parse(mut bytes: &[u8]) -> Vec<(String, String)> {
        let mut fields = Vec::new();
        while let Some(end) = bytes.iter().position(|b| *b == b'\n' || *b == b'=') {
            let name = String::from_utf8(bytes[..end].to_vec()).unwrap();
            let (value, rest) = if bytes[end] == b'=' {
                let line = bytes[end + 1..].iter().position(|b| *b == b'\n').unwrap();
                (&bytes[end + 1..end + 1 + line], &bytes[end + 2 + line..])
            } else {
                let size = u64::from_le_bytes(bytes[end + 1..end + 9].try_into().unwrap()) as usize;
                (&bytes[end + 9..end + 9 + size], &bytes[end + 10 + size..])
            };
            fields.push((name, String::from_utf8(value.to_vec()).unwrap()));
            bytes = rest;
        }
        fields
    }

    #[test]
    fn the_journal_gets_one_entry_that_nothing_in_it_can_forge() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let journal = UnixDatagram::bind(&path).unwrap();
        journal.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert_eq!(journald(&path, &emergency()), Sent::Accepted);
        let mut buf = vec![0; 16 << 10];
        let n = journal.recv(&mut buf).unwrap();
        let fields = parse(&buf[..n]);
        let names: Vec<&str> = fields.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "MESSAGE",
                "PRIORITY",
                "SYSLOG_IDENTIFIER",
                "KOBOSHI_KIND",
                "KOBOSHI_NODE",
                "KOBOSHI_INCIDENT",
                "KOBOSHI_REF"
            ]
        );
        assert!(fields[0].1.starts_with("main on attic is still down") && fields[0].1.contains('\n'));
        assert_eq!((fields[1].1.as_str(), fields[2].1.as_str()), ("2", "koboshi"));
        drop(journal);
        assert!(matches!(journald(&path, &emergency()), Sent::Later { .. }));
    }

    #[test]
    fn a_journal_that_takes_nothing_more_holds_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _full = UnixDatagram::bind(&path).unwrap();
        let began = host::clock::now();
        // The queue of a socket that nobody reads holds a few datagrams.
        let last = (0..2_000).map(|_| journald(&path, &emergency())).find(|s| *s != Sent::Accepted);
        assert!(matches!(last, Some(Sent::Later { .. })), "{last:?}");
        assert!(host::clock::now().since_ms(began).unwrap() < 20_000);
    }

    #[test]
    fn login_records_name_terminals_and_nothing_else() {
        let record = |kind: i16, line: &[u8]| {
            let mut r = vec![0_u8; 384];
            r[..2].copy_from_slice(&kind.to_le_bytes());
            r[8..8 + line.len()].copy_from_slice(line);
            r
        };
        let utmp = [
            record(7, b"pts/3"),
            record(8, b"pts/4"),
            record(7, b"tty1"),
            record(7, b"pts/3"),
            record(7, b"../etc/shadow"),
            record(7, b"/etc/shadow"),
            record(7, b"pts/../../etc/x"),
            record(7, &[b'a'; 32]),
            record(7, &[0xff, 0xfe]),
        ]
        .concat();
        assert_eq!(terminals(&utmp), ["pts/3".to_owned(), "tty1".to_owned(), "a".repeat(32)]);
        assert!(terminals(&utmp[..100]).is_empty());
    }

    #[test]
    fn only_a_real_terminal_is_written_to() {
        let flags = rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY;
        let ours = rustix::pty::openpt(flags).unwrap();
        rustix::pty::grantpt(&ours).unwrap();
        rustix::pty::unlockpt(&ours).unwrap();
        let name = rustix::pty::ptsname(&ours, Vec::new()).unwrap().into_string().unwrap();
        let line = name.strip_prefix("/dev/").unwrap();
        write_terminal(Path::new("/dev"), line, "it is down\nreally").unwrap();
        let mut buf = [0; 256];
        let n = rustix::io::read(&ours, &mut buf).unwrap();
        assert!(String::from_utf8_lossy(&buf[..n]).contains("it is down"));
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "untouched").unwrap();
        std::os::unix::fs::symlink(&name, dir.path().join("link")).unwrap();
        for name in ["file", "link", "missing"] {
            assert!(write_terminal(dir.path(), name, "x").is_err(), "{name}");
        }
        assert!(write_terminal(Path::new("/dev"), "null", "x").is_err());
        assert_eq!(std::fs::read_to_string(dir.path().join("file")).unwrap(), "untouched");
    }
}
