//! Breakpoints and watches of a session.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use once_cell::race::OnceBox;
use parking_lot::Mutex;
use pyo3::PyTraverseError;
use pyo3::gc::PyVisit;
use pyo3::prelude::*;
use pyo3::types::{PyIterator, PyList, PyString};

use super::convert::{access_to_python, address};
use super::errors::stale;
use super::events::seconds;
use super::expression::{Captured, Condition};
use super::shared::{Shared, count};
use super::views::View;
use crate::addr::{MemoryAccess, Va};
use crate::capture::Abi;
use crate::session::{EventSet, TapId, TapState};

/// What breakpoints that were put in together have in common: there can be a million of them. An object, because the collector wants to
/// see one reference for each that there is.
#[pyclass(frozen, module = "vmitap._native", name = "_Common")]
pub struct Common {
    shared: Arc<Shared>,
    length: u64,
    access: MemoryAccess,
    /// What a monitor is for.
    events: Option<EventSet>,
    root: Option<u64>,
    view: crate::addr::View,
    /// How the arguments of a hit are found.
    abi: Abi,
    key: Py<PyAny>,
    tag: Py<PyAny>,
    deadline: Option<f64>,
    ask: Option<Py<PyAny>>,
    /// What their filter asks, by number; taken by the collector only.
    predicates: Mutex<Vec<Py<PyAny>>>,
    /// The filter, as Python gave it.
    filter: Option<Py<PyAny>>,
}

impl Common {
    pub fn new(
        py: Python<'_>,
        shared: &Arc<Shared>,
        given: &Given,
        (length, access, events): (u64, MemoryAccess, Option<EventSet>),
        view: crate::addr::View,
    ) -> Self {
        Self {
            shared: shared.clone(),
            length,
            access,
            events,
            root: given.root,
            view,
            abi: given.abi,
            key: given.key.clone_ref(py),
            tag: given.tag.clone_ref(py),
            deadline: given.deadline,
            ask: given.ask.as_ref().map(|ask| ask.clone_ref(py)),
            predicates: Mutex::new(given.condition.clone_ref(py).predicates),
            filter: given.filter.as_ref().map(|filter| filter.clone_ref(py)),
        }
    }
}

#[pymethods]
impl Common {
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.key)?;
        visit.call(&self.tag)?;
        visit.call(&self.ask)?;
        visit.call(&self.filter)?;
        // Held by nobody while the collector runs, except by a thread that is about to let go of it: then it is left for later.
        if let Some(predicates) = self.predicates.try_lock() {
            predicates.iter().try_for_each(|predicate| visit.call(predicate))?;
        }
        Ok(())
    }

    fn __clear__(&self) {
        let predicates = std::mem::take(&mut *self.predicates.lock());
        drop(predicates);
    }
}

/// One breakpoint or watch of a session. Equal only to itself.
#[pyclass(frozen, module = "vmitap._native")]
pub struct Breakpoint {
    common: Py<Common>,
    /// Set once it is in the guest.
    id: OnceLock<TapId>,
    va: Va,
    extra: OnceBox<Extra>,
}

/// What not every breakpoint has: one that is only counted, at an address without a name, takes no room for it.
#[derive(Default)]
struct Extra {
    symbol: Option<Py<PyString>>,
    handler: Mutex<Option<Py<PyAny>>>,
    /// Calls of its handler and of the predicates of its filter.
    calls: AtomicU64,
}

/// What Python gave for one or many breakpoints.
pub struct Given {
    pub handler: Option<Py<PyAny>>,
    pub ask: Option<Py<PyAny>>,
    pub key: Py<PyAny>,
    pub tag: Py<PyAny>,
    pub deadline: Option<f64>,
    pub root: Option<u64>,
    pub filter: Option<Py<PyAny>>,
    pub condition: Condition,
    pub captured: Option<Captured>,
    pub abi: Abi,
    /// Events a second.
    pub budget: Option<u64>,
}

impl Breakpoint {
    pub fn new(py: Python<'_>, common: &Py<Common>, va: Va, handler: Option<&Py<PyAny>>) -> Self {
        let symbol = common.get().shared.symbols.describe(va).map(|symbol| PyString::new(py, &symbol).unbind());
        let extra = OnceBox::new();
        if symbol.is_some() || handler.is_some() {
            let handler = Mutex::new(handler.map(|handler| handler.clone_ref(py)));
            extra.get_or_init(|| Box::new(Extra { symbol, handler, calls: AtomicU64::new(0) }));
        }
        Self { common: common.clone_ref(py), id: OnceLock::new(), va, extra }
    }

