//! Exceptions, interrupts and SYSCALL, delivered to the guest through its own tables: the engine delivers none.
//!
//! Sources: Intel SDM vol. 3, 7.12 to 7.14 (gates and stacks in 64-bit mode), table 7-4 (double faults); SYSCALL: vol. 2B.
//! Accesses the processor makes by itself here (IDT, GDT, TSS, the new stack) go to the default view and raise no events.

use crate::addr::{PAGE_SHIFT, PAGE_SIZE, View};
use crate::arch::amd64::{efer, rflags, vector};

use super::hooks::{Why, translate};
use super::layout::{CS, HF_ADDSEG, HF_CPL, HF_CS32, HF_CS64, HF_INHIBIT_IRQ, HF_LMA, HF_SS32, SS};
use super::memory::Memory;
use super::sys::{Access, reg};
use super::vcpu::{State, Vcpu};

/// Index of RSP, RCX and R11 among the general-purpose registers.
const RSP: u8 = 4;
const RCX: u8 = 1;
const R11: u8 = 11;

/// A fault, as the processor describes it to its handler.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    pub vector: u8,
    pub error_code: Option<u32>,
    pub cr2: Option<u64>,
}

impl Fault {
    pub const fn plain(vector: u8) -> Self {
        Self { vector, error_code: None, cr2: None }
    }

    pub const fn with_code(vector: u8, code: u32) -> Self {
        Self { vector, error_code: Some(code), cr2: None }
    }

    pub const fn page(code: u32, va: u64) -> Self {
        Self { vector: vector::PF, error_code: Some(code), cr2: Some(va) }
    }

