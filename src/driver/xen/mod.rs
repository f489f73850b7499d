//! The Xen driver: domains of a Xen machine, tapped from its control domain through altp2m views and the vm_event ring.
//!
//! One binary serves Xen 4.14 to 4.22; `abi.rs` holds what differs. Xen's libraries are opened at run time by the crate xen-sys, and the only
//! unsafe code is there. A hit costs one VM exit, one message each way and one hypercall, the notify.

mod abi;
mod attach;
pub mod bell;
mod codec;
mod end;
mod frames;
mod gone;
mod insn;
mod monitors;
mod pages;
mod repair;
pub mod ring;
mod run;
mod step;
mod views;

use std::cell::{Cell, OnceCell};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use rustc_hash::FxHashSet;
use rustix::event::{EventfdFlags, eventfd};
use xen_sys::types::{NO_ERROR_CODE, event_type, monitor_event};
use xen_sys::{DeviceModel, EventChannels, Xen, errno};

use super::{
    Caps, Monitor, Shutdown, VmInfo, VmiControl, VmiEvents, VmiFrames, VmiInfo, VmiInject, VmiRead, VmiRegisters, VmiWrite, Wait,
    Waker,
};
use crate::addr::{Gfn, PAGE_SHIFT, PAGE_SIZE, Pa, VcpuId};
use crate::arch::amd64::{ControlRegister, Injection, InjectionKind, Registers, vector};
use crate::error::{Result, VmiError};
use crate::event::{VmiEvent, VmiEventResponse};

pub use abi::{Abi, Layout, MAX_EVENT};
pub use attach::{DomainSummary, HostSummary, Obstacle, host, identity};
use bell::Bell;
use end::left_behind;
use frames::Frames;
use gone::failed;
use monitors::monitored;
use pages::Pages;
use ring::Ring;
use run::Vcpu;
pub use step::Stepping;
use views::ViewBook;

/// Names the ways of stepping that are used: `auto` (the cheapest right one, and the default), `fast` (not Xen's emulator), `toggle` (nor fast
/// steps). For tests, and for whoever suspects one of them.
pub const STEPPING_VARIABLE: &str = "VMITAP_XEN_STEPPING";

/// How a domain is attached to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct XenOptions {
    /// The libxenctrl to use, by its path; the environment's [`xen_sys::LIBRARY_VARIABLE`], or the host's own, if not given.
    pub library: Option<PathBuf>,
    /// A domain has one listener at a time. With this the one there is loses its place: right only if it has died.
    pub take_over: bool,
    /// Which ways of stepping are used.
    pub stepping: Stepping,
}

impl XenOptions {
    /// What the environment says.
    ///
    /// # Errors
    /// [`VmiError::InvalidArgument`] if [`STEPPING_VARIABLE`] is none of its values.
    pub fn from_environment() -> Result<Self> {
        let name = std::env::var(STEPPING_VARIABLE).unwrap_or_default();
        let reason = || format!("{name:?} is none of auto, fast, toggle");
        let stepping =
            Stepping::parse(&name).ok_or_else(|| VmiError::InvalidArgument { what: STEPPING_VARIABLE, reason: reason() })?;
        Ok(Self { stepping, ..Self::default() })
    }
}

/// What a request of the ring asks for, if it is an event that is handed out. Its bytes may be anything.
pub fn decode(request: &[u8; MAX_EVENT], layout: Layout) -> Option<VmiEvent> {
    match codec::Request::new(request, layout).asked() {
        codec::Asked::Event(event) => Some(event),
        _ => None,
    }
}

