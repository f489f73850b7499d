//! What all objects of one session share: the session behind its lock, and what Python handed in.
//!
//! Order of locks: `turn`, then `inner`, then any other; the others are held for a few instructions and never while another is taken. No
//! lock is held while Python runs. A thread that has the interpreter takes `inner` only if it is free; it waits without.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use rustc_hash::FxHashSet;

use super::breakpoint::Breakpoint;
use super::errors::{busy, stale};
use super::floor::Planted;
use super::gil::detached;
use super::hit::Hit;
use crate::capture::Abi;
use crate::driver::{Caps, VmInfo, Waker};
use crate::error::{Result, VmiError};
use crate::session::{Session, TapId};
use crate::symbols::SymbolTable;
use crate::tap::OnWrite;

/// How long the guest goes on before somebody who waits interrupts it: a thread that asks all the time is not to stop it.
const GRACE: Duration = Duration::from_micros(500);

/// What the session's lock guards.
pub struct Inner {
    pub session: Session,
    /// Controllers of the lower floor, which are cleared when the session ends.
    pub planted: Vec<Planted>,
}

/// One `Events` that is open: where the hits it asked for wait.
pub struct Listener {
    /// Whose hits; `None`: everybody's.
    pub taps: Option<FxHashSet<TapId>>,
    pub queue: Mutex<VecDeque<Py<Hit>>>,
    pub room: usize,
    /// Hits that were taken from the queue and wait elsewhere: they take room too.
    pub elsewhere: AtomicUsize,
    pub lost: AtomicU64,
}

impl Listener {
    pub fn wants(&self, tap: TapId) -> bool {
        self.taps.as_ref().is_none_or(|taps| taps.contains(&tap))
    }
}

pub struct Shared {
    inner: Mutex<Inner>,
    /// Held while waiting for `inner`: whoever waits comes before the loop takes it again.
    turn: Mutex<()>,
    pub symbols: Arc<SymbolTable>,
    pub info: VmInfo,
    pub caps: Caps,
    pub version: String,
    /// What a write does where a breakpoint says nothing else.
    pub on_write: OnWrite,
    /// How arguments are passed where a breakpoint says nothing else.
    pub abi: Abi,
    pub began: Instant,
    pub waker: Arc<dyn Waker>,
    /// The driver's descriptor, once somebody has asked for it.
    pub readiness: OnceLock<Option<OwnedFd>>,
    /// By the number of the tap.
    pub taps: Mutex<Vec<Option<Py<Breakpoint>>>>,
    /// Numbers of the owners that were given as `key`.
    pub keys: Py<PyDict>,
    /// One more with each tap that gets another handler.
    pub handlers: AtomicU64,
    key_count: AtomicU64,
    pub listeners: Mutex<Vec<Arc<Listener>>>,
    /// There may be one: hits are not to take that lock for nothing.
    pub has_listeners: AtomicBool,
    /// A listener came or went: who wants which hits is to be told to the session.
    pub listeners_changed: AtomicBool,
    pub stop: AtomicBool,
    pub lost: AtomicU64,
    pub calls: AtomicU64,
    /// Odd while a handler runs; a `hit.vm` is valid while it is what it was.
    pub generation: AtomicU64,
    runner: Mutex<Option<ThreadId>>,
    run_ended: Condvar,
    detach_wanted: AtomicBool,
    closed: AtomicBool,
}

impl Shared {
    pub fn new(
        py: Python<'_>,
        mut session: Session,
        symbols: SymbolTable,
        version: String,
        (on_write, abi): (OnWrite, Abi),
    ) -> Self {
        let (info, caps) = (session.vmi().driver().info().clone(), session.vmi().driver().caps());
        let symbols = Arc::new(symbols);
        session.set_symbols(symbols.clone());
        Self {
            waker: session.waker(),
            readiness: OnceLock::new(),
            began: session.began(),
            inner: Mutex::new(Inner { session, planted: Vec::new() }),
            turn: Mutex::default(),
            symbols,
            info,
            caps,
            version,
            on_write,
            abi,
            taps: Mutex::default(),
            keys: PyDict::new(py).unbind(),
            handlers: AtomicU64::new(0),
            key_count: AtomicU64::new(0),
            listeners: Mutex::default(),
            has_listeners: AtomicBool::new(false),
            listeners_changed: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            lost: AtomicU64::new(0),
            calls: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            runner: Mutex::default(),
            run_ended: Condvar::new(),
            detach_wanted: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        }
    }

