//! Where koboshi's own files lie. Nothing else in the house knows these names.

use crate::config::Config;
use host::container::Containers;
use host::{Error, Kind, Result};
use std::path::{Path, PathBuf};

/// The directories and files of one koboshi.
#[derive(Debug, Clone)]
pub struct Places {
    /// The configuration file.
    pub config_file: PathBuf,
    /// The store's key: beside the configuration, never in the store.
    pub key_file: PathBuf,
    /// Survives a reboot: journal, store, quarantine, outbox.
    pub state_dir: PathBuf,
    /// Need not survive a reboot: the agent's lock, status and step files.
    pub run_dir: PathBuf,
}

impl Places {
    /// The configuration file to use: the one named, else the system's (as root or when it exists), else the user's.
    pub fn config_file(named: Option<&Path>) -> Result<PathBuf> {
        if let Some(path) = named {
            return std::path::absolute(path)
                .map_err(|e| Error::io(format!("resolve {}", path.display()), &e));
        }
        let system = PathBuf::from("/etc/koboshi/koboshi.toml");
        if rustix::process::geteuid().is_root() || system.exists() {
            return Ok(system);
        }
        Ok(user_dir("XDG_CONFIG_HOME", ".config")?.join("koboshi/koboshi.toml"))
    }

    /// The places that belong to a configuration.
    pub fn new(config_file: PathBuf, config: &Config) -> Result<Places> {
        let system = config_file.starts_with("/etc");
        let state_dir = match &config.state_dir {
            Some(dir) => dir.clone(),
            None if system => PathBuf::from("/var/lib/koboshi"),
            None => user_dir("XDG_STATE_HOME", ".local/state")?.join("koboshi"),
        };
        let run_dir = match (&config.run_dir, std::env::var_os("XDG_RUNTIME_DIR")) {
            (Some(dir), _) => dir.clone(),
            (None, _) if system => PathBuf::from("/run/koboshi"),
            (None, Some(dir)) if Path::new(&dir).is_absolute() => PathBuf::from(dir).join("koboshi"),
            // A shell without that variable (su, cron) must look where the user's service looks, or there would be
            // two agents. Without a runtime directory at all (no logind) a place that survives a reboot does as
            // well: stale files in it are told by their process identity.
            (None, _) => match PathBuf::from(format!("/run/user/{}", rustix::process::geteuid().as_raw())) {
                dir if dir.is_dir() => dir.join("koboshi"),
                _ => state_dir.join("run"),
            },
        };
        let key_file = config_file.with_file_name("keys").join("store.key");
        for dir in [&state_dir, &run_dir] {
            if !dir.is_absolute() {
                return Err(Error::new(
                    Kind::Usage,
                    format!("use {} as koboshi's directory", dir.display()),
                    "it is not an absolute path",
                )
                .hint("give state_dir and run_dir from the root on"));
            }
        }
        Ok(Places { config_file, key_file, state_dir, run_dir })
    }

    /// Room for a full disk.
    pub fn reserve(&self) -> PathBuf {
        self.state_dir.join("reserve")
    }

    /// That a look of a climb's is reading the store.
    pub fn looking(&self) -> PathBuf {
        self.run_dir.join("looking")
    }

    /// Sealed snapshots.
    pub fn store(&self) -> PathBuf {
        self.state_dir.join("store")
    }

    /// Digests of the programs that were proven good here, for when the store is lost.
    pub fn known_programs(&self) -> PathBuf {
        layers::peer_copy::known_programs(&self.state_dir)
    }

    /// The key that is offered to peers.
    pub fn donate_key(&self) -> PathBuf {
        self.key_file.with_file_name("donate")
    }

    /// The journal of incidents.
    pub fn journal(&self) -> PathBuf {
        self.state_dir.join("journal")
    }

    /// Where the fold goes on when the journal cannot be written.
    pub fn journal_fallback(&self) -> PathBuf {
        self.run_dir.join("journal")
    }

    /// Closed incidents, one file each.
    pub fn incidents(&self) -> PathBuf {
        self.state_dir.join("incidents")
    }

