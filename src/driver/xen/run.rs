//! The loop's end of the driver: requests in, answers out. Every request gets exactly one answer.

use std::time::{Duration, Instant};

use rustix::event::{PollFlags, Timespec, poll};
use xen_sys::types::flag;

use super::codec::{Asked, Request, Response};
use super::step::{Fast, Rounds};
use super::{XenDriver, descriptors};
use crate::addr::{Pa, Va, VcpuId, View};
use crate::arch::amd64::GpRegisters;
use crate::driver::Wait;
use crate::error::{Result, VmiError};
use crate::event::{EventReason, VmiEvent};

/// How often an idle wait looks whether the domain is still there.
const LOOK: Duration = Duration::from_millis(500);

/// The event that holds a vCPU.
#[derive(Clone, Copy)]
pub struct Held {
    pub request: Request,
    pub event: VmiEvent,
    /// What `set_registers` has changed since.
    pub gp: Option<GpRegisters>,
    /// Where `switch_to_view` has put the vCPU since.
    pub moved: Option<View>,
    /// The last page to which a store of the instruction was told that Xen did not tell of: the number of the store, and of its page.
    pub told: Option<(usize, u64)>,
    /// Where the store is that Xen told of, if others were told since.
    pub xens_own: Option<(Pa, Option<Va>)>,
    /// It was handed out.
    pub is_out: bool,
}

impl Held {
    /// The view the vCPU is in.
    pub fn view(&self) -> View {
        self.moved.or(self.event.view).unwrap_or(View::DEFAULT)
    }
}

/// What came out of the ring.
pub enum Taken {
    /// It is empty.
    Nothing,
    /// A request that was the driver's own business.
    Answered,
    /// An event for whoever waits.
    Held(VcpuId),
}

/// One vCPU, as far as the driver has to remember it.
#[derive(Default)]
pub struct Vcpu {
    pub held: Option<Held>,
    /// Xen's single-step flag is on.
    pub stepping: bool,
    /// A fast step that may be under way.
    pub fast: Option<Fast>,
    /// RIP of an instruction whose bytes were given to the emulator, which may not have executed them yet.
    pub emulating: Option<u64>,
    /// Steps that nobody is told of, up to the end of a repeated instruction.
    pub rounds: Option<Rounds>,
}

impl Vcpu {
    /// Every vCPU was put into a view.
    pub fn moved(&mut self, view: View) {
        if let Some(held) = &mut self.held {
            held.moved = Some(view);
        }
        if let Some(rounds) = &mut self.rounds {
            rounds.back = view;
        }
        if let Some(fast) = &mut self.fast {
            fast.back = view;
        }
    }

    /// The view it is in, or comes back to, if Xen has it in `view`.
    pub fn home(&self, view: View) -> View {
        if let Some(rounds) = &self.rounds {
            return rounds.back;
        }
        self.fast.filter(|fast| fast.view == view).map_or(view, |fast| fast.back)
    }

    /// A fast step has begun and not ended: an event came in between.
    pub fn is_in_fast_step(&self, view: View) -> bool {
        self.fast.is_some_and(|fast| fast.view == view && fast.view != fast.back)
    }
}

impl XenDriver {
    /// Takes one request from the ring and sorts it.
    pub(super) fn take_one(&mut self) -> Result<Taken> {
        let Some(ring) = &mut self.ring else { return Ok(Taken::Nothing) };
        let layout = ring.layout();
        let taken = ring.take().map_err(|corrupt| {
            self.broken = Some(corrupt.to_string());
            VmiError::Driver { op: "reading the event ring", errno: 0, detail: corrupt.to_string() }
        })?;
        let Some(bytes) = taken else { return Ok(Taken::Nothing) };
        let request = Request::new(&bytes, layout);
        Ok(self.sort(&request)?.map_or(Taken::Answered, Taken::Held))
    }

