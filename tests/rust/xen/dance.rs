//! One hit after the other: how each is carried out, what it costs, and what the guest sees of it.

use std::time::Duration;

use vmitap::arch::amd64::{ControlRegister, GpRegisters};
use vmitap::driver::xen::Stepping;
use vmitap::driver::{Monitor, VmiEvents, VmiInject, VmiProtection, VmiRegisters, VmiViews, VmiWrite, Wait};
use vmitap::event::{EventAction, EventReason, VmiEventResponse};
use vmitap::{Gfn, MemoryAccess, Pa, Va, VcpuId, View, VmiError};
use xen_sys::fake::{Fake, Kind, Reg};

use super::{
    ALTP2M, CODE, DENY, EMULATE, FAST, INSN_DATA, NOWRITE, PAUSED, SET_REGS, STACK, TOGGLE, Tapped, is_untouched, tapped,
    tapped_with,
};

const XEN: Kind = Kind::new(7, 17);
const CLEAN: View = View::DEFAULT;
/// push rbp; nop
const PUSH: &[u8] = &[0x55, 0x90];
/// mov al, [rbx]
const READ: &[u8] = &[0x8a, 0x03, 0x90];
/// mov [rbx], al
const WRITE: &[u8] = &[0x88, 0x03, 0x90];
/// rep stosb
const FILL: &[u8] = &[0xf3, 0xaa, 0x90];

fn calls_of(fake: &Fake, functions: &[&str]) -> i64 {
    functions.iter().map(|function| fake.calls(function)).sum()
}

/// Every function that is a hypercall, but for the notify.
const HYPERCALLS: &[&str] = &[
    "xc_domain_pause",
    "xc_domain_unpause",
    "xc_altp2m_set_mem_access",
    "xc_altp2m_set_mem_access_multi",
    "xc_altp2m_get_mem_access",
    "xc_altp2m_change_gfn",
    "xc_altp2m_switch_to_view",
    "xc_altp2m_get_vcpu_p2m_idx",
    "xc_domain_getinfolist",
    "xc_domain_hvm_getcontext",
    "xc_domain_hvm_getcontext_partial",
    "xc_domain_populate_physmap_exact",
    "xc_domain_decrease_reservation_exact",
    "xc_domain_setmaxmem",
    "xc_domain_debug_control",
    "xenforeignmemory_map",
    "xendevicemodel_inject_event",
];

#[test]
fn a_hit_is_one_message_each_way_and_one_hypercall_the_notify() {
    for kind in Kind::ALL {
        let mut lab = tapped(kind, PUSH);
        for round in 1..=20 {
            lab.fake.set_reg(0, Reg::Rip, CODE);
            lab.fake.run(0, 1);
            let event = lab.event();
            assert_eq!(event.reason, EventReason::Breakpoint { gfn: Gfn(CODE >> 12), insn_len: 1 });
            assert_eq!((event.view, event.registers.rip()), (Some(lab.view), Va(CODE)));
            if round == 2 {
                // The first hit has mapped the page tables.
                lab.fake.forget_calls();
            }
            lab.step();
            lab.fake.run(0, 1);
            assert_eq!(lab.fake.reg(0, Reg::Rip), CODE + 1);
        }
        assert_eq!(lab.fake.calls("xenevtchn_notify"), 19);
        assert_eq!(calls_of(&lab.fake, HYPERCALLS), 0);
        assert_eq!((lab.fake.state("uds", 0), lab.fake.state("int3s", 0)), (0, 0));
    }
}

#[test]
fn a_known_instruction_is_emulated_from_its_original_bytes() {
    let mut lab = tapped(XEN, PUSH);
    lab.fake.set_reg(0, Reg::Rbp, 0xabcd);
    lab.fake.run(0, 1);
    lab.event();
    lab.step();
    let answer = lab.last_answer();
    assert_eq!(answer.flags, PAUSED | ALTP2M | EMULATE | INSN_DATA);
    assert_eq!((answer.data[0], answer.data[1], answer.view), (0x55, 0x90, lab.view.0));
    lab.fake.run(0, 1);
    assert_eq!((lab.fake.reg(0, Reg::Rsp), lab.fake.byte(0, STACK as i64 - 8)), (STACK - 8, 0xcd));
    assert_eq!(lab.view_of_vcpu(), i64::from(lab.view.0));
}

