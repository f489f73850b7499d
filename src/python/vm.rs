//! A session, as Python holds it.

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pyo3::PyTraverseError;
use pyo3::exceptions::PyTypeError;
use pyo3::gc::PyVisit;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString};

use super::breakpoint::{Breakpoint, Breakpoints};
use super::convert::{self, AccessArg};
use super::errors::invalid;
use super::events::{Events, Moments, RunResult, Stats};
use super::expression;
use super::flight::EventJournal;
use super::floor::{VmiEvent, VmiEventResponse, raw};
use super::handle::{Handle, RUNNING, Scope, WRITING};
use super::hook::{Course, Reason, drive};
use super::memory::{self, Memory};
use super::pause::Pause;
use super::plant::{self, Kind};
use super::recording::{Recording, RecordingFile};
use super::registers::Registers;
use super::shared::Shared;
use super::symbols::Symbols;
use super::views::{Caps, View, Views, VmInfo};
use crate::addr::{Pa, Va, VcpuId};
use crate::arch::amd64::{Injection, InjectionKind};
use crate::capture::Abi;
use crate::error::VmiError;
use crate::session::EventSet;

/// A session with one guest: memory, registers, breakpoints and the event loop.
///
/// The session ends with the one that was opened; a `hit.vm` ends nothing.
#[pyclass(frozen, module = "vmitap._native")]
pub struct Vm(Handle);

impl std::ops::Deref for Vm {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        &self.0
    }
}

impl Vm {
    pub const fn new(shared: Arc<Shared>) -> Self {
        Self(Handle { shared, scope: None })
    }

    pub const fn scoped(shared: Arc<Shared>, scope: Scope) -> Self {
        Self(Handle { shared, scope: Some(scope) })
    }

    /// The vCPU meant.
    fn vcpu(&self, vcpu: Option<&Bound<'_, PyAny>>) -> PyResult<VcpuId> {
        match vcpu {
            Some(number) => convert::vcpu(number, self.shared.info.vcpus),
            None => Ok(self.scope.map_or(VcpuId(0), |scope| scope.vcpu)),
        }
    }

    /// How arguments are passed.
    fn abi(&self, abi: Option<&str>) -> PyResult<Abi> {
        abi.map_or(Ok(self.open()?.abi), expression::abi)
    }

    fn address(&self, address: &Bound<'_, PyAny>) -> PyResult<Va> {
        convert::address("address", address, &self.open()?.symbols)
    }

