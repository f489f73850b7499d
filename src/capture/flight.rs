//! The flight recorder: a ring of the last events in a file, which is still there when the tool is gone (Python's `vm.journal`).
//!
//! Not to be taken for the journal of [`crate::session`], which tells what a session has put into a guest so that it can be undone.
//!
//! The file is mapped, so that an event costs some stores and no system call. What a process has stored in a shared mapping belongs to
//! the kernel, which keeps it when the process is killed. It is not forced to the disk: what ends the machine can end it too.
//!
//! All numbers are little-endian. A header of [`HEADER`] bytes, [`NAMES`] names of taps, then the slots, one for each event. A slot says
//! first that it is being written and last that it is written, so that one that was cut off in between is known.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::addr::MemoryAccess;
use crate::error::{Result, VmiError};
use crate::event::{EventReason, VmiEvent};

/// What the file begins with.
const MAGIC: [u8; 16] = *b"vmitap events\n\0\0";
/// Version of the layout.
const VERSION: u32 = 1;
/// Bytes before the names.
const HEADER: usize = 4096;
/// Names there is room for.
const NAMES: usize = 4096;
/// Bytes of a name, with the tap it is of.
const NAME: usize = 64;
/// Bytes of a slot.
const SLOT: usize = 64;
/// Words of a slot.
const WORDS: usize = SLOT / 8;
/// Most slots of a file: a quarter of a GiB.
pub const MAX_SLOTS: u64 = 1 << 22;
/// Where the first slot is.
const SLOTS_AT: usize = HEADER + NAMES * NAME;
/// Longest name of a guest.
const MAX_TARGET: usize = 255;
/// Set in a slot's first word while the slot is being written.
const WRITING: u64 = 1 << 63;

// Offsets in the header.
const VERSION_AT: usize = 16;
const SLOTS_COUNT_AT: usize = 24;
const BEGAN_AT: usize = 32;
const PROCESS_AT: usize = 40;
const CLOSED_AT: usize = 48;
const TARGET_AT: usize = 56;

/// What an event was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
#[expect(missing_docs, reason = "the names are those of `EventReason`")]
pub enum FlightKind {
    Breakpoint = 1,
    MemoryAccess,
    SingleStep,
    WriteControlRegister,
    WriteMsr,
    Cpuid,
    DescriptorAccess,
    GuestRequest,
    PortIo,
    DebugException,
}

/// What became of an event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum FlightOutcome {
    /// Nothing yet: its vCPU stands still, and the session was at work on it.
    Held = 0,
    /// A handler was being called for it, and its vCPU stands still.
    Handling,
    /// It was handed to a loop of the caller's own.
    Raw,
    /// Answered: a read of a hidden page, an INT3 of the guest's own, a step, whatever no tap is for.
    Answered,
    /// Answered: no tap's filter let it pass, or no tap is for that root.
    Filtered,
    /// Answered: it was counted, and captured if the tap captures.
    Counted,
    /// Answered: a handler was called.
    Handled,
    /// Something failed, and its vCPU went on in the clean view.
    Failed,
}

impl FlightKind {
    const ALL: [Self; 10] = [
        Self::Breakpoint,
        Self::MemoryAccess,
        Self::SingleStep,
        Self::WriteControlRegister,
        Self::WriteMsr,
        Self::Cpuid,
        Self::DescriptorAccess,
        Self::GuestRequest,
        Self::PortIo,
        Self::DebugException,
    ];

    /// The name that Python's `VmiEvent.reason` has for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Breakpoint => "breakpoint",
            Self::MemoryAccess => "memory-access",
            Self::SingleStep => "single-step",
            Self::WriteControlRegister => "write-control-register",
            Self::WriteMsr => "write-msr",
            Self::Cpuid => "cpuid",
            Self::DescriptorAccess => "descriptor-access",
            Self::GuestRequest => "guest-request",
            Self::PortIo => "port-io",
            Self::DebugException => "debug-exception",
        }
    }
}

