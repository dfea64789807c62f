//! Every sentence that reaches a person by alert, in one table, so that the same event is told in the same
//! words everywhere and another language is one more arm.
//!
//! A message is one line of what happened, one of why, one of what to do. A closing message always ends with
//! how to undo the recovery and how to keep koboshi's hands off. What the judge and the layers found is told in their
//! own words, which are English, inside the sentence of the table.

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
pub enum Language {
    /// English.
    #[default]
    #[serde(rename = "en")]
    English,
    /// Japanese.
    #[serde(rename = "ja")]
    Japanese,
}

impl Language {
    /// The language of this process's environment, as programs choose it: `LC_ALL`, then `LC_MESSAGES`, then `LANG`.
    #[must_use]
    pub fn of_env() -> Language {
        let set = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let locale = set("LC_ALL").or_else(|| set("LC_MESSAGES")).or_else(|| set("LANG"));
        Language::of_locale(locale.as_deref().unwrap_or_default())
    }

    /// `ja`, `ja_JP.UTF-8` and the like are Japanese; everything else is English.
    fn of_locale(locale: &str) -> Language {
        match locale.split(['_', '.', '@', '-']).next() {
            Some("ja" | "japanese") => Language::Japanese,
            Some(_) | None => Language::English,
        }
    }
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
    /// A node that ran from elsewhere is in its own place again, or could not stay there.
    Home,
    /// An update has been at work for long while the node serves.
    UpdateLong,
    /// A new version or a new identity is the baseline now.
    NewBaseline,
    /// A file of the user's that the last snapshot holds is gone: only reported.
    FileMissing,
    /// The node serves, but less than whole.
    Degraded,
    /// The certificate that the gateway shows is out of date or not the one in its file; the node serves.
    Certificate,
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
            Notice::Home => "home",
            Notice::UpdateLong => "update-long",
            Notice::NewBaseline => "new-baseline",
            Notice::FileMissing => "file-missing",
            Notice::Degraded => "degraded",
            Notice::Certificate => "certificate",
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
                | Notice::Certificate
                | Notice::OwnSide
                | Notice::JournalUnwritable
                | Notice::DiskLow
                | Notice::FileMissing => Severity::Warning,
                Notice::LeftAlone
                | Notice::StoppedByOwner
                | Notice::StartedAgain
                | Notice::Home
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
    /// The node serves and has never stopped: an opening then tells of damage, a closing of its repair.
    pub serves: bool,
    /// Where what the recovery replaced lies now; `None` when it replaced nothing.
    pub replaced: Option<String>,
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
        let words = words(kind, facts.serves).of(language);
        let mut lines = Vec::new();
        if kind == Kind::Closing {
            lines.push(healed(language, facts.layer, facts.down_ms));
        }
        if !facts.why.is_empty() || !words.why.contains("{why}") {
            lines.push(fill(words.why, facts));
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
        last.extend(words.then.iter().map(|line| fill(line, facts)));
        if kind == Kind::Closing {
            last.push(undo(language, facts));
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
            title: one_line(&fill(words.what, facts), TITLE_LIMIT_CHARS),
            text,
        }
    }

