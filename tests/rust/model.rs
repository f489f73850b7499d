//! A session against a model of plain maps: random operations, and a guest that runs, reads, stores and moves its pages.

use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use vmitap::arch::amd64::{AddressContext, Registers, pte};
use vmitap::driver::VmiFrames;
use vmitap::driver::mock::{MockDriver, PageSize};
use vmitap::event::{EventAction, EventReason, VmiEvent, VmiEventResponse};
use vmitap::session::{Limits, Poll, Session, TapId, TapKind, TapSpec, TapState, Verdict};
use vmitap::tap::OnWrite;
use vmitap::{MemoryAccess, Pa, Va, VcpuId, View, VmiError};

const PAGES: usize = 3;
/// Steps that are done at least; each is an operation or something the guest does.
const STEPS: usize = 100_000;
const AT: [u16; 6] = [0, 1, 7, 0x800, 0xffe, 0xfff];

type Outcome<T = ()> = std::result::Result<T, TestCaseError>;

fn va(page: usize, at: u16) -> Va {
    Va(0x40_0000 + ((page as u64) << 12) + u64::from(at))
}

fn pa(page: usize, at: u16) -> Pa {
    Pa(0x3000 + ((page as u64) << 12) + u64::from(at))
}

// --- the model: what must hold, and nothing else ---

#[derive(Clone, Copy, Debug)]
struct Tap {
    page: usize,
    at: u16,
    root: usize,
    global: bool,
    /// Which of the session's views, counted round.
    view: usize,
    policy: OnWrite,
    key: Option<u64>,
    enabled: bool,
}

#[derive(Clone)]
struct Model {
    bytes: Vec<Vec<u8>>,
    mapped: [bool; PAGES],
    /// With the view it is in, and whether it is gone.
    taps: Vec<(Tap, View, bool)>,
    /// Beside the default one, the tap view first.
    views: Vec<View>,
    home: [View; 2],
}

impl Model {
    fn new() -> Self {
        let bytes = vec![vec![0x90; 4096]; PAGES];
        Self { bytes, mapped: [true; PAGES], taps: Vec::new(), views: vec![View(1)], home: [View(1); 2] }
    }

    /// The taps that are planted on a page of a view.
    fn on(&self, view: View, page: usize) -> impl Iterator<Item = (usize, &Tap)> {
        let here = move |(_, (tap, of, gone)): &(usize, &(Tap, View, bool))| {
            *of == view && tap.page == page && tap.enabled && !gone && self.mapped[page]
        };
        self.taps.iter().enumerate().filter(here).map(|(id, (tap, ..))| (id, tap))
    }

    /// What the page shows in a view.
    fn shown(&self, view: View, page: usize) -> Vec<u8> {
        let mut bytes = self.bytes[page].clone();
        self.on(view, page).for_each(|(_, tap)| bytes[usize::from(tap.at)] = 0xcc);
        bytes
    }

    /// Whose an execution is.
    fn owners(&self, view: View, page: usize, at: u16, root: usize) -> BTreeSet<u32> {
        self.on(view, page).filter(|(_, tap)| tap.at == at && (tap.global || tap.root == root)).map(|(id, _)| id as u32).collect()
    }

    fn state(&self, id: usize) -> TapState {
        match self.taps[id] {
            (.., true) => TapState::Removed,
            (Tap { enabled: false, .. }, ..) => TapState::Disabled,
            (Tap { page, .. }, ..) if self.mapped[page] => TapState::Active,
            _ => TapState::Pending,
        }
    }

    fn is_taken(&self, tap: &Tap, view: View) -> bool {
        let same = |(other, of, gone): &(Tap, View, bool)| {
            let place = (*of, other.page, other.at) == (view, tap.page, tap.at);
            let whose = other.global == tap.global && (tap.global || other.root == tap.root);
            !gone && place && whose && other.key.is_some() && other.key == tap.key
        };
        self.taps.iter().any(same)
    }

