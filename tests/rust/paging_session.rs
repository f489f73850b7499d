//! Pending breakpoints in a session, on the mock driver: which calls are made, and what a failing one leaves behind.

use parking_lot::MutexGuard;
use vmitap::arch::amd64::{AddressContext, ControlRegister, DescriptorTable, Registers, pte};
use vmitap::driver::mock::{MockDriver, PageSize};
use vmitap::driver::{Monitor, VmiProtection};
use vmitap::event::{EventAction, EventReason, VmiEvent, VmiEventResponse};
use vmitap::session::{Limits, Poll, Session, TapId, TapKind, TapSpec, TapState};
use vmitap::tap::OnWrite;
use vmitap::{Gfn, MemoryAccess, Pa, Va, VcpuId, View, VmiError};

use super::harness::{Faulty, World, each_call_failing};
use super::session_atomic::session_books;
use crate::lines::{listen, logged};

const CODE: Va = Va(0xffff_8000_0040_0010);
const CODE_PA: Pa = Pa(0x5010);
const IDT: Va = Va(0xffff_8000_0040_3000);
const FLAGS: u64 = pte::P | pte::W;

struct Lab {
    session: Session<Faulty<MockDriver>>,
    context: AddressContext,
    vcpu: VcpuId,
}

impl Lab {
    fn new() -> Self {
        Self::with_memory(0x40000)
    }

    fn with_memory(size: u64) -> Self {
        let mut driver = MockDriver::new(size, 2);
        let context = driver.new_root(4).unwrap();
        for (va, pa) in [(CODE, CODE_PA), (IDT, Pa(0x8000))] {
            driver.map(context, va, pa, PageSize::Size4K, FLAGS).unwrap();
        }
        let idtr = DescriptorTable { base: IDT.0, limit: 0xfff };
        for vcpu in [0, 1] {
            let registers = Registers { cr3: context.root.0, idtr, ..Registers::default() };
            driver.poke_registers(VcpuId(vcpu), registers).unwrap();
        }
        Self { session: Session::new(Box::new(Faulty::new(driver)), OnWrite::Reapply).unwrap(), context, vcpu: VcpuId(0) }
    }

    fn driver(&self) -> MutexGuard<'_, MockDriver> {
        self.session.vmi().driver().inner()
    }

    fn spec(&self, va: Va) -> TapSpec {
        TapSpec {
            kind: TapKind::Breakpoint,
            va,
            context: self.context,
            global: false,
            view: self.session.tap_view(),
            on_write: None,
            key: None,
            wanted: false,
            enabled: true,
        }
    }

    fn add(&mut self, va: Va) -> TapId {
        self.session.add(&self.spec(va)).unwrap()
    }

    fn entry(&self, va: Va, level: u8) -> Pa {
        let context = self.context;
        self.driver().entry(context, va, level).unwrap()
    }

    fn put(&self, entry: Pa, value: u64) {
        self.driver().poke(entry, &value.to_le_bytes()).unwrap();
    }

    fn event(&self, view: View, reason: EventReason) -> VmiEvent {
        let idtr = DescriptorTable { base: IDT.0, limit: 0xfff };
        let registers = Registers { cr3: self.context.root.0, idtr, ..Registers::default() };
        VmiEvent { vcpu: self.vcpu, view: Some(view), registers, reason }
    }

    fn poll(&mut self) -> vmitap::Result<Poll> {
        self.session.poll(&Limits::default())
    }

    fn raise(&mut self, view: View, reason: EventReason) -> vmitap::Result<()> {
        let event = self.event(view, reason);
        self.driver().push_event(event);
        self.poll().map(|poll| assert!(matches!(poll, Poll::Idle), "{poll:?}"))
    }

    /// A denied store to an entry is told.
    fn denied(&mut self, entry: Pa, len: u16) -> vmitap::Result<()> {
        let view = self.session.tap_view();
        let va = Some(Va(0x9000_0000 + entry.page_offset()));
        self.raise(view, EventReason::MemoryAccess { pa: entry, va, access: MemoryAccess::W, len })
    }

    /// The step that carried the store out is told.
    fn stepped(&mut self) -> vmitap::Result<()> {
        self.raise(View::DEFAULT, EventReason::SingleStep { gfn: None })
    }

    /// A store to an entry, from its denial on.
    fn store(&mut self, entry: Pa, value: u64) -> vmitap::Result<()> {
        self.denied(entry, 8).unwrap();
        self.put(entry, value);
        self.stepped()
    }

    fn answers(&self) -> Vec<VmiEventResponse> {
        self.session.vmi().driver().inner().answers().iter().map(|(_, answer)| *answer).collect()
    }

    fn is_planted(&self, pa: Pa) -> bool {
        let view = self.session.tap_view();
        self.driver().peek_in_view(view, pa, 1).unwrap() == [0xcc]
    }

    fn state(&self, tap: TapId) -> TapState {
        self.session.state(tap)
    }

    fn access(&self, gfn: Gfn) -> MemoryAccess {
        self.session.vmi().driver().memory_access(self.session.tap_view(), gfn).unwrap()
    }
}

