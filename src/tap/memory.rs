//! Taps by taking the right to execute away: no byte is touched, and every instruction on the page raises an event.

use rustc_hash::FxHashMap;

use super::{Monitors, Rights, TapController, TapEvents};
use crate::addr::{Gfn, MemoryAccess, Pa, View};
use crate::core::VmiCore;
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};
use crate::event::{EventReason, VmiEvent};

/// Catches execution of whole pages; an event at an address nobody asked for is for the caller to step over.
///
/// Inserting and removing count references and change nothing in the guest: the traps come with [`TapController::monitor`].
#[derive(Default)]
pub struct MemoryController {
    rights: Rights,
    monitors: Monitors,
    references: FxHashMap<(View, Pa), u32>,
}

impl MemoryController {
    /// No taps.
    pub fn new() -> Self {
        Self::default()
    }

    /// Who denies what. Separate from a [`super::BreakpointController`]'s: do not use both on one page of one view.
    pub fn rights(&mut self) -> &mut Rights {
        &mut self.rights
    }

    /// Restores the rights of every page and forgets every reference.
    ///
    /// # Errors
    /// [`VmiError::UndoFailed`] with the pages the driver failed on; calling again tries those.
    pub fn clear<D: VmiDriver + ?Sized>(&mut self, vmi: &mut VmiCore<D>) -> Result<()> {
        let result = self.rights.clear(vmi);
        self.monitors.clear();
        self.references.clear();
        result
    }
}

impl TapEvents for MemoryController {
    fn check_event(&self, event: &VmiEvent) -> Option<(View, Gfn)> {
        match event.reason {
            EventReason::MemoryAccess { pa, access, .. } if access.contains(MemoryAccess::X) => Some((event.view?, pa.gfn())),
            _ => None,
        }
    }
}

impl<D: VmiDriver + ?Sized> TapController<D> for MemoryController {
    fn insert_breakpoint(&mut self, vmi: &mut VmiCore<D>, pa: Pa, view: View) -> Result<()> {
        super::check_page(vmi, pa.gfn())?;
        *self.references.entry((view, pa)).or_default() += 1;
        Ok(())
    }

    fn remove_breakpoint(&mut self, _vmi: &mut VmiCore<D>, pa: Pa, view: View) -> Result<()> {
        let count = self.references.get_mut(&(view, pa)).ok_or(VmiError::BreakpointNotFound { pa, view })?;
        *count -= 1;
        if *count == 0 {
            self.references.remove(&(view, pa));
        }
        Ok(())
    }

    fn monitor(&mut self, vmi: &mut VmiCore<D>, gfn: Gfn, view: View) -> Result<()> {
        self.monitor_many(vmi, &[(view, gfn)])
    }

    fn unmonitor(&mut self, vmi: &mut VmiCore<D>, gfn: Gfn, view: View) -> Result<()> {
        self.unmonitor_many(vmi, &[(view, gfn)])
    }

    fn monitor_many(&mut self, vmi: &mut VmiCore<D>, pages: &[(View, Gfn)]) -> Result<()> {
        pages.iter().try_for_each(|(_, gfn)| super::check_page(vmi, *gfn))?;
        self.rights.deny_many(vmi, pages, MemoryAccess::X)?;
        self.monitors.add(pages);
        Ok(())
    }

    fn unmonitor_many(&mut self, vmi: &mut VmiCore<D>, pages: &[(View, Gfn)]) -> Result<()> {
        self.monitors.check(pages)?;
        self.rights.allow_many(vmi, pages, MemoryAccess::X)?;
        self.monitors.remove(pages);
        Ok(())
    }
}
