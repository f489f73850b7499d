//! Breakpoints by owner while their pages come and go: what is told is carried out, and what was planted is found again.

use std::panic::{AssertUnwindSafe, catch_unwind};

use vmitap::arch::amd64::pte;
use vmitap::driver::mock::PageSize;
use vmitap::ptm::PageTableEvent;
use vmitap::session::handle_page_table_events;
use vmitap::{Pa, Result, Va, VmiError};

use super::harness::{Failure, Seen, World as _, each_call_failing};
use super::tap_manager::{CODE, CODE_PA, V1, V2, World, va, world};

/// Two pages with several owners each, in two views, and two addresses that wait.
fn owned() -> World {
    let mut w = world();
    for point in [
        w.point(V1, 0x10, 0, 1),
        w.point(V1, 0x10, 0, 2),
        w.point(V2, 0x10, 0, 1),
        w.global(V1, 0x10, 1, 3),
        w.point(V1, 0x1010, 0, 1),
        w.point(V2, 0x1010, 0, 1),
        w.point(V1, 0x4010, 1, 1),
        w.point(V2, 0x4010, 1, 1),
    ] {
        assert!(w.insert(point).unwrap());
    }
    w
}

/// One page goes, one comes, and one goes; in each order.
fn told(w: &World) -> [Vec<PageTableEvent>; 3] {
    let [first, second] = w.roots;
    let events = [
        PageTableEvent::PageOut { va: va(0x10), context: first, pa: Pa(0x3010) },
        PageTableEvent::PageIn { va: va(0x4010), context: second, pa: Pa(0x7010) },
        PageTableEvent::PageOut { va: va(0x1010), context: first, pa: Pa(0x4010) },
    ];
    [0, 1, 2].map(|by| (0..3).map(|at| events[(at + by) % 3]).collect())
}

fn handle(w: &mut World, events: &[PageTableEvent]) -> Result<usize> {
    handle_page_table_events(&mut w.m, &mut w.vmi, &mut w.c, events)
}

fn state(w: &World) -> (Seen, Vec<String>) {
    (w.driver().seen(), w.books())
}

fn assert_same(w: &World, wanted: &(Seen, Vec<String>), when: &str) {
    assert_eq!(w.driver().seen().differences(&wanted.0), "", "{when}");
    assert_eq!(w.books(), wanted.1, "{when}");
}

/// Which of the events have been carried out.
fn carried_out(w: &World, events: &[PageTableEvent]) -> Vec<bool> {
    let is_done = |event: &PageTableEvent| {
        let (va, context) = event.address();
        let wants = matches!(event, PageTableEvent::PageIn { .. });
        let done: Vec<bool> = w.m.owners(va, context.root).map(|found| found.pa.is_some() == wants).collect();
        assert!(done.len() > 1 && done.iter().all(|each| *each == done[0]), "an event carried out by half");
        done[0]
    };
    events.iter().map(is_done).collect()
}

#[test]
fn of_three_events_the_others_are_carried_out_where_one_fails_and_a_retry_does_the_rest() {
    let mut failed_at = [0; 3];
    for order in 0..3 {
        let (all, wanted) = {
            let mut w = owned();
            let events = told(&w)[order].clone();
            assert_eq!(handle(&mut w, &events).unwrap(), 7);
            assert_eq!(carried_out(&w, &events), [true; 3]);
            (events, state(&w))
        };
        for n in 1.. {
            let mut w = owned();
            let driver = w.driver();
            driver.fail_nth_with(n, Failure::Errno(12));
            let result = handle(&mut w, &all);
            let is_through = driver.is_armed();
            driver.fail_nth(0);
            if is_through {
                result.unwrap();
                assert!(n > 12, "{n}");
                break;
            }
            assert!(matches!(result, Err(VmiError::Driver { errno: 12, .. })), "call {n}: {result:?}");
            let done = carried_out(&w, &all);
            assert_eq!(done.iter().filter(|each| !**each).count(), 1, "call {n}: {done:?}");
            let failed = done.iter().position(|each| !each).unwrap();
            failed_at[failed] += 1;
            // As if the one that failed had not been told.
            let mut without = owned();
            let rest: Vec<_> = (0..3).filter(|at| *at != failed).map(|at| all[at]).collect();
            handle(&mut without, &rest).unwrap();
            assert_same(&w, &state(&without), &format!("call {n}"));
            handle(&mut w, &all).unwrap();
            assert_same(&w, &wanted, &format!("retry of call {n}"));
        }
    }
    assert!(failed_at.iter().all(|times| *times > 8), "{failed_at:?}");
}

