//! The gateway is frozen: it holds its port, accepts connections and never answers.

use crate::Fault;
use engine::Layer;
use rustix::process::Signal;

/// SIGSTOP.
pub const FAULT: Fault = Fault {
    name: "stopped",
    about: "SIGSTOP to the gateway",
    healed_by: &[Layer::Restart],
    inject: |target| super::signal_gateway(target, Signal::STOP),
};
