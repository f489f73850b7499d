//! What the embedded driver promises, call by call.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use vmitap::arch::amd64::{ControlRegister, Injection, InjectionKind};
use vmitap::driver::emu::{BootOptions, EmuDriver};
use vmitap::driver::open::{OpenOptions, Target, open};
use vmitap::driver::{
    Monitor, VmiControl, VmiEvents, VmiFrames, VmiInject, VmiProtection, VmiRead, VmiRegisters, VmiViews, VmiWrite, Wait,
};
use vmitap::event::{EventAction, EventReason, VmiEventResponse};
use vmitap::image::Image;
use vmitap::{Gfn, MemoryAccess, PAGE_SIZE, Pa, Va, VcpuId, View, VmiError};

use super::guest::{Lab, assemble, library, options};

const ONE: VcpuId = VcpuId(0);

/// A guest whose `main` is `body`; the words `a`, `b`, `c` are for what it finds.
fn guest(body: &str) -> Lab {
    Lab::of(&text(body))
}

fn text(body: &str) -> String {
    format!(
        "#define TAPPED_SIZE 4096\n#include \"boot.inc\"\ncounter a\ncounter b\ncounter c\n.text\n.global main\nmain:\n{body}\nret\n\
         .section .tapped, \"ax\"\n.balign 4096\n.global page, page2\npage: .fill 4096, 1, 0x90\npage2: .fill 4096, 1, 0x90\n"
    )
}

// --- tasks and time ---

#[test]
fn the_timer_preempts_a_jump_to_itself_tapped_or_not() {
    for taps in [&[][..], &["t_jump"], &["t_work"], &["t_tick", "t_jump", "t_work"]] {
        let mut lab = Lab::with("tasks.S", &options(1, "ticks=30"));
        lab.tap(taps);
        lab.run();
        lab.assert_done();
        assert_eq!((lab.word("ticks"), lab.word("spins")), (30, 1), "{taps:?}");
        assert!(lab.word("work_a") > 100 && lab.word("work_b") > 100);
        if taps.contains(&"t_tick") {
            assert_eq!(lab.hits_at("t_tick"), 30);
        }
        if taps.contains(&"t_work") {
            // One iteration may be under way at the end.
            assert!(lab.hits_at("t_work").abs_diff(lab.word("work_b")) <= 1);
        }
        if taps.contains(&"t_jump") {
            assert!(lab.hits_at("t_jump") > 100);
        }
    }
}

#[test]
fn eight_vcpus_send_each_other_interrupts() {
    for taps in [&[][..], &["t_tick"], &["ap_main", "on_call"]] {
        let mut lab = Lab::with("tasks.S", &options(8, "ticks=5"));
        lab.tap(taps);
        lab.run();
        lab.assert_done();
        assert_eq!((lab.word("ipis"), lab.word("aps_done"), lab.words("called", 8)), (7, 7, vec![0, 1, 1, 1, 1, 1, 1, 1]));
        if taps.contains(&"on_call") {
            assert_eq!((lab.hits_at("on_call"), lab.hits_at("ap_main")), (7, 7));
        }
    }
}

#[test]
fn a_run_is_the_same_each_time() {
    let run = || {
        let mut lab = Lab::with("tasks.S", &options(3, "ticks=9"));
        lab.run();
        (lab.word("work_a"), lab.word("work_b"), lab.vm.virtual_time())
    };
    assert_eq!(run(), run());
}

#[test]
fn an_interrupt_that_waits_for_sti_comes_after_one_more_instruction() {
    let mut lab = guest(
        "lea rax, [rip + on_it]\nmov [rip + handlers + 0x40 * 8], rax\nwrite_msr X2APIC_LVT_TIMER, 0x40\n\
         write_msr X2APIC_INITIAL_COUNT, 100\nmov ecx, 1000\n1: dec ecx\njnz 1b\nsti\nnop\n.global after\nafter: nop\ncli\nret\n\
         on_it: count a\nwrite_msr X2APIC_EOI, 0\nret\n",
    );
    lab.run();
    lab.assert_done();
    assert_eq!((lab.word("a"), lab.words("exc_rip", 0x41)[0x40]), (1, lab.va("after").0));
}

