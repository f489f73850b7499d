//! Every order in which three vCPUs and a caller can come to one tapped page: run it, read it, write it and step over it, while its
//! breakpoint is taken out and put in.

use vmitap::arch::amd64::{AddressContext, Registers, pte};
use vmitap::driver::mock::{MockDriver, PageSize};
use vmitap::event::{EventAction, EventReason, VmiEvent, VmiEventResponse};
use vmitap::session::{Limits, Poll, Session, TapId, TapKind, TapSpec, Verdict};
use vmitap::tap::OnWrite;
use vmitap::{Gfn, MemoryAccess, Pa, Va, VcpuId, View};

const CODE: Va = Va(0x40_0000);
const PAGE: Gfn = Gfn(3);
const VCPUS: usize = 3;

/// What one vCPU does, once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Does {
    /// Executes the instruction at offset 0.
    Run,
    /// The same, and its handler asks for one step.
    Walk,
    Read,
    Write,
}

/// Where a vCPU is in that.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum At {
    Start,
    /// The processor has trapped, and the event is on its way.
    Trapped(EventReason),
    /// It was answered.
    Answered(EventAction),
    Done,
}

struct World {
    session: Session<MockDriver>,
    context: AddressContext,
    does: [Does; VCPUS],
    /// Vcpu 0's events take their time: others can act between its trap and the event.
    is_late: bool,
    at: [At; VCPUS],
    /// The caller removes the breakpoint, then puts another one in.
    tap: Option<TapId>,
    caller: usize,
    raised: usize,
    hits: usize,
}

impl World {
    fn new(does: [Does; VCPUS], is_late: bool) -> Self {
        let mut driver = MockDriver::new(0x9000, VCPUS as u16);
        let context = driver.new_root(4).unwrap();
        driver.map(context, CODE, PAGE.pa(0), PageSize::Size4K, pte::P | pte::W).unwrap();
        let session = Session::new(Box::new(driver), OnWrite::Reapply).unwrap();
        let at = [At::Start; VCPUS];
        let mut world = Self { session, context, does, is_late, at, tap: None, caller: 0, raised: 0, hits: 0 };
        world.plant();
        world
    }

    fn plant(&mut self) {
        let spec = TapSpec {
            kind: TapKind::Breakpoint,
            va: CODE,
            context: self.context,
            global: true,
            view: self.session.tap_view(),
            on_write: None,
            key: None,
            wanted: true,
            enabled: true,
        };
        self.tap = Some(self.session.add(&spec).unwrap());
    }

    fn driver(&mut self) -> &mut MockDriver {
        self.session.vmi_mut().driver_mut()
    }

    /// Who can go on; `VCPUS` is the caller.
    fn enabled(&self) -> Vec<usize> {
        let vcpus = (0..VCPUS).filter(|vcpu| self.at[*vcpu] != At::Done);
        vcpus.chain((self.caller < 2).then_some(VCPUS)).collect()
    }

    fn go_on(&mut self, who: usize) {
        if who == VCPUS {
            match self.tap.take() {
                Some(tap) => self.session.remove(tap).unwrap(),
                None => self.plant(),
            }
            self.caller += 1;
            return;
        }
        self.at[who] = match self.at[who] {
            At::Start => match self.trap(who) {
                Some(reason) if who == 0 && self.is_late => At::Trapped(reason),
                Some(reason) => At::Answered(self.raise(who, reason)),
                None => {
                    self.take_effect(who);
                    At::Done
                }
            },
            At::Trapped(reason) => At::Answered(self.raise(who, reason)),
            // Tried again: as if it had not been.
            At::Answered(EventAction::Continue) => At::Start,
            At::Answered(EventAction::SingleStep { .. }) => {
                self.take_effect(who);
                let answer = self.raise(who, EventReason::SingleStep { gfn: Some(PAGE) });
                assert_eq!(answer, EventAction::Continue);
                At::Done
            }
            At::Answered(action) => {
                assert!(!matches!(action, EventAction::Reinject | EventAction::Deny), "{action:?}");
                self.take_effect(who);
                At::Done
            }
            At::Done => At::Done,
        };
    }

    fn place(&self, who: usize) -> Pa {
        PAGE.pa(if self.does[who] == Does::Write { 16 + who as u64 } else { 0 })
    }

    /// What the processor traps for, if anything, in the view the vCPU is in.
    fn trap(&mut self, who: usize) -> Option<EventReason> {
        let pa = self.place(who);
        let view = self.driver().state().vcpus[who].view;
        let shown = self.driver().peek_in_view(view, pa, 1).unwrap()[0];
        let held = &self.driver().state().views[&view];
        let rights = held.pages.get(&PAGE).copied().unwrap_or(held.access);
        let access = match self.does[who] {
            Does::Run | Does::Walk => return (shown == 0xcc).then_some(EventReason::Breakpoint { gfn: PAGE, insn_len: 1 }),
            Does::Read => MemoryAccess::R,
            Does::Write => MemoryAccess::W,
        };
        let denied = EventReason::MemoryAccess { pa, va: Some(Va(CODE.0 + pa.page_offset())), access, len: 1 };
        (!rights.contains(access)).then_some(denied)
    }

