//! What was captured, as Python takes it: through the Arrow C data interface, or into files.

use std::path::PathBuf;
use std::sync::Arc;

use arrow_array::RecordBatchIterator;
use arrow_array::ffi::FFI_ArrowSchema;
use arrow_array::ffi_stream::FFI_ArrowArrayStream;
use arrow_schema::ArrowError;
use pyo3::exceptions::{PyImportError, PyModuleNotFoundError};
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

use super::convert::length;
use super::errors::invalid;
use super::shared::Shared;
use crate::capture::{Format, Output};
use crate::error::{Result, VmiError};

/// The rows that captures gave, in columns.
#[pyclass(frozen, module = "vmitap._native")]
pub struct Recording(pub Arc<Shared>);

fn arrow(error: &ArrowError) -> PyErr {
    VmiError::Recording { path: String::new(), errno: None, reason: error.to_string(), rows: 0 }.into()
}

/// A package that has to be there for a conversion.
fn import<'py>(py: Python<'py>, package: &str, method: &str) -> PyResult<Bound<'py, PyModule>> {
    py.import(package).map_err(|error| {
        if !error.is_instance_of::<PyModuleNotFoundError>(py) {
            return error;
        }
        PyImportError::new_err(format!("{method}() needs the package {package}: pip install {package}"))
    })
}

impl Recording {
    /// All rows into a new file.
    fn write(&self, py: Python<'_>, path: PathBuf, format: Format) -> PyResult<()> {
        let path = path.into_os_string().into_string().map_err(|_| invalid("path", "it is no UTF-8"))?;
        let done: Result<()> = self.0.released(py, |inner| {
            let (schema, batches) = inner.session.recorded()?;
            let failed = |error: std::io::Error, rows| VmiError::Recording {
                path: path.clone(),
                errno: error.raw_os_error(),
                reason: error.to_string(),
                rows,
            };
            let mut output: Box<dyn Output> = format.create(&path, &schema, &self.0.symbols).map_err(|error| failed(error, 0))?;
            let written = batches.iter().try_for_each(|batch| output.write(batch)).and_then(|()| output.finish());
            written.map_err(|error| failed(error, output.rescue().unwrap_or(0)))
        });
        Ok(done?)
    }
}

#[pymethods]
impl Recording {
    /// Names of the columns: those that every row has first.
    #[getter]
    fn columns(&self, py: Python<'_>) -> Vec<String> {
        self.0.quick(py, |inner| inner.session.recording().names())
    }

    /// Rows captured so far, also those that went to a file, were cleared, or were lost.
    #[getter]
    fn rows(&self, py: Python<'_>) -> u64 {
        self.0.quick(py, |inner| inner.session.recording().rows())
    }

    /// Rows that there was no room for, in memory or in the queue of a file whose disk or reader was too slow.
    #[getter]
    fn lost(&self, py: Python<'_>) -> u64 {
        self.0.quick(py, |inner| inner.session.recording().lost())
    }

    /// Bytes of values that are kept in memory at most; what comes then is lost, and counted.
    #[getter]
    fn limit(&self, py: Python<'_>) -> usize {
        self.0.quick(py, |inner| inner.session.recording().limit())
    }

    #[setter]
    fn set_limit(&self, py: Python<'_>, limit: &Bound<'_, PyAny>) -> PyResult<()> {
        let limit = length("limit", limit)?;
        self.0.quick(py, |inner| inner.session.recording_mut().set_limit(limit));
        Ok(())
    }

    /// Rows in memory.
    fn __len__(&self, py: Python<'_>) -> usize {
        self.0.quick(py, |inner| inner.session.recording().len())
    }

    /// Forgets the rows in memory.
    fn clear(&self, py: Python<'_>) -> PyResult<()> {
        Ok(self.0.quick(py, |inner| inner.session.recording_mut().clear())?)
    }

