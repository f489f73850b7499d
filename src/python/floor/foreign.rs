//! A controller that is a Python object.
//!
//! It calls back into the session, whose lock must be free then: the manager works on a driver that offers nothing, and gets
//! its translations from outside.

use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;

use super::event::VmiEvent;
use crate::addr::{Gfn, MemoryAccess, Pa, VcpuId, View};
use crate::arch::amd64::{Injection, Registers};
use crate::driver::{
    Additions, Caps, Monitor, VmInfo, VmiControl, VmiDriver, VmiEvents, VmiFrames, VmiInfo, VmiInject, VmiProtection, VmiRead,
    VmiRegisters, VmiRepair, VmiViews, VmiWrite, Wait, Waker,
};
use crate::error::{Result, VmiError};
use crate::event;
use crate::python::views;
use crate::session::Vmi;
use crate::tap::{TapController, TapEvents};

/// A driver that offers nothing.
pub struct Nothing(pub VmInfo);

impl Nothing {
    /// Reads nothing, writes nothing.
    pub fn vmi(info: VmInfo) -> Vmi {
        let driver: Box<dyn VmiDriver> = Box::new(Self(info));
        Vmi::new(driver)
    }

    fn refuse<T>(&self) -> Result<T> {
        Err(VmiError::NotSupported { driver: self.0.driver, capability: "this to a controller that is a Python object" })
    }
}

struct Deaf;

impl Waker for Deaf {
    fn wake(&self) {}
}

impl VmiInfo for Nothing {
    fn info(&self) -> &VmInfo {
        &self.0
    }

    fn caps(&self) -> Caps {
        Caps::default()
    }

    fn version(&self) -> String {
        String::new()
    }
}

impl VmiRead for Nothing {
    fn read(&self, _: Pa, _: &mut [u8]) -> Result<()> {
        self.refuse()
    }
}

impl VmiWrite for Nothing {
    fn write(&mut self, _: Pa, _: &[u8]) -> Result<()> {
        self.refuse()
    }
}

impl VmiRegisters for Nothing {
    fn registers(&self, _: VcpuId) -> Result<Registers> {
        self.refuse()
    }

    fn set_registers(&mut self, _: VcpuId, _: &Registers) -> Result<()> {
        self.refuse()
    }
}

impl VmiViews for Nothing {
    fn create_view(&mut self, _: MemoryAccess) -> Result<View> {
        self.refuse()
    }

    fn destroy_view(&mut self, _: View) -> Result<()> {
        self.refuse()
    }

    fn switch_to_view(&mut self, _: View) -> Result<()> {
        self.refuse()
    }

    fn vcpu_view(&self, _: VcpuId) -> Result<View> {
        self.refuse()
    }

    fn remap(&mut self, _: View, _: Gfn, _: Option<Gfn>) -> Result<()> {
        self.refuse()
    }
}

impl VmiProtection for Nothing {
    fn memory_access(&self, _: View, _: Gfn) -> Result<MemoryAccess> {
        self.refuse()
    }

    fn set_memory_access(&mut self, _: View, _: Gfn, _: MemoryAccess) -> Result<()> {
        self.refuse()
    }

    fn set_memory_access_multi(&mut self, _: View, _: &[(Gfn, MemoryAccess)]) -> Result<()> {
        self.refuse()
    }
}

impl VmiFrames for Nothing {
    fn allocate_frames(&mut self, _: usize) -> Result<Vec<Gfn>> {
        self.refuse()
    }

    fn free_frames(&mut self, _: &[Gfn]) -> Result<()> {
        self.refuse()
    }

    fn frames_in_use(&self) -> usize {
        0
    }
}

impl VmiEvents for Nothing {
    fn monitor(&mut self, _: Monitor, _: bool) -> Result<()> {
        self.refuse()
    }

    fn wait(&mut self, _: Duration) -> Result<Wait> {
        self.refuse()
    }

    fn respond(&mut self, _: VcpuId, _: &event::VmiEventResponse) -> Result<()> {
        self.refuse()
    }

    fn waker(&self) -> Arc<dyn Waker> {
        Arc::new(Deaf)
    }
}

impl VmiInject for Nothing {
    fn inject(&mut self, _: VcpuId, _: &Injection) -> Result<()> {
        self.refuse()
    }
}

impl VmiControl for Nothing {
    fn pause(&mut self) -> Result<()> {
        self.refuse()
    }

    fn resume(&mut self) -> Result<()> {
        self.refuse()
    }
}

impl VmiRepair for Nothing {
    fn additions(&self) -> Result<Additions> {
        self.refuse()
    }

    fn adopt(&mut self, _: &Additions, _: u32) -> Result<()> {
        self.refuse()
    }

    fn release_held(&mut self) -> Result<usize> {
        self.refuse()
    }
}

/// The object, and what it raised.
pub struct Foreign<'a, 'py> {
    object: &'a Bound<'py, PyAny>,
    /// What its `check_event` said, asked beforehand.
    found: Option<(View, Gfn)>,
    pub raised: Option<PyErr>,
}

impl<'a, 'py> Foreign<'a, 'py> {
    /// Asks the object about `event` right away, if one is given.
    pub fn new(object: &'a Bound<'py, PyAny>, event: Option<&Bound<'py, VmiEvent>>) -> PyResult<Self> {
        let found: Option<(Bound<'_, views::View>, u64)> = match event {
            Some(event) => object.call_method1("check_event", (event,))?.extract()?,
            None => None,
        };
        let found = found.map(|(view, gfn)| (view.get().id(), Gfn(gfn)));
        Ok(Self { object, found, raised: None })
    }

    fn call(&mut self, method: &str, number: u64, view: View) -> Result<()> {
        match self.object.call_method1(method, (number, views::View::from(view))) {
            Ok(_) => Ok(()),
            Err(error) => {
                let detail = error.to_string();
                self.raised.get_or_insert(error);
                Err(VmiError::Driver { op: "a controller that is a Python object", errno: 0, detail })
            }
        }
    }
}

impl TapEvents for Foreign<'_, '_> {
    fn check_event(&self, _: &event::VmiEvent) -> Option<(View, Gfn)> {
        self.found
    }
}

impl<D: VmiDriver + ?Sized> TapController<D> for Foreign<'_, '_> {
    fn insert_breakpoint(&mut self, _: &mut crate::core::VmiCore<D>, pa: Pa, view: View) -> Result<()> {
        self.call("insert_breakpoint", pa.0, view)
    }

    fn remove_breakpoint(&mut self, _: &mut crate::core::VmiCore<D>, pa: Pa, view: View) -> Result<()> {
        self.call("remove_breakpoint", pa.0, view)
    }

    fn monitor(&mut self, _: &mut crate::core::VmiCore<D>, gfn: Gfn, view: View) -> Result<()> {
        self.call("monitor", gfn.0, view)
    }

    fn unmonitor(&mut self, _: &mut crate::core::VmiCore<D>, gfn: Gfn, view: View) -> Result<()> {
        self.call("unmonitor", gfn.0, view)
    }
}
