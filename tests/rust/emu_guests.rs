//! Guests of tests/guests under breakpoints.

use std::time::Duration;

use vmitap::core::VmiCore;
use vmitap::driver::emu::BootOptions;
use vmitap::driver::{OnTrap, VmiEvents, VmiFrames, VmiProtection, VmiRead, VmiViews, VmiWrite, Wait};
use vmitap::event::{EventAction, EventReason, VmiEvent, VmiEventResponse};
use vmitap::tap::{BreakpointController, TapController};
use vmitap::{Gfn, MemoryAccess, Pa, View};

use super::guest::{Lab, options};

/// All that the guest of insns.S leaves: what it computed and what its exception handler recorded.
fn truth(lab: &Lab) -> Vec<u64> {
    // From `results` to the end of the truth section, then the records; the reads' words come in between.
    let mut all = Vec::new();
    for name in ["rounds", "int3_seen", "user_rcx", "user_r11", "user_flags", "buffer", "done"] {
        all.push(lab.word(name));
    }
    all.extend(lab.words("results", 64 * 3 * 2));
    all.extend(lab.words("hash_now", 10));
    for name in ["exc_count", "exc_error", "exc_rip", "exc_cs", "exc_rflags", "exc_rsp", "exc_ss", "exc_cr2"] {
        all.extend(lab.words(name, 256));
    }
    all
}

fn tap_names(lab: &Lab) -> Vec<String> {
    let mut names: Vec<String> = lab.symbols.iter().map(|s| s.name.clone()).filter(|name| name.starts_with("t_")).collect();
    names.sort();
    names
}

/// How often each instruction is executed.
fn executions(name: &str) -> u64 {
    match name {
        // Once for each iteration.
        "t_loop" | "t_branch" => 6,
        // `first` is reached by no other way, and all others once in each round.
        _ => 2,
    }
}

