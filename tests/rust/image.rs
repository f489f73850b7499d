//! ELF images: what is read from good ones, and how bad ones are refused.

use proptest::prelude::*;
use vmitap::image::Image;
use vmitap::symbols::SymbolKind;
use vmitap::{MemoryAccess, Pa, Va, VmiError};

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const CODE: [u8; 16] = *b"codecodecodecode";

fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    bytes[at..at + N].copy_from_slice(&value);
}

/// An executable with two segments (code, and data with a tail that is not in the file) and a symbol table.
fn elf() -> Vec<u8> {
    let mut file = vec![0; HEADER];
    put(&mut file, 0, *b"\x7fELF\x02\x01\x01");
    put(&mut file, 16, 2_u16.to_le_bytes());
    put(&mut file, 18, 62_u16.to_le_bytes());
    put(&mut file, 20, 1_u32.to_le_bytes());
    put(&mut file, 24, 0xffff_8000_0010_0004_u64.to_le_bytes());
    put(&mut file, 32, (HEADER as u64).to_le_bytes());
    for (at, value) in [(52, HEADER as u16), (54, PROGRAM_HEADER as u16), (56, 2), (58, 64), (60, 4), (62, 3)] {
        put(&mut file, at, value.to_le_bytes());
    }
    let data = HEADER + 2 * PROGRAM_HEADER;
    for (flags, va, pa, filesz, memsz) in
        [(5_u32, 0xffff_8000_0010_0000_u64, 0x10_0000_u64, 16_u64, 16_u64), (6, 0xffff_8000_0010_1000, 0x10_1000, 4, 0x3000)]
    {
        file.extend(1_u32.to_le_bytes());
        file.extend(flags.to_le_bytes());
        for value in [data as u64, va, pa, filesz, memsz, 0x1000] {
            file.extend(value.to_le_bytes());
        }
    }
    file.extend(CODE);
    let strings = file.len();
    let names = b"\0start\0open_file\0table\0SIZE\0file.c\0elsewhere\0";
    file.extend(names);
    let symbols = file.len();
    file.extend([0; 24]);
    let offset = |name: &str| names.windows(name.len()).position(|at| at == name.as_bytes()).unwrap() as u32;
    for (name, info, section, va, size) in [
        ("start", 0x10_u8, 1_u16, 0xffff_8000_0010_0004_u64, 0_u64),
        ("open_file", 0x12, 1, 0xffff_8000_0010_0008, 8),
        ("table", 0x01, 1, 0xffff_8000_0010_1000, 4),
        ("SIZE", 0x10, 0xfff1, 0x4000, 0),
        ("file.c", 0x04, 0xfff1, 0, 0),
        ("elsewhere", 0x10, 0, 0, 0),
    ] {
        file.extend(offset(name).to_le_bytes());
        file.extend([info, 0]);
        file.extend(section.to_le_bytes());
        file.extend(va.to_le_bytes());
        file.extend(size.to_le_bytes());
    }
    let section_headers = file.len();
    put(&mut file, 40, (section_headers as u64).to_le_bytes());
    // Nothing, the code, the symbols, the strings: type, offset, size, link, entry size.
    for (kind, offset, size, link, entry) in
        [(0_u32, 0, 0, 0_u32, 0_u64), (1, data, 16, 0, 0), (2, symbols, 7 * 24, 3, 24), (3, strings, names.len(), 0, 0)]
    {
        file.extend(0_u32.to_le_bytes());
        file.extend(kind.to_le_bytes());
        file.extend([0; 16]);
        file.extend((offset as u64).to_le_bytes());
        file.extend((size as u64).to_le_bytes());
        file.extend(link.to_le_bytes());
        file.extend([0; 4]);
        file.extend(1_u64.to_le_bytes());
        file.extend(entry.to_le_bytes());
    }
    file
}

/// Why the image is refused after one value in it is changed.
fn refused<const N: usize>(at: usize, value: [u8; N]) -> String {
    let mut file = elf();
    put(&mut file, at, value);
    reason(&file)
}

fn reason(file: &[u8]) -> String {
    match Image::parse("guest.elf", file) {
        Err(VmiError::Image { what, reason }) if what == "guest.elf" => reason,
        other => panic!("{other:?}"),
    }
}

/// Where a field of a program header lies.
fn field(segment: usize, offset: usize) -> usize {
    HEADER + segment * PROGRAM_HEADER + offset
}

