//! What is owed to each vCPU: the answer to its event, and what comes after a step.

use std::sync::Arc;

use crate::addr::View;
use crate::event::{EventAction, VmiEvent, VmiEventResponse};

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
    /// The view the vCPU is to be in.
    pub fn home(&self) -> View {
        self.moved_to.unwrap_or(self.hit.view)
    }

    /// The event as the driver raised it.
    pub fn event(&self) -> VmiEvent {
        VmiEvent { view: self.view, ..self.hit.event() }
    }
}
