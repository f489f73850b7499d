//! Evaluating a program: a small stack of words, each of which can be unknown because memory could not be read.
//!
//! Unknown is neither true nor false: `unknown & false` is false, `unknown | true` is true, everything else stays unknown.

use std::cell::OnceCell;

use crate::addr::{Va, VcpuId};
use crate::arch::amd64::{AddressContext, Register, Registers};
use crate::core::VmiCore;
use crate::driver::{TrapRegisters, VmiDriver};

use super::filter::{DEPTH, Op, Program};
use super::text;

/// What a program looks at.
pub struct Scene<'a, D: VmiDriver + ?Sized> {
    /// The guest; `None` where nothing of its memory is looked at ([`Program::reads`]): then a look at it finds that it cannot be read.
    pub vmi: Option<&'a VmiCore<D>>,
    /// The vCPU's registers.
    pub registers: RegisterSource<'a>,
    /// The vCPU.
    pub vcpu: VcpuId,
    /// The address of the hit.
    pub va: Va,
    /// Nanoseconds since some point in time; asked for by rates alone.
    pub clock: &'a dyn Fn() -> u64,
}

/// Where the registers come from.
#[expect(clippy::large_enum_variant, reason = "one is on the stack for the length of a hit, and hardly ever filled")]
pub enum RegisterSource<'a> {
    /// They are here.
    Known(&'a Registers),
    /// From a vCPU at a trap, each when it is asked for; and all, if they had to be collected.
    Trap(&'a dyn TrapRegisters, OnceCell<Registers>),
}

impl<'a> From<&'a Registers> for RegisterSource<'a> {
    #[inline]
    fn from(registers: &'a Registers) -> Self {
        Self::Known(registers)
    }
}

impl<'a> From<&'a dyn TrapRegisters> for RegisterSource<'a> {
    #[inline]
    fn from(trap: &'a dyn TrapRegisters) -> Self {
        Self::Trap(trap, OnceCell::new())
    }
}

impl RegisterSource<'_> {
    #[inline]
    fn one(&self, register: Register) -> u64 {
        match self {
            Self::Known(registers) => register.of(registers),
            Self::Trap(trap, _) => trap.one(register).unwrap_or_else(|| register.of(self.all())),
        }
    }

    /// All of them.
    pub fn all(&self) -> &Registers {
        match self {
            Self::Known(registers) => registers,
            Self::Trap(trap, all) => all.get_or_init(|| trap.all()),
        }
    }
}

/// How far an evaluation came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// To its end. True and false are 1 and 0; `None`: unknown.
    Value(Option<u64>),
    /// To a question, with its number: to be answered with [`Machine::answer`] and run again.
    Ask(u16),
}

/// One evaluation under way.
#[derive(Clone, Debug)]
pub struct Machine {
    at: usize,
    depth: usize,
    /// Bit n: place n is unknown.
    unknown: u32,
    stack: [u64; DEPTH],
    faults: u32,
}

impl Default for Machine {
    #[inline]
    fn default() -> Self {
        Self { at: 0, depth: 0, unknown: 0, stack: [0; DEPTH], faults: 0 }
    }
}

impl Machine {
    /// How many reads failed.
    pub const fn faults(&self) -> u32 {
        self.faults
    }

    /// Answers the question that [`Machine::run`] stopped at.
    pub fn answer(&mut self, value: bool) {
        self.push(Some(value.into()));
    }

    #[inline]
    fn push(&mut self, value: Option<u64>) {
        if let Some(place) = self.stack.get_mut(self.depth) {
            *place = value.unwrap_or(0);
        }
        let bit = 1_u32.wrapping_shl(self.depth as u32);
        self.unknown = if value.is_some() { self.unknown & !bit } else { self.unknown | bit };
        self.depth += 1;
    }

    #[inline]
    fn pop(&mut self) -> Option<u64> {
        self.depth = self.depth.saturating_sub(1);
        self.top_at(self.depth)
    }

    #[inline]
    fn top_at(&self, place: usize) -> Option<u64> {
        let value = self.stack.get(place).copied();
        value.filter(|_| self.unknown & 1_u32.wrapping_shl(place as u32) == 0)
    }

