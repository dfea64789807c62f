//! The only place that writes to a terminal.
//!
//! Guarantees: with `--json` standard output holds exactly one object and nothing else, also on failure; progress
//! and logs go to standard error; an error is one line of what, one of why and one of what to do.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the one printer of the house")]

use host::Error;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use std::io::{IsTerminal, Write};

/// The version of every JSON object that koboshi prints; raised when a field changes its meaning.
pub const SCHEMA: u32 = 1;

/// How the process ends, as documented for every command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Serving, or done.
    Done,
    /// Not serving, or failed.
    Failed,
    /// Usage or configuration.
    Usage,
    /// Inconclusive.
    Inconclusive,
    /// In emergency.
    Emergency,
}

impl Exit {
    /// The exit code.
    pub fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::Inconclusive => 3,
            Exit::Emergency => 4,
        }
    }
}

/// Where everything a person reads goes through.
#[derive(Debug, Clone, Copy)]
pub struct Printer {
    json: bool,
    colour: bool,
}

impl Printer {
    /// A printer for this run; colour only on a terminal and without `NO_COLOR`.
    pub fn new(json: bool) -> Printer {
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        Printer { json, colour: !json && !no_colour && std::io::stdout().is_terminal() }
    }

    /// Whether the caller asked for one JSON object.
    pub fn is_json(self) -> bool {
        self.json
    }

    /// A line for people, on standard output; swallowed under `--json`.
    pub fn line(self, text: impl AsRef<str>) {
        if !self.json {
            // A reader that went away (`| head`) is no reason to fail.
            let _ = writeln!(std::io::stdout(), "{}", text.as_ref());
        }
    }

    /// A line about work in progress, on standard error, in both forms.
    pub fn note(self, text: impl AsRef<str>) {
        let _ = writeln!(std::io::stderr(), "{}", text.as_ref());
    }

    /// The one JSON object; `schema` is added in front. Prints nothing for people.
    pub fn object(self, value: Value) {
        if self.json {
            let mut object = serde_json::Map::new();
            object.insert("schema".into(), json!(SCHEMA));
            if let Value::Object(fields) = value {
                object.extend(fields);
            }
            let _ = writeln!(std::io::stdout(), "{}", Value::Object(object));
        }
    }

    /// An error, in whichever form was asked for.
    pub fn error(self, error: &Error) {
        if self.json {
            let mut body = json!({"what": error.what, "why": error.why});
            if let Some(hint) = &error.hint {
                body["hint"] = json!(hint);
            }
            self.object(json!({ "error": body }));
        } else {
            let _ = writeln!(std::io::stderr(), "{} {}", self.red("error:"), error.what);
            let _ = writeln!(std::io::stderr(), "  why: {}", error.why);
            if let Some(hint) = &error.hint {
                let _ = writeln!(std::io::stderr(), "  fix: {hint}");
            }
        }
    }

    /// Standard output as it is, for completions and man pages.
    pub fn raw(self, bytes: &[u8]) {
        let _ = std::io::stdout().write_all(bytes);
    }

    /// A progress bar over bytes on a terminal; a plain line at the start elsewhere.
    pub fn bar(self, label: &str, total: u64) -> Bar {
        if !std::io::stderr().is_terminal() {
            self.note(format!("{label} …"));
            return Bar { bar: None };
        }
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        if let Ok(style) =
            ProgressStyle::with_template("{prefix:28} {bar:32} {bytes:>10}/{total_bytes:10} {elapsed}")
        {
            bar.set_style(style);
        }
        bar.set_prefix(label.to_owned());
        Bar { bar: Some(bar) }
    }

    /// A spinner for work whose size is unknown.
    pub fn spinner(self, label: &str) -> Bar {
        if !std::io::stderr().is_terminal() {
            self.note(format!("{label} …"));
            return Bar { bar: None };
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {elapsed}") {
            bar.set_style(style);
        }
        bar.set_prefix(label.to_owned());
        bar.enable_steady_tick(std::time::Duration::from_millis(120));
        Bar { bar: Some(bar) }
    }

    /// Green, where colours are.
    pub fn green(self, text: &str) -> String {
        self.paint("32", text)
    }

    /// Red, where colours are.
    pub fn red(self, text: &str) -> String {
        self.paint("31", text)
    }

    /// Yellow, where colours are.
    pub fn yellow(self, text: &str) -> String {
        self.paint("33", text)
    }

    /// Bold, where colours are.
    pub fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colour { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }

    /// Rows under headings, columns as wide as their widest cell.
    pub fn table(self, headings: &[&str], rows: &[Vec<String>]) {
        if self.json {
            return;
        }
        let widths: Vec<usize> = headings
            .iter()
            .enumerate()
            .map(|(i, h)| {
                rows.iter()
                    .filter_map(|r| r.get(i))
                    .map(|c| c.chars().count())
                    .chain([h.chars().count()])
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let render = |cells: &[String]| {
            cells
                .iter()
                .zip(&widths)
                .map(|(c, w)| format!("{c}{}", " ".repeat(w.saturating_sub(c.chars().count()))))
                .collect::<Vec<_>>()
                .join("  ")
                .trim_end()
                .to_owned()
        };
        let heads: Vec<String> = headings.iter().map(|h| (*h).to_owned()).collect();
        self.line(self.bold(&render(&heads)));
        for row in rows {
            self.line(render(row));
        }
    }
}

/// A bar that may not be there.
#[derive(Debug)]
pub struct Bar {
    bar: Option<ProgressBar>,
}

impl Bar {
    /// Sets what is done and, once known, of how much.
    pub fn set(&self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            if total > 0 {
                bar.set_length(total);
            }
            bar.set_position(done);
        }
    }

    /// Takes the bar off the screen.
    pub fn done(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Bytes as a person says them.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Milliseconds as a person says them.
pub fn duration(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{:.1} s", ms as f64 / 1000.0),
        60_000..3_600_000 => format!("{} min {} s", ms / 60_000, ms % 60_000 / 1000),
        3_600_000..172_800_000 => format!("{} h {} min", ms / 3_600_000, ms % 3_600_000 / 60_000),
        _ => format!("{} days", ms / 86_400_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_durations_read_like_speech() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1_500_000), "1.5 MB");
        assert_eq!(duration(999), "999 ms");
        assert_eq!(duration(61_000), "1 min 1 s");
        assert_eq!(duration(3_600_000 * 49), "2 days");
    }
}
