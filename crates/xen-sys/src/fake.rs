//! A stand-in for Xen's libraries, for tests on machines without Xen: one domain (number 7, named `guest`) with 64 pages of memory, views, a ring
//! and vCPUs that know a handful of instructions. It is compiled from `fake/fake.c` by the machine's C compiler (`cc`), once for each kind; each
//! [`Fake`] is a library file of its own with a state of its own.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_long};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

const SOURCE: &str = include_str!("../fake/fake.c");

/// The domain's number.
pub const DOMAIN: u32 = 7;
/// Pages of memory it has.
pub const GUEST_PAGES: u64 = 64;

/// Which Xen it stands in for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Kind {
    /// The version of the ring: 6 or 7.
    pub vm_event: u32,
    /// The minor number of the release.
    pub minor: u32,
    /// A function that is left out.
    pub without: Option<&'static str>,
}

impl Kind {
    /// The releases whose interfaces differ.
    pub const ALL: [Self; 3] = [Self::new(6, 14), Self::new(7, 17), Self::new(7, 20)];

    /// All functions.
    pub const fn new(vm_event: u32, minor: u32) -> Self {
        Self { vm_event, minor, without: None }
    }
}

/// General-purpose registers, in the order of the ring's structure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the names are the registers'")]
pub enum Reg {
    Rax = 0,
    Rcx = 1,
    Rdx = 2,
    Rbx = 3,
    Rsp = 4,
    Rbp = 5,
    Rdi = 7,
    R15 = 15,
    Rflags = 16,
    Rip = 19,
    Cr3 = 22,
}

/// A response that Xen got.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the names are the structure's")]
pub struct Answer {
    pub version: u32,
    pub flags: u32,
    pub reason: u32,
    pub vcpu: u32,
    pub view: u16,
    pub pad: [u16; 3],
    pub u: [u64; 4],
    pub data: [u8; 16],
}

/// The stand-in.
pub struct Fake {
    library: libloading::Library,
    path: PathBuf,
}

impl std::fmt::Debug for Fake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Fake").field(&self.path).finish()
    }
}

/// Compiles a kind, unless it was compiled before.
fn compile(kind: Kind) -> Result<PathBuf, String> {
    static BUILT: Mutex<Option<HashMap<Kind, PathBuf>>> = Mutex::new(None);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let built = built.get_or_insert_default();
    if let Some(path) = built.get(&kind) {
        return Ok(path.clone());
    }
    // Beside the test program, where it is thrown away with it, and by its content: the next run finds it.
    let mut hasher = std::hash::DefaultHasher::new();
    std::hash::Hash::hash(SOURCE, &mut hasher);
    let of_source = std::hash::Hasher::finish(&hasher);
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let name = format!("xen-fake-{of_source:016x}-{}-{}-{}.so", kind.vm_event, kind.minor, kind.without.unwrap_or("all"));
    let library = program.with_file_name(name);
    if !library.exists() {
        let name = |end: &str| library.with_extension(format!("{}.{end}", std::process::id()));
        let (source, new) = (name("c"), name("new"));
        std::fs::write(&source, SOURCE).map_err(|error| error.to_string())?;
        let mut command = Command::new("cc");
        command.args(["-shared", "-fPIC", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]).arg(&source).arg("-o").arg(&new);
        command.arg(format!("-DVM_EVENT={}", kind.vm_event)).arg(format!("-DMINOR={}", kind.minor));
        command.args(kind.without.map(|function| format!("-DWITHOUT_{function}")));
        let output = command.output().map_err(|error| format!("a C compiler (cc) is needed: {error}"))?;
        // The source is not needed any more, whatever came of it.
        let _ = std::fs::remove_file(&source);
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        std::fs::rename(&new, &library).map_err(|error| error.to_string())?;
    }
    built.insert(kind, library.clone());
    Ok(library)
}