#[test]
fn any_other_instruction_is_stepped_fast_in_the_default_view() {
    let mut lab = tapped(XEN, &[0xfa, 0x90]);
    lab.fake.run(0, 1);
    lab.event();
    lab.step();
    let answer = lab.last_answer();
    assert_eq!(answer.flags, PAUSED | ALTP2M | FAST);
    assert_eq!((answer.view, answer.u[0] as u16), (0, lab.view.0));
    lab.fake.run(0, 1);
    assert_eq!((lab.view_of_vcpu(), lab.fake.state("single_step", 0)), (i64::from(lab.view.0), 0));
    assert!(lab.has_no_event());
}

#[test]
fn new_registers_never_share_the_answer_with_instruction_bytes() {
    let mut lab = tapped(XEN, PUSH);
    lab.fake.run(0, 1);
    let event = lab.event();
    let gp = GpRegisters { rax: 5, ..event.registers.gp };
    let action = EventAction::FastSingleStep { view: CLEAN };
    let response = VmiEventResponse { action, view: Some(lab.view), registers: Some(gp) };
    lab.vmi.driver_mut().respond(VcpuId(0), &response).unwrap();
    assert_eq!(lab.last_answer().flags, PAUSED | ALTP2M | FAST | SET_REGS);
    lab.fake.run(0, 1);
    assert_eq!((lab.fake.reg(0, Reg::Rax), lab.fake.reg(0, Reg::Rip)), (5, CODE + 1));
}

#[test]
fn two_flags_that_share_a_union_are_never_sent_together() {
    for stepping in [Stepping::Auto, Stepping::Fast, Stepping::Toggle] {
        for code in [PUSH, READ, WRITE, FILL, &[0xfa, 0x90]] {
            let mut lab = tapped_with(XEN, code, stepping, |fake| {
                fake.set_reg(0, Reg::Rbx, CODE);
                fake.set_reg(0, Reg::Rdi, CODE + 0x800);
                fake.set_reg(0, Reg::Rcx, 3);
            });
            for _ in 0..20 {
                lab.fake.run(0, 4);
                if let Wait::Event(event) = lab.vmi.driver_mut().wait(Duration::ZERO).unwrap() {
                    let action = match event.reason {
                        EventReason::SingleStep { .. } => EventAction::Continue,
                        EventReason::MemoryAccess { access: MemoryAccess::W, .. } => EventAction::SingleStep { view: CLEAN },
                        _ => EventAction::FastSingleStep { view: CLEAN },
                    };
                    lab.answer(action);
                }
            }
            for answer in lab.fake.answers() {
                let has = |flag: u32| answer.flags & flag != 0;
                assert!(!(has(FAST) && (has(EMULATE) || has(TOGGLE))), "{:#x}", answer.flags);
                assert!(!(has(SET_REGS) && has(INSN_DATA)), "{:#x}", answer.flags);
            }
            assert_eq!(lab.fake.state("uds", 0), 0);
        }
    }
}

#[test]
fn each_way_of_stepping_can_be_asked_for() {
    for (stepping, flag, answers) in [(Stepping::Auto, INSN_DATA, 1), (Stepping::Fast, FAST, 1), (Stepping::Toggle, TOGGLE, 2)] {
        let mut lab = tapped_with(XEN, PUSH, stepping, |_| {});
        lab.fake.run(0, 1);
        lab.event();
        lab.step();
        assert_eq!(lab.last_answer().flags & flag, flag);
        lab.fake.run(0, 1);
        assert!(lab.has_no_event(), "{stepping:?}");
        assert_eq!((lab.fake.answers().len(), lab.view_of_vcpu()), (answers, i64::from(lab.view.0)));
        assert_eq!((lab.fake.state("single_step", 0), lab.fake.reg(0, Reg::Rip)), (0, CODE + 1));
    }
}

/// Taps the last instruction of a page that is read, so that the read itself is not tapped.
fn reading(code: &[u8], prepare: impl FnOnce(&Fake)) -> Tapped {
    let mut lab = tapped_with(XEN, code, Stepping::Auto, prepare);
    lab.fake.write(CODE + 0x1000, code);
    lab.fake.set_reg(0, Reg::Rip, CODE + 0x1000);
    lab.fake.set_reg(0, Reg::Rbx, CODE);
    assert!(lab.has_no_event());
    lab
}

