//! A manager that has nothing to manage, for tests: whatever is asked of it is done and does nothing.

use host::Result;
use host::clock::Deadline;
use host::service::{Manager, ServiceState, Stopped};
use std::time::Duration;

pub(crate) struct Nobody;

impl Manager for Nobody {
    fn kind(&self) -> &'static str {
        "nobody"
    }
    fn look(&mut self, _: Deadline) -> Result<ServiceState> {
        Ok(ServiceState::unknown())
    }
    fn clear_latch(&mut self, _: Deadline) -> Result<()> {
        Ok(())
    }
    fn start(&mut self, _: Deadline) -> Result<()> {
        Ok(())
    }
    fn stop(&mut self, _: Duration, _: Deadline) -> Result<Stopped> {
        Ok(Stopped::Clean { took_ms: 0 })
    }
    fn hold(&mut self, _: Deadline) -> Result<()> {
        Ok(())
    }
    fn release(&mut self, _: Deadline) -> Result<()> {
        Ok(())
    }
    fn reload(&mut self, _: Deadline) -> Result<()> {
        Ok(())
    }
}
