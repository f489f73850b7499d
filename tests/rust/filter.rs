//! Compiled filters against a naive evaluation of the same tree, and against descriptions that make no sense.

use proptest::prelude::*;
use vmitap::arch::amd64::{AddressContext, Register, Registers, pte};
use vmitap::capture::{Abi, Arith, Machine, Node, Outcome, Program, Scene, Test, TextKind, TextTest, Type};
use vmitap::core::VmiCore;
use vmitap::driver::mock::{MockDriver, PageSize};
use vmitap::{Pa, Va, VcpuId, VmiError};

/// Two pages that lie side by side, in frames that do not; nothing is mapped around them.
const FIRST: u64 = 0x40_0000;
const END: u64 = FIRST + 0x2000;

struct Guest {
    vmi: VmiCore<MockDriver>,
    registers: Registers,
    memory: Vec<u8>,
}

fn guest(memory: &[u8], values: &[u64]) -> Guest {
    let mut driver = MockDriver::new(0x10000, 4);
    let context = driver.new_root(4).unwrap();
    driver.map(context, Va(FIRST), Pa(0x8000), PageSize::Size4K, pte::P).unwrap();
    driver.map(context, Va(FIRST + 0x1000), Pa(0x6000), PageSize::Size4K, pte::P).unwrap();
    driver.poke(Pa(0x8000), &memory[..0x1000]).unwrap();
    driver.poke(Pa(0x6000), &memory[0x1000..]).unwrap();
    let mut registers = Registers { cr3: context.root.0, ..Registers::default() };
    let mut values = values.iter().copied();
    let gp = &mut registers.gp;
    for place in [&mut gp.rax, &mut gp.rcx, &mut gp.rdx, &mut gp.rdi, &mut gp.rsi, &mut gp.rsp, &mut gp.r8, &mut gp.r9] {
        *place = values.next().unwrap();
    }
    registers.cs.selector = 0x33;
    Guest { vmi: VmiCore::new(Box::new(driver)), registers, memory: memory.to_vec() }
}

fn evaluate(guest: &Guest, nodes: &[Node], abi: Abi) -> (Option<u64>, u32) {
    let program = Program::compile(nodes, abi).unwrap();
    let mut state = vec![0; program.slots()];
    let mut machine = Machine::default();
    let scene =
        Scene { vmi: Some(&guest.vmi), registers: (&guest.registers).into(), vcpu: VcpuId(3), va: Va(FIRST + 5), clock: &|| 0 };
    let Outcome::Value(value) = machine.run(&program, &mut state, &scene) else { panic!("a question") };
    (value, machine.faults())
}

#[derive(Clone, Debug)]
enum Num {
    Const(u64, bool),
    Register(Register),
    Argument(u8),
    Vcpu,
    Address,
    Load(Box<Num>, u8),
    Cast(Box<Num>, u8, bool),
    Arith(Arith, Box<Num>, Box<Num>),
}

#[derive(Clone, Debug)]
enum Cond {
    Compare(Test, Num, Num),
    OneOf(Num, Vec<i128>),
    Within(Num, i128, i128),
    Text(Num, TextKind, TextTest, u32, Vec<u8>),
    Not(Box<Cond>),
    And(Box<Cond>, Box<Cond>),
    Or(Box<Cond>, Box<Cond>),
}

impl Num {
    fn write(&self, out: &mut Vec<Node>) {
        match self {
            Self::Const(value, signed) => out.push(Node::Const { value: *value, signed: *signed }),
            Self::Register(register) => out.push(Node::Register(*register)),
            Self::Argument(index) => out.push(Node::Argument(*index)),
            Self::Vcpu => out.push(Node::Vcpu),
            Self::Address => out.push(Node::Address),
            Self::Load(at, size) => {
                at.write(out);
                out.push(Node::Load { size: *size });
            }
            Self::Cast(of, bits, signed) => {
                of.write(out);
                out.push(Node::Cast { bits: *bits, signed: *signed });
            }
            Self::Arith(op, left, right) => {
                left.write(out);
                right.write(out);
                out.push(Node::Arith(*op));
            }
        }
    }

