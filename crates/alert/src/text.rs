//! Every sentence that reaches a person by alert, in one table, so that the same event is told in the same
//! words everywhere and another language is one more arm.
//!
//! A message is one line of what happened, one of why, one of what to do. A closing message always ends with
//! how to undo the recovery and how to keep koboshi's hands off.

use engine::words::Layer;
use serde::{Deserialize, Serialize};

/// A title longer than this is cut: phones show about so much, and it keeps one queued file small.
const TITLE_LIMIT_CHARS: usize = 160;
/// A text longer than this is cut: below every receiver's own limit (the smallest takes 4,096 units).
const TEXT_LIMIT_CHARS: usize = 3_000;
/// One fact inside a text is cut here, so that a long path or a gateway's own words cannot push out the rest.
const FACT_LIMIT_CHARS: usize = 400;
/// More lines of detail than this are only counted: a person reads the first few.
const DETAIL_LIMIT: usize = 8;

/// The languages of the table. Adding one makes the compiler ask for every sentence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Language {
    /// English.
    #[default]
    English,
}

/// What a message is. Opening, emergency and closing belong to an incident and are never dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind", content = "notice")]
pub enum Kind {
    /// An incident has begun: the node does not serve.
    Opening,
    /// Every layer failed; koboshi holds on and goes on trying.
    Emergency,
    /// The incident is over: the judge confirmed that the node serves.
    Closing,
    /// Something to know outside the course of an incident.
    Notice(Notice),
}

/// What a notice is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Notice {
    /// No good snapshot of some class for too long.
    BackupStale,
    /// Stored bytes were damaged, and nobody else has them.
    StoreDamaged,
    /// Something is wrong that koboshi may not or need not repair.
    LeftAlone,
    /// Damage on disk could not be mended; the node serves, and it is tried again.
    NotMended,
    /// The owner disabled, masked or stopped the node: it stays down.
    StoppedByOwner,
    /// An enabled unit was stopped without a word; it was started again, once.
    StartedAgain,
    /// Damage was put right on disk while the node went on serving.
    RepairedInPlace,
    /// An update has been at work for long while the node serves.
    UpdateLong,
    /// A new version or a new identity is the baseline now.
    NewBaseline,
    /// A file of the user's that the last snapshot holds is gone: only reported.
    FileMissing,
    /// The node serves, but less than whole.
    Degraded,
    /// koboshi cannot probe: the trouble is on its own side.
    OwnSide,
    /// The journal cannot be written; only the first layer acts.
    JournalUnwritable,
    /// Too little space for safe work.
    DiskLow,
    /// A pause has ended by itself; koboshi guards again.
    PauseEnded,
    /// A test asked for by a person.
    Test,
}

impl Notice {
    /// The name used in keys, JSON and configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Notice::BackupStale => "backup-stale",
            Notice::StoreDamaged => "store-damaged",
            Notice::LeftAlone => "left-alone",
            Notice::NotMended => "not-mended",
            Notice::StoppedByOwner => "stopped-by-owner",
            Notice::StartedAgain => "started-again",
            Notice::RepairedInPlace => "repaired-in-place",
            Notice::UpdateLong => "update-long",
            Notice::NewBaseline => "new-baseline",
            Notice::FileMissing => "file-missing",
            Notice::Degraded => "degraded",
            Notice::OwnSide => "own-side",
            Notice::JournalUnwritable => "journal-unwritable",
            Notice::DiskLow => "disk-low",
            Notice::PauseEnded => "pause-ended",
            Notice::Test => "test",
        }
    }
}

