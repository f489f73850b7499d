//! Breakpoints in shadow pages and counted rights, on the mock driver.

use vmitap::arch::amd64::Registers;
use vmitap::core::VmiCore;
use vmitap::driver::mock::{Call, GuestState, MockDriver};
use vmitap::driver::{VmiFrames, VmiProtection, VmiViews};
use vmitap::event::{EventReason, VmiEvent};
use vmitap::tap::{BreakpointController, MemoryController, Rights, TapController, TapEvents};
use vmitap::{Gfn, MemoryAccess, Pa, Result, VcpuId, View, VmiError};

type Vmi = VmiCore<MockDriver>;
type World = (View, BreakpointController);
const GFN: Gfn = Gfn(2);

fn guest() -> (Vmi, View) {
    let mut driver = MockDriver::new(0x8000, 1);
    driver.poke(Pa(0x2000), &[1, 2, 3, 4]).unwrap();
    let view = driver.create_view(MemoryAccess::RWX).unwrap();
    driver.take_calls();
    (VmiCore::new(Box::new(driver)), view)
}

/// Two views with breakpoints on two pages, one of them monitored.
fn planted() -> (Vmi, View, View, BreakpointController) {
    let (mut vmi, view) = guest();
    let other = vmi.driver_mut().create_view(MemoryAccess::RX).unwrap();
    let mut controller = BreakpointController::new();
    controller.monitor(&mut vmi, GFN, view).unwrap();
    for pa in [0x2001, 0x2003, 0x2fff, 0x3000] {
        controller.insert_breakpoint(&mut vmi, Pa(pa), view).unwrap();
    }
    controller.insert_breakpoint(&mut vmi, Pa(0x2002), other).unwrap();
    (vmi, view, other, controller)
}

fn shown(vmi: &Vmi, view: View) -> Vec<u8> {
    vmi.driver().peek_in_view(view, Pa(0x2000), 0x2000).unwrap()
}

/// Fails every call of `op` in turn, reads too. After each failure the guest is as before, and the retry does all of it.
fn each_call_failing<W>(make: impl Fn() -> (Vmi, W), op: impl Fn(&mut Vmi, &mut W) -> Result<()>) {
    let (mut vmi, mut world) = make();
    op(&mut vmi, &mut world).unwrap();
    let wanted: GuestState = vmi.driver().snapshot();
    for n in 1.. {
        let (mut vmi, mut world) = make();
        let before = vmi.driver().snapshot();
        vmi.driver_mut().record_reads(true);
        vmi.driver_mut().fail_nth(n);
        let result = op(&mut vmi, &mut world);
        if vmi.driver().faults_left() > 0 {
            assert!(n > 1, "it makes no call");
            return result.unwrap();
        }
        assert!(matches!(result, Err(VmiError::Driver { .. })), "call {n}: {result:?}");
        assert_eq!(vmi.driver().snapshot().differences(&before), [] as [String; 0], "call {n}");
        op(&mut vmi, &mut world).unwrap();
        assert_eq!(vmi.driver().snapshot().differences(&wanted), [] as [String; 0], "retry of call {n}");
    }
}

#[test]
fn a_breakpoint_shows_in_its_view_alone_and_goes_without_a_trace() {
    let (mut vmi, view) = guest();
    let mut controller = BreakpointController::default();
    let (first, last) = (Pa(0x2001), Pa(0x2fff));
    let before = vmi.driver().snapshot();
    controller.monitor(&mut vmi, GFN, view).unwrap();
    for pa in [first, first, last] {
        controller.insert_breakpoint(&mut vmi, pa, view).unwrap();
    }
    assert_eq!((shown(&vmi, view)[..4].to_vec(), shown(&vmi, view)[4095]), (vec![1, 0xcc, 3, 4], 0xcc));
    let mut bytes = [0; 4];
    vmi.read_pa(Pa(0x2000), &mut bytes).unwrap();
    assert_eq!(bytes, [1, 2, 3, 4]);
    assert_eq!(vmi.driver().state().views[&view].pages[&GFN], MemoryAccess::X);
    assert!(controller.is_hidden(view, GFN) && controller.hides_anywhere(GFN) && !controller.is_hidden(view, Gfn(3)));
    assert_eq!(controller.breakpoints_on(view, GFN).collect::<Vec<_>>(), [1, 0xfff]);
    // The first of two references leaves it planted.
    controller.remove_breakpoint(&mut vmi, first, view).unwrap();
    assert_eq!(shown(&vmi, view)[1], 0xcc);
    controller.remove_breakpoint(&mut vmi, first, view).unwrap();
    assert_eq!((shown(&vmi, view)[1], shown(&vmi, view)[4095]), (2, 0xcc));
    controller.remove_breakpoint(&mut vmi, last, view).unwrap();
    controller.unmonitor(&mut vmi, GFN, view).unwrap();
    assert_eq!(vmi.driver().snapshot().differences(&before), [] as [String; 0]);
    assert_eq!((vmi.driver().frames_in_use(), controller.shadow_frames()), (0, 0));
    let gone = controller.remove_breakpoint(&mut vmi, first, view);
    assert_eq!(gone, Err(VmiError::BreakpointNotFound { pa: first, view }));
}

