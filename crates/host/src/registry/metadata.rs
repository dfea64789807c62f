//! What a registry says of a package, read as a stream: of a document of many megabytes only the few fields
//! needed of the versions asked for stay in memory.

use super::{Integrity, Package};
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;

/// Versions kept of one package at most; the busiest packages have a few thousand.
const VERSIONS_LIMIT: usize = 20_000;
/// Dist-tags kept of one package at most.
const TAGS_LIMIT: usize = 1_000;

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Exactly this version.
    Exact(String),
    /// The newest release of this major, or of this major and minor.
    Line(u64, Option<u64>),
    /// Whatever this dist-tag names.
    Tag(String),
}

impl Wanted {
    /// `26`, `26.x`, `26.10`, `26.10.0`, `26.10.0-rc.1`, `latest`; `None` for what is none of these.
    pub(super) fn parse(text: &str) -> Option<Wanted> {
        let text = text.trim();
        let text = text
            .strip_prefix(['v', '='])
            .filter(|t| t.starts_with(|c: char| c.is_ascii_digit()))
            .unwrap_or(text);
        if text.is_empty() {
            return Some(Wanted::Tag("latest".into()));
        }
        if Version::parse(text).is_some() {
            return Some(Wanted::Exact(text.into()));
        }
        let parts: Vec<&str> = text.split('.').filter(|p| !matches!(*p, "x" | "X" | "*")).collect();
        let numbers: Option<Vec<u64>> = parts.iter().map(|p| number(p)).collect();
        match numbers.as_deref() {
            Some([major]) => return Some(Wanted::Line(*major, None)),
            Some([major, minor]) => return Some(Wanted::Line(*major, Some(*minor))),
            Some(_) | None => {}
        }
        let word = text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        let starts_well = text.starts_with(|c: char| c.is_ascii_alphabetic());
        (word && starts_well).then(|| Wanted::Tag(text.into()))
    }

    fn keeps(&self, version: &str) -> bool {
        match self {
            Wanted::Exact(exact) => exact == version,
            Wanted::Line(major, minor) => Version::parse(version).is_some_and(|v| {
                v.pre.is_none() && v.major == *major && minor.is_none_or(|minor| v.minor == minor)
            }),
            Wanted::Tag(_) => true,
        }
    }
}

/// The parts of a version that order it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Version {
    major: u64,
    minor: u64,
    patch: u64,
    pre: Option<String>,
}

impl Version {
    fn parse(text: &str) -> Option<Version> {
        let text = text.split('+').next()?;
        let (core, pre) = text.split_once('-').map_or((text, None), |(c, p)| (c, Some(p.to_string())));
        let mut parts = core.split('.').map(number);
        let (major, minor, patch) = (parts.next()??, parts.next()??, parts.next()??);
        parts.next().is_none().then_some(Version { major, minor, patch, pre })
    }

    /// Order among releases; pre-releases never meet here.
    fn cmp_release(&self, other: &Version) -> Ordering {
        (self.major, self.minor, self.patch).cmp(&(other.major, other.minor, other.patch))
    }
}

fn number(text: &str) -> Option<u64> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

/// One version as the registry describes it. Everything may be missing or of another type in old packages.
#[derive(Debug, Default, Deserialize, Serialize, Clone)]
#[serde(default)]
pub(super) struct Manifest {
    #[serde(deserialize_with = "lenient_text")]
    pub(super) name: Option<String>,
    #[serde(deserialize_with = "lenient_text")]
    pub(super) version: Option<String>,
    #[serde(deserialize_with = "lenient_flag")]
    deprecated: bool,
    #[serde(deserialize_with = "node_engine")]
    engines: Option<String>,
    dist: Dist,
}

#[derive(Debug, Default, Deserialize, Serialize, Clone)]
#[serde(default)]
struct Dist {
    #[serde(deserialize_with = "lenient_text")]
    tarball: Option<String>,
    #[serde(deserialize_with = "lenient_text")]
    integrity: Option<String>,
    #[serde(rename = "unpackedSize", deserialize_with = "lenient_size")]
    unpacked_size: Option<u64>,
}

fn lenient_text<'de, D: Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    Ok(serde_json::Value::deserialize(d)?.as_str().map(str::to_string))
}

fn lenient_size<'de, D: Deserializer<'de>>(d: D) -> Result<Option<u64>, D::Error> {
    Ok(serde_json::Value::deserialize(d)?.as_u64())
}