#[test]
fn a_read_of_a_hidden_page_is_emulated_and_gets_the_original() {
    let mut lab = reading(READ, |_| {});
    lab.fake.run(0, 1);
    let event = lab.event();
    let EventReason::MemoryAccess { pa, va, access, .. } = event.reason else { panic!("{event:?}") };
    assert_eq!((pa, va, access), (Pa(CODE), Some(Va(CODE)), MemoryAccess::R));
    lab.answer(EventAction::Emulate);
    assert_eq!(lab.last_answer().flags, PAUSED | ALTP2M | EMULATE);
    lab.fake.run(0, 1);
    assert_eq!((lab.fake.reg(0, Reg::Rax) & 0xff, lab.fake.byte(lab.view.0.into(), CODE as i64)), (0x8a, 0xcc));
    assert_eq!(lab.fake.reg(0, Reg::Rip), CODE + 0x1002);
}

#[test]
fn what_the_emulator_does_not_know_is_stepped_by_the_processor() {
    let mut lab = reading(READ, |_| {});
    lab.fake.lose_emulator(1);
    lab.fake.run(0, 1);
    lab.event();
    lab.answer(EventAction::Emulate);
    lab.fake.run(0, 1);
    assert!(lab.has_no_event());
    assert_eq!(lab.last_answer().flags, PAUSED | ALTP2M | FAST);
    lab.fake.run(0, 1);
    assert_eq!((lab.fake.reg(0, Reg::Rax) & 0xff, lab.fake.state("uds", 0)), (0x8a, 0));
    assert_eq!((lab.fake.reg(0, Reg::Rip), lab.view_of_vcpu()), (CODE + 0x1002, i64::from(lab.view.0)));
}

#[test]
fn without_the_monitor_for_unknown_instructions_the_emulator_is_not_used() {
    let mut lab = reading(READ, |fake| fake.set("emul_monitor", 0));
    lab.fake.run(0, 1);
    lab.event();
    lab.answer(EventAction::Emulate);
    assert_eq!(lab.last_answer().flags, PAUSED | ALTP2M | FAST);
    lab.fake.run(0, 1);
    assert_eq!(lab.fake.reg(0, Reg::Rax) & 0xff, 0x8a);
}

#[test]
fn a_write_that_is_denied_is_emulated_without_its_effect() {
    let mut lab = reading(WRITE, |_| {});
    lab.fake.set_reg(0, Reg::Rax, 0x77);
    lab.fake.run(0, 1);
    lab.event();
    lab.answer(EventAction::Deny);
    assert_eq!(lab.last_answer().flags, PAUSED | ALTP2M | EMULATE | NOWRITE);
    lab.fake.run(0, 1);
    assert_eq!((lab.fake.reg(0, Reg::Rip), lab.fake.byte(0, CODE as i64)), (CODE + 0x1002, 0x88));
}

#[test]
fn a_step_that_reports_ends_with_an_event_in_the_view_of_the_step() {
    let mut lab = reading(WRITE, |_| {});
    lab.fake.set_reg(0, Reg::Rax, 0x77);
    lab.fake.run(0, 1);
    lab.event();
    lab.answer(EventAction::SingleStep { view: CLEAN });
    lab.fake.run(0, 1);
    let event = lab.event();
    assert_eq!((event.reason, event.view), (EventReason::SingleStep { gfn: Some(Gfn(9)) }, Some(CLEAN)));
    assert_eq!(lab.fake.byte(0, CODE as i64), 0x77);
    // Another one, without switching the flag off and on.
    lab.answer(EventAction::SingleStep { view: lab.view });
    assert_eq!(lab.last_answer().flags & TOGGLE, 0);
    lab.fake.run(0, 1);
    lab.event();
    lab.answer(EventAction::Continue);
    assert_eq!((lab.fake.state("single_step", 0), lab.view_of_vcpu()), (0, i64::from(lab.view.0)));
}

