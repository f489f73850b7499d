//! A whole session: the guest runs whenever the tool waits, and its own account is compared with the tool's.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use vmitap::arch::amd64::AddressContext;
use vmitap::driver::Wait;
use vmitap::driver::xen::{Stepping, XenDriver, XenOptions};
use vmitap::session::{Limits, Poll, Session, TapKind, TapSpec, TapState, Verdict};
use vmitap::tap::OnWrite;
use vmitap::{MemoryAccess, Pa, Va, VmiError};
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

/// Runs the vCPU until it is at `end`; how often somebody was asked about a store, and answered `answer`.
fn run_asking(fake: &Fake, session: &mut Session<XenDriver>, end: u64, answer: OnWrite) -> u32 {
    let mut asked = 0;
    for _ in 0..200 {
        fake.run(0, 1);
        let limits = Limits { deadline: Some(Instant::now()), ..Limits::default() };
        if matches!(session.poll(&limits).unwrap(), Poll::Hit(hit) if hit.ask) {
            asked += 1;
            session.answer_write(answer).unwrap();
        }
        if fake.reg(0, Reg::Rip) == end && fake.state("held", 0) == 0 {
            return asked;
        }
    }
    panic!("the guest does not get on: {:#x}", fake.reg(0, Reg::Rip));
}

/// Where two pages meet.
const BORDER: u64 = 0xb000;

/// push rbp: three bytes on one page, five on the next; whichever of them the processor finds denied first.
fn storing(far_first: i64) -> Fake {
    let fake = guest(Kind::ALL[1]);
    fake.set("far_page_first", far_first);
    fake.write(CODE, &[0x55, 0x90, 0x90]);
    fake.set_reg(0, Reg::Rsp, BORDER + 5);
    fake.set_reg(0, Reg::Rbp, 0x8877_6655_4433_2211);
    fake
}

#[test]
fn a_store_across_a_border_is_decided_on_once_for_both_pages() {
    for (far_first, stepping) in [(0, Stepping::Auto), (1, Stepping::Auto), (0, Stepping::Toggle), (1, Stepping::Toggle)] {
        // Also where the instruction itself is tapped, so that it never runs where Xen would tell of its store.
        for is_tapped in [false, true] {
            for (near, far) in [
                (OnWrite::Reapply, OnWrite::Deny),
                (OnWrite::Deny, OnWrite::Reapply),
                (OnWrite::Remove, OnWrite::Deny),
                (OnWrite::Deny, OnWrite::Remove),
                (OnWrite::Remove, OnWrite::Remove),
                (OnWrite::Ask, OnWrite::Ask),
                (OnWrite::Reapply, OnWrite::Ask),
                (OnWrite::Ask, OnWrite::Remove),
            ] {
                let case =
                    format!("{near:?} before the border, {far:?} behind it; far first: {far_first}, {stepping:?}, {is_tapped}");
                let fake = storing(far_first);
                let mut session = session(&fake, stepping);
                let view = session.tap_view();
                if is_tapped {
                    session.add(&spec(view, false)).unwrap();
                }
                let taps = [(BORDER - 1, near), (BORDER + 4, far)].map(|(at, policy)| {
                    let spec = TapSpec { va: Va(at), on_write: Some(policy), ..spec(view, false) };
                    session.add(&spec).unwrap()
                });
                let is_asked = [near, far].contains(&OnWrite::Ask);
                assert_eq!(run_asking(&fake, &mut session, CODE + 1, OnWrite::Reapply), u32::from(is_asked), "{case}");
                let is_denied = [near, far].contains(&OnWrite::Deny);
                let state = |policy| if policy == OnWrite::Remove && !is_denied { TapState::Removed } else { TapState::Active };
                assert_eq!(taps.map(|tap| session.state(tap)), [state(near), state(far)], "{case}");
                let bytes = [BORDER - 3, BORDER + 4].map(|at| fake.byte(0, at as i64));
                assert_eq!(bytes, if is_denied { [0, 0] } else { [0x11, 0x88] }, "{case}");
                drop(session);
                is_untouched(&fake);
            }
        }
    }
}