/// A package is deprecated by a message; an empty one takes it back.
fn lenient_flag<'de, D: Deserializer<'de>>(d: D) -> Result<bool, D::Error> {
    let flag = serde_json::Value::deserialize(d)?;
    Ok(flag.as_str().is_some_and(|s| !s.is_empty()) || flag.as_bool() == Some(true))
}

fn node_engine<'de, D: Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    let engines = serde_json::Value::deserialize(d)?;
    Ok(engines.get("node").and_then(|v| v.as_str()).map(str::to_string))
}

impl Manifest {
    /// What is needed to fetch it, or what is missing.
    pub(super) fn package(&self, name: &str, version: &str) -> Result<Package, String> {
        if self.name.as_deref() != Some(name) {
            return Err(format!("the answer describes {}", self.name.as_deref().unwrap_or("no package")));
        }
        if self.version.as_deref() != Some(version) {
            let other = self.version.as_deref().unwrap_or("no version");
            return Err(format!("the answer describes {other} instead of {version}"));
        }
        let tarball = self.dist.tarball.clone().ok_or("the answer names no tarball")?;
        let integrity = self.dist.integrity.as_deref().and_then(Integrity::parse);
        Ok(Package {
            name: name.to_string(),
            version: version.to_string(),
            tarball_url: tarball,
            integrity: integrity.ok_or("the answer gives no sha512 integrity")?,
            engines_node: self.engines.clone(),
            unpacked_size: self.dist.unpacked_size,
        })
    }
}

/// A package's document, reduced to the versions asked for.
#[derive(Debug, Default)]
pub(super) struct Packument {
    tags: BTreeMap<String, String>,
    versions: BTreeMap<String, Manifest>,
}

impl Packument {
    /// Reads the document, keeping only what `wanted` may need.
    pub(super) fn read(from: impl std::io::Read, wanted: &Wanted) -> serde_json::Result<Packument> {
        let mut json = serde_json::Deserializer::from_reader(from);
        let packument = Reduce(wanted).deserialize(&mut json)?;
        json.end()?;
        Ok(packument)
    }

    /// The version that npm would choose: the tag's; of a line the tag `latest` if it lies within, else the
    /// newest that is not deprecated, else the newest.
    pub(super) fn pick(&self, wanted: &Wanted) -> Option<(&str, &Manifest)> {
        let entry = |v: &String| self.versions.get_key_value(v).map(|(k, m)| (k.as_str(), m));
        match wanted {
            Wanted::Exact(version) => entry(version),
            Wanted::Tag(tag) => self.tags.get(tag).and_then(entry),
            Wanted::Line(..) => {
                if let Some(latest) = self.tags.get("latest").and_then(entry).filter(|(_, m)| !m.deprecated) {
                    return Some(latest);
                }
                let newest = |deprecated: bool| {
                    let fitting = self.versions.iter().filter(move |(_, m)| m.deprecated == deprecated);
                    fitting
                        .filter_map(|(v, m)| Some((Version::parse(v)?, v, m)))
                        .max_by(|(a, ..), (b, ..)| a.cmp_release(b))
                        .map(|(_, v, m)| (v.as_str(), m))
                };
                newest(false).or_else(|| newest(true))
            }
        }
    }
}

/// Reads a packument, dropping what is not wanted as it passes.
struct Reduce<'a>(&'a Wanted);

impl<'de> DeserializeSeed<'de> for Reduce<'_> {
    type Value = Packument;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Packument, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Reduce<'_> {
    type Value = Packument;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a package document")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Packument, A::Error> {
        let mut packument = Packument::default();
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "dist-tags" => packument.tags = map.next_value_seed(Tags)?,
                "versions" => packument.versions = map.next_value_seed(Versions(self.0))?,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(packument)
    }
}

struct Tags;

impl<'de> DeserializeSeed<'de> for Tags {
    type Value = BTreeMap<String, String>;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Tags {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("dist-tags")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut tags = BTreeMap::new();
        while let Some((tag, version)) = map.next_entry::<String, String>()? {
            if tags.len() >= TAGS_LIMIT {
                return Err(serde::de::Error::custom("absurdly many dist-tags"));
            }
            tags.insert(tag, version);
        }
        Ok(tags)
    }
}

struct Versions<'a>(&'a Wanted);

