//! Guest-physical memory: RAM, the frames behind it, views, and which frames hold code that an engine has translated.
//!
//! Two engines work on one RAM (see `run.rs`). An engine notices its own stores into code it translated, not the other's. So a
//! frame that was ever fetched from is *code*: no TLB entry of the main engine lets it be written, each store to it is stepped,
//! and what it overwrote is forgotten in both.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::rc::Rc;

use rustc_hash::{FxHashMap, FxHashSet};

use crate::addr::{Gfn, MemoryAccess, PAGE_SHIFT, PAGE_SIZE, Pa, View};
use crate::error::{Result, VmiError};

use super::sys::Ram;

/// Which of the two engines.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Which {
    Main,
    Stepper,
}

/// Something of each engine.
#[derive(Clone, Default)]
pub struct Each<T> {
    main: T,
    stepper: T,
}

impl<T: Clone> Each<T> {
    pub fn new(value: T) -> Self {
        Self { main: value.clone(), stepper: value }
    }
}

impl<T> Each<T> {
    pub const fn of(&self, which: Which) -> &T {
        match which {
            Which::Main => &self.main,
            Which::Stepper => &self.stepper,
        }
    }

    pub const fn of_mut(&mut self, which: Which) -> &mut T {
        match which {
            Which::Main => &mut self.main,
            Which::Stepper => &mut self.stepper,
        }
    }
}

const RIGHTS_SHIFT: u32 = 29;
const FRAME_MASK: u32 = (1 << RIGHTS_SHIFT) - 1;

/// One view: for each guest frame, which frame is shown there (low 29 bits) and with which rights (high 3 bits).
struct ViewMap(Vec<u32>);

/// What is known of each frame, in a byte.
mod flag {
    /// An engine may have translated code from it.
    pub const CODE: u8 = 1;
    /// It belongs to the pool and is taken.
    pub const TAKEN: u8 = 2;
}

/// The longest single store the engine does, in bytes.
const MAX_STORE: usize = 16;

/// A store to code.
#[derive(Clone, Copy)]
struct Store {
    pa: u64,
    len: u8,
    before: [u8; MAX_STORE],
}

/// Memory as engines, delivery and the driver's callers see it.
pub struct Memory {
    ram: Rc<Ram>,
    guest_frames: u64,
    views: RefCell<Vec<Option<ViewMap>>>,
    flags: Vec<Cell<u8>>,
    // Epoch of the engine's TLB in which the frame was last made writable there: an entry may exist only if it is the current one.
    writable_in: Each<Vec<Cell<u32>>>,
    epoch: Each<Cell<u32>>,
    stale: Each<Cell<bool>>,
    // Under which virtual pages a code frame was looked through for instructions the driver must see.
    scanned: RefCell<FxHashMap<u32, Vec<u64>>>,
    // Ranges of virtual addresses at which the main engine was told to stop and look.
    watched: RefCell<FxHashSet<(u64, u64)>>,
    free: RefCell<BinaryHeap<Reverse<u32>>>,
    next_frame: Cell<u64>,
    taken: Cell<usize>,
    shown: RefCell<FxHashMap<u32, u32>>,
    // Physical ranges whose translated code both engines are to forget before they run again.
    forget: RefCell<Vec<(u64, u64)>>,
    // Stores to code under way, and what was there before.
    stores: RefCell<Vec<Store>>,
}