impl FlightOutcome {
    const ALL: [Self; 8] =
        [Self::Held, Self::Handling, Self::Raw, Self::Answered, Self::Filtered, Self::Counted, Self::Handled, Self::Failed];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Handling => "handling",
            Self::Raw => "raw",
            Self::Answered => "answered",
            Self::Filtered => "filtered",
            Self::Counted => "counted",
            Self::Handled => "handled",
            Self::Failed => "failed",
        }
    }
}

fn failed(path: &str, error: &std::io::Error) -> VmiError {
    VmiError::EventJournal { path: path.to_owned(), errno: error.raw_os_error(), reason: error.to_string() }
}

/// The writing side.
pub struct FlightRecorder {
    path: String,
    region: MmapRegion,
    slots: u64,
    /// Events so far.
    total: u64,
    /// The slot of the event in hand.
    in_hand: usize,
    /// What will have become of it once it is answered.
    next_outcome: u64,
    names: usize,
    /// It was said that there is no room for more of them.
    is_full: bool,
}

impl FlightRecorder {
    /// Makes a file for the last `slots` events, which only its owner can read. A file that is there is replaced only if `replace`: it
    /// may be what is left of a crash.
    ///
    /// # Errors
    /// [`VmiError::InvalidArgument`] for a number of slots that is 0 or too large; [`VmiError::EventJournal`] if the file cannot be made.
    pub fn create(path: &str, slots: u64, replace: bool, target: &str, began_unix_ns: u64) -> Result<Self> {
        if !(1..=MAX_SLOTS).contains(&slots) {
            let reason = format!("{slots}: a journal has room for 1 to {MAX_SLOTS} events");
            return Err(VmiError::InvalidArgument { what: "events", reason });
        }
        // Removed and not truncated: who maps the old file would be killed. A device or a folder stays, and is refused below.
        if replace && std::fs::symlink_metadata(path).is_ok_and(|there| there.is_file()) {
            std::fs::remove_file(path).map_err(|error| failed(path, &error))?;
        }
        let made = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
        let file = made.map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => VmiError::EventJournal {
                path: path.to_owned(),
                errno: error.raw_os_error(),
                reason: "a file is there already, perhaps of a crash; it is replaced only if that is asked for".to_owned(),
            },
            _ => failed(path, &error),
        })?;
        let size = SLOTS_AT + slots as usize * SLOT;
        let mapped = Self::fill(&file, slots, target, began_unix_ns).map_err(|error| failed(path, &error)).and_then(|()| {
            let region = MmapRegion::from_file(FileOffset::new(file, 0), size);
            region.map_err(|error| VmiError::EventJournal { path: path.to_owned(), errno: None, reason: error.to_string() })
        });
        let region = mapped.inspect_err(|_| {
            let _ = std::fs::remove_file(path);
        })?;
        Ok(Self { path: path.to_owned(), region, slots, total: 0, in_hand: SLOTS_AT, next_outcome: 0, names: 0, is_full: false })
    }

    /// Writes the header, and zeros for the rest: a store into a hole of a file on a full disk would kill the process.
    fn fill(mut file: &File, slots: u64, target: &str, began_unix_ns: u64) -> std::io::Result<()> {
        let mut header = vec![0; SLOTS_AT];
        let target = truncated(target, MAX_TARGET);
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(place) = header.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        put(0, &MAGIC);
        put(VERSION_AT, &VERSION.to_le_bytes());
        put(SLOTS_COUNT_AT, &slots.to_le_bytes());
        put(BEGAN_AT, &began_unix_ns.to_le_bytes());
        put(PROCESS_AT, &u64::from(std::process::id()).to_le_bytes());
        put(TARGET_AT, &[target.len() as u8]);
        put(TARGET_AT + 1, target.as_bytes());
        file.write_all(&header)?;
        let zeros = vec![0; 1 << 16];
        let mut left = slots as usize * SLOT;
        while left > 0 {
            let now = left.min(zeros.len());
            file.write_all(zeros.get(..now).unwrap_or_default())?;
            left -= now;
        }
        Ok(())
    }

    /// The file's name.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// How many events it has room for.
    pub const fn slots(&self) -> u64 {
        self.slots
    }

    /// How many events it was told of.
    pub const fn total(&self) -> u64 {
        self.total
    }

    /// Stores words one after the other, in this order.
    #[inline]
    fn store<const N: usize>(&self, at: usize, words: [u64; N]) {
        if let Ok(place) = self.region.get_array_ref::<u64>(at, N) {
            for (index, word) in words.into_iter().enumerate() {
                place.store(index, word.to_le());
            }
        }
    }

    /// An event was received.
    #[inline]
    pub fn begin(&mut self, event: &VmiEvent, time_ns: u64) {
        let rip = event.registers.gp.rip;
        let (kind, address, access) = match event.reason {
            EventReason::Breakpoint { .. } => (FlightKind::Breakpoint, rip, MemoryAccess::X),
            EventReason::MemoryAccess { va, access, .. } => (FlightKind::MemoryAccess, va.map_or(0, |va| va.0), access),
            EventReason::SingleStep { .. } => (FlightKind::SingleStep, rip, MemoryAccess::X),
            EventReason::WriteControlRegister { new, .. } => (FlightKind::WriteControlRegister, new, MemoryAccess::NONE),
            EventReason::WriteMsr { msr, .. } => (FlightKind::WriteMsr, msr.into(), MemoryAccess::NONE),
            EventReason::Cpuid { leaf, .. } => (FlightKind::Cpuid, leaf.into(), MemoryAccess::NONE),
            EventReason::DescriptorAccess { .. } => (FlightKind::DescriptorAccess, rip, MemoryAccess::NONE),
            EventReason::DebugException { .. } => (FlightKind::DebugException, rip, MemoryAccess::NONE),
            EventReason::PortIo { port, .. } => (FlightKind::PortIo, port.into(), MemoryAccess::NONE),
            EventReason::GuestRequest => (FlightKind::GuestRequest, rip, MemoryAccess::NONE),
        };
        let at = SLOTS_AT + (self.total % self.slots) as usize * SLOT;
        self.total += 1;
        (self.in_hand, self.next_outcome) = (at, outcome_word(FlightOutcome::Answered, None));
        let facts = u64::from(event.vcpu.0) | (kind as u64) << 16 | u64::from(access.bits()) << 24;
        self.store(at, [self.total | WRITING]);
        // The last word before the others: who reads a slot from the front while it is written finds two numbers that differ.
        fence(Ordering::Release);
        self.store(at + SLOT - 8, [self.total]);
        fence(Ordering::Release);
        self.store(at + 8, [time_ns, address, rip, event.registers.root().0, facts, outcome_word(FlightOutcome::Held, None)]);
        fence(Ordering::Release);
        self.store(at, [self.total]);
    }

    /// What will have become of the event in hand once it is answered.
    #[inline]
    pub fn expect(&mut self, outcome: FlightOutcome, tap: Option<u32>) {
        self.next_outcome = outcome_word(outcome, tap);
    }

    /// Something is known of the event in hand now.
    #[inline]
    pub fn note(&mut self, outcome: FlightOutcome, tap: Option<u32>) {
        self.expect(outcome, tap);
        self.end();
    }

    /// The event in hand is answered.
    #[inline]
    pub fn end(&self) {
        self.store(self.in_hand + 48, [self.next_outcome]);
    }

    /// The name of a tap; once there is no room for more, it is left out.
    pub fn name(&mut self, tap: u32, name: &str) {
        if self.names >= NAMES {
            if !std::mem::replace(&mut self.is_full, true) {
                log::warn!("{}: {NAMES} breakpoints have their names in this journal, later ones have none", self.path);
            }
            return;
        }
        let at = HEADER + self.names * NAME;
        let name = truncated(name, NAME - 5);
        if let (Ok(text), Ok(owner)) = (self.region.get_slice(at + 4, NAME - 4), self.region.get_array_ref::<u32>(at, 1)) {
            text.copy_from(&[name.len() as u8]);
            if let Ok(place) = text.offset(1) {
                place.copy_from(name.as_bytes());
            }
            fence(Ordering::Release);
            owner.store(0, tap.wrapping_add(1).to_le());
            self.names += 1;
        }
    }

    /// The session ends in order.
    pub fn close(self) {
        self.store(CLOSED_AT, [1]);
    }
}

