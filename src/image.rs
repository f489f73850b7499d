//! ELF images of guests: what to load where, and the symbols. The file is hostile: every number in it is checked.

use object::LittleEndian;
use object::elf::{self, FileHeader64, ProgramHeader64, Sym64};
use object::read::elf::{FileHeader, ProgramHeader, Sym};

use crate::addr::{MemoryAccess, PHYSICAL_BITS, Pa, Va};
use crate::error::{Result, VmiError};
use crate::symbols::{Symbol, SymbolKind, SymbolTable};

/// Longest symbol name that is accepted, in bytes.
const MAX_NAME: usize = 4096;
/// Most bytes all names may have together: names can share their bytes in the file, so a small file can hold a lot of them.
const MAX_NAMES: usize = 64 << 20;

/// One part of an image that is to be in memory before the guest starts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Segment<'data> {
    /// The virtual address it was linked for.
    pub va: Va,
    /// The physical address it is loaded at.
    pub pa: Pa,
    /// Its first bytes. At most `memory_size` of them.
    pub data: &'data [u8],
    /// Its size in memory: the bytes behind `data` are zero. Never 0.
    pub memory_size: u64,
    /// The rights it asks for.
    pub access: MemoryAccess,
}

impl std::fmt::Debug for Segment<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { va, pa, data, memory_size, access } = self;
        write!(f, "Segment({memory_size:#x} bytes, {:#x} from the file, at {va}, physical {pa}, {access})", data.len())
    }
}

/// A checked x86-64 ELF executable that is linked for fixed addresses.
///
/// What holds for every image: no two segments overlap, neither by physical nor by virtual address; none wraps, and none reaches
/// past 52 bits of physical address; the entry point lies in one of them (by either address).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image<'data> {
    /// Where the guest begins.
    pub entry: Va,
    /// What is to be in memory, in the order of the file; at least one.
    pub segments: Vec<Segment<'data>>,
    /// The symbols; empty if the file is stripped.
    pub symbols: SymbolTable,
}

/// Errors about one file.
struct Complaint<'a>(&'a str);

impl Complaint<'_> {
    fn error(&self, reason: String) -> VmiError {
        VmiError::Image { what: self.0.to_owned(), reason }
    }

    fn check(&self, holds: bool, reason: impl FnOnce() -> String) -> Result<()> {
        if holds { Ok(()) } else { Err(self.error(reason())) }
    }
}

/// Whether an ELF file is a 64-bit little-endian one, or what it is instead.
pub(crate) fn check_ident(bytes: &[u8]) -> Result<(), String> {
    let class = bytes.get(4).copied().unwrap_or(0);
    if class != elf::ELFCLASS64.0 {
        return Err(format!("offset 4: ELF class {class}, where 2 (64-bit) is needed"));
    }
    let order = bytes.get(5).copied().unwrap_or(0);
    if order == elf::ELFDATA2LSB.0 {
        Ok(())
    } else {
        Err(format!("offset 5: byte order {order}, where 1 (little-endian) is needed"))
    }
}

impl<'data> Image<'data> {
    /// Reads an image from the bytes of a file. `what` names the file in errors.
    ///
    /// Nothing is copied but the symbols.
    ///
    /// # Errors
    /// [`VmiError::Image`], which says what is wrong and where: not ELF, not 64-bit little-endian x86-64, not an executable for
    /// fixed addresses, a table or a segment cut off, or one of the type's promises broken.
    pub fn parse(what: &str, bytes: &'data [u8]) -> Result<Self> {
        let file = Complaint(what);
        file.check(bytes.starts_with(&elf::ELFMAG), || "it does not begin with the ELF magic".to_owned())?;
        check_ident(bytes).map_err(|reason| file.error(reason))?;

        let header = FileHeader64::<LittleEndian>::parse(bytes).map_err(|error| file.error(format!("ELF header: {error}")))?;
        let machine = header.e_machine(LittleEndian);
        file.check(machine == elf::EM_X86_64, || format!("machine {}, where 62 (x86-64) is needed", machine.0))?;
        let kind = header.e_type(LittleEndian);
        file.check(kind == elf::ET_EXEC, || format!("type {}, where 2 (executable for fixed addresses) is needed", kind.0))?;

        let headers =
            header.program_headers(LittleEndian, bytes).map_err(|error| file.error(format!("program headers: {error}")))?;
        let mut segments = Vec::new();
        for (index, header) in headers.iter().enumerate() {
            if header.p_type(LittleEndian) == elf::PT_LOAD && header.p_memsz(LittleEndian) | header.p_filesz(LittleEndian) != 0 {
                segments.push(segment(&file, index, header, bytes)?);
            }
        }
        file.check(!segments.is_empty(), || "it has no segment to load".to_owned())?;
        check_overlap(&file, "physical", segments.iter().map(|segment| (segment.pa.0, segment.memory_size)))?;
        check_overlap(&file, "virtual", segments.iter().map(|segment| (segment.va.0, segment.memory_size)))?;

        let entry = Va(header.e_entry(LittleEndian));
        let starts = |from: u64, size: u64| entry.0.checked_sub(from).is_some_and(|offset| offset < size);
        let found =
            segments.iter().any(|segment| starts(segment.va.0, segment.memory_size) || starts(segment.pa.0, segment.memory_size));
        file.check(found, || format!("the entry point {entry} lies in no segment"))?;

        Ok(Self { entry, segments, symbols: symbols(&file, header, bytes)? })
    }

