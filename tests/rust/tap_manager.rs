//! Breakpoints by owner, on the mock driver.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use vmitap::arch::amd64::{AddressContext, Registers, pte};
use vmitap::core::VmiCore;
use vmitap::driver::mock::{MockDriver, PageSize};
use vmitap::driver::{VmiFrames, VmiViews};
use vmitap::event::{EventReason, VmiEvent};
use vmitap::tap::{Breakpoint, BreakpointController, BreakpointManager, MemoryController, TapController, TapEvents};
use vmitap::{Gfn, MemoryAccess, Pa, Result, Va, VcpuId, View, VmiError};

use super::harness::{Faulty, each_call_failing, each_call_panicking};

type Vmi = VmiCore<Faulty<MockDriver>>;
type Point = Breakpoint<u32, &'static str>;
pub(super) const V1: View = View(1);
pub(super) const V2: View = View(2);
pub(super) const CODE: Va = Va(0x40_0000);
pub(super) const CODE_PA: Pa = Pa(0x3000);

/// Passes everything on, one by one, and remembers what. Panics at a call that it is told.
#[derive(Default)]
pub(super) struct Logging {
    inner: BreakpointController,
    log: Vec<(&'static str, u64)>,
    pub(super) panics_in: usize,
}

impl Logging {
    fn call(&mut self, what: &'static str, at: u64) -> &mut BreakpointController {
        if self.panics_in > 0 {
            self.panics_in -= 1;
            assert!(self.panics_in > 0, "a controller that panics");
        }
        self.log.push((what, at));
        &mut self.inner
    }
}

impl TapEvents for Logging {
    fn check_event(&self, event: &VmiEvent) -> Option<(View, Gfn)> {
        self.inner.check_event(event)
    }
}

impl TapController<Faulty<MockDriver>> for Logging {
    fn insert_breakpoint(&mut self, vmi: &mut Vmi, pa: Pa, view: View) -> Result<()> {
        self.call("insert", pa.0).insert_breakpoint(vmi, pa, view)
    }

    fn remove_breakpoint(&mut self, vmi: &mut Vmi, pa: Pa, view: View) -> Result<()> {
        self.call("remove", pa.0).remove_breakpoint(vmi, pa, view)
    }

    fn monitor(&mut self, vmi: &mut Vmi, gfn: Gfn, view: View) -> Result<()> {
        self.call("monitor", gfn.0).monitor(vmi, gfn, view)
    }

    fn unmonitor(&mut self, vmi: &mut Vmi, gfn: Gfn, view: View) -> Result<()> {
        self.call("unmonitor", gfn.0).unmonitor(vmi, gfn, view)
    }
}

/// Two processes: four pages at `CODE` are the same frames under both roots; the fifth is only mapped under the first, the
/// sixth differs. The eighth is the first one's frame again. Two views.
pub(super) struct World {
    pub(super) vmi: Vmi,
    pub(super) roots: [AddressContext; 2],
    pub(super) c: Logging,
    pub(super) m: BreakpointManager<u32, &'static str>,
}

pub(super) fn world() -> World {
    let mut driver = MockDriver::new(0x30000, 1);
    let roots = [driver.new_root(4).unwrap(), driver.new_root(4).unwrap()];
    for (index, root) in roots.iter().enumerate() {
        for page in 0..4 {
            driver.map(*root, va(page << 12), Pa(CODE_PA.0 + (page << 12)), PageSize::Size4K, pte::P).unwrap();
        }
        driver.map(*root, va(0x5000), Pa(0x8000 + 0x1000 * index as u64), PageSize::Size4K, pte::P).unwrap();
        driver.map(*root, va(0x7000), CODE_PA, PageSize::Size4K, pte::P).unwrap();
    }
    driver.map(roots[0], va(0x4000), Pa(0x7000), PageSize::Size4K, pte::P).unwrap();
    driver.map(roots[0], va(0x6000), Pa(0x100_0000), PageSize::Size4K, pte::P).unwrap();
    for _ in 0..2 {
        driver.create_view(MemoryAccess::RWX).unwrap();
    }
    driver.take_calls();
    World { vmi: VmiCore::new(Box::new(Faulty::new(driver))), roots, c: Logging::default(), m: BreakpointManager::new() }
}

pub(super) fn va(offset: u64) -> Va {
    Va(CODE.0 + offset)
}

impl World {
    pub(super) fn point(&self, view: View, offset: u64, root: usize, key: u32) -> Point {
        Breakpoint { view, va: va(offset), context: self.roots[root], key, tag: "tag", global: false }
    }

