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

/// Frames taken at once at first where fewer are asked for.
const FEWEST: u64 = 8;
/// Frames taken at once later where fewer are asked for.
const MOST: u64 = 256;
/// Frames taken in one call.
const LARGEST: u64 = 4096;
/// All rights.
const ALL: u8 = 7;
/// Execute only.
const EXECUTE: u8 = 4;
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
    /// It may have more now.
    is_limit_raised: bool,
    /// The rights frames have in views, where these are not all.
    rights: FxHashMap<(u16, u64), u8>,
}

impl Frames {
    pub fn new(domain: u32, first: u64, limit_kib: u64) -> Self {
        Self {
            domain,
            first,
            next: first,
            batch: FEWEST,
            free: BTreeSet::new(),
            used: FxHashSet::default(),
            adopted: BTreeSet::new(),
            limit_kib,
            is_limit_raised: false,
            rights: FxHashMap::default(),
        }
    }

    /// Whether the frame is taken.
    pub fn is_used(&self, gfn: Gfn) -> bool {
        self.used.contains(&gfn.0)
    }

    /// Whether the frame is ours, and not taken.
    pub fn is_free(&self, gfn: Gfn) -> bool {
        self.free.contains(&gfn.0)
    }

    /// Takes a pool over that another program has made: the frames that are there, and those that count as taken, which may be gone already.
    pub fn adopt(&mut self, taken: &[Gfn], pool: &[Gfn]) {
        self.used.extend(taken.iter().map(|frame| frame.0));
        let before = self.adopted.len();
        self.adopted.extend(pool.iter().map(|frame| frame.0).filter(|frame| *frame < self.first));
        // That program has raised the domain's limit by as much as it added.
        self.is_limit_raised = true;
        self.limit_kib = self.limit_kib.saturating_sub((self.adopted.len() - before) as u64 * PAGE_KIB);
    }

    pub fn in_use(&self) -> usize {
        self.used.len()
    }

    /// Takes the lowest free frames, or none.
    pub fn allocate(&mut self, control: &Control, pages: &Pages, count: usize) -> Result<Vec<Gfn>> {
        while self.free.len() < count {
            let missing = (count - self.free.len()) as u64;
            self.grow(control, pages, missing.clamp(self.batch, LARGEST))?;
        }
        let taken: Vec<u64> = self.free.iter().copied().take(count).collect();
        for frame in &taken {
            self.free.remove(frame);
            self.used.insert(*frame);
        }
        Ok(taken.into_iter().map(Gfn).collect())
    }

    /// Takes more memory for the domain: three calls for a whole batch.
    fn grow(&mut self, control: &Control, pages: &Pages, count: u64) -> Result<()> {
        let (granted, mut count) = (self.next - self.first, count);
        loop {
            let frames: Vec<u64> = (self.next..self.next + count).collect();
            self.is_limit_raised = true;
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
                    self.batch = (count * 2).min(MOST);
                    return Ok(());
                }
                // Less may be there.
                Err(_) if count > 1 => count /= 2,
                Err(error) => return Err(super::failed(&error)),
            }
        }
    }

    /// Gives frames back to the pool: all or none.
    pub fn free(&mut self, frames: &[Gfn]) -> Result<()> {
        let mut seen = BTreeSet::new();
        for frame in frames {
            if !self.used.contains(&frame.0) || !seen.insert(frame.0) {
                let reason = format!("frame {frame} is not allocated, or there twice");
                return Err(VmiError::InvalidArgument { what: "frame", reason });
            }
        }
        for frame in seen {
            self.used.remove(&frame);
            // One that another program has added is not part of the pool: it goes with the others, at the end.
            if frame >= self.first {
                self.free.insert(frame);
            }
        }
        Ok(())
    }

    /// Gives a frame the rights in a view that the page is to have that will show it, before it does: `change_gfn` takes the rights over
    /// from the frame, so there is no moment at which the page could be read. Frames that no view has met get them in the same call.
    pub fn arm(&mut self, control: &Control, view: u16, frame: Gfn, rights: u8, is_shown: impl Fn(Gfn) -> bool) -> Result<()> {
        if self.rights.get(&(view, frame.0)).copied().unwrap_or(ALL) == rights {
            return Ok(());
        }
        let is_new = |other: &u64| *other != frame.0 && !self.rights.contains_key(&(view, *other)) && !is_shown(Gfn(*other));
        let mut batch = vec![(frame.0, rights)];
        batch.extend((self.first..self.next).filter(is_new).take(LARGEST as usize).map(|other| (other, rights)));
        let set = control.altp2m_set_mem_access_multi(self.domain, view, &batch).map_err(|error| super::failed(&error));
        for (frame, rights) in batch {
            // After an error nobody knows which ones were set.
            self.rights.insert((view, frame), if set.is_ok() { rights } else { UNKNOWN });
        }
        set
    }

    /// Has frames ready for a new view: with the rights a page with breakpoints has, so that the first one costs no more than others.
    pub fn prepare(&mut self, control: &Control, pages: &Pages, view: u16) -> Result<()> {
        if self.free.is_empty() {
            self.grow(control, pages, self.batch)?;
        }
        let Some(first) = self.free.first().copied() else { return Ok(()) };
        let used = self.used.clone();
        self.arm(control, view, Gfn(first), EXECUTE, |frame| used.contains(&frame.0))
    }

    /// The view is gone.
    pub fn forget_view(&mut self, view: u16) {
        self.rights.retain(|(in_view, _), _| *in_view != view);
    }

    /// Gives all memory back. To be called when no view is left; what fails is returned, and tried again the next time.
    pub fn release(&mut self, control: &Control) -> Vec<xen_sys::Error> {
        let frames: Vec<u64> = self.adopted.iter().copied().chain(self.first..self.next).collect();
        if !frames.is_empty() {
            if let Err(error) = control.depopulate(self.domain, &frames) {
                return vec![error];
            }
            self.next = self.first;
            self.adopted.clear();
            self.free.clear();
            self.used.clear();
            self.rights.clear();
        }
        if self.is_limit_raised
            && let Err(error) = control.set_max_memory(self.domain, self.limit_kib)
        {
            return vec![error];
        }
        self.is_limit_raised = false;
        Vec::new()
    }
}