    fn read_number<const N: usize>(
        &self,
        py: Python<'_>,
        address: &Bound<'_, PyAny>,
        root: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<[u8; N]> {
        let (va, root) = (self.address(address)?, convert::optional("root", root)?);
        self.shared.open(py, |session| {
            let mut bytes = [0; N];
            session.vmi().read(va, self.context(session, root)?, &mut bytes)?;
            Ok(bytes)
        })
    }

    fn write_number<T: TryFrom<u64>, const N: usize>(
        &self,
        address: &Bound<'_, PyAny>,
        (value, max): (&Bound<'_, PyAny>, u64),
        root: Option<&Bound<'_, PyAny>>,
        bytes: impl FnOnce(T) -> [u8; N],
    ) -> PyResult<()> {
        self.open_for(WRITING)?;
        let bytes = bytes(convert::small("value", value, max)?);
        self.write_bytes(value.py(), address, &bytes, root)
    }

    fn write_bytes(
        &self,
        py: Python<'_>,
        address: &Bound<'_, PyAny>,
        bytes: &[u8],
        root: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let (va, root) = (self.address(address)?, convert::optional("root", root)?);
        self.shared.open(py, |session| {
            let context = self.context(session, root)?;
            session.write(va, context, bytes)
        })
    }
}

#[pymethods]
impl Vm {
    /// Facts about the guest that do not change.
    #[getter]
    fn info(&self) -> PyResult<VmInfo> {
        Ok(VmInfo::new(self.current()?))
    }

    /// The driver's name: "emu", "xen" or "dump".
    #[getter]
    fn driver(&self) -> PyResult<&'static str> {
        Ok(self.current()?.info.driver)
    }

    /// What the driver can do with this guest, found by probing.
    #[getter]
    fn caps(&self) -> PyResult<Caps> {
        Ok(Caps::from(self.current()?.caps))
    }

    /// How many vCPUs the guest has; they are numbered from 0.
    #[getter]
    fn vcpus(&self) -> PyResult<u16> {
        Ok(self.current()?.info.vcpus)
    }

    /// Counters of the whole session so far, as a snapshot.
    #[getter]
    fn stats(&self, py: Python<'_>) -> PyResult<Stats> {
        let shared = self.current()?;
        let (counters, frames) = shared.quick(py, |inner| (inner.session.stats(), inner.session.shadow_frames()));
        Ok(Stats::new(shared, &counters, frames))
    }

    /// Every breakpoint and watch of the session that is not removed.
    #[getter]
    fn breakpoints(&self) -> PyResult<Breakpoints> {
        Ok(Breakpoints(self.current()?.clone()))
    }

    /// The guest's views: alternative maps of its physical memory.
    #[getter]
    fn views(&self) -> PyResult<Views> {
        Ok(Views(self.current()?.clone()))
    }

    /// What was captured, in columns.
    #[getter]
    fn recording(&self) -> PyResult<Recording> {
        Ok(Recording(self.current()?.clone()))
    }

    /// Writes what is captured to a file while the guest runs, in bounded memory.
    #[pyo3(signature = (path, *, format=None, batch=65_536))]
    fn record_to(&self, py: Python<'_>, path: PathBuf, format: Option<&str>, batch: usize) -> PyResult<RecordingFile> {
        RecordingFile::open(py, self.open()?, path, format, batch)
    }

    /// The last events of the session, in a file that outlives this process. None is written until `EventJournal.open`.
    #[getter]
    fn journal(&self) -> PyResult<EventJournal> {
        Ok(EventJournal(self.current()?.clone()))
    }

    /// Guest-physical memory as a whole, and scattered reads.
    #[getter]
    fn memory(&self) -> PyResult<Memory> {
        self.current()?;
        Ok(Memory(self.0.clone()))
    }

    /// The symbols of the guest's image.
    #[getter]
    fn symbols(&self) -> PyResult<Symbols> {
        Ok(Symbols(self.current()?.clone()))
    }

    /// What the guest has written to its debug console so far; bytes that are not UTF-8 are replaced.
    #[getter]
    fn console(&self, py: Python<'_>) -> PyResult<String> {
        let shared = self.current()?;
        let bytes = shared.quick(py, |inner| inner.session.vmi().driver().console());
        let missing = VmiError::NotSupported { driver: shared.info.driver, capability: "a console" };
        Ok(String::from_utf8_lossy(&bytes.ok_or(missing)?).into_owned())
    }

    /// Whether the session is over; every method but `detach` and `stop` then raises `StaleContextError`.
    #[getter]
    fn closed(&self) -> PyResult<bool> {
        Ok(self.current()?.is_closed())
    }

    fn __enter__(slf: Py<Self>) -> PyResult<Py<Self>> {
        slf.get().open()?;
        Ok(slf)
    }

    #[pyo3(signature = (exc_type, exc_value, traceback, /))]
    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: &Bound<'_, PyAny>,
        exc_value: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let _ = (exc_type, exc_value, traceback);
        self.detach(py)
    }

