//! What a child does between fork and exec: enter its container, leave our session, drop its privileges, be shut in.
//!
//! It happens there because a child that could fork or exec first could leave something behind outside its
//! container.

use crate::run::Ids;
use crate::shut::Shut;
use rustix::process as rp;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// How a child is set apart before it becomes the other program.
#[derive(Debug)]
pub(crate) struct Apart {
    /// A new session (a step, the gateway) or only a new process group (a short tool).
    pub(crate) session: bool,
    /// `cgroup.procs` of the container, open for writing.
    pub(crate) cgroup: Option<OwnedFd>,
    /// Whom to become.
    pub(crate) ids: Option<Ids>,
    /// Lowest CPU priority; the I/O priority follows it (best effort, lowest level).
    pub(crate) background: bool,
    /// File mode creation mask, so that the agent's own private one does not leak into what others install.
    pub(crate) umask: Option<u32>,
    /// Nobody else starts anything for it.
    pub(crate) shut: Option<Shut>,
}

/// The lowest CPU priority there is.
const LOWEST_PRIORITY: i32 = 19;

impl Apart {
    /// Arranges for the child to be set apart.
    pub(crate) fn arrange(self, cmd: &mut Command) {
        // Looked up before the fork: afterwards nothing may allocate.
        let groups: Vec<rustix::process::Gid> = match self.ids {
            Some(ids) => ids.groups().into_iter().map(rp::Gid::from_raw).collect(),
            None => Vec::new(),
        };
        let become_other = self.ids.filter(|ids| *ids != Ids::current());
        let step = move || -> std::io::Result<()> {
            if let Some(procs) = &self.cgroup {
                // "0" is the writer itself.
                rustix::io::write(procs, b"0")?;
            }
            if self.session {
                rp::setsid()?;
            } else {
                rp::setpgid(None, None)?;
            }
            if self.background {
                rp::setpriority_process(None, LOWEST_PRIORITY)?;
            }
            if let Some(mask) = self.umask {
                rp::umask(rustix::fs::Mode::from_raw_mode(mask));
            }
            if let Some(shut) = &self.shut {
                shut.before_becoming()?;
            }
            if let Some(ids) = become_other {
                // The child has one thread, so its thread's ids are its process's.
                let (uid, gid) = (rp::Uid::from_raw(ids.uid), rp::Gid::from_raw(ids.gid));
                rustix::thread::set_thread_groups(&groups)?;
                rustix::thread::set_thread_res_gid(gid, gid, gid)?;
                rustix::thread::set_thread_res_uid(uid, uid, uid)?;
            }
            if let Some(shut) = &self.shut {
                shut.after_becoming()?;
            }
            Ok(())
        };
        before_exec(cmd, step);
    }
}

#[allow(unsafe_code)]
fn before_exec(cmd: &mut Command, step: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static) {
    // SAFETY: `step` (above, the only caller) makes raw system calls on values prepared before the fork; it neither
    // allocates nor takes a lock, which is what the child of a threaded process may do.
    unsafe {
        cmd.pre_exec(step);
    }
}
