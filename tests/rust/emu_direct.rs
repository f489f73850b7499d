//! Instructions at breakpoints that the driver carries out itself: each does exactly what the engine makes of it.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vmitap::arch::amd64::{GpRegisters, Registers};
use vmitap::driver::emu::Steps;
use vmitap::driver::{VmiEvents, VmiProtection, VmiViews, VmiWrite};
use vmitap::event::{EventAction, EventReason, VmiEvent, VmiEventResponse};
use vmitap::{MemoryAccess, View};

use super::guest::Lab;

const AREA: usize = 2 * 4096;

fn guest() -> Lab {
    Lab::of(
        "#define TAPPED_SIZE 4096\n#include \"boot.inc\"\n.text\n.global main\nmain: int3\nret\n\
         .section .tapped, \"ax\"\n.balign 4096\n.global page, spot\npage: .fill 0x100, 1, 0x90\nspot: .fill 0xf00, 1, 0x90\n\
         .section .data\n.balign 4096\n.global area\narea: .fill 8192, 1, 0\n",
    )
}

/// A guest in which one instruction after the other is run in two ways: by the engine as it is, and over a hidden breakpoint.
struct Bench {
    lab: Lab,
    /// The INT3 the guest stands at.
    event: VmiEvent,
}

/// What an instruction left.
#[derive(PartialEq, Debug)]
struct Left {
    registers: Registers,
    area: Vec<u8>,
}

impl Bench {
    fn new() -> Self {
        let mut lab = guest();
        lab.tap(&["spot"]);
        lab.vm.switch_to_view(View::DEFAULT).unwrap();
        let event = lab.event();
        Self { lab, event }
    }

    fn place(&mut self, code: &[u8]) {
        // Behind the instruction the guest has INT3s of its own.
        let mut bytes = [0xcc; 32];
        bytes[..code.len()].copy_from_slice(code);
        let spot = self.lab.pa("spot");
        self.lab.vm.write(spot, &bytes).unwrap();
        bytes[0] = 0xcc;
        let frame = self.lab.shadows[&spot.gfn().0];
        self.lab.vm.write(frame.pa(spot.page_offset()), &bytes).unwrap();
    }

    fn start(&mut self, gp: &GpRegisters, view: View) -> VmiEvent {
        let area = self.lab.pa("area");
        self.lab.vm.write(area, &[0x5a; AREA]).unwrap();
        let response = VmiEventResponse { registers: Some(*gp), ..VmiEventResponse::CONTINUE.in_view(view) };
        self.lab.vm.respond(self.event.vcpu, &response).unwrap();
        self.lab.event()
    }

    fn left(&mut self, event: &VmiEvent) -> Left {
        assert!(matches!(event.reason, EventReason::Breakpoint { .. }), "{event:x?}");
        self.event = *event;
        let area = self.lab.bytes(self.lab.pa("area"), AREA);
        Left { registers: event.registers, area }
    }

    fn by_the_engine(&mut self, gp: &GpRegisters) -> Left {
        let event = self.start(gp, View::DEFAULT);
        self.left(&event)
    }

    fn over_a_breakpoint(&mut self, gp: &GpRegisters, report: bool) -> Left {
        let hit = self.start(gp, self.lab.view);
        assert_eq!(hit.registers.gp, *gp, "nothing has changed at the hit itself");
        let (home, view) = (self.lab.view, View::DEFAULT);
        let action = if report { EventAction::SingleStep { view } } else { EventAction::FastSingleStep { view } };
        self.lab.vm.respond(hit.vcpu, &VmiEventResponse::action(action).in_view(home)).unwrap();
        if report {
            let event = self.lab.event();
            assert!(
                matches!(event.reason, EventReason::SingleStep { gfn } if gfn == Some(self.lab.pa("spot").gfn())),
                "{event:x?}"
            );
            self.lab.vm.respond(event.vcpu, &VmiEventResponse::CONTINUE.in_view(home)).unwrap();
        }
        let event = self.lab.event();
        self.left(&event)
    }
}

