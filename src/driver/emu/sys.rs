//! The one place that speaks to libunicorn, and the only unsafe code of the embedded driver.
//!
//! The library is opened at run time; nothing of it is linked or shipped. What leaves this file is safe: an [`Engine`] is one
//! emulated processor over a [`Ram`], a [`Context`] a copy of its state, [`Hooks`] what the processor asks while it runs.

#![expect(unsafe_code, reason = "the FFI boundary: every block names the invariant it rests on")]

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use memmap2::{MmapOptions, MmapRaw};

use crate::error::{Result, VmiError};

use super::abi;
pub use super::abi::{Table, code};
pub use super::asks::{Access, Fill, Hooks};
pub(super) use super::reg;

type Uc = c_void;

/// The oldest release whose behaviour was measured, as `uc_version` packs it.
const OLDEST: (u32, u32, u32) = (2, 1, 4);

macro_rules! library {
    ($($name:ident: $type:ty),* $(,)?) => {
        /// libunicorn, opened.
        pub struct Library {
            $($name: $type,)*
            path: PathBuf,
            version: (u32, u32, u32),
            // Dropped last: the function pointers above point into it.
            _handle: libloading::Library,
        }

        impl Library {
            /// Opens the library at `path` and binds what the driver needs.
            pub fn open(path: &Path) -> Result<Arc<Self>> {
                let unusable = |reason: String| VmiError::Image { what: path.display().to_string(), reason };
                // SAFETY: loading runs the library's initialisers; the caller named this file as libunicorn, whose initialisers
                // only set up its own tables.
                let handle = unsafe { libloading::Library::new(path) }.map_err(|error| unusable(error.to_string()))?;
                // SAFETY: `uc_version` has had this prototype since the first release.
                let version = unsafe { handle.get::<unsafe extern "C" fn(*mut u32, *mut u32) -> u32>(b"uc_version\0") }
                    .map_err(|error| unusable(error.to_string()))?;
                // SAFETY: both pointers may be null; the packed version is returned.
                let packed = unsafe { version(std::ptr::null_mut(), std::ptr::null_mut()) };
                let version = (packed >> 24, packed >> 16 & 0xff, packed >> 8 & 0xff);
                if version < OLDEST || version.0 != OLDEST.0 {
                    return Err(unusable(format!(
                        "it is Unicorn {}.{}.{}; vmitap needs {}.{}.{} or a later release of {}.x",
                        version.0, version.1, version.2, OLDEST.0, OLDEST.1, OLDEST.2, OLDEST.0
                    )));
                }
                $(
                    // SAFETY: the prototype is the one unicorn.h of the releases accepted above declares.
                    let $name = *unsafe { handle.get::<$type>(concat!(stringify!($name), "\0").as_bytes()) }
                        .map_err(|error| unusable(error.to_string()))?;
                )*
                Ok(Arc::new(Self { $($name,)* path: path.to_owned(), version, _handle: handle }))
            }
        }
    };
}

library! {
    uc_open: unsafe extern "C" fn(c_int, c_int, *mut *mut Uc) -> c_int,
    uc_close: unsafe extern "C" fn(*mut Uc) -> c_int,
    uc_strerror: unsafe extern "C" fn(c_int) -> *const c_char,
    uc_reg_read: unsafe extern "C" fn(*mut Uc, c_int, *mut c_void) -> c_int,
    uc_reg_write: unsafe extern "C" fn(*mut Uc, c_int, *const c_void) -> c_int,
    uc_emu_start: unsafe extern "C" fn(*mut Uc, u64, u64, u64, usize) -> c_int,
    uc_emu_stop: unsafe extern "C" fn(*mut Uc) -> c_int,
    uc_hook_add: unsafe extern "C" fn(*mut Uc, *mut usize, c_int, *mut c_void, *mut c_void, u64, u64, ...) -> c_int,
    uc_mem_map_ptr: unsafe extern "C" fn(*mut Uc, u64, usize, u32, *mut c_void) -> c_int,
    uc_ctl: unsafe extern "C" fn(*mut Uc, u32, ...) -> c_int,
    uc_context_alloc: unsafe extern "C" fn(*mut Uc, *mut *mut c_void) -> c_int,
    uc_context_free: unsafe extern "C" fn(*mut c_void) -> c_int,
    uc_context_size: unsafe extern "C" fn(*mut Uc) -> usize,
    uc_context_save: unsafe extern "C" fn(*mut Uc, *mut c_void) -> c_int,
    uc_context_restore: unsafe extern "C" fn(*mut Uc, *mut c_void) -> c_int,
    uc_context_reg_read: unsafe extern "C" fn(*mut c_void, c_int, *mut c_void) -> c_int,
    uc_context_reg_write: unsafe extern "C" fn(*mut c_void, c_int, *const c_void) -> c_int,
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Library").field("path", &self.path).field("version", &self.version).finish_non_exhaustive()
    }
}

