//! Iterating over hits, and the results of runs.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use pyo3::PyTraverseError;
use pyo3::gc::PyVisit;
use pyo3::prelude::*;

use super::breakpoint::Breakpoint;
use super::errors::{busy, invalid};
use super::hit::Hit;
use super::hook::{Course, Reason, drive};
use super::shared::{Listener, Shared};
use super::vm::Vm;
use crate::driver::Shutdown;
use crate::session::Stats as Counters;

/// Why `run` came back, and what happened in it.
#[pyclass(frozen, get_all, module = "vmitap._native")]
#[derive(Clone)]
pub struct RunResult {
    /// What ended it.
    reason: &'static str,
    /// How the guest has shut down, where `reason` is "idle" for that and the driver is told (Xen, within half a second); else None.
    shutdown: Option<&'static str>,
    /// Hits of breakpoints and watches; an event that several own counts once for each.
    hits: u64,
    /// Hits that filters kept back, and events nobody wanted: under another root, or in the rest of a watched page.
    filtered: u64,
    /// Calls of handlers.
    py_calls: u64,
    /// Hits that `events` had no room for.
    lost: u64,
    /// Seconds from beginning to end.
    elapsed: f64,
    /// Seconds vCPUs stood still for hits, all together.
    hold_total: f64,
    /// Seconds a vCPU stood still for one hit, on average; 0 without hits.
    hold_mean: f64,
    /// The time that half of them do not exceed; at most a quarter too long, like the next. 0 without such hits.
    hold_p50: f64,
    /// The time that 99 of 100 do not exceed.
    hold_p99: f64,
    /// The longest of these times.
    hold_max: f64,
    /// Breakpoints that exceeded their budget and were disabled.
    disabled_by_budget: u64,
    /// `hits / elapsed`.
    hits_per_second: f64,
}

/// Nanoseconds as seconds.
#[expect(clippy::cast_precision_loss, reason = "a time that was measured")]
pub fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

impl RunResult {
    #[expect(clippy::cast_precision_loss, reason = "averages of counters")]
    pub fn new(py: Python<'_>, shared: &Shared, course: &Course, reason: Reason) -> Self {
        let elapsed = course.begun.elapsed().as_secs_f64();
        let before = &course.holds_before;
        let (now, holds, shutdown) = shared.quick(py, |inner| {
            let session = &inner.session;
            (session.stats(), session.holds().since(before), session.vmi().driver().shutdown().filter(|_| reason == Reason::Idle))
        });
        let hits = now.hits.saturating_sub(course.before.hits);
        let handled = now.handled.saturating_sub(course.before.handled);
        let hold_total = now.hold_total.saturating_sub(course.before.hold_total).as_secs_f64();
        Self {
            reason: reason.name(),
            shutdown: shutdown.map(Shutdown::name),
            hits,
            filtered: now.filtered.saturating_sub(course.before.filtered),
            py_calls: shared.calls.load(Ordering::Relaxed).saturating_sub(course.calls_before),
            lost: shared.lost.load(Ordering::Relaxed).saturating_sub(course.lost_before),
            elapsed,
            hold_total,
            hold_mean: if handled == 0 { 0.0 } else { hold_total / handled as f64 },
            hold_p50: seconds(holds.quantile_ns(0.5)),
            hold_p99: seconds(holds.quantile_ns(0.99)),
            hold_max: seconds(course.hold_max_ns.max(holds.max_ns())),
            disabled_by_budget: now.disabled_by_budget.saturating_sub(course.before.disabled_by_budget),
            hits_per_second: if elapsed > 0.0 { hits as f64 / elapsed } else { 0.0 },
        }
    }
}

#[pymethods]
impl RunResult {
    fn __repr__(&self) -> String {
        let Self { reason, hits, filtered, py_calls, lost, elapsed, .. } = self;
        format!("<RunResult {reason} hits={hits} filtered={filtered} py_calls={py_calls} lost={lost} elapsed={elapsed:.3}>")
    }
}

/// Counters of a session, as a snapshot.
#[pyclass(frozen, get_all, module = "vmitap._native")]
pub struct Stats {
    /// Events of any kind, hits that needed none among them; each was answered exactly once.
    events: u64,
    /// As `RunResult.hits`.
    hits: u64,
    /// As `RunResult.filtered`.
    filtered: u64,
    /// As `RunResult.py_calls`.
    py_calls: u64,
    /// As `RunResult.lost`.
    lost: u64,
    /// Rows that were captured.
    rows: u64,
    /// As `Recording.lost`.
    rows_lost: u64,
    /// Calls whose return values were given up, of `on_return`.
    returns_lost: u64,
    /// INT3 of the guest's own that were delivered to it.
    reinjected: u64,
    /// Reads of hidden pages that were served with the original bytes.
    hidden_reads: u64,
    /// Writes to hidden pages, under whichever policy.
    hidden_writes: u64,
    /// Breakpoints that `OnWrite.REMOVE` took out.
    removed_by_write: u64,
    /// Stores of the guest to page tables that breakpoints are found through; each costs an event.
    table_writes: u64,
    /// Addresses of breakpoints that the guest mapped, or mapped elsewhere.
    page_ins: u64,
    /// Addresses of breakpoints that the guest unmapped, or mapped elsewhere.
    page_outs: u64,
    /// Page-table roots that made room for others: breakpoints are looked up under them again once the guest loads them again.
    roots_given_up: u64,
    /// Frames that hold shadow pages now.
    shadow_frames: usize,
}

