//! What becomes of a vCPU once its event is answered.

use std::rc::Rc;

use crate::addr::{Gfn, PAGE_SIZE, VcpuId, View};
use crate::arch::amd64::vector;
use crate::error::{Result, VmiError};
use crate::event::{EventAction, VmiEventResponse};

use super::deliver;
use super::hooks::{fetch, translate};
use super::insn::{self, Insn};
use super::memory::Memory;
use super::run::{Machine, RDI, trap};
use super::sys::Access;
use super::vcpu::{Held, Step, Vcpu};

impl Machine {
    /// Answers the event that holds a vCPU.
    pub fn respond(&mut self, vcpu: VcpuId, response: &VmiEventResponse) -> Result<()> {
        let index = usize::from(vcpu.0);
        if let (EventAction::FastSingleStep { view }, None) = (response.action, &response.registers)
            && self.steps_over_breakpoint(index, view, response.view)
        {
            return Ok(());
        }
        let memory = Rc::clone(&self.memory);
        let held = self.vcpu(index)?.held;
        if held == Held::No {
            return Err(VmiError::NoPendingEvent { vcpu });
        }
        let step_view = match response.action {
            EventAction::FastSingleStep { view } | EventAction::SingleStep { view } => Some(view),
            _ => None,
        };
        for view in [response.view, step_view].into_iter().flatten() {
            if !memory.has_view(view) {
                return Err(VmiError::ViewNotFound { view });
            }
        }
        let fits = match response.action {
            EventAction::Reinject => matches!(held, Held::Breakpoint(_)),
            EventAction::Emulate => held == Held::Access,
            EventAction::Deny => matches!(held, Held::Access | Held::Write(_) | Held::Debug),
            EventAction::Continue | EventAction::FastSingleStep { .. } | EventAction::SingleStep { .. } => true,
        };
        if !fits {
            let reason = format!("{:?} does not answer this kind of event", response.action);
            return Err(VmiError::InvalidArgument { what: "response", reason });
        }
        let vcpu = if held == Held::Debug { self.vcpu_mut(index)? } else { self.integer_mut(index)? };
        // The instruction may store to a page its own view denies: one that is tapped, and overwrites itself, or one that was denied as
        // a read. That is a write, and told as one, unless it is the very store that is answered here.
        let told = if held == Held::Access && vcpu.denied_store { pages_of(vcpu, &memory) } else { [None; 2] };
        if let Some(gp) = &response.registers {
            vcpu.set_gp(gp);
        }
        if let Some(view) = response.view {
            vcpu.view = view;
        }
        vcpu.held = Held::No;
        let back = vcpu.view;
        let step = |view, report, discards| {
            let guard = (view != back).then_some(back);
            Some(Step { view, back, report, told, discards, guard })
        };
        // With another RIP it is another instruction, which is announced in its turn.
        let is_announced = matches!(held, Held::Write(_) | Held::Cpuid);
        let goes_on_there = response.action != EventAction::Deny && vcpu.announced == Some(vcpu.rip());
        let is_done = is_announced && goes_on_there;
        // A step on which it was announced goes on where it was.
        let mut pending = vcpu.step.take_if(|_| is_announced);
        if !is_done {
            vcpu.announced = None;
            if let (Some(pending), None) = (pending.take(), response.view) {
                vcpu.view = pending.back;
            }
        }
        if held == Held::Debug && goes_on_there {
            trap(vcpu, &memory);
        }
        let go_on =
            |view, report| pending.map_or_else(|| step(view, report, false), |pending| Some(Step { back, report, ..pending }));
        match response.action {
            EventAction::Continue => vcpu.step = pending.map(|pending| Step { back, ..pending }),
            EventAction::Reinject => {
                let Held::Breakpoint(len) = held else { return Ok(()) };
                let next = vcpu.rip().wrapping_add(len.into());
                deliver::software(vcpu, &memory, vector::BP, next);
            }
            EventAction::FastSingleStep { view } => vcpu.step = go_on(view, None),
            EventAction::SingleStep { view } => vcpu.step = go_on(view, Some(view)),
            EventAction::Emulate => vcpu.step = step(View::DEFAULT, None, false),
            EventAction::Deny => match held {
                Held::Write(len) => vcpu.set_rip(vcpu.rip().wrapping_add(len.into())),
                Held::Debug => {}
                _ => vcpu.step = step(View::DEFAULT, None, true),
            },
        }
        Ok(())
    }

    /// The usual answer to a breakpoint: gives it, if it is one and both views are there.
    fn steps_over_breakpoint(&mut self, index: usize, view: View, back: Option<View>) -> bool {
        let Some(vcpu) = self.vcpus.get_mut(index) else { return false };
        let back = back.unwrap_or(vcpu.view);
        if !matches!(vcpu.held, Held::Breakpoint(_)) || !self.memory.has_view(view) || !self.memory.has_view(back) {
            return false;
        }
        (vcpu.held, vcpu.announced, vcpu.view) = (Held::No, None, back);
        vcpu.step = Some(Step::over_breakpoint(view, back));
        true
    }

    /// Lets every vCPU that is held or steps go on in the default view, as if it had never been looked at.
    pub fn release_held(&mut self) -> Result<usize> {
        let mut held = 0;
        for index in 0..self.vcpus.len() {
            let vcpu = self.vcpu_mut(index)?;
            held += usize::from(std::mem::replace(&mut vcpu.held, Held::No) != Held::No);
            (vcpu.step, vcpu.announced) = (None, None);
            vcpu.view = View::DEFAULT;
        }
        Ok(held)
    }
}

/// The pages a denied store lies on: that it was told of, and the one beside it, if it crosses the border. Told of at the first byte
/// of a page, it may have begun on the page before.
fn pages_of(vcpu: &Vcpu, memory: &Memory) -> [Option<Gfn>; 2] {
    let Some((gfn, va, len)) = vcpu.denied_page else { return [None; 2] };
    let offset = va & (PAGE_SIZE - 1);
    let beside = if offset + u64::from(len) > PAGE_SIZE {
        Some(va.wrapping_add(len.into()))
    } else {
        (offset == 0 && !begins_with_page(vcpu, memory)).then_some(va.wrapping_sub(1))
    };
    let translated = beside.and_then(|at| {
        // Whether the access is allowed there is not the question: a read asks for the least.
        translate(memory, &vcpu.mode(View::DEFAULT), at, Access::Read, vcpu.cpl(), || vcpu.context.rflags()).ok()
    });
    [Some(gfn), translated.map(|page| Gfn(page.gfn))]
}

/// Whether the store is one of a repeated string instruction, and begins where a page does.
fn begins_with_page(vcpu: &Vcpu, memory: &Memory) -> bool {
    let mut bytes = [0; insn::MAX_LEN];
    vcpu.gpr(RDI) & (PAGE_SIZE - 1) == 0 && {
        let len = fetch(memory, &vcpu.mode(View::DEFAULT), vcpu.rip(), &mut bytes);
        insn::decode(bytes.get(..len).unwrap_or_default()) == Insn::RepString
    }
}