impl Library {
    /// Where it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Major, minor and patch number.
    pub const fn version(&self) -> (u32, u32, u32) {
        self.version
    }

    fn check(&self, op: &'static str, code: c_int) -> Result<()> {
        if code == code::OK { Ok(()) } else { Err(self.error(op, code)) }
    }

    /// The engine's own words for an error code.
    pub fn error(&self, op: &'static str, code: c_int) -> VmiError {
        // SAFETY: returns a static string for every code.
        let text = unsafe { (self.uc_strerror)(code) };
        // SAFETY: a static NUL-terminated string of the library, which is still open.
        let words = NonNull::new(text.cast_mut()).map(|text| unsafe { CStr::from_ptr(text.as_ptr()) });
        let detail = words.map_or_else(String::new, |words| words.to_string_lossy().into_owned());
        VmiError::Driver { op, errno: code, detail }
    }
}

/// Guest RAM and the frames behind it. Shared with engines, which access it through raw pointers: only copies go in and out.
pub struct Ram {
    map: MmapRaw,
}

impl Ram {
    /// Zeroed memory of `len` bytes, a multiple of the page size. The system gives pages when they are first used.
    pub fn new(len: usize) -> Result<Self> {
        let failed = |error: std::io::Error| VmiError::Driver {
            op: "allocating guest memory",
            errno: error.raw_os_error().unwrap_or(0),
            detail: error.to_string(),
        };
        let map = MmapOptions::new().len(len).no_reserve_swap().map_anon().map_err(failed)?;
        Ok(Self { map: map.into() })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    #[inline]
    fn at(&self, pa: u64, len: usize) -> Option<*mut u8> {
        let start = usize::try_from(pa).ok()?;
        if start.checked_add(len)? > self.map.len() {
            return None;
        }
        // SAFETY: `start` is inside the mapping, checked above.
        Some(unsafe { self.map.as_mut_ptr().add(start) })
    }

    /// Copies bytes out; `None` if the range is not all inside.
    #[inline]
    pub fn read(&self, pa: u64, buf: &mut [u8]) -> Option<()> {
        let from = self.at(pa, buf.len())?;
        // SAFETY: `at` checked the range; no engine runs while Rust code of its thread does, so nothing writes meanwhile.
        unsafe { std::ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len()) };
        Some(())
    }

    /// Copies bytes in; `None`, and nothing done, if the range is not all inside.
    #[inline]
    pub fn write(&self, pa: u64, bytes: &[u8]) -> Option<()> {
        let to = self.at(pa, bytes.len())?;
        // SAFETY: as in `read`; references into the mapping are never made.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Some(())
    }

    /// Reads a little-endian 64-bit word at a multiple of 8.
    #[inline]
    pub fn read_u64(&self, pa: u64) -> Option<u64> {
        let from = self.at(pa & !7, 8)?;
        // SAFETY: in range (`at`). It is aligned too, since the mapping is page-aligned, but nothing rests on that here.
        Some(u64::from_le(unsafe { from.cast::<u64>().read_unaligned() }))
    }

