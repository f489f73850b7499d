//! What tests rely on in the mock driver.

use std::time::Duration;

use vmitap::arch::amd64::Registers;
use vmitap::driver::mock::{Call, CallKind, MockDriver};
use vmitap::driver::{VmiControl, VmiEvents, VmiFrames, VmiProtection, VmiRead, VmiRegisters, VmiViews, VmiWrite, Wait};
use vmitap::event::{EventAction, EventReason, VmiEvent, VmiEventResponse};
use vmitap::{Gfn, MemoryAccess, Pa, VcpuId, View, VmiError};

const NOW: Duration = Duration::ZERO;

fn event(vcpu: u16, rip: u64) -> VmiEvent {
    let mut registers = Registers::default();
    registers.gp.rip = rip;
    VmiEvent { vcpu: VcpuId(vcpu), view: Some(View(0)), registers, reason: EventReason::Breakpoint { gfn: Gfn(1), insn_len: 1 } }
}

#[test]
fn a_call_that_fails_is_recorded_and_changes_nothing() {
    for (n, op) in [(1, "create_view"), (2, "allocate_frames"), (3, "remap")] {
        let mut driver = MockDriver::new(0x4000, 1);
        let run = |driver: &mut MockDriver| {
            let view = driver.create_view(MemoryAccess::RWX)?;
            let frame = driver.allocate_frame()?;
            driver.remap(view, Gfn(2), Some(frame))
        };
        driver.fail_nth_with(n, 28);
        let error = run(&mut driver).unwrap_err();
        assert!(matches!(error, VmiError::Driver { op: failed, errno: 28, .. } if failed == op), "{error}");
        assert_eq!(driver.calls().len(), n);
        let state = driver.snapshot();
        assert_eq!((state.views.len() - 1, driver.frames_in_use()), (usize::from(n > 1), usize::from(n > 2)));
        assert!(state.views.values().all(|view| view.remaps.is_empty()));
        run(&mut driver).unwrap();
    }
}

#[test]
fn a_fault_of_one_kind_waits_for_that_kind() {
    let mut driver = MockDriver::new(0x4000, 1);
    driver.fail_nth_of(CallKind::AllocateFrames, 2);
    driver.allocate_frame().unwrap();
    driver.write(Pa(0), &[1]).unwrap();
    assert_eq!(driver.faults_left(), 1);
    assert!(driver.allocate_frame().is_err());
    assert_eq!(driver.allocate_frame().unwrap(), Gfn(5));
}

#[test]
fn the_snapshot_shows_every_change_and_nothing_once_it_is_undone() {
    let mut driver = MockDriver::new(0x4000, 1);
    let view = driver.create_view(MemoryAccess::RWX).unwrap();
    let before = driver.snapshot();
    let mut check = |change: fn(&mut MockDriver, View), undo: fn(&mut MockDriver, View)| {
        change(&mut driver, view);
        assert_ne!(driver.snapshot(), before);
        assert_eq!(driver.snapshot().differences(&before).len(), 1);
        undo(&mut driver, view);
        assert_eq!(driver.snapshot().differences(&before), [] as [String; 0]);
        assert_eq!(driver.snapshot(), before);
    };
    check(|d, _| d.write(Pa(0x1ffe), &[1, 2]).unwrap(), |d, _| d.write(Pa(0x1ffe), &[0, 0]).unwrap());
    check(
        |d, view| d.set_memory_access(view, Gfn(1), MemoryAccess::X).unwrap(),
        |d, view| d.set_memory_access_multi(view, &[(Gfn(1), MemoryAccess::RWX)]).unwrap(),
    );
    check(|d, view| d.remap(view, Gfn(1), Some(Gfn(2))).unwrap(), |d, view| d.remap(view, Gfn(1), None).unwrap());
    check(|d, _| assert_eq!(d.allocate_frame().unwrap(), Gfn(4)), |d, _| d.free_frame(Gfn(4)).unwrap());
    check(|d, view| d.switch_to_view(view).unwrap(), |d, _| d.switch_to_view(View::DEFAULT).unwrap());
    check(|d, _| d.pause().unwrap(), |d, _| d.resume().unwrap());
    check(
        |d, _| d.set_registers(VcpuId(0), &event(0, 5).registers).unwrap(),
        |d, _| d.set_registers(VcpuId(0), &Registers::default()).unwrap(),
    );
}

#[test]
fn each_event_is_answered_exactly_once() {
    let mut driver = MockDriver::new(0x4000, 2);
    let view = driver.create_view(MemoryAccess::RWX).unwrap();
    for (vcpu, rip) in [(0, 1), (0, 2), (1, 3)] {
        driver.push_event(event(vcpu, rip));
    }
    let none = VmiError::NoPendingEvent { vcpu: VcpuId(0) };
    assert_eq!(driver.respond(VcpuId(0), &VmiEventResponse::CONTINUE), Err(none.clone()));
    assert_eq!(driver.wait(NOW).unwrap(), Wait::Event(event(0, 1)));
    // The second event of vCPU 0 waits until the first is answered.
    assert_eq!(driver.wait(NOW).unwrap(), Wait::Event(event(1, 3)));
    assert_eq!(driver.wait(NOW).unwrap(), Wait::Idle);
    let answer = VmiEventResponse::action(EventAction::SingleStep { view });
    driver.respond(VcpuId(0), &answer).unwrap();
    assert_eq!(driver.vcpu_view(VcpuId(0)).unwrap(), view);
    assert_eq!(driver.respond(VcpuId(0), &answer), Err(none));
    assert_eq!(driver.answers(), [(VcpuId(0), answer)]);
    assert_eq!(driver.wait(NOW).unwrap(), Wait::Event(event(0, 2)));
    assert_eq!(driver.registers(VcpuId(0)).unwrap().rip().0, 2);
}

