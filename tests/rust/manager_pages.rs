//! Breakpoints by owner that share a page: whatever the others there are, each is hit where and under which root it was meant.

use std::rc::Rc;

use vmitap::arch::amd64::AddressContext;
use vmitap::tap::{Breakpoint, BreakpointController, BreakpointManager};
use vmitap::{Gfn, Pa};

use super::tap_manager::{V1, World, va, world};

/// The page of `CODE`.
const PAGE: u64 = 0x3000;
/// Where it is mapped a second time.
const ALIAS: u64 = 0x7000;

/// The keys that are hit at each offset from `CODE` under each root, for a byte of the page.
fn hits(w: &World, byte: u64) -> [(Vec<u32>, usize); 4] {
    [(byte, 0), (byte, 1), (ALIAS + byte, 0), (ALIAS + byte, 1)].map(|(offset, root)| w.hit(V1, PAGE + byte, offset, root))
}

#[test]
fn on_a_page_of_one_root_nothing_is_hit_under_another_or_at_another_address() {
    let mut w = world();
    for (byte, key) in [(0x10, 1), (0x10, 2), (0x20, 3)] {
        w.insert(w.point(V1, byte, 1, key)).unwrap();
    }
    assert_eq!(hits(&w, 0x10), [(vec![], 2), (vec![1, 2], 2), (vec![], 2), (vec![], 2)]);
    assert_eq!(hits(&w, 0x20), [(vec![], 1), (vec![3], 1), (vec![], 1), (vec![], 1)]);
    // The same page with nothing on it, and then for the other root and the other address.
    for (byte, key) in [(0x10, 1), (0x10, 2), (0x20, 3)] {
        assert!(w.remove(V1, byte, 1, key).unwrap());
    }
    assert_eq!(hits(&w, 0x10), std::array::from_fn(|_| (vec![], 0)));
    w.insert(w.point(V1, ALIAS + 0x10, 0, 4)).unwrap();
    assert_eq!(hits(&w, 0x10), [(vec![], 1), (vec![], 1), (vec![4], 1), (vec![], 1)]);
}

#[test]
fn on_a_page_of_global_ones_nothing_is_hit_at_another_address() {
    let mut w = world();
    w.insert(w.global(V1, 0x10, 0, 1)).unwrap();
    w.insert(w.global(V1, 0x20, 1, 2)).unwrap();
    assert_eq!(hits(&w, 0x10), [(vec![1], 1), (vec![1], 1), (vec![], 1), (vec![], 1)]);
    assert_eq!(hits(&w, 0x20), [(vec![2], 1), (vec![2], 1), (vec![], 1), (vec![], 1)]);
}

#[test]
fn the_first_frame_is_a_root_like_any_other() {
    let mut w = world();
    let of_first_frame = Breakpoint { context: AddressContext::new(Pa(0)), ..w.point(V1, 0x10, 0, 1) };
    w.m.insert_with_hint(&mut w.vmi, &mut w.c, of_first_frame, Some(Pa(PAGE + 0x10))).unwrap();
    w.insert(w.global(V1, 0x20, 0, 2)).unwrap();
    assert_eq!((w.hit(V1, PAGE + 0x10, 0x10, 0), w.hit(V1, PAGE + 0x20, 0x20, 0)), ((vec![], 1), (vec![2], 1)));
    assert_eq!(w.m.for_each_at(V1, Pa(PAGE + 0x10), va(0x10), Pa(0), |key, _| assert_eq!(*key, 1)), 1);
}

#[test]
fn what_differs_from_the_others_on_its_page_is_hit_for_itself_and_so_are_the_others() {
    // Whichever comes first, and also where they are not at one byte.
    for by in 0..5 {
        for apart in [0, 0x100] {
            let mut w = world();
            let points = [
                w.point(V1, 0x10, 0, 1),
                w.point(V1, 0x10 + apart, 1, 2),
                w.global(V1, 0x10 + 2 * apart, 0, 3),
                w.point(V1, ALIAS + 0x10 + 3 * apart, 0, 4),
                w.global(V1, ALIAS + 0x10 + 4 * apart, 1, 5),
            ];
            for at in 0..5 {
                w.insert(points[(by + at) % 5]).unwrap();
            }
            let expected = |key: u32| match key {
                1 => [true, false, false, false],
                2 => [false, true, false, false],
                3 => [true, true, false, false],
                4 => [false, false, true, false],
                _ => [false, false, true, true],
            };
            let check = |w: &World, there: &[u32], when: &str| {
                for key in 1..=5 {
                    let byte = 0x10 + apart * (u64::from(key) - 1);
                    let at_byte: Vec<u32> = there.iter().copied().filter(|other| apart == 0 || *other == key).collect();
                    for (place, (mut keys, count)) in hits(w, byte).into_iter().enumerate() {
                        keys.sort_unstable();
                        let wanted: Vec<u32> = at_byte.iter().copied().filter(|key| expected(*key)[place]).collect();
                        assert_eq!((keys, count), (wanted, at_byte.len()), "{when}, {by}, {apart:#x}, {key}, {place}");
                    }
                }
            };
            check(&w, &[1, 2, 3, 4, 5], "all");
            // And those that are left, until one is.
            for gone in 1..5 {
                let Breakpoint { view, va, context, key, .. } = points[gone as usize - 1];
                assert!(w.m.remove(&mut w.vmi, &mut w.c, view, va, context.root, &key).unwrap());
                let left: Vec<u32> = (gone + 1..=5).collect();
                check(&w, &left, "some");
            }
        }
    }
}

