//! A controller of somebody else's, whose panic must not leave half of an operation behind.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::{TapController, TapEvents};
use crate::addr::{Gfn, Pa, View};
use crate::core::VmiCore;
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};
use crate::event::VmiEvent;

/// Passes everything on. A call that panics is one that failed, so that what was done before it is undone like after any failure.
pub(super) struct Guarded<'a, C: ?Sized> {
    controller: &'a mut C,
    panic: Option<Box<dyn Any + Send>>,
}

/// Does `work` with a guarded controller. The first panic goes on once `work` has undone what it had to.
pub(super) fn guarded<C: ?Sized, T>(controller: &mut C, work: impl FnOnce(&mut Guarded<'_, C>) -> Result<T>) -> Result<T> {
    let mut guarded = Guarded { controller, panic: None };
    let result = work(&mut guarded);
    match guarded.panic {
        None => result,
        Some(panic) => resume_unwind(panic),
    }
}

impl<C: ?Sized> Guarded<'_, C> {
    fn call(&mut self, call: impl FnOnce(&mut C) -> Result<()>) -> Result<()> {
        // What the controller leaves of itself is its own affair; nothing else is changed in there.
        catch_unwind(AssertUnwindSafe(|| call(self.controller))).unwrap_or_else(|panic| {
            self.panic.get_or_insert(panic);
            Err(VmiError::Driver { op: "a tap controller", errno: 0, detail: "it panicked".to_owned() })
        })
    }
}

impl<C: TapEvents + ?Sized> TapEvents for Guarded<'_, C> {
    fn check_event(&self, event: &VmiEvent) -> Option<(View, Gfn)> {
        self.controller.check_event(event)
    }
}

impl<D: VmiDriver + ?Sized, C: TapController<D> + ?Sized> TapController<D> for Guarded<'_, C> {
    fn insert_breakpoint(&mut self, vmi: &mut VmiCore<D>, pa: Pa, view: View) -> Result<()> {
        self.call(|controller| controller.insert_breakpoint(vmi, pa, view))
    }

    fn remove_breakpoint(&mut self, vmi: &mut VmiCore<D>, pa: Pa, view: View) -> Result<()> {
        self.call(|controller| controller.remove_breakpoint(vmi, pa, view))
    }

    fn monitor(&mut self, vmi: &mut VmiCore<D>, gfn: Gfn, view: View) -> Result<()> {
        self.call(|controller| controller.monitor(vmi, gfn, view))
    }

    fn unmonitor(&mut self, vmi: &mut VmiCore<D>, gfn: Gfn, view: View) -> Result<()> {
        self.call(|controller| controller.unmonitor(vmi, gfn, view))
    }

    fn insert_many(&mut self, vmi: &mut VmiCore<D>, points: &[(View, Pa)]) -> Result<()> {
        self.call(|controller| controller.insert_many(vmi, points))
    }

    fn remove_many(&mut self, vmi: &mut VmiCore<D>, points: &[(View, Pa)]) -> Result<()> {
        self.call(|controller| controller.remove_many(vmi, points))
    }

    fn monitor_many(&mut self, vmi: &mut VmiCore<D>, pages: &[(View, Gfn)]) -> Result<()> {
        self.call(|controller| controller.monitor_many(vmi, pages))
    }

    fn unmonitor_many(&mut self, vmi: &mut VmiCore<D>, pages: &[(View, Gfn)]) -> Result<()> {
        self.call(|controller| controller.unmonitor_many(vmi, pages))
    }
}
