//! Breakpoints by owner that share a page: whatever the others there are, each is hit where and under which root it was meant.

use std::rc::Rc;

use vmitap::arch::amd64::AddressContext;
use vmitap::tap::{Breakpoint, BreakpointManager};
use vmitap::{Gfn, Pa, Va, View, VmiError};

use super::nothing::Nothing;
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
fn on_a_page_of_many_too_each_is_hit_where_and_under_which_root_it_was_meant() {
    for odd in [false, true] {
        let mut w = world();
        for (byte, key) in (0x10..0x16).zip(0..) {
            w.insert(w.point(V1, byte, 1, key)).unwrap();
        }
        if odd {
            w.insert(w.global(V1, ALIAS + 0x20, 0, 9)).unwrap();
        }
        assert_eq!(hits(&w, 0x12), [(vec![], 1), (vec![2], 1), (vec![], 1), (vec![], 1)], "odd: {odd}");
        assert_eq!(hits(&w, 0x15), [(vec![], 1), (vec![5], 1), (vec![], 1), (vec![], 1)], "odd: {odd}");
        let there = if odd { (vec![9], 1) } else { (vec![], 0) };
        let none = (vec![], there.1);
        assert_eq!(hits(&w, 0x20), [none.clone(), none, there.clone(), there], "odd: {odd}");
    }
    let mut w = world();
    for (byte, key) in (0x10..0x16).zip(0..) {
        w.insert(w.global(V1, byte, 0, key)).unwrap();
    }
    assert_eq!(hits(&w, 0x12), [(vec![2], 1), (vec![2], 1), (vec![], 1), (vec![], 1)]);
}

#[test]
fn what_runs_at_another_offset_than_a_breakpoint_on_the_page_it_accesses_does_not_hit_it() {
    // Few of one root, few that are global, few that differ, and many.
    for (count, kind) in [(1, 0), (1, 1), (2, 2), (6, 0), (6, 1), (6, 2)] {
        let mut w = world();
        for key in 0..count {
            let byte = 0x100 + u64::from(key);
            let global = kind == 1 || kind == 2 && key == 0;
            w.insert(Breakpoint { global, ..w.point(V1, byte, 0, key) }).unwrap();
        }
        let root = w.roots[0].root;
        let hit = |va| {
            let mut keys = vec![];
            let there = w.m.for_each_at(V1, Pa(PAGE + 0x100), va, root, |key, _| keys.push(*key));
            (keys, there)
        };
        assert_eq!(hit(va(0x100)), (vec![0], 1));
        for offset in (0..0x1000).filter(|offset| *offset != 0x100) {
            assert_eq!(hit(va(offset)), (vec![], 1), "{count}, {kind}, {offset:#x}");
        }
        for page in [0x1000, 0x2000, 0x1000_0000_0000] {
            assert_eq!(hit(Va(va(0x100).0 ^ page)), (vec![], 1), "{count}, {kind}, {page:#x}");
        }
    }
}

#[test]
fn of_two_of_one_key_the_one_of_the_events_root_comes_before_the_global_one() {
    for own_first in [false, true] {
        let mut w = world();
        let (own, of_all) = (w.point(V1, 0x10, 0, 1), w.global(V1, 0x10, 1, 1));
        for point in if own_first { [own, of_all] } else { [of_all, own] } {
            assert!(w.insert(point).unwrap());
        }
        let found = |root| w.m.get_by_event(&w.c, &w.event(V1, PAGE + 0x10, 0x10, root), &1).map(|found| found.global);
        assert_eq!((found(0), found(1)), (Some(false), Some(true)), "own first: {own_first}");
    }
}

#[test]
fn however_many_roots_there_are_and_have_been_each_has_its_own() {
    let mut w = world();
    let mut m = BreakpointManager::new();
    let any = w.point(V1, 0x10, 0, 0);
    let point = |root: u64, key| Breakpoint { context: AddressContext::new(Pa(root << 12)), key, ..any };
    let place = |page: u64| Pa(page << 12 | 0x10);
    let check = |m: &BreakpointManager<u32, &str>, page: u64, root: u64, there: &[u32], hit: &[u32]| {
        let mut keys = vec![];
        let count = m.for_each_at(V1, place(page), va(0x10), Pa(root << 12), |key, _| keys.push(*key));
        assert_eq!((count, keys.as_slice()), (there.len(), hit), "page {page}, root {root}");
    };
    // A page with a root of its own each, and every time others: more than have a number, at once and one after the other.
    for (turn, count) in [3_000, 700, 700, 3].into_iter().enumerate() {
        let first = turn as u64 * 10_000;
        for page in 0..count {
            assert!(m.insert_with_hint(&mut w.vmi, &mut Nothing, point(first + page, 1), Some(place(page))).unwrap());
            if page % 3 == 0 {
                assert!(m.insert_with_hint(&mut w.vmi, &mut Nothing, point(first + page, 2), Some(place(page))).unwrap());
            }
        }
        for page in 0..count {
            let there: &[u32] = if page % 3 == 0 { &[1, 2] } else { &[1] };
            check(&m, page, first + page, there, there);
            for other in [0, first + page + 1, (first + page).wrapping_sub(1) & 0xffff_ffff, first + count] {
                check(&m, page, other, there, if other == first + page { there } else { &[] });
            }
        }
        for page in 0..count {
            for key in 1..=if page % 3 == 0 { 2 } else { 1 } {
                assert!(m.remove(&mut w.vmi, &mut Nothing, V1, va(0x10), Pa((first + page) << 12), &key).unwrap());
            }
            check(&m, page, first + page, &[], &[]);
        }
    }
}

