//! How a session ends: in which order things are taken back, and what is told of a domain that has ended by itself.

use std::time::Duration;

use vmitap::VmiError;
use vmitap::core::VmiCore;
use vmitap::driver::xen::{Stepping, XenDriver, XenOptions};
use vmitap::driver::{Monitor, Shutdown, VmiControl, VmiEvents, VmiInfo, VmiViews, Wait};
use vmitap::event::{EventAction, VmiEventResponse};
use vmitap::session::Session;
use vmitap::tap::{BreakpointController, OnWrite, TapController};
use vmitap::{MemoryAccess, Pa, View};
use xen_sys::fake::{Fake, Kind, Reg};

use super::session::{looping, spec};
use super::{CODE, attach, guest, is_untouched, options, tapped_with};

/// Calls that change nothing in the domain.
const LOOKS: &[&str] = &[
    "xc_domain_getinfolist",
    "xc_altp2m_get_vcpu_p2m_idx",
    "xc_domain_hvm_getcontext_partial",
    "xenevtchn_fd",
    "xenevtchn_pending",
    "xenevtchn_unmask",
];

#[test]
fn a_domain_is_let_go_in_the_documented_order() {
    for kind in Kind::ALL {
        // A vCPU has an event that was handed out, the other one that was not.
        let mut lab = tapped_with(kind, &[0x55, 0x90], Stepping::Fast, |fake| fake.set("vcpus", 2));
        lab.fake.set_reg(1, Reg::Rip, CODE);
        lab.vmi.driver_mut().monitor(Monitor::Cpuid, true).unwrap();
        let other = lab.vmi.driver_mut().create_view(MemoryAccess::RWX).unwrap();
        assert_ne!(other, View::DEFAULT);
        lab.fake.run(0, 1);
        lab.fake.run(1, 1);
        lab.event();
        let before = lab.fake.total();
        drop(lab.vmi);
        let fake = lab.fake;
        let mut calls: Vec<String> = (before + 1..=fake.total()).map(|nth| fake.name(nth)).collect();
        calls.retain(|name| !LOOKS.contains(&name.as_str()));
        calls.dedup();
        let expected = [
            // Every vCPU into the default view while the domain runs, and every event answered.
            "xc_altp2m_switch_to_view",
            "xenevtchn_notify",
            "xc_domain_pause",
            // Nothing that could still come from a vCPU, before the views that it would come from.
            "xc_domain_debug_control",
            "xc_monitor_",
            "xc_altp2m_destroy_view",
            "xc_altp2m_set_domain_state",
            // Frames once nothing shows or maps them.
            "xenforeignmemory_unmap",
            "xc_domain_decrease_reservation_exact",
            "xc_domain_setmaxmem",
            "xenforeignmemory_unmap",
            "xc_monitor_disable",
            "xenevtchn_unbind",
            "xc_domain_unpause",
        ];
        let mut said: Vec<&str> = calls
            .iter()
            .map(|name| if name.starts_with("xc_monitor_") && name != "xc_monitor_disable" { "xc_monitor_" } else { name })
            .collect();
        said.dedup();
        let closed = said.iter().position(|name| name.ends_with("_close")).unwrap();
        assert_eq!(said[..closed], expected, "{kind:?}");
        is_untouched(&fake);
    }
}

/// Calls with which a driver changes what another one has in the domain, or what it does there.
fn changes(fake: &Fake, from: i64) -> Vec<String> {
    let names = (from + 1..=fake.total()).map(|nth| fake.name(nth));
    let mine = |name: &String| name.ends_with("_close") || name.ends_with("_unmap") || name.ends_with("_open");
    names.filter(|name| !mine(name) && !LOOKS.contains(&name.as_str())).collect()
}

/// A vCPU is in a step of this session.
fn stepping(mut driver: XenDriver, fake: &Fake) -> VmiCore<XenDriver> {
    fake.write(CODE, &[0x90; 16]);
    let view = driver.create_view(MemoryAccess::RWX).unwrap();
    driver.monitor(Monitor::Breakpoint, true).unwrap();
    driver.switch_to_view(view).unwrap();
    let mut vmi = VmiCore::new(Box::new(driver));
    BreakpointController::new().insert_breakpoint(&mut vmi, Pa(CODE), view).unwrap();
    fake.run(0, 1);
    let Wait::Event(event) = vmi.driver_mut().wait(Duration::ZERO).unwrap() else { panic!("no hit") };
    let response = VmiEventResponse::action(EventAction::SingleStep { view: View::DEFAULT }).in_view(view);
    vmi.driver_mut().respond(event.vcpu, &response).unwrap();
    is_still_stepping(fake);
    vmi
}

fn is_still_stepping(fake: &Fake) {
    assert_eq!(fake.state("single_step", 0), 1);
    assert_eq!(fake.state("listening", 0), 1);
}

