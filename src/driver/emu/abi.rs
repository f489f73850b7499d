//! Numbers and structures of the engine's interface (unicorn.h, x86.h). Its registers are in `reg.rs`.

use std::ffi::c_int;

/// Error codes of the engine (unicorn.h, `uc_err`) that the driver tells apart.
pub mod code {
    pub const OK: i32 = 0;
    pub const INSN_INVALID: i32 = 10;
}

/// The empty range of addresses, by which a hook is asked for at every address.
pub const EVERYWHERE: (u64, u64) = (1, 0);

pub const ARCH_X86: c_int = 4;
pub const MODE_64: c_int = 8;
pub const PROT_ALL: u32 = 7;

pub const HOOK_INTR: c_int = 1 << 0;
pub const HOOK_INSN: c_int = 1 << 1;
pub const HOOK_CODE: c_int = 1 << 2;
pub const HOOK_BLOCK: c_int = 1 << 3;
pub const HOOK_MEM_READ_UNMAPPED: c_int = 1 << 4;
pub const HOOK_MEM_WRITE_UNMAPPED: c_int = 1 << 5;
pub const HOOK_MEM_WRITE: c_int = 1 << 11;
pub const HOOK_TLB_FILL: c_int = 1 << 17;
pub const INSN_IN: c_int = 218;
pub const INSN_OUT: c_int = 500;

pub const MEM_WRITE: c_int = 17;
pub const MEM_FETCH: c_int = 18;
pub const MEM_WRITE_UNMAPPED: c_int = 20;

// uc_ctl's first argument: the request, how many arguments follow (from bit 26), and the direction (from bit 30).
pub const CTL_WRITE: u32 = 1 << 30;
pub const CTL_USE_EXITS: u32 = 4 | 1 << 26 | CTL_WRITE;
pub const CTL_CPU_MODEL: u32 = 7 | 1 << 26 | CTL_WRITE;
pub const CTL_REMOVE_CACHE: u32 = 9 | 2 << 26 | CTL_WRITE;
pub const CTL_FLUSH_TLB: u32 = 0xb | CTL_WRITE;
pub const CTL_TLB_TYPE: u32 = 0xc | 1 << 26 | CTL_WRITE;
pub const CTL_TCG_BUFFER_SIZE: u32 = 0xd | 1 << 26 | CTL_WRITE;
pub const TLB_VIRTUAL: c_int = 1;
pub const CPU_SKYLAKE_CLIENT: c_int = 21;

/// `uc_x86_msr`.
#[repr(C)]
pub struct Msr {
    pub msr: u32,
    pub value: u64,
}

/// `uc_x86_mmr`: a descriptor table register, or TR.
#[repr(C)]
pub struct Table {
    pub selector: u16,
    pub base: u64,
    pub limit: u32,
    pub flags: u32,
}

/// `uc_tlb_entry`.
#[repr(C)]
pub struct TlbEntry {
    pub paddr: u64,
    pub perms: u32,
}