#[test]
fn a_store_to_a_table_is_stepped_in_the_default_view_and_then_looked_at() {
    let mut lab = Lab::new();
    let tap = lab.add(CODE);
    let entry = lab.entry(CODE, 1);
    let view = lab.session.tap_view();
    assert_eq!((lab.access(entry.gfn()), lab.state(tap)), (MemoryAccess::RX, TapState::Active));
    lab.denied(entry, 4).unwrap();
    let step = VmiEventResponse::action(EventAction::SingleStep { view: View::DEFAULT }).in_view(view);
    assert_eq!(lab.answers(), [step]);
    lab.put(entry, 0);
    assert_eq!(lab.state(tap), TapState::Active);
    lab.stepped().unwrap();
    assert_eq!(lab.answers()[1], VmiEventResponse::CONTINUE.in_view(view));
    assert_eq!((lab.state(tap), lab.is_planted(CODE_PA)), (TapState::Pending, false));
    assert_eq!(lab.session.shadow_frames(), 0);
    lab.store(entry, 0x6000 | FLAGS).unwrap();
    assert_eq!((lab.state(tap), lab.is_planted(Pa(0x6010))), (TapState::Active, true));
    let stats = lab.session.stats();
    assert_eq!((stats.table_writes, stats.page_ins, stats.page_outs, stats.hidden_writes), (2, 1, 1, 0));
    lab.session.remove(tap).unwrap();
    assert_eq!(lab.access(entry.gfn()), MemoryAccess::RWX);
}

#[test]
fn a_breakpoint_is_pending_until_its_page_is_there_also_when_it_was_disabled_meanwhile() {
    let mut lab = Lab::new();
    let entry = lab.entry(CODE, 1);
    lab.put(entry, 0);
    let tap = lab.add(CODE);
    assert_eq!((lab.state(tap), lab.session.shadow_frames()), (TapState::Pending, 0));
    lab.session.disable(tap).unwrap();
    assert_eq!((lab.state(tap), lab.access(entry.gfn())), (TapState::Disabled, MemoryAccess::RWX));
    lab.session.enable(tap).unwrap();
    assert_eq!(lab.state(tap), TapState::Pending);
    lab.store(entry, 0x6000 | FLAGS).unwrap();
    assert_eq!((lab.state(tap), lab.is_planted(Pa(0x6010))), (TapState::Active, true));
    lab.session.disable(tap).unwrap();
    lab.put(entry, 0x7000 | FLAGS);
    lab.session.enable(tap).unwrap();
    assert_eq!((lab.state(tap), lab.is_planted(Pa(0x7010))), (TapState::Active, true));
}

#[test]
fn of_two_vcpus_only_the_one_whose_store_is_done_is_looked_at() {
    let mut lab = Lab::new();
    let tap = lab.add(CODE);
    let entry = lab.entry(CODE, 1);
    lab.denied(entry, 8).unwrap();
    lab.put(entry, 0);
    lab.vcpu = VcpuId(1);
    let view = lab.session.tap_view();
    // An event of the other vCPU, whatever it is.
    lab.raise(view, EventReason::Cpuid { leaf: 0, subleaf: 0, insn_len: 2 }).unwrap();
    assert_eq!(lab.state(tap), TapState::Active);
    lab.vcpu = VcpuId(0);
    lab.stepped().unwrap();
    assert_eq!(lab.state(tap), TapState::Pending);
}

