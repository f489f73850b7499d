//! Which bytes a store covers: on the page that its event tells of, and on the one it reaches into.

use std::ops::Range;

use crate::addr::{PAGE_SIZE, Pa, Va, View};
use crate::arch::amd64::{AddressContext, StringStore};
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};
use crate::event::{EventReason, VmiEvent};
use crate::tap::OnWrite;

use super::{Session, TapId};

/// Bytes a store is taken to be long where the driver does not say.
const UNKNOWN_LEN: u64 = 8;
/// The longest instruction (Intel SDM vol. 2, 2.3.11).
const MAX_INSN: usize = 15;
/// The longest round of a string instruction.
const MAX_ROUND: u64 = 8;

/// The bytes of a store on one page, the last one included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Part {
    pub first: Pa,
    last: Pa,
    /// Where the first one is, for whoever stores.
    va: Option<Va>,
}

impl Part {
    /// From `pa` on, no further than the page.
    fn of(pa: Pa, va: Option<Va>, len: u64) -> Self {
        Self { first: pa, last: Pa(pa.0 + len.min(pa.page_rest()).saturating_sub(1)), va }
    }

    fn contains(&self, pa: Pa) -> bool {
        (self.first..=self.last).contains(&pa)
    }
}

/// What a store covers, on as many pages as are decided on at once.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Covered {
    parts: [Option<Part>; 2],
    /// It is one of a repeated instruction: these are the bytes of all rounds to come.
    pub string: Option<StringStore>,
}

impl Covered {
    /// What it covers on the page it was told of: for whoever cannot find out more.
    pub fn here(event: &VmiEvent) -> Self {
        let EventReason::MemoryAccess { pa, va, .. } = event.reason else { return Self::default() };
        Self { parts: [Some(Part::of(pa, va, len_of(event))), None], string: None }
    }

    pub fn contains(&self, pa: Pa) -> bool {
        self.parts.iter().flatten().any(|part| part.contains(pa))
    }

    /// The virtual address of a byte that is covered.
    pub fn va(&self, pa: Pa) -> Option<Va> {
        let part = self.parts.iter().flatten().find(|part| part.contains(pa))?;
        part.va?.checked_add(pa.0 - part.first.0)
    }
}

fn len_of(event: &VmiEvent) -> u64 {
    match event.reason {
        EventReason::MemoryAccess { len, .. } if len > 0 => len.into(),
        _ => UNKNOWN_LEN,
    }
}

/// The part of a range that lies on a page: where it begins, and how long it is.
fn on_page(range: &Range<u64>, page: Va) -> (u64, u64) {
    let first = range.start.max(page.0);
    (first, range.end.min(page.0.saturating_add(PAGE_SIZE)).saturating_sub(first))
}

impl<D: VmiDriver + ?Sized> Session<D> {
    /// The bytes that a store covers. It is carried out whole, or not at all, and so are the rounds of a repeated instruction on one page:
    /// no other event comes of the page that it crosses into, nor of the next round. Of the next page of a string one does.
    ///
    /// # Errors
    /// The driver's. A page that is not mapped is no error: the store fails there.
    pub(super) fn covered(&self, event: &VmiEvent, view: View) -> Result<Covered> {
        let mut covered = Covered::here(event);
        let EventReason::MemoryAccess { pa, va: Some(va), .. } = event.reason else { return Ok(covered) };
        let [_, other] = &mut covered.parts;
        *other = self.beyond(event, len_of(event))?;
        // Told of where the page begins, it may have begun on the page before.
        let may_be_behind = va.page_offset() == 0 && va.0.wrapping_sub(event.registers.gp.rdi) < MAX_ROUND;
        if !may_be_behind && !self.is_decided_on(view, &covered) {
            return Ok(covered);
        }
        let Some(string) = self.string_store(event)? else { return Ok(covered) };
        let (next, rest) = (string.next(&event.registers.gp), string.rest(&event.registers.gp));
        if !rest.contains(&va.0) {
            return Ok(covered);
        }
        let (first, len) = on_page(&rest, va.page());
        covered = Covered { parts: [Some(Part::of(pa.gfn().pa(first), Some(Va(first)), len)), None], string: Some(string) };
        // The round that lies on both pages.
        let pages = [Va(next.start).page(), Va(next.end.saturating_sub(1)).page()];
        if pages.contains(&va.page())
            && let Some(beside) = pages.into_iter().find(|page| *page != va.page())
        {
            let (first, len) = on_page(&rest, beside);
            let [_, other] = &mut covered.parts;
            *other = self.part(Va(first), len, event)?;
        }
        Ok(covered)
    }

    /// Of an access of so many bytes those on the page behind the one that it was told of.
    pub(super) fn beyond(&self, event: &VmiEvent, len: u64) -> Result<Option<Part>> {
        let EventReason::MemoryAccess { pa, va: Some(va), .. } = event.reason else { return Ok(None) };
        let beyond = len.saturating_sub(pa.page_rest());
        let next = va.page().checked_add(PAGE_SIZE).filter(|_| beyond > 0);
        next.map_or(Ok(None), |next| self.part(next, beyond, event))
    }

    fn part(&self, va: Va, len: u64, event: &VmiEvent) -> Result<Option<Part>> {
        match self.vmi.translate(va, AddressContext::from(&event.registers)) {
            Ok(pa) => Ok(Some(Part::of(pa, Some(va), len))),
            Err(VmiError::Translation { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether some breakpoint there says more than that every store happens.
    fn is_decided_on(&self, view: View, covered: &Covered) -> bool {
        let says_more = |tap: TapId| {
            self.policy(tap) != OnWrite::Reapply || self.taps.rare(tap).is_some_and(|rare| rare.write_policy.is_some())
        };
        let gfns = covered.parts.iter().flatten().map(|part| part.first.gfn());
        gfns.into_iter()
            .any(|gfn| self.manager.breakpoints_on_page(view, gfn).any(|(breakpoint, _)| says_more(breakpoint.key.tap())))
    }

    /// The instruction at RIP, if it is a repeated string instruction.
    fn string_store(&self, event: &VmiEvent) -> Result<Option<StringStore>> {
        let (rip, context) = (event.registers.rip(), AddressContext::from(&event.registers));
        let mut bytes = [0; MAX_INSN];
        // The second time without the next page, which need not be there.
        for len in [MAX_INSN, (rip.page_rest() as usize).min(MAX_INSN)] {
            let Some(bytes) = bytes.get_mut(..len) else { continue };
            match self.vmi.read(rip, context, bytes) {
                Ok(()) => return Ok(StringStore::decode(bytes, event.registers.is_64_bit())),
                Err(VmiError::Translation { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// The breakpoints planted on the pages of a store, covered or not.
    pub(super) fn taps_beside(&self, view: View, covered: &Covered) -> Vec<(TapId, Pa)> {
        let mut taps = Vec::new();
        let mut before = None;
        for gfn in covered.parts.iter().flatten().map(|part| part.first.gfn()) {
            // Two pages can be the same frame.
            if before != Some(gfn) {
                taps.extend(self.manager.breakpoints_on_page(view, gfn).map(|(breakpoint, pa)| (breakpoint.key.tap(), pa)));
            }
            before = Some(gfn);
        }
        taps
    }
}
