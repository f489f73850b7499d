//! Stepping: one instruction in a given view, by the driver itself where that is simple, or else by the stepper.

use crate::addr::{Gfn, PAGE_SHIFT, PAGE_SIZE, View};
use crate::arch::amd64::rflags;
use crate::error::Result;
use crate::event::EventReason;

use super::direct::{self, Op};
use super::hooks::{Denied, Exit, fetch, translate};
use super::insn::{self, Insn};
use super::layout::{HF_CS64, HF_INHIBIT_IRQ};
use super::memory::Which;
use super::run::{DEAR, Machine, RCX, RDI, RSP, Raised, STRING_BURST, Went};
use super::sys::{Access, code};
use super::vcpu::{Guard, Held, Mode, State, Step};

/// A page that was pushed to, and what its translation was for: it holds as long as an entry of the main engine's TLB would, which is filled
/// for one vCPU in one mode until it is emptied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stack {
    view: View,
    cpl: u8,
    /// RFLAGS.AC, which counts under SMAP.
    alternate: bool,
    page: u64,
    emptied: u64,
}

impl Machine {
    /// A step in the vCPU's own view that nobody asked for.
    pub(super) fn in_place(&self, index: usize) -> Result<Step> {
        let view = self.vcpu(index)?.view;
        Ok(Step { view, back: view, report: None, told: [None; 2], discards: false, guard: None })
    }

    /// Carries out one instruction in the view of `step`; what is left to do stays in the vCPU.
    pub(super) fn step(&mut self, index: usize, step: Step) -> Result<Option<Raised>> {
        if self.step_directly(index, &step) {
            self.steps.direct += 1;
            return self.finish(index, step);
        }
        if step.discards { self.step_discarding(index, step) } else { self.step_once(index, step) }
    }

    /// The same with stores to the pages of `step` thrown away. Apart: it needs room for a page, which every step would have to make sure of.
    #[inline(never)]
    fn step_discarding(&mut self, index: usize, step: Step) -> Result<Option<Raised>> {
        let mut stand_ins = [None; 2];
        for ((slot, gfn), frame) in stand_ins.iter_mut().zip(step.told).zip(self.scratch) {
            let Some(gfn) = gfn else { continue };
            // Loads still see the page; stores go to the copy, which is dropped.
            let mut page = [0; PAGE_SIZE as usize];
            self.memory.read(gfn.pa(0), &mut page)?;
            self.memory.write(frame.pa(0), &page)?;
            *slot = Some((gfn, frame));
        }
        self.memory.mark_stale_in(Which::Stepper);
        self.stepper.hooks().discard.set(stand_ins);
        let event = self.step_once(index, step);
        self.stepper.hooks().discard.set([None; 2]);
        self.memory.mark_stale_in(Which::Stepper);
        event
    }

    /// Whether the main engine's TLB is filled for this vCPU in that mode, whatever its view, and still counts.
    fn is_filled_for(&self, index: usize, mode: &Mode) -> bool {
        !self.memory.is_stale(Which::Main)
            && self
                .filled_for
                .of(Which::Main)
                .is_some_and(|(filled_for, filled)| filled_for == index && Mode { view: mode.view, ..filled } == *mode)
    }

    /// The frame behind the page of `rip` in the view of a step, if it can be told without walking the page tables: the main
    /// engine's TLB, which counts, has the page.
    fn code_frame(&self, mode: &Mode, rip: u64, cpl: u8) -> Option<u32> {
        let (gfn, _) = self.main.hooks().fetched(rip, cpl)?;
        let (rights, frame) = self.memory.lookup(mode.view, gfn)?;
        (rights & 4 != 0).then_some(frame)
    }