#[test]
fn a_step_from_a_halt_is_the_interrupt_that_ends_it() {
    let mut lab = guest(
        "lea rax, [rip + on_it]\nmov [rip + handlers + 0x40 * 8], rax\nwrite_msr X2APIC_LVT_TIMER, 0x40 | 1 << 17\n\
         write_msr X2APIC_INITIAL_COUNT, 100\ncall slept\ncli\nret\non_it: count a\nwrite_msr X2APIC_EOI, 0\nret\n\
         .section .tapped, \"ax\"\n.global slept, again, woken\nslept: nop\nsti\nhlt\nagain: sti\nhlt\nwoken: ret\n",
    );
    lab.tap(&["slept"]);
    let mut steps = Vec::new();
    lab.run_with(|lab, event| {
        // One after the other, until the vCPU is in the handler of an interrupt, and there no more.
        let report = VmiEventResponse::action(EventAction::SingleStep { view: View::DEFAULT }).in_view(lab.view);
        match event.reason {
            EventReason::SingleStep { .. } => steps.push(event.registers.rip()),
            EventReason::Breakpoint { .. } => return report,
            _ => return lab.usual(event),
        }
        if steps.len() < 4 { report } else { VmiEventResponse::CONTINUE.in_view(lab.view) }
    });
    let slept = lab.va("slept").0;
    let entry = steps.pop().unwrap();
    assert_eq!(steps, [Va(slept + 1), Va(slept + 2), Va(slept + 3)], "and then {entry:x?}");
    assert!(entry.0.abs_diff(slept) > 5, "{entry:x?} is the entry of the handler");
    assert!(lab.word("a") >= 2, "{} interrupts", lab.word("a"));
    lab.assert_done();
}

#[test]
fn a_triple_fault_ends_the_guest_and_does_not_hang() {
    let mut lab = guest("lidt [rip + zero]\nud2\nzero: .quad 0, 0\n");
    lab.run();
    assert!(lab.vm.has_halted());
    assert_eq!((lab.word("done"), lab.vm.wait(Duration::from_secs(5)).unwrap()), (0, Wait::Idle));
}

// --- waiting, pausing, injecting ---

#[test]
fn a_wait_ends_in_time_when_woken_and_when_paused() {
    let mut lab = guest("1: jmp 1b");
    let start = Instant::now();
    assert_eq!(lab.vm.wait(Duration::from_millis(50)).unwrap(), Wait::Timeout);
    assert!((40..5000).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
    let waker = lab.vm.waker();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        waker.wake();
    });
    let start = Instant::now();
    assert_eq!(lab.vm.wait(Duration::from_secs(30)).unwrap(), Wait::Timeout);
    assert!(start.elapsed() < Duration::from_secs(10));
    thread.join().unwrap();
    lab.vm.pause().unwrap();
    lab.vm.pause().unwrap();
    lab.vm.resume().unwrap();
    let before = lab.vm.virtual_time();
    assert_eq!((lab.vm.wait(Duration::from_secs(5)).unwrap(), lab.vm.virtual_time()), (Wait::Idle, before));
    lab.vm.resume().unwrap();
    assert!(lab.vm.resume().is_err());
    assert_eq!(lab.vm.wait(Duration::from_millis(5)).unwrap(), Wait::Timeout);
    assert!(lab.vm.virtual_time() > before);
}

#[test]
fn what_is_injected_arrives_through_the_guests_own_table() {
    let mut lab = guest(
        "lea rax, [rip + on_it]\nmov [rip + handlers + 14 * 8], rax\nmov [rip + handlers + 0x60 * 8], rax\n\
         mov qword ptr [rip + b], 1\n1: pause\ncmp qword ptr [rip + a], 2\njb 1b\nret\non_it: count a\nret\n",
    );
    while lab.word("b") == 0 {
        assert_eq!(lab.vm.wait(Duration::from_millis(1)).unwrap(), Wait::Timeout);
    }
    let fault =
        Injection { vector: 14, kind: InjectionKind::Exception, error_code: Some(4), cr2: Some(0x1234_5000), insn_len: 0 };
    lab.vm.inject(ONE, &fault).unwrap();
    assert!(lab.vm.inject(ONE, &fault).is_err(), "one at a time");
    assert_eq!(lab.vm.wait(Duration::from_millis(20)).unwrap(), Wait::Timeout);
    assert_eq!((lab.word("a"), lab.words("exc_cr2", 15)[14], lab.words("exc_error", 15)[14]), (1, 0x1234_5000, 4));
    let interrupt = Injection { vector: 0x60, kind: InjectionKind::External, error_code: None, cr2: None, insn_len: 0 };
    lab.vm.inject(ONE, &interrupt).unwrap();
    lab.run();
    lab.assert_done();
    assert_eq!(lab.words("exc_count", 0x61)[0x60], 1);
}

