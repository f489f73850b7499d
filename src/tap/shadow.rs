//! Shadow pages: copies of guest frames with breakpoints in them. The only file that writes a breakpoint byte.

use rustc_hash::FxHashMap;

use super::{Left, Rights};
use crate::addr::{Gfn, MemoryAccess, PAGE_SIZE, Pa, View};
use crate::core::VmiCore;
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};

/// INT3 (Intel SDM vol. 2, "INT n/INTO/INT3/INT1").
pub(super) const INT3: u8 = 0xcc;

/// One byte that is a breakpoint.
#[derive(Clone, Copy)]
struct Point {
    offset: u16,
    /// How many want it; never 0.
    count: u32,
}

/// One page of one view that shows a frame of ours.
struct Shadow {
    frame: Gfn,
    /// By offset. Exactly as long as it has to be: most pages hold a few, and there are many pages.
    points: Box<[Point]>,
}

impl Shadow {
    /// Puts the breakpoints into `bytes`, which begin `from` bytes into the page.
    fn plant(points: &[Point], from: u64, bytes: &mut [u8]) {
        for point in points {
            let at = u64::from(point.offset).checked_sub(from).and_then(|at| bytes.get_mut(at as usize));
            if let Some(byte) = at {
                *byte = INT3;
            }
        }
    }
}

