//! Pending breakpoints in a session, on the mock driver: which calls are made, and what a failing one leaves behind.

use vmitap::arch::amd64::{AddressContext, ControlRegister, DescriptorTable, Registers, pte};
use vmitap::driver::mock::{MockDriver, PageSize};
use vmitap::driver::{Monitor, VmiProtection};
use vmitap::event::{EventAction, EventReason, VmiEvent, VmiEventResponse};
use vmitap::session::{Limits, Poll, Session, TapId, TapKind, TapSpec, TapState};
use vmitap::tap::OnWrite;
use vmitap::{Gfn, MemoryAccess, Pa, Va, VcpuId, View, VmiError};

const CODE: Va = Va(0xffff_8000_0040_0010);
const CODE_PA: Pa = Pa(0x5010);
const IDT: Va = Va(0xffff_8000_0040_3000);
const FLAGS: u64 = pte::P | pte::W;

struct Lab {
    session: Session<MockDriver>,
    context: AddressContext,
    vcpu: VcpuId,
}

impl Lab {
    fn new() -> Self {
        let mut driver = MockDriver::new(0x40000, 2);
        let context = driver.new_root(4).unwrap();
        for (va, pa) in [(CODE, CODE_PA), (IDT, Pa(0x8000))] {
            driver.map(context, va, pa, PageSize::Size4K, FLAGS).unwrap();
        }
        let idtr = DescriptorTable { base: IDT.0, limit: 0xfff };
        for vcpu in [0, 1] {
            let registers = Registers { cr3: context.root.0, idtr, ..Registers::default() };
            driver.poke_registers(VcpuId(vcpu), registers).unwrap();
        }
        Self { session: Session::new(Box::new(driver), OnWrite::Reapply).unwrap(), context, vcpu: VcpuId(0) }
    }

    fn driver(&mut self) -> &mut MockDriver {
        self.session.vmi_mut().driver_mut()
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

    fn entry(&mut self, va: Va, level: u8) -> Pa {
        let context = self.context;
        self.driver().entry(context, va, level).unwrap()
    }

    fn put(&mut self, entry: Pa, value: u64) {
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
        self.session.vmi().driver().answers().iter().map(|(_, answer)| *answer).collect()
    }

    fn is_planted(&mut self, pa: Pa) -> bool {
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
    for n in 1.. {
        let mut lab = Lab::new();
        let entry = lab.entry(CODE, 1);
        lab.put(entry, 0);
        let taps = [lab.add(CODE), lab.add(Va(CODE.0 + 5))];
        lab.denied(entry, 8).unwrap();
        lab.put(entry, 0x6000 | FLAGS);
        let event = lab.event(View::DEFAULT, EventReason::SingleStep { gfn: None });
        lab.driver().push_event(event);
        // The first two are the wait and the look at the table.
        lab.driver().fail_nth(n + 2);
        let result = lab.poll();
        if lab.session.vmi().driver().faults_left() > 0 {
            assert!(n > 6, "{n}");
            return;
        }
        let planted = taps.map(|tap| lab.state(tap));
        let is_answered = lab.answers().len() == 2;
        assert!(is_answered, "call {n}: the vCPU stands still");
        assert!(result.is_err(), "call {n} failed and nobody was told: {planted:?}");
        if planted == [TapState::Active; 2] {
            continue;
        }
        assert!(planted.contains(&TapState::Pending), "call {n}: {planted:?}");
        lab.poll().unwrap();
        assert_eq!(taps.map(|tap| lab.state(tap)), [TapState::Active; 2], "call {n}");
        assert!(lab.is_planted(Pa(0x6010)) && lab.is_planted(Pa(0x6015)), "call {n}");
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
    assert_eq!((lab.session.vmi().driver().faults_left(), lab.is_planted(CODE_PA)), (0, true));
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
    let before = lab.session.vmi().driver().snapshot();
    lab.session.destroy_view(other).unwrap();
    let fresh = lab.session.create_view(MemoryAccess::RWX).unwrap();
    assert_eq!((fresh, lab.session.vmi().driver().snapshot().views), (other, before.views));
    lab.session.detach().unwrap();
    let view = &lab.session.vmi().driver().snapshot().views;
    assert_eq!(view.len(), 1);
    assert!(view[&View::DEFAULT].pages.is_empty());
}

#[test]
fn writes_of_cr3_are_announced_only_while_a_global_breakpoint_needs_them() {
    let mut lab = Lab::new();
    let cr3 = Monitor::ControlRegister(ControlRegister::Cr3);
    let is_tracked = |lab: &Lab| lab.session.vmi().driver().snapshot().monitors.contains(&cr3);
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
    let pages = lab.session.vmi().driver().snapshot().views[&view].pages.clone();
    assert!(pages.is_empty(), "{pages:?}");
}

/// Does `operation` with the n-th driver call failing, for each n: the guest must be as before, and a retry must do it all.
fn fails_cleanly(set_up: impl Fn(&mut Lab), operation: impl Fn(&mut Lab) -> vmitap::Result<()>) {
    for n in 1.. {
        let mut lab = Lab::new();
        set_up(&mut lab);
        let before = lab.session.vmi().driver().snapshot();
        lab.driver().fail_nth(n);
        let result = operation(&mut lab);
        if lab.session.vmi().driver().faults_left() > 0 {
            assert!(n > 2, "{n} driver calls");
            return result.unwrap();
        }
        assert!(matches!(result, Err(VmiError::Driver { .. })), "call {n}: {result:?}");
        assert_eq!(lab.session.vmi().driver().snapshot().differences(&before), [] as [String; 0], "call {n}");
        operation(&mut lab).unwrap();
    }
}

#[test]
fn putting_in_and_taking_out_what_waits_is_whole_or_not_at_all() {
    const LOW: Va = Va(0x40_0010);
    let both = |lab: &mut Lab| {
        let specs = [TapSpec { global: true, key: Some(1), ..lab.spec(LOW) }, lab.spec(CODE), lab.spec(LOW)];
        lab.session.add_many(&specs).map(drop)
    };
    let set_up = |lab: &mut Lab| {
        // The second vCPU runs under a root of its own, which maps LOW.
        let other = lab.driver().new_root(4).unwrap();
        lab.driver().map(other, LOW, Pa(0x6010), PageSize::Size4K, FLAGS).unwrap();
        let registers = Registers { cr3: other.root.0, ..Registers::default() };
        lab.driver().poke_registers(VcpuId(1), registers).unwrap();
    };
    fails_cleanly(set_up, both);
    let added = |lab: &mut Lab| {
        set_up(lab);
        both(lab).unwrap();
        assert!(lab.is_planted(Pa(0x6010)));
    };
    fails_cleanly(added, |lab| lab.session.remove(TapId(0)));
    fails_cleanly(added, |lab| lab.session.disable(TapId(1)));
    fails_cleanly(added, |lab| lab.session.create_view(MemoryAccess::RWX).map(drop));
}
