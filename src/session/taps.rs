//! Taps: putting them in, taking them out, switching them off and on.

use crate::addr::{Pa, Va, View};
use crate::arch::amd64::AddressContext;
use crate::driver::VmiDriver;
use crate::error::{Result, TranslationFault, VmiError};
use crate::tap::{Breakpoint, OnWrite};
use crate::undo::Left;

use super::filter::Filter;
use super::hold::{Budget, Histogram};
use super::record::Capture;
use super::write_policy::WritePolicy;
use super::{Session, TapId, TapKind, TapSpec, TapState, TapStats};

/// What a key is taken for.
pub type Key = (View, Va, Option<Pa>, u64);

/// One tap.
pub struct Tap {
    pub spec: TapSpec,
    /// Active also while it waits for its page.
    pub state: TapState,
    pub stats: TapStats,
    /// Roots that a global breakpoint is looked up under beside that of `spec`.
    pub more: Vec<AddressContext>,
    /// Its first hit takes it out.
    pub once: bool,
    pub filter: Option<Box<Filter>>,
    /// What a write to its byte does, where that depends on the write.
    pub write_policy: Option<Box<WritePolicy>>,
    pub capture: Option<Box<Capture>>,
    pub budget: Option<Box<Budget>>,
    pub holds: Option<Box<Histogram>>,
}

impl Tap {
    /// Every root it is looked up under.
    pub fn contexts(&self) -> impl Iterator<Item = AddressContext> {
        std::iter::once(self.spec.context).chain(self.more.iter().copied())
    }
}

impl<D: VmiDriver + ?Sized> Session<D> {
    pub(super) fn tap(&self, id: TapId) -> Option<&Tap> {
        self.taps.get(id.0 as usize)
    }

    pub(super) fn tap_mut(&mut self, id: TapId) -> Option<&mut Tap> {
        self.taps.get_mut(id.0 as usize)
    }

    /// What the write in hand does over the byte of that tap.
    pub(super) fn policy(&self, id: TapId) -> OnWrite {
        let judged = self.judged.iter().find(|(tap, _)| *tap == id).map(|(_, policy)| *policy);
        judged.or_else(|| self.tap(id).and_then(|tap| tap.spec.on_write)).unwrap_or(self.on_write)
    }

    /// The description of a tap; `None` if there never was one of that number.
    pub fn spec(&self, id: TapId) -> Option<&TapSpec> {
        self.tap(id).map(|tap| &tap.spec)
    }

    /// Where a tap is in its life.
    pub fn state(&self, id: TapId) -> TapState {
        let Some(tap) = self.tap(id) else { return TapState::Removed };
        let TapSpec { kind, view, va, context, .. } = tap.spec;
        if tap.state != TapState::Active || kind != TapKind::Breakpoint {
            return tap.state;
        }
        let planted = self.manager.get(view, va, context.root, &id).is_some_and(|found| found.pa.is_some());
        if planted { TapState::Active } else { TapState::Pending }
    }

    /// The counters of a tap.
    pub fn tap_stats(&self, id: TapId) -> TapStats {
        let Some(tap) = self.tap(id) else { return TapStats::default() };
        let (filtered, filter_faults) = tap.filter.as_ref().map_or((0, 0), |filter| (filter.filtered, filter.faults));
        let write_faults = tap.write_policy.as_ref().map_or(0, |policy| policy.faults);
        TapStats { filtered, filter_faults: filter_faults + write_faults, ..tap.stats }
    }

    /// Whether [`Session::poll`] returns the hits of a tap from now on.
    pub fn set_wanted(&mut self, id: TapId, wanted: bool) {
        if let Some(tap) = self.tap_mut(id) {
            tap.spec.wanted = wanted;
        }
    }

    pub(super) fn taps_in(&self, view: View) -> Vec<TapId> {
        let in_view = |(_, tap): &(usize, &Tap)| tap.state != TapState::Removed && tap.spec.view == view;
        self.taps.iter().enumerate().filter(in_view).map(|(index, _)| TapId(index as u32)).collect()
    }

    /// Whether a tap is neither disabled nor removed.
    pub(super) fn is_planted(&self, id: TapId) -> bool {
        self.tap(id).is_some_and(|tap| tap.state == TapState::Active)
    }

