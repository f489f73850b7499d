//! The ring: exactly one response for each request, whatever is in it.

use std::sync::Arc;
use std::time::Duration;

use loom::sync::atomic::{AtomicU32, Ordering};
use proptest::prelude::*;
use vmitap::arch::amd64::ControlRegister;
use vmitap::driver::xen::ring::{Ring, RingPage};
use vmitap::driver::xen::{Layout, MAX_EVENT};
use vmitap::driver::{Monitor, VmiEvents, Wait};
use vmitap::event::{DescriptorRegister, EventAction, EventReason, VmiEventResponse};
use vmitap::{VcpuId, VmiError};
use xen_sys::Mapping;
use xen_sys::fake::{Kind, Reg};
use xen_sys::types::RingHead;

use super::{EMULATE, FAST, INSN_DATA, NOWRITE, PAUSED, attach, guest, is_untouched, tapped};

#[test]
fn every_kind_of_request_gets_exactly_one_answer_that_echoes_it() {
    for kind in Kind::ALL {
        let fake = guest(kind);
        let mut driver = attach(&fake);
        for reason in 0..40 {
            fake.push(0, reason, 1);
            if let Wait::Event(event) = driver.wait(Duration::ZERO).unwrap() {
                driver.respond(event.vcpu, &vmitap::event::VmiEventResponse::CONTINUE).unwrap();
            }
            let answers = fake.answers();
            assert_eq!(answers.len(), reason as usize + 1, "reason {reason}");
            let answer = answers.last().unwrap();
            // An access to a port is answered as one to a descriptor table, and everything else as what it is.
            let echoed = if reason == 16 { 13 } else { reason };
            assert_eq!((answer.version, answer.reason, answer.vcpu), (kind.vm_event, echoed, 0));
            assert_eq!(answer.flags & PAUSED, PAUSED, "reason {reason}");
            assert_eq!(fake.state("held", 0), 0, "reason {reason}");
        }
        assert_eq!(fake.state("owed", 0), 0);
    }
}

#[test]
fn a_request_that_holds_nobody_is_answered_and_not_handed_out() {
    let fake = guest(Kind::ALL[1]);
    let mut driver = attach(&fake);
    fake.push(0, 6, 0);
    assert_eq!(driver.wait(Duration::ZERO).unwrap(), Wait::Timeout);
    assert_eq!((fake.answers().len(), fake.answers()[0].flags & PAUSED), (1, 0));
}

#[test]
fn a_request_of_another_version_is_answered_in_that_version_and_changes_nothing() {
    let fake = guest(Kind::ALL[1]);
    let mut driver = attach(&fake);
    fake.set("version", 9);
    fake.push(0, 6, 1);
    assert_eq!(driver.wait(Duration::ZERO).unwrap(), Wait::Timeout);
    assert_eq!(fake.answers()[0].version, 9);
}

#[test]
fn an_event_is_answered_once_and_only_after_it_was_handed_out() {
    let mut lab = tapped(Kind::ALL[1], &[0x90, 0x90]);
    let none = lab.vmi.driver_mut().respond(VcpuId(0), &vmitap::event::VmiEventResponse::CONTINUE);
    assert!(matches!(none, Err(VmiError::NoPendingEvent { .. })));
    lab.fake.run(0, 1);
    lab.event();
    lab.step();
    let twice = lab.vmi.driver_mut().respond(VcpuId(0), &vmitap::event::VmiEventResponse::CONTINUE);
    assert!(matches!(twice, Err(VmiError::NoPendingEvent { .. })));
    assert_eq!(lab.fake.answers().len(), 1);
}

#[test]
fn an_answer_that_does_not_fit_leaves_the_event_unanswered() {
    let mut lab = tapped(Kind::ALL[1], &[0x90]);
    lab.fake.run(0, 1);
    lab.event();
    for action in [EventAction::Emulate, EventAction::Deny] {
        let refused = lab.vmi.driver_mut().respond(VcpuId(0), &vmitap::event::VmiEventResponse::action(action));
        assert!(matches!(refused, Err(VmiError::InvalidArgument { .. })), "{refused:?}");
    }
    let no_view = vmitap::event::VmiEventResponse::CONTINUE.in_view(vmitap::View(9));
    assert!(matches!(lab.vmi.driver_mut().respond(VcpuId(0), &no_view), Err(VmiError::ViewNotFound { .. })));
    assert_eq!(lab.fake.answers(), []);
    lab.step();
    assert_eq!(lab.fake.answers().len(), 1);
}

