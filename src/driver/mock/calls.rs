//! What the mock driver remembers of each call, and the faults it is told to have.

use std::time::Duration;

use crate::addr::{Gfn, MemoryAccess, Pa, VcpuId, View};
use crate::arch::amd64::{Injection, Registers};
use crate::driver::{Additions, Monitor};
use crate::error::{Result, VmiError};
use crate::event::VmiEventResponse;

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident $({ $($field:ident: $type:ty),+ $(,)? })? = $op:literal,)+) => {
        /// One call of a driver method, with its arguments. Calls that failed are among them.
        #[derive(Clone, PartialEq, Eq, Debug)]
        #[expect(missing_docs, reason = "the fields are the arguments of the method of the same name")]
        pub enum Call {
            $($(#[$doc])* $name $({ $($field: $type),+ })?,)+
        }

        /// Which method a [`Call`] was of.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum CallKind {
            $($(#[$doc])* $name,)+
        }

        impl Call {
            /// Which method it was.
            pub const fn kind(&self) -> CallKind {
                match self {
                    $(Self::$name { .. } => CallKind::$name,)+
                }
            }
        }

        impl CallKind {
            /// Every kind there is, to loop over.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// The method's name, as a failing call has it in `VmiError::Driver::op`.
            pub const fn op(self) -> &'static str {
                match self {
                    $(Self::$name => $op,)+
                }
            }
        }
    };
}

calls! {
    /// `VmiRead::read`. Recorded and counted only if asked for.
    Read { pa: Pa, len: usize } = "read",
    /// `VmiWrite::write`.
    Write { pa: Pa, bytes: Vec<u8> } = "write",
    /// `VmiRegisters::registers`.
    Registers { vcpu: VcpuId } = "registers",
    /// `VmiRegisters::set_registers`.
    SetRegisters { vcpu: VcpuId, registers: Box<Registers> } = "set_registers",
    /// `VmiViews::create_view`.
    CreateView { access: MemoryAccess } = "create_view",
    /// `VmiViews::destroy_view`.
    DestroyView { view: View } = "destroy_view",
    /// `VmiViews::switch_to_view`.
    SwitchToView { view: View } = "switch_to_view",
    /// `VmiViews::vcpu_view`.
    VcpuView { vcpu: VcpuId } = "vcpu_view",
    /// `VmiViews::remap`.
    Remap { view: View, gfn: Gfn, frame: Option<Gfn> } = "remap",
    /// `VmiProtection::memory_access`.
    MemoryAccess { view: View, gfn: Gfn } = "memory_access",
    /// `VmiProtection::set_memory_access`.
    SetMemoryAccess { view: View, gfn: Gfn, access: MemoryAccess } = "set_memory_access",
    /// `VmiProtection::set_memory_access_multi`.
    SetMemoryAccessMulti { view: View, pages: Vec<(Gfn, MemoryAccess)> } = "set_memory_access_multi",
    /// `VmiFrames::allocate_frames`.
    AllocateFrames { count: usize } = "allocate_frames",
    /// `VmiFrames::free_frames`.
    FreeFrames { frames: Vec<Gfn> } = "free_frames",
    /// `VmiEvents::monitor`.
    Monitor { monitor: Monitor, on: bool } = "monitor",
    /// `VmiEvents::wait`.
    Wait { timeout: Duration } = "wait",
    /// `VmiEvents::respond`.
    Respond { vcpu: VcpuId, response: VmiEventResponse } = "respond",
    /// `VmiInject::inject`.
    Inject { vcpu: VcpuId, injection: Injection } = "inject",
    /// `VmiControl::pause`.
    Pause = "pause",
    /// `VmiControl::resume`.
    Resume = "resume",
    /// `VmiRepair::additions`.
    Additions = "additions",
    /// `VmiRepair::adopt`.
    Adopt { left: Additions, pauses: u32 } = "adopt",
    /// `VmiRepair::release_held`.
    ReleaseHeld = "release_held",
}

/// Which calls count until one fails.
#[derive(Clone, Copy)]
pub(super) enum Counted {
    Recorded,
    /// Reads too, recorded or not.
    Any,
    Of(CallKind),
}

/// A call that is to fail.
struct Fault {
    counted: Counted,
    /// How many calls are left up to and with the one that fails.
    left: usize,
    errno: i32,
}

/// The calls so far, and the faults to come.
#[derive(Default)]
pub(super) struct Recorder {
    pub(super) calls: Vec<Call>,
    pub(super) record_reads: bool,
    faults: Vec<Fault>,
    /// The last call that was made to fail.
    pub(super) failed: Option<CallKind>,
}

impl Recorder {
    pub(super) fn fail(&mut self, counted: Counted, n: usize, errno: i32) {
        self.faults.push(Fault { counted, left: n, errno });
    }

    pub(super) fn faults_left(&self) -> usize {
        self.faults.len()
    }

    pub(super) fn clear_faults(&mut self) {
        self.faults.clear();
    }

    /// Takes note of a call. An error if it is one that is to fail.
    pub(super) fn enter(&mut self, call: Call) -> Result<()> {
        let kind = call.kind();
        let recorded = kind != CallKind::Read || self.record_reads;
        if recorded {
            self.calls.push(call);
        }
        let mut errno = None;
        self.faults.retain_mut(|fault| {
            let counts = match fault.counted {
                Counted::Recorded => recorded,
                Counted::Any => true,
                Counted::Of(wanted) => wanted == kind,
            };
            if counts {
                fault.left = fault.left.saturating_sub(1);
                if fault.left == 0 {
                    errno = Some(fault.errno);
                    return false;
                }
            }
            true
        });
        match errno {
            None => Ok(()),
            Some(errno) => {
                self.failed = Some(kind);
                Err(VmiError::Driver { op: kind.op(), errno, detail: "a fault the test asked for".to_owned() })
            }
        }
    }
}
