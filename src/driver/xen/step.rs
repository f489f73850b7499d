//! How an answer is carried out: the cheapest way that is right for the instruction, out of what Xen has.
//!
//! | action | instruction | way | VM exits | messages |
//! |---|---|---|---|---|
//! | step over INT3 | known to the emulator | EMULATE with the original bytes (SET_EMUL_INSN_DATA) | 1 | 1 |
//! | step over INT3, over an access | any other | FAST_SINGLESTEP in the default view | 2 | 1 |
//! | serve a read, step over an access | known to the emulator | EMULATE: Xen's emulator reads the default view | 1 | 1 |
//! | step and report; step a repeated instruction | any | TOGGLE_SINGLESTEP | 3 | 2 |
//!
//! A toggled step costs a third exit: Xen sets the trap flag once more before it notices that the vCPU is held (`vmx_intr_assist`). Of a repeated
//! instruction each round costs so much.
//!
//! Sources: arch/x86/vm_event.c, arch/x86/hvm/vm_event.c and `hvm_emulate_one_vm_event` in arch/x86/hvm/emulate.c. An instruction that the emulator
//! turns out not to know comes back as EMUL_UNIMPLEMENTED and is stepped (`run.rs`).

use xen_sys::types::{event_type, flag};

use super::XenDriver;
use super::codec::{Request, Response, with_cpuid_results};
use super::insn::{self, Insn, Store};
use super::run::{Held, Vcpu};
use crate::addr::{Gfn, MemoryAccess, Pa, Va, VcpuId, View};
use crate::arch::amd64::{GpRegisters, Registers, vector, walk};
use crate::error::{Result, VmiError};
use crate::event::{EventAction, EventReason, VmiEvent, VmiEventResponse};

/// Pages of one store that are looked at, at most.
const MAX_PAGES: u64 = 16;
/// Fills the place of instruction bytes behind the instruction.
const NOP: u8 = 0x90;
/// XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_OFF.
pub(super) const STEP_OFF: u32 = 0;

/// Which ways of stepping are used. For tests, and for whoever suspects one of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Stepping {
    /// The cheapest right one.
    #[default]
    Auto,
    /// Not the emulator.
    Fast,
    /// Neither the emulator nor fast steps.
    Toggle,
}

impl Stepping {
    /// From its name; `None` for any other.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "" | "auto" => Some(Self::Auto),
            "fast" => Some(Self::Fast),
            "toggle" => Some(Self::Toggle),
            _ => None,
        }
    }
}

/// A fast step that was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fast {
    pub view: View,
    pub back: View,
}

/// Steps that nobody is told of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rounds {
    /// They go on while RIP is this.
    pub rip: Option<u64>,
    pub view: View,
    pub back: View,
    /// The last one is told.
    pub report: bool,
}

impl Vcpu {
    /// A single-step is done. The answer to it, unless somebody is to be told.
    pub fn step_done(&mut self, request: &Request, event: &VmiEvent) -> Option<Response> {
        let mut response = request.response();
        let Some(rounds) = self.rounds else {
            if self.stepping {
                return None;
            }
            // Nobody asked for it: left over.
            response.flag(flag::TOGGLE_SINGLESTEP);
            return Some(response);
        };
        if rounds.rip == Some(event.registers.gp.rip) {
            response.view(rounds.view);
            return Some(response);
        }
        self.rounds = None;
        if rounds.report {
            return None;
        }
        response.flag(flag::TOGGLE_SINGLESTEP);
        response.view(rounds.back);
        self.stepping = false;
        Some(response)
    }
}

/// How one answer is to be carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Go,
    Fast(View),
    Toggle(Rounds),
    Emulate { discard: bool },
    Bytes([u8; 16]),
}

