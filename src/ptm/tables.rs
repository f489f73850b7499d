//! The monitor's books: which entries of which tables lead to which pages. No driver call is made here.

use std::sync::Arc;

use rustc_hash::{FxHashMap, FxHashSet};

use crate::addr::{Gfn, Pa};
use crate::arch::amd64::{AddressContext, pte};

/// The processor sets these by itself, and they say nothing about where an entry leads.
const IGNORED: u64 = pte::A | pte::D;

/// The entries that one page is found through, from the root's down; tables that point at themselves bring one more than once.
#[derive(Clone, Copy, Default)]
pub(super) struct Path {
    entries: [Pa; 5],
    count: u8,
}

impl Path {
    /// A sixth entry is not taken: no tables have so many levels.
    pub(super) fn push(&mut self, entry: Pa) {
        if let Some(slot) = self.entries.get_mut(usize::from(self.count)) {
            *slot = entry;
            self.count += 1;
        }
    }

    pub(super) fn entries(&self) -> &[Pa] {
        self.entries.get(..usize::from(self.count)).unwrap_or_default()
    }

    /// Its entries that are not in `other`.
    pub(super) fn without(&self, other: &Self) -> Self {
        let mut rest = Self::default();
        self.entries().iter().filter(|entry| !other.entries().contains(entry)).for_each(|entry| rest.push(*entry));
        rest
    }
}

/// What neighbouring pages have in common: the page tables, and the way down to the table that has their last entries.
#[derive(PartialEq, Eq)]
pub(super) struct Way {
    pub(super) context: AddressContext,
    entries: Box<[Pa]>,
}

/// A path as a page keeps it.
pub(super) struct Kept {
    way: Arc<Way>,
    last: Option<Pa>,
}

impl Kept {
    pub(super) fn context(&self) -> AddressContext {
        self.way.context
    }

    pub(super) fn path(&self) -> Path {
        let mut path = Path::default();
        self.way.entries.iter().chain(&self.last).for_each(|entry| path.push(*entry));
        path
    }
}

/// One entry, and the pages that are found through it: one, or a set of them.
struct Slot {
    value: u64,
    /// A page's number, or that of a set.
    pages: u32,
    index: u16,
    is_set: bool,
}

/// One table: its entries that something is found through, ascending.
#[derive(Default)]
struct Table {
    slots: Vec<Slot>,
    /// The way on which it was reached last.
    way: Option<Arc<Way>>,
}

impl Table {
    fn find(&self, index: u16) -> Result<usize, usize> {
        self.slots.binary_search_by_key(&index, |slot| slot.index)
    }
}

/// Sets of pages, by number.
#[derive(Default)]
struct Sets {
    all: Vec<FxHashSet<u32>>,
    free: Vec<u32>,
}

impl Sets {
    fn get(&self, number: u32) -> Option<&FxHashSet<u32>> {
        self.all.get(number as usize)
    }

    fn add(&mut self, pages: [u32; 2]) -> u32 {
        let set = FxHashSet::from_iter(pages);
        let number = self.free.pop().unwrap_or(self.all.len() as u32);
        match self.all.get_mut(number as usize) {
            Some(slot) => *slot = set,
            None => self.all.push(set),
        }
        number
    }

    /// Notes that `page` is found through the entry. Returns whether that is news.
    fn enter(&mut self, slot: &mut Slot, page: u32) -> bool {
        if slot.is_set {
            return self.all.get_mut(slot.pages as usize).is_some_and(|set| set.insert(page));
        }
        let is_new = slot.pages != page;
        if is_new {
            (slot.pages, slot.is_set) = (self.add([slot.pages, page]), true);
        }
        is_new
    }

    /// The opposite. Returns whether nothing is found through the entry any more.
    fn leave(&mut self, slot: &Slot, page: u32) -> bool {
        if !slot.is_set {
            return slot.pages == page;
        }
        let Some(set) = self.all.get_mut(slot.pages as usize) else { return true };
        set.remove(&page);
        if set.is_empty() {
            *set = FxHashSet::default();
            self.free.push(slot.pages);
            return true;
        }
        false
    }

    fn has_only(&self, slot: &Slot, page: u32) -> bool {
        if slot.is_set {
            self.get(slot.pages).is_none_or(|set| set.iter().all(|other| *other == page))
        } else {
            slot.pages == page
        }
    }

