//! Controllers of ours, which the session clears when it ends.

use std::sync::Arc;

use parking_lot::Mutex;
use pyo3::PyTraverseError;
use pyo3::gc::PyVisit;
use pyo3::prelude::*;

use super::event::VmiEvent;
use super::gfn_of;
use crate::addr::{Gfn, Pa};
use crate::driver::VmiDriver;
use crate::error::Result;
use crate::python::convert::number;
use crate::python::views::View;
use crate::python::vm::Vm;
use crate::session::Vmi;
use crate::tap::{self, TapController, TapEvents};

/// A controller of ours. Locked only under the session's lock.
#[derive(Clone)]
pub enum Planted {
    Breakpoint(Arc<Mutex<tap::BreakpointController>>),
    Memory(Arc<Mutex<tap::MemoryController>>),
}

impl Planted {
    /// One that plants INT3s.
    pub fn breakpoints() -> Self {
        Self::Breakpoint(Arc::default())
    }

    /// One that takes the right to execute away.
    pub fn memory() -> Self {
        Self::Memory(Arc::default())
    }

    /// The controller itself, if it is one that plants INT3s.
    pub fn breakpoint_controller(&self) -> Option<Arc<Mutex<tap::BreakpointController>>> {
        match self {
            Self::Breakpoint(controller) => Some(controller.clone()),
            Self::Memory(_) => None,
        }
    }

    /// Works with the controller.
    pub fn with<T>(&self, work: impl FnOnce(&mut dyn TapController<dyn VmiDriver>) -> T) -> T {
        match self {
            Self::Breakpoint(controller) => work(&mut *controller.lock()),
            Self::Memory(controller) => work(&mut *controller.lock()),
        }
    }

    /// Takes everything back it has planted.
    pub fn clear(&self, vmi: &mut Vmi) -> Result<()> {
        match self {
            Self::Breakpoint(controller) => controller.lock().clear(vmi),
            Self::Memory(controller) => controller.lock().clear(vmi),
        }
    }

    /// Has the session clear it in the end.
    pub fn hand_over(&self, py: Python<'_>, vm: &Vm) -> PyResult<()> {
        let shared = vm.open()?;
        shared.quick(py, |inner| inner.planted.push(self.clone()));
        Ok(())
    }

    fn work<T: Send>(
        &self,
        py: Python<'_>,
        vm: &Py<Vm>,
        work: impl FnOnce(&mut Vmi, &mut dyn TapController<dyn VmiDriver>) -> Result<T> + Send,
    ) -> PyResult<T> {
        vm.get().open()?.open(py, |session| self.with(|controller| work(session.vmi_mut(), controller)))
    }

    fn insert(&self, vm: &Py<Vm>, pa: &Bound<'_, PyAny>, view: &Bound<'_, View>) -> PyResult<()> {
        let (at, view) = (Pa(number("pa", pa)?), view.get().id());
        self.work(pa.py(), vm, |vmi, controller| controller.insert_breakpoint(vmi, at, view))
    }

    fn remove(&self, vm: &Py<Vm>, pa: &Bound<'_, PyAny>, view: &Bound<'_, View>) -> PyResult<()> {
        let (at, view) = (Pa(number("pa", pa)?), view.get().id());
        self.work(pa.py(), vm, |vmi, controller| controller.remove_breakpoint(vmi, at, view))
    }

    fn monitor(&self, vm: &Py<Vm>, gfn: &Bound<'_, PyAny>, view: &Bound<'_, View>) -> PyResult<()> {
        let (page, view) = (gfn_of("gfn", gfn)?, view.get().id());
        self.work(gfn.py(), vm, |vmi, controller| controller.monitor(vmi, page, view))
    }

    fn unmonitor(&self, vm: &Py<Vm>, gfn: &Bound<'_, PyAny>, view: &Bound<'_, View>) -> PyResult<()> {
        let (page, view) = (gfn_of("gfn", gfn)?, view.get().id());
        self.work(gfn.py(), vm, |vmi, controller| controller.unmonitor(vmi, page, view))
    }

