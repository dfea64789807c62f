//! `koboshi doctor`: what would keep a recovery from working here, and how to fix it.
//!
//! Findings are declared once, each with its fixed name, whether it blocks, and the way out. Nothing is changed: the
//! one thing that is tried on the disk is whether directories can be exchanged, with two empty ones beside the program.

use super::check::node_json;
use super::desk::{Desk, Fields, ago, seconds};
use super::kept::{self, Kept};
use super::{judging, key, unit};
use crate::config::Mode;
use crate::print::{Exit, bytes};
use crate::voice::Standing;
use crate::{agent, spare};
use host::clock::{self, Deadline};
use host::container::{Containers, Strength};
use host::exchange::{self, Method};
use host::{Kind, Result, files};
use node::config::TokenSource;
use node::{Confidence, Node, Scope, gates};
use std::path::Path;
use std::time::Duration;

/// A wall clock before this is wrong: no certificate would be valid. The day this was written.
const CLOCK_FLOOR_S: i64 = 1_795_305_600;
/// Asking the runtime for its version.
const RUNTIME_LIMIT: Duration = Duration::from_secs(5);
/// Inodes that a repair of the whole program needs.
const NEED_INODES: u64 = 50_000;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    /// As it should be.
    Ok,
    /// A recovery works, but less well, or nobody would know.
    Warns,
    /// A recovery would not work.
    Blocks,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warns => "warns",
            Level::Blocks => "blocks",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug)]
struct Finding {
    id: &'static str,
    level: Level,
    what: String,
    fix: Option<String>,
}

#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, id: &'static str, what: impl Into<String>) {
        self.0.push(Finding { id, level: Level::Ok, what: what.into(), fix: None });
    }

    fn warns(&mut self, id: &'static str, what: impl Into<String>, fix: impl Into<String>) {
        self.0.push(Finding { id, level: Level::Warns, what: what.into(), fix: Some(fix.into()) });
    }

    fn blocks(&mut self, id: &'static str, what: impl Into<String>, fix: impl Into<String>) {
        self.0.push(Finding { id, level: Level::Blocks, what: what.into(), fix: Some(fix.into()) });
    }
}

/// Looks at everything and says what to do.
pub(super) fn run(desk: &Desk) -> Result<Exit> {
    let mut found = Findings::default();
    let node = match desk.node() {
        Ok(node) => {
            found.ok(
                "node",
                format!(
                    "{} in {}, state {}",
                    node.name,
                    node.package_dir.display(),
                    node.state_dir.display()
                ),
            );
            Some(node)
        }
        Err(e) => {
            found.blocks(
                "node",
                format!("no node: {}", e.why),
                e.hint.unwrap_or_else(|| "install OpenClaw first".into()),
            );
            None
        }
    };
    the_agent(desk, &mut found);
    hands(desk, &mut found);
    let kept = kept::ask(desk);
    snapshots(desk, &kept, &mut found);
    the_key(desk, &kept, &mut found);
    clock_right(&mut found);
    alerts(desk, &mut found);
    if let Some(node) = &node {
        disk(desk, node, &kept, &mut found);
        containers(desk, node, &mut found);
        runtime(node, &mut found);
        switching(node, &mut found);
        the_spare(desk, node, &mut found);
        token(desk, node, &mut found);
        linger(desk, node, &mut found);
    }
    found.0.sort_by_key(|f| std::cmp::Reverse(f.level));
    tell(desk, node.as_ref(), &found.0);
    let blocked = found.0.iter().any(|f| f.level == Level::Blocks);
    Ok(if blocked { Exit::Failed } else { Exit::Done })
}

