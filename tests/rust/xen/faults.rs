//! Every call of Xen's libraries fails once, with every error number it can have, for a whole session: what was asked for has not happened, and
//! asked for again it does. And the domain goes away at every call.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use vmitap::arch::amd64::{AddressContext, ControlRegister, Injection, InjectionKind};
use vmitap::driver::xen::XenDriver;
use vmitap::driver::{Monitor, VmiEvents};
use vmitap::session::journal::Journal;
use vmitap::session::{GpChanges, Journaled, Limits, Poll, Session, TapId, TapKind, TapSpec, Verdict};
use vmitap::tap::OnWrite;
use vmitap::{MemoryAccess, Pa, Result, Va, VcpuId, View, VmiError};
use xen_sys::fake::{Fake, Kind, Reg};

use super::session::{looping, spec};
use super::{CODE, is_untouched, options};
use crate::journal::{Folder, guest_id};
use crate::lines::{listen, logged};

/// What a session consists of, and what it has so far.
struct Tool<'a> {
    fake: &'a Fake,
    folder: &'a Folder,
    session: Option<Session<Journaled<XenDriver>>>,
    taps: Vec<TapId>,
    other: View,
    hits: usize,
    /// A hit is in hand.
    holds: bool,
    /// The guest has shut down.
    is_down: bool,
    is_paused: bool,
}

type Step = fn(&mut Tool<'_>) -> Result<()>;

impl Tool<'_> {
    fn session(&mut self) -> &mut Session<Journaled<XenDriver>> {
        self.session.as_mut().unwrap()
    }

    /// Until there are so many more hits, each of them answered.
    fn hits(&mut self, count: usize, verdict: &Verdict) -> Result<()> {
        let end = self.hits + count;
        let mut waits = 0;
        while self.hits < end {
            waits += 1;
            if !self.holds {
                let poll = self.session().poll(&Limits::default())?;
                assert!(waits < 25, "no more hits come but {poll:?}");
                self.holds = matches!(poll, Poll::Hit(_));
                if matches!(poll, Poll::Idle) && self.fake.knob("shutdown") == 1 {
                    self.is_down = true;
                }
            }
            if self.is_down {
                return Ok(());
            }
            if self.holds {
                self.session().answer(verdict.clone())?;
                self.holds = false;
                self.hits += 1;
            }
        }
        Ok(())
    }
}

