//! Guest memory.

use std::sync::Arc;

use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::convert::{buffer, length, number, optional};
use super::handle::{Handle, WRITING};
use super::shared::Shared;
use crate::addr::{Pa, Va};
use crate::bytes::GuestBytes;
use crate::core::Address;
use crate::error::Result;
use crate::session::Session;

/// Bytes that are read while the interpreter is kept.
const QUICK: usize = 1 << 16;

/// Reads as much as is asked for, straight into a new `bytes` if it is not much.
pub fn read<'py>(
    py: Python<'py>,
    shared: &Arc<Shared>,
    length: usize,
    address: impl Fn(&Session) -> Result<Address> + Send + Sync,
) -> PyResult<Bound<'py, PyBytes>> {
    if length > QUICK {
        let bytes = shared.open_released(py, |session| session.vmi().read_bytes(address(session)?, length))?;
        return Ok(PyBytes::new(py, &bytes));
    }
    PyBytes::new_with(py, length, |bytes| {
        shared.open(py, |session| match address(session)? {
            Address::Physical(pa) => session.vmi().read_pa(pa, bytes),
            Address::Virtual(va, context) => session.vmi().read(va, context, bytes),
        })
    })
}

/// Writes physical memory; breakpoints stay planted.
pub fn write_pa(py: Python<'_>, shared: &Arc<Shared>, pa: &Bound<'_, PyAny>, data: &Bound<'_, PyAny>) -> PyResult<()> {
    let (pa, bytes) = (Pa(number("pa", pa)?), buffer(data)?);
    shared.open(py, |session| session.write_pa(pa, &bytes))
}

/// Guest-physical memory, from 0 to `size`.
#[pyclass(frozen, module = "vmitap._native")]
pub struct Memory(pub Handle);

#[pymethods]
impl Memory {
    /// Bytes.
    #[getter]
    fn size(&self) -> PyResult<u64> {
        Ok(self.0.current()?.info.memory_size)
    }

    /// As `Vm.read_pa`.
    #[pyo3(signature = (pa, length))]
    fn read<'py>(&self, py: Python<'py>, pa: &Bound<'_, PyAny>, length: &Bound<'_, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let pa = Pa(number("pa", pa)?);
        read(py, self.0.open()?, self::length("length", length)?, |_| Ok(pa.into()))
    }

    /// Fills a writable buffer from `pa` on, without an object in between; raises as `Vm.read_pa`.
    #[expect(clippy::needless_pass_by_value, reason = "arguments from Python are owned")]
    fn read_into(&self, py: Python<'_>, pa: &Bound<'_, PyAny>, buffer: PyBuffer<u8>) -> PyResult<()> {
        let (shared, pa) = (self.0.open()?, Pa(number("pa", pa)?));
        if buffer.readonly() {
            return Err(pyo3::exceptions::PyBufferError::new_err("the buffer cannot be written to"));
        }
        let length = buffer.item_count();
        let bytes = shared.open(py, |session| session.vmi().read_bytes(pa, length))?;
        buffer.copy_from_slice(py, &bytes)
    }

    /// Reads many ranges of virtual memory, each an address and a length, in one call: all of them or nothing.
    #[expect(clippy::needless_pass_by_value, reason = "arguments from Python are owned")]
    #[pyo3(signature = (ranges, *, root=None))]
    fn read_many<'py>(
        &self,
        py: Python<'py>,
        ranges: Vec<(Bound<'py, PyAny>, Bound<'py, PyAny>)>,
        root: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<Bound<'py, PyBytes>>> {
        let (shared, root) = (self.0.open()?, optional("root", root)?);
        let range = |(va, len): &(Bound<'_, PyAny>, Bound<'_, PyAny>)| Ok((Va(number("ranges", va)?), length("ranges", len)?));
        let ranges = ranges.iter().map(range).collect::<PyResult<Vec<_>>>()?;
        let parts = shared.open(py, |session| {
            let context = self.0.context(session, root)?;
            ranges.iter().map(|(va, len)| session.vmi().read_bytes((*va, context), *len)).collect::<Result<Vec<GuestBytes>>>()
        })?;
        Ok(parts.iter().map(|part| PyBytes::new(py, part)).collect())
    }

    /// As `Vm.write_pa`.
    fn write(&self, py: Python<'_>, pa: &Bound<'_, PyAny>, data: &Bound<'_, PyAny>) -> PyResult<()> {
        write_pa(py, self.0.open_for(WRITING)?, pa, data)
    }
}
