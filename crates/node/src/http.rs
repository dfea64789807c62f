//! One GET over a bare socket or TLS: who answers, what, and how it fails, told apart.
//!
//! A refused connection, a silent listener, somebody else's protocol and a failure on our own side lead to four
//! different verdicts, so they are four different errors. Everything is bounded by one deadline and one size, the TLS
//! handshake included. A certificate decides nothing here (docs/decisions/0019-tls-gateways.md).

use host::clock::Deadline;
use host::tls::known::{Client, Session};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// More than any probe answer (400 bytes) and any HTML page of the control UI; a flood ends here.
pub const BODY_LIMIT_BYTES: usize = 256 << 10;
/// The longest header block that is read.
const HEAD_LIMIT_BYTES: usize = 32 << 10;
/// Headers of one answer.
const HEADERS_LIMIT: usize = 64;

/// A whole HTTP answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The media type in lower case, without parameters; empty when there is none.
    pub content_type: String,
    /// At most [`BODY_LIMIT_BYTES`].
    pub body: Vec<u8>,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HttpError {
    /// Nobody listens.
    Refused,
    /// Nothing (or not everything) came before the deadline.
    TimedOut {
        /// Whether a connection came about: the kernel accepts for a stopped process too.
        connected: bool,
    },
    /// Something came that is no HTTP answer, or the connection was cut.
    Garbage {
        /// What came.
        why: String,
    },
    /// We could not even ask: no descriptors, no memory, no ports.
    OurSide {
        /// What the system said.
        why: String,
    },
}

/// What is spoken on a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tongue {
    /// HTTP and WebSocket as they are.
    Plain,
    /// The same inside TLS.
    Tls,
}

impl Tongue {
    /// The other one.
    #[must_use]
    pub fn other(self) -> Tongue {
        match self {
            Tongue::Plain => Tongue::Tls,
            Tongue::Tls => Tongue::Plain,
        }
    }
}

/// Asks this address once, in plain HTTP.
pub fn get_at(addr: SocketAddr, path: &str, deadline: Deadline) -> Result<Response, HttpError> {
    Line::new(addr, Tongue::Plain, None).get(path, deadline)
}

/// Several questions to one address. In plain HTTP each has its own connection; a TLS handshake costs more than all
/// the questions, so there they share one for as long as it works.
pub struct Line {
    addr: SocketAddr,
    tongue: Tongue,
    client: Option<Client>,
    kept: Option<Box<Session<Timed>>>,
    certificate: Option<Vec<u8>>,
}

impl Line {
    /// Nothing is opened before the first question. `client` is what an earlier line remembered of the same server.
    #[must_use]
    pub fn new(addr: SocketAddr, tongue: Tongue, client: Option<Client>) -> Line {
        Line { addr, tongue, client, kept: None, certificate: None }
    }

    /// What a later line to the same server may remember.
    #[must_use]
    pub fn client(&self) -> Option<Client> {
        self.client.clone()
    }

    /// The certificate (DER) that the server showed last, if any.
    pub fn certificate(&mut self) -> Option<Vec<u8>> {
        self.certificate.take()
    }

    /// Asks once.
    pub fn get(&mut self, path: &str, deadline: Deadline) -> Result<Response, HttpError> {
        match self.tongue {
            Tongue::Plain => {
                let mut stream = Timed::connect(self.addr, deadline)?;
                exchange(&mut stream, self.addr, path, false).map(|(response, _)| response)
            }
            Tongue::Tls => self.get_sealed(path, deadline),
        }
    }

    fn get_sealed(&mut self, path: &str, deadline: Deadline) -> Result<Response, HttpError> {
        if let Some(mut session) = self.kept.take() {
            session.stream_mut().deadline = deadline;
            match exchange(&mut *session, self.addr, path, true) {
                Ok((response, stays)) => {
                    self.kept = stays.then_some(session);
                    return Ok(response);
                }
                // It was closed meanwhile, which a server may do at any time: asked anew.
                Err(HttpError::Garbage { .. }) => {}
                Err(e @ (HttpError::Refused | HttpError::TimedOut { .. } | HttpError::OurSide { .. })) => {
                    return Err(e);
                }
            }
        }
        let client = match self.client.take() {
            Some(client) => client,
            None => new_client()?,
        };
        let opened = shake_hands(self.addr, &client, deadline);
        self.client = Some(client);
        let mut session = opened?;
        self.certificate = session.certificate().map(<[u8]>::to_vec);
        let (response, stays) = exchange(&mut *session, self.addr, path, true)?;
        self.kept = stays.then_some(session);
        Ok(response)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Some(session) = &mut self.kept {
            session.close();
        }
    }
}

