//! Workloads that try to get away, and ways to see whether they did.
#![allow(dead_code, clippy::unwrap_used)] // Each test binary uses its part; helpers of tests may unwrap.

use host::clock::Deadline;
use host::container::{Containers, OutputFile, Spec};
use host::process::{ProcessId, all_pids};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub(crate) fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

/// A number that no other process has among its arguments: `sleep` for so many seconds.
pub(crate) fn token() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{}.{:06}{:03}", 86_400, std::process::id() % 1_000_000, NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Running processes with that argument.
pub(crate) fn with_token(token: &str) -> Vec<ProcessId> {
    let mut found: Vec<ProcessId> = all_pids().into_iter().filter_map(ProcessId::of).collect();
    found.retain(|p| p.alive() && p.cmdline().iter().any(|a| a == token));
    found
}

/// Looks until it is so; fails the test when it does not come to be.
pub(crate) fn until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = soon();
    while !so() {
        assert!(!deadline.passed(), "never came to be: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn shell(script: &str, mark: &str) -> Spec {
    Spec {
        program: "/bin/sh".into(),
        args: vec!["-c".into(), script.into()],
        mark: mark.into(),
        ..Spec::default()
    }
}

pub(crate) fn with_output(spec: Spec, path: &Path, limit_bytes: u64) -> Spec {
    Spec { output: Some(OutputFile { path: path.to_path_buf(), limit_bytes }), ..spec }
}

/// A node name of our own, whose containers are removed at the end whatever happens.
pub(crate) struct Node {
    pub(crate) containers: Containers,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) name: String,
}

impl Node {
    /// What the next agent would open.
    pub(crate) fn run_dir(&self) -> std::path::PathBuf {
        self.dir.path().join("run")
    }

    pub(crate) fn new(open: impl Fn(&str, &Path) -> Containers) -> Node {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let dir = tempfile::tempdir().unwrap();
        let name = format!("test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let containers = open(&name, &dir.path().join("run"));
        Node { containers, dir, name }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for step in self.containers.leftovers() {
            let _ = self.containers.kill(&step, soon());
        }
        let _ = self.containers.kill_gateway(soon());
        self.containers.remove();
    }
}