/// An instruction of the kinds the driver knows, in every form, with its immediates.
fn instruction() -> impl Strategy<Value = Vec<u8>> {
    let rex = prop_oneof![Just(None), (0x40_u8..=0x4f).prop_map(Some)];
    let with_rex = |rex: Option<u8>, rest: &[u8]| rex.into_iter().chain(rest.iter().copied()).collect::<Vec<u8>>();
    let imm = any::<[u8; 8]>();
    let edge =
        prop_oneof![Just([0; 8]), Just([0xff; 8]), Just([1, 0, 0, 0, 0, 0, 0, 0]), Just([0, 0, 0, 0x80, 0, 0, 0, 0x80]), imm];
    (rex, any::<u8>(), any::<u8>(), edge, 0_usize..22).prop_map(move |(rex, a, sib, imm, kind)| {
        let registers = a | 0xc0;
        let group = 0xc0 | a;
        match kind {
            0 | 1 => with_rex(rex, &[0x50 + (a & 7)]),
            2 => vec![0xf3, 0x0f, 0x1e, 0xfa],
            3 => with_rex(rex.map(|rex| rex & !1), &[0x90]),
            4 => vec![0x66, 0x90],
            5 => [&[0x0f, 0x1f, 0x84, sib][..], &imm[..4]].concat(),
            6 => [&[0x66, 0x0f, 0x1f, 0x44, sib][..], &imm[..1]].concat(),
            7 => {
                let len = if rex.is_some_and(|rex| rex & 8 != 0) { 8 } else { 4 };
                with_rex(rex, &[&[0xb8 + (a & 7)][..], &imm[..len]].concat())
            }
            8 => with_rex(rex, &[0x89, registers]),
            9 => with_rex(rex, &[0x8b, registers]),
            // The engine refuses it with REX.R, which a processor ignores.
            10 => with_rex(rex.map(|rex| rex & !4), &[&[0xc7, 0xc0 | a & 7][..], &imm[..4]].concat()),
            11 | 12 => with_rex(rex, &[0x83, group, imm[0]]),
            13 | 14 => with_rex(rex, &[&[0x81, group][..], &imm[..4]].concat()),
            15 => with_rex(rex, &[0x85, registers]),
            16 => with_rex(rex, &[1 | (sib & 0x38), registers]),
            17 => with_rex(rex, &[3 | (sib & 0x38), registers]),
            _ => {
                let modrm = a & 0xbf;
                let mut bytes = vec![0x8d, modrm];
                let has_sib = modrm & 7 == 4;
                if has_sib {
                    bytes.push(sib);
                }
                let far = match modrm >> 6 {
                    0 if modrm & 7 == 5 || (has_sib && sib & 7 == 5) => 4,
                    0 => 0,
                    1 => 1,
                    _ => 4,
                };
                bytes.extend_from_slice(&imm[..far]);
                with_rex(rex, &bytes)
            }
        }
    })
}

/// Registers with a stack in the area, aligned or not, also across its pages.
fn registers() -> impl Strategy<Value = (GpRegisters, u64)> {
    let edge = || prop_oneof![Just(0_u64), Just(u64::MAX), Just(1 << 63), Just(0x7fff_ffff), Just(0x8000_0000), any::<u64>()];
    let flags = 0_u64..64;
    let stack = prop_oneof![(2_u64..1000).prop_map(|word| word * 8), (16_u64..8180), Just(4100), Just(4104)];
    (proptest::array::uniform15(edge()), flags, stack).prop_map(|(r, flags, stack)| {
        let flag = |bit: u32, at: u32| (flags >> bit & 1) << at;
        let rflags = 2 | flag(0, 0) | flag(1, 2) | flag(2, 4) | flag(3, 6) | flag(4, 7) | flag(5, 11);
        let [rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15] = r;
        let gp = GpRegisters {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rflags,
            ..GpRegisters::default()
        };
        (gp, stack)
    })
}

