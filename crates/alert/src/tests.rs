//! Delivery against real sockets on the loopback: receivers that accept, refuse, hang, reset and drip.

use super::*;
use crate::channel::{LocalFile, Secret, local_channels};
use crate::outbox::{INCIDENT_LIMIT, Kept, NOTICE_LIMIT, Put};
use host::tls::{Options, Proxies};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// What a receiver does with a connection after it has read the request.
#[derive(Clone)]
enum Manner {
    Answer(&'static str, &'static str),
    Hang,
    Reset,
    /// One byte of the answer now and then, for ever.
    Drip,
    /// Copies this directory to the other one before it accepts: what a kill at that moment leaves.
    Image(PathBuf, PathBuf),
}

struct Request {
    line: String,
    headers: String,
    body: Value,
}

struct Server {
    port: u16,
    seen: Arc<Mutex<Vec<Request>>>,
    manner: Arc<Mutex<Manner>>,
    closing: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    fn new(manner: Manner) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let manner = Arc::new(Mutex::new(manner));
        let closing = Arc::new(AtomicBool::new(false));
        let (s, m, c) = (Arc::clone(&seen), Arc::clone(&manner), Arc::clone(&closing));
        let thread = std::thread::spawn(move || {
            std::thread::scope(|scope| {
                for stream in listener.incoming() {
                    if c.load(Ordering::SeqCst) {
                        return;
                    }
                    let (s, m, c) = (&s, &m, &c);
                    // A client that went away is the client's matter.
                    scope.spawn(move || drop(talk(&stream.unwrap(), s, m, c)));
                }
            });
        });
        Server { port, seen, manner, closing, thread: Some(thread) }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn keys(&self) -> Vec<String> {
        let seen = self.seen.lock().unwrap();
        seen.iter().map(|r| r.body["key"].as_str().unwrap_or("").to_owned()).collect()
    }

    fn turn(&self, manner: Manner) {
        *self.manner.lock().unwrap() = manner;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect_timeout(&([127, 0, 0, 1], self.port).into(), Duration::from_secs(1));
        self.thread.take().unwrap().join().unwrap();
    }
}

fn talk(
    mut stream: &TcpStream,
    seen: &Mutex<Vec<Request>>,
    manner: &Mutex<Manner>,
    closing: &AtomicBool,
) -> std::io::Result<()> {
    // A client on a busy machine may be slow to write; one that is gone closes.
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut head = Vec::new();
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        if let Some(v) = line.to_lowercase().strip_prefix("content-length:") {
            length = v.trim().parse().unwrap();
        }
        if line.trim().is_empty() {
            break;
        }
        head.push(line);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    seen.lock().unwrap().push(Request {
        line: head.first().cloned().unwrap_or_default(),
        headers: head.concat().to_lowercase(),
        // A heartbeat has none.
        body: serde_json::from_slice(&body).unwrap_or(Value::Null),
    });
    let manner = manner.lock().unwrap().clone();
    let answer = |status: &str, body: &str| {
        format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    };
    stream.set_read_timeout(Some(Duration::from_millis(20)))?;
    let until_gone = |mut stream: &TcpStream, drip: &[u8]| {
        while !closing.load(Ordering::SeqCst) {
            let gone = stream.write_all(drip).is_err() || matches!(stream.read(&mut [0; 16]), Ok(0));
            if gone {
                return;
            }
        }
    };
    match manner {
        Manner::Answer(status, body) => stream.write_all(answer(status, body).as_bytes())?,
        Manner::Hang => until_gone(stream, b""),
        // Closing with a linger of zero is a reset.
        Manner::Reset => rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO))?,
        Manner::Drip => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nX-Slow: ")?;
            until_gone(stream, b"a");
        }
        Manner::Image(from, to) => {
            for entry in std::fs::read_dir(from)? {
                let entry = entry?;
                std::fs::copy(entry.path(), to.join(entry.file_name()))?;
            }
            stream.write_all(answer("200 OK", "").as_bytes())?;
        }
    }
    Ok(())
}

pub(super) fn client() -> Client {
    let options = Options {
        proxies: Proxies::default(),
        only_ca_pem: vec![],
        extra_ca_file: None,
        verify: true,
        idle: 2,
    };
    Client::new(&options).unwrap()
}

fn channel(toml: &str) -> Channel {
    toml::from_str(toml).unwrap()
}