    fn is_signed(&self) -> bool {
        match self {
            Self::Const(_, signed) | Self::Cast(_, _, signed) => *signed,
            Self::Arith(Arith::Shl | Arith::Shr, left, _) => left.is_signed(),
            Self::Arith(_, left, right) => left.is_signed() || right.is_signed(),
            _ => false,
        }
    }

    /// The mathematical value.
    fn value(&self, guest: &Guest, abi: Abi) -> Option<i128> {
        let gp = &guest.registers.gp;
        let bits = match self {
            Self::Const(value, _) => *value,
            Self::Register(register) => match register.name() {
                "rax" => gp.rax,
                "rcx" => gp.rcx,
                "rdx" => gp.rdx,
                "rsp" => gp.rsp,
                "ring" => 3,
                "root" => guest.registers.cr3,
                other => panic!("{other}"),
            },
            Self::Argument(index) => {
                let (registers, first): (&[u64], u64) = match abi {
                    Abi::SystemV => (&[gp.rdi, gp.rsi, gp.rdx, gp.rcx, gp.r8, gp.r9], 8),
                    Abi::Microsoft => (&[gp.rcx, gp.rdx, gp.r8, gp.r9], 40),
                };
                if let Some(value) = registers.get(usize::from(*index)) {
                    *value
                } else {
                    let place = u64::from(*index) - registers.len() as u64;
                    number(&bytes(guest, gp.rsp.wrapping_add(first + 8 * place), 8)?)
                }
            }
            Self::Vcpu => 3,
            Self::Address => FIRST + 5,
            Self::Load(at, size) => number(&bytes(guest, at.value(guest, abi)? as u64, (*size).into())?),
            Self::Cast(of, bits, _) => (of.value(guest, abi)? as u128 % (1 << bits)) as u64,
            Self::Arith(op, left, right) => {
                let (a, b) = (left.value(guest, abi)?, right.value(guest, abi)?);
                let places = b as u64;
                let result = match op {
                    Arith::Add => a + b,
                    Arith::Sub => a - b,
                    Arith::Mul => a.wrapping_mul(b),
                    Arith::Div | Arith::Rem if b == 0 => return None,
                    Arith::Div => a / b,
                    Arith::Rem => a % b,
                    Arith::And => a & b,
                    Arith::Or => a | b,
                    Arith::Xor => a ^ b,
                    Arith::Shl if places > 63 => 0,
                    Arith::Shl => a << places,
                    Arith::Shr => a >> places.min(64),
                };
                result as u64
            }
        };
        let width = if let Self::Cast(_, bits, _) = self { *bits } else { 64 };
        let value = i128::from(bits);
        Some(if self.is_signed() && value >= 1 << (width - 1) { value - (1 << width) } else { value })
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

fn bytes(guest: &Guest, at: u64, len: usize) -> Option<Vec<u8>> {
    (0..len as u64)
        .map(|index| {
            let at = at.checked_add(index)?;
            (FIRST..END).contains(&at).then(|| guest.memory[(at - FIRST) as usize])
        })
        .collect()
}

impl Cond {
    fn write(&self, out: &mut Vec<Node>) {
        match self {
            Self::Compare(test, left, right) => {
                left.write(out);
                right.write(out);
                out.push(Node::Compare(*test));
            }
            Self::OneOf(of, values) => {
                of.write(out);
                out.push(Node::OneOf(values.clone()));
            }
            Self::Within(of, first, last) => {
                of.write(out);
                out.push(Node::Within(*first, *last));
            }
            Self::Text(at, kind, test, max, pattern) => {
                at.write(out);
                out.push(Node::Text { kind: *kind, test: *test, max: *max, pattern: pattern.clone() });
            }
            Self::Not(of) => {
                of.write(out);
                out.push(Node::Not);
            }
            Self::And(left, right) | Self::Or(left, right) => {
                left.write(out);
                right.write(out);
                out.push(if matches!(self, Self::And(..)) { Node::And } else { Node::Or });
            }
        }
    }

    fn value(&self, guest: &Guest, abi: Abi) -> Option<bool> {
        match self {
            Self::Compare(test, left, right) => {
                let (a, b) = (left.value(guest, abi)?, right.value(guest, abi)?);
                Some(match test {
                    Test::Eq => a == b,
                    Test::Ne => a != b,
                    Test::Lt => a < b,
                    Test::Le => a <= b,
                    Test::Gt => a > b,
                    Test::Ge => a >= b,
                })
            }
            Self::OneOf(of, values) => Some(values.contains(&of.value(guest, abi)?)),
            Self::Within(of, first, last) => {
                let value = of.value(guest, abi)?;
                Some(*first <= value && value <= *last)
            }
            Self::Text(at, kind, test, max, pattern) => {
                text(guest, at.value(guest, abi)? as u64, *kind, *test, *max as usize, pattern)
            }
            Self::Not(of) => of.value(guest, abi).map(|value| !value),
            Self::And(left, right) => match (left.value(guest, abi), right.value(guest, abi)) {
                (Some(false), _) | (_, Some(false)) => Some(false),
                (Some(true), Some(true)) => Some(true),
                _ => None,
            },
            Self::Or(left, right) => match (left.value(guest, abi), right.value(guest, abi)) {
                (Some(true), _) | (_, Some(true)) => Some(true),
                (Some(false), Some(false)) => Some(false),
                _ => None,
            },
        }
    }
}

/// Reads unit by unit, the whole string, and only then compares.
fn text(guest: &Guest, at: u64, kind: TextKind, test: TextTest, max: usize, pattern: &[u8]) -> Option<bool> {
    let unit = kind.unit();
    let (mut read, mut end, mut fault) = (Vec::new(), false, false);
    while read.len() < max && !end && !fault {
        match at.checked_add(read.len() as u64).and_then(|at| bytes(guest, at, unit)) {
            Some(there) if kind != TextKind::Bytes && there.iter().all(|byte| *byte == 0) => end = true,
            Some(there) => read.extend(there),
            None => fault = true,
        }
    }
    let ended = end || (kind == TextKind::Bytes && read.len() == max);
    // Of a unit that lies across the end of memory the half that is there can decide: if it differs, so does the unit.
    let half = at.checked_add(read.len() as u64).filter(|_| fault && unit == 2).and_then(|at| bytes(guest, at, 1));
    let differs = half.is_some_and(|half| pattern.get(read.len()).is_some_and(|letter| *letter != half[0]));
    match test {
        TextTest::Equal | TextTest::StartsWith if differs => Some(false),
        // Decided by what is there, if that is enough.
        TextTest::Equal | TextTest::StartsWith => {
            let there = read.len().min(pattern.len());
            if read[..there] != pattern[..there] || (end && there < pattern.len()) {
                Some(false)
            } else if fault && (there < pattern.len() || test == TextTest::Equal) {
                // Unless a fault lies behind the pattern of a longer string.
                if there == pattern.len() && read.len() > there { Some(false) } else { None }
            } else {
                Some(test == TextTest::StartsWith || (ended && read.len() == pattern.len()))
            }
        }
        _ if fault => None,
        TextTest::EndsWith => Some(ended && read.ends_with(pattern)),
        TextTest::Contains => Some((0..=read.len()).step_by(unit).any(|from| read[from..].starts_with(pattern))),
    }
}

fn interesting() -> impl Strategy<Value = u64> {
    prop_oneof![
        (FIRST - 4..FIRST + 40),
        (FIRST + 0xfe0..FIRST + 0x1020),
        (END - 30..END + 4),
        0..70_u64,
        any::<u64>(),
        Just(u64::MAX),
        Just(1 << 63),
    ]
}

fn num() -> impl Strategy<Value = Num> {
    let leaf = prop_oneof![
        (interesting(), any::<bool>()).prop_map(|(value, signed)| Num::Const(value, signed)),
        prop::sample::select(vec!["rax", "rcx", "rdx", "rsp", "ring", "root"])
            .prop_map(|name| Num::Register(Register::named(name).unwrap())),
        (0..9_u8).prop_map(Num::Argument),
        Just(Num::Vcpu),
        Just(Num::Address),
    ];
    leaf.prop_recursive(3, 12, 2, |inner| {
        prop_oneof![
            (inner.clone(), prop::sample::select(vec![1_u8, 2, 4, 8])).prop_map(|(at, size)| Num::Load(Box::new(at), size)),
            (inner.clone(), 1..=64_u8, any::<bool>()).prop_map(|(of, bits, signed)| Num::Cast(Box::new(of), bits, signed)),
            (arith(), inner.clone(), inner).prop_map(|(op, a, b)| {
                let divides = matches!(op, Arith::Div | Arith::Rem);
                let op = if divides && (a.is_signed() || b.is_signed()) { Arith::Add } else { op };
                Num::Arith(op, Box::new(a), Box::new(b))
            }),
        ]
    })
}

fn arith() -> impl Strategy<Value = Arith> {
    use Arith::{Add, And, Div, Mul, Or, Rem, Shl, Shr, Sub, Xor};
    prop::sample::select(vec![Add, Sub, Mul, Div, Rem, And, Or, Xor, Shl, Shr])
}

fn cond() -> impl Strategy<Value = Cond> {
    use Test::{Eq, Ge, Gt, Le, Lt, Ne};
    let numbers = prop::collection::vec(any::<i8>().prop_map(i128::from), 0..5);
    let leaf = prop_oneof![
        (prop::sample::select(vec![Eq, Ne, Lt, Le, Gt, Ge]), num(), num()).prop_map(|(test, a, b)| Cond::Compare(test, a, b)),
        (num(), numbers).prop_map(|(of, values)| Cond::OneOf(of, values)),
        (num(), any::<i8>(), any::<i32>()).prop_map(|(of, first, last)| Cond::Within(of, first.into(), last.into())),
        texts(),
        texts(),
    ];
    leaf.prop_recursive(4, 16, 2, |inner| {
        prop_oneof![
            inner.clone().prop_map(|of| Cond::Not(Box::new(of))),
            (inner.clone(), inner.clone()).prop_map(|(a, b)| Cond::And(Box::new(a), Box::new(b))),
            (inner.clone(), inner).prop_map(|(a, b)| Cond::Or(Box::new(a), Box::new(b))),
        ]
    })
}

fn texts() -> impl Strategy<Value = Cond> {
    use TextTest::{Contains, EndsWith, Equal, StartsWith};
    let kinds = prop::sample::select(vec![TextKind::Bytes, TextKind::Cstr, TextKind::Utf16]);
    let tests = prop::sample::select(vec![Equal, StartsWith, EndsWith, Contains]);
    let at = prop_oneof![interesting().prop_map(|at| Num::Const(at, false)), num()];
    (at, kinds, tests, 0..4_usize, 0..30_u32, prop::collection::vec(1..3_u8, 8)).prop_map(
        |(at, kind, test, len, more, letters)| {
            let len = len * kind.unit();
            let max = match (kind, test) {
                (TextKind::Bytes, Equal) => len.max(1) as u32,
                _ => len as u32 + kind.unit() as u32 * (more + 1),
            };
            let pattern =
                if max as usize == 1 && kind == TextKind::Bytes && test == Equal { &letters[..1] } else { &letters[..len] };
            Cond::Text(at, kind, test, max, pattern.to_vec())
        },
    )
}

/// Two letters and zeros, so that strings are short and patterns are found.
fn memory() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop::sample::select(vec![0_u8, 1, 1, 2, 2, 2]), 0x100).prop_map(|part| part.repeat(0x20))
}

