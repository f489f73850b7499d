//! Who may use whom. Left is used by right, never the reverse:
//!
//! ```text
//! addr, bytes, error <- arch <- event <- driver traits <- driver::{mock, emu, xen, dump}
//!                                            ^
//!                               core <- tap, ptm, capture <- session <- python
//! ```
//!
//! And where `unsafe` may be. `tap`, `ptm` and `capture` do not know each other, concrete drivers neither, and only `driver` names a concrete one.

use std::fs;
use std::path::{Path, PathBuf};

/// The modules in the order of the arrows: each may use those of the lines above, and of its own line only itself.
const LAYERS: &[&[&str]] = &[
    &["addr"],
    &["bytes", "error"],
    &["arch", "symbols", "undo"],
    &["event", "image"],
    &["driver"],
    &["core"],
    &["rights"],
    &["tap", "ptm", "capture"],
    &["session"],
    &["python"],
];
/// Modules of `driver` that are one driver each.
const DRIVERS: &[&str] = &["mock", "emu", "xen", "dump"];
/// What nothing below `session` may know (drivers wait and wake, so they know time and threads), and who below it may all the same.
const FOREIGN: &[(&str, &[&str])] =
    &[("pyo3", &[]), ("std::thread", &["driver"]), ("Instant::now", &["driver"]), ("SystemTime", &["driver"])];

/// Where `unsafe` may be; all else that is compiled into the library, its benchmarks and its fuzz targets has none.
const UNSAFE: &[&str] = &["src/driver/emu/sys.rs", "crates/xen-sys/"];

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

/// The source without comments, and without the test modules (which end a file here): those may name anything.
fn code(source: &str) -> String {
    let end = source.find("#[cfg(test)]\nmod ").unwrap_or(source.len());
    let lines = source[..end].lines().map(|line| line.split("//").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

/// Cuts `a, b::{c, d}` at the commas that are in no brace.
fn split_group(group: &str) -> Vec<&str> {
    let (mut depth, mut from, mut parts) = (0, 0, Vec::new());
    for (at, letter) in group.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&group[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&group[from..]);
    parts
}

/// All paths that `rest` (what follows `crate::`) begins with: groups are taken apart. Two segments of each are enough.
fn expand(rest: &str, prefix: &[String], paths: &mut Vec<Vec<String>>) {
    let rest = rest.trim_start();
    if prefix.len() == 2 {
        paths.push(prefix.to_vec());
    } else if let Some(group) = rest.strip_prefix('{') {
        let mut depth = 1;
        let end = group.find(|letter| {
            depth += i32::from(letter == '{') - i32::from(letter == '}');
            depth == 0
        });
        for part in split_group(&group[..end.unwrap_or(group.len())]) {
            expand(part, prefix, paths);
        }
    } else {
        let len = rest.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(rest.len());
        let mut path = prefix.to_vec();
        path.extend((len > 0).then(|| rest[..len].to_owned()));
        match rest[len..].trim_start().strip_prefix("::") {
            Some(more) if len > 0 => expand(more, &path, paths),
            _ => paths.push(path),
        }
    }
}

/// Every path from the crate's root that the code of the module `here` names, through `crate` or `super`.
fn named(here: &[&str], code: &str) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        // `$crate::` in a macro counts too; a longer word that ends in `crate` does not.
        if !code[..at].ends_with(|letter: char| letter.is_alphanumeric() || letter == '_') {
            expand(&code[at + "crate::".len()..], &[], &mut paths);
        }
    }
    for (at, _) in code.match_indices("super::") {
        if code[..at].ends_with("super::") {
            continue;
        }
        let ups = code[at..].split("super::").take_while(|part| part.is_empty()).count();
        let rest = &code[at + ups * "super::".len()..];
        let base: Vec<String> = here.iter().take(here.len().saturating_sub(ups)).map(ToString::to_string).collect();
        expand(rest, &base[..base.len().min(2)], &mut paths);
    }
    paths
}

/// The arrows of one file that go the wrong way, in words. `file` is relative to `src`.
fn violations(file: &str, source: &str) -> Vec<String> {
    let stem = file.trim_end_matches(".rs");
    let here: Vec<&str> = stem.split('/').filter(|part| *part != "mod").collect();
    let (module, inner) = (here[0], here.get(1).copied().unwrap_or_default());
    if module == "lib" {
        return Vec::new();
    }
    let Some(from) = layer(module) else {
        return vec![format!("{file}: the module `{module}` has no place in the layers of tests/rust/layering.rs")];
    };
    let code = code(source);
    let mut found = Vec::new();
    for path in named(&here, &code) {
        let Some(target) = path.first() else { continue };
        let deeper = path.get(1).map_or("", String::as_str);
        // What is no module is a re-export of the crate's root, like `crate::Pa`: those are all of the lowest layers.
        let Some(to) = layer(target) else { continue };
        if target != module && to >= from {
            found.push(format!("{file}: `{module}` uses `{target}`"));
        } else if target == "driver"
            && DRIVERS.contains(&deeper)
            && (module != "driver" || (DRIVERS.contains(&inner) && inner != deeper))
        {
            found.push(format!("{file}: `{}` uses the concrete driver `{deeper}`", here.join("::")));
        }
    }
    let below_session = layer("session").is_some_and(|session| from < session);
    for (foreign, allowed) in FOREIGN.iter().filter(|_| below_session) {
        if code.contains(foreign) && !allowed.contains(&module) {
            found.push(format!("{file}: `{module}` knows `{foreign}`, which is for `session` and above"));
        }
    }
    found.dedup();
    found
}

