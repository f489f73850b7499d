//! `VmiCore`: a driver with the reads, writes and translations every tool needs.

use std::cell::Cell;

use crate::addr::{PAGE_SIZE, Pa, Va};
use crate::arch::amd64::{AddressContext, Walk, walk};
use crate::bytes::GuestBytes;
use crate::driver::VmiDriver;
use crate::error::{Result, TranslationFault, VmiError};

/// Pages whose translation is remembered; a power of two. 40 bytes each.
const CACHE_SLOTS: usize = 1024;
/// Bytes of physical memory read in one go: memory is taken for no more than this beyond what was there.
const READ_STEP: usize = 1 << 20;
/// Bytes looked at in one go while the end of a string is searched.
const STRING_STEP: usize = 256;

/// One remembered translation of a 4 KiB page.
#[derive(Clone, Copy)]
struct Slot {
    /// The cache's generation when it was stored; 0 is never a generation.
    generation: u64,
    context: AddressContext,
    page: Va,
    frame: Pa,
}

/// Translations, each at the one place its address and context lead to: bounded, and forgotten as a whole at no cost.
struct Cache {
    slots: Box<[Cell<Slot>]>,
    generation: Cell<u64>,
}

impl Cache {
    fn new() -> Self {
        let none = Slot { generation: 0, context: AddressContext::new(Pa(0)), page: Va(0), frame: Pa(0) };
        Self { slots: vec![Cell::new(none); CACHE_SLOTS].into_boxed_slice(), generation: Cell::new(1) }
    }

    #[inline]
    fn slot(&self, page: Va, context: AddressContext) -> Option<&Cell<Slot>> {
        // Fibonacci hashing: the product's upper bits depend on every bit of the key.
        let key = (page.0 >> 12) ^ context.root.0 ^ u64::from(context.levels);
        let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - CACHE_SLOTS.trailing_zeros());
        self.slots.get(hash as usize)
    }

    #[inline]
    fn get(&self, page: Va, context: AddressContext) -> Option<Pa> {
        let slot = self.slot(page, context)?.get();
        (slot.page == page && slot.context == context && slot.generation == self.generation.get()).then_some(slot.frame)
    }

    fn put(&self, page: Va, context: AddressContext, frame: Pa) {
        if let Some(slot) = self.slot(page, context) {
            slot.set(Slot { generation: self.generation.get(), context, page, frame });
        }
    }

    fn forget(&self) {
        self.generation.set(self.generation.get() + 1);
    }
}

/// An address to read from: physical, or virtual under some page tables.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Address {
    /// A guest-physical address.
    Physical(Pa),
    /// A guest-virtual address, and what it means.
    Virtual(Va, AddressContext),
}

impl From<Pa> for Address {
    fn from(pa: Pa) -> Self {
        Self::Physical(pa)
    }
}

impl From<(Va, AddressContext)> for Address {
    fn from((va, context): (Va, AddressContext)) -> Self {
        Self::Virtual(va, context)
    }
}

/// Why a string that was read with a `_prefix` function ends where it does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StringEnd {
    /// The terminator was found: this is all of it.
    Terminator,
    /// The caller's limit was reached: there is more.
    Limit,
    /// What comes next cannot be read.
    Fault(VmiError),
}

