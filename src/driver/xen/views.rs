//! Views and the rights of pages in them. What was set is remembered: asking for it costs no call, and a host-wide change can be repaired.

use rustc_hash::FxHashMap;
use xen_sys::errno;
use xen_sys::types::access;

use super::XenDriver;
use crate::addr::{Gfn, MemoryAccess, PAGE_SHIFT, VcpuId, View};
use crate::driver::{VmiProtection, VmiViews};
use crate::error::{Result, VmiError};

/// What `change_gfn` takes for "the page's own".
const OWN: u64 = u64::MAX;
/// Pages whose rights are set in one call when a view without all rights is made.
const CHUNK: u64 = 1024;

/// One page of a view that is not as it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Page {
    pub rights: MemoryAccess,
    pub frame: Option<Gfn>,
}

/// One view.
#[derive(Debug, Default)]
pub struct ViewBook {
    rights: MemoryAccess,
    pages: FxHashMap<Gfn, Page>,
    /// How many pages deny writes.
    unwritable: usize,
    /// How many pages show each frame.
    shown: FxHashMap<Gfn, u32>,
}

impl ViewBook {
    /// A view that another program has made: what is in it is not known.
    pub fn adopted() -> Self {
        Self { rights: MemoryAccess::RWX, ..Self::default() }
    }

    fn page(&self, gfn: Gfn) -> Page {
        self.pages.get(&gfn).copied().unwrap_or(Page { rights: self.rights, frame: None })
    }

    fn set(&mut self, gfn: Gfn, page: Page) {
        let denies = |page: Page| usize::from(!page.rights.contains(MemoryAccess::W));
        let before = self.pages.get(&gfn).copied().map_or(0, denies);
        if let Some(count) = self.page(gfn).frame.and_then(|frame| self.shown.get_mut(&frame)) {
            *count -= 1;
        }
        if let Some(frame) = page.frame {
            *self.shown.entry(frame).or_default() += 1;
        }
        if page == (Page { rights: self.rights, frame: None }) {
            self.pages.remove(&gfn);
            self.unwritable -= before;
        } else {
            self.pages.insert(gfn, page);
            self.unwritable = self.unwritable + denies(page) - before;
        }
    }

    /// Whether any page shows the frame.
    pub fn shows(&self, frame: Gfn) -> bool {
        self.shown.get(&frame).is_some_and(|count| *count > 0)
    }

    /// Whether the page shows its own frame, and can be executed.
    pub fn shows_own_code(&self, gfn: Gfn) -> bool {
        let page = self.page(gfn);
        page.frame.is_none() && page.rights.contains(MemoryAccess::X)
    }

    /// Whether a store to some page would be denied.
    pub const fn denies_writes(&self) -> bool {
        self.unwritable > 0 || !self.rights.contains(MemoryAccess::W)
    }

    /// Whether a store to this page would be denied.
    pub fn denies_write(&self, gfn: Gfn) -> bool {
        !self.page(gfn).rights.contains(MemoryAccess::W)
    }
}

/// The bits are the same three, in the same order (public/memory.h).
fn number(rights: MemoryAccess) -> i32 {
    i32::from(rights.bits())
}

const _: () = assert!(access::R == 1 && access::W == 2 && access::X == 4 && access::RWX == 7);

/// Second-level tables know no page that can be written and not read (Intel SDM vol. 3, "EPT Misconfigurations").
fn check_rights(view: View, gfn: Gfn, rights: MemoryAccess) -> Result<()> {
    if rights.contains(MemoryAccess::W) && !rights.contains(MemoryAccess::R) {
        return Err(VmiError::BadAccess { view, gfn, access: rights });
    }
    Ok(())
}

impl XenDriver {
    pub(super) fn has_view(&self, view: View) -> bool {
        view == View::DEFAULT || self.views.contains_key(&view.0)
    }

