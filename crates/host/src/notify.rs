//! Tells the service manager how the agent is: ready, in a few words, alive.
//!
//! Where nobody listens (`NOTIFY_SOCKET` unset) everything here does nothing. A message that cannot be delivered is an
//! error the caller may ignore: the agent's work never depends on it, and sending never blocks.

use crate::error::{Context, Error, Kind, Result};
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

/// Longest status line sent.
const STATUS_LIMIT_BYTES: usize = 512;

/// A way to the service manager, if there is one.
#[derive(Debug, Default)]
pub struct Notifier {
    to: Option<(OwnedFd, SocketAddrUnix)>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// From `NOTIFY_SOCKET` and `WATCHDOG_USEC`, as systemd sets them. Children may inherit the first; a unit with
    /// `NotifyAccess=main` does not listen to them.
    pub fn from_env() -> Result<Notifier> {
        let pid = std::env::var("WATCHDOG_PID").ok();
        let ours = pid.is_none_or(|p| p.parse() == Ok(std::process::id()));
        let usec = std::env::var("WATCHDOG_USEC").ok().filter(|_| ours);
        Notifier::new(std::env::var_os("NOTIFY_SOCKET").as_deref(), usec.as_deref())
    }

    fn new(socket: Option<&OsStr>, watchdog_usec: Option<&str>) -> Result<Notifier> {
        let Some(socket) = socket.filter(|s| !s.is_empty()) else { return Ok(Notifier::default()) };
        let what = || "opening the way to the service manager".to_string();
        let bytes = socket.as_bytes();
        let address = match bytes.first() {
            Some(b'/') => SocketAddrUnix::new(socket),
            Some(b'@') => SocketAddrUnix::new_abstract_name(&bytes[1..]),
            Some(_) | None => {
                return Err(Error::new(
                    Kind::Usage,
                    what(),
                    "NOTIFY_SOCKET is neither a path nor an abstract name",
                ));
            }
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None).context(what)?;
        let watchdog =
            watchdog_usec.and_then(|u| u.parse().ok()).filter(|u| *u > 0).map(Duration::from_micros);
        Ok(Notifier { to: Some((fd, address.context(what)?)), watchdog })
    }

    /// Whether somebody listens.
    #[must_use]
    pub fn is_heard(&self) -> bool {
        self.to.is_some()
    }

    /// How often [`Notifier::alive`] is to be said: half of what the manager allows.
    #[must_use]
    pub fn watchdog_period(&self) -> Option<Duration> {
        self.watchdog.map(|w| w / 2)
    }

    /// The agent guards now.
    pub fn ready(&self) -> Result<()> {
        self.send("READY=1")
    }

    /// One line for `systemctl status`.
    pub fn status(&self, line: &str) -> Result<()> {
        let line: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let mut end = line.len().min(STATUS_LIMIT_BYTES);
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        self.send(&format!("STATUS={}", &line[..end]))
    }

    /// The agent's loop turns: keeps the watchdog quiet.
    pub fn alive(&self) -> Result<()> {
        self.send("WATCHDOG=1")
    }

    /// The agent is ending on purpose.
    pub fn stopping(&self) -> Result<()> {
        self.send("STOPPING=1")
    }

    fn send(&self, message: &str) -> Result<()> {
        let Some((fd, address)) = &self.to else { return Ok(()) };
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = rustix::net::sendto(fd, message.as_bytes(), flags, address);
        sent.map(drop).context(|| "telling the service manager".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn nobody_listening_is_no_error() {
        for socket in [None, Some(OsStr::new(""))] {
            let silent = Notifier::new(socket, Some("1000")).unwrap();
            silent.ready().unwrap();
            silent.status("x").unwrap();
            assert!(!silent.is_heard() && silent.watchdog_period().is_none());
        }
    }

    #[test]
    fn messages_arrive_as_systemd_expects_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let listener = UnixDatagram::bind(&path).unwrap();
        listener.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let notifier = Notifier::new(Some(path.as_os_str()), Some("30000000")).unwrap();
        assert_eq!(notifier.watchdog_period(), Some(Duration::from_secs(15)));
        let heard = || {
            let mut bytes = [0; 1024];
            let n = listener.recv(&mut bytes).unwrap();
            String::from_utf8(bytes[..n].to_vec()).unwrap()
        };
        notifier.ready().unwrap();
        assert_eq!(heard(), "READY=1");
        notifier.status("serving\nREADY=0").unwrap();
        assert_eq!(heard(), "STATUS=serving READY=0", "a line cannot smuggle in another field");
        notifier.status(&"ü".repeat(2_000)).unwrap();
        assert!(heard().len() <= STATUS_LIMIT_BYTES + 7);
        notifier.alive().unwrap();
        assert_eq!(heard(), "WATCHDOG=1");
        notifier.stopping().unwrap();
        assert_eq!(heard(), "STOPPING=1");
        drop(listener);
        assert!(notifier.ready().is_err());
    }

    #[test]
    fn a_listener_that_does_not_read_never_blocks_us() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let _deaf = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::new(Some(path.as_os_str()), None).unwrap();
        let results: Vec<_> = (0..100_000).map(|_| notifier.alive()).take_while(Result::is_ok).collect();
        assert!(results.len() < 100_000, "the queue must fill before this says anything");
    }

    #[test]
    fn abstract_names_and_nonsense() {
        use std::os::linux::net::SocketAddrExt;
        let name = format!("koboshi-unit-{}", std::process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
        let listener = UnixDatagram::bind_addr(&address).unwrap();
        listener.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Notifier::new(Some(OsStr::new(&format!("@{name}"))), None).unwrap().ready().unwrap();
        let mut bytes = [0; 16];
        assert_eq!(listener.recv(&mut bytes).unwrap(), 7);
        assert_eq!(Notifier::new(Some(OsStr::new("vsock:2:1")), None).unwrap_err().kind, Kind::Usage);
    }
}