const fn outcome_word(outcome: FlightOutcome, tap: Option<u32>) -> u64 {
    let tap = match tap {
        Some(tap) => tap as u64 + 1,
        None => 0,
    };
    outcome as u64 | tap << 16
}

/// The first `max` bytes at most, whole letters only.
fn truncated(text: &str, max: usize) -> &str {
    (0..=max.min(text.len())).rev().find_map(|end| text.get(..end)).unwrap_or_default()
}

/// One event, as it is in a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlightEvent {
    /// Its number, from 1.
    pub number: u64,
    /// Nanoseconds since the session began.
    pub time_ns: u64,
    /// The vCPU.
    pub vcpu: u16,
    /// What it was.
    pub kind: FlightKind,
    /// Which access was denied, for [`FlightKind::MemoryAccess`].
    pub access: MemoryAccess,
    /// The virtual address that was executed or accessed (0: not known); for others the new value, the number of the MSR, the leaf.
    pub address: u64,
    /// The instruction.
    pub rip: u64,
    /// The page-table root.
    pub root: u64,
    /// What became of it.
    pub outcome: FlightOutcome,
    /// The first tap that wanted it.
    pub tap: Option<u32>,
}

/// What is in a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Flight {
    /// Whose session it was.
    pub target: String,
    /// The process.
    pub process: u64,
    /// When the session began, in nanoseconds since 1970.
    pub began_unix_ns: u64,
    /// How many events there is room for.
    pub slots: u64,
    /// How many there were.
    pub total: u64,
    /// Whether the session ended in order.
    pub is_closed: bool,
    /// Slots that were cut off while they were written, or hold what no session writes.
    pub torn: u64,
    /// The last events, the oldest first.
    pub events: Vec<FlightEvent>,
    /// Names of taps, by number.
    pub names: Vec<(u32, String)>,
}

