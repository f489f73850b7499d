//! Where guest memory lies in a dump: runs of it, each as it is.

use std::cmp::Reverse;

use super::source::File;
use crate::addr::{PHYSICAL_BITS, Pa};
use crate::error::{Result, VmiError};

/// Most runs a table of a dump may have. Firmware tells an operating system of a few dozen.
pub const MAX_RUNS: u64 = 1 << 20;

/// A run of guest memory in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// The physical address of its first byte.
    pub pa: u64,
    /// Bytes; not 0.
    pub len: u64,
    /// Where its first byte is in the file.
    pub offset: u64,
}

impl Extent {
    /// One that is as large as it says, in the file and in physical address space. `what` names it in errors.
    pub fn new(file: &File<'_>, (pa, len, offset): (u64, u64, u64), what: &str) -> Result<Self> {
        file.check(len > 0, || format!("{what}: it is empty"))?;
        file.check_range(offset, len, what)?;
        let end = pa.checked_add(len).filter(|end| *end <= 1 << PHYSICAL_BITS);
        file.check(end.is_some(), || format!("{what}: {len:#x} bytes at {pa:#x} reach past physical address space"))?;
        Ok(Self { pa, len, offset })
    }

    /// An error if there is no room for one more: a table that a hole of the file makes long costs nothing on disk.
    pub fn check_room(file: &File<'_>, all: &[Self]) -> Result<()> {
        file.check((all.len() as u64) < MAX_RUNS, || format!("it has more than {MAX_RUNS} runs of memory"))
    }

    const fn end(&self) -> u64 {
        self.pa + self.len
    }

    /// Whether both lie in the file as they lie in memory.
    const fn is_aligned_with(&self, other: &Self) -> bool {
        self.offset.wrapping_sub(self.pa) == other.offset.wrapping_sub(other.pa)
    }
}

/// What is to become of runs that share addresses.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Overlap {
    /// It is an error: which of them is right?
    Refused,
    /// Runs that share the bytes in the file too are one, and of one inside another the larger counts: ELF cores have both, for the same
    /// memory at several virtual addresses. Whether the bytes of the two agree is not looked at.
    Inside,
}

/// Runs that do not overlap, by address. What touches in memory and in the file is one.
#[derive(Debug)]
pub struct Extents(Vec<Extent>);

impl Extents {
    /// # Errors
    /// [`VmiError::Image`] if two overlap and may not, or if there is none.
    pub fn new(file: &File<'_>, mut all: Vec<Extent>, overlap: Overlap) -> Result<Self> {
        file.check(!all.is_empty(), || "it holds no memory".to_owned())?;
        all.sort_unstable_by_key(|extent| (extent.pa, Reverse(extent.len)));
        let mut kept: Vec<Extent> = Vec::new();
        for next in all {
            match kept.last_mut() {
                Some(last) if next.pa < last.end() => {
                    let is_same = next.is_aligned_with(last);
                    let may = overlap == Overlap::Inside && (is_same || next.end() <= last.end());
                    file.check(may, || {
                        format!(
                            "the memory at {:#x} ({:#x} bytes) and at {:#x} ({:#x}) overlaps",
                            last.pa, last.len, next.pa, next.len
                        )
                    })?;
                    last.len = last.len.max(next.end() - last.pa);
                }
                Some(last) if next.pa == last.end() && next.is_aligned_with(last) => last.len += next.len,
                _ => kept.push(next),
            }
        }
        Ok(Self(kept))
    }

    /// The first physical address behind all of them.
    pub fn end(&self) -> u64 {
        self.0.last().map_or(0, Extent::end)
    }

    /// Where `pa` is in the file, and how many bytes follow there.
    fn find(&self, pa: u64) -> Option<(u64, u64)> {
        let index = self.0.partition_point(|extent| extent.pa <= pa).checked_sub(1)?;
        let extent = self.0.get(index)?;
        let inside = pa.checked_sub(extent.pa).filter(|inside| *inside < extent.len)?;
        Some((extent.offset + inside, extent.len - inside))
    }

    /// Fills `buf` from `pa` on.
    ///
    /// # Errors
    /// [`VmiError::NotInDump`] with the first address that is not there; as [`super::Source::read_at`].
    pub fn read(&self, file: &File<'_>, pa: u64, buf: &mut [u8]) -> Result<()> {
        let mut rest = buf;
        let mut at = pa;
        while !rest.is_empty() {
            let missing = VmiError::NotInDump { pa: Pa(at), len: rest.len() as u64 };
            let (offset, there) = self.find(at).ok_or(missing)?;
            let len = rest.len().min(usize::try_from(there).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at_mut(len);
            file.source.read_at(offset, now)?;
            at += len as u64;
            rest = later;
        }
        Ok(())
    }
}