fn webhook(name: &str, server: &Server) -> Channel {
    channel(&format!(
        "kind = \"webhook\"\nname = \"{name}\"\nurl = \"{}/hook\"\ntoken = \"hush\"",
        server.url()
    ))
}

pub(super) fn message(kind: Kind, incident: &str) -> Message {
    let facts = Facts {
        node: "main".into(),
        host: "attic".into(),
        incident: incident.into(),
        at: "2026-11-22T18:00:00Z".into(),
        why: "no process holds the port".into(),
        ..Facts::default()
    };
    Message::new(kind, &facts, Language::English)
}

fn queue(outbox: &mut Outbox, kind: Kind, incident: &str) {
    assert!(matches!(outbox.put(&message(kind, incident)).unwrap(), Put::Queued { kept: Kept::OnDisk, .. }));
}

fn pass_at(outbox: &mut Outbox, channels: &[Channel], now: Moment) -> Delivery {
    deliver_with(outbox, channels, Some(&client()), now, Deadline::after(Duration::from_secs(60)))
}

fn pass(outbox: &mut Outbox, channels: &[Channel]) -> Delivery {
    pass_at(outbox, channels, clock::now())
}

/// A moment at which every backoff has run out.
fn much_later() -> Moment {
    clock::now().plus_ms(4 * 3_600_000)
}

fn files(dir: &Path) -> usize {
    std::fs::read_dir(dir)
        .unwrap()
        .filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|x| x == "json"))
        .count()
}

#[test]
fn an_accepted_message_is_told_once_and_its_key_is_in_the_payload() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(Manner::Answer("204 No Content", ""));
    let channels = [webhook("hook", &server)];
    let mut outbox = Outbox::open(dir.path()).unwrap();
    assert_eq!(outbox.proven(&channels[0]), None);
    queue(&mut outbox, Kind::Opening, "i1");
    let d = pass(&mut outbox, &channels);
    assert!(d.reached("i1/opening"), "{d:?}");
    assert_eq!((d.queued, d.next), (0, None));
    assert!(matches!(outbox.put(&message(Kind::Opening, "i1")).unwrap(), Put::Duplicate));
    // Also in another process, after a restart.
    let mut again = Outbox::open(dir.path()).unwrap();
    assert!(matches!(again.put(&message(Kind::Opening, "i1")).unwrap(), Put::Duplicate));
    assert!(pass(&mut again, &channels).accepted.is_empty());
    assert_eq!(server.keys(), ["i1/opening"]);
    assert_eq!(again.proven(&channels[0]).as_deref(), Some("2026-11-22T18:00:00Z"));
    let seen = server.seen.lock().unwrap();
    assert_eq!(seen[0].body["schema"], 1);
    assert_eq!(seen[0].body["severity"], "warning");
    assert!(seen[0].headers.contains("authorization: bearer hush"), "{}", seen[0].headers);
    assert!(seen[0].headers.contains("idempotency-key: "), "{}", seen[0].headers);
}

#[test]
fn refusals_stay_queued_are_retried_and_told_apart() {
    for (status, permanent) in [
        ("500 Internal Server Error", false),
        ("503 Service Unavailable", false),
        ("429 Too Many Requests", false),
        ("401 Unauthorized", true),
        ("404 Not Found", true),
        ("400 Bad Request", true),
        ("302 Found\r\nLocation: http://127.0.0.1:1/", true),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::new(Manner::Answer(status, ""));
        let channels = [webhook("hook", &server)];
        let mut outbox = Outbox::open(dir.path()).unwrap();
        queue(&mut outbox, Kind::Emergency, "i1");
        let start = clock::now();
        let d = pass_at(&mut outbox, &channels, start);
        assert_eq!((d.refused.len(), d.queued, d.refused[0].permanent), (1, 1, permanent), "{status}: {d:?}");
        assert!(!format!("{d:?}").contains("hush"), "{d:?}");
        let wait = d.next.unwrap();
        assert!(wait > Duration::ZERO && wait <= Duration::from_secs(5), "{status}: {wait:?}");
        // Not before its time, and not forgotten after it.
        assert!(pass_at(&mut outbox, &channels, start).refused.is_empty());
        server.turn(Manner::Answer("200 OK", ""));
        assert!(pass_at(&mut outbox, &channels, much_later()).reached("i1/emergency"), "{status}");
        assert_eq!(server.keys(), ["i1/emergency", "i1/emergency"], "{status}");
    }
}

