//! Finding and opening Xen's libraries.

use std::ffi::{c_char, c_int, c_long, c_uint, c_ulong, c_void};
use std::path::Path;
use std::sync::Arc;

use crate::Result;
use crate::control::Control;
use crate::error::LoadError;
use crate::logger::{Logger, Sink};
use crate::memory::ForeignMemory;
use crate::services::{DeviceModel, EventChannels, Store};
use crate::types::{DomainInfo, ToolLog};

/// Names the libxenctrl to use, by its path. The functions of the other libraries are then looked for in it, and in what it needs, first.
pub const LIBRARY_VARIABLE: &str = "VMITAP_LIBXENCTRL";

/// The releases whose libxenctrl is looked for: the minor numbers of Xen 4, newest first.
const MINORS: std::ops::RangeInclusive<u32> = 14..=40;

pub(crate) type Handle = *mut c_void;
type Domid = u32;
type Pfn = c_ulong;

/// One library: where it came from, and what keeps it open.
struct Opened {
    name: String,
    handle: libloading::Library,
}

impl Opened {
    fn find<T: Copy>(&self, symbol: &str) -> Option<T> {
        // SAFETY: every call names a function of Xen's headers with the prototype it has from 4.14 on (see the tables below).
        unsafe { self.handle.get::<T>(symbol.as_bytes()) }.ok().map(|found| *found)
    }
}

