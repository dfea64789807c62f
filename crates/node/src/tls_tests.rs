//! Both probes against real TLS servers on the loopback. This test program is the gateway: the lock names it.

use super::*;
use crate::find::tests::node_at;
use crate::judge::Judge;
use crate::probe::{Health, Listening, Look, Ready, Startup, Want, look};
use crate::ws::{self, HelloResult, Token};
use crate::{http, lock};
use engine::{FaultKind, Verdict};
use host::clock::{self, Deadline};
use host::process::ProcessId;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{HandshakeKind, ServerConfig, ServerConnection, StreamOwned};
use std::io::{Cursor, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tungstenite::Message;

const HELLO: &str = include_str!("../tests/recorded/hello-ok.json");
const STATUS: &str = include_str!("../tests/recorded/status.json");
const CHALLENGE: &str = include_str!("../tests/recorded/challenge.json");

#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Keep,
    /// Promises to keep the connection and closes it after every answer.
    Fickle,
    /// Answers the first question of a connection and no other.
    Once,
}

struct Made {
    config: Arc<ServerConfig>,
    pem: String,
}

fn made(first_year: i32, last_year: i32) -> Made {
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.not_before = rcgen::date_time_ymd(first_year, 1, 1);
    params.not_after = rcgen::date_time_ymd(last_year, 1, 1);
    let key = rcgen::KeyPair::generate().unwrap();
    let own = params.self_signed(&key).unwrap();
    let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![own.der().clone()], der)
        .unwrap();
    Made { config: Arc::new(config), pem: own.pem() }
}

/// Answers as a healthy gateway does, over whatever it is given. What was asked is kept.
fn gateway(tls: Option<Arc<ServerConfig>>, manner: Manner) -> Gateway {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (asked, kinds) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
    let (all, how) = (Arc::clone(&asked), Arc::clone(&kinds));
    let connections = Arc::new(AtomicUsize::new(0));
    let met = Arc::clone(&connections);
    // Ends with the test program.
    std::thread::spawn(move || {
        for tcp in listener.incoming() {
            met.fetch_add(1, Ordering::SeqCst);
            let (tls, all, how) = (tls.clone(), Arc::clone(&all), Arc::clone(&how));
            std::thread::spawn(move || {
                let tcp = tcp.unwrap();
                tcp.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                let Some(config) = tls else { return drop(talk(tcp, manner, &all)) };
                let mut stream = StreamOwned::new(ServerConnection::new(config).unwrap(), tcp);
                // Like Node's: whoever does not speak TLS is cut off without a word.
                if stream.conn.complete_io(&mut stream.sock).is_ok() {
                    how.lock().unwrap().extend(stream.conn.handshake_kind());
                    let _ = talk(stream, manner, &all);
                }
            });
        }
    });
    Gateway { port, asked, kinds, connections }
}

struct Gateway {
    port: u16,
    asked: Arc<Mutex<Vec<String>>>,
    kinds: Arc<Mutex<Vec<HandshakeKind>>>,
    /// Also those that came to nothing.
    connections: Arc<AtomicUsize>,
}

impl Gateway {
    fn asked(&self, word: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|a| a.contains(word)).count()
    }
}

struct Prefixed<S> {
    before: Cursor<Vec<u8>>,
    inner: S,
}

impl<S: Read> Read for Prefixed<S> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = self.before.read(buf)?;
        if n > 0 { Ok(n) } else { self.inner.read(buf) }
    }
}

impl<S: Write> Write for Prefixed<S> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.inner.write(buf)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

fn talk<S: Read + Write>(mut stream: S, manner: Manner, asked: &Mutex<Vec<String>>) -> std::io::Result<()> {
    loop {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            if stream.read(&mut byte)? == 0 {
                return Ok(());
            }
            head.push(byte[0]);
            if head.first() == Some(&0x16) {
                // As Node answers what is no HTTP.
                return stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
            }
        }
        let text = String::from_utf8_lossy(&head).into_owned();
        asked.lock().unwrap().push(text.clone());
        if text.contains("Upgrade: websocket") {
            return greet(Prefixed { before: Cursor::new(head), inner: stream }, asked);
        }
        let body = if text.starts_with("GET /healthz") {
            r#"{"ok":true,"status":"live"}"#
        } else if text.starts_with("GET /startupz") {
            r#"{"ok":true,"status":"started","version":"2026.9.6"}"#
        } else {
            r#"{"ready":true,"failing":[]}"#
        };
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        stream.flush()?;
        if manner == Manner::Once {
            while stream.read(&mut byte)? > 0 {}
        }
        if manner == Manner::Fickle || text.contains("Connection: close") {
            return Ok(());
        }
    }
}

