//! Who owes an answer to which event of a vCPU: one answer an event, in every order of the threads that answer and the one that waits.

use std::time::Duration;

use loom::sync::{Arc, Mutex};
use vmitap::driver::Wait;
use vmitap::driver::mock::MockDriver;
use vmitap::error::Result;
use vmitap::event::VmiEventResponse;
use vmitap::session::{Session, Unanswered};
use vmitap::{VcpuId, View, VmiError};

use crate::session::{CODE, CODE_PA, int3, session};

const VCPU: VcpuId = VcpuId(0);

/// One vCPU that raises an event, and the next once that is answered.
struct Guest {
    unanswered: Unanswered,
    raised: u64,
    is_held: bool,
    answered: Vec<u64>,
}

impl Guest {
    fn wait(&mut self) -> Option<u64> {
        if self.is_held {
            return None;
        }
        self.is_held = true;
        self.raised += 1;
        Some(self.unanswered.open(VCPU, View::DEFAULT))
    }

    /// What a driver does: answers whatever the vCPU is held for.
    fn settle(&mut self, number: u64) -> Result<()> {
        let Self { unanswered, raised, is_held, answered } = self;
        unanswered.settle(VCPU, number, || {
            *is_held = false;
            answered.push(*raised);
            Ok(())
        })
    }
}

type Respond = fn(&Mutex<Guest>, u64) -> Result<()>;

/// Two threads answer the first event while a third waits for the next and answers that.
fn in_every_order(respond: Respond) {
    loom::model(move || {
        let unanswered = Unanswered::new(1);
        let guest = Arc::new(Mutex::new(Guest { unanswered, raised: 0, is_held: false, answered: Vec::new() }));
        let first = guest.lock().unwrap().wait().unwrap();
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let guest = guest.clone();
                loom::thread::spawn(move || respond(&guest, first).is_ok())
            })
            .collect();
        let next = loop {
            let waited = guest.lock().unwrap().wait();
            match waited {
                Some(next) => break next,
                None => loom::thread::yield_now(),
            }
        };
        assert_eq!(respond(&guest, next).ok(), Some(()), "the next event is there to be answered");
        let answers = threads.into_iter().map(|thread| thread.join().unwrap()).filter(|is_answer| *is_answer).count();
        assert_eq!(answers, 1, "one of two answers counts");
        let guest = guest.lock().unwrap();
        assert_eq!((guest.answered.as_slice(), guest.is_held), ([1, 2].as_slice(), false));
        assert_eq!(guest.unanswered.number(VCPU), None);
    });
}

#[test]
fn in_every_order_each_event_gets_one_answer_and_none_is_struck_off_by_another() {
    in_every_order(|guest, number| guest.lock().unwrap().settle(number));
}

#[test]
#[should_panic(expected = "the next event is there to be answered")]
fn with_a_look_at_the_number_before_the_lock_some_order_answers_the_next_event_too() {
    in_every_order(|guest, number| {
        let now = guest.lock().unwrap().unanswered.number(VCPU);
        if now != Some(number) {
            return Err(VmiError::NoPendingEvent { vcpu: VCPU });
        }
        let mut guest = guest.lock().unwrap();
        let now = guest.unanswered.number(VCPU).unwrap_or_default();
        guest.settle(now)
    });
}

#[test]
fn an_answer_that_fails_leaves_the_event_open_and_a_late_one_does_not_touch_the_next() {
    let mut unanswered = Unanswered::new(2);
    let first = unanswered.open(VCPU, View(1));
    let failed = unanswered.settle(VCPU, first, || Err(VmiError::ViewNotFound { view: View(9) }));
    assert!(matches!(failed, Err(VmiError::ViewNotFound { .. })));
    assert_eq!(unanswered.number(VCPU), Some(first));
    unanswered.settle(VCPU, first, || Ok(())).unwrap();
    let next = unanswered.open(VCPU, View(1));
    let late = unanswered.settle(VCPU, first, || panic!("the next event is answered"));
    assert!(matches!(late, Err(VmiError::NoPendingEvent { vcpu: VCPU })));
    assert_eq!(unanswered.number(VCPU), Some(next));
    let elsewhere = unanswered.settle(VcpuId(7), next, || panic!("there is no such vCPU"));
    assert!(matches!(elsewhere, Err(VmiError::NoPendingEvent { vcpu: VcpuId(7) })));
}

/// The number of the next event.
fn raised(session: &mut Session<MockDriver>) -> u64 {
    match session.wait_raw(Duration::ZERO).unwrap() {
        Wait::Event(event) => session.raw_number(event.vcpu).unwrap(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_second_answer_to_an_event_of_a_session_does_not_reach_the_next() {
    let (mut session, context) = session(1);
    let view = session.tap_view();
    for _ in 0..2 {
        session.vmi_mut().driver_mut().push_event(int3(view, context, CODE, CODE_PA));
    }
    let first = raised(&mut session);
    session.respond_raw(VCPU, first, &VmiEventResponse::CONTINUE).unwrap();
    let next = raised(&mut session);
    let late = session.respond_raw(VCPU, first, &VmiEventResponse::CONTINUE);
    assert!(matches!(late, Err(VmiError::NoPendingEvent { vcpu: VCPU })), "{late:?}");
    assert_eq!(session.vmi().driver().answers().len(), 1);
    session.respond_raw(VCPU, next, &VmiEventResponse::CONTINUE).unwrap();
    assert_eq!(session.vmi().driver().answers().len(), 2);
}
