//! The gateway is killed outright, as the kernel does when memory runs out.

use crate::Fault;
use engine::Layer;
use rustix::process::Signal;

/// SIGKILL.
pub const FAULT: Fault = Fault {
    name: "killed",
    about: "SIGKILL to the gateway",
    healed_by: &[Layer::Restart],
    inject: |target| super::signal_gateway(target, Signal::KILL),
};
