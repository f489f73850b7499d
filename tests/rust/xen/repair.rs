//! The tool is killed while it taps a domain: whatever call it dies at, the domain is brought back from the journal.

use std::cell::RefCell;
use std::path::PathBuf;

use vmitap::arch::amd64::AddressContext;
use vmitap::driver::xen::{XenDriver, XenOptions};
use vmitap::driver::{VmiControl, VmiDriver};
use vmitap::session::journal::Journal;
use vmitap::session::{EventSet, Journaled, Limits, Poll, Session, TapKind, TapSpec, Verdict, repair};
use vmitap::tap::OnWrite;
use vmitap::{MemoryAccess, Pa, Va, VcpuId, VmiError};
use xen_sys::fake::{Fake, Kind};

use super::session::{looping, spec};
use super::{CODE, options};
use crate::harness::{Death, Faulty};
use crate::journal::{Folder, guest_id};

/// Everything that changes a domain.
fn script(driver: Box<dyn VmiDriver>, fake: &Fake) -> Result<(), VmiError> {
    let mut session = Session::new(driver, OnWrite::Reapply)?;
    let view = session.tap_view();
    let tap = session.add(&spec(view, true))?;
    session.add(&TapSpec { va: Va(CODE + 1), ..spec(view, false) })?;
    let context = AddressContext { root: Pa(0), levels: 4 };
    let watch = TapKind::Watch { len: 8, access: MemoryAccess::W };
    let watch = session.add(&TapSpec { kind: watch, va: Va(0x9000), context, ..spec(view, true) })?;
    let set = EventSet { registers: [false, true, false], descriptors: true, ..EventSet::default() };
    let monitor = session.add(&TapSpec { kind: TapKind::Monitor(set), va: Va(0), ..spec(view, false) })?;
    let other = session.create_view(MemoryAccess::RWX)?;
    fake.automatic(50);
    for turn in 0..8 {
        if let Poll::Hit(_) = session.poll(&Limits::default())? {
            session.answer(if turn == 3 { Verdict::Step(2) } else { Verdict::Continue })?;
        }
        match turn {
            1 => session.remove(watch)?,
            2 => session.pause()?,
            3 => session.resume()?,
            4 => drop(session.add(&TapSpec { view: other, ..spec(view, true) })?),
            5 => session.switch_to_view(other)?,
            6 => session.remove(tap)?,
            7 => session.remove(monitor)?,
            _ => {}
        }
    }
    session.registers(VcpuId(0))?;
    session.detach()
}

/// How many calls there were, and whether the tool died. So many instructions each vCPU executes between any two calls of the repair.
fn killed(kind: Kind, death: Option<Death>, meanwhile: i32) -> (usize, bool) {
    let folder = Folder::new(if meanwhile == 0 { "xen-killed" } else { "xen-killed-meanwhile" });
    let (kept, path) = (folder.0.join("kept"), folder.0.join("test-1.journal"));
    let fake = looping(kind, 2);
    let journal = Journal::begin(&folder.0, &guest_id()).unwrap();
    let driver = XenDriver::attach("guest", &options(&fake)).unwrap();
    let tool = Faulty::mortal(driver, death, {
        let (kept, path) = (kept.clone(), path.clone());
        move || {
            std::fs::copy(&path, &kept).unwrap();
        }
    });
    let done = Journaled::new(Box::new(tool.clone()), journal).and_then(|driver| script(Box::new(driver), &fake));
    let (calls, is_dead) = tool.end();
    assert_eq!(done.is_err(), is_dead, "{done:?} {death:?}");
    if is_dead {
        // The process is gone: nothing of its driver runs any more, and its files are closed.
        std::mem::forget(tool.clone());
        std::fs::rename(&kept, &path).unwrap();
        let journal = Journal::left(&folder.0, &guest_id()).unwrap().unwrap();
        fake.always(meanwhile);
        let mut driver = XenDriver::attach("guest", &XenOptions { take_over: true, ..options(&fake) }).unwrap();
        repair(&mut driver, journal.remains()).unwrap_or_else(|error| panic!("{death:?} of {calls:?}: {error}"));
        driver.let_go().unwrap_or_else(|error| panic!("{death:?} of {calls:?}: {error}"));
        journal.close().unwrap();
    }
    drop(tool);
    fake.automatic(0);
    fake.always(0);
    assert_eq!(folder.files(), 0);
    for what in [
        "listening",
        "monitors",
        "views",
        "altp2m",
        "pauses",
        "held",
        "single_step",
        "view",
        "uds",
        "int3s",
        "exposures",
        "exits",
    ] {
        for vcpu in [0, 1] {
            assert_eq!(fake.state(what, vcpu), 0, "{death:?}: {what} of vCPU {vcpu}");
        }
    }
    assert_eq!((fake.state("populated", 0), fake.state("max_pages", 0)), (64, 64), "{death:?}");
    for vcpu in [0, 1] {
        assert_eq!(fake.run(vcpu, 100), 100, "{death:?}: vCPU {vcpu} runs on unobserved");
    }
    (calls.len(), is_dead)
}

