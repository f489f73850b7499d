//! Shadow pages: copies of guest frames with breakpoints in them. The only file that writes a breakpoint byte.

use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use super::frames::FramePool;
use super::{Left, Rights};
use crate::addr::{Gfn, MemoryAccess, PAGE_SIZE, Pa, View};
use crate::core::VmiCore;
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};

/// INT3 (Intel SDM vol. 2, "INT n/INTO/INT3/INT1").
pub(super) const INT3: u8 = 0xcc;

/// Offsets of breakpoints on a page, ascending; one that several want is there as often. Most pages have a few, and there are many pages.
type Points = SmallVec<[u16; 8]>;

/// One page of one view that shows a frame of ours.
struct Shadow {
    frame: Gfn,
    points: Points,
}

impl Shadow {
    /// Puts the breakpoints into `bytes`, which begin `from` bytes into the page.
    fn plant(points: &[u16], from: u64, bytes: &mut [u8]) {
        for point in points {
            let at = u64::from(*point).checked_sub(from).and_then(|at| bytes.get_mut(at as usize));
            if let Some(byte) = at {
                *byte = INT3;
            }
        }
    }
}

/// The points with one more reference at each of `offsets`, which are sorted.
fn with(points: &[u16], offsets: &[u16]) -> Points {
    let mut all = Points::with_capacity(points.len() + offsets.len());
    all.extend_from_slice(points);
    all.extend_from_slice(offsets);
    all.sort_unstable();
    all
}

/// The points with one reference less at each of `offsets`, which are sorted; the offset that has none on an error.
fn without(points: &[u16], offsets: &[u16]) -> std::result::Result<Points, u16> {
    let mut gone = offsets.iter().peekable();
    let left = points.iter().filter(|point| gone.next_if_eq(point).is_none()).copied().collect();
    // Offsets that came before theirs were passed are still there.
    gone.next().map_or(Ok(left), |offset| Err(*offset))
}

/// Cuts sorted points into pages, each with its offsets.
fn pages_of(points: &[(View, Pa)]) -> impl Iterator<Item = ((View, Gfn), Vec<u16>)> {
    let pages = points.chunk_by(|a, b| a.0 == b.0 && a.1.gfn() == b.1.gfn());
    pages.filter_map(|page| {
        let (view, pa) = page.first()?;
        Some(((*view, pa.gfn()), page.iter().map(|(_, pa)| pa.page_offset() as u16).collect()))
    })
}

/// Frames that are ascending, in words.
fn frames(frames: &[Gfn]) -> String {
    frames.first().map_or_else(String::new, |first| format!("{} frames from frame {first} on", frames.len()))
}

/// How one page was.
struct Undo {
    at: (View, Gfn),
    /// The frame it has or had.
    frame: Gfn,
    /// The breakpoints it had; `None` if it showed itself.
    points: Option<Points>,
    /// Bytes of the frame that were written over.
    old: Option<(Pa, Vec<u8>)>,
}

/// All shadow pages. Every call does all it is asked for, or fails with nothing changed.
///
/// While a page has a shadow, the shadow itself holds a denial of reads and writes on it, whether or not anyone monitors the page:
/// no caller can expose a breakpoint by calling in the wrong order.
#[derive(Default)]
pub(super) struct ShadowPages {
    pages: FxHashMap<(View, Gfn), Shadow>,
    /// The views that have shadow pages, and how many.
    views: Vec<(View, usize)>,
    frames: FramePool,
}

impl ShadowPages {
    pub(super) fn contains(&self, view: View, gfn: Gfn) -> bool {
        self.pages.contains_key(&(view, gfn))
    }

    /// The views in which the page has a shadow.
    fn views_of(&self, gfn: Gfn) -> impl Iterator<Item = View> {
        self.views.iter().map(|(view, _)| *view).filter(move |view| self.contains(*view, gfn))
    }

    pub(super) fn contains_anywhere(&self, gfn: Gfn) -> bool {
        self.views_of(gfn).next().is_some()
    }

    /// Every page that has a shadow, once for each view.
    pub(super) fn hidden(&self) -> impl Iterator<Item = (View, Gfn)> {
        self.pages.keys().copied()
    }