    fn check(&self, spec: &TapSpec) -> Result<()> {
        if spec.view == View::DEFAULT {
            return Err(VmiError::DefaultView { op: "planting a breakpoint" });
        }
        if !self.views.contains(&spec.view) {
            return Err(VmiError::ViewNotFound { view: spec.view });
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
        match self.vmi.translate(spec.va, spec.context) {
            Err(VmiError::Translation { fault: TranslationFault::NotPresent { .. }, .. }) if spec.kind == TapKind::Breakpoint => {
                Ok(())
            }
            translated => translated.map(drop),
        }
    }

    fn key_of(spec: &TapSpec) -> Option<Key> {
        let root = (!spec.global).then_some(spec.context.root);
        spec.key.map(|key| (spec.view, spec.va, root, key))
    }

    pub(super) fn breakpoint_of(id: TapId, spec: &TapSpec) -> Breakpoint<TapId, ()> {
        Breakpoint { view: spec.view, va: spec.va, context: spec.context, key: id, tag: (), global: spec.global }
    }

    /// Puts a tap in. A breakpoint whose page is not there waits for it; a watch needs its pages.
    ///
    /// # Errors
    /// [`VmiError::Translation`] if the address can be none, or is one of a watch that is not mapped; [`VmiError::DefaultView`] and
    /// [`VmiError::ViewNotFound`];
    /// [`VmiError::BreakpointConflict`] if its key is taken there; whatever the driver fails with. Nothing has changed then.
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
        let first = self.taps.len();
        if u32::try_from(first + specs.len()).is_err() {
            return Err(VmiError::InvalidArgument { what: "targets", reason: "a session has room for 2^32 taps".to_owned() });
        }
        let mut new_keys = Vec::new();
        let mut planted = Vec::new();
        let checked = specs.iter().enumerate().try_for_each(|(index, spec)| {
            self.check(spec)?;
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
        let mut watched = 0;
        let done = checked.and_then(|()| {
            for (index, spec) in specs.iter().enumerate().filter(|(_, spec)| spec.enabled) {
                if let TapKind::Watch { len, access } = spec.kind {
                    self.watch(TapId((first + index) as u32), spec, len, access)?;
                }
                watched = index + 1;
            }
            self.insert_breakpoints(&planted)
        });
        let mut others = match done {
            Ok(others) => others.into_iter(),
            Err(cause) => return Err(self.give_up(cause, &new_keys, first..first + watched)),
        };
        self.taps.extend(specs.iter().map(|spec| Tap {
            spec: *spec,
            state: if spec.enabled { TapState::Active } else { TapState::Disabled },
            stats: TapStats::default(),
            more: if spec.enabled && spec.kind == TapKind::Breakpoint { others.next().unwrap_or_default() } else { Vec::new() },
            once: false,
            filter: None,
            write_policy: None,
            capture: None,
            budget: None,
            holds: None,
        }));
        Ok((first..self.taps.len()).map(|index| TapId(index as u32)).collect())
    }

    /// Takes back what was done before `cause` happened.
    fn give_up(&mut self, cause: VmiError, keys: &[Key], watched: std::ops::Range<usize>) -> VmiError {
        for key in keys {
            self.keys.remove(key);
        }
        let mut left = Left::default();
        for index in watched {
            left.note(self.unwatch(TapId(index as u32)), || "a watch".to_owned());
        }
        left.after(cause)
    }

    /// Plants breakpoints, with the tables they are found through watched: all or none. Returns for each the roots that it is looked
    /// up under beside its own.
    fn insert_breakpoints(&mut self, wanted: &[(TapId, TapSpec)]) -> Result<Vec<Vec<AddressContext>>> {
        let (mut others, mut breakpoints, mut roaming) = (Vec::new(), Vec::new(), Vec::new());
        let mut in_use = None;
        for (id, spec) in wanted {
            let more = if self.starts_to_roam(spec)? {
                roaming.push(*id);
                self.other_roots(spec, &mut in_use)?
            } else {
                Vec::new()
            };
            let own = Self::breakpoint_of(*id, spec);
            breakpoints.push(own);
            breakpoints.extend(more.iter().map(|context| Breakpoint { context: *context, ..own }));
            others.push(more);
        }
        let at: Vec<_> = breakpoints.iter().map(|breakpoint| (breakpoint.va, breakpoint.context)).collect();
        let started = !roaming.is_empty() && self.track_roots(true)?;
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
        self.roaming.extend(roaming);
        // All that roam are looked up under these now.
        self.roots = in_use.unwrap_or_else(|| std::mem::take(&mut self.roots));
        Ok(others)
    }

    /// Takes breakpoints out of the guest, and the watch of their tables: all or none.
    fn remove_breakpoints(&mut self, ids: &[TapId]) -> Result<()> {
        let (mut at, mut identities) = (Vec::new(), Vec::new());
        for (id, tap) in ids.iter().filter_map(|id| Some((*id, self.tap(*id)?))) {
            at.extend(tap.contexts().map(|context| (tap.spec.va, context)));
            identities.push((tap.spec.view, tap.spec.va, tap.spec.context.root, id));
        }
        let is_last = self.tracks_roots && self.roaming.iter().all(|id| ids.contains(id));
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
            }
            return Err(left.after(cause));
        }
        for id in ids {
            self.roaming.remove(id);
            if let Some(tap) = self.tap_mut(*id) {
                tap.more = Vec::new();
            }
        }
        Ok(())
    }

