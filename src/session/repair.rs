//! Brings a guest back whose session ended without a word.

use super::journal::{Found, Remains, Wanted};
use crate::addr::{Gfn, PAGE_SHIFT, View};
use crate::driver::{Additions, Monitor, VmiDriver};
use crate::error::{Result, VmiError};
use crate::undo::Left;

/// What [`repair`] has undone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Repaired {
    /// vCPUs that stood still for an event.
    pub vcpus: usize,
    /// Views.
    pub views: usize,
    /// Frames.
    pub frames: usize,
    /// Times the guest was paused.
    pub pauses: u32,
}

/// A driver that takes memory for frames in batches may have this many more than it has given out.
const BATCH: u64 = 8192;

/// What the dead session has in the guest: what it wrote down and is there still, what it was about to add, and what guest
/// memory has grown by, which is what its driver had in store.
fn left_in(there: &Additions, memory_size: u64, remains: &Remains) -> Result<Additions> {
    let Found { additions: found, memory_size: before } = remains.found.clone().unwrap_or_default();
    let is_new = |wanted| remains.wanted() == Some(wanted);
    let views = |view: &View| remains.views.contains(view) || is_new(Wanted::View) && !found.views.contains(view);
    let frames = |frame: &Gfn| remains.frames.contains(frame) || is_new(Wanted::Frames) && !found.frames.contains(frame);
    let mut left = Additions {
        views: there.views.iter().copied().filter(views).collect(),
        frames: there.frames.iter().copied().filter(frames).collect(),
        is_paused: there.is_paused,
    };
    if remains.found.is_some() && memory_size > before {
        let grown = (before >> PAGE_SHIFT)..(memory_size >> PAGE_SHIFT);
        // A journal that has the guest smaller than it was would have its memory taken away.
        if grown.end - grown.start > remains.most_frames as u64 + BATCH {
            let reason =
                format!("it has {before:#x} bytes of guest memory, and there are {memory_size:#x}: too many for its frames");
            return Err(VmiError::InvalidArgument { what: "journal", reason });
        }
        left.frames.extend(grown.map(Gfn));
        left.frames.sort_unstable();
        left.frames.dedup();
    }
    Ok(left)
}

/// Undoes what a session has left in its guest that was killed: monitors, held vCPUs, views, frames, pauses. `driver` is
/// attached to the guest and has nothing in it of its own. Everything is tried, whatever fails; calling again tries the rest.
///
/// What the session changed for its user stays: memory and registers that were written, injections that were delivered.
///
/// # Errors
/// [`VmiError::InvalidArgument`] if the journal cannot be that of this guest; what the driver fails with when it is asked what
/// there is; [`VmiError::UndoFailed`] with what could not be undone.
pub fn repair<D: VmiDriver + ?Sized>(driver: &mut D, remains: &Remains) -> Result<Repaired> {
    let there = driver.additions()?;
    let left = left_in(&there, driver.info().memory_size, remains)?;
    let was_paused = remains.found.as_ref().is_some_and(|found| found.additions.is_paused);
    // Of one pause it may not be known whether it was made, or taken back. And a driver may have held the guest inside of a call, of which
    // nothing is written: one that ran when the session began is let go on once more.
    let is_one_more = remains.wanted() == Some(Wanted::Pause) || remains.found.is_some() && !was_paused;
    let most = remains.pauses + u32::from(is_one_more);
    let least = remains.pauses - u32::from(remains.wanted() == Some(Wanted::Resume) && remains.pauses > 0);
    let mut done = Repaired::default();
    driver.adopt(&left, most)?;
    let mut failed = Left::default();
    let mut undo = |what: &dyn Fn() -> String, result: Result<()>| !failed.note(result, what);
    for monitor in remains.monitors.iter().copied().chain([Monitor::Breakpoint]) {
        undo(&|| format!("{monitor} monitored"), driver.monitor(monitor, false));
    }
    let released = driver.release_held().map(|held| done.vcpus = held);
    undo(&|| "held vCPUs".to_owned(), released);
    undo(&|| "vCPUs in a view".to_owned(), driver.switch_to_view(View::DEFAULT));
    for view in &left.views {
        done.views += usize::from(undo(&|| format!("view {view}"), driver.destroy_view(*view)));
    }
    for frame in &left.frames {
        done.frames += usize::from(undo(&|| format!("frame {frame}"), driver.free_frame(*frame)));
    }
    for pause in 0..most {
        let is_paused = driver.additions().map(|there| there.is_paused);
        // Where somebody else holds the guest too, the one that is not certain stays: letting it run would be worse.
        let stop = match is_paused {
            Ok(is_paused) => !is_paused || was_paused && pause >= least,
            Err(_) => pause >= least,
        };
        if stop {
            break;
        }
        done.pauses += u32::from(undo(&|| "a pause".to_owned(), driver.resume()));
    }
    failed.done().map(|()| done)
}
