//! Views, and facts about the guest.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyIterator, PyList};

use super::convert::{AccessArg, EVERYTHING, small, vcpu};
use super::shared::Shared;
use crate::{addr, driver};

/// A view: one map from the guest's physical pages to frames and access rights. Two are equal if their numbers are.
#[pyclass(frozen, eq, hash, module = "vmitap._native")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct View(u16);

impl From<u16> for View {
    fn from(id: u16) -> Self {
        Self(id)
    }
}

impl From<addr::View> for View {
    fn from(view: addr::View) -> Self {
        Self(view.0)
    }
}

impl View {
    pub const fn id(self) -> addr::View {
        addr::View(self.0)
    }
}

#[pymethods]
#[expect(clippy::trivially_copy_pass_by_ref, reason = "Python holds it by reference")]
impl View {
    #[new]
    fn new(id: &Bound<'_, PyAny>) -> PyResult<Self> {
        small("id", id, u16::MAX.into()).map(Self)
    }

    /// Its number; 0 is the default view, in which nothing is ever hidden.
    #[getter(id)]
    fn number(&self) -> u16 {
        self.0
    }

    /// Whether it is the default view.
    #[getter]
    fn is_default(&self) -> bool {
        self.id() == addr::View::DEFAULT
    }

    fn __repr__(&self) -> String {
        format!("View({})", self.0)
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> (Bound<'py, PyAny>, (u16,)) {
        (slf.get_type().into_any(), (slf.get().0,))
    }
}

/// The views of a session: the default one, the one it taps in, and those you create.
#[pyclass(frozen, module = "vmitap._native")]
pub struct Views(pub Arc<Shared>);

impl Views {
    fn all(&self, py: Python<'_>) -> PyResult<Vec<View>> {
        let views = self.0.open(py, |session| Ok(session.views()))?;
        Ok(views.into_iter().map(View::from).collect())
    }
}

#[pymethods]
impl Views {
    /// The view the guest has when nobody taps it.
    #[getter]
    #[expect(clippy::unused_self, reason = "a property")]
    fn default(&self) -> View {
        View::from(addr::View::DEFAULT)
    }

    /// The view the session's own breakpoints are planted in.
    #[getter]
    fn tap(&self, py: Python<'_>) -> View {
        View::from(self.0.quick(py, |inner| inner.session.tap_view()))
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.all(py)?.len())
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        PyList::new(py, self.all(py)?)?.try_iter()
    }

    /// Makes a view that maps every page to itself.
    #[pyo3(signature = (access=EVERYTHING))]
    fn create(&self, py: Python<'_>, access: AccessArg) -> PyResult<View> {
        self.0.open(py, |session| session.create_view(access.0)).map(View::from)
    }

    /// Removes a view that you created, with the breakpoints in it; vCPUs in it go to the tap view.
    fn destroy(&self, py: Python<'_>, view: &Bound<'_, View>) -> PyResult<()> {
        let view = view.get().id();
        self.0.open(py, |session| session.destroy_view(view))
    }

    /// Puts every vCPU into `view`.
    fn switch_to(&self, py: Python<'_>, view: &Bound<'_, View>) -> PyResult<()> {
        let view = view.get().id();
        self.0.open(py, |session| session.switch_to_view(view))
    }

    /// The view a vCPU is in.
    fn of(&self, py: Python<'_>, vcpu: &Bound<'_, PyAny>) -> PyResult<View> {
        let vcpu = self::vcpu(vcpu, self.0.info.vcpus)?;
        self.0.open(py, |session| session.vmi().driver().vcpu_view(vcpu)).map(View::from)
    }
}

/// Facts about a guest that do not change while it lives.
#[pyclass(frozen, get_all, module = "vmitap._native")]
pub struct VmInfo {
    /// The driver's name.
    driver: &'static str,
    /// The guest's name, as the user knows it.
    name: String,
    /// Bytes of guest-physical address space, from 0.
    memory_size: u64,
    /// How many vCPUs there are.
    vcpus: u16,
    /// What the driver runs on, such as "unicorn 2.1.4"; of a dump its format, such as "ELF core".
    version: String,
}

impl VmInfo {
    pub fn new(shared: &Shared) -> Self {
        let driver::VmInfo { driver, name, memory_size, vcpus } = shared.info.clone();
        Self { driver, name, memory_size, vcpus, version: shared.version.clone() }
    }
}

#[pymethods]
impl VmInfo {
    fn __repr__(&self) -> String {
        let Self { driver, name, memory_size, vcpus, version } = self;
        format!("<VmInfo {name:?}: {memory_size} bytes, {vcpus} vCPUs, {driver} on {version}>")
    }
}

macro_rules! caps {
    ($($(#[doc = $doc:literal])* $name:ident: $type:ty,)*) => {
        /// What a driver can do with the guest it is attached to; found by probing, never by a version number.
        #[pyclass(frozen, get_all, module = "vmitap._native")]
        pub struct Caps {
            $($(#[doc = $doc])* $name: $type,)*
        }

        impl From<driver::Caps> for Caps {
            fn from(caps: driver::Caps) -> Self {
                Self { $($name: caps.$name,)* }
            }
        }

        #[pymethods]
        impl Caps {
            /// Every capability by name.
            fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
                let dict = PyDict::new(py);
                $(dict.set_item(stringify!($name), self.$name)?;)*
                Ok(dict)
            }

            fn __repr__(&self) -> String {
                let shown = [$(format!("{}={}", stringify!($name), self.$name)),*];
                format!("<Caps {}>", shown.join(" "))
            }
        }
    };
}

caps! {
    /// Guest memory can be written.
    write: bool,
    /// Registers can be read, and written where memory can be written.
    registers: bool,
    /// Views can be created, and pages remapped and protected in them.
    views: bool,
    /// Most views that can exist beside the default one.
    max_views: u16,
    /// Events can be waited for.
    events: bool,
    /// One instruction can be executed in another view, with an event behind it.
    single_step: bool,
    /// One instruction can be executed in another view without an event.
    fast_single_step: bool,
    /// A denied read can be served without switching views.
    emulate_read: bool,
    /// Exceptions and interrupts can be injected.
    injection: bool,
    /// The guest can be paused.
    pause: bool,
    /// Access rights of many pages can be set in one call.
    multi_access: bool,
}
