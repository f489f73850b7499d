//! Cleaning up after a session that ended without a word.

use std::time::Duration;

use vmitap::arch::amd64::Registers;
use vmitap::driver::mock::MockDriver;
use vmitap::driver::{Additions, VmiDriver, VmiEvents, VmiRepair, VmiViews, Wait};
use vmitap::event::{EventReason, VmiEvent};
use vmitap::{Gfn, MemoryAccess, VcpuId, View};

fn int3(view: View) -> VmiEvent {
    let reason = EventReason::Breakpoint { gfn: Gfn(1), insn_len: 1 };
    VmiEvent { vcpu: VcpuId(0), view: Some(view), registers: Registers::default(), reason }
}

/// What a driver adds to its guest is listed, and nothing else.
fn additions_are_listed(driver: &mut dyn VmiDriver) {
    assert_eq!(driver.additions().unwrap(), Additions::default());
    let views: Vec<View> = (0..3).map(|_| driver.create_view(MemoryAccess::RWX).unwrap()).collect();
    let frames: Vec<Gfn> = (0..3).map(|_| driver.allocate_frame().unwrap()).collect();
    driver.pause().unwrap();
    assert_eq!(driver.additions().unwrap(), Additions { views: views.clone(), frames: frames.clone(), is_paused: true });
    driver.destroy_view(views[1]).unwrap();
    driver.free_frame(frames[1]).unwrap();
    driver.resume().unwrap();
    let left = Additions { views: vec![views[0], views[2]], frames: vec![frames[0], frames[2]], is_paused: false };
    assert_eq!(driver.additions().unwrap(), left);
}

#[test]
fn what_was_added_to_a_guest_is_listed() {
    additions_are_listed(&mut MockDriver::new(1 << 20, 1));
    #[cfg(feature = "emu")]
    additions_are_listed(&mut crate::guest::Lab::of("calls.S").vm);
}

#[test]
fn a_held_vcpu_is_released_into_the_default_view() {
    let mut driver = MockDriver::new(1 << 20, 2);
    let view = driver.create_view(MemoryAccess::RWX).unwrap();
    driver.switch_to_view(view).unwrap();
    driver.push_event(int3(view));
    assert!(matches!(driver.wait(Duration::ZERO).unwrap(), Wait::Event(_)));
    assert_eq!(driver.release_held().unwrap(), 1);
    assert_eq!(driver.release_held().unwrap(), 0);
    for vcpu in [VcpuId(0), VcpuId(1)] {
        assert_eq!(driver.vcpu_view(vcpu).unwrap(), View::DEFAULT);
    }
    assert!(driver.state().vcpus[0].pending.is_none());
}