/// A domain of a Xen machine.
#[expect(clippy::struct_excessive_bools, reason = "each is one thing that was done to the domain, and is undone by itself")]
pub struct XenDriver {
    xen: Xen,
    pages: Pages,
    events: EventChannels,
    devices: DeviceModel,
    domain: u32,
    info: VmInfo,
    abi: Abi,
    /// Bits of what can be monitored.
    bits: u32,
    ring: Option<Ring>,
    /// Something of ours is in the domain, or may be.
    is_in_it: bool,
    /// Xen has a ring of ours.
    is_listening: bool,
    /// Our port of the event channel.
    port: Option<u32>,
    /// There are answers in the ring of which Xen was not told.
    untold: bool,
    /// We switched views on.
    switched_on: bool,
    /// Register writes wait for their answer.
    decides_writes: bool,
    /// Bits of CR0, CR3 and CR4 whose changes alone are not told.
    ignored_bits: [u64; 3],
    vcpus: Vec<Vcpu>,
    /// vCPUs with an event that was not handed out yet.
    ready: VecDeque<VcpuId>,
    views: BTreeMap<u16, ViewBook>,
    frames: Frames,
    monitors: FxHashSet<Monitor>,
    pauses: u32,
    /// A pause of the driver's own could not be taken back yet.
    owes_unpause: Cell<bool>,
    bell: Arc<Bell>,
    stepping: Stepping,
    /// Another program listened before us, and may have left vCPUs that stand still.
    has_deposed: bool,
    /// When the domain was last looked at.
    looked_at: Instant,
    /// How the domain has shut down, while it has.
    shutdown: Option<Shutdown>,
    /// Why the domain is gone, once it is.
    gone: OnceCell<String>,
    /// Why the ring cannot be used any more, although the domain may be there.
    broken: Option<String>,
    /// It has let go of the domain, or tried to.
    has_ended: bool,
}

impl std::fmt::Debug for XenDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("XenDriver").field("domain", &self.domain).field("info", &self.info).finish_non_exhaustive()
    }
}

