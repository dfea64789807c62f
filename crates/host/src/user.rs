//! Work on what belongs to another user, done as that user.
//!
//! A thread of this process takes on the user's ids for good and ends with the work. What it opens and what it runs is
//! opened and run with that user's rights and groups and nothing more, so a path or a program named by a hostile user
//! leads nowhere that the user could not go alone.

use crate::error::{Context, Error, Kind, Result};
use crate::run::Ids;
use rustix::process::{Gid, Uid};

/// Does the work as this user; directly, when that is who we are. Threads that the work starts are that user's too; ours
/// stay ours.
///
/// # Errors
/// When we may not become that user (nothing was done then), or the work itself fails.
pub fn as_user<T: Send>(ids: Ids, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    if ids == Ids::current() {
        return work();
    }
    let groups: Vec<Gid> = ids.groups().into_iter().map(Gid::from_raw).collect();
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            become_user(ids, &groups)?;
            work()
        });
        let what = || format!("working as user {}", ids.uid);
        thread.join().unwrap_or_else(|_| Err(Error::new(Kind::System, what(), "the work came to no end")))
    })
}

/// The ids of this thread alone; all three of each, so that there is no way back.
fn become_user(ids: Ids, groups: &[Gid]) -> Result<()> {
    let what = || format!("becoming user {}", ids.uid);
    let (uid, gid) = (Uid::from_raw(ids.uid), Gid::from_raw(ids.gid));
    rustix::thread::set_thread_groups(groups).context(what)?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).context(what)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).context(what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Deadline;
    use crate::run::{Cmd, run};
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    #[test]
    fn nothing_is_opened_or_run_with_more_than_the_users_rights_as_root() {
        let ours = Ids::current();
        if ours.uid != 0 {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let file = dir.path().join("roots");
        std::fs::write(&file, "x").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        let nobody = Ids { uid: 65_534, gid: 65_534 };
        let (read, id) = as_user(nobody, || {
            let id = run(&Cmd::new("id", ["-u"]), Deadline::after(Duration::from_secs(20))).unwrap();
            Ok((std::fs::read(&file).map_err(|e| e.kind()), String::from_utf8(id.stdout).unwrap()))
        })
        .unwrap();
        assert_eq!(read, Err(std::io::ErrorKind::PermissionDenied));
        assert_eq!(id.trim(), "65534");
        // The process is still who it was.
        assert_eq!(Ids::current(), ours);
        assert_eq!(std::fs::read(&file).unwrap(), b"x");
    }

    #[test]
    fn as_oneself_it_is_simply_done() {
        assert_eq!(as_user(Ids::current(), || Ok(7)).unwrap(), 7);
        let failed = as_user(Ids::current(), || Err::<(), _>(Error::new(Kind::NotFound, "look", "gone")));
        assert_eq!(failed.map_err(|e| e.kind), Err(Kind::NotFound));
    }
}
