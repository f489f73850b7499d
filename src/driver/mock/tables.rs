//! Page tables built in the mock guest's memory.

use super::MockDriver;
use crate::addr::{PAGE_SIZE, Pa, Va};
use crate::arch::amd64::{AddressContext, pte};
use crate::error::{Result, TranslationFault, VmiError};

/// Size of a page that is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum PageSize {
    /// 4 KiB: the leaf is at level 1.
    Size4K = 1,
    /// 2 MiB: the leaf is at level 2.
    Size2M = 2,
    /// 1 GiB: the leaf is at level 3.
    Size1G = 3,
}

impl PageSize {
    /// The level of the leaf.
    pub const fn level(self) -> u8 {
        self as u8
    }

    /// Bytes.
    pub const fn bytes(self) -> u64 {
        PAGE_SIZE << (9 * (self.level() - 1))
    }
}

/// None of these is recorded as a call, and none can be told to fail.
impl MockDriver {
    /// Makes empty page tables: one zeroed page at the top of guest memory that no table has yet.
    ///
    /// Every table takes such a page, from the top down: keep tests' own data low. An error if memory is used up.
    pub fn new_root(&mut self, levels: u8) -> Result<AddressContext> {
        Ok(AddressContext { root: self.new_table()?, levels })
    }

    /// Maps one page: `va` to `pa`, with `flags` (bits of [`pte`]; `P` is not added) in the leaf; tables in between are made
    /// as needed, present, writable and usable by ring 3. Low bits of `va` and `pa` that lie inside the page are ignored,
    /// and what was mapped there before is replaced. `pa` need not be memory.
    pub fn map(&mut self, context: AddressContext, va: Va, pa: Pa, size: PageSize, flags: u64) -> Result<()> {
        let mut table = context.root;
        let mut level = context.levels;
        while level > size.level() {
            let entry_pa = Self::entry_in(table, va, level);
            let entry = self.peek_u64(entry_pa)?;
            table = if entry & pte::P != 0 && entry & pte::PS == 0 {
                Pa(entry & pte::ADDRESS)
            } else {
                let new = self.new_table()?;
                self.poke(entry_pa, &(new.0 | pte::P | pte::W | pte::U).to_le_bytes())?;
                new
            };
            level -= 1;
        }
        let large = if level > 1 { pte::PS } else { 0 };
        let leaf = (pa.0 & !(size.bytes() - 1)) | flags | large;
        self.poke(Self::entry_in(table, va, level), &leaf.to_le_bytes())
    }

    /// Clears the entry at `level` that maps `va` (1: a 4 KiB page's, 2: a 2 MiB page's or a page table's, and so on).
    pub fn unmap(&mut self, context: AddressContext, va: Va, level: u8) -> Result<()> {
        let entry_pa = self.entry(context, va, level)?;
        self.poke(entry_pa, &[0; 8])
    }

    /// Where the entry at `level` that maps `va` lies. An error if a table above it is not there.
    pub fn entry(&self, context: AddressContext, va: Va, level: u8) -> Result<Pa> {
        let mut table = context.root;
        let mut at = context.levels;
        while at > level {
            let entry_pa = Self::entry_in(table, va, at);
            let entry = self.peek_u64(entry_pa)?;
            if entry & pte::P == 0 || entry & pte::PS != 0 {
                let fault = TranslationFault::NotPresent { level: at, entry_pa };
                return Err(VmiError::Translation { va, root: context.root, fault });
            }
            table = Pa(entry & pte::ADDRESS);
            at -= 1;
        }
        Ok(Self::entry_in(table, va, at))
    }

    fn entry_in(table: Pa, va: Va, level: u8) -> Pa {
        let index = (va.0 >> (12 + 9 * (u32::from(level) - 1))) & 0x1ff;
        Pa(table.0 | (index * 8))
    }

    fn new_table(&mut self) -> Result<Pa> {
        let end = Pa(self.info.memory_size);
        let out = VmiError::OutOfRange { pa: end, len: PAGE_SIZE, end };
        let next = self.tables_from.checked_sub(PAGE_SIZE).ok_or(out)?;
        self.poke(Pa(next), &[0; PAGE_SIZE as usize])?;
        self.tables_from = next;
        Ok(Pa(next))
    }

    fn peek_u64(&self, pa: Pa) -> Result<u64> {
        let mut bytes = [0; 8];
        self.copy_out(pa, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}
