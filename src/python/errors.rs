//! From the crate's error to the Python class of the same failure, with its fields.

use pyo3::prelude::*;
use pyo3::{PyErrArguments, import_exception};

use crate::error::{TranslationFault, VmiError};

import_exception!(vmitap.errors, AttachError);
import_exception!(vmitap.errors, BadAccessError);
import_exception!(vmitap.errors, BreakpointConflictError);
import_exception!(vmitap.errors, BreakpointNotFoundError);
import_exception!(vmitap.errors, DeadlineExceededError);
import_exception!(vmitap.errors, DefaultViewError);
import_exception!(vmitap.errors, DomainGoneError);
import_exception!(vmitap.errors, DriverError);
import_exception!(vmitap.errors, EventJournalError);
import_exception!(vmitap.errors, HandlerError);
import_exception!(vmitap.errors, ImageError);
import_exception!(vmitap.errors, InvalidArgumentError);
import_exception!(vmitap.errors, JournalError);
import_exception!(vmitap.errors, NoPendingEventError);
import_exception!(vmitap.errors, NotInDumpError);
import_exception!(vmitap.errors, NotSupportedError);
import_exception!(vmitap.errors, OutOfRangeError);
import_exception!(vmitap.errors, RecordingError);
import_exception!(vmitap.errors, SessionBusyError);
import_exception!(vmitap.errors, StaleContextError);
import_exception!(vmitap.errors, StringTooLongError);
import_exception!(vmitap.errors, SymbolNotFoundError);
import_exception!(vmitap.errors, TranslationError);
import_exception!(vmitap.errors, UndoFailedError);
import_exception!(vmitap.errors, VcpuNotFoundError);
import_exception!(vmitap.errors, ViewNotFoundError);

/// The arguments of an `UndoFailedError`: the first is an error itself, which takes the interpreter to make.
struct Undo {
    cause: VmiError,
    left_behind: String,
}

impl PyErrArguments for Undo {
    fn arguments(self, py: Python<'_>) -> Py<PyAny> {
        (PyErr::from(self.cause).into_value(py), self.left_behind).arguments(py)
    }
}

impl From<VmiError> for PyErr {
    fn from(error: VmiError) -> Self {
        match error {
            VmiError::Translation { va, root, fault } => {
                let (name, level, pa) = match fault {
                    TranslationFault::NotPresent { level, entry_pa } => ("not-present", Some(level), Some(entry_pa.0)),
                    TranslationFault::NonCanonical => ("non-canonical", None, None),
                    TranslationFault::BeyondMemory { level, pa } => ("beyond-memory", Some(level), Some(pa.0)),
                    TranslationFault::ReservedBit { level, entry_pa } => ("reserved-bit", Some(level), Some(entry_pa.0)),
                };
                TranslationError::new_err((va.0, root.0, name, level, pa))
            }
            VmiError::OutOfRange { pa, len, end } => OutOfRangeError::new_err((pa.0, len, end.0)),
            VmiError::NotInDump { pa, len } => NotInDumpError::new_err((pa.0, len)),
            VmiError::ViewNotFound { view } => ViewNotFoundError::new_err((view.0,)),
            VmiError::DefaultView { op } => DefaultViewError::new_err((op,)),
            VmiError::VcpuNotFound { vcpu, count } => VcpuNotFoundError::new_err((vcpu.0, count)),
            VmiError::BadAccess { view, gfn, access } => BadAccessError::new_err((view.0, gfn.0, access.to_string())),
            VmiError::BreakpointNotFound { pa, view } => BreakpointNotFoundError::new_err((pa.0, view.0)),
            VmiError::BreakpointConflict { va } => BreakpointConflictError::new_err((va.0,)),
            VmiError::NotSupported { driver, capability } => NotSupportedError::new_err((driver, capability)),
            VmiError::Driver { op, errno, detail } => DriverError::new_err((op, errno, detail)),
            VmiError::Attach { target, reason, hint } => AttachError::new_err((target, reason, hint)),
            VmiError::Image { what, reason } => ImageError::new_err((what, reason)),
            VmiError::SymbolNotFound { name, nearest } => SymbolNotFoundError::new_err((name, nearest)),
            VmiError::StringTooLong { va, limit } => StringTooLongError::new_err((va.0, limit)),
            VmiError::NoPendingEvent { vcpu } => NoPendingEventError::new_err((vcpu.0,)),
            VmiError::DomainGone { reason } => DomainGoneError::new_err((reason,)),
            VmiError::Journal { path, reason } => JournalError::new_err((path, reason)),
            VmiError::JournalInUse { path } => JournalError::new_err((path, "a session with this guest is alive")),
            VmiError::JournalLeft { path } => JournalError::new_err((path, "a session with this guest was killed; repair it")),
            VmiError::EventJournal { path, errno, reason } => EventJournalError::new_err((path, errno, reason)),
            VmiError::InvalidArgument { what, reason } => InvalidArgumentError::new_err((what, reason)),
            VmiError::Recording { path, errno, reason, rows } => RecordingError::new_err((path, errno, reason, rows)),
            VmiError::UndoFailed { cause, left_behind } => UndoFailedError::new_err(Undo { cause: *cause, left_behind }),
        }
    }
}

/// A value given by the caller makes no sense.
pub fn invalid(what: &str, reason: impl Into<String>) -> PyErr {
    InvalidArgumentError::new_err((what.to_owned(), reason.into()))
}

/// Something was used after its time.
pub fn stale(what: &'static str) -> PyErr {
    StaleContextError::new_err((what,))
}

/// The session's loop is running.
pub fn busy(op: &'static str) -> PyErr {
    SessionBusyError::new_err((op,))
}
