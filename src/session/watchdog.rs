//! A child process that repairs a guest at once if this one is killed.

use std::ffi::OsString;
use std::process::{Child, Command, Stdio};

use crate::error::{Result, VmiError};

/// A child that holds nothing of the guest and waits for this process to end: its standard input ends with it.
pub struct Watchdog(Child);

impl Watchdog {
    /// Starts `command`, which reads its standard input to the end and then repairs the guest if there is something to repair.
    ///
    /// # Errors
    /// [`VmiError::Driver`] if it cannot be started.
    pub fn start(command: &[OsString]) -> Result<Self> {
        let failed = |detail: String, errno| VmiError::Driver { op: "starting the watchdog", errno, detail };
        let (program, arguments) = command.split_first().ok_or_else(|| failed("no program is named".to_owned(), 0))?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // A Ctrl-C for the tool is none for its watchdog.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = command.spawn().map_err(|error| failed(error.to_string(), error.raw_os_error().unwrap_or(0)))?;
        Ok(Self(child))
    }
}

/// Gives up what the calling thread may do beyond its user's files, for good: its capabilities, and new ones by way of programs it starts.
///
/// That is for a watchdog, which waits for long and may never be needed: repairing takes root's own device files and nothing else.
///
/// # Errors
/// [`VmiError::Driver`] if the system refuses, with what was given up before.
#[cfg(feature = "xen")]
pub fn drop_privileges() -> Result<()> {
    use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_no_new_privs(true).and_then(|()| set_capabilities(None, sets)).map_err(|error| VmiError::Driver {
        op: "giving up privileges",
        errno: error.raw_os_error(),
        detail: error.to_string(),
    })
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // It finds no journal and ends.
        if let Err(error) = self.0.wait() {
            log::warn!("the watchdog did not end: {error}");
        }
    }
}
