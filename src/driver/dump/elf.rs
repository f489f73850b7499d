//! What ELF cores have in common: headers, sections and notes. The crate `object` knows the structures, every number is checked here.

use object::LittleEndian;
use object::elf::{self, FileHeader64, ProgramHeader64, SectionHeader64};
use object::pod::{Pod, from_bytes};
use object::read::elf::{FileHeader, NoteIterator, ProgramHeader, SectionHeader};

use super::extents::{Extent, Extents, MAX_RUNS, Overlap};
use super::source::{File, Part};
use super::vcpus::{Vcpus, from_qemu};
use super::{Contents, Pages, xen_core};
use crate::error::Result;
use crate::image::check_ident;

/// Most bytes of notes: a note a vCPU is less than a KiB.
pub const MAX_NOTES: u64 = 64 << 20;
/// The number of program headers that stands for "see the first section" (the gABI, "ELF header").
const MANY: u16 = 0xffff;

/// A header table of the file: where it begins, how many entries it has, and how large each is.
type Table = (u64, u64, u16);

fn structure<'a, T: Pod>(file: &File<'_>, part: &'a Part<'_>) -> Result<&'a T> {
    from_bytes(&part.bytes).map(|(value, _)| value).map_err(|()| file.error("a header of it is too short".to_owned()))
}

/// Runs `each` on every entry of a table of headers.
fn headers<T: Pod>(
    file: &File<'_>,
    (at, count, size): Table,
    what: &'static str,
    mut each: impl FnMut(&T) -> Result<()>,
) -> Result<()> {
    let needed = size_of::<T>() as u64;
    file.check(u64::from(size) == needed, || format!("{what}: {size} bytes each, where {needed} are needed"))?;
    file.check(count <= MAX_RUNS, || format!("{what}: {count} of them are more than {MAX_RUNS}"))?;
    file.check_range(at, count * needed, what)?;
    for index in 0..count {
        each(structure(file, &file.part(at + index * needed, needed, needed, what)?)?)?;
    }
    Ok(())
}

/// A section that has a name and lies in the file.
pub struct Section {
    pub name: Vec<u8>,
    pub offset: u64,
    pub size: u64,
}

/// The ELF header, checked: a core of an x86-64 machine, and where its tables are.
struct Header {
    segments: Table,
    sections: Table,
    names: u16,
}

fn header(file: &File<'_>) -> Result<Header> {
    let part = file.part(0, size_of::<FileHeader64<LittleEndian>>() as u64, MAX_NOTES, "the ELF header")?;
    check_ident(&part.bytes).map_err(|reason| file.error(reason))?;
    let header: &FileHeader64<LittleEndian> = structure(file, &part)?;
    let machine = header.e_machine(LittleEndian);
    file.check(machine == elf::EM_X86_64, || format!("machine {}, where 62 (x86-64) is needed", machine.0))?;
    let kind = header.e_type(LittleEndian);
    file.check(kind == elf::ET_CORE, || {
        format!("ELF type {}, where 4 (core) is needed; \"emu:PATH\" runs an executable", kind.0)
    })?;
    let (sections, each) = (header.e_shoff(LittleEndian), header.e_shentsize(LittleEndian));
    let mut count = u64::from(header.e_phnum(LittleEndian));
    if count == u64::from(MANY) {
        headers(file, (sections, 1, each), "the first section header", |first: &SectionHeader64<LittleEndian>| {
            count = u64::from(first.sh_info(LittleEndian));
            Ok(())
        })?;
    }
    Ok(Header {
        segments: (header.e_phoff(LittleEndian), count, header.e_phentsize(LittleEndian)),
        sections: (sections, header.e_shnum(LittleEndian).into(), each),
        names: header.e_shstrndx(LittleEndian).0,
    })
}

