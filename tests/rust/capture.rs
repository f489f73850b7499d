//! Captures on the mock driver: what is in a row, which rows there are, and what becomes of them.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::cast::AsArray;
use arrow_array::types::{Int32Type, UInt8Type, UInt16Type, UInt64Type};
use arrow_array::{Array, RecordBatch};
use arrow_schema::DataType;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use vmitap::arch::amd64::{AddressContext, Register, Registers, pte};
use vmitap::capture::{Abi, Column, Format, Node, Plan, Program, Source};
use vmitap::driver::mock::{MockDriver, PageSize};
use vmitap::event::{EventReason, VmiEvent};
use vmitap::session::{Histogram, Limits, Poll, Session, TapId, TapKind, TapSpec, TapState, WAITING};
use vmitap::tap::OnWrite;
use vmitap::{Pa, Va, VcpuId, VmiError};

use crate::lines::{listen, logged};

const CODE: Va = Va(0x40_0000);
const CODE_PA: Pa = Pa(0x5000);
const STACK: u64 = 0x50_0000;
const STACK_PA: Pa = Pa(0x7000);
const DATA: u64 = 0x60_0000;
/// Where calls of these tests return to.
const BACK: Va = Va(CODE.0 + 0x800);

struct Tapped {
    session: Session<MockDriver>,
    context: AddressContext,
    tap: TapId,
}

fn tapped() -> Tapped {
    let mut driver = MockDriver::new(0x40000, 2);
    let context = driver.new_root(4).unwrap();
    for (va, pa) in [
        (CODE, CODE_PA),
        (Va(STACK), STACK_PA),
        (Va(DATA), Pa(0x9000)),
        (Va(DATA + 0x1000), Pa(0x3000)),
        (Va(CODE.0 + 0x1000), Pa(0xa000)),
    ] {
        driver.map(context, va, pa, PageSize::Size4K, pte::P | pte::W).unwrap();
    }
    driver.poke(CODE_PA, &[0x90; 0x1000]).unwrap();
    let mut session = Session::new(Box::new(driver), OnWrite::Reapply).unwrap();
    let spec = TapSpec {
        kind: TapKind::Breakpoint,
        va: CODE,
        context,
        global: true,
        view: session.tap_view(),
        on_write: None,
        key: None,
        wanted: false,
        enabled: true,
    };
    let tap = session.add(&spec).unwrap();
    Tapped { session, context, tap }
}

impl Tapped {
    fn poke(&mut self, pa: Pa, bytes: &[u8]) {
        self.session.vmi_mut().driver_mut().poke(pa, bytes).unwrap();
    }

    fn event(&mut self, vcpu: u16, rip: Va, set: impl FnOnce(&mut Registers)) {
        let mut registers = Registers { cr3: self.context.root.0, ..Registers::default() };
        registers.gp.rsp = STACK + 0x800;
        set(&mut registers);
        registers.gp.rip = rip.0;
        let reason = EventReason::Breakpoint { gfn: CODE_PA.gfn(), insn_len: 1 };
        let event = VmiEvent { vcpu: VcpuId(vcpu), view: Some(self.session.tap_view()), registers, reason };
        self.session.vmi_mut().driver_mut().push_event(event);
    }

    /// The function is entered with that argument, or returns with that result, with the stack pointer so far below the top.
    fn enter(&mut self, vcpu: u16, depth: u64, argument: u64) {
        self.poke(Pa(STACK_PA.0 + 0x800 - depth), &BACK.0.to_le_bytes());
        self.event(vcpu, CODE, |registers| {
            registers.gp.rsp = STACK + 0x800 - depth;
            registers.gp.rdi = argument;
        });
    }

    fn leave(&mut self, vcpu: u16, depth: u64, result: u64) {
        self.event(vcpu, BACK, |registers| {
            registers.gp.rsp = STACK + 0x808 - depth;
            registers.gp.rax = result;
        });
    }