impl Memory {
    /// `guest_frames` frames of guest memory and `pool_frames` behind them.
    pub fn new(guest_frames: u64, pool_frames: u64) -> Result<Self> {
        let total = guest_frames.saturating_add(pool_frames);
        if total > u64::from(FRAME_MASK) {
            return Err(VmiError::InvalidArgument {
                what: "memory",
                reason: format!("{total} frames are more than {FRAME_MASK}"),
            });
        }
        let total = total as usize;
        let memory = Self {
            ram: Rc::new(Ram::new(total << PAGE_SHIFT)?),
            guest_frames,
            views: RefCell::default(),
            flags: vec![Cell::new(0); total],
            writable_in: Each::new(vec![Cell::new(0); total]),
            epoch: Each::new(Cell::new(1)),
            stale: Each::default(),
            scanned: RefCell::default(),
            watched: RefCell::default(),
            free: RefCell::default(),
            next_frame: Cell::new(guest_frames),
            taken: Cell::new(0),
            shown: RefCell::default(),
            forget: RefCell::default(),
            stores: RefCell::default(),
        };
        memory.create_view(MemoryAccess::RWX)?;
        Ok(memory)
    }

    /// The bytes behind it all.
    pub const fn ram(&self) -> &Rc<Ram> {
        &self.ram
    }

    /// Bytes of guest-physical memory.
    pub const fn guest_len(&self) -> u64 {
        self.guest_frames << PAGE_SHIFT
    }

    fn check_range(&self, pa: Pa, len: u64) -> Result<()> {
        let out_of_range = || VmiError::OutOfRange { pa, len, end: Pa(self.guest_len()) };
        let end = pa.checked_add(len).ok_or_else(out_of_range)?;
        if end.0 <= self.guest_len() {
            return Ok(());
        }
        // Beyond the guest only frames that are taken can be reached.
        let mut frame = pa.gfn().0;
        while (frame << PAGE_SHIFT) < end.0 {
            if frame < self.guest_frames || self.flag(frame as u32) & flag::TAKEN == 0 {
                return Err(out_of_range());
            }
            frame += 1;
        }
        Ok(())
    }

    /// Reads guest memory or taken frames.
    pub fn read(&self, pa: Pa, buf: &mut [u8]) -> Result<()> {
        self.check_range(pa, buf.len() as u64)?;
        self.ram.read(pa.0, buf).ok_or(VmiError::OutOfRange { pa, len: buf.len() as u64, end: Pa(self.guest_len()) })
    }

    /// Writes guest memory or taken frames; translated code there is forgotten.
    pub fn write(&self, pa: Pa, bytes: &[u8]) -> Result<()> {
        self.check_range(pa, bytes.len() as u64)?;
        self.ram.write(pa.0, bytes).ok_or(VmiError::OutOfRange { pa, len: bytes.len() as u64, end: Pa(self.guest_len()) })?;
        self.forget_code(pa.0, bytes.len() as u64);
        Ok(())
    }

    fn flag(&self, frame: u32) -> u8 {
        self.flags.get(frame as usize).map_or(0, Cell::get)
    }

    fn set_flag(&self, frame: u32, bits: u8, on: bool) {
        if let Some(cell) = self.flags.get(frame as usize) {
            cell.set(if on { cell.get() | bits } else { cell.get() & !bits });
        }
    }

    // --- views ---

    /// Makes a view of every guest frame with `access`.
    pub fn create_view(&self, access: MemoryAccess) -> Result<View> {
        let rights = u32::from(access.bits()) << RIGHTS_SHIFT;
        let map = ViewMap((0..self.guest_frames as u32).map(|frame| frame | rights).collect());
        let mut views = self.views.borrow_mut();
        let index = views.iter().position(Option::is_none).unwrap_or(views.len());
        let view = u16::try_from(index).map_err(|_| VmiError::Driver {
            op: "creating a view",
            errno: 28,
            detail: "all view numbers are taken".to_owned(),
        })?;
        match views.get_mut(index) {
            Some(slot) => *slot = Some(map),
            None => views.push(Some(map)),
        }
        Ok(View(view))
    }

    /// Removes a view.
    pub fn destroy_view(&self, view: View) -> Result<()> {
        let map = self.views.borrow_mut().get_mut(usize::from(view.0)).and_then(Option::take);
        let map = map.ok_or(VmiError::ViewNotFound { view })?;
        let mut shown = self.shown.borrow_mut();
        for (gfn, entry) in map.0.iter().enumerate() {
            let frame = entry & FRAME_MASK;
            if frame as usize != gfn {
                Self::unshow(&mut shown, frame);
            }
        }
        self.mark_stale();
        Ok(())
    }

