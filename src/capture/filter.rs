//! Expressions over a hit: their description, and the program they are compiled into.

use std::cmp::Ordering;

use crate::arch::amd64::Register;
use crate::error::{Result, VmiError};

/// Deepest stack a program may need.
pub(super) const DEPTH: usize = 16;
/// Longest program, in steps.
const MAX_STEPS: usize = 1024;
/// Longest pattern a string is compared with, and longest string that is searched, in bytes.
pub(super) const MAX_TEXT: u32 = 4096;
/// Highest argument number.
pub const MAX_ARGUMENT: u8 = 63;

/// How integer arguments are passed, as it is at a function's first instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Abi {
    /// System V AMD64 ABI 3.2.3: RDI, RSI, RDX, RCX, R8, R9, then the stack above the return address.
    #[default]
    SystemV,
    /// Microsoft x64: RCX, RDX, R8, R9, then the stack above the return address and 32 bytes of home space.
    Microsoft,
}

impl Abi {
    /// Where the argument is: in a register, or so many bytes above RSP.
    pub const fn argument(self, index: u8) -> std::result::Result<Register, u64> {
        match (self, index) {
            (Self::SystemV, 0) => Ok(Register::Rdi),
            (Self::SystemV, 1) => Ok(Register::Rsi),
            (Self::SystemV, 2) | (Self::Microsoft, 1) => Ok(Register::Rdx),
            (Self::SystemV, 3) | (Self::Microsoft, 0) => Ok(Register::Rcx),
            (Self::SystemV, 4) | (Self::Microsoft, 2) => Ok(Register::R8),
            (Self::SystemV, 5) | (Self::Microsoft, 3) => Ok(Register::R9),
            (Self::SystemV, _) => Err(8 * (index as u64 - 5)),
            (Self::Microsoft, _) => Err(8 * (index as u64 + 1)),
        }
    }
}

/// What an expression yields.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Type {
    /// 64 bits, read as a number with or without a sign.
    Word {
        /// With a sign.
        signed: bool,
    },
    /// True or false.
    Bool,
}

/// Arithmetic on two words; wraps at 64 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Arith {
    Add,
    Sub,
    Mul,
    /// Quotient of unsigned numbers; unknown if the divisor is 0.
    Div,
    /// Remainder of unsigned numbers; unknown if the divisor is 0.
    Rem,
    And,
    Or,
    Xor,
    /// Left; 0 for 64 places and more.
    Shl,
    /// Right; 0 (or the sign) for 64 places and more.
    Shr,
}

impl Arith {
    /// The result for these operands; the first one has a sign if `signed`.
    #[inline]
    pub fn apply(self, signed: bool, a: u64, b: u64) -> Option<u64> {
        Some(match self {
            Self::Add => a.wrapping_add(b),
            Self::Sub => a.wrapping_sub(b),
            Self::Mul => a.wrapping_mul(b),
            Self::Div => a.checked_div(b)?,
            Self::Rem => a.checked_rem(b)?,
            Self::And => a & b,
            Self::Or => a | b,
            Self::Xor => a ^ b,
            Self::Shl if b >= 64 => 0,
            Self::Shl => a << b,
            Self::Shr if signed => ((a as i64) >> b.min(63)) as u64,
            Self::Shr if b >= 64 => 0,
            Self::Shr => a >> b,
        })
    }
}

/// A comparison.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Test {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

impl Test {
    /// Whether it holds for that order.
    #[inline]
    pub const fn holds(self, order: Ordering) -> bool {
        match self {
            Self::Eq => order.is_eq(),
            Self::Ne => order.is_ne(),
            Self::Lt => order.is_lt(),
            Self::Le => order.is_le(),
            Self::Gt => order.is_gt(),
            Self::Ge => order.is_ge(),
        }
    }
}

/// What is found at an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TextKind {
    /// That many bytes.
    Bytes,
    /// Bytes up to a zero byte.
    Cstr,
    /// Pairs of bytes up to a pair of zero bytes.
    Utf16,
}

impl TextKind {
    /// Bytes in a unit.
    pub const fn unit(self) -> usize {
        match self {
            Self::Bytes | Self::Cstr => 1,
            Self::Utf16 => 2,
        }
    }
}

/// How it is compared with a pattern.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TextTest {
    /// It is the pattern.
    Equal,
    /// It begins with the pattern.
    StartsWith,
    /// It ends with the pattern.
    EndsWith,
    /// The pattern is somewhere in it.
    Contains,
}

