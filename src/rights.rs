//! Who denies which access on which page, counted, so that several users of one page compose.

use rustc_hash::FxHashMap;

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

    /// Whether nobody denies anything.
    fn is_free(&self) -> bool {
        self.counts == [0; 3]
    }

    /// What is left. Second-level tables know no page that is writable and not readable (Intel SDM vol. 3, "EPT
    /// Misconfigurations"), so whoever takes R takes W with it.
    fn left(&self) -> MemoryAccess {
        if self.is_free() {
            return self.found;
        }
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

/// What a page is to become.
struct Change {
    at: (View, Gfn),
    before: MemoryAccess,
    page: Page,
}

/// Sets the rights of all pages whose rights change, or on an error of none. They are in the order of their views.
fn set_rights<D: VmiDriver + ?Sized>(vmi: &mut VmiCore<D>, changes: &[Change]) -> Result<()> {
    let multi = vmi.driver().caps().multi_access;
    let mut done: Vec<((View, Gfn), MemoryAccess)> = Vec::new();
    for in_view in changes.chunk_by(|a, b| a.at.0 == b.at.0) {
        let changed = || in_view.iter().filter(|change| change.page.left() != change.before);
        let Some(view) = changed().next().map(|change| change.at.0) else { continue };
        let result = if multi && changed().nth(1).is_some() {
            let pages: Vec<_> = changed().map(|change| (change.at.1, change.page.left())).collect();
            let result = vmi.driver_mut().set_memory_access_multi(view, &pages);
            result.map(|()| done.extend(changed().map(|change| (change.at, change.before))))
        } else {
            changed().try_for_each(|change| {
                vmi.driver_mut().set_memory_access(view, change.at.1, change.page.left())?;
                done.push((change.at, change.before));
                Ok(())
            })
        };
        if let Err(cause) = result {
            let mut left = Left::default();
            for ((view, gfn), before) in done.into_iter().rev() {
                let what = || format!("frame {gfn} in view {view} without its access {before}");
                left.note(vmi.driver_mut().set_memory_access(view, gfn, before), what);
            }
            return Err(left.after(cause));
        }
    }
    Ok(())
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
        self.deny_many(vmi, &[(view, gfn)], access)
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
        self.allow_many(vmi, &[(view, gfn)], access)
    }

    /// As [`Self::deny`] for many pages, all or none: one call a view sets the rights of all of them where the driver has such a
    /// call. A page that is there twice counts twice.
    ///
    /// # Errors
    /// The driver's, with nothing changed; [`VmiError::UndoFailed`] if putting back failed.
    pub fn deny_many<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        pages: &[(View, Gfn)],
        access: MemoryAccess,
    ) -> Result<()> {
        self.change_many(vmi, pages, |vmi, (view, gfn), held| {
            if let Some(page) = held {
                return Ok((page.left(), page.deny(access)));
            }
            let found = vmi.driver().memory_access(view, gfn)?;
            Ok((found, Page { found, counts: [0; 3] }.deny(access)))
        })
    }

    /// As [`Self::allow`] for many pages, all or none, with calls as [`Self::deny_many`].
    ///
    /// # Errors
    /// As [`Self::allow`]; [`VmiError::UndoFailed`] if putting back failed.
    pub fn allow_many<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        pages: &[(View, Gfn)],
        access: MemoryAccess,
    ) -> Result<()> {
        self.change_many(vmi, pages, |_, (view, gfn), held| {
            let after = held.and_then(|page| Some((page.left(), page.allow(access)?)));
            after.ok_or_else(|| {
                let reason = format!("{access} is not denied on frame {gfn} in view {view}");
                VmiError::InvalidArgument { what: "access", reason }
            })
        })
    }

    /// Finds out what becomes of each page, then asks the driver, and only then notes it down.
    fn change_many<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        pages: &[(View, Gfn)],
        step: impl Fn(&VmiCore<D>, (View, Gfn), Option<Page>) -> Result<(MemoryAccess, Page)>,
    ) -> Result<()> {
        let mut sorted = pages.to_vec();
        sorted.sort_unstable();
        let mut changes = Vec::with_capacity(sorted.len());
        for same in sorted.chunk_by(PartialEq::eq) {
            let Some(at) = same.first().copied() else { continue };
            let (before, mut page) = step(vmi, at, self.pages.get(&at).copied())?;
            for _ in same.iter().skip(1) {
                page = step(vmi, at, Some(page))?.1;
            }
            changes.push(Change { at, before, page });
        }
        set_rights(vmi, &changes)?;
        for Change { at, page, .. } in changes {
            if page.is_free() {
                self.pages.remove(&at);
            } else {
                self.pages.insert(at, page);
            }
        }
        Ok(())
    }

    /// A view is gone, and with it whatever was denied there.
    pub(crate) fn forget_view(&mut self, view: View) {
        self.pages.retain(|(of, _), _| *of != view);
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
