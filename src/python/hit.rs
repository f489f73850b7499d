//! One hit, as a snapshot.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use pyo3::PyTraverseError;
use pyo3::gc::PyVisit;
use pyo3::prelude::*;
use pyo3::types::{PyString, PyTuple};

use super::breakpoint::Breakpoint;
use super::convert::{AccessArg, access_to_python, small};
use super::errors::stale;
use super::floor::VmiEvent;
use super::handle::Scope;
use super::registers::Registers;
use super::views::View;
use super::vm::Vm;
use crate::addr::{MemoryAccess, Va};
use crate::arch::amd64::AddressContext;
use crate::capture::MAX_ARGUMENT;
use crate::error::Result;
use crate::session;

/// What is plain data in a hit that was pickled.
#[derive(Clone, Copy)]
struct Facts {
    vcpu: u16,
    va: u64,
    pa: u64,
    access: MemoryAccess,
    view: u16,
    step: u32,
    timestamp: f64,
    hold: f64,
}

/// How many arguments a hit keeps, wherever they are passed.
const ARGUMENTS: u8 = 6;
/// Those of them that are on the stack, by the convention that has the most there.
const ON_STACK: usize = 2;

/// Those of the kept arguments that are on the stack, read while the vCPU stood still, or why they could not be; `None`: none is.
pub type StackArguments = Option<Box<Result<[u64; ON_STACK]>>>;

/// Reads them, if the convention has any.
pub fn stack_arguments(py: Python<'_>, breakpoint: &Breakpoint, hit: &session::Hit) -> StackArguments {
    let first = breakpoint.abi().argument(ARGUMENTS - ON_STACK as u8).err()?;
    let context = AddressContext::from(&hit.registers);
    let at = Va(hit.registers.gp.rsp.wrapping_add(first));
    let read = breakpoint.shared().quick(py, |inner| {
        let mut bytes = [0; 8 * ON_STACK];
        inner.session.vmi().read(at, context, &mut bytes)?;
        let mut words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        Ok([(); ON_STACK].map(|()| words.next().unwrap_or_default()))
    });
    Some(Box::new(read))
}

/// A hit that was pickled.
struct Pickled {
    facts: Facts,
    /// None if they could not be read.
    args: Option<[u64; ARGUMENTS as usize]>,
    registers: Py<Registers>,
    symbol: Option<Py<PyString>>,
    key: Py<PyAny>,
    tag: Py<PyAny>,
}

/// A hit of a session that is still there. Everything is as the session gave it: what nobody asks for costs nothing.
struct Live {
    hit: Arc<session::Hit>,
    met: Instant,
    breakpoint: Py<Breakpoint>,
    /// While the session's is the same, the handler of this hit is running.
    generation: u64,
    stack: StackArguments,
}

impl Live {
    /// The first arguments, wherever they are passed.
    fn arguments(&self) -> Result<[u64; ARGUMENTS as usize]> {
        let abi = self.breakpoint.get().abi();
        let mut stack = match self.stack.as_deref() {
            None => [].iter(),
            Some(Ok(words)) => words.iter(),
            Some(Err(error)) => return Err(error.clone()),
        };
        let mut arguments = [0; ARGUMENTS as usize];
        for (index, argument) in (0..).zip(&mut arguments) {
            *argument = match abi.argument(index) {
                Ok(register) => register.of(&self.hit.registers),
                Err(_) => stack.next().copied().unwrap_or_default(),
            };
        }
        Ok(arguments)
    }

    /// Whether the handler of this hit is running.
    fn is_current(&self) -> bool {
        let now = self.breakpoint.get().shared().generation.load(Ordering::Acquire);
        self.generation != 0 && now == self.generation
    }
}

enum Origin {
    Live(Live),
    Pickled(Box<Pickled>),
}

/// One hit: a snapshot taken while the vCPU stood still. Safe to keep, to hand to another thread, and to pickle.
#[pyclass(frozen, module = "vmitap._native")]
pub struct Hit(Origin);

impl Hit {
    pub const fn new(
        hit: Arc<session::Hit>,
        met: Instant,
        breakpoint: Py<Breakpoint>,
        generation: u64,
        stack: StackArguments,
    ) -> Self {
        Self(Origin::Live(Live { hit, met, breakpoint, generation, stack }))
    }