#[test]
fn a_page_is_execute_only_from_before_its_copy_is_shown_until_after_it_is_gone() {
    for monitored in [true, false] {
        let (mut vmi, view) = guest();
        let mut controller = BreakpointController::new();
        let denied = [Call::MemoryAccess { view, gfn: GFN }, Call::SetMemoryAccess { view, gfn: GFN, access: MemoryAccess::X }];
        let frame = Gfn(8);
        let mut page = vec![0; 4096];
        page[..4].copy_from_slice(&[1, 2, 0xcc, 4]);
        let built = [
            Call::AllocateFrames { count: 1 },
            Call::Write { pa: frame.pa(0), bytes: page },
            Call::Remap { view, gfn: GFN, frame: Some(frame) },
        ];
        let allowed = Call::SetMemoryAccess { view, gfn: GFN, access: MemoryAccess::RWX };
        if monitored {
            controller.monitor(&mut vmi, GFN, view).unwrap();
        }
        controller.insert_breakpoint(&mut vmi, Pa(0x2002), view).unwrap();
        assert_eq!(vmi.driver_mut().take_calls(), [&denied[..], &built[..]].concat());
        if monitored {
            // In the wrong order nothing is exposed either.
            controller.unmonitor(&mut vmi, GFN, view).unwrap();
            assert_eq!(vmi.driver_mut().take_calls(), []);
            assert!(controller.unmonitor(&mut vmi, GFN, view).is_err());
        }
        controller.remove_breakpoint(&mut vmi, Pa(0x2002), view).unwrap();
        let taken = [Call::Remap { view, gfn: GFN, frame: None }, allowed, Call::FreeFrames { frames: vec![frame] }];
        assert_eq!(vmi.driver_mut().take_calls(), taken);
    }
}

#[test]
fn monitor_restores_what_it_found_and_counts_with_other_denials() {
    let (mut vmi, view) = guest();
    vmi.driver_mut().set_memory_access(view, GFN, MemoryAccess::RX).unwrap();
    let before = vmi.driver().snapshot();
    let mut controller = BreakpointController::new();
    let access = |vmi: &Vmi| vmi.driver().memory_access(view, GFN).unwrap();
    controller.monitor(&mut vmi, GFN, view).unwrap();
    controller.monitor(&mut vmi, GFN, view).unwrap();
    controller.rights().deny(&mut vmi, GFN, view, MemoryAccess::R).unwrap();
    assert_eq!((access(&vmi), controller.rights().denied(GFN, view)), (MemoryAccess::X, MemoryAccess::RW));
    controller.unmonitor(&mut vmi, GFN, view).unwrap();
    controller.unmonitor(&mut vmi, GFN, view).unwrap();
    // Somebody else's denial is not theirs to take back.
    assert!(controller.unmonitor(&mut vmi, GFN, view).is_err());
    assert_eq!(access(&vmi), MemoryAccess::X);
    controller.rights().allow(&mut vmi, GFN, view, MemoryAccess::R).unwrap();
    assert!(controller.rights().allow(&mut vmi, GFN, view, MemoryAccess::R).is_err());
    assert_eq!(vmi.driver().snapshot(), before);
}