    /// Puts an answer into the ring and tells Xen: the one hypercall of an event.
    pub(super) fn send(&mut self, response: &Response) -> Result<()> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        if !ring.answer(&response.bytes) {
            return Err(VmiError::Driver { op: "answering an event", errno: 0, detail: "no request is open".to_owned() });
        }
        // The answer is in the ring: if Xen cannot be told now, the next wait tells it.
        self.untold = true;
        if let Err(error) = self.tell() {
            log::debug!("{error}");
        }
        Ok(())
    }

    /// Tells Xen that there are answers, unless it knows.
    pub(super) fn tell(&mut self) -> Result<()> {
        if let Some(port) = self.port.filter(|_| self.untold) {
            self.events.notify(port).map_err(|error| self.failed(&error))?;
            self.untold = false;
        }
        Ok(())
    }

    /// Answers what is the driver's own business, and holds the vCPU of everything else.
    fn sort(&mut self, request: &Request) -> Result<Option<VcpuId>> {
        let vcpu = VcpuId(request.vcpu() as u16);
        let known = request.vcpu() < u32::from(self.info.vcpus) && request.version() == self.abi.layout.version;
        // Nobody stands still for it: it was only told.
        if !known || !request.is_paused() {
            if !known {
                log::warn!("a request of vCPU {} in version {} was passed over", request.vcpu(), request.version());
            }
            return self.send(&request.response()).map(|()| None);
        }
        let asked = request.asked();
        let view = request.view();
        let slot = self.vcpu_mut(vcpu)?;
        if !slot.is_in_fast_step(view) {
            slot.fast = None;
        }
        slot.emulating = None;
        match asked {
            Asked::Event(event) => {
                if event_is_step(&event)
                    && let Some(response) = slot.step_done(request, &event)
                {
                    return self.send(&response).map(|()| None);
                }
                slot.rounds = None;
                let event = self.with_store(&event);
                let slot = self.vcpu_mut(vcpu)?;
                slot.held =
                    Some(Held { request: *request, event, gp: None, moved: None, told: None, xens_own: None, is_out: false });
                Ok(Some(vcpu))
            }
            Asked::Unimplemented => {
                // The emulator has done nothing: the processor executes the instruction, where the emulator would have.
                let mut response = request.response();
                response.view(View::DEFAULT);
                response.fast_step(view);
                slot.fast = Some(Fast { view: View::DEFAULT, back: view });
                slot.stepping = false;
                self.send(&response).map(|()| None)
            }
            Asked::Unknown => {
                log::debug!("vCPU {vcpu} goes on after an event of kind {}", request.reason());
                let mut response = request.response();
                if slot.stepping {
                    response.flag(flag::TOGGLE_SINGLESTEP);
                    slot.stepping = false;
                }
                self.send(&response).map(|()| None)
            }
        }
    }

    /// Hands an event out. The view that it happened in may have been removed since: then it is told from where the vCPU was put.
    fn hand_out(&mut self, vcpu: VcpuId) -> Result<Option<VmiEvent>> {
        let told = self.vcpu(vcpu)?.held.as_ref().and_then(|held| held.event.view);
        let now = match told.filter(|view| !self.has_view(*view)) {
            Some(_) => {
                Some(View(self.xen.control().altp2m_vcpu_view(self.domain, vcpu.0.into()).map_err(|error| self.failed(&error))?))
            }
            None => told,
        };
        let held = self.vcpu_mut(vcpu)?.held.as_mut();
        Ok(held.map(|held| {
            held.event.view = now;
            held.is_out = true;
            held.event
        }))
    }

    pub(super) fn wait_for_event(&mut self, timeout: Duration) -> Result<Wait> {
        self.check_alive()?;
        if self.bell.take() {
            return Ok(Wait::Timeout);
        }
        let mut deadline = None;
        let mut has_slept = false;
        let told = self.let_run().map_err(|error| self.failed(&error)).and_then(|()| self.tell());
        if told.is_err() {
            // Most likely the domain is gone.
            self.look()?;
            told?;
        }
        loop {
            if let Some(vcpu) = self.ready.front().copied() {
                let event = self.hand_out(vcpu)?;
                self.ready.pop_front();
                if let Some(event) = event {
                    return Ok(Wait::Event(event));
                }
                continue;
            }
            match self.take_one()? {
                Taken::Answered => continue,
                Taken::Held(vcpu) => {
                    self.ready.push_back(vcpu);
                    continue;
                }
                Taken::Nothing => {}
            }
            self.check_alive()?;
            let is_still = |vcpu: &super::Vcpu| vcpu.held.is_some();
            if self.pauses > 0 || self.vcpus.iter().all(is_still) {
                self.look()?;
                return Ok(Wait::Idle);
            }
            let now = Instant::now();
            self.pages.age(now);
            let deadline = *deadline.get_or_insert(now + timeout);
            let is_due = self.shutdown.is_some() || now.saturating_duration_since(self.looked_at) >= LOOK;
            if is_due && !self.look()? {
                return Ok(Wait::Idle);
            }
            // Even without time the channel is looked at once.
            if has_slept && now >= deadline {
                return Ok(Wait::Timeout);
            }
            if self.sleep(deadline.saturating_duration_since(now).min(LOOK))? {
                return Ok(Wait::Timeout);
            }
            has_slept = true;
        }
    }

    /// Waits until Xen or the bell says something, or the time is over. Whether the bell did, or a signal came, which is to be looked at too.
    pub(super) fn sleep(&self, timeout: Duration) -> Result<bool> {
        let mut fds = descriptors(&self.events, &self.bell).map_err(|error| self.failed(&error))?;
        let timeout =
            Timespec { tv_sec: timeout.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: timeout.subsec_nanos().into() };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(true),
            Err(error) => {
                return Err(VmiError::Driver { op: "poll", errno: error.raw_os_error(), detail: error.to_string() });
            }
        }
        let [channel, bell] = &fds;
        if !bell.revents().is_empty() && self.bell.hear() {
            // What the channel says is left for the next wait.
            return Ok(true);
        }
        if channel.revents().intersects(PollFlags::ERR | PollFlags::NVAL | PollFlags::HUP) {
            return Err(VmiError::DomainGone { reason: "its event channel is closed".to_owned() });
        }
        if channel.revents().contains(PollFlags::IN) {
            let port = self.events.pending().map_err(|error| self.failed(&error))?;
            self.events.unmask(port).map_err(|error| self.failed(&error))?;
        }
        Ok(false)
    }

    /// Waits until no fast step is under way, as far as that can be seen: a vCPU that is in one is in the view of the step, and comes back
    /// within microseconds of running. Requests that arrive meanwhile are kept.
    pub(super) fn settle(&mut self) {
        const ROUNDS: u32 = 100;
        self.settle_emulations();
        if self.pauses > 0 || self.gone.get().is_some() {
            return;
        }
        for round in 0..ROUNDS {
            loop {
                match self.take_one() {
                    Ok(Taken::Held(vcpu)) => self.ready.push_back(vcpu),
                    Ok(Taken::Answered) => {}
                    Ok(Taken::Nothing) | Err(_) => break,
                }
            }
            let mut is_away = false;
            for index in 0..self.info.vcpus {
                let Some(vcpu) = self.vcpus.get_mut(usize::from(index)) else { continue };
                let Some(fast) = vcpu.fast.filter(|fast| vcpu.held.is_none() && fast.view != fast.back) else { continue };
                match self.xen.control().altp2m_vcpu_view(self.domain, index.into()) {
                    Ok(view) if view == fast.view.0 => is_away = true,
                    _ => vcpu.fast = None,
                }
            }
            if !is_away {
                return;
            }
            std::thread::sleep(Duration::from_micros(if round < 10 { 50 } else { 500 }));
        }
        log::debug!("a vCPU has not come back from its step");
    }
}

