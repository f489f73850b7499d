//! The page-table monitor on its own, on the mock driver: what is watched, what is told, and what a failing call leaves behind.

use parking_lot::MutexGuard;
use vmitap::arch::amd64::{AddressContext, pte};
use vmitap::core::VmiCore;
use vmitap::driver::mock::{MockDriver, PageSize};
use vmitap::driver::{Caps, VmiInfo, VmiViews};
use vmitap::error::TranslationFault;
use vmitap::ptm::{PageTableEvent, PageTableMonitor};
use vmitap::tap::Rights;
use vmitap::{Gfn, MemoryAccess, PAGE_SIZE, Pa, Va, VcpuId, View, VmiError};

use super::harness::{Faulty, World, each_call_failing};

const VA: Va = Va(0x40_0000_1234);
const PA: Pa = Pa(0x5234);
const FLAGS: u64 = pte::P | pte::W | pte::U;
const FIRST: Option<VcpuId> = Some(VcpuId(0));
const SECOND: Option<VcpuId> = Some(VcpuId(1));

struct Lab {
    vmi: VmiCore<Faulty<MockDriver>>,
    rights: Rights,
    monitor: PageTableMonitor,
    context: AddressContext,
    view: View,
}

impl Lab {
    fn new(levels: u8) -> Self {
        Self::with(levels, 0x40_0000)
    }

    fn with(levels: u8, memory: u64) -> Self {
        let mut driver = MockDriver::new(memory, 2);
        let context = driver.new_root(levels).unwrap();
        let mut driver = Faulty::new(driver);
        let view = driver.create_view(MemoryAccess::RWX).unwrap();
        let monitor = PageTableMonitor::new(&[view]);
        Self { vmi: VmiCore::new(Box::new(driver)), rights: Rights::new(), monitor, context, view }
    }

    fn mapped(levels: u8) -> Self {
        let lab = Self::new(levels);
        lab.map(VA, PA, PageSize::Size4K);
        lab
    }

    fn driver(&self) -> MutexGuard<'_, MockDriver> {
        self.vmi.driver().inner()
    }

    fn create_view(&mut self) -> View {
        self.vmi.driver_mut().create_view(MemoryAccess::RWX).unwrap()
    }

    fn map(&self, va: Va, pa: Pa, size: PageSize) {
        let context = self.context;
        self.driver().map(context, va, pa, size, FLAGS).unwrap();
    }

    fn entry(&self, va: Va, level: u8) -> Pa {
        self.driver().entry(self.context, va, level).unwrap()
    }

    fn put(&self, entry: Pa, value: u64) {
        self.driver().poke(entry, &value.to_le_bytes()).unwrap();
    }

    fn monitor(&mut self, va: Va) -> vmitap::Result<Option<Pa>> {
        self.monitor.monitor(&mut self.vmi, &mut self.rights, va, self.context)
    }

    fn unmonitor(&mut self, va: Va) -> vmitap::Result<bool> {
        self.monitor.unmonitor(&mut self.vmi, &mut self.rights, va, self.context)
    }

    /// A store of a vCPU to an entry, from its denial until it is done.
    fn store(&mut self, entry: Pa, value: u64) -> Vec<PageTableEvent> {
        self.monitor.mark_dirty(FIRST, entry.gfn());
        self.put(entry, value);
        self.process(FIRST).unwrap()
    }

    fn process(&mut self, vcpu: Option<VcpuId>) -> vmitap::Result<Vec<PageTableEvent>> {
        let mut events = Vec::new();
        self.monitor.process(&mut self.vmi, &mut self.rights, vcpu, &mut events).map(|()| events)
    }

    fn watched(&self) -> Vec<Gfn> {
        let view = &self.driver().snapshot().views[&self.view];
        let denied = |access: MemoryAccess| access == MemoryAccess::RX;
        view.pages.iter().filter(|(_, access)| denied(**access)).map(|(gfn, _)| *gfn).collect()
    }

    /// The tables that are looked at to find an address, down to `level`.
    fn tables(&self, va: Va, level: u8) -> Vec<Gfn> {
        let mut tables: Vec<Gfn> = (level..=self.context.levels).map(|level| self.entry(va, level).gfn()).collect();
        tables.sort_unstable();
        tables.dedup();
        tables
    }

    fn at(&self, va: Va) -> (Va, AddressContext) {
        (va, self.context)
    }
}