#[test]
fn what_the_driver_carries_out_itself_is_what_the_engine_would_have_done() {
    let mut bench = Bench::new();
    let (spot, area) = (bench.lab.va("spot").0, bench.lab.va("area").0);
    let before = bench.lab.vm.steps();
    let mut runner = TestRunner::new(Config { cases: 2500, failure_persistence: None, ..Config::default() });
    let bench = std::cell::RefCell::new(&mut bench);
    let strategy = (instruction(), registers(), any::<bool>());
    let result = runner.run(&strategy, |(code, (gp, stack), report)| {
        let mut bench = bench.borrow_mut();
        let gp = GpRegisters { rip: spot, rsp: area + stack, ..gp };
        bench.place(&code);
        let expected = bench.by_the_engine(&gp);
        prop_assert_eq!(expected.registers.gp.rip, spot + code.len() as u64, "{:02x?} is one instruction", &code);
        let found = bench.over_a_breakpoint(&gp, report);
        prop_assert_eq!(found, expected, "{:02x?}", &code);
        Ok(())
    });
    result.unwrap();
    let bench = bench.into_inner();
    let Steps { direct, engine } = bench.lab.vm.steps();
    let (direct, engine) = (direct - before.direct, engine - before.engine);
    // ADC, SBB, pushes across a page border and the like are left to the engine.
    assert!(direct > 1500 && engine > 50 && direct + engine >= 2500, "{direct} by the driver, {engine} by the engine");
}

#[test]
fn the_trap_flag_comes_due_after_a_tapped_push_as_after_any_instruction() {
    let run = |tapped: bool| {
        let mut lab = Lab::of(
            "#define TAPPED_SIZE 4096\n#include \"boot.inc\"\ncounter a\n.text\n.global main\nmain:\nlea rax, [rip + on_db]\n\
             mov [rip + handlers + 8], rax\npushfq\nor qword ptr [rsp], 0x100\npopfq\n.global spot\nspot: push rbx\nnop\n\
             pushfq\nand qword ptr [rsp], ~0x100\npopfq\npop rbx\nret\non_db: count a\nret\n.section .tapped, \"ax\"\nnop\n",
        );
        if tapped {
            lab.tap(&["spot"]);
        }
        lab.run();
        lab.assert_done();
        let traps = lab.word("a");
        (traps, lab.words("exc_rip", 2), lab.words("exc_rflags", 2), lab.hits_at("spot"))
    };
    let (plain, tapped) = (run(false), run(true));
    assert_eq!((plain.0, &plain.1, &plain.2), (tapped.0, &tapped.1, &tapped.2));
    assert_eq!((plain.0, tapped.3), (5, 1), "one trap for each instruction from the push to the popfq");
}

#[test]
fn a_tapped_push_onto_a_page_that_its_view_denies_is_told_as_a_write() {
    for step_view_denies in [false, true] {
        let mut bench = Bench::new();
        let (spot, area) = (bench.lab.va("spot").0, bench.lab.va("area").0);
        bench.place(&[0x53]);
        let denied = if step_view_denies { View::DEFAULT } else { bench.lab.view };
        let page = bench.lab.pa("area").gfn();
        let gp = GpRegisters { rip: spot, rsp: area + 0x800, rbx: 7, rflags: 2, ..GpRegisters::default() };
        // Once before, so that the driver knows the page already.
        assert_eq!(bench.over_a_breakpoint(&gp, false).area[0x7f8..0x800], [7, 0, 0, 0, 0, 0, 0, 0]);
        bench.lab.vm.set_memory_access(denied, page, MemoryAccess::R).unwrap();
        let hit = bench.start(&gp, bench.lab.view);
        let step = VmiEventResponse::action(EventAction::FastSingleStep { view: View::DEFAULT }).in_view(bench.lab.view);
        bench.lab.vm.respond(hit.vcpu, &step).unwrap();
        let event = bench.lab.event();
        let EventReason::MemoryAccess { pa, access, len, .. } = event.reason else { panic!("{event:x?}") };
        assert_eq!((pa, access, len), (page.pa(0x7f8), MemoryAccess::W, 8));
        assert_eq!((event.view, event.registers.gp), (Some(denied), gp), "nothing has been done");
        assert_eq!(bench.lab.bytes(page.pa(0x7f8), 8), [0x5a; 8]);
    }
}

