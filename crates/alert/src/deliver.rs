//! Brings what is queued to those who are to be told, all channels side by side, under one deadline.
//!
//! A channel that gives no answer costs the others nothing: each has its own thread, and within one pass it is not
//! tried again. A channel that answers again gets everything that waits for it at once. What was accepted is
//! recorded as soon as it is known, not at the end of the pass.

use crate::channel::{CHANNEL_LIMIT, Channel};
use crate::outbox::{Entry, Outbox, backoff_ms, wait_ms};
use crate::send::{Sent, send};
use crate::text::{Facts, Kind, Language, Message, Notice};
use engine::Moment;
use host::clock::{self, Deadline};
use host::tls::Client;
use std::collections::BTreeMap;
use std::sync::mpsc;
use std::time::Duration;

/// One attempt gets no longer: the emergency's whole reserve is twice this.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(15);
/// Channels served in one pass: the configured ones, as many borrowed from the node, and those on this machine.
const PASS_LIMIT: usize = 2 * CHANNEL_LIMIT + 4;
/// Messages per channel and pass: chat services throttle senders that pour.
const BURST_LIMIT: usize = 32;
/// After so many refusals in one pass the fault is the channel's, not the messages'.
const REFUSAL_LIMIT: usize = 2;
/// How long a channel without an answer is left alone, at most, before a new message may try it.
const REST_LIMIT_MS: u64 = 15_000;

/// A message accepted by a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// The message's key.
    pub key: String,
    /// The channel's name.
    pub channel: String,
    /// Whether that channel stays on this machine; then nobody has been reached yet.
    pub local: bool,
}

/// A message not accepted by a channel. It stays queued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The message's key.
    pub key: String,
    /// The channel's name.
    pub channel: String,
    /// Why, in one line without secrets.
    pub why: String,
    /// Whether it will be refused again until somebody changes the settings.
    pub permanent: bool,
}

/// What one pass did.
#[derive(Debug, Default)]
pub struct Delivery {
    /// In the order in which they were accepted.
    pub accepted: Vec<Receipt>,
    /// Messages that still wait for at least one channel.
    pub queued: usize,
    /// Attempts that failed.
    pub refused: Vec<Refusal>,
    /// When the next attempt falls due; `None` when nothing waits.
    pub next: Option<Duration>,
    /// Files of the outbox that were unreadable and put aside.
    pub set_aside: Vec<String>,
}

impl Delivery {
    /// Whether this pass brought the message to somebody outside this machine.
    #[must_use]
    pub fn reached(&self, key: &str) -> bool {
        self.accepted.iter().any(|r| r.key == key && !r.local)
    }
}

/// Sends what is due. Blocks until every due channel has answered or the deadline has come, so an agent calls it
/// beside its loop. Returns by the deadline, with every answer recorded; never fails, because whatever went wrong
/// is in the delivery and the messages are still queued.
pub fn deliver(outbox: &mut Outbox, channels: &[Channel], deadline: Deadline) -> Delivery {
    let now = clock::now();
    let entries = outbox.load();
    let remote = channels.iter().any(|c| !c.is_local() && !work_for(c, &entries, outbox, now).is_empty());
    // Certificates cost memory: they are loaded only when something is to be sent, and let go after.
    let client = if remote { Client::from_env().ok() } else { None };
    deliver_with(outbox, channels, client.as_ref(), now, deadline)
}

/// Sends one test message through one channel, past the outbox. Why not, in one line, on failure.
pub fn test(
    outbox: &Outbox,
    channel: &Channel,
    facts: &Facts,
    language: Language,
    deadline: Deadline,
) -> Result<(), String> {
    let message = Message::new(Kind::Notice(Notice::Test), facts, language);
    let client = if channel.is_local() { None } else { Some(Client::from_env().map_err(|e| e.to_string())?) };
    match send(client.as_ref(), channel, &message, deadline.min(Deadline::after(ATTEMPT_LIMIT))) {
        Sent::Accepted => {
            outbox.set_proven(channel, &message.at);
            Ok(())
        }
        Sent::Later { why, .. } | Sent::Refused { why } => Err(why),
    }
}

/// One attempt's outcome on its way from a channel's thread to the records.
struct Report {
    channel: usize,
    id: String,
    sent: Sent,
}

