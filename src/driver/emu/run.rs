//! The machine: vCPUs on two engines.
//!
//! The *main* engine runs guest code at full speed, one vCPU after the other in slices. The *stepper* runs one instruction at a
//! time in whatever view is asked for; switching one engine between the two ways would throw its translated code away. A
//! vCPU's registers rest in its context between runs and are copied into the engine that is to run it.
//!
//! Both engines keep a TLB and translated code. What can make them wrong is seen by the driver: instructions that change the
//! MMU are stepped (`insn.rs`), stores to translated code are stepped (`memory.rs`), and changes of views mark both TLBs stale.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustc_hash::FxHashSet;

use crate::addr::{Gfn, MemoryAccess, PAGE_SHIFT, PAGE_SIZE, Pa, Va, VcpuId, View};
use crate::arch::amd64::{ControlRegister, InjectionKind, pte, vector};
use crate::driver::{Monitor, OnTrap, Trap, Wait, Waker};
use crate::error::Result;
use crate::event::{EventReason, VmiEvent};

use super::apic;
use super::deliver::{self, Fault};
use super::hooks::{CpuHooks, Denied, Devices, Exit, Page, WINDOW, Why, rescan, translate};
use super::layout::Layout;
use super::memory::{Each, Memory, Which};
use super::resident::Resident;
use super::step::Stack;
use super::sys::{Access, Context, Engine, EngineKind, Library, code};

use super::vcpu::{Held, Mode, State, Step, Vcpu};

/// Basic blocks a vCPU runs before the next one has its turn, or before the clock is looked at.
const SLICE: u64 = 10_000;
/// Basic blocks that an event or a step costs a vCPU of its turn: it takes about as long. Else one that reads hidden pages all the time
/// would keep the others waiting for a hundred times as long as they keep it.
pub(super) const DEAR: u64 = 50;
/// Iterations of a repeated string instruction that are stepped before the clock is looked at.
pub(super) const STRING_BURST: u32 = 4096;
/// Turns of the loop between two looks at the clock, when turns are short because of events.
const TURNS: u32 = 64;

pub(super) const RAX: u8 = 0;
pub(super) const RCX: u8 = 1;
pub(super) const RDX: u8 = 2;
pub(super) const RBX: u8 = 3;
pub(super) const RSP: u8 = 4;
pub(super) const RDI: u8 = 7;

const DR6_BS: u64 = 1 << 14;

/// Delivers the debug exception of the trap flag.
pub(super) fn trap(vcpu: &mut Vcpu, memory: &Memory) {
    let dr6 = vcpu.context.u64(vcpu.layout.dr6);
    vcpu.context.set_u64(vcpu.layout.dr6, dr6 | DR6_BS);
    deliver::fault(vcpu, memory, Fault::plain(vector::DB));
}

/// Wakes a wait: a flag that the loop looks at.
#[derive(Debug, Default)]
pub struct Bell(AtomicBool);

impl Waker for Bell {
    fn wake(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Which events are raised.
#[derive(Debug, Default)]
pub struct Monitors {
    breakpoint: bool,
    debug: bool,
    pub(super) cpuid: bool,
    pub(super) cr: [bool; 5],
    pub(super) msrs: FxHashSet<u32>,
}

impl Monitors {
    pub fn set(&mut self, monitor: Monitor, on: bool) {
        match monitor {
            Monitor::Breakpoint => self.breakpoint = on,
            Monitor::Debug => self.debug = on,
            Monitor::Cpuid => self.cpuid = on,
            // Refused before.
            Monitor::DescriptorAccess | Monitor::PortIo | Monitor::GuestRequest => {}
            Monitor::ControlRegister(register) => {
                if let Some(flag) = self.cr.get_mut(cr_number(register)) {
                    *flag = on;
                }
            }
            Monitor::Msr(msr) if on => {
                self.msrs.insert(msr);
            }
            Monitor::Msr(msr) => {
                self.msrs.remove(&msr);
            }
        }
    }
}

pub(super) const fn cr_number(register: ControlRegister) -> usize {
    match register {
        ControlRegister::Cr0 => 0,
        ControlRegister::Cr3 => 3,
        ControlRegister::Cr4 => 4,
    }
}

/// An event, without the registers: they do not change before it is handed out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Raised {
    index: usize,
    view: View,
    reason: EventReason,
}

/// How an instruction that the driver looks at goes on.
pub(super) enum Went {
    /// The engine is to do it.
    Native,
    /// It is done.
    Done,
    /// It is announced first.
    Event(Raised),
}

/// How many instructions were stepped, and by whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Steps {
    /// Carried out by the driver in the saved registers.
    pub direct: u64,
    /// Carried out by an engine.
    pub engine: u64,
}

