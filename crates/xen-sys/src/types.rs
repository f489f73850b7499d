//! Types and constants of Xen's public headers. The comment at each group names the header (xen/include/public/... in Xen's tree).

use std::ffi::{c_char, c_int, c_void};

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;

/// vm_event.h: why a request was sent.
#[expect(missing_docs, reason = "the names are the header's, without VM_EVENT_REASON_")]
pub mod reason {
    pub const MEM_ACCESS: u32 = 1;
    pub const WRITE_CTRLREG: u32 = 4;
    pub const MOV_TO_MSR: u32 = 5;
    pub const SOFTWARE_BREAKPOINT: u32 = 6;
    pub const SINGLESTEP: u32 = 7;
    pub const GUEST_REQUEST: u32 = 8;
    pub const DEBUG_EXCEPTION: u32 = 9;
    pub const CPUID: u32 = 10;
    pub const PRIVILEGED_CALL: u32 = 11;
    pub const INTERRUPT: u32 = 12;
    pub const DESCRIPTOR_ACCESS: u32 = 13;
    pub const EMUL_UNIMPLEMENTED: u32 = 14;
    pub const VMEXIT: u32 = 15;
    pub const IO: u32 = 16;
}

/// vm_event.h: flags of requests and responses.
#[expect(missing_docs, reason = "the names are the header's, without VM_EVENT_FLAG_")]
pub mod flag {
    pub const VCPU_PAUSED: u32 = 1 << 0;
    pub const FOREIGN: u32 = 1 << 1;
    pub const EMULATE: u32 = 1 << 2;
    pub const EMULATE_NOWRITE: u32 = 1 << 3;
    pub const TOGGLE_SINGLESTEP: u32 = 1 << 4;
    pub const SET_EMUL_READ_DATA: u32 = 1 << 5;
    pub const DENY: u32 = 1 << 6;
    pub const ALTERNATE_P2M: u32 = 1 << 7;
    pub const SET_REGISTERS: u32 = 1 << 8;
    pub const SET_EMUL_INSN_DATA: u32 = 1 << 9;
    pub const GET_NEXT_INTERRUPT: u32 = 1 << 10;
    /// Since 4.14.
    pub const FAST_SINGLESTEP: u32 = 1 << 11;
    /// Since 4.15.
    pub const NESTED_P2M: u32 = 1 << 12;
}

/// vm_event.h: flags of a memory access.
#[expect(missing_docs, reason = "the names are the header's, without MEM_ACCESS_")]
pub mod mem_access {
    pub const R: u32 = 1 << 0;
    pub const W: u32 = 1 << 1;
    pub const X: u32 = 1 << 2;
    pub const GLA_VALID: u32 = 1 << 3;
    pub const FAULT_WITH_GLA: u32 = 1 << 4;
    pub const FAULT_IN_GPT: u32 = 1 << 5;
}

/// vm_event.h: the index of a control register.
#[expect(missing_docs, reason = "the names are the header's")]
pub mod ctrlreg {
    pub const CR0: u16 = 0;
    pub const CR3: u16 = 1;
    pub const CR4: u16 = 2;
}

/// memory.h: access rights of a page. `default` is not here: it is 10 up to 4.19 and 11 from 4.20 on, and nobody needs it.
#[expect(missing_docs, reason = "the names are the header's, without XENMEM_access_")]
pub mod access {
    use std::ffi::c_int;

    pub const N: c_int = 0;
    pub const R: c_int = 1;
    pub const W: c_int = 2;
    pub const RW: c_int = 3;
    pub const X: c_int = 4;
    pub const RX: c_int = 5;
    pub const WX: c_int = 6;
    pub const RWX: c_int = 7;
}

/// domctl.h: the bits of `xc_monitor_get_capabilities`, XEN_DOMCTL_MONITOR_EVENT_*.
#[expect(missing_docs, reason = "the names are the header's")]
pub mod monitor_event {
    pub const WRITE_CTRLREG: u32 = 0;
    pub const MOV_TO_MSR: u32 = 1;
    pub const SINGLESTEP: u32 = 2;
    pub const SOFTWARE_BREAKPOINT: u32 = 3;
    pub const GUEST_REQUEST: u32 = 4;
    pub const DEBUG_EXCEPTION: u32 = 5;
    pub const CPUID: u32 = 6;
    pub const DESC_ACCESS: u32 = 9;
    pub const EMUL_UNIMPLEMENTED: u32 = 10;
}

