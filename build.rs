//! Builds the demo guest (guests/demo) that the embedded driver ships: a static ELF image, made by the system's C compiler.
//!
//! The guest checks its own text against hashes that are computed here, from the linked text: it is linked twice, the second time
//! with the hashes as symbols that only its read-only data mentions, so that the text stays the same.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const KERNEL: &[&str] = &[
    "entry.S",
    "console.c",
    "memory.c",
    "trap.c",
    "task.c",
    "files.c",
    "services.c",
    "syscall.c",
    "check.c",
    "probe.c",
    "reads.S",
    "main.c",
];
const PROGRAMS: &[&str] = &["user/shell.c", "user/app.c", "user/updater.c", "user/implant.c"];
const FLAGS: &[&str] = &[
    "-std=gnu11",
    "-O2",
    "-g0",
    "-Wall",
    "-Wextra",
    "-ffreestanding",
    "-fno-ident",
    "-fno-pic",
    "-fno-pie",
    "-fno-stack-protector",
    "-fno-strict-aliasing",
    "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none",
    "-mgeneral-regs-only",
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=guests");
    println!("cargo::rerun-if-env-changed=VMITAP_GUEST_CC");
    if env::var_os("CARGO_FEATURE_EMU").is_none() {
        return;
    }
    if let Err(why) = build() {
        let mut message = String::from("the demo guest (guests/demo) could not be built. ");
        for line in why.lines() {
            let _ = write!(message, "{line} | ");
        }
        println!("cargo::error={}", message.trim_end_matches(" | "));
    }
}

fn build() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let compiler = compiler();
    let mut objects = Vec::new();
    for source in KERNEL {
        objects.push(compile(&compiler, &out, source, &["-mcmodel=kernel", "-mno-red-zone"])?);
    }
    for source in PROGRAMS {
        objects.push(compile(&compiler, &out, source, &[])?);
    }
    let first = out.join("demo-first.elf");
    link(&compiler, &objects, &first, &Hashes::default())?;
    let image = fs::read(&first).map_err(|e| format!("{}: {e}", first.display()))?;
    let text = section(&image, ".text").ok_or("the linked image has no .text section")?;
    link(&compiler, &objects, &out.join("demo.elf"), &Hashes::of(text))
}

/// The C compiler for x86-64: `VMITAP_GUEST_CC`, or what every Debian with a Rust toolchain has.
fn compiler() -> String {
    env::var("VMITAP_GUEST_CC").unwrap_or_else(|_| {
        let native = env::consts::ARCH == "x86_64";
        String::from(if native { "cc" } else { "x86_64-linux-gnu-gcc" })
    })
}

fn run(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|e| {
        format!("`{program}` could not be started: {e}\nInstall a C compiler (Debian, Ubuntu: apt install gcc), or name one for x86-64 in VMITAP_GUEST_CC.")
    })?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("`{program}` failed:\n{}", String::from_utf8_lossy(&output.stderr)))
}

fn compile(compiler: &str, out: &Path, source: &str, flags: &[&str]) -> Result<PathBuf, String> {
    let source = Path::new("guests/demo").join(source);
    let stem = source.file_stem().ok_or("a source without a name")?;
    let object = out.join(stem).with_extension("o");
    run(Command::new(compiler).args(FLAGS).args(flags).args(["-Iguests", "-c", "-o"]).arg(&object).arg(&source))?;
    Ok(object)
}

fn link(compiler: &str, objects: &[PathBuf], image: &Path, hashes: &Hashes) -> Result<(), String> {
    let mut command = Command::new(compiler);
    command.args(["-nostdlib", "-static", "-no-pie", "-Wl,-T,guests/demo/demo.ld"]);
    command.args(["-Wl,-z,max-page-size=4096", "-Wl,-z,noexecstack", "-Wl,--build-id=none"]);
    for (name, value) in hashes.symbols() {
        command.arg(format!("-Wl,--defsym=golden_{name}={value:#x}"));
    }
    run(command.arg("-o").arg(image).args(objects))
}

/// What the guest must find when it reads its text; `enum read_kind` in guests/demo/truth.h says how each is read.
#[derive(Default)]
struct Hashes {
    byte: u64,
    aligned: u64,
    unaligned: u64,
    crossing: u64,
    movups: u64,
    scan: u64,
}

impl Hashes {
    fn of(text: &[u8]) -> Self {
        const PAGE: usize = 4096;
        let fitting = text.len().saturating_sub(8);
        Self {
            byte: fnv(text.iter().map(|byte| u64::from(*byte))),
            aligned: fnv(words(text, (0..=fitting).step_by(8))),
            unaligned: fnv(words(text, (1..=fitting).step_by(8))),
            crossing: fnv(words(text, (PAGE - 4..=fitting).step_by(PAGE))),
            // 16 bytes at 8, 24 ... while they fit, as two words each.
            movups: fnv(words(text, (8..=text.len().saturating_sub(16)).step_by(16).flat_map(|at| [at, at + 8]))),
            scan: text.iter().map(|byte| u64::from(*byte == 0xcc)).sum(),
        }
    }

    fn symbols(&self) -> [(&'static str, u64); 6] {
        [
            ("byte", self.byte),
            ("aligned", self.aligned),
            ("unaligned", self.unaligned),
            ("crossing", self.crossing),
            ("movups", self.movups),
            ("scan", self.scan),
        ]
    }
}

fn fnv(values: impl Iterator<Item = u64>) -> u64 {
    values.fold(0xcbf2_9ce4_8422_2325, |hash, value| (hash ^ value).wrapping_mul(0x100_0000_01b3))
}

fn words(text: &[u8], at: impl Iterator<Item = usize>) -> impl Iterator<Item = u64> {
    at.filter_map(|at| u64_at(text, at))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<usize> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?) as usize)
}

/// The bytes of a section of an ELF64 image (ELF specification, "Section Header").
fn section<'a>(image: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let table = u64_at(image, 0x28)? as usize;
    let [low, high, ..] = *image.get(0x3c..)? else { return None };
    let count = usize::from(u16::from_le_bytes([low, high]));
    let [low, high, ..] = *image.get(0x3e..)? else { return None };
    let names = u64_at(image, table + usize::from(u16::from_le_bytes([low, high])) * 64 + 0x18)? as usize;
    (0..count).map(|index| table + index * 64).find_map(|header| {
        let found = image.get(names + u32_at(image, header)?..)?;
        if !found.starts_with(name.as_bytes()) || found.get(name.len()) != Some(&0) {
            return None;
        }
        let start = u64_at(image, header + 0x18)? as usize;
        image.get(start..start + u64_at(image, header + 0x20)? as usize)
    })
}