// --- accesses ---

#[test]
fn a_denied_write_has_no_effect_and_counts_as_executed() {
    let mut lab = guest(
        "mov qword ptr [page + 8], 5\nmov eax, 1\nlock xadd [page + 16], rax\nmov [rip + a], rax\n\
         mov byte ptr [page + 4095], 9\nmov rax, [page + 8]\nmov [rip + b], rax\n",
    );
    let gfn = lab.pa("page").gfn();
    let before = lab.bytes(gfn.pa(0), 4096);
    lab.view = lab.vm.create_view(MemoryAccess::RWX).unwrap();
    lab.vm.set_memory_access(lab.view, gfn, MemoryAccess::RX).unwrap();
    lab.vm.switch_to_view(lab.view).unwrap();
    let mut seen = Vec::new();
    lab.run_with(|_, event| {
        let EventReason::MemoryAccess { pa, va, access, len } = event.reason else { panic!("{event:?}") };
        seen.push((pa.page_offset(), va.unwrap().page_offset(), access, len));
        VmiEventResponse::action(EventAction::Deny)
    });
    lab.assert_done();
    let w = MemoryAccess::W;
    assert_eq!(seen, [(8, 8, w, 8), (16, 16, w, 8), (4095, 4095, w, 1)]);
    assert_eq!(lab.bytes(gfn.pa(0), 4096), before);
    assert_eq!((lab.word("a"), lab.word("b")), (0x9090_9090_9090_9090, 0x9090_9090_9090_9090));
}

#[test]
fn a_denied_write_across_a_page_border_has_no_effect_on_either_page() {
    // The denied page is the second or the first one of the store, and the store is plain, wide or a string's.
    for (insn, first) in [
        ("mov qword ptr [page2 - 3], 5", false),
        ("mov qword ptr [page2 - 3], 5", true),
        // The engine makes two stores of it; one that ends before the denied page is not taken back.
        ("movups [page2 - 7], xmm0", false),
        ("movups [page2 - 7], xmm0", true),
        ("lock xadd [page2 - 1], rax", false),
        ("lock xadd [page2 - 1], rax", true),
        ("lea rdi, [page2 - 2]\nstosq", false),
        ("lea rdi, [page2 - 2]\nstosq", true),
    ] {
        let mut lab = guest(&format!(
            "mov rax, cr4\nor eax, 0x600\nmov cr4, rax\nxorps xmm0, xmm0\nxor eax, eax\n{insn}\nmov qword ptr [rip + a], 1\n"
        ));
        let (page, page2) = (lab.pa("page"), lab.pa("page2"));
        let before = lab.bytes(page, 8192);
        lab.view = lab.vm.create_view(MemoryAccess::RWX).unwrap();
        lab.vm.set_memory_access(lab.view, if first { page.gfn() } else { page2.gfn() }, MemoryAccess::RX).unwrap();
        lab.vm.switch_to_view(lab.view).unwrap();
        let mut events = 0;
        lab.run_with(|lab, event| {
            events += 1;
            assert!(lab.bytes(page, 8192) == before, "{insn}: nothing has been written when the event comes");
            assert!(matches!(event.reason, EventReason::MemoryAccess { access: MemoryAccess::W, .. }), "{event:?}");
            VmiEventResponse::action(EventAction::Deny)
        });
        lab.assert_done();
        assert_eq!((events, lab.word("a")), (1, 1), "{insn}: it counts as executed");
        assert!(lab.bytes(page, 8192) == before, "{insn}, {first}");
    }
}

/// Instructions that the engine stores in parts: what they are, where in two pages they store, and how many bytes.
const IN_PARTS: [(&str, usize, usize); 9] = [
    ("fxsave64 [page + 64]", 64, 416),
    ("fxsave64 [page2 - 64]", 4096 - 64, 416),
    ("fnsave [page + 16]", 16, 108),
    ("fnsave [page2 - 100]", 4096 - 100, 108),
    ("fnstenv [page2 - 12]", 4096 - 12, 28),
    ("movups [page2 - 16], xmm0", 4096 - 16, 16),
    ("movntdq [page + 32], xmm0", 32, 16),
    ("movdqu [page2 - 8], xmm0", 4096 - 8, 16),
    ("lock cmpxchg16b [page2 - 16]", 4096 - 16, 16),
];

