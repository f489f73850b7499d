//! The last events of a session in a file: see [`crate::capture::FlightRecorder`].

use crate::capture::{FlightOutcome, FlightRecorder};
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};
use crate::event::VmiEvent;

use super::{Session, TapId};

impl<D: VmiDriver + ?Sized> Session<D> {
    /// From now on the last `slots` events are in a file, which outlives this process; `names` are those of the taps there are.
    ///
    /// # Errors
    /// As [`FlightRecorder::create`]; [`VmiError::InvalidArgument`] if there is such a file already.
    pub fn open_flight(&mut self, path: &str, slots: u64, replace: bool, names: &[(TapId, String)]) -> Result<()> {
        self.check_open()?;
        if let Some(flight) = &self.flight {
            let reason = format!("{} is being written; one file at a time", flight.path());
            return Err(VmiError::InvalidArgument { what: "path", reason });
        }
        let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let began = unix.saturating_sub(self.began.elapsed()).as_nanos() as u64;
        let target = &self.vmi.driver().info().name;
        self.flight = Some(Box::new(FlightRecorder::create(path, slots, replace, target, began)?));
        for (tap, name) in names {
            self.name_in_flight(*tap, name);
        }
        Ok(())
    }

    /// Ends that file, which says then that the session did not crash.
    pub fn close_flight(&mut self) {
        if let Some(flight) = self.flight.take() {
            flight.close();
        }
    }

    /// The file's writer.
    pub fn flight(&self) -> Option<&FlightRecorder> {
        self.flight.as_deref()
    }

    /// The name of a tap for the file, if there is one.
    pub fn name_in_flight(&mut self, tap: TapId, name: &str) {
        if let Some(flight) = &mut self.flight {
            flight.name(tap.0, name);
        }
    }

    /// An event was received.
    #[inline]
    pub(super) fn begin_flight(&mut self, event: &VmiEvent) {
        if let Some(flight) = &mut self.flight {
            flight.begin(event, self.began.elapsed().as_nanos() as u64);
        }
    }

    /// What will have become of the event in hand once it is answered.
    #[inline]
    pub(super) fn expect_flight(&mut self, outcome: FlightOutcome, tap: Option<TapId>) {
        if let Some(flight) = &mut self.flight {
            flight.expect(outcome, tap.map(|tap| tap.0));
        }
    }

    /// What is known of the event in hand now.
    #[inline]
    pub(super) fn note_flight(&mut self, outcome: FlightOutcome, tap: Option<TapId>) {
        if let Some(flight) = &mut self.flight {
            flight.note(outcome, tap.map(|tap| tap.0));
        }
    }

    /// The event in hand is answered.
    #[inline]
    pub(super) fn end_flight(&mut self) {
        if let Some(flight) = &self.flight {
            flight.end();
        }
    }
}
