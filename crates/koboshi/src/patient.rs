//! The node in koboshi's care: found once, remembered, and run by one service manager.

use crate::config::{Config, ServiceChoice};
use crate::places::Places;
use host::clock::Deadline;
use host::container::Containers;
use host::process::ProcessId;
use host::service::{Embedded, GatewaySpec, Manager, ServiceState, Systemd};
use host::{Error, Kind, Result, files};
use node::{Baseline, Node, Scope};

/// A node's description is a few kilobytes.
const MAX_BYTES: u64 = 1 << 20;

/// The node as it was last known to serve; found anew only where nothing is remembered: a fallen node can no longer be
/// found by looking.
pub fn remembered(places: &Places) -> Result<Option<Node>> {
    load(&places.node(), "the remembered node")
}

/// The remembered node, else the one found on this host.
pub fn find(places: &Places, config: &Config) -> Result<Node> {
    let node = match remembered(places) {
        Ok(node) => node,
        // Nobody may be there to remove the file. The newest snapshot knows the node as it last served; failing that it
        // is looked for, and only when that fails too is the torn file what is told.
        Err(e) if e.kind == Kind::Corrupt => {
            return snapshots_node(places).map_or_else(|| found(config).map_err(|_| e), Ok);
        }
        Err(e) => return Err(e),
    };
    match node {
        // What is written in the configuration by hand wins over what was remembered.
        Some(node) => Ok(Node { port: config.node.port.unwrap_or(node.port), ..node }),
        None => found(config),
    }
}

fn found(config: &Config) -> Result<Node> {
    Ok(node::find(&(&config.node).into())?.node)
}

/// The node as the newest trusted snapshot describes it.
fn snapshots_node(places: &Places) -> Option<Node> {
    let store = store::Store::open(&places.store(), &places.key_file).ok()?;
    let mut trusted: Vec<_> = store.list().ok()?.into_iter().filter(|info| info.trust.trusted()).collect();
    trusted.sort_by_key(|info| std::cmp::Reverse(info.number));
    trusted.into_iter().find_map(|info| serde_json::from_value(info.node).ok())
}

/// Remembers the node. What is remembered already is not written again: an agent must begin on a full disk too.
pub fn remember(places: &Places, node: &Node) -> Result<()> {
    if remembered(places).is_ok_and(|known| known.as_ref() == Some(node)) {
        return Ok(());
    }
    save(&places.node(), node)
}

/// What the judge expects of it, where anything is known.
pub fn baseline(places: &Places) -> Result<Option<Baseline>> {
    load(&places.baseline(), "the baseline")
}

/// Remembers the baseline.
pub fn set_baseline(places: &Places, baseline: &Baseline) -> Result<()> {
    save(&places.baseline(), baseline)
}

fn load<T: serde::de::DeserializeOwned>(path: &std::path::Path, what: &str) -> Result<Option<T>> {
    match files::read_bounded(path, MAX_BYTES) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| {
            Error::new(Kind::Corrupt, format!("read {what} from {}", path.display()), e)
                .hint(format!("remove {} and run koboshi install again", path.display()))
        }),
        Err(e) if e.kind == Kind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn save<T: serde::Serialize>(path: &std::path::Path, value: &T) -> Result<()> {
    let text = serde_json::to_vec_pretty(value)
        .map_err(|e| Error::new(Kind::System, format!("write {}", path.display()), e))?;
    files::write_atomic(path, &text, 0o600)
}

/// The one that starts and stops the gateway.
#[derive(Debug)]
pub enum Service {
    /// koboshi itself.
    Embedded(Embedded),
    /// systemd.
    Systemd(Systemd),
}

impl Service {
    /// The manager that the configuration and the node ask for. A running gateway is adopted.
    pub fn of(node: &Node, config: &Config, containers: &Containers, places: &Places) -> Result<Service> {
        let unit = node.unit.as_ref();
        let wants = match (config.service.manager, unit) {
            (ServiceChoice::Auto, Some(unit)) => match unit.scope {
                Scope::User => ServiceChoice::SystemdUser,
                Scope::System => ServiceChoice::SystemdSystem,
            },
            (ServiceChoice::Auto, None) => ServiceChoice::Embedded,
            (chosen, _) => chosen,
        };
        let name = || {
            unit.map(|u| u.name.as_str()).ok_or_else(|| {
                Error::new(Kind::Usage, "use systemd for the gateway", "the node has no unit").hint(
                    "set manager = \"embedded\" under [service], or run `openclaw gateway install` first",
                )
            })
        };
        match wants {
            ServiceChoice::SystemdUser => Ok(Service::Systemd(Systemd::user(name()?, node.ids)?)),
            ServiceChoice::SystemdSystem => Ok(Service::Systemd(Systemd::system(name()?)?)),
            ServiceChoice::Embedded | ServiceChoice::Auto => {
                let command = node.command();
                let spec = GatewaySpec {
                    program: command.program.into_os_string(),
                    args: command.args.into_iter().map(Into::into).collect(),
                    env: command.env.into_iter().map(|(k, v)| (k.into(), v.into())).collect(),
                    env_clear: true,
                    cwd: Some(command.cwd),
                    ids: (node.ids != host::run::Ids::current()).then_some(node.ids),
                    log: places.gateway_log(),
                };
                Ok(Service::Embedded(Embedded::new(containers.clone(), spec, node.gateway())))
            }
        }
    }

    /// As the one trait.
    pub fn manager(&mut self) -> &mut dyn Manager {
        match self {
            Service::Embedded(m) => m,
            Service::Systemd(m) => m,
        }
    }

    /// The gateway's process, where we supervise it.
    pub fn main(&self) -> Option<ProcessId> {
        match self {
            Service::Embedded(m) => m.main(),
            Service::Systemd(_) => None,
        }
    }

    /// Takes a gateway into care that somebody else started.
    pub fn adopt(&mut self, id: ProcessId) {
        match self {
            Service::Embedded(m) => {
                m.adopt(id);
            }
            Service::Systemd(_) => {}
        }
    }

    /// Whether koboshi is the supervisor.
    pub fn embedded(&self) -> bool {
        match self {
            Service::Embedded(_) => true,
            Service::Systemd(_) => false,
        }
    }

    /// What the manager says, or that nothing is known.
    pub fn look(&mut self, deadline: Deadline) -> ServiceState {
        self.manager().look(deadline).unwrap_or_else(|_| ServiceState::unknown())
    }
}
