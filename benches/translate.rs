//! Cost of a translation: remembered, walked anew, and the bare walk as an emulator's TLB fill does it.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing, reason = "a benchmark that cannot go on panics")]

mod common;

use std::hint::black_box;

use common::CpuTime;
use criterion::{Criterion, criterion_group, criterion_main};
use vmitap::arch::amd64::{pte, walk};
use vmitap::core::VmiCore;
use vmitap::driver::mock::{MockDriver, PageSize};
use vmitap::{Pa, Va};

const VA: Va = Va(0xffff_8000_0040_0123);

fn translate(c: &mut Criterion<CpuTime>) {
    for levels in [4, 5] {
        let mut driver = MockDriver::new(1 << 20, 1);
        let context = driver.new_root(levels).unwrap();
        driver.map(context, VA, Pa(0x3000), PageSize::Size4K, pte::P | pte::W).unwrap();
        let memory = driver.peek(Pa(0), 1 << 20).unwrap();
        let (words, _) = memory.as_chunks::<8>();
        let vm = VmiCore::new(Box::new(driver));
        let mut group = c.benchmark_group(format!("translate/{levels} levels"));
        group.bench_function("cached", |b| b.iter(|| vm.translate(black_box(VA), context)));
        group.bench_function("uncached", |b| {
            b.iter(|| {
                vm.invalidate();
                vm.translate(black_box(VA), context)
            });
        });
        group.bench_function("bare walk", |b| {
            b.iter(|| {
                let read = |pa: Pa| words.get((pa.0 / 8) as usize).map(|word| u64::from_le_bytes(*word));
                walk(context.root, black_box(VA), levels, true, read).map(|found| (found.pa, found.writable))
            });
        });
        group.bench_function("read a u64, cached", |b| b.iter(|| vm.read_u64(black_box(VA), context)));
        group.finish();
    }
}

criterion_group!(name = benches; config = common::criterion(); targets = translate);
criterion_main!(benches);