#[test]
fn a_tapped_push_without_a_stack_ends_as_it_does_untapped() {
    let run = |tapped: bool| {
        let mut lab = Lab::of(
            "#define TAPPED_SIZE 4096\n#include \"boot.inc\"\n.text\n.global main\nmain:\nmov rsp, 0x7fff00000000\n.global spot\n\
             spot: push rbx\nret\n.section .tapped, \"ax\"\nnop\n",
        );
        if tapped {
            lab.tap(&["spot"]);
        }
        lab.run();
        assert_eq!(lab.word("done"), 0xbad, "the double fault is recorded");
        (lab.console(), lab.words("exc_rip", 16), lab.words("exc_cr2", 16), lab.words("exc_rsp", 16))
    };
    let plain = run(false);
    assert_eq!(plain, run(true));
}

#[test]
fn fpu_and_msr_state_survives_hits_and_turns_of_other_vcpus() {
    // What rests in the engine between two hits of one vCPU must be back when the other one has had its turn.
    let run = |tapped: bool| {
        let mut lab = Lab::with(
            "#define TAPPED_SIZE 4096\n#define HAS_AP_MAIN\n#include \"boot.inc\"\ncounter sum\ncounter ap_sum\ncounter base\n.text\n\
             .global main, spot, ap_main\nmain:\nxor edx, edx\nmov eax, 0x1234\nmov ecx, 0xc0000102\nwrmsr\n\
             mov rax, cr4\nor eax, 0x600\nmov cr4, rax\nxorps xmm0, xmm0\nmov ebx, 20000\n\
             1: mov eax, 1\nmovd xmm1, eax\npaddq xmm0, xmm1\nswapgs\ncall spot\nswapgs\ndec ebx\njnz 1b\n\
             movq [rip + sum], xmm0\nmov ecx, 0xc0000102\nrdmsr\nmov [rip + base], rax\n2: cmp qword ptr [rip + ap_sum], 0\njne 3f\npause\njmp 2b\n3: ret\n\
             ap_main:\nmov rax, cr4\nor eax, 0x600\nmov cr4, rax\nxorps xmm0, xmm0\nmov ebx, 20000\n\
             1: mov eax, 3\nmovd xmm1, eax\npaddq xmm0, xmm1\ncall spot\ndec ebx\njnz 1b\nmovq [rip + ap_sum], xmm0\nret\n\
             spot: push rbp\npop rbp\nret\n.section .tapped, \"ax\"\nnop\n",
            &super::guest::options(2, ""),
        );
        if tapped {
            lab.tap(&["spot"]);
        }
        let mut bases = std::collections::HashSet::new();
        lab.run_with(|lab, event| {
            if event.vcpu.0 == 0 {
                bases.insert((event.registers.gs.base, event.registers.kernel_gs_base));
            }
            lab.usual(event)
        });
        lab.assert_done();
        if tapped {
            assert_eq!(lab.hits_at("spot"), 40_000);
            assert_eq!(bases.into_iter().collect::<Vec<_>>(), [(0x1234, 0)], "inside, GS is swapped at every hit");
        }
        (lab.word("sum"), lab.word("ap_sum"), lab.word("base"))
    };
    assert_eq!(run(false), (20_000, 60_000, 0x1234));
    assert_eq!(run(true), (20_000, 60_000, 0x1234));
}
