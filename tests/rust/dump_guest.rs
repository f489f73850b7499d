//! Dumps of the demo guest, after it has run for a while: read through each format they are the guest.

use std::path::PathBuf;
use std::time::Duration;

use vmitap::arch::amd64::{AddressContext, Registers};
use vmitap::core::VmiCore;
use vmitap::driver::Wait;
use vmitap::driver::open::{OpenOptions, Target, open};
use vmitap::{Pa, Va, VcpuId, VmiError};

use crate::dump_files::*;
use crate::guest::library;

const PAGE: usize = 4096;
const VCPUS: u16 = 2;

/// The guest's memory, its vCPUs, and some addresses of it with what is there.
struct Guest {
    memory: Vec<u8>,
    vcpus: Vec<Registers>,
    places: Vec<(Va, Pa, Vec<u8>)>,
}

fn guest() -> Guest {
    let options = OpenOptions {
        vcpus: Some(VCPUS),
        command_line: "rounds=2 check=0".to_owned(),
        libunicorn: Some(library()),
        ..OpenOptions::default()
    };
    let mut demo = open(&Target::Demo, &options).unwrap();
    while demo.driver.wait(Duration::from_secs(1)).unwrap() != Wait::Idle {}
    let vmi = VmiCore::new(demo.driver);
    let mut memory = vec![0; vmi.driver().info().memory_size as usize];
    vmi.read_pa(Pa(0), &mut memory).unwrap();
    let vcpus: Vec<_> = (0..VCPUS).map(|vcpu| vmi.driver().registers(VcpuId(vcpu)).unwrap()).collect();
    let context = AddressContext::from(&vcpus[0]);
    let names = ["open_file", "check_licence", "truth"];
    let places = names.map(|name| {
        let va = demo.symbols.resolve(name).unwrap();
        (va, vmi.translate(va, context).unwrap(), vmi.read_bytes((va, context), 64).unwrap().to_vec())
    });
    Guest { memory, vcpus, places: places.to_vec() }
}

#[test]
fn a_dump_of_a_demo_guest_is_the_guest_in_each_format() {
    let Guest { memory, vcpus, places } = guest();
    assert_eq!(places[2].2[..8], *b"vmttruth", "the guest has run");
    let size = memory.len();
    // A hole where the guest has nothing: the page at 0xa0000, as on a PC.
    let (low, high) = (&memory[..0xa_0000], &memory[0x10_0000..]);
    let pages: Vec<_> = memory.chunks(PAGE).enumerate().rev().map(|(number, page)| (number as u64, page)).collect();
    let runs = [(0, low.len() as u64, low), (0x10_0000, high.len() as u64, high)];
    let ways = [Packing::Zlib, Packing::Snappy, Packing::None];
    let packed: Vec<_> = memory.chunks(PAGE).enumerate().map(|(number, page)| (number as u64, ways[number % 3], page)).collect();
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("dump-guest-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for (format, file) in [
        ("raw", memory.clone()),
        ("LiME", lime(&[(0, low), (0x10_0000, high)])),
        ("ELF core", elf_core(&runs, &qemu_notes(&vcpus))),
        ("Xen core", xen_core(&pages, &vcpus)),
        ("kdump", kdump(packed.len() as u64, &packed, &qemu_notes(&vcpus))),
    ] {
        let path = folder.join("guest.dump");
        std::fs::write(&path, &file).unwrap();
        let mut options = OpenOptions::default();
        let target = Target::parse(&format!("dump:{}", path.display())).unwrap();
        let opened = open(&target, &options).unwrap();
        assert_eq!((opened.driver.version().as_str(), opened.driver.info().driver), (format, "dump"));
        assert!(opened.symbols.is_empty());
        let vmi = VmiCore::new(opened.driver);
        assert_eq!(vmi.driver().info().memory_size, size as u64);
        for from in (0..0xa_0000).chain(0x10_0000..size).step_by(PAGE) {
            let page = vmi.read_bytes(Pa(from as u64), PAGE).unwrap();
            assert!(page[..] == memory[from..from + PAGE], "{format}: the page at {from:#x}");
        }
        if format == "raw" || format == "LiME" {
            assert!(matches!(vmi.driver().registers(VcpuId(0)), Err(VmiError::NotSupported { .. })));
        } else {
            let read = vmi.driver().registers(VcpuId(1)).unwrap();
            assert_eq!((read.gp, read.cr3, read.cr4), (vcpus[1].gp, vcpus[1].cr3, vcpus[1].cr4), "{format}");
            assert_eq!(AddressContext::from(&vmi.driver().registers(VcpuId(0)).unwrap()), AddressContext::from(&vcpus[0]));
        }
        let context = AddressContext::from(&vcpus[0]);
        for (va, pa, bytes) in &places {
            assert_eq!(vmi.translate(*va, context).unwrap(), *pa, "{format}");
            assert_eq!(vmi.read_bytes((*va, context), bytes.len()).unwrap()[..], bytes[..], "{format}");
        }
        options.vcpus = Some(1);
        let refused = open(&target, &options).map(|_| ());
        assert!(matches!(refused, Err(VmiError::InvalidArgument { what: "vcpus", .. })), "{refused:?}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn opening_a_dump_refuses_what_a_dump_does_not_have_before_it_looks_at_the_file() {
    let target = Target::Dump(PathBuf::from("/no/such/file"));
    for (options, option) in [
        (OpenOptions { memory: Some(4096), ..OpenOptions::default() }, "memory"),
        (OpenOptions { vcpus: Some(1), ..OpenOptions::default() }, "vcpus"),
        (OpenOptions { command_line: "x".to_owned(), ..OpenOptions::default() }, "cmdline"),
    ] {
        let refused = open(&target, &options).map(|_| ());
        assert!(matches!(refused, Err(VmiError::InvalidArgument { what, .. }) if what == option), "{refused:?}");
    }
    assert!(matches!(open(&target, &OpenOptions::default()), Err(VmiError::Attach { .. })));
}