impl Flight {
    /// Reads a file; also one that is being written.
    ///
    /// # Errors
    /// [`VmiError::EventJournal`] if it cannot be read, or is none.
    pub fn read(path: &str) -> Result<Self> {
        let facts = std::fs::metadata(path).map_err(|error| failed(path, &error))?;
        let refuse = |reason: String| VmiError::EventJournal { path: path.to_owned(), errno: None, reason };
        // Before it is opened: some that are none do not end, or wait for somebody.
        if !facts.is_file() || facts.len() > SLOTS_AT as u64 + MAX_SLOTS * SLOT as u64 {
            return Err(refuse("it is no file that a session writes".to_owned()));
        }
        let bytes = std::fs::read(path).map_err(|error| failed(path, &error))?;
        Self::parse(&bytes).map_err(refuse)
    }

    /// Takes a file's bytes apart.
    ///
    /// # Errors
    /// What is wrong with them, in words.
    pub fn parse(bytes: &[u8]) -> std::result::Result<Self, String> {
        if !bytes.starts_with(&MAGIC) {
            return Err("it does not begin as a journal of events does".to_owned());
        }
        let short = || format!("it is cut off: {} bytes", bytes.len());
        let header = bytes.get(..HEADER).ok_or_else(short)?;
        let version = header.get(VERSION_AT..).and_then(|rest| rest.first_chunk()).map_or(0, |word| u32::from_le_bytes(*word));
        if version != VERSION {
            return Err(format!("its version is {version}, and {VERSION} is the one that is known"));
        }
        let word = |at| word(header, at);
        let slots = word(SLOTS_COUNT_AT);
        if !(1..=MAX_SLOTS).contains(&slots) {
            return Err(format!("it claims room for {slots} events"));
        }
        let body = bytes.get(SLOTS_AT..).ok_or_else(short)?;
        if body.len() as u64 != slots * SLOT as u64 {
            return Err(format!("it is cut off, or has grown: {} bytes for {slots} events", bytes.len()));
        }
        let target_len = usize::from(header.get(TARGET_AT).copied().unwrap_or_default());
        let target = header.get(TARGET_AT + 1..TARGET_AT + 1 + target_len).unwrap_or_default();
        let (mut events, mut torn, mut total) = (Vec::new(), 0, 0);
        for (index, slot) in body.chunks_exact(SLOT).enumerate() {
            match parse_slot(slot, index as u64, slots) {
                Slot::Empty => {}
                Slot::Torn(number) => {
                    torn += 1;
                    total = total.max(number);
                }
                Slot::Whole(event) => {
                    total = total.max(event.number);
                    events.push(event);
                }
            }
        }
        let before = events.len();
        // One that is older than the ring is long can only be there by accident.
        events.retain(|event| event.number + slots > total);
        torn += (before - events.len()) as u64;
        events.sort_unstable_by_key(|event| event.number);
        let names = bytes.get(HEADER..SLOTS_AT).unwrap_or_default().chunks_exact(NAME).map_while(parse_name).collect();
        Ok(Self {
            target: String::from_utf8_lossy(target).into_owned(),
            process: word(PROCESS_AT),
            began_unix_ns: word(BEGAN_AT),
            slots,
            total,
            is_closed: word(CLOSED_AT) == 1,
            torn,
            events,
            names,
        })
    }

