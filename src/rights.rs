//! Who denies which access on which page, counted, so that several users of one page compose.

use rustc_hash::{FxHashMap, FxHashSet};

use crate::addr::{Gfn, MemoryAccess, View};
use crate::core::VmiCore;
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};
use crate::undo::Left;

const BITS: [MemoryAccess; 3] = [MemoryAccess::R, MemoryAccess::W, MemoryAccess::X];

/// One page on which something is denied.
#[derive(Clone, Copy)]
struct Page {
    /// The rights it had before the first denial.
    found: MemoryAccess,
    /// Denials of R, W and X.
    counts: [u32; 3],
}

impl Page {
    fn denied(&self) -> MemoryAccess {
        let taken = BITS.iter().zip(self.counts).filter(|(_, count)| *count > 0);
        taken.fold(MemoryAccess::NONE, |all, (bit, _)| all | *bit)
    }

    /// What is left. Second-level tables know no page that is writable and not readable (Intel SDM vol. 3, "EPT
    /// Misconfigurations"), so whoever takes R takes W with it.
    fn left(&self) -> MemoryAccess {
        let left = self.found.without(self.denied());
        if left.contains(MemoryAccess::R) { left } else { left.without(MemoryAccess::W) }
    }

    /// With one more denial of each access in `access`.
    fn deny(mut self, access: MemoryAccess) -> Self {
        for (count, bit) in self.counts.iter_mut().zip(BITS) {
            *count = count.saturating_add(u32::from(access.contains(bit)));
        }
        self
    }

    /// With one denial less of each access in `access`; `None` if one of them is not denied.
    fn allow(mut self, access: MemoryAccess) -> Option<Self> {
        for (count, bit) in self.counts.iter_mut().zip(BITS) {
            *count = count.checked_sub(u32::from(access.contains(bit)))?;
        }
        Some(self)
    }
}

/// The pages whose rights were taken away, by how many, and what they had before.
///
/// A denial of R denies W too while it lasts, because no machine has pages that can be written and not read.
#[derive(Default)]
pub struct Rights {
    pages: FxHashMap<(View, Gfn), Page>,
}

impl Rights {
    /// Nothing denied.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes `access` away from the page, or counts one more who wants it away. The guest's next such access raises an event.
    ///
    /// # Errors
    /// The driver's, with nothing changed.
    pub fn deny<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        gfn: Gfn,
        view: View,
        access: MemoryAccess,
    ) -> Result<()> {
        let (before, page) = self.denied_once_more(vmi, gfn, view, access)?;
        if page.left() != before {
            vmi.driver_mut().set_memory_access(view, gfn, page.left())?;
        }
        self.pages.insert((view, gfn), page);
        Ok(())
    }

    /// The rights the page has now, and what it would be with one more denial.
    fn denied_once_more<D: VmiDriver + ?Sized>(
        &self,
        vmi: &VmiCore<D>,
        gfn: Gfn,
        view: View,
        access: MemoryAccess,
    ) -> Result<(MemoryAccess, Page)> {
        if let Some(page) = self.pages.get(&(view, gfn)) {
            return Ok((page.left(), page.deny(access)));
        }
        let found = vmi.driver().memory_access(view, gfn)?;
        Ok((found, Page { found, counts: [0; 3] }.deny(access)))
    }

    /// Takes one denial of `access` back. The last one restores the rights that were found, and forgets the page.
    ///
    /// # Errors
    /// [`VmiError::InvalidArgument`] if that access is not denied; the driver's. Nothing is changed then.
    pub fn allow<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        gfn: Gfn,
        view: View,
        access: MemoryAccess,
    ) -> Result<()> {
        let held = self.pages.get(&(view, gfn));
        let after = held.and_then(|page| Some((page.left(), page.allow(access)?)));
        let Some((before, page)) = after else {
            let reason = format!("{access} is not denied on frame {gfn} in view {view}");
            return Err(VmiError::InvalidArgument { what: "access", reason });
        };
        let last = page.counts == [0; 3];
        let rights = if last { page.found } else { page.left() };
        if rights != before {
            vmi.driver_mut().set_memory_access(view, gfn, rights)?;
        }
        if last {
            self.pages.remove(&(view, gfn));
        } else {
            self.pages.insert((view, gfn), page);
        }
        Ok(())
    }

    /// As [`Self::deny`] for many pages, all or none: one call sets the rights of all of them where the driver has such a call.
    ///
    /// # Errors
    /// The driver's, with nothing changed; [`VmiError::UndoFailed`] if putting back failed.
    pub fn deny_many<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        gfns: &[Gfn],
        view: View,
        access: MemoryAccess,
    ) -> Result<()> {
        let distinct = || gfns.iter().collect::<FxHashSet<_>>().len() == gfns.len();
        if gfns.len() > 1 && vmi.driver().caps().multi_access && distinct() {
            let mut pages = Vec::with_capacity(gfns.len());
            let mut changes = Vec::new();
            for &gfn in gfns {
                let (before, page) = self.denied_once_more(vmi, gfn, view, access)?;
                if page.left() != before {
                    changes.push((gfn, page.left()));
                }
                pages.push(((view, gfn), page));
            }
            if !changes.is_empty() {
                vmi.driver_mut().set_memory_access_multi(view, &changes)?;
            }
            self.pages.extend(pages);
            return Ok(());
        }
        for (index, &gfn) in gfns.iter().enumerate() {
            if let Err(cause) = self.deny(vmi, gfn, view, access) {
                let mut left = Left::default();
                for &gfn in gfns.get(..index).unwrap_or_default().iter().rev() {
                    left.note(self.allow(vmi, gfn, view, access), || format!("{access} denied on {gfn} in view {view}"));
                }
                return Err(left.after(cause));
            }
        }
        Ok(())
    }

    /// What is denied on the page by anyone.
    pub fn denied(&self, gfn: Gfn, view: View) -> MemoryAccess {
        self.pages.get(&(view, gfn)).map_or(MemoryAccess::NONE, Page::denied)
    }

    /// On how many pages something is denied.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether nothing is denied.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Restores what was found on every page, however many deny something there.
    ///
    /// # Errors
    /// [`VmiError::UndoFailed`] with the pages on which the driver failed; all others are restored, and calling again tries those.
    pub fn clear<D: VmiDriver + ?Sized>(&mut self, vmi: &mut VmiCore<D>) -> Result<()> {
        self.clear_but(vmi, |_, _| false)
    }

    /// As [`Self::clear`], but for the pages `keep` says yes to.
    pub(crate) fn clear_but<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        keep: impl Fn(View, Gfn) -> bool,
    ) -> Result<()> {
        let mut left = Left::default();
        self.pages.retain(|&(view, gfn), page| {
            if keep(view, gfn) {
                return true;
            }
            let result =
                if page.left() == page.found { Ok(()) } else { vmi.driver_mut().set_memory_access(view, gfn, page.found) };
            left.note(result, || format!("access {} on frame {gfn} in view {view}", page.left()))
        });
        left.done()
    }
}