#[test]
fn a_page_in_that_fails_keeps_the_breakpoint_pending_is_told_and_is_tried_again() {
    let mut failed = std::collections::BTreeSet::new();
    for n in 1.. {
        let mut lab = Lab::new();
        let entry = lab.entry(CODE, 1);
        lab.put(entry, 0);
        let taps = [lab.add(CODE), lab.add(Va(CODE.0 + 5))];
        lab.denied(entry, 8).unwrap();
        lab.put(entry, 0x6000 | FLAGS);
        let event = lab.event(View::DEFAULT, EventReason::SingleStep { gfn: None });
        lab.driver().push_event(event);
        let driver = World::driver(&lab);
        driver.fail_nth(n);
        let result = lab.poll();
        let op = match result {
            Err(VmiError::Driver { op, .. }) => op,
            other => {
                assert!(driver.is_armed(), "call {n} failed and nobody was told: {other:?}");
                assert!(n > 8 && ["wait", "read", "respond", "remap"].iter().all(|op| failed.contains(op)), "{n} {failed:?}");
                return;
            }
        };
        failed.insert(op);
        let planted = taps.map(|tap| lab.state(tap));
        // Where the first wait fails, the event is still to come.
        assert_eq!(lab.answers().len(), if n == 1 { 1 } else { 2 }, "call {n}, {op}: the vCPU stands still");
        let is_whole = planted == [TapState::Active; 2] || planted.contains(&TapState::Pending);
        assert!(is_whole, "call {n}: {planted:?}");
        lab.poll().unwrap();
        assert_eq!(taps.map(|tap| lab.state(tap)), [TapState::Active; 2], "call {n}, {op}");
        assert!(lab.is_planted(Pa(0x6010)) && lab.is_planted(Pa(0x6015)), "call {n}");
        assert_eq!(lab.answers().len(), 2, "call {n}");
    }
}

#[test]
fn a_page_out_that_fails_is_tried_again_and_the_page_in_after_it_is_not_lost() {
    let mut lab = Lab::new();
    let tap = lab.add(CODE);
    let entry = lab.entry(CODE, 1);
    lab.denied(entry, 8).unwrap();
    lab.put(entry, 0x6000 | FLAGS);
    let event = lab.event(View::DEFAULT, EventReason::SingleStep { gfn: None });
    lab.driver().push_event(event);
    lab.driver().fail_nth_of(vmitap::driver::mock::CallKind::Remap, 1);
    assert!(matches!(lab.poll(), Err(VmiError::Driver { .. })));
    assert!(lab.is_planted(CODE_PA));
    // Meanwhile it goes elsewhere once more.
    lab.driver().fail_nth_of(vmitap::driver::mock::CallKind::Remap, 1);
    lab.session.write_pa(entry, &(0x7000 | FLAGS).to_le_bytes()).unwrap();
    assert_eq!(lab.driver().faults_left(), 0);
    assert!(lab.is_planted(CODE_PA));
    lab.poll().unwrap();
    assert_eq!((lab.is_planted(CODE_PA), lab.is_planted(Pa(0x6010)), lab.is_planted(Pa(0x7010))), (false, false, true));
    assert_eq!(lab.state(tap), TapState::Active);
}

#[test]
fn a_table_that_is_watched_by_the_user_too_is_told_and_looked_at() {
    let mut lab = Lab::new();
    let tap = lab.add(CODE);
    let entry = lab.entry(CODE, 1);
    // The table is mapped for the guest itself.
    let (context, table) = (lab.context, Va(0xffff_8000_0050_0000));
    lab.driver().map(context, table, entry.gfn().pa(0), PageSize::Size4K, FLAGS).unwrap();
    let watch = TapSpec {
        kind: TapKind::Watch { len: 8, access: MemoryAccess::W },
        wanted: true,
        ..lab.spec(Va(table.0 + entry.page_offset()))
    };
    let watch = lab.session.add(&watch).unwrap();
    let view = lab.session.tap_view();
    for (offset, hits) in [(0, 1), (64, 0)] {
        let pa = Pa(entry.0 ^ offset);
        let event = lab.event(view, EventReason::MemoryAccess { pa, va: None, access: MemoryAccess::W, len: 8 });
        lab.driver().push_event(event);
        if hits == 1 {
            assert!(matches!(lab.poll(), Ok(Poll::Hit(hit)) if hit.tap == watch));
            lab.session.answer(vmitap::session::Verdict::Continue).unwrap();
        } else {
            assert!(matches!(lab.poll(), Ok(Poll::Idle)));
        }
        let step = VmiEventResponse::action(EventAction::SingleStep { view: View::DEFAULT }).in_view(view);
        assert_eq!(lab.answers().last(), Some(&step));
        lab.put(entry, if hits == 1 { 0 } else { 0x6000 | FLAGS });
        lab.stepped().unwrap();
        assert_eq!(lab.state(tap), if hits == 1 { TapState::Pending } else { TapState::Active });
    }
    // Whoever goes first, the other's denial stays.
    lab.session.remove(tap).unwrap();
    assert_eq!(lab.access(entry.gfn()), MemoryAccess::RX);
    lab.session.remove(watch).unwrap();
    assert_eq!(lab.access(entry.gfn()), MemoryAccess::RWX);
}