#[test]
fn registers_of_both_versions_are_read_and_written_where_they_are() {
    for kind in Kind::ALL {
        let mut lab = tapped(kind, &[0x90]);
        lab.fake.set_reg(0, Reg::R15, 0x1515);
        lab.fake.set_reg(0, Reg::Rflags, 0x202);
        lab.fake.run(0, 1);
        let event = lab.event();
        assert_eq!((event.registers.gp.r15, event.registers.gp.rflags, event.registers.gp.rip), (0x1515, 0x202, super::CODE));
        assert_eq!((event.registers.efer, event.registers.cs.attributes), (0x500, 0xa09b));
        let gp = vmitap::arch::amd64::GpRegisters { r15: 7, rip: 0x9000, rax: 1, ..event.registers.gp };
        let response = vmitap::event::VmiEventResponse { registers: Some(gp), ..vmitap::event::VmiEventResponse::CONTINUE };
        lab.vmi.driver_mut().respond(VcpuId(0), &response).unwrap();
        let found = [Reg::R15, Reg::Rip, Reg::Rax, Reg::Rflags].map(|register| lab.fake.reg(0, register));
        assert_eq!(found, [7, 0x9000, 1, 0x202]);
    }
}

#[test]
fn a_producer_that_cannot_be_is_an_error_and_nothing_is_read() {
    let fake = guest(Kind::ALL[1]);
    let mut driver = attach(&fake);
    fake.ring(100);
    assert!(matches!(driver.wait(Duration::ZERO), Err(VmiError::Driver { .. })));
    assert!(matches!(driver.wait(Duration::ZERO), Err(VmiError::DomainGone { .. })));
    assert_eq!(fake.answers(), []);
    drop(driver);
    is_untouched(&fake);
}

