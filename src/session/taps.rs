//! Taps: putting them in, taking them out, switching them off and on.

use crate::addr::{Pa, Va, View};
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};
use crate::tap::{Breakpoint, OnWrite};

use super::filter::Filter;
use super::hold::{Budget, Histogram};
use super::record::Capture;
use super::{Session, TapId, TapKind, TapSpec, TapState, TapStats};

/// One tap.
pub struct Tap {
    pub spec: TapSpec,
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
        self.tap(id).map_or(TapState::Removed, |tap| tap.state)
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
        self.vmi.translate(spec.va, spec.context)?;
        Ok(())
    }

    fn key_of(spec: &TapSpec) -> Option<(View, Va, Option<Pa>, u64)> {
        let root = (!spec.global).then_some(spec.context.root);
        spec.key.map(|key| (spec.view, spec.va, root, key))
    }

    fn breakpoint_of(id: TapId, spec: &TapSpec) -> Breakpoint<TapId, ()> {
        Breakpoint { view: spec.view, va: spec.va, context: spec.context, key: id, tag: (), global: spec.global }
    }

    /// Puts a tap in.
    ///
    /// # Errors
    /// [`VmiError::Translation`] if its address is not mapped; [`VmiError::DefaultView`] and [`VmiError::ViewNotFound`];
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
            self.manager.insert_many(&mut self.vmi, &mut self.controller, planted).map(drop)
        });
        if let Err(cause) = done {
            for key in &new_keys {
                self.keys.remove(key);
            }
            let mut left = Vec::new();
            for index in 0..watched {
                if let Err(error) = self.unwatch(TapId((first + index) as u32)) {
                    left.push(format!("a watch ({error})"));
                }
            }
            return Err(if left.is_empty() {
                cause
            } else {
                VmiError::UndoFailed { cause: Box::new(cause), left_behind: left.join(", ") }
            });
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
    fn lift(&mut self, id: TapId) -> Result<()> {
        let Some(spec) = self.tap(id).filter(|tap| tap.state == TapState::Active).map(|tap| tap.spec) else { return Ok(()) };
        match spec.kind {
            TapKind::Breakpoint => {
                let (view, va, root) = (spec.view, spec.va, spec.context.root);
                self.manager.remove(&mut self.vmi, &mut self.controller, view, va, root, &id).map(drop)
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
        self.forget_returns(id);
        let Some(tap) = self.tap_mut(id) else { return Ok(()) };
        tap.state = TapState::Removed;
        if let Some(key) = Self::key_of(&tap.spec) {
            self.keys.remove(&key);
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
        match spec.kind {
            TapKind::Breakpoint => {
                let breakpoint = Self::breakpoint_of(id, &spec);
                self.manager.insert(&mut self.vmi, &mut self.controller, breakpoint)?;
            }
            TapKind::Watch { len, access } => self.watch(id, &spec, len, access)?,
        }
        if let Some(tap) = self.tap_mut(id) {
            tap.state = TapState::Active;
        }
        Ok(())
    }
}