    const fn is_contributory(&self) -> bool {
        matches!(self.vector, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Fault,
    /// INT n, INT3: the gate's privilege level is checked.
    Software,
    External,
}

/// Delivers a fault: the saved RIP is the instruction's own.
pub fn fault(vcpu: &mut Vcpu, memory: &Memory, fault: Fault) {
    let rip = vcpu.rip();
    settle(vcpu, memory, fault, rip, Source::Fault);
}

/// Delivers INT n or INT3; `next` is the address behind the instruction.
pub fn software(vcpu: &mut Vcpu, memory: &Memory, vector: u8, next: u64) {
    settle(vcpu, memory, Fault::plain(vector), next, Source::Software);
}

/// Delivers an external interrupt and ends a `hlt`.
pub fn external(vcpu: &mut Vcpu, memory: &Memory, vector: u8) {
    let rip = vcpu.rip();
    settle(vcpu, memory, Fault::plain(vector), rip, Source::External);
}

/// Tries, and goes on to the fault that trying caused, to the double fault and to shutdown.
fn settle(vcpu: &mut Vcpu, memory: &Memory, first: Fault, rip: u64, source: Source) {
    vcpu.context.set_u32(vcpu.layout.old_exception, u32::MAX);
    let (mut current, mut rip, mut source) = (first, rip, source);
    loop {
        if let Some(cr2) = current.cr2 {
            vcpu.set_cr2(cr2);
        }
        let Err(next) = enter(vcpu, memory, &current, rip, source) else {
            vcpu.state = State::Running;
            return;
        };
        if current.vector == vector::DF {
            vcpu.state = State::Shutdown;
            return;
        }
        let second_is_page = next.vector == vector::PF;
        let doubles = source == Source::Fault
            && ((current.is_contributory() && next.is_contributory())
                || (current.vector == vector::PF && (next.is_contributory() || second_is_page)));
        current = if doubles { Fault::with_code(vector::DF, 0) } else { next };
        // The instruction is to be tried again once its gate can be entered.
        rip = vcpu.rip();
        source = Source::Fault;
    }
}

fn copy(memory: &Memory, vcpu: &Vcpu, va: u64, buf: &mut [u8], write: bool) -> Result<(), Fault> {
    let mode = vcpu.mode(View::DEFAULT);
    let access = if write { Access::Write } else { Access::Read };
    let mut done = 0;
    while done < buf.len() {
        let at = va.wrapping_add(done as u64);
        let page = translate(memory, &mode, at, access, 0, || 0).map_err(|why| match why {
            Why::PageFault(code) => Fault::page(code, at),
            Why::NonCanonical | Why::View { .. } | Why::Code => Fault::with_code(vector::GP, 0),
        })?;
        let offset = at & (PAGE_SIZE - 1);
        let len = (PAGE_SIZE - offset).min((buf.len() - done) as u64) as usize;
        let pa = u64::from(page.frame) << PAGE_SHIFT | offset;
        let Some(part) = buf.get_mut(done..done + len) else { break };
        let copied = if write { memory.ram().write(pa, part) } else { memory.ram().read(pa, part) };
        if copied.is_none() {
            return Err(Fault::with_code(vector::GP, 0));
        }
        if write {
            memory.forget_code(pa, len as u64);
        }
        done += len;
    }
    Ok(())
}

fn read_u64(memory: &Memory, vcpu: &Vcpu, va: u64) -> Result<u64, Fault> {
    let mut word = [0; 8];
    copy(memory, vcpu, va, &mut word, false)?;
    Ok(u64::from_le_bytes(word))
}

/// Goes through the gate. On an error nothing of the vCPU has changed.
fn enter(vcpu: &mut Vcpu, memory: &Memory, what: &Fault, rip: u64, source: Source) -> Result<(), Fault> {
    let external = u32::from(source != Source::Software);
    let idtr = vcpu.idtr();
    let offset = u64::from(what.vector) * 16;
    let of_gate = (offset as u32 / 2) | 2 | external;
    let refuse = |vector: u8, code: u32| Err(Fault::with_code(vector, code));
    if offset + 15 > u64::from(idtr.limit) {
        return refuse(vector::GP, of_gate);
    }
    let low = read_u64(memory, vcpu, idtr.base.wrapping_add(offset))?;
    let high = read_u64(memory, vcpu, idtr.base.wrapping_add(offset + 8))?;
    let kind = low >> 40 & 0x1f;
    if kind != 0xe && kind != 0xf {
        return refuse(vector::GP, of_gate);
    }
    let cpl = vcpu.cpl();
    if source == Source::Software && ((low >> 45 & 3) as u8) < cpl {
        return refuse(vector::GP, of_gate);
    }
    if low >> 47 & 1 == 0 {
        return refuse(vector::NP, of_gate);
    }
    let handler = (low & 0xffff) | (low >> 32 & 0xffff_0000) | high << 32;
    let selector = (low >> 16) as u16;
    let of_selector = u32::from(selector & 0xfffc) | external;
    let gdtr = vcpu.gdtr();
    if selector & 0xfffc == 0 {
        return refuse(vector::GP, external);
    }
    if selector & 4 != 0 || u32::from(selector | 7) > gdtr.limit {
        return refuse(vector::GP, of_selector);
    }
    let descriptor = read_u64(memory, vcpu, gdtr.base.wrapping_add(u64::from(selector & 0xfff8)))?;
    let is_code = descriptor >> 43 & 3 == 3;
    let is_long = descriptor >> 53 & 3 == 1;
    let conforming = descriptor >> 42 & 1 != 0;
    let dpl = (descriptor >> 45 & 3) as u8;
    if !is_code || !is_long || dpl > cpl {
        return refuse(vector::GP, of_selector);
    }
    if descriptor >> 47 & 1 == 0 {
        return refuse(vector::NP, of_selector);
    }
    let new_cpl = if conforming { cpl } else { dpl };
    let tr = vcpu.tr();
    let ist = low >> 32 & 7;
    let in_tss = if ist != 0 {
        Some(0x24 + 8 * (ist - 1))
    } else if new_cpl < cpl {
        Some(4 + 8 * u64::from(new_cpl))
    } else {
        None
    };
    let old_rsp = vcpu.gpr(RSP);
    let stack = match in_tss {
        Some(at) if at + 7 > u64::from(tr.limit) => return refuse(vector::TS, u32::from(tr.selector & 0xfffc) | external),
        Some(at) => read_u64(memory, vcpu, tr.base.wrapping_add(at))?,
        None => old_rsp,
    } & !15;
    let flags = vcpu.context.rflags();
    let cs = vcpu.segment(CS).selector;
    let ss = vcpu.segment(SS).selector;
    let frame = [what.error_code.map_or(0, u64::from), rip, cs.into(), flags, old_rsp, ss.into()];
    let mut bytes = [0; 48];
    for (place, word) in bytes.chunks_exact_mut(8).zip(frame) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    let pushed = if what.error_code.is_some() { &mut bytes[..] } else { bytes.get_mut(8..).unwrap_or_default() };
    let rsp = stack.wrapping_sub(pushed.len() as u64);
    copy(memory, vcpu, rsp, pushed, true)?;

    load_cs(vcpu, selector & 0xfffc | u16::from(new_cpl), (descriptor >> 32) as u32, new_cpl);
    if new_cpl != cpl {
        vcpu.set_segment(SS, new_cpl.into(), 0, 0, u32::from(new_cpl) << 13);
    }
    let mut cleared = rflags::TF | rflags::NT | rflags::RF;
    if kind == 0xe {
        cleared |= rflags::IF;
    }
    vcpu.context.write_register(reg::EFLAGS, flags & !cleared);
    vcpu.set_gpr(RSP, rsp);
    vcpu.set_rip(handler);
    Ok(())
}

/// A flat 64-bit code segment, and the privilege level that comes with it.
fn load_cs(vcpu: &mut Vcpu, selector: u16, flags: u32, cpl: u8) {
    vcpu.set_segment(CS, selector, 0, u32::MAX, flags);
    let kept = vcpu.hflags() & !(HF_CPL | HF_ADDSEG | HF_INHIBIT_IRQ);
    vcpu.set_hflags(kept | u32::from(cpl) | HF_LMA | HF_CS64 | HF_CS32 | HF_SS32);
}

/// Carries out SYSCALL of `len` bytes at RIP.
pub fn syscall(vcpu: &mut Vcpu, memory: &Memory, len: u8) {
    if vcpu.efer() & efer::SCE == 0 {
        return fault(vcpu, memory, Fault::plain(vector::UD));
    }
    let flags = vcpu.context.rflags();
    let layout = vcpu.layout;
    let selector = (vcpu.context.u64(layout.star) >> 32) as u16 & 0xfffc;
    vcpu.set_gpr(RCX, vcpu.rip().wrapping_add(len.into()));
    vcpu.set_gpr(R11, flags);
    load_cs(vcpu, selector, 0x00af_9b00, 0);
    vcpu.set_segment(SS, selector.wrapping_add(8), 0, u32::MAX, 0x00cf_9300);
    let mask = vcpu.context.u64(layout.sfmask);
    vcpu.context.write_register(reg::EFLAGS, flags & !mask & !rflags::RF);
    vcpu.set_rip(vcpu.context.u64(layout.lstar));
}
