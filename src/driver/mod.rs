//! What a driver offers: one trait a capability. Nothing here is shaped by one hypervisor.
//!
//! A driver is `Send` and used by one thread at a time. Physical addresses below [`VmInfo::memory_size`] are the guest's;
//! frames that [`VmiFrames::allocate_frames`] gives lie above and are read and written like the guest's own.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::addr::{Gfn, MemoryAccess, Pa, Va, VcpuId, View};
use crate::arch::amd64::{Injection, Register, Registers};
use crate::error::{Result, VmiError};
use crate::event::{VmiEvent, VmiEventResponse};

#[cfg(feature = "dump")]
pub mod dump;
#[cfg(feature = "emu")]
pub mod emu;
#[cfg(feature = "mock")]
pub mod mock;
#[cfg(feature = "emu")]
pub mod open;
#[cfg(all(feature = "emu", feature = "mock"))]
pub mod still;
#[cfg(feature = "xen")]
pub mod xen;

/// What a driver can do with the guest it is attached to. Found by probing, never by a version number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "a set of independent facts, each read by name")]
pub struct Caps {
    /// Guest memory can be written.
    pub write: bool,
    /// Registers can be read, and written where memory can be written.
    pub registers: bool,
    /// Views can be created, and pages remapped and protected in them.
    pub views: bool,
    /// Most views that can exist beside the default one.
    pub max_views: u16,
    /// Events can be monitored.
    pub events: bool,
    /// [`crate::event::EventAction::SingleStep`] works.
    pub single_step: bool,
    /// [`crate::event::EventAction::FastSingleStep`] works.
    pub fast_single_step: bool,
    /// [`crate::event::EventAction::Emulate`] works.
    pub emulate_read: bool,
    /// Exceptions and interrupts can be injected.
    pub injection: bool,
    /// The guest can be paused.
    pub pause: bool,
    /// [`VmiProtection::set_memory_access_multi`] is one call and not a loop.
    pub multi_access: bool,
}

impl Caps {
    /// An error if the guest can be looked at only. `capability` is what was wanted of `driver`.
    pub(crate) const fn check_events(&self, driver: &'static str, capability: &'static str) -> Result<()> {
        if self.events { Ok(()) } else { Err(VmiError::NotSupported { driver, capability }) }
    }
}

/// Facts about the guest that do not change while it lives.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VmInfo {
    /// The driver's name: `"emu"`, `"xen"`, `"dump"`, `"mock"`.
    pub driver: &'static str,
    /// The guest's name, as the user knows it.
    pub name: String,
    /// Bytes of guest-physical address space, from 0.
    pub memory_size: u64,
    /// How many vCPUs there are.
    pub vcpus: u16,
}

/// Which events a driver is to raise.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Monitor {
    /// INT3, wherever it is executed. Memory accesses and single-steps that were asked for need no monitor.
    Breakpoint,
    /// Writes to a control register.
    ControlRegister(crate::arch::amd64::ControlRegister),
    /// Writes to one model-specific register.
    Msr(u32),
    /// Debug exceptions (#DB) of the guest's own.
    Debug,
    /// CPUID.
    Cpuid,
    /// Loads and stores of GDTR, IDTR, LDTR and TR: LGDT, SGDT, LIDT, SIDT, LLDT, SLDT, LTR, STR.
    DescriptorAccess,
    /// Reads and writes of I/O ports: IN, OUT, INS, OUTS.
    PortIo,
    /// What the guest itself asks of whoever listens, where its hypervisor has a call for that.
    GuestRequest,
}

impl std::fmt::Display for Monitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use crate::arch::amd64::ControlRegister::{Cr0, Cr3, Cr4};
        f.write_str(match self {
            Self::Breakpoint => "int3",
            Self::ControlRegister(Cr0) => "cr0",
            Self::ControlRegister(Cr3) => "cr3",
            Self::ControlRegister(Cr4) => "cr4",
            Self::Msr(msr) => return write!(f, "msr {msr:#x}"),
            Self::Debug => "debug",
            Self::Cpuid => "cpuid",
            Self::DescriptorAccess => "descriptors",
            Self::PortIo => "ports",
            Self::GuestRequest => "requests",
        })
    }
}

