//! Taps: breakpoints the guest cannot see, who owns them, and what an event means for them.

mod books;
mod breakpoint;
mod manager;
mod memory;
mod policy;
mod shadow;

pub use crate::rights::Rights;
pub use breakpoint::BreakpointController;
pub use manager::{Breakpoint, BreakpointManager, Found};
pub use memory::MemoryController;
pub use policy::{OnWrite, WriteDecision, decide};

use rustc_hash::FxHashMap;

use crate::addr::{Gfn, PAGE_SIZE, Pa, View};
use crate::core::VmiCore;
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};
use crate::event::VmiEvent;
use crate::undo::Left;

/// Which events are those of a tap. Apart from [`TapController`], because it needs no driver.
pub trait TapEvents {
    /// The view and the frame the tap would be on, if `event` is of the kind this controller's taps raise.
    fn check_event(&self, event: &VmiEvent) -> Option<(View, Gfn)>;
}

/// How execution at an address is caught. Every call does all it is asked for, or fails with nothing changed.
pub trait TapController<D: VmiDriver + ?Sized>: TapEvents {
    /// Catches execution at `pa` in `view`, or counts one more reference there.
    fn insert_breakpoint(&mut self, vmi: &mut VmiCore<D>, pa: Pa, view: View) -> Result<()>;

    /// Takes one reference back; the last one leaves `pa` in `view` as it was found.
    ///
    /// # Errors
    /// [`VmiError::BreakpointNotFound`] if there is none; the driver's.
    fn remove_breakpoint(&mut self, vmi: &mut VmiCore<D>, pa: Pa, view: View) -> Result<()>;

    /// Takes the rights from the page that taps on it need away. To be called before its first insert.
    fn monitor(&mut self, vmi: &mut VmiCore<D>, gfn: Gfn, view: View) -> Result<()>;

    /// Takes one [`Self::monitor`] back; the last one restores the rights that were found. To be called after the last remove.
    fn unmonitor(&mut self, vmi: &mut VmiCore<D>, gfn: Gfn, view: View) -> Result<()>;

    /// [`Self::insert_breakpoint`] at every offset of one page; one that is there twice counts twice. All or none.
    fn insert_page(&mut self, vmi: &mut VmiCore<D>, gfn: Gfn, offsets: &[u16], view: View) -> Result<()> {
        for (index, offset) in offsets.iter().enumerate() {
            if let Err(cause) = self.insert_breakpoint(vmi, gfn.pa(u64::from(*offset)), view) {
                let mut left = Left::default();
                for offset in offsets.get(..index).unwrap_or_default().iter().rev() {
                    let pa = gfn.pa(u64::from(*offset));
                    left.note(self.remove_breakpoint(vmi, pa, view), || format!("a breakpoint at {pa} in view {view}"));
                }
                return Err(left.after(cause));
            }
        }
        Ok(())
    }

    /// [`Self::monitor`] of every page. All or none.
    fn monitor_many(&mut self, vmi: &mut VmiCore<D>, gfns: &[Gfn], view: View) -> Result<()> {
        for (index, gfn) in gfns.iter().enumerate() {
            if let Err(cause) = self.monitor(vmi, *gfn, view) {
                let mut left = Left::default();
                for gfn in gfns.get(..index).unwrap_or_default().iter().rev() {
                    left.note(self.unmonitor(vmi, *gfn, view), || format!("a monitored frame {gfn} in view {view}"));
                }
                return Err(left.after(cause));
            }
        }
        Ok(())
    }
}

macro_rules! forward {
    (events [$($generics:tt)*], $target:ty) => {
        impl<$($generics)*> TapEvents for $target {
            fn check_event(&self, event: &VmiEvent) -> Option<(View, Gfn)> {
                (**self).check_event(event)
            }
        }
    };
    (controller [$($generics:tt)*], $target:ty) => {
        impl<$($generics)*> TapController<D> for $target {
            fn insert_breakpoint(&mut self, vmi: &mut VmiCore<D>, pa: Pa, view: View) -> Result<()> {
                (**self).insert_breakpoint(vmi, pa, view)
            }

            fn remove_breakpoint(&mut self, vmi: &mut VmiCore<D>, pa: Pa, view: View) -> Result<()> {
                (**self).remove_breakpoint(vmi, pa, view)
            }

            fn monitor(&mut self, vmi: &mut VmiCore<D>, gfn: Gfn, view: View) -> Result<()> {
                (**self).monitor(vmi, gfn, view)
            }

            fn unmonitor(&mut self, vmi: &mut VmiCore<D>, gfn: Gfn, view: View) -> Result<()> {
                (**self).unmonitor(vmi, gfn, view)
            }

            fn insert_page(&mut self, vmi: &mut VmiCore<D>, gfn: Gfn, offsets: &[u16], view: View) -> Result<()> {
                (**self).insert_page(vmi, gfn, offsets, view)
            }

            fn monitor_many(&mut self, vmi: &mut VmiCore<D>, gfns: &[Gfn], view: View) -> Result<()> {
                (**self).monitor_many(vmi, gfns, view)
            }
        }
    };
}

forward!(events [T: TapEvents + ?Sized], &mut T);
forward!(events [T: TapEvents + ?Sized], Box<T>);
forward!(controller [D: VmiDriver + ?Sized, T: TapController<D> + ?Sized], &mut T);
forward!(controller [D: VmiDriver + ?Sized, T: TapController<D> + ?Sized], Box<T>);

/// An error unless `gfn` is guest memory: frames of ours, and what lies beyond, cannot be tapped.
fn check_page<D: VmiDriver + ?Sized>(vmi: &VmiCore<D>, gfn: Gfn) -> Result<()> {
    let end = Pa(vmi.driver().info().memory_size);
    if gfn.0 < end.gfn().0 {
        return Ok(());
    }
    Err(VmiError::OutOfRange { pa: Pa(gfn.0.saturating_mul(PAGE_SIZE)), len: PAGE_SIZE, end })
}

/// How often pages are monitored.
type Monitors = FxHashMap<(View, Gfn), u32>;

/// An error unless the page is monitored: taking back what one does not hold would take it from somebody else.
fn check_monitored(monitors: &Monitors, gfn: Gfn, view: View) -> Result<()> {
    if monitors.contains_key(&(view, gfn)) {
        return Ok(());
    }
    Err(VmiError::InvalidArgument { what: "gfn", reason: format!("frame {gfn} is not monitored in view {view}") })
}

fn count_down(monitors: &mut Monitors, page: (View, Gfn)) {
    if let Some(count) = monitors.get_mut(&page) {
        *count -= 1;
        if *count == 0 {
            monitors.remove(&page);
        }
    }
}
