//! Taps: putting them in, taking them out, switching them off and on.

use std::time::Duration;

use crate::addr::{Pa, Va, View};
use crate::arch::amd64::AddressContext;
use crate::driver::VmiDriver;
use crate::error::{Result, TranslationFault, VmiError};
use crate::tap::{Breakpoint, OnWrite};
use crate::undo::Left;

use super::monitor;
use super::tap::{Handed, Owner, Tap};
use super::{Session, TapId, TapKind, TapSpec, TapState, TapStats};

/// What a key is taken for.
pub type Key = (View, Va, Option<Pa>, u64);

impl<D: VmiDriver + ?Sized> Session<D> {
    /// What the write in hand does over the byte of that tap.
    pub(super) fn policy(&self, id: TapId) -> OnWrite {
        self.judged.of(id).or_else(|| self.taps.rare(id)?.on_write).unwrap_or(self.on_write)
    }

    /// The description of a tap; `None` if there never was one of that number.
    pub fn spec(&self, id: TapId) -> Option<TapSpec> {
        self.taps.spec(id)
    }

    /// Where a tap is in its life.
    pub fn state(&self, id: TapId) -> TapState {
        let Some(tap) = self.taps.get(id) else { return TapState::Removed };
        if !tap.is_active() || self.taps.kind(id) != TapKind::Breakpoint {
            return tap.state();
        }
        let planted = self.manager.get(tap.view, tap.va, tap.context().root, &id.into()).is_some_and(|found| found.pa.is_some());
        if planted { TapState::Active } else { TapState::Pending }
    }

    /// The counters of a tap.
    pub fn tap_stats(&self, id: TapId) -> TapStats {
        let hits = self.taps.get(id).map_or(0, |tap| tap.hits);
        let Some(rare) = self.taps.rare(id) else { return TapStats { hits, ..TapStats::default() } };
        let (filtered, filter_faults) = rare.filter.as_ref().map_or((0, 0), |filter| (filter.filtered, filter.faults));
        let filter_faults = filter_faults + rare.write_policy.as_ref().map_or(0, |policy| policy.faults);
        let Handed { count, total_ns, max_ns } = rare.handed;
        let (hold_total, hold_max) = (Duration::from_nanos(total_ns), Duration::from_nanos(max_ns));
        TapStats { hits, filtered, filter_faults, handled: count, hold_total, hold_max }
    }

    /// Whether [`Session::poll`] returns the hits of a tap from now on.
    pub fn set_wanted(&mut self, id: TapId, wanted: bool) {
        if let Some(tap) = self.taps.get_mut(id) {
            tap.set_wanted(wanted);
        }
    }

    pub(super) fn taps_in(&self, view: View) -> Vec<TapId> {
        let in_view = |(_, tap): &(TapId, &Tap)| tap.state() != TapState::Removed && tap.view == view;
        self.taps.iter().filter(in_view).map(|(id, _)| id).collect()
    }

    /// Whether a tap is neither disabled nor removed.
    pub(super) fn is_planted(&self, id: TapId) -> bool {
        self.taps.get(id).is_some_and(Tap::is_active)
    }

    fn check(&self, spec: &TapSpec) -> Result<()> {
        if spec.view == View::DEFAULT {
            return Err(VmiError::DefaultView { op: "planting a breakpoint" });
        }
        if !self.views.contains(&spec.view) {
            return Err(VmiError::ViewNotFound { view: spec.view });
        }
        if let TapKind::Monitor(set) = &spec.kind {
            return monitor::check(set);
        }
        if let TapKind::Watch { len, access } = spec.kind {
            let refuse = |what, reason: &str| Err(VmiError::InvalidArgument { what, reason: reason.to_owned() });
            if len == 0 {
                return refuse("length", "a watch needs at least one byte");
            }
            if access.bits() == 0 {
                return refuse("access", "a watch needs at least one of R, W and X");
            }
            if spec.va.checked_add(len - 1).is_none() {
                return refuse("length", "the range reaches past the end of the address space");
            }
        }
        Ok(())
    }

    /// Refuses an address that can be none, and a watch whose first page is not there.
    fn check_mapped(&self, spec: &TapSpec) -> Result<()> {
        if matches!(spec.kind, TapKind::Monitor(_)) {
            return Ok(());
        }
        match self.vmi.translate(spec.va, spec.context) {
            Err(VmiError::Translation { fault: TranslationFault::NotPresent { .. }, .. }) if spec.kind == TapKind::Breakpoint => {
                Ok(())
            }
            translated => translated.map(drop),
        }
    }

