//! Every operation is whole or not at all: whichever driver call fails, and wherever a controller panics.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vmitap::core::VmiCore;
use vmitap::driver::mock::MockDriver;
use vmitap::driver::{VmiDriver, VmiFrames, VmiViews};
use vmitap::event::VmiEvent;
use vmitap::tap::{BreakpointController, MemoryController, Rights, TapController, TapEvents};
use vmitap::{Gfn, MemoryAccess, Pa, Result, View, VmiError};

use super::harness::{Faulty, World, each_call_failing, each_call_failing_on_one, each_call_panicking};

type Driver = Faulty<MockDriver>;
const GFN: Gfn = Gfn(2);
const V1: View = View(1);
const V2: View = View(2);

/// A controller, and the guest it works on.
struct Lab<C> {
    vmi: VmiCore<Driver>,
    c: C,
}

/// What can be seen of a controller from outside.
trait Books {
    fn books(&self, vmi: &VmiCore<Driver>) -> Vec<String>;
}

impl Books for BreakpointController {
    fn books(&self, vmi: &VmiCore<Driver>) -> Vec<String> {
        // Frames that are taken and not known to the controller would be lost.
        assert_eq!(vmi.driver().frames_in_use(), self.shadow_frames());
        let pages = || [V1, V2].into_iter().flat_map(|view| (0..8).map(move |gfn| (view, Gfn(gfn))));
        let planted = pages().filter(|(view, gfn)| self.is_hidden(*view, *gfn));
        let pages = planted.map(|(view, gfn)| format!("{view} {gfn} {:?}", self.breakpoints_on(view, gfn).collect::<Vec<_>>()));
        pages.chain([format!("{} frames", self.shadow_frames())]).collect()
    }
}

impl Books for MemoryController {
    fn books(&self, _: &VmiCore<Driver>) -> Vec<String> {
        Vec::new()
    }
}

impl Books for Rights {
    fn books(&self, _: &VmiCore<Driver>) -> Vec<String> {
        let pages = [V1, V2].into_iter().flat_map(|view| (0..8).map(move |gfn| (view, Gfn(gfn))));
        pages.map(|(view, gfn)| self.denied(gfn, view).to_string()).collect()
    }
}

impl<C: Books> World for Lab<C> {
    type Driver = MockDriver;

    fn driver(&self) -> Driver {
        self.vmi.driver().clone()
    }

    fn books(&self) -> Vec<String> {
        self.c.books(&self.vmi)
    }
}

/// Two views: everything allowed in the first, no writes in the second. With or without one call for many pages.
fn empty<C: Default>(multi_access: bool) -> Lab<C> {
    let mut driver = MockDriver::new(0x8000, 1);
    driver.poke(Pa(0x2000), &[1, 2, 3, 4]).unwrap();
    driver.set_caps(vmitap::driver::Caps { multi_access, ..vmitap::driver::VmiInfo::caps(&driver) });
    let mut driver = Faulty::new(driver);
    driver.create_view(MemoryAccess::RWX).unwrap();
    driver.create_view(MemoryAccess::RX).unwrap();
    Lab { vmi: VmiCore::new(Box::new(driver)), c: C::default() }
}

/// Breakpoints on three pages, one of them monitored and with a byte that two want; more frames than pages.
fn planted(multi_access: bool) -> Lab<BreakpointController> {
    let mut lab = empty::<BreakpointController>(multi_access);
    lab.c.monitor(&mut lab.vmi, GFN, V1).unwrap();
    let points = [0x2001, 0x2001, 0x2003, 0x2fff, 0x3000, 0x4000, 0x4010].map(|pa| (V1, Pa(pa)));
    lab.c.insert_many(&mut lab.vmi, &points).unwrap();
    lab.c.insert_breakpoint(&mut lab.vmi, Pa(0x2002), V2).unwrap();
    lab.c.remove_many(&mut lab.vmi, &[(V1, Pa(0x4000)), (V1, Pa(0x4010))]).unwrap();
    lab
}

fn points(view: View, at: &[u64]) -> Vec<(View, Pa)> {
    at.iter().map(|pa| (view, Pa(*pa))).collect()
}

