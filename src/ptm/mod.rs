//! Page-in and page-out: where addresses are mapped, kept up to date by watching the stores to the page tables that map them.
//!
//! The guest's stores are not decoded. Every store to a watched table is denied and told, is carried out where the denial does not
//! hold, and then the table is compared with what it was: so a store of any width, that begins anywhere, is seen for what it did.

mod tables;

use std::hash::BuildHasher;

use hashbrown::HashTable;
use rustc_hash::FxBuildHasher;
use smallvec::SmallVec;

use crate::addr::{Gfn, MemoryAccess, PAGE_SIZE, Pa, Va, VcpuId, View};
use crate::arch::amd64::{AddressContext, walk};
use crate::core::VmiCore;
use crate::driver::VmiDriver;
use crate::error::{Result, TranslationFault, VmiError};
use crate::event::{EventReason, VmiEvent};
use crate::rights::Rights;
use crate::undo::Left;
use tables::{Kept, Path, Tables};

/// How often [`PageTableMonitor::process`] goes on with what it found to have changed meanwhile.
const ROUNDS: usize = 4;

/// What became of an address that is monitored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageTableEvent {
    /// It is no longer mapped where it was.
    PageOut {
        /// The address.
        va: Va,
        /// The page tables.
        context: AddressContext,
        /// Where it was.
        pa: Pa,
    },
    /// It is mapped now, or mapped elsewhere: then the page-out comes first.
    PageIn {
        /// The address.
        va: Va,
        /// The page tables.
        context: AddressContext,
        /// Where it is.
        pa: Pa,
    },
}

impl PageTableEvent {
    /// The address it is about, and its page tables.
    pub const fn address(&self) -> (Va, AddressContext) {
        match self {
            Self::PageOut { va, context, .. } | Self::PageIn { va, context, .. } => (*va, *context),
        }
    }
}

/// One page of virtual memory with addresses that are monitored.
struct Page {
    va: Va,
    kept: Kept,
    /// Where it is mapped, or [`NOWHERE`].
    frame: Pa,
    /// Offsets that are monitored, ascending; one that is monitored several times is there as often.
    addresses: SmallVec<[u16; 8]>,
}

/// Stands for no page: none begins there.
const NOWHERE: Pa = Pa(u64::MAX);

fn hash(va: Va, context: AddressContext) -> u64 {
    FxBuildHasher.hash_one((va.0, context))
}

/// What following the tables for a page came to.
struct Followed {
    path: Path,
    /// Entries that the page was not found through before.
    fresh: Path,
    frame: Result<Pa, TranslationFault>,
}

/// Watches the page tables that map certain addresses, and says when these are mapped, unmapped or mapped elsewhere.
///
/// It takes the right to write away from exactly the tables that are looked at to find the addresses, in the views it was made for:
/// down to the entry that maps the page, or the first one that is not present. 4 and 5 levels, and pages of every size.
///
/// Whoever receives an event of a denied write to a watched table ([`Self::watches`]) notes it with [`Self::mark_dirty`], has that
/// vCPU execute the instruction in a view without the denial, and calls [`Self::process`] once that is done. Accessed and dirty
/// bits raise nothing, nor does a change that leaves an address where it was.
///
/// Every call does all it is asked for, or fails with nothing changed.
pub struct PageTableMonitor {
    views: Vec<View>,
    /// Pages by address and context.
    index: HashTable<u32>,
    pages: Vec<Option<Page>>,
    free: Vec<u32>,
    tables: Tables,
    /// Tables that were stored to, and by whom; `None`: not by a vCPU, so it is done.
    dirty: Vec<(Option<VcpuId>, Gfn)>,
    /// Pages that are to be looked up again.
    stale: Vec<u32>,
}

impl PageTableMonitor {
    /// Watches nothing yet, in these views. In the default view nothing can be denied to a vCPU that steps there: leave it out.
    pub fn new(views: &[View]) -> Self {
        Self {
            views: views.to_vec(),
            index: HashTable::new(),
            pages: Vec::new(),
            free: Vec::new(),
            tables: Tables::default(),
            dirty: Vec::new(),
            stale: Vec::new(),
        }
    }

