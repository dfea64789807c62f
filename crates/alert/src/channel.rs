//! What an owner writes under `[[alert]]`, and the channels that exist without being written.
//!
//! Addresses and tokens are checked when the configuration is read, so that a channel which can never work is a
//! configuration error at install and not a surprise in an emergency. A token goes out only by HTTPS, or to the
//! loopback; `plain_http = true` is the owner's word that the network between is theirs.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::path::{Path, PathBuf};

/// More channels than this are refused: each is served by its own thread while messages go out.
pub const CHANNEL_LIMIT: usize = 8;
/// The longest address or token accepted; the longest real ones have a few hundred bytes.
const SECRET_LIMIT_BYTES: usize = 4_096;
/// The longest channel name.
const NAME_LIMIT_BYTES: usize = 64;
/// The file in the owner's home that tells what nobody could be told otherwise.
const HOME_FILE: &str = "koboshi-alerts.txt";
/// Where journald takes entries in its own protocol.
const JOURNAL_SOCKET: &str = "/run/systemd/journal/socket";
/// The same beside koboshi's own state, where it exists even when the home does not.
const STATE_FILE: &str = "alerts.txt";

/// A value that is sent but never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a value.
    #[must_use]
    pub fn new(value: impl Into<String>) -> Secret {
        Secret(value.into())
    }

    /// The value, for sending only.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// In clear: a configuration that is read must be writable again, into its own owner-only file and nowhere else.
impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Secret, D::Error> {
        let value = String::deserialize(d)?;
        // What goes into a header or a path must not be able to end it.
        let sound = !value.is_empty()
            && value.len() <= SECRET_LIMIT_BYTES
            && value.chars().all(|c| c.is_ascii_graphic());
        if sound {
            Ok(Secret(value))
        } else {
            // The value itself stays out of the error, which is printed.
            Err(serde::de::Error::custom(format!(
                "expected 1 to {SECRET_LIMIT_BYTES} printable ASCII characters without spaces"
            )))
        }
    }
}

/// An `http://` or `https://` address. Shown only as scheme and host: the path of a webhook is its password.
#[derive(Clone, PartialEq, Eq)]
pub struct Address(String);

impl Address {
    /// Checks an address.
    pub fn parse(text: &str) -> Result<Address, &'static str> {
        if text.len() > SECRET_LIMIT_BYTES || !text.chars().all(|c| c.is_ascii_graphic()) {
            return Err("an address is printable ASCII without spaces");
        }
        let rest = text
            .strip_prefix("https://")
            .or_else(|| text.strip_prefix("http://"))
            .ok_or("an address starts with https:// (or http:// on the loopback)")?;
        let authority = rest.split(['/', '?', '#']).next().unwrap_or("");
        if authority.is_empty() || authority.starts_with(':') {
            return Err("an address names a host");
        }
        if authority.contains('@') {
            return Err("an address holds no user or password: use `token`");
        }
        Ok(Address(text.to_owned()))
    }

    /// The whole address, for sending only.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    fn is_tls(&self) -> bool {
        self.0.starts_with("https://")
    }

    fn authority(&self) -> &str {
        let rest = self.0.split_once("://").map_or("", |(_, r)| r);
        rest.split(['/', '?', '#']).next().unwrap_or("")
    }

    fn is_loopback(&self) -> bool {
        let authority = self.authority();
        let host = match authority.strip_prefix('[') {
            Some(v6) => v6.split(']').next().unwrap_or(""),
            None => authority.split(':').next().unwrap_or(""),
        };
        host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.is_tls() { "https" } else { "http" }, self.authority())
    }
}

/// In clear, as [`Secret`].
impl Serialize for Address {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Address, D::Error> {
        Address::parse(&String::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}

/// One way to reach somebody; one `[[alert]]` of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Channel {
    /// A JSON object by POST to any address; accepted by any 2xx.
    Webhook(Webhook),
    /// An ntfy topic, at ntfy.sh or one's own server.
    Ntfy(Ntfy),
    /// A Telegram bot, or anything that speaks the same `sendMessage`.
    Telegram(Telegram),
    /// A Discord webhook, or a bot that writes to a channel or a user.
    Discord(Discord),
    /// A Slack webhook, or a bot that writes to a channel or a user.
    Slack(Slack),
    /// Lines at the end of a local file.
    File(LocalFile),
    /// The host's journal.
    Journald(Journald),
    /// The terminals of whoever is logged in; emergencies only.
    Wall(Wall),
}

/// A JSON object by POST.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Webhook {
    /// Name shown in status; default `webhook`.
    pub name: Option<String>,
    /// Where to post.
    pub url: Address,
    /// Sent as `Authorization: Bearer`.
    pub token: Option<Secret>,
    /// Allow a token over plain HTTP to another machine.
    #[serde(default)]
    pub plain_http: bool,
}

