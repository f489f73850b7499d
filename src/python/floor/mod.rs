//! The lower floor: the driver, its events, controllers and their manager, for people who build their own tools.

mod controllers;
mod event;
mod foreign;
mod manager;
pub mod raw;
mod tables;

use pyo3::PyTraverseError;
use pyo3::gc::PyVisit;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

pub use controllers::{BreakpointController, MemoryController, Planted};
pub use event::{VmiEvent, VmiEventResponse};
pub use manager::{BreakpointManager, ManagedBreakpoint};
pub use tables::{PageTableEvent, PageTableMonitor};

use super::convert::{AccessArg, access_to_python, buffer, length, number};
use super::handle::WRITING;
use super::memory;
use super::views::View;
use super::vm::Vm;
use crate::addr::{Gfn, Pa, Va};

fn gfn_of(what: &str, value: &Bound<'_, PyAny>) -> PyResult<Gfn> {
    number(what, value).map(Gfn)
}

/// The driver, one call to one call: for people who build their own tools. Nothing here knows of the session's breakpoints.
#[pyclass(frozen, module = "vmitap._native")]
pub struct VmiCore(Py<Vm>);

#[pymethods]
impl VmiCore {
    #[new]
    fn new(vm: Py<Vm>) -> PyResult<Self> {
        vm.get().open()?;
        Ok(Self(vm))
    }

    /// As `Vm.read_pa`; also reads allocated frames, which lie above guest memory.
    fn read<'py>(&self, py: Python<'py>, pa: &Bound<'_, PyAny>, length: &Bound<'_, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let pa = Pa(number("pa", pa)?);
        memory::read(py, self.0.get().open()?, self::length("length", length)?, |_| Ok(pa.into()))
    }

    /// As `Vm.write_pa`, but breakpoints on those bytes are not planted again; also writes allocated frames.
    fn write(&self, py: Python<'_>, pa: &Bound<'_, PyAny>, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let shared = self.0.get().open_for(WRITING)?;
        let (pa, bytes) = (Pa(number("pa", pa)?), buffer(data)?);
        shared.open(py, |session| session.vmi_mut().write_pa(pa, &bytes))
    }

    /// As `Vm.translate`.
    fn translate(&self, py: Python<'_>, va: &Bound<'_, PyAny>, root: &Bound<'_, PyAny>) -> PyResult<u64> {
        let (va, root, vm) = (Va(number("va", va)?), number("root", root)?, self.0.get());
        let pa = vm.open()?.open(py, |session| session.vmi().translate(va, vm.context(session, Some(root))?))?;
        Ok(pa.0)
    }

    /// The rights of a page in a view.
    fn memory_access(&self, py: Python<'_>, gfn: &Bound<'_, PyAny>, view: &Bound<'_, View>) -> PyResult<Py<PyAny>> {
        let (gfn, view) = (gfn_of("gfn", gfn)?, view.get().id());
        let access = self.0.get().open()?.open(py, |session| session.vmi().driver().memory_access(view, gfn))?;
        access_to_python(py, access)
    }

    /// Sets the rights of a page in a view; from the next instruction of every vCPU on, what they deny raises an event.
    fn set_memory_access(
        &self,
        py: Python<'_>,
        gfn: &Bound<'_, PyAny>,
        view: &Bound<'_, View>,
        access: AccessArg,
    ) -> PyResult<()> {
        let (gfn, view) = (gfn_of("gfn", gfn)?, view.get().id());
        let vm = self.0.get().open()?;
        vm.open(py, |session| session.vmi_mut().driver_mut().set_memory_access(view, gfn, access.0))
    }

    /// Shows `frame` at `gfn` in a view; None shows the page's own frame again. Access rights stay as they are.
    #[pyo3(signature = (view, gfn, frame))]
    fn remap(
        &self,
        py: Python<'_>,
        view: &Bound<'_, View>,
        gfn: &Bound<'_, PyAny>,
        frame: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let (gfn, view) = (gfn_of("gfn", gfn)?, view.get().id());
        let frame = frame.map(|frame| gfn_of("frame", frame)).transpose()?;
        self.0.get().open()?.open(py, |session| session.vmi_mut().driver_mut().remap(view, gfn, frame))
    }

    /// Takes a frame that no page of the default view shows, and returns its number. Its content is undefined.
    fn allocate_frame(&self, py: Python<'_>) -> PyResult<u64> {
        let frame = self.0.get().open()?.open(py, |session| session.vmi_mut().driver_mut().allocate_frame())?;
        Ok(frame.0)
    }

    /// Gives a frame back.
    fn free_frame(&self, py: Python<'_>, frame: &Bound<'_, PyAny>) -> PyResult<()> {
        let frame = gfn_of("frame", frame)?;
        self.0.get().open()?.open(py, |session| session.vmi_mut().driver_mut().free_frame(frame))
    }

    /// How many frames are taken, the session's own shadow pages included.
    #[getter]
    fn frames_in_use(&self, py: Python<'_>) -> PyResult<usize> {
        self.0.get().open()?.open(py, |session| Ok(session.vmi().driver().frames_in_use()))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.0)
    }
}
