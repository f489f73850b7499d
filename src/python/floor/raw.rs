//! `Vm.wait_event` and `Vm.respond`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::event::{VmiEvent, VmiEventResponse};
use crate::addr::VcpuId;
use crate::driver::Wait;
use crate::error::VmiError;
use crate::event;
use crate::python::shared::Shared;

/// The longest wait without a look at Python's signals.
const PATIENCE: Duration = Duration::from_millis(100);

fn no_event(vcpu: VcpuId) -> PyErr {
    VmiError::NoPendingEvent { vcpu }.into()
}

/// Lets the guest run until its next event; `None`: the time is over, the guest is idle, or it was told to stop.
pub fn wait(py: Python<'_>, shared: &Arc<Shared>, timeout: Option<Duration>) -> PyResult<Option<VmiEvent>> {
    let running = shared.start_run("wait_event")?;
    let waited = wait_until(py, shared, timeout);
    let detached = if shared.is_detach_wanted() { shared.close(py) } else { Ok(()) };
    drop(running);
    let event = waited?;
    detached?;
    Ok(event)
}

fn wait_until(py: Python<'_>, shared: &Arc<Shared>, timeout: Option<Duration>) -> PyResult<Option<VmiEvent>> {
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    loop {
        py.check_signals()?;
        if shared.stop.swap(false, Ordering::AcqRel) || shared.is_detach_wanted() {
            return Ok(None);
        }
        let left = deadline.map_or(PATIENCE, |deadline| deadline.saturating_duration_since(Instant::now()).min(PATIENCE));
        match shared.released(py, |inner| inner.session.wait_raw(left))? {
            Wait::Event(event) => {
                let number = shared.raw_count.fetch_add(1, Ordering::Relaxed) + 1;
                if let Some(slot) = shared.raw.lock().get_mut(usize::from(event.vcpu.0)) {
                    *slot = number;
                }
                return Ok(Some(VmiEvent::of(&event, number, shared)));
            }
            Wait::Idle => return Ok(None),
            Wait::Timeout if deadline.is_some_and(|deadline| Instant::now() >= deadline) => return Ok(None),
            Wait::Timeout => {}
        }
    }
}

/// Answers an event of [`wait`], exactly once.
pub fn respond(py: Python<'_>, shared: &Arc<Shared>, event: &VmiEvent, response: &VmiEventResponse) -> PyResult<()> {
    let vcpu = event.event.vcpu;
    let index = usize::from(vcpu.0);
    let is_open = event.is_of(shared) && shared.raw.lock().get(index) == Some(&event.number);
    if !is_open {
        return Err(no_event(vcpu));
    }
    shared.open(py, |session| {
        let registers = match &response.registers {
            Some(changes) => {
                let mut gp = session.registers(vcpu)?.gp;
                changes.apply(&mut gp);
                Some(gp)
            }
            None => None,
        };
        session.respond_raw(vcpu, &event::VmiEventResponse { action: response.action, view: response.view, registers })
    })?;
    if let Some(slot) = shared.raw.lock().get_mut(index) {
        *slot = 0;
    }
    Ok(())
}