/// An ntfy topic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ntfy {
    /// Name shown in status; default `ntfy`.
    pub name: Option<String>,
    /// The server, without the topic.
    #[serde(default = "ntfy_server")]
    pub url: Address,
    /// The topic: whoever knows it can read it.
    pub topic: Secret,
    /// An access token.
    pub token: Option<Secret>,
    /// Allow topic and token over plain HTTP to another machine.
    #[serde(default)]
    pub plain_http: bool,
}

/// A Telegram bot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Telegram {
    /// Name shown in status; default `telegram`.
    pub name: Option<String>,
    /// The API server.
    #[serde(default = "telegram_server", alias = "base_url")]
    pub api_root: Address,
    /// The bot's token.
    pub token: Secret,
    /// Numeric id of the chat, or `@channel`.
    pub chat_id: String,
    /// Allow the token over plain HTTP to another machine.
    #[serde(default)]
    pub plain_http: bool,
}

/// A Discord webhook by its address, or a bot by its token and whom it writes to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Discord {
    /// Name shown in status; default `discord`.
    pub name: Option<String>,
    /// The webhook's address.
    pub url: Option<Address>,
    /// The bot's token.
    pub token: Option<Secret>,
    /// Numeric id of the channel the bot writes to.
    pub channel_id: Option<String>,
    /// Numeric id of the user the bot writes to.
    pub user_id: Option<String>,
    /// The API server of the bot.
    #[serde(default = "discord_server")]
    pub api_root: Address,
    /// Allow address and token over plain HTTP to another machine.
    #[serde(default)]
    pub plain_http: bool,
}

/// A Slack webhook by its address, or a bot by its token and where it writes to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slack {
    /// Name shown in status; default `slack`.
    pub name: Option<String>,
    /// The webhook's address.
    pub url: Option<Address>,
    /// The bot's token.
    pub token: Option<Secret>,
    /// Id of the channel or user the bot writes to.
    pub channel: Option<String>,
    /// The API server of the bot.
    #[serde(default = "slack_server")]
    pub api_root: Address,
    /// Allow address and token over plain HTTP to another machine.
    #[serde(default)]
    pub plain_http: bool,
}

/// The host's journal, by its native socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Journald {
    /// Name shown in status; default `journald`.
    pub name: Option<String>,
    /// The socket.
    #[serde(default = "journal_socket")]
    pub socket: PathBuf,
}

/// The terminals of whoever is logged in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wall {
    /// Name shown in status; default `wall`.
    pub name: Option<String>,
}

/// Lines in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalFile {
    /// Name shown in status; default `file`.
    pub name: Option<String>,
    /// The file; its directory must exist.
    pub path: PathBuf,
}

fn ntfy_server() -> Address {
    Address("https://ntfy.sh".to_owned())
}

fn telegram_server() -> Address {
    Address("https://api.telegram.org".to_owned())
}

fn discord_server() -> Address {
    Address("https://discord.com/api/v10".to_owned())
}

fn slack_server() -> Address {
    Address("https://slack.com/api".to_owned())
}

fn journal_socket() -> PathBuf {
    PathBuf::from(JOURNAL_SOCKET)
}

impl Channel {
    /// The name shown in status and used to remember which channel accepted what.
    #[must_use]
    pub fn name(&self) -> &str {
        let (name, default) = match self {
            Channel::Webhook(c) => (&c.name, "webhook"),
            Channel::Ntfy(c) => (&c.name, "ntfy"),
            Channel::Telegram(c) => (&c.name, "telegram"),
            Channel::Discord(c) => (&c.name, "discord"),
            Channel::Slack(c) => (&c.name, "slack"),
            Channel::File(c) => (&c.name, "file"),
            Channel::Journald(c) => (&c.name, "journald"),
            Channel::Wall(c) => (&c.name, "wall"),
        };
        name.as_deref().unwrap_or(default)
    }

