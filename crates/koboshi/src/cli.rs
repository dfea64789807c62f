//! The command line: names, options and their help. What they do lives in `commands`.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Keeps an OpenClaw node standing, with no human in the loop.
#[derive(Debug, Parser)]
#[command(name = "koboshi", version, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    /// Print exactly one JSON object on standard output; progress goes to standard error.
    #[arg(long, global = true)]
    pub json: bool,
    /// The configuration file (default: /etc/koboshi/koboshi.toml as root, else ~/.config/koboshi/koboshi.toml).
    #[arg(long, global = true, env = "KOBOSHI_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Everything koboshi does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// The agent, in the foreground: watches the node and rights it (what the service runs; also as PID 1).
    Guard(Guard),
    /// Finds the node, writes the configuration, takes the first snapshot, sets up the service.
    Install(Install),
    /// Takes koboshi's service and configuration away; the node stays exactly as it is.
    Uninstall(Uninstall),
    /// One screen: verdict, layers ready or not, snapshots, last incidents.
    Status,
    /// Probes the node once. Exit: 0 serving, 1 not serving, 3 inconclusive.
    Check,
    /// What would keep a recovery from working here, and how to fix it.
    Doctor,
    /// Rights the node now, as the agent would.
    Recover(Recover),
    /// The store: create, list (also without a word more), show, verify, restore, prune.
    Snapshot {
        /// What is to be done.
        #[command(subcommand)]
        what: Option<Snapshot>,
    },
    /// What happened: list (also without a word more), show ID.
    Incidents {
        /// List or show.
        #[command(subcommand)]
        what: Option<Incidents>,
    },
    /// Hands off: watch and journal, touch nothing. Ends by itself.
    Pause(Pause),
    /// Hands on again.
    Resume,
    /// What is there now is intended: a new baseline; older snapshots are kept.
    Accept,
    /// The gateway under any service manager; a stop here stays stopped.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Alert channels.
    #[command(subcommand)]
    Alert(AlertCommand),
    /// The store's key, for safe keeping off this host.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Other hosts whose nodes may lend their program: status (also without a word more), enroll.
    Fleet {
        /// Ask or enroll.
        #[command(subcommand)]
        what: Option<Fleet>,
    },
    /// A real OpenClaw node in a throw-away directory, knocked over and righted before your eyes.
    Demo(Demo),
    /// Shell completions on standard output.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Man pages, one file per command, into a directory.
    Man {
        /// The directory to write into.
        dir: PathBuf,
    },
    /// One step of a recovery, run by the agent in a container of its own.
    #[command(hide = true)]
    Step {
        /// The request file that the agent wrote; `system-install`, `home-install` (what sudo permits) or `enroll-node`.
        request: PathBuf,
        /// The node, for the last three.
        node: Option<String>,
    },
    /// What the store holds, for another command: a process that its disk may hold for ever.
    #[command(hide = true)]
    Kept,
    /// Lends this node's program to a peer: the forced command of its key.
    #[command(hide = true)]
    Donate {
        /// The node's name.
        node: Option<String>,
    },
    /// The SSH part of a conversation with a peer, run by a step.
    #[command(hide = true)]
    Reach {
        /// Whom to talk to, as JSON.
        target: String,
    },
    /// The voice on the gateway's port while an emergency holds; started and ended by the agent.
    #[command(hide = true)]
    Respond(Respond),
}

/// Options of `respond`.
#[derive(Debug, Args)]
pub struct Respond {
    /// The gateway's port.
    #[arg(long)]
    pub port: u16,
    /// The agent's pid.
    #[arg(long)]
    pub agent: u32,
    /// The node's name.
    #[arg(long)]
    pub node: String,
    /// The incident's id.
    #[arg(long)]
    pub incident: String,
    /// What a starting gateway opens.
    #[arg(long)]
    pub opened: Vec<PathBuf>,
    /// Where a start or an upgrade changes something.
    #[arg(long)]
    pub changed: Vec<PathBuf>,
}

/// Options of `guard`.
#[derive(Debug, Args)]
pub struct Guard {
    /// Judge, journal and tell what would have been done; touch nothing.
    #[arg(long)]
    pub watch: bool,
    /// Guard for one `koboshi recover` only, and end with that process.
    #[arg(long, hide = true, value_name = "PID")]
    pub errand: Option<i32>,
    /// On that errand, climb with the one layer that is ordered and with no other.
    #[arg(long, hide = true, requires = "errand")]
    pub one_layer: bool,
}

/// Whose service koboshi becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Home {
    /// The calling user's own service.
    User,
    /// A system service.
    System,
}

/// Options of `install`.
#[derive(Debug, Args)]
pub struct Install {
    /// Install as this user's own service.
    #[arg(long, conflicts_with = "system")]
    pub user: bool,
    /// Install as a system service (needs root).
    #[arg(long)]
    pub system: bool,
    /// The npm prefix the node lives in, where it is not found by itself.
    #[arg(long, value_name = "DIR")]
    pub prefix: Option<PathBuf>,
    /// The gateway's port, where several nodes are found.
    #[arg(long)]
    pub port: Option<u16>,
    /// The user who owns the node.
    #[arg(long, value_name = "NAME")]
    pub node_user: Option<String>,
    /// The OpenClaw profile.
    #[arg(long)]
    pub profile: Option<String>,
    /// The OpenClaw state directory.
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Say what would be written and write nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Write the configuration and take the first snapshot, but register and start no service.
    #[arg(long)]
    pub no_service: bool,
}

