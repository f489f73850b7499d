//! Letting go of a domain: every request answered, every vCPU in the default view at full speed, everything given back.

use std::time::Duration;

use xen_sys::errno;
use xen_sys::types::{event_type, flag};

use super::monitors::monitored;
use super::run::Taken;
use super::step::STEP_OFF;
use super::{XenDriver, attach};
use crate::addr::{VcpuId, View};
use crate::arch::amd64::vector;
use crate::error::{Result, VmiError};
use crate::event::EventReason;

/// INT3 (Intel SDM vol. 2).
const INT3: u8 = 0xcc;
/// Looks at the vCPUs before the domain is paused whatever they do.
const ROUNDS: u32 = 200;
/// Looks in a row that must find nothing to do.
const QUIET: u32 = 2;

/// Something that could not be taken back.
pub(super) struct LeftBehind {
    what: String,
    errno: i32,
}

/// As one error; `None` if nothing is left.
pub(super) fn left_behind(left: &[LeftBehind]) -> Option<VmiError> {
    let first = left.first()?;
    let detail: Vec<&str> = left.iter().map(|each| each.what.as_str()).collect();
    Some(VmiError::Driver { op: "letting go of the domain", errno: first.errno, detail: detail.join(", ") })
}

impl XenDriver {
    /// Takes everything back, in the order that was seen to leave guests well: first let steps end, then pause. Everything is tried; what is left
    /// behind is returned, and tried again the next time.
    pub(super) fn end(&mut self) -> Vec<LeftBehind> {
        let mut left: Vec<LeftBehind> = Vec::new();
        let is_again = std::mem::replace(&mut self.has_ended, true);
        if !self.is_in_it {
            return left;
        }
        if is_again && self.is_anothers() {
            // Nothing tells its steps, monitors and views from what is left of ours, which it may have taken over.
            let what = "what was left before (another session is in the domain now)".to_owned();
            left.push(LeftBehind { what, errno: errno::EBUSY });
            return left;
        }
        if self.gone.get().is_none() && self.is_listening {
            // A domain that has gone meanwhile needs nothing of this.
            let _ = self.look();
        }
        let has_domain = self.gone.get().is_none();
        if has_domain {
            // Without a ring it is somebody else who listens, or nobody; or this is the second time.
            if self.ring.is_some() {
                self.quiesce(&mut left);
            }
            self.take_back(&mut left);
        }
        self.pages.clear();
        self.ring = None;
        if has_domain && self.is_listening {
            let ended = self.xen.control().monitor_disable(self.domain);
            self.is_listening = ended.is_err();
            note(&mut left, "a listener", ended);
        }
        if let Some(port) = self.port {
            match self.events.unbind(port) {
                Ok(()) => self.port = None,
                Err(error) => note(&mut left, "an event channel", Err(error)),
            }
        }
        if has_domain {
            note(&mut left, "the domain paused", self.let_run());
        }
        if !left.is_empty() && matches!(self.look(), Err(VmiError::DomainGone { .. })) {
            left.clear();
        }
        self.is_in_it = !left.is_empty();
        left
    }

    /// Whether another session listens.
    fn is_anothers(&self) -> bool {
        !self.is_listening && self.gone.get().is_none() && attach::is_listened_to(self.xen.control(), self.domain)
    }

    /// Answers everything and moves every vCPU to the default view, until nothing comes any more. Ends with the domain paused.
    fn quiesce(&mut self, left: &mut Vec<LeftBehind>) {
        let domain = self.domain;
        if self.pauses > 0 {
            // What is paused does not end its steps.
            self.pauses = 0;
            // Those of a session before us were taken back as far as they are known.
            if !self.has_deposed {
                note(left, "the domain paused", self.xen.control().unpause(domain));
            }
        }
        note(left, "the domain paused", self.let_run());
        self.settle_emulations();
        let mut quiet = 0;
        for _ in 0..ROUNDS {
            let is_away = (0..u32::from(self.info.vcpus))
                .any(|vcpu| self.xen.control().altp2m_vcpu_view(domain, vcpu).is_ok_and(|view| view != View::DEFAULT.0));
            if is_away && let Err(error) = self.xen.control().altp2m_switch_to_view(domain, View::DEFAULT.0) {
                note(left, "vCPUs in another view", Err(error));
                break;
            }
            let answered = self.drain() + usize::from(self.tell().is_err());
            quiet = if is_away || answered > 0 { 0 } else { quiet + 1 };
            if quiet >= QUIET || self.gone.get().is_some() {
                break;
            }
            let _ = self.sleep(Duration::from_millis(1));
        }
        if !self.owes_unpause.get() {
            let paused = self.xen.control().pause(domain);
            self.owes_unpause.set(paused.is_ok());
            note(left, "the domain running while it was taken apart", paused);
        }
        self.drain();
    }