    pub(super) fn global(&self, view: View, offset: u64, root: usize, key: u32) -> Point {
        Breakpoint { global: true, ..self.point(view, offset, root, key) }
    }

    pub(super) fn insert(&mut self, point: Point) -> Result<bool> {
        self.m.insert(&mut self.vmi, &mut self.c, point)
    }

    pub(super) fn insert_many(&mut self, points: Vec<Point>) -> Result<Vec<bool>> {
        self.m.insert_many(&mut self.vmi, &mut self.c, points)
    }

    pub(super) fn remove(&mut self, view: View, offset: u64, root: usize, key: u32) -> Result<bool> {
        let root = self.roots[root].root;
        self.m.remove(&mut self.vmi, &mut self.c, view, va(offset), root, &key)
    }

    pub(super) fn log(&mut self) -> Vec<(&'static str, u64)> {
        std::mem::take(&mut self.c.log)
    }

    /// The keys hit at `offset` under that root with `pa`, and how many are there.
    pub(super) fn hit(&self, view: View, pa: u64, offset: u64, root: usize) -> (Vec<u32>, usize) {
        let mut keys = Vec::new();
        let count = self.m.for_each_at(view, Pa(pa), va(offset), self.roots[root].root, |key, _| keys.push(*key));
        // The other way to ask looks at each breakpoint and not at what its page has in common.
        if Pa(pa).page_offset() == va(offset).page_offset() {
            let found = self.m.all_by_event(&self.c, &self.event(view, pa, offset, root));
            assert_eq!(found.iter().map(|found| *found.key).collect::<Vec<_>>(), keys);
        }
        (keys, count)
    }

    pub(super) fn event(&self, view: View, pa: u64, offset: u64, root: usize) -> VmiEvent {
        let mut registers = Registers { cr3: self.roots[root].root.0, ..Registers::default() };
        registers.gp.rip = va(offset).0;
        let reason = EventReason::Breakpoint { gfn: Pa(pa).gfn(), insn_len: 1 };
        VmiEvent { vcpu: VcpuId(0), view: Some(view), registers, reason }
    }

    pub(super) fn unmap(&mut self, offset: u64, root: usize) {
        let context = self.roots[root];
        self.vmi.driver_mut().inner().unmap(context, va(offset), 1).unwrap();
    }

    pub(super) fn books(&self) -> Vec<String> {
        let mut all: Vec<_> = self.m.iter().map(|found| format!("{found:?}")).collect();
        all.sort();
        all.push(format!(
            "{:?}",
            [V1, V2].map(|view| (0..0x30).map(|gfn| self.m.count_on_page(view, Gfn(gfn))).collect::<Vec<_>>())
        ));
        all
    }
}

impl super::harness::World for World {
    type Driver = MockDriver;

    fn driver(&self) -> Faulty<MockDriver> {
        self.vmi.driver().clone()
    }