    /// Carries out the instruction at RIP without an engine, if it is one of the few whose effect is simple and certain, and if
    /// nothing about it can fail. False: nothing was done.
    fn step_directly(&mut self, index: usize, step: &Step) -> bool {
        let Some(vcpu) = self.vcpus.get(index) else { return false };
        let special = vcpu.context.u64(vcpu.layout.eflags) & (rflags::TF | rflags::RF) != 0;
        if special || vcpu.hflags() & HF_CS64 == 0 || step.discards {
            return false;
        }
        let (mode, rip) = (vcpu.mode(step.view), vcpu.rip());
        let is_filled = self.is_filled_for(index, &mode);
        let known = if is_filled { self.code_frame(&mode, rip, vcpu.cpl()) } else { None };
        let frame = known.or_else(|| {
            let page = translate(&self.memory, &mode, rip, Access::Fetch, vcpu.cpl(), || vcpu.context.rflags());
            page.ok().map(|page| page.frame)
        });
        let Some(frame) = frame else { return false };
        let offset = rip & (PAGE_SIZE - 1);
        let (mut bytes, pa) = ([0; insn::MAX_LEN], u64::from(frame) << PAGE_SHIFT | offset);
        // Whole where there is room, which is one instruction and no call.
        let len = (PAGE_SIZE - offset).min(insn::MAX_LEN as u64) as usize;
        let read = if len == insn::MAX_LEN {
            self.memory.ram().read(pa, &mut bytes)
        } else {
            bytes.get_mut(..len).and_then(|part| self.memory.ram().read(pa, part))
        };
        let (Some(()), Some(bytes)) = (read, bytes.get(..len)) else { return false };
        // Where it is, and not moved: it has only just been written.
        let Some((op, len)) = &direct::decode(bytes) else { return false };
        if let Op::Push { from } = *op {
            let (rsp, value) = (vcpu.gpr(RSP).wrapping_sub(8), vcpu.gpr(from));
            let alternate = vcpu.context.u64(vcpu.layout.eflags) & rflags::AC != 0;
            let wanted = Stack {
                view: mode.view,
                cpl: vcpu.cpl(),
                alternate,
                page: rsp >> PAGE_SHIFT,
                emptied: self.main.hooks().emptied(),
            };
            let page = match &self.stack {
                Some((known, page)) if is_filled && *known == wanted => *page,
                _ => {
                    let flags = || vcpu.context.rflags();
                    let Ok(page) = translate(&self.memory, &mode, rsp, Access::Write, vcpu.cpl(), flags) else { return false };
                    self.stack = is_filled.then_some((wanted, page));
                    page
                }
            };
            let offset = rsp & (PAGE_SIZE - 1);
            let denies = |view| self.memory.lookup(view, page.gfn).is_none_or(|(rights, _)| rights & 2 == 0);
            if offset > PAGE_SIZE - 8
                || self.memory.is_code(page.frame)
                || (step.told == [None; 2] && step.guard.is_some_and(denies))
            {
                return false;
            }
            if self.memory.ram().write(u64::from(page.frame) << PAGE_SHIFT | offset, &value.to_le_bytes()).is_none() {
                return false;
            }
        }
        let Ok(vcpu) = self.core_mut(index) else { return false };
        direct::carry_out(op, vcpu, rip.wrapping_add((*len).into()));
        vcpu.set_hflags(vcpu.hflags() & !HF_INHIBIT_IRQ);
        true
    }