impl Stats {
    pub fn new(shared: &Shared, counters: &Counters, shadow_frames: usize) -> Self {
        Self {
            events: counters.events,
            hits: counters.hits,
            filtered: counters.filtered,
            py_calls: shared.calls.load(Ordering::Relaxed),
            lost: shared.lost.load(Ordering::Relaxed),
            rows: counters.rows,
            rows_lost: counters.rows_lost,
            returns_lost: counters.returns_lost,
            reinjected: counters.reinjected,
            hidden_reads: counters.hidden_reads,
            hidden_writes: counters.hidden_writes,
            removed_by_write: counters.removed_by_write,
            table_writes: counters.table_writes,
            page_ins: counters.page_ins,
            page_outs: counters.page_outs,
            roots_given_up: counters.roots_given_up,
            shadow_frames,
        }
    }
}

#[pymethods]
impl Stats {
    fn __repr__(&self) -> String {
        let Self { events, hits, filtered, py_calls, lost, .. } = self;
        format!("<Stats events={events} hits={hits} filtered={filtered} py_calls={py_calls} lost={lost}>")
    }
}

/// The iterator of `Vm.events`.
#[pyclass(frozen, module = "vmitap._native")]
pub struct Events {
    /// Keeps the session open.
    vm: Py<Vm>,
    shared: Arc<Shared>,
    listener: Arc<Listener>,
    timeout: Option<Duration>,
    /// Of the iteration, from the first `next()` on; taken while the guest runs.
    course: Mutex<Option<Course>>,
    begun: AtomicBool,
    result: Mutex<Option<RunResult>>,
}

impl Events {
    pub fn new(
        vm: Py<Vm>,
        shared: &Arc<Shared>,
        breakpoints: &[Py<Breakpoint>],
        timeout: Option<Duration>,
        room: usize,
    ) -> PyResult<Self> {
        if room == 0 {
            return Err(invalid("queue", "there has to be room for a hit"));
        }
        if breakpoints.iter().any(|each| !Arc::ptr_eq(each.get().shared(), shared)) {
            return Err(invalid("breakpoints", "one of them is of another session"));
        }
        let taps = (!breakpoints.is_empty()).then(|| breakpoints.iter().map(|each| each.get().id()).collect());
        let (queue, elsewhere) = (Mutex::new(VecDeque::new()), AtomicUsize::new(0));
        let listener = Arc::new(Listener { taps, queue, room, elsewhere, lost: AtomicU64::new(0) });
        shared.add_listener(listener.clone());
        Ok(Self {
            vm,
            shared: shared.clone(),
            listener,
            timeout,
            course: Mutex::new(None),
            begun: AtomicBool::new(false),
            result: Mutex::new(None),
        })
    }

    /// No more hits are put into the queue.
    fn leave(&self) {
        self.shared.remove_listener(&self.listener);
    }

    fn next_waiting(&self) -> Option<Py<Hit>> {
        self.listener.queue.lock().pop_front()
    }

    fn end(&self, py: Python<'_>, course: &Course, reason: Reason) {
        let result = RunResult::new(py, &self.shared, course, reason);
        self.result.lock().get_or_insert(result);
        self.leave();
    }
}

#[pymethods]
impl Events {
    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<Py<Hit>>> {
        if let Some(hit) = self.next_waiting() {
            return Ok(Some(hit));
        }
        if self.result.lock().is_some() {
            return Ok(None);
        }
        if !self.begun.swap(true, Ordering::AcqRel) {
            let course = Course::begin(py, &self.shared, self.timeout, None);
            *self.course.lock() = Some(course);
        }
        // Another thread in here has it.
        let taken = self.course.lock().take();
        let Some(mut course) = taken else { return Err(busy("next()")) };
        let outcome = drive(py, &self.shared, &mut course, Some(&self.listener), None);
        let ended = match outcome {
            Ok(Some(reason)) => Some(reason),
            Ok(None) => None,
            Err(error) => {
                *self.course.lock() = Some(course);
                return Err(error);
            }
        };
        if let Some(reason) = ended {
            self.end(py, &course, reason);
        } else {
            *self.course.lock() = Some(course);
        }
        Ok(self.next_waiting())
    }