fn abis() -> impl Strategy<Value = Abi> {
    prop::sample::select(vec![Abi::SystemV, Abi::Microsoft])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_compiled_condition_is_what_its_tree_is(
        tree in cond(), memory in memory(), values in prop::collection::vec(interesting(), 8), abi in abis(),
    ) {
        let guest = guest(&memory, &values);
        let mut nodes = Vec::new();
        tree.write(&mut nodes);
        let (value, faults) = evaluate(&guest, &nodes, abi);
        let expected = tree.value(&guest, abi);
        prop_assert_eq!(value, expected.map(u64::from));
        // Nothing is unknown without a reason: a read that failed, or a division by zero.
        let divides = nodes.iter().any(|node| matches!(node, Node::Arith(Arith::Div | Arith::Rem)));
        prop_assert!(value.is_some() || faults > 0 || divides);
    }

    #[test]
    fn a_compiled_number_is_what_its_tree_is(
        tree in num(), memory in memory(), values in prop::collection::vec(interesting(), 8), abi in abis(),
    ) {
        let guest = guest(&memory, &values);
        let mut nodes = Vec::new();
        tree.write(&mut nodes);
        let expected = tree.value(&guest, abi).map(|value| value as u64);
        prop_assert_eq!(evaluate(&guest, &nodes, abi).0, expected);
        prop_assert_eq!(Program::compile(&nodes, abi).unwrap().result(), Type::Word { signed: tree.is_signed() });
    }

    #[test]
    fn a_description_that_makes_no_sense_is_refused_or_runs_to_its_end(nodes in prop::collection::vec(node(), 0..30), abi in abis()) {
        let Ok(program) = Program::compile(&nodes, abi) else { return Ok(()) };
        let guest = guest(&[1; 0x2000], &[FIRST; 8]);
        let mut state = vec![0; program.slots()];
        let mut machine = Machine::default();
        let scene =
            Scene { vmi: Some(&guest.vmi), registers: (&guest.registers).into(), vcpu: VcpuId(0), va: Va(0), clock: &|| 7 };
        let mut asked = 0;
        while let Outcome::Ask(_) = machine.run(&program, &mut state, &scene) {
            asked += 1;
            prop_assert!(asked <= nodes.len() && program.asks());
            machine.answer(asked % 2 == 0);
        }
    }
}

