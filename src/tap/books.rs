//! The manager's books: breakpoints by identity, by address and by page. No driver call is made here.

use std::hash::{BuildHasher, Hash};

use hashbrown::HashTable;
use rustc_hash::{FxBuildHasher, FxHashMap};

use super::manager::{Breakpoint, Found};
use super::pages::{Pages, Reach};
use crate::addr::{PHYSICAL_BITS, Pa, Va, View};
use crate::arch::amd64::AddressContext;
use crate::error::{Result, VmiError};

/// One root a breakpoint was inserted with, and where it is planted for that.
#[derive(Clone, Copy)]
pub(super) struct Mapping {
    pub(super) context: AddressContext,
    pub(super) pa: Option<Pa>,
}

/// Stands for no address: it has more bits than there are ([`Books::check_place`]).
const NOWHERE: Pa = Pa(u64::MAX);

/// A breakpoint with its first root. There can be a million of them.
pub(super) struct Entry<O> {
    owner: O,
    pub(super) va: Va,
    root: Pa,
    /// Where it is planted for that root, or [`NOWHERE`].
    pa: Pa,
    pub(super) view: View,
    levels: u8,
    pub(super) global: bool,
}

const _: () = assert!(size_of::<Option<Entry<std::num::NonZeroU32>>>() == 32);

impl<O> Entry<O> {
    pub(super) fn first(&self) -> Mapping {
        let pa = (self.pa != NOWHERE).then_some(self.pa);
        Mapping { context: AddressContext { root: self.root, levels: self.levels }, pa }
    }

    fn set_first(&mut self, Mapping { context: AddressContext { root, levels }, pa }: Mapping) {
        (self.root, self.levels, self.pa) = (root, levels, pa.unwrap_or(NOWHERE));
    }

    /// The root its place in the index is for: every root has its own breakpoints, and all of them share the global ones.
    pub(super) fn index_root(&self) -> Option<Pa> {
        (!self.global).then_some(self.root)
    }

    /// Whether it is hit at `va` under `root`.
    pub(super) fn fits(&self, va: Va, root: Pa) -> bool {
        self.va == va && (self.global || self.root == root)
    }
}

/// What an insert has to do.
pub(super) enum Place {
    Duplicate,
    New,
    /// A global one that exists, under one more root.
    Joins(u32),
}

pub(super) fn id_hash(view: View, va: Va, root: Option<Pa>) -> u64 {
    FxBuildHasher.hash_one((va.0, view.0, root.map_or(u64::MAX, |root| root.0)))
}

/// Which breakpoints there are and where they are planted. Calls no driver.
pub(super) struct Books<K, T> {
    pub(super) entries: Vec<Option<Entry<(K, T)>>>,
    free: Vec<u32>,
    pub(super) ids: HashTable<u32>,
    /// The other roots of global ones; hardly any has some.
    more: FxHashMap<u32, Vec<Mapping>>,
    pub(super) pages: Pages<(K, T)>,
    /// The views there are breakpoints in, and how many.
    pub(super) views: Vec<(View, usize)>,
}

impl<K, T> Default for Books<K, T> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
            ids: HashTable::new(),
            more: FxHashMap::default(),
            pages: Pages::default(),
            views: Vec::new(),
        }
    }
}

impl<K: Eq + Hash + Clone, T: Clone> Books<K, T> {
    /// Makes room for so many breakpoints more at once: growing by and by leaves up to twice the room that is needed.
    pub(super) fn reserve(&mut self, count: usize) {
        self.entries.reserve(count.saturating_sub(self.free.len()));
    }

    /// The roots of a breakpoint beside its first.
    fn more(&self, id: u32) -> &[Mapping] {
        if self.more.is_empty() { &[] } else { self.more.get(&id).map_or(&[], Vec::as_slice) }
    }

    /// Every root of a breakpoint.
    pub(super) fn mappings(&self, id: u32) -> impl Iterator<Item = Mapping> {
        self.entry(id).map(Entry::first).into_iter().chain(self.more(id).iter().copied())
    }

    pub(super) fn has_root(&self, id: u32, root: Pa) -> bool {
        self.mappings(id).any(|mapping| mapping.context.root == root)
    }

    pub(super) fn is_at(&self, id: u32, pa: Pa) -> bool {
        self.mappings(id).any(|mapping| mapping.pa == Some(pa))
    }

    /// A global one is there under one more root.
    pub(super) fn join(&mut self, id: u32, mapping: Mapping) {
        self.more.entry(id).or_default().push(mapping);
    }