impl XenDriver {
    pub(super) fn answer(&mut self, vcpu: VcpuId, response: &VmiEventResponse) -> Result<()> {
        let held = self.vcpu(vcpu)?.held.filter(|held| held.is_out).ok_or(VmiError::NoPendingEvent { vcpu })?;
        self.check_alive()?;
        let step_view = match response.action {
            EventAction::FastSingleStep { view } | EventAction::SingleStep { view } => Some(view),
            EventAction::Emulate => Some(View::DEFAULT),
            _ => None,
        };
        for view in [response.view, step_view].into_iter().flatten() {
            self.check_view(view)?;
        }
        check_fit(&held.event, response.action)?;
        let back = response.view.unwrap_or_else(|| held.view());
        let gp = response.registers.or(held.gp);
        let action = match response.action {
            EventAction::SingleStep { view } if is_past(&held.event.reason) => return self.tell_step(vcpu, &held, view, gp),
            // What was announced is carried out whichever view the vCPU is in.
            EventAction::FastSingleStep { .. } if held.event.reason.is_announced() => EventAction::Continue,
            action => action,
        };
        let registers = Registers { gp: gp.unwrap_or(held.event.registers.gp), ..held.event.registers };
        let code = step_view.is_some().then(|| self.code_at(&held.event, &registers)).flatten();
        if let Some(view) = step_view
            && view != back
            && let Some((insn, _)) = &code
            && let Some((event, which)) = self.unseen_store(&held, &registers, insn, view, back)
        {
            self.tell_store(vcpu, &event, which, gp);
            return Ok(());
        }
        let in_fast_step = self.vcpu(vcpu)?.is_in_fast_step(held.event.view.unwrap_or_default());
        let way = self.way(&held, action, back, gp, code.as_ref(), in_fast_step)?;
        self.carry_out(vcpu, &held, action, way, back, gp, in_fast_step)
    }

    /// Decides.
    fn way(
        &self,
        held: &Held,
        action: EventAction,
        back: View,
        gp: Option<GpRegisters>,
        code: Option<&(Insn, [u8; 16])>,
        in_fast_step: bool,
    ) -> Result<Way> {
        let insn = code.map(|(insn, _)| insn);
        let repeats = insn.is_some_and(|insn| insn.repeats);
        let rip = gp.map_or(held.event.registers.gp.rip, |gp| gp.rip);
        // An instruction is emulated in one piece; an emulation cannot end a fast step that is under way (they share a union).
        let emulates = insn.is_some_and(|insn| insn.emulates) && !in_fast_step && self.caps_emulate() && self.pauses == 0;
        let is_access = matches!(held.event.reason, EventReason::MemoryAccess { .. });
        let is_moved_on = rip != held.event.registers.gp.rip;
        Ok(match action {
            EventAction::Deny if is_access => {
                let known = insn.copied().or_else(|| self.code_at(&held.event, &held.event.registers).map(|(insn, _)| insn));
                if held.request.is_page_walk() || !known.is_some_and(|insn| insn.emulates) {
                    return Err(VmiError::NotSupported {
                        driver: "xen",
                        capability: "throwing away what this instruction writes",
                    });
                }
                Way::Emulate { discard: true }
            }
            // Told instead of executed; the emulator executes it, wherever the vCPU is.
            EventAction::Continue
                if matches!(held.event.reason, EventReason::DescriptorAccess { .. } | EventReason::PortIo { .. })
                    && !is_moved_on =>
            {
                Way::Emulate { discard: false }
            }
            EventAction::Continue | EventAction::Reinject | EventAction::Deny => Way::Go,
            EventAction::SingleStep { view } => Way::Toggle(Rounds { rip: repeats.then_some(rip), view, back, report: true }),
            // In the vCPU's own view a step is no different from going on.
            EventAction::FastSingleStep { view } if view == back => Way::Go,
            // Nor is it where the breakpoint was taken out while its event was on the way.
            EventAction::FastSingleStep { view: View::DEFAULT } if self.is_plain_code(held, back, code) => Way::Go,
            EventAction::FastSingleStep { .. } | EventAction::Emulate => {
                let view = if let EventAction::FastSingleStep { view } = action { view } else { View::DEFAULT };
                let is_clean = view == View::DEFAULT && !held.request.is_page_walk();
                if is_clean && emulates && is_access && !is_moved_on {
                    Way::Emulate { discard: false }
                } else if repeats || self.stepping == Stepping::Toggle {
                    Way::Toggle(Rounds { rip: repeats.then_some(rip), view, back, report: false })
                } else if let (true, true, None, Some((_, bytes))) = (is_clean, emulates, gp, code) {
                    Way::Bytes(*bytes)
                } else {
                    Way::Fast(view)
                }
            }
        })
    }

