//! The embedded driver: x86-64 guests of one's own on the Unicorn engine, with views, events and everything a hypervisor offers.
//!
//! The engine's library is opened at run time from the PyPI package `unicorn` (or wherever the caller says). It runs
//! instructions; this driver does the rest: address translation with views, exceptions and interrupts, single-stepping,
//! several vCPUs, virtual time. Guests are ELF images with the boot contract of docs/guests.md.
//!
//! All vCPUs run on the calling thread, in turns that are counted in basic blocks, so a run is repeatable. Time stands still
//! for the guest while it is held.

mod abi;
mod answer;
mod apic;
mod asks;
mod boot;
mod deliver;
mod direct;
mod hooks;
mod insn;
mod layout;
mod memory;
mod reg;
mod resident;
mod run;
mod step;
mod sys;
mod system;
mod vcpu;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::addr::{Gfn, MemoryAccess, PAGE_SHIFT, Pa, VcpuId, View};
use crate::arch::amd64::{Injection, Registers};
use crate::driver::{
    Additions, Caps, Monitor, OnTrap, Trap, VmInfo, VmiControl, VmiEvents, VmiFrames, VmiInfo, VmiInject, VmiProtection, VmiRead,
    VmiRegisters, VmiRepair, VmiViews, VmiWrite, Wait, Waker,
};
use crate::error::{Result, VmiError};
use crate::event::VmiEventResponse;
use crate::image::Image;

pub use boot::{BootOptions, DEFAULT_MEMORY, MAX_VCPUS};
use memory::Memory;
use run::Machine;
pub use run::Steps;
use sys::{Confined, Library};
use vcpu::{Held, State};

/// Frames for shadow pages: 1 GiB of address space, which costs memory only when it is used.
const POOL_FRAMES: u64 = 1 << 18;
/// View numbers are 16 bits wide, and the default view has one.
const MAX_VIEWS: u16 = u16::MAX;

/// What is known of an engine library without starting a guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EngineInfo {
    /// Major, minor and patch number.
    pub version: (u32, u32, u32),
    /// Bytes of one saved processor state.
    pub context_size: usize,
}

/// Opens the library at `path`, checks its version and calibrates it.
///
/// # Errors
/// [`VmiError::Image`] if it is no Unicorn library, too old, or keeps its state in a way this driver does not know.
pub fn probe(path: &Path) -> Result<EngineInfo> {
    let library = Library::open(path)?;
    let layout = layout::calibrate(&library)?;
    Ok(EngineInfo { version: library.version(), context_size: layout.context_size })
}

/// The embedded driver with one guest.
pub struct EmuDriver {
    machine: Confined<Machine>,
    info: VmInfo,
    version: (u32, u32, u32),
}

impl std::fmt::Debug for EmuDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmuDriver").field("info", &self.info).finish_non_exhaustive()
    }
}

impl EmuDriver {
    /// Opens the engine's library and boots `image`. Nothing runs until the first [`VmiEvents::wait`].
    ///
    /// # Errors
    /// The library's, as [`probe`]; [`VmiError::InvalidArgument`] for options out of range; [`VmiError::Image`] for an image
    /// that does not fit memory or reaches into the loader's range.
    pub fn boot(library: &Path, name: &str, image: &Image<'_>, options: &BootOptions) -> Result<Self> {
        options.check()?;
        let library = Library::open(library)?;
        let layout = layout::calibrate(&library)?;
        let memory = Memory::new(options.memory >> PAGE_SHIFT, POOL_FRAMES)?;
        let mut machine = Machine::new(&library, memory)?;
        boot::boot(&mut machine, layout, name, image, options)?;
        let info = VmInfo { driver: "emu", name: name.to_owned(), memory_size: options.memory, vcpus: options.vcpus };
        Ok(Self { machine: Confined(machine), info, version: library.version() })
    }

    fn machine(&self) -> &Machine {
        &self.machine.0
    }

    /// Virtual time: how many basic blocks all vCPUs have run together.
    pub fn virtual_time(&self) -> u64 {
        self.machine().now()
    }