macro_rules! table {
    ($(#[$doc:meta])* $name:ident { $($symbol:ident: $type:ty,)* } optional { $($maybe:ident: $maybe_type:ty,)* }) => {
        $(#[$doc])*
        #[expect(clippy::struct_field_names, reason = "the names are the library's")]
        pub(crate) struct $name {
            $(pub $symbol: $type,)*
            $(pub $maybe: Option<$maybe_type>,)*
        }

        impl $name {
            /// The functions, from the first of `libraries` that has each.
            fn bind(libraries: &[&Opened]) -> Result<Self, LoadError> {
                let missing = |symbol: &str| LoadError::Symbol {
                    library: libraries.last().map_or_else(String::new, |library| library.name.clone()),
                    symbol: symbol.to_owned(),
                };
                $(
                    let $symbol = libraries
                        .iter()
                        .find_map(|library| library.find::<$type>(concat!(stringify!($symbol), "\0")))
                        .ok_or_else(|| missing(stringify!($symbol)))?;
                )*
                $(
                    let $maybe =
                        libraries.iter().find_map(|library| library.find::<$maybe_type>(concat!(stringify!($maybe), "\0")));
                )*
                Ok(Self { $($symbol,)* $($maybe,)* })
            }
        }
    };
}

table! {
    /// libxenctrl, as tools/include/xenctrl.h has declared it from 4.14 to 4.22.
    ControlTable {
        xc_interface_open: unsafe extern "C" fn(*mut ToolLog, *mut ToolLog, c_uint) -> Handle,
        xc_interface_close: unsafe extern "C" fn(Handle) -> c_int,
        xc_version: unsafe extern "C" fn(Handle, c_int, *mut c_void) -> c_int,
        xc_vm_event_get_version: unsafe extern "C" fn(Handle) -> c_int,
        xc_domain_getinfolist: unsafe extern "C" fn(Handle, u32, c_uint, *mut DomainInfo) -> c_int,
        xc_domain_pause: unsafe extern "C" fn(Handle, Domid) -> c_int,
        xc_domain_unpause: unsafe extern "C" fn(Handle, Domid) -> c_int,
        xc_domain_maximum_gpfn: unsafe extern "C" fn(Handle, Domid, *mut Pfn) -> c_int,
        xc_domain_setmaxmem: unsafe extern "C" fn(Handle, Domid, u64) -> c_int,
        xc_domain_populate_physmap_exact: unsafe extern "C" fn(Handle, Domid, c_ulong, c_uint, c_uint, *mut Pfn) -> c_int,
        xc_domain_decrease_reservation_exact: unsafe extern "C" fn(Handle, Domid, c_ulong, c_uint, *mut Pfn) -> c_int,
        xc_domain_debug_control: unsafe extern "C" fn(Handle, Domid, u32, u32) -> c_int,
        xc_domain_hvm_getcontext: unsafe extern "C" fn(Handle, Domid, *mut u8, u32) -> c_int,
        xc_domain_hvm_getcontext_partial: unsafe extern "C" fn(Handle, Domid, u16, u16, *mut c_void, u32) -> c_int,
        xc_domain_hvm_setcontext: unsafe extern "C" fn(Handle, Domid, *mut u8, u32) -> c_int,
        xc_hvm_param_get: unsafe extern "C" fn(Handle, Domid, u32, *mut u64) -> c_int,
        xc_hvm_param_set: unsafe extern "C" fn(Handle, Domid, u32, u64) -> c_int,
        xc_set_mem_access: unsafe extern "C" fn(Handle, Domid, c_int, u64, u32) -> c_int,
        xc_get_mem_access: unsafe extern "C" fn(Handle, Domid, u64, *mut c_int) -> c_int,
        xc_altp2m_get_domain_state: unsafe extern "C" fn(Handle, Domid, *mut bool) -> c_int,
        xc_altp2m_set_domain_state: unsafe extern "C" fn(Handle, Domid, bool) -> c_int,
        xc_altp2m_create_view: unsafe extern "C" fn(Handle, Domid, c_int, *mut u16) -> c_int,
        xc_altp2m_destroy_view: unsafe extern "C" fn(Handle, Domid, u16) -> c_int,
        xc_altp2m_switch_to_view: unsafe extern "C" fn(Handle, Domid, u16) -> c_int,
        xc_altp2m_set_mem_access: unsafe extern "C" fn(Handle, Domid, u16, Pfn, c_int) -> c_int,
        xc_altp2m_set_mem_access_multi: unsafe extern "C" fn(Handle, Domid, u16, *mut u8, *mut u64, u32) -> c_int,
        xc_altp2m_get_mem_access: unsafe extern "C" fn(Handle, Domid, u16, Pfn, *mut c_int) -> c_int,
        xc_altp2m_change_gfn: unsafe extern "C" fn(Handle, Domid, u16, Pfn, Pfn) -> c_int,
        xc_altp2m_get_vcpu_p2m_idx: unsafe extern "C" fn(Handle, Domid, u32, *mut u16) -> c_int,
        xc_monitor_enable: unsafe extern "C" fn(Handle, Domid, *mut u32) -> *mut c_void,
        xc_monitor_disable: unsafe extern "C" fn(Handle, Domid) -> c_int,
        xc_monitor_get_capabilities: unsafe extern "C" fn(Handle, Domid, *mut u32) -> c_int,
        xc_monitor_write_ctrlreg: unsafe extern "C" fn(Handle, Domid, u16, bool, bool, u64, bool) -> c_int,
        xc_monitor_mov_to_msr: unsafe extern "C" fn(Handle, Domid, u32, bool, bool) -> c_int,
        xc_monitor_singlestep: unsafe extern "C" fn(Handle, Domid, bool) -> c_int,
        xc_monitor_software_breakpoint: unsafe extern "C" fn(Handle, Domid, bool) -> c_int,
        xc_monitor_debug_exceptions: unsafe extern "C" fn(Handle, Domid, bool, bool) -> c_int,
        xc_monitor_cpuid: unsafe extern "C" fn(Handle, Domid, bool) -> c_int,
        xc_monitor_emul_unimplemented: unsafe extern "C" fn(Handle, Domid, bool) -> c_int,
        xc_monitor_descriptor_access: unsafe extern "C" fn(Handle, Domid, bool) -> c_int,
        xc_monitor_guest_request: unsafe extern "C" fn(Handle, Domid, bool, bool, bool) -> c_int,
    } optional {
        xc_domctl: unsafe extern "C" fn(Handle, *mut c_void) -> c_int,
        // 4.17.
        xc_monitor_vmexit: unsafe extern "C" fn(Handle, Domid, bool, bool) -> c_int,
        // 4.18.
        xc_monitor_io: unsafe extern "C" fn(Handle, Domid, bool) -> c_int,
    }
}

table! {
    /// libxenevtchn.so.1 (xenevtchn.h).
    EventTable {
        xenevtchn_open: unsafe extern "C" fn(*mut ToolLog, c_uint) -> Handle,
        xenevtchn_close: unsafe extern "C" fn(Handle) -> c_int,
        xenevtchn_fd: unsafe extern "C" fn(Handle) -> c_int,
        xenevtchn_notify: unsafe extern "C" fn(Handle, u32) -> c_int,
        xenevtchn_bind_interdomain: unsafe extern "C" fn(Handle, u32, u32) -> c_int,
        xenevtchn_unbind: unsafe extern "C" fn(Handle, u32) -> c_int,
        xenevtchn_pending: unsafe extern "C" fn(Handle) -> c_int,
        xenevtchn_unmask: unsafe extern "C" fn(Handle, u32) -> c_int,
    } optional {}
}

table! {
    /// libxenforeignmemory.so.1 (xenforeignmemory.h).
    MemoryTable {
        xenforeignmemory_open: unsafe extern "C" fn(*mut ToolLog, c_uint) -> Handle,
        xenforeignmemory_close: unsafe extern "C" fn(Handle) -> c_int,
        xenforeignmemory_map: unsafe extern "C" fn(Handle, u32, c_int, usize, *const Pfn, *mut c_int) -> *mut c_void,
        xenforeignmemory_unmap: unsafe extern "C" fn(Handle, *mut c_void, usize) -> c_int,
    } optional {}
}

table! {
    /// libxendevicemodel.so.1 (xendevicemodel.h).
    DeviceTable {
        xendevicemodel_open: unsafe extern "C" fn(*mut ToolLog, c_uint) -> Handle,
        xendevicemodel_close: unsafe extern "C" fn(Handle) -> c_int,
        xendevicemodel_inject_event: unsafe extern "C" fn(Handle, u16, c_int, u8, u8, u32, u8, u64) -> c_int,
    } optional {}
}

table! {
    /// libxenstore.so.3.0 up to 4.15, libxenstore.so.4 from 4.16 on (xenstore.h).
    StoreTable {
        xs_open: unsafe extern "C" fn(c_ulong) -> Handle,
        xs_close: unsafe extern "C" fn(Handle),
        xs_read: unsafe extern "C" fn(Handle, u32, *const c_char, *mut c_uint) -> *mut c_void,
    } optional {}
}

/// Everything that is open. Whoever holds a function of a table holds this.
pub(crate) struct Tables {
    pub control: ControlTable,
    pub events: EventTable,
    pub memory: MemoryTable,
    pub devices: DeviceTable,
    pub store: Option<StoreTable>,
    pub logger: Box<Logger>,
    // Dropped last: the functions above are in them.
    libraries: Vec<Opened>,
}

impl std::fmt::Debug for Tables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.libraries.iter().map(|library| &library.name)).finish()
    }
}

