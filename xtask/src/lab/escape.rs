//! What stands in the place of Node on a host of the lab: where npm is asked to resolve, it tries by every way there is to
//! have somebody else start something that outlives the step. Then it becomes the real Node.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

const TRIES: &str = r#"
export XDG_RUNTIME_DIR=/run/user/$(id -u)
{
    echo "as $(id -un)"
    systemd-run --user --quiet sleep 424242 && echo escaped by the service manager
    sudo -n systemd-run --quiet sleep 424242 && echo escaped by sudo
    env -i setsid -f sleep 424242
    (env -i setsid sleep 424242 & ) &
    echo tried
} >> /tmp/escapes 2>&1
"#;

/// Whether this program was called as a Node.
pub(crate) fn wanted() -> bool {
    std::env::args_os().next().is_some_and(|name| Path::new(&name).file_name().is_some_and(|n| n == "node"))
}

/// Tries, and becomes the real one.
pub(crate) fn run() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    if args.iter().any(|a| a == "--package-lock-only") {
        // What comes of it is in the file.
        let _ = Command::new("sh").args(["-c", TRIES]).status();
    }
    let why = Command::new("/usr/local/bin/node.real").args(args).exec();
    eprintln!("no Node: {why}");
    ExitCode::FAILURE
}