    /// To the end of what was scripted. A poll comes back now and then before it, on a busy machine also here.
    fn run(&mut self) -> vmitap::Result<Poll> {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let poll = self.session.poll(&Limits { deadline: Some(end), hits: None });
            if !matches!(poll, Ok(Poll::Timeout)) || Instant::now() >= end {
                return poll;
            }
        }
    }

    /// Every row is in the file, in memory, or counted as lost.
    #[track_caller]
    fn accounts(&self, in_file: u64) {
        let recording = self.session.recording();
        let (rows, lost, kept) = (recording.rows(), recording.lost(), recording.len() as u64);
        assert_eq!(rows, in_file + lost + kept, "{in_file} in the file, {lost} lost, {kept} in memory");
    }

    fn rows(&mut self) -> RecordBatch {
        let (schema, batches) = self.session.recorded().unwrap();
        arrow_select_all(&schema, &batches)
    }
}

/// One batch of them all.
fn arrow_select_all(schema: &arrow_schema::SchemaRef, batches: &[RecordBatch]) -> RecordBatch {
    match batches {
        [] => RecordBatch::new_empty(schema.clone()),
        [one] => one.clone(),
        more => panic!("{} batches", more.len()),
    }
}

fn argument(index: u8) -> Program {
    Program::compile(&[Node::Argument(index)], Abi::SystemV).unwrap()
}

fn register(name: &str) -> Program {
    Program::compile(&[Node::Register(Register::named(name).unwrap())], Abi::SystemV).unwrap()
}

fn column(name: &str, source: Source) -> Column {
    Column { name: name.to_owned(), source }
}

fn number(name: &str, program: Program) -> Column {
    column(name, Source::Number { program, bytes: 8 })
}

fn plan(columns: Vec<Column>) -> Plan {
    Plan::new(columns).unwrap()
}

fn words(batch: &RecordBatch, name: &str) -> Vec<Option<u64>> {
    batch.column_by_name(name).unwrap().as_primitive::<UInt64Type>().iter().collect()
}

#[test]
fn every_kind_of_column_is_read_and_what_is_not_mapped_is_missing() {
    let mut guest = tapped();
    let signed = [Node::Argument(0), Node::Cast { bits: 32, signed: true }];
    let columns = vec![
        column("byte", Source::Number { program: argument(0), bytes: 1 }),
        column("signed", Source::Number { program: Program::compile(&signed, Abi::SystemV).unwrap(), bytes: 4 }),
        column("bytes", Source::Bytes { at: argument(1), len: 4 }),
        column("text", Source::Cstr { at: argument(1), max: 8 }),
        column("wide", Source::Utf16 { at: argument(2), max: 16 }),
        column("callers", Source::Backtrace { depth: 4 }),
    ];
    let tap = guest.tap;
    guest.session.set_capture(tap, plan(columns), None, "f").unwrap();
    guest.poke(Pa(0x9000), b"a\xffb\0");
    guest.poke(Pa(0x9100), b"longer than eight");
    // Across two pages, the last unit cut in two, and a lone surrogate in it.
    guest.poke(Pa(0x9fff), b"h");
    guest.poke(Pa(0x3000), b"\0\x00\xd8i\0\0\0");
    // Two sound frames, then one that points below itself.
    for (place, value) in [(0x800, 0x1111), (0x900, STACK + 0x980), (0x908, 0x2222), (0x980, STACK), (0x988, 0x3333_u64)] {
        guest.poke(Pa(STACK_PA.0 + place), &value.to_le_bytes());
    }
    guest.event(0, CODE, |registers| {
        let gp = &mut registers.gp;
        (gp.rdi, gp.rsi, gp.rdx, gp.rbp) = (0xffff_fffe, DATA, DATA + 0xfff, STACK + 0x900);
    });
    guest.event(1, CODE, |registers| (registers.gp.rdi, registers.gp.rsi, registers.gp.rdx) = (5, DATA + 0x100, DATA + 0x2000));
    guest.event(0, CODE, |registers| (registers.gp.rdi, registers.gp.rsi, registers.gp.rsp) = (6, DATA + 0x1fff, 8));
    assert!(matches!(guest.run(), Ok(Poll::Idle)));
    let rows = guest.rows();
    let get = |name: &str| rows.column_by_name(name).unwrap();
    assert_eq!(get("byte").as_primitive::<UInt8Type>().values(), &[0xfe, 5, 6]);
    assert_eq!(get("signed").as_primitive::<Int32Type>().values(), &[-2, 5, 6]);
    let bytes: Vec<_> = get("bytes").as_binary::<i32>().iter().collect();
    assert_eq!(bytes, [Some(&b"a\xffb\0"[..]), Some(b"long"), None]);
    let text: Vec<_> = get("text").as_string::<i32>().iter().collect();
    assert_eq!(text, [Some("a\\xffb"), Some("longer t"), Some("")]);
    let wide: Vec<_> = get("wide").as_string::<i32>().iter().collect();
    assert_eq!(wide, [Some("h\u{fffd}i"), None, None]);
    let callers: Vec<Vec<u64>> =
        get("callers").as_list::<i32>().iter().map(|list| list.unwrap().as_primitive::<UInt64Type>().values().to_vec()).collect();
    assert_eq!(callers, [vec![0x1111, 0x2222, 0x3333], vec![0x1111], vec![]]);
    assert_eq!(get("vcpu").as_primitive::<UInt16Type>().values(), &[0, 1, 0]);
    assert_eq!(words(&rows, "address"), [Some(CODE.0); 3]);
    assert_eq!(words(&rows, "root"), [Some(guest.context.root.0); 3]);
    let (times, holds) = (words(&rows, "time_ns"), words(&rows, "hold_ns"));
    assert!(times.is_sorted() && holds.iter().all(|hold| *hold > Some(0)), "{times:?} {holds:?}");
    let symbols = get("symbol").as_dictionary::<Int32Type>();
    assert_eq!(symbols.values().as_string::<i32>().value(symbols.key(2).unwrap()), "f");
}

