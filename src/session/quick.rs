//! Hits that nobody looks at but a filter that needs registers alone: counted where the driver stands, before there is an event.

use std::time::{Duration, Instant};

use crate::capture::Scene;
use crate::driver::{Trap, VmiDriver, Wait};
use crate::error::Result;

use super::Session;

/// So many events go the usual way after one that somebody looks at: more of those come, and it is not to be found out each time.
const USUAL: u32 = 15;

impl<D: VmiDriver + ?Sized> Session<D> {
    /// Waits for the next event. Hits of taps that are only counted are none, but for the one at which `stop_at` is reached.
    pub(super) fn wait(&mut self, timeout: Duration, stop_at: Option<u64>) -> Result<Wait> {
        let Self {
            vmi, manager, tables, taps, vcpus, owners, sampler, stats, returns, spent, usual, began, holds, flight, ..
        } = self;
        *usual = usual.saturating_sub(1);
        if *usual > 0 || returns.are_awaited() || !spent.is_empty() || flight.is_some() {
            return vmi.driver_mut().wait(timeout);
        }
        let clock = || began.elapsed().as_nanos() as u64;
        vmi.driver_mut().wait_counting(timeout, &mut |trap: &Trap<'_>| {
            let Some(vcpu) = vcpus.get_mut(usize::from(trap.vcpu.0)) else { return false };
            // Something is to be done first.
            if vcpu.after_write.is_some() || vcpu.walk.is_some() || tables.is_dirty(Some(trap.vcpu)) {
                return false;
            }
            let since = sampler.is_due().then(Instant::now);
            owners.clear();
            manager.for_each_at(trap.view, trap.gfn.pa(trap.rip.0), trap.rip, trap.root, |tap, ()| owners.push(*tap));
            if owners.is_empty() || !owners.iter().all(|id| taps.is_only_counted(*id)) {
                *usual = USUAL;
                return false;
            }
            if stop_at.is_some_and(|stop_at| stats.hits + owners.len() as u64 >= stop_at) {
                return false;
            }
            // Those that the filters keep back stood for nothing.
            owners.retain(|id| {
                if let Some(filter) = taps.filter_mut(*id) {
                    let registers = trap.registers.into();
                    let scene = Scene::<D> { vmi: None, registers, vcpu: trap.vcpu, va: trap.rip, clock: &clock };
                    if !filter.passes(*id, &scene) {
                        stats.filtered += 1;
                        return false;
                    }
                }
                if let Some(tap) = taps.get_mut(*id) {
                    tap.hits += 1;
                }
                stats.hits += 1;
                true
            });
            stats.events += 1;
            if let Some(since) = since {
                let (times, held) = (sampler.restart(), since.elapsed().as_nanos() as u64);
                for id in &*owners {
                    holds.add_times(held, times);
                    taps.add_hold(*id, held, times);
                }
            } else {
                sampler.pass();
            }
            vcpu.home = Some(trap.view);
            true
        })
    }
}
