//! What is planted on each page of a view, and where on it.

use std::hash::BuildHasher;

use hashbrown::HashTable;
use rustc_hash::FxBuildHasher;

use super::roots::Roots;
use crate::addr::{Gfn, PAGE_SHIFT, PAGE_SIZE, PHYSICAL_BITS, Pa, Va, View};

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

/// Under which roots a breakpoint is hit.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    Every,
    Only(Pa),
}

/// One of more than four breakpoints on a page.
struct Point<O> {
    offset: u16,
    id: u32,
    owner: O,
}

/// What a hit on a page looks at, which is half a cache line for owners of four bytes: 8 MB for a million breakpoints. Nearly always a page
/// is mapped at one address, all on it are global or all of one root, and there are no more than four.
#[repr(align(32))]
struct Line<O> {
    /// Where the page is mapped, and in the low bits what is to be done beside comparing that: the flags, and the number of the root
    /// under which alone they are hit, or 0.
    base: u64,
    offsets: Lanes,
    owners: [Option<O>; 4],
}

const _: () = assert!(size_of::<Line<std::num::NonZeroU32>>() == 32);

impl<O> Line<O> {
    /// They have nothing in common: each is to be asked.
    const EACH: u64 = 1;
    /// They are in [`Points::Many`].
    const MANY: u64 = 2;
    /// The least bit of the root's number.
    const ROOT: u64 = 4;

    const EMPTY: Self = Self { base: 0, offsets: Lanes::EMPTY, owners: [const { None }; 4] };

    const fn root(&self) -> u16 {
        (self.base % PAGE_SIZE / Self::ROOT) as u16
    }
}

/// The numbers of the breakpoints on a page, ascending by offset and then in the order they were planted.
enum Points<O> {
    /// In the order of [`Line::offsets`].
    Few([u32; 4]),
    Many(Vec<Point<O>>),
}

const _: () = assert!(size_of::<Points<std::num::NonZeroU32>>() == 24);
const _: () = assert!((Roots::MOST as u64 + 1) * Line::<()>::ROOT == PAGE_SIZE);

/// Stands for no line.
const NONE: u32 = u32::MAX;

/// Which lines frames next to each other have: what is tapped lies together, and so this takes few bytes a page.
struct Block {
    key: u64,
    lines: [u32; 8],
}

impl Block {
    /// The key of the block that a frame is in, and the frame's place there. `None` for what is no frame: the view has the bits above.
    #[inline]
    const fn of(view: View, gfn: Gfn) -> Option<(u64, usize)> {
        if gfn.0 >> (PHYSICAL_BITS - PAGE_SHIFT) != 0 {
            return None;
        }
        Some((gfn.0 >> 3 | (view.0 as u64) << 48, (gfn.0 & 7) as usize))
    }

    #[inline]
    fn hash(key: u64) -> u64 {
        FxBuildHasher.hash_one(key)
    }
}

/// Adds at the end. Room is made for a quarter more at a time: twice the room would be most of what a breakpoint takes.
fn push<T>(all: &mut Vec<T>, one: T) {
    if all.len() == all.capacity() {
        all.reserve_exact(all.len() / 4 + 4);
    }
    all.push(one);
}

/// The breakpoints planted on each page of a view, with the owner of each (`O`).
pub(super) struct Pages<O> {
    blocks: HashTable<Block>,
    lines: Vec<Line<O>>,
    /// Beside each line.
    points: Vec<Points<O>>,
    free: Vec<u32>,
    roots: Roots,
}

impl<O> Default for Pages<O> {
    fn default() -> Self {
        Self { blocks: HashTable::new(), lines: Vec::new(), points: Vec::new(), free: Vec::new(), roots: Roots::default() }
    }
}

impl<O> Pages<O> {
    #[inline]
    fn line(&self, view: View, gfn: Gfn) -> Option<usize> {
        let (key, at) = Block::of(view, gfn)?;
        let block = self.blocks.find(Block::hash(key), |block| block.key == key)?;
        block.lines.get(at).map(|line| *line as usize)
    }