    /// Writes a little-endian 64-bit word at a multiple of 8.
    #[inline]
    pub fn write_u64(&self, pa: u64, value: u64) -> Option<()> {
        let to = self.at(pa & !7, 8)?;
        // SAFETY: as in `read_u64`.
        unsafe { to.cast::<u64>().write_unaligned(value.to_le()) };
        Some(())
    }
}

/// Which job an engine has: that decides which hooks it gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EngineKind {
    /// Runs guest code at full speed.
    Main,
    /// Runs one instruction at a time.
    Stepper,
}

/// Bytes of the stack that [`Engine::go`] runs on: as much as the engine has where it runs in a thread of its own.
const STACK: usize = 2 << 20;
const INT3_VECTOR: u32 = 3;

/// What an engine that stands at an INT3 is to do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Go {
    On,
    Stop,
}

type Run = Coroutine<Go, (), c_int>;

/// One emulated processor.
pub struct Engine<H: Hooks> {
    uc: NonNull<Uc>,
    library: Arc<Library>,
    // Boxed: the engine holds a pointer to it.
    hooks: Box<Installed<H>>,
    // The run that stands at an INT3. Ended before the engine is closed (`drop`), so it is never dropped half-way.
    standing: Option<Run>,
    // For the next run.
    stack: Option<DefaultStack>,
    // Keeps the mapped memory alive.
    _ram: Rc<Ram>,
}

struct Installed<H> {
    hooks: H,
    library: Arc<Library>,
    /// How the run under way comes back without ending; null unless [`Engine::go`] began it. On that run's stack.
    way_back: Cell<*const Yielder<Go, ()>>,
}

/// An engine as its hooks see it, while it runs.
#[derive(Clone, Copy)]
pub struct EngineRef<'a> {
    uc: *mut Uc,
    library: &'a Library,
    user: *mut c_void,
    code_callback: *mut c_void,
}

impl EngineRef<'_> {
    /// The current privilege level: the low bits of CS.
    #[inline]
    pub fn cpl(self) -> u8 {
        let mut cs = 0_u64;
        // SAFETY: `uc` is open while its hooks run; CS takes at most 8 bytes.
        unsafe { (self.library.uc_reg_read)(self.uc, reg::CS, (&raw mut cs).cast()) };
        (cs & 3) as u8
    }

    /// RFLAGS.
    pub fn rflags(self) -> u64 {
        let mut flags = 0_u64;
        // SAFETY: as in `cpl`.
        unsafe { (self.library.uc_reg_read)(self.uc, reg::EFLAGS, (&raw mut flags).cast()) };
        flags
    }

    /// Has [`Hooks::code`] called for instructions that begin in `first..=last`. Holds for code translated from now on.
    pub fn watch_code(self, first: u64, last: u64) {
        let mut hook = 0_usize;
        // SAFETY: `uc` is open; the callback has the prototype of HOOK_CODE and `user` outlives the engine (Engine's fields).
        let code = unsafe {
            (self.library.uc_hook_add)(self.uc, &raw mut hook, abi::HOOK_CODE, self.code_callback, self.user, first, last)
        };
        if code != code::OK {
            log::error!("the engine refused a code hook at {first:#x}: error {code}");
        }
    }
}