impl XenDriver {
    /// Waits until the emulator has executed what it was given. A page must not be shown anew before: on Xen 4.17 and 4.20 a vCPU was seen to
    /// execute the instruction itself then, and the emulator once more somewhere else.
    pub(super) fn settle_emulations(&mut self) {
        const ROUNDS: u32 = 400;
        for round in 0..ROUNDS {
            if self.pauses > 0 || self.gone.get().is_some() || self.vcpus.iter().all(|vcpu| vcpu.emulating.is_none()) {
                return;
            }
            loop {
                match self.take_one() {
                    Ok(Taken::Held(vcpu)) => self.ready.push_back(vcpu),
                    Ok(Taken::Answered) => {}
                    Ok(Taken::Nothing) | Err(_) => break,
                }
            }
            for index in 0..self.info.vcpus {
                let Some(slot) = self.vcpus.get_mut(usize::from(index)) else { continue };
                let Some(rip) = slot.emulating else { continue };
                // A vCPU that moved on has executed it.
                if self.xen.control().hvm_cpu(self.domain, index).map_or(true, |cpu| cpu.rip != rip) {
                    slot.emulating = None;
                }
            }
            if self.vcpus.iter().any(|vcpu| vcpu.emulating.is_some()) {
                // The vCPU gets the processor while this one sleeps.
                std::thread::sleep(Duration::from_micros(if round < 10 { 50 } else { 500 }));
            }
        }
        log::debug!("a vCPU has not executed its instruction yet");
    }
}

const fn event_is_step(event: &VmiEvent) -> bool {
    matches!(event.reason, EventReason::SingleStep { .. })
}
