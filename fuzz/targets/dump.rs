//! Memory dumps: whatever is in the file, it is refused or can be looked at, in bounded time and memory, and every error is a typed one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmitap::arch::amd64::AddressContext;
use vmitap::core::VmiCore;
use vmitap::driver::dump::DumpDriver;
use vmitap::driver::{VmiInfo, VmiRegisters};
use vmitap::{Pa, Va, VcpuId, VmiError};

fuzz_target!(|bytes: &[u8]| {
    let dump = match DumpDriver::new("fuzzed", Box::new(bytes.to_vec())) {
        Ok(dump) => dump,
        Err(error) => {
            assert!(matches!(error, VmiError::Image { .. }), "{error}");
            return;
        }
    };
    let info = dump.info().clone();
    assert!(info.memory_size > 0 && info.memory_size <= 1 << 52 && info.memory_size % 4096 == 0);
    let mut roots = vec![AddressContext::new(Pa(0)), AddressContext { root: Pa(0x1000), levels: 5 }];
    for vcpu in 0..info.vcpus {
        match dump.registers(VcpuId(vcpu)) {
            Ok(registers) => roots.push(AddressContext::from(&registers)),
            Err(error) => assert!(!dump.caps().registers && matches!(error, VmiError::NotSupported { .. }), "{error}"),
        }
    }
    roots.truncate(6);
    let vmi = VmiCore::new(Box::new(dump));
    let known = |error: &VmiError| {
        use VmiError::{Image, NotInDump, OutOfRange, StringTooLong, Translation};
        // A page that cannot be unpacked is found when it is read.
        matches!(error, Image { .. } | NotInDump { .. } | OutOfRange { .. } | StringTooLong { .. } | Translation { .. })
    };
    for pa in [0, 0xffd, 0x1000, info.memory_size - 4096, info.memory_size - 2, info.memory_size, 1 << 51, u64::MAX] {
        let read = vmi.read_bytes(Pa(pa), 5000).err().into_iter().chain(vmi.read_pa_u32(Pa(pa)).err());
        for error in read {
            assert!(known(&error), "{error}");
            if let VmiError::NotInDump { pa: missing, len } = error {
                assert!(missing.0 >= pa && len > 0 && vmi.read_pa_u8(missing).is_err());
            }
        }
    }
    // As long as the dump claims to be.
    if let Err(error) = vmi.read_bytes(Pa(0), info.memory_size as usize) {
        assert!(known(&error), "{error}");
    }
    for context in roots {
        for va in [0, 0x1000, 0xffff_8000_0000_0ff8, 0x7fff_ffff_f000] {
            for error in [vmi.translate(Va(va), context).err(), vmi.read_cstr(Va(va), context, 300).err()] {
                assert!(error.as_ref().is_none_or(known), "{error:?}");
            }
        }
    }
});
