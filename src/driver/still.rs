//! A guest that stands still, for tests of what is done with its events: an image in the memory of the mock driver.

use super::emu::BootOptions;
pub use super::mock::{CallKind, Remote};
use super::mock::{MockDriver, PageSize};
use super::open::{DEMO, OpenOptions, Opened, Target, attach, read};
use crate::addr::{Gfn, PAGE_SIZE, Pa, Va, VcpuId};
use crate::arch::amd64::{GpRegisters, Registers, Segment, cr0, cr4, efer, pte};
use crate::error::Result;
use crate::image::Image;

/// A guest that stands still, on the mock driver: its image is in memory, and events come from [`Still::remote`].
pub struct Still {
    /// The guest, and its symbols.
    pub opened: Opened,
    /// Where events go in and answers come out.
    pub remote: Remote,
    /// The registers of each vCPU: at the image's entry, in ring 0, with a stack of its own.
    pub registers: Vec<Registers>,
    /// Mapped memory behind the image that nothing uses: where it begins, and how many bytes.
    pub scratch: (Va, u64),
}

/// Loads the image of a guest and maps it as it was linked; nothing of it ever runs. Needs no library.
///
/// # Errors
/// As [`super::open::open`], but for what is about the library.
pub fn open_still(target: &Target, options: &OpenOptions) -> Result<Still> {
    let defaults = BootOptions::default();
    let memory = options.memory.unwrap_or(defaults.memory);
    let vcpus = options.vcpus.unwrap_or(1);
    let command_line = options.command_line.clone();
    BootOptions { memory, vcpus, command_line }.check()?;
    match target {
        Target::Demo => load(target, "demo", DEMO, memory, vcpus),
        Target::Emu(path) => load(target, &path.display().to_string(), &read(target, path)?, memory, vcpus),
        Target::Xen(_) | Target::Dump(_) => {
            let hint = "write \"demo\", or \"emu:PATH\" for an ELF image of your own".to_owned();
            Err(attach(&target.to_string(), "a domain or a dump has no image that could stand still".to_owned(), hint))
        }
    }
}

fn load(target: &Target, name: &str, bytes: &[u8], memory: u64, vcpus: u16) -> Result<Still> {
    /// Where stacks and scratch memory are mapped: nothing is linked for the middle of the lower half.
    const BESIDE: Va = Va(0x2000_0000_0000);
    /// Bytes of scratch memory.
    const SCRATCH: u64 = 1 << 20;
    let image = Image::parse(name, bytes)?;
    let mut driver = MockDriver::new(memory, vcpus);
    let refuse = |what: &str| {
        attach(&target.to_string(), format!("{what} does not fit {memory:#x} bytes"), "give it more memory".to_owned())
    };
    let context = driver.new_root(4)?;
    let rights = pte::P | pte::W | pte::U;
    let mut end = Pa(0);
    for segment in &image.segments {
        let last =
            segment.pa.checked_add(segment.memory_size - 1).filter(|last| last.0 < memory).ok_or_else(|| refuse("the image"))?;
        driver.poke(segment.pa, segment.data)?;
        let pages = segment.pa.gfn().0..=last.gfn().0;
        for (index, gfn) in pages.enumerate() {
            let va = Va(segment.va.page().0.wrapping_add(index as u64 * PAGE_SIZE));
            driver.map(context, va, Gfn(gfn).pa(0), PageSize::Size4K, rights)?;
        }
        end = end.max(Gfn(last.gfn().0 + 1).pa(0));
    }
    // A page of stack for each vCPU, then the scratch memory; page tables come from the other end.
    let size = u64::from(vcpus) * PAGE_SIZE + SCRATCH;
    let room = end.checked_add(size + SCRATCH).filter(|top| top.0 <= memory);
    room.ok_or_else(|| refuse("the image with its stacks"))?;
    for at in (0..size).step_by(PAGE_SIZE as usize) {
        driver.map(context, Va(BESIDE.0 + at), Pa(end.0 + at), PageSize::Size4K, rights)?;
    }
    let mut registers = Vec::new();
    for vcpu in 0..u64::from(vcpus) {
        // A return address, as a function's first instruction finds it.
        let stack = (vcpu + 1) * PAGE_SIZE - 64;
        driver.poke(Pa(end.0 + stack), &image.entry.0.to_le_bytes())?;
        let gp = GpRegisters { rip: image.entry.0, rsp: BESIDE.0 + stack, rflags: 2, ..GpRegisters::default() };
        let cs = Segment { selector: 8, attributes: 0xa09b, limit: u32::MAX, base: 0 };
        let ss = Segment { selector: 16, attributes: 0xc093, limit: u32::MAX, base: 0 };
        let (cr0, cr4, mode) = (cr0::PG | cr0::WP | 1, cr4::PAE, efer::LME | efer::LMA | efer::SCE | efer::NXE);
        let of_vcpu = Registers { gp, cr0, cr3: context.root.0, cr4, efer: mode, cs, ss, ..Registers::default() };
        driver.poke_registers(VcpuId(vcpu as u16), of_vcpu)?;
        registers.push(of_vcpu);
    }
    let (remote, scratch) = (driver.remote(), (Va(BESIDE.0 + u64::from(vcpus) * PAGE_SIZE), SCRATCH));
    Ok(Still { opened: Opened { driver: Box::new(driver), symbols: image.symbols }, remote, registers, scratch })
}