#[test]
fn whichever_call_fails_a_breakpoint_controller_is_as_before_and_a_retry_does_it() {
    type L = Lab<BreakpointController>;
    for multi in [true, false] {
        let none = || empty::<BreakpointController>(multi);
        let some = || planted(multi);
        each_call_failing(none, |l: &mut L| l.c.insert_breakpoint(&mut l.vmi, Pa(0x2001), V1));
        each_call_failing(none, |l: &mut L| l.c.insert_many(&mut l.vmi, &points(V2, &[0x2005, 0x2fff, 0x2005, 0x5000, 0x4001])));
        each_call_failing(some, |l: &mut L| {
            // A page that is there, pages that are new in both views, more than there are spare frames.
            let all = [points(V1, &[0x2005, 0x2009, 0x4001, 0x5001]), points(V2, &[0x2002, 0x6000])].concat();
            l.c.insert_many(&mut l.vmi, &all)
        });
        each_call_failing(some, |l: &mut L| l.c.remove_breakpoint(&mut l.vmi, Pa(0x2003), V1));
        each_call_failing(some, |l: &mut L| l.c.remove_breakpoint(&mut l.vmi, Pa(0x3000), V1));
        each_call_failing(some, |l: &mut L| {
            let all = [points(V1, &[0x2001, 0x2fff, 0x2001, 0x2003, 0x3000]), points(V2, &[0x2002])].concat();
            l.c.remove_many(&mut l.vmi, &all)
        });
        each_call_failing(some, |l: &mut L| l.c.remove_many(&mut l.vmi, &points(V1, &[0x2001, 0x2fff, 0x3000])));
        each_call_failing(none, |l: &mut L| l.c.monitor(&mut l.vmi, GFN, V2));
        let pages = [(V1, GFN), (V1, Gfn(3)), (V2, Gfn(3)), (V1, Gfn(5)), (V1, GFN)];
        each_call_failing(none, |l: &mut L| l.c.monitor_many(&mut l.vmi, &pages));
        let monitored = || {
            let mut lab = none();
            lab.c.monitor_many(&mut lab.vmi, &pages).unwrap();
            lab
        };
        each_call_failing(monitored, |l: &mut L| l.c.unmonitor(&mut l.vmi, Gfn(5), V1));
        each_call_failing(monitored, |l: &mut L| l.c.unmonitor_many(&mut l.vmi, &pages));
        let written = || {
            let lab = some();
            lab.vmi.driver().inner().poke(Pa(0x2000), &[9; 8]).unwrap();
            lab
        };
        each_call_failing(written, |l: &mut L| l.c.refresh(&mut l.vmi, GFN));
        each_call_failing(some, |l: &mut L| l.c.write(&mut l.vmi, Pa(0x2ffe), &[7; 4]));
    }
}

#[test]
fn whichever_call_fails_rights_and_a_memory_controller_are_as_before_and_a_retry_does_it() {
    let pages = [(V1, GFN), (V1, Gfn(3)), (V2, Gfn(3)), (V1, Gfn(5)), (V1, GFN)];
    for multi in [true, false] {
        let none = || empty::<Rights>(multi);
        let denied = || {
            let mut lab = none();
            lab.c.deny_many(&mut lab.vmi, &pages, MemoryAccess::RW).unwrap();
            lab.c.deny(&mut lab.vmi, Gfn(6), V1, MemoryAccess::X).unwrap();
            lab
        };
        each_call_failing(none, |l: &mut Lab<Rights>| l.c.deny(&mut l.vmi, GFN, V1, MemoryAccess::X));
        each_call_failing(none, |l: &mut Lab<Rights>| l.c.deny_many(&mut l.vmi, &pages, MemoryAccess::R));
        each_call_failing(denied, |l: &mut Lab<Rights>| l.c.allow(&mut l.vmi, Gfn(6), V1, MemoryAccess::X));
        each_call_failing(denied, |l: &mut Lab<Rights>| l.c.allow_many(&mut l.vmi, &pages, MemoryAccess::RW));
        each_call_failing(denied, |l: &mut Lab<Rights>| l.c.allow_many(&mut l.vmi, &pages, MemoryAccess::R));
        let none = || empty::<MemoryController>(multi);
        each_call_failing(none, |l: &mut Lab<MemoryController>| l.c.monitor(&mut l.vmi, GFN, V1));
        each_call_failing(none, |l: &mut Lab<MemoryController>| l.c.monitor_many(&mut l.vmi, &pages));
        let monitored = || {
            let mut lab = none();
            lab.c.monitor_many(&mut lab.vmi, &pages).unwrap();
            lab
        };
        each_call_failing(monitored, |l: &mut Lab<MemoryController>| l.c.unmonitor_many(&mut l.vmi, &pages));
    }
}

