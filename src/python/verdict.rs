//! What a handler wants done.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::convert::{changes, number, show_changes};
use super::errors::invalid;
use crate::session;

/// What a verdict says.
#[derive(Clone, PartialEq, Eq)]
pub enum Said {
    To(session::Verdict),
    Detach,
}

/// What a handler wants done with the vCPU; returning None is the same as `continue_()`.
#[pyclass(frozen, module = "vmitap._native")]
pub struct Verdict(pub Said);

#[pymethods]
impl Verdict {
    /// Executes the tapped instruction and goes on.
    #[staticmethod]
    fn continue_() -> Self {
        Self(Said::To(session::Verdict::Continue))
    }

    /// Leaves the function at once with `value` in RAX: pops the return address. Right at the entry of a function only.
    #[staticmethod]
    fn return_from_function(value: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self(Said::To(session::Verdict::Return(number("value", value)?))))
    }

    /// Goes on with these registers; those not named keep their value. With another `rip`, the tapped instruction is not executed.
    #[staticmethod]
    #[pyo3(signature = (**registers))]
    fn set_registers(registers: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        Ok(Self(Said::To(session::Verdict::SetRegisters(Box::new(changes(registers)?)))))
    }

    /// Goes on instruction by instruction: the handler is called again after each of the next `count`, with `Hit.step` from 1 on.
    #[staticmethod]
    fn step(count: &Bound<'_, PyAny>) -> PyResult<Self> {
        match count.extract::<i64>() {
            Ok(n) if n >= 1 && u32::try_from(n).is_ok() => Ok(Self(Said::To(session::Verdict::Step(n as u32)))),
            Err(error) if !error.is_instance_of::<pyo3::exceptions::PyOverflowError>(count.py()) => Err(error),
            _ => Err(invalid("count", format!("{count} is not between 1 and {}", u32::MAX))),
        }
    }

    /// The register write of a `Vm.monitor_events` has no effect, and counts as executed; a debug exception is kept from the guest.
    #[staticmethod]
    fn deny() -> Self {
        Self(Said::To(session::Verdict::Deny))
    }

    /// Makes `run` return with reason "paused", the vCPU standing at the breakpoint; the next `run` goes on from there.
    #[staticmethod]
    fn pause() -> Self {
        Self(Said::To(session::Verdict::Pause))
    }

    /// Goes on and ends the session, as `Vm.detach` does; `run` returns with reason "detached".
    #[staticmethod]
    fn detach() -> Self {
        Self(Said::Detach)
    }

    fn __repr__(&self) -> String {
        match &self.0 {
            Said::Detach => "Verdict.detach()".to_owned(),
            Said::To(session::Verdict::Continue) => "Verdict.continue_()".to_owned(),
            Said::To(session::Verdict::Return(value)) => format!("Verdict.return_from_function({value})"),
            Said::To(session::Verdict::SetRegisters(changes)) => format!("Verdict.set_registers({})", show_changes(changes)),
            Said::To(session::Verdict::Step(count)) => format!("Verdict.step({count})"),
            Said::To(session::Verdict::Deny) => "Verdict.deny()".to_owned(),
            Said::To(session::Verdict::Pause) => "Verdict.pause()".to_owned(),
        }
    }
}