fn page_in((va, context): (Va, AddressContext), pa: Pa) -> PageTableEvent {
    PageTableEvent::PageIn { va, context, pa }
}

fn page_out((va, context): (Va, AddressContext), pa: Pa) -> PageTableEvent {
    PageTableEvent::PageOut { va, context, pa }
}

#[test]
fn exactly_the_tables_on_the_way_are_watched_and_get_back_the_access_that_was_found() {
    for levels in [4, 5] {
        for (size, level) in [(PageSize::Size4K, 1), (PageSize::Size2M, 2), (PageSize::Size1G, 3)] {
            let mut lab = Lab::new(levels);
            lab.map(VA, Pa(0), size);
            let root = lab.context.root.gfn();
            let view = lab.view;
            // Somebody else has taken X there.
            lab.rights.deny(&mut lab.vmi, root, view, MemoryAccess::X).unwrap();
            let before = lab.driver().snapshot();
            let pa = Pa(VA.0 & (size.bytes() - 1));
            assert_eq!(lab.monitor(VA).unwrap(), Some(pa));
            let mut expected = lab.tables(VA, level);
            assert_eq!(lab.monitor.tables(), expected.len());
            expected.retain(|gfn| *gfn != root);
            assert_eq!(lab.watched(), expected);
            assert_eq!(lab.rights.denied(root, view), MemoryAccess::WX);
            assert!(lab.monitor.watches(view, root) && !lab.monitor.watches(View::DEFAULT, root));
            // A second one on the page, and the same once more, make no call.
            lab.driver().take_calls();
            assert_eq!(lab.monitor(Va(VA.0 + 1)).unwrap(), Some(Pa(pa.0 + 1)));
            assert_eq!(lab.monitor(VA).unwrap(), Some(pa));
            assert!(lab.driver().calls().is_empty());
            assert_eq!((lab.monitor.len(), lab.monitor.is_empty()), (2, false));
            for va in [VA, Va(VA.0 + 1)] {
                assert!(lab.unmonitor(va).unwrap());
                assert!(lab.monitor.tables() > 0);
            }
            assert!(lab.unmonitor(VA).unwrap() && !lab.unmonitor(VA).unwrap());
            assert_eq!(lab.driver().snapshot().differences(&before), [] as [String; 0]);
            assert!(lab.monitor.is_empty() && lab.monitor.tables() == 0);
        }
    }
}

#[test]
fn the_tables_that_come_are_watched_and_those_that_go_no_longer() {
    let mut lab = Lab::new(4);
    assert_eq!(lab.monitor(VA).unwrap(), None);
    assert_eq!(lab.watched(), [lab.context.root.gfn()]);
    // From the top down: each table is watched once it is there, and only the last store maps the page.
    lab.map(VA, PA, PageSize::Size4K);
    let entries: Vec<Pa> = (1..=4).rev().map(|level| lab.entry(VA, level)).collect();
    let values: Vec<u64> = entries.iter().map(|entry| lab.vmi.read_pa_u64(*entry).unwrap()).collect();
    for entry in &entries {
        lab.put(*entry, 0);
    }
    for (index, (entry, value)) in entries.iter().zip(&values).enumerate() {
        let expected = if index == 3 { vec![page_in(lab.at(VA), PA)] } else { Vec::new() };
        assert_eq!(lab.store(*entry, *value), expected);
        assert_eq!(lab.monitor.tables(), (index + 2).min(4));
    }
    assert_eq!(lab.watched(), lab.tables(VA, 1));
    assert_eq!(lab.monitor.mapped(VA, lab.context), Some(PA));
    // The middle goes: what is below is no table of ours any more.
    assert_eq!(lab.store(entries[1], 0), [page_out(lab.at(VA), PA)]);
    assert_eq!(lab.watched().len(), 2);
    // A large page comes in its place, then the tables again.
    assert_eq!(lab.store(entries[1], pte::PS | FLAGS), [page_in(lab.at(VA), Pa(0x1234))]);
    let back = [page_out(lab.at(VA), Pa(0x1234)), page_in(lab.at(VA), PA)];
    assert_eq!(lab.store(entries[1], values[1]), back);
    assert_eq!(lab.watched(), lab.tables(VA, 1));
}

