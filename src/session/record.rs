//! Captures: what is read at the hits of a tap, and where the rows go.

use std::sync::Arc;
use std::time::Instant;

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;

use crate::addr::Va;
use crate::capture::{Abi, Cell, Column, Facts, Format, Node, Places, Plan, Program, Recording, Row, Scene, Source};
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};
use crate::event::VmiEvent;
use crate::symbols::SymbolTable;

use super::sink::{Pushed, Sink};
use super::{Session, TapId};

/// The column of how long a call took, where return values are captured.
pub const DURATION: &str = "duration_ns";

/// What is captured at the hits of one tap.
pub struct Capture {
    /// At the hit.
    pub entry: Plan,
    /// When the function returns.
    pub on_return: Option<Plan>,
    places: Places,
    label: u32,
}

fn duration_column() -> Result<Column> {
    let program = Program::compile(&[Node::Const { value: 0, signed: false }], Abi::SystemV)?;
    Ok(Column { name: DURATION.to_owned(), source: Source::Number { program, bytes: 8 } })
}

impl<D: VmiDriver + ?Sized> Session<D> {
    /// From now on `entry` is read at each hit of the tap, and `on_return` when the function that was entered returns: a row of
    /// [`Session::recording`]. `label` is the row's `symbol`.
    ///
    /// # Errors
    /// [`VmiError::InvalidArgument`] with nothing changed: a column that is there already with another kind, or a name twice.
    pub fn set_capture(&mut self, id: TapId, entry: Plan, on_return: Option<Plan>, label: &str) -> Result<()> {
        let mut columns = entry.columns().to_vec();
        if let Some(plan) = &on_return {
            columns.extend(plan.columns().iter().cloned());
            columns.push(duration_column()?);
        }
        // Checks the names against each other.
        Plan::new(columns.clone())?;
        self.recording.add_columns(&columns)?;
        self.flush_closed()?;
        let places = self.recording.places(columns.iter());
        let label = self.recording.label(label);
        self.taps.specialize(id, |rare| rare.capture = Some(Box::new(Capture { entry, on_return, places, label })));
        Ok(())
    }

    /// Whether columns of these plans can be added to the recording.
    ///
    /// # Errors
    /// As [`Session::set_capture`].
    pub fn check_capture(&mut self, entry: &Plan, on_return: Option<&Plan>) -> Result<()> {
        let mut columns = entry.columns().to_vec();
        if let Some(plan) = on_return {
            columns.extend(plan.columns().iter().cloned());
            columns.push(duration_column()?);
        }
        Plan::new(columns.clone())?;
        self.recording.check_columns(&columns).map(drop)
    }

    /// The rows that were captured.
    pub const fn recording(&self) -> &Recording {
        &self.recording
    }

    /// The rows that were captured, to be emptied or limited.
    pub const fn recording_mut(&mut self) -> &mut Recording {
        &mut self.recording
    }

    /// The guest's symbols: they name addresses in files.
    pub fn set_symbols(&mut self, symbols: Arc<SymbolTable>) {
        self.symbols = symbols;
    }

    /// All rows in memory.
    ///
    /// # Errors
    /// [`VmiError::Recording`] for a bug in here.
    pub fn recorded(&mut self) -> Result<(SchemaRef, Vec<RecordBatch>)> {
        self.recording.batches()
    }

    /// Captures of the taps that `self.owners` holds, whose filters let the hit pass.
    pub(super) fn capture_owners(&mut self, event: &VmiEvent, va: Va) {
        for index in 0..self.owners.len() {
            let Some(id) = self.owners.get(index).copied() else { return };
            if !self.questions.iter().any(|question| question.tap == id) {
                self.capture(id, event, va);
            }
        }
    }

    /// Reads what is captured at a hit of that tap, if anything is.
    pub(super) fn capture(&mut self, id: TapId, event: &VmiEvent, va: Va) {
        let Self { vmi, taps, recording, row, began, .. } = self;
        let Some(capture) = taps.rare(id).and_then(|rare| rare.capture.as_ref()) else { return };
        let now = began.elapsed().as_nanos() as u64;
        let scene = Scene { vmi: Some(vmi), registers: (&event.registers).into(), vcpu: event.vcpu, va, clock: &|| now };
        row.clear();
        capture.entry.read(&scene, row);
        let facts = Facts { time_ns: now, vcpu: event.vcpu, tap: id.0, label: capture.label, va, root: event.registers.root() };
        if !recording.is_unsettled() {
            self.captured_at = now;
        }
        if capture.on_return.is_none() {
            recording.append(&facts, &capture.places, row);
            return;
        }
        let row = std::mem::take(row);
        self.expect_return(id, event, facts, row);
    }

