//! Breakpoints by identity, for people who write their own loop.

use std::sync::Arc;

use parking_lot::Mutex;
use pyo3::PyTraverseError;
use pyo3::gc::PyVisit;
use pyo3::prelude::*;
use pyo3::types::{PyIterator, PyList};

use super::controllers::{BreakpointController, MemoryController, Planted};
use super::event::VmiEvent;
use super::foreign::{Foreign, Nothing};
use super::tables::PageTableEvent;
use crate::addr::{Pa, Va};
use crate::driver::VmiDriver;
use crate::error::{Result, TranslationFault, VmiError};
use crate::python::convert::{number, optional};
use crate::python::errors::{busy, invalid};
use crate::python::shared::Shared;
use crate::python::views::View;
use crate::python::vm::Vm;
use crate::session::{Vmi, handle_page_table_events};
use crate::tap::{self, Breakpoint, Found, TapController};

/// What Python gave with a breakpoint.
struct Labels {
    key: Py<PyAny>,
    tag: Py<PyAny>,
}

type Books = tap::BreakpointManager<u64, Arc<Labels>>;
type Controller<'a> = dyn TapController<dyn VmiDriver> + 'a;

enum Through {
    Ours(Planted),
    Theirs(Py<PyAny>),
}

/// Where a new breakpoint is.
#[derive(Clone, Copy)]
enum Hint {
    LookUp,
    /// The caller says it.
    At(Option<Pa>),
}

/// A [`Found`] that outlives the books' lock.
struct Seen {
    va: Va,
    root: Pa,
    view: crate::addr::View,
    pa: Option<Pa>,
    labels: Arc<Labels>,
    global: bool,
}

impl From<Found<'_, u64, Arc<Labels>>> for Seen {
    fn from(found: Found<'_, u64, Arc<Labels>>) -> Self {
        let Found { view, va, pa, context, tag, global, .. } = found;
        Self { va, root: context.root, view, pa, labels: tag.clone(), global }
    }
}

impl Seen {
    fn show(&self, py: Python<'_>) -> ManagedBreakpoint {
        ManagedBreakpoint {
            address: self.va.0,
            root: self.root.0,
            view: View::from(self.view),
            key: self.labels.key.clone_ref(py),
            tag: self.labels.tag.clone_ref(py),
            is_global: self.global,
            pa: self.pa.map(|pa| pa.0),
        }
    }
}

/// One breakpoint of a `BreakpointManager`, as a snapshot.
#[pyclass(frozen, get_all, module = "vmitap._native")]
pub struct ManagedBreakpoint {
    /// Its virtual address.
    address: u64,
    /// The page-table root it was inserted with.
    root: u64,
    /// The view it is in.
    view: View,
    /// Its owner.
    key: Py<PyAny>,
    /// What came with it.
    tag: Py<PyAny>,
    /// Whether it matches under every root.
    is_global: bool,
    /// Where it is planted; None while it is pending.
    pa: Option<u64>,
}

#[pymethods]
impl ManagedBreakpoint {
    fn __repr__(&self) -> String {
        let state = self.pa.map_or_else(|| "pending".to_owned(), |pa| format!("planted at {pa:#x}"));
        format!("<ManagedBreakpoint at {:#x} under root {:#x}, {state}>", self.address, self.root)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        visit.call(&self.key)?;
        visit.call(&self.tag)
    }
}

/// Keeps breakpoints by identity (view, address, root, key) and plants them through a `TapController`.
#[pyclass(frozen, module = "vmitap._native")]
pub struct BreakpointManager {
    vm: Py<Vm>,
    through: Through,
    /// With a controller of ours locked under the session's lock only; with another one never waited for.
    books: Mutex<Books>,
}

impl BreakpointManager {
    fn shared(&self) -> PyResult<&Arc<Shared>> {
        self.vm.get().open()
    }

    /// Works with the books and the controller. A controller that is a Python object runs without the session's lock.
    fn work<'py, T: Send>(
        &self,
        py: Python<'py>,
        event: Option<&Bound<'py, VmiEvent>>,
        work: impl FnOnce(&mut Books, &mut Vmi, &mut Controller<'_>) -> Result<T> + Send,
    ) -> PyResult<T> {
        let shared = self.shared()?;
        match &self.through {
            Through::Ours(planted) => shared.open_released(py, |session| {
                let mut books = self.books.lock();
                planted.with(|controller| work(&mut books, session.vmi_mut(), controller))
            }),
            Through::Theirs(object) => {
                let mut foreign = Foreign::new(object.bind(py), event)?;
                let Some(mut books) = self.books.try_lock() else { return Err(busy("a BreakpointManager")) };
                let result = work(&mut books, &mut Nothing::vmi(shared.info.clone()), &mut foreign);
                drop(books);
                result.map_err(|error| match (error, foreign.raised) {
                    (VmiError::Driver { .. }, Some(raised)) => raised,
                    (error, _) => error.into(),
                })
            }
        }
    }