    /// Letting go of the domain has removed the view: what is still to be taken out of it is out.
    fn is_taken_back(&self, view: View) -> bool {
        self.has_ended && self.gone.get().is_none() && !self.has_view(view)
    }

    pub(super) fn check_view(&self, view: View) -> Result<()> {
        if self.has_view(view) { Ok(()) } else { Err(VmiError::ViewNotFound { view }) }
    }

    fn book(&self, view: View) -> Result<&ViewBook> {
        self.views.get(&view.0).ok_or(VmiError::ViewNotFound { view })
    }

    fn book_mut(&mut self, view: View) -> Result<&mut ViewBook> {
        self.views.get_mut(&view.0).ok_or(VmiError::ViewNotFound { view })
    }

    /// Sets rights in a view, page by page or all at once.
    fn set_in_view(&self, view: View, pages: &[(Gfn, MemoryAccess)]) -> xen_sys::Result<()> {
        let control = self.xen.control();
        match pages {
            [] => Ok(()),
            [(gfn, rights)] => control.altp2m_set_mem_access(self.domain, view.0, gfn.0, number(*rights)),
            several => {
                let list: Vec<(u64, u8)> = several.iter().map(|(gfn, rights)| (gfn.0, rights.bits())).collect();
                control.altp2m_set_mem_access_multi(self.domain, view.0, &list)
            }
        }
    }

    /// A hole has no rights.
    fn no_rights(&self, gfn: Gfn, error: &xen_sys::Error) -> VmiError {
        if error.errno == errno::ESRCH
            && self.xen.control().domain(self.domain).is_ok_and(|info| self.why_gone(info.as_ref()).is_none())
        {
            let end = crate::addr::Pa(self.info.memory_size);
            return VmiError::OutOfRange { pa: gfn.pa(0), len: crate::addr::PAGE_SIZE, end };
        }
        self.failed(error)
    }

    /// The rights of every page of a new view that is not to begin with all rights. Up to 4.18 Xen forgets a view's default for pages it meets
    /// later, so each page gets its own; holes are passed over.
    fn fill_view(&self, view: View, rights: MemoryAccess) -> Result<()> {
        let end = self.info.memory_size >> PAGE_SHIFT;
        let mut first = 0;
        while first < end {
            let chunk: Vec<(Gfn, MemoryAccess)> = (first..(first + CHUNK).min(end)).map(|gfn| (Gfn(gfn), rights)).collect();
            match self.set_in_view(view, &chunk) {
                Err(error) if error.errno == errno::ESRCH => {
                    for page in &chunk {
                        match self.set_in_view(view, std::slice::from_ref(page)) {
                            Err(error) if error.errno != errno::ESRCH => return Err(self.failed(&error)),
                            _ => {}
                        }
                    }
                }
                result => result.map_err(|error| self.failed(&error))?,
            }
            first += CHUNK;
        }
        Ok(())
    }

    /// Makes a page of a view again what it is to be, after its entry was lost.
    fn restore_page(&self, view: View, gfn: Gfn, page: Page) -> xen_sys::Result<()> {
        if let Some(frame) = page.frame {
            // The frame has kept its rights in the view, which the page takes over.
            self.xen.control().altp2m_change_gfn(self.domain, view.0, gfn.0, frame.0)?;
        }
        self.set_in_view(view, &[(gfn, page.rights)])
    }

    /// Sets rights in the default view. Xen writes them through to every other view, over what was there (`p2m_altp2m_propagate_change`), so
    /// nobody runs until those are as they were.
    fn set_default_access(&self, gfn: Gfn, rights: MemoryAccess) -> Result<()> {
        let result = self.paused(|driver| {
            let mut result = driver.xen.control().set_mem_access(driver.domain, number(rights), gfn.0, 1);
            for (view, book) in &driver.views {
                if let Some(page) = book.pages.get(&gfn) {
                    result = driver.restore_page(View(*view), gfn, *page).and(result);
                }
            }
            result
        });
        result.map_err(|error| self.no_rights(gfn, &error))
    }
}

