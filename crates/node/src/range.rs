//! Version ranges as `package.json` writes them for `engines`: alternatives of conjunctions of comparators.
//!
//! Only what engine ranges use: `>=`, `>`, `<=`, `<`, `=`, `^`, `~`, partial versions, `x` and `*`, hyphen ranges
//! and `||`. Anything else is "not understood", which closes no gate: a range that we cannot read is not proof that
//! a runtime is unfit.

use std::fmt;

/// A version of three numbers; what follows a `-` or `+` is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u64, pub u64, pub u64);

impl Version {
    /// Reads `v26.10.0`, `26.10.0`, `26.10` or `26` (missing parts are 0).
    #[must_use]
    pub fn parse(text: &str) -> Option<Version> {
        let p = Partial::parse(text)?;
        Some(Version(p.major?, p.minor.unwrap_or(0), p.patch.unwrap_or(0)))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// Whether `version` lies within `range`; `None` when the range is not understood.
#[must_use]
pub fn satisfies(range: &str, version: Version) -> Option<bool> {
    /// No engine range in the wild has more alternatives; a hostile one costs nothing beyond this.
    const ALTERNATIVES_LIMIT: usize = 32;
    let mut any = false;
    for alternative in range.split("||").take(ALTERNATIVES_LIMIT) {
        any |= conjunction(alternative.trim(), version)?;
    }
    Some(any)
}

#[derive(Debug, Clone, Copy)]
struct Partial {
    major: Option<u64>,
    minor: Option<u64>,
    patch: Option<u64>,
}

impl Partial {
    fn parse(text: &str) -> Option<Partial> {
        let text = text.trim().trim_start_matches(['v', 'V', '=']);
        let core = text.split(['-', '+']).next()?;
        let mut parts = core.split('.');
        let mut next = || -> Option<Option<u64>> {
            match parts.next() {
                None | Some("x" | "X" | "*") => Some(None),
                Some(n) => n.parse().ok().map(Some),
            }
        };
        let (major, minor, patch) = (next()?, next()?, next()?);
        if core.is_empty() || parts.next().is_some() {
            return None;
        }
        Some(Partial { major, minor, patch })
    }

    fn low(self) -> Version {
        Version(self.major.unwrap_or(0), self.minor.unwrap_or(0), self.patch.unwrap_or(0))
    }

    /// The first version above everything this partial stands for; `None` = nothing is above it.
    fn above(self) -> Option<Version> {
        match (self.major, self.minor, self.patch) {
            (None, _, _) => None,
            (Some(a), None, _) => Some(Version(a.saturating_add(1), 0, 0)),
            (Some(a), Some(b), None) => Some(Version(a, b.saturating_add(1), 0)),
            (Some(a), Some(b), Some(c)) => Some(Version(a, b, c.saturating_add(1))),
        }
    }
}

fn conjunction(text: &str, v: Version) -> Option<bool> {
    if let Some((low, high)) = text.split_once(" - ") {
        let (low, high) = (Partial::parse(low)?, Partial::parse(high)?);
        return Some(v >= low.low() && high.above().is_none_or(|top| v < top));
    }
    let spaced = join_operators(text);
    let mut all = true;
    for comparator in spaced.split_whitespace() {
        all &= one(comparator, v)?;
    }
    Some(all)
}

/// `>= 24` is written with a space as often as without: the operator is put to its version.
fn join_operators(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut after_operator = false;
    for c in text.chars() {
        if after_operator && c.is_whitespace() {
            continue;
        }
        after_operator = matches!(c, '<' | '>' | '=' | '^' | '~');
        out.push(c);
    }
    out
}

fn one(comparator: &str, v: Version) -> Option<bool> {
    let split =
        comparator.find(|c: char| !matches!(c, '<' | '>' | '=' | '^' | '~')).unwrap_or(comparator.len());
    let (operator, rest) = comparator.split_at(split);
    let p = Partial::parse(rest)?;
    let below = |top: Option<Version>| top.is_none_or(|t| v < t);
    Some(match operator {
        "" | "=" => v >= p.low() && below(p.above()),
        ">=" => v >= p.low(),
        "<" => v < p.low(),
        "<=" => below(p.above()),
        ">" => p.above().is_some_and(|top| v >= top),
        "~" => {
            let top = match (p.major, p.minor) {
                (Some(a), Some(b)) => Some(Version(a, b.saturating_add(1), 0)),
                (Some(a), None) => Some(Version(a.saturating_add(1), 0, 0)),
                (None, _) => None,
            };
            v >= p.low() && below(top)
        }
        "^" => {
            let top = match (p.major, p.minor, p.patch) {
                (Some(0), Some(0), Some(c)) => Some(Version(0, 0, c.saturating_add(1))),
                (Some(0), Some(b), _) => Some(Version(0, b.saturating_add(1), 0)),
                (Some(a), _, _) => Some(Version(a.saturating_add(1), 0, 0)),
                (None, _, _) => None,
            };
            v >= p.low() && below(top)
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_hold_what_they_say() {
        let openclaw = ">=24.16.0 <25 || >=26.1.0";
        let table: &[(&str, &str, Option<bool>)] = &[
            (openclaw, "24.16.0", Some(true)),
            (openclaw, "24.15.9", Some(false)),
            (openclaw, "24.99.1", Some(true)),
            (openclaw, "25.0.0", Some(false)),
            (openclaw, "26.0.9", Some(false)),
            (openclaw, "26.1.0", Some(true)),
            (openclaw, "v26.10.0", Some(true)),
            (openclaw, "27.0.0", Some(true)),
            (openclaw, "22.3.0", Some(false)),
            (">= 24.16 < 25 || >= 26.1", "24.16.0", Some(true)),
            (">= 24.16 < 25 || >= 26.1", "25.1.0", Some(false)),
            ("^20.1", "20.9.0", Some(true)),
            ("^20.1", "20.0.9", Some(false)),
            ("^20.1", "21.0.0", Some(false)),
            ("^0.2.3", "0.2.9", Some(true)),
            ("^0.2.3", "0.3.0", Some(false)),
            ("~1.2", "1.2.9", Some(true)),
            ("~1.2", "1.3.0", Some(false)),
            ("20 || 22", "22.4.1", Some(true)),
            ("20 || 22", "21.4.1", Some(false)),
            ("20.x", "20.4.1", Some(true)),
            ("*", "1.0.0", Some(true)),
            ("", "1.0.0", Some(true)),
            (">20", "20.4.1", Some(false)),
            (">20", "21.0.0", Some(true)),
            ("<=20", "20.9.9", Some(true)),
            ("18 - 20.2", "20.2.9", Some(true)),
            ("18 - 20.2", "20.3.0", Some(false)),
            ("=22.1.0", "22.1.0", Some(true)),
            ("lts/*", "22.1.0", None),
            (">=banana", "22.1.0", None),
            ("1.2.3.4", "1.2.3", None),
        ];
        for (range, version, want) in table {
            let v = Version::parse(version).expect(version);
            assert_eq!(satisfies(range, v), *want, "{range} of {version}");
        }
    }

    #[test]
    fn versions_are_read_as_node_prints_them() {
        assert_eq!(Version::parse("v26.10.0\n"), Some(Version(26, 10, 0)));
        assert_eq!(Version::parse("24.16.0-nightly2026"), Some(Version(24, 16, 0)));
        for bad in ["", "v", "node", "1..2", "-1.0.0"] {
            assert_eq!(Version::parse(bad), None, "{bad}");
        }
    }
}
