//! One message to one channel, once. Says whether it was accepted, may be accepted later, or will not be accepted
//! until a person changes something. No text of the library's or the receiver's is passed on unread: an error may
//! hold the address, and the address may be the secret.

use crate::channel::{Address, Channel, Discord, LocalFile, Ntfy, Secret, Slack, Telegram, Webhook};
use crate::local;
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
/// Discord takes 2,000 characters.
const DISCORD_LIMIT_CHARS: usize = 1_990;
/// Slack cuts at 4,000 bytes in places; escapes make a text longer.
const SLACK_LIMIT_CHARS: usize = 3_000;
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
        Channel::Discord(c) => remote(client, |http| discord(http, c, message, deadline)),
        Channel::Slack(c) => remote(client, |http| slack(http, c, message, deadline)),
        Channel::File(c) => append(c, message),
        Channel::Journald(c) => local::journald(&c.socket, message),
        Channel::Wall(_) => local::wall(message, deadline),
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
    match post(http, c.url.reveal(), c.token.as_ref().map(Auth::Bearer), &m.key, &body, deadline) {
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
    match post(http, c.url.reveal(), c.token.as_ref().map(Auth::Bearer), &m.key, &body, deadline) {
        Ok(answer) => answer.judged(),
        Err(sent) => sent,
    }
}

fn telegram(http: &Client, c: &Telegram, m: &Message, deadline: Deadline) -> Sent {
    let url = format!("{}/bot{}/sendMessage", c.api_root.reveal().trim_end_matches('/'), c.token.reveal());
    let body = json!({
        "chat_id": c.chat_id,
        "text": format!("{}\n\n{}\nref: {}", m.title, m.text, m.key),
        "link_preview_options": { "is_disabled": true },
        "disable_notification": m.kind.severity() == Severity::Info,
    });
    match post(http, &url, None, &m.key, &body, deadline) {
        Ok(answer) if answer.is_success() && answer.json["ok"] != Value::Bool(true) => not_its_words(),
        Ok(answer) => {
            let asked = answer.json["parameters"]["retry_after"].as_u64().map(Duration::from_secs);
            put_off_at_least(answer.judged(), asked)
        }
        Err(sent) => sent,
    }
}

fn discord(http: &Client, c: &Discord, m: &Message, deadline: Deadline) -> Sent {
    let mut body = json!({
        "content": chat_text(m, DISCORD_LIMIT_CHARS),
        // What a gateway printed must not be able to call everybody.
        "allowed_mentions": { "parse": [] },
    });
    let (url, auth) = match (&c.url, &c.token) {
        (Some(url), _) => (url.reveal().to_owned(), None),
        (None, Some(token)) => {
            let to = match discord_channel(http, c, token, m, deadline) {
                Ok(to) => to,
                Err(sent) => return sent,
            };
            // The server itself then drops a repetition of the last minutes.
            body["nonce"] = json!(blake3::hash(m.key.as_bytes()).to_hex()[..24]);
            body["enforce_nonce"] = json!(true);
            (format!("{}/channels/{to}/messages", root(&c.api_root)), Some(Auth::Bot(token)))
        }
        (None, None) => return Sent::Refused { why: "neither url nor token is set".to_owned() },
    };
    match post(http, &url, auth, &m.key, &body, deadline) {
        Ok(answer) => discord_says(&answer),
        Err(sent) => sent,
    }
}

/// Discord names its wait in the body, in fractions of a second.
fn discord_says(answer: &Answer) -> Sent {
    let asked = answer.json["retry_after"].as_f64().and_then(|s| Duration::try_from_secs_f64(s).ok());
    put_off_at_least(answer.judged(), asked)
}

/// Where the bot writes: its configured channel, or the one between it and a user, which has to be asked for.
fn discord_channel(
    http: &Client,
    c: &Discord,
    token: &Secret,
    m: &Message,
    deadline: Deadline,
) -> Result<String, Sent> {
    let user = match (&c.channel_id, &c.user_id) {
        (Some(channel), _) => return Ok(channel.clone()),
        (None, Some(user)) => user,
        (None, None) => {
            return Err(Sent::Refused { why: "neither channel_id nor user_id is set".to_owned() });
        }
    };
    let url = format!("{}/users/@me/channels", root(&c.api_root));
    let body = json!({ "recipient_id": user });
    let answer = post(http, &url, Some(Auth::Bot(token)), &m.key, &body, deadline)?;
    match discord_says(&answer) {
        Sent::Accepted => match answer.json["id"].as_str() {
            Some(id) if !id.is_empty() && id.bytes().all(|b| b.is_ascii_digit()) => Ok(id.to_owned()),
            Some(_) | None => Err(not_its_words()),
        },
        sent @ (Sent::Later { .. } | Sent::Refused { .. }) => Err(sent),
    }
}

