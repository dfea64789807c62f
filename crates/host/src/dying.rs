//! Notices that a process is being torn down before the kernel can say that it has ended.
//!
//! A pidfd becomes readable when the last thread is gone, and the last thread first gives back all the memory: 50 to
//! 150 ms for a gateway of 700 MB. Its other threads end within 5 ms of the signal, and since Linux 6.9 a pidfd can stand
//! for one of them. That one of them ended proves nothing (a program may end its own threads); that the process has no
//! memory any more does. An older kernel gives no such watch, and the exit is seen a little later.

use crate::process::{ProcessId, entries};
use rustix::process::{Pid, PidfdFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

/// `PIDFD_THREAD` of `linux/pidfd.h`.
const PIDFD_THREAD: u32 = rustix::fs::OFlags::EXCL.bits();
/// One may be the very thread that ends last; two cannot both be.
const THREADS_WATCHED: usize = 2;
/// Threads of a process that are looked through for them.
const THREADS_LIMIT: usize = 64;
/// Between a thread's end and that of the thread which still held the memory.
const LOOKS: u32 = 5;
const BETWEEN_LOOKS: Duration = Duration::from_millis(1);

/// A watch on some of a process's threads.
#[derive(Debug)]
pub struct DeathWatch {
    process: ProcessId,
    threads: Vec<OwnedFd>,
}

impl DeathWatch {
    /// Watches a process; `None` when it has one thread only, is gone, or the kernel cannot.
    #[must_use]
    pub fn of(process: ProcessId) -> Option<DeathWatch> {
        let dir = PathBuf::from(format!("/proc/{}/task", process.pid));
        let mut others: Vec<i32> = entries(&dir)
            .filter_map(|name| name.parse().ok())
            .filter(|tid| u32::try_from(*tid).is_ok_and(|tid| tid != process.pid))
            .take(THREADS_LIMIT)
            .collect();
        // The oldest live longest: what a program starts first it needs to its end.
        others.sort_unstable();
        let open = |tid: &i32| {
            let fd =
                rustix::process::pidfd_open(Pid::from_raw(*tid)?, PidfdFlags::from_bits_retain(PIDFD_THREAD));
            // Still one of its threads now: then it was one when it was opened.
            fd.ok().filter(|_| dir.join(tid.to_string()).exists())
        };
        let threads: Vec<OwnedFd> = others.iter().filter_map(open).take(THREADS_WATCHED).collect();
        (!threads.is_empty() && process.stat().is_some()).then_some(DeathWatch { process, threads })
    }

    /// Whose threads these are.
    #[must_use]
    pub fn process(&self) -> ProcessId {
        self.process
    }

    /// Readable when one of the threads has ended.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.threads.iter().map(AsFd::as_fd)
    }

    /// Whether the process has given up its memory, so that nothing can bring it back. Takes up to 5 ms; asked when
    /// one of its threads has ended. `false` says nothing: a new watch is to be set up then.
    #[must_use]
    pub fn dying(&self) -> bool {
        (0..LOOKS).any(|look| {
            if look > 0 {
                std::thread::sleep(BETWEEN_LOOKS);
            }
            self.process.has_no_memory()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Deadline;
    use crate::poll;
    use crate::process::PidFd;
    use crate::reap;
    use std::process::{Command, Stdio};

    const ROLE: &str = "KOBOSHI_TEST_THREADS";

    /// Not a test by itself: the process that the other tests watch. One of its threads ends when its standard input
    /// says so, the others never.
    #[test]
    fn a_process_of_several_threads() {
        if std::env::var_os(ROLE).is_none() {
            return;
        }
        let first = std::thread::spawn(|| std::io::stdin().read_line(&mut String::new()));
        for _ in 0..3 {
            std::thread::spawn(|| {
                loop {
                    std::thread::park();
                }
            });
        }
        let _ = first.join();
        loop {
            std::thread::park();
        }
    }

    #[allow(clippy::zombie_processes)] // Reaped through its pidfd.
    fn threads() -> (std::process::ChildStdin, PidFd) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([
                "--exact",
                "dying::tests::a_process_of_several_threads",
                "--nocapture",
                "--test-threads=2",
            ])
            .env(ROLE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        let mut child = reap::spawn(&mut command).unwrap();
        let fd = ProcessId::of(child.id()).unwrap().open().unwrap();
        let deadline = Deadline::after(Duration::from_secs(20));
        while fd.id().stat().is_some_and(|s| s.threads < 6) {
            assert!(!deadline.passed(), "its threads do not come up");
            std::thread::sleep(Duration::from_millis(5));
        }
        (child.stdin.take().unwrap(), fd)
    }

    fn end(fd: &PidFd) {
        fd.signal(rustix::process::Signal::KILL).unwrap();
        assert!(fd.wait(Deadline::after(Duration::from_secs(10))));
        fd.reap();
    }

    fn one_ended(watch: &DeathWatch, within: Duration) -> bool {
        let fds: Vec<BorrowedFd<'_>> = watch.fds().collect();
        poll::readable(&fds, Deadline::after(within)).unwrap().contains(&true)
    }

    #[test]
    fn a_kill_is_known_by_threads_that_end_and_memory_that_is_gone() {
        let (_stdin, fd) = threads();
        let Some(watch) = DeathWatch::of(fd.id()) else {
            assert!(kernel_is_older(), "no watch on a kernel that can");
            end(&fd);
            return;
        };
        assert!(!one_ended(&watch, Duration::from_millis(50)) && !watch.dying());
        end(&fd);
        assert!(one_ended(&watch, Duration::from_secs(10)) && watch.dying());
        assert!(DeathWatch::of(fd.id()).is_none(), "a process that is gone is not watched");
    }

    #[test]
    fn a_thread_that_ends_by_itself_is_no_death() {
        let (mut stdin, fd) = threads();
        let Some(watch) = DeathWatch::of(fd.id()) else {
            assert!(kernel_is_older(), "no watch on a kernel that can");
            end(&fd);
            return;
        };
        std::io::Write::write_all(&mut stdin, b"\n").unwrap();
        // Whichever threads are watched, the process lives on.
        let _ = one_ended(&watch, Duration::from_millis(200));
        assert!(!watch.dying() && fd.id().alive());
        assert!(DeathWatch::of(fd.id()).is_some());
        end(&fd);
    }

    fn kernel_is_older() -> bool {
        let release = rustix::system::uname();
        let release = release.release().to_string_lossy().into_owned();
        let mut parts = release.split(['.', '-']).map(|p| p.parse::<u32>().unwrap_or(0));
        (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) < (6, 9)
    }
}
