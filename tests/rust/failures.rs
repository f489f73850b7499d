//! Whole sessions in which a call fails: with every errno, and because the guest is gone.

use std::time::{Duration, Instant};

use vmitap::arch::amd64::AddressContext;
use vmitap::driver::emu::EmuDriver;
use vmitap::driver::{VmiDriver, VmiRepair};
use vmitap::session::{EventSet, Limits, Poll, Session, TapKind, TapSpec, Verdict};
use vmitap::tap::OnWrite;
use vmitap::{MemoryAccess, Result, Va, VcpuId, VmiError};

use super::guest::Lab;
use super::harness::{ERRNOS, Failure, Faulty};
use super::repair::{boot, breakpoint, truth, untapped};

/// Does what may fail once more if it does, as a caller who wants it done; the errors are kept.
struct Persistent {
    errors: Vec<VmiError>,
    gives_up: bool,
    /// The failure is still to come when the end begins.
    fails_at_end: bool,
}

impl Persistent {
    fn done<T>(&mut self, mut op: impl FnMut() -> Result<T>) -> Result<T> {
        op().or_else(|error| {
            let again = if self.gives_up { Err(error.clone()) } else { op() };
            self.errors.push(error);
            again
        })
    }
}

/// A session with everything in it that changes a guest.
fn session(driver: &Faulty<EmuDriver>, taps: &[Va], watched: Va, caller: &mut Persistent) -> Result<()> {
    let open = || Session::new(Box::new(driver.clone()) as Box<dyn VmiDriver>, OnWrite::Reapply);
    let mut session = caller.done(open)?;
    let done = use_it(&mut session, taps, watched, caller);
    caller.fails_at_end = driver.is_armed();
    // Whatever was before, this is the end.
    caller.done(|| session.detach()).and(done)
}

fn use_it(session: &mut Session, taps: &[Va], watched: Va, caller: &mut Persistent) -> Result<()> {
    let context = AddressContext::from(&caller.done(|| session.registers(VcpuId(0)))?);
    let specs: Vec<TapSpec> = taps.iter().map(|va| breakpoint(session, context, *va)).collect();
    let ids = caller.done(|| session.add_many(&specs))?;
    let watch = TapSpec { kind: TapKind::Watch { len: 8, access: MemoryAccess::W }, ..breakpoint(session, context, watched) };
    let watch = caller.done(|| session.add(&watch))?;
    let set = EventSet { registers: [true, true, false], cpuid: true, ..EventSet::default() };
    let monitor = TapSpec { kind: TapKind::Monitor(set), ..breakpoint(session, context, Va(0)) };
    let monitor = caller.done(|| session.add(&monitor))?;
    let other = caller.done(|| session.create_view(MemoryAccess::RWX))?;
    for turn in 0..12 {
        if matches!(caller.done(|| session.poll(&Limits::default()))?, Poll::Hit(_)) {
            // A hit whose answer fails is answered all the same, so there is nothing to do again.
            let verdict = if turn == 3 { Verdict::Step(2) } else { Verdict::Continue };
            if let Err(error) = session.answer(verdict) {
                caller.errors.push(error.clone());
                if caller.gives_up {
                    return Err(error);
                }
            }
        }
        match turn {
            2 => caller.done(|| session.pause())?,
            4 => caller.done(|| session.resume())?,
            5 => caller.done(|| session.remove(watch))?,
            6 => {
                caller.done(|| session.disable(ids[0]))?;
                caller.done(|| session.enable(ids[0]))?;
            }
            7 => caller.done(|| session.disable(monitor))?,
            8 => drop(caller.done(|| session.add(&TapSpec { view: other, ..specs[0] }))?),
            9 => caller.done(|| session.switch_to_view(other))?,
            10 => caller.done(|| session.destroy_view(other))?,
            _ => {}
        }
    }
    Ok(())
}

/// How many calls the guest makes: more than a session is there for.
const CALLS: u32 = 2000;

fn errno_of(error: &VmiError) -> Option<i32> {
    match error {
        VmiError::Driver { errno, .. } => Some(*errno),
        VmiError::UndoFailed { cause, .. } => errno_of(cause),
        _ => None,
    }
}

/// What came of a session whose n-th call fails.
struct Came {
    /// Whether there was such a call.
    failed: bool,
    done: Result<()>,
    errors: Vec<VmiError>,
    at_end: bool,
    lab: Lab,
}

fn run(n: usize, failure: Failure) -> Came {
    let lab = boot(CALLS);
    let (taps, watched) = (["f", "g", "h"].map(|name| lab.va(name)), lab.va("tapped_start"));
    let Lab { vm, .. } = lab;
    let before = vm.additions().unwrap();
    let driver = Faulty::new(vm);
    driver.fail_nth_with(n, failure);
    let mut caller = Persistent { errors: Vec::new(), gives_up: failure == Failure::Gone, fails_at_end: false };
    let begin = Instant::now();
    let done = session(&driver, &taps, watched, &mut caller);
    assert!(begin.elapsed() < Duration::from_secs(5), "{failure:?} at {n}: it took {:?}", begin.elapsed());
    let failed = !driver.is_armed() || failure == Failure::Gone && done.is_err();
    driver.fail_nth(0);
    let lab = Lab { vm: driver.into_inner(), ..lab };
    if failure != Failure::Gone {
        assert_eq!(lab.vm.additions().unwrap(), before, "{failure:?} at {n}");
    }
    Came { failed, done, errors: caller.errors, at_end: caller.fails_at_end, lab }
}

#[test]
fn whichever_call_fails_with_whichever_errno_it_is_told_and_the_session_and_its_guest_go_on() {
    let plain = untapped(CALLS);
    for n in 1.. {
        for errno in ERRNOS {
            let came = run(n, Failure::Errno(errno));
            came.done.unwrap();
            if !came.failed {
                assert!(n > 60, "{n} calls");
                assert!(came.errors.is_empty(), "{:?}", came.errors);
                return;
            }
            match &came.errors[..] {
                [error] => assert_eq!(errno_of(error), Some(errno), "{error:?}"),
                // The end does some of its work in another way then.
                [] => assert!(came.at_end, "{errno} at {n} is not told"),
                other => panic!("{errno} at {n}: {other:?}"),
            }
            let mut lab = came.lab;
            lab.run_with(|_, event| panic!("{errno} at {n}: nobody is left to answer {event:x?}"));
            lab.assert_unseen();
            assert_eq!(truth(&lab), plain, "{errno} at {n}");
        }
    }
}

#[test]
fn wherever_the_guest_goes_away_the_next_call_says_so_once_and_the_session_ends_promptly() {
    for n in 1.. {
        let came = run(n, Failure::Gone);
        if !came.failed {
            assert!(n > 60, "{n} calls");
            return;
        }
        assert!(matches!(came.errors[..], [VmiError::DomainGone { .. }]), "at {n}: {:?}", came.errors);
    }
}