#[test]
fn denying_reads_denies_writes_too_because_no_machine_has_write_only_pages() {
    let (mut vmi, view) = guest();
    let mut rights = Rights::new();
    rights.deny(&mut vmi, GFN, view, MemoryAccess::R).unwrap();
    assert_eq!(vmi.driver().memory_access(view, GFN).unwrap(), MemoryAccess::X);
    rights.deny(&mut vmi, GFN, view, MemoryAccess::X).unwrap();
    rights.allow(&mut vmi, GFN, view, MemoryAccess::R).unwrap();
    assert_eq!(vmi.driver().memory_access(view, GFN).unwrap(), MemoryAccess::RW);
    rights.clear(&mut vmi).unwrap();
    assert_eq!(vmi.driver().memory_access(view, GFN).unwrap(), MemoryAccess::RWX);
    assert!(rights.is_empty());
}

#[test]
fn whichever_call_fails_nothing_has_changed_and_a_retry_does_it() {
    let with = || {
        let (vmi, view, _, controller) = planted();
        (vmi, (view, controller))
    };
    let empty = || {
        let (vmi, view) = guest();
        (vmi, (view, BreakpointController::new()))
    };
    each_call_failing(empty, |vmi, (view, c): &mut World| c.insert_breakpoint(vmi, Pa(0x2001), *view));
    each_call_failing(empty, |vmi, (view, c): &mut World| c.monitor(vmi, GFN, *view));
    each_call_failing(empty, |vmi, (view, c): &mut World| c.monitor_many(vmi, &[GFN, Gfn(3), Gfn(4)], *view));
    each_call_failing(empty, |vmi, (view, c): &mut World| c.monitor_many(vmi, &[GFN, Gfn(3), GFN], *view));
    each_call_failing(empty, |vmi, (view, c): &mut World| c.insert_page(vmi, GFN, &[5, 4095, 5, 0], *view));
    each_call_failing(with, |vmi, (view, c): &mut World| c.insert_page(vmi, GFN, &[5, 1, 9], *view));
    each_call_failing(with, |vmi, (view, c): &mut World| c.remove_breakpoint(vmi, Pa(0x2001), *view));
    // The last of a page that nobody monitors.
    each_call_failing(with, |vmi, (view, c): &mut World| c.remove_breakpoint(vmi, Pa(0x3000), *view));
    let written = || {
        let (mut vmi, world) = with();
        vmi.driver_mut().poke(Pa(0x2000), &[9; 8]).unwrap();
        (vmi, world)
    };
    each_call_failing(written, |vmi, (_, c): &mut World| c.refresh(vmi, GFN));
    each_call_failing(with, |vmi, (_, c): &mut World| c.write(vmi, Pa(0x2ffe), &[7; 4]));
    each_call_failing(
        || {
            let (mut vmi, view) = guest();
            let mut controller = BreakpointController::new();
            controller.monitor(&mut vmi, GFN, view).unwrap();
            (vmi, (view, controller))
        },
        |vmi, (view, c): &mut World| c.unmonitor(vmi, GFN, *view),
    );
}

#[test]
fn an_undo_that_fails_too_says_what_it_left_behind() {
    let (mut vmi, view) = guest();
    let mut controller = BreakpointController::new();
    controller.monitor(&mut vmi, GFN, view).unwrap();
    // Allocate, write; the write fails, and so does giving the frame back.
    vmi.driver_mut().fail_nth(2);
    vmi.driver_mut().fail_nth(3);
    let error = controller.insert_breakpoint(&mut vmi, Pa(0x2001), view).unwrap_err();
    let VmiError::UndoFailed { cause, left_behind } = error else { panic!("{error}") };
    assert!(matches!(*cause, VmiError::Driver { op: "write", .. }) && left_behind.contains("frame 0x8"), "{left_behind}");
}

#[test]
fn clear_does_what_it_can_says_what_is_left_and_does_the_rest_later() {
    for n in 1.. {
        let (mut vmi, view, other, mut controller) = planted();
        controller.rights().deny(&mut vmi, Gfn(5), view, MemoryAccess::W).unwrap();
        vmi.driver_mut().fail_nth(n);
        let result = controller.clear(&mut vmi);
        let done = vmi.driver().faults_left() > 0;
        if !done {
            assert!(matches!(result, Err(VmiError::UndoFailed { .. })), "{n}: {result:?}");
            // Whatever is still shown is still execute-only.
            for (view, held) in &vmi.driver().state().views {
                for gfn in held.remaps.keys() {
                    assert_eq!(vmi.driver().memory_access(*view, *gfn).unwrap(), MemoryAccess::X, "{n}");
                }
            }
            controller.clear(&mut vmi).unwrap();
        }
        let (fresh, ..) = guest();
        let state = vmi.driver().snapshot();
        assert_eq!(state.views[&view], fresh.driver().snapshot().views[&View(1)], "{n}");
        assert!(state.views[&other].remaps.is_empty() && state.views[&other].pages.is_empty());
        assert_eq!((vmi.driver().frames_in_use(), controller.shadow_frames()), (0, 0), "{n}");
        assert!(controller.rights().is_empty() && !controller.hides_anywhere(GFN));
        if done {
            assert!(n > 5);
            return;
        }
    }
}

