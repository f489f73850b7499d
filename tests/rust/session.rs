//! The session's loop on the mock driver: what is answered, exactly once, and what a failing call leaves behind.

use std::time::{Duration, Instant};

use std::sync::Arc;

use vmitap::arch::amd64::{AddressContext, Registers, pte};
use vmitap::capture::{Abi, Node, Program, Test};
use vmitap::driver::mock::{MockDriver, PageSize};
use vmitap::driver::{VmiDriver, VmiInfo};
use vmitap::event::{EventAction, EventReason, VmiEvent, VmiEventResponse};
use vmitap::session::{GpChanges, Limits, Poll, Session, TapId, TapKind, TapSpec, TapState, Verdict};
use vmitap::tap::OnWrite;
use vmitap::{MemoryAccess, Pa, Va, VcpuId, View, VmiError};

pub const CODE: Va = Va(0x40_0000);
pub const CODE_PA: Pa = Pa(0x5000);
pub const STACK: Va = Va(0x50_0000);

/// A guest with two pages of code, two pages of stack behind them, and the context they are mapped in.
pub fn guest(vcpus: u16) -> (MockDriver, AddressContext) {
    let mut driver = MockDriver::new(0x20000, vcpus);
    let context = driver.new_root(4).unwrap();
    for (va, pa) in [(CODE, CODE_PA), (Va(CODE.0 + 0x1000), Pa(0x6000)), (STACK, Pa(0x7000)), (Va(STACK.0 + 0x1000), Pa(0x8000))]
    {
        driver.map(context, va, pa, PageSize::Size4K, pte::P | pte::W).unwrap();
    }
    driver.poke(CODE_PA, &[0x90; 64]).unwrap();
    (driver, context)
}

pub fn session(vcpus: u16) -> (Session<MockDriver>, AddressContext) {
    let (driver, context) = guest(vcpus);
    (Session::new(Box::new(driver), OnWrite::Reapply).unwrap(), context)
}

pub fn spec<D: VmiDriver>(session: &Session<D>, context: AddressContext, va: Va) -> TapSpec {
    TapSpec {
        kind: TapKind::Breakpoint,
        va,
        context,
        global: true,
        view: session.tap_view(),
        on_write: None,
        key: None,
        wanted: true,
        enabled: true,
    }
}

pub fn registers(context: AddressContext, rip: Va) -> Registers {
    let mut registers = Registers { cr3: context.root.0, ..Registers::default() };
    registers.gp.rip = rip.0;
    registers.gp.rsp = STACK.0 + 0x100;
    registers
}

pub fn int3(view: View, context: AddressContext, va: Va, pa: Pa) -> VmiEvent {
    VmiEvent {
        vcpu: VcpuId(0),
        view: Some(view),
        registers: registers(context, va),
        reason: EventReason::Breakpoint { gfn: pa.gfn(), insn_len: 1 },
    }
}

pub fn access(view: View, context: AddressContext, pa: Pa, va: Va, access: MemoryAccess, len: u16) -> VmiEvent {
    VmiEvent {
        vcpu: VcpuId(0),
        view: Some(view),
        registers: registers(context, CODE),
        reason: EventReason::MemoryAccess { pa, va: Some(va), access, len },
    }
}

fn poll(session: &mut Session<MockDriver>) -> Poll {
    session.poll(&Limits { deadline: Some(Instant::now() + Duration::from_secs(1)), hits: None }).unwrap()
}

fn answers(session: &Session<MockDriver>) -> Vec<VmiEventResponse> {
    session.vmi().driver().answers().iter().map(|(_, answer)| *answer).collect()
}

fn step_over(view: View) -> VmiEventResponse {
    VmiEventResponse::action(EventAction::FastSingleStep { view: View::DEFAULT }).in_view(view)
}

