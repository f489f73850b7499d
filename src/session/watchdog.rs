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

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // It finds no journal and ends.
        if let Err(error) = self.0.wait() {
            log::warn!("the watchdog did not end: {error}");
        }
    }
}