    pub(super) fn offsets(&self, view: View, gfn: Gfn) -> impl Iterator<Item = u16> {
        let pages = self.pages.get(&(view, gfn)).into_iter();
        pages.flat_map(|shadow| shadow.points.chunk_by(PartialEq::eq).filter_map(|same| same.first().copied()))
    }

    pub(super) fn frames(&self) -> usize {
        self.pages.len() + self.frames.spare()
    }

    fn add(&mut self, view: View, gfn: Gfn, shadow: Shadow) {
        self.pages.insert((view, gfn), shadow);
        match self.views.iter_mut().find(|(known, _)| *known == view) {
            Some((_, count)) => *count += 1,
            None => self.views.push((view, 1)),
        }
    }

    /// Forgets a page; what was on it.
    fn forget(&mut self, view: View, gfn: Gfn) -> Option<Points> {
        let shadow = self.pages.remove(&(view, gfn))?;
        if let Some(index) = self.views.iter().position(|(known, _)| *known == view)
            && let Some((_, count)) = self.views.get_mut(index)
        {
            *count -= 1;
            if *count == 0 {
                self.views.swap_remove(index);
            }
        }
        Some(shadow.points)
    }

    /// A view is gone, and its pages with it.
    pub(super) fn forget_view(&mut self, view: View) {
        self.views.retain(|(known, _)| *known != view);
        let frames = &mut self.frames;
        self.pages.retain(|(of, _), shadow| {
            if *of == view {
                frames.put(shadow.frame);
            }
            *of != view
        });
    }