/// A driver, and what is built on its reads and writes.
///
/// Everything that takes a [`Va`] translates it with page tables as they are in guest memory now, whatever the guest is doing:
/// no rights are checked, nothing is marked accessed, and no fault is raised in the guest. Memory is what the default view
/// shows. A page above [`crate::driver::VmInfo::memory_size`] has no translation, so a guest cannot make us read frames that are ours.
///
/// # The translation cache
/// Translations of 4 KiB pages are remembered, at most 1,024 of them, so that repeated reads during one event cost one
/// look-up each. All are forgotten at every use of [`VmiCore::driver_mut`] (which is the only way to let the guest run), at every
/// write through this type, and at [`VmiCore::invalidate`]. Only where the guest runs although nobody waits for it (another
/// vCPU of a live machine) can one be older than guest memory, like in a processor's own TLB: call `invalidate` first there.
///
/// ```
/// # #[cfg(feature = "mock")] {
/// use vmitap::driver::mock::{MockDriver, PageSize};
/// use vmitap::{Pa, Va, arch::amd64::pte, core::VmiCore};
/// # fn main() -> vmitap::Result<()> {
/// let mut driver = MockDriver::new(1 << 20, 1);
/// let context = driver.new_root(4)?;
/// driver.map(context, Va(0x40_0000), Pa(0x3000), PageSize::Size4K, pte::P)?;
/// driver.poke(Pa(0x3010), b"hello\0")?;
/// let vm = VmiCore::new(Box::new(driver));
/// assert_eq!(vm.translate(Va(0x40_0010), context)?, Pa(0x3010));
/// assert_eq!(&vm.read_cstr(Va(0x40_0010), context, 64)?[..], b"hello");
/// # Ok(()) } main().unwrap(); }
/// ```
pub struct VmiCore<D: VmiDriver + ?Sized> {
    cache: Cache,
    driver: Box<D>,
}

macro_rules! integers {
    ($($type:ty: $read:ident, $read_pa:ident, $write:ident;)+) => {
        impl<D: VmiDriver + ?Sized> VmiCore<D> {
            $(
                #[doc = concat!("Reads a little-endian `", stringify!($type), "` at `va`, which may cross pages. Errors as [`VmiCore::read`].")]
                #[inline]
                pub fn $read(&self, va: Va, context: AddressContext) -> Result<$type> {
                    let mut bytes = [0; size_of::<$type>()];
                    self.read(va, context, &mut bytes)?;
                    Ok(<$type>::from_le_bytes(bytes))
                }

                #[doc = concat!("Reads a little-endian `", stringify!($type), "` at `pa`. Errors as [`VmiCore::read_pa`].")]
                #[inline]
                pub fn $read_pa(&self, pa: Pa) -> Result<$type> {
                    let mut bytes = [0; size_of::<$type>()];
                    self.read_pa(pa, &mut bytes)?;
                    Ok(<$type>::from_le_bytes(bytes))
                }

                #[doc = concat!("Writes a little-endian `", stringify!($type), "` at `va`. Effect and errors as [`VmiCore::write`].")]
                pub fn $write(&mut self, va: Va, context: AddressContext, value: $type) -> Result<()> {
                    self.write(va, context, &value.to_le_bytes())
                }
            )+
        }
    };
}

integers! {
    u8: read_u8, read_pa_u8, write_u8;
    u16: read_u16, read_pa_u16, write_u16;
    u32: read_u32, read_pa_u32, write_u32;
    u64: read_u64, read_pa_u64, write_u64;
}

impl<D: VmiDriver + ?Sized> VmiCore<D> {
    /// Takes over a driver.
    pub fn new(driver: Box<D>) -> Self {
        Self { cache: Cache::new(), driver }
    }

    /// The driver.
    #[inline]
    pub fn driver(&self) -> &D {
        &self.driver
    }

    /// The driver, to change the guest or let it run. Forgets every remembered translation.
    #[inline]
    pub fn driver_mut(&mut self) -> &mut D {
        self.cache.forget();
        &mut self.driver
    }

    /// Gives the driver back.
    pub fn into_driver(self) -> Box<D> {
        self.driver
    }

    /// Forgets every remembered translation. Needed only where the guest runs although nobody waits for it.
    #[inline]
    pub fn invalidate(&self) {
        self.cache.forget();
    }

    /// The physical address `va` has.
    ///
    /// # Errors
    /// [`VmiError::Translation`] if it has none, also if the page lies beyond guest memory; whatever the driver's read fails with.
    #[inline]
    pub fn translate(&self, va: Va, context: AddressContext) -> Result<Pa> {
        let page = va.page();
        let frame = match self.cache.get(page, context) {
            Some(frame) => frame,
            None => self.translate_page(page, va, context)?,
        };
        Ok(Pa(frame.0 | va.page_offset()))
    }

