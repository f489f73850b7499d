//! What is owed to each vCPU: the answer to its event, and what comes after a step.

use std::sync::Arc;
use std::time::Instant;

use crate::addr::{MemoryAccess, Pa, Va, VcpuId, View};
use crate::arch::amd64::Registers;
use crate::event::{EventAction, EventReason, VmiEvent, VmiEventResponse};

use super::filter::Question;
use super::write::AfterWrite;
use super::{Hit, TapId, Verdict};

/// A vCPU between its events.
#[derive(Clone, Default, Debug)]
pub struct Vcpu {
    /// The view it comes back to after a step elsewhere.
    pub home: Option<View>,
    /// The view it was put into, with no event since.
    pub moved: Option<View>,
    /// What has to be done once its store is done.
    pub after_write: Option<AfterWrite>,
    /// The same of a store that is told on: not done, and another of its pages is to be decided on.
    pub unfinished: Option<AfterWrite>,
    /// Its single-steps are handed out.
    pub walk: Option<Walk>,
}

impl Vcpu {
    /// Executes one instruction in the default view and comes back to `home`; a store that is to be followed is reported.
    pub fn step_clean(&self, home: View) -> VmiEventResponse {
        let view = View::DEFAULT;
        let reports = self.after_write.is_some();
        let action = if reports { EventAction::SingleStep { view } } else { EventAction::FastSingleStep { view } };
        VmiEventResponse::action(action).in_view(home)
    }
}

/// Steps a handler asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Walk {
    pub tap: TapId,
    pub done: u32,
    pub left: u32,
}

/// How a vCPU goes on if no verdict says otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Course {
    /// The instruction is tried again where it is.
    Retry,
    /// The instruction is executed in the default view.
    StepClean,
    /// It is a write to a hidden page; the policies are still to be asked.
    Write,
    /// The denied read is served from the default view.
    Emulate,
    /// The INT3 is the guest's.
    Reinject,
    /// The write is thrown away.
    Deny,
}

/// What is known of an event that somebody is to be told of, beside the registers.
#[derive(Clone, Copy)]
pub struct Met {
    pub vcpu: VcpuId,
    /// The view it was met in, and the one that the vCPU goes on in.
    pub view: Option<View>,
    pub home: View,
    pub reason: EventReason,
    pub va: Va,
    pub pa: Pa,
    pub access: MemoryAccess,
    pub step: u32,
    pub course: Course,
}

/// An event that is not answered yet, and the taps that are still to be told.
#[derive(Debug)]
pub struct Pending {
    /// The event, as whoever is told next sees it. Its view is the one the vCPU goes on in.
    pub hit: Arc<Hit>,
    /// The view of the event itself.
    pub view: Option<View>,
    pub course: Course,
    /// Taps to be told, and how many were.
    pub wanted: Vec<TapId>,
    pub told: usize,
    /// Filters of those to be told that need an answer first.
    pub questions: Vec<Question>,
    /// What was handed out last is such a question.
    pub is_question: bool,
    /// The first verdict that says something.
    pub verdict: Option<(TapId, Verdict)>,
    /// The write was put to a question, which is open.
    pub asking: Option<TapId>,
    /// Registers were written while the event was handled.
    pub touched: bool,
    /// A handler moved the vCPUs to another view.
    pub moved_to: Option<View>,
    /// Handed out and not answered.
    pub is_out: bool,
}

impl Pending {
    /// A place for events, one after the other.
    pub fn place() -> Self {
        let hit = Hit {
            tap: TapId(u32::MAX),
            vcpu: VcpuId(0),
            view: View::DEFAULT,
            registers: Registers::default(),
            va: Va(0),
            pa: Pa(0),
            access: MemoryAccess::default(),
            reason: EventReason::GuestRequest,
            step: 0,
            ask: false,
            question: None,
            at: Instant::now(),
        };
        Self {
            hit: Arc::new(hit),
            view: None,
            course: Course::Retry,
            wanted: Vec::new(),
            told: 0,
            questions: Vec::new(),
            is_question: false,
            verdict: None,
            asking: None,
            touched: false,
            moved_to: None,
            is_out: false,
        }
    }

    /// Puts an event in the place of the one before, of which `wanted` are to be told. Who has kept that one's hit keeps it as it is.
    pub fn begin(&mut self, met: &Met, now: Instant, wanted: &mut Vec<TapId>, read: impl FnOnce(&mut Registers)) {
        std::mem::swap(&mut self.wanted, wanted);
        self.questions.clear();
        (self.view, self.course, self.told, self.is_question) = (met.view, met.course, 0, false);
        (self.verdict, self.asking, self.touched, self.moved_to, self.is_out) = (None, None, false, None, false);
        // Written where it stays: it is large.
        let Hit { tap, vcpu, view, registers, va, pa, access, reason, step, ask, question, at } = Arc::make_mut(&mut self.hit);
        read(registers);
        *tap = self.wanted.first().copied().unwrap_or(TapId(u32::MAX));
        (*vcpu, *view, *va, *pa, *access, *reason) = (met.vcpu, met.home, met.va, met.pa, met.access, met.reason);
        (*step, *ask, *question, *at) = (met.step, false, None, now);
    }

    /// Its only tap is told of it.
    pub fn hand_out(&mut self) {
        (self.told, self.is_out) = (1, true);
    }

    /// The view the vCPU is to be in.
    pub fn home(&self) -> View {
        self.moved_to.unwrap_or(self.hit.view)
    }

    /// The event as the driver raised it.
    pub fn event(&self) -> VmiEvent {
        VmiEvent { view: self.view, ..self.hit.event() }
    }
}
