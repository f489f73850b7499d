//! Page walks, reads and strings through hostile page tables: typed errors, bounded work, and nothing read that is not the guest's.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmitap::arch::amd64::AddressContext;
use vmitap::core::VmiCore;
use vmitap::driver::mock::MockDriver;
use vmitap::{Pa, Va, VmiError};

const MEMORY: u64 = 0x8000;

fuzz_target!(|bytes: &[u8]| {
    let Some((head, memory)) = bytes.split_at_checked(18) else { return };
    let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().unwrap());
    let mut driver = MockDriver::new(MEMORY, 1);
    let memory = &memory[..memory.len().min(MEMORY as usize)];
    driver.poke(Pa(0), memory).unwrap();
    let context = AddressContext { root: Pa(word(0)), levels: 4 + (head[16] & 1) };
    let (va, limit) = (Va(word(8)), usize::from(head[17]) * 64);
    let vmi = VmiCore::new(Box::new(driver));
    let known = |error: &VmiError| {
        matches!(error, VmiError::Translation { .. } | VmiError::OutOfRange { .. } | VmiError::StringTooLong { .. })
    };
    match vmi.translate(va, context) {
        Ok(pa) => {
            // An address that is mapped can be read, and only the guest's own memory is.
            let mut byte = [0];
            assert_eq!(vmi.read_pa(pa, &mut byte).is_ok(), pa.0 < MEMORY);
        }
        Err(error) => assert!(known(&error), "{error}"),
    }
    let mut buf = vec![0; limit];
    for error in [
        vmi.read(va, context, &mut buf).err(),
        vmi.read_cstr(va, context, limit).err(),
        vmi.read_utf16(va, context, limit).err(),
    ] {
        assert!(error.as_ref().is_none_or(known), "{error:?}");
    }
});