#[test]
fn a_table_with_a_breakpoint_on_it_is_both() {
    let mut lab = Lab::new();
    let entry = lab.entry(CODE, 1);
    let (context, table) = (lab.context, Va(0xffff_8000_0050_0000));
    lab.driver().map(context, table, entry.gfn().pa(0), PageSize::Size4K, FLAGS).unwrap();
    let on_table = lab.add(Va(table.0 + 0x800));
    let tap = lab.add(CODE);
    assert_eq!(lab.access(entry.gfn()), MemoryAccess::X);
    lab.store(entry, 0x6000 | FLAGS).unwrap();
    assert!(lab.is_planted(Pa(0x6010)) && lab.is_planted(entry.gfn().pa(0x800)));
    // The copy that execution reaches is what the guest wrote.
    let view = lab.session.tap_view();
    assert_eq!(lab.driver().peek_in_view(view, entry, 8).unwrap(), (0x6000 | FLAGS).to_le_bytes());
    let stats = lab.session.stats();
    assert_eq!((stats.hidden_writes, stats.table_writes), (1, 1));
    lab.session.remove(on_table).unwrap();
    assert_eq!(lab.access(entry.gfn()), MemoryAccess::RX);
    lab.store(entry, 0).unwrap();
    assert_eq!(lab.state(tap), TapState::Pending);
    lab.session.remove(tap).unwrap();
    assert_eq!(lab.access(entry.gfn()), MemoryAccess::RWX);
}

#[test]
fn a_store_that_moves_the_page_it_reaches_into_is_looked_at_where_it_was() {
    let mut lab = Lab::new();
    // The table of CODE is mapped behind another page, by that page: its last entry.
    let (context, table) = (lab.context, Va(0xffff_8000_0080_0000));
    let code_table = lab.entry(CODE, 1).gfn();
    lab.driver().map(context, table, Pa(0x9000), PageSize::Size4K, FLAGS).unwrap();
    lab.driver().map(context, Va(table.0 + 0x1000), code_table.pa(0), PageSize::Size4K, FLAGS).unwrap();
    let tap = lab.add(CODE);
    let far = lab.add(table);
    let mapping = lab.entry(Va(table.0 + 0x1000), 1);
    let entry = lab.entry(CODE, 1);
    let view = lab.session.tap_view();
    let reason = EventReason::MemoryAccess { pa: Pa(mapping.0), va: Some(Va(table.0 + 0xff8)), access: MemoryAccess::W, len: 8 };
    lab.raise(view, reason).unwrap();
    lab.put(mapping, 0);
    lab.put(entry, 0);
    lab.stepped().unwrap();
    assert_eq!([lab.state(tap), lab.state(far)], [TapState::Pending, TapState::Active]);
}

#[test]
fn writes_from_outside_and_time_in_the_default_view_are_followed() {
    let mut lab = Lab::new();
    let tap = lab.add(CODE);
    let entry = lab.entry(CODE, 1);
    lab.session.write_pa(entry, &[0]).unwrap();
    assert_eq!(lab.state(tap), TapState::Pending);
    lab.session.write_pa(entry, &(0x6000 | FLAGS).to_le_bytes()).unwrap();
    assert!(lab.is_planted(Pa(0x6010)));
    lab.session.switch_to_view(View::DEFAULT).unwrap();
    lab.put(entry, 0x7000 | FLAGS);
    lab.session.switch_to_view(lab.session.tap_view()).unwrap();
    lab.poll().unwrap();
    assert!(lab.is_planted(Pa(0x7010)) && !lab.is_planted(Pa(0x6010)));
}