const STEPS: &[(&str, Step)] = &[
    ("attach", |tool| {
        let journal = Journal::begin(&tool.folder.0, &guest_id())?;
        let driver = XenDriver::attach("guest", &options(tool.fake));
        let driver = match driver {
            Ok(driver) => Journaled::new(Box::new(driver), journal)?,
            Err(error) => {
                // As whoever opens a guest does (session/guard.rs).
                journal.close()?;
                return Err(error);
            }
        };
        tool.session = Some(Session::new(Box::new(driver), OnWrite::Reapply)?);
        Ok(())
    }),
    ("add a breakpoint", |tool| {
        let view = tool.session().tap_view();
        let tap = tool.session().add(&spec(view, true))?;
        tool.taps.push(tap);
        Ok(())
    }),
    ("add another", |tool| {
        let view = tool.session().tap_view();
        let tap = tool.session().add(&TapSpec { va: Va(CODE + 1), ..spec(view, false) })?;
        tool.taps.push(tap);
        Ok(())
    }),
    ("add a watch", |tool| {
        let kind = TapKind::Watch { len: 8, access: MemoryAccess::W };
        let context = AddressContext { root: Pa(0), levels: 4 };
        let view = tool.session().tap_view();
        let tap = tool.session().add(&TapSpec { kind, va: Va(0x9000), context, ..spec(view, true) })?;
        tool.taps.push(tap);
        Ok(())
    }),
    ("make a view", |tool| {
        tool.other = tool.session().create_view(MemoryAccess::RWX)?;
        Ok(())
    }),
    ("hits", |tool| {
        tool.fake.automatic(50);
        tool.hits(3, &Verdict::Continue)
    }),
    ("a hit that steps", |tool| tool.hits(1, &Verdict::Step(2))),
    ("hits after it", |tool| tool.hits(2, &Verdict::Continue)),
    ("read and set registers", |tool| {
        let mut changes = GpChanges::default();
        changes.values[15] = Some(0x15);
        tool.session().set_registers(VcpuId(1), &changes)
    }),
    ("write memory", |tool| tool.session().write_pa(Pa(0xa000), &[7; 16])),
    ("inject", |tool| {
        let injection = Injection { vector: 0x20, kind: InjectionKind::External, error_code: None, insn_len: 0, cr2: None };
        tool.session().inject(VcpuId(0), &injection)
    }),
    ("monitor CR3", |tool| tool.session().vmi_mut().driver_mut().monitor(Monitor::ControlRegister(ControlRegister::Cr3), true)),
    ("monitor an MSR", |tool| tool.session().vmi_mut().driver_mut().monitor(Monitor::Msr(0xc000_0082), true)),
    ("monitor descriptor tables", |tool| tool.session().vmi_mut().driver_mut().monitor(Monitor::DescriptorAccess, true)),
    ("monitor requests", |tool| tool.session().vmi_mut().driver_mut().monitor(Monitor::GuestRequest, true)),
    ("monitor CPUID", |tool| tool.session().vmi_mut().driver_mut().monitor(Monitor::Cpuid, true)),
    ("stop monitoring CR3", |tool| {
        tool.session().vmi_mut().driver_mut().monitor(Monitor::ControlRegister(ControlRegister::Cr3), false)
    }),
    ("stop monitoring", |tool| {
        let monitors = [Monitor::Msr(0xc000_0082), Monitor::DescriptorAccess, Monitor::GuestRequest, Monitor::Cpuid];
        monitors.into_iter().try_for_each(|monitor| tool.session().vmi_mut().driver_mut().monitor(monitor, false))
    }),
    ("pause", |tool| {
        tool.session().pause()?;
        tool.is_paused = true;
        Ok(())
    }),
    ("change a page while it is paused", |tool| {
        let view = tool.other;
        let tap = tool.session().add(&spec(view, true))?;
        tool.taps.push(tap);
        Ok(())
    }),
    ("resume", |tool| if tool.is_paused { tool.session().resume() } else { Ok(()) }),
    ("hits after the pause", |tool| tool.hits(2, &Verdict::Continue)),
    ("switch the view", |tool| {
        let view = tool.other;
        tool.session().switch_to_view(view)
    }),
    ("hits in the other view", |tool| tool.hits(2, &Verdict::Continue)),
    ("switch back", |tool| {
        let view = tool.session().tap_view();
        tool.session().switch_to_view(view)
    }),
    ("remove what is in the other view", |tool| {
        // Without the domain it was never put in.
        let Some(tap) = tool.taps.last().copied() else { return Ok(()) };
        tool.session().remove(tap)?;
        tool.taps.pop();
        Ok(())
    }),
    ("remove the other view", |tool| {
        let view = tool.other;
        tool.session().destroy_view(view)
    }),
    ("remove the watch", |tool| {
        // Without the domain it was never put in.
        let Some(tap) = tool.taps.last().copied() else { return Ok(()) };
        tool.session().remove(tap)?;
        tool.taps.pop();
        Ok(())
    }),
    ("remove a breakpoint", |tool| {
        // Without the domain it was never put in.
        let Some(tap) = tool.taps.last().copied() else { return Ok(()) };
        tool.session().remove(tap)?;
        tool.taps.pop();
        Ok(())
    }),
    ("a last hit, of which one stays in hand", |tool| {
        tool.hits(1, &Verdict::Continue)?;
        tool.holds = tool.holds || matches!(tool.session().poll(&Limits::default())?, Poll::Hit(_));
        Ok(())
    }),
    ("detach", |tool| tool.session().detach()),
];

fn tool<'a>(fake: &'a Fake, folder: &'a Folder) -> Tool<'a> {
    Tool {
        fake,
        folder,
        session: None,
        taps: Vec::new(),
        other: View::DEFAULT,
        hits: 0,
        holds: false,
        is_down: false,
        is_paused: false,
    }
}

/// Error numbers that a call of Xen's libraries can have: those of privcmd and the hypercall buffers, of XSM, and of the functions themselves.
const ERRORS: &[(&str, i32)] = &[
    ("EPERM", 1),
    ("ENOENT", 2),
    ("ESRCH", 3),
    ("EINTR", 4),
    ("EIO", 5),
    ("E2BIG", 7),
    ("EAGAIN", 11),
    ("ENOMEM", 12),
    ("EACCES", 13),
    ("EFAULT", 14),
    ("EBUSY", 16),
    ("EEXIST", 17),
    ("ENODEV", 19),
    ("EINVAL", 22),
    ("ENOSPC", 28),
    ("ERANGE", 34),
    ("ENOSYS", 38),
    ("ENODATA", 61),
    ("EOPNOTSUPP", 95),
    ("ENOBUFS", 105),
];

/// A number that says something true and is no failure, that what is asked for is so already; or a call that fails only for whoever made a mistake.
fn is_an_answer(function: &str, error: i32) -> bool {
    error == 17 && function.starts_with("xc_monitor_") || function == "xenforeignmemory_unmap"
}

