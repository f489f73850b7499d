//! What wakes a wait from another thread: a descriptor that a poll sees, and a flag that says it may be readable.
//!
//! The descriptor decides, so that a poll of somebody else's sees the same. The flag only spares a wait that nobody woke the read. It is set
//! after the descriptor was written: whoever finds it set finds the descriptor readable, unless a read came in between, and that took the wake.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::driver::Waker;

/// The flag. Tests have one whose every order of accesses is tried.
pub trait Flag {
    /// Reads it.
    fn is_set(&self) -> bool;
    /// Sets it after everything that was done before (release).
    fn set(&self);
    /// Takes it away, and sees what was done before it was set (acquire).
    fn clear(&self);
}

/// The descriptor: a counter that never blocks.
pub trait Descriptor {
    /// Makes it readable.
    fn raise(&self);
    /// Makes it unreadable; whether it was readable.
    fn drain(&self) -> bool;
}

impl Flag for AtomicBool {
    #[inline]
    fn is_set(&self) -> bool {
        self.load(Ordering::Relaxed)
    }

    fn set(&self) {
        self.store(true, Ordering::Release);
    }

    fn clear(&self) {
        self.swap(false, Ordering::AcqRel);
    }
}

impl Descriptor for OwnedFd {
    fn raise(&self) {
        // A counter that is full is readable all the same.
        let _ = rustix::io::write(self, &1_u64.to_ne_bytes());
    }

    fn drain(&self) -> bool {
        rustix::io::read(self, &mut [0; 8]).is_ok()
    }
}

/// The bell.
#[derive(Debug)]
pub struct Bell<F = AtomicBool, D = OwnedFd> {
    flag: F,
    fd: D,
}

impl<F: Flag, D: Descriptor> Bell<F, D> {
    /// A bell that is silent: the flag is not set, and the descriptor not readable.
    pub const fn new(flag: F, fd: D) -> Self {
        Self { flag, fd }
    }

    /// The descriptor, to be polled.
    pub const fn fd(&self) -> &D {
        &self.fd
    }

    /// Rings it.
    pub fn ring(&self) {
        self.fd.raise();
        self.flag.set();
    }

    /// Whether it was rung since the last time. One that is being rung meanwhile may be found the next time.
    #[inline]
    pub fn take(&self) -> bool {
        self.flag.is_set() && self.hear()
    }

    /// The same for one whose descriptor is readable, whatever the flag says.
    pub fn hear(&self) -> bool {
        self.flag.clear();
        self.fd.drain()
    }
}

impl Waker for Bell {
    fn wake(&self) {
        self.ring();
    }
}