impl<H: Hooks> Engine<H> {
    /// A processor in long mode over `ram`, which it sees from physical address 0 on.
    pub fn new(library: &Arc<Library>, kind: EngineKind, ram: &Rc<Ram>, hooks: H) -> Result<Self> {
        let mut uc = std::ptr::null_mut();
        // SAFETY: a valid place for the handle.
        library.check("opening the engine", unsafe { (library.uc_open)(abi::ARCH_X86, abi::MODE_64, &raw mut uc) })?;
        let uc = NonNull::new(uc).ok_or_else(|| library.error("opening the engine", code::OK))?;
        let hooks = Box::new(Installed { hooks, library: Arc::clone(library), way_back: Cell::new(std::ptr::null()) });
        let engine = Self { uc, library: Arc::clone(library), hooks, standing: None, stack: None, _ram: Rc::clone(ram) };
        // A quarter of the default address space is plenty for the guests this driver is for.
        let buffer: u32 = if kind == EngineKind::Main { 256 << 20 } else { 64 << 20 };
        // SAFETY: the request takes one u32.
        library.check("sizing the engine", unsafe { (library.uc_ctl)(uc.as_ptr(), abi::CTL_TCG_BUFFER_SIZE, buffer) })?;
        // SAFETY: the request takes one int.
        library.check("choosing the processor", unsafe {
            (library.uc_ctl)(uc.as_ptr(), abi::CTL_CPU_MODEL, abi::CPU_SKYLAKE_CLIENT)
        })?;
        // SAFETY: the request takes one int.
        library.check("choosing the TLB", unsafe { (library.uc_ctl)(uc.as_ptr(), abi::CTL_TLB_TYPE, abi::TLB_VIRTUAL) })?;
        // With exits switched on and none given, no address is special. SAFETY: the request takes one int.
        library.check("switching exits on", unsafe { (library.uc_ctl)(uc.as_ptr(), abi::CTL_USE_EXITS, 1 as c_int) })?;
        // SAFETY: the mapping is `ram.len()` bytes of page-aligned memory and lives as long as the engine (`_ram`).
        let mapped = unsafe { (library.uc_mem_map_ptr)(uc.as_ptr(), 0, ram.len(), abi::PROT_ALL, ram.map.as_mut_ptr().cast()) };
        library.check("mapping guest memory", mapped)?;
        engine.add_hook(abi::HOOK_INTR, on_interrupt::<H> as *mut c_void, abi::EVERYWHERE)?;
        engine.add_hook(abi::HOOK_TLB_FILL, on_fill::<H> as *mut c_void, abi::EVERYWHERE)?;
        // Only beyond memory: a memory hook that could fire for RAM would keep every store to it on the engine's slow path.
        let unmapped = (ram.len() as u64, u64::MAX);
        engine.add_hook(abi::HOOK_MEM_READ_UNMAPPED | abi::HOOK_MEM_WRITE_UNMAPPED, on_unmapped::<H> as *mut c_void, unmapped)?;
        engine.add_insn_hook(abi::INSN_IN, on_in::<H> as *mut c_void)?;
        engine.add_insn_hook(abi::INSN_OUT, on_out::<H> as *mut c_void)?;
        match kind {
            EngineKind::Main => engine.add_hook(abi::HOOK_BLOCK, on_block::<H> as *mut c_void, abi::EVERYWHERE)?,
            EngineKind::Stepper => engine.add_hook(abi::HOOK_MEM_WRITE, on_store::<H> as *mut c_void, abi::EVERYWHERE)?,
        }
        Ok(engine)
    }

    fn user(&self) -> *mut c_void {
        (&raw const *self.hooks).cast_mut().cast()
    }

    fn add_hook(&self, kind: c_int, callback: *mut c_void, (first, last): (u64, u64)) -> Result<()> {
        let mut hook = 0_usize;
        // SAFETY: the callback has the prototype unicorn.h gives for `kind`; user data is boxed and outlives the engine.
        let code =
            unsafe { (self.library.uc_hook_add)(self.uc.as_ptr(), &raw mut hook, kind, callback, self.user(), first, last) };
        self.library.check("installing a hook", code)
    }

    fn add_insn_hook(&self, insn: c_int, callback: *mut c_void) -> Result<()> {
        let mut hook = 0_usize;
        // SAFETY: as in `add_hook`; HOOK_INSN takes the instruction as one more int.
        let code = unsafe {
            (self.library.uc_hook_add)(self.uc.as_ptr(), &raw mut hook, abi::HOOK_INSN, callback, self.user(), 1, 0, insn)
        };
        self.library.check("installing a hook", code)
    }

    /// What the engine was given to answer with.
    pub fn hooks(&self) -> &H {
        &self.hooks.hooks
    }

