//! How a session ends: what is told of a domain that has ended by itself.

use std::time::Duration;

use vmitap::VmiError;
use vmitap::driver::{Shutdown, VmiEvents, VmiInfo, Wait};
use xen_sys::fake::Kind;

use super::{attach, guest, is_untouched};

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
