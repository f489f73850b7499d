//! The last events of a session in a file that outlives the process: `vm.journal`, and `read_journal`.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;

use super::convert::{access_to_python, number};
use super::errors::invalid;
use super::events::seconds;
use super::gil::detached;
use super::shared::Shared;
use crate::capture::{Flight, FlightEvent, FlightKind};
use crate::session::TapId;

fn utf8(path: PathBuf) -> PyResult<String> {
    path.into_os_string().into_string().map_err(|_| invalid("path", "it is no UTF-8"))
}

/// The last events of a session in a file, which is still there when this process is killed: what it was at, and what came before.
#[pyclass(frozen, module = "vmitap._native")]
pub struct EventJournal(pub Arc<Shared>);

#[pymethods]
impl EventJournal {
    /// From now on the last events are in a file, which outlives this process. Returns the journal, a context manager that ends it.
    #[pyo3(signature = (path, *, events=None, replace=false))]
    fn open(
        slf: Py<Self>,
        py: Python<'_>,
        path: PathBuf,
        events: Option<&Bound<'_, PyAny>>,
        replace: bool,
    ) -> PyResult<Py<Self>> {
        let slots = events.map_or(Ok(65_536), |events| number("events", events))?;
        let path = utf8(path)?;
        let shared = &slf.get().0;
        shared.check_open()?;
        let names: Vec<(TapId, String)> =
            shared.breakpoints(py).iter().map(|each| (each.get().id(), each.get().label(py))).collect();
        shared.open_released(py, |session| session.open_flight(&path, slots, replace, &names))?;
        Ok(slf)
    }

    /// Ends the file; it says then that nothing crashed. Twice is fine, and leaving the session does it too.
    fn close(&self, py: Python<'_>) {
        self.0.quick(py, |inner| inner.session.close_flight());
    }

    /// The file; None if none is open.
    #[getter]
    fn path(&self, py: Python<'_>) -> Option<String> {
        self.0.quick(py, |inner| inner.session.flight().map(|flight| flight.path().to_owned()))
    }

    /// Events so far, also those that others have taken the place of; 0 if no file is open.
    #[getter]
    fn total(&self, py: Python<'_>) -> u64 {
        self.0.quick(py, |inner| inner.session.flight().map_or(0, crate::capture::FlightRecorder::total))
    }

    /// Events in the file.
    fn __len__(&self, py: Python<'_>) -> usize {
        let held = |flight: &crate::capture::FlightRecorder| flight.total().min(flight.slots());
        self.0.quick(py, |inner| inner.session.flight().map_or(0, held)) as usize
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (exc_type, exc_value, traceback, /))]
    fn __exit__(&self, py: Python<'_>, exc_type: &Bound<'_, PyAny>, exc_value: &Bound<'_, PyAny>, traceback: &Bound<'_, PyAny>) {
        let _ = (exc_type, exc_value, traceback);
        self.close(py);
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        self.path(py).map_or_else(
            || "<EventJournal, not open>".to_owned(),
            |path| format!("<EventJournal {path:?}, {} events>", self.total(py)),
        )
    }
}

/// Reads a journal of events: of a session that lives, has ended, or was killed.
#[pyfunction]
pub fn read_journal(py: Python<'_>, path: PathBuf) -> PyResult<JournalContents> {
    let path = utf8(path)?;
    Ok(JournalContents(Arc::new(detached(py, || Flight::read(&path))?)))
}

/// What is in a journal of events.
#[pyclass(frozen, module = "vmitap._native")]
pub struct JournalContents(Arc<Flight>);

#[pymethods]
impl JournalContents {
    /// The guest's name.
    #[getter]
    fn target(&self) -> &str {
        &self.0.target
    }

    /// The number of the process that wrote it.
    #[getter]
    fn process(&self) -> u64 {
        self.0.process
    }

    /// When the session began, in seconds since 1970.
    #[getter]
    fn began(&self) -> f64 {
        seconds(self.0.began_unix_ns)
    }

    /// How many events it has room for.
    #[getter]
    fn room(&self) -> u64 {
        self.0.slots
    }

