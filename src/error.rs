//! The crate's error: one variant per failure a caller can act on, with the data in it.

use crate::addr::{Gfn, MemoryAccess, Pa, Va, VcpuId, View};

/// A result whose error is [`VmiError`].
pub type Result<T, E = VmiError> = std::result::Result<T, E>;

/// Why a page walk ended without an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TranslationFault {
    /// The entry at this level is not present. Level 1 is the page table, 4 the PML4, 5 the PML5.
    NotPresent {
        /// The level whose entry was read.
        level: u8,
        /// Where the entry is.
        entry_pa: Pa,
    },
    /// The address does not repeat its sign bit.
    NonCanonical,
    /// A table or the page itself lies beyond guest memory.
    BeyondMemory {
        /// The level of the entry that could not be read, or 0 for the page itself.
        level: u8,
        /// The physical address that was wanted.
        pa: Pa,
    },
    /// A reserved bit is set in the entry.
    ReservedBit {
        /// The level of the entry.
        level: u8,
        /// Where the entry is.
        entry_pa: Pa,
    },
}

impl std::fmt::Display for TranslationFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotPresent { level, entry_pa } => write!(f, "the level-{level} entry at {entry_pa} is not present"),
            Self::NonCanonical => f.write_str("the address is not canonical"),
            Self::BeyondMemory { level: 0, pa } => write!(f, "the page at {pa} is beyond guest memory"),
            Self::BeyondMemory { level, pa } => write!(f, "the level-{level} entry at {pa} is beyond guest memory"),
            Self::ReservedBit { level, entry_pa } => write!(f, "the level-{level} entry at {entry_pa} has a reserved bit set"),
        }
    }
}