    /// Takes the tap out of the guest, whatever becomes of it then.
    pub(super) fn lift(&mut self, id: TapId) -> Result<()> {
        let Some(spec) = self.tap(id).filter(|tap| tap.state == TapState::Active).map(|tap| tap.spec) else { return Ok(()) };
        match spec.kind {
            TapKind::Breakpoint => self.remove_breakpoints(&[id]),
            TapKind::Watch { .. } => self.unwatch(id),
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
        let Some(tap) = self.tap_mut(id).filter(|tap| tap.state != TapState::Removed) else { return };
        tap.state = TapState::Removed;
        if let Some(key) = Self::key_of(&tap.spec) {
            self.keys.remove(&key);
        }
    }

    /// Takes many taps out for good: all of them or, on an error, none. Costs driver calls by pages and not by breakpoints.
    ///
    /// # Errors
    /// As [`Session::remove`]; [`VmiError::UndoFailed`] if a watch that was taken out cannot be put in again.
    pub fn remove_many(&mut self, ids: &[TapId]) -> Result<()> {
        let active = |id: &TapId| self.tap(*id).filter(|tap| tap.state == TapState::Active).map(|tap| (*id, tap.spec));
        let mut taps: Vec<(TapId, TapSpec)> = ids.iter().filter_map(active).collect();
        taps.sort_unstable_by_key(|(id, _)| *id);
        taps.dedup_by_key(|(id, _)| *id);
        let (planted, watches): (Vec<_>, Vec<_>) = taps.into_iter().partition(|(_, spec)| spec.kind == TapKind::Breakpoint);
        let planted: Vec<TapId> = planted.into_iter().map(|(id, _)| id).collect();
        let mut unwatched = 0;
        let done = watches.iter().try_for_each(|(id, _)| self.unwatch(*id).map(|()| unwatched += 1));
        if let Err(cause) = done.and_then(|()| self.remove_breakpoints(&planted)) {
            let mut left = Left::default();
            for (id, spec) in watches.get(..unwatched).unwrap_or_default() {
                if let TapKind::Watch { len, access } = spec.kind {
                    left.note(self.watch(*id, spec, len, access), || format!("no watch at {}", spec.va));
                }
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
        if let Some(tap) = self.tap_mut(id) {
            tap.once = true;
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
        if let Some(tap) = self.tap_mut(id).filter(|tap| tap.state == TapState::Active) {
            tap.state = TapState::Disabled;
        }
        Ok(())
    }

    /// Plants a tap again after [`Session::disable`]. Does nothing if it is not disabled.
    ///
    /// # Errors
    /// As [`Session::add`]; the tap stays disabled then.
    pub fn enable(&mut self, id: TapId) -> Result<()> {
        self.check_open()?;
        let Some(spec) = self.tap(id).filter(|tap| tap.state == TapState::Disabled).map(|tap| tap.spec) else { return Ok(()) };
        self.check(&spec)?;
        self.plant(id)?;
        if let Some(tap) = self.tap_mut(id) {
            tap.state = TapState::Active;
        }
        Ok(())
    }

    /// Puts a tap into the guest that is not in it.
    pub(super) fn plant(&mut self, id: TapId) -> Result<()> {
        let Some(spec) = self.tap(id).map(|tap| tap.spec) else { return Ok(()) };
        match spec.kind {
            TapKind::Breakpoint => {
                let more = self.insert_breakpoints(&[(id, spec)])?.pop().unwrap_or_default();
                if let Some(tap) = self.tap_mut(id) {
                    tap.more = more;
                }
                Ok(())
            }
            TapKind::Watch { len, access } => self.watch(id, &spec, len, access),
        }
    }
}
