//! Breakpoints whose pages come and go: what the page-table monitor sees is carried to the manager.

use std::hash::Hash;

use crate::addr::{Gfn, Pa, Va, VcpuId};
use crate::arch::amd64::AddressContext;
use crate::core::VmiCore;
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};
use crate::event::{EventReason, VmiEvent};
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

    /// A vCPU is about to store to the page of an event: tables that it can reach are looked at when it is done.
    pub(super) fn note_store(&mut self, event: &VmiEvent) {
        if self.tables.is_empty() {
            return;
        }
        let EventReason::MemoryAccess { pa, va, .. } = event.reason else { return };
        self.tables.mark_dirty(Some(event.vcpu), pa.gfn());
        // Before the store: it may be the one that maps the page behind elsewhere.
        let Some(next) = va.and_then(|va| va.page().checked_add(crate::addr::PAGE_SIZE)) else { return };
        match self.vmi.translate(next, AddressContext::from(&event.registers)) {
            Ok(pa) => self.tables.mark_dirty(Some(event.vcpu), pa.gfn()),
            Err(VmiError::Translation { .. }) => {}
            // It can be any of them.
            Err(_) => self.tables.mark_all_dirty(Some(event.vcpu)),
        }
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

    /// The stores of that vCPU, which runs under `here`, are done: brings the breakpoints to where their addresses are mapped now.
    /// All are tried, whatever fails; those that failed are tried again next time.
    ///
    /// # Errors
    /// The driver's, the first one.
    pub(super) fn update_pages(&mut self, vcpu: Option<VcpuId>, here: Option<AddressContext>) -> Result<()> {
        let mut events = Vec::new();
        let mut failed = self.tables.process(&mut self.vmi, self.controller.rights(), vcpu, &mut events);
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
        for (va, context) in changed {
            if let Err(error) = self.follow_page(va, context, here) {
                self.owed.push((va, context));
                failed = failed.and(Err(error));
            }
        }
        failed
    }

    /// Brings the breakpoints of one address to where it is mapped.
    fn follow_page(&mut self, va: Va, context: AddressContext, here: Option<AddressContext>) -> Result<()> {
        let now = self.tables.mapped(va, context);
        let elsewhere: Vec<(TapId, Pa, bool)> = self
            .manager
            .owners(va, context.root)
            .filter_map(|found| Some((*found.key, found.pa.filter(|pa| Some(*pa) != now)?, found.global)))
            .collect();
        if let Some(here) = here.filter(|here| here.root != context.root) {
            for (tap, pa, _) in elsewhere.iter().filter(|(.., global)| *global) {
                self.move_global(*tap, *pa, context, here)?;
            }
        }
        if !elsewhere.is_empty() {
            self.manager.page_out(&mut self.vmi, &mut self.controller, va, context.root)?;
        }
        if let Some(pa) = now {
            self.manager.page_in(&mut self.vmi, &mut self.controller, va, context.root, pa)?;
        }
        Ok(())
    }

    /// A global breakpoint is not where it was under the tables it was inserted with. If it still is under those in use, they take
    /// over: what was given up is the tables (their process has ended), not the page.
    fn move_global(&mut self, tap: TapId, pa: Pa, from: AddressContext, to: AddressContext) -> Result<()> {
        let Some((view, va)) = self.spec(tap).map(|spec| (spec.view, spec.va)) else { return Ok(()) };
        if self.vmi.translate(va, to) != Ok(pa) {
            return Ok(());
        }
        self.follow(&[(va, to)])?;
        if !self.manager.move_root(view, va, from.root, to, &tap) {
            return self.unfollow((va, to));
        }
        if let Some(tap) = self.tap_mut(tap) {
            tap.spec.context = to;
        }
        self.unfollow((va, from))
    }
}