    /// Runs from `rip`: `count` instructions, or until a hook ends it if `count` is 0. Returns the engine's error code.
    #[inline]
    pub fn run(&mut self, rip: u64, count: usize) -> i32 {
        // SAFETY: the engine is open, and runs on this thread only (`&mut self`). `until` is unused: exits are switched on.
        unsafe { (self.library.uc_emu_start)(self.uc.as_ptr(), rip, 0, 0, count) }
    }

    /// As [`Self::run`] until a hook ends it, but at an INT3 it comes back with the run standing where it is: the next call goes on from
    /// there, with the state that was restored meanwhile (RIP too). Ending a run and beginning another costs as much as all else at an INT3.
    ///
    /// # Errors
    /// [`VmiError::Driver`] if there is no memory for a stack.
    #[inline]
    pub fn go(&mut self, rip: u64) -> Result<i32> {
        if self.standing.is_none() {
            self.standing = Some(self.begin(rip)?);
        }
        Ok(self.resume(Go::On).unwrap_or(code::OK))
    }

    /// Lets the run that stands go on. `None`: it stands again.
    #[expect(clippy::inline_always, reason = "on another stack the processor loses track of who returns where: 9 ns each")]
    #[inline(always)]
    fn resume(&mut self, go: Go) -> Option<i32> {
        let CoroutineResult::Return(ended) = self.standing.as_mut()?.resume(go) else { return None };
        self.stack = self.standing.take().map(Run::into_stack);
        Some(ended)
    }

    /// Whether a run stands at an INT3.
    pub const fn is_standing(&self) -> bool {
        self.standing.is_some()
    }

    fn begin(&mut self, rip: u64) -> Result<Run> {
        let failed = |error: std::io::Error| VmiError::Driver {
            op: "allocating a stack",
            errno: error.raw_os_error().unwrap_or(0),
            detail: error.to_string(),
        };
        let stack = self.stack.take().map_or_else(|| DefaultStack::new(STACK), Ok).map_err(failed)?;
        let (uc, start, installed) = (self.uc.as_ptr(), self.library.uc_emu_start, &raw const *self.hooks);
        Ok(Coroutine::with_stack(stack, move |way_back, _| {
            // SAFETY: the box lives as long as the engine, which ends this run before it goes (`drop`); it is only ever shared.
            let installed = unsafe { &*installed };
            installed.way_back.set(way_back);
            // SAFETY: as in `run`; the engine runs nothing else until this is over, for `standing` is resumed or ended first.
            let ended = unsafe { start(uc, rip, 0, 0, 0) };
            installed.way_back.set(std::ptr::null());
            ended
        }))
    }

    /// Ends a run that stands at an INT3. The state stays as it is.
    fn end_standing(&mut self) {
        // Told to stop it comes to no other INT3; should it, it is told again.
        while self.standing.is_some() {
            self.resume(Go::Stop);
        }
    }

    /// Forgets every translation of addresses.
    #[inline]
    pub fn flush_tlb(&mut self) {
        // SAFETY: the engine is open; the request takes nothing.
        unsafe { (self.library.uc_ctl)(self.uc.as_ptr(), abi::CTL_FLUSH_TLB) };
    }

    /// Forgets code translated from the virtual range `first..end`, which must lie in one page.
    pub fn forget_code(&mut self, first: u64, end: u64) {
        self.end_standing();
        // SAFETY: the engine is open and does not run (`&mut self`); the request takes two u64.
        unsafe { (self.library.uc_ctl)(self.uc.as_ptr(), abi::CTL_REMOVE_CACHE, first, end) };
    }

    /// Writes a 64-bit register.
    pub fn write_register(&mut self, register: i32, value: u64) -> Result<()> {
        self.end_standing();
        // SAFETY: the engine is open; the registers used here are 8 bytes wide or less, little-endian.
        let code = unsafe { (self.library.uc_reg_write)(self.uc.as_ptr(), register, (&raw const value).cast()) };
        self.library.check("writing a register", code)
    }

