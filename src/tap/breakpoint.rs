//! Taps by INT3 in shadow pages.

use super::shadow::{INT3, ShadowPages};
use super::{Monitors, Rights, TapController, TapEvents};
use crate::addr::{Gfn, MemoryAccess, Pa, View};
use crate::arch::amd64::AddressContext;
use crate::core::VmiCore;
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};
use crate::event::{EventReason, VmiEvent};

/// The second byte of `CD 03`, the long form of INT3.
const LONG_INT3: [u8; 2] = [0xcd, 0x03];

/// Plants INT3 where the guest cannot see it: in a copy of the page, shown execute-only in a view other than the default one.
///
/// The guest's own memory is never written by inserting or removing. A page with breakpoints is denied reads and writes from
/// before its copy is shown until after it is gone, by this controller itself: [`TapController::monitor`] only keeps that up longer.
#[derive(Default)]
pub struct BreakpointController {
    shadows: ShadowPages,
    rights: Rights,
    monitors: Monitors,
}

impl BreakpointController {
    /// No breakpoints.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the guest itself has an INT3 (`CC`, or `CD 03`) where `event` happened, so that it must get its breakpoint.
    /// False for events that are no breakpoints. Reads the original memory only.
    ///
    /// # Errors
    /// The driver's; [`VmiError::Translation`] if a `CD 03` lies across two pages and the second one is not mapped.
    pub fn is_breakpoint<D: VmiDriver + ?Sized>(vmi: &VmiCore<D>, event: &VmiEvent) -> Result<bool> {
        let EventReason::Breakpoint { gfn, .. } = event.reason else { return Ok(false) };
        let rip = event.registers.rip();
        let first = vmi.read_pa_u8(gfn.pa(rip.page_offset()))?;
        if first != LONG_INT3[0] {
            return Ok(first == INT3);
        }
        let second = if rip.page_rest() > 1 {
            vmi.read_pa_u8(gfn.pa(rip.page_offset() + 1))?
        } else {
            let Some(next) = rip.checked_add(1) else { return Ok(false) };
            vmi.read_u8(next, AddressContext::from(&event.registers))?
        };
        Ok(second == LONG_INT3[1])
    }

    /// Whether the page shows a copy with breakpoints in `view`.
    pub fn is_hidden(&self, view: View, gfn: Gfn) -> bool {
        self.shadows.contains(view, gfn)
    }

    /// Whether the page shows a copy with breakpoints in any view.
    pub fn hides_anywhere(&self, gfn: Gfn) -> bool {
        self.shadows.contains_anywhere(gfn)
    }

    /// Every page that shows a copy with breakpoints, and in which view, in no order.
    pub fn hidden_pages(&self) -> impl Iterator<Item = (View, Gfn)> {
        self.shadows.hidden()
    }

    /// Brings every copy of the page up to date after its original was written, by the guest or from outside. The breakpoints
    /// are planted over the new bytes; there is no moment without one.
    ///
    /// # Errors
    /// The driver's, with every copy as it was.
    pub fn refresh<D: VmiDriver + ?Sized>(&mut self, vmi: &mut VmiCore<D>, gfn: Gfn) -> Result<()> {
        self.shadows.refresh(vmi, gfn)
    }

    /// Writes `bytes` at `pa` into the guest's memory and into every copy of it; breakpoints stay, and stay hidden. All or nothing.
    ///
    /// # Errors
    /// [`VmiError::OutOfRange`] beyond guest memory; the driver's, with nothing changed.
    pub fn write<D: VmiDriver + ?Sized>(&mut self, vmi: &mut VmiCore<D>, pa: Pa, bytes: &[u8]) -> Result<()> {
        self.shadows.write(vmi, pa, bytes)
    }

    /// Where on the page breakpoints are, ascending.
    pub fn breakpoints_on(&self, view: View, gfn: Gfn) -> impl Iterator<Item = u16> {
        self.shadows.offsets(view, gfn)
    }

    /// How many frames are taken for copies.
    pub fn shadow_frames(&self) -> usize {
        self.shadows.frames()
    }