// SAFETY: function pointers, a logger that is never changed, and handles of the loader: usable from any thread.
unsafe impl Send for Tables {}
// SAFETY: as above; nothing in it is changed after it is made.
unsafe impl Sync for Tables {}

/// Xen's libraries, open, with a connection to the hypervisor.
#[derive(Debug)]
pub struct Xen {
    tables: Arc<Tables>,
    control: Control,
}

fn open_first(library: &'static str, names: Vec<String>) -> Result<Opened, LoadError> {
    let mut reason = String::new();
    for name in &names {
        match open_named(name) {
            Ok(opened) => return Ok(opened),
            // A file that is there and cannot be used says more than the files that are not.
            Err(error) if reason.is_empty() && !error.contains("No such file") => reason = error,
            Err(_) => {}
        }
    }
    Err(LoadError::Missing { library, tried: names, reason })
}

fn open_named(name: &str) -> Result<Opened, String> {
    // SAFETY: the initialisers of Xen's libraries set up nothing but their own tables; the name is one of theirs, or the caller's word.
    let handle = unsafe { libloading::Library::new(name) }.map_err(|error| {
        // What the system's loader said is the source of the error.
        std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string)
    })?;
    Ok(Opened { name: name.to_owned(), handle })
}

/// The running hypervisor, from sysfs.
fn hypervisor() -> Option<(u32, u32)> {
    let number = |name: &str| {
        let text = std::fs::read_to_string(format!("/sys/hypervisor/version/{name}")).ok()?;
        text.trim().parse::<u32>().ok()
    };
    Some((number("major")?, number("minor")?))
}