#[test]
fn a_batch_that_takes_more_than_there_is_takes_nothing() {
    let mut lab = planted(true);
    let before = (lab.driver().seen(), lab.books());
    for wrong in [&[0x2003, 0x3000, 0x3001][..], &[0x3000, 0x3000], &[0x2001, 0x2001, 0x2001]] {
        let result = lab.c.remove_many(&mut lab.vmi, &points(V1, wrong));
        assert!(matches!(result, Err(VmiError::BreakpointNotFound { view: V1, .. })), "{wrong:x?}: {result:?}");
    }
    let result = lab.c.unmonitor_many(&mut lab.vmi, &[(V1, GFN), (V1, GFN)]);
    assert!(matches!(result, Err(VmiError::InvalidArgument { .. })), "{result:?}");
    assert!((lab.driver().seen(), lab.books()) == before);
}

#[test]
fn one_failure_after_the_other_leaves_nothing_behind() {
    let mut lab = planted(true);
    let before = (lab.driver().seen(), lab.books());
    let all = [points(V1, &[0x2005, 0x4001, 0x5001, 0x6001]), points(V2, &[0x2002, 0x7000])].concat();
    for _ in 0..3 {
        let insert = each_call_failing_on_one(&mut lab, |l| l.c.insert_many(&mut l.vmi, &all));
        let remove = each_call_failing_on_one(&mut lab, |l| l.c.remove_many(&mut l.vmi, &all));
        assert!(insert > 15 && remove > 5, "{insert} {remove}");
        // The frames that are kept for the next page are their own affair.
        let planted = |books: &[String]| books.split_last().map(|(_, pages)| pages.to_vec());
        assert_eq!(lab.driver().seen().differences(&before.0), "");
        assert_eq!(planted(&lab.books()), planted(&before.1));
    }
}

/// A controller of somebody's own, which is not a [`BreakpointController`] but has one, and panics when it is told to.
#[derive(Default)]
pub struct Panicking {
    pub inner: BreakpointController,
    pub left: usize,
}

impl Panicking {
    fn call(&mut self) -> &mut BreakpointController {
        if self.left > 0 {
            self.left -= 1;
            assert!(self.left > 0, "a controller that panics");
        }
        &mut self.inner
    }
}

impl TapEvents for Panicking {
    fn check_event(&self, event: &VmiEvent) -> Option<(View, Gfn)> {
        self.inner.check_event(event)
    }
}

impl<D: VmiDriver> TapController<D> for Panicking {
    fn insert_breakpoint(&mut self, vmi: &mut VmiCore<D>, pa: Pa, view: View) -> Result<()> {
        self.call().insert_breakpoint(vmi, pa, view)
    }

    fn remove_breakpoint(&mut self, vmi: &mut VmiCore<D>, pa: Pa, view: View) -> Result<()> {
        self.call().remove_breakpoint(vmi, pa, view)
    }

    fn monitor(&mut self, vmi: &mut VmiCore<D>, gfn: Gfn, view: View) -> Result<()> {
        self.call().monitor(vmi, gfn, view)
    }

    fn unmonitor(&mut self, vmi: &mut VmiCore<D>, gfn: Gfn, view: View) -> Result<()> {
        self.call().unmonitor(vmi, gfn, view)
    }
}

impl Books for Panicking {
    fn books(&self, vmi: &VmiCore<Driver>) -> Vec<String> {
        self.inner.books(vmi)
    }
}