#[test]
fn a_hit_is_handed_out_and_answered_once_with_a_step_in_the_clean_view() {
    let (mut session, context) = session(1);
    let tap = session.add(&spec(&session, context, CODE)).unwrap();
    let view = session.tap_view();
    session.vmi_mut().driver_mut().push_event(int3(view, context, CODE, CODE_PA));
    let Poll::Hit(hit) = poll(&mut session) else { panic!("no hit") };
    assert_eq!((hit.tap, hit.va, hit.pa, hit.access), (tap, CODE, CODE_PA, MemoryAccess::X));
    assert_eq!(answers(&session), []);
    session.answer(Verdict::Continue).unwrap();
    assert_eq!(answers(&session), [step_over(view)]);
    assert!(matches!(session.answer(Verdict::Continue), Err(VmiError::NoPendingEvent { .. })));
    assert!(matches!(poll(&mut session), Poll::Idle));
    assert_eq!((session.stats().hits, session.tap_stats(tap).hits, session.tap_stats(tap).handled), (1, 1, 1));
}

#[test]
fn a_hit_that_was_not_answered_is_answered_by_the_next_poll() {
    let (mut session, context) = session(1);
    session.add(&spec(&session, context, CODE)).unwrap();
    let view = session.tap_view();
    session.vmi_mut().driver_mut().push_event(int3(view, context, CODE, CODE_PA));
    assert!(matches!(poll(&mut session), Poll::Hit(_)));
    assert!(matches!(poll(&mut session), Poll::Idle));
    assert_eq!(answers(&session), [step_over(view)]);
}

#[test]
fn what_nobody_wants_is_answered_inside() {
    let (mut session, context) = session(1);
    let counted = TapSpec { wanted: false, ..spec(&session, context, CODE) };
    let counted = session.add(&counted).unwrap();
    let mut elsewhere = spec(&session, context, Va(CODE.0 + 8));
    elsewhere.global = false;
    session.add(&elsewhere).unwrap();
    let view = session.tap_view();
    let other = AddressContext::new(Pa(0x9000));
    let driver = session.vmi_mut().driver_mut();
    driver.poke(Pa(CODE_PA.0 + 32), &[0xcc]).unwrap();
    driver.push_event(int3(view, context, CODE, CODE_PA));
    driver.push_event(int3(view, other, Va(CODE.0 + 8), Pa(CODE_PA.0 + 8)));
    driver.push_event(int3(view, context, Va(CODE.0 + 32), Pa(CODE_PA.0 + 32)));
    driver.push_event(int3(view, context, Va(CODE.0 + 40), Pa(CODE_PA.0 + 40)));
    driver.push_event(access(view, context, CODE_PA, CODE, MemoryAccess::R, 1));
    assert!(matches!(poll(&mut session), Poll::Idle));
    let reinject = VmiEventResponse::action(EventAction::Reinject).in_view(view);
    let emulate = VmiEventResponse::action(EventAction::Emulate).in_view(view);
    // A hit, one under another root, the guest's own INT3, a stale one, and a read.
    assert_eq!(answers(&session), [step_over(view), step_over(view), reinject, step_over(view), emulate]);
    let stats = session.stats();
    assert_eq!((stats.events, stats.hits, stats.filtered, stats.reinjected, stats.hidden_reads), (5, 1, 1, 1, 1));
    assert_eq!((session.tap_stats(counted).hits, stats.handled), (1, 0));
}

#[test]
fn verdicts_set_registers_and_leave_functions() {
    let (mut session, context) = session(1);
    session.add(&spec(&session, context, CODE)).unwrap();
    let view = session.tap_view();
    session.vmi_mut().driver_mut().poke(Pa(0x7100), &0x1234_u64.to_le_bytes()).unwrap();
    let mut changes = GpChanges::default();
    changes.values[5] = Some(7);
    for verdict in [Verdict::SetRegisters(Box::new(changes)), Verdict::Return(1)] {
        session.vmi_mut().driver_mut().push_event(int3(view, context, CODE, CODE_PA));
        assert!(matches!(poll(&mut session), Poll::Hit(_)));
        session.answer(verdict).unwrap();
    }
    let answers = answers(&session);
    assert_eq!(answers[0].registers.unwrap().rdi, 7);
    assert_eq!(answers[0].action, EventAction::FastSingleStep { view: View::DEFAULT });
    let gp = answers[1].registers.unwrap();
    assert_eq!((gp.rip, gp.rax, gp.rsp, answers[1].action), (0x1234, 1, STACK.0 + 0x108, EventAction::Continue));
}