    fn page(&self, view: View, gfn: Gfn) -> Option<(&Line<O>, &Points<O>)> {
        let line = self.line(view, gfn)?;
        self.lines.get(line).zip(self.points.get(line))
    }

    /// How many breakpoints a page has.
    pub(super) fn count(&self, view: View, gfn: Gfn) -> usize {
        self.page(view, gfn).map_or(0, |(line, points)| match points {
            Points::Few(_) => line.offsets.len(),
            Points::Many(points) => points.len(),
        })
    }

    /// The offset and the number of each breakpoint on a page from an offset on, ascending by offset and then in the order they were
    /// planted.
    pub(super) fn points(&self, view: View, gfn: Gfn, from: u16) -> impl Iterator<Item = (u16, u32)> {
        let page = self.page(view, gfn);
        let (first, end) = page.map_or((0, 0), |(line, points)| match points {
            Points::Few(_) => (0, line.offsets.len()),
            Points::Many(points) => (points.partition_point(|point| point.offset < from), points.len()),
        });
        let points = (first..end).filter_map(move |at| match page? {
            (line, Points::Few(ids)) => Some((line.offsets.get(at), *ids.get(at)?)),
            (_, Points::Many(points)) => points.get(at).map(|point| (point.offset, point.id)),
        });
        points.filter(move |(offset, _)| *offset >= from)
    }

    /// Calls `f` with the owner of each breakpoint that is planted at `pa` and hit at `va` under `root`, in the order they were planted. Asks
    /// `fits` with the number of one where the page does not say whether it is hit. Returns how many are planted at `pa`, hit or not.
    #[expect(clippy::inline_always, reason = "the fewer instructions a lookup has, the more of them wait for memory at once: 7%")]
    #[inline(always)]
    pub(super) fn for_each_at(
        &self,
        (view, pa): (View, Pa),
        va: Va,
        root: Pa,
        fits: impl Fn(u32) -> bool,
        mut f: impl FnMut(&O),
    ) -> usize {
        let Some(at) = self.line(view, pa.gfn()) else { return 0 };
        let Some(line) = self.lines.get(at) else { return 0 };
        let differs = line.base ^ va.page().0;
        if differs & (Line::<O>::EACH | Line::<O>::MANY) != 0 {
            return self.for_each_in(at, (pa, va), root, fits, f);
        }
        let is_hit = va.page_offset() == pa.page_offset() && self.is_all_hit(differs, root);
        let (mut found, mut count) = (line.offsets.equal(pa.page_offset() as u16), 0);
        while let Some(Some(owner)) = line.owners.get(lane(found)) {
            if is_hit {
                f(owner);
            }
            found &= found - 1;
            count += 1;
        }
        count
    }

    /// Whether what a page has in common says that it is hit, by how [`Line::base`] without the flags differs from where it was run.
    #[inline]
    fn is_all_hit(&self, differs: u64, root: Pa) -> bool {
        differs == 0 || self.roots.is(differs / Line::<O>::ROOT, root)
    }

    /// As [`Self::for_each_at`], on a page whose breakpoints have nothing in common or are many.
    #[inline(never)]
    fn for_each_in(&self, at: usize, (pa, va): (Pa, Va), root: Pa, fits: impl Fn(u32) -> bool, mut f: impl FnMut(&O)) -> usize {
        let (Some(line), Some(points)) = (self.lines.get(at), self.points.get(at)) else { return 0 };
        let offset = pa.page_offset() as u16;
        let differs = (line.base ^ va.page().0) & !Line::<O>::MANY;
        let is_asked = differs & Line::<O>::EACH != 0;
        let all = va.page_offset() == pa.page_offset() && self.is_all_hit(differs, root);
        let mut tell = |id, owner| {
            let is_hit = if is_asked { fits(id) } else { all };
            if is_hit {
                f(owner);
            }
        };
        match points {
            Points::Few(ids) => {
                let (mut found, mut count) = (line.offsets.equal(offset), 0);
                while let (Some(id), Some(Some(owner))) = (ids.get(lane(found)), line.owners.get(lane(found))) {
                    tell(*id, owner);
                    found &= found - 1;
                    count += 1;
                }
                count
            }
            Points::Many(points) => {
                let first = points.partition_point(|point| point.offset < offset);
                let rest = points.get(first..).unwrap_or_default();
                let mut count = 0;
                for point in rest.iter().take_while(|point| point.offset == offset) {
                    tell(point.id, &point.owner);
                    count += 1;
                }
                count
            }
        }
    }