    /// For `vmitap.aio`: goes on without waiting; whether there may be more at once. Hits wait then, and the result is there at the end.
    /// `said`: as for `_Moments.go`.
    #[pyo3(signature = (said=None))]
    fn _moment(&self, py: Python<'_>, said: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        if self.result.lock().is_some() {
            return Ok(false);
        }
        if !self.begun.swap(true, Ordering::AcqRel) {
            let course = Course::begin(py, &self.shared, self.timeout, None).in_moments();
            *self.course.lock() = Some(course);
        }
        let taken = self.course.lock().take();
        let Some(mut course) = taken else { return Err(busy("next()")) };
        let outcome = drive(py, &self.shared, &mut course, Some(&self.listener), said.map(Bound::call0));
        let more = course.has_more();
        if let Ok(Some(reason)) = outcome {
            self.end(py, &course, reason);
            return Ok(false);
        }
        *self.course.lock() = Some(course);
        outcome.map(|_| more)
    }

    /// For `vmitap.aio`: as `_Moments.awaits`.
    fn _awaits(&self) -> Option<Py<PyAny>> {
        self.course.lock().as_mut()?.awaits()
    }

    /// For `vmitap.aio`: as `_Moments.abandon`.
    fn _abandon(&self) {
        abandon(&self.course);
    }

    /// For `vmitap.aio`: a hit that waits, if there is one.
    fn _take(&self) -> Option<Py<Hit>> {
        self.next_waiting()
    }

    /// For `vmitap.aio`: a hit that was taken waits for its reader.
    fn _keep(&self) {
        self.listener.elsewhere.fetch_add(1, Ordering::Relaxed);
    }

    /// For `vmitap.aio`: the reader has it.
    fn _give(&self) {
        self.listener.elsewhere.fetch_sub(1, Ordering::Relaxed);
    }

    /// Hits that there was no room for so far.
    #[getter]
    fn lost(&self) -> u64 {
        self.listener.lost.load(Ordering::Relaxed)
    }

    /// What `run` would have returned; None until the iteration has ended.
    #[getter]
    fn result(&self) -> Option<RunResult> {
        self.result.lock().clone()
    }

    /// Ends the iteration; hits that still wait are dropped.
    fn close(&self, py: Python<'_>) {
        if self.result.lock().is_none() {
            let taken = self.course.lock().take();
            let course = taken.unwrap_or_else(|| Course::begin(py, &self.shared, None, None));
            self.end(py, &course, Reason::Stopped);
        }
        let waiting = std::mem::take(&mut *self.listener.queue.lock());
        drop(waiting);
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.vm)?;
        traverse(&self.course, &visit)
    }

    fn __clear__(&self) {
        abandon(&self.course);
    }
}

fn abandon(course: &Mutex<Option<Course>>) {
    let held = course.lock().as_mut().and_then(Course::abandon);
    // What is dropped may run Python.
    drop(held);
}

fn traverse(course: &Mutex<Option<Course>>, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
    course.try_lock().as_deref().and_then(Option::as_ref).map_or(Ok(()), |course| course.traverse(visit))
}

impl Drop for Events {
    fn drop(&mut self) {
        self.leave();
    }
}

/// For `vmitap.aio`: a run that is made in moments.
#[pyclass(frozen, module = "vmitap._native", name = "_Moments")]
pub struct Moments {
    shared: Arc<Shared>,
    course: Mutex<Option<Course>>,
}

impl Moments {
    pub fn new(py: Python<'_>, shared: &Arc<Shared>, timeout: Option<Duration>, max_hits: Option<u64>) -> Self {
        let course = Course::begin(py, shared, timeout, max_hits).in_moments();
        Self { shared: shared.clone(), course: Mutex::new(Some(course)) }
    }
}

#[pymethods]
impl Moments {
    /// Goes on without waiting: the result at the end, or whether there may be more at once. `said` is called for what the handler that
    /// was awaited returned or raised; then no more is done than to answer its event.
    #[pyo3(signature = (said=None))]
    fn go(&self, py: Python<'_>, said: Option<&Bound<'_, PyAny>>) -> PyResult<(Option<RunResult>, bool)> {
        let taken = self.course.lock().take();
        let Some(mut course) = taken else { return Err(busy("run")) };
        if let Some(reason) = drive(py, &self.shared, &mut course, None, said.map(Bound::call0))? {
            return Ok((Some(RunResult::new(py, &self.shared, &course, reason)), false));
        }
        let more = course.has_more();
        *self.course.lock() = Some(course);
        Ok((None, more))
    }

    /// What the handler returned, which is to be awaited before `go` is called again; once.
    fn awaits(&self) -> Option<Py<PyAny>> {
        self.course.lock().as_mut()?.awaits()
    }

    /// Nobody awaits it any more: its event is answered by whoever runs the guest next, or ends the session.
    fn abandon(&self) {
        abandon(&self.course);
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        traverse(&self.course, &visit)
    }

    fn __clear__(&self) {
        abandon(&self.course);
    }
}