#[test]
fn a_return_without_a_readable_stack_is_an_error_and_the_vcpu_goes_on() {
    let (mut session, context) = session(1);
    session.add(&spec(&session, context, CODE)).unwrap();
    let view = session.tap_view();
    let mut event = int3(view, context, CODE, CODE_PA);
    event.registers.gp.rsp = 0x1000;
    session.vmi_mut().driver_mut().push_event(event);
    assert!(matches!(poll(&mut session), Poll::Hit(_)));
    assert!(matches!(session.answer(Verdict::Return(1)), Err(VmiError::Translation { .. })));
    assert_eq!(answers(&session).len(), 1);
    assert_eq!(answers(&session)[0].action, EventAction::FastSingleStep { view: View::DEFAULT });
}

#[test]
fn of_several_taps_at_one_address_the_first_verdict_decides() {
    let (mut session, context) = session(1);
    let taps = [(); 3].map(|()| session.add(&spec(&session, context, CODE)).unwrap());
    let view = session.tap_view();
    session.vmi_mut().driver_mut().push_event(int3(view, context, CODE, CODE_PA));
    let mut told = Vec::new();
    for rax in 0..3 {
        let Poll::Hit(hit) = poll(&mut session) else { panic!("no hit") };
        told.push(hit.tap);
        let mut changes = GpChanges::default();
        changes.values[0] = Some(rax);
        session.answer(if rax == 0 { Verdict::Continue } else { Verdict::SetRegisters(Box::new(changes)) }).unwrap();
    }
    assert_eq!(told, taps);
    assert_eq!(answers(&session).len(), 1);
    assert_eq!(answers(&session)[0].registers.unwrap().rax, 1);
}

#[test]
fn steps_are_handed_out_and_end() {
    let (mut session, context) = session(1);
    session.add(&spec(&session, context, CODE)).unwrap();
    let view = session.tap_view();
    session.vmi_mut().driver_mut().push_event(int3(view, context, CODE, CODE_PA));
    assert!(matches!(poll(&mut session), Poll::Hit(_)));
    session.answer(Verdict::Step(2)).unwrap();
    for (step, from) in [(1, View::DEFAULT), (2, view)] {
        let reason = EventReason::SingleStep { gfn: Some(CODE_PA.gfn()) };
        let event = VmiEvent { vcpu: VcpuId(0), view: Some(from), registers: registers(context, Va(CODE.0 + step)), reason };
        session.vmi_mut().driver_mut().push_event(event);
        let Poll::Hit(hit) = poll(&mut session) else { panic!("no step") };
        assert_eq!(u64::from(hit.step), step);
        session.answer(Verdict::Continue).unwrap();
    }
    let single = |at| VmiEventResponse::action(EventAction::SingleStep { view: at }).in_view(view);
    assert_eq!(answers(&session), [single(View::DEFAULT), single(view), VmiEventResponse::CONTINUE.in_view(view)]);
}

#[test]
fn a_pause_holds_the_vcpu_until_the_next_poll() {
    let (mut session, context) = session(1);
    session.add(&spec(&session, context, CODE)).unwrap();
    let view = session.tap_view();
    session.vmi_mut().driver_mut().push_event(int3(view, context, CODE, CODE_PA));
    assert!(matches!(poll(&mut session), Poll::Hit(_)));
    session.answer(Verdict::Pause).unwrap();
    assert_eq!(answers(&session), []);
    assert!(matches!(poll(&mut session), Poll::Idle));
    assert_eq!(answers(&session), [step_over(view)]);
}

