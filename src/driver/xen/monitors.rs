//! What Xen is asked to tell of, beside accesses to memory.

use xen_sys::errno;
use xen_sys::types::{ctrlreg, monitor_event};

use super::XenDriver;
use crate::arch::amd64::ControlRegister;
use crate::driver::Monitor;
use crate::error::{Result, VmiError};

/// Those that can be written and not read: IA32_PRED_CMD, IA32_FLUSH_CMD (Intel SDM vol. 4, table 2-2), and of the x2APIC's EOI and SELF IPI
/// (vol. 3, table 12-6).
const WRITE_ONLY: [u32; 4] = [0x49, 0x10b, 0x80b, 0x83f];

/// Switching on what is on already is fine.
pub(super) fn monitored(result: xen_sys::Result<()>) -> xen_sys::Result<()> {
    match result {
        Err(error) if error.errno == errno::EEXIST => Ok(()),
        result => result,
    }
}

impl XenDriver {
    /// Has something announced, or no longer.
    pub(super) fn switch_monitor(&mut self, monitor: Monitor, on: bool) -> Result<()> {
        if self.monitors.contains(&monitor) == on {
            // With a listener that has died Xen forgets what it told, and not what it has the processor do for that.
            let lingers = matches!(monitor, Monitor::DescriptorAccess | Monitor::ControlRegister(ControlRegister::Cr3));
            if on || !lingers || !self.has_deposed {
                return Ok(());
            }
            self.switch_monitor(monitor, true)?;
        }
        let (control, domain) = (self.xen.control(), self.domain);
        if on && !self.decides_writes && matches!(monitor, Monitor::ControlRegister(_) | Monitor::Msr(_)) {
            // Else the register is written before the answer is there, and denying it comes too late.
            control.monitor_control_registers(domain).map_err(|error| self.failed(&error))?;
            self.decides_writes = true;
        }
        let control = self.xen.control();
        let need_it =
            |there: bool, capability| if there { Ok(()) } else { Err(VmiError::NotSupported { driver: "xen", capability }) };
        let need = |bit: u32, capability| need_it(self.knows(bit), capability);
        let result = match monitor {
            Monitor::Breakpoint => control.monitor_software_breakpoint(domain, on),
            Monitor::ControlRegister(register) => {
                need(monitor_event::WRITE_CTRLREG, "monitoring control registers")?;
                let index = match register {
                    ControlRegister::Cr0 => ctrlreg::CR0,
                    ControlRegister::Cr3 => ctrlreg::CR3,
                    ControlRegister::Cr4 => ctrlreg::CR4,
                };
                let ignored = self.ignored_bits.get(usize::from(index)).copied().unwrap_or(0);
                control.monitor_write_ctrlreg(domain, index, on, true, ignored, false)
            }
            Monitor::Msr(msr) if on && WRITE_ONLY.contains(&msr) => {
                let reason = format!(
                    "MSR {msr:#x} cannot be read, and Xen reads one before it tells of a write: the guest would get a #GP"
                );
                return Err(VmiError::InvalidArgument { what: "msr", reason });
            }
            Monitor::Msr(msr) => {
                need(monitor_event::MOV_TO_MSR, "monitoring model-specific registers")?;
                control.monitor_mov_to_msr(domain, msr, on, false)
            }
            Monitor::Debug => {
                need(monitor_event::DEBUG_EXCEPTION, "monitoring debug exceptions")?;
                control.monitor_debug_exceptions(domain, on, true)
            }
            Monitor::Cpuid => {
                need(monitor_event::CPUID, "monitoring CPUID")?;
                control.monitor_cpuid(domain, on)
            }
            Monitor::DescriptorAccess => {
                need(monitor_event::DESC_ACCESS, "monitoring descriptor tables")?;
                control.monitor_descriptor_access(domain, on)
            }
            Monitor::PortIo => {
                need_it(control.has_newer_monitors().1, "monitoring I/O ports")?;
                control.monitor_io(domain, on)
            }
            Monitor::GuestRequest => {
                need(monitor_event::GUEST_REQUEST, "monitoring requests of the guest")?;
                control.monitor_guest_request(domain, on, true, false)
            }
        };
        monitored(result).map_err(|error| self.failed(&error))?;
        if on {
            self.monitors.insert(monitor);
        } else {
            self.monitors.remove(&monitor);
        }
        Ok(())
    }
}
