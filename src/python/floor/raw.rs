//! `Vm.wait_event` and `Vm.respond`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::event::{VmiEvent, VmiEventResponse};
use crate::driver::Wait;
use crate::error::VmiError;
use crate::event;
use crate::python::shared::Shared;

/// The longest wait without a look at Python's signals.
const PATIENCE: Duration = Duration::from_millis(100);

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
        let waited = shared.released(py, |inner| {
            Ok::<_, VmiError>(match inner.session.wait_raw(left)? {
                Wait::Event(event) => (Wait::Event(event), inner.session.raw_number(event.vcpu)?),
                other => (other, 0),
            })
        });
        match waited? {
            (Wait::Event(event), number) => return Ok(Some(VmiEvent::of(&event, number, shared))),
            (Wait::Idle, _) => return Ok(None),
            (Wait::Timeout | Wait::Taken, _) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => return Ok(None),
            (Wait::Timeout | Wait::Taken, _) => {}
        }
    }
}

/// Answers an event of [`wait`], exactly once. The session's lock is held from the look at its number to the end.
pub fn respond(py: Python<'_>, shared: &Arc<Shared>, event: &VmiEvent, response: &VmiEventResponse) -> PyResult<()> {
    let (vcpu, number) = (event.event.vcpu, event.number);
    let none = || VmiError::NoPendingEvent { vcpu };
    if !event.is_of(shared) {
        return Err(none().into());
    }
    shared.open(py, |session| {
        if session.raw_number(vcpu)? != number {
            return Err(none());
        }
        let registers = match &response.registers {
            Some(changes) => {
                let mut gp = session.registers(vcpu)?.gp;
                changes.apply(&mut gp);
                Some(gp)
            }
            None => None,
        };
        session.respond_raw(vcpu, number, &event::VmiEventResponse { action: response.action, view: response.view, registers })
    })
}
