//! How long vCPUs stand still, and how much of that a tap may cost.

use std::time::Instant;

use crate::driver::VmiDriver;

use super::{Session, TapId, TapKind};

/// The shortest time that has a bucket of its own, as a power of two of nanoseconds.
const LOW: u32 = 6;
/// Times from there on double so often: up to 17 s.
const OCTAVES: usize = 28;
/// Buckets from one doubling to the next.
const PARTS: usize = 4;

/// Times in buckets, each a quarter to a fifth wider than the one before: less than half a KiB for times from 64 ns to 17 s.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Histogram {
    counts: [u32; OCTAVES * PARTS + 1],
    max_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: [0; OCTAVES * PARTS + 1], max_ns: 0 }
    }
}

impl Histogram {
    fn bucket(ns: u64) -> usize {
        let octave = (ns | 1).ilog2();
        if octave < LOW {
            return 0;
        }
        let part = (ns >> (octave - 2)) as usize % PARTS;
        ((octave - LOW) as usize * PARTS + part + 1).min(OCTAVES * PARTS)
    }

    /// The longest time a bucket stands for.
    fn upper(bucket: usize) -> u64 {
        let octave = bucket.saturating_sub(1) / PARTS;
        let part = bucket.saturating_sub(1) % PARTS;
        if bucket == 0 { (1 << LOW) - 1 } else { ((PARTS + part + 1) as u64) << (octave + LOW as usize - 2) }
    }

    /// Counts a time.
    #[inline]
    pub fn add(&mut self, ns: u64) {
        self.add_times(ns, 1);
    }

    /// Counts a time that stands for so many.
    #[inline]
    pub fn add_times(&mut self, ns: u64, times: u32) {
        if let Some(count) = self.counts.get_mut(Self::bucket(ns)) {
            *count = count.saturating_add(times);
        }
        self.max_ns = self.max_ns.max(ns);
    }

    /// How many times were counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().map(|count| u64::from(*count)).sum()
    }

    /// The longest of them, in nanoseconds.
    pub const fn max_ns(&self) -> u64 {
        self.max_ns
    }

    /// The time that this share (0 to 1) of them do not exceed, in nanoseconds, at most a quarter too long; 0 if there are none.
    pub fn quantile_ns(&self, share: f64) -> u64 {
        let count = self.count();
        #[expect(clippy::cast_precision_loss, reason = "a share of a count")]
        let wanted = (share.clamp(0.0, 1.0) * count as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bucket, here) in self.counts.iter().enumerate() {
            seen += u64::from(*here);
            if seen >= wanted {
                return Self::upper(bucket).min(self.max_ns);
            }
        }
        self.max_ns
    }

    /// Those counted since `before` was a copy of this. The longest is then only known as well as the buckets are wide.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let mut new = self.clone();
        for (count, before) in new.counts.iter_mut().zip(&before.counts) {
            *count = count.saturating_sub(*before);
        }
        if let Some(last) = new.counts.iter().rposition(|count| *count > 0) {
            new.max_ns = Self::upper(last).min(self.max_ns);
        } else {
            new.max_ns = 0;
        }
        new
    }
}

/// Of the hits that are only counted, each so many-th is timed and stands for those before it: reading the clock twice costs as much as
/// a fifth of such a hit.
const SAMPLE: u32 = 16;

/// Which hits that are only counted are timed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sampler {
    /// Hits since the last one that was timed.
    untimed: u32,
    /// One was timed before.
    has_begun: bool,
    /// When the one in hand was received, and how many it stands for.
    pub(super) in_hand: Option<(Instant, u32)>,
}

impl Sampler {
    /// Whether the next hit is one that is timed.
    pub(super) const fn is_due(&self) -> bool {
        self.untimed + 1 >= SAMPLE || !self.has_begun
    }

    /// A hit goes by that is not.
    pub(super) const fn pass(&mut self) {
        self.untimed += 1;
    }

    /// A hit goes by that is: how many it stands for.
    pub(super) const fn restart(&mut self) -> u32 {
        let times = self.untimed + 1;
        (self.untimed, self.has_begun) = (0, true);
        times
    }
}

/// How many events a tap may cause in a second, filtered ones included, before it is switched off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Budget {
    per_second: u64,
    /// When this second began, in nanoseconds of the session, and the events in it.
    began_ns: u64,
    events: u64,
    exceeded: bool,
}

impl Budget {
    /// A budget of so many events a second.
    pub const fn new(per_second: u64) -> Self {
        Self { per_second, began_ns: 0, events: 0, exceeded: false }
    }

    /// Whether it was exceeded, which switched the tap off.
    pub const fn is_exceeded(&self) -> bool {
        self.exceeded
    }

    /// One event more: whether it is too many.
    fn spend(&mut self, now_ns: u64) -> bool {
        if now_ns.saturating_sub(self.began_ns) >= 1_000_000_000 {
            (self.began_ns, self.events) = (now_ns, 0);
        }
        self.events += 1;
        self.exceeded |= self.events > self.per_second;
        self.exceeded
    }
}

impl<D: VmiDriver + ?Sized> Session<D> {
    /// Limits how many events the tap may cause in a second; with one more it is disabled. `None`: no limit.
    pub fn set_budget(&mut self, id: TapId, per_second: Option<u64>) {
        self.taps.specialize(id, |rare| rare.budget = per_second.map(|per_second| Box::new(Budget::new(per_second))));
    }

