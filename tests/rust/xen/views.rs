//! Views, rights and frames, and the traps that Xen has there.

use vmitap::core::VmiCore;
use vmitap::driver::{VmiControl, VmiFrames, VmiInfo, VmiProtection, VmiRead, VmiRepair, VmiViews, VmiWrite};
use vmitap::tap::{BreakpointController, TapController};
use vmitap::{Gfn, MemoryAccess, Pa, View, VmiError};
use xen_sys::fake::Kind;

use super::{CODE, attach, guest, is_untouched, tapped};

const XEN: Kind = Kind::new(7, 17);
const CALLS: &[&str] = &[
    "xc_altp2m_set_mem_access",
    "xc_altp2m_set_mem_access_multi",
    "xc_altp2m_get_mem_access",
    "xc_altp2m_change_gfn",
    "xc_domain_populate_physmap_exact",
    "xc_domain_setmaxmem",
    "xc_domain_pause",
    "xc_domain_unpause",
];

#[test]
fn no_breakpoint_is_ever_readable_while_the_guest_runs() {
    for kind in Kind::ALL {
        let mut lab = tapped(kind, &[0x90; 16]);
        for page in 9..20 {
            lab.controller.insert_breakpoint(&mut lab.vmi, Pa(page << 12), lab.view).unwrap();
        }
        for page in 9..20 {
            lab.controller.remove_breakpoint(&mut lab.vmi, Pa(page << 12), lab.view).unwrap();
        }
        assert_eq!(lab.fake.state("exposures", 0), 0);
        assert_eq!(lab.fake.access(lab.view.0.into(), 9), 7);
        assert_eq!(lab.fake.access(lab.view.0.into(), 8), 4);
        assert_eq!((lab.fake.byte(lab.view.0.into(), 0x8000), lab.fake.byte(0, 0x8000)), (0xcc, 0x90));
    }
}

#[test]
fn inserts_cost_two_hypercalls_and_a_map_a_page_and_less_in_bulk() {
    let fake = guest(XEN);
    let mut vmi = VmiCore::new(Box::new(attach(&fake)));
    let view = vmi.driver_mut().create_view(MemoryAccess::RWX).unwrap();
    let mut controller = BreakpointController::new();
    let count = || CALLS.iter().map(|call| fake.calls(call)).sum::<i64>();
    fake.forget_calls();
    controller.insert_breakpoint(&mut vmi, Pa(0x8000), view).unwrap();
    assert_eq!((count(), fake.calls("xenforeignmemory_map")), (2, 1), "already the first one");
    for page in 9..40 {
        controller.insert_breakpoint(&mut vmi, Pa(page << 12), view).unwrap();
    }
    let (calls, maps) = (count(), fake.calls("xenforeignmemory_map"));
    println!("32 pages, one by one: {calls} hypercalls, {maps} maps");
    assert!(calls <= 32 * 2 + 12, "{calls} hypercalls for 32 pages");
    assert!(maps <= 32 + 4, "{maps} maps for 32 pages");
    // A second breakpoint on a page costs nothing.
    fake.forget_calls();
    controller.insert_breakpoint(&mut vmi, Pa(0x8001), view).unwrap();
    assert_eq!((count(), fake.calls("xenforeignmemory_map")), (0, 0));
    drop(vmi);
    is_untouched(&fake);

    let fake = guest(XEN);
    let mut vmi = VmiCore::new(Box::new(attach(&fake)));
    let view = vmi.driver_mut().create_view(MemoryAccess::RWX).unwrap();
    let mut controller = BreakpointController::new();
    fake.forget_calls();
    let pages: Vec<(View, Gfn)> = (8..40).map(|page| (view, Gfn(page))).collect();
    let points: Vec<(View, Pa)> = (8..40).flat_map(|page| (0..4).map(move |at| (view, Gfn(page).pa(at)))).collect();
    controller.monitor_many(&mut vmi, &pages).unwrap();
    controller.insert_many(&mut vmi, &points).unwrap();
    let calls = CALLS.iter().map(|call| fake.calls(call)).sum::<i64>();
    println!("128 breakpoints on 32 pages: {calls} hypercalls");
    assert!(calls <= 32 * 2, "{calls} hypercalls for 32 pages in bulk");
}