    /// Takes the lock with the interpreter released: for what takes long.
    pub fn released<T: Send>(&self, py: Python<'_>, work: impl FnOnce(&mut Inner) -> T + Send) -> T {
        detached(py, || {
            let turn = self.turn.lock();
            let mut inner = self.inner.try_lock_for(GRACE).unwrap_or_else(|| {
                // The loop goes on for up to 0.1 s if nobody interrupts it.
                self.waker.wake();
                self.inner.lock()
            });
            drop(turn);
            work(&mut inner)
        })
    }

    /// For a moment's run of the guest: keeps the interpreter, if nobody else has the session or waits for it. `None`: somebody does.
    ///
    /// Getting the interpreter back after every hit costs more than the hit, and milliseconds beside a busy thread.
    pub fn briefly<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> Option<T> {
        if self.turn.is_locked() {
            return None;
        }
        self.inner.try_lock().map(|mut inner| work(&mut inner))
    }

    /// For what takes no time: keeps the interpreter if the lock is free. Getting it back can take milliseconds beside a busy
    /// thread, and the vCPU stands still all that time.
    pub fn quick<T: Send>(&self, py: Python<'_>, work: impl FnOnce(&mut Inner) -> T + Send) -> T {
        if let Some(mut inner) = self.inner.try_lock() {
            let done = work(&mut inner);
            drop(inner);
            super::log::flush(py);
            return done;
        }
        self.released(py, work)
    }

    /// As [`Self::quick`], unless the session is over.
    pub fn open<T: Send>(&self, py: Python<'_>, work: impl FnOnce(&mut Session) -> Result<T> + Send) -> PyResult<T> {
        self.check_open()?;
        Ok(self.quick(py, |inner| work(&mut inner.session))?)
    }