/// Everything that can go wrong, as data.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VmiError {
    /// A virtual address has no translation.
    #[error("cannot translate {va} under root {root}: {fault}")]
    Translation {
        /// The address.
        va: Va,
        /// The root of the page tables (CR3 without its flag bits).
        root: Pa,
        /// Why.
        fault: TranslationFault,
    },
    /// A physical address range does not lie in guest memory.
    #[error("{len} bytes at physical address {pa} reach beyond guest memory, which ends at {end}")]
    OutOfRange {
        /// First address of the range.
        pa: Pa,
        /// Bytes wanted.
        len: u64,
        /// First address past guest memory.
        end: Pa,
    },
    /// A dump does not hold an address: it was left out, or there was no memory.
    #[error("the dump does not hold physical address {pa}, from where {len} bytes are wanted")]
    NotInDump {
        /// The first address that is not there.
        pa: Pa,
        /// Bytes wanted from there on, to the end of the read or, for a virtual address, of the page. What follows may be there.
        len: u64,
    },
    /// The view does not exist.
    #[error("view {view} does not exist")]
    ViewNotFound {
        /// The view.
        view: View,
    },
    /// The default view cannot be used for this: nothing may be hidden in it.
    #[error("{op} needs a view other than the default one, in which nothing can be hidden")]
    DefaultView {
        /// The operation.
        op: &'static str,
    },
    /// The vCPU does not exist.
    #[error("vCPU {vcpu} does not exist: the guest has {count}")]
    VcpuNotFound {
        /// The vCPU.
        vcpu: VcpuId,
        /// How many there are.
        count: u16,
    },
    /// The access rights cannot be set on that page.
    #[error("access {access} cannot be set on frame {gfn} in view {view}")]
    BadAccess {
        /// The view.
        view: View,
        /// The frame.
        gfn: Gfn,
        /// The rights.
        access: MemoryAccess,
    },
    /// No breakpoint is at that address of that view.
    #[error("no breakpoint at physical address {pa} in view {view}")]
    BreakpointNotFound {
        /// The address.
        pa: Pa,
        /// The view.
        view: View,
    },
    /// The same breakpoint exists with another `global` flag.
    #[error("a breakpoint with the same view, address and key exists at {va} with another `global` flag")]
    BreakpointConflict {
        /// The address.
        va: Va,
    },
    /// The driver cannot do this here.
    #[error("the {driver} driver does not offer {capability}{}", what_follows(capability))]
    NotSupported {
        /// The driver's name.
        driver: &'static str,
        /// The capability's name, in the field's words.
        capability: &'static str,
    },
    /// A driver call failed.
    #[error("{op} failed: {detail} (errno {errno})")]
    Driver {
        /// The operation.
        op: &'static str,
        /// The error number the system or the library gave; 0 if it gave none.
        errno: i32,
        /// What the library said of it.
        detail: String,
    },
    /// The target could not be attached to.
    #[error("cannot attach to {target:?}: {reason}")]
    Attach {
        /// What was asked for.
        target: String,
        /// Why not.
        reason: String,
        /// What to do about it, in one sentence; may be empty.
        hint: String,
    },
    /// A file is not what it was given as.
    #[error("{what} is not usable: {reason}")]
    Image {
        /// Which file or buffer.
        what: String,
        /// What is wrong, and where.
        reason: String,
    },
    /// A symbol is not known.
    #[error("symbol {name:?} is not known{}", nearest_names(nearest))]
    SymbolNotFound {
        /// What was looked for.
        name: String,
        /// The names that are most like it, best first.
        nearest: Vec<String>,
    },
    /// A string had no end within the limit.
    #[error("no end of string within {limit} bytes at {va}")]
    StringTooLong {
        /// Where it begins.
        va: Va,
        /// How many bytes were looked at.
        limit: usize,
    },
    /// An event was answered that is not waiting for an answer.
    #[error("vCPU {vcpu} has no event that waits for an answer")]
    NoPendingEvent {
        /// The vCPU.
        vcpu: VcpuId,
    },
    /// The guest is gone.
    #[error("the guest is gone: {reason}")]
    DomainGone {
        /// What happened to it.
        reason: String,
    },
    /// A journal cannot be read or written, or is none. Nothing was changed in the guest.
    #[error("the journal {path} is not usable: {reason}")]
    Journal {
        /// The file.
        path: String,
        /// What is wrong with it, and where.
        reason: String,
    },
    /// Another session with this guest is alive.
    #[error("a session with this guest is alive and holds its journal {path}")]
    JournalInUse {
        /// Its journal.
        path: String,
    },
    /// A session with this guest ended without a word, and has left something in it.
    #[error("a session with this guest was killed and may have left something in it, as {path} says")]
    JournalLeft {
        /// Its journal.
        path: String,
    },
    /// A journal of events cannot be made or read, or a file is none.
    #[error("the journal of events {path} is not usable: {reason}")]
    EventJournal {
        /// The file.
        path: String,
        /// The system's error number, where there is one.
        errno: Option<i32>,
        /// What is wrong with it.
        reason: String,
    },
    /// A value given by the caller makes no sense.
    #[error("{what}: {reason}")]
    InvalidArgument {
        /// Which argument.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A recording could not be written.
    #[error("the recording {path} could not be written: {reason}; {rows} rows are in it")]
    Recording {
        /// The file; empty for one in memory.
        path: String,
        /// The system's error number, where there is one.
        errno: Option<i32>,
        /// What happened.
        reason: String,
        /// Rows in the file up to the last whole batch.
        rows: u64,
    },
    /// An operation failed, and putting things back as they were failed too.
    #[error("{cause}; and undoing it failed too, which left behind: {left_behind}")]
    UndoFailed {
        /// What failed first.
        cause: Box<VmiError>,
        /// What is still changed.
        left_behind: String,
    },
}

impl VmiError {
    /// This error, and that undoing failed too and left that behind. In a guest that is gone nothing is left behind.
    pub(crate) fn and_left(self, what: &[String]) -> Self {
        if what.is_empty() || matches!(self, Self::DomainGone { .. }) {
            return self;
        }
        Self::UndoFailed { cause: Box::new(self), left_behind: what.join(", ") }
    }
}

/// What somebody who asked for something else is to know: page tables are found through registers.
fn what_follows(capability: &str) -> &'static str {
    if capability == "registers" { ", so virtual addresses need a root" } else { "" }
}

fn nearest_names(nearest: &[String]) -> String {
    if nearest.is_empty() { String::new() } else { format!("; the nearest are {}", nearest.join(", ")) }
}
