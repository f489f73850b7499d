//! Breakpoints in shadow pages, on the mock driver.

use vmitap::core::VmiCore;
use vmitap::driver::mock::MockDriver;
use vmitap::driver::{VmiFrames, VmiViews};
use vmitap::tap::{BreakpointController, TapController};
use vmitap::{MemoryAccess, Pa, View};

fn guest() -> (VmiCore<MockDriver>, View) {
    let mut driver = MockDriver::new(0x8000, 1);
    driver.poke(Pa(0x2000), &[1, 2, 3, 4]).unwrap();
    let view = driver.create_view(MemoryAccess::RWX).unwrap();
    (VmiCore::new(Box::new(driver)), view)
}

#[test]
fn a_breakpoint_shows_in_its_view_alone_and_goes_without_a_trace() {
    let (mut vmi, view) = guest();
    let mut controller = BreakpointController::default();
    let (first, last) = (Pa(0x2001), Pa(0x2fff));
    let before = vmi.driver().snapshot();
    controller.monitor(&mut vmi, first.gfn(), view).unwrap();
    for pa in [first, first, last] {
        controller.insert_breakpoint(&mut vmi, pa, view).unwrap();
    }
    let shown = |vmi: &VmiCore<MockDriver>| vmi.driver().peek_in_view(view, Pa(0x2000), 4096).unwrap();
    assert_eq!((shown(&vmi)[..4].to_vec(), shown(&vmi)[4095]), (vec![1, 0xcc, 3, 4], 0xcc));
    let mut bytes = [0; 4];
    vmi.read_pa(Pa(0x2000), &mut bytes).unwrap();
    assert_eq!(bytes, [1, 2, 3, 4]);
    assert_eq!(vmi.driver().snapshot().views[&view].pages[&first.gfn()], MemoryAccess::X);
    // The first of two references leaves it planted.
    controller.remove_breakpoint(&mut vmi, first, view).unwrap();
    assert_eq!(shown(&vmi)[1], 0xcc);
    controller.remove_breakpoint(&mut vmi, first, view).unwrap();
    assert_eq!((shown(&vmi)[1], shown(&vmi)[4095]), (2, 0xcc));
    controller.remove_breakpoint(&mut vmi, last, view).unwrap();
    controller.unmonitor(&mut vmi, first.gfn(), view).unwrap();
    assert_eq!(vmi.driver().snapshot().differences(&before), [] as [String; 0]);
    assert_eq!(vmi.driver().frames_in_use(), 0);
}

#[test]
fn whichever_call_of_an_insert_fails_nothing_has_changed_and_a_retry_does_it() {
    for n in 1.. {
        let (mut vmi, view) = guest();
        let mut controller = BreakpointController::default();
        controller.monitor(&mut vmi, Pa(0x2000).gfn(), view).unwrap();
        let before = vmi.driver().snapshot();
        vmi.driver_mut().fail_nth(n);
        let result = controller.insert_breakpoint(&mut vmi, Pa(0x2001), view);
        if vmi.driver().faults_left() > 0 {
            assert!(n > 2);
            return result.unwrap();
        }
        assert!(result.is_err(), "call {n}");
        assert_eq!(vmi.driver().snapshot().differences(&before), [] as [String; 0], "call {n}");
        controller.insert_breakpoint(&mut vmi, Pa(0x2001), view).unwrap();
    }
}