fn new_client() -> Result<Client, HttpError> {
    Client::new().map_err(|e| HttpError::OurSide { why: e.to_string() })
}

fn shake_hands(
    addr: SocketAddr,
    client: &Client,
    deadline: Deadline,
) -> Result<Box<Session<Timed>>, HttpError> {
    let stream = Timed::connect(addr, deadline)?;
    Session::open(client, addr.ip(), stream).map(Box::new).map_err(|e| {
        if matches!(e.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) {
            HttpError::Garbage { why: format!("no TLS ({e})") }
        } else if e.kind() == io::ErrorKind::Other {
            HttpError::OurSide { why: e.to_string() }
        } else {
            of_io(&e, true)
        }
    })
}

/// The stream of one conversation, whichever tongue.
pub(crate) enum Stream {
    Plain(Timed),
    Tls(Box<Session<Timed>>),
}

impl Stream {
    pub(crate) fn connect(addr: SocketAddr, tongue: Tongue, deadline: Deadline) -> Result<Stream, HttpError> {
        match tongue {
            Tongue::Plain => Timed::connect(addr, deadline).map(Stream::Plain),
            Tongue::Tls => shake_hands(addr, &new_client()?, deadline).map(Stream::Tls),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(stream) => stream.read(buf),
            Stream::Tls(session) => session.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(stream) => stream.write(buf),
            Stream::Tls(session) => session.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Stream::Plain(stream) => stream.flush(),
            Stream::Tls(session) => session.flush(),
        }
    }
}

/// One question and its answer; and whether the connection may be asked again.
fn exchange(
    stream: &mut (impl Read + Write),
    addr: SocketAddr,
    path: &str,
    keep: bool,
) -> Result<(Response, bool), HttpError> {
    let connection = if keep { "keep-alive" } else { "close" };
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {addr}\r\nUser-Agent: koboshi\r\nAccept: application/json\r\nConnection: {connection}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).and_then(|()| stream.flush()).map_err(|e| of_io(&e, true))?;
    let mut got = Vec::with_capacity(2048);
    let mut chunk = [0_u8; 8192];
    loop {
        if let Some(done) = parse(&got, false)? {
            return Ok(done);
        }
        match stream.read(&mut chunk) {
            Ok(0) => {
                return parse(&got, true)?.ok_or_else(|| HttpError::Garbage {
                    why: if got.is_empty() {
                        "the connection was closed without an answer".into()
                    } else {
                        "the answer was cut short".into()
                    },
                });
            }
            Ok(n) => got.extend_from_slice(chunk.get(..n).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(of_io(&e, true)),
        }
    }
}

