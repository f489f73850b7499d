//! The page that Xen shares with a listener, whatever is in it: no request that was not announced, one answer each, and every event decoded.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmitap::driver::xen::ring::Ring;
use vmitap::driver::xen::{Layout, decode};
use vmitap::event::EventReason;
use xen_sys::Mapping;

const PAGE: usize = 4096;

// A byte that chooses the version, the number of indices of the producer, the indices, and the page.
fuzz_target!(|bytes: &[u8]| {
    let Some((&[version, count], rest)) = bytes.split_first_chunk() else { return };
    let Some((indices, contents)) = rest.split_at_checked(usize::from(count) * 4) else { return };
    let layout = if version & 1 == 0 { Layout::V6 } else { Layout::V7 };
    let page = Mapping::private(1).unwrap();
    page.write(0, &contents[..contents.len().min(PAGE)]).unwrap();
    let mut ring = Ring::new(page, layout);
    let mut open = 0;
    for index in indices.chunks_exact(4) {
        ring.page().store(0, u32::from_le_bytes(index.try_into().unwrap())).unwrap();
        while let Ok(Some(request)) = ring.take() {
            open += 1;
            assert!(open <= layout.slots());
            if let Some(event) = decode(&request, layout) {
                // The bits of a segment's limit are not among its attributes, and an access is of some kind or none.
                assert_eq!(event.registers.cs.attributes & 0x0f00, 0);
                if let EventReason::MemoryAccess { pa, len, .. } = event.reason {
                    assert_eq!((pa.gfn().pa(pa.0), len), (pa, 0));
                }
            }
            if request[16] & 1 == 0 {
                assert!(ring.answer(&request));
                open -= 1;
            }
        }
        assert_eq!(ring.unanswered(), open);
    }
    for _ in 0..open {
        assert!(ring.answer(&[0; vmitap::driver::xen::MAX_EVENT]));
    }
    assert!(!ring.answer(&[0; vmitap::driver::xen::MAX_EVENT]));
});
