//! Requests and responses as bytes of the ring, to and from what the driver works with.

use std::mem::offset_of;

use xen_sys::types::{
    Cpuid, Debug, DescAccess, EventHead, HvmHwCpu, MemAccess, MovToMsr, PortIo, RegsV6, SelectorReg, WriteCtrlreg, ctrlreg,
    descriptor, flag, mem_access, reason,
};

use crate::addr::{Gfn, MemoryAccess, Va, VcpuId, View};
use crate::arch::amd64::{ControlRegister, DescriptorTable, GpRegisters, Registers, Segment};
use crate::event::{DescriptorRegister, EventReason, VmiEvent};

use super::abi::{Layout, MAX_EVENT};

const U: usize = offset_of!(EventHead, u);
const U_LEN: usize = 32;
const REGS: usize = size_of::<EventHead>();

/// What a request asks of the driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(clippy::large_enum_variant, reason = "made once an event and consumed at once: a box would cost an allocation a hit")]
pub enum Asked {
    /// An event for whoever waits.
    Event(VmiEvent),
    /// The emulator does not know the instruction it was to execute.
    Unimplemented,
    /// Nothing that is known: to be answered as it is.
    Unknown,
}

/// A request, as it was in the ring.
#[derive(Clone, Copy)]
pub struct Request {
    pub bytes: [u8; MAX_EVENT],
    layout: Layout,
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request").field("vcpu", &self.vcpu()).field("reason", &self.reason()).finish_non_exhaustive()
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().unwrap_or([0; N])
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

impl Request {
    pub const fn new(bytes: &[u8; MAX_EVENT], layout: Layout) -> Self {
        Self { bytes: *bytes, layout }
    }

