//! Instructions the driver carries out itself or announces: control registers, MSRs, CPUID, time, interrupts between vCPUs.

use std::rc::Rc;

use crate::addr::View;
use crate::arch::amd64::{ControlRegister, cr4, vector};
use crate::error::Result;
use crate::event::EventReason;

use super::apic::{self, Ipi, Target, Written};
use super::deliver::{self, Fault};
use super::insn::System;
use super::memory::Which;
use super::run::{Machine, RAX, RBX, RCX, RDX, Went, cr_number};
use super::vcpu::{Held, Vcpu};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_AUX: u32 = 0xc000_0103;

impl Machine {
    /// Instructions the driver carries out itself or announces.
    pub(super) fn system(&mut self, index: usize, system: System, len: u8, view: View) -> Result<Went> {
        let memory = Rc::clone(&self.memory);
        let now = self.now;
        let watches_cpuid = self.monitors.cpuid;
        // Of the state beyond the integer state SYSCALL only reads what is always up to date.
        let vcpu = self.integer_mut(index)?;
        let announced = vcpu.announced == Some(vcpu.rip());
        let kernel = vcpu.cpl() == 0;
        let rip = vcpu.rip();
        let next = rip.wrapping_add(len.into());
        match system {
            System::Syscall => {
                deliver::syscall(vcpu, &memory, len);
                Ok(Went::Done)
            }
            System::Rdtsc | System::Rdtscp if kernel || vcpu.cr(4) & cr4::TSD == 0 => {
                set_pair(vcpu, now);
                vcpu.set_rip(next);
                if system == System::Rdtscp {
                    let aux = self.read_msr(index, MSR_TSC_AUX)?;
                    self.vcpu_mut(index)?.set_gpr(RCX, aux & 0xffff_ffff);
                }
                Ok(Went::Done)
            }
            System::WriteCr { cr, gpr } if kernel => {
                let register = match cr {
                    0 => ControlRegister::Cr0,
                    3 => ControlRegister::Cr3,
                    4 => ControlRegister::Cr4,
                    _ => return Ok(Went::Native),
                };
                let (old, new) = (vcpu.cr(cr.into()), vcpu.gpr(gpr));
                if announced || self.monitors.cr.get(cr_number(register)) != Some(&true) {
                    return Ok(Went::Native);
                }
                let reason = EventReason::WriteControlRegister { register, old, new };
                Ok(Went::Event(self.raise(index, view, reason, Held::Write(len))?))
            }
            System::Cpuid if watches_cpuid && !announced => {
                let vcpu = self.vcpu(index)?;
                let (leaf, subleaf) = (vcpu.gpr(RAX) as u32, vcpu.gpr(RCX) as u32);
                let reason = EventReason::Cpuid { leaf, subleaf, insn_len: len };
                Ok(Went::Event(self.raise(index, view, reason, Held::Cpuid)?))
            }
            System::Cpuid => {
                vcpu.cpuid_leaf = vcpu.gpr(RAX) as u32;
                Ok(Went::Native)
            }
            System::Wrmsr if kernel => self.wrmsr(index, len, view),
            System::Rdmsr if kernel => self.rdmsr(index, len),
            _ => Ok(Went::Native),
        }
    }

    fn wrmsr(&mut self, index: usize, len: u8, view: View) -> Result<Went> {
        let memory = Rc::clone(&self.memory);
        let now = self.now;
        let vcpu = self.vcpu(index)?;
        let msr = vcpu.gpr(RCX) as u32;
        let new = vcpu.gpr(RDX) << 32 | vcpu.gpr(RAX) & 0xffff_ffff;
        if self.monitors.msrs.contains(&msr) && vcpu.announced != Some(vcpu.rip()) {
            let old = self.read_msr(index, msr)?;
            let reason = EventReason::WriteMsr { msr, old, new };
            return Ok(Went::Event(self.raise(index, view, reason, Held::Write(len))?));
        }
        let vcpu = self.vcpu_mut(index)?;
        let next = vcpu.rip().wrapping_add(len.into());
        match msr {
            apic::FIRST_MSR..=apic::LAST_MSR => match vcpu.apic.write(msr, new, now) {
                Written::NoRegister => deliver::fault(vcpu, &memory, Fault::with_code(vector::GP, 0)),
                Written::Done => vcpu.set_rip(next),
                Written::Sends(ipi) => {
                    vcpu.set_rip(next);
                    self.send(index, ipi);
                }
            },
            // The APIC stays where it is and on, and time goes on as it does.
            apic::BASE_MSR | MSR_TSC => vcpu.set_rip(next),
            _ => return Ok(Went::Native),
        }
        Ok(Went::Done)
    }

