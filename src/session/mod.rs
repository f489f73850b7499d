//! A session with one guest: its taps, and the loop that waits, decides and answers.
//!
//! Nothing here calls back: [`Session::poll`] lets the guest run and returns with a hit that somebody wants, whose vCPU stands
//! still until [`Session::answer`]. Hits that nobody wants, reads of hidden pages and the guest's own INT3s are dealt with inside.

mod event_loop;
mod filter;
#[cfg(feature = "emu")]
mod guard;
mod hold;
pub mod journal;
mod journaled;
mod paging;
mod pending;
mod record;
mod repair;
mod returns;
mod roots;
mod sink;
mod taps;
mod types;
mod watch;
mod write;

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustc_hash::{FxHashMap, FxHashSet};

use crate::addr::{Gfn, MemoryAccess, Pa, Va, VcpuId, View};
use crate::arch::amd64::{AddressContext, ControlRegister, Injection, Registers};
use crate::capture::{Recording, Row};
use crate::core::VmiCore;
use crate::driver::{Monitor, VmiDriver, Wait, Waker};
use crate::error::{Result, VmiError};
use crate::event::{EventAction, EventReason, VmiEvent, VmiEventResponse};
use crate::ptm::PageTableMonitor;
use crate::tap::{BreakpointController, BreakpointManager, OnWrite, Rights};

#[cfg(feature = "emu")]
pub use guard::{Watchdog, open_guarded, repair_guest};
pub use hold::{Budget, Histogram};
pub use journaled::Journaled;
pub use paging::handle_page_table_events;
use pending::{Pending, Vcpu};
pub use record::DURATION;
pub use repair::{Repaired, repair};
use returns::Returns;
pub use returns::WAITING;
use sink::Sink;
use taps::{Key, Tap};
pub use types::{GP_NAMES, GpChanges, Hit, Limits, Poll, Stats, TapId, TapKind, TapSpec, TapState, TapStats, Verdict};
use watch::WatchPage;

/// A driver of any kind, with reads, writes and translation.
pub type Vmi = VmiCore<dyn VmiDriver>;

/// A session with one guest.
pub struct Session<D: VmiDriver + ?Sized = dyn VmiDriver> {
    vmi: VmiCore<D>,
    tap_view: View,
    /// The views this session made, its tap view first.
    views: Vec<View>,
    controller: BreakpointController,
    manager: BreakpointManager<TapId, ()>,
    /// Watches the page tables of breakpoints.
    tables: PageTableMonitor,
    /// Global breakpoints that are looked up under each root that is loaded.
    roaming: FxHashSet<TapId>,
    /// The roots that were loaded since there are such, the oldest first.
    roots: Vec<AddressContext>,
    /// Taps for one hit that have had it.
    spent: Vec<TapId>,
    /// Writes of CR3 are announced.
    tracks_roots: bool,
    /// Addresses whose breakpoints could not be brought to where they are mapped.
    owed: Vec<(Va, AddressContext)>,
    taps: Vec<Tap>,
    /// Whose key is taken where.
    keys: FxHashSet<Key>,
    watches: FxHashMap<(View, Gfn), Vec<WatchPage>>,
    vcpus: Vec<Vcpu>,
    /// The event whose hits are being handed out.
    pending: Option<Box<Pending>>,
    /// Taps at the event that is being looked at; kept to spare an allocation an event.
    owners: Vec<TapId>,
    /// Open questions of the filters of those.
    questions: Vec<filter::Question>,
    /// When an event with hits was answered last, and how long its vCPU had stood still.
    last_hold: Option<(Instant, Duration)>,
    /// When a hit was answered, for a `poll` right after it.
    answered_at: Option<Instant>,
    stats: Stats,
    recording: Recording,
    /// The row that is being filled; kept to spare allocations.
    row: Row,
    /// When the first row of the event in hand was captured.
    captured_at: u64,
    sink: Option<Sink>,
    returns: Returns,
    /// How long vCPUs stood still for hits.
    holds: Histogram,
    /// Taps that are to be switched off once the event in hand is answered.
    over_budget: Vec<TapId>,
    /// What times are counted from.
    began: Instant,
    on_write: OnWrite,
    detached: bool,
}

