//! Emergency, with the real agent: who is told and how often, what the gateway's port says, and the way out.

use crate::fake::Fake;
use crate::gateway::Agent;
use host::clock::{self, Deadline};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A climb in which nothing can be done takes seconds, the next one begins a minute later.
const PATIENCE: Duration = Duration::from_secs(150);

/// Somebody who is told: accepts everything, or never answers.
struct Receiver {
    port: u16,
    seen: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Receiver {
    fn new(answers: bool) -> Receiver {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let all = Arc::clone(&seen);
        // Ends with the test program.
        std::thread::spawn(move || {
            let mut held = Vec::new();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                if let Some(request) = read(&stream) {
                    all.lock().unwrap().push(request);
                }
                if answers {
                    let body = r#"{"ok":true,"result":{}}"#;
                    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close";
                    let _ = write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                } else {
                    held.push(stream);
                }
            }
        });
        Receiver { port, seen }
    }

    /// As a webhook of the configuration. No test leaves the machine's own terminals as the only ones to be told.
    fn hook(&self, name: &str) -> String {
        let port = self.port;
        format!("[[alert]]\nkind = \"webhook\"\nname = \"{name}\"\nurl = \"http://127.0.0.1:{port}/\"\n")
    }

    /// The keys of the messages, in the order of their coming.
    fn keys(&self) -> Vec<String> {
        let seen = self.seen.lock().unwrap();
        seen.iter().map(|(_, body)| body["key"].as_str().unwrap_or("").to_owned()).collect()
    }

    fn requests(&self) -> Vec<(String, Value)> {
        self.seen.lock().unwrap().clone()
    }
}

fn read(stream: &TcpStream) -> Option<(String, Value)> {
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first).ok()?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        if let Some(v) = line.to_lowercase().strip_prefix("content-length:") {
            length = v.trim().parse().unwrap();
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some((first.trim().to_owned(), serde_json::from_slice(&body).unwrap_or(Value::Null)))
}

/// What the gateway's port says now; `None` when nobody is there.
fn asked(port: u16) -> Option<String> {
    let mut stream =
        TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), Duration::from_secs(5)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
    let mut said = Vec::new();
    // It may end with a reset once all was said.
    let _ = stream.read_to_end(&mut said);
    Some(String::from_utf8_lossy(&said).into_owned())
}

fn answers_503(fake: &Fake) -> bool {
    asked(fake.port)
        .is_some_and(|said| said.starts_with("HTTP/1.1 503") && said.contains("\"koboshi\":\"emergency\""))
}

fn wait_for(fake: &Fake, what: &str, mut done: impl FnMut() -> bool) -> u64 {
    let (began, deadline) = (clock::now(), Deadline::after(PATIENCE));
    while !done() {
        let log = || std::fs::read_to_string(fake.path("agent.log")).unwrap_or_default();
        assert!(!deadline.passed(), "{what} did not come\n{}", log());
        std::thread::sleep(Duration::from_millis(20));
    }
    clock::now().since_ms(began).unwrap()
}

/// Takes the runtime away: no start can work, and no snapshot is good yet.
fn break_runtime(fake: &Fake) -> String {
    let node = fake.path("node/bin/node");
    let text = std::fs::read_to_string(&node).unwrap();
    std::fs::write(&node, "#!/bin/sh\nexit 1\n").unwrap();
    text
}

fn mend_runtime(fake: &Fake, text: &str) {
    let new = fake.path("node/bin/node.new");
    std::fs::write(&new, text).unwrap();
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(&new, fake.path("node/bin/node")).unwrap();
}

#[test]
fn an_emergency_is_told_once_answered_on_the_port_and_left_when_the_node_is_mended() {
    let fake = Fake::new();
    let (good, hanging) = (Receiver::new(true), Receiver::new(false));
    fake.configure(&(hanging.hook("hanging") + &good.hook("good")));
    fake.start_gateway();
    let agent = Agent::start(&fake);
    let runtime = break_runtime(&fake);
    fake.kill_gateway();
    let emergency = "incident-1/emergency".to_owned();
    let told = wait_for(&fake, "the emergency", || {
        let (object, code) = fake.json(&["status"]);
        code == 4 && object["verdict"] == "emergency"
    });
    // A channel that never answers has no part in how soon the others are told.
    let after = wait_for(&fake, "the emergency's message", || good.keys().contains(&emergency));
    assert!(after < 30_000, "told {after} ms after the emergency, which came after {told} ms");
    assert!(!hanging.keys().is_empty(), "the hanging channel was tried too");
    wait_for(&fake, "the answer on the port", || answers_503(&fake));
    fake.koboshi(&["status"]).code(4).says("tries again at").says("says 503 meanwhile");
    fake.koboshi(&["check"]).code(1).says("no gateway process runs");

    // The voice has its own life only as long as its agent: a killed one takes it along.
    agent.kill();
    let gone = wait_for(&fake, "the end of the answer", || asked(fake.port).is_none());
    assert!(gone < 2_000, "{gone} ms");
    let agent = Agent::launch(&fake);
    wait_for(&fake, "the answer of the next agent", || answers_503(&fake));

    // Somebody touches the program, as a start by hand does: the port is free at once, and can be bound.
    drop(std::fs::File::open(fake.package().join("dist/index.js")).unwrap());
    let free = wait_for(&fake, "the free port", || asked(fake.port).is_none());
    assert!(free < 1_000, "{free} ms");
    drop(TcpListener::bind(("127.0.0.1", fake.port)).unwrap());

    // The way out: what kept it down is mended, nobody types anything.
    mend_runtime(&fake, &runtime);
    wait_for(&fake, "the closing message", || good.keys().contains(&"incident-1/closing".to_owned()));
    assert!(fake.gateway().is_some());
    let (object, code) = fake.json(&["status"]);
    assert_eq!((code, &object["verdict"]), (0, &json!("serving")), "{object}");
    // Where nothing can be tried the emergency follows the opening within milliseconds, and goes first.
    let mut keys = good.keys();
    assert_eq!(keys.last(), Some(&"incident-1/closing".to_owned()));
    keys.sort();
    assert_eq!(keys, ["incident-1/closing", "incident-1/emergency", "incident-1/opening"]);
    let worked = object["alerts"]["proven"].as_array().unwrap();
    assert_eq!((worked.len(), &worked[0]["channel"]), (1, &json!("good")), "{object}");
    drop(agent);
}