impl XenDriver {
    /// Attaches to a domain, by its number or its name, and begins to listen. Its vCPUs go on running, in the default view.
    ///
    /// # Errors
    /// [`VmiError::Attach`] with what is in the way and what to do about it; everything is as it was then.
    pub fn attach(which: &str, options: &XenOptions) -> Result<Self> {
        let target = format!("xen:{which}");
        let refuse = |obstacle: Obstacle| obstacle.error(&target);
        let call = |error: xen_sys::Error| attach::explain(&error).error(&target);
        let xen = attach::open_xen(options.library.as_deref()).map_err(refuse)?;
        let abi = attach::find_abi(xen.control()).map_err(refuse)?;
        let (found, name) = attach::find_domain(&xen, which).map_err(refuse)?;
        let bits = attach::check(xen.control(), &found).map_err(refuse)?;
        let (domain, vcpus) = (u32::from(found.domain), attach::vcpus(&found));
        let highest = xen.control().maximum_gpfn(domain).map_err(call)?;
        let events = xen.event_channels().map_err(call)?;
        let devices = xen.device_model().map_err(call)?;
        let pages = Pages::new(xen.foreign_memory().map_err(call)?, domain);
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|error| VmiError::Driver {
            op: "eventfd",
            errno: error.raw_os_error(),
            detail: error.to_string(),
        })?;
        let info = VmInfo { driver: "xen", name, memory_size: (highest + 1) << PAGE_SHIFT, vcpus };
        let frames = Frames::new(domain, highest + 1, found.max_pages.saturating_mul(PAGE_SIZE >> 10));
        let mut driver = Self {
            xen,
            pages,
            events,
            devices,
            domain,
            info,
            abi,
            bits,
            ring: None,
            is_in_it: false,
            is_listening: false,
            port: None,
            untold: false,
            switched_on: false,
            decides_writes: false,
            ignored_bits: [0; 3],
            vcpus: (0..vcpus).map(|_| Vcpu::default()).collect(),
            ready: VecDeque::new(),
            views: BTreeMap::new(),
            frames,
            monitors: FxHashSet::default(),
            pauses: 0,
            owes_unpause: Cell::new(false),
            bell: Arc::new(Bell::new(AtomicBool::new(false), fd)),
            stepping: options.stepping,
            has_deposed: options.take_over,
            looked_at: Instant::now(),
            shutdown: None,
            gone: OnceCell::new(),
            broken: None,
            has_ended: false,
        };
        if options.take_over {
            driver.depose().map_err(call)?;
        }
        // Whatever fails from here on, dropping the driver takes back what was done.
        driver.listen().map_err(refuse)?;
        Ok(driver)
    }

    fn listen(&mut self) -> Result<(), Obstacle> {
        let explain = |error: xen_sys::Error| attach::explain(&error);
        let control = self.xen.control();
        let (page, port) = control
            .monitor_enable(self.domain, self.pages.foreign())
            .map_err(|error| attach::cannot_listen(&error, self.domain))?;
        self.ring = Some(Ring::new(page, self.abi.layout));
        (self.is_in_it, self.is_listening) = (true, true);
        self.port = Some(self.events.bind_interdomain(self.domain, port).map_err(explain)?);
        self.switched_on = attach::switch_views_on(control, self.domain)?;
        // Up to 4.18 a fast step never ends without this monitor.
        monitored(control.monitor_singlestep(self.domain, true)).map_err(explain)?;
        if self.knows(monitor_event::EMUL_UNIMPLEMENTED) {
            monitored(control.monitor_emul_unimplemented(self.domain, true)).map_err(explain)?;
        }
        Ok(())
    }

    /// Whether this kind of event can be had.
    const fn knows(&self, bit: u32) -> bool {
        self.bits & (1 << bit) != 0
    }

    /// Map calls of the guest's memory so far: what a cache of mappings is judged by.
    pub fn maps(&self) -> u64 {
        self.pages.maps()
    }

    /// Has VM exits of every kind told without holding the vCPU, so that they can be counted: they are answered and not handed out.
    ///
    /// # Errors
    /// [`VmiError::NotSupported`] before Xen 4.17.
    pub fn count_exits(&mut self, on: bool) -> Result<()> {
        self.xen.control().monitor_vmexit(self.domain, on, false).map_err(|error| match error.errno {
            errno::ENOSYS => VmiError::NotSupported { driver: "xen", capability: "counting VM exits" },
            _ => self.failed(&error),
        })
    }

    /// Writes to a control register that change nothing but `bits` are not told from the next [`VmiEvents::monitor`] of it on. 0, as it begins:
    /// every change is (`hvm_monitor_cr` in arch/x86/hvm/monitor.c).
    pub const fn ignore_bits(&mut self, register: ControlRegister, bits: u64) {
        let [cr0, cr3, cr4] = &mut self.ignored_bits;
        match register {
            ControlRegister::Cr0 => *cr0 = bits,
            ControlRegister::Cr3 => *cr3 = bits,
            ControlRegister::Cr4 => *cr4 = bits,
        }
    }

    fn vcpu(&self, vcpu: VcpuId) -> Result<&Vcpu> {
        let count = self.info.vcpus;
        self.vcpus.get(usize::from(vcpu.0)).ok_or(VmiError::VcpuNotFound { vcpu, count })
    }

    fn vcpu_mut(&mut self, vcpu: VcpuId) -> Result<&mut Vcpu> {
        let count = self.info.vcpus;
        self.vcpus.get_mut(usize::from(vcpu.0)).ok_or(VmiError::VcpuNotFound { vcpu, count })
    }

    /// An error unless all of the range is guest memory or frames that are taken.
    fn check_range(&self, pa: Pa, len: u64) -> Result<()> {
        let end = Pa(self.info.memory_size);
        let out = || VmiError::OutOfRange { pa, len, end };
        let last = pa.checked_add(len.saturating_sub(1)).ok_or_else(out)?;
        if last < end || len == 0 {
            return Ok(());
        }
        let is_ours = (pa.gfn().0..=last.gfn().0).all(|frame| self.frames.is_used(Gfn(frame)));
        if is_ours { Ok(()) } else { Err(out()) }
    }

    /// An error once the domain is gone, or the ring to it is, or the session has ended.
    fn check_alive(&self) -> Result<()> {
        if self.has_ended && self.gone.get().is_none() {
            return Err(VmiError::DomainGone { reason: "the session has ended".to_owned() });
        }
        match self.gone.get().or(self.broken.as_ref()) {
            None => Ok(()),
            Some(reason) => Err(VmiError::DomainGone { reason: reason.clone() }),
        }
    }

    /// The registers of a vCPU, all of them, from its context.
    fn context_registers(&self, vcpu: VcpuId) -> Result<Registers> {
        let cpu = self.xen.control().hvm_cpu(self.domain, vcpu.0).map_err(|error| self.failed(&error))?;
        Ok(codec::registers_of(&cpu))
    }
}

