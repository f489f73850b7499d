//! Events a driver raises and the answers they get: plain data.

use crate::addr::{Gfn, MemoryAccess, Pa, Va, VcpuId, View};
use crate::arch::amd64::{ControlRegister, Registers};

/// One event of one vCPU. The vCPU stands still until the event is answered with [`crate::driver::VmiEvents::respond`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VmiEvent {
    /// The vCPU it happened on.
    pub vcpu: VcpuId,
    /// The view that vCPU was in; `None` if the driver has no views.
    pub view: Option<View>,
    /// The vCPU's registers at the event.
    pub registers: Registers,
    /// What happened.
    pub reason: EventReason,
}

/// What an event was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EventReason {
    /// An INT3 (vector 3, software exception) was executed. `registers.rip` is the address *of* the INT3.
    Breakpoint {
        /// The frame the instruction was fetched from, as the guest numbers it.
        gfn: Gfn,
        /// Length of the instruction in bytes: 1 for 0xCC, 2 for `CD 03`.
        insn_len: u8,
    },
    /// An access that the view does not allow. `registers.rip` is the instruction, which has not taken effect.
    MemoryAccess {
        /// The first physical address that was denied.
        pa: Pa,
        /// The virtual address, where the driver knows it.
        va: Option<Va>,
        /// Which accesses were denied.
        access: MemoryAccess,
        /// Bytes of the access from `pa` on; 0 where the driver does not know. A store that reaches into the next page is told once, for both.
        len: u16,
    },
    /// The one instruction asked for by [`EventAction::SingleStep`] is done (or ended in an exception, which has been delivered).
    SingleStep {
        /// The frame of the instruction that comes next, where the driver knows it.
        gfn: Option<Gfn>,
    },
    /// A control register is about to be written.
    WriteControlRegister {
        /// Which.
        register: ControlRegister,
        /// Its value now.
        old: u64,
        /// The value to be written.
        new: u64,
    },
    /// A model-specific register is about to be written.
    WriteMsr {
        /// Its number.
        msr: u32,
        /// Its value now.
        old: u64,
        /// The value to be written.
        new: u64,
    },
    /// CPUID is about to be executed.
    Cpuid {
        /// EAX.
        leaf: u32,
        /// ECX.
        subleaf: u32,
        /// Length of the instruction in bytes.
        insn_len: u8,
    },
    /// A descriptor-table register or TR is about to be loaded or stored.
    DescriptorAccess {
        /// Which.
        register: DescriptorRegister,
        /// It is loaded; else it is stored to memory or to a register.
        is_load: bool,
    },
    /// A debug exception of the guest's own (#DB) is about to be delivered: its trap flag, its debug registers.
    DebugException {
        /// What DR6 is to say: bit 14 for the trap flag, bits 0 to 3 for breakpoints (Intel SDM vol. 3, 18.2.3).
        pending: u64,
    },
    /// An I/O port is about to be read or written.
    PortIo {
        /// Which.
        port: u16,
        /// How many bytes at a time: 1, 2 or 4.
        bytes: u8,
        /// It is read (IN, INS); else it is written (OUT, OUTS).
        is_read: bool,
        /// The other end is memory: INS, OUTS.
        is_string: bool,
    },
    /// The guest has asked for whoever listens; what it wants is in its registers. The call is done when it goes on.
    GuestRequest,
}

impl EventReason {
    /// Whether something is about to be done, and that is no access to memory and no breakpoint: it is done when the vCPU goes on.
    pub const fn is_announced(&self) -> bool {
        !matches!(self, Self::Breakpoint { .. } | Self::MemoryAccess { .. } | Self::SingleStep { .. })
    }
}

/// A register that is loaded and stored by instructions of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the names are the manual's")]
pub enum DescriptorRegister {
    Gdtr,
    Idtr,
    Ldtr,
    Tr,
}

/// What is to happen to the vCPU of an event.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EventAction {
    /// Go on: retry the instruction, or carry out the register write, the CPUID or the load or store of a descriptor table the access to a port or the exception that was
    /// announced.
    #[default]
    Continue,
    /// Deliver the INT3 to the guest through its own IDT, as if nobody had looked.
    Reinject,
    /// Execute one instruction in `view`, then go on in the vCPU's own view without another event. A repeated string
    /// instruction is carried to its end. If `view` denies an access of the instruction, a `MemoryAccess` event follows; also for a
    /// store that only the vCPU's own view denies, unless the event answered is that store: nothing tapped is overwritten unseen. A repeated
    /// string instruction that comes to another page is another store.
    FastSingleStep {
        /// The view for that one instruction.
        view: View,
    },
    /// Execute one instruction in `view` (as above), then raise [`EventReason::SingleStep`], still in `view`.
    SingleStep {
        /// The view for that one instruction.
        view: View,
    },
    /// Serve the denied read from the default view without switching: the guest gets the original bytes.
    Emulate,
    /// Skip the effect of the denied write, or of the announced register write: the instruction counts as executed. Of an announced exception:
    /// the guest does not get it. Not for CPUID, which Xen
    /// has executed by then: whoever does not want its results answers it, with registers and RIP behind it.
    Deny,
}

/// The answer to one event. Order of effects: registers, then view, then action.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VmiEventResponse {
    /// What the vCPU does next.
    pub action: EventAction,
    /// The view the vCPU is to be in from now on (after a fast single-step: the view it comes back to); `None`: as it is.
    pub view: Option<View>,
    /// New values for the general-purpose registers, RIP and RFLAGS; `None`: as they are.
    pub registers: Option<crate::arch::amd64::GpRegisters>,
}

impl VmiEventResponse {
    /// Goes on in the same view with the same registers.
    pub const CONTINUE: Self = Self { action: EventAction::Continue, view: None, registers: None };

    /// An answer with that action, the same view and the same registers.
    pub const fn action(action: EventAction) -> Self {
        Self { action, view: None, registers: None }
    }

    /// The same answer, with the vCPU in `view` from now on.
    #[must_use]
    pub const fn in_view(mut self, view: View) -> Self {
        self.view = Some(view);
        self
    }
}