impl<D: VmiDriver + ?Sized> std::fmt::Debug for Session<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("guest", self.vmi.driver().info()).field("taps", &self.taps.len()).finish_non_exhaustive()
    }
}

impl<D: VmiDriver + ?Sized> Session<D> {
    /// Takes over a guest: makes the view that will be tapped, puts every vCPU into it, and has INT3s announced.
    ///
    /// `on_write` is what a write to a hidden page does where a tap says nothing else.
    ///
    /// # Errors
    /// [`VmiError::NotSupported`] if the driver has no views or no events; whatever the driver fails with, and then everything
    /// is as it was.
    pub fn new(driver: Box<D>, on_write: OnWrite) -> Result<Self> {
        let mut vmi = VmiCore::new(driver);
        let (caps, info) = (vmi.driver().caps(), vmi.driver().info());
        for (has, capability) in [(caps.views, "views"), (caps.events, "events"), (caps.fast_single_step, "stepping in a view")] {
            if !has {
                return Err(VmiError::NotSupported { driver: info.driver, capability });
            }
        }
        let count = usize::from(info.vcpus);
        let driver = vmi.driver_mut();
        let tap_view = driver.create_view(MemoryAccess::RWX)?;
        let set_up = driver.monitor(Monitor::Breakpoint, true).and_then(|()| driver.switch_to_view(tap_view));
        if let Err(cause) = set_up {
            let undone = driver.monitor(Monitor::Breakpoint, false).and_then(|()| driver.destroy_view(tap_view));
            return Err(match undone {
                Ok(()) => cause,
                Err(error) => VmiError::UndoFailed { cause: Box::new(cause), left_behind: format!("view {tap_view} ({error})") },
            });
        }
        let (recording, began) = Self::new_recording();
        Ok(Self {
            vmi,
            tap_view,
            views: vec![tap_view],
            controller: BreakpointController::default(),
            manager: BreakpointManager::default(),
            tables: PageTableMonitor::new(&[tap_view]),
            owed: Vec::new(),
            roaming: FxHashSet::default(),
            roots: Vec::new(),
            tracks_roots: false,
            spent: Vec::new(),
            taps: Vec::new(),
            keys: FxHashSet::default(),
            watches: FxHashMap::default(),
            vcpus: vec![Vcpu::default(); count],
            pending: None,
            owners: Vec::new(),
            questions: Vec::new(),
            recording,
            row: Row::default(),
            captured_at: 0,
            sink: None,
            returns: Returns::default(),
            holds: Histogram::default(),
            over_budget: Vec::new(),
            began,
            last_hold: None,
            answered_at: None,
            stats: Stats::default(),
            on_write,
            detached: false,
        })
    }

    /// The driver, with reads and translation.
    pub fn vmi(&self) -> &VmiCore<D> {
        &self.vmi
    }

    /// The driver, for tools that work below the session.
    pub fn vmi_mut(&mut self) -> &mut VmiCore<D> {
        &mut self.vmi
    }

    /// The driver, and who denies what on which page: for tools that deny more.
    pub fn vmi_and_rights(&mut self) -> (&mut VmiCore<D>, &mut Rights) {
        (&mut self.vmi, self.controller.rights())
    }

    /// Counters so far.
    pub fn stats(&self) -> Stats {
        Stats { rows: self.recording.rows(), rows_lost: self.recording.lost(), returns_lost: self.returns.lost(), ..self.stats }
    }

    /// When the last event with hits that were handed out was answered, and how long its vCPU had stood still.
    pub const fn last_hold(&self) -> Option<(Instant, Duration)> {
        self.last_hold
    }

    /// Frames that hold shadow pages of this session's breakpoints now.
    pub fn shadow_frames(&self) -> usize {
        self.controller.shadow_frames()
    }

    /// What the times of hits are counted from.
    pub const fn began(&self) -> Instant {
        self.began
    }

    /// Whether [`Session::detach`] was called.
    pub const fn is_detached(&self) -> bool {
        self.detached
    }