/// domctl.h: XEN_DOMINF_*.
#[expect(missing_docs, reason = "the names are the header's")]
pub mod dominf {
    pub const DYING: u32 = 1 << 0;
    pub const HVM_GUEST: u32 = 1 << 1;
    pub const SHUTDOWN: u32 = 1 << 2;
    pub const PAUSED: u32 = 1 << 3;
    pub const HAP: u32 = 1 << 8;
    pub const SHUTDOWN_SHIFT: u32 = 16;
    pub const SHUTDOWN_MASK: u32 = 255;
}

/// hvm/params.h: HVM_PARAM_ALTP2M.
pub const HVM_PARAM_ALTP2M: u32 = 35;
/// hvm/params.h: XEN_ALTP2M_external.
pub const ALTP2M_EXTERNAL: u64 = 2;

/// dm_op.h: XEN_DMOP_EVENT_*, the same numbers as the processor's event types.
#[expect(missing_docs, reason = "the names are the header's")]
pub mod event_type {
    pub const EXT_INT: u8 = 0;
    pub const HW_EXC: u8 = 3;
    pub const SW_INT: u8 = 4;
    pub const SW_EXC: u8 = 6;
}

/// dm_op.h: the error code of an event that has none.
pub const NO_ERROR_CODE: u32 = u32::MAX;

/// version.h: XENVER_version; the result is the major number in the high half and the minor one in the low half.
pub const XENVER_VERSION: c_int = 0;
/// version.h: XENVER_extraversion, a [`EXTRAVERSION_LEN`] byte string such as `".5"`.
pub const XENVER_EXTRAVERSION: c_int = 1;
/// version.h: bytes of the extra version.
pub const EXTRAVERSION_LEN: usize = 16;
/// version.h: XENVER_commandline, a [`COMMANDLINE_LEN`] byte string.
pub const XENVER_COMMANDLINE: c_int = 9;
/// version.h: bytes of the command line.
pub const COMMANDLINE_LEN: usize = 1024;

/// domctl.h: XEN_DOMCTL_monitor_op, the same number from 4.11 on.
pub const DOMCTL_MONITOR_OP: u32 = 77;
/// domctl.h: XEN_DOMCTL_MONITOR_OP_CONTROL_REGISTERS (4.14): a denied register write is then not done. No library function has it.
pub const MONITOR_OP_CONTROL_REGISTERS: u32 = 4;

/// arch-x86/hvm/save.h: the type of the header's record.
pub const HVM_SAVE_HEADER: u16 = 1;
/// arch-x86/hvm/save.h: the type of a vCPU's record.
pub const HVM_SAVE_CPU: u16 = 2;
/// hvm/save.h: the type of the record that ends a context.
pub const HVM_SAVE_END: u16 = 0;

/// vm_event.h: `vm_event_x86_selector_reg`: the limit in the low 20 bits (in pages if the G bit is set), the attributes above.
#[repr(transparent)]
#[derive(Clone, Copy, Default, Debug)]
pub struct SelectorReg(pub u32);

impl SelectorReg {
    /// The limit in bytes.
    pub const fn limit(self) -> u32 {
        let limit = self.0 & 0xf_ffff;
        if self.attributes() & 0x800 != 0 { limit << 12 | 0xfff } else { limit }
    }

    /// The attributes: type, S, DPL, P in the low byte; AVL, L, D/B, G in the four bits above.
    pub const fn attributes(self) -> u16 {
        (self.0 >> 20) as u16
    }
}

