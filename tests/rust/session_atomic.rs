//! Every operation of a session is whole or not at all, whichever driver call fails; and what the loop does is made up for.

use std::panic::catch_unwind;
use std::time::{Duration, Instant};

use vmitap::arch::amd64::{AddressContext, Injection, InjectionKind, Registers};
use vmitap::driver::mock::MockDriver;
use vmitap::driver::{Monitor, VmiDriver, VmiEvents, VmiFrames, VmiProtection};
use vmitap::event::{EventReason, VmiEvent, VmiEventResponse};
use vmitap::session::{EventSet, GpChanges, Limits, Poll, Session, TapId, TapKind, TapSpec, TapState, Verdict};
use vmitap::tap::OnWrite;
use vmitap::{Gfn, MemoryAccess, Pa, Result, Va, VcpuId, View, VmiError};

use super::harness::{ERRNOS, Failure, Faulty, Seen, World, each_call_failing_with};
use super::session::{CODE, CODE_PA, STACK, access, guest, int3, spec};

/// A session, and its driver.
pub struct Tapped<D: VmiDriver> {
    pub session: Session<Faulty<D>>,
    pub driver: Faulty<D>,
    pub context: AddressContext,
}

impl<D: VmiDriver> World for Tapped<D> {
    type Driver = D;

    fn driver(&self) -> Faulty<D> {
        self.driver.clone()
    }

    fn books(&self) -> Vec<String> {
        session_books(&self.session)
    }
}

/// What a session says of itself.
pub fn session_books<D: VmiDriver>(session: &Session<Faulty<D>>) -> Vec<String> {
    assert_eq!(session.vmi().driver().frames_in_use(), session.shadow_frames());
    let taps = (0..).map(TapId).map_while(|tap| Some((session.spec(tap)?.va, session.state(tap))));
    let mut books: Vec<_> = taps.map(|tap| format!("{tap:?}")).collect();
    books.push(format!("{:?} {} {}", session.views(), session.has_pending(), session.is_detached()));
    books
}

type Mock = Tapped<MockDriver>;

fn empty() -> Mock {
    let (driver, context) = guest(2);
    let driver = Faulty::new(driver);
    Tapped { session: Session::new(Box::new(driver.clone()), OnWrite::Reapply).unwrap(), driver, context }
}

const V2: View = View(2);

/// One of each kind: breakpoints of two pages, one disabled, a watch, one that is disabled; another view with the same. Then two
/// monitors that have something in common, and one that is disabled.
fn busy() -> Mock {
    let mut w = empty();
    let view = w.session.create_view(MemoryAccess::RWX).unwrap();
    assert_eq!(view, V2);
    w.session.add_many(&all(&w, w.session.tap_view())).unwrap();
    w.session.add_many(&all(&w, V2)).unwrap();
    w.session.add_many(&monitors(&w)).unwrap();
    w
}

fn monitors(w: &Mock) -> Vec<TapSpec> {
    let msrs = |numbers: &[u32]| std::array::from_fn(|at| numbers.get(at).copied());
    let sets = [
        EventSet { registers: [true, true, false], msrs: msrs(&[0x10, 0xc000_0082]), ..EventSet::default() },
        EventSet { registers: [false, true, true], msrs: msrs(&[0x10, 0x10]), cpuid: true, ..EventSet::default() },
        EventSet { registers: [true, true, true], requests: true, descriptors: true, ..EventSet::default() },
    ];
    let spec = spec(&w.session, w.context, Va(0));
    let of = |(at, set)| TapSpec { kind: TapKind::Monitor(set), enabled: at < 2, ..spec };
    (0..).zip(sets).map(of).collect()
}

fn all(w: &Mock, view: View) -> Vec<TapSpec> {
    let base = TapSpec { key: Some(1), view, ..spec(&w.session, w.context, CODE) };
    let kind = TapKind::Watch { len: 0x80, access: MemoryAccess::W };
    vec![
        base,
        TapSpec { va: Va(CODE.0 + 0x1004), ..base },
        TapSpec { va: Va(CODE.0 + 5), ..base },
        TapSpec { kind, va: Va(STACK.0 + 0xfc0), ..base },
        TapSpec { va: Va(CODE.0 + 9), enabled: false, ..base },
        TapSpec { kind, va: Va(CODE.0 + 0x1f00), enabled: false, ..base },
    ]
}

