//! The strongest cheap probe: a WebSocket `connect` with the configured token, answered by `hello-ok`.
//!
//! Some faults show only here (authentication, a dead upgrade path, a wrong version behind a right port). The
//! client is the gateway's own kind for local backends, which needs a shared token or password on loopback and
//! no paired device; it asks for reading only. The token never appears in an error or a `Debug`.

use crate::http::{HttpError, Stream, Tongue};
use host::clock::Deadline;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use tungstenite::protocol::WebSocketConfig;
use tungstenite::{HandshakeError, Message, WebSocket};

/// The protocol version of the tested release.
const PROTOCOL: u64 = 4;
/// `hello-ok` has 30 KB here; a node with many agents and channels has more.
const MESSAGE_LIMIT_BYTES: usize = 8 << 20;
/// Frames looked at before the answer to a request must have come.
const FRAMES_LIMIT: usize = 64;
/// The longest sentence of the gateway that is kept.
const WHY_LIMIT_CHARS: usize = 300;

/// How the gateway is to be told who we are.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// `gateway.auth.token`.
    Token(String),
    /// `gateway.auth.password`.
    Password(String),
    /// `gateway.auth.mode` is `none`.
    Open,
    /// None can be had: the probe is not made. The text says why.
    Unknown(String),
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Token::Token(_) => f.write_str("Token(…)"),
            Token::Password(_) => f.write_str("Password(…)"),
            Token::Open => f.write_str("Open"),
            Token::Unknown(why) => write!(f, "Unknown({why})"),
        }
    }
}

/// What a `hello-ok` said.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Hello {
    /// The version that runs.
    pub version: String,
    /// New at every start of the gateway.
    pub boot_id: String,
    /// Turns, cron runs and writes under way, as the gateway counts them for its own shutdown; `None` when it did
    /// not say.
    pub active_work: Option<u64>,
    /// Bundled and installed plugins that are loaded.
    pub plugins_loaded: Vec<String>,
    /// Plugins that failed or are unavailable.
    pub plugins_failed: Vec<String>,
}

/// How the attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HelloResult {
    /// The gateway is usable.
    Ok(Hello),
    /// The token is not the one the gateway wants.
    TokenRefused,
    /// Refused for another reason.
    Refused {
        /// The gateway's code.
        code: String,
        /// Its words.
        why: String,
    },
    /// It says that it is still starting or already draining.
    NotYet {
        /// Its words.
        why: String,
    },
    /// Nobody listens.
    NoListener,
    /// No answer in time.
    TimedOut,
    /// Not a gateway.
    Garbage {
        /// What came.
        why: String,
    },
    /// There is no token to try with.
    NoToken,
    /// We could not ask.
    OurSide {
        /// What the system said.
        why: String,
    },
}

/// Says hello at this address. The token goes to whoever listens there: the caller has made sure who that is.
#[must_use]
pub fn hello_at(addr: SocketAddr, tongue: Tongue, token: &Token, deadline: Deadline) -> HelloResult {
    let auth = match token {
        Token::Token(t) => Some(json!({ "token": t })),
        Token::Password(p) => Some(json!({ "password": p })),
        Token::Open => None,
        Token::Unknown(_) => return HelloResult::NoToken,
    };
    converse(addr, tongue, auth, deadline).unwrap_or_else(|e| e)
}

type Socket = WebSocket<Stream>;

