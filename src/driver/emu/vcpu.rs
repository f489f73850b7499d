//! One vCPU: its registers in a saved context, its APIC, and what it is waiting for.

use crate::addr::{Gfn, View};
use crate::arch::amd64::{DescriptorTable, GpRegisters, Injection, Register, Registers, Segment, pte, rflags};
use crate::driver::TrapRegisters;

use super::apic::Apic;
use super::layout::{CS, GDTR, HF_CPL, HF_INHIBIT_IRQ, IDTR, Layout, SEGMENT, SS, TR};
use super::sys::{Context, reg};

/// What the fills of an engine need to know of the vCPU in it. Every instruction that changes one of these is seen by the driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Mode {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub view: View,
}

/// A step that was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// The view for the one instruction.
    pub view: View,
    /// The view to be in afterwards.
    pub back: View,
    /// A single-step event follows, in this view.
    pub report: Option<View>,
    /// Pages that the store which is answered reaches: of these no more is told.
    pub told: [Option<Gfn>; 2],
    /// Stores to the pages of `told` are to have no effect.
    pub discards: bool,
    /// The vCPU's own view, where a store that it denies is an access like any other although another view is in use.
    pub guard: Option<View>,
}

impl Step {
    /// The instruction under a breakpoint of the view `back`, in `view`.
    pub fn over_breakpoint(view: View, back: View) -> Self {
        Self { view, back, report: None, told: [None; 2], discards: false, guard: (view != back).then_some(back) }
    }
}

/// A view whose denial of stores holds although another view is in use, but on some pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Guard {
    pub view: View,
    pub told: [Option<Gfn>; 2],
}

/// What a vCPU does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    Running,
    /// In `hlt`, until an interrupt.
    Halted,
    /// After a triple fault: for good.
    Shutdown,
}

/// An event that was raised and what going on from it means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Held {
    No,
    /// An INT3 of this length at RIP.
    Breakpoint(u8),
    /// A denied access.
    Access,
    Stepped,
    /// A register write of this length, announced and not done.
    Write(u8),
    /// A CPUID, announced and not done.
    Cpuid,
    /// A debug exception, announced and not delivered.
    Debug,
}

/// Flags that the engine keeps outside of its word for RFLAGS while it runs. A run that begins takes them out of it, one that ends puts them
/// back, and one that stands does neither.
const KEPT_ELSEWHERE: u64 = rflags::CF | rflags::PF | rflags::AF | rflags::ZF | rflags::SF | rflags::OF | rflags::DF;

/// Segment and descriptor table registers up to and with IDTR.
const SEGMENTS: usize = IDTR + 1;

/// A segment register as a context keeps it: selector, base, then limit and flags in one word.
fn of_words(selector: u64, base: u64, rest: u64) -> Segment {
    Segment { selector: selector as u16, attributes: (rest >> 40) as u16 & 0xf0ff, limit: rest as u32, base }
}

/// One vCPU.
pub struct Vcpu {
    pub context: Context,
    pub layout: Layout,
    /// The context's word for RFLAGS lacks [`KEPT_ELSEWHERE`], as the engine's does while it runs. [`Context::rflags`] knows them all.
    pub flags_apart: bool,
    pub apic: Apic,
    pub view: View,
    pub state: State,
    pub held: Held,
    pub step: Option<Step>,
    pub injection: Option<Injection>,
    /// Where the instruction is that was announced last, until it is done: it is not announced again.
    pub announced: Option<u64>,
    /// The page of the access that was denied last, its virtual address and its length in bytes.
    pub denied_page: Option<(Gfn, u64, u16)>,
    /// That access was a store.
    pub denied_store: bool,
    /// The leaf of the CPUID being carried out.
    pub cpuid_leaf: u32,
}

impl Vcpu {
    /// Before the state goes to an engine: puts the arithmetic flags to where a run that stands has them, or where one that begins looks.
    #[inline]
    pub fn place_flags(&mut self, apart: bool) {
        let at = self.layout.eflags;
        if apart {
            self.context.set_u64(at, self.context.u64(at) & !KEPT_ELSEWHERE);
        } else if self.flags_apart {
            self.context.set_u64(at, self.context.rflags());
        }
        self.flags_apart = apart;
    }

    pub fn rip(&self) -> u64 {
        self.context.u64(self.layout.rip)
    }

    pub fn set_rip(&mut self, rip: u64) {
        self.context.set_u64(self.layout.rip, rip);
    }

    /// Register `index` as instructions number them: 0 is RAX, 4 RSP.
    pub fn gpr(&self, index: u8) -> u64 {
        self.context.u64(self.layout.gp + usize::from(index & 15) * 8)
    }

    pub fn set_gpr(&mut self, index: u8, value: u64) {
        self.context.set_u64(self.layout.gp + usize::from(index & 15) * 8, value);
    }

    pub fn cr(&self, index: usize) -> u64 {
        self.context.u64(self.layout.cr + index * 8)
    }

    pub fn set_cr2(&mut self, value: u64) {
        self.context.set_u64(self.layout.cr + 2 * 8, value);
    }

    pub fn efer(&self) -> u64 {
        self.context.u64(self.layout.efer)
    }

    pub fn cpl(&self) -> u8 {
        (self.context.u32(self.layout.hflags) & HF_CPL) as u8
    }

    pub fn hflags(&self) -> u32 {
        self.context.u32(self.layout.hflags)
    }

    pub fn set_hflags(&mut self, hflags: u32) {
        self.context.set_u32(self.layout.hflags, hflags);
    }

    /// IF and no one-instruction hold after `sti` or `mov ss`.
    pub fn takes_interrupts(&self) -> bool {
        self.context.u64(self.layout.eflags) & rflags::IF != 0 && self.hflags() & HF_INHIBIT_IRQ == 0
    }