    fn live(&self) -> PyResult<&Live> {
        match &self.0 {
            Origin::Live(live) => Ok(live),
            Origin::Pickled(_) => Err(stale("the session of an unpickled hit")),
        }
    }

    /// The arguments it keeps.
    fn arguments(&self) -> PyResult<[u64; ARGUMENTS as usize]> {
        match &self.0 {
            Origin::Live(live) => Ok(live.arguments()?),
            Origin::Pickled(pickled) => pickled.args.ok_or_else(|| stale("the stack of an unpickled hit")),
        }
    }

    fn facts(&self) -> Facts {
        match &self.0 {
            Origin::Live(Live { hit, met, breakpoint, .. }) => {
                let began = breakpoint.get().shared().began;
                Facts {
                    vcpu: hit.vcpu.0,
                    va: hit.va.0,
                    pa: hit.pa.0,
                    access: hit.access,
                    view: hit.view.0,
                    step: hit.step,
                    timestamp: hit.at.saturating_duration_since(began).as_secs_f64(),
                    hold: met.saturating_duration_since(hit.at).as_secs_f64(),
                }
            }
            Origin::Pickled(pickled) => pickled.facts,
        }
    }
}

#[pymethods]
impl Hit {
    /// Number of the vCPU.
    #[getter]
    fn vcpu(&self) -> u16 {
        self.facts().vcpu
    }

    /// Its registers; `rip` is the tapped instruction, which has not been executed.
    #[getter]
    fn regs(&self, py: Python<'_>) -> PyResult<Py<Registers>> {
        match &self.0 {
            Origin::Live(live) => Py::new(py, Registers::from(&live.hit)),
            Origin::Pickled(pickled) => Ok(pickled.registers.clone_ref(py)),
        }
    }

    /// The first six integer arguments, by the breakpoint's calling convention. Right at the entry of a function only.
    #[getter]
    fn args(&self) -> PyResult<(u64, u64, u64, u64, u64, u64)> {
        Ok(self.arguments()?.into())
    }

    /// Argument `n`, from 0, by the breakpoint's calling convention; from the seventh on valid only inside the handler.
    fn arg(&self, py: Python<'_>, n: &Bound<'_, PyAny>) -> PyResult<u64> {
        let n: u8 = small("n", n, MAX_ARGUMENT.into())?;
        if n < ARGUMENTS {
            return Ok(self.arguments()?.get(usize::from(n)).copied().unwrap_or_default());
        }
        let live = self.live()?;
        if !live.is_current() {
            return Err(stale("the stack of a hit"));
        }
        let breakpoint = live.breakpoint.get();
        let registers = &live.hit.registers;
        match breakpoint.abi().argument(n) {
            Ok(register) => Ok(register.of(registers)),
            Err(offset) => breakpoint.shared().open(py, |session| {
                session.vmi().read_u64(Va(registers.gp.rsp.wrapping_add(offset)), AddressContext::from(registers))
            }),
        }
    }

    /// The virtual address: of the breakpoint; of the first byte accessed, for a watch and for a write to a hidden page; of the instruction, for a monitor.
    #[getter]
    fn address(&self) -> u64 {
        self.facts().va
    }

    /// The physical address of the same; 0 for a monitor.
    #[getter]
    fn pa(&self) -> u64 {
        self.facts().pa
    }

    /// `address` as "symbol" or "symbol+0x10", or None.
    #[getter]
    fn symbol(&self, py: Python<'_>) -> Option<Py<PyString>> {
        match &self.0 {
            Origin::Live(live) => live.breakpoint.get().symbol_at(py, live.hit.va.0),
            Origin::Pickled(pickled) => pickled.symbol.as_ref().map(|symbol| symbol.clone_ref(py)),
        }
    }

    /// X for a breakpoint; which access it was, for a watch and for a write to a hidden page; empty for a monitor.
    #[getter]
    fn access(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        access_to_python(py, self.facts().access)
    }

    /// The event as the driver raised it: for a monitor, which register was about to be written and with what.
    #[getter]
    fn event(&self) -> PyResult<VmiEvent> {
        let Live { hit, breakpoint, .. } = self.live()?;
        // The session answers it: it is none of those that are to be answered by their number.
        Ok(VmiEvent::of(&hit.event(), u64::MAX, breakpoint.get().shared()))
    }

    /// The view the vCPU was in.
    #[getter]
    fn view(&self) -> View {
        View::from(self.facts().view)
    }