    /// Writes a model-specific register.
    pub fn write_msr(&mut self, msr: u32, value: u64) -> Result<()> {
        self.end_standing();
        let pair = abi::Msr { msr, value };
        // SAFETY: this pseudo-register takes a `uc_x86_msr`.
        let code = unsafe { (self.library.uc_reg_write)(self.uc.as_ptr(), reg::MSR, (&raw const pair).cast()) };
        self.library.check("writing an MSR", code)
    }

    /// Writes GDTR, IDTR or TR.
    pub fn write_table(&mut self, register: i32, table: &Table) -> Result<()> {
        self.end_standing();
        // SAFETY: these registers take a `uc_x86_mmr`.
        let code = unsafe { (self.library.uc_reg_write)(self.uc.as_ptr(), register, (&raw const *table).cast()) };
        self.library.check("writing a descriptor table register", code)
    }

    /// A place to keep the processor's state in, with its state now.
    pub fn context(&self) -> Result<Context> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the engine is open; a valid place for the pointer.
        let code = unsafe { (self.library.uc_context_alloc)(self.uc.as_ptr(), &raw mut raw) };
        self.library.check("allocating a context", code)?;
        let raw = NonNull::new(raw).ok_or_else(|| self.library.error("allocating a context", code::OK))?;
        // SAFETY: the engine is open.
        let size = unsafe { (self.library.uc_context_size)(self.uc.as_ptr()) };
        let mut context = Context { raw, size, library: Arc::clone(&self.library) };
        if size < CERTAIN {
            let detail = format!("it is {size} bytes long, less than with any engine that was measured");
            return Err(VmiError::Driver { op: "saving a state", errno: 0, detail });
        }
        self.save(&mut context);
        Ok(context)
    }

    /// Reads a model-specific register; 0 for one the engine does not know.
    pub fn read_msr(&self, msr: u32) -> Result<u64> {
        let mut pair = abi::Msr { msr, value: 0 };
        // SAFETY: this pseudo-register takes a `uc_x86_msr`.
        let code = unsafe { (self.library.uc_reg_read)(self.uc.as_ptr(), reg::MSR, (&raw mut pair).cast()) };
        self.library.check("reading an MSR", code)?;
        Ok(pair.value)
    }

    /// The engine's own words for an error code.
    pub fn error(&self, op: &'static str, code: i32) -> VmiError {
        self.library.error(op, code)
    }

    /// The engine as its hooks see it.
    pub fn as_ref(&self) -> EngineRef<'_> {
        engine_ref::<H>(self.uc.as_ptr(), self.user())
    }

    /// Copies the processor's state out.
    #[inline]
    pub fn save(&self, context: &mut Context) {
        // SAFETY: the context was allocated for an engine of this architecture and mode, so it has the right size.
        unsafe { (self.library.uc_context_save)(self.uc.as_ptr(), context.raw.as_ptr()) };
    }

    /// As [`Self::save`], but only the first `len` bytes of state.
    #[inline]
    pub fn save_part(&self, context: &mut Context, len: u64) {
        let whole = context.replace_copied(len);
        self.save(context);
        context.replace_copied(whole);
    }

    /// As [`Self::restore`], but only the first `len` bytes of state.
    #[inline]
    pub fn restore_part(&mut self, context: &mut Context, len: u64) {
        let whole = context.replace_copied(len);
        self.restore(context);
        context.replace_copied(whole);
    }

    /// Copies a state in.
    #[inline]
    pub fn restore(&mut self, context: &Context) {
        // SAFETY: as in `save`; the state holds no pointers into another engine that matter (checked by the calibration).
        unsafe { (self.library.uc_context_restore)(self.uc.as_ptr(), context.raw.as_ptr()) };
    }
}

impl<H: Hooks> Drop for Engine<H> {
    fn drop(&mut self) {
        self.end_standing();
        // SAFETY: open, and closed once: here.
        unsafe { (self.library.uc_close)(self.uc.as_ptr()) };
    }
}

/// So many bytes each context has: a place among them needs no comparison with its size.
const CERTAIN: usize = 4096;

/// A copy of one processor's state. Fields are reached by byte offsets that the calibration found.
pub struct Context {
    raw: NonNull<c_void>,
    size: usize,
    library: Arc<Library>,
}