type Operation = (fn() -> Mock, fn(&mut Mock) -> Result<()>);

/// On what, and the operation: one of each.
const OPERATIONS: &[Operation] = &[
    (empty, |w| w.session.add(&spec(&w.session, w.context, CODE)).map(drop)),
    (empty, |w| {
        let all = all(w, w.session.tap_view());
        w.session.add_many(&all).map(drop)
    }),
    (busy, |w| {
        let again: Vec<_> = all(w, V2).into_iter().map(|spec| TapSpec { key: Some(2), enabled: true, ..spec }).collect();
        w.session.add_many(&again).map(drop)
    }),
    (busy, |w| w.session.remove(TapId(0))),
    (busy, |w| w.session.remove(TapId(1))),
    (busy, |w| w.session.remove(TapId(3))),
    (busy, |w| w.session.disable(TapId(2))),
    (busy, |w| w.session.disable(TapId(7))),
    (busy, |w| w.session.disable(TapId(9))),
    (busy, |w| w.session.enable(TapId(4))),
    (busy, |w| w.session.enable(TapId(5))),
    (empty, |w| w.session.add_many(&monitors(w)).map(drop)),
    (busy, |w| {
        let again: Vec<_> = monitors(w).into_iter().map(|spec| TapSpec { enabled: true, ..spec }).collect();
        w.session.add_many(&again).map(drop)
    }),
    (busy, |w| w.session.remove(TapId(12))),
    (busy, |w| w.session.disable(TapId(13))),
    (busy, |w| w.session.enable(TapId(14))),
    (busy, |w| w.session.remove_many(&[TapId(12), TapId(3), TapId(0), TapId(13)])),
    (busy, |w| w.session.write(Va(CODE.0 + 0xffe), w.context, &[1, 2, 3, 4])),
    (busy, |w| w.session.write_pa(Pa(CODE_PA.0 + 3), &[7; 0x1200])),
    (busy, |w| w.session.create_view(MemoryAccess::RX).map(drop)),
    (busy, |w| w.session.destroy_view(V2)),
    (
        || {
            let mut w = busy();
            w.session.switch_to_view(V2).unwrap();
            w
        },
        |w| w.session.destroy_view(V2),
    ),
    (busy, |w| w.session.switch_to_view(V2)),
    (busy, |w| {
        let mut changes = GpChanges::default();
        changes.values[0] = Some(7);
        w.session.set_registers(VcpuId(1), &changes)
    }),
    (busy, |w| {
        w.session
            .inject(VcpuId(1), &Injection { vector: 3, kind: InjectionKind::Software, error_code: None, cr2: None, insn_len: 1 })
    }),
    (busy, |w| w.session.pause()),
    (
        || {
            let mut w = busy();
            w.session.pause().unwrap();
            w
        },
        |w| w.session.resume(),
    ),
    (hit, |w| w.session.wait_raw(Duration::ZERO).map(drop)),
    (
        || {
            let mut w = hit();
            w.session.wait_raw(Duration::ZERO).unwrap();
            w
        },
        |w| {
            let number = w.session.raw_number(VcpuId(0))?;
            w.session.respond_raw(VcpuId(0), number, &VmiEventResponse::CONTINUE)
        },
    ),
];

/// An INT3 of the first tap is on its way.
fn hit() -> Mock {
    let w = busy();
    let event = int3(w.session.tap_view(), w.context, CODE, CODE_PA);
    w.driver.inner().push_event(event);
    w
}

#[test]
fn whichever_call_of_an_operation_fails_with_whichever_errno_nothing_has_changed_and_a_retry_does_it() {
    for (index, (make, op)) in OPERATIONS.iter().enumerate() {
        for errno in ERRNOS {
            println!("operation {index} with {errno}");
            each_call_failing_with(errno, make, op);
        }
    }
}

