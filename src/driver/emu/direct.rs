//! Instructions that stand at the beginning of functions and do so little that the driver does it itself, in the saved registers.
//!
//! A breakpoint is nearly always on one of these, and a run of the stepper costs more than everything else of a hit. What is not
//! certain here (another form, another operand, a prefix) is left to the stepper. Source: Intel SDM vol. 2 (encodings, flags).

use crate::arch::amd64::rflags::{AF, CF, OF, PF, SF, ZF};

use super::run::RSP;
use super::sys::reg;
use super::vcpu::Vcpu;

/// What such an instruction does. Registers are numbered as instructions do: 0 is RAX, 4 RSP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// `nop`, `endbr64`.
    Nothing,
    /// Pushes a register; the store itself is the caller's.
    Push { from: u8 },
    /// Sets a register to a value.
    Set { to: u8, value: u64 },
    /// Copies a register.
    Copy { to: u8, from: u8, wide: bool },
    /// Sets a register to an address: `lea`.
    Address { to: u8, base: Option<u8>, index: Option<(u8, u8)>, offset: u64, wide: bool },
    /// The same, relative to the end of the instruction.
    AddressFromRip { to: u8, offset: u64, wide: bool },
    /// Computes with a register.
    Compute { what: Alu, to: u8, with: Operand, wide: bool },
}

/// A computation of two operands that sets the flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Alu {
    Add,
    Or,
    And,
    Sub,
    Xor,
    Compare,
    Test,
}

/// The second operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operand {
    Register(u8),
    Value(u64),
}

/// A REX prefix.
#[derive(Clone, Copy)]
struct Rex(u8);

impl Rex {
    const fn wide(self) -> bool {
        self.0 & 8 != 0
    }

    /// The register of ModRM's middle field.
    const fn reg(self, modrm: u8) -> u8 {
        modrm >> 3 & 7 | self.0 << 1 & 8
    }

    /// The register of ModRM's low field.
    const fn rm(self, modrm: u8) -> u8 {
        modrm & 7 | self.0 << 3 & 8
    }
}

const fn alu(number: u8) -> Option<Alu> {
    match number {
        0 => Some(Alu::Add),
        1 => Some(Alu::Or),
        4 => Some(Alu::And),
        5 => Some(Alu::Sub),
        6 => Some(Alu::Xor),
        7 => Some(Alu::Compare),
        // ADC and SBB.
        _ => None,
    }
}

fn imm8(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at).map(|byte| i64::from(byte.cast_signed()).cast_unsigned())
}

fn imm32(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(i64::from(i32::from_le_bytes(word.try_into().ok()?)).cast_unsigned())
}

/// Tells the instruction at the start of `bytes` and its length, in 64-bit mode. `None`: none of these, or cut off.
pub fn decode(bytes: &[u8]) -> Option<(Op, u8)> {
    match bytes {
        [0xf3, 0x0f, 0x1e, 0xfa, ..] => return Some((Op::Nothing, 4)),
        [0x66, 0x90, ..] => return Some((Op::Nothing, 2)),
        // The long forms of NOP, with the operand-size prefix or without.
        [0x66, 0x0f, 0x1f, ..] => return nop(bytes, 3),
        [0x0f, 0x1f, ..] => return nop(bytes, 2),
        _ => {}
    }
    let (rex, at) = match *bytes.first()? {
        rex @ 0x40..=0x4f => (Rex(rex), 1),
        _ => (Rex(0), 0),
    };
    let opcode = *bytes.get(at)?;
    let wide = rex.wide();
    let done = |op, len: usize| Some((op, len as u8));
    match opcode {
        0x50..=0x57 => return done(Op::Push { from: rex.rm(opcode) }, at + 1),
        // With REX.B it is an exchange with R8.
        0x90 if rex.0 & 1 == 0 => return done(Op::Nothing, at + 1),
        0xb8..=0xbf if wide => {
            let value = bytes.get(at + 1..at + 9)?;
            let value = u64::from_le_bytes(value.try_into().ok()?);
            return done(Op::Set { to: rex.rm(opcode), value }, at + 9);
        }
        0xb8..=0xbf => return done(Op::Set { to: rex.rm(opcode), value: imm32(bytes, at + 1)? & 0xffff_ffff }, at + 5),
        _ => {}
    }
    let modrm = *bytes.get(at + 1)?;
    if opcode == 0x8d {
        return lea(bytes, rex, at);
    }
    // From here on registers only.
    if modrm < 0xc0 {
        return None;
    }
    let (reg, rm) = (rex.reg(modrm), rex.rm(modrm));
    let compute = |what, to, with, len| done(Op::Compute { what, to, with, wide }, len);
    match opcode {
        0x89 => done(Op::Copy { to: rm, from: reg, wide }, at + 2),
        0x8b => done(Op::Copy { to: reg, from: rm, wide }, at + 2),
        0xc7 if rex.reg(modrm) == 0 => {
            let value = imm32(bytes, at + 2)?;
            done(Op::Set { to: rm, value: if wide { value } else { value & 0xffff_ffff } }, at + 6)
        }
        0x83 => compute(alu(modrm >> 3 & 7)?, rm, Operand::Value(imm8(bytes, at + 2)?), at + 3),
        0x81 => compute(alu(modrm >> 3 & 7)?, rm, Operand::Value(imm32(bytes, at + 2)?), at + 6),
        0x85 => compute(Alu::Test, rm, Operand::Register(reg), at + 2),
        0x01 | 0x09 | 0x21 | 0x29 | 0x31 | 0x39 => compute(alu(opcode >> 3)?, rm, Operand::Register(reg), at + 2),
        0x03 | 0x0b | 0x23 | 0x2b | 0x33 | 0x3b => compute(alu(opcode >> 3)?, reg, Operand::Register(rm), at + 2),
        _ => None,
    }
}