    /// Puts taps in, unless the key of one is taken.
    fn add(&mut self, taps: &[Tap]) -> bool {
        let count = self.taps.len();
        for tap in taps {
            let view = self.view(tap.view);
            if self.is_taken(tap, view) {
                self.taps.truncate(count);
                return false;
            }
            self.taps.push((*tap, view, false));
        }
        true
    }

    fn view(&self, index: usize) -> View {
        self.views[index % self.views.len()]
    }

    /// A store of the guest's; whether it is denied.
    fn store(&mut self, view: View, page: usize, at: u16, byte: u8) -> bool {
        let under: Vec<_> = self.on(view, page).filter(|(_, tap)| tap.at == at).map(|(id, tap)| (id, tap.policy)).collect();
        if under.iter().any(|(_, policy)| *policy == OnWrite::Deny) {
            return true;
        }
        self.bytes[page][usize::from(at)] = byte;
        for (id, _) in under.iter().filter(|(_, policy)| *policy == OnWrite::Remove) {
            self.taps[*id].2 = true;
        }
        false
    }

    fn destroy(&mut self, view: View) {
        self.views.retain(|known| *known != view);
        self.taps.iter_mut().filter(|tap| tap.1 == view).for_each(|tap| tap.2 = true);
        if self.home.contains(&view) {
            self.home = [View(1); 2];
        }
    }
}

// --- what is done ---

#[derive(Clone, Debug)]
enum Step {
    Add(Vec<Tap>),
    Remove(usize),
    Enable(usize),
    Disable(usize),
    Write(usize, u16, Vec<u8>),
    CreateView,
    DestroyView(usize),
    Switch(usize),
    /// The n-th driver call of the next operation fails.
    Fail(usize),
    Run(usize, usize, u16, usize),
    Read(usize, usize, u16),
    Store(usize, usize, u16, u8),
    /// The guest maps a page, or takes it away: under both roots, as global breakpoints are looked up under each.
    Map(usize, usize, bool),
}

