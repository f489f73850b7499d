//! Page tables: the walk of 4 and 5 levels, with every page size (Intel SDM vol. 3, 5.5; AMD APM vol. 2, 5.3).

use super::Registers;
use crate::addr::{PAGE_SIZE, Pa, Va};
use crate::error::TranslationFault;

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

/// Most levels page tables have.
const MAX_LEVELS: usize = 5;

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

/// Where a page walk ended, and the entries it went through.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Walk {
    /// The physical address of the byte.
    pub pa: Pa,
    /// Bytes in the page: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: u64,
    /// Whether every level allows writes. Ring 0 is bound by it only with CR0.WP.
    pub writable: bool,
    /// Whether every level allows ring 3.
    pub user: bool,
    /// Whether no level forbids execution.
    pub executable: bool,
    entries: [(Pa, u64); MAX_LEVELS],
    count: u8,
}

impl Walk {
    /// The entries, from the root's down to the leaf: where each lies, and its value.
    #[inline]
    pub fn entries(&self) -> &[(Pa, u64)] {
        self.entries.get(..usize::from(self.count)).unwrap_or(&self.entries)
    }

    /// The entry that maps the page: where it lies, and its value.
    #[inline]
    pub fn leaf(&self) -> (Pa, u64) {
        self.entries().last().copied().unwrap_or_default()
    }

    /// The leaf's level: 1 for 4 KiB, 2 for 2 MiB, 3 for 1 GiB.
    #[inline]
    pub const fn level(&self) -> u8 {
        ((self.page_size.trailing_zeros() - PAGE_SIZE.trailing_zeros()) / 9 + 1) as u8
    }
}

/// The bits that must be clear in an entry of that level, beside NX (Intel SDM vol. 3, figure 5-11 and tables 5-14 to 5-20).
/// Bits 51 and below of an address are never counted as reserved: whether there is memory is the reader's to say.
#[inline]
const fn reserved_bits(level: u8, entry: u64) -> u64 {
    match level {
        // Bits 20 to 13 of a 2 MiB page and 29 to 13 of a 1 GiB page; bit 12 is its PAT bit.
        2 if entry & pte::PS != 0 => 0x001f_e000,
        3 if entry & pte::PS != 0 => 0x3fff_e000,
        4 | 5 => pte::PS,
        _ => 0,
    }
}