#[test]
fn a_repeated_string_instruction_is_one_hit_and_carried_to_its_end() {
    for report in [false, true] {
        let mut lab = tapped_with(XEN, FILL, Stepping::Auto, |fake| {
            fake.set_reg(0, Reg::Rdi, 0xa000);
            fake.set_reg(0, Reg::Rcx, 50);
            fake.set_reg(0, Reg::Rax, 0x11);
        });
        lab.fake.run(0, 1);
        lab.event();
        lab.answer(if report { EventAction::SingleStep { view: CLEAN } } else { EventAction::FastSingleStep { view: CLEAN } });
        for _ in 0..50 {
            lab.fake.run(0, 1);
            if let Wait::Event(event) = lab.vmi.driver_mut().wait(Duration::ZERO).unwrap() {
                assert!(report && event.registers.gp.rcx == 0, "{event:?}");
                lab.answer(EventAction::Continue);
            }
        }
        assert_eq!((lab.fake.reg(0, Reg::Rcx), lab.fake.reg(0, Reg::Rip), lab.fake.byte(0, 0xa031)), (0, CODE + 2, 0x11));
        assert_eq!((lab.view_of_vcpu(), lab.fake.state("single_step", 0)), (i64::from(lab.view.0), 0));
    }
}

#[test]
fn a_store_to_a_tapped_page_by_a_tapped_instruction_is_told_before_it_happens() {
    // mov [rbx], al with RBX on the instruction's own page.
    let mut lab = tapped_with(XEN, WRITE, Stepping::Auto, |fake| {
        fake.set_reg(0, Reg::Rbx, CODE + 0x10);
        fake.set_reg(0, Reg::Rax, 0x42);
    });
    lab.fake.run(0, 1);
    lab.event();
    lab.step();
    assert_eq!(lab.fake.answers(), [], "the vCPU is still held");
    let event = lab.event();
    let EventReason::MemoryAccess { pa, va, access, len } = event.reason else { panic!("{event:?}") };
    assert_eq!((pa, va, access, len), (Pa(CODE + 0x10), Some(Va(CODE + 0x10)), MemoryAccess::W, 1));
    lab.answer(EventAction::SingleStep { view: CLEAN });
    lab.fake.run(0, 1);
    assert!(matches!(lab.event().reason, EventReason::SingleStep { .. }));
    lab.answer(EventAction::Continue);
    assert_eq!((lab.fake.byte(0, CODE as i64 + 0x10), lab.fake.answers().len()), (0x42, 2));
}

#[test]
fn a_store_elsewhere_is_not_told() {
    let mut lab = tapped_with(XEN, WRITE, Stepping::Auto, |fake| fake.set_reg(0, Reg::Rbx, 0xb000));
    lab.fake.run(0, 1);
    lab.event();
    lab.step();
    assert!(lab.has_no_event());
    assert_eq!(lab.fake.answers().len(), 1);
}

#[test]
fn what_xsave_may_reach_is_told_of_each_page_without_a_length() {
    // xsave [rdi], far before the end of its page
    let mut lab = tapped_with(XEN, &[0x0f, 0xae, 0x27, 0x90], Stepping::Auto, |fake| fake.set_reg(0, Reg::Rdi, 0xb800));
    for page in [0xb, 0xc] {
        lab.vmi.driver_mut().set_memory_access(lab.view, Gfn(page), MemoryAccess::R | MemoryAccess::X).unwrap();
    }
    lab.fake.run(0, 1);
    lab.event();
    for at in [0xb800, 0xc000] {
        lab.step();
        let event = lab.event();
        let reason = EventReason::MemoryAccess { pa: Pa(at), va: Some(Va(at)), access: MemoryAccess::W, len: 0 };
        assert_eq!(event.reason, reason);
    }
    lab.step();
    assert!(lab.has_no_event());
}

#[test]
fn the_guests_own_int3_is_delivered_to_it() {
    let mut lab = tapped(XEN, &[0x90, 0xcc, 0x90]);
    lab.fake.set_reg(0, Reg::Rip, CODE + 1);
    lab.fake.run(0, 1);
    lab.event();
    lab.answer(EventAction::Reinject);
    assert_eq!((lab.fake.state("int3s", 0), lab.fake.reg(0, Reg::Rip)), (1, CODE + 2));
    // What cannot be injected stays unanswered.
    lab.fake.set_reg(0, Reg::Rip, CODE + 1);
    lab.fake.run(0, 1);
    lab.event();
    lab.fake.fail("xendevicemodel_inject_event", 1, 16);
    let response = VmiEventResponse::action(EventAction::Reinject);
    let failed = lab.vmi.driver_mut().respond(VcpuId(0), &response);
    assert!(matches!(failed, Err(VmiError::Driver { op: "xendevicemodel_inject_event", errno: 16, .. })), "{failed:?}");
    lab.answer(EventAction::Reinject);
    assert_eq!(lab.fake.state("int3s", 0), 2);
}