#[test]
fn a_store_across_a_border_is_one_of_a_watch_behind_it_whatever_else_is_there() {
    for (far_first, stepping) in [(0, Stepping::Auto), (1, Stepping::Auto), (0, Stepping::Toggle), (1, Stepping::Toggle)] {
        for (is_tapped, is_hidden) in [(false, false), (false, true), (true, false), (true, true)] {
            for (at, len) in [(BORDER, 8), (BORDER - 8, 16)] {
                let fake = storing(far_first);
                let mut session = session(&fake, stepping);
                let view = session.tap_view();
                if is_tapped {
                    session.add(&spec(view, false)).unwrap();
                }
                if is_hidden {
                    session.add(&TapSpec { va: Va(BORDER - 0x100), ..spec(view, false) }).unwrap();
                }
                let kind = TapKind::Watch { len, access: MemoryAccess::W };
                let watch = session.add(&TapSpec { kind, va: Va(at), ..spec(view, false) }).unwrap();
                assert_eq!(run_asking(&fake, &mut session, CODE + 1, OnWrite::Reapply), 0);
                let case = format!("far first: {far_first}, {stepping:?}, {is_tapped}, {is_hidden}, {len} bytes at {at:#x}");
                assert_eq!(session.tap_stats(watch).hits, 1, "{case}");
                assert_eq!([BORDER - 3, BORDER + 4].map(|at| fake.byte(0, at as i64)), [0x11, 0x88], "{case}");
            }
        }
    }
}

#[test]
fn a_string_store_that_ends_before_a_breakpoint_leaves_it_also_if_more_pages_were_told() {
    // rep stosb over two pages; an exception ends it after a few rounds.
    const HANDLER: u64 = CODE + 0x800;
    for rounds in [4, 12] {
        let fake = guest(Kind::ALL[1]);
        fake.write(CODE, &[0xf3, 0xaa, 0x90]);
        fake.write(HANDLER, &[0x90; 16]);
        for (register, value) in [(Reg::Rdi, BORDER - 16), (Reg::Rcx, 32), (Reg::Rax, 0)] {
            fake.set_reg(0, register, value);
        }
        let mut session = session(&fake, Stepping::Auto);
        let view = session.tap_view();
        let taps = [(BORDER - 8, OnWrite::Remove), (BORDER + 8, OnWrite::Reapply)]
            .map(|(at, policy)| session.add(&TapSpec { va: Va(at), on_write: Some(policy), ..spec(view, false) }).unwrap());
        let mut poll = || {
            fake.run(0, 1);
            let limits = Limits { deadline: Some(Instant::now()), ..Limits::default() };
            assert!(!matches!(session.poll(&limits).unwrap(), Poll::Hit(_)));
        };
        for _ in 0..50 {
            if fake.reg(0, Reg::Rdi) < BORDER - 16 + rounds {
                poll();
            }
        }
        assert_eq!(fake.reg(0, Reg::Rdi), BORDER - 16 + rounds);
        fake.set_reg(0, Reg::Rip, HANDLER);
        for _ in 0..4 {
            poll();
        }
        // What it stored is what was there: only where it stored says what was overwritten.
        let state = if rounds > 8 { TapState::Removed } else { TapState::Active };
        assert_eq!(taps.map(|tap| session.state(tap)), [state, TapState::Active], "{rounds} rounds");
        assert_eq!(session.stats().hidden_writes, 2);
    }
}

#[test]
fn a_string_store_is_decided_on_for_each_of_its_pages_before_it_begins() {
    // rep stosb: sixteen bytes on each of two pages.
    for (is_tapped, near, far) in [false, true].into_iter().flat_map(|is_tapped| {
        let all = [OnWrite::Reapply, OnWrite::Remove, OnWrite::Deny, OnWrite::Ask];
        all.into_iter().flat_map(move |near| all.map(|far| (is_tapped, near, far)))
    }) {
        let case = format!("{near:?} before the border, {far:?} behind it, {is_tapped}");
        let fake = guest(Kind::ALL[1]);
        fake.write(CODE, &[0xf3, 0xaa, 0x90]);
        for (register, value) in [(Reg::Rdi, BORDER - 16), (Reg::Rcx, 32), (Reg::Rax, 0x77)] {
            fake.set_reg(0, register, value);
        }
        let mut session = session(&fake, Stepping::Auto);
        let view = session.tap_view();
        if is_tapped {
            session.add(&spec(view, false)).unwrap();
        }
        let taps = [(BORDER - 8, near), (BORDER + 8, far)]
            .map(|(at, policy)| session.add(&TapSpec { va: Va(at), on_write: Some(policy), ..spec(view, false) }).unwrap());
        let asked = run_asking(&fake, &mut session, CODE + 2, OnWrite::Reapply);
        let policies = [near, far];
        let bytes = [BORDER - 16, BORDER - 8, BORDER + 8, BORDER + 15].map(|at| fake.byte(0, at as i64));
        if policies.contains(&OnWrite::Deny) {
            // Up to the last byte that denies, round by round.
            let last = if far == OnWrite::Deny { [0, 0, 0, 0x77] } else { [0, 0, 0x77, 0x77] };
            assert_eq!(bytes, last, "{case}");
        } else {
            assert_eq!(bytes, [0x77; 4], "{case}");
            let asks = policies.iter().filter(|policy| **policy == OnWrite::Ask).count();
            assert_eq!(asked as usize, asks, "{case}: once for each");
        }
        let was_stored_to = [bytes[1] == 0x77, bytes[2] == 0x77];
        for ((tap, policy), was_stored_to) in taps.into_iter().zip(policies).zip(was_stored_to) {
            let is_gone = was_stored_to && policy == OnWrite::Remove;
            assert_eq!(session.state(tap), if is_gone { TapState::Removed } else { TapState::Active }, "{case}: {policy:?}");
        }
        drop(session);
        is_untouched(&fake);
    }
}

