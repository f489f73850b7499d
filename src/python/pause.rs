//! `with vm.pause():`.

use pyo3::PyTraverseError;
use pyo3::gc::PyVisit;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::vm::Vm;
use crate::session::Session;

/// The context manager of `Vm.pause`.
#[pyclass(frozen, module = "vmitap._native", name = "_Pause")]
pub struct Pause(pub Py<Vm>);

#[pymethods]
impl Pause {
    fn __enter__(&self, py: Python<'_>) -> PyResult<()> {
        self.0.get().shared.open(py, Session::pause)
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) -> PyResult<()> {
        let shared = &self.0.get().shared;
        if shared.is_closed() {
            return Ok(());
        }
        shared.open(py, Session::resume)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        visit.call(&self.0)
    }
}
