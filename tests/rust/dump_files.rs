//! Dumps of every format, written field by field as their specifications list them.

use vmitap::arch::amd64::{GpRegisters, Registers, Segment};

/// Numbers in the order in which they are in a file.
#[derive(Default)]
pub struct Bytes(pub Vec<u8>);

impl Bytes {
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub fn zeros(&mut self, count: usize) -> &mut Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    pub fn u16s(&mut self, values: &[u16]) -> &mut Self {
        self.0.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        self
    }

    pub fn u32s(&mut self, values: &[u32]) -> &mut Self {
        self.0.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        self
    }

    pub fn u64s(&mut self, values: &[u64]) -> &mut Self {
        self.0.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        self
    }
}

pub fn lime(runs: &[(u64, &[u8])]) -> Vec<u8> {
    let mut file = Bytes::default();
    for (pa, bytes) in runs {
        file.u32s(&[0x4c69_4d45, 1]).u64s(&[*pa, pa + bytes.len() as u64 - 1, 0]).bytes(bytes);
    }
    file.0
}

/// The ELF header of a core: where its program headers are and how many, the same of its sections, and which of those has the names.
fn elf_header(segments: (u64, u16), sections: (u64, u16), names: u16) -> Bytes {
    let mut file = Bytes::default();
    file.bytes(b"\x7fELF\x02\x01\x01").zeros(9).u16s(&[4, 62]).u32s(&[1]).u64s(&[0, segments.0, sections.0]);
    file.u32s(&[0]).u16s(&[64, 56, segments.1, 64, sections.1, names]);
    file
}

/// A segment of an ELF core: its address, its size in memory, and its bytes.
pub type Run<'a> = (u64, u64, &'a [u8]);