    fn step_once(&mut self, index: usize, step: Step) -> Result<Option<Raised>> {
        let memory = std::rc::Rc::clone(&self.memory);
        self.steps.engine += 1;
        self.slice = self.slice.saturating_sub(DEAR);
        let vcpu = self.vcpu(index)?;
        let (mode, rip, hflags) = (vcpu.mode(step.view), vcpu.rip(), vcpu.hflags());
        let mut bytes = [0; insn::MAX_LEN];
        let len = fetch(&memory, &mode, rip, &mut bytes);
        let insn = insn::decode(bytes.get(..len).unwrap_or_default());
        match insn {
            Insn::Int3(len) => {
                // As if the engine had run it: RIP behind the instruction.
                self.integer_mut(index)?.set_rip(rip.wrapping_add(len.into()));
                let event = self.guest_breakpoint(index, Which::Stepper, Some(step))?;
                return if event.is_some() { Ok(event) } else { self.finish(index, step) };
            }
            Insn::System(system, len) => match self.system(index, system, len, step.view)? {
                Went::Event(event) => return Ok(Some(event)),
                Went::Done => return self.finish(index, step),
                Went::Native => {}
            },
            _ => {}
        }
        // Nothing else than a string instruction goes on to store elsewhere.
        let guards = step.told == [None; 2] || insn == Insn::RepString;
        let guard = step.guard.filter(|_| guards).map(|view| Guard { view, told: step.told });
        if self.stepper.hooks().guard.replace(guard) != guard {
            self.memory.mark_stale_in(Which::Stepper);
        }
        let integer = insn == Insn::Integer;
        if !integer {
            self.unload(index);
        }
        let mut left = STRING_BURST;
        let mut attempts = 1;
        loop {
            self.prepare(Which::Stepper, index, mode);
            let Ok(vcpu) = self.integer_mut(index) else { return Ok(None) };
            // With interrupts inhibited the engine translates this one instruction and nothing ahead of it.
            vcpu.set_hflags(hflags | HF_INHIBIT_IRQ);
            let before = [vcpu.gpr(RCX), vcpu.gpr(RSP), vcpu.gpr(RDI)];
            let ended = self.run_stepper(index, rip, attempts, insn);
            let (mut exit, mut ended) = (self.stepper.hooks().exit.get(), ended);
            let stored_to_code = self.stepper.hooks().stored_to_code.get();
            let vcpu = self.integer_mut(index)?;
            // The engine fetches ahead: the instruction is done, and this is about the next one, whose time is not now.
            let is_next = matches!(exit, Exit::Retry | Exit::Denied(Denied { access: Access::Fetch, .. }));
            if is_next && vcpu.rip() != rip {
                (exit, ended) = (Exit::None, code::OK);
            }
            if exit == Exit::Retry {
                vcpu.set_hflags(hflags);
                continue;
            }
            if exit != Exit::None || ended != code::OK {
                if integer {
                    self.fetch_fault(index);
                }
                let vcpu = self.integer_mut(index)?;
                vcpu.set_hflags(vcpu.hflags() & !HF_INHIBIT_IRQ | hflags & HF_INHIBIT_IRQ);
                let event = self.after(index, Which::Stepper, exit, ended, Some(step))?;
                return if event.is_some() { Ok(event) } else { self.finish(index, step) };
            }
            // An instruction that overwrites itself is begun anew by the engine, which counts it twice: so allow it two.
            let is_back = vcpu.rip() == rip && before == [vcpu.gpr(RCX), vcpu.gpr(RSP), vcpu.gpr(RDI)];
            if is_back && attempts == 1 && stored_to_code {
                vcpu.set_hflags(hflags);
                attempts = 2;
                continue;
            }
            attempts = 1;
            match insn {
                Insn::Halt => vcpu.state = State::Halted,
                Insn::InhibitsInterrupts => vcpu.set_hflags(vcpu.hflags() | HF_INHIBIT_IRQ),
                Insn::RepString if vcpu.rip() == rip => {
                    left -= 1;
                    if left > 0 {
                        continue;
                    }
                    // Not at its end yet: the clock must be looked at, then it goes on here.
                    vcpu.step = Some(step);
                    return Ok(None);
                }
                Insn::System(system, _) => self.after_system(index, system)?,
                _ => {}
            }
            return self.finish(index, step);
        }
    }

    /// One run of the stepper. Of an instruction that has to do with integer state alone, no more is copied.
    fn run_stepper(&mut self, index: usize, rip: u64, count: usize, insn: Insn) -> i32 {
        let Some(vcpu) = self.vcpus.get_mut(index) else { return code::OK };
        self.stepper.hooks().begin();
        vcpu.place_flags(false);
        let (integer, wide) = (insn == Insn::Integer, insn == Insn::WideStore);
        if integer {
            let part = vcpu.layout.copied.integer;
            self.stepper.restore_part(&mut vcpu.context, part);
            let ended = self.stepper.run(rip, count);
            if !self.stepper.hooks().take_back(wide) {
                self.stepper.save_part(&mut vcpu.context, part);
            }
            return ended;
        }
        self.stepper.restore(&vcpu.context);
        let ended = self.stepper.run(rip, count);
        if !self.stepper.hooks().take_back(wide) {
            self.stepper.save(&mut vcpu.context);
        }
        ended
    }

    /// Takes over what describes a fault, which lies behind the integer state, from the stepper.
    fn fetch_fault(&mut self, index: usize) {
        self.unload(index);
        self.stepper.save(&mut self.aside);
        if let Some(vcpu) = self.vcpus.get_mut(index) {
            for at in [vcpu.layout.error_code, vcpu.layout.exception_is_int] {
                vcpu.context.set_u32(at, self.aside.u32(at));
            }
        }
    }

    pub(super) fn finish(&mut self, index: usize, step: Step) -> Result<Option<Raised>> {
        let Some(vcpu) = self.vcpus.get_mut(index) else { return Err(self.no_vcpu(index)) };
        vcpu.step = None;
        vcpu.announced = None;
        let Some(view) = step.report else {
            vcpu.view = step.back;
            return Ok(None);
        };
        let mode = vcpu.mode(view);
        let next = translate(&self.memory, &mode, vcpu.rip(), Access::Fetch, vcpu.cpl(), || 0).ok();
        let gfn = next.map(|page| Gfn(page.gfn));
        Ok(Some(self.raise(index, view, EventReason::SingleStep { gfn }, Held::Stepped)?))
    }
}
