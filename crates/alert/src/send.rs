//! One message to one channel, once. Says whether it was accepted, may be accepted later, or will not be accepted
//! until a person changes something. No text of the library's or the receiver's is passed on unread: an error may
//! hold the address, and the address may be the secret.

use crate::channel::{Channel, LocalFile, Ntfy, Secret, Telegram, Webhook};
use crate::text::{Message, Severity};
use host::clock::Deadline;
use host::tls::Client;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use serde_json::{Value, json};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// How much of an answer is read: the largest asked for is a few hundred bytes of JSON.
const ANSWER_LIMIT_BYTES: u64 = 64 << 10;
/// A receiver cannot put us off for longer than this.
const PUT_OFF_LIMIT: Duration = Duration::from_secs(3_600);
/// A local file of alerts is cut to its newest half beyond this.
const FILE_LIMIT_BYTES: u64 = 1 << 20;
/// Version of the webhook's JSON.
const SCHEMA: u32 = 1;

/// What became of one attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Sent {
    /// The receiver has it.
    Accepted,
    /// Not now: no answer, an error on its side, or asked to wait.
    Later {
        /// Why, without secrets.
        why: String,
        /// How long the receiver asked us to wait.
        after: Option<Duration>,
    },
    /// The receiver will refuse it again until somebody changes the settings.
    Refused {
        /// Why, without secrets.
        why: String,
    },
}

/// Sends once.
pub(crate) fn send(
    client: Option<&Client>,
    channel: &Channel,
    message: &Message,
    deadline: Deadline,
) -> Sent {
    match channel {
        Channel::Webhook(c) => remote(client, |http| webhook(http, c, message, deadline)),
        Channel::Ntfy(c) => remote(client, |http| ntfy(http, c, message, deadline)),
        Channel::Telegram(c) => remote(client, |http| telegram(http, c, message, deadline)),
        Channel::File(c) => append(c, message),
    }
}

fn remote(client: Option<&Client>, send: impl FnOnce(&Client) -> Sent) -> Sent {
    match client {
        Some(client) => send(client),
        None => Sent::Later { why: "no HTTPS client could be made on this machine".to_owned(), after: None },
    }
}

fn webhook(http: &Client, c: &Webhook, m: &Message, deadline: Deadline) -> Sent {
    let body = json!({
        "schema": SCHEMA,
        "key": m.key,
        "kind": m.kind.name(),
        "severity": m.kind.severity().name(),
        "node": m.node,
        "host": m.host,
        "incident": m.incident,
        "at": m.at,
        "title": m.title,
        "text": m.text,
    });
    match post(http, c.url.reveal(), c.token.as_ref(), &m.key, &body, deadline) {
        Ok(answer) => answer.judged(),
        Err(sent) => sent,
    }
}

fn ntfy(http: &Client, c: &Ntfy, m: &Message, deadline: Deadline) -> Sent {
    let (priority, tag) = match m.kind.severity() {
        Severity::Info => (3, "white_check_mark"),
        Severity::Warning => (4, "warning"),
        Severity::Critical => (5, "rotating_light"),
    };
    // A server that knows sequence ids shows a repetition as the same notification; others ignore the field.
    let body = json!({
        "topic": c.topic.reveal(),
        "title": m.title,
        "message": format!("{}\nref: {}", m.text, m.key),
        "priority": priority,
        "tags": [tag],
        "sequence_id": blake3::hash(m.key.as_bytes()).to_hex()[..16].to_owned(),
    });
    match post(http, c.url.reveal(), c.token.as_ref(), &m.key, &body, deadline) {
        Ok(answer) => answer.judged(),
        Err(sent) => sent,
    }
}

fn telegram(http: &Client, c: &Telegram, m: &Message, deadline: Deadline) -> Sent {
    let url = format!("{}/bot{}/sendMessage", c.base_url.reveal().trim_end_matches('/'), c.token.reveal());
    let body = json!({
        "chat_id": c.chat_id,
        "text": format!("{}\n\n{}\nref: {}", m.title, m.text, m.key),
        "link_preview_options": { "is_disabled": true },
        "disable_notification": m.kind.severity() == Severity::Info,
    });
    match post(http, &url, None, &m.key, &body, deadline) {
        // A captive portal answers 200 too: only the API's own word counts.
        Ok(answer) if answer.is_success() && answer.json["ok"] != Value::Bool(true) => {
            Sent::Later { why: "answered 200, but not in the API's words".to_owned(), after: None }
        }
        Ok(answer) => {
            let asked = answer.json["parameters"]["retry_after"].as_u64().map(Duration::from_secs);
            match answer.judged() {
                Sent::Later { why, after } => Sent::Later { why, after: asked.map(put_off).or(after) },
                sent @ (Sent::Accepted | Sent::Refused { .. }) => sent,
            }
        }
        Err(sent) => sent,
    }
}

/// An answer, read and bounded.
struct Answer {
    status: u16,
    after: Option<Duration>,
    /// `Null` when the body is no JSON.
    json: Value,
}

impl Answer {
    fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    fn judged(&self) -> Sent {
        let status = self.status;
        match status {
            200..=299 => Sent::Accepted,
            300..=399 => Sent::Refused { why: format!("answered {status}: the address has moved") },
            401 | 403 => Sent::Refused { why: format!("answered {status}: the token is not accepted") },
            404 | 410 => {
                Sent::Refused { why: format!("answered {status}: there is nothing at this address") }
            }
            408 | 425 | 429 => {
                Sent::Later { why: format!("answered {status}: asked to wait"), after: self.after }
            }
            400..=499 => Sent::Refused { why: format!("answered {status}: the request is not accepted") },
            _ => Sent::Later {
                why: format!("answered {status}: trouble on the receiver's side"),
                after: self.after,
            },
        }
    }
}

