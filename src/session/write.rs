//! Writes to hidden pages: which policy applies, and bringing the shadows up to date once the write is done.

use crate::addr::{Gfn, MemoryAccess, Pa, Va, VcpuId, View};
use crate::arch::amd64::{AddressContext, Registers, StringStore};
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};
use crate::event::{EventReason, VmiEvent};
use crate::tap::{OnWrite, WriteDecision, decide};

use super::covered::Covered;
use super::{Session, TapId, TapState};

/// Bytes one instruction that is no string instruction can store: XSAVE's area is the longest.
const MAX_STORE: u64 = 4096;
/// Pages of virtual memory that are looked up one by one after a store. A string instruction can write more, and something else can
/// have moved RDI by any amount: then every hidden page is looked at.
const MAX_PAGES: u64 = 64;

/// What is to be done once a store is done.
#[derive(Clone, Debug)]
pub struct AfterWrite {
    va: Va,
    pa: Pa,
    context: AddressContext,
    /// RIP and RCX before the store.
    at: (u64, u64),
    /// RDI before the store, and once it is done.
    rdi: (u64, u64),
    /// It is one of a repeated instruction.
    string: Option<StringStore>,
    removable: Vec<Removable>,
}

/// A breakpoint to be removed if its byte was overwritten.
#[derive(Clone, Copy, Debug)]
struct Removable {
    tap: TapId,
    /// Its byte, and what was there.
    pa: Pa,
    was: u8,
    /// The store is known to cover it, and there.
    is_covered: bool,
    va: Option<Va>,
}

/// Whether an event is a store. Each one is followed to its end.
pub fn is_store(event: &VmiEvent) -> bool {
    matches!(event.reason, EventReason::MemoryAccess { access, .. } if access.contains(MemoryAccess::W) && !access.contains(MemoryAccess::X))
}

impl AfterWrite {
    /// What is to be done after any store to that page.
    pub fn of(event: &VmiEvent) -> Option<Self> {
        let EventReason::MemoryAccess { pa, va, .. } = event.reason else { return None };
        let gp = &event.registers.gp;
        let context = AddressContext::from(&event.registers);
        let (at, rdi) = ((gp.rip, gp.rcx), (gp.rdi, gp.rdi));
        Some(Self { va: va.unwrap_or_default(), pa, context, at, rdi, string: None, removable: Vec::new() })
    }

    /// Whether an event is of the very store that is to be done: its driver tells of the pages one after the other.
    pub fn is_told_on(&self, event: &VmiEvent) -> bool {
        let gp = &event.registers.gp;
        is_store(event) && self.at == (gp.rip, gp.rcx) && self.rdi.0 == gp.rdi
    }
}

impl<D: VmiDriver + ?Sized> Session<D> {
    /// What the policies of the breakpoints under a write say, and whom to ask.
    pub(super) fn decide_write(&self, view: View, covered: &Covered) -> (WriteDecision, Option<TapId>) {
        let taps = self.taps_beside(view, covered);
        let under = || taps.iter().filter(|(_, pa)| covered.contains(*pa)).map(|(tap, _)| *tap);
        let asked = under().find(|tap| self.policy(*tap) == OnWrite::Ask);
        (decide(under().map(|tap| self.policy(tap))), asked)
    }

    /// Whether a write is to be denied, as far as that can be found out: also where it failed before the policies that look at each write were
    /// asked.
    pub(super) fn is_denied(&mut self, event: &VmiEvent, view: View) -> bool {
        if !is_store(event) {
            return false;
        }
        let covered = self.covered(event, view).unwrap_or_else(|_| Covered::here(event));
        if !self.judged.is_made() {
            self.judge_write(event, view, &covered);
        }
        self.decide_write(view, &covered).0 == WriteDecision::Deny
    }

    /// Remembers what is needed after the store. `answer` stands in for the policies of those that ask.
    pub(super) fn before_write(
        &self,
        event: &VmiEvent,
        view: View,
        covered: &Covered,
        answer: Option<OnWrite>,
    ) -> Result<Option<AfterWrite>> {
        let Some(after) = AfterWrite::of(event) else { return Ok(None) };
        // Of the pages that were told before.
        let earlier = self.vcpus.get(usize::from(event.vcpu.0)).and_then(|vcpu| vcpu.unfinished.as_ref());
        let mut removable = earlier.map_or_else(Vec::new, |earlier| earlier.removable.clone());
        for (tap, pa) in self.taps_beside(view, covered) {
            let mut policy = self.policy(tap);
            if policy == OnWrite::Ask {
                policy = answer.unwrap_or_default();
            }
            if policy == OnWrite::Remove {
                let mut byte = [0];
                self.vmi.read_pa(pa, &mut byte)?;
                removable.push(Removable { tap, pa, was: byte[0], is_covered: covered.contains(pa), va: covered.va(pa) });
            }
        }
        // A page whose breakpoints let every store happen does not say that it is a string.
        let string = covered.string.or_else(|| earlier.and_then(|earlier| earlier.string));
        Ok(Some(AfterWrite { string, removable, ..after }))
    }