    fn unshow(shown: &mut FxHashMap<u32, u32>, frame: u32) {
        if let Some(count) = shown.get_mut(&frame) {
            *count -= 1;
            if *count == 0 {
                shown.remove(&frame);
            }
        }
    }

    /// Whether the view exists.
    pub fn has_view(&self, view: View) -> bool {
        self.views.borrow().get(usize::from(view.0)).is_some_and(Option::is_some)
    }

    fn with_entry<T>(&self, view: View, gfn: Gfn, op: impl FnOnce(&mut u32) -> T) -> Result<T> {
        let mut views = self.views.borrow_mut();
        let map = views.get_mut(usize::from(view.0)).and_then(Option::as_mut).ok_or(VmiError::ViewNotFound { view })?;
        let entry = usize::try_from(gfn.0).ok().and_then(|index| map.0.get_mut(index));
        let end = Pa(self.guest_len());
        Ok(op(entry.ok_or(VmiError::OutOfRange { pa: gfn.pa(0), len: PAGE_SIZE, end })?))
    }

    /// The rights of a page.
    pub fn access(&self, view: View, gfn: Gfn) -> Result<MemoryAccess> {
        let rights = self.with_entry(view, gfn, |entry| *entry >> RIGHTS_SHIFT)?;
        Ok(MemoryAccess::from_bits(rights as u8).unwrap_or(MemoryAccess::NONE))
    }

    /// Sets the rights of a page.
    pub fn set_access(&self, view: View, gfn: Gfn, access: MemoryAccess) -> Result<()> {
        self.with_entry(view, gfn, |entry| {
            *entry = (*entry & FRAME_MASK) | (u32::from(access.bits()) << RIGHTS_SHIFT);
        })?;
        self.mark_stale();
        Ok(())
    }

    /// Shows another frame at a page, or its own again.
    pub fn remap(&self, view: View, gfn: Gfn, frame: Option<Gfn>) -> Result<()> {
        if view == View::DEFAULT {
            return Err(VmiError::DefaultView { op: "remapping a page" });
        }
        let wanted = frame.unwrap_or(gfn);
        self.check_range(wanted.pa(0), PAGE_SIZE)?;
        let wanted = wanted.0 as u32;
        let old = self.with_entry(view, gfn, |entry| {
            let old = *entry & FRAME_MASK;
            *entry = (*entry & !FRAME_MASK) | wanted;
            old
        })?;
        let own = gfn.0 as u32;
        let mut shown = self.shown.borrow_mut();
        if wanted != own {
            *shown.entry(wanted).or_insert(0) += 1;
        }
        if old != own {
            Self::unshow(&mut shown, old);
        }
        self.mark_stale();
        Ok(())
    }

    /// Rights and frame of a page in a view, for a TLB fill. `None` for a page beyond guest memory or a view that is gone.
    #[inline]
    pub fn lookup(&self, view: View, gfn: u64) -> Option<(u8, u32)> {
        let views = self.views.borrow();
        let entry = *views.get(usize::from(view.0))?.as_ref()?.0.get(usize::try_from(gfn).ok()?)?;
        Some(((entry >> RIGHTS_SHIFT) as u8, entry & FRAME_MASK))
    }

    // --- frames ---