#[test]
fn frames_side_by_side_and_in_other_views_are_told_apart_however_they_come_and_go() {
    let mut w = world();
    // Where groups of eight frames begin and end, the same places of other groups, and the last frame that an address can be in.
    let frames = [0, 7, 8, 9, 15, 16, 8 + 64, 8 + (1 << 20), (1 << 40) - 1];
    let places: Vec<(View, u64)> =
        frames.iter().flat_map(|gfn| [View(0), View(1), View(u16::MAX)].map(|view| (view, *gfn))).collect();
    let point = |w: &World, at: usize| (w.global(places[at].0, 0x10, 0, at as u32), Pa(places[at].1 << 12 | 0x10));
    let mut m = BreakpointManager::new();
    for round in 1..4 {
        for at in 0..places.len() {
            let (point, pa) = point(&w, at);
            assert!(m.insert_with_hint(&mut w.vmi, &mut Nothing, point, Some(pa)).unwrap());
        }
        let mut there: Vec<usize> = (0..places.len()).collect();
        while !there.is_empty() {
            let (gone, _) = point(&w, there.remove(there.len() * round / 4));
            assert!(m.remove(&mut w.vmi, &mut Nothing, gone.view, gone.va, gone.context.root, &gone.key).unwrap());
            for at in 0..places.len() {
                let ((Breakpoint { view, va, context, .. }, pa), mut keys) = (point(&w, at), vec![]);
                let count = m.for_each_at(view, pa, va, context.root, |key, _| keys.push(*key));
                let wanted = if there.contains(&at) { vec![at as u32] } else { vec![] };
                assert_eq!((count, m.count_on_page(view, pa.gfn())), (wanted.len(), wanted.len()), "{view} {pa}");
                assert_eq!(keys, wanted, "{view} {pa}");
            }
        }
    }
}

#[test]
fn an_address_that_no_frame_has_is_refused_and_nothing_is_there() {
    let mut w = world();
    let root = w.roots[0].root;
    let mut m = BreakpointManager::new();
    // One that would be a frame of another view if its upper bits counted for that.
    let (there, inside) = (w.global(View(1), 0x10, 0, 1), Pa(0x8010));
    assert!(m.insert_with_hint(&mut w.vmi, &mut Nothing, there, Some(inside)).unwrap());
    for pa in [1 << 52, 1 << 63 | inside.0, u64::MAX] {
        let point = w.global(View(0), 0x20, 0, 1);
        let refused = m.insert_with_hint(&mut w.vmi, &mut Nothing, point, Some(Pa(pa)));
        assert!(matches!(refused, Err(VmiError::InvalidArgument { what: "pa", .. })), "{pa:#x}: {refused:?}");
        assert!(m.insert_with_hint(&mut w.vmi, &mut Nothing, point, None).unwrap());
        let refused = m.page_in(&mut w.vmi, &mut Nothing, point.va, root, Pa(pa));
        assert!(matches!(refused, Err(VmiError::InvalidArgument { what: "pa", .. })), "{pa:#x}: {refused:?}");
        assert_eq!(m.get(View(0), point.va, root, &1).unwrap().pa, None);
        assert!(m.remove(&mut w.vmi, &mut Nothing, View(0), point.va, root, &1).unwrap());
        assert_eq!(m.for_each_at(View(0), Pa(pa), point.va, root, |_, _| panic!("nothing is there")), 0);
        assert_eq!(m.len(), 1);
    }
    for view in 0..8 {
        assert_eq!(m.count_on_page(View(view), Gfn(8 | 1 << 51)), 0);
        assert_eq!(m.breakpoints_on_page(View(view), Gfn(8 | 1 << 60)).count(), 0);
    }
}

#[test]
fn what_came_with_a_breakpoint_is_given_up_when_it_goes() {
    let World { mut vmi, roots, .. } = world();
    let root = roots[0].root;
    let mut m = BreakpointManager::new();
    let (key, tag) = (Rc::new(1), Rc::new(()));
    let kept = || (Rc::strong_count(&key) - 1, Rc::strong_count(&tag) - 1);
    let point = |at| Breakpoint { view: V1, va: va(at), context: roots[0], key: key.clone(), tag: tag.clone(), global: false };
    // Those that wait, those that are few on their page, and many.
    for (count, waits) in [(1, true), (1, false), (4, false), (5, false)] {
        for at in 0..count {
            let pa = (!waits).then_some(Pa(PAGE + at));
            assert!(m.insert_with_hint(&mut vmi, &mut Nothing, point(at), pa).unwrap());
        }
        for at in 0..count {
            assert!(kept().0 >= (count - at) as usize);
            assert!(m.remove(&mut vmi, &mut Nothing, V1, va(at), root, &key).unwrap());
        }
        assert_eq!(kept(), (0, 0), "{count}, waits: {waits}");
    }
    assert!(m.insert_with_hint(&mut vmi, &mut Nothing, point(0), None).unwrap());
    let waiting = kept();
    assert_eq!(m.page_in(&mut vmi, &mut Nothing, va(0), root, Pa(PAGE)).unwrap(), 1);
    assert_eq!(m.page_out(&mut vmi, &mut Nothing, va(0), root).unwrap(), 1);
    assert_eq!(kept(), waiting);
}