/// An ELF core, its notes first.
pub fn elf_core(runs: &[Run<'_>], notes: &[u8]) -> Vec<u8> {
    let mut file = elf_header((64, runs.len() as u16 + 1), (0, 0), 0);
    let mut at = 64 + 56 * (runs.len() as u64 + 1);
    file.u32s(&[4, 0]).u64s(&[at, 0, 0, notes.len() as u64, 0, 0]);
    at += notes.len() as u64;
    for (pa, size, bytes) in runs {
        file.u32s(&[1, 7]).u64s(&[at, 0, *pa, bytes.len() as u64, *size, 0]);
        at += bytes.len() as u64;
    }
    file.bytes(notes);
    for (.., bytes) in runs {
        file.bytes(bytes);
    }
    file.0
}

pub fn note(name: &[u8], kind: u32, descriptor: &[u8]) -> Vec<u8> {
    let mut note = Bytes::default();
    note.u32s(&[name.len() as u32, descriptor.len() as u32, kind]).bytes(name).zeros(name.len().next_multiple_of(4) - name.len());
    note.bytes(descriptor).zeros(descriptor.len().next_multiple_of(4) - descriptor.len());
    note.0
}

/// What a kernel writes of each vCPU: `elf_prstatus`.
pub fn kernel_note(gp: &GpRegisters) -> Vec<u8> {
    let mut status = Bytes::default();
    status.zeros(112).u64s(&[gp.r15, gp.r14, gp.r13, gp.r12, gp.rbp, gp.rbx, gp.r11, gp.r10, gp.r9, gp.r8]);
    status.u64s(&[gp.rax, gp.rcx, gp.rdx, gp.rsi, gp.rdi, 0, gp.rip, 0, gp.rflags, gp.rsp]).zeros(7 * 8 + 8);
    assert_eq!(status.0.len(), 336);
    note(b"CORE\0", 1, &status.0)
}

/// What QEMU writes of each vCPU beside that: `QEMUCPUState`.
pub fn qemu_note(registers: &Registers) -> Vec<u8> {
    let Registers { gp, .. } = registers;
    let mut state = Bytes::default();
    state.u32s(&[1, 440]).u64s(&[gp.rax, gp.rbx, gp.rcx, gp.rdx, gp.rsi, gp.rdi, gp.rsp, gp.rbp]);
    state.u64s(&[gp.r8, gp.r9, gp.r10, gp.r11, gp.r12, gp.r13, gp.r14, gp.r15, gp.rip, gp.rflags]);
    let table = |base, limit| Segment { base, limit, ..Segment::default() };
    let (gdt, idt) = (table(registers.gdtr.base, registers.gdtr.limit), table(registers.idtr.base, registers.idtr.limit));
    let Registers { cs, ds, es, fs, gs, ss, tr, .. } = *registers;
    for segment in [cs, ds, es, fs, gs, ss, Segment::default(), tr, gdt, idt] {
        // The limit's upper bits are among the descriptor's, where they are also.
        let word = u32::from(segment.attributes) << 8 | segment.limit & 0xf_0000;
        state.u32s(&[segment.selector.into(), segment.limit, word, 0]).u64s(&[segment.base]);
    }
    state.u64s(&[registers.cr0, 0, registers.cr2, registers.cr3, registers.cr4, registers.kernel_gs_base]);
    assert_eq!(state.0.len(), 440);
    note(b"QEMU\0", 0, &state.0)
}

/// As `virsh dump --memory-only` has them: first all of one kind.
pub fn qemu_notes(vcpus: &[Registers]) -> Vec<u8> {
    let kernel = vcpus.iter().flat_map(|registers| kernel_note(&registers.gp));
    kernel.chain(vcpus.iter().flat_map(qemu_note)).collect()
}

/// `vcpu_guest_context` of Xen.
fn xen_context(registers: &Registers) -> Vec<u8> {
    let Registers { gp, .. } = registers;
    let mut context = Bytes::default();
    context.zeros(512).u64s(&[1]);
    context.u64s(&[gp.r15, gp.r14, gp.r13, gp.r12, gp.rbp, gp.rbx, gp.r11, gp.r10, gp.r9, gp.r8]);
    context.u64s(&[gp.rax, gp.rcx, gp.rdx, gp.rsi, gp.rdi]).u32s(&[0, 0]).u64s(&[gp.rip]);
    let Registers { cs, ds, es, fs, gs, ss, .. } = *registers;
    context.u16s(&[cs.selector, 0, 0, 0]).u64s(&[gp.rflags, gp.rsp]);
    for segment in [ss, es, ds, fs, gs] {
        context.u16s(&[segment.selector, 0, 0, 0]);
    }
    // Traps, LDT, GDT, the kernel's stack.
    context.zeros(256 * 16 + 2 * 8 + 17 * 8 + 2 * 8);
    context.u64s(&[registers.cr0, 0, registers.cr2, registers.cr3, registers.cr4, 0, 0, 0]);
    // Debug registers, callbacks.
    context.zeros(8 * 8 + 4 * 8);
    let bases = [gs.base, registers.kernel_gs_base];
    let ring = cs.selector & 3;
    let [kernel, user] = if ring == 0 { bases } else { [bases[1], bases[0]] };
    context.u64s(&[fs.base, kernel, user]);
    assert_eq!(context.0.len(), 5168);
    context.0
}

/// A core of Xen's: its magic, its sections with their bytes.
pub fn xen_sections(sections: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let count = sections.len() + 2;
    let mut names = vec![0];
    let mut all: Vec<(usize, &[u8])> = vec![(0, &[])];
    for (name, bytes) in sections {
        all.push((names.len(), bytes));
        names.extend(name.bytes().chain([0]));
    }
    all.push((0, &names));
    let mut file = elf_header((0, 0), (64, count as u16), count as u16 - 1);
    let mut at = 64 + 64 * count as u64;
    for (name, bytes) in &all {
        file.u32s(&[*name as u32, 1]).u64s(&[0, 0, at, bytes.len() as u64]).u32s(&[0, 0]).u64s(&[1, 0]);
        at += bytes.len() as u64;
    }
    for (_, bytes) in &all {
        file.bytes(bytes);
    }
    file.0
}

pub fn xen_notes(magic: u64, vcpus: u64, pages: u64, version: u64) -> Vec<u8> {
    let mut header = Bytes::default();
    header.u64s(&[magic, vcpus, pages, 4096]);
    [note(b"Xen\0", 0x200_0000, &[]), note(b"Xen\0", 0x200_0001, &header.0), note(b"Xen\0", 0x200_0003, &version.to_le_bytes())]
        .concat()
}

/// A core of an HVM or PVH domain, as `xl dump-core` writes it: pages in any order, and some that are none.
pub fn xen_core(pages: &[(u64, &[u8])], vcpus: &[Registers]) -> Vec<u8> {
    let mut numbers = Bytes::default();
    for (number, _) in pages {
        numbers.u64s(&[*number]);
    }
    xen_sections(&[
        (".note.Xen", xen_notes(0xf00f_ebee, vcpus.len() as u64, pages.len() as u64, 1)),
        (".xen_prstatus", vcpus.iter().flat_map(xen_context).collect()),
        (".xen_pages", pages.iter().flat_map(|(_, bytes)| *bytes).copied().collect()),
        (".xen_pfn", numbers.0),
    ])
}

/// How a page of a kdump is packed.
#[derive(Clone, Copy)]
pub enum Packing {
    None,
    Zlib,
    Snappy,
    Lost,
}

/// A compressed kdump of `count` pages of memory, of which those given are in the file.
pub fn kdump(count: u64, pages: &[(u64, Packing, &[u8])], notes: &[u8]) -> Vec<u8> {
    let blocks = (count.div_ceil(8)).div_ceil(4096);
    let mut file = Bytes::default();
    file.bytes(b"KDUMP   ").u32s(&[6]).zeros(4 * 65).bytes(b"x86_64").zeros(65 - 6 + 65 + 6).u64s(&[0, 0]);
    // Status, block size, blocks of the second header, blocks of both bitmaps, pages (not used any more).
    file.u32s(&[0, 4096, 1, 2 * blocks as u32, u32::MAX]).zeros(5 * 4);
    file.0.resize(4096, 0);
    let bitmaps = 2 * 4096;
    let descriptors = bitmaps + 2 * blocks * 4096;
    let notes_at = descriptors + 24 * pages.len() as u64;
    file.u64s(&[0]).u32s(&[31, 0]).u64s(&[0; 4]).u64s(&[notes_at, notes.len() as u64, 0, 0, 0, 0, count]);
    file.0.resize(bitmaps as usize, 0);
    let set = |all: &mut [u8], page: u64| all[page as usize / 8] |= 1 << (page % 8);
    let (mut first, mut second) = (vec![0; blocks as usize * 4096], vec![0; blocks as usize * 4096]);
    (0..count).for_each(|page| set(&mut first, page));
    for (page, ..) in pages {
        set(&mut second, *page);
    }
    file.bytes(&first).bytes(&second);
    let mut data = Bytes::default();
    data.bytes(notes);
    for (_, packing, page) in pages {
        let (flags, bytes) = match packing {
            Packing::None => (0, page.to_vec()),
            Packing::Zlib => (1, miniz_oxide::deflate::compress_to_vec_zlib(page, 6)),
            Packing::Snappy => (4, snap::raw::Encoder::new().compress_vec(page).unwrap()),
            Packing::Lost => (0, Vec::new()),
        };
        // What packing does not make smaller is left as it is.
        let (flags, bytes) = if bytes.len() < page.len() { (flags, bytes) } else { (0, page.to_vec()) };
        let at = if matches!(packing, Packing::Lost) { 0 } else { notes_at + data.0.len() as u64 };
        file.u64s(&[at]).u32s(&[bytes.len() as u32, flags]).u64s(&[0]);
        data.bytes(&bytes);
    }
    file.bytes(&data.0);
    file.0
}