#[test]
fn a_write_to_a_hidden_page_follows_the_policy_of_the_byte() {
    for (policy, action, removed) in [
        (OnWrite::Reapply, EventAction::SingleStep { view: View::DEFAULT }, 0),
        (OnWrite::Remove, EventAction::SingleStep { view: View::DEFAULT }, 1),
        (OnWrite::Deny, EventAction::Deny, 0),
    ] {
        let (mut session, context) = session(1);
        let spec = TapSpec { on_write: Some(policy), wanted: false, ..spec(&session, context, Va(CODE.0 + 3)) };
        let tap = session.add(&spec).unwrap();
        let view = session.tap_view();
        session.vmi_mut().driver_mut().push_event(access(view, context, CODE_PA, CODE, MemoryAccess::W, 4));
        assert!(matches!(poll(&mut session), Poll::Idle));
        assert_eq!(answers(&session), [VmiEventResponse::action(action).in_view(view)], "{policy:?}");
        if policy != OnWrite::Deny {
            // The store happens in the original frame, then the step is reported.
            session.vmi_mut().driver_mut().poke(CODE_PA, &[1, 2, 3, 4]).unwrap();
            let reason = EventReason::SingleStep { gfn: None };
            let event = VmiEvent { vcpu: VcpuId(0), view: Some(View::DEFAULT), registers: registers(context, CODE), reason };
            session.vmi_mut().driver_mut().push_event(event);
            assert!(matches!(poll(&mut session), Poll::Idle));
            assert_eq!(answers(&session)[1], VmiEventResponse::CONTINUE.in_view(view));
            let shown = session.vmi().driver().peek_in_view(view, CODE_PA, 4).unwrap();
            assert_eq!(shown, if removed == 0 { [1, 2, 3, 0xcc] } else { [1, 2, 3, 4] });
        }
        assert_eq!((session.stats().removed_by_write, session.stats().hidden_writes), (removed, 1));
        assert_eq!(session.state(tap), if removed == 0 { TapState::Active } else { TapState::Removed });
    }
}

#[test]
fn a_string_store_over_many_pages_leaves_no_shadow_behind() {
    // RDI behind the two tapped pages, and far behind everything: nobody looks up so many pages one by one.
    for rdi in [CODE.0 + 0x2000, CODE.0 + (1 << 32)] {
        let (mut session, context) = session(1);
        for va in [CODE, Va(CODE.0 + 0x1000)] {
            session.add(&TapSpec { wanted: false, ..spec(&session, context, va) }).unwrap();
        }
        let view = session.tap_view();
        let mut store = access(view, context, CODE_PA, CODE, MemoryAccess::W, 8);
        store.registers.gp.rdi = CODE.0;
        session.vmi_mut().driver_mut().push_event(store);
        assert!(matches!(poll(&mut session), Poll::Idle));
        session.vmi_mut().driver_mut().poke(CODE_PA, &[0x42; 0x2000]).unwrap();
        let mut done = VmiEvent { view: Some(View::DEFAULT), reason: EventReason::SingleStep { gfn: None }, ..store };
        done.registers.gp.rdi = rdi;
        session.vmi_mut().driver_mut().push_event(done);
        assert!(matches!(poll(&mut session), Poll::Idle));
        for pa in [CODE_PA, Pa(0x6000)] {
            assert_eq!(session.vmi().driver().peek_in_view(view, pa, 2).unwrap(), [0xcc, 0x42], "{pa}, {rdi:#x}");
        }
    }
}

#[test]
fn a_breakpoint_that_is_planted_while_a_watched_store_is_held_shows_what_was_stored() {
    let (mut session, context) = session(1);
    let kind = TapKind::Watch { len: 16, access: MemoryAccess::W };
    session.add(&TapSpec { kind, ..spec(&session, context, CODE) }).unwrap();
    let view = session.tap_view();
    let store = access(view, context, CODE_PA, CODE, MemoryAccess::W, 1);
    session.vmi_mut().driver_mut().push_event(store);
    assert!(matches!(poll(&mut session), Poll::Hit(_)));
    session.add(&TapSpec { wanted: false, ..spec(&session, context, Va(CODE.0 + 1)) }).unwrap();
    session.answer(Verdict::Continue).unwrap();
    assert_eq!(answers(&session)[0].action, EventAction::SingleStep { view: View::DEFAULT });
    session.vmi_mut().driver_mut().poke(CODE_PA, &[0x42]).unwrap();
    let done = VmiEvent { view: Some(View::DEFAULT), reason: EventReason::SingleStep { gfn: None }, ..store };
    session.vmi_mut().driver_mut().push_event(done);
    assert!(matches!(poll(&mut session), Poll::Idle));
    assert_eq!(session.vmi().driver().peek_in_view(view, CODE_PA, 2).unwrap(), [0x42, 0xcc]);
    assert_eq!(answers(&session)[1], VmiEventResponse::CONTINUE.in_view(view));
}

