//! Opens a guest that outlives its tool so that nothing is left in it, whatever becomes of the tool.

use std::ffi::OsString;

use super::journal::{self, GuestId, Journal};
use super::{Journaled, Repaired, Watchdog, repair};
use crate::driver::VmiDriver;
use crate::driver::open::{OpenOptions, Opened, Target, identity, open};
use crate::error::{Result, VmiError};

fn guest_id(target: &Target) -> Result<Option<GuestId>> {
    identity(target)?.map(|(driver, id)| GuestId::new(driver, &id)).transpose()
}

/// An error of the journal, as one of attaching.
fn refuse(target: &Target, error: VmiError) -> VmiError {
    let hint = match &error {
        VmiError::JournalInUse { .. } => "end that session first: a guest has one at a time".to_owned(),
        VmiError::JournalLeft { .. } => format!("vmitap repair {target} undoes what is left; so does attach(…, repair=True)"),
        VmiError::Journal { .. } => {
            format!("name a folder that can be written in {}; journals are kept there", journal::FOLDER_VARIABLE)
        }
        _ => return error,
    };
    VmiError::Attach { target: target.to_string(), reason: error.to_string(), hint }
}

/// It was not opened, and whatever opening had done is taken back.
fn abandon(journal: &Journal, error: VmiError) -> VmiError {
    if let Err(left) = journal.close() {
        log::error!("{left}");
    }
    error
}

/// Opens a guest. One that outlives its tool gets a journal before it is touched, and with `watchdog` a child that repairs it at
/// once if the tool is killed. One that lives in its driver needs neither, and a dump neither.
///
/// # Errors
/// As [`open`]; [`VmiError::Attach`] if another session has the guest, or one was killed and has left something in it.
pub fn open_guarded(target: &Target, options: &OpenOptions, watchdog: Option<Vec<OsString>>) -> Result<Opened> {
    let Some(guest) = guest_id(target)? else { return open(target, options) };
    let journal = Journal::begin(&journal::folder(), &guest).map_err(|error| refuse(target, error))?;
    // Before the guest is touched: the tool can be killed while it attaches. The journal goes before a watchdog that looks for one.
    let watchdog = watchdog.map(|command| Watchdog::start(&command)).transpose().map_err(|error| abandon(&journal, error))?;
    let opened = open(target, options).map_err(|error| abandon(&journal, error))?;
    let driver: Box<dyn VmiDriver> = Box::new(Journaled::new(opened.driver, journal)?.guarded_by(watchdog));
    Ok(Opened { driver, ..opened })
}

/// Brings a guest back whose session ended without a word. `None` if none has.
///
/// # Errors
/// [`VmiError::NotSupported`] for a guest that lives in its driver, and for a dump; [`VmiError::Attach`] if its session is alive or the guest cannot
/// be attached to; as [`repair`]. The journal stays then, and calling again tries the rest.
pub fn repair_guest(target: &Target, options: &OpenOptions) -> Result<Option<Repaired>> {
    let guest = guest_id(target)?;
    let driver = if matches!(target, Target::Dump(_)) { "dump" } else { "emu" };
    let guest = guest.ok_or(VmiError::NotSupported { driver, capability: "repairing" })?;
    let folder = journal::folder();
    let Some(left) = Journal::left(&folder, &guest).map_err(|error| refuse(target, error))? else { return Ok(None) };
    let mut driver = open(target, &OpenOptions { take_over: true, ..options.clone() })?.driver;
    let repaired = repair(&mut *driver, left.remains());
    let let_go = driver.let_go();
    let repaired = repaired?;
    let_go?;
    left.close()?;
    Ok(Some(repaired))
}