    fn extra(&self) -> &Extra {
        self.extra.get_or_init(Box::default)
    }

    fn own_symbol(&self) -> Option<&Py<PyString>> {
        self.extra.get()?.symbol.as_ref()
    }

    /// Counts a call of its handler, or of a predicate of its filter. By the thread that runs the loop only.
    pub fn count_call(&self) {
        count(&self.extra().calls);
    }

    fn common(&self) -> &Common {
        self.common.get()
    }

    pub fn shared(&self) -> &Arc<Shared> {
        &self.common().shared
    }

    /// Seconds that its handler may take.
    pub fn deadline(&self) -> Option<f64> {
        self.common().deadline
    }

    /// Its number; that of no tap before it is in the guest.
    pub fn id(&self) -> TapId {
        self.id.get().copied().unwrap_or(TapId(u32::MAX))
    }

    pub fn set_id(&self, id: TapId) {
        self.id.get_or_init(|| id);
    }

    pub fn handler(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.extra.get()?.handler.lock().as_ref().map(|handler| handler.clone_ref(py))
    }

    /// Its name in a recording.
    pub fn label(&self, py: Python<'_>) -> String {
        if let Some(events) = self.common().events {
            return events.to_string();
        }
        let symbol = self.own_symbol().map(|symbol| symbol.bind(py).to_string_lossy().into_owned());
        symbol.unwrap_or_else(|| format!("{:#x}", self.va.0))
    }

    /// The function that a question of its filter is put to.
    pub fn predicate(&self, py: Python<'_>, number: u16) -> Option<Py<PyAny>> {
        self.common().predicates.lock().get(usize::from(number)).map(|predicate| predicate.clone_ref(py))
    }

    /// How the arguments of a hit are found.
    pub fn abi(&self) -> Abi {
        self.common().abi
    }

    pub fn ask(&self) -> Option<&Py<PyAny>> {
        self.common().ask.as_ref()
    }

    pub fn key_object(&self, py: Python<'_>) -> Py<PyAny> {
        self.common().key.clone_ref(py)
    }

    pub fn tag_object(&self, py: Python<'_>) -> Py<PyAny> {
        self.common().tag.clone_ref(py)
    }

    /// Whether somebody is to be told of its hits.
    pub fn is_wanted(&self) -> bool {
        self.extra.get().is_some_and(|extra| extra.handler.lock().is_some()) || self.shared().is_listened_to(self.id())
    }

    /// The name of an address, which is nearly always its own.
    pub fn symbol_at(&self, py: Python<'_>, va: u64) -> Option<Py<PyString>> {
        if va == self.va.0 {
            return self.own_symbol().map(|symbol| symbol.clone_ref(py));
        }
        self.shared().symbols.describe(Va(va)).map(|symbol| PyString::new(py, &symbol).unbind())
    }

    fn holds(&self, va: Va) -> bool {
        va.0.checked_sub(self.va.0).is_some_and(|offset| offset < self.common().length)
    }

    fn touches_page(&self, page: Va) -> bool {
        let length = self.common().length;
        let last = self.va.0.saturating_add(length.saturating_sub(1));
        length > 0 && self.va.page() <= page && page <= Va(last).page()
    }

    fn state_now(&self, py: Python<'_>) -> TapState {
        self.shared().quick(py, |inner| inner.session.state(self.id()))
    }

    fn check_there(&self, py: Python<'_>) -> PyResult<()> {
        if self.state_now(py) == TapState::Removed { Err(stale("a breakpoint that was removed")) } else { Ok(()) }
    }
}

#[pymethods]
impl Breakpoint {
    /// The virtual address, the first one of a watch; 0 for a monitor, which has none.
    #[getter]
    fn address(&self) -> u64 {
        self.va.0
    }

    /// Bytes in the range of a watch; 1 for a breakpoint, 0 for a monitor.
    #[getter]
    fn length(&self) -> u64 {
        self.common().length
    }

    /// The accesses a watch reports; X for a breakpoint, none for a monitor.
    #[getter]
    fn access(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        access_to_python(py, self.common().access)
    }

    /// The address as "symbol" or "symbol+0x10", or None.
    #[getter]
    fn symbol(&self, py: Python<'_>) -> Option<Py<PyString>> {
        self.symbol_at(py, self.va.0)
    }

    /// The page-table root it is bound to; None: hits under every root count.
    #[getter]
    fn root(&self) -> Option<u64> {
        self.common().root
    }