#[test]
fn a_store_across_a_border_follows_the_policies_on_both_pages() {
    // Two pages that are neighbours to the guest only.
    const FIRST: Va = Va(0x60_0000);
    const SECOND: Va = Va(0x60_1000);
    for (policy, first_policy) in [OnWrite::Deny, OnWrite::Ask, OnWrite::Remove]
        .into_iter()
        .flat_map(|policy| [OnWrite::Reapply, OnWrite::Remove].map(|first| (policy, first)))
    {
        // A driver that knows the length, and one that does not.
        for (len, over) in [(8, 3), (8, 0), (0, 3), (8, 4), (0, 4)] {
            let (mut session, context) = session(1);
            let driver = session.vmi_mut().driver_mut();
            for (va, pa) in [(FIRST, Pa(0x8000)), (SECOND, Pa(0x5000))] {
                driver.map(context, va, pa, PageSize::Size4K, pte::P | pte::W).unwrap();
            }
            let here = |va, policy| TapSpec { on_write: Some(policy), wanted: false, ..spec(&session, context, va) };
            let taps = [here(Va(FIRST.0 + 0xffd), first_policy), here(Va(SECOND.0 + over), policy)];
            let taps = taps.map(|spec| session.add(&spec).unwrap());
            let view = session.tap_view();
            let store = access(view, context, Pa(0x8ffc), Va(FIRST.0 + 0xffc), MemoryAccess::W, len);
            session.vmi_mut().driver_mut().push_event(store);
            let polled = poll(&mut session);
            let case = format!("{policy:?} at {over} behind the border, {first_policy:?} before it, {len} bytes");
            // Four bytes are on each side.
            let is_over = over < 4;
            if is_over && policy == OnWrite::Ask {
                let Poll::Hit(hit) = polled else { panic!("not asked: {case}") };
                assert_eq!((hit.tap, hit.ask, hit.pa), (taps[1], true, Pa(0x8ffc)), "{case}");
                session.answer_write(OnWrite::Remove).unwrap();
                assert!(matches!(poll(&mut session), Poll::Idle));
            } else {
                assert!(matches!(polled, Poll::Idle), "{case}");
            }
            let is_denied = is_over && policy == OnWrite::Deny;
            let action = if is_denied { EventAction::Deny } else { EventAction::SingleStep { view: View::DEFAULT } };
            assert_eq!(answers(&session), [VmiEventResponse::action(action).in_view(view)], "{case}");
            if !is_denied {
                // What is stored is what was there: only where it is stored says what is overwritten.
                let reason = EventReason::SingleStep { gfn: None };
                session.vmi_mut().driver_mut().push_event(VmiEvent { view: Some(View::DEFAULT), reason, ..store });
                assert!(matches!(poll(&mut session), Poll::Idle));
            }
            let state = |gone| if gone && !is_denied { TapState::Removed } else { TapState::Active };
            let expected = [state(first_policy == OnWrite::Remove), state(is_over)];
            assert_eq!(taps.map(|tap| session.state(tap)), expected, "{case}");
        }
    }
}

#[test]
fn a_write_beside_the_byte_is_not_denied() {
    let (mut session, context) = session(1);
    let spec = TapSpec { on_write: Some(OnWrite::Deny), ..spec(&session, context, Va(CODE.0 + 4)) };
    session.add(&spec).unwrap();
    let view = session.tap_view();
    session.vmi_mut().driver_mut().push_event(access(view, context, CODE_PA, CODE, MemoryAccess::W, 4));
    assert!(matches!(poll(&mut session), Poll::Idle));
    assert_eq!(answers(&session)[0].action, EventAction::SingleStep { view: View::DEFAULT });
}

