//! Memory dumps: a guest's memory in each format, and how what is broken is refused.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vmitap::arch::amd64::{AddressContext, DescriptorTable, GpRegisters, Registers, Segment};
use vmitap::core::VmiCore;
use vmitap::driver::dump::{DumpDriver, Source};
use vmitap::driver::{VmiControl, VmiDriver, VmiInfo, VmiRead, VmiRegisters};
use vmitap::session::{EventSet, Limits, Session, TapKind, TapSpec};
use vmitap::tap::OnWrite;
use vmitap::{Pa, Va, VcpuId, View, VmiError};

use crate::dump_files::*;

const PAGE: usize = 4096;
const MIXED: u64 = 0x9e37_79b9_7f4a_7c15;

fn opened(file: &[u8]) -> Result<DumpDriver, VmiError> {
    DumpDriver::new("guest.dump", Box::new(file.to_vec()))
}

/// Why a file is refused.
fn reason(file: &[u8]) -> String {
    match opened(file).map(|_| ()) {
        Err(VmiError::Image { what, reason }) if what == "guest.dump" => reason,
        other => panic!("{other:?}"),
    }
}

/// Memory of which no two pages are the same, and that can be packed.
fn memory(pages: usize) -> Vec<u8> {
    let word = |word: u64| if word.is_multiple_of(2) { word.wrapping_mul(MIXED) } else { 0x1122_3344_5566_7788 };
    (0..(pages * PAGE / 8) as u64).flat_map(|number| word(number).to_le_bytes()).collect()
}

/// Registers of which no two are the same, but for those that are in no dump.
fn registers(seed: u64) -> Registers {
    let next = std::cell::Cell::new(seed << 16);
    let n = || {
        next.set(next.get() + 0x101);
        next.get()
    };
    let s = || Segment { selector: n() as u16 & !3, attributes: n() as u16 & 0xf0ff, limit: n() as u32, base: n() };
    let t = || DescriptorTable { base: n(), limit: n() as u32 };
    let gp = GpRegisters {
        rax: n(),
        rcx: n(),
        rdx: n(),
        rbx: n(),
        rsp: n(),
        rbp: n(),
        rsi: n(),
        rdi: n(),
        r8: n(),
        r9: n(),
        r10: n(),
        r11: n(),
        r12: n(),
        r13: n(),
        r14: n(),
        r15: n(),
        rip: n(),
        rflags: n(),
    };
    let (cr0, cr2, cr3, cr4) = (n(), n(), n(), n());
    let (cs, ss, ds, es, fs, gs, tr) = (s(), s(), s(), s(), s(), s(), s());
    let (gdtr, idtr, kernel_gs_base) = (t(), t(), n());
    Registers { gp, cr0, cr2, cr3, cr4, cs, ss, ds, es, fs, gs, tr, gdtr, idtr, kernel_gs_base, ..Registers::default() }
}

/// What Xen's format has of those: selectors, and the bases of FS and GS.
fn as_xen_has_them(all: &Registers) -> Registers {
    let selector = |segment: Segment| Segment { selector: segment.selector, ..Segment::default() };
    let with_base = |segment: Segment| Segment { base: segment.base, ..selector(segment) };
    Registers {
        cs: selector(all.cs),
        ss: selector(all.ss),
        ds: selector(all.ds),
        es: selector(all.es),
        fs: with_base(all.fs),
        gs: with_base(all.gs),
        tr: Segment::default(),
        gdtr: DescriptorTable::default(),
        idtr: DescriptorTable::default(),
        ..*all
    }
}

/// The same eight pages in every format: four from 0 on, then a hole of two, then four.
fn every_format() -> Vec<(&'static str, Vec<u8>)> {
    let memory = memory(10);
    let (low, high) = (&memory[..4 * PAGE], &memory[6 * PAGE..]);
    let vcpus = [registers(1), registers(2)];
    let page = |number: usize| (number as u64, &memory[number * PAGE..][..PAGE]);
    let no_page = (u64::MAX, &memory[..PAGE]);
    let mut pages = [8, 9, 0, 1, 2, 7, 3, 6].map(page).to_vec();
    pages.insert(3, no_page);
    let runs = [(0, low.len() as u64, low), (0x6000, high.len() as u64, high)];
    let ways = [Packing::None, Packing::Zlib, Packing::Snappy];
    let packed: Vec<_> =
        [0, 1, 2, 3, 6, 7, 8, 9].map(|number| (number, ways[number as usize % 3], page(number as usize).1)).to_vec();
    vec![
        ("LiME", lime(&[(0x6000, high), (0, low)])),
        ("ELF core", elf_core(&runs, &qemu_notes(&vcpus))),
        ("Xen core", xen_core(&pages, &vcpus)),
        ("kdump", kdump(12, &packed, &qemu_notes(&vcpus))),
    ]
}