/// Offset of the context's own word that says how many bytes of state are copied; the calibration checks that it does.
const COPIED_LEN: usize = 0;

impl Context {
    /// How many bytes of state are copied in and out.
    pub fn copied(&self) -> u64 {
        self.u64(COPIED_LEN)
    }

    /// Has only the first `len` bytes of state copied from now on; how many it was before. Never more than at first.
    pub fn replace_copied(&mut self, len: u64) -> u64 {
        let before = self.copied();
        self.set_u64(COPIED_LEN, len.min(self.size as u64));
        before
    }

    /// Bytes, with the engine's own header.
    pub const fn size(&self) -> usize {
        self.size
    }

    #[inline]
    fn at(&self, offset: usize, len: usize) -> Option<*mut u8> {
        if CERTAIN.checked_sub(len).is_none_or(|last| offset > last) && offset.checked_add(len)? > self.size {
            return None;
        }
        // SAFETY: inside the allocation of `size` bytes, checked above; `size` is at least CERTAIN.
        Some(unsafe { self.raw.as_ptr().cast::<u8>().add(offset) })
    }

    /// Takes over the bytes of another context from `offset` on.
    pub fn copy_from(&mut self, offset: usize, other: &Self) {
        let len = self.size.min(other.size).saturating_sub(offset);
        if let (Some(to), Some(from)) = (self.at(offset, len), other.at(offset, len)) {
            // SAFETY: both ranges were checked; two contexts are two allocations, so they do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(from, to, len) };
        }
    }

    /// `N` 64-bit words from `offset` on; 0 beyond the end.
    #[inline]
    pub fn words<const N: usize>(&self, offset: usize) -> [u64; N] {
        // SAFETY: as in `u32`.
        self.at(offset, N * 8).map_or([0; N], |from| unsafe { from.cast::<[u64; N]>().read_unaligned() })
    }

    /// The 32-bit word at `offset`; 0 beyond the end, which the calibration rules out.
    #[inline]
    pub fn u32(&self, offset: usize) -> u32 {
        // SAFETY: `at` checked the range; unaligned reads are allowed for.
        self.at(offset, 4).map_or(0, |from| unsafe { from.cast::<u32>().read_unaligned() })
    }

    /// The 64-bit word at `offset`; 0 beyond the end.
    #[inline]
    pub fn u64(&self, offset: usize) -> u64 {
        // SAFETY: as in `u32`.
        self.at(offset, 8).map_or(0, |from| unsafe { from.cast::<u64>().read_unaligned() })
    }

    /// Sets the 32-bit word at `offset`.
    #[inline]
    pub fn set_u32(&mut self, offset: usize, value: u32) {
        if let Some(to) = self.at(offset, 4) {
            // SAFETY: as in `u32`; `&mut self` makes the write exclusive.
            unsafe { to.cast::<u32>().write_unaligned(value) };
        }
    }

    /// Sets the 64-bit word at `offset`.
    #[inline]
    pub fn set_u64(&mut self, offset: usize, value: u64) {
        if let Some(to) = self.at(offset, 8) {
            // SAFETY: as in `set_u32`.
            unsafe { to.cast::<u64>().write_unaligned(value) };
        }
    }

    /// RFLAGS, with the arithmetic flags the engine computes lazily.
    pub fn rflags(&self) -> u64 {
        let mut value = 0_u64;
        // SAFETY: the context is valid; EFLAGS takes at most 8 bytes.
        unsafe { (self.library.uc_context_reg_read)(self.raw.as_ptr(), reg::EFLAGS, (&raw mut value).cast()) };
        value
    }

    /// Writes a register that needs more than a store but no processor: EFLAGS.
    pub fn write_register(&mut self, register: i32, value: u64) {
        // SAFETY: as in `rflags`.
        unsafe { (self.library.uc_context_reg_write)(self.raw.as_ptr(), register, (&raw const value).cast()) };
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: allocated by this library, freed once: here.
        unsafe { (self.library.uc_context_free)(self.raw.as_ptr()) };
    }
}