    #[cold]
    fn translate_page(&self, page: Va, va: Va, context: AddressContext) -> Result<Pa> {
        let frame = self.walk(va, context)?.pa.page();
        if frame.0 >= self.memory_size() {
            return Err(Self::no_translation(va, context, TranslationFault::BeyondMemory { level: 0, pa: frame }));
        }
        self.cache.put(page, context, frame);
        Ok(frame)
    }

    /// Walks the page tables for `va`, always anew. The page found may lie beyond guest memory.
    ///
    /// The NX bit is taken as one (EFER.NXE is not looked at).
    ///
    /// # Errors
    /// [`VmiError::Translation`] if it is not mapped; whatever the driver's read fails with.
    pub fn walk(&self, va: Va, context: AddressContext) -> Result<Walk> {
        let end = self.memory_size();
        let mut failure = None;
        let read = |entry_pa: Pa| {
            // An entry is aligned to its size, so one that begins in memory ends there.
            let mut entry = [0; 8];
            if entry_pa.0 >= end {
                return None;
            }
            match self.driver.read(entry_pa, &mut entry) {
                Ok(()) => Some(u64::from_le_bytes(entry)),
                Err(error) => {
                    failure = Some(error);
                    None
                }
            }
        };
        walk(context.root, va, context.levels, true, read).map_err(|fault| match failure {
            // A hole in guest memory is no memory; anything else is not the tables' fault.
            None | Some(VmiError::OutOfRange { .. }) => Self::no_translation(va, context, fault),
            Some(error) => error,
        })
    }

    /// Fills `buf` from physical memory.
    ///
    /// # Errors
    /// [`VmiError::OutOfRange`] beyond memory; whatever the driver's read fails with.
    #[inline]
    pub fn read_pa(&self, pa: Pa, buf: &mut [u8]) -> Result<()> {
        self.driver.read(pa, buf)
    }

    /// Writes all of `bytes` to physical memory, or nothing. Forgets every remembered translation.
    ///
    /// # Errors
    /// [`VmiError::OutOfRange`] beyond memory; whatever the driver's write fails with.
    pub fn write_pa(&mut self, pa: Pa, bytes: &[u8]) -> Result<()> {
        self.driver_mut().write(pa, bytes)
    }

    /// Fills `buf` from virtual memory, across as many pages as it takes. After an error the content of `buf` is undefined.
    ///
    /// # Errors
    /// As [`VmiCore::translate`], with the first address that has no translation; as [`VmiCore::read_pa`].
    #[inline]
    pub fn read(&self, va: Va, context: AddressContext, buf: &mut [u8]) -> Result<()> {
        if buf.len() as u64 <= va.page_rest() {
            return if buf.is_empty() { Ok(()) } else { self.driver.read(self.translate(va, context)?, buf) };
        }
        let mut rest = buf;
        for piece in pieces(va, context, rest.len())? {
            let (now, later) = rest.split_at_mut(piece.len);
            self.driver.read(self.translate(piece.va, context)?, now)?;
            rest = later;
        }
        Ok(())
    }

    /// Writes all of `bytes` to virtual memory, across as many pages as it takes. Forgets every remembered translation.
    ///
    /// Everything is translated before the first byte is written. If the driver then fails on a later page, the pages before it
    /// get their old content back. Rights in the page tables are not looked at.
    ///
    /// # Errors
    /// As [`VmiCore::translate`] and [`VmiCore::write_pa`], with nothing written; [`VmiError::UndoFailed`] if putting back fails too.
    pub fn write(&mut self, va: Va, context: AddressContext, bytes: &[u8]) -> Result<()> {
        let mut spans: Vec<(Pa, &[u8], Vec<u8>)> = Vec::new();
        let mut rest = bytes;
        for piece in pieces(va, context, bytes.len())? {
            let (now, later) = rest.split_at(piece.len);
            spans.push((self.translate(piece.va, context)?, now, Vec::new()));
            rest = later;
        }
        // What the last one overwrites is never put back: it is written whole or not at all.
        for (pa, new, old) in spans.iter_mut().rev().skip(1) {
            old.resize(new.len(), 0);
            self.driver.read(*pa, old)?;
        }
        for (index, (pa, new, _)) in spans.iter().enumerate() {
            if let Err(cause) = self.driver_mut().write(*pa, new) {
                return Err(self.put_back(cause, spans.get(..index).unwrap_or_default()));
            }
        }
        Ok(())
    }

