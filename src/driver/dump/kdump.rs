//! Compressed kdumps (makedumpfile, diskdump_mod.h): a header, a bitmap of the pages there are, and for each of those a descriptor that
//! says where its bytes are and how they are packed.

use parking_lot::Mutex;

use super::elf::{MAX_NOTES, vcpus};
use super::source::{File, Part};
use super::vcpus::Vcpus;
use super::{Contents, Pages};
use crate::addr::{PAGE_SHIFT, PAGE_SIZE, Pa};
use crate::error::{Result, VmiError};

/// How the file begins.
pub const MAGIC: &[u8] = b"KDUMP   ";
/// Most bytes of a bitmap: of 4 TiB of memory.
const MAX_BITMAP: u64 = 128 << 20;
/// Bytes of the bitmap for which the pages before them are counted once.
const STEP: usize = 64;
/// Bytes of a page's descriptor: offset, size, flags of the page and of its memory.
const DESCRIPTOR: u64 = 24;
/// Pages that are kept unpacked.
const KEPT: usize = 64;

/// How a page is packed: bits of its flags. None: not at all.
mod packed {
    pub const ZLIB: u32 = 1;
    pub const LZO: u32 = 2;
    pub const SNAPPY: u32 = 4;
    pub const ZSTD: u32 = 0x20;
}

type Page = [u8; PAGE_SIZE as usize];
/// A page that was unpacked, and its number.
type Unpacked = (u64, Box<Page>);

/// The pages of a kdump.
pub struct Packed {
    /// A bit for each page, the lowest first: whether it is in the file.
    bitmap: Vec<u8>,
    /// How many are before each [`STEP`] of it.
    before: Vec<u64>,
    /// Where the first descriptor is.
    descriptors: u64,
    /// Each at the one place its number leads to.
    kept: Mutex<Vec<Option<Unpacked>>>,
}

fn ones(bytes: &[u8]) -> u64 {
    bytes.iter().map(|byte| u64::from(byte.count_ones())).sum()
}

impl Packed {
    fn new(bitmap: Vec<u8>, descriptors: u64) -> Self {
        let mut count = 0;
        let count_step = |step: &[u8]| {
            let before = count;
            count += ones(step);
            before
        };
        let before = bitmap.chunks(STEP).map(count_step).collect();
        Self { bitmap, before, descriptors, kept: Mutex::new(vec![None; KEPT]) }
    }

    /// How many pages there are.
    fn count(&self) -> u64 {
        ones(&self.bitmap)
    }

    pub fn end(&self) -> u64 {
        let last = self.bitmap.iter().rposition(|byte| *byte != 0);
        let bits = |at: usize| self.bitmap.get(at).map_or(0, |byte| at as u64 * 8 + 8 - u64::from(byte.leading_zeros()));
        last.map_or(0, bits) << PAGE_SHIFT
    }

    /// Which of the descriptors a page has.
    fn index(&self, number: u64) -> Option<u64> {
        let at = usize::try_from(number / 8).ok()?;
        let (byte, bit) = (*self.bitmap.get(at)?, 1_u8 << (number % 8));
        let step = at / STEP;
        let inside = ones(self.bitmap.get(step * STEP..at)?) + u64::from((byte & (bit - 1)).count_ones());
        if byte & bit == 0 { None } else { Some(self.before.get(step)? + inside) }
    }

    fn unpack(&self, file: &File<'_>, number: u64) -> Result<Option<Box<Page>>> {
        let Some(index) = self.index(number) else { return Ok(None) };
        let what = "the descriptor of a page";
        let descriptor = file.part(self.descriptors.saturating_add(index * DESCRIPTOR), DESCRIPTOR, DESCRIPTOR, what)?;
        let (offset, size, flags) = (descriptor.u64(0)?, descriptor.u32(8)?, descriptor.u32(12)?);
        if offset == 0 {
            // There was no room for it any more when the dump was written.
            return Ok(None);
        }
        let bytes = file.part(offset, size.into(), PAGE_SIZE, "a page")?.bytes;
        let mut page = Box::new([0; PAGE_SIZE as usize]);
        let is_whole = match packing(file, flags)? {
            packed::ZLIB => {
                let done =
                    miniz_oxide::inflate::decompress_slice_iter_to_slice(&mut *page, std::iter::once(&*bytes), true, false);
                done.is_ok_and(|len| len == page.len())
            }
            packed::SNAPPY => snap::raw::Decoder::new().decompress(&bytes, &mut *page).is_ok_and(|len| len == page.len()),
            _ => {
                let is_whole = bytes.len() == page.len();
                page.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
                is_whole
            }
        };
        file.check(is_whole, || {
            format!("the page at {} (offset {offset:#x}, {size} bytes) cannot be unpacked", Pa(number << PAGE_SHIFT))
        })?;
        Ok(Some(page))
    }

