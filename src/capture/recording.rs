//! Rows of captured values, in columns: they leave as Arrow record batches, without being copied.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;

use arrow_array::builder::{BinaryBuilder, ListBuilder, PrimitiveBuilder, StringBuilder};
use arrow_array::types::{Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type};
use arrow_array::{
    ArrayRef, DictionaryArray, Int32Array, RecordBatch, StringArray, UInt16Array, UInt32Array, UInt64Array, new_null_array,
};
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};

use crate::addr::{Pa, Va, VcpuId};
use crate::error::{Result, VmiError};

use super::plan::{Cell, Column, Kind, Row};

/// Version of the columns every recording has, in the schema's metadata as `vmitap.schema`.
pub const SCHEMA_VERSION: &str = "1";
/// Bytes of values at which a batch is closed, so that offsets of 32 bits do: the longest row is far shorter.
const BATCH_BYTES: usize = 64 << 20;
/// Bytes of a row without its captured values.
const BASE_BYTES: usize = 42;
/// The columns every recording has.
const BASE: [&str; 7] = ["time_ns", "hold_ns", "vcpu", "breakpoint", "symbol", "address", "root"];

/// What every row has.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Nanoseconds since the session began.
    pub time_ns: u64,
    /// The vCPU.
    pub vcpu: VcpuId,
    /// The number of the tap.
    pub tap: u32,
    /// The name of the tap's place: from [`Recording::label`].
    pub label: u32,
    /// The address of the hit.
    pub va: Va,
    /// The page-table root the vCPU was under.
    pub root: Pa,
}

/// The captured values of one column in the open batch.
enum Data {
    U8(PrimitiveBuilder<UInt8Type>),
    U16(PrimitiveBuilder<UInt16Type>),
    U32(PrimitiveBuilder<UInt32Type>),
    U64(PrimitiveBuilder<UInt64Type>),
    I8(PrimitiveBuilder<Int8Type>),
    I16(PrimitiveBuilder<Int16Type>),
    I32(PrimitiveBuilder<Int32Type>),
    I64(PrimitiveBuilder<Int64Type>),
    Bytes(BinaryBuilder),
    Text(StringBuilder),
    Addresses(ListBuilder<PrimitiveBuilder<UInt64Type>>),
}

fn data_type(kind: Kind) -> DataType {
    match kind {
        Kind::Unsigned(1) => DataType::UInt8,
        Kind::Unsigned(2) => DataType::UInt16,
        Kind::Unsigned(4) => DataType::UInt32,
        Kind::Unsigned(_) => DataType::UInt64,
        Kind::Signed(1) => DataType::Int8,
        Kind::Signed(2) => DataType::Int16,
        Kind::Signed(4) => DataType::Int32,
        Kind::Signed(_) => DataType::Int64,
        Kind::Bytes => DataType::Binary,
        Kind::Text => DataType::Utf8,
        Kind::Addresses => DataType::List(Arc::new(address_field())),
    }
}

fn address_field() -> Field {
    Field::new("item", DataType::UInt64, false)
}

impl Data {
    fn new(kind: Kind) -> Self {
        match kind {
            Kind::Unsigned(1) => Self::U8(PrimitiveBuilder::new()),
            Kind::Unsigned(2) => Self::U16(PrimitiveBuilder::new()),
            Kind::Unsigned(4) => Self::U32(PrimitiveBuilder::new()),
            Kind::Unsigned(_) => Self::U64(PrimitiveBuilder::new()),
            Kind::Signed(1) => Self::I8(PrimitiveBuilder::new()),
            Kind::Signed(2) => Self::I16(PrimitiveBuilder::new()),
            Kind::Signed(4) => Self::I32(PrimitiveBuilder::new()),
            Kind::Signed(_) => Self::I64(PrimitiveBuilder::new()),
            Kind::Bytes => Self::Bytes(BinaryBuilder::new()),
            Kind::Text => Self::Text(StringBuilder::new()),
            Kind::Addresses => Self::Addresses(ListBuilder::new(PrimitiveBuilder::new()).with_field(address_field())),
        }
    }

    fn push_null(&mut self) {
        match self {
            Self::U8(builder) => builder.append_null(),
            Self::U16(builder) => builder.append_null(),
            Self::U32(builder) => builder.append_null(),
            Self::U64(builder) => builder.append_null(),
            Self::I8(builder) => builder.append_null(),
            Self::I16(builder) => builder.append_null(),
            Self::I32(builder) => builder.append_null(),
            Self::I64(builder) => builder.append_null(),
            Self::Bytes(builder) => builder.append_null(),
            Self::Text(builder) => builder.append_null(),
            Self::Addresses(builder) => builder.append(false),
        }
    }

