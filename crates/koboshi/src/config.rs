//! The configuration: one TOML file and its drop-ins, read strictly.
//!
//! Every value has a default, so an empty file guards a standard node. An unknown key is an error that names the
//! nearest valid one: a misspelt limit that is silently ignored is found out at 3 a.m.

use host::{Context, Error, Kind, Result, files};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A configuration file is a page of text; more is somebody's mistake.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Drop-ins beyond this many are somebody's mistake too.
const MAX_DROP_INS: usize = 100;

/// What the agent may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Judge and repair.
    #[default]
    Guard,
    /// Judge, journal, tell what would have been done; touch nothing.
    Watch,
}

/// Which service manager runs the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServiceChoice {
    /// The unit that was found, else embedded.
    #[default]
    Auto,
    /// koboshi itself supervises the gateway.
    Embedded,
    /// The node's systemd user unit.
    SystemdUser,
    /// The node's systemd system unit.
    SystemdSystem,
}

/// The whole configuration.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `guard` or `watch`.
    pub mode: Mode,
    /// Where snapshots, journal and quarantine lie.
    pub state_dir: Option<PathBuf>,
    /// Where what need not survive a reboot lies.
    pub run_dir: Option<PathBuf>,
    /// Which node, where it is not found by itself.
    pub node: NodeHint,
    /// The service manager.
    pub service: Service,
    /// The judge's limits.
    pub judge: node::judge::Limits,
    /// Snapshots of daily operation.
    pub backup: Backup,
    /// The store's limits.
    pub store: StoreLimits,
    /// The ladder.
    pub ladder: Climbing,
    /// Where alerts go.
    pub alert: Vec<alert::Channel>,
    /// The language of alerts; that of the environment when none.
    pub language: Option<alert::Language>,
    /// Whether the node's own chat accounts are used as well.
    pub node_channels: NodeChannels,
    /// An address that is told regularly that all is well.
    pub heartbeat: Heartbeat,
    /// Other hosts whose nodes may lend their program.
    pub peer: Vec<layers::peer_copy::Peer>,
}

/// When messages go out through the chat accounts of the node's own config.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeChannels {
    /// Only while no `[[alert]]` leads off this machine.
    #[default]
    Spare,
    /// Beside every `[[alert]]`.
    Always,
    /// Never; the tokens are not even looked for.
    Never,
}

/// `[heartbeat]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Heartbeat {
    /// The address, asked by GET while the node serves.
    pub url: Option<alert::Address>,
    /// How often, in seconds.
    pub every_s: u64,
}

impl Default for Heartbeat {
    fn default() -> Heartbeat {
        Heartbeat { url: None, every_s: 300 }
    }
}

/// `[node]`: every line narrows the search for the node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeHint {
    /// The node's name or profile.
    pub name: Option<String>,
    /// The npm prefix or package directory.
    pub prefix: Option<PathBuf>,
    /// The Node binary.
    pub node_bin: Option<PathBuf>,
    /// The home directory.
    pub home: Option<PathBuf>,
    /// The OpenClaw state directory.
    pub state_dir: Option<PathBuf>,
    /// The OpenClaw config file.
    pub config_path: Option<PathBuf>,
    /// The gateway's port.
    pub port: Option<u16>,
    /// The user it runs as.
    pub user: Option<String>,
    /// The systemd unit that runs it.
    pub unit: Option<String>,
}

impl From<&NodeHint> for node::Hint {
    fn from(hint: &NodeHint) -> node::Hint {
        let NodeHint { name, prefix, node_bin, home, state_dir, config_path, port, user, unit } =
            hint.clone();
        node::Hint { name, prefix, node_bin, home, state_dir, config_path, port, user, unit }
    }
}

/// `[service]`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Service {
    /// Which manager.
    pub manager: ServiceChoice,
}

