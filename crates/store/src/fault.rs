//! The seam's other side, for tests only: counts the moments at which the store makes something durable, visible or
//! gone, and lets a test do what it wants at each, such as cutting the power.

use std::sync::{Mutex, PoisonError};

/// Called just before each moment, with its number (from 1) and what it is.
pub type Hook = Box<dyn FnMut(u64, &'static str) + Send>;

static HOOK: Mutex<(u64, Option<Hook>)> = Mutex::new((0, None));

/// Sets what is called from now on, in the whole process, and counts anew. Gives how many moments there were.
pub fn on_each_moment(hook: Option<Hook>) -> u64 {
    let mut held = HOOK.lock().unwrap_or_else(PoisonError::into_inner);
    let count = held.0;
    *held = (0, hook);
    count
}

pub(crate) fn reached(what: &'static str) {
    let mut held = HOOK.lock().unwrap_or_else(PoisonError::into_inner);
    held.0 += 1;
    let number = held.0;
    if let Some(hook) = &mut held.1 {
        hook(number, what);
    }
}