#[test]
fn an_operation_that_leaves_something_behind_or_tells_something_else_is_found_out() {
    type Bad = fn(&mut Mock, VmiError) -> VmiError;
    let ways: [Bad; 6] = [
        |w, error| {
            w.driver.inner().poke(Pa(0x1_0123), &[1]).unwrap();
            error
        },
        |w, error| {
            w.driver.inner().set_memory_access(V2, Gfn(0x10), MemoryAccess::RX).unwrap();
            error
        },
        |w, error| {
            let registers = Registers { cr4: 1, ..Registers::default() };
            w.driver.inner().poke_registers(VcpuId(1), registers).unwrap();
            error
        },
        |w, error| {
            w.session.add(&TapSpec { enabled: false, ..spec(&w.session, w.context, CODE) }).unwrap();
            error
        },
        |w, error| {
            w.driver.clone().monitor(Monitor::Cpuid, false).unwrap();
            error
        },
        |_, _| VmiError::Driver { op: "another", errno: 5, detail: String::new() },
    ];
    let of = |bad: Option<Bad>| {
        let op = |w: &mut Mock| w.session.disable(TapId(2)).map_err(|error| bad.map_or(error.clone(), |bad| bad(w, error)));
        catch_unwind(|| each_call_failing_with(5, busy, op)).is_ok()
    };
    assert!(of(None));
    assert_eq!(ways.map(|bad| of(Some(bad))), [false; 6]);
    let swallowed = catch_unwind(|| each_call_failing_with(5, busy, |w| w.session.disable(TapId(2)).or(Ok(()))));
    assert!(swallowed.is_err());
}

#[test]
fn whichever_call_of_the_beginning_fails_the_guest_is_as_before() {
    for errno in ERRNOS {
        let mut calls = 0;
        for n in 1.. {
            let (driver, _) = guest(2);
            let driver = Faulty::new(driver);
            let before = driver.seen();
            driver.fail_nth_with(n, Failure::Errno(errno));
            let session = Session::new(Box::new(driver.clone()), OnWrite::Reapply);
            if driver.is_armed() {
                assert_eq!((n, session.is_ok()), (4, true));
                break;
            }
            assert_told(&driver, errno, session.as_ref().err());
            drop(session);
            assert_eq!(driver.seen().differences(&before), "", "call {n}");
            drop(Session::new(Box::new(driver), OnWrite::Reapply).unwrap());
            calls = n;
        }
        assert_eq!(calls, 3);
    }
}

/// The error is of the call that failed.
fn assert_told(driver: &Faulty<MockDriver>, errno: i32, error: Option<&VmiError>) {
    let told = match error {
        Some(VmiError::Driver { op, errno, .. }) => Some((*op, *errno)),
        _ => None,
    };
    assert_eq!(told, driver.failed().map(|op| (op, errno)), "{error:?}");
}

/// A failure is told once. Only where page tables are read, to see which of them a store can reach, it costs nothing: it may reach any.
fn assert_absorbed_or_told(w: &Mock, failed: u32, is_done: bool, when: &str) {
    let is_absorbed = !is_done && failed == 0 && w.driver.failed() == Some("read");
    assert!(failed == u32::from(!is_done) || is_absorbed, "{when}: {failed}");
}

fn poll<D: VmiDriver>(session: &mut Session<D>) -> Result<Poll> {
    session.poll(&Limits { deadline: Some(Instant::now() + Duration::from_secs(1)), hits: None })
}

/// The guest but for registers, which scripted events bring with them.
fn at_rest(w: &Mock) -> Seen {
    for vcpu in [0, 1] {
        w.driver.inner().poke_registers(VcpuId(vcpu), vmitap::arch::amd64::Registers::default()).unwrap();
    }
    w.driver.seen()
}