/// Runs the instruction, its first page denied if there is an answer to give; both pages afterwards, and what the FPU held.
fn stored_in_parts((insn, at, len): (&str, usize, usize), action: Option<EventAction>) -> (Vec<u8>, u64) {
    let mut lab = guest(&format!(
        "mov rax, cr4\nor eax, 0x600\nmov cr4, rax\nxorps xmm0, xmm0\nfninit\nfld1\nmov rax, [page2 - 16]\nmov rdx, rax\n.global here\nhere: {insn}\ncount a\n\
         fnstsw ax\nmov [rip + b], ax\n"
    ));
    let (page, here) = (lab.pa("page"), lab.va("here"));
    let before = lab.bytes(page, 8192);
    lab.view = lab.vm.create_view(MemoryAccess::RWX).unwrap();
    if action.is_some() {
        lab.vm.set_memory_access(lab.view, page.gfn(), MemoryAccess::RX).unwrap();
    }
    lab.vm.switch_to_view(lab.view).unwrap();
    let mut seen = Vec::new();
    lab.run_with(|lab, event| {
        let EventReason::MemoryAccess { pa, access: MemoryAccess::W, len, .. } = event.reason else { panic!("{event:?}") };
        seen.push((pa.page_offset() as usize, usize::from(len)));
        assert_eq!(event.registers.rip(), here, "{insn}: the event tells of the instruction itself");
        assert!(lab.bytes(page, 8192) == before, "{insn}: nothing has been written when the event comes");
        VmiEventResponse { action: action.unwrap(), view: Some(lab.view), registers: None }
    });
    lab.assert_done();
    assert_eq!(lab.word("a"), 1, "{insn} is passed once");
    assert_eq!(seen, if action.is_some() { vec![(at, len)] } else { vec![] }, "{insn}");
    (lab.bytes(page, 8192), lab.word("b"))
}

#[test]
fn a_store_made_in_parts_is_told_once_and_then_carried_out_whole() {
    for case in IN_PARTS {
        let stepped = stored_in_parts(case, Some(EventAction::FastSingleStep { view: View::DEFAULT }));
        let plain = stored_in_parts(case, None);
        assert!(stepped == plain, "{case:?}: what it stores and leaves is what it does without a view");
        assert!(plain.0[case.1..case.1 + case.2].iter().any(|byte| *byte != 0x90), "{case:?} stores");
    }
}

#[test]
fn a_denied_store_made_in_parts_has_no_effect_on_either_page() {
    for case in IN_PARTS {
        let (pages, _) = stored_in_parts(case, Some(EventAction::Deny));
        assert!(pages.iter().all(|byte| *byte == 0x90), "{case:?}");
    }
}

#[test]
fn an_access_event_tells_address_and_length_also_across_a_page_border() {
    for (insn, expected) in [
        ("movzx eax, byte ptr [page + 3]", (3, MemoryAccess::R, 1)),
        ("mov eax, [page + 5]", (5, MemoryAccess::R, 4)),
        ("mov byte ptr [page + 4095], 1", (4095, MemoryAccess::W, 1)),
        ("mov byte ptr [page + 2], 1", (2, MemoryAccess::W, 1)),
        ("mov word ptr [page + 4095], 1", (4095, MemoryAccess::W, 2)),
        ("mov qword ptr [page - 2], 1", (0, MemoryAccess::W, 6)),
        ("mov qword ptr [page + 4090], 1", (4090, MemoryAccess::W, 8)),
        ("movups [page - 9], xmm0", (0, MemoryAccess::W, 7)),
        // What a load that crosses the border takes from which page is not told.
        ("mov rax, [page - 4]", (0, MemoryAccess::R, 0)),
        ("mov rax, [page + 4092]", (4092, MemoryAccess::R, 0)),
    ] {
        let mut lab = guest(insn);
        let gfn = lab.pa("page").gfn();
        lab.view = lab.vm.create_view(MemoryAccess::RWX).unwrap();
        lab.vm.set_memory_access(lab.view, gfn, MemoryAccess::X).unwrap();
        lab.vm.switch_to_view(lab.view).unwrap();
        let mut seen = Vec::new();
        lab.run_with(|lab, event| {
            seen.push(event.reason);
            VmiEventResponse::action(EventAction::FastSingleStep { view: View::DEFAULT }).in_view(lab.view)
        });
        lab.assert_done();
        let [EventReason::MemoryAccess { pa, access, len, .. }] = seen[..] else { panic!("{insn}: {seen:?}") };
        assert_eq!((pa.gfn(), pa.page_offset(), access), (gfn, expected.0, expected.1), "{insn}: {seen:?}");
        assert!(if expected.2 == 0 { (1..=8).contains(&len) } else { len == expected.2 }, "{insn}: {seen:?}");
    }
}

