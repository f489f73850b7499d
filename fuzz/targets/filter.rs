//! Filter programs: descriptions in any order and with any numbers are refused or compiled, and what is compiled comes to an end on any guest.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmitap::arch::amd64::{Register, Registers};
use vmitap::capture::{Abi, Arith, Machine, Node, Outcome, Program, Scene, Test, TextKind, TextTest, Type};
use vmitap::core::VmiCore;
use vmitap::driver::mock::MockDriver;
use vmitap::{Pa, Va, VcpuId, VmiError};

const MEMORY: usize = 0x4000;
const ARITH: [Arith; 10] = [
    Arith::Add,
    Arith::Sub,
    Arith::Mul,
    Arith::Div,
    Arith::Rem,
    Arith::And,
    Arith::Or,
    Arith::Xor,
    Arith::Shl,
    Arith::Shr,
];
const TESTS: [Test; 6] = [Test::Eq, Test::Ne, Test::Lt, Test::Le, Test::Gt, Test::Ge];
const KINDS: [TextKind; 3] = [TextKind::Bytes, TextKind::Cstr, TextKind::Utf16];
const TEXT_TESTS: [TextTest; 4] = [TextTest::Equal, TextTest::StartsWith, TextTest::EndsWith, TextTest::Contains];
const REGISTERS: [Register; 4] = [Register::Rdi, Register::Rsp, Register::Cr3, Register::Rip];

/// Takes a description from bytes.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// A number of which most bytes are the same, so that small ones and those at the ends are likely.
    fn word(&mut self) -> Option<u64> {
        let (fill, len) = (self.byte()?, self.byte()? % 9);
        let mut word = [fill; 8];
        for byte in &mut word[..usize::from(len)] {
            *byte = self.byte()?;
        }
        Some(u64::from_le_bytes(word))
    }

    fn wide(&mut self) -> Option<i128> {
        Some((i128::from(self.word()? as i64) << (self.byte()? % 65)) + i128::from(self.byte()?))
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> Option<T> {
        Some(all[usize::from(self.byte()?) % all.len()])
    }

    fn node(&mut self) -> Option<Node> {
        Some(match self.byte()? % 20 {
            0 => Node::Const { value: self.word()?, signed: self.byte()? & 1 != 0 },
            1 => Node::Register(self.of(&REGISTERS)?),
            2 => Node::Argument(self.byte()?),
            3 => Node::Vcpu,
            4 => Node::Address,
            5 => Node::Load { size: self.byte()? },
            6 => Node::Cast { bits: self.byte()?, signed: self.byte()? & 1 != 0 },
            7 | 8 => Node::Arith(self.of(&ARITH)?),
            9 => Node::Compare(self.of(&TESTS)?),
            10 => Node::OneOf((0..self.byte()? % 8).map(|_| self.wide()).collect::<Option<_>>()?),
            11 => Node::Within(self.wide()?, self.wide()?),
            12 => {
                let (kind, test, max) = (self.of(&KINDS)?, self.of(&TEXT_TESTS)?, self.word()? as u32);
                let pattern = (0..self.byte()? % 16).map(|_| self.byte()).collect::<Option<_>>()?;
                Node::Text { kind, test, max, pattern }
            }
            13 => Node::Not,
            14 => Node::And,
            15 => Node::Or,
            16 => Node::Every(self.word()?),
            17 => Node::Once,
            18 => Node::Rate(f64::from_bits(self.word()?)),
            _ => Node::Ask(u16::from(self.byte()?)),
        })
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&[count, abi, answers, levels], rest)) = bytes.split_first_chunk::<4>() else { return };
    let mut bytes = Bytes(rest);
    let Some(nodes) = (0..count).map(|_| bytes.node()).collect::<Option<Vec<_>>>() else { return };
    let abi = if abi & 1 == 0 { Abi::SystemV } else { Abi::Microsoft };
    let program = match Program::compile(&nodes, abi) {
        Ok(program) => program,
        Err(error) => {
            assert!(matches!(error, VmiError::InvalidArgument { .. }), "{error}");
            return;
        }
    };
    let mut registers = Registers { cr0: 1 << 31, cr4: u64::from(levels & 1) << 12, efer: 0x500, ..Registers::default() };
    for register in [&mut registers.gp.rdi, &mut registers.gp.rsp, &mut registers.cr3] {
        *register = bytes.word().unwrap_or(0);
    }
    let mut driver = MockDriver::new(MEMORY as u64, 1);
    driver.poke(Pa(0), &bytes.0[..bytes.0.len().min(MEMORY)]).unwrap();
    let vmi = VmiCore::new(Box::new(driver));
    let mut state = vec![0; program.slots()];
    // The state outlives a hit, so there are several.
    for turn in 0..3_u64 {
        let clock = move || turn * 400_000_000;
        let scene = Scene { vmi: Some(&vmi), registers: (&registers).into(), vcpu: VcpuId(0), va: Va(0x1000), clock: &clock };
        let mut machine = Machine::default();
        let mut asked = 0;
        loop {
            match machine.run(&program, &mut state, &scene) {
                Outcome::Ask(_) => machine.answer(answers >> (asked % 8) & 1 != 0),
                Outcome::Value(value) => {
                    assert!(program.result() != Type::Bool || value.is_none_or(|value| value <= 1), "a condition is true or false");
                    break;
                }
            }
            asked += 1;
            assert!(asked <= nodes.len(), "each question is put once");
        }
    }
});