    fn take_effect(&mut self, who: usize) {
        if self.does[who] == Does::Write {
            let pa = self.place(who);
            self.driver().poke(pa, &[0x40 + who as u8]).unwrap();
        }
    }

    /// The event, and its one answer.
    fn raise(&mut self, who: usize, reason: EventReason) -> EventAction {
        let mut registers = Registers { cr3: self.context.root.0, ..Registers::default() };
        registers.gp.rip = CODE.0;
        let vcpu = VcpuId(who as u16);
        let view = Some(self.driver().state().vcpus[who].view);
        self.driver().push_event(VmiEvent { vcpu, view, registers, reason });
        self.raised += 1;
        while let Poll::Hit(hit) = self.session.poll(&Limits::default()).unwrap() {
            assert_eq!((hit.vcpu, Some(hit.tap).filter(|_| hit.step == 0)), (vcpu, self.tap.filter(|_| hit.step == 0)));
            self.hits += usize::from(hit.step == 0);
            let is_first = hit.step == 0 && self.does[who] == Does::Walk;
            self.session.answer(if is_first { Verdict::Step(1) } else { Verdict::Continue }).unwrap();
        }
        let answers = self.driver().answers();
        assert_eq!(answers.len(), self.raised, "answers to {reason:?}");
        let (answered, VmiEventResponse { action, view, .. }) = answers[answers.len() - 1];
        assert_eq!((answered, view), (vcpu, Some(self.session.tap_view())));
        action
    }

    fn check_end(&mut self) {
        let home = self.session.tap_view();
        let vcpus = &self.driver().state().vcpus;
        assert!(vcpus.iter().all(|vcpu| vcpu.view == home && vcpu.pending.is_none()), "{vcpus:?}");
        let mut page = vec![0; 4096];
        for who in (0..VCPUS).filter(|who| self.does[*who] == Does::Write) {
            page[16 + who] = 0x40 + who as u8;
        }
        assert!(self.driver().peek(PAGE.pa(0), 4096).unwrap() == page, "a store is lost");
        page[0] = if self.tap.is_some() { 0xcc } else { 0 };
        assert!(self.driver().peek_in_view(home, PAGE.pa(0), 4096).unwrap() == page, "a shadow is not up to date");
        self.session.detach().unwrap();
        assert!(self.driver().state().vcpus.iter().all(|vcpu| vcpu.view == View::DEFAULT));
    }
}

/// Runs every order there is; how many there are, and the hits in all of them.
fn every_order(does: [Does; VCPUS], is_late: bool) -> (usize, usize) {
    // Of each step, which of those that could go on did, and how many could.
    let mut path: Vec<(usize, usize)> = Vec::new();
    let (mut orders, mut hits) = (0, 0);
    loop {
        let mut world = World::new(does, is_late);
        for depth in 0.. {
            let enabled = world.enabled();
            if enabled.is_empty() {
                break;
            }
            assert!(depth < 40, "it never ends: {does:?} {path:?}");
            if depth == path.len() {
                path.push((0, enabled.len()));
            }
            world.go_on(enabled[path[depth].0]);
        }
        world.check_end();
        orders += 1;
        hits += world.hits;
        while path.pop_if(|(chosen, of)| *chosen + 1 == *of).is_some() {}
        let Some((chosen, _)) = path.last_mut() else { return (orders, hits) };
        *chosen += 1;
    }
}

#[test]
fn whatever_the_order_each_event_has_one_answer_and_each_vcpu_comes_home() {
    const ALL: [Does; 4] = [Does::Run, Does::Walk, Does::Read, Does::Write];
    let (mut orders, mut hits) = (0, 0);
    for (index, first) in ALL.into_iter().enumerate() {
        for (next, second) in ALL.into_iter().enumerate().skip(index) {
            for third in ALL.into_iter().skip(next) {
                let (more, hit) = every_order([first, second, third], false);
                orders += more;
                hits += hit;
            }
        }
    }
    assert!(orders > 20_000 && hits > 10_000, "{orders} orders, {hits} hits");
}

#[test]
fn an_event_that_comes_after_its_breakpoint_is_gone_is_answered_all_the_same() {
    for others in [[Does::Run, Does::Write], [Does::Walk, Does::Write], [Does::Read, Does::Run]] {
        for first in [Does::Run, Does::Write] {
            let (orders, hits) = every_order([first, others[0], others[1]], true);
            assert!(orders > 1_000 && hits > 500, "{orders} orders, {hits} hits");
        }
    }
}
