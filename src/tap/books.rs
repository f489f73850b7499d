//! The manager's books: breakpoints by identity, by address and by page. No driver call is made here.

use std::hash::{BuildHasher, Hash};

use hashbrown::HashTable;
use rustc_hash::{FxBuildHasher, FxHashMap};
use smallvec::SmallVec;

use super::manager::{Breakpoint, Found};
use crate::addr::{Gfn, Pa, Va, View};
use crate::arch::amd64::AddressContext;
use crate::error::{Result, VmiError};

/// One root a breakpoint was inserted with, and where it is planted for that.
#[derive(Clone, Copy)]
pub(super) struct Mapping {
    pub(super) context: AddressContext,
    pub(super) pa: Option<Pa>,
}

pub(super) struct Entry<K, T> {
    pub(super) va: Va,
    pub(super) first: Mapping,
    /// The other roots of a global one.
    #[expect(clippy::box_collection, reason = "almost always absent: one word instead of three")]
    pub(super) more: Option<Box<Vec<Mapping>>>,
    pub(super) key: K,
    pub(super) tag: T,
    pub(super) view: View,
    pub(super) global: bool,
}

impl<K, T> Entry<K, T> {
    pub(super) fn mappings(&self) -> impl Iterator<Item = &Mapping> {
        std::iter::once(&self.first).chain(self.more.iter().flat_map(|more| more.iter()))
    }

    pub(super) fn mapping_mut(&mut self, root: Pa) -> Option<&mut Mapping> {
        let more = self.more.iter_mut().flat_map(|more| more.iter_mut());
        std::iter::once(&mut self.first).chain(more).find(|mapping| mapping.context.root == root)
    }

    /// Drops a root under which it waits, unless that is its only one. Returns whether it did.
    pub(super) fn forget_root(&mut self, root: Pa) -> bool {
        let Some(more) = &mut self.more else { return false };
        let goes = |mapping: &Mapping| mapping.context.root == root && mapping.pa.is_none();
        if goes(&self.first) {
            self.first = more.remove(0);
        } else if let Some(index) = more.iter().position(goes) {
            more.remove(index);
        } else {
            return false;
        }
        if more.is_empty() {
            self.more = None;
        }
        true
    }

    pub(super) fn has_root(&self, root: Pa) -> bool {
        self.mappings().any(|mapping| mapping.context.root == root)
    }

    pub(super) fn is_at(&self, pa: Pa) -> bool {
        self.mappings().any(|mapping| mapping.pa == Some(pa))
    }

    pub(super) fn found(&self, pa: Option<Pa>) -> Found<'_, K, T> {
        let Self { va, key, tag, view, global, .. } = self;
        Found { view: *view, va: *va, pa, context: self.first.context, key, tag, global: *global }
    }

    /// The root its place in the index is for: every root has its own breakpoints, and all of them share the global ones.
    pub(super) fn index_root(&self) -> Option<Pa> {
        (!self.global).then_some(self.first.context.root)
    }
}

/// One byte of a view that is a breakpoint, and whose. Most have one owner.
pub(super) struct Site {
    pub(super) pa: Pa,
    first: u32,
    #[expect(clippy::box_collection, reason = "almost always absent: one word instead of three")]
    more: Option<Box<Vec<u32>>>,
    view: View,
}

impl Site {
    pub(super) fn more(&self) -> &[u32] {
        self.more.as_deref().map_or(&[], Vec::as_slice)
    }

    pub(super) fn owners(&self) -> impl Iterator<Item = u32> {
        std::iter::once(self.first).chain(self.more().iter().copied())
    }
}

/// What an insert has to do.
pub(super) enum Place {
    Duplicate,
    New,
    /// A global one that exists, under one more root.
    Joins(u32),
}

pub(super) fn site_hash(view: View, pa: Pa) -> u64 {
    FxBuildHasher.hash_one((pa.0, view.0))
}

pub(super) fn id_hash(view: View, va: Va, root: Option<Pa>) -> u64 {
    FxBuildHasher.hash_one((va.0, view.0, root.map_or(u64::MAX, |root| root.0)))
}

/// Which breakpoints there are and where they are planted. Calls no driver.
pub(super) struct Books<K, T> {
    pub(super) entries: Vec<Option<Entry<K, T>>>,
    free: Vec<u32>,
    pub(super) ids: HashTable<u32>,
    sites: HashTable<Site>,
    /// The offset of every owner's breakpoint on a page, ascending: one that two owners want is there twice.
    pub(super) pages: FxHashMap<(View, Gfn), SmallVec<[u16; 8]>>,
    /// The views there are breakpoints in, and how many.
    pub(super) views: Vec<(View, usize)>,
}