/// `None` = more is needed. At the end of the stream an answer without a length is whole. With it: whether the
/// connection is good for another question, because the answer's end was told and nobody wants to close.
fn parse(bytes: &[u8], ended: bool) -> Result<Option<(Response, bool)>, HttpError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_LIMIT];
    let mut answer = httparse::Response::new(&mut headers);
    let head = match answer.parse(bytes) {
        Ok(httparse::Status::Complete(n)) => n,
        Ok(httparse::Status::Partial) if bytes.len() > HEAD_LIMIT_BYTES => {
            return Err(HttpError::Garbage { why: "headers without an end".into() });
        }
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(e) => return Err(HttpError::Garbage { why: format!("not an HTTP answer ({e})") }),
    };
    let value = |name: &str| {
        answer
            .headers
            .iter()
            .find(|h| h.name.eq_ignore_ascii_case(name))
            .map(|h| String::from_utf8_lossy(h.value).trim().to_ascii_lowercase())
    };
    let content_type = value("content-type")
        .and_then(|v| v.split(';').next().map(|t| t.trim().to_owned()))
        .unwrap_or_default();
    let rest = bytes.get(head..).unwrap_or_default();
    let limited = |b: &[u8]| b.get(..b.len().min(BODY_LIMIT_BYTES)).unwrap_or_default().to_vec();
    let chunked = value("transfer-encoding").is_some_and(|v| v.contains("chunked"));
    let length = value("content-length").and_then(|v| v.parse::<usize>().ok());
    let stays = (chunked || length.is_some())
        && answer.version == Some(1)
        && !value("connection").is_some_and(|v| v.contains("close"));
    let body = if chunked {
        let (body, whole) = unchunk(rest)?;
        (whole || body.len() >= BODY_LIMIT_BYTES).then_some(body)
    } else {
        match length {
            Some(n) if rest.len() >= n.min(BODY_LIMIT_BYTES) => {
                Some(limited(rest.get(..n.min(rest.len())).unwrap_or_default()))
            }
            Some(_) => None,
            None if ended || rest.len() >= BODY_LIMIT_BYTES => Some(limited(rest)),
            None => None,
        }
    };
    Ok(body.map(|body| {
        let stays = stays && body.len() < BODY_LIMIT_BYTES;
        (Response { status: answer.code.unwrap_or(0), content_type, body }, stays)
    }))
}

fn unchunk(mut rest: &[u8]) -> Result<(Vec<u8>, bool), HttpError> {
    let mut body = Vec::new();
    loop {
        let (size, line) = match httparse::parse_chunk_size(rest) {
            Ok(httparse::Status::Complete((line, size))) => {
                (usize::try_from(size).unwrap_or(usize::MAX), line)
            }
            Ok(httparse::Status::Partial) => return Ok((body, false)),
            Err(_) => return Err(HttpError::Garbage { why: "a bad chunk size".into() }),
        };
        if size == 0 {
            return Ok((body, true));
        }
        let data = rest.get(line..).unwrap_or_default();
        let room = BODY_LIMIT_BYTES.saturating_sub(body.len());
        body.extend_from_slice(data.get(..size.min(data.len()).min(room)).unwrap_or_default());
        match size.checked_add(2).and_then(|n| data.get(n..)) {
            Some(next) if body.len() < BODY_LIMIT_BYTES => rest = next,
            Some(_) | None => return Ok((body, false)),
        }
    }
}

fn of_io(e: &io::Error, connected: bool) -> HttpError {
    use io::ErrorKind as K;
    /// Out of descriptors (own, system), memory, local ports: nothing of it says anything about the gateway.
    const OURS: [i32; 5] = [23, 24, 12, 105, 99];
    let ours = e.raw_os_error().is_some_and(|n| OURS.contains(&n));
    if e.kind() == K::ConnectionRefused {
        HttpError::Refused
    } else if matches!(e.kind(), K::TimedOut | K::WouldBlock) {
        HttpError::TimedOut { connected }
    } else if ours || !connected {
        HttpError::OurSide { why: e.to_string() }
    } else {
        HttpError::Garbage { why: format!("the connection broke: {e}") }
    }
}

/// A socket whose every read and write ends at one deadline, however slowly the other side drips.
pub(crate) struct Timed {
    stream: TcpStream,
    deadline: Deadline,
}

impl Timed {
    pub(crate) fn connect(addr: SocketAddr, deadline: Deadline) -> Result<Timed, HttpError> {
        let left = deadline.left();
        if left.is_zero() {
            return Err(HttpError::OurSide { why: "no time was left to ask".into() });
        }
        let stream = TcpStream::connect_timeout(&addr, left).map_err(|e| of_io(&e, false))?;
        let _ = stream.set_nodelay(true);
        Ok(Timed { stream, deadline })
    }

    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.left();
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }
}

impl Read for Timed {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        self.stream.read(buf).map_err(timed)
    }
}

