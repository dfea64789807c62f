//! The voice on the gateway's own port while an emergency holds: whoever asks is told 503 and one line of JSON at once,
//! instead of a refused connection that says nothing.
//!
//! It must never be in the gateway's way. It listens on the loopback only, takes the port only when nobody has it, and
//! closes at the first sign that somebody starts or replaces the gateway: a file of the program is opened, the lock or
//! an upgrade's staging place changes, the agent that started it is gone. No connection of its own outlives it: they
//! end by the client's closing or by a reset, so that no TIME_WAIT stands on the port. It reads at most 8 KiB of a
//! request and keeps none of it. Also where the gateway speaks TLS it speaks plain HTTP: it needs no key of the node's.

use crate::text::Message;
use host::clock::Deadline;
use host::{Context, Error, Kind, Result, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// All that is ever read of one connection.
const REQUEST_LIMIT_BYTES: usize = 8 << 10;
/// A request that is not whole by then is answered as it is.
const REQUEST_LIMIT: Duration = Duration::from_secs(2);
/// A client gets this long to read the answer and close; then its connection is reset.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);
/// Connections at a time; more wait in the kernel's queue.
const CONNECTIONS_LIMIT: usize = 16;
/// With nothing to do it still looks around this often.
const IDLE: Duration = Duration::from_secs(60);
/// The first byte of a TLS handshake. No HTTP request begins with it, so its end need not be waited for: the client of a
/// gateway that speaks TLS is told at once, if only by an answer that it cannot read.
const TLS_HANDSHAKE: u8 = 0x16;
/// What koboshi itself makes beside a program is named so.
const OWN_PREFIX: &str = ".koboshi-";
/// Bytes of inotify reports read at once; one report already ends it.
const REPORTS_BYTES: usize = 4 << 10;

/// What to answer, where, and what to give way to.
#[derive(Debug, Clone)]
pub struct Respond {
    /// The gateway's port.
    pub port: u16,
    /// The process that started us: without it we end.
    pub parent: u32,
    /// Files, and directories of files, that a starting gateway opens.
    pub opened: Vec<PathBuf>,
    /// Directories in which a start or an upgrade makes, writes or moves something.
    pub changed: Vec<PathBuf>,
    /// The node's name, for the answer.
    pub node: String,
    /// The incident's id, for the answer.
    pub incident: String,
}

/// Why it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The process that started it is gone.
    Orphaned,
    /// Somebody starts or replaces the gateway: what was touched.
    Sign(String),
}

/// The line of JSON that is answered to everything. Holds what a stranger on this host may know: no cause, no path.
#[must_use]
pub fn line(node: &str, incident: &str) -> String {
    let text = serde_json::json!({
        "koboshi": "emergency",
        "node": Message::short(node),
        "incident": Message::short(incident),
        "what": "the gateway is down; koboshi goes on trying to bring it back",
        "more": "koboshi status",
    });
    format!("{text}\n")
}

/// Answers until there is a reason to give way. Returns with the port closed.
///
/// # Errors
/// When the port is taken, or what it would have to give way to cannot be watched.
pub fn run(respond: &Respond) -> Result<End> {
    let Some(parent) = parent(respond.parent)? else { return Ok(End::Orphaned) };
    // First the signs, then the port: a start that begins in between is seen.
    let signs = Signs::watch(respond)?;
    let what = || format!("answering on port {}", respond.port);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, respond.port)).context(what)?;
    listener.set_nonblocking(true).context(what)?;
    let answer = answer(&line(&respond.node, &respond.incident));
    let mut open: Vec<Connection> = Vec::new();
    loop {
        let until = open.iter().map(|c| c.until).fold(Deadline::after(IDLE), Deadline::min);
        let mut fds: Vec<BorrowedFd<'_>> = vec![parent.as_fd(), signs.fd.as_fd()];
        fds.extend(open.iter().map(|c| c.stream.as_fd()));
        if open.len() < CONNECTIONS_LIMIT {
            fds.push(listener.as_fd());
        }
        let ready = poll::readable(&fds, until)?;
        let is = |i: usize| ready.get(i).copied().unwrap_or(false);
        if is(0) {
            return Ok(End::Orphaned);
        }
        if is(1)
            && let Some(sign) = signs.seen()
        {
            return Ok(End::Sign(sign));
        }
        let new = open.len() < CONNECTIONS_LIMIT && is(2 + open.len());
        let mut index = 2;
        open.retain_mut(|c| {
            let stays = c.go_on(is(index), &answer);
            index += 1;
            stays
        });
        if new && let Ok((stream, _)) = listener.accept() {
            open.extend(Connection::new(stream));
        }
    }
}

