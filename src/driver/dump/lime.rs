//! LiME: runs of memory, each behind a header (the LiME project's documentation, "LiME format").
//!
//! A header has the magic (4 bytes), the version (4), the first and the last physical address of its run (8 each), and 8 bytes that
//! mean nothing.

use super::extents::{Extent, Extents, Overlap};
use super::source::File;
use super::{Contents, Pages};
use crate::error::Result;

/// How each header begins: 0x4C694D45, little-endian.
pub const MAGIC: &[u8] = b"EMiL";
const HEADER: u64 = 32;

/// # Errors
/// [`crate::VmiError::Image`], which says what is wrong and where.
pub fn read(file: &File<'_>) -> Result<Contents> {
    let mut all = Vec::new();
    let mut at = 0;
    while at < file.source.size() {
        Extent::check_room(file, &all)?;
        let header = file.part(at, HEADER, HEADER, "a LiME header")?;
        file.check(header.bytes.starts_with(MAGIC), || {
            format!("offset {at:#x}: a LiME header is expected, and does not begin there")
        })?;
        let version = header.u32(4)?;
        file.check(version == 1, || format!("offset {at:#x}: LiME version {version}, where 1 is needed"))?;
        let (first, last) = (header.u64(8)?, header.u64(16)?);
        let len = last.checked_sub(first).and_then(|len| len.checked_add(1));
        let len = len.ok_or_else(|| file.error(format!("offset {at:#x}: a run from {first:#x} to {last:#x} is none")))?;
        let extent = Extent::new(file, (first, len, at + HEADER), "a run of memory")?;
        // Both numbers are checked: they are inside of the file.
        at = extent.offset + extent.len;
        all.push(extent);
    }
    Ok(Contents::without_vcpus("LiME", Pages::AsTheyAre(Extents::new(file, all, Overlap::Refused)?)))
}
