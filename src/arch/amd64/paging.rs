//! Page tables: the walk of 4 and 5 levels, with every page size (Intel SDM vol. 3, 5.5; AMD APM vol. 2, 5.3).

use super::Registers;
use crate::addr::Pa;

/// Bits of a page-table entry (Intel SDM vol. 3, tables 5-15 to 5-20).
pub mod pte {
    /// Present.
    pub const P: u64 = 1 << 0;
    /// Writable.
    pub const W: u64 = 1 << 1;
    /// Usable by ring 3.
    pub const U: u64 = 1 << 2;
    /// Accessed.
    pub const A: u64 = 1 << 5;
    /// Dirty; of a leaf only.
    pub const D: u64 = 1 << 6;
    /// A large page; at levels 2 and 3 only. In a 4 KiB leaf this bit is a PAT index bit.
    pub const PS: u64 = 1 << 7;
    /// Global; of a leaf only.
    pub const G: u64 = 1 << 8;
    /// PAT index bit of a large page, just below its address.
    pub const PAT_LARGE: u64 = 1 << 12;
    /// No execution; reserved unless EFER.NXE is set.
    pub const NX: u64 = 1 << 63;
    /// The bits that can be a physical address: 51 to 12.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// What a virtual address means: the root of the page tables and how many levels they have.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AddressContext {
    /// The root of the page tables: CR3 without its PCID and flag bits.
    pub root: Pa,
    /// Levels of the tables: 4 or 5.
    pub levels: u8,
}

impl AddressContext {
    /// The context with that root and 4 levels of tables.
    pub const fn new(root: Pa) -> Self {
        Self { root, levels: 4 }
    }
}

impl From<&Registers> for AddressContext {
    /// The context a vCPU with these registers is in.
    fn from(registers: &Registers) -> Self {
        Self { root: registers.root(), levels: registers.paging_levels() }
    }
}