#[test]
fn of_three_events_none_is_carried_out_by_half_where_a_controller_panics_and_a_retry_does_the_rest() {
    let mut w = owned();
    let [all, ..] = told(&w);
    handle(&mut w, &all).unwrap();
    let wanted = state(&w);
    for n in 1.. {
        let mut w = owned();
        w.c.panics_in = n;
        let result = catch_unwind(AssertUnwindSafe(|| handle(&mut w, &all)));
        if w.c.panics_in > 0 {
            assert!(n > 8 && matches!(result, Ok(Ok(7))), "{n}");
            return;
        }
        assert!(result.is_err(), "the panic in call {n} was swallowed");
        // Those before it, and no other.
        let done = carried_out(&w, &all);
        let count = done.iter().filter(|each| **each).count();
        assert!(count < 3 && done[..count].iter().all(|each| *each), "call {n}: {done:?}");
        let mut some = owned();
        handle(&mut some, &all[..count]).unwrap();
        assert_same(&w, &state(&some), &format!("panic in call {n}"));
        handle(&mut w, &all).unwrap();
        assert_same(&w, &wanted, &format!("retry of call {n}"));
    }
}

/// What becomes of the page at `CODE` under the first root between an insert and a removal.
#[derive(Clone, Copy, Debug)]
enum Change {
    Unmapped,
    Remapped,
    /// Unmapped, and the manager has been told.
    Out,
    /// Mapped elsewhere, and the manager has been told.
    Moved,
}

const CHANGES: [Change; 4] = [Change::Unmapped, Change::Remapped, Change::Out, Change::Moved];
const ELSEWHERE: Pa = Pa(0x9000);

impl Change {
    fn happen(self, w: &mut World) {
        let (context, root) = (w.roots[0], w.roots[0].root);
        match self {
            Self::Unmapped | Self::Out => w.unmap(0x10, 0),
            Self::Remapped | Self::Moved => w.driver().inner().map(context, CODE, ELSEWHERE, PageSize::Size4K, pte::P).unwrap(),
        }
        if matches!(self, Self::Out | Self::Moved) {
            w.m.page_out(&mut w.vmi, &mut w.c, va(0x10), root).unwrap();
        }
        if matches!(self, Self::Moved) {
            w.m.page_in(&mut w.vmi, &mut w.c, va(0x10), root, Pa(ELSEWHERE.0 + 0x10)).unwrap();
        }
    }
}

/// With a breakpoint of one owner in two views, whose page has changed since.
fn changed(change: Change) -> World {
    let mut w = world();
    for view in [V1, V2] {
        w.insert(w.point(view, 0x10, 0, 1)).unwrap();
    }
    change.happen(&mut w);
    w
}

/// The guest with that change, and without breakpoints.
fn untapped(change: Change) -> (Seen, Vec<String>) {
    let mut w = world();
    change.happen(&mut w);
    state(&w)
}

#[test]
fn removal_in_bulk_and_by_view_goes_by_what_is_planted_also_where_a_call_fails() {
    for change in CHANGES {
        let wanted = untapped(change);
        let many = |w: &mut World| {
            let root = w.roots[0].root;
            let all = [(V1, va(0x10), root, 1), (V2, va(0x10), root, 1), (V2, va(0x10), root, 2)];
            w.m.remove_many(&mut w.vmi, &mut w.c, &all)
        };
        let by_view = |w: &mut World| -> Result<usize> {
            let first = w.m.remove_by_view(&mut w.vmi, &mut w.c, V1)?;
            Ok(first + w.m.remove_by_view(&mut w.vmi, &mut w.c, V2)?)
        };
        let mut w = changed(change);
        assert_eq!(many(&mut w).unwrap(), 2);
        assert_same(&w, &wanted, &format!("{change:?}, in bulk"));
        let mut w = changed(change);
        assert_eq!(by_view(&mut w).unwrap(), 2);
        assert_same(&w, &wanted, &format!("{change:?}, by view"));
        if !matches!(change, Change::Out) {
            each_call_failing(|| changed(change), |w| many(w).map(drop));
            each_call_failing(|| changed(change), |w| w.m.remove_by_view(&mut w.vmi, &mut w.c, V2).map(drop));
        }
    }
}

