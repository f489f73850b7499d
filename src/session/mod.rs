//! A session with one guest: its taps, and the loop that waits, decides and answers.
//!
//! Nothing here calls back: [`Session::poll`] lets the guest run and returns with a hit that somebody wants, whose vCPU stands
//! still until [`Session::answer`]. Hits that nobody wants, reads of hidden pages and the guest's own INT3s are dealt with inside.

mod covered;
mod event_loop;
mod filter;
mod flight;
#[cfg(feature = "emu")]
mod guard;
mod hold;
pub mod journal;
mod journaled;
mod monitor;
mod paging;
mod pending;
mod quick;
mod record;
mod repair;
mod returns;
mod roots;
mod sink;
mod tap;
mod taps;
mod types;
mod unanswered;
mod views;
mod watch;
mod watchdog;
mod write;
mod write_policy;

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustc_hash::{FxHashMap, FxHashSet};

use crate::addr::{Gfn, MemoryAccess, Pa, Va, VcpuId, View};
use crate::arch::amd64::{AddressContext, ControlRegister, Injection, Registers};
use crate::capture::{FlightOutcome, FlightRecorder, Recording, Row};
use crate::core::VmiCore;
use crate::driver::{Monitor, VmiDriver, Wait, Waker};
use crate::error::{Result, VmiError};
use crate::event::{EventReason, VmiEventResponse};
use crate::ptm::PageTableMonitor;
use crate::symbols::SymbolTable;
use crate::tap::{BreakpointController, BreakpointManager, OnWrite, Rights};
use crate::undo::Left;

#[cfg(feature = "emu")]
pub use guard::{open_guarded, repair_guest};
pub use hold::{Budget, Histogram};
pub use journaled::Journaled;
pub use monitor::{EventSet, MAX_MSRS};
pub use paging::handle_page_table_events;
use pending::{Pending, Vcpu};
pub use record::DURATION;
pub use repair::{Repaired, repair};
use returns::Returns;
pub use returns::WAITING;
use sink::Sink;
use tap::{Handed, Owner, Taps};
use taps::Key;
pub use types::{GP_NAMES, GpChanges, Hit, Limits, Poll, Stats, TapId, TapKind, TapSpec, TapState, TapStats, Verdict};
pub use unanswered::Unanswered;
use watch::WatchPage;
pub use watchdog::Watchdog;
#[cfg(feature = "xen")]
pub use watchdog::drop_privileges;
use write::AfterWrite;
use write_policy::Judgement;
pub use write_policy::WriteRule;

/// A driver of any kind, with reads, writes and translation.
pub type Vmi = VmiCore<dyn VmiDriver>;