fn is_typed(error: &VmiError, errno: i32) -> bool {
    match error {
        VmiError::Driver { errno: found, .. } => *found == errno,
        VmiError::DomainGone { .. } => errno == 3,
        VmiError::Attach { reason, hint, .. } => !reason.is_empty() && !hint.is_empty(),
        // A hole in the guest's memory.
        VmiError::OutOfRange { .. } | VmiError::Translation { .. } => [2, 3, 22].contains(&errno),
        VmiError::NotSupported { .. } => errno == 38,
        VmiError::UndoFailed { cause, .. } => is_typed(cause, errno),
        _ => false,
    }
}

/// A whole session in which call `n` fails with `errno`; what failed of it, if anything did.
fn with_a_failing_call(kind: Kind, n: i64, (name, errno): (&str, i32)) -> Option<(String, VmiError)> {
    let fake = looping(kind, 2);
    fake.fail_call(n, errno);
    let folder = own_folder();
    let mut tool = tool(&fake, &folder);
    let mut failed = None::<(String, VmiError)>;
    for (what, step) in STEPS {
        let Err(error) = step(&mut tool) else { continue };
        let told = format!("call {n} ({}) of {kind:?} fails with {name}: {what}: {error:?}", fake.name(n));
        assert!(failed.is_none(), "{told}, after {failed:?}");
        assert!(is_typed(&error, errno), "{told}");
        step(&mut tool).unwrap_or_else(|again| panic!("{told}, and again {again:?}"));
        failed = Some(((*what).to_owned(), error));
    }
    // Not only once the session is dropped.
    let left = folder.files();
    drop(tool);
    fake.automatic(0);
    let told = format!("call {n} ({}) of {kind:?} fails with {name}: {failed:?}", fake.name(n));
    // Who is told that the domain is gone, although it is there, has to believe it.
    assert!(left == 0 || errno == 3, "{told}: a journal is left");
    let restored = std::panic::catch_unwind(|| is_untouched(&fake));
    assert!(restored.is_ok(), "{told}");
    for vcpu in [0, 1] {
        assert_eq!(fake.run(vcpu, 100), 100, "{told}: vCPU {vcpu} runs on unobserved");
        for what in ["int3s", "uds", "misplaced", "down", "held", "single_step"] {
            assert_eq!(fake.state(what, vcpu.into()), 0, "{told}: {what} of vCPU {vcpu}");
        }
        let seen = fake.reg(vcpu, Reg::Rax) & 0xff;
        assert!(seen == 0x55 || seen == 0, "{told}: vCPU {vcpu} saw {seen:#x}");
    }
    failed
}

/// For the journals of one session.
fn own_folder() -> Folder {
    static NUMBER: AtomicI64 = AtomicI64::new(0);
    Folder::new(&format!("xen-faults-{}", NUMBER.fetch_add(1, Ordering::Relaxed)))
}

/// The calls of a session in which none fails.
fn calls(kind: Kind) -> Vec<String> {
    let fake = looping(kind, 2);
    let folder = own_folder();
    let mut tool = tool(&fake, &folder);
    for (what, step) in STEPS {
        step(&mut tool).unwrap_or_else(|error| panic!("{what}: {error}"));
    }
    drop(tool);
    fake.automatic(0);
    is_untouched(&fake);
    (1..=fake.total()).map(|n| fake.name(n)).collect()
}

#[test]
fn whichever_call_fails_with_whichever_error_it_is_told_and_the_next_try_does_it() {
    for (kind, errors) in [(Kind::ALL[1], ERRORS), (Kind::ALL[0], &ERRORS[6..9]), (Kind::ALL[2], &ERRORS[6..9])] {
        let names = calls(kind);
        let calls = names.len() as i64;
        assert!(calls > 150, "{calls}");
        let (mut told, mut wrong) = (0, 0);
        for n in 1..=calls {
            for error in errors {
                if is_an_answer(&names[n as usize - 1], error.1) {
                    continue;
                }
                let tried = std::panic::catch_unwind(|| with_a_failing_call(kind, n, *error));
                told += usize::from(tried.as_ref().is_ok_and(Option::is_some));
                if tried.is_err() {
                    eprintln!("^ {kind:?}: call {n}, {}, failing with {}", names[n as usize - 1], error.0);
                    wrong += 1;
                }
            }
        }
        assert_eq!(wrong, 0, "of {}", calls as usize * errors.len());
        println!("{kind:?}: {calls} calls, {told} of {} failures were told", calls as usize * errors.len());
    }
}

/// How a domain goes away, or seems to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    /// It is there no more.
    Gone,
    /// It is being destroyed.
    Dying,
    /// It shuts down, and stays.
    Shutdown,
    /// It gets another name, and runs on.
    Renamed,
}

