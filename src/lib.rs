//! Tap a running virtual machine without the machine noticing.

pub mod addr;
pub mod arch;
pub mod bytes;
pub mod capture;
pub mod core;
pub mod driver;
pub mod error;
pub mod event;
pub mod image;
pub mod ptm;
#[cfg(feature = "python")]
mod python;
mod rights;
pub mod session;
pub mod symbols;
pub mod tap;
mod undo;

pub use addr::{Gfn, MemoryAccess, PAGE_SIZE, Pa, Va, VcpuId, View};
pub use bytes::GuestBytes;
pub use error::{Result, VmiError};
