//! Writing batches to a file: Parquet, or JSON lines.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type};
use arrow_array::{Array, RecordBatch};
use arrow_schema::{DataType, SchemaRef};
use parquet::arrow::{ARROW_SCHEMA_META_KEY, ArrowWriter, encode_arrow_schema};
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::metadata::{FileMetaData, KeyValue, ParquetMetaData, ParquetMetaDataWriter, RowGroupMetaData};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::SchemaDescPtr;
use rustc_hash::FxHashSet;

use crate::addr::Va;
use crate::symbols::SymbolTable;

/// Something batches are written to.
pub trait Output: Send {
    /// Writes a batch whole. After an error nothing more may be written; see [`Output::rescue`].
    fn write(&mut self, batch: &RecordBatch) -> io::Result<()>;

    /// Ends the file. After an error see [`Output::rescue`].
    fn finish(&mut self) -> io::Result<()>;

    /// After a failure: makes the file readable up to a whole batch, the last one if there is room for what ends the file.
    /// The rows in it then.
    fn rescue(self: Box<Self>) -> io::Result<u64>;
}

/// The two formats.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// Parquet: a row group for each batch, compressed.
    Parquet,
    /// A JSON object for each row, one a line. Bytes are hexadecimal.
    JsonLines,
}

impl Format {
    /// The one that a file's name asks for.
    pub fn of_path(path: &str) -> Option<Self> {
        let (_, suffix) = path.rsplit_once('.')?;
        match suffix {
            "parquet" => Some(Self::Parquet),
            "jsonl" | "ndjson" => Some(Self::JsonLines),
            _ => None,
        }
    }

    /// An output to a new file; `symbols` name the addresses in it, where the format has a place for that.
    pub fn create(self, path: &str, schema: &SchemaRef, symbols: &Arc<SymbolTable>) -> io::Result<Box<dyn Output>> {
        // It holds what the guest holds: a new one is its owner's alone.
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        match self {
            Self::Parquet => Ok(Box::new(Parquet::new(file, schema, symbols)?)),
            Self::JsonLines => Ok(Box::new(JsonLines(BufWriter::new(file), 0))),
        }
    }

    /// An output to this process' standard output.
    pub fn stdout(self, schema: &SchemaRef, symbols: &Arc<SymbolTable>) -> io::Result<Box<dyn Output>> {
        match self {
            Self::Parquet => Format::Parquet.create("/dev/stdout", schema, symbols),
            Self::JsonLines => Ok(Box::new(JsonLines(BufWriter::new(io::stdout()), 0))),
        }
    }
}

/// Key of a file's metadata: a JSON object that names the addresses in lists of addresses, as `{"0x1000": "open_file+0x10"}`.
const PLACES: &str = "vmitap.places";
/// Addresses that are named in one file.
const MOST_PLACES: usize = 65_536;

/// The addresses that a file's lists hold, so that whoever reads it without the guest knows what they are.
struct Places {
    symbols: Arc<SymbolTable>,
    seen: FxHashSet<u64>,
}

impl Places {
    fn note(&mut self, batch: &RecordBatch) {
        for column in batch.columns() {
            let Some(lists) = column.as_list_opt::<i32>() else { continue };
            let Some(addresses) = lists.values().as_primitive_opt::<UInt64Type>() else { continue };
            for address in addresses.values() {
                if self.seen.len() < MOST_PLACES {
                    self.seen.insert(*address);
                }
            }
        }
    }

    fn metadata(&self) -> Option<KeyValue> {
        let mut seen: Vec<u64> = self.seen.iter().copied().collect();
        seen.sort_unstable();
        let named = seen.into_iter().filter_map(|at| Some((format!("{at:#x}"), self.symbols.describe(Va(at))?.into())));
        let named: serde_json::Map<_, _> = named.collect();
        (!named.is_empty()).then(|| KeyValue::new(PLACES.to_owned(), serde_json::Value::Object(named).to_string()))
    }
}

struct Parquet {
    writer: ArrowWriter<File>,
    file: File,
    schema: SchemaRef,
    places: Places,
    /// For each whole batch: where it ends in the file, and the row groups and rows up to there.
    good: Vec<(u64, usize, u64)>,
}

fn io_error(error: ParquetError) -> io::Error {
    match error {
        ParquetError::External(inner) => match inner.downcast::<io::Error>() {
            Ok(error) => *error,
            Err(other) => io::Error::other(other.to_string()),
        },
        other => io::Error::other(other.to_string()),
    }
}

impl Parquet {
    fn new(file: File, schema: &SchemaRef, symbols: &Arc<SymbolTable>) -> io::Result<Self> {
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .set_statistics_enabled(EnabledStatistics::Chunk)
            // They would lie behind the row groups, where a file that is cut off has none.
            .set_offset_index_disabled(true)
            .build();
        let writer = ArrowWriter::try_new(file.try_clone()?, schema.clone(), Some(properties)).map_err(io_error)?;
        let places = Places { symbols: symbols.clone(), seen: FxHashSet::default() };
        Ok(Self { writer, file, schema: schema.clone(), places, good: Vec::new() })
    }
}

impl Output for Parquet {
    fn write(&mut self, batch: &RecordBatch) -> io::Result<()> {
        self.writer.write(batch).map_err(io_error)?;
        self.writer.flush().map_err(io_error)?;
        self.writer.sync()?;
        self.places.note(batch);
        let rows = self.good.last().map_or(0, |(.., rows)| *rows) + batch.num_rows() as u64;
        self.good.push((self.writer.bytes_written() as u64, self.writer.flushed_row_groups().len(), rows));
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        if let Some(places) = self.places.metadata() {
            self.writer.append_key_value_metadata(places);
        }
        self.writer.finish().map(drop).map_err(io_error)
    }

