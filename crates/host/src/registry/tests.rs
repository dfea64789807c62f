//! Against a registry on the loopback that misbehaves on demand.

use super::*;
use std::ffi::OsString;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// What the server does with one request.
enum Reply {
    /// Status, headers, body.
    Plain(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// Promises this many bytes and sends only these.
    Cut(usize, Vec<u8>),
    /// Accepts, reads, never answers.
    Hang,
    /// One byte at a time, far slower than any deadline here.
    Drip(Vec<u8>),
}

fn ok(body: impl Into<Vec<u8>>) -> Reply {
    Reply::Plain(200, vec![], body.into())
}

fn status(status: u16) -> Reply {
    Reply::Plain(status, vec![], b"no".to_vec())
}

fn redirect(to: String) -> Reply {
    Reply::Plain(302, vec![("location", to)], vec![])
}

type Handler = dyn Fn(&str, usize) -> Reply + Send + Sync;

/// A loopback registry; remembers every request head it saw.
struct Server {
    addr: SocketAddr,
    seen: Arc<Mutex<Vec<String>>>,
    closing: Arc<std::sync::atomic::AtomicBool>,
}

impl Server {
    fn new(handler: impl Fn(&str, usize) -> Reply + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let (seen, closing) = (Arc::new(Mutex::new(Vec::new())), Arc::new(false.into()));
        let server = Server { addr, seen: Arc::clone(&seen), closing: Arc::clone(&closing) };
        let handler: Arc<Handler> = Arc::new(handler);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if closing.load(std::sync::atomic::Ordering::SeqCst) {
                    return;
                }
                let (seen, handler) = (Arc::clone(&seen), Arc::clone(&handler));
                std::thread::spawn(move || serve(stream.unwrap(), &seen, &*handler));
            }
        });
        server
    }

    fn url(&self) -> String {
        format!("http://{}/", self.addr)
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.closing.store(true, std::sync::atomic::Ordering::SeqCst);
        let _ = TcpStream::connect_timeout(&self.addr, Duration::from_secs(1));
    }
}

fn serve(mut stream: TcpStream, seen: &Mutex<Vec<String>>, handler: &Handler) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            Ok(_) | Err(_) => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let nth = {
        let mut seen = seen.lock().unwrap();
        seen.push(head.clone());
        seen.len() - 1
    };
    let send = |stream: &mut TcpStream, status: u16, length: usize, more: &[(&str, String)]| {
        let more: String = more.iter().map(|(k, v)| format!("{k}: {v}\r\n")).collect();
        let head =
            format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nconnection: close\r\n{more}\r\n");
        let _ = stream.write_all(head.as_bytes());
    };
    match handler(&head, nth) {
        Reply::Plain(status, headers, body) => {
            send(&mut stream, status, body.len(), &headers);
            let _ = stream.write_all(&body);
        }
        Reply::Cut(promised, body) => {
            send(&mut stream, 200, promised, &[]);
            let _ = stream.write_all(&body);
        }
        // Until the client hangs up.
        Reply::Hang => drop(stream.read(&mut byte)),
        Reply::Drip(body) => {
            send(&mut stream, 200, body.len(), &[]);
            stream.set_read_timeout(Some(Duration::from_millis(40))).unwrap();
            for piece in body.chunks(1) {
                if stream.write_all(piece).is_err() || matches!(stream.read(&mut byte), Ok(0)) {
                    return;
                }
            }
        }
    }
}

fn registry_with(rc: &str, env: &[(&str, &str)]) -> Registry {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rc");
    std::fs::write(&file, rc).unwrap();
    let env: Env = env.iter().map(|(k, v)| (OsString::from(k), OsString::from(v))).collect();
    let registry = Registry::with_env(&env, Some(dir.path()), &[file]).unwrap();
    Registry { first_pause: Duration::from_millis(5), ..registry }
}

