//! What is planted on each page of a view, and where on it.

use std::hash::BuildHasher;

use hashbrown::HashTable;
use rustc_hash::FxBuildHasher;

use crate::addr::{Gfn, Pa, Va, View};

/// One breakpoint on a page: its offset there, and its number. In 16-bit pieces, so that it takes no more room than it needs.
#[derive(Clone, Copy)]
struct Point {
    offset: u16,
    id: [u16; 2],
}

impl Point {
    const fn new(offset: u16, id: u32) -> Self {
        Self { offset, id: [id as u16, (id >> 16) as u16] }
    }

    #[inline]
    const fn id(self) -> u32 {
        let [low, high] = self.id;
        low as u32 | (high as u32) << 16
    }
}

/// Up to four offsets in one word, ascending, so that all are looked at in one go: what is hit is anywhere on its page, and a search that
/// ends where it is found is guessed wrong by the processor.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Lanes(u64);

impl Lanes {
    const ONES: u64 = 0x0001_0001_0001_0001;
    /// No offset: it is above each, and below the bit that the comparisons use.
    const NONE: u64 = 0x7fff;
    const TOP: u64 = 0x8000 * Self::ONES;
    const EMPTY: Self = Self(Self::NONE * Self::ONES);

    /// How many there are.
    const fn len(self) -> usize {
        // Only what is no offset has that bit.
        lane(self.0 & (0x4000 * Self::ONES))
    }

    /// The places at which `offset` is: the topmost bit of each.
    #[inline]
    const fn equal(self, offset: u16) -> u64 {
        let differs = (self.0 ^ (offset as u64 * Self::ONES)) + Self::NONE * Self::ONES;
        !differs & Self::TOP
    }

    /// How many are not above `offset`.
    const fn up_to(self, offset: u16) -> usize {
        lane(!(Self::TOP + offset as u64 * Self::ONES - self.0) & Self::TOP)
    }

    const fn get(self, at: usize) -> u16 {
        (self.0 >> (16 * at)) as u16
    }

    /// With one more at a place that there is, which pushes those from there on up.
    const fn insert(self, at: usize, offset: u16) -> Self {
        let below = (1 << (16 * at)) - 1;
        Self(self.0 & below | (offset as u64) << (16 * at) | (self.0 & !below) << 16)
    }

    const fn remove(self, at: usize) -> Self {
        let below = (1 << (16 * at)) - 1;
        Self(self.0 & below | (self.0 >> 16) & !below | Self::NONE << 48)
    }
}

/// The lane of the lowest bit, or 4. Counting bits instead takes a dozen instructions where the processor may be any.
#[inline]
const fn lane(bits: u64) -> usize {
    (bits.trailing_zeros() / 16) as usize
}

/// The breakpoints on a page, ascending by offset and then in the order they were planted.
enum Points {
    Few { offsets: Lanes, ids: [u32; 4] },
    Many(Vec<Point>),
}

impl Points {
    const NONE: Self = Self::Few { offsets: Lanes::EMPTY, ids: [0; 4] };

    fn len(&self) -> usize {
        match self {
            Self::Few { offsets, .. } => offsets.len(),
            Self::Many(points) => points.len(),
        }
    }

    /// The `at`th one: its offset and its number.
    fn get(&self, at: usize) -> Option<(u16, u32)> {
        match self {
            Self::Few { offsets, ids } => Some((offsets.get(at), *ids.get(at)?)),
            Self::Many(points) => points.get(at).map(|point| (point.offset, point.id())),
        }
    }

    /// Calls `f` with the number of each at `offset`. Returns how many there are.
    #[inline]
    fn for_each_at(&self, offset: u16, mut f: impl FnMut(u32)) -> usize {
        match self {
            Self::Few { offsets, ids } => {
                let (mut found, mut count) = (offsets.equal(offset), 0);
                while let Some(id) = ids.get(lane(found)) {
                    f(*id);
                    found &= found - 1;
                    count += 1;
                }
                count
            }
            Self::Many(points) => {
                let first = points.partition_point(|point| point.offset < offset);
                let rest = points.get(first..).unwrap_or_default();
                let mut count = 0;
                for point in rest.iter().take_while(|point| point.offset == offset) {
                    f(point.id());
                    count += 1;
                }
                count
            }
        }
    }

    fn insert(&mut self, offset: u16, id: u32) {
        match self {
            Self::Few { offsets, ids } => {
                let at = offsets.up_to(offset);
                if offsets.len() < ids.len() {
                    *offsets = offsets.insert(at, offset);
                    let [a, b, c, _] = *ids;
                    *ids = match at {
                        0 => [id, a, b, c],
                        1 => [a, id, b, c],
                        2 => [a, b, id, c],
                        _ => [a, b, c, id],
                    };
                } else {
                    let mut points = Vec::with_capacity(2 * ids.len());
                    points.extend((0..).zip(&*ids).map(|(at, id)| Point::new(offsets.get(at), *id)));
                    points.insert(at, Point::new(offset, id));
                    *self = Self::Many(points);
                }
            }
            Self::Many(points) => {
                let at = points.partition_point(|point| point.offset <= offset);
                points.insert(at, Point::new(offset, id));
            }
        }
    }