    fn key_of(spec: &TapSpec) -> Option<Key> {
        if matches!(spec.kind, TapKind::Monitor(_)) {
            return None;
        }
        let root = (!spec.global).then_some(spec.context.root);
        spec.key.map(|key| (spec.view, spec.va, root, key))
    }

    pub(super) fn breakpoint_of(id: TapId, spec: &TapSpec) -> Breakpoint<Owner, ()> {
        Breakpoint { view: spec.view, va: spec.va, context: spec.context, key: id.into(), tag: (), global: spec.global }
    }

    /// Puts a tap in. A breakpoint whose page is not there waits for it; a watch needs its pages.
    ///
    /// # Errors
    /// [`VmiError::Translation`] if the address can be none, or is one of a watch that is not mapped; [`VmiError::DefaultView`] and
    /// [`VmiError::ViewNotFound`];
    /// [`VmiError::BreakpointConflict`] if its key is taken there; [`VmiError::NotSupported`] for a guest that only can be looked at;
    /// whatever the driver fails with. Nothing has changed then.
    pub fn add(&mut self, spec: &TapSpec) -> Result<TapId> {
        let mut ids = self.add_many(std::slice::from_ref(spec))?;
        ids.pop().ok_or(VmiError::InvalidArgument { what: "spec", reason: "none was given".to_owned() })
    }

    /// Puts many taps in: all of them or, on an error, none. Costs driver calls by pages and not by breakpoints.
    ///
    /// # Errors
    /// As [`Session::add`], for the first tap that cannot be put in.
    pub fn add_many(&mut self, specs: &[TapSpec]) -> Result<Vec<TapId>> {
        self.check_open()?;
        let driver = self.vmi.driver();
        driver.caps().check_events(driver.info().driver, "events")?;
        let first = self.taps.len();
        if u32::try_from(first + specs.len()).is_err() {
            return Err(VmiError::InvalidArgument { what: "targets", reason: "a session has room for 2^32 taps".to_owned() });
        }
        let mut new_keys = Vec::new();
        let mut planted = Vec::new();
        let checked = specs.iter().enumerate().try_for_each(|(index, spec)| {
            self.check(spec)?;
            self.check_mapped(spec)?;
            if let Some(key) = Self::key_of(spec) {
                if !self.keys.insert(key) {
                    return Err(VmiError::BreakpointConflict { va: spec.va });
                }
                new_keys.push(key);
            }
            if spec.enabled && spec.kind == TapKind::Breakpoint {
                planted.push((TapId((first + index) as u32), *spec));
            }
            Ok(())
        });
        let mut started = 0;
        let done = checked.and_then(|()| {
            for (index, spec) in specs.iter().enumerate().filter(|(_, spec)| spec.enabled) {
                self.start(TapId((first + index) as u32), spec)?;
                started = index + 1;
            }
            self.insert_breakpoints(&planted)
        });
        let mut planted = match done {
            Ok(planted) => planted.into_iter(),
            Err(cause) => return Err(self.give_up(cause, &new_keys, first..first + started)),
        };
        self.taps.reserve(specs.len());
        for (index, spec) in (first..).zip(specs) {
            let is_planted = spec.enabled && spec.kind == TapKind::Breakpoint;
            let (more, roams) = if is_planted { planted.next().unwrap_or_default() } else { Default::default() };
            self.taps.push(spec, more);
            self.taps.set_roams(TapId(index as u32), roams);
        }
        Ok((first..self.taps.len()).map(|index| TapId(index as u32)).collect())
    }

    /// Puts a watch or a monitor into the guest; breakpoints are put in together.
    fn start(&mut self, id: TapId, spec: &TapSpec) -> Result<()> {
        match spec.kind {
            TapKind::Breakpoint => Ok(()),
            TapKind::Watch { len, access } => self.watch(id, spec, len, access),
            TapKind::Monitor(set) => self.start_monitors(id, set),
        }
    }

    /// Takes a watch or a monitor out of the guest; of a tap that is neither, or was not put in, there is nothing.
    fn stop(&mut self, id: TapId) -> Result<()> {
        self.stop_monitors(id)?;
        self.unwatch(id)
    }

