//! Journals: a file that is none is refused with a line number, and one that is read can be repaired from without harm.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmitap::driver::VmiRepair;
use vmitap::driver::mock::MockDriver;
use vmitap::session::journal::{GuestId, Remains};
use vmitap::session::repair;

fuzz_target!(|text: &str| {
    let guest = GuestId::new("test", "1").unwrap();
    let Ok(remains) = Remains::parse(text, &guest) else { return };
    let mut driver = MockDriver::new(0x4000, 1);
    let before = driver.snapshot();
    // A guest with nothing in it stays as it is, whatever a journal claims.
    let _ = repair(&mut driver, &remains);
    assert_eq!(driver.snapshot().differences(&before), [] as [String; 0]);
    assert!(driver.additions().unwrap().frames.is_empty());
});
