//! Views: making them, removing them with what is in them, and putting vCPUs into one.

use crate::addr::{MemoryAccess, VcpuId, View};
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};
use crate::undo::Left;

use super::{Session, TapId};

impl<D: VmiDriver + ?Sized> Session<D> {
    /// The view that is tapped.
    pub const fn tap_view(&self) -> View {
        self.tap_view
    }

    /// The default view and those this session made.
    pub fn views(&self) -> Vec<View> {
        std::iter::once(View::DEFAULT).chain(self.views.iter().copied()).collect()
    }

    /// Makes a view that maps every page to itself with `access`.
    ///
    /// # Errors
    /// The driver's, with nothing changed.
    pub fn create_view(&mut self, access: MemoryAccess) -> Result<View> {
        let view = self.vmi.driver_mut().create_view(access)?;
        if let Err(cause) = self.tables.add_view(&mut self.vmi, self.controller.rights(), view) {
            let mut left = Left::default();
            left.note(self.vmi.driver_mut().destroy_view(view), || format!("view {view}"));
            return Err(left.after(cause));
        }
        self.views.push(view);
        Ok(view)
    }

    /// Removes a view this session made, with the taps in it. If a vCPU is in it, or is to come back to it, all go to the tap view.
    ///
    /// # Errors
    /// [`VmiError::DefaultView`], [`VmiError::ViewNotFound`]; [`VmiError::InvalidArgument`] for the tap view itself; the driver's.
    /// Nothing is changed then.
    pub fn destroy_view(&mut self, view: View) -> Result<()> {
        if view == View::DEFAULT {
            return Err(VmiError::DefaultView { op: "destroying a view" });
        }
        if view == self.tap_view {
            let reason = "the session's tap view goes with the session".to_owned();
            return Err(VmiError::InvalidArgument { what: "view", reason });
        }
        let index = self.views.iter().position(|known| *known == view).ok_or(VmiError::ViewNotFound { view })?;
        let taps = self.taps_in(view);
        let planted: Vec<TapId> = taps.iter().copied().filter(|tap| self.is_planted(*tap)).collect();
        let roots = self.roots.clone();
        let mut lifted = Vec::new();
        let lift = planted.iter().try_for_each(|tap| self.lift(*tap).map(|()| lifted.push(*tap)));
        if let Err(cause) = lift.and_then(|()| self.leave_and_destroy(view)) {
            // So that what roams is planted under all of them again.
            self.roots = roots;
            return Err(self.plant_again(&lifted, cause));
        }
        for tap in taps {
            self.forget_returns(tap);
            self.bury(tap);
        }
        self.views.remove(index);
        Ok(())
    }

    /// Plants what was lifted before `cause` happened.
    fn plant_again(&mut self, lifted: &[TapId], cause: VmiError) -> VmiError {
        let mut left = Left::default();
        for tap in lifted.iter().rev() {
            left.note(self.plant(*tap), || format!("tap {} not planted", tap.0));
        }
        left.after(cause)
    }

    /// Destroys a view in which there are no taps any more, once no vCPU needs it.
    fn leave_and_destroy(&mut self, view: View) -> Result<()> {
        let ids = (0..self.vcpus.len() as u16).map(VcpuId);
        let at: Vec<View> = ids.map(|vcpu| self.vmi.driver().vcpu_view(vcpu)).collect::<Result<_>>()?;
        let comes_back = self.vcpus.iter().any(|vcpu| vcpu.home == Some(view))
            || self.unanswered.iter().any(|(_, back)| back == view)
            || self.pending.as_ref().is_some_and(|pending| pending.home() == view);
        let is_used = comes_back || at.contains(&view);
        if is_used {
            self.refresh_view(self.tap_view)?;
        }
        self.tables.remove_view(&mut self.vmi, self.controller.rights(), view)?;
        let moved = if is_used { self.vmi.driver_mut().switch_to_view(self.tap_view) } else { Ok(()) };
        let destroyed = match moved {
            Ok(()) => self.vmi.driver_mut().destroy_view(view).map_err(|cause| (cause, is_used)),
            Err(cause) => Err((cause, false)),
        };
        let Err((cause, moved)) = destroyed else {
            if is_used {
                self.note_switch(self.tap_view);
            }
            return Ok(());
        };
        let mut left = Left::default();
        if moved {
            // Drivers put all vCPUs into a view or none.
            let back = at.first().filter(|first| at.iter().all(|view| view == *first));
            let undone = match back {
                Some(view) => self.vmi.driver_mut().switch_to_view(*view),
                None => Err(cause.clone()),
            };
            left.note(undone, || format!("every vCPU in view {}", self.tap_view));
        }
        let watched = self.tables.add_view(&mut self.vmi, self.controller.rights(), view);
        left.note(watched, || format!("page tables not watched in view {view}"));
        Err(left.after(cause))
    }

    /// Puts every vCPU into `view`, also those that stand still for an event or step elsewhere: they come back there.
    ///
    /// What the guest has written meanwhile to pages that are hidden only in `view` is brought there first; nobody is asked about it.
    ///
    /// # Errors
    /// [`VmiError::ViewNotFound`]; the driver's. Nothing is changed then.
    pub fn switch_to_view(&mut self, view: View) -> Result<()> {
        self.refresh_view(view)?;
        self.vmi.driver_mut().switch_to_view(view)?;
        self.note_switch(view);
        Ok(())
    }

    fn refresh_view(&mut self, view: View) -> Result<()> {
        let hidden: Vec<_> = self.controller.hidden_pages().filter(|(of, _)| *of == view).map(|(_, gfn)| gfn).collect();
        hidden.into_iter().try_for_each(|gfn| self.controller.refresh(&mut self.vmi, gfn))
    }

    fn note_switch(&mut self, view: View) {
        for vcpu in &mut self.vcpus {
            vcpu.home = vcpu.home.map(|_| view);
            vcpu.moved = Some(view);
        }
        self.unanswered.move_to(view);
        if let Some(pending) = &mut self.pending {
            pending.moved_to = Some(view);
        }
        // In the default view stores to page tables are not seen.
        self.tables.mark_all_dirty(None);
    }
}