    /// Takes back what was done before `cause` happened.
    fn give_up(&mut self, cause: VmiError, keys: &[Key], started: std::ops::Range<usize>) -> VmiError {
        for key in keys {
            self.keys.remove(key);
        }
        let mut left = Left::default();
        for index in started {
            left.note(self.stop(TapId(index as u32)), || "a watch or a monitor".to_owned());
        }
        left.after(cause)
    }

    /// Plants breakpoints, with the tables they are found through watched: all or none. Returns for each the roots that it is looked
    /// up under beside its own, and whether it roams.
    fn insert_breakpoints(&mut self, wanted: &[(TapId, TapSpec)]) -> Result<Vec<(Vec<AddressContext>, bool)>> {
        let (mut planted, mut breakpoints, mut any_roams) = (Vec::new(), Vec::new(), false);
        let mut in_use = None;
        for (id, spec) in wanted {
            let roams = self.starts_to_roam(spec)?;
            any_roams |= roams;
            let more = if roams { self.other_roots(spec, &mut in_use)? } else { Vec::new() };
            let own = Self::breakpoint_of(*id, spec);
            breakpoints.push(own);
            breakpoints.extend(more.iter().map(|context| Breakpoint { context: *context, ..own }));
            planted.push((more, roams));
        }
        let at: Vec<_> = breakpoints.iter().map(|breakpoint| (breakpoint.va, breakpoint.context)).collect();
        let started = any_roams && self.track_roots(true)?;
        let done = self.follow(&at).and_then(|mapped| {
            let hinted = breakpoints.into_iter().zip(mapped).collect();
            let inserted = self.manager.insert_many_with_hints(&mut self.vmi, &mut self.controller, hinted);
            inserted.map_err(|cause| self.unfollow_after(&at, cause))
        });
        if let Err(cause) = done {
            let mut left = Left::default();
            if started {
                left.note(self.track_roots(false).map(drop), || "writes of CR3 announced".to_owned());
            }
            return Err(left.after(cause));
        }
        // All that roam are looked up under these now.
        self.roots = in_use.unwrap_or_else(|| std::mem::take(&mut self.roots));
        Ok(planted)
    }

    /// Takes breakpoints out of the guest, and the watch of their tables: all or none.
    fn remove_breakpoints(&mut self, ids: &[TapId]) -> Result<()> {
        let (mut at, mut identities) = (Vec::new(), Vec::new());
        for (id, tap) in ids.iter().filter_map(|id| Some((*id, self.taps.get(*id)?))) {
            at.extend(self.taps.contexts(id).map(|context| (tap.va, context)));
            identities.push((tap.view, tap.va, tap.context().root, id.into()));
        }
        let roaming = ids.iter().filter(|id| self.taps.roams(**id)).count();
        let is_last = self.tracks_roots && roaming == self.taps.roaming();
        let roots = if is_last { self.roots.clone() } else { Vec::new() };
        let stopped = is_last && self.track_roots(false)?;
        let mut unfollowed = 0;
        let done = at.iter().try_for_each(|at| self.unfollow(*at).map(|()| unfollowed += 1));
        let done = done.and_then(|()| self.manager.remove_many(&mut self.vmi, &mut self.controller, &identities));
        if let Err(cause) = done {
            let mut left = Left::default();
            let watched = self.follow(at.get(..unfollowed).unwrap_or_default());
            left.note(watched.map(drop), || "page tables that are not watched".to_owned());
            if stopped {
                left.note(self.track_roots(true).map(drop), || "writes of CR3 not announced".to_owned());
                self.roots = roots;
            }
            return Err(left.after(cause));
        }
        for id in ids {
            self.taps.set_roams(*id, false);
            self.taps.set_more(*id, Vec::new());
        }
        Ok(())
    }

    /// Takes the tap out of the guest, whatever becomes of it then.
    pub(super) fn lift(&mut self, id: TapId) -> Result<()> {
        if !self.is_planted(id) {
            return Ok(());
        }
        match self.taps.kind(id) {
            TapKind::Breakpoint => self.remove_breakpoints(&[id]),
            TapKind::Watch { .. } => self.unwatch(id),
            TapKind::Monitor(_) => self.stop_monitors(id),
        }
    }

    /// Takes a tap out for good. Twice is fine.
    ///
    /// # Errors
    /// Whatever the driver fails with; the tap is as it was then.
    pub fn remove(&mut self, id: TapId) -> Result<()> {
        self.lift(id)?;
        self.forget_returns(id);
        self.bury(id);
        Ok(())
    }

