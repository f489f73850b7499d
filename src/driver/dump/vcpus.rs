//! The registers of a dump's vCPUs.
//!
//! What the file does not have is 0: EFER, STAR, LSTAR and SFMASK always. Where it has no CR3, nothing is given at all: addresses
//! would be looked up under a root that is none.

use super::refuse::refuse;
use super::source::{File, Part};
use crate::addr::VcpuId;
use crate::arch::amd64::{DescriptorTable, GpRegisters, Registers, Segment};
use crate::error::{Result, VmiError};

/// Most vCPUs that are believed in: more than any hypervisor has.
pub const MAX_VCPUS: usize = 8192;

/// The vCPUs of a dump.
#[derive(Debug)]
pub enum Vcpus {
    /// The file has no word of them.
    Unknown,
    /// There are so many, and the file has their general registers only.
    Counted(u16),
    /// The registers of each.
    Known(Vec<Registers>),
}

impl Vcpus {
    pub const fn count(&self) -> u16 {
        match self {
            Self::Unknown => 0,
            Self::Counted(count) => *count,
            Self::Known(registers) => registers.len() as u16,
        }
    }

    /// Of a file that has notes of `count` vCPUs, and all registers of those in `known`.
    ///
    /// # Errors
    /// [`VmiError::Image`] if they are more than there can be.
    pub fn of(file: &File<'_>, count: usize, known: Vec<Registers>) -> Result<Self> {
        let most = count.max(known.len());
        file.check(most <= MAX_VCPUS, || format!("it has {most} vCPUs, more than {MAX_VCPUS}"))?;
        Ok(match (known.len(), count) {
            (0, 0) => Self::Unknown,
            (0, count) => Self::Counted(count as u16),
            _ => Self::Known(known),
        })
    }

    pub fn registers(&self, vcpu: VcpuId) -> Result<Registers> {
        let Self::Known(all) = self else { return refuse("registers") };
        all.get(usize::from(vcpu.0)).copied().ok_or(VmiError::VcpuNotFound { vcpu, count: self.count() })
    }
}

/// Bytes of `QEMUCPUState` up to CR4 (QEMU, target/i386/arch_dump.c); the base of GS that SWAPGS loads follows in newer ones.
const QEMU_STATE: usize = 432;

/// From the descriptor of a note of QEMU's.
///
/// # Errors
/// [`VmiError::Image`] if it is too short, or not of the version that is known.
pub fn from_qemu(note: &Part<'_>, file: &File<'_>) -> Result<Registers> {
    const GENERAL: usize = 8;
    const SEGMENTS: usize = GENERAL + 18 * 8;
    const CONTROL: usize = SEGMENTS + 10 * 24;
    let version = note.u32(0)?;
    file.check(version == 1, || format!("vCPU state of QEMU: version {version}, where 1 is needed"))?;
    let general = |index: usize| note.u64(GENERAL + index * 8);
    // A selector, a limit, the descriptor's second word and a base.
    let segment = |index: usize| {
        let at = SEGMENTS + index * 24;
        Ok::<_, VmiError>(Segment {
            selector: note.u32(at)? as u16,
            // Four of its bits are the limit's, which is there as a whole.
            attributes: (note.u32(at + 8)? >> 8) as u16 & 0xf0ff,
            limit: note.u32(at + 4)?,
            base: note.u64(at + 16)?,
        })
    };
    let table = |index: usize| segment(index).map(|Segment { base, limit, .. }| DescriptorTable { base, limit });
    let control = |index: usize| note.u64(CONTROL + index * 8);
    Ok(Registers {
        gp: GpRegisters {
            rax: general(0)?,
            rbx: general(1)?,
            rcx: general(2)?,
            rdx: general(3)?,
            rsi: general(4)?,
            rdi: general(5)?,
            rsp: general(6)?,
            rbp: general(7)?,
            r8: general(8)?,
            r9: general(9)?,
            r10: general(10)?,
            r11: general(11)?,
            r12: general(12)?,
            r13: general(13)?,
            r14: general(14)?,
            r15: general(15)?,
            rip: general(16)?,
            rflags: general(17)?,
        },
        cs: segment(0)?,
        ds: segment(1)?,
        es: segment(2)?,
        fs: segment(3)?,
        gs: segment(4)?,
        ss: segment(5)?,
        tr: segment(7)?,
        gdtr: table(8)?,
        idtr: table(9)?,
        cr0: control(0)?,
        cr2: control(2)?,
        cr3: control(3)?,
        cr4: control(4)?,
        kernel_gs_base: if note.bytes.len() > QEMU_STATE { note.u64(QEMU_STATE)? } else { 0 },
        ..Registers::default()
    })
}

/// Bytes of `vcpu_guest_context` of an x86-64 domain (Xen, xen/include/public/arch-x86/xen.h).
pub const XEN_CONTEXT: u64 = 5168;

/// From the vCPU context of an HVM or PVH domain that is at `at` in `contexts`. Of segments it has the selectors, and the bases of FS and GS.
///
/// # Errors
/// [`VmiError::Image`] if it is cut off.
pub fn from_xen(contexts: &Part<'_>, at: usize) -> Result<Registers> {
    const USER: usize = 520;
    const CONTROL: usize = 4984;
    const BASES: usize = 5144;
    let word = |offset: usize| contexts.u64(at + offset);
    let general = |index: usize| word(USER + index * 8);
    // Behind the general registers lie RIP, CS, RFLAGS, RSP and the other selectors, 8 bytes each.
    let segment = |index: usize| {
        let selector = contexts.u16(at + USER + index * 8)?;
        Ok::<_, VmiError>(Segment { selector, ..Segment::default() })
    };
    let control = |index: usize| word(CONTROL + index * 8);
    let (cs, fs, gs) = (segment(17)?, segment(23)?, segment(24)?);
    let (kernel, user) = (word(BASES + 8)?, word(BASES + 16)?);
    // The two are named after who uses them; the one that is not in use is what SWAPGS loads.
    let ring = cs.selector & 3;
    let (gs_base, swapped) = if ring == 0 { (kernel, user) } else { (user, kernel) };
    Ok(Registers {
        gp: GpRegisters {
            r15: general(0)?,
            r14: general(1)?,
            r13: general(2)?,
            r12: general(3)?,
            rbp: general(4)?,
            rbx: general(5)?,
            r11: general(6)?,
            r10: general(7)?,
            r9: general(8)?,
            r8: general(9)?,
            rax: general(10)?,
            rcx: general(11)?,
            rdx: general(12)?,
            rsi: general(13)?,
            rdi: general(14)?,
            rip: general(16)?,
            rflags: general(18)?,
            rsp: general(19)?,
        },
        cs,
        ss: segment(20)?,
        es: segment(21)?,
        ds: segment(22)?,
        fs: Segment { base: word(BASES)?, ..fs },
        gs: Segment { base: gs_base, ..gs },
        cr0: control(0)?,
        cr2: control(2)?,
        cr3: control(3)?,
        cr4: control(4)?,
        kernel_gs_base: swapped,
        ..Registers::default()
    })
}