/// Translates `va` through the page tables at `root`, as the processor does it.
///
/// `levels` is 5 for five-level tables and anything else for four. `nxe` says whether EFER.NXE is set: without it the NX bit
/// is reserved. `read` gives the eight bytes at a physical address, or `None` where there is no memory; it is called at most
/// once a level, from the root down, whatever the tables hold, so tables that point at themselves do no harm. Nothing is
/// written: accessed and dirty bits, and whether the access is allowed, are the caller's to see to, from the [`Walk`].
///
/// The page itself is not looked at, so it may lie beyond memory. Source: Intel SDM vol. 3, 5.5.4; AMD APM vol. 2, 5.3.
///
/// # Errors
/// The first level that has no present entry, a reserved bit or no memory; or an address that is not canonical.
///
/// ```
/// use vmitap::arch::amd64::{pte, walk};
/// use vmitap::{Pa, Va};
/// // One table that is its own PDPT, with a 1 GiB page in entry 1.
/// let tables = |pa: Pa| match pa.0 {
///     0x1000 => Some(0x1000 | pte::P),
///     0x1008 => Some(0x4000_0000 | pte::P | pte::PS | pte::PAT_LARGE),
///     _ => Some(0),
/// };
/// let found = walk(Pa(0x1000), Va(0x4000_1234), 4, true, tables).unwrap();
/// assert_eq!((found.pa, found.page_size, found.writable), (Pa(0x4000_1234), 1 << 30, false));
/// ```
#[inline]
pub fn walk(root: Pa, va: Va, levels: u8, nxe: bool, mut read: impl FnMut(Pa) -> Option<u64>) -> Result<Walk, TranslationFault> {
    let mut level: u8 = if levels == 5 { 5 } else { 4 };
    let mut shift = 12 + 9 * u32::from(level);
    if !va.is_canonical(shift) {
        return Err(TranslationFault::NonCanonical);
    }
    let mut entries = [(Pa(0), 0); MAX_LEVELS];
    let mut count: u8 = 0;
    let mut table = root.0 & pte::ADDRESS;
    // What all levels allow, and what any level forbids.
    let (mut every, mut any) = (pte::W | pte::U, 0);
    loop {
        shift -= 9;
        let entry_pa = Pa(table | (((va.0 >> shift) & 0x1ff) << 3));
        let entry = read(entry_pa).ok_or(TranslationFault::BeyondMemory { level, pa: entry_pa })?;
        if entry & pte::P == 0 {
            return Err(TranslationFault::NotPresent { level, entry_pa });
        }
        let reserved = reserved_bits(level, entry) | if nxe { 0 } else { pte::NX };
        if entry & reserved != 0 {
            return Err(TranslationFault::ReservedBit { level, entry_pa });
        }
        if let Some(slot) = entries.get_mut(usize::from(count)) {
            *slot = (entry_pa, entry);
        }
        count += 1;
        every &= entry;
        any |= entry;
        // Levels 4 and 5 cannot have PS here: it is reserved there.
        if level == 1 || entry & pte::PS != 0 {
            let inside = (1_u64 << shift) - 1;
            return Ok(Walk {
                pa: Pa((entry & pte::ADDRESS & !inside) | (va.0 & inside)),
                page_size: 1 << shift,
                writable: every & pte::W != 0,
                user: every & pte::U != 0,
                executable: any & pte::NX == 0,
                entries,
                count,
            });
        }
        table = entry & pte::ADDRESS;
        level -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: u64 = pte::P | pte::W | pte::U;

    /// Four tables at 0x1000 to 0x4000, whose first entries lead to a page; `change` says what one entry is instead.
    fn one_page(level: u8, change: u64) -> Result<Walk, TranslationFault> {
        walk(Pa(0x1000), Va(0x123), 4, true, |pa| {
            let at = 5 - (pa.0 >> 12) as u8;
            Some(if at == level { change } else { (pa.0 + 0x1000) | TABLE })
        })
    }

    #[test]
    fn the_pat_bit_of_a_large_page_is_no_part_of_its_address() {
        let found = one_page(2, 0x0060_0000 | TABLE | pte::PS | pte::PAT_LARGE).unwrap();
        assert_eq!((found.pa, found.page_size, found.level()), (Pa(0x0060_0123), 2 << 20, 2));
        let found = one_page(3, 0x4000_0000 | TABLE | pte::PS | pte::PAT_LARGE).unwrap();
        assert_eq!((found.pa, found.page_size, found.level()), (Pa(0x4000_0123), 1 << 30, 3));
    }

    #[test]
    fn bit_seven_of_a_small_leaf_is_its_pat_bit_and_not_a_size() {
        let found = one_page(1, 0x9000 | TABLE | pte::PS).unwrap();
        assert_eq!((found.pa, found.page_size, found.level()), (Pa(0x9123), 4096, 1));
    }

    #[test]
    fn reserved_bits_are_refused_at_the_level_they_are_in() {
        for (level, entry) in [(2, pte::PS | 1 << 13), (2, pte::PS | 1 << 20), (3, pte::PS | 1 << 29), (4, pte::PS)] {
            let entry_pa = Pa((5 - u64::from(level)) << 12);
            assert_eq!(one_page(level, entry | TABLE), Err(TranslationFault::ReservedBit { level, entry_pa }));
        }
        let five = walk(Pa(0x1000), Va(0), 5, true, |_| Some(0x1000 | TABLE | pte::PS));
        assert_eq!(five, Err(TranslationFault::ReservedBit { level: 5, entry_pa: Pa(0x1000) }));
    }

    #[test]
    fn no_execute_is_reserved_until_it_is_enabled() {
        let entry = |_| Some(0x1000 | TABLE | pte::NX);
        let refused = walk(Pa(0x1000), Va(0), 4, false, entry);
        assert_eq!(refused, Err(TranslationFault::ReservedBit { level: 4, entry_pa: Pa(0x1000) }));
        assert!(!walk(Pa(0x1000), Va(0), 4, true, entry).unwrap().executable);
    }

    #[test]
    fn every_level_must_agree_to_writes_and_to_ring_3() {
        for level in 1..=4 {
            let rest = (5 - u64::from(level) + 1) << 12;
            let found = one_page(level, rest | pte::P | pte::U).unwrap();
            assert_eq!((found.writable, found.user, found.executable), (false, true, true));
            let found = one_page(level, rest | pte::P | pte::W | pte::NX).unwrap();
            assert_eq!((found.writable, found.user, found.executable), (true, false, false));
        }
    }

    #[test]
    fn the_entries_on_the_way_are_given_from_the_root_down() {
        let found = one_page(1, 0x9000 | TABLE).unwrap();
        let entries: Vec<u64> = found.entries().iter().map(|(pa, _)| pa.0).collect();
        assert_eq!(entries, [0x1000, 0x2000, 0x3000, 0x4000]);
        assert_eq!(found.leaf(), (Pa(0x4000), 0x9000 | TABLE));
    }

    #[test]
    fn a_table_that_is_its_own_entry_ends_the_walk_after_the_last_level() {
        for levels in [4, 5] {
            let mut reads = 0;
            let found = walk(Pa(0x1000), Va(0), levels, true, |_| {
                reads += 1;
                Some(0x1000 | TABLE)
            });
            assert_eq!((found.unwrap().pa, reads), (Pa(0x1000), levels));
        }
    }

    #[test]
    fn flag_bits_of_the_root_are_ignored() {
        let root = Pa(0x1000 | 0xfff | pte::NX);
        let found = walk(root, Va(0), 4, true, |pa| (pa == Pa(0x1000)).then_some(0x1000 | TABLE));
        assert_eq!(found.unwrap().pa, Pa(0x1000));
    }

    #[test]
    fn memory_that_is_not_there_and_addresses_that_are_none_are_told_apart() {
        assert_eq!(walk(Pa(0x1000), Va(1 << 47), 4, true, |_| Some(1)), Err(TranslationFault::NonCanonical));
        let none = walk(Pa(0x1000), Va(1 << 47), 5, true, |_| None);
        assert_eq!(none, Err(TranslationFault::BeyondMemory { level: 5, pa: Pa(0x1000) }));
        let last = walk(Pa(0x1000), Va(u64::MAX), 4, true, |_| Some(0));
        assert_eq!(last, Err(TranslationFault::NotPresent { level: 4, entry_pa: Pa(0x1ff8) }));
    }
}