impl Write for Timed {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write(buf).map_err(timed)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// A socket timeout is `WouldBlock`, which a WebSocket library takes for a non-blocking socket: say what it is.
fn timed(e: io::Error) -> io::Error {
    if e.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { e }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener};
    use std::thread::JoinHandle;

    fn get(port: u16, path: &str, deadline: Deadline) -> Result<Response, HttpError> {
        get_at(SocketAddr::from((Ipv4Addr::LOCALHOST, port)), path, deadline)
    }

    /// A server on loopback that answers one connection with these bytes and then closes, or keeps it open.
    pub(crate) fn serve(answer: &'static [u8], close: bool) -> (u16, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let port = listener.local_addr().expect("addr").port();
        let handle = std::thread::spawn(move || {
            let (mut s, _) = listener.accept().expect("accept");
            let mut buf = [0; 1024];
            let _ = s.read(&mut buf);
            let _ = s.write_all(answer);
            if !close {
                // Held open until the client goes away.
                while matches!(s.read(&mut buf), Ok(n) if n > 0) {}
            }
        });
        (port, handle)
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(5))
    }

    fn asked(answer: &'static [u8], close: bool, d: Deadline) -> Result<Response, HttpError> {
        let (port, handle) = serve(answer, close);
        let got = get(port, "/healthz", d);
        handle.join().expect("server");
        got
    }

    #[test]
    fn a_length_ends_the_answer_though_the_connection_stays() {
        let r = asked(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: 27\r\n\r\n{\"ok\":true,\"status\":\"live\"}",
            false,
            soon(),
        )
        .expect("an answer");
        assert_eq!((r.status, r.content_type.as_str(), r.body.len()), (200, "application/json", 27));
    }

    #[test]
    fn chunks_are_joined() {
        let r = asked(
            b"HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwiki\r\n5\r\npedia\r\n0\r\n\r\n",
            false,
            soon(),
        )
        .expect("an answer");
        assert_eq!((r.status, r.body.as_slice()), (503, b"wikipedia".as_slice()));
    }

    #[test]
    fn without_a_length_the_end_ends_it() {
        let r = asked(b"HTTP/1.0 200 OK\r\n\r\nhello", true, soon()).expect("an answer");
        assert_eq!(r.body, b"hello");
    }

    #[test]
    fn every_failure_has_its_own_name() {
        assert!(matches!(asked(b"SSH-2.0-stranger\r\n", true, soon()), Err(HttpError::Garbage { .. })));
        assert!(matches!(asked(b"", true, soon()), Err(HttpError::Garbage { .. })));
        assert!(matches!(
            asked(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort", true, soon()),
            Err(HttpError::Garbage { .. })
        ));
        assert_eq!(
            asked(b"", false, Deadline::after(Duration::from_millis(60))),
            Err(HttpError::TimedOut { connected: true })
        );
        assert_eq!(
            asked(b"HTTP/1.1 200 OK\r\n", false, Deadline::after(Duration::from_millis(60))),
            Err(HttpError::TimedOut { connected: true })
        );
        // Below the range that is handed out: no parallel test can come to listen on it.
        let free = 1;
        assert_eq!(get(free, "/", soon()), Err(HttpError::Refused));
        assert!(matches!(get(free, "/", Deadline::after(Duration::ZERO)), Err(HttpError::OurSide { .. })));
    }

    #[test]
    fn a_flood_is_cut() {
        static FLOOD: &[u8] = &{
            let mut b = [b'x'; (BODY_LIMIT_BYTES) + 100_000];
            let head = b"HTTP/1.1 200 OK\r\n\r\n";
            let mut i = 0;
            while i < head.len() {
                b[i] = head[i];
                i += 1;
            }
            b
        };
        let (port, handle) = serve(FLOOD, true);
        let r = get(port, "/", soon()).expect("an answer");
        assert_eq!(r.body.len(), BODY_LIMIT_BYTES);
        drop(handle);
    }

    #[test]
    fn endless_headers_are_refused() {
        let endless: Vec<u8> =
            b"HTTP/1.1 200 OK\r\n".iter().copied().chain([b'a'; HEAD_LIMIT_BYTES + 1]).collect();
        assert!(parse(&endless, false).is_err());
    }
}