#[test]
fn frames_go_back_after_every_last_breakpoint() {
    let (mut vmi, view) = guest();
    let mut controller = BreakpointController::new();
    let before = vmi.driver().snapshot();
    for round in 0..10_000_u64 {
        let pa = Pa(0x1000 + (round * 7) % 0x4000);
        controller.insert_breakpoint(&mut vmi, pa, view).unwrap();
        controller.remove_breakpoint(&mut vmi, pa, view).unwrap();
    }
    assert_eq!((vmi.driver().frames_in_use(), vmi.driver().frames_peak()), (0, 1));
    assert_eq!(vmi.driver().snapshot(), before);
}

#[test]
fn many_on_one_page_cost_one_copy_and_one_remap() {
    let (mut vmi, view) = guest();
    let mut controller = BreakpointController::new();
    controller.monitor_many(&mut vmi, &[GFN, Gfn(3)], view).unwrap();
    let pages = vec![(GFN, MemoryAccess::X), (Gfn(3), MemoryAccess::X)];
    assert_eq!(vmi.driver_mut().take_calls()[2..], [Call::SetMemoryAccessMulti { view, pages }]);
    controller.insert_page(&mut vmi, GFN, &(0..2048).collect::<Vec<_>>(), view).unwrap();
    assert_eq!(vmi.driver_mut().take_calls().len(), 3);
    controller.insert_page(&mut vmi, GFN, &[0, 3000, 3002], view).unwrap();
    assert_eq!(vmi.driver_mut().take_calls(), [Call::Write { pa: Gfn(8).pa(3000), bytes: vec![0xcc, 0, 0xcc] }]);
    assert_eq!(controller.breakpoints_on(view, GFN).count(), 2050);
}

#[test]
fn refresh_plants_breakpoints_over_new_bytes_in_every_view() {
    let (mut vmi, view, other, mut controller) = planted();
    vmi.driver_mut().poke(Pa(0x2000), &[9; 8]).unwrap();
    vmi.driver_mut().take_calls();
    controller.refresh(&mut vmi, GFN).unwrap();
    assert_eq!(shown(&vmi, view)[..8], [9, 0xcc, 9, 0xcc, 9, 9, 9, 9]);
    assert_eq!(shown(&vmi, other)[..8], [9, 9, 0xcc, 9, 9, 9, 9, 9]);
    // No write took a breakpoint away for a moment.
    for call in vmi.driver_mut().take_calls() {
        let Call::Write { bytes, .. } = call else { panic!("{call:?}") };
        assert!(bytes[1..3].contains(&0xcc));
    }
    controller.refresh(&mut vmi, Gfn(5)).unwrap();
    assert_eq!(vmi.driver_mut().take_calls(), []);
    controller.remove_breakpoint(&mut vmi, Pa(0x2001), view).unwrap();
    assert_eq!(shown(&vmi, view)[..4], [9, 9, 9, 0xcc]);
}

#[test]
fn a_write_from_outside_keeps_breakpoints_and_keeps_them_hidden() {
    let (mut vmi, view, other, mut controller) = planted();
    controller.write(&mut vmi, Pa(0x2ffe), &[5, 6, 7, 8]).unwrap();
    assert_eq!(vmi.driver().peek(Pa(0x2ffe), 4).unwrap(), [5, 6, 7, 8]);
    assert_eq!(shown(&vmi, view)[0xffe..0x1002], [5, 0xcc, 0xcc, 8]);
    assert_eq!(shown(&vmi, other)[0xffe..0x1002], [5, 6, 7, 8]);
    let before = vmi.driver().snapshot();
    assert!(matches!(controller.write(&mut vmi, Pa(0x7fff), &[1, 2]), Err(VmiError::OutOfRange { .. })));
    assert!(matches!(controller.write(&mut vmi, Pa(u64::MAX), &[1, 2]), Err(VmiError::OutOfRange { .. })));
    assert_eq!(vmi.driver().snapshot(), before);
}