#[test]
fn filtered_hits_leave_no_row_and_two_taps_share_a_recording() {
    let mut guest = tapped();
    let spec = guest.session.spec(guest.tap).unwrap();
    let second = guest.session.add(&spec).unwrap();
    let nodes = [Node::Argument(0), Node::Const { value: 2, signed: false }, Node::Compare(vmitap::capture::Test::Ge)];
    guest.session.set_filter(second, Some(&Arc::new(Program::compile(&nodes, Abi::SystemV).unwrap()))).unwrap();
    guest.session.set_capture(guest.tap, plan(vec![number("n", argument(0))]), None, "first").unwrap();
    guest.enter(0, 0, 1);
    assert!(guest.run().is_ok());
    guest.session.set_capture(second, plan(vec![number("m", argument(0)), number("n", argument(1))]), None, "second").unwrap();
    for n in 1..4 {
        guest.enter(0, 0, n);
    }
    assert!(guest.run().is_ok());
    let (schema, batches) = guest.session.recorded().unwrap();
    assert_eq!(batches.len(), 2, "a new column begins a new batch");
    assert!(batches.iter().all(|batch| batch.schema() == schema));
    let all = |name: &str| batches.iter().flat_map(|batch| words(batch, name)).collect::<Vec<_>>();
    assert_eq!(all("n"), [Some(1), Some(1), Some(2), Some(0), Some(3), Some(0)]);
    assert_eq!(all("m"), [None, None, None, Some(2), None, Some(3)]);
    assert_eq!(guest.session.stats().rows, 6);
}

