//! One event as the driver raised it, and the answer to it.

use std::sync::{Arc, Weak};

use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::addr::Pa;
use crate::arch::amd64::ControlRegister;
use crate::event::{self, DescriptorRegister, EventAction, EventReason};
use crate::python::convert::{access_to_python, changes, show_changes};
use crate::python::registers::Registers;
use crate::python::shared::Shared;
use crate::python::views::View;
use crate::session::GpChanges;

/// One event of one vCPU, from `Vm.wait_event`. The vCPU is held until the event is answered with `Vm.respond`.
#[pyclass(frozen, module = "vmitap._native")]
pub struct VmiEvent {
    pub event: event::VmiEvent,
    /// What tells it from every other event of the session.
    pub number: u64,
    session: Weak<Shared>,
}

impl VmiEvent {
    pub fn of(event: &event::VmiEvent, number: u64, session: &Arc<Shared>) -> Self {
        Self { event: *event, number, session: Arc::downgrade(session) }
    }

    /// Whether it is an event of this session.
    pub fn is_of(&self, session: &Arc<Shared>) -> bool {
        std::ptr::eq(self.session.as_ptr(), Arc::as_ptr(session))
    }
}

#[pymethods]
impl VmiEvent {
    /// What happened.
    #[getter]
    fn reason(&self) -> &'static str {
        match self.event.reason {
            EventReason::Breakpoint { .. } => "breakpoint",
            EventReason::MemoryAccess { .. } => "memory-access",
            EventReason::SingleStep { .. } => "single-step",
            EventReason::WriteControlRegister { .. } => "write-control-register",
            EventReason::WriteMsr { .. } => "write-msr",
            EventReason::Cpuid { .. } => "cpuid",
            EventReason::DescriptorAccess { .. } => "descriptor-access",
            EventReason::DebugException { .. } => "debug-exception",
            EventReason::PortIo { .. } => "port-io",
            EventReason::GuestRequest => "guest-request",
        }
    }

    /// The vCPU it happened on.
    #[getter]
    fn vcpu(&self) -> u16 {
        self.event.vcpu.0
    }

    /// The view the vCPU was in.
    #[getter]
    fn view(&self) -> Option<View> {
        self.event.view.map(View::from)
    }

    /// The registers at the event; `rip` is the instruction itself, also for an INT3.
    #[getter]
    fn registers(&self) -> Registers {
        Registers::from(&self.event.registers)
    }

    /// The frame of the instruction (for "breakpoint" and "single-step") or of `pa`.
    #[getter]
    fn gfn(&self) -> Option<u64> {
        match self.event.reason {
            EventReason::Breakpoint { gfn, .. } => Some(gfn.0),
            EventReason::SingleStep { gfn } => gfn.map(|gfn| gfn.0),
            EventReason::MemoryAccess { pa, .. } => Some(pa.gfn().0),
            _ => None,
        }
    }

    /// The first physical address that was denied; of the INT3, for "breakpoint".
    #[getter]
    fn pa(&self) -> Option<u64> {
        match self.event.reason {
            EventReason::Breakpoint { gfn, .. } => Some(gfn.pa(self.event.registers.rip().page_offset()).0),
            EventReason::MemoryAccess { pa: Pa(pa), .. } => Some(pa),
            _ => None,
        }
    }

    /// The virtual address of the same, where the driver knows it.
    #[getter]
    fn va(&self) -> Option<u64> {
        match self.event.reason {
            EventReason::Breakpoint { .. } => Some(self.event.registers.gp.rip),
            EventReason::MemoryAccess { va, .. } => va.map(|va| va.0),
            _ => None,
        }
    }

    /// Which accesses were denied.
    #[getter]
    fn access(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let EventReason::MemoryAccess { access, .. } = self.event.reason else { return Ok(None) };
        access_to_python(py, access).map(Some)
    }

    /// Bytes of the instruction, for "breakpoint" and "cpuid".
    #[getter]
    fn insn_len(&self) -> Option<u8> {
        match self.event.reason {
            EventReason::Breakpoint { insn_len, .. } | EventReason::Cpuid { insn_len, .. } => Some(insn_len),
            _ => None,
        }
    }

    /// The control register ("cr3") or the number of the MSR about to be written; the register ("gdtr") about to be loaded or stored.
    #[getter]
    fn register(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match self.event.reason {
            EventReason::WriteControlRegister { register, .. } => match register {
                ControlRegister::Cr0 => "cr0",
                ControlRegister::Cr3 => "cr3",
                ControlRegister::Cr4 => "cr4",
            }
            .into_py_any(py),
            EventReason::WriteMsr { msr, .. } => msr.into_py_any(py),
            EventReason::DescriptorAccess { register, .. } => match register {
                DescriptorRegister::Gdtr => "gdtr",
                DescriptorRegister::Idtr => "idtr",
                DescriptorRegister::Ldtr => "ldtr",
                DescriptorRegister::Tr => "tr",
            }
            .into_py_any(py),
            _ => Ok(py.None()),
        }
    }

    /// Its value now.
    #[getter]
    fn old(&self) -> Option<u64> {
        match self.event.reason {
            EventReason::WriteControlRegister { old, .. } | EventReason::WriteMsr { old, .. } => Some(old),
            _ => None,
        }
    }

    /// The value to be written.
    #[getter(new)]
    fn new_value(&self) -> Option<u64> {
        match self.event.reason {
            EventReason::WriteControlRegister { new, .. } | EventReason::WriteMsr { new, .. } => Some(new),
            _ => None,
        }
    }

    /// EAX of a CPUID.
    #[getter]
    fn leaf(&self) -> Option<u32> {
        let EventReason::Cpuid { leaf, .. } = self.event.reason else { return None };
        Some(leaf)
    }

    /// ECX of a CPUID.
    #[getter]
    fn subleaf(&self) -> Option<u32> {
        let EventReason::Cpuid { subleaf, .. } = self.event.reason else { return None };
        Some(subleaf)
    }

    /// What DR6 is to say of a debug exception.
    #[getter]
    fn pending(&self) -> Option<u64> {
        let EventReason::DebugException { pending } = self.event.reason else { return None };
        Some(pending)
    }

    /// The I/O port about to be read or written.
    #[getter]
    fn port(&self) -> Option<u16> {
        let EventReason::PortIo { port, .. } = self.event.reason else { return None };
        Some(port)
    }

    /// Bytes that go to or from a port at a time: 1, 2 or 4.
    #[getter]
    fn port_bytes(&self) -> Option<u8> {
        let EventReason::PortIo { bytes, .. } = self.event.reason else { return None };
        Some(bytes)
    }

    /// Whether the port is read; else it is written.
    #[getter]
    fn is_port_read(&self) -> Option<bool> {
        let EventReason::PortIo { is_read, .. } = self.event.reason else { return None };
        Some(is_read)
    }

    fn __repr__(&self) -> String {
        format!("<VmiEvent {} at {} on vCPU {}>", self.reason(), self.event.registers.rip(), self.event.vcpu)
    }
}