#[test]
fn an_int3_of_the_guests_own_under_a_tap_is_stepped_into_and_then_delivered() {
    let mut lab = tapped(XEN, &[0xcc, 0x90]);
    lab.fake.run(0, 1);
    lab.event();
    lab.step();
    // Executed in the default view it raises an event there, in the middle of the step.
    lab.fake.run(0, 1);
    let event = lab.event();
    assert_eq!(event.view, Some(CLEAN));
    lab.answer(EventAction::Reinject);
    assert_eq!(lab.fake.state("int3s", 0), 1);
    lab.fake.run(0, 1);
    assert_eq!((lab.view_of_vcpu(), lab.fake.state("single_step", 0)), (i64::from(lab.view.0), 0));
}

#[test]
fn a_breakpoint_that_was_taken_out_while_its_event_was_on_the_way_is_not_stepped_over() {
    let mut lab = tapped(XEN, PUSH);
    lab.fake.run(0, 1);
    lab.controller.clear(&mut lab.vmi).unwrap();
    lab.event();
    lab.step();
    assert_eq!(lab.last_answer().flags, PAUSED | ALTP2M);
    lab.fake.run(0, 1);
    assert_eq!((lab.fake.reg(0, Reg::Rip), lab.fake.reg(0, Reg::Rsp)), (CODE + 1, STACK - 8));
    // Where the guest has an INT3 of its own, going on would only raise it again.
    lab.fake.write(CODE, &[0xcc]);
    lab.fake.set_reg(0, Reg::Rip, CODE);
    lab.fake.run(0, 1);
    lab.event();
    lab.step();
    assert_eq!(lab.last_answer().flags & FAST, FAST);
}

#[test]
fn no_page_is_shown_anew_before_the_emulator_has_executed_what_it_was_given() {
    let mut lab = tapped(XEN, PUSH);
    lab.fake.run(0, 1);
    lab.event();
    lab.step();
    // The vCPU has not run since.
    lab.controller.clear(&mut lab.vmi).unwrap();
    assert_eq!((lab.fake.state("misplaced", 0), lab.fake.reg(0, Reg::Rip)), (0, CODE + 1));
}

#[test]
fn a_vcpu_that_is_moved_in_the_middle_of_a_step_ends_up_where_it_was_moved() {
    let mut lab = tapped(XEN, &[0xcc, 0x90]);
    let other = lab.vmi.driver_mut().create_view(MemoryAccess::RWX).unwrap();
    lab.fake.run(0, 1);
    lab.event();
    lab.step();
    lab.fake.run(0, 1);
    lab.event();
    lab.vmi.driver_mut().switch_to_view(other).unwrap();
    lab.vmi.driver_mut().respond(VcpuId(0), &VmiEventResponse::action(EventAction::Reinject)).unwrap();
    lab.fake.run(0, 2);
    assert_eq!((lab.view_of_vcpu(), lab.fake.state("int3s", 0)), (i64::from(other.0), 1));
}

#[test]
fn a_step_that_is_under_way_does_not_bring_a_vcpu_back_into_a_view_it_was_moved_out_of() {
    let mut lab = tapped(XEN, &[0xfa, 0x90]);
    lab.fake.run(0, 1);
    lab.event();
    lab.step();
    // From now on the guest runs while the driver looks at it.
    lab.fake.automatic(1);
    lab.vmi.driver_mut().switch_to_view(CLEAN).unwrap();
    lab.fake.automatic(0);
    lab.fake.run(0, 4);
    assert_eq!(lab.view_of_vcpu(), 0);
    lab.controller.clear(&mut lab.vmi).unwrap();
    lab.vmi.driver_mut().destroy_view(lab.view).unwrap();
}