    /// Appends a value; how many bytes it takes.
    fn push(&mut self, cell: Cell, row: &Row) -> usize {
        match (self, cell) {
            (Self::U8(builder), Cell::Word(value)) => builder.append_value(value as u8),
            (Self::U16(builder), Cell::Word(value)) => builder.append_value(value as u16),
            (Self::U32(builder), Cell::Word(value)) => builder.append_value(value as u32),
            (Self::U64(builder), Cell::Word(value)) => builder.append_value(value),
            (Self::I8(builder), Cell::Word(value)) => builder.append_value(value as i8),
            (Self::I16(builder), Cell::Word(value)) => builder.append_value(value as i16),
            (Self::I32(builder), Cell::Word(value)) => builder.append_value(value as i32),
            (Self::I64(builder), Cell::Word(value)) => builder.append_value(value as i64),
            (Self::Bytes(builder), Cell::Span { from, len }) => {
                builder.append_value(row.span(from, len));
                return 4 + len as usize;
            }
            (Self::Text(builder), Cell::Span { from, len }) => return push_text(builder, row.span(from, len)),
            (Self::Addresses(builder), Cell::Span { from, len }) => {
                let (words, _) = row.span(from, len).as_chunks::<8>();
                for word in words {
                    builder.values().append_value(u64::from_le_bytes(*word));
                }
                builder.append(true);
                return 4 + len as usize;
            }
            (other, _) => other.push_null(),
        }
        8
    }

    fn finish(&mut self) -> ArrayRef {
        match self {
            Self::U8(builder) => Arc::new(builder.finish()),
            Self::U16(builder) => Arc::new(builder.finish()),
            Self::U32(builder) => Arc::new(builder.finish()),
            Self::U64(builder) => Arc::new(builder.finish()),
            Self::I8(builder) => Arc::new(builder.finish()),
            Self::I16(builder) => Arc::new(builder.finish()),
            Self::I32(builder) => Arc::new(builder.finish()),
            Self::I64(builder) => Arc::new(builder.finish()),
            Self::Bytes(builder) => Arc::new(builder.finish()),
            Self::Text(builder) => Arc::new(builder.finish()),
            Self::Addresses(builder) => Arc::new(builder.finish()),
        }
    }
}

/// Text as a reader of the guest's memory gives it: what is no UTF-8 becomes backslash escapes.
fn push_text(builder: &mut StringBuilder, bytes: &[u8]) -> usize {
    if let Ok(text) = std::str::from_utf8(bytes) {
        builder.append_value(text);
        return 4 + text.len();
    }
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    builder.append_value(&text);
    4 + text.len()
}

/// The columns every row has, in the open batch.
#[derive(Default)]
struct Base {
    time_ns: Vec<u64>,
    hold_ns: Vec<u64>,
    vcpu: Vec<u16>,
    tap: Vec<u32>,
    label: Vec<i32>,
    va: Vec<u64>,
    root: Vec<u64>,
}

/// Which column of a recording each column of a plan is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Places {
    /// By column of the recording: which cell of the row.
    cells: Box<[Option<u16>]>,
}

/// Rows of captured values.
///
/// Rows are appended to an open batch; batches of [`Recording::batch_rows`] rows are closed and kept in memory, or handed out with
/// [`Recording::take_closed`]. What has no room within the limit is counted and not kept.
pub struct Recording {
    fields: Vec<(String, Kind)>,
    columns: Vec<Data>,
    base: Base,
    labels: Vec<String>,
    metadata: HashMap<String, String>,
    closed: Vec<RecordBatch>,
    closed_bytes: usize,
    open_bytes: usize,
    batch_rows: usize,
    limit: usize,
    rows: u64,
    lost: u64,
    /// It was said that rows are lost since there is no room.
    is_full: bool,
    /// The last rows of the open batch whose vCPU still stands.
    unsettled: usize,
    /// No column may come any more: a file is being written.
    fixed: bool,
}

impl Recording {
    /// An empty recording that keeps at most `limit` bytes of values. `metadata` goes into the schema.
    pub fn new(limit: usize, batch_rows: usize, metadata: HashMap<String, String>) -> Self {
        let mut metadata = metadata;
        metadata.insert("vmitap.schema".to_owned(), SCHEMA_VERSION.to_owned());
        Self {
            fields: Vec::new(),
            columns: Vec::new(),
            base: Base::default(),
            labels: Vec::new(),
            metadata,
            closed: Vec::new(),
            closed_bytes: 0,
            open_bytes: 0,
            batch_rows: batch_rows.max(1),
            limit,
            rows: 0,
            lost: 0,
            is_full: false,
            unsettled: 0,
            fixed: false,
        }
    }