    /// Whether a vCPU stands still for an event whose hits are being handed out.
    pub const fn has_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// What makes a [`Session::poll`] that is under way return soon.
    pub fn waker(&self) -> Arc<dyn Waker> {
        self.vmi.driver().waker()
    }

    // --- views ---

    /// The view that is tapped.
    pub const fn tap_view(&self) -> View {
        self.tap_view
    }

    /// The default view and those this session made.
    pub fn views(&self) -> Vec<View> {
        std::iter::once(View::DEFAULT).chain(self.views.iter().copied()).collect()
    }

    /// Makes a view that maps every page to itself with `access`.
    pub fn create_view(&mut self, access: MemoryAccess) -> Result<View> {
        let view = self.vmi.driver_mut().create_view(access)?;
        if let Err(cause) = self.tables.add_view(&mut self.vmi, self.controller.rights(), view) {
            return Err(match self.vmi.driver_mut().destroy_view(view) {
                Ok(()) => cause,
                Err(error) => VmiError::UndoFailed { cause: Box::new(cause), left_behind: format!("view {view} ({error})") },
            });
        }
        self.views.push(view);
        Ok(view)
    }

    /// Removes a view this session made, with the taps in it. vCPUs that are in it go to the tap view.
    ///
    /// # Errors
    /// [`VmiError::DefaultView`], [`VmiError::ViewNotFound`]; [`VmiError::InvalidArgument`] for the tap view itself.
    pub fn destroy_view(&mut self, view: View) -> Result<()> {
        if view == View::DEFAULT {
            return Err(VmiError::DefaultView { op: "destroying a view" });
        }
        if view == self.tap_view {
            let reason = "the session's tap view goes with the session".to_owned();
            return Err(VmiError::InvalidArgument { what: "view", reason });
        }
        let index = self.views.iter().position(|known| *known == view).ok_or(VmiError::ViewNotFound { view })?;
        for tap in self.taps_in(view) {
            self.remove(tap)?;
        }
        let count = self.vcpus.len() as u16;
        for vcpu in (0..count).map(VcpuId) {
            if self.vmi.driver().vcpu_view(vcpu)? == view {
                self.switch_to_view(self.tap_view)?;
                break;
            }
        }
        self.tables.remove_view(&mut self.vmi, self.controller.rights(), view)?;
        if let Err(cause) = self.vmi.driver_mut().destroy_view(view) {
            return Err(match self.tables.add_view(&mut self.vmi, self.controller.rights(), view) {
                Ok(()) => cause,
                Err(error) => VmiError::UndoFailed { cause: Box::new(cause), left_behind: format!("view {view} ({error})") },
            });
        }
        self.views.remove(index);
        Ok(())
    }

    /// Puts every vCPU into `view`.
    pub fn switch_to_view(&mut self, view: View) -> Result<()> {
        self.vmi.driver_mut().switch_to_view(view)?;
        for vcpu in &mut self.vcpus {
            vcpu.home = None;
        }
        if let Some(pending) = &mut self.pending {
            pending.moved_to = Some(view);
        }
        // In the default view stores to page tables are not seen.
        self.tables.mark_all_dirty();
        Ok(())
    }

    // --- registers, memory ---

    /// The registers of a vCPU.
    pub fn registers(&self, vcpu: VcpuId) -> Result<Registers> {
        self.vmi.driver().registers(vcpu)
    }

    /// Writes some registers of a vCPU. If its hit is being handled, changing RIP leaves the instruction unexecuted.
    pub fn set_registers(&mut self, vcpu: VcpuId, changes: &GpChanges) -> Result<()> {
        let mut registers = self.vmi.driver().registers(vcpu)?;
        changes.apply(&mut registers.gp);
        self.vmi.driver_mut().set_registers(vcpu, &registers)?;
        if let Some(pending) = self.pending.as_mut().filter(|pending| pending.event.vcpu == vcpu) {
            pending.touched = true;
        }
        Ok(())
    }