#[test]
fn removal_by_event_goes_by_what_is_planted_also_where_a_call_fails() {
    for change in CHANGES {
        let by_event = |w: &mut World| {
            // Where it is planted, which is not always where it is mapped.
            let page = if matches!(change, Change::Moved) { ELSEWHERE } else { CODE_PA };
            let event = w.event(V1, page.0 + 0x10, 0x10, 0);
            w.m.remove_by_event(&mut w.vmi, &mut w.c, &event, &1)
        };
        let mut w = changed(change);
        if matches!(change, Change::Out) {
            // Nothing is planted, so that no event can be one's.
            let before = state(&w);
            assert_eq!(by_event(&mut w).unwrap(), None);
            assert_same(&w, &before, "out");
            continue;
        }
        assert_eq!(by_event(&mut w).unwrap(), Some(true), "{change:?}");
        assert_same(&w, &untapped(change), &format!("{change:?}"));
        each_call_failing(|| changed(change), |w| by_event(w).map(drop));
    }
}

#[test]
fn removal_by_event_takes_what_waits_in_another_view_with_it() {
    let make = || {
        let mut w = world();
        w.insert(w.point(V1, 0x10, 0, 1)).unwrap();
        w.insert(w.global(V1, 0x20, 0, 1)).unwrap();
        for point in [w.point(V2, 0x10, 0, 1), w.point(V2, 0x10, 0, 2), w.point(V2, 0x10, 1, 1), w.global(V2, 0x20, 1, 1)] {
            assert!(w.m.insert_with_hint(&mut w.vmi, &mut w.c, point, None).unwrap());
        }
        w
    };
    let by_event = |w: &mut World, offset: u64| {
        let event = w.event(V1, 0x3000 + offset, offset, 0);
        w.m.remove_by_event(&mut w.vmi, &mut w.c, &event, &1)
    };
    let mut w = make();
    assert_eq!(by_event(&mut w, 0x10).unwrap(), Some(false));
    // That of another key, and that of another root, are others; the global one is one in each view.
    let mut left: Vec<_> = w.m.iter().map(|found| (found.view, found.va, found.context.root, *found.key)).collect();
    left.sort_unstable();
    let roots = w.roots.map(|context| context.root);
    let global = [(V1, va(0x20), roots[0], 1), (V2, va(0x20), roots[1], 1)];
    let mut wanted = vec![global[0], (V2, va(0x10), roots[0], 2), (V2, va(0x10), roots[1], 1), global[1]];
    wanted.sort_unstable();
    assert_eq!(left, wanted);
    assert_eq!(by_event(&mut w, 0x20).unwrap(), Some(true));
    assert_eq!(w.m.len(), 2);
    each_call_failing(make, |w| by_event(w, 0x10).map(drop));
    each_call_failing(make, |w| by_event(w, 0x20).map(drop));
}

#[test]
fn a_hint_decides_nothing_when_a_breakpoint_is_removed() {
    const WRONG: Option<Pa> = Some(Pa(0x8010));
    for change in CHANGES {
        for hint in [None, Some(Pa(0x3010)), Some(Pa(ELSEWHERE.0 + 0x10)), WRONG] {
            let mut w = changed(change);
            let root = w.roots[0].root;
            for view in [V1, V2] {
                let mut remove = |va: Va| w.m.remove_with_hint(&mut w.vmi, &mut w.c, view, va, root, hint, &1).unwrap();
                assert!(!remove(va(0x11)) && remove(va(0x10)) && !remove(va(0x10)), "{change:?}, {hint:?}");
            }
            assert_same(&w, &untapped(change), &format!("{change:?}, {hint:?}"));
        }
    }
}