/// Any step at all; conditions and numbers are often where they do not belong.
fn node() -> impl Strategy<Value = Node> {
    prop_oneof![
        4 => (interesting(), any::<bool>()).prop_map(|(value, signed)| Node::Const { value, signed }),
        2 => any::<u8>().prop_map(Node::Argument),
        1 => any::<u8>().prop_map(|size| Node::Load { size: size % 12 }),
        1 => (any::<u8>(), any::<bool>()).prop_map(|(bits, signed)| Node::Cast { bits, signed }),
        1 => arith().prop_map(Node::Arith),
        3 => Just(Node::Compare(Test::Lt)),
        1 => prop::collection::vec(any::<i128>(), 0..4).prop_map(Node::OneOf),
        1 => any::<(i128, i128)>().prop_map(|(first, last)| Node::Within(first, last)),
        1 => (any::<u32>(), prop::collection::vec(any::<u8>(), 0..600))
            .prop_map(|(max, pattern)| Node::Text { kind: TextKind::Utf16, test: TextTest::Contains, max: max % 5000, pattern }),
        1 => Just(Node::Not),
        2 => Just(Node::And),
        2 => Just(Node::Or),
        1 => any::<u64>().prop_map(Node::Every),
        1 => any::<f64>().prop_map(Node::Rate),
        1 => Just(Node::Once),
        1 => any::<u16>().prop_map(Node::Ask),
    ]
}

