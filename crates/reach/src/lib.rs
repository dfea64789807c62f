//! Speaks SSH: one connection to a peer, one channel, three verbs.
//!
//! Guarantees. **Only the pinned host key** is spoken to, only the one key file is offered: no agent, no password, no
//! forwarding, nothing looked up in anybody's `ssh_config`. **Nothing hangs**: the SSH part ([`pump`]) runs in a child
//! of our own binary that is killed with its caller's deadline, and a peer that says nothing for a while is left.
//! **Nothing foreign is believed**: frames, lists and objects are bounded before they are read, every name and path is
//! checked, and an object is handed on only when its BLAKE3 is its name. **Nothing private can be asked for**: the
//! requests ([`words::Request`]) can name neither a path nor a class; there are only the program and its runtime.
//!
//! An async runtime lives in [`pump`] and nowhere else; callers hold a [`Call`], which is plain reads and writes.

mod call;
pub mod keys;
mod manifest;
mod pump;
mod serve;
pub mod words;

pub use call::{Call, Got};
pub use manifest::{Entry, Manifest, Thing, Tree};
pub use pump::{Target, pump, scan};
pub use serve::{Lender, serve};
pub use words::{Name, Status};