#[test]
fn rights_are_kept_when_another_frame_is_shown_and_when_it_goes() {
    let fake = guest(XEN);
    let mut driver = attach(&fake);
    let view = driver.create_view(MemoryAccess::RWX).unwrap();
    let frame = driver.allocate_frame().unwrap();
    assert_eq!(frame, Gfn(64));
    driver.write(frame.pa(0), &[0xab]).unwrap();
    for rights in [MemoryAccess::X, MemoryAccess::NONE, MemoryAccess::RX, MemoryAccess::RWX, MemoryAccess::X] {
        driver.set_memory_access(view, Gfn(9), rights).unwrap();
        driver.remap(view, Gfn(9), Some(frame)).unwrap();
        assert_eq!(fake.access(view.0.into(), 9), i32::from(rights.bits()));
        assert_eq!(fake.byte(view.0.into(), 0x9000), 0xab);
        assert_eq!(driver.memory_access(view, Gfn(9)).unwrap(), rights);
        driver.remap(view, Gfn(9), None).unwrap();
        assert_eq!((fake.access(view.0.into(), 9), fake.byte(view.0.into(), 0x9000)), (rights.bits().into(), 0));
    }
    assert_eq!(fake.state("pauses", 0), 0);
}

#[test]
fn rights_in_the_default_view_do_not_take_the_breakpoints_of_others_away() {
    let mut lab = tapped(XEN, &[0x90; 4]);
    let (view, driver) = (lab.view, lab.vmi.driver_mut());
    driver.set_memory_access(View::DEFAULT, Gfn(8), MemoryAccess::RX).unwrap();
    assert_eq!(driver.memory_access(View::DEFAULT, Gfn(8)).unwrap(), MemoryAccess::RX);
    assert_eq!((lab.fake.access(view.0.into(), 8), lab.fake.byte(view.0.into(), CODE as i64)), (4, 0xcc));
    driver.set_memory_access(View::DEFAULT, Gfn(8), MemoryAccess::RWX).unwrap();
    assert_eq!((lab.fake.access(view.0.into(), 8), lab.fake.byte(view.0.into(), CODE as i64)), (4, 0xcc));
}

#[test]
fn frames_go_back_to_the_pool_and_to_xen_only_when_no_view_is_left() {
    let mut lab = tapped(XEN, &[0x90; 4]);
    for page in 9..30 {
        lab.controller.insert_breakpoint(&mut lab.vmi, Pa(page << 12), lab.view).unwrap();
        lab.controller.remove_breakpoint(&mut lab.vmi, Pa(page << 12), lab.view).unwrap();
    }
    assert_eq!((lab.fake.calls("xc_domain_decrease_reservation_exact"), lab.fake.state("wiped", 0)), (0, 0));
    assert!(lab.fake.state("populated", 0) <= 64 + 8, "frames are used again");
    lab.controller.clear(&mut lab.vmi).unwrap();
    drop(lab.vmi);
    is_untouched(&lab.fake);
}

#[test]
fn frames_are_contiguous_above_the_guest_and_all_or_none() {
    let fake = guest(XEN);
    let mut driver = attach(&fake);
    assert_eq!(driver.allocate_frames(40).unwrap(), (64..104).map(Gfn).collect::<Vec<_>>());
    driver.free_frames(&[Gfn(70), Gfn(66)]).unwrap();
    assert_eq!(driver.allocate_frames(2).unwrap(), [Gfn(66), Gfn(70)]);
    assert!(driver.free_frames(&[Gfn(66), Gfn(66)]).is_err());
    assert!(driver.free_frames(&[Gfn(66), Gfn(9)]).is_err());
    assert_eq!(driver.frames_in_use(), 40);
    fake.fail("xenforeignmemory_map", 1, 12);
    let before = fake.state("populated", 0);
    assert!(driver.allocate_frames(100).is_err());
    assert_eq!((driver.frames_in_use(), fake.state("populated", 0)), (40, before));
    assert_eq!(driver.allocate_frames(100).unwrap().len(), 100);
    let view = driver.create_view(MemoryAccess::RWX).unwrap();
    driver.remap(view, Gfn(9), Some(Gfn(66))).unwrap();
    assert!(matches!(driver.free_frame(Gfn(66)), Err(VmiError::InvalidArgument { .. })));
    drop(driver);
    is_untouched(&fake);
}

#[test]
fn views_are_made_until_xen_has_no_more() {
    let fake = guest(XEN);
    let mut driver = attach(&fake);
    let views: Vec<View> = std::iter::from_fn(|| driver.create_view(MemoryAccess::RWX).ok()).collect();
    assert_eq!(views.len(), usize::from(driver.caps().max_views));
    let error = driver.create_view(MemoryAccess::RWX).unwrap_err();
    assert!(error.to_string().contains("no room for another view"), "{error}");
    assert_eq!(driver.additions().unwrap().views, views);
    driver.switch_to_view(views[2]).unwrap();
    assert!(matches!(driver.destroy_view(views[2]), Err(VmiError::Driver { errno: 16, .. })));
    driver.destroy_view(views[3]).unwrap();
    assert!(matches!(driver.switch_to_view(views[3]), Err(VmiError::ViewNotFound { .. })));
    assert!(matches!(driver.remap(View::DEFAULT, Gfn(1), None), Err(VmiError::DefaultView { .. })));
}