    /// The view it is planted in.
    #[getter]
    fn view(&self) -> View {
        View::from(self.common().view.0)
    }

    /// Its owner, as given; None if none was given.
    #[getter]
    fn key(&self, py: Python<'_>) -> Py<PyAny> {
        self.key_object(py)
    }

    /// Whatever was given as `tag`.
    #[getter]
    fn tag(&self, py: Python<'_>) -> Py<PyAny> {
        self.tag_object(py)
    }

    /// The filter, as it was given.
    #[getter]
    fn r#where(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.common().filter.as_ref().map(|filter| filter.clone_ref(py))
    }

    /// Whether it is to raise hits.
    #[getter]
    fn enabled(&self, py: Python<'_>) -> bool {
        !matches!(self.state_now(py), TapState::Disabled | TapState::Removed)
    }

    /// One of "active": planted; "pending": its page is not mapped now; "disabled"; "removed": for ever.
    #[getter]
    fn state(&self, py: Python<'_>) -> &'static str {
        match self.state_now(py) {
            TapState::Active => "active",
            TapState::Pending => "pending",
            TapState::Disabled => "disabled",
            TapState::Removed => "removed",
        }
    }

    /// Its counters so far, as a snapshot.
    #[getter]
    fn stats(&self, py: Python<'_>) -> BreakpointStats {
        let (stats, holds, budget) = self.shared().quick(py, |inner| {
            let (session, id) = (&inner.session, self.id());
            (session.tap_stats(id), session.tap_holds(id).cloned().unwrap_or_default(), session.budget(id))
        });
        BreakpointStats {
            hits: stats.hits,
            filtered: stats.filtered,
            filter_faults: stats.filter_faults,
            py_calls: self.extra.get().map_or(0, |extra| extra.calls.load(Ordering::Relaxed)),
            hold_total: stats.hold_total.as_secs_f64(),
            hold_p50: seconds(holds.quantile_ns(0.5)),
            hold_p99: seconds(holds.quantile_ns(0.99)),
            hold_max: stats.hold_max.as_secs_f64().max(seconds(holds.max_ns())),
            over_budget: budget.is_some_and(|budget| budget.is_exceeded()),
        }
    }

    /// Sets the handler and returns that function unchanged: this is what makes `@vm.breakpoint(...)` work, also stacked.
    #[pyo3(signature = (handler, /))]
    fn __call__(&self, py: Python<'_>, handler: Py<PyAny>) -> PyResult<Py<PyAny>> {
        if !handler.bind(py).is_callable() {
            return Err(pyo3::exceptions::PyTypeError::new_err("a handler must be callable"));
        }
        self.check_there(py)?;
        let before = self.extra().handler.lock().replace(handler.clone_ref(py));
        self.shared().handlers.fetch_add(1, Ordering::AcqRel);
        drop(before);
        self.shared().quick(py, |inner| inner.session.set_wanted(self.id(), true));
        Ok(handler)
    }

    /// Plants it again after `disable`; does nothing if it is enabled.
    fn enable(&self, py: Python<'_>) -> PyResult<()> {
        self.check_there(py)?;
        self.shared().open(py, |session| session.enable(self.id()))
    }

    /// Takes it out of the guest and keeps everything else of it; does nothing if it is disabled.
    fn disable(&self, py: Python<'_>) -> PyResult<()> {
        self.check_there(py)?;
        self.shared().open(py, |session| session.disable(self.id()))
    }

    /// Takes it out of the guest for good. Twice is fine; in its own handler too.
    fn remove(&self, py: Python<'_>) -> PyResult<()> {
        if self.shared().is_closed() {
            return Ok(());
        }
        self.shared().open(py, |session| session.remove(self.id()))
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        if let Some(events) = self.common().events {
            return format!("<Breakpoint {events}, {}>", self.state(py));
        }
        let symbol = self.symbol(py).map_or_else(String::new, |symbol| format!(" {symbol}"));
        format!("<Breakpoint{symbol} at {:#x}, {}>", self.va.0, self.state(py))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.common)?;
        // Held by nobody while the collector runs, except by a thread that is about to let go of it: then it is left for later.
        if let Some(handler) = self.extra.get().and_then(|extra| extra.handler.try_lock()) {
            visit.call(&*handler)?;
        }
        Ok(())
    }

    fn __clear__(&self) {
        let handler = self.extra.get().and_then(|extra| extra.handler.lock().take());
        drop(handler);
    }
}