#[test]
fn a_string_store_to_many_hidden_pages_is_told_on_each_and_then_done() {
    const FIRST: u64 = 0xb000;
    const PAGES: u64 = 12;
    let fake = guest(Kind::ALL[1]);
    fake.write(CODE, &[0xf3, 0xaa, 0x90]);
    let len = (PAGES - 1) * 0x1000 + 0x20;
    for (register, value) in [(Reg::Rdi, FIRST), (Reg::Rcx, len), (Reg::Rax, 0x77)] {
        fake.set_reg(0, register, value);
    }
    let mut session = session(&fake, Stepping::Auto);
    let view = session.tap_view();
    let taps: Vec<_> = (0..PAGES)
        .map(|page| {
            let spec = TapSpec { va: Va(FIRST + page * 0x1000 + 0x10), on_write: Some(OnWrite::Remove), ..spec(view, false) };
            session.add(&spec).unwrap()
        })
        .collect();
    fake.automatic(50);
    let end = Instant::now() + Duration::from_secs(60);
    while fake.reg(0, Reg::Rip) == CODE || fake.state("held", 0) != 0 {
        assert!(Instant::now() < end, "{:#x}", fake.reg(0, Reg::Rdi));
        let limits = Limits { deadline: Some(Instant::now()), ..Limits::default() };
        assert!(!matches!(session.poll(&limits).unwrap(), Poll::Hit(_)));
    }
    fake.automatic(0);
    assert!(taps.iter().all(|tap| session.state(*tap) == TapState::Removed));
    assert_eq!((session.stats().hidden_writes, session.stats().removed_by_write), (PAGES, PAGES));
    assert_eq!([FIRST, FIRST + len - 1, FIRST + len].map(|at| fake.byte(0, at as i64)), [0x77, 0x77, 0]);
}

