//! The page walk against a plain map of what was mapped.

use std::collections::BTreeMap;

use proptest::prelude::*;
use vmitap::arch::amd64::pte;
use vmitap::core::VmiCore;
use vmitap::driver::mock::{MockDriver, PageSize};
use vmitap::error::TranslationFault;
use vmitap::{Pa, Va, VmiError};

/// One page to map: which of a few spread-out places, its size, the frame it goes to and its rights.
fn page() -> impl Strategy<Value = (u64, PageSize, u64, u64)> {
    let size = prop_oneof![Just(PageSize::Size4K), Just(PageSize::Size2M), Just(PageSize::Size1G)];
    let flags = prop::sample::subsequence(vec![pte::W, pte::U, pte::NX, pte::A, pte::D, pte::G], 0..=6);
    // Three bits of the index at each level: neighbours, shared tables and both halves of the address space.
    let va = (0_u64..8, 0_u64..8, 0_u64..8, 0_u64..8, 0_u64..8).prop_map(|(i1, i2, i3, i4, i5)| {
        let spread = |index: u64| index & 1 | (index & 2) << 3 | (index & 4) << 6;
        spread(i1) << 12 | spread(i2) << 21 | spread(i3) << 30 | spread(i4) << 39 | spread(i5) << 48
    });
    (va, size, 0_u64..1 << 22, flags.prop_map(|flags| flags.into_iter().fold(pte::P, |all, flag| all | flag)))
}

fn canonical(va: u64, levels: u8) -> Va {
    let shift = 64 - (12 + 9 * u32::from(levels));
    Va((((va << shift) as i64) >> shift) as u64)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn every_mapped_page_is_found_with_its_rights_and_nothing_else_is(
        pages in prop::collection::vec(page(), 1..24), levels in 4_u8..=5, pat in any::<bool>(), offset in any::<u64>(),
    ) {
        let mut driver = MockDriver::new(1 << 20, 1);
        let context = driver.new_root(levels).unwrap();
        let mut model: BTreeMap<u64, (PageSize, u64, u64)> = BTreeMap::new();
        for (va, size, frame, flags) in pages {
            let first = canonical(va, levels).0 & !(size.bytes() - 1);
            let last = first + (size.bytes() - 1);
            // Only pages that overlap none: what replacing does to tables is the mock's affair.
            if model.iter().any(|(other, (size, ..))| *other <= last && first <= *other + (size.bytes() - 1)) {
                continue;
            }
            let pa = (frame << 12) & !(size.bytes() - 1);
            let large_pat = if pat && size != PageSize::Size4K { pte::PAT_LARGE } else { 0 };
            driver.map(context, Va(first), Pa(pa), size, flags | large_pat).unwrap();
            model.insert(first, (size, pa, flags));
        }
        let vm = VmiCore::new(Box::new(driver));
        for (first, (size, pa, flags)) in &model {
            let inside = offset & (size.bytes() - 1);
            let found = vm.walk(Va(first + inside), context).unwrap();
            prop_assert_eq!((found.pa, found.page_size, found.level()), (Pa(pa + inside), size.bytes(), size.level()));
            prop_assert_eq!(found.writable, flags & pte::W != 0);
            prop_assert_eq!(found.user, flags & pte::U != 0);
            prop_assert_eq!(found.executable, flags & pte::NX == 0);
            prop_assert_eq!(found.entries().len(), usize::from(levels - size.level() + 1));
            let leaf = vm.driver().entry(context, Va(*first), size.level()).unwrap();
            prop_assert_eq!(found.leaf(), (leaf, vm.read_pa_u64(leaf).unwrap()));
            // The neighbours on both sides are found only if they were mapped too.
            for neighbour in [first.wrapping_sub(1), first.wrapping_add(size.bytes())] {
                let mapped = model.range(..=neighbour).next_back().is_some_and(|(at, (size, ..))| neighbour - at < size.bytes());
                prop_assert_eq!(vm.walk(Va(neighbour), context).is_ok(), mapped, "{:#x}", neighbour);
            }
        }
    }

    #[test]
    fn random_tables_never_panic_nor_lead_beyond_memory(
        memory in prop::collection::vec(prop_oneof![any::<u64>(), (0_u64..16, 0_u64..256).prop_map(|(gfn, flags)| gfn << 12 | flags | 1)], 64),
        va in any::<u64>(), root in 0_u64..0x9000, levels in any::<u8>(),
    ) {
        let mut driver = MockDriver::new(0x8000, 1);
        for (index, value) in memory.iter().cycle().take(0x1000).enumerate() {
            driver.poke(Pa(index as u64 * 8), &value.to_le_bytes()).unwrap();
        }
        let vm = VmiCore::new(Box::new(driver));
        let context = vmitap::arch::amd64::AddressContext { root: Pa(root), levels };
        let va = canonical(va, if levels == 5 { 5 } else { 4 });
        match vm.translate(va, context) {
            Ok(pa) => prop_assert!(pa.0 < 0x8000),
            Err(error) => prop_assert!(matches!(error, VmiError::Translation { .. }), "{}", error),
        }
    }
}

#[test]
fn each_level_that_is_not_present_is_named() {
    for levels in [4, 5] {
        let mut driver = MockDriver::new(1 << 20, 1);
        let context = driver.new_root(levels).unwrap();
        let va = Va(0x1234_5678_9abc);
        for level in 1..=levels {
            driver.map(context, va, Pa(0x1000), PageSize::Size4K, pte::P).unwrap();
            driver.unmap(context, va, level).unwrap();
            let entry_pa = driver.entry(context, va, level).unwrap();
            let vm = VmiCore::new(Box::new(driver));
            let fault = TranslationFault::NotPresent { level, entry_pa };
            assert_eq!(vm.translate(va, context), Err(VmiError::Translation { va, root: context.root, fault }));
            driver = *vm.into_driver();
        }
    }
}

#[test]
fn an_address_that_needs_five_levels_is_not_canonical_under_four() {
    let mut driver = MockDriver::new(1 << 20, 1);
    let four = driver.new_root(4).unwrap();
    let five = driver.new_root(5).unwrap();
    let va = Va(0x00ab_cdef_0123_4000);
    driver.map(five, va, Pa(0x2000), PageSize::Size4K, pte::P).unwrap();
    let vm = VmiCore::new(Box::new(driver));
    assert_eq!(vm.translate(va, five), Ok(Pa(0x2000)));
    let fault = TranslationFault::NonCanonical;
    assert_eq!(vm.translate(va, four), Err(VmiError::Translation { va, root: four.root, fault }));
}

#[test]
fn a_large_page_that_begins_in_memory_and_ends_beyond_it_is_translated_up_to_its_end() {
    let mut driver = MockDriver::new(1 << 20, 1);
    let context = driver.new_root(4).unwrap();
    driver.map(context, Va(0), Pa(0), PageSize::Size2M, pte::P).unwrap();
    let vm = VmiCore::new(Box::new(driver));
    assert_eq!(vm.translate(Va(0xf_ffff), context), Ok(Pa(0xf_ffff)));
    let fault = TranslationFault::BeyondMemory { level: 0, pa: Pa(0x10_0000) };
    assert_eq!(vm.translate(Va(0x10_0000), context), Err(VmiError::Translation { va: Va(0x10_0000), root: context.root, fault }));
}
