//! Writes that watches are told of and policies decide on, on the mock driver: neither keeps the other from its own.

use std::time::{Duration, Instant};

use vmitap::driver::mock::{CallKind, MockDriver};
use vmitap::event::{EventAction, VmiEventResponse};
use vmitap::session::{Limits, Poll, Session, TapId, TapKind, TapSpec, Verdict};
use vmitap::tap::OnWrite;
use vmitap::{MemoryAccess, Va, View, VmiError};

use super::session::{CODE, CODE_PA, access, session, spec};

fn poll(session: &mut Session<MockDriver>) -> Result<Poll, VmiError> {
    session.poll(&Limits { deadline: Some(Instant::now() + Duration::from_secs(1)), hits: None })
}

fn actions(session: &Session<MockDriver>) -> Vec<EventAction> {
    session.vmi().driver().answers().iter().map(|(_, VmiEventResponse { action, .. })| *action).collect()
}

/// A store over a breakpoint with a policy, of which so many watches are told first.
fn watched(policy: OnWrite, watches: usize) -> (Session<MockDriver>, TapId, Vec<TapId>) {
    let (mut session, context) = session(1);
    let under = TapSpec { on_write: Some(policy), wanted: false, ..spec(&session, context, Va(CODE.0 + 3)) };
    let under = session.add(&under).unwrap();
    let kind = TapKind::Watch { len: 16, access: MemoryAccess::W };
    let watch = TapSpec { kind, ..spec(&session, context, CODE) };
    let watches = (0..watches).map(|_| session.add(&watch).unwrap()).collect();
    let store = access(session.tap_view(), context, CODE_PA, CODE, MemoryAccess::W, 8);
    session.vmi_mut().driver_mut().push_event(store);
    (session, under, watches)
}

/// What becomes of the store: as the policy says, whoever is asked.
fn check_decided(session: &mut Session<MockDriver>, policy: OnWrite, under: TapId, case: &str) {
    let polled = poll(session).unwrap();
    if policy == OnWrite::Ask {
        let Poll::Hit(hit) = polled else { panic!("{case}: not asked, but {polled:?}") };
        assert_eq!((hit.tap, hit.ask), (under, true), "{case}");
        session.answer_write(OnWrite::Deny).unwrap();
        assert!(matches!(poll(session).unwrap(), Poll::Idle), "{case}");
    } else {
        assert!(matches!(polled, Poll::Idle), "{case}: {polled:?}");
    }
    let wanted = if policy == OnWrite::Reapply { EventAction::SingleStep { view: View::DEFAULT } } else { EventAction::Deny };
    assert_eq!(actions(session), [wanted], "{case}");
}

const POLICIES: [OnWrite; 3] = [OnWrite::Reapply, OnWrite::Deny, OnWrite::Ask];

#[test]
fn a_watch_whose_handler_pauses_does_not_keep_a_policy_from_deciding() {
    for policy in POLICIES {
        let (mut session, under, _) = watched(policy, 1);
        assert!(matches!(poll(&mut session).unwrap(), Poll::Hit(hit) if !hit.ask));
        session.answer(Verdict::Pause).unwrap();
        assert_eq!(actions(&session), [], "{policy:?}");
        check_decided(&mut session, policy, under, &format!("{policy:?}"));
    }
}

#[test]
fn a_watch_that_the_one_before_it_removes_does_not_keep_a_policy_from_deciding() {
    for policy in POLICIES {
        let (mut session, under, watches) = watched(policy, 2);
        assert!(matches!(poll(&mut session).unwrap(), Poll::Hit(hit) if hit.tap == watches[0]));
        session.remove(watches[1]).unwrap();
        session.answer(Verdict::Continue).unwrap();
        check_decided(&mut session, policy, under, &format!("{policy:?}"));
    }
}

#[test]
fn a_write_is_decided_on_also_if_what_it_covers_cannot_be_found_out_and_that_is_told() {
    for policy in [OnWrite::Deny, OnWrite::Ask] {
        let (mut session, under, _) = watched(policy, 1);
        assert!(matches!(poll(&mut session).unwrap(), Poll::Hit(hit) if !hit.ask));
        // Whether the instruction at RIP is a string instruction.
        session.vmi_mut().driver_mut().fail_nth_of(CallKind::Read, 1);
        let failed = session.answer(Verdict::Continue);
        assert!(matches!(failed, Err(VmiError::Driver { op: "read", .. })), "{policy:?}: {failed:?}");
        check_decided(&mut session, policy, under, &format!("{policy:?}"));
    }
}