    fn u8(&self, at: usize) -> u8 {
        let [byte] = array(&self.bytes, at);
        byte
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(array(&self.bytes, at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(array(&self.bytes, at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(array(&self.bytes, at))
    }

    /// A field of a register that both versions have at the same place.
    fn reg(&self, at: usize) -> u64 {
        self.u64(REGS + at)
    }

    pub fn version(&self) -> u32 {
        self.u32(offset_of!(EventHead, version))
    }

    pub fn vcpu(&self) -> u32 {
        self.u32(offset_of!(EventHead, vcpu_id))
    }

    pub fn reason(&self) -> u32 {
        self.u32(offset_of!(EventHead, reason))
    }

    /// Whether the vCPU stands still until the answer.
    pub fn is_paused(&self) -> bool {
        self.u32(offset_of!(EventHead, flags)) & flag::VCPU_PAUSED != 0
    }

    /// The view the vCPU was in; the default one if views are off.
    pub fn view(&self) -> View {
        let has = self.u32(offset_of!(EventHead, flags)) & flag::ALTERNATE_P2M != 0;
        if has { View(self.u16(offset_of!(EventHead, altp2m_idx))) } else { View::DEFAULT }
    }

    /// Length and type of the INT3.
    pub fn breakpoint(&self) -> (u8, u8) {
        let len = self.u32(U + offset_of!(Debug, insn_length)) as u8;
        (len, self.bytes.get(U + offset_of!(Debug, kind)).copied().unwrap_or(0))
    }

    /// The access was one of the processor to the page tables.
    pub fn is_page_walk(&self) -> bool {
        self.reason() == reason::MEM_ACCESS && self.u32(U + offset_of!(MemAccess, flags)) & mem_access::FAULT_IN_GPT != 0
    }

    fn segment(&self, base: u64, reg: usize, selector: usize) -> Segment {
        let packed = SelectorReg(self.u32(REGS + reg + self.layout.shift));
        Segment {
            selector: self.u16(REGS + selector + self.layout.shift),
            attributes: attributes(packed.attributes()),
            limit: packed.limit(),
            base,
        }
    }

    /// The registers. An event has neither TR nor IDTR, nor the SYSCALL mask: those are zero.
    pub fn registers(&self) -> Registers {
        let shifted = |at: usize| REGS + at + self.layout.shift;
        let base = |at: usize| u64::from(self.u32(shifted(at)));
        Registers {
            gp: GpRegisters {
                rax: self.reg(offset_of!(RegsV6, rax)),
                rcx: self.reg(offset_of!(RegsV6, rcx)),
                rdx: self.reg(offset_of!(RegsV6, rdx)),
                rbx: self.reg(offset_of!(RegsV6, rbx)),
                rsp: self.reg(offset_of!(RegsV6, rsp)),
                rbp: self.reg(offset_of!(RegsV6, rbp)),
                rsi: self.reg(offset_of!(RegsV6, rsi)),
                rdi: self.reg(offset_of!(RegsV6, rdi)),
                r8: self.reg(offset_of!(RegsV6, r8)),
                r9: self.reg(offset_of!(RegsV6, r9)),
                r10: self.reg(offset_of!(RegsV6, r10)),
                r11: self.reg(offset_of!(RegsV6, r11)),
                r12: self.reg(offset_of!(RegsV6, r12)),
                r13: self.reg(offset_of!(RegsV6, r13)),
                r14: self.reg(offset_of!(RegsV6, r14)),
                r15: self.reg(offset_of!(RegsV6, r15)),
                rip: self.reg(offset_of!(RegsV6, rip)),
                rflags: self.reg(offset_of!(RegsV6, rflags)),
            },
            cr0: self.reg(offset_of!(RegsV6, cr0)),
            cr2: self.reg(offset_of!(RegsV6, cr2)),
            cr3: self.reg(offset_of!(RegsV6, cr3)),
            cr4: self.reg(offset_of!(RegsV6, cr4)),
            efer: self.reg(offset_of!(RegsV6, msr_efer)),
            cs: self.segment(base(offset_of!(RegsV6, cs_base)), offset_of!(RegsV6, cs), offset_of!(RegsV6, cs_sel)),
            ss: self.segment(base(offset_of!(RegsV6, ss_base)), offset_of!(RegsV6, ss), offset_of!(RegsV6, ss_sel)),
            ds: self.segment(base(offset_of!(RegsV6, ds_base)), offset_of!(RegsV6, ds), offset_of!(RegsV6, ds_sel)),
            es: self.segment(base(offset_of!(RegsV6, es_base)), offset_of!(RegsV6, es), offset_of!(RegsV6, es_sel)),
            fs: self.segment(self.u64(shifted(offset_of!(RegsV6, fs_base))), offset_of!(RegsV6, fs), offset_of!(RegsV6, fs_sel)),
            gs: self.segment(self.u64(shifted(offset_of!(RegsV6, gs_base))), offset_of!(RegsV6, gs), offset_of!(RegsV6, gs_sel)),
            tr: Segment::default(),
            gdtr: DescriptorTable {
                base: self.reg(offset_of!(RegsV6, gdtr_base)),
                limit: self.u16(shifted(offset_of!(RegsV6, gdtr_limit))).into(),
            },
            idtr: DescriptorTable::default(),
            kernel_gs_base: self.u64(shifted(offset_of!(RegsV6, shadow_gs))),
            star: self.reg(offset_of!(RegsV6, msr_star)),
            lstar: self.reg(offset_of!(RegsV6, msr_lstar)),
            sfmask: 0,
        }
    }

    /// What it asks for.
    pub fn asked(&self) -> Asked {
        let mut registers = self.registers();
        let reason = match self.reason() {
            reason::SOFTWARE_BREAKPOINT => {
                EventReason::Breakpoint { gfn: Gfn(self.u64(U + offset_of!(Debug, gfn))), insn_len: self.breakpoint().0 }
            }
            reason::DEBUG_EXCEPTION => EventReason::DebugException { pending: self.u64(U + offset_of!(Debug, pending_dbg)) },
            reason::SINGLESTEP => EventReason::SingleStep { gfn: Some(Gfn(self.u64(U))).filter(|gfn| gfn.0 != u64::MAX) },
            reason::MEM_ACCESS => {
                let flags = self.u32(U + offset_of!(MemAccess, flags));
                let gfn = Gfn(self.u64(U + offset_of!(MemAccess, gfn)));
                let with_va = flags & (mem_access::GLA_VALID | mem_access::FAULT_IN_GPT) == mem_access::GLA_VALID;
                EventReason::MemoryAccess {
                    pa: gfn.pa(self.u64(U + offset_of!(MemAccess, offset))),
                    va: with_va.then(|| Va(self.u64(U + offset_of!(MemAccess, gla)))),
                    // The bits are the same three, in the same order.
                    access: MemoryAccess::from_bits((flags & 7) as u8).unwrap_or_default(),
                    len: 0,
                }
            }
            reason::WRITE_CTRLREG => {
                let register = match self.u32(U + offset_of!(WriteCtrlreg, index)) as u16 {
                    ctrlreg::CR0 => ControlRegister::Cr0,
                    ctrlreg::CR3 => ControlRegister::Cr3,
                    ctrlreg::CR4 => ControlRegister::Cr4,
                    _ => return Asked::Unknown,
                };
                EventReason::WriteControlRegister {
                    register,
                    old: self.u64(U + offset_of!(WriteCtrlreg, old_value)),
                    new: self.u64(U + offset_of!(WriteCtrlreg, new_value)),
                }
            }
            reason::MOV_TO_MSR => EventReason::WriteMsr {
                msr: self.u64(U + offset_of!(MovToMsr, msr)) as u32,
                old: self.u64(U + offset_of!(MovToMsr, old_value)),
                new: self.u64(U + offset_of!(MovToMsr, new_value)),
            },
            reason::CPUID => {
                let (leaf, subleaf) = (self.u32(U + offset_of!(Cpuid, leaf)), self.u32(U + offset_of!(Cpuid, subleaf)));
                // Xen has put the results in already; the event is told from before.
                registers.gp.rax = leaf.into();
                registers.gp.rcx = subleaf.into();
                EventReason::Cpuid { leaf, subleaf, insn_len: self.u32(U + offset_of!(Cpuid, insn_length)) as u8 }
            }
            reason::DESCRIPTOR_ACCESS => EventReason::DescriptorAccess {
                register: match self.u8(U + offset_of!(DescAccess, descriptor)) {
                    descriptor::IDTR => DescriptorRegister::Idtr,
                    descriptor::GDTR => DescriptorRegister::Gdtr,
                    descriptor::LDTR => DescriptorRegister::Ldtr,
                    descriptor::TR => DescriptorRegister::Tr,
                    _ => return Asked::Unknown,
                },
                is_load: self.u8(U + offset_of!(DescAccess, is_write)) != 0,
            },
            reason::IO => EventReason::PortIo {
                port: self.u16(U + offset_of!(PortIo, port)),
                bytes: self.u32(U + offset_of!(PortIo, bytes)) as u8,
                is_read: self.u8(U + offset_of!(PortIo, r#in)) != 0,
                is_string: self.u8(U + offset_of!(PortIo, str)) != 0,
            },
            reason::GUEST_REQUEST => EventReason::GuestRequest,
            reason::EMUL_UNIMPLEMENTED => return Asked::Unimplemented,
            _ => return Asked::Unknown,
        };
        let vcpu = VcpuId(self.vcpu() as u16);
        Asked::Event(VmiEvent { vcpu, view: Some(self.view()), registers, reason })
    }

    /// The response that lets the vCPU go on as it is.
    pub fn response(&self) -> Response {
        let mut bytes = [0; MAX_EVENT];
        for (from, len) in [
            (offset_of!(EventHead, version), 4),
            (offset_of!(EventHead, reason), 4),
            (offset_of!(EventHead, vcpu_id), 4),
            (offset_of!(EventHead, altp2m_idx), 2),
            (U, U_LEN),
        ] {
            put(&mut bytes, from, self.bytes.get(from..from + len).unwrap_or_default());
        }
        let mut response = Response { bytes, layout: self.layout };
        if self.is_paused() {
            response.flag(flag::VCPU_PAUSED);
        }
        response
    }
}

/// The answer that lets a vCPU go on in the default view, whatever it stands still for.
pub fn release(layout: Layout, vcpu: u16) -> [u8; MAX_EVENT] {
    let mut bytes = [0; MAX_EVENT];
    put(&mut bytes, offset_of!(EventHead, version), &layout.version.to_le_bytes());
    put(&mut bytes, offset_of!(EventHead, flags), &(flag::VCPU_PAUSED | flag::ALTERNATE_P2M).to_le_bytes());
    put(&mut bytes, offset_of!(EventHead, vcpu_id), &u32::from(vcpu).to_le_bytes());
    bytes
}

/// The layout of [`Segment::attributes`], from the one where the upper four bits follow at once.
const fn attributes(packed: u16) -> u16 {
    packed & 0xff | (packed & 0xf00) << 4
}

/// A response on its way into the ring. Two parts of it are unions (public/vm_event.h), and each is written at most once: `u` holds the
/// request's own or the view after a fast step, `data` registers or instruction bytes.
#[derive(Clone)]
pub struct Response {
    pub bytes: [u8; MAX_EVENT],
    layout: Layout,
}

impl Response {
    pub fn flags(&self) -> u32 {
        u32::from_le_bytes(array(&self.bytes, offset_of!(EventHead, flags)))
    }

    /// Sets flags.
    pub fn flag(&mut self, flags: u32) {
        let all = self.flags() | flags;
        put(&mut self.bytes, offset_of!(EventHead, flags), &all.to_le_bytes());
    }

    /// Puts the vCPU into a view.
    pub fn view(&mut self, view: View) {
        self.flag(flag::ALTERNATE_P2M);
        put(&mut self.bytes, offset_of!(EventHead, altp2m_idx), &view.0.to_le_bytes());
    }

    /// One instruction, and then `back`. Excludes emulation, whose `u` it overwrites.
    pub fn fast_step(&mut self, back: View) {
        self.flag(flag::FAST_SINGLESTEP);
        put(&mut self.bytes, U, &[0; U_LEN]);
        put(&mut self.bytes, U, &back.0.to_le_bytes());
    }

    /// The emulator is to look at this access: it emulates only what the vCPU's view still denies (`p2m_mem_access_emulate_check`). For the
    /// request's own access that is what the response has anyway.
    pub fn access(&mut self, gfn: Gfn, access: MemoryAccess) {
        put(&mut self.bytes, offset_of!(EventHead, reason), &reason::MEM_ACCESS.to_le_bytes());
        put(&mut self.bytes, U + offset_of!(MemAccess, gfn), &gfn.0.to_le_bytes());
        put(&mut self.bytes, U + offset_of!(MemAccess, flags), &u32::from(access.bits()).to_le_bytes());
    }

    /// The emulator executes the instruction, whatever it is. Xen looks at that flag for some reasons only, accesses to ports not among them
    /// (`vm_event_emulate_check`), and for descriptor tables at nothing else.
    pub fn emulate_any(&mut self) {
        put(&mut self.bytes, offset_of!(EventHead, reason), &reason::DESCRIPTOR_ACCESS.to_le_bytes());
    }

    /// The emulator executes these bytes. Excludes new registers, whose place they take.
    pub fn instruction(&mut self, bytes: &[u8; 16]) {
        self.flag(flag::EMULATE | flag::SET_EMUL_INSN_DATA);
        put(&mut self.bytes, REGS, bytes);
    }

    /// New general-purpose registers. Xen takes those, RIP and RFLAGS, and nothing else.
    pub fn registers(&mut self, request: &Request, gp: &GpRegisters) {
        self.flag(flag::SET_REGISTERS);
        let len = self.layout.size - REGS;
        put(&mut self.bytes, REGS, request.bytes.get(REGS..REGS + len).unwrap_or_default());
        for (at, value) in [
            (offset_of!(RegsV6, rax), gp.rax),
            (offset_of!(RegsV6, rcx), gp.rcx),
            (offset_of!(RegsV6, rdx), gp.rdx),
            (offset_of!(RegsV6, rbx), gp.rbx),
            (offset_of!(RegsV6, rsp), gp.rsp),
            (offset_of!(RegsV6, rbp), gp.rbp),
            (offset_of!(RegsV6, rsi), gp.rsi),
            (offset_of!(RegsV6, rdi), gp.rdi),
            (offset_of!(RegsV6, r8), gp.r8),
            (offset_of!(RegsV6, r9), gp.r9),
            (offset_of!(RegsV6, r10), gp.r10),
            (offset_of!(RegsV6, r11), gp.r11),
            (offset_of!(RegsV6, r12), gp.r12),
            (offset_of!(RegsV6, r13), gp.r13),
            (offset_of!(RegsV6, r14), gp.r14),
            (offset_of!(RegsV6, r15), gp.r15),
            (offset_of!(RegsV6, rip), gp.rip),
            (offset_of!(RegsV6, rflags), gp.rflags),
        ] {
            put(&mut self.bytes, REGS + at, &value.to_le_bytes());
        }
    }
}

/// The CPUID results that Xen has put into the registers of the request, over `gp`.
pub fn with_cpuid_results(request: &Request, gp: &GpRegisters) -> GpRegisters {
    let own = request.registers().gp;
    GpRegisters { rax: own.rax, rbx: own.rbx, rcx: own.rcx, rdx: own.rdx, ..*gp }
}

/// The registers of a context record.
pub fn registers_of(cpu: &HvmHwCpu) -> Registers {
    let segment = |selector: u32, attr: u32, limit: u32, base: u64| Segment {
        selector: selector as u16,
        attributes: attributes(attr as u16),
        limit,
        base,
    };
    Registers {
        gp: GpRegisters {
            rax: cpu.rax,
            rcx: cpu.rcx,
            rdx: cpu.rdx,
            rbx: cpu.rbx,
            rsp: cpu.rsp,
            rbp: cpu.rbp,
            rsi: cpu.rsi,
            rdi: cpu.rdi,
            r8: cpu.r8,
            r9: cpu.r9,
            r10: cpu.r10,
            r11: cpu.r11,
            r12: cpu.r12,
            r13: cpu.r13,
            r14: cpu.r14,
            r15: cpu.r15,
            rip: cpu.rip,
            rflags: cpu.rflags,
        },
        cr0: cpu.cr0,
        cr2: cpu.cr2,
        cr3: cpu.cr3,
        cr4: cpu.cr4,
        efer: cpu.msr_efer,
        cs: segment(cpu.cs_sel, cpu.cs_arbytes, cpu.cs_limit, cpu.cs_base),
        ss: segment(cpu.ss_sel, cpu.ss_arbytes, cpu.ss_limit, cpu.ss_base),
        ds: segment(cpu.ds_sel, cpu.ds_arbytes, cpu.ds_limit, cpu.ds_base),
        es: segment(cpu.es_sel, cpu.es_arbytes, cpu.es_limit, cpu.es_base),
        fs: segment(cpu.fs_sel, cpu.fs_arbytes, cpu.fs_limit, cpu.fs_base),
        gs: segment(cpu.gs_sel, cpu.gs_arbytes, cpu.gs_limit, cpu.gs_base),
        tr: segment(cpu.tr_sel, cpu.tr_arbytes, cpu.tr_limit, cpu.tr_base),
        gdtr: DescriptorTable { base: cpu.gdtr_base, limit: cpu.gdtr_limit },
        idtr: DescriptorTable { base: cpu.idtr_base, limit: cpu.idtr_limit },
        kernel_gs_base: cpu.shadow_gs,
        star: cpu.msr_star,
        lstar: cpu.msr_lstar,
        sfmask: cpu.msr_syscall_mask,
    }
}

/// The whole hardware context reduced to its header and the vCPUs' records, with new registers in one of them; `None` if that vCPU has no
/// record or the context is no context.
///
/// vCPUs without a record would be stopped for good (`hvm_load`), so all of them stay.
pub fn context_with(context: &[u8], vcpu: u16, registers: &Registers) -> Option<Vec<u8>> {
    use xen_sys::types::{HVM_SAVE_CPU, HVM_SAVE_END, HVM_SAVE_HEADER, SaveDescriptor};
    let mut kept = Vec::new();
    let mut found = false;
    let mut rest = context;
    loop {
        let typecode = u16::from_le_bytes(*rest.first_chunk()?);
        let instance = u16::from_le_bytes(array(rest, offset_of!(SaveDescriptor, instance)));
        let len = u32::from_le_bytes(array(rest, offset_of!(SaveDescriptor, length))) as usize;
        let record = rest.get(..size_of::<SaveDescriptor>().checked_add(len)?)?;
        if typecode == HVM_SAVE_END {
            kept.extend_from_slice(record);
            return found.then_some(kept);
        }
        if typecode == HVM_SAVE_CPU || typecode == HVM_SAVE_HEADER {
            let at = kept.len() + size_of::<SaveDescriptor>();
            kept.extend_from_slice(record);
            if typecode == HVM_SAVE_CPU && instance == vcpu {
                found = len >= size_of::<HvmHwCpu>();
                patch(kept.get_mut(at..)?, registers);
            }
        }
        rest = rest.get(record.len()..)?;
    }
}

fn patch(record: &mut [u8], registers: &Registers) {
    let gp = &registers.gp;
    for (at, value) in [
        (offset_of!(HvmHwCpu, rax), gp.rax),
        (offset_of!(HvmHwCpu, rbx), gp.rbx),
        (offset_of!(HvmHwCpu, rcx), gp.rcx),
        (offset_of!(HvmHwCpu, rdx), gp.rdx),
        (offset_of!(HvmHwCpu, rbp), gp.rbp),
        (offset_of!(HvmHwCpu, rsi), gp.rsi),
        (offset_of!(HvmHwCpu, rdi), gp.rdi),
        (offset_of!(HvmHwCpu, rsp), gp.rsp),
        (offset_of!(HvmHwCpu, r8), gp.r8),
        (offset_of!(HvmHwCpu, r9), gp.r9),
        (offset_of!(HvmHwCpu, r10), gp.r10),
        (offset_of!(HvmHwCpu, r11), gp.r11),
        (offset_of!(HvmHwCpu, r12), gp.r12),
        (offset_of!(HvmHwCpu, r13), gp.r13),
        (offset_of!(HvmHwCpu, r14), gp.r14),
        (offset_of!(HvmHwCpu, r15), gp.r15),
        (offset_of!(HvmHwCpu, rip), gp.rip),
        (offset_of!(HvmHwCpu, rflags), gp.rflags),
        (offset_of!(HvmHwCpu, cr0), registers.cr0),
        (offset_of!(HvmHwCpu, cr2), registers.cr2),
        (offset_of!(HvmHwCpu, cr3), registers.cr3),
        (offset_of!(HvmHwCpu, cr4), registers.cr4),
        (offset_of!(HvmHwCpu, fs_base), registers.fs.base),
        (offset_of!(HvmHwCpu, gs_base), registers.gs.base),
        (offset_of!(HvmHwCpu, shadow_gs), registers.kernel_gs_base),
        (offset_of!(HvmHwCpu, msr_star), registers.star),
        (offset_of!(HvmHwCpu, msr_lstar), registers.lstar),
        (offset_of!(HvmHwCpu, msr_syscall_mask), registers.sfmask),
        (offset_of!(HvmHwCpu, msr_efer), registers.efer),
    ] {
        put(record, at, &value.to_le_bytes());
    }
}