    /// Rows so far, also those that were handed out or cleared.
    pub const fn rows(&self) -> u64 {
        self.rows
    }

    /// Rows that there was no room for.
    pub const fn lost(&self) -> u64 {
        self.lost
    }

    /// Counts rows as lost that were handed out and could not be kept.
    pub const fn add_lost(&mut self, rows: u64) {
        self.lost += rows;
    }

    /// Rows in memory.
    pub fn len(&self) -> usize {
        self.closed.iter().map(RecordBatch::num_rows).sum::<usize>() + self.base.time_ns.len()
    }

    /// Whether there are none in memory.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Names of all columns.
    pub fn names(&self) -> Vec<String> {
        BASE.iter().map(ToString::to_string).chain(self.fields.iter().map(|(name, _)| name.clone())).collect()
    }

    /// Bytes of values that are kept at most.
    pub const fn limit(&self) -> usize {
        self.limit
    }

    /// Sets how many bytes of values are kept at most.
    pub const fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Sets how many rows a batch has.
    pub fn set_batch_rows(&mut self, rows: usize) {
        self.batch_rows = rows.max(1);
    }

    /// While `fixed`, a column that is not there yet is refused.
    pub const fn set_fixed(&mut self, fixed: bool) {
        self.fixed = fixed;
    }

    /// The number of a name for the column `symbol`.
    pub fn label(&mut self, name: &str) -> u32 {
        if let Some(index) = self.labels.iter().rposition(|label| label == name) {
            return index as u32;
        }
        self.labels.push(name.to_owned());
        self.labels.len() as u32 - 1
    }

    /// Makes room for these columns, which rows from now on can have. One that is there already has to be of the same kind.
    ///
    /// # Errors
    /// [`VmiError::InvalidArgument`] with nothing changed: a name that every row has, one of another kind, or a new one while a file is
    /// being written.
    pub fn add_columns(&mut self, columns: &[Column]) -> Result<()> {
        let new = self.check_columns(columns)?;
        if !new.is_empty() {
            self.close()?;
            self.columns.extend(new.iter().map(|(_, kind)| Data::new(*kind)));
            self.fields.extend(new);
        }
        Ok(())
    }

    /// Which of these columns are new.
    ///
    /// # Errors
    /// As [`Recording::add_columns`].
    pub fn check_columns(&self, columns: &[Column]) -> Result<Vec<(String, Kind)>> {
        let refuse = |reason| Err(VmiError::InvalidArgument { what: "capture", reason });
        let mut new: Vec<(String, Kind)> = Vec::new();
        for column in columns {
            let kind = column.kind();
            if BASE.contains(&column.name.as_str()) {
                return refuse(format!("every row has a column {:?} already", column.name));
            }
            match self.fields.iter().chain(&new).find(|(name, _)| *name == column.name) {
                Some((_, other)) if *other == kind => {}
                Some((_, other)) => {
                    return refuse(format!("the column {:?} is {other:?} already, and cannot be {kind:?} too", column.name));
                }
                None if self.fixed => {
                    return refuse(format!("the column {:?} comes too late: a file is being written", column.name));
                }
                None => new.push((column.name.clone(), kind)),
            }
        }
        Ok(new)
    }