    /// One fact as one short line.
    pub(crate) fn short(fact: &str) -> String {
        one_line(fact, FACT_LIMIT_CHARS)
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

/// One kind of message in one language. `{node}`, `{host}`, `{incident}` and `{why}` are filled in.
struct Words {
    /// One line of what happened: the title.
    what: &'static str,
    /// One line of why.
    why: &'static str,
    /// What to do, or that there is nothing to do.
    then: &'static [&'static str],
}

/// The same in every language of the table.
struct Row {
    en: Words,
    ja: Words,
}

impl Row {
    fn of(self, language: Language) -> Words {
        match language {
            Language::English => self.en,
            Language::Japanese => self.ja,
        }
    }
}

/// The why of most kinds: what the judge or the layer said.
const WHY_EN: &str = "Why: {why}";
const WHY_JA: &str = "理由: {why}";

/// The table. `serves`: see [`Facts::serves`].
fn words(kind: Kind, serves: bool) -> Row {
    match kind {
        Kind::Opening if serves => Row {
            en: Words {
                what: "{node} on {host} is damaged and still serves",
                why: WHY_EN,
                then: &["koboshi is putting it right while it serves. You need not do anything."],
            },
            ja: Words {
                what: "{host} の {node} に破損がありますが、稼働は続いています",
                why: WHY_JA,
                then: &["koboshi が稼働させたまま修復しています。操作は必要ありません。"],
            },
        },
        Kind::Closing if serves => Row {
            en: Words { what: "{node} on {host} is whole again", why: WHY_EN, then: &[] },
            ja: Words { what: "{host} の {node} の破損を修復しました", why: WHY_JA, then: &[] },
        },
        Kind::Opening => Row {
            en: Words {
                what: "{node} on {host} is down",
                why: WHY_EN,
                then: &["koboshi is putting it right. You need not do anything."],
            },
            ja: Words {
                what: "{host} の {node} が停止しています",
                why: WHY_JA,
                then: &["koboshi が復旧しています。操作は必要ありません。"],
            },
        },
        Kind::Emergency => Row {
            en: Words {
                what: "{node} on {host} is still down: every way of recovery has failed",
                why: WHY_EN,
                then: &[
                    "koboshi holds on and tries again by itself, at once when something changes.",
                    "What was tried and why it failed: koboshi incidents show {incident}",
                ],
            },
            ja: Words {
                what: "{host} の {node} はまだ停止しています: すべての復旧手段が失敗しました",
                why: WHY_JA,
                then: &[
                    "koboshi は自動で再試行を続けます。状況が変わればすぐに試します。",
                    "試したことと失敗の理由: koboshi incidents show {incident}",
                ],
            },
        },
        Kind::Closing => Row {
            en: Words { what: "{node} on {host} serves again", why: WHY_EN, then: &[] },
            ja: Words { what: "{host} の {node} が再び稼働しています", why: WHY_JA, then: &[] },
        },
        Kind::Notice(notice) => notice_words(notice),
    }
}

fn notice_words(notice: Notice) -> Row {
    match notice {
        Notice::BackupStale => Row {
            en: Words {
                what: "{node} on {host} has no recent good backup",
                why: WHY_EN,
                then: &["Why, and how to mend it: koboshi doctor. Take one now: koboshi snapshot create"],
            },
            ja: Words {
                what: "{host} の {node} に新しい正常なバックアップがありません",
                why: WHY_JA,
                then: &["原因と直し方: koboshi doctor。今すぐ取得: koboshi snapshot create"],
            },
        },
        Notice::StoreDamaged => Row {
            en: Words {
                what: "part of a backup of {node} on {host} is lost",
                why: WHY_EN,
                then: &[
                    "A new one is taken by itself. What is damaged: koboshi snapshot verify. If it comes back, look at the disk.",
                ],
            },
            ja: Words {
                what: "{host} の {node} のバックアップの一部が失われました",
                why: WHY_JA,
                then: &[
                    "新しいバックアップは自動で取得されます。破損の内容: koboshi snapshot verify。繰り返す場合はディスクを確認してください。",
                ],
            },
        },
        Notice::LeftAlone => Row {
            en: Words {
                what: "{node} on {host} was left as it is",
                why: WHY_EN,
                then: &["To have it put right all the same: koboshi recover"],
            },
            ja: Words {
                what: "{host} の {node} はそのままにしてあります",
                why: WHY_JA,
                then: &["それでも復旧させるには: koboshi recover"],
            },
        },
        Notice::NotMended => Row {
            en: Words {
                what: "{node} on {host} serves, but damage on its disk could not be mended",
                why: WHY_EN,
                then: &[
                    "It is no outage: nothing is interrupted for it. koboshi tries again by itself, at once when something \
                     changes (a good snapshot, for example).",
                    "What was tried and why it failed: koboshi incidents show {incident}",
                ],
            },
            ja: Words {
                what: "{host} の {node} は稼働中ですが、ディスク上の破損を修復できませんでした",
                why: WHY_JA,
                then: &[
                    "停止はしていません。稼働を中断することもありません。koboshi は自動で再試行し、状況が変われば (正常なスナップショットなど) \
                     直ちに再試行します。",
                    "試したことと失敗の理由: koboshi incidents show {incident}",
                ],
            },
        },
        Notice::StoppedByOwner => Row {
            en: Words {
                what: "{node} on {host} was stopped on purpose and stays down",
                why: WHY_EN,
                then: &["To start it and have it guarded again: koboshi node start"],
            },
            ja: Words {
                what: "{host} の {node} は意図的に停止されたため、停止したままにします",
                why: WHY_JA,
                then: &["起動して再び見守らせるには: koboshi node start"],
            },
        },
        Notice::StartedAgain => Row {
            en: Words {
                what: "{node} on {host} was stopped and has been started again",
                why: WHY_EN,
                then: &["A second stop within the hour is obeyed. To stop it for good: koboshi node stop"],
            },
            ja: Words {
                what: "{host} の {node} は停止されましたが、再び起動しました",
                why: WHY_JA,
                then: &[
                    "1 時間以内にもう一度停止すればそのままにします。完全に停止するには: koboshi node stop",
                ],
            },
        },
        Notice::Home => Row {
            en: Words {
                what: "{node} on {host}: on its way back to where it belongs",
                why: WHY_EN,
                then: &[
                    "Where it runs now: koboshi status. To keep it from moving by itself: return_home = false \
                     under [ladder]",
                ],
            },
            ja: Words {
                what: "{host} の {node}: 本来の場所への復帰について",
                why: WHY_JA,
                then: &[
                    "現在の実行場所: koboshi status。自動で戻さないようにするには [ladder] に return_home = false",
                ],
            },
        },
        Notice::UpdateLong => Row {
            en: Words {
                what: "{node} on {host}: an update has been at work for long",
                why: WHY_EN,
                then: &[
                    "koboshi does not interfere while the node serves. If the update is stuck, end it yourself.",
                ],
            },
            ja: Words {
                what: "{host} の {node}: 更新が長時間続いています",
                why: WHY_JA,
                then: &[
                    "稼働している間 koboshi は介入しません。更新が止まっている場合は手動で終了してください。",
                ],
            },
        },
        Notice::NewBaseline => Row {
            en: Words {
                what: "{node} on {host} has a new baseline",
                why: WHY_EN,
                then: &["Older snapshots are kept. If this was not intended: koboshi snapshot list"],
            },
            ja: Words {
                what: "{host} の {node} の基準が新しくなりました",
                why: WHY_JA,
                then: &["以前のスナップショットは残っています。意図しない変更の場合: koboshi snapshot list"],
            },
        },
        Notice::FileMissing => Row {
            en: Words {
                what: "{node} on {host}: a file of the last backup is gone",
                why: WHY_EN,
                then: &[
                    "A single missing file is taken for your own deletion. To have it back: koboshi snapshot restore",
                ],
            },
            ja: Words {
                what: "{host} の {node}: 前回のバックアップにあったファイルがなくなっています",
                why: WHY_JA,
                then: &["1 つだけの欠落はご自身の削除とみなします。元に戻すには: koboshi snapshot restore"],
            },
        },
        Notice::Degraded => Row {
            en: Words {
                what: "{node} on {host} serves, but not in full",
                why: WHY_EN,
                then: &["It is not restarted for that. More: koboshi status"],
            },
            ja: Words {
                what: "{host} の {node} は稼働していますが、完全ではありません",
                why: WHY_JA,
                then: &["このために再起動はしません。詳細: koboshi status"],
            },
        },
        Notice::Certificate => Row {
            en: Words {
                what: "the TLS certificate of {node} on {host} needs a look",
                why: WHY_EN,
                then: &[
                    "The node serves and is not restarted for that; its clients may refuse the certificate.",
                ],
            },
            ja: Words {
                what: "{host} の {node} の TLS 証明書を確認してください",
                why: WHY_JA,
                then: &[
                    "ノードは稼働しており、このために再起動はしません。クライアントは証明書を拒否するかもしれません。",
                ],
            },
        },
        Notice::OwnSide => Row {
            en: Words {
                what: "koboshi on {host} cannot judge {node}",
                why: WHY_EN,
                then: &["The trouble is on koboshi's own side; nothing was repaired. More: koboshi doctor"],
            },
            ja: Words {
                what: "{host} の koboshi は {node} の状態を判定できません",
                why: WHY_JA,
                then: &["問題は koboshi 側にあり、何も修復していません。詳細: koboshi doctor"],
            },
        },
        Notice::JournalUnwritable => Row {
            en: Words {
                what: "koboshi on {host} cannot write its journal",
                why: WHY_EN,
                then: &[
                    "Until it can, it only restarts {node} and repairs nothing. Free some space, then: koboshi doctor",
                ],
            },
            ja: Words {
                what: "{host} の koboshi は記録を書き込めません",
                why: WHY_JA,
                then: &[
                    "書き込めるまで {node} の再起動だけを行い、修復はしません。空き容量を確保してください。その後: koboshi doctor",
                ],
            },
        },
        Notice::DiskLow => Row {
            en: Words {
                what: "{host} is short of space for {node}",
                why: WHY_EN,
                then: &[
                    "Backups and repairs may be refused. koboshi removes only its own oldest data: koboshi doctor",
                ],
            },
            ja: Words {
                what: "{host} の {node} 用の空き容量が不足しています",
                why: WHY_JA,
                then: &[
                    "バックアップや修復ができないことがあります。koboshi が消すのは自分の古いデータだけです: koboshi doctor",
                ],
            },
        },
        Notice::PauseEnded => Row {
            en: Words {
                what: "koboshi guards {node} on {host} again",
                why: "Why: the pause has run out.",
                then: &["To pause longer: koboshi pause --for 2h"],
            },
            ja: Words {
                what: "koboshi は {host} の {node} の見守りを再開しました",
                why: "理由: 一時停止の期限が切れました。",
                then: &["さらに一時停止するには: koboshi pause --for 2h"],
            },
        },
        Notice::Test => Row {
            en: Words {
                what: "Test from koboshi on {host}",
                why: "Why: somebody asked for it with koboshi alert test.",
                then: &["If you can read this, alerts about {node} reach you. You need not do anything."],
            },
            ja: Words {
                what: "{host} の koboshi からのテストです",
                why: "理由: koboshi alert test が実行されました。",
                then: &["これが読めれば、{node} の通知は届きます。操作は必要ありません。"],
            },
        },
    }
}

fn healed(language: Language, layer: Option<Layer>, down_ms: f64) -> String {
    let down = (down_ms > 0.0).then(|| span(language, down_ms));
    match language {
        Language::English => {
            let by = match layer {
                Some(l) => format!("Healed by {l}"),
                None => "It came back by itself".to_owned(),
            };
            match down {
                Some(down) => format!("{by}; it was down for {down}."),
                None => format!("{by}; it never stopped serving."),
            }
        }
        Language::Japanese => {
            let by = match layer {
                Some(l) => format!("{l} により復旧しました。"),
                None => "自然に復旧しました。".to_owned(),
            };
            match down {
                Some(down) => format!("{by}停止時間は {down}です。"),
                None => format!("{by}稼働は途切れませんでした。"),
            }
        }
    }
}

fn undo(language: Language, facts: &Facts) -> String {
    let place = facts.replaced.as_deref().map(|p| one_line(p, FACT_LIMIT_CHARS));
    let incident = one_line(&facts.incident, FACT_LIMIT_CHARS);
    match (language, place) {
        (Language::English, Some(p)) => {
            format!("To undo: what was replaced lies in {p}; file by file: koboshi incidents show {incident}")
        }
        (Language::English, None) => {
            "To undo: nothing was replaced, so there is nothing to put back.".to_owned()
        }
        (Language::Japanese, Some(p)) => {
            format!("元に戻すには: 置き換えたものは {p} にあります。内訳: koboshi incidents show {incident}")
        }
        (Language::Japanese, None) => {
            "元に戻すには: 何も置き換えていないので、戻すものはありません。".to_owned()
        }
    }
}

fn pause(language: Language) -> &'static str {
    match language {
        Language::English => "To keep koboshi's hands off for a while: koboshi pause --for 2h",
        Language::Japanese => "koboshi にしばらく手を出させないには: koboshi pause --for 2h",
    }
}

