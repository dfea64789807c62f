//! Looks at the node on a thread of its own, so that a probe that hangs delays no other watch.

use engine::Moment;
use host::clock::Deadline;
use host::{Context, Result};
use node::update::UpdateAtWork;
use node::{Look, Node, Want};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// One look with all its probes: three HTTP requests and a hello that takes its time.
const LOOK_LIMIT: Duration = Duration::from_secs(8);
/// Probing needs little stack; the default would count against nothing but looks large.
const STACK_BYTES: usize = 512 << 10;

/// What the last search for an update found. It goes through the open files of every process on the host: done with each
/// look at a gateway that starts, it would take from that start a fifth of a core.
#[derive(Debug, Default)]
struct LastUpdate {
    at: Option<Moment>,
    found: Option<UpdateAtWork>,
}

impl LastUpdate {
    /// Updates take minutes, and the judge waits minutes for them.
    const EVERY_MS: u64 = 5_000;

    fn fresh(&self, now: Moment) -> Option<Option<UpdateAtWork>> {
        let fresh = self.at.and_then(|at| now.since_ms(at)).is_some_and(|ms| ms < Self::EVERY_MS);
        fresh.then(|| self.found.clone())
    }
}

/// The probing thread. At most one look is under way.
#[derive(Debug)]
pub struct Prober {
    ask: Sender<(Node, Want)>,
    got: Receiver<Look>,
    wake: Arc<OwnedFd>,
    asked: Option<Moment>,
}

impl Prober {
    /// Starts the thread. It ends when this is dropped.
    pub fn start() -> Result<Prober> {
        let (ask, asked) = channel::<(Node, Want)>();
        let (give, got) = channel::<Look>();
        let wake = Arc::new(
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .context(|| "make an eventfd".into())?,
        );
        let signal = Arc::clone(&wake);
        std::thread::Builder::new()
            .name("prober".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let mut heard = None;
                let mut update = LastUpdate::default();
                while let Ok((node, mut want)) = asked.recv() {
                    // Every hello comes with a full look at the kernel's table as well.
                    want.heard = if want.hello { None } else { heard.take() };
                    want.searched = update.fresh(host::clock::now());
                    let look = node::look(&node, &want, Deadline::after(LOOK_LIMIT));
                    heard.clone_from(&look.heard);
                    if want.searched.is_none() && (want.update || look.process.is_none()) {
                        update = LastUpdate { at: Some(look.at), found: look.update.clone() };
                    }
                    if give.send(look).is_err() {
                        return;
                    }
                    let _ = rustix::io::write(&signal, &1_u64.to_ne_bytes());
                }
            })
            .context(|| "start the probing thread".into())?;
        Ok(Prober { ask, got, wake, asked: None })
    }

    /// Whether a look is under way.
    pub fn busy(&self) -> bool {
        self.asked.is_some()
    }

    /// For how long the look under way has had no answer, in milliseconds.
    pub fn silent_ms(&self, now: Moment) -> u64 {
        self.asked.and_then(|at| now.since_ms(at)).unwrap_or(0)
    }

    /// Asks for a look, unless one is under way.
    pub fn ask(&mut self, node: &Node, want: Want) {
        if self.asked.is_none() && self.ask.send((node.clone(), want)).is_ok() {
            self.asked = Some(host::clock::now());
        }
    }

    /// The look that was asked for, once it is there.
    pub fn take(&mut self) -> Option<Look> {
        let mut count = [0_u8; 8];
        let _ = rustix::io::read(&*self.wake, &mut count);
        let look = self.got.try_recv().ok()?;
        self.asked = None;
        Some(look)
    }
}

impl AsFd for Prober {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_search_serves_for_its_time_and_no_longer() {
        let at = |ms| Moment { boot: 1, ms };
        let found = Some(UpdateAtWork { what: "npm".into(), progress: 1 });
        let last = LastUpdate { at: Some(at(1_000)), found: found.clone() };
        assert_eq!(last.fresh(at(5_999)), Some(found));
        assert_eq!(last.fresh(at(6_000)), None);
        assert_eq!(last.fresh(Moment { boot: 2, ms: 1_001 }), None, "of another boot");
        assert_eq!(LastUpdate::default().fresh(at(0)), None);
    }
}