#[test]
fn an_image_gives_its_segments_entry_and_symbols() {
    let file = elf();
    let image = Image::parse("guest.elf", &file).unwrap();
    assert_eq!(image.entry, Va(0xffff_8000_0010_0004));
    let [code, data] = image.segments[..] else { panic!("{image:?}") };
    assert_eq!((code.va, code.pa, code.data, code.memory_size), (Va(0xffff_8000_0010_0000), Pa(0x10_0000), &CODE[..], 16));
    assert_eq!((code.access, data.access), (MemoryAccess::RX, MemoryAccess::RW));
    assert_eq!((data.data, data.memory_size), (&CODE[..4], 0x3000));
    assert_eq!(image.end(), Pa(0x10_4000));
    let symbols: Vec<_> =
        image.symbols.iter().map(|symbol| (symbol.name.as_str(), symbol.kind, symbol.size, symbol.global)).collect();
    assert_eq!(
        symbols,
        [
            ("SIZE", SymbolKind::Absolute, 0, true),
            ("start", SymbolKind::Label, 0, true),
            ("open_file", SymbolKind::Function, 8, true),
            ("table", SymbolKind::Object, 4, false),
        ]
    );
    assert_eq!(image.symbols.describe(Va(0xffff_8000_0010_000a)).as_deref(), Some("open_file+0x2"));
}

#[test]
fn an_image_is_read_from_any_alignment() {
    let file = elf();
    for shift in 1..8 {
        let shifted: Vec<u8> = vec![0; shift].into_iter().chain(file.iter().copied()).collect();
        assert_eq!(Image::parse("guest.elf", &shifted[shift..]).unwrap().symbols.len(), 4);
    }
}

#[test]
fn a_file_of_the_wrong_sort_is_refused_with_what_was_found() {
    assert!(reason(b"").contains("magic"));
    assert!(reason(b"#!/bin/sh").contains("magic"));
    assert!(reason(b"\x7fELF").contains("class 0"));
    assert!(refused(4, [1]).contains("class 1"));
    assert!(refused(5, [2]).contains("byte order 2"));
    assert!(refused(18, 183_u16.to_le_bytes()).contains("machine 183"));
    assert!(refused(16, 3_u16.to_le_bytes()).contains("type 3"));
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let file = elf();
    for len in 0..file.len() {
        reason(&file[..len]);
    }
}

#[test]
fn segments_with_impossible_places_are_refused() {
    assert!(refused(field(0, 32), 0x7fff_ffff_u64.to_le_bytes()).contains("segment 0: 0x7fffffff bytes at offset"));
    assert!(refused(field(0, 8), u64::MAX.to_le_bytes()).contains("reach past the file"));
    assert!(
        refused(field(1, 40), 3_u64.to_le_bytes()).contains("segment 1: 0x4 bytes in the file are more than the 0x3 in memory")
    );
    assert!(refused(field(1, 24), (1_u64 << 52).to_le_bytes()).contains("physical address space"));
    assert!(refused(field(1, 24), u64::MAX.to_le_bytes()).contains("physical address space"));
    assert!(refused(field(1, 16), (u64::MAX - 0x100).to_le_bytes()).contains("virtual address space"));
    assert!(
        refused(field(1, 24), 0x10_000f_u64.to_le_bytes())
            .contains("physical addresses 0x100000 (0x10 bytes) and 0x10000f overlap")
    );
    assert!(refused(field(1, 16), 0xffff_8000_000f_ffff_u64.to_le_bytes()).contains("virtual addresses"));
    assert!(refused(24, 0x7000_u64.to_le_bytes()).contains("entry point 0x7000"));
    let mut none = elf();
    put(&mut none, field(0, 0), [6]);
    put(&mut none, field(1, 0), [6]);
    assert!(reason(&none).contains("no segment"));
}

#[test]
fn names_that_never_end_are_refused() {
    let mut file = elf();
    let strings = file.len() as u64;
    file.extend(vec![b'a'; 5000]);
    file.push(0);
    let header = u64::from_le_bytes(file[40..48].try_into().unwrap()) as usize + 3 * 64;
    put(&mut file, header + 24, strings.to_le_bytes());
    put(&mut file, header + 32, 5001_u64.to_le_bytes());
    assert!(reason(&file).contains("more than 4096"));
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..512), magic in any::<bool>()) {
        let mut bytes = bytes;
        if magic {
            bytes.splice(..bytes.len().min(7), *b"\x7fELF\x02\x01\x01");
        }
        let _ = Image::parse("random", &bytes);
    }

    #[test]
    fn a_changed_image_is_refused_or_keeps_the_promises(
        changes in prop::collection::vec((any::<prop::sample::Index>(), prop_oneof![any::<u8>(), Just(0), Just(0xff), Just(0x80)]), 1..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut file = elf();
        for (index, value) in changes {
            let at = index.index(file.len());
            file[at] = value;
        }
        let end = cut.map_or(file.len(), |cut| cut.index(file.len()));
        if let Ok(image) = Image::parse("changed", &file[..end]) {
            prop_assert!(image.end().0 <= 1 << 52);
            for segment in &image.segments {
                prop_assert!(segment.data.len() as u64 <= segment.memory_size);
                prop_assert!(segment.va.checked_add(segment.memory_size - 1).is_some());
            }
            for symbol in image.symbols.iter() {
                let _ = image.symbols.describe(symbol.va);
                prop_assert!(image.symbols.get(&symbol.name).is_some());
            }
        }
    }
}