// --- monitors ---

#[test]
fn registers_given_with_any_answer_are_those_the_guest_goes_on_with() {
    // Finding out the old value of an MSR takes an engine, which must not go on with what it held then.
    for action in [EventAction::Deny, EventAction::Continue, EventAction::FastSingleStep { view: View::DEFAULT }] {
        let mut lab = guest("mov ecx, 0xc0000082\nmov eax, 1\nxor edx, edx\nmov r8d, 5\nwrmsr\nmov [rip + a], r8\n");
        lab.vm.monitor(Monitor::Msr(0xc000_0082), true).unwrap();
        let event = lab.event();
        assert!(matches!(event.reason, EventReason::WriteMsr { .. }), "{event:?}");
        let registers = Some(vmitap::arch::amd64::GpRegisters { r8: 77, ..event.registers.gp });
        lab.vm.respond(event.vcpu, &VmiEventResponse { action, view: None, registers }).unwrap();
        // The step announces it again.
        lab.run_with(|_, _| VmiEventResponse::CONTINUE);
        lab.assert_done();
        assert_eq!(lab.word("a"), 77, "{action:?}");
    }
}

#[test]
fn writes_of_control_registers_and_msrs_and_cpuid_are_announced_and_writes_can_be_denied() {
    const BODY: &str = "mov rax, cr3\nmov cr3, rax\nmov rax, cr4\nor rax, 4\nmov cr4, rax\nmov ecx, 0xc0000082\nmov eax, 0x1111\n\
                        xor edx, edx\nwrmsr\nrdmsr\nmov [rip + a], rax\npush rbx\nmov eax, 0\nxor ecx, ecx\ncpuid\nmov [rip + b], rbx\npop rbx\n\
                        mov rax, cr4\nmov [rip + c], rax\n";
    let mut kinds = Vec::new();
    for deny in [false, true] {
        let mut lab = guest(BODY);
        for monitor in [
            Monitor::ControlRegister(ControlRegister::Cr3),
            Monitor::ControlRegister(ControlRegister::Cr4),
            Monitor::Msr(0xc000_0082),
            Monitor::Cpuid,
        ] {
            lab.vm.monitor(monitor, true).unwrap();
        }
        lab.run_with(|lab, event| {
            kinds.push(event.reason);
            let deny_it = VmiEventResponse::action(EventAction::Deny);
            match event.reason {
                EventReason::Cpuid { .. } => {
                    let refused = lab.vm.respond(event.vcpu, &deny_it);
                    assert!(matches!(refused, Err(VmiError::InvalidArgument { .. })), "{refused:?}");
                }
                _ if deny => return deny_it,
                _ => {}
            }
            VmiEventResponse::CONTINUE
        });
        lab.assert_done();
        assert_eq!(lab.word("a"), if deny { 0 } else { 0x1111 });
        assert_eq!(lab.word("b"), 0x756e_6547, "{:x}", lab.word("b"));
        assert_eq!(lab.word("c"), if deny { 0x620 } else { 0x624 });
    }
    assert_eq!(kinds.len(), 8, "{kinds:?}");
    assert_eq!(kinds[..4], kinds[4..]);
    assert!(matches!(kinds[0], EventReason::WriteControlRegister { register: ControlRegister::Cr3, old, new } if old == new));
    assert_eq!(kinds[1], EventReason::WriteControlRegister { register: ControlRegister::Cr4, old: 0x620, new: 0x624 });
    assert_eq!(kinds[2], EventReason::WriteMsr { msr: 0xc000_0082, old: 0, new: 0x1111 });
    assert_eq!(kinds[3], EventReason::Cpuid { leaf: 0, subleaf: 0, insn_len: 2 });
}

// --- views ---

/// Calls `page` again and again and says in `a` what it gave last; `mov eax, N; ret` is to be there.
const CALLER: &str = "1: call page\nmov [rip + a], rax\ncount b\ncmp qword ptr [rip + c], 0\nje 1b\n";

fn returns(value: u32) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend(value.to_le_bytes());
    code.push(0xc3);
    code
}

fn go_on(lab: &mut Lab) -> u64 {
    let before = lab.word("b");
    while lab.word("b") < before + 3 {
        assert_eq!(lab.vm.wait(Duration::from_millis(1)).unwrap(), Wait::Timeout);
    }
    lab.word("a")
}

