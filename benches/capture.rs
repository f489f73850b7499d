//! Cost of looking at a hit: a filter that keeps it back, and a row of four columns. The guest's memory is the mock driver's, so what is
//! left is the evaluation's own work.
#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark that cannot go on panics")]

mod common;

use std::hint::black_box;

use common::CpuTime;
use criterion::{Criterion, criterion_group, criterion_main};
use vmitap::arch::amd64::{Register, Registers, pte};
use vmitap::capture::{
    Abi, Column, Facts, Machine, Node, Plan, Program, Recording, Row, Scene, Source, Test, TextKind, TextTest,
};
use vmitap::core::VmiCore;
use vmitap::driver::mock::{MockDriver, PageSize};
use vmitap::{Pa, Va, VcpuId};

const DATA: Va = Va(0x40_0000);

fn guest() -> (VmiCore<MockDriver>, Registers) {
    let mut driver = MockDriver::new(0x10000, 1);
    let context = driver.new_root(4).unwrap();
    driver.map(context, DATA, Pa(0x8000), PageSize::Size4K, pte::P).unwrap();
    driver.poke(Pa(0x8000), b"/home/alice/notes.txt\0").unwrap();
    let mut registers = Registers { cr3: context.root.0, ..Registers::default() };
    registers.gp.rdi = DATA.0;
    (VmiCore::new(Box::new(driver)), registers)
}

fn compile(nodes: &[Node]) -> Program {
    Program::compile(nodes, Abi::SystemV).unwrap()
}

fn filters(c: &mut Criterion<CpuTime>) {
    let (vmi, registers) = guest();
    let scene = Scene { vmi: Some(&vmi), registers: (&registers).into(), vcpu: VcpuId(0), va: DATA, clock: &|| 0 };
    let constant = |value| Node::Const { value, signed: false };
    let size = [Node::Argument(2), constant(4096), Node::Compare(Test::Gt)];
    let ring = [Node::Register(Register::Ring), constant(3), Node::Compare(Test::Eq)];
    let both: Vec<Node> = ring.iter().chain(&size).cloned().chain([Node::Not, Node::And]).collect();
    let pattern = b"/etc/shadow".to_vec();
    let path = [Node::Argument(0), Node::Text { kind: TextKind::Cstr, test: TextTest::Equal, max: 256, pattern }];
    let mut group = c.benchmark_group("filter");
    for (name, nodes) in [("Arg(2) > 4096", &size[..]), ("(ring == 3) & ~(Arg(2) > 4096)", &both), ("Cstr(Arg(0)) == ...", &path)]
    {
        let program = compile(nodes);
        group.bench_function(name, |b| b.iter(|| Machine::default().run(black_box(&program), &mut [], black_box(&scene))));
    }
    group.finish();
}

fn rows(c: &mut Criterion<CpuTime>) {
    let (vmi, registers) = guest();
    let scene = Scene { vmi: Some(&vmi), registers: (&registers).into(), vcpu: VcpuId(0), va: DATA, clock: &|| 0 };
    let number = |name: &str, nodes: &[Node]| Column {
        name: name.to_owned(),
        source: Source::Number { program: compile(nodes), bytes: 8 },
    };
    let path = Column { name: "path".to_owned(), source: Source::Cstr { at: compile(&[Node::Argument(0)]), max: 64 } };
    let numbers = vec![
        number("a", &[Node::Argument(0)]),
        number("b", &[Node::Argument(1)]),
        number("c", &[Node::Register(Register::Rip)]),
        number("d", &[Node::Register(Register::Rsp)]),
    ];
    let mut group = c.benchmark_group("capture");
    for (name, columns) in
        [("4 numbers", numbers.clone()), ("3 numbers and a string", [vec![path], numbers.into_iter().take(3).collect()].concat())]
    {
        let plan = Plan::new(columns).unwrap();
        let mut recording = Recording::new(usize::MAX, 65_536, [].into());
        recording.add_columns(plan.columns()).unwrap();
        let places = recording.places(plan.columns().iter());
        let label = recording.label("f");
        let facts = Facts { time_ns: 1, vcpu: VcpuId(0), tap: 0, label, va: DATA, root: registers.root() };
        let mut row = Row::default();
        group.bench_function(name, |b| {
            b.iter(|| {
                row.clear();
                plan.read(black_box(&scene), &mut row);
                recording.append(&facts, &places, &row);
                recording.settle(1).unwrap();
                if recording.has_closed() {
                    drop(recording.take_closed());
                }
            });
        });
    }
    group.finish();
}

criterion_group!(name = benches; config = common::criterion(); targets = filters, rows);
criterion_main!(benches);