pub(crate) fn deliver_with(
    outbox: &mut Outbox,
    channels: &[Channel],
    client: Option<&Client>,
    now: Moment,
    deadline: Deadline,
) -> Delivery {
    let channels = &channels[..channels.len().min(PASS_LIMIT)];
    let mut entries = outbox.load();
    let mut delivery = Delivery::default();
    let work: Vec<Vec<(String, Message)>> =
        channels.iter().map(|c| work_for(c, &entries, outbox, now)).collect();
    let (tx, rx) = mpsc::channel();
    std::thread::scope(|scope| {
        for (index, (channel, work)) in channels.iter().zip(&work).enumerate() {
            if work.is_empty() {
                continue;
            }
            let tx = tx.clone();
            scope.spawn(move || serve(index, channel, work, client, deadline, &tx));
        }
        drop(tx);
        for report in rx {
            record(outbox, channels, &mut entries, &report, &mut delivery);
        }
    });
    // Settled without an attempt: channels that were taken out of the configuration, or killed before it was noted.
    entries.retain(|id, entry| !outbox.retire(id, entry, channels));
    let after = clock::now();
    delivery.queued = entries.len();
    delivery.next =
        entries.values().filter_map(|e| next_ms(e, channels, outbox, after)).min().map(Duration::from_millis);
    delivery.set_aside = outbox.take_set_aside();
    delivery
}

/// What a channel is to send in this pass: nothing unless something is due; then that first, the others after.
fn work_for(
    channel: &Channel,
    entries: &BTreeMap<String, Entry>,
    outbox: &Outbox,
    now: Moment,
) -> Vec<(String, Message)> {
    if wait_ms(outbox.rest.get(channel.name()).copied(), now) > 0 {
        return Vec::new();
    }
    let mut waiting: Vec<(&String, &Entry)> =
        entries.iter().filter(|(_, e)| !e.progress(channel).accepted).collect();
    if !waiting.iter().any(|(_, e)| e.is_due(channel, now)) {
        return Vec::new();
    }
    waiting.sort_by_key(|(_, e)| (!e.is_due(channel, now), e.rank()));
    waiting.into_iter().take(BURST_LIMIT).map(|(id, e)| (id.clone(), e.message.clone())).collect()
}

/// A channel's thread: ends at the first attempt without an answer.
fn serve(
    index: usize,
    channel: &Channel,
    work: &[(String, Message)],
    client: Option<&Client>,
    deadline: Deadline,
    tx: &mpsc::Sender<Report>,
) {
    let mut refusals = 0;
    for (id, message) in work {
        if deadline.passed() {
            return;
        }
        let sent = send(client, channel, message, deadline.min(Deadline::after(ATTEMPT_LIMIT)));
        let go_on = match &sent {
            Sent::Accepted => true,
            Sent::Later { .. } => false,
            Sent::Refused { .. } => {
                refusals += 1;
                refusals < REFUSAL_LIMIT
            }
        };
        // Nobody listens only when the pass has unwound; then there is nothing left to tell.
        if tx.send(Report { channel: index, id: id.clone(), sent }).is_err() || !go_on {
            return;
        }
    }
}

/// Writes one answer down and tells the delivery of it.
fn record(
    outbox: &mut Outbox,
    channels: &[Channel],
    entries: &mut BTreeMap<String, Entry>,
    report: &Report,
    delivery: &mut Delivery,
) {
    let (Some(entry), Some(channel)) = (entries.get_mut(&report.id), channels.get(report.channel)) else {
        return;
    };
    let key = entry.message.key.clone();
    let name = channel.name().to_owned();
    let now = clock::now();
    let progress = entry.channels.entry(name.clone()).or_default();
    progress.attempts = progress.attempts.saturating_add(1);
    let backoff = backoff_ms(progress.attempts);
    match &report.sent {
        Sent::Accepted => {
            progress.accepted = true;
            progress.due = None;
            outbox.rest.remove(&name);
            outbox.set_proven(channel, &entry.message.at);
            delivery.accepted.push(Receipt { key, channel: name, local: channel.is_local() });
        }
        Sent::Later { why, after } => {
            let asked = after.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX));
            progress.due = Some(now.plus_ms(backoff.max(asked)));
            outbox.rest.insert(name.clone(), now.plus_ms(backoff.min(REST_LIMIT_MS).max(asked)));
            delivery.refused.push(Refusal { key, channel: name, why: why.clone(), permanent: false });
        }
        Sent::Refused { why } => {
            progress.due = Some(now.plus_ms(backoff));
            outbox.rest.insert(name.clone(), now.plus_ms(backoff.min(REST_LIMIT_MS)));
            delivery.refused.push(Refusal { key, channel: name, why: why.clone(), permanent: true });
        }
    }
    // A disk that refuses is no loss: the outbox then keeps this state elsewhere.
    let _ = outbox.store(&report.id, entry);
    if outbox.retire(&report.id, entry, channels) {
        entries.remove(&report.id);
    }
}

/// Milliseconds until some channel may be tried for this entry.
fn next_ms(entry: &Entry, channels: &[Channel], outbox: &Outbox, now: Moment) -> Option<u64> {
    channels
        .iter()
        .map(|c| (entry.progress(c), outbox.rest.get(c.name()).copied()))
        .filter(|(p, _)| !p.accepted)
        .map(|(p, rest)| wait_ms(p.due, now).max(wait_ms(rest, now)))
        .min()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;

#[cfg(test)]
#[path = "tests_tls.rs"]
mod tests_tls;