#[test]
fn tables_are_watched_in_every_view_of_the_session() {
    let mut lab = Lab::new();
    let tap = lab.add(CODE);
    let entry = lab.entry(CODE, 1);
    let other = lab.session.create_view(MemoryAccess::RWX).unwrap();
    let reason = EventReason::MemoryAccess { pa: entry, va: None, access: MemoryAccess::W, len: 8 };
    lab.raise(other, reason).unwrap();
    lab.put(entry, 0);
    lab.stepped().unwrap();
    assert_eq!(lab.state(tap), TapState::Pending);
    let before = lab.session.vmi().driver().inner().snapshot();
    lab.session.destroy_view(other).unwrap();
    let fresh = lab.session.create_view(MemoryAccess::RWX).unwrap();
    assert_eq!((fresh, lab.session.vmi().driver().inner().snapshot().views), (other, before.views));
    lab.session.detach().unwrap();
    let view = &lab.session.vmi().driver().inner().snapshot().views;
    assert_eq!(view.len(), 1);
    assert!(view[&View::DEFAULT].pages.is_empty());
}

#[test]
fn writes_of_cr3_are_announced_only_while_a_global_breakpoint_needs_them() {
    let mut lab = Lab::new();
    let cr3 = Monitor::ControlRegister(ControlRegister::Cr3);
    let is_tracked = |lab: &Lab| lab.session.vmi().driver().inner().snapshot().monitors.contains(&cr3);
    let global = |lab: &Lab, va| TapSpec { global: true, ..lab.spec(va) };
    let entry = lab.entry(CODE, 1);
    lab.session.add(&global(&lab, CODE)).unwrap();
    let fixed = lab.add(Va(0x40_0000));
    assert!(!is_tracked(&lab), "in the upper half, and planted; and one of one root");
    lab.session.remove(fixed).unwrap();
    lab.store(entry, 0).unwrap();
    assert!(is_tracked(&lab), "pending");
    lab.store(entry, 0x6000 | FLAGS).unwrap();
    assert!(!is_tracked(&lab), "planted again");
    let low = lab.session.add(&global(&lab, Va(0x40_0000))).unwrap();
    assert!(is_tracked(&lab), "in the lower half");
    lab.session.disable(low).unwrap();
    assert!(!is_tracked(&lab));
    lab.session.enable(low).unwrap();
    assert!(is_tracked(&lab));
    lab.session.detach().unwrap();
    assert!(!is_tracked(&lab));
}

#[test]
fn a_root_that_is_loaded_is_looked_at_before_the_guest_runs_under_it() {
    let mut lab = Lab::new();
    let va = Va(0x40_0010);
    let tap = lab.session.add(&TapSpec { global: true, ..lab.spec(va) }).unwrap();
    let other = lab.driver().new_root(4).unwrap();
    lab.driver().map(other, va, Pa(0x6010), PageSize::Size4K, FLAGS).unwrap();
    let view = lab.session.tap_view();
    let old = lab.context.root.0;
    // The upper bits of CR3 are flags.
    let new = other.root.0 | 1 << 63 | 5;
    lab.raise(view, EventReason::WriteControlRegister { register: ControlRegister::Cr3, old, new }).unwrap();
    assert_eq!((lab.state(tap), lab.is_planted(Pa(0x6010))), (TapState::Active, true));
    lab.session.remove(tap).unwrap();
    assert!(!lab.is_planted(Pa(0x6010)));
    let pages = lab.session.vmi().driver().inner().snapshot().views[&view].pages.clone();
    assert!(pages.is_empty(), "{pages:?}");
}

#[test]
fn of_many_roots_the_oldest_makes_room_but_never_one_that_a_vcpu_is_in() {
    const ROOTS: usize = 512;
    listen();
    let mut lab = Lab::with_memory(0x80_0000);
    let (va, view) = (Va(0x40_0010), lab.session.tap_view());
    let tap = lab.session.add(&TapSpec { global: true, ..lab.spec(va) }).unwrap();
    let old = lab.context.root.0;
    let mut roots = Vec::new();
    for number in 0..ROOTS as u64 + 3 {
        let root = lab.driver().new_root(4).unwrap();
        // The first two have the page; another vCPU loads the first, and stays.
        if number < 2 {
            lab.driver().map(root, va, Pa(0x6010 + number * 0x1000), PageSize::Size4K, FLAGS).unwrap();
        }
        lab.vcpu = VcpuId(u16::from(number == 0));
        let load = EventReason::WriteControlRegister { register: ControlRegister::Cr3, old, new: root.root.0 };
        lab.raise(view, load).unwrap();
        if number == 0 {
            let registers = Registers { cr3: root.root.0, ..lab.event(view, load).registers };
            lab.driver().poke_registers(VcpuId(1), registers).unwrap();
        }
        roots.push(root);
        // The root in which vCPU 0 loads them is one of those that are remembered.
        let is_full = roots.len() >= ROOTS;
        assert!(lab.is_planted(Pa(0x6010)), "vCPU 1 is there, after {number} more");
        assert_eq!(lab.is_planted(Pa(0x7010)), number >= 1 && !is_full, "nobody is there, after {number}");
    }
    assert_eq!((lab.state(tap), lab.session.stats().roots_given_up), (TapState::Active, 4));
    let lines = logged();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].starts_with("512 page-table roots were loaded"), "{lines:?}");
    // Who comes back to one that made room finds the breakpoint there.
    lab.vcpu = VcpuId(0);
    let load = EventReason::WriteControlRegister { register: ControlRegister::Cr3, old, new: roots[1].root.0 };
    lab.raise(view, load).unwrap();
    assert!(lab.is_planted(Pa(0x7010)));
}