#[test]
fn an_answer_that_names_a_missing_view_leaves_the_event_unanswered() {
    let mut driver = MockDriver::new(0x4000, 1);
    driver.push_event(event(0, 1));
    driver.wait(NOW).unwrap();
    let wrong = VmiEventResponse::CONTINUE.in_view(View(3));
    assert_eq!(driver.respond(VcpuId(0), &wrong), Err(VmiError::ViewNotFound { view: View(3) }));
    driver.respond(VcpuId(0), &VmiEventResponse::CONTINUE).unwrap();
}

#[test]
fn a_wait_comes_back_when_woken_and_is_idle_when_paused() {
    let mut driver = MockDriver::new(0x4000, 1);
    driver.push_timeout();
    driver.push_event(event(0, 1));
    assert_eq!(driver.wait(NOW).unwrap(), Wait::Timeout);
    driver.waker().wake();
    assert_eq!(driver.wait(NOW).unwrap(), Wait::Timeout);
    driver.pause().unwrap();
    assert_eq!(driver.wait(NOW).unwrap(), Wait::Idle);
    driver.resume().unwrap();
    assert_eq!(driver.wait(NOW).unwrap(), Wait::Event(event(0, 1)));
    assert!(driver.resume().is_err());
}

#[test]
fn wrong_arguments_are_refused_with_what_was_wrong() {
    let mut driver = MockDriver::new(0x4000, 1);
    let view = driver.create_view(MemoryAccess::RWX).unwrap();
    let frame = driver.allocate_frame().unwrap();
    driver.remap(view, Gfn(1), Some(frame)).unwrap();
    let before = driver.snapshot();
    let end = Pa(0x4000);
    assert!(driver.free_frame(frame).is_err(), "a view still shows it");
    assert!(driver.free_frame(Gfn(1)).is_err(), "never allocated");
    assert_eq!(driver.remap(View::DEFAULT, Gfn(1), None), Err(VmiError::DefaultView { op: "remap" }));
    assert_eq!(driver.destroy_view(View::DEFAULT), Err(VmiError::DefaultView { op: "destroy_view" }));
    assert_eq!(driver.remap(view, frame, None), Err(VmiError::OutOfRange { pa: frame.pa(0), len: 4096, end }));
    assert!(matches!(driver.remap(view, Gfn(1), Some(Gfn(99))), Err(VmiError::OutOfRange { .. })));
    let pages = [(Gfn(1), MemoryAccess::R), (Gfn(2), MemoryAccess::WX)];
    let bad = VmiError::BadAccess { view, gfn: Gfn(2), access: MemoryAccess::WX };
    assert_eq!(driver.set_memory_access_multi(view, &pages), Err(bad));
    assert_eq!(driver.write(Pa(0x4fff), &[0; 2]), Err(VmiError::OutOfRange { pa: Pa(0x4fff), len: 2, end }));
    assert_eq!(driver.vcpu_view(VcpuId(1)), Err(VmiError::VcpuNotFound { vcpu: VcpuId(1), count: 1 }));
    assert_eq!(driver.snapshot(), before);
    driver.switch_to_view(view).unwrap();
    assert!(driver.destroy_view(view).is_err(), "a vCPU is in it");
}

#[test]
fn frames_come_and_go_by_the_batch_all_or_none_and_the_lowest_first() {
    let mut driver = MockDriver::new(0x4000, 1);
    driver.set_frame_limit(5);
    let all = [4, 5, 6, 7].map(Gfn);
    assert_eq!(driver.allocate_frames(4).unwrap(), all);
    assert!(driver.allocate_frames(2).is_err());
    for wrong in [&[Gfn(5), Gfn(9)][..], &[Gfn(5), Gfn(5)]] {
        assert!(driver.free_frames(wrong).is_err());
        assert_eq!(driver.frames_in_use(), 4);
    }
    driver.free_frames(&[Gfn(6), Gfn(4)]).unwrap();
    assert_eq!(driver.allocate_frames(3).unwrap(), [4, 6, 8].map(Gfn));
    driver.free_frames(&[7, 8, 4, 5, 6].map(Gfn)).unwrap();
    assert_eq!((driver.frames_in_use(), driver.frames_peak()), (0, 5));
}

#[test]
fn a_view_shows_the_frame_that_was_put_there_and_reads_do_not() {
    let mut driver = MockDriver::new(0x4000, 1);
    let view = driver.create_view(MemoryAccess::RWX).unwrap();
    let frame = driver.allocate_frame().unwrap();
    driver.write(frame.pa(0), &[0xcc]).unwrap();
    driver.remap(view, Gfn(1), Some(frame)).unwrap();
    assert_eq!(driver.peek_in_view(view, Pa(0xfff), 2).unwrap(), [0, 0xcc]);
    let mut byte = [1];
    driver.read(Pa(0x1000), &mut byte).unwrap();
    assert_eq!(byte, [0]);
    assert!(driver.calls().iter().all(|call| !matches!(call, Call::Read { .. })));
}