#[test]
fn what_is_remapped_and_written_is_what_executes() {
    let mut lab = guest(CALLER);
    let gfn = lab.pa("page").gfn();
    lab.vm.write(gfn.pa(0), &returns(1)).unwrap();
    assert_eq!(go_on(&mut lab), 1);
    let view = lab.vm.create_view(MemoryAccess::RWX).unwrap();
    let frames: Vec<Gfn> = (0..2).map(|_| lab.vm.allocate_frame().unwrap()).collect();
    for (index, frame) in frames.iter().enumerate() {
        lab.vm.write(frame.pa(0), &returns(10 + index as u32)).unwrap();
    }
    lab.vm.remap(view, gfn, Some(frames[0])).unwrap();
    assert_eq!(go_on(&mut lab), 1, "the guest is in another view");
    lab.vm.switch_to_view(view).unwrap();
    assert_eq!((go_on(&mut lab), lab.vm.vcpu_view(ONE).unwrap()), (10, view));
    lab.vm.remap(view, gfn, Some(frames[1])).unwrap();
    assert_eq!(go_on(&mut lab), 11);
    lab.vm.write(frames[1].pa(0), &returns(12)).unwrap();
    assert_eq!(go_on(&mut lab), 12, "a shadow that is written while it runs");
    lab.vm.write(gfn.pa(0), &returns(2)).unwrap();
    assert_eq!(go_on(&mut lab), 12);
    lab.vm.remap(view, gfn, Some(lab.pa("page2").gfn())).unwrap();
    lab.vm.write(lab.pa("page2"), &returns(3)).unwrap();
    assert_eq!(go_on(&mut lab), 3, "another page of the guest's own");
    lab.vm.remap(view, gfn, None).unwrap();
    assert_eq!(go_on(&mut lab), 2);
    lab.vm.switch_to_view(View::DEFAULT).unwrap();
    lab.vm.destroy_view(view).unwrap();
    assert_eq!(go_on(&mut lab), 2);
    // The number is used again, with nothing of the old view in it.
    assert_eq!(lab.vm.create_view(MemoryAccess::RWX).unwrap(), view);
    lab.vm.switch_to_view(view).unwrap();
    assert_eq!(go_on(&mut lab), 2);
    for frame in frames {
        lab.vm.free_frame(frame).unwrap();
    }
    assert_eq!(lab.vm.frames_in_use(), 0);
    lab.set_word("c", 1);
    lab.run();
    lab.assert_done();
}

#[test]
fn rights_that_change_hold_from_the_next_instruction_on() {
    let mut lab = guest(CALLER);
    let gfn = lab.pa("page").gfn();
    lab.vm.write(gfn.pa(0), &returns(1)).unwrap();
    let view = lab.vm.create_view(MemoryAccess::RWX).unwrap();
    lab.vm.switch_to_view(view).unwrap();
    assert_eq!(go_on(&mut lab), 1);
    for _ in 0..3 {
        lab.vm.set_memory_access(view, gfn, MemoryAccess::RW).unwrap();
        let event = lab.event();
        let EventReason::MemoryAccess { pa, access: MemoryAccess::X, .. } = event.reason else { panic!("{event:?}") };
        assert_eq!((pa.gfn(), event.registers.rip()), (gfn, lab.va("page")));
        assert_eq!(lab.vm.memory_access(view, gfn).unwrap(), MemoryAccess::RW);
        lab.vm.set_memory_access_multi(view, &[(gfn, MemoryAccess::X)]).unwrap();
        lab.respond(&event, EventAction::Continue);
        assert_eq!(go_on(&mut lab), 1);
    }
}

// --- bad input ---

