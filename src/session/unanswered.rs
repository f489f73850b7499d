//! Events that are out and not answered: one at most for each vCPU, each with a number of its own.
//!
//! Whoever answers says which event is meant. Checking that, answering and striking it off is one step under one lock: a second answer to the
//! same event finds it gone, and never answers, or strikes off, the vCPU's next one.

use crate::addr::{VcpuId, View};
use crate::error::{Result, VmiError};

/// One event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Due {
    number: u64,
    view: View,
}

/// Who is owed an answer.
#[derive(Clone, Debug, Default)]
pub struct Unanswered {
    by_vcpu: Vec<Option<Due>>,
    last: u64,
}

impl Unanswered {
    /// Nobody, of so many vCPUs.
    pub fn new(vcpus: usize) -> Self {
        Self { by_vcpu: vec![None; vcpus], last: 0 }
    }

    /// An event of `vcpu` is out, which goes on in `view`. Its number: no other event has the same.
    pub fn open(&mut self, vcpu: VcpuId, view: View) -> u64 {
        self.last += 1;
        if let Some(slot) = self.by_vcpu.get_mut(usize::from(vcpu.0)) {
            *slot = Some(Due { number: self.last, view });
        }
        self.last
    }

    /// The number of the event that holds `vcpu`.
    pub fn number(&self, vcpu: VcpuId) -> Option<u64> {
        self.by_vcpu.get(usize::from(vcpu.0))?.map(|due| due.number)
    }

    /// Answers one event, and strikes it off if that worked.
    ///
    /// # Errors
    /// [`VmiError::NoPendingEvent`], and `answer` was not called, if it was answered before; what `answer` says.
    pub fn settle(&mut self, vcpu: VcpuId, number: u64, answer: impl FnOnce() -> Result<()>) -> Result<()> {
        let slot = self.by_vcpu.get_mut(usize::from(vcpu.0));
        let slot = slot.filter(|slot| slot.is_some_and(|due| due.number == number));
        let slot = slot.ok_or(VmiError::NoPendingEvent { vcpu })?;
        answer()?;
        *slot = None;
        Ok(())
    }

    /// The vCPUs that stand still, and the views they go on in.
    pub fn iter(&self) -> impl Iterator<Item = (VcpuId, View)> {
        self.by_vcpu.iter().enumerate().filter_map(|(index, due)| due.map(|due| (VcpuId(index as u16), due.view)))
    }

    /// Answers every event, each with `answer`, and strikes off those for which that worked: the others, with what it said.
    pub fn settle_all(&mut self, mut answer: impl FnMut(VcpuId, View) -> Result<()>) -> Vec<(VcpuId, VmiError)> {
        let mut failed = Vec::new();
        for (index, slot) in self.by_vcpu.iter_mut().enumerate() {
            let (Some(due), vcpu) = (*slot, VcpuId(index as u16)) else { continue };
            match answer(vcpu, due.view) {
                Ok(()) => *slot = None,
                Err(error) => failed.push((vcpu, error)),
            }
        }
        failed
    }

    /// Every vCPU was put into `view`.
    pub fn move_to(&mut self, view: View) {
        for due in self.by_vcpu.iter_mut().flatten() {
            due.view = view;
        }
    }

    /// The vCPUs do not stand still any more, whatever was answered.
    pub fn clear(&mut self) {
        self.by_vcpu.fill(None);
    }
}