#[test]
fn a_climb_takes_the_port_back_and_its_gateway_binds() {
    let fake = Fake::new();
    fake.configure(&Receiver::new(true).hook("hook"));
    fake.start_gateway();
    let _agent = Agent::start(&fake);
    let runtime = break_runtime(&fake);
    fake.kill_gateway();
    wait_for(&fake, "the answer on the port", || answers_503(&fake));
    wait_for(&fake, "the file in the home", || {
        std::fs::read_to_string(fake.home().join("koboshi-alerts.txt"))
            .is_ok_and(|t| t.contains("every way of recovery has failed"))
    });
    // Only when the agent itself starts the gateway was the port held until that moment.
    mend_runtime(&fake, &runtime);
    let mut held = 0;
    wait_for(&fake, "the gateway", || {
        held += u32::from(answers_503(&fake));
        fake.gateway().is_some()
    });
    assert!(held > 0, "the port was not held until the climb");
    wait_for(&fake, "the verdict", || fake.json(&["status"]).0["verdict"] == "serving");
    let log = std::fs::read_to_string(fake.path("agent.log")).unwrap();
    assert!(!log.contains("Address already in use"), "{log}");
}

#[test]
fn a_stranger_keeps_the_port() {
    let fake = Fake::new();
    fake.configure(&Receiver::new(true).hook("hook"));
    fake.start_gateway();
    let _agent = Agent::start(&fake);
    let _runtime = break_runtime(&fake);
    fake.kill_gateway();
    let stranger = TcpListener::bind(("127.0.0.1", fake.port)).unwrap();
    wait_for(&fake, "the emergency", || fake.json(&["status"]).1 == 4);
    wait_for(&fake, "the refusal", || {
        std::fs::read_to_string(fake.path("agent.log")).unwrap().contains("is not answered")
    });
    drop(stranger);
}

#[test]
fn the_nodes_own_account_is_kept_sealed_and_tells_when_nothing_else_does() {
    let fake = Fake::new();
    let telegram = Receiver::new(true);
    let config = fake.state().join("openclaw.json");
    let mut value: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    value["channels"] = json!({ "telegram": { "botToken": "${BOT}", "allowFrom": ["tg:42"],
        "apiRoot": format!("http://127.0.0.1:{}", telegram.port) } });
    std::fs::write(&config, value.to_string()).unwrap();
    std::fs::write(fake.state().join(".env"), "BOT=123:hushhush\n").unwrap();
    fake.configure("");
    let before = fake.koboshi(&["status"]);
    assert!(before.out.starts_with("Nobody will be told of an emergency:"), "{}", before.out);
    fake.start_gateway();
    let _agent = Agent::start(&fake);
    wait_for(&fake, "the sealed contacts", || fake.koboshi_state().join("contacts").is_file());
    let said = fake.koboshi(&["status"]);
    assert!(said.out.starts_with("Nobody will be told of an emergency until"), "{}", said.out);
    said.says("node-telegram-1");
    let (object, code) = fake.json(&["alert", "test"]);
    assert_eq!((code, &object["reached_somebody"]), (0, &json!(true)), "{object}");
    let said = fake.koboshi(&["status"]);
    assert!(!said.out.contains("Nobody will be told"), "{}", said.out);

    // The node dies with its config; what was kept still tells.
    let _runtime = break_runtime(&fake);
    std::fs::write(&config, "").unwrap();
    fake.kill_gateway();
    wait_for(&fake, "the emergency's message", || {
        telegram.requests().iter().any(|(_, body)| {
            body["text"].as_str().is_some_and(|t| t.contains("every way of recovery has failed"))
        })
    });
    for (line, body) in telegram.requests() {
        assert!(line.starts_with("POST /bot123:hushhush/sendMessage "), "{line}");
        assert_eq!(body["chat_id"], "42");
    }
    // In the files of koboshi and in all that was said the token stands nowhere.
    for (path, (_, bytes)) in fake.picture(&["home", "prefix", "node"]) {
        assert!(!bytes.windows(8).any(|w| w == b"hushhush"), "{}", path.display());
    }
    // Not wanted any more: gone from the list at once.
    fake.configure("");
    let file = std::fs::read_to_string(fake.config()).unwrap();
    std::fs::write(fake.config(), format!("node_channels = \"never\"\n{file}")).unwrap();
    assert!(!fake.koboshi(&["status"]).out.contains("node-telegram"));
}

