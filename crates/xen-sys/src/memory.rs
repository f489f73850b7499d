//! The memory of another domain, mapped into this process.

use std::ffi::{c_int, c_ulong};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::Result;
use crate::error::Error;
use crate::load::{Handle, Tables};
use crate::types::PAGE_SIZE;

const PROT_READ_WRITE: c_int = 3;

/// libxenforeignmemory on one connection.
#[derive(Debug)]
pub struct ForeignMemory(Arc<Connection>);

#[derive(Debug)]
struct Connection {
    tables: Arc<Tables>,
    handle: Handle,
}

// SAFETY: the handle is a file descriptor with a cache that the library guards with nothing; `Mapping` only unmaps through it, which is a
// system call of its own, and `ForeignMemory` is not `Sync`-shared: its `map` takes `&self` of a type that is not `Clone`.
unsafe impl Send for Connection {}
// SAFETY: as above: the only concurrent use is unmapping.
unsafe impl Sync for Connection {}

impl Drop for Connection {
    fn drop(&mut self) {
        // SAFETY: opened by `open`, closed once; every mapping holds the connection, so none is left.
        unsafe { (self.tables.memory.xenforeignmemory_close)(self.handle) };
    }
}

impl ForeignMemory {
    pub(crate) fn open(tables: &Arc<Tables>) -> Result<Self> {
        // SAFETY: the logger outlives the handle (`Connection` holds the tables).
        let handle = unsafe { (tables.memory.xenforeignmemory_open)(tables.logger.as_ptr(), 0) };
        if handle.is_null() {
            return Err(Error::last("xenforeignmemory_open"));
        }
        Ok(Self(Arc::new(Connection { tables: Arc::clone(tables), handle })))
    }

    /// Maps frames of a domain, one behind the other, readable and writable: all or none.
    ///
    /// # Errors
    /// With the error of the first frame that cannot be mapped.
    pub fn map(&self, domain: u32, frames: &[u64]) -> Result<Mapping> {
        let (mapping, errors) = self.try_map(domain, frames)?;
        match errors.iter().find(|error| **error != 0) {
            None => Ok(mapping),
            Some(error) => Err(Error::new("xenforeignmemory_map", error.abs())),
        }
    }

    /// Maps frames as far as they can be; and the error of each.
    fn try_map(&self, domain: u32, frames: &[u64]) -> Result<(Mapping, Vec<c_int>)> {
        let op = "xenforeignmemory_map";
        let mut errors: Vec<c_int> = vec![0; frames.len()];
        let numbers: Vec<c_ulong> = frames.to_vec();
        let connection = &self.0;
        let map = connection.tables.memory.xenforeignmemory_map;
        // SAFETY: both arrays are as long as they are said to be, and the handle is open.
        let base =
            unsafe { map(connection.handle, domain, PROT_READ_WRITE, frames.len(), numbers.as_ptr(), errors.as_mut_ptr()) };
        let Some(base) = NonNull::new(base.cast::<u8>()) else { return Err(Error::last(op)) };
        // From here on dropping it unmaps.
        let mapping = Mapping { base, pages: frames.len(), owner: Owner::Foreign(Arc::clone(connection)) };
        Ok((mapping, errors))
    }

    /// Which of these frames the domain has, found by mapping them.
    ///
    /// # Errors
    /// If none can be looked at.
    pub fn present(&self, domain: u32, frames: &[u64]) -> Result<Vec<bool>> {
        let (mapping, errors) = self.try_map(domain, frames)?;
        drop(mapping);
        Ok(errors.iter().map(|error| *error == 0).collect())
    }

    /// Takes over one page that libxenctrl has mapped.
    pub(crate) fn adopt(&self, base: NonNull<u8>) -> Mapping {
        Mapping { base, pages: 1, owner: Owner::Foreign(Arc::clone(&self.0)) }
    }
}

#[derive(Debug)]
enum Owner {
    Foreign(Arc<Connection>),
    /// The pages go with the last mapping of them.
    Private(Arc<Pages>),
}

/// Pages of this process's own.
#[derive(Debug)]
struct Pages {
    base: NonNull<u8>,
    layout: std::alloc::Layout,
}