fn answer(body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nCache-Control: no-store\r\n\
         Retry-After: 30\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// A handle on the process that started us; `None` when it is gone already.
fn parent(pid: u32) -> Result<Option<OwnedFd>> {
    let ours = || rustix::process::getppid().is_some_and(|p| p.as_raw_nonzero().get().unsigned_abs() == pid);
    let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else { return Ok(None) };
    if !ours() {
        return Ok(None);
    }
    let fd = match rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) {
        Ok(fd) => fd,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(e) => return Err(e).context(|| "watching the agent".into()),
    };
    // Still our parent after the handle was opened: then it is the parent's.
    Ok(ours().then_some(fd))
}

/// What we give way to.
#[derive(Debug)]
struct Signs {
    fd: OwnedFd,
}

impl Signs {
    fn watch(respond: &Respond) -> Result<Signs> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .context(|| "watching for a start".into())
            .map_err(|e| e.hint("is fs.inotify.max_user_instances used up?"))?;
        let places = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::MOVE_SELF
            | WatchFlags::DELETE_SELF;
        let wrote = WatchFlags::MODIFY | WatchFlags::CLOSE_WRITE;
        for path in &respond.opened {
            add(&fd, path, places | wrote | WatchFlags::OPEN, places)?;
        }
        for path in &respond.changed {
            add(&fd, path, places | wrote, places)?;
        }
        Ok(Signs { fd })
    }

    /// The first report that is one.
    fn seen(&self) -> Option<String> {
        let mut buffer = [MaybeUninit::uninit(); REPORTS_BYTES];
        let mut reader = inotify::Reader::new(&self.fd, &mut buffer);
        while let Ok(report) = reader.next() {
            let flags = report.events();
            // That somebody lists a directory is no start.
            if flags.contains(ReadFlags::ISDIR) && flags.contains(ReadFlags::OPEN) {
                continue;
            }
            let name = report.file_name().map(|n| n.to_string_lossy().into_owned());
            // Our own: a doctor that tries whether directories can be exchanged, a spare that is made.
            if name.as_ref().is_some_and(|n| n.starts_with(OWN_PREFIX)) {
                continue;
            }
            return Some(name.unwrap_or_else(|| "a watched file".to_owned()));
        }
        None
    }
}

/// Watches a path; where it is missing, the nearest directory above it for its coming.
fn add(fd: &OwnedFd, path: &Path, mask: WatchFlags, above: WatchFlags) -> Result<()> {
    let mut at = path;
    let mut mask = mask | WatchFlags::MASK_ADD;
    loop {
        match inotify::add_watch(fd, at, mask) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {}
            Err(e) => return Err(e).context(|| format!("watching {}", at.display())),
        }
        mask = above | WatchFlags::MASK_ADD;
        at = at.parent().ok_or_else(|| {
            Error::new(Kind::NotFound, format!("watching {}", path.display()), "nothing of it is there")
        })?;
    }
}

/// One client.
#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    /// Bytes read.
    got: usize,
    /// The last bytes of the request: enough to see where its head ends.
    last: [u8; 4],
    answered: bool,
    until: Deadline,
}

