//! Symbols of the guest's image.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyIterator, PyList, PyString};

use super::shared::Shared;
use crate::symbols::{self, SymbolKind};

/// One symbol of the guest's image.
#[pyclass(frozen, eq, hash, module = "vmitap._native")]
#[derive(PartialEq, Eq, Hash)]
pub struct Symbol(symbols::Symbol);

#[pymethods]
impl Symbol {
    /// Its name.
    #[getter]
    fn name(&self) -> &str {
        &self.0.name
    }

    /// Its virtual address.
    #[getter]
    fn address(&self) -> u64 {
        self.0.va.0
    }

    /// Bytes; 0 where the image does not say.
    #[getter]
    fn size(&self) -> u64 {
        self.0.size
    }

    /// Whether it names code.
    #[getter]
    fn is_function(&self) -> bool {
        self.0.kind == SymbolKind::Function
    }

    fn __repr__(&self) -> String {
        format!("<Symbol {} at {:#x}>", self.0.name, self.0.va.0)
    }
}

/// The symbols of the guest's image, sorted by address.
#[pyclass(frozen, module = "vmitap._native")]
pub struct Symbols(pub Arc<Shared>);

#[pymethods]
impl Symbols {
    fn __len__(&self) -> usize {
        self.0.symbols.len()
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        let all: Vec<Symbol> = self.0.symbols.iter().cloned().map(Symbol).collect();
        PyList::new(py, all)?.try_iter()
    }

    /// Whether there is a symbol of that name.
    fn __contains__(&self, key: &Bound<'_, PyAny>) -> bool {
        key.cast::<PyString>().is_ok_and(|name| self.0.symbols.get(&name.to_string_lossy()).is_some())
    }

    /// The symbol of that name.
    fn __getitem__(&self, name: &str) -> PyResult<Symbol> {
        Ok(Symbol(self.0.symbols.lookup(name)?.clone()))
    }

    /// Those whose whole name matches a shell pattern (`*` and `?`), sorted by address.
    #[pyo3(name = "match")]
    fn matching(&self, pattern: &str) -> Vec<Symbol> {
        let matching = self.0.symbols.iter().filter(|symbol| matches(pattern.as_bytes(), symbol.name.as_bytes()));
        matching.cloned().map(Symbol).collect()
    }
}

/// Whether a whole name matches a pattern, in time proportional to the product of their lengths at worst.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at, mut read) = (0, 0);
    // Where the last `*` is, and how far into the name it reaches.
    let mut star: Option<(usize, usize)> = None;
    while let Some(byte) = name.get(read) {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, read));
                at += 1;
            }
            Some(wanted) if wanted == byte || *wanted == b'?' => {
                at += 1;
                read += 1;
            }
            _ => match &mut star {
                Some((begun, reach)) => {
                    *reach += 1;
                    at = *begun + 1;
                    read = *reach;
                }
                None => return false,
            },
        }
    }
    pattern.get(at..).unwrap_or_default().iter().all(|byte| *byte == b'*')
}
