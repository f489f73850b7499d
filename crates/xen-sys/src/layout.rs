//! Golden sizes and offsets, checked when the crate is compiled. They were printed by a C program from each release's own headers; where two
//! releases differ there is a type for each, or a field that leaves room.

use std::mem::offset_of;

use crate::types::{
    Cpuid, Debug, DescAccess, DomainInfo, DomctlMonitor, EventHead, EventV6, EventV7, HvmHwCpu, MemAccess, MovToMsr, PortIo,
    RegsV6, RegsV7, RingHead, SaveDescriptor, SelectorReg, ToolLog, WriteCtrlreg,
};

macro_rules! golden {
    ($($type:ty: $size:literal $({ $($field:ident $(. $inner:ident)*: $offset:literal),* $(,)? })?;)+) => {
        $(
            const _: () = assert!(size_of::<$type>() == $size, concat!("size of ", stringify!($type)));
            $($(const _: () = assert!(offset_of!($type, $field $(. $inner)*) == $offset, concat!(stringify!($type), "::", stringify!($field)));)*)?
        )+
    };
}

// 4.14 to 4.22 unless said otherwise.
golden! {
    EventHead: 56 { version: 0, flags: 4, reason: 8, vcpu_id: 12, altp2m_idx: 16, u: 24 };
    MemAccess: 32 { gfn: 0, offset: 8, gla: 16, flags: 24 };
    WriteCtrlreg: 24 { index: 0, new_value: 8, old_value: 16 };
    MovToMsr: 24 { msr: 0, new_value: 8, old_value: 16 };
    Debug: 24 { gfn: 0, pending_dbg: 8, insn_length: 16, kind: 20 };
    Cpuid: 16 { insn_length: 0, leaf: 4, subleaf: 8 };
    DescAccess: 24 { instr_info: 0, exit_qualification: 8, descriptor: 16, is_write: 17 };
    PortIo: 8 { bytes: 0, port: 4, r#in: 6, str: 7 };
    SelectorReg: 4;
    RingHead: 64 { req_prod: 0, req_event: 4, rsp_prod: 8, rsp_event: 12 };
    SaveDescriptor: 8 { typecode: 0, instance: 2, length: 4 };
    DomctlMonitor: 144 { cmd: 0, interface_version: 4, domain: 8, op: 16, event: 20 };
    HvmHwCpu: 1032 {
        rax: 512, rsp: 568, rip: 640, rflags: 648, cr0: 656, cr3: 672, cs_sel: 736, gdtr_limit: 804, cs_base: 808,
        gdtr_base: 880, cs_arbytes: 888, shadow_gs: 944, msr_lstar: 960, msr_star: 968, msr_syscall_mask: 984, msr_efer: 992,
        pending_event: 1016, flags: 1024,
    };
    ToolLog: 24 { vmessage: 0, progress: 8, destroy: 16 };
}

// The prefix that 4.14 (104 bytes in all) and 4.16 (112) have in common, and room behind it.
golden! {
    DomainInfo: 256 {
        domain: 0, flags: 4, tot_pages: 8, max_pages: 16, outstanding_pages: 24, shared_info_frame: 48, cpu_time: 56,
        nr_online_vcpus: 64, max_vcpu_id: 68, ssidref: 72, handle: 76, cpupool: 92, rest: 96,
    };
}

// 4.14.
golden! {
    RegsV6: 328 {
        rflags: 128, rip: 152, cr0: 160, msr_efer: 216, gdtr_base: 240, cs_base: 248, fs_base: 264, gs_base: 272, cs: 280,
        shadow_gs: 304, gdtr_limit: 312, cs_sel: 314, gs_sel: 324,
    };
    EventV6: 384 { regs: 56 };
}

// 4.15 to 4.22.
golden! {
    RegsV7: 344 {
        rflags: 128, rip: 152, cr0: 160, msr_efer: 216, gdtr_base: 240, npt_base: 248, vmtrace_pos: 256, cs_base: 264, fs_base: 280,
        gs_base: 288, cs: 296, shadow_gs: 320, gdtr_limit: 328, cs_sel: 330, gs_sel: 340,
    };
    EventV7: 400 { regs: 56 };
}
