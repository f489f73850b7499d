//! Journals of events: a file that is none is refused, and what is read of one fits into its ring.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmitap::capture::Flight;

/// Where the slots begin.
const SLOTS: usize = 4096 + 4096 * 64;

fuzz_target!(|bytes: &[u8]| {
    let _ = Flight::parse(bytes);
    // A quarter of a MiB of names between the header and the slots would keep the fuzzer from the slots.
    let (header, slots) = bytes.split_at(bytes.len().min(512));
    let mut file = vec![0; SLOTS];
    file[..header.len()].copy_from_slice(header);
    file.extend_from_slice(slots);
    if let Ok(flight) = Flight::parse(&file) {
        assert!(flight.events.len() as u64 + flight.torn <= flight.slots);
        assert!(flight.events.iter().all(|event| event.number <= flight.total && event.number + flight.slots > flight.total));
    }
});
