//! The one place where the interpreter is let go of.

use std::sync::atomic::{AtomicU64, Ordering};

use pyo3::prelude::*;

/// How often the interpreter was let go of, and so had to be waited for.
static LET_GO: AtomicU64 = AtomicU64::new(0);

/// The same, for tests of what must not wait for it.
#[pyfunction]
pub fn _let_go() -> u64 {
    LET_GO.load(Ordering::Relaxed)
}

/// Runs `work` with the interpreter released, so that other Python threads go on, and then hands over what was logged meanwhile.
///
/// `work` must not call Python. Whoever waits for a lock does it in here: a thread that waits while it keeps the interpreter
/// stops the one it waits for.
pub fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> T {
    LET_GO.fetch_add(1, Ordering::Relaxed);
    let done = py.detach(work);
    super::log::flush(py);
    done
}