    /// The rows in memory as a `pyarrow.Table`, without copying them.
    fn to_arrow<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        import(slf.py(), "pyarrow", "to_arrow")?.call_method1("table", (slf,))
    }

    /// The rows in memory as a `polars.DataFrame`.
    fn to_polars<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        import(slf.py(), "polars", "to_polars")?.call_method1("DataFrame", (slf,))
    }

    /// The rows in memory as a `pandas.DataFrame`.
    fn to_pandas<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        import(slf.py(), "pandas", "to_pandas")?;
        Self::to_arrow(slf)?.call_method0("to_pandas")
    }

    /// Writes the rows in memory to a Parquet file.
    fn write_parquet(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        self.write(py, path, Format::Parquet)
    }

    /// Writes the rows in memory to a file of JSON lines.
    fn write_jsonl(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        self.write(py, path, Format::JsonLines)
    }

    /// The rows in memory as an Arrow C stream; the Arrow PyCapsule protocol.
    #[pyo3(signature = (requested_schema=None))]
    fn __arrow_c_stream__<'py>(
        &self,
        py: Python<'py>,
        requested_schema: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        // A consumer has to live with the schema that is there, as the protocol allows.
        let _ = requested_schema;
        let (schema, batches) = self.0.quick(py, |inner| inner.session.recorded())?;
        let reader = RecordBatchIterator::new(batches.into_iter().map(Ok), schema);
        PyCapsule::new_with_value(py, FFI_ArrowArrayStream::new(Box::new(reader)), c"arrow_array_stream")
    }

    /// The columns as an Arrow C schema; the Arrow PyCapsule protocol.
    fn __arrow_c_schema__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyCapsule>> {
        let schema = self.0.quick(py, |inner| inner.session.recording().schema());
        let schema = FFI_ArrowSchema::try_from(schema.as_ref()).map_err(|error| arrow(&error))?;
        PyCapsule::new_with_value(py, schema, c"arrow_schema")
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let (rows, lost, columns) = self.0.quick(py, |inner| {
            let recording = inner.session.recording();
            (recording.len(), recording.lost(), recording.names().len())
        });
        format!("<Recording {rows} rows in {columns} columns, {lost} lost>")
    }
}

/// A file that rows go to while the guest runs.
#[pyclass(frozen, module = "vmitap._native")]
pub struct RecordingFile {
    shared: Arc<Shared>,
    path: String,
    rows: parking_lot::Mutex<Option<u64>>,
}

impl RecordingFile {
    pub fn open(py: Python<'_>, shared: &Arc<Shared>, path: PathBuf, format: Option<&str>, batch: usize) -> PyResult<Self> {
        let path = path.into_os_string().into_string().map_err(|_| invalid("path", "it is no UTF-8"))?;
        let format = match format {
            None if path == "-" => Format::JsonLines,
            None => Format::of_path(&path)
                .ok_or_else(|| invalid("path", format!("{path:?} ends neither in .parquet nor in .jsonl: give a format")))?,
            Some("parquet") => Format::Parquet,
            Some("jsonl") => Format::JsonLines,
            Some(other) => return Err(invalid("format", format!("{other:?} is neither \"parquet\" nor \"jsonl\""))),
        };
        if batch == 0 || batch > 1 << 20 {
            return Err(invalid("batch", "a batch has 1 to 1,048,576 rows"));
        }
        shared.open_released(py, |session| session.record_to(&path, format, batch))?;
        Ok(Self { shared: shared.clone(), path, rows: parking_lot::Mutex::new(None) })
    }
}

#[pymethods]
impl RecordingFile {
    /// The file's name.
    #[getter]
    fn path(&self) -> &str {
        &self.path
    }

    /// Rows in the file so far: whole batches.
    #[getter]
    fn rows(&self, py: Python<'_>) -> u64 {
        let ended = *self.rows.lock();
        ended.unwrap_or_else(|| self.shared.quick(py, |inner| inner.session.rows_in_file()).unwrap_or_default())
    }

    /// Writes what is left and ends the file. Twice is fine.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if self.rows.lock().is_some() {
            return Ok(());
        }
        let rows = self.shared.released(py, |inner| inner.session.end_recording())?;
        self.rows.lock().get_or_insert(rows);
        Ok(())
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
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
        self.close(py)
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        format!("<RecordingFile {:?} rows={}>", self.path, self.rows(py))
    }
}