#[test]
fn a_change_of_the_frame_is_a_page_out_and_then_a_page_in_for_each_address_and_other_changes_are_nothing() {
    let mut lab = Lab::mapped(4);
    let (second, unwatched) = (Va(VA.0 + 8), Va(VA.0 + PAGE_SIZE));
    lab.map(unwatched, Pa(0x6000), PageSize::Size4K);
    lab.monitor(second).unwrap();
    lab.monitor(VA).unwrap();
    let entry = lab.entry(VA, 1);
    let to = |offset: u64| Pa(0x7000 + offset);
    let expected = [
        page_out(lab.at(VA), PA),
        page_in(lab.at(VA), to(0x234)),
        page_out(lab.at(second), Pa(PA.0 + 8)),
        page_in(lab.at(second), to(0x23c)),
    ];
    assert_eq!(lab.store(entry, to(0).0 | FLAGS), expected);
    for flags in [FLAGS | pte::A, FLAGS | pte::A | pte::D, pte::P, pte::P | pte::NX, FLAGS | pte::G | pte::PS] {
        assert_eq!(lab.store(entry, to(0).0 | flags), [], "{flags:#x}");
    }
    let next = lab.entry(unwatched, 1);
    assert_eq!(lab.store(next, 0), []);
    // Accessed and dirty bits do not even cost a look at the tables: the page is compared, and that is all.
    lab.driver().record_reads(true);
    lab.driver().take_calls();
    lab.store(entry, to(0).0 | FLAGS | pte::G | pte::PS | pte::A | pte::D);
    assert_eq!(lab.driver().calls().len(), 1, "{:?}", lab.driver().calls());
}

#[test]
fn only_the_vcpu_whose_store_is_done_is_looked_at() {
    let mut lab = Lab::mapped(4);
    let far = Va(VA.0 + (1 << 21));
    lab.map(far, Pa(0x6234), PageSize::Size4K);
    lab.monitor(VA).unwrap();
    lab.monitor(far).unwrap();
    let (near, other) = (lab.entry(VA, 1), lab.entry(far, 1));
    lab.monitor.mark_dirty(FIRST, near.gfn());
    lab.monitor.mark_dirty(SECOND, other.gfn());
    // Both have happened, but of the second it is not known yet.
    lab.put(near, 0);
    lab.put(other, 0);
    assert!(lab.monitor.is_dirty(FIRST) && lab.monitor.is_dirty(SECOND) && !lab.monitor.is_dirty(None));
    assert_eq!(lab.process(None).unwrap(), []);
    assert_eq!(lab.process(FIRST).unwrap(), [page_out(lab.at(VA), PA)]);
    assert_eq!(lab.process(FIRST).unwrap(), []);
    assert_eq!(lab.process(SECOND).unwrap(), [page_out(lab.at(far), Pa(0x6234))]);
    // A store that is not done when its table is looked at for another's sake is not lost.
    lab.monitor.mark_dirty(FIRST, near.gfn());
    lab.monitor.mark_dirty(SECOND, near.gfn());
    lab.put(near, 0x7000 | FLAGS);
    assert_eq!(lab.process(FIRST).unwrap().len(), 1);
    lab.put(near, 0x8000 | FLAGS);
    assert_eq!(lab.process(SECOND).unwrap(), [page_out(lab.at(VA), Pa(0x7234)), page_in(lab.at(VA), Pa(0x8234))]);
    // What no vCPU stored is looked at with any of them.
    lab.put(near, 0);
    lab.monitor.mark_all_dirty(None);
    assert_eq!(lab.process(SECOND).unwrap(), [page_out(lab.at(VA), Pa(0x8234))]);
}