#[test]
fn cpuid_is_told_from_before_and_carried_out_and_cannot_be_denied() {
    let mut lab = tapped(XEN, &[0x90, 0x0f, 0xa2, 0x90]);
    lab.vmi.driver_mut().monitor(Monitor::Cpuid, true).unwrap();
    lab.fake.set_reg(0, Reg::Rip, CODE + 1);
    lab.fake.set_reg(0, Reg::Rax, 0);
    lab.fake.set_reg(0, Reg::Rcx, 3);
    lab.fake.run(0, 1);
    let event = lab.event();
    assert_eq!(event.reason, EventReason::Cpuid { leaf: 0, subleaf: 3, insn_len: 2 });
    assert_eq!((event.registers.gp.rax, event.registers.gp.rcx), (0, 3));
    let refused = lab.vmi.driver_mut().respond(VcpuId(0), &VmiEventResponse::action(EventAction::Deny));
    assert!(matches!(refused, Err(VmiError::InvalidArgument { .. })), "{refused:?}");
    lab.answer(EventAction::Continue);
    assert_eq!((lab.fake.reg(0, Reg::Rax), lab.fake.reg(0, Reg::Rip)), (0x16, CODE + 3));
}

#[test]
fn a_caller_who_moves_rip_has_answered_cpuid_or_left_a_register_write_out() {
    let mut lab = tapped(XEN, &[0x90, 0x0f, 0xa2, 0x0f, 0x22, 0xc0, 0x90]);
    lab.vmi.driver_mut().monitor(Monitor::Cpuid, true).unwrap();
    lab.fake.set_reg(0, Reg::Rip, CODE + 1);
    lab.fake.run(0, 1);
    let event = lab.event();
    let gp = GpRegisters { rax: 7, rdx: 8, rip: CODE + 3, ..event.registers.gp };
    let answer = VmiEventResponse { registers: Some(gp), ..VmiEventResponse::CONTINUE };
    lab.vmi.driver_mut().respond(VcpuId(0), &answer).unwrap();
    assert_eq!([Reg::Rax, Reg::Rdx, Reg::Rip].map(|register| lab.fake.reg(0, register)), [7, 8, CODE + 3]);
    // MOV CR0, RAX at the next address, three bytes long: elsewhere it is not done, and where it is the registers are those behind it.
    for (rip, denies, then) in [(CODE + 3, false, CODE + 6), (CODE, true, CODE)] {
        lab.fake.set_reg(0, Reg::Rip, CODE + 3);
        lab.fake.push(0, 4, 1);
        let event = lab.event();
        assert_eq!(event.registers.gp.rip, CODE + 3);
        // Xen is past it by the time the answer comes.
        lab.fake.set_reg(0, Reg::Rip, CODE + 6);
        let gp = GpRegisters { rbx: 9, rip, ..event.registers.gp };
        lab.vmi.driver_mut().respond(VcpuId(0), &VmiEventResponse { registers: Some(gp), ..VmiEventResponse::CONTINUE }).unwrap();
        assert_eq!(lab.last_answer().flags & DENY != 0, denies);
        assert_eq!((lab.fake.reg(0, Reg::Rbx), lab.fake.reg(0, Reg::Rip)), (9, then));
    }
}

#[test]
fn a_step_from_an_announced_event_ends_behind_its_instruction_without_the_guest_running() {
    // cpuid; then what stands for a request of the guest
    let mut lab = tapped(XEN, &[0x90, 0x0f, 0xa2, 0x90, 0x90]);
    for monitor in [Monitor::Cpuid, Monitor::GuestRequest] {
        lab.vmi.driver_mut().monitor(monitor, true).unwrap();
    }
    let step = EventAction::SingleStep { view: lab.view };
    lab.fake.set_reg(0, Reg::Rip, CODE + 1);
    lab.fake.set_reg(0, Reg::Rax, 0);
    lab.fake.run(0, 1);
    lab.event();
    lab.answer(step);
    let event = lab.event();
    assert!(matches!(event.reason, EventReason::SingleStep { gfn: Some(gfn) } if gfn == Pa(CODE).gfn()), "{event:?}");
    assert_eq!((event.view, event.registers.gp.rip, event.registers.gp.rax), (Some(lab.view), CODE + 3, 0x16));
    assert_eq!(lab.fake.answers().len(), 0, "the request is still to be answered");
    lab.answer(EventAction::Continue);
    assert_eq!((lab.fake.reg(0, Reg::Rip), lab.fake.reg(0, Reg::Rax), lab.fake.answers().len()), (CODE + 3, 0x16, 1));
    // Registers that are set while a request is held do not bring the vCPU back in front of it.
    lab.fake.push(0, 8, 1);
    let event = lab.event();
    lab.fake.set_reg(0, Reg::Rip, CODE + 4);
    let gp = GpRegisters { rax: 5, ..event.registers.gp };
    lab.vmi.driver_mut().respond(VcpuId(0), &VmiEventResponse { registers: Some(gp), ..VmiEventResponse::CONTINUE }).unwrap();
    assert_eq!((lab.fake.reg(0, Reg::Rip), lab.fake.reg(0, Reg::Rax)), (CODE + 4, 5));
}

