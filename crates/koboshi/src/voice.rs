//! Who is told, and by what: the channels of the configuration, those borrowed from the node's own config while it was
//! well, and what this machine itself has. The one place that joins them, so that a delivery, a test, `status` and
//! `doctor` speak of the same ones.

use crate::cli;
use crate::config::{Config, NodeChannels};
use crate::places::Places;
use crate::print::{Exit, Printer};
use alert::respond::{self, End, Respond};
use alert::{Channel, Language, Outbox};
use host::clock::Deadline;
use host::{Error, Kind, Result, user};
use node::Node;
use node::config::contacts::{self, Contact, Service};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::Path;

/// Version of the sealed contacts.
const SCHEMA: u32 = 1;

/// The language of alerts.
pub fn language(config: &Config) -> Language {
    config.language.unwrap_or_else(Language::of_env)
}

/// Every channel that a message goes to.
pub fn channels(config: &Config, places: &Places, home: Option<&Path>) -> Vec<Channel> {
    let mut all = config.alert.clone();
    all.extend(borrowed(config, places));
    let alone = all.iter().all(Channel::is_local);
    all.extend(alert::local_channels(&places.state_dir, home, alone));
    all
}

/// The node's own chat accounts, where the configuration wants them used.
pub fn borrowed(config: &Config, places: &Places) -> Vec<Channel> {
    let wanted = match config.node_channels {
        NodeChannels::Always => true,
        NodeChannels::Spare => config.alert.iter().all(Channel::is_local),
        NodeChannels::Never => false,
    };
    if !wanted {
        return Vec::new();
    }
    // No contacts, or none that can be opened, are none.
    kept(places).unwrap_or_default().iter().enumerate().filter_map(|(i, c)| channel(i, c)).collect()
}

/// A contact as a channel. What the node's user wrote there is checked like a configuration of our own.
fn channel(index: usize, contact: &Contact) -> Option<Channel> {
    let name = format!("node-{}-{}", contact.service.name(), index + 1);
    let mut settings = match contact.service {
        Service::Telegram => json!({ "kind": "telegram", "chat_id": contact.to }),
        Service::Discord => json!({ "kind": "discord", "user_id": contact.to }),
        Service::Slack => json!({ "kind": "slack", "channel": contact.to }),
    };
    settings["name"] = json!(name);
    settings["token"] = json!(contact.token);
    if let Some(root) = &contact.api_root {
        settings["api_root"] = json!(root);
    }
    let channel: Channel = serde_json::from_value(settings).ok()?;
    alert::channel::check(std::slice::from_ref(&channel)).ok()?;
    Some(channel)
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    schema: u32,
    contacts: Vec<Contact>,
}

fn kept(places: &Places) -> Result<Vec<Contact>> {
    let plain = store::read_note(&places.contacts(), &places.key_file)?;
    let kept: Kept = serde_json::from_slice(&plain).map_err(|_| {
        Error::new(Kind::Corrupt, "reading the node's contacts", "they are not what they should be")
    })?;
    Ok(kept.contacts)
}

/// Reads the node's chat accounts as the node's user and keeps them sealed: how many there are, and why an account
/// gave nothing. When none can be read of those that are configured, what was known before stands.
pub fn remember(places: &Places, node: &Node, deadline: Deadline) -> Result<(usize, Vec<String>)> {
    let look = user::as_user(node.ids, || contacts::contacts(node, deadline))?;
    let before = kept(places).unwrap_or_default();
    if look.found.is_empty() && !look.missing.is_empty() {
        return Ok((before.len(), look.missing));
    }
    let count = look.found.len();
    if look.found != before || !places.contacts().exists() {
        let plain = serde_json::to_vec(&Kept { schema: SCHEMA, contacts: look.found })
            .map_err(|_| Error::new(Kind::System, "keeping the node's contacts", "they cannot be written"))?;
        store::write_note(&places.contacts(), &places.key_file, &plain)?;
    }
    Ok((count, look.missing))
}

/// How far people can rely on being told.
#[derive(Debug, Default)]
pub struct Standing {
    /// Channels that lead off this machine and have accepted something: name, and the time of the first.
    pub proven: Vec<(String, String)>,
    /// Channels that lead off this machine and have accepted nothing yet.
    pub untried: Vec<String>,
}

impl Standing {
    /// Reads which channels are proven. Writes nothing.
    pub fn of(config: &Config, places: &Places) -> Standing {
        let dir = places.outbox();
        let outbox = dir.is_dir().then(|| Outbox::open(&dir).ok()).flatten();
        let mut standing = Standing::default();
        for channel in channels(config, places, None).iter().filter(|c| !c.is_local()) {
            match outbox.as_ref().and_then(|o| o.proven(channel)) {
                Some(at) => standing.proven.push((channel.name().to_owned(), at)),
                None => standing.untried.push(channel.name().to_owned()),
            }
        }
        standing
    }

    /// The line that stands first wherever people look, until one channel has accepted a test; and the way out.
    pub fn warning(&self, places: &Places) -> Option<(String, String)> {
        if !self.proven.is_empty() {
            return None;
        }
        Some(if self.untried.is_empty() {
            (
                "Nobody will be told of an emergency: no alert channel leads off this machine.".to_owned(),
                format!("add an [[alert]] to {}, then koboshi alert test", places.config_file.display()),
            )
        } else {
            (
                format!(
                    "Nobody will be told of an emergency until a channel has accepted a test ({} never has).",
                    self.untried.join(", ")
                ),
                "koboshi alert test".to_owned(),
            )
        })
    }
}

impl Standing {
    /// Prints the warning with its way out, if there is one.
    pub fn warn(&self, p: Printer, places: &Places) {
        if let Some((warning, fix)) = self.warning(places) {
            p.line(p.yellow(&warning));
            p.line(format!("  fix: {fix}"));
        }
    }

    /// As the member `alerts` of a JSON object.
    pub fn json(&self) -> serde_json::Value {
        let proven: Vec<_> =
            self.proven.iter().map(|(name, at)| json!({ "channel": name, "since": at })).collect();
        json!({ "anybody": !self.proven.is_empty(), "proven": proven, "untried": self.untried })
    }
}

/// The voice on the gateway's port, as the agent starts it.
pub fn respond(options: &cli::Respond, printer: Printer) -> Result<Exit> {
    let respond = Respond {
        port: options.port,
        parent: options.agent,
        opened: options.opened.clone(),
        changed: options.changed.clone(),
        node: options.node.clone(),
        incident: options.incident.clone(),
    };
    match respond::run(&respond)? {
        End::Orphaned => printer.note("ended: its agent is gone"),
        End::Sign(what) => printer.note(format!("ended: {what} was touched")),
    }
    Ok(Exit::Done)
}
