//! The part of the mock driver that stays in reach of whoever has given the driver away.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::addr::VcpuId;
use crate::event::{VmiEvent, VmiEventResponse};

/// An event that was answered, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Answered {
    /// The event, as it was handed out.
    pub event: VmiEvent,
    /// The answer.
    pub response: VmiEventResponse,
}

#[derive(Default)]
struct Shared {
    events: VecDeque<VmiEvent>,
    answered: Vec<Answered>,
}

/// Events go in, answers come out, while a session owns the driver.
#[derive(Clone, Default)]
pub struct Remote(Arc<Mutex<Shared>>);

impl Remote {
    /// Lets the driver hand out this event after those already given, in the view its vCPU is in by then.
    pub fn push_event(&self, event: VmiEvent) {
        self.0.lock().events.push_back(event);
    }

    /// How many events are not handed out yet.
    pub fn waiting(&self) -> usize {
        self.0.lock().events.len()
    }

    /// The events that were answered so far, in the order of their answers.
    pub fn answered(&self) -> Vec<Answered> {
        self.0.lock().answered.clone()
    }

    /// The next event for a vCPU that is not held.
    pub(super) fn next(&self, is_held: impl Fn(VcpuId) -> bool) -> Option<VmiEvent> {
        let mut shared = self.0.lock();
        let index = shared.events.iter().position(|event| !is_held(event.vcpu))?;
        shared.events.remove(index)
    }

    pub(super) fn note(&self, answered: &Answered) {
        self.0.lock().answered.push(*answered);
    }
}