#[test]
fn columns_that_cannot_be_are_refused_and_nothing_changes() {
    let mut guest = tapped();
    let tap = guest.tap;
    guest.session.set_capture(tap, plan(vec![number("n", argument(0))]), None, "f").unwrap();
    let text = column("n", Source::Cstr { at: argument(0), max: 9 });
    for (columns, on_return) in [
        (vec![text.clone()], None),
        (vec![number("time_ns", argument(0))], None),
        (vec![number("new", argument(0)), text.clone()], None),
        (vec![number("m", argument(0))], Some(plan(vec![number("m", argument(0))]))),
        (vec![number("duration_ns", argument(0))], Some(plan(vec![]))),
    ] {
        let result = guest.session.set_capture(tap, plan(columns.clone()), on_return, "f");
        assert!(matches!(result, Err(VmiError::InvalidArgument { what: "capture", .. })), "{columns:?}: {result:?}");
        assert_eq!(guest.session.recording().names().len(), 8);
    }
    let condition = Program::compile(&[Node::Once], Abi::SystemV).unwrap();
    for bad in [
        column("", Source::Number { program: argument(0), bytes: 8 }),
        column("a", Source::Number { program: argument(0), bytes: 3 }),
        column("a", Source::Number { program: condition.clone(), bytes: 8 }),
        column("a", Source::Bytes { at: argument(0), len: 0 }),
        column("a", Source::Cstr { at: argument(0), max: 65_537 }),
        column("a", Source::Cstr { at: condition, max: 6 }),
        column("a", Source::Utf16 { at: argument(0), max: 3 }),
        column("a", Source::Backtrace { depth: 0 }),
    ] {
        assert!(Plan::new(vec![bad.clone()]).is_err(), "{bad:?}");
    }
    assert!(Plan::new((0..257).map(|n| number(&n.to_string(), argument(0))).collect()).is_err());
}

fn with_returns() -> Tapped {
    let mut guest = tapped();
    let result = plan(vec![number("result", register("rax"))]);
    let tap = guest.tap;
    guest.session.set_capture(tap, plan(vec![number("n", argument(0))]), Some(result), "f").unwrap();
    guest
}

fn results(batch: &RecordBatch) -> Vec<(Option<u64>, Option<u64>)> {
    words(batch, "n").into_iter().zip(words(batch, "result")).collect()
}

#[test]
fn returns_are_matched_with_their_calls_in_recursion_and_on_other_vcpus() {
    let mut guest = with_returns();
    guest.enter(0, 0x00, 1);
    guest.enter(0, 0x40, 2);
    // The same depth elsewhere is another stack, and a task that moved to another vCPU is the same.
    guest.enter(1, 0x100, 3);
    guest.enter(0, 0x80, 4);
    guest.leave(0, 0x80, 40);
    guest.leave(0, 0x100, 30);
    guest.leave(1, 0x40, 20);
    // Somebody else comes by there.
    guest.leave(0, 0x200, 99);
    guest.leave(0, 0x00, 10);
    assert!(matches!(guest.run(), Ok(Poll::Idle)));
    let rows = guest.rows();
    assert_eq!(results(&rows), [(Some(4), Some(40)), (Some(3), Some(30)), (Some(2), Some(20)), (Some(1), Some(10))]);
    assert!(words(&rows, "duration_ns").iter().all(|duration| *duration > Some(0)));
    let stats = guest.session.stats();
    assert_eq!((stats.hits, stats.filtered, stats.returns_lost), (4, 0, 0));
    // Each event was answered with a step, those at the return address too.
    assert_eq!(guest.session.vmi().driver().answers().len(), 9);
}

#[test]
fn calls_that_never_return_are_bounded_and_the_oldest_is_given_up() {
    listen();
    let mut guest = with_returns();
    // One that is lost for another reason does not keep it from being said.
    guest.event(0, CODE, |registers| registers.gp.rsp = 0x1000);
    assert!(guest.run().is_ok());
    guest.session.recording_mut().clear().unwrap();
    for n in 0..WAITING as u64 + 3 {
        let rsp = STACK + 0x800;
        guest.poke(STACK_PA, &[0; 8]);
        guest.poke(Pa(STACK_PA.0 + 0x800), &BACK.0.to_le_bytes());
        guest.event(0, CODE, |registers| (registers.gp.rsp, registers.gp.rdi) = (rsp, n));
        assert!(guest.run().is_ok());
    }
    assert_eq!(guest.session.stats().returns_lost, 4);
    assert_eq!(logged().iter().filter(|line| line.starts_with("4096 calls have not returned")).count(), 1);
    assert_eq!(results(&guest.rows()), [(Some(0), None), (Some(1), None), (Some(2), None)]);
    guest.session.end_recording().unwrap();
    let rows = guest.session.recorded().unwrap().1;
    assert_eq!(rows.iter().map(RecordBatch::num_rows).sum::<usize>(), WAITING + 3);
}