/// The whole machine.
pub struct Machine {
    pub memory: Rc<Memory>,
    pub devices: Rc<Devices>,
    pub monitors: Monitors,
    pub vcpus: Vec<Vcpu>,
    pub bell: Arc<Bell>,
    pub pauses: u32,
    pub(super) main: Engine<CpuHooks>,
    pub(super) stepper: Engine<CpuHooks>,
    /// Whose state the main engine holds.
    pub(super) resident: Option<Resident>,
    /// Takes in an engine's whole state where a vCPU's own context must not.
    pub(super) aside: Context,
    /// For whom each engine's TLB is filled.
    pub(super) filled_for: Each<Option<(usize, Mode)>>,
    current: usize,
    pub(super) slice: u64,
    /// Virtual time: basic blocks run by all vCPUs together.
    pub(super) now: u64,
    /// The stack of the vCPU that was stepped last.
    pub(super) stack: Option<(Stack, Page)>,
    /// How instructions were stepped.
    pub steps: Steps,
    /// Frames that stand in for pages whose stores are to be discarded.
    pub(super) scratch: [Gfn; 2],
}

impl Machine {
    /// A machine without vCPUs over `memory`.
    pub fn new(library: &Arc<Library>, memory: Memory) -> Result<Self> {
        let scratch = [memory.reserve_frame()?, memory.reserve_frame()?];
        let memory = Rc::new(memory);
        let devices = Rc::new(Devices::default());
        let engine = |which, kind| Engine::new(library, kind, memory.ram(), CpuHooks::new(which, &memory, &devices));
        let main = engine(Which::Main, EngineKind::Main)?;
        Ok(Self {
            aside: main.context()?,
            main,
            stepper: engine(Which::Stepper, EngineKind::Stepper)?,
            memory,
            devices,
            monitors: Monitors::default(),
            vcpus: Vec::new(),
            bell: Arc::default(),
            pauses: 0,
            resident: None,
            filled_for: Each::default(),
            current: 0,
            slice: SLICE,
            now: 0,
            stack: None,
            steps: Steps::default(),
            scratch,
        })
    }

    /// Adds a vCPU whose state `set_up` gives to the engine.
    pub fn add_vcpu(&mut self, layout: Layout, set_up: impl FnOnce(&mut Engine<CpuHooks>) -> Result<()>) -> Result<&mut Vcpu> {
        let id = self.vcpus.len();
        self.evict();
        set_up(&mut self.main)?;
        self.vcpus.push(Vcpu {
            context: self.main.context()?,
            layout,
            flags_apart: false,
            apic: apic::Apic::new(id as u32),
            view: View::DEFAULT,
            state: State::Running,
            held: Held::No,
            step: None,
            injection: None,
            announced: None,
            denied_page: None,
            denied_store: false,
            cpuid_leaf: 0,
        });
        self.vcpu_mut(id)
    }

    /// Virtual time now.
    pub const fn now(&self) -> u64 {
        self.now
    }

    // --- the loop ---

