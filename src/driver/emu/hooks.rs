//! What the engines ask while they run: address translation with views applied, and when to stop.
//!
//! Nothing is decided here. A hook answers from tables or records why the run ended; `run.rs` acts on it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::addr::{Gfn, MemoryAccess, PAGE_SHIFT, PAGE_SIZE, Pa, Va};
use crate::arch::amd64::{cr0, cr4, efer, pte, rflags, walk};
use crate::error::TranslationFault;

use super::insn::{self, Insn};
use super::memory::{Memory, Which};
use super::sys::{Access, EngineRef, Fill, Hooks};
use super::vcpu::{Guard, Mode};

/// Virtual addresses `WINDOW | pa` reach physical memory while a range of code is forgotten. No guest can use them: they are
/// not canonical.
pub const WINDOW: u64 = 0x5a5a << 48;
const WINDOW_MASK: u64 = 0xffff << 48;

/// Denied data accesses are sent to this physical range, where nothing is mapped: the engine then tells the exact address, which
/// it does not at a TLB miss. Bits 12 and up say which [`Denied`] it was.
const SENTINEL: u64 = 0xf000 << 32;
const SENTINEL_SLOTS: usize = 1024;
/// Pages of code whose translation is remembered.
const FETCHED_SLOTS: usize = 64;

/// Port of the debug console.
const CONSOLE_PORT: u32 = 0xe9;
/// The console keeps so much and drops what comes after.
const CONSOLE_LIMIT: usize = 1 << 20;

/// Why a run ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// No hook ended it.
    None,
    /// An exception or software interrupt.
    Interrupt(u8),
    /// An access was denied.
    Denied(Denied),
    /// The TLB must be emptied, then the instruction tried again.
    Retry,
    /// The budget of basic blocks is used up, or an interrupt can be delivered.
    Budget,
    /// An instruction that the driver carries out or watches is next.
    System,
}

/// A denied access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Denied {
    /// Its address; exact for data, the start of the page (or RIP) for fetches and for stores of the main engine's.
    pub va: u64,
    pub access: Access,
    /// Bytes of the access; 0 for a fetch, and for a store of the main engine's.
    pub len: u16,
    pub why: Why,
}

/// Why an access was denied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// A page fault with this error code.
    PageFault(u32),
    /// The address is not canonical: a general-protection fault.
    NonCanonical,
    /// The view does not allow it.
    View { gfn: u64 },
    /// A store to a frame with translated code: to be stepped.
    Code,
}

/// How a run is to end and what it did, shared by the two engines and the driver.
#[derive(Default)]
pub struct Devices {
    pub console: RefCell<Vec<u8>>,
}

/// A page that was fetched from, and after how many emptyings of the TLB.
#[derive(Clone, Copy, Default)]
struct Fetched {
    page: u64,
    emptied: u64,
    user: bool,
    gfn: u64,
    frame: u32,
}

/// The longest store that an engine makes at once, in bytes.
const STORE_LEN: usize = 16;

/// Half of a store of a vector.
const HALF: u16 = 8;

/// A store, and what was there before.
#[derive(Clone, Copy, Debug)]
struct Stored {
    pa: u64,
    len: usize,
    before: [u8; STORE_LEN],
}

/// The hooks of one engine.
pub struct CpuHooks {
    pub which: Which,
    pub memory: Rc<Memory>,
    pub devices: Rc<Devices>,
    pub mode: Cell<Mode>,
    pub exit: Cell<Exit>,
    /// Basic blocks left to run.
    pub budget: Cell<u64>,
    /// Stop at the first block at which interrupts are enabled.
    pub wants_interrupts: Cell<bool>,
    /// A store to code was seen since this was reset.
    pub stored_to_code: Cell<bool>,
    /// The stores of the instruction being stepped, the last of them perhaps only begun; the stepper's only.
    stores: RefCell<Vec<Stored>>,
    denied: RefCell<Vec<Denied>>,
    /// SWAPGS was run since this was taken.
    pub swapped_gs: Cell<bool>,
    /// What the TLB was last told of pages that are fetched from: the slot is the page's number, cut short.
    fetched: Vec<Cell<Fetched>>,
    /// How often the TLB was emptied.
    emptied: Cell<u64>,
    /// Whether addresses inside [`WINDOW`] are answered.
    pub window_open: Cell<bool>,
    /// Pages whose accesses go to another frame for the time of one step.
    pub discard: Cell<[Option<(Gfn, Gfn)>; 2]>,
    /// A view whose denial of stores holds beside that of the view in use. The TLB must be emptied when it changes.
    pub guard: Cell<Option<Guard>>,
}