/// One step of a description in postfix order: it takes what the steps before it left, and leaves one value.
#[derive(Clone, PartialEq, Debug)]
pub enum Node {
    /// A number.
    Const {
        /// Its 64 bits.
        value: u64,
        /// It has a sign.
        signed: bool,
    },
    /// A register.
    Register(Register),
    /// An argument of the function that is entered, from 0.
    Argument(u8),
    /// The vCPU's number.
    Vcpu,
    /// The virtual address of the hit.
    Address,
    /// A number in memory, at the address on the stack: 1, 2, 4 or 8 bytes, little-endian.
    Load {
        /// Bytes.
        size: u8,
    },
    /// The lowest bits of a word.
    Cast {
        /// How many: 1 to 64.
        bits: u8,
        /// The highest of them is a sign.
        signed: bool,
    },
    /// Two words make one. It has a sign if one of them has.
    Arith(Arith),
    /// Two words are compared, as the numbers they stand for.
    Compare(Test),
    /// A word is one of these numbers.
    OneOf(Vec<i128>),
    /// A word lies between these numbers, both included.
    Within(i128, i128),
    /// What is at the address on the stack is compared with a pattern.
    Text {
        /// What is there.
        kind: TextKind,
        /// How it is compared.
        test: TextTest,
        /// Bytes that are looked at, at most.
        max: u32,
        /// With what.
        pattern: Vec<u8>,
    },
    /// Not.
    Not,
    /// Both; the second is looked at only if the first is not false.
    And,
    /// One of them; the second is looked at only if the first is not true.
    Or,
    /// True for the first time it is looked at, and for every so many-th after it.
    Every(u64),
    /// True for the first time it is looked at.
    Once,
    /// True at most so often a second; more than 0.
    Rate(f64),
    /// The caller is asked; the number is for the caller.
    Ask(u16),
}

/// One step of a program.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    Const(u64),
    Register(Register),
    Vcpu,
    Address,
    Load(u8),
    Cast {
        bits: u8,
        signed: bool,
    },
    Arith {
        op: Arith,
        signed: bool,
    },
    Compare {
        test: Test,
        left: bool,
        right: bool,
    },
    OneOf {
        set: u16,
        signed: bool,
    },
    Within {
        range: u16,
        signed: bool,
    },
    Text {
        kind: TextKind,
        test: TextTest,
        max: u32,
        pattern: u16,
    },
    Not,
    And,
    Or,
    /// Over so many steps, if the top is false; it stays.
    SkipIfFalse(u16),
    /// The same if it is true.
    SkipIfTrue(u16),
    Every {
        slot: u16,
        count: u64,
    },
    Once {
        slot: u16,
    },
    Rate {
        slot: u16,
        window: u64,
        count: u32,
    },
    Ask(u16),
}

/// A compiled expression. It is checked once; evaluating it cannot fail.
#[derive(Clone, Debug)]
pub struct Program {
    pub(super) ops: Box<[Op]>,
    pub(super) patterns: Box<[Box<[u8]>]>,
    pub(super) sets: Box<[Box<[i128]>]>,
    pub(super) ranges: Box<[(i128, i128)]>,
    slots: usize,
    result: Type,
    asks: bool,
}

/// A value on the stack while compiling, and the step its computation begins with.
#[derive(Clone, Copy)]
struct Entry {
    kind: Type,
    from: usize,
}

#[derive(Default)]
struct Compiler {
    ops: Vec<Op>,
    stack: Vec<Entry>,
    patterns: Vec<Box<[u8]>>,
    sets: Vec<Box<[i128]>>,
    ranges: Vec<(i128, i128)>,
    slots: usize,
    deepest: usize,
    asks: bool,
}

const WORD: Type = Type::Word { signed: false };

