//! The scenarios, those that take longest first. Each has one line that says what it proves; `docs/lab.md` says more.

mod install;
mod parts;
mod peers;
mod systemd;
mod wipe;
mod worst;

use super::Play;
use super::host::Host;

/// One scenario.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) proves: &'static str,
    /// Played in every test run, not only in the full one.
    pub(crate) ci: bool,
    pub(crate) play: fn(&mut Play) -> Result<(), String>,
}

const fn ci(name: &'static str, proves: &'static str, play: fn(&mut Play) -> Result<(), String>) -> Scenario {
    Scenario { name, proves, ci: true, play }
}

const fn full(
    name: &'static str,
    proves: &'static str,
    play: fn(&mut Play) -> Result<(), String>,
) -> Scenario {
    Scenario { name, proves, ci: false, play }
}

/// Keeps what is worth reading of a host where something failed on it, in the claims or on the way to them.
fn kept<T>(play: &mut Play, host: &Host, result: Result<T, String>) -> Result<(), String> {
    if result.is_err() || play.count.failed > 0 {
        play.remember(host);
    }
    result.map(drop)
}

/// All of them.
pub(crate) const ALL: &[Scenario] = &[
    full(
        "reinstall",
        "no store, no program, no unit: layer 2 makes all of it anew from the registry",
        install::again,
    ),
    full(
        "displaced",
        "no way to the node's own prefix: layer 3 runs it from its user's, over a reboot too, and it goes home by itself",
        install::displaced,
    ),
    full(
        "sudo-install",
        "a program of root's under an agent without privileges: layer 2 by sudo, layer 3 without it, and home by sudo",
        install::sudo,
    ),
    full(
        "worst-hang",
        "everything hangs at once: emergency told inside 600 s, nothing left over, and out of it when the registry is back",
        worst::whole,
    ),
    full(
        "worst-late",
        "all work succeeds, late, and every start hangs: emergency told inside 600 s all the same",
        worst::late,
    ),
    ci(
        "worst-hang-tenth",
        "the same with every limit divided by ten; out of it when the disk is back",
        worst::tenth,
    ),
    full(
        "worst-deaths",
        "the same at full limits while the agent is killed at random moments",
        worst::deaths,
    ),
    full(
        "worst-reboot",
        "the same, the store empty instead of stuck, and the power gone once in the middle",
        worst::reboot,
    ),
    full(
        "wipe",
        "program, Node, config, state, credentials and service deleted at once: back from the local store, over a reboot too",
        wipe::user,
    ),
    full("wipe-system", "the same of a root-owned program run by a system unit", wipe::system),
    full("wipe-unprivileged", "the same where the agent may not write to where Node was", wipe::unprivileged),
    full("user-will", "a bare stop is undone once, a second is obeyed, disable is left alone", systemd::will),
    full("user-latch", "exit 78 and a start limit are cleared after the cause is repaired", systemd::latch),
    ci(
        "user-install",
        "installing and uninstalling change no byte of a serving node, and no process",
        systemd::install,
    ),
    ci(
        "user-kill",
        "killed and stopped gateways of a user unit stand up, one starter only; an agent may die",
        systemd::kill,
    ),
    ci("user-program", "a deleted program tree is restored", systemd::program),
    full("user-drop-in", "a drop-in that no start survives is set aside", systemd::drop_in),
    full("user-stop", "a gateway stopped by koboshi stays stopped, over a reboot too", systemd::stop),
    ci("system-unit", "the same of a root-owned program run by a system unit", systemd::system),
    ci(
        "user-agent",
        "koboshi as an unprivileged user service rights the node of its user",
        systemd::user_agent,
    ),
    full("lower-layer", "a program tree on an overlay's lower layer is restored too", systemd::lower_layer),
    ci("sudo-gates", "each broken state of sudo is real and answers as expected", parts::sudo_gates),
    ci("services", "registry and alert receiver fail in every way they can", parts::services),
    ci("network", "hosts reach each other by ssh, and every cut is one", parts::network),
    full(
        "peer-copy",
        "program gone and store corrupt: a peer lends what is missing, and nothing else",
        peers::copy,
    ),
    full("donor", "a peer with a node and an identity of its own, reached by ssh", parts::donor),
    full("disks", "a full disk is full, a corrupt store is corrupt", parts::disks),
];