#[test]
fn whichever_call_of_the_end_fails_all_else_is_done_and_a_retry_does_the_rest() {
    let (pristine, _) = guest(2);
    let pristine = Faulty::new(pristine).seen();
    for errno in ERRNOS {
        let mut failures = 0;
        for n in 1.. {
            let mut w = hit();
            let mut other = int3(w.session.tap_view(), w.context, CODE, CODE_PA);
            other.vcpu = VcpuId(1);
            w.driver.inner().push_event(other);
            w.session.wait_raw(Duration::ZERO).unwrap();
            assert!(matches!(poll(&mut w.session), Ok(Poll::Hit(_))));
            w.driver.fail_nth_with(n, Failure::Errno(errno));
            let result = w.session.detach();
            let is_done = w.driver.is_armed();
            w.driver.fail_nth(0);
            match &result {
                Ok(()) => {
                    assert!(!is_done || n > 10 && failures > 4, "{n} {failures}");
                    assert_eq!(at_rest(&w).differences(&pristine), "", "call {n}");
                }
                Err(VmiError::UndoFailed { cause, .. }) => {
                    assert_told(&w.driver, errno, Some(cause));
                    failures += 1;
                }
                Err(error) => panic!("call {n} with {errno}: {error:?}"),
            }
            assert_eq!((w.session.is_detached(), w.session.is_restored()), (true, result.is_ok()));
            w.session.detach().unwrap();
            assert_eq!(at_rest(&w).differences(&pristine), "", "call {n}");
            // One that could not be answered was let go all the same.
            let (frames, answers) = (w.driver.frames_in_use(), w.driver.inner().answers().len());
            assert!(frames == 0 && (1..=2).contains(&answers), "call {n}: {frames} {answers}");
            if is_done {
                break;
            }
        }
    }
}

#[test]
fn a_key_that_is_free_again_is_not_lost_by_a_second_remove() {
    let mut w = busy();
    let first = TapSpec { key: Some(1), ..spec(&w.session, w.context, CODE) };
    w.session.remove(TapId(0)).unwrap();
    w.session.add(&first).unwrap();
    w.session.remove(TapId(0)).unwrap();
    assert!(matches!(w.session.add(&first), Err(VmiError::BreakpointConflict { .. })));
}

#[test]
fn an_event_is_answered_whichever_call_fails_while_it_is_handled() {
    let store = |w: &Mock| access(w.session.tap_view(), w.context, CODE_PA, CODE, MemoryAccess::W, 4);
    let events: [fn(&Mock) -> VmiEvent; 4] = [
        |w| int3(w.session.tap_view(), w.context, CODE, CODE_PA),
        |w| int3(w.session.tap_view(), w.context, Va(CODE.0 + 40), Pa(CODE_PA.0 + 40)),
        |w| access(w.session.tap_view(), w.context, CODE_PA, CODE, MemoryAccess::R, 4),
        |w| access(w.session.tap_view(), w.context, Pa(0x6500), Va(CODE.0 + 0x1500), MemoryAccess::W, 4),
    ];
    for (event, errno) in
        events.into_iter().chain([store as fn(&Mock) -> VmiEvent]).flat_map(|event| ERRNOS.map(|errno| (event, errno)))
    {
        for n in 1.. {
            let mut w = busy();
            let at = w.driver.inner().answers().len();
            let event = event(&w);
            w.driver.inner().push_event(event);
            w.driver.fail_nth_with(n, Failure::Errno(errno));
            let mut failed = 0;
            for _ in 0..4 {
                let done = match poll(&mut w.session) {
                    Ok(Poll::Hit(_)) => w.session.answer(Verdict::Continue),
                    other => other.map(drop),
                };
                if let Err(error) = done {
                    assert_told(&w.driver, errno, Some(&error));
                    failed += 1;
                }
            }
            let is_done = w.driver.is_armed();
            assert_absorbed_or_told(&w, failed, is_done, &format!("call {n} with {errno}"));
            let answers = w.driver.inner().answers()[at..].to_vec();
            assert_eq!(answers.len(), 1, "call {n}: {answers:?}");
            assert_eq!(answers[0].1.view, Some(w.session.tap_view()), "call {n}");
            if is_done {
                assert!(n > 2);
                break;
            }
        }
    }
}