fn converse(
    addr: SocketAddr,
    tongue: Tongue,
    auth: Option<Value>,
    deadline: Deadline,
) -> Result<HelloResult, HelloResult> {
    let stream = Stream::connect(addr, tongue, deadline).map_err(|e| match e {
        HttpError::Refused => HelloResult::NoListener,
        HttpError::TimedOut { .. } => HelloResult::TimedOut,
        HttpError::Garbage { why } => HelloResult::Garbage { why },
        HttpError::OurSide { why } => HelloResult::OurSide { why },
    })?;
    let config = WebSocketConfig::default()
        .max_message_size(Some(MESSAGE_LIMIT_BYTES))
        .max_frame_size(Some(MESSAGE_LIMIT_BYTES));
    // Also within TLS: the address only becomes the Host header.
    let request = format!("ws://{addr}/");
    let (mut socket, _) =
        tungstenite::client::client_with_config(request, stream, Some(config)).map_err(|e| match e {
            HandshakeError::Failure(e) => of_error(&e),
            HandshakeError::Interrupted(_) => HelloResult::TimedOut,
        })?;
    let has_auth = auth.is_some();
    let result = greet(&mut socket, auth);
    if let Ok(HelloResult::Ok(_)) = result {
        let _ = socket.close(None);
        let _ = socket.flush();
    }
    match result {
        // An open gateway that still wants a device: nothing we have can prove or disprove it.
        Ok(HelloResult::Refused { code, .. }) if !has_auth && is_identity(&code) => Ok(HelloResult::NoToken),
        other => other,
    }
}

fn is_identity(code: &str) -> bool {
    matches!(code, "DEVICE_IDENTITY_REQUIRED" | "NOT_PAIRED" | "AUTH_REQUIRED" | "AUTH_TOKEN_MISSING")
}

fn greet(socket: &mut Socket, auth: Option<Value>) -> Result<HelloResult, HelloResult> {
    wait_for(socket, |m| m.get("event").and_then(Value::as_str) == Some("connect.challenge"))?;
    let mut params = json!({
        "minProtocol": PROTOCOL, "maxProtocol": PROTOCOL,
        "client": { "id": "gateway-client", "version": env!("CARGO_PKG_VERSION"), "platform": "linux", "mode": "backend" },
        "role": "operator", "scopes": ["operator.read"], "caps": [], "commands": [], "permissions": {},
    });
    if let (Some(auth), Some(map)) = (auth, params.as_object_mut()) {
        map.insert("auth".into(), auth);
    }
    let answer = request(socket, "hello", "connect", &params)?;
    let Some(payload) = accepted(&answer) else { return Ok(refusal(&answer)) };
    if payload.get("type").and_then(Value::as_str) != Some("hello-ok") {
        return Ok(HelloResult::Garbage { why: "connect was accepted without hello-ok".into() });
    }
    let text = |v: Option<&Value>| v.and_then(Value::as_str).unwrap_or_default().to_owned();
    let server = payload.get("server");
    let mut hello = Hello {
        version: text(server.and_then(|s| s.get("version"))),
        boot_id: text(server.and_then(|s| s.get("bootId"))),
        ..Hello::default()
    };
    if let Some(plugins) = payload.pointer("/snapshot/health/plugins") {
        hello.plugins_loaded = names(plugins.get("loaded"));
        hello.plugins_failed = names(plugins.get("errors"));
        hello.plugins_failed.extend(names(plugins.get("unavailable")));
    }
    // What is under way decides whether a stop must drain; a gateway that will not say has still said hello.
    if let Ok(status) = request(socket, "status", "status", &json!({})) {
        hello.active_work = accepted(&status).and_then(active_work);
    }
    Ok(HelloResult::Ok(hello))
}

fn active_work(status: &Value) -> Option<u64> {
    let counted = status.pointer("/shutdownBudget/activeWork")?.as_object()?;
    let work: u64 = counted.values().filter_map(Value::as_u64).fold(0, u64::saturating_add);
    let tasks = status.pointer("/tasks/active").and_then(Value::as_u64).unwrap_or(0);
    Some(work.saturating_add(tasks))
}

fn names(list: Option<&Value>) -> Vec<String> {
    /// Names kept of one list.
    const NAMES_LIMIT: usize = 256;
    let name = |v: &Value| {
        let s = v.as_str().or_else(|| v.get("id").and_then(Value::as_str));
        s.or_else(|| v.get("pluginId").and_then(Value::as_str))
            .map(|s| s.chars().take(80).collect::<String>())
    };
    list.and_then(Value::as_array).into_iter().flatten().take(NAMES_LIMIT).filter_map(name).collect()
}