/// Result of a translation: the frame's page and the rights the page tables and the view give together.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    pub gfn: u64,
    pub frame: u32,
    pub rights: u8,
}

impl CpuHooks {
    pub fn new(which: Which, memory: &Rc<Memory>, devices: &Rc<Devices>) -> Self {
        Self {
            which,
            memory: Rc::clone(memory),
            devices: Rc::clone(devices),
            mode: Cell::default(),
            exit: Cell::new(Exit::None),
            budget: Cell::new(0),
            wants_interrupts: Cell::new(false),
            stored_to_code: Cell::new(false),
            stores: RefCell::default(),
            denied: RefCell::default(),
            swapped_gs: Cell::new(false),
            fetched: vec![Cell::default(); FETCHED_SLOTS],
            emptied: Cell::new(1),
            window_open: Cell::new(false),
            discard: Cell::default(),
            guard: Cell::new(None),
        }
    }

    /// The TLB was emptied: no entry refers to a denied access any more.
    pub fn flushed(&self) {
        self.emptied.set(self.emptied.get() + 1);
        self.denied.borrow_mut().clear();
        self.memory.flushed(self.which);
    }

    /// How often the engine's TLB was emptied.
    pub fn emptied(&self) -> u64 {
        self.emptied.get()
    }

    /// Guest frame and frame behind it that the engine's TLB has for fetches from the page of `va` at that privilege level, if that is known.
    #[inline]
    pub fn fetched(&self, va: u64, cpl: u8) -> Option<(u64, u32)> {
        let page = va >> PAGE_SHIFT;
        let known = self.fetched.get(page as usize % FETCHED_SLOTS)?.get();
        let counts = known.page == page && known.emptied == self.emptied.get() && known.user == (cpl == 3);
        counts.then_some((known.gfn, known.frame))
    }

    /// Before a block with which the turn may end: whether it does. Apart, so that all other blocks take no longer than they must.
    #[cold]
    fn may_stop(&self, engine: EngineRef<'_>) -> bool {
        let left = self.budget.get();
        if left > 0 && engine.rflags() & rflags::IF == 0 {
            self.budget.set(left - 1);
            return false;
        }
        self.exit.set(Exit::Budget);
        true
    }

    fn deny(&self, denied: Denied) -> Option<Fill> {
        let in_second_page = if denied.access == Access::Write { self.bytes_behind_border() } else { 0 };
        // Asked to store across a page border, the engine goes on after an address that is not mapped, and writes what it may. So a
        // store is ended before it begins. The main engine cannot tell such a store; the stepper is to find out what it is.
        let ends_here = match denied.access {
            Access::Fetch => true,
            Access::Write => self.which == Which::Main || in_second_page > 0,
            Access::Read => false,
        };
        if ends_here {
            self.exit.set(Exit::Denied(Denied { len: in_second_page, ..denied }));
            return None;
        }
        let mut slots = self.denied.borrow_mut();
        if slots.len() >= SENTINEL_SLOTS {
            // Older entries of the TLB refer to the slots: it must be emptied before they are used again.
            self.memory.mark_stale_in(self.which);
            self.exit.set(Exit::Retry);
            return None;
        }
        let slot = slots.len() as u64;
        slots.push(denied);
        let rights = if denied.access == Access::Write { MemoryAccess::W } else { MemoryAccess::R };
        Some(Fill { pa: SENTINEL | slot << PAGE_SHIFT, rights: rights.bits() })
    }

    /// How many bytes of the store under way lie on a second page; the stepper's only.
    fn bytes_behind_border(&self) -> u16 {
        let stores = self.stores.borrow();
        stores.last().map_or(0, |store| ((store.pa & (PAGE_SIZE - 1)) + store.len as u64).saturating_sub(PAGE_SIZE) as u16)
    }

    /// Another instruction is stepped.
    pub fn begin(&self) {
        self.stored_to_code.set(false);
        self.stores.borrow_mut().clear();
    }