#[test]
fn a_hint_with_another_offset_than_the_address_is_kept_to() {
    let mut w = world();
    let root = w.roots[0].root;
    for (offset, pa) in [(0x10, PAGE + 0x110), (0x20, PAGE + 0x120), (0xff8, PAGE + 0x130), (0x110, PAGE + 0x110)] {
        let point = w.point(V1, offset, 0, 1);
        assert!(w.m.insert_with_hint(&mut w.vmi, &mut w.c, point, Some(Pa(pa))).unwrap());
        assert_eq!(w.hit(V1, pa, offset, 0).0, [1], "{offset:#x}");
    }
    // What is mapped at the address is not where it is planted.
    assert_eq!((w.hit(V1, PAGE + 0x10, 0x10, 0), w.hit(V1, PAGE + 0x120, 0x120, 0)), ((vec![], 0), (vec![], 1)));
    let planted: Vec<_> = w.m.breakpoints_on_page(V1, Gfn(3)).map(|(point, pa)| (point.va, pa.0 - PAGE)).collect();
    assert_eq!(planted, [(va(0x10), 0x110), (va(0x110), 0x110), (va(0x20), 0x120), (va(0xff8), 0x130)]);
    assert_eq!(w.m.page_out(&mut w.vmi, &mut w.c, va(0x20), root).unwrap(), 1);
    assert_eq!((w.hit(V1, PAGE + 0x120, 0x20, 0), w.hit(V1, PAGE + 0x110, 0x110, 0)), ((vec![], 0), (vec![1], 2)));
}

#[test]
fn however_many_are_on_a_page_each_is_found_where_it_is() {
    let all = [0, 0xfff, 1, 0x800, 0x7ff, 2, 0x80, 0xffe, 0x100];
    for count in 1..=all.len() {
        let mut w = world();
        for (key, offset) in (0..).zip(&all[..count]) {
            w.insert(w.global(V1, *offset, 0, key)).unwrap();
            w.insert(w.global(V1, *offset, 0, 100 + key)).unwrap();
            w.remove(V1, *offset, 0, key).unwrap();
        }
        let mut left: Vec<(u64, u32)> = all[..count].iter().copied().zip(100..).collect();
        while !left.is_empty() {
            for (offset, key) in all.iter().zip(100..) {
                let here = if left.contains(&(*offset, key)) { vec![key] } else { vec![] };
                assert_eq!(w.hit(V1, PAGE + offset, *offset, 1), (here.clone(), here.len()), "{count}, {offset:#x}");
            }
            let mut sorted: Vec<u64> = left.iter().map(|(offset, _)| *offset).collect();
            sorted.sort_unstable();
            let on_page: Vec<u64> = w.m.breakpoints_on_page(V1, Gfn(3)).map(|(_, pa)| pa.page_offset()).collect();
            assert_eq!((on_page, w.m.count_on_page(V1, Gfn(3))), (sorted, left.len()), "{count}");
            let (offset, key) = left.remove(left.len() / 2);
            assert!(w.remove(V1, offset, 0, key).unwrap());
        }
        assert_eq!(w.m.count_on_page(V1, Gfn(3)), 0);
    }
}

#[test]
fn owners_of_one_byte_are_told_in_the_order_they_came_also_where_some_have_gone() {
    let mut w = world();
    let mut keys = Vec::new();
    for key in 0..9 {
        w.insert(w.global(V1, 0x10, 0, key)).unwrap();
        keys.push(key);
        assert_eq!(w.hit(V1, PAGE + 0x10, 0x10, 0), (keys.clone(), keys.len()));
    }
    for gone in [0, 8, 3, 4, 7, 1] {
        w.remove(V1, 0x10, 0, gone).unwrap();
        keys.retain(|key| *key != gone);
        assert_eq!(w.hit(V1, PAGE + 0x10, 0x10, 0), (keys.clone(), keys.len()));
    }
}

#[test]
fn what_came_with_a_breakpoint_is_given_up_when_it_goes() {
    let mut w = world();
    let mut c = BreakpointController::new();
    let mut m = BreakpointManager::new();
    let (key, tag) = (Rc::new(1), Rc::new(()));
    for waits in [false, true] {
        let Breakpoint { view, va, context, global, .. } = w.point(V1, 0x10, 0, 1);
        let point = Breakpoint { view, va, context, global, key: key.clone(), tag: tag.clone() };
        let pa = (!waits).then_some(Pa(PAGE + 0x10));
        assert!(m.insert_with_hint(&mut w.vmi, &mut c, point, pa).unwrap());
        assert_eq!((Rc::strong_count(&key), Rc::strong_count(&tag)), (2, 2));
        assert!(m.remove(&mut w.vmi, &mut c, view, va, context.root, &key).unwrap());
        assert_eq!((Rc::strong_count(&key), Rc::strong_count(&tag)), (1, 1), "waits: {waits}");
    }
}