/// `[backup]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Backup {
    /// State is taken at most this often, in seconds.
    pub state_every_least_s: u64,
    /// State that changed is taken at least this often, in seconds.
    pub state_every_most_s: u64,
    /// A node that served this long with a new program or config proves it good, in seconds.
    pub settle_s: u64,
    /// No good snapshot for this long is a finding with an alert, in seconds.
    pub stale_after_s: u64,
}

impl Default for Backup {
    fn default() -> Backup {
        Backup {
            state_every_least_s: 15 * 60,
            state_every_most_s: 6 * 3600,
            settle_s: 120,
            stale_after_s: 24 * 3600,
        }
    }
}

/// `[ladder]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Climbing {
    /// Layers that are passed over on this host, by their names (`system-install`, ...).
    pub skip: Vec<engine::Layer>,
    /// A node that layer 3 displaced moves back into its own prefix by itself, once that can be written to again.
    pub return_home: bool,
    /// By what every limit of a climb is divided: for drills, which cannot wait ten minutes.
    pub divide_limits_by: u32,
}

impl Default for Climbing {
    fn default() -> Climbing {
        Climbing { skip: Vec::new(), return_home: true, divide_limits_by: 1 }
    }
}

impl Climbing {
    /// The limits of a climb. What does not divide anything was refused when the file was read.
    pub fn limits(&self) -> engine::Limits {
        engine::Limits::divided(self.divide_limits_by).unwrap_or_default()
    }

    /// What is to be said of limits that are not those of life.
    pub fn shortened(&self) -> Option<String> {
        let limits = self.limits();
        let climb_s = limits.of(engine::CLIMB_MS) / 1_000;
        (!limits.whole()).then(|| {
            format!(
                "every limit of the ladder is divided by {}: a climb ends after {climb_s} s, for drills only \
                 ([ladder] divide_limits_by)",
                limits.divisor()
            )
        })
    }

    /// Why a layer is passed over, where its owner says so.
    pub fn refuses(&self, layer: engine::Layer) -> Option<String> {
        self.skip.contains(&layer).then(|| "switched off in the configuration ([ladder] skip)".to_owned())
    }
}

/// `[store]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreLimits {
    /// Store, spare and quarantine together, in bytes; 0 = the lesser of 4 GB and 20 % of the free space.
    pub limit_bytes: u64,
    /// What users own stays in quarantine at least this long, in days.
    pub quarantine_days: u32,
    /// Keep a ready copy of the program beside the node's prefix, swapped in by one rename.
    pub spare: bool,
    /// Every byte of the program, runtime, service files and the store is read once in this time, in seconds; 0 = never.
    pub scrub_every_s: u64,
}

impl Default for StoreLimits {
    fn default() -> StoreLimits {
        StoreLimits { limit_bytes: 0, quarantine_days: 14, spare: false, scrub_every_s: 24 * 3600 }
    }
}

/// Reads `file` and the `koboshi.d/*.toml` beside it, in the order of their names. A missing file is an empty one.
pub fn load(file: &Path) -> Result<Config> {
    let mut merged = toml::Table::new();
    for fragment in fragments(file)? {
        let bytes = files::read_bounded(&fragment, MAX_FILE_BYTES)
            .map_err(|e| Error { kind: Kind::Usage, ..e })
            .map_err(|e| e.hint(format!("make {} a readable text file, or remove it", fragment.display())))?;
        let text = String::from_utf8(bytes).map_err(|e| {
            Error::new(Kind::Usage, format!("read the configuration {}", fragment.display()), e)
                .hint("save the file as UTF-8")
        })?;
        // Each fragment is read strictly by itself first, so that the error names the file and the line.
        let _: Config = toml::from_str(&text).map_err(|e| explain(&fragment, &e))?;
        let table: toml::Table = toml::from_str(&text).map_err(|e| explain(&fragment, &e))?;
        merge(&mut merged, table);
    }
    let config: Config = merged.try_into().map_err(|e| explain(file, &e))?;
    sensible(file, &config)?;
    Ok(config)
}