#[test]
fn hostile_calls_are_errors_and_change_nothing() {
    let mut lab = guest(CALLER);
    let gfn = lab.pa("page").gfn();
    lab.vm.write(gfn.pa(0), &returns(1)).unwrap();
    let view = lab.vm.create_view(MemoryAccess::RWX).unwrap();
    let frame = lab.vm.allocate_frame().unwrap();
    let gone = View(77);
    let beyond = Gfn(8 << 20 >> 12);
    let vm = &mut lab.vm;
    assert!(vm.switch_to_view(gone).is_err() && vm.destroy_view(gone).is_err() && vm.destroy_view(View::DEFAULT).is_err());
    assert!(matches!(vm.remap(View::DEFAULT, gfn, Some(frame)), Err(VmiError::DefaultView { .. })));
    assert!(vm.remap(gone, gfn, Some(frame)).is_err() && vm.remap(view, gfn, Some(Gfn(frame.0 + 1))).is_err());
    assert!(vm.remap(view, gfn, Some(Gfn(u64::MAX))).is_err() && vm.remap(view, Gfn(u64::MAX), None).is_err());
    assert!(vm.set_memory_access(view, Gfn(1 << 40), MemoryAccess::R).is_err());
    let pages = [(gfn, MemoryAccess::R), (Gfn(beyond.0 + 5), MemoryAccess::R)];
    assert!(vm.set_memory_access_multi(view, &pages).is_err());
    assert_eq!(vm.memory_access(view, gfn).unwrap(), MemoryAccess::RWX);
    assert!(vm.free_frame(gfn).is_err() && vm.free_frame(Gfn(u64::MAX)).is_err() && vm.free_frame(Gfn(frame.0 + 1)).is_err());
    vm.remap(view, gfn, Some(frame)).unwrap();
    assert!(vm.free_frame(frame).is_err(), "it is shown");
    vm.remap(view, gfn, None).unwrap();
    vm.free_frame(frame).unwrap();
    assert!(vm.free_frame(frame).is_err());
    // By the batch: all or none, the lowest first, without a gap.
    let batch: Vec<Gfn> = (frame.0..frame.0 + 3).map(Gfn).collect();
    assert_eq!(vm.allocate_frames(3).unwrap(), batch);
    assert!(vm.allocate_frames(1 << 18).is_err() && vm.allocate_frames(usize::MAX).is_err());
    assert!(vm.free_frames(&[batch[0], batch[0]]).is_err() && vm.free_frames(&[batch[0], gfn]).is_err());
    assert_eq!(vm.frames_in_use(), 3);
    vm.free_frames(&[batch[2], batch[0]]).unwrap();
    assert_eq!(vm.allocate_frames(2).unwrap(), [batch[0], batch[2]]);
    vm.free_frames(&batch).unwrap();
    let mut word = [0; 8];
    assert!(vm.read(frame.pa(0), &mut word).is_err() && vm.read(Pa((8 << 20) - 4), &mut word).is_err());
    assert!(vm.read(Pa(u64::MAX - 3), &mut word).is_err() && vm.write(Pa(u64::MAX), &word).is_err());
    assert!(vm.registers(VcpuId(1)).is_err() && vm.vcpu_view(VcpuId(9)).is_err());
    let answer = VmiEventResponse::CONTINUE;
    assert_eq!(vm.respond(ONE, &answer), Err(VmiError::NoPendingEvent { vcpu: ONE }));
    assert!(vm.respond(VcpuId(5), &answer).is_err());
    // An answer that does not fit leaves the event unanswered.
    lab.tap(&["page"]);
    let event = lab.event();
    assert_eq!(lab.vm.wait(Duration::from_secs(5)).unwrap(), Wait::Idle, "the only vCPU is held");
    for bad in [
        VmiEventResponse::action(EventAction::Deny),
        VmiEventResponse::action(EventAction::Emulate),
        VmiEventResponse::action(EventAction::FastSingleStep { view: gone }),
        VmiEventResponse::CONTINUE.in_view(gone),
    ] {
        assert!(lab.vm.respond(ONE, &bad).is_err(), "{bad:?}");
    }
    lab.respond(&event, EventAction::FastSingleStep { view: View::DEFAULT });
    assert_eq!(lab.vm.respond(ONE, &answer), Err(VmiError::NoPendingEvent { vcpu: ONE }));
    assert!(lab.vm.destroy_view(lab.view).is_err(), "a vCPU is in it");
}

#[test]
fn a_view_that_a_step_still_needs_is_not_destroyed() {
    let mut lab = guest(CALLER);
    let gfn = lab.pa("page").gfn();
    lab.vm.write(gfn.pa(0), &returns(1)).unwrap();
    lab.tap(&["page"]);
    let event = lab.event();
    let other = lab.vm.create_view(MemoryAccess::RWX).unwrap();
    lab.respond(&event, EventAction::FastSingleStep { view: other });
    assert!(lab.vm.destroy_view(other).is_err(), "the step is to happen in it");
    // The view is changed while a step is under way: that is where the vCPU is to be afterwards.
    lab.vm.switch_to_view(View::DEFAULT).unwrap();
    assert_eq!(go_on(&mut lab), 1);
    assert_eq!(lab.vm.vcpu_view(ONE).unwrap(), View::DEFAULT);
    lab.vm.destroy_view(other).unwrap();
}