#[test]
fn a_receiver_may_put_us_off_but_not_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(Manner::Answer("429 Too Many Requests\r\nRetry-After: 60", ""));
    let channels = [webhook("hook", &server)];
    let mut outbox = Outbox::open(dir.path()).unwrap();
    queue(&mut outbox, Kind::Opening, "i1");
    let wait = pass(&mut outbox, &channels).next.unwrap();
    assert!(wait > Duration::from_secs(30) && wait <= Duration::from_secs(60), "{wait:?}");
    server.turn(Manner::Answer("429 Too Many Requests\r\nRetry-After: 99999999", ""));
    let wait = pass_at(&mut outbox, &channels, much_later()).next.unwrap();
    assert!(wait <= Duration::from_secs(3_600), "{wait:?}");
}

#[test]
fn channels_that_hang_reset_or_drip_cost_the_others_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (good, hang) = (Server::new(Manner::Answer("200 OK", "")), Server::new(Manner::Hang));
    let (reset, drip) = (Server::new(Manner::Reset), Server::new(Manner::Drip));
    let channels =
        [webhook("hang", &hang), webhook("reset", &reset), webhook("drip", &drip), webhook("good", &good)];
    let mut outbox = Outbox::open(dir.path()).unwrap();
    queue(&mut outbox, Kind::Opening, "i1");
    queue(&mut outbox, Kind::Emergency, "i1");
    let start = clock::now();
    let limit = Duration::from_secs(3);
    let d = deliver_with(&mut outbox, &channels, Some(&client()), start, Deadline::after(limit));
    let took = clock::now().since_ms(start).unwrap();
    assert!((3_000..9_000).contains(&took), "the deadline cut at {took} ms");
    let names: Vec<_> = d.accepted.iter().map(|r| (r.key.as_str(), r.channel.as_str())).collect();
    assert_eq!(names, [("i1/emergency", "good"), ("i1/opening", "good")], "{d:?}");
    let mut failed: Vec<_> = d.refused.iter().map(|r| (r.channel.as_str(), r.permanent)).collect();
    failed.sort_unstable();
    assert_eq!(failed, [("drip", false), ("hang", false), ("reset", false)], "one attempt each: {d:?}");
    assert_eq!(d.queued, 2);
    assert_eq!(hang.keys().len(), 1);
}

#[test]
fn a_kill_between_answer_and_record_means_twice_never_none() {
    let dir = tempfile::tempdir().unwrap();
    let image = tempfile::tempdir().unwrap();
    let server = Server::new(Manner::Image(dir.path().to_owned(), image.path().to_owned()));
    let channels = [webhook("hook", &server)];
    let mut outbox = Outbox::open(dir.path()).unwrap();
    queue(&mut outbox, Kind::Closing, "i1");
    assert!(pass(&mut outbox, &channels).reached("i1/closing"));
    // The process that lives on is done; the one that was killed starts from the image.
    assert_eq!((files(dir.path()), files(image.path())), (0, 1));
    server.turn(Manner::Answer("200 OK", ""));
    let mut reborn = Outbox::open(image.path()).unwrap();
    assert!(pass(&mut reborn, &channels).reached("i1/closing"));
    assert_eq!(server.keys(), ["i1/closing", "i1/closing"], "same key, so a receiver can tell");
}

#[test]
fn a_kill_between_remembering_and_removing_tells_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(Manner::Answer("200 OK", ""));
    let channels = [webhook("hook", &server)];
    let mut outbox = Outbox::open(dir.path()).unwrap();
    queue(&mut outbox, Kind::Closing, "i1");
    let entry = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
    let bytes = std::fs::read(&entry).unwrap();
    assert!(pass(&mut outbox, &channels).reached("i1/closing"));
    std::fs::write(&entry, bytes).unwrap();
    let mut reborn = Outbox::open(dir.path()).unwrap();
    assert_eq!(pass(&mut reborn, &channels).queued, 0);
    assert_eq!((server.keys().len(), files(dir.path())), (1, 0));
}