    /// The number of each breakpoint planted at `pa`, in the order they were planted.
    pub(super) fn ids_at(&self, view: View, pa: Pa) -> impl Iterator<Item = u32> {
        let offset = pa.page_offset() as u16;
        self.points(view, pa.gfn(), offset).take_while(move |point| point.0 == offset).map(|(_, id)| id)
    }

    /// Notes that a breakpoint for `va` is planted at `pa`.
    pub(super) fn attach(&mut self, view: View, pa: Pa, id: u32, owner: O, va: Va, reach: Reach) {
        let offset = pa.page_offset() as u16;
        let Some((key, at)) = Block::of(view, pa.gfn()) else { return };
        let slot = self.blocks.entry(Block::hash(key), |block| block.key == key, |block| Block::hash(block.key));
        let Some(at) = slot.or_insert(Block { key, lines: [NONE; 8] }).into_mut().lines.get_mut(at) else { return };
        let is_new = *at == NONE;
        if is_new {
            *at = self.free.pop().unwrap_or_else(|| {
                push(&mut self.lines, Line::EMPTY);
                push(&mut self.points, Points::Few([0; 4]));
                self.lines.len() as u32 - 1
            });
        }
        let (Some(line), Some(points)) = (self.lines.get_mut(*at as usize), self.points.get_mut(*at as usize)) else { return };
        let root = match reach {
            Reach::Every => Some(0),
            Reach::Only(root) if self.roots.is(line.root().into(), root) => Some(line.root()),
            Reach::Only(root) if is_new => self.roots.take(root),
            Reach::Only(_) => None,
        };
        if is_new {
            line.base = va.page().0 + u64::from(root.unwrap_or(0)) * Line::<O>::ROOT;
        }
        // A caller can give an address at another offset than it has by the page tables.
        let is_alike =
            va.page_offset() == pa.page_offset() && va.page().0 == line.base & !(PAGE_SIZE - 1) && root == Some(line.root());
        if !is_alike {
            // That stays so until the page has none: to find out that the last odd one has gone, all would have to be asked.
            line.base |= Line::<O>::EACH;
        }
        match points {
            Points::Few(ids) if line.offsets.len() < ids.len() => {
                let place = line.offsets.up_to(offset);
                line.offsets = line.offsets.insert(place, offset);
                line.owners = with(line.owners.each_mut().map(Option::take), place, Some(owner));
                *ids = with(*ids, place, id);
            }
            Points::Few(ids) => {
                let owners = line.owners.iter_mut().zip(&*ids).filter_map(|(owner, id)| Some((*id, owner.take()?)));
                let few = (0..).zip(owners).map(|(at, (id, owner))| Point { offset: line.offsets.get(at), id, owner });
                let mut many = Vec::with_capacity(8);
                many.extend(few);
                many.insert(line.offsets.up_to(offset), Point { offset, id, owner });
                (line.base, line.offsets, *points) = (line.base | Line::<O>::MANY, Lanes::EMPTY, Points::Many(many));
            }
            Points::Many(points) => {
                let place = points.partition_point(|point| point.offset <= offset);
                points.insert(place, Point { offset, id, owner });
            }
        }
    }