    /// Where the cells of a row go whose columns are these, one after the other.
    pub fn places<'a>(&self, columns: impl Iterator<Item = &'a Column>) -> Places {
        let mut cells = vec![None; self.fields.len()];
        for (index, column) in columns.enumerate() {
            if let Some(at) = self.fields.iter().position(|(name, _)| *name == column.name)
                && let Some(cell) = cells.get_mut(at)
            {
                *cell = u16::try_from(index).ok();
            }
        }
        Places { cells: cells.into() }
    }

    /// Appends a row. Its vCPU still stands: [`Recording::settle`] tells how long.
    pub fn append(&mut self, facts: &Facts, places: &Places, row: &Row) {
        self.rows += 1;
        if self.closed_bytes + self.open_bytes >= self.limit {
            if !std::mem::replace(&mut self.is_full, true) {
                log::warn!("the recording has reached its limit of {} bytes: rows are lost, and counted", self.limit);
            }
            self.lost += 1;
            return;
        }
        let base = &mut self.base;
        base.time_ns.push(facts.time_ns);
        base.hold_ns.push(0);
        base.vcpu.push(facts.vcpu.0);
        base.tap.push(facts.tap);
        base.label.push(facts.label as i32);
        base.va.push(facts.va.0);
        base.root.push(facts.root.0);
        let mut bytes = BASE_BYTES;
        let mut places = places.cells.iter();
        for data in &mut self.columns {
            let place = places.next().copied().flatten();
            match place.and_then(|place| row.cells().get(usize::from(place))) {
                Some(cell) => bytes += data.push(*cell, row),
                None => data.push_null(),
            }
        }
        self.open_bytes += bytes;
        self.unsettled += 1;
    }

    /// Whether there are rows whose vCPU still stands.
    #[inline]
    pub const fn is_unsettled(&self) -> bool {
        self.unsettled > 0
    }

    /// The vCPU of the last rows goes on after so many nanoseconds. Closes the batch if it is full.
    ///
    /// # Errors
    /// As [`Recording::close`].
    pub fn settle(&mut self, hold_ns: u64) -> Result<()> {
        for hold in self.base.hold_ns.iter_mut().rev().take(self.unsettled) {
            *hold = hold_ns;
        }
        self.unsettled = 0;
        if self.base.time_ns.len() >= self.batch_rows || self.open_bytes >= BATCH_BYTES {
            self.close()?;
        }
        Ok(())
    }

    /// The columns, and their version.
    pub fn schema(&self) -> SchemaRef {
        let symbol = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8));
        let types =
            [DataType::UInt64, DataType::UInt64, DataType::UInt16, DataType::UInt32, symbol, DataType::UInt64, DataType::UInt64];
        let base = BASE.iter().zip(types).map(|(name, kind)| Field::new(*name, kind, false));
        let captured = self.fields.iter().map(|(name, kind)| Field::new(name, data_type(*kind), true));
        Arc::new(Schema::new_with_metadata(base.chain(captured).collect::<Vec<_>>(), self.metadata.clone()))
    }

    /// Closes the open batch.
    ///
    /// # Errors
    /// [`VmiError::Recording`] if the columns do not fit together, which would be a bug here.
    pub fn close(&mut self) -> Result<()> {
        if self.base.time_ns.is_empty() {
            return Ok(());
        }
        let base = std::mem::take(&mut self.base);
        self.unsettled = 0;
        let labels: ArrayRef = Arc::new(StringArray::from_iter_values(&self.labels));
        let symbol =
            DictionaryArray::<Int32Type>::try_new(Int32Array::from(base.label), labels).map_err(|error| broken(&error))?;
        let mut arrays: Vec<ArrayRef> = vec![
            Arc::new(UInt64Array::from(base.time_ns)),
            Arc::new(UInt64Array::from(base.hold_ns)),
            Arc::new(UInt16Array::from(base.vcpu)),
            Arc::new(UInt32Array::from(base.tap)),
            Arc::new(symbol),
            Arc::new(UInt64Array::from(base.va)),
            Arc::new(UInt64Array::from(base.root)),
        ];
        arrays.extend(self.columns.iter_mut().map(Data::finish));
        let batch = RecordBatch::try_new(self.schema(), arrays).map_err(|error| broken(&error))?;
        self.closed_bytes += batch.get_array_memory_size();
        self.open_bytes = 0;
        self.closed.push(batch);
        Ok(())
    }

    /// Hands out the closed batches.
    pub fn take_closed(&mut self) -> Vec<RecordBatch> {
        self.closed_bytes = 0;
        std::mem::take(&mut self.closed)
    }

    /// Takes batches back in that were handed out, before those that were closed since: they could not be kept elsewhere.
    pub fn put_back(&mut self, mut batches: Vec<RecordBatch>) {
        self.closed_bytes += batches.iter().map(RecordBatch::get_array_memory_size).sum::<usize>();
        batches.append(&mut self.closed);
        self.closed = batches;
    }

    /// Whether there are closed batches.
    pub const fn has_closed(&self) -> bool {
        !self.closed.is_empty()
    }

    /// All rows in memory, as batches of one schema.
    ///
    /// # Errors
    /// As [`Recording::close`].
    pub fn batches(&mut self) -> Result<(SchemaRef, Vec<RecordBatch>)> {
        self.close()?;
        let schema = self.schema();
        let whole = |batch: &RecordBatch| {
            let missing = schema.fields().iter().skip(batch.num_columns());
            let nulls = missing.map(|field| new_null_array(field.data_type(), batch.num_rows()));
            let columns = batch.columns().iter().cloned().chain(nulls).collect();
            RecordBatch::try_new(schema.clone(), columns).map_err(|error| broken(&error))
        };
        let batches = self.closed.iter().map(whole).collect::<Result<_>>()?;
        Ok((schema, batches))
    }

    /// Forgets the rows in memory.
    ///
    /// # Errors
    /// As [`Recording::close`].
    pub fn clear(&mut self) -> Result<()> {
        self.close()?;
        self.closed.clear();
        self.closed_bytes = 0;
        Ok(())
    }
}

fn broken(error: &ArrowError) -> VmiError {
    VmiError::Recording { path: String::new(), errno: None, reason: error.to_string(), rows: 0 }
}