fn slack(http: &Client, c: &Slack, m: &Message, deadline: Deadline) -> Sent {
    // Slack reads <!channel> and the like out of any text in which these three are not escaped.
    let text =
        chat_text(m, SLACK_LIMIT_CHARS).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    match (&c.url, &c.token, &c.channel) {
        (Some(url), _, _) => {
            match post(http, url.reveal(), None, &m.key, &json!({ "text": text }), deadline) {
                Ok(answer) => answer.judged(),
                Err(sent) => sent,
            }
        }
        (None, Some(token), Some(channel)) => {
            let url = format!("{}/chat.postMessage", root(&c.api_root));
            let body = json!({ "channel": channel, "text": text, "mrkdwn": false, "unfurl_links": false });
            match post(http, &url, Some(Auth::Bearer(token)), &m.key, &body, deadline) {
                Ok(answer) if answer.is_success() => slack_says(&answer.json),
                Ok(answer) => answer.judged(),
                Err(sent) => sent,
            }
        }
        (None, _, _) => Sent::Refused { why: "neither url nor token and channel are set".to_owned() },
    }
}

/// Slack answers 200 and says in the body what became of it.
fn slack_says(json: &Value) -> Sent {
    match (json["ok"].as_bool(), json["error"].as_str()) {
        (Some(true), _) => Sent::Accepted,
        (Some(false), Some("ratelimited")) => {
            Sent::Later { why: "answered 200: asked to wait".to_owned(), after: None }
        }
        (Some(false), Some("internal_error" | "fatal_error" | "service_unavailable" | "request_timeout")) => {
            Sent::Later { why: "answered 200: trouble on the receiver's side".to_owned(), after: None }
        }
        (Some(false), Some(error)) => {
            // One of the API's own words, such as invalid_auth or channel_not_found.
            let word: String =
                error.chars().filter(|c| c.is_ascii_lowercase() || *c == '_').take(40).collect();
            Sent::Refused { why: format!("refused it: {word}") }
        }
        (Some(false), None) | (None, _) => not_its_words(),
    }
}

/// A captive portal answers 200 too: only the API's own word counts.
fn not_its_words() -> Sent {
    Sent::Later { why: "answered 200, but not in the API's words".to_owned(), after: None }
}

fn root(api_root: &Address) -> &str {
    api_root.reveal().trim_end_matches('/')
}

/// Title, text and reference, cut in the middle where the receiver takes less: what to do stands at the end.
fn chat_text(m: &Message, limit_chars: usize) -> String {
    /// What stands for the part that was left out.
    const GAP: &str = "\n[…]\n";
    let whole = format!("{}\n\n{}\nref: {}", m.title, m.text, m.key);
    let chars: Vec<char> = whole.chars().collect();
    if chars.len() <= limit_chars {
        return whole;
    }
    let room = limit_chars.saturating_sub(GAP.chars().count());
    let (head, tail) = (room - room / 2, room / 2);
    let first: String = chars.iter().take(head).collect();
    let last: String = chars.iter().skip(chars.len() - tail).collect();
    format!("{first}{GAP}{last}")
}

/// Keeps the longer of two waits.
fn put_off_at_least(sent: Sent, asked: Option<Duration>) -> Sent {
    match sent {
        Sent::Later { why, after } => Sent::Later { why, after: asked.map(put_off).max(after) },
        sent @ (Sent::Accepted | Sent::Refused { .. }) => sent,
    }
}

/// Tells a dead man's switch that all is well. Why not, in one line without the address, on failure.
///
/// # Errors
/// When it did not answer with 2xx in time.
pub fn heartbeat(url: &Address, deadline: Deadline) -> Result<(), String> {
    let http = Client::from_env().map_err(|e| e.to_string())?;
    beat_with(&http, url, deadline)
}

pub(crate) fn beat_with(http: &Client, url: &Address, deadline: Deadline) -> Result<(), String> {
    let request = http.get(url.reveal(), deadline).map_err(|e| e.why)?;
    let status = match request.call() {
        Ok(response) => response.status().as_u16(),
        Err(e) => {
            return Err(match failed(&e) {
                Sent::Later { why, .. } | Sent::Refused { why } => why,
                Sent::Accepted => String::new(),
            });
        }
    };
    if (200..300).contains(&status) { Ok(()) } else { Err(format!("answered {status}")) }
}

/// How a token is presented.
#[derive(Clone, Copy)]
enum Auth<'a> {
    Bearer(&'a Secret),
    Bot(&'a Secret),
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
    auth: Option<Auth<'_>>,
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
    request = match auth {
        Some(Auth::Bearer(token)) => request.header("Authorization", format!("Bearer {}", token.reveal())),
        Some(Auth::Bot(token)) => request
            .header("Authorization", format!("Bot {}", token.reveal()))
            // The one API that asks for a name of this form.
            .header("User-Agent", concat!("DiscordBot (koboshi, ", env!("CARGO_PKG_VERSION"), ")")),
        None => request,
    };
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