    /// Whether it stays on this machine: it is no proof that anybody has been told.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Channel::File(_) | Channel::Journald(_) | Channel::Wall(_) => true,
            Channel::Webhook(_)
            | Channel::Ntfy(_)
            | Channel::Telegram(_)
            | Channel::Discord(_)
            | Channel::Slack(_) => false,
        }
    }

    /// Where it leads, without its secrets, for status and errors.
    #[must_use]
    pub fn target(&self) -> String {
        match self {
            Channel::Webhook(c) => c.url.to_string(),
            Channel::Ntfy(c) => c.url.to_string(),
            Channel::Telegram(c) => c.api_root.to_string(),
            Channel::Discord(c) => c.url.as_ref().unwrap_or(&c.api_root).to_string(),
            Channel::Slack(c) => c.url.as_ref().unwrap_or(&c.api_root).to_string(),
            Channel::File(c) => c.path.display().to_string(),
            Channel::Journald(c) => c.socket.display().to_string(),
            Channel::Wall(_) => "whoever is logged in".to_owned(),
        }
    }

    /// Tells this configuration from another of the same name, without giving anything away.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut h = blake3::Hasher::new_derive_key("koboshi alert channel");
        let address = |a: &Option<Address>| a.as_ref().map_or(Vec::new(), |a| a.0.as_bytes().to_vec());
        let text = |t: &Option<String>| t.as_ref().map_or(Vec::new(), |t| t.as_bytes().to_vec());
        let secret = |s: &Option<Secret>| s.as_ref().map_or(Vec::new(), |s| s.0.as_bytes().to_vec());
        let parts: Vec<Vec<u8>> = match self {
            Channel::Webhook(c) => vec![b"webhook".to_vec(), c.url.0.clone().into(), secret(&c.token)],
            Channel::Ntfy(c) => {
                vec![b"ntfy".to_vec(), c.url.0.clone().into(), c.topic.0.clone().into(), secret(&c.token)]
            }
            Channel::Telegram(c) => vec![
                b"telegram".to_vec(),
                c.api_root.0.clone().into(),
                c.token.0.clone().into(),
                c.chat_id.clone().into(),
            ],
            Channel::Discord(c) => vec![
                b"discord".to_vec(),
                address(&c.url),
                secret(&c.token),
                text(&c.channel_id),
                text(&c.user_id),
                c.api_root.0.clone().into(),
            ],
            Channel::Slack(c) => vec![
                b"slack".to_vec(),
                address(&c.url),
                secret(&c.token),
                text(&c.channel),
                c.api_root.0.clone().into(),
            ],
            Channel::File(c) => vec![b"file".to_vec(), c.path.as_os_str().as_encoded_bytes().to_vec()],
            Channel::Journald(c) => {
                vec![b"journald".to_vec(), c.socket.as_os_str().as_encoded_bytes().to_vec()]
            }
            Channel::Wall(_) => vec![b"wall".to_vec()],
        };
        for part in parts {
            h.update(&(part.len() as u64).to_le_bytes());
            h.update(&part);
        }
        h.finalize().to_hex()[..16].to_owned()
    }

    /// What a single channel's settings cannot say about themselves while they are parsed.
    fn check(&self) -> Result<(), String> {
        let name = self.name();
        if name.is_empty() || name.len() > NAME_LIMIT_BYTES || name.chars().any(char::is_control) {
            return Err(format!("a channel's name has 1 to {NAME_LIMIT_BYTES} printable characters"));
        }
        let (address, exposed) = match self {
            Channel::Webhook(c) => (&c.url, !c.plain_http && c.token.is_some()),
            Channel::Ntfy(c) => (&c.url, !c.plain_http),
            Channel::Telegram(c) => {
                let digits = c.chat_id.strip_prefix('-').unwrap_or(&c.chat_id);
                let numeric = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
                if !numeric && !c.chat_id.starts_with('@') {
                    return Err(format!("channel `{name}`: chat_id is a number or an @channel"));
                }
                if c.token.0.contains(['/', '?', '#', '%']) {
                    return Err(format!("channel `{name}`: this is not a bot token"));
                }
                (&c.api_root, !c.plain_http)
            }
            Channel::Discord(c) => {
                let numeric = |id: &String| !id.is_empty() && id.bytes().all(|b| b.is_ascii_digit());
                let ids = [&c.channel_id, &c.user_id];
                match (&c.url, &c.token) {
                    (Some(url), None) if ids.iter().all(|id| id.is_none()) => (url, !c.plain_http),
                    (None, Some(_))
                        if ids.iter().filter(|id| id.is_some()).count() == 1
                            && ids.into_iter().flatten().all(numeric) =>
                    {
                        (&c.api_root, !c.plain_http)
                    }
                    _ => {
                        return Err(format!(
                            "channel `{name}`: give either url, or token with channel_id or user_id (a number)"
                        ));
                    }
                }
            }
            Channel::Slack(c) => {
                let sound = |id: &str| !id.is_empty() && id.bytes().all(|b| b.is_ascii_graphic());
                match (&c.url, &c.token, &c.channel) {
                    (Some(url), None, None) => (url, !c.plain_http),
                    (None, Some(_), Some(to)) if sound(to) => (&c.api_root, !c.plain_http),
                    _ => {
                        return Err(format!("channel `{name}`: give either url, or token with channel"));
                    }
                }
            }
            Channel::File(LocalFile { path, .. }) | Channel::Journald(Journald { socket: path, .. }) => {
                return if path.is_absolute() {
                    Ok(())
                } else {
                    Err(format!("channel `{name}`: path must be absolute"))
                };
            }
            Channel::Wall(_) => return Ok(()),
        };
        if exposed && !address.is_tls() && !address.is_loopback() {
            return Err(format!(
                "channel `{name}`: its secret would cross the network in clear; use https:// or set plain_http = true"
            ));
        }
        Ok(())
    }
}