/// Why [`VmiEvents::wait`] came back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(clippy::large_enum_variant, reason = "made once an event and consumed at once: a box would cost an allocation a hit")]
pub enum Wait {
    /// An event; its vCPU is held until [`VmiEvents::respond`].
    Event(VmiEvent),
    /// The time is over, or [`Waker::wake`] was called. The guest is fine.
    Timeout,
    /// Every vCPU has halted for good, or stands still because it is paused or held: waiting longer brings nothing.
    Idle,
    /// [`OnTrap::Take`] was said of a trap: its vCPU is held as by an event. Of [`VmiEvents::wait_sorting`] only.
    Taken,
}

/// What becomes of a [`Trap`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnTrap {
    /// It is an event.
    Raise,
    /// It is none: the vCPU goes on as if it had been answered with [`crate::event::EventAction::FastSingleStep`] in the default view.
    StepOver,
    /// All that is to be known of it is known: the vCPU is held until [`VmiEvents::respond`], as by the event that it would be.
    Take,
}

/// An INT3 (0xCC) that a vCPU has executed outside the default view, before it is an event.
#[derive(Clone, Copy)]
pub struct Trap<'a> {
    /// The vCPU.
    pub vcpu: VcpuId,
    /// The view it is in.
    pub view: View,
    /// The frame the instruction was fetched from, as the guest numbers it.
    pub gfn: Gfn,
    /// Where the instruction is.
    pub rip: Va,
    /// The root of the page tables.
    pub root: Pa,
    /// Its registers.
    pub registers: &'a dyn TrapRegisters,
}

/// The registers of a vCPU at a [`Trap`], read when they are asked for.
pub trait TrapRegisters {
    /// All of them, as an event would have them, to where they are wanted: they are many.
    fn read(&self, registers: &mut Registers);

    /// The same.
    fn all(&self) -> Registers {
        let mut registers = Registers::default();
        self.read(&mut registers);
        registers
    }

    /// One that can be had without the others; `None`: it is among [`TrapRegisters::all`].
    fn one(&self, register: Register) -> Option<u64>;
}

/// Wakes a thread that is in [`VmiEvents::wait`]. Usable from any thread and in a signal handler.
pub trait Waker: Send + Sync {
    /// Makes the wait that is under way, or the next one, return [`Wait::Timeout`] at once.
    fn wake(&self);
}

/// Who the guest is and what can be done with it.
pub trait VmiInfo {
    /// Facts about the guest.
    fn info(&self) -> &VmInfo;

    /// What the driver can do with it.
    fn caps(&self) -> Caps;

    /// What the driver stands on, as a user would name it in a report: `"unicorn 2.1.4"`, `"mock"`.
    fn version(&self) -> String;

    /// What the guest wrote to its debug console so far; `None` where the driver sees none.
    fn console(&self) -> Option<Vec<u8>> {
        None
    }

    /// How the guest has shut down, as far as the last wait saw; `None` while it has not, and where the driver is not told.
    fn shutdown(&self) -> Option<Shutdown> {
        None
    }
}

/// What a guest, or whoever manages it, gave as the reason when it was shut down (Xen's public/sched.h, "Reason codes").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shutdown {
    /// It has switched itself off.
    Poweroff,
    /// It wants to be started again.
    Reboot,
    /// It has been stopped to be saved or migrated.
    Suspend,
    /// It has ended in a fault, or says that it has.
    Crash,
    /// Its watchdog was not fed.
    Watchdog,
    /// It begins anew in the same memory, as into another kernel.
    SoftReset,
    /// A reason that is not known here.
    Other,
}

