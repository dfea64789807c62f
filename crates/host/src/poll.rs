//! Waiting on descriptors under a deadline. Interrupted waits go on until the deadline.

use crate::clock::Deadline;
use crate::error::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// Waits until one of `fds` can be read (or has hung up) or the deadline passes. The answer says, in the order of
/// `fds`, which ones are ready; all false when the deadline passed.
///
/// # Errors
/// When the system refuses to wait (no memory, too many descriptors).
pub fn readable(fds: &[BorrowedFd<'_>], deadline: Deadline) -> Result<Vec<bool>> {
    wait_for(fds, PollFlags::IN, deadline)
}

/// The same for "something changed" as kernfs files (`cgroup.events`) and PSI triggers report it.
///
/// # Errors
/// As for [`readable`].
pub fn changed(fd: BorrowedFd<'_>, deadline: Deadline) -> Result<bool> {
    Ok(wait_for(&[fd], PollFlags::PRI, deadline)?.first().copied().unwrap_or(false))
}

fn wait_for(fds: &[BorrowedFd<'_>], flags: PollFlags, deadline: Deadline) -> Result<Vec<bool>> {
    let mut polled: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, flags)).collect();
    loop {
        let left = timespec(deadline.left());
        match rustix::event::poll(&mut polled, Some(&left)) {
            Ok(_) => return Ok(polled.iter().map(|p| !p.revents().is_empty()).collect()),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e).context(|| "waiting on descriptors".into()),
        }
    }
}

fn timespec(d: Duration) -> Timespec {
    Timespec { tv_sec: i64::try_from(d.as_secs()).unwrap_or(i64::MAX), tv_nsec: i64::from(d.subsec_nanos()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;

    #[test]
    fn says_which_one_is_ready_and_keeps_the_deadline() {
        let (quiet, _keep) = std::io::pipe().unwrap();
        let (loud, mut writer) = std::io::pipe().unwrap();
        writer.write_all(b"x").unwrap();
        let d = Deadline::after(Duration::from_secs(5));
        assert_eq!(readable(&[quiet.as_fd(), loud.as_fd()], d).unwrap(), [false, true]);
        let d = Deadline::after(Duration::from_millis(20));
        assert_eq!(readable(&[quiet.as_fd()], d).unwrap(), [false]);
        assert!(d.passed());
    }
}