    /// Whether the INT3 of the event is not there any more in `view`: the page is the guest's own, and its byte is another one.
    fn is_plain_code(&self, held: &Held, view: View, code: Option<&(Insn, [u8; 16])>) -> bool {
        const INT3: u8 = 0xcc;
        let EventReason::Breakpoint { gfn, .. } = held.event.reason else { return false };
        let shows_own = self.views.get(&view.0).is_some_and(|book| book.shows_own_code(gfn));
        shows_own && code.is_some_and(|(_, bytes)| !bytes.starts_with(&[INT3]))
    }

    fn caps_emulate(&self) -> bool {
        self.stepping == Stepping::Auto && self.knows(xen_sys::types::monitor_event::EMUL_UNIMPLEMENTED)
    }

    /// Makes the answer and sends it. What can fail comes before the ring.
    #[expect(clippy::too_many_arguments, reason = "all of what was decided about one answer")]
    fn carry_out(
        &mut self,
        vcpu: VcpuId,
        held: &Held,
        action: EventAction,
        way: Way,
        back: View,
        gp: Option<GpRegisters>,
        in_fast_step: bool,
    ) -> Result<()> {
        let at = held.event.registers.gp;
        let mut answer = held.request.response();
        let mut gp = gp;
        match (action, held.event.reason) {
            (EventAction::Reinject, _) => {
                let (len, kind) = held.request.breakpoint();
                let kind = if kind == 0 { event_type::SW_EXC } else { kind };
                self.inject_event(vcpu, 3, kind, xen_sys::types::NO_ERROR_CODE, len, 0)?;
            }
            (action, EventReason::DebugException { pending })
                if action != EventAction::Deny && gp.is_none_or(|gp| gp.rip == at.rip) =>
            {
                self.inject_event(vcpu, vector::DB, event_type::HW_EXC, xen_sys::types::NO_ERROR_CODE, 0, pending)?;
            }
            (_, EventReason::Cpuid { .. }) => gp = Some(self.behind(vcpu, held, gp)?),
            (action, EventReason::WriteControlRegister { .. } | EventReason::WriteMsr { .. } | EventReason::GuestRequest) => {
                if action == EventAction::Deny || gp.is_some_and(|gp| gp.rip != at.rip) {
                    answer.flag(flag::DENY);
                }
                if gp.is_some() {
                    gp = Some(self.behind(vcpu, held, gp)?);
                }
            }
            _ => {}
        }
        if let Some(gp) = &gp {
            answer.registers(&held.request, gp);
        }
        let domain = self.domain;
        let slot_stepping = self.vcpu(vcpu)?.stepping;
        // What is denied is said in the part of the answer that has the view after a fast step.
        let is_denied = answer.flags() & flag::DENY != 0;
        if in_fast_step && (is_denied || matches!(way, Way::Toggle(_) | Way::Emulate { .. })) {
            // Ends the fast step: another kind of step would be taken for its end.
            self.xen.control().debug_control(domain, STEP_OFF, vcpu.0.into()).map_err(|error| self.failed(&error))?;
        }
        let was_stepping = slot_stepping && !in_fast_step;
        let (mut stepping, mut fast, mut rounds) = (false, None, None);
        match way {
            Way::Fast(view) => {
                answer.view(view);
                answer.fast_step(back);
                fast = Some(Fast { view, back });
            }
            Way::Toggle(asked) => {
                if !was_stepping {
                    answer.flag(flag::TOGGLE_SINGLESTEP);
                }
                answer.view(asked.view);
                if is_emulated(&held.event.reason) && gp.is_none_or(|gp| gp.rip == at.rip) {
                    answer.flag(flag::EMULATE);
                    answer.emulate_any();
                }
                stepping = true;
                rounds = Some(asked);
            }
            Way::Go | Way::Emulate { .. } | Way::Bytes(_) => {
                answer.view(back);
                if in_fast_step && way == Way::Go && !is_denied {
                    // The step that is under way cannot be called off; it ends after one instruction in the vCPU's own view.
                    answer.fast_step(back);
                    fast = Some(Fast { view: back, back });
                } else if was_stepping {
                    answer.flag(flag::TOGGLE_SINGLESTEP);
                }
                match way {
                    Way::Bytes(bytes) => answer.instruction(&bytes),
                    Way::Emulate { discard } => {
                        answer.flag(if discard { flag::EMULATE | flag::EMULATE_NOWRITE } else { flag::EMULATE });
                        if let EventReason::MemoryAccess { pa, access, .. } = held.event.reason {
                            answer.access(pa.gfn(), access);
                        } else {
                            answer.emulate_any();
                        }
                    }
                    _ => {}
                }
            }
        }
        self.send(&answer)?;
        let slot = self.vcpu_mut(vcpu)?;
        slot.held = None;
        let rip = gp.map_or(held.event.registers.gp.rip, |gp| gp.rip);
        slot.emulating = matches!(way, Way::Bytes(_) | Way::Emulate { discard: true }).then_some(rip);
        slot.stepping = stepping;
        slot.fast = fast;
        slot.rounds = rounds;
        Ok(())
    }

