//! Breakpoints by owner: which exist, which are planted, and whose an event is.
//!
//! Bookkeeping comes first and is taken back if the driver fails, so a page's number of breakpoints is known before it is touched.

use std::hash::{BuildHasher, Hash};

use hashbrown::HashTable;
use rustc_hash::{FxBuildHasher, FxHashMap};

use super::{Left, TapController, TapEvents};
use crate::addr::{Gfn, Pa, Va, View};
use crate::arch::amd64::AddressContext;
use crate::core::VmiCore;
use crate::driver::VmiDriver;
use crate::error::{Result, TranslationFault, VmiError};
use crate::event::{EventReason, VmiEvent};

/// A breakpoint as its owner wants it. What tells it from others: the view, the address with its root, and the key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Breakpoint<K, T> {
    /// The view it is in.
    pub view: View,
    /// Where.
    pub va: Va,
    /// The page tables `va` is meant under.
    pub context: AddressContext,
    /// Whose it is: several owners can have one at the same address.
    pub key: K,
    /// What the owner wants to be told with it.
    pub tag: T,
    /// Whether it is hit under every root, not only under `context`'s.
    pub global: bool,
}

/// A breakpoint that is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found<'a, K, T> {
    /// The view it is in.
    pub view: View,
    /// Where.
    pub va: Va,
    /// Where it is planted; `None` while its page is not there.
    pub pa: Option<Pa>,
    /// The page tables it was inserted with (the first ones, if it is global and was inserted with several).
    pub context: AddressContext,
    /// Whose it is.
    pub key: &'a K,
    /// What came with it.
    pub tag: &'a T,
    /// Whether it is hit under every root.
    pub global: bool,
}

/// One root a breakpoint was inserted with, and where it is planted for that.
#[derive(Clone, Copy)]
struct Mapping {
    context: AddressContext,
    pa: Option<Pa>,
}

struct Entry<K, T> {
    va: Va,
    first: Mapping,
    /// The other roots of a global one.
    #[expect(clippy::box_collection, reason = "almost always absent: one word instead of three")]
    more: Option<Box<Vec<Mapping>>>,
    key: K,
    tag: T,
    view: View,
    global: bool,
}

impl<K, T> Entry<K, T> {
    fn mappings(&self) -> impl Iterator<Item = &Mapping> {
        std::iter::once(&self.first).chain(self.more.iter().flat_map(|more| more.iter()))
    }

    fn mapping_mut(&mut self, root: Pa) -> Option<&mut Mapping> {
        let more = self.more.iter_mut().flat_map(|more| more.iter_mut());
        std::iter::once(&mut self.first).chain(more).find(|mapping| mapping.context.root == root)
    }

    fn has_root(&self, root: Pa) -> bool {
        self.mappings().any(|mapping| mapping.context.root == root)
    }

    fn is_at(&self, pa: Pa) -> bool {
        self.mappings().any(|mapping| mapping.pa == Some(pa))
    }

    fn found(&self, pa: Option<Pa>) -> Found<'_, K, T> {
        let Self { va, key, tag, view, global, .. } = self;
        Found { view: *view, va: *va, pa, context: self.first.context, key, tag, global: *global }
    }

    /// The root its place in the index is for: every root has its own breakpoints, and all of them share the global ones.
    fn index_root(&self) -> Option<Pa> {
        (!self.global).then_some(self.first.context.root)
    }
}

/// One byte of a view that is a breakpoint, and whose. Most have one owner.
struct Site {
    pa: Pa,
    first: u32,
    #[expect(clippy::box_collection, reason = "almost always absent: one word instead of three")]
    more: Option<Box<Vec<u32>>>,
    view: View,
}

impl Site {
    fn more(&self) -> &[u32] {
        self.more.as_deref().map_or(&[], Vec::as_slice)
    }

    fn owners(&self) -> impl Iterator<Item = u32> {
        std::iter::once(self.first).chain(self.more().iter().copied())
    }
}

/// How an insert comes to the physical address.
#[derive(Clone, Copy)]
enum Where {
    Translate,
    Given(Option<Pa>),
}

/// What an insert has to do.
enum Place {
    Duplicate,
    New,
    /// A global one that exists, under one more root.
    Joins(u32),
}

