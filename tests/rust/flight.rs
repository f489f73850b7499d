//! The flight recorder: what is in its file, when it wraps, when a write is cut off, and when the file is hostile.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use proptest::prelude::*;
use vmitap::arch::amd64::Registers;
use vmitap::capture::{Flight, FlightKind, FlightOutcome, FlightRecorder, MAX_SLOTS};
use vmitap::event::{EventReason, VmiEvent};
use vmitap::{Gfn, MemoryAccess, Pa, Va, VcpuId, VmiError};

use crate::lines::{listen, logged};

const HEADER: usize = 4096 + 4096 * 64;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("flight-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self) -> String {
        self.0.join("last.events").to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn event(rip: u64, reason: EventReason) -> VmiEvent {
    let mut registers = Registers { cr3: 0x1000, ..Registers::default() };
    registers.gp.rip = rip;
    VmiEvent { vcpu: VcpuId(1), view: None, registers, reason }
}

fn hit(rip: u64) -> VmiEvent {
    event(rip, EventReason::Breakpoint { gfn: Gfn(1), insn_len: 1 })
}

fn record(path: &str, slots: u64, events: u64) -> FlightRecorder {
    let mut flight = FlightRecorder::create(path, slots, false, "web", 77).unwrap();
    for n in 1..=events {
        flight.begin(&hit(0x1000 + n), n * 10);
        flight.expect(FlightOutcome::Counted, Some(3));
        flight.end();
    }
    flight
}

#[test]
fn the_last_events_are_there_with_what_became_of_them_before_anybody_closes_the_file() {
    let folder = Folder::new("last");
    let mut flight = record(&folder.file(), 8, 3);
    flight.name(3, "open_file");
    flight.begin(&hit(0x2000), 99);
    flight.note(FlightOutcome::Handling, Some(4));
    flight.expect(FlightOutcome::Handled, Some(4));
    let seen = Flight::read(&folder.file()).unwrap();
    assert_eq!((seen.target.as_str(), seen.began_unix_ns, seen.slots, seen.total, seen.torn), ("web", 77, 8, 4, 0));
    assert_eq!(seen.process, u64::from(std::process::id()));
    assert!(!seen.is_closed);
    let last = seen.events[3];
    assert_eq!((last.number, last.time_ns, last.rip, last.root, last.vcpu), (4, 99, 0x2000, 0x1000, 1));
    assert_eq!((last.kind, last.outcome, last.tap), (FlightKind::Breakpoint, FlightOutcome::Handling, Some(4)));
    assert_eq!((seen.events[0].outcome, seen.name(3), seen.name(4)), (FlightOutcome::Counted, Some("open_file"), None));
    flight.end();
    assert_eq!(Flight::read(&folder.file()).unwrap().events[3].outcome, FlightOutcome::Handled);
    flight.close();
    assert!(Flight::read(&folder.file()).unwrap().is_closed);
    assert_eq!(fs::metadata(folder.file()).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn each_kind_of_event_says_what_it_is_about() {
    let folder = Folder::new("kinds");
    let mut flight = FlightRecorder::create(&folder.file(), 8, false, "", 0).unwrap();
    let denied = |va| EventReason::MemoryAccess { pa: Pa(5), va, access: MemoryAccess::RW, len: 4 };
    for reason in [
        denied(Some(Va(0x5005))),
        denied(None),
        EventReason::SingleStep { gfn: None },
        EventReason::WriteMsr { msr: 0x174, old: 0, new: 1 },
    ] {
        flight.begin(&event(0x10, reason), 0);
        flight.end();
    }
    let seen = Flight::read(&folder.file()).unwrap();
    let facts: Vec<_> = seen.events.iter().map(|each| (each.kind, each.address, each.access, each.outcome, each.tap)).collect();
    let answered = FlightOutcome::Answered;
    assert_eq!(
        facts,
        [
            (FlightKind::MemoryAccess, 0x5005, MemoryAccess::RW, answered, None),
            (FlightKind::MemoryAccess, 0, MemoryAccess::RW, answered, None),
            (FlightKind::SingleStep, 0x10, MemoryAccess::X, answered, None),
            (FlightKind::WriteMsr, 0x174, MemoryAccess::NONE, answered, None),
        ]
    );
}

#[test]
fn a_ring_that_is_full_keeps_the_last_and_counts_all() {
    let folder = Folder::new("wrap");
    for (slots, events) in [(1, 5), (7, 7), (7, 8), (7, 1000)] {
        let flight = record(&folder.file(), slots, events);
        let seen = Flight::read(&folder.file()).unwrap();
        assert_eq!((seen.total, seen.torn, flight.total()), (events, 0, events));
        let numbers: Vec<u64> = seen.events.iter().map(|each| each.number).collect();
        assert_eq!(numbers, (events.saturating_sub(slots) + 1..=events).collect::<Vec<_>>());
        assert!(seen.events.iter().all(|each| each.rip == 0x1000 + each.number && each.time_ns == each.number * 10));
        fs::remove_file(folder.file()).unwrap();
    }
}

/// What a slot holds after each store of its writer, in order: the process can be killed after any of them.
#[test]
fn an_event_that_was_cut_off_at_any_store_is_known_and_the_others_are_whole() {
    let folder = Folder::new("torn");
    let flight = record(&folder.file(), 4, 6);
    let before = fs::read(folder.file()).unwrap();
    let whole = record(&folder.0.join("other").to_string_lossy(), 4, 7);
    whole.end();
    let after = fs::read(folder.0.join("other")).unwrap();
    let at = HEADER + (7 - 1) % 4 * 64;
    let word = |index: usize| at + index * 8..at + index * 8 + 8;
    let writing = (7_u64 | 1 << 63).to_le_bytes();
    for stores in 1..=8 {
        let mut cut = before.clone();
        cut[word(0)].copy_from_slice(&writing);
        for index in [7, 1, 2, 3, 4, 5, 6].into_iter().take(stores - 1) {
            cut[word(index)].copy_from_slice(&after[word(index)]);
        }
        let seen = Flight::parse(&cut).unwrap();
        assert_eq!((seen.total, seen.torn), (7, 1), "after {stores} stores");
        assert_eq!(seen.events.iter().map(|each| each.number).collect::<Vec<_>>(), [4, 5, 6], "after {stores} stores");
    }
    // Somebody who reads along and whose copy of the first word is an old one.
    let mut mixed = before.clone();
    mixed[word(7)].copy_from_slice(&after[word(7)]);
    assert_eq!(Flight::parse(&mixed).unwrap().torn, 1);
    drop(flight);
}

#[test]
fn what_is_no_journal_of_events_is_refused_with_the_reason() {
    let folder = Folder::new("hostile");
    record(&folder.file(), 4, 6).close();
    let good = fs::read(folder.file()).unwrap();
    let with = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        bad
    };
    for (bad, reason) in [
        (Vec::new(), "does not begin"),
        (b"vmitap journal 1\n".to_vec(), "does not begin"),
        (good[..100].to_vec(), "cut off"),
        (good[..HEADER - 1].to_vec(), "cut off"),
        (good[..good.len() - 1].to_vec(), "cut off"),
        ([good.clone(), vec![0; 64]].concat(), "has grown"),
        (with(16, &2_u32.to_le_bytes()), "version is 2"),
        (with(24, &0_u64.to_le_bytes()), "room for 0"),
        (with(24, &u64::MAX.to_le_bytes()), "room for 18446744073709551615"),
    ] {
        fs::write(folder.file(), &bad).unwrap();
        match Flight::read(&folder.file()) {
            Err(VmiError::EventJournal { path, errno: None, reason: said }) => {
                assert_eq!(path, folder.file());
                assert!(said.contains(reason), "{said}");
            }
            other => panic!("{reason}: {other:?}"),
        }
    }
    // A name of a guest that claims to be longer than it is, and one that is no text.
    assert_eq!(Flight::parse(&with(56, &[255])).unwrap().target.len(), 255);
    assert_eq!(Flight::parse(&with(57, &[0xff])).unwrap().target, "\u{fffd}eb");
    for path in ["/dev/zero", "/proc", "/nowhere/at/all"] {
        assert!(matches!(Flight::read(path), Err(VmiError::EventJournal { .. })), "{path}");
    }
}

#[test]
fn a_slot_that_no_session_writes_is_left_out_and_counted() {
    let folder = Folder::new("slots");
    record(&folder.file(), 4, 4).close();
    let good = fs::read(folder.file()).unwrap();
    let slot = |at: usize, bytes: [u8; 8]| {
        let mut bad = good.clone();
        bad[HEADER + 64 + at..HEADER + 64 + at + 8].copy_from_slice(&bytes);
        Flight::parse(&bad).unwrap()
    };
    for (at, value) in [
        (0, 3_u64),                            // a number of another place
        (0, 1 << 63),                          // no number at all
        (40, 0x00ff_0001),                     // no kind of event
        (40, 0xff01_0001),                     // no kind of access
        (48, 99),                              // no outcome
        (48, (u64::from(u32::MAX) + 2) << 16), // no tap
        (56, 77),                              // its end is another's
    ] {
        let seen = slot(at, value.to_le_bytes());
        assert_eq!((seen.torn, seen.total, seen.events.len()), (1, 4, 3), "{value:#x} at {at}");
    }
    // One that is whole, and of another place.
    let mut bad = good.clone();
    for at in [0, 56] {
        bad[HEADER + 64 + at] = 3;
    }
    let seen = Flight::parse(&bad).unwrap();
    assert_eq!((seen.torn, seen.total, seen.events.len()), (1, 4, 3));
    // One that claims to be the newest by far makes the others old.
    let mut bad = good.clone();
    let far = (1_u64 << 62) + 2;
    for at in [0, 56] {
        bad[HEADER + 64 + at..HEADER + 64 + at + 8].copy_from_slice(&far.to_le_bytes());
    }
    let seen = Flight::parse(&bad).unwrap();
    assert_eq!((seen.torn, seen.total, seen.events.len()), (3, far, 1));
}

#[test]
fn what_is_left_of_a_crash_is_replaced_only_when_that_is_asked_for() {
    let folder = Folder::new("replace");
    let old = record(&folder.file(), 4, 2);
    let refused = FlightRecorder::create(&folder.file(), 4, false, "", 0).map(drop);
    assert!(matches!(refused, Err(VmiError::EventJournal { errno: Some(17), .. })), "{refused:?}");
    assert_eq!(Flight::read(&folder.file()).unwrap().total, 2);
    let new = FlightRecorder::create(&folder.file(), 4, true, "", 0).unwrap();
    // Whoever still writes the old one writes into a file without a name.
    old.close();
    assert_eq!(Flight::read(&folder.file()).unwrap().total, 0);
    new.close();
}

#[test]
fn a_journal_that_cannot_be_made_leaves_nothing() {
    let folder = Folder::new("unmade");
    for slots in [0, MAX_SLOTS + 1, u64::MAX] {
        let refused = FlightRecorder::create(&folder.file(), slots, false, "", 0).map(drop);
        assert!(matches!(refused, Err(VmiError::InvalidArgument { what: "events", .. })), "{refused:?}");
    }
    let link = folder.0.join("link");
    std::os::unix::fs::symlink("/dev/full", &link).unwrap();
    let link = link.to_str().unwrap();
    for path in ["/nowhere/last.events", "/proc/last.events", "/dev/full", link, folder.0.to_str().unwrap()] {
        for replace in [false, true] {
            let refused = FlightRecorder::create(path, 4, replace, "", 0).map(drop);
            assert!(matches!(refused, Err(VmiError::EventJournal { errno: Some(_), .. })), "{path}, {replace}: {refused:?}");
        }
    }
    assert!(!fs::metadata("/dev/full").unwrap().is_file(), "a device is not replaced");
    fs::remove_file(link).unwrap();
    assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 0);
}

#[test]
fn names_are_cut_off_at_whole_letters_and_there_is_an_end_to_them() {
    listen();
    let folder = Folder::new("names");
    let target = "\u{e9}".repeat(200);
    let mut flight = FlightRecorder::create(&folder.file(), 1, false, &target, 0).unwrap();
    flight.name(0, &format!("{}\u{e9}", "x".repeat(58)));
    for tap in 1..5000 {
        flight.name(tap, "f");
    }
    let seen = Flight::read(&folder.file()).unwrap();
    assert_eq!(seen.target, "\u{e9}".repeat(127));
    assert_eq!((seen.name(0), seen.names.len()), (Some("x".repeat(58).as_str()), 4096));
    assert_eq!((seen.name(4095), seen.name(4096)), (Some("f"), None));
    let lines = logged();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].ends_with("4096 breakpoints have their names in this journal, later ones have none"), "{lines:?}");
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_or_refused(slots in 1_u64..6, spoilt in prop::collection::vec((0_usize..6 * 64, any::<u8>()), 0..40), header in prop::collection::vec((16_usize..80, any::<u8>()), 0..3)) {
        let mut bytes = vec![0; HEADER + slots as usize * 64];
        bytes[..16].copy_from_slice(b"vmitap events\n\0\0");
        bytes[16] = 1;
        bytes[24] = slots as u8;
        for (at, value) in spoilt {
            if let Some(byte) = bytes.get_mut(HEADER + at) {
                *byte = value;
            }
        }
        for (at, value) in header {
            bytes[at] = value;
        }
        if let Ok(seen) = Flight::parse(&bytes) {
            prop_assert!(seen.events.len() as u64 + seen.torn <= seen.slots);
            prop_assert!(seen.events.is_sorted_by_key(|each| each.number));
        }
    }
}