    /// Who denies what: deny accesses for other reasons here, so that they compose with those of breakpoints.
    pub fn rights(&mut self) -> &mut Rights {
        &mut self.rights
    }

    /// Takes every breakpoint and every denial back, whoever asked for it.
    ///
    /// # Errors
    /// [`VmiError::UndoFailed`] with what the driver failed on. Everything else is done, and calling again tries the rest.
    pub fn clear<D: VmiDriver + ?Sized>(&mut self, vmi: &mut VmiCore<D>) -> Result<()> {
        let mut left = super::Left::default();
        let shadows = &mut self.shadows;
        left.note(shadows.clear(vmi), || "shadow pages".to_owned());
        left.note(self.rights.clear_but(vmi, |view, gfn| shadows.contains(view, gfn)), || "access rights".to_owned());
        self.monitors.retain(|view, gfn| shadows.contains(view, gfn));
        left.done()
    }

    /// A view is gone, with all that was in it; frames that showed there are kept for others until [`Self::clear`].
    pub fn forget_view(&mut self, view: View) {
        self.shadows.forget_view(view);
        self.rights.forget_view(view);
        self.monitors.retain(|of, _| of != view);
    }

    /// What every call is refused for.
    fn check<D: VmiDriver + ?Sized>(vmi: &VmiCore<D>, gfn: Gfn, view: View, op: &'static str) -> Result<()> {
        if view == View::DEFAULT {
            return Err(VmiError::DefaultView { op });
        }
        super::check_page(vmi, gfn)
    }
}

impl TapEvents for BreakpointController {
    fn check_event(&self, event: &VmiEvent) -> Option<(View, Gfn)> {
        match event.reason {
            EventReason::Breakpoint { gfn, .. } => Some((event.view?, gfn)),
            _ => None,
        }
    }
}

impl<D: VmiDriver + ?Sized> TapController<D> for BreakpointController {
    fn insert_breakpoint(&mut self, vmi: &mut VmiCore<D>, pa: Pa, view: View) -> Result<()> {
        self.insert_many(vmi, &[(view, pa)])
    }

    fn remove_breakpoint(&mut self, vmi: &mut VmiCore<D>, pa: Pa, view: View) -> Result<()> {
        self.remove_many(vmi, &[(view, pa)])
    }

    fn monitor(&mut self, vmi: &mut VmiCore<D>, gfn: Gfn, view: View) -> Result<()> {
        self.monitor_many(vmi, &[(view, gfn)])
    }

    fn unmonitor(&mut self, vmi: &mut VmiCore<D>, gfn: Gfn, view: View) -> Result<()> {
        self.unmonitor_many(vmi, &[(view, gfn)])
    }

    fn insert_many(&mut self, vmi: &mut VmiCore<D>, points: &[(View, Pa)]) -> Result<()> {
        let mut points = points.to_vec();
        points.sort_unstable();
        points.iter().try_for_each(|(view, pa)| Self::check(vmi, pa.gfn(), *view, "insert_breakpoint"))?;
        self.shadows.insert(vmi, &mut self.rights, &points)
    }

    fn remove_many(&mut self, vmi: &mut VmiCore<D>, points: &[(View, Pa)]) -> Result<()> {
        let mut points = points.to_vec();
        points.sort_unstable();
        self.shadows.remove(vmi, &mut self.rights, &points)
    }

    fn monitor_many(&mut self, vmi: &mut VmiCore<D>, pages: &[(View, Gfn)]) -> Result<()> {
        pages.iter().try_for_each(|(view, gfn)| Self::check(vmi, *gfn, *view, "monitor"))?;
        self.rights.deny_many(vmi, pages, MemoryAccess::RW)?;
        self.monitors.add(pages);
        Ok(())
    }

    fn unmonitor_many(&mut self, vmi: &mut VmiCore<D>, pages: &[(View, Gfn)]) -> Result<()> {
        self.monitors.check(pages)?;
        self.rights.allow_many(vmi, pages, MemoryAccess::RW)?;
        self.monitors.remove(pages);
        Ok(())
    }
}
