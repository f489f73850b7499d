//! A guest that stands still, whose events come from Python: for tests of handlers. `vmitap.testing` is what users see of it.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::convert::{AccessArg, OnWriteArg, changes, number, optional, small};
use super::errors::invalid;
use super::{gil, shared, vm};
use crate::addr::{PAGE_SIZE, Pa, Va, VcpuId};
use crate::arch::amd64::Registers;
use crate::capture::Abi;
use crate::driver::open::{OpenOptions, Opened, Target};
use crate::driver::still::{CallKind, Remote, Still, open_still};
use crate::error::Result;
use crate::event::{EventAction, EventReason, VmiEvent};
use crate::session::{GP_NAMES, GpChanges, Session};

/// What a guest that stands still is told to report, and what it was answered.
#[pyclass(frozen, module = "vmitap._native", name = "_Script")]
pub struct Script {
    remote: Remote,
    registers: Vec<Registers>,
    scratch: (Va, u64),
}

/// One answer: the vCPU, the action, the view it steps in, the view it goes on in, and the registers that change.
type Answer = (u16, &'static str, Option<u16>, Option<u16>, Py<PyDict>);

impl Script {
    /// The registers of a vCPU at its next event.
    fn registers(&self, vcpu: &Bound<'_, PyAny>, at: Va, regs: &Bound<'_, PyDict>) -> PyResult<(VcpuId, Registers)> {
        let vcpu = super::convert::vcpu(vcpu, self.registers.len() as u16)?;
        let missing = || invalid("vcpu", "there is no such vCPU");
        let mut registers = *self.registers.get(usize::from(vcpu.0)).ok_or_else(missing)?;
        registers.gp.rip = at.0;
        let named = regs.copy()?;
        if let Some(cr3) = named.get_item("cr3")? {
            registers.cr3 = number("cr3", &cr3)?;
            named.del_item("cr3")?;
        }
        changes(Some(&named))?.apply(&mut registers.gp);
        Ok((vcpu, registers))
    }

    fn push(&self, (vcpu, registers): (VcpuId, Registers), reason: EventReason) {
        self.remote.push_event(VmiEvent { vcpu, view: None, registers, reason });
    }
}

#[pymethods]
impl Script {
    /// An INT3 at `va`, which is at `pa`.
    fn breakpoint(&self, vcpu: &Bound<'_, PyAny>, va: u64, pa: u64, regs: &Bound<'_, PyDict>) -> PyResult<()> {
        let registers = self.registers(vcpu, Va(va), regs)?;
        self.push(registers, EventReason::Breakpoint { gfn: Pa(pa).gfn(), insn_len: 1 });
        Ok(())
    }

    /// An access to `va`, which is at `pa`, that the view denies.
    #[expect(clippy::too_many_arguments, reason = "an access has as many parts")]
    fn access(
        &self,
        vcpu: &Bound<'_, PyAny>,
        va: u64,
        pa: u64,
        access: AccessArg,
        length: &Bound<'_, PyAny>,
        rip: u64,
        regs: &Bound<'_, PyDict>,
    ) -> PyResult<()> {
        let registers = self.registers(vcpu, Va(rip), regs)?;
        let len = small("length", length, PAGE_SIZE)?;
        self.push(registers, EventReason::MemoryAccess { pa: Pa(pa), va: Some(Va(va)), access: access.0, len });
        Ok(())
    }

    /// The end of a step; the next instruction is at `va`, which is at `pa`.
    fn step(&self, vcpu: &Bound<'_, PyAny>, va: u64, pa: u64, regs: &Bound<'_, PyDict>) -> PyResult<()> {
        let registers = self.registers(vcpu, Va(va), regs)?;
        self.push(registers, EventReason::SingleStep { gfn: Some(Pa(pa).gfn()) });
        Ok(())
    }

    /// Every answer so far.
    fn answers(&self, py: Python<'_>) -> PyResult<Vec<Answer>> {
        let mut answers = Vec::new();
        for answered in self.remote.answered() {
            let (action, step) = match answered.response.action {
                EventAction::Continue => ("continue", None),
                EventAction::Reinject => ("reinject", None),
                EventAction::FastSingleStep { view } => ("step", Some(view)),
                EventAction::SingleStep { view } => ("reported-step", Some(view)),
                EventAction::Emulate => ("emulate", None),
                EventAction::Deny => ("deny", None),
            };
            let changed = PyDict::new(py);
            if let Some(gp) = answered.response.registers {
                let (before, after) = (GpChanges::of(&answered.event.registers.gp), GpChanges::of(&gp));
                let pairs = GP_NAMES.iter().zip(before.values.iter().zip(after.values));
                for (name, (_, value)) in pairs.filter(|(_, (before, after))| **before != *after) {
                    changed.set_item(*name, value)?;
                }
            }
            let view = answered.response.view.map(|view| view.0);
            answers.push((answered.event.vcpu.0, action, step.map(|view| view.0), view, changed.unbind()));
        }
        Ok(answers)
    }

    /// Events that were not raised yet.
    #[getter]
    fn waiting(&self) -> usize {
        self.remote.waiting()
    }

    /// Makes the `n`-th call of the driver from now on fail; 0: none.
    fn fail_nth(&self, n: usize, errno: i32) {
        self.remote.fail_nth(n, errno);
    }

    /// The name of the call that failed since.
    #[getter]
    fn failed_call(&self) -> Option<&'static str> {
        self.remote.failed().map(CallKind::op)
    }

    /// Where unused memory begins, and how many bytes there are.
    #[getter]
    fn scratch(&self) -> (u64, u64) {
        (self.scratch.0.0, self.scratch.1)
    }
}

/// Opens a session with a guest that stands still. For `vmitap.testing`.
#[pyfunction]
#[pyo3(signature = (target, *, memory, vcpus, on_write))]
pub fn _still(
    py: Python<'_>,
    target: &str,
    memory: Option<&Bound<'_, PyAny>>,
    vcpus: &Bound<'_, PyAny>,
    on_write: Option<OnWriteArg>,
) -> PyResult<(vm::Vm, Script)> {
    let options = OpenOptions {
        memory: optional("memory", memory)?,
        vcpus: Some(small("vcpus", vcpus, u16::MAX.into())?),
        ..OpenOptions::default()
    };
    let on_write = on_write.map(|policy| policy.0).unwrap_or_default();
    let opened: Result<_> = gil::detached(py, || {
        let Still { opened: Opened { driver, symbols }, remote, registers, scratch } =
            open_still(&Target::parse(target)?, &options)?;
        let version = driver.version();
        Ok((Session::new(driver, on_write)?, symbols, version, Script { remote, registers, scratch }))
    });
    let (session, symbols, version, script) = opened?;
    Ok((vm::Vm::new(Arc::new(shared::Shared::new(py, session, symbols, version, (on_write, Abi::default())))), script))
}