#[test]
fn return_addresses_are_bounded_and_a_call_from_one_too_many_is_counted_and_said_once() {
    const SITES: u64 = 4096;
    listen();
    let mut guest = with_returns();
    for n in 0..SITES + 2 {
        let to = CODE.0 + 0x10 + n;
        guest.poke(Pa(STACK_PA.0 + 0x800), &to.to_le_bytes());
        guest.event(0, CODE, |registers| registers.gp.rdi = n);
        assert!(guest.run().is_ok());
    }
    assert_eq!(guest.session.stats().returns_lost, 2);
    assert_eq!(results(&guest.rows()), [(Some(SITES), None), (Some(SITES + 1), None)]);
    let lines = logged();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].starts_with("4096 return addresses are tapped"), "{lines:?}");
}

#[test]
fn a_return_address_that_cannot_be_tapped_gives_the_row_at_once() {
    let mut guest = with_returns();
    guest.poke(Pa(STACK_PA.0 + 0x800), &(1_u64 << 50).to_le_bytes());
    guest.event(0, CODE, |registers| registers.gp.rdi = 1);
    guest.event(0, CODE, |registers| (registers.gp.rdi, registers.gp.rsp) = (2, 0x1000));
    assert!(matches!(guest.run(), Ok(Poll::Idle)));
    assert_eq!(results(&guest.rows()), [(Some(1), None), (Some(2), None)]);
    assert_eq!(guest.session.stats().returns_lost, 2);
}

#[test]
fn removing_the_tap_ends_its_rows_and_lifts_the_breakpoints_at_return_addresses() {
    for disable in [false, true] {
        let mut guest = with_returns();
        guest.enter(0, 0, 1);
        assert!(guest.run().is_ok());
        let tap = guest.tap;
        let done = if disable { guest.session.disable(tap) } else { guest.session.remove(tap) };
        done.unwrap();
        assert_eq!(results(&guest.rows()), [(Some(1), None)]);
        assert_eq!(guest.session.shadow_frames(), 0);
        guest.session.detach().unwrap();
    }
}

#[test]
fn a_full_memory_loses_rows_and_counts_them() {
    let mut guest = tapped();
    let tap = guest.tap;
    guest.session.set_capture(tap, plan(vec![number("n", argument(0))]), None, "f").unwrap();
    guest.session.recording_mut().set_limit(120);
    for n in 0..10 {
        guest.enter(0, 0, n);
    }
    assert!(guest.run().is_ok());
    let stats = guest.session.stats();
    assert_eq!((stats.rows, stats.rows_lost, guest.rows().num_rows()), (10, 7, 3));
    guest.session.recording_mut().clear().unwrap();
    guest.enter(0, 0, 11);
    assert!(guest.run().is_ok());
    assert_eq!(words(&guest.rows(), "n"), [Some(11)]);
}

fn streamed(name: &str, batch: usize, rows: u64) -> (String, u64) {
    let path = std::env::temp_dir().join(format!("vmitap-{}-{name}", std::process::id()));
    let path = path.to_str().unwrap().to_owned();
    let mut guest = tapped();
    let columns = vec![
        number("n", argument(0)),
        column("text", Source::Cstr { at: argument(1), max: 8 }),
        column("raw", Source::Bytes { at: argument(1), len: 2 }),
        column("callers", Source::Backtrace { depth: 2 }),
    ];
    guest.poke(Pa(0x9000), b"\"\x01\n\0");
    let tap = guest.tap;
    guest.session.set_capture(tap, plan(columns), None, "f").unwrap();
    for n in 0..rows {
        // What was captured before the file is opened goes into it too.
        if n == rows / 2 {
            assert!(guest.run().is_ok());
            guest.session.record_to(&path, Format::of_path(&path).unwrap(), batch).unwrap();
            assert!(guest.session.record_to(&path, Format::JsonLines, 1).is_err());
        }
        guest.event(0, CODE, |registers| (registers.gp.rdi, registers.gp.rsi) = (n, if n % 2 == 0 { DATA } else { 0 }));
    }
    assert!(guest.run().is_ok());
    let late = guest.session.set_capture(tap, plan(vec![number("late", argument(0))]), None, "f");
    assert!(matches!(late, Err(VmiError::InvalidArgument { .. })), "{late:?}");
    assert!(guest.session.recording().len() < batch);
    let written = guest.session.end_recording().unwrap();
    (path, written)
}