/// The points with one more reference at each of `offsets`.
fn with(points: &[Point], offsets: &[u16]) -> Box<[Point]> {
    let mut points = points.to_vec();
    for &offset in offsets {
        match points.binary_search_by_key(&offset, |point| point.offset) {
            Ok(index) => {
                if let Some(point) = points.get_mut(index) {
                    point.count = point.count.saturating_add(1);
                }
            }
            Err(index) => points.insert(index, Point { offset, count: 1 }),
        }
    }
    points.into_boxed_slice()
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
    /// Frames that could not be given back when everything was cleared.
    orphans: Vec<Gfn>,
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
    pub(super) fn hidden(&self) -> impl Iterator<Item = Gfn> {
        self.pages.keys().map(|(_, gfn)| *gfn)
    }

    pub(super) fn offsets(&self, view: View, gfn: Gfn) -> impl Iterator<Item = u16> {
        self.pages.get(&(view, gfn)).into_iter().flat_map(|shadow| shadow.points.iter().map(|point| point.offset))
    }

    pub(super) fn frames(&self) -> usize {
        self.pages.len() + self.orphans.len()
    }

    fn add(&mut self, view: View, gfn: Gfn, shadow: Shadow) {
        self.pages.insert((view, gfn), shadow);
        match self.views.iter_mut().find(|(known, _)| *known == view) {
            Some((_, count)) => *count += 1,
            None => self.views.push((view, 1)),
        }
    }

    fn forget(&mut self, view: View, gfn: Gfn) {
        if self.pages.remove(&(view, gfn)).is_none() {
            return;
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

    /// One reference more at each of `offsets`.
    pub(super) fn insert<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        rights: &mut Rights,
        view: View,
        gfn: Gfn,
        offsets: &[u16],
    ) -> Result<()> {
        if offsets.is_empty() {
            return Ok(());
        }
        let Some(shadow) = self.pages.get_mut(&(view, gfn)) else {
            let points = with(&[], offsets);
            // The page stops being readable before it shows what must not be read.
            rights.deny(vmi, gfn, view, MemoryAccess::RW)?;
            let frame = build(vmi, view, gfn, &points).map_err(|cause| {
                let mut left = Left::default();
                left.note(rights.allow(vmi, gfn, view, MemoryAccess::RW), || format!("frame {gfn} execute-only in view {view}"));
                left.after(cause)
            })?;
            self.add(view, gfn, Shadow { frame, points });
            return Ok(());
        };
        let is_new = |offset: &&u16| shadow.points.binary_search_by_key(*offset, |point| point.offset).is_err();
        let first = offsets.iter().filter(is_new).min().copied();
        let last = offsets.iter().filter(is_new).max().copied();
        let points = with(&shadow.points, offsets);
        if let (Some(first), Some(last)) = (first, last) {
            // One write from the first new byte to the last: what lies between is written as it is.
            let mut bytes = vec![INT3; usize::from(last - first) + 1];
            if bytes.len() > 1 {
                vmi.read_pa(shadow.frame.pa(first.into()), &mut bytes)?;
                Shadow::plant(&points, first.into(), &mut bytes);
            }
            vmi.write_pa(shadow.frame.pa(first.into()), &bytes)?;
        }
        shadow.points = points;
        Ok(())
    }

    /// One reference less at `pa`.
    pub(super) fn remove<D: VmiDriver + ?Sized>(
        &mut self,
        vmi: &mut VmiCore<D>,
        rights: &mut Rights,
        view: View,
        pa: Pa,
    ) -> Result<()> {
        let gfn = pa.gfn();
        let missing = || VmiError::BreakpointNotFound { pa, view };
        let shadow = self.pages.get_mut(&(view, gfn)).ok_or_else(missing)?;
        let offset = pa.page_offset() as u16;
        let index = shadow.points.binary_search_by_key(&offset, |point| point.offset).map_err(|_| missing())?;
        let point = shadow.points.get_mut(index).ok_or_else(missing)?;
        if point.count > 1 {
            point.count -= 1;
            return Ok(());
        }
        if shadow.points.len() > 1 {
            // What the guest has there now, which may be newer than the breakpoint.
            let mut byte = [0];
            vmi.read_pa(pa, &mut byte)?;
            vmi.write_pa(shadow.frame.pa(pa.page_offset()), &byte)?;
            shadow.points = shadow.points.iter().filter(|point| point.offset != offset).copied().collect();
            return Ok(());
        }
        let frame = shadow.frame;
        unmap(vmi, rights, view, gfn, frame)?;
        self.forget(view, gfn);
        Ok(())
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
        self.orphans.retain(|frame| left.note(vmi.driver_mut().free_frame(*frame), || format!("frame {frame}")));
        let orphans = &mut self.orphans;
        self.pages.retain(|&(view, gfn), shadow| {
            let frame = shadow.frame;
            let shown = vmi.driver_mut().remap(view, gfn, None);
            if left.note(shown, || format!("frame {frame} at {gfn} in view {view}")) {
                return true;
            }
            if left.note(vmi.driver_mut().free_frame(frame), || format!("frame {frame}")) {
                orphans.push(frame);
            }
            false
        });
        self.views.clear();
        for (view, _) in self.pages.keys() {
            match self.views.iter_mut().find(|(known, _)| known == view) {
                Some((_, count)) => *count += 1,
                None => self.views.push((*view, 1)),
            }
        }
        left.done()
    }
}

/// Makes a copy of the original frame with the breakpoints in it, and only then shows it.
fn build<D: VmiDriver + ?Sized>(vmi: &mut VmiCore<D>, view: View, gfn: Gfn, points: &[Point]) -> Result<Gfn> {
    let mut bytes = [0; PAGE_SIZE as usize];
    vmi.read_pa(gfn.pa(0), &mut bytes)?;
    Shadow::plant(points, 0, &mut bytes);
    let frame = vmi.driver_mut().allocate_frame()?;
    let shown = vmi.write_pa(frame.pa(0), &bytes).and_then(|()| vmi.driver_mut().remap(view, gfn, Some(frame)));
    match shown {
        Ok(()) => Ok(frame),
        Err(cause) => {
            let mut left = Left::default();
            left.note(vmi.driver_mut().free_frame(frame), || format!("frame {frame}"));
            Err(left.after(cause))
        }
    }
}

/// Shows the original frame, gives its rights back and then the shadow's frame.
fn unmap<D: VmiDriver + ?Sized>(vmi: &mut VmiCore<D>, rights: &mut Rights, view: View, gfn: Gfn, frame: Gfn) -> Result<()> {
    vmi.driver_mut().remap(view, gfn, None)?;
    let mut left = Left::default();
    let cause = match rights.allow(vmi, gfn, view, MemoryAccess::RW) {
        Err(cause) => cause,
        Ok(()) => match vmi.driver_mut().free_frame(frame) {
            Ok(()) => return Ok(()),
            Err(cause) => {
                // Without the denial the breakpoints must not be shown again.
                if left.note(rights.deny(vmi, gfn, view, MemoryAccess::RW), || format!("frame {gfn} readable in view {view}")) {
                    return Err(left.after(cause));
                }
                cause
            }
        },
    };
    left.note(vmi.driver_mut().remap(view, gfn, Some(frame)), || format!("no breakpoints on {gfn} in view {view}"));
    Err(left.after(cause))
}

/// Writes back what was there before `cause`.
fn put_back<D: VmiDriver + ?Sized>(vmi: &mut VmiCore<D>, done: Vec<(Pa, Vec<u8>)>, cause: VmiError) -> VmiError {
    let mut left = Left::default();
    for (pa, old) in done.into_iter().rev() {
        left.note(vmi.write_pa(pa, &old), || format!("{} new bytes at {pa}", old.len()));
    }
    left.after(cause)
}