    /// Runs until an event, the end of the time, the bell, or until nothing can run. INT3s are put to `sort` first.
    pub fn wait(&mut self, timeout: Duration, sort: &mut dyn FnMut(&Trap<'_>) -> OnTrap) -> Result<Wait> {
        let mut deadline = None;
        let mut turns = 0;
        loop {
            // Looked at first: a swap costs as much as a step.
            if self.bell.0.load(Ordering::Relaxed) && self.bell.0.swap(false, Ordering::Acquire) {
                return Ok(Wait::Timeout);
            }
            if self.pauses > 0 {
                return Ok(Wait::Idle);
            }
            let Some(index) = self.pick() else {
                if self.skip_to_next_timer() {
                    continue;
                }
                return Ok(Wait::Idle);
            };
            if let Some(raised) = self.advance(index)? {
                match self.sort(&raised, sort) {
                    OnTrap::StepOver => {}
                    OnTrap::Take => return Ok(Wait::Taken),
                    OnTrap::Raise => {
                        let Raised { index, view, reason } = raised;
                        let vcpu = self.vcpu(index)?;
                        let (id, view) = (VcpuId(index as u16), Some(view));
                        return Ok(Wait::Event(VmiEvent { vcpu: id, view, registers: vcpu.registers(), reason }));
                    }
                }
            }
            // The clock is read only now and then: a turn may take less time than reading it.
            turns += 1;
            if self.slice == 0 || turns >= TURNS {
                turns = 0;
                let now = Instant::now();
                if now >= *deadline.get_or_insert(now + timeout) {
                    return Ok(Wait::Timeout);
                }
            }
        }
    }

    /// What becomes of what was raised. What is stepped over is answered here.
    fn sort(&mut self, raised: &Raised, sort: &mut dyn FnMut(&Trap<'_>) -> OnTrap) -> OnTrap {
        let Raised { index, view, reason: EventReason::Breakpoint { gfn, insn_len: 1 } } = *raised else { return OnTrap::Raise };
        let Some(vcpu) = self.vcpus.get_mut(index).filter(|_| view != View::DEFAULT) else { return OnTrap::Raise };
        let root = Pa(vcpu.cr(3) & pte::ADDRESS);
        let trap = Trap { vcpu: VcpuId(index as u16), view, gfn, rip: Va(vcpu.rip()), root, registers: &*vcpu };
        let sorted = sort(&trap);
        if sorted == OnTrap::StepOver {
            vcpu.held = Held::No;
            vcpu.step = Some(Step::over_breakpoint(View::DEFAULT, view));
        }
        sorted
    }

    /// The vCPU whose turn it is: the current one until its slice is used up, then the next that can run.
    fn pick(&mut self) -> Option<usize> {
        if self.slice > 0 && self.can_run(self.current) {
            return Some(self.current);
        }
        let count = self.vcpus.len();
        let first = self.current + usize::from(self.slice == 0);
        for turn in first..first + count {
            // Once round at most; dividing takes longer than all the rest here.
            let index = if turn < count { turn } else { turn - count };
            if self.can_run(index) {
                if index != self.current || self.slice == 0 {
                    self.current = index;
                    self.slice = SLICE;
                }
                return Some(index);
            }
        }
        None
    }

    fn can_run(&mut self, index: usize) -> bool {
        let now = self.now;
        let Some(vcpu) = self.vcpus.get_mut(index) else { return false };
        if vcpu.held != Held::No {
            return false;
        }
        match vcpu.state {
            State::Running => true,
            State::Shutdown => false,
            State::Halted => {
                vcpu.apic.tick(now);
                vcpu.injection.is_some() || (vcpu.apic.pending().is_some() && vcpu.takes_interrupts())
            }
        }
    }

    /// All sleep: lets time pass until the first timer of one that can be woken.
    fn skip_to_next_timer(&mut self) -> bool {
        let sleeps = |vcpu: &&Vcpu| vcpu.state == State::Halted && vcpu.held == Held::No && vcpu.takes_interrupts();
        let due = self.vcpus.iter().filter(sleeps).filter_map(|vcpu| vcpu.apic.due()).min();
        match due {
            Some(due) if due > self.now => {
                self.now = due;
                true
            }
            _ => false,
        }
    }

    /// One turn of one vCPU.
    fn advance(&mut self, index: usize) -> Result<Option<Raised>> {
        let now = self.now;
        let Some(vcpu) = self.vcpus.get_mut(index) else { return Ok(None) };
        if let Some(injection) = vcpu.injection.take() {
            // Instead of what was announced.
            vcpu.announced = None;
            let memory = Rc::clone(&self.memory);
            let vcpu = self.vcpu_mut(index)?;
            match injection.kind {
                InjectionKind::External => deliver::external(vcpu, &memory, injection.vector),
                InjectionKind::Exception => {
                    let fault = Fault { vector: injection.vector, error_code: injection.error_code, cr2: injection.cr2 };
                    deliver::fault(vcpu, &memory, fault);
                }
                InjectionKind::Software => {
                    let next = vcpu.rip().wrapping_add(injection.insn_len.into());
                    deliver::software(vcpu, &memory, injection.vector, next);
                }
            }
            return Ok(None);
        }
        if let Some(step) = vcpu.step {
            let wakes = if vcpu.state == State::Halted { vcpu.apic.pending() } else { None };
            let Some(vector) = wakes else { return self.step(index, step) };
            // What comes next to a vCPU that sleeps is the interrupt, and with its delivery the step is done: SDM vol. 3, 26.5.2.
            self.interrupt(index, vector)?;
            return self.finish(index, step);
        }
        if vcpu.announced == Some(vcpu.rip()) {
            // Before any interrupt, whose handler may execute the like.
            return self.step(index, self.in_place(index)?);
        }
        vcpu.apic.tick(now);
        let mut wants_interrupts = false;
        if let Some(vector) = vcpu.apic.pending() {
            if vcpu.takes_interrupts() {
                self.interrupt(index, vector)?;
                return Ok(None);
            }
            if vcpu.is_in_interrupt_shadow() {
                // The main engine would stop before the very instruction that ends the shadow.
                return self.step(index, self.in_place(index)?);
            }
            wants_interrupts = true;
        }
        self.run_main(index, wants_interrupts)
    }

    /// Delivers an interrupt that the vCPU takes now.
    fn interrupt(&mut self, index: usize, vector: u8) -> Result<()> {
        let memory = Rc::clone(&self.memory);
        let vcpu = self.vcpu_mut(index)?;
        vcpu.apic.accept(vector);
        deliver::external(vcpu, &memory, vector);
        Ok(())
    }

    /// Makes both engines forget code that was overwritten.
    fn forget_overwritten(&mut self) {
        while let Some((first, end)) = self.memory.next_to_forget() {
            for engine in [&mut self.main, &mut self.stepper] {
                engine.hooks().window_open.set(true);
                engine.forget_code(WINDOW | first, WINDOW | end);
                engine.hooks().window_open.set(false);
            }
            rescan(&self.memory, self.main.as_ref(), first, end);
        }
    }

    /// Empties the engine's TLB if what it holds may be wrong for that vCPU in that mode.
    pub(super) fn prepare(&mut self, which: Which, index: usize, mode: Mode) {
        self.forget_overwritten();
        let engine = if which == Which::Main { &mut self.main } else { &mut self.stepper };
        let filled_for = self.filled_for.of_mut(which);
        if self.memory.is_stale(which) || *filled_for != Some((index, mode)) {
            engine.flush_tlb();
            engine.hooks().flushed();
            *filled_for = Some((index, mode));
            engine.hooks().mode.set(mode);
        }
        engine.hooks().exit.set(Exit::None);
    }

    fn run_main(&mut self, index: usize, wants_interrupts: bool) -> Result<Option<Raised>> {
        let vcpu = self.vcpu(index)?;
        let (mode, rip, due) = (vcpu.mode(vcpu.view), vcpu.rip(), vcpu.apic.due());
        self.prepare(Which::Main, index, mode);
        self.load(index)?;
        let budget = due.map_or(self.slice, |due| due.saturating_sub(self.now).min(self.slice).max(1));
        let hooks = self.main.hooks();
        hooks.budget.set(budget);
        hooks.wants_interrupts.set(wants_interrupts);
        let ended = self.main.go(rip)?;
        self.ran(index);
        let hooks = self.main.hooks();
        let used = budget - hooks.budget.get();
        self.now += used;
        self.slice -= used;
        match hooks.exit.get() {
            Exit::Budget | Exit::Retry => Ok(None),
            Exit::System => self.step(index, self.in_place(index)?),
            exit => self.after(index, Which::Main, exit, ended, None),
        }
    }

    /// Acts on why a run ended. `step` is what was being stepped, if it was the stepper's run.
    pub(super) fn after(
        &mut self,
        index: usize,
        which: Which,
        exit: Exit,
        ended: i32,
        step: Option<Step>,
    ) -> Result<Option<Raised>> {
        if exit == Exit::Interrupt(vector::BP) {
            // Only INT3 and INT 3 raise it.
            return self.guest_breakpoint(index, which, step);
        }
        if let Exit::Denied(denied) = exit {
            return self.denied(index, which, denied, step);
        }
        let memory = Rc::clone(&self.memory);
        let tells_debug = self.monitors.debug;
        let vcpu = self.vcpu_mut(index)?;
        match (exit, ended) {
            (Exit::Interrupt(vector), _) => {
                let is_software = vcpu.context.u32(vcpu.layout.exception_is_int) != 0;
                if vector == vector::DB {
                    if tells_debug {
                        let reason = EventReason::DebugException { pending: DR6_BS };
                        let view = step.map_or(vcpu.view, |step| step.view);
                        return Ok(Some(self.raise(index, view, reason, Held::Debug)?));
                    }
                    trap(vcpu, &memory);
                } else if is_software {
                    let next = vcpu.rip();
                    // A failing gate must find RIP at the instruction: INT n is two bytes long.
                    vcpu.set_rip(next.wrapping_sub(2));
                    deliver::software(vcpu, &memory, vector, next);
                } else {
                    let has_code = matches!(vector, vector::DF | vector::TS..=vector::PF | vector::AC);
                    let error_code = has_code.then(|| vcpu.context.u32(vcpu.layout.error_code));
                    deliver::fault(vcpu, &memory, Fault { vector, error_code, cr2: None });
                }
                Ok(None)
            }
            (_, code::INSN_INVALID) => {
                deliver::fault(vcpu, &memory, Fault::plain(vector::UD));
                Ok(None)
            }
            (_, code::OK) => {
                // Nothing ended the run but `hlt`.
                vcpu.state = State::Halted;
                Ok(None)
            }
            (_, ended) => Err(self.main.error("running the guest", ended)),
        }
    }

    /// An INT3 was executed; RIP is behind it.
    pub(super) fn guest_breakpoint(&mut self, index: usize, which: Which, step: Option<Step>) -> Result<Option<Raised>> {
        let memory = Rc::clone(&self.memory);
        let raised = self.monitors.breakpoint;
        let vcpu = self.vcpu(index)?;
        let at = vcpu.rip().wrapping_sub(1);
        // The engine has just fetched it, so its TLB says where from.
        let known = if which == Which::Main { self.main.hooks().fetched(at, vcpu.cpl()) } else { None };
        let vcpu = self.core_mut(index)?;
        let next = vcpu.rip();
        let view = step.map_or(vcpu.view, |step| step.view);
        let walk = || translate(&memory, &vcpu.mode(view), at, Access::Fetch, vcpu.cpl(), || 0).ok();
        let page = known.or_else(|| walk().map(|page| (page.gfn, page.frame)));
        let mut byte = [0];
        let is_int3 = page.is_some_and(|(_, frame)| {
            memory.ram().read(u64::from(frame) << PAGE_SHIFT | at & (PAGE_SIZE - 1), &mut byte).is_some() && byte == [0xcc]
        });
        let len = if is_int3 { 1 } else { 2 };
        let rip = next.wrapping_sub(len.into());
        vcpu.set_rip(rip);
        if !raised {
            deliver::software(self.integer_mut(index)?, &memory, vector::BP, next);
            return Ok(None);
        }
        // The two-byte form may begin on the page before; its last byte's page is as good a name for it.
        let gfn = page.map_or(Gfn(0), |(gfn, _)| Gfn(gfn));
        Ok(Some(self.raise(index, view, EventReason::Breakpoint { gfn, insn_len: len }, Held::Breakpoint(len))?))
    }

    pub(super) fn raise(&mut self, index: usize, view: View, reason: EventReason, held: Held) -> Result<Raised> {
        let Some(vcpu) = self.vcpus.get_mut(index) else { return Err(self.no_vcpu(index)) };
        vcpu.held = held;
        if matches!(held, Held::Write(_) | Held::Cpuid | Held::Debug) {
            vcpu.announced = Some(vcpu.rip());
        }
        self.slice = self.slice.saturating_sub(DEAR);
        if !matches!(held, Held::Write(_) | Held::Cpuid) {
            // The instruction that was to be stepped has another fate now; the answer decides.
            vcpu.step = None;
            vcpu.view = view;
        }
        Ok(Raised { index, view, reason })
    }

    pub(super) fn denied(&mut self, index: usize, which: Which, denied: Denied, step: Option<Step>) -> Result<Option<Raised>> {
        let memory = Rc::clone(&self.memory);
        let vcpu = self.vcpu(index)?;
        let rip = vcpu.rip();
        let mut va = denied.va;
        if denied.access == Access::Fetch {
            if rip & !(PAGE_SIZE - 1) == va {
                va = rip;
            } else if which == Which::Main {
                // The engine translates ahead: an instruction that is not reached yet runs into the page. One step tells.
                return self.step(index, self.in_place(index)?);
            }
        }
        if denied.access == Access::Write && which == Which::Main {
            // The stepper finds out which bytes it is about.
            return self.step(index, self.in_place(index)?);
        }
        let len = denied.len;
        match denied.why {
            Why::Code => self.step(index, self.in_place(index)?),
            Why::PageFault(code) => {
                // The handler may map the page without dropping anything: the entry that led here must not stay.
                memory.mark_stale_in(which);
                deliver::fault(self.vcpu_mut(index)?, &memory, Fault::page(code, va));
                Ok(None)
            }
            Why::NonCanonical => {
                memory.mark_stale_in(which);
                deliver::fault(self.vcpu_mut(index)?, &memory, Fault::with_code(vector::GP, 0));
                Ok(None)
            }
            Why::View { gfn } => {
                let access = match denied.access {
                    Access::Read => MemoryAccess::R,
                    Access::Write => MemoryAccess::W,
                    Access::Fetch => MemoryAccess::X,
                };
                let is_guarded = access == MemoryAccess::W
                    && step.is_some_and(|step| {
                        step.guard.is_some() && memory.access(step.view, Gfn(gfn)).is_ok_and(|own| own.contains(access))
                    });
                let view = step.filter(|_| !is_guarded).map_or(vcpu.view, |step| step.view);
                let pa = Gfn(gfn).pa(va);
                let target = self.integer_mut(index)?;
                target.denied_page = Some((Gfn(gfn), va, len));
                target.denied_store = access == MemoryAccess::W;
                let reason = EventReason::MemoryAccess { pa, va: Some(Va(va)), access, len };
                Ok(Some(self.raise(index, view, reason, Held::Access)?))
            }
        }
    }
}