    fn check(&self, py: Python<'_>, vm: &Py<Vm>, event: &Bound<'_, VmiEvent>) -> PyResult<Option<(View, u64)>> {
        let event = event.get().event;
        let found = self.work(py, vm, |_, controller| Ok(controller.check_event(&event)))?;
        Ok(found.map(|(view, Gfn(gfn))| (View::from(view), gfn)))
    }
}

macro_rules! controller {
    ($(#[doc = $doc:literal])* $name:ident, $make:ident,
     [$check:literal, $insert:literal, $remove:literal, $monitor:literal], { $($more:tt)* }) => {
        $(#[doc = $doc])*
        #[pyclass(frozen, module = "vmitap._native")]
        pub struct $name {
            pub vm: Py<Vm>,
            pub planted: Planted,
        }

        #[pymethods]
        impl $name {
            #[new]
            fn new(py: Python<'_>, vm: Py<Vm>) -> PyResult<Self> {
                let planted = Planted::$make();
                planted.hand_over(py, vm.get())?;
                Ok(Self { vm, planted })
            }

            $($more)*

            #[doc = $check]
            #[pyo3(signature = (event, /))]
            fn check_event(&self, py: Python<'_>, event: &Bound<'_, VmiEvent>) -> PyResult<Option<(View, u64)>> {
                self.planted.check(py, &self.vm, event)
            }

            #[doc = $insert]
            #[pyo3(signature = (pa, view, /))]
            fn insert_breakpoint(&self, pa: &Bound<'_, PyAny>, view: &Bound<'_, View>) -> PyResult<()> {
                self.planted.insert(&self.vm, pa, view)
            }

            #[doc = $remove]
            #[pyo3(signature = (pa, view, /))]
            fn remove_breakpoint(&self, pa: &Bound<'_, PyAny>, view: &Bound<'_, View>) -> PyResult<()> {
                self.planted.remove(&self.vm, pa, view)
            }

            #[doc = $monitor]
            #[pyo3(signature = (gfn, view, /))]
            fn monitor(&self, gfn: &Bound<'_, PyAny>, view: &Bound<'_, View>) -> PyResult<()> {
                self.planted.monitor(&self.vm, gfn, view)
            }

            /// Puts the access rights back that `monitor` found.
            #[pyo3(signature = (gfn, view, /))]
            fn unmonitor(&self, gfn: &Bound<'_, PyAny>, view: &Bound<'_, View>) -> PyResult<()> {
                self.planted.unmonitor(&self.vm, gfn, view)
            }

            fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
                visit.call(&self.vm)
            }
        }
    };
}

controller! {
    /// Breakpoints as INT3 in shadow pages that only execution can reach; a `TapController`.
    BreakpointController, breakpoints, [
        "The view and the frame of an INT3 event that carries a view, else None.",
        "Plants an INT3 at a physical address in a view, hidden from the guest; or adds a reference to the one there.",
        "Takes back one reference; the last restores the byte, and the last of a page gives its frame back.",
        "Makes a page execute-only in a view, and remembers the access rights it found."
    ], {
        /// Whether the guest itself has an INT3 at the event's instruction.
        #[pyo3(signature = (event, /))]
        fn is_breakpoint(&self, py: Python<'_>, event: &Bound<'_, VmiEvent>) -> PyResult<bool> {
            let event = event.get().event;
            let shared = self.vm.get().open()?;
            shared.open(py, |session| tap::BreakpointController::is_breakpoint(session.vmi(), &event))
        }
    }
}

controller! {
    /// Breakpoints by taking the right to execute away from a page; touches no byte. A `TapController`.
    MemoryController, memory, [
        "The view and the frame of a denied execution, else None.",
        "Notes a breakpoint at a physical address in a view; raises as `BreakpointController.insert_breakpoint`.",
        "Takes back one reference.",
        "Takes the right to execute away from a page in a view, and remembers the access rights it found."
    ], {}
}