macro_rules! functions {
    ($($(#[$doc:meta])* $visible:vis $name:ident = $symbol:ident($($argument:ident: $type:ty),*) -> $result:ty;)+) => {
        impl Fake {
            $(
                $(#[$doc])*
                $visible fn $name(&self $(, $argument: $type)*) -> $result {
                    type Function = unsafe extern "C" fn($($type),*) -> $result;
                    // SAFETY: the prototype is the one in fake.c.
                    let function = unsafe { self.library.get::<Function>(concat!(stringify!($symbol), "\0").as_bytes()) };
                    match function {
                        // SAFETY: as above; its state is touched by the test's own thread only.
                        Ok(function) => unsafe { function($($argument),*) },
                        Err(error) => unreachable(&error),
                    }
                }
            )+
        }
    };
}

#[expect(clippy::panic, reason = "a test's own support is broken")]
fn unreachable(error: &dyn std::fmt::Display) -> ! {
    panic!("{error}")
}

functions! {
    /// Lets a vCPU execute up to so many instructions; how many it did before it was held.
    pub run = fake_run(vcpu: c_int, instructions: c_int) -> c_int;
    /// Lets every vCPU execute up to so many instructions whenever the tool is about to wait.
    pub automatic = fake_automatic(instructions: c_int) -> ();
    /// Lets every vCPU execute up to so many instructions before each call of any function.
    pub always = fake_always(instructions: c_int) -> ();
    /// Sends a request of any kind.
    pub push = fake_push(vcpu: c_int, reason: u32, paused: c_int) -> ();
    /// The rights of a page in a view; -1 for a hole.
    pub access = fake_access(view: c_int, gfn: c_long) -> c_int;
    /// A byte as a view shows it; -1 for a hole.
    pub byte = fake_byte(view: c_int, pa: c_long) -> c_int;
    /// Puts the producer's index of the ring anywhere.
    pub ring = fake_ring(producer: u32) -> ();
    /// The emulator knows no instruction (1), or those it should (0).
    pub lose_emulator = fake_lose_emulator(lost: c_int) -> ();
    /// How many calls there were, of all functions.
    pub total = fake_total() -> c_long;
    /// Has a call fail by its number, of all functions' calls; the first is 1.
    pub fail_call = fake_fail_call(nth: c_long, errno: c_int) -> ();
    /// From a call on, by its number, nothing is done any more, as by a process that has ended; `last_will` is called at that moment. 0: it lives again.
    pub die_at = fake_die_at(nth: c_long, last_will: extern "C" fn()) -> ();
    /// Forgets how often functions were called.
    pub forget_calls = fake_forget_calls() -> ();
}

functions! {
    raw_knob = fake_knob(name: *const c_char) -> *mut c_long;
    raw_calls = fake_calls(name: *const c_char) -> c_long;
    raw_fail = fake_fail(name: *const c_char, nth: c_long, errno: c_int) -> ();
    raw_name = fake_name(nth: c_long) -> *const c_char;
    raw_set_at = fake_set_at(nth: c_long, knob: *const c_char, value: c_long) -> ();
    raw_state = fake_state(what: *const c_char, index: c_long) -> c_long;
    raw_memory = fake_memory(gfn: c_long) -> *mut u8;
    raw_regs = fake_regs(vcpu: c_int) -> *mut u64;
    raw_push = fake_push_raw(bytes: *const u8) -> ();
    raw_answer = fake_answer(index: c_int) -> *const Answer;
}

fn text(name: &str) -> CString {
    CString::new(name).unwrap_or_default()
}

impl Fake {
    /// Makes one.
    ///
    /// # Panics
    /// Without a C compiler.
    pub fn new(kind: Kind) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let compiled = compile(kind).unwrap_or_else(|error| unreachable(&error));
        // The loader gives each file its own state.
        let path = compiled.with_extension(format!("{}.so", NUMBER.fetch_add(1, Ordering::Relaxed)));
        if let Err(error) = std::fs::copy(&compiled, &path) {
            unreachable(&error);
        }
        // SAFETY: compiled from our own source, which has no initialisers.
        match unsafe { libloading::Library::new(&path) } {
            Ok(library) => Self { library, path },
            Err(error) => unreachable(&error),
        }
    }

    /// The library's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sets one of the knobs of fake.c.
    pub fn set(&self, knob: &str, value: i64) {
        let place = self.raw_knob(text(knob).as_ptr());
        // SAFETY: the function ends the process for a name that is none; else it is the address of a static.
        unsafe { place.write(value) };
    }

    /// What one of the knobs of fake.c is set to.
    pub fn knob(&self, knob: &str) -> i64 {
        let place = self.raw_knob(text(knob).as_ptr());
        // SAFETY: as in `set`.
        unsafe { place.read() }
    }

    /// How often a function was called.
    pub fn calls(&self, function: &str) -> i64 {
        self.raw_calls(text(function).as_ptr())
    }

    /// Has the n-th call of a function from now on fail.
    pub fn fail(&self, function: &str, nth: i64, errno: i32) {
        self.raw_fail(text(function).as_ptr(), nth, errno);
    }

    /// The function of a call, by the call's number; empty if there was no such call.
    pub fn name(&self, nth: i64) -> String {
        let name = self.raw_name(nth);
        if name.is_null() {
            return String::new();
        }
        // SAFETY: not null, so it is one of the strings that fake.c keeps for good.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }

    /// Sets a knob at the begin of a call, by the call's number.
    pub fn set_at(&self, nth: i64, knob: &str, value: i64) {
        self.raw_set_at(nth, text(knob).as_ptr(), value);
    }

    /// Something of the machine's state (see `fake_state` in fake.c).
    pub fn state(&self, what: &str, index: i64) -> i64 {
        self.raw_state(text(what).as_ptr(), index)
    }

    /// Writes guest memory, inside one page.
    ///
    /// # Panics
    /// Outside.
    pub fn write(&self, pa: u64, bytes: &[u8]) {
        assert!(pa >> 12 < GUEST_PAGES && (pa & 0xfff) as usize + bytes.len() <= 4096);
        let page = self.raw_memory((pa >> 12) as c_long);
        // SAFETY: inside the page, checked above.
        let to = unsafe { page.add((pa & 0xfff) as usize) };
        // SAFETY: as above; the bytes are the caller's own.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// A register.
    pub fn reg(&self, vcpu: i32, register: Reg) -> u64 {
        // SAFETY: the structure begins with these registers, in this order.
        let place = unsafe { self.raw_regs(vcpu).add(register as usize) };
        // SAFETY: as above.
        unsafe { place.read() }
    }

    /// Sets a register.
    pub fn set_reg(&self, vcpu: i32, register: Reg, value: u64) {
        // SAFETY: the structure begins with these registers, in this order.
        let place = unsafe { self.raw_regs(vcpu).add(register as usize) };
        // SAFETY: as above.
        unsafe { place.write(value) };
    }

    /// Sends a request that is only bytes, in the layout of the kind.
    pub fn push_raw(&self, bytes: &[u8; 400]) {
        self.raw_push(bytes.as_ptr());
    }

    /// The responses Xen got so far.
    pub fn answers(&self) -> Vec<Answer> {
        let count = self.state("answers", 0) as c_int;
        let answer = |index| {
            let place = self.raw_answer(index);
            // SAFETY: an element of a static array; the structure there is longer than the part that is read.
            unsafe { place.read() }
        };
        (0..count).map(answer).collect()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        // A copy that stays is no harm: it is gone with the test program.
        let _ = std::fs::remove_file(&self.path);
    }
}