#[test]
fn after_an_outage_everything_goes_out_incidents_first() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(Manner::Reset);
    let channels = [webhook("hook", &server)];
    let mut outbox = Outbox::open(dir.path()).unwrap();
    queue(&mut outbox, Kind::Notice(Notice::BackupStale), "b1");
    queue(&mut outbox, Kind::Opening, "i1");
    queue(&mut outbox, Kind::Closing, "i1");
    queue(&mut outbox, Kind::Opening, "i2");
    let d = pass(&mut outbox, &channels);
    assert_eq!((d.refused.len(), d.queued), (1, 4), "a dead channel is tried once per pass: {d:?}");
    server.turn(Manner::Answer("200 OK", ""));
    let d = pass_at(&mut outbox, &channels, much_later());
    let keys: Vec<_> = d.accepted.iter().map(|r| r.key.as_str()).collect();
    assert_eq!(keys, ["i1/opening", "i1/closing", "i2/opening", "b1/backup-stale"]);
    assert_eq!(d.queued, 0);
}

#[test]
fn a_message_waits_for_every_channel_but_not_for_a_dead_one_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let (good, dead) = (Server::new(Manner::Answer("200 OK", "")), Server::new(Manner::Reset));
    let channels = [webhook("good", &good), webhook("dead", &dead)];
    let mut outbox = Outbox::open(dir.path()).unwrap();
    queue(&mut outbox, Kind::Opening, "i1");
    let mut passes = 1;
    while pass_at(&mut outbox, &channels, much_later()).queued > 0 {
        passes += 1;
        assert!(passes <= 20, "never given up");
    }
    assert_eq!((passes, good.keys().len(), dead.keys().len()), (20, 1, 20));
    // With nobody else to take it, it is never given up.
    queue(&mut outbox, Kind::Opening, "i2");
    for _ in 0..25 {
        assert_eq!(pass_at(&mut outbox, &channels[1..], much_later()).queued, 1);
    }
}

#[test]
fn notices_are_dropped_oldest_first_and_incidents_never() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = Outbox::open(dir.path()).unwrap();
    queue(&mut outbox, Kind::Opening, "i1");
    queue(&mut outbox, Kind::Emergency, "i1");
    for n in 0..NOTICE_LIMIT {
        queue(&mut outbox, Kind::Notice(Notice::BackupStale), &format!("n{n}"));
    }
    let put = outbox.put(&message(Kind::Notice(Notice::BackupStale), "one-more")).unwrap();
    assert!(matches!(&put, Put::Queued { dropped, .. } if dropped == &["n0/backup-stale"]), "{put:?}");
    for n in 2..INCIDENT_LIMIT {
        queue(&mut outbox, Kind::Opening, &format!("i{n}"));
    }
    assert_eq!(outbox.len(), NOTICE_LIMIT + INCIDENT_LIMIT);
    let full = outbox.put(&message(Kind::Opening, "too-many")).unwrap_err();
    assert_eq!(full.kind, host::Kind::NoSpace);
    assert!(matches!(outbox.put(&message(Kind::Emergency, "i1")).unwrap(), Put::Duplicate));
    assert_eq!(files(dir.path()), NOTICE_LIMIT + INCIDENT_LIMIT);
}

#[test]
fn damaged_files_are_put_aside_and_the_rest_goes_out() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(Manner::Answer("200 OK", ""));
    let channels = [webhook("hook", &server)];
    let mut outbox = Outbox::open(dir.path()).unwrap();
    queue(&mut outbox, Kind::Opening, "i1");
    std::fs::write(dir.path().join("torn.json"), "{\"schema\":1,\"seq\":").unwrap();
    std::fs::write(dir.path().join("huge.json"), vec![b' '; 1 << 20]).unwrap();
    std::fs::write(dir.path().join("told"), [0xff; 40]).unwrap();
    std::fs::write(dir.path().join("newer.json"), "{\"schema\":2,\"what\":\"ever\"}").unwrap();
    let d = pass(&mut outbox, &channels);
    assert!(d.reached("i1/opening"), "{d:?}");
    assert_eq!(d.set_aside, ["huge.json", "torn.json"]);
    assert!(dir.path().join("torn.json.bad").exists() && dir.path().join("newer.json").exists());
    assert!(pass(&mut outbox, &channels).set_aside.is_empty());
}