fn accepted(answer: &Value) -> Option<&Value> {
    (answer.get("ok").and_then(Value::as_bool) == Some(true)).then(|| answer.get("payload")).flatten()
}

fn refusal(answer: &Value) -> HelloResult {
    let text = |pointer: &str| answer.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let outer = text("/error/code");
    let inner = text("/error/details/code");
    let reason = text("/error/details/reason");
    let why = clip(text("/error/message"));
    if matches!(inner, "AUTH_TOKEN_MISMATCH" | "AUTH_PASSWORD_MISMATCH") {
        return HelloResult::TokenRefused;
    }
    if outer == "UNAVAILABLE" || reason == "startup-sidecars" {
        return HelloResult::NotYet { why };
    }
    HelloResult::Refused { code: clip(if inner.is_empty() { outer } else { inner }), why }
}

fn clip(s: &str) -> String {
    s.chars().filter(|c| !c.is_control()).take(WHY_LIMIT_CHARS).collect()
}

fn request(socket: &mut Socket, id: &str, method: &str, params: &Value) -> Result<Value, HelloResult> {
    let frame = json!({ "type": "req", "id": id, "method": method, "params": params }).to_string();
    socket.send(Message::text(frame)).map_err(|e| of_error(&e))?;
    wait_for(socket, |m| m.get("id").and_then(Value::as_str) == Some(id))
}

fn wait_for(socket: &mut Socket, wanted: impl Fn(&Value) -> bool) -> Result<Value, HelloResult> {
    for _ in 0..FRAMES_LIMIT {
        match socket.read().map_err(|e| of_error(&e))? {
            Message::Text(text) => {
                let parsed: Value = serde_json::from_str(text.as_str())
                    .map_err(|_| HelloResult::Garbage { why: "a frame that is not JSON".into() })?;
                if wanted(&parsed) {
                    return Ok(parsed);
                }
            }
            Message::Close(frame) => {
                let why = frame.map(|f| f.reason.as_str().to_owned()).unwrap_or_default();
                return Err(HelloResult::Garbage { why: format!("closed before an answer: {}", clip(&why)) });
            }
            Message::Binary(_) => return Err(HelloResult::Garbage { why: "a binary frame".into() }),
            Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => {}
        }
    }
    Err(HelloResult::Garbage { why: "many frames, no answer".into() })
}