    fn remove(&mut self, offset: u16, id: u32) {
        let is_it = |point: &(u16, u32)| *point == (offset, id);
        match self {
            Self::Few { offsets, ids } => {
                if let Some(at) = (0..offsets.len()).zip(&*ids).position(|(at, id)| is_it(&(offsets.get(at), *id))) {
                    *offsets = offsets.remove(at);
                    let [a, b, c, d] = *ids;
                    *ids = match at {
                        0 => [b, c, d, d],
                        1 => [a, c, d, d],
                        2 => [a, b, d, d],
                        _ => [a, b, c, d],
                    };
                }
            }
            Self::Many(points) => {
                let first = points.partition_point(|point| point.offset < offset);
                let mut owners = points.iter().skip(first).take_while(|point| point.offset == offset);
                if let Some(at) = owners.position(|point| point.id() == id) {
                    points.remove(first + at);
                }
            }
        }
    }
}

/// Under which roots a breakpoint is hit.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    Every,
    Only(Pa),
}

/// What the breakpoints of a page have in common.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Common {
    /// They are hit where [`Page::base`] says, under every root.
    Every,
    /// They are hit where [`Page::base`] says, under [`Page::root`] alone.
    Root,
    /// Nothing: each is to be asked.
    Nothing,
}

/// The breakpoints planted on one page of a view. One cache line, and with it is said whether they are hit: nearly always a page is
/// mapped at one address, and all on it are global or all of one root.
#[repr(align(64))]
pub(super) struct Page {
    gfn: Gfn,
    /// The virtual address of each less its offset on the page.
    base: u64,
    root: Pa,
    points: Points,
    view: View,
    common: Common,
}

const _: () = assert!(size_of::<Page>() == 64);

impl Page {
    /// How many breakpoints it has.
    pub(super) fn len(&self) -> usize {
        self.points.len()
    }

    /// The offset and the number of each of its breakpoints, ascending by offset.
    pub(super) fn points(&self) -> impl Iterator<Item = (u16, u32)> {
        (0..self.len()).filter_map(|at| self.points.get(at))
    }

    /// Calls `f` with the number of each at `offset`, in the order they were planted. Returns how many there are.
    #[inline]
    pub(super) fn for_each_at(&self, offset: u16, f: impl FnMut(u32)) -> usize {
        self.points.for_each_at(offset, f)
    }

    /// Whether those at `offset` are hit at `va` under `root`; `None` if each is to be asked.
    #[inline]
    pub(super) fn is_hit(&self, offset: u16, va: Va, root: Pa) -> Option<bool> {
        let is_there = base(va, offset) == self.base;
        match self.common {
            Common::Every => Some(is_there),
            Common::Root => Some(is_there && self.root == root),
            Common::Nothing => None,
        }
    }

    fn is(&self, view: View, gfn: Gfn) -> bool {
        self.gfn == gfn && self.view == view
    }
}

/// What a virtual address has in common with those of the other breakpoints on its page.
#[inline]
fn base(va: Va, offset: u16) -> u64 {
    va.0.wrapping_sub(offset.into())
}

fn hash(view: View, gfn: Gfn) -> u64 {
    // No frame number is so large that the view changes any of its bits.
    FxBuildHasher.hash_one(gfn.0 ^ u64::from(view.0) << 48)
}

/// The pages that something is planted on.
#[derive(Default)]
pub(super) struct Pages(HashTable<Page>);

impl Pages {
    #[inline]
    pub(super) fn get(&self, view: View, gfn: Gfn) -> Option<&Page> {
        self.0.find(hash(view, gfn), |page| page.is(view, gfn))
    }

    /// Notes that a breakpoint for `va` is planted at `pa`.
    pub(super) fn attach(&mut self, view: View, pa: Pa, id: u32, va: Va, reach: Reach) {
        let (gfn, offset) = (pa.gfn(), pa.page_offset() as u16);
        let base = base(va, offset);
        let (common, root) = match reach {
            Reach::Every => (Common::Every, Pa(0)),
            Reach::Only(root) => (Common::Root, root),
        };
        let slot = self.0.entry(hash(view, gfn), |page| page.is(view, gfn), |page| hash(page.view, page.gfn));
        let page = slot.or_insert_with(|| Page { gfn, base, root, points: Points::NONE, view, common }).into_mut();
        if (page.common, page.base, page.root) != (common, base, root) {
            // That stays so until the page has none: to find out that the last odd one has gone, all would have to be asked.
            page.common = Common::Nothing;
        }
        page.points.insert(offset, id);
    }

    pub(super) fn detach(&mut self, view: View, pa: Pa, id: u32) {
        let (gfn, offset) = (pa.gfn(), pa.page_offset() as u16);
        let Ok(mut slot) = self.0.find_entry(hash(view, gfn), |page| page.is(view, gfn)) else { return };
        let page = slot.get_mut();
        page.points.remove(offset, id);
        if page.len() == 0 {
            slot.remove();
        }
    }
}