/// Counters of one breakpoint, as a snapshot.
#[pyclass(frozen, get_all, module = "vmitap._native")]
pub struct BreakpointStats {
    /// How often it was hit.
    hits: u64,
    /// Hits that its filter kept back; they are not among `hits`.
    filtered: u64,
    /// Hits at which its filter, and writes at which its `on_write`, looked at memory that could not be read.
    filter_faults: u64,
    /// How often its handler, or a predicate of its filter, was called.
    py_calls: u64,
    /// Seconds vCPUs stood still for hits that were handed to Python, all together.
    hold_total: f64,
    /// The time that half of its hits do not exceed; at most a quarter too long. Of hits that are only counted each sixteenth is timed.
    hold_p50: f64,
    /// The time that 99 of 100 do not exceed.
    hold_p99: f64,
    /// The longest of these times.
    hold_max: f64,
    /// Whether it was disabled because it exceeded its budget.
    over_budget: bool,
}

#[pymethods]
impl BreakpointStats {
    fn __repr__(&self) -> String {
        format!("<BreakpointStats hits={} filtered={} py_calls={}>", self.hits, self.filtered, self.py_calls)
    }
}

/// The breakpoints and watches of a session, live: iterating gives those there are at that moment, in order of insertion.
#[pyclass(frozen, module = "vmitap._native")]
pub struct Breakpoints(pub Arc<Shared>);

impl Breakpoints {
    /// Those that are not removed.
    fn there(&self, py: Python<'_>) -> Vec<Py<Breakpoint>> {
        let mut all = self.0.breakpoints(py);
        let states: Vec<TapState> = {
            let ids: Vec<TapId> = all.iter().map(|each| each.get().id()).collect();
            self.0.quick(py, |inner| ids.iter().map(|id| inner.session.state(*id)).collect())
        };
        let mut states = states.into_iter();
        all.retain(|_| states.next().is_some_and(|state| state != TapState::Removed));
        all
    }

    fn that(&self, py: Python<'_>, holds: impl Fn(&Breakpoint) -> bool) -> Vec<Py<Breakpoint>> {
        let mut found = self.there(py);
        found.retain(|each| holds(each.get()));
        found
    }
}

#[pymethods]
impl Breakpoints {
    fn __len__(&self, py: Python<'_>) -> usize {
        self.there(py).len()
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        PyList::new(py, self.there(py))?.try_iter()
    }

    fn __contains__(&self, py: Python<'_>, key: &Bound<'_, PyAny>) -> bool {
        self.there(py).iter().any(|each| each.is(key))
    }

    /// Those whose range holds the address.
    fn at(&self, py: Python<'_>, address: &Bound<'_, PyAny>) -> PyResult<Vec<Py<Breakpoint>>> {
        let va = self::address("address", address, &self.0.symbols)?;
        Ok(self.that(py, |each| each.holds(va)))
    }

    /// Those in the 4 KiB page of virtual memory that holds the address.
    fn on_page(&self, py: Python<'_>, address: &Bound<'_, PyAny>) -> PyResult<Vec<Py<Breakpoint>>> {
        let page = self::address("address", address, &self.0.symbols)?.page();
        Ok(self.that(py, |each| each.touches_page(page)))
    }

    /// Takes breakpoints and watches out for good: all of them or, on an error, none. Those that are removed already are fine.
    #[expect(clippy::needless_pass_by_value, reason = "arguments from Python are owned")]
    fn remove_many(&self, py: Python<'_>, breakpoints: Vec<Py<Breakpoint>>) -> PyResult<()> {
        if breakpoints.iter().any(|each| !Arc::ptr_eq(each.get().shared(), &self.0)) {
            return Err(super::errors::invalid("breakpoints", "one of them is of another session"));
        }
        let ids: Vec<TapId> = breakpoints.iter().map(|each| each.get().id()).collect();
        self.0.open_released(py, |session| session.remove_many(&ids))
    }

    /// Those of that owner.
    fn by_key(&self, py: Python<'_>, key: &Bound<'_, PyAny>) -> PyResult<Vec<Py<Breakpoint>>> {
        let mut found = Vec::new();
        for each in self.there(py) {
            if each.get().common().key.bind(py).eq(key)? {
                found.push(each);
            }
        }
        Ok(found)
    }

    /// Those whose tag equals `tag`.
    fn by_tag(&self, py: Python<'_>, tag: &Bound<'_, PyAny>) -> PyResult<Vec<Py<Breakpoint>>> {
        let mut found = Vec::new();
        for each in self.there(py) {
            if each.get().common().tag.bind(py).eq(tag)? {
                found.push(each);
            }
        }
        Ok(found)
    }
}