fn site_hash(view: View, pa: Pa) -> u64 {
    FxBuildHasher.hash_one((pa.0, view.0))
}

fn id_hash(view: View, va: Va, root: Option<Pa>) -> u64 {
    FxBuildHasher.hash_one((va.0, view.0, root.map_or(u64::MAX, |root| root.0)))
}

/// The breakpoints of many owners. Several at one address share what is planted there.
///
/// `insert` and `remove` go to a [`TapController`]; every one of them does all it is asked for, or fails with the guest, the
/// controller and this as they were ([`VmiError::UndoFailed`] says what is not, should undoing fail).
pub struct BreakpointManager<K, T> {
    entries: Vec<Option<Entry<K, T>>>,
    free: Vec<u32>,
    ids: HashTable<u32>,
    sites: HashTable<Site>,
    /// The offset of every owner's breakpoint on a page, ascending: one that two owners want is there twice.
    pages: FxHashMap<(View, Gfn), Vec<u16>>,
    /// The views there are breakpoints in, and how many.
    views: Vec<(View, usize)>,
}

impl<K, T> Default for BreakpointManager<K, T> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
            ids: HashTable::new(),
            sites: HashTable::new(),
            pages: FxHashMap::default(),
            views: Vec::new(),
        }
    }
}

/// Where an event of a tap happened.
fn address<C: TapEvents + ?Sized>(controller: &C, event: &VmiEvent) -> Option<(View, Pa)> {
    let (view, gfn) = controller.check_event(event)?;
    let pa = match event.reason {
        EventReason::MemoryAccess { pa, .. } => pa,
        _ => gfn.pa(event.registers.rip().page_offset()),
    };
    Some((view, pa))
}