    /// The physical address of a virtual one, by the event's page tables and the default view.
    fn translate(&self, va: u64, registers: &Registers) -> Option<Pa> {
        let read = |entry: Pa| {
            let mut bytes = [0; 8];
            self.check_range(entry, 8).ok()?;
            self.pages.read(entry, &mut bytes).ok()?;
            Some(u64::from_le_bytes(bytes))
        };
        walk(registers.root(), Va(va), registers.paging_levels(), true, read).ok().map(|walk| walk.pa)
    }

    /// The instruction at RIP as the default view has it, and sixteen bytes that begin with it.
    fn code_at(&self, event: &VmiEvent, registers: &Registers) -> Option<(Insn, [u8; 16])> {
        let rip = registers.gp.rip;
        let first = match event.reason {
            EventReason::Breakpoint { gfn, .. } if rip == event.registers.gp.rip => gfn.pa(rip),
            _ => self.translate(rip, registers)?,
        };
        let mut bytes = [NOP; 16];
        let here = (first.page_rest() as usize).min(insn::MAX_LEN);
        self.pages.read(first, bytes.get_mut(..here)?).ok()?;
        let mut insn = insn::look(bytes.get(..here)?, registers);
        if insn.is_none() && here < insn::MAX_LEN {
            let next = self.translate(rip.wrapping_add(here as u64), registers)?;
            self.pages.read(next, bytes.get_mut(here..insn::MAX_LEN)?).ok()?;
            insn = insn::look(bytes.get(..insn::MAX_LEN)?, registers);
        }
        let insn = insn?;
        bytes.get_mut(insn.len.into()..)?.fill(NOP);
        Some((insn, bytes))
    }