#[test]
fn a_parquet_file_that_is_written_along_has_every_row() {
    let (path, written) = streamed("along.parquet", 64, 1000);
    let reader = ParquetRecordBatchReaderBuilder::try_new(fs::File::open(&path).unwrap()).unwrap();
    assert!(reader.metadata().num_row_groups() >= 8);
    assert_eq!(reader.schema().metadata()["vmitap.schema"], "1");
    assert_eq!(reader.schema().field_with_name("callers").unwrap().data_type().to_string(), "List(non-null UInt64)");
    let batches: Vec<RecordBatch> = reader.with_batch_size(10_000).build().unwrap().map(Result::unwrap).collect();
    let numbers: Vec<u64> = batches.iter().flat_map(|batch| words(batch, "n")).map(Option::unwrap).collect();
    assert_eq!((written, numbers), (1000, (0..1000).collect::<Vec<_>>()));
    fs::remove_file(path).unwrap();
}

#[test]
fn json_lines_have_every_row_and_escape_what_needs_it() {
    let (path, written) = streamed("along.jsonl", 7, 20);
    let text = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!((lines.len(), written), (20, 20));
    assert!(lines[2].starts_with("{\"time_ns\":"), "{}", lines[2]);
    let end = format!(
        "\"symbol\":\"f\",\"address\":{},\"root\":258048,\"n\":2,\"text\":\"\\\"\\u0001\\n\",\"raw\":\"2201\",\"callers\":[]}}",
        CODE.0
    );
    assert!(lines[2].ends_with(&end), "{}\n{end}", lines[2]);
    assert!(lines[3].ends_with("\"n\":3,\"text\":null,\"raw\":null,\"callers\":[]}"), "{}", lines[3]);
    fs::remove_file(path).unwrap();
}

#[test]
fn a_file_that_cannot_be_opened_is_a_typed_error_and_rows_stay_in_memory() {
    let mut guest = tapped();
    let result = guest.session.record_to("/nowhere/at/all.parquet", Format::Parquet, 10);
    assert!(matches!(result, Err(VmiError::Recording { errno: Some(2), rows: 0, .. })), "{result:?}");
    let tap = guest.tap;
    guest.session.set_capture(tap, plan(vec![number("n", argument(0))]), None, "f").unwrap();
    guest.enter(0, 0, 1);
    assert!(guest.run().is_ok());
    assert_eq!(guest.rows().num_rows(), 1);
}

#[test]
fn a_full_disk_is_a_typed_error_after_the_event_was_answered() {
    let mut guest = tapped();
    let tap = guest.tap;
    guest.session.set_capture(tap, plan(vec![number("n", argument(0))]), None, "f").unwrap();
    guest.session.record_to("/dev/full", Format::JsonLines, 1).unwrap();
    let mut failed = None;
    // The writer is a thread, which a busy machine may let run late: until then rows are lost.
    let give_up = Instant::now() + Duration::from_secs(60);
    while failed.is_none() && Instant::now() < give_up {
        guest.enter(0, 0, 1);
        failed = guest.run().err();
    }
    let events = guest.session.stats().events as usize;
    assert_eq!(guest.session.vmi().driver().answers().len(), events);
    assert!(matches!(failed, Some(VmiError::Recording { errno: Some(28), rows: 0, .. })), "{failed:?}");
    // It is over with the file, and with nothing else.
    guest.enter(0, 0, 1);
    assert!(guest.run().is_ok());
    guest.accounts(0);
    guest.session.end_recording().unwrap();
    guest.session.detach().unwrap();
}

