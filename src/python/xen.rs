//! What a Xen machine has: its domains, and what is in the way of tapping them.

use pyo3::prelude::*;

use super::gil;
use crate::driver::open::{DomainSummary, xen_host as find_xen_host};

/// A domain of a Xen machine.
#[pyclass(frozen, get_all, module = "vmitap._native")]
pub struct XenDomain {
    id: u32,
    /// Its name; empty while it has none.
    name: String,
    /// Its kind: "hvm" for HVM and PVH domains, "pv" for others.
    kind: &'static str,
    vcpus: u16,
    /// Bytes of memory it has now.
    memory_size: u64,
    /// Why it cannot be tapped; None if nothing is known to be in the way.
    obstacle: Option<String>,
    /// What to do about `obstacle`; empty without one.
    hint: String,
}

#[pymethods]
impl XenDomain {
    /// What `attach` takes for it.
    #[getter]
    fn target(&self) -> String {
        if self.name.is_empty() { format!("xen:{}", self.id) } else { format!("xen:{}", self.name) }
    }

    fn __repr__(&self) -> String {
        format!("XenDomain({}, {:?}, {})", self.id, self.name, self.obstacle.as_deref().unwrap_or("can be tapped"))
    }
}

impl From<DomainSummary> for XenDomain {
    fn from(domain: DomainSummary) -> Self {
        let (obstacle, hint) = domain.obstacle.map(|obstacle| (obstacle.reason, obstacle.hint)).unzip();
        Self {
            id: domain.id,
            name: domain.name,
            kind: if domain.is_hvm { "hvm" } else { "pv" },
            vcpus: domain.vcpus,
            memory_size: domain.memory_size,
            obstacle,
            hint: hint.unwrap_or_default(),
        }
    }
}

/// A Xen machine, as `xen_host` found it.
#[pyclass(frozen, module = "vmitap._native")]
pub struct XenHost {
    /// Xen's version and that of its event ring, such as "xen 4.17.5 (vm_event 7)".
    #[pyo3(get)]
    version: String,
    /// The files of Xen's libraries that are open, libxenctrl first.
    #[pyo3(get)]
    libraries: Vec<String>,
    /// Why no domain of this machine can be tapped; None if nothing is known to be in the way.
    #[pyo3(get)]
    obstacle: Option<String>,
    /// What to do about `obstacle`; empty without one.
    #[pyo3(get)]
    hint: String,
    domains: Vec<Py<XenDomain>>,
}

#[pymethods]
impl XenHost {
    /// Its domains, ascending by number; the control domain is the first.
    #[getter]
    fn domains(&self, py: Python<'_>) -> Vec<Py<XenDomain>> {
        self.domains.iter().map(|domain| domain.clone_ref(py)).collect()
    }

    fn __repr__(&self) -> String {
        format!("XenHost({:?}, {} domains)", self.version, self.domains.len())
    }
}

/// Asks the Xen that this machine runs under what it is and which domains it has. Changes nothing.
#[pyfunction]
pub fn xen_host(py: Python<'_>) -> PyResult<XenHost> {
    let found = gil::detached(py, || find_xen_host(None))?;
    let domains = found.domains.into_iter().map(|domain| Py::new(py, XenDomain::from(domain))).collect::<PyResult<_>>()?;
    let (obstacle, hint) = found.obstacle.map(|obstacle| (obstacle.reason, obstacle.hint)).unzip();
    Ok(XenHost { version: found.version, libraries: found.libraries, obstacle, hint: hint.unwrap_or_default(), domains })
}