    /// Whether the instruction that was stepped was denied a load or a store: then it is to have had no effect. FXSAVE and the like go on
    /// storing after it, which is taken back here, and told as part of the access. `wide`: the other half of its store is not tried after it.
    pub fn take_back(&self, wide: bool) -> bool {
        let Exit::Denied(denied) = self.exit.get() else { return false };
        if denied.access == Access::Fetch {
            return false;
        }
        let mut end = 0;
        for store in self.stores.borrow_mut().drain(..).rev() {
            let Some(before) = store.before.get(..store.len) else { continue };
            // One that crosses a border of pages is denied before it begins, or allowed on both.
            let crosses = (store.pa & (PAGE_SIZE - 1)) + store.len as u64 > PAGE_SIZE;
            if !crosses && self.memory.ram().write(store.pa, before).is_some() {
                self.memory.note_store(store.pa, before.len());
                end = end.max((store.pa & (PAGE_SIZE - 1)) + store.len as u64);
            }
        }
        let offset = denied.va & (PAGE_SIZE - 1);
        let len = match end {
            0 if wide && denied.access == Access::Write => denied.len + HALF,
            1.. if offset != 0 => (PAGE_SIZE - offset + end) as u16,
            _ => denied.len,
        };
        self.exit.set(Exit::Denied(Denied { len, ..denied }));
        true
    }

    fn scan(&self, engine: EngineRef<'_>, frame: u32, va: u64) {
        if self.which == Which::Main && self.memory.must_scan(frame, va) {
            scan(&self.memory, engine, frame, va, 0, PAGE_SIZE);
        }
    }
}

/// Has the engine stop at the system instructions that begin in bytes `first..end` of the frame, when run at the page `va`.
fn scan(memory: &Memory, engine: EngineRef<'_>, frame: u32, va: u64, first: u64, end: u64) {
    let mut page = [0; PAGE_SIZE as usize];
    let Some(bytes) = page.get_mut(..end.saturating_sub(first) as usize) else { return };
    if memory.ram().read(u64::from(frame) << PAGE_SHIFT | first, bytes).is_none() {
        return;
    }
    insn::scan(bytes, |from, to| {
        let range = (va + first + from as u64, va + first + to as u64);
        if memory.is_new_watch(range) {
            engine.watch_code(range.0, range.1);
        }
    });
}

/// Looks again through code that was overwritten, wherever it was run from.
#[cold]
pub fn rescan(memory: &Memory, engine: EngineRef<'_>, first: u64, end: u64) {
    let frame = (first >> PAGE_SHIFT) as u32;
    let offset = first & (PAGE_SIZE - 1);
    let len = end - first;
    for va in memory.virtual_pages(frame) {
        // An instruction may begin before what was overwritten, and a range cut off here is only watched in vain.
        scan(memory, engine, frame, va, offset.saturating_sub(insn::MAX_LEN as u64), (offset + len + 3).min(PAGE_SIZE));
    }
}

