//! Xen's user-space interface for introspection, opened at run time. See README.md for what this crate is and is not.
//!
//! [`Xen::open`] finds the host's own libraries; [`Control`] is libxenctrl on one connection, [`EventChannels`], [`ForeignMemory`],
//! [`DeviceModel`] and [`Store`] the others. Everything that is unsafe is inside.

mod control;
mod error;
#[cfg(feature = "fake")]
pub mod fake;
mod layout;
mod load;
mod logger;
mod memory;
mod services;
pub mod types;

pub use control::Control;
pub use error::{Error, LoadError};
pub use load::{LIBRARY_VARIABLE, Xen};
pub use logger::{Level, Sink};
pub use memory::{ForeignMemory, Mapping};
pub use services::{DeviceModel, EventChannels, Store};

/// A result whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Numbers of errors (errno-base.h, and Xen's public/errno.h, which agree).
#[expect(missing_docs, reason = "the names are the manual's")]
pub mod errno {
    pub const EPERM: i32 = 1;
    pub const ENOENT: i32 = 2;
    pub const ESRCH: i32 = 3;
    pub const ENOMEM: i32 = 12;
    pub const EACCES: i32 = 13;
    pub const EBUSY: i32 = 16;
    pub const EEXIST: i32 = 17;
    pub const ENODEV: i32 = 19;
    pub const EINVAL: i32 = 22;
    pub const ENOSYS: i32 = 38;
    pub const EOPNOTSUPP: i32 = 95;
}
