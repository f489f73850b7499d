//! Writes that watches are told of and policies decide on, on the mock driver: neither keeps the other from its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmitap::arch::amd64::AddressContext;
use vmitap::capture::{Abi, Node, Program, Test};
use vmitap::driver::mock::{CallKind, MockDriver};
use vmitap::event::{EventAction, VmiEvent, VmiEventResponse};
use vmitap::session::{Limits, Poll, Session, TapId, TapKind, TapSpec, Verdict, WriteRule};
use vmitap::tap::OnWrite;
use vmitap::{MemoryAccess, Pa, Va, View, VmiError};

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

#[test]
fn a_write_that_is_watched_is_a_hit_also_if_what_it_covers_cannot_be_found_out() {
    for policy in POLICIES {
        let (mut session, under, watches) = watched(policy, 1);
        session.vmi_mut().driver_mut().fail_nth_of(CallKind::Read, 1);
        assert!(matches!(poll(&mut session).unwrap(), Poll::Hit(hit) if hit.tap == watches[0]), "{policy:?}");
        session.answer(Verdict::Continue).unwrap();
        check_decided(&mut session, policy, under, &format!("{policy:?}"));
    }
    // Of one that is only counted nobody is told, but of what failed.
    let (mut session, _, watches) = watched(OnWrite::Deny, 1);
    session.set_wanted(watches[0], false);
    session.vmi_mut().driver_mut().fail_nth_of(CallKind::Read, 1);
    let failed = poll(&mut session);
    assert!(matches!(failed, Err(VmiError::Driver { op: "read", .. })), "{failed:?}");
    assert_eq!((session.tap_stats(watches[0]).hits, session.stats().hits), (1, 1));
    assert_eq!(actions(&session), [EventAction::Deny]);
}

/// A condition: the first argument is this.
fn argument_is(value: u64) -> Arc<Program> {
    let nodes = [Node::Argument(0), Node::Const { value, signed: false }, Node::Compare(Test::Eq)];
    Arc::new(Program::compile(&nodes, Abi::SystemV).unwrap())
}

fn store(session: &Session<MockDriver>, context: AddressContext, rdi: u64) -> VmiEvent {
    let mut store = access(session.tap_view(), context, CODE_PA, CODE, MemoryAccess::W, 8);
    store.registers.gp.rdi = rdi;
    store
}

#[test]
fn a_write_whose_handling_fails_is_judged_by_itself_and_not_as_the_one_before() {
    // The first write is let through by a rule, or by none; the second one is to be denied.
    for (then, otherwise) in [(OnWrite::Reapply, OnWrite::Deny), (OnWrite::Deny, OnWrite::Reapply)] {
        let (mut session, context) = session(1);
        let tap = TapSpec { on_write: Some(otherwise), wanted: false, ..spec(&session, context, Va(CODE.0 + 3)) };
        let tap = session.add(&tap).unwrap();
        session.set_write_rules(tap, &[WriteRule { when: argument_is(1), holds: true, then }]).unwrap();
        let order = if then == OnWrite::Reapply { [1, 2] } else { [2, 1] };
        for rdi in order {
            let store = store(&session, context, rdi);
            session.vmi_mut().driver_mut().push_event(store);
        }
        // The shadow after the first one, before the second is looked at.
        session.vmi_mut().driver_mut().fail_nth_of(CallKind::Write, 1);
        let failed = poll(&mut session);
        assert!(matches!(failed, Err(VmiError::Driver { op: "write", .. })), "{failed:?}");
        let wanted = [EventAction::SingleStep { view: View::DEFAULT }, EventAction::Deny];
        assert_eq!(actions(&session), wanted, "{then:?}, or else {otherwise:?}");
    }
}

#[test]
fn a_rule_on_a_page_that_a_watched_store_crosses_into_is_asked() {
    let (mut session, context) = session(1);
    let kind = TapKind::Watch { len: 16, access: MemoryAccess::W };
    let watch = TapSpec { kind, wanted: false, ..spec(&session, context, CODE) };
    session.add(&watch).unwrap();
    let behind = TapSpec { on_write: Some(OnWrite::Reapply), wanted: false, ..spec(&session, context, Va(CODE.0 + 0x1000)) };
    let behind = session.add(&behind).unwrap();
    session.set_write_rules(behind, &[WriteRule { when: argument_is(7), holds: true, then: OnWrite::Deny }]).unwrap();
    let mut store = access(session.tap_view(), context, Pa(CODE_PA.0 + 0xffc), Va(CODE.0 + 0xffc), MemoryAccess::W, 8);
    store.registers.gp.rdi = 7;
    session.vmi_mut().driver_mut().push_event(store);
    assert!(matches!(poll(&mut session).unwrap(), Poll::Idle));
    assert_eq!(actions(&session), [EventAction::Deny]);
}

#[test]
fn an_access_that_crosses_into_a_watched_page_is_one_of_its_watch() {
    // The watch begins where the second page does, or before; the access is told as one of the first page.
    for (access_kind, at, len, wanted) in [
        (MemoryAccess::W, 0x1000, 8, 1),
        (MemoryAccess::R, 0x1000, 8, 1),
        (MemoryAccess::W, 0xff8, 16, 1),
        (MemoryAccess::R, 0xff8, 16, 1),
        // By the first byte of each page, as always.
        (MemoryAccess::W, 0x1001, 8, 0),
        (MemoryAccess::W, 0xffd, 3, 0),
    ] {
        let (mut session, context) = session(1);
        session.add(&TapSpec { wanted: false, ..spec(&session, context, CODE) }).unwrap();
        let kind = TapKind::Watch { len, access: access_kind };
        let watch = session.add(&TapSpec { kind, wanted: false, ..spec(&session, context, Va(CODE.0 + at)) }).unwrap();
        let view = session.tap_view();
        let event = access(view, context, Pa(CODE_PA.0 + 0xffc), Va(CODE.0 + 0xffc), access_kind, 8);
        session.vmi_mut().driver_mut().push_event(event);
        // It ends before the border.
        session.vmi_mut().driver_mut().push_event(access(
            view,
            context,
            Pa(CODE_PA.0 + 0xff0),
            Va(CODE.0 + 0xff0),
            access_kind,
            8,
        ));
        assert!(matches!(poll(&mut session).unwrap(), Poll::Idle));
        assert_eq!(session.tap_stats(watch).hits, wanted, "{access_kind:?} {len} bytes at {at:#x}");
    }
}