impl Shutdown {
    /// By its number.
    pub const fn from_code(code: u32) -> Self {
        match code {
            0 => Self::Poweroff,
            1 => Self::Reboot,
            2 => Self::Suspend,
            3 => Self::Crash,
            4 => Self::Watchdog,
            5 => Self::SoftReset,
            _ => Self::Other,
        }
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Poweroff => "poweroff",
            Self::Reboot => "reboot",
            Self::Suspend => "suspend",
            Self::Crash => "crash",
            Self::Watchdog => "watchdog",
            Self::SoftReset => "soft-reset",
            Self::Other => "other",
        }
    }
}

/// Reading guest-physical memory, as the default view shows it.
pub trait VmiRead {
    /// Fills `buf` from `pa` on. All or nothing: an address beyond memory is an error.
    fn read(&self, pa: Pa, buf: &mut [u8]) -> Result<()>;
}

/// Writing guest-physical memory of the default view, and frames.
pub trait VmiWrite {
    /// Writes all of `bytes` at `pa`, or nothing. Code the guest has run from there is forgotten.
    fn write(&mut self, pa: Pa, bytes: &[u8]) -> Result<()>;
}

/// Registers of a vCPU that is held or paused, or of one that runs (then a snapshot).
pub trait VmiRegisters {
    /// Reads the registers of `vcpu`.
    fn registers(&self, vcpu: VcpuId) -> Result<Registers>;

    /// Writes the registers of `vcpu`. Segment selectors and attributes, TR, GDTR and IDTR are left as they are.
    fn set_registers(&mut self, vcpu: VcpuId, registers: &Registers) -> Result<()>;
}

/// Views: alternative maps of guest-physical memory.
pub trait VmiViews {
    /// Makes a view that maps every page to itself with `access`.
    fn create_view(&mut self, access: MemoryAccess) -> Result<View>;

    /// Removes a view. An error if a vCPU is in it or it is the default one.
    fn destroy_view(&mut self, view: View) -> Result<()>;

    /// Puts every vCPU into `view`. A vCPU that is held by an event goes there too when it is answered without a view.
    fn switch_to_view(&mut self, view: View) -> Result<()>;

    /// The view `vcpu` is in.
    fn vcpu_view(&self, vcpu: VcpuId) -> Result<View>;

    /// Shows `frame` at `gfn` in `view`; `None` shows the page's own frame again. Access rights stay as they are.
    /// An error in the default view.
    fn remap(&mut self, view: View, gfn: Gfn, frame: Option<Gfn>) -> Result<()>;
}

/// Access rights of pages in views.
pub trait VmiProtection {
    /// The rights of `gfn` in `view`.
    fn memory_access(&self, view: View, gfn: Gfn) -> Result<MemoryAccess>;

    /// Sets the rights of `gfn` in `view`. They hold from the next instruction of every vCPU on.
    fn set_memory_access(&mut self, view: View, gfn: Gfn, access: MemoryAccess) -> Result<()>;

    /// Sets the rights of many pages in `view`: all or none of them.
    fn set_memory_access_multi(&mut self, view: View, pages: &[(Gfn, MemoryAccess)]) -> Result<()>;
}

/// Frames for shadow pages: memory that no guest-physical address of the default view shows.
pub trait VmiFrames {
    /// Takes `count` frames: all or none. Their content is undefined. They lie above guest memory, the lowest that are free, ascending.
    ///
    /// One call of the hypervisor where it has one for many frames.
    fn allocate_frames(&mut self, count: usize) -> Result<Vec<Gfn>>;

    /// Gives frames back: all or none. An error if one was not allocated or is there twice, or if a view still shows it.
    fn free_frames(&mut self, frames: &[Gfn]) -> Result<()>;

    /// Takes one frame.
    fn allocate_frame(&mut self) -> Result<Gfn> {
        let none = VmiError::Driver { op: "allocating a frame", errno: 0, detail: "the driver gave none".to_owned() };
        self.allocate_frames(1)?.pop().ok_or(none)
    }

    /// Gives one frame back.
    fn free_frame(&mut self, frame: Gfn) -> Result<()> {
        self.free_frames(&[frame])
    }

    /// How many frames are taken.
    fn frames_in_use(&self) -> usize;
}

