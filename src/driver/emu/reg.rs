//! Register numbers of the engine (x86.h, `uc_x86_reg`).

pub const CS: i32 = 11;
pub const EFLAGS: i32 = 25;
pub const RAX: i32 = 35;
pub const RIP: i32 = 41;
pub const CR0: i32 = 50;
pub const CR2: i32 = 52;
pub const CR3: i32 = 53;
pub const CR4: i32 = 54;
pub const DR6: i32 = 72;
pub const R15: i32 = 113;
pub const IDTR: i32 = 242;
pub const GDTR: i32 = 243;
pub const TR: i32 = 245;
pub const MSR: i32 = 248;
pub const FS_BASE: i32 = 250;
pub const GS_BASE: i32 = 251;
