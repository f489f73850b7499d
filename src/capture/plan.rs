//! Plans: what is read of the guest at a hit, in one pass while the vCPU is held.

use crate::addr::Va;
use crate::arch::amd64::AddressContext;
use crate::driver::VmiDriver;
use crate::error::{Result, VmiError};

use super::filter::{Program, Type};
use super::machine::{Machine, Outcome, Scene, load};

/// Longest byte range or string of one column, in bytes.
pub const MAX_BYTES: u32 = 65_536;
/// Deepest backtrace.
pub const MAX_FRAMES: u8 = 64;
/// Most columns of one plan.
pub const MAX_COLUMNS: usize = 256;
/// Bytes of a string that are read in one go.
const STEP: usize = 256;

/// What a column holds; every value can be missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A number of so many bytes: 1, 2, 4 or 8.
    Unsigned(u8),
    /// The same with a sign.
    Signed(u8),
    /// Bytes as they are.
    Bytes,
    /// Text; what is no UTF-8 is shown as backslash escapes.
    Text,
    /// Addresses.
    Addresses,
}

/// Where a column's value comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A number, of which the lowest bytes are kept.
    Number {
        /// The number.
        program: Program,
        /// 1, 2, 4 or 8.
        bytes: u8,
    },
    /// Bytes in memory.
    Bytes {
        /// Their address.
        at: Program,
        /// How many.
        len: u32,
    },
    /// A string in memory that ends in a zero byte; of a longer one the first `max` bytes.
    Cstr {
        /// Its address.
        at: Program,
        /// Bytes that are looked at.
        max: u32,
    },
    /// A little-endian UTF-16 string that ends in a zero unit; of a longer one the first `max` bytes.
    Utf16 {
        /// Its address.
        at: Program,
        /// Bytes that are looked at.
        max: u32,
    },
    /// Return addresses, the nearest first: that on top of the stack, then by frame pointers as long as they are sound.
    Backtrace {
        /// How many at most.
        depth: u8,
    },
}

/// A named column.
#[derive(Clone, Debug)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Where its value comes from.
    pub source: Source,
}

impl Column {
    /// What it holds.
    pub fn kind(&self) -> Kind {
        match &self.source {
            Source::Number { program, bytes } => match program.result() {
                Type::Word { signed: true } => Kind::Signed(*bytes),
                _ => Kind::Unsigned(*bytes),
            },
            Source::Bytes { .. } => Kind::Bytes,
            Source::Cstr { .. } | Source::Utf16 { .. } => Kind::Text,
            Source::Backtrace { .. } => Kind::Addresses,
        }
    }

    fn check(&self) -> std::result::Result<(), String> {
        let is_address = |at: &Program| !at.asks() && matches!(at.result(), Type::Word { .. });
        let fits = |len: u32| (1..=MAX_BYTES).contains(&len);
        let good = match &self.source {
            Source::Number { program, bytes } => is_address(program) && [1, 2, 4, 8].contains(bytes),
            Source::Bytes { at, len } => is_address(at) && fits(*len),
            Source::Cstr { at, max } => is_address(at) && fits(*max),
            Source::Utf16 { at, max } => is_address(at) && fits(*max) && max.is_multiple_of(2),
            Source::Backtrace { depth } => (1..=MAX_FRAMES).contains(depth),
        };
        if good { Ok(()) } else { Err(format!("column {:?}: no number, or a length out of range", self.name)) }
    }
}

/// The columns of one tap.
#[derive(Clone, Debug)]
pub struct Plan {
    columns: Box<[Column]>,
}

/// A value of a row; bytes lie in the row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cell {
    /// It could not be read.
    Null,
    /// A number.
    Word(u64),
    /// So many bytes of the row, from there on.
    Span {
        /// The first.
        from: u32,
        /// How many.
        len: u32,
    },
}

/// The values of one plan at one hit. Kept to be filled again without allocating.
#[derive(Clone, Debug, Default)]
pub struct Row {
    cells: Vec<Cell>,
    bytes: Vec<u8>,
}

impl Row {
    /// Forgets the values.
    pub fn clear(&mut self) {
        self.cells.clear();
        self.bytes.clear();
    }

    /// The values, in the order of the columns.
    pub fn cells(&self) -> &[Cell] {
        &self.cells
    }

    /// The bytes of a [`Cell::Span`].
    pub fn span(&self, from: u32, len: u32) -> &[u8] {
        self.bytes.get(from as usize..).and_then(|rest| rest.get(..len as usize)).unwrap_or_default()
    }

    /// One value more.
    pub fn push(&mut self, cell: Cell) {
        self.cells.push(cell);
    }
}

