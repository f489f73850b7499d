//! Page-ins and page-outs, for people who write their own loop.

use std::sync::Arc;

use parking_lot::Mutex;
use pyo3::PyTraverseError;
use pyo3::gc::PyVisit;
use pyo3::prelude::*;

use super::controllers::BreakpointController;
use super::event::VmiEvent;
use crate::addr::{self, MemoryAccess, Va};
use crate::arch::amd64::AddressContext;
use crate::error::{Result, VmiError};
use crate::event::EventReason;
use crate::ptm;
use crate::python::convert::number;
use crate::python::errors::invalid;
use crate::python::views::View;
use crate::python::vm::Vm;
use crate::session::Vmi;
use crate::tap::{self, Rights};

/// What became of an address that a `PageTableMonitor` monitors.
#[pyclass(frozen, module = "vmitap._native")]
pub struct PageTableEvent(pub ptm::PageTableEvent);

#[pymethods]
impl PageTableEvent {
    /// What happened: "page-out", it is no longer mapped at `pa`; "page-in", it is mapped at `pa` now.
    #[getter]
    fn kind(&self) -> &'static str {
        match self.0 {
            ptm::PageTableEvent::PageOut { .. } => "page-out",
            ptm::PageTableEvent::PageIn { .. } => "page-in",
        }
    }

    /// The virtual address.
    #[getter]
    fn address(&self) -> u64 {
        self.0.address().0.0
    }

    /// The page-table root it is monitored under.
    #[getter]
    fn root(&self) -> u64 {
        self.0.address().1.root.0
    }

    /// The physical address that it had or has.
    #[getter]
    fn pa(&self) -> u64 {
        let (ptm::PageTableEvent::PageOut { pa, .. } | ptm::PageTableEvent::PageIn { pa, .. }) = self.0;
        pa.0
    }

    fn __repr__(&self) -> String {
        format!("<PageTableEvent {} of {:#x} under root {:#x}: {:#x}>", self.kind(), self.address(), self.root(), self.pa())
    }
}

/// Watches the page tables that map addresses, and says when these are mapped, unmapped or mapped elsewhere.
#[pyclass(frozen, module = "vmitap._native")]
pub struct PageTableMonitor {
    vm: Py<Vm>,
    /// Whose rights it shares; `None`: the session's.
    controller: Option<Arc<Mutex<tap::BreakpointController>>>,
    /// Locked only under the session's lock.
    tables: Mutex<ptm::PageTableMonitor>,
    /// What was found out before a call failed, and is not told yet. Locked as `tables`.
    owed: Mutex<Vec<ptm::PageTableEvent>>,
}

impl PageTableMonitor {
    fn work<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut ptm::PageTableMonitor, &mut Vmi, &mut Rights) -> Result<T> + Send,
    ) -> PyResult<T> {
        self.vm.get().open()?.open(py, |session| {
            let mut tables = self.tables.lock();
            let (vmi, rights) = session.vmi_and_rights();
            match &self.controller {
                None => work(&mut tables, vmi, rights),
                Some(controller) => work(&mut tables, vmi, controller.lock().rights()),
            }
        })
    }

    fn context(&self, py: Python<'_>, root: &Bound<'_, PyAny>) -> PyResult<AddressContext> {
        let (root, vm) = (number("root", root)?, self.vm.get());
        vm.open()?.open(py, |session| vm.context(session, Some(root)))
    }
}

#[pymethods]
impl PageTableMonitor {
    #[new]
    #[pyo3(signature = (vm, controller=None, *, views=None))]
    fn new(
        py: Python<'_>,
        vm: Py<Vm>,
        controller: Option<&Bound<'_, BreakpointController>>,
        views: Option<Vec<Bound<'_, View>>>,
    ) -> PyResult<Self> {
        let shared = vm.get().open_for("watching page tables")?;
        let controller = match controller.map(Bound::get) {
            Some(controller) if !Arc::ptr_eq(controller.vm.get().open()?, shared) => {
                return Err(invalid("controller", "it is of another session"));
            }
            controller => controller.and_then(|controller| controller.planted.breakpoint_controller()),
        };
        let tap_view = shared.quick(py, |inner| inner.session.tap_view());
        let views = views.map_or_else(|| vec![tap_view], |views| views.iter().map(|view| view.get().id()).collect());
        if views.contains(&addr::View::DEFAULT) {
            return Err(VmiError::DefaultView { op: "watching page tables" }.into());
        }
        let tables = Mutex::new(ptm::PageTableMonitor::new(&views));
        Ok(Self { vm, controller, tables, owed: Mutex::default() })
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        self.work(py, |tables, _, _| Ok(tables.len()))
    }

    /// How many page tables are watched.
    #[getter]
    fn tables(&self, py: Python<'_>) -> PyResult<usize> {
        self.work(py, |tables, _, _| Ok(tables.tables()))
    }

    /// Monitors an address under a root, or counts one more who wants it; returns where it is mapped, or None.
    fn monitor(&self, py: Python<'_>, address: &Bound<'_, PyAny>, root: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
        let (va, context) = (Va(number("address", address)?), self.context(py, root)?);
        let pa = self.work(py, |tables, vmi, rights| tables.monitor(vmi, rights, va, context))?;
        Ok(pa.map(|pa| pa.0))
    }

    /// Takes one `monitor` back; returns whether there was one.
    fn unmonitor(&self, py: Python<'_>, address: &Bound<'_, PyAny>, root: &Bound<'_, PyAny>) -> PyResult<bool> {
        let (va, context) = (Va(number("address", address)?), self.context(py, root)?);
        self.work(py, |tables, vmi, rights| tables.unmonitor(vmi, rights, va, context))
    }

    /// Notes a store to a watched table that is about to happen; returns whether the event is one.
    fn mark_dirty(&self, event: &Bound<'_, VmiEvent>) -> PyResult<bool> {
        let event_ = event.get().event;
        let (EventReason::MemoryAccess { pa, access, .. }, Some(view)) = (event_.reason, event_.view) else { return Ok(false) };
        self.work(event.py(), |tables, vmi, _| {
            let is_store = access.contains(MemoryAccess::W) && tables.watches(view, pa.gfn());
            if is_store {
                tables.mark_store(vmi, &event_);
            }
            Ok(is_store)
        })
    }

    /// The page-ins and page-outs of what the vCPU of `event` has stored by now; None: looks at every table anew.
    #[pyo3(signature = (event=None))]
    fn process(&self, py: Python<'_>, event: Option<&Bound<'_, VmiEvent>>) -> PyResult<Vec<PageTableEvent>> {
        let vcpu = event.map(|event| event.get().event.vcpu);
        let events = self.work(py, |tables, vmi, rights| {
            if vcpu.is_none() {
                tables.mark_all_dirty(None);
            }
            let mut owed = self.owed.lock();
            tables.process(vmi, rights, vcpu, &mut owed)?;
            Ok(std::mem::take(&mut *owed))
        })?;
        Ok(events.into_iter().map(PageTableEvent).collect())
    }

    /// Restores the access of every table and forgets every address.
    fn clear(&self, py: Python<'_>) -> PyResult<()> {
        self.work(py, |tables, vmi, rights| {
            tables.clear(vmi, rights)?;
            self.owed.lock().clear();
            Ok(())
        })
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        visit.call(&self.vm)
    }
}