impl Program {
    /// Compiles a description.
    ///
    /// # Errors
    /// [`VmiError::InvalidArgument`] with the step, if a step lacks an operand or has one of the wrong type, if a number in it is out of
    /// range, if more or less than one value is left, or if it is too long or too deep.
    pub fn compile(nodes: &[Node], abi: Abi) -> Result<Self> {
        let mut compiler = Compiler::default();
        for (index, node) in nodes.iter().enumerate() {
            compiler.step(node, abi).map_err(|reason| refuse(format!("step {index}: {reason}")))?;
            compiler.deepest = compiler.deepest.max(compiler.stack.len());
        }
        let [entry] = compiler.stack.as_slice() else {
            return Err(refuse(format!("it leaves {} values and not one", compiler.stack.len())));
        };
        if compiler.ops.len() > MAX_STEPS {
            return Err(refuse(format!("it takes {} steps; {MAX_STEPS} are the most", compiler.ops.len())));
        }
        // An argument on the stack takes two places of its own.
        if compiler.deepest + 1 > DEPTH {
            return Err(refuse(format!("it is nested too deeply: {} places are the most", DEPTH - 1)));
        }
        Ok(Self {
            result: entry.kind,
            ops: compiler.ops.into(),
            patterns: compiler.patterns.into(),
            sets: compiler.sets.into(),
            ranges: compiler.ranges.into(),
            slots: compiler.slots,
            asks: compiler.asks,
        })
    }

    /// What it yields.
    pub const fn result(&self) -> Type {
        self.result
    }

    /// Words of state it keeps from one evaluation to the next; all 0 at first.
    pub const fn slots(&self) -> usize {
        self.slots
    }

    /// Whether evaluating it can look at memory.
    pub fn reads(&self) -> bool {
        self.ops.iter().any(|op| matches!(op, Op::Load(_) | Op::Text { .. }))
    }

    /// Whether evaluating it can stop at a [`Node::Ask`].
    pub const fn asks(&self) -> bool {
        self.asks
    }
}

fn refuse(reason: String) -> VmiError {
    VmiError::InvalidArgument { what: "expression", reason }
}

impl Compiler {
    fn pop(&mut self) -> std::result::Result<Entry, String> {
        self.stack.pop().ok_or_else(|| "an operand is missing".to_owned())
    }

    fn pop_word(&mut self) -> std::result::Result<(bool, usize), String> {
        match self.pop()? {
            Entry { kind: Type::Word { signed }, from } => Ok((signed, from)),
            Entry { kind: Type::Bool, .. } => Err("a number is needed here, and this is a condition".to_owned()),
        }
    }

    fn pop_bool(&mut self) -> std::result::Result<usize, String> {
        match self.pop()? {
            Entry { kind: Type::Bool, from } => Ok(from),
            Entry { kind: Type::Word { .. }, .. } => Err("a condition is needed here, and this is a number".to_owned()),
        }
    }

    fn leave(&mut self, op: Op, kind: Type, from: usize) {
        self.ops.push(op);
        self.stack.push(Entry { kind, from });
    }

    fn slots(&mut self, count: usize) -> u16 {
        let slot = self.slots as u16;
        self.slots += count;
        slot
    }

