//! Memory as it is, from physical address 0 on: what `dd`, `virsh dump` of old and QEMU's `pmemsave` write.

use super::extents::{Extent, Extents, Overlap};
use super::source::File;
use super::{Contents, Pages};
use crate::error::Result;

/// # Errors
/// [`crate::VmiError::Image`] if there is more of it than physical address space.
pub fn read(file: &File<'_>) -> Result<Contents> {
    let all = Extent::new(file, (0, file.source.size(), 0), "the memory")?;
    Ok(Contents::without_vcpus("raw", Pages::AsTheyAre(Extents::new(file, vec![all], Overlap::Refused)?)))
}