    /// Interrupts are on, but not for the instruction that comes next.
    pub fn is_in_interrupt_shadow(&self) -> bool {
        self.context.u64(self.layout.eflags) & rflags::IF != 0 && self.hflags() & HF_INHIBIT_IRQ != 0
    }

    pub fn mode(&self, view: View) -> Mode {
        let [cr0, _, _, cr3, cr4] = self.context.words(self.layout.cr);
        Mode { cr0, cr3, cr4, efer: self.efer(), view }
    }

    pub fn segment(&self, index: usize) -> Segment {
        let [selector, base, rest] = self.context.words(self.layout.segments + index * SEGMENT);
        of_words(selector, base, rest)
    }

    pub fn set_segment(&mut self, index: usize, selector: u16, base: u64, limit: u32, flags: u32) {
        let at = self.layout.segments + index * SEGMENT;
        self.context.set_u32(at, selector.into());
        self.context.set_u64(at + 8, base);
        self.context.set_u32(at + 16, limit);
        self.context.set_u32(at + 20, flags);
    }

    fn table(&self, index: usize) -> DescriptorTable {
        let segment = self.segment(index);
        DescriptorTable { base: segment.base, limit: segment.limit }
    }

    pub fn gdtr(&self) -> DescriptorTable {
        self.table(GDTR)
    }

    pub fn idtr(&self) -> DescriptorTable {
        self.table(IDTR)
    }

    pub fn tr(&self) -> Segment {
        self.segment(TR)
    }

    /// All registers, as an event carries them; made where they go, because a copy costs as much as reading them.
    #[expect(clippy::inline_always, reason = "not done otherwise, and measured: 2% of a hit")]
    #[inline(always)]
    pub fn registers(&self) -> Registers {
        let layout = &self.layout;
        let segments: [u64; 3 * SEGMENTS] = self.context.words(layout.segments);
        let segment = |index: usize| match segments.get(index * 3..) {
            Some([selector, base, rest, ..]) => of_words(*selector, *base, *rest),
            _ => Segment::default(),
        };
        let table = |index| DescriptorTable { base: segment(index).base, limit: segment(index).limit };
        let [cr0, _, cr2, cr3, cr4] = self.context.words(layout.cr);
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = self.context.words(layout.gp);
        Registers {
            gp: GpRegisters {
                rax,
                rcx,
                rdx,
                rbx,
                rsp,
                rbp,
                rsi,
                rdi,
                r8,
                r9,
                r10,
                r11,
                r12,
                r13,
                r14,
                r15,
                rip: self.rip(),
                rflags: self.context.rflags(),
            },
            cr0,
            cr2,
            cr3,
            cr4,
            efer: self.efer(),
            cs: segment(CS),
            ss: segment(SS),
            ds: segment(3),
            es: segment(0),
            fs: segment(4),
            gs: segment(5),
            tr: segment(TR),
            gdtr: table(GDTR),
            idtr: table(IDTR),
            kernel_gs_base: self.context.u64(layout.kernel_gs_base),
            star: self.context.u64(layout.star),
            lstar: self.context.u64(layout.lstar),
            sfmask: self.context.u64(layout.sfmask),
        }
    }

    pub fn set_gp(&mut self, gp: &GpRegisters) {
        let values = [
            gp.rax, gp.rcx, gp.rdx, gp.rbx, gp.rsp, gp.rbp, gp.rsi, gp.rdi, gp.r8, gp.r9, gp.r10, gp.r11, gp.r12, gp.r13, gp.r14,
            gp.r15,
        ];
        for (index, value) in values.into_iter().enumerate() {
            self.set_gpr(index as u8, value);
        }
        self.set_rip(gp.rip);
        self.context.write_register(reg::EFLAGS, gp.rflags);
    }

    /// Sets what [`crate::driver::VmiRegisters::set_registers`] promises, but for CR0 and CR4, which only an engine can change.
    pub fn set_registers(&mut self, registers: &Registers) {
        self.set_gp(&registers.gp);
        let layout = self.layout;
        let base = |index: usize| layout.segments + index * SEGMENT + 8;
        for (at, value) in [
            (layout.cr + 2 * 8, registers.cr2),
            (layout.cr + 3 * 8, registers.cr3),
            (base(4), registers.fs.base),
            (base(5), registers.gs.base),
            (layout.kernel_gs_base, registers.kernel_gs_base),
            (layout.star, registers.star),
            (layout.lstar, registers.lstar),
            (layout.sfmask, registers.sfmask),
        ] {
            self.context.set_u64(at, value);
        }
    }
}

impl TrapRegisters for Vcpu {
    fn read(&self, registers: &mut Registers) {
        *registers = self.registers();
    }

    fn one(&self, register: Register) -> Option<u64> {
        use Register as R;
        let number = match register {
            R::Rax => 0,
            R::Rcx => 1,
            R::Rdx => 2,
            R::Rbx => 3,
            R::Rsp => 4,
            R::Rbp => 5,
            R::Rsi => 6,
            R::Rdi => 7,
            R::R8 => 8,
            R::R9 => 9,
            R::R10 => 10,
            R::R11 => 11,
            R::R12 => 12,
            R::R13 => 13,
            R::R14 => 14,
            R::R15 => 15,
            R::Rip => return Some(self.rip()),
            R::Cr0 => return Some(self.cr(0)),
            R::Cr3 => return Some(self.cr(3)),
            R::Cr4 => return Some(self.cr(4)),
            R::Root => return Some(self.cr(3) & pte::ADDRESS),
            R::Ring => return Some(self.cpl().into()),
            _ => return None,
        };
        Some(self.gpr(number))
    }
}
