//! What keeps a stranger's program from having somebody else start processes for it, which no container would hold.
//!
//! `systemd-run --user` asks the user's service manager, and what that starts lives in the manager's cgroup; sudo,
//! crontab and at are setuid, and PAM moves what they start. So such a program gains no privileges (`no_new_privs`), and
//! where its user's manager has its sockets, `/run/user/UID`, it sees an empty directory. For root that takes a mount
//! namespace, for anybody else a user namespace besides. Where the kernel grants neither (some distributions forbid user
//! namespaces) only the first holds: [`Shut::half`].

use crate::run::Ids;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process as rp;
use std::ffi::CString;
use std::path::PathBuf;

/// Prepared before the fork: afterwards nothing may allocate.
#[derive(Debug)]
pub(crate) struct Shut {
    /// What is hidden; nothing where there is no such directory.
    hidden: Option<CString>,
    /// Whether we may mount without a user namespace.
    root: bool,
    uid_map: String,
    gid_map: String,
}

impl Shut {
    /// For a program that runs as this user.
    pub(crate) fn of(ids: Ids) -> Shut {
        let dir = PathBuf::from(format!("/run/user/{}", ids.uid));
        Shut {
            hidden: dir
                .is_dir()
                .then(|| CString::new(dir.into_os_string().into_encoded_bytes()).ok())
                .flatten(),
            root: Ids::current().uid == 0,
            uid_map: format!("{0} {0} 1", ids.uid),
            gid_map: format!("{0} {0} 1", ids.gid),
        }
    }

    /// The same with nothing hidden.
    pub(crate) fn half(ids: Ids) -> Shut {
        Shut { hidden: None, ..Shut::of(ids) }
    }

    /// Between fork and exec, while it is still who we are.
    pub(crate) fn before_becoming(&self) -> std::io::Result<()> {
        let Some(dir) = self.hidden.as_ref().filter(|_| self.root) else { return Ok(()) };
        unshare(rustix::thread::UnshareFlags::NEWNS)?;
        // Else the host would see the mount too.
        mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        hide(dir)
    }

    /// The same, once it is who it will be.
    pub(crate) fn after_becoming(&self) -> std::io::Result<()> {
        if let Some(dir) = self.hidden.as_ref().filter(|_| !self.root) {
            // Whoever changed its user meanwhile may not write its own maps otherwise.
            rp::set_dumpable_behavior(rp::DumpableBehavior::Dumpable)?;
            unshare(rustix::thread::UnshareFlags::NEWUSER | rustix::thread::UnshareFlags::NEWNS)?;
            tell(c"/proc/self/setgroups", "deny")?;
            tell(c"/proc/self/gid_map", &self.gid_map)?;
            tell(c"/proc/self/uid_map", &self.uid_map)?;
            hide(dir)?;
        }
        Ok(rustix::thread::set_no_new_privs(true)?)
    }
}

fn hide(dir: &CString) -> std::io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(mount(c"none", dir, c"tmpfs", flags, Some(c"size=64k,mode=0755"))?)
}

fn tell(file: &std::ffi::CStr, words: &str) -> std::io::Result<()> {
    let fd = rustix::fs::open(
        file,
        rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    rustix::io::write(&fd, words.as_bytes())?;
    Ok(())
}

#[allow(unsafe_code)]
fn unshare(flags: rustix::thread::UnshareFlags) -> std::io::Result<()> {
    // SAFETY: the namespaces asked for share no file descriptors, and the child has one thread.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}