/// A request of which anything may be anything.
fn requests() -> impl Strategy<Value = [u8; MAX_EVENT]> {
    let version = prop_oneof![4 => Just(7_u32), 1 => any::<u32>()];
    let reason = prop_oneof![8 => 0_u32..20, 1 => any::<u32>()];
    let vcpu = prop_oneof![4 => 0_u32..2, 1 => any::<u32>()];
    let rest = proptest::collection::vec(any::<u8>(), MAX_EVENT);
    (version, any::<u32>(), reason, vcpu, rest).prop_map(|(version, flags, reason, vcpu, rest)| {
        let mut bytes: [u8; MAX_EVENT] = rest.try_into().unwrap();
        for (at, value) in [(0, version), (4, flags), (8, reason), (12, vcpu)] {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    })
}

fn layouts() -> impl Strategy<Value = Layout> {
    prop_oneof![Just(Layout::V6), Just(Layout::V7)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// One answer for each, and the driver lives.
    #[test]
    fn requests_of_any_content_get_one_answer_each(list in proptest::collection::vec(requests(), 1..20)) {
        let fake = guest(Kind::ALL[1]);
        fake.set("vcpus", 2);
        let mut driver = attach(&fake);
        for (index, request) in list.iter().enumerate() {
            fake.push_raw(request);
            if let Wait::Event(event) = driver.wait(Duration::ZERO).unwrap() {
                // Whatever is asked of it, it is answered in the end.
                let step = EventAction::FastSingleStep { view: vmitap::View::DEFAULT };
                for action in [EventAction::Deny, EventAction::Emulate, step, EventAction::Continue] {
                    let response = vmitap::event::VmiEventResponse::action(action);
                    if driver.respond(event.vcpu, &response).is_ok() {
                        break;
                    }
                }
            }
            let answers = fake.answers();
            prop_assert_eq!(answers.len(), index + 1);
            let (answer, word) = (answers[index], |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().unwrap()));
            prop_assert_eq!((answer.version, answer.vcpu), (word(0), word(12)));
            prop_assert_eq!(answer.flags & PAUSED, word(4) & PAUSED);
            // What the reasons share, too; a fast step has the view to come back to there.
            if answer.flags & FAST == 0 {
                let asked = [24, 32, 40, 48].map(|at| u64::from_le_bytes(request[at..at + 8].try_into().unwrap()));
                prop_assert_eq!(answer.u, asked);
            }
        }
        prop_assert_eq!(fake.state("owed", 0), 0);
        drop(driver);
        prop_assert_eq!(fake.state("listening", 0), 0);
    }

    /// Anything may be in the page, and any index at any time.
    #[test]
    fn no_content_of_the_page_makes_the_ring_answer_what_was_not_asked(
        layout in layouts(),
        bytes in proptest::collection::vec(any::<u8>(), 4096),
        producers in proptest::collection::vec(prop_oneof![0_u32..20, any::<u32>()], 1..40),
    ) {
        let page = Mapping::private(1).unwrap();
        page.write(0, &bytes).unwrap();
        let mut ring = Ring::new(page, layout);
        let mut open = 0_u32;
        for producer in producers {
            ring.page().store(0, producer).unwrap();
            while let Ok(Some(request)) = ring.take() {
                prop_assert_eq!(request.len(), MAX_EVENT);
                open += 1;
                prop_assert!(open <= layout.slots());
                if request[0] & 1 == 0 {
                    prop_assert!(ring.answer(&request));
                    open -= 1;
                }
            }
            prop_assert_eq!(ring.unanswered(), open);
        }
        for _ in 0..open {
            prop_assert!(ring.answer(&[0; MAX_EVENT]));
        }
        prop_assert!(!ring.answer(&[0; MAX_EVENT]));
    }
}

#[test]
fn a_descriptor_table_that_is_loaded_is_told_and_the_emulator_executes_it() {
    for kind in Kind::ALL {
        let mut lab = tapped(kind, &[0x90, 0x90]);
        lab.vmi.driver_mut().monitor(Monitor::DescriptorAccess, true).unwrap();
        for (number, register) in [
            (1, DescriptorRegister::Idtr),
            (2, DescriptorRegister::Gdtr),
            (3, DescriptorRegister::Ldtr),
            (4, DescriptorRegister::Tr),
        ] {
            let mut event = [0; MAX_EVENT];
            for (at, value) in [(0, kind.vm_event), (4, PAUSED), (8, 13)] {
                event[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
            // The descriptor, and that it is written.
            event[24 + 16..24 + 18].copy_from_slice(&[number, 1]);
            lab.fake.push_raw(&event);
            let told = lab.event();
            assert_eq!(told.reason, EventReason::DescriptorAccess { register, is_load: true });
            let denied = lab.vmi.driver_mut().respond(told.vcpu, &VmiEventResponse::action(EventAction::Deny));
            assert!(matches!(denied, Err(VmiError::InvalidArgument { .. })), "a load cannot be left out: {denied:?}");
            lab.vmi.driver_mut().respond(told.vcpu, &VmiEventResponse::CONTINUE).unwrap();
            let answer = lab.last_answer();
            assert_eq!((answer.reason, answer.flags & (EMULATE | NOWRITE | INSN_DATA)), (13, EMULATE));
        }
        lab.vmi.driver_mut().monitor(Monitor::DescriptorAccess, false).unwrap();
    }
}

#[test]
fn an_access_to_a_port_is_told_and_the_emulator_executes_it_where_xen_can_tell_of_it() {
    for kind in Kind::ALL {
        let mut lab = tapped(kind, &[0x90, 0x90]);
        let before = lab.fake.state("monitors", 0);
        let monitored = lab.vmi.driver_mut().monitor(Monitor::PortIo, true);
        if kind.minor < 18 {
            assert!(matches!(monitored, Err(VmiError::NotSupported { .. })), "4.{}: {monitored:?}", kind.minor);
            continue;
        }
        monitored.unwrap();
        let mut event = [0; MAX_EVENT];
        for (at, value) in [(0, kind.vm_event), (4, PAUSED), (8, 16), (24, 2), (28, 0x3f8)] {
            event[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        // It is read, to memory.
        event[24 + 6..24 + 8].copy_from_slice(&[1, 1]);
        lab.fake.push_raw(&event);
        let told = lab.event();
        assert_eq!(told.reason, EventReason::PortIo { port: 0x3f8, bytes: 2, is_read: true, is_string: true });
        let denied = lab.vmi.driver_mut().respond(told.vcpu, &VmiEventResponse::action(EventAction::Deny));
        assert!(matches!(denied, Err(VmiError::InvalidArgument { .. })), "{denied:?}");
        lab.vmi.driver_mut().respond(told.vcpu, &VmiEventResponse::CONTINUE).unwrap();
        let answer = lab.last_answer();
        // As for a descriptor table: the emulator is not asked for ports.
        assert_eq!((answer.reason, answer.flags & (EMULATE | NOWRITE | INSN_DATA)), (13, EMULATE));
        lab.vmi.driver_mut().monitor(Monitor::PortIo, false).unwrap();
        assert_eq!(lab.fake.state("monitors", 0), before);
    }
}

#[test]
fn a_debug_exception_of_the_guest_is_told_and_injected_unless_it_is_denied() {
    for kind in Kind::ALL {
        let mut lab = tapped(kind, &[0x90, 0x90]);
        let before = lab.fake.state("monitors", 0);
        lab.vmi.driver_mut().monitor(Monitor::Debug, true).unwrap();
        for (action, injected) in
            [(EventAction::Continue, 1), (EventAction::Deny, 1), (EventAction::FastSingleStep { view: vmitap::View::DEFAULT }, 2)]
        {
            lab.fake.push(0, 9, 1);
            let told = lab.event();
            assert_eq!(told.reason, EventReason::DebugException { pending: 0 });
            lab.vmi.driver_mut().respond(told.vcpu, &VmiEventResponse::action(action)).unwrap();
            assert_eq!(lab.fake.calls("xendevicemodel_inject_event"), injected, "{action:?}");
            assert_eq!(lab.fake.state("held", 0), 0);
        }
        lab.vmi.driver_mut().monitor(Monitor::Debug, false).unwrap();
        assert_eq!(lab.fake.state("monitors", 0), before);
    }
}

#[test]
fn a_request_of_the_guest_is_told_and_answered() {
    let mut lab = tapped(Kind::ALL[1], &[0x90]);
    lab.vmi.driver_mut().monitor(Monitor::GuestRequest, true).unwrap();
    lab.fake.push(0, 8, 1);
    let told = lab.event();
    assert_eq!(told.reason, EventReason::GuestRequest);
    lab.vmi.driver_mut().respond(told.vcpu, &VmiEventResponse::CONTINUE).unwrap();
    assert_eq!(lab.fake.state("held", 0), 0);
}

#[test]
fn bits_of_a_control_register_that_do_not_matter_are_left_out_by_xen() {
    let fake = guest(Kind::ALL[1]);
    let mut driver = attach(&fake);
    driver.ignore_bits(ControlRegister::Cr4, 1 << 7);
    driver.monitor(Monitor::ControlRegister(ControlRegister::Cr4), true).unwrap();
    assert_eq!(fake.state("ignored", 0), 1 << 7);
    driver.monitor(Monitor::ControlRegister(ControlRegister::Cr4), false).unwrap();
    driver.monitor(Monitor::ControlRegister(ControlRegister::Cr3), true).unwrap();
    assert_eq!(fake.state("ignored", 0), 0, "of one register only");
}

/// The other side of a ring, as Xen is: puts requests in, and takes an answer before its slot is used again.
fn produce(page: &Mapping, layout: Layout, requests: u32) {
    let head = size_of::<RingHead>();
    let slot = |index: u32| head + (index & (layout.slots() - 1)) as usize * layout.size;
    let (mut put, mut answered) = (0_u32, 0_u32);
    while answered < requests {
        if put < requests && put - answered < layout.slots() {
            page.write(slot(put), &vec![put as u8; layout.size]).unwrap();
            put += 1;
            page.store(0, put).unwrap();
            continue;
        }
        if page.load(8).unwrap() == answered {
            std::thread::yield_now();
            continue;
        }
        let mut answer = vec![0; layout.size];
        page.read(slot(answered), &mut answer).unwrap();
        assert!(answer.iter().all(|byte| *byte == !(answered as u8)), "answer {answered} is whole");
        answered += 1;
    }
}

/// Run under Miri too, which tells a race where the hardware happens to forgive one: `make miri`.
#[test]
fn between_two_threads_no_request_is_lost_and_nothing_is_seen_before_it_is_whole() {
    let requests = if cfg!(miri) { 60 } else { 100_000 };
    for layout in [Layout::V6, Layout::V7] {
        let page = Mapping::private(1).unwrap();
        let xen = page.twin().unwrap();
        let mut ring = Ring::new(page, layout);
        let producer = std::thread::spawn(move || produce(&xen, layout, requests));
        let mut taken = 0_u32;
        while taken < requests {
            let Some(request) = ring.take().unwrap() else {
                std::thread::yield_now();
                continue;
            };
            let (bytes, rest) = request.split_at(layout.size);
            assert!(
                bytes.iter().all(|byte| *byte == taken as u8) && rest.iter().all(|byte| *byte == 0),
                "request {taken} is whole"
            );
            assert!(ring.answer(&[!(taken as u8); MAX_EVENT]));
            taken += 1;
        }
        producer.join().unwrap();
        assert_eq!((ring.take(), ring.unanswered()), (Ok(None), 0));
    }
}

/// A ring's page whose indices and slots are words of loom's, so that every order of accesses that the memory model allows is tried. A slot
/// is the one number that all its bytes are.
struct Words {
    indices: [AtomicU32; 4],
    slots: Vec<AtomicU32>,
    layout: Layout,
    /// How an index is stored.
    release: Ordering,
}

impl Words {
    fn slot(&self, offset: usize) -> Option<&AtomicU32> {
        self.slots.get((offset - size_of::<RingHead>()) / self.layout.size)
    }
}

#[derive(Clone)]
struct Modelled(Arc<Words>);

impl RingPage for Modelled {
    fn load(&self, offset: usize) -> Option<u32> {
        Some(self.0.indices.get(offset / 4)?.load(Ordering::Acquire))
    }

    fn store(&self, offset: usize, value: u32) -> Option<()> {
        self.0.indices.get(offset / 4)?.store(value, self.0.release);
        Some(())
    }

    // The bytes of a slot are plain memory: nothing orders them but the indices.
    fn read(&self, offset: usize, buf: &mut [u8]) -> Option<()> {
        buf.fill(self.0.slot(offset)?.load(Ordering::Relaxed) as u8);
        Some(())
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> Option<()> {
        self.0.slot(offset)?.store(bytes[0].into(), Ordering::Relaxed);
        Some(())
    }
}

/// Every order in which Xen puts two requests in and takes two answers while we take and answer them.
fn in_every_order(release: Ordering) {
    const REQUESTS: u32 = 2;
    loom::model(move || {
        let layout = Layout::V7;
        let word = || AtomicU32::new(0);
        let slots = (0..layout.slots()).map(|_| word()).collect();
        let words = Words { indices: std::array::from_fn(|_| word()), slots, layout, release };
        let page = Modelled(Arc::new(words));
        let mut ring = Ring::new(page.clone(), layout);
        let xen = loom::thread::spawn(move || {
            for put in 0..REQUESTS {
                page.0.slots[put as usize].store(put + 1, Ordering::Relaxed);
                page.0.indices[0].store(put + 1, Ordering::Release);
            }
            for answered in 0..REQUESTS {
                while page.0.indices[2].load(Ordering::Acquire) <= answered {
                    loom::thread::yield_now();
                }
                assert_eq!(page.0.slots[answered as usize].load(Ordering::Relaxed), 100 + answered, "an answer that is whole");
            }
        });
        for taken in 0..REQUESTS {
            let request = loop {
                match ring.take().unwrap() {
                    Some(request) => break request,
                    None => loom::thread::yield_now(),
                }
            };
            assert_eq!(u32::from(request[0]), taken + 1, "a request that is whole");
            assert!(ring.answer(&[100 + taken as u8; MAX_EVENT]));
        }
        xen.join().unwrap();
        assert_eq!((ring.take(), ring.unanswered()), (Ok(None), 0));
    });
}

#[test]
fn in_every_order_of_both_ends_requests_and_answers_are_whole_and_none_is_lost() {
    in_every_order(Ordering::Release);
}

#[test]
#[should_panic(expected = "an answer that is whole")]
fn with_a_store_that_orders_nothing_some_order_shows_an_answer_that_is_not_whole() {
    in_every_order(Ordering::Relaxed);
}