/// The lines of one file with `unsafe` that may not be there, also of an attribute that allows it. `file` is relative to the repository.
fn unsafe_lines(file: &str, source: &str) -> Vec<String> {
    if UNSAFE.iter().any(|place| file.starts_with(place)) {
        return Vec::new();
    }
    let lines = source.lines().map(|line| line.split("//").next().unwrap_or_default()).enumerate();
    let is_word = |line: &str, at: usize| !line[..at].ends_with(|letter: char| letter.is_alphanumeric() || letter == '_');
    lines
        .filter(|(_, line)| line.match_indices("unsafe").any(|(at, _)| is_word(line, at)))
        .map(|(number, line)| format!("{file}:{}: {}", number + 1, line.trim()))
        .collect()
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_arrow_between_modules_goes_the_right_way() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&root, &mut files);
    assert!(files.len() > 10, "only {files:?}");
    let mut found = Vec::new();
    for file in files {
        let name = file.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
        found.extend(violations(&name, &fs::read_to_string(&file).unwrap()));
    }
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn unsafe_code_is_only_where_it_may_be() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = vec![root.join("build.rs")];
    for folder in ["src", "benches", "crates", "fuzz/targets"] {
        rust_files(&root.join(folder), &mut files);
    }
    let mut found = Vec::new();
    let mut has_some = Vec::new();
    for file in files {
        let name = file.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        let source = fs::read_to_string(&file).unwrap();
        found.extend(unsafe_lines(&name, &source));
        has_some.extend(unsafe_lines("elsewhere", &source).first().map(|_| name));
    }
    assert!(found.is_empty(), "\n{}", found.join("\n"));
    for place in UNSAFE {
        assert!(has_some.iter().any(|name| name.starts_with(place)), "{place} needs no leave any more");
    }
}

#[test]
fn planted_unsafe_code_is_caught_however_it_is_written() {
    for source in [
        "let x = unsafe { *p };",
        "unsafe fn f() {}",
        "unsafe impl Send for T {}",
        "#[unsafe(no_mangle)]",
        "#![allow(unsafe_code)]",
        "    #[expect(unsafe_code, reason = \"it is quick\")]",
        "unsafe\n{ *p }",
    ] {
        for file in ["src/core.rs", "src/driver/emu/memory.rs", "src/driver/xen/bell.rs", "crates/other/src/lib.rs", "build.rs"] {
            assert_eq!(unsafe_lines(file, source).len(), 1, "{file}: {source}");
        }
        for file in ["src/driver/emu/sys.rs", "crates/xen-sys/src/load.rs"] {
            assert!(unsafe_lines(file, source).is_empty(), "{file}");
        }
    }
    assert!(unsafe_lines("src/core.rs", "// unsafe { }\n/// unsafe\nlet is_unsafe = 1;").is_empty());
}

#[test]
fn a_planted_violation_is_caught_however_it_is_written() {
    for (file, source) in [
        ("addr.rs", "use crate::error::Result;"),
        ("error.rs", "use crate::bytes::GuestBytes;"),
        ("arch/amd64/paging.rs", "fn f(_: &crate::event::VmiEvent) {}"),
        ("core.rs", "use super::session::Session;"),
        ("core.rs", "use crate::{addr::Pa, tap::{shadow::Shadow, step}};"),
        ("core.rs", "use crate::{\n    addr::Pa,\n    tap::step,\n};"),
        ("core.rs", "use crate::tap;"),
        ("tap/shadow.rs", "use crate::ptm::PageTableMonitor;"),
        ("tap/mod.rs", "use crate::driver::mock::MockDriver;"),
        ("tap/shadow.rs", "use super::super::capture::Plan;"),
        ("ptm/mod.rs", "use crate::tap::TapController;"),
        ("capture/plan.rs", "use crate::session::Session;"),
        ("session/mod.rs", "use crate::driver::{VmiDriver, emu};"),
        ("driver/mod.rs", "use crate::core::VmiCore;"),
        ("driver/mod.rs", "use super::core::VmiCore;"),
        ("driver/xen/ring.rs", "use crate::driver::emu::Memory;"),
        ("driver/xen/ring.rs", "use super::super::emu::Memory;"),
        ("tap/mod.rs", "use pyo3::prelude::*;"),
        ("core.rs", "let now = std::time::Instant::now();"),
        ("unheard_of.rs", ""),
    ] {
        assert_eq!(violations(file, source).len(), 1, "{file}: {source}: {:?}", violations(file, source));
    }
}

#[test]
fn what_is_allowed_is_not_complained_about() {
    for (file, source) in [
        ("lib.rs", "pub use crate::python::thing;"),
        ("addr.rs", "// use crate::tap;\n/// [`crate::driver::VmiDriver`]"),
        ("core.rs", "use crate::addr::Pa;\n#[cfg(test)]\nmod tests {\n    use crate::driver::mock::MockDriver;\n}"),
        ("core.rs", "use mycrate::tap;"),
        ("tap/shadow.rs", "use super::step::Step;\nuse crate::{core::VmiCore, Pa};"),
        ("session/hook.rs", "use crate::{tap, ptm, capture};\nuse std::time::Instant;\nlet t = Instant::now();"),
        ("driver/open.rs", "use super::emu;\nuse crate::driver::xen::Xen;"),
        ("driver/emu/memory.rs", "use super::super::VmiRead;\nuse crate::driver::emu::cpu;"),
        ("python/mod.rs", "use pyo3::prelude::*;\nuse crate::session;"),
    ] {
        assert_eq!(violations(file, source), [] as [String; 0], "{file}: {source}");
    }
}
