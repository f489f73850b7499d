//! A whole session: the guest runs whenever the tool waits, and its own account is compared with the tool's.

use std::time::{Duration, Instant};

use vmitap::arch::amd64::AddressContext;
use vmitap::driver::xen::{Stepping, XenDriver, XenOptions};
use vmitap::session::{Limits, Poll, Session, TapKind, TapSpec, Verdict};
use vmitap::tap::OnWrite;
use vmitap::{Pa, Va, VmiError};
use xen_sys::fake::{Fake, Kind, Reg};

use super::{CODE, guest, is_untouched, options};

/// push rbp; pop rbp; mov al, [rbx]; jmp
const LOOP: &[u8] = &[0x55, 0x5d, 0x8a, 0x03, 0xeb, 0xfa];

pub fn spec(view: vmitap::View, wanted: bool) -> TapSpec {
    TapSpec {
        kind: TapKind::Breakpoint,
        va: Va(CODE),
        context: AddressContext { root: Pa(0), levels: 4 },
        global: true,
        view,
        on_write: None,
        key: None,
        wanted,
        enabled: true,
    }
}

fn session(fake: &Fake, stepping: Stepping) -> Session<XenDriver> {
    let driver = XenDriver::attach("guest", &XenOptions { stepping, ..options(fake) }).unwrap();
    Session::new(Box::new(driver), OnWrite::Reapply).unwrap()
}

/// A guest that runs its loop on every vCPU and reads its own first byte each time round.
pub fn looping(kind: Kind, vcpus: i64) -> Fake {
    let fake = guest(kind);
    fake.set("vcpus", vcpus);
    fake.write(CODE, LOOP);
    for vcpu in 0..vcpus as i32 {
        fake.set_reg(vcpu, Reg::Rip, CODE);
        fake.set_reg(vcpu, Reg::Rsp, 0x2_0000 + 0x1000 * vcpu as u64);
        fake.set_reg(vcpu, Reg::Rbx, CODE);
    }
    fake
}

#[test]
fn hits_are_calls_and_the_guest_reads_its_own_bytes() {
    for kind in Kind::ALL {
        for stepping in [Stepping::Auto, Stepping::Fast, Stepping::Toggle] {
            let fake = looping(kind, 2);
            let mut session = session(&fake, stepping);
            let view = session.tap_view();
            session.add(&spec(view, true)).unwrap();
            fake.automatic(50);
            let mut hits = 0;
            let end = Instant::now() + Duration::from_secs(20);
            while hits < 100 {
                assert!(Instant::now() < end, "{hits} hits");
                match session.poll(&Limits::default()).unwrap() {
                    Poll::Hit(hit) => {
                        assert_eq!((hit.va, hit.registers.rip()), (Va(CODE), Va(CODE)));
                        hits += 1;
                        session.answer(Verdict::Continue).unwrap();
                    }
                    other => panic!("{other:?}"),
                }
            }
            // After the first round the byte each vCPU has read is the original one.
            for vcpu in [0, 1] {
                assert_eq!(fake.reg(vcpu, Reg::Rax) & 0xff, 0x55, "{kind:?} {stepping:?}");
            }
            assert!(session.stats().hidden_reads >= 90, "{:?}", session.stats());
            session.detach().unwrap();
            // Not only when the session is dropped.
            is_untouched(&fake);
            drop(session);
            fake.automatic(0);
            is_untouched(&fake);
            // And it runs on, at full speed and unobserved.
            assert_eq!(fake.run(0, 1000), 1000);
            assert_eq!(fake.byte(0, CODE as i64), 0x55);
        }
    }
}

#[test]
fn with_hiding_undone_the_guest_would_see_the_breakpoint() {
    // The control of the test above.
    let fake = looping(Kind::ALL[1], 1);
    fake.write(CODE, &[0xcc]);
    fake.set_reg(0, Reg::Rip, CODE + 2);
    fake.run(0, 1);
    assert_eq!(fake.reg(0, Reg::Rax) & 0xff, 0xcc);
}

#[test]
fn a_session_that_is_dropped_with_a_hit_in_hand_restores_the_guest() {
    let fake = looping(Kind::ALL[1], 2);
    let mut session = session(&fake, Stepping::Auto);
    let view = session.tap_view();
    session.add(&spec(view, true)).unwrap();
    fake.automatic(50);
    assert!(matches!(session.poll(&Limits::default()).unwrap(), Poll::Hit(_)));
    drop(session);
    fake.automatic(0);
    is_untouched(&fake);
    assert_eq!(fake.run(0, 100), 100);
    assert_eq!(fake.run(1, 100), 100);
}

#[test]
fn a_domain_that_is_destroyed_ends_the_session_without_complaint() {
    for waits in [true, false] {
        let fake = looping(Kind::ALL[1], 2);
        let mut session = session(&fake, Stepping::Auto);
        let view = session.tap_view();
        session.add(&spec(view, true)).unwrap();
        fake.automatic(50);
        assert!(matches!(session.poll(&Limits::default()).unwrap(), Poll::Hit(_)));
        session.answer(Verdict::Continue).unwrap();
        fake.automatic(0);
        fake.set("gone", 1);
        if waits {
            let gone = (0..20).find_map(|_| session.poll(&Limits::default()).err());
            assert!(matches!(gone, Some(VmiError::DomainGone { .. })), "{gone:?}");
        }
        session.detach().unwrap();
        assert_eq!(fake.state("maps", 0), 0, "a mapping would keep the domain from going");
    }
}

#[test]
fn a_panic_in_the_callers_code_leaves_nobody_standing() {
    let fake = looping(Kind::ALL[1], 1);
    let path = options(&fake);
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let driver = XenDriver::attach("guest", &path).unwrap();
        let mut session: Session<XenDriver> = Session::new(Box::new(driver), OnWrite::Reapply).unwrap();
        let view = session.tap_view();
        session.add(&spec(view, true)).unwrap();
        fake.automatic(50);
        assert!(matches!(session.poll(&Limits::default()).unwrap(), Poll::Hit(_)));
        panic!("as a handler does");
    }));
    assert!(caught.is_err());
    fake.automatic(0);
    is_untouched(&fake);
    assert_eq!(fake.run(0, 100), 100);
}