#[test]
fn each_hard_instruction_can_be_stepped_over_without_a_trace() {
    let elf = super::guest::assemble("insns.S");
    let mut plain = Lab::boot(&elf, &options(1, "")).unwrap();
    plain.run();
    plain.assert_unseen();
    let expected = truth(&plain);
    let names = tap_names(&plain);
    assert!(names.len() > 50, "{names:?}");
    let mut wrong = Vec::new();
    for name in &names {
        let mut lab = Lab::boot(&elf, &options(1, "")).unwrap();
        lab.tap(&[name]);
        lab.run();
        let found = truth(&lab);
        let differ: Vec<_> =
            (0..found.len()).filter(|at| found[*at] != expected[*at]).map(|at| (at, expected[at], found[at])).collect();
        if !differ.is_empty() || lab.hits_at(name) != executions(name) || lab.console() != plain.console() {
            wrong.push(format!("{name}: {} hits, (place, expected, found): {differ:x?} {}", lab.hits_at(name), lab.console()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A guest that has run untapped, and one that is tapped at each hard instruction, with their names.
fn all_tapped() -> (Lab, Lab, Vec<String>) {
    let elf = super::guest::assemble("insns.S");
    let mut plain = Lab::boot(&elf, &options(1, "")).unwrap();
    plain.run();
    let mut lab = Lab::boot(&elf, &options(1, "")).unwrap();
    let names = tap_names(&lab);
    lab.tap(&names.iter().map(String::as_str).collect::<Vec<_>>());
    (plain, lab, names)
}

#[test]
fn all_hard_instructions_are_stepped_over_where_their_hits_are_no_events() {
    for fate in [OnTrap::StepOver, OnTrap::Take] {
        let (plain, mut lab, names) = all_tapped();
        lab.run_sorting(fate);
        lab.assert_unseen();
        assert!(truth(&lab) == truth(&plain), "{fate:?}");
        for name in &names {
            assert_eq!(lab.hits_at(name), executions(name), "{name}, {fate:?}");
        }
    }
}

#[test]
fn all_hard_instructions_are_stepped_over_in_one_run() {
    for report in [false, true] {
        let (plain, mut lab, names) = all_tapped();
        let (mut steps, mut reports, mut stores) = (0, 0, 0);
        let mut stepped = None;
        lab.run_with(|lab, event| {
            let mut response = lab.usual(event);
            if let EventReason::MemoryAccess { access: MemoryAccess::W, .. } = event.reason {
                stores += u32::from(stepped == Some(event.registers.gp.rip));
            }
            stepped = None;
            if let EventAction::FastSingleStep { view } = response.action
                && report
            {
                steps += 1;
                response.action = EventAction::SingleStep { view };
                stepped = Some(event.registers.gp.rip);
            }
            if matches!(event.reason, EventReason::SingleStep { .. }) {
                assert_eq!(event.view, Some(View::DEFAULT));
                reports += 1;
                response = response.in_view(lab.view);
            }
            response
        });
        assert!(truth(&lab) == truth(&plain));
        for name in &names {
            assert_eq!(lab.hits_at(name), executions(name), "{name}");
        }
        if report {
            // The two INT3s of the guest's own end their steps with an event each, in place of the report; so does the store of each
            // `lock xadd` with which the guest reads its code.
            assert_eq!((steps > 100, stores > 100, steps - reports - stores), (true, true, 6));
        }
    }
}

#[test]
fn a_guest_that_is_stepped_from_its_first_to_its_last_instruction_computes_the_same() {
    let elf = super::guest::assemble("insns.S");
    let mut plain = Lab::boot(&elf, &options(1, "")).unwrap();
    plain.run();
    let mut lab = Lab::boot(&elf, &options(1, "")).unwrap();
    lab.tap(&["t_first"]);
    let mut steps = 0_u64;
    lab.run_with(|lab, event| {
        if let EventReason::Breakpoint { .. } = event.reason {
            let response = lab.usual(event);
            if response.action == EventAction::Reinject {
                return response.in_view(View::DEFAULT);
            }
        }
        steps += 1;
        VmiEventResponse::action(EventAction::SingleStep { view: View::DEFAULT })
    });
    assert!(steps > 1000, "{steps}");
    let (found, expected) = (truth(&lab), truth(&plain));
    let differ: Vec<_> =
        (0..found.len()).filter(|at| found[*at] != expected[*at]).map(|at| (at, expected[at], found[at])).collect();
    assert!(differ.is_empty(), "{differ:x?} {}", lab.console());
}

#[test]
fn every_call_is_one_hit_and_no_kind_of_read_sees_the_breakpoint() {
    for taps in [&["f"][..], &["g"], &["f", "h"], &["f", "g", "h"]] {
        let mut lab = Lab::with("calls.S", &options(1, "n=1000 every=100"));
        lab.tap(taps);
        lab.run();
        lab.assert_unseen();
        assert_eq!((lab.word("f_count"), lab.word("f_sum"), lab.word("wrong_results")), (1000, 499_500, 0));
        for name in taps {
            assert_eq!(lab.hits_at(name), lab.word(&format!("{name}_count")), "{name}");
        }
        assert!(lab.reads > 1000 && lab.word("checks") > 9, "{} reads", lab.reads);
        let plain = {
            let mut lab = Lab::with("calls.S", &options(1, "n=1000 every=100"));
            lab.run();
            lab.words("hash_now", 10)
        };
        assert_eq!(lab.words("hash_now", 10), plain);
    }
}

#[test]
fn reads_can_be_served_by_emulation() {
    let mut lab = Lab::with("calls.S", &options(1, "n=100 every=50"));
    lab.tap(&["f", "g"]);
    lab.run_with(|lab, event| {
        let mut response = lab.usual(event);
        if matches!(event.reason, EventReason::MemoryAccess { access: MemoryAccess::R, .. }) {
            response.action = EventAction::Emulate;
        }
        response
    });
    lab.assert_unseen();
    assert_eq!((lab.hits_at("f"), lab.word("wrong_results")), (100, 0));
}

#[test]
fn other_vcpus_that_read_all_the_time_see_nothing() {
    for vcpus in [2, 4] {
        let mut lab = Lab::with("calls.S", &options(vcpus, "n=3000 every=1000"));
        lab.tap(&["f", "g"]);
        lab.run();
        lab.assert_unseen();
        assert_eq!((lab.hits_at("f"), lab.word("wrong_results")), (3000, 0));
        assert!(lab.word("ap_checks") > 1, "{}", lab.word("ap_checks"));
    }
}

#[test]
fn a_breakpoint_that_can_be_read_is_seen() {
    let mut lab = Lab::with("calls.S", &options(1, "n=100 every=50"));
    lab.tap(&["f"]);
    lab.run_with(|lab, event| {
        // From the first hit on: the guest has taken its reference by then.
        if matches!(event.reason, EventReason::Breakpoint { .. }) {
            lab.vm.set_memory_access(lab.view, lab.pa("f").gfn(), MemoryAccess::RX).unwrap();
        }
        lab.usual(event)
    });
    lab.assert_done();
    let seen: Vec<bool> = lab.words("mismatches", 10).iter().map(|count| *count > 0).collect();
    // Not by `lock xadd`, which is denied as a write and stepped.
    assert_eq!(seen, [true, true, true, true, true, true, false, true, true, true]);
}

/// The write policy of a tap, by hand: the write happens in the page itself, then the shadow follows.
fn reapply(lab: &mut Lab, event: &VmiEvent) -> VmiEventResponse {
    match event.reason {
        EventReason::MemoryAccess { access, .. } if access.contains(MemoryAccess::W) => {
            lab.writes += 1;
            VmiEventResponse::action(EventAction::SingleStep { view: View::DEFAULT })
        }
        EventReason::SingleStep { .. } => {
            let pages: Vec<u64> = lab.shadows.keys().copied().collect();
            for gfn in pages {
                lab.refresh(Gfn(gfn));
            }
            VmiEventResponse::CONTINUE.in_view(lab.view)
        }
        _ => lab.usual(event),
    }
}

fn assert_writes(lab: &Lab, rounds: u64) {
    lab.assert_done();
    let counts = ["wrong", "overwritten", "reread"].map(|name| lab.word(name));
    assert_eq!(counts, [0, rounds, rounds], "wrong results, overwritten, read back");
    assert!(lab.word("calls") >= 7 * rounds);
}

#[test]
fn code_that_is_overwritten_in_any_way_runs_as_written() {
    for vcpus in [1, 2, 3] {
        let mut lab = Lab::with("writes.S", &options(vcpus, "n=50"));
        lab.run();
        assert_writes(&lab, 50);
    }
}

#[test]
fn tapped_code_that_is_overwritten_in_any_way_runs_as_written_and_stays_tapped() {
    for vcpus in [1, 2, 3] {
        let mut lab = Lab::with("writes.S", &options(vcpus, "n=50"));
        lab.tap(&["patched"]);
        lab.run_with(reapply);
        assert_writes(&lab, 50);
        assert_eq!(lab.hits_at("patched"), lab.word("calls"), "with {vcpus} vCPUs");
        assert!(lab.writes > 400, "{}", lab.writes);
        assert_eq!(vcpus > 1, lab.word("ap_writes") > 0);
    }
}

#[test]
fn code_that_the_caller_overwrites_runs_as_written() {
    // The page itself, while the tapped view shows a shadow: the stepper's translation is the one that must go.
    let mut lab = Lab::with("calls.S", &options(1, "n=40 every=0"));
    lab.tap(&["f"]);
    let mut flips = 0;
    lab.run_with(|lab, event| {
        if lab.hits_at("f") > 20 && flips == 0 {
            flips = 1;
            // `push rbx` becomes `push rcx`, and `pop rbx` `pop rcx` in the shadow: f still returns, with another RBX.
            let f = lab.pa("f");
            lab.vm.write(f, &[0x51]).unwrap();
            let before = lab.bytes(f, 32);
            let pop = before.windows(2).position(|bytes| bytes == [0x5b, 0xc3]).unwrap() as u64;
            lab.vm.write(lab.shadows[&f.gfn().0].pa(f.page_offset() + pop), &[0x59]).unwrap();
        }
        lab.usual(event)
    });
    lab.assert_done();
    assert_eq!((lab.hits_at("f"), lab.word("wrong_results"), lab.word("f_count")), (40, 0, 40));
}

/// Two vCPUs: the first sleeps, the second reads the page of `spot` in three ways, and counts what it read and every 0xCC.
const READER: &str = "#define TAPPED_SIZE 4096
#define HAS_AP_MAIN
#include \"boot.inc\"
counter stop
counter spins
counter reads
counter seen
counter ap_done
.text
.global main, ap_main
main: cli
hlt
jmp main
ap_main: lea rbx, [rip + spot]
1: cmp byte ptr [rbx], 0xcc
je 3f
mov rax, [rbx - 3]
shr rax, 24
cmp al, 0xcc
je 3f
lea rsi, [rbx - 1]
lea rdi, [rip + copy]
mov ecx, 3
rep movsb
cmp byte ptr [rip + copy + 1], 0xcc
je 3f
2: inc qword ptr [rip + reads]
cmp qword ptr [rip + stop], 0
je 1b
mov qword ptr [rip + ap_done], 1
ret
3: count seen
jmp 2b
.section .tapped, \"ax\"
.balign 4096
.global spot
.fill 0x100, 1, 0x90
spot: .fill 0xf00, 1, 0x90
.section .data
copy: .quad 0
";

/// Puts a breakpoint in and takes it out so many times while the guest of [`READER`] runs: reads served, what the guest counted.
fn insert_and_remove(times: u32, hidden: bool) -> (u64, u64, u64) {
    let lab = Lab::with(READER, &options(2, ""));
    let [spot, stop, reads, seen, done] = ["spot", "stop", "reads", "seen", "ap_done"].map(|name| lab.pa(name));
    let mut vmi = VmiCore::new(Box::new(lab.vm));
    let view = vmi.driver_mut().create_view(MemoryAccess::RWX).unwrap();
    vmi.driver_mut().switch_to_view(view).unwrap();
    let mut controller = BreakpointController::default();
    let mut served = 0;
    let mut turn = |vmi: &mut VmiCore<vmitap::driver::emu::EmuDriver>, limit: u32| {
        // A slice of the guest, or until so many of its reads were served.
        for _ in 0..limit {
            let Wait::Event(event) = vmi.driver_mut().wait(Duration::ZERO).unwrap() else { break };
            assert!(matches!(event.reason, EventReason::MemoryAccess { access: MemoryAccess::R, .. }), "{event:?}");
            served += 1;
            vmi.driver_mut().respond(event.vcpu, &VmiEventResponse::action(EventAction::Emulate)).unwrap();
        }
    };
    for _ in 0..20 {
        turn(&mut vmi, 1);
    }
    for time in 0..times {
        controller.monitor(&mut vmi, spot.gfn(), view).unwrap();
        controller.insert_breakpoint(&mut vmi, spot, view).unwrap();
        if !hidden {
            vmi.driver_mut().set_memory_access(view, spot.gfn(), MemoryAccess::RX).unwrap();
        }
        // The reader runs into the page at once, and so gives way soon.
        turn(&mut vmi, 2);
        controller.remove_breakpoint(&mut vmi, spot, view).unwrap();
        controller.unmonitor(&mut vmi, spot.gfn(), view).unwrap();
        if time % 100 == 0 {
            turn(&mut vmi, 1);
        }
    }
    assert!(vmi.driver().frames_in_use() <= 64, "frames are given back: {}", vmi.driver().frames_in_use());
    vmi.driver_mut().write(stop, &[1]).unwrap();
    let word = |vmi: &VmiCore<vmitap::driver::emu::EmuDriver>, pa: Pa| {
        let mut bytes = [0; 8];
        vmi.driver().read(pa, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    };
    while word(&vmi, done) == 0 {
        turn(&mut vmi, 10);
    }
    (served, word(&vmi, reads), word(&vmi, seen))
}

#[test]
fn a_vcpu_that_reads_the_page_all_the_time_never_sees_a_breakpoint_come_or_go() {
    let (served, reads, seen) = insert_and_remove(10_000, true);
    assert!(served > 10_000 && reads > 10_000, "{served} reads served of {reads} rounds");
    assert_eq!(seen, 0);
    // The check can fail.
    let (_, _, seen) = insert_and_remove(20, false);
    assert!(seen > 0);
}

#[test]
fn a_vcpu_that_reads_hidden_pages_all_the_time_leaves_the_others_their_time() {
    let mut lab =
        Lab::with(&READER.replace("main: cli\nhlt\njmp main", "main: inc qword ptr [rip + spins]\njmp main"), &options(2, ""));
    lab.tap(&["spot"]);
    let mut served = 0;
    while served < 2000 {
        if let Wait::Event(event) = lab.vm.wait(Duration::from_secs(5)).unwrap() {
            served += 1;
            lab.respond(&event, EventAction::Emulate);
        }
    }
    // Its turns are as long in time: a hundred reads and more to ten thousand rounds.
    let rounds = lab.word("spins");
    assert!(rounds > 100_000, "{rounds} rounds of the one to {served} reads of the other");
}

#[test]
fn a_guest_that_traces_itself_with_the_trap_flag_gets_the_same_traps_over_breakpoints() {
    const SOURCE: &str = "#define TAPPED_SIZE 4096
#include \"boot.inc\"
counter traps
counter hash
counter flags
.text
.global main, t_nop, t_push, t_pushfq, t_pop, t_store, t_mov, t_sub, t_ss, t_after, t_rep, t_call, t_lea, t_cpuid, t_jmp, t_div, t_popfq
main: push rbx
lea rax, [rip + on_db]
mov [rip + handlers + 8], rax
lea rax, [rip + on_de]
mov [rip + handlers], rax
lea rsi, [rip + from]
lea rdi, [rip + to]
mov edx, KDATA
pushfq
or qword ptr [rsp], 0x100
popfq
t_nop: nop
t_push: push rbx
t_pushfq: pushfq
t_pop: pop rax
t_store: mov [rip + flags], rax
t_mov: mov ecx, 3
t_sub: sub rsp, 0x20
add rsp, 0x20
t_ss: mov ss, edx
t_after: nop
t_rep: rep movsb
t_call: call 1f
1: pop rax
t_lea: lea rax, [rip + 8]
xor eax, eax
t_cpuid: cpuid
xor ebx, ebx
t_div: div rbx
t_jmp: jmp 2f
2: pop rax
pushfq
and qword ptr [rsp], ~0x100
t_popfq: popfq
pop rbx
ret
on_de: mov rax, [rip + hash]
rol rax, 9
xor rax, [rdi + FRAME_RFLAGS]
mov [rip + hash], rax
add qword ptr [rdi + FRAME_RIP], 3
ret
on_db: mov rax, [rip + hash]
rol rax, 7
xor rax, [rdi + FRAME_RIP]
rol rax, 5
xor rax, [rdi + FRAME_RFLAGS]
mov [rip + hash], rax
count traps
ret
.section .tapped, \"ax\"
nop
.section .data
from: .quad 0x1234
to: .quad 0
";
    let elf = super::guest::assemble(SOURCE);
    let truth = |lab: &Lab| (lab.word("traps"), lab.word("hash"), lab.word("flags"), lab.word("done"));
    let mut plain = Lab::boot(&elf, &options(1, "")).unwrap();
    plain.run();
    let expected = truth(&plain);
    assert!(expected.0 > 20 && expected.2 & 0x100 != 0 && expected.3 == 1, "{expected:x?} {}", plain.console());
    let names = tap_names(&plain);
    for name in &names {
        for report in [false, true] {
            let mut lab = Lab::boot(&elf, &options(1, "")).unwrap();
            lab.tap(&[name]);
            lab.run_with(|lab, event| {
                let mut response = lab.usual(event);
                if let (EventAction::FastSingleStep { view }, true) = (response.action, report) {
                    response.action = EventAction::SingleStep { view };
                }
                if matches!(event.reason, EventReason::SingleStep { .. }) { response.in_view(lab.view) } else { response }
            });
            assert_eq!(truth(&lab), expected, "{name}, {report}: {}", lab.console());
            // A repeated string instruction comes back after each trap.
            assert_eq!(lab.hits_at(name), if name == "t_rep" { 3 } else { 1 }, "{name}, {report}");
        }
    }
}

const DEMO: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/demo.elf"));
const CALLS: usize = 0x100 / 8;
const FINISHED: (usize, u64) = (0x30 / 8, 0x6465_6873_696e_6966);

fn demo(vcpus: u16, command_line: &str) -> Lab {
    Lab::boot(DEMO, &BootOptions { vcpus, command_line: command_line.to_owned(), ..BootOptions::default() }).unwrap()
}

#[test]
fn the_demo_guest_reaches_its_verdict_untouched_and_tapped() {
    for (vcpus, taps) in
        [(1, &[][..]), (2, &[]), (1, &["open_file"]), (2, &["open_file", "read_file", "timer_tick", "trap_iret"])]
    {
        let mut lab = demo(vcpus, "rounds=6");
        lab.tap(taps);
        lab.run();
        let console = lab.console();
        assert!(console.contains(" checks, 0 mismatches"), "{console}");
        let truth = lab.words("truth", 128);
        assert_eq!((truth[FINISHED.0], truth[0x28 / 8], truth[0x20 / 8], truth[0x10 / 8]), (FINISHED.1, 1, 6, vcpus.into()));
        assert!(truth[0x60 / 8] > 0, "preempted by the timer");
        for (index, name) in ["open_file", "read_file"].iter().enumerate() {
            if taps.contains(name) {
                assert!(truth[CALLS + index] > 10);
                assert_eq!(lab.hits_at(name), truth[CALLS + index], "{name} with {vcpus} vCPUs");
            }
        }
        if taps.contains(&"timer_tick") {
            assert_eq!(lab.hits_at("timer_tick"), truth[0x380 / 8..0x3c0 / 8].iter().sum::<u64>());
        }
    }
}

#[test]
fn the_demo_guest_sees_a_breakpoint_that_is_not_hidden() {
    let mut lab = demo(1, "rounds=3");
    lab.tap_with("open_file", MemoryAccess::RX);
    lab.run();
    assert!(lab.console().contains("TAMPERING SEEN"), "{}", lab.console());
    assert_eq!(lab.hits_at("open_file"), lab.words("truth", 128)[CALLS]);
}