    /// Takes frames of the pool, the lowest that are free.
    pub fn allocate_frames(&self, count: usize) -> Result<Vec<Gfn>> {
        let mut free = self.free.borrow_mut();
        let fresh = count.saturating_sub(free.len()) as u64;
        let next = self.next_frame.get();
        if fresh > self.flags.len() as u64 - next {
            let all = self.flags.len() as u64 - self.guest_frames;
            let detail = format!("{} of the {all} frames of the pool are taken, and {count} are wanted", self.taken.get());
            return Err(VmiError::Driver { op: "allocating frames", errno: 12, detail });
        }
        let mut frames: Vec<u32> = std::iter::from_fn(|| free.pop().map(|Reverse(frame)| frame)).take(count).collect();
        frames.extend(next as u32..(next + fresh) as u32);
        self.next_frame.set(next + fresh);
        self.taken.set(self.taken.get() + count);
        for frame in &frames {
            self.set_flag(*frame, flag::TAKEN, true);
        }
        Ok(frames.into_iter().map(|frame| Gfn(frame.into())).collect())
    }

    /// Takes a frame for the driver's own use, which no caller sees counted.
    pub fn reserve_frame(&self) -> Result<Gfn> {
        let none = || VmiError::Driver { op: "allocating a frame", errno: 12, detail: "there is none".to_owned() };
        let frame = self.allocate_frames(1)?.pop().ok_or_else(none)?;
        self.taken.set(self.taken.get() - 1);
        Ok(frame)
    }

    /// Gives frames back.
    pub fn free_frames(&self, frames: &[Gfn]) -> Result<()> {
        let refuse = |frame: &Gfn, detail: &str| {
            Err(VmiError::Driver { op: "freeing frames", errno: 16, detail: format!("frame {frame} {detail}") })
        };
        let mut seen = FxHashSet::default();
        for frame in frames {
            let index = u32::try_from(frame.0).unwrap_or(0);
            if frame.0 < self.guest_frames || self.flag(index) & flag::TAKEN == 0 {
                return refuse(frame, "was not allocated");
            }
            if self.shown.borrow().contains_key(&index) {
                return refuse(frame, "is still shown in a view");
            }
            if !seen.insert(index) {
                return refuse(frame, "is there twice");
            }
        }
        for index in seen {
            self.forget_code(Gfn(index.into()).pa(0).0, PAGE_SIZE);
            self.set_flag(index, flag::TAKEN, false);
            self.free.borrow_mut().push(Reverse(index));
        }
        self.taken.set(self.taken.get() - frames.len());
        Ok(())
    }

    /// Frames of the pool that are taken, the driver's own among them.
    pub fn taken_frames(&self) -> impl Iterator<Item = Gfn> {
        let pool = self.guest_frames..self.next_frame.get();
        pool.filter(|frame| self.flag(*frame as u32) & flag::TAKEN != 0).map(Gfn)
    }

    /// The views there are, but the default one.
    pub fn views(&self) -> Vec<View> {
        let views = self.views.borrow();
        let there = views.iter().enumerate().skip(1).filter(|(_, map)| map.is_some());
        there.map(|(index, _)| View(index as u16)).collect()
    }

    /// Frames taken.
    pub const fn frames_in_use(&self) -> usize {
        self.taken.get()
    }

    // --- what the engines' TLBs and code caches may hold ---

    /// The engine's TLB is empty now.
    pub fn flushed(&self, which: Which) {
        let epoch = &self.epoch.of(which);
        epoch.set(epoch.get().wrapping_add(1).max(1));
        if epoch.get() == 1 {
            // The counter came round: no old mark may look current.
            self.writable_in.of(which).iter().for_each(|cell| cell.set(0));
        }
        self.stale.of(which).set(false);
    }

    /// Whether the engine's TLB may hold what is no longer so.
    #[inline]
    pub fn is_stale(&self, which: Which) -> bool {
        self.stale.of(which).get()
    }

    /// Both TLBs must be emptied before the engines run again.
    pub fn mark_stale(&self) {
        self.mark_stale_in(Which::Main);
        self.mark_stale_in(Which::Stepper);
    }

    /// The engine's TLB must be emptied before it runs again.
    pub fn mark_stale_in(&self, which: Which) {
        self.stale.of(which).set(true);
    }