/// Translates `va` through the guest's page tables, sets accessed and dirty bits as the processor does, and applies the view.
///
/// `cpl` and `flags` are asked for only where they matter. Sources: Intel SDM vol. 3, 5.6 (access rights) and 5.8 (A and D bits).
#[inline]
pub fn translate(
    memory: &Memory,
    mode: &Mode,
    va: u64,
    access: Access,
    cpl: u8,
    flags: impl FnOnce() -> u64,
) -> Result<Page, Why> {
    let user = cpl == 3;
    let code = |present: bool| {
        let fetch = access == Access::Fetch && (mode.efer & efer::NXE != 0 || mode.cr4 & cr4::SMEP != 0);
        u32::from(present) | u32::from(access == Access::Write) << 1 | u32::from(user) << 2 | u32::from(fetch) << 4
    };
    let levels = if mode.cr4 & cr4::LA57 != 0 { 5 } else { 4 };
    let ram = memory.ram();
    let limit = memory.guest_len();
    let root = Pa(mode.cr3 & 0x000f_ffff_ffff_f000);
    let read = |pa: Pa| if pa.0 < limit { ram.read_u64(pa.0) } else { None };
    let walk = match walk(root, Va(va), levels, mode.efer & efer::NXE != 0, read) {
        Ok(walk) => walk,
        Err(TranslationFault::NonCanonical) => return Err(Why::NonCanonical),
        // Beyond memory there is no device. A page table or page there counts as an entry with a reserved bit.
        Err(TranslationFault::ReservedBit { .. } | TranslationFault::BeyondMemory { .. }) => {
            return Err(Why::PageFault(code(true) | 8));
        }
        Err(TranslationFault::NotPresent { .. }) => return Err(Why::PageFault(code(false))),
    };
    let (writable, for_user, executable) = (walk.writable, walk.user, walk.executable);
    let mut rights = 0;
    if user {
        if for_user {
            rights = 1 | u8::from(writable) << 1 | u8::from(executable) << 2;
        }
    } else {
        let data = !for_user || mode.cr4 & cr4::SMAP == 0 || access == Access::Fetch || flags() & rflags::AC != 0;
        if data {
            rights = 1 | u8::from(writable || mode.cr0 & cr0::WP == 0) << 1;
        }
        if executable && !(for_user && mode.cr4 & cr4::SMEP != 0) {
            rights |= 4;
        }
    }
    let wanted = right(access);
    if rights & wanted == 0 {
        return Err(Why::PageFault(code(true)));
    }
    let entries = walk.entries();
    let last = entries.len().saturating_sub(1);
    for (level, &(pa, value)) in entries.iter().enumerate() {
        let mut wants = pte::A;
        if level == last && access == Access::Write {
            wants |= pte::D;
        }
        if value & wants != wants {
            ram.write_u64(pa.0, value | wants);
        }
        if level == last && (value | wants) & pte::D == 0 {
            // Not dirty yet: the first store must come by here.
            rights &= !2;
        }
    }
    let gfn = walk.pa.0 >> PAGE_SHIFT;
    let Some((allowed, frame)) = memory.lookup(mode.view, gfn) else {
        return Err(Why::PageFault(code(true) | 8));
    };
    if allowed & wanted == 0 {
        return Err(Why::View { gfn });
    }
    Ok(Page { gfn, frame, rights: rights & allowed })
}

const fn right(access: Access) -> u8 {
    match access {
        Access::Read => 1,
        Access::Write => 2,
        Access::Fetch => 4,
    }
}

impl Hooks for CpuHooks {
    fn fill(&self, engine: EngineRef<'_>, va: u64, access: Access) -> Option<Fill> {
        if va & WINDOW_MASK == WINDOW && self.window_open.get() {
            return Some(Fill { pa: va & !WINDOW_MASK, rights: 7 });
        }
        let mode = self.mode.get();
        let cpl = engine.cpl();
        let mut page = match translate(&self.memory, &mode, va, access, cpl, || engine.rflags()) {
            Ok(page) => page,
            Err(why) => return self.deny(Denied { va, access, len: 0, why }),
        };
        for (gfn, frame) in self.discard.get().into_iter().flatten() {
            if gfn.0 == page.gfn {
                page.frame = frame.0 as u32;
            }
        }
        if let Some(Guard { view, told }) = self.guard.get()
            && !told.contains(&Some(Gfn(page.gfn)))
            && self.memory.lookup(view, page.gfn).is_some_and(|(rights, _)| rights & 2 == 0)
        {
            if access == Access::Write {
                return self.deny(Denied { va, access, len: 0, why: Why::View { gfn: page.gfn } });
            }
            page.rights &= !2;
        }
        if access == Access::Fetch {
            if !self.memory.note_code(self.which, page.frame) {
                self.exit.set(Exit::Retry);
                return None;
            }
            self.scan(engine, page.frame, va);
            let number = va >> PAGE_SHIFT;
            if let Some(slot) = self.fetched.get(number as usize % FETCHED_SLOTS) {
                let emptied = self.emptied.get();
                slot.set(Fetched { page: number, emptied, user: cpl == 3, gfn: page.gfn, frame: page.frame });
            }
        } else {
            // Code is fetched through an entry of its own, so that the first fetch of a page is seen.
            page.rights &= !4;
        }
        if self.which == Which::Main && self.memory.is_code(page.frame) {
            if access == Access::Write {
                return self.deny(Denied { va, access, len: 0, why: Why::Code });
            }
            page.rights &= !2;
        }
        if page.rights & 2 != 0 {
            self.memory.note_writable(self.which, page.frame);
        }
        Some(Fill { pa: u64::from(page.frame) << PAGE_SHIFT, rights: page.rights })
    }

    fn interrupt(&self, vector: u32) {
        self.exit.set(Exit::Interrupt(vector as u8));
    }

