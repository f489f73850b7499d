//! From Python's numbers, buffers and enumerations to the crate's types, and back.

use std::time::Duration;

use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict, PyMemoryView, PyString};

use super::errors::{VcpuNotFoundError, invalid};
use crate::addr::{MemoryAccess, Va, VcpuId};
use crate::session::{GP_NAMES, GpChanges};
use crate::symbols::SymbolTable;
use crate::tap::OnWrite;

/// An unsigned number of at most `max`; `what` names the argument in the error.
fn bounded(what: &str, value: &Bound<'_, PyAny>, max: u64) -> PyResult<u64> {
    let range = || {
        let shown = value.str().map_or_else(|_| "the value".to_owned(), |text| text.to_string_lossy().into_owned());
        invalid(what, format!("{shown} is not between 0 and {max}"))
    };
    match value.extract::<u64>() {
        Ok(number) if number <= max => Ok(number),
        Ok(_) => Err(range()),
        Err(error) if error.is_instance_of::<PyOverflowError>(value.py()) => Err(range()),
        Err(error) => Err(error),
    }
}

/// An address, a frame number or a value of 64 bits.
pub fn number(what: &str, value: &Bound<'_, PyAny>) -> PyResult<u64> {
    bounded(what, value, u64::MAX)
}

/// The same, where None may be given.
pub fn optional(what: &str, value: Option<&Bound<'_, PyAny>>) -> PyResult<Option<u64>> {
    value.map(|value| number(what, value)).transpose()
}

/// A count of bytes.
pub fn length(what: &str, value: &Bound<'_, PyAny>) -> PyResult<usize> {
    bounded(what, value, isize::MAX as u64).map(|length| length as usize)
}

/// A number of at most 255, 65,535 or so.
pub fn small<T: TryFrom<u64>>(what: &str, value: &Bound<'_, PyAny>, max: u64) -> PyResult<T> {
    let number = bounded(what, value, max)?;
    T::try_from(number).map_err(|_| invalid(what, format!("{number} is not between 0 and {max}")))
}

/// A vCPU by its number, which is checked.
pub fn vcpu(value: &Bound<'_, PyAny>, count: u16) -> PyResult<VcpuId> {
    match value.extract::<u16>() {
        Ok(number) if number < count => Ok(VcpuId(number)),
        Err(error) if !error.is_instance_of::<PyOverflowError>(value.py()) => Err(error),
        _ => Err(VcpuNotFoundError::new_err((value.clone().unbind(), count))),
    }
}

/// Seconds, as a length of time. Longer than a century is for ever.
pub fn seconds(what: &str, value: Option<f64>) -> PyResult<Option<Duration>> {
    const CENTURY: f64 = 3e9;
    match value {
        None => Ok(None),
        Some(value) if value.is_nan() || value < 0.0 => Err(invalid(what, format!("{value} is not a length of time"))),
        Some(value) if value > CENTURY => Ok(None),
        Some(value) => Ok(Some(Duration::from_secs_f64(value))),
    }
}

/// A symbol, or a virtual address.
pub fn address(what: &str, value: &Bound<'_, PyAny>, symbols: &SymbolTable) -> PyResult<Va> {
    if let Ok(name) = value.cast::<PyString>() {
        return Ok(symbols.resolve(&name.to_string_lossy())?);
    }
    number(what, value).map(Va)
}

/// A copy of what a buffer holds.
pub fn buffer(data: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    if let Ok(bytes) = data.cast::<PyBytes>() {
        return Ok(bytes.as_bytes().to_vec());
    }
    let bytes = PyMemoryView::from(data)?.call_method0("tobytes")?;
    Ok(bytes.cast::<PyBytes>()?.as_bytes().to_vec())
}

/// Registers by name.
pub fn changes(registers: Option<&Bound<'_, PyDict>>) -> PyResult<GpChanges> {
    let mut changes = GpChanges::default();
    for (name, value) in registers.into_iter().flatten() {
        let name = name.cast::<PyString>()?.to_string_lossy().into_owned();
        let slot = GP_NAMES.iter().zip(&mut changes.values).find(|(known, _)| **known == name);
        let (_, slot) = slot.ok_or_else(|| invalid(&name, "there is no register of that name that can be set"))?;
        *slot = Some(number(&name, &value)?);
    }
    Ok(changes)
}

/// Registers as keyword arguments, for a `repr`.
pub fn show_changes(changes: &GpChanges) -> String {
    let named = GP_NAMES.iter().zip(changes.values);
    let shown: Vec<_> = named.filter_map(|(name, value)| value.map(|value| format!("{name}={value:#x}"))).collect();
    shown.join(", ")
}

fn policy_class<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
    py.import("vmitap.policy")?.getattr(name)
}

/// The `Access` of some rights.
pub fn access_to_python(py: Python<'_>, access: MemoryAccess) -> PyResult<Py<PyAny>> {
    static MEMBERS: PyOnceLock<Vec<Py<PyAny>>> = PyOnceLock::new();
    let members = MEMBERS.get_or_try_init(py, || {
        let class = policy_class(py, "Access")?;
        (0..8u8).map(|bits| class.call1((bits,)).map(Bound::unbind)).collect::<PyResult<Vec<_>>>()
    })?;
    let member = members.get(usize::from(access.bits())).ok_or_else(|| invalid("access", "no such rights"))?;
    Ok(member.clone_ref(py))
}

/// An `Access` argument.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AccessArg(pub MemoryAccess);

/// What a view allows unless something else is said.
pub const EVERYTHING: AccessArg = AccessArg(MemoryAccess::RWX);

impl<'py> FromPyObject<'_, 'py> for AccessArg {
    type Error = PyErr;

    fn extract(obj: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let class = CLASS.get_or_try_init(obj.py(), || policy_class(obj.py(), "Access").map(Bound::unbind))?;
        if !obj.is_instance(class.bind(obj.py()))? {
            return Err(PyTypeError::new_err("expected a vmitap.Access"));
        }
        let bits: u8 = obj.getattr("value")?.extract()?;
        MemoryAccess::from_bits(bits).map(Self).ok_or_else(|| invalid("access", "no such rights"))
    }
}

/// An `OnWrite` argument.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OnWriteArg(pub OnWrite);

impl<'py> FromPyObject<'_, 'py> for OnWriteArg {
    type Error = PyErr;

    fn extract(obj: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let class = CLASS.get_or_try_init(obj.py(), || policy_class(obj.py(), "OnWrite").map(Bound::unbind))?;
        let refuse = || PyTypeError::new_err("expected a vmitap.OnWrite");
        if !obj.is_instance(class.bind(obj.py()))? {
            return Err(refuse());
        }
        let value = obj.getattr("value")?;
        let policy = match &*value.cast::<PyString>()?.to_string_lossy() {
            "reapply" => OnWrite::Reapply,
            "remove" => OnWrite::Remove,
            "deny" => OnWrite::Deny,
            "ask" => OnWrite::Ask,
            _ => return Err(refuse()),
        };
        Ok(Self(policy))
    }
}