fn sections(file: &File<'_>, header: &Header) -> Result<Vec<Section>> {
    /// More than any name that is looked for.
    const NAME: u64 = 64;
    let mut found = Vec::new();
    headers(file, header.sections, "the section headers", |section: &SectionHeader64<LittleEndian>| {
        let name = u64::from(section.sh_name(LittleEndian));
        found.push((name, section.sh_offset(LittleEndian), section.sh_size(LittleEndian)));
        Ok(())
    })?;
    let Some(&(_, strings, len)) = found.get(usize::from(header.names)) else { return Ok(Vec::new()) };
    file.check_range(strings, len, "the names of the sections")?;
    let mut named = Vec::new();
    for (name, offset, size) in found {
        let Some(rest) = len.checked_sub(name).filter(|rest| *rest > 0) else { continue };
        let text = file.part(strings + name, rest.min(NAME), NAME, "the name of a section")?;
        let name = text.bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        named.push(Section { name: name.to_vec(), offset, size });
    }
    Ok(named)
}

/// Runs `each` on every note of a part of the file: with its name, its type and where its descriptor begins in the part.
///
/// # Errors
/// [`crate::VmiError::Image`] if the notes are cut off; what `each` fails with.
pub fn notes(file: &File<'_>, part: &Part<'_>, align: u64, mut each: impl FnMut(&[u8], u32, &[u8]) -> Result<()>) -> Result<()> {
    let bad = |error| file.error(format!("its notes: {error}"));
    let mut notes = NoteIterator::<FileHeader64<LittleEndian>>::new(LittleEndian, align, &part.bytes).map_err(bad)?;
    while let Some(note) = notes.next().map_err(bad)? {
        each(note.name(), note.n_type(LittleEndian).0, note.desc())?;
    }
    Ok(())
}

/// The vCPUs that notes tell of: QEMU's own, or how many of the kernel's there are.
///
/// # Errors
/// [`crate::VmiError::Image`] for notes that are cut off, or no such state.
pub fn vcpus(file: &File<'_>, parts: &[(Part<'_>, u64)]) -> Result<Vcpus> {
    let (mut count, mut known) = (0, Vec::new());
    for (part, align) in parts {
        notes(file, part, *align, |name, kind, descriptor| {
            match (name, kind) {
                (b"CORE", kind) if kind == elf::NT_PRSTATUS.0 => count += 1,
                (b"QEMU", 0) => known.push(from_qemu(&part.within(descriptor, "vCPU state of QEMU"), file)?),
                _ => {}
            }
            Ok(())
        })?;
    }
    Vcpus::of(file, count, known)
}

/// An ELF core: of QEMU (`dump-guest-memory`, `virsh dump --memory-only`), of a kernel's kdump, or of Xen (`xl dump-core`).
///
/// # Errors
/// [`crate::VmiError::Image`], which says what is wrong and where.
pub fn read(file: &File<'_>) -> Result<Contents> {
    let header = header(file)?;
    // Xen's have sections and no segments.
    if header.segments.1 == 0 {
        return xen_core::read(file, &sections(file, &header)?);
    }
    let (mut all, mut parts, mut length) = (Vec::new(), Vec::new(), 0);
    headers(file, header.segments, "the program headers", |segment: &ProgramHeader64<LittleEndian>| {
        let (offset, size) = segment.file_range(LittleEndian);
        match segment.p_type(LittleEndian) {
            elf::PT_NOTE if size > 0 => {
                let part = file.part(offset, size, MAX_NOTES - length, "the notes")?;
                length += size;
                parts.push((part, segment.p_align(LittleEndian)));
            }
            // What a segment has in memory behind its bytes in the file was left out of the dump.
            elf::PT_LOAD if size > 0 => all.push(Extent::new(file, (segment.p_paddr(LittleEndian), size, offset), "a segment")?),
            _ => {}
        }
        Ok(())
    })?;
    let is_process = all.len() > 1 && all.iter().all(|extent| extent.pa == 0);
    file.check(!is_process, || "its segments have no physical addresses: it is the core of a process".to_owned())?;
    let memory = Pages::AsTheyAre(Extents::new(file, all, Overlap::Inside)?);
    Ok(Contents { format: "ELF core", memory, vcpus: vcpus(file, &parts)? })
}