    /// Takes a breakpoint that is planted at `pa` off the page.
    pub(super) fn detach(&mut self, view: View, pa: Pa, id: u32) {
        let offset = pa.page_offset() as u16;
        let Some((key, at)) = Block::of(view, pa.gfn()) else { return };
        let Ok(mut slot) = self.blocks.find_entry(Block::hash(key), |block| block.key == key) else { return };
        let Some(at) = slot.get_mut().lines.get_mut(at) else { return };
        let (Some(line), Some(points)) = (self.lines.get_mut(*at as usize), self.points.get_mut(*at as usize)) else { return };
        let is_empty = match points {
            Points::Few(ids) => {
                let is_it = |(at, known): (usize, &u32)| line.offsets.get(at) == offset && *known == id;
                if let Some(place) = (0..line.offsets.len()).zip(&*ids).position(is_it) {
                    line.offsets = line.offsets.remove(place);
                    line.owners = without(line.owners.each_mut().map(Option::take), place, None);
                    *ids = without(*ids, place, 0);
                }
                line.offsets.len() == 0
            }
            Points::Many(points) => {
                let first = points.partition_point(|point| point.offset < offset);
                let mut there = points.iter().skip(first).take_while(|point| point.offset == offset);
                if let Some(place) = there.position(|point| point.id == id) {
                    points.remove(first + place);
                }
                points.is_empty()
            }
        };
        if is_empty {
            self.roots.give_back(line.root());
            (*line, *points) = (Line::EMPTY, Points::Few([0; 4]));
            self.free.push(std::mem::replace(at, NONE));
            if slot.get().lines == [NONE; 8] {
                slot.remove();
            }
        }
    }
}

/// With one more at a place, which pushes those from there on up, and the last one out.
fn with<T>([a, b, c, _]: [T; 4], at: usize, one: T) -> [T; 4] {
    match at {
        0 => [one, a, b, c],
        1 => [a, one, b, c],
        2 => [a, b, one, c],
        _ => [a, b, c, one],
    }
}

/// Without the one at a place, and `last` after the others.
fn without<T>([a, b, c, d]: [T; 4], at: usize, last: T) -> [T; 4] {
    match at {
        0 => [b, c, d, last],
        1 => [a, c, d, last],
        2 => [a, b, d, last],
        _ => [a, b, c, last],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIEW: View = View(1);

    /// A page with a breakpoint of one root each; on some a second one, of the same root or of another.
    fn points(turn: u64) -> impl Iterator<Item = (Pa, u32, Pa)> {
        (0..700).flat_map(move |page| {
            let at = |id, root| (Pa((page * 5 + turn) << PAGE_SHIFT), id, Pa((turn * 1_000 + root) << PAGE_SHIFT));
            let second = (page % 7 < 2).then(|| at(2 * page as u32 + 1, page + page % 7));
            [Some(at(2 * page as u32, page)), second].into_iter().flatten()
        })
    }

    #[test]
    fn pages_that_have_no_breakpoint_any_more_leave_nothing_and_their_roots_make_room_for_others() {
        let mut pages = Pages::default();
        for turn in 0..5 {
            for (pa, id, root) in points(turn) {
                pages.attach(VIEW, pa, id, (), Va(pa.0), Reach::Only(root));
            }
            let asked = pages.lines.iter().filter(|line| line.base & Line::<()>::EACH != 0).count();
            assert_eq!((asked, pages.lines.len()), (100, 700));
            for (pa, id, _) in points(turn) {
                pages.detach(VIEW, pa, id);
            }
            assert!(pages.blocks.is_empty());
            assert_eq!(pages.free.len(), pages.lines.len());
        }
    }

    #[test]
    fn pages_with_more_roots_than_have_numbers_are_asked() {
        let mut pages = Pages::default();
        for page in 1..=u64::from(Roots::MOST) + 10 {
            pages.attach(VIEW, Pa(page << PAGE_SHIFT), 0, (), Va(0), Reach::Only(Pa(page << PAGE_SHIFT)));
        }
        for page in 2_000..4_000 {
            pages.attach(VIEW, Pa(page << PAGE_SHIFT), 0, (), Va(0), Reach::Only(Pa(7 << PAGE_SHIFT)));
        }
        pages.attach(VIEW, Pa(0), 0, (), Va(0), Reach::Every);
        let asked: Vec<bool> = pages.lines.iter().map(|line| line.base & Line::<()>::EACH != 0).collect();
        assert_eq!(asked, [vec![false; usize::from(Roots::MOST)], vec![true; 10], vec![false; 2_001]].concat());
    }
}