fn tell(desk: &Desk, node: Option<&Node>, found: &[Finding]) {
    let p = desk.printer;
    let count = |level: Level| found.iter().filter(|f| f.level == level).count();
    let (blocks, warns) = (count(Level::Blocks), count(Level::Warns));
    Standing::of(&desk.config, &desk.places).warn(p, &desk.places);
    p.line(match (blocks, warns) {
        (0, 0) => p.green("Nothing would keep a recovery from working here."),
        (0, n) => p.yellow(&format!("A recovery would work here; {n} things could be better.")),
        (n, _) => p.red(&format!("A recovery would not work here: {n} things are in its way.")),
    });
    for finding in found {
        let word = match finding.level {
            Level::Ok => p.green("ok    "),
            Level::Warns => p.yellow("warns "),
            Level::Blocks => p.red("BLOCKS"),
        };
        p.line(format!("{word}  {:11} {}", finding.id, finding.what));
        if let Some(fix) = &finding.fix {
            p.line(format!("                    fix: {fix}"));
        }
    }
    let list: Vec<_> = found
        .iter()
        .map(|f| {
            Fields::default()
                .put("id", f.id)
                .put("level", f.level.name())
                .put("what", f.what.as_str())
                .maybe("fix", f.fix.clone())
                .done()
        })
        .collect();
    let fields = Fields::default()
        .put("ready", blocks == 0)
        .put("blocks", blocks)
        .put("warns", warns)
        .maybe("node", node.map(node_json))
        .put("findings", list);
    p.object(fields.done());
}

fn the_agent(desk: &Desk, found: &mut Findings) {
    let Some(id) = desk.agent() else {
        found.blocks(
            "agent",
            "no agent is running: nothing would notice a fall",
            "koboshi install, or run koboshi guard",
        );
        return;
    };
    match desk.status() {
        Some(s) if s.agent_version != env!("CARGO_PKG_VERSION") => found.warns(
            "agent",
            format!(
                "process {} still runs koboshi {}, this is {}",
                id.pid,
                s.agent_version,
                env!("CARGO_PKG_VERSION")
            ),
            "restart the agent's service; the gateway is not touched by that",
        ),
        Some(s) if s.trouble.is_some() => found.warns(
            "agent",
            format!("process {} has trouble: {}", id.pid, s.trouble.unwrap_or_default()),
            "see the other findings; the agent tries again by itself",
        ),
        Some(_) | None => found.ok("agent", format!("process {} is running", id.pid)),
    }
}

fn hands(desk: &Desk, found: &mut Findings) {
    let will = desk.will();
    let fix = if desk.config.mode == Mode::Watch {
        format!("set mode = \"guard\" in {}", desk.places.config_file.display())
    } else if will.stopped {
        "koboshi node start".to_owned()
    } else {
        "koboshi resume".to_owned()
    };
    match desk.hands_off() {
        Some(why) => found.blocks("hands-off", why, fix),
        None => found.ok("hands-off", "nothing holds koboshi back"),
    }
    if let Some(words) = desk.config.ladder.shortened() {
        found.warns("limits", words, "remove the line when the drill is over, and restart the agent");
    }
}

fn snapshots(desk: &Desk, kept: &Kept, found: &mut Findings) {
    if let Some(trouble) = &kept.trouble {
        let hint = trouble.hint.clone().unwrap_or_else(|| "koboshi snapshot verify".into());
        found.blocks("snapshot", trouble.to_string(), hint);
        return;
    }
    if !kept.there {
        let what = "there is no snapshot: only a restart could be tried";
        found.blocks("snapshot", what, "koboshi install");
        return;
    }
    if kept.unreadable > 0 {
        found.warns(
            "store",
            format!("{} snapshots cannot be read", kept.unreadable),
            "koboshi snapshot verify says why",
        );
    }
    let settle = desk.config.backup.settle_s;
    match &kept.good {
        None => found.blocks(
            "snapshot",
            format!("{} snapshots, none of them good yet: only a restart could be tried", kept.count),
            format!("let the node serve for {settle} s under a running agent, or koboshi accept"),
        ),
        Some(good) => {
            let age = |c: &store::ClassInfo| {
                u64::try_from(clock::wall().as_second() - c.taken.as_second()).unwrap_or(0)
            };
            let oldest = good.classes.iter().map(|(class, c)| (age(c), class)).max();
            match oldest {
                Some((s, class)) if s > desk.config.backup.stale_after_s => found.warns(
                    "snapshot",
                    format!("the newest good copy of the {class} is {} old", seconds(s)),
                    "koboshi snapshot create; koboshi status shows why the agent has not",
                ),
                Some(_) | None => {
                    found.ok("snapshot", format!("{} is good, taken {}", good.id, ago(good.taken)));
                }
            }
        }
    }
}