fn put_off(d: Duration) -> Duration {
    d.min(PUT_OFF_LIMIT)
}

fn post(
    http: &Client,
    url: &str,
    token: Option<&Secret>,
    key: &str,
    body: &Value,
    deadline: Deadline,
) -> Result<Answer, Sent> {
    if deadline.passed() {
        return Err(Sent::Later { why: "no time was left to try".to_owned(), after: None });
    }
    let mut request = http
        .post(url, deadline)
        .map_err(|e| Sent::Refused { why: e.why })?
        .header("Content-Type", "application/json; charset=utf-8")
        // The key may hold anything; a header may not. Its hash is as good for recognising a repetition.
        .header("Idempotency-Key", &blake3::hash(key.as_bytes()).to_hex()[..32]);
    if let Some(token) = token {
        request = request.header("Authorization", format!("Bearer {}", token.reveal()));
    }
    let mut response = request.send(body.to_string()).map_err(|e| failed(&e))?;
    let after = response
        .headers()
        .get("retry-after")
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.trim().parse().ok())
        .map(|s| put_off(Duration::from_secs(s)));
    let status = response.status().as_u16();
    // Status and headers decide; a body that stalls or breaks is only a body without JSON.
    let bytes = response.body_mut().with_config().limit(ANSWER_LIMIT_BYTES).read_to_vec().unwrap_or_default();
    Ok(Answer { status, after, json: serde_json::from_slice(&bytes).unwrap_or(Value::Null) })
}

/// The library's error in our words: its own may quote the address.
#[allow(
    clippy::wildcard_enum_match_arm,
    reason = "another's enum, open by declaration: what is new is unknown"
)]
fn failed(e: &ureq::Error) -> Sent {
    let later = |why: &str| Sent::Later { why: why.to_owned(), after: None };
    match e {
        ureq::Error::Timeout(_) => later("gave no answer in time"),
        ureq::Error::HostNotFound => later("its name cannot be resolved"),
        // What rustls refuses reaches us as unsound data.
        ureq::Error::Io(e) if e.kind() == std::io::ErrorKind::InvalidData => {
            later("no trusted TLS connection could be made")
        }
        ureq::Error::Io(e) => {
            Sent::Later { why: format!("the connection failed ({})", e.kind()), after: None }
        }
        ureq::Error::ConnectionFailed | ureq::Error::ConnectProxyFailed(_) => later("the connection failed"),
        ureq::Error::Rustls(_) | ureq::Error::Tls(_) | ureq::Error::Pem(_) => {
            later("no trusted TLS connection could be made")
        }
        ureq::Error::BadUri(_) | ureq::Error::Http(_) => {
            Sent::Refused { why: "the address or token cannot be used in a request".to_owned() }
        }
        _ => later("the answer could not be understood"),
    }
}

fn append(c: &LocalFile, m: &Message) -> Sent {
    match try_append(c, m) {
        Ok(()) => Sent::Accepted,
        Err(e) => Sent::Later { why: format!("cannot be written ({e})"), after: None },
    }
}

/// Appends, and halves a file that has grown too long. The directory may belong to a user who is hostile to us:
/// it is opened without following links, and only a plain file with one name, in it, is written.
fn try_append(c: &LocalFile, m: &Message) -> std::io::Result<()> {
    let no = |why: &str| std::io::Error::other(why.to_owned());
    let dir = c.path.parent().ok_or_else(|| no("it has no directory"))?;
    let name = c.path.file_name().ok_or_else(|| no("it has no name"))?;
    let dir: OwnedFd = rustix::fs::openat2(
        rustix::fs::CWD,
        dir,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS,
    )?;
    // Without NONBLOCK a planted fifo would hold us here for ever.
    let flags = OFlags::RDWR | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let owner_only = Mode::RUSR | Mode::WUSR;
    let (fd, made) = match rustix::fs::openat(&dir, name, flags, Mode::empty()) {
        Ok(fd) => (fd, false),
        Err(rustix::io::Errno::NOENT) => {
            (rustix::fs::openat(&dir, name, flags | OFlags::CREATE | OFlags::EXCL, owner_only)?, true)
        }
        Err(e) => return Err(e.into()),
    };
    let home = rustix::fs::statat(&dir, "", AtFlags::EMPTY_PATH)?;
    if made && home.st_uid != rustix::process::geteuid().as_raw() {
        let (uid, gid) = (rustix::fs::Uid::from_raw(home.st_uid), rustix::fs::Gid::from_raw(home.st_gid));
        rustix::fs::fchown(&fd, Some(uid), Some(gid))?;
    }
    let stat = rustix::fs::fstat(&fd)?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::RegularFile
        || stat.st_nlink != 1
    {
        return Err(no("it is not a plain file with one name"));
    }
    let mut file = std::fs::File::from(fd);
    let mut fresh = m.lines().into_bytes();
    let length = file.metadata()?.len();
    if length > FILE_LIMIT_BYTES {
        file.seek(SeekFrom::Start(length - FILE_LIMIT_BYTES / 2))?;
        let mut tail = Vec::new();
        (&file).take(FILE_LIMIT_BYTES / 2).read_to_end(&mut tail)?;
        let line_end = tail.iter().position(|b| *b == b'\n').map_or(0, |p| p + 1);
        tail.drain(..line_end);
        tail.append(&mut fresh);
        fresh = tail;
        file.set_len(0)?;
    }
    file.write_all(&fresh)?;
    file.sync_all()
}
