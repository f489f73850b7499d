//! The guest's memory: frames mapped into this process, few at a time.
//!
//! A mapping keeps the frame it was made of, whatever the guest's map says later (ballooning, say). So a mapping is used for seconds only and
//! then made anew, and none outlives the domain.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;
use xen_sys::{ForeignMemory, Mapping, errno};

use crate::addr::{Gfn, PAGE_SIZE, Pa};
use crate::error::{Result, VmiError};

/// Pages that stay mapped.
const ROOM: usize = 4096;
/// How long a mapping is used.
const LIFE: Duration = Duration::from_secs(5);

enum Page {
    /// A mapping of its own.
    Own {
        mapping: Mapping,
        /// The period it was made in.
        born: u32,
        used: Cell<bool>,
    },
    /// A frame of the pool, which stays: which mapping, and which page of it.
    Pinned(usize, usize),
}

#[derive(Default)]
struct Cache {
    pages: FxHashMap<u64, Page>,
    pinned: Vec<Mapping>,
    /// Those that can be dropped, the oldest first.
    order: VecDeque<u64>,
}

/// The memory of one domain.
pub struct Pages {
    foreign: ForeignMemory,
    domain: u32,
    cache: RefCell<Cache>,
    period: Cell<u32>,
    period_began: Cell<Instant>,
    maps: Cell<u64>,
}

impl Pages {
    pub fn new(foreign: ForeignMemory, domain: u32) -> Self {
        Self {
            foreign,
            domain,
            cache: RefCell::default(),
            period: Cell::new(0),
            period_began: Cell::new(Instant::now()),
            maps: Cell::new(0),
        }
    }

    pub const fn foreign(&self) -> &ForeignMemory {
        &self.foreign
    }

    /// Map calls so far.
    pub fn maps(&self) -> u64 {
        self.maps.get()
    }

    /// Lets mappings age. Called once a wait.
    pub fn age(&self, now: Instant) {
        if now.saturating_duration_since(self.period_began.get()) >= LIFE {
            self.period_began.set(now);
            self.period.set(self.period.get().wrapping_add(1));
        }
    }

    /// Drops every mapping.
    pub fn clear(&self) {
        *self.cache.borrow_mut() = Cache::default();
    }

    /// Maps frames of the pool, to stay.
    pub fn pin(&self, frames: &[u64]) -> xen_sys::Result<()> {
        let mapping = self.map(frames)?;
        let cache = &mut *self.cache.borrow_mut();
        let chunk = cache.pinned.len();
        cache.pinned.push(mapping);
        for (index, frame) in frames.iter().enumerate() {
            cache.pages.insert(*frame, Page::Pinned(chunk, index));
        }
        Ok(())
    }

    fn map(&self, frames: &[u64]) -> xen_sys::Result<Mapping> {
        self.maps.set(self.maps.get() + 1);
        self.foreign.map(self.domain, frames)
    }

    /// Does something with the page of a frame.
    fn with<T>(&self, gfn: Gfn, what: impl FnOnce(&Mapping, usize) -> Option<T>) -> Result<T> {
        let cache = &mut *self.cache.borrow_mut();
        let period = self.period.get();
        let is_fresh = |page: &Page| match page {
            Page::Own { born, .. } => period.wrapping_sub(*born) < 2,
            Page::Pinned(..) => true,
        };
        if !cache.pages.get(&gfn.0).is_some_and(is_fresh) {
            let mapping = self.map(&[gfn.0]).map_err(|error| self.unmapped(gfn, &error))?;
            cache.make_room();
            let page = Page::Own { mapping, born: period, used: Cell::new(true) };
            if cache.pages.insert(gfn.0, page).is_none() {
                cache.order.push_back(gfn.0);
            }
        }
        let out = || VmiError::OutOfRange { pa: gfn.pa(0), len: PAGE_SIZE, end: gfn.pa(0) };
        let found = match cache.pages.get(&gfn.0).ok_or_else(out)? {
            Page::Own { mapping, used, .. } => {
                used.set(true);
                what(mapping, 0)
            }
            Page::Pinned(chunk, index) => cache.pinned.get(*chunk).and_then(|mapping| what(mapping, index * PAGE_SIZE as usize)),
        };
        found.ok_or_else(out)
    }

    fn unmapped(&self, gfn: Gfn, error: &xen_sys::Error) -> VmiError {
        match error.errno {
            errno::ESRCH => VmiError::DomainGone { reason: format!("domain {} does not exist any more", self.domain) },
            // A hole in the guest's memory, as Linux tells it (drivers/xen/privcmd.c).
            errno::EINVAL | errno::ENOENT => VmiError::OutOfRange { pa: gfn.pa(0), len: PAGE_SIZE, end: gfn.pa(0) },
            _ => super::failed(error),
        }
    }

    /// Copies bytes of one page out.
    pub fn read(&self, pa: Pa, buf: &mut [u8]) -> Result<()> {
        self.with(pa.gfn(), |mapping, at| mapping.read(at + pa.page_offset() as usize, buf))
    }

    /// Copies bytes into one page.
    pub fn write(&self, pa: Pa, bytes: &[u8]) -> Result<()> {
        self.with(pa.gfn(), |mapping, at| mapping.write(at + pa.page_offset() as usize, bytes))
    }

    /// Makes sure that a page can be written.
    pub fn touch(&self, gfn: Gfn) -> Result<()> {
        self.with(gfn, |_, _| Some(()))
    }
}

impl Cache {
    /// Drops a page that was not used of late, if there are too many (second chance).
    fn make_room(&mut self) {
        while self.order.len() >= ROOM {
            let Some(oldest) = self.order.pop_front() else { return };
            match self.pages.get(&oldest) {
                Some(Page::Own { used, .. }) if used.replace(false) => self.order.push_back(oldest),
                Some(Page::Own { .. }) => {
                    self.pages.remove(&oldest);
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use xen_sys::fake::{DOMAIN, Fake, Kind};

    use super::*;

    #[test]
    fn a_mapping_is_made_anew_when_it_is_old_and_those_of_the_pool_stay() {
        let fake = Fake::new(Kind::ALL[1]);
        let xen = xen_sys::Xen::open_named(fake.path(), |_, _| {}).unwrap();
        let pages = Pages::new(xen.foreign_memory().unwrap(), DOMAIN);
        pages.pin(&[5, 6]).unwrap();
        let look = |expected| {
            for gfn in [3, 5, 6] {
                pages.touch(Gfn(gfn)).unwrap();
            }
            assert_eq!((pages.maps(), fake.state("maps", 0)), expected);
        };
        let began = pages.period_began.get();
        look((2, 2));
        pages.age(began + LIFE);
        look((2, 2));
        pages.age(began + LIFE + Duration::from_millis(1));
        look((2, 2));
        pages.age(began + LIFE * 2);
        look((3, 2));
        pages.clear();
        assert_eq!(fake.state("maps", 0), 0);
    }
}