#[test]
fn what_a_dump_holds_is_read_and_a_hole_is_an_error_with_its_address() {
    let memory = memory(10);
    for (format, file) in every_format() {
        let dump = opened(&file).unwrap();
        assert_eq!((dump.info().memory_size, dump.version().as_str()), (0xa000, format));
        let read = |pa: u64, len: usize| {
            let mut bytes = vec![0xee; len];
            dump.read(Pa(pa), &mut bytes).map(|()| bytes)
        };
        for (from, to) in [
            (0, 0x4000),
            (0x6000, 0xa000),
            (0xfff, 0x1001),
            (0x2ffe, 0x3004),
            (0x7ff0, 0x9010),
            (0x3fff, 0x4000),
            (0x9fff, 0xa000),
            (5, 5),
        ] {
            assert_eq!(read(from as u64, to - from).unwrap(), memory[from..to], "{format}: {from:#x}..{to:#x}");
        }
        let missing = |pa, len| Err(VmiError::NotInDump { pa: Pa(pa), len });
        assert_eq!(read(0x4000, 1), missing(0x4000, 1), "{format}");
        assert_eq!(read(0x3ffe, 4), missing(0x4000, 2), "{format}: a read that runs into the hole");
        assert_eq!(read(0x5fff, 2), missing(0x5fff, 2), "{format}: a read that begins in it");
        let beyond = |pa, len| Err(VmiError::OutOfRange { pa: Pa(pa), len, end: Pa(0xa000) });
        assert_eq!(read(0x9fff, 2), beyond(0x9fff, 2), "{format}");
        assert_eq!(read(u64::MAX, 2), beyond(u64::MAX, 2), "{format}");
    }
    let raw = opened(&memory).unwrap();
    let mut all = vec![0; memory.len()];
    raw.read(Pa(0), &mut all).unwrap();
    assert_eq!((all, raw.info().memory_size, raw.version().as_str()), (memory, 0xa000, "raw"));
}