#[test]
fn hostile_tables_are_followed_no_further_than_there_are_levels() {
    for levels in [4, 5] {
        let mut lab = Lab::new(levels);
        let root = lab.context.root;
        // Every entry of the root is the root: the page is the root itself.
        for index in 0..512 {
            lab.put(root.checked_add(index * 8).unwrap(), root.0 | FLAGS);
        }
        assert_eq!(lab.monitor(VA).unwrap(), Some(Pa(root.0 + 0x234)));
        assert_eq!(lab.watched(), [root.gfn()]);
        let entry = Pa(root.0 + 8 * ((VA.0 >> 12) & 511));
        assert_eq!(lab.store(entry, 0), [page_out(lab.at(VA), Pa(root.0 + 0x234))]);
        // Beyond memory, reserved bits: not mapped, and back.
        assert_eq!(lab.store(entry, 1 << 40 | FLAGS), []);
        assert_eq!(lab.store(entry, root.0 | FLAGS), [page_in(lab.at(VA), Pa(root.0 + 0x234))]);
        assert_eq!(lab.store(root, pte::PS | FLAGS), [page_out(lab.at(VA), Pa(root.0 + 0x234))]);
        assert!(lab.unmonitor(VA).unwrap());
        assert_eq!(lab.watched(), []);
    }
}

#[test]
fn what_can_be_no_mapping_is_refused_at_first_and_nothing_is_watched() {
    let mut lab = Lab::mapped(4);
    let before = lab.driver().snapshot();
    let fault = |result: vmitap::Result<Option<Pa>>| match result {
        Err(VmiError::Translation { fault, .. }) => fault,
        other => panic!("{other:?}"),
    };
    assert_eq!(fault(lab.monitor(Va(1 << 47))), TranslationFault::NonCanonical);
    let entry = lab.entry(VA, 1);
    lab.put(entry, 1 << 40 | FLAGS);
    assert!(matches!(fault(lab.monitor(VA)), TranslationFault::BeyondMemory { level: 0, .. }));
    let entry = lab.entry(VA, 4);
    let good = lab.vmi.read_pa_u64(entry).unwrap();
    lab.put(entry, good | pte::PS);
    assert!(matches!(fault(lab.monitor(VA)), TranslationFault::ReservedBit { level: 4, .. }));
    lab.put(entry, 1 << 40 | FLAGS);
    assert!(matches!(fault(lab.monitor(VA)), TranslationFault::BeyondMemory { level: 3, .. }));
    let far = AddressContext::new(Pa(1 << 40));
    let refused = lab.monitor.monitor(&mut lab.vmi, &mut lab.rights, VA, far);
    assert!(matches!(fault(refused), TranslationFault::BeyondMemory { level: 4, .. }));
    assert_eq!(lab.driver().snapshot().views, before.views);
    assert!(lab.monitor.is_empty() && lab.monitor.tables() == 0 && lab.rights.is_empty());
    // Once the page is monitored it is the same.
    lab.put(entry, good);
    let leaf = lab.entry(VA, 1);
    lab.put(leaf, 0);
    lab.monitor(VA).unwrap();
    lab.store(leaf, 1 << 40 | FLAGS);
    assert!(matches!(fault(lab.monitor(Va(VA.0 + 1))), TranslationFault::BeyondMemory { level: 0, .. }));
}