/// Options of `uninstall`.
#[derive(Debug, Args)]
pub struct Uninstall {
    /// Remove the store, the key and the journal too: every backup is gone afterwards.
    #[arg(long)]
    pub purge: bool,
    /// Say what would be removed and remove nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// Options of `recover`.
#[derive(Debug, Args)]
pub struct Recover {
    /// Say what would be done and why; touch nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Try only this layer.
    #[arg(long, value_name = "LAYER")]
    pub only: Option<String>,
}

/// The store's commands.
#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// Takes a snapshot now.
    Create {
        /// A word to find it by.
        #[arg(long, default_value = "by hand")]
        note: String,
    },
    /// All snapshots, newest first.
    List,
    /// What one snapshot holds.
    Show {
        /// The snapshot's id, or its first letters.
        id: String,
    },
    /// Reads every stored byte of one snapshot (or all) and proves it.
    Verify {
        /// The snapshot's id; all when left out.
        id: Option<String>,
    },
    /// Puts classes of one snapshot into a directory of your choice, touching no node.
    Restore {
        /// The snapshot's id, or its first letters.
        id: String,
        /// The directory to restore into; must be empty or absent.
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
        /// Only these classes.
        #[arg(long = "class", value_name = "CLASS")]
        classes: Vec<String>,
    },
    /// Removes the oldest snapshots beyond the size limit; never what a trusted one needs.
    Prune {
        /// The size to come down to, in bytes (default: the configured limit).
        #[arg(long, value_name = "BYTES")]
        limit: Option<u64>,
    },
}

/// The incidents' commands.
#[derive(Debug, Subcommand)]
pub enum Incidents {
    /// All incidents on record, newest first.
    List,
    /// One incident, moment by moment.
    Show {
        /// The incident's id.
        id: String,
    },
}

/// Options of `pause`.
#[derive(Debug, Args)]
pub struct Pause {
    /// For how long: 30m, 2h, 1d.
    #[arg(long = "for", default_value = "2h", value_name = "TIME")]
    pub duration: String,
}

/// The gateway's commands.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// Starts the gateway and lifts an earlier stop.
    Start,
    /// Stops the gateway; it stays stopped until `node start`.
    Stop,
    /// Stops cleanly and starts again.
    Restart,
}

/// The alert commands.
#[derive(Debug, Subcommand)]
pub enum AlertCommand {
    /// Sends a test through every channel and says which accepted it.
    Test,
}

/// The key's commands.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Prints the key; keep it off this host.
    Export,
}

/// The fleet's commands.
#[derive(Debug, Subcommand)]
pub enum Fleet {
    /// Asks every peer who it is and how its node does.
    Status,
    /// Makes another host a peer: pins its key, gives it ours for one read-only command, checks it, writes it down.
    Enroll(Enroll),
}

/// Options of `fleet enroll`.
#[derive(Debug, Args)]
pub struct Enroll {
    /// The host's name or address.
    pub host: String,
    /// The account there (default: the name of the node's user).
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,
    /// The port of its SSH server.
    #[arg(long, default_value_t = 22)]
    pub port: u16,
    /// The key that the host must show: `ssh-ed25519 AAAA…`.
    #[arg(long, value_name = "KEY")]
    pub host_key: Option<String>,
    /// Ask nothing; needs --host-key, since nobody compares the fingerprint.
    #[arg(long, requires = "host_key")]
    pub yes: bool,
    /// Believe this peer alone when it lends a version that was never proven on this host.
    #[arg(long)]
    pub trusted: bool,
    /// How the node is called there.
    #[arg(long, default_value = "main", value_name = "NAME")]
    pub node: String,
    /// The command that our key may run there (default: the koboshi found there, with `donate NODE`).
    #[arg(long, value_name = "COMMAND")]
    pub command: Option<String>,
}

/// Options of `demo`.
#[derive(Debug, Clone, Args)]
pub struct Demo {
    /// The OpenClaw version: the newest tested one, a version, or `latest`.
    #[arg(long, default_value = crate::demo::TESTED_OPENCLAW)]
    pub openclaw: String,
    /// Keep downloads and the installed program here between runs.
    #[arg(long, value_name = "DIR", env = "KOBOSHI_CACHE")]
    pub cache: Option<PathBuf>,
    /// The throw-away directory (default: a fresh one under the temporary directory).
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Only these faults.
    #[arg(long = "fault", value_name = "NAME")]
    pub faults: Vec<String>,
    /// Run the faults this many times, each beside a bare cold start.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=50))]
    pub rounds: u32,
    /// Set everything up, inject nothing (with --keep: a node and its agent to play with).
    #[arg(long)]
    pub no_faults: bool,
    /// Leave the node and its agent running and say how to reach both.
    #[arg(long)]
    pub keep: bool,
    /// List the faults and stop.
    #[arg(long)]
    pub list: bool,
    /// For the figures: this many nodes take turns, and each fault has a bare cold start beside it (0: one node, as
    /// shown to people).
    #[arg(long, hide = true, default_value_t = 0, conflicts_with_all = ["keep", "no_faults"],
        value_parser = clap::value_parser!(u32).range(0..=8))]
    pub nodes: u32,
    /// For the figures: each result goes to this file as soon as it is known, one JSON object a line.
    #[arg(long, hide = true, value_name = "FILE", requires = "nodes")]
    pub results: Option<PathBuf>,
}
