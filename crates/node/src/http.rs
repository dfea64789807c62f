//! One GET over a bare socket: who answers, what, and how it fails, told apart.
//!
//! A refused connection, a silent listener, somebody else's protocol and a failure on our own side lead to four
//! different verdicts, so they are four different errors. Everything is bounded by one deadline and one size.

use host::clock::Deadline;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
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

/// Asks 127.0.0.1.
pub fn get(port: u16, path: &str, deadline: Deadline) -> Result<Response, HttpError> {
    get_at(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port), path, deadline)
}

/// Asks this address.
pub fn get_at(addr: SocketAddr, path: &str, deadline: Deadline) -> Result<Response, HttpError> {
    let mut stream = Timed::connect(addr, deadline)?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {addr}\r\nUser-Agent: koboshi\r\nAccept: application/json\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).map_err(|e| of_io(&e, true))?;
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

/// `None` = more is needed. At the end of the stream an answer without a length is whole.
fn parse(bytes: &[u8], ended: bool) -> Result<Option<Response>, HttpError> {
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
    Ok(body.map(|body| Response { status: answer.code.unwrap_or(0), content_type, body }))
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
    use std::net::TcpListener;
    use std::thread::JoinHandle;

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