#[test]
fn a_denial_is_not_lost_where_a_fast_step_is_under_way() {
    let mut lab = tapped(XEN, &[0x0f, 0x22, 0xc0, 0x90]);
    lab.vmi.driver_mut().monitor(Monitor::ControlRegister(ControlRegister::Cr0), true).unwrap();
    lab.fake.run(0, 1);
    lab.event();
    lab.step();
    // The register is written in the middle of the step, in the default view.
    lab.fake.push(0, 4, 1);
    let event = lab.event();
    assert!(matches!(event.reason, EventReason::WriteControlRegister { .. }), "{event:?}");
    let deny = VmiEventResponse::action(EventAction::Deny).in_view(lab.view);
    lab.vmi.driver_mut().respond(VcpuId(0), &deny).unwrap();
    let answer = lab.last_answer();
    assert_eq!((answer.flags & (DENY | FAST), answer.u[0]), (DENY, 0), "{answer:?}");
    assert_eq!(lab.fake.state("single_step", 0), 0);
}

#[test]
fn a_register_write_waits_for_its_answer_and_can_be_denied() {
    let mut lab = tapped(XEN, PUSH);
    for register in [ControlRegister::Cr0, ControlRegister::Cr3] {
        lab.vmi.driver_mut().monitor(Monitor::ControlRegister(register), true).unwrap();
    }
    assert_eq!((lab.fake.calls("xc_domctl"), lab.fake.calls("xc_monitor_write_ctrlreg")), (1, 2));
    // WRITE_CTRLREG, of register 0.
    lab.fake.push(0, 4, 1);
    let event = lab.event();
    assert_eq!(event.reason, EventReason::WriteControlRegister { register: ControlRegister::Cr0, old: 0, new: 0 });
    lab.answer(EventAction::Deny);
    assert_eq!(lab.last_answer().flags, PAUSED | ALTP2M | DENY);
}

#[test]
fn registers_of_a_held_vcpu_go_with_its_answer_and_the_rest_is_loaded() {
    let mut lab = tapped_with(XEN, PUSH, Stepping::Auto, |fake| fake.set("vcpus", 2));
    lab.fake.run(0, 1);
    lab.event();
    let mut registers = lab.vmi.driver().registers(VcpuId(0)).unwrap();
    registers.gp.rax = 0x99;
    lab.vmi.driver_mut().set_registers(VcpuId(0), &registers).unwrap();
    assert_eq!(lab.fake.calls("xc_domain_hvm_setcontext"), 0);
    assert_eq!(lab.vmi.driver().registers(VcpuId(0)).unwrap().gp.rax, 0x99);
    lab.answer(EventAction::Continue);
    assert_eq!(lab.fake.reg(0, Reg::Rax), 0x99);
    // Of a vCPU that runs all are loaded, and none goes down.
    let mut registers = lab.vmi.driver().registers(VcpuId(1)).unwrap();
    registers.gp.rip = 0x1234;
    registers.kernel_gs_base = 0x5678;
    lab.vmi.driver_mut().set_registers(VcpuId(1), &registers).unwrap();
    assert_eq!(lab.fake.reg(1, Reg::Rip), 0x1234);
    assert_eq!(lab.vmi.driver().registers(VcpuId(1)).unwrap(), registers);
    assert_eq!([0, 1].map(|vcpu| lab.fake.state("down", vcpu)), [0, 0]);
    assert_eq!(lab.fake.state("pauses", 0), 0);
}