    /// The entry is `value` now. If it was something else before, the pages found through it go to `stale`.
    fn note(&self, slot: &mut Slot, value: u64, stale: &mut Vec<u32>) {
        if (slot.value ^ value) & !IGNORED != 0 {
            if slot.is_set {
                stale.extend(self.get(slot.pages).into_iter().flatten());
            } else {
                stale.push(slot.pages);
            }
        }
        slot.value = value;
    }
}

/// Tables by frame: one frame that is a table at two levels, or under two roots, is here once.
#[derive(Default)]
pub(super) struct Tables {
    frames: FxHashMap<Gfn, Table>,
    sets: Sets,
}

const fn index(entry: Pa) -> u16 {
    (entry.page_offset() / 8) as u16
}

impl Tables {
    pub(super) fn contains(&self, gfn: Gfn) -> bool {
        self.frames.contains_key(&gfn)
    }

    pub(super) fn len(&self) -> usize {
        self.frames.len()
    }

    pub(super) fn frames(&self) -> impl Iterator<Item = Gfn> {
        self.frames.keys().copied()
    }

    /// A path to be kept: what it has in common with its neighbours' is theirs.
    pub(super) fn keep(&mut self, context: AddressContext, path: &Path) -> Kept {
        let (last, entries) = path.entries().split_last().map_or((None, &[] as &[Pa]), |(last, rest)| (Some(*last), rest));
        let mut table = last.and_then(|last| self.frames.get_mut(&last.gfn()));
        let known = table.as_ref().and_then(|table| table.way.as_ref());
        let way = match known.filter(|way| way.context == context && *way.entries == *entries) {
            Some(way) => Arc::clone(way),
            None => Arc::new(Way { context, entries: entries.into() }),
        };
        if let Some(table) = &mut table {
            table.way = Some(Arc::clone(&way));
        }
        Kept { way, last }
    }

    /// Notes that `page` is found through `entry`, which is `value` now. Returns whether that is news. If the entry was something
    /// else before, the pages found through it go to `stale`.
    pub(super) fn enter(&mut self, page: u32, entry: Pa, value: u64, stale: &mut Vec<u32>) -> bool {
        let table = self.frames.entry(entry.gfn()).or_default();
        let index = index(entry);
        match table.find(index) {
            Ok(at) => table.slots.get_mut(at).is_some_and(|slot| {
                self.sets.note(slot, value, stale);
                self.sets.enter(slot, page)
            }),
            Err(at) => {
                table.slots.insert(at, Slot { value, pages: page, index, is_set: false });
                true
            }
        }
    }

    /// Notes that `page` is no longer found through these entries. Tables that nothing is found through any more are forgotten.
    pub(super) fn leave(&mut self, page: u32, entries: &Path) {
        for entry in entries.entries() {
            let Some(table) = self.frames.get_mut(&entry.gfn()) else { continue };
            let Ok(at) = table.find(index(*entry)) else { continue };
            if table.slots.get(at).is_some_and(|slot| self.sets.leave(slot, page)) {
                table.slots.remove(at);
            }
            if table.slots.is_empty() {
                self.frames.remove(&entry.gfn());
            }
        }
    }

    /// The tables that [`Self::leave`] would forget.
    pub(super) fn emptied(&self, page: u32, entries: &Path) -> Vec<Gfn> {
        let mut emptied: Vec<Gfn> = Vec::new();
        for entry in entries.entries() {
            let gfn = entry.gfn();
            let goes = |slot: &Slot| {
                let is_left = entries.entries().iter().any(|entry| entry.gfn() == gfn && index(*entry) == slot.index);
                is_left && self.sets.has_only(slot, page)
            };
            let table = self.frames.get(&gfn);
            if !emptied.contains(&gfn)
                && table.is_some_and(|table| table.slots.len() <= entries.entries().len() && table.slots.iter().all(goes))
            {
                emptied.push(gfn);
            }
        }
        emptied
    }

    /// Compares the table with its bytes as they are now; pages found through an entry that is another go to `stale`.
    pub(super) fn compare(&mut self, gfn: Gfn, bytes: &[u8], stale: &mut Vec<u32>) {
        let Some(table) = self.frames.get_mut(&gfn) else { return };
        let (entries, _) = bytes.as_chunks::<8>();
        for slot in &mut table.slots {
            if let Some(entry) = entries.get(usize::from(slot.index)) {
                self.sets.note(slot, u64::from_le_bytes(*entry), stale);
            }
        }
    }
}
