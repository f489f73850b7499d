//! Watches: ranges of bytes whose accesses are reported, by taking access rights away from their pages in a view.

use crate::addr::{Gfn, MemoryAccess, PAGE_SIZE, Pa, Va, View};
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};

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

impl<D: VmiDriver + ?Sized> Session<D> {
    /// Watches every page of the range, or on an error none.
    pub(super) fn watch(&mut self, tap: TapId, spec: &TapSpec, len: u64, access: MemoryAccess) -> Result<()> {
        let watched = self.watch_pages(tap, spec, len, access);
        let Err(cause) = watched else { return Ok(()) };
        Err(match self.unwatch(tap) {
            Ok(()) => cause,
            Err(error) => VmiError::UndoFailed { cause: Box::new(cause), left_behind: format!("a watch ({error})") },
        })
    }

    fn watch_pages(&mut self, tap: TapId, spec: &TapSpec, len: u64, access: MemoryAccess) -> Result<()> {
        let mut at = spec.va;
        let mut left = len;
        while left > 0 {
            let now = left.min(at.page_rest());
            let gfn = self.vmi.translate(at, spec.context)?.gfn();
            self.controller.rights().deny(&mut self.vmi, gfn, spec.view, access)?;
            let first = at.page_offset() as u16;
            let page = WatchPage { tap, access, first, last: first + (now - 1) as u16 };
            self.watches.entry((spec.view, gfn)).or_default().push(page);
            left -= now;
            at = Va(at.0.wrapping_add(now));
        }
        Ok(())
    }

    /// Gives the rights of every page of a watch back.
    pub(super) fn unwatch(&mut self, tap: TapId) -> Result<()> {
        let pages: Vec<(View, Gfn)> =
            self.watches.iter().filter(|(_, pages)| pages.iter().any(|page| page.tap == tap)).map(|(at, _)| *at).collect();
        for (view, gfn) in pages {
            while let Some(parts) = self.watches.get_mut(&(view, gfn)) {
                let Some(index) = parts.iter().position(|page| page.tap == tap) else { break };
                let Some(access) = parts.get(index).map(|page| page.access) else { break };
                self.controller.rights().allow(&mut self.vmi, gfn, view, access)?;
                parts.remove(index);
                if parts.is_empty() {
                    self.watches.remove(&(view, gfn));
                }
            }
        }
        Ok(())
    }

    /// Puts the watches that an access is for into `self.owners`; whether its page is watched at all.
    pub(super) fn find_watches(&mut self, view: View, pa: Pa, access: MemoryAccess) -> bool {
        let Some(pages) = self.watches.get(&(view, pa.gfn())) else { return false };
        let offset = (pa.0 & (PAGE_SIZE - 1)) as u16;
        let wanted = |page: &&WatchPage| page.access.intersects(access) && (page.first..=page.last).contains(&offset);
        self.owners.extend(pages.iter().filter(wanted).map(|page| page.tap));
        true
    }
}
