//! One hit, as a snapshot.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::time::Instant;

use pyo3::PyTraverseError;
use pyo3::gc::PyVisit;
use pyo3::prelude::*;
use pyo3::types::{PyString, PyTuple};

use super::breakpoint::Breakpoint;
use super::convert::{AccessArg, access_to_python, small};
use super::errors::stale;
use super::events::seconds;
use super::floor::VmiEvent;
use super::handle::Scope;
use super::registers::Registers;
use super::views::View;
use super::vm::Vm;
use crate::addr::{MemoryAccess, Pa, Va, VcpuId};
use crate::arch::amd64::AddressContext;
use crate::capture::MAX_ARGUMENT;
use crate::error::Result;
use crate::event::{self, EventReason};
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

/// A hit of a session that is still there. What differs between two hits of a breakpoint can be written over: see [`Hit::renew`].
struct Live {
    registers: Py<Registers>,
    va: AtomicU64,
    pa: AtomicU64,
    vcpu: AtomicU16,
    view: AtomicU16,
    /// When the event was received, and when the hit was met here, in nanoseconds of the session.
    at_ns: AtomicU64,
    met_ns: AtomicU64,
    /// While the session's is the same, the handler of this hit is running.
    generation: AtomicU64,
    access: MemoryAccess,
    step: u32,
    reason: EventReason,
    breakpoint: Py<Breakpoint>,
    stack: StackArguments,
}

/// Whether somebody else has an object that is ours: with the interpreter held, nobody can get at it who has not.
#[expect(deprecated, reason = "what is to be used instead says the same, and is for FFI modules")]
fn is_kept<T>(object: &Bound<'_, T>) -> bool {
    object.as_any().get_refcnt() != 1
}

/// Whether a hit differs from another one of its breakpoint in no more than a [`Live`] can have written over.
const fn is_plain(reason: &EventReason, step: u32) -> bool {
    matches!(reason, EventReason::Breakpoint { insn_len: 1, .. }) && step == 0
}

impl Live {
    fn set(&self, hit: &session::Hit, met: Instant, generation: u64) {
        let began = self.breakpoint.get().shared().began;
        let ns = |then: Instant| then.saturating_duration_since(began).as_nanos() as u64;
        let at_ns = ns(hit.at);
        let met_ns = if met == hit.at { at_ns } else { ns(met) };
        self.registers.get().set(&hit.registers);
        for (word, value) in [
            (&self.va, hit.va.0),
            (&self.pa, hit.pa.0),
            (&self.at_ns, at_ns),
            (&self.met_ns, met_ns),
            (&self.generation, generation),
        ] {
            word.store(value, Ordering::Relaxed);
        }
        self.vcpu.store(hit.vcpu.0, Ordering::Relaxed);
        self.view.store(hit.view.0, Ordering::Relaxed);
    }

    fn va(&self) -> Va {
        Va(self.va.load(Ordering::Relaxed))
    }

    fn vcpu(&self) -> VcpuId {
        VcpuId(self.vcpu.load(Ordering::Relaxed))
    }

    fn view(&self) -> crate::addr::View {
        crate::addr::View(self.view.load(Ordering::Relaxed))
    }

    /// The event as the driver raised it.
    fn event(&self) -> event::VmiEvent {
        let reason = match self.reason {
            EventReason::Breakpoint { insn_len, .. } => {
                EventReason::Breakpoint { gfn: Pa(self.pa.load(Ordering::Relaxed)).gfn(), insn_len }
            }
            other => other,
        };
        event::VmiEvent { vcpu: self.vcpu(), view: Some(self.view()), registers: self.registers.get().all(), reason }
    }

    /// The first arguments, wherever they are passed.
    fn arguments(&self) -> Result<[u64; ARGUMENTS as usize]> {
        let abi = self.breakpoint.get().abi();
        let mut stack = match self.stack.as_deref() {
            None => [].iter(),
            Some(Ok(words)) => words.iter(),
            Some(Err(error)) => return Err(error.clone()),
        };
        let registers = self.registers.get().all();
        let mut arguments = [0; ARGUMENTS as usize];
        for (index, argument) in (0..).zip(&mut arguments) {
            *argument = match abi.argument(index) {
                Ok(register) => register.of(&registers),
                Err(_) => stack.next().copied().unwrap_or_default(),
            };
        }
        Ok(arguments)
    }

    /// Whether the handler of this hit is running.
    fn is_current(&self) -> bool {
        let now = self.breakpoint.get().shared().generation.load(Ordering::Acquire);
        let generation = self.generation.load(Ordering::Relaxed);
        generation != 0 && now == generation
    }
}

enum Origin {
    Live(Live),
    Pickled(Box<Pickled>),
}