impl Kind {
    /// The name used in keys and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Opening => "opening",
            Kind::Emergency => "emergency",
            Kind::Closing => "closing",
            Kind::Notice(n) => n.name(),
        }
    }

    /// Whether it belongs to an incident's course, and so is never dropped from the outbox.
    #[must_use]
    pub fn is_incident(self) -> bool {
        match self {
            Kind::Opening | Kind::Emergency | Kind::Closing => true,
            Kind::Notice(_) => false,
        }
    }

    /// How loud a receiver should be.
    #[must_use]
    pub fn severity(self) -> Severity {
        match self {
            Kind::Opening => Severity::Warning,
            Kind::Emergency => Severity::Critical,
            Kind::Closing => Severity::Info,
            Kind::Notice(n) => match n {
                Notice::BackupStale
                | Notice::StoreDamaged
                | Notice::NotMended
                | Notice::Degraded
                | Notice::OwnSide
                | Notice::JournalUnwritable
                | Notice::DiskLow
                | Notice::FileMissing => Severity::Warning,
                Notice::LeftAlone
                | Notice::StoppedByOwner
                | Notice::StartedAgain
                | Notice::RepairedInPlace
                | Notice::UpdateLong
                | Notice::NewBaseline
                | Notice::PauseEnded
                | Notice::Test => Severity::Info,
            },
        }
    }
}

/// How loud a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Good to know.
    Info,
    /// Look when you can.
    Warning,
    /// Nobody but a person can help now.
    Critical,
}

impl Severity {
    /// The name used in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Critical => "critical",
        }
    }
}

/// What is known when a message is made. Never put a secret in here: all of it is sent.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The node's name.
    pub node: String,
    /// The host's name.
    pub host: String,
    /// The incident's id, or for a notice what it is about together with its date (`backup-2026-11-22`):
    /// with the kind it makes the key by which repetitions are known.
    pub incident: String,
    /// Wall time of the event, RFC 3339.
    pub at: String,
    /// One line: why, in the judge's or the finding's words.
    pub why: String,
    /// More evidence, one line each.
    pub details: Vec<String>,
    /// The layer that healed it, for a closing message.
    pub layer: Option<Layer>,
    /// Milliseconds without service, for a closing message; 0 when it never stopped serving.
    pub down_ms: f64,
    /// The node serves, or never stopped serving: an opening tells of damage then, and a closing of its end.
    pub serves: bool,
    /// The command that puts back what the recovery replaced; `None` when it replaced nothing.
    pub undo: Option<String>,
    /// What to do, where the table's own advice is not enough (one line, usually a command).
    pub advice: Option<String>,
}

/// A rendered message: what is queued, and what is sent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// `<incident>/<kind>`: the same event told twice has the same key.
    pub key: String,
    /// What it is.
    pub kind: Kind,
    /// The node's name.
    pub node: String,
    /// The host's name.
    pub host: String,
    /// The incident's id.
    pub incident: String,
    /// Wall time of the event, RFC 3339.
    pub at: String,
    /// One line.
    pub title: String,
    /// The rest, several lines.
    pub text: String,
}

impl Message {
    /// Renders the event in a language. Every length is bounded here, once.
    #[must_use]
    pub fn new(kind: Kind, facts: &Facts, language: Language) -> Message {
        let (title, advice) = sentences(language, kind, facts.serves);
        let mut lines = Vec::new();
        if kind == Kind::Closing {
            lines.push(healed(language, facts.layer, facts.down_ms));
        }
        if !facts.why.is_empty() {
            let why = one_line(&facts.why, FACT_LIMIT_CHARS);
            lines.push(if kind == Kind::Closing { was(language, &why) } else { why });
        }
        lines.extend(
            facts.details.iter().take(DETAIL_LIMIT).map(|d| format!("- {}", one_line(d, FACT_LIMIT_CHARS))),
        );
        let more = facts.details.len().saturating_sub(DETAIL_LIMIT);
        if more > 0 {
            lines.push(and_more(language, more));
        }
        // What to do comes last and must survive the cut, so it is rendered apart and the rest is cut to fit.
        let mut last = Vec::new();
        if let Some(own) = &facts.advice {
            last.push(one_line(own, FACT_LIMIT_CHARS));
        }
        last.extend(advice.iter().map(|a| fill(a, facts)));
        if kind == Kind::Closing {
            last.push(undo(language, facts.undo.as_deref()));
            last.push(pause(language).to_owned());
        }
        let last = last.join("\n");
        let room = TEXT_LIMIT_CHARS.saturating_sub(last.chars().count() + 1);
        let first = cut(&lines.join("\n"), room);
        let text = if first.is_empty() { last } else { format!("{first}\n{last}") };
        Message {
            key: format!("{}/{}", one_line(&facts.incident, FACT_LIMIT_CHARS), kind.name()),
            kind,
            node: one_line(&facts.node, FACT_LIMIT_CHARS),
            host: one_line(&facts.host, FACT_LIMIT_CHARS),
            incident: one_line(&facts.incident, FACT_LIMIT_CHARS),
            at: one_line(&facts.at, FACT_LIMIT_CHARS),
            title: one_line(&fill(title, facts), TITLE_LIMIT_CHARS),
            text,
        }
    }