    /// The views in which tables are watched.
    pub fn views(&self) -> &[View] {
        &self.views
    }

    /// How many addresses are monitored, each counted once.
    pub fn len(&self) -> usize {
        self.pages.iter().flatten().map(|page| page.offsets().count()).sum()
    }

    /// Whether no address is monitored.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// How many page tables are watched.
    pub fn tables(&self) -> usize {
        self.tables.len()
    }

    /// Whether the page is a table that is watched in the view.
    pub fn watches(&self, view: View, gfn: Gfn) -> bool {
        self.is_table(gfn) && self.views.contains(&view)
    }

    /// Whether the page is a table that is watched.
    pub fn is_table(&self, gfn: Gfn) -> bool {
        self.tables.contains(gfn)
    }

    /// The page tables that are watched, in no order.
    pub fn watched_tables(&self) -> impl Iterator<Item = Gfn> {
        self.tables.frames()
    }

    fn find(&self, va: Va, context: AddressContext) -> Option<u32> {
        let is_it = |id: &u32| {
            let page = self.pages.get(*id as usize).and_then(Option::as_ref);
            page.is_some_and(|page| page.va == va.page() && page.kept.context() == context)
        };
        self.index.find(hash(va.page(), context), is_it).copied()
    }

    /// Monitors an address, or counts one more who wants it monitored. Returns where it is mapped; `None` if its page is not present.
    ///
    /// # Errors
    /// [`VmiError::Translation`] if the address can never be mapped (not canonical), or its entry has a reserved bit or leads beyond
    /// memory; the driver's.
    pub fn monitor<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        rights: &mut Rights,
        va: Va,
        context: AddressContext,
    ) -> Result<Option<Pa>> {
        let fault = |fault| VmiError::Translation { va, root: context.root, fault };
        let offset = va.page_offset() as u16;
        if let Some(page) = self.find(va, context).and_then(|id| self.pages.get_mut(id as usize)?.as_mut()) {
            if page.frame().is_none() {
                check_absent(vmi.translate(va, context))?;
            }
            page.add(offset);
            return Ok(page.frame().map(|frame| Pa(frame.0 | va.page_offset())));
        }
        let id = self.free.last().copied().unwrap_or(self.pages.len() as u32);
        let Followed { path, fresh, frame } = self.follow(vmi, rights, id, va.page(), context)?;
        let frame = match frame {
            Ok(frame) => Some(frame),
            Err(TranslationFault::NotPresent { .. }) => None,
            Err(other) => return Err(self.back_out(vmi, rights, id, &fresh, fault(other))),
        };
        let kept = self.tables.keep(context, &path);
        let page = Page { va: va.page(), kept, frame: frame.unwrap_or(NOWHERE), addresses: SmallVec::from_iter([offset]) };
        self.free.pop();
        match self.pages.get_mut(id as usize) {
            Some(slot) => *slot = Some(page),
            None => self.pages.push(Some(page)),
        }
        let pages = &self.pages;
        self.index.insert_unique(hash(va.page(), context), id, |id| {
            let page = pages.get(*id as usize).and_then(Option::as_ref);
            page.map_or(0, |page| hash(page.va, page.kept.context()))
        });
        Ok(frame.map(|frame| Pa(frame.0 | va.page_offset())))
    }

    /// Takes one [`Self::monitor`] back. The last one of a table restores the access it found. Returns whether there was one.
    ///
    /// # Errors
    /// The driver's.
    pub fn unmonitor<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        rights: &mut Rights,
        va: Va,
        context: AddressContext,
    ) -> Result<bool> {
        let Some(id) = self.find(va, context) else { return Ok(false) };
        let Some(page) = self.pages.get_mut(id as usize).and_then(Option::as_mut) else { return Ok(false) };
        let Ok(at) = page.addresses.binary_search(&(va.page_offset() as u16)) else { return Ok(false) };
        if page.addresses.len() > 1 {
            page.addresses.remove(at);
            return Ok(true);
        }
        let path = page.kept.path();
        self.release(vmi, rights, id, &path)?;
        self.drop_page(id);
        Ok(true)
    }

    /// Takes a page out of the books that is found through no table any more.
    fn drop_page(&mut self, id: u32) {
        let Some(page) = self.pages.get_mut(id as usize).and_then(Option::take) else { return };
        if let Ok(slot) = self.index.find_entry(hash(page.va, page.kept.context()), |known| *known == id) {
            slot.remove();
        }
        self.free.push(id);
    }

    /// Watches the tables in one more view. Twice is fine.
    ///
    /// # Errors
    /// The driver's.
    pub fn add_view<D: VmiDriver + ?Sized>(&mut self, vmi: &mut VmiCore<D>, rights: &mut Rights, view: View) -> Result<()> {
        if self.views.contains(&view) {
            return Ok(());
        }
        let tables: Vec<_> = self.tables.frames().map(|gfn| (view, gfn)).collect();
        rights.deny_many(vmi, &tables, MemoryAccess::W)?;
        self.views.push(view);
        Ok(())
    }

    /// Watches the tables no longer in that view, and restores the access found there.
    ///
    /// # Errors
    /// The driver's.
    pub fn remove_view<D: VmiDriver + ?Sized>(&mut self, vmi: &mut VmiCore<D>, rights: &mut Rights, view: View) -> Result<()> {
        let Some(index) = self.views.iter().position(|known| *known == view) else { return Ok(()) };
        let tables: Vec<_> = self.tables.frames().map(|gfn| (view, gfn)).collect();
        rights.allow_many(vmi, &tables, MemoryAccess::W)?;
        self.views.remove(index);
        Ok(())
    }

    /// Notes that a vCPU is about to store to a watched table; of no effect if it is none. `None`: somebody else has stored there.
    pub fn mark_dirty(&mut self, vcpu: Option<VcpuId>, gfn: Gfn) {
        if self.is_table(gfn) && !self.dirty.contains(&(vcpu, gfn)) {
            self.dirty.push((vcpu, gfn));
        }
    }

    /// Notes what the denied store of an event can reach, of the tables that are watched: its page and the page behind, found before
    /// the store is done, because it may be the one that maps that elsewhere.
    pub fn mark_store<D: VmiDriver + ?Sized>(&mut self, vmi: &VmiCore<D>, event: &VmiEvent) {
        if self.is_empty() {
            return;
        }
        let EventReason::MemoryAccess { pa, va, .. } = event.reason else { return };
        self.mark_dirty(Some(event.vcpu), pa.gfn());
        let Some(next) = va.and_then(|va| va.page().checked_add(PAGE_SIZE)) else { return };
        match vmi.translate(next, AddressContext::from(&event.registers)) {
            Ok(pa) => self.mark_dirty(Some(event.vcpu), pa.gfn()),
            Err(VmiError::Translation { .. }) => {}
            // It can be any of them.
            Err(_) => self.mark_all_dirty(Some(event.vcpu)),
        }
    }

    /// Notes that any table may have changed, as [`Self::mark_dirty`] does for one.
    pub fn mark_all_dirty(&mut self, vcpu: Option<VcpuId>) {
        let tables: Vec<Gfn> = self.tables.frames().collect();
        for gfn in tables {
            self.mark_dirty(vcpu, gfn);
        }
    }

    /// Whether [`Self::process`] has something to do for that vCPU.
    pub fn is_dirty(&self, vcpu: Option<VcpuId>) -> bool {
        !self.stale.is_empty() || self.dirty.iter().any(|(by, _)| by.is_none() || *by == vcpu)
    }

    /// Whether a table was stored to by that vCPU since the last [`Self::process`].
    pub fn is_dirty_table(&self, vcpu: VcpuId, gfn: Gfn) -> bool {
        self.dirty.contains(&(Some(vcpu), gfn))
    }

    /// Where an address that is monitored was mapped when it was last looked at.
    pub fn mapped(&self, va: Va, context: AddressContext) -> Option<Pa> {
        let page = self.pages.get(self.find(va, context)? as usize)?.as_ref()?;
        page.frame().map(|frame| Pa(frame.0 | va.page_offset()))
    }

    /// The stores of that vCPU are done: finds out what they did, and puts it into `events`, for each address the page-out before
    /// the page-in. Stores of other vCPUs that are under way are left alone. `None`: looks only at what no vCPU stored.
    ///
    /// # Errors
    /// The driver's. What could be found out is in `events`; the rest is found out by the next call.
    pub fn process<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        rights: &mut Rights,
        vcpu: Option<VcpuId>,
        events: &mut Vec<PageTableEvent>,
    ) -> Result<()> {
        let mut failed = Ok(());
        let mut bytes = [0; PAGE_SIZE as usize];
        let (tables, stale) = (&mut self.tables, &mut self.stale);
        self.dirty.retain_mut(|(by, gfn)| {
            if by.is_some() && *by != vcpu {
                return true;
            }
            match vmi.read_pa(gfn.pa(0), &mut bytes) {
                Ok(()) => {
                    tables.compare(*gfn, &bytes, stale);
                    false
                }
                Err(error) => {
                    failed = Err(error);
                    // The store is done: whoever comes next looks at it, and not only this vCPU.
                    *by = None;
                    true
                }
            }
        });
        // Looking one page up can show that others have changed too. What goes on changing is left for the next time.
        for _ in 0..ROUNDS {
            let mut pages = std::mem::take(&mut self.stale);
            pages.sort_unstable();
            pages.dedup();
            let mut again = Vec::new();
            for id in pages {
                if let Err(error) = self.look_up(vmi, rights, id, events) {
                    failed = Err(error);
                    again.push(id);
                }
            }
            if self.stale.is_empty() || !again.is_empty() {
                self.stale.append(&mut again);
                break;
            }
        }
        failed
    }

    /// Finds out where a page is now.
    fn look_up<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        rights: &mut Rights,
        id: u32,
        events: &mut Vec<PageTableEvent>,
    ) -> Result<()> {
        let Some(page) = self.pages.get(id as usize).and_then(Option::as_ref) else { return Ok(()) };
        let (va, context, before) = (page.va, page.kept.context(), page.kept.path());
        let Followed { path, fresh, frame } = self.follow(vmi, rights, id, va, context)?;
        if let Err(cause) = self.release(vmi, rights, id, &before.without(&path)) {
            return Err(self.back_out(vmi, rights, id, &fresh, cause));
        }
        let Some(page) = self.pages.get_mut(id as usize).and_then(Option::as_mut) else { return Ok(()) };
        page.kept = self.tables.keep(context, &path);
        let (old, new) = (page.frame(), frame.ok());
        page.frame = new.unwrap_or(NOWHERE);
        if old == new {
            return Ok(());
        }
        for offset in page.offsets() {
            let at = |page: u64| page | u64::from(offset);
            let va = Va(at(va.0));
            if let Some(frame) = old {
                events.push(PageTableEvent::PageOut { va, context, pa: Pa(at(frame.0)) });
            }
            if let Some(frame) = new {
                events.push(PageTableEvent::PageIn { va, context, pa: Pa(at(frame.0)) });
            }
        }
        Ok(())
    }

    /// Looks a page up in the tables, each of which is watched before it is read: no store goes by unseen.
    fn follow<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        rights: &mut Rights,
        id: u32,
        va: Va,
        context: AddressContext,
    ) -> Result<Followed> {
        let end = vmi.driver().info().memory_size;
        let (mut path, mut fresh) = (Path::default(), Path::default());
        let mut failure = None;
        let found = walk(context.root, va, context.levels, true, |entry| {
            if entry.0 >= end {
                return None;
            }
            match self.watch(vmi, rights, entry) {
                Ok(value) => {
                    path.push(entry);
                    if self.tables.enter(id, entry, value, &mut self.stale) {
                        fresh.push(entry);
                    }
                    Some(value)
                }
                // A hole in guest memory is no memory.
                Err(VmiError::OutOfRange { .. }) => None,
                Err(error) => {
                    failure = Some(error);
                    None
                }
            }
        });
        if let Some(cause) = failure {
            return Err(self.back_out(vmi, rights, id, &fresh, cause));
        }
        let frame = found.and_then(|found| {
            let pa = found.pa.page();
            if pa.0 < end { Ok(pa) } else { Err(TranslationFault::BeyondMemory { level: 0, pa }) }
        });
        Ok(Followed { path, fresh, frame })
    }

    /// Reads an entry of a table, which is watched from before that on.
    fn watch<D: VmiDriver + ?Sized>(&self, vmi: &mut VmiCore<D>, rights: &mut Rights, entry: Pa) -> Result<u64> {
        let gfn = entry.gfn();
        if self.tables.contains(gfn) {
            return vmi.read_pa_u64(entry);
        }
        vmi.read_pa_u64(entry)?;
        rights.deny_many(vmi, &self.in_views(&[gfn]), MemoryAccess::W)?;
        vmi.read_pa_u64(entry).map_err(|cause| self.unwatch(vmi, rights, &[gfn], cause))
    }

    /// These tables, in each view they are watched in.
    fn in_views(&self, tables: &[Gfn]) -> Vec<(View, Gfn)> {
        self.views.iter().flat_map(|view| tables.iter().map(|gfn| (*view, *gfn))).collect()
    }

    /// Gives the right to write these tables back after `cause`.
    fn unwatch<D: VmiDriver + ?Sized>(
        &self,
        vmi: &mut VmiCore<D>,
        rights: &mut Rights,
        tables: &[Gfn],
        cause: VmiError,
    ) -> VmiError {
        let mut left = Left::default();
        let done = rights.allow_many(vmi, &self.in_views(tables), MemoryAccess::W);
        left.note(done, || format!("frames that are not writable: {tables:?}"));
        left.after(cause)
    }

    /// Stops watching what nobody needs once the page is not found through these entries any more.
    fn release<D: VmiDriver + ?Sized>(&mut self, vmi: &mut VmiCore<D>, rights: &mut Rights, id: u32, path: &Path) -> Result<()> {
        rights.allow_many(vmi, &self.in_views(&self.tables.emptied(id, path)), MemoryAccess::W)?;
        self.tables.leave(id, path);
        self.dirty.retain(|(_, gfn)| self.tables.contains(*gfn));
        Ok(())
    }

    /// Takes back what was entered before `cause` happened.
    fn back_out<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        rights: &mut Rights,
        id: u32,
        fresh: &Path,
        cause: VmiError,
    ) -> VmiError {
        let cause = self.unwatch(vmi, rights, &self.tables.emptied(id, fresh), cause);
        self.tables.leave(id, fresh);
        cause
    }

    /// Restores the access of every table and forgets everything.
    ///
    /// # Errors
    /// [`VmiError::UndoFailed`] with the pages on whose tables the driver failed. Their addresses stay monitored, and calling again
    /// tries them.
    pub fn clear<D: VmiDriver + ?Sized>(&mut self, vmi: &mut VmiCore<D>, rights: &mut Rights) -> Result<()> {
        let mut left = Left::default();
        for id in 0..self.pages.len() as u32 {
            let page = self.pages.get(id as usize).and_then(Option::as_ref);
            let Some((va, path)) = page.map(|page| (page.va, page.kept.path())) else { continue };
            if !left.note(self.release(vmi, rights, id, &path), || format!("the page tables of {va} watched")) {
                self.drop_page(id);
            }
        }
        if self.is_empty() {
            self.forget();
        }
        left.done()
    }

    /// Forgets everything and restores nothing: for when the rights are restored as a whole.
    pub fn forget(&mut self) {
        *self = Self::new(&std::mem::take(&mut self.views));
    }
}

impl Page {
    fn frame(&self) -> Option<Pa> {
        (self.frame != NOWHERE).then_some(self.frame)
    }

    fn add(&mut self, offset: u16) {
        self.addresses.insert(self.addresses.partition_point(|known| *known < offset), offset);
    }

    /// The offsets that are monitored, each once.
    fn offsets(&self) -> impl Iterator<Item = u16> {
        self.addresses.chunk_by(PartialEq::eq).filter_map(|same| same.first().copied())
    }
}

/// An error unless the address is merely absent, or there.
fn check_absent(translated: Result<Pa>) -> Result<()> {
    match translated {
        Ok(_) | Err(VmiError::Translation { fault: TranslationFault::NotPresent { .. }, .. }) => Ok(()),
        Err(error) => Err(error),
    }
}