    /// Puts a hidden breakpoint into the guest; without a handler it is also a decorator that sets one.
    #[pyo3(signature = (target, handler=None, *, root=None, view=None, r#where=None, capture=None, on_return=None, abi=None, on_write=None, ask=None, key=None, tag=None, deadline=None, budget=None, enabled=true, once=false))]
    #[expect(clippy::too_many_arguments, reason = "the signature Python sees")]
    fn breakpoint(
        &self,
        py: Python<'_>,
        target: &Bound<'_, PyAny>,
        handler: Option<Py<PyAny>>,
        root: Option<&Bound<'_, PyAny>>,
        view: Option<&Bound<'_, View>>,
        r#where: Option<&Bound<'_, PyAny>>,
        capture: Option<&Bound<'_, PyAny>>,
        on_return: Option<&Bound<'_, PyAny>>,
        abi: Option<&str>,
        on_write: Option<&Bound<'_, PyAny>>,
        ask: Option<Py<PyAny>>,
        key: Option<&Bound<'_, PyAny>>,
        tag: Option<Py<PyAny>>,
        deadline: Option<f64>,
        budget: Option<&Bound<'_, PyAny>>,
        enabled: bool,
        once: bool,
    ) -> PyResult<Py<Breakpoint>> {
        let shared = self.open_for("breakpoints")?;
        let abi = self.abi(abi)?;
        let policy = expression::write_policy(on_write, abi)?;
        if on_write.is_some() && policy.asks(shared.on_write) && ask.is_none() {
            return Err(invalid("ask", "OnWrite.ASK needs a function to ask"));
        }
        if ask.is_some() && !policy.asks(shared.on_write) {
            return Err(invalid("ask", "it goes with OnWrite.ASK only"));
        }
        let captured = expression::captured(py, capture, on_return, abi)?;
        let given = plant::given(py, handler, ask, key, tag, (deadline, root), (r#where, captured, abi), budget)?;
        let va = convert::address("target", target, &shared.symbols)?;
        let kind = Kind::Breakpoint { view: view.map(|view| view.get().id()), on_write: policy.otherwise, enabled, once };
        plant::plant(py, self, &[va], &given, kind, &policy.rules)?.pop().ok_or_else(|| invalid("target", "none was given"))
    }

    /// Puts many breakpoints into the guest at once: all of them, or on an error none.
    #[pyo3(signature = (targets, handler=None, *, root=None, view=None, r#where=None, capture=None, on_return=None, abi=None, on_write=None, key=None, tag=None, deadline=None, budget=None, once=false))]
    #[expect(clippy::too_many_arguments, reason = "the signature Python sees")]
    fn insert_many(
        &self,
        py: Python<'_>,
        targets: &Bound<'_, PyAny>,
        handler: Option<Py<PyAny>>,
        root: Option<&Bound<'_, PyAny>>,
        view: Option<&Bound<'_, View>>,
        r#where: Option<&Bound<'_, PyAny>>,
        capture: Option<&Bound<'_, PyAny>>,
        on_return: Option<&Bound<'_, PyAny>>,
        abi: Option<&str>,
        on_write: Option<&Bound<'_, PyAny>>,
        key: Option<&Bound<'_, PyAny>>,
        tag: Option<Py<PyAny>>,
        deadline: Option<f64>,
        budget: Option<&Bound<'_, PyAny>>,
        once: bool,
    ) -> PyResult<Vec<Py<Breakpoint>>> {
        let shared = self.open_for("breakpoints")?;
        if targets.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("targets is an iterable of symbols and addresses, not a string"));
        }
        let abi = self.abi(abi)?;
        let policy = expression::write_policy(on_write, abi)?;
        if on_write.is_some() && policy.asks(shared.on_write) {
            return Err(invalid("on_write", "OnWrite.ASK needs a function to ask: use breakpoint()"));
        }
        let captured = expression::captured(py, capture, on_return, abi)?;
        let given = plant::given(py, handler, None, key, tag, (deadline, root), (r#where, captured, abi), budget)?;
        let resolve = |target: PyResult<Bound<'_, PyAny>>| convert::address("targets", &target?, &shared.symbols);
        let vas = targets.try_iter()?.map(resolve).collect::<PyResult<Vec<Va>>>()?;
        let kind = Kind::Breakpoint { view: view.map(|view| view.get().id()), on_write: policy.otherwise, enabled: true, once };
        plant::plant(py, self, &vas, &given, kind, &policy.rules)
    }

    /// Reports accesses to a range of virtual addresses; without a handler it is also a decorator that sets one.
    #[pyo3(signature = (address, length, access, handler=None, *, root=None, r#where=None, capture=None, abi=None, key=None, tag=None, deadline=None, budget=None))]
    #[expect(clippy::too_many_arguments, reason = "the signature Python sees")]
    fn watch(
        &self,
        py: Python<'_>,
        address: &Bound<'_, PyAny>,
        length: &Bound<'_, PyAny>,
        access: AccessArg,
        handler: Option<Py<PyAny>>,
        root: Option<&Bound<'_, PyAny>>,
        r#where: Option<&Bound<'_, PyAny>>,
        capture: Option<&Bound<'_, PyAny>>,
        abi: Option<&str>,
        key: Option<&Bound<'_, PyAny>>,
        tag: Option<Py<PyAny>>,
        deadline: Option<f64>,
        budget: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Py<Breakpoint>> {
        self.open_for("watches")?;
        let va = self.address(address)?;
        let kind = Kind::Watch { len: convert::number("length", length)?, access: access.0 };
        let abi = self.abi(abi)?;
        let captured = expression::captured(py, capture, None, abi)?;
        let given = plant::given(py, handler, None, key, tag, (deadline, root), (r#where, captured, abi), budget)?;
        plant::plant(py, self, &[va], &given, kind, &[])?.pop().ok_or_else(|| invalid("address", "none was given"))
    }

    /// Reports what vCPUs announce, wherever they are; without a handler it is also a decorator that sets one.
    #[pyo3(signature = (handler=None, *, cr=None, msr=None, debug=false, cpuid=false, descriptors=false, ports=false, requests=false, r#where=None, capture=None, abi=None, key=None, tag=None, deadline=None, budget=None))]
    #[expect(clippy::too_many_arguments, clippy::fn_params_excessive_bools, reason = "the signature Python sees")]
    fn monitor_events(
        &self,
        py: Python<'_>,
        handler: Option<Py<PyAny>>,
        cr: Option<&Bound<'_, PyAny>>,
        msr: Option<&Bound<'_, PyAny>>,
        debug: bool,
        cpuid: bool,
        descriptors: bool,
        ports: bool,
        requests: bool,
        r#where: Option<&Bound<'_, PyAny>>,
        capture: Option<&Bound<'_, PyAny>>,
        abi: Option<&str>,
        key: Option<&Bound<'_, PyAny>>,
        tag: Option<Py<PyAny>>,
        deadline: Option<f64>,
        budget: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Py<Breakpoint>> {
        self.open_for("events")?;
        let kind = Kind::Monitor(plant::event_set(
            cr,
            msr,
            EventSet { debug, cpuid, descriptors, ports, requests, ..EventSet::default() },
        )?);
        let abi = self.abi(abi)?;
        let captured = expression::captured(py, capture, None, abi)?;
        let given = plant::given(py, handler, None, key, tag, (deadline, None), (r#where, captured, abi), budget)?;
        plant::plant(py, self, &[Va(0)], &given, kind, &[])?.pop().ok_or_else(|| invalid("events", "none was given"))
    }

    /// Lets the guest run and calls handlers, until something ends it.
    #[pyo3(signature = (timeout=None, max_hits=None))]
    fn run(&self, py: Python<'_>, timeout: Option<f64>, max_hits: Option<&Bound<'_, PyAny>>) -> PyResult<RunResult> {
        let shared = self.open_for(RUNNING)?;
        let (timeout, hits) = (convert::seconds("timeout", timeout)?, convert::optional("max_hits", max_hits)?);
        let mut course = Course::begin(py, shared, timeout, hits);
        let reason = drive(py, shared, &mut course, None, None)?.unwrap_or(Reason::Timeout);
        Ok(RunResult::new(py, shared, &course, reason))
    }

    /// For `vmitap.aio`: a run that is made in moments, by whoever waits for `fileno` meanwhile.
    #[pyo3(signature = (timeout=None, max_hits=None))]
    fn _moments(&self, py: Python<'_>, timeout: Option<f64>, max_hits: Option<&Bound<'_, PyAny>>) -> PyResult<Moments> {
        let shared = self.open_for(RUNNING)?;
        let (timeout, hits) = (convert::seconds("timeout", timeout)?, convert::optional("max_hits", max_hits)?);
        Ok(Moments::new(py, shared, timeout, hits))
    }

    /// A file descriptor that is readable when the guest has an event to be looked at; None: it runs only inside `run` and the like.
    fn fileno(&self, py: Python<'_>) -> PyResult<Option<i32>> {
        let shared = self.open()?;
        if let Some(known) = shared.readiness.get() {
            return Ok(known.as_ref().map(AsRawFd::as_raw_fd));
        }
        let made = shared.open(py, |session| session.vmi().driver().readiness())?;
        Ok(shared.readiness.get_or_init(|| made).as_ref().map(AsRawFd::as_raw_fd))
    }

    /// Iterates over hits; the vCPU is not held while your code works on one.
    #[expect(clippy::needless_pass_by_value, reason = "arguments from Python are owned")]
    #[pyo3(signature = (*breakpoints, timeout=None, queue=10_000))]
    fn events(slf: Py<Self>, breakpoints: Vec<Py<Breakpoint>>, timeout: Option<f64>, queue: usize) -> PyResult<Events> {
        let shared = slf.get().open_for(RUNNING)?.clone();
        Events::new(slf, &shared, &breakpoints, convert::seconds("timeout", timeout)?, queue)
    }

    /// Holds every vCPU inside a `with` block. Counted: blocks can be nested, the outermost lets the guest go on.
    fn pause(slf: Py<Self>) -> PyResult<Pause> {
        slf.get().open_for("pausing")?;
        Ok(Pause(slf))
    }

    /// Makes the `run` or `events` under way return soon with reason "stopped"; without one, the next. Usable from any thread.
    fn stop(&self) -> PyResult<()> {
        let shared = self.current()?;
        shared.stop.store(true, Ordering::Release);
        shared.waker.wake();
        Ok(())
    }

    /// Restores the guest and ends the session: breakpoints, watches and views go, vCPUs return to the default view.
    fn detach(&self, py: Python<'_>) -> PyResult<()> {
        self.current()?.detach(py)
    }

    /// A snapshot of a vCPU's registers.
    #[pyo3(signature = (vcpu=None))]
    fn registers(&self, py: Python<'_>, vcpu: Option<&Bound<'_, PyAny>>) -> PyResult<Registers> {
        let shared = self.open()?;
        // Where no vCPU has registers, the driver says why.
        let vcpu = if shared.caps.registers { self.vcpu(vcpu)? } else { VcpuId(0) };
        let registers = shared.open(py, |session| session.registers(vcpu))?;
        Ok(Registers::from(&registers))
    }

    /// Writes registers of a vCPU; those not named keep their value.
    #[pyo3(signature = (vcpu=None, /, **registers))]
    fn set_registers(
        &self,
        py: Python<'_>,
        vcpu: Option<&Bound<'_, PyAny>>,
        registers: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<()> {
        let (shared, vcpu) = (self.open_for("writing registers")?, self.vcpu(vcpu)?);
        let changes = convert::changes(registers)?;
        shared.open(py, |session| session.set_registers(vcpu, &changes))
    }

    /// Reads virtual memory, across any number of pages: all of it or nothing. Breakpoints never show in it.
    #[pyo3(signature = (address, length, *, root=None))]
    fn read<'py>(
        &self,
        py: Python<'py>,
        address: &Bound<'_, PyAny>,
        length: &Bound<'_, PyAny>,
        root: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let (va, root) = (self.address(address)?, convert::optional("root", root)?);
        memory::read(
            py,
            self.open()?,
            convert::length("length", length)?,
            |session| Ok((va, self.context(session, root)?).into()),
        )
    }

    /// Reads physical memory: all of it or nothing.
    fn read_pa<'py>(&self, py: Python<'py>, pa: &Bound<'_, PyAny>, length: &Bound<'_, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let pa = Pa(convert::number("pa", pa)?);
        memory::read(py, self.open()?, convert::length("length", length)?, |_| Ok(pa.into()))
    }

    /// Reads one byte of virtual memory; raises as `read`.
    #[pyo3(signature = (address, *, root=None))]
    fn read_u8(&self, py: Python<'_>, address: &Bound<'_, PyAny>, root: Option<&Bound<'_, PyAny>>) -> PyResult<u8> {
        self.read_number(py, address, root).map(u8::from_le_bytes)
    }

    /// Reads two bytes of virtual memory as a little-endian number; raises as `read`.
    #[pyo3(signature = (address, *, root=None))]
    fn read_u16(&self, py: Python<'_>, address: &Bound<'_, PyAny>, root: Option<&Bound<'_, PyAny>>) -> PyResult<u16> {
        self.read_number(py, address, root).map(u16::from_le_bytes)
    }

    /// Reads four bytes of virtual memory as a little-endian number; raises as `read`.
    #[pyo3(signature = (address, *, root=None))]
    fn read_u32(&self, py: Python<'_>, address: &Bound<'_, PyAny>, root: Option<&Bound<'_, PyAny>>) -> PyResult<u32> {
        self.read_number(py, address, root).map(u32::from_le_bytes)
    }

    /// Reads eight bytes of virtual memory as a little-endian number; raises as `read`.
    #[pyo3(signature = (address, *, root=None))]
    fn read_u64(&self, py: Python<'_>, address: &Bound<'_, PyAny>, root: Option<&Bound<'_, PyAny>>) -> PyResult<u64> {
        self.read_number(py, address, root).map(u64::from_le_bytes)
    }

    /// Reads a string that ends in a zero byte, as UTF-8; bytes that are not UTF-8 become backslash escapes.
    #[pyo3(signature = (address, limit=4096, *, root=None))]
    fn read_cstr<'py>(
        &self,
        py: Python<'py>,
        address: &Bound<'_, PyAny>,
        limit: usize,
        root: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (va, root) = (self.address(address)?, convert::optional("root", root)?);
        let bytes = self.shared.open(py, |session| session.vmi().read_cstr(va, self.context(session, root)?, limit))?;
        match std::str::from_utf8(&bytes) {
            Ok(text) => Ok(PyString::new(py, text).into_any()),
            Err(_) => PyBytes::new(py, &bytes).call_method1("decode", ("utf-8", "backslashreplace")),
        }
    }

    /// Reads a little-endian UTF-16 string that ends in a zero unit; lone surrogates become U+FFFD.
    #[pyo3(signature = (address, limit=4096, *, root=None))]
    fn read_utf16(
        &self,
        py: Python<'_>,
        address: &Bound<'_, PyAny>,
        limit: usize,
        root: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<String> {
        let (va, root) = (self.address(address)?, convert::optional("root", root)?);
        let bytes = self.shared.open(py, |session| session.vmi().read_utf16(va, self.context(session, root)?, limit))?;
        Ok(bytes.to_utf16_lossy())
    }

    /// Writes virtual memory: all of it, or on an error nothing. Code the guest has run from there is forgotten.
    #[pyo3(signature = (address, data, *, root=None))]
    fn write(
        &self,
        py: Python<'_>,
        address: &Bound<'_, PyAny>,
        data: &Bound<'_, PyAny>,
        root: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        self.open_for(WRITING)?;
        self.write_bytes(py, address, &convert::buffer(data)?, root)
    }

    /// Writes physical memory: all of it, or on an error nothing. See `write`.
    fn write_pa(&self, py: Python<'_>, pa: &Bound<'_, PyAny>, data: &Bound<'_, PyAny>) -> PyResult<()> {
        memory::write_pa(py, self.open_for(WRITING)?, pa, data)
    }

    /// Writes one byte of virtual memory; see `write`.
    #[pyo3(signature = (address, value, *, root=None))]
    fn write_u8(&self, address: &Bound<'_, PyAny>, value: &Bound<'_, PyAny>, root: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        self.write_number(address, (value, u8::MAX.into()), root, u8::to_le_bytes)
    }

    /// Writes a little-endian 16-bit number to virtual memory; see `write`.
    #[pyo3(signature = (address, value, *, root=None))]
    fn write_u16(&self, address: &Bound<'_, PyAny>, value: &Bound<'_, PyAny>, root: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        self.write_number(address, (value, u16::MAX.into()), root, u16::to_le_bytes)
    }

    /// Writes a little-endian 32-bit number to virtual memory; see `write`.
    #[pyo3(signature = (address, value, *, root=None))]
    fn write_u32(&self, address: &Bound<'_, PyAny>, value: &Bound<'_, PyAny>, root: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        self.write_number(address, (value, u32::MAX.into()), root, u32::to_le_bytes)
    }

    /// Writes a little-endian 64-bit number to virtual memory; see `write`.
    #[pyo3(signature = (address, value, *, root=None))]
    fn write_u64(&self, address: &Bound<'_, PyAny>, value: &Bound<'_, PyAny>, root: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        self.write_number(address, (value, u64::MAX), root, u64::to_le_bytes)
    }

    /// The physical address of a virtual one, by the guest's own page tables (4 or 5 levels, 2 MiB and 1 GiB pages).
    #[pyo3(signature = (address, root=None))]
    fn translate(&self, py: Python<'_>, address: &Bound<'_, PyAny>, root: Option<&Bound<'_, PyAny>>) -> PyResult<u64> {
        let (va, root) = (self.address(address)?, convert::optional("root", root)?);
        let pa = self.shared.open(py, |session| session.vmi().translate(va, self.context(session, root)?))?;
        Ok(pa.0)
    }

    /// The virtual address of a symbol, or of "symbol+offset".
    fn symbol(&self, name: &str) -> PyResult<u64> {
        Ok(self.open()?.symbols.resolve(name)?.0)
    }

    /// The nearest symbol at or below an address, as "name" or "name+0x10"; None if the address lies in no symbol.
    fn symbolize(&self, address: &Bound<'_, PyAny>) -> PyResult<Option<String>> {
        Ok(self.open()?.symbols.describe(Va(convert::number("address", address)?)))
    }

    /// Delivers an interrupt or exception to a vCPU through the guest's IDT, before its next instruction.
    #[pyo3(signature = (vector, *, vcpu=None, kind="exception", error_code=None, cr2=None, insn_len=0))]
    #[expect(clippy::too_many_arguments, reason = "the signature Python sees")]
    fn inject(
        &self,
        py: Python<'_>,
        vector: &Bound<'_, PyAny>,
        vcpu: Option<&Bound<'_, PyAny>>,
        kind: &str,
        error_code: Option<&Bound<'_, PyAny>>,
        cr2: Option<&Bound<'_, PyAny>>,
        insn_len: u8,
    ) -> PyResult<()> {
        let (shared, vcpu) = (self.open_for("injection")?, self.vcpu(vcpu)?);
        let kind = match kind {
            "external" => InjectionKind::External,
            "exception" => InjectionKind::Exception,
            "software" => InjectionKind::Software,
            _ => return Err(invalid("kind", format!("{kind:?} is none of \"external\", \"exception\" and \"software\""))),
        };
        let injection = Injection {
            vector: convert::small("vector", vector, u8::MAX.into())?,
            kind,
            error_code: error_code.map(|code| convert::small("error_code", code, u32::MAX.into())).transpose()?,
            cr2: convert::optional("cr2", cr2)?,
            insn_len,
        };
        shared.open(py, |session| session.inject(vcpu, &injection))
    }

    /// Lets the guest run until its next event, for people who write their own loop instead of using `run`.
    #[pyo3(signature = (timeout=None))]
    fn wait_event(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<VmiEvent>> {
        raw::wait(py, self.open_for(RUNNING)?, convert::seconds("timeout", timeout)?)
    }

    /// Answers an event of `wait_event`; its vCPU goes on. Exactly once an event.
    fn respond(&self, py: Python<'_>, event: &Bound<'_, VmiEvent>, response: &Bound<'_, VmiEventResponse>) -> PyResult<()> {
        raw::respond(py, self.open()?, event.get(), response.get())
    }

    fn __repr__(&self) -> String {
        let info = &self.shared.info;
        let state = if self.shared.is_closed() { "closed" } else { "open" };
        format!("<Vm {:?} on {}, {} vCPUs, {state}>", info.name, info.driver, info.vcpus)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        // The session's Python objects are this one's: the session ends with it. A `hit.vm` owns nothing.
        if self.scope.is_some() {
            return Ok(());
        }
        visit.call(&self.shared.keys)?;
        if let Some(taps) = self.shared.taps.try_lock() {
            for tap in taps.iter().flatten() {
                visit.call(tap)?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        if self.scope.is_none() {
            self.shared.end();
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if self.scope.is_none() {
            self.shared.end();
        }
    }
}