    /// The page-table root the vCPU was under.
    #[getter]
    fn root(&self) -> u64 {
        match &self.0 {
            Origin::Live(live) => live.hit.registers.root().0,
            Origin::Pickled(pickled) => pickled.registers.get().page_root(),
        }
    }

    /// The privilege level it ran at: 0 to 3.
    #[getter]
    fn ring(&self) -> u8 {
        match &self.0 {
            Origin::Live(live) => live.hit.registers.cpl(),
            Origin::Pickled(pickled) => pickled.registers.get().ring(),
        }
    }

    /// The breakpoint's key. When pickled, it must be picklable.
    #[getter]
    fn key(&self, py: Python<'_>) -> Py<PyAny> {
        match &self.0 {
            Origin::Live(live) => live.breakpoint.get().key_object(py),
            Origin::Pickled(pickled) => pickled.key.clone_ref(py),
        }
    }

    /// The breakpoint's tag. When pickled, it must be picklable.
    #[getter]
    fn tag(&self, py: Python<'_>) -> Py<PyAny> {
        match &self.0 {
            Origin::Live(live) => live.breakpoint.get().tag_object(py),
            Origin::Pickled(pickled) => pickled.tag.clone_ref(py),
        }
    }

    /// 0 for the hit itself; 1 and up for the instructions after it that `Verdict.step` asked for.
    #[getter]
    fn step(&self) -> u32 {
        self.facts().step
    }

    /// Seconds since the session began, on a clock that never goes back.
    #[getter]
    fn timestamp(&self) -> f64 {
        self.facts().timestamp
    }

    /// Seconds the vCPU had stood still when this snapshot was made.
    #[getter]
    fn hold(&self) -> f64 {
        self.facts().hold
    }

    /// The breakpoint that was hit.
    #[getter]
    fn breakpoint(&self, py: Python<'_>) -> PyResult<Py<Breakpoint>> {
        self.live().map(|live| live.breakpoint.clone_ref(py))
    }

    /// The live guest as this vCPU sees it; valid only inside the handler.
    #[getter]
    fn vm(&self) -> PyResult<Vm> {
        let live = self.live()?;
        let Live { hit, breakpoint, generation, .. } = live;
        let (shared, generation) = (breakpoint.get().shared(), *generation);
        if !live.is_current() {
            return Err(stale("hit.vm"));
        }
        let context = AddressContext::from(&hit.registers);
        Ok(Vm::scoped(shared.clone(), Scope { vcpu: hit.vcpu, context, generation }))
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let symbol = self.symbol(py).map_or_else(String::new, |symbol| format!(" {symbol}"));
        let Facts { vcpu, va, access, .. } = self.facts();
        format!("<Hit{symbol} at {va:#x} ({access}) on vCPU {vcpu}>")
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        let (py, hit) = (slf.py(), slf.get());
        let f = hit.facts();
        let facts = (f.vcpu, f.va, f.pa, access_to_python(py, f.access)?, f.view, f.step, f.timestamp, f.hold);
        let rest = (hit.regs(py)?, hit.symbol(py), hit.key(py), hit.tag(py));
        let args = match &hit.0 {
            Origin::Live(live) => live.arguments().ok(),
            Origin::Pickled(pickled) => pickled.args,
        };
        let arguments = (facts, args, rest.0, rest.1, rest.2, rest.3).into_pyobject(py)?;
        Ok((py.import("vmitap._native")?.getattr("_hit")?, arguments))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match &self.0 {
            Origin::Live(live) => visit.call(&live.breakpoint),
            Origin::Pickled(pickled) => {
                visit.call(&pickled.key)?;
                visit.call(&pickled.tag)
            }
        }
    }
}

/// Makes a hit from what `__reduce__` gave.
#[pyfunction]
pub fn _hit(
    facts: (u16, u64, u64, AccessArg, u16, u32, f64, f64),
    args: Option<[u64; ARGUMENTS as usize]>,
    registers: Py<Registers>,
    symbol: Option<Py<PyString>>,
    key: Py<PyAny>,
    tag: Py<PyAny>,
) -> Hit {
    let (vcpu, va, pa, access, view, step, timestamp, hold) = facts;
    let facts = Facts { vcpu, va, pa, access: access.0, view, step, timestamp, hold };
    Hit(Origin::Pickled(Box::new(Pickled { facts, args, registers, symbol, key, tag })))
}