#[test]
fn the_heartbeat_is_sent_while_the_node_serves_and_only_then() {
    let fake = Fake::new();
    let switch = Receiver::new(true);
    let url = format!("http://127.0.0.1:{}/hush", switch.port);
    let beat = format!("[heartbeat]\nurl = \"{url}\"\nevery_s = 10\n");
    fake.configure(&(beat + &Receiver::new(true).hook("hook")));
    fake.start_gateway();
    let agent = Agent::start(&fake);
    wait_for(&fake, "a beat", || !switch.requests().is_empty());
    assert_eq!(switch.requests()[0].0, "GET /hush HTTP/1.1");
    let _runtime = break_runtime(&fake);
    fake.kill_gateway();
    wait_for(&fake, "the emergency", || fake.json(&["status"]).1 == 4);
    let beats = switch.requests().len();
    std::thread::sleep(Duration::from_secs(12));
    assert_eq!(switch.requests().len(), beats, "it beat for a node that is down");
    drop(agent);
    let log = std::fs::read_to_string(fake.path("agent.log")).unwrap();
    assert!(log.contains("hears us") && !log.contains("/hush"), "{log}");
}

#[test]
fn the_language_of_the_configuration_is_that_of_the_messages() {
    let fake = Fake::new();
    let receiver = Receiver::new(true);
    fake.configure(&receiver.hook("hook"));
    let file = std::fs::read_to_string(fake.config()).unwrap();
    std::fs::write(fake.config(), format!("language = \"ja\"\n{file}")).unwrap();
    fake.koboshi(&["alert", "test"]).code(0);
    let (_, body) = receiver.requests().remove(0);
    assert!(body["title"].as_str().unwrap().contains("テスト"), "{body}");
    assert!(body["text"].as_str().unwrap().contains("koboshi alert test"), "{body}");
}

/// A file system that never answers: nobody reads what the kernel asks of it. Gone with this value.
struct Stuck {
    at: std::path::PathBuf,
    _device: std::fs::File,
}

impl Stuck {
    /// `None` where there is none to be had: a machine without FUSE, or a container without the right to mount.
    fn over(at: std::path::PathBuf) -> Option<Stuck> {
        use rustix::mount::{MountFlags, mount};
        use std::os::fd::AsRawFd;
        let device = std::fs::File::options().read(true).write(true).open("/dev/fuse").ok()?;
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let data = std::ffi::CString::new(data).unwrap();
        mount("stuck", &at, "fuse", MountFlags::NOSUID | MountFlags::NODEV, Some(data.as_c_str())).ok()?;
        Some(Stuck { at, _device: device })
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.at, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn a_store_that_hangs_costs_its_own_layer_and_no_other_as_root() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let fake = Fake::new();
    let good = Receiver::new(true);
    fake.configure(&good.hook("good"));
    std::fs::create_dir_all(fake.path("k/koboshi.d")).unwrap();
    std::fs::write(fake.path("k/koboshi.d/drill.toml"), "[ladder]\ndivide_limits_by = 10\n").unwrap();
    fake.koboshi(&["doctor"]).says("every limit of the ladder is divided by 10: a climb ends after 60 s");
    fake.start_gateway();
    fake.koboshi(&["snapshot", "create"]).code(0);
    let agent = Agent::start(&fake);
    let Some(stuck) = Stuck::over(fake.koboshi_state().join("store")) else { return };
    let log = || std::fs::read_to_string(fake.path("agent.log")).unwrap_or_default();

    // Layer 0 needs no store, and does not wait for one.
    fake.kill_gateway();
    wait_for(&fake, "a serving node", || log().contains("recovered by restart"));
    assert!(fake.gateway().is_some());

    // The gateway ends as it starts: layer 0 has its turn and fails, restore is passed, and all comes to its end.
    fake.ails(true);
    fake.kill_gateway();
    let emergency = "incident-2/emergency".to_owned();
    let took = wait_for(&fake, "the emergency's message", || good.keys().contains(&emergency));
    assert!(took < 60_000, "told after {took} ms\n{}", log());
    for line in ["restart: start", "restore: passed, the store does not answer", "(limits divided by 10)"] {
        assert!(log().contains(line), "{line:?} is missing\n{}", log());
    }
    drop(agent);
    drop(stuck);
}