impl Plan {
    /// A plan of these columns.
    ///
    /// # Errors
    /// [`VmiError::InvalidArgument`] for a length out of range, an address that is a condition, a name that is empty or there twice, or
    /// too many columns.
    pub fn new(columns: Vec<Column>) -> Result<Self> {
        let refuse = |reason| Err(VmiError::InvalidArgument { what: "capture", reason });
        if columns.len() > MAX_COLUMNS {
            return refuse(format!("{} columns; {MAX_COLUMNS} are the most", columns.len()));
        }
        for (index, column) in columns.iter().enumerate() {
            let again = columns.iter().take(index).any(|other| other.name == column.name);
            if column.name.is_empty() || again {
                return refuse(format!("the column {:?} has no name, or that of another", column.name));
            }
            if let Err(reason) = column.check() {
                return refuse(reason);
            }
        }
        Ok(Self { columns: columns.into() })
    }

    /// Its columns.
    pub fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// Appends the value of each column to `row`. What cannot be read is missing.
    pub fn read<D: VmiDriver + ?Sized>(&self, scene: &Scene<'_, D>, row: &mut Row) {
        for column in &self.columns {
            let cell = match &column.source {
                Source::Number { program, .. } => number(program, scene).map_or(Cell::Null, Cell::Word),
                Source::Bytes { at, len } => bytes(at, *len, scene, row),
                Source::Cstr { at, max } => string(at, *max, 1, scene, row),
                Source::Utf16 { at, max } => string(at, *max, 2, scene, row),
                Source::Backtrace { depth } => backtrace(*depth, scene, row),
            };
            row.push(cell);
        }
    }
}

fn number<D: VmiDriver + ?Sized>(program: &Program, scene: &Scene<'_, D>) -> Option<u64> {
    match Machine::default().run(program, &mut [], scene) {
        Outcome::Value(value) => value,
        Outcome::Ask(_) => None,
    }
}

fn bytes<D: VmiDriver + ?Sized>(at: &Program, len: u32, scene: &Scene<'_, D>, row: &mut Row) -> Cell {
    let Some(at) = number(at, scene) else { return Cell::Null };
    let from = row.bytes.len();
    row.bytes.resize(from + len as usize, 0);
    let there = row.bytes.get_mut(from..).unwrap_or_default();
    if scene.vmi.is_none_or(|vmi| vmi.read(Va(at), AddressContext::from(scene.registers.all()), there).is_err()) {
        row.bytes.truncate(from);
        return Cell::Null;
    }
    Cell::Span { from: from as u32, len }
}

/// A string of units of `unit` bytes; those of two bytes become UTF-8.
fn string<D: VmiDriver + ?Sized>(at: &Program, max: u32, unit: usize, scene: &Scene<'_, D>, row: &mut Row) -> Cell {
    let Some(at) = number(at, scene) else { return Cell::Null };
    let from = row.bytes.len();
    if read_string(Va(at), max as usize, unit, scene, &mut row.bytes).is_none() {
        row.bytes.truncate(from);
        return Cell::Null;
    }
    if unit == 2 {
        let (units, _) = row.bytes.get(from..).unwrap_or_default().as_chunks::<2>();
        let units = units.iter().map(|unit| u16::from_le_bytes(*unit));
        let text: String = char::decode_utf16(units).map(|letter| letter.unwrap_or(char::REPLACEMENT_CHARACTER)).collect();
        row.bytes.truncate(from);
        row.bytes.extend_from_slice(text.as_bytes());
    }
    Cell::Span { from: from as u32, len: (row.bytes.len() - from) as u32 }
}

fn read_string<D: VmiDriver + ?Sized>(va: Va, max: usize, unit: usize, scene: &Scene<'_, D>, out: &mut Vec<u8>) -> Option<()> {
    let (begin, context) = (out.len(), AddressContext::from(scene.registers.all()));
    let mut searched = begin;
    while out.len() - begin < max {
        let have = out.len() - begin;
        let at = va.checked_add(have as u64)?;
        let len = (max - have).min(STEP).min(at.page_rest() as usize);
        out.resize(begin + have + len, 0);
        scene.vmi?.read(at, context, out.get_mut(begin + have..)?).ok()?;
        let mut units = out.get(searched..)?.chunks_exact(unit);
        if let Some(index) = units.position(|unit| unit.iter().all(|byte| *byte == 0)) {
            out.truncate(searched + index * unit);
            return Some(());
        }
        // A unit that a page's end cut in two is looked at again.
        searched = begin + (out.len() - begin) / unit * unit;
    }
    Some(())
}

fn backtrace<D: VmiDriver + ?Sized>(depth: u8, scene: &Scene<'_, D>, row: &mut Row) -> Cell {
    let from = row.bytes.len();
    let mut frame = scene.registers.all().gp.rbp;
    let mut last = scene.registers.all().gp.rsp;
    let mut next = load(scene, Va(last), 8);
    for _ in 0..depth {
        let Some(address) = next.filter(|address| *address != 0) else { break };
        row.bytes.extend_from_slice(&address.to_le_bytes());
        // Frames lie one above the other, aligned: anything else is a register used for something else.
        if frame <= last || !frame.is_multiple_of(8) {
            break;
        }
        let above = Va(frame).checked_add(8);
        next = above.and_then(|at| load(scene, at, 8));
        last = frame;
        frame = load(scene, Va(frame), 8).unwrap_or(0);
    }
    Cell::Span { from: from as u32, len: (row.bytes.len() - from) as u32 }
}