#[test]
fn what_a_killed_writer_left_goes_and_a_living_ones_stays() {
    let dir = tempfile::tempdir().unwrap();
    // Above the kernel's largest pid, so never alive.
    let (dead, living) =
        (".a.json.4194305-7-0.tmp".to_owned(), format!(".a.json.{}-7-0.tmp", std::process::id()));
    std::fs::write(dir.path().join(&dead), "").unwrap();
    std::fs::write(dir.path().join(&living), "").unwrap();
    let mut outbox = Outbox::open(dir.path()).unwrap();
    assert!(!dir.path().join(dead).exists() && dir.path().join(living).exists());
    assert!(outbox.is_empty());
}

#[test]
fn a_disk_that_refuses_keeps_nothing_from_being_told() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(Manner::Answer("200 OK", ""));
    let channels = [webhook("hook", &server)];
    let path = dir.path().join("outbox");
    let mut outbox = Outbox::open(&path).unwrap();
    // A file in the directory's place refuses root too.
    std::fs::remove_dir(&path).unwrap();
    std::fs::write(&path, "").unwrap();
    let put = outbox.put(&message(Kind::Emergency, "i1")).unwrap();
    assert!(matches!(put, Put::Queued { kept: Kept::InMemory(_), .. }), "{put:?}");
    assert!(matches!(outbox.put(&message(Kind::Emergency, "i1")).unwrap(), Put::Duplicate));
    assert!(pass(&mut outbox, &channels).reached("i1/emergency"));
    assert!(matches!(outbox.put(&message(Kind::Emergency, "i1")).unwrap(), Put::Duplicate));
    assert_eq!((pass(&mut outbox, &channels).queued, server.keys().len()), (0, 1));
}

#[test]
fn what_the_disk_refuses_the_spare_directory_keeps_for_another_process() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(Manner::Reset);
    let channels = [webhook("hook", &server)];
    let (disk, spare) = (dir.path().join("disk"), dir.path().join("spare"));
    // A file in the directory's place refuses root too.
    std::fs::write(&disk, "").unwrap();
    let open = || Outbox::open_with_spare(&disk, &spare).unwrap();
    let put = open().put(&message(Kind::Emergency, "i1")).unwrap();
    assert!(matches!(put, Put::Queued { kept: Kept::InSpare(_), .. }), "{put:?}");
    assert!(matches!(open().put(&message(Kind::Emergency, "i1")).unwrap(), Put::Duplicate));
    assert_eq!(pass(&mut open(), &channels).queued, 1);
    // The disk comes back: the next state goes there, and the spare is empty again.
    std::fs::remove_file(&disk).unwrap();
    assert_eq!(pass_at(&mut open(), &channels, much_later()).queued, 1);
    assert_eq!((files(&disk), files(&spare)), (1, 0));
    // It goes again, and the message is told: never twice, whatever comes back.
    let bytes = std::fs::read_dir(&disk).unwrap().map(|e| e.unwrap().path()).next().unwrap();
    let (name, bytes) = (bytes.file_name().unwrap().to_owned(), std::fs::read(&bytes).unwrap());
    std::fs::remove_dir_all(&disk).unwrap();
    std::fs::write(&disk, "").unwrap();
    std::fs::write(spare.join(&name), &bytes).unwrap();
    server.turn(Manner::Answer("200 OK", ""));
    assert!(pass_at(&mut open(), &channels, much_later()).reached("i1/emergency"));
    std::fs::remove_file(&disk).unwrap();
    std::fs::create_dir(&disk).unwrap();
    std::fs::write(disk.join(&name), &bytes).unwrap();
    assert_eq!(pass_at(&mut open(), &channels, much_later()).queued, 0);
    assert_eq!(server.keys().len(), 3);
    // Neither to be had is an error.
    let nowhere = dir.path().join("file");
    std::fs::write(&nowhere, "").unwrap();
    assert!(Outbox::open_with_spare(&nowhere, &nowhere.join("below")).is_err());
}

