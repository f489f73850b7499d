//! Cost of finding out whose an event is, and of the bookkeeping of one breakpoint more among many.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing, reason = "a benchmark that cannot go on panics")]

mod common;
#[path = "common/nothing.rs"]
mod nothing;

use std::hint::black_box;
use std::num::NonZeroU32;

use common::CpuTime;
use criterion::{BatchSize, BenchmarkGroup, Criterion, criterion_group, criterion_main};
use nothing::Nothing;
use vmitap::arch::amd64::AddressContext;
use vmitap::core::VmiCore;
use vmitap::driver::mock::{CallKind, MockDriver};
use vmitap::driver::{Caps, VmiInfo, VmiViews};
use vmitap::tap::{Breakpoint, BreakpointController, BreakpointManager};
use vmitap::{MemoryAccess, Pa, Va, View};

type Manager = BreakpointManager<NonZeroU32, ()>;
type Placed = (Breakpoint<NonZeroU32, ()>, Pa);

const VIEW: View = View(1);
const ROOT: Pa = Pa(0x1000);
/// Has a value to spare, as the session's own has.
const KEY: NonZeroU32 = NonZeroU32::MIN.saturating_add(6);

/// Four a page.
fn point(index: u64) -> Placed {
    let (va, pa) = (Va(0xffff_8000_0000_0000 + index * 1024), Pa(0x10_0000 + index * 1024));
    (Breakpoint { view: VIEW, va, context: AddressContext::new(ROOT), key: KEY, tag: (), global: true }, pa)
}

/// Four a page, hit under one root.
fn of_one_root(index: u64) -> Placed {
    let (breakpoint, pa) = point(index);
    (Breakpoint { global: false, ..breakpoint }, pa)
}

/// Sixteen a page.
fn close_together(index: u64) -> Placed {
    let (breakpoint, _) = point(0);
    (Breakpoint { va: Va(breakpoint.va.0 + index * 256), ..breakpoint }, Pa(0x10_0000 + index * 256))
}

fn filled(vmi: &mut VmiCore<MockDriver>, count: u64, point: impl Fn(u64) -> Placed) -> Manager {
    let mut manager = BreakpointManager::new();
    for index in 0..count {
        let (breakpoint, pa) = point(index);
        manager.insert_with_hint(vmi, &mut Nothing, breakpoint, Some(pa)).unwrap();
    }
    manager
}

/// Something that depends on every owner.
#[inline]
fn hit(manager: &Manager, (breakpoint, pa): Placed) -> u32 {
    let mut sum = 0;
    manager.for_each_at(VIEW, pa, breakpoint.va, ROOT, |key, ()| sum += key.get()) as u32 + sum
}

/// Places all over, the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, count: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % count
    }
}

/// What the machine itself takes to come to 16 bytes of so many times 16: no table can have an address and an owner in less. Nothing is
/// looked for here, and nothing compared.
fn bare(group: &mut BenchmarkGroup<'_, CpuTime>, count: u64) {
    let table: Vec<[u64; 2]> = (0..count).map(|index| [index, !index]).collect();
    let mut at = Random(0);
    group.bench_function("bare accesses all over", |b| b.iter(|| black_box(table[at.below(count) as usize])));
}

fn all_over(group: &mut BenchmarkGroup<'_, CpuTime>, name: &str, manager: &Manager, count: u64, point: impl Fn(u64) -> Placed) {
    let mut at = Random(0);
    group.bench_function(name, |b| {
        b.iter(|| hit(manager, point(black_box(at.below(count)))));
    });
}

fn lookup(c: &mut Criterion<CpuTime>) {
    for count in [256, 1_000_000] {
        let mut vmi = VmiCore::new(Box::new(MockDriver::new(0x1000, 1)));
        let manager = filled(&mut vmi, count, point);
        let mut group = c.benchmark_group(format!("lookup/{count} breakpoints"));
        bare(&mut group, count);
        let find = |index| hit(&manager, point(index));
        group.bench_function("the same hit", |b| b.iter(|| find(black_box(count / 2))));
        all_over(&mut group, "hits all over", &manager, count, point);
        // The processor looks several up at once where it can; here each waits for the one before, as hits of one vCPU do.
        let mut at = Random(0);
        group.bench_function("hits all over, each after the last", |b| {
            b.iter(|| at.0 += u64::from(find(black_box(at.below(count)))));
        });
        group.bench_function("nobody's", |b| b.iter(|| find(black_box(count + 5))));
        all_over(&mut group, "hits all over, each of one root", &filled(&mut vmi, count, of_one_root), count, of_one_root);
        all_over(&mut group, "hits all over, sixteen a page", &filled(&mut vmi, count, close_together), count, close_together);
        let mut manager = manager;
        group.bench_function("insert and remove", |b| {
            b.iter_batched(
                || point(count + 9),
                |(breakpoint, pa)| {
                    manager.insert_with_hint(&mut vmi, &mut Nothing, breakpoint, Some(pa)).unwrap();
                    manager.remove(&mut vmi, &mut Nothing, VIEW, breakpoint.va, ROOT, &KEY).unwrap()
                },
                BatchSize::SmallInput,
            );
        });
        let (breakpoint, pa) = point(count / 2);
        group.bench_function("page out and page in", |b| {
            b.iter(|| {
                let out = manager.page_out(&mut vmi, &mut Nothing, black_box(breakpoint.va), ROOT).unwrap();
                out + manager.page_in(&mut vmi, &mut Nothing, breakpoint.va, ROOT, pa).unwrap()
            });
        });
        // Fifteen more owners at the same address.
        for key in (100..115).filter_map(NonZeroU32::new) {
            manager.insert_with_hint(&mut vmi, &mut Nothing, Breakpoint { key, ..breakpoint }, Some(pa)).unwrap();
        }
        group.bench_function("a hit of sixteen owners", |b| {
            b.iter(|| hit(&manager, (breakpoint, black_box(pa))));
        });
        group.finish();
    }
}

/// The calls of a driver that many breakpoints at once cost, with and without a call for the rights of many pages. They are the same in
/// each run, and not timed.
fn bulk(_: &mut Criterion<CpuTime>) {
    const PAGES: u64 = 15_000;
    for multi_access in [true, false] {
        let mut driver = MockDriver::new((PAGES + 1) << 12, 1);
        let view = driver.create_view(MemoryAccess::RWX).unwrap();
        driver.set_caps(Caps { multi_access, ..driver.caps() });
        let mut vmi = VmiCore::new(Box::new(driver));
        let points = (0..4 * PAGES).map(|n| {
            let pa = Pa((n % PAGES) << 12 | (n / PAGES) << 8);
            (Breakpoint { view, va: Va(pa.0), context: AddressContext::new(ROOT), key: KEY, tag: (), global: true }, Some(pa))
        });
        let mut manager = BreakpointManager::new();
        manager.insert_many_with_hints(&mut vmi, &mut BreakpointController::new(), points.collect()).unwrap();
        let count = |kind| vmi.driver().count_of(kind);
        println!(
            "bulk/60,000 breakpoints on 15,000 pages, {} one call for many rights: {} remaps, {} calls that set rights, {} for frames",
            if multi_access { "with" } else { "without" },
            count(CallKind::Remap),
            count(CallKind::SetMemoryAccess) + count(CallKind::SetMemoryAccessMulti),
            count(CallKind::AllocateFrames),
        );
    }
}

criterion_group!(name = benches; config = common::criterion(); targets = lookup, bulk);
criterion_main!(benches);