    /// The message as lines for a journal or a terminal: the title with its time, then the text indented.
    #[must_use]
    pub fn lines(&self) -> String {
        let mut out = format!("{} [{}] {}", self.at, self.kind.severity().name(), self.title);
        for line in self.text.lines() {
            out.push_str("\n    ");
            out.push_str(line);
        }
        out.push_str("\n    ref: ");
        out.push_str(&self.key);
        out.push('\n');
        out
    }
}

/// The table: a title and lines of advice per kind. `{node}`, `{host}` and `{incident}` are filled in.
fn sentences(language: Language, kind: Kind, serves: bool) -> (&'static str, &'static [&'static str]) {
    match language {
        Language::English => match kind {
            Kind::Opening if serves => (
                "{node} on {host} is damaged on disk; it still serves",
                &["koboshi is putting it right. You need not do anything."],
            ),
            Kind::Closing if serves => ("{node} on {host} is whole again", &[]),
            Kind::Opening => {
                ("{node} on {host} is down", &["koboshi is putting it right. You need not do anything."])
            }
            Kind::Emergency => (
                "{node} on {host} is still down: every way of recovery has failed",
                &[
                    "koboshi holds on and tries again by itself, at once when something changes.",
                    "What was tried and why it failed: koboshi incidents show {incident}",
                ],
            ),
            Kind::Closing => ("{node} on {host} serves again", &[]),
            Kind::Notice(n) => notice_in_english(n),
        },
    }
}

fn notice_in_english(notice: Notice) -> (&'static str, &'static [&'static str]) {
    match notice {
        Notice::BackupStale => (
            "{node} on {host} has no recent good backup",
            &["Why, and how to mend it: koboshi doctor. Take one now: koboshi snapshot create"],
        ),
        Notice::StoreDamaged => (
            "part of a backup of {node} on {host} is lost",
            &[
                "A new one is taken by itself. What is damaged: koboshi snapshot verify. If it comes back, look at the disk.",
            ],
        ),
        Notice::LeftAlone => {
            ("{node} on {host} was left as it is", &["To have it put right all the same: koboshi recover"])
        }
        Notice::NotMended => (
            "{node} on {host} serves, but damage on its disk could not be mended",
            &[
                "It is no outage: nothing is interrupted for it. koboshi tries again by itself, at once when something \
                 changes (a good snapshot, for example).",
                "What was tried and why it failed: koboshi incidents show {incident}",
            ],
        ),
        Notice::StoppedByOwner => (
            "{node} on {host} was stopped on purpose and stays down",
            &["To start it and have it guarded again: koboshi node start"],
        ),
        Notice::StartedAgain => (
            "{node} on {host} was stopped and has been started again",
            &["A second stop within the hour is obeyed. To stop it for good: koboshi node stop"],
        ),
        Notice::RepairedInPlace => (
            "{node} on {host} was damaged on disk and repaired while it served",
            &["What was replaced and where it lies now: koboshi incidents show {incident}"],
        ),
        Notice::UpdateLong => (
            "{node} on {host}: an update has been at work for long",
            &["koboshi does not interfere while the node serves. If the update is stuck, end it yourself."],
        ),
        Notice::NewBaseline => (
            "{node} on {host} has a new baseline",
            &["Older snapshots are kept. If this was not intended: koboshi snapshot list"],
        ),
        Notice::FileMissing => (
            "{node} on {host}: a file of the last backup is gone",
            &[
                "A single missing file is taken for your own deletion. To have it back: koboshi snapshot restore",
            ],
        ),
        Notice::Degraded => (
            "{node} on {host} serves, but not in full",
            &["It is not restarted for that. More: koboshi status"],
        ),
        Notice::OwnSide => (
            "koboshi on {host} cannot judge {node}",
            &["The trouble is on koboshi's own side; nothing was repaired. More: koboshi doctor"],
        ),
        Notice::JournalUnwritable => (
            "koboshi on {host} cannot write its journal",
            &[
                "Until it can, it only restarts {node} and repairs nothing. Free some space, then: koboshi doctor",
            ],
        ),
        Notice::DiskLow => (
            "{host} is short of space for {node}",
            &["Backups and repairs may be refused. koboshi removes only its own oldest data: koboshi doctor"],
        ),
        Notice::PauseEnded => (
            "koboshi guards {node} on {host} again",
            &["The pause has run out. To pause longer: koboshi pause --for 2h"],
        ),
        Notice::Test => {
            ("Test from koboshi on {host}", &["If you can read this, alerts about {node} reach you."])
        }
    }
}

fn healed(language: Language, layer: Option<Layer>, down_ms: f64) -> String {
    match language {
        Language::English => {
            let by = match layer {
                Some(l) => format!("Healed by {l}"),
                None => "It came back by itself".to_owned(),
            };
            if down_ms > 0.0 {
                format!("{by}; it was down for {}.", span(down_ms))
            } else {
                format!("{by}; it never stopped serving.")
            }
        }
    }
}

fn was(language: Language, why: &str) -> String {
    match language {
        Language::English => format!("It was: {why}"),
    }
}

fn undo(language: Language, command: Option<&str>) -> String {
    match (language, command) {
        (Language::English, Some(c)) => format!("To undo: {}", one_line(c, FACT_LIMIT_CHARS)),
        (Language::English, None) => {
            "To undo: nothing was replaced, so there is nothing to put back.".to_owned()
        }
    }
}

fn pause(language: Language) -> &'static str {
    match language {
        Language::English => "To keep koboshi's hands off for a while: koboshi pause --for 2h",
    }
}

fn and_more(language: Language, count: usize) -> String {
    match language {
        Language::English => format!("- and {count} more"),
    }
}

/// A duration as people say it: `850 ms`, `42.0 s`, `3 min 5 s`, `2 h 10 min`.
fn span(ms: f64) -> String {
    let s = ms / 1000.0;
    if s < 1.0 {
        return format!("{ms:.0} ms");
    }
    if s < 60.0 {
        return format!("{s:.1} s");
    }
    // Whole seconds from here on; a float of days fits any u64.
    let whole = s.round() as u64;
    if whole < 3_600 {
        return format!("{} min {} s", whole / 60, whole % 60);
    }
    format!("{} h {} min", whole / 3_600, whole % 3_600 / 60)
}

fn fill(template: &str, facts: &Facts) -> String {
    // Pieces are copied, not replaced in turn: a node named `{host}` stays what it is.
    let mut out = String::new();
    let mut rest = template;
    while let Some(start) = rest.find('{') {
        out.push_str(&rest[..start]);
        let tail = &rest[start..];
        let (value, used) =
            [("{node}", &facts.node), ("{host}", &facts.host), ("{incident}", &facts.incident)]
                .into_iter()
                .find(|(name, _)| tail.starts_with(name))
                .map_or(("{".to_owned(), 1), |(name, v)| (one_line(v, FACT_LIMIT_CHARS), name.len()));
        out.push_str(&value);
        rest = &tail[used..];
    }
    out.push_str(rest);
    out
}

/// Control characters and line ends become spaces: what the gateway printed must not forge lines of ours.
fn one_line(s: &str, limit_chars: usize) -> String {
    let flat: String = s.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    cut(flat.trim(), limit_chars)
}

fn cut(s: &str, limit_chars: usize) -> String {
    if s.chars().count() <= limit_chars {
        return s.to_owned();
    }
    let mut out: String = s.chars().take(limit_chars.saturating_sub(1)).collect();
    out.push('…');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            node: "main".into(),
            host: "attic".into(),
            incident: "2026-11-22-1".into(),
            at: "2026-11-22T18:00:00Z".into(),
            why: "no process holds the port".into(),
            ..Facts::default()
        }
    }

    const EVERY: [Kind; 19] = [
        Kind::Opening,
        Kind::Emergency,
        Kind::Closing,
        Kind::Notice(Notice::BackupStale),
        Kind::Notice(Notice::StoreDamaged),
        Kind::Notice(Notice::LeftAlone),
        Kind::Notice(Notice::NotMended),
        Kind::Notice(Notice::StoppedByOwner),
        Kind::Notice(Notice::StartedAgain),
        Kind::Notice(Notice::RepairedInPlace),
        Kind::Notice(Notice::UpdateLong),
        Kind::Notice(Notice::NewBaseline),
        Kind::Notice(Notice::FileMissing),
        Kind::Notice(Notice::Degraded),
        Kind::Notice(Notice::OwnSide),
        Kind::Notice(Notice::JournalUnwritable),
        Kind::Notice(Notice::DiskLow),
        Kind::Notice(Notice::PauseEnded),
        Kind::Notice(Notice::Test),
    ];

    #[test]
    fn every_kind_says_what_why_and_what_to_do() {
        for kind in EVERY {
            let m = Message::new(kind, &facts(), Language::English);
            assert!(m.title.contains("attic"), "{m:?}");
            assert!(!m.title.contains('{') && !m.text.contains('{'), "unfilled: {m:?}");
            assert!(m.text.contains("no process holds the port"), "{m:?}");
            assert!(m.text.lines().count() >= 2, "nothing to do: {m:?}");
            assert_eq!(m.key, format!("2026-11-22-1/{}", kind.name()));
        }
    }

    #[test]
    fn what_serves_is_never_told_to_be_down() {
        let f = Facts { serves: true, ..facts() };
        let title = |kind| Message::new(kind, &f, Language::English).title;
        assert_eq!(title(Kind::Opening), "main on attic is damaged on disk; it still serves");
        assert_eq!(title(Kind::Closing), "main on attic is whole again");
        let m = Message::new(Kind::Notice(Notice::NotMended), &f, Language::English);
        assert!(m.title.contains("serves") && !m.title.contains("down"), "{}", m.title);
        assert_eq!(m.kind.severity(), Severity::Warning, "a person may help, and need not at once");
    }

    #[test]
    fn a_closing_message_ends_with_undo_and_pause_whatever_its_length() {
        for undo in [None, Some("koboshi snapshot restore 7".to_owned())] {
            let f = Facts {
                undo: undo.clone(),
                layer: Some(Layer::Restore),
                down_ms: 185_000.0,
                details: vec!["x".repeat(5_000); 50],
                ..facts()
            };
            let m = Message::new(Kind::Closing, &f, Language::English);
            let last: Vec<&str> = m.text.lines().rev().take(2).collect();
            assert!(last[0].contains("koboshi pause"), "{}", m.text);
            assert!(last[1].starts_with("To undo: "), "{}", m.text);
            if let Some(u) = undo {
                assert!(last[1].ends_with(&u));
            }
            assert!(m.text.starts_with("Healed by restore; it was down for 3 min 5 s."));
            assert!(m.text.chars().count() <= TEXT_LIMIT_CHARS);
        }
    }

    #[test]
    fn the_gateways_words_cannot_forge_lines_or_fields() {
        let f = Facts { node: "{host}\nTo undo: rm -rf".into(), why: "a\nb\u{1b}[31m".into(), ..facts() };
        let m = Message::new(Kind::Opening, &f, Language::English);
        assert_eq!(m.title, "{host} To undo: rm -rf on attic is down");
        assert_eq!(m.text.lines().next(), Some("a b [31m"));
    }

    #[test]
    fn spans_are_said_as_people_say_them() {
        let said: Vec<String> = [850.0, 42_000.0, 185_400.0, 7_800_000.0].into_iter().map(span).collect();
        assert_eq!(said, ["850 ms", "42.0 s", "3 min 5 s", "2 h 10 min"]);
    }

    #[test]
    fn a_message_goes_through_json_unchanged() {
        for kind in EVERY {
            let m = Message::new(kind, &facts(), Language::English);
            let back: Message = serde_json::from_slice(&serde_json::to_vec(&m).unwrap()).unwrap();
            assert_eq!(back, m);
        }
    }
}