#[test]
fn ntfy_and_telegram_are_spoken_to_in_their_own_words() {
    let dir = tempfile::tempdir().unwrap();
    let (n, t) =
        (Server::new(Manner::Answer("200 OK", "{}")), Server::new(Manner::Answer("200 OK", "<html>")));
    let channels = [
        channel(&format!("kind = \"ntfy\"\nurl = \"{}\"\ntopic = \"node-hush\"\ntoken = \"tk\"", n.url())),
        channel(&format!(
            "kind = \"telegram\"\nbase_url = \"{}/\"\ntoken = \"1:hush\"\nchat_id = \"-42\"",
            t.url()
        )),
    ];
    let mut outbox = Outbox::open(dir.path()).unwrap();
    queue(&mut outbox, Kind::Emergency, "i1");
    let d = pass(&mut outbox, &channels);
    assert_eq!(d.accepted.iter().map(|r| r.channel.as_str()).collect::<Vec<_>>(), ["ntfy"], "{d:?}");
    assert!(d.refused[0].why.contains("not in the API's words"), "a captive portal accepted: {d:?}");
    t.turn(Manner::Answer("429 Too Many Requests", r#"{"ok":false,"parameters":{"retry_after":77}}"#));
    let wait = pass_at(&mut outbox, &channels, much_later()).next.unwrap();
    assert!(wait > Duration::from_secs(30) && wait <= Duration::from_secs(77), "{wait:?}");
    t.turn(Manner::Answer("200 OK", r#"{"ok":true,"result":{}}"#));
    assert!(pass_at(&mut outbox, &channels, much_later()).reached("i1/emergency"));
    let seen = n.seen.lock().unwrap();
    assert_eq!((&seen[0].body["topic"], &seen[0].body["priority"]), (&"node-hush".into(), &5.into()));
    assert!(seen[0].headers.contains("authorization: bearer tk"));
    let seen = t.seen.lock().unwrap();
    assert!(seen[0].line.starts_with("POST /bot1:hush/sendMessage "), "{}", seen[0].line);
    assert_eq!(seen[0].body["chat_id"], "-42");
    assert!(seen[0].body["text"].as_str().unwrap().ends_with("ref: i1/emergency"));
}

#[test]
fn no_error_or_debug_output_gives_a_secret_away() {
    let dir = tempfile::tempdir().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let channels = [
        channel(&format!(
            "kind = \"telegram\"\nbase_url = \"http://127.0.0.1:{port}\"\ntoken = \"1:hush\"\nchat_id = \"7\""
        )),
        channel(&format!("kind = \"webhook\"\nurl = \"http://127.0.0.1:{port}/hush\"\ntoken = \"hush\"")),
        channel("kind = \"webhook\"\nname = \"odd\"\nurl = \"http://127.0.0.1:99999/hush\""),
    ];
    let mut outbox = Outbox::open(dir.path()).unwrap();
    queue(&mut outbox, Kind::Opening, "i1");
    let d = pass(&mut outbox, &channels);
    assert_eq!(d.refused.len(), 3, "{d:?}");
    let shown = format!("{d:?} {channels:?} {outbox:?} {:?}", Secret::new("hush"));
    assert!(!shown.contains("hush"), "{shown}");
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        assert!(!text.contains("hush"), "{text}");
    }
}

#[test]
fn local_files_are_written_bounded_and_never_through_a_planted_link() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().canonicalize().unwrap();
    let state = home.join("state");
    std::fs::create_dir(&state).unwrap();
    let channels = local_channels(&state, Some(&home), false)
        .into_iter()
        .filter(|c| matches!(c, Channel::File(_)))
        .collect::<Vec<_>>();
    let mut outbox = Outbox::open(&home.join("outbox")).unwrap();
    queue(&mut outbox, Kind::Opening, "i1");
    let d = deliver_with(&mut outbox, &channels, None, clock::now(), Deadline::after(Duration::from_secs(5)));
    assert_eq!((d.accepted.len(), d.queued, d.reached("i1/opening")), (2, 0, false), "{d:?}");
    let text = std::fs::read_to_string(home.join("koboshi-alerts.txt")).unwrap();
    assert!(text.contains("main on attic is down") && text.contains("ref: i1/opening"), "{text}");

    // Planted: a link to a victim, a second name of a victim, a fifo that nobody reads.
    let victim = home.join("victim");
    std::fs::write(&victim, "untouched").unwrap();
    std::os::unix::fs::symlink(&victim, home.join("soft")).unwrap();
    std::fs::hard_link(&victim, home.join("hard")).unwrap();
    std::os::unix::fs::symlink(&state, home.join("way")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        home.join("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    for name in ["soft", "hard", "fifo", "way/x"] {
        let c = Channel::File(LocalFile { name: None, path: home.join(name) });
        let sent = send(None, &c, &message(Kind::Opening, "i1"), Deadline::after(Duration::from_secs(5)));
        assert!(matches!(sent, Sent::Later { .. }), "{name}: {sent:?}");
    }
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "untouched");

    // A file that has grown too long keeps its newest half.
    let long = home.join("long");
    std::fs::write(&long, "an old line of an alert\n".repeat(60_000)).unwrap();
    let c = Channel::File(LocalFile { name: None, path: long.clone() });
    let sent = send(None, &c, &message(Kind::Opening, "i9"), Deadline::after(Duration::from_secs(5)));
    assert_eq!(sent, Sent::Accepted);
    let text = std::fs::read_to_string(&long).unwrap();
    assert!(text.len() < 600_000 && text.starts_with("an old line") && text.ends_with("ref: i9/opening\n"));
}

#[test]
fn without_any_channel_a_message_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = Outbox::open(dir.path()).unwrap();
    queue(&mut outbox, Kind::Emergency, "i1");
    let d = pass(&mut outbox, &[]);
    assert_eq!((d.queued, d.next, d.accepted.len()), (1, None, 0));
}

#[test]
fn a_receiver_that_speaks_no_tls_gets_no_secret() {
    let dir = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://127.0.0.1:{}/", listener.local_addr().unwrap().port());
    let heard = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").unwrap();
        let mut heard = Vec::new();
        // Ended by a reset or an end, as the client likes.
        let _ = stream.read_to_end(&mut heard);
        heard
    });
    let channels = [channel(&format!("kind = \"webhook\"\nurl = \"{url}\"\ntoken = \"hush\""))];
    let mut outbox = Outbox::open(dir.path()).unwrap();
    queue(&mut outbox, Kind::Opening, "i1");
    let d = pass(&mut outbox, &channels);
    assert_eq!((d.accepted.len(), d.queued), (0, 1), "{d:?}");
    assert!(d.refused[0].why.contains("TLS"), "{d:?}");
    let heard = String::from_utf8_lossy(&heard.join().unwrap()).into_owned();
    assert!(!heard.contains("hush") && !heard.contains("POST"), "{heard}");
}

