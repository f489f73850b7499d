//! The frames that shadow pages lie in: taken from the driver by the batch, kept for the next page, given back by the batch.

use crate::addr::Gfn;
use crate::core::VmiCore;
use crate::driver::VmiDriver;
use crate::error::Result;

/// Room that is kept although there is no spare frame: with many breakpoints put in at once there was room for many.
const ROOM: usize = 64;

/// Frames that are taken from the driver and show nothing.
///
/// As many are kept as are in use, so that taking a breakpoint out and putting one in costs no call; the rest go back. With the last
/// page in use the last frame goes. So there are never more than the most that were in use at once.
#[derive(Default)]
pub(super) struct FramePool {
    /// Whoever comes next gets the last one: taking back what was given last restores the order.
    spare: Vec<Gfn>,
}

impl FramePool {
    /// Frames that are taken and not in use.
    pub(super) const fn spare(&self) -> usize {
        self.spare.len()
    }

    /// Makes sure that [`Self::take`] can be called `count` times. Returns the frames that had to be asked for, ascending.
    pub(super) fn reserve<D: VmiDriver + ?Sized>(&mut self, vmi: &mut VmiCore<D>, count: usize) -> Result<Vec<Gfn>> {
        let missing = count.saturating_sub(self.spare.len());
        if missing == 0 {
            return Ok(Vec::new());
        }
        let fresh = vmi.driver_mut().allocate_frames(missing)?;
        // Those that are here already are used first.
        self.spare.splice(0..0, fresh.iter().rev().copied());
        Ok(fresh)
    }

    /// A frame; `None` if none was reserved.
    pub(super) fn take(&mut self) -> Option<Gfn> {
        let frame = self.spare.pop();
        if self.spare.is_empty() {
            self.spare.shrink_to(ROOM);
        }
        frame
    }

    /// A frame is no longer in use.
    pub(super) fn put(&mut self, frame: Gfn) {
        self.spare.push(frame);
    }

    /// Gives back what is more than `keep`, the highest ones.
    ///
    /// # Errors
    /// The driver's, with all of them still here.
    pub(super) fn trim<D: VmiDriver + ?Sized>(&mut self, vmi: &mut VmiCore<D>, keep: usize) -> Result<()> {
        if self.spare.len() <= keep {
            return Ok(());
        }
        let mut sorted = self.spare.clone();
        sorted.sort_unstable();
        let excess = sorted.split_off(keep);
        self.release(vmi, &excess)
    }

    /// Gives these spare frames back; they are ascending.
    ///
    /// # Errors
    /// The driver's, with all of them still here.
    pub(super) fn release<D: VmiDriver + ?Sized>(&mut self, vmi: &mut VmiCore<D>, frames: &[Gfn]) -> Result<()> {
        if !frames.is_empty() {
            vmi.driver_mut().free_frames(frames)?;
            self.spare.retain(|frame| frames.binary_search(frame).is_err());
        }
        Ok(())
    }
}