/// The names libxenctrl has had, the likeliest first.
fn candidates(running: Option<(u32, u32)>) -> Vec<String> {
    let mut names: Vec<String> = running.map(|(major, minor)| format!("libxenctrl.so.{major}.{minor}")).into_iter().collect();
    let others = MINORS.rev().map(|minor| format!("libxenctrl.so.4.{minor}"));
    names.extend(others.filter(|name| names.first() != Some(name)).collect::<Vec<_>>());
    names.push("libxenctrl.so".to_owned());
    // How Debian named it up to 4.11, and some still do.
    names.extend(running.map(|(major, minor)| format!("libxenctrl-{major}.{minor}.so")));
    names
}

impl Xen {
    /// Finds the host's libraries, and a libxenctrl that the hypervisor answers. What the libraries say goes to `sink`.
    ///
    /// # Errors
    /// [`LoadError`], which says what is missing.
    pub fn open(sink: Sink) -> Result<Self, LoadError> {
        if let Some(named) = std::env::var_os(LIBRARY_VARIABLE).filter(|named| !named.is_empty()) {
            return Self::open_named(Path::new(&named), sink);
        }
        if !["/dev/xen/privcmd", "/proc/xen/privcmd"].iter().any(|path| Path::new(path).exists()) {
            return Err(LoadError::NotControlDomain);
        }
        let running = hypervisor();
        let names = candidates(running);
        let mut refused: Option<(Vec<String>, crate::Error)> = None;
        let mut rest = names;
        // Several releases can be installed side by side: the one that the hypervisor answers is the right one.
        loop {
            let library = match open_first("libxenctrl", rest.clone()) {
                Ok(library) => library,
                Err(error) => {
                    let Some((tried, error_of_call)) = refused else { return Err(error) };
                    let hypervisor = running.map(|(major, minor)| format!("{major}.{minor}"));
                    return Err(LoadError::OtherRelease { tried, hypervisor, error: error_of_call });
                }
            };
            let name = library.name.clone();
            match Self::with_control(library, false, sink) {
                Err(LoadError::OtherRelease { error, .. }) => {
                    refused.get_or_insert((Vec::new(), error)).0.push(name.clone());
                    let at = rest.iter().position(|candidate| *candidate == name).unwrap_or(rest.len());
                    rest = rest.split_off((at + 1).min(rest.len()));
                }
                opened => return opened,
            }
        }
    }

