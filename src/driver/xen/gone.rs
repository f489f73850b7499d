//! Whether the domain is still there, and what a failed call means if it is not.

use std::time::Instant;

use xen_sys::errno;
use xen_sys::types::{DomainInfo, dominf};

use super::XenDriver;
use crate::driver::Shutdown;
use crate::error::{Result, VmiError};

/// What a failed call of Xen's libraries is to the caller, by itself.
pub(super) fn failed(error: &xen_sys::Error) -> VmiError {
    if error.errno == errno::ESRCH {
        return VmiError::DomainGone { reason: format!("{error}") };
    }
    VmiError::Driver { op: error.op, errno: error.errno, detail: error.text() }
}

/// How a domain has shut down, if it has.
fn shutdown_of(info: &DomainInfo) -> Option<Shutdown> {
    let has_shut_down = info.flags & dominf::SHUTDOWN != 0;
    has_shut_down.then(|| Shutdown::from_code(info.flags >> dominf::SHUTDOWN_SHIFT & dominf::SHUTDOWN_MASK))
}

impl XenDriver {
    /// Asks whether the domain is still there. True if it runs (or is paused), false if it has shut down.
    pub(super) fn look(&mut self) -> Result<bool> {
        self.looked_at = Instant::now();
        let info = self.xen.control().domain(self.domain).map_err(|error| failed(&error))?;
        if let Some(info) = &info {
            self.shutdown = shutdown_of(info);
        }
        let Some(reason) = self.why_gone(info.as_ref()) else { return Ok(self.shutdown.is_none()) };
        Err(self.gone_for(reason))
    }

    /// It is gone, for good: a mapping would keep a domain that has ended from going away.
    fn gone_for(&self, reason: String) -> VmiError {
        self.pages.clear();
        VmiError::DomainGone { reason: self.gone.get_or_init(|| reason).clone() }
    }

    /// Why the domain is gone, by what Xen says of it.
    pub(super) fn why_gone(&self, info: Option<&DomainInfo>) -> Option<String> {
        let reason = match info {
            Some(info) if info.flags & dominf::DYING == 0 => return None,
            Some(_) => format!("domain {} is being destroyed", self.domain),
            None => format!("domain {} does not exist any more", self.domain),
        };
        // Who manages it (xl) destroys it once it has shut down, and may have made another in its place.
        let Some(shutdown) = info.map_or(self.shutdown, shutdown_of) else { return Some(reason) };
        Some(format!("{reason}; it had shut down ({})", shutdown.name()))
    }

    /// What a failed call is to the caller. With a domain that is being destroyed Xen has many error numbers.
    pub(super) fn failed(&self, error: &xen_sys::Error) -> VmiError {
        self.unless_gone(failed(error))
    }

    /// The error, or that the domain is gone.
    pub(super) fn unless_gone(&self, error: VmiError) -> VmiError {
        match self.xen.control().domain(self.domain).map(|info| self.why_gone(info.as_ref())) {
            Ok(Some(reason)) => self.gone_for(reason),
            _ => error,
        }
    }
}