    /// Changes where a breakpoint is under a root, if `which` says so; how it was before.
    fn replace(&mut self, id: u32, root: Pa, which: impl Fn(Option<Pa>) -> bool, to: Option<Pa>) -> Option<Mapping> {
        let entry = self.entries.get_mut(id as usize)?.as_mut()?;
        if entry.root == root {
            let before = entry.first();
            return which(before.pa).then(|| {
                entry.set_first(Mapping { pa: to, ..before });
                before
            });
        }
        let mapping = self.more.get_mut(&id)?.iter_mut().find(|mapping| mapping.context.root == root)?;
        which(mapping.pa).then(|| std::mem::replace(mapping, Mapping { pa: to, ..*mapping }))
    }

    /// Drops a root under which it waits, unless that is its only one. Returns whether it did.
    pub(super) fn forget_root(&mut self, id: u32, root: Pa) -> bool {
        let goes = |mapping: &Mapping| mapping.context.root == root && mapping.pa.is_none();
        let Some(entry) = self.entries.get_mut(id as usize).and_then(Option::as_mut) else { return false };
        let Some(more) = self.more.get_mut(&id) else { return false };
        if goes(&entry.first()) {
            entry.set_first(more.remove(0));
        } else if let Some(index) = more.iter().position(goes) {
            more.remove(index);
        } else {
            return false;
        }
        if more.is_empty() {
            self.more.remove(&id);
        }
        true
    }

    /// Takes the newest mapping of a breakpoint out of the books, and the breakpoint itself if it was new.
    pub(super) fn unrecord(&mut self, id: u32, is_new: bool) {
        if is_new {
            self.forget(id);
            return;
        }
        let Some(more) = self.more.get_mut(&id) else { return };
        let Some(mapping) = more.pop() else { return };
        if more.is_empty() {
            self.more.remove(&id);
        }
        let Some(view) = self.entry(id).map(|entry| entry.view) else { return };
        if let Some(pa) = mapping.pa.filter(|pa| !self.is_at(id, *pa)) {
            self.detach(view, pa, id);
        }
    }

    /// The breakpoints at `va` that were inserted with `root`, in every view.
    pub(super) fn owners_at(&self, va: Va, root: Pa) -> impl Iterator<Item = u32> {
        let of_view = move |view: View, of: Option<Pa>| {
            let found = self.ids.iter_hash(id_hash(view, va, of)).copied();
            found.filter(move |id| {
                let fits = |e: &Entry<_>| e.view == view && e.va == va && e.global == of.is_none();
                self.entry(*id).is_some_and(fits) && self.has_root(*id, root)
            })
        };
        self.views.iter().flat_map(move |(view, _)| of_view(*view, Some(root)).chain(of_view(*view, None)))
    }

    /// The breakpoint at `va` that was inserted with `root`, if there is one only and it has no other root.
    pub(super) fn only_owner_at(&self, va: Va, root: Pa) -> Option<(u32, View, Option<Pa>)> {
        let mut owners = self.owners_at(va, root);
        let (id, None) = (owners.next()?, owners.next()) else { return None };
        let entry = self.entry(id).filter(|_| self.more(id).is_empty())?;
        Some((id, entry.view, entry.first().pa))
    }

