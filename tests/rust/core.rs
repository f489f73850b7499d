//! Reads, writes, strings and translation through `VmiCore`.

use vmitap::arch::amd64::{AddressContext, pte};
use vmitap::core::{Address, StringEnd, VmiCore};
use vmitap::driver::mock::{Call, CallKind, MockDriver, PageSize};
use vmitap::driver::{VmiDriver, VmiFrames, VmiWrite};
use vmitap::error::TranslationFault;
use vmitap::{Pa, Va, VmiError};

const MEMORY: u64 = 1 << 20;
const BASE: Va = Va(0x40_0000);
const RW: u64 = pte::P | pte::W;

/// Three pages from `BASE` on, at frames 5, 3 and 9; the fourth is not mapped.
fn guest() -> (VmiCore<MockDriver>, AddressContext) {
    let mut driver = MockDriver::new(MEMORY, 1);
    let context = driver.new_root(4).unwrap();
    for (page, frame) in [(0, 5), (1, 3), (2, 9)] {
        driver.map(context, Va(BASE.0 + page * 0x1000), Pa(frame * 0x1000), PageSize::Size4K, RW).unwrap();
    }
    (VmiCore::new(Box::new(driver)), context)
}

fn at(offset: u64) -> Va {
    Va(BASE.0 + offset)
}

fn reads(vm: &VmiCore<MockDriver>) -> usize {
    vm.driver().count_of(CallKind::Read)
}

#[test]
fn a_core_over_a_trait_object_reads_and_writes() {
    let (vm, context) = guest();
    let driver: Box<dyn VmiDriver> = vm.into_driver();
    let mut vm: VmiCore<dyn VmiDriver> = VmiCore::new(driver);
    vm.write_u64(at(0xffc), context, 0x1122_3344_5566_7788).unwrap();
    assert_eq!(vm.read_u64(at(0xffc), context).unwrap(), 0x1122_3344_5566_7788);
    assert_eq!(vm.driver().info().driver, "mock");
}

#[test]
fn a_core_can_move_to_another_thread() {
    fn needs_send<T: Send>(_: &T) {}
    needs_send(&guest().0);
}