fn of_error(e: &tungstenite::Error) -> HelloResult {
    if let tungstenite::Error::Io(io) = e
        && io.kind() == io::ErrorKind::TimedOut
    {
        return HelloResult::TimedOut;
    }
    if let tungstenite::Error::Http(answer) = e {
        let status = answer.status().as_u16();
        return HelloResult::Garbage { why: format!("answered the upgrade with HTTP {status}") };
    }
    HelloResult::Garbage { why: clip(&e.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener};
    use std::thread::JoinHandle;
    use std::time::Duration;

    const HELLO: &str = include_str!("../tests/recorded/hello-ok.json");
    const STATUS: &str = include_str!("../tests/recorded/status.json");
    const MISMATCH: &str = include_str!("../tests/recorded/token-mismatch.json");
    const CHALLENGE: &str = include_str!("../tests/recorded/challenge.json");

    fn hello(port: u16, token: &Token, deadline: Deadline) -> HelloResult {
        hello_at(SocketAddr::from((Ipv4Addr::LOCALHOST, port)), Tongue::Plain, token, deadline)
    }

    /// A gateway of recorded frames: the challenge, then one frame for each request.
    fn gateway(answers: Vec<String>) -> (u16, JoinHandle<Vec<Value>>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let port = listener.local_addr().expect("addr").port();
        let handle = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("accept");
            let mut ws = tungstenite::accept(stream).expect("upgrade");
            let mut asked = Vec::new();
            ws.send(Message::text(CHALLENGE)).expect("challenge");
            for answer in answers {
                let Ok(Message::Text(frame)) = ws.read() else { break };
                asked.push(serde_json::from_str(frame.as_str()).expect("a request"));
                if ws.send(Message::text(answer)).is_err() {
                    break;
                }
            }
            // Open until the client goes.
            while ws.read().is_ok() {}
            asked
        });
        (port, handle)
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(5))
    }

    #[test]
    fn the_recorded_gateway_is_understood() {
        let (port, handle) = gateway(vec![HELLO.into(), STATUS.into()]);
        let got = hello(port, &Token::Token("t0ken".into()), soon());
        let asked = handle.join().expect("server");
        let HelloResult::Ok(h) = got else { panic!("{got:?}") };
        assert_eq!(h.version, "2026.9.6");
        assert_eq!(h.boot_id, "147495ca-08e1-48cb-9640-b3b434d9c827");
        assert_eq!(h.active_work, Some(0));
        assert!(h.plugins_loaded.iter().any(|p| p == "memory-core"), "{:?}", h.plugins_loaded);
        let params = &asked[0]["params"];
        assert_eq!(params["client"]["id"], "gateway-client");
        assert_eq!(params["client"]["mode"], "backend");
        assert_eq!(params["auth"]["token"], "t0ken");
        assert_eq!(params["scopes"], json!(["operator.read"]));
    }

    #[test]
    fn a_wrong_token_is_told_apart() {
        let (port, handle) = gateway(vec![MISMATCH.into()]);
        assert_eq!(hello(port, &Token::Token("wrong".into()), soon()), HelloResult::TokenRefused);
        drop(handle);
    }

    #[test]
    fn refusals_are_read() {
        let case = |code: &str, details: Value| {
            refusal(&json!({"ok":false,"error":{"code":code,"message":"m","details":details}}))
        };
        assert_eq!(
            case("UNAVAILABLE", json!({"reason":"startup-sidecars"})),
            HelloResult::NotYet { why: "m".into() }
        );
        assert_eq!(
            case("INVALID_REQUEST", json!({"code":"AUTH_PASSWORD_MISMATCH"})),
            HelloResult::TokenRefused
        );
        assert_eq!(
            case("NOT_PAIRED", json!({"code":"DEVICE_IDENTITY_REQUIRED"})),
            HelloResult::Refused { code: "DEVICE_IDENTITY_REQUIRED".into(), why: "m".into() }
        );
    }

    #[test]
    fn an_open_gateway_that_wants_a_device_proves_nothing() {
        let refused = r#"{"type":"res","id":"hello","ok":false,"error":{"code":"NOT_PAIRED","message":"device identity required","details":{"code":"DEVICE_IDENTITY_REQUIRED"}}}"#;
        let (port, handle) = gateway(vec![refused.into()]);
        assert_eq!(hello(port, &Token::Open, soon()), HelloResult::NoToken);
        drop(handle);
    }

    #[test]
    fn strangers_and_silence_have_their_names() {
        let (port, handle) =
            crate::http::tests::serve(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", true);
        assert!(matches!(hello(port, &Token::Open, soon()), HelloResult::Garbage { .. }));
        handle.join().expect("server");
        let (port, handle) = crate::http::tests::serve(b"", false);
        let short = Deadline::after(Duration::from_millis(80));
        assert_eq!(hello(port, &Token::Open, short), HelloResult::TimedOut);
        handle.join().expect("server");
        // Below the range that is handed out: no parallel test can come to listen on it.
        let free = 1;
        assert_eq!(hello(free, &Token::Open, soon()), HelloResult::NoListener);
        assert_eq!(hello(free, &Token::Unknown("exec".into()), soon()), HelloResult::NoToken);
    }

    #[test]
    fn a_token_does_not_show() {
        assert!(!format!("{:?}", Token::Token("s3cret".into())).contains("s3cret"));
        assert!(!format!("{:?}", Token::Password("s3cret".into())).contains("s3cret"));
    }
}