impl World for Lab {
    type Driver = MockDriver;

    fn driver(&self) -> Faulty<MockDriver> {
        self.session.vmi().driver().clone()
    }

    fn books(&self) -> Vec<String> {
        session_books(&self.session)
    }
}

/// Mapped under some roots only.
const LOW: Va = Va(0x40_0010);
/// Mapped under no root.
const GONE: Va = Va(0x80_0010);
const V2: View = View(2);

/// The second vCPU runs under a root of its own, which maps LOW. So does a third root.
fn roots() -> (Lab, u64) {
    let lab = Lab::new();
    let [second, third] = [0x6010, 0x7010].map(|pa| {
        let root = lab.driver().new_root(4).unwrap();
        lab.driver().map(root, LOW, Pa(pa), PageSize::Size4K, FLAGS).unwrap();
        lab.driver().map(root, IDT, Pa(0x8000), PageSize::Size4K, FLAGS).unwrap();
        root.root.0
    });
    let registers = Registers { cr3: second, ..Registers::default() };
    lab.driver().poke_registers(VcpuId(1), registers).unwrap();
    (lab, third)
}

fn some(lab: &Lab, view: View) -> Vec<TapSpec> {
    let global = TapSpec { global: true, key: Some(1), view, ..lab.spec(LOW) };
    let own = |va| TapSpec { view, ..lab.spec(va) };
    vec![global, own(CODE), own(LOW), TapSpec { va: GONE, ..global }, TapSpec { key: Some(2), enabled: false, ..global }]
}

fn none() -> Lab {
    roots().0
}

/// In two views each: a global one that is planted under two roots and waits under the third, one that is planted, one that waits, a
/// global one that waits, and one that is disabled. The third root has been loaded once, and is not in use.
fn pending() -> Lab {
    let (mut lab, third) = roots();
    lab.session.create_view(MemoryAccess::RWX).unwrap();
    let view = lab.session.tap_view();
    let specs = [some(&lab, view), some(&lab, V2)].concat();
    lab.session.add_many(&specs).unwrap();
    let reason = EventReason::WriteControlRegister { register: ControlRegister::Cr3, old: lab.context.root.0, new: third };
    lab.raise(view, reason).unwrap();
    assert!(lab.is_planted(Pa(0x6010)) && lab.is_planted(Pa(0x7010)) && lab.is_planted(CODE_PA));
    let states = [0, 1, 2, 3, 4].map(|tap| lab.state(TapId(tap)));
    let (active, pending) = (TapState::Active, TapState::Pending);
    assert_eq!(states, [active, active, pending, pending, TapState::Disabled]);
    lab
}

/// The same, with what is global in the second view only.
fn only_second() -> Lab {
    let mut lab = pending();
    lab.session.remove_many(&[TapId(0), TapId(3), TapId(4)]).unwrap();
    lab
}

/// Of [`pending`], with every vCPU in the second view.
fn in_second() -> Lab {
    let mut lab = pending();
    lab.session.switch_to_view(V2).unwrap();
    lab
}

type Operation = (fn() -> Lab, fn(&mut Lab) -> vmitap::Result<()>, usize);

