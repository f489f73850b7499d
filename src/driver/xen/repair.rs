//! Cleaning up after a program that ended without a word, while it listened to the domain.

use xen_sys::errno;
use xen_sys::types::dominf;

use super::codec;
use super::step::STEP_OFF;
use super::views::ViewBook;
use super::{XenDriver, failed};
use crate::addr::{Gfn, PAGE_SHIFT, View};
use crate::driver::{Additions, VmiEvents, VmiRepair};
use crate::error::Result;

/// Frames that are looked at in one call.
const CHUNK: u64 = 512;
/// Frames that are looked at in all.
const MOST: u64 = 1 << 14;

impl XenDriver {
    /// The frames from the highest one down to the first gap, ascending.
    fn top_frames(&self) -> Result<Vec<u64>> {
        let control = self.xen.control();
        let highest = control.maximum_gpfn(self.domain).map_err(|error| failed(&error))?;
        let lowest = (highest + 1).saturating_sub(MOST);
        let mut found = Vec::new();
        let mut end = highest + 1;
        while end > lowest {
            let begin = end.saturating_sub(CHUNK).max(lowest);
            let frames: Vec<u64> = (begin..end).collect();
            let present = self.pages.foreign().present(self.domain, &frames).unwrap_or_default();
            let there = present.iter().rev().take_while(|present| **present).count() as u64;
            found.extend((end - there..end).rev());
            if there < end - begin {
                break;
            }
            end = begin;
        }
        found.reverse();
        Ok(found)
    }
}

impl VmiRepair for XenDriver {
    /// Views are found by asking for each number. Xen does not know whose a frame is: listed are those from the guest's highest one down to the first
    /// gap, among which some may be the guest's own. Who compares with what was there before knows which are new.
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
        let frames = self.top_frames()?.into_iter().map(Gfn).filter(|frame| !self.frames.is_free(*frame)).collect();
        Ok(Additions { views, frames, is_paused })
    }

    fn adopt(&mut self, left: &Additions, pauses: u32) -> Result<()> {
        self.check_alive()?;
        for view in left.views.iter().filter(|view| **view != View::DEFAULT) {
            self.views.entry(view.0).or_insert_with(ViewBook::adopted);
        }
        if let Some(first) = left.frames.iter().min().copied() {
            // A pool has frames that were never used, too; all of it lies above the guest's memory.
            let mut pool: Vec<Gfn> = self.top_frames()?.into_iter().filter(|frame| *frame >= first.0).map(Gfn).collect();
            // The highest frame a guest has had counts even when it is gone (`max_mapped_pfn`).
            let frames: Vec<u64> = left.frames.iter().map(|frame| frame.0).collect();
            let present = self.pages.foreign().present(self.domain, &frames).unwrap_or_default();
            pool.extend(frames.into_iter().zip(present).filter_map(|(frame, is_there)| is_there.then_some(Gfn(frame))));
            self.frames.adopt(&left.frames, &pool);
            // What was counted as guest memory because it was there.
            self.info.memory_size = self.info.memory_size.min(first.0 << PAGE_SHIFT);
        }
        self.pauses = self.pauses.max(pauses);
        // Views that are on although nobody else has one were switched on by the program that died.
        self.switched_on |= self.additions()?.views.iter().all(|view| left.views.contains(view));
        Ok(())
    }

    /// A vCPU that stands still for an event of a listener before us is answered like one of ours: Xen looks only at whether it stands still
    /// (`vm_event_resume` in common/vm_event.c). Answers without requests confuse the ring, so it is made anew before and after. Of those Xen
    /// does not say how many stood still; the count is of events of our own.
    fn release_held(&mut self) -> Result<usize> {
        self.check_alive()?;
        self.settle_emulations();
        self.to_default_view().map_err(|error| self.failed(&error))?;
        let released = self.drain();
        if !self.has_deposed {
            return Ok(released);
        }
        let monitors = std::mem::take(&mut self.monitors);
        let answered = self.answer_for_another();
        // Also after an error: whoever tries again finds a ring that can be used, and knows what was monitored.
        for monitor in monitors {
            VmiEvents::monitor(self, monitor, true)?;
        }
        answered?;
        Ok(released)
    }
}

impl XenDriver {
    /// Puts every vCPU into the default view, to stay: with the steps off first, none comes back to another view. What is hidden cannot be met
    /// any more then, so that no event of it is missed, and nothing is seen or executed while nobody listens.
    fn to_default_view(&self) -> xen_sys::Result<()> {
        let (domain, control) = (self.domain, self.xen.control());
        for vcpu in 0..u32::from(self.info.vcpus) {
            control.debug_control(domain, STEP_OFF, vcpu)?;
        }
        match control.altp2m_state(domain) {
            Ok(true) => control.altp2m_switch_to_view(domain, View::DEFAULT.0),
            // There is no other view.
            _ => Ok(()),
        }
    }

    /// Takes the place of a listener that has died. Its vCPUs stand still on.
    pub(super) fn depose(&self) -> xen_sys::Result<()> {
        self.to_default_view()?;
        if let Err(error) = self.xen.control().monitor_disable(self.domain) {
            log::debug!("nobody listened: {error}");
        }
        Ok(())
    }

    /// Answers once for every vCPU in a ring of its own.
    fn answer_for_another(&mut self) -> Result<()> {
        // Ends every monitor: whoever comes to stand still does so before the answers.
        self.listen_anew()?;
        let mut told = Ok(());
        for vcpu in 0..self.info.vcpus {
            let answer = codec::release(self.abi.layout, vcpu);
            if let Some(ring) = &mut self.ring {
                ring.push_unasked(&answer);
            }
            self.untold = true;
            told = told.and(self.tell());
        }
        self.listen_anew()?;
        told
    }

    /// Ends the listening and begins it anew, with an empty ring and nothing monitored.
    fn listen_anew(&mut self) -> Result<()> {
        self.ring = None;
        self.untold = false;
        if let Some(port) = self.port.take() {
            self.events.unbind(port).map_err(|error| self.failed(&error))?;
        }
        self.xen.control().monitor_disable(self.domain).map_err(|error| self.failed(&error))?;
        self.is_listening = false;
        let switched_on = self.switched_on;
        self.listen().map_err(|obstacle| obstacle.error(&self.info.name))?;
        self.switched_on |= switched_on;
        self.decides_writes = false;
        Ok(())
    }
}
