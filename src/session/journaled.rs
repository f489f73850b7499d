//! A driver that writes down what it adds to the guest, before or right after it does.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::Watchdog;
use super::journal::{Entry, Found, Journal};
use crate::addr::{Gfn, MemoryAccess, Pa, VcpuId, View};
use crate::arch::amd64::{Injection, Registers};
use crate::driver::{
    Additions, Caps, Monitor, OnTrap, Shutdown, Trap, VmInfo, VmiControl, VmiDriver, VmiEvents, VmiFrames, VmiInfo, VmiInject,
    VmiProtection, VmiRead, VmiRegisters, VmiRepair, VmiViews, VmiWrite, Wait, Waker,
};
use crate::error::{Result, VmiError};
use crate::event::VmiEventResponse;

/// The journal of a session that ends in the ordinary way: its file goes once nothing is left in the guest.
struct Ending {
    journal: Journal,
    /// The guest has ended before its session: there is nothing to undo.
    is_gone: bool,
    is_over: bool,
}

impl Ending {
    /// Removes the file, if nothing is left. Whether it is gone.
    fn end(&mut self) -> bool {
        if !self.is_over && (self.is_gone || self.journal.remains().is_empty()) {
            self.is_over = true;
            if let Err(error) = self.journal.close() {
                log::error!("{error}");
            }
        }
        self.is_over
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if !self.end() {
            log::error!("the guest is not as it was: {} says what is left in it", self.journal.path().display());
        }
    }
}

/// A driver with a journal. Once it has let go of a guest in which nothing is left, or is dropped then, the journal goes too.
pub struct Journaled<D: VmiDriver + ?Sized> {
    inner: Box<D>,
    journal: Ending,
    /// What has happened and could not be written yet.
    late: Vec<Entry>,
    /// Ends last: it looks for the journal.
    watchdog: Option<Watchdog>,
}

impl<D: VmiDriver + ?Sized> Journaled<D> {
    /// Writes down what is in the guest, and from then on what `driver` adds. `journal` was begun before `driver` touched the guest.
    ///
    /// # Errors
    /// What the driver fails with; [`crate::VmiError::Journal`].
    pub fn new(driver: Box<D>, mut journal: Journal) -> Result<Self> {
        let memory_size = driver.info().memory_size;
        if let Err(error) = driver.additions().and_then(|additions| journal.found(Found { additions, memory_size })) {
            // What attaching has done is taken back with the driver, and then there is nothing to repair.
            drop(driver);
            if let Err(left) = journal.close() {
                log::error!("{left}");
            }
            return Err(error);
        }
        let journal = Ending { journal, is_gone: false, is_over: false };
        Ok(Self { inner: driver, journal, late: Vec::new(), watchdog: None })
    }

    /// Keeps the watchdog for as long as the session lives.
    #[must_use]
    pub fn guarded_by(mut self, watchdog: Option<Watchdog>) -> Self {
        self.watchdog = watchdog;
        self
    }

    /// What the journal says now.
    pub const fn journal(&self) -> &Journal {
        &self.journal.journal
    }

    /// The driver, no longer written about. The journal's file stays if something is left in the guest.
    pub fn into_inner(self) -> Box<D> {
        self.inner
    }

    /// Writes what is to be known before the guest is changed, after what is still to be written.
    fn announce(&mut self, entry: Entry) -> Result<()> {
        while let Some(late) = self.late.first() {
            self.journal.journal.note(late.clone())?;
            self.late.remove(0);
        }
        self.journal.journal.note(entry)
    }

    /// Writes down what has happened. It has, whether or not it can be written now: what was announced before covers it until then.
    fn report(&mut self, entry: Entry) {
        if let Err(error) = self.announce(entry.clone()) {
            log::warn!("{error}; nothing more is changed in the guest before it can be written");
            self.late.push(entry);
        }
    }

    /// Announces a change, makes it and reports it. Nothing happens if it cannot be announced.
    fn change<T>(&mut self, wanted: Entry, made: impl FnOnce(&T) -> Entry, call: impl FnOnce(&mut D) -> Result<T>) -> Result<T> {
        self.announce(wanted)?;
        let result = call(&mut self.inner);
        self.report(result.as_ref().map_or(Entry::Nothing, made));
        result
    }
}

impl<D: VmiDriver + ?Sized> VmiInfo for Journaled<D> {
    fn info(&self) -> &VmInfo {
        self.inner.info()
    }

    fn caps(&self) -> Caps {
        self.inner.caps()
    }

    fn version(&self) -> String {
        self.inner.version()
    }

    fn console(&self) -> Option<Vec<u8>> {
        self.inner.console()
    }

    fn shutdown(&self) -> Option<Shutdown> {
        self.inner.shutdown()
    }
}

impl<D: VmiDriver + ?Sized> VmiRead for Journaled<D> {
    fn read(&self, pa: Pa, buf: &mut [u8]) -> Result<()> {
        self.inner.read(pa, buf)
    }
}

impl<D: VmiDriver + ?Sized> VmiWrite for Journaled<D> {
    fn write(&mut self, pa: Pa, bytes: &[u8]) -> Result<()> {
        self.inner.write(pa, bytes)
    }
}