    /// Undoes the spans that were written before `cause` happened.
    fn put_back(&mut self, cause: VmiError, written: &[(Pa, &[u8], Vec<u8>)]) -> VmiError {
        let mut left = Vec::new();
        for (pa, _, old) in written.iter().rev() {
            if let Err(error) = self.driver_mut().write(*pa, old) {
                left.push(format!("{} new bytes at {pa} ({error})", old.len()));
            }
        }
        cause.and_left(&left)
    }

    /// Reads `len` bytes from a physical or virtual address.
    ///
    /// # Errors
    /// As [`VmiCore::read`] or [`VmiCore::read_pa`]. A range that is not all there takes no more memory than what is there.
    pub fn read_bytes(&self, address: impl Into<Address>, len: usize) -> Result<GuestBytes> {
        let mut bytes = Vec::new();
        match address.into() {
            Address::Physical(pa) => {
                let end = self.memory_size();
                // Frames lie above guest memory, and are read one at a time; only a longer range can be a mistake in `len`.
                if len as u64 > end.saturating_add(PAGE_SIZE) {
                    return Err(VmiError::OutOfRange { pa, len: len as u64, end: Pa(end) });
                }
                loop {
                    let from = bytes.len();
                    bytes.resize(len.min(from + READ_STEP), 0);
                    // One that would wrap is beyond memory as well.
                    let at = Pa(pa.0.saturating_add(from as u64));
                    self.driver.read(at, bytes.get_mut(from..).unwrap_or_default()).map_err(|error| match error {
                        VmiError::OutOfRange { end, .. } => VmiError::OutOfRange { pa, len: len as u64, end },
                        VmiError::NotInDump { pa: missing, .. } => {
                            let len = pa.0.saturating_add(len as u64).saturating_sub(missing.0);
                            VmiError::NotInDump { pa: missing, len }
                        }
                        other => other,
                    })?;
                    if bytes.len() == len {
                        break;
                    }
                }
            }
            Address::Virtual(va, context) => {
                for piece in pieces(va, context, len)? {
                    let pa = self.translate(piece.va, context)?;
                    let from = bytes.len();
                    bytes.resize(from + piece.len, 0);
                    self.driver.read(pa, bytes.get_mut(from..).unwrap_or_default())?;
                }
            }
        }
        Ok(bytes.into())
    }

    /// Many reads in one call, each with a result of its own, in the same order. One that fails does not keep the others back.
    pub fn read_scatter(&self, reads: &[(Address, usize)]) -> Vec<Result<GuestBytes>> {
        reads.iter().map(|&(address, len)| self.read_bytes(address, len)).collect()
    }

    /// Reads a string that ends in a zero byte, without that byte, across any number of pages. No page behind its end is looked at.
    ///
    /// # Errors
    /// [`VmiError::StringTooLong`] if none of the first `limit` bytes is zero; as [`VmiCore::read`] if the string runs into a
    /// page that cannot be read.
    pub fn read_cstr(&self, va: Va, context: AddressContext, limit: usize) -> Result<GuestBytes> {
        Self::whole(va, limit, self.string::<1>(va, context, limit))
    }

    /// As [`VmiCore::read_cstr`], but what could be read is returned in every case, with the reason why it ends there.
    pub fn read_cstr_prefix(&self, va: Va, context: AddressContext, limit: usize) -> (GuestBytes, StringEnd) {
        self.string::<1>(va, context, limit)
    }

    /// Reads a little-endian UTF-16 string that ends in a zero unit, without that unit, across any number of pages: an even number
    /// of bytes, for [`GuestBytes::to_utf16_lossy`]. `va` need not be even; `limit` is in bytes.
    ///
    /// # Errors
    /// As [`VmiCore::read_cstr`].
    pub fn read_utf16(&self, va: Va, context: AddressContext, limit: usize) -> Result<GuestBytes> {
        Self::whole(va, limit, self.string::<2>(va, context, limit))
    }