/// Numbers that parse and contradict each other, or that no clock can count.
fn sensible(file: &Path, config: &Config) -> Result<()> {
    /// Ten years: longer than any host keeps its promises.
    const MOST_S: u64 = 10 * 366 * 24 * 3600;
    let wrong = |why: String, hint: &str| {
        Err(Error::new(Kind::Usage, format!("read the configuration {}", file.display()), why)
            .hint(hint.to_owned()))
    };
    let b = &config.backup;
    if b.state_every_least_s > b.state_every_most_s {
        return wrong(
            format!(
                "[backup] state_every_least_s ({}) is more than state_every_most_s ({})",
                b.state_every_least_s, b.state_every_most_s
            ),
            "make the least the smaller of the two",
        );
    }
    if engine::Limits::divided(config.ladder.divide_limits_by).is_none() {
        return wrong(
            format!("[ladder] divide_limits_by is {}", config.ladder.divide_limits_by),
            &format!("1 for the limits of life; 2 to {} for drills", engine::MOST_DIVISOR),
        );
    }
    let all = [
        ("state_every_most_s", b.state_every_most_s),
        ("settle_s", b.settle_s),
        ("stale_after_s", b.stale_after_s),
    ];
    match all.into_iter().find(|(_, value)| *value > MOST_S) {
        Some((name, value)) => wrong(
            format!("[backup] {name} is {value} seconds, which is more than ten years"),
            "give it in seconds",
        ),
        None => Ok(()),
    }
}

/// Whether the file is there. One that cannot be looked for is no missing one: its owner's wishes are not ours to drop.
pub fn there(file: &Path) -> Result<bool> {
    file.try_exists().map_err(|e| {
        Error::new(Kind::Usage, format!("read the configuration {}", file.display()), e)
            .hint("let this user read it, or name another with --config FILE")
    })
}

fn fragments(file: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    if there(file)? {
        found.push(file.to_owned());
    }
    let drop_ins = file.with_file_name("koboshi.d");
    if drop_ins.is_dir() {
        let mut names: Vec<PathBuf> = std::fs::read_dir(&drop_ins)
            .context(|| format!("list {}", drop_ins.display()))?
            .filter_map(|e| e.ok().map(|e| e.path()))
            .filter(|p| p.extension().is_some_and(|x| x == "toml"))
            .take(MAX_DROP_INS)
            .collect();
        names.sort();
        found.extend(names);
    }
    Ok(found)
}

fn merge(into: &mut toml::Table, from: toml::Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => merge(below, above),
            // Lists of channels and the like add up: a drop-in can add an alert without repeating the others.
            (Some(toml::Value::Array(below)), toml::Value::Array(above)) => below.extend(above),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

/// One clear error out of the parser's, with the nearest valid key.
fn explain(file: &Path, e: &toml::de::Error) -> Error {
    let message = e.message().to_owned();
    let line = e.span().map(|span| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        text.get(..span.start).map_or(0, |before| before.matches('\n').count()) + 1
    });
    let place = line.map_or_else(|| file.display().to_string(), |l| format!("{}:{l}", file.display()));
    let error = Error::new(Kind::Usage, format!("read the configuration {place}"), &message);
    match nearest(&message) {
        Some(near) => error.hint(format!("did you mean `{near}`?")),
        None => error.hint("correct the line, or remove it: every value has a default"),
    }
}

/// The valid key nearest to the unknown one, read out of the parser's own list.
fn nearest(message: &str) -> Option<String> {
    let mut words = message.split('`').skip(1).step_by(2);
    if !message.contains("unknown field") && !message.contains("unknown variant") {
        return None;
    }
    let wrong = words.next()?.to_owned();
    words
        .map(|valid| (strsim::damerau_levenshtein(&wrong, valid), valid))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, valid)| *distance <= valid.len().max(wrong.len()) / 2)
        .map(|(_, valid)| valid.to_owned())
}