    /// Goes on to the end, or to the next question. `state` is that of this filter: [`Program::slots`] words.
    pub fn run<D: VmiDriver + ?Sized>(&mut self, program: &Program, state: &mut [u64], scene: &Scene<'_, D>) -> Outcome {
        while let Some(op) = program.ops.get(self.at) {
            self.at += 1;
            match *op {
                Op::Const(value) => self.push(Some(value)),
                Op::Register(register) => self.push(Some(scene.registers.one(register))),
                Op::Vcpu => self.push(Some(scene.vcpu.0.into())),
                Op::Address => self.push(Some(scene.va.0)),
                Op::Load(size) => {
                    let value = self.pop().and_then(|at| {
                        let value = load(scene, Va(at), size);
                        self.faults += u32::from(value.is_none());
                        value
                    });
                    self.push(value);
                }
                Op::Cast { bits, signed } => {
                    let value = self.pop().map(|value| cast(value, bits, signed));
                    self.push(value);
                }
                Op::Arith { op, signed } => {
                    let (right, left) = (self.pop(), self.pop());
                    let value = left.zip(right).and_then(|(left, right)| op.apply(signed, left, right));
                    self.push(value);
                }
                Op::Compare { test, left, right } => {
                    let (b, a) = (self.pop(), self.pop());
                    let order = a
                        .zip(b)
                        .map(|(a, b)| if left == right && !left { a.cmp(&b) } else { number(a, left).cmp(&number(b, right)) });
                    self.push(order.map(|order| test.holds(order).into()));
                }
                Op::OneOf { set, signed } => {
                    let value = self.pop().map(|value| number(value, signed));
                    let set = program.sets.get(usize::from(set)).map(AsRef::as_ref).unwrap_or_default();
                    self.push(value.map(|value| set.binary_search(&value).is_ok().into()));
                }
                Op::Within { range, signed } => {
                    let value = self.pop().map(|value| number(value, signed));
                    let range = program.ranges.get(usize::from(range)).copied().unwrap_or_default();
                    self.push(value.map(|value| (range.0..=range.1).contains(&value).into()));
                }
                Op::Text { kind, test, max, pattern } => {
                    let pattern = program.patterns.get(usize::from(pattern)).map(AsRef::as_ref).unwrap_or_default();
                    let value = self.pop().and_then(|at| {
                        let context = AddressContext::from(scene.registers.all());
                        let fits =
                            scene.vmi.and_then(|vmi| text::fits(vmi, (Va(at), context), kind, test, max as usize, pattern));
                        self.faults += u32::from(fits.is_none());
                        fits
                    });
                    self.push(value.map(u64::from));
                }
                Op::Not => {
                    let value = self.pop().map(|value| value ^ 1);
                    self.push(value);
                }
                Op::And => {
                    let value = match (self.pop(), self.pop()) {
                        (Some(0), _) | (_, Some(0)) => Some(0),
                        (Some(_), Some(_)) => Some(1),
                        _ => None,
                    };
                    self.push(value);
                }
                Op::Or => {
                    let value = match (self.pop(), self.pop()) {
                        (Some(1), _) | (_, Some(1)) => Some(1),
                        (Some(_), Some(_)) => Some(0),
                        _ => None,
                    };
                    self.push(value);
                }
                Op::SkipIfFalse(over) => self.skip_if(0, over),
                Op::SkipIfTrue(over) => self.skip_if(1, over),
                Op::Every { slot, count } => {
                    let mut value = false;
                    if let Some(seen) = state.get_mut(usize::from(slot)) {
                        value = *seen == 0;
                        *seen = (*seen + 1) % count;
                    }
                    self.push(Some(value.into()));
                }
                Op::Once { slot } => {
                    let before = state.get_mut(usize::from(slot)).map_or(1, |seen| std::mem::replace(seen, 1));
                    self.push(Some(before ^ 1));
                }
                Op::Rate { slot, window, count } => {
                    let mut value = false;
                    if let Some([from, seen]) = state.get_mut(usize::from(slot)..).and_then(|rest| rest.first_chunk_mut()) {
                        let now = (scene.clock)();
                        if *seen == 0 || now.saturating_sub(*from) >= window {
                            (*from, *seen) = (now, 0);
                        }
                        value = *seen < count.into();
                        *seen += u64::from(value);
                    }
                    self.push(Some(value.into()));
                }
                Op::Ask(number) => return Outcome::Ask(number),
            }
        }
        Outcome::Value(self.top_at(0))
    }

    #[inline]
    fn skip_if(&mut self, value: u64, over: u16) {
        if self.top_at(self.depth.wrapping_sub(1)) == Some(value) {
            self.at += usize::from(over);
        }
    }
}

/// The number a word stands for.
#[inline]
fn number(value: u64, signed: bool) -> i128 {
    if signed { i128::from(value as i64) } else { value.into() }
}

#[inline]
fn cast(value: u64, bits: u8, signed: bool) -> u64 {
    let unused = 64 - u32::from(bits.min(64));
    let high = value.checked_shl(unused).unwrap_or_default();
    if signed { ((high as i64) >> unused.min(63)) as u64 } else { high.checked_shr(unused).unwrap_or_default() }
}

/// A little-endian number in memory.
pub(super) fn load<D: VmiDriver + ?Sized>(scene: &Scene<'_, D>, va: Va, size: u8) -> Option<u64> {
    let mut bytes = [0; 8];
    let context = AddressContext::from(scene.registers.all());
    scene.vmi?.read(va, context, bytes.get_mut(..size.into())?).ok()?;
    Some(u64::from_le_bytes(bytes))
}