impl<K: Eq + Hash + Clone, T: Clone> BreakpointManager<K, T> {
    /// No breakpoints.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a breakpoint and plants it, if its address is mapped. Where it is not, the breakpoint is kept and waits. Returns
    /// whether it is new: a duplicate changes nothing, makes no driver call, and the first tag stays.
    ///
    /// # Errors
    /// [`VmiError::BreakpointConflict`] if the same one exists with another `global` flag; [`VmiError::Translation`] if the
    /// address is not merely absent; the controller's. Nothing is changed then.
    pub fn insert<D, C>(&mut self, vmi: &mut VmiCore<D>, controller: &mut C, breakpoint: Breakpoint<K, T>) -> Result<bool>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let new = self.insert_all(vmi, controller, std::iter::once((breakpoint, Where::Translate)))?;
        Ok(new.first().copied().unwrap_or_default())
    }

    /// As [`Self::insert`], with the physical address as the caller knows it: `None` if the page is not there.
    ///
    /// # Errors
    /// As [`Self::insert`]; nothing is translated.
    pub fn insert_with_hint<D, C>(
        &mut self,
        vmi: &mut VmiCore<D>,
        controller: &mut C,
        breakpoint: Breakpoint<K, T>,
        pa: Option<Pa>,
    ) -> Result<bool>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let new = self.insert_all(vmi, controller, std::iter::once((breakpoint, Where::Given(pa))))?;
        Ok(new.first().copied().unwrap_or_default())
    }

    /// As [`Self::insert`] for many, all or none, with driver calls by page and not by breakpoint. Returns which are new.
    ///
    /// # Errors
    /// As [`Self::insert`], the first one's.
    pub fn insert_many<D, C>(
        &mut self,
        vmi: &mut VmiCore<D>,
        controller: &mut C,
        breakpoints: Vec<Breakpoint<K, T>>,
    ) -> Result<Vec<bool>>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        self.insert_all(vmi, controller, breakpoints.into_iter().map(|breakpoint| (breakpoint, Where::Translate)))
    }

    fn insert_all<D, C>(
        &mut self,
        vmi: &mut VmiCore<D>,
        controller: &mut C,
        wanted: impl ExactSizeIterator<Item = (Breakpoint<K, T>, Where)>,
    ) -> Result<Vec<bool>>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let mut new = Vec::with_capacity(wanted.len());
        let mut recorded = Vec::with_capacity(wanted.len());
        let mut steps = Vec::with_capacity(wanted.len());
        let mut result = Ok(());
        for (breakpoint, hint) in wanted {
            result = self.record_one(vmi, breakpoint, hint, &mut recorded, &mut steps).map(|is_new| new.push(is_new));
            if result.is_err() {
                break;
            }
        }
        match result.and_then(|()| self.plant(vmi, controller, &mut steps)) {
            Ok(()) => Ok(new),
            Err(error) => {
                for (id, is_new) in recorded.into_iter().rev() {
                    self.unrecord(id, is_new);
                }
                Err(error)
            }
        }
    }

    fn record_one<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &VmiCore<D>,
        breakpoint: Breakpoint<K, T>,
        hint: Where,
        recorded: &mut Vec<(u32, bool)>,
        steps: &mut Vec<(View, Pa)>,
    ) -> Result<bool> {
        let place = self.place(&breakpoint)?;
        if matches!(place, Place::Duplicate) {
            return Ok(false);
        }
        let pa = match hint {
            Where::Given(pa) => pa,
            Where::Translate => match vmi.translate(breakpoint.va, breakpoint.context) {
                Ok(pa) => Some(pa),
                Err(VmiError::Translation { fault: TranslationFault::NotPresent { .. }, .. }) => None,
                Err(error) => return Err(error),
            },
        };
        let (view, is_new) = (breakpoint.view, matches!(place, Place::New));
        let mapping = Mapping { context: breakpoint.context, pa };
        let (id, is_there) = match place {
            Place::Joins(id) => {
                let is_there = pa.is_some_and(|pa| self.entry(id).is_some_and(|entry| entry.is_at(pa)));
                if let Some(entry) = self.entry_mut(id) {
                    entry.more.get_or_insert_default().push(mapping);
                }
                (id, is_there)
            }
            _ => (self.add(breakpoint, mapping), false),
        };
        recorded.push((id, is_new));
        if let Some(pa) = pa.filter(|_| !is_there) {
            self.attach(view, pa, id);
            steps.push((view, pa));
        }
        Ok(true)
    }

    /// Takes the newest mapping of a breakpoint out of the books, and the breakpoint itself if it was new.
    fn unrecord(&mut self, id: u32, is_new: bool) {
        if is_new {
            self.forget(id);
            return;
        }
        let Some(entry) = self.entry_mut(id) else { return };
        let Some(mapping) = entry.more.as_mut().and_then(|more| more.pop()) else { return };
        if entry.more.as_ref().is_some_and(|more| more.is_empty()) {
            entry.more = None;
        }
        let view = entry.view;
        if let Some(pa) = mapping.pa.filter(|pa| !entry.is_at(*pa)) {
            self.detach(view, pa, id);
        }
    }

    /// Removes a breakpoint, planted or waiting, by what is there and not by what `va` is mapped to today. A global one goes
    /// as a whole, whichever of its roots is given. Returns whether there was one.
    ///
    /// # Errors
    /// The controller's, with nothing changed.
    pub fn remove<D, C>(
        &mut self,
        vmi: &mut VmiCore<D>,
        controller: &mut C,
        view: View,
        va: Va,
        root: Pa,
        key: &K,
    ) -> Result<bool>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let Some(id) = self.find(view, va, root, key) else { return Ok(false) };
        self.take_out(vmi, controller, &[id])?;
        Ok(true)
    }

    /// As [`Self::remove`]. The hint is not needed: where a breakpoint is planted is known.
    ///
    /// # Errors
    /// As [`Self::remove`].
    #[expect(clippy::too_many_arguments, reason = "an identity has four parts")]
    pub fn remove_with_hint<D, C>(
        &mut self,
        vmi: &mut VmiCore<D>,
        controller: &mut C,
        view: View,
        va: Va,
        root: Pa,
        _pa: Option<Pa>,
        key: &K,
    ) -> Result<bool>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        self.remove(vmi, controller, view, va, root, key)
    }

    /// As [`Self::remove`] for many, all or none. Returns how many there were.
    ///
    /// # Errors
    /// As [`Self::remove`].
    pub fn remove_many<D, C>(
        &mut self,
        vmi: &mut VmiCore<D>,
        controller: &mut C,
        identities: &[(View, Va, Pa, K)],
    ) -> Result<usize>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let found = identities.iter().filter_map(|(view, va, root, key)| self.find(*view, *va, *root, key));
        let mut ids: Vec<u32> = found.collect();
        ids.sort_unstable();
        ids.dedup();
        self.take_out(vmi, controller, &ids)?;
        Ok(ids.len())
    }

    /// Removes the breakpoint of `key` that `event` hit, and the same one in every other view, planted or waiting.
    ///
    /// `None`: there is none. `Some(true)`: it was the last on its page of the event's view. `Some(false)`: others remain there.
    ///
    /// # Errors
    /// As [`Self::remove`].
    pub fn remove_by_event<D, C>(
        &mut self,
        vmi: &mut VmiCore<D>,
        controller: &mut C,
        event: &VmiEvent,
        key: &K,
    ) -> Result<Option<bool>>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let Some((view, pa)) = address(controller, event) else { return Ok(None) };
        let Some(found) = self.get_by_event(controller, event, key) else { return Ok(None) };
        let (va, root, global) = (found.va, found.context.root, found.global);
        let root = (!global).then_some(root);
        let same = self.views.iter().filter_map(|(view, _)| self.find_exact(*view, va, root, key));
        let ids: Vec<u32> = same.collect();
        self.take_out(vmi, controller, &ids)?;
        Ok(Some(self.count_on_page(view, pa.gfn()) == 0))
    }

    /// Removes every breakpoint of a view, all or none. Returns how many there were.
    ///
    /// # Errors
    /// As [`Self::remove`].
    pub fn remove_by_view<D, C>(&mut self, vmi: &mut VmiCore<D>, controller: &mut C, view: View) -> Result<usize>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let in_view = |(id, entry): (u32, &Option<Entry<K, T>>)| entry.as_ref().filter(|entry| entry.view == view).map(|_| id);
        let ids: Vec<u32> = (0..).zip(&self.entries).filter_map(in_view).collect();
        self.take_out(vmi, controller, &ids)?;
        Ok(ids.len())
    }

    /// Removes every breakpoint. Not all or nothing: as many as the driver lets go.
    ///
    /// # Errors
    /// [`VmiError::UndoFailed`] with those that could not be removed. They stay here, and calling again tries them.
    pub fn clear<D, C>(&mut self, vmi: &mut VmiCore<D>, controller: &mut C) -> Result<()>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let mut left = Left::default();
        for id in (0..self.entries.len() as u32).rev() {
            let Some((view, va)) = self.entry(id).map(|entry| (entry.view, entry.va)) else { continue };
            left.note(self.take_out(vmi, controller, &[id]), || format!("the breakpoint at {va} in view {view}"));
        }
        left.done()
    }

    /// A page went away: what is at `va` under `root` is no longer planted and waits, in every view. Breakpoints other roots
    /// hold on the same frame stay. Returns how many now wait.
    ///
    /// # Errors
    /// The controller's, with nothing changed.
    pub fn page_out<D, C>(&mut self, vmi: &mut VmiCore<D>, controller: &mut C, va: Va, root: Pa) -> Result<usize>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let moved = self.set_mappings(va, root, |pa| pa.is_some(), None);
        // The books still have to say what is on the pages, so only now are the sites given up.
        let mut steps = Vec::new();
        for (id, view, old) in &moved {
            if let Some(pa) = old.filter(|pa| self.entry(*id).is_some_and(|entry| !entry.is_at(*pa))) {
                steps.push((*view, pa, *id));
            }
        }
        let mut places: Vec<_> = steps.iter().map(|(view, pa, _)| (*view, *pa)).collect();
        if let Err(error) = self.unplant(vmi, controller, &mut places) {
            for (id, _, old) in moved {
                self.set_mapping(id, root, old);
            }
            return Err(error);
        }
        for (view, pa, id) in steps {
            self.detach(view, pa, id);
        }
        Ok(moved.len())
    }

    /// A page came: what waits at `va` under `root` is planted at `pa`, in every view. Returns how many were planted.
    ///
    /// # Errors
    /// The controller's, with all of them still waiting.
    pub fn page_in<D, C>(&mut self, vmi: &mut VmiCore<D>, controller: &mut C, va: Va, root: Pa, pa: Pa) -> Result<usize>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let is_there: Vec<u32> = self.owners_at(va, root).filter(|id| self.entry(*id).is_some_and(|e| e.is_at(pa))).collect();
        let moved = self.set_mappings(va, root, |pa| pa.is_none(), Some(pa));
        let fresh: Vec<_> = moved.iter().filter(|(id, ..)| !is_there.contains(id)).map(|(id, view, _)| (*id, *view)).collect();
        for (id, view) in &fresh {
            self.attach(*view, pa, *id);
        }
        let mut steps: Vec<_> = fresh.iter().map(|(_, view)| (*view, pa)).collect();
        if let Err(error) = self.plant(vmi, controller, &mut steps) {
            for (id, view) in fresh {
                self.detach(view, pa, id);
            }
            for (id, _, old) in moved {
                self.set_mapping(id, root, old);
            }
            return Err(error);
        }
        Ok(moved.len())
    }

    /// The breakpoints at `va` that were inserted with `root`, in every view.
    fn owners_at(&self, va: Va, root: Pa) -> impl Iterator<Item = u32> {
        let of_view = move |view: View, of: Option<Pa>| {
            let found = self.ids.iter_hash(id_hash(view, va, of)).copied();
            found.filter(move |id| {
                let fits = |e: &Entry<K, T>| e.view == view && e.va == va && e.global == of.is_none() && e.has_root(root);
                self.entry(*id).is_some_and(fits)
            })
        };
        self.views.iter().flat_map(move |(view, _)| of_view(*view, Some(root)).chain(of_view(*view, None)))
    }

    fn set_mappings(
        &mut self,
        va: Va,
        root: Pa,
        which: impl Fn(Option<Pa>) -> bool,
        to: Option<Pa>,
    ) -> Vec<(u32, View, Option<Pa>)> {
        let ids: Vec<u32> = self.owners_at(va, root).collect();
        let mut moved = Vec::new();
        for id in ids {
            let Some(entry) = self.entry_mut(id) else { continue };
            let view = entry.view;
            if let Some(mapping) = entry.mapping_mut(root).filter(|mapping| which(mapping.pa)) {
                moved.push((id, view, std::mem::replace(&mut mapping.pa, to)));
            }
        }
        moved
    }

    fn set_mapping(&mut self, id: u32, root: Pa, pa: Option<Pa>) {
        if let Some(mapping) = self.entry_mut(id).and_then(|entry| entry.mapping_mut(root)) {
            mapping.pa = pa;
        }
    }

    /// The breakpoint of `key` that `event` hit: one of the event's root before a global one.
    pub fn get_by_event<C: TapEvents + ?Sized>(&self, controller: &C, event: &VmiEvent, key: &K) -> Option<Found<'_, K, T>> {
        let (view, pa) = address(controller, event)?;
        let (va, root) = (event.registers.rip(), event.registers.root());
        let fits =
            |entry: &&Entry<K, T>| entry.va == va && entry.key == *key && (entry.global || entry.first.context.root == root);
        let hit = self.site(view, pa)?.owners().filter_map(|id| self.entry(id)).filter(fits).min_by_key(|entry| entry.global)?;
        Some(hit.found(Some(pa)))
    }

    /// Whether `key` has a breakpoint that `event` hit.
    pub fn contains_by_event<C: TapEvents + ?Sized>(&self, controller: &C, event: &VmiEvent, key: &K) -> bool {
        self.get_by_event(controller, event, key).is_some()
    }

    /// Whether anyone has a breakpoint at `va` in `view` that is hit under `root`, planted or waiting.
    pub fn contains_by_address(&self, va: Va, root: Pa, view: View) -> bool {
        [Some(root), None].into_iter().any(|of| {
            let fits = |e: &Entry<K, T>| e.view == view && e.va == va && e.index_root() == of;
            self.ids.find(id_hash(view, va, of), |id| self.entry(*id).is_some_and(fits)).is_some()
        })
    }

    /// Calls `f` for every breakpoint that is hit at `va` under `root` with `pa` in `view`, in the order they were planted.
    /// Allocates nothing. Returns how many breakpoints are at `pa`, hit or not: 0 says that the event is nobody's.
    #[inline]
    pub fn for_each_at(&self, view: View, pa: Pa, va: Va, root: Pa, mut f: impl FnMut(&K, &T)) -> usize {
        let Some(site) = self.site(view, pa) else { return 0 };
        for id in site.owners() {
            if let Some(entry) = self.entry(id)
                && entry.va == va
                && (entry.global || entry.first.context.root == root)
            {
                f(&entry.key, &entry.tag);
            }
        }
        1 + site.more().len()
    }

    /// How many breakpoints there are, planted or waiting. A global one counts once, however many roots it has.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Every breakpoint, in no particular order; a global one once, with the first place it is planted at.
    pub fn iter(&self) -> impl Iterator<Item = Found<'_, K, T>> {
        self.entries.iter().flatten().map(|entry| entry.found(entry.mappings().find_map(|mapping| mapping.pa)))
    }

    /// The breakpoints planted on a page of a view, and where.
    pub fn breakpoints_on_page(&self, view: View, gfn: Gfn) -> impl Iterator<Item = (Breakpoint<K, T>, Pa)> {
        let offsets = self.pages.get(&(view, gfn)).map_or(&[] as &[u16], Vec::as_slice);
        let sites = offsets.chunk_by(PartialEq::eq).filter_map(move |same| {
            let pa = gfn.pa(u64::from(*same.first()?));
            self.site(view, pa)
        });
        sites.flat_map(move |site| {
            let owners = site.owners().filter_map(|id| self.entry(id));
            owners.map(|entry| {
                let Entry { va, key, tag, view, global, first, .. } = entry;
                let (key, tag) = (key.clone(), tag.clone());
                (Breakpoint { view: *view, va: *va, context: first.context, key, tag, global: *global }, site.pa)
            })
        })
    }

    /// How many breakpoints are planted on a page of a view; one of two owners counts twice.
    pub fn count_on_page(&self, view: View, gfn: Gfn) -> usize {
        self.pages.get(&(view, gfn)).map_or(0, Vec::len)
    }

    #[inline]
    fn entry(&self, id: u32) -> Option<&Entry<K, T>> {
        self.entries.get(id as usize)?.as_ref()
    }

    fn entry_mut(&mut self, id: u32) -> Option<&mut Entry<K, T>> {
        self.entries.get_mut(id as usize)?.as_mut()
    }

    #[inline]
    fn site(&self, view: View, pa: Pa) -> Option<&Site> {
        self.sites.find(site_hash(view, pa), |site| site.pa == pa && site.view == view)
    }

    /// The one of that root, or the global one if `of` is none.
    fn find_exact(&self, view: View, va: Va, of: Option<Pa>, key: &K) -> Option<u32> {
        let fits = |e: &Entry<K, T>| e.view == view && e.va == va && e.index_root() == of && e.key == *key;
        self.ids.find(id_hash(view, va, of), |id| self.entry(*id).is_some_and(fits)).copied()
    }

    fn find_global(&self, view: View, va: Va, root: Pa, key: &K) -> Option<u32> {
        self.find_exact(view, va, None, key).filter(|id| self.entry(*id).is_some_and(|entry| entry.has_root(root)))
    }

    fn find(&self, view: View, va: Va, root: Pa, key: &K) -> Option<u32> {
        self.find_exact(view, va, Some(root), key).or_else(|| self.find_global(view, va, root, key))
    }

    fn place(&self, breakpoint: &Breakpoint<K, T>) -> Result<Place> {
        let Breakpoint { view, va, key, global, context, .. } = breakpoint;
        let own = self.find_exact(*view, *va, Some(context.root), key);
        let shared = self.find_global(*view, *va, context.root, key);
        let (same, other) = if *global { (shared, own) } else { (own, shared) };
        if same.is_some() {
            return Ok(Place::Duplicate);
        }
        if other.is_some() {
            return Err(VmiError::BreakpointConflict { va: *va });
        }
        let joins = self.find_exact(*view, *va, None, key).filter(|_| *global);
        Ok(joins.map_or(Place::New, Place::Joins))
    }

    /// Writes a new breakpoint into the books, planted nowhere yet.
    fn add(&mut self, breakpoint: Breakpoint<K, T>, first: Mapping) -> u32 {
        let Breakpoint { view, va, key, tag, global, .. } = breakpoint;
        let entry = Entry { va, first, more: None, key, tag, view, global };
        let hash = id_hash(view, va, entry.index_root());
        let id = self.free.pop().unwrap_or(self.entries.len() as u32);
        match self.entries.get_mut(id as usize) {
            Some(slot) => *slot = Some(entry),
            None => self.entries.push(Some(entry)),
        }
        let entries = &self.entries;
        self.ids.insert_unique(hash, id, |id| {
            let entry = entries.get(*id as usize).and_then(Option::as_ref);
            entry.map_or(0, |entry| id_hash(entry.view, entry.va, entry.index_root()))
        });
        match self.views.iter_mut().find(|(known, _)| *known == view) {
            Some((_, count)) => *count += 1,
            None => self.views.push((view, 1)),
        }
        id
    }

    /// Takes a breakpoint out of the books, with wherever it is planted.
    fn forget(&mut self, id: u32) {
        for (view, pa) in self.places(id) {
            self.detach(view, pa, id);
        }
        let Some(entry) = self.entry(id) else { return };
        let (view, hash) = (entry.view, id_hash(entry.view, entry.va, entry.index_root()));
        if let Ok(slot) = self.ids.find_entry(hash, |known| *known == id) {
            slot.remove();
        }
        if let Some(slot) = self.entries.get_mut(id as usize) {
            *slot = None;
            self.free.push(id);
        }
        if let Some(index) = self.views.iter().position(|(known, _)| *known == view)
            && let Some((_, count)) = self.views.get_mut(index)
        {
            *count -= 1;
            if *count == 0 {
                self.views.swap_remove(index);
            }
        }
    }

    /// Where a breakpoint is planted, each place once.
    fn places(&self, id: u32) -> Vec<(View, Pa)> {
        let mut places = Vec::new();
        if let Some(entry) = self.entry(id) {
            for pa in entry.mappings().filter_map(|mapping| mapping.pa) {
                if !places.contains(&(entry.view, pa)) {
                    places.push((entry.view, pa));
                }
            }
        }
        places
    }

    fn attach(&mut self, view: View, pa: Pa, id: u32) {
        let hash = site_hash(view, pa);
        if let Some(site) = self.sites.find_mut(hash, |site| site.pa == pa && site.view == view) {
            site.more.get_or_insert_default().push(id);
        } else {
            let site = Site { pa, first: id, more: None, view };
            self.sites.insert_unique(hash, site, |site| site_hash(site.view, site.pa));
        }
        let offsets = self.pages.entry((view, pa.gfn())).or_default();
        let offset = pa.page_offset() as u16;
        offsets.insert(offsets.partition_point(|known| *known < offset), offset);
    }

    fn detach(&mut self, view: View, pa: Pa, id: u32) {
        let Ok(mut slot) = self.sites.find_entry(site_hash(view, pa), |site| site.pa == pa && site.view == view) else { return };
        let site = slot.get_mut();
        // The owners that stay keep their order.
        let mut owners: Vec<u32> = site.owners().filter(|owner| *owner != id).collect();
        if owners.is_empty() {
            slot.remove();
        } else {
            site.first = owners.remove(0);
            site.more = (!owners.is_empty()).then(|| Box::new(owners));
        }
        if let Some(offsets) = self.pages.get_mut(&(view, pa.gfn())) {
            if let Ok(index) = offsets.binary_search(&(pa.page_offset() as u16)) {
                offsets.remove(index);
            }
            if offsets.is_empty() {
                self.pages.remove(&(view, pa.gfn()));
            }
        }
    }

    /// Removes the breakpoints from the guest, then from the books.
    fn take_out<D, C>(&mut self, vmi: &mut VmiCore<D>, controller: &mut C, ids: &[u32]) -> Result<()>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        let mut steps: Vec<_> = ids.iter().flat_map(|id| self.places(*id)).collect();
        self.unplant(vmi, controller, &mut steps)?;
        for id in ids {
            self.forget(*id);
        }
        Ok(())
    }

    /// Whether the places that begin at `steps`, all on one page, are everything the books have on that page.
    fn is_all_of_page(&self, page: &[(View, Pa)]) -> bool {
        page.first().is_some_and(|(view, pa)| self.count_on_page(*view, pa.gfn()) == page.len())
    }

    /// Plants what the books already have at `steps`: pages that had nothing are monitored first.
    fn plant<D, C>(&self, vmi: &mut VmiCore<D>, controller: &mut C, steps: &mut [(View, Pa)]) -> Result<()>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        if let [(view, pa)] = *steps {
            let is_first = self.is_all_of_page(steps);
            if is_first {
                controller.monitor(vmi, pa.gfn(), view)?;
            }
            return controller.insert_breakpoint(vmi, pa, view).map_err(|cause| {
                let mut left = Left::default();
                if is_first {
                    left.note(controller.unmonitor(vmi, pa.gfn(), view), || format!("{} monitored in view {view}", pa.gfn()));
                }
                left.after(cause)
            });
        }
        steps.sort_unstable();
        let mut monitored = Vec::new();
        let mut planted = 0;
        let mut result = Ok(());
        for in_view in steps.chunk_by(|a, b| a.0 == b.0) {
            let Some((view, _)) = in_view.first().copied() else { continue };
            let pages = in_view.chunk_by(|a, b| a.1.gfn() == b.1.gfn()).filter(|page| self.is_all_of_page(page));
            let gfns: Vec<Gfn> = pages.filter_map(|page| page.first()).map(|(_, pa)| pa.gfn()).collect();
            result = if gfns.is_empty() { Ok(()) } else { controller.monitor_many(vmi, &gfns, view) };
            if result.is_err() {
                break;
            }
            monitored.push((view, gfns));
        }
        if result.is_ok() {
            for page in steps.chunk_by(|a, b| a.0 == b.0 && a.1.gfn() == b.1.gfn()) {
                let Some((view, pa)) = page.first().copied() else { continue };
                let offsets: Vec<u16> = page.iter().map(|(_, pa)| pa.page_offset() as u16).collect();
                result = controller.insert_page(vmi, pa.gfn(), &offsets, view);
                if result.is_err() {
                    break;
                }
                planted += page.len();
            }
        }
        result.map_err(|cause| {
            let mut left = Left::default();
            for (view, pa) in steps.get(..planted).unwrap_or_default().iter().rev() {
                left.note(controller.remove_breakpoint(vmi, *pa, *view), || format!("a breakpoint at {pa} in view {view}"));
            }
            for (view, gfns) in monitored.iter().rev() {
                for gfn in gfns.iter().rev() {
                    left.note(controller.unmonitor(vmi, *gfn, *view), || format!("{gfn} monitored in view {view}"));
                }
            }
            left.after(cause)
        })
    }

    /// Removes what the books still have at `steps`: pages that keep nothing are no longer monitored then. The last page
    /// goes first, so that undoing, which goes the other way, gets the frames in the order they were taken.
    fn unplant<D, C>(&self, vmi: &mut VmiCore<D>, controller: &mut C, steps: &mut [(View, Pa)]) -> Result<()>
    where
        D: VmiDriver + ?Sized,
        C: TapController<D> + ?Sized,
    {
        steps.sort_unstable_by(|a, b| b.cmp(a));
        let same_page = |a: &(View, Pa), b: &(View, Pa)| a.0 == b.0 && a.1.gfn() == b.1.gfn();
        let mut removed = 0;
        let mut unmonitored = Vec::new();
        let mut result = Ok(());
        'pages: for page in steps.chunk_by(same_page) {
            for (view, pa) in page {
                result = controller.remove_breakpoint(vmi, *pa, *view);
                if result.is_err() {
                    break 'pages;
                }
                removed += 1;
            }
            if let Some((view, pa)) = page.first().filter(|_| self.is_all_of_page(page)) {
                result = controller.unmonitor(vmi, pa.gfn(), *view);
                if result.is_err() {
                    break;
                }
                unmonitored.push((*view, pa.gfn()));
            }
        }
        result.map_err(|cause| {
            let mut left = Left::default();
            for page in steps.get(..removed).unwrap_or_default().chunk_by(same_page).rev() {
                let Some((view, pa)) = page.first() else { continue };
                if unmonitored.pop_if(|last| *last == (*view, pa.gfn())).is_some() {
                    let what = || format!("{} not monitored in view {view}", pa.gfn());
                    left.note(controller.monitor(vmi, pa.gfn(), *view), what);
                }
                for (view, pa) in page.iter().rev() {
                    left.note(controller.insert_breakpoint(vmi, *pa, *view), || format!("no breakpoint at {pa} in view {view}"));
                }
            }
            left.after(cause)
        })
    }
}