    /// A store of the instruction that only the vCPU's own view denies: executed in `view` it would overwrite what is tapped, unseen.
    /// And which one it is: those before it were told.
    fn unseen_store(
        &self,
        held: &Held,
        registers: &Registers,
        insn: &Insn,
        view: View,
        back: View,
    ) -> Option<(VmiEvent, (usize, u64))> {
        let own = self.views.get(&back.0).filter(|book| book.denies_writes())?;
        let answered = [held.xens_own, stored_to(&held.event)];
        for (number, (first, len)) in insn.stores.iter().copied().enumerate().filter(|(_, (_, len))| *len > 0) {
            let last = first.wrapping_add(len - 1);
            // What is carried out at once is told at once.
            let once = insn.at_once((first, len));
            let is_answered = |gfn: Gfn, page: Va| {
                let is_this = |(pa, va): (Pa, Option<Va>)| {
                    pa.gfn() == gfn || va.zip(once).is_some_and(|(va, once)| reaches(once, va) && reaches(once, page))
                };
                answered.iter().flatten().copied().any(is_this)
            };
            let pages = (last >> 12).wrapping_sub(first >> 12).saturating_add(1).min(MAX_PAGES);
            for index in 0..pages {
                if held.told.is_some_and(|told| (number, index) <= told) {
                    continue;
                }
                let va = if index == 0 { first } else { ((first >> 12).wrapping_add(index)) << 12 };
                // What is not mapped is not written either.
                let Some(pa) = self.translate(va, registers) else { continue };
                if is_answered(pa.gfn(), Va(va)) || !own.denies_write(pa.gfn()) {
                    continue;
                }
                if self.views.get(&view.0).is_some_and(|book| book.denies_write(pa.gfn())) {
                    // The view of the step denies it too, and Xen will say so.
                    continue;
                }
                let rest = last.wrapping_sub(va).saturating_add(1).min(if insn.repeats { pa.page_rest() } else { u64::MAX });
                let reason = EventReason::MemoryAccess {
                    pa,
                    va: Some(Va(va)),
                    access: MemoryAccess::W,
                    len: if insn.is_vague { 0 } else { u16::try_from(rest).unwrap_or(0) },
                };
                let event = VmiEvent { vcpu: held.event.vcpu, view: Some(back), registers: *registers, reason };
                return Some((event, (number, index)));
            }
        }
        None
    }

    /// An event as Xen tells it, with what its instruction says of the store: how long it is, and where it begins, if that is denied too.
    pub(super) fn with_store(&self, event: &VmiEvent) -> VmiEvent {
        let EventReason::MemoryAccess { pa, va: Some(va), access, len: 0 } = event.reason else { return *event };
        if !access.contains(MemoryAccess::W) || access.contains(MemoryAccess::X) {
            return *event;
        }
        let Some((insn, _)) = self.code_at(event, &event.registers) else { return *event };
        let holds = |(first, len): &Store| va.0.wrapping_sub(*first) < *len;
        let Some((first, len)) = insn.stores.iter().filter_map(|store| insn.at_once(*store)).find(holds) else { return *event };
        let begin = self.translate(first, &event.registers).filter(|begin| {
            let own = event.view.and_then(|view| self.views.get(&view.0));
            !insn.repeats && begin.gfn() != pa.gfn() && own.is_some_and(|book| book.denies_write(begin.gfn()))
        });
        let (pa, va, len) = begin.map_or((pa, va, len - va.0.wrapping_sub(first)), |begin| (begin, Va(first), len));
        let len = u16::try_from(len).unwrap_or(0);
        VmiEvent { reason: EventReason::MemoryAccess { pa, va: Some(va), access, len }, ..*event }
    }

    /// The registers behind an instruction that Xen is past, unless somebody had the vCPU go on elsewhere: then it is not executed.
    pub(super) fn behind(&self, vcpu: VcpuId, held: &Held, gp: Option<GpRegisters>) -> Result<GpRegisters> {
        let at = held.event.registers.gp;
        let own = gp.unwrap_or(at);
        match held.event.reason {
            _ if own.rip != at.rip => Ok(own),
            EventReason::Cpuid { insn_len, .. } => {
                Ok(GpRegisters { rip: at.rip.wrapping_add(insn_len.into()), ..with_cpuid_results(&held.request, &own) })
            }
            // Where Xen has the vCPU by now.
            _ => Ok(GpRegisters { rip: self.context_registers(vcpu)?.gp.rip, ..own }),
        }
    }