#[test]
fn a_question_about_a_write_is_answered_with_a_policy() {
    for (policy, action) in
        [(OnWrite::Deny, EventAction::Deny), (OnWrite::Reapply, EventAction::SingleStep { view: View::DEFAULT })]
    {
        let (mut session, context) = session(1);
        let spec = TapSpec { on_write: Some(OnWrite::Ask), wanted: false, ..spec(&session, context, CODE) };
        session.add(&spec).unwrap();
        let view = session.tap_view();
        session.vmi_mut().driver_mut().push_event(access(view, context, CODE_PA, CODE, MemoryAccess::W, 1));
        let Poll::Hit(hit) = poll(&mut session) else { panic!("not asked") };
        assert!(hit.ask);
        assert!(matches!(session.answer_write(OnWrite::Ask), Err(VmiError::InvalidArgument { .. })));
        session.answer_write(policy).unwrap();
        assert_eq!(answers(&session), [VmiEventResponse::action(action).in_view(view)]);
    }
}

#[test]
fn a_watch_reports_its_bytes_and_only_those() {
    let (mut session, context) = session(1);
    let kind = TapKind::Watch { len: 8, access: MemoryAccess::R };
    let tap = session.add(&TapSpec { kind, ..spec(&session, context, Va(STACK.0 + 16)) }).unwrap();
    let view = session.tap_view();
    for offset in [15, 16, 23, 24] {
        let event = access(view, context, Pa(0x7000 + offset), Va(STACK.0 + offset), MemoryAccess::R, 1);
        session.vmi_mut().driver_mut().push_event(event);
        let is_hit = matches!(poll(&mut session), Poll::Hit(hit) if hit.tap == tap);
        assert_eq!(is_hit, (16..24).contains(&offset), "{offset}");
    }
    poll(&mut session);
    assert_eq!((session.stats().hits, session.stats().filtered), (2, 2));
    assert_eq!(answers(&session), [step_over(view); 4]);
    session.remove(tap).unwrap();
    assert!(session.vmi().driver().snapshot().views[&view].pages.is_empty());
}

#[test]
fn bad_taps_are_refused_and_change_nothing() {
    let (mut session, context) = session(1);
    session.add(&TapSpec { key: Some(1), ..spec(&session, context, CODE) }).unwrap();
    let before = session.vmi().driver().snapshot();
    let good = spec(&session, context, CODE);
    let watch = |len, access| TapKind::Watch { len, access };
    for bad in [
        TapSpec { view: View::DEFAULT, ..good },
        TapSpec { view: View(9), ..good },
        TapSpec { va: Va(0x7000_0000), kind: watch(1, MemoryAccess::R), ..good },
        TapSpec { va: Va(1 << 50), ..good },
        TapSpec { key: Some(1), ..good },
        TapSpec { kind: watch(0, MemoryAccess::R), ..good },
        TapSpec { kind: watch(1, MemoryAccess::NONE), ..good },
        TapSpec { kind: watch(0x3000, MemoryAccess::R), ..good },
    ] {
        let fine = TapSpec { va: Va(CODE.0 + 0x1000), ..good };
        assert!(session.add_many(&[fine, bad]).is_err(), "{bad:?}");
        assert_eq!(session.vmi().driver().snapshot().differences(&before), [] as [String; 0], "{bad:?}");
    }
    session.add(&TapSpec { key: Some(2), ..good }).unwrap();
}