impl<D: VmiDriver + ?Sized> VmiRegisters for Journaled<D> {
    fn registers(&self, vcpu: VcpuId) -> Result<Registers> {
        self.inner.registers(vcpu)
    }

    fn set_registers(&mut self, vcpu: VcpuId, registers: &Registers) -> Result<()> {
        self.inner.set_registers(vcpu, registers)
    }
}

impl<D: VmiDriver + ?Sized> VmiViews for Journaled<D> {
    fn create_view(&mut self, access: MemoryAccess) -> Result<View> {
        self.change(Entry::ViewWanted, |view| Entry::View(*view), |driver| driver.create_view(access))
    }

    fn destroy_view(&mut self, view: View) -> Result<()> {
        self.inner.destroy_view(view)?;
        self.report(Entry::ViewGone(view));
        Ok(())
    }

    fn switch_to_view(&mut self, view: View) -> Result<()> {
        self.inner.switch_to_view(view)
    }

    fn vcpu_view(&self, vcpu: VcpuId) -> Result<View> {
        self.inner.vcpu_view(vcpu)
    }

    fn remap(&mut self, view: View, gfn: Gfn, frame: Option<Gfn>) -> Result<()> {
        self.inner.remap(view, gfn, frame)
    }
}

impl<D: VmiDriver + ?Sized> VmiProtection for Journaled<D> {
    fn memory_access(&self, view: View, gfn: Gfn) -> Result<MemoryAccess> {
        self.inner.memory_access(view, gfn)
    }

    fn set_memory_access(&mut self, view: View, gfn: Gfn, access: MemoryAccess) -> Result<()> {
        self.inner.set_memory_access(view, gfn, access)
    }

    fn set_memory_access_multi(&mut self, view: View, pages: &[(Gfn, MemoryAccess)]) -> Result<()> {
        self.inner.set_memory_access_multi(view, pages)
    }
}

impl<D: VmiDriver + ?Sized> VmiFrames for Journaled<D> {
    fn allocate_frames(&mut self, count: usize) -> Result<Vec<Gfn>> {
        self.change(
            Entry::FramesWanted,
            |frames: &Vec<Gfn>| Entry::Frames(frames.clone()),
            |driver| driver.allocate_frames(count),
        )
    }

    fn free_frames(&mut self, frames: &[Gfn]) -> Result<()> {
        self.inner.free_frames(frames)?;
        self.report(Entry::FramesGone(frames.to_vec()));
        Ok(())
    }

    fn frames_in_use(&self) -> usize {
        self.inner.frames_in_use()
    }
}

impl<D: VmiDriver + ?Sized> VmiEvents for Journaled<D> {
    fn monitor(&mut self, monitor: Monitor, on: bool) -> Result<()> {
        if on {
            // Switching off what was never switched on is harmless, so one line before is enough.
            self.announce(Entry::Monitor(monitor))?;
            self.inner.monitor(monitor, true)
        } else {
            self.inner.monitor(monitor, false)?;
            self.report(Entry::MonitorGone(monitor));
            Ok(())
        }
    }

    fn wait(&mut self, timeout: Duration) -> Result<Wait> {
        let wait = self.inner.wait(timeout);
        self.journal.is_gone |= matches!(wait, Err(VmiError::DomainGone { .. }));
        wait
    }

    fn wait_sorting(&mut self, timeout: Duration, sort: &mut dyn FnMut(&Trap<'_>) -> OnTrap) -> Result<Wait> {
        let wait = self.inner.wait_sorting(timeout, sort);
        self.journal.is_gone |= matches!(wait, Err(VmiError::DomainGone { .. }));
        wait
    }

    fn respond(&mut self, vcpu: VcpuId, response: &VmiEventResponse) -> Result<()> {
        self.inner.respond(vcpu, response)
    }

    fn waker(&self) -> Arc<dyn Waker> {
        self.inner.waker()
    }

    fn readiness(&self) -> Result<Option<OwnedFd>> {
        self.inner.readiness()
    }
}

impl<D: VmiDriver + ?Sized> VmiInject for Journaled<D> {
    fn inject(&mut self, vcpu: VcpuId, injection: &Injection) -> Result<()> {
        self.inner.inject(vcpu, injection)
    }
}

impl<D: VmiDriver + ?Sized> VmiControl for Journaled<D> {
    fn pause(&mut self) -> Result<()> {
        self.change(Entry::PauseWanted, |()| Entry::Pause, D::pause)
    }

    fn resume(&mut self) -> Result<()> {
        self.change(Entry::ResumeWanted, |()| Entry::Resume, D::resume)
    }

    fn let_go(&mut self) -> Result<()> {
        // What could not be taken back is still to be repaired: journal and watchdog stay for it, or for another try.
        self.inner.let_go()?;
        if self.journal.end() {
            drop(self.watchdog.take());
        }
        Ok(())
    }
}

impl<D: VmiDriver + ?Sized> VmiRepair for Journaled<D> {
    fn additions(&self) -> Result<Additions> {
        self.inner.additions()
    }

    fn adopt(&mut self, left: &Additions, pauses: u32) -> Result<()> {
        self.inner.adopt(left, pauses)
    }

    fn release_held(&mut self) -> Result<usize> {
        self.inner.release_held()
    }
}