    fn books(&self) -> Vec<String> {
        assert_eq!(self.vmi.driver().frames_in_use(), self.c.inner.shadow_frames());
        World::books(self)
    }
}

#[test]
fn two_on_a_page_are_two_inserts_and_one_monitor() {
    let mut w = world();
    assert!(w.insert(w.point(V1, 0x10, 0, 1)).unwrap() && w.insert(w.point(V1, 0x20, 0, 1)).unwrap());
    assert_eq!(w.log(), [("monitor", 3), ("insert", 0x3010), ("insert", 0x3020)]);
    assert_eq!((w.m.len(), w.m.count_on_page(V1, Gfn(3))), (2, 2));
    let on_page: Vec<_> = w.m.breakpoints_on_page(V1, Gfn(3)).map(|(point, pa)| (point.va, pa)).collect();
    assert_eq!(on_page, [(va(0x10), Pa(0x3010)), (va(0x20), Pa(0x3020))]);
    assert!(w.remove(V1, 0x10, 0, 1).unwrap() && w.remove(V1, 0x20, 0, 1).unwrap());
    assert_eq!(w.log(), [("remove", 0x3010), ("remove", 0x3020), ("unmonitor", 3)]);
    assert!(w.m.is_empty() && !w.remove(V1, 0x20, 0, 1).unwrap());
    assert_eq!(w.log(), []);
}

#[test]
fn a_duplicate_makes_no_call_and_keeps_the_first_tag() {
    let mut w = world();
    for point in [w.point(V1, 0x10, 0, 1), w.point(V1, 0x4000, 1, 1)] {
        assert!(w.insert(point).unwrap());
        w.log();
        w.vmi.driver_mut().inner().record_reads(true);
        w.vmi.driver_mut().inner().take_calls();
        assert!(!w.insert(Breakpoint { tag: "second", ..point }).unwrap());
        assert_eq!((w.log(), w.vmi.driver_mut().inner().take_calls()), (vec![], vec![]));
        let conflict = w.insert(Breakpoint { global: true, ..point });
        assert_eq!(conflict, Err(VmiError::BreakpointConflict { va: point.va }));
    }
    assert!(w.insert(w.global(V1, 0x20, 0, 1)).unwrap());
    assert!(matches!(w.insert(w.point(V1, 0x20, 0, 1)), Err(VmiError::BreakpointConflict { .. })));
    assert!(w.m.iter().all(|found| *found.tag == "tag") && w.m.len() == 3);
    let before = w.books();
    let batch = vec![w.point(V1, 0x30, 0, 1), w.point(V1, 0x30, 0, 1), w.point(V1, 0x20, 0, 1)];
    assert!(w.insert_many(batch).is_err());
    assert_eq!(w.books(), before);
    assert_eq!(w.insert_many(vec![w.point(V1, 0x30, 0, 1); 2]).unwrap(), [true, false]);
}

#[test]
fn what_is_not_mapped_waits_and_what_cannot_be_mapped_is_refused() {
    let mut w = world();
    assert!(w.insert(w.point(V1, 0x4010, 1, 1)).unwrap());
    assert_eq!((w.log(), w.m.len(), w.m.iter().next().unwrap().pa), (vec![], 1, None));
    assert!(w.m.contains_by_address(va(0x4010), w.roots[1].root, V1));
    assert!(!w.m.contains_by_address(va(0x4010), w.roots[0].root, V1));
    assert!(matches!(w.insert(w.point(V1, 0x6000, 0, 1)), Err(VmiError::Translation { .. })));
    let wild = Breakpoint { va: Va(1 << 60), ..w.point(V1, 0, 0, 1) };
    assert!(matches!(w.insert(wild), Err(VmiError::Translation { .. })));
    assert!(matches!(w.insert(w.point(View::DEFAULT, 0, 0, 1)), Err(VmiError::DefaultView { .. })));
    assert!(matches!(w.insert(w.point(View(9), 0, 0, 1)), Err(VmiError::ViewNotFound { .. })));
    assert_eq!(w.m.len(), 1);
    assert!(w.remove(V1, 0x4010, 1, 1).unwrap());
    assert_eq!(w.m.len(), 0);
    // With a hint nothing is translated.
    let point = w.point(V1, 0x6000, 0, 1);
    assert!(w.m.insert_with_hint(&mut w.vmi, &mut w.c, point, Some(Pa(0x3333))).unwrap());
    assert!(w.m.insert_with_hint(&mut w.vmi, &mut w.c, Breakpoint { key: 2, ..point }, None).unwrap());
    assert_eq!(w.hit(V1, 0x3333, 0x6000, 0), (vec![1], 1));
}

#[test]
fn removing_goes_by_what_is_planted_and_not_by_what_is_mapped_today() {
    let mut w = world();
    let before = w.vmi.driver().inner().snapshot();
    w.insert(w.point(V1, 0x10, 0, 1)).unwrap();
    let context = w.roots[0];
    w.vmi.driver_mut().inner().map(context, CODE, Pa(0x9000), PageSize::Size4K, pte::P).unwrap();
    assert!(w.remove(V1, 0x10, 0, 1).unwrap());
    w.vmi.driver_mut().inner().map(context, CODE, CODE_PA, PageSize::Size4K, pte::P).unwrap();
    assert_eq!(w.vmi.driver().inner().snapshot().differences(&before), [] as [String; 0]);
}

#[test]
fn global_ones_hit_under_every_root_and_others_under_theirs() {
    let mut w = world();
    w.insert(w.point(V1, 0x10, 0, 1)).unwrap();
    w.insert(w.global(V1, 0x10, 1, 2)).unwrap();
    w.insert(w.point(V1, 0x10, 1, 3)).unwrap();
    assert_eq!(w.hit(V1, 0x3010, 0x10, 0), (vec![1, 2], 3));
    assert_eq!(w.hit(V1, 0x3010, 0x10, 1), (vec![2, 3], 3));
    // Another address of the same byte, another view, another byte.
    assert_eq!(w.hit(V1, 0x3010, 0x1010, 0), (vec![], 3));
    assert_eq!((w.hit(V2, 0x3010, 0x10, 0), w.hit(V1, 0x3011, 0x11, 0)), ((vec![], 0), (vec![], 0)));
    let event = w.event(V1, 0x3010, 0x10, 0);
    assert!(w.m.contains_by_event(&w.c, &event, &1) && !w.m.contains_by_event(&w.c, &event, &3));
    let found = w.m.get_by_event(&w.c, &event, &2).unwrap();
    assert_eq!((found.global, found.pa, *found.tag), (true, Some(Pa(0x3010)), "tag"));
    assert!(w.m.contains_by_address(va(0x10), Pa(0xdead_0000), V1));
}

#[test]
fn a_global_one_with_several_roots_and_frames_is_one() {
    for by in [0, 1] {
        let mut w = world();
        let before = w.vmi.driver().inner().snapshot();
        // One frame under both roots: planted once.
        assert!(w.insert(w.global(V1, 0x10, 0, 1)).unwrap() && w.insert(w.global(V1, 0x10, 1, 1)).unwrap());
        assert!(!w.insert(w.global(V1, 0x10, 1, 1)).unwrap());
        assert_eq!(w.log(), [("monitor", 3), ("insert", 0x3010)]);
        // Two frames: planted twice.
        assert_eq!(w.insert_many(vec![w.global(V1, 0x5010, 0, 1), w.global(V1, 0x5010, 1, 1)]).unwrap(), [true, true]);
        assert_eq!((w.m.len(), w.hit(V1, 0x8010, 0x5010, 1), w.hit(V1, 0x9010, 0x5010, 0)), (2, (vec![1], 1), (vec![1], 1)));
        // One waits under the other root.
        w.insert(w.global(V1, 0x4010, 0, 1)).unwrap();
        w.insert(w.global(V1, 0x4010, 1, 1)).unwrap();
        for offset in [0x10, 0x5010, 0x4010] {
            assert!(w.remove(V1, offset, by, 1).unwrap());
            assert!(!w.remove(V1, offset, 1 - by, 1).unwrap());
        }
        assert_eq!((w.m.len(), w.vmi.driver().inner().snapshot().differences(&before)), (0, vec![]));
    }
}

#[test]
fn removing_by_event_takes_the_same_one_in_every_view() {
    let mut w = world();
    let before = w.vmi.driver().inner().snapshot();
    for view in [V1, V2] {
        w.insert(w.point(view, 0x10, 0, 1)).unwrap();
    }
    w.insert(w.point(V1, 0x20, 0, 1)).unwrap();
    w.insert(w.point(V1, 0x10, 1, 1)).unwrap();
    let event = w.event(V1, 0x3010, 0x10, 0);
    assert_eq!(w.m.remove_by_event(&mut w.vmi, &mut w.c, &event, &2).unwrap(), None);
    assert_eq!(w.m.remove_by_event(&mut w.vmi, &mut w.c, &event, &1).unwrap(), Some(false));
    assert_eq!((w.m.len(), w.hit(V2, 0x3010, 0x10, 0)), (2, (vec![], 0)));
    let event = w.event(V1, 0x3010, 0x10, 1);
    assert_eq!(w.m.remove_by_event(&mut w.vmi, &mut w.c, &event, &1).unwrap(), Some(false));
    let event = w.event(V1, 0x3020, 0x20, 0);
    assert_eq!(w.m.remove_by_event(&mut w.vmi, &mut w.c, &event, &1).unwrap(), Some(true));
    assert_eq!(w.vmi.driver().inner().snapshot().differences(&before), [] as [String; 0]);
}

#[test]
fn events_of_the_memory_controller_have_their_own_address() {
    let mut w = world();
    let mut c = MemoryController::new();
    let mut m = BreakpointManager::new();
    let point = w.point(V1, 0x10, 0, 1);
    m.insert(&mut w.vmi, &mut c, point).unwrap();
    let mut event = w.event(V1, 0x3010, 0x10, 0);
    assert!(!m.contains_by_event(&c, &event, &1));
    event.reason = EventReason::MemoryAccess { pa: Pa(0x3010), va: None, access: MemoryAccess::X, len: 0 };
    assert!(m.contains_by_event(&c, &event, &1));
}

#[test]
fn a_page_that_goes_disarms_its_root_alone_and_comes_back() {
    let mut w = world();
    w.insert(w.point(V1, 0x10, 0, 1)).unwrap();
    w.insert(w.point(V1, 0x10, 1, 2)).unwrap();
    w.insert(w.global(V2, 0x10, 0, 3)).unwrap();
    w.insert(w.global(V2, 0x10, 1, 3)).unwrap();
    let (armed, guest) = (w.books(), w.vmi.driver().inner().snapshot());
    let root = w.roots[0].root;
    w.unmap(0x10, 0);
    assert_eq!(w.m.page_out(&mut w.vmi, &mut w.c, va(0x10), root).unwrap(), 2);
    assert_eq!((w.hit(V1, 0x3010, 0x10, 0), w.hit(V2, 0x3010, 0x10, 1)), ((vec![], 1), (vec![3], 1)));
    assert_eq!(w.m.page_out(&mut w.vmi, &mut w.c, va(0x10), root).unwrap(), 0);
    assert_eq!(w.m.page_in(&mut w.vmi, &mut w.c, va(0x10), root, Pa(0x3010)).unwrap(), 2);
    let context = w.roots[0];
    w.vmi.driver_mut().inner().map(context, CODE, CODE_PA, PageSize::Size4K, pte::P).unwrap();
    assert_eq!((w.books(), w.vmi.driver().inner().snapshot().differences(&guest)), (armed, vec![]));
    // To another frame.
    w.m.page_out(&mut w.vmi, &mut w.c, va(0x10), root).unwrap();
    w.m.page_in(&mut w.vmi, &mut w.c, va(0x10), root, Pa(0x9010)).unwrap();
    assert_eq!((w.hit(V1, 0x9010, 0x10, 0), w.hit(V1, 0x3010, 0x10, 1)), ((vec![1], 1), (vec![2], 1)));
}

#[test]
fn a_batch_costs_calls_by_pages() {
    let mut w = world();
    let points: Vec<_> = (0..4000).map(|n| w.point(V1, n * 4, 0, 1)).collect();
    let mut c = BreakpointController::new();
    w.vmi.driver_mut().inner().take_calls();
    assert!(w.m.insert_many(&mut w.vmi, &mut c, points).unwrap().into_iter().all(|new| new));
    // Four pages: four times rights are looked at, once they are set, once frames are taken, and four times a page is made.
    assert_eq!(w.vmi.driver_mut().inner().take_calls().len(), 4 + 1 + 1 + 4 * 2);
    assert_eq!((w.m.len(), w.vmi.driver().frames_in_use()), (4000, 4));
    assert_eq!(w.m.remove_by_view(&mut w.vmi, &mut c, V1).unwrap(), 4000);
}

/// A world with something in it: two pages with several owners, one waiting, one with two frames, and one in the other view.
fn busy() -> World {
    let mut w = world();
    for point in [
        w.point(V1, 0x10, 0, 1),
        w.point(V1, 0x10, 0, 2),
        w.point(V1, 0x20, 0, 1),
        w.point(V1, 0x1fff, 1, 1),
        w.point(V1, 0x4010, 1, 1),
        w.global(V1, 0x5010, 0, 1),
        w.global(V1, 0x5010, 1, 1),
        w.point(V2, 0x10, 0, 1),
    ] {
        assert!(w.insert(point).unwrap());
    }
    w
}

/// One of each operation, and on which of the worlds.
type Operation = (fn() -> World, fn(&mut World) -> Result<()>);

const OPERATIONS: &[Operation] = &[
    (world, |w| w.insert(w.point(V1, 0x10, 0, 1)).map(drop)),
    (busy, |w| w.insert(w.global(V1, 0x20, 1, 7)).map(drop)),
    (busy, |w| {
        let point = w.point(V1, 0x2000, 0, 1);
        w.m.insert_with_hint(&mut w.vmi, &mut w.c, point, Some(Pa(0x5000))).map(drop)
    }),
    (busy, |w| {
        let points = vec![
            w.point(V1, 0x30, 0, 1),
            w.point(V1, 0x2000, 0, 1),
            w.point(V1, 0x2000, 1, 1),
            w.point(V1, 0x3004, 1, 1),
            w.point(V2, 0x3004, 1, 1),
            w.global(V2, 0x5004, 1, 1),
            w.global(V2, 0x5004, 0, 1),
            w.point(V2, 0x4004, 1, 1),
        ];
        w.insert_many(points).map(drop)
    }),
    (busy, |w| w.remove(V1, 0x20, 0, 1).map(drop)),
    (busy, |w| w.remove(V1, 0x1fff, 1, 1).map(drop)),
    (busy, |w| w.remove(V1, 0x5010, 1, 1).map(drop)),
    (busy, |w| {
        let root = w.roots[1].root;
        assert!(w.m.remove_with_hint(&mut w.vmi, &mut w.c, V1, va(0x5010), root, None, &1)?);
        Ok(())
    }),
    (busy, |w| w.m.remove_by_view(&mut w.vmi, &mut w.c, V1).map(drop)),
    (busy, |w| {
        let event = w.event(V1, 0x3010, 0x10, 0);
        w.m.remove_by_event(&mut w.vmi, &mut w.c, &event, &1).map(drop)
    }),
    (busy, |w| {
        let root = w.roots[0].root;
        let all = [(V1, va(0x10), root, 1), (V1, va(0x10), root, 2), (V1, va(0x20), root, 1), (V2, va(0x10), root, 1)];
        w.m.remove_many(&mut w.vmi, &mut w.c, &all).map(drop)
    }),
    (busy, |w| {
        let root = w.roots[0].root;
        w.m.page_out(&mut w.vmi, &mut w.c, va(0x10), root).map(drop)
    }),
    (busy, |w| {
        let root = w.roots[1].root;
        w.m.page_in(&mut w.vmi, &mut w.c, va(0x4010), root, Pa(0x7010)).map(drop)
    }),
];

#[test]
fn whichever_call_fails_nothing_has_changed_and_a_retry_does_it() {
    for (make, op) in OPERATIONS {
        each_call_failing(make, op);
    }
}

#[test]
fn wherever_a_controller_panics_nothing_has_changed_and_a_retry_does_it() {
    let arm = |w: &mut World, n: usize| std::mem::replace(&mut w.c.panics_in, n) == 0;
    for (make, op) in OPERATIONS {
        each_call_panicking(make, op, arm);
    }
}

#[test]
fn clear_removes_what_it_can_and_says_what_is_left() {
    let empty = super::harness::World::driver(&world()).seen();
    for n in 1.. {
        let mut w = busy();
        let driver = super::harness::World::driver(&w);
        let (result, is_through) = driver.failing(n, || w.m.clear(&mut w.vmi, &mut w.c));
        if !is_through {
            let cause = match result {
                Err(VmiError::UndoFailed { cause, .. }) => *cause,
                other => panic!("{n}: {other:?}"),
            };
            assert!(matches!(cause, VmiError::Driver { op, .. } if Some(op) == driver.failed()), "{n}: {cause}");
            assert_eq!(w.m.len(), 1, "{n}");
            w.m.clear(&mut w.vmi, &mut w.c).unwrap();
        }
        assert!(w.m.is_empty() && w.vmi.driver().frames_in_use() == 0);
        assert_eq!(driver.seen().differences(&empty), "", "{n}");
        if is_through {
            assert!(n > 8, "{n}");
            return;
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Insert(Vec<(u8, u8, u8, u8, bool)>),
    Remove(u8, u8, u8, u8),
    RemoveView(u8),
    Fail(u8),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let point = || (1..3_u8, 0..AT.len() as u8, 0..2_u8, 0..3_u8, any::<bool>());
    let op = prop_oneof![
        6 => prop::collection::vec(point(), 1..5).prop_map(Op::Insert),
        4 => point().prop_map(|(view, at, root, key, _)| Op::Remove(view, at, root, key)),
        1 => (1..3_u8).prop_map(Op::RemoveView),
        3 => (1..12_u8).prop_map(Op::Fail),
    ];
    prop::collection::vec(op, 1..40)
}

/// Offsets from `CODE`: several on a page, the last byte of one, one that waits under the second root, one with two frames, and other
/// addresses of what is there already.
const AT: [u64; 10] = [0, 1, 0xfff, 0x1000, 0x2005, 0x4000, 0x5000, 0x5001, 0x7000, 0x7fff];

fn frame_of(at: u64, root: u8) -> Option<u64> {
    match (at >> 12, root) {
        (4, 1) => None,
        (5, 1) => Some(0x9000 + at % 0x1000),
        (7, _) => Some(CODE_PA.0 + at % 0x1000),
        _ => Some(CODE_PA.0 + at),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_operations_with_failures_do_what_plain_maps_say(ops in ops()) {
        let mut w = world();
        // (view, at, root or none if global, key) -> roots
        let mut model: BTreeMap<(u8, u64, Option<u8>, u8), BTreeSet<u8>> = BTreeMap::new();
        for op in ops {
            let mut next = model.clone();
            let result = match op {
                Op::Fail(n) => {
                    w.vmi.driver_mut().inner().clear_faults();
                    w.vmi.driver_mut().inner().fail_nth(n.into());
                    continue;
                }
                Op::Insert(points) => {
                    let mut new = Vec::new();
                    let mut conflict = false;
                    for &(view, at, root, key, global) in &points {
                        let at = AT[at as usize];
                        let own = next.contains_key(&(view, at, Some(root), key));
                        let shared = next.get(&(view, at, None, key)).is_some_and(|roots| roots.contains(&root));
                        conflict |= if global { own } else { shared };
                        let of = (!global).then_some(root);
                        new.push(next.entry((view, at, of, key)).or_default().insert(root));
                    }
                    let batch = points.iter().map(|&(view, at, root, key, global)| Breakpoint {
                        global, ..w.point(View(view.into()), AT[at as usize], root.into(), key.into())
                    }).collect();
                    let result = w.insert_many(batch);
                    if conflict {
                        prop_assert!(result.is_err());
                    } else if let Ok(result) = &result {
                        prop_assert_eq!(result, &new);
                    }
                    result.map(drop)
                }
                Op::Remove(view, at, root, key) => {
                    let at = AT[at as usize];
                    let was = next.remove(&(view, at, Some(root), key)).is_some()
                        || (next.get(&(view, at, None, key)).is_some_and(|roots| roots.contains(&root))
                            && next.remove(&(view, at, None, key)).is_some());
                    let result = w.remove(View(view.into()), at, root.into(), key.into());
                    if let Ok(result) = result {
                        prop_assert_eq!(result, was);
                    }
                    result.map(drop)
                }
                Op::RemoveView(view) => {
                    next.retain(|held, _| held.0 != view);
                    w.m.remove_by_view(&mut w.vmi, &mut w.c, View(view.into())).map(drop)
                }
            };
            if result.is_ok() {
                model = next;
            }
            prop_assert_eq!(w.m.len(), model.len());
            for view in [1, 2] {
                let mut bytes: BTreeSet<u64> = BTreeSet::new();
                for ((_, at, _, _), roots) in model.iter().filter(|(held, _)| held.0 == view) {
                    bytes.extend(roots.iter().filter_map(|root| frame_of(*at, *root)));
                }
                let pages: BTreeSet<u64> = bytes.iter().map(|pa| pa >> 12).collect();
                let held = w.vmi.driver().inner().state().views[&View(view.into())].clone();
                prop_assert_eq!(held.remaps.keys().map(|gfn| gfn.0).collect::<BTreeSet<_>>(), pages.clone());
                prop_assert_eq!(held.pages.keys().map(|gfn| gfn.0).collect::<BTreeSet<_>>(), pages);
                let planted = w.vmi.driver().inner().peek_in_view(View(view.into()), Pa(0), 0xa000).unwrap();
                let seen: BTreeSet<u64> = (0..).zip(&planted).filter(|(_, byte)| **byte == 0xcc).map(|(pa, _)| pa).collect();
                prop_assert_eq!(&seen, &bytes);
                for (at, root) in AT.iter().flat_map(|at| [(*at, 0), (*at, 1)]) {
                    let Some(pa) = frame_of(at, root) else { continue };
                    let hits = model.iter().filter(|((v, a, of, _), roots)| {
                        *v == view && *a == at && of.is_none_or(|of| of == root)
                            && roots.iter().any(|root| frame_of(at, *root) == Some(pa))
                    });
                    let wanted: BTreeSet<u32> = hits.map(|(held, _)| held.3.into()).collect();
                    let (keys, count) = w.hit(View(view.into()), pa, at, root.into());
                    prop_assert_eq!(keys.into_iter().collect::<BTreeSet<_>>(), wanted);
                    let there = model.iter().filter(|((v, a, ..), roots)| {
                        *v == view && roots.iter().any(|root| frame_of(*a, *root) == Some(pa))
                    });
                    prop_assert_eq!(count, there.count());
                }
            }
        }
        w.vmi.driver_mut().inner().clear_faults();
        w.m.clear(&mut w.vmi, &mut w.c).unwrap();
        prop_assert_eq!(w.vmi.driver().inner().snapshot().differences(&world().vmi.driver().inner().snapshot()), [] as [String; 0]);
    }
}