#[test]
fn reads_and_writes_cross_pages_whose_frames_are_apart() {
    let (mut vm, context) = guest();
    let bytes: Vec<u8> = (0..0x1800_u32).map(|n| (n * 7) as u8).collect();
    vm.write(at(0x900), context, &bytes).unwrap();
    let mut back = vec![0; bytes.len()];
    vm.read(at(0x900), context, &mut back).unwrap();
    assert_eq!(back, bytes);
    let driver = vm.driver();
    assert_eq!(driver.peek(Pa(0x5900), 0x700).unwrap(), bytes[..0x700]);
    assert_eq!(driver.peek(Pa(0x3000), 0x1000).unwrap(), bytes[0x700..0x1700]);
    assert_eq!(driver.peek(Pa(0x9000), 0x100).unwrap(), bytes[0x1700..]);
    assert_eq!(vm.read_u16(at(0xfff), context).unwrap(), u16::from_le_bytes([bytes[0x6ff], bytes[0x700]]));
    assert_eq!(vm.read_pa_u32(Pa(0x5900)).unwrap(), u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
}

#[test]
fn a_write_that_runs_into_an_unmapped_page_writes_nothing() {
    let (mut vm, context) = guest();
    let before = vm.driver().snapshot();
    let error = vm.write(at(0x2800), context, &[1; 0x1000]).unwrap_err();
    assert!(
        matches!(error, VmiError::Translation { va, fault: TranslationFault::NotPresent { level: 1, .. }, .. } if va == at(0x3000))
    );
    assert_eq!(vm.driver().snapshot(), before);
}

#[test]
fn a_write_that_fails_at_any_call_changes_nothing() {
    let (mut vm, context) = guest();
    vm.driver_mut().poke(Pa(0x3000), &[9; 0x1000]).unwrap();
    vm.driver_mut().record_reads(true);
    let before = vm.driver().snapshot();
    let mut failures = 0;
    for n in 1.. {
        vm.driver_mut().fail_nth_with(n, 14);
        let result = vm.write(at(0x800), context, &[1; 0x2000]);
        if vm.driver().faults_left() > 0 {
            result.unwrap();
            break;
        }
        failures += 1;
        assert!(matches!(result, Err(VmiError::Driver { errno: 14, .. })), "{result:?}");
        assert_eq!(vm.driver().snapshot(), before, "after call {n} failed");
    }
    // 3 walks of 4 levels, 2 reads of what may have to be put back, 3 writes.
    assert_eq!(failures, 3 * 4 + 2 + 3);
}

#[test]
fn a_write_that_can_not_be_undone_says_what_it_left() {
    let (mut vm, context) = guest();
    vm.driver_mut().fail_nth_of(CallKind::Write, 2);
    vm.driver_mut().fail_nth_of(CallKind::Write, 3);
    let error = vm.write(at(0xff0), context, &[1; 0x20]).unwrap_err();
    let VmiError::UndoFailed { left_behind, .. } = error else { panic!("{error:?}") };
    assert!(left_behind.starts_with("16 new bytes at 0x5ff0"), "{left_behind}");
}

#[test]
fn addresses_at_the_end_of_the_address_space_do_not_wrap() {
    let (mut vm, context) = guest();
    let top = Va(0xffff_ffff_ffff_f000);
    vm.driver_mut().map(context, top, Pa(0x6000), PageSize::Size4K, RW).unwrap();
    vm.driver_mut().map(context, Va(0), Pa(0x7000), PageSize::Size4K, RW).unwrap();
    vm.driver_mut().poke(Pa(0x6ffc), b"abcd").unwrap();
    let last = Va(u64::MAX - 3);
    assert_eq!(vm.read_u32(last, context).unwrap().to_le_bytes(), *b"abcd");
    let past = |error| matches!(error, VmiError::Translation { fault: TranslationFault::NonCanonical, .. });
    assert!(past(vm.read_u64(last, context).unwrap_err()));
    assert!(past(vm.write_u64(last, context, 0).unwrap_err()));
    assert!(past(vm.read_bytes((last, context), 5).unwrap_err()));
    assert!(past(vm.read_cstr(last, context, 100).unwrap_err()));
    assert_eq!(vm.read_cstr_prefix(last, context, 100).0[..], *b"abcd");
    assert!(past(vm.read_bytes((last, context), usize::MAX).unwrap_err()));
}

#[test]
fn a_mapping_of_what_lies_above_guest_memory_is_no_translation() {
    let (mut vm, context) = guest();
    let frame = vm.driver_mut().allocate_frame().unwrap();
    vm.driver_mut().map(context, at(0x3000), frame.pa(0), PageSize::Size4K, RW).unwrap();
    let error = vm.translate(at(0x3008), context).unwrap_err();
    let fault = TranslationFault::BeyondMemory { level: 0, pa: frame.pa(0) };
    assert_eq!(error, VmiError::Translation { va: at(0x3008), root: context.root, fault });
    assert_eq!(vm.walk(at(0x3008), context).unwrap().pa, frame.pa(8));
    // Nor are tables up there.
    let root = AddressContext::new(frame.pa(0));
    let error = vm.translate(at(0), root).unwrap_err();
    assert!(matches!(error, VmiError::Translation { fault: TranslationFault::BeyondMemory { level: 4, .. }, .. }), "{error}");
}

#[test]
fn a_failing_driver_is_not_mistaken_for_an_unmapped_page() {
    let (mut vm, context) = guest();
    vm.driver_mut().fail_nth_of(CallKind::Read, 3);
    assert!(matches!(vm.translate(at(0), context), Err(VmiError::Driver { op: "read", .. })));
    assert_eq!(vm.translate(at(0), context).unwrap(), Pa(0x5000));
}

#[test]
fn repeated_reads_walk_the_tables_once() {
    let (mut vm, context) = guest();
    vm.driver_mut().record_reads(true);
    vm.read_u64(at(0), context).unwrap();
    assert_eq!(reads(&vm), 5);
    for offset in 0..100 {
        vm.read_u64(at(offset), context).unwrap();
    }
    assert_eq!(reads(&vm), 105);
}

#[test]
fn a_translation_is_never_older_than_our_own_writes_or_the_guests_last_run() {
    let (mut vm, context) = guest();
    let entry = vm.driver().entry(context, at(0), 1).unwrap();
    let moves: [fn(&mut VmiCore<MockDriver>, Pa, u64); 3] = [
        |vm, entry, value| vm.write_pa(entry, &value.to_le_bytes()).unwrap(),
        |vm, entry, value| vm.driver_mut().write(entry, &value.to_le_bytes()).unwrap(),
        |vm, entry, value| {
            vm.driver_mut().poke(entry, &value.to_le_bytes()).unwrap();
            vm.invalidate();
        },
    ];
    for (index, change) in moves.into_iter().enumerate() {
        vm.translate(at(0), context).unwrap();
        let frame = 0xa000 + index as u64 * 0x1000;
        change(&mut vm, entry, frame | RW);
        assert_eq!(vm.translate(at(4), context).unwrap(), Pa(frame + 4), "way {index}");
    }
    // Also when the tables are mapped and written through their virtual address.
    vm.driver_mut().map(context, at(0x3000), entry, PageSize::Size4K, RW).unwrap();
    vm.translate(at(0), context).unwrap();
    vm.write_u64(at(0x3000 + entry.page_offset()), context, 0x2000 | RW).unwrap();
    assert_eq!(vm.translate(at(0), context).unwrap(), Pa(0x2000));
}

#[test]
fn the_same_address_under_two_roots_or_two_depths_is_kept_apart() {
    let (mut vm, context) = guest();
    let other = vm.driver_mut().new_root(4).unwrap();
    vm.driver_mut().map(other, at(0), Pa(0xc000), PageSize::Size4K, RW).unwrap();
    for _ in 0..2 {
        assert_eq!(vm.translate(at(0), context).unwrap(), Pa(0x5000));
        assert_eq!(vm.translate(at(0), other).unwrap(), Pa(0xc000));
        assert!(vm.translate(at(0), AddressContext { levels: 5, ..context }).is_err());
    }
}

#[test]
fn more_pages_than_the_cache_holds_are_all_translated_right() {
    let (mut vm, context) = guest();
    for page in 0..3000 {
        let to = Pa((page % 64) * 0x1000);
        vm.driver_mut().map(context, Va(0x1000_0000 + page * 0x1000), to, PageSize::Size4K, RW).unwrap();
    }
    for _ in 0..2 {
        for page in 0..3000 {
            let expected = Pa((page % 64) * 0x1000 + 7);
            assert_eq!(vm.translate(Va(0x1000_0007 + page * 0x1000), context).unwrap(), expected);
        }
    }
}

#[test]
fn a_string_spans_as_many_pages_as_it_takes() {
    let (mut vm, context) = guest();
    for len in [0, 1, 255, 256, 257, 0x1000, 0x2fff] {
        let text = vec![b'x'; len];
        let from = at(0x2fff - len as u64);
        vm.write(from, context, &text).unwrap();
        vm.write_u8(at(0x2fff), context, 0).unwrap();
        assert_eq!(vm.read_cstr(from, context, len + 1).unwrap()[..], text[..], "{len} bytes");
        let too_long = vm.read_cstr(from, context, len).unwrap_err();
        assert_eq!(too_long, VmiError::StringTooLong { va: from, limit: len });
    }
}

#[test]
fn a_string_that_runs_into_an_unmapped_page_is_an_error_and_its_prefix_is_not() {
    let (mut vm, context) = guest();
    vm.write(at(0x2ff0), context, &[b'y'; 16]).unwrap();
    let error = vm.read_cstr(at(0x2ff0), context, 4096).unwrap_err();
    assert!(matches!(error, VmiError::Translation { va, .. } if va == at(0x3000)), "{error}");
    let (got, end) = vm.read_cstr_prefix(at(0x2ff0), context, 4096);
    assert_eq!((&got[..], end), (&[b'y'; 16][..], StringEnd::Fault(error)));
    let (got, end) = vm.read_cstr_prefix(at(0x2ff0), context, 5);
    assert_eq!((got.len(), end), (5, StringEnd::Limit));
}

#[test]
fn the_page_behind_a_string_is_not_looked_at() {
    let (mut vm, context) = guest();
    vm.write(at(0x2ffc), context, b"end\0").unwrap();
    assert_eq!(vm.read_cstr_prefix(at(0x2ffc), context, 4096).1, StringEnd::Terminator);
}

#[test]
fn utf_16_strings_end_at_a_zero_unit_and_not_at_zero_bytes() {
    let (mut vm, context) = guest();
    // U+0100 U+0041: bytes 00 01 41 00, so zero bytes touch across units; odd address, a unit across the page boundary.
    let text = "\u{100}A\u{1f600}\u{100}";
    let mut bytes: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let len = bytes.len();
    bytes.extend([0, 0, 7, 7]);
    for from in [at(0xffb), at(0xfff), at(0x100)] {
        vm.write(from, context, &bytes).unwrap();
        let got = vm.read_utf16(from, context, 100).unwrap();
        assert_eq!((got.len(), got.to_utf16_lossy().as_str()), (len, text));
        assert_eq!(vm.read_utf16(from, context, len + 1), Err(VmiError::StringTooLong { va: from, limit: len + 1 }));
        assert_eq!(vm.read_utf16_prefix(from, context, 5).0.len(), 4);
    }
}

#[test]
fn each_read_of_many_has_its_own_result() {
    let (mut vm, context) = guest();
    vm.write(at(0xffe), context, b"abcd").unwrap();
    let reads: [(Address, usize); 4] =
        [((at(0xffe), context).into(), 4), ((at(0x3000), context).into(), 1), (Pa(0x3000).into(), 2), (Pa(MEMORY).into(), 1)];
    let got = vm.read_scatter(&reads);
    assert_eq!(got[0].as_deref(), Ok(&b"abcd"[..]));
    assert!(matches!(got[1], Err(VmiError::Translation { .. })));
    assert_eq!(got[2].as_deref(), Ok(&b"cd"[..]));
    assert_eq!(got[3], Err(VmiError::OutOfRange { pa: Pa(MEMORY), len: 1, end: Pa(MEMORY) }));
}

#[test]
fn an_absurd_length_is_an_error_and_not_an_allocation() {
    let (vm, context) = guest();
    assert!(matches!(vm.read_bytes(Pa(0), usize::MAX), Err(VmiError::OutOfRange { .. })));
    assert!(matches!(vm.read_bytes((at(0), context), 1 << 40), Err(VmiError::Translation { va, .. }) if va == at(0x3000)));
}

#[test]
fn an_empty_read_or_write_asks_nobody() {
    let (mut vm, context) = guest();
    vm.driver_mut().record_reads(true);
    vm.read(Va(u64::MAX), context, &mut []).unwrap();
    vm.write(Va(1 << 63), context, &[]).unwrap();
    assert_eq!(vm.driver().calls(), [] as [Call; 0]);
}