impl Connection {
    fn new(stream: TcpStream) -> Option<Connection> {
        stream.set_nonblocking(true).ok()?;
        // However this ends, also by a kill, nothing of it stays on the port.
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).ok()?;
        let until = Deadline::after(REQUEST_LIMIT);
        Some(Connection { stream, got: 0, last: [0; 4], answered: false, until })
    }

    /// Reads, answers once, waits for the client to close. `false`: it is over.
    fn go_on(&mut self, readable: bool, answer: &[u8]) -> bool {
        let mut whole = self.until.passed();
        if self.answered && whole {
            return false;
        }
        if readable {
            let mut chunk = [0_u8; 2048];
            let room = (REQUEST_LIMIT_BYTES - self.got).min(chunk.len());
            match self.stream.read(&mut chunk[..room]) {
                // The end, or all that we read of anybody.
                Ok(0) if self.answered => return false,
                Ok(0) => whole = true,
                Ok(n) => {
                    whole |= self.got == 0 && chunk.first() == Some(&TLS_HANDSHAKE);
                    self.got += n;
                    whole |= self.head_ends(&chunk[..n]) || self.got >= REQUEST_LIMIT_BYTES;
                }
                Err(e)
                    if matches!(
                        e.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                    ) => {}
                Err(_) => return false,
            }
        }
        if self.answered || !whole {
            return true;
        }
        // A fresh connection's buffer takes these few bytes at once, or the client has to do without. The end of the
        // answer is told by its length: were we the first to close, TIME_WAIT would stand on the gateway's port.
        if self.stream.write_all(answer).is_err() {
            return false;
        }
        self.answered = true;
        self.until = Deadline::after(DRAIN_LIMIT);
        true
    }

    fn head_ends(&mut self, bytes: &[u8]) -> bool {
        bytes.iter().any(|b| {
            self.last.rotate_left(1);
            self.last[3] = *b;
            self.last == *b"\r\n\r\n" || self.last[2..] == *b"\n\n"
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    struct Bench {
        dir: tempfile::TempDir,
        port: u16,
    }

    impl Bench {
        fn new() -> Bench {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let dir = tempfile::tempdir().unwrap();
            for made in ["dist", "lock", "modules"] {
                std::fs::create_dir(dir.path().join(made)).unwrap();
            }
            std::fs::write(dir.path().join("dist/index.js"), "//").unwrap();
            Bench { dir, port }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn respond(&self) -> Respond {
            Respond {
                port: self.port,
                parent: rustix::process::getppid().unwrap().as_raw_nonzero().get().unsigned_abs(),
                opened: vec![self.path("dist"), self.path("entry.mjs")],
                changed: vec![self.path("lock"), self.path("modules"), self.path("not/yet/there")],
                node: "main".into(),
                incident: "incident-7".into(),
            }
        }

        /// Runs it beside the test and returns once it listens.
        fn start(&self) -> mpsc::Receiver<Result<End>> {
            let (tx, rx) = mpsc::channel();
            let respond = self.respond();
            std::thread::spawn(move || tx.send(run(&respond)));
            let deadline = Deadline::after(Duration::from_secs(20));
            while self.connect().is_none() {
                assert!(!deadline.passed(), "it does not listen: {:?}", rx.try_recv());
                std::thread::yield_now();
            }
            rx
        }

        fn connect(&self) -> Option<TcpStream> {
            let to = (Ipv4Addr::LOCALHOST, self.port).into();
            let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5)).ok()?;
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            Some(stream)
        }

        fn ask(&self, request: &[u8]) -> String {
            let mut stream = self.connect().unwrap();
            stream.write_all(request).unwrap();
            read_answer(&mut stream)
        }
    }

    /// Reads as HTTP clients do: as much as the head says.
    fn read_answer(stream: &mut TcpStream) -> String {
        let mut said = Vec::new();
        let mut byte = [0];
        loop {
            let text = String::from_utf8_lossy(&said).into_owned();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length = head.split("Content-Length: ").nth(1).unwrap().lines().next().unwrap();
                if body.len() == length.parse::<usize>().unwrap() {
                    return text;
                }
            }
            stream.read_exact(&mut byte).unwrap();
            said.push(byte[0]);
        }
    }

    /// The kernel's sockets on a port, for a failed test.
    fn left_on(port: u16) -> String {
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap_or_default();
        let mark = format!(":{port:04X} ");
        table.lines().filter(|l| l.contains(&mark)).collect::<Vec<_>>().join("\n")
    }

    /// Binds as a program does that has never heard of SO_REUSEADDR.
    fn bind_bare(port: u16) -> rustix::io::Result<OwnedFd> {
        use rustix::net::{AddressFamily, SocketAddrV4, SocketType, bind, listen, socket};
        let fd = socket(AddressFamily::INET, SocketType::STREAM, None)?;
        bind(&fd, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))?;
        listen(&fd, 1)?;
        Ok(fd)
    }

    #[test]
    fn everything_is_answered_with_503_and_one_line() {
        let bench = Bench::new();
        let _end = bench.start();
        for request in [
            &b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"[..],
            b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
            b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            b"\x16\x03\x01 this is no HTTP\n\n",
        ] {
            let said = bench.ask(request);
            let (head, body) = said.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with("HTTP/1.1 503 ") && head.contains("\r\nConnection: close"), "{said}");
            assert_eq!(body.lines().count(), 1, "{said}");
            let json: serde_json::Value = serde_json::from_str(body).unwrap();
            assert_eq!((&json["koboshi"], &json["incident"]), (&"emergency".into(), &"incident-7".into()));
        }
    }

    #[test]
    fn it_reads_8_kib_and_no_more_and_a_slow_client_holds_nobody() {
        let bench = Bench::new();
        let _end = bench.start();
        let mut slow: Vec<TcpStream> = (0..CONNECTIONS_LIMIT - 1).map(|_| bench.connect().unwrap()).collect();
        for s in &mut slow {
            s.write_all(b"GET / HT").unwrap();
        }
        assert!(bench.ask(b"GET / HTTP/1.0\r\n\r\n").contains("emergency"));
        // A head without an end is answered once the limit is reached, and the rest is never read.
        let mut flood = bench.connect().unwrap();
        let mut sent = 0;
        let chunk = [b'a'; 4096];
        while sent < 64 << 20 {
            match flood.write(&chunk) {
                Ok(n) => sent += n,
                Err(_) => break,
            }
        }
        assert!(sent < 32 << 20, "it took {sent} bytes");
        // The slow ones are answered when their time is up.
        let said = read_answer(&mut slow[0]);
        assert!(said.starts_with("HTTP/1.1 503"), "{said}");
    }

    #[test]
    fn a_client_that_speaks_tls_is_turned_away_at_once() {
        let bench = Bench::new();
        let end = bench.start();
        let mut client = bench.connect().unwrap();
        let began = host::clock::now();
        // The beginning of a handshake, which as a request would never end.
        client.write_all(&[TLS_HANDSHAKE, 3, 1, 0, 200, 1, 0, 0, 196]).unwrap();
        let said = read_answer(&mut client);
        let took = host::clock::now().since_ms(began).unwrap();
        assert!(said.starts_with("HTTP/1.1 503 "), "{said}");
        assert!(took < 1_000, "{took} ms: it waited for the request to end");
        assert!(end.try_recv().is_err());
    }

    #[test]
    fn each_sign_ends_it_within_100_ms_and_the_port_can_be_bound_at_once() {
        type Sign = (&'static str, fn(&Bench));
        let signs: [Sign; 5] = [
            ("program opened", |b| drop(std::fs::File::open(b.path("dist/index.js")).unwrap())),
            ("missing program came", |b| std::fs::write(b.path("entry.mjs"), "x").unwrap()),
            ("lock written", |b| std::fs::write(b.path("lock/gateway.state.lock"), "{}").unwrap()),
            ("upgrade staged", |b| std::fs::create_dir(b.path("modules/.openclaw-x")).unwrap()),
            ("way made", |b| std::fs::create_dir_all(b.path("not/yet")).unwrap()),
        ];
        for (name, sign) in signs {
            let bench = Bench::new();
            let end = bench.start();
            // Clients in every state: answered, closed, waiting, half asked.
            for _ in 0..20 {
                bench.ask(b"GET /readyz HTTP/1.1\r\n\r\n");
            }
            let waiting = bench.connect().unwrap();
            let mut half = bench.connect().unwrap();
            half.write_all(b"GET /").unwrap();
            let mut unread = bench.connect().unwrap();
            unread.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            // Somebody who lists a directory starts nothing.
            assert_eq!(std::fs::read_dir(bench.path("dist")).unwrap().count(), 1);
            // Nor does koboshi's own doctor.
            std::fs::create_dir(bench.path("modules/.koboshi-probe-1")).unwrap();
            assert!(end.recv_timeout(Duration::from_millis(100)).is_err(), "{name}: ended for nothing");
            let began = host::clock::now();
            sign(&bench);
            let got = end.recv_timeout(Duration::from_secs(10)).unwrap().unwrap();
            let took = host::clock::now().since_ms(began).unwrap();
            assert!(matches!(got, End::Sign(_)), "{name}: {got:?}");
            assert!(took <= 100, "{name}: {took} ms");
            bind_bare(bench.port).unwrap_or_else(|e| panic!("{name}: {e}: {}", left_on(bench.port)));
            drop((waiting, half, unread));
        }
    }

    #[test]
    fn a_port_that_somebody_has_is_left_to_them() {
        let bench = Bench::new();
        let stranger = bind_bare(bench.port).unwrap();
        let e = run(&bench.respond()).unwrap_err();
        assert!(e.what.contains(&bench.port.to_string()), "{e}");
        drop(stranger);
        // With SO_REUSEADDR, and on every address, as a gateway may do it.
        let stranger = TcpListener::bind((Ipv4Addr::UNSPECIFIED, bench.port)).unwrap();
        assert!(run(&bench.respond()).is_err());
        drop(stranger);
    }

    #[test]
    fn without_its_agent_it_does_not_begin() {
        let bench = Bench::new();
        // Nobody is their own parent.
        let stranger = Respond { parent: std::process::id(), ..bench.respond() };
        assert_eq!(run(&stranger).unwrap(), End::Orphaned);
    }

    #[test]
    fn the_line_holds_no_line_of_others() {
        let text = line("ma\nin\"", "incident-7");
        assert_eq!(text.lines().count(), 1);
        assert!(serde_json::from_str::<serde_json::Value>(&text).is_ok());
    }
}
