//! The Python module `vmitap._native`: thin frozen classes over [`crate::session`]. Its documentation is the stub,
//! python/vmitap/_native.pyi.

mod breakpoint;
mod convert;
mod errors;
mod events;
mod expression;
mod flight;
mod floor;
mod gil;
mod handle;
mod hit;
mod hook;
mod log;
mod memory;
mod pause;
mod plant;
mod recording;
mod registers;
mod script;
mod shared;
mod symbols;
mod verdict;
mod views;
mod vm;
mod xen;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;

use crate::driver::open::{OpenOptions, Opened, Target};
use crate::error::{Result, VmiError};
use crate::session::{Session, drop_privileges, open_guarded, repair_guest};
use convert::{OnWriteArg, optional, small};

/// Opens a session with a guest; `vmitap.attach` calls this after it has found the emulator's library.
#[pyfunction]
#[pyo3(signature = (target, *, memory=None, vcpus=None, cmdline="", libunicorn=None, on_write=None, abi="sysv", repair=false, watchdog=None))]
#[expect(clippy::too_many_arguments, reason = "the signature Python sees")]
fn open(
    py: Python<'_>,
    target: &str,
    memory: Option<&Bound<'_, PyAny>>,
    vcpus: Option<&Bound<'_, PyAny>>,
    cmdline: &str,
    libunicorn: Option<PathBuf>,
    on_write: Option<OnWriteArg>,
    abi: &str,
    repair: bool,
    watchdog: Option<Vec<OsString>>,
) -> PyResult<vm::Vm> {
    let abi = expression::abi(abi)?;
    let options = OpenOptions {
        memory: optional("memory", memory)?,
        vcpus: vcpus.map(|vcpus| small("vcpus", vcpus, u16::MAX.into())).transpose()?,
        command_line: cmdline.to_owned(),
        libunicorn,
        take_over: false,
    };
    let on_write = on_write.map(|policy| policy.0).unwrap_or_default();
    let opened: Result<_> = gil::detached(py, || {
        let target = Target::parse(target)?;
        if repair {
            match repair_guest(&target, &options) {
                // A guest that lives in its driver is new.
                Ok(_) | Err(VmiError::NotSupported { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let Opened { driver, symbols } = open_guarded(&target, &options, watchdog)?;
        let (version, caps) = (driver.version(), driver.caps());
        // What neither has events nor can be written can be looked at all the same.
        let session = if caps.events || caps.write { Session::new(driver, on_write)? } else { Session::reading(driver) };
        Ok((session, symbols, version))
    });
    let (session, symbols, version) = opened?;
    Ok(vm::Vm::new(Arc::new(shared::Shared::new(py, session, symbols, version, (on_write, abi)))))
}

/// Brings a guest back whose session ended without a word: the tool was killed, or crashed.
#[pyfunction]
fn repair(py: Python<'_>, target: &str) -> PyResult<Option<Repaired>> {
    let done = gil::detached(py, || repair_guest(&Target::parse(target)?, &OpenOptions::default()))?;
    Ok(done.map(|done| Repaired { vcpus: done.vcpus, views: done.views, frames: done.frames, pauses: done.pauses }))
}

/// Gives up what the calling thread may do beyond its user's files, for good.
#[pyfunction]
fn _drop_privileges() -> PyResult<()> {
    Ok(drop_privileges()?)
}

/// What `repair` has undone.
#[pyclass(frozen, get_all, module = "vmitap._native")]
struct Repaired {
    /// How many vCPUs were held for an event, as far as the driver can tell.
    vcpus: usize,
    /// Views.
    views: usize,
    /// Frames of shadow pages.
    frames: usize,
    /// Times the guest was paused.
    pauses: u32,
}

#[pymethods]
impl Repaired {
    fn __repr__(&self) -> String {
        format!("Repaired(vcpus={}, views={}, frames={}, pauses={})", self.vcpus, self.views, self.frames, self.pauses)
    }
}

// Who has a hit is counted with the interpreter held: see `Hit::renew`.
#[pymodule(gil_used = true)]
mod _native {
    #[pymodule_export]
    use super::breakpoint::{Breakpoint, BreakpointStats, Breakpoints};
    #[pymodule_export]
    use super::events::{Events, RunResult, Stats};
    #[pymodule_export]
    use super::flight::{EventJournal, JournalContents, JournalEvent, read_journal};
    #[pymodule_export]
    use super::floor::{
        BreakpointController, BreakpointManager, ManagedBreakpoint, MemoryController, PageTableEvent, PageTableMonitor, VmiCore,
        VmiEvent, VmiEventResponse,
    };
    #[pymodule_export]
    use super::gil::_let_go;
    #[pymodule_export]
    use super::hit::{_hit, Hit};
    #[pymodule_export]
    use super::memory::Memory;
    #[pymodule_export]
    use super::recording::{Recording, RecordingFile};
    #[pymodule_export]
    use super::registers::{_registers, Registers};
    #[pymodule_export]
    use super::script::{_still, Script};
    #[pymodule_export]
    use super::symbols::{Symbol, Symbols};
    #[pymodule_export]
    use super::verdict::Verdict;
    #[pymodule_export]
    use super::views::{Caps, View, Views, VmInfo};
    #[pymodule_export]
    use super::vm::Vm;
    #[pymodule_export]
    use super::xen::{XenDomain, XenHost, xen_host};
    #[pymodule_export]
    use super::{_drop_privileges, Repaired, open, repair};

    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::log::install();
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        // What only unpickling and `vmitap.testing` call is not for `import *`.
        let all = module.index()?;
        for private in ["_Script", "_drop_privileges", "_hit", "_let_go", "_registers", "_still"] {
            all.call_method1("remove", (private,))?;
        }
        Ok(())
    }
}
