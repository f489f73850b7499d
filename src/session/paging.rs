//! Breakpoints whose pages come and go: what the page-table monitor sees is carried to the manager.

use std::hash::Hash;

use crate::addr::{Gfn, Pa, Va, VcpuId};
use crate::arch::amd64::{AddressContext, Registers};
use crate::core::VmiCore;
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};
use crate::ptm::PageTableEvent;
use crate::tap::{BreakpointManager, TapController};

use super::{Session, TapId};

/// Carries events of a [`crate::ptm::PageTableMonitor`] out on a manager's breakpoints: those whose page went wait, and those whose page
/// came are planted. All events are tried, whatever fails. Returns how many breakpoints changed.
///
/// # Errors
/// The controller's, the first one; breakpoints of an event that failed are as they were before it.
pub fn handle_page_table_events<K, T, D, C>(
    manager: &mut BreakpointManager<K, T>,
    vmi: &mut VmiCore<D>,
    controller: &mut C,
    events: &[PageTableEvent],
) -> Result<usize>
where
    K: Eq + Hash + Clone,
    T: Clone,
    D: VmiDriver + ?Sized,
    C: TapController<D> + ?Sized,
{
    let (mut changed, mut failed) = (0, Ok(()));
    for event in events {
        let done = match *event {
            PageTableEvent::PageOut { va, context, .. } => manager.page_out(vmi, controller, va, context.root),
            PageTableEvent::PageIn { va, context, pa } => manager.page_in(vmi, controller, va, context.root, pa),
        };
        match done {
            Ok(count) => changed += count,
            Err(error) => failed = failed.and(Err(error)),
        }
    }
    failed.map(|()| changed)
}

impl<D: VmiDriver + ?Sized> Session<D> {
    /// Watches the tables of every address, or on an error of none. Returns where each is mapped.
    pub(super) fn follow(&mut self, addresses: &[(Va, AddressContext)]) -> Result<Vec<Option<Pa>>> {
        let mut mapped = Vec::with_capacity(addresses.len());
        for (va, context) in addresses {
            match self.tables.monitor(&mut self.vmi, self.controller.rights(), *va, *context) {
                Ok(pa) => mapped.push(pa),
                Err(cause) => return Err(self.unfollow_after(addresses.get(..mapped.len()).unwrap_or_default(), cause)),
            }
        }
        Ok(mapped)
    }

    pub(super) fn unfollow(&mut self, (va, context): (Va, AddressContext)) -> Result<()> {
        self.tables.unmonitor(&mut self.vmi, self.controller.rights(), va, context).map(drop)
    }

    /// Takes [`Self::follow`] back after `cause`.
    pub(super) fn unfollow_after(&mut self, addresses: &[(Va, AddressContext)], cause: VmiError) -> VmiError {
        let mut left = crate::undo::Left::default();
        for at in addresses.iter().rev() {
            left.note(self.unfollow(*at), || format!("page tables of {} watched", at.0));
        }
        left.after(cause)
    }

    /// These pages were written from outside the guest.
    pub(super) fn tables_written(&mut self, pages: impl Iterator<Item = Gfn>) {
        pages.for_each(|gfn| self.tables.mark_dirty(None, gfn));
        if let Err(error) = self.update_pages(None, None) {
            // It is tried again, and told, when the guest is to run.
            log::warn!("breakpoints could not follow a write to page tables: {error}");
        }
    }

    /// Whether [`Self::update_pages`] has something to do.
    pub(super) fn has_page_changes(&self, vcpu: Option<VcpuId>) -> bool {
        self.tables.is_dirty(vcpu) || (vcpu.is_none() && !self.owed.is_empty())
    }

    /// The stores of that vCPU are done: brings the breakpoints to where their addresses are mapped now. All are tried, whatever fails;
    /// those that failed are tried again next time.
    ///
    /// # Errors
    /// The driver's, the first one.
    pub(super) fn update_pages(&mut self, vcpu: Option<VcpuId>, registers: Option<&Registers>) -> Result<()> {
        let mut failed = match (vcpu, registers) {
            (Some(vcpu), Some(registers)) if !self.roots.is_empty() => self.leave_dead_roots(vcpu, registers),
            _ => Ok(()),
        };
        let mut events = Vec::new();
        failed = failed.and(self.tables.process(&mut self.vmi, self.controller.rights(), vcpu, &mut events));
        let mut changed = std::mem::take(&mut self.owed);
        for event in events {
            match event {
                PageTableEvent::PageOut { .. } => self.stats.page_outs += 1,
                PageTableEvent::PageIn { .. } => self.stats.page_ins += 1,
            }
            if !changed.contains(&event.address()) {
                changed.push(event.address());
            }
        }
        if changed.is_empty() {
            return failed;
        }
        for (va, context) in changed {
            if let Err(error) = self.settle_pages(va, context, registers) {
                self.owed.push((va, context));
                failed = failed.and(Err(error));
            }
        }
        failed.and(self.track_roots(self.taps.roaming() > 0).map(drop))
    }

    /// Brings the breakpoints of one address to where it is mapped.
    fn settle_pages(&mut self, va: Va, context: AddressContext, registers: Option<&Registers>) -> Result<()> {
        let now = self.tables.mapped(va, context);
        let owners = self.manager.owners(va, context.root).map(|found| (found.key.tap(), found.pa, found.global));
        let owners: Vec<(TapId, Option<Pa>, bool)> = owners.collect();
        let is_elsewhere = |pa: &Option<Pa>| pa.is_some() && *pa != now;
        let moved = owners.iter().filter(|(_, pa, global)| *global && is_elsewhere(pa)).map(|(tap, ..)| *tap);
        if let Some(registers) = registers {
            self.move_on(&moved.collect::<Vec<_>>(), context, registers)?;
        }
        if owners.iter().any(|(_, pa, _)| is_elsewhere(pa)) {
            self.manager.page_out(&mut self.vmi, &mut self.controller, va, context.root)?;
        }
        if let Some(pa) = now {
            self.manager.page_in(&mut self.vmi, &mut self.controller, va, context.root, pa)?;
        }
        for (tap, ..) in owners.iter().filter(|(.., global)| *global) {
            self.review_roaming(*tap);
        }
        Ok(())
    }
}