    /// As [`Self::open`], with the libxenctrl at `path` and no other.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_named(path: &Path, sink: Sink) -> Result<Self, LoadError> {
        let name = path.to_string_lossy().into_owned();
        let library =
            open_named(&name).map_err(|reason| LoadError::Missing { library: "libxenctrl", tried: vec![name], reason })?;
        Self::with_control(library, true, sink)
    }

    fn with_control(control: Opened, first: bool, sink: Sink) -> Result<Self, LoadError> {
        let table = ControlTable::bind(&[&control])?;
        let name = control.name.clone();
        let mut libraries = vec![control];
        let mut others = Vec::new();
        for (library, names, symbol) in [
            ("libxenevtchn", vec!["libxenevtchn.so.1"], "xenevtchn_open\0"),
            ("libxenforeignmemory", vec!["libxenforeignmemory.so.1"], "xenforeignmemory_open\0"),
            ("libxendevicemodel", vec!["libxendevicemodel.so.1"], "xendevicemodel_open\0"),
            ("libxenstore", vec!["libxenstore.so.4", "libxenstore.so.3.0"], "xs_open\0"),
        ] {
            // What was named by hand, and what it needs, comes first: so one file can stand in for all of them.
            if first && libraries.first().is_some_and(|control| control.find::<Handle>(symbol).is_some()) {
                continue;
            }
            match open_first(library, names.into_iter().map(str::to_owned).collect()) {
                Ok(opened) => others.push(opened),
                // Without it domains have no names, and that is all.
                Err(_) if library == "libxenstore" => {}
                Err(error) => return Err(error),
            }
        }
        libraries.extend(others);
        let all: Vec<&Opened> = libraries.iter().collect();
        let tables = Tables {
            control: table,
            events: EventTable::bind(&all)?,
            memory: MemoryTable::bind(&all)?,
            devices: DeviceTable::bind(&all)?,
            store: StoreTable::bind(&all).ok(),
            logger: Logger::new(sink),
            libraries,
        };
        let tables = Arc::new(tables);
        let refused = |error| LoadError::Refused { library: name.clone(), error };
        let control = Control::open(&tables).map_err(refused)?;
        if let Err(error) = control.vm_event_version() {
            let hypervisor = control.release().ok().map(|(major, minor)| format!("{major}.{minor}"));
            return Err(LoadError::OtherRelease { tried: vec![name], hypervisor, error });
        }
        Ok(Self { tables, control })
    }

    /// libxenctrl.
    pub const fn control(&self) -> &Control {
        &self.control
    }

    /// The files that were opened, libxenctrl first.
    pub fn libraries(&self) -> impl Iterator<Item = &str> {
        self.tables.libraries.iter().map(|library| library.name.as_str())
    }

    /// Opens a handle for event channels.
    pub fn event_channels(&self) -> Result<EventChannels> {
        EventChannels::open(&self.tables)
    }

    /// Opens a handle for the memory of other domains.
    pub fn foreign_memory(&self) -> Result<ForeignMemory> {
        ForeignMemory::open(&self.tables)
    }

    /// Opens a handle for injecting events.
    pub fn device_model(&self) -> Result<DeviceModel> {
        DeviceModel::open(&self.tables)
    }

    /// Opens a connection to xenstore; `None` if its library or its daemon is not there.
    pub fn store(&self) -> Option<Store> {
        Store::open(&self.tables)
    }
}

/// Frees what a library allocated with malloc.
pub(crate) fn free(pointer: *mut c_void) {
    unsafe extern "C" {
        // SAFETY: C's own.
        fn free(pointer: *mut c_void);
    }
    // SAFETY: the callers hand over what a library told them to free, once.
    unsafe { free(pointer) };
}

// The libraries' `long` is the pointer's width, as Xen's ABI demands.
const _: () = assert!(size_of::<c_long>() == size_of::<usize>());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_of_the_running_release_is_tried_first_and_once() {
        let names = candidates(Some((4, 17)));
        assert_eq!(names.first().map(String::as_str), Some("libxenctrl.so.4.17"));
        assert_eq!(names.iter().filter(|name| *name == "libxenctrl.so.4.17").count(), 1);
        assert!(names.contains(&"libxenctrl.so.4.14".to_owned()) && names.contains(&"libxenctrl.so.4.22".to_owned()));
        assert_eq!(candidates(None).first().map(String::as_str), Some("libxenctrl.so.4.40"));
    }
}