#[test]
fn a_wait_ends_when_it_is_woken_and_when_its_time_is_over() {
    let mut lab = tapped(XEN, PUSH);
    let begin = std::time::Instant::now();
    assert_eq!(lab.vmi.driver_mut().wait(Duration::from_millis(30)).unwrap(), Wait::Timeout);
    assert!(begin.elapsed() >= Duration::from_millis(30));
    let waker = lab.vmi.driver().waker();
    let woken = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        waker.wake();
    });
    let begin = std::time::Instant::now();
    assert_eq!(lab.vmi.driver_mut().wait(Duration::from_secs(20)).unwrap(), Wait::Timeout);
    assert!(begin.elapsed() < Duration::from_secs(10));
    woken.join().unwrap();
    // Woken once, it waits again.
    let begin = std::time::Instant::now();
    lab.vmi.driver_mut().wait(Duration::from_millis(30)).unwrap();
    assert!(begin.elapsed() >= Duration::from_millis(30));
}

#[test]
fn a_domain_that_goes_away_is_noticed_and_nothing_more_is_done_to_it() {
    let mut lab = tapped(XEN, PUSH);
    lab.fake.set("gone", 1);
    let gone = (0..20).find_map(|_| lab.vmi.driver_mut().wait(Duration::from_millis(100)).err());
    assert!(matches!(gone, Some(VmiError::DomainGone { .. })), "{gone:?}");
    let write = lab.vmi.driver_mut().write(Pa(0x9000), &[1]);
    assert!(matches!(write, Err(VmiError::DomainGone { .. })));
    drop(lab.vmi);
    assert_eq!(lab.fake.state("maps", 0), 0, "a mapping would keep the domain from going");
}

#[test]
fn whatever_is_in_flight_at_the_end_is_answered() {
    for own in [false, true] {
        let mut lab = tapped(XEN, if own { &[0xcc, 0x90] } else { PUSH });
        lab.fake.run(0, 1);
        if own {
            lab.event();
        }
        let mut vmi = lab.vmi;
        lab.controller.clear(&mut vmi).unwrap();
        drop(vmi);
        is_untouched(&lab.fake);
        assert_eq!((lab.fake.answers().len(), lab.fake.state("int3s", 0)), (1, i64::from(own)));
        lab.fake.run(0, 1);
        assert_eq!(lab.fake.reg(0, Reg::Rip), if own { CODE + 2 } else { CODE + 1 });
    }
}

#[test]
fn steps_and_emulations_that_are_under_way_at_the_end_do_no_harm() {
    for stepping in [Stepping::Auto, Stepping::Fast, Stepping::Toggle] {
        // push rbp; pop rbp; jmp
        let mut lab = tapped_with(XEN, &[0x55, 0x5d, 0xeb, 0xfc], stepping, |_| {});
        lab.fake.run(0, 1);
        lab.event();
        lab.step();
        lab.fake.automatic(1);
        drop(lab.vmi);
        lab.fake.automatic(0);
        is_untouched(&lab.fake);
        lab.fake.set_reg(0, Reg::Rip, CODE);
        assert_eq!(lab.fake.run(0, 2), 2);
        assert_eq!(lab.fake.reg(0, Reg::Rip), CODE + 2);
    }
}

#[test]
fn an_exception_is_injected_by_a_call_of_its_own() {
    let mut lab = tapped(XEN, PUSH);
    let injection = vmitap::arch::amd64::Injection {
        vector: 14,
        kind: vmitap::arch::amd64::InjectionKind::Exception,
        error_code: Some(2),
        cr2: Some(0x1000),
        insn_len: 0,
    };
    lab.vmi.driver_mut().inject(VcpuId(0), &injection).unwrap();
    assert_eq!(lab.fake.state("injected", 0), 1);
    assert!(matches!(lab.vmi.driver_mut().inject(VcpuId(9), &injection), Err(VmiError::VcpuNotFound { .. })));
}

#[test]
fn a_vcpu_is_said_to_be_where_it_comes_back_to() {
    let mut lab = tapped(XEN, &[0xfa, 0x90]);
    lab.fake.run(0, 1);
    lab.event();
    assert_eq!(lab.vmi.driver().vcpu_view(VcpuId(0)).unwrap(), lab.view);
    lab.step();
    // It is in the default view now, for one instruction.
    assert_eq!((lab.view_of_vcpu(), lab.vmi.driver().vcpu_view(VcpuId(0)).unwrap()), (0, lab.view));
}
