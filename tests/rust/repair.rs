//! Cleaning up after a session that ended without a word.

use std::fs;
use std::sync::LazyLock;
use std::time::Duration;

use vmitap::arch::amd64::{AddressContext, Registers};
use vmitap::driver::mock::MockDriver;
use vmitap::driver::{Additions, VmiDriver, VmiEvents, VmiRepair, VmiViews, Wait};
use vmitap::event::{EventReason, VmiEvent};
use vmitap::session::journal::Journal;
use vmitap::session::{Journaled, Limits, Poll, Session, TapKind, TapSpec, Verdict, repair};
use vmitap::tap::OnWrite;
use vmitap::{Gfn, MemoryAccess, Va, VcpuId, View, VmiError};

use crate::guest::Lab;
use crate::harness::{Death, Faulty};
use crate::journal::{Folder, guest_id};

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
    additions_are_listed(&mut Lab::of("calls.S").vm);
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

pub fn breakpoint<D: VmiDriver + ?Sized>(session: &Session<D>, context: AddressContext, va: Va) -> TapSpec {
    TapSpec {
        kind: TapKind::Breakpoint,
        va,
        context,
        global: true,
        view: session.tap_view(),
        on_write: None,
        key: None,
        wanted: true,
        enabled: true,
    }
}

/// A session with everything in it that changes a guest. Comes back early if a call fails, as a tool that dies does.
fn script(driver: Box<dyn VmiDriver>, taps: &[Va], watched: Va) -> Result<(), VmiError> {
    let mut session = Session::new(driver, OnWrite::Reapply)?;
    let context = AddressContext::from(&session.registers(VcpuId(0))?);
    let spec = |session: &Session, va| breakpoint(session, context, va);
    let specs: Vec<TapSpec> = taps.iter().map(|va| spec(&session, *va)).collect();
    let ids = session.add_many(&specs)?;
    let watch = TapSpec { kind: TapKind::Watch { len: 8, access: MemoryAccess::W }, ..spec(&session, watched) };
    let watch = session.add(&watch)?;
    let other = session.create_view(MemoryAccess::RWX)?;
    for turn in 0..12 {
        match session.poll(&Limits::default())? {
            Poll::Hit(_) if turn == 3 => session.answer(Verdict::Step(2))?,
            Poll::Hit(_) => session.answer(Verdict::Continue)?,
            _ => {}
        }
        match turn {
            2 => session.pause()?,
            4 => session.resume()?,
            5 => session.remove(watch)?,
            6 => session.disable(ids[0]).and_then(|()| session.enable(ids[0]))?,
            8 => drop(session.add(&TapSpec { view: other, ..specs[0] })?),
            9 => session.switch_to_view(other)?,
            10 => session.destroy_view(other)?,
            _ => {}
        }
    }
    session.detach()
}

/// How many calls the guest makes: more than a session is there for.
const CALLS: u32 = 30_000;

/// What the guest's own counters and checks say at its end.
pub fn truth(lab: &Lab) -> Vec<u64> {
    ["f_count", "f_sum", "g_count", "h_count", "wrong_results"].map(|name| lab.word(name)).to_vec()
}

pub fn untapped(calls: u32) -> Vec<u64> {
    let mut lab = boot(calls);
    lab.run();
    truth(&lab)
}

/// A guest in the middle of its calls: what it reads of itself before and after them would be thousands of events each time.
pub fn boot(calls: u32) -> Lab {
    static ELF: LazyLock<Vec<u8>> = LazyLock::new(|| crate::guest::assemble("calls.S"));
    let mut lab = Lab::boot(&ELF, &crate::guest::options(1, &format!("n={calls} every=0"))).unwrap();
    while lab.word("f_count") == 0 {
        assert_eq!(lab.vm.wait(Duration::ZERO).unwrap(), Wait::Timeout);
    }
    lab
}

/// Runs the script on a fresh guest, lets the tool die, repairs, and lets the guest come to its end. How many calls there were.
fn killed(death: Option<Death>, name: &str, plain: &[u64]) -> (Vec<&'static str>, bool) {
    let folder = Folder::new(name);
    let lab = boot(CALLS);
    let (taps, watched) = (["f", "g", "h"].map(|name| lab.va(name)), lab.va("tapped_start"));
    let Lab { vm, .. } = lab;
    let before = vm.additions().unwrap();
    let (kept, path) = (folder.0.join("kept"), folder.0.join("test-1.journal"));
    // What the dead process can no longer write is not in the file.
    let tool = Faulty::mortal(vm, death, {
        let (kept, path) = (kept.clone(), path.clone());
        move || {
            fs::copy(&path, &kept).unwrap();
        }
    });
    let journal = Journal::begin(&folder.0, &guest_id()).unwrap();
    let done = Journaled::new(Box::new(tool.clone()), journal).and_then(|driver| script(Box::new(driver), &taps, watched));
    let (calls, is_dead) = tool.end();
    assert_eq!(done.is_err(), is_dead, "{done:?} {death:?}");
    if is_dead {
        fs::rename(&kept, &path).unwrap();
        let error = Journal::begin(&folder.0, &guest_id()).unwrap_err();
        assert!(matches!(error, VmiError::JournalLeft { .. }), "{error}");
        let journal = Journal::left(&folder.0, &guest_id()).unwrap().unwrap();
        repair(&mut *tool.inner(), journal.remains()).unwrap();
        journal.close().unwrap();
    }
    assert_eq!(folder.files(), 0, "{death:?}");
    let vm = tool.into_inner();
    assert_eq!(vm.additions().unwrap(), before, "{death:?}");
    let mut lab = Lab { vm, ..lab };
    lab.run_with(|_, event| panic!("{death:?}: nobody is left to answer {event:x?}"));
    lab.assert_unseen();
    assert_eq!(truth(&lab), plain, "{death:?}");
    (calls, is_dead)
}

#[test]
fn leaving_in_the_middle_of_steps_leaves_no_vcpu_behind_that_waits_for_an_answer() {
    let lab = boot(CALLS);
    let va = lab.va("f");
    let Lab { vm, .. } = lab;
    let tool = Faulty::new(vm);
    let driver: Box<dyn VmiDriver> = Box::new(tool.clone());
    let mut session = Session::new(driver, OnWrite::Reapply).unwrap();
    let context = AddressContext::from(&session.registers(VcpuId(0)).unwrap());
    session.add(&breakpoint(&session, context, va)).unwrap();
    assert!(matches!(session.poll(&Limits::default()).unwrap(), Poll::Hit(_)));
    session.answer(Verdict::Step(5)).unwrap();
    session.detach().unwrap();
    drop(session);
    let vm = tool.into_inner();
    let mut lab = Lab { vm, ..lab };
    lab.run_with(|_, event| panic!("nobody is left to answer {event:x?}"));
    lab.assert_unseen();
}

#[test]
fn a_session_that_ends_leaves_no_journal() {
    let (calls, is_dead) = killed(None, "whole", &untapped(CALLS));
    assert!(calls.contains(&"create_view") && calls.contains(&"pause") && !is_dead);
}

#[test]
fn whenever_the_tool_is_killed_the_guest_is_repaired_and_comes_to_its_end() {
    let plain = untapped(CALLS);
    let (calls, _) = killed(None, "counted", &plain);
    assert!((60..300).contains(&calls.len()), "{calls:?}");
    for n in 1..=calls.len() {
        for death in [Death::Before(n), Death::After(n)] {
            let (_, is_dead) = killed(Some(death), "killed", &plain);
            assert!(is_dead, "{death:?}");
        }
    }
}