fn tap() -> impl Strategy<Value = Tap> {
    let policy = prop_oneof![4 => Just(OnWrite::Reapply), 2 => Just(OnWrite::Remove), 1 => Just(OnWrite::Deny)];
    let place = (0..PAGES, prop::sample::select(&AT[..]), 0..2_usize, any::<bool>());
    (place, 0..3_usize, policy, prop::option::of(0..2_u64), prop::bool::weighted(0.8)).prop_map(
        |((page, at, root, global), view, policy, key, enabled)| Tap { page, at, root, global, view, policy, key, enabled },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let (at, vcpu, root) = (|| prop::sample::select(&AT[..]), || 0..2_usize, || 0..2_usize);
    prop_oneof![
        4 => prop::collection::vec(tap(), 1..4).prop_map(Step::Add),
        4 => any::<usize>().prop_map(Step::Remove),
        2 => any::<usize>().prop_map(Step::Enable),
        2 => any::<usize>().prop_map(Step::Disable),
        1 => (0..PAGES, at(), prop::collection::vec(0..0x80_u8, 1..3)).prop_map(|(page, at, bytes)| Step::Write(page, at, bytes)),
        1 => Just(Step::CreateView),
        1 => (0..3_usize).prop_map(Step::DestroyView),
        1 => (0..4_usize).prop_map(Step::Switch),
        2 => (1..14_usize).prop_map(Step::Fail),
        6 => (vcpu(), 0..PAGES, at(), root()).prop_map(|(vcpu, page, at, root)| Step::Run(vcpu, page, at, root)),
        2 => (vcpu(), 0..PAGES, at()).prop_map(|(vcpu, page, at)| Step::Read(vcpu, page, at)),
        4 => (vcpu(), 0..PAGES, at(), 0..0x80_u8).prop_map(|(vcpu, page, at, byte)| Step::Store(vcpu, page, at, byte)),
        3 => (vcpu(), 0..PAGES, any::<bool>()).prop_map(|(vcpu, page, on)| Step::Map(vcpu, page, on)),
    ]
}

struct World {
    session: Session<MockDriver>,
    roots: [AddressContext; 2],
    m: Model,
    /// The driver call of the next operation that is to fail.
    fault: Option<usize>,
}

impl World {
    fn new() -> Self {
        let mut driver = MockDriver::new(0x10000, 2);
        let roots = [driver.new_root(4).unwrap(), driver.new_root(4).unwrap()];
        let m = Model::new();
        for page in 0..PAGES {
            driver.poke(pa(page, 0), &m.bytes[page]).unwrap();
            for root in roots {
                driver.map(root, va(page, 0), pa(page, 0), PageSize::Size4K, pte::P | pte::W).unwrap();
            }
        }
        Self { session: Session::new(Box::new(driver), OnWrite::Reapply).unwrap(), roots, m, fault: None }
    }

    fn driver(&mut self) -> &mut MockDriver {
        self.session.vmi_mut().driver_mut()
    }

    fn access(&self, view: View, pa: Pa) -> MemoryAccess {
        let held = &self.session.vmi().driver().state().views[&view];
        held.pages.get(&pa.gfn()).copied().unwrap_or(held.access)
    }

    fn event(&self, vcpu: usize, root: usize, rip: Va, view: View, reason: EventReason) -> VmiEvent {
        let mut registers = Registers { cr3: self.roots[root].root.0, ..Registers::default() };
        registers.gp.rip = rip.0;
        VmiEvent { vcpu: VcpuId(vcpu as u16), view: Some(view), registers, reason }
    }

    /// An event, all that comes of it, and its one answer.
    fn raise(&mut self, event: &VmiEvent) -> Outcome<(BTreeSet<u32>, VmiEventResponse)> {
        let answered = self.driver().answers().len();
        self.driver().push_event(*event);
        let mut hits = BTreeSet::new();
        while let Poll::Hit(hit) = self.session.poll(&Limits::default()).unwrap() {
            prop_assert!(hits.insert(hit.tap.0), "{:?} was told twice", hit.tap);
            self.session.answer(Verdict::Continue).unwrap();
        }
        let answers = &self.driver().answers()[answered..];
        prop_assert_eq!(answers.len(), 1, "answers to {:?}", event);
        Ok((hits, answers[0].1))
    }

    /// The guest stores bytes; whether that was denied.
    fn store(&mut self, vcpu: usize, root: usize, at: Pa, bytes: &[u8]) -> Outcome<bool> {
        let home = self.m.home[vcpu];
        if self.access(home, at).contains(MemoryAccess::W) {
            self.driver().poke(at, bytes).unwrap();
            return Ok(false);
        }
        let place = Va(at.0.wrapping_sub(pa(0, 0).0).wrapping_add(va(0, 0).0));
        let reason = EventReason::MemoryAccess { pa: at, va: Some(place), access: MemoryAccess::W, len: bytes.len() as u16 };
        let event = self.event(vcpu, root, Va(0x1000), home, reason);
        let (hits, answer) = self.raise(&event)?;
        prop_assert!(hits.is_empty());
        if answer == VmiEventResponse::action(EventAction::Deny).in_view(home) {
            return Ok(true);
        }
        prop_assert_eq!(answer, VmiEventResponse::action(EventAction::SingleStep { view: View::DEFAULT }).in_view(home));
        self.driver().poke(at, bytes).unwrap();
        let done = self.event(vcpu, root, Va(0x1004), View::DEFAULT, EventReason::SingleStep { gfn: None });
        prop_assert_eq!(self.raise(&done)?.1, VmiEventResponse::CONTINUE.in_view(home));
        Ok(false)
    }

    /// An operation, which does what `next` says or, if a call fails, nothing.
    fn operate(&mut self, next: Model, op: impl FnOnce(&mut Session<MockDriver>) -> vmitap::Result<()>) -> Outcome {
        if let Some(n) = self.fault.take() {
            self.driver().fail_nth(n);
        }
        let result = op(&mut self.session);
        self.driver().clear_faults();
        self.driver().take_calls();
        match result {
            Ok(()) => self.m = next,
            Err(error) => prop_assert!(matches!(error, VmiError::Driver { errno: 5, .. }), "{}", error),
        }
        Ok(())
    }

    fn some_tap(&self, index: usize) -> Option<usize> {
        (!self.m.taps.is_empty()).then(|| index % self.m.taps.len())
    }

    fn spec(&self, tap: &Tap) -> TapSpec {
        TapSpec {
            kind: TapKind::Breakpoint,
            va: va(tap.page, tap.at),
            context: self.roots[tap.root],
            global: tap.global,
            view: self.m.view(tap.view),
            on_write: Some(tap.policy),
            key: tap.key,
            wanted: true,
            enabled: tap.enabled,
        }
    }

    fn act(&mut self, step: Step) -> Outcome {
        let mut next = self.m.clone();
        match step {
            Step::Add(taps) => {
                let specs: Vec<_> = taps.iter().map(|tap| self.spec(tap)).collect();
                if next.add(&taps) {
                    return self.operate(next, |session| session.add_many(&specs).map(drop));
                }
                let refused = self.session.add_many(&specs);
                prop_assert!(matches!(refused, Err(VmiError::BreakpointConflict { .. })), "{:?}", refused);
            }
            Step::Remove(index) => {
                let Some(id) = self.some_tap(index) else { return Ok(()) };
                next.taps[id].2 = true;
                self.operate(next, |session| session.remove(TapId(id as u32)))?;
            }
            Step::Enable(index) | Step::Disable(index) => {
                let Some(id) = self.some_tap(index) else { return Ok(()) };
                let on = matches!(step, Step::Enable(_));
                next.taps[id].0.enabled = on;
                let id = TapId(id as u32);
                self.operate(next, |session| if on { session.enable(id) } else { session.disable(id) })?;
            }
            Step::Write(page, at, bytes) => {
                let end = bytes.len().min(4096 - usize::from(at));
                next.bytes[page][usize::from(at)..][..end].copy_from_slice(&bytes[..end]);
                self.operate(next, |session| session.write_pa(pa(page, at), &bytes[..end]))?;
            }
            Step::CreateView if self.m.views.len() < 3 => {
                let free = (1..9).map(View).find(|view| !next.views.contains(view)).unwrap();
                next.views.push(free);
                self.operate(next, |session| session.create_view(MemoryAccess::RWX).map(|view| assert_eq!(view, free)))?;
            }
            Step::DestroyView(index) => {
                let view = self.m.view(index);
                if view != View(1) {
                    next.destroy(view);
                    self.operate(next, |session| session.destroy_view(view))?;
                }
            }
            Step::Switch(index) => {
                let view = if index == 3 { View::DEFAULT } else { self.m.view(index) };
                next.home = [view; 2];
                self.operate(next, |session| session.switch_to_view(view))?;
            }
            Step::Fail(n) => {
                self.fault = Some(n);
                return Ok(());
            }
            Step::CreateView => {}
            guest => self.guest(&guest)?,
        }
        Ok(())
    }

    /// What the guest does; nothing here fails.
    fn guest(&mut self, step: &Step) -> Outcome {
        match *step {
            Step::Run(vcpu, page, at, root) if self.m.mapped[page] => {
                let home = self.m.home[vcpu];
                if self.m.shown(home, page)[usize::from(at)] == 0xcc {
                    let reason = EventReason::Breakpoint { gfn: pa(page, at).gfn(), insn_len: 1 };
                    let event = self.event(vcpu, root, va(page, at), home, reason);
                    let (hits, answer) = self.raise(&event)?;
                    prop_assert_eq!(hits, self.m.owners(home, page, at, root));
                    let step = EventAction::FastSingleStep { view: View::DEFAULT };
                    prop_assert_eq!(answer, VmiEventResponse::action(step).in_view(home));
                }
            }
            Step::Read(vcpu, page, at) => {
                let home = self.m.home[vcpu];
                if !self.access(home, pa(page, 0)).contains(MemoryAccess::R) {
                    let access = MemoryAccess::R;
                    let reason = EventReason::MemoryAccess { pa: pa(page, at), va: Some(va(page, at)), access, len: 1 };
                    let event = self.event(vcpu, 0, Va(0x1000), home, reason);
                    let emulated = VmiEventResponse::action(EventAction::Emulate).in_view(home);
                    prop_assert_eq!(self.raise(&event)?, (BTreeSet::new(), emulated));
                }
            }
            Step::Store(vcpu, page, at, byte) => {
                let denied = self.m.store(self.m.home[vcpu], page, at, byte);
                prop_assert_eq!(self.store(vcpu, 0, pa(page, at), &[byte])?, denied);
            }
            // In the default view nobody sees it.
            Step::Map(vcpu, page, on) if self.m.home[vcpu] != View::DEFAULT => {
                let value = if on { pa(page, 0).0 | pte::P | pte::W } else { 0 };
                for (root, context) in self.roots.into_iter().enumerate() {
                    let entry = self.driver().entry(context, va(page, 0), 1).unwrap();
                    prop_assert!(!self.store(vcpu, root, entry, &value.to_le_bytes())?);
                }
                self.m.mapped[page] = on;
            }
            _ => {}
        }
        Ok(())
    }

    fn check(&mut self) -> Outcome {
        let frames = (self.driver().frames_in_use(), self.session.shadow_frames());
        prop_assert_eq!(frames.0, frames.1);
        for id in 0..self.m.taps.len() {
            prop_assert_eq!(self.session.state(TapId(id as u32)), self.m.state(id), "tap {}", id);
        }
        let mut hidden = 0;
        for view in self.session.views() {
            for page in 0..PAGES {
                let is_hidden = self.m.on(view, page).next().is_some();
                hidden += usize::from(is_hidden);
                let shown = self.driver().peek_in_view(view, pa(page, 0), 4096).unwrap();
                let wanted = self.m.shown(view, page);
                if self.m.home.contains(&view) {
                    prop_assert!(shown == wanted, "page {page} in view {view}");
                } else {
                    // Bytes that nobody executes are brought there when somebody is to.
                    let planted = |bytes: &[u8]| AT.map(|at| bytes[usize::from(at)] == 0xcc);
                    let (shown, wanted) = (planted(&shown), planted(&wanted));
                    prop_assert_eq!(shown, wanted, "page {} in view {}", page, view);
                }
                let access = if is_hidden { MemoryAccess::X } else { MemoryAccess::RWX };
                prop_assert_eq!(self.access(view, pa(page, 0)), access, "page {}", page);
            }
        }
        prop_assert!(frames.0 <= 2 * hidden, "{} frames for {} pages", frames.0, hidden);
        for (vcpu, home) in self.m.home.into_iter().enumerate() {
            prop_assert_eq!(self.driver().state().vcpus[vcpu].view, home, "the view of vCPU {}", vcpu);
        }
        Ok(())
    }
}

#[test]
fn a_hundred_thousand_random_steps_do_what_plain_maps_say() {
    let config = Config { cases: STEPS as u32 / 190, max_shrink_iters: 20_000, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::XorShift));
    let mut done = 0;
    let counter = std::cell::Cell::new(0);
    let result = runner.run(&prop::collection::vec(step(), 1..400), |steps| {
        let mut world = World::new();
        for step in steps {
            world.act(step)?;
            world.check()?;
            counter.set(counter.get() + 1);
        }
        world.session.detach().unwrap();
        let bytes = world.driver().peek(pa(0, 0), PAGES * 4096).unwrap();
        prop_assert!(bytes == world.m.bytes.concat(), "the guest's memory");
        let state = world.driver().state();
        prop_assert!(state.monitors.is_empty() && state.vcpus.iter().all(|vcpu| vcpu.view == View::DEFAULT));
        prop_assert_eq!((state.views.len(), world.driver().frames_in_use()), (1, 0));
        Ok(())
    });
    done += counter.get();
    if let Err(error) = result {
        panic!("{error}");
    }
    assert!(done >= STEPS, "{done} steps");
}
