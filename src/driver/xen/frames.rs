//! The pool of frames for shadow pages.
//!
//! Frames lie above the guest's highest one, contiguous, and are given back only when all views are gone: taking away any frame between the
//! lowest and the highest one that a view shows throws the whole view's map away (`p2m_altp2m_propagate_change` in arch/x86/mm/altp2m.c).

use std::collections::BTreeSet;

use rustc_hash::{FxHashMap, FxHashSet};
use xen_sys::Control;

use super::pages::Pages;
use crate::addr::Gfn;
use crate::error::{Result, VmiError};

/// Frames taken at once at first, and at most.
const BATCH: std::ops::RangeInclusive<u64> = 8..=256;
/// All rights.
const ALL: u8 = 7;
/// Stands for rights that are not known.
const UNKNOWN: u8 = u8::MAX;
/// KiB of a page.
const PAGE_KIB: u64 = 4;

/// The pool.
pub struct Frames {
    domain: u32,
    first: u64,
    next: u64,
    batch: u64,
    free: BTreeSet<u64>,
    used: FxHashSet<u64>,
    /// Frames below `first` that another program has added.
    adopted: BTreeSet<u64>,
    /// The memory the domain might have before, in KiB.
    limit_kib: u64,
    /// The rights frames have in views, where these are not all.
    rights: FxHashMap<(u16, u64), u8>,
}

impl Frames {
    pub fn new(domain: u32, first: u64, limit_kib: u64) -> Self {
        Self {
            domain,
            first,
            next: first,
            batch: *BATCH.start(),
            free: BTreeSet::new(),
            used: FxHashSet::default(),
            adopted: BTreeSet::new(),
            limit_kib,
            rights: FxHashMap::default(),
        }
    }

    /// Whether the frame is taken.
    pub fn is_used(&self, gfn: Gfn) -> bool {
        self.used.contains(&gfn.0)
    }

    /// The frames that are taken, in no order.
    pub fn used(&self) -> impl Iterator<Item = Gfn> {
        self.used.iter().copied().map(Gfn)
    }

    /// Takes frames over that another program has added. The lowest one.
    pub fn adopt(&mut self, frames: &[Gfn]) -> Option<Gfn> {
        let lowest = frames.iter().min().copied()?;
        self.used.extend(frames.iter().map(|frame| frame.0));
        self.adopted.extend(frames.iter().map(|frame| frame.0).filter(|frame| *frame < self.first));
        Some(lowest)
    }

    pub fn in_use(&self) -> usize {
        self.used.len()
    }

    pub fn allocate(&mut self, control: &Control, pages: &Pages) -> Result<Gfn> {
        if self.free.is_empty() {
            self.grow(control, pages)?;
        }
        let frame = self.free.pop_first().ok_or_else(|| VmiError::Driver {
            op: "allocating a frame",
            errno: xen_sys::errno::ENOMEM,
            detail: "the pool is empty".to_owned(),
        })?;
        self.used.insert(frame);
        Ok(Gfn(frame))
    }

    /// Takes more memory for the domain: three calls for a whole batch.
    fn grow(&mut self, control: &Control, pages: &Pages) -> Result<()> {
        let (granted, mut count) = (self.next - self.first, self.batch);
        loop {
            let frames: Vec<u64> = (self.next..self.next + count).collect();
            let populated = control
                .set_max_memory(self.domain, self.limit_kib + (granted + count) * PAGE_KIB)
                .and_then(|()| control.populate(self.domain, &frames));
            match populated {
                Ok(()) => {
                    if let Err(error) = pages.pin(&frames) {
                        // No view shows one of these yet, and all lie above those that one does.
                        if let Err(left) = control.depopulate(self.domain, &frames) {
                            log::error!("{count} frames from {:#x} on stay with domain {}: {left}", self.next, self.domain);
                        }
                        return Err(super::failed(&error));
                    }
                    self.next += count;
                    self.free.extend(frames);
                    self.batch = (count * 2).min(*BATCH.end());
                    return Ok(());
                }
                // Less may be there.
                Err(_) if count > 1 => count /= 2,
                Err(error) => return Err(super::failed(&error)),
            }
        }
    }

    /// Gives a frame back to the pool.
    pub fn free(&mut self, frame: Gfn) -> Result<()> {
        if !self.used.remove(&frame.0) {
            return Err(VmiError::InvalidArgument { what: "frame", reason: format!("frame {frame} is not allocated") });
        }
        self.free.insert(frame.0);
        Ok(())
    }

    /// Gives a frame the rights in a view that the page is to have that will show it, before it does: `change_gfn` takes the rights over
    /// from the frame, so there is no moment at which the page could be read. Free frames get them in the same call, for later.
    pub fn arm(&mut self, control: &Control, view: u16, frame: Gfn, rights: u8) -> Result<()> {
        let has = |frame: u64| self.rights.get(&(view, frame)).copied().unwrap_or(ALL);
        if has(frame.0) == rights {
            return Ok(());
        }
        let mut batch = vec![(frame.0, rights)];
        batch.extend(self.free.iter().filter(|free| has(**free) != rights).map(|free| (*free, rights)));
        let set = control.altp2m_set_mem_access_multi(self.domain, view, &batch).map_err(|error| super::failed(&error));
        for (frame, rights) in batch {
            // After an error nobody knows which ones were set.
            self.rights.insert((view, frame), if set.is_ok() { rights } else { UNKNOWN });
        }
        set
    }

    /// The view is gone.
    pub fn forget_view(&mut self, view: u16) {
        self.rights.retain(|(in_view, _), _| *in_view != view);
    }

    /// Gives all memory back. To be called when no view is left; what fails is returned, and everything is tried.
    pub fn release(&mut self, control: &Control) -> Vec<xen_sys::Error> {
        let frames: Vec<u64> = self.adopted.iter().copied().chain(self.first..self.next).collect();
        if frames.is_empty() {
            return Vec::new();
        }
        self.next = self.first;
        self.adopted.clear();
        self.free.clear();
        self.used.clear();
        self.rights.clear();
        let results = [control.depopulate(self.domain, &frames), control.set_max_memory(self.domain, self.limit_kib)];
        results.into_iter().filter_map(xen_sys::Result::err).collect()
    }
}