#[cfg(test)]
mod contradictions {
    use super::*;

    #[test]
    fn numbers_that_contradict_each_other_are_one_clear_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("koboshi.toml");
        std::fs::write(&file, "[backup]\nstate_every_most_s = 600\n").unwrap();
        let e = load(&file).unwrap_err();
        assert_eq!(e.kind, Kind::Usage);
        assert!(e.why.contains("state_every_least_s (900)"), "{e}");
        std::fs::write(&file, "[backup]\nsettle_s = 99999999999999999\n").unwrap();
        assert!(load(&file).unwrap_err().why.contains("settle_s"));
        std::fs::write(&file, "[backup]\nstate_every_least_s = 5\nstate_every_most_s = 8\n").unwrap();
        assert!(load(&file).is_ok());
    }

    #[test]
    fn limits_are_divided_within_bounds_and_it_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("koboshi.toml");
        std::fs::write(&file, "").unwrap();
        let config = load(&file).unwrap();
        assert!(config.ladder.limits().whole());
        assert_eq!(config.ladder.shortened(), None);
        std::fs::write(&file, "[ladder]\ndivide_limits_by = 10\n").unwrap();
        let config = load(&file).unwrap();
        assert_eq!(config.ladder.limits().of(engine::CLIMB_MS), 60_000);
        assert!(config.ladder.shortened().unwrap().contains("divided by 10: a climb ends after 60 s"));
        for wrong in [0, 21, 4_000_000_000_u32] {
            std::fs::write(&file, format!("[ladder]\ndivide_limits_by = {wrong}\n")).unwrap();
            let e = load(&file).unwrap_err();
            assert_eq!(e.kind, Kind::Usage);
            assert!(e.why.contains(&wrong.to_string()), "{e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn an_empty_or_missing_file_is_the_default() {
        let dir = tempfile::tempdir().unwrap();
        let config = load(&dir.path().join("koboshi.toml")).unwrap();
        assert_eq!(config.mode, Mode::Guard);
        assert_eq!(config.backup.settle_s, 120);
    }

    #[test]
    fn an_unknown_key_names_the_nearest() {
        let dir = tempfile::tempdir().unwrap();
        let file = write(dir.path(), "koboshi.toml", "mode = \"guard\"\n\n[backup]\nsetle_s = 3\n");
        let e = load(&file).unwrap_err();
        assert_eq!(e.kind, Kind::Usage);
        assert!(e.what.ends_with("koboshi.toml:4"), "{}", e.what);
        assert!(e.why.contains("setle_s"), "{}", e.why);
        assert_eq!(e.hint.as_deref(), Some("did you mean `settle_s`?"));
    }

    #[test]
    fn a_mangled_file_is_one_error_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = write(dir.path(), "koboshi.toml", "mode = \"guard\"\n[backup\n");
        let e = load(&file).unwrap_err();
        assert!(e.what.contains("koboshi.toml:2"), "{}", e.what);
        assert!(e.hint.is_some());
    }

    #[test]
    fn bytes_that_are_not_text_are_one_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("koboshi.toml");
        std::fs::write(&file, [0xff, 0xfe, 0]).unwrap();
        assert_eq!(load(&file).unwrap_err().kind, Kind::Usage);
    }

    #[test]
    fn drop_ins_add_and_override_in_the_order_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let file = write(dir.path(), "koboshi.toml", "[backup]\nsettle_s = 1\nstale_after_s = 7\n");
        write(dir.path(), "koboshi.d/20.toml", "[backup]\nsettle_s = 3\n");
        write(dir.path(), "koboshi.d/10.toml", "[backup]\nsettle_s = 2\n");
        write(dir.path(), "koboshi.d/30.toml.bak", "nonsense");
        let config = load(&file).unwrap();
        assert_eq!((config.backup.settle_s, config.backup.stale_after_s), (3, 7));
    }
}