/// `0f 1f /0`, whose operand is not accessed; `at` is the place of ModRM.
fn nop(bytes: &[u8], at: usize) -> Option<(Op, u8)> {
    let modrm = *bytes.get(at)?;
    if modrm >> 3 & 7 != 0 {
        return None;
    }
    let (_, end) = operand(bytes, Rex(0), at)?;
    Some((Op::Nothing, end as u8))
}

/// What a ModRM byte with a memory operand refers to.
enum Place {
    FromRip(u64),
    Sum { base: Option<u8>, index: Option<(u8, u8)>, offset: u64 },
}

/// The memory operand of the ModRM byte at `at`, and where the instruction goes on behind it.
fn operand(bytes: &[u8], rex: Rex, at: usize) -> Option<(Place, usize)> {
    let modrm = *bytes.get(at)?;
    let form = modrm >> 6;
    if form == 3 {
        return None;
    }
    let mut end = at + 1;
    let (mut base, mut index) = (Some(rex.rm(modrm)), None);
    if modrm & 7 == 4 {
        let sib = *bytes.get(end)?;
        end += 1;
        let number = sib >> 3 & 7 | rex.0 << 2 & 8;
        // 4 says that there is no index.
        index = (number != 4).then_some((number, sib >> 6));
        base = (form != 0 || sib & 7 != 5).then_some(rex.rm(sib));
        if base.is_none() {
            return Some((Place::Sum { base, index, offset: imm32(bytes, end)? }, end + 4));
        }
    } else if form == 0 && modrm & 7 == 5 {
        return Some((Place::FromRip(imm32(bytes, end)?), end + 4));
    }
    let (offset, len) = match form {
        0 => (0, 0),
        1 => (imm8(bytes, end)?, 1),
        _ => (imm32(bytes, end)?, 4),
    };
    Some((Place::Sum { base, index, offset }, end + len))
}

fn lea(bytes: &[u8], rex: Rex, at: usize) -> Option<(Op, u8)> {
    let (to, wide) = (rex.reg(*bytes.get(at + 1)?), rex.wide());
    let (place, end) = operand(bytes, rex, at + 1)?;
    let op = match place {
        Place::FromRip(offset) => Op::AddressFromRip { to, offset, wide },
        Place::Sum { base, index, offset } => Op::Address { to, base, index, offset, wide },
    };
    Some((op, end as u8))
}

/// Does `op`, and goes on at `next`. What [`Op::Push`] stores is stored already.
pub fn carry_out(op: &Op, vcpu: &mut Vcpu, next: u64) {
    vcpu.set_rip(next);
    // A 32-bit result clears the upper half of its register.
    let cut = |value: u64, wide: bool| if wide { value } else { value & 0xffff_ffff };
    match *op {
        Op::Nothing => {}
        Op::Push { .. } => vcpu.set_gpr(RSP, vcpu.gpr(RSP).wrapping_sub(8)),
        Op::Set { to, value } => vcpu.set_gpr(to, value),
        Op::Copy { to, from, wide } => vcpu.set_gpr(to, cut(vcpu.gpr(from), wide)),
        Op::Address { to, base, index, offset, wide } => {
            let base = base.map_or(0, |base| vcpu.gpr(base));
            let index = index.map_or(0, |(index, shift)| vcpu.gpr(index) << shift);
            vcpu.set_gpr(to, cut(base.wrapping_add(index).wrapping_add(offset), wide));
        }
        Op::AddressFromRip { to, offset, wide } => vcpu.set_gpr(to, cut(next.wrapping_add(offset), wide)),
        Op::Compute { what, to, with, wide } => {
            let with = match with {
                Operand::Register(from) => vcpu.gpr(from),
                Operand::Value(value) => value,
            };
            let (result, flags) = compute(what, cut(vcpu.gpr(to), wide), cut(with, wide), wide);
            if !matches!(what, Alu::Compare | Alu::Test) {
                vcpu.set_gpr(to, result);
            }
            let kept = vcpu.context.rflags() & !(CF | PF | AF | ZF | SF | OF);
            vcpu.context.write_register(reg::EFLAGS, kept | flags);
        }
    }
}

/// The result of a computation, and CF, PF, AF, ZF, SF and OF after it. AF is undefined after the logical ones; the engine clears it.
fn compute(what: Alu, a: u64, b: u64, wide: bool) -> (u64, u64) {
    let (mask, sign) = if wide { (u64::MAX, 1 << 63) } else { (0xffff_ffff, 1 << 31) };
    let is = |flag: u64, on: bool| if on { flag } else { 0 };
    let (result, flags) = match what {
        Alu::Add => {
            let sum = a.wrapping_add(b) & mask;
            (sum, is(CF, sum < a) | is(OF, !(a ^ b) & (a ^ sum) & sign != 0) | (a ^ b ^ sum) & AF)
        }
        Alu::Sub | Alu::Compare => {
            let rest = a.wrapping_sub(b) & mask;
            (rest, is(CF, a < b) | is(OF, (a ^ b) & (a ^ rest) & sign != 0) | (a ^ b ^ rest) & AF)
        }
        Alu::Or => (a | b, 0),
        Alu::And | Alu::Test => (a & b, 0),
        Alu::Xor => (a ^ b, 0),
    };
    let even = (result as u8).count_ones().is_multiple_of(2);
    (result, flags | is(ZF, result == 0) | is(SF, result & sign != 0) | is(PF, even))
}
