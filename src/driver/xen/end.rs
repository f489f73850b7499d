//! Letting go of a domain: every request answered, every vCPU in the default view at full speed, everything given back.

use std::time::Duration;

use xen_sys::types::flag;

use super::XenDriver;
use super::codec::with_cpuid_results;
use super::run::{Held, Taken};
use super::step::STEP_OFF;
use crate::addr::{VcpuId, View};
use crate::arch::amd64::GpRegisters;
use crate::error::Result;
use crate::event::EventReason;

/// INT3 (Intel SDM vol. 2).
const INT3: u8 = 0xcc;
/// Looks at the vCPUs before the domain is paused whatever they do.
const ROUNDS: u32 = 200;
/// Looks in a row that must find nothing to do.
const QUIET: u32 = 2;

impl XenDriver {
    /// Takes everything back, in the order that was seen to leave guests well: first let steps end, then pause. Everything is tried; what is left
    /// behind is returned.
    pub(super) fn end(&mut self) -> Vec<String> {
        let mut left: Vec<String> = Vec::new();
        if self.gone.is_none() && self.ring.is_some() {
            // A domain that has gone meanwhile needs nothing of this.
            let _ = self.look();
        }
        // Without a ring it is somebody else who listens, or nobody.
        let has_domain = self.gone.is_none() && self.ring.is_some();
        if has_domain {
            self.quiesce(&mut left);
            self.take_back(&mut left);
        }
        self.pages.clear();
        self.ring = None;
        if has_domain {
            self.stop_listening(&mut left);
        }
        if let Some(port) = self.port.take()
            && let Err(error) = self.events.unbind(port)
        {
            log::debug!("{error}");
        }
        if has_domain {
            note(&mut left, "the domain paused", self.xen.control().unpause(self.domain));
        }
        self.gone.get_or_insert_with(|| "the session has ended".to_owned());
        left
    }

    /// Answers everything and moves every vCPU to the default view, until nothing comes any more. Ends with the domain paused.
    fn quiesce(&mut self, left: &mut Vec<String>) {
        let domain = self.domain;
        if self.pauses > 0 {
            // What is paused does not end its steps.
            self.pauses = 0;
            note(left, "the domain paused", self.xen.control().unpause(domain));
        }
        self.settle_emulations();
        let mut quiet = 0;
        for _ in 0..ROUNDS {
            let is_away = (0..u32::from(self.info.vcpus))
                .any(|vcpu| self.xen.control().altp2m_vcpu_view(domain, vcpu).is_ok_and(|view| view != View::DEFAULT.0));
            if is_away && let Err(error) = self.xen.control().altp2m_switch_to_view(domain, View::DEFAULT.0) {
                left.push(format!("vCPUs in another view ({error})"));
                break;
            }
            let answered = self.drain();
            quiet = if is_away || answered > 0 { 0 } else { quiet + 1 };
            if quiet >= QUIET || self.gone.is_some() {
                break;
            }
            let _ = self.sleep(Duration::from_millis(1));
        }
        note(left, "the domain running while it was taken apart", self.xen.control().pause(domain));
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
                    self.inject_event(vcpu, 3, kind, xen_sys::types::NO_ERROR_CODE, len, 0)?;
                }
            }
            EventReason::Cpuid { insn_len, .. } => gp = Some(after_cpuid(&held, insn_len)),
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
    fn take_back(&mut self, left: &mut Vec<String>) {
        let (domain, control) = (self.domain, self.xen.control());
        for vcpu in 0..u32::from(self.info.vcpus) {
            note(left, "a vCPU that steps", control.debug_control(domain, STEP_OFF, vcpu));
        }
        let monitors: Vec<_> = self.monitors.iter().copied().collect();
        for monitor in monitors {
            if let Err(error) = crate::driver::VmiEvents::monitor(self, monitor, false) {
                left.push(format!("a monitor ({error})"));
            }
        }
        let control = self.xen.control();
        if self.knows(xen_sys::types::monitor_event::EMUL_UNIMPLEMENTED) {
            note(left, "a monitor", control.monitor_emul_unimplemented(domain, false));
        }
        note(left, "a monitor", control.monitor_singlestep(domain, false));
        for view in std::mem::take(&mut self.views).into_keys() {
            note(left, "a view", control.altp2m_destroy_view(domain, view));
        }
        if self.switched_on {
            note(left, "views switched on", control.altp2m_set_state(domain, false));
        }
        // A mapping would keep a frame that is given back.
        self.pages.clear();
        for error in self.frames.release(self.xen.control()) {
            left.push(format!("memory of shadow pages ({error})"));
        }
    }

    fn stop_listening(&self, left: &mut Vec<String>) {
        note(left, "a listener", self.xen.control().monitor_disable(self.domain));
    }
}

/// Xen has done it: only RIP is left to be moved.
fn after_cpuid(held: &Held, insn_len: u8) -> GpRegisters {
    let own = held.gp.unwrap_or(held.event.registers.gp);
    let new = with_cpuid_results(&held.request, &own);
    GpRegisters { rip: own.rip.wrapping_add(insn_len.into()), ..new }
}

fn note(left: &mut Vec<String>, what: &str, result: xen_sys::Result<()>) {
    if let Err(error) = result {
        left.push(format!("{what} ({error})"));
    }
}