#[test]
fn roots_that_share_tables_are_told_each_and_share_the_watch() {
    let mut lab = Lab::mapped(4);
    let first = lab.context;
    let top = lab.vmi.read_pa_u64(lab.entry(VA, 4)).unwrap();
    let second = lab.driver().new_root(4).unwrap();
    lab.put(second.root, top);
    lab.monitor(VA).unwrap();
    lab.context = second;
    assert_eq!(lab.monitor(VA).unwrap(), Some(PA));
    assert_eq!(lab.monitor.tables(), 5);
    let leaf = lab.entry(VA, 1);
    assert_eq!(lab.store(leaf, 0), [page_out((VA, first), PA), page_out((VA, second), PA)]);
    assert_eq!(lab.store(leaf, PA.page().0 | FLAGS), [page_in((VA, first), PA), page_in((VA, second), PA)]);
    assert_eq!(lab.store(second.root, 0), [page_out((VA, second), PA)]);
    assert_eq!(lab.watched().len(), 5);
    assert!(lab.unmonitor(VA).unwrap());
    assert_eq!(lab.watched().len(), 4);
}

#[test]
fn a_view_that_comes_is_watched_too_and_one_that_goes_no_longer() {
    let mut lab = Lab::mapped(4);
    lab.monitor(VA).unwrap();
    let second = lab.create_view();
    let before = lab.driver().snapshot();
    lab.monitor.add_view(&mut lab.vmi, &mut lab.rights, second).unwrap();
    lab.monitor.add_view(&mut lab.vmi, &mut lab.rights, second).unwrap();
    assert_eq!(lab.monitor.views(), [lab.view, second]);
    let views = lab.driver().snapshot().views;
    assert_eq!(views[&second], views[&lab.view]);
    // A table that comes later is watched in both.
    let leaf = lab.entry(VA, 2);
    lab.store(leaf, 0);
    lab.map(VA, PA, PageSize::Size4K);
    lab.monitor.mark_all_dirty(None);
    assert_eq!(lab.process(None).unwrap().len(), 1);
    let views = lab.driver().snapshot().views;
    assert_eq!((views[&second].pages.len(), &views[&second]), (4, &views[&lab.view]));
    lab.monitor.remove_view(&mut lab.vmi, &mut lab.rights, second).unwrap();
    lab.monitor.remove_view(&mut lab.vmi, &mut lab.rights, second).unwrap();
    assert_eq!(lab.driver().snapshot().views[&second], before.views[&second]);
    assert!(!lab.monitor.watches(second, lab.context.root.gfn()));
    lab.monitor.clear(&mut lab.vmi, &mut lab.rights).unwrap();
    assert!(lab.rights.is_empty() && lab.watched().is_empty() && lab.monitor.is_empty());
}

impl World for Lab {
    type Driver = MockDriver;

    fn driver(&self) -> Faulty<MockDriver> {
        self.vmi.driver().clone()
    }

    fn books(&self) -> Vec<String> {
        let mut tables: Vec<Gfn> = self.monitor.watched_tables().collect();
        tables.sort_unstable();
        let denied = |view: View| tables.iter().map(|gfn| self.rights.denied(*gfn, view)).collect::<Vec<_>>();
        let denied: Vec<_> = [1, 2, 3].map(|view| denied(View(view))).into();
        let mapped = ALL.map(|va| self.monitor.mapped(va, self.context));
        let dirty = [None, FIRST, SECOND].map(|vcpu| self.monitor.is_dirty(vcpu));
        vec![
            format!("{} {} {:?} {mapped:?} {dirty:?}", self.monitor.len(), self.monitor.is_empty(), self.monitor.views()),
            format!("{tables:?} {denied:?} {}", self.rights.len()),
        ]
    }
}

/// On a page, another on it, the next page, and one that no table is there for.
const ALL: [Va; 4] = [VA, Va(VA.0 + 8), Va(VA.0 + PAGE_SIZE), Va(VA.0 + (1 << 30))];