impl VmiInfo for XenDriver {
    fn info(&self) -> &VmInfo {
        &self.info
    }

    fn caps(&self) -> Caps {
        Caps {
            write: true,
            registers: true,
            views: true,
            max_views: self.abi.max_views(),
            events: true,
            single_step: true,
            fast_single_step: true,
            emulate_read: self.knows(monitor_event::EMUL_UNIMPLEMENTED),
            injection: true,
            pause: true,
            multi_access: true,
        }
    }

    fn version(&self) -> String {
        attach::version(&self.abi)
    }

    fn shutdown(&self) -> Option<Shutdown> {
        self.shutdown
    }
}

impl VmiRead for XenDriver {
    fn read(&self, pa: Pa, buf: &mut [u8]) -> Result<()> {
        self.check_alive()?;
        self.check_range(pa, buf.len() as u64)?;
        let (mut at, mut rest) = (pa, buf);
        while !rest.is_empty() {
            let (now, later) = rest.split_at_mut(rest.len().min(at.page_rest() as usize));
            self.pages.read(at, now).map_err(|error| self.unless_gone(error))?;
            at = Pa(at.0.saturating_add(now.len() as u64));
            rest = later;
        }
        Ok(())
    }
}

impl VmiWrite for XenDriver {
    fn write(&mut self, pa: Pa, bytes: &[u8]) -> Result<()> {
        self.check_alive()?;
        self.check_range(pa, bytes.len() as u64)?;
        let Some(last) = pa.checked_add((bytes.len() as u64).saturating_sub(1)).filter(|_| !bytes.is_empty()) else {
            return Ok(());
        };
        // All pages are mapped before any is written.
        (pa.gfn().0..=last.gfn().0)
            .try_for_each(|frame| self.pages.touch(Gfn(frame)))
            .map_err(|error| self.unless_gone(error))?;
        let (mut at, mut rest) = (pa, bytes);
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(at.page_rest() as usize));
            self.pages.write(at, now).map_err(|error| self.unless_gone(error))?;
            at = Pa(at.0.saturating_add(now.len() as u64));
            rest = later;
        }
        Ok(())
    }
}

impl VmiRegisters for XenDriver {
    fn registers(&self, vcpu: VcpuId) -> Result<Registers> {
        let held = self.vcpu(vcpu)?.held.as_ref();
        self.check_alive()?;
        let mut registers = self.context_registers(vcpu)?;
        if let Some(held) = held {
            registers.gp = held.gp.unwrap_or(held.event.registers.gp);
        }
        Ok(registers)
    }

    /// The general-purpose registers of a vCPU that is held go with its answer. Everything else is loaded into the paused domain.
    fn set_registers(&mut self, vcpu: VcpuId, registers: &Registers) -> Result<()> {
        self.vcpu(vcpu)?;
        self.check_alive()?;
        let now = self.context_registers(vcpu)?;
        let is_held = self.vcpu(vcpu)?.held.is_some();
        let mut rest = *registers;
        if is_held {
            rest.gp = now.gp;
        }
        if sets(&rest) != sets(&now) {
            self.load_registers(vcpu, &rest)?;
        }
        if let Some(held) = &mut self.vcpu_mut(vcpu)?.held {
            held.gp = Some(registers.gp);
        }
        Ok(())
    }
}

