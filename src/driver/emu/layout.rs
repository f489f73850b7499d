//! Where the engine keeps what no register call reaches: found at start-up by writing known values and looking for them.
//!
//! The engine delivers no exception into the guest, so the driver must set the privilege level, read the error code and clear
//! the record of the last exception itself, in a saved context. Releases may move these fields; a field that is not found at
//! exactly one place is a clear error at start, never a guess.

use std::rc::Rc;
use std::sync::Arc;

use crate::arch::amd64::rflags;
use crate::error::{Result, VmiError};

use super::sys::{Access, Context, Engine, EngineKind, EngineRef, Fill, Hooks, Library, Ram, Table, code, reg};

/// Byte offsets inside a [`Context`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: 16 words of 8 bytes.
    pub gp: usize,
    pub rip: usize,
    /// RFLAGS without the arithmetic flags and DF, which are kept elsewhere.
    pub eflags: usize,
    /// The engine's own mode flags; the low two bits are the privilege level.
    pub hflags: usize,
    /// ES, CS, SS, DS, FS, GS, LDTR, TR, GDTR, IDTR: [`SEGMENT`] bytes each.
    pub segments: usize,
    /// CR0 to CR8: 8 bytes each.
    pub cr: usize,
    pub efer: usize,
    pub star: usize,
    pub lstar: usize,
    pub sfmask: usize,
    pub kernel_gs_base: usize,
    pub error_code: usize,
    /// Whether the last exception was a software interrupt.
    pub exception_is_int: usize,
    pub dr6: usize,
    /// The exception the engine believes to be in delivery; all ones for none.
    pub old_exception: usize,
    /// Bytes of a whole context.
    pub context_size: usize,
    /// How many bytes of state a context copies: all of it, and what instructions change that use neither the FPU nor SSE nor
    /// MSRs.
    pub copied: Copied,
}

/// See [`Layout::copied`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Copied {
    pub all: u64,
    pub integer: u64,
    /// Of that: the general-purpose registers, RIP, RFLAGS with what is kept of them elsewhere, and the mode flags.
    pub core: u64,
    /// Offset in a [`Context`] of what is no integer state.
    pub rest: usize,
}

/// Bytes of one segment register: selector u32, padding, base u64, limit u32, flags u32.
pub const SEGMENT: usize = 24;
/// Index of CS in [`Layout::segments`].
pub const CS: usize = 1;
/// Index of SS.
pub const SS: usize = 2;
/// Index of TR.
pub const TR: usize = 7;
/// Index of GDTR.
pub const GDTR: usize = 8;
/// Index of IDTR.
pub const IDTR: usize = 9;

// The engine's mode flags (HF_* of its i386 target). The calibration checks those it relies on.
/// Privilege level.
pub const HF_CPL: u32 = 3;
/// Interrupts are held off for one instruction, after `sti` and `mov ss`.
pub const HF_INHIBIT_IRQ: u32 = 1 << 3;
/// 32-bit code segment; set in 64-bit mode too.
pub const HF_CS32: u32 = 1 << 4;
/// 32-bit stack segment; set in 64-bit mode too.
pub const HF_SS32: u32 = 1 << 5;
/// Segment bases are added.
pub const HF_ADDSEG: u32 = 1 << 6;
/// Long mode active.
pub const HF_LMA: u32 = 1 << 14;
/// 64-bit code segment.
pub const HF_CS64: u32 = 1 << 15;

const MSR_EFER: u32 = 0xc000_0080;
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_SFMASK: u32 = 0xc000_0084;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;

const GDT: u64 = 0x1000;
const STACK: u64 = 0x3000;
const KERNEL: u64 = 0x4000;
const USER: u64 = 0x5000;

struct Flat;

impl Hooks for Flat {
    fn fill(&self, _: EngineRef<'_>, va: u64, _: Access) -> Option<Fill> {
        (va < 0x10000).then_some(Fill { pa: va, rights: 7 })
    }
    fn interrupt(&self, _: u32) {}
    fn unmapped(&self, _: u64, _: u32, _: bool) {}
    fn store(&self, _: u64, _: u32) {}
    fn block(&self, _: EngineRef<'_>) -> bool {
        false
    }
    fn code(&self, _: u64) -> bool {
        false
    }
    fn port_in(&self, _: u32, _: u32) -> u32 {
        0
    }
    fn port_out(&self, _: u32, _: u32, _: u32) {}
}

struct Finder<'a> {
    library: &'a Library,
}