    fn rdmsr(&mut self, index: usize, len: u8) -> Result<Went> {
        let memory = Rc::clone(&self.memory);
        let now = self.now;
        let vcpu = self.vcpu_mut(index)?;
        let msr = vcpu.gpr(RCX) as u32;
        if !matches!(msr, apic::FIRST_MSR..=apic::LAST_MSR | apic::BASE_MSR | MSR_TSC) {
            return Ok(Went::Native);
        }
        match virtual_msr(vcpu, index, msr, now) {
            None => deliver::fault(vcpu, &memory, Fault::with_code(vector::GP, 0)),
            Some(value) => {
                set_pair(vcpu, value);
                vcpu.set_rip(vcpu.rip().wrapping_add(len.into()));
            }
        }
        Ok(Went::Done)
    }

    /// The value of an MSR of a vCPU; 0 for one that does not exist.
    pub(super) fn read_msr(&mut self, index: usize, msr: u32) -> Result<u64> {
        let now = self.now;
        let vcpu = self.vcpu(index)?;
        if let Some(value) = virtual_msr(vcpu, index, msr, now) {
            return Ok(value);
        }
        self.load(index)?;
        self.main.read_msr(msr)
    }

    fn send(&mut self, from: usize, ipi: Ipi) {
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            let is_target = match ipi.to {
                Target::Vcpu(id) => index as u32 == id,
                Target::Itself => index == from,
                Target::All => true,
                Target::Others => index != from,
            };
            if is_target {
                vcpu.apic.request(ipi.vector);
            }
        }
    }

    /// What the other engine and the guest must know after the stepper did a system instruction.
    pub(super) fn after_system(&mut self, index: usize, system: System) -> Result<()> {
        match system {
            System::WriteCr { .. } | System::DropsTranslations | System::Wrmsr => self.memory.mark_stale_in(Which::Main),
            System::Cpuid => {
                let vcpu = self.vcpu_mut(index)?;
                match vcpu.cpuid_leaf {
                    1 => {
                        // The APIC id and the APICs there are; no XSAVE, AVX, F16C or FMA: the engine does not carry them out.
                        let id = (index as u64) << 24;
                        vcpu.set_gpr(RBX, vcpu.gpr(RBX) & 0x00ff_ffff | id);
                        let hidden = 1 << 12 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29;
                        vcpu.set_gpr(RCX, vcpu.gpr(RCX) & !hidden | 1 << 21);
                        vcpu.set_gpr(RDX, vcpu.gpr(RDX) | 1 << 9);
                    }
                    // No AVX2 and nothing of AVX-512.
                    7 => vcpu.set_gpr(RBX, vcpu.gpr(RBX) & !(1 << 5 | 0xfc23 << 16)),
                    0xb => vcpu.set_gpr(RDX, index as u64),
                    _ => {}
                }
            }
            _ => {}
        }
        Ok(())
    }
}

fn set_pair(vcpu: &mut Vcpu, value: u64) {
    vcpu.set_gpr(RAX, value & 0xffff_ffff);
    vcpu.set_gpr(RDX, value >> 32);
}

/// The MSRs that the driver keeps itself.
fn virtual_msr(vcpu: &Vcpu, index: usize, msr: u32, now: u64) -> Option<u64> {
    match msr {
        apic::FIRST_MSR..=apic::LAST_MSR => vcpu.apic.read(msr, now),
        // At its usual place, enabled, in x2APIC mode; bit 8 marks the first processor.
        apic::BASE_MSR => Some(0xfee0_0c00 | u64::from(index == 0) << 8),
        MSR_TSC => Some(now),
        _ => None,
    }
}