#[test]
fn a_session_that_has_ended_leaves_the_next_one_alone_whenever_it_is_dropped() {
    for kind in Kind::ALL {
        let fake = guest(kind);
        let mut ended = attach(&fake);
        ended.let_go().unwrap();
        let next = stepping(attach(&fake), &fake);
        let before = fake.total();
        ended.let_go().unwrap();
        drop(ended);
        assert_eq!(changes(&fake, before), [""; 0], "{kind:?}");
        is_still_stepping(&fake);
        drop(next);
        is_untouched(&fake);
    }
}

#[test]
fn who_is_refused_because_another_session_is_there_leaves_that_alone() {
    for kind in Kind::ALL {
        let fake = guest(kind);
        let first = stepping(attach(&fake), &fake);
        let before = fake.total();
        let refused = XenDriver::attach("guest", &options(&fake));
        assert!(matches!(refused, Err(VmiError::Attach { .. })), "{refused:?}");
        let changed = changes(&fake, before);
        let asked =
            ["xc_vm_event_get_version", "xc_version", "xs_read", "xc_monitor_get_capabilities", "xc_altp2m_get_domain_state"];
        let asked = asked.iter().chain(&["xc_domain_maximum_gpfn", "xc_monitor_enable"]);
        assert!(changed.iter().all(|name| asked.clone().any(|asked| name == asked)), "{kind:?}: {changed:?}");
        is_still_stepping(&fake);
        drop(first);
        is_untouched(&fake);
    }
}

#[test]
fn what_was_left_behind_is_left_to_the_session_that_has_taken_over() {
    for kind in Kind::ALL {
        let fake = guest(kind);
        let mut failed = attach(&fake);
        failed.create_view(MemoryAccess::RWX).unwrap();
        fake.fail("xc_altp2m_destroy_view", 1, 5);
        let told = failed.let_go().unwrap_err();
        assert!(told.to_string().contains("a view"), "{told}");
        let next = XenDriver::attach("guest", &XenOptions { take_over: true, ..options(&fake) }).unwrap();
        let next = stepping(next, &fake);
        let before = fake.total();
        // It is not known to be taken back.
        let told = failed.let_go().unwrap_err();
        assert!(told.to_string().contains("another session"), "{told}");
        drop(failed);
        let changed: Vec<String> = changes(&fake, before).into_iter().filter(|name| name != "xc_get_mem_access").collect();
        assert_eq!(changed, [""; 0], "{kind:?}");
        is_still_stepping(&fake);
        drop(next);
    }
}

#[test]
fn what_cannot_be_taken_back_is_told_each_time_and_tried_again() {
    for function in ["xc_domain_decrease_reservation_exact", "xc_altp2m_set_domain_state"] {
        for kind in Kind::ALL {
            let fake = looping(kind, 1);
            let driver = XenDriver::attach("guest", &options(&fake)).unwrap();
            let mut session = Session::new(Box::new(driver), OnWrite::Reapply).unwrap();
            let view = session.tap_view();
            session.add(&spec(view, false)).unwrap();
            for n in 0..3 {
                fake.fail(function, 1, 5);
                let told = session.detach().unwrap_err();
                assert!(told.to_string().contains(function), "{kind:?}, {function}, time {n}: {told}");
            }
            session.detach().unwrap();
            is_untouched(&fake);
        }
    }
}

#[test]
fn how_a_domain_has_shut_down_is_told() {
    let told = [
        (0, Shutdown::Poweroff),
        (1, Shutdown::Reboot),
        (2, Shutdown::Suspend),
        (3, Shutdown::Crash),
        (4, Shutdown::Watchdog),
        (5, Shutdown::SoftReset),
        (6, Shutdown::Other),
        (255, Shutdown::Other),
    ];
    let fake = guest(Kind::ALL[1]);
    let mut driver = attach(&fake);
    for (code, shutdown) in told {
        fake.set("shutdown", 1 + code);
        assert_eq!(driver.wait(Duration::from_secs(5)).unwrap(), Wait::Idle);
        assert_eq!(driver.shutdown(), Some(shutdown));
        // It was brought back.
        fake.set("shutdown", 0);
        assert_eq!(driver.wait(Duration::from_millis(600)).unwrap(), Wait::Timeout);
        assert_eq!(driver.shutdown(), None);
    }
    drop(driver);
    is_untouched(&fake);
}

#[test]
fn how_a_domain_had_shut_down_is_told_when_it_is_destroyed() {
    for (knob, what) in [("dying", "domain 7 is being destroyed"), ("gone", "domain 7 does not exist any more")] {
        let fake = guest(Kind::ALL[1]);
        let mut driver = attach(&fake);
        fake.set("shutdown", 2);
        assert_eq!(driver.wait(Duration::from_secs(5)).unwrap(), Wait::Idle);
        fake.set(knob, 1);
        let Err(VmiError::DomainGone { reason }) = driver.wait(Duration::from_secs(5)) else { panic!("{knob}") };
        assert_eq!(reason, format!("{what}; it had shut down (reboot)"));
    }
}