fn the_key(desk: &Desk, kept: &Kept, found: &mut Findings) {
    if !desk.places.key_file.exists() {
        if kept.there {
            let fix = format!("bring {} back from where you keep a copy", desk.places.key_file.display());
            found.blocks("key", "the store's key is gone: no snapshot can be read", fix);
        }
    } else if key::exported(desk) {
        found.ok("key", "a copy was exported");
    } else {
        found.warns(
            "key",
            "the store's key lies on this host only: a copy of the store elsewhere could not be read",
            "koboshi key export > store.key, and keep that file off this host",
        );
    }
}

fn clock_right(found: &mut Findings) {
    let now_s = clock::wall().as_second();
    if now_s < CLOCK_FLOOR_S {
        let what = format!("the clock says {}: no certificate would be accepted", clock::wall());
        found.warns("clock", what, "set the clock, for example with timedatectl set-ntp true");
    } else {
        found.ok("clock", "the clock is plausible");
    }
}

fn alerts(desk: &Desk, found: &mut Findings) {
    if let Err(why) = alert::channel::check(&desk.config.alert) {
        found.blocks("alerts", why, format!("correct [[alert]] in {}", desk.places.config_file.display()));
        return;
    }
    let told = Standing::of(&desk.config, &desk.places);
    match told.warning(&desk.places) {
        Some((warning, fix)) => found.warns("alerts", warning.trim_end_matches('.'), fix),
        None if told.untried.is_empty() => {
            found.ok("alerts", format!("{} channels, each has worked", told.proven.len()));
        }
        None => {
            found.warns("alerts", format!("never tried: {}", told.untried.join(", ")), "koboshi alert test");
        }
    }
}

fn disk(desk: &Desk, node: &Node, kept: &Kept, found: &mut Findings) {
    for (id, path) in [("disk", desk.places.state_dir.as_path()), ("node-disk", node.prefix.as_path())] {
        let space = match files::free(path) {
            Ok(space) => space,
            Err(e) => {
                found.blocks(id, e.to_string(), "make the path readable");
                continue;
            }
        };
        let free = bytes(space.user_bytes);
        if let Some(reason) = gates::space(path, 0).reason() {
            found.blocks(id, reason, "free some space: a repair writes before it removes");
        } else if space.free_inodes < NEED_INODES {
            found.warns(
                id,
                format!("{} inodes are free at {}", space.free_inodes, path.display()),
                "free some",
            );
        } else if space.user_bytes < gates::LOW_SPACE_BYTES {
            found.warns(id, format!("only {free} are free at {}", path.display()), "free some space");
        } else {
            found.ok(id, format!("{free} free at {}", path.display()));
        }
    }
    if kept.trouble.is_none() {
        let limit = kept.limit_bytes;
        let program = files::tree_size(&node.package_dir, 1_000_000).map_or(0, |s| s.bytes);
        // Measured: a program of 545 MB is kept in about a fifth of that.
        if limit < program / 3 {
            found.warns(
                "store-limit",
                format!("the store may use {}, the program alone has {}", bytes(limit), bytes(program)),
                "raise limit_bytes under [store], or free some space",
            );
        }
    }
}

fn containers(desk: &Desk, node: &Node, found: &mut Findings) {
    // The agent knows; without one it is tried in a directory of our own that goes again.
    if let Some(status) = desk.status() {
        strength(&status.containers, status.containers.starts_with("weak"), found);
        return;
    }
    let dir = std::env::temp_dir().join(format!("koboshi-doctor-{}", std::process::id()));
    let tried =
        files::make_private_dir(&dir).and_then(|()| Containers::open(&format!("{}-doctor", node.name), &dir));
    match tried {
        Ok(containers) => {
            let strength_now = containers.strength();
            containers.remove();
            let weak = matches!(strength_now, Strength::Weak { .. });
            strength(&agent::strength(&strength_now), weak, found);
        }
        Err(e) => found.blocks("containers", e.to_string(), "the temporary directory must be writable"),
    }
    let _ = std::fs::remove_dir_all(&dir);
}