#[test]
fn rows_in_memory_whose_file_is_full_at_once_are_counted_or_still_there_and_another_file_can_be_written() {
    let mut guest = tapped();
    let tap = guest.tap;
    guest.session.set_capture(tap, plan(vec![number("n", argument(0))]), None, "f").unwrap();
    guest.session.recording_mut().set_batch_rows(1);
    for n in 0..10 {
        guest.enter(0, 0, n);
    }
    assert!(guest.run().is_ok());
    assert_eq!(guest.session.recording().len(), 10);
    // The writer is a thread: with ten batches it fails before all of them are queued, or at the end.
    let opened = guest.session.record_to("/dev/full", Format::JsonLines, 1);
    let ended = guest.session.end_recording();
    let failed = opened.err().or(ended.err());
    assert!(matches!(failed, Some(VmiError::Recording { errno: Some(28), rows: 0, .. })), "{failed:?}");
    guest.accounts(0);
    // Columns can come again, and rows go to memory and to another file.
    guest.session.set_capture(tap, plan(vec![number("late", argument(0))]), None, "f").unwrap();
    guest.enter(0, 0, 10);
    assert!(guest.run().is_ok());
    guest.accounts(0);
    assert!(!guest.session.recording().is_empty());
    let path = std::env::temp_dir().join(format!("vmitap-{}-after.jsonl", std::process::id()));
    let waiting = guest.session.recording().len() as u64;
    guest.session.record_to(path.to_str().unwrap(), Format::JsonLines, 1).unwrap();
    guest.enter(0, 0, 11);
    assert!(guest.run().is_ok());
    let written = guest.session.end_recording().unwrap();
    assert_eq!((written, fs::read_to_string(&path).unwrap().lines().count() as u64), (waiting + 1, waiting + 1));
    guest.accounts(written);
    fs::remove_file(path).unwrap();
}

#[test]
fn rows_that_wait_for_a_reader_who_has_gone_are_counted() {
    let path = std::env::temp_dir().join(format!("vmitap-{}-pipe.jsonl", std::process::id()));
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    let reader = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut guest = tapped();
    let tap = guest.tap;
    guest.session.set_capture(tap, plan(vec![number("n", argument(0))]), None, "f").unwrap();
    guest.session.record_to(path.to_str().unwrap(), Format::JsonLines, 4_000).unwrap();
    // More than the pipe holds and the queue too: the writer stands still until the reader goes.
    for n in 0..24_000 {
        guest.enter(0, 0, n);
    }
    assert!(guest.run().is_ok());
    drop(reader);
    let ended = guest.session.end_recording();
    let Err(VmiError::Recording { errno: Some(32), rows, .. }) = ended else { panic!("{ended:?}") };
    guest.accounts(rows);
    fs::remove_file(path).unwrap();
}

#[test]
fn every_type_of_number_keeps_its_width() {
    let mut guest = tapped();
    let tap = guest.tap;
    let mut columns = Vec::new();
    let mut expected = Vec::new();
    for (bits, unsigned, signed) in [
        (8, DataType::UInt8, DataType::Int8),
        (16, DataType::UInt16, DataType::Int16),
        (32, DataType::UInt32, DataType::Int32),
        (64, DataType::UInt64, DataType::Int64),
    ] {
        for (is_signed, kind) in [(false, unsigned), (true, signed)] {
            let cast = [Node::Argument(0), Node::Cast { bits, signed: is_signed }];
            let program = Program::compile(&cast, Abi::SystemV).unwrap();
            columns.push(column(&format!("{kind}"), Source::Number { program, bytes: bits / 8 }));
            expected.push(kind);
        }
    }
    guest.session.set_capture(tap, plan(columns), None, "f").unwrap();
    guest.enter(0, 0, u64::MAX - 1);
    assert!(guest.run().is_ok());
    let rows = guest.rows();
    for (kind, column) in expected.iter().zip(rows.columns().iter().skip(7)) {
        assert_eq!(column.data_type(), kind);
        assert!(!column.is_null(0));
    }
}