fn greet<S: Read + Write>(stream: S, asked: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let Ok(mut ws) = tungstenite::accept(stream) else { return Ok(()) };
    let _ = ws.send(Message::text(CHALLENGE));
    for answer in [HELLO, STATUS] {
        let Ok(Message::Text(frame)) = ws.read() else { return Ok(()) };
        asked.lock().unwrap().push(frame.as_str().to_owned());
        let _ = ws.send(Message::text(answer));
    }
    while ws.read().is_ok() {}
    Ok(())
}

/// A node on this port whose lock names this very program.
fn node_of(dir: &std::path::Path, port: u16, tls: &str) -> Node {
    let mut node = node_at(dir);
    node.port = port;
    std::fs::create_dir_all(node.state_dir.join("gateway/tls")).unwrap();
    let us = ProcessId::current().unwrap();
    let file = lock::path(&node.state_dir, node.ids.uid);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, format!(r#"{{"pid":{},"startTime":{}}}"#, us.pid, us.start_ticks)).unwrap();
    let config = format!("{{gateway:{{mode:'local',auth:{{token:'t0ken'}}{tls}}}}}");
    std::fs::write(&node.config_path, config).unwrap();
    node
}

const ON: &str = ",tls:{enabled:true}";

fn put_certificate(node: &Node, pem: &str) {
    std::fs::write(node.state_dir.join("gateway/tls/gateway-cert.pem"), pem).unwrap();
}

fn with_hello() -> Want {
    Want { hello: true, ..Want::default() }
}

fn seen(node: &Node, want: &Want) -> Look {
    look(node, want, Deadline::after(Duration::from_secs(20)))
}

fn well(seen: &Look) {
    assert_eq!(seen.our_side, None);
    assert_eq!(seen.listening, Listening::Gateway);
    assert_eq!(seen.health, Health::Live);
    assert!(matches!(seen.startup, Startup::Started { .. }), "{:?}", seen.startup);
    assert!(matches!(seen.ready, Ready::Answer { ready: true, .. }), "{:?}", seen.ready);
}

#[test]
fn a_gateway_that_speaks_tls_is_judged_like_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let own = made(2020, 2049);
    let served = gateway(Some(own.config), Manner::Keep);
    let node = node_of(dir.path(), served.port, ON);
    put_certificate(&node, &own.pem);
    let first = seen(&node, &with_hello());
    well(&first);
    assert!(matches!(&first.hello, Some(HelloResult::Ok(h)) if h.version == "2026.9.6"), "{:?}", first.hello);
    assert_eq!(first.certificate, None);
    let mut judge = Judge::new(crate::Limits::default(), crate::Baseline::default());
    let judgement = judge.observe(&first);
    assert_eq!(judgement.verdict, Verdict::Serving { degraded: vec![] });
    assert_eq!(judgement.confidence, crate::Confidence::Full);
    // The quiet looks: one connection each, and no signature.
    let before = served.kinds.lock().unwrap().len();
    let mut heard = first.heard;
    for _ in 0..3 {
        let quiet = seen(&node, &Want { heard, ..Want::default() });
        well(&quiet);
        heard = quiet.heard;
    }
    let kinds = served.kinds.lock().unwrap()[before..].to_vec();
    assert_eq!(kinds, [HandshakeKind::Resumed; 3], "three questions share one connection");
    assert_eq!((served.asked("GET /healthz"), served.asked("t0ken")), (4, 1));
}