    /// The only place of a breakpoint that has one root; none if it waits or has more.
    pub(super) fn only_place(&self, id: u32) -> Option<Pa> {
        self.entry(id).filter(|_| self.more(id).is_empty())?.first().pa
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
            let Some(view) = self.entry(id).map(|entry| entry.view) else { continue };
            moved.extend(self.replace(id, root, &which, to).map(|before| (id, view, before.pa)));
        }
        moved
    }

    pub(super) fn set_mapping(&mut self, id: u32, root: Pa, pa: Option<Pa>) {
        self.replace(id, root, |_| true, pa);
    }

    pub(super) fn entry(&self, id: u32) -> Option<&Entry<(K, T)>> {
        self.entries.get(id as usize)?.as_ref()
    }

    /// A breakpoint as it is at `pa`.
    pub(super) fn found(&self, id: u32, pa: Option<Pa>) -> Option<Found<'_, K, T>> {
        let entry = self.entry(id)?;
        let (key, tag) = &entry.owner;
        Some(Found { view: entry.view, va: entry.va, pa, context: entry.first().context, key, tag, global: entry.global })
    }

    /// Calls `f` for each breakpoint that is hit at `va` under `root` of those planted at `pa`, in the order they were planted. Returns how
    /// many there are at `pa`, hit or not.
    #[expect(clippy::inline_always, reason = "as `Pages::for_each_at`")]
    #[inline(always)]
    pub(super) fn for_each_at(&self, view: View, pa: Pa, va: Va, root: Pa, mut f: impl FnMut(&K, &T)) -> usize {
        let fits = |id| self.entry(id).is_some_and(|entry| entry.fits(va, root));
        self.pages.for_each_at((view, pa), va, root, fits, |(key, tag)| f(key, tag))
    }

    /// Those for which [`Self::for_each_at`] calls.
    pub(super) fn hit_at(&self, view: View, pa: Pa, va: Va, root: Pa) -> impl Iterator<Item = Found<'_, K, T>> {
        let fitting = self.pages.ids_at(view, pa).filter(move |id| self.entry(*id).is_some_and(|entry| entry.fits(va, root)));
        fitting.filter_map(move |id| self.found(id, Some(pa)))
    }

    /// The one of that root, or the global one if `of` is none.
    pub(super) fn find_exact(&self, view: View, va: Va, of: Option<Pa>, key: &K) -> Option<u32> {
        let is_it = |e: &Entry<(K, T)>| e.view == view && e.va == va && e.index_root() == of && e.owner.0 == *key;
        self.ids.find(id_hash(view, va, of), |id| self.entry(*id).is_some_and(is_it)).copied()
    }

    pub(super) fn find_global(&self, view: View, va: Va, root: Pa, key: &K) -> Option<u32> {
        self.find_exact(view, va, None, key).filter(|id| self.has_root(*id, root))
    }

    pub(super) fn find(&self, view: View, va: Va, root: Pa, key: &K) -> Option<u32> {
        self.find_exact(view, va, Some(root), key).or_else(|| self.find_global(view, va, root, key))
    }

    pub(super) fn place(&self, breakpoint: &Breakpoint<K, T>) -> Result<Place> {
        let Breakpoint { view, va, key, global, context, .. } = breakpoint;
        let own = self.find_exact(*view, *va, Some(context.root), key);
        let of_all = self.find_exact(*view, *va, None, key);
        let shared = of_all.filter(|id| self.has_root(*id, context.root));
        let (same, other) = if *global { (shared, own) } else { (own, shared) };
        if same.is_some() {
            return Ok(Place::Duplicate);
        }
        if other.is_some() {
            return Err(VmiError::BreakpointConflict { va: *va });
        }
        Ok(of_all.filter(|_| *global).map_or(Place::New, Place::Joins))
    }

    /// An error for an address that can be none of a planted breakpoint.
    pub(super) fn check_place(pa: Option<Pa>) -> Result<()> {
        let Some(pa) = pa.filter(|pa| pa.0 >> PHYSICAL_BITS != 0) else { return Ok(()) };
        Err(VmiError::InvalidArgument { what: "pa", reason: format!("{pa} has more than {PHYSICAL_BITS} bits") })
    }

    /// Writes a new breakpoint into the books, planted at `pa` if that is given.
    pub(super) fn add(&mut self, breakpoint: Breakpoint<K, T>, pa: Option<Pa>) -> u32 {
        let Breakpoint { view, va, context, key, tag, global } = breakpoint;
        let AddressContext { root, levels } = context;
        let owner = (key, tag);
        let planted = pa.map(|pa| (pa, owner.clone()));
        let entry = Entry { owner, va, root, pa: pa.unwrap_or(NOWHERE), view, levels, global };
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
        if let Some((pa, owner)) = planted {
            let reach = if global { Reach::Every } else { Reach::Only(root) };
            self.pages.attach(view, pa, id, owner, va, reach);
        }
        id
    }

    /// Takes a breakpoint out of the books, with wherever it is planted.
    pub(super) fn forget(&mut self, id: u32) {
        let Some(entry) = self.entry(id) else { return };
        let (view, hash) = (entry.view, id_hash(entry.view, entry.va, entry.index_root()));
        if let Some(pa) = self.only_place(id) {
            self.detach(view, pa, id);
        } else {
            for (view, pa) in self.places(id) {
                self.detach(view, pa, id);
            }
        }
        self.more.remove(&id);
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
        if let Some(view) = self.entry(id).map(|entry| entry.view) {
            for pa in self.mappings(id).filter_map(|mapping| mapping.pa) {
                if !places.contains(&(view, pa)) {
                    places.push((view, pa));
                }
            }
        }
        places
    }

    pub(super) fn attach(&mut self, view: View, pa: Pa, id: u32) {
        let Some(entry) = self.entry(id) else { return };
        let (va, reach, owner) = (entry.va, entry.index_root().map_or(Reach::Every, Reach::Only), entry.owner.clone());
        self.pages.attach(view, pa, id, owner, va, reach);
    }

    pub(super) fn detach(&mut self, view: View, pa: Pa, id: u32) {
        self.pages.detach(view, pa, id);
    }
}