#[test]
fn whenever_the_tool_is_killed_the_domain_is_brought_back() {
    for kind in [Kind::new(6, 14), Kind::new(7, 17), Kind::new(7, 20)] {
        let (calls, is_dead) = killed(kind, None, 0);
        assert!(calls > 40 && !is_dead, "{calls}");
        for n in 1..=calls {
            for death in [Death::Before(n), Death::After(n)] {
                killed(kind, Some(death), 0);
            }
        }
    }
}

thread_local! {
    /// The journal of a tool that is about to die, and where its state at that moment is kept.
    static KEPT: RefCell<Option<(PathBuf, PathBuf)>> = const { RefCell::new(None) };
}

extern "C" fn keep_the_journal() {
    KEPT.with_borrow(|kept| {
        let (path, copy) = kept.as_ref().unwrap();
        // At the last calls there is none any more.
        let _ = std::fs::copy(path, copy);
    });
}

/// As `killed`, at a call of Xen's libraries. How many there were.
fn killed_at_call(kind: Kind, n: i64) -> i64 {
    let folder = Folder::new(&format!("xen-killed-{}", kind.minor));
    let (kept, path) = (folder.0.join("kept"), folder.0.join("test-1.journal"));
    let fake = looping(kind, 2);
    KEPT.set(Some((path.clone(), kept.clone())));
    fake.die_at(n, keep_the_journal);
    let journal = Journal::begin(&folder.0, &guest_id()).unwrap();
    let tool = XenDriver::attach("guest", &options(&fake))
        .and_then(|driver| Journaled::new(Box::new(driver), journal))
        .and_then(|driver| script(Box::new(driver), &fake));
    let calls = fake.total();
    // Of the last calls of a session it makes no difference to it whether they were done.
    assert!(tool.is_ok() || n > 0, "{tool:?}");
    let name = fake.name(n);
    fake.die_at(0, keep_the_journal);
    // There is none any more once everything is taken back.
    if kept.exists() {
        std::fs::rename(&kept, &path).unwrap();
        let journal = Journal::left(&folder.0, &guest_id()).unwrap().unwrap();
        let mut driver = XenDriver::attach("guest", &XenOptions { take_over: true, ..options(&fake) }).unwrap();
        repair(&mut driver, journal.remains()).unwrap_or_else(|error| panic!("call {n}, {name}: {error}"));
        driver.let_go().unwrap_or_else(|error| panic!("call {n}, {name}: {error}"));
        journal.close().unwrap();
    }
    fake.automatic(0);
    for what in ["listening", "monitors", "views", "altp2m", "pauses", "held", "single_step", "view", "uds", "int3s", "exposures"]
    {
        for vcpu in [0, 1] {
            assert_eq!(fake.state(what, vcpu), 0, "call {n}, {name}: {what} of vCPU {vcpu}");
        }
    }
    assert_eq!(fake.state("populated", 0), 64, "call {n}, {name}");
    // Nobody knows what the limit was if it was raised and no frame added yet, or the frames are gone already.
    if !["xc_domain_populate_physmap_exact", "xc_domain_setmaxmem"].contains(&name.as_str()) {
        assert_eq!(fake.state("max_pages", 0), 64, "call {n}, {name}");
    }
    for vcpu in [0, 1] {
        assert_eq!(fake.run(vcpu, 100), 100, "call {n}, {name}: vCPU {vcpu} runs on unobserved");
    }
    calls
}

#[test]
fn a_tool_that_dies_inside_of_any_driver_call_is_cleaned_up_after() {
    for kind in Kind::ALL {
        let calls = killed_at_call(kind, 0);
        assert!(calls > 150, "{calls}");
        for n in 1..=calls {
            killed_at_call(kind, n);
        }
    }
}

#[test]
fn a_repair_misses_nothing_that_the_guest_does_meanwhile() {
    let kind = Kind::new(7, 20);
    let (calls, _) = killed(kind, None, 1);
    for n in 1..=calls {
        for instructions in [1, 3, 50] {
            killed(kind, Some(Death::After(n)), instructions);
        }
    }
}