#[test]
fn an_expired_or_other_certificate_is_told_and_is_no_damage() {
    let (old, early, other) = (made(1999, 2001), made(2090, 2099), made(2020, 2049));
    for (own, in_file, told) in [
        (&old, Some(&old), "expired on 2001-01-01"),
        (&early, Some(&early), "does not hold before 2090-01-01"),
        (&other, Some(&old), "another TLS certificate than"),
        (&other, None, "cannot be compared"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let served = gateway(Some(Arc::clone(&own.config)), Manner::Keep);
        let node = node_of(dir.path(), served.port, ON);
        if let Some(file) = in_file {
            put_certificate(&node, &file.pem);
        }
        let first = seen(&node, &with_hello());
        well(&first);
        assert!(matches!(first.hello, Some(HelloResult::Ok(_))), "{:?}", first.hello);
        assert!(first.certificate.as_ref().is_some_and(|c| c.contains(told)), "{:?}", first.certificate);
        let judgement = Judge::new(crate::Limits::default(), crate::Baseline::default()).observe(&first);
        assert_eq!(judgement.verdict, Verdict::Serving { degraded: vec![] });
        assert_eq!(judgement.findings.iter().map(|f| f.kind).collect::<Vec<_>>(), [FaultKind::Notice]);
    }
}

#[test]
fn what_the_gateway_speaks_is_right_whatever_its_config_says_by_now() {
    let own = made(2020, 2049);
    for (tls, config) in [
        // Switched on or off and not yet restarted; and a config that is gone.
        (false, Some(ON)),
        (true, Some("")),
        (true, None),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let served = gateway(tls.then(|| Arc::clone(&own.config)), Manner::Keep);
        let node = node_of(dir.path(), served.port, config.unwrap_or_default());
        if config.is_none() {
            std::fs::remove_file(&node.config_path).unwrap();
        }
        let first = seen(&node, &with_hello());
        well(&first);
        let hello = if config.is_some() {
            matches!(first.hello, Some(HelloResult::Ok(_)))
        } else {
            first.hello == Some(HelloResult::NoToken)
        };
        assert!(hello, "{:?}", first.hello);
        // Once found out, it is remembered with the listener.
        let before = served.connections.load(Ordering::SeqCst);
        let quiet = seen(&node, &Want { heard: first.heard, ..Want::default() });
        well(&quiet);
        let needed = if tls { 1 } else { 3 };
        let more = served.connections.load(Ordering::SeqCst) - before;
        assert_eq!(more, needed, "it was asked in another tongue first");
    }
}

#[test]
fn a_server_that_closes_what_it_promised_to_keep_is_asked_anew() {
    let dir = tempfile::tempdir().unwrap();
    let own = made(2020, 2049);
    let served = gateway(Some(own.config), Manner::Fickle);
    let node = node_of(dir.path(), served.port, ON);
    well(&seen(&node, &Want::default()));
    assert_eq!(served.kinds.lock().unwrap().len(), 3);
}

#[test]
fn each_question_of_one_connection_has_its_own_deadline() {
    let served = gateway(Some(made(2020, 2049).config), Manner::Once);
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, served.port));
    let mut line = http::Line::new(at, Tongue::Tls, None);
    assert!(line.get("/healthz", Deadline::after(Duration::from_secs(20))).is_ok());
    let began = clock::now();
    let second = line.get("/startupz", Deadline::after(Duration::from_millis(200)));
    assert_eq!(second, Err(http::HttpError::TimedOut { connected: true }));
    let took = clock::now().since_ms(began).unwrap();
    assert!((200..5_000).contains(&took), "{took} ms");
}

#[test]
fn a_handshake_that_hangs_or_drips_keeps_its_deadline() {
    for drip in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for tcp in listener.incoming() {
                std::thread::spawn(move || {
                    let mut tcp = tcp.unwrap();
                    // A record that claims to be long and comes byte by byte; or nothing.
                    let mut record = [0_u8; 4096];
                    record[..5].copy_from_slice(&[0x16, 3, 3, 0x0f, 0xfb]);
                    for byte in record {
                        if !drip || tcp.write_all(&[byte]).is_err() {
                            break;
                        }
                        std::thread::sleep(Duration::from_millis(20));
                    }
                    let mut rest = Vec::new();
                    let _ = tcp.read_to_end(&mut rest);
                });
            }
        });
        let dir = tempfile::tempdir().unwrap();
        let node = node_of(dir.path(), port, ON);
        let began = clock::now();
        let mute = seen(&node, &with_hello());
        let took = clock::now().since_ms(began).unwrap();
        assert!((2_000..6_000).contains(&took), "{took} ms");
        assert_eq!(mute.listening, Listening::Gateway);
        assert_eq!((mute.health, mute.startup, mute.ready), (Health::Silent, Startup::Silent, Ready::Silent));
        assert_eq!(mute.hello, None);
        let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let short = Deadline::after(Duration::from_millis(150));
        assert_eq!(ws::hello_at(at, Tongue::Tls, &Token::Open, short), HelloResult::TimedOut);
    }
}

#[test]
fn what_is_neither_is_a_wrong_answer() {
    for answer in [b"SSH-2.0-stranger\r\n".as_slice(), b"", b"\x15\x03\x03\x00\x02\x02\x28"] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for tcp in listener.incoming() {
                let mut tcp: TcpStream = tcp.unwrap();
                let mut buf = [0; 4096];
                let _ = tcp.read(&mut buf);
                let _ = tcp.write_all(answer);
            }
        });
        let dir = tempfile::tempdir().unwrap();
        let node = node_of(dir.path(), port, ON);
        let strange = seen(&node, &with_hello());
        assert!(
            matches!(&strange.health, Health::Wrong { why } if why.contains("TLS")),
            "{:?}",
            strange.health
        );
        assert_eq!(strange.hello, None);
    }
}

