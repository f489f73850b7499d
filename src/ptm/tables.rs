//! The monitor's books: which entries of which tables lead to which pages. No driver call is made here.

use rustc_hash::{FxHashMap, FxHashSet};

use crate::addr::{Gfn, Pa};
use crate::arch::amd64::pte;

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

/// One entry, and the pages that are found through it.
struct Slot {
    value: u64,
    pages: FxHashSet<u32>,
}

/// Tables by frame: one frame that is a table at two levels, or under two roots, is here once.
#[derive(Default)]
pub(super) struct Tables {
    frames: FxHashMap<Gfn, FxHashMap<u16, Slot>>,
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

    /// Notes that `page` is found through `entry`, which is `value` now. Returns whether that is news. If the entry was something
    /// else before, the pages found through it go to `stale`.
    pub(super) fn enter(&mut self, page: u32, entry: Pa, value: u64, stale: &mut Vec<u32>) -> bool {
        let table = self.frames.entry(entry.gfn()).or_default();
        let slot = table.entry(index(entry)).or_insert_with(|| Slot { value, pages: FxHashSet::default() });
        slot.note(value, stale);
        slot.pages.insert(page)
    }

    /// Notes that `page` is no longer found through these entries. Tables that nothing is found through any more are forgotten.
    pub(super) fn leave(&mut self, page: u32, entries: &Path) {
        for entry in entries.entries() {
            let Some(table) = self.frames.get_mut(&entry.gfn()) else { continue };
            let Some(slot) = table.get_mut(&index(*entry)) else { continue };
            slot.pages.remove(&page);
            if slot.pages.is_empty() {
                table.remove(&index(*entry));
            }
            if table.is_empty() {
                self.frames.remove(&entry.gfn());
            }
        }
    }

    /// The tables that [`Self::leave`] would forget.
    pub(super) fn emptied(&self, page: u32, entries: &Path) -> Vec<Gfn> {
        let mut emptied: Vec<Gfn> = Vec::new();
        for entry in entries.entries() {
            let gfn = entry.gfn();
            let goes = |(at, slot): (&u16, &Slot)| {
                let is_left = entries.entries().iter().any(|entry| entry.gfn() == gfn && index(*entry) == *at);
                is_left && slot.pages.iter().all(|other| *other == page)
            };
            let table = self.frames.get(&gfn);
            if !emptied.contains(&gfn)
                && table.is_some_and(|table| table.len() <= entries.entries().len() && table.iter().all(goes))
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
        for (at, slot) in table {
            if let Some(entry) = entries.get(usize::from(*at)) {
                slot.note(u64::from_le_bytes(*entry), stale);
            }
        }
    }
}

impl Slot {
    fn note(&mut self, value: u64, stale: &mut Vec<u32>) {
        if (self.value ^ value) & !IGNORED != 0 {
            stale.extend(&self.pages);
        }
        self.value = value;
    }
}
