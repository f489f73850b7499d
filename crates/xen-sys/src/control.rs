//! libxenctrl on one connection: each method is the function of the same name, with its result checked.

use std::ffi::{c_int, c_ulong};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::Result;
use crate::error::Error;
use crate::load::{Handle, Tables};
use crate::memory::{ForeignMemory, Mapping};
use crate::types::{
    COMMANDLINE_LEN, DOMCTL_MONITOR_OP, DomainInfo, DomctlMonitor, EXTRAVERSION_LEN, HVM_SAVE_CPU, HvmHwCpu,
    MONITOR_OP_CONTROL_REGISTERS, XENVER_COMMANDLINE, XENVER_EXTRAVERSION, XENVER_VERSION,
};

/// libxenctrl on one connection.
#[derive(Debug)]
pub struct Control {
    tables: Arc<Tables>,
    handle: Handle,
}

// SAFETY: the interface is used by one thread at a time (`&self` of a type that is not `Sync`), and by any.
unsafe impl Send for Control {}

impl Drop for Control {
    fn drop(&mut self) {
        // SAFETY: opened by `open`, and closed once.
        unsafe { (self.tables.control.xc_interface_close)(self.handle) };
    }
}

/// A zero result is success; anything else is -1 with errno, or (in some functions) a negated number.
fn done(op: &'static str, result: c_int) -> Result<()> {
    match result {
        0.. => Ok(()),
        -1 => Err(Error::last(op)),
        negative => Err(Error::new(op, negative.saturating_neg())),
    }
}

macro_rules! call {
    ($self:ident.$name:ident($($argument:expr),*)) => {{
        // SAFETY: the handle is open, and pointers among the arguments are to places of the size the function writes.
        let result = unsafe { ($self.tables.control.$name)($self.handle $(, $argument)*) };
        done(stringify!($name), result)
    }};
}