#[test]
fn the_token_is_for_the_gateway_alone() {
    let own = made(2020, 2049);
    for tls in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let served = gateway(tls.then(|| Arc::clone(&own.config)), Manner::Keep);
        let node = node_of(dir.path(), served.port, if tls { ON } else { "" });
        std::fs::remove_file(lock::path(&node.state_dir, node.ids.uid)).unwrap();
        // The gateway is another process than the one that listens and answers so well.
        let mut other = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let main = ProcessId::of(other.id());
        let stranger = seen(&node, &Want { main, ..with_hello() });
        other.kill().unwrap();
        while other.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(matches!(stranger.listening, Listening::Stranger { .. }), "{:?}", stranger.listening);
        assert_eq!((stranger.hello, served.asked("t0ken")), (None, 0));
    }
}

#[test]
fn a_line_says_what_failed() {
    let own = made(2020, 2049);
    let plain = gateway(None, Manner::Keep);
    let sealed = gateway(Some(own.config), Manner::Keep);
    let ask = |port: u16, tongue: Tongue| {
        let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        http::Line::new(at, tongue, None).get("/healthz", Deadline::after(Duration::from_secs(20)))
    };
    assert!(ask(plain.port, Tongue::Plain).is_ok() && ask(sealed.port, Tongue::Tls).is_ok());
    for (port, tongue) in [(plain.port, Tongue::Tls), (sealed.port, Tongue::Plain)] {
        let got = ask(port, tongue);
        assert!(matches!(got, Err(http::HttpError::Garbage { .. })), "{got:?}");
    }
    assert_eq!(ask(1, Tongue::Tls), Err(http::HttpError::Refused));
}

#[test]
fn the_settings_are_read_as_the_program_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let node = node_at(dir.path());
    let read = |tls: &str| {
        let config = config::parse(format!("{{gateway:{{tls:{tls}}}}}").as_bytes()).unwrap();
        settings(&node, &config)
    };
    assert_eq!(read("{}"), None);
    assert_eq!(read("{enabled:'true'}"), None);
    let own = node.state_dir.join("gateway/tls");
    assert_eq!(
        read("{enabled:true,certPath:' '}"),
        Some(Settings {
            certificate: Some(own.join("gateway-cert.pem")),
            key: Some(own.join("gateway-key.pem")),
            generates: true
        })
    );
    assert_eq!(
        read("{enabled:true,autoGenerate:false,certPath:'~/c.pem',keyPath:'k.pem'}"),
        Some(Settings { certificate: Some(node.home.join("c.pem")), key: None, generates: false })
    );
}

#[test]
fn half_a_pair_is_named_before_a_start_dies_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let node = node_of(dir.path(), 1, ON);
    let (certificate, key) = (
        node.state_dir.join("gateway/tls/gateway-cert.pem"),
        node.state_dir.join("gateway/tls/gateway-key.pem"),
    );
    assert_eq!(refused_at_start(&node), None, "a start makes both");
    std::fs::write(&certificate, "-----BEGIN CERTIFICATE-----").unwrap();
    assert!(refused_at_start(&node).is_some_and(|w| w.contains("gateway-key.pem is missing")));
    std::fs::write(&key, "").unwrap();
    assert!(refused_at_start(&node).is_some_and(|w| w.contains("gateway-key.pem holds no PEM")));
    std::fs::write(&key, "-----BEGIN PRIVATE KEY-----").unwrap();
    assert_eq!(refused_at_start(&node), None);
    std::fs::remove_file(&key).unwrap();
    std::fs::remove_file(&certificate).unwrap();
    let node = node_of(dir.path(), 1, ",tls:{enabled:true,autoGenerate:false}");
    assert!(refused_at_start(&node).is_some_and(|w| w.contains("gateway-cert.pem is missing")));
    let node = node_of(dir.path(), 1, "");
    assert_eq!(refused_at_start(&node), None, "TLS is off");
}

#[test]
fn days_are_told_only_outside_of_the_certificates_time() {
    let (der, _) = {
        let own = made(2020, 2030);
        (known::first_certificate(own.pem.as_bytes()).unwrap(), own)
    };
    assert_eq!(dated(&der, 1_700_000_000), None);
    assert!(dated(&der, 1_900_000_000).is_some());
    assert!(dated(&der, 1_500_000_000).is_some());
}
