//! Finding the libraries and the domain, and the errors a person can act on.

use std::time::Duration;

use vmitap::driver::xen::{Stepping, XenDriver, XenOptions, host};
use vmitap::driver::{Additions, VmiEvents, VmiFrames, VmiInfo, VmiRepair, VmiViews, Wait};
use vmitap::event::VmiEventResponse;
use vmitap::{Gfn, VcpuId, VmiError};
use xen_sys::fake::{Fake, Kind, Reg};

use super::{CODE, Tapped, attach, guest, is_untouched, options, tapped_with};

const XEN_4_17: Kind = Kind::new(7, 17);

fn refusal(fake: &Fake, which: &str) -> (String, String) {
    match XenDriver::attach(which, &options(fake)) {
        Err(VmiError::Attach { target, reason, hint }) => {
            assert_eq!(target, format!("xen:{which}"));
            (reason, hint)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_session_leaves_the_domain_as_it_was() {
    for kind in Kind::ALL {
        let fake = guest(kind);
        let driver = attach(&fake);
        assert_eq!((driver.info().name.as_str(), driver.info().vcpus, driver.info().memory_size), ("guest", 1, 64 << 12));
        assert_eq!(driver.version(), format!("xen 4.{}.5 (vm_event {})", kind.minor, kind.vm_event));
        assert_eq!(fake.state("listening", 0), 1);
        drop(driver);
        is_untouched(&fake);
    }
}

#[test]
fn a_domain_is_found_by_its_number_too() {
    let fake = guest(XEN_4_17);
    fake.set("named", 0);
    let driver = XenDriver::attach("7", &options(&fake)).unwrap();
    assert_eq!(driver.info().name, "domain 7");
}

#[test]
fn what_is_in_the_way_is_said_with_what_to_do_about_it() {
    let newer = Kind::new(7, 20);
    for (kind, knob, value, which, reason, hint) in [
        (XEN_4_17, "hvm", 0, "guest", "PV domain", "pvh"),
        (XEN_4_17, "hap", 0, "guest", "hardware-assisted paging", "hap=0"),
        (XEN_4_17, "single_step", 0, "guest", "monitor trap flag", "Intel"),
        (XEN_4_17, "dying", 1, "guest", "ending", "start it again"),
        (XEN_4_17, "vcpus", 0, "guest", "still being made", "wait"),
        (XEN_4_17, "busy", 1, "guest", "another program listens", "one listener"),
        (XEN_4_17, "altp2m", 0, "guest", "no second-level page tables", "Intel"),
        (newer, "altp2m_param", 0, "guest", "altp2m is off in domain 7", "altp2m=\"external\""),
        (XEN_4_17, "named", 0, "guest", "no domain has the name", "vmitap list"),
        (XEN_4_17, "named", 1, "8", "no domain 8", "vmitap list"),
        (XEN_4_17, "named", 1, "0", "control domain itself", "another"),
        (XEN_4_17, "version", 8, "guest", "version 8 of the event ring", "newer vmitap"),
        (XEN_4_17, "version", 5, "guest", "version 5 of the event ring", "4.14"),
        (XEN_4_17, "version_errno", 13, "guest", "does not answer", "XSM"),
        (XEN_4_17, "open_errno", 13, "guest", "cannot open its devices", "root"),
    ] {
        let fake = guest(kind);
        fake.set(knob, value);
        let (said, do_this) = refusal(&fake, which);
        assert!(said.contains(reason), "{knob}: {said}");
        assert!(do_this.contains(hint), "{knob}: {do_this}");
        fake.set("busy", 0);
        is_untouched(&fake);
        assert_eq!(fake.calls("xc_monitor_disable"), 0, "{knob}: whoever listens is left alone");
    }
}

#[test]
fn altp2m_off_on_xens_command_line_is_told_from_a_processor_without_it() {
    let fake = guest(XEN_4_17);
    fake.set("altp2m", 0);
    fake.set("altp2m_line", 0);
    let (reason, hint) = refusal(&fake, "guest");
    assert!(reason.contains("command line") && hint.contains("altp2m=1"), "{reason} / {hint}");
}

#[test]
fn up_to_4_18_views_are_switched_on_for_a_domain_that_was_made_without() {
    let fake = guest(XEN_4_17);
    fake.set("altp2m_param", 0);
    drop(attach(&fake));
    is_untouched(&fake);
}

#[test]
fn permission_is_named_where_a_policy_forbids() {
    let fake = guest(XEN_4_17);
    fake.fail("xc_monitor_enable", 1, 1);
    let (reason, hint) = refusal(&fake, "guest");
    assert!(reason.contains("xc_monitor_enable") && hint.contains("XSM"), "{reason} / {hint}");
    is_untouched(&fake);
}

#[test]
fn a_missing_function_is_named_and_a_newer_one_is_not_needed() {
    let without = Kind { without: Some("xc_monitor_emul_unimplemented"), ..XEN_4_17 };
    let (reason, hint) = refusal(&guest(without), "guest");
    assert!(reason.contains("xc_monitor_emul_unimplemented") && hint.contains("4.14"), "{reason} / {hint}");
    let fake = guest(Kind::new(7, 16));
    let mut driver = attach(&fake);
    assert!(matches!(driver.count_exits(true), Err(VmiError::NotSupported { .. })));
    attach(&guest(XEN_4_17)).count_exits(true).unwrap();
}

#[test]
fn a_library_that_is_not_there_is_an_error_that_names_it() {
    let options = XenOptions { library: Some("/no/such/libxenctrl.so".into()), ..XenOptions::default() };
    match XenDriver::attach("guest", &options) {
        Err(VmiError::Attach { reason, hint, .. }) => {
            assert!(reason.contains("/no/such/libxenctrl.so") && hint.contains("VMITAP_LIBXENCTRL"), "{reason} / {hint}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn whatever_call_fails_during_attaching_everything_is_taken_back() {
    let functions = [
        "xc_monitor_get_capabilities",
        "xc_domain_maximum_gpfn",
        "xenevtchn_open",
        "xendevicemodel_open",
        "xenforeignmemory_open",
        "xc_monitor_enable",
        "xenevtchn_bind_interdomain",
        "xc_altp2m_get_domain_state",
        "xc_altp2m_set_domain_state",
        "xc_monitor_singlestep",
        "xc_monitor_emul_unimplemented",
    ];
    for function in functions {
        let fake = guest(XEN_4_17);
        fake.fail(function, 1, 5);
        let (reason, _) = refusal(&fake, "guest");
        assert!(reason.contains(function), "{function}: {reason}");
        is_untouched(&fake);
    }
}

#[test]
fn domains_are_listed_with_what_is_in_the_way() {
    let fake = guest(XEN_4_17);
    let found = host(Some(fake.path())).unwrap();
    assert_eq!((found.version.as_str(), found.obstacle), ("xen 4.17.5 (vm_event 7)", None));
    assert_eq!(found.libraries, [fake.path().to_string_lossy()]);
    // That its views are off is in nobody's way, and looking has not switched them on.
    assert_eq!(fake.knob("altp2m_param"), 0);
    let list = found.domains;
    let names: Vec<_> = list.iter().map(|domain| (domain.id, domain.name.as_str(), domain.is_hvm)).collect();
    assert_eq!(names, [(0, "Domain-0", false), (7, "guest", true)]);
    assert!(list[0].obstacle.is_some());
    assert_eq!((list[1].vcpus, list[1].memory_size, &list[1].obstacle), (1, 64 << 12, &None));
    let driver = attach(&fake);
    let found = host(Some(fake.path())).unwrap();
    assert!(found.domains[1].obstacle.as_ref().unwrap().reason.contains("another program listens"));
    drop(driver);
    fake.set("hvm", 0);
    fake.set("named", 0);
    fake.set("altp2m_line", 0);
    let found = host(Some(fake.path())).unwrap();
    assert!(found.obstacle.unwrap().hint.contains("altp2m=1"));
    let list = found.domains;
    assert_eq!(list[1].name, "");
    assert!(list[1].obstacle.as_ref().unwrap().reason.contains("PV"));
    is_untouched(&fake);
}

#[test]
fn a_listener_that_died_loses_its_place_only_if_asked() {
    let fake = guest(XEN_4_17);
    fake.set("busy", 1);
    refusal(&fake, "guest");
    let driver = XenDriver::attach("guest", &XenOptions { take_over: true, ..options(&fake) }).unwrap();
    assert_eq!(driver.additions().unwrap().views, []);
    drop(driver);
    is_untouched(&fake);
}

#[test]
fn what_a_listener_that_died_has_left_behind_is_found_and_taken_back() {
    let mut lab = tapped_with(XEN_4_17, &[0x55, 0x90], Stepping::Fast, |fake| fake.set("vcpus", 2));
    lab.fake.set_reg(1, Reg::Rip, CODE);
    lab.fake.run(0, 1);
    lab.fake.run(1, 1);
    // One event was handed out and one was not; then the program is killed.
    lab.event();
    let Tapped { fake, vmi, view, .. } = lab;
    std::mem::forget(vmi);
    let mut driver = XenDriver::attach("guest", &XenOptions { take_over: true, ..options(&fake) }).unwrap();
    assert_eq!(driver.info().memory_size, 72 << 12, "frames of the pool look like the guest's own");
    let there = driver.additions().unwrap();
    assert_eq!((there.views, there.is_paused), (vec![view], false));
    assert_eq!(there.frames, (0..72).map(Gfn).collect::<Vec<_>>(), "there is no gap in this guest");
    driver.release_held().unwrap();
    for vcpu in [0, 1] {
        assert_eq!((fake.state("held", vcpu), fake.state("view", vcpu), fake.state("single_step", vcpu)), (0, 0, 0));
    }
    // Events are told as before.
    fake.push(0, 6, 1);
    assert!(matches!(driver.wait(Duration::ZERO).unwrap(), Wait::Event(_)));
    driver.respond(VcpuId(0), &VmiEventResponse::CONTINUE).unwrap();
    // The journal knows of the one frame that was taken.
    driver.adopt(&Additions { views: vec![view], frames: vec![Gfn(64)], is_paused: false }, 0).unwrap();
    assert_eq!((driver.info().memory_size, driver.frames_in_use()), (64 << 12, 1));
    driver.destroy_view(view).unwrap();
    driver.free_frame(Gfn(64)).unwrap();
    assert_eq!(driver.frames_in_use(), 0);
    drop(driver);
    for (what, expected) in [("views", 0), ("populated", 64), ("listening", 0), ("pauses", 0), ("monitors", 0), ("wiped", 0)] {
        assert_eq!(fake.state(what, 0), expected, "{what}");
    }
    assert_eq!(fake.run(0, 2), 2);
}
