//! Breakpoints in shadow pages and counted rights, on the mock driver.

use vmitap::arch::amd64::{AddressContext, Registers};
use vmitap::core::VmiCore;
use vmitap::driver::mock::{Call, CallKind, MockDriver};
use vmitap::driver::{Caps, VmiFrames, VmiInfo, VmiProtection, VmiViews};
use vmitap::event::{EventReason, VmiEvent};
use vmitap::tap::{Breakpoint, BreakpointController, BreakpointManager, MemoryController, Rights, TapController, TapEvents};
use vmitap::{Gfn, MemoryAccess, Pa, Va, VcpuId, View, VmiError};

type Vmi = VmiCore<MockDriver>;
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

/// Points on the page `GFN`.
fn on_page(view: View, offsets: &[u64]) -> Vec<(View, Pa)> {
    offsets.iter().map(|offset| (view, GFN.pa(*offset))).collect()
}

fn shown(vmi: &Vmi, view: View) -> Vec<u8> {
    vmi.driver().peek_in_view(view, Pa(0x2000), 0x2000).unwrap()
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
        let denied =
            vec![Call::MemoryAccess { view, gfn: GFN }, Call::SetMemoryAccess { view, gfn: GFN, access: MemoryAccess::X }];
        let frame = Gfn(8);
        let mut page = vec![0; 4096];
        page[..4].copy_from_slice(&[1, 2, 0xcc, 4]);
        let allocated = vec![Call::AllocateFrames { count: 1 }];
        let built = vec![Call::Write { pa: frame.pa(0), bytes: page }, Call::Remap { view, gfn: GFN, frame: Some(frame) }];
        let allowed = Call::SetMemoryAccess { view, gfn: GFN, access: MemoryAccess::RWX };
        if monitored {
            controller.monitor(&mut vmi, GFN, view).unwrap();
        }
        controller.insert_breakpoint(&mut vmi, Pa(0x2002), view).unwrap();
        let order = if monitored { [denied, allocated, built] } else { [allocated, denied, built] };
        assert_eq!(vmi.driver_mut().take_calls(), order.concat());
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
fn beside_others_putting_one_in_and_taking_it_out_costs_no_frame_and_the_last_gives_all_back() {
    let (mut vmi, view) = guest();
    let mut controller = BreakpointController::new();
    let pages: Vec<_> = (0..6).map(|gfn| (view, Gfn(gfn).pa(5))).collect();
    controller.insert_many(&mut vmi, &pages).unwrap();
    assert_eq!(vmi.driver().count_of(CallKind::AllocateFrames), 1);
    vmi.driver_mut().take_calls();
    for _ in 0..1000 {
        controller.remove_many(&mut vmi, &pages[3..]).unwrap();
        controller.insert_many(&mut vmi, &pages[3..]).unwrap();
    }
    let frame_calls = |vmi: &Vmi| vmi.driver().count_of(CallKind::AllocateFrames) + vmi.driver().count_of(CallKind::FreeFrames);
    assert_eq!((frame_calls(&vmi), vmi.driver().frames_in_use()), (0, 6));
    // Never more spare ones than are in use, and those that lie highest go first.
    controller.remove_many(&mut vmi, &pages[2..]).unwrap();
    assert_eq!((vmi.driver().frames_in_use(), vmi.driver().peek(Gfn(8 + 4).pa(0), 1).is_err()), (4, true));
    controller.remove_many(&mut vmi, &pages[..2]).unwrap();
    assert_eq!((vmi.driver().frames_in_use(), vmi.driver().frames_peak(), controller.shadow_frames()), (0, 6, 0));
}

#[test]
fn sixty_thousand_on_fifteen_thousand_pages_cost_a_remap_and_at_most_one_access_call_a_page() {
    for (multi_access, pages) in [(true, 15_000), (false, 1_500)] {
        let mut driver = MockDriver::new((pages as u64 + 1) << 12, 1);
        let view = driver.create_view(MemoryAccess::RWX).unwrap();
        driver.set_caps(Caps { multi_access, ..driver.caps() });
        let before = driver.snapshot();
        let mut vmi = VmiCore::new(Box::new(driver));
        let mut controller = BreakpointController::new();
        let mut manager = BreakpointManager::new();
        let points = (0..4 * pages as u64).map(|n| {
            let pa = Pa((n % pages as u64) << 12 | (n / pages as u64) << 8);
            let context = AddressContext::new(Pa(0));
            (Breakpoint { view, va: Va(pa.0), context, key: 1, tag: (), global: true }, Some(pa))
        });
        let new = manager.insert_many_with_hints(&mut vmi, &mut controller, points.collect()).unwrap();
        assert_eq!(new.into_iter().filter(|new| *new).count(), 4 * pages);
        let count = |vmi: &Vmi, kind| vmi.driver().count_of(kind);
        let costs = |vmi: &Vmi| {
            let kinds = [CallKind::Remap, CallKind::SetMemoryAccess, CallKind::SetMemoryAccessMulti, CallKind::AllocateFrames];
            kinds.map(|kind| count(vmi, kind))
        };
        let access = if multi_access { [0, 1] } else { [pages, 0] };
        assert_eq!(costs(&vmi), [pages, access[0], access[1], 1]);
        // What the rights were is asked once, and a page's copy is written once.
        assert_eq!((count(&vmi, CallKind::MemoryAccess), count(&vmi, CallKind::Write)), (pages, pages));
        assert_eq!(vmi.driver().frames_in_use(), pages);
        vmi.driver_mut().take_calls();
        assert_eq!(manager.remove_by_view(&mut vmi, &mut controller, view).unwrap(), 4 * pages);
        assert_eq!(costs(&vmi), [pages, access[0], access[1], 0]);
        assert_eq!((count(&vmi, CallKind::FreeFrames), count(&vmi, CallKind::Write)), (1, 0));
        assert_eq!(vmi.driver().snapshot().differences(&before), [] as [String; 0]);
    }
}

#[test]
fn many_on_one_page_cost_one_copy_and_one_remap() {
    let (mut vmi, view) = guest();
    let mut controller = BreakpointController::new();
    controller.monitor_many(&mut vmi, &[(view, GFN), (view, Gfn(3))]).unwrap();
    let pages = vec![(GFN, MemoryAccess::X), (Gfn(3), MemoryAccess::X)];
    assert_eq!(vmi.driver_mut().take_calls()[2..], [Call::SetMemoryAccessMulti { view, pages }]);
    controller.insert_many(&mut vmi, &on_page(view, &(0..2048).collect::<Vec<_>>())).unwrap();
    assert_eq!(vmi.driver_mut().take_calls().len(), 3);
    controller.insert_many(&mut vmi, &on_page(view, &[0, 3000, 3002])).unwrap();
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
    assert!(matches!(controller.monitor_many(&mut vmi, &[(view, GFN), (view, Gfn(8))]), Err(VmiError::OutOfRange { .. })));
    assert!(controller.insert_many(&mut vmi, &[(view, Pa(0x2001)), (View::DEFAULT, Pa(0x2001))]).is_err());
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