    /// Whether translated code may exist for the frame.
    #[inline]
    pub fn is_code(&self, frame: u32) -> bool {
        self.flag(frame) & flag::CODE != 0
    }

    /// A TLB entry that lets the frame be written is about to be made in the engine.
    #[inline]
    pub fn note_writable(&self, which: Which, frame: u32) {
        if let Some(cell) = self.writable_in.of(which).get(frame as usize) {
            cell.set(self.epoch.of(which).get());
        }
    }

    /// The frame is about to be fetched from. False if the engine `which` may still have a TLB entry that lets it be written:
    /// it must be flushed first, which it cannot be while it runs.
    #[inline]
    pub fn note_code(&self, which: Which, frame: u32) -> bool {
        if self.is_code(frame) {
            return true;
        }
        let writable = |engine: Which| {
            self.writable_in.of(engine).get(frame as usize).is_some_and(|cell| cell.get() == self.epoch.of(engine).get())
        };
        let other = if which == Which::Main { Which::Stepper } else { Which::Main };
        if writable(other) {
            self.mark_stale_in(other);
        }
        if writable(which) {
            self.mark_stale_in(which);
            return false;
        }
        self.set_flag(frame, flag::CODE, true);
        true
    }

    /// Whether the frame still has to be looked through under that virtual page. Remembers that it was.
    pub fn must_scan(&self, frame: u32, va_page: u64) -> bool {
        let mut scanned = self.scanned.borrow_mut();
        let pages = scanned.entry(frame).or_default();
        if pages.contains(&va_page) {
            return false;
        }
        pages.push(va_page);
        true
    }

    /// Whether the range is not watched yet. Remembers that it is.
    pub fn is_new_watch(&self, range: (u64, u64)) -> bool {
        self.watched.borrow_mut().insert(range)
    }

    /// The virtual pages a frame was run under.
    pub fn virtual_pages(&self, frame: u32) -> Vec<u64> {
        self.scanned.borrow().get(&frame).cloned().unwrap_or_default()
    }

    /// The bytes `pa..pa + len` have changed: if code was translated from them, both engines are to forget it.
    pub fn forget_code(&self, pa: u64, len: u64) {
        let mut at = pa;
        let end = pa.saturating_add(len);
        while at < end {
            let page_end = (at & !(PAGE_SIZE - 1)).saturating_add(PAGE_SIZE).min(end);
            if self.is_code((at >> PAGE_SHIFT) as u32) {
                self.forget.borrow_mut().push((at, page_end));
            }
            at = page_end;
        }
    }

    /// A store of `len` bytes at `pa` is about to be done. True if it goes to code.
    #[inline]
    pub fn note_store(&self, pa: u64, len: usize) -> bool {
        if !self.is_code((pa >> PAGE_SHIFT) as u32) && !self.is_code((pa.saturating_add(len as u64) >> PAGE_SHIFT) as u32) {
            return false;
        }
        let mut before = [0; MAX_STORE];
        let known = before.get_mut(..len).is_some_and(|bytes| self.ram.read(pa, bytes).is_some());
        if known {
            self.stores.borrow_mut().push(Store { pa, len: len as u8, before });
        } else {
            self.forget_code(pa, len as u64);
        }
        true
    }

    /// The next range both engines are to forget.
    #[inline]
    pub fn next_to_forget(&self) -> Option<(u64, u64)> {
        while let Some(Store { pa, len, before }) = self.stores.borrow_mut().pop() {
            let mut now = [0; MAX_STORE];
            let len = usize::from(len);
            let unchanged = now.get_mut(..len).is_some_and(|bytes| self.ram.read(pa, bytes).is_some()) && now == before;
            // Code that was overwritten with itself (`lock xadd` of 0, say) is as good as before.
            if !unchanged {
                self.forget_code(pa, len as u64);
            }
        }
        self.forget.borrow_mut().pop()
    }
}