    fn rescue(self: Box<Self>) -> io::Result<u64> {
        let Self { writer, mut file, schema, places, mut good } = *self;
        let groups = writer.flushed_row_groups().to_vec();
        // What it still has to write is part of the batch that failed.
        drop(writer);
        let columns = parquet::arrow::ArrowSchemaConverter::new().convert(&schema).map_err(io_error)?;
        // Without it readers would not know what the types were, nor which version of the columns this is.
        let arrow = KeyValue::new(ARROW_SCHEMA_META_KEY.to_owned(), encode_arrow_schema(&schema));
        let known = schema.metadata().iter().map(|(key, value)| KeyValue::new(key.clone(), value.clone()));
        let facts: Vec<KeyValue> = known.chain([arrow]).chain(places.metadata()).collect();
        let columns = groups.first().map_or_else(|| Arc::new(columns), RowGroupMetaData::schema_descr_ptr);
        loop {
            // Of an empty file there are only the four bytes every Parquet file begins with.
            let (end, count, rows) = good.pop().unwrap_or((4, 0, 0));
            let kept = groups.get(..count).unwrap_or_default().to_vec();
            match end_file(&mut file, end, kept, (&columns, &facts)) {
                Ok(()) => return Ok(rows),
                Err(error) if count == 0 => return Err(error),
                // No room for what ends the file: another batch makes some.
                Err(_) => {}
            }
        }
    }
}

/// Cuts a file off and ends it there.
fn end_file(
    file: &mut File,
    at: u64,
    groups: Vec<RowGroupMetaData>,
    (columns, facts): (&SchemaDescPtr, &[KeyValue]),
) -> io::Result<()> {
    file.set_len(at)?;
    file.seek(SeekFrom::Start(at))?;
    let rows = groups.iter().map(RowGroupMetaData::num_rows).sum();
    let metadata = ParquetMetaData::new(FileMetaData::new(2, rows, None, Some(facts.to_vec()), columns.clone(), None), groups);
    // Not into the file at once: what the writer buffers is written when it is dropped, where an error would be lost.
    let mut end = Vec::new();
    ParquetMetaDataWriter::new(&mut end, &metadata).finish().map_err(io_error)?;
    file.write_all(&end)
}

struct JsonLines<W: Write>(BufWriter<W>, u64);

impl<W: Write + Send> Output for JsonLines<W> {
    fn write(&mut self, batch: &RecordBatch) -> io::Result<()> {
        let schema = batch.schema();
        let names = schema.fields().iter().map(|field| serde_json::to_string(field.name())).collect::<Result<Vec<_>, _>>()?;
        for row in 0..batch.num_rows() {
            let mut before = '{';
            for (name, column) in names.iter().zip(batch.columns()) {
                write!(self.0, "{before}{name}:")?;
                before = ',';
                json(&mut self.0, column, row)?;
            }
            self.0.write_all(b"}\n")?;
        }
        self.0.flush()?;
        self.1 += batch.num_rows() as u64;
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.0.flush()
    }

    fn rescue(self: Box<Self>) -> io::Result<u64> {
        // What the buffer still holds is part of the batch that failed.
        drop(self.0.into_parts());
        Ok(self.1)
    }
}

/// One value.
fn json(out: &mut impl Write, column: &dyn Array, row: usize) -> io::Result<()> {
    if column.is_null(row) {
        return out.write_all(b"null");
    }
    match column.data_type() {
        DataType::UInt8 => write!(out, "{}", column.as_primitive::<UInt8Type>().value(row)),
        DataType::UInt16 => write!(out, "{}", column.as_primitive::<UInt16Type>().value(row)),
        DataType::UInt32 => write!(out, "{}", column.as_primitive::<UInt32Type>().value(row)),
        DataType::UInt64 => write!(out, "{}", column.as_primitive::<UInt64Type>().value(row)),
        DataType::Int8 => write!(out, "{}", column.as_primitive::<Int8Type>().value(row)),
        DataType::Int16 => write!(out, "{}", column.as_primitive::<Int16Type>().value(row)),
        DataType::Int32 => write!(out, "{}", column.as_primitive::<Int32Type>().value(row)),
        DataType::Int64 => write!(out, "{}", column.as_primitive::<Int64Type>().value(row)),
        DataType::Utf8 => Ok(serde_json::to_writer(out, column.as_string::<i32>().value(row))?),
        DataType::Binary => {
            out.write_all(b"\"")?;
            column.as_binary::<i32>().value(row).iter().try_for_each(|byte| write!(out, "{byte:02x}"))?;
            out.write_all(b"\"")
        }
        DataType::Dictionary(..) => {
            let dictionary = column.as_dictionary::<Int32Type>();
            let key = dictionary.key(row).unwrap_or_default();
            json(out, dictionary.values(), key)
        }
        DataType::List(_) => {
            let items = column.as_list::<i32>().value(row);
            out.write_all(b"[")?;
            for index in 0..items.len() {
                if index > 0 {
                    out.write_all(b",")?;
                }
                json(out, &items, index)?;
            }
            out.write_all(b"]")
        }
        other => Err(io::Error::other(format!("a column of type {other} has no place in JSON here"))),
    }
}