    /// Ends a row whose function returned; `None`: it never did, as far as is known.
    pub(super) fn end_row(&mut self, id: TapId, facts: &Facts, mut row: Row, event: Option<&VmiEvent>) {
        let Self { vmi, taps, recording, began, captured_at, .. } = self;
        let Some(capture) = taps.rare(id).and_then(|rare| rare.capture.as_ref()) else { return };
        let now = began.elapsed().as_nanos() as u64;
        if let (Some(plan), Some(event)) = (&capture.on_return, event) {
            let scene = Scene {
                vmi: Some(vmi),
                registers: (&event.registers).into(),
                vcpu: event.vcpu,
                va: event.registers.rip(),
                clock: &|| now,
            };
            plan.read(&scene, &mut row);
            row.push(Cell::Word(now.saturating_sub(facts.time_ns)));
        }
        if !recording.is_unsettled() {
            *captured_at = now;
        }
        // Cells that are not there are missing values.
        recording.append(facts, &capture.places, &row);
        self.row = row;
    }

    /// The vCPU of the last event goes on, which was handed to nobody: counts how long it stood, if that is known because something was
    /// captured.
    #[inline]
    pub(super) fn settle_captured(&mut self) -> Result<()> {
        if !self.recording.is_unsettled() {
            return Ok(());
        }
        let held = (self.began.elapsed().as_nanos() as u64).saturating_sub(self.captured_at);
        let owners = std::mem::take(&mut self.owners);
        self.count_hold(&owners, held, 1);
        self.owners = owners;
        self.settle()
    }

    /// The vCPU of the last event goes on: tells its rows how long it stood, and hands full batches to the file.
    #[inline]
    pub(super) fn settle(&mut self) -> Result<()> {
        if self.recording.is_unsettled() { self.settle_rows() } else { Ok(()) }
    }

    fn settle_rows(&mut self) -> Result<()> {
        let held = (self.began.elapsed().as_nanos() as u64).saturating_sub(self.captured_at);
        self.recording.settle(held)?;
        if self.recording.has_closed() { self.flush_closed() } else { Ok(()) }
    }

    /// Hands closed batches to the file, if there is one. What its writer does not take any more stays in memory.
    fn flush_closed(&mut self) -> Result<()> {
        let Self { sink, recording, .. } = self;
        let Some(file) = sink else { return Ok(()) };
        let mut batches = recording.take_closed().into_iter();
        while let Some(batch) = batches.next() {
            match file.push(batch) {
                Pushed::Taken => {}
                Pushed::GivenUp(rows) => recording.add_lost(rows),
                Pushed::Ended(back) => {
                    recording.put_back(std::iter::once(back).chain(batches).collect());
                    return self.close_sink().map(drop);
                }
            }
        }
        Ok(())
    }

    /// Ends the file, if there is one: the rows in it. Rows that its writer had and that are not in it are lost.
    fn close_sink(&mut self) -> Result<u64> {
        self.recording.set_fixed(false);
        let Some(sink) = self.sink.take() else { return Ok(0) };
        let (ended, lost) = sink.close();
        self.recording.add_lost(lost);
        ended
    }

    /// Between two waits: what somebody may read along is written.
    pub(super) fn flush_followed(&mut self) -> Result<()> {
        if self.sink.as_ref().is_none_or(|sink| !sink.is_followed()) {
            return Ok(());
        }
        self.recording.close()?;
        self.flush_closed()
    }

    /// From now on rows go to a file, in batches of `rows`, and no longer to memory. What is in memory goes first.
    ///
    /// # Errors
    /// [`VmiError::Recording`] if it cannot be written: rows are still in memory, but for those its writer had taken, which are counted as
    /// lost. [`VmiError::InvalidArgument`] if another is being written.
    pub fn record_to(&mut self, path: &str, format: Format, rows: usize) -> Result<()> {
        self.check_open()?;
        if let Some(sink) = &self.sink {
            let reason = format!("{} is being written; one file at a time", sink.path());
            return Err(VmiError::InvalidArgument { what: "path", reason });
        }
        self.recording.close()?;
        let (schema, batches) = self.recording.batches()?;
        self.sink = Some(Sink::open(path, format, &schema, &self.symbols)?);
        // In the file all have the columns of the last.
        self.recording.clear()?;
        self.recording.put_back(batches);
        self.recording.set_batch_rows(rows);
        self.recording.set_fixed(true);
        self.flush_closed()
    }

    /// Ends the file: the rows in it. Nothing if there is none.
    ///
    /// # Errors
    /// [`VmiError::Recording`] if writing failed; the file can be read up to the last whole batch.
    pub fn end_recording(&mut self) -> Result<u64> {
        self.end_waiting_rows();
        let closed = self.recording.close().and_then(|()| self.flush_closed());
        let ended = self.close_sink();
        closed.and(ended)
    }

    /// Rows in the file so far; `None` if none is being written.
    pub fn rows_in_file(&self) -> Option<u64> {
        self.sink.as_ref().map(Sink::written)
    }

    /// When the session began, as the system's clock has it: for the recording's metadata.
    pub(super) fn new_recording() -> (Recording, Instant) {
        let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let metadata = [("vmitap.began_unix_ns".to_owned(), unix.as_nanos().to_string())].into();
        (Recording::new(LIMIT, BATCH_ROWS, metadata), Instant::now())
    }
}

/// Bytes of values that are kept in memory unless another limit is set.
const LIMIT: usize = 1 << 30;
/// Rows of a batch unless a file asks for others.
const BATCH_ROWS: usize = 65_536;
