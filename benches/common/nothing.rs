//! A controller that plants nothing: what is left is the manager's own work.

use vmitap::core::VmiCore;
use vmitap::driver::VmiDriver;
use vmitap::event::VmiEvent;
use vmitap::tap::{TapController, TapEvents};
use vmitap::{Gfn, Pa, Result, View};

/// Takes every breakpoint, on any frame.
pub struct Nothing;

impl TapEvents for Nothing {
    fn check_event(&self, _: &VmiEvent) -> Option<(View, Gfn)> {
        None
    }
}

impl<D: VmiDriver + ?Sized> TapController<D> for Nothing {
    fn insert_breakpoint(&mut self, _: &mut VmiCore<D>, _: Pa, _: View) -> Result<()> {
        Ok(())
    }

    fn remove_breakpoint(&mut self, _: &mut VmiCore<D>, _: Pa, _: View) -> Result<()> {
        Ok(())
    }

    fn monitor(&mut self, _: &mut VmiCore<D>, _: Gfn, _: View) -> Result<()> {
        Ok(())
    }

    fn unmonitor(&mut self, _: &mut VmiCore<D>, _: Gfn, _: View) -> Result<()> {
        Ok(())
    }
}