    fn step(&mut self, node: &Node, abi: Abi) -> std::result::Result<(), String> {
        // Keeps every index and jump within 16 bits.
        if self.ops.len() > MAX_STEPS {
            return Err(format!("{MAX_STEPS} steps are the most"));
        }
        let here = self.ops.len();
        match node {
            Node::Const { value, signed } => self.leave(Op::Const(*value), Type::Word { signed: *signed }, here),
            Node::Register(register) => self.leave(Op::Register(*register), WORD, here),
            Node::Argument(index) if *index > MAX_ARGUMENT => {
                return Err(format!("argument {index}: {MAX_ARGUMENT} is the highest"));
            }
            Node::Argument(index) => match abi.argument(*index) {
                Ok(register) => self.leave(Op::Register(register), WORD, here),
                Err(offset) => {
                    self.ops.push(Op::Register(Register::Rsp));
                    self.ops.push(Op::Const(offset));
                    self.ops.push(Op::Arith { op: Arith::Add, signed: false });
                    self.leave(Op::Load(8), WORD, here);
                }
            },
            Node::Vcpu => self.leave(Op::Vcpu, WORD, here),
            Node::Address => self.leave(Op::Address, WORD, here),
            Node::Load { size } => {
                if ![1, 2, 4, 8].contains(size) {
                    return Err(format!("{size} is not 1, 2, 4 or 8 bytes"));
                }
                let (_, from) = self.pop_word()?;
                self.leave(Op::Load(*size), WORD, from);
            }
            Node::Cast { bits, signed } => {
                if !(1..=64).contains(bits) {
                    return Err(format!("{bits} is not 1 to 64 bits"));
                }
                let (_, from) = self.pop_word()?;
                self.leave(Op::Cast { bits: *bits, signed: *signed }, Type::Word { signed: *signed }, from);
            }
            Node::Arith(op) => {
                let ((right, _), (left, from)) = (self.pop_word()?, self.pop_word()?);
                let shift = matches!(op, Arith::Shl | Arith::Shr);
                if matches!(op, Arith::Div | Arith::Rem) && (left || right) {
                    return Err("only numbers without a sign are divided".to_owned());
                }
                let signed = left || (right && !shift);
                self.leave(Op::Arith { op: *op, signed: left }, Type::Word { signed }, from);
            }
            Node::Compare(test) => {
                let ((right, _), (left, from)) = (self.pop_word()?, self.pop_word()?);
                self.leave(Op::Compare { test: *test, left, right }, Type::Bool, from);
            }
            Node::OneOf(values) => {
                let (signed, from) = self.pop_word()?;
                let mut values = values.clone();
                values.sort_unstable();
                self.sets.push(values.into());
                self.leave(Op::OneOf { set: self.sets.len() as u16 - 1, signed }, Type::Bool, from);
            }
            Node::Within(first, last) => {
                let (signed, from) = self.pop_word()?;
                self.ranges.push((*first, *last));
                self.leave(Op::Within { range: self.ranges.len() as u16 - 1, signed }, Type::Bool, from);
            }
            Node::Text { kind, test, max, pattern } => self.text(*kind, *test, *max, pattern)?,
            Node::Not => {
                let from = self.pop_bool()?;
                self.leave(Op::Not, Type::Bool, from);
            }
            Node::And | Node::Or => {
                let (second, from) = (self.pop_bool()?, self.pop_bool()?);
                // Jumps are relative, so those inside the second one still fit.
                let over = (self.ops.len() - second + 1) as u16;
                let (skip, op) =
                    if *node == Node::And { (Op::SkipIfFalse(over), Op::And) } else { (Op::SkipIfTrue(over), Op::Or) };
                self.ops.insert(second, skip);
                self.leave(op, Type::Bool, from);
            }
            Node::Every(0) => return Err("every 0th is none".to_owned()),
            Node::Every(count) => {
                let slot = self.slots(1);
                self.leave(Op::Every { slot, count: *count }, Type::Bool, here);
            }
            Node::Once => {
                let slot = self.slots(1);
                self.leave(Op::Once { slot }, Type::Bool, here);
            }
            Node::Rate(rate) => {
                let (window, count) = window(*rate)?;
                let slot = self.slots(2);
                self.leave(Op::Rate { slot, window, count }, Type::Bool, here);
            }
            Node::Ask(number) => {
                self.asks = true;
                self.leave(Op::Ask(*number), Type::Bool, here);
            }
        }
        Ok(())
    }

    fn text(&mut self, kind: TextKind, test: TextTest, max: u32, pattern: &[u8]) -> std::result::Result<(), String> {
        let (unit, len) = (kind.unit(), pattern.len());
        if max == 0 || max > MAX_TEXT || !(max as usize).is_multiple_of(unit) {
            return Err(format!("{max} is no length of 1 to {MAX_TEXT} bytes"));
        }
        if !len.is_multiple_of(unit) || len > max as usize {
            return Err(format!("a pattern of {len} bytes is in no string of {max}"));
        }
        let fits = match kind {
            TextKind::Bytes => test != TextTest::Equal || len == max as usize,
            // The end has to be within the limit too.
            TextKind::Cstr | TextKind::Utf16 => test != TextTest::Equal || len < max as usize,
        };
        if !fits {
            return Err(format!("{len} bytes are never all of what is read, which is at most {max}"));
        }
        if kind != TextKind::Bytes && pattern.chunks(unit).any(|unit| unit.iter().all(|byte| *byte == 0)) {
            return Err("a string ends at a zero, so no pattern with one is in it".to_owned());
        }
        let (_, from) = self.pop_word()?;
        self.patterns.push(pattern.into());
        self.leave(Op::Text { kind, test, max, pattern: self.patterns.len() as u16 - 1 }, Type::Bool, from);
        Ok(())
    }
}

/// So many in so many nanoseconds.
fn window(rate: f64) -> std::result::Result<(u64, u32), String> {
    if !(1e-6..=1e9).contains(&rate) {
        return Err(format!("{rate} a second is not between 0.000001 and 1,000,000,000"));
    }
    let count = rate.floor().max(1.0);
    Ok(((count / rate * 1e9) as u64, count as u32))
}