    /// Fills `buf` from `pa` on.
    ///
    /// # Errors
    /// [`VmiError::NotInDump`] with the first address that is not there; [`VmiError::Image`] for a page that cannot be unpacked.
    pub fn read(&self, file: &File<'_>, pa: u64, buf: &mut [u8]) -> Result<()> {
        let mut kept = self.kept.lock();
        let (mut rest, mut at) = (buf, Pa(pa));
        while !rest.is_empty() {
            let missing = VmiError::NotInDump { pa: at, len: rest.len() as u64 };
            let number = at.gfn().0;
            let Some(slot) = kept.get_mut(number as usize % KEPT) else { return Err(missing) };
            if slot.as_ref().is_none_or(|(kept, _)| *kept != number) {
                *slot = Some((number, self.unpack(file, number)?.ok_or_else(|| missing.clone())?));
            }
            let (now, later) = rest.split_at_mut(rest.len().min(at.page_rest() as usize));
            let there = slot.as_ref().and_then(|(_, page)| page.get(at.page_offset() as usize..)?.get(..now.len()));
            now.copy_from_slice(there.ok_or_else(|| missing.clone())?);
            at = at.checked_add(now.len() as u64).ok_or(missing)?;
            rest = later;
        }
        Ok(())
    }
}

/// Which way a page is packed, or 0.
fn packing(file: &File<'_>, flags: u32) -> Result<u32> {
    for (bit, name) in [(packed::LZO, "LZO"), (packed::ZSTD, "zstd")] {
        file.check(flags & bit == 0, || format!("its pages are packed with {name}, and only zlib and snappy can be read"))?;
    }
    Ok(flags & (packed::ZLIB | packed::SNAPPY))
}

/// The bitmap of the pages in the file, without what is behind the last one that can be.
fn bitmap(file: &File<'_>, header: &Part<'_>, more: &Part<'_>, version: u32, at: u64) -> Result<(Vec<u8>, u64)> {
    let both = u64::from(header.u32(436)?) * PAGE_SIZE;
    let pages = if version < 6 { header.u32(440)?.into() } else { more.u64(96)? };
    let len = pages.div_ceil(8);
    file.check(len.div_ceil(PAGE_SIZE) <= both / PAGE_SIZE / 2, || {
        format!("{both:#x} bytes are too few for two bitmaps of {pages} pages")
    })?;
    // The first one says what memory there was, the second one what of it was not left out.
    let mut bitmap = file.part(at + both / 2, len, MAX_BITMAP, "the bitmap of pages")?.bytes;
    if let Some(last) = bitmap.last_mut().filter(|_| pages % 8 != 0) {
        *last &= (1 << (pages % 8)) - 1;
    }
    Ok((bitmap, at + both))
}

/// # Errors
/// [`VmiError::Image`], which says what is wrong and where, also for pages that are packed with what cannot be read.
pub fn read(file: &File<'_>) -> Result<Contents> {
    let header = file.part(0, PAGE_SIZE, PAGE_SIZE, "the kdump header")?;
    let machine = header.bytes.get(272..278).unwrap_or_default();
    file.check(machine == b"x86_64", || "it is not of an x86-64 machine".to_owned())?;
    let (version, size, blocks) = (header.u32(8)?, header.u32(428)?, header.u32(432)?);
    file.check(u64::from(size) == PAGE_SIZE, || format!("blocks of {size:#x} bytes, where {PAGE_SIZE:#x} are needed"))?;
    file.check(blocks > 0, || "it has no second header".to_owned())?;
    packing(file, header.u32(424)?)?;
    let more = file.part(PAGE_SIZE, PAGE_SIZE, PAGE_SIZE, "the second header")?;
    file.check(version < 2 || more.u32(12)? == 0, || "it is one of the parts of a split dump".to_owned())?;
    let (bitmap, descriptors) = bitmap(file, &header, &more, version, PAGE_SIZE * (1 + u64::from(blocks)))?;
    let pages = Packed::new(bitmap, descriptors);
    file.check(pages.count() > 0, || "it holds no memory".to_owned())?;
    file.check_range(descriptors, pages.count() * DESCRIPTOR, "the descriptors of pages")?;
    let length = if version < 4 { 0 } else { more.u64(56)? };
    let vcpus = if length == 0 {
        Vcpus::Unknown
    } else {
        vcpus(file, &[(file.part(more.u64(48)?, length, MAX_NOTES, "the notes")?, 4)])?
    };
    Ok(Contents { format: "kdump", memory: Pages::Packed(pages), vcpus })
}