#[test]
fn wherever_a_controller_panics_its_batches_are_taken_back_before_the_panic_goes_on() {
    type P = Lab<Panicking>;
    let arm = |l: &mut P, n: usize| {
        let had = l.c.left;
        l.c.left = n;
        had == 0
    };
    let with = || {
        let mut lab = empty::<Panicking>(true);
        lab.c.monitor_many(&mut lab.vmi, &[(V1, GFN), (V1, Gfn(3))]).unwrap();
        lab.c.insert_many(&mut lab.vmi, &points(V1, &[0x2001, 0x2002, 0x3000])).unwrap();
        lab
    };
    let batch = points(V1, &[0x2005, 0x3005, 0x4000]);
    each_call_panicking(with, |l: &mut P| l.c.insert_many(&mut l.vmi, &batch), arm);
    each_call_panicking(with, |l: &mut P| l.c.remove_many(&mut l.vmi, &points(V1, &[0x2001, 0x2002, 0x3000])), arm);
    each_call_panicking(with, |l: &mut P| l.c.monitor_many(&mut l.vmi, &[(V1, Gfn(4)), (V2, Gfn(3))]), arm);
    each_call_panicking(with, |l: &mut P| l.c.unmonitor_many(&mut l.vmi, &[(V1, GFN), (V1, Gfn(3))]), arm);
    // What fails in the middle of a batch is undone in the same way.
    each_call_failing(with, |l: &mut P| l.c.insert_many(&mut l.vmi, &batch));
}

/// A page that shows a frame of ours and could be read there.
fn exposed(driver: &MockDriver) -> Option<String> {
    for (view, held) in &driver.state().views {
        for (gfn, frame) in &held.remaps {
            let access = held.pages.get(gfn).copied().unwrap_or(held.access);
            if access.intersects(MemoryAccess::RW) && driver.peek(frame.pa(0), 4096) != driver.peek(gfn.pa(0), 4096) {
                return Some(format!("frame {gfn} in view {view} is {access}"));
            }
        }
    }
    None
}

#[test]
fn after_no_driver_call_of_ten_thousand_inserts_and_removes_can_a_breakpoint_be_read() {
    let mut lab = empty::<BreakpointController>(true);
    let memory = lab.driver().inner().peek(Pa(0), 0x8000);
    let looks = Arc::new(AtomicUsize::new(0));
    let counter = looks.clone();
    lab.driver().look_after_each_call(move |driver| {
        counter.fetch_add(1, Ordering::Relaxed);
        assert_eq!(exposed(driver), None);
    });
    let mut planted: Vec<Vec<(View, Pa)>> = Vec::new();
    let mut dice = 1_u64;
    let mut roll = |sides: u64| {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (dice >> 33) % sides
    };
    let (mut inserts, mut removes) = (0, 0);
    while inserts + removes < 10_000 {
        let room = planted.len() as u64;
        if roll(20) >= room {
            let batch: Vec<_> = (0..=roll(3)).map(|_| (View(1 + roll(2) as u16), Gfn(roll(8)).pa(roll(4) * 1365))).collect();
            let pages: Vec<_> = batch.iter().map(|(view, pa)| (*view, pa.gfn())).collect();
            if roll(2) == 0 {
                lab.c.monitor_many(&mut lab.vmi, &pages).unwrap();
                lab.c.insert_many(&mut lab.vmi, &batch).unwrap();
                lab.c.unmonitor_many(&mut lab.vmi, &pages).unwrap();
            } else {
                lab.c.insert_many(&mut lab.vmi, &batch).unwrap();
            }
            planted.push(batch);
            inserts += 1;
        } else {
            let batch = planted.swap_remove(roll(room) as usize);
            lab.c.remove_many(&mut lab.vmi, &batch).unwrap();
            removes += 1;
        }
    }
    assert!(lab.driver().inner().peek(Pa(0), 0x8000) == memory, "the guest's own memory was written");
    assert!(inserts > 4_500 && removes > 4_500 && looks.load(Ordering::Relaxed) > 20_000, "{inserts} {removes} {looks:?}");
}
