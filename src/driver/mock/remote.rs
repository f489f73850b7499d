//! The part of the mock driver that stays in reach of whoever has given the driver away.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use super::calls::{CallKind, Counted, Recorder};
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

/// Events and faults go in, answers come out, while a session owns the driver.
#[derive(Clone, Default)]
pub struct Remote {
    shared: Arc<Mutex<Shared>>,
    pub(super) recorder: Arc<Mutex<Recorder>>,
}

impl Remote {
    /// Lets the driver hand out this event after those already given, in the view its vCPU is in by then.
    pub fn push_event(&self, event: VmiEvent) {
        self.shared.lock().events.push_back(event);
    }

    /// How many events are not handed out yet.
    pub fn waiting(&self) -> usize {
        self.shared.lock().events.len()
    }

    /// The events that were answered so far, in the order of their answers.
    pub fn answered(&self) -> Vec<Answered> {
        self.shared.lock().answered.clone()
    }

    /// Makes the `n`-th call from now on fail with that errno, once; 1 is the next, and reads count too. 0: none fails. What was asked for
    /// before no longer holds.
    pub fn fail_nth(&self, n: usize, errno: i32) {
        let mut recorder = self.recorder.lock();
        recorder.clear_faults();
        recorder.failed = None;
        if n > 0 {
            recorder.fail(Counted::Any, n, errno);
        }
    }

    /// The call that failed since [`Self::fail_nth`]; `None` if there was no `n`-th call yet.
    pub fn failed(&self) -> Option<CallKind> {
        self.recorder.lock().failed
    }

    /// The next event for a vCPU that is not held.
    pub(super) fn next(&self, is_held: impl Fn(VcpuId) -> bool) -> Option<VmiEvent> {
        let mut shared = self.shared.lock();
        let index = shared.events.iter().position(|event| !is_held(event.vcpu))?;
        shared.events.remove(index)
    }

    pub(super) fn note(&self, answered: &Answered) {
        self.shared.lock().answered.push(*answered);
    }
}