    /// As [`Self::released`], unless the session is over.
    pub fn open_released<T: Send>(&self, py: Python<'_>, work: impl FnOnce(&mut Session) -> Result<T> + Send) -> PyResult<T> {
        self.check_open()?;
        Ok(self.released(py, |inner| work(&mut inner.session))?)
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub fn check_open(&self) -> PyResult<()> {
        if self.is_closed() { Err(stale("the session")) } else { Ok(()) }
    }

    /// The object of a tap.
    pub fn breakpoint(&self, py: Python<'_>, tap: TapId) -> Option<Py<Breakpoint>> {
        self.taps.lock().get(tap.0 as usize)?.as_ref().map(|breakpoint| breakpoint.clone_ref(py))
    }

    /// Every tap's object, in order of insertion, also of those that are removed.
    pub fn breakpoints(&self, py: Python<'_>) -> Vec<Py<Breakpoint>> {
        self.taps.lock().iter().flatten().map(|breakpoint| breakpoint.clone_ref(py)).collect()
    }

    /// The number of an owner: equal keys have the same. Runs the key's `__hash__` and `__eq__`.
    pub fn intern(&self, py: Python<'_>, key: &Bound<'_, PyAny>) -> PyResult<u64> {
        let keys = self.keys.bind(py);
        if let Some(number) = keys.get_item(key)? {
            return number.extract();
        }
        let number = self.key_count.fetch_add(1, Ordering::Relaxed);
        keys.as_any().call_method1("setdefault", (key, number))?.extract()
    }

    /// The number of the next moment in which a `hit.vm` is valid, or in which none is. By the thread that runs the loop only.
    pub fn next_generation(&self) -> u64 {
        let next = self.generation.load(Ordering::Relaxed) + 1;
        self.generation.store(next, Ordering::Release);
        next
    }

    /// Whether an open `Events` wants the hits of a tap.
    pub fn is_listened_to(&self, tap: TapId) -> bool {
        self.listeners.lock().iter().any(|listener| listener.wants(tap))
    }

    pub fn add_listener(&self, listener: Arc<Listener>) {
        let mut listeners = self.listeners.lock();
        listeners.push(listener);
        self.has_listeners.store(true, Ordering::Release);
        drop(listeners);
        self.listeners_changed.store(true, Ordering::Release);
    }

    pub fn remove_listener(&self, listener: &Arc<Listener>) {
        let mut listeners = self.listeners.lock();
        listeners.retain(|each| !Arc::ptr_eq(each, listener));
        self.has_listeners.store(!listeners.is_empty(), Ordering::Release);
        drop(listeners);
        self.listeners_changed.store(true, Ordering::Release);
    }

    /// Tells the session which hits are wanted, if a listener came or went.
    pub fn refresh_wanted(&self, py: Python<'_>) {
        if !self.listeners_changed.load(Ordering::Acquire) || !self.listeners_changed.swap(false, Ordering::AcqRel) {
            return;
        }
        let wanted: Vec<(TapId, bool)> =
            self.breakpoints(py).iter().map(|breakpoint| (breakpoint.get().id(), breakpoint.get().is_wanted())).collect();
        self.quick(py, |inner| wanted.iter().for_each(|(tap, wanted)| inner.session.set_wanted(*tap, *wanted)));
    }

    // --- who runs the loop ---

    /// Ends a session nobody holds any more; there is nobody to raise to.
    pub fn end(self: &Arc<Self>) {
        if self.is_closed() {
            return;
        }
        Python::attach(|py| {
            if let Err(error) = self.close(py) {
                log::error!("a session was not ended with detach(), and then: {error}");
                super::log::flush(py);
            }
        });
    }

    /// Makes this thread the one that runs the loop.
    pub fn start_run(self: &Arc<Self>, op: &'static str) -> PyResult<Running> {
        self.check_open()?;
        let mut runner = self.runner.lock();
        if runner.is_some() {
            return Err(busy(op));
        }
        *runner = Some(std::thread::current().id());
        Ok(Running(self.clone()))
    }

    /// Whether `detach` was called in a handler or by another thread.
    pub fn is_detach_wanted(&self) -> bool {
        self.detach_wanted.load(Ordering::Acquire)
    }

    pub fn want_detach(&self) {
        self.detach_wanted.store(true, Ordering::Release);
    }

    /// Ends the session; if its loop is running, once it is between two events.
    pub fn detach(&self, py: Python<'_>) -> PyResult<()> {
        let runner = *self.runner.lock();
        let Some(runner) = runner else { return self.close(py) };
        self.want_detach();
        if runner != std::thread::current().id() {
            self.waker.wake();
            while self.runner.lock().is_some() {
                detached(py, || {
                    let mut runner = self.runner.lock();
                    if runner.is_some() {
                        self.run_ended.wait_for(&mut runner, Duration::from_millis(100));
                    }
                });
                py.check_signals()?;
            }
            return self.close(py);
        }
        Ok(())
    }

    /// Ends the session now. Once it has ended, tries again what could not be restored.
    pub fn close(&self, py: Python<'_>) -> PyResult<()> {
        if self.closed.swap(true, Ordering::AcqRel) && self.quick(py, |inner| inner.session.is_restored()) {
            return Ok(());
        }
        let result = self.quick(py, |inner| {
            let Inner { session, planted } = inner;
            let mut failed: Option<VmiError> = None;
            for each in planted.drain(..) {
                if let Err(error) = each.clear(session.vmi_mut()) {
                    failed.get_or_insert(error);
                }
            }
            // A file that could not be ended is told of last: the guest comes first.
            let ended = session.end_recording().map(drop);
            session.detach().and(failed.map_or(Ok(()), Err)).and(ended)
        });
        // What Python handed in is dropped last, and without a lock.
        let taps = std::mem::take(&mut *self.taps.lock());
        let listeners = std::mem::take(&mut *self.listeners.lock());
        drop((taps, listeners));
        Ok(result?)
    }
}

/// Counts one more. For what one thread at a time counts, others only reading: adding at once would cost as much as five such.
pub fn count(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

/// The loop is this thread's until this is dropped.
pub struct Running(Arc<Shared>);

impl Drop for Running {
    fn drop(&mut self) {
        *self.0.runner.lock() = None;
        self.0.run_ended.notify_all();
    }
}