impl Finder<'_> {
    fn error(&self, what: &str, found: usize) -> VmiError {
        let (major, minor, patch) = self.library.version();
        VmiError::Image {
            what: self.library.path().display().to_string(),
            reason: format!(
                "calibration of Unicorn {major}.{minor}.{patch} failed: {what} was found at {found} places of its state, not at one; \
                 this release keeps its state in a way this vmitap does not know"
            ),
        }
    }

    fn one(&self, what: &str, context: &Context, step: usize, matches: impl Fn(usize) -> bool) -> Result<usize> {
        let mut places = (0..context.size().saturating_sub(8)).step_by(step).filter(|&at| matches(at));
        match (places.next(), places.count()) {
            (Some(at), 0) => Ok(at),
            (None, _) => Err(self.error(what, 0)),
            (Some(_), more) => Err(self.error(what, more + 1)),
        }
    }

    fn word(&self, what: &str, context: &Context, value: u64) -> Result<usize> {
        self.one(what, context, 8, |at| context.u64(at) == value)
    }

    fn expect(&self, what: &str, holds: bool) -> Result<()> {
        if holds { Ok(()) } else { Err(self.error(what, 0)) }
    }
}

/// Finds the layout of `library`'s contexts, on an engine of its own that is thrown away.
pub fn calibrate(library: &Arc<Library>) -> Result<Layout> {
    const MARK: u64 = 0x5a17_c0de_0000_0000;
    let find = Finder { library };
    let ram = Rc::new(Ram::new(0x10000)?);
    let mut engine = Engine::new(library, EngineKind::Main, &ram, Flat)?;
    engine.write_msr(MSR_EFER, 0xd01)?;
    engine.write_register(reg::CR3, 0)?;
    engine.write_register(reg::CR4, 0x620)?;
    engine.write_register(reg::CR0, 0x8005_0033)?;
    for (register, mark) in [(reg::RAX, 1), (reg::RIP, 2), (reg::CR2, 3), (reg::FS_BASE, 4), (reg::GS_BASE, 5), (reg::DR6, 6)] {
        engine.write_register(register, MARK | mark)?;
    }
    for (msr, mark) in [(MSR_STAR, 7), (MSR_LSTAR, 8), (MSR_SFMASK, 9), (MSR_KERNEL_GS_BASE, 10)] {
        engine.write_msr(msr, MARK | mark)?;
    }
    engine.write_register(reg::R15, MARK | 0xb)?;
    for (register, mark) in [(reg::TR, 12), (reg::GDTR, 13), (reg::IDTR, 14)] {
        engine.write_table(register, &Table { selector: 0, base: MARK | mark, limit: 0xfff, flags: 0x8b00 })?;
    }
    let state = engine.context()?;
    let gp = find.word("RAX", &state, MARK | 1)?;
    find.expect("R15", state.u64(gp + 15 * 8) == MARK | 0xb)?;
    let rip = find.word("RIP", &state, MARK | 2)?;
    let segments = find.word("the base of FS", &state, MARK | 4)?.saturating_sub(8 + 4 * SEGMENT);
    find.expect("the base of GS", state.u64(segments + 5 * SEGMENT + 8) == MARK | 5)?;
    for (index, mark, what) in [(TR, 12, "TR"), (GDTR, 13, "GDTR"), (IDTR, 14, "IDTR")] {
        find.expect(what, state.u64(segments + index * SEGMENT + 8) == MARK | mark)?;
    }
    let cr = find.word("CR2", &state, MARK | 3)?.saturating_sub(16);
    find.expect("CR4", state.u64(cr + 32) == 0x620)?;
    let dr6 = find.word("DR6", &state, MARK | 6)?;
    let star = find.word("STAR", &state, MARK | 7)?;
    let lstar = find.word("LSTAR", &state, MARK | 8)?;
    let sfmask = find.word("SFMASK", &state, MARK | 9)?;
    let kernel_gs_base = find.word("KERNEL_GS_BASE", &state, MARK | 0xa)?;
    let efer = find.word("EFER", &state, 0xd01)?;

    // A kernel that goes to ring 3 and a user that faults there with a known error code.
    let failed = || find.error("the memory of the calibration guest", 0);
    for (index, descriptor) in
        [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff].into_iter().enumerate()
    {
        ram.write_u64(GDT + 8 * index as u64, descriptor).ok_or_else(failed)?;
    }
    for (index, word) in [USER, 0x2b, 0x202, STACK + 0x800, 0x23].into_iter().enumerate() {
        ram.write_u64(STACK + 8 * index as u64, word).ok_or_else(failed)?;
    }
    ram.write(KERNEL, &[0x90, 0x48, 0xcf]).ok_or_else(failed)?; // nop; iretq
    ram.write(USER, &[0x8e, 0xd8]).ok_or_else(failed)?; // mov ds, ax
    engine.write_table(reg::GDTR, &Table { selector: 0, base: GDT, limit: 0x2f, flags: 0 })?;
    let mut state = engine.context()?;
    for (index, selector, flags) in [(CS, 8, 0x00af_9b00), (SS, 0x10, 0x00cf_9300)] {
        state.set_u32(segments + index * SEGMENT, selector);
        state.set_u32(segments + index * SEGMENT + 20, flags);
    }
    state.set_u64(gp, 0xabcd_1238);
    state.set_u64(gp + 4 * 8, STACK);
    engine.restore(&state);
    let run = |engine: &mut Engine<Flat>, rip: u64| {
        let ended = engine.run(rip, 1);
        if ended == code::OK { Ok(()) } else { Err(library.error("running the calibration guest", ended)) }
    };
    run(&mut engine, KERNEL)?;
    let kernel = engine.context()?;
    run(&mut engine, KERNEL + 1)?;
    let user = engine.context()?;
    find.expect("the entry to ring 3", user.u64(rip) == USER)?;
    let in_long_mode = HF_LMA | HF_CS64;
    let hflags = find.one("the privilege level", &user, 4, |at| {
        let (before, after) = (kernel.u32(at), user.u32(at));
        before & in_long_mode == in_long_mode && before & HF_CPL == 0 && before ^ after == HF_CPL
    })?;
    run(&mut engine, USER)?;
    let faulted = engine.context()?;
    let error_code = find.one("the error code", &faulted, 4, |at| faulted.u32(at) == 0x1238 && user.u32(at) != 0x1238)?;
    let old_exception =
        find.one("the exception in delivery", &faulted, 4, |at| user.u32(at) == u32::MAX && faulted.u32(at) == 13)?;
    find.expect("the address of the fault", faulted.u64(rip) == USER)?;

    // The integer state comes first, and a context copies as many bytes as its own first word says.
    let all = faulted.copied();
    let header = (faulted.size() as u64).saturating_sub(all);
    let last = gp.max(rip).max(hflags).max(segments + 10 * SEGMENT).max(cr + 5 * 8).max(efer) as u64 + 8;
    find.expect("the size of its state", header >= 8 && header < gp as u64 + 1 && last < header + all)?;
    find.expect(
        "the order of its state",
        [star, lstar, sfmask, kernel_gs_base, error_code, old_exception].iter().all(|at| *at as u64 >= last),
    )?;
    let integer = last - header;
    let core = (gp + 16 * 8).max(rip + 8).max(hflags + 4) as u64 - header;
    let mut part = engine.context()?;
    part.set_u64(gp, 1);
    part.set_u64(star, 2);
    engine.save_part(&mut part, integer);
    find.expect("a copy of part of its state", part.u64(gp) == faulted.u64(gp) && part.u64(star) == 2)?;

    let eflags = rip + 8;
    let with_if = {
        let mut state = engine.context()?;
        state.write_register(reg::EFLAGS, 0x202);
        state.u64(eflags)
    };
    find.expect("RFLAGS", with_if & 0x200 != 0)?;

    // A run stands at an INT3 with the arithmetic flags apart, and goes on with what was restored meanwhile.
    ram.write(KERNEL, &[0x31, 0xc0, 0x83, 0xf8, 0x01, 0xcc, 0x0f, 0x92, 0xc0, 0xcc]).ok_or_else(failed)?; // xor eax, eax; cmp eax, 1; int3; setc al; int3
    engine.forget_code(KERNEL, KERNEL + 10);
    engine.restore(&kernel);
    let go = |engine: &mut Engine<Flat>, to: u64, what: &str| {
        let ended = engine.go(KERNEL)?;
        let mut state = engine.context()?;
        engine.save_part(&mut state, integer);
        find.expect(what, ended == code::OK && engine.is_standing() && state.u64(rip) == to)?;
        Ok(state)
    };
    let mut state = go(&mut engine, KERNEL + 6, "a run that stands at an INT3")?;
    find.expect("the flags of a run that stands", state.u64(eflags) & rflags::CF == 0 && state.rflags() & rflags::CF != 0)?;
    state.set_u64(gp + 8, MARK);
    engine.restore_part(&mut state, core);
    let state = go(&mut engine, KERNEL + 10, "a run that goes on")?;
    find.expect("what a run goes on with", state.u64(gp) == 1 && state.u64(gp + 8) == MARK)?;
    Ok(Layout {
        gp,
        rip,
        eflags,
        hflags,
        segments,
        cr,
        efer,
        star,
        lstar,
        sfmask,
        kernel_gs_base,
        error_code,
        exception_is_int: error_code + 4,
        dr6,
        old_exception,
        context_size: state.size(),
        copied: Copied { all, integer, core, rest: last as usize },
    })
}