macro_rules! calls {
    ($($(#[$doc:meta])* $method:ident = $name:ident($($argument:ident: $type:ty),*);)+) => {
        impl Control {
            $(
                $(#[$doc])*
                pub fn $method(&self, domain: u32 $(, $argument: $type)*) -> Result<()> {
                    call!(self.$name(domain $(, $argument)*))
                }
            )+
        }
    };
}

calls! {
    /// Pauses a domain; counted by the hypervisor. Returns when no vCPU of it runs.
    pause = xc_domain_pause();
    /// Takes back one pause.
    unpause = xc_domain_unpause();
    /// Sets how much memory the domain may have, in KiB.
    set_max_memory = xc_domain_setmaxmem(max_kib: u64);
    /// Switches a vCPU's single-stepping on (1) or off (0).
    debug_control = xc_domain_debug_control(op: u32, vcpu: u32);
    /// Sets an HVM parameter.
    set_param = xc_hvm_param_set(param: u32, value: u64);
    /// Sets the rights of `count` pages from `gfn` on in the default view.
    set_mem_access = xc_set_mem_access(access: c_int, gfn: u64, count: u32);
    /// Switches views on or off.
    altp2m_set_state = xc_altp2m_set_domain_state(on: bool);
    /// Removes a view.
    altp2m_destroy_view = xc_altp2m_destroy_view(view: u16);
    /// Puts every vCPU into a view.
    altp2m_switch_to_view = xc_altp2m_switch_to_view(view: u16);
    /// Sets the rights of a page in a view.
    altp2m_set_mem_access = xc_altp2m_set_mem_access(view: u16, gfn: u64, access: c_int);
    /// Shows the frame of `new` at `old` in a view; with `u64::MAX` the page's own again, with default rights.
    altp2m_change_gfn = xc_altp2m_change_gfn(view: u16, old: u64, new: u64);
    /// Ends the listening; held vCPUs go on.
    monitor_disable = xc_monitor_disable();
    /// Has writes to a control register told. `bits` of it do not count.
    monitor_write_ctrlreg = xc_monitor_write_ctrlreg(index: u16, on: bool, sync: bool, bits: u64, on_change: bool);
    /// Has writes to an MSR told.
    monitor_mov_to_msr = xc_monitor_mov_to_msr(msr: u32, on: bool, on_change: bool);
    /// Has single-steps told.
    monitor_singlestep = xc_monitor_singlestep(on: bool);
    /// Has INT3s told.
    monitor_software_breakpoint = xc_monitor_software_breakpoint(on: bool);
    /// Has debug exceptions of the guest's own told.
    monitor_debug_exceptions = xc_monitor_debug_exceptions(on: bool, sync: bool);
    /// Has CPUIDs told.
    monitor_cpuid = xc_monitor_cpuid(on: bool);
    /// Has loads and stores of descriptor-table registers told.
    monitor_descriptor_access = xc_monitor_descriptor_access(on: bool);
    /// Has HVMOP_guest_request_vm_event told; from the guest's user mode too if `allow_userspace`.
    monitor_guest_request = xc_monitor_guest_request(on: bool, sync: bool, allow_userspace: bool);
    /// Has instructions told that the emulator does not know.
    monitor_emul_unimplemented = xc_monitor_emul_unimplemented(on: bool);
}

impl Control {
    pub(crate) fn open(tables: &Arc<Tables>) -> Result<Self> {
        let logger = tables.logger.as_ptr();
        // SAFETY: the logger outlives the handle, which holds the tables.
        let handle = unsafe { (tables.control.xc_interface_open)(logger, logger, 0) };
        if handle.is_null() {
            return Err(Error::last("xc_interface_open"));
        }
        Ok(Self { tables: Arc::clone(tables), handle })
    }

    /// Major and minor number of the running hypervisor.
    pub fn release(&self) -> Result<(u32, u32)> {
        // SAFETY: this command takes no place to write to.
        let packed = unsafe { (self.tables.control.xc_version)(self.handle, XENVER_VERSION, std::ptr::null_mut()) };
        done("xc_version", packed)?;
        Ok((packed as u32 >> 16, packed as u32 & 0xffff))
    }

    fn version_text<const N: usize>(&self, command: c_int) -> Result<String> {
        let mut bytes = [0_u8; N];
        call!(self.xc_version(command, bytes.as_mut_ptr().cast()))?;
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(text).into_owned())
    }

    /// What follows the release in the hypervisor's version, `".5"`.
    pub fn extra_version(&self) -> Result<String> {
        self.version_text::<EXTRAVERSION_LEN>(XENVER_EXTRAVERSION)
    }

    /// The command line the hypervisor was started with.
    pub fn command_line(&self) -> Result<String> {
        self.version_text::<COMMANDLINE_LEN>(XENVER_COMMANDLINE)
    }

    /// The version of the event ring. Also tells whether the hypervisor speaks to this library: it needs no rights on a domain.
    pub fn vm_event_version(&self) -> Result<u32> {
        // SAFETY: the handle is open.
        let version = unsafe { (self.tables.control.xc_vm_event_get_version)(self.handle) };
        done("xc_vm_event_get_version", version)?;
        Ok(version as u32)
    }

    /// The first domain whose number is at least `first`; `None` if there is none.
    pub fn next_domain(&self, first: u32) -> Result<Option<DomainInfo>> {
        // SAFETY: plain numbers; all zeroes is a value of it.
        let mut info: DomainInfo = unsafe { std::mem::zeroed() };
        // SAFETY: the handle is open; one entry fits, with room to spare in every release.
        let count = unsafe { (self.tables.control.xc_domain_getinfolist)(self.handle, first, 1, &raw mut info) };
        done("xc_domain_getinfolist", count)?;
        Ok((count > 0).then_some(info))
    }

    /// What is known of a domain; `None` if there is no such domain.
    pub fn domain(&self, domain: u32) -> Result<Option<DomainInfo>> {
        Ok(self.next_domain(domain)?.filter(|info| u32::from(info.domain) == domain))
    }

    /// The highest frame number the domain has.
    pub fn maximum_gpfn(&self, domain: u32) -> Result<u64> {
        let mut frame: c_ulong = 0;
        call!(self.xc_domain_maximum_gpfn(domain, &raw mut frame))?;
        Ok(frame)
    }

    /// Gives the domain a frame of memory at each of `frames`: all or an error.
    pub fn populate(&self, domain: u32, frames: &[u64]) -> Result<()> {
        let mut numbers: Vec<c_ulong> = frames.to_vec();
        call!(self.xc_domain_populate_physmap_exact(domain, numbers.len() as c_ulong, 0, 0, numbers.as_mut_ptr()))
    }

    /// Takes frames of memory away from the domain: all or an error.
    pub fn depopulate(&self, domain: u32, frames: &[u64]) -> Result<()> {
        let mut numbers: Vec<c_ulong> = frames.to_vec();
        call!(self.xc_domain_decrease_reservation_exact(domain, numbers.len() as c_ulong, 0, numbers.as_mut_ptr()))
    }

    /// The whole state of the domain's virtual hardware.
    pub fn hvm_context(&self, domain: u32) -> Result<Vec<u8>> {
        let get = self.tables.control.xc_domain_hvm_getcontext;
        // SAFETY: without a buffer the call only says how much there is.
        let len = unsafe { get(self.handle, domain, std::ptr::null_mut(), 0) };
        done("xc_domain_hvm_getcontext", len)?;
        let mut bytes = vec![0; len as usize];
        // SAFETY: the buffer is as long as it is said to be.
        let len = unsafe { get(self.handle, domain, bytes.as_mut_ptr(), bytes.len() as u32) };
        done("xc_domain_hvm_getcontext", len)?;
        bytes.truncate(len as usize);
        Ok(bytes)
    }

    /// Loads state of the domain's virtual hardware: of what has a record in it. The domain must be paused. vCPUs without a record go down.
    pub fn set_hvm_context(&self, domain: u32, context: &mut [u8]) -> Result<()> {
        call!(self.xc_domain_hvm_setcontext(domain, context.as_mut_ptr(), context.len() as u32))
    }

    /// The registers of a vCPU.
    pub fn hvm_cpu(&self, domain: u32, vcpu: u16) -> Result<Box<HvmHwCpu>> {
        // SAFETY: plain numbers; all zeroes is a value of it.
        let mut cpu: Box<HvmHwCpu> = Box::new(unsafe { std::mem::zeroed() });
        let place = (&raw mut *cpu).cast();
        call!(self.xc_domain_hvm_getcontext_partial(domain, HVM_SAVE_CPU, vcpu, place, size_of::<HvmHwCpu>() as u32))?;
        Ok(cpu)
    }

    /// An HVM parameter.
    pub fn param(&self, domain: u32, param: u32) -> Result<u64> {
        let mut value = 0;
        call!(self.xc_hvm_param_get(domain, param, &raw mut value))?;
        Ok(value)
    }

    /// The rights of a page in the default view.
    pub fn mem_access(&self, domain: u32, gfn: u64) -> Result<c_int> {
        let mut access = 0;
        call!(self.xc_get_mem_access(domain, gfn, &raw mut access))?;
        Ok(access)
    }

    /// Whether views are switched on.
    pub fn altp2m_state(&self, domain: u32) -> Result<bool> {
        let mut state = 0_u8;
        // As a byte, so that whatever the library writes there is a value.
        call!(self.xc_altp2m_get_domain_state(domain, (&raw mut state).cast()))?;
        Ok(state != 0)
    }

    /// Makes a view.
    pub fn altp2m_create_view(&self, domain: u32, access: c_int) -> Result<u16> {
        let mut view = 0;
        call!(self.xc_altp2m_create_view(domain, access, &raw mut view))?;
        Ok(view)
    }

    /// Sets the rights of many pages in a view. After an error some may be set.
    pub fn altp2m_set_mem_access_multi(&self, domain: u32, view: u16, pages: &[(u64, u8)]) -> Result<()> {
        let (mut gfns, mut rights): (Vec<u64>, Vec<u8>) = pages.iter().copied().unzip();
        let count = gfns.len() as u32;
        call!(self.xc_altp2m_set_mem_access_multi(domain, view, rights.as_mut_ptr(), gfns.as_mut_ptr(), count))
    }

    /// The rights of a page in a view; ESRCH for one that nothing was ever done with.
    pub fn altp2m_mem_access(&self, domain: u32, view: u16, gfn: u64) -> Result<c_int> {
        let mut access = 0;
        call!(self.xc_altp2m_get_mem_access(domain, view, gfn, &raw mut access))?;
        Ok(access)
    }

    /// The view a vCPU is in.
    pub fn altp2m_vcpu_view(&self, domain: u32, vcpu: u32) -> Result<u16> {
        let mut view = 0;
        call!(self.xc_altp2m_get_vcpu_p2m_idx(domain, vcpu, &raw mut view))?;
        Ok(view)
    }

    /// Begins to listen: the ring's page, which the guest does not see, and the event channel's remote port.
    ///
    /// # Errors
    /// EBUSY if somebody listens already.
    pub fn monitor_enable(&self, domain: u32, memory: &ForeignMemory) -> Result<(Mapping, u32)> {
        let mut port = 0;
        // SAFETY: the handle is open, and the port has a place.
        let page = unsafe { (self.tables.control.xc_monitor_enable)(self.handle, domain, &raw mut port) };
        let page = NonNull::new(page.cast::<u8>()).ok_or_else(|| Error::last("xc_monitor_enable"))?;
        Ok((memory.adopt(page), port))
    }

    /// Which events can be had: bits of [`crate::types::monitor_event`].
    pub fn monitor_capabilities(&self, domain: u32) -> Result<u32> {
        let mut bits = 0;
        call!(self.xc_monitor_get_capabilities(domain, &raw mut bits))?;
        Ok(bits)
    }

    /// Lets the answer to a register write decide whether it is done (4.14; no function of the library has it).
    pub fn monitor_control_registers(&self, domain: u32) -> Result<()> {
        let op = "xc_domctl";
        let call = self.tables.control.xc_domctl.ok_or(Error::new(op, crate::errno::ENOSYS))?;
        let domain = u16::try_from(domain).map_err(|_| Error::new(op, crate::errno::ESRCH))?;
        let mut command = DomctlMonitor {
            cmd: DOMCTL_MONITOR_OP,
            interface_version: 0,
            domain,
            pad: [0; 3],
            op: MONITOR_OP_CONTROL_REGISTERS,
            event: 0,
            rest: [0; 15],
        };
        // SAFETY: as large as `xen_domctl` in every release; the library fills the version in.
        done(op, unsafe { call(self.handle, (&raw mut command).cast()) })
    }

    /// Whether VM exits can be told (4.17), and port accesses (4.18).
    pub fn has_newer_monitors(&self) -> (bool, bool) {
        (self.tables.control.xc_monitor_vmexit.is_some(), self.tables.control.xc_monitor_io.is_some())
    }

    /// Has accesses to I/O ports told.
    ///
    /// # Errors
    /// ENOSYS where the library has no such function.
    pub fn monitor_io(&self, domain: u32, on: bool) -> Result<()> {
        let op = "xc_monitor_io";
        let call = self.tables.control.xc_monitor_io.ok_or(Error::new(op, crate::errno::ENOSYS))?;
        // SAFETY: the handle is open.
        done(op, unsafe { call(self.handle, domain, on) })
    }

    /// Has VM exits told, for counting them.
    ///
    /// # Errors
    /// ENOSYS where the library has no such function.
    pub fn monitor_vmexit(&self, domain: u32, on: bool, sync: bool) -> Result<()> {
        let op = "xc_monitor_vmexit";
        let call = self.tables.control.xc_monitor_vmexit.ok_or(Error::new(op, crate::errno::ENOSYS))?;
        // SAFETY: the handle is open.
        done(op, unsafe { call(self.handle, domain, on, sync) })
    }
}
