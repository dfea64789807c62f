//! Where alerts arrive: a receiver of webhooks that keeps what it accepted, and can refuse or never answer.

use super::http::{self, Server};
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::net;

/// The receiver's port at the switch.
pub(crate) const PORT: u16 = 8080;
/// Alerts kept of one scenario.
const KEPT_LIMIT: usize = 1_000;
/// Between two looks while waiting.
const POLL: Duration = Duration::from_millis(50);

/// How the receiver behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    Accept,
    Refuse,
    Hang,
}

/// One delivered alert.
#[derive(Debug, Clone)]
pub(crate) struct Alert {
    pub(crate) path: String,
    pub(crate) body: String,
}

struct State {
    mood: Mood,
    alerts: Vec<Alert>,
}

/// The receiver.
pub(crate) struct Sink {
    state: Arc<Mutex<State>>,
    _server: Server,
}

impl Sink {
    pub(crate) fn new(netns: &str) -> Result<Sink, String> {
        Sink::on(net::listen(netns, SocketAddr::new(net::SERVICES.into(), PORT))?)
    }

    fn on(listener: TcpListener) -> Result<Sink, String> {
        let state = Arc::new(Mutex::new(State { mood: Mood::Accept, alerts: Vec::new() }));
        let shared = Arc::clone(&state);
        let server = http::serve(listener, move |mut stream, over| {
            let Some(request) = http::read(&stream) else { return };
            match locked(&shared, |s| s.mood) {
                Mood::Hang => {
                    while locked(&shared, |s| s.mood) == Mood::Hang && !over.load(Ordering::Relaxed) {
                        std::thread::sleep(POLL);
                    }
                    // Whoever was kept waiting was never answered.
                    return;
                }
                Mood::Refuse => {
                    http::answer(&mut stream, "500 Internal Server Error", "text/plain", b"no\n");
                    return;
                }
                Mood::Accept => {}
            }
            locked(&shared, |s| {
                if s.alerts.len() < KEPT_LIMIT {
                    s.alerts.push(Alert { path: request.path.clone(), body: request.body.clone() });
                }
            });
            // A body that both a webhook's and a Telegram-like sender take for success.
            http::answer(&mut stream, "200 OK", "application/json", b"{\"ok\":true,\"result\":{}}");
        })?;
        Ok(Sink { state, _server: server })
    }

    pub(crate) fn set(&self, mood: Mood) {
        locked(&self.state, |s| s.mood = mood);
    }

    pub(crate) fn alerts(&self) -> Vec<Alert> {
        locked(&self.state, |s| s.alerts.clone())
    }

    /// Waits for an alert whose body contains the words.
    pub(crate) fn wait_for(&self, words: &str, limit: Duration) -> Result<Alert, String> {
        let started = Instant::now();
        loop {
            if let Some(alert) = self.alerts().into_iter().find(|a| a.body.contains(words)) {
                return Ok(alert);
            }
            if started.elapsed() > limit {
                let bodies: Vec<String> = self.alerts().into_iter().map(|a| a.body).collect();
                return Err(format!(
                    "no alert with {words:?} within {:.0} s: {bodies:?}",
                    limit.as_secs_f64()
                ));
            }
            std::thread::sleep(POLL);
        }
    }
}

/// A poisoned lock means that a thread of ours died; its data is still what was written.
pub(crate) fn locked<T, R>(mutex: &Mutex<T>, act: impl FnOnce(&mut T) -> R) -> R {
    act(&mut mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpStream;

    fn post(address: SocketAddr, limit: Duration) -> String {
        let mut stream = TcpStream::connect_timeout(&address, limit).unwrap();
        stream.set_read_timeout(Some(limit)).unwrap();
        stream.write_all(b"POST /hook HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello").unwrap();
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text
    }

    #[test]
    fn accepted_refused_and_unanswered() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let sink = Sink::on(listener).unwrap();
        sink.set(Mood::Refuse);
        assert!(post(address, Duration::from_secs(5)).starts_with("HTTP/1.1 500"));
        sink.set(Mood::Hang);
        assert_eq!(post(address, Duration::from_millis(200)), "");
        assert!(sink.alerts().is_empty());
        sink.set(Mood::Accept);
        assert!(post(address, Duration::from_secs(5)).starts_with("HTTP/1.1 200"));
        assert_eq!(sink.wait_for("hello", Duration::from_secs(5)).unwrap().path, "/hook");
        assert!(sink.wait_for("nothing", Duration::ZERO).is_err());
    }
}
