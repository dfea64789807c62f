//! Calls people. A message that was put into the outbox is told to every configured channel at least once,
//! across crashes, reboots and dead networks, and at most a few times: its key travels with it, so a receiver
//! can tell a repetition from news.
//!
//! Everything leaves through koboshi's own HTTPS, never through the patient. Tokens and addresses that are
//! secrets show in no log, no `Debug` output and no error. A message is rendered once, when it is made, from
//! the one table in [`text`]; what is queued on disk is what will be sent.
//!
//! Order of the house: [`text`] makes a [`Message`], [`outbox`] keeps it, [`channel`] knows how each receiver
//! wants to be spoken to, [`deliver`](mod@deliver) brings the two together under one deadline. [`respond`] is the
//! voice on the gateway's own port while an emergency holds.

pub mod channel;
pub mod deliver;
mod local;
pub mod outbox;
pub mod respond;
mod send;
pub mod text;

pub use channel::{Address, Channel, Secret, local_channels};
pub use deliver::{Delivery, Receipt, Refusal, deliver, test};
pub use outbox::{Kept, Outbox, Put};
pub use send::heartbeat;
pub use text::{Facts, Kind, Language, Message, Notice, Severity};
