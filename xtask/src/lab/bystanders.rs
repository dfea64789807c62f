//! Strangers on every host, with the names and words of what koboshi starts and ends: who kills by name kills one of
//! these. They are looked at before their host goes down, whichever way it goes.

use super::host::Host;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Executable and what it calls itself.
const ALL: [(&str, &str); 4] = [
    ("node", "node /usr/local/lib/node_modules/openclaw/dist/index.js gateway --port 18789"),
    ("npm", "npm install -g openclaw"),
    ("openclaw", "openclaw gateway"),
    ("openclaw-gateway", "openclaw-gateway"),
];
/// Root's and the node's user's.
const OWNERS: [&str; 2] = ["root", "claw"];
/// How long each sleeps, in seconds; by this they are told from what they look like.
pub(crate) const SLEEPS: &str = "1000000000";
/// A host that does not answer (it is frozen, its disk is stuck) is asked for this long.
const LIMIT: Duration = Duration::from_secs(20);

/// What was seen of them in one scenario.
#[derive(Debug, Clone, Default)]
pub(crate) struct Bystanders(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    alive: u64,
    gone: Vec<String>,
}

impl Bystanders {
    /// Has them start with a host that is not booted yet.
    pub(crate) fn move_in(root: &Path) -> Result<(), String> {
        let dir = root.join("opt/bystanders");
        let units = root.join("etc/systemd/system");
        let wants = units.join("multi-user.target.wants");
        for dir in [&dir, &wants] {
            std::fs::create_dir_all(dir).map_err(|e| format!("make {}: {e}", dir.display()))?;
        }
        for (name, title) in ALL {
            std::fs::copy(root.join("usr/bin/sleep"), dir.join(name))
                .map_err(|e| format!("make a bystander {name}: {e}"))?;
            for owner in OWNERS {
                let unit = unit(name, owner);
                let text = format!(
                    "[Unit]\nDescription=a stranger\n[Service]\nUser={owner}\n\
                     ExecStart=/bin/bash -c 'exec -a \"{title}\" /opt/bystanders/{name} {SLEEPS}'\n"
                );
                std::fs::write(units.join(&unit), text).map_err(|e| format!("write {unit}: {e}"))?;
                std::os::unix::fs::symlink(format!("../{unit}"), wants.join(&unit))
                    .map_err(|e| format!("enable {unit}: {e}"))?;
            }
        }
        Ok(())
    }

    /// Looks at a host that is up. One that cannot answer tells nothing.
    pub(crate) fn look(&self, host: &Host) {
        let units: Vec<String> =
            ALL.iter().flat_map(|(name, _)| OWNERS.map(|owner| unit(name, owner))).collect();
        let script = format!("systemctl is-active {}; true", units.join(" "));
        let Ok(out) = host.root_within(&script, LIMIT) else { return };
        let states: Vec<&str> = out.out.lines().collect();
        if states.len() != units.len() {
            return;
        }
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (unit, state) in units.iter().zip(states) {
            if state == "active" {
                seen.alive += 1;
            } else {
                seen.gone.push(format!("{unit} on {} is {state}", host.name));
            }
        }
    }

    /// How many were seen alive, and which were not.
    pub(crate) fn seen(&self) -> (u64, Vec<String>) {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (seen.alive, seen.gone.clone())
    }
}

fn unit(name: &str, owner: &str) -> String {
    format!("bystander-{name}-{owner}.service")
}