fn strength(words: &str, weak: bool, found: &mut Findings) {
    if weak {
        found.warns(
            "containers",
            format!("{words}: what a step leaves behind is hunted down, not caught for certain"),
            "run the agent where cgroup v2 is writable: as a systemd unit with Delegate=yes, or as root",
        );
    } else {
        found.ok("containers", words);
    }
}

fn runtime(node: &Node, found: &mut Findings) {
    match gates::runtime_version(node, &node.node_bin, Deadline::after(RUNTIME_LIMIT)) {
        Ok(version) => match gates::engine(&node.package_dir, version).reason() {
            Some(why) => found.warns("runtime", why, "install a Node that fits and point the service at it"),
            None => found.ok("runtime", format!("Node {version} at {}", node.node_bin.display())),
        },
        Err(why) => found.warns(
            "runtime",
            why,
            "koboshi recover puts it back from a snapshot; else install Node anew",
        ),
    }
}

fn switching(node: &Node, found: &mut Findings) {
    match exchange::probe(&node.package_dir) {
        Ok(Method::Exchange) => found.ok("switch", "the program is switched in one step (exchange)"),
        Ok(Method::FileByFile { why }) => found.warns(
            "switch",
            format!("the program is repaired file by file: {why}"),
            "none needed; it is slower. A prefix on a plain directory of one file system is switched at once",
        ),
        Err(e) if e.kind == Kind::Denied => found.blocks(
            "switch",
            format!("{e}: the program could not be repaired"),
            "run the agent as the owner of the prefix, or as root",
        ),
        Err(e) => {
            found.warns("switch", e.to_string(), e.hint.unwrap_or_else(|| "look at the file system".into()));
        }
    }
}

fn the_spare(desk: &Desk, node: &Node, found: &mut Findings) {
    if !desk.config.store.spare {
        found.ok(
            "spare",
            "none is kept (spare = false): a lost program tree is written anew, in seconds to a minute",
        );
    } else if spare::ready(node).is_empty() {
        found.warns(
            "spare",
            "none is there yet",
            "the agent makes one after the first good snapshot, if there is room",
        );
    } else {
        found.ok("spare", format!("ready, {}", bytes(spare::size(node))));
    }
}

fn token(desk: &Desk, node: &Node, found: &mut Findings) {
    let judgement = judging::look(desk, node, &mut judging::judge(desk));
    let source = match node::config::token(node).1 {
        TokenSource::None { why } => {
            found.warns(
                "token",
                format!("no usable token ({why}): the node is judged by ownership and HTTP only"),
                "put gateway.auth.token into the node's config or its .env",
            );
            return;
        }
        TokenSource::Literal => "in the config".to_owned(),
        TokenSource::Env { name, from } => format!("{name} from {from}"),
        TokenSource::File(path) => format!("in {}", path.display()),
        TokenSource::Open => "none needed: authentication is off".to_owned(),
    };
    let serves_by_http = judgement.verdict.is_serving() && judgement.confidence == Confidence::Http;
    if serves_by_http {
        found.warns(
            "token",
            "the WebSocket was not reached: judged by ownership and HTTP only",
            "koboshi check, again",
        );
    } else {
        found.ok("token", source);
    }
}

/// User units live only while their user is logged in, unless they linger.
fn linger(desk: &Desk, node: &Node, found: &mut Findings) {
    let mut users: Vec<String> = Vec::new();
    if node.unit.as_ref().is_some_and(|u| u.scope == Scope::User) && desk.unit(node).is_some() {
        users.push(node.user.clone());
    }
    if unit::installed(desk).is_some_and(|u| u.scope == Scope::User) {
        users.extend(unit::user_name());
    }
    users.dedup();
    for user in users {
        if Path::new("/var/lib/systemd/linger").join(&user).exists() {
            found.ok("linger", format!("the services of {user} run without a login"));
        } else {
            found.blocks(
                "linger",
                format!("the services of {user} end with the last logout and do not start with the machine"),
                format!("sudo loginctl enable-linger {user}"),
            );
        }
    }
}
