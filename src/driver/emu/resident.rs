//! Whose state the main engine holds, and what of it that vCPU's own context lacks.
//!
//! A whole state is 5.6 KB, a hit changes a few words of it. So between runs only the integer state is copied; the FPU, SSE and
//! MSR state stays in the main engine until somebody else needs the engine, or something needs that state.

use crate::addr::VcpuId;
use crate::error::{Result, VmiError};

use super::run::Machine;
use super::sys::reg;
use super::vcpu::Vcpu;

/// What the main engine holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Resident {
    index: usize,
    /// The context has newer integer state.
    integer_is_old: bool,
    /// Of that, at least the general-purpose registers, RIP and RFLAGS.
    core_is_old: bool,
    /// The engine alone has the state that is not integer state.
    rest_is_here: bool,
}

fn no_vcpu(index: usize, count: u16) -> VmiError {
    VmiError::VcpuNotFound { vcpu: VcpuId(index as u16), count }
}

impl Machine {
    pub(super) fn no_vcpu(&self, index: usize) -> VmiError {
        no_vcpu(index, self.vcpus.len() as u16)
    }

    /// The vCPU. Its MSRs are up to date; FPU and SSE state may not be.
    pub fn vcpu(&self, index: usize) -> Result<&Vcpu> {
        self.vcpus.get(index).ok_or_else(|| self.no_vcpu(index))
    }

    /// The vCPU with all of its state, to be changed in any way: the main engine's copy counts no more.
    pub fn vcpu_mut(&mut self, index: usize) -> Result<&mut Vcpu> {
        self.unload(index);
        self.apart_mut(index)
    }

    /// The vCPU, of whose state the general-purpose registers, RIP and RFLAGS may be changed, and what is no processor state.
    pub(super) fn core_mut(&mut self, index: usize) -> Result<&mut Vcpu> {
        if let Some(resident) = self.resident.as_mut().filter(|resident| resident.index == index) {
            resident.core_is_old = true;
        }
        self.apart_mut(index)
    }

    /// The vCPU, whose integer state may be changed and what is no processor state.
    pub(super) fn integer_mut(&mut self, index: usize) -> Result<&mut Vcpu> {
        if let Some(resident) = self.resident.as_mut().filter(|resident| resident.index == index) {
            resident.integer_is_old = true;
        }
        self.apart_mut(index)
    }

    /// The vCPU, of which only what is no processor state may be changed.
    pub(super) fn apart_mut(&mut self, index: usize) -> Result<&mut Vcpu> {
        let count = self.vcpus.len() as u16;
        self.vcpus.get_mut(index).ok_or_else(|| no_vcpu(index, count))
    }

    /// Brings what the main engine alone has of a vCPU's state home. The engine holds nobody's then, if it held this one's.
    pub(super) fn unload(&mut self, index: usize) {
        let Some(resident) = self.resident.take_if(|resident| resident.index == index) else { return };
        if let (true, Some(vcpu)) = (resident.rest_is_here, self.vcpus.get_mut(index)) {
            self.main.save(&mut self.aside);
            vcpu.context.copy_from(vcpu.layout.copied.rest, &self.aside);
        }
    }

    /// Frees the main engine for another state.
    pub(super) fn evict(&mut self) {
        if let Some(resident) = self.resident {
            self.unload(resident.index);
        }
    }

    /// Has the main engine hold a vCPU's state as it is.
    pub(super) fn load(&mut self, index: usize) -> Result<()> {
        let held = self.resident.filter(|resident| resident.index == index);
        if held.is_none() {
            self.evict();
        }
        let Some(vcpu) = self.vcpus.get_mut(index) else { return Err(self.no_vcpu(index)) };
        vcpu.place_flags(self.main.is_standing());
        let clean = Resident { index, integer_is_old: false, core_is_old: false, rest_is_here: false };
        match held {
            Some(Resident { integer_is_old: true, rest_is_here, .. }) => {
                self.main.restore_part(&mut vcpu.context, vcpu.layout.copied.integer);
                self.resident = Some(Resident { rest_is_here, ..clean });
            }
            Some(Resident { core_is_old: true, rest_is_here, .. }) => {
                self.main.restore_part(&mut vcpu.context, vcpu.layout.copied.core);
                self.resident = Some(Resident { rest_is_here, ..clean });
            }
            Some(_) => {}
            None => {
                self.main.restore(&vcpu.context);
                self.resident = Some(clean);
            }
        }
        Ok(())
    }

    /// The main engine has run the vCPU it holds: brings home what is looked at between runs.
    pub(super) fn ran(&mut self, index: usize) {
        let Some(vcpu) = self.vcpus.get_mut(index) else { return };
        // SWAPGS alone changes an MSR unseen.
        let whole = self.main.hooks().swapped_gs.take();
        if whole {
            self.main.save(&mut vcpu.context);
        } else {
            self.main.save_part(&mut vcpu.context, vcpu.layout.copied.integer);
        }
        vcpu.flags_apart = self.main.is_standing();
        self.resident = Some(Resident { index, integer_is_old: false, core_is_old: false, rest_is_here: !whole });
    }

    /// Sets CR0 and CR4, which change the engine's own mode flags with them.
    pub fn set_mode_registers(&mut self, index: usize, cr0: u64, cr4: u64) -> Result<()> {
        let vcpu = self.vcpu(index)?;
        if vcpu.cr(0) == cr0 && vcpu.cr(4) == cr4 {
            return Ok(());
        }
        self.load(index)?;
        self.main.write_register(reg::CR4, cr4)?;
        self.main.write_register(reg::CR0, cr0)?;
        self.ran(index);
        self.memory.mark_stale();
        Ok(())
    }
}