    /// The first physical address behind all segments.
    pub fn end(&self) -> Pa {
        Pa(self.segments.iter().map(|segment| segment.pa.0.saturating_add(segment.memory_size)).max().unwrap_or(0))
    }
}

fn segment<'data>(
    file: &Complaint<'_>,
    index: usize,
    header: &ProgramHeader64<LittleEndian>,
    bytes: &'data [u8],
) -> Result<Segment<'data>> {
    let va = Va(header.p_vaddr(LittleEndian));
    let pa = Pa(header.p_paddr(LittleEndian));
    let memory_size = header.p_memsz(LittleEndian);
    let (offset, length) = header.file_range(LittleEndian);
    let data = header.data(LittleEndian, bytes);
    let data = data.map_err(|()| {
        file.error(format!(
            "segment {index}: {length:#x} bytes at offset {offset:#x} reach past the file, which has {:#x}",
            bytes.len()
        ))
    })?;
    file.check(length <= memory_size, || {
        format!("segment {index}: {length:#x} bytes in the file are more than the {memory_size:#x} in memory")
    })?;
    let physical_end = pa.checked_add(memory_size).filter(|end| end.0 <= 1 << PHYSICAL_BITS);
    file.check(physical_end.is_some(), || {
        format!("segment {index}: {memory_size:#x} bytes at {pa} reach past physical address space")
    })?;
    let last = va.checked_add(memory_size - 1);
    file.check(last.is_some(), || format!("segment {index}: {memory_size:#x} bytes at {va} reach past virtual address space"))?;
    let flags = header.p_flags(LittleEndian);
    let right = |flag, access| if flags.contains(flag) { access } else { MemoryAccess::NONE };
    let access = right(elf::PF_R, MemoryAccess::R) | right(elf::PF_W, MemoryAccess::W) | right(elf::PF_X, MemoryAccess::X);
    Ok(Segment { va, pa, data, memory_size, access })
}

/// Whether no two of the ranges (start, size) share a byte. None is empty, none wraps.
fn check_overlap(file: &Complaint<'_>, kind: &str, ranges: impl Iterator<Item = (u64, u64)>) -> Result<()> {
    let mut ranges: Vec<(u64, u64)> = ranges.collect();
    ranges.sort_unstable();
    let overlap = ranges.iter().zip(ranges.iter().skip(1)).find(|((from, size), (next, _))| next - from < *size);
    overlap.map_or(Ok(()), |((from, size), (next, _))| {
        Err(file.error(format!("the segments at {kind} addresses {from:#x} ({size:#x} bytes) and {next:#x} overlap")))
    })
}

fn symbols(file: &Complaint<'_>, header: &FileHeader64<LittleEndian>, bytes: &[u8]) -> Result<SymbolTable> {
    let sections = header.sections(LittleEndian, bytes).map_err(|error| file.error(format!("section headers: {error}")))?;
    let table = sections.symbols(LittleEndian, bytes, elf::SHT_SYMTAB);
    let table = table.map_err(|error| file.error(format!("symbol table: {error}")))?;
    let mut found = Vec::new();
    let mut total = 0;
    for (index, entry) in table.iter().enumerate() {
        let Some(kind) = kind(entry) else { continue };
        let name = entry.name(LittleEndian, table.strings());
        let name = name.map_err(|error| file.error(format!("symbol {index}: {error}")))?;
        if name.is_empty() {
            continue;
        }
        total += name.len();
        file.check(name.len() <= MAX_NAME, || {
            format!("symbol {index}: its name has {} bytes, more than {MAX_NAME}", name.len())
        })?;
        file.check(total <= MAX_NAMES, || format!("symbol {index}: the names up to it have more than {MAX_NAMES} bytes"))?;
        found.push(Symbol {
            name: String::from_utf8_lossy(name).into_owned(),
            va: Va(entry.st_value(LittleEndian)),
            size: entry.st_size(LittleEndian),
            kind,
            global: entry.st_bind() != elf::STB_LOCAL,
        });
    }
    Ok(found.into_iter().collect())
}

/// What an entry of the symbol table names; `None` for what is no symbol of the image: undefined ones, sections, files.
fn kind(entry: &Sym64<LittleEndian>) -> Option<SymbolKind> {
    let section = entry.st_shndx(LittleEndian);
    match entry.st_type() {
        _ if section == elf::SHN_UNDEF => None,
        elf::STT_NOTYPE if section == elf::SHN_ABS => Some(SymbolKind::Absolute),
        elf::STT_NOTYPE => Some(SymbolKind::Label),
        elf::STT_OBJECT => Some(SymbolKind::Object),
        elf::STT_FUNC => Some(SymbolKind::Function),
        _ => None,
    }
}
