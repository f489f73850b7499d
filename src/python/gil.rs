//! The one place where the interpreter is let go of.

use pyo3::prelude::*;

/// Runs `work` with the interpreter released, so that other Python threads go on, and then hands over what was logged meanwhile.
///
/// `work` must not call Python. Whoever waits for a lock does it in here: a thread that waits while it keeps the interpreter
/// stops the one it waits for.
pub fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> T {
    let done = py.detach(work);
    super::log::flush(py);
    done
}
