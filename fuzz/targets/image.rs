//! ELF images: whatever is in the file, what is accepted keeps the promises of `Image`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmitap::image::Image;

fuzz_target!(|bytes: &[u8]| {
    let Ok(image) = Image::parse("fuzzed", bytes) else { return };
    assert!(!image.segments.is_empty());
    for (index, one) in image.segments.iter().enumerate() {
        let end = one.pa.0.checked_add(one.memory_size).unwrap();
        assert!(one.memory_size > 0 && one.data.len() as u64 <= one.memory_size && end <= 1 << 52);
        assert!(image.segments[..index].iter().all(|other| other.pa.0 + other.memory_size <= one.pa.0 || end <= other.pa.0));
    }
    // The symbols can be asked for and described.
    for symbol in image.symbols.iter().take(64) {
        assert!(image.symbols.get(&symbol.name).is_some());
        let _ = image.symbols.describe(symbol.va);
        let _ = image.symbols.resolve(&symbol.name);
    }
    let _ = image.symbols.nearest("open_file");
});