/// A session with one guest.
pub struct Session<D: VmiDriver + ?Sized = dyn VmiDriver> {
    vmi: VmiCore<D>,
    tap_view: View,
    /// The views this session made, its tap view first.
    views: Vec<View>,
    controller: BreakpointController,
    manager: BreakpointManager<Owner, ()>,
    /// Watches the page tables of breakpoints.
    tables: PageTableMonitor,
    /// The roots that were loaded since there are breakpoints that roam, the oldest first.
    roots: Vec<AddressContext>,
    /// Taps for one hit that have had it.
    spent: Vec<TapId>,
    /// Writes of CR3 are announced.
    tracks_roots: bool,
    /// Addresses whose breakpoints could not be brought to where they are mapped.
    owed: Vec<(Va, AddressContext)>,
    taps: Taps,
    /// Whose key is taken where.
    keys: FxHashSet<Key>,
    watches: FxHashMap<(View, Gfn), Vec<WatchPage>>,
    /// Taps for what is announced, and what each is for.
    monitors: Vec<(TapId, EventSet)>,
    vcpus: Vec<Vcpu>,
    /// Events of [`Session::wait_raw`], and those whose handling failed.
    unanswered: Unanswered,
    /// Stores that are done, and whose shadows could not be brought up to date yet.
    overdue: Vec<AfterWrite>,
    /// The event whose hits are being handed out.
    pending: Option<Box<Pending>>,
    /// The one before, to spare an allocation a hit.
    spare: Option<Box<Pending>>,
    /// Taps at the event that is being looked at; kept to spare an allocation an event.
    owners: Vec<TapId>,
    /// So many events are not looked at before they are raised.
    usual: u32,
    judged: Judgement,
    /// Open questions of the filters of those.
    questions: Vec<filter::Question>,
    /// When an event with hits was answered last, and for how many nanoseconds its vCPU had stood still.
    last_hold_ns: Option<(Instant, u64)>,
    /// Of all events with hits that were handed out. [`Session::stats`] fills its own times from here.
    held: Handed,
    /// When a hit was answered, for a `poll` right after it.
    answered_at: Option<Instant>,
    stats: Stats,
    recording: Recording,
    /// The row that is being filled; kept to spare allocations.
    row: Row,
    /// When the first row of the event in hand was captured.
    captured_at: u64,
    sink: Option<Sink>,
    /// They name addresses in files.
    symbols: Arc<SymbolTable>,
    /// The last events, in a file.
    flight: Option<Box<FlightRecorder>>,
    returns: Returns,
    /// How long vCPUs stood still for hits.
    holds: Histogram,
    sampler: hold::Sampler,
    /// Taps that are to be switched off once the event in hand is answered.
    over_budget: Vec<TapId>,
    /// What times are counted from.
    began: Instant,
    on_write: OnWrite,
    detached: bool,
    /// Nothing of the session is left in the guest.
    restored: bool,
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
        let driver = vmi.driver_mut();
        let tap_view = driver.create_view(MemoryAccess::RWX)?;
        let set_up = driver.monitor(Monitor::Breakpoint, true).and_then(|()| driver.switch_to_view(tap_view));
        if let Err(cause) = set_up {
            let mut left = Left::default();
            left.note(driver.monitor(Monitor::Breakpoint, false), || "the INT3 monitor".to_owned());
            left.note(driver.destroy_view(tap_view), || format!("view {tap_view}"));
            return Err(left.after(cause));
        }
        Ok(Self::around(vmi, tap_view, vec![tap_view], on_write))
    }

    /// Takes over a guest that only can be looked at, such as a dump: reads work, and nothing is changed. Whatever would tap it or let
    /// it run fails with [`VmiError::NotSupported`].
    pub fn reading(driver: Box<D>) -> Self {
        Self::around(VmiCore::new(driver), View::DEFAULT, Vec::new(), OnWrite::default())
    }

    fn around(vmi: VmiCore<D>, tap_view: View, views: Vec<View>, on_write: OnWrite) -> Self {
        let count = usize::from(vmi.driver().info().vcpus);
        let (recording, began) = Self::new_recording();
        Self {
            vmi,
            tap_view,
            views,
            controller: BreakpointController::default(),
            manager: BreakpointManager::default(),
            tables: PageTableMonitor::new(&[tap_view]),
            owed: Vec::new(),
            roots: Vec::new(),
            tracks_roots: false,
            spent: Vec::new(),
            taps: Taps::default(),
            keys: FxHashSet::default(),
            watches: FxHashMap::default(),
            monitors: Vec::new(),
            vcpus: vec![Vcpu::default(); count],
            unanswered: Unanswered::new(count),
            overdue: Vec::new(),
            pending: None,
            spare: None,
            owners: Vec::new(),
            usual: 0,
            judged: Judgement::default(),
            questions: Vec::new(),
            recording,
            row: Row::default(),
            captured_at: 0,
            sink: None,
            symbols: Arc::default(),
            flight: None,
            returns: Returns::default(),
            holds: Histogram::default(),
            sampler: hold::Sampler::default(),
            over_budget: Vec::new(),
            began,
            last_hold_ns: None,
            held: Handed::default(),
            answered_at: None,
            stats: Stats::default(),
            on_write,
            detached: false,
            restored: false,
        }
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
        let (hold_total, hold_max) = (Duration::from_nanos(self.held.total_ns), Duration::from_nanos(self.held.max_ns));
        let (rows, rows_lost, returns_lost) = (self.recording.rows(), self.recording.lost(), self.returns.lost());
        Stats { rows, rows_lost, returns_lost, hold_total, hold_max, ..self.stats }
    }

    /// Of those, [`Stats::hits`].
    pub const fn hits(&self) -> u64 {
        self.stats.hits
    }

    /// When the last event with hits that were handed out was answered, and for how many nanoseconds its vCPU had stood still.
    pub const fn last_hold_ns(&self) -> Option<(Instant, u64)> {
        self.last_hold_ns
    }

    /// Frames that hold shadow pages of this session's breakpoints now.
    pub fn shadow_frames(&self) -> usize {
        self.controller.shadow_frames()
    }

    /// What the times of hits are counted from.
    pub const fn began(&self) -> Instant {
        self.began
    }

    /// Whether [`Session::detach`] was called, whatever it left behind.
    pub const fn is_detached(&self) -> bool {
        self.detached
    }

    /// Whether [`Session::detach`] has left nothing behind.
    pub const fn is_restored(&self) -> bool {
        self.restored
    }

    /// Whether a vCPU stands still for an event whose hits are being handed out.
    pub const fn has_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// What makes a [`Session::poll`] that is under way return soon.
    pub fn waker(&self) -> Arc<dyn Waker> {
        self.vmi.driver().waker()
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
        if let Some(pending) = self.pending.as_mut().filter(|pending| pending.hit.vcpu == vcpu) {
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
            let mut left = Left::default();
            for (pa, _, old) in spans.get(..index).unwrap_or_default().iter().rev() {
                left.note(self.controller.write(&mut self.vmi, *pa, old), || format!("{} new bytes at {pa}", old.len()));
            }
            return Err(left.after(cause));
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

    /// Lets the guest run until its next event, whatever it is. The vCPU is held until [`Session::respond_raw`]; the event's number is
    /// [`Session::raw_number`].
    pub fn wait_raw(&mut self, timeout: Duration) -> Result<Wait> {
        let wait = self.vmi.driver_mut().wait(timeout)?;
        if let Wait::Event(event) = &wait {
            self.stats.events += 1;
            self.begin_flight(event);
            self.note_flight(FlightOutcome::Raw, None);
            self.tables.mark_store(&self.vmi, event);
            if let EventReason::WriteControlRegister { register: ControlRegister::Cr3, new, .. } = event.reason
                && let Err(error) = self.note_root(&event.registers, new)
            {
                log::warn!("global breakpoints could not be looked up under {new:#x}: {error}");
            }
            let moved = self.vcpus.get_mut(usize::from(event.vcpu.0)).and_then(|vcpu| vcpu.moved.take());
            self.unanswered.open(event.vcpu, moved.or(event.view).unwrap_or(self.tap_view));
        }
        Ok(wait)
    }

    /// The number of the event that `vcpu` stands still for; no other event of the session has the same.
    ///
    /// # Errors
    /// [`VmiError::NoPendingEvent`] if there is none.
    pub fn raw_number(&self, vcpu: VcpuId) -> Result<u64> {
        self.unanswered.number(vcpu).ok_or(VmiError::NoPendingEvent { vcpu })
    }

    /// Answers the event of [`Session::wait_raw`] that has this number.
    ///
    /// # Errors
    /// [`VmiError::NoPendingEvent`] if it was answered before; then and on any other error nothing has changed.
    pub fn respond_raw(&mut self, vcpu: VcpuId, number: u64, response: &VmiEventResponse) -> Result<()> {
        let Self { vmi, unanswered, .. } = self;
        unanswered.settle(vcpu, number, || vmi.driver_mut().respond(vcpu, response))?;
        if let Some(vcpu) = self.vcpus.get_mut(usize::from(vcpu.0)) {
            // The answer says where it goes on.
            (vcpu.home, vcpu.moved) = (None, None);
        }
        Ok(())
    }

    /// Answers what [`Session::wait_raw`] left open: each vCPU executes its instruction in the default view and goes on. So does one whose
    /// event could not be answered before.
    fn answer_raw(&mut self) -> Result<()> {
        if self.unanswered.iter().next().is_none() {
            return Ok(());
        }
        let Self { vmi, unanswered, vcpus, .. } = self;
        let failed = unanswered.settle_all(|vcpu, view| {
            let Some(slot) = vcpus.get(usize::from(vcpu.0)) else { return Ok(()) };
            vmi.driver_mut().respond(vcpu, &slot.step_clean(view))
        });
        failed.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
    }

    // --- the end ---

    /// Restores the guest and ends the session: taps, watches and views go, held vCPUs go on, all in the default view.
    /// Everything is tried, whatever fails; calling again tries what is left. Once nothing is, it does nothing.
    ///
    /// # Errors
    /// [`VmiError::UndoFailed`] with what is left behind; the session is over all the same.
    pub fn detach(&mut self) -> Result<()> {
        self.detached = true;
        if self.restored {
            return Ok(());
        }
        let mut left = Left::default();
        self.end_waiting_rows();
        // The controller knows all that is in the guest, and takes it back by the page.
        let cleared = self.controller.clear(&mut self.vmi);
        self.manager = BreakpointManager::default();
        self.tables.forget();
        self.owed.clear();
        self.taps.forget_roaming();
        self.overdue.clear();
        self.watches.clear();
        self.keys.clear();
        for tap in self.taps.iter_mut() {
            tap.set_state(TapState::Removed);
        }
        if let Some(pending) = self.pending.take() {
            self.unanswered.open(pending.hit.vcpu, pending.home());
        }
        let driver = self.vmi.driver_mut();
        // With the breakpoints gone a retry is all that a held vCPU needs. One that steps would raise an event at its end that nobody
        // answers: that is taken back too.
        let go_on = VmiEventResponse::CONTINUE.in_view(View::DEFAULT);
        let stuck = self.unanswered.settle_all(|vcpu, _| driver.respond(vcpu, &go_on));
        if left.note(driver.release_held().map(drop), || "vCPUs that step".to_owned()) {
            for (vcpu, error) in stuck {
                left.note(Err(error), || format!("the event of vCPU {vcpu}"));
            }
        } else {
            self.vcpus.fill_with(Vcpu::default);
            self.unanswered.clear();
        }
        left.note(driver.monitor(Monitor::Breakpoint, false), || "the INT3 monitor".to_owned());
        self.end_monitors(&mut left);
        let driver = self.vmi.driver_mut();
        left.note(driver.switch_to_view(View::DEFAULT), || "the view of the vCPUs".to_owned());
        let controller = &mut self.controller;
        self.views.retain(|view| {
            let stays = left.note(driver.destroy_view(*view), || format!("view {view}"));
            if !stays {
                controller.forget_view(*view);
            }
            stays
        });
        if let Err(error) = cleared {
            log::warn!("{error}; trying again without the views");
            left.note(self.controller.clear(&mut self.vmi), || "breakpoints and access rights".to_owned());
        }
        let let_go = self.vmi.driver_mut().let_go().or_else(|error| if is_gone(&error) { Ok(()) } else { Err(error) });
        // A guest that is gone has nothing left behind in it. With a driver that has let go before, it is for that one to say what is.
        let result = if left.first().is_some_and(is_gone) {
            let_go
        } else {
            left.note(let_go, || "the driver's own".to_owned());
            left.done()
        };
        self.restored = result.is_ok();
        if self.restored {
            self.close_flight();
        }
        result
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