fn registry(server: &Server) -> Registry {
    registry_with(&format!("registry={}\n", server.url()), &[])
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

fn within(ms: u64) -> Deadline {
    Deadline::after(Duration::from_millis(ms))
}

const TARBALL: &[u8] = b"the bytes of a tarball, as far as the registry is concerned";

fn manifest(name: &str, version: &str, tarball: &str) -> String {
    format!(
        r#"{{"name":"{name}","version":"{version}","engines":{{"node":">=1"}},
            "dist":{{"tarball":"{tarball}","integrity":"{}","unpackedSize":7}}}}"#,
        Integrity::of(TARBALL)
    )
}

fn document(versions: &[&str], tarball: &str) -> String {
    let entries: Vec<String> =
        versions.iter().map(|v| format!(r#""{v}":{}"#, manifest("pkg", v, tarball))).collect();
    format!(r#"{{"name":"pkg","dist-tags":{{"latest":"1.0.0"}},"versions":{{{}}}}}"#, entries.join(","))
}

fn package(server: &Server) -> Package {
    Package {
        name: "pkg".into(),
        version: "1.0.0".into(),
        tarball_url: format!("{}pkg/-/pkg-1.0.0.tgz", server.url()),
        integrity: Integrity::of(TARBALL),
        engines_node: None,
        unpacked_size: None,
    }
}

#[test]
fn a_known_version_costs_one_small_request() {
    let server = Server::new(|_, _| ok(manifest("pkg", "1.2.3", "https://t.example/pkg.tgz")));
    let found = registry(&server).resolve("pkg", "1.2.3", soon()).unwrap();
    assert_eq!((found.version.as_str(), found.tarball_url.as_str()), ("1.2.3", "https://t.example/pkg.tgz"));
    assert_eq!((found.engines_node.as_deref(), found.unpacked_size), (Some(">=1"), Some(7)));
    assert_eq!(found.integrity, Integrity::of(TARBALL));
    let seen = server.seen();
    assert_eq!(seen.len(), 1);
    assert!(seen[0].starts_with("GET /pkg/1.2.3 HTTP/1.1\r\n"), "{}", seen[0]);
}

#[test]
fn a_mirror_without_the_short_way_is_asked_for_the_document() {
    for short in [404_u16, 405, 200] {
        let server = Server::new(move |head, _| {
            if head.starts_with("GET /pkg/") {
                status(short)
            } else {
                ok(document(&["1.0.0", "2.0.0"], "http://t/x"))
            }
        });
        assert_eq!(registry(&server).resolve("pkg", "latest", soon()).unwrap().version, "1.0.0", "{short}");
        assert!(server.seen()[1].contains("application/vnd.npm.install-v1+json"));
    }
}

#[test]
fn a_line_is_picked_from_the_document() {
    let server = Server::new(|_, _| ok(document(&["26.1.0", "26.10.0", "26.9.0", "27.0.0"], "http://t/x")));
    assert_eq!(registry(&server).resolve("pkg", "26", soon()).unwrap().version, "26.10.0");
    assert_eq!(registry(&server).resolve("pkg", "28", soon()).unwrap_err().kind, Kind::NotFound);
}

#[test]
fn scoped_names_are_escaped() {
    let server = Server::new(|_, _| ok(manifest("@s/pkg", "1.0.0", "http://t/x")));
    registry(&server).resolve("@s/pkg", "1.0.0", soon()).unwrap();
    assert!(server.seen()[0].starts_with("GET /@s%2fpkg/1.0.0 "), "{}", server.seen()[0]);
}

#[test]
fn what_is_not_there_is_said_so() {
    let server = Server::new(|_, _| status(404));
    let e = registry(&server).resolve("pkg", "1.0.0", soon()).unwrap_err();
    assert_eq!(e.kind, Kind::NotFound);
    for (name, version) in [("../etc", "1"), ("a/b", "1"), ("", "1"), ("pkg", "1/../2"), ("pkg", "http://x")]
    {
        let e = registry(&server).resolve(name, version, soon()).unwrap_err();
        assert_eq!(e.kind, Kind::Usage, "{name} {version}");
    }
}

#[test]
fn another_packages_answer_is_refused() {
    let server = Server::new(|_, _| ok(document(&["1.0.0"], "http://t/x").replace("\"pkg\"", "\"evil\"")));
    assert_eq!(registry(&server).resolve("pkg", "1", soon()).unwrap_err().kind, Kind::Corrupt);
    let server = Server::new(|_, _| ok(document(&["1.0.0"], "http://t/x").replace("sha512-", "sha1-")));
    let e = registry(&server).resolve("pkg", "1", soon()).unwrap_err();
    assert!(e.why.contains("no sha512"), "{e}");
}

#[test]
fn a_login_page_is_named_as_what_it_is() {
    let server = Server::new(|_, _| ok("<html>Sign in</html>"));
    let e = registry(&server).resolve("pkg", "1", soon()).unwrap_err();
    assert_eq!(e.kind, Kind::Corrupt);
    assert!(e.hint.unwrap().contains("login page"));
    assert_eq!(server.seen().len(), 1, "asking again would not help");
}

#[test]
fn transient_errors_are_tried_again() {
    let server = Server::new(|_, nth| match nth {
        0 => status(503),
        1 => Reply::Cut(5_000, b"{\"versions\":{".to_vec()),
        _ => ok(document(&["1.0.0"], "http://t/x")),
    });
    assert_eq!(registry(&server).resolve("pkg", "1", soon()).unwrap().version, "1.0.0");
    assert_eq!(server.seen().len(), 3);
}

#[test]
fn lasting_errors_end_after_a_few_tries() {
    let server = Server::new(|_, _| status(500));
    let e = registry(&server).resolve("pkg", "1", soon()).unwrap_err();
    assert!(e.why.contains("answered 500 (tried 4 times)"), "{e}");
    let patient = Registry { first_pause: Duration::from_secs(3_600), ..registry(&server) };
    let e = patient.resolve("pkg", "1", soon()).unwrap_err();
    assert_eq!(e.kind, Kind::TimedOut);
    assert!(e.why.contains("answered 500"), "the last reason is kept: {e}");
}

#[test]
fn a_refusal_is_final_and_tells_no_secret() {
    let server = Server::new(|_, _| status(401));
    let rc = format!("registry={}\n//{}/:_authToken=sesame\n", server.url(), server.addr);
    let e = registry_with(&rc, &[]).resolve("pkg", "1.0.0", soon()).unwrap_err();
    assert_eq!(e.kind, Kind::Denied);
    assert!(!format!("{e:?}").contains("sesame"));
    let seen = server.seen();
    assert_eq!(seen.len(), 1);
    assert!(seen[0].contains("authorization: Bearer sesame"), "{}", seen[0]);
}

#[test]
fn silence_ends_at_the_deadline() {
    let server = Server::new(|_, _| Reply::Hang);
    let began = crate::clock::now();
    let e = registry(&server).resolve("pkg", "1", within(300)).unwrap_err();
    assert_eq!(e.kind, Kind::TimedOut, "{e}");
    assert!(crate::clock::now().since_ms(began).unwrap() < 5_000);
}

#[test]
fn compressed_documents_are_read() {
    let server = Server::new(|_, _| {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(document(&["1.0.0"], "http://t/x").as_bytes()).unwrap();
        Reply::Plain(200, vec![("content-encoding", "gzip".into())], gz.finish().unwrap())
    });
    assert_eq!(registry(&server).resolve("pkg", "1", soon()).unwrap().version, "1.0.0");
    assert!(server.seen()[0].contains("accept-encoding: gzip"), "{}", server.seen()[0]);
}

#[test]
fn redirects_are_followed_without_the_credentials() {
    let target = Server::new(|_, _| ok(document(&["1.0.0"], "http://t/x")));
    let url = format!("{}moved", target.url());
    let server = Server::new(move |_, _| redirect(url.clone()));
    let rc = format!("registry={}\n//{}/:_authToken=sesame\n", server.url(), server.addr);
    assert_eq!(registry_with(&rc, &[]).resolve("pkg", "1", soon()).unwrap().version, "1.0.0");
    assert!(server.seen()[0].contains("sesame"));
    let seen = target.seen();
    assert!(seen[0].starts_with("GET /moved "), "{}", seen[0]);
    assert!(!seen[0].contains("authorization"), "{}", seen[0]);
}

#[test]
fn redirects_end() {
    let server = Server::new(|_, _| redirect("/again".into()));
    let e = registry(&server).resolve("pkg", "1", soon()).unwrap_err();
    assert!(e.why.contains("circles"), "{e}");
    assert_eq!(server.seen().len(), 1 + REDIRECTS_LIMIT as usize);
    for (from, to, joins) in [
        ("https://a/b/c?q", "/d", Some("https://a/d")),
        ("https://a/b/c?q", "d", Some("https://a/b/d")),
        ("https://a", "d", Some("https://a/d")),
        ("https://a/b", "//c/d", Some("https://c/d")),
        ("https://a/b", "https://u:p@c/d", Some("https://c/d")),
        ("https://a/b", "http://a/b", None),
        ("http://a/b", "http://c/d", Some("http://c/d")),
        ("https://a/b", "ftp://c/d", None),
        ("https://a/b", "", None),
    ] {
        assert_eq!(joined(from, to).as_deref(), joins, "{from} -> {to}");
    }
}

#[test]
fn a_tarball_on_the_public_host_is_fetched_from_the_mirror() {
    let server =
        Server::new(|_, _| ok(manifest("pkg", "1.0.0", "https://registry.npmjs.org/pkg/-/pkg-1.0.0.tgz")));
    let mirror = registry_with(&format!("registry={}npm", server.url()), &[]);
    let found = mirror.resolve("pkg", "1.0.0", soon()).unwrap();
    assert_eq!(found.tarball_url, format!("{}npm/pkg/-/pkg-1.0.0.tgz", server.url()));
}

#[test]
fn requests_go_through_the_proxy() {
    let proxy = Server::new(|_, _| status(502));
    let env = format!("http://user:sesame@{}", proxy.addr);
    let through = registry_with("registry=https://registry.invalid/\n", &[("HTTPS_PROXY", env.as_str())]);
    let e = through.resolve("pkg", "1", within(1_000)).unwrap_err();
    assert!(e.why.contains(&format!("through the proxy {}", proxy.addr)), "{e}");
    assert!(!format!("{e:?}").contains("sesame"));
    assert!(proxy.seen()[0].starts_with("CONNECT registry.invalid:443 "), "{}", proxy.seen()[0]);
}

/// A directory for a download, and proof that nothing but the download is left in it.
fn downloaded(server: &Server, deadline: Deadline) -> (Result<Vec<u8>>, Vec<(u64, u64)>) {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("pkg.tgz");
    let mut progress = Vec::new();
    let done = registry(server).download(&package(server), &to, &mut |d, t| progress.push((d, t)), deadline);
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    match done {
        Ok(()) => assert_eq!(names, ["pkg.tgz"]),
        Err(_) => assert!(names.is_empty(), "{names:?}"),
    }
    (done.map(|()| std::fs::read(&to).unwrap()), progress)
}

#[test]
fn a_download_is_whole_and_tells_its_progress() {
    let server = Server::new(|_, _| ok(TARBALL));
    let (bytes, progress) = downloaded(&server, soon());
    assert_eq!(bytes.unwrap(), TARBALL);
    assert_eq!(progress.last(), Some(&(TARBALL.len() as u64, TARBALL.len() as u64)));
    assert!(server.seen()[0].contains("accept-encoding: identity"));
}

#[test]
fn a_cut_download_goes_on_where_it_was() {
    let server = Server::new(|head, nth| match nth {
        0 => Reply::Cut(TARBALL.len(), TARBALL[..10].to_vec()),
        _ => {
            assert!(head.contains("range: bytes=10-"), "{head}");
            let range = format!("bytes 10-{}/{}", TARBALL.len() - 1, TARBALL.len());
            Reply::Plain(206, vec![("content-range", range)], TARBALL[10..].to_vec())
        }
    });
    assert_eq!(downloaded(&server, soon()).0.unwrap(), TARBALL);
    assert_eq!(server.seen().len(), 2);
}

#[test]
fn a_cut_download_starts_over_where_ranges_are_ignored_or_wrong() {
    let server = Server::new(|_, nth| match nth {
        0 => Reply::Cut(TARBALL.len(), TARBALL[..10].to_vec()),
        _ => ok(TARBALL),
    });
    assert_eq!(downloaded(&server, soon()).0.unwrap(), TARBALL);
    let server = Server::new(|_, nth| match nth {
        0 => Reply::Cut(TARBALL.len(), TARBALL[..10].to_vec()),
        _ => {
            let range = format!("bytes 0-{}/{}", TARBALL.len() - 1, TARBALL.len());
            Reply::Plain(206, vec![("content-range", range)], TARBALL.to_vec())
        }
    });
    assert_eq!(downloaded(&server, soon()).0.unwrap(), TARBALL);
    assert_eq!(server.seen().len(), 2, "a range other than the one asked for is taken as what it is");
}

#[test]
fn a_download_cut_each_time_ends() {
    let server = Server::new(|_, _| Reply::Cut(TARBALL.len(), vec![]));
    downloaded(&server, soon()).0.unwrap_err();
    assert_eq!(server.seen().len(), TRIES_LIMIT as usize);
}

#[test]
fn wrong_bytes_never_get_the_name() {
    let server = Server::new(|_, _| ok("something else"));
    let e = downloaded(&server, soon()).0.unwrap_err();
    assert_eq!(e.kind, Kind::Corrupt);
    assert!(e.why.contains("expected sha512-"), "{e}");
    let server = Server::new(|_, nth| if nth == 0 { ok("something else") } else { ok(TARBALL) });
    assert_eq!(downloaded(&server, soon()).0.unwrap(), TARBALL, "one bad answer is not the last word");
}

#[test]
fn a_dripping_or_silent_body_ends_at_the_deadline() {
    for reply in [|| Reply::Drip(TARBALL.to_vec()), || Reply::Hang] {
        let server = Server::new(move |_, _| reply());
        let began = crate::clock::now();
        let e = downloaded(&server, within(400)).0.unwrap_err();
        assert_eq!(e.kind, Kind::TimedOut, "{e}");
        assert!(crate::clock::now().since_ms(began).unwrap() < 5_000);
    }
}

#[test]
fn a_right_file_is_not_fetched_again_and_a_wrong_one_is() {
    let server = Server::new(|_, _| ok(TARBALL));
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("pkg.tgz");
    std::fs::write(&to, TARBALL).unwrap();
    let fetch = || registry(&server).download(&package(&server), &to, &mut |_, _| {}, soon());
    fetch().unwrap();
    assert!(server.seen().is_empty());
    std::fs::write(&to, "rotten").unwrap();
    fetch().unwrap();
    assert_eq!(std::fs::read(&to).unwrap(), TARBALL);
}

#[test]
fn integrity_values() {
    let right = Integrity::of(TARBALL).to_string();
    assert_eq!(Integrity::parse(&format!("sha1-AAAA {right}?opt")), Some(Integrity::of(TARBALL)));
    for bad in ["", "sha512-", "sha512-AAAA", "sha1-AAAA", "sha512-!!"] {
        assert_eq!(Integrity::parse(bad), None, "{bad}");
    }
}

#[test]
fn shown_addresses_hold_no_secret() {
    assert_eq!(shown("https://u:p@h/x?token=1#f"), "https://h/x");
    let registry = registry_with("registry=https://u:p@r.example/npm\n", &[]);
    assert_eq!(registry.address("pkg"), "https://r.example/npm/");
    assert!(!format!("{registry:?}").contains("u:p"));
}
