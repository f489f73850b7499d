//! Which bytes a store covers: on the page that its event tells of, and on the one it reaches into.

use crate::addr::{PAGE_SIZE, Pa, Va, View};
use crate::arch::amd64::AddressContext;
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};
use crate::event::{EventReason, VmiEvent};

use super::{Session, TapId};

/// Bytes a store is taken to be long where the driver does not say.
const UNKNOWN_LEN: u64 = 8;

/// The bytes of a store on one page, the last one included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Part {
    pub first: Pa,
    pub last: Pa,
}

impl Part {
    /// From `pa` on, no further than the page.
    fn of(pa: Pa, len: u64) -> Self {
        Self { first: pa, last: Pa(pa.0 + len.min(pa.page_rest()).saturating_sub(1)) }
    }
}

/// What a store covers, on as many pages as are decided on at once.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Covered {
    parts: [Option<Part>; 2],
}

impl Covered {
    /// What it covers on the page it was told of: for whoever cannot find out about the other one.
    pub fn here(event: &VmiEvent) -> Self {
        let EventReason::MemoryAccess { pa, .. } = event.reason else { return Self::default() };
        Self { parts: [Some(Part::of(pa, len_of(event))), None] }
    }

    pub fn contains(&self, pa: Pa) -> bool {
        self.parts.iter().flatten().any(|part| (part.first..=part.last).contains(&pa))
    }
}

fn len_of(event: &VmiEvent) -> u64 {
    match event.reason {
        EventReason::MemoryAccess { len, .. } if len > 0 => len.into(),
        _ => UNKNOWN_LEN,
    }
}

impl<D: VmiDriver + ?Sized> Session<D> {
    /// The bytes that a store covers. Of one that crosses into the next page no other event comes: it is carried out whole, or not at all.
    ///
    /// # Errors
    /// The driver's. A page that is not mapped is no error: the store fails there.
    pub(super) fn covered(&self, event: &VmiEvent) -> Result<Covered> {
        let mut covered = Covered::here(event);
        let EventReason::MemoryAccess { pa, va: Some(va), .. } = event.reason else { return Ok(covered) };
        let beyond = len_of(event).saturating_sub(pa.page_rest());
        let [_, other] = &mut covered.parts;
        if beyond > 0
            && let Some(next) = va.page().checked_add(PAGE_SIZE)
        {
            *other = self.mapped(next, event)?.map(|pa| Part::of(pa, beyond));
        }
        Ok(covered)
    }

    fn mapped(&self, va: Va, event: &VmiEvent) -> Result<Option<Pa>> {
        match self.vmi.translate(va, AddressContext::from(&event.registers)) {
            Ok(pa) => Ok(Some(pa)),
            Err(VmiError::Translation { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The breakpoints planted on the pages of a store, covered or not.
    pub(super) fn taps_beside(&self, view: View, covered: &Covered) -> Vec<(TapId, Pa)> {
        let mut taps = Vec::new();
        let mut before = None;
        for gfn in covered.parts.iter().flatten().map(|part| part.first.gfn()) {
            // Two pages can be the same frame.
            if before != Some(gfn) {
                taps.extend(self.manager.breakpoints_on_page(view, gfn).map(|(breakpoint, pa)| (breakpoint.key, pa)));
            }
            before = Some(gfn);
        }
        taps
    }
}
