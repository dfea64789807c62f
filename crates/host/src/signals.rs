//! Signals as something to poll: SIGTERM, SIGINT, SIGHUP and SIGCHLD wake a descriptor, and what came is read as words.
//!
//! The handler sets a flag and writes one byte into a socket pair; everything else happens in the loop that polls. A
//! full socket loses nothing, since the flag says what came and one unread byte is enough to wake.

use crate::error::{Context, Error, Kind, Result};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A signal that the agent listens to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Got {
    /// SIGTERM: end, let the gateway be (or drain it, as PID 1).
    Terminate,
    /// SIGINT: the same from a terminal.
    Interrupt,
    /// SIGHUP: read the configuration again.
    Hangup,
    /// SIGCHLD: a child ended; perhaps an orphan is to be reaped. Several may have become one.
    Child,
}

/// The signals that came since they were last asked for.
#[derive(Debug)]
pub struct Signals {
    wake: UnixStream,
    flags: Vec<(Got, Arc<AtomicBool>)>,
    ids: Vec<signal_hook::SigId>,
}

impl Signals {
    /// Starts listening. The signals' default effect is gone from here on, for the whole process; dropping this leaves
    /// them without effect.
    ///
    /// # Errors
    /// When the system refuses a descriptor or handler.
    pub fn new() -> Result<Signals> {
        let what = || "listening to signals".to_owned();
        let (wake, bell) = UnixStream::pair().context(what)?;
        wake.set_nonblocking(true).context(what)?;
        bell.set_nonblocking(true).context(what)?;
        let mut signals = Signals { wake, flags: Vec::new(), ids: Vec::new() };
        for (number, got) in [
            (SIGTERM, Got::Terminate),
            (SIGINT, Got::Interrupt),
            (SIGHUP, Got::Hangup),
            (SIGCHLD, Got::Child),
        ] {
            let flag = Arc::new(AtomicBool::new(false));
            // The flag first: whoever is woken finds it set.
            signals.ids.push(signal_hook::flag::register(number, Arc::clone(&flag)).context(what)?);
            let bell = bell.try_clone().context(what)?;
            signals.ids.push(signal_hook::low_level::pipe::register(number, bell).context(what)?);
            signals.flags.push((got, flag));
        }
        Ok(signals)
    }

    /// What came since the last call, each signal once.
    ///
    /// # Errors
    /// When the descriptor fails, which the kernel gives no reason for.
    pub fn take(&mut self) -> Result<Vec<Got>> {
        let mut sink = [0_u8; 256];
        loop {
            match self.wake.read(&mut sink) {
                Ok(0) => return Err(Error::new(Kind::System, "reading signals", "the handler's end closed")),
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io("reading signals", &e)),
            }
        }
        Ok(self.flags.iter().filter(|(_, f)| f.swap(false, Ordering::SeqCst)).map(|(got, _)| *got).collect())
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for id in self.ids.drain(..) {
            signal_hook::low_level::unregister(id);
        }
    }
}
