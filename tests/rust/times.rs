//! The times that hits are said to have held their vCPUs, on the mock driver: each its own.

use std::time::{Duration, Instant};

use arrow_array::cast::AsArray;
use arrow_array::types::UInt64Type;
use vmitap::capture::{Abi, Column, Node, Plan, Program, Source};
use vmitap::driver::mock::{CallKind, MockDriver};
use vmitap::session::{Histogram, Limits, Poll, Session, TapKind, TapSpec};
use vmitap::tap::OnWrite;
use vmitap::{MemoryAccess, Pa, Va, VmiError};

use super::session::{CODE, CODE_PA, access, int3, session, spec};

fn poll(session: &mut Session<MockDriver>) -> Result<Poll, VmiError> {
    session.poll(&Limits { deadline: Some(Instant::now() + Duration::from_secs(1)), hits: None })
}

/// Longer than any of these hits takes, and than a test that runs slowly makes of it.
const LONG: Duration = Duration::from_millis(300);

#[test]
fn the_time_of_a_hit_whose_answer_failed_is_not_that_of_the_next() {
    for captures in [false, true] {
        let (mut session, context) = session(1);
        let tap = session.add(&TapSpec { wanted: false, ..spec(&session, context, CODE) }).unwrap();
        if captures {
            let program = Program::compile(&[Node::Argument(0)], Abi::SystemV).unwrap();
            let column = Column { name: "first".to_owned(), source: Source::Number { program, bytes: 8 } };
            session.set_capture(tap, Plan::new(vec![column]).unwrap(), None, "code").unwrap();
        }
        let view = session.tap_view();
        session.vmi_mut().driver_mut().push_event(int3(view, context, CODE, CODE_PA));
        session.vmi_mut().driver_mut().fail_nth_of(CallKind::Respond, 1);
        assert!(matches!(poll(&mut session), Err(VmiError::Driver { .. })));
        std::thread::sleep(LONG);
        session.vmi_mut().driver_mut().push_event(int3(view, context, CODE, CODE_PA));
        assert!(matches!(poll(&mut session).unwrap(), Poll::Idle));
        assert_eq!(session.tap_stats(tap).hits, 2);
        assert!(session.holds().max_ns() < LONG.as_nanos() as u64, "{} ns", session.holds().max_ns());
        let (_, batches) = session.recorded().unwrap();
        let holds: Vec<u64> = batches
            .iter()
            .flat_map(|batch| batch.column_by_name("hold_ns").unwrap().as_primitive::<UInt64Type>().values().to_vec())
            .collect();
        assert_eq!(holds.len(), if captures { 2 } else { 0 });
        assert!(holds.iter().all(|hold| *hold < LONG.as_nanos() as u64), "{holds:?}");
    }
}

#[test]
fn the_time_of_a_question_is_not_that_of_the_next_hit() {
    let (mut session, context) = session(1);
    let under = TapSpec { on_write: Some(OnWrite::Ask), wanted: false, ..spec(&session, context, Va(CODE.0 + 3)) };
    let under = session.add(&under).unwrap();
    // Only counted: it is timed, and then somebody is asked.
    let kind = TapKind::Watch { len: 16, access: MemoryAccess::W };
    session.add(&TapSpec { kind, wanted: false, ..spec(&session, context, CODE) }).unwrap();
    let store = access(session.tap_view(), context, CODE_PA, CODE, MemoryAccess::W, 8);
    session.vmi_mut().driver_mut().push_event(store);
    assert!(matches!(poll(&mut session).unwrap(), Poll::Hit(hit) if hit.ask));
    std::thread::sleep(LONG);
    session.answer_write(OnWrite::Reapply).unwrap();
    let view = session.tap_view();
    session.vmi_mut().driver_mut().push_event(int3(view, context, Va(CODE.0 + 3), Pa(CODE_PA.0 + 3)));
    assert!(matches!(poll(&mut session).unwrap(), Poll::Idle));
    assert_eq!(session.tap_stats(under).hits, 1);
    let longest = session.tap_holds(under).map_or(0, Histogram::max_ns);
    assert!(longest < LONG.as_nanos() as u64, "{longest} ns");
}
