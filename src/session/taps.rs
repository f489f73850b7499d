//! Taps: putting them in, taking them out, switching them off and on.

use crate::addr::{Pa, Va, View};
use crate::driver::VmiDriver;
use crate::error::{Result, TranslationFault, VmiError};
use crate::tap::{Breakpoint, OnWrite};
use crate::undo::Left;

use super::filter::Filter;
use super::hold::{Budget, Histogram};
use super::record::Capture;
use super::{Session, TapId, TapKind, TapSpec, TapState, TapStats};

/// One tap.
pub struct Tap {
    pub spec: TapSpec,
    /// Active also while it waits for its page.
    pub state: TapState,
    pub stats: TapStats,
    pub filter: Option<Box<Filter>>,
    pub capture: Option<Box<Capture>>,
    pub budget: Option<Box<Budget>>,
    pub holds: Option<Box<Histogram>>,
}

impl<D: VmiDriver + ?Sized> Session<D> {
    pub(super) fn tap(&self, id: TapId) -> Option<&Tap> {
        self.taps.get(id.0 as usize)
    }

    pub(super) fn tap_mut(&mut self, id: TapId) -> Option<&mut Tap> {
        self.taps.get_mut(id.0 as usize)
    }

    /// What a write over the byte of that tap does.
    pub(super) fn policy(&self, id: TapId) -> OnWrite {
        self.tap(id).and_then(|tap| tap.spec.on_write).unwrap_or(self.on_write)
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
        TapStats { filtered, filter_faults, ..tap.stats }
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

    fn key_of(spec: &TapSpec) -> Option<(View, Va, Option<Pa>, u64)> {
        let root = (!spec.global).then_some(spec.context.root);
        spec.key.map(|key| (spec.view, spec.va, root, key))
    }

    fn breakpoint_of(id: TapId, spec: &TapSpec) -> Breakpoint<TapId, ()> {
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
                planted.push(Self::breakpoint_of(TapId((first + index) as u32), spec));
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
            let at: Vec<_> = planted.iter().map(|breakpoint| (breakpoint.va, breakpoint.context)).collect();
            let mapped = self.follow(&at)?;
            let planted = planted.into_iter().zip(mapped).collect();
            let inserted = self.manager.insert_many_with_hints(&mut self.vmi, &mut self.controller, planted);
            inserted.map(drop).map_err(|cause| self.unfollow_after(&at, cause))
        });
        if let Err(cause) = done {
            for key in &new_keys {
                self.keys.remove(key);
            }
            let mut left = Left::default();
            for index in 0..watched {
                left.note(self.unwatch(TapId((first + index) as u32)), || "a watch".to_owned());
            }
            return Err(left.after(cause));
        }
        self.taps.extend(specs.iter().map(|spec| Tap {
            spec: *spec,
            state: if spec.enabled { TapState::Active } else { TapState::Disabled },
            stats: TapStats::default(),
            filter: None,
            capture: None,
            budget: None,
            holds: None,
        }));
        Ok((first..self.taps.len()).map(|index| TapId(index as u32)).collect())
    }

    /// Takes the tap out of the guest, whatever becomes of it then.
    pub(super) fn lift(&mut self, id: TapId) -> Result<()> {
        let Some(spec) = self.tap(id).filter(|tap| tap.state == TapState::Active).map(|tap| tap.spec) else { return Ok(()) };
        match spec.kind {
            TapKind::Breakpoint => {
                let (view, va, context) = (spec.view, spec.va, spec.context);
                self.unfollow((va, context))?;
                let removed = self.manager.remove(&mut self.vmi, &mut self.controller, view, va, context.root, &id);
                removed.map(drop).map_err(|cause| {
                    let mut left = Left::default();
                    left.note(self.follow(&[(va, context)]).map(drop), || format!("page tables of {va} not watched"));
                    left.after(cause)
                })
            }
            TapKind::Watch { .. } => self.unwatch(id),
        }
    }

    /// Takes a tap out for good. Twice is fine.
    ///
    /// # Errors
    /// Whatever the driver fails with; the tap is as it was then.
    pub fn remove(&mut self, id: TapId) -> Result<()> {
        self.lift(id)?;
        self.bury(id);
        Ok(())
    }

    /// A tap is out of the guest for good.
    pub(super) fn bury(&mut self, id: TapId) {
        self.forget_returns(id);
        // Once only: somebody else may have its key since.
        let Some(tap) = self.tap_mut(id).filter(|tap| tap.state != TapState::Removed) else { return };
        tap.state = TapState::Removed;
        if let Some(key) = Self::key_of(&tap.spec) {
            self.keys.remove(&key);
        }
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
                let breakpoint = Self::breakpoint_of(id, &spec);
                let at = [(spec.va, spec.context)];
                let pa = self.follow(&at)?.pop().flatten();
                let inserted = self.manager.insert_with_hint(&mut self.vmi, &mut self.controller, breakpoint, pa);
                inserted.map(drop).map_err(|cause| self.unfollow_after(&at, cause))
            }
            TapKind::Watch { len, access } => self.watch(id, &spec, len, access),
        }
    }
}