    /// As [`VmiCore::read_utf16`], but what could be read is returned in every case, in whole units, with the reason why it ends there.
    pub fn read_utf16_prefix(&self, va: Va, context: AddressContext, limit: usize) -> (GuestBytes, StringEnd) {
        self.string::<2>(va, context, limit)
    }

    fn whole(va: Va, limit: usize, (bytes, end): (GuestBytes, StringEnd)) -> Result<GuestBytes> {
        match end {
            StringEnd::Terminator => Ok(bytes),
            StringEnd::Limit => Err(VmiError::StringTooLong { va, limit }),
            StringEnd::Fault(error) => Err(error),
        }
    }

    /// Reads up to a unit of `UNIT` zero bytes, within `limit` bytes.
    fn string<const UNIT: usize>(&self, va: Va, context: AddressContext, limit: usize) -> (GuestBytes, StringEnd) {
        let mut bytes = Vec::new();
        // Units before this offset are known not to be the terminator.
        let mut searched = 0;
        let end = loop {
            let room = limit - bytes.len();
            if room == 0 {
                break StringEnd::Limit;
            }
            let mut step = [0; STRING_STEP];
            let at = va
                .checked_add(bytes.len() as u64)
                .ok_or_else(|| Self::no_translation(va, context, TranslationFault::NonCanonical));
            let got = at.and_then(|at| {
                let len = room.min(STRING_STEP).min(at.page_rest() as usize);
                let now = step.get_mut(..len).unwrap_or_default();
                self.driver.read(self.translate(at, context)?, now)?;
                Ok(now)
            });
            match got {
                Ok(now) => bytes.extend_from_slice(now),
                Err(error) => break StringEnd::Fault(error),
            }
            let (units, _) = bytes.get(searched..).unwrap_or_default().as_chunks::<UNIT>();
            if let Some(index) = units.iter().position(|unit| unit.iter().all(|byte| *byte == 0)) {
                bytes.truncate(searched + index * UNIT);
                break StringEnd::Terminator;
            }
            searched += units.len() * UNIT;
        };
        bytes.truncate(bytes.len() / UNIT * UNIT);
        (bytes.into(), end)
    }

    #[inline]
    fn memory_size(&self) -> u64 {
        self.driver.info().memory_size
    }

    fn no_translation(va: Va, context: AddressContext, fault: TranslationFault) -> VmiError {
        VmiError::Translation { va, root: context.root, fault }
    }
}

/// The part of a range that lies in one page.
struct Piece {
    va: Va,
    len: usize,
}

/// Cuts a range at page boundaries. An error if it reaches past the end of the address space.
fn pieces(va: Va, context: AddressContext, len: usize) -> Result<impl Iterator<Item = Piece>> {
    let last = (len as u64).saturating_sub(1);
    if va.checked_add(last).is_none() {
        let fault = TranslationFault::NonCanonical;
        return Err(VmiError::Translation { va: Va(u64::MAX), root: context.root, fault });
    }
    let mut done = 0;
    Ok(std::iter::from_fn(move || {
        let rest = len.checked_sub(done).filter(|rest| *rest > 0)?;
        let at = va.checked_add(done as u64)?;
        let now = rest.min(at.page_rest() as usize);
        done += now;
        Some(Piece { va: at, len: now })
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_and_pages_that_share_a_place_in_the_cache_are_never_mixed_up() {
        let cache = Cache::new();
        let keys = || (0..4 * CACHE_SLOTS as u64).map(|n| (Va((n % 3) << 12), AddressContext { root: Pa(n << 12), levels: 4 }));
        for (page, context) in keys() {
            cache.put(page, context, context.root);
        }
        let kept = keys()
            .filter(|(page, context)| cache.get(*page, *context).inspect(|frame| assert_eq!(*frame, context.root)).is_some());
        let kept = kept.count();
        assert!((CACHE_SLOTS / 2..=CACHE_SLOTS).contains(&kept), "{kept}");
        cache.forget();
        assert!(keys().all(|(page, context)| cache.get(page, context).is_none()));
    }
}
