//! Memory dumps: what a guest's memory was, for reading. Nothing runs and nothing can be changed. The file is hostile: every number in it is checked.

mod elf;
mod extents;
mod kdump;
mod lime;
mod raw;
mod refuse;
mod source;
mod vcpus;
mod xen_core;

use std::path::Path;

use self::extents::Extents;
use self::source::{File, FileSource};
use self::vcpus::Vcpus;
use super::{Caps, VmInfo, VmiInfo, VmiRead, VmiRegisters};
use crate::addr::{PAGE_SIZE, Pa, VcpuId};
use crate::arch::amd64::Registers;
use crate::error::{Result, VmiError};

pub use self::source::Source;

/// The driver's name.
const NAME: &str = "dump";

/// What a file holds.
struct Contents {
    format: &'static str,
    memory: Pages,
    vcpus: Vcpus,
}

impl Contents {
    const fn without_vcpus(format: &'static str, memory: Pages) -> Self {
        Self { format, memory, vcpus: Vcpus::Unknown }
    }
}

/// How guest memory lies in the file.
enum Pages {
    /// As it was in memory, in runs.
    AsTheyAre(Extents),
    /// Page by page, packed.
    Packed(kdump::Packed),
}

impl Pages {
    fn end(&self) -> u64 {
        match self {
            Self::AsTheyAre(extents) => extents.end(),
            Self::Packed(pages) => pages.end(),
        }
    }

    fn read(&self, file: &File<'_>, pa: u64, buf: &mut [u8]) -> Result<()> {
        match self {
            Self::AsTheyAre(extents) => extents.read(file, pa, buf),
            Self::Packed(pages) => pages.read(file, pa, buf),
        }
    }
}

/// Formats that are known, and cannot be read: how they begin, and what they are.
const UNREADABLE: &[(&[u8], &str)] = &[
    (b"makedumpfile\0", "a flattened kdump, which makedumpfile -R puts together"),
    (b"DISKDUMP", "a diskdump"),
    (b"PAGEDU", "a crash dump of Windows"),
    (b"AVML", "a compressed AVML image, which avml-convert turns into LiME"),
    (b"QEVM", "a saved state of QEMU; dump-guest-memory writes what can be read"),
    (b"LibvirtQemudSave", "a saved state of libvirt; virsh dump --memory-only writes what can be read"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"\xfd7zXZ\0", "compressed with xz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
];

fn contents(file: &File<'_>) -> Result<Contents> {
    /// More than any format begins with.
    const HEAD: u64 = 16;
    let size = file.source.size();
    let head = file.part(0, size.min(HEAD), HEAD, "the beginning")?.bytes;
    if head.starts_with(&object::elf::ELFMAG) {
        return elf::read(file);
    }
    if head.starts_with(lime::MAGIC) {
        return lime::read(file);
    }
    if head.starts_with(kdump::MAGIC) {
        return kdump::read(file);
    }
    if let Some((_, what)) = UNREADABLE.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Err(file.error(format!("it is {what}")));
    }
    file.check(size > 0 && size.is_multiple_of(PAGE_SIZE), || {
        format!("it begins like no known format, and its {size} bytes are no whole number of pages, as raw memory is")
    })?;
    raw::read(file)
}

/// A memory dump. Reads what is in the file, and refuses everything else.
///
/// An address that the file does not hold is an error, whether the guest had memory there or not.
pub struct DumpDriver {
    source: Box<dyn Source>,
    contents: Contents,
    info: VmInfo,
}

impl DumpDriver {
    /// Opens a file of one of the formats: raw memory, LiME, ELF cores of QEMU, libvirt and kdump, compressed kdumps, and Xen's
    /// cores of HVM and PVH domains.
    ///
    /// # Errors
    /// [`VmiError::Attach`] if the file cannot be read, [`VmiError::Image`] if it is no such dump, is cut off or contradicts itself.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let source = FileSource::open(path).map_err(|error| VmiError::Attach {
            target: format!("dump:{name}"),
            reason: error.to_string(),
            hint: format!("check that {name} can be read, and is a file"),
        })?;
        Self::new(&name, Box::new(source))
    }

    /// Opens what is elsewhere than in a file. `name` names it in errors.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn new(name: &str, source: Box<dyn Source>) -> Result<Self> {
        let contents = contents(&File { name, source: &*source })?;
        // Whole pages, as everybody expects; what is missing of the last one is not there. The end has at most 52 bits.
        let memory_size = contents.memory.end().next_multiple_of(PAGE_SIZE);
        let info = VmInfo { driver: NAME, name: name.to_owned(), memory_size, vcpus: contents.vcpus.count() };
        Ok(Self { source, contents, info })
    }
}

impl VmiInfo for DumpDriver {
    fn info(&self) -> &VmInfo {
        &self.info
    }

    fn caps(&self) -> Caps {
        Caps { registers: matches!(self.contents.vcpus, Vcpus::Known(_)), ..Caps::default() }
    }

    fn version(&self) -> String {
        self.contents.format.to_owned()
    }
}

impl VmiRead for DumpDriver {
    fn read(&self, pa: Pa, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        let inside = pa.checked_add(len).is_some_and(|end| end.0 <= self.info.memory_size);
        if !inside {
            return Err(VmiError::OutOfRange { pa, len, end: Pa(self.info.memory_size) });
        }
        self.contents.memory.read(&File { name: &self.info.name, source: &*self.source }, pa.0, buf)
    }
}

impl VmiRegisters for DumpDriver {
    fn registers(&self, vcpu: VcpuId) -> Result<Registers> {
        self.contents.vcpus.registers(vcpu)
    }

    fn set_registers(&mut self, _: VcpuId, _: &Registers) -> Result<()> {
        refuse::refuse("writing registers")
    }
}
