//! Event channels, injection and xenstore.

use std::ffi::{CString, c_int};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::Result;
use crate::error::Error;
use crate::load::{Handle, Tables};

macro_rules! handle {
    ($(#[$doc:meta])* $name:ident, $table:ident, $open:ident, $close:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name {
            tables: Arc<Tables>,
            handle: Handle,
        }

        // SAFETY: the handle is used by one thread at a time (`&self` of a type that is not `Sync`), and by any.
        unsafe impl Send for $name {}

        impl $name {
            pub(crate) fn open(tables: &Arc<Tables>) -> Result<Self> {
                // SAFETY: the logger outlives the handle, which holds the tables.
                let handle = unsafe { (tables.$table.$open)(tables.logger.as_ptr(), 0) };
                if handle.is_null() {
                    return Err(Error::last(stringify!($open)));
                }
                Ok(Self { tables: Arc::clone(tables), handle })
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: opened by `open`, and closed once.
                unsafe { (self.tables.$table.$close)(self.handle) };
            }
        }
    };
}

handle! {
    /// libxenevtchn on one connection.
    EventChannels, events, xenevtchn_open, xenevtchn_close
}
handle! {
    /// libxendevicemodel on one connection.
    DeviceModel, devices, xendevicemodel_open, xendevicemodel_close
}

fn done(op: &'static str, result: c_int) -> Result<()> {
    if result < 0 { Err(Error::last(op)) } else { Ok(()) }
}

impl EventChannels {
    /// What becomes readable when a channel is pending.
    pub fn fd(&self) -> Result<BorrowedFd<'_>> {
        // SAFETY: the handle is open.
        let fd = unsafe { (self.tables.events.xenevtchn_fd)(self.handle) };
        if fd < 0 {
            return Err(Error::last("xenevtchn_fd"));
        }
        // SAFETY: the handle owns the descriptor, and lives as long as the borrow of `self`.
        Ok(unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// Binds a channel of another domain; the local port.
    pub fn bind_interdomain(&self, domain: u32, port: u32) -> Result<u32> {
        // SAFETY: the handle is open.
        let local = unsafe { (self.tables.events.xenevtchn_bind_interdomain)(self.handle, domain, port) };
        u32::try_from(local).map_err(|_| Error::last("xenevtchn_bind_interdomain"))
    }

    /// Unbinds a local port.
    pub fn unbind(&self, port: u32) -> Result<()> {
        // SAFETY: the handle is open.
        done("xenevtchn_unbind", unsafe { (self.tables.events.xenevtchn_unbind)(self.handle, port) })
    }

    /// Wakes the other side.
    #[inline]
    pub fn notify(&self, port: u32) -> Result<()> {
        // SAFETY: the handle is open.
        done("xenevtchn_notify", unsafe { (self.tables.events.xenevtchn_notify)(self.handle, port) })
    }

    /// Takes the next pending port. To be called when [`Self::fd`] is readable: it waits otherwise.
    pub fn pending(&self) -> Result<u32> {
        // SAFETY: the handle is open.
        let port = unsafe { (self.tables.events.xenevtchn_pending)(self.handle) };
        u32::try_from(port).map_err(|_| Error::last("xenevtchn_pending"))
    }

    /// Lets a port that was pending become pending again.
    pub fn unmask(&self, port: u32) -> Result<()> {
        // SAFETY: the handle is open.
        done("xenevtchn_unmask", unsafe { (self.tables.events.xenevtchn_unmask)(self.handle, port) })
    }
}

/// An event to be injected (dm_op.h, `xen_dm_op_inject_event`).
impl DeviceModel {
    /// Injects an event into a vCPU before its next instruction. `kind` is one of [`crate::types::event_type`], `error_code`
    /// [`crate::types::NO_ERROR_CODE`] for an event without one, `extra` the new CR2 of a page fault.
    #[expect(clippy::too_many_arguments, reason = "the call's own")]
    pub fn inject(&self, domain: u16, vcpu: u32, vector: u8, kind: u8, error_code: u32, insn_len: u8, extra: u64) -> Result<()> {
        let inject = self.tables.devices.xendevicemodel_inject_event;
        // SAFETY: the handle is open.
        let result = unsafe { inject(self.handle, domain, vcpu as c_int, vector, kind, error_code, insn_len, extra) };
        done("xendevicemodel_inject_event", result)
    }
}

/// libxenstore on one connection.
#[derive(Debug)]
pub struct Store {
    tables: Arc<Tables>,
    handle: Handle,
}

// SAFETY: the handle is used by one thread at a time (`&self` of a type that is not `Sync`), and by any.
unsafe impl Send for Store {}

impl Store {
    pub(crate) fn open(tables: &Arc<Tables>) -> Option<Self> {
        let table = tables.store.as_ref()?;
        // SAFETY: no flags.
        let handle = unsafe { (table.xs_open)(0) };
        (!handle.is_null()).then(|| Self { tables: Arc::clone(tables), handle })
    }

    /// The value at a path; `None` if there is none, or it is not text.
    pub fn read(&self, path: &str) -> Option<String> {
        let table = self.tables.store.as_ref()?;
        let path = CString::new(path).ok()?;
        let mut len = 0;
        // SAFETY: no transaction; the path is NUL-terminated and the length has a place.
        let value = unsafe { (table.xs_read)(self.handle, 0, path.as_ptr(), &raw mut len) };
        if value.is_null() {
            return None;
        }
        // SAFETY: not null, and as many bytes as the call said.
        let bytes = unsafe { std::slice::from_raw_parts(value.cast::<u8>(), len as usize) }.to_vec();
        crate::load::free(value);
        String::from_utf8(bytes).ok()
    }

    /// The name of a domain; `None` while it has none.
    pub fn domain_name(&self, domain: u32) -> Option<String> {
        self.read(&format!("/local/domain/{domain}/name")).filter(|name| !name.is_empty())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some(table) = &self.tables.store {
            // SAFETY: opened by `open`, and closed once.
            unsafe { (table.xs_close)(self.handle) };
        }
    }
}