// SAFETY: all that is done with them from here is freeing them, once: in `drop`.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated in `Mapping::private` with this layout; whoever could refer to them held this.
        unsafe { std::alloc::dealloc(self.base.as_ptr(), self.layout) };
    }
}

/// Pages that somebody else may write at any time: bytes are copied in and out, and never borrowed.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    pages: usize,
    owner: Owner,
}

// SAFETY: the pages belong to the process; access is by copy and by atomics only.
unsafe impl Send for Mapping {}

fn layout(pages: usize) -> Option<std::alloc::Layout> {
    std::alloc::Layout::from_size_align(pages.checked_mul(PAGE_SIZE)?, PAGE_SIZE).ok().filter(|layout| layout.size() > 0)
}

impl Mapping {
    /// Zeroed pages of this process's own, for tests of what works on a mapping. `None` without pages, or without memory for them.
    pub fn private(pages: usize) -> Option<Self> {
        let layout = layout(pages)?;
        // SAFETY: the size is not zero.
        let base = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })?;
        Some(Self { base, pages, owner: Owner::Private(Arc::new(Pages { base, layout })) })
    }

    /// The same pages again, for the other side in a test. `None` if they are another domain's.
    pub fn twin(&self) -> Option<Self> {
        let Owner::Private(pages) = &self.owner else { return None };
        Some(Self { base: self.base, pages: self.pages, owner: Owner::Private(Arc::clone(pages)) })
    }

    /// Bytes.
    pub const fn len(&self) -> usize {
        self.pages * PAGE_SIZE
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.pages == 0
    }

    fn at(&self, offset: usize, len: usize) -> Option<*mut u8> {
        if offset.checked_add(len)? > self.len() {
            return None;
        }
        // SAFETY: inside the mapping, checked above.
        Some(unsafe { self.base.as_ptr().add(offset) })
    }

    /// Copies bytes out; `None` if the range is not all inside. Eight aligned bytes are read as one.
    #[inline]
    pub fn read(&self, offset: usize, buf: &mut [u8]) -> Option<()> {
        let from = self.at(offset, buf.len())?;
        if buf.len() == 8 && offset.is_multiple_of(8) {
            #[expect(clippy::cast_ptr_alignment, reason = "checked above")]
            // SAFETY: in range (`at`) and aligned, since mappings begin at a page; volatile, because the owner may write meanwhile.
            let value = unsafe { from.cast::<u64>().read_volatile() };
            buf.copy_from_slice(&value.to_ne_bytes());
            return Some(());
        }
        // SAFETY: in range (`at`), and `buf` is memory of our own, so they do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len()) };
        Some(())
    }

    /// Copies bytes in; `None`, and nothing done, if the range is not all inside.
    #[inline]
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Option<()> {
        let to = self.at(offset, bytes.len())?;
        if let &[byte] = bytes {
            // SAFETY: in range (`at`); volatile, because a processor of the owner may be fetching it.
            unsafe { to.write_volatile(byte) };
            return Some(());
        }
        // SAFETY: in range (`at`), and `bytes` is not a mapping, so they do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Some(())
    }

    fn word(&self, offset: usize) -> Option<&AtomicU32> {
        let at = self.at(offset, 4).filter(|_| offset.is_multiple_of(4))?;
        // SAFETY: in range and aligned; the mapping outlives the borrow, and both sides of a shared ring access indices atomically.
        Some(unsafe { AtomicU32::from_ptr(at.cast()) })
    }

    /// Reads an aligned word, and with it what its writer wrote before it (acquire).
    pub fn load(&self, offset: usize) -> Option<u32> {
        Some(self.word(offset)?.load(Ordering::Acquire))
    }

    /// Writes an aligned word after everything that was written before (release).
    pub fn store(&self, offset: usize, value: u32) -> Option<()> {
        self.word(offset)?.store(value, Ordering::Release);
        Some(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if let Owner::Foreign(connection) = &self.owner {
            let unmap = connection.tables.memory.xenforeignmemory_unmap;
            // SAFETY: mapped with as many pages, by this library or (the ring) by libxenctrl through it; nothing refers to it any more.
            unsafe { unmap(connection.handle, self.base.as_ptr().cast(), self.pages) };
        }
    }
}