impl<'de> DeserializeSeed<'de> for Versions<'_> {
    type Value = BTreeMap<String, Manifest>;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Versions<'_> {
    type Value = BTreeMap<String, Manifest>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("versions")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut versions = BTreeMap::new();
        while let Some(version) = map.next_key::<String>()? {
            if !self.0.keeps(&version) {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if versions.len() >= VERSIONS_LIMIT {
                return Err(serde::de::Error::custom("absurdly many versions"));
            }
            versions.insert(version, map.next_value()?);
        }
        Ok(versions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for() {
        let line = |major, minor| Some(Wanted::Line(major, minor));
        let exact = |v: &str| Some(Wanted::Exact(v.into()));
        let tag = |v: &str| Some(Wanted::Tag(v.into()));
        for (text, wanted) in [
            ("26", line(26, None)),
            ("v26", line(26, None)),
            ("26.x", line(26, None)),
            ("26.10", line(26, Some(10))),
            ("26.10.x", line(26, Some(10))),
            ("26.10.0", exact("26.10.0")),
            ("v26.10.0", exact("26.10.0")),
            ("2026.9.6-beta.1", exact("2026.9.6-beta.1")),
            ("latest", tag("latest")),
            ("", tag("latest")),
            ("next-11", tag("next-11")),
            ("../x", None),
            ("a/b", None),
            (">=1", None),
            ("1.2.3.4", None),
        ] {
            assert_eq!(Wanted::parse(text), wanted, "{text}");
        }
    }

    fn packument(latest: &str, versions: &[(&str, &str)]) -> String {
        let versions: Vec<String> = versions
            .iter()
            .map(|(v, more)| format!(r#""{v}":{{"name":"p","version":"{v}","junk":[1,{{"a":null}}]{more}}}"#))
            .collect();
        format!(
            r#"{{"readme":"x","versions":{{{}}},"dist-tags":{{"latest":"{latest}","old":"1.0.0"}}}}"#,
            versions.join(",")
        )
    }

    fn picked(doc: &str, wanted: &str) -> Option<String> {
        let wanted = Wanted::parse(wanted).unwrap();
        let packument = Packument::read(doc.as_bytes(), &wanted).unwrap();
        packument.pick(&wanted).map(|(v, _)| v.to_string())
    }

    #[test]
    fn npms_choice() {
        let gone = r#","deprecated":"no""#;
        let doc = packument(
            "2.1.0",
            &[
                ("1.0.0", ""),
                ("2.0.0", ""),
                ("2.1.0", ""),
                ("2.10.0", ""),
                ("2.9.0", ""),
                ("3.0.0-rc.1", ""),
                ("4.0.0", gone),
            ],
        );
        let pick = |wanted| picked(&doc, wanted);
        assert_eq!(pick("latest").as_deref(), Some("2.1.0"));
        assert_eq!(pick("2").as_deref(), Some("2.1.0"), "latest within the line is preferred");
        assert_eq!(pick("2.9").as_deref(), Some("2.9.0"));
        assert_eq!(pick("1").as_deref(), Some("1.0.0"));
        assert_eq!(pick("old").as_deref(), Some("1.0.0"));
        assert_eq!(pick("3"), None, "a pre-release is only had by its full name");
        assert_eq!(pick("3.0.0-rc.1").as_deref(), Some("3.0.0-rc.1"));
        assert_eq!(pick("4").as_deref(), Some("4.0.0"), "a deprecated one if there is nothing else");
        assert_eq!(pick("5"), None);
        assert_eq!(pick("nosuchtag"), None);
        let doc = packument("2.1.0", &[("2.0.0", ""), ("2.1.0", gone)]);
        assert_eq!(picked(&doc, "2").as_deref(), Some("2.0.0"), "a deprecated latest is no reason");
        let doc = packument("1.0.0", &[("1.0.0", ""), ("2.9.0", ""), ("2.10.0", ""), ("2.11.0", gone)]);
        assert_eq!(picked(&doc, "2").as_deref(), Some("2.10.0"), "by number, not by text; deprecated last");
    }

    #[test]
    fn odd_old_manifests_do_not_spoil_the_rest() {
        let doc = packument(
            "1.0.0",
            &[("0.0.1", r#","engines":["node >= 0.4"],"deprecated":false"#), ("1.0.0", "")],
        );
        assert_eq!(picked(&doc, "latest").as_deref(), Some("1.0.0"));
    }

    #[test]
    fn a_cut_document_is_an_error() {
        let doc = packument("1.0.0", &[("1.0.0", "")]);
        for cut in [1, doc.len() / 2, doc.len() - 1] {
            assert!(Packument::read(&doc.as_bytes()[..cut], &Wanted::Tag("latest".into())).is_err(), "{cut}");
        }
    }
}