/// On what, the operation, and how many calls it has at least.
const OPERATIONS: &[Operation] = &[
    (
        none,
        |lab| {
            let specs = some(lab, lab.session.tap_view());
            lab.session.add_many(&specs).map(drop)
        },
        50,
    ),
    (pending, |lab| lab.session.remove(TapId(0)), 3),
    (pending, |lab| lab.session.remove(TapId(1)), 2),
    (pending, |lab| lab.session.remove_many(&[TapId(0), TapId(1), TapId(2), TapId(3), TapId(4)]), 4),
    (
        pending,
        |lab| {
            let all: Vec<TapId> = (0..10).map(TapId).collect();
            lab.session.remove_many(&all)
        },
        20,
    ),
    (pending, |lab| lab.session.disable(TapId(0)), 3),
    (pending, |lab| lab.session.disable(TapId(6)), 2),
    (pending, |lab| lab.session.enable(TapId(4)), 10),
    (pending, |lab| lab.session.enable(TapId(9)), 10),
    (pending, |lab| lab.session.create_view(MemoryAccess::RWX).map(drop), 10),
    (pending, |lab| lab.session.destroy_view(V2), 8),
    (only_second, |lab| lab.session.destroy_view(V2), 8),
    (in_second, |lab| lab.session.destroy_view(V2), 10),
    (pending, |lab| lab.session.switch_to_view(V2), 12),
    (in_second, |lab| lab.session.switch_to_view(lab.session.tap_view()), 12),
];

#[test]
fn putting_in_and_taking_out_what_waits_is_whole_or_not_at_all() {
    for (index, (make, operation, least)) in OPERATIONS.iter().enumerate() {
        let calls = each_call_failing(make, operation);
        assert!(calls >= *least, "operation {index}: {calls} calls");
    }
}

#[test]
fn a_failure_lets_no_root_be_forgotten_that_was_loaded_once() {
    let all = |lab: &mut Lab| lab.session.remove_many(&(0..10).map(TapId).collect::<Vec<_>>());
    for n in 1.. {
        let mut lab = pending();
        let driver = World::driver(&lab);
        driver.fail_nth(n);
        let result = all(&mut lab);
        if driver.is_armed() {
            assert!(n > 20, "{n}");
            return result.unwrap();
        }
        assert!(matches!(result, Err(VmiError::Driver { .. })), "call {n}: {result:?}");
        let late = TapSpec { global: true, ..lab.spec(Va(LOW.0 + 8)) };
        lab.session.add(&late).unwrap();
        assert_eq!([0x6018, 0x7018].map(|pa| lab.is_planted(Pa(pa))), [true; 2], "call {n}");
    }
}

#[test]
fn the_root_that_makes_room_is_left_by_a_retry_where_that_failed() {
    for n in 1.. {
        let mut lab = Lab::with_memory(0x40_0000);
        let first = lab.driver().new_root(4).unwrap();
        lab.driver().map(first, LOW, Pa(0x6010), PageSize::Size4K, FLAGS).unwrap();
        let (top, index) = (lab.session.vmi().read_pa_u64(first.root).unwrap(), 8 * (LOW.0 >> 39 & 511));
        assert_eq!(index, 0);
        let spec = TapSpec { global: true, ..lab.spec(LOW) };
        lab.session.add(&spec).unwrap();
        let view = lab.session.tap_view();
        let load = |lab: &mut Lab, root: Pa| {
            let reason = EventReason::WriteControlRegister { register: ControlRegister::Cr3, old: 0, new: root.0 };
            lab.raise(view, reason)
        };
        // With the one in use there are as many as are remembered.
        let mut others = Vec::new();
        for _ in 0..511 {
            let root = lab.driver().new_root(4).unwrap().root;
            lab.put(root, top);
            load(&mut lab, root).unwrap();
            others.push(root);
        }
        // The vCPU is in the one that it began with: that stays.
        let oldest = others.remove(0).gfn();
        others.push(lab.context.root);
        assert_eq!(lab.access(oldest), MemoryAccess::RX);
        let driver = World::driver(&lab);
        // The first call is the wait.
        let (result, is_through) = driver.failing(n + 1, || load(&mut lab, first.root));
        if !is_through {
            assert!(matches!(result, Err(VmiError::Driver { .. })), "call {n}: {result:?}");
            load(&mut lab, first.root).unwrap();
        }
        assert_eq!(lab.access(oldest), MemoryAccess::RWX, "call {n}");
        assert!(others.iter().chain([&first.root]).all(|root| lab.access(root.gfn()) == MemoryAccess::RX), "call {n}");
        if is_through {
            assert!(n > 3, "{n}");
            return result.unwrap();
        }
    }
}