    /// Answers every request there is, for good. How many there were.
    pub(super) fn drain(&mut self) -> usize {
        let mut answered = 0;
        loop {
            self.ready.clear();
            let held: Vec<VcpuId> = (0..self.info.vcpus).map(VcpuId).filter(|vcpu| self.is_held(*vcpu)).collect();
            for vcpu in held {
                answered += 1;
                if let Err(error) = self.say_farewell(vcpu) {
                    log::error!("vCPU {vcpu} stands still: its event could not be answered: {error}");
                    if let Some(slot) = self.vcpus.get_mut(usize::from(vcpu.0)) {
                        slot.held = None;
                    }
                }
            }
            match self.take_one() {
                Ok(Taken::Nothing) => return answered,
                Ok(Taken::Answered) => answered += 1,
                // Counted when it is answered.
                Ok(Taken::Held(_)) => {}
                Err(error) => {
                    log::error!("{error}");
                    return answered;
                }
            }
        }
    }

    fn is_held(&self, vcpu: VcpuId) -> bool {
        self.vcpu(vcpu).is_ok_and(|vcpu| vcpu.held.is_some())
    }

    /// The last answer to an event: in the default view, where nothing is hidden, the instruction is tried again.
    fn say_farewell(&mut self, vcpu: VcpuId) -> Result<()> {
        let Some(held) = self.vcpu(vcpu)?.held else { return Ok(()) };
        let mut answer = held.request.response();
        answer.view(View::DEFAULT);
        let mut gp = held.gp;
        match held.event.reason {
            EventReason::Breakpoint { gfn, .. } if gp.is_none() => {
                let mut byte = [0];
                let own = self.pages.read(gfn.pa(held.event.registers.gp.rip), &mut byte).is_ok() && byte == [INT3];
                if own {
                    let (len, kind) = held.request.breakpoint();
                    if let Err(error) = self.inject_event(vcpu, 3, kind, xen_sys::types::NO_ERROR_CODE, len, 0) {
                        // It is executed again, and told again or delivered by the processor.
                        log::debug!("{error}");
                    }
                }
            }
            EventReason::DebugException { pending } if gp.is_none() => {
                let none = xen_sys::types::NO_ERROR_CODE;
                if let Err(error) = self.inject_event(vcpu, vector::DB, event_type::HW_EXC, none, 0, pending) {
                    log::warn!("a debug exception of vCPU {vcpu} is lost: {error}");
                }
            }
            EventReason::Cpuid { .. } => gp = Some(self.behind(vcpu, &held, gp)?),
            EventReason::WriteControlRegister { .. } | EventReason::WriteMsr { .. } | EventReason::GuestRequest
                if gp.is_some() =>
            {
                gp = Some(self.behind(vcpu, &held, gp)?);
            }
            _ => {}
        }
        if let Some(gp) = &gp {
            answer.registers(&held.request, gp);
        }
        let slot = self.vcpu_mut(vcpu)?;
        if slot.stepping {
            answer.flag(flag::TOGGLE_SINGLESTEP);
        }
        slot.stepping = false;
        slot.rounds = None;
        slot.held = None;
        self.send(&answer)
    }

    /// Stepping, monitors, views and frames, with the domain paused.
    fn take_back(&mut self, left: &mut Vec<LeftBehind>) {
        let (domain, control) = (self.domain, self.xen.control());
        for vcpu in 0..u32::from(self.info.vcpus) {
            note(left, "a vCPU that steps", control.debug_control(domain, STEP_OFF, vcpu));
        }
        let monitors: Vec<_> = self.monitors.iter().copied().collect();
        for monitor in monitors {
            if let Err(error) = self.switch_monitor(monitor, false) {
                let errno = if let VmiError::Driver { errno, .. } = &error { *errno } else { errno::ESRCH };
                left.push(LeftBehind { what: format!("a monitor ({error})"), errno });
            }
        }
        let control = self.xen.control();
        if self.knows(xen_sys::types::monitor_event::EMUL_UNIMPLEMENTED) {
            note(left, "a monitor", monitored(control.monitor_emul_unimplemented(domain, false)));
        }
        note(left, "a monitor", monitored(control.monitor_singlestep(domain, false)));
        self.views.retain(|view, _| {
            let destroyed = control.altp2m_destroy_view(domain, *view);
            let stays = destroyed.is_err();
            note(left, "a view", destroyed);
            stays
        });
        if self.switched_on {
            let off = control.altp2m_set_state(domain, false);
            self.switched_on = off.is_err();
            note(left, "views switched on", off);
        }
        // A mapping would keep a frame that is given back.
        self.pages.clear();
        for error in self.frames.release(self.xen.control()) {
            note(left, "memory of shadow pages", Err(error));
        }
    }
}

fn note(left: &mut Vec<LeftBehind>, what: &str, result: xen_sys::Result<()>) {
    if let Err(error) = result {
        left.push(LeftBehind { what: format!("{what} ({error})"), errno: error.errno });
    }
}
