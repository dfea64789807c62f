//! The event loop spins: a full core, no answer, and SIGTERM is never read.

use crate::{Fault, preload};
use engine::Layer;

/// An endless loop inside the gateway's own process.
pub const FAULT: Fault = Fault {
    name: "spinning",
    about: "endless loop in the gateway's event loop",
    healed_by: &[Layer::Restart],
    inject: |target| preload::order(target.fault_file, "spin"),
};
