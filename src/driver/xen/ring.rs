//! Our end of the shared ring of requests and responses (io/ring.h): Xen produces requests, we produce one response for each.
//!
//! The page is not the guest's, but it is not trusted either: an index that cannot be is an error, and nothing outside the page is touched.

use xen_sys::Mapping;
use xen_sys::types::RingHead;

use super::abi::{Layout, MAX_EVENT};

const REQ_PROD: usize = 0;
const REQ_EVENT: usize = 4;
const RSP_PROD: usize = 8;
const RSP_EVENT: usize = 12;

/// The other side's index cannot be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the event ring is corrupt: the producer is at {producer:#x}, {taken:#x} were taken, and there are {slots} slots")]
pub struct Corrupt {
    /// Where the other side says it is.
    pub producer: u32,
    /// How many requests were taken.
    pub taken: u32,
    /// How many there can be beyond.
    pub slots: u32,
}

/// The memory of a ring. Tests have one whose every order of accesses is tried.
pub trait RingPage {
    /// Reads an aligned word, and with it what its writer wrote before it (acquire).
    fn load(&self, offset: usize) -> Option<u32>;
    /// Writes an aligned word after everything that was written before (release).
    fn store(&self, offset: usize, value: u32) -> Option<()>;
    /// Copies bytes out.
    fn read(&self, offset: usize, buf: &mut [u8]) -> Option<()>;
    /// Copies bytes in.
    fn write(&self, offset: usize, bytes: &[u8]) -> Option<()>;
}

impl RingPage for Mapping {
    #[inline]
    fn load(&self, offset: usize) -> Option<u32> {
        Self::load(self, offset)
    }

    #[inline]
    fn store(&self, offset: usize, value: u32) -> Option<()> {
        Self::store(self, offset, value)
    }

    #[inline]
    fn read(&self, offset: usize, buf: &mut [u8]) -> Option<()> {
        Self::read(self, offset, buf)
    }

    #[inline]
    fn write(&self, offset: usize, bytes: &[u8]) -> Option<()> {
        Self::write(self, offset, bytes)
    }
}

/// The ring, from our end.
#[derive(Debug)]
pub struct Ring<P = Mapping> {
    page: P,
    layout: Layout,
    taken: u32,
    answered: u32,
}

impl<P: RingPage> Ring<P> {
    /// Initialises the page, in which nothing has happened yet (SHARED_RING_INIT and BACK_RING_INIT).
    pub fn new(page: P, layout: Layout) -> Self {
        let ring = Self { page, layout, taken: 0, answered: 0 };
        ring.set(RSP_PROD, 0);
        ring.set(RSP_EVENT, 1);
        ring.set(REQ_EVENT, 1);
        ring.set(REQ_PROD, 0);
        ring
    }

    fn set(&self, index: usize, value: u32) {
        // The page is as long as the head, so the store always happens.
        let _ = self.page.store(index, value);
    }

    fn slot(&self, index: u32) -> usize {
        size_of::<RingHead>() + (index & (self.layout.slots() - 1)) as usize * self.layout.size
    }

    /// The page.
    pub const fn page(&self) -> &P {
        &self.page
    }

    /// The layout of what is in it.
    pub const fn layout(&self) -> Layout {
        self.layout
    }

    /// Takes the next request; `None` if there is none.
    pub fn take(&mut self) -> Result<Option<[u8; MAX_EVENT]>, Corrupt> {
        let producer = self.page.load(REQ_PROD).unwrap_or(self.taken);
        let waiting = producer.wrapping_sub(self.taken);
        if waiting == 0 {
            return Ok(None);
        }
        let slots = self.layout.slots();
        if waiting > slots || producer.wrapping_sub(self.answered) > slots {
            return Err(Corrupt { producer, taken: self.taken, slots });
        }
        let mut request = [0; MAX_EVENT];
        let (at, size) = (self.slot(self.taken), self.layout.size);
        if let Some(bytes) = request.get_mut(..size) {
            let _ = self.page.read(at, bytes);
        }
        self.taken = self.taken.wrapping_add(1);
        self.set(REQ_EVENT, self.taken.wrapping_add(1));
        Ok(Some(request))
    }

    /// Puts a response in. False, and nothing done, if there is no request without one.
    pub fn answer(&mut self, response: &[u8; MAX_EVENT]) -> bool {
        if self.answered == self.taken {
            return false;
        }
        if let Some(bytes) = response.get(..self.layout.size) {
            let _ = self.page.write(self.slot(self.answered), bytes);
        }
        self.answered = self.answered.wrapping_add(1);
        self.set(RSP_PROD, self.answered);
        true
    }

    /// Puts a response in that no request asked for. Afterwards the indices do not fit each other, and the ring must be made anew.
    pub fn push_unasked(&mut self, response: &[u8; MAX_EVENT]) {
        self.taken = self.answered.wrapping_add(1);
        self.answer(response);
    }

    /// Requests that were taken and have no response.
    pub const fn unanswered(&self) -> u32 {
        self.taken.wrapping_sub(self.answered)
    }
}