    /// Whether the store of the vCPU of a new event is done. It is not if the event is of another of its pages.
    ///
    /// # Errors
    /// As [`Session::finish_write`].
    pub(super) fn end_write(&mut self, event: &VmiEvent) -> Result<bool> {
        let Some(vcpu) = self.vcpus.get_mut(usize::from(event.vcpu.0)) else { return Ok(true) };
        vcpu.unfinished = vcpu.after_write.take_if(|after| after.is_told_on(event));
        if vcpu.unfinished.is_some() {
            return Ok(false);
        }
        self.finish_write(event.vcpu, &event.registers).map(|()| true)
    }

    /// The store of a vCPU is done: brings shadows up to date and removes what is to be removed.
    ///
    /// # Errors
    /// The driver's. [`Session::catch_up`] does the rest then.
    pub(super) fn finish_write(&mut self, vcpu: VcpuId, registers: &Registers) -> Result<()> {
        let slot = self.vcpus.get_mut(usize::from(vcpu.0));
        let Some(mut done) = slot.and_then(|slot| slot.after_write.take()) else { return Ok(()) };
        done.rdi.1 = registers.gp.rdi;
        self.overdue.push(done);
        self.catch_up(Some(vcpu))
    }

    /// Does what is to be done after stores. What fails is tried again next time: the guest does not run on with old bytes. Page tables
    /// that were stored to are noted for `vcpu`; `None`: for whoever looks next.
    #[inline]
    pub(super) fn catch_up(&mut self, vcpu: Option<VcpuId>) -> Result<()> {
        if self.overdue.is_empty() { Ok(()) } else { self.follow_overdue(vcpu) }
    }

    fn follow_overdue(&mut self, vcpu: Option<VcpuId>) -> Result<()> {
        while let Some(done) = self.overdue.last().cloned() {
            self.follow_write(vcpu, &done)?;
            self.overdue.pop();
        }
        Ok(())
    }

    fn follow_write(&mut self, vcpu: Option<VcpuId>, done: &AfterWrite) -> Result<()> {
        self.controller.refresh(&mut self.vmi, done.pa.gfn())?;
        // The store may have reached into the page behind, and a string instruction moves RDI over all it wrote.
        let (from, to) = done.rdi;
        let (mut first, mut last) = (done.va.0, done.va.0.saturating_add(MAX_STORE));
        if from != to {
            first = first.min(from).min(to);
            last = last.max(from).max(to);
        }
        let (first, last) = (first >> 12, last >> 12);
        let mut written: Vec<Gfn> = if last - first > MAX_PAGES {
            self.controller.hidden_pages().map(|(_, gfn)| gfn).chain(self.tables.watched_tables()).collect()
        } else {
            // A page that is not mapped was not written either.
            let mut mapped = Vec::new();
            for page in first..=last {
                match self.vmi.translate(Va(page << 12), done.context) {
                    Ok(pa) => mapped.push(pa.gfn()),
                    Err(VmiError::Translation { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            mapped.retain(|gfn| self.controller.hides_anywhere(*gfn) || self.tables.is_table(*gfn));
            mapped
        };
        written.sort_unstable();
        written.dedup();
        for gfn in &written {
            self.tables.mark_dirty(vcpu, *gfn);
        }
        for gfn in written.into_iter().filter(|gfn| *gfn != done.pa.gfn()) {
            self.controller.refresh(&mut self.vmi, gfn)?;
        }
        for removable in &done.removable {
            let mut byte = [0];
            self.vmi.read_pa(removable.pa, &mut byte)?;
            // A string instruction may have stopped before it, at a page that is not there.
            let is_covered = done
                .string
                .map_or(removable.is_covered, |string| removable.va.is_some_and(|va| string.done(done.rdi).contains(&va.0)));
            if (is_covered || byte[0] != removable.was) && self.state(removable.tap) != TapState::Removed {
                self.remove(removable.tap)?;
                self.stats.removed_by_write += 1;
            }
        }
        Ok(())
    }
}