#[test]
fn what_cannot_be_tapped_is_refused_without_a_change() {
    let (mut vmi, view) = guest();
    let mut controller = BreakpointController::new();
    let before = vmi.driver().snapshot();
    let insert = controller.insert_breakpoint(&mut vmi, Pa(0x2000), View::DEFAULT);
    assert_eq!(insert, Err(VmiError::DefaultView { op: "insert_breakpoint" }));
    assert!(matches!(controller.monitor(&mut vmi, GFN, View::DEFAULT), Err(VmiError::DefaultView { .. })));
    let missing = Err(VmiError::ViewNotFound { view: View(9) });
    assert_eq!(controller.insert_breakpoint(&mut vmi, Pa(0x2000), View(9)), missing);
    assert_eq!(controller.monitor(&mut vmi, GFN, View(9)), missing);
    assert!(matches!(controller.insert_breakpoint(&mut vmi, Pa(0x8000), view), Err(VmiError::OutOfRange { .. })));
    assert!(matches!(controller.insert_breakpoint(&mut vmi, Pa(u64::MAX), view), Err(VmiError::OutOfRange { .. })));
    assert!(matches!(controller.monitor_many(&mut vmi, &[GFN, Gfn(8)], view), Err(VmiError::OutOfRange { .. })));
    assert!(controller.insert_page(&mut vmi, GFN, &[1, 4096], view).is_err());
    assert_eq!(vmi.driver().snapshot(), before);
    assert!(controller.rights().is_empty());
}

fn int3(view: Option<View>, rip: u64, gfn: Gfn) -> VmiEvent {
    let mut registers = Registers::default();
    registers.gp.rip = rip;
    VmiEvent { vcpu: VcpuId(0), view, registers, reason: EventReason::Breakpoint { gfn, insn_len: 1 } }
}

#[test]
fn the_guests_own_breakpoint_is_told_from_ours_and_can_be_tapped() {
    let (mut vmi, view) = guest();
    let mut controller = BreakpointController::new();
    vmi.driver_mut().poke(Pa(0x2010), &[0xcc, 0xcd, 0x03, 0xcd, 0x80]).unwrap();
    for pa in [0x2001, 0x2010] {
        controller.insert_breakpoint(&mut vmi, Pa(pa), view).unwrap();
    }
    let own = |rip| BreakpointController::is_breakpoint(&vmi, &int3(Some(view), rip, GFN)).unwrap();
    assert_eq!([0x7001, 0x7010, 0x7011, 0x7013].map(own), [false, true, true, false]);
    assert_eq!(controller.check_event(&int3(Some(view), 0x7001, GFN)), Some((view, GFN)));
    assert_eq!(controller.check_event(&int3(None, 0x7001, GFN)), None);
    controller.remove_breakpoint(&mut vmi, Pa(0x2010), view).unwrap();
    assert_eq!(shown(&vmi, view)[0x10], 0xcc);
}

#[test]
fn the_memory_controller_traps_execution_and_touches_no_byte() {
    let (mut vmi, view) = guest();
    let before = vmi.driver().snapshot();
    let mut controller: Box<dyn TapController<MockDriver> + Send> = Box::new(MemoryController::new());
    let pa = Pa(0x2001);
    controller.monitor(&mut vmi, GFN, view).unwrap();
    controller.insert_breakpoint(&mut vmi, pa, view).unwrap();
    let calls = vmi.driver_mut().take_calls();
    assert_eq!(calls[1..], [Call::SetMemoryAccess { view, gfn: GFN, access: MemoryAccess::RW }]);
    let mut event = int3(Some(view), 0x7001, GFN);
    assert_eq!(controller.check_event(&event), None);
    event.reason = EventReason::MemoryAccess { pa, va: None, access: MemoryAccess::X, len: 1 };
    assert_eq!(controller.check_event(&event), Some((view, GFN)));
    controller.remove_breakpoint(&mut vmi, pa, view).unwrap();
    assert!(controller.remove_breakpoint(&mut vmi, pa, view).is_err());
    controller.unmonitor(&mut vmi, GFN, view).unwrap();
    assert_eq!(vmi.driver().snapshot(), before);
}