#[test]
fn a_tap_over_its_budget_is_disabled_after_its_event_and_says_so() {
    let mut guest = tapped();
    let tap = guest.tap;
    guest.session.set_budget(tap, Some(2));
    for n in 0..5 {
        guest.enter(0, 0, n);
    }
    assert!(guest.run().is_ok());
    let (stats, budget) = (guest.session.stats(), guest.session.budget(tap).unwrap());
    assert_eq!((guest.session.state(tap), budget.is_exceeded()), (TapState::Disabled, true));
    // What the driver had raised before is stepped over, and all was answered.
    assert_eq!((stats.hits, stats.disabled_by_budget, guest.session.vmi().driver().answers().len()), (3, 1, 5));
    guest.session.enable(tap).unwrap();
    guest.session.set_budget(tap, None);
    guest.enter(0, 0, 9);
    assert!(guest.run().is_ok());
    assert_eq!(guest.session.state(tap), TapState::Active);
}

#[test]
fn holding_times_are_counted_for_every_hit_that_is_captured_or_handed_out_and_sampled_for_the_others() {
    let mut guest = tapped();
    let tap = guest.tap;
    guest.enter(0, 0, 1);
    assert!(guest.run().is_ok());
    assert_eq!((guest.session.holds().count(), guest.session.tap_holds(tap).map(Histogram::count)), (1, Some(1)));
    // The first one is timed, and each sixteenth after it, which stands for those before.
    for round in 1..=33_u64 {
        guest.enter(0, 0, 1);
        assert!(guest.run().is_ok());
        assert_eq!(guest.session.tap_holds(tap).map(Histogram::count), Some(1 + round / 16 * 16), "after {round} more");
    }
    assert_eq!(guest.session.holds().count(), 33);
    guest.session.set_capture(tap, plan(vec![number("n", argument(0))]), None, "f").unwrap();
    guest.enter(0, 0, 2);
    assert!(guest.run().is_ok());
    assert_eq!(guest.session.tap_holds(tap).unwrap().count(), 34);
    guest.session.set_wanted(tap, true);
    guest.enter(0, 0, 3);
    assert!(matches!(guest.run(), Ok(Poll::Hit(_))));
    std::thread::sleep(Duration::from_millis(2));
    assert!(guest.run().is_ok());
    let holds = guest.session.tap_holds(tap).unwrap();
    assert_eq!(holds.count(), 35);
    assert!(holds.max_ns() >= 2_000_000 && holds.quantile_ns(0.5) < 2_000_000, "{}", holds.quantile_ns(0.5));
    assert!(words(&guest.rows(), "hold_ns")[1] >= Some(2_000_000));
}

#[test]
fn a_tap_for_one_hit_still_has_the_return_of_that_hit() {
    let mut guest = with_returns();
    let tap = guest.tap;
    guest.session.set_once(tap);
    guest.enter(0, 0, 1);
    guest.leave(0, 0, 10);
    assert!(matches!(guest.run(), Ok(Poll::Idle)));
    assert_eq!(guest.session.state(tap), TapState::Removed);
    assert_eq!(results(&guest.rows()), [(Some(1), Some(10))]);
    assert_eq!(guest.session.stats().returns_lost, 0);
}

#[test]
fn a_tap_for_one_hit_whose_filter_asks_is_spent_by_the_hit_that_passes() {
    let mut guest = tapped();
    let tap = guest.tap;
    guest.session.set_once(tap);
    guest.session.set_filter(tap, Some(&Arc::new(Program::compile(&[Node::Ask(0)], Abi::SystemV).unwrap()))).unwrap();
    for passes in [false, true] {
        guest.enter(0, 0, 1);
        assert!(matches!(guest.run(), Ok(Poll::Hit(hit)) if hit.question == Some(0)));
        guest.session.answer_question_of_filter(passes).unwrap();
        let expected = if passes { TapState::Removed } else { TapState::Active };
        assert_eq!(guest.session.state(tap), expected);
    }
    assert_eq!(guest.session.tap_stats(tap).hits, 1);
}

#[test]
fn removing_many_taps_ends_their_rows() {
    let mut guest = with_returns();
    guest.enter(0, 0, 1);
    assert!(guest.run().is_ok());
    let tap = guest.tap;
    guest.session.remove_many(&[tap]).unwrap();
    assert_eq!(results(&guest.rows()), [(Some(1), None)]);
    assert_eq!(guest.session.shadow_frames(), 0);
}