    /// The name of a tap.
    pub fn name(&self, tap: u32) -> Option<&str> {
        self.names.iter().find(|(owner, _)| *owner == tap).map(|(_, name)| name.as_str())
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |word| u64::from_le_bytes(*word))
}

enum Slot {
    Empty,
    /// Its number, as far as it can be one.
    Torn(u64),
    Whole(FlightEvent),
}

fn parse_slot(slot: &[u8], index: u64, slots: u64) -> Slot {
    let [first, time_ns, address, rip, root, facts, outcome, last]: [u64; WORDS] = std::array::from_fn(|at| word(slot, at * 8));
    let number = first & !WRITING;
    if first == 0 {
        return Slot::Empty;
    }
    // A number that belongs elsewhere says nothing about how many there were.
    if number == 0 || (number - 1) % slots != index {
        return Slot::Torn(0);
    }
    let kind = FlightKind::ALL.into_iter().find(|kind| *kind as u64 == facts >> 16 & 0xff);
    let became = FlightOutcome::ALL.into_iter().find(|known| *known as u64 == outcome & 0xffff);
    let access = MemoryAccess::from_bits((facts >> 24) as u8);
    let tap = u32::try_from((outcome >> 16).wrapping_sub(1)).ok();
    match (kind, became, access) {
        (Some(kind), Some(outcome_known), Some(access))
            if first == number && last == number && (tap.is_some() || outcome >> 16 == 0) =>
        {
            let vcpu = facts as u16;
            Slot::Whole(FlightEvent { number, time_ns, vcpu, kind, access, address, rip, root, outcome: outcome_known, tap })
        }
        _ => Slot::Torn(number),
    }
}

fn parse_name(entry: &[u8]) -> Option<(u32, String)> {
    let owner = u32::from_le_bytes(*entry.first_chunk()?).checked_sub(1)?;
    let text = entry.get(5..5 + usize::from(*entry.get(4)?))?;
    Some((owner, String::from_utf8_lossy(text).into_owned()))
}
