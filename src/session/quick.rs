//! Hits that need no event: counted where the driver stands, with filters that need registers alone, or handed out from there.

use std::time::{Duration, Instant};

use crate::addr::MemoryAccess;
use crate::capture::Scene;
use crate::driver::{OnTrap, Trap, VmiDriver, Wait};
use crate::error::Result;
use crate::event::EventReason;

use super::Session;
use super::pending::{Course, Met, Pending};

/// So many events go the usual way after one that must: more of those come, and it is not to be found out each time.
const USUAL: u32 = 15;

impl<D: VmiDriver + ?Sized> Session<D> {
    /// Waits for the next event. Hits of taps that are only counted are none, but for the one at which `stop_at` is reached; of a hit that
    /// is only handed out there is [`Wait::Taken`], and it is in `self.pending`.
    #[expect(clippy::inline_always, reason = "as `Session::poll`")]
    #[inline(always)]
    pub(super) fn wait(&mut self, timeout: Duration, stop_at: Option<u64>) -> Result<Wait> {
        let Self {
            vmi,
            manager,
            tables,
            taps,
            vcpus,
            owners,
            sampler,
            stats,
            returns,
            spent,
            usual,
            began,
            holds,
            flight,
            judged,
            pending,
            spare,
            ..
        } = self;
        *usual = usual.saturating_sub(1);
        if *usual > 0 || returns.are_awaited() || !spent.is_empty() || flight.is_some() {
            return vmi.driver_mut().wait(timeout);
        }
        let clock = || began.elapsed().as_nanos() as u64;
        vmi.driver_mut().wait_sorting(timeout, &mut |trap: &Trap<'_>| {
            let Some(vcpu) = vcpus.get_mut(usize::from(trap.vcpu.0)) else { return OnTrap::Raise };
            // Something is to be done first.
            let has_stored = vcpu.after_write.is_some() || vcpu.unfinished.is_some();
            if has_stored || vcpu.walk.is_some() || tables.is_dirty(Some(trap.vcpu)) {
                return OnTrap::Raise;
            }
            let since = sampler.is_due().then(Instant::now);
            let pa = trap.gfn.pa(trap.rip.0);
            owners.clear();
            manager.for_each_at(trap.view, pa, trap.rip, trap.root, |owner, ()| owners.push(owner.tap()));
            if let [id] = *owners.as_slice()
                && let Some(tap) = taps.only_handed(id)
            {
                tap.hits += 1;
                stats.hits += 1;
                stats.events += 1;
                judged.clear();
                sampler.in_hand = None;
                let met = Met {
                    vcpu: trap.vcpu,
                    view: Some(trap.view),
                    home: vcpu.moved.take().unwrap_or(trap.view),
                    reason: EventReason::Breakpoint { gfn: trap.gfn, insn_len: 1 },
                    va: trap.rip,
                    pa,
                    access: MemoryAccess::X,
                    step: 0,
                    course: Course::StepClean,
                };
                let mut place = spare.take().unwrap_or_else(|| Box::new(Pending::place()));
                place.begin(&met, since.unwrap_or_else(Instant::now), owners, |registers| trap.registers.read(registers));
                place.hand_out();
                *pending = Some(place);
                return OnTrap::Take;
            }
            if owners.is_empty() || !owners.iter().all(|id| taps.is_only_counted(*id)) {
                *usual = USUAL;
                return OnTrap::Raise;
            }
            if stop_at.is_some_and(|stop_at| stats.hits + owners.len() as u64 >= stop_at) {
                return OnTrap::Raise;
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
            OnTrap::StepOver
        })
    }
}