fn constant(value: u64) -> Node {
    Node::Const { value, signed: false }
}

fn refusal(nodes: &[Node]) -> String {
    match Program::compile(nodes, Abi::SystemV) {
        Err(VmiError::InvalidArgument { what: "expression", reason }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_wrong_description_is_refused_with_the_place() {
    let less = Node::Compare(Test::Lt);
    assert_eq!(refusal(&[]), "it leaves 0 values and not one");
    assert_eq!(refusal(&[constant(1), constant(2)]), "it leaves 2 values and not one");
    assert_eq!(refusal(&[constant(1), less.clone()]), "step 1: an operand is missing");
    assert_eq!(refusal(&[constant(1), Node::Not]), "step 1: a condition is needed here, and this is a number");
    let condition = [constant(1), constant(2), less];
    let summed: Vec<Node> = condition.iter().cloned().chain([constant(1), Node::Arith(Arith::Add)]).collect();
    assert_eq!(refusal(&summed), "step 4: a number is needed here, and this is a condition");
    assert_eq!(refusal(&vec![constant(1); 40]), "it leaves 40 values and not one");
    let deep: Vec<Node> = vec![constant(1); 16].into_iter().chain(vec![Node::Arith(Arith::Add); 15]).collect();
    assert_eq!(refusal(&deep), "it is nested too deeply: 15 places are the most");
    let long: Vec<Node> =
        std::iter::once(constant(1)).chain((0..600).flat_map(|_| [constant(1), Node::Arith(Arith::Add)])).collect();
    assert!(refusal(&long).contains("1024 steps are the most"), "{}", refusal(&long));
    let text = |max, pattern: &[u8]| {
        refusal(&[constant(1), Node::Text { kind: TextKind::Cstr, test: TextTest::Equal, max, pattern: pattern.to_vec() }])
    };
    assert!(text(5000, b"a").contains("5000 is no length of 1 to 4096 bytes"));
    assert!(text(3, b"abc").contains("never all of what is read"));
    assert!(text(9, b"a\0c").contains("no pattern with one"));
    assert!(refusal(&[Node::Rate(0.0)]).contains("0 a second"));
}

#[test]
fn state_is_kept_from_hit_to_hit_and_rates_look_at_the_clock() {
    let guest = guest(&[1; 0x2000], &[0; 8]);
    let run = |node: Node, times: &[u64]| -> Vec<u64> {
        let program = Program::compile(&[node], Abi::SystemV).unwrap();
        let mut state = vec![0; program.slots()];
        times
            .iter()
            .map(|now| {
                let clock = || *now;
                let scene = Scene {
                    vmi: Some(&guest.vmi),
                    registers: (&guest.registers).into(),
                    vcpu: VcpuId(0),
                    va: Va(0),
                    clock: &clock,
                };
                let Outcome::Value(Some(value)) = Machine::default().run(&program, &mut state, &scene) else { panic!() };
                value
            })
            .collect()
    };
    assert_eq!(run(Node::Every(3), &[0; 7]), [1, 0, 0, 1, 0, 0, 1]);
    assert_eq!(run(Node::Once, &[0; 3]), [1, 0, 0]);
    let second = 1_000_000_000;
    assert_eq!(run(Node::Rate(2.0), &[5, 6, 7, 8, second + 5, second + 6, second + 7]), [1, 1, 0, 0, 1, 1, 0]);
    assert_eq!(run(Node::Rate(0.5), &[0, second, 2 * second, 3 * second]), [1, 0, 1, 0]);
}

#[test]
fn the_second_condition_is_looked_at_only_if_it_matters() {
    let guest = guest(&[1; 0x2000], &[0; 8]);
    let is_true = [constant(1), constant(1), Node::Compare(Test::Eq)];
    let is_false = [constant(1), constant(2), Node::Compare(Test::Eq)];
    for (first, op, asks) in
        [(&is_true, Node::And, true), (&is_false, Node::And, false), (&is_true, Node::Or, false), (&is_false, Node::Or, true)]
    {
        let nodes: Vec<Node> = first.iter().cloned().chain([Node::Ask(9), op]).collect();
        let program = Program::compile(&nodes, Abi::SystemV).unwrap();
        let scene =
            Scene { vmi: Some(&guest.vmi), registers: (&guest.registers).into(), vcpu: VcpuId(0), va: Va(0), clock: &|| 0 };
        let mut machine = Machine::default();
        let outcome = machine.run(&program, &mut [], &scene);
        assert_eq!(outcome == Outcome::Ask(9), asks, "{nodes:?}");
        if asks {
            machine.answer(true);
            assert_eq!(machine.run(&program, &mut [], &scene), Outcome::Value(Some(1)));
        }
    }
    let context = AddressContext::from(&guest.registers);
    assert!(guest.vmi.translate(Va(FIRST), context).is_ok());
}

#[test]
fn the_end_of_a_string_is_found_where_its_unit_lies_across_two_pages() {
    let mut memory = vec![1; 0x2000];
    memory[0xfff..0x1001].fill(0);
    let guest = guest(&memory, &[0; 8]);
    let ends = |at: u64| {
        let pattern = vec![1, 1];
        let text = Node::Text { kind: TextKind::Utf16, test: TextTest::EndsWith, max: 64, pattern };
        evaluate(&guest, &[constant(at), text], Abi::SystemV).0
    };
    assert_eq!(ends(FIRST + 0xfff - 6), Some(1));
    // Between units, two zeros are no end.
    assert_eq!(ends(FIRST + 0xfff - 7), Some(0));
}