    /// Writes virtual memory: all of it, or nothing. Breakpoints on those bytes stay planted over the new ones.
    ///
    /// # Errors
    /// As [`VmiCore::write`].
    pub fn write(&mut self, va: Va, context: AddressContext, bytes: &[u8]) -> Result<()> {
        let mut spans: Vec<(Pa, &[u8], Vec<u8>)> = Vec::new();
        let mut rest = bytes;
        let mut at = va;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(at.page_rest() as usize));
            let pa = self.vmi.translate(at, context)?;
            let mut old = vec![0; now.len()];
            self.vmi.read_pa(pa, &mut old)?;
            spans.push((pa, now, old));
            rest = later;
            // A range that wraps has no translation at its end, so it is refused above.
            at = Va(at.0.wrapping_add(now.len() as u64));
        }
        self.write_spans(&spans)
    }

    /// Writes physical memory: all of it, or nothing. Breakpoints on those bytes stay planted over the new ones.
    ///
    /// # Errors
    /// [`VmiError::OutOfRange`] beyond memory.
    pub fn write_pa(&mut self, pa: Pa, bytes: &[u8]) -> Result<()> {
        let mut old = vec![0; bytes.len()];
        self.vmi.read_pa(pa, &mut old)?;
        let mut spans: Vec<(Pa, &[u8], Vec<u8>)> = Vec::new();
        let (mut rest, mut at, mut done) = (bytes, pa, 0);
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(at.page_rest() as usize));
            spans.push((at, now, old.get(done..done + now.len()).unwrap_or_default().to_vec()));
            done += now.len();
            rest = later;
            at = Pa(at.0.saturating_add(now.len() as u64));
        }
        self.write_spans(&spans)
    }

    /// Writes spans that each lie in one page, and takes back what was written if one fails.
    fn write_spans(&mut self, spans: &[(Pa, &[u8], Vec<u8>)]) -> Result<()> {
        for (index, (pa, new, _)) in spans.iter().enumerate() {
            let Err(cause) = self.controller.write(&mut self.vmi, *pa, new) else { continue };
            let mut left = Vec::new();
            for (pa, _, old) in spans.get(..index).unwrap_or_default().iter().rev() {
                if let Err(error) = self.controller.write(&mut self.vmi, *pa, old) {
                    left.push(format!("{} new bytes at {pa} ({error})", old.len()));
                }
            }
            return Err(if left.is_empty() {
                cause
            } else {
                VmiError::UndoFailed { cause: Box::new(cause), left_behind: left.join(", ") }
            });
        }
        if !self.tables.is_empty() {
            self.tables_written(spans.iter().map(|(pa, ..)| pa.gfn()));
        }
        Ok(())
    }

    /// Delivers an interrupt or exception to a vCPU before its next instruction.
    pub fn inject(&mut self, vcpu: VcpuId, injection: &Injection) -> Result<()> {
        self.vmi.driver_mut().inject(vcpu, injection)
    }

    /// Holds every vCPU; counted.
    pub fn pause(&mut self) -> Result<()> {
        self.vmi.driver_mut().pause()
    }

    /// Takes back one [`Session::pause`].
    pub fn resume(&mut self) -> Result<()> {
        self.vmi.driver_mut().resume()
    }

    // --- events as the driver raises them ---

    /// Lets the guest run until its next event, whatever it is. The vCPU is held until [`Session::respond_raw`].
    pub fn wait_raw(&mut self, timeout: Duration) -> Result<Wait> {
        let wait = self.vmi.driver_mut().wait(timeout)?;
        if let Wait::Event(event) = &wait {
            self.stats.events += 1;
            self.tables.mark_store(&self.vmi, event);
            if let EventReason::WriteControlRegister { register: ControlRegister::Cr3, new, .. } = event.reason
                && let Err(error) = self.note_root(&event.registers, new)
            {
                log::warn!("global breakpoints could not be looked up under {new:#x}: {error}");
            }
            if let Some(vcpu) = self.vcpus.get_mut(usize::from(event.vcpu.0)) {
                vcpu.raw = Some(event.view.unwrap_or(self.tap_view));
            }
        }
        Ok(wait)
    }

    /// Answers an event of [`Session::wait_raw`].
    ///
    /// # Errors
    /// [`VmiError::NoPendingEvent`] if the vCPU has none; then and on any other error nothing has changed.
    pub fn respond_raw(&mut self, vcpu: VcpuId, response: &VmiEventResponse) -> Result<()> {
        let slot = self.vcpus.get_mut(usize::from(vcpu.0)).filter(|slot| slot.raw.is_some());
        let slot = slot.ok_or(VmiError::NoPendingEvent { vcpu })?;
        self.vmi.driver_mut().respond(vcpu, response)?;
        slot.raw = None;
        slot.home = None;
        Ok(())
    }

    /// Answers what [`Session::wait_raw`] left open: each vCPU executes its instruction in the default view and goes on.
    fn answer_raw(&mut self) -> Result<()> {
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            if let Some(view) = vcpu.raw {
                let step = VmiEventResponse::action(EventAction::FastSingleStep { view: View::DEFAULT }).in_view(view);
                self.vmi.driver_mut().respond(VcpuId(index as u16), &step)?;
                vcpu.raw = None;
            }
        }
        Ok(())
    }

    // --- the end ---

    /// Restores the guest and ends the session: taps, watches and views go, held vCPUs go on, all in the default view.
    /// Everything is tried, whatever fails. Twice is fine.
    ///
    /// # Errors
    /// [`VmiError::UndoFailed`] with what is left behind; the session is over all the same.
    pub fn detach(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.detached, true) {
            return Ok(());
        }
        let mut failed: Vec<(String, VmiError)> = Vec::new();
        let mut note = |what: &str, result: Result<()>| {
            // A guest that is gone has nothing left behind in it.
            if let Err(error) = result.or_else(|error| if is_gone(&error) { Ok(()) } else { Err(error) }) {
                failed.push((what.to_owned(), error));
            }
        };
        self.end_waiting_rows();
        note("breakpoints", self.manager.clear(&mut self.vmi, &mut self.controller));
        note("access rights", self.controller.clear(&mut self.vmi));
        self.tables.forget();
        self.owed.clear();
        self.roaming.clear();
        note("the CR3 monitor", self.track_roots(false).map(drop));
        self.watches.clear();
        self.keys.clear();
        for tap in &mut self.taps {
            tap.state = TapState::Removed;
        }
        // With the breakpoints gone a retry is all that a held vCPU needs. One that steps would raise an event at its end that nobody
        // answers: that is taken back too.
        let held = self.pending.take().map(|pending| pending.event);
        let driver = self.vmi.driver_mut();
        let go_on = VmiEventResponse::CONTINUE.in_view(View::DEFAULT);
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            let id = VcpuId(index as u16);
            if vcpu.raw.take().is_some() || held.as_ref().is_some_and(|event: &VmiEvent| event.vcpu == id) {
                note("a held vCPU", driver.respond(id, &go_on));
            }
            *vcpu = Vcpu::default();
        }
        note("a vCPU that steps", driver.release_held().map(drop));
        note("the INT3 monitor", driver.monitor(Monitor::Breakpoint, false));
        note("the vCPUs' view", driver.switch_to_view(View::DEFAULT));
        for view in self.views.drain(..) {
            note("a view", driver.destroy_view(view));
        }
        note("the driver's own", driver.let_go());
        let mut failed = failed.into_iter();
        let Some((what, cause)) = failed.next() else { return Ok(()) };
        let left_behind = failed.fold(what, |list, (what, error)| format!("{list}, {what} ({error})"));
        Err(VmiError::UndoFailed { cause: Box::new(cause), left_behind })
    }

    fn check_open(&self) -> Result<()> {
        if self.detached { Err(VmiError::DomainGone { reason: "the session has ended".to_owned() }) } else { Ok(()) }
    }
}

/// Whether it failed because there is no guest any more.
fn is_gone(error: &VmiError) -> bool {
    match error {
        VmiError::DomainGone { .. } => true,
        VmiError::UndoFailed { cause, .. } => is_gone(cause),
        _ => false,
    }
}

impl<D: VmiDriver + ?Sized> Drop for Session<D> {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            log::error!("{error}");
        }
    }
}
