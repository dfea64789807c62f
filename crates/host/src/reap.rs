//! Reaping without stealing.
//!
//! As PID 1 of a container, or as a subreaper, the agent inherits every orphan. Orphans must be reaped, yet the exit
//! status of a child that somebody here waits for must not vanish. So every child started by this crate is entered
//! in a list while a lock is held from before the fork, and only zombies that are ours and not in the list are
//! reaped. Children started past this crate are not protected: start them through `run` or `container`.

use crate::process;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use std::collections::BTreeSet;
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, PoisonError};

static CHILDREN: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

fn children() -> MutexGuard<'static, BTreeSet<u32>> {
    // A set of numbers is whole whatever a panicking holder did.
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a child and enters it in the list in one step, as seen from [`orphans`].
pub(crate) fn spawn(cmd: &mut Command) -> std::io::Result<Child> {
    let mut list = children();
    let child = cmd.spawn()?;
    list.insert(child.id());
    Ok(child)
}

/// Somebody here waits for this child after all.
pub(crate) fn remember(pid: u32) {
    children().insert(pid);
}

/// The child has been reaped by its owner.
pub(crate) fn forget(pid: u32) {
    children().remove(&pid);
}

/// Whether somebody here waits for this child.
pub(crate) fn is_known(pid: u32) -> bool {
    children().contains(&pid)
}

/// Whether we have no running child but this one.
pub(crate) fn nobody_but(pid: Option<u32>) -> bool {
    children().iter().all(|c| Some(*c) == pid || process::stat_of(*c).is_none_or(|s| s.state == 'Z'))
}

/// Reaps every dead child that nobody here waits for; returns their pids. Cheap enough for each SIGCHLD.
pub fn orphans() -> Vec<u32> {
    let me = std::process::id();
    let list = children();
    process::all_pids()
        .into_iter()
        .filter(|pid| !list.contains(pid))
        .filter(|pid| process::stat_of(*pid).is_some_and(|s| s.ppid == me && s.state == 'Z'))
        .filter(|pid| reap_one(*pid))
        .collect()
}

fn reap_one(pid: u32) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return false };
    matches!(waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG), Ok(Some(_)))
}
