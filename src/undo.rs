//! What is left behind when undoing fails too.

use crate::error::{Result, VmiError};

/// What could not be undone or taken back, and the first error of doing so.
#[derive(Default)]
pub(crate) struct Left {
    first: Option<VmiError>,
    what: Vec<String>,
}

impl Left {
    /// Takes note of `what` if `result` is an error; then it returns true.
    pub(crate) fn note(&mut self, result: Result<()>, what: impl FnOnce() -> String) -> bool {
        let Err(error) = result else { return false };
        self.what.push(format!("{} ({error})", what()));
        self.first.get_or_insert(error);
        true
    }

    /// The error of an operation that failed for `cause` and was then undone.
    pub(crate) fn after(self, cause: VmiError) -> VmiError {
        // Nothing is left behind in a guest that is gone.
        if self.what.is_empty() || matches!(cause, VmiError::DomainGone { .. }) {
            return cause;
        }
        VmiError::UndoFailed { cause: Box::new(cause), left_behind: self.what.join(", ") }
    }

    /// The result of taking things back.
    pub(crate) fn done(mut self) -> Result<()> {
        match self.first.take() {
            None => Ok(()),
            Some(cause) => Err(self.after(cause)),
        }
    }
}