/// The answer to one event: what its vCPU does next. Order of effects: registers, then view, then action.
#[pyclass(frozen, module = "vmitap._native")]
#[derive(Clone, Copy)]
pub struct VmiEventResponse {
    pub action: EventAction,
    pub view: Option<crate::addr::View>,
    pub registers: Option<GpChanges>,
}

impl VmiEventResponse {
    const fn action(action: EventAction) -> Self {
        Self { action, view: None, registers: None }
    }
}

#[pymethods]
impl VmiEventResponse {
    /// Goes on: retries the instruction, or carries out what was announced.
    #[staticmethod]
    fn continue_() -> Self {
        Self::action(EventAction::Continue)
    }

    /// Delivers the INT3 to the guest through its own IDT, as if nobody had looked.
    #[staticmethod]
    fn reinject() -> Self {
        Self::action(EventAction::Reinject)
    }

    /// Executes one instruction in `view`, then goes on in the vCPU's own view without another event.
    #[staticmethod]
    fn fast_single_step(view: &Bound<'_, View>) -> Self {
        Self::action(EventAction::FastSingleStep { view: view.get().id() })
    }

    /// Executes one instruction in `view`, then raises a "single-step" event, still in `view`.
    #[staticmethod]
    fn single_step(view: &Bound<'_, View>) -> Self {
        Self::action(EventAction::SingleStep { view: view.get().id() })
    }

    /// Serves the denied read from the default view: the guest gets the original bytes.
    #[staticmethod]
    fn emulate() -> Self {
        Self::action(EventAction::Emulate)
    }

    /// Skips the effect of the denied write, or of the announced register write: the instruction counts as executed.
    #[staticmethod]
    fn deny() -> Self {
        Self::action(EventAction::Deny)
    }

    /// The same answer, with the vCPU in `view` from then on.
    fn in_view(&self, view: &Bound<'_, View>) -> Self {
        Self { view: Some(view.get().id()), ..*self }
    }

    /// The same answer, with these registers written first.
    #[pyo3(signature = (**registers))]
    fn with_registers(&self, registers: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let mut all = self.registers.unwrap_or_default();
        for (slot, value) in all.values.iter_mut().zip(changes(registers)?.values) {
            *slot = value.or(*slot);
        }
        Ok(Self { registers: Some(all), ..*self })
    }

    fn __repr__(&self) -> String {
        let mut shown = match self.action {
            EventAction::Continue => "VmiEventResponse.continue_()".to_owned(),
            EventAction::Reinject => "VmiEventResponse.reinject()".to_owned(),
            EventAction::FastSingleStep { view } => format!("VmiEventResponse.fast_single_step(View({view}))"),
            EventAction::SingleStep { view } => format!("VmiEventResponse.single_step(View({view}))"),
            EventAction::Emulate => "VmiEventResponse.emulate()".to_owned(),
            EventAction::Deny => "VmiEventResponse.deny()".to_owned(),
        };
        if let Some(view) = self.view {
            shown = format!("{shown}.in_view(View({view}))");
        }
        if let Some(registers) = &self.registers {
            shown = format!("{shown}.with_registers({})", show_changes(registers));
        }
        shown
    }
}