    /// One reference more at each of `points`, which are sorted.
    pub(super) fn insert<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        rights: &mut Rights,
        points: &[(View, Pa)],
    ) -> Result<()> {
        let new: Vec<_> = pages_of(points).map(|(at, _)| at).filter(|at| !self.pages.contains_key(at)).collect();
        let fresh = self.frames.reserve(vmi, new.len())?;
        let mut undo = Vec::new();
        // The pages stop being readable before they show what must not be read.
        let result = rights.deny_many(vmi, &new, MemoryAccess::RW).and_then(|()| {
            let result = pages_of(points).try_for_each(|(at, offsets)| self.insert_page(vmi, at, &offsets, &mut undo));
            result.map_err(|cause| {
                let mut left = self.undo(vmi, undo);
                // What could not be hidden again must not be readable.
                let hidden: Vec<_> = new.iter().copied().filter(|at| !self.pages.contains_key(at)).collect();
                left.note(rights.allow_many(vmi, &hidden, MemoryAccess::RW), || format!("{} pages execute-only", hidden.len()));
                left.after(cause)
            })
        });
        result.map_err(|cause| {
            let mut left = Left::default();
            left.note(self.frames.release(vmi, &fresh), || frames(&fresh));
            left.after(cause)
        })
    }

    fn insert_page<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        (view, gfn): (View, Gfn),
        offsets: &[u16],
        undo: &mut Vec<Undo>,
    ) -> Result<()> {
        let Some(shadow) = self.pages.get_mut(&(view, gfn)) else {
            let points = with(&[], offsets);
            let mut bytes = [0; PAGE_SIZE as usize];
            vmi.read_pa(gfn.pa(0), &mut bytes)?;
            Shadow::plant(&points, 0, &mut bytes);
            let none = VmiError::Driver { op: "allocating frames", errno: 0, detail: "fewer came than were wanted".to_owned() };
            let frame = self.frames.take().ok_or(none)?;
            let shown = vmi.write_pa(frame.pa(0), &bytes).and_then(|()| vmi.driver_mut().remap(view, gfn, Some(frame)));
            if let Err(cause) = shown {
                self.frames.put(frame);
                return Err(cause);
            }
            self.add(view, gfn, Shadow { frame, points });
            undo.push(Undo { at: (view, gfn), frame, points: None, old: None });
            return Ok(());
        };
        let points = with(&shadow.points, offsets);
        let is_new = |offset: &&u16| shadow.points.binary_search(offset).is_err();
        let new = offsets.iter().filter(is_new);
        // One write from the first new byte to the last: what lies between is written as it is.
        let old = match (new.clone().min(), new.max()) {
            (Some(first), Some(last)) => {
                let at = shadow.frame.pa(u64::from(*first));
                let mut bytes = vec![0; usize::from(last - first) + 1];
                vmi.read_pa(at, &mut bytes)?;
                let old = bytes.clone();
                Shadow::plant(&points, u64::from(*first), &mut bytes);
                vmi.write_pa(at, &bytes)?;
                Some((at, old))
            }
            _ => None,
        };
        let before = std::mem::replace(&mut shadow.points, points);
        undo.push(Undo { at: (view, gfn), frame: shadow.frame, points: Some(before), old });
        Ok(())
    }

    /// One reference less at each of `points`, which are sorted.
    pub(super) fn remove<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        rights: &mut Rights,
        points: &[(View, Pa)],
    ) -> Result<()> {
        let mut pages = Vec::new();
        for ((view, gfn), offsets) in pages_of(points) {
            let held = self.pages.get(&(view, gfn)).map_or(&[] as &[u16], |shadow| &shadow.points);
            let after = without(held, &offsets);
            pages.push(((view, gfn), after.map_err(|offset| VmiError::BreakpointNotFound { pa: gfn.pa(offset.into()), view })?));
        }
        let last: Vec<_> = pages.iter().filter(|(_, after)| after.is_empty()).map(|(at, _)| *at).collect();
        let mut undo = Vec::new();
        // From the last page to the first, so that undoing, which goes the other way, gives each page the frame it had.
        let gone = pages.into_iter().rev().try_for_each(|(at, after)| self.remove_page(vmi, at, after, &mut undo));
        let allowed = gone.and_then(|()| rights.allow_many(vmi, &last, MemoryAccess::RW));
        let result = allowed.and_then(|()| {
            self.frames.trim(vmi, self.pages.len()).map_err(|cause| {
                let mut left = Left::default();
                if left.note(rights.deny_many(vmi, &last, MemoryAccess::RW), || format!("{} pages readable", last.len())) {
                    // Without the denial the breakpoints must not be shown again.
                    undo.retain(|step| self.pages.contains_key(&step.at));
                }
                left.after(cause)
            })
        });
        result.map_err(|cause| self.undo(vmi, undo).after(cause))
    }

    fn remove_page<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        (view, gfn): (View, Gfn),
        after: Points,
        undo: &mut Vec<Undo>,
    ) -> Result<()> {
        let Some(shadow) = self.pages.get_mut(&(view, gfn)) else { return Ok(()) };
        let frame = shadow.frame;
        if after.is_empty() {
            vmi.driver_mut().remap(view, gfn, None)?;
            let points = self.forget(view, gfn);
            self.frames.put(frame);
            undo.push(Undo { at: (view, gfn), frame, points, old: None });
            return Ok(());
        }
        let mut gone = shadow.points.iter().copied().filter(|point| after.binary_search(point).is_err());
        let old = match gone.next() {
            Some(first) => {
                // What the guest has there now, which may be newer than the breakpoint.
                let last = gone.next_back().unwrap_or(first);
                let mut bytes = vec![0; usize::from(last - first) + 1];
                vmi.read_pa(gfn.pa(first.into()), &mut bytes)?;
                let mut old = bytes.clone();
                Shadow::plant(&after, first.into(), &mut bytes);
                Shadow::plant(&shadow.points, first.into(), &mut old);
                let at = frame.pa(first.into());
                vmi.write_pa(at, &bytes)?;
                Some((at, old))
            }
            None => None,
        };
        let points = std::mem::replace(&mut shadow.points, after);
        undo.push(Undo { at: (view, gfn), frame, points: Some(points), old });
        Ok(())
    }

    /// Takes steps back, the last one first.
    fn undo<D: VmiDriver + ?Sized>(&mut self, vmi: &mut VmiCore<D>, steps: Vec<Undo>) -> Left {
        let mut left = Left::default();
        for Undo { at: (view, gfn), frame, points, old } in steps.into_iter().rev() {
            let is_shown = self.pages.contains_key(&(view, gfn));
            match points {
                None => {
                    if !left.note(vmi.driver_mut().remap(view, gfn, None), || format!("breakpoints on {gfn} in view {view}")) {
                        self.forget(view, gfn);
                        self.frames.put(frame);
                    }
                }
                Some(points) if !is_shown => {
                    let shown = vmi.driver_mut().remap(view, gfn, Some(frame));
                    if !left.note(shown, || format!("no breakpoints on {gfn} in view {view}")) {
                        self.frames.take();
                        self.add(view, gfn, Shadow { frame, points });
                    }
                }
                Some(points) => {
                    if let Some((pa, bytes)) = old {
                        left.note(vmi.write_pa(pa, &bytes), || format!("changed breakpoints on {gfn} in view {view}"));
                    }
                    if let Some(shadow) = self.pages.get_mut(&(view, gfn)) {
                        shadow.points = points;
                    }
                }
            }
        }
        left
    }

    /// Copies the original frame into every shadow of it again, with the breakpoints in it.
    pub(super) fn refresh<D: VmiDriver + ?Sized>(&mut self, vmi: &mut VmiCore<D>, gfn: Gfn) -> Result<()> {
        if !self.contains_anywhere(gfn) {
            return Ok(());
        }
        let mut bytes = vec![0; PAGE_SIZE as usize];
        vmi.read_pa(gfn.pa(0), &mut bytes)?;
        self.update(vmi, gfn.pa(0), &bytes).map(drop)
    }

    /// Writes `bytes` at `pa` to the original frames and to every shadow of them; breakpoints stay.
    pub(super) fn write<D: VmiDriver + ?Sized>(&mut self, vmi: &mut VmiCore<D>, pa: Pa, bytes: &[u8]) -> Result<()> {
        let end = Pa(vmi.driver().info().memory_size);
        let len = bytes.len() as u64;
        if len > end.0 || pa.0 > end.0 - len {
            return Err(VmiError::OutOfRange { pa, len, end });
        }
        let mut done = Vec::new();
        let mut result = Ok(());
        let (mut at, mut rest) = (pa, bytes);
        while !rest.is_empty() && result.is_ok() {
            let (now, later) = rest.split_at(rest.len().min(at.page_rest() as usize));
            result = self.update(vmi, at, now).map(|undo| done.extend(undo));
            at = Pa(at.0 + now.len() as u64);
            rest = later;
        }
        // The originals last: that one write happens whole or not at all, and needs no undoing.
        result.and_then(|()| vmi.write_pa(pa, bytes)).map_err(|cause| put_back(vmi, done, cause))
    }

    /// Writes bytes of one page to every shadow of it, breakpoints planted over them. Returns what was there.
    fn update<D: VmiDriver + ?Sized>(&self, vmi: &mut VmiCore<D>, pa: Pa, bytes: &[u8]) -> Result<Vec<(Pa, Vec<u8>)>> {
        let mut done = Vec::new();
        for view in self.views_of(pa.gfn()) {
            let Some(shadow) = self.pages.get(&(view, pa.gfn())) else { continue };
            let target = shadow.frame.pa(pa.page_offset());
            let mut old = vec![0; bytes.len()];
            let mut new = bytes.to_vec();
            Shadow::plant(&shadow.points, pa.page_offset(), &mut new);
            let written = vmi.read_pa(target, &mut old).and_then(|()| vmi.write_pa(target, &new));
            if let Err(cause) = written {
                return Err(put_back(vmi, done, cause));
            }
            done.push((target, old));
        }
        Ok(done)
    }

    /// Takes every shadow page back, as far as the driver lets us. The rights are left to the caller.
    pub(super) fn clear<D: VmiDriver + ?Sized>(&mut self, vmi: &mut VmiCore<D>) -> Result<()> {
        let mut left = Left::default();
        let mut at: Vec<_> = self.pages.keys().copied().collect();
        at.sort_unstable();
        for (view, gfn) in at {
            let Some(frame) = self.pages.get(&(view, gfn)).map(|shadow| shadow.frame) else { continue };
            let hidden = vmi.driver_mut().remap(view, gfn, None);
            if !left.note(hidden, || format!("frame {frame} at {gfn} in view {view}")) {
                self.forget(view, gfn);
                self.frames.put(frame);
            }
        }
        left.note(self.frames.trim(vmi, 0), || format!("{} frames", self.frames.spare()));
        left.done()
    }
}

/// Writes back what was there before `cause`.
fn put_back<D: VmiDriver + ?Sized>(vmi: &mut VmiCore<D>, done: Vec<(Pa, Vec<u8>)>, cause: VmiError) -> VmiError {
    let mut left = Left::default();
    for (pa, old) in done.into_iter().rev() {
        left.note(vmi.write_pa(pa, &old), || format!("{} new bytes at {pa}", old.len()));
    }
    left.after(cause)
}