/// Of registers, those that can be set, so that they can be compared.
const fn sets(registers: &Registers) -> Registers {
    let (fs, gs) = (registers.fs.base, registers.gs.base);
    let none = crate::arch::amd64::Segment { selector: 0, attributes: 0, limit: 0, base: 0 };
    let no_table = crate::arch::amd64::DescriptorTable { base: 0, limit: 0 };
    let mut kept = *registers;
    kept.cs = none;
    kept.ss = none;
    kept.ds = none;
    kept.es = none;
    kept.fs = none;
    kept.gs = none;
    kept.tr = none;
    kept.gdtr = no_table;
    kept.idtr = no_table;
    kept.fs.base = fs;
    kept.gs.base = gs;
    kept
}

impl XenDriver {
    fn load_registers(&self, vcpu: VcpuId, registers: &Registers) -> Result<()> {
        let loaded = self.paused(|driver| {
            let context = driver.xen.control().hvm_context(driver.domain)?;
            let mut new = codec::context_with(&context, vcpu.0, registers)
                .ok_or(xen_sys::Error { op: "xc_domain_hvm_getcontext", errno: errno::ENOENT })?;
            driver.xen.control().set_hvm_context(driver.domain, &mut new)
        });
        loaded.map_err(|error| self.failed(&error))
    }

    /// Does something while no vCPU runs. If they cannot be let go on afterwards it is done all the same: the next wait tries again.
    fn paused<T>(&self, what: impl FnOnce(&Self) -> xen_sys::Result<T>) -> xen_sys::Result<T> {
        self.hold()?;
        let result = what(self);
        self.owes_unpause.set(true);
        if let Err(error) = self.let_run() {
            log::debug!("{error}");
        }
        result
    }

    /// Pauses the domain once more, if no pause is there that is still to be taken back.
    fn hold(&self) -> xen_sys::Result<()> {
        if self.owes_unpause.get() {
            self.owes_unpause.set(false);
            return Ok(());
        }
        self.xen.control().pause(self.domain)
    }

    /// Takes back a pause of the driver's own that could not be taken back before.
    fn let_run(&self) -> xen_sys::Result<()> {
        if self.owes_unpause.get() {
            self.xen.control().unpause(self.domain)?;
            self.owes_unpause.set(false);
        }
        Ok(())
    }
}

impl VmiFrames for XenDriver {
    fn allocate_frames(&mut self, count: usize) -> Result<Vec<Gfn>> {
        self.check_alive()?;
        let allocated = self.frames.allocate(self.xen.control(), &self.pages, count);
        allocated.map_err(|error| self.unless_gone(error))
    }

    fn free_frames(&mut self, frames: &[Gfn]) -> Result<()> {
        if self.has_ended && self.gone.get().is_none() && self.frames.in_use() == 0 {
            // Letting go has given all of them back.
            return Ok(());
        }
        for frame in frames {
            if let Some(view) = self.views.iter().find_map(|(view, book)| book.shows(*frame).then_some(*view)) {
                return Err(VmiError::InvalidArgument {
                    what: "frame",
                    reason: format!("view {view} still shows frame {frame}"),
                });
            }
        }
        self.frames.free(frames)
    }

    fn frames_in_use(&self) -> usize {
        self.frames.in_use()
    }
}

impl VmiEvents for XenDriver {
    fn monitor(&mut self, monitor: Monitor, on: bool) -> Result<()> {
        if self.has_ended && self.gone.get().is_none() && self.monitors.contains(&monitor) == on {
            // Letting go has switched it off.
            return Ok(());
        }
        self.check_alive()?;
        self.switch_monitor(monitor, on)
    }

    fn wait(&mut self, timeout: Duration) -> Result<Wait> {
        self.wait_for_event(timeout)
    }