    /// The budget of a tap.
    pub fn budget(&self, id: TapId) -> Option<Budget> {
        self.taps.rare(id).and_then(|rare| rare.budget.as_deref().copied())
    }

    /// Times of all hits. Of those that were neither handed out nor captured each sixteenth is timed, and stands for the others.
    pub const fn holds(&self) -> &Histogram {
        &self.holds
    }

    /// Times of the hits of a tap, as [`Session::holds`]; `None` if none was timed.
    pub fn tap_holds(&self, id: TapId) -> Option<&Histogram> {
        self.taps.rare(id).and_then(|rare| rare.holds.as_deref())
    }

    /// Charges the taps in `self.owners` for an event.
    pub(super) fn spend_budgets(&mut self) {
        let Self { owners, taps, began, over_budget, .. } = self;
        let mut now = None;
        for id in &*owners {
            let Some(budget) = taps.rare_mut(*id).and_then(|rare| rare.budget.as_mut()) else { continue };
            let now = *now.get_or_insert_with(|| began.elapsed().as_nanos() as u64);
            if budget.spend(now) {
                over_budget.push(*id);
            }
        }
    }

    /// Once the event is answered: switches off what has exceeded its budget.
    #[inline]
    pub(super) fn enforce_budgets(&mut self) -> crate::Result<()> {
        if self.over_budget.is_empty() { Ok(()) } else { self.disable_over_budget() }
    }

    fn disable_over_budget(&mut self) -> crate::Result<()> {
        while let Some(id) = self.over_budget.pop() {
            if let Some((va, per_second)) = self.taps.get(id).and_then(|tap| Some((tap.va, self.budget(id)?.per_second))) {
                let what = match self.taps.kind(id) {
                    TapKind::Monitor(set) => format!("the monitor of {set}"),
                    TapKind::Breakpoint | TapKind::Watch { .. } => format!("the breakpoint at {va}"),
                };
                log::warn!("{what} had more than {per_second} events in a second and is disabled");
            }
            self.stats.disabled_by_budget += 1;
            self.disable(id)?;
        }
        Ok(())
    }

    /// Counts how long a vCPU stood still for hits of these taps, which stand for so many.
    pub(super) fn count_hold(&mut self, ids: &[TapId], held_ns: u64, times: u32) {
        for id in ids {
            self.holds.add_times(held_ns, times);
            self.taps.add_hold(*id, held_ns, times);
        }
    }

    /// A hit is in hand that perhaps nobody will be handed.
    #[inline]
    pub(super) fn begin_hold(&mut self) {
        let sampler = &mut self.sampler;
        if sampler.is_due() {
            sampler.in_hand = Some((Instant::now(), sampler.restart()));
        } else {
            sampler.pass();
        }
    }

    /// The vCPU of a hit that nobody was handed goes on. What was captured is timed by itself.
    #[inline]
    pub(super) fn end_hold(&mut self, captured: bool) {
        let Some((since, times)) = self.sampler.in_hand.take() else { return };
        if !captured {
            let owners = std::mem::take(&mut self.owners);
            self.count_hold(&owners, since.elapsed().as_nanos() as u64, times);
            self.owners = owners;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_at_most_a_quarter_too_long_and_the_longest_is_exact() {
        let mut histogram = Histogram::default();
        assert_eq!((histogram.quantile_ns(0.5), histogram.max_ns()), (0, 0));
        for n in 1..=10_000_u64 {
            histogram.add(n * 100);
        }
        for (share, exact) in [(0.5, 500_000), (0.99, 990_000), (0.001, 1_000), (1.0, 1_000_000)] {
            let found = histogram.quantile_ns(share);
            assert!(found >= exact && found <= exact + exact / 4, "{share}: {found}");
        }
        assert_eq!((histogram.max_ns(), histogram.count()), (1_000_000, 10_000));
    }

    #[test]
    fn every_time_has_a_bucket_that_reaches_up_to_it() {
        let mut last = 0;
        for ns in (0..64).flat_map(|bit| [(1_u64 << bit) - 1, 1 << bit, (1 << bit) + (1 << bit) / 3]) {
            let bucket = Histogram::bucket(ns);
            assert!(bucket <= OCTAVES * PARTS);
            assert!(Histogram::upper(bucket) >= ns || bucket == OCTAVES * PARTS, "{ns}");
            last = last.max(bucket);
        }
        assert_eq!(last, OCTAVES * PARTS);
    }

    #[test]
    fn what_came_since_is_told_apart() {
        let mut histogram = Histogram::default();
        histogram.add(1_000_000);
        let before = histogram.clone();
        histogram.add(1_000);
        let new = histogram.since(&before);
        assert_eq!(new.count(), 1);
        assert!((1_000..1_300).contains(&new.max_ns()), "{}", new.max_ns());
        assert_eq!(histogram.since(&histogram.clone()).max_ns(), 0);
    }

    #[test]
    fn a_budget_is_for_each_second() {
        let mut budget = Budget::new(2);
        let second = 1_000_000_000;
        let spent: Vec<bool> = [5, 6, second + 5, second + 6, second + 7].map(|now| budget.spend(now)).to_vec();
        assert_eq!(spent, [false, false, false, false, true]);
        assert!(budget.is_exceeded());
    }
}