#[test]
fn a_store_beside_a_breakpoint_is_beside_it() {
    // mov [rbx], al: before the byte and behind it. What Xen tells does not say how long the store is.
    for at in [CODE + 0x3f, CODE + 0x41] {
        let fake = guest(Kind::ALL[1]);
        fake.write(CODE, &[0x88, 0x03, 0x90]);
        fake.set_reg(0, Reg::Rbx, at);
        fake.set_reg(0, Reg::Rax, 0x77);
        let mut session = session(&fake, Stepping::Auto);
        let view = session.tap_view();
        let taps = [OnWrite::Remove, OnWrite::Deny, OnWrite::Ask]
            .map(|policy| session.add(&TapSpec { va: Va(CODE + 0x40), on_write: Some(policy), ..spec(view, false) }).unwrap());
        assert_eq!(run_asking(&fake, &mut session, CODE + 2, OnWrite::Deny), 0);
        assert_eq!(taps.map(|tap| session.state(tap)), [TapState::Active; 3]);
        assert_eq!(fake.byte(0, at as i64), 0x77);
    }
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

/// What a tool does, in any order.
#[derive(Clone, Debug)]
enum Deed {
    Run(i32, i32),
    Poll,
    Plant,
    Remove,
    Pause,
    Resume,
    Switch(bool),
}

fn deeds() -> impl Strategy<Value = Vec<Deed>> {
    let deed = prop_oneof![
        6 => (0..2, 1..40).prop_map(|(vcpu, count)| Deed::Run(vcpu, count)),
        6 => Just(Deed::Poll),
        2 => Just(Deed::Plant),
        2 => Just(Deed::Remove),
        1 => Just(Deed::Pause),
        1 => Just(Deed::Resume),
        1 => any::<bool>().prop_map(Deed::Switch),
    ];
    proptest::collection::vec(deed, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// vCPUs run, hit and read while taps come and go: nothing is executed where it does not belong, and in the end all is as it was.
    #[test]
    fn whatever_is_done_in_whatever_order_the_guest_notices_nothing(deeds in deeds(), fast in any::<bool>()) {
        let fake = looping(Kind::ALL[1], 2);
        let mut session = session(&fake, if fast { Stepping::Fast } else { Stepping::Auto });
        let view = session.tap_view();
        let (mut tap, mut pauses) = (None, 0);
        for deed in deeds {
            match deed {
                Deed::Run(vcpu, count) => {
                    fake.run(vcpu, count);
                }
                Deed::Poll => {
                    let limits = Limits { deadline: Some(Instant::now()), ..Limits::default() };
                    if matches!(session.poll(&limits).unwrap(), Poll::Hit(_)) {
                        session.answer(Verdict::Continue).unwrap();
                    }
                }
                Deed::Plant if tap.is_none() => tap = Some(session.add(&spec(view, true)).unwrap()),
                Deed::Remove => {
                    if let Some(tap) = tap.take() {
                        session.remove(tap).unwrap();
                    }
                }
                Deed::Pause => {
                    session.pause().unwrap();
                    pauses += 1;
                }
                Deed::Resume if pauses > 0 => {
                    session.resume().unwrap();
                    pauses -= 1;
                }
                Deed::Switch(back) => session.switch_to_view(if back { view } else { vmitap::View::DEFAULT }).unwrap(),
                Deed::Plant | Deed::Resume => {}
            }
            for vcpu in [0, 1] {
                prop_assert_eq!(fake.state("misplaced", vcpu), 0);
                let seen = fake.reg(vcpu as i32, Reg::Rax) & 0xff;
                prop_assert!(seen == 0 || seen == 0x55, "{:#x}", seen);
            }
        }
        fake.automatic(5);
        session.detach().unwrap();
        fake.automatic(0);
        is_untouched(&fake);
        prop_assert_eq!((fake.run(0, 200), fake.run(1, 200)), (200, 200));
        prop_assert_eq!([0, 1].map(|vcpu| fake.state("int3s", vcpu) + fake.state("misplaced", vcpu)), [0, 0]);
    }
}

#[test]
fn an_event_that_was_on_its_way_does_not_undo_a_switch_of_views() {
    for kind in Kind::ALL {
        for stepping in [Stepping::Auto, Stepping::Fast, Stepping::Toggle] {
            for (to_default, is_raw) in [(false, false), (true, false), (false, true), (true, true)] {
                let fake = looping(kind, 1);
                let mut session = session(&fake, stepping);
                let before = session.tap_view();
                let tap = session.add(&spec(before, true)).unwrap();
                let other = session.create_view(vmitap::MemoryAccess::RWX).unwrap();
                let to = if to_default { vmitap::View::DEFAULT } else { other };
                // The INT3 was executed in the view that the vCPU is taken out of, and nobody has been told yet.
                fake.run(0, 1);
                assert_eq!(fake.state("held", 0), 1);
                session.switch_to_view(to).unwrap();
                if is_raw {
                    assert!(matches!(session.wait_raw(Duration::ZERO).unwrap(), Wait::Event(_)));
                } else {
                    let Poll::Hit(hit) = session.poll(&Limits::default()).unwrap() else { panic!("{kind:?} {stepping:?}") };
                    assert_eq!((hit.tap, hit.va), (tap, Va(CODE)));
                    session.answer(Verdict::Continue).unwrap();
                }
                while !matches!(
                    session.poll(&Limits { deadline: Some(Instant::now()), ..Limits::default() }).unwrap(),
                    Poll::Timeout
                ) {}
                // Over the instruction, and with a way of stepping that ends later, through its end.
                assert!(fake.run(0, 20) > 0);
                let polled = session.poll(&Limits { deadline: Some(Instant::now()), ..Limits::default() }).unwrap();
                assert!(!matches!(polled, Poll::Hit(_)), "{kind:?} {stepping:?}: a hit in a view that no vCPU is in");
                fake.run(0, 20);
                assert_eq!(fake.state("view", 0), i64::from(to.0), "{kind:?} {stepping:?} {to_default} {is_raw}");
                session.detach().unwrap();
                drop(session);
                is_untouched(&fake);
            }
        }
    }
}