#[test]
fn no_failure_lets_a_shadow_keep_bytes_that_were_overwritten() {
    let errnos = ERRNOS.into_iter().flat_map(|errno| [(OnWrite::Reapply, errno), (OnWrite::Remove, errno)]);
    for ((policy, errno), n) in errnos.flat_map(|each| (1..60).map(move |n| (each, n))) {
        let mut w = empty();
        let spec = TapSpec { on_write: Some(policy), wanted: false, ..spec(&w.session, w.context, Va(CODE.0 + 3)) };
        let tap = w.session.add(&spec).unwrap();
        let view = w.session.tap_view();
        let store = access(view, w.context, CODE_PA, CODE, MemoryAccess::W, 4);
        w.driver.inner().push_event(store);
        w.driver.fail_nth_with(n, Failure::Errno(errno));
        let first = poll(&mut w.session).is_err();
        // Whatever failed, the store is done under a step that is reported.
        w.driver.inner().poke(CODE_PA, &[1, 2, 3, 4]).unwrap();
        let step = VmiEvent { view: Some(View::DEFAULT), reason: EventReason::SingleStep { gfn: None }, ..store };
        let answered = w.driver.inner().answers().len();
        if answered == 0 {
            // The event itself could not be had: it comes again.
            poll(&mut w.session).unwrap();
        }
        w.driver.inner().push_event(step);
        let failed = u32::from(first) + (0..3).map(|_| u32::from(poll(&mut w.session).is_err())).sum::<u32>();
        let is_done = w.driver.is_armed();
        assert_absorbed_or_told(&w, failed, is_done, &format!("{policy:?}, call {n} with {errno}"));
        let shown = w.driver.inner().peek_in_view(view, CODE_PA, 4).unwrap();
        let kept = policy == OnWrite::Reapply || w.session.state(tap) == TapState::Active;
        assert_eq!(shown, [1, 2, 3, if kept { 0xcc } else { 4 }], "{policy:?}, call {n}");
        assert_eq!(w.driver.inner().state().vcpus[0].view, view, "{policy:?}, call {n}");
        if is_done {
            assert!(n > 4 && kept == (policy == OnWrite::Reapply));
        }
    }
}

#[test]
fn a_register_write_that_is_to_be_denied_is_denied_whichever_call_fails() {
    for (errno, n) in ERRNOS.into_iter().flat_map(|errno| (1..9).map(move |n| (errno, n))) {
        let mut w = empty();
        let set = EventSet { msrs: [Some(0x10), None, None, None, None, None, None, None], ..EventSet::default() };
        w.session.add(&TapSpec { kind: TapKind::Monitor(set), ..spec(&w.session, w.context, Va(0)) }).unwrap();
        let event = int3(w.session.tap_view(), w.context, CODE, CODE_PA);
        w.driver.inner().push_event(VmiEvent { reason: EventReason::WriteMsr { msr: 0x10, old: 0, new: 1 }, ..event });
        assert!(matches!(poll(&mut w.session), Ok(Poll::Hit(_))));
        w.driver.fail_nth_with(n, Failure::Errno(errno));
        let answered = w.session.answer(Verdict::Deny);
        let is_done = w.driver.is_armed();
        w.driver.fail_nth(0);
        let answers = w.driver.inner().answers();
        assert_eq!((answers.len(), answers[0].1.action), (1, vmitap::event::EventAction::Deny), "call {n}: {answered:?}");
        if is_done {
            assert!(answered.is_ok() && n > 1, "{n}");
            continue;
        }
        assert!(n < 8, "{n}");
        assert_told(&w.driver, errno, answered.as_ref().err());
    }
}

#[test]
fn a_store_that_is_to_be_denied_is_denied_whichever_call_fails() {
    for (errno, n) in ERRNOS.into_iter().flat_map(|errno| (1..8).map(move |n| (errno, n))) {
        let mut w = empty();
        w.session.add(&TapSpec { on_write: Some(OnWrite::Deny), ..spec(&w.session, w.context, CODE) }).unwrap();
        let event = access(w.session.tap_view(), w.context, CODE_PA, CODE, MemoryAccess::W, 4);
        w.driver.inner().push_event(event);
        w.driver.fail_nth_with(n, Failure::Errno(errno));
        let failed = (0..3).filter(|_| poll(&mut w.session).is_err()).count();
        assert_eq!(failed, usize::from(!w.driver.is_armed()), "call {n} with {errno}");
        let answers = w.driver.inner().answers();
        assert_eq!((answers.len(), answers[0].1.action), (1, vmitap::event::EventAction::Deny), "call {n}");
    }
}