    /// How many instructions were stepped since the start, over breakpoints and otherwise.
    pub fn steps(&self) -> Steps {
        self.machine().steps
    }

    /// Whether every vCPU has stopped for good: halted with interrupts off, or shut down by a triple fault.
    pub fn has_halted(&self) -> bool {
        let stopped = |vcpu: &vcpu::Vcpu| match vcpu.state {
            State::Running => false,
            State::Halted => !vcpu.takes_interrupts() || vcpu.apic.due().is_none(),
            State::Shutdown => true,
        };
        self.machine().vcpus.iter().all(stopped)
    }
}

impl VmiInfo for EmuDriver {
    fn info(&self) -> &VmInfo {
        &self.info
    }

    fn caps(&self) -> Caps {
        Caps {
            write: true,
            registers: true,
            views: true,
            max_views: MAX_VIEWS,
            events: true,
            single_step: true,
            fast_single_step: true,
            emulate_read: true,
            injection: true,
            pause: true,
            multi_access: true,
        }
    }

    fn version(&self) -> String {
        let (major, minor, patch) = self.version;
        format!("unicorn {major}.{minor}.{patch}")
    }

    /// At most 1 MiB; what the guest writes after that is dropped.
    fn console(&self) -> Option<Vec<u8>> {
        Some(self.machine().devices.console.borrow().clone())
    }
}

impl VmiRead for EmuDriver {
    fn read(&self, pa: Pa, buf: &mut [u8]) -> Result<()> {
        self.machine().memory.read(pa, buf)
    }
}

impl VmiWrite for EmuDriver {
    fn write(&mut self, pa: Pa, bytes: &[u8]) -> Result<()> {
        self.machine().memory.write(pa, bytes)
    }
}

impl VmiRegisters for EmuDriver {
    fn registers(&self, vcpu: VcpuId) -> Result<Registers> {
        Ok(self.machine().vcpu(vcpu.0.into())?.registers())
    }

    fn set_registers(&mut self, vcpu: VcpuId, registers: &Registers) -> Result<()> {
        let machine = &mut self.machine.0;
        machine.vcpu_mut(vcpu.0.into())?.set_registers(registers);
        machine.set_mode_registers(vcpu.0.into(), registers.cr0, registers.cr4)
    }
}

impl VmiViews for EmuDriver {
    fn create_view(&mut self, access: MemoryAccess) -> Result<View> {
        self.machine().memory.create_view(access)
    }

    fn destroy_view(&mut self, view: View) -> Result<()> {
        let machine = self.machine();
        if view == View::DEFAULT {
            return Err(VmiError::DefaultView { op: "destroying a view" });
        }
        let needs = |vcpu: &vcpu::Vcpu| vcpu.view == view || vcpu.step.is_some_and(|step| step.view == view || step.back == view);
        if let Some(vcpu) = machine.vcpus.iter().position(needs) {
            return Err(VmiError::Driver {
                op: "destroying a view",
                errno: 16,
                detail: format!("vCPU {vcpu} is in view {view}"),
            });
        }
        machine.memory.destroy_view(view)
    }

    fn switch_to_view(&mut self, view: View) -> Result<()> {
        if !self.machine().memory.has_view(view) {
            return Err(VmiError::ViewNotFound { view });
        }
        for vcpu in &mut self.machine.0.vcpus {
            vcpu.view = view;
            // One that is about to step comes back there.
            if let Some(step) = &mut vcpu.step {
                step.back = view;
            }
        }
        Ok(())
    }

    fn vcpu_view(&self, vcpu: VcpuId) -> Result<View> {
        Ok(self.machine().vcpu(vcpu.0.into())?.view)
    }

    fn remap(&mut self, view: View, gfn: Gfn, frame: Option<Gfn>) -> Result<()> {
        self.machine().memory.remap(view, gfn, frame)
    }
}

impl VmiProtection for EmuDriver {
    fn memory_access(&self, view: View, gfn: Gfn) -> Result<MemoryAccess> {
        self.machine().memory.access(view, gfn)
    }