macro_rules! regs {
    ($(#[$doc:meta])* $name:ident { $($inserted:ident),* }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Default, Debug)]
        #[expect(missing_docs, reason = "the names are the registers'")]
        pub struct $name {
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
            pub rflags: u64,
            pub dr6: u64,
            pub dr7: u64,
            pub rip: u64,
            pub cr0: u64,
            pub cr2: u64,
            pub cr3: u64,
            pub cr4: u64,
            pub sysenter_cs: u64,
            pub sysenter_esp: u64,
            pub sysenter_eip: u64,
            pub msr_efer: u64,
            pub msr_star: u64,
            pub msr_lstar: u64,
            pub gdtr_base: u64,
            $(pub $inserted: u64,)*
            pub cs_base: u32,
            pub ss_base: u32,
            pub ds_base: u32,
            pub es_base: u32,
            pub fs_base: u64,
            pub gs_base: u64,
            pub cs: SelectorReg,
            pub ss: SelectorReg,
            pub ds: SelectorReg,
            pub es: SelectorReg,
            pub fs: SelectorReg,
            pub gs: SelectorReg,
            pub shadow_gs: u64,
            pub gdtr_limit: u16,
            pub cs_sel: u16,
            pub ss_sel: u16,
            pub ds_sel: u16,
            pub es_sel: u16,
            pub fs_sel: u16,
            pub gs_sel: u16,
            pub pad: u16,
        }
    };
}

regs! {
    /// vm_event.h, version 6 (4.14): `vm_event_regs_x86`.
    RegsV6 {}
}
regs! {
    /// vm_event.h, version 7 (4.15 and later): `vm_event_regs_x86`.
    RegsV7 { npt_base, vmtrace_pos }
}

/// vm_event.h: `vm_event_mem_access`.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
#[expect(missing_docs, reason = "the names are the header's")]
pub struct MemAccess {
    pub gfn: u64,
    pub offset: u64,
    pub gla: u64,
    pub flags: u32,
    pub pad: u32,
}

/// vm_event.h: `vm_event_write_ctrlreg`.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
#[expect(missing_docs, reason = "the names are the header's")]
pub struct WriteCtrlreg {
    pub index: u32,
    pub pad: u32,
    pub new_value: u64,
    pub old_value: u64,
}

/// vm_event.h: `vm_event_mov_to_msr`.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
#[expect(missing_docs, reason = "the names are the header's")]
pub struct MovToMsr {
    pub msr: u64,
    pub new_value: u64,
    pub old_value: u64,
}

/// vm_event.h, version 6 and later: `vm_event_debug`, of a software breakpoint.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
#[expect(missing_docs, reason = "the names are the header's")]
pub struct Debug {
    pub gfn: u64,
    pub pending_dbg: u64,
    pub insn_length: u32,
    pub kind: u8,
    pub pad: [u8; 3],
}

/// vm_event.h: `vm_event_cpuid`.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
#[expect(missing_docs, reason = "the names are the header's")]
pub struct Cpuid {
    pub insn_length: u32,
    pub leaf: u32,
    pub subleaf: u32,
    pub pad: u32,
}

/// vm_event.h: `vm_event_desc_access`.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
#[expect(missing_docs, reason = "the names are the header's")]
pub struct DescAccess {
    pub instr_info: u32,
    pub pad1: u32,
    pub exit_qualification: u64,
    pub descriptor: u8,
    pub is_write: u8,
    pub pad: [u8; 6],
}

/// vm_event.h: `vm_event_io`, since 4.18.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
#[expect(missing_docs, reason = "the names are the header's")]
pub struct PortIo {
    pub bytes: u32,
    pub port: u16,
    pub r#in: u8,
    pub str: u8,
}

/// vm_event.h: VM_EVENT_DESC_*.
#[expect(missing_docs, reason = "the names are the header's")]
pub mod descriptor {
    pub const IDTR: u8 = 1;
    pub const GDTR: u8 = 2;
    pub const LDTR: u8 = 3;
    pub const TR: u8 = 4;
}

/// vm_event.h: what `vm_event_st` has in front of the registers, in every version.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
#[expect(missing_docs, reason = "the names are the header's")]
pub struct EventHead {
    pub version: u32,
    pub flags: u32,
    pub reason: u32,
    pub vcpu_id: u32,
    pub altp2m_idx: u16,
    pub pad: [u16; 3],
    /// The union `u`: its first bytes are one of the structures above, by `reason`.
    pub u: [u64; 4],
}

/// vm_event.h, version 6: `vm_event_st`.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
#[expect(missing_docs, reason = "the names are the header's")]
pub struct EventV6 {
    pub head: EventHead,
    pub regs: RegsV6,
}

/// vm_event.h, version 7: `vm_event_st`.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
#[expect(missing_docs, reason = "the names are the header's")]
pub struct EventV7 {
    pub head: EventHead,
    pub regs: RegsV7,
}

/// io/ring.h: the indices in front of a shared ring.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
#[expect(missing_docs, reason = "the names are the header's")]
pub struct RingHead {
    pub req_prod: u32,
    pub req_event: u32,
    pub rsp_prod: u32,
    pub rsp_event: u32,
    pub pad: [u32; 12],
}

/// domctl.h: what `xen_domctl_getdomaininfo` begins with in every release. It is 104 bytes in 4.14 and 4.15 and 112 from 4.16 on; the
/// buffer handed to the library has room for more.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names are the header's")]
pub struct DomainInfo {
    pub domain: u16,
    pub pad1: u16,
    pub flags: u32,
    pub tot_pages: u64,
    pub max_pages: u64,
    pub outstanding_pages: u64,
    pub shr_pages: u64,
    pub paged_pages: u64,
    pub shared_info_frame: u64,
    pub cpu_time: u64,
    pub nr_online_vcpus: u32,
    pub max_vcpu_id: u32,
    pub ssidref: u32,
    pub handle: [u8; 16],
    pub cpupool: u32,
    /// What differs between releases, and room for releases to come.
    pub rest: [u64; 20],
}

/// domctl.h: `xen_domctl` with `monitor_op` in its union, padded to the whole size.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names are the header's")]
pub struct DomctlMonitor {
    pub cmd: u32,
    /// Filled in by the library.
    pub interface_version: u32,
    pub domain: u16,
    pub pad: [u16; 3],
    pub op: u32,
    pub event: u32,
    pub rest: [u64; 15],
}

/// hvm/save.h: `hvm_save_descriptor`, in front of each record of a context.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
#[expect(missing_docs, reason = "the names are the header's")]
pub struct SaveDescriptor {
    pub typecode: u16,
    pub instance: u16,
    pub length: u32,
}

/// arch-x86/hvm/save.h: `hvm_hw_cpu`, the same in 4.14 to 4.22.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names are the registers'")]
pub struct HvmHwCpu {
    pub fpu_regs: [u8; 512],
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
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
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub dr: [u64; 6],
    pub cs_sel: u32,
    pub ds_sel: u32,
    pub es_sel: u32,
    pub fs_sel: u32,
    pub gs_sel: u32,
    pub ss_sel: u32,
    pub tr_sel: u32,
    pub ldtr_sel: u32,
    pub cs_limit: u32,
    pub ds_limit: u32,
    pub es_limit: u32,
    pub fs_limit: u32,
    pub gs_limit: u32,
    pub ss_limit: u32,
    pub tr_limit: u32,
    pub ldtr_limit: u32,
    pub idtr_limit: u32,
    pub gdtr_limit: u32,
    pub cs_base: u64,
    pub ds_base: u64,
    pub es_base: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ss_base: u64,
    pub tr_base: u64,
    pub ldtr_base: u64,
    pub idtr_base: u64,
    pub gdtr_base: u64,
    pub cs_arbytes: u32,
    pub ds_arbytes: u32,
    pub es_arbytes: u32,
    pub fs_arbytes: u32,
    pub gs_arbytes: u32,
    pub ss_arbytes: u32,
    pub tr_arbytes: u32,
    pub ldtr_arbytes: u32,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub shadow_gs: u64,
    pub msr_flags: u64,
    pub msr_lstar: u64,
    pub msr_star: u64,
    pub msr_cstar: u64,
    pub msr_syscall_mask: u64,
    pub msr_efer: u64,
    pub msr_tsc_aux: u64,
    pub tsc: u64,
    pub pending_event: u32,
    pub error_code: u32,
    pub flags: u32,
    pub pad0: u32,
}

/// xentoollog.h: `xentoollog_logger`. `va_list` is a pointer in the calling conventions of x86-64 and AArch64.
#[repr(C)]
#[derive(Debug)]
pub struct ToolLog {
    /// A line of text.
    pub vmessage: Option<
        unsafe extern "C" fn(
            logger: *mut ToolLog,
            level: c_int,
            errnoval: c_int,
            context: *const c_char,
            format: *const c_char,
            arguments: *mut c_void,
        ),
    >,
    /// Progress of something long.
    pub progress: Option<unsafe extern "C" fn()>,
    /// The end.
    pub destroy: Option<unsafe extern "C" fn(logger: *mut ToolLog)>,
}