/// A value that holds engines and what they share, moved between threads as a whole.
pub struct Confined<T>(pub T);

// SAFETY: every `Rc`, `Cell` and engine pointer inside is reachable from this one value only, never handed out, and the engine has no
// thread-local state between runs or while one stands at an INT3 (its stack holds its own frames and our hook's); so moving the whole to
// another thread moves all of it.
unsafe impl<T> Send for Confined<T> {}

fn installed<'a, H: Hooks>(user: *mut c_void) -> &'a Installed<H> {
    // SAFETY: `user` is the box that `Engine::user` gave; it lives as long as the engine that calls, and is only ever shared.
    unsafe { &*user.cast::<Installed<H>>() }
}

fn engine_ref<H: Hooks>(uc: *mut Uc, user: *mut c_void) -> EngineRef<'static> {
    let library: &'static Library = &installed::<H>(user).library;
    EngineRef { uc, library, user, code_callback: on_code::<H> as *mut c_void }
}

fn stop<H: Hooks>(uc: *mut Uc, user: *mut c_void) {
    // SAFETY: called from inside a hook of the running engine `uc`.
    unsafe { (installed::<H>(user).library.uc_emu_stop)(uc) };
}

extern "C" fn on_fill<H: Hooks>(uc: *mut Uc, va: u64, access: c_int, result: *mut abi::TlbEntry, user: *mut c_void) -> bool {
    let access = match access {
        abi::MEM_FETCH => Access::Fetch,
        abi::MEM_WRITE => Access::Write,
        _ => Access::Read,
    };
    let Some(fill) = installed::<H>(user).hooks.fill(engine_ref::<H>(uc, user), va, access) else { return false };
    // SAFETY: the engine passes a valid place for the entry.
    unsafe { result.write(abi::TlbEntry { paddr: fill.pa, perms: u32::from(fill.rights) }) };
    true
}

extern "C" fn on_interrupt<H: Hooks>(uc: *mut Uc, vector: u32, user: *mut c_void) {
    let installed = installed::<H>(user);
    installed.hooks.interrupt(vector);
    if vector == INT3_VECTOR {
        // SAFETY: null, or on the stack of the run that calls this, which has not ended.
        let way_back = unsafe { installed.way_back.get().as_ref() };
        if way_back.is_some_and(|way_back| way_back.suspend(()) == Go::On) {
            return;
        }
    }
    stop::<H>(uc, user);
}

extern "C" fn on_unmapped<H: Hooks>(_: *mut Uc, kind: c_int, pa: u64, len: c_int, _: i64, user: *mut c_void) -> bool {
    installed::<H>(user).hooks.unmapped(pa, len.unsigned_abs(), kind == abi::MEM_WRITE_UNMAPPED);
    false
}

extern "C" fn on_store<H: Hooks>(_: *mut Uc, _: c_int, pa: u64, len: c_int, _: i64, user: *mut c_void) {
    installed::<H>(user).hooks.store(pa, len.unsigned_abs());
}

extern "C" fn on_block<H: Hooks>(uc: *mut Uc, _: u64, _: u32, user: *mut c_void) {
    if installed::<H>(user).hooks.block(engine_ref::<H>(uc, user)) {
        stop::<H>(uc, user);
    }
}

extern "C" fn on_code<H: Hooks>(uc: *mut Uc, va: u64, _: u32, user: *mut c_void) {
    if installed::<H>(user).hooks.code(va) {
        stop::<H>(uc, user);
    }
}

extern "C" fn on_in<H: Hooks>(_: *mut Uc, port: u32, size: c_int, user: *mut c_void) -> u32 {
    installed::<H>(user).hooks.port_in(port, size.unsigned_abs())
}

extern "C" fn on_out<H: Hooks>(_: *mut Uc, port: u32, size: c_int, value: u32, user: *mut c_void) {
    installed::<H>(user).hooks.port_out(port, size.unsigned_abs(), value);
}