#[test]
fn leaving_restores_the_guest_and_answers_what_is_held() {
    let (driver, context) = guest(2);
    let before = driver.snapshot();
    let mut session = Session::new(Box::new(driver), OnWrite::Reapply).unwrap();
    session.add(&spec(&session, context, CODE)).unwrap();
    let kind = TapKind::Watch { len: 64, access: MemoryAccess::RW };
    session.add(&TapSpec { kind, ..spec(&session, context, STACK) }).unwrap();
    let view = session.create_view(MemoryAccess::RWX).unwrap();
    session.add(&TapSpec { view, ..spec(&session, context, CODE) }).unwrap();
    let tap_view = session.tap_view();
    let mut other = int3(tap_view, context, CODE, CODE_PA);
    other.vcpu = VcpuId(1);
    session.vmi_mut().driver_mut().push_event(int3(tap_view, context, CODE, CODE_PA));
    session.vmi_mut().driver_mut().push_event(other);
    session.wait_raw(Duration::ZERO).unwrap();
    assert!(matches!(session.poll(&Limits::default()), Ok(Poll::Hit(_))));
    session.detach().unwrap();
    session.detach().unwrap();
    let mut after = session.vmi().driver().snapshot();
    assert_eq!(session.vmi().driver().answers().len(), 2);
    // The registers of the scripted events are the events' own.
    for (vcpu, was) in after.vcpus.iter_mut().zip(&before.vcpus) {
        vcpu.registers = was.registers;
    }
    assert_eq!(after.differences(&before), [] as [String; 0]);
    assert!(matches!(session.poll(&Limits::default()), Err(VmiError::DomainGone { .. })));
    assert_eq!(session.vmi().driver().info().vcpus, 2);
}

#[test]
fn an_event_is_answered_even_if_its_handling_fails() {
    let (mut session, context) = session(1);
    session.add(&spec(&session, context, CODE)).unwrap();
    let view = session.tap_view();
    // The INT3 is not ours, and whether it is the guest's cannot be found out: its page is not mapped.
    session.vmi_mut().driver_mut().push_event(int3(view, context, Va(0x7000_0000), Pa(0x8000)));
    let result = session.poll(&Limits::default());
    assert!(result.is_err() || !answers(&session).is_empty());
    assert_eq!(answers(&session).len(), 1);
}

/// A filter made of these steps.
fn filter(nodes: &[Node]) -> Arc<Program> {
    Arc::new(Program::compile(nodes, Abi::SystemV).unwrap())
}

fn argument_is(value: u64) -> Vec<Node> {
    vec![Node::Argument(0), Node::Const { value, signed: false }, Node::Compare(Test::Eq)]
}

fn with_rdi(mut event: VmiEvent, rdi: u64) -> VmiEvent {
    event.registers.gp.rdi = rdi;
    event
}

#[test]
fn a_filtered_hit_is_counted_and_stepped_over_and_nobody_is_told() {
    let (mut session, context) = session(1);
    let tap = session.add(&spec(&session, context, CODE)).unwrap();
    session.set_filter(tap, Some(&filter(&argument_is(7)))).unwrap();
    let view = session.tap_view();
    for rdi in [1, 7, 2] {
        session.vmi_mut().driver_mut().push_event(with_rdi(int3(view, context, CODE, CODE_PA), rdi));
    }
    let Poll::Hit(hit) = poll(&mut session) else { panic!("no hit") };
    assert_eq!((hit.registers.gp.rdi, hit.question), (7, None));
    session.answer(Verdict::Continue).unwrap();
    assert!(matches!(poll(&mut session), Poll::Idle));
    assert_eq!(answers(&session), [step_over(view); 3]);
    let (all, own) = (session.stats(), session.tap_stats(tap));
    assert_eq!((all.hits, all.filtered, own.hits, own.filtered, own.filter_faults), (1, 2, 1, 2, 0));
    session.set_filter(tap, None).unwrap();
    session.vmi_mut().driver_mut().push_event(int3(view, context, CODE, CODE_PA));
    assert!(matches!(poll(&mut session), Poll::Hit(_)));
}

