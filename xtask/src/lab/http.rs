//! A small HTTP/1.1 server for the lab's services: one request per connection, a thread each, nothing else.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often the end of a service is looked for.
const POLL: Duration = Duration::from_millis(10);
/// A client that does not send its request is not waited for.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);
/// The longest head and body read.
const HEAD_LIMIT_BYTES: u64 = 64 << 10;
const BODY_LIMIT_BYTES: u64 = 1 << 20;

/// What was asked.
#[derive(Debug, Clone, Default)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) body: String,
}

/// A service that listens until it is dropped.
pub(crate) struct Server {
    over: Arc<AtomicBool>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// Hands each connection to `act`, whose flag says when the service is over.
pub(crate) fn serve(
    listener: TcpListener,
    act: impl Fn(TcpStream, &AtomicBool) + Send + Sync + 'static,
) -> Result<Server, String> {
    listener.set_nonblocking(true).map_err(|e| format!("listen: {e}"))?;
    let over = Arc::new(AtomicBool::new(false));
    let server = Server { over: Arc::clone(&over) };
    let act = Arc::new(act);
    std::thread::spawn(move || {
        while !over.load(Ordering::Relaxed) {
            let Ok((stream, _)) = listener.accept() else {
                std::thread::sleep(POLL);
                continue;
            };
            let (act, over) = (Arc::clone(&act), Arc::clone(&over));
            std::thread::spawn(move || {
                let limits =
                    stream.set_nonblocking(false).and_then(|()| stream.set_read_timeout(Some(REQUEST_LIMIT)));
                if limits.is_ok() {
                    act(stream, &over);
                }
            });
        }
    });
    Ok(server)
}

/// Reads one request.
pub(crate) fn read(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream.take(HEAD_LIMIT_BYTES + BODY_LIMIT_BYTES));
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_ascii_whitespace();
    let mut request = Request { path: words.nth(1)?.to_owned(), body: String::new() };
    let mut length = 0;
    loop {
        line.clear();
        if reader.read_line(&mut line).ok()? == 0 || line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = Vec::new();
    reader.take(u64::min(length, BODY_LIMIT_BYTES)).read_to_end(&mut body).ok()?;
    request.body = String::from_utf8_lossy(&body).into_owned();
    Some(request)
}

/// The head of an answer.
pub(crate) fn head(status: &str, kind: &str, length: usize) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )
}

/// A whole answer; a client that has gone is no error of ours.
pub(crate) fn answer(stream: &mut TcpStream, status: &str, kind: &str, body: &[u8]) {
    let _ = stream.write_all(head(status, kind, body.len()).as_bytes()).and_then(|()| stream.write_all(body));
}
