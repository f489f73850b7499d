//! Monitors: what a vCPU announces before it does it, such as a write to a control register.

use crate::addr::{MemoryAccess, Pa, View};
use crate::arch::amd64::ControlRegister;
use crate::driver::{Monitor, VmiDriver};
use crate::error::{Result, VmiError};
use crate::event::{EventReason, VmiEvent};
use crate::undo::Left;

use super::event_loop::Sorted;
use super::pending::Course;
use super::{Session, TapId};

/// How many MSRs one tap can be for.
pub const MAX_MSRS: usize = 8;

/// Events that a tap is for, beside those of addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "a set of independent facts, each read by name")]
pub struct EventSet {
    /// Writes of CR0, of CR3 and of CR4.
    pub registers: [bool; 3],
    /// Writes of these model-specific registers.
    pub msrs: [Option<u32>; MAX_MSRS],
    /// Debug exceptions of the guest's own.
    pub debug: bool,
    /// Executions of CPUID.
    pub cpuid: bool,
    /// Loads and stores of GDTR, IDTR, LDTR and TR.
    pub descriptors: bool,
    /// Reads and writes of I/O ports.
    pub ports: bool,
    /// Requests of the guest to whoever listens.
    pub requests: bool,
}

impl std::fmt::Display for EventSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.monitors().enumerate().try_for_each(|(at, monitor)| write!(f, "{}{monitor}", if at > 0 { " + " } else { "" }))
    }
}

impl EventSet {
    /// What the driver has to announce for it, each once.
    pub fn monitors(&self) -> impl Iterator<Item = Monitor> {
        let registers = [ControlRegister::Cr0, ControlRegister::Cr3, ControlRegister::Cr4].map(Monitor::ControlRegister);
        let single = [Monitor::Debug, Monitor::Cpuid, Monitor::DescriptorAccess, Monitor::PortIo, Monitor::GuestRequest];
        let on = self.registers.into_iter().chain([self.debug, self.cpuid, self.descriptors, self.ports, self.requests]);
        let msrs = self.msrs;
        let msrs = (0..).zip(msrs).filter_map(move |(at, msr)| {
            let is_first = !msrs.iter().take(at).any(|before| *before == msr);
            msr.filter(|_| is_first).map(Monitor::Msr)
        });
        registers.into_iter().chain(single).zip(on).filter_map(|(monitor, on)| on.then_some(monitor)).chain(msrs)
    }

    /// Whether an event is one of it.
    fn contains(&self, reason: &EventReason) -> bool {
        let of_register = |register| match register {
            ControlRegister::Cr0 => 0,
            ControlRegister::Cr3 => 1,
            ControlRegister::Cr4 => 2,
        };
        match *reason {
            EventReason::WriteControlRegister { register, .. } => self.registers.get(of_register(register)) == Some(&true),
            EventReason::WriteMsr { msr, .. } => self.msrs.contains(&Some(msr)),
            EventReason::DebugException { .. } => self.debug,
            EventReason::Cpuid { .. } => self.cpuid,
            EventReason::DescriptorAccess { .. } => self.descriptors,
            EventReason::PortIo { .. } => self.ports,
            EventReason::GuestRequest => self.requests,
            EventReason::Breakpoint { .. } | EventReason::MemoryAccess { .. } | EventReason::SingleStep { .. } => false,
        }
    }
}

/// Whether the effect of an event can be left out.
pub(super) const fn can_be_denied(reason: &EventReason) -> bool {
    matches!(reason, EventReason::WriteControlRegister { .. } | EventReason::WriteMsr { .. } | EventReason::DebugException { .. })
}

impl<D: VmiDriver + ?Sized> Session<D> {
    /// Whether somebody needs what `monitor` announces.
    fn needs(&self, monitor: Monitor) -> bool {
        let is_root = monitor == Monitor::ControlRegister(ControlRegister::Cr3);
        is_root && self.tracks_roots || self.monitors.iter().any(|(_, set)| set.monitors().any(|each| each == monitor))
    }

    /// Has the driver announce something, or no longer, unless somebody else needs it: called before the new need is noted and after
    /// the old one is forgotten.
    pub(super) fn announce(&mut self, monitor: Monitor, on: bool) -> Result<()> {
        if self.needs(monitor) { Ok(()) } else { self.vmi.driver_mut().monitor(monitor, on) }
    }

    /// Has the events of a set announced, or no longer, as far as nobody else needs them; on an error all is as before.
    fn switch_monitors(&mut self, set: EventSet, on: bool) -> Result<()> {
        let mut done = Vec::new();
        for monitor in set.monitors() {
            if let Err(cause) = self.announce(monitor, on) {
                let mut left = Left::default();
                for monitor in done {
                    left.note(self.announce(monitor, !on), || format!("{} monitor {monitor}", if on { "the" } else { "no" }));
                }
                return Err(left.after(cause));
            }
            done.push(monitor);
        }
        Ok(())
    }

    /// Has all events of a set announced, or on an error none that was not before.
    pub(super) fn start_monitors(&mut self, tap: TapId, set: EventSet) -> Result<()> {
        self.switch_monitors(set, true)?;
        self.monitors.push((tap, set));
        Ok(())
    }

    /// Has those events no longer announced that nobody else needs, or on an error all as before.
    pub(super) fn stop_monitors(&mut self, tap: TapId) -> Result<()> {
        let Some(at) = self.monitors.iter().position(|(id, _)| *id == tap) else { return Ok(()) };
        let (_, set) = self.monitors.remove(at);
        self.switch_monitors(set, false).inspect_err(|_| self.monitors.insert(at, (tap, set)))
    }

    /// At the end of the session: what could not be switched off is tried again the next time.
    pub(super) fn end_monitors(&mut self, left: &mut Left) {
        let mut on: Vec<Monitor> = Vec::new();
        let roots = self.tracks_roots.then_some(Monitor::ControlRegister(ControlRegister::Cr3));
        for monitor in self.monitors.iter().flat_map(|(_, set)| set.monitors()).chain(roots) {
            if !on.contains(&monitor) {
                on.push(monitor);
            }
        }
        let mut stays = false;
        for monitor in on {
            stays |= left.note(self.vmi.driver_mut().monitor(monitor, false), || format!("the monitor {monitor}"));
        }
        if !stays {
            self.tracks_roots = false;
            self.monitors.clear();
        }
    }

    /// Something was announced: whether somebody wants it.
    pub(super) fn sort_announced(&mut self, event: &VmiEvent, home: View) -> Sorted {
        let Self { monitors, owners, .. } = self;
        owners.extend(monitors.iter().filter(|(_, set)| set.contains(&event.reason)).map(|(tap, _)| *tap));
        if owners.is_empty() {
            return Sorted::Answer(Course::Retry);
        }
        self.count(event, home, Course::Retry, (event.registers.rip(), Pa(0)), MemoryAccess::NONE)
    }
}

/// Refuses a set without events.
pub(super) fn check(set: &EventSet) -> Result<()> {
    if set.monitors().next().is_some() {
        return Ok(());
    }
    Err(VmiError::InvalidArgument { what: "events", reason: "at least one kind of event is needed".to_owned() })
}