#[test]
fn a_view_without_all_rights_has_them_on_every_page() {
    let fake = guest(XEN);
    let mut driver = attach(&fake);
    let view = driver.create_view(MemoryAccess::RX).unwrap();
    assert!((0..64).all(|page| fake.access(view.0.into(), page) == 5));
    assert_eq!(driver.memory_access(view, Gfn(20)).unwrap(), MemoryAccess::RX);
    driver.set_memory_access(view, Gfn(20), MemoryAccess::RWX).unwrap();
    let frame = driver.allocate_frame().unwrap();
    driver.remap(view, Gfn(21), Some(frame)).unwrap();
    driver.remap(view, Gfn(21), None).unwrap();
    assert_eq!((fake.access(view.0.into(), 20), fake.access(view.0.into(), 21)), (7, 5));
}

#[test]
fn rights_that_no_page_can_have_and_pages_that_are_none_are_refused() {
    let fake = guest(XEN);
    let mut driver = attach(&fake);
    let view = driver.create_view(MemoryAccess::RWX).unwrap();
    let bad = driver.set_memory_access(view, Gfn(9), MemoryAccess::WX);
    assert!(matches!(bad, Err(VmiError::BadAccess { .. })));
    let many = [(Gfn(9), MemoryAccess::X), (Gfn(64), MemoryAccess::X)];
    assert!(matches!(driver.set_memory_access_multi(view, &many), Err(VmiError::OutOfRange { .. })));
    assert_eq!(fake.access(view.0.into(), 9), 7);
    fake.fail("xc_altp2m_set_mem_access_multi", 1, 12);
    assert!(driver.set_memory_access_multi(view, &[(Gfn(9), MemoryAccess::X), (Gfn(10), MemoryAccess::X)]).is_err());
    assert_eq!(driver.memory_access(view, Gfn(9)).unwrap(), MemoryAccess::RWX);
    let mut byte = [0];
    assert!(matches!(driver.read(Pa(64 << 12), &mut byte), Err(VmiError::OutOfRange { .. })));
    assert!(matches!(driver.write(Pa((64 << 12) - 1), &[1, 2]), Err(VmiError::OutOfRange { .. })));
    assert_eq!(fake.byte(0, (64 << 12) - 1), 0);
}

#[test]
fn an_insert_that_fails_at_any_call_changes_nothing() {
    for call in CALLS.iter().copied().chain(["xenforeignmemory_map"]) {
        for nth in 1..4 {
            let fake = guest(XEN);
            fake.write(CODE, &[0x90; 8]);
            let mut vmi = VmiCore::new(Box::new(attach(&fake)));
            let view = vmi.driver_mut().create_view(MemoryAccess::RWX).unwrap();
            let mut controller = BreakpointController::new();
            fake.fail(call, nth, 5);
            let inserted = controller.insert_breakpoint(&mut vmi, Pa(CODE), view);
            fake.fail(call, 1_000_000, 5);
            if inserted.is_err() {
                assert_eq!((fake.access(view.0.into(), 8), fake.byte(view.0.into(), CODE as i64)), (7, 0x90), "{call} {nth}");
                controller.insert_breakpoint(&mut vmi, Pa(CODE), view).unwrap();
            }
            assert_eq!((fake.access(view.0.into(), 8), fake.byte(view.0.into(), CODE as i64)), (4, 0xcc), "{call} {nth}");
            controller.clear(&mut vmi).unwrap();
            drop(vmi);
            is_untouched(&fake);
        }
    }
}

#[test]
fn the_guest_is_paused_once_however_often_it_is_asked_for() {
    let fake = guest(XEN);
    let mut driver = attach(&fake);
    driver.pause().unwrap();
    driver.pause().unwrap();
    assert_eq!(fake.state("pauses", 0), 1);
    driver.resume().unwrap();
    assert_eq!(fake.state("pauses", 0), 1);
    driver.resume().unwrap();
    assert_eq!(fake.state("pauses", 0), 0);
    assert!(driver.resume().is_err());
    driver.pause().unwrap();
    drop(driver);
    is_untouched(&fake);
}