fn and_more(language: Language, count: usize) -> String {
    match language {
        Language::English => format!("- and {count} more"),
        Language::Japanese => format!("- ほか {count} 件"),
    }
}

/// A duration as people say it: `850 ms`, `42.0 s`, `3 min 5 s`, `2 h 10 min`.
fn span(language: Language, ms: f64) -> String {
    let (milli, second, minute, hour) = match language {
        Language::English => (" ms", " s", " min", " h"),
        Language::Japanese => ("ミリ秒", "秒", "分", "時間"),
    };
    let between = match language {
        Language::English => " ",
        Language::Japanese => "",
    };
    let s = ms / 1000.0;
    if s < 1.0 {
        return format!("{ms:.0}{milli}");
    }
    if s < 60.0 {
        return format!("{s:.1}{second}");
    }
    // Whole seconds from here on; a float of days fits any u64.
    let whole = s.round() as u64;
    if whole < 3_600 {
        return format!("{}{minute}{between}{}{second}", whole / 60, whole % 60);
    }
    format!("{}{hour}{between}{}{minute}", whole / 3_600, whole % 3_600 / 60)
}

fn fill(template: &str, facts: &Facts) -> String {
    // Pieces are copied, not replaced in turn: a node named `{host}` stays what it is.
    let mut out = String::new();
    let mut rest = template;
    while let Some(start) = rest.find('{') {
        out.push_str(&rest[..start]);
        let tail = &rest[start..];
        let (value, used) = [
            ("{node}", &facts.node),
            ("{host}", &facts.host),
            ("{incident}", &facts.incident),
            ("{why}", &facts.why),
        ]
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

    const EVERY: [Kind; 20] = [
        Kind::Opening,
        Kind::Emergency,
        Kind::Closing,
        Kind::Notice(Notice::BackupStale),
        Kind::Notice(Notice::StoreDamaged),
        Kind::Notice(Notice::LeftAlone),
        Kind::Notice(Notice::NotMended),
        Kind::Notice(Notice::StoppedByOwner),
        Kind::Notice(Notice::StartedAgain),
        Kind::Notice(Notice::Home),
        Kind::Notice(Notice::UpdateLong),
        Kind::Notice(Notice::NewBaseline),
        Kind::Notice(Notice::FileMissing),
        Kind::Notice(Notice::Degraded),
        Kind::Notice(Notice::Certificate),
        Kind::Notice(Notice::OwnSide),
        Kind::Notice(Notice::JournalUnwritable),
        Kind::Notice(Notice::DiskLow),
        Kind::Notice(Notice::PauseEnded),
        Kind::Notice(Notice::Test),
    ];

    const BOTH: [Language; 2] = [Language::English, Language::Japanese];

    #[test]
    fn every_kind_says_what_why_and_what_to_do() {
        for (kind, language) in EVERY.into_iter().flat_map(|k| BOTH.map(|l| (k, l))) {
            let m = Message::new(kind, &facts(), language);
            assert!(m.title.contains("attic"), "{m:?}");
            assert!(!m.title.contains('{') && !m.text.contains('{'), "unfilled: {m:?}");
            let lines: Vec<&str> = m.text.lines().collect();
            let why = if kind == Kind::Closing { lines[1] } else { lines[0] };
            assert!(why.starts_with("Why: ") || why.starts_with("理由: "), "{m:?}");
            assert!(lines.len() >= 2, "nothing to do: {m:?}");
            assert_eq!(m.key, format!("2026-11-22-1/{}", kind.name()));
        }
    }

    /// The placeholders and the commands of a sentence, sorted: these no translation may lose or invent.
    fn fixed(text: &str) -> Vec<String> {
        let commands = text.split("koboshi ").skip(1).filter_map(|rest| {
            let word: String = rest.chars().take_while(|c| c.is_ascii_lowercase()).collect();
            let known = ["doctor", "snapshot", "recover", "node", "incidents", "status", "pause", "alert"];
            known.contains(&word.as_str()).then(|| format!("koboshi {word}"))
        });
        let places = text.split('{').skip(1).filter_map(|rest| rest.split_once('}'));
        let mut all: Vec<String> = commands.chain(places.map(|(name, _)| name.to_owned())).collect();
        all.sort();
        all
    }

    #[test]
    fn both_tables_are_complete_and_say_the_same() {
        for (kind, serves) in EVERY.into_iter().flat_map(|k| [(k, false), (k, true)]) {
            let Row { en, ja } = words(kind, serves);
            for (e, j) in [(en.what, ja.what), (en.why, ja.why)] {
                assert!(!e.is_empty() && !j.is_empty(), "{kind:?}");
                assert_eq!(fixed(e), fixed(j), "{kind:?}: {e} / {j}");
            }
            assert_eq!(en.then.len(), ja.then.len(), "{kind:?}");
            for (e, j) in en.then.iter().zip(ja.then) {
                assert_eq!(fixed(e), fixed(j), "{kind:?}: {e} / {j}");
            }
            let sentences =
                |w: &Words| [w.what, w.why].into_iter().chain(w.then.iter().copied()).collect::<String>();
            assert!(sentences(&en).is_ascii(), "{kind:?}");
            assert!(sentences(&ja).chars().any(|c| ('ぁ'..='ヿ').contains(&c)), "{kind:?}");
        }
        let f = Facts { replaced: Some("/q/7".into()), ..facts() };
        for (e, j) in [
            (undo(Language::English, &f), undo(Language::Japanese, &f)),
            (undo(Language::English, &facts()), undo(Language::Japanese, &facts())),
            (pause(Language::English).to_owned(), pause(Language::Japanese).to_owned()),
            (and_more(Language::English, 3), and_more(Language::Japanese, 3)),
            (
                healed(Language::English, Some(Layer::Restore), 0.0),
                healed(Language::Japanese, Some(Layer::Restore), 0.0),
            ),
        ] {
            assert_eq!(fixed(&e), fixed(&j), "{e} / {j}");
            for part in ["/q/7", "2026-11-22-1", "3", "restore"] {
                assert_eq!(e.contains(part), j.contains(part), "{e} / {j}");
            }
        }
    }

    #[test]
    fn no_title_and_no_sentence_alone_is_cut() {
        for (kind, language) in EVERY.into_iter().flat_map(|k| BOTH.map(|l| (k, l))) {
            let f = Facts { node: "n".repeat(24), host: "h".repeat(40), ..facts() };
            let m = Message::new(kind, &f, language);
            assert!(!m.title.ends_with('…'), "{}", m.title);
        }
    }

    #[test]
    fn what_serves_is_never_told_to_be_down() {
        let f = Facts { serves: true, ..facts() };
        let title = |kind| Message::new(kind, &f, Language::English).title;
        assert_eq!(title(Kind::Opening), "main on attic is damaged and still serves");
        assert_eq!(title(Kind::Closing), "main on attic is whole again");
        let m = Message::new(Kind::Notice(Notice::NotMended), &f, Language::English);
        assert!(m.title.contains("serves") && !m.title.contains("down"), "{}", m.title);
        assert_eq!(m.kind.severity(), Severity::Warning, "a person may help, and need not at once");
    }

    #[test]
    fn a_closing_message_ends_with_undo_and_pause_whatever_its_length() {
        for replaced in [None, Some("/var/lib/koboshi/quarantine/00000007".to_owned())] {
            let f = Facts {
                replaced: replaced.clone(),
                layer: Some(Layer::Restore),
                down_ms: 185_000.0,
                details: vec!["x".repeat(5_000); 50],
                ..facts()
            };
            let m = Message::new(Kind::Closing, &f, Language::English);
            let last: Vec<&str> = m.text.lines().rev().take(2).collect();
            assert!(last[0].contains("koboshi pause"), "{}", m.text);
            assert!(last[1].starts_with("To undo: "), "{}", m.text);
            if let Some(place) = replaced {
                assert!(last[1].contains(&place) && last[1].contains("incidents show 2026-11-22-1"));
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
        assert_eq!(m.text.lines().next(), Some("Why: a b [31m"));
    }

    #[test]
    fn spans_are_said_as_people_say_them() {
        let said = |language| [850.0, 42_000.0, 185_400.0, 7_800_000.0].map(|ms| span(language, ms));
        assert_eq!(said(Language::English), ["850 ms", "42.0 s", "3 min 5 s", "2 h 10 min"]);
        assert_eq!(said(Language::Japanese), ["850ミリ秒", "42.0秒", "3分5秒", "2時間10分"]);
    }

    #[test]
    fn the_language_is_read_off_the_locale() {
        for (locale, language) in [
            ("ja_JP.UTF-8", Language::Japanese),
            ("ja", Language::Japanese),
            ("ja-JP", Language::Japanese),
            ("en_US.UTF-8", Language::English),
            ("jam_JM", Language::English),
            ("C.UTF-8", Language::English),
            ("", Language::English),
        ] {
            assert_eq!(Language::of_locale(locale), language, "{locale}");
        }
    }

    #[test]
    fn a_message_goes_through_json_unchanged() {
        for (kind, language) in EVERY.into_iter().flat_map(|k| BOTH.map(|l| (k, l))) {
            let m = Message::new(kind, &facts(), language);
            let back: Message = serde_json::from_slice(&serde_json::to_vec(&m).unwrap()).unwrap();
            assert_eq!(back, m);
        }
    }
}