    /// How many events there were.
    #[getter]
    fn total(&self) -> u64 {
        self.0.total
    }

    /// Whether the journal was ended in order. If not, its session lives or was killed.
    #[getter]
    fn closed(&self) -> bool {
        self.0.is_closed
    }

    /// Events that were cut off while they were written, or make no sense: they are left out.
    #[getter]
    fn torn(&self) -> u64 {
        self.0.torn
    }

    /// The last events, the oldest first.
    #[getter]
    fn events(&self) -> Vec<JournalEvent> {
        (0..self.0.events.len()).filter_map(|index| JournalEvent::new(&self.0, index)).collect()
    }

    fn __len__(&self) -> usize {
        self.0.events.len()
    }

    fn __repr__(&self) -> String {
        let Flight { target, events, total, torn, .. } = &*self.0;
        format!("<JournalContents of {target:?}: {} of {total} events, {torn} torn>", events.len())
    }
}

/// One event of a journal.
#[pyclass(frozen, module = "vmitap._native")]
pub struct JournalEvent {
    flight: Arc<Flight>,
    event: FlightEvent,
}

impl JournalEvent {
    fn new(flight: &Arc<Flight>, index: usize) -> Option<Self> {
        Some(Self { flight: flight.clone(), event: *flight.events.get(index)? })
    }
}

#[pymethods]
impl JournalEvent {
    /// Its number, from 1.
    #[getter]
    fn number(&self) -> u64 {
        self.event.number
    }

    /// Seconds since the session began, as `Hit.timestamp`.
    #[getter]
    fn timestamp(&self) -> f64 {
        seconds(self.event.time_ns)
    }

    /// Number of the vCPU.
    #[getter]
    fn vcpu(&self) -> u16 {
        self.event.vcpu
    }

    /// What happened, as `VmiEvent.reason`.
    #[getter]
    fn reason(&self) -> &'static str {
        self.event.kind.name()
    }

    /// Which access was denied; None for other events.
    #[getter]
    fn access(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let is_access = self.event.kind == FlightKind::MemoryAccess;
        is_access.then(|| access_to_python(py, self.event.access)).transpose()
    }

    /// The virtual address that was executed or accessed, where it is known.
    #[getter]
    fn address(&self) -> Option<u64> {
        let FlightEvent { kind, address, .. } = self.event;
        match kind {
            FlightKind::Breakpoint
            | FlightKind::SingleStep
            | FlightKind::DescriptorAccess
            | FlightKind::DebugException
            | FlightKind::GuestRequest => Some(address),
            FlightKind::MemoryAccess if address != 0 => Some(address),
            _ => None,
        }
    }

    /// The new value of a control register, the number of an MSR or of a port, the leaf of CPUID; None for other events.
    #[getter]
    fn value(&self) -> Option<u64> {
        let FlightEvent { kind, address, .. } = self.event;
        let has =
            matches!(kind, FlightKind::WriteControlRegister | FlightKind::WriteMsr | FlightKind::Cpuid | FlightKind::PortIo);
        has.then_some(address)
    }

    /// The address of the instruction.
    #[getter]
    fn rip(&self) -> u64 {
        self.event.rip
    }

    /// The page-table root the vCPU was under.
    #[getter]
    fn root(&self) -> u64 {
        self.event.root
    }

    /// What became of it.
    #[getter]
    fn outcome(&self) -> &'static str {
        self.event.outcome.name()
    }

    /// The number of the first breakpoint that wanted it, in order of insertion, as the column `breakpoint` of a recording.
    #[getter]
    fn breakpoint(&self) -> Option<u32> {
        self.event.tap
    }

    /// The name of that breakpoint's place; of the first 4096 breakpoints only, and not of a whole long name.
    #[getter]
    fn symbol(&self) -> Option<&str> {
        self.event.tap.and_then(|tap| self.flight.name(tap))
    }

    fn __repr__(&self) -> String {
        let FlightEvent { number, kind, vcpu, rip, outcome, .. } = self.event;
        format!("<JournalEvent {number}: {} at {rip:#x} on vCPU {vcpu}, {}>", kind.name(), outcome.name())
    }
}
