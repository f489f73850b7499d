//! Watches: ranges of bytes whose accesses are reported, by taking access rights away from their pages in a view.

use crate::addr::{Gfn, MemoryAccess, PAGE_SIZE, Va, View};
use crate::arch::amd64::AddressContext;
use crate::driver::VmiDriver;
use crate::error::Result;
use crate::event::{EventReason, VmiEvent};

use super::{Session, TapId, TapSpec};

/// The part of a watch that lies in one page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WatchPage {
    pub tap: TapId,
    pub access: MemoryAccess,
    /// Offsets of its first and last byte in the page.
    pub first: u16,
    pub last: u16,
}

type Parts = Vec<((View, Gfn), WatchPage)>;

impl<D: VmiDriver + ?Sized> Session<D> {
    /// The parts of a watch by page, under the page tables of `context`.
    fn parts(&self, (tap, spec): (TapId, &TapSpec), len: u64, access: MemoryAccess, context: AddressContext) -> Result<Parts> {
        let mut parts = Vec::new();
        let (mut at, mut left) = (spec.va, len);
        while left > 0 {
            let now = left.min(at.page_rest());
            let gfn = self.vmi.translate(at, context)?.gfn();
            let first = at.page_offset() as u16;
            parts.push(((spec.view, gfn), WatchPage { tap, access, first, last: first + (now - 1) as u16 }));
            left -= now;
            at = Va(at.0.wrapping_add(now));
        }
        Ok(parts)
    }

    /// Watches every page of the range, or on an error none. One that is nobody's in particular and is enabled again may have outlived the root
    /// it was put in under: it is looked up under those in use then.
    pub(super) fn watch(&mut self, tap: TapId, spec: &TapSpec, len: u64, access: MemoryAccess) -> Result<()> {
        let parts = self.parts((tap, spec), len, access, spec.context).or_else(|error| {
            let others = if spec.global { self.roots_in_use()? } else { Vec::new() };
            others.iter().find_map(|other| self.parts((tap, spec), len, access, *other).ok()).ok_or(error)
        })?;
        let pages: Vec<_> = parts.iter().map(|(page, _)| *page).collect();
        self.controller.rights().deny_many(&mut self.vmi, &pages, access)?;
        for (page, part) in parts {
            self.watches.entry(page).or_default().push(part);
        }
        Ok(())
    }

    /// Gives the rights of every page of a watch back, or on an error of none.
    pub(super) fn unwatch(&mut self, tap: TapId) -> Result<()> {
        let mut pages = Vec::new();
        let mut denied = MemoryAccess::NONE;
        for (page, parts) in &self.watches {
            for part in parts.iter().filter(|part| part.tap == tap) {
                pages.push(*page);
                denied = part.access;
            }
        }
        self.controller.rights().allow_many(&mut self.vmi, &pages, denied)?;
        self.watches.retain(|_, parts| {
            parts.retain(|part| part.tap != tap);
            !parts.is_empty()
        });
        Ok(())
    }

    /// Puts the watches that an access is for into `self.owners`, each once; whether a page of it is watched at all. An access counts by its
    /// first byte on each of its pages: whoever watches the second one is not to miss what is told as of the first.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn find_watches(&mut self, event: &VmiEvent, view: View) -> Result<bool> {
        let EventReason::MemoryAccess { pa, access, len, .. } = event.reason else { return Ok(false) };
        // As an instruction it is told of on each page by itself.
        let is_data = !access.contains(MemoryAccess::X) && !self.watches.is_empty();
        let beyond = if is_data { self.beyond(event, len.into())? } else { None };
        let mut is_watched = false;
        for pa in [Some(pa), beyond.map(|part| part.first)].into_iter().flatten() {
            let Some(pages) = self.watches.get(&(view, pa.gfn())) else { continue };
            is_watched = true;
            let offset = (pa.0 & (PAGE_SIZE - 1)) as u16;
            for page in pages.iter().filter(|page| page.access.intersects(access) && (page.first..=page.last).contains(&offset)) {
                if !self.owners.contains(&page.tap) {
                    self.owners.push(page.tap);
                }
            }
        }
        Ok(is_watched)
    }
}