impl VmiViews for XenDriver {
    fn create_view(&mut self, access: MemoryAccess) -> Result<View> {
        self.check_alive()?;
        check_rights(View::DEFAULT, Gfn(0), access)?;
        let control = self.xen.control();
        let view = control.altp2m_create_view(self.domain, number(MemoryAccess::RWX)).map_err(|error| match error.errno {
            errno::EINVAL => VmiError::Driver {
                op: error.op,
                errno: error.errno,
                detail: format!("there is no room for another view beside {}", self.views.len()),
            },
            _ => self.failed(&error),
        })?;
        let view = View(view);
        if access != MemoryAccess::RWX
            && let Err(error) = self.fill_view(view, access)
        {
            let left = control.altp2m_destroy_view(self.domain, view.0).err().map(|left| format!("view {view} ({left})"));
            return Err(error.and_left(left.as_slice()));
        }
        self.views.insert(view.0, ViewBook { rights: access, ..ViewBook::default() });
        if let Err(error) = self.frames.prepare(self.xen.control(), &self.pages, view.0) {
            // Whoever needs a frame will be told.
            log::debug!("no frames are ready for view {view}: {error}");
        }
        Ok(view)
    }

    fn destroy_view(&mut self, view: View) -> Result<()> {
        if view == View::DEFAULT {
            return Err(VmiError::DefaultView { op: "destroying a view" });
        }
        if self.is_taken_back(view) {
            return Ok(());
        }
        self.book(view)?;
        self.check_alive()?;
        self.settle();
        self.xen.control().altp2m_destroy_view(self.domain, view.0).map_err(|error| self.failed(&error))?;
        self.views.remove(&view.0);
        self.frames.forget_view(view.0);
        Ok(())
    }

    fn switch_to_view(&mut self, view: View) -> Result<()> {
        self.check_view(view)?;
        self.check_alive()?;
        // A step that is under way would bring its vCPU back to where it came from.
        self.settle();
        let (domain, control) = (self.domain, self.xen.control());
        control.altp2m_switch_to_view(domain, view.0).map_err(|error| self.failed(&error))?;
        for vcpu in &mut self.vcpus {
            vcpu.moved(view);
        }
        Ok(())
    }

    fn vcpu_view(&self, vcpu: VcpuId) -> Result<View> {
        let slot = self.vcpu(vcpu)?;
        self.check_alive()?;
        if let Some(view) = slot.held.as_ref().map(super::run::Held::view) {
            return Ok(view);
        }
        let view = self.xen.control().altp2m_vcpu_view(self.domain, vcpu.0.into()).map_err(|error| self.failed(&error))?;
        Ok(slot.home(View(view)))
    }