/// Checks all channels of a configuration together: each by itself, their number, their names.
pub fn check(channels: &[Channel]) -> Result<(), String> {
    if channels.len() > CHANNEL_LIMIT {
        return Err(format!("at most {CHANNEL_LIMIT} [[alert]] channels, found {}", channels.len()));
    }
    for (i, c) in channels.iter().enumerate() {
        c.check()?;
        if channels[..i].iter().any(|other| other.name() == c.name()) {
            return Err(format!(
                "two [[alert]] channels are called `{}`: give one of them a `name`",
                c.name()
            ));
        }
    }
    Ok(())
}

/// The channels that need no configuration: a file in koboshi's state directory, one in the owner's home, and the
/// host's journal where there is one. `alone`: no channel leads off this machine, so that an emergency is written on
/// every terminal as well.
#[must_use]
pub fn local_channels(state_dir: &Path, home: Option<&Path>, alone: bool) -> Vec<Channel> {
    let file = |name: &str, path| Channel::File(LocalFile { name: Some(name.to_owned()), path });
    let mut out = vec![file("state-file", state_dir.join(STATE_FILE))];
    out.extend(home.map(|h| file("home-file", h.join(HOME_FILE))));
    let socket = journal_socket();
    if socket.exists() {
        out.push(Channel::Journald(Journald { name: None, socket }));
    }
    if alone {
        out.push(Channel::Wall(Wall { name: None }));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Config {
        alert: Vec<Channel>,
    }

    fn read(text: &str) -> Result<Vec<Channel>, String> {
        toml::from_str::<Config>(text).map(|c| c.alert).map_err(|e| e.message().to_owned())
    }

    #[test]
    fn every_kind_reads_from_the_configuration() {
        let all = read(
            r#"
            [[alert]]
            kind = "webhook"
            url = "https://hooks.example/T0/secretpath"
            [[alert]]
            kind = "ntfy"
            topic = "node-secrettopic"
            token = "tk_secrettoken"
            [[alert]]
            kind = "telegram"
            name = "phone"
            token = "123:secretbot"
            chat_id = "-100200"
            [[alert]]
            kind = "discord"
            url = "https://discord.example/api/webhooks/1/secretpath"
            [[alert]]
            kind = "discord"
            name = "bot"
            token = "secretbot"
            user_id = "42"
            [[alert]]
            kind = "slack"
            token = "xoxb-secret"
            channel = "C1"
            [[alert]]
            kind = "file"
            path = "/var/log/koboshi.txt"
            [[alert]]
            kind = "journald"
            "#,
        )
        .unwrap();
        check(&all).unwrap();
        for channel in &all {
            assert_eq!(&toml::from_str::<Channel>(&toml::to_string(channel).unwrap()).unwrap(), channel);
        }
        assert_eq!(
            all.iter().map(Channel::name).collect::<Vec<_>>(),
            ["webhook", "ntfy", "phone", "discord", "bot", "slack", "file", "journald"]
        );
        assert_eq!(
            all.iter().map(Channel::is_local).collect::<Vec<_>>(),
            [false, false, false, false, false, false, true, true]
        );
        let mut marks: Vec<String> = all.iter().map(Channel::fingerprint).collect();
        marks.sort();
        marks.dedup();
        assert_eq!(marks.len(), all.len());
        let shown = format!("{all:?} {}", all.iter().map(Channel::target).collect::<String>());
        assert!(!shown.contains("secret") || !shown.replace("(secret)", "").contains("secret"), "{shown}");
    }

    #[test]
    fn unknown_keys_and_kinds_are_errors() {
        for text in [
            "[[alert]]\nkind = \"webhook\"\nurl = \"https://h/\"\ntokn = \"x\"",
            "[[alert]]\nkind = \"pager\"\nurl = \"https://h/\"",
            "[[alert]]\nurl = \"https://h/\"",
            "[[alert]]\nkind = \"telegram\"\nchat_id = \"1\"",
            "[[alert]]\nkind = \"ntfy\"\ntopic = \"\"",
            "[[alert]]\nkind = \"webhook\"\nurl = \"https://h/\"\ntoken = \"two\\r\\nlines\"",
            "[[alert]]\nkind = \"webhook\"\nurl = \"ftp://h/\"",
            "[[alert]]\nkind = \"webhook\"\nurl = \"https:///x\"",
            "[[alert]]\nkind = \"webhook\"\nurl = \"https://u:p@h/\"",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_error_about_a_secret_does_not_repeat_it() {
        let e =
            read("[[alert]]\nkind = \"webhook\"\nurl = \"https://h/\"\ntoken = \"hush hush\"").unwrap_err();
        assert!(!e.contains("hush"), "{e}");
        let e = read("[[alert]]\nkind = \"webhook\"\nurl = \"https://u:hush@h/\"").unwrap_err();
        assert!(!e.contains("hush"), "{e}");
    }

    #[test]
    fn secrets_do_not_cross_a_network_in_clear() {
        let at = |url: &str, more: &str| {
            check(
                &read(&format!("[[alert]]\nkind = \"ntfy\"\ntopic = \"t\"\nurl = \"{url}\"\n{more}"))
                    .unwrap(),
            )
        };
        assert!(at("http://ntfy.example", "").unwrap_err().contains("in clear"));
        assert!(at("http://127.0.0.1.example", "").is_err());
        at("http://ntfy.example", "plain_http = true").unwrap();
        at("http://127.0.0.1:8080", "").unwrap();
        at("http://[::1]:8080", "").unwrap();
        at("http://localhost", "").unwrap();
    }

    #[test]
    fn names_are_unique_and_few() {
        let hook = "[[alert]]\nkind = \"webhook\"\nurl = \"https://h/\"\n";
        assert!(check(&read(&hook.repeat(2)).unwrap()).unwrap_err().contains("two [[alert]]"));
        let many: String = (0..=CHANNEL_LIMIT).map(|i| format!("{hook}name = \"n{i}\"\n")).collect();
        assert!(check(&read(&many).unwrap()).unwrap_err().contains("at most"));
    }

    #[test]
    fn a_fingerprint_follows_every_setting() {
        let hook = |extra: &str| {
            read(&format!("[[alert]]\nkind = \"webhook\"\nurl = \"https://h/\"\n{extra}")).unwrap()
        };
        let plain = hook("")[0].fingerprint();
        assert_eq!(plain, hook("name = \"other\"")[0].fingerprint());
        assert_ne!(plain, hook("token = \"t\"")[0].fingerprint());
    }
}
