//! Taps: breakpoints the guest cannot see, who owns them, and what an event means for them.

mod books;
mod breakpoint;
mod frames;
mod guarded;
mod manager;
mod memory;
mod pages;
mod policy;
mod roots;
mod shadow;

pub use crate::rights::Rights;
pub use breakpoint::BreakpointController;
pub use manager::{Breakpoint, BreakpointManager, Found};
pub use memory::MemoryController;
pub use policy::{OnWrite, WriteDecision, decide};

use rustc_hash::FxHashMap;

use guarded::{Guarded, guarded};

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
///
/// A [`BreakpointManager`] takes a call that panics for one that failed: it undoes what it had done before, and the panic goes on then.
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

    /// [`Self::insert_breakpoint`] at every point; one that is there twice counts twice. All or none.
    fn insert_many(&mut self, vmi: &mut VmiCore<D>, points: &[(View, Pa)]) -> Result<()> {
        let what = |(view, pa): &(View, Pa)| format!("a breakpoint at {pa} in view {view}");
        all_or_none(points.iter(), what, self, |controller, (view, pa), forward| {
            if forward { controller.insert_breakpoint(vmi, *pa, *view) } else { controller.remove_breakpoint(vmi, *pa, *view) }
        })
    }

    /// [`Self::remove_breakpoint`] at every point, the last one first. All or none.
    fn remove_many(&mut self, vmi: &mut VmiCore<D>, points: &[(View, Pa)]) -> Result<()> {
        let what = |(view, pa): &(View, Pa)| format!("no breakpoint at {pa} in view {view}");
        all_or_none(points.iter().rev(), what, self, |controller, (view, pa), forward| {
            if forward { controller.remove_breakpoint(vmi, *pa, *view) } else { controller.insert_breakpoint(vmi, *pa, *view) }
        })
    }

    /// [`Self::monitor`] of every page. All or none.
    fn monitor_many(&mut self, vmi: &mut VmiCore<D>, pages: &[(View, Gfn)]) -> Result<()> {
        let what = |(view, gfn): &(View, Gfn)| format!("frame {gfn} monitored in view {view}");
        all_or_none(pages.iter(), what, self, |controller, (view, gfn), forward| {
            if forward { controller.monitor(vmi, *gfn, *view) } else { controller.unmonitor(vmi, *gfn, *view) }
        })
    }

    /// [`Self::unmonitor`] of every page, the last one first. All or none.
    fn unmonitor_many(&mut self, vmi: &mut VmiCore<D>, pages: &[(View, Gfn)]) -> Result<()> {
        let what = |(view, gfn): &(View, Gfn)| format!("frame {gfn} not monitored in view {view}");
        all_or_none(pages.iter().rev(), what, self, |controller, (view, gfn), forward| {
            if forward { controller.unmonitor(vmi, *gfn, *view) } else { controller.monitor(vmi, *gfn, *view) }
        })
    }
}

/// Does `step` for one item after the other; on an error, or a panic of the controller's, back again (then the last argument is
/// false), the last one first.
fn all_or_none<T: Copy, C: ?Sized>(
    items: impl DoubleEndedIterator<Item = T> + ExactSizeIterator + Clone,
    what: impl Fn(T) -> String,
    controller: &mut C,
    mut step: impl FnMut(&mut Guarded<'_, C>, T, bool) -> Result<()>,
) -> Result<()> {
    guarded(controller, |controller| {
        for (index, item) in items.clone().enumerate() {
            let Err(cause) = step(controller, item, true) else { continue };
            let mut left = Left::default();
            for done in items.take(index).rev() {
                left.note(step(controller, done, false), || what(done));
            }
            return Err(left.after(cause));
        }
        Ok(())
    })
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

            fn insert_many(&mut self, vmi: &mut VmiCore<D>, points: &[(View, Pa)]) -> Result<()> {
                (**self).insert_many(vmi, points)
            }

            fn remove_many(&mut self, vmi: &mut VmiCore<D>, points: &[(View, Pa)]) -> Result<()> {
                (**self).remove_many(vmi, points)
            }

            fn monitor_many(&mut self, vmi: &mut VmiCore<D>, pages: &[(View, Gfn)]) -> Result<()> {
                (**self).monitor_many(vmi, pages)
            }

            fn unmonitor_many(&mut self, vmi: &mut VmiCore<D>, pages: &[(View, Gfn)]) -> Result<()> {
                (**self).unmonitor_many(vmi, pages)
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
#[derive(Default)]
struct Monitors(FxHashMap<(View, Gfn), u32>);

impl Monitors {
    fn add(&mut self, pages: &[(View, Gfn)]) {
        for page in pages {
            *self.0.entry(*page).or_default() += 1;
        }
    }

    /// An error unless each page is monitored as often as it is in `pages`: taking back what one does not hold would take it from
    /// somebody else.
    fn check(&self, pages: &[(View, Gfn)]) -> Result<()> {
        let mut sorted = pages.to_vec();
        sorted.sort_unstable();
        for same in sorted.chunk_by(PartialEq::eq) {
            let Some((view, gfn)) = same.first() else { continue };
            if self.0.get(&(*view, *gfn)).is_none_or(|count| (*count as usize) < same.len()) {
                let reason = format!("frame {gfn} is not monitored in view {view}");
                return Err(VmiError::InvalidArgument { what: "gfn", reason });
            }
        }
        Ok(())
    }

    fn remove(&mut self, pages: &[(View, Gfn)]) {
        for page in pages {
            if let Some(count) = self.0.get_mut(page) {
                *count -= 1;
                if *count == 0 {
                    self.0.remove(page);
                }
            }
        }
    }

    fn retain(&mut self, keep: impl Fn(View, Gfn) -> bool) {
        self.0.retain(|(view, gfn), _| keep(*view, *gfn));
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}
