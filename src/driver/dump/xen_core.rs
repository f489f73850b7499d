//! Xen's cores of domains, as `xl dump-core` writes them (Xen, docs/misc/dump-core-format.txt): an ELF core with sections, of which one
//! has the pages and another says which pages they are.

use super::elf::{MAX_NOTES, Section, notes};
use super::extents::{Extent, Extents, Overlap};
use super::source::File;
use super::vcpus::{MAX_VCPUS, Vcpus, XEN_CONTEXT, from_xen};
use super::{Contents, Pages};
use crate::addr::{PAGE_SHIFT, PAGE_SIZE};
use crate::error::{Result, VmiError};

/// The note that tells of the domain, and that of the format's version.
const HEADER: u32 = 0x0200_0001;
const VERSION: u32 = 0x0200_0003;
/// Of a domain whose pages Xen translates: HVM or PVH.
const TRANSLATED: u64 = 0xf00f_ebee;
/// Of a paravirtualized one.
const PARAVIRTUALIZED: u64 = 0xf00f_ebed;
/// What stands for no page in the table of them.
const NO_PAGE: u64 = u64::MAX;
/// Bytes of that table that are read at once.
const STEP: u64 = 1 << 16;

/// What the first note says.
struct Domain {
    vcpus: u64,
    pages: u64,
}

fn find<'a>(file: &File<'_>, sections: &'a [Section], name: &str) -> Result<&'a Section> {
    let found = sections.iter().find(|section| section.name == name.as_bytes());
    found.ok_or_else(|| file.error(format!("it has no segments, and no section {name}: this is no core of Xen's either")))
}

fn domain(file: &File<'_>, sections: &[Section]) -> Result<Domain> {
    let section = find(file, sections, ".note.Xen")?;
    let part = file.part(section.offset, section.size, MAX_NOTES, "the notes")?;
    let mut found = None;
    // Xen's notes are packed to 4 bytes.
    notes(file, &part, 4, |name, kind, descriptor| {
        let descriptor = part.within(descriptor, "a note of Xen's");
        match (name, kind) {
            (b"Xen", HEADER) => {
                let (magic, size) = (descriptor.u64(0)?, descriptor.u64(24)?);
                file.check(magic != PARAVIRTUALIZED, || {
                    "it is the core of a paravirtualized domain, and only those of HVM and PVH domains can be read".to_owned()
                })?;
                file.check(magic == TRANSLATED, || {
                    format!("a note of Xen's: magic {magic:#x}, where {TRANSLATED:#x} is needed")
                })?;
                file.check(size == PAGE_SIZE, || {
                    format!("a note of Xen's: pages of {size:#x} bytes, where {PAGE_SIZE:#x} are needed")
                })?;
                found = Some(Domain { vcpus: descriptor.u64(8)?, pages: descriptor.u64(16)? });
            }
            (b"Xen", VERSION) => {
                let major = descriptor.u64(0)? >> 32;
                file.check(major == 0, || format!("a note of Xen's: format {major}, where 0 is needed"))?;
            }
            _ => {}
        }
        Ok(())
    })?;
    found.ok_or_else(|| file.error("its notes say nothing of the domain".to_owned()))
}

/// The bytes of `count` entries of a section that has them.
fn entries(file: &File<'_>, section: &Section, count: u64, each: u64) -> Result<u64> {
    let name = String::from_utf8_lossy(&section.name);
    file.check_range(section.offset, section.size, &name)?;
    let needed = count.checked_mul(each).filter(|needed| *needed <= section.size);
    needed.ok_or_else(|| file.error(format!("{name}: {:#x} bytes are too few for {count} entries", section.size)))
}

fn memory(file: &File<'_>, sections: &[Section], count: u64) -> Result<Extents> {
    let (table, pages) = (find(file, sections, ".xen_pfn")?, find(file, sections, ".xen_pages")?);
    let bytes = entries(file, table, count, 8)?;
    entries(file, pages, count, PAGE_SIZE)?;
    let mut all: Vec<Extent> = Vec::new();
    let mut index = 0;
    let mut at = 0;
    while at < bytes {
        let part = file.part(table.offset + at, STEP.min(bytes - at), STEP, "the table of pages")?;
        for entry in part.bytes.as_chunks::<8>().0 {
            let page = u64::from_le_bytes(*entry);
            let offset = pages.offset + index * PAGE_SIZE;
            index += 1;
            if page == NO_PAGE {
                continue;
            }
            // Too large a number of a page stays too large for physical address space.
            let pa = page.checked_mul(PAGE_SIZE).unwrap_or(u64::MAX >> PAGE_SHIFT << PAGE_SHIFT);
            let next = Extent::new(file, (pa, PAGE_SIZE, offset), "a page")?;
            match all.last_mut() {
                Some(last) if last.pa + last.len == next.pa && last.offset + last.len == next.offset => last.len += next.len,
                _ => {
                    Extent::check_room(file, &all)?;
                    all.push(next);
                }
            }
        }
        at += STEP;
    }
    Extents::new(file, all, Overlap::Refused)
}

fn vcpus(file: &File<'_>, sections: &[Section], count: u64) -> Result<Vcpus> {
    let count = usize::try_from(count).ok().filter(|count| *count <= MAX_VCPUS);
    let count = count.ok_or_else(|| file.error(format!("it has more than {MAX_VCPUS} vCPUs")))?;
    let section = find(file, sections, ".xen_prstatus")?;
    let bytes = entries(file, section, count as u64, XEN_CONTEXT)?;
    let contexts = file.part(section.offset, bytes, bytes, "the contexts of vCPUs")?;
    let known = (0..count).map(|vcpu| from_xen(&contexts, vcpu * XEN_CONTEXT as usize)).collect::<Result<Vec<_>, VmiError>>()?;
    Vcpus::of(file, count, known)
}

/// # Errors
/// [`VmiError::Image`], which says what is wrong and where, also for the core of a paravirtualized domain.
pub fn read(file: &File<'_>, sections: &[Section]) -> Result<Contents> {
    let domain = domain(file, sections)?;
    let memory = Pages::AsTheyAre(memory(file, sections, domain.pages)?);
    Ok(Contents { format: "Xen core", memory, vcpus: vcpus(file, sections, domain.vcpus)? })
}