/// With or without one call for many pages.
fn set_multi_access(lab: &Lab, multi_access: bool) {
    let caps = Caps { multi_access, ..lab.driver().caps() };
    lab.driver().set_caps(caps);
}

/// Two views, in the second of which the leaf table is not executable by somebody else's doing; nothing is monitored.
fn idle() -> Lab {
    let mut lab = Lab::with(4, 0x20000);
    for (va, pa) in [(VA, PA), (ALL[2], Pa(0x6234))] {
        lab.map(va, pa, PageSize::Size4K);
    }
    let second = lab.create_view();
    lab.monitor.add_view(&mut lab.vmi, &mut lab.rights, second).unwrap();
    let leaf = lab.entry(VA, 1).gfn();
    lab.rights.deny(&mut lab.vmi, leaf, second, MemoryAccess::X).unwrap();
    lab
}

/// The same, with one address monitored.
fn one() -> Lab {
    let mut lab = idle();
    lab.monitor(VA).unwrap();
    lab
}

/// The same, with another beside it that needs the upper tables.
fn two() -> Lab {
    let mut lab = one();
    lab.monitor(ALL[3]).unwrap();
    lab
}

/// The same, with everything monitored, and one address twice.
fn monitored() -> Lab {
    let mut lab = idle();
    for va in [ALL[0], ALL[1], ALL[1], ALL[2], ALL[3]] {
        lab.monitor(va).unwrap();
    }
    lab
}

/// The same, with a third view, in which nothing is watched.
fn with_third() -> Lab {
    let mut lab = monitored();
    assert_eq!(lab.create_view(), View(3));
    lab
}

type Operation = (fn() -> Lab, fn(&mut Lab) -> vmitap::Result<()>, usize);

#[test]
fn every_operation_is_whole_or_not_at_all_whichever_call_fails() {
    // On what, the operation, and how many calls it has at least.
    let operations: [Operation; 7] = [
        (idle, |lab| lab.monitor(VA).map(drop), 20),
        (idle, |lab| lab.monitor(ALL[3]).map(drop), 7),
        (one, |lab| lab.monitor(ALL[3]).map(drop), 2),
        (one, |lab| lab.unmonitor(VA).map(drop), 2),
        (two, |lab| lab.unmonitor(VA).map(drop), 2),
        (with_third, |lab| lab.monitor.add_view(&mut lab.vmi, &mut lab.rights, View(3)), 5),
        (with_third, |lab| lab.monitor.remove_view(&mut lab.vmi, &mut lab.rights, View(2)), 1),
    ];
    for (index, (make, operation, least)) in operations.into_iter().enumerate() {
        for multi_access in [true, false] {
            let make = || {
                let lab = make();
                set_multi_access(&lab, multi_access);
                lab
            };
            let calls = each_call_failing(make, operation);
            assert!(calls >= least, "operation {index}: {calls} calls");
        }
    }
}

#[test]
fn clear_gives_back_what_it_can_says_what_is_left_and_a_retry_does_the_rest() {
    let untouched = {
        let lab = idle();
        World::driver(&lab).seen()
    };
    for n in 1.. {
        let mut lab = monitored();
        set_multi_access(&lab, false);
        let driver = World::driver(&lab);
        let (result, is_through) = driver.failing(n, || lab.monitor.clear(&mut lab.vmi, &mut lab.rights));
        if !is_through {
            assert!(matches!(result, Err(VmiError::UndoFailed { .. })), "call {n}: {result:?}");
            // What is left is monitored as it was.
            assert!(!lab.monitor.is_empty() && lab.monitor.tables() > 0, "call {n}");
            let watched = lab.monitor.watched_tables().all(|gfn| lab.rights.denied(gfn, lab.view) == MemoryAccess::W);
            assert!(watched, "call {n}");
            lab.monitor.clear(&mut lab.vmi, &mut lab.rights).unwrap();
        }
        assert_eq!((lab.monitor.len(), lab.monitor.tables(), lab.rights.len()), (0, 0, 1), "call {n}");
        assert_eq!(driver.seen().differences(&untouched), "", "call {n}");
        if is_through {
            assert!(n > 6, "{n}");
            return result.unwrap();
        }
    }
}