    fn remap(&mut self, view: View, gfn: Gfn, frame: Option<Gfn>) -> Result<()> {
        if view == View::DEFAULT {
            return Err(VmiError::DefaultView { op: "remapping a page" });
        }
        if frame.is_none() && self.is_taken_back(view) {
            return Ok(());
        }
        let page = self.book(view)?.page(gfn);
        self.check_alive()?;
        self.check_range(gfn.pa(0), 1)?;
        if page.frame.is_some() && page.frame != frame {
            self.settle_emulations();
        }
        let (domain, control) = (self.domain, self.xen.control());
        match frame {
            Some(frame) => {
                self.check_range(frame.pa(0), 1)?;
                let rights = page.rights.bits();
                if self.frames.is_used(frame) {
                    // `change_gfn` gives the page the frame's rights in the view: they are right before the page is shown.
                    let views = &self.views;
                    let is_shown = |other: Gfn| views.values().any(|book| book.shows(other));
                    let armed = self.frames.arm(control, view.0, frame, rights, is_shown);
                    armed.map_err(|error| self.unless_gone(error))?;
                    control.altp2m_change_gfn(domain, view.0, gfn.0, frame.0).map_err(|error| self.failed(&error))?;
                } else {
                    // A page of the guest's own may be in use with rights of its own; nobody runs in between.
                    self.paused(|driver| {
                        let control = driver.xen.control();
                        control.altp2m_change_gfn(domain, view.0, gfn.0, frame.0)?;
                        control.altp2m_set_mem_access(domain, view.0, gfn.0, rights.into())
                    })
                    .map_err(|error| self.failed(&error))?;
                }
            }
            None if page.frame.is_none() => return Ok(()),
            None if page.rights == MemoryAccess::RWX => {
                control.altp2m_change_gfn(domain, view.0, gfn.0, OWN).map_err(|error| self.failed(&error))?;
            }
            None => {
                // The page's own comes back with all rights; nobody runs until it has its own again.
                self.paused(|driver| {
                    let control = driver.xen.control();
                    control.altp2m_change_gfn(domain, view.0, gfn.0, OWN)?;
                    let set = control.altp2m_set_mem_access(domain, view.0, gfn.0, number(page.rights));
                    set.inspect_err(|_| {
                        if let Err(left) = driver.restore_page(view, gfn, page) {
                            log::error!("page {gfn} of view {view} shows its own frame with all rights: {left}");
                        }
                    })
                })
                .map_err(|error| self.failed(&error))?;
            }
        }
        self.book_mut(view)?.set(gfn, Page { frame, ..page });
        Ok(())
    }
}

impl VmiProtection for XenDriver {
    fn memory_access(&self, view: View, gfn: Gfn) -> Result<MemoryAccess> {
        self.check_view(view)?;
        self.check_range(gfn.pa(0), 1)?;
        if view != View::DEFAULT {
            return Ok(self.book(view)?.page(gfn).rights);
        }
        let rights = self.xen.control().mem_access(self.domain, gfn.0).map_err(|error| self.no_rights(gfn, &error))?;
        Ok(u8::try_from(rights).ok().and_then(MemoryAccess::from_bits).unwrap_or(MemoryAccess::RWX))
    }

    fn set_memory_access(&mut self, view: View, gfn: Gfn, access: MemoryAccess) -> Result<()> {
        self.set_memory_access_multi(view, &[(gfn, access)])
    }

    fn set_memory_access_multi(&mut self, view: View, pages: &[(Gfn, MemoryAccess)]) -> Result<()> {
        if self.is_taken_back(view) {
            return Ok(());
        }
        self.check_view(view)?;
        self.check_alive()?;
        for (gfn, rights) in pages {
            self.check_range(gfn.pa(0), 1)?;
            check_rights(view, *gfn, *rights)?;
        }
        if view == View::DEFAULT {
            return pages.iter().try_for_each(|(gfn, rights)| self.set_default_access(*gfn, *rights));
        }
        if let Err(error) = self.set_in_view(view, pages) {
            let book = self.book(view)?;
            let before: Vec<(Gfn, MemoryAccess)> = pages.iter().map(|(gfn, _)| (*gfn, book.page(*gfn).rights)).collect();
            let cause = self.no_rights(pages.first().map_or(Gfn(0), |(gfn, _)| *gfn), &error);
            if let [_] = pages {
                return Err(cause);
            }
            // Some may be set. A hole among them, which caused the error, has nothing to be put back.
            let left: Vec<String> = before
                .iter()
                .filter_map(|page| match self.set_in_view(view, std::slice::from_ref(page)) {
                    Err(error) if error.errno != errno::ESRCH => Some(format!("rights of {} in view {view} ({error})", page.0)),
                    _ => None,
                })
                .collect();
            return Err(cause.and_left(&left));
        }
        let book = self.book_mut(view)?;
        for (gfn, rights) in pages {
            let page = book.page(*gfn);
            book.set(*gfn, Page { rights: *rights, ..page });
        }
        Ok(())
    }
}
