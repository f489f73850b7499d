//! Every call of Xen's libraries fails once, with every error number it can have, for a whole session: what was asked for has not happened, and
//! asked for again it does. And the domain goes away at every call.

use vmitap::arch::amd64::{AddressContext, ControlRegister, Injection, InjectionKind};
use vmitap::driver::xen::{XenDriver, XenOptions};
use vmitap::driver::{Monitor, VmiEvents};
use vmitap::session::{GpChanges, Limits, Poll, Session, TapId, TapKind, TapSpec, Verdict};
use vmitap::tap::OnWrite;
use vmitap::{MemoryAccess, Pa, Result, Va, VcpuId, View, VmiError};
use xen_sys::fake::{Fake, Kind, Reg};

use super::session::{looping, spec};
use super::{CODE, is_untouched, options};

/// What a session consists of, and what it has so far.
struct Tool<'a> {
    fake: &'a Fake,
    session: Option<Session<XenDriver>>,
    taps: Vec<TapId>,
    other: View,
    hits: usize,
    /// A hit is in hand.
    holds: bool,
}

type Step = fn(&mut Tool<'_>) -> Result<()>;

impl Tool<'_> {
    fn session(&mut self) -> &mut Session<XenDriver> {
        self.session.as_mut().unwrap()
    }

    /// Until there are so many more hits, each of them answered.
    fn hits(&mut self, count: usize, verdict: Verdict) -> Result<()> {
        let end = self.hits + count;
        let mut waits = 0;
        while self.hits < end {
            waits += 1;
            assert!(waits < 200, "no more hits come");
            if !self.holds {
                self.holds = matches!(self.session().poll(&Limits::default())?, Poll::Hit(_));
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
        let driver = XenDriver::attach("guest", &XenOptions { ..options(tool.fake) })?;
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
        tool.hits(3, Verdict::Continue)
    }),
    ("a hit that steps", |tool| tool.hits(1, Verdict::Step(2))),
    ("hits after it", |tool| tool.hits(2, Verdict::Continue)),
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
    ("monitor CPUID", |tool| tool.session().vmi_mut().driver_mut().monitor(Monitor::Cpuid, true)),
    ("stop monitoring CR3", |tool| {
        tool.session().vmi_mut().driver_mut().monitor(Monitor::ControlRegister(ControlRegister::Cr3), false)
    }),
    ("pause", |tool| tool.session().pause()),
    ("change a page while it is paused", |tool| {
        let view = tool.other;
        let tap = tool.session().add(&spec(view, true))?;
        tool.taps.push(tap);
        Ok(())
    }),
    ("resume", |tool| tool.session().resume()),
    ("hits after the pause", |tool| tool.hits(2, Verdict::Continue)),
    ("switch the view", |tool| {
        let view = tool.other;
        tool.session().switch_to_view(view)
    }),
    ("hits in the other view", |tool| tool.hits(2, Verdict::Continue)),
    ("switch back", |tool| {
        let view = tool.session().tap_view();
        tool.session().switch_to_view(view)
    }),
    ("remove what is in the other view", |tool| {
        let tap = *tool.taps.last().unwrap();
        tool.session().remove(tap)?;
        tool.taps.pop();
        Ok(())
    }),
    ("remove the other view", |tool| {
        let view = tool.other;
        tool.session().destroy_view(view)
    }),
    ("remove the watch", |tool| {
        let tap = *tool.taps.last().unwrap();
        tool.session().remove(tap)?;
        tool.taps.pop();
        Ok(())
    }),
    ("remove a breakpoint", |tool| {
        let tap = *tool.taps.last().unwrap();
        tool.session().remove(tap)?;
        tool.taps.pop();
        Ok(())
    }),
    ("a last hit, of which one stays in hand", |tool| {
        tool.hits(1, Verdict::Continue)?;
        tool.holds = tool.holds || matches!(tool.session().poll(&Limits::default())?, Poll::Hit(_));
        Ok(())
    }),
    ("detach", |tool| tool.session().detach()),
];

fn tool(fake: &Fake) -> Tool<'_> {
    Tool { fake, session: None, taps: Vec::new(), other: View::DEFAULT, hits: 0, holds: false }
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

/// A number that says something true and is no failure: that what is asked for is so already.
fn is_an_answer(function: &str, error: i32) -> bool {
    error == 17 && function.starts_with("xc_monitor_")
}

fn is_typed(error: &VmiError, errno: i32) -> bool {
    match error {
        VmiError::Driver { errno: found, .. } => *found == errno,
        VmiError::DomainGone { .. } => errno == 3,
        VmiError::Attach { reason, hint, .. } => !reason.is_empty() && !hint.is_empty(),
        VmiError::OutOfRange { .. } | VmiError::NotSupported { .. } => true,
        VmiError::UndoFailed { cause, .. } => is_typed(cause, errno),
        _ => false,
    }
}

/// A whole session in which call `n` fails with `errno`; what failed of it, if anything did.
fn with_a_failing_call(kind: Kind, n: i64, (name, errno): (&str, i32)) -> Option<(String, VmiError)> {
    let fake = looping(kind, 2);
    fake.fail_call(n, errno);
    let mut tool = tool(&fake);
    let mut failed = None::<(String, VmiError)>;
    for (what, step) in STEPS {
        let Err(error) = step(&mut tool) else { continue };
        let told = format!("call {n} ({}) of {kind:?} fails with {name}: {what}: {error:?}", fake.name(n));
        assert!(failed.is_none(), "{told}, after {failed:?}");
        assert!(is_typed(&error, errno), "{told}");
        step(&mut tool).unwrap_or_else(|again| panic!("{told}, and again {again:?}"));
        failed = Some(((*what).to_owned(), error));
    }
    drop(tool);
    fake.automatic(0);
    let told = format!("call {n} ({}) of {kind:?} fails with {name}: {failed:?}", fake.name(n));
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

/// How many calls a session has in which none fails.
fn calls(kind: Kind) -> i64 {
    let fake = looping(kind, 2);
    let mut tool = tool(&fake);
    for (what, step) in STEPS {
        step(&mut tool).unwrap_or_else(|error| panic!("{what}: {error}"));
    }
    drop(tool);
    fake.automatic(0);
    is_untouched(&fake);
    fake.total()
}

#[test]
fn whichever_call_fails_with_whichever_error_it_is_told_and_the_next_try_does_it() {
    for (kind, errors) in [(Kind::ALL[1], ERRORS), (Kind::ALL[0], &ERRORS[6..9]), (Kind::ALL[2], &ERRORS[6..9])] {
        let calls = calls(kind);
        assert!(calls > 150, "{calls}");
        let (mut told, mut wrong) = (0, 0);
        for n in 1..=calls {
            for error in errors {
                let tried = std::panic::catch_unwind(|| with_a_failing_call(kind, n, *error));
                told += usize::from(tried.as_ref().is_ok_and(Option::is_some));
                // Each has said what is wrong.
                wrong += usize::from(tried.is_err());
            }
        }
        assert_eq!(wrong, 0, "of {}", calls as usize * errors.len());
        println!("{kind:?}: {calls} calls, {told} of {} failures were told", calls as usize * errors.len());
    }
}