    /// A tap is out of the guest for good.
    pub(super) fn bury(&mut self, id: TapId) {
        // Once only: somebody else may have its key since.
        let Some(tap) = self.taps.get_mut(id).filter(|tap| tap.state() != TapState::Removed) else { return };
        tap.set_state(TapState::Removed);
        if let Some(key) = self.taps.spec(id).as_ref().and_then(Self::key_of) {
            self.keys.remove(&key);
        }
    }

    /// Takes many taps out for good: all of them or, on an error, none. Costs driver calls by pages and not by breakpoints.
    ///
    /// # Errors
    /// As [`Session::remove`]; [`VmiError::UndoFailed`] if a watch that was taken out cannot be put in again.
    pub fn remove_many(&mut self, ids: &[TapId]) -> Result<()> {
        let active = |id: &TapId| self.taps.spec(*id).filter(|_| self.is_planted(*id)).map(|spec| (*id, spec));
        let mut taps: Vec<(TapId, TapSpec)> = ids.iter().filter_map(active).collect();
        taps.sort_unstable_by_key(|(id, _)| *id);
        taps.dedup_by_key(|(id, _)| *id);
        let (planted, others): (Vec<_>, Vec<_>) = taps.into_iter().partition(|(_, spec)| spec.kind == TapKind::Breakpoint);
        let planted: Vec<TapId> = planted.into_iter().map(|(id, _)| id).collect();
        let mut stopped = 0;
        let done = others.iter().try_for_each(|(id, _)| self.stop(*id).map(|()| stopped += 1));
        if let Err(cause) = done.and_then(|()| self.remove_breakpoints(&planted)) {
            let mut left = Left::default();
            for (id, spec) in others.get(..stopped).unwrap_or_default() {
                left.note(self.start(*id, spec), || format!("no watch or monitor at {}", spec.va));
            }
            return Err(left.after(cause));
        }
        for id in ids {
            self.forget_returns(*id);
            self.bury(*id);
        }
        Ok(())
    }

    /// Makes the first hit of a tap its last: it is removed before its vCPU goes on.
    pub fn set_once(&mut self, id: TapId) {
        if let Some(tap) = self.taps.get_mut(id) {
            tap.set_once();
        }
    }

    /// Removes the taps for one hit that have had it; those that fail stay, and are tried again with the next event.
    pub(super) fn remove_spent(&mut self) -> Result<()> {
        while let Some(id) = self.spent.last().copied() {
            // Unlike `remove`: a call that is under way may still return.
            self.lift(id)?;
            self.bury(id);
            self.spent.pop();
        }
        Ok(())
    }

    /// Takes a tap out and keeps everything else of it. Does nothing if it is not active.
    ///
    /// # Errors
    /// As [`Session::remove`].
    pub fn disable(&mut self, id: TapId) -> Result<()> {
        self.lift(id)?;
        self.forget_returns(id);
        if let Some(tap) = self.taps.get_mut(id).filter(|tap| tap.is_active()) {
            tap.set_state(TapState::Disabled);
        }
        Ok(())
    }

    /// Plants a tap again after [`Session::disable`]. Does nothing if it is not disabled.
    ///
    /// # Errors
    /// As [`Session::add`]; the tap stays disabled then.
    pub fn enable(&mut self, id: TapId) -> Result<()> {
        self.check_open()?;
        let Some(spec) = self.taps.get(id).filter(|tap| tap.state() == TapState::Disabled).and_then(|_| self.taps.spec(id))
        else {
            return Ok(());
        };
        self.check(&spec)?;
        self.plant(id)?;
        if let Some(tap) = self.taps.get_mut(id) {
            tap.set_state(TapState::Active);
        }
        Ok(())
    }

    /// Puts a tap into the guest that is not in it.
    pub(super) fn plant(&mut self, id: TapId) -> Result<()> {
        let Some(spec) = self.taps.spec(id) else { return Ok(()) };
        match spec.kind {
            TapKind::Breakpoint => {
                let (more, roams) = self.insert_breakpoints(&[(id, spec)])?.pop().unwrap_or_default();
                self.taps.set_more(id, more);
                self.taps.set_roams(id, roams);
                Ok(())
            }
            TapKind::Watch { .. } | TapKind::Monitor(_) => self.start(id, &spec),
        }
    }
}
