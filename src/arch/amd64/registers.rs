//! The registers of one vCPU, as plain data.

use crate::addr::{Pa, Va};

/// Bits of CR0 (Intel SDM vol. 3, 2.5).
pub mod cr0 {
    /// Write protect: ring 0 honours read-only pages.
    pub const WP: u64 = 1 << 16;
    /// Paging.
    pub const PG: u64 = 1 << 31;
}

/// Bits of CR4 (Intel SDM vol. 3, 2.5).
pub mod cr4 {
    /// Only ring 0 may read the time-stamp counter.
    pub const TSD: u64 = 1 << 2;
    /// Physical address extension.
    pub const PAE: u64 = 1 << 5;
    /// Five-level paging.
    pub const LA57: u64 = 1 << 12;
    /// Supervisor-mode execution prevention.
    pub const SMEP: u64 = 1 << 20;
    /// Supervisor-mode access prevention.
    pub const SMAP: u64 = 1 << 21;
}

/// Bits of the EFER MSR (AMD APM vol. 2, 3.1.7).
pub mod efer {
    /// SYSCALL and SYSRET.
    pub const SCE: u64 = 1 << 0;
    /// Long mode enabled.
    pub const LME: u64 = 1 << 8;
    /// Long mode active.
    pub const LMA: u64 = 1 << 10;
    /// No-execute pages.
    pub const NXE: u64 = 1 << 11;
}

/// Bits of RFLAGS.
pub mod rflags {
    /// Carry.
    pub const CF: u64 = 1;
    /// Parity of the result's low byte: set if even.
    pub const PF: u64 = 1 << 2;
    /// Carry out of the low four bits.
    pub const AF: u64 = 1 << 4;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Sign.
    pub const SF: u64 = 1 << 7;
    /// Direction of string instructions.
    pub const DF: u64 = 1 << 10;
    /// Signed overflow.
    pub const OF: u64 = 1 << 11;
    /// Trap flag.
    pub const TF: u64 = 1 << 8;
    /// Interrupts enabled.
    pub const IF: u64 = 1 << 9;
    /// Nested task.
    pub const NT: u64 = 1 << 14;
    /// Resume flag.
    pub const RF: u64 = 1 << 16;
    /// SMAP override.
    pub const AC: u64 = 1 << 18;
}

/// The control registers a driver can report writes to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ControlRegister {
    /// CR0.
    Cr0,
    /// CR3.
    Cr3,
    /// CR4.
    Cr4,
}

/// The registers an answer can change.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(missing_docs, reason = "the names are the registers'")]
pub struct GpRegisters {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// A segment register with its hidden part. `attributes` has the layout of bits 8 to 23 of a descriptor's second word.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(missing_docs, reason = "the names are the manual's")]
pub struct Segment {
    pub selector: u16,
    pub attributes: u16,
    pub limit: u32,
    pub base: u64,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(missing_docs, reason = "the names are the manual's")]
pub struct DescriptorTable {
    pub base: u64,
    pub limit: u32,
}

/// The registers of one vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(missing_docs, reason = "the names are the registers'")]
pub struct Registers {
    pub gp: GpRegisters,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub tr: Segment,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    /// IA32_KERNEL_GS_BASE, which SWAPGS exchanges with the base of GS.
    pub kernel_gs_base: u64,
    pub star: u64,
    pub lstar: u64,
    pub sfmask: u64,
}

impl Registers {
    /// Root of the page tables: CR3 without PCID and flag bits.
    pub const fn root(&self) -> Pa {
        Pa(self.cr3 & 0x000f_ffff_ffff_f000)
    }

    /// Whether the code that runs is 64-bit code: long mode is active, and CS.L is set.
    pub const fn is_64_bit(&self) -> bool {
        self.efer & efer::LMA != 0 && self.cs.attributes & 0x2000 != 0
    }

    /// The instruction pointer.
    pub const fn rip(&self) -> Va {
        Va(self.gp.rip)
    }

    /// Current privilege level: 0 to 3, the low bits of CS (Intel SDM vol. 3, 5.5).
    pub const fn cpl(&self) -> u8 {
        (self.cs.selector & 3) as u8
    }

    /// Levels of the page tables: 5 with CR4.LA57, else 4.
    pub const fn paging_levels(&self) -> u8 {
        if self.cr4 & cr4::LA57 != 0 { 5 } else { 4 }
    }
}