impl Way {
    const ALL: [Self; 4] = [Self::Gone, Self::Dying, Self::Shutdown, Self::Renamed];

    /// What the stand-in calls it.
    const fn knob(self) -> (&'static str, i64) {
        match self {
            Self::Gone => ("gone", 1),
            Self::Dying => ("dying", 1),
            Self::Shutdown => ("shutdown", 1),
            Self::Renamed => ("named", 0),
        }
    }

    /// Whether a session has to be told of it.
    const fn is_the_end(self) -> bool {
        matches!(self, Self::Gone | Self::Dying)
    }
}

/// A whole session in which that happens to the domain at call `n`.
fn with_a_domain_that_goes(kind: Kind, n: i64, way: Way) {
    listen();
    let fake = looping(kind, 2);
    let (knob, value) = way.knob();
    fake.set_at(n, knob, value);
    let folder = own_folder();
    let mut tool = tool(&fake, &folder);
    let told = |what: &str| format!("{way:?} at call {n} ({}): {what}", fake.name(n));
    // When it happened, if that leaves a step in which it has to be noticed, and the step in which it was.
    let (mut happened, mut gone) = (None, None);
    let began = Instant::now();
    for (what, step) in STEPS {
        if tool.session.is_none() && gone.is_some() {
            break;
        }
        let (detaches, is_last) = (*what == "detach", what.starts_with("a last hit"));
        if fake.total() >= n && !is_last && !detaches {
            happened.get_or_insert_with(Instant::now);
        }
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| step(&mut tool)));
        match done.unwrap_or_else(|_| panic!("{}: {what}", told("it"))) {
            // It is refused, and the next try would be.
            Err(VmiError::Attach { reason, hint, .. }) if *what == "attach" => assert!(!reason.is_empty() && !hint.is_empty()),
            // Also afterwards every call is told the same.
            Err(VmiError::DomainGone { reason }) if way.is_the_end() && !detaches => {
                assert!(!reason.is_empty());
                // But for the ring's.
                assert!(fake.state("maps", 0) <= 1, "{}: {what}", told("who was told keeps a mapping"));
            }
            // Nothing can be kept whole without the domain, such as a view that could not be made.
            Err(_) if way.is_the_end() && gone.is_some() && !detaches => {}
            Err(error) => panic!("{}: {what}: {error:?}", told("another error")),
            // Also what needs no domain, once it is gone.
            Ok(()) => continue,
        }
        gone.get_or_insert((*what, Instant::now()));
    }
    let was_open = tool.session.is_some();
    let is_down = tool.is_down;
    drop(tool);
    assert!(began.elapsed() < Duration::from_secs(5), "{}", told("it took too long"));
    assert_eq!(fake.state("maps", 0), 0, "{}", told("a mapping keeps the domain from going"));
    let lines = logged();
    assert!(lines.len() <= 3, "{}: {lines:#?}", told("a flood"));
    match way {
        Way::Gone | Way::Dying => {
            assert!(happened.is_none() || gone.is_some(), "{}", told("nobody noticed"));
            let took = happened.zip(gone).map(|(happened, (_, noticed))| noticed.saturating_duration_since(happened));
            assert!(took.is_none_or(|took| took < Duration::from_secs(3)), "{}: {took:?}", told("it was noticed late"));
        }
        Way::Shutdown | Way::Renamed => {
            assert_eq!(gone.is_some(), !was_open, "{}: {gone:?}", told("something has happened"));
            let must_see = way == Way::Shutdown && was_open && happened.is_some();
            assert!(is_down || !must_see, "{}", told("it was not seen to stand still"));
            assert!(!is_down || way == Way::Shutdown, "{}", told("it stands still"));
            assert_eq!(lines, [] as [String; 0], "{}", told("something was logged"));
            fake.automatic(0);
            let restored = std::panic::catch_unwind(|| is_untouched(&fake));
            assert!(restored.is_ok(), "{}", told("something is left"));
            let runs = if way == Way::Renamed { 100 } else { 0 };
            assert_eq!((fake.run(0, 100), fake.run(1, 100)), (runs, runs), "{}", told("it runs on, if it can"));
        }
    }
}

#[test]
fn a_domain_that_goes_away_at_any_call_is_one_kind_of_error_and_a_prompt_end_and_one_that_is_renamed_is_none() {
    let kind = Kind::ALL[1];
    let calls = calls(kind).len() as i64;
    let next = AtomicI64::new(0);
    // Most of it is waiting.
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(way) = Way::ALL.get((index % 4) as usize) else { return };
                    if index / 4 >= calls {
                        return;
                    }
                    with_a_domain_that_goes(kind, index / 4 + 1, *way);
                }
            });
        }
    });
}
