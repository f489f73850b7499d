//! What a session is told and what it tells: plain data.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::addr::{MemoryAccess, Pa, Va, VcpuId, View};
use crate::arch::amd64::{AddressContext, GpRegisters, Registers};
use crate::event::{EventReason, VmiEvent};
use crate::tap::OnWrite;

use super::monitor::EventSet;

/// A tap of a session: a breakpoint, a watch or a monitor. Never given twice in one session.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TapId(pub u32);

/// What a tap looks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TapKind {
    /// The instruction at its address being executed.
    Breakpoint,
    /// Accesses to a range of bytes.
    Watch {
        /// Bytes in the range.
        len: u64,
        /// Which accesses.
        access: MemoryAccess,
    },
    /// What vCPUs announce, wherever they are. Its address and page tables say nothing.
    Monitor(EventSet),
}

/// A tap, as the caller describes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TapSpec {
    /// What it looks for.
    pub kind: TapKind,
    /// Its address, the first one of a watch.
    pub va: Va,
    /// The page tables the address is looked up in.
    pub context: AddressContext,
    /// Whether hits under every root count; else only those under the root of `context`.
    pub global: bool,
    /// The view it is planted in.
    pub view: View,
    /// What a write to its byte does; `None`: as the session says.
    pub on_write: Option<OnWrite>,
    /// Its owner: the same address, root and owner twice is an error. `None`: one of its own.
    pub key: Option<u64>,
    /// Whether [`super::Session::poll`] returns its hits; they are counted in any case.
    pub wanted: bool,
    /// Whether it is planted at once.
    pub enabled: bool,
}

/// Where a tap is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TapState {
    /// Planted.
    Active,
    /// A breakpoint whose page is not mapped; it is planted when the guest maps it.
    Pending,
    /// Taken out of the guest, and kept.
    Disabled,
    /// Gone for good.
    Removed,
}

/// Counters of one tap.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TapStats {
    /// How often it was hit.
    pub hits: u64,
    /// Hits that its filter kept back; they are not among `hits`.
    pub filtered: u64,
    /// Hits at which its filter, and writes at which its policy looked at memory that could not be read.
    pub filter_faults: u64,
    /// How many of its hits were handed to the caller.
    pub handled: u64,
    /// How long vCPUs stood still for the hits that were handed out, all together.
    pub hold_total: Duration,
    /// The longest of these times.
    pub hold_max: Duration,
}

/// Counters of a session.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Events of any kind that the driver raised, and hits that needed none.
    pub events: u64,
    /// Hits of taps; an event that several own counts once for each.
    pub hits: u64,
    /// Hits that filters kept back, and events at a tapped place that nobody wanted: under another root, or in the rest of a
    /// watched page.
    pub filtered: u64,
    /// Hits that were handed to the caller and answered.
    pub handled: u64,
    /// Rows that were captured.
    pub rows: u64,
    /// Of those, how many had no room in memory or in the file's queue.
    pub rows_lost: u64,
    /// Calls whose return values were given up: they did not return while they could be waited for.
    pub returns_lost: u64,
    /// Taps that were disabled because they exceeded their budget.
    pub disabled_by_budget: u64,
    /// INT3s of the guest's own that were delivered to it.
    pub reinjected: u64,
    /// Reads of hidden pages that were served with the original bytes.
    pub hidden_reads: u64,
    /// Writes to hidden pages, under whichever policy.
    pub hidden_writes: u64,
    /// Breakpoints that [`OnWrite::Remove`] took out.
    pub removed_by_write: u64,
    /// Stores to page tables that breakpoints are found through.
    pub table_writes: u64,
    /// Addresses of breakpoints that were mapped, or mapped elsewhere.
    pub page_ins: u64,
    /// Addresses of breakpoints that were unmapped, or mapped elsewhere.
    pub page_outs: u64,
    /// Page-table roots under which breakpoints are looked up again only once they are loaded again, to make room for others.
    pub roots_given_up: u64,
    /// How long vCPUs stood still for hits that were handed out, all together.
    pub hold_total: Duration,
    /// The longest of these times.
    pub hold_max: Duration,
}

