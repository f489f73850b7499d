//! Cleaning up after a program that ended without a word, while it listened to the domain.

use xen_sys::errno;
use xen_sys::types::dominf;

use super::codec;
use super::step::STEP_OFF;
use super::views::ViewBook;
use super::{XenDriver, failed};
use crate::addr::{Gfn, PAGE_SHIFT, View};
use crate::driver::{Additions, VmiRepair};
use crate::error::Result;

impl VmiRepair for XenDriver {
    /// Views are found by asking for each number. Frames are those this driver has; after another program's end they are part of the guest's
    /// memory as far as Xen knows, and the journal says which.
    fn additions(&self) -> Result<Additions> {
        self.check_alive()?;
        let control = self.xen.control();
        let exists = |view: &u16| match control.altp2m_mem_access(self.domain, *view, 0) {
            Ok(_) => true,
            // The view is there, and the page was never met in it.
            Err(error) => error.errno == errno::ESRCH,
        };
        let views = (1..=self.abi.max_views()).filter(exists).map(View).collect();
        let info = control.domain(self.domain).map_err(|error| failed(&error))?;
        let is_paused = info.is_some_and(|info| info.flags & dominf::PAUSED != 0);
        Ok(Additions { views, frames: self.frames.taken(), is_paused })
    }

    fn adopt(&mut self, left: &Additions, pauses: u32) -> Result<()> {
        self.check_alive()?;
        for view in left.views.iter().filter(|view| **view != View::DEFAULT) {
            self.views.entry(view.0).or_insert_with(ViewBook::adopted);
        }
        if let Some(first) = self.frames.adopt(&left.frames) {
            // What was counted as guest memory because it was there.
            self.info.memory_size = self.info.memory_size.min(first.0 << PAGE_SHIFT);
        }
        self.pauses = self.pauses.max(pauses);
        // Views that are on although nobody else has one were switched on by the program that died.
        self.switched_on |= self.additions()?.views.iter().all(|view| left.views.contains(view));
        Ok(())
    }

    /// A vCPU that stands still for an event of a listener before us is answered like one of ours: Xen looks only at whether it stands still
    /// (`vm_event_resume` in common/vm_event.c). Answers without requests confuse the ring, so it is made anew. Of those Xen does not say how
    /// many stood still; the count is of events of our own.
    fn release_held(&mut self) -> Result<usize> {
        self.check_alive()?;
        let domain = self.domain;
        let released = self.drain();
        for vcpu in 0..self.info.vcpus {
            let answer = codec::release(self.abi.layout, vcpu);
            if let Some(ring) = &mut self.ring {
                ring.push_unasked(&answer);
            }
            if let Some(port) = self.port {
                self.events.notify(port).map_err(|error| failed(&error))?;
            }
        }
        for vcpu in 0..u32::from(self.info.vcpus) {
            self.xen.control().debug_control(domain, STEP_OFF, vcpu).map_err(|error| failed(&error))?;
        }
        self.xen.control().altp2m_switch_to_view(domain, View::DEFAULT.0).map_err(|error| failed(&error))?;
        self.listen_anew()?;
        Ok(released)
    }
}

impl super::frames::Frames {
    /// The frames that are taken, ascending.
    pub fn taken(&self) -> Vec<Gfn> {
        let mut frames: Vec<Gfn> = self.used().collect();
        frames.sort_unstable();
        frames
    }
}