#[test]
fn a_page_that_cannot_be_unpacked_is_an_error_and_one_that_was_lost_is_not_there() {
    let memory = memory(3);
    let page = |number: usize| &memory[number * PAGE..][..PAGE];
    let good = kdump(3, &[(0, Packing::Zlib, page(0)), (1, Packing::Lost, page(1)), (2, Packing::Snappy, page(2))], &[]);
    let dump = opened(&good).unwrap();
    let mut bytes = [0; 8];
    assert_eq!(dump.read(Pa(PAGE as u64), &mut bytes), Err(VmiError::NotInDump { pa: Pa(0x1000), len: 8 }));
    // Again and again, also when other pages have been unpacked in between.
    for number in [0, 2, 0, 0, 2] {
        dump.read(Pa((number * PAGE) as u64 + 8), &mut bytes).unwrap();
        assert_eq!(bytes, page(number)[8..16]);
    }
    let descriptors = 4 * PAGE;
    for (at, value, part) in [
        (descriptors + 12, 4_u32, "the page at 0x0"),
        (descriptors + 12, 0, "the page at 0x0"),
        (descriptors + 12, 2, "packed with LZO"),
        (descriptors + 8, 100, "the page at 0x0"),
        (descriptors + 8, 5000, "a page: 0x1388 bytes"),
        (descriptors + 4, 1, "reach past the file"),
    ] {
        let mut bad = good.clone();
        bad[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let refused = opened(&bad).unwrap().read(Pa(0), &mut bytes);
        assert!(matches!(&refused, Err(VmiError::Image { reason, .. }) if reason.contains(part)), "{part}: {refused:?}");
    }
}

#[test]
fn the_pages_of_a_large_kdump_are_found_across_all_of_its_bitmap() {
    let memory = memory(1500);
    let numbers = |index: u64| index * 37 + index % 5;
    let pages: Vec<_> =
        (0..1500_u64).map(|index| (numbers(index), Packing::Snappy, &memory[index as usize * PAGE..][..PAGE])).collect();
    let dump = opened(&kdump(numbers(1499) + 1000, &pages, &[])).unwrap();
    assert_eq!(dump.info().memory_size, (numbers(1499) + 1) * PAGE as u64);
    for index in (0..1500).step_by(7) {
        let mut bytes = [0; 8];
        dump.read(Pa(numbers(index) * PAGE as u64), &mut bytes).unwrap();
        assert_eq!(bytes, memory[index as usize * PAGE..][..8]);
        let beside = (numbers(index) + 1) * PAGE as u64;
        assert_eq!(dump.read(Pa(beside), &mut bytes), Err(VmiError::NotInDump { pa: Pa(beside), len: 8 }));
    }
}

#[test]
fn the_last_page_of_a_dump_may_be_there_in_part() {
    let dump = opened(&lime(&[(0, &[7; 4100])])).unwrap();
    let mut bytes = [0; 4];
    dump.read(Pa(4096), &mut bytes).unwrap();
    assert_eq!((bytes, dump.info().memory_size), ([7; 4], 0x2000));
    assert_eq!(dump.read(Pa(4098), &mut bytes), Err(VmiError::NotInDump { pa: Pa(4100), len: 2 }));
}

#[test]
fn the_registers_of_each_vcpu_are_those_in_the_notes() {
    let vcpus = [registers(1), registers(2)];
    for (format, file) in every_format() {
        let dump = opened(&file).unwrap();
        if format == "LiME" {
            continue;
        }
        assert_eq!((dump.info().vcpus, dump.caps().registers), (2, true));
        for (number, all) in vcpus.iter().enumerate() {
            let expected = if format == "Xen core" { as_xen_has_them(all) } else { *all };
            assert_eq!(dump.registers(VcpuId(number as u16)).unwrap(), expected, "{format}");
        }
        let missing = VmiError::VcpuNotFound { vcpu: VcpuId(2), count: 2 };
        assert_eq!(dump.registers(VcpuId(2)), Err(missing));
    }
    // In ring 3 the other base of GS is the one in use, and an older QEMU has only that.
    let user = Registers { cs: Segment { selector: 0x33, ..registers(3).cs }, ..registers(3) };
    let xen = opened(&xen_core(&[(0, &[0; PAGE])], &[user])).unwrap();
    assert_eq!(xen.registers(VcpuId(0)).unwrap(), as_xen_has_them(&user));
    let mut old = qemu_note(&user);
    old.truncate(old.len() - 8);
    old[4..8].copy_from_slice(&432_u32.to_le_bytes());
    let qemu = opened(&elf_core(&[(0, 4096, &[0; PAGE])], &old)).unwrap();
    assert_eq!(qemu.registers(VcpuId(0)).unwrap(), Registers { kernel_gs_base: 0, ..user });
}

#[test]
fn without_control_registers_the_error_says_that_a_root_is_needed() {
    let kernel = elf_core(&[(0, 4096, &[0; PAGE])], &[kernel_note(&registers(1).gp), kernel_note(&registers(2).gp)].concat());
    for (file, vcpus) in [(kernel, 2), (vec![0; PAGE], 0), (lime(&[(0, &[1])]), 0)] {
        let dump = opened(&file).unwrap();
        assert_eq!((dump.info().vcpus, dump.caps().registers), (vcpus, false));
        let refused = dump.registers(VcpuId(0)).unwrap_err();
        assert_eq!(refused, VmiError::NotSupported { driver: "dump", capability: "registers" });
        assert!(refused.to_string().ends_with("does not offer registers, so virtual addresses need a root"), "{refused}");
    }
}

#[test]
fn segments_that_show_the_same_memory_are_one_and_others_are_refused() {
    let memory = memory(4);
    let mut whole = elf_core(&[(0, 0x4000, &memory), (0x1000, 0x1000, &memory[PAGE..2 * PAGE])], &[]);
    // kdump has the kernel's text once more: inside of the memory, at an offset of its own.
    let dump = opened(&whole).unwrap();
    let mut all = vec![0; memory.len()];
    dump.read(Pa(0), &mut all).unwrap();
    assert_eq!(all, memory);
    // QEMU with paging: the same bytes of the file, for two virtual addresses.
    let second = 64 + 2 * 56;
    let first = u64::from_le_bytes(whole[64 + 56 + 8..][..8].try_into().unwrap());
    whole[second + 8..][..8].copy_from_slice(&(first + 0x3000).to_le_bytes());
    whole[second + 24..][..8].copy_from_slice(&0x3000_u64.to_le_bytes());
    whole[second + 32..][..8].copy_from_slice(&0x2000_u64.to_le_bytes());
    let mut behind = vec![0; PAGE + 8];
    opened(&whole).unwrap().read(Pa(0x3ff8), &mut behind).unwrap();
    assert_eq!(behind, [&memory[0x3ff8..], &memory[PAGE..2 * PAGE]].concat());
    // At another offset the second one begins inside of the first and ends behind it.
    whole[second + 8..][..8].copy_from_slice(&first.to_le_bytes());
    assert!(reason(&whole).contains("overlaps"), "{}", reason(&whole));
    for overlapping in [lime(&[(0, &[1; 64]), (63, &[1; 2])]), xen_core(&[(1, &[0; PAGE]), (1, &[0; PAGE])], &[])] {
        assert!(reason(&overlapping).contains("overlaps"));
    }
    let process = elf_core(&[(0, 0x1000, &memory[..PAGE]), (0, 0x1000, &memory[..PAGE])], &[]);
    assert!(reason(&process).contains("core of a process"));
}

#[test]
fn what_was_left_out_of_a_segment_is_not_there() {
    let memory = memory(1);
    let dump = opened(&elf_core(&[(0x1000, 0x3000, &memory), (0x9000, 0x1000, &[]), (0x5000, 0x1000, &memory)], &[])).unwrap();
    let mut byte = [0];
    assert_eq!(dump.read(Pa(0x2000), &mut byte), Err(VmiError::NotInDump { pa: Pa(0x2000), len: 1 }));
    assert_eq!(dump.info().memory_size, 0x6000);
}

/// The magic of a core of an HVM domain.
const HVM: u64 = 0xf00f_ebee;

#[test]
fn absurd_numbers_are_refused_by_name_and_at_once() {
    let page = [0_u8; PAGE];
    let put = |file: &[u8], at: usize, value: &[u8]| {
        let mut file = file.to_vec();
        file[at..at + value.len()].copy_from_slice(value);
        file
    };
    let core = elf_core(&[(0, 4096, &page)], &[]);
    let run = lime(&[(0, &page)]);
    let packed = kdump(1, &[(0, Packing::Zlib, &page)], &[]);
    let (max, past) = (u64::MAX.to_le_bytes(), (1_u64 << 52).to_le_bytes());
    let segment = 64 + 56;
    let many = {
        let mut file = put(&core, 56, &0xffff_u16.to_le_bytes());
        let at = file.len() as u64;
        file[40..48].copy_from_slice(&at.to_le_bytes());
        let mut section = vec![0; 64];
        section[44..48].copy_from_slice(&u32::MAX.to_le_bytes());
        file.extend(section);
        file
    };
    let xen = |magic, vcpus, pages, version, numbers: &[u64]| {
        xen_sections(&[
            (".note.Xen", xen_notes(magic, vcpus, pages, version)),
            (".xen_prstatus", Vec::new()),
            (".xen_pages", page.to_vec()),
            (".xen_pfn", numbers.iter().flat_map(|number| number.to_le_bytes()).collect()),
        ])
    };
    let began = Instant::now();
    for (file, part) in [
        (Vec::new(), "like no known format"),
        (vec![0; PAGE + 1], "like no known format"),
        (b"\x7fELF".to_vec(), "the ELF header"),
        (put(&core, 4, &[1]), "ELF class 1"),
        (put(&core, 5, &[2]), "byte order 2"),
        (put(&core, 16, &[2]), "ELF type 2"),
        (put(&core, 18, &[183]), "machine 183"),
        (put(&core, 54, &[32]), "32 bytes each"),
        (put(&core, 32, &max), "the program headers"),
        (many, "4294967295 of them"),
        (put(&core, segment + 8, &max), "a segment"),
        (put(&core, segment + 24, &past), "past physical address space"),
        (put(&core, segment + 24, &max), "past physical address space"),
        (put(&core, segment + 32, &max), "a segment"),
        (elf_core(&[], &[]), "holds no memory"),
        (elf_core(&[(0, 4096, &page)], &[1; 11]), "its notes"),
        (elf_core(&[(0, 4096, &page)], &note(b"QEMU\0", 0, &[1, 0, 0, 0])), "too few"),
        (elf_core(&[(0, 4096, &page)], &note(b"QEMU\0", 0, &[2, 0, 0, 0])), "version 2"),
        (elf_core(&[(0, 4096, &page)], &note(b"CORE\0", 1, &[]).repeat(8193)), "8193 vCPUs"),
        (put(&run, 4, &[2]), "LiME version 2"),
        (put(&run, 8, &[1, 0x10]), "to 0xfff is none"),
        (put(&run, 16, &max), "a run"),
        (put(&run, 16, &[0xfe]), "a LiME header"),
        ([run.clone(), page[..100].to_vec()].concat(), "offset 0x1020"),
        (xen(0xf00f_ebed, 0, 1, 1, &[0]), "paravirtualized"),
        (xen(1, 0, 1, 1, &[0]), "magic 0x1"),
        (xen(HVM, 0, 1, 1 << 32, &[0]), "format 1"),
        (xen(HVM, 1, 1, 1, &[0]), ".xen_prstatus"),
        (xen(HVM, u64::MAX, 1, 1, &[0]), "8192 vCPUs"),
        (xen(HVM, 0, u64::MAX, 1, &[0]), ".xen_pfn"),
        (xen(HVM, 0, 2, 1, &[0]), ".xen_pfn"),
        (xen(HVM, 0, 2, 1, &[0, 1]), ".xen_pages"),
        (xen(HVM, 0, 0, 1, &[]), "holds no memory"),
        (xen(HVM, 0, 1, 1, &[1 << 40]), "past physical address space"),
        (xen(HVM, 0, 1, 1, &[u64::MAX - 1]), "past physical address space"),
        (xen_sections(&[(".note.Xen", Vec::new())]), "say nothing of the domain"),
        (xen_sections(&[]), "no section .note.Xen"),
        (put(&packed, 424, &[2]), "packed with LZO"),
        (put(&packed, 424, &[0x20]), "packed with zstd"),
        (put(&packed, 272, b"ia64"), "x86-64"),
        (put(&packed, 428, &[0, 0x40]), "blocks of 0x4000"),
        (put(&packed, 432, &[0]), "no second header"),
        (put(&packed, 436, &[1]), "too few for two bitmaps"),
        (put(&packed, 436, &max[..4]), "the bitmap of pages"),
        (put(&packed, 4096 + 96, &max), "too few for two bitmaps"),
        (put(&packed, 4096 + 12, &[1]), "split dump"),
        (put(&packed, 4096 + 56, &max), "the notes"),
        (put(&packed, 3 * 4096, &[0]), "holds no memory"),
        ([b"PAGEDU64".to_vec(), vec![0; PAGE - 8]].concat(), "crash dump of Windows"),
        ([b"\x1f\x8b".to_vec(), vec![0; PAGE - 2]].concat(), "gzip"),
    ] {
        let reason = reason(&file);
        assert!(reason.contains(part), "{part:?} is not in {reason:?}");
    }
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

/// A file with a hole: what is behind its first bytes is zeros, and costs nothing on disk.
struct Sparse {
    head: Vec<u8>,
    size: u64,
}

impl Source for Sparse {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), VmiError> {
        buf.fill(0);
        let there = self.head.get(offset as usize..).unwrap_or_default();
        let len = there.len().min(buf.len());
        buf[..len].copy_from_slice(&there[..len]);
        Ok(())
    }
}

#[test]
fn counts_that_only_a_hole_of_the_file_bears_out_are_refused_before_memory_is_taken_for_them() {
    const TIB: u64 = 1 << 40;
    let xen = |vcpus, pages| {
        let names = [".xen_prstatus", ".xen_pages", ".xen_pfn"].map(|name| (name, Vec::new()));
        let notes = (".note.Xen", xen_notes(HVM, vcpus, pages, 1));
        let mut file = xen_sections(&[&[notes][..], &names].concat());
        // All three begin behind what is written, and share the hole.
        for section in 2..5 {
            let at = 64 + 64 * section;
            file[at + 24..][..8].copy_from_slice(&0x1000_u64.to_le_bytes());
            file[at + 32..][..8].copy_from_slice(&TIB.to_le_bytes());
        }
        file
    };
    let mut elf = elf_core(&[(0, 4096, &[0; PAGE])], &[]);
    elf[56..58].copy_from_slice(&0xffff_u16.to_le_bytes());
    let at = elf.len() as u64;
    elf[40..48].copy_from_slice(&at.to_le_bytes());
    let mut section = [0; 64];
    section[44..48].copy_from_slice(&(1_u32 << 30).to_le_bytes());
    elf.extend(section);
    let mut packed = kdump(1, &[(0, Packing::None, &[0; PAGE])], &[]);
    packed[436..440].copy_from_slice(&(1_u32 << 25).to_le_bytes());
    packed[4096 + 96..][..8].copy_from_slice(&(1_u64 << 38).to_le_bytes());
    for (head, part) in [
        (xen(0, 1 << 28), "more than 1048576 runs of memory"),
        (xen(1 << 20, 1), "more than 8192 vCPUs"),
        (elf, "1073741824 of them are more than 1048576"),
        (packed, "the bitmap of pages: 0x800000000 bytes are more than"),
    ] {
        let refused = DumpDriver::new("guest.dump", Box::new(Sparse { head, size: TIB + 0x1000 })).map(|_| ());
        assert!(matches!(&refused, Err(VmiError::Image { reason, .. }) if reason.contains(part)), "{part}: {refused:?}");
    }
}

#[test]
fn a_dump_that_is_cut_off_anywhere_is_refused() {
    for (format, file) in every_format() {
        // Headers byte by byte, memory in steps that are no divisor of anything.
        let at = (0..file.len()).filter(|at| *at < 3000 || at % 251 == 0 || file.len() - at < 600);
        for len in at {
            let cut = opened(&file[..len]).map(|_| ());
            let whole_runs = format == "LiME" && len == 32 + 4 * PAGE;
            // What is behind the descriptors of a kdump is looked at when it is read.
            let is_packed = format == "kdump" && len >= 4 * PAGE;
            assert!(matches!(cut, Err(VmiError::Image { .. })) || whole_runs || is_packed, "{format} with {len} bytes: {cut:?}");
        }
    }
}

/// Reads here and there, and translates: whatever comes, it comes at once and is a typed error or data.
fn look_at(dump: DumpDriver) {
    let info = dump.info().clone();
    let contexts: Vec<_> = (0..info.vcpus.min(4)).filter_map(|vcpu| dump.registers(VcpuId(vcpu)).ok()).collect();
    let vmi = VmiCore::new(Box::new(dump));
    for pa in [0, 0xff8, info.memory_size.saturating_sub(16), 1 << 51] {
        let _ = vmi.read_bytes(Pa(pa), 64);
    }
    for root in contexts.iter().map(AddressContext::from).chain([AddressContext::new(Pa(0x1000))]) {
        let _ = vmi.translate(Va(0xffff_8000_0000_1234), root);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn a_dump_with_wrong_bytes_is_refused_or_read_and_never_worse(
        which in 0..4_usize,
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..6),
    ) {
        let (_, mut file) = every_format().swap_remove(which);
        let headers = file.len().min(2600);
        for (at, value, in_headers) in flips {
            let at = at.index(if in_headers { headers } else { file.len() });
            file[at] = value;
        }
        match opened(&file) {
            Ok(dump) => look_at(dump),
            Err(error) => prop_assert!(matches!(error, VmiError::Image { .. }), "{error}"),
        }
    }

    #[test]
    fn bytes_of_any_kind_are_refused_or_read_and_never_worse(
        magic in 0..4_usize,
        rest in proptest::collection::vec(any::<u8>(), 0..5000),
    ) {
        let heads: [&[u8]; 4] = [b"", b"\x7fELF\x02\x01", b"EMiL\x01\0\0\0", b"KDUMP   "];
        let file = [heads[magic], &rest].concat();
        match opened(&file) {
            Ok(dump) => look_at(dump),
            Err(error) => prop_assert!(matches!(error, VmiError::Image { .. }), "{error}"),
        }
    }
}

#[test]
fn a_long_read_takes_no_memory_for_what_is_not_there() {
    let vmi = VmiCore::new(Box::new(opened(&lime(&[(0, &[1; PAGE]), (1 << 50, &[2; PAGE])])).unwrap()));
    let missing = vmi.read_bytes(Pa(0), 1 << 50).map(|_| ());
    assert_eq!(missing, Err(VmiError::NotInDump { pa: Pa(0x1000), len: (1 << 50) - 0x1000 }));
}

#[test]
fn what_a_dump_does_not_hold_of_a_read_is_told_to_the_end_of_what_was_asked_for() {
    const MIB: usize = 1 << 20;
    // A hole of a page, far behind where a long read begins, and memory behind it.
    let (low, high) = (vec![1; 2 * MIB + PAGE], vec![2; 2 * MIB]);
    let hole = low.len() as u64;
    let vmi = VmiCore::new(Box::new(opened(&lime(&[(0, &low), (hole + PAGE as u64, &high)])).unwrap()));
    for (from, len) in [(0, 4 * MIB), (MIB as u64 - 8, 3 * MIB), (hole - 4, 8), (hole, 1), (hole, 2 * MIB)] {
        let missing = vmi.read_bytes(Pa(from), len).map(|_| ());
        assert_eq!(missing, Err(VmiError::NotInDump { pa: Pa(hole), len: from + len as u64 - hole }), "{len} at {from:#x}");
    }
    let text = VmiError::NotInDump { pa: Pa(0xa0000), len: 16 }.to_string();
    assert_eq!(text, "the dump does not hold physical address 0xa0000, from where 16 bytes are wanted");
}

// --- files ---

fn folder(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("dump-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

#[test]
fn a_file_that_is_cut_off_beneath_a_session_is_an_error_and_no_signal() {
    let folder = folder("cut");
    let path = folder.join("guest.raw");
    std::fs::write(&path, memory(4)).unwrap();
    let dump = DumpDriver::open(&path).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(0x1800).unwrap();
    let mut bytes = [0; 16];
    dump.read(Pa(0x17f0), &mut bytes).unwrap();
    let cut = dump.read(Pa(0x17f8), &mut bytes);
    let Err(VmiError::Driver { op: "reading the dump", errno: 0, detail }) = cut else { panic!("{cut:?}") };
    assert!(detail.contains("offset 0x17f8") && detail.contains("0x1800"), "{detail}");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn what_is_no_file_is_not_opened() {
    let folder = folder("none");
    for path in [folder.clone(), folder.join("missing"), PathBuf::from("/dev/zero")] {
        let refused = DumpDriver::open(&path).map(|_| ());
        assert!(matches!(&refused, Err(VmiError::Attach { hint, .. }) if !hint.is_empty()), "{refused:?}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

// --- sessions ---

#[test]
fn a_session_looks_at_a_dump_and_refuses_the_rest_before_anything_is_done() {
    let dump = || Box::new(opened(&every_format().swap_remove(1).1).unwrap()) as Box<dyn VmiDriver>;
    let refused = Session::new(dump(), OnWrite::default()).map(|_| ());
    assert!(matches!(refused, Err(VmiError::NotSupported { driver: "dump", .. })), "{refused:?}");
    let mut session = Session::reading(dump());
    assert_eq!(session.registers(VcpuId(1)).unwrap(), registers(2));
    assert_eq!(session.vmi().read_pa_u64(Pa(16)).unwrap(), 2_u64.wrapping_mul(MIXED));
    // An address that is none at all, and still it is the guest that cannot be tapped.
    let spec = |kind| TapSpec {
        kind,
        va: Va(0x0001_0000_0000_0000),
        context: AddressContext::new(Pa(0)),
        global: false,
        view: View::DEFAULT,
        on_write: None,
        key: None,
        wanted: true,
        enabled: true,
    };
    let set = EventSet { cpuid: true, ..EventSet::default() };
    for kind in [TapKind::Breakpoint, TapKind::Monitor(set)] {
        assert_eq!(session.add(&spec(kind)), Err(VmiError::NotSupported { driver: "dump", capability: "events" }));
    }
    let no = |capability| Err(VmiError::NotSupported { driver: "dump", capability });
    assert_eq!(session.poll(&Limits::default()).map(|_| ()), no("running"));
    assert_eq!(session.pause(), no("pausing"));
    assert_eq!(session.write_pa(Pa(0), &[1]), no("writing guest memory"));
    session.detach().unwrap();
    assert!(session.is_restored());
}

#[test]
fn letting_go_of_a_dump_is_no_error() {
    opened(&[0; PAGE]).unwrap().let_go().unwrap();
}