    /// The instruction that was announced counts as stepped: the vCPU is held on, and what is told of it next is the end of the step.
    fn tell_step(&mut self, vcpu: VcpuId, held: &Held, view: View, gp: Option<GpRegisters>) -> Result<()> {
        let gp = self.behind(vcpu, held, gp)?;
        if self.vcpu(vcpu)?.is_in_fast_step(held.event.view.unwrap_or_default()) {
            self.xen.control().debug_control(self.domain, STEP_OFF, vcpu.0.into()).map_err(|error| self.failed(&error))?;
            self.vcpu_mut(vcpu)?.fast = None;
        }
        let registers = Registers { gp, ..held.event.registers };
        let gfn = self.translate(gp.rip, &registers).map(Pa::gfn);
        let reason = EventReason::SingleStep { gfn };
        let slot = self.vcpu_mut(vcpu)?;
        slot.held = Some(Held {
            event: VmiEvent { view: Some(view), registers, reason, ..held.event },
            gp: Some(gp),
            moved: None,
            is_out: false,
            ..*held
        });
        self.ready.push_back(vcpu);
        Ok(())
    }

    /// The vCPU stays held, now for a store.
    fn tell_store(&mut self, vcpu: VcpuId, event: &VmiEvent, which: (usize, u64), gp: Option<GpRegisters>) {
        let Some(slot) = self.vcpus.get_mut(usize::from(vcpu.0)) else { return };
        let Some(held) = &mut slot.held else { return };
        if held.told.replace(which).is_none() {
            held.xens_own = stored_to(&held.event);
        }
        held.event = *event;
        held.gp = gp;
        held.moved = None;
        held.is_out = false;
        self.ready.push_back(vcpu);
    }
}

/// Where a denied store is.
fn stored_to(event: &VmiEvent) -> Option<(Pa, Option<Va>)> {
    match event.reason {
        EventReason::MemoryAccess { pa, va, access, .. } if access.contains(MemoryAccess::W) => Some((pa, va)),
        _ => None,
    }
}

/// Xen is past the instruction when it tells of it.
const fn is_past(reason: &EventReason) -> bool {
    matches!(
        reason,
        EventReason::WriteControlRegister { .. }
            | EventReason::WriteMsr { .. }
            | EventReason::Cpuid { .. }
            | EventReason::GuestRequest
    )
}

/// Xen tells of the instruction instead of executing it: its emulator does.
const fn is_emulated(reason: &EventReason) -> bool {
    matches!(reason, EventReason::DescriptorAccess { .. } | EventReason::PortIo { .. })
}

/// Whether a store reaches into the page of an address.
const fn reaches((first, len): Store, va: Va) -> bool {
    let from = first >> 12;
    (va.0 >> 12).wrapping_sub(from) <= (first.wrapping_add(len.saturating_sub(1)) >> 12).wrapping_sub(from)
}

/// An error unless the action is one for this kind of event.
fn check_fit(event: &VmiEvent, action: EventAction) -> Result<()> {
    let fits = match action {
        EventAction::Reinject => matches!(event.reason, EventReason::Breakpoint { .. }),
        EventAction::Emulate => matches!(event.reason, EventReason::MemoryAccess { .. }),
        // Xen's emulator leaves out what is stored, and not what is loaded, nor what goes to a port; a request is done already, and CPUID too.
        EventAction::Deny => !matches!(
            event.reason,
            EventReason::Breakpoint { .. }
                | EventReason::SingleStep { .. }
                | EventReason::Cpuid { .. }
                | EventReason::DescriptorAccess { .. }
                | EventReason::PortIo { .. }
                | EventReason::GuestRequest
        ),
        EventAction::Continue | EventAction::FastSingleStep { .. } | EventAction::SingleStep { .. } => true,
    };
    if fits {
        return Ok(());
    }
    Err(VmiError::InvalidArgument { what: "response", reason: format!("{action:?} does not answer this kind of event") })
}
