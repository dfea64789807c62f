//! Delivery over real TLS: a server on the loopback with a certificate of its own making, trusted or not.

use super::tests::message;
use super::*;
use crate::outbox::Outbox;
use crate::text::Kind;
use host::tls::{Options, Proxies};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// What it does once the request has come through.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Answer(&'static str, &'static str),
    /// Never answers.
    Hang,
    /// Resets the connection in the middle of the exchange.
    Reset,
    /// Accepts the connection and never says hello.
    Mute,
}

struct TlsServer {
    port: u16,
    pem: String,
    /// What was read of each request.
    seen: Arc<Mutex<Vec<String>>>,
    manner: Arc<Mutex<Manner>>,
}

impl TlsServer {
    fn new(manner: Manner) -> TlsServer {
        let made =
            rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (seen, manner) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(manner)));
        let (all, how, config) = (Arc::clone(&seen), Arc::clone(&manner), Arc::new(config));
        // Ends with the test program.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (all, how, config) = (Arc::clone(&all), Arc::clone(&how), Arc::clone(&config));
                // A client that turns away is the client's matter.
                std::thread::spawn(move || drop(talk(stream.unwrap(), &all, &how, config)));
            }
        });
        TlsServer { port, pem: made.cert.pem(), seen, manner }
    }

    fn channel(&self, name: &str) -> Channel {
        let root = format!("https://127.0.0.1:{}", self.port);
        toml::from_str(&format!(
            "kind = \"telegram\"\nname = \"{name}\"\ntoken = \"1:hush\"\nchat_id = \"7\"\napi_root = \"{root}\""
        ))
        .unwrap()
    }

    /// A client that trusts this server and no other.
    fn client(&self) -> Client {
        let only_ca_pem = vec![self.pem.clone().into_bytes()];
        let options =
            Options { proxies: Proxies::default(), only_ca_pem, extra_ca_file: None, verify: true, idle: 2 };
        Client::new(&options).unwrap()
    }
}

fn talk(
    tcp: TcpStream,
    seen: &Mutex<Vec<String>>,
    manner: &Mutex<Manner>,
    config: Arc<ServerConfig>,
) -> std::io::Result<()> {
    tcp.set_read_timeout(Some(Duration::from_secs(30)))?;
    let hold = || std::thread::sleep(Duration::from_secs(30));
    let how = *manner.lock().unwrap();
    if how == Manner::Mute {
        hold();
        return Ok(());
    }
    let plain = tcp.try_clone()?;
    let mut stream = StreamOwned::new(ServerConnection::new(config).map_err(std::io::Error::other)?, tcp);
    let mut request = Vec::new();
    let mut chunk = [0; 4096];
    // The body is one object, so its end is the request's.
    while !request.ends_with(b"}") {
        let n = stream.read(&mut chunk)?;
        if n == 0 {
            return Ok(());
        }
        request.extend_from_slice(&chunk[..n]);
    }
    seen.lock().unwrap().push(String::from_utf8_lossy(&request).into_owned());
    match how {
        Manner::Answer(status, body) => {
            write!(
                stream,
                "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )?;
            stream.conn.send_close_notify();
            stream.flush()?;
        }
        Manner::Hang | Manner::Mute => hold(),
        Manner::Reset => rustix::net::sockopt::set_socket_linger(&plain, Some(Duration::ZERO))?,
    }
    Ok(())
}

fn outbox() -> (tempfile::TempDir, Outbox) {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = Outbox::open(dir.path()).unwrap();
    outbox.put(&message(Kind::Emergency, "i1")).unwrap();
    (dir, outbox)
}

fn pass(server: &TlsServer, client: &Client, limit: Duration) -> Delivery {
    let (_dir, mut outbox) = outbox();
    let channels = [server.channel("phone")];
    deliver_with(&mut outbox, &channels, Some(client), clock::now(), Deadline::after(limit))
}

#[test]
fn over_https_every_answer_means_what_it_means() {
    const PATIENCE: Duration = Duration::from_secs(60);
    let server = TlsServer::new(Manner::Answer("200 OK", r#"{"ok":true,"result":{}}"#));
    let client = server.client();
    let d = pass(&server, &client, PATIENCE);
    assert!(d.reached("i1/emergency"), "{d:?}");
    assert!(server.seen.lock().unwrap()[0].starts_with("POST /bot1:hush/sendMessage HTTP/1.1"));
    for (status, body, permanent, wait_s) in [
        ("500 Internal Server Error", "", false, 1..=5),
        ("429 Too Many Requests\r\nRetry-After: 70", "", false, 60..=70),
        ("429 Too Many Requests", r#"{"ok":false,"parameters":{"retry_after":80}}"#, false, 71..=80),
        ("401 Unauthorized", r#"{"ok":false}"#, true, 1..=5),
    ] {
        *server.manner.lock().unwrap() = Manner::Answer(status, body);
        let d = pass(&server, &client, PATIENCE);
        assert_eq!((d.refused.len(), d.queued), (1, 1), "{status}: {d:?}");
        assert_eq!(d.refused[0].permanent, permanent, "{status}: {d:?}");
        // Whole seconds, rounded up: a pass that took no measurable time leaves the wait whole.
        let wait = d.next.unwrap().as_millis().div_ceil(1000);
        assert!(wait_s.contains(&wait), "{status}: {wait}");
        assert!(!format!("{d:?}").contains("hush"), "{d:?}");
    }
}

#[test]
fn over_https_a_hang_or_a_reset_costs_its_deadline_at_most() {
    for (manner, least_ms) in [(Manner::Hang, 2_500), (Manner::Mute, 2_500), (Manner::Reset, 0)] {
        let server = TlsServer::new(manner);
        let began = clock::now();
        let d = pass(&server, &server.client(), Duration::from_secs(3));
        let took = clock::now().since_ms(began).unwrap();
        assert!((least_ms..9_000).contains(&took), "{took} ms: {d:?}");
        assert_eq!((d.refused.len(), d.queued, d.refused[0].permanent), (1, 1, false), "{d:?}");
    }
}

#[test]
fn a_server_that_is_not_trusted_learns_nothing() {
    let server = TlsServer::new(Manner::Answer("200 OK", r#"{"ok":true}"#));
    let other = TlsServer::new(Manner::Hang);
    let d = pass(&server, &other.client(), Duration::from_secs(30));
    assert_eq!((d.accepted.len(), d.queued), (0, 1), "{d:?}");
    assert!(d.refused[0].why.contains("TLS") && !d.refused[0].permanent, "{d:?}");
    assert!(server.seen.lock().unwrap().is_empty(), "the token was sent to somebody unknown");
}