#[test]
fn a_change_that_could_not_be_followed_is_found_out_by_the_next_call() {
    for n in 1.. {
        let mut lab = Lab::with(4, 0x20000);
        lab.map(VA, PA, PageSize::Size4K);
        lab.monitor(VA).unwrap();
        let other = ALL[3];
        lab.map(other, Pa(0x6234), PageSize::Size4K);
        let (from, to) = (lab.entry(VA, 3), lab.entry(other, 3));
        let value = lab.vmi.read_pa_u64(to).unwrap();
        lab.monitor.mark_dirty(FIRST, from.gfn());
        lab.put(from, value);
        let driver = World::driver(&lab);
        let before = (driver.seen(), lab.books());
        let mut events = Vec::new();
        let (result, is_through) = driver.failing(n, || lab.monitor.process(&mut lab.vmi, &mut lab.rights, FIRST, &mut events));
        if !is_through {
            assert!(matches!(result, Err(VmiError::Driver { .. })), "call {n}: {result:?}");
            assert_eq!(events, [], "call {n}");
            assert!(lab.monitor.is_dirty(FIRST));
            assert_eq!(lab.monitor.mapped(VA, lab.context), Some(PA));
            assert_eq!(driver.seen().differences(&before.0), "", "call {n}");
            // But for who has something to look at.
            assert_eq!(lab.books()[1], before.1[1], "call {n}");
            lab.monitor.process(&mut lab.vmi, &mut lab.rights, FIRST, &mut events).unwrap();
        }
        assert_eq!(events, [page_out(lab.at(VA), PA), page_in(lab.at(VA), Pa(0x6234))], "call {n}");
        assert_eq!(lab.watched(), lab.tables(VA, 1), "call {n}");
        if is_through {
            assert!(n > 12, "{n}");
            return result.unwrap();
        }
    }
}

#[test]
fn of_two_changes_the_one_that_could_be_followed_is_told_and_the_other_by_the_next_call() {
    let mut partly = 0;
    for n in 1.. {
        let mut lab = monitored();
        let far = lab.entry(ALL[3], 3);
        let entries = [lab.entry(VA, 1), far];
        for entry in entries {
            lab.monitor.mark_dirty(FIRST, entry.gfn());
        }
        lab.put(entries[0], 0);
        lab.put(entries[1], pte::PS | FLAGS);
        let driver = World::driver(&lab);
        let mut events = Vec::new();
        let (result, is_through) = driver.failing(n, || lab.monitor.process(&mut lab.vmi, &mut lab.rights, FIRST, &mut events));
        if !is_through {
            assert!(matches!(result, Err(VmiError::Driver { .. })), "call {n}: {result:?}");
            partly += usize::from(!events.is_empty());
            lab.monitor.process(&mut lab.vmi, &mut lab.rights, FIRST, &mut events).unwrap();
        }
        events.sort_unstable_by_key(|event| event.address().0);
        let at = |va: Va| lab.at(va);
        let expected = [page_out(at(VA), PA), page_out(at(ALL[1]), Pa(PA.0 + 8)), page_in(at(ALL[3]), Pa(0x1234))];
        assert_eq!(events, expected, "call {n}");
        let mut again = Vec::new();
        lab.monitor.process(&mut lab.vmi, &mut lab.rights, FIRST, &mut again).unwrap();
        assert_eq!(again, [], "call {n}");
        if is_through {
            assert!(n > 5 && partly > 3, "{n} {partly}");
            return result.unwrap();
        }
    }
}