/// Events.
pub trait VmiEvents {
    /// Switches the raising of one kind of event on or off. Switching on twice is fine.
    fn monitor(&mut self, monitor: Monitor, on: bool) -> Result<()>;

    /// Lets the guest run until an event, until `timeout` is over or until it is woken.
    ///
    /// A vCPU whose event is not answered yet stands still meanwhile; the others run.
    fn wait(&mut self, timeout: Duration) -> Result<Wait>;

    /// As [`Self::wait`], with INT3s put to `sort` before they are events: most need none. A driver need not ask.
    fn wait_sorting(&mut self, timeout: Duration, sort: &mut dyn FnMut(&Trap<'_>) -> OnTrap) -> Result<Wait> {
        let _ = sort;
        self.wait(timeout)
    }

    /// Answers the event that holds `vcpu`. Exactly one answer an event; on an error the event is still unanswered.
    fn respond(&mut self, vcpu: VcpuId, response: &VmiEventResponse) -> Result<()>;

    /// What wakes a [`VmiEvents::wait`] from another thread.
    fn waker(&self) -> Arc<dyn Waker>;

    /// A descriptor that can be read from while [`VmiEvents::wait`] has something new to tell, or was woken: for whoever waits for other
    /// things too, and then calls `wait` without a timeout until that has nothing more. `None`: the guest runs inside `wait` only.
    ///
    /// # Errors
    /// The system's.
    fn readiness(&self) -> Result<Option<OwnedFd>> {
        Ok(None)
    }
}

/// Delivering interrupts and exceptions.
pub trait VmiInject {
    /// Delivers `injection` to `vcpu` before its next instruction. If the vCPU is held: once it is answered.
    fn inject(&mut self, vcpu: VcpuId, injection: &Injection) -> Result<()>;
}

/// Holding the whole guest.
pub trait VmiControl {
    /// Holds every vCPU. Counted: as many [`VmiControl::resume`] let it go on.
    fn pause(&mut self) -> Result<()>;

    /// Takes back one [`VmiControl::pause`]. An error if there is none.
    fn resume(&mut self) -> Result<()>;

    /// Lets go of the guest for good: whatever the driver has added to it is taken back, and it runs on unobserved. Everything is tried, and an
    /// error says what is left behind. Twice is fine; so is dropping the driver without it, which does the same and logs what is left.
    fn let_go(&mut self) -> Result<()> {
        Ok(())
    }
}

/// What a guest has that it was not made with, whoever added it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Additions {
    /// The views beside the default one, ascending.
    pub views: Vec<View>,
    /// The frames above guest memory, ascending.
    pub frames: Vec<Gfn>,
    /// Whether the guest is held as a whole.
    pub is_paused: bool,
}

/// Cleaning up: at the end of a session, and after one that ended without a word.
pub trait VmiRepair {
    /// What the guest has now. Changes nothing.
    fn additions(&self) -> Result<Additions>;

    /// Makes the views and frames of `left` this driver's own, so that they can be removed in the ordinary way, as if it had made
    /// them; what it has already is no error. `pauses` counts what [`VmiControl::resume`] may take back.
    fn adopt(&mut self, left: &Additions, pauses: u32) -> Result<()>;

    /// Lets every vCPU go on that stands still for an event or steps: in the default view, at the instruction it is at, with no
    /// step pending. Returns how many were held.
    fn release_held(&mut self) -> Result<usize>;
}

/// Everything together: what the tap works on. Implemented by itself for whatever has all the parts.
pub trait VmiDriver:
    VmiInfo
    + VmiRead
    + VmiWrite
    + VmiRegisters
    + VmiViews
    + VmiProtection
    + VmiFrames
    + VmiEvents
    + VmiInject
    + VmiControl
    + VmiRepair
    + Send
{
}

impl<T> VmiDriver for T where
    T: VmiInfo
        + VmiRead
        + VmiWrite
        + VmiRegisters
        + VmiViews
        + VmiProtection
        + VmiFrames
        + VmiEvents
        + VmiInject
        + VmiControl
        + VmiRepair
        + Send
{
}