impl<K, T> Default for Books<K, T> {
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

impl<K: Eq + Hash + Clone, T: Clone> Books<K, T> {
    /// Takes the newest mapping of a breakpoint out of the books, and the breakpoint itself if it was new.
    pub(super) fn unrecord(&mut self, id: u32, is_new: bool) {
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

    /// The breakpoints at `va` that were inserted with `root`, in every view.
    pub(super) fn owners_at(&self, va: Va, root: Pa) -> impl Iterator<Item = u32> {
        let of_view = move |view: View, of: Option<Pa>| {
            let found = self.ids.iter_hash(id_hash(view, va, of)).copied();
            found.filter(move |id| {
                let fits = |e: &Entry<K, T>| e.view == view && e.va == va && e.global == of.is_none() && e.has_root(root);
                self.entry(*id).is_some_and(fits)
            })
        };
        self.views.iter().flat_map(move |(view, _)| of_view(*view, Some(root)).chain(of_view(*view, None)))
    }

    /// The breakpoint at `va` that was inserted with `root`, if there is one only and it has no other root.
    pub(super) fn only_owner_at(&self, va: Va, root: Pa) -> Option<(u32, View, Option<Pa>)> {
        let mut owners = self.owners_at(va, root);
        let (id, None) = (owners.next()?, owners.next()) else { return None };
        let entry = self.entry(id).filter(|entry| entry.more.is_none())?;
        Some((id, entry.view, entry.first.pa))
    }

    pub(super) fn set_mappings(
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

    pub(super) fn set_mapping(&mut self, id: u32, root: Pa, pa: Option<Pa>) {
        if let Some(mapping) = self.entry_mut(id).and_then(|entry| entry.mapping_mut(root)) {
            mapping.pa = pa;
        }
    }

    #[inline]
    pub(super) fn entry(&self, id: u32) -> Option<&Entry<K, T>> {
        self.entries.get(id as usize)?.as_ref()
    }

    pub(super) fn entry_mut(&mut self, id: u32) -> Option<&mut Entry<K, T>> {
        self.entries.get_mut(id as usize)?.as_mut()
    }

    #[inline]
    pub(super) fn site(&self, view: View, pa: Pa) -> Option<&Site> {
        self.sites.find(site_hash(view, pa), |site| site.pa == pa && site.view == view)
    }

    /// The one of that root, or the global one if `of` is none.
    pub(super) fn find_exact(&self, view: View, va: Va, of: Option<Pa>, key: &K) -> Option<u32> {
        let fits = |e: &Entry<K, T>| e.view == view && e.va == va && e.index_root() == of && e.key == *key;
        self.ids.find(id_hash(view, va, of), |id| self.entry(*id).is_some_and(fits)).copied()
    }

    pub(super) fn find_global(&self, view: View, va: Va, root: Pa, key: &K) -> Option<u32> {
        self.find_exact(view, va, None, key).filter(|id| self.entry(*id).is_some_and(|entry| entry.has_root(root)))
    }

    pub(super) fn find(&self, view: View, va: Va, root: Pa, key: &K) -> Option<u32> {
        self.find_exact(view, va, Some(root), key).or_else(|| self.find_global(view, va, root, key))
    }

    pub(super) fn place(&self, breakpoint: &Breakpoint<K, T>) -> Result<Place> {
        let Breakpoint { view, va, key, global, context, .. } = breakpoint;
        let own = self.find_exact(*view, *va, Some(context.root), key);
        let of_all = self.find_exact(*view, *va, None, key);
        let shared = of_all.filter(|id| self.entry(*id).is_some_and(|entry| entry.has_root(context.root)));
        let (same, other) = if *global { (shared, own) } else { (own, shared) };
        if same.is_some() {
            return Ok(Place::Duplicate);
        }
        if other.is_some() {
            return Err(VmiError::BreakpointConflict { va: *va });
        }
        Ok(of_all.filter(|_| *global).map_or(Place::New, Place::Joins))
    }

    /// Writes a new breakpoint into the books, planted nowhere yet.
    pub(super) fn add(&mut self, breakpoint: Breakpoint<K, T>, first: Mapping) -> u32 {
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
    pub(super) fn forget(&mut self, id: u32) {
        let Some(entry) = self.entry(id) else { return };
        if entry.more.is_none() {
            if let (view, Some(pa)) = (entry.view, entry.first.pa) {
                self.detach(view, pa, id);
            }
        } else {
            for (view, pa) in self.places(id) {
                self.detach(view, pa, id);
            }
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
    pub(super) fn places(&self, id: u32) -> Vec<(View, Pa)> {
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

    pub(super) fn attach(&mut self, view: View, pa: Pa, id: u32) {
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

    pub(super) fn detach(&mut self, view: View, pa: Pa, id: u32) {
        let Ok(mut slot) = self.sites.find_entry(site_hash(view, pa), |site| site.pa == pa && site.view == view) else { return };
        let site = slot.get_mut();
        if site.more.is_none() {
            slot.remove();
        } else {
            // The owners that stay keep their order.
            let owners: Vec<u32> = site.owners().filter(|owner| *owner != id).collect();
            if let Some((first, more)) = owners.split_first() {
                site.first = *first;
                site.more = (!more.is_empty()).then(|| Box::new(more.to_vec()));
            }
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
}
