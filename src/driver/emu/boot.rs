//! The boot contract (docs/guests.md): what a guest finds when it starts.

use crate::addr::{PAGE_SIZE, Pa};
use crate::arch::amd64::pte;
use crate::error::{Result, VmiError};
use crate::image::Image;

use super::layout::{CS, Layout};
use super::memory::Memory;
use super::run::Machine;
use super::sys::{Table, reg};

/// "vmtap", little-endian.
pub const MAGIC: u64 = 0x70_6174_6d76;
const VERSION: u64 = 1;

// The loader's own physical range: 0x1000 to 0x7ffff.
const INFO: u64 = 0x1000;
const COMMAND_LINE: u64 = 0x2000;
const GDT: u64 = 0x3000;
const PML4: u64 = 0x10000;
const LOW_PDPT: u64 = 0x11000;
const HIGH_PDPT: u64 = 0x12000;
const DIRECTORIES: u64 = 0x14000;
const STACKS: u64 = 0x20000;
/// First physical address an image may use.
pub const FIRST_FREE: u64 = 0x80000;

/// Most vCPUs a guest can have.
pub const MAX_VCPUS: u16 = 8;
/// Bytes of RAM a guest has if nothing is said.
pub const DEFAULT_MEMORY: u64 = 64 << 20;
/// Least and most bytes of RAM.
const MEMORY: std::ops::RangeInclusive<u64> = 1 << 20..=64 << 30;

/// What a guest is started with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BootOptions {
    /// Bytes of RAM; a multiple of the page size.
    pub memory: u64,
    /// How many vCPUs: 1 to 8.
    pub vcpus: u16,
    /// What the guest finds as its command line.
    pub command_line: String,
}

impl Default for BootOptions {
    fn default() -> Self {
        Self { memory: DEFAULT_MEMORY, vcpus: 1, command_line: String::new() }
    }
}

impl BootOptions {
    /// Refuses what cannot be started.
    pub fn check(&self) -> Result<()> {
        let refuse = |what, reason: String| Err(VmiError::InvalidArgument { what, reason });
        if !MEMORY.contains(&self.memory) || !self.memory.is_multiple_of(PAGE_SIZE) {
            return refuse("memory", format!("{} bytes: must be 1 MiB to 64 GiB, in whole pages of 4096 bytes", self.memory));
        }
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return refuse("vcpus", format!("{}: must be 1 to {MAX_VCPUS}", self.vcpus));
        }
        if self.command_line.len() as u64 >= PAGE_SIZE || self.command_line.contains('\0') {
            let len = self.command_line.len();
            return refuse("cmdline", format!("{len} bytes: must be under {PAGE_SIZE} bytes, without a NUL"));
        }
        Ok(())
    }
}

fn write_words(memory: &Memory, pa: u64, words: &[u64]) -> Result<()> {
    for (index, word) in words.iter().enumerate() {
        memory.write(Pa(pa + 8 * index as u64), &word.to_le_bytes())?;
    }
    Ok(())
}

/// Copies the image's segments into RAM.
fn load(memory: &Memory, name: &str, image: &Image<'_>) -> Result<()> {
    for segment in &image.segments {
        let refuse = |reason: String| VmiError::Image { what: name.to_owned(), reason };
        let first = segment.pa.0;
        let end = first.checked_add(segment.memory_size).filter(|end| *end <= memory.guest_len()).ok_or_else(|| {
            let (size, limit) = (segment.memory_size, memory.guest_len());
            refuse(format!(
                "a segment of {size:#x} bytes at physical address {first:#x} reaches beyond memory, which ends at {limit:#x}"
            ))
        })?;
        if first < FIRST_FREE && end > first {
            return Err(refuse(format!(
                "a segment at physical address {first:#x} lies in the loader's range, below {FIRST_FREE:#x}"
            )));
        }
        memory.write(segment.pa, segment.data)?;
    }
    Ok(())
}

/// Loads `image` and puts every vCPU at its entry.
pub fn boot(machine: &mut Machine, layout: Layout, name: &str, image: &Image<'_>, options: &BootOptions) -> Result<()> {
    let memory = std::rc::Rc::clone(&machine.memory);
    load(&memory, name, image)?;
    write_words(&memory, INFO, &[MAGIC, VERSION, options.memory, options.vcpus.into(), COMMAND_LINE])?;
    memory.write(Pa(COMMAND_LINE), options.command_line.as_bytes())?;
    write_words(&memory, GDT, &[0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff])?;

    // The low 4 GiB where they are, and the first 2 GiB again at the top of the address space.
    let table = pte::P | pte::W;
    write_words(&memory, PML4, &[LOW_PDPT | table])?;
    write_words(&memory, PML4 + 511 * 8, &[HIGH_PDPT | table])?;
    for gib in 0..4 {
        let directory = DIRECTORIES + gib * PAGE_SIZE;
        write_words(&memory, LOW_PDPT + gib * 8, &[directory | table])?;
        if gib < 2 {
            write_words(&memory, HIGH_PDPT + (510 + gib) * 8, &[directory | table])?;
        }
        let pages: Vec<u64> = (0..512).map(|index| (gib << 30) | (index << 21) | table | pte::PS).collect();
        write_words(&memory, directory, &pages)?;
    }

    for index in 0..u64::from(options.vcpus) {
        let vcpu = machine.add_vcpu(layout, |engine| {
            engine.write_msr(0xc000_0080, 0xd01)?;
            engine.write_register(reg::CR3, PML4)?;
            engine.write_register(reg::CR4, 0x620)?;
            engine.write_register(reg::CR0, 0x8001_0033)?;
            engine.write_table(reg::GDTR, &Table { selector: 0, base: GDT, limit: 23, flags: 0 })?;
            engine.write_table(reg::IDTR, &Table { selector: 0, base: 0, limit: 0, flags: 0 })?;
            engine.write_table(reg::TR, &Table { selector: 0, base: 0, limit: 0, flags: 0x8b00 })
        })?;
        for segment in 0..6 {
            let (selector, flags) = if segment == CS { (8, 0x00af_9b00) } else { (0x10, 0x00cf_9300) };
            vcpu.set_segment(segment, selector, 0, u32::MAX, flags);
        }
        for gpr in 0..16 {
            vcpu.set_gpr(gpr, 0);
        }
        vcpu.set_gpr(7, INFO);
        vcpu.set_gpr(6, index);
        vcpu.set_gpr(4, STACKS + (index + 1) * PAGE_SIZE);
        vcpu.set_rip(image.entry.0);
    }
    Ok(())
}