    /// As [`Self::work`], for what changes nothing.
    fn look<T: Send>(&self, py: Python<'_>, look: impl FnOnce(&Books) -> T + Send) -> PyResult<T> {
        match &self.through {
            Through::Ours(_) => Ok(self.vm.get().current()?.quick(py, |_| look(&self.books.lock()))),
            Through::Theirs(_) => match self.books.try_lock() {
                Some(books) => Ok(look(&books)),
                None => Err(busy("a BreakpointManager")),
            },
        }
    }

    fn key(&self, py: Python<'_>, key: Option<&Bound<'_, PyAny>>) -> PyResult<u64> {
        let shared = self.shared()?;
        match key {
            Some(key) => shared.intern(py, key),
            None => shared.intern(py, &py.None().into_bound(py)),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the signatures Python sees")]
    fn add(
        &self,
        py: Python<'_>,
        (address, root): (&Bound<'_, PyAny>, &Bound<'_, PyAny>),
        view: &Bound<'_, View>,
        hint: Hint,
        key: Option<&Bound<'_, PyAny>>,
        tag: Option<Py<PyAny>>,
        global: bool,
    ) -> PyResult<bool> {
        let (va, root) = (Va(number("address", address)?), number("root", root)?);
        let labels = Arc::new(Labels {
            key: key.map_or_else(|| py.None(), |key| key.clone().unbind()),
            tag: tag.unwrap_or_else(|| py.None()),
        });
        let key = self.key(py, key)?;
        let vm = self.vm.get();
        let is_ours = matches!(self.through, Through::Ours(_));
        let (context, found) = self.shared()?.open(py, |session| {
            let context = vm.context(session, Some(root))?;
            let found = match hint {
                Hint::LookUp if !is_ours => match session.vmi().translate(va, context) {
                    Ok(pa) => Hint::At(Some(pa)),
                    Err(VmiError::Translation { fault: TranslationFault::NotPresent { .. }, .. }) => Hint::At(None),
                    Err(error) => return Err(error),
                },
                hint => hint,
            };
            Ok((context, found))
        })?;
        let breakpoint = Breakpoint { view: view.get().id(), va, context, key, tag: labels, global };
        self.work(py, None, |books, vmi, controller| match found {
            Hint::At(pa) => books.insert_with_hint(vmi, controller, breakpoint, pa),
            Hint::LookUp => books.insert(vmi, controller, breakpoint),
        })
    }

    fn find(&self, event: &Bound<'_, VmiEvent>, key: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Seen>> {
        let py = event.py();
        let (key, happened) = (self.key(py, key)?, event.get().event);
        self.work(py, Some(event), |books, _, controller| Ok(books.get_by_event(&*controller, &happened, &key).map(Seen::from)))
    }
}

#[pymethods]
impl BreakpointManager {
    #[new]
    #[pyo3(signature = (vm, controller=None))]
    fn new(py: Python<'_>, vm: Py<Vm>, controller: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let through = match controller {
            None => {
                let planted = Planted::breakpoints();
                planted.hand_over(py, vm.get())?;
                Through::Ours(planted)
            }
            Some(object) => {
                let ours = (object.cast::<BreakpointController>().map(|each| (each.get().planted.clone(), &each.get().vm)))
                    .or_else(|_| object.cast::<MemoryController>().map(|each| (each.get().planted.clone(), &each.get().vm)));
                match ours {
                    Ok((_, other)) if !Arc::ptr_eq(other.get().open()?, vm.get().open()?) => {
                        return Err(invalid("controller", "it is of another session"));
                    }
                    Ok((planted, _)) => Through::Ours(planted),
                    Err(_) => Through::Theirs(object.clone().unbind()),
                }
            }
        };
        Ok(Self { vm, through, books: Mutex::default() })
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        self.look(py, Books::len)
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        let seen = self.look(py, |books| books.iter().map(Seen::from).collect::<Vec<_>>())?;
        let shown: Vec<_> = seen.iter().map(|each| each.show(py)).collect();
        PyList::new(py, shown)?.try_iter()
    }

    /// Inserts a breakpoint: active if the address is mapped under `root`, else pending.
    #[pyo3(signature = (address, root, view, *, key=None, tag=None, is_global=false))]
    #[expect(clippy::too_many_arguments, reason = "the signature Python sees")]
    fn insert(
        &self,
        py: Python<'_>,
        address: &Bound<'_, PyAny>,
        root: &Bound<'_, PyAny>,
        view: &Bound<'_, View>,
        key: Option<&Bound<'_, PyAny>>,
        tag: Option<Py<PyAny>>,
        is_global: bool,
    ) -> PyResult<bool> {
        self.add(py, (address, root), view, Hint::LookUp, key, tag, is_global)
    }

    /// As `insert`, with the translation given: None makes it pending.
    #[pyo3(signature = (address, root, view, pa, *, key=None, tag=None, is_global=false))]
    #[expect(clippy::too_many_arguments, reason = "the signature Python sees")]
    fn insert_with_hint(
        &self,
        py: Python<'_>,
        address: &Bound<'_, PyAny>,
        root: &Bound<'_, PyAny>,
        view: &Bound<'_, View>,
        pa: Option<&Bound<'_, PyAny>>,
        key: Option<&Bound<'_, PyAny>>,
        tag: Option<Py<PyAny>>,
        is_global: bool,
    ) -> PyResult<bool> {
        let pa = optional("pa", pa)?.map(Pa);
        self.add(py, (address, root), view, Hint::At(pa), key, tag, is_global)
    }

    /// Removes a breakpoint by its identity, wherever it is planted now. Returns whether there was one.
    #[pyo3(signature = (address, root, view, *, key=None))]
    fn remove(
        &self,
        py: Python<'_>,
        address: &Bound<'_, PyAny>,
        root: &Bound<'_, PyAny>,
        view: &Bound<'_, View>,
        key: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<bool> {
        let (va, root, view) = (Va(number("address", address)?), Pa(number("root", root)?), view.get().id());
        let key = self.key(py, key)?;
        self.work(py, None, |books, vmi, controller| books.remove(vmi, controller, view, va, root, &key))
    }

    /// As `remove`, for callers who know where the address is mapped (None: it is not).
    ///
    /// Where a breakpoint is planted is known, so `pa` decides nothing.
    #[pyo3(signature = (address, root, view, pa, *, key=None))]
    fn remove_with_hint(
        &self,
        py: Python<'_>,
        address: &Bound<'_, PyAny>,
        root: &Bound<'_, PyAny>,
        view: &Bound<'_, View>,
        pa: Option<&Bound<'_, PyAny>>,
        key: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<bool> {
        let (va, root, view) = (Va(number("address", address)?), Pa(number("root", root)?), view.get().id());
        let (pa, key) = (optional("pa", pa)?.map(Pa), self.key(py, key)?);
        self.work(py, None, |books, vmi, controller| books.remove_with_hint(vmi, controller, view, va, root, pa, &key))
    }

    /// Removes what `get_by_event` finds, in all views, pending ones too.
    #[pyo3(signature = (event, key=None))]
    fn remove_by_event(&self, event: &Bound<'_, VmiEvent>, key: Option<&Bound<'_, PyAny>>) -> PyResult<Option<bool>> {
        let py = event.py();
        let (key, happened) = (self.key(py, key)?, event.get().event);
        self.work(py, Some(event), |books, vmi, controller| books.remove_by_event(vmi, controller, &happened, &key))
    }

    /// Removes every breakpoint of a view; returns how many.
    fn remove_by_view(&self, py: Python<'_>, view: &Bound<'_, View>) -> PyResult<usize> {
        let view = view.get().id();
        self.work(py, None, |books, vmi, controller| books.remove_by_view(vmi, controller, view))
    }

    /// The breakpoint of that key at an event.
    #[pyo3(signature = (event, key=None))]
    fn get_by_event(&self, event: &Bound<'_, VmiEvent>, key: Option<&Bound<'_, PyAny>>) -> PyResult<Option<ManagedBreakpoint>> {
        Ok(self.find(event, key)?.map(|seen| seen.show(event.py())))
    }

    /// The breakpoints of every key at an event, in order of insertion.
    fn get_all_by_event(&self, event: &Bound<'_, VmiEvent>) -> PyResult<Vec<ManagedBreakpoint>> {
        let (py, happened) = (event.py(), event.get().event);
        let seen = self.work(py, Some(event), |books, _, controller| {
            Ok(books.all_by_event(&*controller, &happened).into_iter().map(Seen::from).collect::<Vec<_>>())
        })?;
        Ok(seen.iter().map(|each| each.show(py)).collect())
    }

    /// Whether `get_by_event` finds one.
    #[pyo3(signature = (event, key=None))]
    fn contains_by_event(&self, event: &Bound<'_, VmiEvent>, key: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        Ok(self.find(event, key)?.is_some())
    }

    /// Whether a breakpoint of any key is at that address, active or pending.
    fn contains_by_address(
        &self,
        py: Python<'_>,
        address: &Bound<'_, PyAny>,
        root: &Bound<'_, PyAny>,
        view: &Bound<'_, View>,
    ) -> PyResult<bool> {
        let (va, root, view) = (Va(number("address", address)?), Pa(number("root", root)?), view.get().id());
        self.look(py, |books| books.contains_by_address(va, root, view))
    }

    /// Carries out what a `PageTableMonitor` told: breakpoints whose page went are pending, those whose page came are planted.
    #[expect(clippy::needless_pass_by_value, reason = "arguments from Python are owned")]
    fn handle_page_table_events(&self, py: Python<'_>, events: Vec<Bound<'_, PageTableEvent>>) -> PyResult<usize> {
        let events: Vec<_> = events.iter().map(|event| event.get().0).collect();
        self.work(py, None, |books, vmi, controller| handle_page_table_events(books, vmi, controller, &events))
    }

    /// Removes all.
    fn clear(&self, py: Python<'_>) -> PyResult<()> {
        self.work(py, None, |books, vmi, controller| books.clear(vmi, controller))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> std::result::Result<(), PyTraverseError> {
        visit.call(&self.vm)?;
        if let Through::Theirs(object) = &self.through {
            visit.call(object)?;
        }
        Ok(())
    }
}