    fn respond(&mut self, vcpu: VcpuId, response: &VmiEventResponse) -> Result<()> {
        self.answer(vcpu, response)
    }

    fn waker(&self) -> Arc<dyn Waker> {
        Arc::<Bell>::clone(&self.bell)
    }

    fn readiness(&self) -> Result<Option<OwnedFd>> {
        use rustix::event::epoll;
        let os = |op, error: rustix::io::Errno| VmiError::Driver { op, errno: error.raw_os_error(), detail: error.to_string() };
        let both = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| os("epoll_create", error))?;
        let channel = self.events.fd().map_err(|error| self.failed(&error))?;
        for fd in [channel, self.bell.fd().as_fd()] {
            epoll::add(&both, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN).map_err(|error| os("epoll_ctl", error))?;
        }
        Ok(Some(both))
    }
}

impl VmiInject for XenDriver {
    fn inject(&mut self, vcpu: VcpuId, injection: &Injection) -> Result<()> {
        self.vcpu(vcpu)?;
        self.check_alive()?;
        let kind = match injection.kind {
            InjectionKind::External => event_type::EXT_INT,
            InjectionKind::Exception => event_type::HW_EXC,
            // INT3 and INTO are exceptions, INT n is an interrupt (Intel SDM vol. 3, 24.8.3).
            InjectionKind::Software if matches!(injection.vector, vector::BP | 4) => event_type::SW_EXC,
            InjectionKind::Software => event_type::SW_INT,
        };
        let error_code = injection.error_code.unwrap_or(NO_ERROR_CODE);
        self.inject_event(vcpu, injection.vector, kind, error_code, injection.insn_len, injection.cr2.unwrap_or(0))
    }
}

impl XenDriver {
    fn inject_event(&self, vcpu: VcpuId, vector: u8, kind: u8, error_code: u32, insn_len: u8, extra: u64) -> Result<()> {
        let injected = self.devices.inject(self.domain as u16, vcpu.0.into(), vector, kind, error_code, insn_len, extra);
        injected.map_err(|error| self.failed(&error))
    }
}

impl VmiControl for XenDriver {
    fn pause(&mut self) -> Result<()> {
        self.check_alive()?;
        if self.pauses == 0 {
            // What is paused does not come to an end, and somebody may want to change a page meanwhile.
            self.settle_emulations();
            self.hold().map_err(|error| self.failed(&error))?;
        }
        self.pauses += 1;
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        self.check_alive()?;
        let none = || VmiError::Driver { op: "resuming the guest", errno: errno::EINVAL, detail: "it is not paused".to_owned() };
        let left = self.pauses.checked_sub(1).ok_or_else(none)?;
        self.pauses = left;
        if left == 0 {
            // Who has a pause taken back seldom can do it again: what cannot be done now is done, or told, by the next wait.
            self.owes_unpause.set(true);
            if let Err(error) = self.let_run() {
                log::debug!("{error}");
            }
        }
        Ok(())
    }

    fn let_go(&mut self) -> Result<()> {
        left_behind(&self.end()).map_or(Ok(()), Err)
    }
}

impl Drop for XenDriver {
    fn drop(&mut self) {
        let mut left = self.end();
        if !left.is_empty() {
            left = self.end();
        }
        if let Some(error) = left_behind(&left) {
            log::error!("domain {} ({}): {error}", self.domain, self.info.name);
        }
    }
}

/// Both descriptors of a wait: the event channel's and the bell's.
fn descriptors<'a>(events: &'a EventChannels, bell: &'a Bell) -> xen_sys::Result<[rustix::event::PollFd<'a>; 2]> {
    use rustix::event::{PollFd, PollFlags};
    let channel = events.fd()?;
    Ok([PollFd::from_borrowed_fd(channel, PollFlags::IN), PollFd::from_borrowed_fd(bell.fd().as_fd(), PollFlags::IN)])
}