    /// What was replaced, by incident.
    pub fn quarantine(&self) -> PathBuf {
        self.state_dir.join("quarantine")
    }

    /// Messages waiting to be accepted.
    pub fn outbox(&self) -> PathBuf {
        self.state_dir.join("outbox")
    }

    /// Whom the node itself writes to and with what, sealed with the store's key.
    pub fn contacts(&self) -> PathBuf {
        self.state_dir.join("contacts")
    }

    /// The node as it was last known to serve.
    pub fn node(&self) -> PathBuf {
        self.state_dir.join("node.json")
    }

    /// Where the slow look at every byte goes on.
    pub fn scrub(&self) -> PathBuf {
        self.state_dir.join("scrub.json")
    }

    /// Where databases are copied to that can only be read as a copy. On the disk and not in the run directory, which is
    /// mostly memory.
    pub fn reading(&self) -> PathBuf {
        self.state_dir.join("reading")
    }

    /// How old the good copies are.
    pub fn copies(&self) -> PathBuf {
        self.state_dir.join("copies.json")
    }

    /// The judge's baseline.
    pub fn baseline(&self) -> PathBuf {
        self.state_dir.join("baseline.json")
    }

    /// The owner's will: paused, stopped.
    pub fn will(&self) -> PathBuf {
        self.state_dir.join("will.json")
    }

    /// Where messages wait when the disk takes none.
    pub fn outbox_spare(&self) -> PathBuf {
        self.run_dir.join("outbox")
    }

    /// The running agent's lock.
    pub fn lock(&self) -> PathBuf {
        self.run_dir.join("agent.lock")
    }

    /// What the running agent last published.
    pub fn status(&self) -> PathBuf {
        self.run_dir.join("status.json")
    }

    /// Which of the layers' sources were silent in the open incident.
    pub fn sources(&self) -> PathBuf {
        self.run_dir.join("sources.json")
    }

    /// Requests and results of steps.
    pub fn steps(&self) -> PathBuf {
        self.run_dir.join("steps")
    }

    /// Orders from the command line to the running agent.
    pub fn orders(&self) -> PathBuf {
        self.run_dir.join("orders")
    }

    /// The embedded gateway's output.
    pub fn gateway_log(&self) -> PathBuf {
        self.state_dir.join("gateway.log")
    }

    /// The containers of a node. Named by the node and by where koboshi keeps its state, so that two koboshis on one
    /// host (two users, a demo beside the real one) never take each other's processes for their own.
    pub fn containers(&self, node: &node::Node) -> Result<Containers> {
        /// A container's name is a file name; what is longer or strange is left to the hash.
        const NAME_CHARS: usize = 24;
        // FNV-1a: the same for every build, so that an upgraded agent finds the containers of the old one.
        let bytes = self.state_dir.as_os_str().as_encoded_bytes().iter().chain(node.name.as_bytes());
        let hash = bytes.fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(*b)).wrapping_mul(0x0100_0193));
        let name: String =
            node.name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(NAME_CHARS).collect();
        Containers::open(&format!("{name}-{hash:08x}"), &self.run_dir)
    }

    /// Makes the directories that everything else relies on, private to this user.
    pub fn make(&self) -> Result<()> {
        for dir in [
            &self.state_dir,
            &self.run_dir,
            &self.incidents(),
            &self.quarantine(),
            &self.outbox(),
            &self.steps(),
            &self.orders(),
        ] {
            host::files::make_private_dir(dir)?;
        }
        Ok(())
    }
}

pub(crate) fn user_dir(variable: &str, below_home: &str) -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os(variable).map(PathBuf::from).filter(|d| d.is_absolute()) {
        return Ok(dir);
    }
    let home = std::env::var_os("HOME").map(PathBuf::from).filter(|d| d.is_absolute()).ok_or_else(|| {
        Error::new(Kind::Usage, "find the home directory", "HOME is not set to an absolute path")
            .hint("set HOME, or name the configuration with --config FILE")
    })?;
    Ok(home.join(below_home))
}