    fn unmapped(&self, pa: u64, len: u32, write: bool) {
        let slot = ((pa & !SENTINEL) >> PAGE_SHIFT) as usize;
        if let Some(denied) = self.denied.borrow().get(slot) {
            let access = if write { Access::Write } else { Access::Read };
            let (mut first, mut end) = (denied.va | pa & (PAGE_SIZE - 1), (denied.va | pa & (PAGE_SIZE - 1)) + u64::from(len));
            // FXSAVE and the like go on storing, and a second access to the page belongs to the one that was denied.
            if let Exit::Denied(so_far) = self.exit.get() {
                if (so_far.va >> PAGE_SHIFT, so_far.access) != (denied.va >> PAGE_SHIFT, access) {
                    return;
                }
                (first, end) = (first.min(so_far.va), end.max(so_far.va + u64::from(so_far.len)));
            }
            self.exit.set(Exit::Denied(Denied { va: first, access, len: (end - first) as u16, why: denied.why }));
        }
    }

    fn store(&self, pa: u64, len: u32) {
        if self.which == Which::Stepper {
            let mut before = [0; STORE_LEN];
            let len = len as usize;
            // Where there is no memory nothing is stored, and nothing has to be taken back.
            if let Some(before) = before.get_mut(..len) {
                let _ = self.memory.ram().read(pa, before);
            }
            self.stores.borrow_mut().push(Stored { pa, len, before });
        }
        if self.memory.note_store(pa, len as usize) {
            self.stored_to_code.set(true);
        }
    }

    #[inline]
    fn block(&self, engine: EngineRef<'_>) -> bool {
        let left = self.budget.get();
        if left > 0 && !self.wants_interrupts.get() {
            self.budget.set(left - 1);
            return false;
        }
        self.may_stop(engine)
    }

    fn code(&self, va: u64) -> bool {
        let mut bytes = [0; insn::MAX_LEN];
        let mode = self.mode.get();
        let len = fetch(&self.memory, &mode, va, &mut bytes);
        match insn::decode(bytes.get(..len).unwrap_or_default()) {
            Insn::System(..) | Insn::Incomplete => self.exit.set(Exit::System),
            Insn::SwapGs => {
                self.swapped_gs.set(true);
                return false;
            }
            _ => return false,
        }
        true
    }

    fn port_in(&self, port: u32, size: u32) -> u32 {
        if port == CONSOLE_PORT {
            // What a guest reads to find out whether the console is there (Bochs and Xen do the same).
            return CONSOLE_PORT;
        }
        match size {
            1 => 0xff,
            2 => 0xffff,
            _ => u32::MAX,
        }
    }

    fn port_out(&self, port: u32, _: u32, value: u32) {
        let mut console = self.devices.console.borrow_mut();
        if port != CONSOLE_PORT || console.len() >= CONSOLE_LIMIT {
            return;
        }
        console.push(value as u8);
        if console.len() == CONSOLE_LIMIT {
            log::warn!("the guest's console has reached {CONSOLE_LIMIT} bytes: what comes after is dropped");
        }
    }
}

/// Reads a whole instruction at `va` as the view of `mode` shows it, and more if it lies on the same page; how many bytes
/// there are. The next page is looked at only if the instruction reaches into it, as the fetch itself would.
pub fn fetch(memory: &Memory, mode: &Mode, va: u64, bytes: &mut [u8; insn::MAX_LEN]) -> usize {
    let mut done = 0;
    while done < bytes.len() && (done == 0 || insn::decode(bytes.get(..done).unwrap_or_default()) == Insn::Incomplete) {
        let Some(at) = va.checked_add(done as u64) else { break };
        // Ring 0 may read what ring 3 may; whether the fetch is allowed is for the engine to say.
        let Ok(page) = translate(memory, &Mode { cr4: mode.cr4 & !(cr4::SMEP | cr4::SMAP), ..*mode }, at, Access::Fetch, 0, || 0)
        else {
            break;
        };
        let offset = at & (PAGE_SIZE - 1);
        let len = (PAGE_SIZE - offset).min((bytes.len() - done) as u64) as usize;
        let Some(part) = bytes.get_mut(done..done + len) else { break };
        if memory.ram().read(u64::from(page.frame) << PAGE_SHIFT | offset, part).is_none() {
            break;
        }
        done += len;
    }
    done
}