#[test]
fn a_filter_that_reads_unmapped_memory_keeps_the_hit_back_and_counts_it() {
    let (mut session, context) = session(1);
    let tap = session.add(&spec(&session, context, CODE)).unwrap();
    let nodes =
        [Node::Argument(0), Node::Load { size: 8 }, Node::Const { value: 0, signed: false }, Node::Compare(Test::Eq), Node::Not];
    session.set_filter(tap, Some(&filter(&nodes))).unwrap();
    let view = session.tap_view();
    session.vmi_mut().driver_mut().push_event(with_rdi(int3(view, context, CODE, CODE_PA), 0x1234_5000));
    assert!(matches!(poll(&mut session), Poll::Idle));
    let stats = session.tap_stats(tap);
    assert_eq!((stats.hits, stats.filtered, stats.filter_faults), (0, 1, 1));
}

#[test]
fn a_filter_that_is_a_number_is_refused() {
    let (mut session, context) = session(1);
    let tap = session.add(&spec(&session, context, CODE)).unwrap();
    let result = session.set_filter(tap, Some(&filter(&[Node::Argument(0)])));
    assert!(matches!(result, Err(VmiError::InvalidArgument { what: "where", .. })), "{result:?}");
}

/// Two taps at one address; the first one's filter asks twice, the second one has a handler and no filter.
fn asking() -> (Session<MockDriver>, [TapId; 2]) {
    let (mut session, context) = session(1);
    let first = session.add(&TapSpec { wanted: false, ..spec(&session, context, CODE) }).unwrap();
    let second = session.add(&spec(&session, context, CODE)).unwrap();
    let nodes = [Node::Ask(4), Node::Ask(5), Node::And];
    session.set_filter(first, Some(&filter(&nodes))).unwrap();
    let view = session.tap_view();
    session.vmi_mut().driver_mut().push_event(int3(view, context, CODE, CODE_PA));
    (session, [first, second])
}

#[test]
fn questions_of_a_filter_are_put_one_by_one_and_only_those_that_matter() {
    for (said, questions, hits) in
        [(vec![true, true], vec![4, 5], 2), (vec![true, false], vec![4, 5], 1), (vec![false], vec![4], 1)]
    {
        let (mut session, [first, second]) = asking();
        let mut asked = Vec::new();
        for answer in said {
            let Poll::Hit(hit) = poll(&mut session) else { panic!("no question") };
            assert_eq!((hit.tap, session.stats().hits), (first, 1));
            asked.push(hit.question.unwrap());
            session.answer_question_of_filter(answer).unwrap();
        }
        assert_eq!(asked, questions);
        let Poll::Hit(hit) = poll(&mut session) else { panic!("no hit") };
        assert_eq!((hit.tap, hit.question), (second, None));
        assert!(matches!(session.answer_question_of_filter(true), Err(VmiError::NoPendingEvent { .. })));
        session.answer(Verdict::Continue).unwrap();
        assert_eq!((session.stats().hits, session.tap_stats(first).hits), (hits, hits - 1));
        assert_eq!(session.tap_stats(first).filtered, 2 - hits);
        assert_eq!(answers(&session), [step_over(session.tap_view())]);
    }
}

#[test]
fn a_question_that_is_not_answered_counts_as_no_and_the_event_is_answered_once() {
    let (mut session, [first, second]) = asking();
    assert!(matches!(poll(&mut session), Poll::Hit(hit) if hit.question == Some(4)));
    assert!(matches!(poll(&mut session), Poll::Hit(hit) if hit.tap == second));
    assert!(matches!(poll(&mut session), Poll::Idle));
    assert_eq!(answers(&session), [step_over(session.tap_view())]);
    assert_eq!((session.tap_stats(first).filtered, session.tap_stats(second).handled), (1, 1));
}

#[test]
fn the_last_question_ends_the_event_if_nobody_else_wants_it() {
    for answer in [true, false] {
        let (mut session, [first, second]) = asking();
        session.remove(second).unwrap();
        assert!(matches!(poll(&mut session), Poll::Hit(_)));
        session.answer_question_of_filter(answer).unwrap();
        if answer {
            assert!(matches!(poll(&mut session), Poll::Hit(hit) if hit.question == Some(5)));
            session.answer_question_of_filter(true).unwrap();
        }
        assert_eq!(answers(&session), [step_over(session.tap_view())]);
        assert_eq!(session.tap_stats(first).hits, u64::from(answer));
    }
}
