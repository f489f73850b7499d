//! What cannot be done with a dump. Switching off what was never on is no error: it is how a session ends.

use std::sync::Arc;
use std::time::Duration;

use super::{DumpDriver, NAME};
use crate::addr::{Gfn, MemoryAccess, Pa, VcpuId, View};
use crate::arch::amd64::Injection;
use crate::driver::{
    Additions, Monitor, VmiControl, VmiEvents, VmiFrames, VmiInject, VmiProtection, VmiRepair, VmiViews, VmiWrite, Wait, Waker,
};
use crate::error::{Result, VmiError};
use crate::event::VmiEventResponse;

pub(super) fn refuse<T>(capability: &'static str) -> Result<T> {
    Err(VmiError::NotSupported { driver: NAME, capability })
}

impl VmiWrite for DumpDriver {
    fn write(&mut self, _: Pa, _: &[u8]) -> Result<()> {
        refuse("writing guest memory")
    }
}

impl VmiViews for DumpDriver {
    fn create_view(&mut self, _: MemoryAccess) -> Result<View> {
        refuse("views")
    }

    fn destroy_view(&mut self, _: View) -> Result<()> {
        refuse("views")
    }

    fn switch_to_view(&mut self, view: View) -> Result<()> {
        if view == View::DEFAULT { Ok(()) } else { refuse("views") }
    }

    fn vcpu_view(&self, _: VcpuId) -> Result<View> {
        refuse("views")
    }

    fn remap(&mut self, _: View, _: Gfn, _: Option<Gfn>) -> Result<()> {
        refuse("views")
    }
}

impl VmiProtection for DumpDriver {
    fn memory_access(&self, _: View, _: Gfn) -> Result<MemoryAccess> {
        refuse("access rights")
    }

    fn set_memory_access(&mut self, _: View, _: Gfn, _: MemoryAccess) -> Result<()> {
        refuse("access rights")
    }

    fn set_memory_access_multi(&mut self, _: View, _: &[(Gfn, MemoryAccess)]) -> Result<()> {
        refuse("access rights")
    }
}

impl VmiFrames for DumpDriver {
    fn allocate_frames(&mut self, _: usize) -> Result<Vec<Gfn>> {
        refuse("frames")
    }

    fn free_frames(&mut self, frames: &[Gfn]) -> Result<()> {
        if frames.is_empty() { Ok(()) } else { refuse("frames") }
    }

    fn frames_in_use(&self) -> usize {
        0
    }
}

/// Nobody waits for a dump.
struct NoWaker;

impl Waker for NoWaker {
    fn wake(&self) {}
}

impl VmiEvents for DumpDriver {
    fn monitor(&mut self, _: Monitor, on: bool) -> Result<()> {
        if on { refuse("events") } else { Ok(()) }
    }

    fn wait(&mut self, _: Duration) -> Result<Wait> {
        refuse("running")
    }

    fn respond(&mut self, vcpu: VcpuId, _: &VmiEventResponse) -> Result<()> {
        Err(VmiError::NoPendingEvent { vcpu })
    }

    fn waker(&self) -> Arc<dyn Waker> {
        Arc::new(NoWaker)
    }
}

impl VmiInject for DumpDriver {
    fn inject(&mut self, _: VcpuId, _: &Injection) -> Result<()> {
        refuse("injection")
    }
}

impl VmiControl for DumpDriver {
    fn pause(&mut self) -> Result<()> {
        refuse("pausing")
    }

    fn resume(&mut self) -> Result<()> {
        refuse("pausing")
    }
}

impl VmiRepair for DumpDriver {
    fn additions(&self) -> Result<Additions> {
        Ok(Additions::default())
    }

    fn adopt(&mut self, _: &Additions, _: u32) -> Result<()> {
        refuse("repairing")
    }

    fn release_held(&mut self) -> Result<usize> {
        Ok(0)
    }
}