    fn set_memory_access(&mut self, view: View, gfn: Gfn, access: MemoryAccess) -> Result<()> {
        self.machine().memory.set_access(view, gfn, access)
    }

    fn set_memory_access_multi(&mut self, view: View, pages: &[(Gfn, MemoryAccess)]) -> Result<()> {
        let memory = &self.machine().memory;
        // All are looked at before any is changed.
        for (gfn, _) in pages {
            memory.access(view, *gfn)?;
        }
        pages.iter().try_for_each(|(gfn, access)| memory.set_access(view, *gfn, *access))
    }
}

impl VmiFrames for EmuDriver {
    fn allocate_frames(&mut self, count: usize) -> Result<Vec<Gfn>> {
        self.machine().memory.allocate_frames(count)
    }

    fn free_frames(&mut self, frames: &[Gfn]) -> Result<()> {
        self.machine().memory.free_frames(frames)
    }

    fn frames_in_use(&self) -> usize {
        self.machine().memory.frames_in_use()
    }
}

impl VmiEvents for EmuDriver {
    fn monitor(&mut self, monitor: Monitor, on: bool) -> Result<()> {
        if matches!(monitor, Monitor::DescriptorAccess | Monitor::PortIo | Monitor::GuestRequest) {
            return Err(VmiError::NotSupported {
                driver: "emu",
                capability: "monitoring descriptor tables, I/O ports, and requests of the guest",
            });
        }
        self.machine.0.monitors.set(monitor, on);
        Ok(())
    }

    fn wait(&mut self, timeout: Duration) -> Result<Wait> {
        self.wait_sorting(timeout, &mut |_| OnTrap::Raise)
    }

    fn wait_sorting(&mut self, timeout: Duration, sort: &mut dyn FnMut(&Trap<'_>) -> OnTrap) -> Result<Wait> {
        self.machine.0.wait(timeout, sort)
    }

    fn respond(&mut self, vcpu: VcpuId, response: &VmiEventResponse) -> Result<()> {
        self.machine.0.respond(vcpu, response)
    }

    fn waker(&self) -> Arc<dyn Waker> {
        Arc::<run::Bell>::clone(&self.machine().bell)
    }
}

impl VmiInject for EmuDriver {
    fn inject(&mut self, vcpu: VcpuId, injection: &Injection) -> Result<()> {
        let target = self.machine.0.vcpu_mut(vcpu.0.into())?;
        if target.injection.is_some() {
            let detail = format!("vCPU {vcpu} has an injection that is not delivered yet");
            return Err(VmiError::Driver { op: "injecting", errno: 16, detail });
        }
        target.injection = Some(*injection);
        Ok(())
    }
}

impl VmiControl for EmuDriver {
    fn pause(&mut self) -> Result<()> {
        self.machine.0.pauses += 1;
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        let machine = &mut self.machine.0;
        machine.pauses = machine.pauses.checked_sub(1).ok_or_else(|| VmiError::Driver {
            op: "resuming the guest",
            errno: 22,
            detail: "it is not paused".to_owned(),
        })?;
        Ok(())
    }
}

impl VmiRepair for EmuDriver {
    fn additions(&self) -> Result<Additions> {
        let machine = self.machine();
        let frames = machine.memory.taken_frames().filter(|frame| !machine.scratch.contains(frame)).collect();
        Ok(Additions { views: machine.memory.views(), frames, is_paused: machine.pauses > 0 })
    }

    /// The guest lives in this driver: everything is its own already.
    fn adopt(&mut self, _: &Additions, _: u32) -> Result<()> {
        Ok(())
    }

    fn release_held(&mut self) -> Result<usize> {
        self.machine.0.release_held()
    }
}

impl Drop for EmuDriver {
    fn drop(&mut self) {
        let held = self.machine().vcpus.iter().filter(|vcpu| vcpu.held != Held::No).count();
        if held > 0 {
            log::debug!("the embedded guest {:?} ends with {held} events unanswered", self.info.name);
        }
    }
}