#[test]
fn a_test_message_proves_a_channel_or_says_why_not() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new(Manner::Answer("403 Forbidden", ""));
    let channel = webhook("hook", &server);
    let outbox = Outbox::open(dir.path()).unwrap();
    let facts = Facts { node: "main".into(), host: "attic".into(), at: "t0".into(), ..Facts::default() };
    let why = test(&outbox, &channel, &facts, Language::English, Deadline::after(Duration::from_secs(5)))
        .unwrap_err();
    assert!(why.contains("403"), "{why}");
    assert_eq!(outbox.proven(&channel), None);
    server.turn(Manner::Answer("200 OK", ""));
    test(&outbox, &channel, &facts, Language::English, Deadline::after(Duration::from_secs(5))).unwrap();
    assert_eq!(outbox.proven(&channel).as_deref(), Some("t0"));
}

#[test]
fn discord_and_slack_are_spoken_to_in_their_own_words() {
    let dir = tempfile::tempdir().unwrap();
    let (hook, bot) = (
        Server::new(Manner::Answer("204 No Content", "")),
        Server::new(Manner::Answer("200 OK", r#"{"id":"99"}"#)),
    );
    let (shook, sbot) = (
        Server::new(Manner::Answer("200 OK", "ok")),
        Server::new(Manner::Answer("200 OK", r#"{"ok":false,"error":"invalid_auth"}"#)),
    );
    let channels = [
        channel(&format!(
            "kind = \"discord\"\nname = \"dhook\"\nurl = \"{}/api/webhooks/1/hush\"",
            hook.url()
        )),
        channel(&format!(
            "kind = \"discord\"\nname = \"dbot\"\ntoken = \"hush\"\nuser_id = \"42\"\napi_root = \"{}/api\"",
            bot.url()
        )),
        channel(&format!("kind = \"slack\"\nname = \"shook\"\nurl = \"{}/services/hush\"", shook.url())),
        channel(&format!(
            "kind = \"slack\"\nname = \"sbot\"\ntoken = \"hush\"\nchannel = \"U1\"\napi_root = \"{}\"",
            sbot.url()
        )),
    ];
    let facts = Facts {
        node: "main".into(),
        host: "attic".into(),
        incident: "i1".into(),
        why: "<!channel> @everyone & more".into(),
        details: vec!["x".repeat(390); 8],
        ..Facts::default()
    };
    let mut outbox = Outbox::open(dir.path()).unwrap();
    outbox.put(&Message::new(Kind::Emergency, &facts, Language::English)).unwrap();
    let d = pass(&mut outbox, &channels);
    let mut names: Vec<_> = d.accepted.iter().map(|r| r.channel.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["dbot", "dhook", "shook"], "{d:?}");
    assert!(d.refused[0].permanent && d.refused[0].why.contains("invalid_auth"), "{d:?}");
    assert!(!format!("{d:?}").contains("hush"));

    let taken = |server: &Server| std::mem::take(&mut *server.seen.lock().unwrap());
    let seen = taken(&hook);
    let content = seen[0].body["content"].as_str().unwrap();
    assert!(content.chars().count() <= 2_000, "{}", content.len());
    assert!(
        content.starts_with("main on attic is still down") && content.ends_with("ref: i1/emergency"),
        "{content}"
    );
    assert!(content.contains("koboshi incidents show i1"), "what to do survives the cut: {content}");
    assert_eq!(seen[0].body["allowed_mentions"]["parse"], serde_json::json!([]));
    let seen = taken(&bot);
    let lines: Vec<_> = seen.iter().map(|r| r.line.trim_end().to_owned()).collect();
    assert_eq!(
        lines,
        ["POST /api/users/@me/channels HTTP/1.1", "POST /api/channels/99/messages HTTP/1.1"],
        "{lines:?}"
    );
    assert_eq!(seen[0].body["recipient_id"], "42");
    assert!(seen.iter().all(|r| r.headers.contains("authorization: bot hush")), "{}", seen[0].headers);
    assert!(seen[1].body["enforce_nonce"] == true && seen[1].body["nonce"].as_str().unwrap().len() <= 25);
    let seen = taken(&shook);
    let text = seen[0].body["text"].as_str().unwrap();
    assert!(text.contains("&lt;!channel&gt; @everyone &amp; more"), "{text}");
    let seen = taken(&sbot);
    assert!(seen[0].line.starts_with("POST /chat.postMessage "), "{}", seen[0].line);
    assert!(seen[0].headers.contains("authorization: bearer hush") && seen[0].body["channel"] == "U1");
    let mut dirs = Vec::new();
    for (said, accepted) in
        [(r#"{"ok":true}"#, true), (r#"{"ok":false,"error":"ratelimited"}"#, false), ("<html>", false)]
    {
        sbot.turn(Manner::Answer("200 OK", said));
        let d = pass_at(&mut outbox, &channels[3..], much_later());
        assert_eq!(d.accepted.len() == 1, accepted, "{said}: {d:?}");
        assert!(d.refused.iter().all(|r| !r.permanent), "{said}: {d:?}");
        let another = tempfile::tempdir().unwrap();
        outbox = Outbox::open(another.path()).unwrap();
        dirs.push(another);
        outbox.put(&Message::new(Kind::Emergency, &facts, Language::English)).unwrap();
    }
    // Told to wait in the body alone.
    bot.turn(Manner::Answer("429 Too Many Requests", r#"{"retry_after":64.5}"#));
    let d = pass_at(&mut outbox, &channels[1..2], clock::now());
    let wait = d.next.unwrap();
    assert!(wait > Duration::from_secs(30) && wait <= Duration::from_secs(65), "{wait:?}");
}

#[test]
fn a_heartbeat_is_heard_or_says_why_not_without_its_address() {
    let server = Server::new(Manner::Answer("200 OK", "OK"));
    let url = |s: &str| crate::channel::Address::parse(s).unwrap();
    let beat = |url: &crate::channel::Address| {
        crate::send::beat_with(&client(), url, Deadline::after(Duration::from_secs(2)))
    };
    beat(&url(&format!("{}/hush", server.url()))).unwrap();
    server.turn(Manner::Answer("404 Not Found", ""));
    let why = beat(&url(&format!("{}/hush", server.url()))).unwrap_err();
    assert!(why.contains("404") && !why.contains("hush"), "{why}");
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let why = beat(&url(&format!("http://127.0.0.1:{port}/hush"))).unwrap_err();
    assert!(!why.is_empty() && !why.contains("hush"), "{why}");
}