/// One hit of one tap. Its vCPU stands still until it is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hit {
    /// The tap.
    pub tap: TapId,
    /// The vCPU.
    pub vcpu: VcpuId,
    /// The view the vCPU was in.
    pub view: View,
    /// Its registers; RIP is the instruction, which has not been executed.
    pub registers: Registers,
    /// The virtual address: of the instruction, or of the first byte accessed.
    pub va: Va,
    /// The physical address of the same; 0 for a monitor.
    pub pa: Pa,
    /// X for a breakpoint; which access it was for a watch; none for a monitor.
    pub access: MemoryAccess,
    /// What the driver raised.
    pub reason: EventReason,
    /// 0 for the hit itself; 1 and up for the instructions after it that [`Verdict::Step`] asked for.
    pub step: u32,
    /// It is a write to a hidden page under [`OnWrite::Ask`], to be answered with [`super::Session::answer_write`].
    pub ask: bool,
    /// The tap's filter needs an answer first, with [`super::Session::answer_question_of_filter`]: its [`crate::capture::Node::Ask`].
    pub question: Option<u16>,
    /// When the event was received.
    pub at: Instant,
}

impl Hit {
    /// The event as the driver raised it.
    pub const fn event(&self) -> VmiEvent {
        VmiEvent { vcpu: self.vcpu, view: Some(self.view), registers: self.registers, reason: self.reason }
    }
}

/// Names of the general-purpose registers, in the order of [`GpChanges`].
pub const GP_NAMES: [&str; 18] = [
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
];

/// New values for some general-purpose registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GpChanges {
    /// The values, in the order of [`GP_NAMES`]; `None`: as it is.
    pub values: [Option<u64>; 18],
}

impl GpChanges {
    /// Every register as it is in `gp`.
    pub fn of(gp: &GpRegisters) -> Self {
        let values = [
            gp.rax, gp.rbx, gp.rcx, gp.rdx, gp.rsi, gp.rdi, gp.rsp, gp.rbp, gp.r8, gp.r9, gp.r10, gp.r11, gp.r12, gp.r13, gp.r14,
            gp.r15, gp.rip, gp.rflags,
        ];
        Self { values: values.map(Some) }
    }

    /// Whether they have the vCPU go on elsewhere than at `rip`.
    pub fn moves(&self, rip: u64) -> bool {
        self.values.get(16).copied().flatten().is_some_and(|to| to != rip)
    }

    /// Writes the values into `gp`.
    pub fn apply(&self, gp: &mut GpRegisters) {
        let targets = [
            &mut gp.rax,
            &mut gp.rbx,
            &mut gp.rcx,
            &mut gp.rdx,
            &mut gp.rsi,
            &mut gp.rdi,
            &mut gp.rsp,
            &mut gp.rbp,
            &mut gp.r8,
            &mut gp.r9,
            &mut gp.r10,
            &mut gp.r11,
            &mut gp.r12,
            &mut gp.r13,
            &mut gp.r14,
            &mut gp.r15,
            &mut gp.rip,
            &mut gp.rflags,
        ];
        for (target, value) in targets.into_iter().zip(self.values) {
            if let Some(value) = value {
                *target = value;
            }
        }
    }
}

/// What is to happen to the vCPU of a hit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The instruction is executed, and the vCPU goes on.
    Continue,
    /// The function that was just entered is left at once with this value in RAX.
    Return(u64),
    /// The vCPU goes on with these registers. With another RIP the instruction is not executed; a hit of a monitor needs one.
    SetRegisters(Box<GpChanges>),
    /// The vCPU goes on instruction by instruction: after each of so many there is a hit again, with [`Hit::step`] from 1 on.
    /// An INT3 of the guest's own ends it.
    Step(u32),
    /// The register write that was announced has no effect, and counts as executed; the guest does not get the exception. For hits of a monitor.
    Deny,
    /// The vCPU stands where it is until the next [`super::Session::poll`], which goes on as with `Continue`.
    Pause,
}

/// When [`super::Session::poll`] is to come back at the latest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    /// A point in time. One that is past: what there is at once, and a moment's run of the guest.
    pub deadline: Option<Instant>,
    /// So many hits, counted from this call on.
    pub hits: Option<u64>,
}

/// Why [`super::Session::poll`] came back.
#[derive(Clone, Debug)]
pub enum Poll {
    /// A hit of a wanted tap; to be answered before the next `poll`.
    Hit(Arc<Hit>),
    /// The time is over, 100 ms are over, or the session was woken.
    Timeout,
    /// No vCPU can run: each has halted for good or is held.
    Idle,
    /// There were as many hits as asked for.
    MaxHits,
}
