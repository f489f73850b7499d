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

    /// The first error.
    pub(crate) const fn first(&self) -> Option<&VmiError> {
        self.first.as_ref()
    }

    /// The error of an operation that failed for `cause` and was then undone.
    pub(crate) fn after(self, cause: VmiError) -> VmiError {
        match self.first {
            Some(gone @ VmiError::DomainGone { .. }) => gone,
            _ if matches!(cause, VmiError::DomainGone { .. }) => cause,
            _ => cause.and_left(&self.what),
        }
    }

    /// The result of taking things back.
    pub(crate) fn done(self) -> Result<()> {
        match self.first.clone() {
            None => Ok(()),
            Some(cause) => Err(self.after(cause)),
        }
    }
}