#[test]
fn options_and_images_out_of_range_are_refused_before_anything_starts() {
    let elf = assemble(&text("nop"));
    let boot = |options: &BootOptions| Lab::boot(&elf, options).map(|_| ());
    let good = options(1, "");
    boot(&good).unwrap();
    for bad in [
        BootOptions { memory: 0, ..good.clone() },
        BootOptions { memory: (8 << 20) + 1, ..good.clone() },
        BootOptions { memory: !0xfff, ..good.clone() },
        BootOptions { vcpus: 0, ..good.clone() },
        BootOptions { vcpus: 9, ..good.clone() },
        BootOptions { command_line: "x".repeat(4096), ..good.clone() },
        BootOptions { command_line: "a\0b".to_owned(), ..good.clone() },
    ] {
        assert!(matches!(boot(&bad), Err(VmiError::InvalidArgument { .. })), "{:?}", bad.memory);
    }
    // The image needs more memory than there is, or lies where the loader's tables are.
    assert!(matches!(boot(&BootOptions { memory: 1 << 20, ..good.clone() }), Err(VmiError::Image { .. })));
    let image = Image::parse("test", &elf).unwrap();
    for pa in [0x1000, 0x7f000, 0, (8 << 20) - PAGE_SIZE, u64::MAX - PAGE_SIZE] {
        let mut moved = image.clone();
        moved.segments[0].pa = Pa(pa);
        moved.segments.truncate(1);
        let refused = EmuDriver::boot(&library(), "test", &moved, &good);
        assert!(matches!(refused, Err(VmiError::Image { .. })), "{pa:#x}");
    }
}

// --- opening by name ---

#[test]
fn targets_are_told_by_their_names() {
    assert_eq!(Target::parse("demo").unwrap(), Target::Demo);
    assert_eq!(Target::parse("emu:/a:b").unwrap(), Target::Emu(PathBuf::from("/a:b")));
    assert_eq!(Target::parse("xen:web server").unwrap(), Target::Xen("web server".to_owned()));
    assert_eq!(Target::parse("dump:/a:b").unwrap(), Target::Dump(PathBuf::from("/a:b")));
    for (bad, part) in [("", "kind"), ("demo:", "kind"), ("emu:", "path"), ("xen:", "number"), ("dump:", "path"), ("/x", "kind")]
    {
        let Err(VmiError::Attach { target, reason, hint }) = Target::parse(bad) else { panic!("{bad}") };
        assert!(target == bad && reason.contains(part) && hint.contains("\"emu:PATH\""), "{bad}: {reason}; {hint}");
    }
}

#[test]
fn opening_says_what_is_wrong_and_what_to_do() {
    let with = |libunicorn: Option<PathBuf>| OpenOptions { libunicorn, ..OpenOptions::default() };
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let no_elf = folder.join("no-elf");
    std::fs::write(&no_elf, "text").unwrap();
    let missing = open(&Target::Emu(folder.join("nothing-here")), &with(None));
    assert!(matches!(missing, Err(VmiError::Attach { .. })), "{missing:?}");
    let bad = open(&Target::Emu(no_elf.clone()), &with(None));
    assert!(matches!(bad, Err(VmiError::Image { .. })), "{bad:?}");
    for library in [folder.join("nothing-here"), no_elf, PathBuf::new()] {
        let Err(VmiError::Attach { hint, .. }) = open(&Target::Demo, &with(Some(library.clone()))) else { panic!("{library:?}") };
        assert!(hint.contains("pip install unicorn"));
    }
    let refused = open(&Target::Demo, &OpenOptions { vcpus: Some(9), ..with(None) });
    assert!(matches!(refused, Err(VmiError::InvalidArgument { what: "vcpus", .. })));
    let mut demo =
        open(&Target::Demo, &OpenOptions { command_line: "rounds=1 check=0".into(), ..with(Some(library())) }).unwrap();
    assert!(demo.symbols.resolve("open_file").is_ok());
    assert_eq!((demo.driver.info().name.as_str(), demo.driver.info().driver), ("demo", "emu"));
    assert!(demo.driver.version().starts_with("unicorn 2."));
    while demo.driver.wait(Duration::from_secs(1)).unwrap() != Wait::Idle {}
    let console = String::from_utf8(demo.driver.console().unwrap()).unwrap();
    assert!(console.contains("not checked"), "{console}");
}