/// One hit: a snapshot taken while the vCPU stood still. Safe to keep, to hand to another thread, and to pickle.
///
/// As with what `zip` yields, one that nobody has kept may be the same object as the next: two hits are not told apart by `id`.
#[pyclass(frozen, module = "vmitap._native")]
pub struct Hit(Origin);

impl Hit {
    pub fn new(
        py: Python<'_>,
        hit: &session::Hit,
        met: Instant,
        breakpoint: &Py<Breakpoint>,
        generation: u64,
        stack: StackArguments,
    ) -> PyResult<Py<Self>> {
        let live = Live {
            registers: Py::new(py, Registers::default())?,
            va: AtomicU64::default(),
            pa: AtomicU64::default(),
            vcpu: AtomicU16::default(),
            view: AtomicU16::default(),
            at_ns: AtomicU64::default(),
            met_ns: AtomicU64::default(),
            generation: AtomicU64::default(),
            access: hit.access,
            step: hit.step,
            reason: hit.reason,
            breakpoint: breakpoint.clone_ref(py),
            stack,
        };
        live.set(hit, met, generation);
        Py::new(py, Self(Origin::Live(live)))
    }

    /// Makes `object` the snapshot of another hit of that breakpoint, if it can be and nobody has kept anything of it: two new objects a hit
    /// would take as long as calling the handler.
    pub fn renew(
        object: &Bound<'_, Self>,
        hit: &session::Hit,
        met: Instant,
        breakpoint: &Py<Breakpoint>,
        generation: u64,
    ) -> bool {
        let Origin::Live(live) = &object.get().0 else { return false };
        let fits = live.breakpoint.is(breakpoint) && live.stack.is_none();
        let plain = is_plain(&live.reason, live.step) && is_plain(&hit.reason, hit.step);
        if !fits || !plain || is_kept(object) || is_kept(live.registers.bind(object.py())) {
            return false;
        }
        live.set(hit, met, generation);
        true
    }

    const fn registers(&self) -> &Py<Registers> {
        match &self.0 {
            Origin::Live(live) => &live.registers,
            Origin::Pickled(pickled) => &pickled.registers,
        }
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
            Origin::Live(live) => {
                let (at_ns, met_ns) = (live.at_ns.load(Ordering::Relaxed), live.met_ns.load(Ordering::Relaxed));
                Facts {
                    vcpu: live.vcpu().0,
                    va: live.va().0,
                    pa: live.pa.load(Ordering::Relaxed),
                    access: live.access,
                    view: live.view().0,
                    step: live.step,
                    timestamp: seconds(at_ns),
                    hold: seconds(met_ns.saturating_sub(at_ns)),
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
    fn regs(&self, py: Python<'_>) -> Py<Registers> {
        self.registers().clone_ref(py)
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
        let registers = live.registers.get().all();
        match breakpoint.abi().argument(n) {
            Ok(register) => Ok(register.of(&registers)),
            Err(offset) => breakpoint.shared().open(py, |session| {
                session.vmi().read_u64(Va(registers.gp.rsp.wrapping_add(offset)), AddressContext::from(&registers))
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
            Origin::Live(live) => live.breakpoint.get().symbol_at(py, live.va().0),
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
        let live = self.live()?;
        // The session answers it: it is none of those that are to be answered by their number.
        Ok(VmiEvent::of(&live.event(), u64::MAX, live.breakpoint.get().shared()))
    }

    /// The view the vCPU was in.
    #[getter]
    fn view(&self) -> View {
        View::from(self.facts().view)
    }

    /// The page-table root the vCPU was under.
    #[getter]
    fn root(&self) -> u64 {
        self.registers().get().page_root()
    }

    /// The privilege level it ran at: 0 to 3.
    #[getter]
    fn ring(&self) -> u8 {
        self.registers().get().ring()
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
        let (shared, generation) = (live.breakpoint.get().shared(), live.generation.load(Ordering::Relaxed));
        if !live.is_current() {
            return Err(stale("hit.vm"));
        }
        let context = AddressContext::from(&live.registers.get().all());
        Ok(Vm::scoped(shared.clone(), Scope { vcpu: live.vcpu(), context, generation }))
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
        let rest = (hit.regs(py), hit.symbol(py), hit.key(py), hit.tag(py));
        let args = match &hit.0 {
            Origin::Live(live) => live.arguments().ok(),
            Origin::Pickled(pickled) => pickled.args,
        };
        let arguments = (facts, args, rest.0, rest.1, rest.2, rest.3).into_pyobject(py)?;
        Ok((py.import("vmitap._native")?.getattr("_hit")?, arguments))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(self.registers())?;
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
